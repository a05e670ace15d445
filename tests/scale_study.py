"""Many ranks against one process, and runs whose ranks are killed: the figures of docs/BENCHMARKS.md, "Many ranks". Not collected by pytest.

    python tests/scale_study.py equal                                  # 20 steps of every layout against one process
    python tests/scale_study.py reshape                                # its checkpoint of step 4, continued by every other to step 8
    python tests/scale_study.py kills                                  # 20 SIGKILLs under torchrun, against a run that nobody disturbed
    python tests/scale_study.py kills --layouts=dp2xtp2 --experts=True --n_kills=10

Two layers of width 32, fp32 on CPUs over gloo, as tests/test_layouts.py has it. A layout is written dp2xep2xtp2 (rep2: dp_replicate), 1 is one process.
"""
import contextlib
import math
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from configurator import BadInput, configure  # noqa: E402
from tests import conftest  # noqa: E402
from tests.test_faults import INFLUENCE, MOMENTS, run_and_kill, unequal_numbers  # noqa: E402
from tests.test_layouts import EXPERTS, HEADS, write_data  # noqa: E402

# -- knobs --
layouts = ''             # with commas; '': those of EQUAL or RESHAPE, dp2 for kills
out = ''                 # a new folder for the runs; '': one that is deleted at the end
n_kills = 20
seed = 0                 # of the moments and the ranks that are killed
experts = False          # kills: a model with experts

COMPILED, BF16 = dict(compile=True), dict(dtype='bfloat16')
EQUAL = {'plain': ({}, 'dp2,tp2,dp2xtp2,rep2xdp2'), 'experts': (EXPERTS, 'ep2,dp2xep2,ep2xtp2,rep2xep2'), 'compiled': (COMPILED, 'tp2'),
         'compiled, experts': ({**COMPILED, **EXPERTS}, 'ep2'), 'bf16, experts': ({**BF16, **EXPERTS}, 'ep2xtp2')}
RESHAPE = {'plain': ({}, '1,dp2,tp2,dp2xtp2,dp4'), 'experts': (EXPERTS, '1,ep2,dp2xep2,tp2')}
KNOBS = {'rep': 'dp_replicate', 'dp': 'dp_shard', 'ep': 'ep', 'tp': 'tp'}


def parse(name):
    """'dp2xtp2' -> (4, {'dp_shard': 2, 'tp': 2}): the number of ranks, and the knobs."""
    if not re.fullmatch(r'1|(rep|dp|ep|tp)\d+(x(rep|dp|ep|tp)\d+)*', name):
        raise BadInput(f"'{name}' is no layout: write 1, or such as dp2xtp2, of rep, dp, ep and tp.")
    sizes = {KNOBS[key]: int(n) for key, n in re.findall(r'([a-z]+)(\d+)', name.replace('x', ' '))}
    return math.prod(sizes.values()), sizes


def chosen(table):
    """(model, its knobs, names of its layouts) of a table, without what `layouts` leaves out."""
    for model, (knobs, names) in table.items():
        names = [name for name in names.split(',') if not layouts or name in layouts.split(',')]
        if names:
            yield model, knobs, names


def train(folder, data, layout, **knobs):
    """A run's metrics, what it prints in a file beside it."""
    ranks, sizes = parse(layout)
    with open(f'{folder}.log', 'a') as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        return conftest.train(folder, data, ranks=ranks, **HEADS, **sizes, **knobs)


def apart(one, other):
    """The largest relative differences of two runs: (of losses, of gradient norms)."""
    return [max(abs(other[step][key] / one[step][key] - 1) for step in one for key in keys if key in one[step])
            for keys in (('train/loss', 'val/loss'), ('train/grad_norm',))]


def equal(folder, data):
    print('| model | layout | losses | gradient norms |\n|---|---|---|---|')
    for model, knobs, names in chosen(EQUAL):
        knobs = dict(max_steps=20, eval_interval=10, save_interval=20, **knobs)
        one = train(folder / f'{model} 1', data, '1', **knobs)
        for name in names:
            losses, norms = apart(one, train(folder / f'{model} {name}', data, name, **knobs))
            print(f'| {model} | {name} | {losses:.0e} | {norms:.0e} |', flush=True)


def reshape(folder, data):
    """Schedule and rows do not depend on where a run is stopped, so that all pairs equal one process that never stopped."""
    worst, n_pairs = 0.0, 0
    print('| model | written by | continued by | losses | gradient norms |\n|---|---|---|---|---|')
    for model, knobs, names in chosen(RESHAPE):
        knobs = dict(schedule='constant', eval_interval=4, save_interval=4, keep_last=0, **knobs)
        whole = train(folder / f'{model} whole', data, '1', max_steps=8, **knobs)
        for first in names:
            train(folder / f'{model} {first}', data, first, max_steps=4, **knobs)
            for second in names:
                run = shutil.copytree(folder / f'{model} {first}', folder / f'{model} {first} {second}')
                losses, norms = apart(whole, train(run, data, second, max_steps=8, resume=True, **knobs))
                worst, n_pairs = max(worst, losses, norms), n_pairs + 1
                print(f'| {model} | {first} | {second} | {losses:.0e} | {norms:.0e} |', flush=True)
    print(f'{n_pairs} pairs, within {worst:.0e}')


def kills(folder, data):
    rng = random.Random(seed)
    moments = rng.choices(list(MOMENTS), k=n_kills)
    for name in layouts.split(',') if layouts else ['dp2']:
        ranks, sizes = parse(name)
        knobs = {**INFLUENCE, **HEADS, **(EXPERTS if experts else {}), 'max_steps': 240, 'eval_interval': 40, 'save_interval': 4, 'keep_every': 40, 'mixture_interval': 8,
                 'mixture_warmup': 8, 'influence_rows': 8, 'hang_timeout': 60}
        whole = conftest.train(folder / f'{name} whole', data, ranks=ranks, **knobs, **sizes)
        command = conftest.train_command(folder / name, data, ranks=ranks, **knobs, **sizes)
        code, text, n = run_and_kill(command, folder / name, ranks, moments, rng, 8)
        if code:
            raise BadInput(f'{name}: the launcher ended with {code} after {n} kills:\n{text[-3000:]}')
        of, unequal = unequal_numbers(whole, conftest.metrics(folder / name))
        print(f'{name}: {n} kills, ' + ', '.join(f'{moments[:n].count(m)} at {m}' for m in MOMENTS) + f'; {len(unequal)} of {of:,} logged numbers differ '
              f'from the undisturbed run; {text.count("Traceback (most recent")} tracebacks', flush=True)


if __name__ == '__main__':
    command = sys.argv[1] if len(sys.argv) > 1 else '--help'
    commands = dict(equal=equal, reshape=reshape, kills=kills)
    configure(globals(), sys.argv[2:] if command in commands else ['--help'], verbose=False)
    if out and Path(out).exists():
        raise BadInput(f"out = '{out}' is there already. Name a new folder.")
    with contextlib.nullcontext(out) if out else tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        write_data(folder / 'data')
        commands[command](folder, folder / 'data')
