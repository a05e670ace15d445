"""Influence against brute force in float64, over two ranks, its rule, and in training runs.

Letters: B rows, T positions.
"""
import functools
import json
import math
import shutil
import signal
import types

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import influence
from configurator import BadInput, RunFault
from data import Feeder, Source
from lib.parallel import full_tensor
from methods import estimates, presence, reweight, rules
from model import GPT, ModelConfig, flops_per_token, init_weights
from tests import influence_study
from tests.conftest import TINY, make_source, run_ranks, train, train_command, write_shard

SHAPES = [
    dict(),
    dict(tie_embeddings=False),
    dict(qk_norm=True, layer_repeat=2),
    dict(qkv_bias=True, n_kv_head=1),
]
SIZES = dict(vocab_size=31, n_layer=3, n_head=4, n_kv_head=2, n_embd=16, ffn_dim=24)


def tiny(**changes):
    """A small GPT in float64."""
    model = GPT(ModelConfig(**{**SIZES, **changes})).double()
    init_weights(model, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model


def batches(n, rows=2, length=7, seed=0, vocab_size=31):
    """n batches of several documents, in which some targets are ignored."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(n):
        idx = torch.randint(0, vocab_size, (rows, length + 1), generator=generator)
        targets = idx[:, 1:].clone()
        targets[torch.rand(targets.shape, generator=generator) < 0.2] = -1
        out.append((idx[:, :-1], targets, (idx[:, :-1] == 5).cumsum(1)))
    return out


def twice(parts):
    """Batches that agree with each other."""
    return parts + parts


def valid_tokens(batch):
    return (batch[1] >= 0).sum().item()


def row_gradients(model, batch, layers):
    """Gradients of every row's summed loss by autograd over full logits: [name -> tensor]."""
    selected, _ = influence.select(model, layers)
    rows = []
    for inputs, targets, doc_ids in zip(*batch, strict=True):
        model.zero_grad()
        logits = model(inputs[None], doc_ids[None])[0] @ model.output_weight.T
        cross_entropy(logits, targets, ignore_index=-1, reduction='sum').backward()
        rows.append({name: p.grad.clone() for name, p in selected.items()})
    model.zero_grad()
    return rows


def brute_force(model, parts, layers):
    """Gradient of the mean token loss, row by row."""
    rows = []
    for batch in parts:
        rows += row_gradients(model, batch, layers)
    tokens = sum(valid_tokens(batch) for batch in parts)
    return {name: sum(g[name] for g in rows) / tokens for name in rows[0]}


def inner(a, b):
    return sum((a[name] * b[name]).sum().item() for name in b)


def mean_of_pairs(model, parts, layers, product):
    """The mean product of the gradients of different batches, weighted by their tokens."""
    gradients = [brute_force(model, [batch], layers) for batch in parts]
    tokens = [valid_tokens(batch) for batch in parts]
    total = 0.0
    weight = 0
    for i in range(len(parts)):
        for j in range(len(parts)):
            if i != j:
                total += tokens[i] * tokens[j] * product(gradients[i], gradients[j])
                weight += tokens[i] * tokens[j]
    return total / weight


def single_rows(parts):
    """Batches of one row each."""
    return [tuple(t[i:i + 1] for t in batch) for batch in parts for i in range(len(batch[0]))]


def units_of(parts, layers):
    """What a direction's pairs are made of: rows where a row's gradient is small, else batches."""
    return single_rows(parts) if layers in influence.SMALL else parts


def group_influence(model, sources, probe, weights=None, units='loss'):
    """Joint influence of every source and its standard error: two dicts of floats.

    probe: influence.Probe
    """
    found = {}
    for name, parts in sources.items():
        found[name] = influence.products_of_batches(model, parts, probe)
    result = estimates.estimate(probe, weights, units, found)
    r = {name: float(value[-1]) for name, value in result.r.items()}
    return r, {name: float(value[-1]) for name, value in result.se.items()}


# -- against brute force ---------------------------------------------------------------------------

LAYERS_AND_UNITS = [
    ('last', 'loss'), ('all', 'own'), ('first', 'loss'), ('embedding+head', 'own'),
    ('last', 'own'), ('all', 'loss'),
]  # fmt: skip


@pytest.mark.parametrize('layers, units', LAYERS_AND_UNITS)
@pytest.mark.parametrize('changes', SHAPES)
def test_influence_equals_row_by_row_gradients(changes, layers, units):
    model = tiny(**changes)
    probe = {'code': twice(batches(2, seed=1)), 'math': twice(batches(3, rows=3, seed=3))}
    sources = {'a': batches(4, seed=5), 'b': batches(5, rows=3, seed=6)}
    weights = {'code': 1.0, 'math': 3.0}
    measured = influence.measure_probe(model, probe, layers, n_parts=6)
    r, se = group_influence(model, sources, measured, weights, units)
    mean = {domain: brute_force(model, parts, layers) for domain, parts in probe.items()}
    w = {'code': 0.25, 'math': 0.75}
    M = {}                                  # products of mean gradients without their noise
    for c in probe:
        for d in probe:
            M[c, d] = inner(mean[c], mean[d])
        M[c, c] = mean_of_pairs(model, units_of(probe[c], layers), layers, inner)
        found = estimates.reliability(measured)[c]
        assert found == pytest.approx(M[c, c] / inner(mean[c], mean[c]), rel=1e-9)
    a = {c: w[c] if units == 'loss' else w[c] / M[c, c] for c in probe}
    unit = sum(a[c] * w[d] * M[c, d] for c in probe for d in probe)
    for name, parts in sources.items():
        g = brute_force(model, parts, layers)
        expected = sum(a[c] * inner(g, mean[c]) for c in probe) / unit
        assert r[name] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert se[name] > 0
        if unit > 0 and min(M[c, c] for c in probe) > 0:
            direction = estimates.direction_of(measured, weights, units)
            assert inner(direction.v, g) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert all(p.grad is None for p in model.parameters())


# One length below the layers' widths and one above test both forms of the ghost norm.
@pytest.mark.parametrize('length', [7, 40])
@pytest.mark.parametrize('layers', influence.LAYERS)
@pytest.mark.parametrize('changes', SHAPES)
def test_rows_equal_their_gradients(changes, layers, length):
    """Influence and squared norms of single rows. The rows of a source sum to its influence."""
    model = tiny(**changes)
    direction = estimates.probe_direction(model, {'x': twice(batches(2, seed=1))}, layers)
    parts = batches(2, rows=4, length=length, seed=7)
    total = 0.0
    for batch in parts:
        rows, losses = influence.row_influence(model, batch, direction)
        norms = influence.ghost_sqnorm(model, batch, layers)
        for i, g in enumerate(row_gradients(model, batch, layers)):
            assert rows[i].item() == pytest.approx(inner(direction.v, g), rel=1e-10, abs=1e-13)
            assert norms[i].item() == pytest.approx(inner(g, g), rel=1e-10)
        loss = model.loss(batch[0], batch[1], doc_ids=batch[2])[0].item()
        assert losses.sum().item() == pytest.approx(loss, rel=1e-12)
        total += rows.sum().item()
    g = brute_force(model, parts, layers)
    tokens = sum(valid_tokens(batch) for batch in parts)
    assert total / tokens == pytest.approx(inner(direction.v, g), rel=1e-10)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize('layers', ['last', 'embedding+head'])
def test_the_parts_of_the_probe_are_gradients(layers):
    """Parts and rows against row-by-row gradients: Gram matrix, norms, and products of rows."""
    model = tiny(qk_norm=True, layer_repeat=2)
    probe = {'x': batches(3, rows=3, seed=1), 'y': batches(2, rows=2, seed=2)}
    found = influence.measure_probe(model, probe, layers, n_parts=4)
    parts = []
    for domain in probe:
        if layers == 'last':                    # rows are dealt to four parts
            rows = [g for batch in probe[domain] for g in row_gradients(model, batch, layers)]
            for i in range(4):
                parts.append([g for j, g in enumerate(rows) if j % 4 == i])
        else:
            parts += [row_gradients(model, batch, layers) for batch in probe[domain]]
    sums = [{name: sum(g[name] for g in rows) for name in rows[0]} for rows in parts]
    gram = np.array([[inner(a, b) for b in sums] for a in sums])
    assert found.gram == pytest.approx(gram, rel=1e-9, abs=1e-12)
    if layers == 'last':
        norms = [sum(inner(g, g) for g in rows) for rows in parts]
        assert found.norms == pytest.approx(norms, rel=1e-9)
        batch = batches(1, rows=5, seed=7)[0]
        rows = influence.products_of_rows(model, batch, found).numpy()
        by_hand = [[inner(g, part) for part in sums] for g in row_gradients(model, batch, layers)]
        assert rows == pytest.approx(np.array(by_hand), rel=1e-9, abs=1e-12)


def text_of(domain, n, seed, rows=4):
    """n batches of tokens whose frequencies are the domain's, which a model could learn."""
    generator = torch.Generator().manual_seed(domain)
    frequencies = (1 / torch.arange(1.0, 32.0))[torch.randperm(31, generator=generator)]
    generator.manual_seed(seed)
    ids = torch.multinomial(frequencies, n * rows * 8, replacement=True, generator=generator)
    return [(part[:, :-1], part[:, 1:], None) for part in ids.view(n, rows, 8)]


@pytest.mark.parametrize('n_domains', [1, 2, 3])
def test_unseen_rows_of_the_probe_have_influence_one(n_domains):
    """However many domains there are, in both units, for the domains and for all together."""
    model = tiny()
    found = {'loss': [], 'own': []}
    for seed in range(10):
        probe = {}
        for i in range(n_domains):
            probe[f'{i}'] = text_of(i, 8, 10 * seed + i, rows=12)
        measured = influence.measure_probe(model, probe)
        copy = []
        for i in range(n_domains):
            copy += text_of(i, 8, 1000 + 10 * seed + i)
        products, tokens = influence.products_of_batches(model, copy, measured)
        for units, values in found.items():
            result = estimates.estimate(measured, None, units, {'copy': (products, tokens)})
            values.append([result.r['copy'][-1], result.se['copy'][-1]])
    for values in found.values():
        r, se = np.array(values).T
        assert np.mean(np.abs(r - 1) < 3 * se) >= 0.9
        assert abs(np.mean(r) - 1) < min(0.25, 3 * np.std(r) / 10**0.5)


def world(n_domains, noise, seed=0):
    """Products of a made-up model, as tests/influence_study.py takes them, and the truth.

    The rows of a domain or source are its mean gradient and noise of another size for each.
    """
    rng = np.random.default_rng(seed)
    d, n = 60, 400
    means = rng.normal(size=(3, d)) / d**0.5
    wanted = means[:n_domains]
    kinds = {'math': means[0], 'half': means.mean(0), 'useless': rng.normal(size=d) / d**0.5 / 3}
    rows = [mean + noise * rng.normal(size=(n, d)) for mean in wanted]
    probe = np.concatenate(rows)
    at = np.repeat(np.arange(n_domains), n)
    data = dict(gram=probe @ probe.T, at=at, tokens=np.ones(len(probe)))
    truth = {}
    target = np.mean([part.mean(0) for part in rows], 0)
    for name, mean in kinds.items():
        source = mean + noise * rng.normal(size=(n, d))
        data[f'products_{name}'] = source @ probe.T
        data[f'tokens_{name}'] = np.ones(n)
        truth[name] = source.mean(0) @ target / (target @ target)
    return data, truth


@pytest.mark.parametrize('n_domains, n_probe', [(1, 16), (3, 16), (1, 64), (3, 64)])
def test_two_errors_cover_the_truth(n_domains, n_probe):
    """In at least 90 % of measurements, though the probe's rows are drawn anew for each of them."""
    data, truth = world(n_domains, noise=0.45)
    rng = np.random.default_rng(1)
    names = [f'{i}' for i in range(n_domains)]
    hits, sizes, without = [], [], []
    while len(hits) < 150:
        chosen = [rng.choice(np.flatnonzero(data['at'] == i), n_probe, replace=False)
                  for i in range(n_domains)]
        rows = {name: rng.choice(400, 32, replace=False) for name in truth}
        probe, found = influence_study.measured(data, chosen, names, max(4, 24 // n_domains), rows)
        if estimates.noise_of(probe, None, 'loss'):
            continue
        result = estimates.estimate(probe, None, 'loss', found)
        off = np.array([abs(result.r[name][-1] - truth[name]) for name in truth])
        hits.append(off <= [2 * result.se[name][-1] for name in truth])
        sizes.append(off)
        # the errors of the sources' rows alone, with the probe as if it were exact
        factors = estimates.factors_of(probe, None, 'loss')[-1]
        alone = [estimates.mean_and_error(x @ factors, n)[1] for x, n in found.values()]
        without.append(off <= 2 * np.array(alone))
    assert np.mean(hits, 0).min() >= 0.9
    assert np.mean(hits) <= 0.995
    if n_probe == 16:
        assert np.mean(without, 0).min() < 0.9


def test_a_noisy_probe_is_told():
    """Where its rows do not agree, and in 'own' units the domain whose rows do not."""
    data, _ = world(3, noise=0.4)
    silent, _ = world(3, noise=30.0)
    rng = np.random.default_rng(2)
    noisy = []
    for _ in range(20):
        chosen = [rng.choice(np.flatnonzero(data['at'] == i), 64, replace=False) for i in range(3)]
        for d in (data, silent):
            probe, _ = influence_study.measured(d, chosen, 'abc', 8, {})
            noisy.append(bool(estimates.noise_of(probe, None, 'loss')))
    assert not any(noisy[::2]) and np.mean(noisy[1::2]) > 0.6
    data['gram'][:400] = data['gram'][:, :400] = 0
    data['gram'][:400, :400] = np.eye(400)          # the rows of domain a have nothing in common
    probe, _ = influence_study.measured(data, chosen, 'abc', 8, {})
    assert not estimates.noise_of(probe, None, 'loss')
    assert 'probe (a)' in estimates.noise_of(probe, None, 'own')


def test_domains_that_pull_apart_are_no_probe():
    """Two domains with opposite gradients of different size: along their mean in 'own' units, text
    of the probe itself would be harmful, and the sign of every influence would turn.
    """
    signs = np.repeat([1.0, -4.0], 8)
    gram = np.outer(signs, signs) * 0.99 + np.diag(signs**2) * 0.01
    probe = influence.Probe(
        [], ['a', 'b'], np.repeat([0, 1], 8), gram, gram.diagonal().copy(), np.ones(16),
        np.ones(16), 'last')
    assert estimates.noise_of(probe, None, 'loss') == ''
    assert 'probe (a, b)' in estimates.noise_of(probe, None, 'own')


def test_a_tied_table_needs_its_cross_term():
    """The squared norm of a tied table is not the sum of those of its two parts."""
    model = tiny()
    untied = tiny(tie_embeddings=False)
    untied.load_state_dict({**model.state_dict(), 'lm_head.weight': model.embed.weight})
    batch = batches(1, rows=3, length=9)[0]
    tied = influence.row_sqnorms(model, batch, 'all')
    apart = influence.row_sqnorms(untied, batch, 'all')
    cross_term = tied['embed'] - apart['embed'] - apart['lm_head']
    assert cross_term.abs().min() > 1e-3 * tied['embed'].min()
    assert tied.keys() == apart.keys() - {'lm_head'}


@pytest.mark.parametrize('way', ['autocast', 'checkpointing', 'compile'])
def test_rows_under_the_ways_of_training(way):
    """Exact under checkpointing and compiled blocks; the same order of rows under bf16 autocast."""
    model = tiny(qk_norm=True, tie_embeddings=False)
    batch = batches(1, rows=24, length=12, seed=7)[0]
    direction = estimates.probe_direction(model, {'x': twice(batches(2, rows=8, seed=1))}, 'all')

    def measure():
        rows = influence.row_influence(model, batch, direction)[0]
        return rows, influence.ghost_sqnorm(model, batch, 'all')

    exact = measure()
    if way == 'autocast':
        model = model.float()
        direction.v = {name: v.float() for name, v in direction.v.items()}
        with torch.autocast('cpu', torch.bfloat16):
            found = measure()
        for a, b in zip(exact, found, strict=True):
            assert np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1] >= 0.99
            assert (b - a).abs().max() < 0.03 * a.abs().max()
        return
    for block in model.blocks:
        if way == 'compile':
            block.compile(backend='eager')
        else:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    model.loss(batch[0], batch[1])          # compiles before the hooks exist
    for a, b in zip(exact, measure(), strict=True):
        assert (b - a).abs().max() < 1e-12 * a.abs().max()


def test_a_measurement_compiles_nothing_and_uses_what_is_compiled():
    """Blocks that are not measured run compiled if they are compiled for the batch's shape."""
    model = tiny()
    counts = dict(graphs=0, calls=0)

    def backend(graph, _inputs):
        counts['graphs'] += 1

        def run(*inputs):
            counts['calls'] += 1
            return graph(*inputs)

        return run

    direction = estimates.probe_direction(model, {'x': twice(batches(2, seed=1))})
    inputs, targets, _ = batches(1, rows=4, seed=7)[0]
    exact = influence.row_influence(model, (inputs, targets, None), direction)[0]
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend=backend)
    with torch.no_grad():
        model(inputs)                       # as an evaluation does
    before = dict(counts)
    found = influence.row_influence(model, (inputs, targets, None), direction)[0]
    assert counts == dict(graphs=before['graphs'], calls=before['calls'] + 2)
    assert (found - exact).abs().max() < 1e-12 * exact.abs().max()
    influence.row_influence(model, (inputs[:3], targets[:3], None), direction)
    estimates.probe_direction(model, {'x': [(inputs[:3], targets[:3], None)] * 2})
    assert counts == dict(graphs=before['graphs'], calls=before['calls'] + 2)


def test_rows_of_all_sources_are_measured_together(probed_data):
    """Influence and its error over rows, from batches that mix sources and end in repetitions."""
    model = tiny(vocab_size=64)
    sources = [Source(probed_data, name, 'train', 12, 0, vocab_size=64) for name in NAMES]
    probe = Source(probed_data, 'probe/kind', 'probe', 12, 0, vocab_size=64)
    feeder = Feeder(torch.device('cpu'), 4, bos_id=3)
    measured = reweight.Measurement(
        model, feeder, [probe], {'kind': 1.0}, probe_rows=9, source_rows=7, key=(1, 2))
    found = measured.probe(sources)
    by_source = measured.by_rows(sources, found)
    result = measured.of_sources(sources, found)
    direction = measured.direction(found)
    for i, source in enumerate(sources):
        cursors = reweight.chosen_windows(source, 7, (1, 2, 1, i))
        [batch] = [feeder.put(source.rows([int(c) for c in cursors]))]
        batch[2] = (batch[0] == 3).cumsum(1)        # document ids in place of boundaries
        gradients = row_gradients(model, batch, 'last')
        products = np.array([inner(direction.v, g) for g in gradients])
        tokens = (batch[1] >= 0).sum(1).numpy()
        expected = products.sum() / tokens.sum()
        left_out = (products.sum() - products) / (tokens.sum() - tokens)
        error = (6 / 7 * ((left_out - left_out.mean()) ** 2).sum()) ** 0.5      # the jackknife
        assert result.r[source.name] == pytest.approx([expected] * 2, rel=1e-9)
        factors = estimates.factors_of(found, None, 'loss')[-1]
        alone = estimates.mean_and_error(by_source[i][0] @ factors, by_source[i][1])
        assert alone == pytest.approx((expected, error), rel=1e-9)
        assert result.se[source.name][-1] > error


@pytest.mark.parametrize('changes, layers', [
    (SHAPES[0], 'all'), (SHAPES[1], 'embedding+head'), (SHAPES[2], 'last'), (SHAPES[3], 'all')])
def test_datainf_equals_dense_inverses(changes, layers):
    model = tiny(**{**changes, 'n_embd': 8, 'ffn_dim': 12, 'vocab_size': 29})
    parts = batches(2, rows=3, length=9, seed=7, vocab_size=29)
    probe = twice(batches(2, seed=1, vocab_size=29))
    measured = influence.measure_probe(model, {'x': probe}, layers, n_parts=4)
    inputs, targets, doc_ids = parts[1]
    padding = inputs, torch.full_like(targets, -1), doc_ids         # rows that do not count
    bent = influence.datainf(model, [*parts, padding], measured)
    before, after = measured.parts[1], bent.parts[1]
    gradients = []
    for batch in parts:
        for g, targets in zip(row_gradients(model, batch, layers), batch[1], strict=True):
            gradients.append({name: tensor / (targets >= 0).sum() for name, tensor in g.items()})
    for module in {name.rpartition('.')[0] for name in before}:
        names = [name for name in before if name.rpartition('.')[0] == module]
        v = torch.cat([before[name].flatten() for name in names])
        found = torch.cat([after[name].flatten() for name in names])
        rows = [torch.cat([g[name].flatten() for name in names]) for g in gradients]
        lam = 0.1 * sum((g**2).sum() for g in rows) / len(rows) / len(v)
        identity = torch.eye(len(v), dtype=torch.float64)
        dense = sum(torch.linalg.solve(lam * identity + torch.outer(g, g), v) for g in rows)
        dense /= len(rows)
        assert (found - dense).norm() < 1e-8 * dense.norm(), module
    gram = [[inner(a, b) for b in measured.parts] for a in bent.parts]
    assert bent.gram == pytest.approx(np.array(gram), rel=1e-9, abs=1e-9)
    assert bent.gram == pytest.approx(bent.gram.T, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize('layers', ['all', 'last'])
def test_scaling_by_adam(layers):
    """Gradients are divided by the root of their second moment; the embedding table is left out."""
    model = tiny(qk_norm=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    for batch in batches(3, seed=9):
        model.loss(batch[0], batch[1])[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    probe = twice(batches(2, seed=1))
    source = batches(4, seed=5)
    scale = influence.adam_scale(model, [optimizer])
    measured = influence.measure_probe(model, {'x': probe}, layers, scale, n_parts=6)
    v = measured.parts[0]
    assert 'embed.weight' not in v and len(v) > 5
    root = {name: optimizer.state[p]['exp_avg_sq'].sqrt() for name, p in model.named_parameters()}

    def product(a, b):
        total = 0.0
        for name in v:
            divisor = root[name] + 0.01 * root[name].mean()
            total += (a[name] * b[name] / divisor).sum().item()
        return total

    den = mean_of_pairs(model, units_of(probe, layers), layers, product)
    mean = brute_force(model, probe, layers)
    expected = product(brute_force(model, source, layers), mean) / den
    r, _ = group_influence(model, {'a': source}, measured)
    assert r['a'] == pytest.approx(expected, rel=1e-9)
    with pytest.raises(BadInput, match='second moments'):
        influence.adam_scale(model, [])
    with pytest.raises(BadInput, match='scaling by Adam leaves nothing'):
        estimates.probe_direction(model, {'x': probe}, 'embedding+head', scale=scale)


# -- cost and mistakes -----------------------------------------------------------------------------

class Largest(TorchDispatchMode):
    """Records the most elements of a new tensor; views do not count."""
    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and not t._is_view():
                self.n = max(self.n, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize('tied', [True, False])
def test_rows_cost_one_forward_and_backward(tied):
    """In FLOPs. No tensor ever has rows x outputs x inputs of a layer."""
    model = tiny(vocab_size=97, n_embd=64, ffn_dim=96, tie_embeddings=tied).float()
    batch = batches(1, rows=16, length=24, vocab_size=97)[0]

    def flops(work):
        with FlopCounterMode(display=False) as counter:
            work()
        model.zero_grad(set_to_none=True)
        return counter.get_total_flops()

    plain = flops(lambda: model.loss(batch[0], batch[1], doc_ids=batch[2])[0].backward())
    for layers, most in (('all', (1.02, 1.05, 1.01)), ('last', (0.75, 0.75, 0.75))):
        direction = estimates.probe_direction(model, {'x': [batch, batch]}, layers)
        rows = functools.partial(influence.row_influence, model, batch, direction)
        norms = functools.partial(influence.ghost_sqnorm, model, batch, layers)
        measured = influence.measure_probe(model, {'x': [batch, batch]}, layers)
        sources = functools.partial(influence.products_of_batches, model, [batch], measured)
        cost = [flops(work) / plain for work in (rows, norms, sources)]
        print(layers, cost)
        assert all(x <= limit for x, limit in zip(cost, most, strict=True))
        if layers == 'all':
            assert cost[2] < 1.005              # the products with the probe's parts
            for work in (rows, norms):
                with Largest() as largest:
                    work()
                # the smallest square layer; activations have 16 * 24 * 96 at most
                assert largest.n < 16 * 64 * 64


def test_a_gradient_is_dropped_as_soon_as_it_is_used():
    """At most one parameter has a gradient at a time while sources and a probe are measured."""
    model = tiny()
    seen = []

    def use(name, gradient):
        seen.append(sum(p.grad is not None for p in model.parameters()))

    list(influence.stream_gradients(model, batches(2), 'all', use))
    assert len(seen) == 2 * len(list(model.parameters())) and max(seen) == 0


def test_sources_in_another_order_give_the_same():
    model = tiny()
    probe = influence.measure_probe(model, {'x': twice(batches(2, seed=1))})
    sources = {name: batches(4, seed=i) for i, name in enumerate('abcd')}
    backwards = dict(reversed(sources.items()))
    assert group_influence(model, sources, probe) == group_influence(model, backwards, probe)


def test_a_source_with_one_counted_row_has_no_error_to_speak_of():
    """One row, or one of two batches, has all valid tokens: the error is infinite, not 0."""
    model = tiny()
    probe = influence.measure_probe(model, {'x': twice(batches(2, seed=1))})
    inputs, targets, doc_ids = batches(1)[0]
    masked = inputs, torch.full_like(targets, -1), doc_ids
    r, se = group_influence(model, {'a': [(inputs, targets, doc_ids), masked]}, probe)
    assert np.isfinite(r['a']) and se['a'] == np.inf
    value, error = estimates.mean_and_error(np.array([3.0, 0.0, 0.1]), np.array([30.0, 0.0, 1.0]))
    # without one of the two that count: 0.1 and 0.1
    assert value == pytest.approx(0.1) and error == pytest.approx(0.0, abs=1e-12)
    # A source whose sample has no counted token at all is not known, and that is no error.
    r, se = group_influence(model, {'a': [masked, masked]}, probe)
    assert (r, se) == ({'a': 0.0}, {'a': np.inf})


def test_a_probe_whose_rows_disagree_and_other_mistakes():
    model = tiny()
    for layers, parts in (('last', 'rows'), ('all', 'batches')):
        with pytest.raises(RunFault, match=r'the rows of the probe \(x\) do not agree'):
            for seed in range(200):         # sooner or later two rows of random text disagree
                estimates.probe_direction(model, {'x': batches(2, rows=1, seed=seed)}, layers)
        with pytest.raises(BadInput, match=f'fewer than two {parts}'):
            estimates.probe_direction(model, {'x': batches(1, rows=1)}, layers)
    with pytest.raises(BadInput, match='must be one of last, all, first'):
        influence.select(model, 'middle')
    probe = influence.measure_probe(model, {'x': twice(batches(2, seed=1))})
    with pytest.raises(BadInput, match='at least two'):
        group_influence(model, {'a': batches(1)}, probe)


# -- over two ranks --------------------------------------------------------------------------------

TWO_RANKS = """
import json
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from lib.device import leave_ranks
from ops.ranks import make_layout
from tests.test_influence import sharded_results, tiny
dist.init_process_group('gloo')
rank = dist.get_rank()
layout = make_layout('cpu', rank, 2, dict(dp_replicate=1, dp_shard=2, ep=1, tp=1))

def shard(model):
    model.layout = layout
    for block in model.blocks:
        fully_shard(block, mesh=layout.shards)
    fully_shard(model, mesh=layout.shards)
    register_fsdp_forward_method(model, 'loss')

def mine(parts):                    # every second row of every batch
    return [tuple(t[rank::2] for t in batch) for batch in parts]

def gather(rows):
    full = torch.zeros(2 * len(rows), dtype=rows.dtype)
    full[rank::2] = rows
    dist.all_reduce(full)
    return full

result = sharded_results(shard, mine, gather)
if rank == 0:
    print('RESULT' + json.dumps(result))
leave_ranks(0)
"""


def sharded_results(shard, mine, gather):
    """All that must not depend on the number of ranks: sources, rows, norms, and PRESENCE."""
    result = {}
    n_ranks = 2 if torch.distributed.is_initialized() else 1
    for layers, changes in zip(influence.LAYERS, SHAPES, strict=True):
        model = tiny(**changes)
        shard(model)
        source = mine(batches(4, seed=5))
        batch = mine(batches(1, rows=6, seed=6))[0]
        probe = {'x': mine(twice(batches(2, seed=1)))}
        # FSDP2 leaves the root's parameters full after an evaluation.
        with torch.no_grad():
            model.loss(batch[0], batch[1])
        measured = influence.measure_probe(model, probe, layers, n_parts=4)
        direction = estimates.direction_of(measured)
        rows = influence.row_influence(model, batch, direction)[0]
        norms = influence.ghost_sqnorm(model, batch, layers)
        result[f'{layers} sources'] = group_influence(model, {'a': source}, measured)
        if layers in influence.SMALL:
            found = influence.products_of_rows(model, batch, measured)
            result[f'{layers} parts'] = [gather(column).tolist() for column in found.T]
        result[f'{layers} rows'] = gather(rows).tolist()
        result[f'{layers} norms'] = gather(norms).tolist()
        for mode in ('store', 'stream'):
            scored = layers if layers != 'last' else 'first'
            knobs = dict(
                presence=mode, presence_layers=scored, presence_tau=1.0,
                presence_schedule='constant', presence_switch=None, presence_sum='tokens',
                presence_permute=False, presence_by_source=False)
            training = types.SimpleNamespace(config=knobs, model=model, n_steps=10)
            taker = presence.Presence(training, 4)
            taker.load_state_dict(dict(n=4, layers=scored, sigma=1e-3))
            parts = batches(4, rows=4, seed=8)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            tokens = [valid_tokens(batch) for batch in parts]
            taker.begin(0, 1e-2, tokens)
            for inputs, targets, doc_ids in mine(parts):
                loss, losses, _ = model.loss(inputs, targets, doc_ids=doc_ids)
                (loss * n_ranks / sum(tokens)).backward()
                taker.add(None, losses)
            result[f'{layers} {mode}'] = taker.finish()
            squares = [full_tensor((p.grad**2).sum()).item() for p in model.parameters()]
            result[f'{layers} {mode} norm'] = sum(squares)
            optimizer.step()
            optimizer.zero_grad()
        if layers != 'embedding+head':
            with torch.no_grad():
                model.loss(batch[0], batch[1])
            scale = influence.adam_scale(model, [optimizer])
            scaled = influence.measure_probe(model, probe, layers, scale, n_parts=4)
            result[f'{layers} adam'] = group_influence(model, {'a': source}, scaled)
    return result


def assert_close(a, b, where):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_close(a[key], b[key], f'{where} {key}')
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_close(x, y, where)
    else:
        assert a == pytest.approx(b, rel=1e-9), where


def test_two_ranks_equal_one(tmp_path):
    (tmp_path / 'two.py').write_text(TWO_RANKS)
    done = run_ranks([str(tmp_path / 'two.py')], 2)
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout.split('RESULT')[1].splitlines()[0])
    one = sharded_results(lambda model: None, lambda parts: parts, lambda rows: rows)
    assert len(found) == 33
    assert_close(found, json.loads(json.dumps(one)), '')


# -- the rule --------------------------------------------------------------------------------------

def step(weights, r, se=0.01, state=None, **changes):
    high = dict.fromkeys(weights, 0.6)
    cov = np.eye(len(r)) * se**2
    return rules.update_influence(weights, r, cov, state or {}, 0.3, 0.02, high, **changes)


def test_the_rule_moves_towards_what_helps():
    weights = dict(a=0.25, b=0.25, c=0.25, d=0.25)
    r = dict(a=1.0, b=0.0, c=-0.5, d=0.5)
    new, state, log = step(weights, r)
    raw = {name: math.exp(0.3 * x) for name, x in r.items()}
    expected = {name: x / sum(raw.values()) for name, x in raw.items()}
    assert new == pytest.approx(expected, rel=1e-12) and log['kept'] == ''
    assert sum(new.values()) == pytest.approx(1, abs=1e-15)
    again, _, _ = step(new, {**r, 'a': -1.0}, state=json.loads(json.dumps(state)))
    # The average of 1 and -1 is 0, as that of b.
    assert again['a'] / again['b'] == pytest.approx(new['a'] / new['b'])


@pytest.mark.parametrize('r, reason', [
    (dict(a=0.01, b=-0.015, c=0.019), 'noise'), (dict(a=0.51, b=0.5, c=0.505), 'noise'),
    (dict(a=-0.5, b=-0.6, c=-0.1), 'negative')])
def test_nothing_moves_within_noise_or_when_all_harm(r, reason):
    weights = dict(a=0.7, b=0.2, c=0.1)                 # beyond the bounds, and still unchanged
    new, _, log = step(weights, r)
    assert new is weights and reason in log['kept']


def test_noise_of_the_probe_moves_all_sources_alike():
    """A difference counts by its own error, which noise that all sources share does not enter."""
    weights = dict(a=0.25, b=0.25, c=0.25, d=0.25)
    r = dict(a=0.7, b=0.5, c=0.5, d=0.5)
    shared = np.full((4, 4), 0.3**2) + np.eye(4) * 0.02**2
    new, _, _ = rules.update_influence(weights, r, shared, {}, 0.3, 0.02, dict.fromkeys(r, 0.6))
    assert new['a'] > 0.25 and new['b'] == pytest.approx(new['d'])
    apart = np.eye(4) * 0.3**2
    kept, _, log = rules.update_influence(weights, r, apart, {}, 0.3, 0.02, dict.fromkeys(r, 0.6))
    assert kept is weights and 'noise' in log['kept']
    found, errors = rules.differences(weights, r, apart)
    assert found == pytest.approx([0.15, -0.05, -0.05, -0.05])
    # 3/4 of its own noise, and 1/4 of that of each of the three others
    assert errors == pytest.approx(0.3 * ((3 / 4) ** 2 + 3 / 16) ** 0.5)


def play(true, se, n, seed, outlier=None, **changes):
    """The weights after n updates with influences of mean `true` and standard error se: (m,)."""
    rng = np.random.default_rng(seed)
    weights = dict.fromkeys(range(len(true)), 1 / len(true))
    state = {}
    for t in range(n):
        r = np.array(true) + rng.normal(0, se, len(true))
        if t == outlier:
            r[0] = 40.0
        r = dict(enumerate(r.tolist()))
        weights, state, _ = step(weights, r, se, state, **changes)
    return np.array(list(weights.values()))


def test_equal_sources_stay_equal_and_a_better_one_wins():
    """In 14 updates, as in a short run, and in 100, with the errors that are measured."""
    for n, se, spread, least in ((14, 0.1, 0.015, 0.28), (100, 0.1, 0.03, 0.59),
                                 (14, 0.2, 0.03, 0.23), (100, 0.2, 0.06, 0.5)):
        equal = np.array([play([0.5] * 5, se, n, seed) for seed in range(12)])
        assert equal.std(0).mean() < spread
        better = np.array([play([0.7, 0.5, 0.5, 0.5, 0.5], se, n, seed) for seed in range(12)])
        assert better[:, 0].mean() > least and better[:, 0].min() >= 0.19


def test_an_outlier_and_a_source_without_an_error_move_little():
    """An influence of 40 counts as 1, once. One counted row says nothing."""
    raised = [play([0.0] * 5, 0.1, 14, seed, outlier=5)[0] for seed in range(10)]
    assert np.mean(raised) < 0.27
    weights = dict(a=0.25, b=0.25, c=0.25, d=0.25)
    r = dict(a=1.0, b=0.5, c=0.3, d=0.5)
    cov = np.diag([np.inf, 1e-4, 1e-4, 1e-4])
    new, state, _ = rules.update_influence(weights, r, cov, {}, 0.3, 0.02, dict.fromkeys(r, 0.6))
    assert new['c'] < new['a'] < new['b'] == new['d']
    json.dumps(state, allow_nan=False)


def test_what_the_rules_converge_to():
    """Under a constant influence: to the bounds, or with influence_kl to start * exp(r / kl)."""
    r = [0.9, 0.8, 0.7]
    assert play(r, 1e-4, 100, 0) == pytest.approx([0.6, 0.38, 0.02], abs=1e-3)
    for kl in (0.2, 0.5):
        ends = np.exp(np.array(r) / kl)
        ends /= ends.sum()
        assert play(r, 1e-4, 400, 0, kl=kl) == pytest.approx(ends, abs=1e-3)
        assert play(r, 1e-4, 800, 1, kl=kl) == pytest.approx(ends, abs=1e-3)


def test_bounds_hold_after_normalisation():
    rng = np.random.default_rng(0)
    for _ in range(500):
        n = int(rng.integers(2, 9))
        weights = dict(enumerate(rng.dirichlet(np.full(n, 0.3))))
        low = rng.uniform(0, 1 / n)
        high = dict(enumerate(rng.uniform(1 / n, 1, n)))
        new = rules.project(weights, dict.fromkeys(weights, low), high)
        assert sum(new.values()) == pytest.approx(1, abs=1e-12)
        ratios = []                                     # of the weights that no bound holds
        for i, x in new.items():
            assert low - 1e-12 <= x <= high[i] + 1e-12
            if low + 1e-9 < x < high[i] - 1e-9 and weights[i] > 1e-9:
                ratios.append(x / weights[i])
        if len(ratios) > 1:
            assert np.ptp(ratios) < 1e-6 * ratios[0]


def test_caps_that_cannot_all_be_kept():
    low, high = dict.fromkeys('abc', 0.1), dict.fromkeys('abc', 0.6)
    left = rules.project(dict(a=1.0, b=0.0, c=0.0), low, high)
    assert left == pytest.approx(dict(a=0.6, b=0.2, c=0.2))
    capped = rules.project(dict(a=0.5, b=0.5), dict(a=0.1, b=0.1), dict(a=0.2, b=0.3))
    assert capped == pytest.approx(dict(a=0.4, b=0.6))
    with pytest.raises(BadInput, match='leave no room'):
        rules.check_bounds(4, 0.3, 0.6)


def test_weights_in_proportion_to_influence():
    """Equations 5 and 6: the mean over updates, the t-th weighted by t, negative ones as 0."""
    weights = dict(a=0.25, b=0.25, c=0.5)
    high = dict(a=1.0, b=1.0, c=1.0)

    def update(weights, a, b, c, state, low=0.0):
        return rules.update_proportional(weights, dict(a=a, b=b, c=c), state, low, high)

    new, state, log = update(weights, 1.0, 3.0, -2.0, {})
    assert new == pytest.approx(dict(a=0.25, b=0.75, c=0.0)) and not log['kept']
    new, state, _ = update(new, 2.5, -0.5, -0.5, state)
    # (1 + 2 * 2.5, 3 - 2 * 0.5, negative) / 8
    assert new == pytest.approx(dict(a=0.75, b=0.25, c=0.0))
    bounded, _, _ = update(new, 0.0, 0.0, 0.0, state, low=0.1)
    assert bounded == pytest.approx(dict(a=0.675, b=0.225, c=0.1))
    kept, _, log = update(weights, -1.0, -3.0, -2.0, {})
    assert kept is weights and 'no source' in log['kept']


def test_epoch_caps():
    read = dict(a=300, b=0, c=500)
    windows = dict(a=100, b=1000, c=100)
    assert rules.epoch_caps(0.6, 4, read, windows, 1000) == dict(a=0.1, b=0.6, c=0.0)
    assert rules.epoch_caps(0.6, None, dict(a=1), dict(a=1), 10) == dict(a=0.6)


# -- in a training run -----------------------------------------------------------------------------

@pytest.fixture
def probed_data(tmp_path):
    """Two sources that can be learned and one of random tokens; the probe is text of the first."""
    data_dir = tmp_path / 'data'
    make_source(data_dir, 'a', 20_000)
    make_source(data_dir, 'b', 20_000)
    rng = np.random.default_rng(9)
    for split, n in (('train', 20_000), ('val', 2_000)):
        write_shard(data_dir / 'random' / split / '0.bin', rng.integers(0, 64, n))
    make_source(tmp_path / 'other', 'a', 6_000, seed=5)
    shutil.copytree(tmp_path / 'other' / 'a' / 'train', data_dir / 'probe' / 'kind' / 'probe')
    return data_dir


NAMES = ('a', 'b', 'random')
KNOBS = dict(
    sources={'a': 1.0, 'b': 1.0, 'random': 1.0}, mixture='influence', probe={'kind': 1.0},
    mixture_interval=8, mixture_warmup=16, batch_size=4, total_batch_tokens=256, probe_rows=32,
    influence_rows=16, max_steps=64, eval_interval=64, save_interval=20,
)  # fmt: skip


def values(by_step, at, what):
    """A metric of every source at a step."""
    return [by_step[at][f'mixture/{what}_{name}'] for name in NAMES]


def losses(by_step, steps):
    return [by_step[at]['train/loss'] for at in steps]


def assert_equal_from(first, one, other):
    """The two runs have the same losses and mixture metrics from step `first` on."""
    for at in range(first, 64):
        for key in one[at].keys() | other[at].keys():
            if key.startswith(('mixture', 'train/loss')):
                assert one[at][key] == other[at][key], (at, key)


def test_weights_move_and_reach_the_batches(probed_data, tmp_path):
    """Text of the probe's kind gains weight, random tokens lose it, and the rows drawn follow."""
    by_step = train(tmp_path / 'run', probed_data, **KNOBS)
    last = by_step[63]
    assert values(by_step, 15, 'weight')[:2] == pytest.approx([1 / 3, 1 / 3])
    assert last['mixture/weight_a'] > 0.5 and last['mixture/weight_random'] < 0.6 / 3
    first = by_step[16]
    assert first['mixture/influence_a'] > 2 * first['mixture/influence_se_a'] > 0
    # probe rows and rows of sources; a forward is a third of what training takes
    per_row = first['mixture/extra_flops'] / (32 + 3 * 16)
    fields = {key: value for key, value in TINY.items() if key in ModelConfig.__dataclass_fields__}
    trained = 16 * flops_per_token(ModelConfig(**fields), 16)
    assert trained / 3 < per_row < trained
    assert by_step[56]['mixture/extra_flops'] == pytest.approx(6 * first['mixture/extra_flops'])
    for at in range(16, 64):                # of 16 rows a step, at most two are off the weights
        difference = np.subtract(values(by_step, at, 'drawn'), values(by_step, at, 'weight'))
        assert np.abs(difference).max() < 2.01 / 16
    for at in range(16, 64, 8):
        asked = values(by_step, at, 'asked')
        assert values(by_step, at, 'weight')[:2] == pytest.approx(asked[:2], abs=1e-6)
    fixed = train(tmp_path / 'fixed', probed_data, **{**KNOBS, 'mixture': 'fixed'})
    unmoved = dict(mixture_eta=0.0, mixture_min=0.0, mixture_max=1.0, max_epochs=None)
    still = train(tmp_path / 'still', probed_data, **KNOBS, **unmoved)
    assert losses(fixed, range(64)) == losses(still, range(64))      # measuring changes nothing
    assert losses(by_step, range(16)) == losses(fixed, range(16))
    assert last['train/loss'] != fixed[63]['train/loss']


def test_a_killed_run_ends_with_the_same_weights(probed_data, tmp_path):
    knobs = {**KNOBS, 'schedule': 'constant', 'max_epochs': None}
    train(tmp_path / 'run', probed_data, **{**knobs, 'max_steps': 40})
    constant = train(tmp_path / 'constant', probed_data, **knobs)
    resumed = train(tmp_path / 'run', probed_data, **knobs, resume=True)
    assert_equal_from(40, resumed, constant)


KILLED_WHILE_MEASURING = """
import os, runpy, signal, sys
from methods import reweight
def killed(self, step, update=reweight.Influence.update):
    metrics = update(self, step)
    if step == 32:                      # the new weights are set, and nothing of it is saved yet
        os.kill(os.getpid(), signal.SIGKILL)
    return metrics
reweight.Influence.update = killed
sys.argv = ['train.py'] + sys.argv[1:]
runpy.run_path('train.py', run_name='__main__')
"""


def test_a_run_killed_within_an_update_resumes_to_the_same_weights(probed_data, tmp_path):
    full = train(tmp_path / 'full', probed_data, **KNOBS)
    (tmp_path / 'killed.py').write_text(KILLED_WHILE_MEASURING)
    arguments = train_command(tmp_path / 'run', probed_data, **KNOBS)[2:]
    done = run_ranks([str(tmp_path / 'killed.py'), *arguments], 1)
    assert done.returncode == -signal.SIGKILL, done.stdout
    resumed = train(tmp_path / 'run', probed_data, **KNOBS, resume=True)
    assert_equal_from(20, resumed, full)


def test_two_ranks_reweight_as_one(probed_data, tmp_path):
    knobs = {**KNOBS, 'max_steps': 18, 'eval_interval': 8}      # evaluates before it measures
    one = train(tmp_path / 'one', probed_data, **knobs)
    two = train(tmp_path / 'two', probed_data, ranks=2, **{**knobs, 'batch_size': 2})
    assert values(two, 16, 'weight') == pytest.approx(values(one, 16, 'weight'), rel=0.05)
    expected = one[16]['mixture/influence_a']
    assert two[16]['mixture/influence_a'] == pytest.approx(expected, rel=1e-3)


def test_no_source_is_read_more_often_than_max_epochs(probed_data, tmp_path):
    """Sources of 1,249 windows, 16 rows a step. A resumed run may switch a source off."""
    knobs = {**KNOBS, 'max_epochs': 0.2, 'mixture_min': 0.0, 'max_steps': 40}
    by_step = train(tmp_path / 'run', probed_data, **knobs)
    assert max(values(by_step, 39, 'epochs')) < 0.23
    # The run reads more than 0.1 epochs of all sources, so in the end no weights are left to give.
    beyond = train(tmp_path / 'beyond', probed_data, **{**KNOBS, 'max_epochs': 0.1})
    assert beyond[63]['mixture/epochs_a'] > 0.1
    assert beyond[40]['mixture/asked_a'] == pytest.approx(beyond[56]['mixture/asked_a'])
    changes = dict(mixture_min=0.0, sources={'a': 1.0, 'b': 0.0, 'random': 1.0})
    switched = train(tmp_path / 'run', probed_data, resume=True, **{**KNOBS, **changes})
    assert switched[63]['mixture/drawn_b'] == 0


def lost_in_noise(measured, broken):
    """A stand-in for reweight.noise_of that calls the measurements of `broken` lost, by number."""
    def noise_of(probe, weights, units):
        measured.append(len(probe.at))
        return 'the rows of the probe disagree' if len(measured) in broken else ''
    return noise_of


def test_a_noisy_measurement_is_survived(probed_data, tmp_path, monkeypatch, capsys):
    """The weights stay, the next measurement reads twice the rows, and a resumed run does the same.
    """
    knobs = {**KNOBS, 'probe_rows': 16, 'schedule': 'constant', 'max_epochs': None}
    monkeypatch.setattr(reweight, 'noise_of', lost_in_noise([], (2, 3, 6)))
    by_step = train(tmp_path / 'full', probed_data, **knobs)
    rows = [by_step[at]['probe/rows'] for at in range(16, 64, 8)]
    assert rows == [16, 16, 32, 64, 64, 64]
    noisy = [by_step[at]['probe/noisy'] for at in range(16, 64, 8)]
    assert noisy == [0, 1, 1, 0, 0, 1]
    for at in (24, 32, 56):
        before = values(by_step, at - 8, 'asked')
        assert values(by_step, at, 'asked') == pytest.approx(before, abs=1e-6)
        assert 'mixture/influence_a' not in by_step[at]
    assert values(by_step, 40, 'asked') != values(by_step, 32, 'asked')
    printed = ''.join(capsys.readouterr())
    assert 'step 24: warning: this measurement of influence says nothing' in printed
    assert 'The next one reads 32 rows of every probe set' in printed
    assert 'The next one reads 80 rows' in printed      # what the interval allows
    # killed between two noisy measurements
    monkeypatch.setattr(reweight, 'noise_of', lost_in_noise([], (2, 3)))
    train(tmp_path / 'run', probed_data, **{**knobs, 'max_steps': 30})
    monkeypatch.setattr(reweight, 'noise_of', lost_in_noise([0, 0], (3, 6)))
    resumed = train(tmp_path / 'run', probed_data, **knobs, resume=True)
    assert_equal_from(30, resumed, by_step)


def test_rows_without_counted_tokens_are_noise(probed_data, tmp_path, monkeypatch):
    """A draw of probe rows that are all masked is a measurement that says nothing, no bad input."""
    calls = []

    def measure_probe(*arguments, measure=reweight.measure_probe):
        calls.append(0)
        if len(calls) == 2:
            raise influence.TooFewTokens('fewer than two rows have valid tokens.')
        return measure(*arguments)

    monkeypatch.setattr(reweight, 'measure_probe', measure_probe)
    by_step = train(tmp_path / 'run', probed_data, **{**KNOBS, 'max_steps': 34})
    assert [by_step[at]['probe/noisy'] for at in (16, 24, 32)] == [0, 1, 0]


def test_a_probe_on_which_nothing_succeeds_ends_the_run_early(probed_data, tmp_path, monkeypatch):
    """After three measurements, and the sentence says what to do."""
    measured = []
    monkeypatch.setattr(reweight, 'noise_of', lost_in_noise(measured, range(99)))
    with pytest.raises(RunFault, match='the first 3 measurements of influence say nothing'):
        train(tmp_path / 'run', probed_data, **KNOBS)
    assert len(measured) == 3


@pytest.mark.parametrize('changes', [
    dict(influence_kl=0.5),
    dict(influence_rule='proportional', mixture_min=0.0, mixture_max=1.0),
    dict(influence_scaling='adam', influence_layers='all'), dict(influence_scaling='datainf'),
    dict(influence_layers='embedding+head'), dict(influence_layers='first')])
def test_other_ways_to_measure_and_to_weigh_move_the_weights(probed_data, tmp_path, changes):
    by_step = train(tmp_path / 'run', probed_data, **{**KNOBS, 'max_steps': 50, **changes})
    assert by_step[49]['mixture/weight_a'] > 0.4 and by_step[49]['mixture/weight_random'] < 0.3
    assert by_step[48]['mixture/influence_a'] > by_step[48]['mixture/influence_random']


@pytest.mark.parametrize('changes, message', [
    (dict(influence_scaling='adagrad'), 'none, adam, datainf'),
    (dict(influence_units='both'), 'loss, own'),
    (dict(influence_scaling='adam', optimizer='muon'), "AdamW's moments"),
    (dict(influence_rule='greedy'), 'step, proportional'),
    (dict(select='all'), 'none, online, scores'),
    (dict(select='scores'), 'holds no scores'),
    (dict(select='online', mixture='fixed', probe_rows=300, mixture_interval=64),
     'fewer than probe_rows = 300 and half as many again'),
    (dict(select_keep=0.0), 'select_keep'),
    (dict(max_epochs=0.0), 'max_epochs = 0.0'),
    (dict(seed=-1), 'seed = -1'),
    (dict(probe={'a/kind': 1.0}), 'without a /'),
    (dict(probe={}), 'needs probe sets'),
    (dict(probe={'nothing': 1.0}), 'probe/nothing does not exist'),
    (dict(influence_layers='middle'), 'last, all, first'),
    (dict(mixture_interval=2), 'more than the 32 that are trained on'),
    (dict(mixture_min=0.4), 'leave no room'),
    (dict(probe_rows=500, mixture_interval=64), 'fewer than probe_rows'),
    (dict(influence_rows=2), 'at least 4'),
    (dict(influence_kl=4.0), 'influence_kl = 4 times mixture_eta = 0.3 must be at most 1'),
    (dict(probe={'kind': -1.0}), 'no weight may be negative'),
    (dict(probe={'kind': 0.0}), 'one must be above 0'),
    (dict(probe={'kind': -1.0}, mixture='fixed'), 'no weight may be negative'),
    (dict(sources={'a': 1.0, 'b': 0.0}), 'there is only one'),
    (dict(mixture_eta=-0.1), 'mixture_eta = -0.1 must be at least 0'),
    (dict(mixture_eta=501.0), 'mixture_eta = 501 is too large'),
    (dict(mixture_warmup=-1), 'mixture_warmup = -1 must be at least 0'),
    (dict(mixture_min=-0.1), 'mixture_min = -0.1 must be at least 0'),
    (dict(mixture_max=1.1), 'mixture_max = 1.1 must be at least 0 and at most 1'),
    (dict(probe_rows=0), 'probe_rows = 0 must be at least 1'),
    (dict(select_margin=-1.0, select='online'), 'select_margin = -1.0 must be at least 0'),
    (dict(presence_tau=1e9), 'presence_tau = 1000000000.0 must'),
    (dict(presence_switch=-1), 'presence_switch = -1')])
def test_bad_settings(probed_data, tmp_path, changes, message):
    with pytest.raises(BadInput, match=message):
        train(tmp_path / 'run', probed_data, **{**KNOBS, **changes})
    assert not (tmp_path / 'run').exists()


def test_every_rank_needs_rows():
    source = Source.__new__(Source)
    source.name = 'a'
    source.n_windows = 1000
    config = dict(
        mixture='influence', select='none', influence_scaling='none', influence_units='loss',
        influence_rule='step', influence_layers='last', optimizer='adamw', probe={'a': 1.0},
        influence_rows=16, probe_rows=16, mixture_min=0.0, mixture_max=1.0, max_epochs=4.0, tp=1,
        influence_kl=0.0,
        n_expert=0, mixture_interval=10, mixture_eta=None,
    )

    def check(n_ranks):
        training = types.SimpleNamespace(
            config=config, run=types.SimpleNamespace(n_data=n_ranks), active=[source],
            probes=[source], batch_rows=100)
        reweight.check(training)

    check(8)
    with pytest.raises(BadInput, match='at least 32 on 16 rank'):
        check(16)
