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
from methods import presence, reweight, rules
from model import GPT, ModelConfig, flops_per_token, init_weights
from ops.loss import linear_cross_entropy
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


def group_influence(model, sources, direction):
    """Influence, its standard error, and the loss of every source: three dicts of floats."""
    r, se, loss = {}, {}, {}
    for name, parts in sources.items():
        products, tokens, loss[name] = influence.source_products(model, parts, [direction])
        value, error = influence.mean_and_error(products[:, 0], tokens)
        r[name] = float(value)
        se[name] = float(error)
    return r, se, loss


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
    direction = influence.probe_direction(model, probe, layers, weights, units=units)
    r, se, loss = group_influence(model, sources, direction)
    den, mean = {}, {}
    for domain, parts in probe.items():
        den[domain] = mean_of_pairs(model, units_of(parts, layers), layers, inner)
        mean[domain] = brute_force(model, parts, layers)
        assert direction.den[domain] == pytest.approx(den[domain], rel=1e-9)
        reliability = den[domain] / inner(mean[domain], mean[domain])
        assert direction.reliability[domain] == pytest.approx(reliability, rel=1e-9)
    shares = {'code': 0.25, 'math': 0.75}
    if units == 'loss':                     # domains count by their gradients
        mean_den = 0.25 * den['code'] + 0.75 * den['math']
        shares = {domain: share * den[domain] / mean_den for domain, share in shares.items()}
    for name, parts in sources.items():
        g = brute_force(model, parts, layers)
        expected = sum(share * inner(g, mean[d]) / den[d] for d, share in shares.items())
        assert r[name] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert se[name] > 0
    assert all(p.grad is None for p in model.parameters())
    total = 0.0
    for inputs, targets, doc_ids in sources['a']:
        h = model(inputs, doc_ids).flatten(0, 1)
        total += linear_cross_entropy(h, model.output_weight, targets.flatten())[0].item()
    tokens = sum(valid_tokens(batch) for batch in sources['a'])
    assert loss['a'] == pytest.approx(total / tokens, rel=1e-12)


# One length below the layers' widths and one above test both forms of the ghost norm.
@pytest.mark.parametrize('length', [7, 40])
@pytest.mark.parametrize('layers', influence.LAYERS)
@pytest.mark.parametrize('changes', SHAPES)
def test_rows_equal_their_gradients(changes, layers, length):
    """Influence and squared norms of single rows. The rows of a source sum to its influence."""
    model = tiny(**changes)
    direction = influence.probe_direction(model, {'x': twice(batches(2, seed=1))}, layers)
    parts = batches(2, rows=4, length=length, seed=7)
    total = 0.0
    for batch in parts:
        rows, losses = influence.row_influence(model, batch, [direction])
        norms = influence.ghost_sqnorm(model, batch, layers)
        for i, g in enumerate(row_gradients(model, batch, layers)):
            assert rows[i, 0].item() == pytest.approx(inner(direction.v, g), rel=1e-10, abs=1e-13)
            assert norms[i].item() == pytest.approx(inner(g, g), rel=1e-10)
        loss = model.loss(batch[0], batch[1], doc_ids=batch[2])[0].item()
        assert losses.sum().item() == pytest.approx(loss, rel=1e-12)
        total += rows.sum().item()
    r, _, _ = group_influence(model, {'a': parts}, direction)
    tokens = sum(valid_tokens(batch) for batch in parts)
    assert total / tokens == pytest.approx(r['a'], rel=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_a_disjoint_sample_of_the_probe_has_influence_one():
    """Within three standard errors in nearly all of many draws, and without bias."""
    model = tiny()
    z, r = [], []

    # Tokens of unequal frequency give the model something to learn.
    def text(n, seed):
        generator = torch.Generator().manual_seed(seed)
        frequencies = 1 / torch.arange(1.0, 32.0)
        ids = torch.multinomial(frequencies, n * 4 * 8, replacement=True, generator=generator)
        return [(rows[:, :-1], rows[:, 1:], None) for rows in ids.view(n, 4, 8)]

    for seed in range(24):
        direction = influence.probe_direction(model, {'x': text(24, seed)})
        value, se, _ = group_influence(model, {'copy': text(8, 1000 + seed)}, direction)
        r.append(value['copy'])
        z.append((value['copy'] - 1) / se['copy'])
    assert np.mean(np.abs(z) < 3) >= 0.9, z
    assert abs(np.mean(r) - 1) < 3 * np.std(r) / 24**0.5, r


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
    direction = influence.probe_direction(model, {'x': twice(batches(2, rows=8, seed=1))}, 'all')

    def measure():
        rows = influence.row_influence(model, batch, [direction])[0][:, 0]
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

    direction = influence.probe_direction(model, {'x': twice(batches(2, seed=1))})
    inputs, targets, _ = batches(1, rows=4, seed=7)[0]
    exact = influence.row_influence(model, (inputs, targets, None), [direction])[0]
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend=backend)
    with torch.no_grad():
        model(inputs)                       # as an evaluation does
    before = dict(counts)
    found = influence.row_influence(model, (inputs, targets, None), [direction])[0]
    assert counts == dict(graphs=before['graphs'], calls=before['calls'] + 2)
    assert (found - exact).abs().max() < 1e-12 * exact.abs().max()
    influence.row_influence(model, (inputs[:3], targets[:3], None), [direction])
    influence.probe_direction(model, {'x': [(inputs[:3], targets[:3], None)] * 2})
    assert counts == dict(graphs=before['graphs'], calls=before['calls'] + 2)


def test_rows_of_all_sources_are_measured_together(probed_data):
    """Influence and its error over rows, from batches that mix sources and end in repetitions."""
    model = tiny(vocab_size=64)
    sources = [Source(probed_data, name, 'train', 12, 0, vocab_size=64) for name in NAMES]
    probe = Source(probed_data, 'probe/kind', 'probe', 12, 0, vocab_size=64)
    feeder = Feeder(torch.device('cpu'), 4, bos_id=3)
    measured = reweight.Measurement(
        model, feeder, [probe], {'kind': 1.0}, probe_rows=9, source_rows=7, key=(1, 2))
    directions, shares = measured.directions(sources)
    r, se = measured.of_sources(sources, directions, shares)
    for i, source in enumerate(sources):
        cursors = reweight.chosen_windows(source, 7, (1, 2, 1, i))
        [batch] = [feeder.put(source.rows([int(c) for c in cursors]))]
        batch[2] = (batch[0] == 3).cumsum(1)        # document ids in place of boundaries
        gradients = row_gradients(model, batch, 'last')
        products = np.array([inner(directions[0].v, g) for g in gradients])
        tokens = (batch[1] >= 0).sum(1).numpy()
        expected = products.sum() / tokens.sum()
        # Cochran 1977, section 2.11: the error of a ratio of means
        error = np.std(products - expected * tokens, ddof=1) * 7**0.5 / tokens.sum()
        assert r[source.name] == pytest.approx([expected] * 2, rel=1e-9)
        assert se[source.name] == pytest.approx([error] * 2, rel=1e-9)


@pytest.mark.parametrize('changes, layers', [
    (SHAPES[0], 'all'), (SHAPES[1], 'embedding+head'), (SHAPES[2], 'last'), (SHAPES[3], 'all')])
def test_datainf_equals_dense_inverses(changes, layers):
    model = tiny(**{**changes, 'n_embd': 8, 'ffn_dim': 12, 'vocab_size': 29})
    parts = batches(2, rows=3, length=9, seed=7, vocab_size=29)
    probe = twice(batches(2, seed=1, vocab_size=29))
    direction = influence.probe_direction(model, {'x': probe}, layers)
    inputs, targets, doc_ids = parts[1]
    padding = inputs, torch.full_like(targets, -1), doc_ids         # rows that do not count
    bent = influence.datainf(model, [*parts, padding], direction)
    gradients = []
    for batch in parts:
        for g, targets in zip(row_gradients(model, batch, layers), batch[1], strict=True):
            gradients.append({name: tensor / (targets >= 0).sum() for name, tensor in g.items()})
    for module in {name.rpartition('.')[0] for name in direction.v}:
        names = [name for name in direction.v if name.rpartition('.')[0] == module]
        v = torch.cat([direction.v[name].flatten() for name in names])
        found = torch.cat([bent.v[name].flatten() for name in names])
        rows = [torch.cat([g[name].flatten() for name in names]) for g in gradients]
        lam = 0.1 * sum((g**2).sum() for g in rows) / len(rows) / len(v)
        identity = torch.eye(len(v), dtype=torch.float64)
        dense = sum(torch.linalg.solve(lam * identity + torch.outer(g, g), v) for g in rows)
        dense /= len(rows)
        assert (found - dense).norm() < 1e-8 * dense.norm(), module
    r, _, _ = group_influence(model, {'a': probe}, influence.unit(model, bent, probe))
    assert r['a'] == pytest.approx(1, abs=1e-9)


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
    direction = influence.probe_direction(model, {'x': probe}, layers, scale=scale)
    assert 'embed.weight' not in direction.v and len(direction.v) > 5
    root = {name: optimizer.state[p]['exp_avg_sq'].sqrt() for name, p in model.named_parameters()}

    def product(a, b):
        total = 0.0
        for name in direction.v:
            divisor = root[name] + 0.01 * root[name].mean()
            total += (a[name] * b[name] / divisor).sum().item()
        return total

    den = mean_of_pairs(model, units_of(probe, layers), layers, product)
    mean = brute_force(model, probe, layers)
    expected = product(brute_force(model, source, layers), mean) / den
    r, _, _ = group_influence(model, {'a': source}, direction)
    assert r['a'] == pytest.approx(expected, rel=1e-9)
    with pytest.raises(BadInput, match='second moments'):
        influence.adam_scale(model, [])
    with pytest.raises(BadInput, match='scaling by Adam leaves nothing'):
        influence.probe_direction(model, {'x': probe}, 'embedding+head', scale=scale)


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
    for layers, most in (('all', (1.02, 1.05, 1.0)), ('last', (0.75, 0.75, 0.75))):
        direction = influence.probe_direction(model, {'x': [batch, batch]}, layers)
        rows = functools.partial(influence.row_influence, model, batch, [direction])
        norms = functools.partial(influence.ghost_sqnorm, model, batch, layers)
        sources = functools.partial(influence.source_products, model, [batch], [direction])
        cost = [flops(work) / plain for work in (rows, norms, sources)]
        print(layers, cost)
        assert all(x <= limit for x, limit in zip(cost, most, strict=True))
        if layers == 'all':
            assert cost[2] == 1
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
    direction = influence.probe_direction(model, {'x': twice(batches(2, seed=1))})
    sources = {name: batches(4, seed=i) for i, name in enumerate('abcd')}
    backwards = dict(reversed(sources.items()))
    assert group_influence(model, sources, direction) == group_influence(
        model, backwards, direction)


def test_the_standard_error_is_that_of_many_samples():
    """Over samples of the same kind, r scatters as its standard error says."""
    model = tiny()
    direction = influence.probe_direction(model, {'x': twice(batches(8, seed=1))})
    values, errors = [], []
    for i in range(60):
        r, se, _ = group_influence(model, {'a': batches(8, seed=100 + i)}, direction)
        values.append(r['a'])
        errors.append(se['a'])
    assert np.std(values, ddof=1) == pytest.approx(np.mean(errors), rel=0.35)


def test_a_probe_whose_halves_disagree_and_other_mistakes():
    model = tiny()
    for layers, parts in (('last', 'rows'), ('all', 'batches')):
        with pytest.raises(RunFault, match=f"{parts} of the probe set 'x' disagree"):
            for seed in range(200):         # sooner or later two rows of random text disagree
                influence.probe_direction(model, {'x': batches(2, rows=1, seed=seed)}, layers)
        with pytest.raises(BadInput, match=f'fewer than two {parts}'):
            influence.probe_direction(model, {'x': batches(1, rows=1)}, layers)
    with pytest.raises(BadInput, match='must be one of last, all, first'):
        influence.select(model, 'middle')
    direction = influence.probe_direction(model, {'x': twice(batches(2, seed=1))})
    with pytest.raises(BadInput, match='at least two'):
        group_influence(model, {'a': batches(1)}, direction)


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
        direction = influence.probe_direction(model, probe, layers)
        rows = influence.row_influence(model, batch, [direction])[0][:, 0]
        norms = influence.ghost_sqnorm(model, batch, layers)
        result[f'{layers} sources'] = group_influence(model, {'a': source}, direction)
        result[f'{layers} rows'] = gather(rows).tolist()
        result[f'{layers} norms'] = gather(norms).tolist()
        for mode in ('store', 'stream'):
            scored = layers if layers != 'last' else 'first'
            knobs = dict(
                presence=mode, presence_layers=scored, presence_tau=1.0,
                presence_schedule='constant', presence_switch=None)
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
            scaled = influence.probe_direction(model, probe, layers, scale=scale)
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
    assert len(found) == 31
    assert_close(found, json.loads(json.dumps(one)), '')


# -- the rule --------------------------------------------------------------------------------------

def step(weights, r, se=0.01, state=None):
    se = dict.fromkeys(r, se)
    high = dict.fromkeys(weights, 0.6)
    return rules.update_influence(weights, r, se, state or {}, 0.3, 0.02, high)


def test_the_rule_moves_towards_what_helps():
    weights = dict(a=0.25, b=0.25, c=0.25, d=0.25)
    r = dict(a=1.0, b=0.0, c=-0.5, d=0.5)
    new, state, log = step(weights, r)
    raw = {name: math.exp(0.3 * x) for name, x in r.items()}
    expected = {name: x / sum(raw.values()) for name, x in raw.items()}
    assert new == pytest.approx(expected, rel=1e-12) and log['kept'] == ''
    assert sum(new.values()) == pytest.approx(1, abs=1e-15)
    again, _, _ = step(new, {**r, 'a': -1.0}, state=state)           # the average of 1 and -1 is 0
    assert again['a'] / again['b'] == pytest.approx(new['a'] / new['b'])


@pytest.mark.parametrize('r, reason', [
    (dict(a=0.01, b=-0.015, c=0.019), 'noise'), (dict(a=-0.5, b=-0.6, c=-0.1), 'negative')])
def test_nothing_moves_within_noise_or_when_all_harm(r, reason):
    weights = dict(a=0.7, b=0.2, c=0.1)                 # beyond the bounds, and still unchanged
    new, _, log = step(weights, r)
    assert new is weights and reason in log['kept']


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
        return rules.update_proportional(weights, dict(a=a, b=b, c=c), {}, state, low, high)

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
    full = train(tmp_path / 'full', probed_data, **KNOBS)
    knobs = {**KNOBS, 'schedule': 'constant', 'max_epochs': None}
    train(tmp_path / 'run', probed_data, **{**knobs, 'max_steps': 40})
    constant = train(tmp_path / 'constant', probed_data, **knobs)
    resumed = train(tmp_path / 'run', probed_data, **knobs, resume=True)
    assert_equal_from(40, resumed, constant)
    assert full[63]['train/loss'] != constant[63]['train/loss']


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
    knobs = {**KNOBS, 'max_steps': 34, 'eval_interval': 8}      # evaluates before it measures
    one = train(tmp_path / 'one', probed_data, **knobs)
    two = train(tmp_path / 'two', probed_data, ranks=2, **{**knobs, 'batch_size': 2})
    for at in (16, 24, 32):
        assert values(two, at, 'weight') == pytest.approx(values(one, at, 'weight'), rel=0.05)
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


@pytest.mark.parametrize('changes', [
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
