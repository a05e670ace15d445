"""Plans against measured memory, counted FLOPs and bytes, and for every row of the table."""

import re
import subprocess
import sys
import time

import pytest
import torch

from configurator import BadInput
from model import GPT, ModelConfig, count_parameters, init_weights
from ops import kernels
from tests.conftest import ROOT, run_here
from tools import plan

KNOBS = dict(batch_size=2, block_size=2048, total_batch_tokens=4_194_304, optimizer='adamw')
KNOBS |= dict(activation_checkpointing='none', reshard_after_forward=None, dp_replicate=1)
KNOBS |= dict(dp_shard=-1, tp=1, ep=1, plan_mfu=0.4, plan_link=None)


def test_planned_memory_is_within_a_tenth_of_the_measured_peak():
    case = 'few tokens'  # the other cases, and several ranks: python tools/bench.py memory
    command = [sys.executable, 'tools/bench.py', 'memory', f'--cases={case}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith(case)]
    numbers = [float(x.replace(',', '')) for x in re.findall(r'[\d,]+\.\d', line)]
    measured, planned = numbers[:2]
    assert measured > 300
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.fixture
def kernels_without_launches(monkeypatch):
    """Layers allocate and save what they do with Triton kernels, and compute nothing."""
    monkeypatch.setattr(kernels, 'mode', 'triton')
    monkeypatch.setattr(kernels, 'INTERPRETED', True)
    monkeypatch.setattr(kernels, 'MISSING', None)
    for name in ('rms_norm_forward', 'rotate_forward', 'swiglu_forward'):
        monkeypatch.setattr(kernels, name, lambda *_: None)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('qk_norm', [False, True])
def test_eager_blocks_with_kernels_save_what_the_plan_says(
        kernels_without_launches, qk_norm, dtype):
    config = ModelConfig(
        vocab_size=64, n_layer=1, n_head=6, n_kv_head=2, n_embd=192, ffn_dim=512, qk_norm=qk_norm)
    model = GPT(config)
    init_weights(model, 0)
    T = 131                                     # no size of a weight is a multiple of this
    x = torch.zeros(2, T, 192, dtype=dtype, requires_grad=True)                     # (B, T, C)
    angles = torch.zeros(T, 32, dtype=dtype)                                        # (T, D)
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.nbytes() % (2 * T) == 0 and storage.nbytes() != angles.nbytes:
            # The tensor is kept, so that no other can have its address.
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with (
        torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    ):
        model.blocks[0](x, angles, angles)
    planned = plan.saved_bytes_per_token(config, dtype.itemsize, fused=True)['none']
    n_bytes = sum(size for size, _ in saved.values())
    assert n_bytes == pytest.approx(2 * T * planned, rel=0.01)


@pytest.mark.parametrize('name', ['mobilellm_140m', 'mobilellm_70b', 'mobilellm_671b'])
def test_states_of_all_ranks_are_16_bytes_per_parameter(name):
    config = plan.load_model_config(name)
    tp = 1 if name == 'mobilellm_140m' else 8
    sizes = dict(dp_replicate=1, dp_shard=4, ep=16 if config.n_expert else 1, tp=tp)
    knobs = {**KNOBS, 'activation_checkpointing': 'full', 'reshard_after_forward': True}
    terms, _ = plan.memory_plan(config, knobs, sizes, 2, True)
    n_ranks = 4 * sizes['ep'] * sizes['tp']
    states = (terms['parameters (fp32)'] + terms['optimizer']) * n_ranks
    assert states == pytest.approx(12 * count_parameters(config)['total'], rel=2e-3)


def test_traffic_is_what_rings_send():
    sizes = dict(vocab_size=1000, n_layer=2, n_head=4, n_kv_head=4, n_embd=64, ffn_dim=128)
    c = ModelConfig(**sizes, tie_embeddings=False)
    n_parameters = count_parameters(c)['total']
    knobs = {**KNOBS, 'block_size': 512, 'reshard_after_forward': True}
    knobs['total_batch_tokens'] = 2 * 512 * 8
    sent = plan.traffic(c, knobs, dict(dp_replicate=1, dp_shard=8, ep=1, tp=1), 2)
    assert sent['fsdp'] == pytest.approx(7 / 8 * n_parameters * (2 * 2 + 4))
    assert sent['tp'] == sent['replicas'] == sent['experts'] == 0
    knobs['total_batch_tokens'] = 2 * 512 * 4 * 3
    sent = plan.traffic(c, knobs, dict(dp_replicate=4, dp_shard=1, ep=1, tp=2), 2)
    assert sent['fsdp'] == 0
    split = (n_parameters - 5 * 64) / 2
    assert sent['replicas'] == pytest.approx(2 * 3 / 4 * 4 * split, rel=0.01)
    # 3 micro-steps x 2 layers x (two gathers and two scatters, and their opposites), and those of
    # the table and the final states.
    assert sent['tp'] == 3 * (1 / 2) * 2 * 512 * 64 * 2 * (2 * 4 * 2 + 4)


def test_more_gpus_and_less_recomputation_are_faster():
    config = plan.load_model_config('mobilellm_7b')

    def seconds(on, **changes):
        knobs = {**KNOBS, 'batch_size': 8, **changes}
        return plan.plan(config, knobs, plan.machine(on, 1, 'cuda'))['time']['total']

    plain = seconds('32xH100')
    selective = seconds('32xH100', activation_checkpointing='selective')
    full = seconds('32xH100', activation_checkpointing='full')
    assert seconds('64xH100') < plain < selective < full
    assert seconds('32xH100', plan_mfu=0.5) < plain < seconds('32xA100-80GB')
    assert seconds('64xH100', plan_link=5.0) > seconds('64xH100')


def test_dry_run_answers_for_the_largest_model_in_seconds(tmp_path, capsys):
    start = time.process_time()
    options = '--dry_run=True --plan_on=256xH100 --tp=8 --ep=16 --batch_size=2'.split()
    options += ['--activation_checkpointing=full', '--total_batch_tokens=4_194_304']
    command = ['train.py', 'config/model/mobilellm_671b.py', 'config/stage1.py', *options]
    command.append(f'--out_dir={tmp_path}/x')
    assert run_here(command) == 0
    out = capsys.readouterr().out
    sizes = '256 x H100: dp_replicate 1 x dp_shard 2 x ep 16 x tp 8'
    memory = ['41,', 'fits into 80 GiB']
    for part in ('674,821.4M parameters', sizes, *memory, 'GB for experts', 'GPU-hours, $'):
        assert part in out, out
    assert time.process_time() - start < 10
    assert not (tmp_path / 'x').exists()
    assert run_here([*command, '--activation_checkpointing=none', '--batch_size=16']) == 0
    out = capsys.readouterr().out
    assert re.search(r'not fit into 80 GiB, by [\d.]+ GiB. It fits with --batch_size=\d+ ', out)
    message = "plan_on = '8xH10' must be a number and a GPU, like 8xH100. Did you mean 'H100'"
    with pytest.raises(BadInput, match=message):
        run_here([*command, '--plan_on=8xH10'])


def test_the_table_has_every_model_and_its_remedies_fit(capsys):
    plan.print_table(KNOBS, 2e12)
    lines = capsys.readouterr().out.splitlines()
    for name, *machines in plan.HARDWARE:
        assert sum(line.startswith(name) for line in lines) == len(machines)
    small = plan.machine('1xA100-40GB', 1, 'cuda')
    config = plan.load_model_config('mobilellm_950m')
    knobs = {**KNOBS, 'batch_size': 16}
    assert not plan.plan(config, knobs, small)['fits']
    remedy = plan.remedy(config, knobs, small, torch.bfloat16, None)
    assert remedy.startswith('It fits with')
    changes = {}
    for name, value in re.findall(r'--(\w+)=(\w+)', remedy):
        changes[name] = int(value) if value.isdigit() else value
    assert plan.plan(config, {**knobs, **changes}, small)['fits']


@pytest.mark.parametrize('argument', ['--anything', '--plan_on=8xH100', 'config/stage1.py'])
def test_the_table_takes_no_arguments(argument):
    with pytest.raises(BadInput, match=f"takes no arguments, got '{argument}'"):
        run_here(['tools/plan.py', argument])


def test_help(capsys):
    assert run_here(['tools/plan.py', '--help']) == 0
    assert 'Estimates what a run will cost' in capsys.readouterr().out
