"""tools/sweep.py: its mixtures, its runs (a killed sweep goes on), its phases, and what tools/mixing_laws.py reads of them."""
import fcntl
import json
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from configurator import BadInput
from tests.conftest import ROOT, SHARED, TINY, metrics, run, run_here
from tools.sweep import dirichlet_mixtures, grid_mixtures, train_config

KNOBS = {**TINY, 'sources': {'a': 1.0, 'b': 1.0}, 'max_steps': 12, 'eval_interval': 12, 'save_interval': 100, 'mixture_interval': 6, 'mixture_warmup': 0,
         'mixture_rows': 4, 'aioli_sweeps': 1, 'aioli_steps': 1, 'one_hot_factor': 0.75}


def command(data, out, *own, **knobs):
    return [sys.executable, 'tools/sweep.py', *own, f'--out={out}', '--threads=1', *(f'--{k}={v}' for k, v in {**KNOBS, 'data_dir': data, **knobs}.items())]


def test_dirichlet_mixtures_fill_the_simplex():
    p = dirichlet_mixtures(9, 3, 0)
    rng = np.random.default_rng(1)

    def closest(p):
        d = ((p[:, None] - p[None]) ** 2).sum(2)
        return np.sqrt(d[np.triu_indices(len(p), 1)].min())
    assert p.shape == (9, 3) and p.sum(1) == pytest.approx(1) and (p > 0).all()
    assert closest(p) > 2 * np.median([closest(rng.dirichlet([1.5] * 3, 9)) for _ in range(50)])
    published = SHARED.parent / 'reference' / 'aioli_law_params.json'
    if published.is_file():                     # as far apart as the published ones of the same recipe
        theirs = [closest(np.array(mixtures)) for mixtures in json.loads(published.read_text())['dirichlet_mixtures']['k3_n9']]
        assert min(theirs) * 0.7 < np.mean([closest(dirichlet_mixtures(9, 3, s)) for s in range(5)]) < max(theirs) * 1.3


def test_grids():
    assert grid_mixtures(9, 2)[:, 0] == pytest.approx(np.arange(1, 10) / 10)
    p = grid_mixtures(9, 3)
    assert len(p) == 10 and p.min() == pytest.approx(1 / 6) and p.sum(1) == pytest.approx(1)


def test_train_pys_knobs_are_checked_before_anything_runs(tmp_path, tiny_data):
    assert train_config(['--max_steps=7'])['max_steps'] == 7
    for extra, part in (('--max_stepz=3', "unknown name 'max_stepz'"), ('--m=3', 'm = 3, and the config has 2 sources'), ('--break_step=11', 'go beyond the 12 steps'),
                        ('--out_dir=x', 'tools/sweep.py sets that')):
        with pytest.raises(BadInput, match=re.escape(part)):
            run_here([*command(tiny_data, tmp_path / 'out', 'mixture'), extra])
    assert not (tmp_path / 'out').exists()


def test_children_continue_a_methods_run_after_a_kill(tmp_path, tiny_data):
    """A sweep is killed with its runs; the same command goes on, and a child is its parent's trajectory with other weights."""
    sweep = command(tiny_data, tmp_path / 'out', 'mixture', '--method=aioli', '--break_step=8', '--child_steps=3', '--n=4', '--jobs=2')
    process = subprocess.Popen(sweep, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list((tmp_path / 'out').glob('children/*/log.txt')) and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.wait()
    done = run(sweep)
    assert done.returncode == 0, done.stderr
    children = sorted((tmp_path / 'out' / 'children').iterdir())
    assert len(children) == 4
    for folder in children:
        config, records = json.loads((folder / 'config.json').read_text()), metrics(folder)
        assert min(records) == 8 and max(records) == 11 and 'val/loss' in records[11]
        assert records[8]['mixture/weight_a'] == pytest.approx(config['sources']['a'], abs=1e-5)
        assert records[8]['train/learning_rate'] == pytest.approx(0.01 * (0.1 + 0.9 * (1 - 6 / 10)))          # the schedule of the whole run
    assert run_here(['tools/mixing_laws.py', 'a-star', str(tmp_path / 'out' / 'children')]) is None
    assert run_here(['tools/mixing_laws.py', 'sim', str(tmp_path / 'out' / 'children')]) is None
    assert run_here(['tools/mixing_laws.py', 'plot', str(tmp_path / 'out' / 'children')]) is None
    found = json.loads((tmp_path / 'out' / 'children' / 'sim.json').read_text())['aioli']
    assert -1 <= found['sim'] <= 1 and found['between_seeds'] is None
    assert run_here(['tools/mixing_laws.py', 'plot', str(tmp_path / 'out')]) is None           # the weights of the methods' runs
    assert (tmp_path / 'out' / 'weights.png').stat().st_size > 10_000


def test_phases_leave_a_config_that_train_py_takes(tmp_path, tiny_data):
    done = run(command(tiny_data, tmp_path / 'out', 'method', '--method=doremi'))
    assert done.returncode == 0, done.stderr
    weights = train_config([str(tmp_path / 'out' / 'mixture.py')])['sources']
    last = metrics(tmp_path / 'out' / 'proxy')[11]
    assert weights == pytest.approx({name: last[f'mixture/average_{name}'] for name in 'ab'}, abs=1e-6)
    cost = json.loads((tmp_path / 'out' / 'cost.json').read_text())['share_of_this_run']
    assert cost == pytest.approx(1 + 1 + 1 / 3, rel=0.01)        # the reference, the proxy, and the reference's forward beside it
    run_here(command(tiny_data, tmp_path / 'skillit', 'method', '--method=skillit', log_interval=5))
    graph = json.loads((tmp_path / 'skillit' / 'graph.json').read_text())['graph']
    only_a = metrics(tmp_path / 'skillit' / 'only_a')                                   # of step 0 there is no log, but a loss
    assert graph[0][1] == pytest.approx(1 - only_a[12]['val/loss_b'] / only_a[0]['val/loss_b'])
    run_here([*command(tiny_data, tmp_path / 'slurm', 'mixture', '--n=4'), '--slurm=True'])
    assert len((tmp_path / 'slurm' / 'first.txt').read_text().splitlines()) == 4
    assert 'SLURM_ARRAY_TASK_ID' in (tmp_path / 'slurm' / 'first.sh').read_text()


def test_every_config_file_of_a_folder_is_an_arm(tmp_path, tiny_data):
    (tmp_path / 'arms').mkdir()
    for name, text in (('one', 'learning_rate = 1e-3'), ('two', 'learning_rate = 2e-3'), ('_part', 'nonsense')):
        (tmp_path / 'arms' / f'{name}.py').write_text(text)
    (tmp_path / 'base.py').write_text('learning_rate = 5e-3\nmax_steps = 7')
    knobs = [f'--{k}={v}' for k, v in {**KNOBS, 'data_dir': tiny_data}.items() if k not in ('learning_rate', 'max_steps')]
    run_here(['tools/sweep.py', 'configs', str(tmp_path / 'arms'), '--seeds=[3, 4]', '--slurm=True', f'--out={tmp_path / "out"}', str(tmp_path / 'base.py'), *knobs])
    lines = [shlex.split(line) for line in (tmp_path / 'out' / 'first.txt').read_text().splitlines()]
    found = [train_config(line[2:]) for line in lines]
    assert [(c['learning_rate'], c['seed'], c['max_steps']) for c in found] == [(1e-3, 3, 7), (2e-3, 3, 7), (1e-3, 4, 7), (2e-3, 4, 7)]
    with pytest.raises(BadInput, match='has no config file in it'):
        run_here(['tools/sweep.py', 'configs', str(tmp_path / 'out'), *knobs])


def test_a_finished_run_with_other_knobs_does_not_pass_for_this_one(tmp_path, tiny_data):
    sweep = command(tiny_data, tmp_path / 'out', 'mixture', '--n=1', max_steps=2)
    done = run(sweep)
    assert done.returncode == 0, done.stderr
    with pytest.raises(BadInput, match='mix00_seed0.* holds a run with other knobs: learning_rate 0.01 there, 0.02 now'):
        run_here([*sweep, '--learning_rate=0.02'])
    log = open(tmp_path / 'out' / 'mix00_seed0' / 'log.txt', 'a')
    fcntl.flock(log, fcntl.LOCK_EX)                          # as a run does that outlived its sweep
    (tmp_path / 'out' / 'mix00_seed0' / 'metrics.jsonl').unlink()
    with pytest.raises(BadInput, match='is being trained by another process'):
        run_here(sweep)


def test_what_a_sweep_cannot_do_is_said(tmp_path, tiny_data):
    for own, knobs, part in ((('method', '--method=doremi', '--slurm=True'), {}, 'phases wait for each other'), (('method', '--method=aioli'), {}, 'needs no other run'),
                             (('method', '--method=doreme'), {}, 'must be one of skillit, doge, doremi, dml, regmix'), (('mixture',), dict(epochs=1.0), 'no epochs'),
                             (('mixture', '--method=skillit', '--break_step=4', '--child_steps=2', '--slurm=True'), {}, 'Submit this command itself')):
        with pytest.raises(BadInput, match=part):
            run_here(command(tiny_data, tmp_path / 'out', *own, **knobs))
