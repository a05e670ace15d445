"""Mixing laws: how the loss of every group depends on the mixture that was trained on; fitted to finished runs.

    python tools/mixing_laws.py fit-static out/sweep                  # L_i(p) = c_i + b_i exp(-sum_j A_ij p_j), and its best mixture
    python tools/mixing_laws.py fit-dynamic out/children              # L_i' = L_i - sum_j A_ij p_j after a short continuation, parent by parent
    python tools/mixing_laws.py a-star out/methods                    # A* on the trajectories of methods, against the A that each of them measured
    python tools/mixing_laws.py sim out/methods/a_star.json           # their similarity, with what a uniform vector and another seed would score
    python tools/mixing_laws.py regmix out/sweep                      # the best mixture by regression on the runs (RegMix)
    python tools/mixing_laws.py plot out/sweep                        # the figures of whatever was fitted there

A folder holds runs of train.py (tools/sweep.py makes them); a JSON table {"groups": [...], "runs": [{"p": [...], "loss": [...], "seed": 0}, ...]} will do.
Laws: Ye et al. 2024 (arXiv:2403.16952), Chen et al. 2024 (arXiv:2411.05735). Rows of A are evaluated groups, columns trained ones, positive is
good. p sums to 1, so a constant added to a row of A changes c and b alone: A is given with its last column at 0.
"""
import json
import math
import os
import sys
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import least_squares, minimize
from scipy.stats import spearmanr

if __name__ == '__main__':
    import _path  # noqa: F401

from configurator import BadInput, configure
from tools.runs import Table, read_table

BOUND = 80.0                    # of the exponents: a group that only mixtures without it tell of would run away


# -- the static law ----------------------------------------------------------------------------------------------------

@dataclass
class Law:
    """A fit of one group: loss = c + exp(log_b + s . p[:-1]), that is A_j = -s_j with A_m = 0."""
    c: float
    log_b: float
    s: np.ndarray                                   # (m - 1,)
    report: dict = field(default_factory=dict)      # what `fit_static` found out about it

    def __call__(self, p):
        """p (..., m) -> losses (...)."""
        return self.c + np.exp(self.log_b + np.asarray(p)[..., :-1] @ self.s)


def projected(X, y, w, s):
    """The best c >= 0 and B >= 0 for exponents s, many at a time (variable projection).

    X (n, d) shares but the last, y (n,), w (S, n) weights, s (S, d). Returns c (S,), B (S,), E (S, n) = exp(s . x) over its largest value,
    log of that value (S,), residuals (S, n), sums for `jacobian`.
    """
    z = s @ X.T
    top = z.max(1)
    E = np.exp(z - top[:, None])
    W, WE, WEE, Wy, WEy = w.sum(1), (w * E).sum(1), (w * E * E).sum(1), w @ y, (w * E) @ y
    det = np.maximum(W * WEE - WE * WE, 1e-14 * W * WEE)
    B = np.maximum((W * WEy - WE * Wy) / det, 0.0)
    c = (Wy - B * WE) / W
    free = c > 0
    B, c = np.where(free, B, np.maximum(WEy / WEE, 0.0)), np.where(free, c, 0.0)
    return c, B, E, top, y - c[:, None] - B[:, None] * E, (W, WE, WEE, det, free)


def jacobian(X, w, B, E, sums):
    """d residual / d s (S, n, d) as c and B follow (Kaufman's form: the derivative outside the span of 1 and E)."""
    W, WE, WEE, det, free = (x[:, None] for x in sums)
    D = (B[:, None] * E)[:, :, None] * X                                            # (S, n, d)
    T1, T2 = np.einsum('sn,snd->sd', w, D), np.einsum('sn,snd->sd', w * E, D)
    of_one = np.where(free, (WEE * T1 - WE * T2) / det, 0.0)
    of_e = np.where(free, (W * T2 - WE * T1) / det, T2 / WEE)
    return -(D - of_one[:, None] - of_e[:, None] * E[:, :, None])


def squares(r, huber):
    """Squares of residuals; beyond huber (None: nowhere) twice the Huber loss, which grows linearly."""
    return r * r if huber is None else np.where(np.abs(r) <= huber, r * r, huber * (2 * np.abs(r) - huber))


def descend(X, y, w, s, steps, huber=None):
    """Levenberg-Marquardt from many starts at once. w (S, n) weights of the rows, s (S, d) starts. Returns s and objectives (S,).

    huber: residuals beyond it count linearly (the objective is then 2 * sum of Huber losses).
    """
    def objective(r):
        return (w * squares(r, huber)).sum(1)

    def inner(r):
        return w if huber is None else w * np.minimum(1.0, huber / np.maximum(np.abs(r), 1e-300))
    damping, at = np.full(len(s), 1e-2), projected(X, y, w, s)
    best = objective(at[4])
    for _ in range(steps):
        v = inner(at[4])
        c, B, E, _, r, sums = at if huber is None else projected(X, y, v, s)
        J = jacobian(X, v, B, E, sums)
        VJ = v[:, :, None] * J
        H, g = np.matmul(VJ.transpose(0, 2, 1), J), np.einsum('snd,sn->sd', VJ, r)
        scale = np.maximum(np.einsum('sdd->sd', H), 1e-12)
        step = np.linalg.solve(H + (damping[:, None] * scale)[:, :, None] * np.eye(s.shape[1]), -g[:, :, None])[:, :, 0]
        tried = np.clip(s + np.clip(step, -5, 5), -BOUND, BOUND)
        then = projected(X, y, v, tried)
        value = objective(then[4])
        good = value < best
        s, best = np.where(good[:, None], tried, s), np.where(good, value, best)
        damping = np.clip(np.where(good, damping * 0.3, damping * 4), 1e-9, 1e9)
        at = projected(X, y, w, s)
    return s, best


def starts_of(d, n, seed=0):
    """n starting exponents (n, d): of both signs, from flat to steep, one coordinate at a time and all together."""
    rng = np.random.default_rng(seed)
    s = rng.normal(size=(n, d)) * np.exp(rng.uniform(math.log(0.1), math.log(12), (n, 1)))
    one = rng.integers(0, d, n // 3)
    s[:n // 3] = 0.0
    s[np.arange(n // 3), one] = rng.uniform(-16, 8, n // 3)
    return s


def polish(X, y, s, huber=None):
    """From exponents near an optimum to all parameters at it: Law."""
    c, B, _, top, _, _ = projected(X, y, np.ones((1, len(y))), s[None])
    if B[0] <= 0:
        return Law(float(c[0]), -math.inf, np.zeros(X.shape[1]))

    def residuals(q):
        return q[0] + np.exp(np.minimum(q[1] + X @ q[2:], 700.0)) - y

    def derivative(q):
        e = np.exp(np.minimum(q[1] + X @ q[2:], 700.0))
        return np.column_stack((np.ones(len(y)), e, e[:, None] * X))
    start = np.r_[max(c[0], 1e-9), math.log(B[0]) - top[0], np.clip(s, -BOUND + 1e-6, BOUND - 1e-6)]
    low = np.r_[0.0, -np.inf, np.full(X.shape[1], -BOUND)]
    found = least_squares(residuals, start, derivative, bounds=(low, np.r_[np.inf, np.inf, np.full(X.shape[1], BOUND)]), x_scale='jac', xtol=1e-12,
                          ftol=1e-12, gtol=1e-14, max_nfev=300, **({} if huber is None else dict(loss='huber', f_scale=huber)))
    better = found.x if np.isfinite(found.cost) else start
    return Law(float(better[0]), float(better[1]), better[2:])


def check_points(p, y, what):
    """BadInput unless the runs can determine a law's m + 1 parameters and leave one over."""
    n, m = p.shape
    if not np.isfinite(y).all():
        raise BadInput(f'{what}: the loss of run(s) {", ".join(str(i) for i in np.flatnonzero(~np.isfinite(y)))} (counted from 0) is not finite. '
                       'Leave them out, or train them again.')
    if n < m + 2:
        raise BadInput(f'{what}: {n} runs for the {m + 1} parameters of the law with {m} groups. It takes {m + 2} at least (one to check it by), and '
                       'two to three times as many to be of use.')
    rank = np.linalg.matrix_rank(p - p.mean(0), tol=1e-6)
    if rank < m - 1:
        raise BadInput(f'{what}: the mixtures vary in {rank} direction(s) only, {m} groups need {m - 1}'
                       + (' (they are all equal)' if rank == 0 else '') + ': no law can be told from them. Add other mixtures.')


def fit_law(p, y, huber=None, n_starts=48, steps=40):
    """The law alone: multi-start variable projection, then all parameters together. p (n, m) rows that sum to 1, y (n,) nats."""
    X = p[:, :-1]
    s, value = descend(X, y, np.ones((n_starts, len(y))), starts_of(X.shape[1], n_starts), steps, huber)
    laws = [polish(X, y, s[i], huber) for i in np.argsort(value)[:3]]
    return min(laws, key=lambda law: squares(law(p) - y, huber).sum())


def refit(p, y, w, law, huber=None, steps=25, n_starts=6):
    """Exponents and predictions of many fits to weighted rows (w (S, n): 0 leaves a row out), each from the law and a few other starts.

    Returns predictions (S, n) at all rows and (c, log_b, s) of each, (S,), (S,), (S, m - 1).
    """
    X, S = p[:, :-1], len(w)
    starts = np.concatenate((law.s[None], 0.5 * law.s[None], np.clip(1.5 * law.s, -BOUND, BOUND)[None], starts_of(X.shape[1], n_starts - 3, 1)))
    s, value = descend(X, y, np.repeat(w, n_starts, 0), np.tile(starts, (S, 1)), steps, huber)
    best = s.reshape(S, n_starts, -1)[np.arange(S), value.reshape(S, n_starts).argmin(1)]
    c, B, E, top, _, _ = projected(X, y, w, best)
    with np.errstate(divide='ignore'):
        return c[:, None] + B[:, None] * E, (c, np.log(B) - top, best)


def r2(y, prediction):
    return 1 - float(((y - prediction) ** 2).sum()) / max(float(((y - y.mean()) ** 2).sum()), 1e-300)


def errors_of(y, prediction):
    return dict(r2=r2(y, prediction), mse=float(((y - prediction) ** 2).mean()), mae=float(np.abs(y - prediction).mean()))


def fit_static(p, y, what='this fit', huber=None):
    """The static law of one group's losses with all that says how far to trust it: Law, whose report is filled.

    p (n, m), rows sum to 1; y (n,) nats; huber: delta of the Huber loss (the public notebooks' 0.02), None: least squares.
    report: sse, fit / leave_one_out / held_out (every fourth row, where the rest suffices) / linear and linear_leave_one_out, each r2 = 1 - SSE/SST,
    mse and mae; se of c, log_b and s (nan: the runs do not determine it, or it stands at its bound).
    """
    p, y = np.asarray(p, dtype=np.float64), np.asarray(y, dtype=np.float64)
    check_points(p, y, what)
    n, m = p.shape
    law = fit_law(p, y, huber)
    held = np.arange(n) % 4 == 3
    alone = 1.0 - np.eye(n)
    predictions, _ = refit(p, y, alone, law, huber)
    linear = np.linalg.lstsq(p, y, rcond=None)[0]
    hat = np.einsum('ij,ji->i', p, np.linalg.pinv(p))
    law.report = dict(n=n, sse=float(((law(p) - y) ** 2).sum()), fit=errors_of(y, law(p)), leave_one_out=errors_of(y, predictions.diagonal()),
                      held_out=None, linear=errors_of(y, p @ linear), linear_leave_one_out=errors_of(y, y - (y - p @ linear) / np.maximum(1 - hat, 1e-9)),
                      se=standard_errors(law, p, y))
    if (~held).sum() >= 2 * (m + 1) and held.sum() >= 2:
        found, _ = refit(p, y, (~held)[None].astype(float), law, huber)
        law.report['held_out'] = errors_of(y[held], found[0][held])
    return law


def standard_errors(law, p, y):
    """Of (c, log_b, s), from the curvature at the optimum: list of floats, nan where the runs do not determine a parameter."""
    X = p[:, :-1]
    e = np.exp(law.log_b + X @ law.s)
    J = np.column_stack((np.ones(len(y)), e, e[:, None] * X))
    freedom = len(y) - J.shape[1]
    fixed = np.r_[law.c <= 1e-8, not np.isfinite(law.log_b), np.abs(law.s) >= BOUND - 1e-3]
    _, values, vectors = np.linalg.svd(J[:, ~fixed] / np.maximum(np.linalg.norm(J[:, ~fixed], axis=0), 1e-300), full_matrices=False)
    norms = np.maximum(np.linalg.norm(J[:, ~fixed], axis=0), 1e-300)
    variance = ((vectors.T / np.maximum(values, 1e-12)) ** 2).sum(1) / norms**2 * float(((law(p) - y) ** 2).sum()) / max(freedom, 1)
    out = np.full(J.shape[1], np.nan)
    out[~fixed] = np.where(norms < 1e-6 * np.sqrt(len(y)), np.nan, np.sqrt(variance))
    return out.tolist()


# -- the best mixture --------------------------------------------------------------------------------------------------

def optimum(laws, importance=None):
    """The mixture (m,) that minimises the mean of the laws' losses (importance: weights of the groups, (k,)).

    A sum of exponentials is convex: the minimum is the only one.
    """
    w = np.ones(len(laws)) / len(laws) if importance is None else np.asarray(importance) / np.sum(importance)
    S = np.array([np.r_[law.s, 0.0] for law in laws])                               # (k, m)
    log_b = np.array([law.log_b for law in laws])

    def value(p):
        terms = w * np.exp(log_b + S @ p)
        return terms.sum(), terms @ S
    m = S.shape[1]
    scale = max(value(np.full(m, 1 / m))[0], 1e-300)
    best = None
    for start in (np.full(m, 1 / m), *(0.1 / m + 0.9 * np.eye(m))):
        found = minimize(lambda p: tuple(x / scale for x in value(p)), start / start.sum(), jac=True, method='SLSQP', bounds=[(0, 1)] * m,
                         constraints=dict(type='eq', fun=lambda p: p.sum() - 1, jac=lambda p: np.ones(m)), options=dict(ftol=1e-15, maxiter=500))
        if best is None or found.fun < best.fun:
            best = found
    p = np.clip(best.x, 0, None)
    return p / p.sum()


def optimum_interval(p, Y, laws, importance=None, huber=None, n=100, seed=0):
    """Where the best mixture lies when the runs are drawn anew (bootstrap): (low (m,), high (m,)), 5 % and 95 %.

    Y (n, k): losses by group; resamples that do not determine a law are drawn again.
    """
    rng, m = np.random.default_rng(seed), p.shape[1]
    draws = []
    while len(draws) < n:
        counts = np.bincount(rng.integers(0, len(p), len(p)), minlength=len(p)).astype(float)
        if np.count_nonzero(counts) >= m + 1 and np.linalg.matrix_rank(p[counts > 0] - p[counts > 0].mean(0), tol=1e-6) == m - 1:
            draws.append(counts)
    found = [refit(p, y, np.array(draws), law, huber, n_starts=4)[1] for y, law in zip(Y.T, laws)]
    optima = np.array([optimum([Law(c[i], b[i], s[i]) for c, b, s in found], importance) for i in range(n)])
    return np.quantile(optima, 0.05, axis=0), np.quantile(optima, 0.95, axis=0)


def fit_trees(p, y):
    """Gradient-boosted trees from mixtures (n, m) to a loss (n,): 1,000 of them at a rate of 0.01, as RegMix has them, with no early stop."""
    from sklearn.ensemble import HistGradientBoostingRegressor
    return HistGradientBoostingRegressor(learning_rate=0.01, max_iter=1000, max_leaf_nodes=31, min_samples_leaf=min(20, max(2, len(y) // 10)),
                                         early_stopping=False, random_state=42).fit(p, y)


def regmix(p, y, prior, n_draws=100_000, n_best=128, seed=42):
    """RegMix (Liu et al. 2024, arXiv:2407.01492): the mean of the n_best mixtures, of n_draws from Dirichlet(prior), of lowest predicted loss: (m,).

    p (n, m), y (n,) the loss to lower; prior (m,): shares of the tokens that there are.
    """
    draws = np.random.default_rng(seed).dirichlet(np.asarray(prior), n_draws)
    best = np.argsort(fit_trees(p, y).predict(draws), kind='stable')[:n_best]
    return draws[best].mean(0)


# -- the dynamic law ---------------------------------------------------------------------------------------------------

def fit_dynamic(p, drops, what='this fit'):
    """A (k, m) of L_i' = L_i - sum_j A_ij p_j by least squares, from n continuations of one run.

    p (n, m): their mixtures; drops (n, k): L_i - L_i'. Returns A and a list of dicts by group: r2, leave_one_out (r2 as well), se (m,).
    """
    p, drops = np.asarray(p, dtype=np.float64), np.asarray(drops, dtype=np.float64)
    n, m = p.shape
    if not np.isfinite(drops).all():
        raise BadInput(f'{what}: a loss is not finite. Leave that run out, or train it again.')
    if n < m + 1:
        raise BadInput(f'{what}: {n} continuations for {m} groups, whose law has {m} parameters. It takes {m + 1} at least (one to check it by).')
    if np.linalg.matrix_rank(p, tol=1e-6) < m:
        raise BadInput(f'{what}: the mixtures of the continuations do not tell {m} groups apart (rank {np.linalg.matrix_rank(p, tol=1e-6)}). Add others.')
    inverse = np.linalg.pinv(p)
    A = (inverse @ drops).T
    residuals, hat = drops - p @ A.T, np.einsum('ij,ji->i', p, inverse)
    spread, freedom = np.sqrt((inverse**2).sum(1)), max(n - m, 1)
    reports = [dict(r2=r2(d, d - e), leave_one_out=r2(d, d - e / np.maximum(1 - hat, 1e-9)), se=(spread * np.sqrt(e @ e / freedom)).tolist())
               for d, e in zip(drops.T, residuals.T)]
    return A, reports


def scale_of(A, p, drops):
    """The one number b that makes b * A explain continuations best (least squares over all groups): A (k, m), p (n, m), drops (n, k)."""
    predicted = np.asarray(p) @ np.asarray(A).T
    return float((predicted * drops).sum() / max(float((predicted**2).sum()), 1e-300))


def diagonal_of_two(A):
    """Of a 2 x 2 matrix what differs between mixtures: diag(A_11 - A_12, A_22 - A_21)."""
    A = np.asarray(A, dtype=np.float64)
    return np.diag([A[0, 0] - A[0, 1], A[1, 1] - A[1, 0]])


def sim(X, Y):
    """0.5 * cosine + 0.5 * Spearman of the column sums of two matrices (Spearman of a constant vector: 0). Aioli, section 4.2."""
    x, y = np.asarray(X, dtype=np.float64).sum(0), np.asarray(Y, dtype=np.float64).sum(0)
    cosine = float(x @ y / max(np.linalg.norm(x) * np.linalg.norm(y), 1e-300))
    rank = 0.0 if np.ptp(x) == 0 or np.ptp(y) == 0 else float(spearmanr(x, y).statistic)
    return 0.5 * cosine + 0.5 * rank


def compare(stars, estimates):
    """Similarity of A* and estimates by seed, lists of (k, m): dict with the mean over seeds and what it means.

    uniform: the score of a matrix of A*'s sign that prefers nothing (0.5 * cosine); between_seeds: mean of sim between the A* of two seeds, that
    a perfect method would reach; None with one seed.
    """
    scores = [sim(a, b) for a, b in zip(stars, estimates)]
    pairs = [sim(a, b) for i, a in enumerate(stars) for b in stars[:i]]
    return dict(sim=float(np.mean(scores)), by_seed=scores, uniform=float(np.mean([sim(a, np.full_like(a, np.sign(a.sum()))) for a in stars])),
                between_seeds=float(np.mean(pairs)) if pairs else None)


# -- reports -----------------------------------------------------------------------------------------------------------

def seed_noise(table):
    """Standard deviation (k,) of the losses of the same mixture over seeds, and the degrees of freedom it stands on; (None, 0) without repeats."""
    cells = {}
    for run in table.runs:
        cells.setdefault(tuple(np.round(run.p, 4)), []).append(run.loss)
    repeated = [np.array(losses) for losses in cells.values() if len(losses) > 1]
    freedom = sum(len(losses) - 1 for losses in repeated)
    if not freedom:
        return None, 0
    return np.sqrt(sum(((losses - losses.mean(0)) ** 2).sum(0) for losses in repeated) / freedom), freedom


def error_text(errors, name='r2'):
    return 'n/a' if errors is None else f'{errors[name]:.4f}'


def fit_static_runs(table, huber):
    """Fits the static law to every group, by seed and over all runs; prints the report and returns it as plain data."""
    if any(run.parent for run in table.runs):
        raise BadInput('these runs continue others: use fit-dynamic.')
    for run in table.runs:
        if run.method not in ('fixed', 'stratified'):
            raise BadInput(f"the mixture of run '{run.name}' is '{run.method}': a static law needs runs whose mixture stays as it is.")
    noise, freedom = seed_noise(table)
    seeds = table.seeds()
    parts = [(seed, table.only(lambda run, seed=seed: run.seed == seed)) for seed in seeds] if len(seeds) > 1 else []
    if any(len(part.runs) < len(table.groups) + 2 for _, part in parts):
        parts = []                              # no seed has enough for itself
    fits, pooled = [], []
    print(f'{len(table.runs)} runs of {len(table.groups)} groups, seeds {seeds}' + (', Huber' if huber else ', least squares'))
    print(f'{"group":<16}{"seed":>6}{"runs":>6}{"R2":>9}{"one out":>9}{"held out":>10}{"linear":>9}{"one out":>9}{"rms error":>11}{"seed noise":>12}')
    for i, group in enumerate(table.evaluated):
        for seed, part in [*parts, ('all', table)]:
            law = fit_static(part.p, part.loss[:, i], f"group '{group}', seed {seed}", huber)
            r = law.report
            fits.append(dict(group=group, seed=seed, c=law.c, log_b=law.log_b, A=[*(-law.s).tolist(), 0.0], **r))
            print(f'{group:<16}{seed:>6}{r["n"]:>6}{error_text(r["fit"]):>9}{error_text(r["leave_one_out"]):>9}{error_text(r["held_out"]):>10}'
                  f'{error_text(r["linear"]):>9}{error_text(r["linear_leave_one_out"]):>9}{math.sqrt(r["fit"]["mse"]):>11.4f}'
                  + (f'{noise[i]:>12.4f}' if noise is not None else f'{"n/a":>12}'))
        pooled.append(law)
    if noise is None:
        print('seed noise: not known, for no mixture was trained with two seeds. An R2 means nothing unless mixtures differ by more than seeds do.')
    else:
        spread = table.loss.std(0, ddof=1)
        print('spread over mixtures / seed noise: ' + ', '.join(f'{g} {a / max(b, 1e-12):.1f}' for g, a, b in zip(table.evaluated, spread, noise)))
    best = optimum(pooled)
    low, high = optimum_interval(table.p, table.loss, pooled, huber=huber)
    even = np.full(len(table.groups), 1 / len(table.groups))
    at = [float(np.mean([law(p) for law in pooled])) for p in (best, even)]
    observed = min(table.runs, key=lambda run: run.loss.mean())
    print('lowest mean loss: ' + ', '.join(f'{g} {p:.3f} ({a:.3f} to {b:.3f})' for g, p, a, b in zip(table.groups, best, low, high))
          + f': {at[0]:.4f} predicted, {at[1]:.4f} for equal shares; best run {observed.loss.mean():.4f} at '
          + ', '.join(f'{x:.3f}' for x in observed.p))
    return dict(groups=table.groups, evaluated=table.evaluated, huber=huber, p=table.p.tolist(), loss=table.loss.tolist(), fits=fits,
                seed_noise=None if noise is None else dict(sd=noise.tolist(), freedom=freedom),
                optimum=dict(p=best.tolist(), low=low.tolist(), high=high.tolist(), predicted=at[0], predicted_uniform=at[1],
                             best_run=dict(p=observed.p.tolist(), loss=float(observed.loss.mean()))))


def families(table):
    """The continuations by the run that they continue: list of (parent Run, Table)."""
    if any(run.parent is None for run in table.runs):
        run = next(run for run in table.runs if run.parent is None)
        raise BadInput(f"run '{run.name}' continues no other. `python tools/sweep.py mixture --break_step=...` makes parents and children; give the folder "
                       'of the children.')
    found = {}
    for run in table.runs:
        found.setdefault((run.parent.method, run.parent.name, run.parent.seed, tuple(run.parent.p)), (run.parent, []))[1].append(run)
    return [(parent, Table(table.groups, table.evaluated, runs)) for parent, runs in found.values()]


def fit_dynamic_runs(table):
    """Fits the dynamic law parent by parent; prints the report and returns it as plain data."""
    fits = []
    print(f'{len(table.runs)} continuations of {len(families(table))} runs: the drop of loss i is sum_j A_ij p_j')
    print(f'{"parent":<22}{"group":<14}{"R2":>8}{"one out":>9}   A, row of the group: ' + ', '.join(table.groups))
    for parent, part in families(table):
        A, reports = fit_dynamic(part.p, parent.loss - part.loss, f"continuations of '{parent.name}'")
        for group, row, r in zip(table.evaluated, A, reports):
            print(f'{parent.name:<22}{group:<14}{r["r2"]:>8.4f}{r["leave_one_out"]:>9.4f}   '
                  + ', '.join(f'{a:.4f} ± {e:.4f}' for a, e in zip(row, r['se'])))
        fits.append(dict(parent=parent.name, p=parent.p.tolist(), seed=parent.seed, A=A.tolist(), reports=reports))
    scores = np.array([[r['r2'] for r in fit['reports']] for fit in fits])
    out = np.array([[r['leave_one_out'] for r in fit['reports']] for fit in fits])
    print(f'mean over {scores.size} fits: R2 {scores.mean():.4f} (lowest {scores.min():.4f}), with one left out {out.mean():.4f}')
    return dict(groups=table.groups, evaluated=table.evaluated, fits=fits)


def measured_matrix(run, groups):
    """The A that a method had measured by the end of a run, (m, m): the mean of Aioli's rounds, of the others the last (of a proxy that is a mean itself)."""
    found = [[[r[f'mixture/A_{i}_{j}'] for j in groups] for i in groups] for r in run.records if f'mixture/A_{groups[0]}_{groups[0]}' in r]
    if not found:
        raise BadInput(f"run '{run.name}' (mixture = '{run.method}') measured no matrix. Let it run longer, or lower mixture_interval.")
    return np.mean(found if run.method == 'aioli' else found[-1:], 0)


def a_star_runs(table):
    """A* of every method and seed, from continuations of the method's runs, and the A that the method had measured. Plain data."""
    methods = {}
    for parent, part in families(table):
        A, reports = fit_dynamic(part.p, parent.loss - part.loss, f"continuations of '{parent.name}'")
        m = methods.setdefault(parent.method, dict(seeds=[], A_star=[], A=[], b=[], r2=[], p=[]))
        drops, measured = parent.loss - part.loss, measured_matrix(parent, table.groups)
        if len(table.groups) == 2:          # what no mixture can tell apart is left out, and a constant of every group is free
            b = scale_of(diagonal_of_two(measured), part.p - part.p.mean(0), drops - drops.mean(0))
        else:
            b = scale_of(measured, part.p, drops)
        for key, value in dict(seeds=parent.seed, A_star=A.tolist(), A=measured.tolist(), b=b, r2=[r['r2'] for r in reports], p=parent.p.tolist()).items():
            m[key].append(value)
    for name, m in methods.items():
        print(f'{name}: A* over {len(m["seeds"])} seed(s), mean R2 {np.mean(m["r2"]):.4f}, scale b {", ".join(f"{b:.3g}" for b in m["b"])}')
        for what in ('A_star', 'A'):
            mean, spread = np.mean(m[what], 0), np.std(m[what], 0)
            for group, row, deviations in zip(table.groups, mean, spread):
                print(f'  {what:<8}{group:<14}' + ', '.join(f'{a:.4f} ± {d:.4f}' for a, d in zip(row, deviations)))
    return dict(groups=table.groups, methods=methods)


def similarities(found):
    """sim of A* and b * A for every method of `a_star_runs`' data (2 groups: of their diagonal forms); prints and returns a table."""
    out = {}
    print(f'{"method":<12}{"seeds":>6}{"sim":>8}{"uniform":>10}{"A* of seeds":>13}   by seed')
    for name, m in found['methods'].items():
        form = diagonal_of_two if len(found['groups']) == 2 else np.asarray
        stars = [form(np.array(A)) for A in m['A_star']]
        out[name] = compare(stars, [b * form(np.array(A)) for A, b in zip(m['A'], m['b'])])
        r = out[name]
        print(f'{name:<12}{len(m["seeds"]):>6}{r["sim"]:>8.3f}{r["uniform"]:>10.3f}' + (f'{r["between_seeds"]:>13.3f}' if r['between_seeds'] is not None
              else f'{"n/a":>13}') + '   ' + ', '.join(f'{x:.3f}' for x in r['by_seed']))
    print("uniform: what a matrix that prefers nothing scores; A* of seeds: what one seed's A* scores against another's")
    return out


def regmix_runs(table, target):
    """The best mixture by regression, for the loss of the group `target` ('' : the mean loss). Plain data."""
    if len(table.runs) < 20:
        raise BadInput(f'{len(table.runs)} runs are too few for a regression by trees: 20 at least (the paper has 512). fit-static needs fewer.')
    y = table.loss.mean(1) if not target else table.loss[:, table.evaluated.index(target)] if target in table.evaluated else None
    if y is None:
        raise BadInput(f"target = '{target}' is none of the groups {', '.join(table.evaluated)}.")
    held = np.arange(len(y)) % 4 == 3
    rank = spearmanr(fit_trees(table.p[~held], y[~held]).predict(table.p[held]), y[held]).statistic
    best = regmix(table.p, y, np.ones(len(table.groups)))
    print(f'{len(y)} runs; Spearman on every fourth, held out: {rank:.4f}')
    print('lowest predicted loss: ' + ', '.join(f'{g} {x:.3f}' for g, x in zip(table.groups, best)))
    return dict(groups=table.groups, target=target, spearman_held_out=float(rank), p=best.tolist())


# -- knobs of the command line --
huber = False                           # Huber loss of delta 0.02 in place of squares (fit-static), as the public notebooks have it
target = ''                             # regmix: the group whose loss is to be low; '': the mean over all

COMMANDS = {'fit-static': 'static.json', 'fit-dynamic': 'dynamic.json', 'a-star': 'a_star.json', 'sim': 'sim.json', 'regmix': 'regmix.json', 'plot': ''}

if __name__ == '__main__':
    command, path = (sys.argv[1:3] + ['', ''])[:2]
    configure(globals(), sys.argv[3:] if command in COMMANDS else ['--help'], verbose=False)
    if not os.path.exists(path):
        raise BadInput(f"'{path}' does not exist. Say `tools/mixing_laws.py {command} FOLDER`, or a JSON table of runs.")
    folder = path if os.path.isdir(path) else os.path.dirname(path) or '.'
    if command == 'plot':
        from tools.plots import draw_laws
        print('\n'.join(draw_laws(path)))
        raise SystemExit
    if command == 'sim':
        path = os.path.join(path, 'a_star.json') if os.path.isdir(path) else path
        if not os.path.isfile(path):
            raise BadInput(f"'{path}' does not exist. `python tools/mixing_laws.py a-star {folder}` makes it.")
        with open(path, encoding='utf-8') as f:
            result = similarities(json.load(f))
    else:
        table = read_table(path)
        result = (fit_static_runs(table, 0.02 if huber else None) if command == 'fit-static' else fit_dynamic_runs(table) if command == 'fit-dynamic'
                  else a_star_runs(table) if command == 'a-star' else regmix_runs(table, target))
    out = os.path.join(folder, COMMANDS[command] if os.path.isdir(path) or command == 'sim' else
                       os.path.splitext(os.path.basename(path))[0] + '_' + COMMANDS[command])
    with open(out, 'w', encoding='utf-8') as f:
        json.dump(result, f, indent=1)
    print(f'written: {out}')
