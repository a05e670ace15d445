"""Distillation against plain training on the same tokens, and what a cache costs in accuracy (docs/RESULTS.md). Not collected by pytest.

    python prepare/folder.py --input=folder --sources="['code', 'math', 'web_edu', 'wiki', 'noise']" --out=data/study
    python tests/distil_study.py --data=data/study          # an hour of two cores beside other work; what is complete is not made again

Trains the teacher of config/study/distil/_teacher.py, takes the first `tokens` of every source's training shards, caches the teacher on them in three
ways, and trains the students of config/study/distil/ on them; then compares losses and gradients of the caches with the whole divergence on
validation rows.
"""
import json
import os
import shutil
import statistics

from configurator import configure
from tests.studies import ROOT, read_arms, run
from tools.report import difference, mean_and_range, paired, read_entry
from tools.runs import is_finished, token_flops

# -- knobs --
data = 'data/study'                 # folder of prepared sources
out = 'out/distil'
tokens = 450_000                    # of every source: the students stay below one epoch
seeds = [0, 1, 2]
jobs = 2                            # runs at the same time, of one thread each

NAMES, TEACHER = ('math', 'web_edu'), os.path.join(ROOT, 'out', 'study_teacher')          # as config/study/distil/ has them
CACHES = {'k64_draws16': (64, 16), 'k0_draws16': (0, 16), 'k64_draws0': (64, 0)}          # name -> likeliest ids, draws from the rest
ARMS = ('cross_entropy', 'teacher', 'teacher_half', *CACHES)


def cut_sources(folder):
    """Copies of the sources with the first `tokens` tokens of training text."""
    import numpy as np

    from data import open_shard, shard_bytes
    for name in NAMES:
        if os.path.isdir(f'{folder}/{name}'):
            continue
        shutil.copytree(f'{data}/{name}', f'{folder}/{name}.tmp', dirs_exist_ok=True)
        with open(f'{folder}/{name}.tmp/meta.json', encoding='utf-8') as f:
            vocab_size = json.load(f)['vocab_size']
        paths = sorted(os.listdir(f'{folder}/{name}.tmp/train'))
        kept = np.concatenate([open_shard(f'{data}/{name}/train/{p}')[:tokens] for p in paths if p.endswith('.bin')])[:tokens]
        shutil.rmtree(f'{folder}/{name}.tmp/train')
        os.makedirs(f'{folder}/{name}.tmp/train')
        with open(f'{folder}/{name}.tmp/train/00000.bin', 'wb') as f:
            f.writelines(shard_bytes(kept, vocab_size))
        os.rename(f'{folder}/{name}.tmp', f'{folder}/{name}')


def print_table(folder):
    entries = read_arms(folder, ARMS, seeds)

    def loss(e):
        return statistics.mean(e.final[f'val/loss_{name}'] for name in NAMES)
    teacher, student = read_entry(TEACHER), entries[ARMS[0], seeds[0]]
    print(f'\nthe teacher: {loss(teacher):.4f}; its forward takes {token_flops(teacher.config) / 3 / token_flops(student.config):.2f} times the FLOPs of a student\'s step. '
          f'Students: {student.tokens:,} tokens\n\n| trained by | mean loss (range) | against cross-entropy (95 %) | {" | ".join(NAMES)} |\n|---|---|---|---|---|')
    for arm in ARMS:
        own = [entries[arm, seed] for seed in seeds]
        gap = '' if arm == ARMS[0] else difference(paired(list(entries.values()), arm, ARMS[0], loss), 3)
        print(f'| {arm} | {mean_and_range([loss(e) for e in own], 3)} | {gap} | ' + ' | '.join(mean_and_range([e.final[f'val/loss_{n}'] for e in own], 3) for n in NAMES) + ' |')


def compare_caches(folder, runs):
    """Losses and gradients of caches against the whole divergence, on 32 validation rows, for the distilled student of the first seed."""
    import torch

    import kd
    import teacher_cache
    from data import Source, batch_of
    from lib.hf import open_model
    cpu, vocab_size = torch.device('cpu'), read_entry(TEACHER).config['vocab_size']
    rows = torch.from_numpy(Source(folder, NAMES[0], 'val', 256, 0, vocab_size).rows(range(32)))
    inputs, targets, _ = batch_of(rows)
    big = open_model(TEACHER, cpu, torch.float32, needs_tokenizer=False)[0]
    student = open_model(f'{runs}/teacher_seed{seeds[0]}', cpu, torch.float32, needs_tokenizer=False)[0]
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
    data, out = os.path.abspath(data), os.path.abspath(out)
    folder = os.path.join(out, 'data')
    os.makedirs(folder, exist_ok=True)
    if not is_finished(TEACHER):
        run('train.py', 'config/study/base.py', 'config/study/distil/_teacher.py', f'--data_dir={data}', '--resume=True')
    cut_sources(folder)
    for name, (k, draws) in CACHES.items():
        run('kd.py', 'cache', f'--teacher={TEACHER}', f'--source={",".join(NAMES)}', f'--name={name}', f'--data_dir={folder}', '--block_size=64', '--batch_size=64',
            f'--k={k}', f'--draws={draws}')
    run('tools/sweep.py', 'configs', 'config/study/distil', f'--seeds={seeds}', f'--jobs={jobs}', '--threads=1', f'--out={out}/runs', 'config/study/base.py', f'--data_dir={folder}')
    print_table(f'{out}/runs')
    compare_caches(folder, f'{out}/runs')
