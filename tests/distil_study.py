"""Distillation against plain training on the same tokens, and what a cache costs in accuracy (RESULTS.md). Not collected by pytest.

    python tests/distil_study.py --data=data --sources=math,web_edu --teacher=out/teacher --out=out/distil

Takes the first `tokens` of every source's training shards, caches the teacher on them in three ways, and trains a student of
1.2M parameters by cross-entropy, from the living teacher, from each cache; then compares losses and gradients of the caches with the whole
divergence on validation rows. Runs that are complete are kept, so it goes on where it was stopped.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from configurator import configure  # noqa: E402

# -- knobs --
data = 'data'                       # folder of prepared sources
sources = 'math,web_edu'            # of it, with commas
teacher = 'out/teacher'             # a run with the same tokenizer
out = 'out/distil'
tokens = 450_000                    # of every source
steps = 180                         # of 4096 tokens
seeds = [1, 2, 3]
vocab_size = 8192

CACHES = {'k64_draws16': (64, 16), 'k0_draws16': (0, 16), 'k64_draws0': (64, 0)}      # name -> likeliest ids, draws from the rest
ARMS = {'cross-entropy': [], 'teacher': [f'--teacher={teacher}'], **{name: [f'--kd_cache={name}'] for name in CACHES}}


def cut_sources(folder, names):
    """Copies of the sources with the first `tokens` tokens of training text."""
    import numpy as np
    from data import open_shard, shard_bytes
    for name in names:
        if os.path.isdir(f'{folder}/{name}'):
            continue
        shutil.copytree(f'{data}/{name}', f'{folder}/{name}.tmp')
        paths = sorted(os.listdir(f'{folder}/{name}.tmp/train'))
        kept = np.concatenate([open_shard(f'{data}/{name}/train/{p}')[:tokens] for p in paths if p.endswith('.bin')])[:tokens]
        shutil.rmtree(f'{folder}/{name}.tmp/train')
        os.makedirs(f'{folder}/{name}.tmp/train')
        with open(f'{folder}/{name}.tmp/train/00000.bin', 'wb') as f:
            f.writelines(shard_bytes(kept, vocab_size))
        os.rename(f'{folder}/{name}.tmp', f'{folder}/{name}')


def call(*command):
    log = open(f'{out}/log.txt', 'a', encoding='utf-8')
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=log, stderr=subprocess.DEVNULL)


def train_all(folder, names):
    """arm -> validation losses at the end, one per seed."""
    losses = {arm: [] for arm in ARMS}
    for seed in seeds:
        for arm, options in ARMS.items():
            run = f'{out}/{arm}_{seed}'
            if not os.path.isdir(f'{run}/ckpt/step_{steps:06d}'):
                shutil.rmtree(run, ignore_errors=True)
                call('train.py', f'--out_dir={run}', f'--data_dir={folder}', f'--sources={ {name: 1.0 for name in names} }', f'--seed={seed}',
                     f'--vocab_size={vocab_size}', '--n_layer=4', '--n_head=4', '--n_kv_head=2', '--n_embd=96', '--ffn_dim=256', '--rope_theta=10000',
                     '--block_size=256', '--batch_size=16', '--total_batch_tokens=4096', f'--max_steps={steps}', '--learning_rate=4e-3',
                     '--warmup_steps=20', '--min_lr_frac=0.05', f'--eval_interval={steps}', '--eval_rows=128', f'--save_interval={steps}',
                     '--compile=False', *options)
            with open(f'{run}/metrics.jsonl', encoding='utf-8') as f:
                losses[arm].append([json.loads(line) for line in f if '"val/loss"' in line][-1]['val/loss'])
            print(f'seed {seed}, {arm}: {losses[arm][-1]:.4f}', flush=True)
    return losses


def compare_caches(folder, names):
    """Losses and gradients of caches against the whole divergence, on 32 validation rows, for a student half-way and at its end."""
    import torch
    import kd
    import teacher_cache
    from data import Source, batch_of
    from hf import open_model
    cpu = torch.device('cpu')
    rows = torch.from_numpy(Source(folder, names[0], 'val', 256, 0, vocab_size).rows(range(32)))
    inputs, targets, _ = batch_of(rows)
    big = open_model(teacher, cpu, torch.float32, needs_tokenizer=False)[0]
    student = open_model(f'{out}/teacher_{seeds[0]}', cpu, torch.float32, needs_tokenizer=False)[0]
    with torch.no_grad():
        h, theirs = student(inputs).flatten(0, 1), (big(inputs).flatten(0, 1), big.output_weight)
    flat = targets.flatten()

    def loss_and_gradient(what):
        x = h.clone().requires_grad_()
        total, _ = kd.distillation_loss(x, student.output_weight.detach(), flat, teacher=what)
        total.backward()
        return total.item() / len(flat), x.grad
    exact, gradient = loss_and_gradient(theirs)
    print(f'\nthe whole divergence: {exact:.4f} nats per token\n\n| likeliest ids | draws | bytes per token | loss | its error | gradient: bias, share of its norm | '
          'distance of one cache |\n|---|---|---|---|---|---|---|')
    for k, draws in ((4, 0), (16, 0), (64, 0), (256, 0), (0, 4), (0, 16), (0, 64), (16, 4), (48, 16), (64, 16)):
        record, found = teacher_cache.record_dtype(vocab_size, k, draws), []
        for seed in range(24 if draws else 1):
            records, beyond = teacher_cache.records_of(*theirs, flat, record, 1.0, torch.Generator().manual_seed(seed))
            rest = torch.from_numpy(beyond / beyond.sum() + 1e-8).log().float()[None]
            found.append(loss_and_gradient(kd.read_cached([records], [0], rest, cpu)))
        mean_loss, mean = statistics.mean(x for x, _ in found), torch.stack([g for _, g in found]).mean(0)
        distance = statistics.mean((g - gradient).norm().item() for _, g in found) / gradient.norm().item()
        noise = '' if not draws else f' (noise of {len(found)} caches: {distance / len(found)**0.5:.3f})'
        print(f'| {k} | {draws} | {record.itemsize} | {mean_loss:.4f} | {mean_loss / exact - 1:+.2%} | {((mean - gradient).norm() / gradient.norm()).item():.3f}'
              f'{noise} | {distance:.3f} |', flush=True)


if __name__ == '__main__':
    configure(globals(), verbose=False)
    ARMS['teacher'] = [f'--teacher={teacher}']
    names, folder = sources.split(','), f'{out}/data'
    os.makedirs(folder, exist_ok=True)
    cut_sources(folder, names)
    for name, (k, draws) in CACHES.items():
        call('kd.py', 'cache', f'--teacher={teacher}', f'--source={sources}', f'--name={name}', f'--data_dir={folder}', '--block_size=256',
             '--batch_size=16', f'--k={k}', f'--draws={draws}')
    losses = train_all(folder, names)
    print(f'\nvalidation loss after {steps * 4096:,} tokens, nats per token\n\n| trained by | mean (seeds) | against cross-entropy |\n|---|---|---|')
    for arm, values in losses.items():
        gaps = [v - c for v, c in zip(values, losses['cross-entropy'])]
        print(f'| {arm} | {statistics.mean(values):.4f} ({", ".join(f"{v:.4f}" for v in values)}) | {statistics.mean(gaps):+.4f} ({min(gaps):+.4f} to '
              f'{max(gaps):+.4f}) |')
    compare_caches(folder, names)
