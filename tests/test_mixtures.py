"""The mixture rules against worked cases, and in the training loop."""

import json

import numpy as np
import pytest

from configurator import BadInput
from methods import baselines, rules
from tests.conftest import SHARED, make_source, train, write_shard

CASES = SHARED.parent / 'reference' / 'mixing_update_cases.json'


@pytest.fixture(scope='module')
def cases():
    if not CASES.is_file():
        pytest.skip(f'{CASES} is not on this machine')
    return json.loads(CASES.read_text())


def named(values):
    return {str(i): value for i, value in enumerate(values)}


def listed(weights):
    return list(weights.values())


@pytest.mark.parametrize('n', range(5))
def test_aioli_rounds_of_the_public_code(cases, n):
    if n >= len(cases['aioli_rounds']['cases']):
        pytest.skip('there are fewer cases')
    case = cases['aioli_rounds']['cases'][n]
    m, sweeps, names = case['m'], case['sweeps'], [str(i) for i in range(case['m'])]
    P = rules.one_hot_mixtures(names, case['one_hot_factor'])
    code = dict(
        accumulate='p_accumulating_exponentiated_gradient',
        **({} if case['ema'] is None else dict(reference_ema='p_reference_code')),
    )
    for rule, expected in code.items():
        weights, state = rules.uniform(named(range(m))), {}
        per_round = 1 + sweeps * m
        for t in range(len(case['val_losses']) // per_round):
            losses = case['val_losses'][t * per_round : (t + 1) * per_round]
            order = [
                j
                for permutation in case['order'][t * sweeps : (t + 1) * sweeps]
                for j in permutation
            ]
            A = rules.aioli_matrix([listed(P[str(j)]) for j in order], -np.diff(losses, axis=0))
            weights, state, log = rules.update_aioli(
                weights, A, state, case['eta'], case['ema'], rule
            )
            assert A == pytest.approx(np.array(case['A_raw'][t]), abs=1e-8)
            assert rules.normalised(A) == pytest.approx(np.array(case['A_normalised'][t]), abs=1e-8)
            assert listed(weights) == pytest.approx(case[expected][t], abs=1e-9)


def test_aiolis_prior_is_kept_by_both_rules():
    prior, A = dict(a=0.9, b=0.1), np.array([[0.2, 0.1], [0.1, 0.3]])
    for rule in ('accumulate', 'reference_ema'):
        first, state, _ = rules.update_aioli(prior, A, {}, 0.2, 0.1, rule)
        assert first['a'] == pytest.approx(
            0.9 * np.exp(0.2 * 3 / 7) / (0.9 * np.exp(0.2 * 3 / 7) + 0.1 * np.exp(0.2 * 4 / 7))
        )
        second, _, _ = rules.update_aioli(first, A, state, 0.2, 0.1, rule)
        assert (second['a'] < first['a'] - 1e-3) == (rule == 'accumulate')


def test_skillit_of_the_public_code(cases):
    case = cases['skillit']
    weights, state, _ = rules.update_skillit(
        named([1, 1, 1]), {}, {}, np.transpose(case['G']), case['eta'], case['window']
    )
    assert listed(weights) == pytest.approx(case['p0'], abs=1e-9)
    for k, losses in enumerate(case['losses_by_checkpoint']):
        weights, state, log = rules.update_skillit(
            weights, named(losses), state, np.transpose(case['G']), case['eta'], case['window']
        )
        assert listed(weights) == pytest.approx(case['p_after_k_checkpoints'][str(k + 1)], abs=1e-9)
    assert log['A'][0, 1] == pytest.approx(
        np.mean([loss[0] for loss in case['losses_by_checkpoint'][1:]]) * case['G'][1][0]
    )


def test_doremi_of_the_public_code(cases):
    for case in cases['doremi']['cases']:
        p = named(case['p'])
        excess = {}
        for name, loss, reference_loss in zip(p, case['loss'], case['ref_loss'], strict=False):
            if loss or reference_loss:
                excess[name] = loss - reference_loss
        weights, state, _ = rules.update_doremi(
            p, excess, dict(scores=named(case['previous_scores'])), case['mu'], case['smoothing']
        )
        assert listed(state['scores']) == pytest.approx(case['scores'], abs=1e-9)
        assert listed(weights) == pytest.approx(case['p_next'], abs=1e-9)
        again, state, _ = rules.update_doremi(weights, excess, state, case['mu'], case['smoothing'])
        assert listed(state['average']) == pytest.approx(
            [(a + b) / 2 for a, b in zip(listed(weights), listed(again), strict=False)]
        )


def test_doge_of_the_public_code(cases):
    for case in cases['doge']['cases']:
        g, v = np.array(case['grad_train']), np.array(case['grad_val_mix'])
        weights, _, log = rules.update_doge(
            named(case['p']),
            named(g @ v),
            named(np.linalg.norm(g, axis=1)),
            {},
            case['lr'],
            1 / case['mu'],
            case['dw_min'],
            case['dw_max'],
        )
        assert log['gains'] == pytest.approx(case['score'], abs=1e-10)
        assert listed(weights) == pytest.approx(case['p_next'], abs=1e-9)


def test_published_settings_scale_to_the_run():
    """The published rounds give the published numbers, and rounds of other lengths explore a share
    between the published ones.
    """
    assert rules.aioli_exploration(2, 250) == (4, 4)
    assert rules.aioli_exploration(3, 250) == (4, 6)
    for m in (2, 3, 4, 5, 7, 10):
        for interval in (50, 100, 250, 1000, 2000):
            sweeps, steps = rules.aioli_exploration(m, interval)
            share = sweeps * steps * m / interval
            assert 0.1 <= share <= 0.29, (m, interval, sweeps, steps)
            assert rules.aioli_published(m)['one_hot_factor'] > 1 / m
    assert rules.aioli_exploration(3, 100, sweeps=2) == (2, 4)
    assert rules.aioli_exploration(3, 100, steps=3) == (3, 3)
    # The published batches have 8 rows, 5 and 3 of them for two sources.
    assert [rules.aioli_factor(m, 8) for m in (2, 3, 7)] == [0.625, 0.5, 0.75]
    # Of 4 rows 2.5 and 1.5 may be two and two.
    assert rules.aioli_factor(2, 4) == 0.75 and rules.aioli_factor(2, 1) == 1
    sources = {'a': 1.0, 'b': 0.5, 'c': 2.0, 'off': 0.0}
    knobs = dict(mixture='aioli', mixture_eta=None, sources=sources)
    assert rules.eta_of(knobs) == 0.1 and rules.eta_of({**knobs, 'mixture_eta': 3.0}) == 3.0
    # DoGE's published rate falls from 5e-4, whatever the peak of this run's optimizer.
    assert rules.doge_learning_rate(1e-2, 1e-2) == rules.doge_learning_rate(4e-3, 4e-3) == 5e-4
    assert rules.doge_learning_rate(2e-3, 1e-2) == pytest.approx(1e-4)
    assert rules.doge_learning_rate(0.0, 0.0) == 0


def test_aiolis_defaults_are_the_published_ones_of_the_run(tmp_path, data, capsys):
    """Three sources in rounds of 40 steps: 3 sweeps of a step on mixtures with 0.5 of a source."""
    run = train(tmp_path / 'run', data, **{**LOOP, 'mixture': 'aioli', 'mixture_interval': 40})
    said = capsys.readouterr().out
    assert '9 of the 40 steps of a round explore (0.23)' in said
    assert 'mixture_eta = 0.1, aioli_ema = 0.5' in said
    assert run[49]['mixture/explored_steps'] == 9
    explored = [run[step]['mixture/weight_a'] for step in range(40, 49)]
    assert sorted(explored)[-3:] == pytest.approx([0.5] * 3, abs=1e-6)
    assert sorted(explored)[:6] == pytest.approx([0.25] * 6, abs=1e-6)


def test_aioli_uses_the_mixtures_that_were_trained_on():
    """Rows are whole, so shares differ from what was asked; a linear world is recovered from what
    they were.
    """
    A, rng = (
        np.array([[0.3, -0.1, 0.0], [0.05, 0.2, 0.1], [0.0, 0.0, 0.4]]),
        np.random.default_rng(0),
    )
    shares = rng.dirichlet([1, 1, 1], 6)
    assert rules.aioli_matrix(shares, shares @ A.T) == pytest.approx(A, abs=1e-12)
    with pytest.raises(BadInput, match='need that many different'):
        rules.aioli_matrix([[0.5, 0.5], [0.5, 0.5]], [[0.1, 0.1], [0.2, 0.1]])
    with pytest.raises(BadInput, match='above 1 / sources = 0.3333'):
        rules.one_hot_mixtures(['a', 'b', 'c'], 1 / 3)


# -- in the training loop
# ----------------------------------------------------------------------------------------------

METHODS = dict(
    skillit={},
    aioli=dict(aioli_sweeps=2, aioli_steps=2, one_hot_factor=0.5, mixture_eta=1.0),
    doge=dict(mixture_eta=1000.0),
    doremi={},
)
LOOP = dict(
    sources={'a': 1.0, 'b': 1.0, 'noise': 1.0},
    max_steps=60,
    mixture_interval=20,
    mixture_warmup=20,
    eval_interval=30,
    save_interval=10,
    batch_size=4,
    total_batch_tokens=256,
    mixture_rows=12,
    max_epochs=None,
    learning_rate=5e-3,
)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Two sources that can be learned and help each other, and one of random tokens, which is
    useless.
    """
    folder = tmp_path_factory.mktemp('rivals') / 'data'
    make_source(folder, 'a')
    make_source(folder, 'b')
    rng = np.random.default_rng(0)
    for split, n in (('train', 4000), ('val', 800)):
        write_shard(folder / 'noise' / split / '0.bin', rng.integers(0, 64, n))
    return folder


@pytest.fixture(scope='module')
def needed(data):
    """What Skill-It and DoReMi start from: a graph, and a reference model."""
    folder = data.parent
    train(folder / 'reference', data, **{**LOOP, 'mixture': 'stratified'})
    graph = [[0.5, 0.3, 0.0], [0.3, 0.5, 0.0], [0.0, 0.0, 0.02]]
    (folder / 'graph.json').write_text(json.dumps(dict(groups=['b', 'a', 'noise'], graph=graph)))
    return dict(
        skillit=dict(skillit_graph=folder / 'graph.json'),
        doremi=dict(doremi_reference=folder / 'reference'),
    )


def knobs_of(method, needed):
    return {**LOOP, 'mixture': method, **METHODS[method], **needed.get(method, {})}


@pytest.mark.parametrize('method', METHODS)
def test_the_useless_source_loses_and_a_stopped_run_goes_on_the_same(
    tmp_path, data, needed, method
):
    whole = train(tmp_path / 'whole', data, **knobs_of(method, needed))
    last = {key: value for step in sorted(whole) for key, value in whole[step].items()}
    outcome = 'average' if method in ('doge', 'doremi') else 'asked'
    weights = [last[f'mixture/{outcome}_{name}'] for name in ('a', 'b', 'noise')]
    assert sum(weights) == pytest.approx(1) and weights[2] < 0.32 and min(weights[:2]) > 0.334, (
        weights
    )
    if method in (
        'skillit',
        'aioli',
    ):  # the sampler obeys: of the last round, behind Aioli's exploration
        drawn = np.mean(
            [
                [whole[s][f'mixture/drawn_{name}'] for name in ('a', 'b', 'noise')]
                for s in range(52, 60)
            ],
            0,
        )
        assert drawn == pytest.approx(weights, abs=0.02)
    else:
        assert whole[59]['mixture/weight_noise'] == pytest.approx(1 / 3)
        assert last['mixture/extra_flops'] > 0
    assert {f'mixture/A_{i}_{j}' for i in ('a', 'b', 'noise') for j in ('a', 'b', 'noise')} <= set(
        last
    )
    # stopped in the middle of a round (of an exploration), and gone on with
    for stop in (30 if method == 'aioli' else 25, 60):
        again = train(
            tmp_path / 'again',
            data,
            **{
                **knobs_of(method, needed),
                'stop_step': stop,
                'save_interval': 5 if stop == 25 else 10,
            },
            resume=True,
        )
    for step in whole:
        for key, value in whole[step].items():
            if key.startswith(('train/loss', 'train/grad_norm', 'mixture/')):
                assert again[step][key] == value, (step, key)


def test_random_matrices_do_not_find_the_useless_source(tmp_path, data, needed):
    """The same exploration with numbers drawn at random in the place of A: over five seeds the
    useless source wins as often as it loses.
    """
    found = []
    for seed in range(5):
        run = train(
            tmp_path / str(seed),
            data,
            **{
                **knobs_of('aioli', needed),
                'aioli_matrix': 'random',
                'seed': seed,
                'max_steps': 34,
            },
        )
        found.append(run[20 + 12]['mixture/asked_noise'])
    assert min(found) < 1 / 3 - 0.005 and max(found) > 1 / 3 + 0.005, found


@pytest.mark.parametrize('method', ['doge', 'doremi', 'aioli'])
def test_two_ranks_weigh_as_one_process_does(tmp_path, data, needed, method):
    knobs = {
        **knobs_of(method, needed),
        'max_steps': 20,
        'mixture_interval': 18,
        'mixture_warmup': 0,
        'batch_size': 2,
    }
    one = train(tmp_path / 'one', data, **knobs)
    two = train(tmp_path / 'two', data, ranks=2, **knobs)
    compared = 0
    for step in one:
        for key in one[step]:
            if key.startswith(
                ('train/loss', 'train/grad_norm', 'mixture/asked', 'mixture/average', 'mixture/A_')
            ):
                assert two[step][key] == pytest.approx(one[step][key], rel=2e-4, abs=2e-5), (
                    step,
                    key,
                )
                compared += 1
    assert compared > 40


@pytest.mark.parametrize('learning_rate', [1e-9, 1e-2])
def test_doges_step_is_its_formula(tmp_path, data, learning_rate):
    """One step from equal weights: products and norms by autograd on each source's rows alone, then
    the published rule. The optimizer's learning rate has no part in it.
    """
    import torch

    from data import MixtureLoader, Source, batch_of
    from lib.hf import open_model
    from methods.reweight import chosen_windows

    knobs = {
        **LOOP,
        'mixture': 'doge',
        'max_steps': 1,
        'warmup_steps': 0,
        'grad_clip': 0.5,
        'save_interval': 1,
        'learning_rate': learning_rate,
        'min_lr_frac': 1.0,
        'mixture_eta': 2000.0,
        'schedule': 'constant',
        'weight_decay': 0.0,
    }
    logged = train(tmp_path / 'run', data, **knobs)[0]
    # The model before its step: with a rate that moves nothing.
    train(tmp_path / 'start', data, **{**knobs, 'learning_rate': 1e-9})
    model, _, _ = open_model(
        str(tmp_path / 'start'), torch.device('cpu'), torch.float32, needs_tokenizer=False
    )
    for p in model.parameters():
        p.requires_grad_(True)
    seed, names = 1337, ('a', 'b', 'noise')
    sources = [Source(str(data), n, 'train', 16, seed, 64) for n in names]
    loader = MixtureLoader(sources, dict.fromkeys(names, 1.0), seed)
    index, cursors = loader.next_batch(16)

    def gradient(rows):
        model.zero_grad()
        inputs, targets, _ = batch_of(torch.from_numpy(rows))
        loss = model.loss(inputs, targets)[0] / targets.numel()
        loss.backward()
        g = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
        return g * min(1.0, 0.5 / g.norm().item())

    train_g = [gradient(loader.read(index[index == i], cursors[index == i])) for i in range(3)]
    val = [Source(str(data), n, 'val', 16, 0, 64) for n in names]
    val_g = gradient(
        np.concatenate(
            [s.rows(chosen_windows(s, 4, (seed, 0, 2, i)).tolist()) for i, s in enumerate(val)]
        )
    )
    expected, _, _ = rules.update_doge(
        dict.fromkeys(names, 1 / 3),
        {n: float(g @ val_g) for n, g in zip(names, train_g, strict=False)},
        {n: float(g.norm()) for n, g in zip(names, train_g, strict=False)},
        {},
        5e-4,
        2000.0,
    )
    assert [logged[f'mixture/asked_{n}'] for n in names] == pytest.approx(
        list(expected.values()), abs=1e-4
    )
    assert max(expected.values()) - min(expected.values()) > 0.02


@pytest.mark.parametrize(
    'change, parts',
    [
        (
            dict(mixture='skillit'),
            ['needs skillit_graph', 'tools/sweep.py method --method=skillit'],
        ),
        (dict(mixture='doremi'), ['needs doremi_reference']),
        (dict(mixture='aioli', one_hot_factor=1 / 3), ['one_hot_factor', 'above 1 / sources']),
        (dict(mixture='aioli', aioli_steps=20), ['explores for', 'a round has to be longer']),
        (dict(mixture='doge', presence='store'), ["does not work with presence = 'store'"]),
        (dict(mixture='doge', sources={'a': 1.0}), ['there is only one']),
        (dict(mixture='aioli', select='online'), ["select = 'online'"]),
        (
            dict(mixture='skilit'),
            [
                "mixture = 'skilit' must be one of fixed, stratified, natural, unimax, schedule, "
                'influence, ado, skillit, aioli, doge, doremi'
            ],
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, data, change, parts):
    with pytest.raises(BadInput) as error:
        train(tmp_path / 'run', data, **{**LOOP, **change})
    assert all(part in str(error.value) for part in parts), error.value


def test_a_run_continues_another_or_says_why_not(tmp_path, data):
    knobs = {
        **LOOP,
        'max_steps': 12,
        'mixture': 'aioli',
        'aioli_sweeps': 1,
        'aioli_steps': 1,
        'mixture_interval': 6,
        'mixture_warmup': 0,
    }
    parent = train(tmp_path / 'parent', data, **knobs, stop_step=8)
    child = train(
        tmp_path / 'child',
        data,
        **{**knobs, 'mixture': 'fixed', 'sources': {'a': 0.5, 'b': 0.25, 'noise': 0.25}},
        continue_from=tmp_path / 'parent',
    )
    assert max(parent) == 8 and min(child) == 8 and max(child) == 12
    assert (
        child[8]['mixture/weight_a'] == pytest.approx(0.5)
        and child[11]['train/learning_rate'] < child[8]['train/learning_rate']
    )
    (tmp_path / 'empty').mkdir()
    for change, part in (
        (dict(continue_from=tmp_path / 'empty'), 'no complete checkpoint'),
        (dict(continue_from=tmp_path / 'none'), 'is no folder'),
        (dict(continue_from=tmp_path / 'parent', stop_step=4), 'beyond the 4 steps'),
        (dict(stop_step=0), 'stop_step = 0'),
    ):
        with pytest.raises(BadInput, match=part):
            train(tmp_path / 'refused', data, **knobs, **change)
        assert not (tmp_path / 'refused').exists()


def test_doremis_reference_must_be_of_the_same_vocabulary(tmp_path, data):
    train(tmp_path / 'other', data, **{**LOOP, 'max_steps': 1, 'vocab_size': 80})
    with pytest.raises(BadInput, match='doremi_reference = .* has a vocabulary of 80 rows'):
        train(
            tmp_path / 'run',
            data,
            **{**LOOP, 'mixture': 'doremi', 'doremi_reference': tmp_path / 'other'},
        )
    assert not (tmp_path / 'run').exists()


def test_a_round_that_was_not_begun_cannot_be_ended(tmp_path, data):
    knobs = {
        **LOOP,
        'mixture': 'aioli',
        'aioli_sweeps': 2,
        'aioli_steps': 2,
        'mixture_warmup': 0,
        'max_steps': 30,
    }
    train(tmp_path / 'run', data, **knobs, stop_step=18)
    with pytest.raises(BadInput, match='did not begin.*mixture_interval'):
        train(tmp_path / 'run', data, **{**knobs, 'mixture_interval': 16}, resume=True)


# -- graphs of Skill-It, and methods of a checkpoint -----------------------------------------------


@pytest.mark.parametrize(
    'content, words',
    [
        ('{"groups": ["a", "b"]', 'no valid JSON'),
        ('[]', 'holds a list'),
        ('{"groups": ["a", "b"]}', "no field 'graph'"),
        ('{"groups": "ab", "graph": []}', "groups = 'ab' must be list"),
        ('{"groups": ["a", "c"], "graph": [[0, 0], [0, 0]]}', 'is of the groups a, c'),
        ('{"groups": ["a", "a"], "graph": [[0, 0], [0, 0]]}', 'is of the groups a, a'),
        ('{"groups": ["a", "b"], "graph": [[1], [0, 0]]}', 'no table of numbers'),
        ('{"groups": ["a", "b"], "graph": [["x", 0], [0, 0]]}', 'no table of numbers'),
        ('{"groups": ["a", "b"], "graph": [[0]]}', r'shape \(1, 1\)'),
        ('{"groups": ["a", "b"], "graph": [[NaN, 0], [0, 0]]}', '3 finite numbers'),
        ('{"groups": ["a", "b"], "graph": [[50, 20], [30, 40]]}', 'holds 50. .* at most 1'),
        (np.eye(3), r'float64 of shape \(3, 3\), not numbers of shape \(2, 2\)'),
        (np.full((2, 2), np.nan), 'not finite'),
        (np.array([[{}, 1], [1, 1]]), 'Object arrays cannot be loaded'),
        (np.array([['a', 'b'], ['c', 'd']]), 'not numbers of shape'),
        (np.eye(2) * 1j, 'not numbers of shape'),
        (b'', 'no intact .npy file'),
        (b'PK\x03\x04', 'no intact .npy file'),
    ],
)
def test_a_damaged_graph_is_one_sentence(tmp_path, content, words):
    path = tmp_path / ('graph.json' if isinstance(content, str) else 'graph.npy')
    if isinstance(content, str):
        path.write_text(content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(BadInput, match=words):
        baselines.read_graph(str(path), ['a', 'b'])


def test_graphs_of_json_and_numpy_are_the_same(tmp_path):
    # A run on 'b' alone makes 'a' worse, which is no mistake.
    (tmp_path / 'g.json').write_text('{"groups": ["b", "a"], "graph": [[0.5, -0.2], [0.1, 0.4]]}')
    np.save(tmp_path / 'g.npy', np.array([[0.4, 0.1], [-0.2, 0.5]], dtype=np.float32))
    one = baselines.read_graph(str(tmp_path / 'g.json'), ['a', 'b'])
    other = baselines.read_graph(str(tmp_path / 'g.npy'), ['a', 'b'])
    assert one.tolist() == [[0.4, -0.2], [0.1, 0.5]] and np.allclose(one, other)


def test_a_method_continues_with_its_sources_in_their_order(tmp_path, data, needed):
    knobs = {**knobs_of('doge', needed), 'max_steps': 8}
    train(tmp_path / 'run', data, **knobs, stop_step=2)
    for sources in ({'b': 1.0, 'a': 1.0, 'noise': 1.0}, {'a': 1.0, 'b': 1.0, 'noise': 0.0}):
        with pytest.raises(BadInput, match='weighed the sources a, b, noise, this run has'):
            train(tmp_path / 'run', data, **{**knobs, 'sources': sources}, resume=True)


def test_more_validation_rows_than_there_are_is_said(tmp_path, data, needed, capsys):
    knobs = {**knobs_of('skillit', needed), 'max_steps': 2, 'mixture_rows': 30}
    by_step = train(tmp_path / 'run', data, **knobs)
    assert 'mixture_rows = 30 is more than the validation rows of some sources' in (
        capsys.readouterr().out
    )
    assert max(by_step) == 2
