"""Ranks that die or hang, checkpoints that are torn, kept or far away."""
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
from tests.test_layouts import HEADS, assert_equal_runs, data  # noqa: F401  (a fixture)
from tests.test_train import assert_same_run

INFLUENCE = dict(mixture='influence', mixture_interval=12, mixture_warmup=12, probe={'m': 1.0}, probe_rows=16, influence_rows=16, max_epochs=None,
                 learning_rate=5e-4)


def ranks_below(pid):
    """rank -> process id of the ranks that a launcher has started."""
    found = {}
    for name in os.listdir('/proc'):
        try:
            with open(f'/proc/{name}/stat') as f:
                parent = int(f.read().rsplit(')', 1)[1].split()[1])
            with open(f'/proc/{name}/environ') as f:
                rank = [v[5:] for v in f.read().split('\0') if v.startswith('RANK=')]
        except (OSError, ValueError):
            continue                        # no process, or gone by now
        if parent == pid and rank:
            found[int(rank[0])] = int(name)
    return found


def last_step(out):
    lines = (out / 'metrics.jsonl').read_text().splitlines() if (out / 'metrics.jsonl').exists() else []
    return json.loads(lines[-1])['step'] if lines and lines[-1].endswith('}') else -1


MOMENTS = dict(start=4.0, step=0.1, save=0.01, influence=0.02)      # when a rank may be killed -> waits up to so many seconds then


def run_and_kill(command, out, n_ranks, moments, rng, interval):
    """A torchrun command, SIGKILL to a random rank at each of the moments: (exit code, what all printed, number of kills).

    moments: 'start'; 'step', 1 to 9 of them on; 'save', a checkpoint is half written; 'influence', the weights are due, every `interval` steps.
    """
    log = out.with_suffix('.log')
    with open(log, 'w') as f:
        launcher = subprocess.Popen([*command[:3], f'--max-restarts={len(moments) + 4}', *command[3:]], cwd=ROOT, stdout=f, stderr=f,
                                    env={**os.environ, 'OMP_NUM_THREADS': '1'})
    n_kills = 0
    for moment in moments:
        victims, deadline = {}, time.monotonic() + 120
        while len(victims) < n_ranks and launcher.poll() is None:
            time.sleep(0.05)
            victims = ranks_below(launcher.pid)
        before, torn, n_steps, moved = last_step(out), set(checkpoint.torn_checkpoints(f'{out}/ckpt')), rng.randint(1, 9), False
        while launcher.poll() is None:
            now = last_step(out)
            moved = moved or now != before                          # what the one before has written stands there during a start
            if (moment == 'start' or moment == 'step' and now >= before + n_steps or moment == 'influence' and moved and now > 0 and now % interval == interval - 1
                    or moment == 'save' and set(checkpoint.torn_checkpoints(f'{out}/ckpt')) - torn):
                break
            assert time.monotonic() < deadline, f'no {moment} in two minutes'
            time.sleep(0.001)
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
    """Losses, norms and weights that two runs have logged: (how many there are, [(step, key)] of those that differ in any bit)."""
    keys = [(step, key) for step in one for key in one[step]
            if key.startswith(('train/loss', 'train/grad_norm', 'val/', 'mixture/weight', 'mixture/influence'))]
    return len(keys), [(step, key) for step, key in keys if other[step][key] != one[step][key]]


@pytest.mark.skipif(not os.path.isdir('/proc'), reason='needs /proc')
def test_torchrun_brings_a_run_back_whose_ranks_are_killed(tmp_path, data):  # noqa: F811
    # one in a save, one in or after a measurement; the launcher does the rest
    knobs = dict(max_steps=28, eval_interval=14, save_interval=3, hang_timeout=60, **INFLUENCE, **HEADS)
    whole = train(tmp_path / 'whole', data, ranks=2, **knobs)
    command = train_command(tmp_path / 'run', data, ranks=2, **knobs)
    code, text, n_kills = run_and_kill(command, tmp_path / 'run', 2, ('save', 'influence'), random.Random(3), 12)
    assert code == 0 and n_kills == 2, text[-3000:]
    assert text.count('resume: ') >= 2 and 'Traceback (most recent' not in text
    n, unequal = unequal_numbers(whole, metrics(tmp_path / 'run'))
    assert n > 100 and not unequal


def run_with_a_stopped_rank(out, data, rank):
    """A run of two ranks, one of which is stopped (SIGSTOP) after some steps: subprocess.CompletedProcess."""
    def stop(processes):
        while last_step(out) < 5:
            time.sleep(0.02)
        os.kill(processes[rank].pid, signal.SIGSTOP)
    return run_ranks(train_command(out, data, ranks=2, max_steps=10**6, eval_interval=10**6, hang_timeout=5, **HEADS), 2, during=stop)


def test_a_rank_that_hangs_is_named(tmp_path, data):  # noqa: F811
    done = run_with_a_stopped_rank(tmp_path / 'run', data, 1)
    assert done.returncode == 1
    message = next(line for line in done.stdout.splitlines() if line.startswith('error: '))
    for part in ('no progress for', 'hang_timeout = 5', 'rank 1 on ', 'gives no sign of life', 'at step', 'The others are at step', '--resume=True'):
        assert part in message


def test_a_rank_gives_up_alone_when_the_store_hangs_with_its_host(tmp_path, data):  # noqa: F811
    done = run_with_a_stopped_rank(tmp_path / 'run', data, 0)
    assert done.returncode and 'its host, the first node or rank 0, hangs' in done.stdout and 'Rank 1 is at step' in done.stdout


def test_a_restart_with_another_config_is_no_resume(tmp_path, tiny_data, monkeypatch):
    train(tmp_path / 'run', tiny_data, max_steps=4)
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    with pytest.raises(BadInput, match='already holds a run'):
        train(tmp_path / 'run', tiny_data, max_steps=6, learning_rate=0.5)
    assert max(train(tmp_path / 'run', tiny_data, max_steps=4)) == 4              # the same run: there is nothing left to do


def told(beats, where='train.py:1', ticks=5):
    return dict(ticks=ticks, beats=beats, step=beats // 5, doing='trains', where=where, host='h')


@pytest.mark.parametrize('after, part', [
    ([told(50, ticks=6), told(48, ticks=6), told(50, ticks=6)], r'^rank 1 on h came less far .* at step 9.*The others are at step 10'),
    ([told(50, ticks=6), told(50, ticks=6), told(50)], r'^rank 2 on h gives no sign of life'),
    ([told(50, 'data.py:9', 6), told(50, ticks=6), told(50, ticks=6)], r'^rank 0 on h stands somewhere else .* in data.py:9'),
    ([told(50, ticks=6)] * 3, 'All ranks are at step 10.*the network')])
def test_the_rank_that_others_wait_for_is_found(after, part):
    before = {r: {**a, 'ticks': 5} for r, a in enumerate(after)}
    assert re.search(part, diagnose(before, dict(enumerate(after))))


# -- checkpoints -------------------------------------------------------------------------------------------------------

def test_torn_and_damaged_checkpoints_are_passed_over_with_a_message(tmp_path, tiny_data, capsys):
    train(tmp_path / 'run', tiny_data)
    folder = tmp_path / 'run/ckpt'
    newest = folder / 'step_000012'
    shard = next(newest.glob('*.distcp'))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert checkpoint.find_checkpoint(str(tmp_path / 'run')).endswith('step_000008')
    assert f'step_000012 is damaged ({shard.name} has {len(content) - 1:,} bytes, not {len(content):,})' in capsys.readouterr().out
    shard.unlink()
    assert checkpoint.find_checkpoint(str(tmp_path / 'run')).endswith('step_000008')
    assert f'{shard.name} is missing' in capsys.readouterr().out
    with pytest.raises(BadInput, match='damaged.*Others here: step_000008'):
        checkpoint.find_checkpoint(str(newest))
    (newest / 'manifest.json').unlink()
    m = train(tmp_path / 'run', tiny_data, resume=True, max_steps=12)                # goes on from step 8
    assert 'step_000012 was never finished, and is passed over' in capsys.readouterr().out and max(m) == 12
    assert checkpoint.complete_checkpoints(str(folder)) == ['step_000008', 'step_000012']
    for name in ('step_000008', 'step_000012'):
        next((folder / name).glob('*.distcp')).unlink()
    with pytest.raises(BadInput, match='every checkpoint .* is damaged'):
        train(tmp_path / 'run', tiny_data, resume=True)


def test_checkpoints_that_are_kept(tmp_path, tiny_data):
    train(tmp_path / 'run', tiny_data, max_steps=11, save_interval=1, keep_last=2, keep_every=4)
    assert checkpoint.complete_checkpoints(str(tmp_path / 'run/ckpt')) == ['step_000004', 'step_000008', 'step_000010', 'step_000011']


def test_a_run_in_an_object_store_is_the_same_and_goes_on(tmp_path, tiny_data, monkeypatch):
    monkeypatch.setattr(storage, 'MIRRORS', str(tmp_path / 'mirrors'))
    train(tmp_path / 'whole', tiny_data)

    def go(**more):
        command = train_command('memory://bucket/run', tiny_data, **more)
        assert run_here(command) == 0
    go(max_steps=8, schedule='linear')
    shutil.rmtree(tmp_path / 'mirrors')                                              # another machine has none of it
    assert 'metrics.jsonl' in storage.names('memory://bucket/run') and storage.names('memory://bucket/run/ckpt') == ['latest', 'step_000004', 'step_000008']
    with pytest.raises(BadInput, match='already holds a run'):
        go()
    storage.write('memory://bucket/run/ckpt/step_000099/state.json', b'{}')          # torn
    with pytest.raises(BadInput, match='step 8, beyond the 6 steps'):
        go(resume=True, max_steps=6)
    train(tmp_path / 'part', tiny_data, max_steps=8)
    train(tmp_path / 'part', tiny_data, resume=True)
    go(resume=True)
    folder = storage.download('memory://bucket/run')
    a, b = metrics(tmp_path / 'part'), metrics(folder)
    assert {s: a[s]['train/loss'] for s in range(12)} == {s: b[s]['train/loss'] for s in range(12)}
    other = train(tmp_path / 'next', tiny_data, init_from='memory://bucket/run', max_steps=1)      # its weights are found there, too
    assert other[0]['val/loss'] == pytest.approx(b[12]['val/loss'], rel=1e-6)


def test_two_ranks_write_to_a_store_and_one_reads_it(tmp_path, data, monkeypatch):  # noqa: F811
    monkeypatch.setattr(storage, 'MIRRORS', str(tmp_path / 'mirrors'))
    url, knobs = f'file://{tmp_path}/store/run', dict(schedule='constant', **HEADS)
    done = run_ranks(train_command(url, data, ranks=2, tp=2, max_steps=4, async_save=True, **knobs), 2)
    assert done.returncode == 0, done.stdout
    assert run_here(train_command(url, data, resume=True, **knobs)) == 0
    whole = train(tmp_path / 'whole', data, **knobs)
    assert_equal_runs(whole, metrics(storage.download(url)))


def test_a_store_without_its_driver_is_one_sentence():
    with pytest.raises(BadInput, match="'nowhere://x' cannot be reached"):
        storage.names('nowhere://x')


def test_background_saves_under_tensor_parallelism_hold_the_same(tmp_path, data):  # noqa: F811
    knobs = dict(ranks=2, tp=2, max_steps=6, save_interval=2, **HEADS)
    train(tmp_path / 'sync', data, async_save=False, **knobs)
    m = train(tmp_path / 'async', data, async_save=True, **knobs)
    assert_same_run(tmp_path / 'sync', tmp_path / 'async')
    assert 0 < m[2]['system/save_ms'] < 60_000


# -- a trace -----------------------------------------------------------------------------------------------------------

def test_profile_writes_a_trace_of_the_steps(tmp_path, tiny_data):
    train(tmp_path / 'run', tiny_data, profile=True)
    trace = json.loads((tmp_path / 'run/trace.json').read_text())
    names = {e.get('name') for e in trace['traceEvents']}
    assert any('mm' in str(n) for n in names) and {'ProfilerStep#4', 'ProfilerStep#6'} <= names
