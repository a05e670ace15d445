"""Influence against brute force in float64, over two ranks, and its rule; then in a training run: the weights move."""
import functools
import json
import math
import shutil
import signal

import numpy as np
import pytest
import torch

import influence
from configurator import BadInput, RunFault
from data import Source
from methods import presence, reweight, rules
from model import GPT, ModelConfig, flops_per_token, init_weights
from ops.loss import linear_cross_entropy
from tests.conftest import TINY, make_source, run_ranks, train, train_command, write_shard

SHAPES = [dict(), dict(tie_embeddings=False), dict(qk_norm=True, layer_repeat=2), dict(qkv_bias=True, n_kv_head=1)]


def tiny(**changes):
    model = GPT(ModelConfig(**{**dict(vocab_size=31, n_layer=3, n_head=4, n_kv_head=2, n_embd=16, ffn_dim=24), **changes})).double()
    init_weights(model, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim == 2 else None
    return model


def batches(n, rows=2, length=7, seed=0, vocab_size=31):
    """n batches with targets left out here and there, and documents."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(n):
        idx = torch.randint(0, vocab_size, (rows, length + 1), generator=generator)
        targets = idx[:, 1:].clone()
        targets[torch.rand(targets.shape, generator=generator) < 0.2] = -1
        out.append((idx[:, :-1], targets, (idx[:, :-1] == 5).cumsum(1)))
    return out


def row_gradients(model, batch, layers):
    """Gradients of every row's summed loss by plain autograd over full logits: list of name -> tensor."""
    names, rows = list(influence.select(model, layers)[0]), []
    for inputs, targets, doc_ids in zip(*batch):
        model.zero_grad()
        logits = model(inputs[None], doc_ids[None])[0] @ model.output_weight.T
        torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction='sum').backward()
        rows.append({n: p.grad.clone() for n, p in model.named_parameters() if n in names})
    model.zero_grad()
    return rows


def brute_force(model, parts, layers):
    """Gradient of the mean token loss, row by row."""
    rows = [g for batch in parts for g in row_gradients(model, batch, layers)]
    tokens = sum((targets >= 0).sum().item() for _, targets, _ in parts)
    return {n: sum(g[n] for g in rows) / tokens for n in rows[0]}


def inner(a, b):
    return sum((a[n] * b[n]).sum().item() for n in b)


def twice(parts):
    """Batches that agree with each other."""
    return parts + parts


@pytest.mark.parametrize('layers, units', [*zip(influence.LAYERS, ('loss', 'own') * 2), ('last', 'own'), ('all', 'loss')])
@pytest.mark.parametrize('changes', SHAPES)
def test_influence_equals_row_by_row_gradients(changes, layers, units):
    model = tiny(**changes)
    probe = {'code': twice(batches(2, seed=1)), 'math': twice(batches(3, rows=3, seed=3))}
    sources = {'a': batches(4, seed=5), 'b': batches(5, rows=3, seed=6)}
    direction = influence.probe_direction(model, probe, layers, {'code': 1.0, 'math': 3.0}, units=units)
    r, se, loss = influence.group_influence(model, sources, direction)
    den, mean = {}, {}
    for domain, parts in probe.items():          # the mean product of different batches, by hand
        g = [brute_force(model, [batch], layers) for batch in parts]
        n = [(batch[1] >= 0).sum().item() for batch in parts]
        pairs = [(i, j) for i in range(len(parts)) for j in range(len(parts)) if i != j]
        den[domain] = sum(n[i] * n[j] * inner(g[i], g[j]) for i, j in pairs) / sum(n[i] * n[j] for i, j in pairs)
        mean[domain] = brute_force(model, parts, layers)
        assert direction.den[domain] == pytest.approx(den[domain], rel=1e-9)
        assert direction.reliability[domain] == pytest.approx(den[domain] / inner(mean[domain], mean[domain]), rel=1e-9)
    for name, parts in sources.items():
        g = brute_force(model, parts, layers)
        shares = {'code': 0.25, 'math': 0.75}
        if units == 'loss':                                      # of the mean loss: domains count by their gradients
            shares = {d: share * den[d] / (0.25 * den['code'] + 0.75 * den['math']) for d, share in shares.items()}
        expected = sum(share * inner(g, mean[domain]) / den[domain] for domain, share in shares.items())
        assert r[name] == pytest.approx(expected, rel=1e-9, abs=1e-12) and se[name] > 0
    assert all(p.grad is None for p in model.parameters())
    parts = sources['a']
    total = sum(linear_cross_entropy(model(i, d).flatten(0, 1), model.output_weight, t.flatten())[0].item() for i, t, d in parts)
    assert loss['a'] == pytest.approx(total / sum((t >= 0).sum().item() for _, t, _ in parts), rel=1e-12)


@pytest.mark.parametrize('length', [7, 40])                  # shorter and longer than the widths: both forms of the ghost norm
@pytest.mark.parametrize('layers', influence.LAYERS)
@pytest.mark.parametrize('changes', SHAPES)
def test_rows_equal_their_gradients(changes, layers, length):
    """Influence, per position too, and squared norms of single rows; and the rows of a source add up to its influence."""
    model = tiny(**changes)
    direction = influence.probe_direction(model, {'x': twice(batches(2, seed=1))}, layers)
    parts = batches(2, rows=4, length=length, seed=7)
    found = [influence.row_influence(model, batch, direction)[0] for batch in parts]
    for batch, rows in zip(parts, found):
        gradients, norms = row_gradients(model, batch, layers), influence.ghost_sqnorm(model, batch, layers)
        for g, row, norm in zip(gradients, rows.tolist(), norms.tolist()):
            assert row == pytest.approx(inner(direction.v, g), rel=1e-10, abs=1e-13)
            assert norm == pytest.approx(inner(g, g), rel=1e-10)
        positions, losses = influence.row_influence(model, batch, direction, per_position=True)
        assert positions.shape == batch[0].shape and (positions.sum(1) - rows).abs().max() < 1e-12 * rows.abs().max() + 1e-14
        assert losses.sum().item() == pytest.approx(model.loss(batch[0], batch[1], doc_ids=batch[2])[0].item(), rel=1e-12)
    tokens = sum((t >= 0).sum().item() for _, t, _ in parts)
    r = influence.group_influence(model, {'a': parts}, direction)[0]['a']
    assert sum(rows.sum().item() for rows in found) / tokens == pytest.approx(r, rel=1e-12)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize('layers', influence.LAYERS)
@pytest.mark.parametrize('changes', SHAPES)
def test_the_matrix_of_rows_and_probe_rows(changes, layers, monkeypatch):
    monkeypatch.setattr(influence, 'MATRIX_BLOCK', 700)          # several slices of every layer
    model = tiny(**changes)
    batch, probe = batches(1, rows=4, length=9, seed=7)[0], batches(1, rows=3, length=6, seed=8)[0]
    found = influence.row_matrix(model, batch, probe, layers)
    sides = [row_gradients(model, rows, layers) for rows in (batch, probe)]
    expected = torch.tensor([[inner(g, other) for other in sides[1]] for g in sides[0]], dtype=torch.float64)
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


def test_a_disjoint_sample_of_the_probe_has_influence_one():
    """Within three standard errors, in all but a few of many draws, and without bias."""
    model, z, r = tiny(), [], []

    def text(n, seed):                       # tokens of unequal frequency: something to learn
        generator = torch.Generator().manual_seed(seed)
        ids = torch.multinomial(1 / torch.arange(1.0, 32.0), n * 4 * 8, replacement=True, generator=generator).view(n, 4, 8)
        return [(rows[:, :-1], rows[:, 1:], None) for rows in ids]
    for seed in range(24):
        direction = influence.probe_direction(model, {'x': text(24, seed)})
        value, se, _ = influence.group_influence(model, {'copy': text(8, 1000 + seed)}, direction)
        r.append(value['copy'])
        z.append((value['copy'] - 1) / se['copy'])
    assert np.mean(np.abs(z) < 3) >= 0.9 and abs(np.mean(r) - 1) < 3 * np.std(r) / 24**0.5, (z, r)


def test_a_tied_table_needs_its_cross_term():
    """The norm of a tied table is not the sum of its two parts' norms: leaving the cross term out would show."""
    model, untied = tiny(), tiny(tie_embeddings=False)
    untied.load_state_dict({**model.state_dict(), 'lm_head.weight': model.embed.weight})
    batch = batches(1, rows=3, length=9)[0]
    tied, apart = influence.row_sqnorms(model, batch, 'all'), influence.row_sqnorms(untied, batch, 'all')
    assert (tied['embed'] - apart['embed'] - apart['lm_head']).abs().min() > 1e-3 * tied['embed'].min()
    assert {n: v for n, v in tied.items() if n != 'embed'}.keys() == {n: v for n, v in apart.items() if n not in ('embed', 'lm_head')}.keys()


@pytest.mark.parametrize('way', ['autocast', 'checkpointing', 'compile'])
def test_rows_under_the_ways_of_training(way):
    """Under activation checkpointing and compiled blocks exact; under bf16 autocast the same order of rows."""
    model = tiny(qk_norm=True, tie_embeddings=False)
    batch = batches(1, rows=24, length=12, seed=7)[0]
    direction = influence.probe_direction(model, {'x': twice(batches(2, rows=8, seed=1))}, 'all')
    rows, norms = influence.row_influence(model, batch, direction)[0], influence.ghost_sqnorm(model, batch, 'all')
    if way == 'autocast':
        model = model.float()
        direction.v = {n: v.float() for n, v in direction.v.items()}
        with torch.autocast('cpu', torch.bfloat16):
            again, norms_again = influence.row_influence(model, batch, direction)[0], influence.ghost_sqnorm(model, batch, 'all')
        for exact, found in ((rows, again), (norms, norms_again)):
            assert np.corrcoef(exact.argsort().argsort(), found.argsort().argsort())[0, 1] >= 0.99
            assert (found - exact).abs().max() < 0.03 * exact.abs().max()
        return
    for block in model.blocks:
        if way == 'compile':
            block.compile(backend='eager')
        else:
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
    model.loss(batch[0], batch[1])                             # compiled before the hooks are there
    assert (influence.row_influence(model, batch, direction)[0] - rows).abs().max() < 1e-12 * rows.abs().max()
    assert (influence.ghost_sqnorm(model, batch, 'all') - norms).abs().max() < 1e-12 * norms.max()


@pytest.mark.parametrize('changes, layers', [(SHAPES[0], 'all'), (SHAPES[1], 'embedding+head'), (SHAPES[2], 'last'), (SHAPES[3], 'all')])
def test_datainf_equals_dense_inverses(changes, layers):
    model = tiny(**{**changes, 'n_embd': 8, 'ffn_dim': 12, 'vocab_size': 29})
    parts = batches(2, rows=3, length=9, seed=7, vocab_size=29)
    direction = influence.probe_direction(model, {'x': twice(batches(2, seed=1, vocab_size=29))}, layers)
    padding = tuple(torch.full_like(t, -1) if i == 1 else t for i, t in enumerate(parts[1]))
    bent = influence.datainf(model, [*parts, padding], direction)             # rows without a counted token are none
    gradients = [{n: t / (targets >= 0).sum() for n, t in g.items()} for batch in parts
                 for g, targets in zip(row_gradients(model, batch, layers), batch[1])]
    for module in {n.rpartition('.')[0] for n in direction.v}:
        names = [n for n in direction.v if n.rpartition('.')[0] == module]

        def flat(by_name):
            return torch.cat([by_name[n].flatten() for n in names])
        g, v = torch.stack([flat(by_name) for by_name in gradients]), flat(direction.v)
        lam = 0.1 * (g**2).sum(1).mean() / g.shape[1]
        dense = torch.stack([torch.linalg.solve(lam * torch.eye(len(v), dtype=torch.float64) + torch.outer(x, x), v) for x in g]).mean(0)
        assert (flat(bent.v) - dense).norm() < 1e-8 * dense.norm(), module
    probe = twice(batches(2, seed=1, vocab_size=29))
    assert influence.group_influence(model, {'a': probe}, influence.unit(model, bent, probe))[0]['a'] == pytest.approx(1, abs=1e-9)
    assert (influence.datainf(model, parts, direction, lam=1.0).v[names[0]] - bent.v[names[0]]).norm() > 0


@pytest.mark.parametrize('layers', ['all', 'last'])
def test_scaling_by_adam(layers):
    """Inner products with every gradient divided by the root of its second moment; the embedding table counts for nothing."""
    model = tiny(qk_norm=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    for batch in batches(3, seed=9):
        model.loss(batch[0], batch[1])[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    probe, source = twice(batches(2, seed=1)), batches(4, seed=5)
    direction = influence.probe_direction(model, {'x': probe}, layers, scale=influence.adam_scale(model, [optimizer]))
    assert 'embed.weight' not in direction.v and len(direction.v) > 5
    root = {n: optimizer.state[p]['exp_avg_sq'].sqrt() for n, p in model.named_parameters()}

    def scaled(a, b):
        return sum((a[n] * b[n] / (root[n] + 0.01 * root[n].mean())).sum().item() for n in direction.v)
    g, mean = brute_force(model, source, layers), brute_force(model, probe, layers)
    parts = [brute_force(model, [batch], layers) for batch in probe]
    n = [(batch[1] >= 0).sum().item() for batch in probe]
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    den = sum(n[i] * n[j] * scaled(parts[i], parts[j]) for i, j in pairs) / sum(n[i] * n[j] for i, j in pairs)
    assert influence.group_influence(model, {'a': source}, direction)[0]['a'] == pytest.approx(scaled(g, mean) / den, rel=1e-9)
    with pytest.raises(BadInput, match='second moments'):
        influence.adam_scale(model, [])
    with pytest.raises(BadInput, match='scaling by Adam leaves in'):
        influence.probe_direction(model, {'x': probe}, 'embedding+head', scale=influence.adam_scale(model, [optimizer]))


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the most elements that a new tensor has, views of existing ones aside."""
    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and not t._is_view():
                self.n = max(self.n, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_rows_cost_one_forward_and_backward():
    """By FLOPs, with all layers, tied and untied; and no tensor of rows x outputs x inputs of a layer ever is."""
    from torch.utils.flop_counter import FlopCounterMode
    for tied in (True, False):
        model = tiny(vocab_size=97, n_embd=64, ffn_dim=96, tie_embeddings=tied).float()
        batch = batches(1, rows=16, length=24, vocab_size=97)[0]
        directions = {layers: influence.probe_direction(model, {'x': [batch, batch]}, layers) for layers in ('all', 'last')}

        def flops(work):
            with FlopCounterMode(display=False) as counter:
                work()
            model.zero_grad(set_to_none=True)
            return counter.get_total_flops()
        plain = flops(lambda: model.loss(batch[0], batch[1], doc_ids=batch[2])[0].backward())
        cost = {(what, layers): flops(work) / plain for layers in directions for what, work in (
            ('rows', lambda: influence.row_influence(model, batch, directions[layers])),
            ('norms', lambda: influence.ghost_sqnorm(model, batch, layers)),
            ('sources', lambda: influence.source_products(model, [batch], [directions[layers]])))}
        print(cost)
        assert cost['rows', 'all'] <= 1.02 and cost['norms', 'all'] <= 1.05 and cost['sources', 'all'] == 1
        assert cost['rows', 'last'] <= 0.75 and cost['norms', 'last'] <= 0.75 and cost['sources', 'last'] <= 0.75
        for work in (lambda: influence.row_influence(model, batch, directions['all']), lambda: influence.ghost_sqnorm(model, batch, 'all')):
            with Largest() as largest:
                work()
            assert largest.n < 16 * 64 * 64               # the smallest square layer's; activations have 16 * 24 * 96 at most


def test_a_gradient_is_dropped_as_soon_as_it_is_used():
    """While sources and a probe are measured no more than one parameter has a gradient at a time."""
    model, seen = tiny(), []

    def use(name, gradient):
        seen.append(sum(p.grad is not None for p in model.parameters()))
    list(influence.stream_gradients(model, batches(2), 'all', use))
    assert len(seen) == 2 * len(list(model.parameters())) and max(seen) == 0


def test_sources_in_another_order_give_the_same():
    model = tiny()
    direction = influence.probe_direction(model, {'x': twice(batches(2, seed=1))})
    sources = {name: batches(4, seed=i) for i, name in enumerate('abcd')}
    r, se, _ = influence.group_influence(model, sources, direction)
    back = influence.group_influence(model, dict(reversed(sources.items())), direction)
    assert r == back[0] and se == back[1]


def test_the_standard_error_is_that_of_many_samples():
    """r over samples of the same kind scatters as its standard error says."""
    model = tiny()
    direction = influence.probe_direction(model, {'x': twice(batches(8, seed=1))})
    found = [influence.group_influence(model, {'a': batches(8, seed=100 + i)}, direction) for i in range(60)]
    values, errors = [f[0]['a'] for f in found], [f[1]['a'] for f in found]
    assert np.std(values, ddof=1) == pytest.approx(np.mean(errors), rel=0.35)


def test_a_probe_whose_halves_disagree_and_other_mistakes():
    model = tiny()
    with pytest.raises(RunFault, match="batches of the probe set 'x' disagree"):
        for seed in range(200):              # random text: sooner or later two rows point apart
            influence.probe_direction(model, {'x': batches(2, rows=1, seed=seed)})
    with pytest.raises(BadInput, match='fewer than two batches'):
        influence.probe_direction(model, {'x': batches(1)})
    with pytest.raises(BadInput, match='must be one of last, all, first'):
        influence.select(model, 'middle')
    direction = influence.probe_direction(model, {'x': twice(batches(2, seed=1))})
    with pytest.raises(BadInput, match='at least two'):
        influence.group_influence(model, {'a': batches(1)}, direction)


TWO_RANKS = """
import json
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from lib.device import leave_ranks
from tests.test_influence import sharded_results, tiny
dist.init_process_group('gloo')
rank = dist.get_rank()

def shard(model):
    mesh = init_device_mesh('cpu', (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, 'loss')

def gather(rows):                   # every second row of the batch
    whole = torch.zeros(2 * len(rows), *rows.shape[1:], dtype=rows.dtype)
    whole[rank::2] = rows
    dist.all_reduce(whole)
    return whole

result = sharded_results(shard, lambda parts: [tuple(t[rank::2] for t in batch) for batch in parts], gather)
if rank == 0:
    print('RESULT' + json.dumps(result))
leave_ranks(0)
"""


def sharded_results(shard, mine, gather):
    """Everything that must not depend on the number of ranks: sources, rows, norms, and micro-batches weighed by self-influence."""
    result = {}
    for layers, changes in zip(influence.LAYERS, SHAPES):
        model = tiny(**changes)
        optimizer = torch.optim.AdamW(model.parameters())
        shard(model)
        source, batch = mine(batches(4, seed=5)), mine(batches(1, rows=6, seed=6))[0]
        with torch.no_grad():
            model.loss(batch[0], batch[1])                      # an evaluation: FSDP2 leaves the root's parameters whole after it
        direction = influence.probe_direction(model, dict(x=mine(twice(batches(2, seed=1)))), layers)
        result[f'{layers} sources'] = influence.group_influence(model, dict(a=source), direction)
        result[f'{layers} rows'] = gather(influence.row_influence(model, batch, direction)[0]).tolist()
        result[f'{layers} norms'] = gather(influence.ghost_sqnorm(model, batch, layers)).tolist()
        matrix = influence.row_matrix(model, batch, batch, layers)
        result[f'{layers} matrix'] = gather(matrix if len(matrix) == 3 else torch.stack([matrix[i, i % 2::2] for i in range(6)])).tolist()
        for mode in ('store', 'stream'):
            scored = layers if layers != 'last' else 'first'
            micro = presence.MicroBatches(model, scored, mode, 4, dict(n=4, layers=scored, sigma=1e-3))
            micro.begin(1.0)
            parts, optimizer = batches(4, rows=4, seed=8), torch.optim.AdamW(model.parameters(), lr=1e-2)
            n = [(targets >= 0).sum().item() for _, targets, _ in parts]
            for batch_i, tokens in zip(mine(parts), n):
                scale = (2 if torch.distributed.is_initialized() else 1) / sum(n)
                (model.loss(batch_i[0], batch_i[1], doc_ids=batch_i[2])[0] * scale).backward()
                micro.add(tokens / sum(n))
            result[f'{layers} {mode}'] = micro.finish()
            result[f'{layers} {mode} norm'] = sum(influence.whole((p.grad**2).sum()).item() for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        if layers != 'embedding+head':
            with torch.no_grad():
                model.loss(batch[0], batch[1])
            scaled = influence.probe_direction(model, dict(x=mine(twice(batches(2, seed=1)))), layers, scale=influence.adam_scale(model, [optimizer]))
            result[f'{layers} adam'] = influence.group_influence(model, dict(a=source), scaled)
    return result


def test_two_ranks_equal_one(tmp_path):
    (tmp_path / 'two.py').write_text(TWO_RANKS)
    done = run_ranks([str(tmp_path / 'two.py')], 2)
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout.split('RESULT')[1].splitlines()[0])
    expected = json.loads(json.dumps(sharded_results(lambda model: None, lambda parts: parts, lambda rows: rows)))
    assert found.keys() == expected.keys() and len(found) == 35

    def same(a, b, where):
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            for key in a:
                same(a[key], b[key], f'{where} {key}')
        elif isinstance(a, list):
            for x, y in zip(a, b, strict=True):
                same(x, y, where)
        else:
            assert a == pytest.approx(b, rel=1e-9), where
    same(found, expected, '')


# -- the rule ----------------------------------------------------------------------------------------------------------

def step(weights, r, se=0.01, state=None, eta=0.3, low=0.02, high=0.6):
    high = dict.fromkeys(weights, high) if isinstance(high, float) else high
    return rules.update_influence(weights, r, dict.fromkeys(r, se), state or {}, eta, low, high)


def test_the_rule_moves_towards_what_helps():
    weights = dict(a=0.25, b=0.25, c=0.25, d=0.25)
    new, state, log = step(weights, dict(a=1.0, b=0.0, c=-0.5, d=0.5))
    raw = {n: math.exp(0.3 * x) for n, x in dict(a=1.0, b=0.0, c=-0.5, d=0.5).items()}
    assert new == pytest.approx({n: x / sum(raw.values()) for n, x in raw.items()}, rel=1e-12) and log['kept'] == ''
    assert sum(new.values()) == pytest.approx(1, abs=1e-15)
    again, _, _ = step(new, dict(a=-1.0, b=0.0, c=-0.5, d=0.5), state=state)           # the average of 1 and -1 is 0
    assert again['a'] / again['b'] == pytest.approx(new['a'] / new['b'])


def test_nothing_moves_within_noise_or_when_all_harm():
    weights = dict(a=0.7, b=0.2, c=0.1)                 # beyond the bounds: they stay all the same
    for r, se, reason in ((dict(a=0.01, b=-0.015, c=0.019), 0.01, 'noise'), (dict(a=-0.5, b=-0.6, c=-0.1), 0.01, 'negative')):
        new, _, log = step(weights, r, se)
        assert new is weights and reason in log['kept']


def test_bounds_hold_after_normalisation():
    rng = np.random.default_rng(0)
    for _ in range(500):
        n = int(rng.integers(2, 9))
        weights = dict(enumerate(rng.dirichlet(np.full(n, 0.3))))
        low, high = rng.uniform(0, 1 / n), dict(enumerate(rng.uniform(1 / n, 1, n)))
        new = rules.project(weights, dict.fromkeys(weights, low), high)
        assert sum(new.values()) == pytest.approx(1, abs=1e-12)
        assert all(low - 1e-12 <= new[i] <= high[i] + 1e-12 for i in new)
        free = [i for i in new if low + 1e-9 < new[i] < high[i] - 1e-9 and weights[i] > 1e-9]
        if len(free) > 1:
            assert np.ptp([new[i] / weights[i] for i in free]) < 1e-6 * new[free[0]] / weights[free[0]]
    left = rules.project(dict(a=1.0, b=0.0, c=0.0), dict.fromkeys('abc', 0.1), dict.fromkeys('abc', 0.6))      # a cannot take all
    assert left == pytest.approx(dict(a=0.6, b=0.2, c=0.2))
    capped = rules.project(dict(a=0.5, b=0.5), dict(a=0.1, b=0.1), dict(a=0.2, b=0.3))      # caps that cannot all be kept
    assert capped == pytest.approx(dict(a=0.4, b=0.6))
    with pytest.raises(BadInput, match='leave no room'):
        rules.check_bounds(4, 0.3, 0.6)


def test_weights_in_proportion_to_influence():
    """Equations 5 and 6: the mean over updates, the t-th counting t, negative ones as 0."""
    weights, high = dict(a=0.25, b=0.25, c=0.5), dict(a=1.0, b=1.0, c=1.0)
    new, state, log = rules.update_proportional(weights, dict(a=1.0, b=3.0, c=-2.0), {}, {}, 0.0, high)
    assert new == pytest.approx(dict(a=0.25, b=0.75, c=0.0)) and not log['kept']
    new, state, _ = rules.update_proportional(new, dict(a=2.5, b=-0.5, c=-0.5), {}, state, 0.0, high)
    assert new == pytest.approx(dict(a=0.75, b=0.25, c=0.0))                            # (1 + 2 * 2.5, 3 - 2 * 0.5, negative) / 8
    assert rules.update_proportional(new, dict(a=0.0, b=0.0, c=0.0), {}, state, 0.1, high)[0] == pytest.approx(dict(a=0.675, b=0.225, c=0.1))
    kept, _, log = rules.update_proportional(weights, dict(a=-1.0, b=-3.0, c=-2.0), {}, {}, 0.0, high)
    assert kept is weights and 'no source' in log['kept']


def test_epoch_caps():
    caps = rules.epoch_caps(0.6, 4, dict(a=300, b=0, c=500), dict(a=100, b=1000, c=100), 1000)
    assert caps == dict(a=0.1, b=0.6, c=0.0)
    assert rules.epoch_caps(0.6, None, dict(a=1), dict(a=1), 10) == dict(a=0.6)


# -- in a training run -------------------------------------------------------------------------------------------------

@pytest.fixture
def probed_data(tmp_path):
    """Two sources that the model can learn and one of random tokens; the probe set is text of the kind of the first."""
    data_dir = tmp_path / 'data'
    make_source(data_dir, 'a', 20_000)
    make_source(data_dir, 'b', 20_000)
    rng = np.random.default_rng(9)
    for split, n in (('train', 20_000), ('val', 2_000)):
        write_shard(data_dir / 'random' / split / '0.bin', rng.integers(0, 64, n))
    make_source(tmp_path / 'other', 'a', 6_000, seed=5)
    shutil.copytree(tmp_path / 'other' / 'a' / 'train', data_dir / 'probe' / 'kind' / 'probe')
    return data_dir


KNOBS = dict(sources={'a': 1.0, 'b': 1.0, 'random': 1.0}, mixture='influence', probe={'kind': 1.0}, mixture_interval=8, mixture_warmup=16,
             batch_size=4, total_batch_tokens=256, probe_rows=32, influence_rows=16, max_steps=64, eval_interval=64, save_interval=20)


def test_weights_move_and_reach_the_batches(probed_data, tmp_path):
    """Text of the probe's kind at least doubles its share of random tokens, and the rows drawn follow the weights at once."""
    by_step = train(tmp_path / 'run', probed_data, **KNOBS)
    first, last = by_step[15], by_step[63]
    assert [first[f'mixture/weight_{n}'] for n in 'ab'] == pytest.approx([1 / 3, 1 / 3])
    assert last['mixture/weight_a'] > 0.5 and last['mixture/weight_random'] < 0.6 / 3
    assert by_step[16]['mixture/influence_a'] > 2 * by_step[16]['mixture/influence_se_a'] > 0
    per_row = by_step[16]['mixture/extra_flops'] / (32 + 3 * 16)            # probe rows and sources' rows; a forward is a third of what training takes
    trained = 16 * flops_per_token(ModelConfig(**{key: value for key, value in TINY.items() if key in ModelConfig.__dataclass_fields__}), 16)
    assert trained / 3 < per_row < trained
    assert by_step[56]['mixture/extra_flops'] == pytest.approx(6 * by_step[16]['mixture/extra_flops'])
    for at in range(16, 64):                       # 16 rows a step: at most a row or two beside the weight in force
        weight = [by_step[at][f'mixture/weight_{n}'] for n in ('a', 'b', 'random')]
        drawn = [by_step[at][f'mixture/drawn_{n}'] for n in ('a', 'b', 'random')]
        assert np.abs(np.subtract(drawn, weight)).max() < 2.01 / 16
    for at in range(16, 64, 8):
        assert {n: by_step[at][f'mixture/weight_{n}'] for n in 'ab'} == pytest.approx({n: by_step[at][f'mixture/asked_{n}'] for n in 'ab'}, abs=1e-6)
    fixed = train(tmp_path / 'fixed', probed_data, **{**KNOBS, 'mixture': 'fixed'})
    still = train(tmp_path / 'still', probed_data, **{**KNOBS, 'mixture_eta': 0.0, 'mixture_min': 0.0, 'mixture_max': 1.0, 'max_epochs': None})
    assert [fixed[s]['train/loss'] for s in range(64)] == [still[s]['train/loss'] for s in range(64)]      # measuring changes nothing
    assert [by_step[s]['train/loss'] for s in range(16)] == [fixed[s]['train/loss'] for s in range(16)]
    assert by_step[63]['train/loss'] != fixed[63]['train/loss']


def test_a_killed_run_ends_with_the_same_weights(probed_data, tmp_path):
    whole = train(tmp_path / 'whole', probed_data, **KNOBS)
    train(tmp_path / 'run', probed_data, **{**KNOBS, 'max_steps': 40, 'schedule': 'constant', 'max_epochs': None})
    constant = train(tmp_path / 'constant', probed_data, **{**KNOBS, 'schedule': 'constant', 'max_epochs': None})
    resumed = train(tmp_path / 'run', probed_data, **{**KNOBS, 'schedule': 'constant', 'max_epochs': None, 'resume': True})
    for at in range(40, 64):
        assert {k: v for k, v in resumed[at].items() if k.startswith(('mixture', 'train/loss'))} == {
            k: v for k, v in constant[at].items() if k.startswith(('mixture', 'train/loss'))}
    assert whole[63]['train/loss'] != constant[63]['train/loss']


KILLED_WHILE_MEASURING = """
import os, runpy, signal, sys
from methods import reweight
def killed(model, loader, sources, probes, config, state, step, *rest, update=reweight.update):
    state, log = update(model, loader, sources, probes, config, state, step, *rest)
    if step == 32:                              # measured, and the new weights set: nothing of it is saved yet
        os.kill(os.getpid(), signal.SIGKILL)
    return state, log
reweight.update = killed
sys.argv = ['train.py'] + sys.argv[1:]
runpy.run_path('train.py', run_name='__main__')
"""


def test_a_run_killed_within_an_update_resumes_to_the_same_weights(probed_data, tmp_path):
    whole = train(tmp_path / 'whole', probed_data, **KNOBS)
    (tmp_path / 'killed.py').write_text(KILLED_WHILE_MEASURING)
    done = run_ranks([str(tmp_path / 'killed.py'), *train_command(tmp_path / 'run', probed_data, **KNOBS)[2:]], 1)
    assert done.returncode == -signal.SIGKILL, done.stdout
    resumed = train(tmp_path / 'run', probed_data, **KNOBS, resume=True)
    for at in range(20, 64):
        assert {k: v for k, v in resumed[at].items() if k.startswith(('mixture', 'train/loss'))} == {
            k: v for k, v in whole[at].items() if k.startswith(('mixture', 'train/loss'))}


def test_two_ranks_reweight_as_one(probed_data, tmp_path):
    knobs = {**KNOBS, 'max_steps': 34, 'eval_interval': 8}      # an evaluation before every measurement
    one = train(tmp_path / 'one', probed_data, **knobs)
    two = train(tmp_path / 'two', probed_data, ranks=2, **{**knobs, 'batch_size': 2})
    for at in (16, 24, 32):
        for name in ('a', 'b', 'random'):
            assert two[at][f'mixture/weight_{name}'] == pytest.approx(one[at][f'mixture/weight_{name}'], rel=0.05)
    assert one[16]['mixture/influence_a'] == pytest.approx(two[16]['mixture/influence_a'], rel=1e-3)


def test_no_source_is_read_more_often_than_max_epochs(probed_data, tmp_path):
    """1,249 windows each, 16 rows a step: the caps of 0.2 epochs bind, at last all of them; a resumed run may switch a source on."""
    by_step = train(tmp_path / 'run', probed_data, **{**KNOBS, 'max_epochs': 0.2, 'mixture_min': 0.0, 'max_steps': 40})
    assert max(by_step[39][f'mixture/epochs_{n}'] for n in ('a', 'b', 'random')) < 0.23
    beyond = train(tmp_path / 'beyond', probed_data, **{**KNOBS, 'max_epochs': 0.1})       # less than all the run reads: no weights are left to give
    assert beyond[63]['mixture/epochs_a'] > 0.1 and beyond[40]['mixture/asked_a'] == pytest.approx(beyond[56]['mixture/asked_a'])
    switched = train(tmp_path / 'run', probed_data, resume=True, **{**KNOBS, 'mixture_min': 0.0, 'sources': {'a': 1.0, 'b': 0.0, 'random': 1.0}})
    assert switched[63]['mixture/drawn_b'] == 0


@pytest.mark.parametrize('changes', [dict(influence_rule='proportional', mixture_min=0.0, mixture_max=1.0), dict(influence_scaling='adam', influence_layers='all'),
                                     dict(influence_scaling='datainf'), dict(influence_layers='embedding+head'), dict(influence_layers='first')])
def test_other_ways_to_measure_and_to_weigh_move_the_weights(probed_data, tmp_path, changes):
    by_step = train(tmp_path / 'run', probed_data, **{**KNOBS, 'max_steps': 50, **changes})
    assert by_step[49]['mixture/weight_a'] > 0.4 and by_step[49]['mixture/weight_random'] < 0.3
    assert by_step[48]['mixture/influence_a'] > by_step[48]['mixture/influence_random']


@pytest.mark.parametrize('changes, message', [
    (dict(influence_scaling='adagrad'), 'none, adam, datainf'), (dict(influence_units='both'), 'loss, own'), (dict(influence_scaling='adam', optimizer='muon'), "AdamW's moments"),
    (dict(influence_rule='greedy'), 'step, proportional'), (dict(select='all'), 'none, online, scores'), (dict(select='scores'), 'holds no scores'),
    (dict(select='online', mixture='fixed', probe_rows=300, mixture_interval=64), 'half as many again'), (dict(select_keep=0.0), 'select_keep'),
    (dict(max_epochs=0.0), 'max_epochs = 0.0'), (dict(seed=-1), 'seed = -1'), (dict(probe={'a/kind': 1.0}), 'without a /'),
    (dict(probe={}), 'needs probe sets'), (dict(probe={'nothing': 1.0}), "probe/nothing does not exist"), (dict(influence_layers='middle'), 'last, all, first'),
    (dict(mixture_interval=2), 'more than the 32 that are trained on'), (dict(mixture_min=0.4), 'leave no room'), (dict(probe_rows=500, mixture_interval=64), 'fewer than probe_rows'),
    (dict(influence_rows=2), 'at least 4'), (dict(probe={'kind': -1.0}), 'not be negative')])
def test_bad_settings(probed_data, tmp_path, changes, message):
    with pytest.raises(BadInput, match=message):
        train(tmp_path / 'run', probed_data, **{**KNOBS, **changes})
    assert not (tmp_path / 'run').exists()


def test_every_rank_needs_rows():
    source = Source.__new__(Source)
    source.name, source.n_windows = 'a', 1000
    config = dict(mixture='influence', select='none', influence_scaling='none', influence_units='loss', influence_rule='step', influence_layers='last', optimizer='adamw',
                  probe={'a': 1.0}, influence_rows=16, probe_rows=16, mixture_min=0.0, mixture_max=1.0,
                  max_epochs=4.0)
    assert reweight.check(config, [source], [source], 1000, world_size=8)
    with pytest.raises(BadInput, match='at least 32 on 16 rank'):
        reweight.check(config, [source], [source], 1000, world_size=16)
