"""Processes that are killed at random moments, against undisturbed ones: both must leave the same.

    python tests/kill_study.py                          # 10 SIGKILLs of every kind, ten minutes
    python tests/kill_study.py --kinds=cache --n_kills=3

The kinds: a measurement of influence, a save, `kd.py cache`, `influence_tables.py score`,
preparation, and a run of two ranks. A killed process is started again with the same command until
it has been killed n_kills times, and then it may end. docs/BENCHMARKS.md has the figures.
"""
import hashlib
import multiprocessing
import random
import shutil
import tempfile
import time
from pathlib import Path

if __name__ == '__main__':
    import _path  # noqa: F401

import torch

import kd
from configurator import BadInput, configure
from methods import selection
from tests import conftest
from tests.studies import print_header, print_row
from tests.test_faults import INFLUENCE, last_step, torn_checkpoints, unequal_numbers
from tests.test_train import weights_of

# -- knobs --
kinds = 'measurement,save,cache,score,preparation,ranks'
n_kills = 10             # of every kind
seed = 0                 # of the moments

RUN = dict(
    max_steps=160, eval_interval=40, save_interval=4, mixture_interval=8, mixture_warmup=8,
    influence_rows=8)
PARTS = dict(k=4, draws=2, block_size=16, dtype='float32')


def work(command, log, constants):
    """Runs one of our scripts in a process of its own, with other sizes of parts."""
    for module, name, value in constants:
        setattr({'kd': kd, 'selection': selection}[module], name, value)
    if command[0] == 'kd.py':
        # The script would be another module than the one whose constant was set.
        kd.write_caches(kd.CacheConfig(**command[1]))
        return
    conftest.as_rank(command, {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}, log)


def start(command, log, constants=()):
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(conftest.PRELOADED)
    process = context.Process(target=work, args=(command, log, constants))
    process.start()
    return process


def undisturbed(command, log, constants=()):
    """Runs a command to its end. Returns the seconds that it took."""
    begin = time.monotonic()
    process = start(command, log, constants)
    process.join()
    if process.exitcode:
        raise BadInput(f'{command} ended with {process.exitcode}, see {log}.')
    return time.monotonic() - begin


def at_random(rng, seconds, process):
    """Waits for a random part of the seconds."""
    process.join(rng.random() * seconds)


def at_measurement(rng, out, process):
    """Waits until the weights are due, and for a random part of the measurement."""
    before = last_step(out)
    while process.is_alive() and (last_step(out) == before or last_step(out) % 8 != 7):
        time.sleep(0.0005)
    time.sleep(rng.random() * 0.05)


def at_save(rng, out, process):
    """Waits until a checkpoint is half-written, and for a random part of the writing."""
    before = torn_checkpoints(out)
    while process.is_alive() and not torn_checkpoints(out) - before:
        time.sleep(0.0005)
    time.sleep(rng.random() * 0.01)


def kill(command, log, wait, forget, constants=()):
    """Kills a command n_kills times and lets it end. wait(process) returns at the moment to kill.

    Returns (kills, starts). When the command ends before the moment, forget() deletes what it made.
    """
    n = 0
    n_starts = 0
    while n < n_kills:
        process = start(command, log, constants)
        n_starts += 1
        wait(process)
        if process.is_alive():
            process.kill()
            process.join()
            n += 1
        else:
            forget()
        if n_starts > 20 * n_kills:
            raise BadInput(f'{command[0]} ends before it can be killed. Make it longer.')
    undisturbed(command, log, constants)
    return n, n_starts + 1


def content_of(folder):
    """The bytes of all files below a folder that are no locks: name -> sha256."""
    found = {}
    for path in sorted(folder.rglob('*')):
        if path.is_file() and 'lock' not in str(path.relative_to(folder)):
            name = str(path.relative_to(folder))
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def compare(one, other):
    """Text: how many files differ between two folders."""
    here = content_of(one)
    there = content_of(other)
    differing = [name for name in {*here, *there} if here.get(name) != there.get(name)]
    return f'{len(differing)} of {len(here)} files differ' + (f' {differing[:3]}' * bool(differing))


def compare_runs(one, other):
    n, unequal = unequal_numbers(conftest.metrics(one), conftest.metrics(other))
    tensors = weights_of(one)
    others = weights_of(other)
    differing = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    return (
        f'{len(unequal)} of {n:,} numbers and {len(differing)} of {len(tensors)} tensors of the '
        'last checkpoint differ')


def train_command(out, data, **knobs):
    values = {**INFLUENCE, **RUN, **knobs}
    return conftest.script_arguments(conftest.train_command(out, data, resume=True, **values))


def kill_run(folder, rng, wait):
    log = str(folder / 'log')
    whole = folder / 'whole'
    run = folder / 'run'
    undisturbed(train_command(whole, folder / 'data'), log)
    n = kill(
        train_command(run, folder / 'data'), log, lambda p: wait(rng, run, p),
        lambda: shutil.rmtree(run))
    return *n, compare_runs(whole, run)


def kill_ranks(folder, rng):
    """Kills one rank of two, which ends the other, and starts both again."""
    commands = []
    for name in ('whole', 'run'):
        commands.append(conftest.train_command(
            folder / name, folder / 'data', ranks=2, resume=True,
            **{**INFLUENCE, **RUN, 'batch_size': 1}))
    done = conftest.run_ranks(commands[0], 2)
    assert done.returncode == 0, done.stdout
    n = 0
    n_starts = 1

    def kill_one(processes):
        nonlocal n
        at_random(rng, 6.0, processes[0])
        victim = rng.choice(processes)
        if victim.is_alive():
            victim.kill()
            n += 1

    while n < n_kills:
        conftest.run_ranks(commands[1], 2, during=kill_one)
        n_starts += 1
    done = conftest.run_ranks(commands[1], 2)
    assert done.returncode == 0, done.stdout
    return n, n_starts, compare_runs(folder / 'whole', folder / 'run')


def kill_parts(folder, rng, make):
    """Kills a command that writes into a copy of the data. make(data): (command, constants)."""
    log = str(folder / 'log')
    other = folder / 'other'
    shutil.copytree(folder / 'data', other)
    command, constants = make(other)
    seconds = undisturbed(command, log, constants)
    command, constants = make(folder / 'data')

    def forget():
        for path in made_in(folder / 'data'):
            shutil.rmtree(path)

    n = kill(command, log, lambda p: at_random(rng, seconds, p), forget, constants)
    return *n, compare(other, folder / 'data')


def made_in(data):
    """The folders that the commands below make in a folder of sources."""
    names = ('*/kd', '*/scores', 'out')
    return [path for name in names for path in data.glob(name)]


def cache_command(teacher, data):
    options = dict(teacher=teacher, data_dir=str(data), name='x', source='a,b', **PARTS)
    return ['kd.py', options], [('kd', 'PART_TOKENS', 640)]


def score_command(teacher, data):
    command = [
        'tools/influence_tables.py', 'score', f'--ckpt={teacher}', '--sources=a,b',
        "--probe={'m': 1.0}", f'--data_dir={data}', '--probe_rows=16', '--rows=16',
        '--dtype=float32', f'--out={data.parent}/tables']
    return command, [('selection', 'PART_ROWS', 20)]


def prepare_command(data):
    text = data.parent / 'text'
    return [
        'prepare/text.py', '--source=x', f'--input={text}/text.jsonl', f'--out={data}/out',
        f'--tokenizer={text}/tokenizer', '--workers=0', '--shard_tokens=20000'], []


def one_kind(kind, folder, rng):
    """Returns (kills, starts, what differs) of one kind."""
    conftest.write_data(folder / 'data')
    if kind == 'measurement':
        return kill_run(folder, rng, at_measurement)
    if kind == 'save':
        return kill_run(folder, rng, at_save)
    if kind == 'ranks':
        return kill_ranks(folder, rng)
    if kind == 'preparation':
        (folder / 'text').mkdir()
        conftest.write_text(folder / 'text', 4000)
        return kill_parts(folder, rng, prepare_command)
    if kind not in ('cache', 'score'):
        raise BadInput(f"there is no kind '{kind}'.")
    teacher = str(folder / 'teacher')
    # Sources that are large enough for many parts.
    for name in 'ab':
        conftest.make_source(folder / 'data', name, n_tokens=24_000)
    undisturbed(train_command(teacher, folder / 'data', mixture='fixed'), str(folder / 'log'))
    make = cache_command if kind == 'cache' else score_command
    return kill_parts(folder, rng, lambda data: make(teacher, data))


if __name__ == '__main__':
    configure(globals(), verbose=False)
    print_header('kind', 'kills', 'starts', 'compared with an undisturbed one')
    for kind in kinds.split(','):
        with tempfile.TemporaryDirectory() as folder:
            print_row(kind, *one_kind(kind, Path(folder).resolve(), random.Random(seed)))
