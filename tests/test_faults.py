"""Ranks that die or hang, damaged checkpoints, checkpoints to keep, and runs in an object store."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time

import pytest

from configurator import BadInput
from lib import checkpoint, storage
from lib.watch import diagnose
from tests.conftest import ROOT, metrics, run_here, run_ranks, train, train_command
from tests.test_layouts import HEADS, assert_equal_runs
from tests.test_train import assert_same_run

INFLUENCE = dict(
    mixture='influence', mixture_interval=12, mixture_warmup=12, probe={'m': 1.0}, probe_rows=16,
    influence_rows=16, max_epochs=None, learning_rate=5e-4)


# -- ranks that are killed -------------------------------------------------------------------------

def ranks_below(pid):
    """The ranks that a launcher has started: rank -> process id."""
    found = {}
    for name in os.listdir('/proc'):
        try:
            with open(f'/proc/{name}/stat') as f:
                parent = int(f.read().rsplit(')', 1)[1].split()[1])
            with open(f'/proc/{name}/environ') as f:
                variables = f.read().split('\0')
        except (OSError, ValueError):
            continue                        # not a process, or it has ended meanwhile
        rank = [v.removeprefix('RANK=') for v in variables if v.startswith('RANK=')]
        if parent == pid and rank:
            found[int(rank[0])] = int(name)
    return found


def last_step(out):
    """The last step in a run's metrics.jsonl, or -1 while there is no complete line."""
    log = out / 'metrics.jsonl'
    lines = log.read_text().splitlines() if log.exists() else []
    if lines and lines[-1].endswith('}'):
        return json.loads(lines[-1])['step']
    return -1


def torn_checkpoints(out):
    return set(checkpoint.torn_checkpoints(f'{out}/ckpt'))


# Moment at which a rank may be killed -> the most seconds to wait once it has come.
MOMENTS = dict(start=4.0, step=0.1, save=0.01, influence=0.02)


def wait_for_moment(moment, launcher, out, n_steps, interval):
    """Waits until a run reaches one of MOMENTS or its launcher ends. See `run_and_kill`."""
    before = last_step(out)
    torn = torn_checkpoints(out)
    deadline = time.monotonic() + 120
    has_moved = False
    while launcher.poll() is None:
        now = last_step(out)
        # While a run starts, the last step is still the one that its predecessor has written.
        has_moved = has_moved or now != before
        if moment == 'step':
            has_come = now >= before + n_steps
        elif moment == 'save':
            has_come = torn_checkpoints(out) - torn
        elif moment == 'influence':
            has_come = has_moved and now > 0 and now % interval == interval - 1
        else:
            has_come = True                 # 'start'
        if has_come:
            break
        assert time.monotonic() < deadline, f'no {moment} in two minutes'
        time.sleep(0.001)


def run_and_kill(command, out, n_ranks, moments, rng, interval):
    """Runs a torchrun command and sends SIGKILL to a random rank at each of the moments.

    moments   'start'; 'step': after 1 to 9 steps; 'save': while a checkpoint is half written;
              'influence': when the weights are due
    rng       random.Random that chooses ranks and waits
    interval  steps between two updates of the weights
    Returns (exit code, everything printed, number of kills).
    """
    log = out.with_suffix('.log')
    launch = [*command[:3], f'--max-restarts={len(moments) + 4}', *command[3:]]
    with open(log, 'w') as f:
        launcher = subprocess.Popen(
            launch, cwd=ROOT, stdout=f, stderr=f, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    n_kills = 0
    for moment in moments:
        victims = {}
        while len(victims) < n_ranks and launcher.poll() is None:
            time.sleep(0.05)
            victims = ranks_below(launcher.pid)
        wait_for_moment(moment, launcher, out, rng.randint(1, 9), interval)
        time.sleep(rng.random() * MOMENTS[moment])
        if launcher.poll() is not None:
            break
        rank = rng.choice(sorted(victims))
        os.kill(victims[rank], signal.SIGKILL)
        n_kills += 1
        print(f'SIGKILL to rank {rank}, {moment}, at step {last_step(out)}', flush=True)
        while set(ranks_below(launcher.pid).values()) & set(victims.values()):
            time.sleep(0.05)
    return launcher.wait(timeout=600), log.read_text(), n_kills


def unequal_numbers(one, other):
    """Compares the losses, norms and weights that two runs have logged.

    Returns (how many there are, [(step, key)] of those that differ in any bit).
    """
    compared = (
        'train/loss', 'train/grad_norm', 'val/', 'mixture/weight', 'mixture/influence')
    n = 0
    unequal = []
    for step in one:
        for key, value in one[step].items():
            if key.startswith(compared):
                n += 1
                if other[step][key] != value:
                    unequal.append((step, key))
    return n, unequal


@pytest.mark.skipif(not os.path.isdir('/proc'), reason='needs /proc')
def test_torchrun_brings_a_run_back_whose_ranks_are_killed(tmp_path, layout_data):
    # One kill comes during a save and one in or after a measurement. The launcher does the rest.
    knobs = dict(
        max_steps=28, eval_interval=14, save_interval=3, hang_timeout=60, **INFLUENCE, **HEADS)
    undisturbed = train(tmp_path / 'whole', layout_data, ranks=2, **knobs)
    command = train_command(tmp_path / 'run', layout_data, ranks=2, **knobs)
    moments = ('save', 'influence')
    code, text, n_kills = run_and_kill(
        command, tmp_path / 'run', 2, moments, random.Random(3), 12)
    assert code == 0 and n_kills == 2, text[-3000:]
    assert text.count('resume: ') >= 2 and 'Traceback (most recent' not in text
    n, unequal = unequal_numbers(undisturbed, metrics(tmp_path / 'run'))
    assert n > 100 and not unequal


def test_a_restart_with_another_config_does_not_resume(tmp_path, tiny_data, monkeypatch):
    train(tmp_path / 'run', tiny_data, max_steps=4)
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    with pytest.raises(BadInput, match='already holds a run'):
        train(tmp_path / 'run', tiny_data, max_steps=6, learning_rate=0.5)
    # The same config resumes. Nothing is left to train.
    assert max(train(tmp_path / 'run', tiny_data, max_steps=4)) == 4


# -- ranks that hang -------------------------------------------------------------------------------

def run_with_a_stopped_rank(out, data, rank):
    """Runs two ranks, and stops one (SIGSTOP) after some steps: subprocess.CompletedProcess."""
    def stop(processes):
        while last_step(out) < 5:
            time.sleep(0.02)
        os.kill(processes[rank].pid, signal.SIGSTOP)

    knobs = dict(max_steps=10**6, eval_interval=10**6, hang_timeout=5, **HEADS)
    return run_ranks(train_command(out, data, ranks=2, **knobs), 2, during=stop)


def test_a_rank_that_hangs_is_named(tmp_path, layout_data):
    done = run_with_a_stopped_rank(tmp_path / 'run', layout_data, 1)
    assert done.returncode == 1
    message = next(line for line in done.stdout.splitlines() if line.startswith('error: '))
    for part in (
            'no progress for', 'hang_timeout = 5', 'rank 1 on ', 'gives no sign of life', 'at step',
            'The others are at step', '--resume=True'):
        assert part in message


def test_a_rank_gives_up_alone_when_the_store_hangs_with_its_host(tmp_path, layout_data):
    done = run_with_a_stopped_rank(tmp_path / 'run', layout_data, 0)
    assert done.returncode
    assert 'its host, the first node or rank 0, hangs' in done.stdout
    assert 'Rank 1 is at step' in done.stdout


def entry(step, doing='trains', place='train.py:1', ticks=6):
    """What a rank writes to the store. In `before` below, all ranks have ticks=5."""
    return dict(ticks=ticks, step=step, doing=doing, place=place, host='h')


@pytest.mark.parametrize('after, part', [
    ([entry(10), entry(9), entry(10)],
     r'^rank 1 on h came less far .* at step 9.*The others are at step 10'),
    ([entry(10), entry(10, doing='reads its rows'), entry(10)],
     r'^rank 1 on h came less far .* at step 10, reads its rows.*others are at step 10, trains'),
    ([entry(10), entry(10), entry(10, ticks=5)], r'^rank 2 on h gives no sign of life'),
    ([entry(10, place='data.py:9'), entry(10), entry(10)],
     r'^rank 0 on h is somewhere else .* in data.py:9'),
    ([entry(10)] * 3, 'All ranks are at step 10.*the network')])
def test_the_rank_that_others_wait_for_is_found(after, part):
    before = {r: {**a, 'ticks': 5} for r, a in enumerate(after)}
    assert re.search(part, diagnose(before, dict(enumerate(after))))


# -- checkpoints -----------------------------------------------------------------------------------

def test_torn_and_damaged_checkpoints_are_skipped_with_a_message(tmp_path, tiny_data, capsys):
    run = tmp_path / 'run'
    train(run, tiny_data)
    newest = run / 'ckpt/step_000012'
    shard = next(newest.glob('*.distcp'))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert checkpoint.find_checkpoint(str(run)).endswith('step_000008')
    sizes = f'{shard.name} has {len(content) - 1:,} bytes, not {len(content):,}'
    assert f'step_000012 is damaged ({sizes})' in capsys.readouterr().out
    shard.unlink()
    assert checkpoint.find_checkpoint(str(run)).endswith('step_000008')
    assert f'{shard.name} is missing' in capsys.readouterr().out
    with pytest.raises(BadInput, match='damaged.*Others here: step_000008'):
        checkpoint.find_checkpoint(str(newest))
    (newest / 'manifest.json').unlink()
    # Without its manifest the newest one is torn, so the run continues from step 8.
    assert max(train(run, tiny_data, resume=True, max_steps=12)) == 12
    assert 'step_000012 was never finished and is skipped' in capsys.readouterr().out
    names = ['step_000008', 'step_000012']
    assert checkpoint.complete_checkpoints(str(run / 'ckpt')) == names
    for name in names:
        next((run / 'ckpt' / name).glob('*.distcp')).unlink()
    with pytest.raises(BadInput, match='every checkpoint .* is damaged'):
        train(run, tiny_data, resume=True)


def test_checkpoints_that_are_kept(tmp_path, tiny_data):
    train(tmp_path / 'run', tiny_data, max_steps=11, save_interval=1, keep_last=2, keep_every=4)
    kept = checkpoint.complete_checkpoints(str(tmp_path / 'run/ckpt'))
    assert kept == ['step_000004', 'step_000008', 'step_000010', 'step_000011']


def test_background_saves_under_tensor_parallelism_hold_the_same(tmp_path, layout_data):
    knobs = dict(ranks=2, tp=2, max_steps=6, save_interval=2, **HEADS)
    train(tmp_path / 'sync', layout_data, async_save=False, **knobs)
    m = train(tmp_path / 'async', layout_data, async_save=True, **knobs)
    assert_same_run(tmp_path / 'sync', tmp_path / 'async')
    assert 0 < m[2]['system/save_ms'] < 60_000


# -- object stores ---------------------------------------------------------------------------------

def test_a_run_in_an_object_store_is_the_same_and_can_continue(tmp_path, tiny_data, monkeypatch):
    monkeypatch.setattr(storage, 'MIRRORS', str(tmp_path / 'mirrors'))
    url = 'memory://bucket/run'
    assert run_here(train_command(url, tiny_data, max_steps=8)) == 0
    # Another machine has no local copy.
    shutil.rmtree(tmp_path / 'mirrors')
    assert 'metrics.jsonl' in storage.names(url)
    assert storage.names(f'{url}/ckpt') == ['latest', 'step_000004', 'step_000008']
    with pytest.raises(BadInput, match='already holds a run'):
        run_here(train_command(url, tiny_data))
    storage.write(f'{url}/ckpt/step_000099/state.json', b'{}')          # a torn checkpoint
    with pytest.raises(BadInput, match='step 8, beyond the 6 steps'):
        run_here(train_command(url, tiny_data, resume=True, max_steps=6))
    train(tmp_path / 'local', tiny_data, max_steps=8)
    local = train(tmp_path / 'local', tiny_data, resume=True)
    assert run_here(train_command(url, tiny_data, resume=True)) == 0
    remote = metrics(storage.download(url))
    for step in range(12):
        assert remote[step]['train/loss'] == local[step]['train/loss']
    # Another run finds its initial weights there, too.
    other = train(tmp_path / 'next', tiny_data, init_from=url, max_steps=1)
    assert other[0]['val/loss'] == pytest.approx(remote[12]['val/loss'], rel=1e-6)


def test_two_ranks_write_to_a_store_and_one_reads_it(tmp_path, layout_data, monkeypatch):
    monkeypatch.setattr(storage, 'MIRRORS', str(tmp_path / 'mirrors'))
    url = f'file://{tmp_path}/store/run'
    knobs = dict(schedule='constant', **HEADS)
    command = train_command(
        url, layout_data, ranks=2, tp=2, max_steps=4, async_save=True, **knobs)
    done = run_ranks(command, 2)
    assert done.returncode == 0, done.stdout
    assert run_here(train_command(url, layout_data, resume=True, **knobs)) == 0
    uninterrupted = train(tmp_path / 'whole', layout_data, **knobs)
    assert_equal_runs(uninterrupted, metrics(storage.download(url)))


def test_a_store_without_its_driver_is_one_sentence():
    with pytest.raises(BadInput, match="'nowhere://x' cannot be reached"):
        storage.names('nowhere://x')


# -- a trace ---------------------------------------------------------------------------------------

def test_profile_writes_a_trace_of_the_steps(tmp_path, tiny_data):
    train(tmp_path / 'run', tiny_data, profile=True)
    trace = json.loads((tmp_path / 'run/trace.json').read_text())
    names = {str(event.get('name')) for event in trace['traceEvents']}
    assert any('mm' in name for name in names)
    assert {'ProfilerStep#4', 'ProfilerStep#6'} <= names
