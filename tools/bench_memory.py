"""Peaks of memory in a training step against what tools/plan.py says of it, case by case: python tools/bench_memory.py

Counted are the bytes that tensors hold, as torch's allocator sees them (on a GPU its peak counter, on a CPU the profiler's events); not the process
around them, 0.3 to 0.5 GB on a CPU. Several ranks run as torchrun's processes on this machine. See docs/BENCHMARKS.md.
"""
import contextlib
import json
import math
import os
import subprocess
import sys

import _path  # noqa: F401

from configurator import configure

cases = ''                      # names of cases, with commas; '': all
case = ''                       # internal: the one that this process, or rank, measures
config = configure(globals(), verbose=False)

S1 = dict(vocab_size=8192, n_layer=6, n_head=6, n_kv_head=2, n_embd=384, ffn_dim=1024)
S3 = dict(vocab_size=128256, n_layer=3, n_head=9, n_kv_head=3, n_embd=576, ffn_dim=2048, qk_norm=True, qk_norm_weight=False)       # three layers of 140M
EXPERTS = dict(S1, n_layer=4, n_expert=8, n_expert_active=2, expert_ffn_dim=512, n_shared_expert=1, n_dense_layer=1)
# name -> (ranks, model, knobs)
CASES = {
    'plain': (1, S1, {}), 'accumulated': (1, S1, dict(grad_accum=2)),
    'selective': (1, S1, dict(activation_checkpointing='selective')), 'full': (1, S1, dict(activation_checkpointing='full')),
    'bf16': (1, S1, dict(dtype='bfloat16', batch_size=4)), 'vocabulary': (1, S3, dict(batch_size=2)), 'long': (1, S3, dict(batch_size=1, block_size=2048)),
    'few tokens': (1, S3, dict(batch_size=1, block_size=128)), 'experts': (1, EXPERTS, dict(batch_size=4)),
    'fsdp 2': (2, S1, dict(batch_size=4, dp_shard=2, reshard_after_forward=True)),
    'fsdp 2 whole': (2, S1, dict(batch_size=4, dp_shard=2, reshard_after_forward=False, grad_accum=2)),
    'fsdp 2 few tokens': (2, S3, dict(batch_size=1, block_size=128, dp_shard=2, reshard_after_forward=True)),
    'tp 2': (2, dict(S1, n_head=8, head_dim=48), dict(batch_size=4, tp=2)),
    'tp 2 selective': (2, dict(S1, n_head=8, head_dim=48), dict(batch_size=4, tp=2, activation_checkpointing='selective')),
    'ep 2': (2, EXPERTS, dict(batch_size=4, ep=2)), 'fsdp 2 x tp 2': (4, dict(S1, n_head=8, head_dim=48), dict(batch_size=4, dp_shard=2, tp=2)),
}
KNOBS = dict(batch_size=8, block_size=512, activation_checkpointing='none', optimizer='adamw', teacher=None, reshard_after_forward=None, dp_replicate=1, dp_shard=1,
             tp=1, ep=1, dtype='float32', grad_accum=1)


def measure(name):
    """Runs a case on the ranks that there are; rank 0 prints what its tensors held at most as JSON."""
    import torch

    from lib import parallel
    from lib.device import leave_ranks, start_ranks
    from model import GPT, ModelConfig, init_weights
    from ops import ranks
    _, fields, changes = CASES[name]
    k = {**KNOBS, **changes}
    rank, world_size, device = start_ranks('auto')
    sizes = ranks.resolve_sizes(world_size, *(k[size] for size in ('dp_replicate', 'dp_shard', 'tp', 'ep')))
    layout, dtype = ranks.make_layout(device.type, rank, world_size, sizes), getattr(torch, k['dtype'])
    with torch.device('meta'):
        model = GPT(ModelConfig(**fields))
    parallel.apply_parallelism(model, layout, dtype, False, k['activation_checkpointing'], bool(k['reshard_after_forward']))
    model.to_empty(device=device)
    init_weights(model, 0)
    optimizers = parallel.make_optimizers(model, 'adamw', 1e-3, 0.1, (0.9, 0.95), 1e-8)

    def step():
        for micro_step in range(k['grad_accum']):
            rows = torch.randint(0, model.config.vocab_size, (k['batch_size'], k['block_size'] + 1), device=device)
            if layout is not None:
                model.set_requires_gradient_sync(bool(k['reshard_after_forward']) or micro_step == k['grad_accum'] - 1)
            with torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext():
                loss, _, _ = model.loss(rows[:, :-1].int(), rows[:, 1:].contiguous())
            (loss / rows.numel()).backward()
        parallel.clip_gradients(model, 1.0, parallel.gradient_norm(model))
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
    step()
    held = [t for t in model.parameters()] + [t for o in optimizers for state in o.state.values() for t in state.values()]
    at_rest = sum(parallel.local_tensor(t).numel() * t.element_size() for t in held)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        step()
        most = torch.cuda.max_memory_allocated()
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step()
        now = grown = 0
        for event in sorted((e for e in profile.profiler.kineto_results.events() if e.name() == '[memory]'), key=lambda e: e.start_ns()):
            now += event.nbytes()
            grown = max(grown, now)
        most = at_rest + grown
    if rank == 0:
        print('measured ' + json.dumps(most))
    leave_ranks(0)


def planned(name):
    import torch

    from model import ModelConfig
    from ops.ranks import resolve_sizes
    from tools import plan
    n_ranks, fields, changes = CASES[name]
    k = {**KNOBS, **changes}
    k['total_batch_tokens'] = k['batch_size'] * k['block_size'] * (n_ranks // k['tp']) * k['grad_accum']
    k['reshard_after_forward'] = bool(k['reshard_after_forward'])
    sizes = resolve_sizes(n_ranks, *(k[size] for size in ('dp_replicate', 'dp_shard', 'tp', 'ep')))
    return plan.memory_plan(ModelConfig(**fields), k, sizes, getattr(torch, k['dtype']).itemsize, torch.cuda.is_available())


if case:
    measure(case)
else:
    print(f"{'case':<20}{'measured':>12}{'planned':>10}   MiB; ratio, and when the plan has it fullest")
    for name in [c.strip() for c in cases.split(',')] if cases else CASES:
        n_ranks = CASES[name][0]
        launch = [sys.executable] if n_ranks == 1 else [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n_ranks}']
        done = subprocess.run([*launch, __file__, f'--case={name}'], text=True, capture_output=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
        lines = [line for line in done.stdout.splitlines() if line.startswith('measured ')]
        if done.returncode or not lines:
            print(done.stderr, file=sys.stderr)
            raise SystemExit(f'{name}: failed, its message stands above')
        most, (terms, when) = int(lines[0].split()[1]), planned(name)
        total = sum(terms.values())
        print(f'{name:<20}{most / 2**20:>12,.1f}{total / 2**20:>10,.1f}   {total / most:.2f}, {when}: '
              + ', '.join(f'{term} {n / 2**20:,.0f}' for term, n in terms.items() if n and math.isfinite(n)), flush=True)
