"""Figures of a run, drawn from its metrics.jsonl."""
import os

from common import read_metrics


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
