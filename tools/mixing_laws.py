"""Mixing laws: how the loss of every group of data depends on the mixture it was trained with.

    python tools/mixing_laws.py fit-static out/sweep        # L_i(p) = c_i + b_i exp(-A_i . p)
    python tools/mixing_laws.py fit-dynamic out/children    # L_i' = L_i - A_i . p
    python tools/mixing_laws.py a-star out/methods          # A* along the trajectory of a method
    python tools/mixing_laws.py sim out/methods             # how similar A* and the measured A are
    python tools/mixing_laws.py regmix out/sweep            # the best mixture by regression
    python tools/mixing_laws.py regmix-d out/sweep          # a schedule, by regression on curves
    python tools/mixing_laws.py recompute out/sweep --add="['pdf']"     # when sources change
    python tools/mixing_laws.py plot out/sweep              # figures of all that was fitted there

The folder holds finished runs of train.py, which tools/sweep.py makes. It can also be a JSON table:
{"groups": [...], "runs": [{"p": [...], "loss": [...], "seed": 0}, ...]}, or two CSV files as Olmix
publishes them: `fit-static ratios.csv metrics.csv`. A config file (.py) may set the knobs.

fit-static also reports the best mixture (tools/best_mixture.py), and regmix and regmix-d choose one
by trees (tools/regmix.py). fit-dynamic and a-star fit short continuations, separately for each
parent run. recompute plans a smaller sweep (tools/mixture_reuse.py).

Laws: Ye et al. 2024 (arXiv:2403.16952), Chen et al. 2024 (Aioli, arXiv:2411.05735). A_ij is what
training on group j does for the loss of group i: positive entries lower it. Shares sum to 1, so a
constant added to a row of A only changes b. Static fits have 0 in the last column of A.

Shapes: n runs, m trained groups, k evaluated groups, d = m - 1 free shares, S simultaneous fits.
"""
import json
import math
import os
from collections import namedtuple
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import spearmanr

if __name__ == '__main__':
    import _path  # noqa: F401

from configurator import BadInput, at_least, between, configure, read_json
from tools.best_mixture import (
    Recipe,
    check_points,
    check_static,
    check_target,
    describe_columns,
    find_columns,
    make_recipe,
    optimum,
    report_optimum,
)
from tools.commands import print_table, read_command, warn_unused
from tools.mixture_reuse import plan_reuse
from tools.regmix import prior_of, regmix_d_runs, regmix_runs
from tools.runs import read_table

# -- knobs --
huber = False                   # Huber loss (delta 0.02) instead of squared errors
families: dict[str, list] = {}  # CSV: losses that are means of metrics, {'math': ['minerva*'], ...}
# -- the best mixture --
kl: at_least(0.0) = 0.02        # nats of mean loss per nat of KL divergence from `natural`. 0: none
natural: dict[str, float] = {}  # natural shares of the sources. {}: by `sizes`, else equal
sizes: dict[str, int] = {}      # tokens of the sources. {}: as the data of the runs says
max_epochs: at_least(0.001) | None = None   # passes over a source at most. None: no cap
tokens: at_least(1) | None = None           # length of the target run, for max_epochs
target = ''                     # group whose loss is minimised. '': the mean over groups
# -- regmix and regmix-d --
prior_strength: at_least(0.001) = 1.0       # sum of the parameters of the Dirichlet distribution of
                                # natural shares that is searched. Equal shares: all mixtures alike
stages: between(1, 100) = 4     # regmix-d: mixtures of a schedule
# -- recompute --
add: list[str] = []             # sources that are new
drop: list[str] = []            # sources that are no longer used
free: list[str] = []            # sources of the sweep whose share is chosen anew, such as revised
                                # ones. The others keep the ratios of the best mixture

# Command -> the knobs that it reads.
RECIPE = ('huber', 'families', 'target', 'kl', 'natural', 'sizes', 'max_epochs', 'tokens')
TREES = ('families', 'natural', 'sizes', 'target', 'prior_strength')
USED = {
    'fit-static': RECIPE, 'fit-dynamic': (), 'a-star': (), 'sim': (), 'regmix': TREES,
    'regmix-d': (*TREES, 'stages'), 'recompute': (*RECIPE, 'add', 'drop', 'free'), 'plot': ()}

# Bound of the exponents. Without it, the exponent of a group that hardly any run contains diverges.
BOUND = 80.0


# -- the static law ------------------------------------------------------------------------------

@dataclass
class Law:
    """The law of one group: loss = c + exp(log_b + s . p[:-1]), so A_j = -s_j and A_m = 0."""
    c: float
    log_b: float
    s: np.ndarray                                   # (d,)
    report: dict = field(default_factory=dict)      # filled by fit_static

    def __call__(self, p):
        """p (..., m) -> losses (...)."""
        return self.c + np.exp(self.log_b + np.asarray(p)[..., :-1] @ self.s)


Projection = namedtuple('Projection', 'c b E log_scale residuals sums')


def project(X, y, w, s):
    """The best c >= 0 and b >= 0 for given exponents (variable projection).

    X  (n, d) shares without the last group     y  (n,) losses
    w  (S, n) weights of the runs               s  (S, d) exponents
    Returns a Projection: c (S,), b (S,), E (S, n) = exp(s . x) over its largest value, log_scale
    (S,) the logarithm of that value, residuals (S, n), and the sums that `jacobian` needs.
    """
    z = s @ X.T                                                                        # (S, n)
    # Subtracting the largest value keeps exp from overflowing.
    top = z.max(1)
    E = np.exp(z - top[:, None])
    # The law is linear in c and b. These are the sums of its normal equations, each (S,).
    W = w.sum(1)
    WE = (w * E).sum(1)
    WEE = (w * E * E).sum(1)
    Wy = w @ y
    WEy = (w * E) @ y
    # If E is constant over the runs, the equations are singular. The floor keeps b finite.
    det = np.maximum(W * WEE - WE * WE, 1e-14 * W * WEE)
    # A negative b cannot be a Law, which stores the logarithm of b.
    b = np.maximum((W * WEy - WE * Wy) / det, 0.0)
    c = (Wy - b * WE) / W
    # Where the best c is negative, it is set to 0 and b is fitted alone.
    free = c > 0
    b = np.where(free, b, np.maximum(WEy / WEE, 0.0))
    c = np.where(free, c, 0.0)
    residuals = y - c[:, None] - b[:, None] * E
    return Projection(c, b, E, top, residuals, (W, WE, WEE, det, free))


def jacobian(X, w, at):
    """Derivative of the residuals by s while c and b stay optimal: (S, n, d).

    Kaufman's approximation: the part of the derivative that is orthogonal to 1 and E.
    """
    W, WE, WEE, det, free = (x[:, None] for x in at.sums)
    E = at.E
    D = (at.b[:, None] * E)[:, :, None] * X                                            # (S, n, d)
    T1 = np.einsum('sn,snd->sd', w, D)
    T2 = np.einsum('sn,snd->sd', w * E, D)
    # Where c is held at 0 it cannot absorb a change, so only the part along E is removed.
    on_one = np.where(free, (WEE * T1 - WE * T2) / det, 0.0)
    on_E = np.where(free, (W * T2 - WE * T1) / det, T2 / WEE)
    return -(D - on_one[:, None] - on_E[:, None] * E[:, :, None])


def squares(r, huber):
    """Squared residuals, or with huber as delta twice the Huber loss, which grows linearly."""
    if huber is None:
        return r * r
    return np.where(np.abs(r) <= huber, r * r, huber * (2 * np.abs(r) - huber))


def descend(X, y, w, s, steps, huber=None):
    """Levenberg-Marquardt on the exponents, from S starts at once.

    w (S, n) weights of the runs, s (S, d) starts; huber is the delta of the Huber loss.
    Returns s (S, d) and the objectives (S,), the weighted sums of `squares`.
    """
    def objective(at):
        return (w * squares(at.residuals, huber)).sum(1)

    damping = np.full(len(s), 1e-2)
    at = project(X, y, w, s)
    best = objective(at)
    for _ in range(steps):
        v = w
        if huber is not None:
            # Iteratively reweighted least squares: the weights give the Huber loss's gradient.
            v = w * np.minimum(1.0, huber / np.maximum(np.abs(at.residuals), 1e-300))
            at = project(X, y, v, s)
        J = jacobian(X, v, at)                                                         # (S, n, d)
        VJ = v[:, :, None] * J
        H = np.matmul(VJ.transpose(0, 2, 1), J)                                        # (S, d, d)
        g = np.einsum('snd,sn->sd', VJ, at.residuals)
        # Damping in units of the diagonal makes the step independent of the scale of the losses.
        scale = np.maximum(np.einsum('sdd->sd', H), 1e-12)
        H = H + (damping[:, None] * scale)[:, :, None] * np.eye(s.shape[1])
        step = np.linalg.solve(H, -g[:, :, None])[:, :, 0]
        # The limit of 5 keeps a start with a nearly singular H from jumping to the bound at once.
        tried = np.clip(s + np.clip(step, -5, 5), -BOUND, BOUND)
        # The weights v change in every iteration, so steps are judged by the objective with w.
        value = objective(project(X, y, v, tried))
        # A start whose step does not improve it stays, and takes a shorter step next time.
        good = value < best
        s = np.where(good[:, None], tried, s)
        best = np.where(good, value, best)
        damping = np.clip(np.where(good, damping * 0.3, damping * 4), 1e-9, 1e9)
        at = project(X, y, w, s)
    return s, best


def random_starts(d, n, seed=0):
    """n starting exponents (n, d), flat and steep, of both signs. A third varies one share only."""
    rng = np.random.default_rng(seed)
    s = rng.normal(size=(n, d)) * np.exp(rng.uniform(math.log(0.1), math.log(12), (n, 1)))
    # A loss often depends on one share, mostly that of the group itself, which lowers it.
    # Hence the range below has more room on the negative side.
    one = rng.integers(0, d, n // 3)
    s[:n // 3] = 0.0
    s[np.arange(n // 3), one] = rng.uniform(-16, 8, n // 3)
    return s


def polish(X, y, s, huber=None):
    """Optimises c, log_b and s together from exponents s (d,) near an optimum. Returns a Law."""
    at = project(X, y, np.ones((1, len(y))), s[None])
    # The best law is a constant here, and b has no finite logarithm.
    if at.b[0] <= 0:
        return Law(float(at.c[0]), -math.inf, np.zeros(X.shape[1]))

    def term(q):
        # exp overflows beyond 709.
        return np.exp(np.minimum(q[1] + X @ q[2:], 700.0))

    def residuals(q):
        return q[0] + term(q) - y

    def derivative(q):
        e = term(q)
        return np.column_stack((np.ones(len(y)), e, e[:, None] * X))

    inside = np.clip(s, -BOUND + 1e-6, BOUND - 1e-6)
    start = np.r_[max(at.c[0], 1e-9), math.log(at.b[0]) - at.log_scale[0], inside]
    # c has no upper bound: with noisy losses the best c can exceed the lowest loss.
    low = np.r_[0.0, -np.inf, np.full(X.shape[1], -BOUND)]
    high = np.r_[np.inf, np.inf, np.full(X.shape[1], BOUND)]
    options = dict(x_scale='jac', xtol=1e-12, ftol=1e-12, gtol=1e-14, max_nfev=300)
    if huber is not None:
        options.update(loss='huber', f_scale=huber)
    found = least_squares(residuals, start, derivative, bounds=(low, high), **options)
    q = found.x if np.isfinite(found.cost) else start
    return Law(float(q[0]), float(q[1]), q[2:])


def fit_law(p, y, huber=None):
    """Fits one Law to mixtures p (n, m) and losses y (n,) in nats, without a report.

    The best three of 48 starts of variable projection are polished, and the best is returned.
    """
    X = p[:, :-1]
    s, value = descend(X, y, np.ones((48, len(y))), random_starts(X.shape[1], 48), 40, huber)
    # Starts end in different local minima. Three candidates are cheap to polish, 48 are not.
    laws = [polish(X, y, s[i], huber) for i in np.argsort(value)[:3]]
    return min(laws, key=lambda law: squares(law(p) - y, huber).sum())


def refit(p, y, w, law, huber=None, n_starts=6):
    """Fits S laws to weighted runs, each from the given law and a few other starts.

    w (S, n) weights of the runs, where 0 leaves a run out. law: None starts at random points only.
    Returns predictions (S, n) for all runs, and (c (S,), log_b (S,), s (S, d)).
    """
    X = p[:, :-1]
    S = len(w)
    if law is None:
        starts = random_starts(X.shape[1], n_starts, 2)
        n_steps = 40
    else:
        # The law itself is usually near the optimum, so a few starts are enough.
        near = np.stack((law.s, 0.5 * law.s, np.clip(1.5 * law.s, -BOUND, BOUND)))
        starts = np.concatenate((near, random_starts(X.shape[1], n_starts - 3, 1)))
        n_steps = 25
    s, value = descend(X, y, np.repeat(w, n_starts, 0), np.tile(starts, (S, 1)), n_steps, huber)
    best = value.reshape(S, n_starts).argmin(1)
    s = s.reshape(S, n_starts, -1)[np.arange(S), best]
    at = project(X, y, w, s)
    with np.errstate(divide='ignore'):                              # b may be 0
        log_b = np.log(at.b) - at.log_scale
    return at.c[:, None] + at.b[:, None] * at.E, (at.c, log_b, s)


def r2(y, prediction):
    error = float(((y - prediction) ** 2).sum())
    return 1 - error / max(float(((y - y.mean()) ** 2).sum()), 1e-300)


def errors_of(y, prediction):
    mse = float(((y - prediction) ** 2).mean())
    mae = float(np.abs(y - prediction).mean())
    return dict(r2=r2(y, prediction), mse=mse, mae=mae)


def fit_static(p, y, what='this fit', huber=None):
    """Fits the static law of one group. Returns a Law whose report says how far to trust it.

    p      (n, m), rows sum to 1            y      (n,) nats
    what   name of the fit in errors        huber  delta of the Huber loss, None: least squares
    The report has n and sse, and r2, mse and mae of each of these predictions:
      fit, leave_one_out               of all runs, and of each run by a fit to the others
      held_out                         of every fourth run by a fit to the others, None if too few
      linear, linear_leave_one_out     of all runs, and of each run left out, by a linear law
    Its se are the standard errors of c, log_b and s, nan where `standard_errors` says so.
    Raises BadInput for losses that are not finite, too few runs, or too similar mixtures.
    """
    p = np.asarray(p, dtype=np.float64)
    y = np.asarray(y, dtype=np.float64)
    n, m = p.shape
    check_points(p, y, what, m + 1)
    law = fit_law(p, y, huber)
    report = law.report
    report.update(n=n, sse=float(((law(p) - y) ** 2).sum()), fit=errors_of(y, law(p)))
    left_out, _ = refit(p, y, 1.0 - np.eye(n), law, huber)
    report['leave_one_out'] = errors_of(y, left_out.diagonal())
    report['held_out'] = None
    # Not a random choice, so that the figures of a folder do not change from call to call.
    held = np.arange(n) % 4 == 3
    if (~held).sum() >= 2 * (m + 1) and held.sum() >= 2:
        found, _ = refit(p, y, (~held)[None].astype(float), law, huber)
        report['held_out'] = errors_of(y[held], found[0][held])
    # Shares sum to 1, so a linear law needs no intercept.
    linear = p @ np.linalg.lstsq(p, y, rcond=None)[0]
    report['linear'] = errors_of(y, linear)
    # For a linear law, leaving a run out divides its residual by 1 minus its leverage.
    leverage = np.einsum('ij,ji->i', p, np.linalg.pinv(p))
    left_out = y - (y - linear) / np.maximum(1 - leverage, 1e-9)
    report['linear_leave_one_out'] = errors_of(y, left_out)
    report['se'] = standard_errors(law, p, y)
    return law


def standard_errors(law, p, y):
    """Standard errors of (c, log_b, s) from the curvature at the optimum: list of floats.

    An entry is nan when the runs do not determine the parameter or it is at its bound.
    """
    X = p[:, :-1]
    e = np.exp(law.log_b + X @ law.s)
    J = np.column_stack((np.ones(len(y)), e, e[:, None] * X))
    # A parameter at its bound is not estimated, and has no share in the curvature.
    at_bound = np.abs(law.s) >= BOUND - 1e-3
    fixed = np.r_[law.c <= 1e-8, not np.isfinite(law.log_b), at_bound]
    # With columns of norm 1, the floor below separates what the runs do not determine.
    norms = np.maximum(np.linalg.norm(J[:, ~fixed], axis=0), 1e-300)
    _, values, vectors = np.linalg.svd(J[:, ~fixed] / norms, full_matrices=False)
    sse = float(((law(p) - y) ** 2).sum())
    freedom = max(len(y) - J.shape[1], 1)
    curvature = ((vectors.T / np.maximum(values, 1e-12)) ** 2).sum(1)
    se = np.sqrt(curvature / norms**2 * sse / freedom)
    out = np.full(J.shape[1], np.nan)
    out[~fixed] = np.where(norms < 1e-6 * np.sqrt(len(y)), np.nan, se)
    return out.tolist()


def bootstrap_laws(p, Y, huber=None, n_draws=100):
    """Laws of n_draws bootstrap samples of the runs: list of n_draws lists of k Law.

    p (n, m), Y (n, k) losses. Every law is a whole fit from twelve random starts, so it may end in
    another minimum than the law of all runs. A sample is the same for all groups.
    """
    n = len(p)
    # A run's weight is how often the sample holds it. Runs that it lacks keep 1 %, so that it also
    # determines the exponent of a source that few runs have.
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), n_draws)       # (S, n)
    w = np.maximum(counts, 0.01)
    found = [[] for _ in range(n_draws)]
    # Parts of 10 samples bound the memory: 120 fits with n x m derivatives at a time.
    for y in Y.T:
        for first in range(0, n_draws, 10):
            part = slice(first, first + 10)
            for laws, c, log_b, s in zip(
                    found[part], *refit(p, y, w[part], None, huber, 12)[1], strict=True):
                laws.append(Law(c, log_b, s))
    return found


# -- the dynamic law -----------------------------------------------------------------------------

def fit_dynamic(p, drops, what='this fit'):
    """Fits A of L_i' = L_i - sum_j A_ij p_j by least squares to n continuations of one run.

    p (n, m) their mixtures, drops (n, k) = L_i - L_i' in nats, what: name of the fit in errors.
    Returns A (k, m) and a dict for every evaluated group: r2, leave_one_out (an r2), se (m,).
    Raises BadInput when the continuations do not determine A.
    """
    p = np.asarray(p, dtype=np.float64)
    drops = np.asarray(drops, dtype=np.float64)
    n, m = p.shape
    check_points(p, drops, what, m)
    # There is no constant: without training, no loss drops.
    inverse = np.linalg.pinv(p)
    A = (inverse @ drops).T
    residuals = drops - p @ A.T
    leverage = np.einsum('ij,ji->i', p, inverse)
    spread = np.sqrt((inverse**2).sum(1))
    freedom = max(n - m, 1)
    reports = []
    for drop, error in zip(drops.T, residuals.T, strict=True):
        left_out = error / np.maximum(1 - leverage, 1e-9)
        report = dict(r2=r2(drop, drop - error), leave_one_out=r2(drop, drop - left_out))
        reports.append({**report, 'se': (spread * np.sqrt(error @ error / freedom)).tolist()})
    return A, reports


def scale_of(A, p, drops):
    """The factor b for which b * A explains continuations best, by least squares over all groups.

    A (k, m), p (n, m), drops (n, k).
    """
    predicted = np.asarray(p) @ np.asarray(A).T
    return float((predicted * drops).sum() / max(float((predicted**2).sum()), 1e-300))


def diagonal_of_two(A):
    """The part of a 2 x 2 matrix that mixtures can tell apart: diag(A_11 - A_12, A_22 - A_21)."""
    A = np.asarray(A, dtype=np.float64)
    return np.diag([A[0, 0] - A[0, 1], A[1, 1] - A[1, 0]])


def sim(X, Y):
    """0.5 * cosine + 0.5 * Spearman of the column sums of two matrices (Aioli, section 4.2).

    The Spearman correlation of a constant vector counts as 0.
    """
    x = np.asarray(X, dtype=np.float64).sum(0)
    y = np.asarray(Y, dtype=np.float64).sum(0)
    cosine = float(x @ y / max(np.linalg.norm(x) * np.linalg.norm(y), 1e-300))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.5 * cosine
    return 0.5 * cosine + 0.5 * float(spearmanr(x, y).statistic)


def compare(stars, estimates):
    """Similarity of A* and estimates of it, lists of (k, m) with one entry for every seed.

    Returns a dict:
      sim, by_seed     mean over seeds, and the values
      uniform          score of a matrix with the sign of A* and equal entries (0.5 * cosine)
      between_seeds    mean sim of the A* of two seeds, None with one seed: a perfect method's score
    """
    pairs = []
    for i, a in enumerate(stars):
        pairs += [sim(a, b) for b in stars[:i]]
    scores = [sim(a, b) for a, b in zip(stars, estimates, strict=True)]
    found = dict(sim=float(np.mean(scores)), by_seed=scores)
    found['uniform'] = float(np.mean([sim(a, np.full_like(a, np.sign(a.sum()))) for a in stars]))
    found['between_seeds'] = float(np.mean(pairs)) if pairs else None
    return found


# -- reports -------------------------------------------------------------------------------------

def seed_noise(table):
    """Standard deviation (k,) of losses over seeds of the same mixture, and degrees of freedom.

    (None, 0) when no mixture was trained twice.
    """
    # Rounded, because the shares of the same mixture may differ in their last digits.
    cells = {}
    for run in table.runs:
        cells.setdefault(tuple(np.round(run.p, 4)), []).append(run.loss)
    repeated = [np.array(losses) for losses in cells.values() if len(losses) > 1]
    freedom = sum(len(losses) - 1 for losses in repeated)
    if not freedom:
        return None, 0
    # Pooled over mixtures, because the few seeds of one mixture give a poor estimate.
    total = sum(((losses - losses.mean(0)) ** 2).sum(0) for losses in repeated)
    return np.sqrt(total / freedom), freedom


def fit_static_runs(table, huber, recipe=None, target=''):
    """Fits the static law to every group, for each seed and over all runs, and prints a report.

    table   tools.runs.Table     huber  delta of the Huber loss, None: least squares
    recipe  of the best mixture. None: the optimum of the laws alone
    target  the group whose loss the best mixture lowers. '': the mean of all
    Returns the content of static.json. Raises BadInput for runs that a static law cannot describe.
    """
    check_static(table)
    check_target(table, target)
    columns = find_columns(table.groups, table.p)
    notes = describe_columns(columns, table.p)
    noise, freedom = seed_noise(table)
    seeds = table.seeds()
    parts = {}
    if len(seeds) > 1:
        parts = {seed: table.only(lambda run, seed=seed: run.seed == seed) for seed in seeds}
    # Each seed is fitted separately if all of them have enough runs.
    if any(len(part.runs) < len(columns.parts) + 2 for part in parts.values()):
        parts = {}
    parts['all'] = table
    fits = []
    rows = []
    laws = []
    for i, group in enumerate(table.evaluated):
        for seed, part in parts.items():
            what = f"group '{group}', seed {seed}"
            law = fit_static(columns.reduce(part.p), part.loss[:, i], what, huber)
            # Sources that are held have 0, as the last one has.
            A = columns.spread(np.r_[-law.s, 0.0]).tolist()
            fits.append(dict(group=group, seed=seed, c=law.c, log_b=law.log_b, A=A, **law.report))
            row = [group, seed, law.report['n']]
            for name in ('fit', 'leave_one_out', 'held_out', 'linear', 'linear_leave_one_out'):
                errors = law.report[name]
                row.append(errors['r2'] if errors else None)
            rows.append([*row, math.sqrt(law.report['fit']['mse'])])
        # The last fit is that of all runs.
        laws.append(law)
    how = 'Huber' if huber else 'least squares'
    print(f'{len(table.runs)} runs of {len(table.groups)} groups, seeds {seeds}, {how}')
    print('\n'.join(notes) + '\n' if notes else '', end='')
    header = ['group', 'seed', 'runs', 'R2', 'R2 left out', 'R2 held out']
    print_table([*header, 'linear R2', 'linear left out', 'rms error'], rows)
    if noise is None:
        print(
            'seed noise: unknown, because no mixture was trained with two seeds. R2 means nothing '
            'unless losses differ more between mixtures than between seeds.')
    else:
        spread = table.loss.std(0, ddof=1)
        for group, sd, deviation in zip(table.evaluated, noise, spread, strict=True):
            ratio = deviation / max(sd, 1e-12)
            print(f'{group}: seed noise {sd:.4f}, mixtures vary {ratio:.1f} times as much')
        noise = dict(sd=noise.tolist(), freedom=freedom)
    data = dict(p=table.p.tolist(), loss=table.loss.tolist(), fits=fits, seed_noise=noise)
    about = dict(groups=table.groups, evaluated=table.evaluated, huber=huber, notes=notes)
    about['target'] = target
    poor = [fit['group'] for fit in fits if fit['seed'] == 'all'
            and fit['leave_one_out']['r2'] < 0.5]
    if poor:
        notes.append(
            f'The laws of {", ".join(poor)} do not predict runs that are left out (R2 below 0.5). '
            'Do not trust the best mixture: train more runs, or merge sources.')
        print(notes[-1])
    aim = table.of(target)
    if target:
        laws = [laws[table.evaluated.index(target)]]
    drawn = bootstrap_laws(columns.reduce(table.p), aim.loss, huber)
    best = report_optimum(aim, laws, drawn, columns, recipe or Recipe())
    return {**about, **data, 'optimum': best}


def fit_families(table):
    """Fits the dynamic law to the continuations of each parent run.

    Returns a list of (parent Run, p (n, m), drops (n, k), A (k, m), reports of fit_dynamic).
    """
    families = {}
    for run in table.runs:
        if run.parent is None:
            raise BadInput(
                f"run '{run.name}' continues no other run. `python tools/sweep.py mixture "
                '--break_step=...` makes parents and children; give the folder of the children.')
        key = (run.parent.method, run.parent.name, run.parent.seed, tuple(run.parent.p))
        families.setdefault(key, []).append(run)
    found = []
    for runs in families.values():
        parent = runs[0].parent
        p = np.array([run.p for run in runs])
        drops = parent.loss - np.array([run.loss for run in runs])
        fit = fit_dynamic(p, drops, f"continuations of '{parent.name}'")
        found.append((parent, p, drops, *fit))
    return found


def with_errors(values, errors):
    return ', '.join(f'{x:.4f} ± {e:.4f}' for x, e in zip(values, errors, strict=True))


def fit_dynamic_runs(table):
    """Fits the dynamic law to the continuations of every parent, and prints a report.

    Returns the content of dynamic.json.
    """
    fits = []
    rows = []
    scores = []                                     # (R2, with one run left out) of every fit
    for parent, _, _, A, reports in fit_families(table):
        fit = dict(parent=parent.name, p=parent.p.tolist(), seed=parent.seed, A=A.tolist())
        fits.append({**fit, 'reports': reports})
        for group, row, r in zip(table.evaluated, A, reports, strict=True):
            scores.append((r['r2'], r['leave_one_out']))
            rows.append([parent.name, group, *scores[-1], with_errors(row, r['se'])])
    print(f'{len(table.runs)} continuations of {len(fits)} runs, the drop of loss i is A_i . p')
    columns = ', '.join(table.groups)
    print_table(['parent', 'group', 'R2', 'R2 left out', f'A of {columns}'], rows)
    mean, left_out = np.mean(scores, 0)
    lowest = np.min(scores, 0)[0]
    print(f'mean R2 {mean:.4f} (lowest {lowest:.4f}), with one run left out {left_out:.4f}')
    return dict(groups=table.groups, evaluated=table.evaluated, fits=fits)


def measured_matrix(run, groups):
    """The A (m, m) that a method had measured by the end of a run.

    For aioli it is the mean over its rounds. For the others it is the last one, which in a proxy is
    already a mean.
    """
    found = []
    for record in run.records:
        if f'mixture/A_{groups[0]}_{groups[0]}' in record:
            found.append([[record.get(f'mixture/A_{i}_{j}') for j in groups] for i in groups])
    if not found:
        raise BadInput(
            f"run '{run.name}' (mixture = '{run.method}') measured no matrix. Let it run longer, "
            'or lower mixture_interval.')
    # An entry that was not logged becomes nan.
    mean = np.mean(np.array(found if run.method == 'aioli' else found[-1:], dtype=np.float64), 0)
    if not np.isfinite(mean).all():
        raise BadInput(
            f"run '{run.name}' logged a matrix with entries that are missing or not finite. Take "
            'it out of the folder.')
    return mean


def a_star_runs(table):
    """Fits A* of every method and seed to continuations of the method's runs, and prints it.

    Returns the content of a_star.json, with the A that each method measured beside A*.
    """
    methods = {}
    for parent, p, drops, A, reports in fit_families(table):
        measured = measured_matrix(parent, table.groups)
        if len(table.groups) == 2:
            # Only the diagonal form is identifiable, and every group has a free constant.
            centred = p - p.mean(0)
            b = scale_of(diagonal_of_two(measured), centred, drops - drops.mean(0))
        else:
            b = scale_of(measured, p, drops)
        found = dict(seeds=parent.seed, A_star=A.tolist(), A=measured.tolist(), b=b)
        found.update(r2=[r['r2'] for r in reports], p=parent.p.tolist())
        method = methods.setdefault(parent.method, {key: [] for key in found})
        for key, value in found.items():
            method[key].append(value)
    for name, method in methods.items():
        scales = ', '.join(f'{b:.3g}' for b in method['b'])
        n_seeds = len(method['seeds'])
        print(f'{name}: {n_seeds} seed(s), mean R2 {np.mean(method["r2"]):.4f}, scale b {scales}')
        for key in ('A_star', 'A'):
            mean = np.mean(method[key], 0)
            spread = np.std(method[key], 0)
            for group, row, deviations in zip(table.groups, mean, spread, strict=True):
                print(f'  {key:<8}{group:<14}{with_errors(row, deviations)}')
    return dict(groups=table.groups, methods=methods)


def similarities(fitted):
    """Compares A* with b * A for every method in the content of a_star.json, and prints a table.

    Two groups are compared by their diagonal forms. Returns the content of sim.json.
    """
    form = diagonal_of_two if len(fitted['groups']) == 2 else np.asarray
    out = {}
    rows = []
    for name, method in fitted['methods'].items():
        stars = [form(np.array(A)) for A in method['A_star']]
        estimates = [b * form(np.array(A)) for A, b in zip(method['A'], method['b'], strict=True)]
        r = out[name] = compare(stars, estimates)
        by_seed = ', '.join(f'{x:.3f}' for x in r['by_seed'])
        rows.append([name, len(stars), r['sim'], r['uniform'], r['between_seeds'], by_seed])
    print_table(['method', 'seeds', 'sim', 'uniform', 'A* of seeds', 'sim by seed'], rows)
    print("uniform: a matrix of equal entries; A* of seeds: one seed's A* against another's")
    return out


def recompute_runs(table, huber, recipe, add, drop, free):
    """Plans a sweep after sources were added or dropped, and prints what it saves.

    Returns the content of recompute.json, which tools/sweep.py reads.
    """
    check_static(table)
    columns = find_columns(table.groups, table.p)
    q = columns.reduce(table.p)
    check_points(q, table.loss, 'recompute', q.shape[1] + 1)
    laws = [fit_law(q, y, huber) for y in table.loss.T]
    best = optimum(laws, recipe, columns)
    plan = plan_reuse(table.groups, best, add, drop, free)
    print_table(['source that keeps its ratio', 'share of them'], plan['frozen'].items())
    print(plan['note'])
    return plan


def result_of(command, table, limits):
    """Runs a command on a table. limits: the knobs of a Recipe. Returns what it writes."""
    groups = table.groups
    if command == 'fit-dynamic':
        return fit_dynamic_runs(table)
    if command == 'a-star':
        return a_star_runs(table)
    delta = 0.02 if huber else None
    recipe = make_recipe(groups, **limits)
    if kl and command in ('fit-static', 'recompute'):
        print(f'natural shares: {recipe.source}')
    check_target(table, target)
    if command == 'fit-static':
        return fit_static_runs(table, delta, recipe, target)
    if command == 'recompute':
        return recompute_runs(table.of(target), delta, recipe, add, drop, free)
    # Equal shares as a prior would favour no mixture either, but draw few from the inside.
    known = recipe.source != 'equal shares'
    prior = prior_of(recipe.natural, prior_strength) if known else None
    print(f'mixtures are drawn from Dirichlet({recipe.source if known else "1, 1, ..."})')
    if command == 'regmix':
        return regmix_runs(table, target, prior)
    return regmix_d_runs(table, target, prior, stages)


def write_json(path, content):
    with open(path, 'w', encoding='utf-8') as f:
        json.dump(content, f, indent=1)
    print(f'written: {path}')


if __name__ == '__main__':
    command, arguments = read_command(tuple(USED))
    paths = [a for a in arguments if not a.startswith('-') and not a.endswith('.py')]
    knobs = [a for a in arguments if a not in paths]
    configure(globals(), knobs, verbose=False)
    is_csv = len(paths) == 2 and paths[0].endswith('.csv')
    if len(paths) != 1 and not is_csv:
        raise BadInput(
            f'name one folder of runs, for example: python tools/mixing_laws.py {command} '
            f'out/sweep, or two CSV files. There are {len(paths)} in these arguments.')
    path = paths[0]
    if path.endswith('.csv') and not is_csv:
        raise BadInput(f'{path}: give two CSV files, the ratios and then the metrics.')
    every = {name for names in USED.values() for name in names}
    warn_unused(knobs, sorted(every - set(USED[command])), f'with {command}')
    if not is_csv:
        warn_unused(knobs, ['families'] if 'families' in USED[command] else [], 'without CSV files')
    if command == 'sim' and os.path.isdir(path):
        path = os.path.join(path, 'a_star.json')
    for name in [path, *paths[1:]]:
        if not os.path.exists(name):
            raise BadInput(
                f"'{name}' does not exist. sim reads the a_star.json that a-star writes. The other "
                'commands read a folder of runs, a JSON table of runs, or two CSV files.')
    if command == 'plot':
        # Imported here because matplotlib takes half a second.
        from tools.plots import draw_laws
        print('\n'.join(draw_laws(path)))
        raise SystemExit
    folder = path
    name = command.removeprefix('fit-').replace('-', '_')
    if os.path.isfile(path):
        folder, file = os.path.split(path)
        if command != 'sim':
            name = f'{os.path.splitext(file)[0]}_{name}'
    out = os.path.join(folder, f'{name}.json')
    if command == 'sim':
        fitted = read_json(path)
        try:
            result = similarities(fitted)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(
                f'{path} does not hold what a-star writes ({type(error).__name__}: {error}). Run '
                'a-star again.') from None
    else:
        table = read_table(*paths, families=families) if is_csv else read_table(path)
        limits = dict(kl=kl, natural=natural, sizes=sizes or table.sizes)
        result = result_of(command, table, dict(limits, max_epochs=max_epochs, tokens=tokens))
    if command == 'regmix-d':
        result, schedule = result
        beside = os.path.join(folder, f'{name}_schedule.json')
        write_json(beside, schedule)
        print(f'train.py ... --mixture=schedule --mixture_schedule={beside}')
    write_json(out, result)
