"""Influence against brute force in float64, over two ranks, and its rule; then in a training run: the weights move."""
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, make_source, run, train, write_shard

import influence
import mixtures
from configurator import BadInput, RunFault
from data import Source
from model import GPT, ModelConfig, init_weights, linear_cross_entropy

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


def brute_force(model, parts, layers):
    """Gradient of the mean token loss by plain autograd over full logits, row by row."""
    names = [n for n in influence.select(model, layers)[0]]
    total, tokens = {n: 0.0 for n in names}, 0
    for inputs, targets, doc_ids in parts:
        for i in range(len(inputs)):
            model.zero_grad()
            logits = model(inputs[i:i + 1], doc_ids[i:i + 1])[0] @ model.output_weight.T
            torch.nn.functional.cross_entropy(logits, targets[i], ignore_index=-1, reduction='sum').backward()
            for n, p in model.named_parameters():
                if n in total:
                    total[n] = total[n] + p.grad.clone()
            tokens += (targets[i] >= 0).sum().item()
    model.zero_grad()
    return {n: g / tokens for n, g in total.items()}


def inner(a, b):
    return sum((a[n] * b[n]).sum().item() for n in a)


@pytest.mark.parametrize('layers', influence.LAYERS)
@pytest.mark.parametrize('changes', SHAPES)
def test_influence_equals_row_by_row_gradients(changes, layers):
    model = tiny(**changes)
    probe = {'code': (batches(2, seed=1), batches(2, seed=2)), 'math': (batches(3, seed=3), batches(1, seed=4))}
    probe['code'][1][:] = probe['code'][0]                       # halves that agree
    probe['math'][1][:] = probe['math'][0]
    sources = {'a': batches(4, seed=5), 'b': batches(5, rows=3, seed=6), 'same': probe['math'][0]}
    direction = influence.probe_direction(model, probe, layers, {'code': 1.0, 'math': 3.0})
    r, se, loss = influence.group_influence(model, sources, direction)
    halves = {d: [brute_force(model, half, layers) for half in probe[d]] for d in probe}
    for name, parts in sources.items():
        g = brute_force(model, parts, layers)
        expected = sum(share * inner(g, {n: (a[n] + b[n]) / 2 for n in a}) / inner(a, b)
                       for share, (a, b) in ((0.25, halves['code']), (0.75, halves['math'])))
        assert r[name] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert se[name] > 0 or name == 'same'
    assert all(p.grad is None for p in model.parameters())
    only = influence.probe_direction(model, {'math': probe['math']}, layers)
    assert influence.group_influence(model, {'same': sources['same']}, only)[0]['same'] == pytest.approx(1, abs=1e-12)
    parts = sources['a']
    mean = sum(linear_cross_entropy(model(i, d).flatten(0, 1), model.output_weight, t.flatten())[0].item() for i, t, d in parts)
    assert loss['a'] == pytest.approx(mean / sum((t >= 0).sum().item() for _, t, _ in parts), rel=1e-12)


@pytest.mark.parametrize('layers', influence.LAYERS)
@pytest.mark.parametrize('changes', SHAPES)
def test_influence_of_rows_equals_their_gradients(changes, layers):
    model = tiny(**changes)
    direction = influence.probe_direction(model, {'x': (batches(2, seed=1), batches(2, seed=1))}, layers)
    parts = batches(3, rows=4, length=9, seed=7)
    found = [influence.row_influence(model, batch, direction) for batch in parts]
    for (inputs, targets, doc_ids), rows in zip(parts, found):
        for i in range(len(inputs)):
            one = [(inputs[i:i + 1], targets[i:i + 1], doc_ids[i:i + 1])]
            expected = inner(brute_force(model, one, layers), direction.v) * (targets[i] >= 0).sum().item()
            assert rows[i].item() == pytest.approx(expected, rel=1e-10, abs=1e-13)
        positions = influence.row_influence(model, (inputs, targets, doc_ids), direction, per_position=True)
        assert positions.shape == inputs.shape and (positions.sum(1) - rows).abs().max() < 1e-12 * rows.abs().max() + 1e-14
    tokens = sum((t >= 0).sum().item() for _, t, _ in parts)
    r = influence.group_influence(model, {'a': parts}, direction)[0]['a']
    assert sum(rows.sum().item() for rows in found) / tokens == pytest.approx(r, rel=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_influence_of_rows_costs_one_forward_and_backward():
    from torch.utils.flop_counter import FlopCounterMode
    model = tiny(vocab_size=97, n_embd=32, ffn_dim=64, n_head=4).float()
    batch = batches(1, rows=4, length=32, vocab_size=97)[0]
    direction = influence.probe_direction(model, {'x': ([batch], [batch])}, 'all')
    with FlopCounterMode(display=False) as plain:
        model.loss(batch[0], batch[1], doc_ids=batch[2])[0].backward()
    model.zero_grad(set_to_none=True)
    with FlopCounterMode(display=False) as gated:
        influence.row_influence(model, batch, direction)
    assert gated.get_total_flops() <= 1.05 * plain.get_total_flops()
    last = influence.probe_direction(model, {'x': ([batch], [batch])}, 'last')
    with FlopCounterMode(display=False) as cheap:
        influence.row_influence(model, batch, last)
    print(gated.get_total_flops() / plain.get_total_flops(), cheap.get_total_flops() / plain.get_total_flops())
    assert cheap.get_total_flops() <= 0.75 * plain.get_total_flops()


def test_sources_in_another_order_give_the_same():
    model = tiny()
    direction = influence.probe_direction(model, {'x': (batches(2, seed=1), batches(2, seed=1))})
    sources = {name: batches(4, seed=i) for i, name in enumerate('abcd')}
    r, se, _ = influence.group_influence(model, sources, direction)
    back = influence.group_influence(model, dict(reversed(sources.items())), direction)
    assert r == back[0] and se == back[1]


def test_the_standard_error_is_that_of_many_samples():
    """r over samples of the same kind scatters as its standard error says."""
    model = tiny()
    direction = influence.probe_direction(model, {'x': (batches(8, seed=1), batches(8, seed=1))})
    found = [influence.group_influence(model, {'a': batches(8, seed=100 + i)}, direction) for i in range(60)]
    values, errors = [f[0]['a'] for f in found], [f[1]['a'] for f in found]
    assert np.std(values, ddof=1) == pytest.approx(np.mean(errors), rel=0.35)


def test_a_probe_whose_halves_disagree_and_other_mistakes():
    model = tiny()
    inputs, targets, doc_ids = batches(1, seed=1)[0]
    with pytest.raises(RunFault, match="halves of the probe set 'x' disagree"):
        for seed in range(200):              # random text: sooner or later two rows point apart
            influence.probe_direction(model, {'x': (batches(1, rows=1, seed=seed), batches(1, rows=1, seed=1000 + seed))})
    with pytest.raises(BadInput, match='must be one of last, all, first'):
        influence.select(model, 'middle')
    direction = influence.probe_direction(model, {'x': (batches(2, seed=1), batches(2, seed=1))})
    with pytest.raises(BadInput, match='at least two'):
        influence.group_influence(model, {'a': batches(1)}, direction)


TWO_RANKS = """
import shutil
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
import json
import influence
from common import leave_ranks
from test_influence import batches, tiny
dist.init_process_group('gloo')
rank = dist.get_rank()
result = dict()
for layers in influence.LAYERS:
    model = tiny(qk_norm=True)
    mesh = init_device_mesh('cpu', (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, 'loss')
    mine = lambda parts: [(i[rank::2], t[rank::2], d[rank::2]) for i, t, d in parts]
    direction = influence.probe_direction(model, dict(x=(mine(batches(2, seed=1)), mine(batches(2, seed=1)))), layers)
    result[layers] = influence.group_influence(model, dict(a=mine(batches(4, seed=5)), b=mine(batches(6, seed=6))), direction)
if rank == 0:
    print('RESULT' + json.dumps(result))
leave_ranks(0)
"""


def test_two_ranks_equal_one(tmp_path):
    (tmp_path / 'two.py').write_text(TWO_RANKS.format(root=str(ROOT), tests=str(ROOT / 'tests')))
    done = run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(tmp_path / 'two.py')])
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.split('RESULT')[1].splitlines()[0])
    for layers in influence.LAYERS:
        model = tiny(qk_norm=True)
        direction = influence.probe_direction(model, dict(x=(batches(2, seed=1), batches(2, seed=1))), layers)
        expected = influence.group_influence(model, dict(a=batches(4, seed=5), b=batches(6, seed=6)), direction)
        for ours, theirs in zip(expected, found[layers]):
            assert ours == pytest.approx(theirs, rel=1e-9), layers


# -- the rule ----------------------------------------------------------------------------------------------------------

def step(weights, r, se=0.01, state=None, eta=0.3, low=0.02, high=0.6):
    high = dict.fromkeys(weights, high) if isinstance(high, float) else high
    return mixtures.update_influence(weights, r, dict.fromkeys(r, se), state or {}, eta, low, high)


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
        new = mixtures.project(weights, dict.fromkeys(weights, low), high)
        assert sum(new.values()) == pytest.approx(1, abs=1e-12)
        assert all(low - 1e-12 <= new[i] <= high[i] + 1e-12 for i in new)
        free = [i for i in new if low + 1e-9 < new[i] < high[i] - 1e-9 and weights[i] > 1e-9]
        if len(free) > 1:
            assert np.ptp([new[i] / weights[i] for i in free]) < 1e-6 * new[free[0]] / weights[free[0]]
    capped = mixtures.project(dict(a=0.5, b=0.5), dict(a=0.1, b=0.1), dict(a=0.2, b=0.3))      # caps that cannot all be kept
    assert capped == pytest.approx(dict(a=0.4, b=0.6))
    with pytest.raises(BadInput, match='leave no room'):
        mixtures.check_bounds(4, 0.3, 0.6)


def test_epoch_caps():
    caps = mixtures.epoch_caps(0.6, 4, dict(a=300, b=0, c=500), dict(a=100, b=1000, c=100), 1000)
    assert caps == dict(a=0.1, b=0.6, c=0.0)
    assert mixtures.epoch_caps(0.6, None, dict(a=1), dict(a=1), 10) == dict(a=0.6)


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


def test_two_ranks_reweight_as_one(probed_data, tmp_path):
    one = train(tmp_path / 'one', probed_data, **{**KNOBS, 'max_steps': 34})
    two = train(tmp_path / 'two', probed_data, ranks=2, **{**KNOBS, 'max_steps': 34, 'batch_size': 2})
    for at in (16, 24, 32):
        for name in ('a', 'b', 'random'):
            assert two[at][f'mixture/weight_{name}'] == pytest.approx(one[at][f'mixture/weight_{name}'], rel=0.05)
    assert one[16]['mixture/influence_a'] == pytest.approx(two[16]['mixture/influence_a'], rel=1e-3)


@pytest.mark.parametrize('changes, message', [
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
    influence.check([source], [source], {'a': 1.0}, 'last', 16, 16, 1000, world_size=8)
    with pytest.raises(BadInput, match='at least 32 on 16 rank'):
        influence.check([source], [source], {'a': 1.0}, 'last', 16, 16, 1000, world_size=16)
