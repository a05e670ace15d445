"""Static and dynamic laws against published tables, fits and similarities, and against worlds whose law is known."""
import json

import numpy as np
import pytest
from scipy.optimize import least_squares

from configurator import BadInput
from tests.conftest import SHARED, run_here
from tools import mixing_laws as laws

REFERENCE = SHARED.parent / 'reference'


def reference(name):
    if not (REFERENCE / name).is_file():
        pytest.skip(f'{REFERENCE / name} is not on this machine')
    return json.loads((REFERENCE / name).read_text())


def table_of(runs, column, step, key='loss'):
    """(p (n, m), y (n,)) of the runs that have this loss."""
    rows = [(r['p'], r[key][step][column]) for r in runs if not r['special'] and step in r.get(key, {}) and r[key][step][column] is not None]
    p = np.array([p for p, _ in rows], dtype=np.float64).reshape(len(rows), len(runs[0]['p']))
    return p / p.sum(1, keepdims=True), np.array([y for _, y in rows])


@pytest.mark.parametrize('name', ['2Mix', '3Mix'])
def test_static_fits_are_as_good_as_the_published_ones(name):
    data, fits = reference('mixing_laws_runs.json')['sets'][name], reference('mixing_laws_fits.json')['sets'][name]
    compared = 0
    for key, expected in fits.items():
        if not isinstance(expected, dict) or 'params' not in expected:
            continue
        size, group, step = key.split('/')
        p, y = table_of(data['runs'][size], data['loss_columns'].index(group), step)
        law = laws.fit_static(p, y)
        assert law.report['sse'] <= 1.0001 * expected['sse']
        assert law.report['fit']['r2'] == pytest.approx(expected['fit']['R2'], abs=1e-4)
        assert law.report['leave_one_out']['r2'] == pytest.approx(expected['leave_one_out']['R2'], abs=1e-3)
        assert law.report['linear_leave_one_out']['r2'] == pytest.approx(expected['linear_baseline']['leave_one_out']['R2'], abs=1e-4)
        if 'held_out' in expected:
            assert law.report['held_out']['mae'] == pytest.approx(expected['held_out']['MAE'], abs=1e-4)
        robust = laws.fit_law(p, y, huber=0.02)
        assert laws.squares(robust(p) - y, 0.02).sum() / 2 / len(y) <= 1.0005 * expected['huber_0.02']['mean_huber']
        compared += 1
    assert compared == len([k for k in fits if '/' in k])
    if 'optimum_410M_60000' in fits:
        three = [laws.fit_law(*table_of(data['runs']['410M'], i, '60000')) for i in range(3)]
        assert laws.optimum(three) == pytest.approx(fits['optimum_410M_60000']['p'], abs=1e-3)


@pytest.mark.parametrize('name, mean, linear', [('5Mix', 0.980, 0.810), ('RedPajama', None, None)])
def test_fits_of_many_groups_reach_what_many_starts_of_another_solver_reach(name, mean, linear):
    data, found, lines = reference('mixing_laws_runs.json')['sets'][name], [], []
    rng = np.random.default_rng(0)
    for size, runs in data['runs'].items():
        for i in range(5):
            p, y = table_of(runs, i, '30000', 'coarse')
            if len(y) < p.shape[1] + 2:
                continue
            law = laws.fit_static(p, y)
            found.append(law.report['fit']['r2'])
            lines.append(law.report['linear']['r2'])
            if size == '160M':
                X = np.column_stack((np.ones(len(p)), p[:, :-1]))
                for _ in range(6):
                    start = np.r_[rng.uniform(0, y.min()), rng.normal(-0.5, 1), rng.normal(0, 3, p.shape[1] - 1)]
                    other = least_squares(lambda q: q[0] + np.exp(np.minimum(X @ q[1:], 50)) - y, start, max_nfev=400)
                    assert law.report['sse'] <= 1.001 * 2 * other.cost
    if mean:
        assert np.mean(found) == pytest.approx(mean, abs=0.001) and np.mean(lines) == pytest.approx(linear, abs=0.001)


def test_a_known_law_is_recovered_with_its_errors():
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1.5] * 3, 200)
    truth = laws.Law(3.2, -0.4, np.array([-2.0, 0.7]))         # c far below the smallest loss would be a bound of many fits
    y = truth(p) + rng.normal(0, 0.01, len(p))
    law = laws.fit_static(p, y)
    for value, se, true in zip([law.c, law.log_b, *law.s], law.report['se'], [3.2, -0.4, -2.0, 0.7]):
        assert 0 < se < 0.3 and abs(value - true) < 4 * se
    # the errors are those that repetitions show
    many = np.array([laws.fit_law(p, truth(p) + rng.normal(0, 0.01, len(p))).s for _ in range(20)])
    assert many.std(0) == pytest.approx(law.report['se'][2:], rel=0.45)


def test_the_optimum_of_two_groups_has_a_closed_form():
    case = reference('mixing_update_cases.json')['static_optimum_m2']
    first = laws.Law(1.0, case['b1'], np.array([case['k1']]))
    second = laws.Law(1.0, case['b2'] + case['k2'], np.array([-case['k2']]))
    assert laws.optimum([first, second])[0] == pytest.approx(case['p'], abs=1e-6)
    useless = laws.Law(1.0, -1.0, np.array([0.0]))
    assert laws.optimum([first, useless]) == pytest.approx([1, 0], abs=1e-6)


def test_similarity_cases_and_what_was_published():
    cases = reference('mixing_update_cases.json')['sim']['cases']
    for case in cases:
        assert laws.sim(case['A_star'], case['A_tilde']) == pytest.approx(case['sim'], abs=1e-8)
    case = reference('mixing_update_cases.json')['sim']['m2_diagonalisation']
    assert laws.diagonal_of_two(case['A']).diagonal() == pytest.approx(case['diag'], abs=1e-12)
    assert laws.sim([[1, 1], [1, 1]], [[1, 0], [0, 2]]) == pytest.approx(0.5 * 3 / np.sqrt(10))           # Spearman of a constant is 0
    published = reference('aioli_law_params.json')
    stars, sims = published['derived']['A_star'], published['derived']['sim']
    for method, m in (('skillit', 'm2'), ('doremi', 'm2')):
        estimates = [np.diag(r['A_tilde_diag']) for r in sims[f'{m}_{method}']['recovered']]
        found = laws.compare([np.array(a) for a in stars[m][method]['A_star']], estimates)
        assert found['sim'] == pytest.approx(sims[f'{m}_{method}']['mean']['sim'], abs=1e-5)
        assert found['between_seeds'] == pytest.approx(stars[m][method]['ceiling_pairwise_seed_sim']['mean']['sim'], abs=1e-5)
        assert found['uniform'] == pytest.approx(0.5 * stars[m][method]['cos_of_uniform_vector'], abs=1e-4)
    scales = list(published['raw']['m3']['scale_skillit']['data']['1000'].values())
    estimates = [b[0] * np.transpose(G) for b, G in zip(scales, published['skillit_graphs']['m3'])]
    found = laws.compare([np.array(a) for a in stars['m3']['skillit']['A_star']], estimates)
    assert found['sim'] == pytest.approx(sims['m3_skillit']['by_guess']['ones']['mean']['sim'], abs=1e-5)


def test_the_dynamic_law_is_least_squares():
    rng, A = np.random.default_rng(0), np.array([[0.3, -0.02, 0.06], [0.0, 0.25, 0.01]])
    p = rng.dirichlet([1.5] * 3, 9)
    found, reports = laws.fit_dynamic(p, p @ A.T)
    assert found == pytest.approx(A, abs=1e-12) and reports[0]['r2'] == pytest.approx(1)
    noisy = p @ A.T + rng.normal(0, 0.01, (9, 2))
    found, reports = laws.fit_dynamic(p, noisy)
    left_out = [laws.fit_dynamic(np.delete(p, i, 0), np.delete(noisy, i, 0))[0] @ p[i] for i in range(9)]
    assert reports[1]['leave_one_out'] == pytest.approx(laws.r2(noisy[:, 1], np.array(left_out)[:, 1]))
    assert laws.scale_of(A, p, p @ A.T * -2.5) == pytest.approx(-2.5)


def test_leaving_one_out_is_what_fitting_without_it_gives():
    rng = np.random.default_rng(1)
    p = rng.dirichlet([1.5] * 3, 14)
    y = laws.Law(2.0, 0.3, np.array([-1.5, 1.0]))(p) + rng.normal(0, 0.01, 14)
    law = laws.fit_static(p, y)
    predicted = np.array([laws.fit_law(np.delete(p, i, 0), np.delete(y, i))(p[i]) for i in range(14)])
    assert law.report['leave_one_out']['r2'] == pytest.approx(laws.r2(y, predicted), abs=1e-4)


def test_regression_by_trees_ranks_the_published_runs():
    data = reference('regmix_runs.json')
    train, test, column = data['sets']['train_1m'], data['sets']['test_1m'], data['columns_loss'].index('pile_cc')
    predicted = laws.fit_trees(np.array(train['p']), np.array(train['loss'])[:, column]).predict(np.array(test['p']))
    expected = data['reference_fit']['per_loss']['pile_cc']['lgbm_1000_no_early_stop']['test_1m']['spearman']
    assert laws.spearmanr(predicted, np.array(test['loss'])[:, column]).statistic > expected - 0.004
    prior = data['reference_optimum_pile_cc']['prior']
    best = laws.regmix(np.array(train['p']), np.array(train['loss'])[:, column], prior)
    assert best == pytest.approx(data['reference_optimum_pile_cc']['ours'], abs=0.03)


# -- the command line --------------------------------------------------------------------------------------------------

def command(*arguments):
    assert run_here(['tools/mixing_laws.py', *map(str, arguments)]) is None


def make_table(path, n=12, seeds=3, noise=0.003, parent=False, **change):
    rng = np.random.default_rng(0)
    world = [laws.Law(2.5, -0.3, np.array([-2.0, 0.5])), laws.Law(3.0, -0.5, np.array([0.3, -2.0])), laws.Law(2.8, -2.0, np.array([1.6, 1.9]))]
    mixtures = rng.dirichlet([1.5] * 3, n)
    runs = [dict(p=p.tolist(), loss=[float(law(p) + rng.normal(0, noise)) for law in world], seed=seed, tokens=1000) for seed in range(seeds) for p in mixtures]
    for run in runs if parent else []:
        run['parent'] = dict(name='start', p=[1 / 3] * 3, loss=[3.5, 3.9, 3.6], seed=0)
    table = dict(groups=['code', 'math', 'web'], runs=runs)
    for i, fields in change.pop('runs', {}).items():
        runs[i] |= fields
    path.write_text(json.dumps({**table, **change}))
    return world


def test_the_report_of_a_table(tmp_path):
    world = make_table(tmp_path / 't.json')
    command('fit-static', tmp_path / 't.json')
    found = json.loads((tmp_path / 't_static.json').read_text())
    assert found['seed_noise']['sd'] == pytest.approx([0.003] * 3, rel=0.5)
    assert found['optimum']['p'] == pytest.approx(laws.optimum(world), abs=0.03)
    assert all(low <= p <= high and high - low < 0.2 for low, p, high in zip(*(found['optimum'][k] for k in ('low', 'p', 'high'))))
    assert {fit['seed'] for fit in found['fits']} == {0, 1, 2, 'all'} and min(fit['leave_one_out']['r2'] for fit in found['fits']) > 0.9
    make_table(tmp_path / 'd.json', parent=True, seeds=1)
    command('fit-dynamic', tmp_path / 'd.json')
    assert np.array(json.loads((tmp_path / 'd_dynamic.json').read_text())['fits'][0]['A']).shape == (3, 3)
    command('plot', tmp_path / 't_static.json')
    assert (tmp_path / 't_static.png').stat().st_size > 20_000


@pytest.mark.parametrize('change, parts', [
    (dict(n=1, seeds=4), ['4 runs for the 4 parameters', 'takes 5 at least']),
    (dict(n=1, seeds=6), ['vary in 0 direction', 'all equal']),
    (dict(runs={2: dict(loss=[3.0, None, 3.1])}), ['run(s) 2', 'not finite']),
    (dict(runs={2: dict(tokens=500)}), ['different length', "'2' (500 tokens)"]),
    (dict(runs={2: dict(tokenizer='x'), 3: dict(tokenizer='y')}), ['different tokenizer']),
    (dict(runs={2: dict(p=[0.5, 0.5])}), ['run 2 has 2 shares', '3 groups']),
    (dict(runs={2: dict(p=[0.5, 0.6, 0.5])}), ['run 2 sum to 1.6']),
    (dict(runs={1: dict(loss=None)}), ['no table of runs'])])
def test_bad_tables_are_refused_in_a_sentence(tmp_path, change, parts):
    make_table(tmp_path / 't.json', **change)
    with pytest.raises(BadInput) as error:
        command('fit-static', tmp_path / 't.json')
    assert all(part in str(error.value) for part in parts), error.value
