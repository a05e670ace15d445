"""Runs side by side: tables and figures as one HTML page that needs nothing else, and the same as Markdown.

    python tools/report.py out/a out/b --out=report                # runs, or folders of runs
    python tools/report.py out/run --watch=True                    # the page renews itself while the run trains
    python tools/report.py out/a out/b --metric=bpb                # runs of different tokenizers or data: bits per byte alone can be compared

Runs whose configs differ by seed alone are one arm. Every arm is compared with the first one, seed by seed: the mean of the differences and its 95 %
interval (Student's t), none with one seed. The mean loss is of equal weights over the sources that all runs evaluate, since `val/loss` follows the
weights of a run. Unfinished runs are listed and marked, and take no part in differences.
"""
import base64
import glob
import html
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field, fields

import numpy as np
from scipy import stats

if __name__ == '__main__':
    import _path  # noqa: F401

from configurator import BadInput, configure
from lib.device import read_metrics
from model import ModelConfig, count_parameters
from tools.plots import draw_report
from tools.runs import flops_of, is_finished, planned_steps, tokenizer_of

# -- knobs --
out = 'report'                          # folder: report.html, report.md, figures
metric = 'loss'                         # loss (nats per token) | bpb (bits per byte)
sources: list[str] = []                 # the mean is over these; []: all that every run evaluates
watch = False                           # renew the page until all runs have ended (of a folder of runs: and none began for 12 * refresh)
refresh = 10.0                          # seconds between two renewals

ALIKE = ('seed', 'out_dir', 'resume', 'skillit_graph', 'doremi_reference', 'continue_from', 'stop_step')       # in which runs of one arm may differ


@dataclass
class Entry:
    """A run as it is."""
    folder: str
    config: dict
    records: list
    status: str                         # finished | training | stopped
    step: int
    last: int | None                    # step that it is to end at
    final: dict                         # its last evaluation, {} when there is none
    tokenizer: str | None
    arm: str = ''
    benchmarks: dict = field(default_factory=dict)

    @property
    def name(self):
        return os.path.basename(os.path.normpath(self.folder))

    @property
    def seed(self):
        return self.config['seed']

    @property
    def tokens(self):
        return self.step * self.config['total_batch_tokens']

    def sources(self, metric):
        return [key.removeprefix(f'val/{metric}_') for key in self.final if key.startswith(f'val/{metric}_')]


# -- reading -----------------------------------------------------------------------------------------------------------

def find_folders(paths):
    """The run folders of what was named: runs themselves, or all below a folder."""
    found = []
    for path in paths:
        if not os.path.isdir(path):
            raise BadInput(f"'{path}' is no folder. Say `tools/report.py out/a out/b`: runs of train.py, or folders of them.")
        below = sorted(os.path.dirname(p) for p in glob.glob(os.path.join(glob.escape(path), '**', 'metrics.jsonl'), recursive=True))
        if not below and not os.path.isfile(os.path.join(path, 'config.json')):
            raise BadInput(f"'{path}' has no run in it: no metrics.jsonl.")
        found += [path] if os.path.isfile(os.path.join(path, 'config.json')) else below
    return list(dict.fromkeys(found))


def read_entry(folder):
    with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
        config = json.load(f)
    records = read_metrics(folder)
    evaluated = [r for r in records if 'val/loss' in r]
    path = os.path.join(folder, 'metrics.jsonl')
    steps = [r['system/step_ms'] / 1e3 for r in records[-20:] if r.get('system/step_ms')]
    patience = max(120.0, 20 * config['log_interval'] * float(np.median(steps)) if steps else 0)
    silent = time.time() - os.path.getmtime(path) if os.path.isfile(path) else math.inf
    status = 'finished' if is_finished(folder) else 'training' if silent < patience else 'stopped'
    results = {}
    if os.path.isfile(os.path.join(folder, 'eval.json')):
        from tools.benchmarks import read_results
        results = {f'{task} {name}': pair for task, r in read_results(folder).items() for name, pair in r['metrics'].items()}
    return Entry(folder, config, records, status, records[-1]['step'] if records else 0, planned_steps(config), evaluated[-1] if evaluated else {},
                 tokenizer_of(folder), benchmarks=results)


def name_arms(entries):
    """Runs of one config but for the seed become an arm, named as they are without the seed."""
    arms, names = {}, set()
    for entry in entries:
        key = json.dumps({k: v for k, v in entry.config.items() if k not in ALIKE}, sort_keys=True)
        if key not in arms:
            name = re.sub(r'[-_]?(seed[-_]?)?\d+$', '', entry.name) if len(entries) > 1 else entry.name
            name = name if name and name not in names else entry.name
            arms[key] = name if name not in names else f'{name} ({len(names)})'
            names.add(arms[key])
        entry.arm = arms[key]
    return list(arms.values())


def validation_of(entry, source):
    """What a source's loss was taken on: as much as the run and its data folder still say."""
    c = entry.config
    path, shards = os.path.join(c['data_dir'], source, 'meta.json'), None
    if os.path.isfile(path):
        with open(path, encoding='utf-8') as f:
            shards = tuple(s['sha256'] for s in json.load(f).get('shards', []) if s.get('split') == 'val')
    return shards, (c['eval_rows'], c['block_size'], c['packing'])


def check_comparable(entries, sources):
    """Remarks on what the runs have in common. BadInput for losses of different tokenizers or validation rows."""
    remarks = []

    def differ(what, a, b):
        if metric == 'loss':
            raise BadInput(f"runs '{a.name}' and '{b.name}' have different {what}: their losses are not comparable. Report them apart, or say --metric=bpb.")
        remarks.append(f"'{a.name}' and '{b.name}' have different {what}: bits per byte are compared, and the text may not be the same.")
    first = entries[0]
    for entry in entries[1:]:
        if None not in (first.tokenizer, entry.tokenizer) and first.tokenizer != entry.tokenizer:
            differ('tokenizers', first, entry)
        for source in sources:
            (a, how_a), (b, how_b) = validation_of(first, source), validation_of(entry, source)
            if None not in (a, b) and a != b:
                differ(f"validation data of '{source}'", first, entry)
            if how_a != how_b:
                differ('eval_rows, block_size or packing', first, entry)
    lengths = {entry.tokens for entry in entries if entry.status == 'finished'}
    if len(lengths) > 1:
        remarks.append(f'The runs were trained on different numbers of tokens ({min(lengths):,} to {max(lengths):,}).')
    return list(dict.fromkeys(remarks))


# -- tables ------------------------------------------------------------------------------------------------------------

def value(entry, sources):
    """Mean over the sources, equal weights."""
    return float(np.mean([entry.final[f'val/{metric}_{s}'] for s in sources])) if sources else math.nan


def paired(entries, arm, base, measure):
    """(mean, low, high, n): differences arm - base over the seeds that both have finished; low and high None with one seed, all None with none."""
    by_seed = [{e.seed: measure(e) for e in entries if e.arm == name and e.status == 'finished' and e.final} for name in (arm, base)]
    d = np.array([by_seed[0][seed] - by_seed[1][seed] for seed in by_seed[0] if seed in by_seed[1]])
    if not len(d):
        return None, None, None, 0
    half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / len(d)**0.5 if len(d) > 1 else None
    return float(d.mean()), None if half is None else float(d.mean() - half), None if half is None else float(d.mean() + half), len(d)


def difference(found, digits=4):
    mean, low, high, n = found
    return 'n/a' if mean is None else f'{mean:+.{digits}f}' + (f' ({low:+.{digits}f} to {high:+.{digits}f})' if low is not None else ' (one seed, no interval)')


def mean_and_range(values, digits=4):
    return 'n/a' if not len(values) else f'{np.mean(values):.{digits}f}' + (f' ({min(values):.{digits}f} to {max(values):.{digits}f})' if len(values) > 1 else '')


def table_of_runs(entries, sources):
    rows = []
    for e in entries:
        speed = [r['train/tokens_per_second'] for r in e.records[-50:] if r.get('train/tokens_per_second')]
        per_second = float(np.median(speed)) if speed else math.nan
        left = (e.last - e.step) * e.config['total_batch_tokens'] / per_second if e.last and speed and e.status == 'training' else None
        mean = value(e, sources) if e.final else math.nan
        marked = e.status if e.status == 'finished' else f'{e.status} at step {e.step:,} of {e.last:,}' if e.last else f'{e.status} at step {e.step:,}'
        marked += f', {left / 60:.0f} minutes to go' if left is not None else ''
        rows.append([e.name, e.arm, str(e.seed), marked, f'{e.tokens:,}', f'{mean:.4f}' if e.final else 'none yet',
                     (f'{math.exp(mean):.3f}' if metric == 'loss' else '') if e.final else '', f'{per_second:,.0f}' if speed else ''])
    return ['run', 'arm', 'seed', 'state', 'tokens', f'mean {metric}', 'perplexity', 'tokens/s'], rows


def table_of_arms(entries, arms, sources):
    rows = []
    for arm in arms:
        finished = [e for e in entries if e.arm == arm and e.status == 'finished' and e.final]
        values = [value(e, sources) for e in finished]
        rows.append([arm, str(len(finished)), mean_and_range(values), f'{math.exp(np.mean(values)):.3f}' if values and metric == 'loss' else '',
                     'the first' if arm == arms[0] else difference(paired(entries, arm, arms[0], lambda e: value(e, sources)))])
    return ['arm', 'seeds', f'mean {metric} (range)', 'perplexity', f'against {arms[0]} (95 %)'], rows


def table_of_sources(entries, arms, sources):
    rows = []
    for arm in arms:
        finished = [e for e in entries if e.arm == arm and e.status == 'finished' and e.final]
        rows.append([arm, *(mean_and_range([e.final[f'val/{metric}_{s}'] for e in finished]) for s in sources)])
        if arm != arms[0]:
            rows.append([f'{arm} − {arms[0]}', *(difference(paired(entries, arm, arms[0], lambda e, s=s: e.final[f'val/{metric}_{s}'])) for s in sources)])
    return ['arm', *sources], rows


def weights_of(entry):
    """The sampling weights of a run's first and last logged step, by source."""
    logged = [r for r in entry.records if any(k.startswith('mixture/weight_') for k in r)]
    return [{k.removeprefix('mixture/weight_'): v for k, v in r.items() if k.startswith('mixture/weight_')} for r in (logged[:1] + logged[-1:])]


def table_of_weights(entries, arms):
    names = list(dict.fromkeys(s for e in entries for w in weights_of(e) for s in w))
    rows = []
    for arm in arms:
        for when, label in ((0, 'first'), (1, 'last')):
            found = [weights_of(e)[when] for e in entries if e.arm == arm and weights_of(e)]
            rows.append([arm, label, *(mean_and_range([w[s] for w in found if s in w], 3) for s in names)])
    return ['arm', 'step', *names], rows


def table_of_benchmarks(entries, arms):
    """Scores of eval.json with standard errors (one seed), or the mean over seeds with its range; and of eval_tasks."""
    names = list(dict.fromkeys(name for e in entries for name in e.benchmarks))
    rows = []
    for name in names:
        cells = []
        for arm in arms:
            found = [e.benchmarks[name] for e in entries if e.arm == arm and name in e.benchmarks]
            cells.append('n/a' if not found else mean_and_range([score for score, _ in found]) if len(found) > 1 else
                         f'{found[0][0]:.4f}' + (f' ± {found[0][1]:.4f}' if found[0][1] is not None else ''))
        rows.append([name, *cells])
    for name in dict.fromkeys(k for e in entries for k in e.final if k.startswith('eval/')):
        rows.append([f'{name} (while training)', *(mean_and_range([e.final[name] for e in entries if e.arm == arm and name in e.final]) for arm in arms)])
    return ['task', *arms], rows


def table_of_costs(entries, arms):
    rows = []
    for arm in arms:
        of_arm = [e for e in entries if e.arm == arm]
        trained, extra = np.mean([flops_of(e.config, e.tokens, e.records) for e in of_arm], 0)
        step_s = [float(np.median([r['system/step_ms'] for r in e.records if r.get('system/step_ms')] or [math.nan])) / 1e3 for e in of_arm]
        measured = [sum(r.get('system/mixture_ms', 0) for r in e.records) / 1e3 for e in of_arm]
        seconds = [e.step * s for e, s in zip(of_arm, step_s)]
        model = ModelConfig(**{f.name: of_arm[0].config[f.name] for f in fields(ModelConfig)})
        rows.append([arm, f'{count_parameters(model)["total"] / 1e6:.2f}M', f'{np.mean([e.tokens for e in of_arm]):,.0f}', f'{trained:.3g}',
                     f'{extra / trained:.1%}' if trained else 'n/a', f'{np.nanmean(seconds) / 60:.1f}' if np.isfinite(seconds).any() else 'n/a', f'{np.mean(measured):.1f}'])
    return ['arm', 'parameters', 'tokens', 'FLOPs of training', 'measured beside it', 'minutes of steps', 'seconds of re-weighting'], rows


def table_of_knobs(entries, arms):
    """The knobs in which the arms differ."""
    configs = [next(e.config for e in entries if e.arm == arm) for arm in arms]
    keys = [k for k in dict.fromkeys(k for c in configs for k in c) if k not in ALIKE and len({json.dumps(c.get(k)) for c in configs}) > 1]
    return ['knob', *arms], [[k, *(str(c.get(k)) for c in configs)] for k in keys]


# -- the page ----------------------------------------------------------------------------------------------------------

def build(folders):
    """All sections [(title, text, (header, rows) or None, path of a figure or None)] of these runs, and whether one of them is still training."""
    if metric not in ('loss', 'bpb'):
        raise BadInput(f"metric = '{metric}' must be loss or bpb.")
    entries = [read_entry(folder) for folder in folders]
    if not watch and not any(e.final for e in entries):
        raise BadInput(f"none of the runs has an evaluation yet ({', '.join(e.name for e in entries[:5])}). Wait for one, or say --watch=True.")
    arms = name_arms(entries)
    compared = [e for e in entries if e.final]
    common = [s for s in (compared[0].sources(metric) if compared else []) if all(s in e.sources(metric) for e in compared)]
    if compared and not common:
        raise BadInput(f'the runs have no source in common that they evaluate by {metric}' + (
            '; bits per byte need a tokenizer beside the shards.' if metric == 'bpb' else ': nothing can be compared.'))
    unknown = [s for s in sources if s not in common]
    if unknown and compared:
        raise BadInput(f"sources: '{unknown[0]}' is not evaluated by all runs. There are {', '.join(common)}.")
    remarks = check_comparable(compared, common) if compared else []
    left_out = sorted({s for e in compared for s in e.sources(metric)} - set(common))
    remarks += [f'Not evaluated by all runs, and left out: {", ".join(left_out)}.'] if left_out else []
    remarks += [f"'{e.name}' is not finished ({e.status} at step {e.step:,}): it takes no part in the differences." for e in entries if e.status != 'finished']
    os.makedirs(out, exist_ok=True)
    mean_over = [s for s in common if not sources or s in sources]
    sections = [('Runs', ' '.join(remarks), table_of_runs(entries, mean_over), None)]
    if len(arms) > 1:
        sections += [('Arms', f'Mean {metric} of {", ".join(mean_over)}, equal weights; perplexity is exp of the mean. Differences are of the same seeds.',
                      table_of_arms(entries, arms, mean_over), None)]
    sections += [('Sources', f'Final validation {metric} of every source.', table_of_sources(entries, arms, common), None),
                 ('Weights', 'Sampling weights of the first and the last logged step, mean over seeds (range).', table_of_weights(entries, arms), None)]
    sections += [(title, '', None, path) for title, path in draw_report(out, entries, arms, common, metric)]
    scores = table_of_benchmarks(entries, arms)
    sections += [('Benchmarks', 'Standard errors are of the documents (one run), ranges of the seeds.', scores, None)] if scores[1] else []
    sections += [('Cost', 'FLOPs by the PaLM count; what was measured beside training as a share of it.', table_of_costs(entries, arms), None)]
    knobs = table_of_knobs(entries, arms)
    sections += [('What differs', '', knobs, None)] if knobs[1] else []
    return sections, any(e.status == 'training' for e in entries)


def to_markdown(sections):
    lines = ['# Report', '']
    for title, text, table, figure in sections:
        lines += [f'## {title}', ''] + ([text, ''] if text else [])
        if table:
            header, rows = table
            lines += ['| ' + ' | '.join(header) + ' |', '|---' * len(header) + '|', *('| ' + ' | '.join(c.replace('|', '\\|') for c in row) + ' |' for row in rows), '']
        if figure:
            lines += [f'![{title}]({os.path.basename(figure)})', '']
    return '\n'.join(lines)


STYLE = '''body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:70rem;padding:1rem;color:#222;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem}
th,td{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}th:first-child,td:first-child{text-align:left}
th{border-bottom:2px solid #999}img{max-width:100%;height:auto}p{max-width:45rem}
@media(max-width:40rem){img{max-width:none;width:36rem}td:first-child{white-space:normal;overflow-wrap:anywhere;min-width:6rem}}'''


def to_html(sections, live):
    """One page with its figures inside. live: it loads itself anew."""
    parts = []
    for title, text, table, figure in sections:
        parts.append(f'<h2>{html.escape(title)}</h2>' + (f'<p>{html.escape(text)}</p>' if text else ''))
        if table:
            header, rows = table
            body = ''.join('<tr>' + ''.join(f'<td>{html.escape(c)}</td>' for c in row) + '</tr>' for row in rows)
            parts.append('<div class="scroll"><table><tr>' + ''.join(f'<th>{html.escape(c)}</th>' for c in header) + f'</tr>{body}</table></div>')
        if figure:
            with open(figure, 'rb') as f:
                parts.append(f'<div class="scroll"><img alt="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(f.read()).decode()}"></div>')
    again = f'<meta http-equiv="refresh" content="{refresh:g}">' if live else ''
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">{again}'
            f'<title>Report</title><style>{STYLE}</style></head><body><h1>Report</h1><p>{time.strftime("%Y-%m-%d %H:%M:%S")}</p>{"".join(parts)}</body></html>')


def write(folders, live=False):
    """Writes the page and the Markdown; returns whether a run is still training. live: the page loads itself anew."""
    sections, training = build(folders)
    for name, text in (('report.md', to_markdown(sections)), ('report.html', to_html(sections, live))):
        path = os.path.join(out, name)
        with open(path + '.tmp', 'w', encoding='utf-8') as f:
            f.write(text)
        os.replace(path + '.tmp', path)                        # a browser never sees half a page
    return training


if __name__ == '__main__':
    paths = [a for a in sys.argv[1:] if not a.startswith('--')]
    configure(globals(), [a for a in sys.argv[1:] if a.startswith('--')], verbose=False)
    if not paths:
        raise BadInput('say which runs: python tools/report.py out/a out/b --out=report')
    _folders = find_folders(paths)
    _training = write(_folders, live=watch)
    print(f'{len(_folders)} runs: {os.path.join(out, "report.html")}, {os.path.join(out, "report.md")}', flush=True)
    _patience, _seen = 0 if _folders == paths else 12 * refresh, time.monotonic()          # seconds: the next run of a sweep may be about to start
    while watch and (_training or time.monotonic() - _seen < _patience):
        _seen = time.monotonic() if _training else _seen
        time.sleep(refresh)
        _training = write(find_folders(paths), live=True)
    if watch:
        write(find_folders(paths))
