"""Shared fixtures: paths, a small source of real structure, and a way to run the scripts as a user does."""
import json
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
import torch

from data import open_shard, shard_bytes

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared' / 'data'          # real text, present on some machines only


torch.set_num_threads(1)       # as the subprocesses: sums in another order would differ in the last bit


def pytest_xdist_auto_num_workers(config):
    """One more than there are cores: many tests wait for processes of theirs."""
    return (os.cpu_count() or 1) + 1


TINY = dict(vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, ffn_dim=48, block_size=16, batch_size=2,
            total_batch_tokens=64, max_steps=12, warmup_steps=2, learning_rate=1e-2, log_interval=1, eval_interval=6,
            eval_rows=4, save_interval=4, dtype='float32', compile=False)


@pytest.fixture
def shared_data():
    if not SHARED.is_dir():
        pytest.skip(f'{SHARED} is not on this machine')
    return SHARED


def write_shard(path, tokens, vocab_size=64):
    open_shard.cache_clear()   # a test may write a shard anew under the same name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b''.join(shard_bytes(tokens, vocab_size)))


def make_source(data_dir, name, n_tokens=4000, vocab_size=64, seed=0):
    """A source of arithmetic progressions modulo the vocabulary: easy to learn, different for every name."""
    stride = 1 + sum(name.encode()) % 5
    for split, n in (('train', n_tokens), ('val', n_tokens // 10)):
        rng = np.random.default_rng([seed, stride, n])
        tokens = (np.cumsum(np.where(rng.random(n) < 0.9, stride, rng.integers(0, vocab_size, n))) % vocab_size)
        half = n // 2
        write_shard(data_dir / name / split / '000000.bin', tokens[:half], vocab_size)
        write_shard(data_dir / name / split / '000001.bin', tokens[half:], vocab_size)


@pytest.fixture
def tiny_data(tmp_path):
    """Two sources, 'a' and 'b', without meta.json, as other projects' shards are."""
    data_dir = tmp_path / 'data'
    make_source(data_dir, 'a')
    make_source(data_dir, 'b')
    return data_dir


def train_command(out_dir, data_dir, *extra, ranks=1, **knobs):
    values = {**TINY, 'sources': {'a': 0.75, 'b': 0.25}, **knobs}
    launch = [sys.executable] if ranks == 1 else [
        sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
    return [*launch, 'train.py', *extra, f'--out_dir={out_dir}', f'--data_dir={data_dir}',
            *(f'--{key}={value}' for key, value in values.items())]


def run(command, timeout=300, cwd=ROOT, **env):
    """Runs a command in the project's folder with one thread: subprocess.CompletedProcess, text output."""
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', **env})


def run_script(path):
    """Runs a script as `python path` does: its own folder comes first on the import path."""
    sys.path.insert(0, str(ROOT / os.path.dirname(path)))
    sys.modules.pop('_path', None)
    runpy.run_path(path, run_name='__main__')


def run_here(command):
    """Runs a script of ours with its arguments in this process (a start of torch costs seconds). Returns the exit code."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before, folder, hook, path = sys.argv, os.getcwd(), sys.excepthook, sys.path[:]
    sys.argv = command[next(i for i, part in enumerate(command) if part.endswith('.py')):]
    os.chdir(ROOT)
    try:
        run_script(sys.argv[0])
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv, sys.excepthook, sys.path[:] = before, hook, path
        os.chdir(folder)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def as_rank(arguments, environment, log):
    """What a process of `start` does."""
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    sys.argv = arguments
    os.chdir(ROOT)
    try:
        run_script(arguments[0])
    except SystemExit as stop:
        os._exit(stop.code or 0)
    except BaseException:
        try:
            sys.excepthook(*sys.exc_info())
        except SystemExit as stop:
            os._exit(stop.code)
        os._exit(1)


def start(command, log, environment):
    """A script of ours in a process that is forked from one which has imported torch, for a start costs seconds: multiprocessing.Process."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['tests.conftest', 'kd', 'lib.checkpoint', 'lib.parallel', 'lib.validate', 'methods.presence', 'methods.reweight', 'tqdm', 'matplotlib.pyplot'])
    arguments = command[next(i for i, part in enumerate(command) if part.endswith('.py')):]
    process = context.Process(target=as_rank, args=(arguments, environment, str(log)))
    process.start()
    return process


def free_port():
    """A port that is free and stays so: below those that the system gives to outgoing connections, which would take one that is only found free."""
    while True:
        port = random.SystemRandom().randint(12000, 31000)
        with socket.socket() as probe:
            try:
                probe.bind(('', port))
            except OSError:
                continue
        return port


def run_ranks(command, ranks, timeout=300, during=lambda processes: None):
    """Runs a script of ours as so many ranks, without torchrun; 1: a process without a group, as `python` starts it.

    during: called with the processes when all are started. Returns subprocess.CompletedProcess, what all printed in stdout and stderr alike.
    """
    with tempfile.TemporaryDirectory() as folder:
        group = dict(MASTER_ADDR='localhost', MASTER_PORT=str(free_port()), WORLD_SIZE=str(ranks)) if ranks > 1 else {}
        log = os.path.join(folder, 'log')
        processes = [start(command, log, {**group, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', **({'RANK': str(r), 'LOCAL_RANK': str(r)} if group else {})})
                     for r in range(ranks)]
        during(processes)
        deadline = time.monotonic() + timeout
        while any(p.is_alive() for p in processes):
            wait([p.sentinel for p in processes if p.is_alive()], timeout=1)
            if any(p.exitcode for p in processes) or time.monotonic() > deadline:
                for p in processes:
                    p.join(5)                # so long may the others take to say what they have to say
                    p.kill()
                    p.join()
        text = Path(log).read_text(errors='replace') if os.path.exists(log) else ''
    failed = [p.exitcode for p in processes if p.exitcode]
    return subprocess.CompletedProcess(command, failed[0] if failed else 0, text, text)


def train(out_dir, data_dir, ranks=1, **knobs):
    """A training run that must succeed; returns its metrics by step: {step: record}."""
    command = train_command(out_dir, data_dir, ranks=ranks, **knobs)
    if ranks == 1:
        assert run_here(command) == 0
    else:
        done = run_ranks(command, ranks)
        assert done.returncode == 0, done.stdout
    return metrics(out_dir)


def metrics(out_dir):
    by_step = {}
    for line in (Path(out_dir) / 'metrics.jsonl').read_text().splitlines():
        record = json.loads(line)
        by_step.setdefault(record['step'], {}).update(record)
    return by_step


def assert_one_sentence(done, code, *parts):
    """A user's mistake: this exit code, no traceback, and these parts in the message."""
    assert done.returncode == code, f'exit {done.returncode}\n{done.stdout}\n{done.stderr}'
    assert 'Traceback' not in done.stderr, done.stderr
    messages = [line for line in done.stderr.splitlines() if 'error: ' in line]         # of several ranks, that of one
    assert any(all(part in message for part in parts) for message in messages), messages


@pytest.fixture(scope='session')
def demo_data(tmp_path_factory):
    """The demo's sources, made once."""
    folder = tmp_path_factory.mktemp('demo') / 'data'
    done = run([sys.executable, 'prepare/demo.py', f'--out={folder}'])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """The folder of a short run on text, with a byte-level tokenizer that has ChatML's tokens."""
    from lib.tokenizer import DIGITS_PATTERN, make_tokenizer, save_tokenizer
    folder = tmp_path_factory.mktemp('trained')
    (folder / 'tokenizer').mkdir()
    ranks = {bytes([b]): 3 + b for b in range(256)} | {b' t': 259, b'he': 260, b' the': 261, b'in': 262, b'ing': 263, b'er': 264}
    save_tokenizer(str(folder / 'tokenizer'), make_tokenizer(
        'bytes', ranks, DIGITS_PATTERN, {'<|endoftext|>': 0, '<|im_start|>': 1, '<|im_end|>': 2}, '<|endoftext|>'))
    documents = [' '.join(f'{a} times {b} is {a * b}, and the {w} is in the {w}ing.' for b in range(12)) for a in range(40)
                 for w in ('cat', 'river', 'number')]
    (folder / 'text.jsonl').write_text(''.join(json.dumps({'text': d}) + '\n' for d in documents))
    result = run([sys.executable, 'prepare/text.py', '--source=a', f'--input={folder}/text.jsonl', f'--out={folder}/data',
                  f'--tokenizer={folder}/tokenizer', '--val_fraction=0.1', '--workers=0'])
    assert result.returncode == 0, result.stdout + result.stderr
    command = train_command(folder / 'run', folder / 'data', vocab_size=265, sources={'a': 1.0}, max_steps=60, warmup_steps=5,
                            block_size=64, total_batch_tokens=1024, batch_size=16, save_interval=60, eval_interval=60)
    assert run_here(command) == 0
    return folder / 'run'
