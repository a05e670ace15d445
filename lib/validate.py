"""The loss of a model on fixed rows of a source, row by row: train.py's evaluation, and influence.py's comparison of runs."""
import math

import numpy as np
import torch

from lib.device import all_reduce_sum
from methods.reweight import domain_of


@torch.no_grad()
def row_losses(model, source, n_rows, batch_size, to_device, token_bytes=None, rank=0, world_size=1):
    """Losses of the first n_rows rows of a Source: (nats, counted tokens, bytes of these tokens), (n,) float64 each, on every rank.

    token_bytes: (V,) int64, bytes of every token; None: bytes are 0. Every rank runs the same number of batches; rows beyond the end are
    repeated and do not count.
    """
    n_rows = min(n_rows, source.n_windows)
    found = np.zeros((3, n_rows))
    for start in range(0, n_rows, batch_size * world_size):
        mine = range(start + rank * batch_size, start + (rank + 1) * batch_size)
        inputs, targets, doc_ids = to_device(source.rows([min(i, n_rows - 1) for i in mine]))
        _, losses, _ = model.loss(inputs, targets, doc_ids=doc_ids)
        counted = targets >= 0
        n_bytes = torch.zeros_like(targets) if token_bytes is None else token_bytes[targets.clamp(min=0)] * counted
        here = [i for i in mine if i < n_rows]
        found[:, here] = torch.stack([t.double().sum(1) for t in (losses, counted, n_bytes)]).cpu().numpy()[:, :len(here)]
    return np.array(all_reduce_sum(found.flatten())).reshape(3, n_rows)


def evaluate(model, sources, probes, weights, n_rows, batch_size, to_device, token_bytes, rank, world_size):
    """Loss and bits per byte of every source, and loss of every probe set, on their first n_rows rows: train.py's metrics.

    weights: source -> share, that 'val/loss' is the mean by; the rest as in `row_losses`.
    """
    metrics, mean = {}, 0.0
    for source in sources + probes:
        nats, counted, n_bytes = row_losses(model, source, n_rows, batch_size, to_device, token_bytes, rank, world_size).sum(1)
        if source in probes:
            metrics[f'probe/loss_{domain_of(source)}'] = nats / counted
            continue
        metrics[f'val/loss_{source.name}'] = nats / counted
        if n_bytes:
            metrics[f'val/bpb_{source.name}'] = nats / n_bytes / math.log(2)
        mean += nats / counted * weights[source.name]
    return {'val/loss': mean, **metrics}
