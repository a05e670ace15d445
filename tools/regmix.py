"""The best mixture by regression with trees: RegMix, and RegMix-D for schedules.

RegMix (Liu et al. 2024, arXiv:2407.01492) fits gradient-boosted trees to the final losses of runs
and searches many random mixtures for the lowest prediction. RegMix-D (Zhao et al. 2026,
arXiv:2606.18663) fits them to whole loss curves, and answers with a mixture for every stage of a
run: a file for the knob `mixture_schedule` of train.py.

Shapes: n runs, m sources, k evaluated sources, T stages.
"""
import numpy as np
from scipy.stats import spearmanr

from configurator import BadInput
from tools.best_mixture import (
    check_points,
    check_static,
    check_target,
    describe_columns,
    find_columns,
)
from tools.commands import print_table

N_DRAWS = 100_000       # random mixtures that are searched, as in RegMix
N_BEST = 128            # the mean of this many best ones is the answer, as in RegMix


def fit_trees(p, y):
    """Gradient-boosted trees from mixtures (n, m) to a loss (n,).

    RegMix's settings: 1,000 trees at a learning rate of 0.01, without early stopping.
    """
    # Only regression needs scikit-learn.
    from sklearn.ensemble import HistGradientBoostingRegressor
    # With the default of 20 rows per leaf, trees on fewer than 40 runs could not split.
    options = dict(max_leaf_nodes=31, min_samples_leaf=min(20, max(2, len(y) // 10)))
    options.update(early_stopping=False, random_state=42)
    trees = HistGradientBoostingRegressor(learning_rate=0.01, max_iter=1000, **options)
    return trees.fit(p, y)


def draw_mixtures(prior):
    """The random mixtures (N_DRAWS, m) that a search looks at. prior (m,) parameters."""
    draws = np.random.default_rng(42).dirichlet(np.asarray(prior), N_DRAWS)
    # All shares of a draw may underflow where the prior is very small.
    return draws[np.isfinite(draws).all(1)]


def prior_of(natural, strength):
    """The parameters (M,) of the Dirichlet distribution that a search draws from.

    natural   (M,) shares
    strength  the sum of the parameters. The larger, the closer are draws to `natural`. The paper
              has 1, the shares themselves
    """
    # A parameter of 0 is not allowed, and draws of a tiny one are 0.
    return np.maximum(np.asarray(natural) * strength, 1e-6)


def columns_of(prior, columns):
    """Parameters (m,) of the Dirichlet distribution of Columns. prior (M,), None: 1 for all.

    Sums of shares from a Dirichlet distribution have the sums of its parameters.
    """
    return np.ones(len(columns.parts)) if prior is None else columns.reduce(prior)


def best_of(draws, predicted):
    """The mean of the N_BEST draws (D, m) of lowest prediction (D,): (m,)."""
    # Trees give many draws the same prediction. A stable sort always picks the same of them.
    return draws[np.argsort(predicted, kind='stable')[:N_BEST]].mean(0)


def regmix(p, y, prior):
    """Returns the best mixture (m,) by regression. RegMix, Liu et al. 2024 (arXiv:2407.01492).

    It is the mean of the 128 mixtures of lowest predicted loss among 100,000 from Dirichlet(prior).
    p (n, m), y (n,) the loss to minimise, prior (m,) shares of the available tokens.
    """
    draws = draw_mixtures(prior)
    return best_of(draws, fit_trees(p, y).predict(draws))


# -- schedules -------------------------------------------------------------------------------------


def read_curves(table, n_stages):
    """The loss curves of a table of runs at the ends of equal stages.

    Returns (steps (T + 1,) from the first to the last common evaluation, losses (n, T + 1, k)).
    Raises BadInput if the runs have no common evaluations, or fewer than the stages need.
    """
    curves = []
    for run in table.runs:
        curve = {}
        for record in run.records:
            losses = [record.get(f'val/loss_{name}') for name in table.evaluated]
            if None not in losses:
                curve[record['step']] = losses
        curves.append(curve)
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    if len(common) < n_stages + 1:
        raise BadInput(
            f'{n_stages} stages need {n_stages + 1} evaluations at the same steps in all runs, and '
            f'these have {len(common)}. Give fewer --stages, or train with a shorter '
            'eval_interval (a JSON or CSV table has no loss curves).')
    # The evaluations that are nearest to equal parts of the run.
    ideal = np.linspace(common[0], common[-1], n_stages + 1)
    nearest = np.abs(np.array(common)[None] - ideal[:, None]).argmin(1)
    # Rounding may choose one evaluation twice where they are not evenly spaced.
    if len(set(nearest)) < n_stages + 1:
        nearest = np.linspace(0, len(common) - 1, n_stages + 1).round().astype(int)
    steps = np.array(common)[nearest]
    losses = np.array([[curve[step] for step in steps] for curve in curves], dtype=np.float64)
    return steps, losses


def fit_stages(p, curves):
    """Trees that predict what a mixture gains in every stage of a run.

    p (n, m) mixtures, curves (n, T + 1) the loss to minimise at the ends of the stages.
    Returns a function (draws (D, m), stage) -> predicted scores (D,), lower is better. A score is
    the loss at the end of a stage minus that at its beginning, in standard deviations over runs.

    All stages share one regression, with the stage as a feature: where the best mixture does not
    change, they support each other. The loss at the beginning is no feature: a run of one mixture
    has a loss that follows from the mixture, so the runs cannot tell the two apart.
    """
    changes = np.diff(curves, axis=1)                                                  # (n, T)
    # Early stages change the loss far more than late ones, and would be all that trees look at.
    spread = np.maximum(changes.std(0), 1e-12)
    scores = (changes - changes.mean(0)) / spread
    n, n_stages = changes.shape
    features = np.column_stack((np.repeat(p, n_stages, 0), np.tile(np.arange(n_stages), n)))
    trees = fit_trees(features, scores.ravel())

    def predict(draws, stage):
        return trees.predict(np.column_stack((draws, np.full(len(draws), stage))))

    return predict


def regmix_d(p, curves, prior):
    """The best mixture of every stage (T, m) by regression on loss curves. RegMix-D, offline.

    p (n, m), curves (n, T + 1), prior as in `regmix`. Every stage takes the mean of the 128 draws
    that promise the largest fall of the loss during the stage.
    """
    predict = fit_stages(p, curves)
    draws = draw_mixtures(prior)
    return np.array([
        best_of(draws, predict(draws, stage)) for stage in range(curves.shape[1] - 1)])


def schedule_of(names, steps, stages):
    """The content of a file for the knob `mixture_schedule` of train.py.

    names of the m sources, steps (T + 1,) ends of the stages, stages (T, m) their mixtures.
    Points are shares of the run, because the target run is longer than its proxies.
    """
    # A source that no stage uses may be left out of the target run.
    used = stages.max(0) >= 5e-7
    points = []
    for step, p in zip(steps[:-1], stages, strict=True):
        share = 0.0 if not points else float(step / steps[-1])
        weights = {
            name: round(float(x), 6)
            for name, x, is_used in zip(names, p, used, strict=True) if is_used}
        points.append(dict(share=round(share, 6), weights=weights))
    return dict(interpolation='step', points=points)


# -- reports --------------------------------------------------------------------------------------


def loss_to_lower(table, target, losses):
    """The loss of the group `target`, or the mean ('') of losses (..., k): (...).

    Raises BadInput for an unknown group, and below 20 runs.
    """
    if len(table.runs) < 20:
        raise BadInput(
            f'{len(table.runs)} runs are too few for a regression by trees: it takes 20 at least '
            '(the paper has 512). fit-static needs fewer.')
    check_target(table, target)
    return losses[..., table.evaluated.index(target)] if target else losses.mean(-1)


def regmix_runs(table, target, prior=None):
    """Finds the best mixture by regression for the group `target` ('': the mean loss).

    prior  (M,) parameters of the Dirichlet distribution that is searched. None: 1 for all
    Prints it, and returns the content of regmix.json. Raises BadInput below 20 runs.
    """
    y = loss_to_lower(table, target, table.loss)
    columns = find_columns(table.groups, table.p)
    notes = describe_columns(columns, table.p)
    total = 1 - columns.held.sum()
    q = columns.reduce(table.p) / total
    check_points(q, table.loss, 'regmix', 0)
    held = np.arange(len(y)) % 4 == 3
    predicted = fit_trees(q[~held], y[~held]).predict(q[held])
    rank = spearmanr(predicted, y[held]).statistic
    best = columns.expand(total * regmix(q, y, columns_of(prior, columns)))
    print('\n'.join(notes) + '\n' if notes else '', end='')
    print(f'{len(y)} runs; Spearman on every fourth, held out: {rank:.4f}')
    print_table(['source', 'share'], zip(table.groups, best, strict=True))
    found = dict(groups=table.groups, target=target, spearman_held_out=float(rank), notes=notes)
    return {**found, 'p': best.tolist()}


def regmix_d_runs(table, target, prior, n_stages):
    """Finds the best mixture of every stage by regression on loss curves, and prints them.

    prior as in `regmix_runs`. Returns (content of regmix_d.json, content of the schedule).
    """
    check_static(table)
    columns = find_columns(table.groups, table.p)
    total = 1 - columns.held.sum()
    q = columns.reduce(table.p) / total
    steps, losses = read_curves(table, n_stages)
    curves = loss_to_lower(table, target, losses)
    check_points(q, curves, 'regmix-d', 0)
    held = np.arange(len(q)) % 4 == 3
    predict = fit_stages(q[~held], curves[~held])
    drops = np.diff(curves[held], axis=1)
    ranks = [float(spearmanr(predict(q[held], i), drops[:, i]).statistic) for i in range(n_stages)]
    best = columns.expand(total * regmix_d(q, curves, columns_of(prior, columns)))
    print(f'{len(q)} runs, {n_stages} stages by the evaluations at the steps {steps.tolist()}')
    names = [f'from {step}' for step in steps[:-1]]
    print_table(['source', *names], [[n, *s] for n, s in zip(table.groups, best.T, strict=True)])
    print_table(['Spearman, every fourth held out', *names], [['', *ranks]])
    moved = float(np.abs(np.diff(best, axis=0)).sum(1).max() / 2) if n_stages > 1 else 0.0
    print(f'at most {100 * moved:.1f} % of the mixture moves between two stages')
    found = dict(groups=table.groups, target=target, steps=steps.tolist(), stages=best.tolist())
    found.update(spearman_held_out=ranks, moved=moved)
    return found, schedule_of(table.groups, steps, best)
