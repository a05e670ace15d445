"""The best mixture of fitted mixing laws: KL to natural shares, caps on epochs, intervals.

tools/mixing_laws.py fits the laws and prints what is chosen here. The recipe is that of Olmix (Chen
et al. 2026, arXiv:2602.12237): minimise the mean loss of the laws plus `kl` times the KL divergence
from natural shares, with at most `max_epochs` passes over every source. A law alone recommends
corners far from its runs.

Shapes: n runs, M sources of a table, m columns that vary on their own, k evaluated groups.
"""
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import minimize

from configurator import BadInput, did_you_mean
from methods import FIXED
from tools.commands import print_table

# A share below this counts as 0 where a report says which sources a mixture keeps.
NO_SHARE = 1e-3


# -- which columns of a table vary -----------------------------------------------------------------


@dataclass
class Columns:
    """The shares of M sources by m columns that vary on their own.

    A source with the same share in all runs is held there. Sources in a fixed ratio to each other
    are one column, their sum.
    """
    names: list             # of the M sources
    parts: np.ndarray       # (m, M) the shares of the sources within every column, rows sum to 1
    held: np.ndarray        # (M,) shares of the sources that are held, 0 for the others

    @property
    def first(self):
        """The index of every column's first source: list of m."""
        return [int(np.flatnonzero(row)[0]) for row in self.parts]

    def reduce(self, p):
        """p (..., M) -> (..., m), whose rows sum to 1 - held.sum()."""
        # Without sums the values of columns of one source stay the same to the last bit.
        columns = []
        for row in self.parts:
            inside = np.flatnonzero(row)
            columns.append(p[..., inside[0]] if len(inside) == 1 else p[..., inside].sum(-1))
        return np.stack(columns, -1)

    def expand(self, q):
        """q (..., m) -> the shares (..., M) of all sources."""
        return q @ self.parts + self.held

    def spread(self, values):
        """Values (..., m) of columns -> (..., M): every source has that of its column, or 0."""
        return values @ (self.parts > 0)

    def members(self):
        """The names of the sources in every column: list of m lists."""
        return [[self.names[j] for j in np.flatnonzero(row)] for row in self.parts]


def find_columns(names, p):
    """The Columns of mixtures p (n, M) of the sources `names`.

    If no share varies at all, every source is its own column.
    """
    p = np.asarray(p, dtype=np.float64)
    # Sweeps round shares to six digits, so equal shares may differ in the last of them.
    varies = np.ptp(p, axis=0) > 2e-6
    if not varies.any():
        return Columns(list(names), np.eye(len(names)), np.zeros(len(names)))
    held = np.where(varies, 0.0, p.mean(0))
    parts = []
    rest = list(np.flatnonzero(varies))
    while rest:
        j = rest[0]
        same = [j]
        for other in rest[1:]:
            # The best ratio of the two columns, which is the true one if it is fixed.
            ratio = p[:, other] @ p[:, j] / (p[:, j] @ p[:, j])
            if np.abs(p[:, other] - ratio * p[:, j]).max() <= 2e-6 * max(1.0, ratio):
                same.append(other)
        row = np.zeros(len(names))
        row[same] = p[:, same].sum(0) / p[:, same].sum()
        parts.append(row)
        rest = [other for other in rest if other not in same]
    return Columns(list(names), np.array(parts), held)


def rarely_used(names, p, least=3):
    """Sources whose share differs from its most common value in fewer than `least` runs.

    Returns a dict name -> number of those runs. A law's exponent of such a source rests on them.
    """
    found = {}
    for name, shares in zip(names, np.asarray(p).T, strict=True):
        _, counts = np.unique(np.round(shares, 6), return_counts=True)
        n_runs = len(shares) - counts.max()
        if 0 < n_runs < least:
            found[name] = int(n_runs)
    return found


def describe_columns(columns, p):
    """Sentences about what the runs of a table do not determine: list of str. p (n, M)."""
    notes = []
    for share in np.unique(np.round(columns.held, 6)):
        is_held = (columns.parts.sum(0) == 0) & (np.round(columns.held, 6) == share)
        names = [name for name, held in zip(columns.names, is_held, strict=True) if held]
        if names:
            notes.append(
                f'{", ".join(names)}: the share is {share:.4g} in all runs. It is held there, '
                'because the runs do not say what it does.')
    for names, row in zip(columns.members(), columns.parts, strict=True):
        if len(names) > 1:
            shares = ' : '.join(f'{share:.4g}' for share in row[row > 0])
            notes.append(
                f'{", ".join(names)}: always in the ratio {shares}. They count as one source.')
    for name, n_runs in rarely_used(columns.names, p).items():
        notes.append(
            f'{name}: its share differs in {n_runs} of {len(p)} runs only. What the law says '
            'of it rests on them.')
    return notes


def check_target(table, target):
    """Raises BadInput unless `target` is an evaluated group of a table, or '' for their mean."""
    if target and target not in table.evaluated:
        names = ', '.join(table.evaluated)
        raise BadInput(
            f"target = '{target}' is not one of the groups {names}."
            f'{did_you_mean(target, table.evaluated)}')


def check_static(table):
    """Raises BadInput for runs that a static law cannot describe."""
    for run in table.runs:
        if run.parent:
            raise BadInput('these runs continue others: use fit-dynamic.')
        if run.method not in FIXED:
            raise BadInput(
                f"the mixture of run '{run.name}' is '{run.method}': a static law needs runs whose "
                'mixture does not change.')


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


# -- the recipe ------------------------------------------------------------------------------------


@dataclass
class Recipe:
    """What the optimum of the laws is held to."""
    kl: float = 0.0                     # strength of the KL divergence from `natural`, nats
    natural: np.ndarray | None = None   # (M,) shares, sum 1. None: equal shares
    caps: np.ndarray | None = None      # (M,) highest shares. None: 1
    source: str = 'equal shares'        # where `natural` comes from
    about: dict = field(default_factory=dict)       # for the report: max_epochs, tokens


def shares_of(values, names, what):
    """A dict source -> number above 0 as shares (M,) that sum to 1, in the order of `names`.

    Raises BadInput for other names, and for values that are no sizes.
    """
    unknown = [name for name in values if name not in names]
    missing = [name for name in names if name not in values]
    if unknown:
        hint = did_you_mean(unknown[0], names)
        raise BadInput(f"{what} has '{unknown[0]}', which is no source of these runs.{hint}")
    if missing:
        raise BadInput(f'{what} lacks {", ".join(missing)}. Give a number for every source.')
    found = np.array([values[name] for name in names], dtype=np.float64)
    if not (np.isfinite(found) & (found >= 0)).all() or found.sum() <= 0:
        raise BadInput(f'{what} = {values} must be numbers of 0 or more, one of them above 0.')
    return found / found.sum()


def make_recipe(names, kl, natural, sizes, max_epochs, tokens):
    """The Recipe of M sources `names`.

    natural     dict source -> share on any scale. Empty: by `sizes`, or equal where those are None
    sizes       dict source -> tokens that exist, or None
    max_epochs  passes over a source that a run of `tokens` tokens may make. None: no cap
    Raises BadInput for shares that do not fit the names, and for caps that no mixture keeps to.
    """
    if natural:
        recipe = Recipe(kl, shares_of(natural, names, 'natural'), source='the knob natural')
    elif sizes:
        recipe = Recipe(kl, shares_of(sizes, names, 'sizes'), source='the sizes of the sources')
    else:
        recipe = Recipe(kl, np.full(len(names), 1 / len(names)))
    if max_epochs is None:
        return recipe
    if tokens is None or not sizes:
        raise BadInput(
            'max_epochs needs tokens, the length of the target run, and the sizes of the sources: '
            '--tokens=1e10 --sizes="{\'code\': 2e9, ...}" (runs that find their data know the '
            'sizes).')
    shares_of(sizes, names, 'sizes')
    recipe.caps = np.minimum([max_epochs * sizes[name] / tokens for name in names], 1.0)
    recipe.about = dict(max_epochs=max_epochs, tokens=tokens)
    if recipe.caps.sum() < 1:
        raise BadInput(
            f'{max_epochs:g} epochs of all sources are {max_epochs * sum(sizes.values()):.4g} '
            f'tokens, fewer than the {tokens:.4g} of the run. Raise max_epochs, or lower tokens.')
    return recipe


def kl_of(p, natural):
    """KL divergence of mixtures p (..., M) from natural shares (M,), in nats: (...)."""
    with np.errstate(divide='ignore', invalid='ignore'):
        terms = np.where(p > 0, p * np.log(p / natural), 0.0)
    return terms.sum(-1)


# -- the optimum -----------------------------------------------------------------------------------


@dataclass
class Objective:
    """The mean of k laws without their constants, divided by its value for equal shares."""
    s: np.ndarray               # (k, m) exponents
    log_b: np.ndarray           # (k,)
    total: float                # of the shares of the m columns

    def __post_init__(self):
        m = self.s.shape[1]
        self.scale = max(self.terms(np.full(m, self.total / m)).sum(), 1e-300)

    def terms(self, p):
        w = np.ones(len(self.log_b)) / len(self.log_b)
        return w * np.exp(self.log_b + self.s @ p)

    def value(self, p):
        return self.terms(p).sum() / self.scale

    def gradient(self, p):
        return self.terms(p) @ self.s / self.scale


def solve_corners(f):
    """The mixture (m,) of lowest f, an Objective, without further limits: SLSQP."""
    m = f.s.shape[1]
    sum_is_right = dict(
        type='eq', fun=lambda p: p.sum() - f.total, jac=lambda p: np.ones(m))
    options = dict(method='SLSQP', bounds=[(0, f.total)] * m, constraints=sum_is_right)
    # The tolerance of SLSQP is absolute, so the objective is 1 for equal shares.
    options.update(options=dict(ftol=1e-15, maxiter=500))
    best = None
    # SLSQP may stop early where the sum is flat, so it also starts near the corners.
    for start in (np.full(m, 1 / m), *(0.1 / m + 0.9 * np.eye(m))):
        start = f.total * (start / start.sum())
        found = minimize(f.value, start, jac=f.gradient, **options)
        if best is None or found.fun < best.fun:
            best = found
    p = np.clip(best.x, 0, None)
    return f.total * (p / p.sum())


def solve_inside(f, kl, natural, caps):
    """The mixture (m,) of lowest f + kl * KL(p || natural) with p <= caps.

    f        an Objective, `kl` in its units        natural  (m,) above 0, on any scale
    caps     (m,), inf: none. Their sum exceeds f.total
    An interior point method for a convex problem: Newton steps minimise it plus logarithmic
    barriers of weight mu, which falls to 1e-12. The result is within 2 * m * mu of the minimum.
    """
    # Feasible and away from all bounds: the level whose sum is right, found by halving.
    low, high = 0.0, f.total
    for _ in range(200):
        level = (low + high) / 2
        low, high = (level, high) if np.minimum(level, 0.999999 * caps).sum() < f.total else (
            low, level)
    p = np.minimum(high, 0.999999 * caps)
    p = p * f.total / p.sum()
    limited = np.isfinite(caps)

    def value(p, mu):
        room = np.where(limited, caps - p, 1.0)
        barrier = -mu * (np.log(p).sum() + np.log(room).sum())
        return f.value(p) + kl * (p * np.log(p / natural)).sum() + barrier

    mu = 0.1
    while mu > 1e-12:
        mu *= 0.1
        for _ in range(100):
            terms = f.terms(p) / f.scale
            room = np.where(limited, caps - p, np.inf)
            g = terms @ f.s + kl * (np.log(p / natural) + 1) - mu / p + mu / room
            H = (f.s.T * terms) @ f.s
            H[np.diag_indices_from(H)] += kl / p + mu / p**2 + mu / room**2
            # In units of the smaller distance to a bound, H is well conditioned near the bounds.
            unit = np.minimum(p, room)
            K = np.zeros((len(p) + 1, len(p) + 1))
            K[:-1, :-1] = unit[:, None] * H * unit
            K[:-1, -1] = K[-1, :-1] = unit
            step = unit * np.linalg.lstsq(K, np.r_[-unit * g, 0.0], rcond=None)[0][:-1]
            decrease = -g @ step
            if not decrease > 1e-4 * mu:
                break
            # The longest step that stays inside, then halved until the value falls enough.
            with np.errstate(divide='ignore', invalid='ignore'):
                ends = np.where(step < 0, -p / step, np.where(step > 0, room / step, np.inf))
            t = min(1.0, 0.99 * float(np.nanmin(ends)))
            now = value(p, mu)
            while t > 1e-12 and not value(p + t * step, mu) <= now - 0.1 * t * decrease:
                t /= 2
            if t <= 1e-12:
                break
            p = p + t * step
    return p


def optimum(laws, recipe=None, columns=None):
    """Returns the mixture that minimises the mean of the laws' losses under a Recipe.

    laws     of mixtures of m columns
    columns  how the M sources of the recipe make these columns. None: M = m
    Returns (M,) shares of the sources. Without KL and caps the minimum is that of a sum of
    exponentials, often a corner. Every such problem is convex, so the minimum is the only one.
    """
    s = np.array([np.r_[law.s, 0.0] for law in laws])                                  # (k, m)
    log_b = np.array([law.log_b for law in laws])
    if columns is None:
        m = s.shape[1]
        columns = Columns([''] * m, np.eye(m), np.zeros(m))
    recipe = recipe or Recipe()
    f = Objective(s, log_b, 1 - columns.held.sum() if columns.held.any() else 1.0)
    if not recipe.kl and recipe.caps is None:
        return columns.expand(solve_corners(f))
    parts = columns.parts
    natural = recipe.natural if recipe.natural is not None else np.ones(parts.shape[1])
    caps = recipe.caps if recipe.caps is not None else np.full(parts.shape[1], np.inf)
    # Sources outside a column give log(0), which np.where leaves out.
    with np.errstate(divide='ignore', invalid='ignore'):
        logs = np.where(parts > 0, np.log(natural) - np.log(parts), 0.0)
        column_caps = np.where(parts > 0, caps / parts, np.inf).min(1)
    # KL of the sources equals KL of the columns from these weights, up to a constant.
    weights = np.exp((parts * np.maximum(logs, -1e30)).sum(1))
    # Without KL the weights do not matter. With it, what has no natural share has none.
    used = (weights > 0) | (recipe.kl == 0)
    used &= column_caps > 0
    if column_caps[used].sum() <= f.total * (1 + 1e-9):
        if not used.any() or column_caps[used].sum() < f.total * (1 - 1e-9):
            raise BadInput(
                'no mixture keeps to the caps: the sources that vary between these runs and have '
                f'a natural share may have {column_caps[used].sum():.4g} together, and need '
                f'{f.total:.4g}. Raise max_epochs, or lower tokens.')
        q = np.where(used, column_caps, 0.0)
        return columns.expand(f.total * q / q.sum())
    # A cap above the sum of all shares is none.
    column_caps = np.where(column_caps >= f.total, np.inf, column_caps)
    q = np.zeros(len(parts))
    part = Objective(s[:, used], log_b, f.total)
    if used.sum() == 1:
        q[used] = f.total
    else:
        kept = np.where(weights[used] > 0, weights[used], 1.0)
        q[used] = solve_inside(part, recipe.kl / part.scale, kept, column_caps[used])
    # The barriers keep every share above 0, by less than any report shows.
    q[q < 1e-9] = 0.0
    return columns.expand(f.total * q / q.sum())


# -- intervals -------------------------------------------------------------------------------------


def interval(optima):
    """The 5 % and 95 % quantiles of optima (S, M): (low (M,), high (M,))."""
    return np.quantile(optima, 0.05, axis=0), np.quantile(optima, 0.95, axis=0)


def edges(low, high, caps=None):
    """Which bounds an interval touches: list of M texts, '' for none.

    low, high (M,) the interval         caps (M,) highest shares, None: 1
    A quantile at a bound says that many refits would go further, not that the share is certain.
    """
    caps = np.ones(len(low)) if caps is None else caps
    found = []
    for a, b, cap in zip(low, high, caps, strict=True):
        sides = []
        if a < NO_SHARE:
            sides.append('0')
        if b > cap - NO_SHARE:
            sides.append('1' if cap >= 1 else 'its cap')
        found.append(' and '.join(sides))
    return found


# -- the report -----------------------------------------------------------------------------------


def report_optimum(table, laws, drawn, columns, recipe):
    """Prints the mixture of lowest mean loss, and returns it with its interval as plain data.

    table  tools.runs.Table     laws     of its k groups, of mixtures of its `columns`
    drawn  lists of such laws, fitted to bootstrap samples of the runs
    """
    def mean_loss(p):
        return float(np.mean([law(columns.reduce(p)) for law in laws]))

    names = table.groups
    best = optimum(laws, recipe, columns)
    alone = optimum(laws, None, columns)
    # Columns that are held or in a fixed ratio stay so in every mixture that is compared.
    start = columns.expand((1 - columns.held.sum()) * columns.reduce(np.full(len(names), 1.0))
                           / (columns.parts > 0).sum())
    low, high = interval([optimum(sample, recipe, columns) for sample in drawn])
    at_edge = edges(low, high, recipe.caps)
    for j in np.flatnonzero(columns.parts.sum(0) == 0):
        at_edge[j] = 'held'
    run = min(table.runs, key=lambda run: run.loss.mean())
    found = dict(p=best.tolist(), low=low.tolist(), high=high.tolist(), edges=at_edge)
    found.update(predicted=mean_loss(best), predicted_uniform=mean_loss(start))
    found.update(kl=recipe.kl, caps=None if recipe.caps is None else recipe.caps.tolist())
    found.update(natural=None if recipe.natural is None else recipe.natural.tolist())
    print(
        f'lowest mean loss: {found["predicted"]:.4f} predicted, {found["predicted_uniform"]:.4f} '
        'for equal shares')
    limits = []
    if recipe.kl:
        divergence = float(kl_of(best, recipe.natural))
        limits.append(f'KL {recipe.kl:g} to {recipe.source} (divergence {divergence:.3f} nats)')
    if recipe.caps is not None:
        limits.append('at most {max_epochs:g} epochs in {tokens:.4g} tokens'.format(**recipe.about))
    if limits:
        found['alone'] = dict(p=alone.tolist(), predicted=mean_loss(alone))
        print(
            f'limits: {", ".join(limits)}. Without them the laws predict {mean_loss(alone):.4f} '
            f'for {(alone > NO_SHARE).sum()} of {len(names)} sources, with them '
            f'{(best > NO_SHARE).sum()} sources are used')
    elif (best < NO_SHARE).any():
        print('no limits: a law alone recommends corners, far from its runs (see --kl)')
    rows = zip(names, best, low, high, at_edge, run.p, strict=True)
    print_table(['source', 'best share', '5 %', '95 %', 'edge', 'share in the best run'], rows)
    if any(edge not in ('', 'held') for edge in at_edge):
        print('edge: the interval ends at this bound, so it may be too short')
    print(f'the best run has {run.loss.mean():.4f}')
    errors = table.loss.mean(1) - np.mean([law(columns.reduce(table.p)) for law in laws], 0)
    # The best of many runs is a little better than predicted by chance.
    if run.loss.mean() < found['predicted'] - 2 * float(np.sqrt((errors**2).mean())):
        print('That is far below what the laws predict for their best mixture: try it as well.')
    return {**found, 'best_run': dict(p=run.p.tolist(), loss=float(run.loss.mean()))}
