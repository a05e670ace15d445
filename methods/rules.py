"""Rules that set the sampling weights: (weights, measurements, state) -> (weights, state, log). Numbers in, numbers out, float64.

Influence first, then its rivals Skill-It, DoGE, DoReMi and Aioli; methods/reweight.py and methods/baselines.py measure for them. Weights are dicts source -> share,
states plain numbers that a checkpoint's JSON holds. A rule that finds nothing to change returns the very weights that it was given.
"""
import math

import numpy as np

from configurator import BadInput

ETA = dict(influence=0.3, skillit=0.2, aioli=0.2, doge=100.0, doremi=1.0)       # step of a method where mixture_eta is None


def eta_of(config):
    """The step of the method that train.py's knobs name."""
    return ETA[config['mixture']] if config['mixture_eta'] is None else config['mixture_eta']


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


# -- the rival methods -------------------------------------------------------------------------------------------------
# One convention: A[i][j] says how much training on source j lowers the loss of source i. Rows are evaluated, columns are trained on, in the
# order of the weights' names, and positive is good. Greedy steps need its column sums only: w_j * exp(eta * sum_i A_ij).

def exponentiated(weights, gains, eta):
    """Shares proportional to w * exp(eta * gain). weights: dict of floats; gains: floats in its order."""
    logs = [(math.log(w) if w > 0 else -math.inf) + eta * float(g) for w, g in zip(weights.values(), gains)]
    terms = [math.exp(x - max(logs)) for x in logs]
    return {name: term / sum(terms) for name, term in zip(weights, terms)}


def uniform(weights):
    return dict.fromkeys(weights, 1 / len(weights))


def averaged(weights, state):
    """The state with these weights counted into its mean: 'n' updates, 'average' by source."""
    n = state.get('n', 0)
    return dict(n=n + 1, average={name: (state['average'][name] * n + w) / (n + 1) if n else w for name, w in weights.items()})


def update_skillit(weights, losses, state, graph, eta=0.2, window=3):
    """New weights by Skill-It (Chen et al. 2023, arXiv:2307.14430, Algorithm 1): uniform ones times exp(eta * column sums of A), anew each time.

    losses    nats per token by source, now; {}: none yet, all count as 1
    graph     (m, m), row evaluated, column trained: relative drop of a source's loss in a run on the column's source alone
    A_ij is graph_ij times the sum of the last `window` losses of source i. state: {'losses': lists of floats}, {} at first.
    """
    kept = (state.get('losses', []) + [[losses[name] for name in weights]])[-window:] if losses else []
    sums = np.sum(kept, 0) if kept else np.ones(len(weights))
    A = np.asarray(graph, dtype=np.float64) * sums[:, None]
    return exponentiated(uniform(weights), A.sum(0), eta), dict(losses=kept), dict(A=A / max(1, len(kept)))


def update_doge(weights, inner, norms, state, learning_rate, eta=100.0, low=0.0, high=5.0):
    """New weights of DoGE's proxy (Fan et al. 2024, arXiv:2310.15393, Algorithm 1): w * exp(eta * learning_rate * inner / mean norm).

    inner     by source: product of its gradient and the validation batch's, both clipped by their norm; norms: of the sources' gradients
    eta       1 / mu; low, high: bounds of inner / mean norm
    A source without a row in the batch has inner and norm 0. state: as `averaged`, which gives the method's mixture.
    """
    mean_norm = sum(norms.values()) / len(norms) + 1e-6
    gains = [learning_rate * min(max(inner[name] / mean_norm, low), high) for name in weights]
    new = exponentiated(weights, gains, eta)
    return new, averaged(new, state), dict(gains=gains)


def update_doremi(weights, excess, state, eta=1.0, smoothing=1e-3):
    """New weights of DoReMi's proxy (Xie et al. 2023, arXiv:2305.10429, Algorithm 1): w * exp(eta * excess loss), mixed with uniform ones.

    excess    nats per token above the reference model's by source; below 0 it counts as 0. A source that the batch had no row of is not in it,
              and keeps its last score.
    state     {'scores': by source} and what `averaged` holds, {} at first: the method's mixture is the average
    """
    scores = {name: max(0.0, excess[name]) if name in excess else state.get('scores', {}).get(name, 0.0) for name in weights}
    moved = exponentiated(weights, scores.values(), eta)
    new = {name: (1 - smoothing) * w + smoothing / len(weights) for name, w in moved.items()}
    return new, dict(scores=scores, **averaged(new, state)), dict(A=np.diag(list(scores.values())))


def one_hot_mixtures(names, factor):
    """The mixtures that Aioli explores: for every source, `factor` on it and the rest spread alike. BadInput when that tells nothing apart."""
    m = len(names)
    if m < 2 or not 1 / m < factor <= 1:
        raise BadInput(f'one_hot_factor = {factor} must be above 1 / sources = {1 / m:.4g} and at most 1, with two sources or more: otherwise all '
                       'explored mixtures are the same, or favour the wrong source.')
    return {name: {other: factor if other == name else (1 - factor) / (m - 1) for other in names} for name in names}


def aioli_matrix(shares, drops):
    """A (m, m) from segments of exploration, by least squares: the drop of source i's loss in a segment is sum_j A_ij * share_j.

    shares (K, m): of the rows trained on in each segment, by source; drops (K, m): of every source's loss over it. BadInput when the shares
    do not tell the sources apart. Chen et al. 2024, Aioli (arXiv:2411.05735), section 5: with sweeps over the same mixtures P that is P^-1 D.
    """
    shares, drops = np.asarray(shares, dtype=np.float64), np.asarray(drops, dtype=np.float64)
    A, _, rank, _ = np.linalg.lstsq(shares, drops, rcond=1e-6)
    if rank < shares.shape[1]:
        raise BadInput(f'the {len(shares)} explored segments trained on mixtures of rank {rank}, {shares.shape[1]} sources need that many different '
                       'ones. Raise aioli_steps or total_batch_tokens (rows are whole), or one_hot_factor.')
    return A.T


def normalised(A):
    """Aioli's normal form: entries >= 0 (the smallest is subtracted from all if it is negative) that sum to 1; uniform if all are 0."""
    A = A - min(0.0, A.min())
    return A / A.sum() if A.sum() > 0 else np.full_like(A, 1 / A.size)


def update_aioli(weights, A, state, eta=0.2, ema=None, rule='accumulate'):
    """New weights by Aioli (Chen et al. 2024, arXiv:2411.05735, Algorithm 1) from the matrix measured in this round, (m, m).

    ema       share of the past in the mean of normalised matrices; None: this round's alone
    rule      accumulate: the weights before, times exp(eta * column sums), the paper's. reference_ema: the weights of the start, each time, as
              the public code has it: nothing accumulates, and no weight gets further than exp(eta) from its start
    state     {'matrix': the mean so far, 'start': weights before the first update}, {} at first
    """
    E, start = normalised(np.asarray(A, dtype=np.float64)), state.get('start', dict(weights))
    if ema is not None and 'matrix' in state:
        E = (1 - ema) * E + ema * np.asarray(state['matrix'])
    new = exponentiated(weights if rule == 'accumulate' else start, E.sum(0), eta)
    return new, dict(matrix=E.tolist(), start=start), dict(A=A, normalised=E)
