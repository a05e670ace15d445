"""Compares runs: tables and figures as one HTML page without other files, and as Markdown.

    python tools/report.py out/a out/b --out=report     # runs, or folders of runs
    python tools/report.py out/run --watch=True         # renew the page while the run trains
    python tools/report.py out/a out/b --metric=bpb     # runs of different tokenizers or data

Runs whose configs differ only in the seed form one arm. Every arm is compared with the first one,
seed by seed: the mean difference and its 95 % interval (Student's t), without an interval for one
seed. An interval is of one comparison alone. The column p is of the paired t-test, by Holm's
correction over all comparisons of its table. The mean loss gives equal weights to the sources that
all runs evaluate, because `val/loss` follows the mixture weights of its run. With --sources the
mean is over these, and the table of arms has the other sources beside it. Unfinished runs are
listed and marked. They do not take part in differences.
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
from dataclasses import dataclass

import numpy as np
from scipy import stats

if __name__ == '__main__':
    import _path  # noqa: F401  (it puts the project's folder on the import path)

from configurator import BadInput, at_least, configure, one_of, pick, read_json
from model import ModelConfig, count_parameters
from tools.commands import warn_unused
from tools.plots import draw_report
from tools.runs import flops_of, planned_steps, read_run

# -- knobs --
out = 'report'                          # folder for report.html, report.md and the figures
metric: one_of('loss', 'bpb') = 'loss'  # loss (nats per token) | bpb (bits per byte)
sources: list[str] = []                 # the mean is over these. []: all that every run evaluates
watch = False                           # renew the page until all runs have ended. For a folder of
                                        # runs: and until none began during 12 renewals
refresh: at_least(0.0) = 10.0           # seconds between two renewals

HOLM = "Holm's correction over all comparisons of this table"
# Knobs in which the runs of one arm may differ.
FREE_KNOBS = (
    'seed', 'out_dir', 'resume', 'skillit_graph', 'doremi_reference', 'continue_from', 'stop_step')


# -- reading ---------------------------------------------------------------------------------------


def find_folders(paths):
    """Folders of runs: the paths themselves where they are runs, else all runs below them."""
    found = []
    for path in paths:
        if not os.path.isdir(path):
            raise BadInput(f"'{path}' is no folder. Name runs of train.py, or folders of them.")
        if os.path.isfile(os.path.join(path, 'config.json')):
            found.append(path)
            continue
        pattern = os.path.join(glob.escape(path), '**', 'metrics.jsonl')
        below = sorted(os.path.dirname(p) for p in glob.glob(pattern, recursive=True))
        if not below:
            raise BadInput(f"'{path}' has no run in it: no metrics.jsonl.")
        found += below
    # A run may be named twice: by itself, and through a folder above it.
    return list(dict.fromkeys(found))


def name_arms(runs):
    """Puts runs whose configs differ only in FREE_KNOBS into one arm. Returns the arms' names.

    An arm has the name of its first run without the seed.
    """
    arms = {}               # config as text -> name
    for run in runs:
        # The config decides and not the folder's name, because names are the user's.
        compared = {k: v for k, v in run.config.items() if k not in FREE_KNOBS}
        key = json.dumps(compared, sort_keys=True)
        if key not in arms:
            taken = arms.values()
            name = re.sub(r'[-_]?(seed[-_]?)?\d+$', '', run.name) if len(runs) > 1 else run.name
            if not name or name in taken:
                name = run.name
            arms[key] = f'{name} ({len(arms)})' if name in taken else name
        run.arm = arms[key]
    return list(arms.values())


def sources_of(run, metric):
    """The sources that a run evaluates by the metric."""
    prefix = f'val/{metric}_'
    return [key.removeprefix(prefix) for key in run.final if key.startswith(prefix)]


def validation_hashes(run, source):
    """Hashes of a source's validation shards. None: the data folder does not exist any more."""
    path = os.path.join(run.config['data_dir'], source, 'meta.json')
    if not os.path.isfile(path):
        return None
    try:
        shards = read_json(path).get('shards', [])
        return tuple(shard['sha256'] for shard in shards if shard.get('split') == 'val')
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f'{path} is no meta.json of a source ({type(error).__name__}: {error}). Restore it, or '
            'prepare the source again.') from None


def check_comparable(runs, sources, metric):
    """Remarks on differences that make bits per byte less comparable.

    Raises BadInput if losses were taken with different tokenizers or on different validation rows.
    """
    remarks = []
    first = runs[0]
    for run in runs[1:]:
        different = []
        if first.tokenizer and run.tokenizer and first.tokenizer != run.tokenizer:
            different.append('tokenizers')
        for source in sources:
            # A run may have been trained on another machine, whose data cannot be checked here.
            hashes = (validation_hashes(first, source), validation_hashes(run, source))
            if None not in hashes and hashes[0] != hashes[1]:
                different.append(f"validation data of '{source}'")
        if any(first.config[k] != run.config[k] for k in ('eval_rows', 'block_size', 'packing')):
            different.append('eval_rows, block_size or packing')
        for what in different:
            # A loss per token depends on the tokenizer, so it cannot be compared across tokenizers.
            if metric == 'loss':
                raise BadInput(
                    f"runs '{first.name}' and '{run.name}' have different {what}: their losses are "
                    'not comparable. Report them separately, or say --metric=bpb.')
            remarks.append(
                f"'{first.name}' and '{run.name}' have different {what}: bits per byte are "
                'compared, and the text may not be the same.')
    lengths = {run.tokens for run in runs if run.status == 'finished'}
    if len(lengths) > 1:
        remarks.append(
            f'The runs were trained on different numbers of tokens ({min(lengths):,} to '
            f'{max(lengths):,}).')
    return remarks


# -- statistics ------------------------------------------------------------------------------------


def paired_differences(runs, arm, base, measure):
    """Differences arm - base of the seeds that both have finished: list of float.

    measure     function of a Run that returns a number
    """
    # Differences of the same seed cancel what the seed does to both runs: data order and weights.
    measured = {}           # (arm, seed) -> number
    for run in runs:
        if run.arm in (arm, base) and run.status == 'finished' and run.final:
            measured[run.arm, run.seed] = measure(run)
    d = []
    for (name, seed), number in measured.items():
        if name == arm and (base, seed) in measured:
            d.append(number - measured[base, seed])
    return d


def paired(runs, arm, base, measure):
    """Mean of `paired_differences` and its 95 % interval.

    Returns (mean, low, high). low and high are None for one seed, all are None without a seed.
    """
    d = paired_differences(runs, arm, base, measure)
    if not d:
        return None, None, None
    mean = float(np.mean(d))
    if len(d) == 1:
        return mean, None, None
    # Student's t, because few seeds give a poor estimate of the standard deviation.
    half = stats.t.ppf(0.975, len(d) - 1) * np.std(d, ddof=1) / len(d)**0.5
    return mean, float(mean - half), float(mean + half)


def paired_p(runs, arm, base, measure):
    """Two-sided p of the paired t-test on `paired_differences`. None for fewer than two seeds."""
    d = paired_differences(runs, arm, base, measure)
    if len(d) < 2:
        return None
    error = np.std(d, ddof=1) / len(d)**0.5
    if error == 0:                  # the test is undefined: the arms differ by a constant, or not
        return float(np.mean(d) == 0)
    return float(2 * stats.t.sf(abs(np.mean(d)) / error, len(d) - 1))


def holm(p_values):
    """p values by Holm's correction (1979) for their number: list of float.

    With so many comparisons, the chance that one of no effect comes out below a level is at most
    that level. None stays None and does not count as a comparison.
    """
    p = [value for value in p_values if value is not None]
    corrected = {}                  # p -> corrected p
    highest = 0.0
    for n_smaller, value in enumerate(sorted(p)):
        # A comparison cannot be clearer than one of a smaller p.
        highest = max(highest, min(1.0, (len(p) - n_smaller) * value))
        # Of equal values, the first has the largest factor, and the others must not be below it.
        corrected[value] = highest
    return [None if value is None else corrected[value] for value in p_values]


def p_text(p):
    return 'n/a' if p is None else f'{p:.2g}'


def difference(found, digits=4):
    """The result of `paired` as text."""
    mean, low, high = found
    if mean is None:
        return 'n/a'
    if low is None:
        return f'{mean:+.{digits}f} (one seed, no interval)'
    return f'{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})'


def mean_and_range(values, digits=4):
    if not len(values):
        return 'n/a'
    mean = f'{np.mean(values):.{digits}f}'
    if len(values) == 1:
        return mean
    return f'{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})'


# -- tables ----------------------------------------------------------------------------------------
# A table is (header, rows), lists of text.


@dataclass
class Comparison:
    """What the tables are made of."""
    runs: list
    arms: list              # names of the arms, the first is the baseline
    sources: list           # evaluated by all runs
    averaged: list          # those of them that the mean is over
    metric: str             # loss | bpb

    def value(self, run, source):
        return run.final[f'val/{self.metric}_{source}']

    def loss_of(self, source):
        """A function of a run: its loss of the source."""
        return lambda run: self.value(run, source)

    def mean(self, run):
        return float(np.mean([self.value(run, source) for source in self.averaged]))

    def of_arm(self, arm):
        return [run for run in self.runs if run.arm == arm]

    def finished(self, arm):
        return [run for run in self.of_arm(arm) if run.status == 'finished' and run.final]

    @property
    def others(self):
        """The sources that the mean leaves out."""
        return [source for source in self.sources if source not in self.averaged]

    def difference(self, arm, measure):
        return difference(paired(self.runs, arm, self.arms[0], measure))

    def p_values(self, measures):
        """p of all arms but the first by all measures, corrected together: list of lists."""
        p = []
        for arm in self.arms[1:]:
            p += [paired_p(self.runs, arm, self.arms[0], measure) for measure in measures]
        p = holm(p)
        n = len(measures)
        return [p[i:i + n] for i in range(0, len(p), n)]


def median_of(records, key):
    """The median of a metric over the records that have it. nan: none has."""
    values = [r[key] for r in records if r.get(key)]
    return float(np.median(values)) if values else math.nan


def perplexity_of(loss):
    # The exponential of a larger loss has no float.
    return f'{math.exp(loss):.3f}' if loss < 700 else 'inf'


def table_of_runs(c):
    rows = []
    for run in c.runs:
        # Recent records only: first steps compile, and a resumed run may be on another machine.
        speed = median_of(run.records[-50:], 'train/tokens_per_second')
        last = planned_steps(run.config)
        state = run.status
        if state != 'finished':
            state += f' at step {run.step:,}' + (f' of {last:,}' if last else '')
        # A run that counts epochs has no planned end.
        if run.status == 'training' and last and speed > 0:
            left_s = (last - run.step) * run.config['total_batch_tokens'] / speed
            state += f', {left_s / 60:.0f} minutes to go'
        mean = 'none yet'
        perplexity = ''
        if run.final:
            mean = f'{c.mean(run):.4f}'
            perplexity = perplexity_of(c.mean(run)) if c.metric == 'loss' else ''
        rows.append([
            run.name, run.arm, str(run.seed), state, f'{run.tokens:,}', mean, perplexity,
            f'{speed:,.0f}' if speed > 0 else ''])
    header = ['run', 'arm', 'seed', 'state', 'tokens', f'mean {c.metric}', 'perplexity', 'tokens/s']
    return header, rows


def table_of_arms(c):
    # The first arm is compared with nothing.
    p = [[None], *c.p_values([c.mean])]
    rows = []
    for arm, (p_mean,) in zip(c.arms, p, strict=True):
        is_first = arm == c.arms[0]
        runs = c.finished(arm)
        values = [c.mean(run) for run in runs]
        perplexity = ''
        if values and c.metric == 'loss':
            perplexity = perplexity_of(np.mean(values))
        against = 'the first' if is_first else c.difference(arm, c.mean)
        row = [arm, str(len(values)), mean_and_range(values), perplexity, against]
        row.append('' if is_first else p_text(p_mean))
        for source in c.others:
            row.append(mean_and_range([c.value(run, source) for run in runs]))
            row.append('' if is_first else c.difference(arm, c.loss_of(source)))
        rows.append(row)
    header = ['arm', 'seeds', f'mean {c.metric} (range)', 'perplexity']
    header += [f'against {c.arms[0]} (95 %)', 'p (Holm)']
    for source in c.others:
        header += [f'{source} (range)', f'{source} against {c.arms[0]} (95 %)']
    return header, rows


def table_of_sources(c):
    measures = [c.loss_of(source) for source in c.sources]
    p = c.p_values(measures)
    rows = []
    # The row of an arm is followed by the row of its differences from the first arm.
    for i, arm in enumerate(c.arms):
        runs = c.finished(arm)
        rows.append([arm, *(mean_and_range([f(run) for run in runs]) for f in measures)])
        if i == 0:
            continue
        differences = [f'{arm} − {c.arms[0]}']
        for measure, of_source in zip(measures, p[i - 1], strict=True):
            text = c.difference(arm, measure)
            differences.append(text if of_source is None else f'{text}, p {p_text(of_source)}')
        rows.append(differences)
    return ['arm', *c.sources], rows


def weights_of(run):
    """Sampling weights of a run's first and last logged step: list of dicts source -> share."""
    prefix = 'mixture/weight_'
    logged = []
    for record in run.records:
        weights = {k.removeprefix(prefix): v for k, v in record.items() if k.startswith(prefix)}
        if weights:
            logged.append(weights)
    return logged[:1] + logged[-1:]


def table_of_weights(c):
    weights = {run.folder: weights_of(run) for run in c.runs}
    names = list(dict.fromkeys(name for both in weights.values() for w in both for name in w))
    rows = []
    for arm in c.arms:
        for when, label in ((0, 'first'), (-1, 'last')):
            found = [weights[run.folder][when] for run in c.of_arm(arm) if weights[run.folder]]
            cells = [mean_and_range([w[name] for w in found if name in w], 3) for name in names]
            rows.append([arm, label, *cells])
    return ['arm', 'step', *names], rows


def benchmarks_of(run):
    """Scores of a run: name -> (score, standard error over the documents or None).

    They are those of eval.json, and those of the last evaluation of benchmarks while training.
    """
    found = {}
    if os.path.isfile(os.path.join(run.folder, 'eval.json')):
        # Imported here because it imports torch and the tokenizers, which take seconds.
        from tools.benchmarks import read_results
        for task, result in read_results(run.folder).items():
            for name, pair in result['metrics'].items():
                found[f'{task} {name}'] = pair
    for key, score in run.final.items():
        if key.startswith('eval/'):
            found[f'{key} (while training)'] = (score, None)
    return found


def table_of_benchmarks(c):
    """Means over the seeds with their range. A score of one seed has its standard error instead."""
    scores = {run.folder: benchmarks_of(run) for run in c.runs}
    rows = []
    for name in dict.fromkeys(name for of_run in scores.values() for name in of_run):
        cells = []
        for arm in c.arms:
            of_arm = [scores[run.folder] for run in c.of_arm(arm)]
            found = [of_run[name] for of_run in of_arm if name in of_run]
            cell = mean_and_range([score for score, _ in found])
            # An error over documents and a range over seeds differ in kind, so a cell has only one.
            if len(found) == 1 and found[0][1] is not None:
                cell += f' ± {found[0][1]:.4f}'
            cells.append(cell)
        rows.append([name, *cells])
    return ['task', *c.arms], rows


def table_of_costs(c):
    rows = []
    for arm in c.arms:
        runs = c.of_arm(arm)
        flops = [flops_of(run.config, run.tokens, run.records) for run in runs]
        trained, extra = np.mean(flops, 0)
        steps_s = []
        measured_s = []
        for run in runs:
            # The median leaves out the steps that waited for evaluations or checkpoints.
            steps_s.append(run.step * (median_of(run.records, 'system/step_ms') / 1e3))
            measured_s.append(sum(r.get('system/mixture_ms', 0) for r in run.records) / 1e3)
        # All runs of an arm have the same model.
        n_params = count_parameters(pick(ModelConfig, runs[0].config))['total']
        rows.append([
            arm, f'{n_params / 1e6:.2f}M', f'{np.mean([run.tokens for run in runs]):,.0f}',
            f'{trained:.3g}', f'{extra / trained:.1%}' if trained else 'n/a',
            f'{np.nanmean(steps_s) / 60:.1f}' if np.isfinite(steps_s).any() else 'n/a',
            f'{np.mean(measured_s):.1f}'])
    header = ['arm', 'parameters', 'tokens', 'training FLOPs', 'measurements besides']
    return [*header, 'minutes of steps', 'seconds of re-weighting'], rows


def table_of_knobs(c):
    """The knobs in which the arms differ."""
    # All runs of an arm have the same config, so the first one stands for it.
    configs = [c.of_arm(arm)[0].config for arm in c.arms]
    rows = []
    for knob in dict.fromkeys(knob for config in configs for knob in config):
        values = [config.get(knob) for config in configs]
        if knob not in FREE_KNOBS and any(value != values[0] for value in values):
            rows.append([knob, *(str(value) for value in values)])
    return ['knob', *c.arms], rows


# -- the page --------------------------------------------------------------------------------------


@dataclass
class Section:
    title: str
    text: str = ''
    table: tuple | None = None      # (header, rows)
    figure: str | None = None       # path of a PNG


def compare(runs, sources, metric):
    """The Comparison of some runs, and remarks about it: a list of sentences.

    sources     names that the mean is over. []: all that every run evaluates
    Raises BadInput if the runs have nothing in common that can be compared.
    """
    arms = name_arms(runs)
    evaluated = [run for run in runs if run.final]
    # While the first run has no evaluation yet, --watch shows the other tables.
    if not evaluated:
        return Comparison(runs, arms, [], [], metric), []
    every = {}              # source -> number of runs that evaluate it
    # `val/loss` itself is no common measure: it is weighted by the mixture of its run.
    for run in evaluated:
        for name in sources_of(run, metric):
            every[name] = every.get(name, 0) + 1
    common = [name for name, count in every.items() if count == len(evaluated)]
    if not common:
        hint = ' Bits per byte need a tokenizer beside the shards.' if metric == 'bpb' else ''
        raise BadInput(f'there is no source that all runs evaluate by {metric}.{hint}')
    unknown = [name for name in sources if name not in common]
    if unknown:
        names = ', '.join(common)
        raise BadInput(f"sources: '{unknown[0]}' is not evaluated by all runs, only {names} are.")
    remarks = check_comparable(evaluated, common, metric)
    left_out = sorted(set(every) - set(common))
    if left_out:
        remarks.append(f'Not evaluated by all runs and left out: {", ".join(left_out)}.')
    averaged = [name for name in common if not sources or name in sources]
    return Comparison(runs, arms, common, averaged, metric), remarks


def build(runs, out, sources, metric):
    """All sections of the page about some runs. Draws their figures into the folder `out`."""
    c, remarks = compare(runs, sources, metric)
    for run in runs:
        if run.status == 'diverged':
            remarks.append(
                f"'{run.name}' has diverged: its last losses are not finite. It takes no part in "
                'the differences.')
        elif run.status != 'finished':
            remarks.append(
                f"'{run.name}' is not finished ({run.status} at step {run.step:,}): it takes no "
                'part in the differences.')
    sections = [Section('Runs', ' '.join(remarks), table_of_runs(c))]
    if len(c.arms) > 1:
        beside = f' Beside it, each alone: {", ".join(c.others)}.' if c.others else ''
        text = (
            f'Mean {metric} of {", ".join(c.averaged)} with equal weights.{beside} Perplexity is '
            'exp of the mean. Differences are between runs of the same seed, and an interval is of '
            f'one comparison alone. p is of the mean, by the paired t-test and {HOLM}.')
        sections.append(Section('Arms', text, table_of_arms(c)))
    text = f'Final validation {metric} of every source.'
    if len(c.arms) > 1:
        text += f' p is by the paired t-test and {HOLM}.'
    sections.append(Section('Sources', text, table_of_sources(c)))
    text = 'Sampling weights of the first and the last logged step, mean over the seeds (range).'
    sections.append(Section('Weights', text, table_of_weights(c)))
    os.makedirs(out, exist_ok=True)
    for title, path in draw_report(out, runs, c.arms, c.sources, metric):
        sections.append(Section(title, figure=path))
    scores = table_of_benchmarks(c)
    if scores[1]:
        text = 'Standard errors (one run) are over the documents. Ranges are over the seeds.'
        sections.append(Section('Benchmarks', text, scores))
    text = 'FLOPs by the count of PaLM. Measurements of a mixture method are a share of them.'
    sections.append(Section('Cost', text, table_of_costs(c)))
    knobs = table_of_knobs(c)
    if knobs[1]:
        sections.append(Section('What differs', table=knobs))
    return sections


def to_markdown(sections):
    lines = ['# Report', '']
    for section in sections:
        lines += [f'## {section.title}', '']
        if section.text:
            lines += [section.text, '']
        if section.table:
            header, rows = section.table
            lines += ['| ' + ' | '.join(header) + ' |', '|---' * len(header) + '|']
            for row in rows:
                # An unescaped bar in a name would begin another column.
                lines.append('| ' + ' | '.join(cell.replace('|', '\\|') for cell in row) + ' |')
            lines.append('')
        if section.figure:
            lines += [f'![{section.title}]({os.path.basename(section.figure)})', '']
    return '\n'.join(lines)


STYLE = '''body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:70rem;padding:1rem}
body{color:#222;background:#fff}h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem}
th,td{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{border-bottom:2px solid #999}
img{max-width:100%;height:auto}p{max-width:45rem}
@media(max-width:40rem){img{max-width:none;width:36rem}
td:first-child{white-space:normal;overflow-wrap:anywhere;min-width:6rem}}'''


def to_html(sections, refresh_s):
    """One page with its figures inside. It reloads itself every refresh_s seconds (None: never)."""
    parts = []
    for section in sections:
        parts.append(f'<h2>{html.escape(section.title)}</h2>')
        if section.text:
            parts.append(f'<p>{html.escape(section.text)}</p>')
        if section.table:
            header, rows = section.table
            parts.append('<div class="scroll"><table>')
            for tag, cells in [('th', header), *(('td', row) for row in rows)]:
                line = ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)
                parts.append(f'<tr>{line}</tr>')
            parts.append('</table></div>')
        if section.figure:
            # The figure is part of the page, so the file can be sent or moved alone.
            with open(section.figure, 'rb') as f:
                data = base64.b64encode(f.read()).decode()
            parts.append(
                f'<div class="scroll"><img alt="{html.escape(section.title)}" '
                f'src="data:image/png;base64,{data}"></div>')
    reload = '' if refresh_s is None else f'<meta http-equiv="refresh" content="{refresh_s:g}">'
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">{reload}'
        f'<title>Report</title><style>{STYLE}</style></head><body><h1>Report</h1>'
        f'<p>{time.strftime("%Y-%m-%d %H:%M:%S")}</p>{"".join(parts)}</body></html>')


def write(out, sections, refresh_s):
    """Writes report.md and report.html to the folder `out`."""
    pages = {'report.md': to_markdown(sections), 'report.html': to_html(sections, refresh_s)}
    for name, text in pages.items():
        path = os.path.join(out, name)
        with open(path + '.tmp', 'w', encoding='utf-8') as f:
            f.write(text)
        # Renaming is atomic, so a browser never loads half a page.
        os.replace(path + '.tmp', path)


if __name__ == '__main__':
    paths = [a for a in sys.argv[1:] if not a.startswith('-')]
    knobs = [a for a in sys.argv[1:] if a.startswith('-')]
    configure(globals(), knobs, verbose=False)
    if not paths:
        raise BadInput('name the runs: python tools/report.py out/a out/b --out=report')
    if not out:
        raise BadInput('out is empty: name a folder for the report, --out=report.')
    if not watch:
        warn_unused(knobs, ['refresh'], 'without --watch=True')
    # In a folder of runs the next run of a sweep may be about to start.
    patience = 0 if find_folders(paths) == paths else 12
    n_idle = 0              # renewals since a run trained
    n_runs = 0
    is_live = True
    while is_live:
        runs = [read_run(folder) for folder in find_folders(paths)]
        # With --watch the page is useful before an evaluation: it shows weights and throughput.
        if not watch and not any(run.final for run in runs):
            raise BadInput(
                'none of the runs has an evaluation with finite losses yet ('
                f'{", ".join(r.name for r in runs[:5])}). Wait for one, or say --watch=True.')
        is_training = any(run.status == 'training' for run in runs)
        # Decided before the page is written, so that the last page does not reload itself.
        n_idle = 0 if is_training else n_idle + 1
        is_live = watch and n_idle <= patience
        write(out, build(runs, out, sources, metric), refresh if is_live else None)
        # A line per renewal would flood the terminal during a sweep.
        if len(runs) != n_runs:
            n_runs = len(runs)
            print(f'{n_runs} runs: {out}/report.html, {out}/report.md', flush=True)
        if is_live:
            time.sleep(refresh)
