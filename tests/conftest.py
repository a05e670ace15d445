"""Shared fixtures, small sources that can be learned, and ways to run scripts as a user does."""
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

from lib import checkpoint
from lib.byte_level import DIGITS_PATTERN
from lib.shards import open_file, open_shard, read_header, sha256_of, shard_bytes
from lib.tokenizer import make_tokenizer, save_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared' / 'data'          # real text, present on some machines only

# The subprocesses have one thread, too. Another number of threads sums in another order, and the
# last bits of runs that must be equal would differ.
torch.set_num_threads(1)


def need(*packages):
    """Skips the test file that calls it, before its other imports, where a package is missing."""
    for package in packages:
        # Some packages raise another ImportError when one that they need themselves is missing.
        pytest.importorskip(
            package, reason=f'the package {package} is not installed', exc_type=ImportError)


def pytest_xdist_auto_num_workers(config):
    """One more than there are cores, because many tests wait for processes of their own."""
    return (os.cpu_count() or 1) + 1


# Knobs of train.py for a run that takes less than a second.
TINY = dict(
    vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, ffn_dim=48, block_size=16,
    batch_size=2, total_batch_tokens=64, max_steps=12, warmup_steps=2, learning_rate=1e-2,
    log_interval=1, eval_interval=6, eval_rows=4, save_interval=4, dtype='float32', compile=False)


# -- data ------------------------------------------------------------------------------------------

@pytest.fixture
def shared_data():
    if not SHARED.is_dir():
        pytest.skip(f'{SHARED} is not on this machine')
    return SHARED


def write_shard(path, tokens, vocab_size=64):
    # A test may write another shard under the same name.
    open_shard.cache_clear()
    open_file.cache_clear()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b''.join(shard_bytes(tokens, vocab_size)))


def progression(rng, n_tokens, stride, vocab_size):
    """Counts up by `stride` modulo the vocabulary, with a random step in one of ten places."""
    is_regular = rng.random(n_tokens) < 0.9
    steps = np.where(is_regular, stride, rng.integers(0, vocab_size, n_tokens))
    return np.cumsum(steps) % vocab_size


def make_source(data_dir, name, n_tokens=4000, vocab_size=64, seed=0):
    """Writes a source of arithmetic progressions, easy to learn. The name sets the stride."""
    stride = 1 + sum(name.encode()) % 5
    for split, n in (('train', n_tokens), ('val', n_tokens // 10)):
        tokens = progression(np.random.default_rng([seed, stride, n]), n, stride, vocab_size)
        folder = data_dir / name / split
        write_shard(folder / '000000.bin', tokens[:n // 2], vocab_size)
        write_shard(folder / '000001.bin', tokens[n // 2:], vocab_size)


@pytest.fixture
def tiny_data(tmp_path):
    """Two sources, 'a' and 'b', without meta.json, like the shards of other projects."""
    data_dir = tmp_path / 'data'
    make_source(data_dir, 'a')
    make_source(data_dir, 'b')
    return data_dir


def write_data(folder):
    """Writes the sources 'a' and 'b', and a probe set 'm' that resembles one of them more."""
    make_source(folder, 'a')
    make_source(folder, 'b')
    tokens = progression(np.random.default_rng(5), 1600, 3, 64)
    write_shard(folder / 'probe/m/probe/0.bin', tokens)


def write_text(folder, n=40):
    """Writes text.jsonl, with 3 n documents, and a byte-level tokenizer that knows ChatML."""
    (folder / 'tokenizer').mkdir()
    merges = {b' t': 259, b'he': 260, b' the': 261, b'in': 262, b'ing': 263, b'er': 264}
    ranks = {bytes([b]): 3 + b for b in range(256)} | merges
    special = {'<|endoftext|>': 0, '<|im_start|>': 1, '<|im_end|>': 2}
    tokenizer = make_tokenizer('bytes', ranks, DIGITS_PATTERN, special, '<|endoftext|>')
    save_tokenizer(str(folder / 'tokenizer'), tokenizer)
    with open(folder / 'text.jsonl', 'w') as f:
        for a in range(n):
            for w in ('cat', 'river', 'number'):
                sentences = [
                    f'{a} times {b} is {a * b}, and the {w} is in the {w}ing.' for b in range(12)]
                f.write(json.dumps({'text': ' '.join(sentences)}) + '\n')


def list_shards(folder):
    """What meta.json says of the shards in a source's folder: a list of entries."""
    entries = []
    for path in sorted(Path(folder).glob('*/*.bin')):
        name = str(path.relative_to(folder))
        entry = dict(
            file=name, split=path.parent.name, tokens=read_header(str(path))[0],
            sha256=sha256_of(path))
        if path.with_suffix('.mask').exists():
            entry['mask_sha256'] = sha256_of(path.with_suffix('.mask'))
        entries.append(entry)
    return entries


def list_again(folder):
    """Makes meta.json list the shards as they are now, after a test has changed them."""
    path = Path(folder) / 'meta.json'
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, 'shards': list_shards(folder)}))


def sign_again(folder):
    """Makes the manifest of a checkpoint list the files as they are now."""
    manifest = Path(folder) / 'manifest.json'
    manifest.unlink()
    manifest.write_text(json.dumps(checkpoint.entries_of(str(folder))))


@pytest.fixture(scope='module')
def layout_data(tmp_path_factory):
    """The folder that `write_data` fills, shared by the tests of a file that run several ranks."""
    folder = tmp_path_factory.mktemp('layouts') / 'data'
    write_data(folder)
    return folder


# -- ways to run a script --------------------------------------------------------------------------

def options(knobs):
    """The command-line arguments for a dict of knobs."""
    return [f'--{key}={value}' for key, value in knobs.items()]


def train_command(out_dir, data_dir, *extra, ranks=1, **knobs):
    launch = [sys.executable]
    if ranks > 1:
        launch += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
    values = {**TINY, 'sources': {'a': 0.75, 'b': 0.25}, **knobs}
    folders = [f'--out_dir={out_dir}', f'--data_dir={data_dir}']
    return [*launch, 'train.py', *extra, *folders, *options(values)]


def script_arguments(command):
    """The part of a command that begins with the script."""
    first = next(i for i, part in enumerate(command) if part.endswith('.py'))
    return command[first:]


def run(command, timeout=300, cwd=ROOT, **env):
    """Runs a command in the project's folder with one thread and without a GPU.

    Returns subprocess.CompletedProcess with text output.
    """
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', **env}
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment)


def run_script(path):
    """Runs a script as `python path` does: its own folder comes first on the import path."""
    sys.path.insert(0, str(ROOT / os.path.dirname(path)))
    sys.modules.pop('_path', None)
    runpy.run_path(path, run_name='__main__')


def run_here(command):
    """Runs one of our scripts with its arguments in this process. Returns the exit code.

    A new process would need seconds to import torch.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    arguments = sys.argv
    folder = os.getcwd()
    hook = sys.excepthook
    path = sys.path[:]
    sys.argv = script_arguments(command)
    os.chdir(ROOT)
    try:
        run_script(sys.argv[0])
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = arguments
        sys.excepthook = hook
        sys.path[:] = path
        os.chdir(folder)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def as_rank(arguments, environment, log):
    """The work of a process that `start` has started."""
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


# Modules that the server has imported before it forks a process.
PRELOADED = [
    'tests.conftest', 'kd', 'lib.checkpoint', 'lib.parallel', 'lib.validate', 'methods.presence',
    'methods.reweight', 'tqdm', 'matplotlib.pyplot']


def start(command, log, environment):
    """Starts one of our scripts in a process of its own: multiprocessing.Process.

    The process is forked from one that has imported torch, because that import takes seconds.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(
        target=as_rank, args=(script_arguments(command), environment, str(log)))
    process.start()
    return process


def free_port():
    """A port that is free and stays free."""
    # The system gives ports above this range to outgoing connections. It could give away a port of
    # that range between this look and its use.
    while True:
        port = random.SystemRandom().randint(12000, 31000)
        with socket.socket() as probe:
            try:
                probe.bind(('', port))
            except OSError:
                continue
        return port


def wait_for_all(processes, timeout):
    """Waits until all processes have ended. After a failure or the timeout it kills the others."""
    deadline = time.monotonic() + timeout
    while any(p.is_alive() for p in processes):
        wait([p.sentinel for p in processes if p.is_alive()], timeout=1)
        if any(p.exitcode for p in processes) or time.monotonic() > deadline:
            for p in processes:
                p.join(5)               # time for a rank to print its own message
                p.kill()
                p.join()


def run_ranks(command, ranks, timeout=300, during=lambda processes: None):
    """Runs one of our scripts on several ranks without torchrun.

    ranks   1: a process without a group, as `python` starts it
    during  is called with the list of processes when all have been started
    Returns subprocess.CompletedProcess. Its stdout and stderr both hold what all ranks printed.
    """
    environment = dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    if ranks > 1:
        environment |= dict(
            MASTER_ADDR='localhost', MASTER_PORT=str(free_port()), WORLD_SIZE=str(ranks))
    with tempfile.TemporaryDirectory() as folder:
        log = os.path.join(folder, 'log')
        processes = []
        for r in range(ranks):
            if ranks > 1:
                environment = {**environment, 'RANK': str(r), 'LOCAL_RANK': str(r)}
            processes.append(start(command, log, environment))
        during(processes)
        wait_for_all(processes, timeout)
        text = ''
        if os.path.exists(log):
            text = Path(log).read_text(errors='replace')
    failed = [p.exitcode for p in processes if p.exitcode]
    return subprocess.CompletedProcess(command, failed[0] if failed else 0, text, text)


def train(out_dir, data_dir, ranks=1, **knobs):
    """Trains a run that must succeed. Returns its metrics by step: {step: record}."""
    command = train_command(out_dir, data_dir, ranks=ranks, **knobs)
    if ranks == 1:
        assert run_here(command) == 0
    else:
        done = run_ranks(command, ranks)
        assert done.returncode == 0, done.stdout
    return metrics(out_dir)


def metrics(out_dir):
    """The records of metrics.jsonl, those of one step merged: {step: record}."""
    by_step = {}
    for line in (Path(out_dir) / 'metrics.jsonl').read_text().splitlines():
        record = json.loads(line)
        by_step.setdefault(record['step'], {}).update(record)
    return by_step


def assert_one_sentence(done, code, *parts):
    """Checks how a user's mistake ends: the exit code, no traceback, and parts of the message."""
    assert done.returncode == code, f'exit {done.returncode}\n{done.stdout}\n{done.stderr}'
    assert 'Traceback' not in done.stderr, done.stderr
    # With several ranks, the message of one of them must have all parts.
    messages = [line for line in done.stderr.splitlines() if 'error: ' in line]
    assert any(all(part in message for part in parts) for message in messages), messages


@pytest.fixture
def count_graphs(monkeypatch):
    """A function that returns the number of compiled graphs. No code is generated for them."""
    compiler = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f: compiler(f, backend='aot_eager'))
    torch._dynamo.reset()
    stats = torch._dynamo.utils.counters['stats']
    stats.clear()
    yield lambda: stats['unique_graphs']
    torch._dynamo.reset()


# -- results that many tests share -----------------------------------------------------------------

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
    folder = tmp_path_factory.mktemp('trained')
    write_text(folder)
    done = run([
        sys.executable, 'prepare/text.py', '--source=a', f'--input={folder}/text.jsonl',
        f'--out={folder}/data', f'--tokenizer={folder}/tokenizer', '--val_fraction=0.1',
        '--workers=0'])
    assert done.returncode == 0, done.stdout + done.stderr
    train(
        folder / 'run', folder / 'data', vocab_size=265, sources={'a': 1.0}, max_steps=60,
        warmup_steps=5, block_size=64, total_batch_tokens=1024, batch_size=16, save_interval=60,
        eval_interval=60)
    return folder / 'run'
