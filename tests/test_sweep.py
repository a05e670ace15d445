"""tools/sweep.py: mixtures, runs, a sweep that is killed, phases, and what mixing_laws.py reads."""
import fcntl
import json
import re
import shlex
import signal
import subprocess
import sys
import time

from tests.conftest import need

need('scipy', 'matplotlib')

import numpy as np
import pytest

from configurator import BadInput
from tests.conftest import ROOT, SHARED, TINY, metrics, run, run_here
from tools import mixing_laws, regmix
from tools.mixture_reuse import KEPT
from tools.runs import Row, Table
from tools.sweep import (
    Search,
    default_n,
    dirichlet_mixtures,
    fitted_mixture,
    grid_mixtures,
    make_design,
    matched_rows,
    olmix_limits,
    train_config,
)

KNOBS = {
    **TINY, 'sources': {'a': 1.0, 'b': 1.0}, 'max_steps': 12, 'eval_interval': 12,
    'save_interval': 100, 'mixture_interval': 6, 'mixture_warmup': 0, 'mixture_rows': 4,
    'aioli_sweeps': 1, 'aioli_steps': 1, 'one_hot_factor': 0.75}


def as_arguments(knobs):
    return [f'--{key}={value}' for key, value in knobs.items()]


def command(data, out, *own, **knobs):
    """A command of sweep.py on the tiny model. own: its command and its own arguments."""
    theirs = as_arguments({**KNOBS, 'data_dir': data, **knobs})
    return [sys.executable, 'tools/sweep.py', *own, f'--out={out}', '--threads=1', *theirs]


def closest(p):
    """The smallest distance between two mixtures."""
    distance = ((p[:, None] - p[None]) ** 2).sum(2)
    return np.sqrt(distance[np.triu_indices(len(p), 1)].min())


def test_dirichlet_mixtures_fill_the_simplex():
    p = dirichlet_mixtures(9, 3, 0)
    assert p.shape == (9, 3) and p.sum(1) == pytest.approx(1) and (p > 0).all()
    rng = np.random.default_rng(1)
    random = [closest(rng.dirichlet([1.5] * 3, 9)) for _ in range(50)]
    assert closest(p) > 2 * np.median(random)
    # The mixtures are as far apart as the published ones of the same recipe.
    published = SHARED.parent / 'reference' / 'aioli_law_params.json'
    if published.is_file():
        found = json.loads(published.read_text())['dirichlet_mixtures']['k3_n9']
        theirs = [closest(np.array(mixtures)) for mixtures in found]
        ours = np.mean([closest(dirichlet_mixtures(9, 3, seed)) for seed in range(5)])
        assert min(theirs) * 0.7 < ours < max(theirs) * 1.3


def test_grids():
    assert grid_mixtures(9, 2)[:, 0] == pytest.approx(np.arange(1, 10) / 10)
    p = grid_mixtures(9, 3)
    assert len(p) == 10 and p.min() == pytest.approx(1 / 6) and p.sum(1) == pytest.approx(1)
    assert len({tuple(mixture) for mixture in grid_mixtures(20, 6)}) == 21


@pytest.mark.parametrize('argument, message', [
    ('--max_stepz=3', "unknown name 'max_stepz'"),
    ('--m=3', 'm = 3, and the config has 2 sources'),
    ('--break_step=11', 'go beyond the 12 steps'),
    ('--out_dir=x', 'tools/sweep.py sets that')])
def test_arguments_are_checked_before_anything_runs(tmp_path, tiny_data, argument, message):
    with pytest.raises(BadInput, match=re.escape(message)):
        run_here([*command(tiny_data, tmp_path / 'out', 'mixture'), argument])
    assert not (tmp_path / 'out').exists()


def test_children_continue_a_methods_run_after_a_kill(tmp_path, tiny_data):
    """A sweep is killed with its runs, and the same command continues it.

    A child is its parent's trajectory with other weights.
    """
    out = tmp_path / 'out'
    sweep = command(
        tiny_data, out, 'mixture', '--method=aioli', '--break_step=8', '--child_steps=3', '--n=3',
        '--jobs=2')
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(sweep, cwd=ROOT, **silent)
    deadline = time.time() + 120
    while not list(out.glob('children/*/log.txt')) and process.poll() is None:
        assert time.time() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.wait()
    done = run(sweep)
    assert done.returncode == 0, done.stderr
    children = sorted((out / 'children').iterdir())
    assert len(children) == 3
    for folder in children:
        config = json.loads((folder / 'config.json').read_text())
        records = metrics(folder)
        assert min(records) == 8 and max(records) == 11 and 'val/loss' in records[11]
        share = config['sources']['a']
        assert records[8]['mixture/weight_a'] == pytest.approx(share, abs=1e-5)
        # The learning rate follows the schedule of the full run.
        expected = 0.01 * (0.1 + 0.9 * (1 - 6 / 10))
        assert records[8]['train/learning_rate'] == pytest.approx(expected)
    for law in ('a-star', 'sim', 'plot'):
        assert run_here(['tools/mixing_laws.py', law, str(out / 'children')]) is None
    found = json.loads((out / 'children' / 'sim.json').read_text())['aioli']
    assert -1 <= found['sim'] <= 1 and found['between_seeds'] is None
    # The figure of a folder of methods shows the weights of their runs.
    assert run_here(['tools/mixing_laws.py', 'plot', str(out)]) is None
    assert (out / 'weights.png').stat().st_size > 10_000


def test_phases_leave_a_config_that_train_py_takes(tmp_path, tiny_data):
    """The proxies have a part of the sources and of the learning rate, the result has not."""
    done = run(command(
        tiny_data, tmp_path / 'out', 'method', '--method=doremi', '--match_repetition=7680',
        '--proxy_lr_frac=0.1'))
    assert done.returncode == 0, done.stderr
    for name in ('reference', 'proxy'):
        config = json.loads((tmp_path / 'out' / name / 'config.json').read_text())
        # 12 steps of 64 tokens are a tenth of 7,680 tokens, and 25 a tenth of 248 rows.
        assert config['source_rows'] == {'a': 25, 'b': 25} and config['learning_rate'] == 0.001
    config = train_config([str(tmp_path / 'out' / 'mixture.py')])
    default = train_config([])
    for name in ('source_rows', 'learning_rate'):
        assert config[name] == default[name]
    weights = config['sources']
    last = metrics(tmp_path / 'out' / 'proxy')[11]
    averages = {name: last[f'mixture/average_{name}'] for name in 'ab'}
    assert weights == pytest.approx(averages, abs=1e-6)
    # The cost is the reference, the proxy, and the reference's forward pass beside the proxy.
    cost = json.loads((tmp_path / 'out' / 'cost.json').read_text())
    assert cost['share_of_this_run'] == pytest.approx(1 + 1 + 1 / 3, rel=0.01)
    assert cost['match_repetition'] == 7680
    assert cost['share_of_target_run'] == pytest.approx(cost['share_of_this_run'] / 10)

    run_here(command(tiny_data, tmp_path / 'skillit', 'method', '--method=skillit', log_interval=5))
    graph = json.loads((tmp_path / 'skillit' / 'graph.json').read_text())['graph']
    only_a = metrics(tmp_path / 'skillit' / 'only_a')
    assert graph[0][1] == pytest.approx(1 - only_a[12]['val/loss_b'] / only_a[0]['val/loss_b'])


def test_a_proxy_repeats_its_sources_as_the_target_run_will(tiny_data):
    """For any weights, the epochs of a source are those of the target run to rounding."""
    arguments = as_arguments({**KNOBS, 'data_dir': tiny_data})
    config = train_config(arguments)
    rows = matched_rows(config, ['a', 'b'], 768, 4 * 768)
    for share in (0.1, 0.5, 0.9):
        in_proxy = share * 768 / 16 / rows['a']
        in_target = share * 4 * 768 / 16 / 248
        assert in_proxy == pytest.approx(in_target, rel=0.01)
    # A batch has 4 rows, and 248 * 768 / 48,000 rounds to that.
    assert matched_rows(config, ['a'], 768, 48_000) == {'a': 4}
    with pytest.raises(BadInput, match="leaves 3 of the 248 rows of source 'a'.* on 1,033 tokens"):
        matched_rows(config, ['a'], 768, 64_000)
    with pytest.raises(BadInput, match='match_repetition = 768 tokens, and a run .* on 768'):
        matched_rows(config, ['a'], 768, 768)


def test_all_runs_of_a_sweep_have_the_knobs_of_proxies(tmp_path, tiny_data):
    """Children continue their parents' data, so both have the rows for a child's last step."""
    out = tmp_path / 'out'
    options = [
        '--n=2', '--break_step=4', '--child_steps=2', '--slurm=True', '--match_repetition=3840',
        '--proxy_lr_frac=0.5']
    run_here(command(tiny_data, out, 'mixture', *options))
    lines = (out / 'first.txt').read_text() + (out / 'then.txt').read_text()
    for line in lines.splitlines():
        config = train_config(shlex.split(line)[2:])
        assert config['source_rows'] == {'a': 25, 'b': 25} and config['learning_rate'] == 0.005
    assert len(lines.splitlines()) == 2 + 4


def test_the_number_of_runs_is_linear_in_the_sources(tmp_path, tiny_data):
    assert [default_n(m, '') for m in (2, 3, 24)] == [9, 12, 75]
    assert [default_n(m, 'regmix') for m in (2, 24)] == [20, 75]
    run_here(command(tiny_data, tmp_path / 'out', 'mixture', '--slurm=True'))
    assert len((tmp_path / 'out' / 'first.txt').read_text().splitlines()) == 9


def table_of_laws(n=24):
    """Runs of two sources by a law: more of a source lowers its own loss. Half-way and at the end
    of 12 steps, 'a' counts more, then less.
    """
    rows = []
    for i, (a, b) in enumerate(dirichlet_mixtures(n, 2)):
        loss = np.array([1 + np.exp(1 - 3 * a), 2 + np.exp(0.2 - b)])
        middle = np.array([4 - a, 4 - 0.1 * b])
        records = []
        for step, losses in ((0, [5.0, 5.0]), (6, middle), (12, loss)):
            named = {f'val/loss_{name}': x for name, x in zip('ab', losses, strict=True)}
            records.append(dict(step=step, **named))
        rows.append(Row(f'run{i}', np.array([a, b]), loss, records=records))
    return Table(['a', 'b'], ['a', 'b'], rows)


def test_methods_that_fit_runs_end_with_knobs_of_train_py(tmp_path, tiny_data, monkeypatch):
    # The search of 100,000 mixtures takes 8 s.
    monkeypatch.setattr(regmix.regmix_d, '__defaults__', (2000,))
    # So do the intervals of 100 bootstrap samples.
    monkeypatch.setattr(mixing_laws.bootstrap_laws, '__defaults__', (None, 4))
    table = table_of_laws()
    config = train_config(as_arguments({**KNOBS, 'data_dir': tiny_data, 'max_epochs': 4.0}))
    free = fitted_mixture(table, 'dml', Search('', 2, {}), str(tmp_path))['sources']
    # A source of 248 rows of 16 tokens is at most 4 * 3,968 of 20,000 tokens.
    found = {}
    for kl in (0.0, 100.0):
        search = Search('', 2, olmix_limits(config, ['b', 'a'], kl, 20_000))
        knobs = fitted_mixture(table, 'olmix', search, str(tmp_path))
        assert knobs['mixture'] == 'fixed'
        found[kl] = knobs['sources']
    assert free['a'] > 0.6
    cap = 4 * 3968 / 20_000
    assert found[0.0]['a'] == pytest.approx(min(free['a'], cap), abs=1e-3)
    assert found[100.0]['a'] == pytest.approx(0.5, abs=0.01)        # both are equally large
    with pytest.raises(BadInput, match='4 epochs of all sources are'):
        olmix_limits(config, ['a', 'b'], 0.0, 1_000_000)
    # For one source's loss alone its share goes to the cap.
    search = Search('b', 2, olmix_limits(config, ['a', 'b'], 0.0, 20_000))
    alone = fitted_mixture(table, 'olmix', search, str(tmp_path))['sources']
    assert alone['b'] == pytest.approx(cap, abs=1e-3)

    knobs = fitted_mixture(table, 'regmix_d', Search('', 2, {}), str(tmp_path))
    assert knobs == dict(mixture='schedule', mixture_schedule=str(tmp_path / 'schedule.json'))
    schedule = json.loads((tmp_path / 'schedule.json').read_text())
    assert [point['share'] for point in schedule['points']] == [0.0, 0.5]
    # In the first half 'a' gives 10 times as much.
    assert schedule['points'][0]['weights']['a'] > 0.8


def test_a_sweep_that_reuses_another_keeps_ratios(tmp_path):
    plan = tmp_path / 'recompute.json'
    plan.write_text(json.dumps(dict(frozen={'a': 0.75, 'b': 0.25}, sources=[KEPT, 'c'])))
    design = make_design('dirichlet', None, [0], ['c', 'a', 'b'], '', str(plan))
    mixtures = design.mixtures(['c', 'a', 'b'], 0)
    assert len(mixtures) == 9           # of two sources, not of three
    for mixture in mixtures:
        assert list(mixture) == ['c', 'a', 'b']
        assert sum(mixture.values()) == pytest.approx(1, abs=2e-6)
        assert mixture['a'] == pytest.approx(3 * mixture['b'], abs=4e-6)
    assert len({mixture['c'] for mixture in mixtures}) == 9
    with pytest.raises(BadInput, match='do not have the same sources: only one has c'):
        make_design('dirichlet', None, [0], ['a', 'b'], '', str(plan))


def test_slurm_scripts_hold_every_run(tmp_path, tiny_data):
    out = tmp_path / 'out'
    options = ['--n=4', '--break_step=4', '--child_steps=2', '--slurm=True']
    run_here(command(tiny_data, out, 'mixture', *options))
    assert len((out / 'first.txt').read_text().splitlines()) == 4
    children = (out / 'then.txt').read_text().splitlines()
    assert len(children) == 16 and '--stop_step=6' in children[0]
    assert 'SLURM_ARRAY_TASK_ID' in (out / 'first.sh').read_text()


def test_every_config_file_of_a_folder_is_an_arm(tmp_path, tiny_data):
    arms = tmp_path / 'arms'
    arms.mkdir()
    (arms / 'one.py').write_text('learning_rate = 1e-3')
    (arms / 'two.py').write_text('learning_rate = 2e-3')
    (arms / '_part.py').write_text('nonsense')
    (tmp_path / 'base.py').write_text('learning_rate = 5e-3\nmax_steps = 7')
    knobs = {**KNOBS, 'data_dir': tiny_data}
    del knobs['learning_rate']
    del knobs['max_steps']
    knobs = as_arguments(knobs)
    run_here([
        'tools/sweep.py', 'configs', str(arms), '--seeds=[3, 4]', '--slurm=True',
        f'--out={tmp_path / "out"}', str(tmp_path / 'base.py'), *knobs])
    found = []
    for line in (tmp_path / 'out' / 'first.txt').read_text().splitlines():
        config = train_config(shlex.split(line)[2:])
        found.append((config['learning_rate'], config['seed'], config['max_steps']))
    assert found == [(1e-3, 3, 7), (2e-3, 3, 7), (1e-3, 4, 7), (2e-3, 4, 7)]
    with pytest.raises(BadInput, match='has no config file in it'):
        run_here(['tools/sweep.py', 'configs', str(tmp_path / 'out'), *knobs])


def test_a_finished_run_with_other_knobs_is_not_taken_for_this_one(tmp_path, tiny_data):
    sweep = command(tiny_data, tmp_path / 'out', 'mixture', '--n=1', max_steps=2)
    done = run(sweep)
    assert done.returncode == 0, done.stderr
    message = 'mix00_seed0.* holds a run with other knobs: learning_rate 0.01 there, 0.02 now'
    with pytest.raises(BadInput, match=message):
        run_here([*sweep, '--learning_rate=0.02'])
    # The knob weight_decay came after this run, which therefore had its default.
    folder = tmp_path / 'out' / 'mix00_seed0'
    config = json.loads((folder / 'config.json').read_text())
    default = config.pop('weight_decay')
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(BadInput, match=f'weight_decay {default} there, 0.5 now'):
        run_here([*sweep, '--weight_decay=0.5'])
    run_here(sweep)
    # A run that outlived its sweep holds the lock on its log.
    (folder / 'metrics.jsonl').unlink()
    with open(folder / 'log.txt', 'a') as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match='is being trained by another process'):
            run_here(sweep)


@pytest.mark.parametrize('own, knobs, message', [
    (['method', '--method=doremi', '--slurm=True'], {}, 'phases wait for each other'),
    (['method', '--method=aioli'], {}, 'needs no other run'),
    (['method', '--method=unimax'], {}, 'train.py --mixture=unimax. needs no other run'),
    (['method', '--method=regmix', '--n=9', '--seeds=[0, 1]'], {}, '20 runs or more, .* makes 18'),
    (['mixture', '--match_repetition=700'], {}, 'match_repetition = 700 tokens'),
    (['mixture', '--match_repetition=7680'], dict(source_rows={'a': 9}), 'sets source_rows'),
    (['mixture', '--proxy_lr_frac=0'], {}, 'proxy_lr_frac = 0.0 must'),
    (['method', '--method=doreme'], {}, 'must be one of skillit, doge, doremi, dml, olmix'),
    (['method', '--method=regmix_d'], {}, '4 stages need 5 .* eval_interval = 12 makes 2'),
    (['mixture', '--method=aioli'], {}, 'needs --break_step'),
    (['mixture'], dict(epochs=1.0), 'no epochs'),
    (['mixture', '--method=skillit', '--break_step=4', '--child_steps=2', '--slurm=True'], {},
     'Submit this command itself')])
def test_an_impossible_sweep_is_refused(tmp_path, tiny_data, own, knobs, message):
    with pytest.raises(BadInput, match=message):
        run_here(command(tiny_data, tmp_path / 'out', *own, **knobs))


@pytest.mark.parametrize('arguments, message', [
    ('bogus', "unknown command 'bogus'. Commands are arch, grid"),
    ('grid --grid.learning_rate=["a"]', "learning_rate must be float, got str 'a'"),
    ('grid --grid.learning_rate=[-1]', 'learning_rate = -1.0 must be at least 0'),
    ('grid --grid.learning_rate=[1,1]', 'has a value twice'),
    ('grid --grid.seed=[1,2]', 'See --seeds'),
    ('grid --seeds=[] --grid.learning_rate=[1]', 'seeds = '),
    ('grid --seeds=[0,0] --grid.learning_rate=[1]', 'seeds = '),
    ('grid --seeds=[-1] --grid.learning_rate=[1]', 'seeds = '),
    ('grid --jobs=0', 'jobs = 0 must be at least 1'),
    ('grid --threads=0', 'threads = 0 must be at least 1'),
    ('grid --out= --grid.learning_rate=[1]', 'out is empty'),
    ('arch --heads=["a"]', 'heads = .* whole numbers above 0'),
    ('arch --ffn_ratios=[0]', 'ffn_ratios = .* numbers above 0'),
    ('arch --n_params=[5]', 'must be .fewest, most. parameters'),
    ('mixture --method=nope --break_step=2', "mixture = 'nope' must be one of"),
    ('mixture --n=0', 'n = 0 must be at least 1'),
    ('mixture --break_step=0', 'break_step = 0 must be at least 1'),
    ('method --method=regmix --target=c', "target = 'c' is none of the sources a, b"),
    ('method --method=dml --dry_run=True', 'dry_run is not for method'),
])
def test_a_mistake_is_noticed_before_the_first_run(tmp_path, tiny_data, arguments, message):
    name, *own = arguments.split()
    with pytest.raises(BadInput, match=message):
        run_here([*command(tiny_data, tmp_path / 'out', name), *own])
    assert not list(tmp_path.glob('out/*_seed*'))


def test_a_knob_without_effect_is_said(tmp_path, capsys):
    command = ['tools/sweep.py', 'arch', '--heads=[4]', '--ffn_ratios=[1]', '--dry_run=True']
    run_here([*command, '--unit=flops', f'--out={tmp_path}'])
    assert 'warning: --unit has no effect with arch.' in capsys.readouterr().err
