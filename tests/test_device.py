"""The choice of a device. Apple's GPUs (mps) are not here, so torch is told that there is one."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configurator import BadInput
from lib import device as devices
from lib import parallel
from tests.conftest import run_here, train, train_command

CPU = torch.device('cpu')
MPS = torch.device('mps')


@pytest.fixture
def apple(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    monkeypatch.delenv('RANK', raising=False)


def test_auto_takes_the_gpu_that_is_there(apple, monkeypatch):
    assert devices.start_ranks('auto', unfit=None) == (0, 1, MPS)
    assert devices.start_ranks('mps', unfit=None) == (0, 1, MPS)
    assert devices.start_ranks('cpu', unfit=None) == (0, 1, CPU)
    assert devices.start_ranks('auto', unfit='reason') == (0, 1, CPU)
    assert devices.start_ranks('auto') == (0, 1, CPU)       # most commands sum in fp64
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert devices.pick_kind('auto', None) == 'cuda'
    assert devices.pick_kind('mps', None) == 'mps'


def test_what_apples_gpus_cannot_do_is_refused_by_name(apple, monkeypatch, tmp_path, tiny_data):
    for words, knobs in {
            "mixture = 'doge' needs sums in fp64": dict(mixture='doge'),
            "presence = 'stream' needs sums in fp64": dict(presence='stream'),
            "n_expert = 4 needs sums in fp64": dict(
                n_expert=4, n_expert_active=2, expert_ffn_dim=8)}.items():
        with pytest.raises(BadInput, match=f"device = 'mps', but {words}.*Use device=cpu"):
            run_here(train_command(tmp_path / 'run', tiny_data, device='mps', **knobs))
    with pytest.raises(BadInput, match="'mps', but this command needs sums in fp64"):
        devices.start_ranks('mps')
    monkeypatch.setattr(torch.backends.mps, 'is_macos_or_newer', lambda *version: False)
    with pytest.raises(BadInput, match='needs macOS 14'):
        devices.pick_dtype('bfloat16', MPS)
    assert devices.pick_dtype('auto', MPS)[0] == torch.float32
    run = SimpleNamespace(device=MPS, world_size=1)
    assert parallel.choose_compile(None, 1e20, None, run)[0] is False
    assert parallel.choose_compile(True, 1e20, None, run)[0] is True
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', '1')
    with pytest.raises(BadInput, match='one process only'):
        devices.start_ranks('mps', unfit=None)
    assert devices.start_ranks('auto', join=False, unfit=None)[2] == CPU
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    with pytest.raises(BadInput, match='finds no Apple GPU'):
        devices.start_ranks('mps', unfit=None)


def test_a_run_that_must_stay_on_the_cpu_says_why(apple, tmp_path, tiny_data, capsys):
    train(tmp_path / 'run', tiny_data, max_steps=2, device='auto', mixture='doge')
    assert "not Apple's GPU (mixture = 'doge' needs sums in fp64" in capsys.readouterr().out


class NoDoubles(TorchDispatchMode):
    """Fails where an operator returns a tensor in fp64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                assert tensor.dtype != torch.float64, function
        return found


@pytest.mark.parametrize('knobs', [
    dict(activation_checkpointing='full', qk_norm=True),
    dict(optimizer='muon', mixture='skillit', mixture_interval=4),
    dict(mixture='aioli', mixture_interval=6, aioli_sweeps=1, aioli_steps=1)], ids=str)
def test_a_run_needs_no_fp64(tmp_path, tiny_data, monkeypatch, knobs):
    # Apple's GPUs have none. The run is on the CPU, told to sum as on them.
    graph = tmp_path / 'graph.npy'
    np.save(graph, np.eye(2))
    if 'skillit' in knobs.values():
        knobs = dict(knobs, skillit_graph=graph)
    expected = train(tmp_path / 'fp64', tiny_data, **knobs)
    for where in ('lib.device', 'lib.validate'):
        monkeypatch.setattr(f'{where}.sum_dtype', lambda device: torch.float32)
    with NoDoubles():
        m = train(tmp_path / 'fp32', tiny_data, **knobs)
    for step in (0, 11):
        assert m[step]['train/loss'] == pytest.approx(expected[step]['train/loss'], rel=1e-4)
    assert m[12]['val/loss'] == pytest.approx(expected[12]['val/loss'], rel=1e-4)


def test_sums_are_in_fp64_where_it_exists():
    assert devices.sum_dtype(CPU) == torch.float64
    assert devices.sum_dtype(MPS) == torch.float32
    with pytest.raises(AssertionError), NoDoubles():
        torch.ones(2).double()


def test_the_compiler_is_warmed_for_gpus_only(monkeypatch):
    calls = []
    monkeypatch.setattr(
        'torch._inductor.async_compile.maybe_warm_pool', lambda: calls.append(True))
    parallel.warm_compiler(CPU)
    assert not calls
    parallel.warm_compiler(torch.device('cuda'))
    assert calls
