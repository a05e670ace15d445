"""Figures of a run, of reports and sweeps, and of mixing laws.

Every figure is made without pyplot, which keeps global state and needs a display on some machines.
"""
import glob
import math
import os

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from configurator import BadInput, read_json
from lib.log import read_metrics
from methods import FIXED
from tools.runs import read_config, read_records


def _panels(n, columns, width, height, **options):
    """A figure with a grid of n panels of width x height inches. Returns it and the n axes."""
    rows = math.ceil(n / columns)
    # Without the constrained layout, rotated labels and colour bars overlap their neighbours.
    figure = Figure(figsize=(width * columns, height * rows), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for axis in axes[n:]:
        axis.set_axis_off()
    return figure, axes[:n]


def _save(figure, path):
    figure.savefig(path, dpi=110)
    return path


def _series(records, key):
    """(steps, values) of one metric. Records without it are left out."""
    # None stands for a number that was not finite, because JSON has no nan.
    found = [(r['step'], r[key]) for r in records if r.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _names(records, prefix):
    """The sources for which a metric `<prefix><source>` was logged, in order of appearance."""
    # A dict keeps the order, which decides the colours of the sources. A set would not.
    names = {}
    for record in records:
        for key in record:
            if key.startswith(prefix):
                names[key.removeprefix(prefix)] = True
    return list(names)


def _new_label(axis, label):
    """The label for the first line of a panel that has it, None for the others."""
    return None if label in axis.get_legend_handles_labels()[1] else label


def _heat_map(axis, values, texts, rows, columns, **options):
    """A matrix as colours, red for negative and blue for positive values, with a text in each cell.

    values and texts are rows x columns. Returns the image, for a colour bar.
    """
    # Symmetric limits, so that zero is white.
    limit = np.abs(values).max() or 1.0
    image = axis.imshow(values, cmap='RdBu', vmin=-limit, vmax=limit, **options)
    # The ends of the colour map are too dark for black text.
    for i, j in np.ndindex(len(rows), len(columns)):
        color = 'w' if abs(values[i][j]) > 0.6 * limit else 'k'
        axis.text(j, i, texts[i][j], ha='center', va='center', fontsize=8, color=color)
    axis.set(xticks=range(len(columns)), xticklabels=columns)
    axis.set(yticks=range(len(rows)), yticklabels=rows)
    return image


# -- one run -------------------------------------------------------------------------------------

def draw_run(out_dir):
    """Draws the losses of every source and the sampling weights over time.

    Returns the path of the PNG, out_dir/curves.png.
    """
    records = read_metrics(out_dir)
    figure, (left, right) = _panels(2, 2, 6, 4.5)
    # Grey and drawn first, so that the noisy training loss stays behind the others.
    left.plot(*_series(records, 'train/loss'), color='0.7', linewidth=1, label='training')
    for i, source in enumerate(_names(records, 'val/loss_')):
        losses = _series(records, f'val/loss_{source}')
        left.plot(*losses, color=f'C{i}', marker='o', markersize=3, label=source)
    left.set(xlabel='step', ylabel='loss (nats per token)')
    left.set_title('Validation loss of every source')
    left.legend()
    # The rows drawn show whether the sampler followed the weights.
    for i, source in enumerate(_names(records, 'mixture/weight_')):
        weights = _series(records, f'mixture/weight_{source}')
        drawn = _series(records, f'mixture/drawn_{source}')
        right.plot(*weights, color=f'C{i}', label=source)
        right.plot(*drawn, color=f'C{i}', linestyle=':', linewidth=1)
    right.set(xlabel='step', ylabel='share of rows', ylim=(0, None))
    right.set_title('Sampling weights (dotted: rows drawn)')
    right.legend()
    return _save(figure, os.path.join(out_dir, 'curves.png'))


def print_run(out_dir, epochs):
    """Prints the table at the end of a run: losses and bits per byte of every source.

    epochs  dict, source -> how many times the run has read it
    """
    evaluated = [record for record in read_metrics(out_dir) if 'val/loss' in record]
    first = evaluated[0]
    last = evaluated[-1]
    print(
        f'\n{"validation":<16}{"loss before":>12}{"after":>9}{"bits/byte before":>19}{"after":>9}'
        f'{"epochs read":>14}')
    for name, times in epochs.items():
        line = f'{name:<16}{first[f"val/loss_{name}"]:>12.3f}{last[f"val/loss_{name}"]:>9.3f}'
        for record, width in ((first, 19), (last, 9)):
            bpb = record.get(f'val/bpb_{name}')
            line += f'{"n/a":>{width}}' if bpb is None else f'{bpb:>{width}.3f}'
        print(f'{line}{times:>14.2f}')
    print(f'{"mixture":<16}{first["val/loss"]:>12.3f}{last["val/loss"]:>9.3f}')


def draw_table(path, rows, columns, values, errors, title):
    """Draws a heat map of values with their standard errors, both rows x columns. Returns path."""
    figure, (axis,) = _panels(1, 1, 2.5 + 1.3 * len(columns), 1.6 + 0.45 * len(rows))
    texts = []
    for row, row_errors in zip(values, errors, strict=True):
        texts.append([f'{x:.2f} ± {error:.2f}' for x, error in zip(row, row_errors, strict=True)])
    image = _heat_map(axis, values, texts, rows, columns, aspect='auto')
    axis.set_title(title)
    figure.colorbar(image, ax=axis)
    return _save(figure, path)


# -- reports -------------------------------------------------------------------------------------

def draw_report(out, entries, arms, sources, metric):
    """Draws the losses of every source, the weights of every arm, and the throughput.

    out      folder of the PNGs                     entries  list of tools.runs.Run
    arms     names; their order gives the colours   sources  whose losses are drawn; [] draws none
    metric   loss | bpb
    Returns [(title, path of the PNG)].
    """
    colors = {arm: f'C{i}' for i, arm in enumerate(arms)}
    figures = []
    if sources:
        losses = _draw_losses(entries, colors, sources, metric)
        figures.append(('Losses over time', _save(losses, os.path.join(out, 'losses.png'))))
    weights = _draw_arms(entries, arms)
    figures.append(('Weights over time', _save(weights, os.path.join(out, 'weights.png'))))
    speed = _draw_throughput(entries, colors)
    figures.append(('Throughput', _save(speed, os.path.join(out, 'throughput.png'))))
    return figures


def _draw_losses(entries, colors, sources, metric):
    """A panel for every source, with the loss of every run over tokens."""
    figure, axes = _panels(len(sources), min(2, len(sources)), 4.4, 3.2)
    for axis, source in zip(axes, sources, strict=True):
        for entry in entries:
            steps, values = _series(entry.records, f'val/{metric}_{source}')
            # Over tokens, because arms may differ in the size of their batches.
            tokens = np.array(steps) * entry.config['total_batch_tokens']
            label = _new_label(axis, entry.arm)
            style = dict(color=colors[entry.arm], linewidth=1.2, marker='.', markersize=4)
            axis.plot(tokens, values, label=label, **style)
        axis.set(title=source, xlabel='tokens', ylabel=metric)
        axis.xaxis.set_major_formatter(EngFormatter(sep=''))
    # With more arms than this, the legend would hide the curves.
    if len(colors) <= 12:
        axes[0].legend(fontsize=8)
    return figure


def _draw_arms(entries, arms):
    """A panel for every arm, with the sampling weights of its runs over steps."""
    figure, axes = _panels(len(arms), min(2, len(arms)), 4.4, 3.2)
    for axis, arm in zip(axes, arms, strict=True):
        for entry in entries:
            if entry.arm != arm:
                continue
            for i, source in enumerate(_names(entry.records, 'mixture/weight_')):
                weights = _series(entry.records, f'mixture/weight_{source}')
                label = _new_label(axis, source)
                axis.plot(*weights, color=f'C{i}', linewidth=1, label=label)
        top = 1.05 * axis.dataLim.ymax if axis.lines else None
        axis.set(title=arm, xlabel='step', ylabel='weight', ylim=(0, top))
    axes[0].legend(fontsize=8)
    return figure


def _draw_throughput(entries, colors):
    figure, (axis,) = _panels(1, 1, 7, 3)
    for entry in entries:
        speed = _series(entry.records, 'train/tokens_per_second')
        label = _new_label(axis, entry.arm)
        axis.plot(*speed, color=colors[entry.arm], linewidth=0.8, label=label)
    # From 0 on, so that small changes of the speed do not look large.
    axis.set(xlabel='step', ylabel='tokens per second', ylim=(0, None))
    if len(colors) <= 12:
        axis.legend(fontsize=8)
    return figure


# -- sweeps --------------------------------------------------------------------------------------

def draw_curves(out, means, curves, picks, unit, at):
    """Draws the Pareto front of loss over parameters at one point, and the curves of every band.

    out     folder of the PNGs             means   what tools.curves.by_label returns
    curves  list of tools.curves.Curve
    picks   dict, band -> the result of tools.curves.pick_architectures
    unit    step | tokens | flops          at      where on that axis the front is compared
    Returns the paths of the two PNGs.
    """
    means = sorted(means, key=lambda mean: mean.curve.params)
    front = _draw_front(means, f'{len(means)} shapes at {unit} {at:,.0f}')
    bands = _draw_bands(curves, picks, unit)
    return [
        _save(front, os.path.join(out, 'pareto.png')),
        _save(bands, os.path.join(out, 'bands.png')),
    ]


def draw_budget(path, curves):
    """Draws bits per byte against FLOPs spent, a line for every arm.

    curves: dict arm -> (n, 2) pairs of FLOPs, as a share of the budget, and bits per byte
    """
    figure, (axis,) = _panels(1, 1, 8, 5)
    for i, (arm, points) in enumerate(curves.items()):
        spent, values = np.asarray(points).T
        # Twenty lines need more than the ten colours.
        axis.plot(spent, values, label=arm, color=f'C{i % 10}', linestyle=('-', '--')[i // 10 % 2])
    axis.set(xlabel='FLOPs spent, share of the budget', ylabel='bits per byte of the goal')
    axis.legend(fontsize=8)
    return _save(figure, path)


def _draw_front(means, title):
    """Loss over parameters of every shape, coloured by depth. means is sorted by parameters."""
    params = np.array([mean.curve.params for mean in means])
    losses = np.array([mean.loss for mean in means])
    figure, (axis,) = _panels(1, 1, 7, 4.5)
    layers = [mean.curve.shape[1] for mean in means]
    points = axis.scatter(params, losses, s=8, c=layers, cmap='viridis')
    figure.colorbar(points, ax=axis, label='layers')
    # On the front, no smaller shape has a lower loss.
    front = losses <= np.minimum.accumulate(losses)
    label = 'nothing smaller is better'
    axis.step(params[front], losses[front], where='post', color='C3', linewidth=1, label=label)
    axis.set(title=title, xscale='log', xlabel='parameters', ylabel='loss (nats per token)')
    axis.legend()
    return figure


def _draw_bands(curves, picks, unit):
    """A panel for every band, with its picks in colour and its other models in grey."""
    figure, axes = _panels(len(picks), min(3, len(picks)), 4.6, 3.6)
    for axis, (name, band) in zip(axes, picks.items(), strict=True):
        for curve in curves:
            if not band['low'] <= curve.params <= band['high']:
                continue
            style = dict(linewidth=0.4, color='0.7')
            if curve.label in (band['lowest'], band['pick']):
                style = dict(linewidth=1.5, zorder=3, label=_new_label(axis, curve.label))
            axis.plot(curve.x[unit], curve.loss, **style)
        axis.axvline(band['at'], color='0.5', linestyle=':')
        values = np.array([row['loss'] for row in band['rows']])
        # The losses of the first steps are much higher. With them, the rest would look flat.
        bottom = values.min() - 0.1 * np.ptp(values) - 0.01
        top = values.max() + 0.5 * np.ptp(values) + 0.05
        axis.set(xlim=(0, 2 * band['at']), ylim=(bottom, top))
        axis.set(title=f'{name} parameters', xlabel=unit, ylabel='loss')
        axis.legend(fontsize=7)
    return figure


# -- mixing laws ---------------------------------------------------------------------------------

def draw_laws(path):
    """Draws what tools/mixing_laws.py wrote: one file, or all such files in a folder.

    For a folder it also draws the weights of every run below it whose method moves them.
    Returns the paths of the PNGs. Raises BadInput when there is nothing to draw.
    """
    # regmix.json and sim.json hold a few numbers, and have no figure.
    files = [path]
    if not os.path.isfile(path):
        files = [os.path.join(path, f'{name}.json') for name in ('static', 'dynamic', 'a_star')]
    paths = []
    for file in files:
        if os.path.isfile(file):
            figure = _draw_fits(file)
            paths.append(_save(figure, file.removesuffix('.json') + '.png'))
    runs = _moving_runs(path)
    if runs:
        paths.append(_save(_draw_weights(runs), os.path.join(path, 'weights.png')))
    if not paths:
        raise BadInput(
            f"'{path}' has no static.json, dynamic.json or a_star.json, and no run whose weights "
            'move. Fit something first.')
    return paths


def _draw_fits(path):
    """The figure of a static.json, dynamic.json or a_star.json."""
    fitted = read_json(path)
    try:
        return _draw_static(fitted) if 'optimum' in fitted else _draw_matrices(fitted)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(
            f'{path} does not hold what tools/mixing_laws.py writes ({type(error).__name__}: '
            f'{error}). Fit it again.') from None


def _moving_runs(folder):
    """The runs at any depth below a folder whose method moves the weights.

    Returns a dict, method -> [(weights at the start, records of metrics.jsonl)].
    """
    found = {}
    pattern = os.path.join(glob.escape(folder), '**', 'config.json')
    for path in sorted(glob.glob(pattern, recursive=True)):
        run = os.path.dirname(path)
        # The config.json of an imported model has no run beside it.
        if not os.path.isfile(os.path.join(run, 'metrics.jsonl')):
            continue
        config = read_config(run)
        total = sum(config['sources'].values())
        if config['mixture'] in FIXED or total <= 0:
            continue
        # A config may give weights that do not sum to 1.
        start = {name: weight / total for name, weight in config['sources'].items()}
        found.setdefault(config['mixture'], []).append((start, read_records(run)))
    return found


def _draw_weights(runs):
    """A panel for every source, with its weight over the steps and a colour for every method.

    A run is a thin line. The mean over runs is a thick one, if they changed at the same steps.
    """
    every = [record for parts in runs.values() for _, records in parts for record in records]
    sources = _names(every, 'mixture/asked_')
    figure, axes = _panels(len(sources), len(sources), 4.2, 3.8, sharey=True)
    for axis, source in zip(axes, sources, strict=True):
        for i, (method, parts) in enumerate(runs.items()):
            lines = []
            for start, records in parts:
                # The rule's answer, not the sampling weights: those of a proxy stay equal, and
                # those of aioli follow its exploration.
                steps, weights = _series(records, f'mixture/asked_{source}')
                lines.append(([0, *steps], [start[source], *weights]))
            thin = dict(where='post', color=f'C{i}', linewidth=0.5, alpha=0.5)
            for steps, weights in lines:
                axis.step(steps, weights, **thin)
            mean_steps = mean = []
            if all(steps == lines[0][0] for steps, _ in lines):
                mean_steps = lines[0][0]
                mean = np.mean([weights for _, weights in lines], 0)
            # Without a mean, the empty line still gives the method its entry in the legend.
            axis.step(mean_steps, mean, where='post', color=f'C{i}', linewidth=2, label=method)
        axis.set(title=source, xlabel='step')
    axes[0].set_ylabel('weight')
    axes[0].legend()
    return figure


def _draw_static(fitted):
    """Predicted against observed losses of every group, and the mean loss over the mixtures."""
    evaluated = fitted['evaluated']
    figure, axes = _panels(len(evaluated) + 1, len(evaluated) + 1, 4, 4)
    p = np.array(fitted['p'])                                                          # (n, m)
    losses = np.array(fitted['loss'])                                                  # (n, k)
    # The optimum is that of all runs, so the fits of single seeds would not belong to it.
    laws = {fit['group']: fit for fit in fitted['fits'] if fit['seed'] == 'all'}
    for axis, group, observed in zip(axes, evaluated, losses.T, strict=False):
        _draw_fit(axis, laws[group], observed, _predict(laws[group], p))

    def mean_loss(p):
        return np.mean([_predict(laws[group], p) for group in evaluated], 0)

    last = axes[-1]
    best = fitted['optimum']
    if len(fitted['groups']) == 3:
        _draw_triangle(figure, last, fitted, mean_loss)
    elif len(fitted['groups']) == 2:
        share = np.linspace(0, 1, 101)
        last.plot(share, mean_loss(np.column_stack((share, 1 - share))))
        last.scatter(p[:, 0], losses.mean(1), s=10, color='k')
        last.axvspan(best['low'][0], best['high'][0], alpha=0.2)
        last.set(xlabel=f'share of {fitted["groups"][0]}')
    else:
        # The best mixture of all runs can lie outside the interval of its resamples.
        below = np.subtract(best['p'], best['low'])
        above = np.subtract(best['high'], best['p'])
        last.bar(fitted['groups'], best['p'], yerr=np.maximum([below, above], 0))
        last.tick_params(axis='x', rotation=60)
    last.set_title('mean loss and its lowest mixture')
    return figure


def _predict(law, p):
    """The static law of one group: mixtures p (n, m) -> losses (n,)."""
    return law['c'] + np.exp(law['log_b'] - p @ np.array(law['A']))


def _draw_fit(axis, law, observed, predicted):
    """Predicted against observed losses (n,) of one group, with an inset of the residuals."""
    ends = [min(observed.min(), predicted.min()), max(observed.max(), predicted.max())]
    axis.plot(ends, ends, color='0.8')
    axis.scatter(observed, predicted, s=12)
    left_out = law['leave_one_out']['r2']
    axis.set_title(f'{law["group"]}: R2 {law["fit"]["r2"]:.3f}, one out {left_out:.3f}')
    axis.set(xlabel='observed (nats per token)', ylabel='predicted')
    inset = axis.inset_axes([0.6, 0.08, 0.37, 0.28])
    inset.axhline(0, color='0.8')
    inset.scatter(observed, observed - predicted, s=4)
    inset.set_title('residuals', fontsize=7)
    inset.tick_params(labelsize=6)


def _draw_triangle(figure, axis, fitted, mean_loss):
    """The mean loss over all mixtures of three groups, with the runs and the lowest mixture."""
    shares = np.linspace(0, 1, 61)
    # The tolerance keeps points on the edge, whose shares may sum to slightly more than 1.
    grid = np.array([(a, b, 1 - a - b) for a in shares for b in shares if a + b <= 1 + 1e-9])
    mean = mean_loss(grid)
    # Levels at quantiles, because the loss is flat around its minimum and steep at the corners.
    levels = np.quantile(mean, np.linspace(0, 1, 16))
    image = axis.tricontourf(*_on_triangle(grid), mean, levels=levels, cmap='viridis_r')
    figure.colorbar(image, ax=axis, format='%.2f')
    axis.scatter(*_on_triangle(np.array(fitted['p'])), s=10, color='k')
    axis.scatter(*_on_triangle(np.array([fitted['optimum']['p']])), marker='*', s=160, color='r')
    for name, x, y in zip(fitted['groups'], *_on_triangle(np.eye(3)), strict=True):
        axis.text(x, y + (0.03 if y > 0.5 else -0.07), name, ha='center')
    axis.set_axis_off()


def _on_triangle(p):
    """Shares (n, 3) -> x (n,) and y (n,) in an equilateral triangle."""
    return p[:, 1] + 0.5 * p[:, 2], p[:, 2] * 0.75**0.5


def _draw_matrices(fitted):
    """Heat maps of A of every parent, or of A* and the measured A of every method (seed means)."""
    panels = []
    if 'methods' in fitted:
        columns = 2
        for name, method in fitted['methods'].items():
            panels.append((f'{name}: A*', np.mean(method['A_star'], 0)))
            panels.append((f'{name}: measured A', np.mean(method['A'], 0)))
    else:
        panels = [(fit['parent'], np.array(fit['A'])) for fit in fitted['fits']]
        columns = min(3, len(panels))
    rows = fitted.get('evaluated', fitted['groups'])
    figure, axes = _panels(len(panels), columns, 3.6, 3)
    for axis, (title, A) in zip(axes, panels, strict=True):
        texts = [[f'{x:.3f}' for x in row] for row in A]
        _heat_map(axis, A, texts, rows, fitted['groups'])
        axis.set_title(title)
        axis.set_xlabel('trained', fontsize=8)
        axis.set_ylabel('evaluated', fontsize=8)
    return figure
