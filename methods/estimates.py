"""Influence and its errors from inner products of gradients. Numbers in, numbers out, in float64.

influence.py measures the products. The unit of influence is the probe's own help: 1 is as good as
more text of the probe, of all its domains by their weights, 0 is useless, negative influence is
harmful.

Letters: D domains of the probe (c and d in formulas, w their weights), P parts of it, K rows or
batches of a source. `kept` (P,) is 1 for parts that count and 0 for the others.
"""
import math
from dataclasses import dataclass

import numpy as np

from configurator import BadInput, RunFault
from influence import Direction, measure_probe

# two-sided 95 % quantiles of Student's t by degrees of freedom
T95 = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306, 10: 2.228, 15: 2.131,
    20: 2.086, 30: 2.042, 60: 2.000, math.inf: 1.960}  # fmt: skip


def widening(freedom):
    """By how much a standard error of so few degrees of freedom is too small for a 95 % interval.

    freedom: array of floats; the quantile of Student's t over that of the normal distribution.
    """
    inverse = [1 / n for n in T95]
    at = 1 / np.maximum(freedom, 1.0)
    return np.interp(at, inverse[::-1], list(T95.values())[::-1]) / T95[math.inf]


def domain_products(probe, kept):
    """Products of the domains' mean gradients without their noise, and what the parts give to them.

    Returns (M (D, D), shares (D, P)): M_cd estimates <g_c, g_d> for the gradients g without noise.
    The mean gradient of domain c is the sum of shares_cp times part p.
    """
    member = (probe.at == np.arange(len(probe.domains))[:, None]) * kept       # (D, P)
    tokens = member @ probe.tokens
    # The squared norm of a mean gradient includes that of its noise. Inner products of different
    # units do not, because their noise is independent.
    pairs = member @ probe.gram @ member.T - np.diag(member @ probe.norms)
    weights = np.outer(tokens, tokens) - np.diag(member @ probe.squares)
    return pairs / weights, member / tokens[:, None]


def domain_weights(probe, weights):
    """The weights of the domains as (D,) shares. weights: domain -> weight, None: equal ones."""
    w = np.array([1.0 if weights is None else weights[d] for d in probe.domains], dtype=np.float64)
    return w / w.sum()


def units_of(probe, weights, units, kept):
    """What influences are divided by: (divisors (n,), a (D,), M (D, D), shares (D, P)).

    The direction is the sum of a_c g_c, and its product with the probe's mean gradient, the sum of
    w_c g_c, comes last in divisors. With units='own' the squared norms of the g_c come before it.
    All of them must be above 0 for an influence to have a meaning. M, shares: `domain_products`.
    """
    w = domain_weights(probe, weights)
    M, shares = domain_products(probe, kept)
    norms = M.diagonal() if units == 'own' else M.diagonal()[:0]
    a = w / norms if units == 'own' else w
    return np.append(norms, a @ M @ w), a, M, shares


def factors_of(probe, weights, units, kept=1.0):
    """What every part of the probe gives to an influence: (D + 1, P) float64.

    The influence of a source on domain c, and in the last row on all domains together, is the sum
    of factors_cp times the product of the source's mean gradient with part p. In every row, text of
    the probe has the influence 1: of the domain, or of the domains in proportion to their weights.

    units     'loss': influence on the weighted mean of the domains' losses, where domains with
              large gradients count more. 'own': weighted mean of the influences on the domains,
              each in units of its own help.
    """
    kept = np.ones(len(probe.at)) * kept
    divisors, a, M, shares = units_of(probe, weights, units, kept)
    return np.vstack((shares / M.diagonal()[:, None], a @ shares / divisors[-1]))


@dataclass
class Estimate:
    """Influence of sources: on every domain, and on all of them together in the last column."""
    r: dict             # source -> (D + 1,) float64
    se: dict            # source -> (D + 1,): standard errors, widened as `widening` has it
    cov: np.ndarray     # (S, S): covariances of the last column


def leave_out(probe, weights, units):
    """The factors without each part of the probe in turn: (P, D + 1, P)."""
    return np.array([factors_of(probe, weights, units, 1.0 - row) for row in np.eye(len(probe.at))])


def jackknife(probe, left_out):
    """Deviations (P, ...) of what was estimated without each part of the probe, left_out (P, ...).

    The sum of their squares over the parts is the variance by the delete-a-group jackknife, where
    every domain is a stratum of its own.
    """
    deviations = np.zeros_like(left_out)
    for i in range(len(probe.domains)):
        at = probe.at == i
        n = at.sum()
        deviations[at] = (left_out[at] - left_out[at].mean(0)) * ((n - 1) / n) ** 0.5
    return deviations


def estimate(probe, weights, units, found):
    """Influence of every source with its errors: `Estimate`.

    found    source -> (products (K, P) of rows or batches with the probe's parts, tokens (K,))
    The errors are those of the source's sample and of the probe's together. Noise of the probe
    moves all sources at once, so their influences are correlated.
    """
    # A domain whose parts disagree may give nan here. Then only its own column is lost.
    with np.errstate(divide='ignore', invalid='ignore'):
        factors = factors_of(probe, weights, units)
        left_out = leave_out(probe, weights, units)                             # (P, D + 1, P)
    stratum = (probe.at == np.arange(len(probe.domains))[:, None]).astype(float)        # (D, P)
    n_parts = stratum.sum(1)                                                            # (D,)
    r, se, widths = {}, {}, []
    deviations = []                     # (P,) of every source, of the joint influence
    rows = []                           # variances of the joint influence over rows
    for name, (products_of_source, tokens) in found.items():
        # A source without a valid token in the sample has influence 0 and an infinite error.
        mean = products_of_source.sum(0) / max(1.0, tokens.sum())               # (P,)
        r[name], error = mean_and_error(products_of_source @ factors.T, tokens)
        changes = jackknife(probe, left_out @ mean)                             # (P, D + 1)
        by_stratum = stratum @ changes**2                                       # (D, D + 1)
        variance = by_stratum.sum(0) + error**2
        # Welch and Satterthwaite's degrees of freedom of a sum of variances
        n_rows = tokens.sum() ** 2 / max(1.0, (tokens**2).sum())
        parts_of_variance = (by_stratum**2 / (n_parts - 1)[:, None]).sum(0)
        parts_of_variance += error**4 / max(n_rows - 1, 1.0)
        freedom = np.divide(
            variance**2, parts_of_variance, out=np.ones_like(variance),
            where=np.isfinite(variance) & (parts_of_variance > 0))
        width = widening(freedom)
        se[name] = np.sqrt(variance) * width
        widths.append(width[-1])
        deviations.append(changes[:, -1])
        rows.append(error[-1] ** 2)
    deviations = np.array(deviations)
    cov = (deviations @ deviations.T + np.diag(rows)) * np.outer(widths, widths)
    return Estimate(r, se, cov)


def noise_of(probe, weights, units):
    """Why a measurement on the probe says nothing, as a clause; '': it says something.

    What an influence is divided by is a product without noise. Where that is smaller than its own
    standard error, an influence may come out at any size and with any sign.
    """
    P = len(probe.at)
    with np.errstate(divide='ignore', invalid='ignore'):
        found = units_of(probe, weights, units, np.ones(P))[0]
        left_out = np.array([units_of(probe, weights, units, 1.0 - row)[0] for row in np.eye(P)])
        spread = (jackknife(probe, left_out) ** 2).sum(0) ** 0.5
    # In this form nan counts as noise.
    unclear = ~(found > spread)
    if not unclear.any():
        return ''
    i = int(unclear.argmax())
    names = probe.domains
    if i < len(found) - 1:              # domains of units='own', and not all of them together
        names = [names[j] for j in np.flatnonzero(unclear[:-1])]
    return (
        f'the rows of the probe ({", ".join(names)}) do not agree with each other: the mean '
        f'product of their gradients is {found[i]:.2g} with a standard error of {spread[i]:.2g}')


def reliability(probe):
    """Domain -> share of its mean gradient's squared norm that is not noise; negative: all is."""
    M, shares = domain_products(probe, np.ones(len(probe.at)))
    with_noise = np.einsum('dp,pq,dq->d', shares, probe.gram, shares)
    return dict(zip(probe.domains, (M.diagonal() / with_noise).tolist(), strict=True))


def direction_of(probe, weights=None, units='loss'):
    """The `Direction` that lowers the loss on the probe, from a `Probe`.

    weights, units   as for `factors_of`; weights None: equal ones
    Raises RunFault when the unit of influence is not positive. `noise_of` asks for more.
    """
    lowest = units_of(probe, weights, units, np.ones(len(probe.at)))[0].min()
    if not lowest > 0:
        raise RunFault(
            f'the rows of the probe ({", ".join(probe.domains)}) do not agree with each other '
            f'(mean product {lowest:.3g}). Raise probe_rows, or make the probe set larger.')
    factors = factors_of(probe, weights, units)[-1]
    v = {}
    for name in probe.parts[0]:
        v[name] = sum(c * part[name] for c, part in zip(factors, probe.parts, strict=True))
    return Direction(v, probe.layers)


def probe_direction(model, probe, layers='last', weights=None, scale=None, units='loss'):
    """The `Direction` of probe sets, see `measure_probe` and `direction_of`."""
    return direction_of(measure_probe(model, probe, layers, scale), weights, units)


def mean_and_error(values, tokens):
    """A mean per token and its standard error, from sums (K, D) or (K,) over tokens (K,).

    The jackknife: how much the mean changes without each row or batch. Returns two arrays
    (D,), or two floats. The error is infinite where one row or batch has all valid tokens, or none
    has any. Raises BadInput for fewer than two.
    """
    if len(tokens) < 2:
        raise BadInput(f'influence: {len(tokens)} batch(es) of a source; at least two are needed.')
    total = tokens.sum()
    r = values.sum(0) / max(1.0, total)
    counted = tokens > 0
    k = counted.sum()
    if k < 2:
        return r, np.full_like(r, math.inf)
    residuals = values[counted] - np.multiply.outer(tokens[counted], r)
    changes = -(residuals.T / (total - tokens[counted])).T
    return r, np.sqrt(((changes - changes.mean(0)) ** 2).sum(0) * (k - 1) / k)
