"""Static and dynamic laws against published tables, and against worlds whose law is known."""
import json

from tests.conftest import need

need('scipy')

import numpy as np
import pytest
from scipy.optimize import least_squares

from configurator import BadInput
from tests.conftest import SHARED, run_here
from tools import best_mixture, regmix
from tools import mixing_laws as laws

REFERENCE = SHARED.parent / 'reference'


def reference(name):
    if not (REFERENCE / name).is_file():
        pytest.skip(f'{REFERENCE / name} is not on this machine')
    return json.loads((REFERENCE / name).read_text())


def table_of(runs, column, step, key='loss'):
    """(p (n, m), y (n,)) of the runs that have this loss."""
    p = []
    y = []
    for run in runs:
        losses = run.get(key, {}).get(step)
        if not run['special'] and losses is not None and losses[column] is not None:
            p.append(run['p'])
            y.append(losses[column])
    p = np.array(p, dtype=np.float64).reshape(len(p), len(runs[0]['p']))
    return p / p.sum(1, keepdims=True), np.array(y)


@pytest.mark.parametrize('name', ['2Mix', '3Mix'])
def test_static_fits_are_as_good_as_the_published_ones(name):
    data = reference('mixing_laws_runs.json')['sets'][name]
    fits = reference('mixing_laws_fits.json')['sets'][name]
    compared = 0
    for key, expected in fits.items():
        if not isinstance(expected, dict) or 'params' not in expected:
            continue
        size, group, step = key.split('/')
        p, y = table_of(data['runs'][size], data['loss_columns'].index(group), step)
        law = laws.fit_static(p, y)
        report = law.report
        linear = expected['linear_baseline']['leave_one_out']['R2']
        left_out = expected['leave_one_out']['R2']
        assert report['sse'] <= 1.0001 * expected['sse']
        assert report['fit']['r2'] == pytest.approx(expected['fit']['R2'], abs=1e-4)
        assert report['leave_one_out']['r2'] == pytest.approx(left_out, abs=1e-3)
        assert report['linear_leave_one_out']['r2'] == pytest.approx(linear, abs=1e-4)
        if 'held_out' in expected:
            mae = expected['held_out']['MAE']
            assert report['held_out']['mae'] == pytest.approx(mae, abs=1e-4)
        robust = laws.fit_law(p, y, huber=0.02)
        loss = laws.squares(robust(p) - y, 0.02).sum() / 2 / len(y)
        assert loss <= 1.0005 * expected['huber_0.02']['mean_huber']
        compared += 1
    assert compared == len([k for k in fits if '/' in k])
    if 'optimum_410M_60000' in fits:
        three = [laws.fit_law(*table_of(data['runs']['410M'], i, '60000')) for i in range(3)]
        published = fits['optimum_410M_60000']['p']
        assert best_mixture.optimum(three) == pytest.approx(published, abs=1e-3)


@pytest.mark.parametrize('name, mean, linear', [('5Mix', 0.980, 0.810), ('RedPajama', None, None)])
def test_fits_of_many_groups_reach_what_many_starts_of_another_solver_reach(name, mean, linear):
    data = reference('mixing_laws_runs.json')['sets'][name]
    found = []
    lines = []
    rng = np.random.default_rng(0)
    for size, runs in data['runs'].items():
        for i in range(5):
            p, y = table_of(runs, i, '30000', 'coarse')
            m = p.shape[1]
            if len(y) < m + 2:
                continue
            law = laws.fit_static(p, y)
            found.append(law.report['fit']['r2'])
            lines.append(law.report['linear']['r2'])
            if size != '160M':
                continue
            X = np.column_stack((np.ones(len(p)), p[:, :-1]))

            def residuals(q, X=X, y=y):
                return q[0] + np.exp(np.minimum(X @ q[1:], 50)) - y

            for _ in range(6):
                start = np.r_[rng.uniform(0, y.min()), rng.normal(-0.5, 1), rng.normal(0, 3, m - 1)]
                other = least_squares(residuals, start, max_nfev=400)
                assert law.report['sse'] <= 1.001 * 2 * other.cost
    if mean:
        assert np.mean(found) == pytest.approx(mean, abs=0.001)
        assert np.mean(lines) == pytest.approx(linear, abs=0.001)


def test_a_known_law_is_recovered_with_its_errors():
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1.5] * 3, 200)
    # c is not far below the smallest loss. Otherwise many fits would end at its bound, 0.
    truth = laws.Law(3.2, -0.4, np.array([-2.0, 0.7]))
    y = truth(p) + rng.normal(0, 0.01, len(p))
    law = laws.fit_static(p, y)
    values = [law.c, law.log_b, *law.s]
    for value, se, true in zip(values, law.report['se'], [3.2, -0.4, -2.0, 0.7], strict=True):
        assert 0 < se < 0.3 and abs(value - true) < 4 * se
    # The errors agree with the spread of repetitions.
    many = []
    for _ in range(20):
        many.append(laws.fit_law(p, truth(p) + rng.normal(0, 0.01, len(p))).s)
    assert np.std(many, 0) == pytest.approx(law.report['se'][2:], rel=0.45)


def test_the_optimum_of_two_groups_has_a_closed_form():
    case = reference('mixing_update_cases.json')['static_optimum_m2']
    first = laws.Law(1.0, case['b1'], np.array([case['k1']]))
    second = laws.Law(1.0, case['b2'] + case['k2'], np.array([-case['k2']]))
    assert best_mixture.optimum([first, second])[0] == pytest.approx(case['p'], abs=1e-6)
    useless = laws.Law(1.0, -1.0, np.array([0.0]))
    assert best_mixture.optimum([first, useless]) == pytest.approx([1, 0], abs=1e-6)


def test_similarity_cases():
    cases = reference('mixing_update_cases.json')['sim']
    for case in cases['cases']:
        assert laws.sim(case['A_star'], case['A_tilde']) == pytest.approx(case['sim'], abs=1e-8)
    case = cases['m2_diagonalisation']
    assert laws.diagonal_of_two(case['A']).diagonal() == pytest.approx(case['diag'], abs=1e-12)
    # The Spearman correlation of a constant vector counts as 0.
    found = laws.sim([[1, 1], [1, 1]], [[1, 0], [0, 2]])
    assert found == pytest.approx(0.5 * 3 / np.sqrt(10))


def test_similarities_are_the_published_ones():
    published = reference('aioli_law_params.json')
    stars = published['derived']['A_star']
    sims = published['derived']['sim']
    for method in ('skillit', 'doremi'):
        expected = sims[f'm2_{method}']
        star = stars['m2'][method]
        estimates = [np.diag(r['A_tilde_diag']) for r in expected['recovered']]
        found = laws.compare([np.array(a) for a in star['A_star']], estimates)
        ceiling = star['ceiling_pairwise_seed_sim']['mean']['sim']
        assert found['sim'] == pytest.approx(expected['mean']['sim'], abs=1e-5)
        assert found['between_seeds'] == pytest.approx(ceiling, abs=1e-5)
        assert found['uniform'] == pytest.approx(0.5 * star['cos_of_uniform_vector'], abs=1e-4)
    scales = published['raw']['m3']['scale_skillit']['data']['1000'].values()
    graphs = published['skillit_graphs']['m3']
    estimates = [b[0] * np.transpose(G) for b, G in zip(scales, graphs, strict=True)]
    found = laws.compare([np.array(a) for a in stars['m3']['skillit']['A_star']], estimates)
    expected = sims['m3_skillit']['by_guess']['ones']['mean']['sim']
    assert found['sim'] == pytest.approx(expected, abs=1e-5)


def test_the_dynamic_law_is_least_squares():
    rng = np.random.default_rng(0)
    A = np.array([[0.3, -0.02, 0.06], [0.0, 0.25, 0.01]])
    p = rng.dirichlet([1.5] * 3, 9)
    drops = p @ A.T
    found, reports = laws.fit_dynamic(p, drops)
    assert found == pytest.approx(A, abs=1e-12)
    assert reports[0]['r2'] == pytest.approx(1)
    noisy = drops + rng.normal(0, 0.01, (9, 2))
    _, reports = laws.fit_dynamic(p, noisy)
    left_out = []
    for i in range(9):
        other, _ = laws.fit_dynamic(np.delete(p, i, 0), np.delete(noisy, i, 0))
        left_out.append(other @ p[i])
    expected = laws.r2(noisy[:, 1], np.array(left_out)[:, 1])
    assert reports[1]['leave_one_out'] == pytest.approx(expected)
    assert laws.scale_of(A, p, drops * -2.5) == pytest.approx(-2.5)


def test_leaving_one_out_is_what_fitting_without_it_gives():
    rng = np.random.default_rng(1)
    p = rng.dirichlet([1.5] * 3, 14)
    y = laws.Law(2.0, 0.3, np.array([-1.5, 1.0]))(p) + rng.normal(0, 0.01, 14)
    law = laws.fit_static(p, y)
    predicted = []
    for i in range(14):
        predicted.append(laws.fit_law(np.delete(p, i, 0), np.delete(y, i))(p[i]))
    expected = laws.r2(y, np.array(predicted))
    assert law.report['leave_one_out']['r2'] == pytest.approx(expected, abs=1e-4)


def test_regression_by_trees_ranks_the_published_runs():
    data = reference('regmix_runs.json')
    column = data['columns_loss'].index('pile_cc')

    def part(name):
        runs = data['sets'][name]
        return np.array(runs['p']), np.array(runs['loss'])[:, column]

    p, y = part('train_1m')
    test_p, test_y = part('test_1m')
    predicted = regmix.fit_trees(p, y).predict(test_p)
    fits = data['reference_fit']['per_loss']['pile_cc']
    expected = fits['lgbm_1000_no_early_stop']['test_1m']['spearman']
    assert laws.spearmanr(predicted, test_y).statistic > expected - 0.004
    optimum = data['reference_optimum_pile_cc']
    assert regmix.regmix(p, y, optimum['prior']) == pytest.approx(optimum['ours'], abs=0.03)


# -- the command line ----------------------------------------------------------------------------

WORLD = [
    laws.Law(2.5, -0.3, np.array([-2.0, 0.5])),
    laws.Law(3.0, -0.5, np.array([0.3, -2.0])),
    laws.Law(2.8, -2.0, np.array([1.6, 1.9])),
]


def command(*arguments):
    assert run_here(['tools/mixing_laws.py', *map(str, arguments)]) is None


def make_table(path, n=12, seeds=3, parent=None, changes=None):
    """Writes a table of n mixtures with every seed, whose losses follow WORLD with a little noise.

    parent   entry `parent` of every run        changes  index of a run -> changed entries
    """
    rng = np.random.default_rng(0)
    mixtures = rng.dirichlet([1.5] * 3, n)
    runs = []
    for seed in range(seeds):
        for p in mixtures:
            loss = [float(law(p) + rng.normal(0, 0.003)) for law in WORLD]
            runs.append(dict(p=p.tolist(), loss=loss, seed=seed, tokens=1000))
            if parent:
                runs[-1]['parent'] = parent
    for i, entries in (changes or {}).items():
        runs[i] |= entries
    path.write_text(json.dumps(dict(groups=['code', 'math', 'web'], runs=runs)))


def test_the_report_of_a_table(tmp_path):
    make_table(tmp_path / 't.json')
    command('fit-static', tmp_path / 't.json')
    found = json.loads((tmp_path / 't_static.json').read_text())
    assert found['seed_noise']['sd'] == pytest.approx([0.003] * 3, rel=0.5)
    best = found['optimum']
    assert best['p'] == pytest.approx(best_mixture.optimum(WORLD), abs=0.03)
    for low, p, high in zip(best['low'], best['p'], best['high'], strict=True):
        assert low <= p <= high and high - low < 0.2
    assert {fit['seed'] for fit in found['fits']} == {0, 1, 2, 'all'}
    assert min(fit['leave_one_out']['r2'] for fit in found['fits']) > 0.9
    parent = dict(name='start', p=[1 / 3] * 3, loss=[3.5, 3.9, 3.6], seed=0)
    make_table(tmp_path / 'd.json', parent=parent, seeds=1)
    command('fit-dynamic', tmp_path / 'd.json')
    found = json.loads((tmp_path / 'd_dynamic.json').read_text())
    assert np.array(found['fits'][0]['A']).shape == (3, 3)
    command('plot', tmp_path / 't_static.json')
    assert (tmp_path / 't_static.png').stat().st_size > 20_000


@pytest.mark.parametrize('change, parts', [
    (dict(n=1, seeds=4), ['4 runs for the 4 parameters', 'takes 5 at least']),
    (dict(n=1, seeds=6), ['vary in 0 direction', 'all equal']),
    (dict(changes={2: dict(loss=[3.0, None, 3.1])}), ['run(s) 2', 'not finite']),
    (dict(changes={2: dict(tokens=500)}), ['different length', "'2' (500 tokens)"]),
    (dict(changes={2: dict(tokenizer='x'), 3: dict(tokenizer='y')}), ['different tokenizer']),
    (dict(changes={2: dict(p=[0.5, 0.5])}), ['run 2 has 2 shares', '3 groups']),
    (dict(changes={2: dict(p=[0.5, 0.6, 0.5])}), ['run 2 sum to 1.6']),
    (dict(changes={1: dict(loss=None)}), ['no table of runs']),
    (dict(changes={1: dict(loss=['low', 1, 1])}), ['no table of runs']),
    (dict(changes={1: dict(loss=[-1.0, 3.0, 3.0])}), ['run 1 has the loss -1']),
    (dict(changes={1: dict(p=[np.nan, 0.5, 0.5])}), ['run 1 sum to nan']),
    (dict(changes={1: dict(p=[1.5, -0.5, 0.0])}), ['must not be negative']),
    (dict(changes={1: dict(p=[[1.0]])}), ['no table of runs']),
    (dict(changes={1: dict(seed='a')}), ['no table of runs', 'must be int']),
    (dict(n=0), ['no table of runs', 'runs is empty']),
])
def test_bad_tables_are_refused_in_a_sentence(tmp_path, change, parts):
    make_table(tmp_path / 't.json', **change)
    with pytest.raises(BadInput) as error:
        command('fit-static', tmp_path / 't.json')
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize('content, message', [
    ('[]', 'no table of runs'),
    ('null', 'no table of runs'),
    ('{"groups": "ab", "runs": []}', 'lists of different names'),
    ('{"groups": ["a", "a"], "runs": []}', 'lists of different names'),
    ('{"groups": ["a", "b"], "runs": [3]}', 'no table of runs'),
    ('{"groups": ["a", "b"], "ru', 'no valid JSON'),
    ('{"groups": ["a"], "runs": [{"p": [1], "loss": [3]}, {"p": [1], "loss": [3]}, '
     '{"p": [1], "loss": [2]}]}', 'needs two groups or more'),
])
def test_what_is_no_table_is_refused(tmp_path, content, message):
    (tmp_path / 't.json').write_text(content)
    with pytest.raises(BadInput, match=message):
        command('fit-static', tmp_path / 't.json')


@pytest.mark.parametrize('name, content', [
    ('sim', '[]'), ('sim', '{"groups": ["a", "b"]}'),
    ('sim', '{"groups": ["a", "b"], "methods": {"m": {"A_star": "x", "A": [], "b": []}}}'),
    ('plot', '[]'), ('plot', '{"optimum": 5}'), ('plot', '{"fits": [1], "groups": ["a"]}'),
])
def test_a_file_of_fits_of_another_form(tmp_path, name, content):
    (tmp_path / 'a_star.json').write_text(content)
    with pytest.raises(BadInput, match='does not hold what'):
        command(name, tmp_path / 'a_star.json')


def test_regmix_refuses_losses_that_are_not_finite(tmp_path):
    make_table(tmp_path / 't.json', changes={4: dict(loss=[3.0, None, 3.1])})
    with pytest.raises(BadInput, match='the loss of run.* 4 .* is not finite'):
        command('regmix', tmp_path / 't.json')


def test_the_command_line_names_what_is_wrong(tmp_path, capsys):
    make_table(tmp_path / 't.json')
    with pytest.raises(BadInput, match="unknown command 'fit'. Commands are fit-static"):
        command('fit', tmp_path / 't.json')
    with pytest.raises(BadInput, match='name one folder of runs.* There are 0'):
        run_here(['tools/mixing_laws.py', 'fit-static'])
    with pytest.raises(BadInput, match="target = 'maths' .* Did you mean 'math'"):
        run_here(['tools/mixing_laws.py', 'regmix', str(tmp_path / 't.json'), '--target=maths'])
    with pytest.raises(BadInput, match='no valid JSON'):
        (tmp_path / 'a_star.json').write_text('{')
        run_here(['tools/mixing_laws.py', 'sim', str(tmp_path), '--huber=True'])
    assert 'warning: --huber has no effect with sim.' in capsys.readouterr().err
