"""Rules that set the sampling weights: (weights, measurements, state) -> (weights, state, log). Numbers in, numbers out, float64.

Weights are dicts source -> share. A rule that finds nothing to change returns the very weights that it was given.
"""
import math

from configurator import BadInput


def check_bounds(n_sources, low, high):
    """BadInput when no mixture of that many sources can have all its shares in [low, high]."""
    if not 0 <= low < high <= 1 or n_sources * low > 1 or n_sources * high < 1:
        raise BadInput(f'mixture_min = {low} and mixture_max = {high} leave no room: {n_sources} shares between them cannot sum to 1. '
                       f'mixture_min must be at most {1 / n_sources:.3g}, mixture_max at least that.')


def project(weights, low, high):
    """The shares clip(c * weights, low, high) that sum to 1 (dicts by source): bounds hold exactly, ratios between them stay.

    Where the upper bounds sum to less than 1 they are raised alike, for then they cannot all be kept; one must be above 0. What the
    sources with a weight cannot take goes to the others, by the room that they have.
    """
    total = sum(high.values())
    high = {name: h / total for name, h in high.items()} if total < 1 else high
    low = {name: min(low[name], high[name]) for name in weights}
    small, large = 0.0, max(high[name] / max(w, 1e-12) for name, w in weights.items())
    for _ in range(200):                        # the sum grows with c: bisection to the last bit
        c = (small + large) / 2
        if sum(min(max(c * w, low[name]), high[name]) for name, w in weights.items()) < 1:
            small = c
        else:
            large = c
    shares = {name: min(max(large * w, low[name]), high[name]) for name, w in weights.items()}
    slack, rest = {name: high[name] - share for name, share in shares.items()}, 1 - sum(shares.values())
    if sum(slack.values()) > 0:                 # rounding, or what is left when all that have a weight are at their bounds
        shares = {name: share + rest * slack[name] / sum(slack.values()) for name, share in shares.items()}
    return shares


def epoch_caps(high, max_epochs, rows_read, rows_in_epoch, rows_to_come):
    """Upper bounds by source: at most `high`, and what keeps the source within max_epochs until the end of the run.

    rows_read, rows_in_epoch: dicts by source; rows_to_come: rows of all sources that the run will still draw.
    """
    if max_epochs is None:
        return dict.fromkeys(rows_read, high)
    return {name: min(high, max(0.0, max_epochs * rows_in_epoch[name] - rows_read[name]) / max(1, rows_to_come)) for name in rows_read}


def update_influence(weights, r, se, state, eta, low, high, ema=0.5):
    """New weights from the influence of every source: log w += eta * clip(r, -1, 1), then bounds.

    r, se     influence and its standard error by source: 1 is as good as probe text, 0 useless, negative harmful
    state     {'r': moving averages by source}, {} at first
    low       smallest share; high: largest share by source
    What lies within two standard errors counts as 0. If nothing is beyond them, or every source is found harmful, the weights
    stay as they are and log['kept'] says why.
    """
    clear = {name: value if abs(value) >= 2 * se[name] else 0.0 for name, value in r.items()}
    before = state.get('r', {})
    mean = {name: (1 - ema) * before.get(name, clear[name]) + ema * clear[name] for name in r}
    log = dict(kept='')
    if all(value == 0 for value in clear.values()):
        return weights, dict(r=mean), {**log, 'kept': 'no influence is clearer than its noise'}
    if all(value < 0 for value in mean.values()):
        return weights, dict(r=mean), {**log, 'kept': 'every source has negative influence'}
    moved = {name: w * math.exp(eta * min(max(mean[name], -1.0), 1.0)) for name, w in weights.items()}
    total = sum(moved.values())
    return project({name: w / total for name, w in moved.items()}, dict.fromkeys(weights, low), high), dict(r=mean), log


def update_proportional(weights, r, se, state, low, high):
    """New weights in proportion to influence, as MobileLLM-R1 has them (arXiv:2509.24945, equations 5 and 6).

    The mean of r over all updates so far, the t-th counting t (alpha), negative ones as 0; then bounds (low=0, high=1: none).
    state: {'n': updates so far, 'sum': t * r summed, by source}, {} at first. If no source has a positive mean the weights stay.
    se is not used: the paper has no dead zone.
    """
    n = state.get('n', 0) + 1
    total = {name: state.get('sum', {}).get(name, 0.0) + n * value for name, value in r.items()}
    state, helpful = dict(n=n, sum=total), {name: max(value, 0.0) for name, value in total.items()}
    if not sum(helpful.values()) > 0:
        return weights, state, dict(kept='no source has positive influence')
    shares = {name: value / sum(helpful.values()) for name, value in helpful.items()}
    return project(shares, dict.fromkeys(weights, low), high), state, dict(kept='')
