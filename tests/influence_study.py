"""Do the errors of influence say what they should? Measurements of a trained model, many times.

    python tests/influence_study.py --ckpt=out/run --data_dir=data/study

It prints tables of docs/BENCHMARKS.md. The gradients of many rows of the last block are taken once,
and all their inner products with them. A measurement is then a choice of rows, so thousands cost
minutes. The truth is what all rows together give.
"""
import os

import numpy as np
import torch

if __name__ == '__main__':
    import _path  # noqa: F401

from configurator import configure
from data import Feeder, Source, open_probe
from influence import PARTS, Probe, stream_row_gradients
from lib.hf import open_model
from methods.estimates import estimate, noise_of
from tests.studies import print_header, print_row

# -- knobs --
ckpt = ''                           # a run
data_dir = 'data/study'             # folder of its sources and probe sets
sources = ['code', 'math', 'web_edu', 'wiki', 'noise']
domains = ['code', 'math', 'web']   # names of the probe sets
block_size = 64                     # tokens of a row
rows = 1500                         # rows of every source and probe set
repeats = 400                       # measurements of every kind
save = ''                           # file that keeps the products, so that they are taken once


def row_gradients(model, source, n_rows, feeder):
    """Gradients of the rows' summed losses by the last block: (n_rows, numel) fp32, tokens (n,)."""
    found, tokens = [], []
    for batch in feeder.source_batches(source, np.arange(n_rows)):
        parts = {}

        def use(name, first, gradients, parts=parts):
            parts.setdefault(name, []).append(gradients.flatten(1))

        stream_row_gradients(model, batch, 'last', use)
        found.append(torch.cat([torch.cat(parts[name]) for name in sorted(parts)], 1))
        tokens.append((batch[1] >= 0).sum(1))
    return torch.cat(found)[:n_rows], torch.cat(tokens)[:n_rows].numpy().astype(float)


def take_products(path):
    """Products of the probe rows with each other and with the rows of the sources."""
    model, about, _ = open_model(path, torch.device('cpu'), torch.float32)
    model.requires_grad_(True)
    feeder = Feeder(torch.device('cpu'), 50)
    vocab_size = model.config.vocab_size
    taken = {}
    for domain in domains:
        probe = open_probe(data_dir, domain, block_size, vocab_size, 'window', 'truncate')
        taken[domain] = row_gradients(model, probe, min(rows, probe.n_windows), feeder)
    probes = torch.cat([gradients for gradients, _ in taken.values()])
    found = dict(
        gram=(probes @ probes.T).double().numpy(),
        at=np.repeat(np.arange(len(domains)), [len(t) for _, t in taken.values()]),
        tokens=np.concatenate([tokens for _, tokens in taken.values()]))
    for name in sources:
        source = Source(data_dir, name, 'train', block_size, 0, vocab_size)
        gradients, tokens = row_gradients(model, source, min(rows, source.n_windows), feeder)
        found[f'products_{name}'] = (gradients @ probes.T).double().numpy()
        found[f'tokens_{name}'] = tokens
    return found


def measured(data, chosen, names, n_parts, by_source):
    """What a measurement of chosen rows gives. chosen: probe rows of every domain, a list.

    n_parts: parts of every domain; by_source: name -> rows of the source
    Returns (Probe, source -> (products, tokens)).
    """
    order = np.concatenate(chosen)
    part = np.concatenate([
        np.arange(len(rows)) % n_parts + i * n_parts for i, rows in enumerate(chosen)])
    member = (part == np.arange(part.max() + 1)[:, None]).astype(float)         # (P, rows)
    gram = data['gram'][np.ix_(order, order)]
    tokens = data['tokens'][order]
    probe = Probe(
        [], list(names), np.arange(len(member)) // n_parts, member @ gram @ member.T,
        member @ gram.diagonal(), member @ tokens, member @ tokens**2, 'last')
    found = {}
    for name, rows in by_source.items():
        products = data[f'products_{name}'][np.ix_(rows, order)] @ member.T
        found[name] = products, data[f'tokens_{name}'][rows]
    return probe, found


def simulate(data, names, n_probe, units, rng):
    """Measures `repeats` times on n_probe rows of the domains `names` and 32 of every source.

    Returns the true influences, and of the measurements that say something the values and errors
    (n, sources), and the share of the others.
    """
    n_parts = max(4, PARTS // len(names))
    weights = dict.fromkeys(names, 1.0)
    of_domain = [np.flatnonzero(data['at'] == domains.index(name)) for name in names]
    of_source = {name: np.arange(len(data[f'tokens_{name}'])) for name in sources}
    truth = estimate(*order(measured(data, of_domain, names, n_parts, of_source), weights, units))
    values, errors = [], []
    for _ in range(repeats):
        chosen = [rng.choice(rows, n_probe, replace=False) for rows in of_domain]
        by_source = {name: rng.choice(rows, 32, replace=False) for name, rows in of_source.items()}
        found = measured(data, chosen, names, n_parts, by_source)
        if not noise_of(found[0], weights, units):
            now = estimate(*order(found, weights, units))
            values.append([now.r[name][-1] for name in sources])
            errors.append([now.se[name][-1] for name in sources])
    true = np.array([truth.r[name][-1] for name in sources])
    return true, np.array(values), np.array(errors), 1 - len(values) / repeats


def order(found, weights, units):
    probe, products = found
    return probe, weights, units, products


def texts(values):
    return ', '.join(f'{value:.2f}' for value in values)


if __name__ == '__main__':
    configure(globals(), verbose=False)
    if save and os.path.isfile(save):
        data = dict(np.load(save))
    else:
        data = take_products(ckpt)
        if save:
            np.savez(save, **data)
    rng = np.random.default_rng(0)
    columns = ['domains', 'units', 'rows of each', 'true', 'least covered', 'spread / error']
    print_header(*columns, 'largest', 'lost in noise')
    for names in (domains[1:2], domains[:2], domains):
        for units in ('loss', 'own'):
            for n_probe in (16, 64):
                true, values, errors, lost = simulate(data, names, n_probe, units, rng)
                covered = (np.abs(values - true) <= 2 * errors).mean(0)
                # A mean of the errors would be that of a few very large ones.
                ratio = values.std(0) / np.median(errors, 0)
                print_row(
                    ', '.join(names), units, n_probe, texts(true), f'{covered.min():.0%}',
                    f'{ratio.min():.2f} to {ratio.max():.2f}', f'{np.abs(values).max():.1f}',
                    f'{lost:.0%}')
