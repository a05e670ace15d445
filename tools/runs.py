"""Runs of train.py as their folders describe them, and tables of finished runs.

`read_run` reads one folder, finished or not. tools/report.py, tools/curves.py and tools/sweep.py
work on the `Run` that it returns. `read_table` makes what tools/mixing_laws.py fits: the mixture
that every run was trained on and the losses that it ended with.

Letters in shapes: m trained sources, k evaluated sources, n runs.
"""
import glob
import hashlib
import os
import time
from dataclasses import dataclass, field

import numpy as np

from configurator import BadInput, pick, read_json
from lib.log import read_metrics
from lib.schedule import count_steps
from model import ModelConfig, flops_per_token

# -- one run ---------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run of train.py, finished or not."""
    folder: str
    config: dict                # config.json
    records: list               # metrics.jsonl, one dict per record
    final: dict                 # the last record with an evaluation, {} before the first one
    status: str                 # finished | training | stopped
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
    records = read_metrics(folder)
    # train.py writes config.json before its first record, so here the file is complete.
    return bool(records) and has_ended(read_json(os.path.join(folder, 'config.json')), records)


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
    """Reads the run in a folder. Raises BadInput if config.json is missing or damaged."""
    config = read_json(os.path.join(folder, 'config.json'))
    records = read_metrics(folder)
    evaluated = [r for r in records if 'val/loss' in r]
    final = evaluated[-1] if evaluated else {}
    status = status_of(folder, config, records)
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

    @property
    def p(self):
        return np.array([run.p for run in self.runs])               # (n, m)

    @property
    def loss(self):
        return np.array([run.loss for run in self.runs])            # (n, k)

    def only(self, keep):
        return Table(self.groups, self.evaluated, [run for run in self.runs if keep(run)])

    def seeds(self):
        return sorted({run.seed for run in self.runs})


def origin_of(path):
    """What the knob continue_from names: (run folder, step). It is a run or a checkpoint of it."""
    path = os.path.normpath(path)
    name = os.path.basename(path)
    if name.startswith('step_'):
        return os.path.dirname(os.path.dirname(path)), int(name.removeprefix('step_'))
    if not os.path.isdir(path):
        raise BadInput(f"'{path}' is missing, but other runs continue it. Put it back.")
    return path, planned_steps(read_json(os.path.join(path, 'config.json')))


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
    missing = [name for name in run.config['sources'] if f'val/loss_{name}' not in record]
    if missing:
        raise BadInput(f"run '{run.folder}' has no validation loss of {', '.join(missing)}.")
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
    if at is None and run.config['continue_from']:
        folder, first = origin_of(run.config['continue_from'])
        parent = row_of(read_run(folder), names, first)
    records = [r for r in run.records if r['step'] >= first and (at is None or r['step'] <= at)]
    method = run.config['mixture']
    is_constant = method in ('fixed', 'stratified')
    # Records later than `at` also tell the weights of a mixture that never changes.
    logged = run.records if is_constant else records
    logged = [r for r in logged if f'mixture/weight_{names[0]}' in r]
    if not logged:
        raise BadInput(
            f"run '{run.folder}' logged no mixture after step {first}. Lower its log_interval.")
    weights = np.array([[r[f'mixture/weight_{name}'] for name in names] for r in logged])
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
    """The Row of an entry of a JSON table: {"p", "loss", "seed", "parent", ...}."""
    p = np.array(entry['p'], dtype=np.float64)
    # Published shares are rounded. They are scaled to a sum of exactly 1 below.
    if abs(p.sum() - 1) > 0.02 or (p < 0).any():
        raise BadInput(
            f'{path}: the shares of run {name} sum to {p.sum():.4g}. They must not be negative '
            'and must sum to 1.')
    # A loss that is null becomes nan, which the fits report with the number of the run.
    loss = np.array(list(entry['loss']), dtype=np.float64)
    parent = None
    if 'parent' in entry:
        parent = row_from_json(entry['parent'], f'{name}.parent', path)
    return Row(
        str(entry.get('name', name)), p / p.sum(), loss, entry.get('seed', 0), entry.get('tokens'),
        entry.get('tokenizer'), entry.get('method', 'fixed'), parent)


def read_json_table(path):
    """Reads a table from elsewhere: {"groups": [...], "evaluated": [...], "runs": [{...}]}.

    "evaluated" defaults to the groups. Raises BadInput if the file has another form.
    """
    found = read_json(path)
    try:
        groups = found['groups']
        evaluated = found.get('evaluated', groups)
        rows = [row_from_json(entry, i, path) for i, entry in enumerate(found['runs'])]
    except (KeyError, TypeError) as error:
        raise BadInput(
            f'{path} is no table of runs ({type(error).__name__}: {error}). It should be '
            '{"groups": ["a", "b"], "runs": [{"p": [0.4, 0.6], "loss": [3.1, 2.9], "seed": 0}, '
            '...]}.') from None
    for row in rows:
        if len(row.p) != len(groups) or len(row.loss) != len(evaluated):
            raise BadInput(
                f'{path}: run {row.name} has {len(row.p)} shares and {len(row.loss)} losses, but '
                f'the table has {len(groups)} groups and {len(evaluated)} evaluated ones.')
    return Table(groups, evaluated, rows)


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
    return Table(names, names, [row_of(run, names) for run in runs])


def read_table(path):
    """Reads the runs in a folder, or a JSON file of runs.

    Raises BadInput if the runs do not belong together: other sources, lengths or tokenizers.
    """
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
