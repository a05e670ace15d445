"""The loss of a model on fixed rows of a source: evaluation in train.py, and comparison of runs."""
import math

import numpy as np
import torch

from data import domain_of
from lib.device import sum_dtype
from lib.parallel import sum_numbers


@torch.no_grad()
def row_losses(model, feeder, source, n_rows, token_bytes=None):
    """Losses of the first n_rows rows of a Source, on every rank.

    token_bytes  (V,) int64, bytes of every token. None: bytes are 0
    Returns (3, n) float64: nats, supervised tokens, and bytes of these tokens for every row. Every
    rank runs the same number of batches: rows beyond the end are repeated and ignored.
    """
    n_rows = min(n_rows, source.n_windows)
    found = np.zeros((3, n_rows))
    # Batches always have the full size, so that a compiled model meets one shape.
    sums = []                                           # (rows of this rank, (3, B) on the device)
    for mine in feeder.deal(n_rows, feeder.batch_size):
        inputs, targets, doc_ids = feeder.put(source.rows(np.minimum(mine, n_rows - 1)))
        _, losses, _ = model.loss(inputs, targets, doc_ids=doc_ids)
        is_valid = targets >= 0
        n_bytes = torch.zeros_like(targets)
        if token_bytes is not None:
            n_bytes = token_bytes[targets.clamp(min=0)] * is_valid
        dtype = sum_dtype(losses.device)
        of_rows = torch.stack([t.to(dtype).sum(1) for t in (losses, is_valid, n_bytes)])
        sums.append((mine[mine < n_rows], of_rows))
    # Read at the end: after every batch, the device would wait for the host.
    for here, of_rows in sums:
        found[:, here] = of_rows.cpu().numpy()[:, :len(here)]
    return np.array(sum_numbers(found.flatten(), model.layout)).reshape(3, n_rows)


def evaluate(model, feeder, sources, probes, weights, n_rows, token_bytes):
    """Loss and bits per byte of every source, and loss of every probe set: train.py's metrics.

    sources, probes: lists of Source, evaluated on their first n_rows rows
    weights: source -> share. 'val/loss' is the mean by these
    """
    metrics = {'val/loss': 0.0}
    for source in sources:
        nats, n_valid, n_bytes = row_losses(model, feeder, source, n_rows, token_bytes).sum(1)
        metrics[f'val/loss_{source.name}'] = nats / n_valid
        if n_bytes:
            metrics[f'val/bpb_{source.name}'] = nats / n_bytes / math.log(2)
        metrics['val/loss'] += nats / n_valid * weights[source.name]
    for probe in probes:
        nats, n_valid, _ = row_losses(model, feeder, probe, n_rows, token_bytes).sum(1)
        metrics[f'probe/loss_{domain_of(probe)}'] = nats / n_valid
    return metrics
