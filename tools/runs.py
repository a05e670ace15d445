"""What finished runs of train.py left behind, as tables: mixtures, losses, seeds. For tools/mixing_laws.py, tools/sweep.py and tools/report.py."""
import glob
import hashlib
import json
import os
from dataclasses import dataclass, field, fields

import numpy as np

from configurator import BadInput
from lib.device import read_metrics
from lib.schedule import count_steps
from model import ModelConfig, flops_per_token


@dataclass
class Run:
    """A finished run: what it was trained on, and the validation losses that it ended with."""
    name: str
    p: np.ndarray                       # (m,) shares of the groups, since `parent` if there is one
    loss: np.ndarray                    # (k,) nats per token of the evaluated groups
    seed: int = 0
    tokens: int | None = None           # trained on, without those of `parent`
    tokenizer: str | None = None        # fingerprint of its files
    method: str = 'fixed'               # `mixture` of its config
    parent: 'Run | None' = None         # the run that it continues, as it was then
    records: list = field(default_factory=list)      # of metrics.jsonl, its own
    config: dict = field(default_factory=dict)


@dataclass
class Table:
    groups: list                        # names of the trained groups, the columns of p
    evaluated: list                     # names of the evaluated groups, the columns of loss
    runs: list

    @property
    def p(self):
        return np.array([run.p for run in self.runs])

    @property
    def loss(self):
        return np.array([run.loss for run in self.runs])

    def only(self, keep):
        return Table(self.groups, self.evaluated, [run for run in self.runs if keep(run)])

    def seeds(self):
        return sorted({run.seed for run in self.runs})


def planned_steps(config):
    """The step that a run of train.py ends at, as far as its config says; None: it counts epochs."""
    return min((n for n in (count_steps(config, None), config.get('stop_step')) if n is not None), default=None)


def is_finished(folder):
    """Whether a run has come to its end."""
    path, records = os.path.join(folder, 'config.json'), read_metrics(folder)
    if not os.path.isfile(path) or not records:
        return False
    with open(path, encoding='utf-8') as f:
        last = planned_steps(json.load(f))
    return any('val/loss' in r and (last is None or r['step'] >= last) for r in records[-3:])


def tokenizer_of(folder):
    """A fingerprint of the tokenizer's files in a run folder, None when there are none."""
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), 'tokenizer.*')))
    digest = hashlib.sha256()
    for path in paths:
        with open(path, 'rb') as f:
            digest.update(f.read())
    return digest.hexdigest()[:16] if paths else None


def origin_of(path):
    """(run folder, step) of train.py's continue_from: a run that stopped at its end, or one of its checkpoints."""
    name = os.path.basename(os.path.normpath(path))
    if name.startswith('step_'):
        return os.path.dirname(os.path.dirname(os.path.normpath(path))), int(name.removeprefix('step_'))
    if not os.path.isfile(os.path.join(path, 'config.json')):
        raise BadInput(f"'{path}', which other runs continue, is not there any more. Put it back, or call tools/mixing_laws.py from the folder that they were made from.")
    with open(os.path.join(path, 'config.json'), encoding='utf-8') as f:
        return path, planned_steps(json.load(f))


def read_run(folder, at=None):
    """The Run of a folder, as it was at step `at` (None: at its end). BadInput when it did not get there, or has no losses."""
    with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
        config = json.load(f)
    records = read_metrics(folder)
    last = planned_steps(config) if at is None else at
    evaluated = [r for r in records if 'val/loss' in r and (last is None or r['step'] == last)]
    if not evaluated:
        raise BadInput(f"run '{folder}' has no evaluation at step {last}, it has come to step {records[-1]['step'] if records else 0}. Let it finish "
                       '(train.py with --resume=True), or take it out of the folder.')
    groups = list(config['sources'])
    missing = [name for name in groups if f'val/loss_{name}' not in evaluated[-1]]
    if missing:
        raise BadInput(f"run '{folder}' has no validation loss of {', '.join(missing)}.")
    parent, first = None, 0
    if at is None and config.get('continue_from'):
        origin, first = origin_of(config['continue_from'])
        parent = read_run(origin, first)
    own = [r for r in records if r['step'] >= first and (at is None or r['step'] <= at)]
    constant = config['mixture'] in ('fixed', 'stratified')
    logged = [r for r in own if f'mixture/weight_{groups[0]}' in r]
    if constant and not logged:                                     # weights that never change are told by a log after `at` as well
        logged = [r for r in records if f'mixture/weight_{groups[0]}' in r][:1]
    weights = [[r[f'mixture/weight_{name}'] for name in groups] for r in logged]
    if constant and weights and np.ptp(weights, axis=0).max() > 1e-6:
        raise BadInput(f"the mixture of run '{folder}' changed while it ran, though it is '{config['mixture']}': it was resumed with other weights. "
                       'Take it out of the folder.')
    if not weights:
        raise BadInput(f"run '{folder}' logged no mixture after step {first}. Train it with a smaller log_interval.")
    return Run(os.path.basename(os.path.normpath(folder)), np.array(weights[-1]), np.array([evaluated[-1][f'val/loss_{name}'] for name in groups]),
               config['seed'], (evaluated[-1]['step'] - first) * config['total_batch_tokens'], tokenizer_of(folder), config['mixture'], parent,
               own, config)


def token_flops(config):
    """FLOPs of training on one token (PaLM's count)."""
    return flops_per_token(ModelConfig(**{f.name: config[f.name] for f in fields(ModelConfig)}), config['block_size'])


def flops_of(config, tokens, records):
    """(FLOPs of training on `tokens`, of what was measured beside it) of a run with these records of metrics.jsonl."""
    extra = [r['mixture/extra_flops'] for r in records if 'mixture/extra_flops' in r]
    return tokens * token_flops(config), extra[-1] if extra else 0.0


def read_json(path):
    """A table that somebody else made: {"groups": [...], "evaluated": [...] (default: the groups), "runs": [{"p", "loss", "seed", "parent"}]}."""
    with open(path, encoding='utf-8') as f:
        try:
            found = json.load(f)
            groups = found['groups']
            evaluated = found.get('evaluated', groups)

            def run(r, i):
                shares = np.array(r['p'], dtype=np.float64)
                parent = run(r['parent'], f'{i}.parent') if 'parent' in r else None
                if abs(shares.sum() - 1) > 0.02 or (shares < 0).any():
                    raise BadInput(f'{path}: the shares of run {i} sum to {shares.sum():.4g}; they must not be negative, and sum to 1.')
                return Run(str(r.get('name', i)), shares / shares.sum(), np.array([np.nan if x is None else x for x in r['loss']], dtype=np.float64),
                           r.get('seed', 0), r.get('tokens'), r.get('tokenizer'), r.get('method', 'fixed'), parent)
            table = Table(groups, evaluated, [run(r, i) for i, r in enumerate(found['runs'])])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise BadInput(f'{path} is no table of runs ({type(error).__name__}: {error}). It should be {{"groups": ["a", "b"], "runs": '
                           '[{"p": [0.4, 0.6], "loss": [3.1, 2.9], "seed": 0}, ...]}.') from None
    for r in table.runs:
        if len(r.p) != len(groups) or len(r.loss) != len(evaluated):
            raise BadInput(f'{path}: run {r.name} has {len(r.p)} shares and {len(r.loss)} losses, the table has {len(groups)} groups and '
                           f'{len(evaluated)} evaluated ones.')
    return table


def read_table(path):
    """The runs of a folder (every subfolder with a metrics.jsonl) or of a JSON file: Table. BadInput when they do not belong together."""
    if os.path.isfile(path):
        table = read_json(path)
    else:
        folders = sorted(os.path.dirname(p) for p in glob.glob(os.path.join(glob.escape(path), '*', 'metrics.jsonl')))
        if not folders:
            raise BadInput(f"'{path}' has no runs: no folder in it has a metrics.jsonl. `python tools/sweep.py` makes some.")
        runs = [read_run(folder) for folder in folders]
        groups = list(runs[0].config['sources'])
        for run in runs:
            if set(run.config['sources']) != set(groups):
                wrong = sorted(set(run.config['sources']) ^ set(groups))
                raise BadInput(f"runs '{runs[0].name}' and '{run.name}' do not have the same groups: {', '.join(wrong)} stands in one of them only. "
                               'Give a source that is left out the weight 0.')
            order = [list(run.config['sources']).index(name) for name in groups]
            for r in (run, run.parent) if run.parent else (run,):
                r.p, r.loss = r.p[order], r.loss[order]
        table = Table(groups, groups, runs)
    for what in ('tokens', 'tokenizer'):
        values = {getattr(run, what): run.name for run in table.runs if getattr(run, what) is not None}
        if len(values) > 1:
            (a, run_a), (b, run_b) = list(values.items())[:2]
            unit = ' tokens' if what == 'tokens' else ''
            raise BadInput(f"'{path}' holds runs of different {'length' if unit else what}: '{run_a}' ({a}{unit}) and '{run_b}' ({b}{unit}). Their losses do not belong in one fit; put them into folders of their own.")
    return table
