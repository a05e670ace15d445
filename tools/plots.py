"""Figures: of a run, drawn from its metrics.jsonl, and of mixing laws."""
import glob
import json
import os

import numpy as np

from configurator import BadInput
from lib.device import read_metrics


def _series(records, key):
    """(steps, values) of one metric."""
    found = [(r['step'], r[key]) for r in records if key in r and r[key] is not None]
    return [step for step, _ in found], [value for _, value in found]


def _names(records, prefix):
    """The sources for which a metric `<prefix><source>` was logged, in order of appearance."""
    return list(dict.fromkeys(key.removeprefix(prefix) for r in records for key in r if key.startswith(prefix)))


def draw_run(out_dir):
    """Draws loss curves per source and the sampling weights over time. Returns the PNG's path (out_dir/curves.png)."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    records = read_metrics(out_dir)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout='constrained')
    left.plot(*_series(records, 'train/loss'), color='0.7', linewidth=1, label='training')
    for i, source in enumerate(_names(records, 'val/loss_')):
        left.plot(*_series(records, f'val/loss_{source}'), color=f'C{i}', marker='o', markersize=3, label=source)
    left.set(xlabel='step', ylabel='loss (nats per token)', title='Validation loss of every source')
    left.legend()
    for i, source in enumerate(_names(records, 'mixture/weight_')):
        right.plot(*_series(records, f'mixture/weight_{source}'), color=f'C{i}', label=source)
        right.plot(*_series(records, f'mixture/drawn_{source}'), color=f'C{i}', linestyle=':', linewidth=1)
    right.set(xlabel='step', ylabel='share of rows', title='Sampling weights (dotted: rows drawn)', ylim=(0, None))
    right.legend()
    path = os.path.join(out_dir, 'curves.png')
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def print_run(out_dir, epochs):
    """The table that a run ends with: losses and bits per byte of every source before and after. epochs: source -> times read."""
    evaluated = [record for record in read_metrics(out_dir) if 'val/loss' in record]
    first, last = evaluated[0], evaluated[-1]
    print(f'\n{"validation":<16}{"loss before":>12}{"after":>9}{"bits/byte before":>19}{"after":>9}{"epochs read":>14}')
    for name, times in epochs.items():
        bpb = [f'{r[f"val/bpb_{name}"]:.3f}' if f'val/bpb_{name}' in r else 'n/a' for r in (first, last)]
        print(f'{name:<16}{first[f"val/loss_{name}"]:>12.3f}{last[f"val/loss_{name}"]:>9.3f}{bpb[0]:>19}{bpb[1]:>9}{times:>14.2f}')
    print(f'{"mixture":<16}{first["val/loss"]:>12.3f}{last["val/loss"]:>9.3f}')


def draw_table(path, rows, columns, values, errors, title):
    """A heat map with the figures in its fields: rows x columns, values and their standard errors. Returns the path."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(2.5 + 1.3 * len(columns), 1.6 + 0.45 * len(rows)), layout='constrained')
    limit = max(abs(x) for row in values for x in row) or 1.0
    image = axes.imshow(values, cmap='RdBu', vmin=-limit, vmax=limit, aspect='auto')
    for i, (row, row_errors) in enumerate(zip(values, errors)):
        for j, (value, error) in enumerate(zip(row, row_errors)):
            axes.text(j, i, f'{value:.2f} ± {error:.2f}', ha='center', va='center', fontsize=8, color='w' if abs(value) > 0.6 * limit else 'k')
    axes.set(xticks=range(len(columns)), xticklabels=columns, yticks=range(len(rows)), yticklabels=rows, title=title)
    figure.colorbar(image)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


# -- reports -----------------------------------------------------------------------------------------------------------

def draw_report(out, entries, arms, sources, metric):
    """Losses of every source over tokens, the weights of every arm, and throughput. Returns [(title, path of the PNG)]."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter
    paths = []
    if sources:
        columns = min(2, len(sources))
        figure, axes = plt.subplots(-(-len(sources) // columns), columns, figsize=(4.4 * columns, 3.2 * -(-len(sources) // columns)), layout='constrained', squeeze=False)
        for axis in axes.flat[len(sources):]:
            axis.set_axis_off()
        for axis, source in zip(axes.flat, sources):
            for entry in entries:
                steps, values = _series(entry.records, f'val/{metric}_{source}')
                axis.plot(np.array(steps) * entry.config['total_batch_tokens'], values, color=f'C{arms.index(entry.arm)}', linewidth=1.2, marker='.', markersize=4,
                          label=entry.arm if entry.arm not in axis.get_legend_handles_labels()[1] else None)
            axis.set(title=source, xlabel='tokens', ylabel=metric)
            axis.xaxis.set_major_formatter(EngFormatter(sep=''))
        if len(arms) <= 12:
            axes[0, 0].legend(fontsize=8)
        paths.append(('Losses over time', _save_figure(figure, os.path.join(out, 'losses.png'))))
    columns = min(2, len(arms))
    figure, axes = plt.subplots(-(-len(arms) // columns), columns, figsize=(4.4 * columns, 3.2 * -(-len(arms) // columns)), layout='constrained', squeeze=False)
    for axis in axes.flat[len(arms):]:
        axis.set_axis_off()
    for axis, arm in zip(axes.flat, arms):
        for entry in (e for e in entries if e.arm == arm):
            for i, source in enumerate(_names(entry.records, 'mixture/weight_')):
                axis.plot(*_series(entry.records, f'mixture/weight_{source}'), color=f'C{i}', linewidth=1, label=source if source not in axis.get_legend_handles_labels()[1] else None)
        axis.set(title=arm, xlabel='step', ylabel='weight', ylim=(0, 1.05 * axis.dataLim.ymax if axis.lines else None))
    axes[0, 0].legend(fontsize=8)
    paths.append(('Weights over time', _save_figure(figure, os.path.join(out, 'weights.png'))))
    figure, axis = plt.subplots(figsize=(7, 3), layout='constrained')
    for entry in entries:
        axis.plot(*_series(entry.records, 'train/tokens_per_second'), color=f'C{arms.index(entry.arm)}', linewidth=0.8,
                  label=entry.arm if entry.arm not in axis.get_legend_handles_labels()[1] else None)
    axis.set(xlabel='step', ylabel='tokens per second', ylim=(0, None))
    if len(arms) <= 12:
        axis.legend(fontsize=8)
    return [*paths, ('Throughput', _save_figure(figure, os.path.join(out, 'throughput.png')))]


# -- sweeps ------------------------------------------------------------------------------------------------------------

def draw_curves(out, curves, picks, unit, at):
    """The front of loss over parameters at one point, and the curves of every band. Returns the paths of the PNGs."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    from tools.curves import by_label
    rows = sorted(by_label(curves, unit, at), key=lambda row: row[1].params)
    params, losses = np.array([row[1].params for row in rows]), np.array([row[2] for row in rows])
    figure, axis = plt.subplots(figsize=(7, 4.5), layout='constrained')
    axis.scatter(params, losses, s=8, c=[row[1].shape[1] for row in rows], cmap='viridis')
    figure.colorbar(axis.collections[0], ax=axis, label='layers')
    front = losses <= np.minimum.accumulate(losses) if len(losses) else []
    axis.step(params[front], losses[front], where='post', color='C3', linewidth=1, label='nothing smaller is better')
    axis.set(xscale='log', xlabel='parameters', ylabel='loss (nats per token)', title=f'{len(rows)} shapes at {unit} {at:,.0f}')
    axis.legend()
    paths = [_save_figure(figure, os.path.join(out, 'pareto.png'))]
    columns = min(3, len(picks))
    figure, axes = plt.subplots(-(-len(picks) // columns), columns, figsize=(4.6 * columns, 3.6 * -(-len(picks) // columns)), layout='constrained', squeeze=False)
    for axis in axes.flat[len(picks):]:
        axis.set_axis_off()
    for axis, (name, p) in zip(axes.flat, picks.items()):
        for curve in (c for c in curves if p['low'] <= c.params <= p['high']):
            label = curve.label
            first = label in (p['lowest'], p['pick']) and label not in axis.get_legend_handles_labels()[1]
            axis.plot(curve.x[unit], curve.loss, **(dict(linewidth=1.5, zorder=3, label=label if first else None) if label in (p['lowest'], p['pick']) else
                                                    dict(linewidth=0.4, color='0.7')))
        axis.axvline(p['at'], color='0.5', linestyle=':')
        values = np.array([row['loss'] for row in p['rows']])
        axis.set(title=f'{name} parameters', xlabel=unit, ylabel='loss', xlim=(0, 2 * p['at']), ylim=(values.min() - 0.1 * np.ptp(values) - 0.01, values.max() + 0.5 * np.ptp(values) + 0.05))
        axis.legend(fontsize=7)
    return [*paths, _save_figure(figure, os.path.join(out, 'bands.png'))]


# -- mixing laws -------------------------------------------------------------------------------------------------------

def draw_laws(path):
    """Draws what tools/mixing_laws.py wrote (a file of it, or all in a folder) and the weights of a folder's runs. Returns the paths of the PNGs."""
    import matplotlib
    matplotlib.use('Agg')
    runs = _moving_runs(path)
    paths = [path] if os.path.isfile(path) else [os.path.join(path, name) for name in ('static.json', 'dynamic.json', 'a_star.json')]
    found = {p: json.load(open(p, encoding='utf-8')) for p in paths if os.path.isfile(p)}
    if not found and not runs:
        raise BadInput(f"'{path}' has no static.json, dynamic.json or a_star.json, and no run whose weights move. Fit something first.")
    return [_save_figure(_draw_static(r) if 'optimum' in r else _draw_matrices(r), p.removesuffix('.json') + '.png') for p, r in found.items()] + (
        [_save_figure(_draw_weights(runs), os.path.join(path, 'weights.png'))] if runs else [])


def _moving_runs(folder):
    """method -> [(weights at the start, metrics)] of all runs in a folder (at any depth) that have a method which moves weights."""
    found = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), '**', 'config.json'), recursive=True)):
        with open(path, encoding='utf-8') as f:
            config = json.load(f)
        method, sources = config['mixture'], config['sources']
        if method not in ('fixed', 'stratified') and os.path.isfile(os.path.join(os.path.dirname(path), 'metrics.jsonl')):
            start = {name: weight / sum(sources.values()) for name, weight in sources.items()}
            found.setdefault(method, []).append((start, read_metrics(os.path.dirname(path))))
    return found


def _draw_weights(runs):
    """The weight of every source over the steps: a panel per source, a colour per method, a thin line per run and the mean over runs of equal steps."""
    import matplotlib.pyplot as plt
    sources = _names([r for parts in runs.values() for _, records in parts for r in records], 'mixture/asked_')
    figure, axes = plt.subplots(1, len(sources), figsize=(4.2 * len(sources), 3.8), layout='constrained', squeeze=False, sharey=True)
    for axis, source in zip(axes[0], sources):
        for i, (method, parts) in enumerate(runs.items()):
            # what the rule asked for: of a proxy its own weights (it draws equally), of the others those that rows are drawn by between explorations
            lines = [[a + b for a, b in zip(([0], [start[source]]), _series(records, f'mixture/asked_{source}'))] for start, records in parts]
            for steps, weights in lines:
                axis.step(steps, weights, where='post', color=f'C{i}', linewidth=0.5, alpha=0.5)
            if len({tuple(steps) for steps, _ in lines}) == 1:
                axis.step(lines[0][0], np.mean([weights for _, weights in lines], 0), where='post', color=f'C{i}', linewidth=2, label=method)
            else:
                axis.plot([], [], color=f'C{i}', label=method)
        axis.set(title=source, xlabel='step')
    axes[0, 0].set_ylabel('weight')
    axes[0, 0].legend()
    return figure


def _save_figure(figure, path):
    import matplotlib.pyplot as plt
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _draw_static(r):
    """Predicted against observed losses, residuals, and the mean loss over the mixtures (two or three groups) with its lowest point."""
    import matplotlib.pyplot as plt
    k, m = len(r['evaluated']), len(r['groups'])
    figure, axes = plt.subplots(1, k + 1, figsize=(4 * (k + 1), 4), layout='constrained', squeeze=False)
    p, losses = np.array(r['p']), np.array(r['loss'])
    laws = {fit['group']: fit for fit in r['fits'] if fit['seed'] == 'all'}

    def predict(group, p):
        fit = laws[group]
        return fit['c'] + np.exp(fit['log_b'] - p @ np.array(fit['A']))
    for i, group in enumerate(r['evaluated']):
        predicted = predict(group, p)
        ends = [min(losses[:, i].min(), predicted.min()), max(losses[:, i].max(), predicted.max())]
        axes[0, i].plot(ends, ends, color='0.8')
        axes[0, i].scatter(losses[:, i], predicted, s=12)
        axes[0, i].set(title=f'{group}: R2 {laws[group]["fit"]["r2"]:.3f}, one out {laws[group]["leave_one_out"]["r2"]:.3f}', xlabel='observed (nats per token)',
                       ylabel='predicted')
        inset = axes[0, i].inset_axes([0.6, 0.08, 0.37, 0.28])
        inset.axhline(0, color='0.8')
        inset.scatter(losses[:, i], losses[:, i] - predicted, s=4)
        inset.set_title('residuals', fontsize=7)
        inset.tick_params(labelsize=6)
    last, best = axes[0, -1], np.array(r['optimum']['p'])
    if m == 3:
        grid = np.array([(a, b, 1 - a - b) for a in np.linspace(0, 1, 61) for b in np.linspace(0, 1, 61) if a + b <= 1 + 1e-9])
        mean = np.mean([predict(group, grid) for group in r['evaluated']], 0)
        image = last.tricontourf(*_on_triangle(grid), mean, levels=np.quantile(mean, np.linspace(0, 1, 16)), cmap='viridis_r')
        figure.colorbar(image, ax=last, format='%.2f')
        last.scatter(*_on_triangle(p), s=10, color='k')
        last.scatter(*_on_triangle(best[None]), marker='*', s=160, color='r')
        for name, corner in zip(r['groups'], np.eye(3)):
            x, y = _on_triangle(corner[None])
            last.text(x[0], y[0] + (0.03 if y[0] > 0.5 else -0.07), name, ha='center')
        last.set_axis_off()
    elif m == 2:
        line = np.linspace(0, 1, 101)
        grid = np.column_stack((line, 1 - line))
        last.plot(line, np.mean([predict(group, grid) for group in r['evaluated']], 0))
        last.scatter(p[:, 0], losses.mean(1), s=10, color='k')
        last.axvspan(r['optimum']['low'][0], r['optimum']['high'][0], alpha=0.2)
        last.set(xlabel=f'share of {r["groups"][0]}')
    else:
        last.bar(r['groups'], best, yerr=[np.maximum(best - r['optimum']['low'], 0), np.maximum(r['optimum']['high'] - best, 0)])
        last.tick_params(axis='x', rotation=60)
    last.set_title('mean loss and its lowest mixture')
    return figure


def _on_triangle(p):
    """Shares (n, 3) -> x, y of an equilateral triangle."""
    return p[:, 1] + 0.5 * p[:, 2], p[:, 2] * 0.75**0.5


def _draw_matrices(r):
    """Heat maps of the fitted A of every parent, or of A* beside what the methods measured (means over seeds)."""
    import matplotlib.pyplot as plt
    panels = ([(fit['parent'], fit['A']) for fit in r['fits']] if 'fits' in r else
              [(f'{name}: {what}', np.mean(m[key], 0)) for name, m in r['methods'].items() for what, key in (('A*', 'A_star'), ('measured A', 'A'))])
    columns = 2 if 'methods' in r else min(3, len(panels))
    figure, axes = plt.subplots(-(-len(panels) // columns), columns, figsize=(3.6 * columns, 3 * -(-len(panels) // columns)), layout='constrained', squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, A) in zip(axes.flat, panels):
        A = np.array(A)
        limit = np.abs(A).max() or 1.0
        axis.set_axis_on()
        axis.imshow(A, cmap='RdBu', vmin=-limit, vmax=limit)
        for i, j in np.ndindex(A.shape):
            axis.text(j, i, f'{A[i, j]:.3f}', ha='center', va='center', fontsize=8)
        axis.set(title=title, xticks=range(A.shape[1]), xticklabels=r['groups'], yticks=range(A.shape[0]), yticklabels=r.get('evaluated', r['groups']))
        axis.set_xlabel('trained', fontsize=8)
        axis.set_ylabel('evaluated', fontsize=8)
    return figure
