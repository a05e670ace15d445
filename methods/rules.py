"""Rules that set the sampling weights: (weights, measurements, state) -> (weights, state, log).

Numbers in, numbers out, in float64, without torch. Influence comes first, then Skill-It, DoGE,
DoReMi and Aioli. reweight.py and baselines.py measure for them. Weights are dicts source -> share.
States are plain numbers that fit into a checkpoint's JSON. A rule that finds nothing to change
returns the same dict of weights that it was given.

Letters in shape comments: m sources, K segments of exploration.
"""
import math

import numpy as np

from configurator import BadInput

# step size of a method when mixture_eta is None
ETA = dict(influence=0.3, skillit=0.2, aioli=0.2, doge=100.0, doremi=1.0)


def eta_of(config):
    """The step size of the method that train.py's knobs name."""
    return ETA[config['mixture']] if config['mixture_eta'] is None else config['mixture_eta']


# -- bounds ----------------------------------------------------------------------------------------


def check_bounds(n_sources, low, high):
    """Raises BadInput when no mixture of so many sources has all its shares in [low, high]."""
    if not 0 <= low < high <= 1 or n_sources * low > 1 or n_sources * high < 1:
        raise BadInput(
            f'mixture_min = {low} and mixture_max = {high} leave no room: {n_sources} shares '
            f'between them cannot sum to 1. mixture_min must be at most {1 / n_sources:.3g}, '
            'mixture_max at least that.')


def project(weights, low, high):
    """The shares clip(c * weights, low, high) that sum to 1, all dicts by source.

    Bounds hold exactly, and ratios between the bounds stay. Upper bounds that sum to less than 1
    cannot all be kept: they are scaled up to sum to 1, so one of them must be above 0. What the
    sources with a weight cannot take goes to the others, in proportion to their room.
    """
    total = sum(high.values())
    if total < 1:
        high = {name: h / total for name, h in high.items()}
    # A source that is nearly used up may have less room than its lower bound asks for.
    low = {name: min(low[name], high[name]) for name in weights}

    def shares_at(c):
        return {name: min(max(c * w, low[name]), high[name]) for name, w in weights.items()}

    # The sum grows with c, so bisection finds c to the last bit.
    small = 0.0
    # At this c all sources with a weight are at their upper bounds, so larger ones change nothing.
    large = max(high[name] / max(w, 1e-12) for name, w in weights.items())
    for _ in range(200):
        c = (small + large) / 2
        if sum(shares_at(c).values()) < 1:
            small = c
        else:
            large = c
    shares = shares_at(large)
    slack = {name: high[name] - share for name, share in shares.items()}
    total_slack = sum(slack.values())
    rest = 1 - sum(shares.values())
    if total_slack > 0:         # rest: rounding, or all sources with a weight are at their bounds
        shares = {name: share + rest * slack[name] / total_slack for name, share in shares.items()}
    return shares


def epoch_caps(high, max_epochs, rows_read, rows_in_epoch, rows_to_come):
    """Upper bounds by source, at most `high`, that keep it within max_epochs of the run.

    rows_read, rows_in_epoch: dicts by source; rows_to_come: rows of all sources that the run still
    draws
    """
    if max_epochs is None:
        return dict.fromkeys(rows_read, high)
    caps = {}
    for name, n_read in rows_read.items():
        left = max(0.0, max_epochs * rows_in_epoch[name] - n_read)
        caps[name] = min(high, left / max(1, rows_to_come))
    return caps


# -- influence -------------------------------------------------------------------------------------


def update_influence(weights, r, se, state, eta, low, high, ema=0.5):
    """New weights from the influence of every source: log w += eta * clip(r, -1, 1), then bounds.

    r, se     influence and its standard error by source: 1 is as good as probe text, 0 useless,
              negative harmful
    state     {'r': moving averages by source}, {} at first
    low       smallest share; high: largest share by source
    An influence within two standard errors counts as 0. The weights stay as they are, and
    log['kept'] says why, if no influence is clearer than that, or if every source is harmful.
    """
    # Noise is removed before averaging, so that it does not gather in the moving average.
    clear = {name: value if abs(value) >= 2 * se[name] else 0.0 for name, value in r.items()}
    before = state.get('r', {})
    mean = {}
    for name in r:
        mean[name] = (1 - ema) * before.get(name, clear[name]) + ema * clear[name]
    # Otherwise the averages of the past would go on moving weights without new evidence.
    if all(value == 0 for value in clear.values()):
        return weights, dict(r=mean), dict(kept='no influence is clearer than its noise')
    # Normalised, the least harmful source would gain weight as if it helped.
    if all(value < 0 for value in mean.values()):
        return weights, dict(r=mean), dict(kept='every source has negative influence')
    moved = {}
    for name, w in weights.items():
        moved[name] = w * math.exp(eta * min(max(mean[name], -1.0), 1.0))
    total = sum(moved.values())
    moved = {name: w / total for name, w in moved.items()}
    return project(moved, dict.fromkeys(weights, low), high), dict(r=mean), dict(kept='')


def update_proportional(weights, r, se, state, low, high):
    """New weights in proportion to influence: MobileLLM-R1 (arXiv:2509.24945), equations 5 and 6.

    They are the mean of r over all updates so far, in which the t-th counts t (alpha) and negative
    means count as 0; then bounds (low=0, high=1: none).
    state: {'n': updates so far, 'sum': t * r summed, by source}, {} at first. If no source has a
    positive mean the weights stay. se is not used: the paper has no dead zone.
    """
    n = state.get('n', 0) + 1
    before = state.get('sum', {})
    total = {name: before.get(name, 0.0) + n * value for name, value in r.items()}
    state = dict(n=n, sum=total)
    # Clamped after the sum. Clamping every update would turn noise around 0 into influence.
    helpful = {name: max(value, 0.0) for name, value in total.items()}
    if not sum(helpful.values()) > 0:
        return weights, state, dict(kept='no source has positive influence')
    shares = {name: value / sum(helpful.values()) for name, value in helpful.items()}
    return project(shares, dict.fromkeys(weights, low), high), state, dict(kept='')


# -- the methods that influence is compared with ---------------------------------------------------
# One convention: A[i][j] says how much training on source j lowers the loss of source i. Rows are
# evaluated, columns are trained on, in the order of the weights' names, and positive is good.
# Greedy steps need only its column sums: w_j * exp(eta * sum_i A_ij).


def exponentiated(weights, gains, eta):
    """Shares proportional to w * exp(eta * gain). gains: floats in the order of the weights."""
    logs = []
    for w, gain in zip(weights.values(), gains, strict=True):
        logs.append((math.log(w) if w > 0 else -math.inf) + eta * float(gain))
    # Subtracting the largest keeps exp from overflowing at any eta.
    terms = [math.exp(x - max(logs)) for x in logs]
    return {name: term / sum(terms) for name, term in zip(weights, terms, strict=True)}


def uniform(weights):
    return dict.fromkeys(weights, 1 / len(weights))


def averaged(weights, state):
    """The state with these weights included in its mean: 'n' updates, 'average' by source."""
    n = state.get('n', 0)
    if not n:
        return dict(n=1, average=dict(weights))
    average = {}
    for name, w in weights.items():
        average[name] = (state['average'][name] * n + w) / (n + 1)
    return dict(n=n + 1, average=average)


def update_skillit(weights, losses, state, graph, eta=0.2, window=3):
    """New weights by Skill-It (Chen et al. 2023, arXiv:2307.14430), Algorithm 1.

    They are uniform weights times exp(eta * column sums of A), computed anew each time. A_ij is
    graph_ij times the sum of the last `window` losses of source i.
    losses    nats per token by source, now. {}: none yet, and all count as 1
    graph     (m, m), row evaluated, column trained: relative drop of a source's loss in a run on
              the column's source alone
    state     {'losses': lists of floats}, {} at first
    """
    kept = []
    sums = np.ones(len(weights))
    if losses:
        now = [losses[name] for name in weights]
        kept = (state.get('losses', []) + [now])[-window:]
        sums = np.sum(kept, 0)
    A = np.asarray(graph, dtype=np.float64) * sums[:, None]
    new = exponentiated(uniform(weights), A.sum(0), eta)
    # The rule needs the sum. A is logged per loss, so that it does not grow with the window.
    return new, dict(losses=kept), dict(A=A / max(1, len(kept)))


def update_doge(weights, inner, norms, state, learning_rate, eta=100.0, low=0.0, high=5.0):
    """New weights of DoGE's proxy (Fan et al. 2024, arXiv:2310.15393), Algorithm 1.

    They are w * exp(eta * learning_rate * inner / mean norm).
    inner     by source: product of its gradient and the validation batch's, both clipped by their
              norm
    norms     by source: norms of the gradients. A source without a row in the batch has inner and
              norm 0
    eta       1 / mu; low, high: bounds of inner / mean norm
    state     as `averaged` has it. The method's mixture is the average
    """
    mean_norm = sum(norms.values()) / len(norms) + 1e-6
    gains = []
    for name in weights:
        gains.append(learning_rate * min(max(inner[name] / mean_norm, low), high))
    new = exponentiated(weights, gains, eta)
    return new, averaged(new, state), dict(gains=gains)


def update_doremi(weights, excess, state, eta=1.0, smoothing=1e-3):
    """New weights of DoReMi's proxy (Xie et al. 2023, arXiv:2305.10429), Algorithm 1.

    They are w * exp(eta * excess loss), mixed with a share `smoothing` of uniform weights.
    excess    nats per token above the reference model's by source. Below 0 it counts as 0. A source
              without a row in the batch is missing and keeps its last score
    state     {'scores': by source} and what `averaged` has, {} at first. The method's mixture is
              the average
    """
    before = state.get('scores', {})
    scores = {}
    for name in weights:
        scores[name] = max(0.0, excess[name]) if name in excess else before.get(name, 0.0)
    moved = exponentiated(weights, scores.values(), eta)
    share = smoothing / len(weights)
    new = {name: (1 - smoothing) * w + share for name, w in moved.items()}
    state = dict(scores=scores, **averaged(new, state))
    return new, state, dict(A=np.diag(list(scores.values())))


def one_hot_mixtures(names, factor):
    """The mixtures that Aioli explores: `factor` on one source, equal parts on the others.

    Returns source -> mixture. Raises BadInput when the mixtures would not tell the sources apart.
    """
    m = len(names)
    if m < 2 or not 1 / m < factor <= 1:
        raise BadInput(
            f'one_hot_factor = {factor} must be above 1 / sources = {1 / m:.4g} and at most 1, '
            'with two sources or more: otherwise all explored mixtures are the same, or favour the '
            'wrong source.')
    mixtures = {}
    for name in names:
        mixtures[name] = dict.fromkeys(names, (1 - factor) / (m - 1))
        mixtures[name][name] = factor
    return mixtures


def aioli_matrix(shares, drops):
    """The matrix A (m, m) from segments of exploration, by least squares.

    shares (K, m): share of every source in the rows of each segment. drops (K, m): by how much
    every source's loss fell. The drop of source i in a segment is sum_j A_ij * share_j. With sweeps
    over the same mixtures P that is P^-1 D (Chen et al. 2024, Aioli, arXiv:2411.05735, section 5).
    Raises BadInput when the shares do not tell the sources apart.
    """
    shares = np.asarray(shares, dtype=np.float64)
    drops = np.asarray(drops, dtype=np.float64)
    A, _, rank, _ = np.linalg.lstsq(shares, drops, rcond=1e-6)
    if rank < shares.shape[1]:
        raise BadInput(
            f'the {len(shares)} explored segments trained on mixtures of rank {rank}, and '
            f'{shares.shape[1]} sources need that many different ones. Raise aioli_steps or '
            'total_batch_tokens (rows are not divided), or one_hot_factor.')
    return A.T


def normalised(A):
    """Aioli's normal form: entries >= 0 that sum to 1, uniform if all are 0.

    A negative smallest entry is subtracted from all entries.
    """
    A = A - min(0.0, A.min())
    return A / A.sum() if A.sum() > 0 else np.full_like(A, 1 / A.size)


def update_aioli(weights, A, state, eta=0.2, ema=None, rule='accumulate'):
    """New weights by Aioli (Chen et al. 2024, arXiv:2411.05735), Algorithm 1.

    A         (m, m), measured in this round
    ema       share of the past in the mean of normalised matrices. None: this round's alone
    rule      'accumulate', the paper's: the last weights times exp(eta * column sums).
              'reference_ema', the public code's: the start weights times that, each time, so
              nothing accumulates, and no weight gets further than exp(eta) from its start
    state     {'matrix': the mean so far, 'start': weights before the first update}, {} at first
    """
    mean = normalised(np.asarray(A, dtype=np.float64))
    if ema is not None and 'matrix' in state:
        mean = (1 - ema) * mean + ema * np.asarray(state['matrix'])
    start = state.get('start', dict(weights))
    new = exponentiated(weights if rule == 'accumulate' else start, mean.sum(0), eta)
    return new, dict(matrix=mean.tolist(), start=start), dict(A=A, normalised=mean)
