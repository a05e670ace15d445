"""PRESENCE against a computation by hand, plain accumulation and itself in other forms;
self-influence and noise.
"""

import types

import numpy as np
import pytest
import torch

import influence
from configurator import BadInput
from data import Source
from lib.hf import open_model
from methods import presence
from tests.conftest import make_source, train, write_shard
from tests.test_influence import batches, brute_force, tiny


@pytest.mark.parametrize('mode', ['store', 'stream'])
def test_a_micro_batch_without_a_counted_token_has_no_part(mode):
    model, parts = tiny(), batches(4, seed=3)
    without = accumulate(model, parts[:1] + parts[2:], mode, 1.0, 1e-3)
    model.zero_grad()
    parts[1][1][:] = -1
    log, gradient, _ = accumulate(model, parts, mode, 1.0, 1e-3)
    assert (
        log['presence/weight_1'] == 0
        and log['presence/weight_2'] == without[0]['presence/weight_1']
    )
    assert log['presence/self_influence'] == without[0]['presence/self_influence']
    assert all(torch.allclose(gradient[name], g, rtol=1e-9) for name, g in without[1].items())


def accumulate(model, parts, mode, tau, sigma=None, step=0, **knobs):
    """One step of micro-batches: (what finish logs, name -> gradient, the object)."""
    taker = presence_of(model, mode, len(parts), sigma, presence_tau=tau, **knobs)
    n = [(targets >= 0).sum().item() for _, targets, _ in parts]
    taker.begin(step, 1e-3, n)
    for inputs, targets, doc_ids in parts:
        loss, losses, _ = model.loss(inputs, targets, doc_ids=doc_ids)
        (loss / sum(n)).backward()
        taker.add(None, losses)
    log = taker.finish()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return log, gradient, taker


def presence_of(model, mode, n, sigma=None, layers='first', **knobs):
    """A Presence for n micro-batches, as a run with these knobs has it."""
    config = (
        dict(
            presence=mode,
            presence_layers=layers,
            presence_tau=1.0,
            presence_schedule='constant',
            presence_switch=None,
            presence_sum='tokens',
            presence_permute=False,
            presence_by_source=False,
            seed=7,
        )
        | knobs
    )
    training = types.SimpleNamespace(config=config, model=model, n_steps=21)
    taker = presence.Presence(training, n)
    taker.load_state_dict(dict(n=n, layers=layers, sigma=sigma))
    return taker


def by_hand(model, parts, tau):
    """Mean gradients g of micro-batches, a list of dicts, their tokens n (k,), their scores s (k,)
    and their weights w (k,): softmax of the z-scored squared norms of the first block's g.
    """
    g = [brute_force(model, [part], 'all') for part in parts]
    n = np.array([(targets >= 0).sum().item() for _, targets, _ in parts])
    s = np.array(
        [
            sum((t**2).sum().item() for name, t in by_name.items() if name.startswith('blocks.0.'))
            for by_name in g
        ]
    )
    e = np.exp(tau * (s - s.mean()) / s.std())
    return g, n, s, e / e.sum()


def assert_is_sum(gradient, factors, g):
    """Whether the gradient (name -> tensor) is the sum of factors[i] * g[i]."""
    for name in gradient:
        expected = sum(factor * by_name[name] for factor, by_name in zip(factors, g, strict=True))
        assert (gradient[name] - expected).norm() < 1e-10 * expected.norm(), name


@pytest.mark.parametrize('tau', [1.0, -1.0, 0.3])
def test_store_is_the_algorithm_by_hand(tau):
    """Micro-batches have different numbers of tokens."""
    model, parts = tiny(qk_norm=True), batches(6, rows=3, seed=4)
    g, n, s, w = by_hand(model, parts, tau)
    log, gradient, _ = accumulate(model, parts, 'store', tau)
    assert [log[f'presence/weight_{i}'] for i in range(6)] == pytest.approx(w.tolist(), rel=1e-9)
    assert log['presence/effective_micro_batches'] == pytest.approx(1 / (w**2).sum()) and log[
        'presence/self_influence'
    ] == pytest.approx(s.mean())
    assert log['presence/weight_entropy'] == pytest.approx(-(w * np.log(w)).sum())
    assert_is_sum(gradient, 6 * w * n / n.sum(), g)


@pytest.mark.parametrize('mode', ['store', 'stream'])
def test_the_papers_sum_counts_micro_batches_alike(mode):
    """presence_sum='micro_batches' is the sum of w g, whatever the numbers of tokens."""
    model, parts = tiny(), batches(5, rows=3, seed=4)
    parts[0][1][:2] = -1            # a third of the tokens of the others, about
    g, n, s, w = by_hand(model, parts, 1.0)
    assert n[0] < 0.5 * n[1]
    options = dict(sigma=s.std(), presence_sum='micro_batches')
    log, gradient, _ = accumulate(model, parts, mode, 1.0, **options)
    assert [log[f'presence/weight_{i}'] for i in range(5)] == pytest.approx(w.tolist(), rel=1e-9)
    assert_is_sum(gradient, w, g)
    # Plain accumulation is another sum, with equal weights, too.
    _, gradient, _ = accumulate(model, parts, mode, 0.0, **options)
    assert_is_sum(gradient, np.full(5, 1 / 5), g)
    # A micro-batch without a supervised token has no part in it.
    parts[2][1][:] = -1
    _, gradient, _ = accumulate(model, parts, mode, 0.0, **options)
    assert_is_sum(gradient, [1 / 4, 1 / 4, 0, 1 / 4, 1 / 4], g)


@pytest.mark.parametrize('kind', ['tokens', 'micro_batches'])
def test_permuted_weights_are_the_same_ones_in_another_order(kind):
    model, parts = tiny(), batches(6, rows=3, seed=4)
    g, n, s, w = by_hand(model, parts, 1.0)
    knobs = dict(presence_permute=True, presence_sum=kind)
    found = []
    for step in range(4):
        order = presence.order_of(6, 7, step)
        log, gradient, _ = accumulate(model, parts, 'store', 1.0, step=step, **knobs)
        applied = [log[f'presence/weight_{i}'] for i in range(6)]
        # What is logged is what was applied, and its figures are those of the weights by score.
        assert applied == pytest.approx(w[order].tolist(), rel=1e-9)
        assert log['presence/weight_of_highest_score'] == applied[s.argmax()]
        assert log['presence/effective_micro_batches'] == pytest.approx(1 / (w**2).sum())
        factors = w[order] if kind == 'micro_batches' else 6 * w[order] * n / n.sum()
        assert_is_sum(gradient, factors, g)
        again = accumulate(model, parts, 'store', 1.0, step=step, **knobs)[1]
        assert all(torch.equal(gradient[name], again[name]) for name in gradient)
        found.append(tuple(order))
    assert len(set(found)) > 2
    assert tuple(presence.order_of(6, 8, 0)) != found[0]
    # A micro-batch without a supervised token keeps its weight of 0.
    parts[1][1][:] = -1
    log = accumulate(model, parts, 'store', 1.0, **knobs)[0]
    w = by_hand(model, parts[:1] + parts[2:], 1.0)[3][presence.order_of(5, 7, 0)]
    applied = [log[f'presence/weight_{i}'] for i in range(6)]
    assert applied == pytest.approx([w[0], 0, *w[1:]], rel=1e-9)


def test_a_permutation_takes_every_weight_everywhere():
    places = np.array([presence.order_of(8, 1337, step) for step in range(4000)])
    counts = np.array([np.bincount(column, minlength=8) for column in places.T])
    assert np.abs(counts / 4000 - 1 / 8).max() < 0.025        # 5 standard deviations


def test_stream_equals_store_for_an_equal_deviation():
    model, parts = tiny(), batches(8, rows=2, seed=4)
    for tau in (1.0, -1.0):
        stored, expected, _ = accumulate(model, parts, 'store', tau)
        sigma = accumulate(model, parts, 'stream', tau)[2].sigma  # this step's, known after it
        streamed, found, _ = accumulate(model, parts, 'stream', tau, sigma)
        assert streamed == pytest.approx(stored, rel=1e-9)
        assert all((found[n] - expected[n]).norm() < 1e-12 * expected[n].norm() for n in found)
        first, plain, _ = accumulate(
            model, parts, 'stream', tau
        )  # no deviation known yet: all alike
        assert first['presence/effective_micro_batches'] == pytest.approx(8)
        assert all(
            (plain[n] - expected[n]).norm() > 1e-3 * expected[n].norm()
            for n in ('blocks.0.attn.wq.weight', 'norm.weight')
        )


def test_equal_scores_are_no_reason_to_prefer_one():
    """z-scores would blow rounding up to deviations of 1."""
    model, part = tiny(), batches(1, rows=3, seed=4)[0]
    for mode in ('store', 'stream'):
        log, _, micro = accumulate(model, [part] * 5, mode, 1.0)
        assert log['presence/effective_micro_batches'] == pytest.approx(5, abs=1e-9) and (
            mode == 'store' or micro.sigma is None
        )


def test_tau_over_time():
    def tau(schedule, switch=None):
        config = dict(presence_tau=0.5, presence_schedule=schedule, presence_switch=switch)
        return [presence.tau_at(step, 21, config) for step in range(21)]

    assert tau('constant') == [0.5] * 21
    assert tau('two_stage') == [0.5] * 2 + [-0.5] * 19 and tau('two_stage', 20) == [0.5] * 20 + [
        -0.5
    ]
    cosine = tau('cosine')
    assert (
        cosine[0] == 0.5
        and cosine[-1] == -0.5
        and abs(cosine[10]) < 1e-12
        and cosine == sorted(cosine, reverse=True)
    )


def test_a_permuted_run_resumes_to_the_bit(tiny_data, tmp_path):
    knobs = dict(
        total_batch_tokens=256, batch_size=4, presence='store', presence_permute=True,
        presence_sum='micro_batches', schedule='constant')
    whole = train(tmp_path / 'whole', tiny_data, **knobs)
    train(tmp_path / 'cut', tiny_data, **{**knobs, 'max_steps': 8})
    resumed = train(tmp_path / 'cut', tiny_data, **knobs, resume=True)
    for s in (8, 11):
        assert resumed[s]['train/loss'] == whole[s]['train/loss']
        assert resumed[s]['presence/weight_0'] == whole[s]['presence/weight_0']
    # The weights are those of a run without the permutation at the first step, not later.
    straight = train(tmp_path / 'straight', tiny_data, **{**knobs, 'presence_permute': False})
    assert whole[11]['train/loss'] != straight[11]['train/loss']
    weights = [[run[0][f'presence/weight_{i}'] for i in range(4)] for run in (whole, straight)]
    assert weights[0] == [weights[1][i] for i in presence.order_of(4, 1337, 0)]


@pytest.mark.parametrize('mode', ['store', 'stream'])
def test_in_a_training_run(tiny_data, tmp_path, mode):
    """tau = 0 is plain accumulation bit for bit; another tau is not; two ranks equal one; a resumed
    run equals a whole one.
    """
    knobs = dict(total_batch_tokens=256, batch_size=2, presence=mode)  # 8 micro-batches
    plain = train(tmp_path / 'plain', tiny_data, **{**knobs, 'presence': 'off'})
    still = train(tmp_path / 'still', tiny_data, **knobs, presence_tau=0.0)
    assert [plain[s]['train/loss'] for s in range(12)] == [
        still[s]['train/loss'] for s in range(12)
    ]
    run = train(
        tmp_path / 'run', tiny_data, **knobs, presence_schedule='two_stage', presence_switch=6
    )
    assert run[11]['train/loss'] != plain[11]['train/loss']
    assert [run[s]['presence/tau'] for s in (0, 5, 6, 11)] == [1, 1, -1, -1]
    assert 2 < run[5]['presence/effective_micro_batches'] < 7.9
    cut = dict(knobs, presence_schedule='two_stage', presence_switch=6, schedule='constant')
    whole = train(tmp_path / 'whole', tiny_data, **cut)
    train(tmp_path / 'cut', tiny_data, **{**cut, 'max_steps': 8})
    resumed = train(tmp_path / 'cut', tiny_data, **cut, resume=True)
    with pytest.raises(BadInput, match='8 micro-batches'):
        train(tmp_path / 'cut', tiny_data, **{**cut, 'batch_size': 4, 'max_steps': 13}, resume=True)
    for s in (8, 11):
        assert {
            k: v for k, v in resumed[s].items() if k.startswith(('train/loss', 'presence'))
        } == {k: v for k, v in whole[s].items() if k.startswith(('train/loss', 'presence'))}


def test_micro_batches_of_one_source(tiny_data, tmp_path):
    """Three quarters of the rows are of one source, so are three quarters of the micro-batches."""
    knobs = dict(total_batch_tokens=256, batch_size=2, max_steps=4)         # 16 rows
    plain = train(tmp_path / 'plain', tiny_data, **knobs)
    knobs |= dict(presence='store', presence_by_source=True)
    still = train(tmp_path / 'still', tiny_data, **knobs, presence_tau=0.0)
    for s in range(4):
        assert still[s]['train/loss'] == pytest.approx(plain[s]['train/loss'], rel=1e-5)
    run = train(tmp_path / 'run', tiny_data, **knobs)
    assert run[3]['train/loss'] != pytest.approx(plain[3]['train/loss'], rel=1e-5)
    # 12 and 4 rows, in micro-batches of two rows
    weights = [key for key in run[0] if key.startswith('presence/weight_') and key[-1].isdigit()]
    assert len(weights) == 8
    # A single micro-batch of mixed rows could not be weighed.
    train(tmp_path / 'whole', tiny_data, **{**knobs, 'batch_size': 16, 'max_steps': 1})


@pytest.mark.parametrize('mode, permute', [('stream', False), ('store', True)])
def test_two_ranks_weigh_as_one(tiny_data, tmp_path, mode, permute):
    """8 rows of one rank in a micro-batch, or 4 of each of two: the same micro-batches, the same
    weights in the same order.
    """
    knobs = dict(
        total_batch_tokens=512, presence=mode, presence_permute=permute, max_steps=6)
    one = train(tmp_path / 'one', tiny_data, **knobs, batch_size=8)
    two = train(tmp_path / 'two', tiny_data, ranks=2, **knobs, batch_size=4)
    for s in range(6):
        assert two[s]['train/loss'] == pytest.approx(one[s]['train/loss'], rel=1e-4)
        assert [two[s][f'presence/weight_{i}'] for i in range(4)] == pytest.approx(
            [one[s][f'presence/weight_{i}'] for i in range(4)], rel=1e-2
        )


def test_mistakes(tiny_data, tmp_path):
    for changes, message in (
        (dict(presence='store', total_batch_tokens=32), 'only 1'),
        (dict(presence='store', presence_by_source=True, sources={'a': 1.0}), 'only one'),
        (dict(presence='on'), 'off, store, stream'),
        (dict(presence='stream', presence_permute=True), "presence_permute needs .*'store'"),
        (dict(presence='store', presence_sum='rows'), 'tokens, micro_batches'),
        (dict(presence='store', presence_layers='top'), "presence_layers = 'top'"),
        (dict(presence='store', presence_schedule='linear'), 'constant, two_stage, cosine'),
    ):
        with pytest.raises(BadInput, match=message):
            train(tmp_path / 'run', tiny_data, **changes)


def auroc(low, high):
    return np.mean([h > x for h in high for x in low])


def test_noise_has_high_self_influence_until_it_is_trained_on(tmp_path):
    """On a model trained on clean text shuffled rows stand out; with shuffled and random text in
    the stream they are below the clean ones.
    """
    data_dir = tmp_path / 'data'
    make_source(data_dir, 'a', 40_000)
    rng = np.random.default_rng(9)
    for split, n in (('train', 40_000), ('val', 2_000)):
        write_shard(data_dir / 'random' / split / '0.bin', rng.integers(0, 64, n))
    clean = Source(data_dir, 'a', 'val', 16, 0, 64).rows(range(96))
    found = {}
    for kind, weights in (('clean', {'a': 1.0}), ('mixed', {'a': 1.0, 'random': 2.0})):
        train(
            tmp_path / kind,
            data_dir,
            sources=weights,
            max_steps=150,
            total_batch_tokens=512,
            batch_size=32,
            eval_interval=150,
            save_interval=150,
        )
        model = open_model(
            str(tmp_path / kind), torch.device('cpu'), torch.float32, needs_tokenizer=False
        )[0]
        scores = []
        for rows in (clean, rng.permuted(clean, axis=1)):
            rows = torch.from_numpy(rows)
            scores.append(
                influence.ghost_sqnorm(
                    model, (rows[:, :-1], rows[:, 1:].long(), None), 'first'
                ).numpy()
            )
        found[kind] = auroc(*scores)
    print(found)
    assert found['clean'] >= 0.8 and found['mixed'] < found['clean'] - 0.2
