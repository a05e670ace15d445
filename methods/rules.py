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

# step size of a method when mixture_eta is None. That of aioli depends on the number of sources
ETA = dict(influence=0.3, skillit=0.2, doge=100.0, doremi=1.0)


def eta_of(config):
    """The step size of the method that train.py's knobs name."""
    if config['mixture_eta'] is not None:
        return config['mixture_eta']
    if config['mixture'] == 'aioli':
        return aioli_published(sum(w > 0 for w in config['sources'].values()))['eta']
    return ETA[config['mixture']]


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


# An influence counts as 1 at most, so a standard deviation above 1 says nothing.
UNKNOWN = 1.0


def differences(weights, r, cov):
    """By how much every source is better than the weighted mean of all, and the error of that.

    weights, r   by source; cov (m, m): covariances of r
    Returns ((m,), (m,)). Noise that moves all sources alike, as that of the probe does, cancels.
    Sources whose influence is not known have a difference of 0.
    """
    values = np.array(list(r.values()))
    known = cov.diagonal() <= UNKNOWN**2
    w = np.array(list(weights.values())) * known
    found = np.zeros(len(r))
    errors = np.full(len(r), math.inf)
    if not w.sum() > 0:
        return found, errors
    L = (np.eye(len(r)) - w / w.sum())[known][:, known]
    found[known] = L @ values[known]
    errors[known] = np.sqrt(np.maximum((L @ cov[np.ix_(known, known)] @ L.T).diagonal(), 0.0))
    return found, errors


def update_influence(weights, r, cov, state, eta, low, high, kl=0.0, ema=0.5):
    """New weights from the influence of every source, by steps: log w += eta * d, then bounds.

    d is the difference of a source's influence from the weighted mean of all sources. It counts as
    0 within two standard errors.
    r         influence by source: 1 is as good as probe text, 0 useless, negative harmful. Beyond
              -1 and 1 it is cut off
    cov       (m, m): covariances of r in its order
    state     {'r': moving averages by source, 'cov': their covariances, 'start': the weights before
              the first update}, {} at first
    low       smallest share; high: largest share by source
    kl        above 0: log w += eta * (d - kl * log(w / start)), a step of mirror descent on the
              mean influence minus kl times the divergence from the start weights
    Under a constant r the weights go on until the best sources are at their upper bounds, all
    others at the lower one; with kl they converge to start * exp(r / kl), within the bounds. The
    weights stay as they are, and log['kept'] says why, if no difference is clear, or if every
    source is harmful.
    """
    # Cut off before averaging: a single outlier would stay in the average for several updates.
    now = np.clip(list(r.values()), -1.0, 1.0)
    # A source with one counted row has an infinite error, which JSON does not hold.
    cov = np.minimum(np.asarray(cov, dtype=np.float64), 1e6)
    before = state.get('r', {})
    if list(before) == list(r) and 'cov' in state:
        now = (1 - ema) * np.array(list(before.values())) + ema * now
        cov = (1 - ema) ** 2 * np.array(state['cov']) + ema**2 * cov
    mean = dict(zip(r, now.tolist(), strict=True))
    start = state.get('start', {})
    if list(start) != list(weights):
        start = dict(weights)
    state = dict(r=mean, cov=cov.tolist(), start=start)
    errors = np.sqrt(cov.diagonal())
    # Normalised, the least harmful source would gain weight as if it helped.
    if all(value < -2 * error for value, error in zip(now, errors, strict=True)):
        return weights, state, dict(kept='every source has negative influence')
    found, errors = differences(weights, mean, cov)
    clear = np.abs(found) >= 2 * errors
    if not clear.any() and not kl:
        return weights, state, dict(kept='no source differs from the others by more than its noise')
    gains = np.where(clear, found, 0.0)
    if kl:
        for i, (name, w) in enumerate(weights.items()):
            if w > 0:
                gains[i] -= kl * math.log(w / start[name])
    moved = exponentiated(weights, gains, eta)
    return project(moved, dict.fromkeys(weights, low), high), state, dict(kept='')


def update_proportional(weights, r, state, low, high):
    """New weights in proportion to influence: MobileLLM-R1 (arXiv:2509.24945), equations 5 and 6.

    They are the mean of r over all updates so far, in which the t-th counts t (alpha) and negative
    means count as 0; then bounds (low=0, high=1: none).
    state: {'n': updates so far, 'sum': t * r summed, by source}, {} at first. If no source has a
    positive mean the weights stay. The paper has no dead zone, so errors do not count.
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


def schedule_weights(points, step, interpolation):
    """The weights of a schedule at a step: dict source -> share.

    points: list of (step, dict source -> share), the first at 0. 'step' holds a point's weights
    until the next point, 'linear' goes straight to it. After the last point its weights stay.
    """
    after = next((i for i, (at, _) in enumerate(points) if at > step), len(points))
    begin, weights = points[after - 1]
    if interpolation == 'step' or after == len(points):
        return dict(weights)
    end, target = points[after]
    share = (step - begin) / (end - begin)
    return {name: (1 - share) * w + share * target[name] for name, w in weights.items()}


def huber(x, delta):
    """The Huber loss of residuals: 0.5 x^2 within delta, linear beyond."""
    x = np.abs(x)
    return np.where(x > delta, delta * (x - 0.5 * delta), 0.5 * x * x)


def fit_power_law(n, losses, delta=1e-3):
    """Fits losses ~ floor + scale * n^-exponent. Returns (floor, scale, exponent), floats.

    n, losses (points,): samples seen, above 0, and nats per token. Minimises the Huber loss of the
    differences of logarithms, as ADO does (Jiang et al. 2024, arXiv:2410.11820), with its bounds:
    exponent in [0.001, 0.8], and floor at least exp(0.5) nats. Where losses are so low themselves
    that this leaves no room, the floor is at least half of the smallest loss.
    """
    n = np.asarray(n, dtype=np.float64)
    losses = np.asarray(losses, dtype=np.float64)
    least = min(math.exp(0.5), 0.5 * losses.min())
    logs = np.log(losses)
    unit = math.exp(np.log(n).mean())           # keeps n^-exponent near 1
    low = 0.001
    high = 0.8
    # With the exponent given, floor and scale are linear. A grid finds the exponent, three times
    # with a finer one around the best.
    for _ in range(4):
        exponents = np.linspace(low, high, 33)
        x = (n / unit) ** -exponents[:, None]                                 # (grid, points)
        floor, scale = linear_fit(x, losses / losses, losses, least)
        for _ in range(40):
            predicted = floor[:, None] + scale[:, None] * x
            residual = np.log(predicted) - logs
            # A Gauss-Newton step on the logarithm, with Huber's weights.
            weights = np.minimum(1, delta / np.maximum(np.abs(residual), 1e-300)) / predicted**2
            floor, scale = linear_fit(x, weights, predicted * (1 - residual), least)
        error = huber(np.log(floor[:, None] + scale[:, None] * x) - logs, delta).sum(1)
        best = int(np.argmin(error))
        step = exponents[1] - exponents[0]
        found = float(floor[best]), float(scale[best]), float(exponents[best])
        low = max(0.001, exponents[best] - step)
        high = min(0.8, exponents[best] + step)
    return found[0], found[1] * unit ** found[2], found[2]


def linear_fit(x, weights, y, least):
    """Weighted least squares of y ~ floor + scale * x, floor >= least, scale >= 0, row by row.

    x (grid, points), weights and y of the same shape or (points,). Returns floor, scale (grid,).
    """
    weights = np.broadcast_to(weights, x.shape)
    total = weights.sum(1)
    mean_x = (weights * x).sum(1) / total
    mean_y = (weights * y).sum(1) / total
    centred = x - mean_x[:, None]
    spread = (weights * centred**2).sum(1)
    scale = (weights * centred * y).sum(1) / np.maximum(spread, 1e-300)
    # The best floor without a scale, and the best scale at the lowest floor, where a bound is hit.
    scale = np.maximum(scale, 0)
    floor = mean_y - scale * mean_x
    at_least = np.maximum((weights * x * (y - least)).sum(1) / (weights * x * x).sum(1), 0)
    is_low = floor < least
    return np.where(is_low, least, floor), np.where(is_low, at_least, scale)


def update_ado(prior, laws, state, steps, batch_rows, power=0.5, memory=0.1, policy=0.1,
               smallest=0.01):
    """Mean weights over the coming steps by ADO (Jiang et al. 2024, arXiv:2410.11820), Algorithm 1.

    At every step, with n rows of all sources seen, a source's learning speed is the slope of its
    law, exponent * scale * n^-exponent / n. The new weights are prior * speed * history^power, at
    least `smallest` before they are normalised. The sources are drawn with `policy` parts of them
    and the rest of their average over all steps so far. `history` is a moving average of what is
    drawn. The public code takes an exponent of at least 0.05.
    prior     by source, sums to 1
    laws      by source: (floor, scale, exponent) of `fit_power_law`, with n in rows of all sources
    state     {'history', 'average': by source}, {} at first: the prior
    steps     range of the coming steps, from 1 on; batch_rows: rows of a step
    power, memory, policy, smallest     published as s, gamma 1, gamma 2 and delta min
    Returns (weights, state, log): log['speed'] by source at the first of the steps.
    """
    names = list(prior)
    base = np.array([prior[name] for name in names])
    _, scale, exponent = np.array([laws[name] for name in names]).T
    history = np.array([state.get('history', prior)[name] for name in names])
    average = np.array([state.get('average', prior)[name] for name in names])
    first_speed = None
    total = np.zeros(len(names))
    for step in steps:
        n = float(step * batch_rows)
        speed = np.maximum(exponent, 0.05) * scale * n**-exponent / n
        if first_speed is None:
            first_speed = speed
        new = base * speed * history**power
        if not new.sum() > 0:           # no law falls any more
            new = base
        new = np.maximum(new / new.sum(), smallest)
        new /= new.sum()
        drawn = policy * new + (1 - policy) * average
        average = average + (new - average) / (step + 1)
        history = (1 - memory) * history + memory * drawn
        total += drawn

    def named(values):
        return dict(zip(names, values.tolist(), strict=True))

    state = dict(history=named(history), average=named(average))
    return named(total / len(steps)), state, dict(speed=named(first_speed))


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


def doge_learning_rate(now, peak):
    """DoGE's learning rate at a step: the published peak of 5e-4, times now / peak of this run.

    DoGE derives its step learning_rate / mu from a proxy that AdamW trains at a peak of 5e-4 with
    mu = 0.01 (the configuration of its public code): log-weights move by at most 0.05 per unit of
    inner / mean norm. Another optimizer's rate stands for another length of the model's step, and
    must not change that. Only the shape of the schedule is this run's.
    """
    return 5e-4 * now / peak if peak else 0.0


def update_doge(weights, inner, norms, state, learning_rate, eta=100.0, low=0.0, high=5.0):
    """New weights of DoGE's proxy (Fan et al. 2024, arXiv:2310.15393), Algorithm 1.

    They are w * exp(eta * learning_rate * inner / mean norm). The paper's eta and learning rate are
    the step size of the weights only together: published are 100 times at most 5e-4.
    inner     by source: product of its gradient and the validation batch's, both clipped by their
              norm
    norms     by source: norms of the gradients. A source without a row in the batch has inner and
              norm 0
    learning_rate   on the scale of the published run (`doge_learning_rate`), not of this one's
                    optimizer
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


# Published settings of Aioli by number of sources (the scripts of its public code, for runs of
# 5,000, 5,000 and 40,000 steps). share: of a round's steps that explore. For 7 sources the scripts
# explore 0.70 of each round of 200 steps; the share of 3 sources stands here, because a run of
# mostly explored steps shows what the exploration does.
AIOLI = {
    2: dict(one_hot_factor=0.625, sweeps=4, share=0.128, eta=0.2, ema=0.1),
    3: dict(one_hot_factor=0.5, sweeps=4, share=0.288, eta=0.1, ema=0.5),
    7: dict(one_hot_factor=0.75, sweeps=2, share=0.288, eta=1.0, ema=0.1)}


def aioli_published(n_sources):
    """The published setting for the nearest number of sources, the smaller of two: a dict."""
    return AIOLI[min(AIOLI, key=lambda m: abs(m - n_sources))]


def aioli_exploration(n_sources, interval, sweeps=None, steps=None):
    """Sweeps of a round of `interval` steps, and steps of every exploration: (int, int).

    None: such that the explored share of the round is near the published one, and at most 0.29
    where the round has room for one step on every mixture.
    """
    published = aioli_published(n_sources)
    most = 0.29 * interval / n_sources          # sweeps * steps
    if sweeps is None:
        sweeps = max(1, min(published['sweeps'], int(most / (steps or 1))))
    if steps is None:
        wanted = round(published['share'] * interval / (n_sources * sweeps))
        steps = max(1, min(wanted, int(most / sweeps)))
    return sweeps, steps


def aioli_factor(n_sources, rows):
    """The published one_hot_factor, or the one that gives the favoured source two rows more.

    rows: of one exploration. Rows are whole, and with a smaller difference mixtures that should
    favour different sources may have the same rows.
    """
    two_rows = (1 + 2 * (n_sources - 1) / rows) / n_sources
    return min(1.0, max(aioli_published(n_sources)['one_hot_factor'], two_rows))


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


def update_aioli(weights, A, state, eta, ema=None, rule='accumulate'):
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
