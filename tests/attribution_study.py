"""Does influence foresee what a change of the mixture does? A datamodelling score over sources.

    python tests/attribution_study.py --text=folder         # about an hour and a half of two cores

It prints tables of docs/RESULTS.md. `folder` holds train/, val/ and probes/. Finished runs are
kept. The model is that of config/study/base.py. `--optimizer=adamw` has a folder of its own; only
there influence can be scaled by Adam's moments.

The truth: the same model is trained on n mixtures of five sources, with two seeds each. A target is
the mean loss over seeds on text that nothing else reads. The targets are the five sources, three
goals (the other half of a probe set's documents), and the mean of the goals.

A method gives a matrix G: G_ts says by how much more of source s lowers the loss of target t. All
measure it on runs with equal shares, which stay equal. With it the loss of t on a mixture p is
foreseen as -sum_s G_ts p_s. The score is the rank correlation of what was foreseen and what came,
over mixtures (the linear datamodelling score of arXiv:2303.14186, with sources in place of rows).
Most of a source's loss depends on its own share, which needs no measurement. A second score
therefore takes the ranks of that share out of both sides first.

- influence     `mixture='influence'` with step size 0, for several layers, scalings and numbers of
                rows. Domains of the probe are the goals, or the sources
- aioli, doge   the matrix that the method logs, step size 0. Goals: the row of the source that the
                goal is named after
- skillit       the graph of five runs on one source each
- law           the gradient at equal shares of the static law, fitted to the other mixtures (five
                folds): what a sweep gives
- overlap       cosine of the counts of hashed bigrams of a source and of text of the target
- gradient, loss    squared gradient norm of a source's rows, and its loss, the same for all targets
- own share     1 for the source of the target, 0 for the others
- random        normal numbers: the mean of 200 draws
"""
import os

import numpy as np
import torch
from scipy.stats import rankdata

if __name__ == '__main__':
    import _path  # noqa: F401

from configurator import BadInput, at_least, configure, one_of
from data import Source, open_probe
from influence import ghost_sqnorm
from lib.hf import open_model
from tests.studies import (
    documents_of,
    print_header,
    print_row,
    read_arms,
    run,
    tell,
    train_arms,
    write_config,
    write_documents,
    write_summary,
)
from tools.mixing_laws import fit_law, measured_matrix
from tools.sweep import dirichlet_mixtures

# -- knobs --
text = ''                           # folder with train/*.jsonl.gz, val/ and probes/
out = 'out/attribution_study'       # prepared data and runs
n: at_least(10) = 40                # mixtures
seeds = [0, 1]                      # of initial weights and data order, for every mixture
steps: at_least(280) = 400          # of every run
optimizer: one_of('muon', 'adamw') = 'muon'
jobs = 2                            # runs at the same time, of one thread each

SOURCES = ('code', 'math', 'web_edu', 'wiki', 'noise')
GOALS = {'code': 'code', 'math': 'math', 'web': 'web_edu'}      # probe set -> source like it
GOAL_NAMES = [f'{domain}_goal' for domain in GOALS]
TARGETS = [*SOURCES, *GOAL_NAMES, 'all goals']
OWN = [*SOURCES, *GOALS.values()]   # the source that a target is named after
EQUAL = {**dict.fromkeys(SOURCES, 1.0), **dict.fromkeys(GOAL_NAMES, 0.0)}
MEASURE = dict(
    mixture='influence', mixture_eta=0.0, probe_rows=64, influence_rows=32,
    probe=dict.fromkeys(GOAL_NAMES, 1.0))
# Variants of the measurement. Those of `sources_` have the sources as domains of the probe.
VARIANTS = {
    'last block': {},
    'first block': dict(influence_layers='first'),
    'all layers': dict(influence_layers='all'),
    'embedding and head': dict(influence_layers='embedding+head'),
    'last, adam': dict(influence_scaling='adam'),
    'all, adam': dict(influence_layers='all', influence_scaling='adam'),
    'last, datainf': dict(influence_scaling='datainf'),
    '16 probe rows, 16 of a source': dict(probe_rows=16, influence_rows=16),
    '256 probe rows, 64 of a source': dict(probe_rows=256, influence_rows=64),
}
DEFAULT = 'last block'


# -- data and runs ---------------------------------------------------------------------------------


def prepare(text, data):
    """Sources, goals as sources that are not trained on, and a probe set for every target.

    The documents with even numbers are measured on, the others are evaluated.
    """
    places = {name: f'val/{name}' for name in SOURCES}
    places |= {f'{domain}_goal': f'probes/{domain}' for domain in GOALS}
    for name, place in places.items():
        documents = list(documents_of(text, place))
        write_documents(f'{data}_text/probes/{name}.jsonl.gz', documents[::2])
        write_documents(f'{data}_text/val/{name}.jsonl.gz', documents[1::2])
        # A goal is never trained on, but prepare/folder.py asks for training text.
        training = documents_of(text, f'train/{name}') if name in SOURCES else documents[1::2]
        write_documents(f'{data}_text/train/{name}.jsonl.gz', training)
    run('prepare/folder.py', f'--input={data}_text', f'--out={data}')


def moments(steps):
    """Steps of the measurements: seven, every eighth of a run."""
    return range(steps // 8, steps - steps // 16, steps // 8)


def variants(optimizer):
    """Names of the VARIANTS that can be measured in a run with this optimizer."""
    return [name for name in VARIANTS if optimizer == 'adamw' or 'adam' not in name]


def arm_name(kind, variant):
    return f"{kind}_{variant.replace(', ', '_').replace(' ', '_')}"


def arms_of(mixtures, steps, optimizer):
    """Knobs of all runs: dict arm -> knobs."""
    none = dict.fromkeys(GOAL_NAMES, 0.0)
    arms = {}
    for i, p in enumerate(mixtures):
        shares = {name: round(float(share), 6) for name, share in zip(SOURCES, p, strict=True)}
        arms[f'mix{i:02d}'] = dict(mixture='fixed', sources={**shares, **none})
    for name in SOURCES:
        alone = {other: float(other == name) for other in SOURCES}
        arms[f'only_{name}'] = dict(mixture='fixed', sources={**alone, **none})
    arms['equal'] = dict(mixture='fixed', sources=EQUAL, save_interval=steps // 2, keep_last=0)
    of_sources = dict.fromkeys(SOURCES, 1.0)
    every = dict(mixture_interval=steps // 8, mixture_warmup=steps // 8, sources=EQUAL)
    for variant in variants(optimizer):
        knobs = {**MEASURE, **every, **VARIANTS[variant]}
        arms[arm_name('goals', variant)] = knobs
        if len(VARIANTS[variant]) < 2:
            arms[arm_name('sources', variant)] = {**knobs, 'probe': of_sources}
    for method, interval in (('aioli', steps // 4), ('doge', steps // 8)):
        arms[method] = dict(
            mixture=method, mixture_eta=0.0, mixture_interval=interval, mixture_warmup=0,
            sources=EQUAL)
    return arms


# -- matrices: (targets, sources), nan in rows of targets that a method knows nothing of -----------


def influence_matrix(entries, variant, seed, step):
    """What `mixture='influence'` logged at a step."""
    G = np.full((len(TARGETS), len(SOURCES)), np.nan)
    for kind, domains, last in (('goals', GOAL_NAMES, 'all goals'), ('sources', SOURCES, None)):
        entry = entries.get((arm_name(kind, variant), seed))
        if entry is None:
            continue
        record = next(r for r in entry.records if r['step'] == step)
        for j, source in enumerate(SOURCES):
            for domain in domains:
                value = record.get(f'mixture/influence_{source}_{domain}')
                G[TARGETS.index(domain), j] = np.nan if value is None else value
            if last:
                value = record.get(f'mixture/influence_{source}')
                G[TARGETS.index(last), j] = np.nan if value is None else value
    return G


def like_sources(A):
    """A matrix of the five sources for all targets: goals have the row of the source like them."""
    goals = A[[SOURCES.index(name) for name in GOALS.values()]]
    return np.vstack((A, goals, goals.mean(0)))


def skillit_matrix(entries, seed):
    """The share of a target's loss that training on one source alone takes away."""
    G = np.zeros((len(TARGETS), len(SOURCES)))
    for j, name in enumerate(SOURCES):
        first, last = (losses_of(entries[f'only_{name}', seed], at) for at in (0, -1))
        G[:, j] = (first - last) / first
    return G


def losses_of(entry, at=-1):
    """Losses of all targets at an evaluation of a run: (targets,) float64"""
    records = [r for r in entry.records if f'val/loss_{SOURCES[0]}' in r]
    found = [records[at][f'val/loss_{name}'] for name in TARGETS[:-1]]
    return np.array([*found, np.mean(found[len(SOURCES):])])


def bigram_counts(source):
    """Counts of hashed bigrams of up to 2,000 rows: (65536,) float64"""
    rows = source.rows(range(min(2000, source.n_windows))).astype(np.int64)
    hashed = (rows[:, :-1] * 1_000_003 + rows[:, 1:]) % 2**16
    return np.bincount(hashed.ravel(), minlength=2**16).astype(float)


def overlap_matrix(data):
    counts = [bigram_counts(Source(data, name, 'train', 64, 0, 2048)) for name in SOURCES]
    targets = [
        bigram_counts(open_probe(data, name, 64, 2048, 'window', 'truncate'))
        for name in TARGETS[:-1]]
    targets.append(sum(targets[len(SOURCES):]))
    return np.array([
        [t @ c / np.sqrt((t @ t) * (c @ c)) for c in counts] for t in targets])


def source_norms(checkpoint, data):
    """Mean squared gradient norm of 256 rows of every source, last block: (sources,)"""
    model, _, _ = open_model(checkpoint, torch.device('cpu'), torch.float32)
    found = []
    for name in SOURCES:
        rows = torch.from_numpy(Source(data, name, 'train', 64, 0, 2048).rows(range(256)))
        batch = (rows[:, :-1], rows[:, 1:].long(), None)
        found.append(float(ghost_sqnorm(model, batch, 'last').mean()))
    return np.array(found)


# -- scores ----------------------------------------------------------------------------------------


def residual(values, controls):
    """What is left of the ranks of values (n,) beside those of the controls (n, k)."""
    X = np.column_stack((np.ones(len(values)), *(rankdata(c) for c in controls.T)))
    y = rankdata(values)
    return y - X @ np.linalg.lstsq(X, y, rcond=None)[0]


def correlation(a, b):
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a @ a) * (b @ b))
    return a @ b / size if size > 1e-9 * len(a) else np.nan


def scores_of(foreseen, p, losses):
    """Rank correlations of every target, plain and beside its own share: (2, targets).

    foreseen, losses (n, targets); p (n, sources)
    """
    found = np.full((2, len(TARGETS)), np.nan)
    for t in range(len(TARGETS)):
        if np.isnan(foreseen[:, t]).any():
            continue
        own = OWN[t:t + 1] if t < len(OWN) else list(GOALS.values())
        controls = p[:, [SOURCES.index(name) for name in own]]
        found[0, t] = correlation(rankdata(foreseen[:, t]), rankdata(losses[:, t]))
        found[1, t] = correlation(
            residual(foreseen[:, t], controls), residual(losses[:, t], controls))
    return found


# Columns of the tables: name -> (kind of score, targets).
COLUMNS = {
    'sources': (0, slice(0, 5)), 'goals': (0, slice(5, 8)), 'all goals': (0, slice(8, 9)),
    'sources, beside own share': (1, slice(0, 5)), 'goals, beside own share': (1, slice(5, 8))}


def summary(scores):
    return np.array([scores[kind, at].mean() for kind, at in COLUMNS.values()])


class Judge:
    """Scores what methods foresee. The same draws of mixtures serve all of them."""

    def __init__(self, p, losses):
        self.p, self.losses = p, losses
        rng = np.random.default_rng(0)
        self.draws = [rng.integers(len(p), size=len(p)) for _ in range(400)]

    def __call__(self, forecasts):
        """forecasts: list, one for every seed of the reference, of (n, targets).

        Returns (columns,) means over the seeds, and (draws, columns) of resampled mixtures.
        """
        def mean_score(at):
            found = [scores_of(f[at], self.p[at], self.losses[at]) for f in forecasts]
            # Without the measurements that were lost in noise, unless all were.
            n = (~np.isnan(found)).sum(0)
            return summary(np.where(n > 0, np.nansum(found, 0) / np.maximum(n, 1), np.nan))

        return mean_score(np.arange(len(self.p))), np.array([mean_score(at) for at in self.draws])

    def row(self, name, forecasts, base=None):
        """Prints a row. base: what __call__ has for the method that the last column compares."""
        value, draws = found = self(forecasts)
        cells = []
        for i in range(len(COLUMNS)):
            if np.isnan(value[i]):
                cells.append('')
                continue
            # A method may order a few draws as the own share does, with nothing beside it.
            low, high = np.nanquantile(draws[:, i], (0.025, 0.975))
            text = f'{value[i]:+.2f} ({low:+.2f} to {high:+.2f})'
            cells.append(text)
        against = ''
        if base is not None and not np.isnan(value[1]):
            change = draws[:, 1] - base[1][:, 1]
            low, high = np.nanquantile(change, (0.025, 0.975))
            against = f'{value[1] - base[0][1]:+.2f} ({low:+.2f} to {high:+.2f})'
        print_row(name, *cells, against)
        return found


def law_forecast(p, losses):
    """-G p of the law's gradient at equal shares, where the law never saw the mixture itself."""
    forecast = np.zeros(losses.shape)
    fold = np.arange(len(p)) % 5
    equal = np.full(p.shape[1], 1 / p.shape[1])
    for k in range(5):
        for t in range(losses.shape[1]):
            law = fit_law(p[fold != k], losses[fold != k, t])
            slope = np.append(law.s, 0.0) * (law(equal) - law.c)
            forecast[fold == k, t] = law(equal) + (p[fold == k] - equal) @ slope
    return forecast


def report(p, by_seed, entries, data, seeds, steps, optimizer):
    """Prints the tables. by_seed: losses (seeds, n, targets)"""
    losses = by_seed.mean(0)
    judge = Judge(p, losses)
    header = [*COLUMNS, f'goals, against {DEFAULT}']

    def of(matrices):
        return [-(p @ G.T) for G in matrices]

    def influence(variant, step):
        return of([influence_matrix(entries, variant, seed, step) for seed in seeds])

    def of_mean(variant):
        matrices = []
        for seed in seeds:
            found = np.array([
                influence_matrix(entries, variant, seed, step) for step in moments(steps)])
            # Moments whose measurement was lost in noise have no part in the mean.
            n = (~np.isnan(found)).sum(0)
            matrices.append(np.where(n > 0, np.nansum(found, 0) / np.maximum(n, 1), np.nan))
        return of(matrices)

    middle = steps // 2
    tell(f'\nBy method; influence at step {middle}')
    print_header('method', *header)
    base = judge(influence(DEFAULT, middle))
    judge.row(f'influence, {DEFAULT}', influence(DEFAULT, middle))
    judge.row(f'influence, {DEFAULT}, mean of all moments', of_mean(DEFAULT), base)
    for method in ('aioli', 'doge'):
        matrices = []
        for seed in seeds:
            entry = entries[method, seed]
            entry.method = method
            matrices.append(like_sources(measured_matrix(entry, SOURCES)))
        judge.row(method, of(matrices), base)
    judge.row('skillit', of([skillit_matrix(entries, seed) for seed in seeds]), base)
    judge.row('law', [law_forecast(p, losses)], base)
    judge.row('overlap', of([overlap_matrix(data)]), base)
    same = np.ones((len(TARGETS), 1))
    checkpoints = [
        os.path.join(entries['equal', seed].folder, 'ckpt', f'step_{middle:06d}')
        for seed in seeds]
    judge.row('gradient norm', of([same * source_norms(c, data) for c in checkpoints]), base)
    ends = [losses_of(entries['equal', seed])[:len(SOURCES)] for seed in seeds]
    judge.row('loss', of([same * end for end in ends]), base)
    judge.row('own share', of([like_sources(np.eye(len(SOURCES)))]), base)
    rng = np.random.default_rng(1)
    judge.row('random', of(rng.normal(size=(200, len(TARGETS), len(SOURCES)))[:20]), base)
    noise = scores_of(by_seed[1], p, by_seed[0])
    print_row('the other seed of the same mixture', *(f'{v:+.2f}' for v in summary(noise)), '')

    tell(f'\nBy moment, {DEFAULT}')
    print_header('step', *header)
    for step in moments(steps):
        judge.row(step, influence(DEFAULT, step), base)
    tell('\nBy variant, mean score of all moments')
    print_header('variant', *header)
    for variant in variants(optimizer):
        forecasts = []
        for step in moments(steps):
            forecasts += influence(variant, step)
        judge.row(variant, forecasts, base)
    tell('\nBy variant, score of the mean of all moments')
    print_header('variant', *header)
    for variant in variants(optimizer):
        judge.row(variant, of_mean(variant), base)


if __name__ == '__main__':
    configure(globals(), verbose=False)
    if not os.path.isdir(text):
        raise BadInput(f"--text='{text}' is no folder. It holds train/, val/ and probes/.")
    text, out = os.path.abspath(text), os.path.abspath(out)
    data = os.path.join(out, 'data')
    prepare(text, data)
    p = dirichlet_mixtures(n, len(SOURCES))
    folder = os.path.join(out, optimizer)
    knobs = dict(data_dir=data, max_steps=steps)
    if optimizer == 'adamw':
        knobs |= dict(optimizer='adamw', learning_rate=3e-3)
    common = write_config(os.path.join(folder, 'common.py'), knobs)
    arms = arms_of(p, steps, optimizer)
    train_arms(folder, arms, seeds, jobs, 'config/study/base.py', common)
    entries = read_arms(folder, arms, seeds)
    by_seed = np.array([
        [losses_of(entries[f'mix{i:02d}', seed]) for i in range(n)] for seed in seeds])
    report(p, by_seed, entries, data, seeds, steps, optimizer)
    write_summary(folder)
