"""Loss curves of many runs in one table: which architecture is best at equal steps, tokens or FLOPs, and what depth, heads and narrow inner widths do.

`python tools/sweep.py collect` calls this. It reads runs of train.py, trainer_state.json files of Hugging Face, and tables that somebody else made. Runs
are compared at the same point of their schedule, never each at its own end: those that had not come so far take no part, and their number is told.
"""
import csv
import glob
import json
import os
import re
from dataclasses import dataclass, field, fields

import numpy as np
from scipy import stats

from configurator import BadInput
from lib.device import read_metrics
from model import ModelConfig, count_parameters, flops_per_token
from tools.runs import tokenizer_of

SHAPE = ('n_head', 'n_layer', 'n_embd', 'ffn_dim')      # in a name: 10_22_160_240
UNITS = ('step', 'tokens', 'flops')


@dataclass
class Curve:
    """One run. A point is at x['step'][i] steps (x['tokens'], x['flops']: None when not known)."""
    name: str
    shape: tuple                         # as SHAPE
    params: int
    loss: np.ndarray                     # nats per token; what is not finite is left out
    x: dict
    seed: int = 0
    tokenizer: str | None = None
    source: str = ''                     # where it was read
    last: float = field(default=0.0)     # step of its last record

    @property
    def label(self):
        """The name without its seed."""
        return re.sub(r'_seed\d+$', '', self.name)

    @property
    def deep(self):
        """The published sweep's `high_layers`: many layers for so few heads."""
        n_head, n_layer = self.shape[:2]
        return n_head > 4 and n_layer >= n_head + (8 if n_head <= 10 else 10)

    @property
    def compressed(self):
        return self.shape[3] <= self.shape[2]


# -- reading -----------------------------------------------------------------------------------------------------------

def shape_of(text, where):
    found = re.search(r'(?<!\d)(\d+)_(\d+)_(\d+)_(\d+)(?!\d)', text)
    if found is None:
        raise BadInput(f"{where}: '{text}' does not name a shape as n_head_n_layer_n_embd_ffn_dim, such as 10_22_160_240.")
    return tuple(int(n) for n in found.groups())


def read_run(folder, loss):
    """A run of train.py. loss: val (at its evaluations) or train (as logged)."""
    with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
        config = json.load(f)
    records, key = read_metrics(folder), f'{loss}/loss'
    points = [(r['step'] + (loss == 'train'), r[key]) for r in records if r.get(key) is not None and (r['step'] > 0 or loss == 'train')]
    model = ModelConfig(**{f.name: config[f.name] for f in fields(ModelConfig)})
    steps = np.array([step for step, _ in points], dtype=np.float64)
    tokens = steps * config['total_batch_tokens']
    return Curve(os.path.basename(os.path.normpath(folder)), tuple(config[k] for k in SHAPE), count_parameters(model)['total'],
                 np.array([y for _, y in points], dtype=np.float64), dict(step=steps, tokens=tokens, flops=tokens * flops_per_token(model, config['block_size'])),
                 config['seed'], tokenizer_of(folder), folder, records[-1]['step'] if records else 0)


def read_trainer_state(path, loss, params):
    """A trainer_state.json; its shape is in the name of its folder (that of a run of several checkpoints: the one above), params: shape -> parameters."""
    with open(path, encoding='utf-8') as f:
        state = json.load(f)
    folder = os.path.dirname(path)
    name = os.path.basename(os.path.dirname(folder) if re.fullmatch(r'checkpoint-\d+', os.path.basename(folder)) else folder)
    shape, key = shape_of(name, path), dict(val='eval_loss', train='loss')[loss]
    if shape not in params:
        raise BadInput(f'{path}: ablation_params.tsv does not say how many parameters {name} has. It stands in the folder that is collected: five columns, '
                       'n_head, n_layer, n_embd, ffn_dim and parameters, separated by tabs.')
    points = [entry for entry in state['log_history'] if entry.get(key) is not None]
    steps = np.array([entry['step'] for entry in points], dtype=np.float64)
    tokens = np.array([entry.get('num_input_tokens_seen') or np.nan for entry in points], dtype=np.float64)
    flops = steps / state['global_step'] * state['total_flos'] if state.get('total_flos') else None
    return Curve(name, shape, params[shape], np.array([entry[key] for entry in points], dtype=np.float64),
                 dict(step=steps, tokens=tokens if np.isfinite(tokens).all() and len(tokens) else None, flops=flops), source=path, last=state['global_step'])


def read_csv(path):
    """A table with the columns step, loss, params, config (as this file writes it, with or without the rest)."""
    with open(path, encoding='utf-8', newline='') as f:
        rows = list(csv.DictReader(f))
    missing = {'step', 'loss', 'params', 'config'} - set(rows[0] if rows else ())
    if missing:
        raise BadInput(f"{path} has no column {', '.join(sorted(missing))}. A table of curves has step, loss, params and config in its first line.")
    by_run = {}
    for row in rows:                                           # a step that stands there twice counts once
        by_run.setdefault((row['config'], row.get('seed') or 0), {})[float(row['step'])] = row
    curves = []
    for (name, seed), points in by_run.items():
        points = [points[step] for step in sorted(points)]
        more = {unit: np.array([float(row[unit]) for row in points]) if points[0].get(unit) else None for unit in ('tokens', 'flops')}
        curves.append(Curve(name, shape_of(name, path), int(points[0]['params']), np.array([float(row['loss']) for row in points]),
                            dict(step=np.array([float(row['step']) for row in points]), **more), int(seed), source=path, last=float(points[-1]['step'])))
    return curves


def read_compact(path, loss):
    """JSON: {"meta": {"first_step", "step_stride"}, "runs": {shape: {"params", "train_loss": [...], "eval_loss": [...]}}}."""
    with open(path, encoding='utf-8') as f:
        found = json.load(f)
    try:
        first, stride, key = found['meta']['first_step'], found['meta']['step_stride'], dict(val='eval_loss', train='train_loss')[loss]
        return [Curve(name, shape_of(name, path), run['params'], np.array(run[key], dtype=np.float64), dict(
            step=first + stride * np.arange(len(run[key]), dtype=np.float64), tokens=None, flops=None), source=path, last=run['last_step'])
            for name, run in found['runs'].items() if run['params'] is not None and run[key]]
    except (KeyError, TypeError) as error:
        raise BadInput(f'{path} is no table of curves ({type(error).__name__}: {error}).') from None


def read_curves(path, loss):
    """All curves of a path. BadInput when there are none, or when they are of different tokenizers."""
    if loss not in ('val', 'train'):
        raise BadInput(f"loss = '{loss}' must be val or train.")
    if not os.path.exists(path):
        raise BadInput(f"'{path}' does not exist. Say `tools/sweep.py collect FOLDER`: of runs, or of trainer_state.json files; or a table, .csv or .json.")
    if os.path.isfile(path):
        curves = read_csv(path) if path.endswith('.csv') else read_compact(path, loss)
    elif folders := sorted(os.path.dirname(p) for p in glob.glob(os.path.join(glob.escape(path), '**', 'metrics.jsonl'), recursive=True)):
        curves = [read_run(folder, loss) for folder in folders]
    elif states := sorted(glob.glob(os.path.join(glob.escape(path), '**', '*trainer_state.json'), recursive=True)):
        params = {}
        if os.path.isfile(os.path.join(path, 'ablation_params.tsv')):
            with open(os.path.join(path, 'ablation_params.tsv'), encoding='utf-8') as f:
                params = {tuple(int(n) for n in row[:4]): int(row[4]) for row in csv.reader(f, delimiter='\t')}
        curves = [read_trainer_state(state, loss, params) for state in states]
    elif os.path.isfile(os.path.join(path, 'loss_curves.json')):
        curves = read_compact(os.path.join(path, 'loss_curves.json'), loss)
    else:
        raise BadInput(f"'{path}' has neither a metrics.jsonl nor a trainer_state.json in it.")
    longest = {}
    for curve in curves:                                       # of two states of one run the later
        key = curve.source if os.path.isdir(curve.source) else (curve.name, curve.seed)
        if key not in longest or curve.last > longest[key].last:
            longest[key] = curve
    curves = [curve for curve in longest.values() if np.isfinite(curve.loss).any()]
    tokenizers = {curve.tokenizer: curve.name for curve in curves if curve.tokenizer}
    if len(tokenizers) > 1:
        a, b = list(tokenizers.values())[:2]
        raise BadInput(f"runs '{a}' and '{b}' have different tokenizers: their losses per token are not comparable. Collect them apart.")
    if not curves:
        raise BadInput(f"no run in '{path}' has a {loss} loss yet.")
    return curves


# -- picks -------------------------------------------------------------------------------------------------------------

def loss_at(curve, unit, at):
    """The loss at the point `at` of the unit, between two points by straight line; nan when the run did not come so far, or began to log after it."""
    x = curve.x[unit]
    if x is None:
        raise BadInput(f"'{curve.name}' ({curve.source}) does not say its {unit}. Compare by step.")
    keep = np.isfinite(curve.loss)
    x, y = x[keep], curve.loss[keep]
    return float(np.interp(at, x, y)) if len(x) and x[0] <= at * (1 + 1e-9) and at <= x[-1] * (1 + 1e-9) else np.nan


def common_point(curves, unit):
    """The last point that at least half of the runs have come to."""
    ends = sorted((float(curve.x[unit][-1]) for curve in curves if curve.x[unit] is not None and len(curve.x[unit])), reverse=True)
    if not ends:
        raise BadInput(f'none of these runs says its {unit}. Compare by step.')
    return ends[(len(ends) + 1) // 2 - 1]


def by_label(curves, unit, at):
    """Mean loss at a point over the seeds of everything that came so far: list of (label, a Curve of it, mean, seeds, sd or None), lowest first."""
    found = {}
    for curve in curves:
        y = loss_at(curve, unit, at)
        if np.isfinite(y):
            found.setdefault((curve.label, curve.params), []).append((curve, y))
    rows = [(name, runs[0][0], float(np.mean([y for _, y in runs])), len(runs), float(np.std([y for _, y in runs], ddof=1)) if len(runs) > 1 else None)
            for (name, _), runs in found.items()]
    return sorted(rows, key=lambda row: row[2])


def pick(curves, low, high, unit, at):
    """The band's table at one point. Two picks: the lowest loss of all, and the lowest of those that are deep and not compressed."""
    band = [curve for curve in curves if low <= curve.params <= high]
    if not band:
        raise BadInput(f'no run has {low:,.0f} to {high:,.0f} parameters.')
    at = common_point(band, unit) if at is None else at
    rows = by_label(band, unit, at)
    if not rows:
        raise BadInput(f'none of the {len(band)} runs of {low:,.0f} to {high:,.0f} parameters came to {unit} {at:,.0f}. The last that half of them reached: '
                       f'{common_point(band, unit):,.0f}.')
    chosen = next((i for i, (_, curve, *_) in enumerate(rows) if curve.deep and not curve.compressed), None)
    return dict(low=low, high=high, unit=unit, at=at, n_band=len({curve.label for curve in band}), n_reached=len(rows),
                lowest=rows[0][0], lowest_loss=rows[0][2], pick=rows[chosen][0] if chosen is not None else None,
                pick_loss=rows[chosen][2] if chosen is not None else None, pick_rank=chosen + 1 if chosen is not None else None,
                next_loss=rows[1][2] if len(rows) > 1 else None,
                rows=[dict(shape=name, params=curve.params, loss=mean, seeds=n, sd=sd, deep=curve.deep, compressed=curve.compressed)
                      for name, curve, mean, n, sd in rows])


# -- what matters ------------------------------------------------------------------------------------------------------

def least_squares(X, y):
    """(coefficients, standard errors, residuals, R2); coefficients are None when the columns cannot be told apart."""
    scale = np.abs(X).max(0)
    b, _, rank, _ = np.linalg.lstsq(X / scale, y, rcond=1e-8)
    b = b / scale
    r = y - X @ b
    freedom = max(len(y) - rank, 1)
    return b if rank == X.shape[1] else None, np.sqrt(np.maximum(np.diag(np.linalg.pinv(X.T @ X)), 0) * (r @ r) / freedom), r, 1 - (r @ r) / ((y - y.mean()) @ (y - y.mean()))


def effects(curves, unit, at, least=0):
    """Loss at one point against size and shape, over the runs above `least` parameters that came so far. None when fewer than 12 shapes did.

    size: rank correlation of loss with parameters, and R2 of a quadratic in log parameters. groups: mean of what that leaves, by inner width over
    width and by depth, with standard errors. slopes: nats per doubling, all at equal parameters and together in one regression; None when the shapes
    do not tell them apart (a width that follows from the heads).
    """
    rows = by_label([curve for curve in curves if curve.params >= least], unit, at)
    if len(rows) < 12:
        return None
    y = np.array([mean for _, _, mean, _, _ in rows])
    params = np.array([curve.params for _, curve, *_ in rows], dtype=np.float64)
    shape = np.array([curve.shape for _, curve, *_ in rows], dtype=np.float64)
    log_size = np.log(params) - np.log(params).mean()
    size = np.column_stack((np.ones(len(y)), log_size, log_size ** 2))
    _, _, left, r2 = least_squares(size, y)

    def group(keep):
        n = int(keep.sum())
        return dict(n=n, mean=float(left[keep].mean()) if n else None, se=float(left[keep].std(ddof=1) / n**0.5) if n > 1 else None)
    ratio, deep = shape[:, 3] / shape[:, 2], np.array([curve.deep for _, curve, *_ in rows])
    rounded = np.round(ratio, 2)
    values, counts = np.unique(rounded, return_counts=True)
    tables = {f'ffn_dim / n_embd = {value:g}': group(rounded == value) for value, count in zip(values, counts) if count >= 3}
    tables |= {'compressed (ffn_dim <= n_embd)': group(ratio <= 1), 'not compressed': group(ratio > 1), 'deep for the heads': group(deep), 'not deep': group(~deep)}
    names = ['doubling n_layer', 'doubling n_head', 'doubling ffn_dim / n_embd']
    more = np.log2(np.column_stack((shape[:, 1], shape[:, 0], ratio)))
    moving = [i for i in range(3) if np.ptp(more[:, i]) > 0]
    b, se, _, r2_all = least_squares(np.column_stack((size, more[:, moving])), y)
    q = stats.t.ppf(0.975, max(len(y) - 3 - len(moving), 1))
    slopes = None if b is None else {
        names[i]: dict(nats=float(b[3 + k]), low=float(b[3 + k] - q * se[3 + k]), high=float(b[3 + k] + q * se[3 + k])) for k, i in enumerate(moving)}
    return dict(unit=unit, at=at, n=len(y), least=least, spearman=float(stats.spearmanr(params, y).statistic), r2_size=float(r2), r2_with_shape=float(r2_all),
                groups=tables, slopes=slopes)


# -- the report --------------------------------------------------------------------------------------------------------

def parse_band(text):
    """'3e6-5e6', '3M-5M' or '5M' (10 % to either side) -> (low, high)."""
    found = re.fullmatch(r'([\d.]+(?:e\d+)?)([kKMB]?)(?:-([\d.]+(?:e\d+)?)([kKMB]?))?', text)
    if found is None:
        raise BadInput(f"bands: '{text}' must be such as 5M (10 % to either side), 3M-5M or 3e6-5e6.")
    scale = {'': 1, 'k': 1e3, 'K': 1e3, 'M': 1e6, 'B': 1e9}
    first = float(found[1]) * scale[found[2]]
    return (first, float(found[3]) * scale[found[4]]) if found[3] else (0.9 * first, 1.1 * first)


def doublings(curves):
    """Bands from the smallest model on, each to twice as many parameters."""
    low, bands = min(curve.params for curve in curves), {}
    while low <= max(curve.params for curve in curves):
        if any(low <= curve.params <= 2 * low for curve in curves):
            bands[f'{low / 1e6:g}M-{2 * low / 1e6:g}M'] = None
        low = 2 * low + 1
    return bands


def collect(path, out, bands, unit, at, loss, least):
    """Prints the tables and writes curves.csv, collect.json and figures to out. Returns what collect.json holds."""
    from tools.plots import draw_curves
    if unit not in UNITS:
        raise BadInput(f"unit = '{unit}' must be one of {', '.join(UNITS)}.")
    curves = read_curves(path, loss)
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, 'curves.csv'), 'w', encoding='utf-8', newline='') as f:
        table = csv.writer(f)
        table.writerow(['config', *SHAPE, 'params', 'seed', 'step', 'tokens', 'flops', 'loss'])
        for curve in curves:
            xs = [curve.x[u] if curve.x[u] is not None else [''] * len(curve.loss) for u in UNITS]
            table.writerows([curve.name, *curve.shape, curve.params, curve.seed, *(f'{x:.0f}' if x != '' else '' for x in point), y]
                            for *point, y in zip(*xs, curve.loss) if np.isfinite(y))
    shapes = len({(c.shape, c.params) for c in curves})
    print(f'{len(curves)} runs of {shapes} shapes, {min(c.params for c in curves):,} to {max(c.params for c in curves):,} parameters; {loss} loss. Compared at the same '
          f'{unit}; runs that had not come so far take no part.')
    picks = {name: pick(curves, *parse_band(name), unit, at if point is None else point) for name, point in (bands or doublings(curves)).items()}
    print(f'\n{"band":<16}{unit:>14}{"there":>7}{"of":>6}   {"lowest loss of all":<30}{"next":>8}   deep (n_layer >= n_head + 8, from 12 heads on + 10), not compressed')
    for name, p in picks.items():
        chosen = f'{p["pick"]} {p["pick_loss"]:.4f}, rank {p["pick_rank"]}' if p['pick'] else 'none'
        beside = f'{p["next_loss"]:.4f}' if p['next_loss'] is not None else 'n/a'
        print(f'{name:<16}{p["at"]:>14,.0f}{p["n_reached"]:>7}{p["n_band"]:>6}   {p["lowest"] + " " + format(p["lowest_loss"], ".4f"):<30}{beside:>8}   {chosen}')
    print(f'\n{"band":<16}{"the lowest of it":<22}{"parameters":>12}{"loss":>9}{"sd":>9}  seeds')
    for name, p in picks.items():
        for r in p['rows'][:6]:
            print(f'{name:<16}{r["shape"]:<22}{r["params"]:>12,}{r["loss"]:>9.4f}' + (f'{r["sd"]:>9.4f}' if r['sd'] is not None else f'{"n/a":>9}') + f'{r["seeds"]:>7}')
    found = effects(curves, unit, common_point(curves, unit) if at is None else at, least)
    if found is None:
        print('\nfewer than 12 shapes came so far: what depth, heads and inner width do cannot be told')
    else:
        print_effects(found)
    paths = draw_curves(out, curves, picks, unit, found['at'] if found else common_point(curves, unit))
    result = dict(path=path, loss=loss, picks=picks, effects=found)
    with open(os.path.join(out, 'collect.json'), 'w', encoding='utf-8') as f:
        json.dump(result, f, indent=1)
    print(f'\nwritten: {", ".join(os.path.join(out, n) for n in ("curves.csv", "collect.json"))}, {", ".join(paths)}')
    return result


def print_effects(found):
    print(f'\n{found["n"]} shapes of {found["least"]:,.0f} parameters or more at {found["unit"]} {found["at"]:,.0f}: rank correlation of loss with parameters '
          f'{found["spearman"]:.4f}; a quadratic in log parameters explains {found["r2_size"]:.2%} of the variance, with depth, heads and inner width {found["r2_with_shape"]:.2%}')
    print(f'{"beside the quadratic (nats; below 0: better than its size)":<62}{"shapes":>8}{"mean":>10}{"se":>9}')
    for name, g in found['groups'].items():
        if g['n']:
            print(f'{name:<62}{g["n"]:>8}{g["mean"]:>+10.4f}' + (f'{g["se"]:>9.4f}' if g['se'] is not None else f'{"n/a":>9}'))
    print('depth, heads and inner width cannot be told apart: they follow from each other and the size' if found['slopes'] is None else
          'at equal parameters, in one regression (nats, 95 %): ' + '; '.join(f'{name} {s["nats"]:+.4f} ({s["low"]:+.4f} to {s["high"]:+.4f})' for name, s in found['slopes'].items()))
