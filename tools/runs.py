"""Runs of train.py as their folders describe them, and tables of finished runs.

`read_run` reads one folder, finished or not. tools/report.py, tools/curves.py and tools/sweep.py
work on the `Run` that it returns. `read_table` makes what tools/mixing_laws.py fits: the mixture
that every run was trained on and the losses that it ended with.

Letters in shapes: m trained sources, k evaluated sources, n runs.
"""
import csv
import fnmatch
import functools
import glob
import hashlib
import inspect
import math
import os
import re
import time
from dataclasses import dataclass, field, replace

import numpy as np

from configurator import BadInput, check_type, parse_knobs, pick, read_json, read_source
from lib.log import read_metrics
from lib.schedule import count_steps
from lib.shards import read_meta
from methods import FIXED
from model import ModelConfig, flops_per_token

# Knobs of train.py that are read here and by the tools, and their types. A config.json also has
# those of ModelConfig.
KNOBS = dict(
    seed='int', sources='dict[str, float]', mixture='str', data_dir='str', packing='str',
    block_size='int', batch_size='int', total_batch_tokens='int', log_interval='int',
    eval_rows='int', max_steps='int | None', max_tokens='int | None', epochs='float | None',
    stop_step='int | None')
POSITIVE = ('block_size', 'batch_size', 'total_batch_tokens', 'log_interval')

# -- one run ---------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run of train.py, finished or not."""
    folder: str
    config: dict                # config.json
    records: list               # metrics.jsonl, one dict per record
    final: dict                 # the last record with an evaluation, {} before the first one
    status: str                 # finished | training | stopped | diverged
    tokenizer: str | None       # fingerprint of the tokenizer's files. None: the run has none
    arm: str = ''               # name of the arm that a report puts the run in

    @property
    def name(self):
        return os.path.basename(os.path.normpath(self.folder))

    @property
    def seed(self):
        return self.config['seed']

    @property
    def step(self):
        return self.records[-1]['step'] if self.records else 0

    @property
    def tokens(self):
        """Tokens up to the last record, including those of a run that this one continues."""
        return self.step * self.config['total_batch_tokens']


@functools.cache
def types_of_knobs():
    """Name -> type of every knob that a config.json must have."""
    path = inspect.getfile(ModelConfig)
    shape = parse_knobs(read_source(path), path, 'ModelConfig')
    return {**KNOBS, **{name: knob.type or 'str' for name, knob in shape.items()}}


def read_config(folder):
    """The config.json of a run of train.py: a dict.

    Raises BadInput if it is missing or damaged, lacks a knob that is read here, as those of another
    version of train.py may, or has one of another type. Further knobs do not matter.
    """
    path = os.path.join(folder, 'config.json')
    config = read_json(path)
    if not isinstance(config, dict):
        raise BadInput(f'{path} is no config of a run. It should be a JSON object of knobs.')
    for name, wanted in types_of_knobs().items():
        if name not in config:
            raise BadInput(
                f"{path} has no knob '{name}': it is no config of a run of this version of "
                'train.py. Take it out of the folder, or train the run again.')
        try:
            check_type(config[name], wanted, None)
        except TypeError as error:
            raise BadInput(f'{path}: {name} {error}.') from None
    for name in POSITIVE:
        if config[name] < 1:
            raise BadInput(f'{path}: {name} = {config[name]} must be at least 1.')
    weights = config['sources'].values()
    if not all(math.isfinite(w) and w >= 0 for w in weights) or sum(weights) <= 0:
        raise BadInput(f'{path}: sources = {config["sources"]} are no weights.')
    try:
        pick(ModelConfig, config)
        count_steps(config, None)
    except BadInput as error:
        raise BadInput(f'{path}: {error}') from None
    return config


def read_records(folder):
    """The records of a run's metrics.jsonl by step, [] if there is none.

    Several runs that wrote to one file leave steps out of order. Raises BadInput for a damaged file
    and for values that are no numbers.
    """
    path = os.path.join(folder, 'metrics.jsonl')
    records = read_metrics(folder)
    for i, record in enumerate(records, 1):
        for name, value in record.items():
            # null stands for a number that was not finite.
            if value is not None and not isinstance(value, (int, float)):
                raise BadInput(f'{path}:{i}: {name} = {value!r} is no number. Remove the line.')
            if name.startswith(('val/loss', 'train/loss')) and value is not None and value < 0:
                raise BadInput(f'{path}:{i}: {name} = {value} is negative. Remove the line.')
    # A stable sort keeps the order of what was logged for one step. The last of it counts.
    return sorted(records, key=lambda record: record['step'])


def is_number(value):
    return value is not None and math.isfinite(value)


def planned_steps(config):
    """The step at which a run ends according to its config. None: the run counts epochs."""
    ends = (count_steps(config, None), config['stop_step'])
    return min((step for step in ends if step is not None), default=None)


def has_ended(config, records):
    last = planned_steps(config)
    # Training records are written with a delay, so the evaluation may not be the last record.
    return any('val/loss' in r and (last is None or r['step'] >= last) for r in records[-3:])


def is_finished(folder):
    """Whether the run in a folder has come to its end. False if there is no run."""
    records = read_records(folder)
    # train.py writes config.json before its first record, so here the file is complete.
    return bool(records) and has_ended(read_config(folder), records)


def status_of(folder, config, records):
    if has_ended(config, records):
        return 'finished'
    path = os.path.join(folder, 'metrics.jsonl')
    # A run may be killed between config.json and its first record.
    if not os.path.isfile(path):
        return 'stopped'
    steps_s = [r['system/step_ms'] / 1e3 for r in records[-20:] if r.get('system/step_ms')]
    # Evaluations, checkpoints and compilation delay a record, so 20 intervals may pass without one.
    patience_s = 120.0
    if steps_s:
        patience_s = max(patience_s, 20 * config['log_interval'] * float(np.median(steps_s)))
    return 'training' if time.time() - os.path.getmtime(path) < patience_s else 'stopped'


def tokenizer_of(folder):
    """A fingerprint of the tokenizer's files in a run folder. None: there are none."""
    # Without the escape, brackets in a folder's name would act as a pattern.
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), 'tokenizer.*')))
    # Only equal fingerprints matter, so one hash over all files is enough.
    digest = hashlib.sha256()
    for path in paths:
        with open(path, 'rb') as f:
            digest.update(f.read())
    return digest.hexdigest()[:16] if paths else None


def read_run(folder):
    """Reads the run in a folder. Raises BadInput if its config.json or metrics.jsonl is damaged.

    A run whose last losses are not finite has diverged. It has no final record.
    """
    config = read_config(folder)
    records = read_records(folder)
    evaluated = [r for r in records if 'val/loss' in r]
    final = evaluated[-1] if evaluated else {}
    status = status_of(folder, config, records)
    if not all(is_number(value) for name, value in final.items() if name.startswith('val/')):
        final = {}
        status = 'diverged'
    return Run(folder, config, records, final, status, tokenizer_of(folder))


def token_flops(config):
    """Training FLOPs per token by the count of PaLM (arXiv:2204.02311, appendix B)."""
    return flops_per_token(pick(ModelConfig, config), config['block_size'])


def flops_of(config, tokens, records):
    """FLOPs of a run: (training on `tokens`, measurements that its mixture method made besides)."""
    # The metric is a running sum, so its last record holds the total.
    extra = [r['mixture/extra_flops'] for r in records if 'mixture/extra_flops' in r]
    return tokens * token_flops(config), extra[-1] if extra else 0.0


# -- tables of runs --------------------------------------------------------------------------------


@dataclass
class Row:
    """One run as the mixing laws see it."""
    name: str
    p: np.ndarray                       # (m,) shares of the sources since `parent`, sum 1
    loss: np.ndarray                    # (k,) validation loss, nats per token
    seed: int = 0
    tokens: int | None = None           # trained on, without those of `parent`
    tokenizer: str | None = None        # fingerprint of its files
    method: str = 'fixed'               # the knob `mixture`
    parent: 'Row | None' = None         # the run that this one continues, as it was at that step
    records: list = field(default_factory=list)     # of metrics.jsonl, without those of `parent`


@dataclass
class Table:
    groups: list                        # names of the trained sources, the columns of p
    evaluated: list                     # names of the evaluated sources, the columns of loss
    runs: list                          # of Row
    sizes: dict | None = None           # group -> tokens to train on. None: not known

    @property
    def p(self):
        return np.array([run.p for run in self.runs])               # (n, m)

    @property
    def loss(self):
        return np.array([run.loss for run in self.runs])            # (n, k)

    def only(self, keep):
        runs = [run for run in self.runs if keep(run)]
        return Table(self.groups, self.evaluated, runs, self.sizes)

    def seeds(self):
        return sorted({run.seed for run in self.runs})

    def of(self, name):
        """The table with the loss of one evaluated source. '': with all, as it is."""
        if not name:
            return self
        i = self.evaluated.index(name)
        runs = [replace(run, loss=run.loss[i:i + 1]) for run in self.runs]
        return Table(self.groups, [name], runs, self.sizes)


def origin_of(path):
    """What the knob continue_from names: (run folder, step). It is a run or a checkpoint of it."""
    path = os.path.normpath(path)
    name = os.path.basename(path)
    if re.fullmatch(r'step_\d+', name):
        return os.path.dirname(os.path.dirname(path)), int(name.removeprefix('step_'))
    if not os.path.isdir(path):
        raise BadInput(f"'{path}' is missing, but other runs continue it. Put it back.")
    return path, planned_steps(read_config(path))


def losses_at(run, step):
    """Validation losses at a step (None: at the last evaluation): (source -> nats per token, step).

    Raises BadInput if the run did not get there or if a source was not evaluated.
    """
    found = [r for r in run.records if 'val/loss' in r and (step is None or r['step'] == step)]
    if not found:
        raise BadInput(
            f"run '{run.folder}' has no evaluation at step {step}, it has come to step {run.step}. "
            'Let it finish (train.py --resume=True), or take it out of the folder.')
    record = found[-1]
    missing = []
    for name in run.config['sources']:
        if not is_number(record.get(f'val/loss_{name}')):
            missing.append(name)
    if missing:
        raise BadInput(
            f"run '{run.folder}' has no finite validation loss of {', '.join(missing)} at step "
            f'{record["step"]}. Take it out of the folder.')
    return {name: record[f'val/loss_{name}'] for name in run.config['sources']}, record['step']


def row_of(run, names, at=None):
    """The Row of a run as it was at step `at`. None: at its end.

    names   the sources in the order of the table's columns
    Raises BadInput if the run did not get there, or if it does not say which mixture it had.
    """
    losses, end = losses_at(run, planned_steps(run.config) if at is None else at)
    parent = None
    first = 0
    # A parent is read with `at`. What it continues itself does not matter for its children.
    if not isinstance(run.config.get('continue_from', 0), str | None):
        raise BadInput(
            f"{run.folder}/config.json has no text in the knob 'continue_from': it was written by "
            'another version of train.py, or damaged. Train the run again.')
    if at is None and run.config['continue_from']:
        folder, first = origin_of(run.config['continue_from'])
        parent = row_of(read_run(folder), names, first)
    records = [r for r in run.records if r['step'] >= first and (at is None or r['step'] <= at)]
    method = run.config['mixture']
    is_constant = method in FIXED
    # Records later than `at` also tell the weights of a mixture that never changes.
    logged = run.records if is_constant else records
    logged = [r for r in logged if f'mixture/weight_{names[0]}' in r]
    if not logged:
        raise BadInput(
            f"run '{run.folder}' logged no mixture after step {first}. Lower its log_interval.")
    # A weight that was not logged becomes nan.
    keys = [f'mixture/weight_{name}' for name in names]
    weights = np.array([[r.get(key) for key in keys] for r in logged], dtype=np.float64)
    if not (np.abs(weights.sum(1) - 1) < 1e-3).all() or (weights < 0).any():
        raise BadInput(
            f"run '{run.folder}' logged weights of its sources that are negative, missing, or do "
            'not sum to 1. Take it out of the folder.')
    if is_constant and np.ptp(weights, axis=0).max() > 1e-6:
        raise BadInput(
            f"the mixture of run '{run.folder}' is '{method}', but its weights changed when it was "
            'resumed. Take it out of the folder.')
    # Without the parent's tokens, because the laws describe what a child's own mixture did.
    tokens = (end - first) * run.config['total_batch_tokens']
    loss = np.array([losses[name] for name in names])
    return Row(
        run.name, weights[-1], loss, run.seed, tokens, run.tokenizer, method, parent, records)


def row_from_json(entry, name, path):
    """The Row of an entry of a JSON table: {"p", "loss", "seed", "parent", ...}.

    Raises BadInput for numbers that cannot be right, and TypeError, KeyError or ValueError for an
    entry of another form.
    """
    p = np.array(entry['p'], dtype=np.float64)
    # A loss that is null becomes nan, which the fits report with the number of the run.
    loss = np.array(entry['loss'], dtype=np.float64)
    if p.ndim != 1 or loss.ndim != 1:
        raise TypeError(f'p and loss of run {name} must be lists of numbers')
    # Published shares are rounded. They are scaled to a sum of exactly 1 below.
    if not abs(p.sum() - 1) <= 0.02 or (p < 0).any():
        raise BadInput(
            f'{path}: the shares of run {name} sum to {p.sum():.4g}. They must not be negative '
            'and must sum to 1.')
    if (loss < 0).any():
        raise BadInput(f'{path}: run {name} has the loss {loss.min():.4g}. No loss is negative.')
    about = dict(seed=0, tokens=None, tokenizer=None, method='fixed')
    wanted = dict(seed='int', tokens='int | None', tokenizer='str | None', method='str')
    for key in about:
        about[key] = check_type(entry.get(key, about[key]), wanted[key], None)
    parent = None
    if 'parent' in entry:
        parent = row_from_json(entry['parent'], f'{name}.parent', path)
    return Row(str(entry.get('name', name)), p / p.sum(), loss, **about, parent=parent)


def read_json_table(path):
    """Reads a table from elsewhere: {"groups": [...], "evaluated": [...], "runs": [{...}]}.

    "evaluated" defaults to the groups. "sizes" may tell the tokens of every group. Raises BadInput
    if the file has another form.
    """
    found = read_json(path)
    try:
        groups = check_names(found['groups'])
        evaluated = check_names(found.get('evaluated', groups))
        rows = [row_from_json(entry, i, path) for i, entry in enumerate(found['runs'])]
        if not rows:
            raise ValueError('runs is empty')
        sizes = check_type(found.get('sizes'), 'dict[str, int] | None', None)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f'{path} is no table of runs ({type(error).__name__}: {error}). It should be '
            '{"groups": ["a", "b"], "runs": [{"p": [0.4, 0.6], "loss": [3.1, 2.9], "seed": 0}, '
            '...]}.') from None
    for row in rows:
        if len(row.p) != len(groups) or len(row.loss) != len(evaluated):
            raise BadInput(
                f'{path}: run {row.name} has {len(row.p)} shares and {len(row.loss)} losses, but '
                f'the table has {len(groups)} groups and {len(evaluated)} evaluated ones.')
    return Table(groups, evaluated, rows, sizes)


# Columns of a CSV that name a run. The first of them that both files have joins them.
IDS = ('run', 'run_id', 'name', 'index')


def read_csv(path):
    """The rows of a CSV file with a header: list of dicts. Raises BadInput for another file."""
    try:
        with open(path, encoding='utf-8', newline='') as f:
            reader = csv.DictReader(f, strict=True)
            rows = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadInput(f'{path} is no CSV file ({error}).') from None
    names = reader.fieldnames or []
    if not rows or len(set(names)) < len(names):
        raise BadInput(f'{path} needs a header of different names, and a row for every run.')
    for i, row in enumerate(rows, 2):
        # DictReader puts what goes beyond the header under None, and fills up with None.
        if None in row or None in row.values():
            raise BadInput(f'{path}: row {i} does not have the {len(names)} columns of the header.')
    return rows


def csv_columns(rows):
    """Names of the columns that hold numbers of interest: neither ids nor the index of pandas."""
    return [name for name in rows[0] if name not in IDS and name and not name.startswith('Unnamed')]


def csv_numbers(path, row, names):
    """The values (m,) of columns of a row. A cell that is empty becomes nan."""
    found = []
    for name in names:
        try:
            found.append(float(row[name] or 'nan'))
        except ValueError:
            raise BadInput(f"{path}: {name} = '{row[name]}' is no number.") from None
    return np.array(found)


def read_csv_pair(ratios, metrics, families):
    """Reads mixtures and losses from two CSV files, as Olmix publishes them: a Table.

    ratios    a row for every run: an id (run, run_id, name or index) and the share of every source
    metrics   a row for every run: the id and metrics for which lower is better
    families  dict name -> patterns of metrics ('minerva*'), whose mean is one loss. {}: every
              metric is one
    Raises BadInput for files of another form, and unless both name the same runs.
    """
    rows = read_csv(ratios)
    other = read_csv(metrics)
    ids = [name for name in IDS if name in rows[0] and name in other[0]]
    if not ids:
        raise BadInput(f'{ratios} and {metrics} have no common column {", ".join(IDS)}.')
    found = {}
    for path, part in ((ratios, rows), (metrics, other)):
        found[path] = {row[ids[0]]: row for row in part}
        if len(found[path]) < len(part):
            raise BadInput(f"{path}: two rows have the same '{ids[0]}'. Take one out.")
    differing = sorted(set(found[ratios]) ^ set(found[metrics]))
    if differing:
        names = ', '.join(differing[:5]) + (' ...' if len(differing) > 5 else '')
        raise BadInput(
            f"{ratios} and {metrics} do not have the same runs: {len(differing)} are in one of "
            f"them only, by the column '{ids[0]}': {names}. Take these rows out.")
    groups = csv_columns(rows)
    columns = csv_columns(other)
    families = families or {name: [name] for name in columns}
    members = {}
    for family, patterns in families.items():
        members[family] = [
            name for name in columns
            if name in patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns)]
        if not members[family]:
            raise BadInput(f"families: no column of {metrics} fits '{family}' ({patterns}).")
    runs = []
    for name, row in found[ratios].items():
        p = csv_numbers(ratios, row, groups)
        numbers = csv_numbers(metrics, found[metrics][name], columns)
        values = dict(zip(columns, numbers, strict=True))
        # numpy's mean of an empty cell is nan, which the fits report with the number of the run.
        loss = [float(np.mean([values[m] for m in part])) for part in members.values()]
        runs.append(row_from_json(dict(name=name, p=p, loss=loss), name, ratios))
    return Table(groups, list(members), runs)


def check_names(names):
    """Returns names. Raises TypeError unless they are a list of different strings."""
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not is_list or not names or len(set(names)) < len(names):
        raise TypeError(f'groups and evaluated must be lists of different names, got {names!r}')
    return names


def read_run_folders(path):
    """The Table of all runs directly in a folder. Raises BadInput if their sources differ."""
    # Not recursive, because the parents and children of a sweep must not get into one fit.
    paths = sorted(glob.glob(os.path.join(glob.escape(path), '*', 'metrics.jsonl')))
    if not paths:
        raise BadInput(f"'{path}' has no runs: no folder in it has a metrics.jsonl.")
    runs = [read_run(os.path.dirname(p)) for p in paths]
    names = list(runs[0].config['sources'])
    for run in runs:
        differing = sorted(set(names) ^ set(run.config['sources']))
        if differing:
            raise BadInput(
                f"runs '{runs[0].name}' and '{run.name}' do not have the same sources: only one "
                f'has {", ".join(differing)}. Give a source that is left out the weight 0.')
    rows = [row_of(run, names) for run in runs]
    return Table(names, names, rows, sizes_of(runs[0].config['data_dir'], names))


def sizes_of(data_dir, names):
    """Tokens to train on of every source, by their meta.json: a dict, None if one has none."""
    sizes = {}
    for name in names:
        meta = read_meta(os.path.join(data_dir, name))
        if meta is None:
            return None
        sizes[name] = sum(s['tokens'] for s in meta['shards'] if s['split'] == 'train')
    return sizes


def read_table(path, metrics=None, families=None):
    """Reads the runs in a folder, a JSON file of runs, or two CSV files (`read_csv_pair`).

    Raises BadInput if the runs do not belong together: other sources, lengths or tokenizers.
    """
    if metrics:
        table = read_csv_pair(path, metrics, families)
    else:
        table = read_json_table(path) if os.path.isfile(path) else read_run_folders(path)
    for field_name, what, unit in (('tokens', 'length', ' tokens'), ('tokenizer', 'tokenizer', '')):
        values = {}
        for run in table.runs:
            # Tables from elsewhere may not tell their tokens or their tokenizer.
            if getattr(run, field_name) is not None:
                values[getattr(run, field_name)] = run.name
        if len(values) > 1:
            (a, run_a), (b, run_b) = list(values.items())[:2]
            raise BadInput(
                f"'{path}' holds runs of different {what}: '{run_a}' ({a}{unit}) and '{run_b}' "
                f'({b}{unit}). Their losses are not comparable. Put them into separate folders.')
    return table
