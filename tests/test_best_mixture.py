"""The best mixture: KL, caps, columns that do not vary, intervals, CSV pairs, schedules, reuse."""
import json

from tests.conftest import need

need('scipy', 'sklearn')

import numpy as np
import pytest
from scipy.optimize import minimize

from configurator import BadInput
from tests.conftest import SHARED, run_here
from tools import mixing_laws as laws
from tools import regmix
from tools.best_mixture import (
    Recipe,
    edges,
    find_columns,
    interval,
    kl_of,
    make_recipe,
    optimum,
    rarely_used,
)
from tools.mixture_reuse import KEPT, expand_mixture, plan_reuse, read_plan, runs_for
from tools.regmix import prior_of, read_curves, regmix_d, regmix_d_runs
from tools.runs import Row, Table, read_table, sizes_of

SWARM = SHARED.parent / 'reference' / 'olmix' / 'dclm_127_runs.json'


def random_laws(m, k, seed, scale=2.0):
    rng = np.random.default_rng(seed)
    return [laws.Law(2.0, rng.normal(-0.5, 0.3), rng.normal(0, scale, m - 1)) for _ in range(k)]


def objective(found, kl, natural, p):
    return np.mean([law(p) for law in found]) + kl * kl_of(p, natural)


# -- the optimum ---------------------------------------------------------------------------------


@pytest.mark.parametrize('m', [2, 5, 100])
@pytest.mark.parametrize('kl', [1e-4, 0.02, 1.0])
def test_the_optimum_with_kl_meets_its_conditions(m, kl):
    """At the minimum, the derivative by every share inside the bounds is the same number."""
    natural = np.random.default_rng(m).dirichlet(np.full(m, 2.0))
    found = random_laws(m, 3, m)
    p = optimum(found, Recipe(kl, natural))
    assert p.sum() == pytest.approx(1, abs=1e-12) and (p >= 0).all()
    slope = np.mean([np.exp(law.log_b + p[:-1] @ law.s) * np.r_[law.s, 0] for law in found], 0)
    inside = p > 1e-6
    assert np.ptp(slope[inside] + kl * np.log(p[inside] / natural[inside])) < 1e-6
    # No other mixture is better: those of random points, and of points close by.
    best = objective(found, kl, natural, p)
    for other in np.random.default_rng(0).dirichlet(np.ones(m), 50):
        for t in (1e-3, 0.1, 1):
            assert objective(found, kl, natural, p + t * (other - p)) >= best - 1e-12


@pytest.mark.parametrize('kl', [0.0, 0.02])
def test_the_optimum_with_caps_is_that_of_another_solver(kl):
    m = 8
    natural = np.random.default_rng(1).dirichlet(np.full(m, 2.0))
    found = random_laws(m, 2, 3)
    caps = np.array([0.1, 0.3, 0.05, 0.4, 0.2, 0.12, 0.15, 0.2])
    p = optimum(found, Recipe(kl, natural, caps))
    assert (p <= caps + 1e-12).all() and p.sum() == pytest.approx(1)

    def value(x):
        x = np.maximum(x, 1e-12)
        return 100 * objective(found, kl, natural, x / x.sum())

    is_one = dict(type='eq', fun=lambda x: x.sum() - 1)
    options = dict(bounds=list(zip(np.full(m, 1e-9), caps, strict=True)), constraints=is_one)
    others = []
    for start in np.random.default_rng(0).dirichlet(np.ones(m), 8):
        start = np.minimum(start, caps)
        others.append(minimize(
            value, start, method='SLSQP', options=dict(ftol=1e-14, maxiter=500), **options).fun)
    assert value(p) <= min(others) + 1e-7
    assert value(p) == pytest.approx(min(others), abs=1e-5)
    assert p[5] == pytest.approx(0.12, abs=1e-6)


def test_a_strong_kl_gives_the_natural_shares_and_none_gives_the_corner():
    natural = np.array([0.1, 0.2, 0.3, 0.4])
    found = random_laws(4, 2, 0)
    assert optimum(found, Recipe(1e4, natural)) == pytest.approx(natural, abs=1e-4)
    corner = optimum(found)
    assert optimum(found, Recipe(0.0, natural)).tolist() == corner.tolist()
    assert optimum(found, Recipe(1e-7, natural)) == pytest.approx(corner, abs=1e-3)
    # A source that has no natural share gets none, and caps that leave one mixture give it.
    assert optimum(found, Recipe(0.02, np.array([0, 0.5, 0.5, 0])))[[0, 3]].tolist() == [0, 0]
    only = np.array([0.25, 0.25, 0.25, 0.25])
    assert optimum(found, Recipe(0.02, natural, only)) == pytest.approx(only)


def test_a_recipe_knows_its_shares_and_caps():
    names = ['a', 'b']
    assert make_recipe(names, 0.02, {}, None, None, None).source == 'equal shares'
    recipe = make_recipe(names, 0.02, {}, dict(b=300, a=100), 2, 400)
    assert recipe.natural.tolist() == [0.25, 0.75] and recipe.caps.tolist() == [0.5, 1.0]
    assert make_recipe(names, 0, dict(a=1, b=1), dict(a=1, b=3), None, None).natural[0] == 0.5
    for natural, sizes, epochs, tokens, message in (
            (dict(a=1), None, None, None, 'lacks b'),
            (dict(a=1, b=1, bb=1), None, None, None, "'bb', which is no source"),
            (dict(a=-1, b=1), None, None, None, 'numbers of 0 or more'),
            ({}, None, 4, 100, 'needs tokens'),
            ({}, dict(a=10, b=10), 4, None, 'needs tokens'),
            ({}, dict(a=10, b=10), 4, 100, 'fewer than the 100')):
        with pytest.raises(BadInput, match=message):
            make_recipe(names, 0.02, natural, sizes, epochs, tokens)


def test_the_sizes_of_sources_are_those_of_their_training_shards(tmp_path):
    for name, tokens in dict(a=300, b=100).items():
        shards = [
            dict(file=f'{split}/0.bin', split=split, tokens=n, sha256='0')
            for split, n in (('train', tokens), ('train', tokens), ('val', 7))]
        meta = dict(vocab_size=9, tokenizer=dict(bos_id=0, fingerprint='f'), shards=shards)
        (tmp_path / name).mkdir()
        (tmp_path / name / 'meta.json').write_text(json.dumps(meta))
    assert sizes_of(str(tmp_path), ['b', 'a']) == dict(b=200, a=600)
    assert sizes_of(str(tmp_path), ['b', 'a', 'c']) is None


# -- columns -------------------------------------------------------------------------------------


def test_columns_that_do_not_vary_are_held_and_fixed_ratios_are_one():
    rng = np.random.default_rng(0)
    q = rng.dirichlet([1.5] * 3, 30)
    names = ['a', 'none', 'b', 'c', 'tenth']
    # b and c are 0.3 and 0.7 of the second column; `tenth` always has 0.1.
    p = 0.9 * np.column_stack((q[:, 0], 0 * q[:, 0], 0.3 * q[:, 1], 0.7 * q[:, 1], q[:, 2]))
    p = np.column_stack((p, np.full(30, 0.1)))
    names.append('last')
    columns = find_columns(names, p)
    assert columns.members() == [['a'], ['b', 'c'], ['tenth']]
    assert columns.held == pytest.approx([0, 0, 0, 0, 0, 0.1])
    assert columns.reduce(p) == pytest.approx(0.9 * q)
    assert columns.expand(columns.reduce(p)) == pytest.approx(p)
    found = random_laws(3, 2, 5, scale=1.0)
    natural = np.array([0.1, 0.1, 0.3, 0.1, 0.2, 0.2])
    best = optimum(found, Recipe(0.05, natural), columns)
    assert best[1] == 0 and best[5] == pytest.approx(0.1) and best.sum() == pytest.approx(1)
    assert best[3] / best[2] == pytest.approx(7 / 3)
    # The KL term is that of all sources.
    value = []
    for other in (best, *(columns.expand(0.9 * r) for r in rng.dirichlet(np.ones(3), 200))):
        mean = np.mean([law(columns.reduce(other)) for law in found])
        value.append(mean + 0.05 * kl_of(other, natural))
    assert min(value) == value[0]
    same = find_columns('abc', q)
    assert same.reduce(q).tolist() == q.tolist() and same.held.tolist() == [0, 0, 0]


def test_sources_of_few_runs_are_flagged(tmp_path, capsys):
    rng = np.random.default_rng(0)
    runs = []
    for i in range(14):
        p = rng.dirichlet([1.5] * 3)
        p = [*(0.9 * p), 0.0, 0.1] if i == 5 else [*p, 0.0, 0.0]
        loss = [float(3 - p[0] + 0.2 * p[1] + rng.normal(0, 0.002))]
        runs.append(dict(p=[float(x) for x in p], loss=loss))
    groups = ['a', 'b', 'c', 'never', 'once']
    assert rarely_used(groups, [run['p'] for run in runs]) == dict(once=1)
    content = dict(groups=groups, evaluated=['loss'], runs=runs)
    (tmp_path / 't.json').write_text(json.dumps(content))
    run_here(['tools/mixing_laws.py', 'fit-static', str(tmp_path / 't.json')])
    out = capsys.readouterr().out
    assert 'never: the share is 0 in all runs' in out
    assert 'once: its share differs in 1 of 14 runs only' in out
    found = json.loads((tmp_path / 't_static.json').read_text())
    assert len(found['optimum']['p']) == 5 and found['optimum']['p'][3] == 0
    assert len(found['fits'][0]['A']) == 5 and found['optimum']['kl'] == 0.02
    assert found['optimum']['edges'][3] == 'held'


def test_laws_that_do_not_predict_are_not_to_be_trusted(tmp_path, capsys):
    rng = np.random.default_rng(0)
    runs = [dict(p=rng.dirichlet([1.5] * 3).tolist(), loss=[3 + rng.random()]) for _ in range(9)]
    content = dict(groups=['a', 'b', 'c'], evaluated=['noise'], runs=runs)
    (tmp_path / 't.json').write_text(json.dumps(content))
    run_here(['tools/mixing_laws.py', 'fit-static', str(tmp_path / 't.json')])
    assert 'The laws of noise do not predict runs' in capsys.readouterr().out


# -- intervals -----------------------------------------------------------------------------------


def test_the_interval_covers_the_best_mixture_and_names_edges(tmp_path):
    """Over worlds with noise, the 90 % interval holds the true optimum in most of them."""
    truth = [laws.Law(2.5, -0.3, np.array([-2.0])), laws.Law(3.0, -2.0, np.array([1.8]))]
    recipe = Recipe(0.05, np.array([0.3, 0.7]))
    best = optimum(truth, recipe)
    covered = []
    widths = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        p = rng.dirichlet([1.5] * 2, 16)
        Y = np.stack([law(p) + rng.normal(0, 0.02, 16) for law in truth], 1)
        optima = [optimum(drawn, recipe) for drawn in laws.bootstrap_laws(p, Y, n_draws=20)]
        low, high = interval(optima)
        covered.append(low[0] <= best[0] <= high[0])
        widths.append(high[0] - low[0])
    assert np.mean(covered) >= 0.7 and 0.005 < np.mean(widths) < 0.3
    assert edges([0, 0.2, 0.9, 0.1], [0.1, 0.3, 1.0, 0.4], [1, 0.3, 1, 1]) == [
        '0', 'its cap', '1', '']


def test_bootstrap_fits_are_whole_fits():
    """Every sample's law is as good as one from many starts with the same weights."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1.5] * 4, 30)
    y = random_laws(4, 1, 2)[0](p) + rng.normal(0, 0.02, 30)
    w = np.random.default_rng(0).multinomial(30, np.full(30, 1 / 30), 8)
    w = np.maximum(w, 0.01)
    drawn = laws.bootstrap_laws(p, y[:, None], n_draws=8)
    for weights, [law] in zip(w, drawn, strict=True):
        starts = laws.random_starts(3, 48)
        _, value = laws.descend(p[:, :-1], y, np.tile(weights, (48, 1)), starts, 60)
        assert weights @ (law(p) - y)**2 <= 1.0001 * value.min()


# -- the public swarm and CSV pairs --------------------------------------------------------------


def test_the_public_swarm_keeps_its_topics_with_little_loss():
    if not SWARM.is_file():
        pytest.skip(f'{SWARM} is not on this machine')
    table = read_table(str(SWARM)).of('mean')
    law = laws.fit_static(table.p, table.loss[:, 0])
    assert law.report['leave_one_out']['r2'] == pytest.approx(0.909, abs=5e-4)
    assert rarely_used(table.groups, table.p) == dict(fashion_and_beauty=1)
    corner = optimum([law])
    assert table.groups[corner.argmax()] == 'software_development' and corner.max() > 0.999
    natural = np.full(24, 1 / 24)
    best = optimum([law], Recipe(0.02, natural))
    gain = law(natural) - law(corner)
    assert law(best) - law(corner) < 0.04 * gain and (best > 0.005).sum() == 24
    assert best.max() < 0.3


def write_pair(folder, change=None):
    """Writes ratios.csv and metrics.csv in the form of Olmix. change: text to replace in a file."""
    rng = np.random.default_rng(0)
    ratios = [',run,name,index,web,code,math']
    metrics = [',run,name,index,mmlu_a,mmlu_b,gsm']
    for i in range(12):
        p = rng.dirichlet([1.5] * 3)
        loss = 3 - p[1:].sum() * 0.5
        ratios.append(f'{i},r{i},sweep-{i},{i},' + ','.join(map(str, p)))
        metrics.append(f'{11 - i},r{i},sweep-{i},{i},{loss},{loss + 1},{2 * loss}')
    for name, lines in (('ratios', ratios), ('metrics', [metrics[0], *metrics[:0:-1]])):
        text = '\n'.join(lines)
        if change and change[0] == name:
            assert change[1] in text
            text = text.replace(change[1], change[2], 1)
        (folder / f'{name}.csv').write_text(text)
    return [str(folder / 'ratios.csv'), str(folder / 'metrics.csv')]


def test_a_pair_of_csv_files_is_a_table(tmp_path):
    paths = write_pair(tmp_path)
    table = read_table(*paths)
    assert table.groups == ['web', 'code', 'math']
    assert table.evaluated == ['mmlu_a', 'mmlu_b', 'gsm']
    # The metrics are in another order, and are joined by the run.
    assert table.loss[:, 0] == pytest.approx(3 - 0.5 * table.p[:, 1:].sum(1))
    table = read_table(*paths, families=dict(mmlu=['mmlu*'], math=['gsm']))
    assert table.evaluated == ['mmlu', 'math']
    assert table.loss[:, 0] == pytest.approx(3.5 - 0.5 * table.p[:, 1:].sum(1))
    (tmp_path / 'knobs.py').write_text("families = {'math': ['gsm']}\nkl = 0.1\n")
    run_here(['tools/mixing_laws.py', 'fit-static', *paths, str(tmp_path / 'knobs.py')])
    found = json.loads((tmp_path / 'ratios_static.json').read_text())
    assert found['evaluated'] == ['math'] and len(found['fits']) == 1
    assert found['optimum']['kl'] == 0.1


@pytest.mark.parametrize('change, message', [
    (('metrics', ',r3,', ',r77,'), 'do not have the same runs: 2 .*r3, r77'),
    (('ratios', ',r3,', ',r4,'), "two rows have the same 'run'"),
    (('ratios', ',run,name,index', ',a,b,c'), 'no common column run'),
    (('metrics', ',r3,sweep-3', ',r3'), 'does not have the 7 columns'),
    (('metrics', 'mmlu_a', 'mmlu_b'), 'different names'),
    (('ratios', ',r3,sweep-3,3,', ',r3,sweep-3,3,x'), 'is no number'),
    (('ratios', ',r3,sweep-3,3,', ',r3,sweep-3,3,9'), 'sum to'),
])
def test_csv_pairs_that_do_not_fit_are_refused(tmp_path, change, message):
    paths = write_pair(tmp_path, change)
    with pytest.raises(BadInput, match=message):
        read_table(*paths)
    with pytest.raises(BadInput, match='give two CSV files'):
        run_here(['tools/mixing_laws.py', 'fit-static', paths[0]])


# -- schedules -----------------------------------------------------------------------------------


def make_curves(best, noise=0.003, n=40):
    """A table of runs whose loss falls most in stage i with the mixture best[i]."""
    rng = np.random.default_rng(0)
    runs = []
    for i, p in enumerate(rng.dirichlet([1.5] * 3, n)):
        loss = 5.0
        records = [{'step': 0, 'val/loss': loss, 'val/loss_a': loss}]
        for stage, target in enumerate(best):
            gain = [1.0, 0.3, 0.15, 0.1][stage]
            loss += gain * (((p - target)**2).sum() - 1) + rng.normal(0, noise)
            records.append({'step': 25 * (stage + 1), 'val/loss': loss, 'val/loss_a': loss})
        # A record of training between evaluations does not matter.
        records.insert(1, {'step': 10, 'train/loss': 4.0})
        runs.append(Row(f'run{i}', p, np.array([loss]), records=records))
    return Table(['x', 'y', 'z'], ['a'], runs)


def test_a_best_mixture_that_changes_is_found_and_one_that_does_not_stays(monkeypatch):
    monkeypatch.setattr(regmix, 'N_DRAWS', 2000)
    early, late = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.2, 0.6])
    changing = make_curves([early, early, late, late])
    steps, losses = read_curves(changing, 4)
    assert steps.tolist() == [0, 25, 50, 75, 100] and losses.shape == (40, 5, 1)
    found = regmix_d(changing.p, losses[..., 0], np.ones(3))
    for stage, target in zip(found, [early, early, late, late], strict=True):
        assert np.abs(stage - target).sum() / 2 < 0.15
    constant = make_curves([early] * 4)
    found = regmix_d(constant.p, read_curves(constant, 4)[1][..., 0], np.ones(3))
    assert np.abs(found - found.mean(0)).sum(1).max() / 2 < 0.1


def test_the_report_of_a_schedule(monkeypatch, capsys):
    monkeypatch.setattr(regmix, 'N_DRAWS', 500)
    table = make_curves([np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.2, 0.7])] * 2)
    # A source that no run has stays out of the schedule.
    table.groups.append('none')
    for run in table.runs:
        run.p = np.append(run.p, 0.0)
    found, schedule = regmix_d_runs(table, '', prior_of(np.full(4, 0.25), 4), 4)
    assert min(found['spearman_held_out']) > 0.5 and found['moved'] > 0.3
    assert '% of the mixture moves between two stages' in capsys.readouterr().out
    assert schedule['interpolation'] == 'step'
    assert [point['share'] for point in schedule['points']] == [0, 0.25, 0.5, 0.75]
    for point in schedule['points']:
        assert set(point['weights']) == {'x', 'y', 'z'}
        assert sum(point['weights'].values()) == pytest.approx(1, abs=1e-5)


def test_curves_that_are_missing_are_refused():
    table = make_curves([np.full(3, 1 / 3)] * 4)
    with pytest.raises(BadInput, match='9 stages need 10 evaluations .* these have 5'):
        read_curves(table, 9)
    table.runs[3].records = []
    with pytest.raises(BadInput, match='these have 0'):
        read_curves(table, 2)


# -- reuse ---------------------------------------------------------------------------------------


def test_a_plan_freezes_the_ratios_of_what_did_not_change(tmp_path):
    plan = plan_reuse(['a', 'b', 'c', 'd'], [0.4, 0.2, 0.3, 0.1], ['e'], ['d'], ['c'])
    assert plan['frozen'] == pytest.approx(dict(a=2 / 3, b=1 / 3))
    assert plan['sources'] == [KEPT, 'c', 'e']
    assert plan['runs'] == runs_for(3) == 12 and plan['runs_without'] == runs_for(4) == 15
    path = tmp_path / 'plan.json'
    path.write_text(json.dumps(plan))
    plan = read_plan(str(path), ['e', 'c', 'b', 'a'])
    mixture = expand_mixture(plan, {KEPT: 0.6, 'c': 0.3, 'e': 0.1})
    assert mixture == pytest.approx(dict(a=0.4, b=0.2, c=0.3, e=0.1))
    with pytest.raises(BadInput, match='only one has d'):
        read_plan(str(path), ['a', 'b', 'c', 'd', 'e'])
    only = plan_reuse(['a', 'b'], [0.4, 0.6], [], ['b'], [])
    assert only['runs'] == 0 and only['frozen'] == dict(a=1.0) and 'no run' in only['note']
    path.write_text(json.dumps(only))
    with pytest.raises(BadInput, match='needs no sweep'):
        read_plan(str(path), ['a'])


@pytest.mark.parametrize('add, drop, free, message', [
    (['a'], [], [], "'a' is a source already"), ([], ['x'], [], "'x' is no source"),
    ([], [], [], 'nothing has changed'), ([], ['a'], ['a'], 'a: named twice'),
    (['x'], ['a', 'b'], [], 'no source keeps a ratio')])
def test_a_plan_that_makes_no_sense_is_refused(add, drop, free, message):
    with pytest.raises(BadInput, match=message):
        plan_reuse(['a', 'b'], [0.4, 0.6], add, drop, free)


def test_a_sweep_with_reuse_finds_nearly_what_a_whole_sweep_finds(tmp_path):
    """Of four sources, one is added to three: the ratios of the three come from the first sweep."""
    rng = np.random.default_rng(0)
    s = np.array([-1.5, -0.8, -0.2, -1.2])

    def loss(p):
        return 2.5 + np.exp(-0.2 + p @ s[:p.shape[-1]])

    recipe = ['--kl=0.3']
    p = rng.dirichlet([1.5] * 3, 15)
    first = dict(groups=['a', 'b', 'c'], evaluated=['l'], runs=[
        dict(p=x.tolist(), loss=[float(loss(x))]) for x in p])
    (tmp_path / 't.json').write_text(json.dumps(first))
    command = ['tools/mixing_laws.py', 'recompute', str(tmp_path / 't.json'), "--add=['d']"]
    run_here([*command, *recipe])
    plan = read_plan(str(tmp_path / 't_recompute.json'), ['a', 'b', 'c', 'd'])
    runs = []
    for q in rng.dirichlet([1.5] * 2, 9):
        mixture = expand_mixture(plan, {KEPT: q[0], 'd': q[1]})
        x = np.array([round(mixture[name], 6) for name in 'abcd'])
        runs.append(dict(p=x.tolist(), loss=[float(loss(x))]))
    second = dict(groups=['a', 'b', 'c', 'd'], evaluated=['l'], runs=runs)
    (tmp_path / 'u.json').write_text(json.dumps(second))
    run_here(['tools/mixing_laws.py', 'fit-static', str(tmp_path / 'u.json'), *recipe])
    found = json.loads((tmp_path / 'u_static.json').read_text())
    assert any('always in the ratio' in note for note in found['notes'])
    whole = optimum([laws.Law(2.5, -0.2 + s[-1], s[:-1] - s[-1])], Recipe(0.3, np.full(4, 0.25)))
    assert found['optimum']['p'] == pytest.approx(whole, abs=0.01)
