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
