"""The mixture rules against worked cases, and in the training loop."""
import json

import numpy as np
import pytest

import mixtures
from configurator import BadInput
from conftest import SHARED

CASES = SHARED.parent / 'reference' / 'mixing_update_cases.json'


@pytest.fixture(scope='module')
def cases():
    if not CASES.is_file():
        pytest.skip(f'{CASES} is not on this machine')
    return json.loads(CASES.read_text())


def named(values):
    return {str(i): value for i, value in enumerate(values)}


def listed(weights):
    return list(weights.values())


@pytest.mark.parametrize('n', range(5))
def test_aioli_rounds_of_the_public_code(cases, n):
    if n >= len(cases['aioli_rounds']['cases']):
        pytest.skip('there are fewer cases')
    case = cases['aioli_rounds']['cases'][n]
    m, sweeps, names = case['m'], case['sweeps'], [str(i) for i in range(case['m'])]
    P = mixtures.one_hot_mixtures(names, case['one_hot_factor'])
    rules = dict(accumulate='p_accumulating_exponentiated_gradient', **({} if case['ema'] is None else dict(reference_ema='p_reference_code')))
    for rule, expected in rules.items():
        weights, state = mixtures.uniform(named(range(m))), {}
        per_round = 1 + sweeps * m
        for t in range(len(case['val_losses']) // per_round):
            losses = case['val_losses'][t * per_round:(t + 1) * per_round]
            order = [j for permutation in case['order'][t * sweeps:(t + 1) * sweeps] for j in permutation]
            A = mixtures.aioli_matrix([listed(P[str(j)]) for j in order], -np.diff(losses, axis=0))
            weights, state, log = mixtures.update_aioli(weights, A, state, case['eta'], case['ema'], rule)
            assert A == pytest.approx(np.array(case['A_raw'][t]), abs=1e-8)
            assert mixtures.normalised(A) == pytest.approx(np.array(case['A_normalised'][t]), abs=1e-8)
            assert listed(weights) == pytest.approx(case[expected][t], abs=1e-9)


def test_aiolis_prior_is_kept_by_both_rules():
    prior, A = dict(a=0.9, b=0.1), np.array([[0.2, 0.1], [0.1, 0.3]])
    for rule in ('accumulate', 'reference_ema'):
        first, state, _ = mixtures.update_aioli(prior, A, {}, 0.2, 0.1, rule)
        assert first['a'] == pytest.approx(0.9 * np.exp(0.2 * 3 / 7) / (0.9 * np.exp(0.2 * 3 / 7) + 0.1 * np.exp(0.2 * 4 / 7)))
        second, _, _ = mixtures.update_aioli(first, A, state, 0.2, 0.1, rule)
        assert (second['a'] < first['a'] - 1e-3) == (rule == 'accumulate')


def test_skillit_of_the_public_code(cases):
    case = cases['skillit']
    weights, state, _ = mixtures.update_skillit(named([1, 1, 1]), {}, {}, np.transpose(case['G']), case['eta'], case['window'])
    assert listed(weights) == pytest.approx(case['p0'], abs=1e-9)
    for k, losses in enumerate(case['losses_by_checkpoint']):
        weights, state, log = mixtures.update_skillit(weights, named(losses), state, np.transpose(case['G']), case['eta'], case['window'])
        assert listed(weights) == pytest.approx(case['p_after_k_checkpoints'][str(k + 1)], abs=1e-9)
    assert log['A'][0, 1] == pytest.approx(np.mean([loss[0] for loss in case['losses_by_checkpoint'][1:]]) * case['G'][1][0])


def test_doremi_of_the_public_code(cases):
    for case in cases['doremi']['cases']:
        p = named(case['p'])
        excess = {name: a - b for name, a, b in zip(p, case['loss'], case['ref_loss']) if a or b}
        weights, state, _ = mixtures.update_doremi(p, excess, dict(scores=named(case['previous_scores'])), case['mu'], case['smoothing'])
        assert listed(state['scores']) == pytest.approx(case['scores'], abs=1e-9)
        assert listed(weights) == pytest.approx(case['p_next'], abs=1e-9)
        again, state, _ = mixtures.update_doremi(weights, excess, state, case['mu'], case['smoothing'])
        assert listed(state['average']) == pytest.approx([(a + b) / 2 for a, b in zip(listed(weights), listed(again))])


def test_doge_of_the_public_code(cases):
    for case in cases['doge']['cases']:
        g, v = np.array(case['grad_train']), np.array(case['grad_val_mix'])
        weights, _, log = mixtures.update_doge(named(case['p']), named(g @ v), named(np.linalg.norm(g, axis=1)), {}, case['lr'], 1 / case['mu'],
                                               case['dw_min'], case['dw_max'])
        assert log['gains'] == pytest.approx(case['score'], abs=1e-10)
        assert listed(weights) == pytest.approx(case['p_next'], abs=1e-9)


def test_aioli_uses_the_mixtures_that_were_trained_on():
    """Rows are whole, so shares differ from what was asked; a linear world is recovered from what they were."""
    A, rng = np.array([[0.3, -0.1, 0.0], [0.05, 0.2, 0.1], [0.0, 0.0, 0.4]]), np.random.default_rng(0)
    shares = rng.dirichlet([1, 1, 1], 6)
    assert mixtures.aioli_matrix(shares, shares @ A.T) == pytest.approx(A, abs=1e-12)
    with pytest.raises(BadInput, match='need that many different'):
        mixtures.aioli_matrix([[0.5, 0.5], [0.5, 0.5]], [[0.1, 0.1], [0.2, 0.1]])
    with pytest.raises(BadInput, match='above 1 / sources = 0.3333'):
        mixtures.one_hot_mixtures(['a', 'b', 'c'], 1 / 3)
