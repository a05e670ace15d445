"""Mixtures given beforehand, by size, UniMax and schedules, ADO, and weights of losses."""
import json

import numpy as np
import pytest
import torch

import methods
from configurator import BadInput
from data import Feeder, MixtureLoader, Source
from methods import mixtures, rules
from model import GPT, ModelConfig, init_weights
from tests.conftest import make_source, train, write_shard

LOOP = dict(
    sources={'a': 1.0, 'b': 1.0}, max_steps=20, eval_interval=20, save_interval=5, batch_size=4,
    total_batch_tokens=128, max_epochs=None)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """'a' has 248 rows of 16 tokens, 'b' 62 and 'c' 30."""
    folder = tmp_path_factory.mktemp('schedules') / 'data'
    for name, n in (('a', 4000), ('b', 1000), ('c', 500)):
        make_source(folder, name, n)
    return folder


def sized(**sizes):
    """Stands for Sources, of which only name and n_windows count here."""
    return [type('Sized', (), dict(name=name, n_windows=n)) for name, n in sizes.items()]


def sequential_unimax(sizes, budget, epochs):
    """The paper's algorithm: from the smallest source on, an equal part of what is left."""
    left = budget
    rows = {}
    for i, name in enumerate(sorted(sizes, key=sizes.get)):
        rows[name] = min(left / (len(sizes) - i), epochs * sizes[name])
        left -= rows[name]
    return {name: n / sum(rows.values()) for name, n in rows.items()}


# -- by size, and UniMax ---------------------------------------------------------------------------


def test_unimax_is_the_papers_algorithm():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = {f's{i}': int(n) for i, n in enumerate(rng.integers(1, 1000, 6))}
        budget = int(rng.integers(100, 6000))
        epochs = float(rng.choice([1, 2, 4]))
        found = mixtures.unimax(sized(**sizes), epochs, {}, budget)
        assert found == pytest.approx(sequential_unimax(sizes, budget, epochs), abs=1e-9)
        if budget < epochs * sum(sizes.values()):
            for name, share in found.items():
                assert share * budget <= epochs * sizes[name] * (1 + 1e-9)
    assert set(mixtures.unimax(sized(a=5, b=10), None, {}, 100).values()) == {0.5}
    # A run that goes on: of 'a' one row is left.
    assert mixtures.unimax(sized(a=5, b=90), 1.0, dict(a=4), 10)['a'] == pytest.approx(0.1)


@pytest.mark.parametrize('mixture, expected', [
    ('natural', [248 / 340, 62 / 340, 30 / 340]),
    # 160 rows, one epoch each: 'c' has 30, 'b' and 'a' share the rest until 'b' is used up.
    ('unimax', [68 / 160, 62 / 160, 30 / 160])])
def test_weights_of_a_whole_run(tmp_path, data, mixture, expected):
    knobs = {**LOOP, 'sources': dict(a=0.1, b=5.0, c=1.0), 'max_epochs': 1.0, 'mixture': mixture}
    run = train(tmp_path / 'run', data, **knobs)
    for step in range(20):
        weights = [run[step][f'mixture/weight_{name}'] for name in 'abc']
        assert weights == pytest.approx(expected, abs=1e-6)
    assert run[19]['mixture/epochs_c'] <= 1
    if mixture == 'unimax':
        assert run[19]['mixture/epochs_b'] == pytest.approx(1, abs=0.02)


def test_a_longer_run_of_unimax_has_new_weights(tmp_path, data, capsys):
    knobs = {**LOOP, 'sources': dict(a=1.0, c=1.0), 'max_epochs': 1.0, 'mixture': 'unimax'}
    train(tmp_path / 'run', data, **knobs, stop_step=5)
    # 7 or 8 of the 30 rows of 'c' have been read, and 25 steps of 8 rows are to come.
    again = train(tmp_path / 'run', data, **{**knobs, 'max_steps': 30}, resume=True)
    assert again[4]['mixture/weight_c'] == pytest.approx(30 / 160)
    assert again[29]['mixture/weight_c'] == pytest.approx(22.5 / 200, abs=0.5 / 200 + 1e-6)
    assert 0.9 < again[29]['mixture/epochs_c'] <= 1
    said = capsys.readouterr().out
    assert 'epochs of all sources together' not in said
    train(tmp_path / 'long', data, **{**knobs, 'max_steps': 40}, stop_step=1)
    said = capsys.readouterr().out
    assert 'warning: the run draws 320 rows, which are 1.15 epochs of all sources together' in said


# -- schedules -------------------------------------------------------------------------------------


def write_schedule(folder, points, interpolation='linear'):
    path = folder / 'schedule.json'
    path.write_text(json.dumps(dict(interpolation=interpolation, points=points)))
    return path


POINTS = [
    dict(step=0, weights=dict(a=3, b=1)), dict(step=10, weights=dict(a=1, b=3)),
    dict(step=16, weights=dict(a=0, b=2))]


def test_a_schedule_goes_from_point_to_point():
    points = [(0, dict(a=0.8, b=0.2)), (10, dict(a=0.2, b=0.8)), (12, dict(a=1.0, b=0.0))]
    xs = np.arange(20)
    expected = np.interp(xs, [0, 10, 12], [0.8, 0.2, 1.0])
    found = [rules.schedule_weights(points, x, 'linear') for x in xs]
    assert [w['a'] for w in found] == pytest.approx(expected)
    assert [w['b'] for w in found] == pytest.approx(1 - expected)
    held = [rules.schedule_weights(points, x, 'step')['a'] for x in (0, 9, 10, 11, 12, 99)]
    assert held == [0.8, 0.8, 0.2, 0.2, 1.0, 1.0]


@pytest.mark.parametrize('interpolation', ['linear', 'step'])
def test_a_scheduled_run_follows_its_file_and_resumes_the_same(tmp_path, data, interpolation):
    path = write_schedule(tmp_path, POINTS, interpolation)
    knobs = {**LOOP, 'mixture': 'schedule', 'mixture_schedule': path}
    whole = train(tmp_path / 'whole', data, **knobs)
    drawn = 0
    for step in range(20):
        if interpolation == 'linear':
            expected = np.interp(step, [0, 10, 16], [0.75, 0.25, 0])
        else:
            expected = 0.75 if step < 10 else 0.25 if step < 16 else 0
        assert whole[step]['mixture/weight_a'] == pytest.approx(expected, abs=1e-6)
        drawn += 8 * (whole[step]['mixture/drawn_a'] - expected)
        assert abs(drawn) < 1.01                # the sampler obeys
    assert whole[10]['mixture/asked_b'] == pytest.approx(0.75)
    for stop in (7, 20):                        # between points, and saved there
        again = train(tmp_path / 'again', data, **knobs, stop_step=stop, resume=True)
    for step in whole:
        for key, value in whole[step].items():
            if key.startswith(('train/loss', 'train/grad_norm', 'mixture/')):
                assert again[step][key] == value, (step, key)


def test_shares_of_a_run_and_other_sources_of_weight_0(tmp_path, data):
    points = [dict(share=0, weights=dict(a=1, b=0)), dict(share=0.52, weights=dict(a=0, b=1))]
    path = write_schedule(tmp_path, points, 'step')
    knobs = {
        **LOOP, 'mixture': 'schedule', 'mixture_schedule': path,
        'sources': dict(a=1.0, c=0.0, b=1.0)}
    run = train(tmp_path / 'run', data, **knobs)
    weights = [run[step]['mixture/weight_b'] for step in range(20)]
    assert weights == [0.0] * 11 + [1.0] * 9 and run[19]['mixture/epochs_c'] == 0


def test_a_schedule_keeps_max_epochs(tmp_path, data):
    # 80 rows of 'b' are asked for and it has 62. 'a' has enough.
    path = write_schedule(tmp_path, [dict(step=0, weights=dict(a=1, b=1))])
    knobs = {**LOOP, 'mixture': 'schedule', 'mixture_schedule': path, 'max_epochs': 1.0}
    run = train(tmp_path / 'run', data, **knobs)
    assert run[0]['mixture/asked_b'] == 0.5
    assert run[0]['mixture/weight_b'] == pytest.approx(62 / 160)
    assert run[19]['mixture/epochs_b'] == pytest.approx(1, abs=0.02)
    # A burst that fits is left as it is, though it would break the limit if it stayed.
    path = write_schedule(
        tmp_path, [dict(step=0, weights=dict(a=0, b=1)), dict(step=5, weights=dict(a=1, b=0))],
        'step')
    run = train(tmp_path / 'burst', data, **{**knobs, 'mixture_schedule': path})
    assert run[4]['mixture/weight_b'] == 1 and run[19]['mixture/epochs_b'] == 40 / 62


def test_a_run_continues_another_with_a_schedule(tmp_path, data):
    path = write_schedule(tmp_path, [dict(step=0, weights=dict(a=1, b=1))], 'step')
    knobs = {**LOOP, 'mixture': 'schedule', 'mixture_schedule': path}
    train(tmp_path / 'parent', data, **knobs, stop_step=5)
    path = write_schedule(tmp_path, POINTS, 'step')
    run = train(tmp_path / 'child', data, **knobs, continue_from=tmp_path / 'parent')
    assert min(run) == 5 and run[5]['mixture/weight_a'] == 0.75     # step 5 is no point
    train(tmp_path / 'fixed', data, **LOOP, stop_step=5)
    run = train(tmp_path / 'after', data, **knobs, continue_from=tmp_path / 'fixed')
    assert run[5]['mixture/weight_a'] == 0.75
    # Another file counts at once.
    train(tmp_path / 'changed', data, **knobs, stop_step=7)
    path = write_schedule(tmp_path, [dict(step=0, weights=dict(a=1, b=7))], 'step')
    run = train(tmp_path / 'changed', data, **knobs, resume=True)
    assert run[6]['mixture/weight_a'] == 0.75 and run[7]['mixture/weight_a'] == 0.125


@pytest.mark.parametrize('content, words', [
    ('{"points": []}', "no field 'interpolation'"),
    ('[]', 'holds a list'),
    ('{"interpolation": "cubic", "points": []}', "'cubic' must be 'linear' or 'step'"),
    ('{"interpolation": "step", "points": []}', 'points is empty'),
    ('{"interpolation": "step", "points": [], "point": 1}', "Did you mean 'points'"),
    ([1], 'point 0 is no object'),
    ([dict(step=0)], 'has the fields step. Every point needs "weights"'),
    ([dict(step=0, share=0, weights=dict(a=1, b=1))], 'either "step" or "share"'),
    ([dict(step=0, weights=dict(a=1, b=1)), dict(share=1, weights=dict(a=1, b=1))],
     'point 1 has the fields share, weights'),
    ([dict(step=1, weights=dict(a=1, b=1))], 'the first step is 1 and must be 0'),
    ([dict(step=0.5, weights=dict(a=1, b=1))], 'step = 0.5 must be a whole number'),
    ([dict(share='x', weights=dict(a=1, b=1))], "share = 'x' must be between 0 and 1"),
    ([dict(step=0, weights=dict(a=1, b=1)), dict(step=0, weights=dict(a=1, b=1))],
     'step = 0 must be above that of the point before, 0'),
    ([dict(share=0, weights=dict(a=1, b=1)), dict(share=1.5, weights=dict(a=1, b=1))],
     'share = 1.5 must be between 0 and 1'),
    ([dict(step=0, weights=[1, 1])], 'weights = .* must be an object'),
    ([dict(step=0, weights=dict(a=1))], 'has no weight for b'),
    ([dict(step=0, weights=dict(a=1, b=1, d=1))], "the source 'd', which has no weight"),
    ([dict(step=0, weights=dict(a=1, b=-1))], "weight of 'b' is -1"),
    ([dict(step=0, weights=dict(a=1, b='1'))], "weight of 'b' is '1'"),
    ('{"interpolation": "step", "points": [{"step": 0, "weights": {"a": NaN, "b": 1}}]}',
     "weight of 'a' is nan"),
    ([dict(step=0, weights=dict(a=0, b=0))], 'sum to 0'),
])
def test_a_wrong_schedule_is_one_sentence(tmp_path, content, words):
    path = tmp_path / 'schedule.json'
    if isinstance(content, list):
        content = json.dumps(dict(interpolation='step', points=content))
    path.write_text(content)
    with pytest.raises(BadInput, match=words):
        mixtures.read_schedule(str(path), ['a', 'b'])


def test_a_schedule_needs_a_file(tmp_path, data):
    for change, words in (
            ({}, 'needs mixture_schedule'), (dict(mixture_schedule='no.json'), 'is no file'),
            (dict(sources=dict(a=1.0)), 'there is only one|needs mixture_schedule')):
        with pytest.raises(BadInput, match=words):
            train(tmp_path / 'run', data, **{**LOOP, 'mixture': 'schedule', **change})
        assert not (tmp_path / 'run').exists()


# -- ADO -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('floor, scale, exponent, noise', [
    (2.0, 20.0, 0.3, 0.0), (1.8, 50.0, 0.45, 0.02), (2.5, 8.0, 0.2, 0.05), (0.3, 3.0, 0.3, 0.03)])
def test_a_law_is_fitted_as_scipy_fits_it(floor, scale, exponent, noise):
    optimize = pytest.importorskip('scipy.optimize')
    rng = np.random.default_rng(0)
    n = np.arange(1, 301) * 1600.0
    losses = (floor + scale * n**-exponent) * np.exp(noise * rng.standard_normal(len(n)))
    found = rules.fit_power_law(n, losses)
    if not noise:
        assert found == pytest.approx((floor, scale, exponent), rel=1e-4)

    def residuals(p):
        return np.log(np.exp(p[0]) + np.exp(p[1] - p[2] * np.log(n))) - np.log(losses)

    def objective(r):
        r = np.abs(r)
        return np.where(r > 1e-3, 1e-3 * (r - 5e-4), r * r / 2).sum()

    low = np.log(min(np.exp(0.5), losses.min() / 2))
    fits = []
    for start in ([low + 0.5, 2, 0.1], [low + 0.1, 2, 0.6]):
        fits.append(optimize.least_squares(
            residuals, start, loss='huber', f_scale=1e-3,
            bounds=([low, -20, 0.001], [9, 20, 0.8]), max_nfev=1000))
    theirs = min(fits, key=lambda fit: objective(fit.fun))
    a, b, c = theirs.x
    ours = residuals([np.log(found[0]), np.log(found[1]), found[2]])
    assert objective(ours) <= objective(theirs.fun) + 1e-8
    assert found == pytest.approx((np.exp(a), np.exp(b), c), rel=2e-3)


def test_laws_keep_their_bounds():
    n = np.arange(1, 50) * 100.0
    rising = rules.fit_power_law(n, 2 + 1e-4 * n)
    assert rising[1] == 0 and rising[0] > 2              # no source gets a negative speed
    steep = rules.fit_power_law(n, 0.1 + 1e4 * n**-2)
    assert steep[2] == pytest.approx(0.8) and steep[0] >= 0.05


def test_ados_step_is_the_published_one():
    """Its speed is the slope of the law, and a round of one step is Algorithm 1."""
    prior = dict(a=0.5, b=0.3, c=0.2)
    laws = dict(a=(2.0, 30.0, 0.4), b=(1.5, 5.0, 0.2), c=(3.0, 1e-9, 0.5))
    rows = 32
    weights, state, log = rules.update_ado(prior, laws, {}, range(100, 101), rows)
    n = 100.0 * rows
    for name, (floor, scale, exponent) in laws.items():
        slope = (floor + scale * (n - 1)**-exponent - floor - scale * (n + 1)**-exponent) / 2
        assert log['speed'][name] == pytest.approx(slope, rel=1e-4)
    new = {name: prior[name] * log['speed'][name] * prior[name] ** 0.5 for name in prior}
    total = sum(new.values())
    new = {name: max(x / total, 0.01) for name, x in new.items()}
    new = {name: x / sum(new.values()) for name, x in new.items()}
    assert new['c'] == pytest.approx(0.01, abs=1e-3)
    for name in prior:
        drawn = 0.1 * new[name] + 0.9 * prior[name]
        assert weights[name] == pytest.approx(drawn)
        assert state['history'][name] == pytest.approx(0.9 * prior[name] + 0.1 * drawn)
        assert state['average'][name] == pytest.approx(prior[name] * 100 / 101 + new[name] / 101)
    # A round of many steps has the mean of as many rounds of one.
    whole, end, _ = rules.update_ado(prior, laws, {}, range(100, 140), rows)
    state = {}
    single = []
    for step in range(100, 140):
        weights, state, _ = rules.update_ado(prior, laws, state, range(step, step + 1), rows)
        single.append(weights['a'])
    assert whole['a'] == pytest.approx(np.mean(single)) and end == state
    # Where no loss falls any more, the prior stays.
    flat, _, _ = rules.update_ado(prior, dict.fromkeys(prior, (2.0, 0.0, 0.1)), {}, range(9, 12), 8)
    assert flat == pytest.approx(prior)


ADO = dict(
    sources={'a': 1.0, 'b': 1.0, 'noise': 1.0}, max_steps=60, mixture='ado', mixture_interval=20,
    mixture_warmup=4, eval_interval=60, save_interval=10, batch_size=4, total_batch_tokens=256,
    max_epochs=None, learning_rate=5e-3)


@pytest.fixture(scope='module')
def noisy_data(tmp_path_factory):
    """Two sources whose loss falls, and one of random tokens, whose loss stays."""
    folder = tmp_path_factory.mktemp('ado') / 'data'
    make_source(folder, 'a')
    make_source(folder, 'b')
    rng = np.random.default_rng(0)
    for split, n in (('train', 4000), ('val', 400)):
        write_shard(folder / 'noise' / split / '0.bin', rng.integers(0, 64, n))
    return folder


def test_ado_leaves_the_source_that_cannot_be_learned_and_resumes_the_same(tmp_path, noisy_data):
    whole = train(tmp_path / 'whole', noisy_data, **ADO)
    assert whole[10]['mixture/weight_noise'] == pytest.approx(1 / 3)
    assert whole[20]['mixture/points'] == 16                # the steps behind the warm-up
    assert whole[59]['mixture/weight_noise'] < 0.27
    assert whole[40]['mixture/speed_noise'] < 0.3 * whole[40]['mixture/speed_a']
    drawn = np.mean([whole[step]['mixture/drawn_noise'] for step in range(40, 60)])
    assert drawn == pytest.approx(whole[59]['mixture/weight_noise'], abs=0.02)
    for stop in (33, 60):
        again = train(tmp_path / 'again', noisy_data, **ADO, stop_step=stop, resume=True)
    for step in whole:
        for key, value in whole[step].items():
            if key.startswith(('train/loss', 'train/grad_norm', 'mixture/')):
                assert again[step][key] == value, (step, key)


def test_ados_losses_are_those_of_training(tmp_path, noisy_data):
    """With one source's share near 1 its law goes through the training loss of the run."""
    knobs = {**ADO, 'sources': {'a': 1.0, 'noise': 1e-6}, 'max_steps': 41}
    run = train(tmp_path / 'run', noisy_data, **knobs)
    state = json.loads((tmp_path / 'run/ckpt/step_000041/state.json').read_text())
    blocks = state['mixture_state']['blocks']
    assert [block['first'] for block in blocks] == list(range(41))
    for block in blocks:
        mean = sum(block['losses']) / sum(block['tokens'])
        assert mean == pytest.approx(run[block['first']]['train/loss'], rel=1e-6)
        assert sum(block['tokens']) == 256
    # 'noise' has no row in the batches, and nothing is fitted.
    assert run[20]['mixture/points'] == 0 and 'mixture/asked_a' not in run[20]


def test_two_ranks_fit_the_same_laws(tmp_path, noisy_data):
    knobs = {**ADO, 'max_steps': 24, 'batch_size': 2}
    one = train(tmp_path / 'one', noisy_data, **knobs)
    two = train(tmp_path / 'two', noisy_data, ranks=2, **knobs)
    for name in ('a', 'b', 'noise'):
        for kind in ('asked', 'speed', 'floor'):
            key = f'mixture/{kind}_{name}'
            assert two[20][key] == pytest.approx(one[20][key], rel=1e-3, abs=1e-9), key
    assert two[23]['train/loss'] == pytest.approx(one[23]['train/loss'], rel=1e-4)


def test_ado_refuses_what_hides_its_losses(tmp_path, noisy_data):
    with pytest.raises(BadInput, match='distillation under tp > 1'):
        mixtures.Ado(type('T', (), dict(config=dict(tp=2, teacher='t', kd_cache=None))))


# -- weights of the losses of sources --------------------------------------------------------------


def test_the_gradient_is_the_weighted_sum_of_the_sources(data):
    """In fp64, over two micro-batches with masked tokens, against the gradient of each source."""
    factors = dict(a=0.3, c=2.5)
    sources = [Source(str(data), name, 'train', 16, 0, 64) for name in 'abc']
    loader = MixtureLoader(sources, dict(a=1.0, b=1.0, c=1.0))
    config = dict(
        source_loss_weight=factors, sources=dict.fromkeys('abc', 1.0), presence='off',
        mixture='fixed')
    model = GPT(ModelConfig(
        vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, ffn_dim=48)).double()
    init_weights(model, 0)
    micro_batches = Feeder(torch.device('cpu'), 6).split(loader, loader.next_batch(12))
    micro_batches[0].targets[1, 3:9] = -1
    n_valid = sum(int((micro.targets >= 0).sum()) for micro in micro_batches)

    def gradient(loss_of):
        model.zero_grad()
        for micro in micro_batches:
            (loss_of(micro) / n_valid).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    chosen = methods.loss_weights(config, sources)

    def weighted(micro):
        weights = methods.TokenWeights(chosen, micro) if chosen else None
        return model.loss(micro.inputs, micro.targets, weights)[0]

    def of_source(i):
        def loss(micro):
            is_other = torch.from_numpy(micro.source_index != i)[:, None]
            return model.loss(micro.inputs, micro.targets.masked_fill(is_other, -1))[0]
        return loss

    expected = 0
    for i, name in enumerate('abc'):
        expected = expected + factors.get(name, 1.0) * gradient(of_source(i))
    found = gradient(weighted)
    # The factors are fp32.
    assert (found - expected).norm() < 1e-7 * expected.norm()
    plain = gradient(lambda micro: model.loss(micro.inputs, micro.targets)[0])
    assert (found - plain).norm() > 0.1 * plain.norm()


LOSSES = {**LOOP, 'max_steps': 2, 'grad_clip': 0.0, 'save_interval': 2}


def test_loss_weights_in_the_loop(tmp_path, data):
    plain = train(tmp_path / 'plain', data, **LOSSES)
    ones = train(tmp_path / 'ones', data, **LOSSES, source_loss_weight=dict(a=1.0, b=1.0))
    twos = train(tmp_path / 'twos', data, **LOSSES, source_loss_weight=dict(a=2.0, b=2.0))
    for step in plain:
        for key, value in plain[step].items():
            if key.startswith(('train/loss', 'train/grad_norm', 'mixture/', 'val/')):
                assert ones[step][key] == value, (step, key)
    # The loss is reported without factors, and the gradient has them.
    assert twos[0]['train/loss'] == plain[0]['train/loss']
    assert twos[0]['train/grad_norm'] == pytest.approx(2 * plain[0]['train/grad_norm'], rel=1e-6)
    knobs = {**LOSSES, 'source_loss_weight': dict(b=0.25)}
    one = train(tmp_path / 'one', data, **knobs)
    two = train(tmp_path / 'two', data, **{**knobs, 'batch_size': 2}, ranks=2)
    assert abs(one[0]['train/grad_norm'] / plain[0]['train/grad_norm'] - 1) > 0.05
    for step in range(2):
        for key in ('train/loss', 'train/grad_norm'):
            assert two[step][key] == pytest.approx(one[step][key], rel=1e-5)


def test_loss_weights_scale_the_loss_of_distillation(tmp_path, data):
    train(tmp_path / 'teacher', data, **LOSSES)
    knobs = {**LOSSES, 'max_steps': 1, 'teacher': tmp_path / 'teacher'}
    plain = train(tmp_path / 'plain', data, **knobs)
    twos = train(tmp_path / 'twos', data, **knobs, source_loss_weight=dict(a=2.0, b=2.0))
    assert twos[0]['kd/loss'] == plain[0]['kd/loss']
    assert twos[0]['train/grad_norm'] == pytest.approx(2 * plain[0]['train/grad_norm'], rel=1e-5)


@pytest.mark.parametrize('change, words', [
    (dict(source_loss_weight=dict(aa=1.0)), "names 'aa', which is not in `sources`"),
    (dict(source_loss_weight=dict(a=-1.0)), "factor of 'a' is -1 and must be finite"),
    (dict(source_loss_weight=dict(a=0.0, b=0.0)), 'leaves no source whose loss counts'),
    (dict(source_loss_weight=dict(a=0.5), presence='store'), "with presence = 'store'"),
    (dict(source_loss_weight=dict(a=0.5), mixture='doge'), "with mixture = 'doge'")])
def test_loss_weights_that_make_no_sense_are_refused(tmp_path, data, change, words):
    with pytest.raises(BadInput, match=words):
        train(tmp_path / 'run', data, **{**LOOP, **change})
    assert not (tmp_path / 'run').exists()
