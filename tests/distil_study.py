"""Distillation against plain training on the same tokens, and the accuracy that a cache costs.

    python prepare/folder.py --input=folder --out=data/study \\
        --sources="['code', 'math', 'web_edu', 'wiki', 'noise']"
    python tests/distil_study.py --data=data/study      # an hour and a half of two cores

It prints the tables of docs/RESULTS.md. Finished parts are kept.

1. It trains the teacher of config/study/distil/_teacher.py.
2. It takes the first `tokens` of every source's training shards and caches the teacher on them in
   three ways.
3. It trains the students of config/study/distil/ on these tokens.
4. It compares losses and gradients of caches with the full divergence on validation rows.
5. It trains students of `multiples` times the steps on all text, plainly and beside the teacher.
   The loss of plain training over FLOPs says how many of them distillation is worth, and for how
   many students a teacher pays.
"""
import math
import os
import shutil
import statistics

import numpy as np
import torch

if __name__ == '__main__':
    import _path  # noqa: F401

import kd
from configurator import configure, read_json
from data import Source, batch_of
from lib.hf import open_model
from lib.shards import open_shard, shard_bytes
from tests.studies import (
    ROOT,
    print_header,
    print_row,
    read_arms,
    run,
    tell,
    train_arms,
    write_summary,
)
from tools.report import difference, mean_and_range, paired
from tools.runs import is_finished, read_run, token_flops

# -- knobs --
data = 'data/study'                 # folder of prepared sources
out = 'out/distil'
tokens = 450_000                    # of every source: the students stay below one epoch
seeds = [0, 1, 2]
multiples = [1.0, 2.0, 3.25, 6.5, 13.0]         # of the students' steps, plain training
distilled_multiples = [1.0, 2.0]                # of the students' steps, beside the teacher
jobs = 2                            # runs at the same time, of one thread each

STEPS = 400                                                     # of config/study/base.py
NAMES = ('math', 'web_edu')                                     # the sources of the students
TEACHER = os.path.join(ROOT, 'out', 'study_teacher')            # the out_dir of _teacher.py
# Name of a cache -> the most likely ids that it keeps, and its draws from the rest.
CACHES = {'k64_draws16': (64, 16), 'k0_draws16': (0, 16), 'k64_draws0': (64, 0)}
ARMS = ('cross_entropy', 'teacher', 'teacher_half', *CACHES)
COMPARED = (
    (4, 0), (16, 0), (64, 0), (256, 0), (0, 4), (0, 16), (0, 64), (16, 4), (48, 16), (64, 16))


def cut_source(source, target, n_tokens):
    """Copies a source with the first n_tokens of its training text."""
    if os.path.isdir(target):
        return
    # Written aside and renamed, so that a killed study leaves no half source.
    part = f'{target}.tmp'
    shutil.copytree(source, part, dirs_exist_ok=True)
    vocab_size = read_json(f'{part}/meta.json')['vocab_size']
    shards = []
    for name in sorted(os.listdir(f'{part}/train')):
        if name.endswith('.bin'):
            shards.append(open_shard(f'{source}/train/{name}')[:n_tokens])
    shutil.rmtree(f'{part}/train')
    os.makedirs(f'{part}/train')
    with open(f'{part}/train/00000.bin', 'wb') as f:
        f.writelines(shard_bytes(np.concatenate(shards)[:n_tokens], vocab_size))
    os.rename(part, target)


def print_students(folder, seeds):
    entries = read_arms(folder, ARMS, seeds)
    loss = mean_of_sources
    teacher = read_run(TEACHER)
    student = entries[ARMS[0], seeds[0]]
    # A forward takes a third of a step's FLOPs.
    forward = token_flops(teacher.config) / 3 / token_flops(student.config)
    tell(f'\nThe teacher has a loss of {loss(teacher):.4f}.')
    tell(f"Its forward takes {forward:.2f} times the FLOPs of a student's step.")
    tell(f'The students are trained on {student.tokens:,} tokens.')
    print_header('trained by', 'mean loss (range)', 'against cross-entropy (95 %)', *NAMES)
    for arm in ARMS:
        local = [entries[arm, seed] for seed in seeds]
        gap = ''
        if arm != ARMS[0]:
            gap = difference(paired(list(entries.values()), arm, ARMS[0], loss), 3)
        cells = []
        for name in NAMES:
            cells.append(mean_and_range([e.final[f'val/loss_{name}'] for e in local], 3))
        print_row(arm, mean_and_range([loss(e) for e in local], 3), gap, *cells)


def mean_of_sources(run):
    return statistics.mean(run.final[f'val/loss_{name}'] for name in NAMES)


def train_for_cost(out, data, base, multiples, distilled, seeds, jobs):
    """Trains the students of the fifth table: dict (kind, multiple) -> list of runs."""
    arms = {}
    kinds = [('plain', multiples, {}), ('teacher', distilled, dict(teacher=TEACHER))]
    for kind, factors, knobs in kinds:
        for factor in factors:
            arms[f'{kind}_x{factor:g}'] = dict(
                knobs, sources=dict.fromkeys(NAMES, 1.0), max_steps=round(STEPS * factor),
                data_dir=data)
    train_arms(out, arms, seeds, jobs, base)
    entries = read_arms(out, arms, seeds)
    found = {}
    for kind, factors, _ in kinds:
        for factor in factors:
            found[kind, factor] = [entries[f'{kind}_x{factor:g}', seed] for seed in seeds]
    return found


def worth_of(loss, costs, losses):
    """The cost of plain training to a loss, between runs of these costs and falling losses.

    Returns None for a loss that lies outside the runs.
    """
    if not losses[-1] <= loss <= losses[0]:
        return None
    # np.interp wants rising abscissas.
    return math.exp(np.interp(loss, losses[::-1], np.log(costs)[::-1]))


def print_costs(found):
    """Loss over FLOPs of plain training and beside the teacher, and where they break even.

    found: dict (kind, multiple) -> runs
    """
    teacher = read_run(TEACHER)
    student = found['plain', 1.0][0]
    forward = token_flops(teacher.config) / 3 / token_flops(student.config)
    unit = student.tokens * token_flops(student.config)
    training = teacher.tokens * token_flops(teacher.config) / unit
    tell(f"\nFLOPs in students' runs of {STEPS} steps. The teacher took {training:.1f} of them.")
    print_header('trained', 'steps', 'epochs', 'FLOPs without the teacher\'s training', 'loss')
    costs = []          # of plain training
    losses = []
    for (kind, factor), runs in found.items():
        cost = factor * (1 + forward if kind == 'teacher' else 1)
        values = [mean_of_sources(run) for run in runs]
        epochs = max(
            record.get(f'mixture/epochs_{name}', 0.0)
            for record in runs[0].records for name in NAMES)
        print_row(
            kind, round(STEPS * factor), f'{epochs:.2f}', f'{cost:.2f}', mean_and_range(values, 3))
        if kind == 'plain':
            costs.append(cost)
            losses.append(statistics.mean(values))
    print_header(
        'steps beside the teacher', 'loss', 'plain training of that loss, FLOPs', 'FLOPs spent',
        'pays from this many students on')
    for (kind, factor), runs in found.items():
        if kind != 'teacher':
            continue
        value = statistics.mean(mean_of_sources(run) for run in runs)
        spent = factor * (1 + forward)
        worth = worth_of(value, costs, losses)
        text = 'outside the runs' if worth is None else f'{worth:.2f}'
        pays = text if worth is None else 'never'
        if worth is not None and worth > spent:
            pays = math.ceil(training / (worth - spent))
        print_row(round(STEPS * factor), f'{value:.3f}', text, f'{spent:.2f}', pays)


def compare_caches(data, student):
    """Compares losses and gradients of caches with the full divergence on 32 validation rows.

    data  folder of the sources     student  run of a distilled student
    """
    cpu = torch.device('cpu')
    vocab_size = read_run(TEACHER).config['vocab_size']
    rows = Source(data, NAMES[0], 'val', 256, 0, vocab_size).rows(range(32))
    inputs, targets, _ = batch_of(torch.from_numpy(rows))
    teacher = open_model(TEACHER, cpu, torch.float32, needs_tokenizer=False)[0]
    student = open_model(student, cpu, torch.float32, needs_tokenizer=False)[0]
    flat = targets.flatten()                                                           # (N,)
    with torch.no_grad():
        h = student(inputs).flatten(0, 1)                                              # (N, C)
        full = (teacher(inputs).flatten(0, 1), teacher.output_weight)

    def loss_and_gradient(teacher):
        x = h.clone().requires_grad_()
        weight = student.output_weight.detach()
        total, _ = kd.distillation_loss(x, weight, flat, teacher=teacher)
        total.backward()
        return total.item() / len(flat), x.grad

    exact, gradient = loss_and_gradient(full)
    norm = gradient.norm().item()
    tell(f'\nThe full divergence is {exact:.4f} nats per token.')
    columns = ['most likely ids', 'draws', 'bytes per token', 'loss', 'its error']
    bias_column = 'gradient: bias, share of its norm'
    print_header(*columns, bias_column, 'distance of one cache')
    for k, draws in COMPARED:
        record = kd.record_dtype(vocab_size, k, draws)
        losses = []
        gradients = []
        # Only draws are random. Without them, all caches are the same.
        for seed in range(24 if draws else 1):
            generator = torch.Generator().manual_seed(seed)
            records, beyond = kd.records_of(*full, flat, record, 1.0, generator)
            rest = torch.from_numpy(beyond / beyond.sum() + 1e-8).log().float()[None]
            cached = kd.read_cached(records, np.zeros(len(records), dtype=np.int64), rest, cpu)
            loss, local = loss_and_gradient(cached)
            losses.append(loss)
            gradients.append(local)
        loss = statistics.mean(losses)
        bias = (torch.stack(gradients).mean(0) - gradient).norm() / gradient.norm()
        distance = statistics.mean((g - gradient).norm().item() for g in gradients) / norm
        bias_text = f'{bias.item():.3f}'
        if draws:
            noise = distance / len(gradients)**0.5
            bias_text += f' (noise of {len(gradients)} caches: {noise:.3f})'
        error = f'{loss / exact - 1:+.2%}'
        size = record.itemsize
        print_row(k, draws, size, f'{loss:.4f}', error, bias_text, f'{distance:.3f}')


if __name__ == '__main__':
    configure(globals(), verbose=False)
    data = os.path.abspath(data)
    out = os.path.abspath(out)
    folder = os.path.join(out, 'data')
    os.makedirs(folder, exist_ok=True)
    base = 'config/study/base.py'
    if not is_finished(TEACHER):
        teacher = 'config/study/distil/_teacher.py'
        run('train.py', base, teacher, f'--data_dir={data}', '--resume=True')
    for name in NAMES:
        cut_source(f'{data}/{name}', f'{folder}/{name}', tokens)
    for name, (k, draws) in CACHES.items():
        cache = [f'--teacher={TEACHER}', f'--source={",".join(NAMES)}', f'--data_dir={folder}']
        cache += [f'--name={name}', f'--k={k}', f'--draws={draws}']
        run('kd.py', 'cache', *cache, '--block_size=64', '--batch_size=64')
    options = [f'--seeds={seeds}', f'--jobs={jobs}', '--threads=1', f'--out={out}/runs']
    arms = 'config/study/distil'
    run('tools/sweep.py', 'configs', arms, *options, base, f'--data_dir={folder}')
    print_students(out, seeds)
    compare_caches(folder, f'{out}/runs/teacher_seed{seeds[0]}')
    print_costs(train_for_cost(
        os.path.join(out, 'cost'), data, base, multiples, distilled_multiples, seeds, jobs))
    write_summary(out)
