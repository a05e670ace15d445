"""The studies' own code: what step sizes are chosen by, settings of methods, corrected p values."""
from types import SimpleNamespace

from tests.conftest import need

need('scipy', 'matplotlib')

import numpy as np
import pytest
from scipy import stats

from configurator import BadInput
from methods import rules
from tests import attribution_study, distil_study, methods_study, speedrun, studies
from tests.methods_study import Result, Setup, arm_knobs, settings

NAMES = ['code', 'math', 'web_edu']


def make_setup(*methods, names=NAMES):
    knobs = {method: settings(400)[method] for method in methods}
    return Setup(names, 'folder', 'data', [], knobs, 9, 2)


def make_entry(arm, seed, val, test, mixture='fixed'):
    """A finished run with the same loss on the text of val/, and on the test text, everywhere."""
    final = {}
    weights = {}
    for name in NAMES:
        # The validation text of influence's sources is the test text.
        of_val = f'probe/loss_{name}' if mixture == 'influence' else f'val/loss_{name}'
        final.update({f'val/loss_{name}_test': test, of_val: val})
        weights[f'mixture/weight_{name}'] = 1 / 3
    if mixture == 'influence':
        final.update({f'val/loss_{name}': test for name in NAMES})
    return SimpleNamespace(
        arm=arm, seed=seed, status='finished', final=final, config=dict(mixture=mixture),
        records=[weights], tokens=1)


@pytest.mark.parametrize('names', [NAMES[:2], NAMES])
def test_aioli_explores_the_published_share_of_a_run(names):
    """Published are 0.128 of a run with two sources and 0.288 with three."""
    knobs = settings(400)['aioli']
    interval = knobs['mixture_interval']
    assert knobs['mixture_warmup'] == 0
    sweeps, n_steps = rules.aioli_exploration(len(names), interval)
    share = 400 // interval * sweeps * n_steps * len(names) / 400
    assert 0.12 < share < 0.29
    assert sweeps == 4


def test_the_step_size_goes_where_the_weights_move():
    setup = make_setup(*methods_study.TUNED, 'aioli_random')
    learned = dict(mixture='fixed', sources=dict(code=0.5, math=0.3, web_edu=0.2))
    # Of a proxy, the step size is in the phases. The run itself has the weights that it learned.
    doge = arm_knobs(setup, 'doge', 3.0, learned)
    assert 'mixture_eta' not in doge and doge['sources']['math'] == 0.3
    assert doge['sources']['math_test'] == 0.0
    assert methods_study.eta_knobs(setup, 'doge', 3.0) == dict(mixture_eta=300.0)
    assert 'mixture_eta' not in arm_knobs(setup, 'influence', 1.0, {})
    assert arm_knobs(setup, 'influence', 3.0, {})['mixture_eta'] == pytest.approx(0.9)
    graph = dict(mixture='skillit', skillit_graph='graph.json')
    skillit = arm_knobs(setup, 'skillit', 1 / 3, graph)
    assert skillit['mixture_eta'] == pytest.approx(0.2 / 3)
    assert skillit['skillit_graph'] == 'graph.json' and skillit['sources']['code'] == 1.0
    # The control has the step size of the method.
    control = arm_knobs(setup, 'aioli_random', 3.0, {})
    assert control['mixture_eta'] == arm_knobs(setup, 'aioli', 3.0, {})['mixture_eta']
    assert control['aioli_matrix'] == 'random' and control['mixture'] == 'aioli'


def test_step_sizes_are_chosen_without_the_test_text(monkeypatch, capsys):
    """The factor with the lowest loss on val/ is chosen, though another has the lowest test loss.
    A graph that all step sizes share is paid once, a proxy by every one of them."""
    factors = [1 / 3, 1.0, 3.0]
    setup = make_setup('stratified', 'influence', 'skillit', 'doge', 'aioli', 'dml')
    learned = {('skillit', 1.0, 100): ({}, 3.0)}
    learned |= {('doge', factor, 100): ({}, 2.0) for factor in factors}
    asked = {}

    def learn_all(tuned, seeds, of_methods):
        asked.update(of_methods)
        assert seeds == [100] and list(tuned.settings) == list(best)
        return learned

    # Aioli ends the same with every step size, so it keeps the default.
    best = dict(influence=3.0, skillit=1.0, doge=1 / 3, aioli=1.0)

    def read_arms(folder, arms, seeds):
        entries = {}
        for method, good in best.items():
            for factor in factors:
                arm = methods_study.with_factor(method, factor)
                val = 3.0 if factor == good or method == 'aioli' else 3.1
                mixture = 'influence' if method == 'influence' else 'fixed'
                entries[arm, 100] = make_entry(arm, 100, val, 6 - val, mixture)
        assert set(arms) == {arm for arm, _ in entries}
        return entries

    monkeypatch.setattr(methods_study, 'learn_all', learn_all)
    monkeypatch.setattr(methods_study, 'train_arms', lambda *_: None)
    monkeypatch.setattr(methods_study, 'read_arms', read_arms)
    monkeypatch.setattr(methods_study, 'own_cost', lambda entry: 1.5)
    found, costs = methods_study.tune_steps(setup, factors, 100)
    assert found == best and asked == dict.fromkeys(best, factors)
    assert costs == dict(influence=4.5, skillit=4.5 + 3, doge=4.5 + 6, aioli=4.5)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| infl')]
    assert table == ['| influence | 0.3 | 3.1000 | 3.1000 | 3.0000 | x 3 |']


def test_p_values_are_corrected_over_all_sets(capsys):
    """Two sets with three methods each are four comparisons, whichever table they stand in."""
    rng = np.random.default_rng(0)
    seeds = [0, 1, 2]
    results = []
    p = []
    for title in ('first', 'second'):
        losses = dict(stratified=rng.normal(4, 0.01, 3))
        losses['clear'] = losses['stratified'] - 0.1 + rng.normal(0, 1e-3, 3)
        losses['chance'] = losses['stratified'] + rng.normal(0.005, 0.01, 3)
        entries = {}
        for method, values in losses.items():
            for seed in seeds:
                entries[method, seed] = make_entry(method, seed, 9.0, values[seed])
        costs = dict.fromkeys(entries, 2.0)
        results.append(Result(title, NAMES, list(losses), entries, costs, dict(clear=4.0)))
        for method in ('clear', 'chance'):
            a, b = np.exp(losses[method]), np.exp(losses['stratified'])
            p.append(stats.ttest_rel(a, b).pvalue)
    methods_study.print_results(results, seeds)
    printed = capsys.readouterr().out
    rows = [line.split(' | ') for line in printed.splitlines() if line.startswith('| c')]
    order = np.argsort(p)
    expected = np.empty(4)
    expected[order] = np.maximum.accumulate(np.sort(p) * [4, 3, 2, 1])
    assert [row[3] for row in rows] == [f'{value:.2g}' for value in p]
    assert [row[4] for row in rows] == [f'{min(1, value):.2g}' for value in expected]
    assert [row[-1].strip(' |') for row in rows] == ['4.00', '', '4.00', '']
    n_clear = int((expected < 0.05).sum())
    assert f"4 comparisons with stratified. By Holm's correction, {n_clear} of them" in printed


def test_a_script_that_fails_names_its_log(tmp_path):
    log = tmp_path / 'below' / 'x.log'
    with pytest.raises(BadInput, match=r'nothing\.py failed, see .*x\.log'):
        studies.run('nothing.py', log=str(log))
    assert 'nothing.py' in log.read_text()


def test_a_right_matrix_scores_best():
    """Losses that a matrix makes by itself, with noise that no mixture explains."""
    rng = np.random.default_rng(0)
    n_targets, n_sources = len(attribution_study.TARGETS), len(attribution_study.SOURCES)
    p = rng.dirichlet(np.ones(n_sources), 40)
    G = rng.normal(size=(n_targets, n_sources))
    judge = attribution_study.Judge(p, -p @ G.T + rng.normal(0, 1e-3, (40, n_targets)))
    value, draws = judge([-p @ G.T])
    assert (value > 0.98).all() and draws.shape == (400, len(attribution_study.COLUMNS))
    np.testing.assert_allclose(judge([p @ G.T])[0], -value)
    # Every source's own share orders its loss here, and says nothing of what is left beside it.
    own = attribution_study.like_sources(np.eye(n_sources))
    judge = attribution_study.Judge(p, -p @ (own + 0.1 * G).T)
    value, _ = judge([-p @ own.T])
    assert value[0] > 0.9 and np.isnan(value[3])


def test_near_copies_drop_a_tenth_of_the_words():
    document = ' '.join(str(i) for i in range(10_000))
    (copy,) = speedrun.near_copies([document])
    kept = copy.split()
    assert 8_800 < len(kept) < 9_200
    assert [int(word) for word in kept] == sorted({int(word) for word in kept})


def test_distillation_breaks_even_where_plain_training_costs_as_much():
    """Plain losses fall by 0.1 for every doubling of the FLOPs."""
    assert distil_study.worth_of(3.9, [1.0, 2.0, 4.0], [4.0, 3.9, 3.8]) == pytest.approx(2.0)
    assert distil_study.worth_of(3.85, [1.0, 2.0, 4.0], [4.0, 3.9, 3.8]) == pytest.approx(8**0.5)
    assert distil_study.worth_of(3.7, [1.0, 2.0, 4.0], [4.0, 3.9, 3.8]) is None
