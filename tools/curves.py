"""Loss curves of many runs in one table: which architecture is best for its size, and why.

`python tools/sweep.py collect FOLDER` calls `collect`. It reads runs of train.py, files
trainer_state.json of Hugging Face, and tables of curves (.csv, .json).

All runs are compared at the same step, tokens or FLOPs, never each at its own end. Runs that did
not get that far are left out, and the table says how many they are.
"""
import csv
import glob
import io
import json
import os
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from configurator import BadInput, check_type, pick, read_json, read_source
from model import ModelConfig, count_parameters
from tools.plots import draw_curves
from tools.runs import read_run, token_flops

# A name has the numbers of a shape in this order: 10_22_160_240.
SHAPE = ('n_head', 'n_layer', 'n_embd', 'ffn_dim')
UNITS = ('step', 'tokens', 'flops')


@dataclass
class Curve:
    """The loss of one run over its course."""
    name: str
    source: str                     # file or folder that it was read from
    shape: tuple                    # the values of SHAPE
    params: int                     # parameters of the model, embeddings included
    loss: np.ndarray                # (points,) nats per token, finite
    x: dict                         # unit -> (points,) where the losses were taken. None: unknown
    seed: int = 0
    tokenizer: str | None = None
    n_left_out: int = 0             # points whose loss or gradient norm was not finite

    @property
    def label(self):
        """The name without its seed."""
        return re.sub(r'_seed\d+$', '', self.name)

    @property
    def deep(self):
        """Whether the model has many layers for its heads: `high_layers` of the published sweep."""
        n_head, n_layer = self.shape[:2]
        return n_head > 4 and n_layer >= n_head + (8 if n_head <= 10 else 10)

    @property
    def compressed(self):
        """Whether the feed-forward layers are no wider than the residual stream."""
        return self.shape[3] <= self.shape[2]


# -- reading ---------------------------------------------------------------------------------------


def shape_of(name, source):
    """The four numbers in a name. source: named in the error if there are none."""
    found = re.search(r'(?<!\d)(\d+)_(\d+)_(\d+)_(\d+)(?!\d)', name)
    if found is None:
        form = '_'.join(SHAPE)
        raise BadInput(f"{source}: '{name}' does not name a shape as {form}: 10_22_160_240.")
    shape = tuple(int(n) for n in found.groups())
    if 0 in shape:
        raise BadInput(f"{source}: '{name}' names a shape with a 0 in it.")
    return shape


def as_number(value, name, where):
    """A number from a file: float, nan for None. Raises BadInput for anything else."""
    if value is None:
        return np.nan
    try:
        return check_type(value, 'float', None)
    except TypeError as error:
        raise BadInput(f'{where}: {name} {error}.') from None


def make_curve(name, source, shape, params, points, seed=0, tokenizer=None):
    """A Curve from its points: dicts with loss, step and perhaps tokens, flops and grad_norm.

    The points may have any order. The last one of a step counts, as a run that was resumed logs
    steps again. A point whose loss or gradient norm is not finite is left out: that of a diverged
    run. Raises BadInput for what is no number, and for a step or a loss below 0.
    """
    where = f"{source}: run '{name}'"
    by_step = {}            # step -> point
    for point in points:
        point = {key: as_number(value, key, where) for key, value in point.items()}
        if not 0 <= point['step'] < np.inf or point['loss'] < 0:
            raise BadInput(
                f'{where} has the loss {point["loss"]} at step {point["step"]}, which cannot be.')
        by_step[point['step']] = point
    kept = []
    for step in sorted(by_step):
        point = by_step[step]
        if np.isfinite(point['loss']) and np.isfinite(point.get('grad_norm', 0.0)):
            kept.append(point)
    x = {}
    for unit in UNITS:
        values = np.array([point.get(unit, np.nan) for point in kept], dtype=np.float64)
        x[unit] = values if np.isfinite(values).all() else None
    loss = np.array([point['loss'] for point in kept], dtype=np.float64)
    n_left_out = len(by_step) - len(kept)
    return Curve(name, source, shape, params, loss, x, seed, tokenizer, n_left_out)


def read_train_run(folder, loss):
    """The Curve of a run of train.py. loss: val (its evaluations) or train (every logged step)."""
    run = read_run(folder)
    config = run.config
    flops_per_step = token_flops(config) * config['total_batch_tokens']
    points = []
    for record in run.records:
        # A training loss is logged at the index of its step, an evaluation at the steps done. The
        # evaluation before training is left out.
        step = record['step'] + 1 if loss == 'train' else record['step']
        if f'{loss}/loss' in record and step > 0:
            tokens = step * config['total_batch_tokens']
            point = dict(step=step, loss=record[f'{loss}/loss'], tokens=tokens)
            point['flops'] = step * flops_per_step
            if loss == 'train' and 'train/grad_norm' in record:
                point['grad_norm'] = record['train/grad_norm']
            points.append(point)
    shape = tuple(config[name] for name in SHAPE)
    params = count_parameters(pick(ModelConfig, config))['total']
    return make_curve(run.name, folder, shape, params, points, run.seed, run.tokenizer)


def read_trainer_states(folder, paths, loss):
    """Curves from trainer_state.json files of Hugging Face. The name of their folder is the shape.

    ablation_params.tsv in `folder` has the parameters of every shape, as `sweep.py arch` writes it.
    """
    counts_path = os.path.join(folder, 'ablation_params.tsv')
    counts = read_counts(counts_path) if os.path.isfile(counts_path) else {}
    # A run may have a state in every checkpoint. The latest one holds the full history.
    latest = {}             # name of the run -> (path, state)
    for path in paths:
        state = read_state(path)
        run_folder = os.path.dirname(path)
        if re.fullmatch(r'checkpoint-\d+', os.path.basename(run_folder)):
            run_folder = os.path.dirname(run_folder)
        name = os.path.basename(run_folder)
        if name not in latest or state['global_step'] > latest[name][1]['global_step']:
            latest[name] = (path, state)
    key = dict(val='eval_loss', train='loss')[loss]
    curves = []
    for name, (path, state) in latest.items():
        shape = shape_of(name, path)
        if shape not in counts:
            raise BadInput(
                f'{counts_path} does not say how many parameters {name} has. It needs five columns '
                f'separated by tabs: {", ".join(SHAPE)}, parameters.')
        points = []
        for entry in state['log_history']:
            if key in entry:
                point = dict(step=entry['step'], loss=entry[key])
                # 0 means that the Trainer did not count tokens.
                point['tokens'] = entry.get('num_input_tokens_seen') or None
                if 'grad_norm' in entry:
                    point['grad_norm'] = entry['grad_norm']
                if state.get('total_flos'):
                    point['flops'] = entry['step'] / state['global_step'] * state['total_flos']
                points.append(point)
        curves.append(make_curve(name, path, shape, counts[shape], points))
    return curves


def read_counts(path):
    """The parameters of every shape in an ablation_params.tsv: dict shape -> int."""
    counts = {}
    for i, line in enumerate(read_source(path).splitlines(), 1):
        try:
            *shape, params = (int(cell) for cell in line.split('\t'))
        except ValueError:
            shape = []
        if len(shape) != len(SHAPE) or params < 1:
            raise BadInput(
                f'{path}:{i} must be five whole numbers separated by tabs: {", ".join(SHAPE)}, '
                'parameters.')
        counts[tuple(shape)] = params
    return counts


def read_state(path):
    """A trainer_state.json. Raises BadInput if it is damaged or has another form."""
    state = read_json(path)
    try:
        step = check_type(state['global_step'], 'int', None)
        check_type(state.get('total_flos'), 'float | None', None)
        for entry in state['log_history']:
            entry.get('loss')
            check_type(entry['step'], 'int', None)
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f'{path} is no trainer_state.json of Hugging Face ({type(error).__name__}: {error}). '
            'It needs global_step and log_history, a list of entries with a step.') from None
    if step < 1 and state['log_history']:
        raise BadInput(f'{path}: global_step = {step} must be at least 1.')
    return state


def number_in(row, name, where):
    """A number in a cell of a CSV: float, None for an empty cell. Raises BadInput."""
    text = row.get(name)
    if text in (None, ''):
        return None
    try:
        return float(text)
    except ValueError:
        raise BadInput(f"{where}: {name} is '{text}', which is no number.") from None


def read_csv(path):
    """Curves from a table with the columns step, loss, params, config, as `write_csv` makes it.

    The columns seed, tokens and flops are optional. Raises BadInput for a table of another form.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(read_source(path), newline='')))
    except csv.Error as error:
        raise BadInput(f'{path} is no table ({error}). Restore it.') from None
    missing = {'step', 'loss', 'params', 'config'} - set(rows[0] if rows else ())
    if missing:
        raise BadInput(
            f"{path} has no column {', '.join(sorted(missing))}. The first line of a table of "
            'curves names step, loss, params and config.')
    by_run = {}             # (name, seed) -> (parameters, points)
    for i, row in enumerate(rows, 2):
        where = f'{path}:{i}'
        numbers = {key: number_in(row, key, where) for key in ('params', 'seed', 'loss', *UNITS)}
        params = numbers.pop('params') or 0
        seed = numbers.pop('seed') or 0
        is_right = 1 <= params < 1e18 and abs(seed) < 1e18
        if not (row['config'] and is_right) or numbers['step'] is None:
            raise BadInput(f'{where} needs a config, a step, and params and seed as whole numbers.')
        key = (row['config'], int(seed))
        by_run.setdefault(key, (int(params), []))[1].append(numbers)
    curves = []
    for (name, seed), (params, points) in by_run.items():
        curves.append(make_curve(name, path, shape_of(name, path), params, points, seed))
    return curves


def read_compact(path, loss):
    """Curves from JSON: {"meta": {"first_step", "step_stride"}, "runs": {shape: {"params", ...}}}.

    A run has "train_loss" and "eval_loss", lists of one loss per stride.
    """
    found = read_json(path)
    key = dict(val='eval_loss', train='train_loss')[loss]
    curves = []
    try:
        first = check_type(found['meta']['first_step'], 'int', None)
        stride = check_type(found['meta']['step_stride'], 'int', None)
        for name, run in found['runs'].items():
            # A run without parameters or without this loss has no place in a band.
            if run['params'] is not None and run[key]:
                params = check_type(run['params'], 'int', None)
                points = [dict(step=first + stride * i, loss=y) for i, y in enumerate(run[key])]
                curves.append(make_curve(name, path, shape_of(name, path), params, points))
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f'{path} is no table of curves ({type(error).__name__}: {error}).') from None
    return curves


def read_curves(path, loss):
    """All curves of a file or a folder. loss: val or train.

    Raises BadInput if there are none, or if the runs have different tokenizers.
    """
    if not os.path.exists(path):
        raise BadInput(
            f"'{path}' does not exist. Name a folder of runs or of trainer_state.json files, or a "
            'table, .csv or .json.')
    # Sweeps have runs at any depth, for example in parents/ and children/.
    below = os.path.join(glob.escape(path), '**')
    metrics = sorted(glob.glob(os.path.join(below, 'metrics.jsonl'), recursive=True))
    states = sorted(glob.glob(os.path.join(below, '*trainer_state.json'), recursive=True))
    compact = os.path.join(path, 'loss_curves.json')
    if path.endswith('.csv'):
        curves = read_csv(path)
    elif os.path.isfile(path):
        curves = read_compact(path, loss)
    elif metrics:
        curves = [read_train_run(os.path.dirname(p), loss) for p in metrics]
    elif states:
        curves = read_trainer_states(path, states, loss)
    elif os.path.isfile(compact):
        curves = read_compact(compact, loss)
    else:
        raise BadInput(f"'{path}' has neither a metrics.jsonl nor a trainer_state.json in it.")
    report_left_out(curves)
    # A sweep may be collected while it trains, when some runs have no loss of this kind yet.
    n_runs = len(curves)
    curves = [curve for curve in curves if len(curve.loss)]
    if not curves:
        raise BadInput(f"no run in '{path}' has a {loss} loss yet.")
    if len(curves) < n_runs:
        print(f'left out: {n_runs - len(curves)} runs without a {loss} loss')
    tokenizers = {curve.tokenizer: curve.name for curve in curves if curve.tokenizer}
    if len(tokenizers) > 1:
        a, b = list(tokenizers.values())[:2]
        raise BadInput(
            f"runs '{a}' and '{b}' have different tokenizers: their losses are not comparable. "
            'Collect them separately.')
    return curves


def report_left_out(curves):
    """Prints how many points of diverged runs were left out."""
    diverged = [curve for curve in curves if curve.n_left_out]
    if diverged:
        names = ', '.join(curve.name for curve in diverged[:5])
        names += ', ...' if len(diverged) > 5 else ''
        n_points = sum(curve.n_left_out for curve in diverged)
        print(
            f'left out: {n_points:,} points of {len(diverged)} runs, because their loss or '
            f'gradient norm is not finite ({names})')


# -- picks -----------------------------------------------------------------------------------------


class Mean(NamedTuple):
    """The loss of one architecture at one point, over its seeds."""
    label: str
    curve: Curve                # of one seed, for its shape and size
    loss: float                 # mean, nats per token
    seeds: int
    sd: float | None            # standard deviation over the seeds. None: one seed


def loss_at(curve, unit, at):
    """The loss at a point, linear between two neighbours. nan if the curve does not reach it."""
    x = curve.x[unit]
    if x is None:
        raise BadInput(f"'{curve.name}' ({curve.source}) does not say its {unit}. Compare by step.")
    # The tolerance is for FLOPs, whose products differ in the last bits.
    if not len(x) or x[0] > at * (1 + 1e-9) or at > x[-1] * (1 + 1e-9):
        return np.nan
    return float(np.interp(at, x, curve.loss))


def common_point(curves, unit):
    """The last point that at least half of the runs have reached."""
    reached = [curve.x[unit] for curve in curves]
    ends = sorted((float(x[-1]) for x in reached if x is not None and len(x)), reverse=True)
    if not ends:
        raise BadInput(f'none of these runs says its {unit}. Compare by step.')
    # Half of the runs and not all: one run that stopped early must not decide for the others.
    return ends[(len(ends) + 1) // 2 - 1]


def by_label(curves, unit, at):
    """The architectures that reached a point: list of Mean over their seeds, lowest first."""
    found = {}
    for curve in curves:
        y = loss_at(curve, unit, at)
        if np.isfinite(y):
            found.setdefault((curve.label, curve.params), []).append((curve, y))
    # Runs of one name may have different vocabularies, hence parameters. Those are kept apart.
    means = []
    for (label, _), runs in found.items():
        losses = [y for _, y in runs]
        sd = float(np.std(losses, ddof=1)) if len(runs) > 1 else None
        means.append(Mean(label, runs[0][0], float(np.mean(losses)), len(runs), sd))
    return sorted(means, key=lambda mean: mean.loss)


def pick_architectures(curves, band, unit, at):
    """The table of a band of sizes at one point (None: the last that half of its runs reached).

    band    (low, high) parameters
    Returns plain data. `lowest` is the architecture of the lowest loss. `pick` is the lowest of
    those that are deep and not compressed, the rule that gives the published picks.
    """
    low, high = band
    inside = [curve for curve in curves if low <= curve.params <= high]
    if not inside:
        raise BadInput(f'no run has {low:,.0f} to {high:,.0f} parameters.')
    at = common_point(inside, unit) if at is None else at
    means = by_label(inside, unit, at)
    if not means:
        raise BadInput(
            f'none of the {len(inside)} runs of {low:,.0f} to {high:,.0f} parameters came to '
            f'{unit} {at:,.0f}. The last that half of them reached: '
            f'{common_point(inside, unit):,.0f}.')
    # A rank beside the pick tells how much the rule gives up against the lowest loss.
    table = dict(
        low=low, high=high, unit=unit, at=at, n_band=len({curve.label for curve in inside}),
        n_reached=len(means), lowest=means[0].label, lowest_loss=means[0].loss, pick=None,
        pick_loss=None, pick_rank=None, next_loss=means[1].loss if len(means) > 1 else None,
        rows=[])
    for rank, mean in enumerate(means, 1):
        curve = mean.curve
        table['rows'].append(dict(
            shape=mean.label, params=curve.params, loss=mean.loss, seeds=mean.seeds, sd=mean.sd,
            deep=curve.deep, compressed=curve.compressed))
        if table['pick'] is None and curve.deep and not curve.compressed:
            table.update(pick=mean.label, pick_loss=mean.loss, pick_rank=rank)
    return table


# -- what matters ----------------------------------------------------------------------------------


def least_squares(X, y):
    """Ordinary least squares. X (n, d), y (n,).

    Returns coefficients (d,), their standard errors (d,), residuals (n,) and R2. The coefficients
    are None if the columns are not linearly independent.
    """
    # Columns of a similar size keep the rank decision independent of units.
    scale = np.abs(X).max(0)
    b, _, rank, _ = np.linalg.lstsq(X / scale, y, rcond=1e-8)
    b = b / scale
    r = y - X @ b
    freedom = max(len(y) - rank, 1)
    # pinv also works for dependent columns, where callers still need the residuals and R2.
    variance = np.maximum(np.diag(np.linalg.pinv(X.T @ X)), 0) * (r @ r) / freedom
    r2 = 1 - (r @ r) / ((y - y.mean()) @ (y - y.mean()))
    return b if rank == X.shape[1] else None, np.sqrt(variance), r, r2


def group_means(left, shape, deep):
    """Means of what size leaves unexplained, by inner width and by depth: name -> n, mean, se.

    left (n,) nats, shape (n, 4), deep (n,) bool
    """
    ratio = shape[:, 3] / shape[:, 2]
    # Widths are whole numbers, so shapes of the same design differ slightly in their ratio.
    rounded = np.round(ratio, 2)
    groups = {}
    for value, count in zip(*np.unique(rounded, return_counts=True), strict=True):
        # Fewer than three shapes give no usable standard error.
        if count >= 3:
            groups[f'ffn_dim / n_embd = {value:g}'] = rounded == value
    groups['compressed (ffn_dim <= n_embd)'] = ratio <= 1
    groups['not compressed'] = ratio > 1
    groups['deep for the heads'] = deep
    groups['not deep'] = ~deep
    found = {}
    for name, keep in groups.items():
        n = int(keep.sum())
        mean = float(left[keep].mean()) if n else None
        se = float(left[keep].std(ddof=1) / n**0.5) if n > 1 else None
        found[name] = dict(n=n, mean=mean, se=se)
    return found


def effects(curves, unit, at, least=0):
    """Loss at one point against size and shape, over the models of at least `least` parameters.

    Returns None if fewer than 12 shapes reached the point, else plain data:
    spearman        rank correlation of loss and parameters
    r2_size         R2 of a quadratic in log parameters
    groups          means of its residuals (`group_means`)
    slopes          nats per doubling of depth, heads and relative inner width at equal parameters,
                    in one regression with 95 % intervals. None if the shapes do not separate them,
                    for example when the width follows from the heads
    """
    rows = by_label([curve for curve in curves if curve.params >= least], unit, at)
    # The regression below has up to six coefficients.
    if len(rows) < 12:
        return None
    y = np.array([row.loss for row in rows])
    params = np.array([row.curve.params for row in rows], dtype=np.float64)
    shape = np.array([row.curve.shape for row in rows], dtype=np.float64)       # (n, 4)
    deep = np.array([row.curve.deep for row in rows])
    # Centred, because powers of log parameters themselves are almost collinear.
    log_size = np.log(params) - np.log(params).mean()
    size = np.column_stack((np.ones(len(y)), log_size, log_size ** 2))
    _, _, left, r2 = least_squares(size, y)

    names = ['doubling n_layer', 'doubling n_head', 'doubling ffn_dim / n_embd']
    # In log2, a coefficient is the effect of a doubling.
    doublings = np.log2(np.column_stack((shape[:, 1], shape[:, 0], shape[:, 3] / shape[:, 2])))
    # A dimension in which all shapes agree has no slope.
    moving = [i for i in range(3) if np.ptp(doublings[:, i]) > 0]
    b, se, _, r2_all = least_squares(np.column_stack((size, doublings[:, moving])), y)
    q = stats.t.ppf(0.975, max(len(y) - 3 - len(moving), 1))
    slopes = None
    if b is not None:
        slopes = {}
        for k, i in enumerate(moving, start=3):
            slopes[names[i]] = dict(
                nats=float(b[k]), low=float(b[k] - q * se[k]), high=float(b[k] + q * se[k]))
    return dict(
        unit=unit, at=at, n=len(y), least=least,
        spearman=float(stats.spearmanr(params, y).statistic), r2_size=float(r2),
        r2_with_shape=float(r2_all), groups=group_means(left, shape, deep), slopes=slopes)


# -- the report ------------------------------------------------------------------------------------


def parse_band(text):
    """A band of sizes as (low, high): '3e6-5e6', '3M-5M', or '5M' for 10 % to either side."""
    number = r'(\d+(?:\.\d+)?(?:e\d{1,2})?)([kKMB]?)'
    found = re.fullmatch(f'{number}(?:-{number})?', str(text))
    if found is None:
        raise BadInput(
            f"bands: '{text}' must be such as 5M (10 % to either side), 3M-5M or 3e6-5e6.")
    scale = {'': 1, 'k': 1e3, 'K': 1e3, 'M': 1e6, 'B': 1e9}
    first = float(found[1]) * scale[found[2]]
    if found[3]:
        return first, float(found[3]) * scale[found[4]]
    return 0.9 * first, 1.1 * first


def doubling_bands(curves):
    """Names of bands from the smallest model on, each up to twice as many parameters."""
    # Bands without a model are left out.
    low = min(curve.params for curve in curves)
    bands = []
    while low <= max(curve.params for curve in curves):
        if any(low <= curve.params <= 2 * low for curve in curves):
            bands.append(f'{low / 1e6:g}M-{2 * low / 1e6:g}M')
        # The bounds are inclusive. The 1 keeps a model of exactly twice the size in one band.
        low = 2 * low + 1
    return bands


def write_csv(path, curves):
    with open(path, 'w', encoding='utf-8', newline='') as f:
        table = csv.writer(f)
        table.writerow(['config', *SHAPE, 'params', 'seed', *UNITS, 'loss'])
        for curve in curves:
            for i, loss in enumerate(curve.loss):
                xs = ['' if curve.x[u] is None else f'{curve.x[u][i]:.0f}' for u in UNITS]
                table.writerow([curve.name, *curve.shape, curve.params, curve.seed, *xs, loss])


def or_na(value, form):
    """A formatted number, or 'n/a' for None."""
    return 'n/a' if value is None else format(value, form)


def print_picks(picks, unit):
    print(
        f'\n{"band":<16}{unit:>14}{"there":>7}{"of":>6}   {"lowest loss of all":<30}{"next":>8}   '
        'deep (n_layer >= n_head + 8, from 12 heads on + 10), not compressed')
    for name, p in picks.items():
        chosen = 'none'
        if p['pick']:
            chosen = f'{p["pick"]} {p["pick_loss"]:.4f}, rank {p["pick_rank"]}'
        lowest = f'{p["lowest"]} {p["lowest_loss"]:.4f}'
        print(
            f'{name:<16}{p["at"]:>14,.0f}{p["n_reached"]:>7}{p["n_band"]:>6}   {lowest:<30}'
            f'{or_na(p["next_loss"], ".4f"):>8}   {chosen}')
    print(f'\n{"band":<16}{"lowest losses":<22}{"parameters":>12}{"loss":>9}{"sd":>9}  seeds')
    for name, p in picks.items():
        for r in p['rows'][:6]:
            print(
                f'{name:<16}{r["shape"]:<22}{r["params"]:>12,}{r["loss"]:>9.4f}'
                f'{or_na(r["sd"], ".4f"):>9}{r["seeds"]:>7}')


def print_effects(found):
    if found is None:
        print(
            '\nFewer than 12 shapes reached this point, too few for the effects of depth, heads '
            'and inner width.')
        return
    print(
        f'\n{found["n"]} shapes of {found["least"]:,.0f} parameters or more at {found["unit"]} '
        f'{found["at"]:,.0f}: rank correlation of loss and parameters {found["spearman"]:.4f}. '
        f'A quadratic in log parameters explains {found["r2_size"]:.2%} of the variance, and '
        f'{found["r2_with_shape"]:.2%} together with depth, heads and inner width.')
    title = 'difference from the quadratic (nats; below 0: better than its size)'
    print(f'{title:<70}{"shapes":>8}{"mean":>10}{"se":>9}')
    for name, g in found['groups'].items():
        if g['n']:
            print(f'{name:<70}{g["n"]:>8}{g["mean"]:>+10.4f}{or_na(g["se"], ".4f"):>9}')
    if found['slopes'] is None:
        print(
            'The shapes do not separate the effects of depth, heads and inner width: one follows '
            'from the others and the size.')
        return
    slopes = []
    for name, s in found['slopes'].items():
        slopes.append(f'{name} {s["nats"]:+.4f} ({s["low"]:+.4f} to {s["high"]:+.4f})')
    print('at equal parameters, in one regression (nats, 95 %):', '; '.join(slopes))


def collect(path, out, bands, unit, at, loss, least):
    """Prints the tables and writes curves.csv, collect.json and figures to the folder `out`.

    path    a folder or a file (`read_curves`)
    bands   dict band -> point to compare at (None: `at`). {}: doublings of the smallest model
    unit    what is equal when runs are compared: step | tokens | flops
    at      point in that unit. None: the last that half of the runs reached
    loss    val | train
    least   parameters that a model must have to count for the effects of shape
    Returns what collect.json holds.
    """
    for name, point in bands.items():
        parse_band(name)
        if point is not None and (not isinstance(point, (int, float)) or point <= 0):
            raise BadInput(f"bands: the point of '{name}' must be a number above 0, got {point!r}.")
    curves = read_curves(path, loss)
    os.makedirs(out, exist_ok=True)
    write_csv(os.path.join(out, 'curves.csv'), curves)
    sizes = [curve.params for curve in curves]
    n_shapes = len({(curve.shape, curve.params) for curve in curves})
    print(
        f'{len(curves)} runs of {n_shapes} shapes, {min(sizes):,} to {max(sizes):,} parameters; '
        f'{loss} loss. Compared at the same {unit}; runs that did not get that far are left out.')
    picks = {}
    for name, point in (bands or dict.fromkeys(doubling_bands(curves))).items():
        picks[name] = pick_architectures(
            curves, parse_band(name), unit, at if point is None else point)
    print_picks(picks, unit)
    # The effects compare all sizes, so unlike the bands they need one common point.
    everywhere = common_point(curves, unit) if at is None else at
    found = effects(curves, unit, everywhere, least)
    print_effects(found)
    rows = by_label(curves, unit, everywhere)
    figures = draw_curves(out, rows, curves, picks, unit, everywhere)
    result = dict(path=path, loss=loss, picks=picks, effects=found)
    json_path = os.path.join(out, 'collect.json')
    with open(json_path, 'w', encoding='utf-8') as f:
        json.dump(result, f, indent=1)
    print('\nwritten:', ', '.join([os.path.join(out, 'curves.csv'), json_path, *figures]))
    return result
