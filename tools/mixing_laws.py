"""Mixing laws: how the loss of every group of data depends on the mixture it was trained with.

    python tools/mixing_laws.py fit-static out/sweep        # L_i(p) = c_i + b_i exp(-A_i . p)
    python tools/mixing_laws.py fit-dynamic out/children    # L_i' = L_i - A_i . p
    python tools/mixing_laws.py a-star out/methods          # A* along the trajectory of a method
    python tools/mixing_laws.py sim out/methods             # how similar A* and the measured A are
    python tools/mixing_laws.py regmix out/sweep            # the best mixture by regression
    python tools/mixing_laws.py plot out/sweep              # figures of all that was fitted there

The folder holds finished runs of train.py, which tools/sweep.py makes. It can also be a JSON table:
{"groups": [...], "runs": [{"p": [...], "loss": [...], "seed": 0}, ...]}. fit-static also reports
the best mixture. fit-dynamic and a-star fit short continuations, separately for each parent run.

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
from scipy.optimize import least_squares, minimize
from scipy.stats import spearmanr

if __name__ == '__main__':
    import _path  # noqa: F401

from configurator import BadInput, configure, did_you_mean, read_json
from tools.commands import read_command, warn_unused
from tools.runs import read_table

# -- knobs --
huber = False                   # fit-static: Huber loss (delta 0.02) instead of squared errors
target = ''                     # regmix: group whose loss is minimised; '': the mean over groups

COMMANDS = ('fit-static', 'fit-dynamic', 'a-star', 'sim', 'regmix', 'plot')

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


def check_points(p, losses, what, n_parameters):
    """Raises BadInput unless the runs determine a law's parameters with one run to spare.

    p (n, m), losses (n,) or (n, k), what: name of the fit.
    """
    n, m = p.shape
    if m < 2:
        raise BadInput(f'{what}: a law of mixtures needs two groups or more, there is {m}.')
    finite = np.isfinite(losses.reshape(n, -1)).all(1)
    if not finite.all():
        wrong = ', '.join(str(i) for i in np.flatnonzero(~finite))
        raise BadInput(f'{what}: the loss of run(s) {wrong} (counted from 0) is not finite.')
    if n <= n_parameters:
        raise BadInput(
            f'{what}: {n} runs for the {n_parameters} parameters of the law with {m} groups. It '
            f'takes {n_parameters + 1} at least, and two to three times as many to be useful.')
    # Shares sum to 1, so they vary in m - 1 directions at most.
    rank = np.linalg.matrix_rank(p - p.mean(0), tol=1e-6)
    if rank < m - 1:
        equal = ' (they are all equal)' if rank == 0 else ''
        raise BadInput(
            f'{what}: the mixtures vary in {rank} direction(s){equal}, {m} groups need {m - 1}. '
            'Add other mixtures.')


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

    w (S, n) weights of the runs, where 0 leaves a run out.
    Returns predictions (S, n) for all runs, and (c (S,), log_b (S,), s (S, d)).
    """
    X = p[:, :-1]
    S = len(w)
    # The law itself is usually near the optimum, so a few starts are enough.
    near = np.stack((law.s, 0.5 * law.s, np.clip(1.5 * law.s, -BOUND, BOUND)))
    starts = np.concatenate((near, random_starts(X.shape[1], n_starts - 3, 1)))
    s, value = descend(X, y, np.repeat(w, n_starts, 0), np.tile(starts, (S, 1)), 25, huber)
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


# -- the best mixture ----------------------------------------------------------------------------

def optimum(laws):
    """Returns the mixture (m,) that minimises the mean of the laws' losses.

    A sum of exponentials is convex, so the minimum is the only one.
    """
    s = np.array([np.r_[law.s, 0.0] for law in laws])                                  # (k, m)
    log_b = np.array([law.log_b for law in laws])
    w = np.ones(len(laws)) / len(laws)
    m = s.shape[1]

    def terms(p):
        return w * np.exp(log_b + s @ p)

    def value(p):
        return terms(p).sum() / scale

    def gradient(p):
        return terms(p) @ s / scale

    # The tolerance of SLSQP is absolute, so the sum is 1 for equal shares.
    scale = max(terms(np.full(m, 1 / m)).sum(), 1e-300)
    sum_is_one = dict(type='eq', fun=lambda p: p.sum() - 1, jac=lambda p: np.ones(m))
    options = dict(method='SLSQP', bounds=[(0, 1)] * m, constraints=sum_is_one)
    options.update(options=dict(ftol=1e-15, maxiter=500))
    best = None
    # SLSQP may stop early where the sum is flat, so it also starts near the corners.
    for start in (np.full(m, 1 / m), *(0.1 / m + 0.9 * np.eye(m))):
        found = minimize(value, start / start.sum(), jac=gradient, **options)
        if best is None or found.fun < best.fun:
            best = found
    p = np.clip(best.x, 0, None)
    return p / p.sum()


def optimum_interval(p, Y, laws, huber=None, n_draws=100):
    """Bootstrap interval of the best mixture: (low (m,), high (m,)), the 5 % and 95 % quantiles.

    p (n, m), Y (n, k) losses, laws: those of the k groups. A resample that does not determine the
    laws is drawn again.
    """
    n, m = p.shape
    rng = np.random.default_rng(0)
    draws = []
    # counts is how often each run is in the resample, which is its weight in the fit.
    while len(draws) < n_draws:
        counts = np.bincount(rng.integers(0, n, n), minlength=n).astype(float)
        drawn = p[counts > 0]
        if len(drawn) < m + 1:
            continue
        if np.linalg.matrix_rank(drawn - drawn.mean(0), tol=1e-6) == m - 1:
            draws.append(counts)
    draws = np.array(draws)                                                            # (S, n)
    found = []
    for y, law in zip(Y.T, laws, strict=True):
        found.append(refit(p, y, draws, law, huber, n_starts=4)[1])
    optima = []
    for i in range(n_draws):
        optima.append(optimum([Law(c[i], log_b[i], s[i]) for c, log_b, s in found]))
    return np.quantile(optima, 0.05, axis=0), np.quantile(optima, 0.95, axis=0)


def fit_trees(p, y):
    """Gradient-boosted trees from mixtures (n, m) to a loss (n,).

    RegMix's settings: 1,000 trees at a learning rate of 0.01, without early stopping.
    """
    # Only regmix needs scikit-learn.
    from sklearn.ensemble import HistGradientBoostingRegressor
    # With the default of 20 rows per leaf, trees on fewer than 40 runs could not split.
    options = dict(max_leaf_nodes=31, min_samples_leaf=min(20, max(2, len(y) // 10)))
    options.update(early_stopping=False, random_state=42)
    trees = HistGradientBoostingRegressor(learning_rate=0.01, max_iter=1000, **options)
    return trees.fit(p, y)


def regmix(p, y, prior):
    """Returns the best mixture (m,) by regression. RegMix, Liu et al. 2024 (arXiv:2407.01492).

    It is the mean of the 128 mixtures of lowest predicted loss among 100,000 from Dirichlet(prior).
    p (n, m), y (n,) the loss to minimise, prior (m,) shares of the available tokens.
    """
    draws = np.random.default_rng(42).dirichlet(np.asarray(prior), 100_000)
    # Trees give many draws the same prediction. A stable sort always picks the same of them.
    best = np.argsort(fit_trees(p, y).predict(draws), kind='stable')[:128]
    return draws[best].mean(0)


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


def print_table(header, rows):
    """Prints a table. Floats have four digits, and None is printed as n/a."""
    texts = [header]
    for row in rows:
        row = [f'{x:.4f}' if isinstance(x, float) else x for x in row]
        texts.append(['n/a' if x is None else str(x) for x in row])
    widths = [max(len(x) for x in column) for column in zip(*texts, strict=True)]
    for row in texts:
        print('  '.join(x.ljust(width) for x, width in zip(row, widths, strict=True)).rstrip())


def fit_static_runs(table, huber):
    """Fits the static law to every group, for each seed and over all runs, and prints a report.

    table  tools.runs.Table     huber  delta of the Huber loss, None: least squares
    Returns the content of static.json. Raises BadInput for runs that a static law cannot describe.
    """
    for run in table.runs:
        if run.parent:
            raise BadInput('these runs continue others: use fit-dynamic.')
        if run.method not in ('fixed', 'stratified'):
            raise BadInput(
                f"the mixture of run '{run.name}' is '{run.method}': a static law needs runs whose "
                'mixture does not change.')
    noise, freedom = seed_noise(table)
    seeds = table.seeds()
    parts = {}
    if len(seeds) > 1:
        parts = {seed: table.only(lambda run, seed=seed: run.seed == seed) for seed in seeds}
    # Each seed is fitted separately if all of them have enough runs.
    if any(len(part.runs) < len(table.groups) + 2 for part in parts.values()):
        parts = {}
    parts['all'] = table
    fits = []
    rows = []
    laws = []
    for i, group in enumerate(table.evaluated):
        for seed, part in parts.items():
            what = f"group '{group}', seed {seed}"
            law = fit_static(part.p, part.loss[:, i], what, huber)
            A = [*(-law.s).tolist(), 0.0]
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
    about = dict(groups=table.groups, evaluated=table.evaluated, huber=huber)
    return {**about, **data, 'optimum': report_optimum(table, laws, huber)}


def report_optimum(table, laws, huber):
    """Prints the mixture of lowest mean loss, and returns it with its interval as plain data."""
    def mean_loss(p):
        return float(np.mean([law(p) for law in laws]))

    best = optimum(laws)
    low, high = optimum_interval(table.p, table.loss, laws, huber)
    uniform = mean_loss(np.full(len(table.groups), 1 / len(table.groups)))
    run = min(table.runs, key=lambda run: run.loss.mean())
    found = dict(p=best.tolist(), low=low.tolist(), high=high.tolist())
    found.update(predicted=mean_loss(best), predicted_uniform=uniform)
    print(f'lowest mean loss: {found["predicted"]:.4f} predicted, {uniform:.4f} for equal shares')
    rows = zip(table.groups, best, low, high, run.p, strict=True)
    print_table(['group', 'best share', '5 %', '95 %', 'share in the best run'], rows)
    print(f'the best run has {run.loss.mean():.4f}')
    return {**found, 'best_run': dict(p=run.p.tolist(), loss=float(run.loss.mean()))}


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


def regmix_runs(table, target):
    """Finds the best mixture by regression for the group `target` ('': the mean loss).

    Prints it, and returns the content of regmix.json. Raises BadInput below 20 runs.
    """
    if len(table.runs) < 20:
        raise BadInput(
            f'{len(table.runs)} runs are too few for a regression by trees: it takes 20 at least '
            '(the paper has 512). fit-static needs fewer.')
    if target and target not in table.evaluated:
        names = ', '.join(table.evaluated)
        raise BadInput(
            f"target = '{target}' is not one of the groups {names}."
            f'{did_you_mean(target, table.evaluated)}')
    check_points(table.p, table.loss, 'regmix', 0)
    y = table.loss[:, table.evaluated.index(target)] if target else table.loss.mean(1)
    held = np.arange(len(y)) % 4 == 3
    predicted = fit_trees(table.p[~held], y[~held]).predict(table.p[held])
    rank = spearmanr(predicted, y[held]).statistic
    best = regmix(table.p, y, np.ones(len(table.groups)))
    print(f'{len(y)} runs; Spearman on every fourth, held out: {rank:.4f}')
    print_table(['group', 'share'], zip(table.groups, best, strict=True))
    found = dict(groups=table.groups, target=target, spearman_held_out=float(rank))
    return {**found, 'p': best.tolist()}


if __name__ == '__main__':
    command, arguments = read_command(COMMANDS)
    paths = [a for a in arguments if not a.startswith('-')]
    knobs = [a for a in arguments if a.startswith('-')]
    configure(globals(), knobs, verbose=False)
    if len(paths) != 1:
        raise BadInput(
            f'name one folder of runs, for example: python tools/mixing_laws.py {command} '
            f'out/sweep. There are {len(paths)} in these arguments.')
    [path] = paths
    if command != 'fit-static':
        warn_unused(knobs, ['huber'], f'with {command}')
    if command != 'regmix':
        warn_unused(knobs, ['target'], f'with {command}')
    if command == 'sim' and os.path.isdir(path):
        path = os.path.join(path, 'a_star.json')
    if not os.path.exists(path):
        raise BadInput(
            f"'{path}' does not exist. sim reads the a_star.json that a-star writes. The other "
            'commands read a folder of runs or a JSON table of runs.')
    if command == 'plot':
        # Imported here because matplotlib takes half a second.
        from tools.plots import draw_laws
        print('\n'.join(draw_laws(path)))
        raise SystemExit
    folder = path
    name = command.removeprefix('fit-').replace('-', '_') + '.json'
    if os.path.isfile(path):
        folder, file = os.path.split(path)
        if command != 'sim':
            name = f'{os.path.splitext(file)[0]}_{name}'
    if command == 'sim':
        fitted = read_json(path)
        try:
            result = similarities(fitted)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(
                f'{path} does not hold what a-star writes ({type(error).__name__}: {error}). Run '
                'a-star again.') from None
    elif command == 'fit-static':
        result = fit_static_runs(read_table(path), 0.02 if huber else None)
    elif command == 'fit-dynamic':
        result = fit_dynamic_runs(read_table(path))
    elif command == 'a-star':
        result = a_star_runs(read_table(path))
    else:
        result = regmix_runs(read_table(path), target)
    out = os.path.join(folder, name)
    with open(out, 'w', encoding='utf-8') as f:
        json.dump(result, f, indent=1)
    print(f'written: {out}')
