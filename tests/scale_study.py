"""Many ranks against one process, and runs whose ranks are killed.

    python tests/scale_study.py equal       # 20 steps of every layout against one process
    python tests/scale_study.py reshape     # a checkpoint of each layout, continued by each layout
    python tests/scale_study.py kills       # 20 SIGKILLs under torchrun, against a run without any
    python tests/scale_study.py kills --layouts=dp2xtp2 --experts=True --n_kills=10

It prints the figures of docs/BENCHMARKS.md, "Many ranks". The model has two layers of width 32 in
fp32 on CPUs over gloo, as in tests/test_layouts.py. A layout is written like dp2xep2xtp2, where
rep2 is dp_replicate and 1 is one process.
"""
import contextlib
import math
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path

if __name__ == '__main__':
    import _path  # noqa: F401

from configurator import BadInput, configure
from tests import conftest
from tests.studies import print_header, print_row
from tests.test_faults import INFLUENCE, MOMENTS, run_and_kill, unequal_numbers
from tests.test_layouts import EXPERTS, HEADS

# -- knobs --
layouts = ''             # with commas; '': those of EQUAL or RESHAPE, dp2 for kills
out = ''                 # a new folder for the runs; '': one that is deleted at the end
n_kills = 20
seed = 0                 # of the moments and the ranks that are killed
experts = False          # kills: a model with experts

# Name of a model -> its knobs, and its layouts.
EQUAL = {
    'plain': ({}, 'dp2,tp2,dp2xtp2,rep2xdp2'),
    'experts': (EXPERTS, 'ep2,dp2xep2,ep2xtp2,rep2xep2'),
    'compiled': (dict(compile=True), 'tp2'),
    'compiled, experts': (dict(EXPERTS, compile=True), 'ep2'),
    'bf16, experts': (dict(EXPERTS, dtype='bfloat16'), 'ep2xtp2'),
}
RESHAPE = {'plain': ({}, '1,dp2,tp2,dp2xtp2,dp4'), 'experts': (EXPERTS, '1,ep2,dp2xep2,tp2')}
KNOBS = {'rep': 'dp_replicate', 'dp': 'dp_shard', 'ep': 'ep', 'tp': 'tp'}


def parse(name):
    """'dp2xtp2' -> (4, {'dp_shard': 2, 'tp': 2}): the number of ranks, and the knobs."""
    if not re.fullmatch(r'1|(rep|dp|ep|tp)\d+(x(rep|dp|ep|tp)\d+)*', name):
        raise BadInput(f"'{name}' is no layout. Write 1, or rep, dp, ep and tp such as dp2xtp2.")
    sizes = {}
    for key, size in re.findall(r'([a-z]+)(\d+)', name.replace('x', ' ')):
        sizes[KNOBS[key]] = int(size)
    return math.prod(sizes.values()), sizes


def chosen(table, layouts):
    """Yields (model, its knobs, names of its layouts), without layouts that were not asked for."""
    for model, (knobs, names) in table.items():
        names = names.split(',')
        if layouts:
            names = [name for name in names if name in layouts.split(',')]
        if names:
            yield model, knobs, names


def train(folder, data, layout, **knobs):
    """Trains in `folder` with its output in a file beside it. Returns the run's metrics."""
    ranks, sizes = parse(layout)
    with open(f'{folder}.log', 'a') as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            return conftest.train(folder, data, ranks=ranks, **HEADS, **sizes, **knobs)


def apart(one, other):
    """The largest relative differences of two runs: (of losses, of gradient norms)."""
    largest = []
    for keys in (('train/loss', 'val/loss'), ('train/grad_norm',)):
        gaps = []
        for step, metrics in one.items():
            gaps += [abs(other[step][key] / metrics[key] - 1) for key in keys if key in metrics]
        largest.append(max(gaps))
    return largest


def equal(folder, data, layouts):
    print_header('model', 'layout', 'losses', 'gradient norms')
    for model, knobs, names in chosen(EQUAL, layouts):
        knobs = dict(max_steps=20, eval_interval=10, save_interval=20, **knobs)
        one = train(folder / f'{model} 1', data, '1', **knobs)
        for name in names:
            losses, norms = apart(one, train(folder / f'{model} {name}', data, name, **knobs))
            print_row(model, name, f'{losses:.0e}', f'{norms:.0e}')


def reshape(folder, data, layouts):
    """Compares every pair of layouts with one process that never stopped.

    This works because schedule and rows do not depend on where a run is stopped.
    """
    worst = 0.0
    n_pairs = 0
    print_header('model', 'written by', 'continued by', 'losses', 'gradient norms')
    for model, knobs, names in chosen(RESHAPE, layouts):
        knobs = dict(schedule='constant', eval_interval=4, save_interval=4, keep_last=0, **knobs)
        one = train(folder / f'{model} whole', data, '1', max_steps=8, **knobs)
        for first in names:
            train(folder / f'{model} {first}', data, first, max_steps=4, **knobs)
            for second in names:
                # Every continuation starts from the same checkpoint.
                run = folder / f'{model} {first} {second}'
                shutil.copytree(folder / f'{model} {first}', run)
                other = train(run, data, second, max_steps=8, resume=True, **knobs)
                losses, norms = apart(one, other)
                worst = max(worst, losses, norms)
                n_pairs += 1
                print_row(model, first, second, f'{losses:.0e}', f'{norms:.0e}')
    print(f'{n_pairs} pairs, within {worst:.0e}')


def kills(folder, data, layouts, n_kills, seed, experts):
    rng = random.Random(seed)
    moments = rng.choices(list(MOMENTS), k=n_kills)
    for name in layouts.split(',') if layouts else ['dp2']:
        ranks, sizes = parse(name)
        knobs = {**INFLUENCE, **HEADS, **(EXPERTS if experts else {}), **sizes}
        knobs |= dict(
            max_steps=240, eval_interval=40, save_interval=4, keep_every=40, mixture_interval=8,
            mixture_warmup=8, influence_rows=8, hang_timeout=60)
        undisturbed = conftest.train(folder / f'{name} whole', data, ranks=ranks, **knobs)
        # The run that is killed has the same knobs and a folder of its own.
        command = conftest.train_command(folder / name, data, ranks=ranks, **knobs)
        code, text, n = run_and_kill(command, folder / name, ranks, moments, rng, 8)
        if code:
            raise BadInput(
                f'{name}: the launcher ended with {code} after {n} kills:\n{text[-3000:]}')
        n_numbers, unequal = unequal_numbers(undisturbed, conftest.metrics(folder / name))
        by_moment = ', '.join(f'{moments[:n].count(m)} at {m}' for m in MOMENTS)
        n_tracebacks = text.count('Traceback (most recent')
        print(
            f'{name}: {n} kills, {by_moment}; {len(unequal)} of {n_numbers:,} logged numbers '
            f'differ from the undisturbed run; {n_tracebacks} tracebacks', flush=True)


if __name__ == '__main__':
    command = sys.argv[1] if len(sys.argv) > 1 else '--help'
    is_command = command in ('equal', 'reshape', 'kills')
    configure(globals(), sys.argv[2:] if is_command else ['--help'], verbose=False)
    if out and Path(out).exists():
        raise BadInput(f"out = '{out}' exists already. Name a new folder.")
    with contextlib.nullcontext(out) if out else tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        data = folder / 'data'
        conftest.write_data(data)
        if command == 'equal':
            equal(folder, data, layouts)
        elif command == 'reshape':
            reshape(folder, data, layouts)
        else:
            kills(folder, data, layouts, n_kills, seed, experts)
