"""Compares every byte of sources, caches, scores and checkpoints with the hashes that were recorded
when they were made.

    python tools/check.py data/code data/math       # shards, masks, tokenizer, kd/, scores
    python tools/check.py data out/run              # all sources in a folder; all checkpoints

train.py compares names, sizes and a sample of the bytes at every start. This looks at all of them,
at about 1.7 GB per second and core. Exit code 0: intact. 2: damaged, and every fault was printed.
"""
import glob
import os
import sys

import _path  # noqa: F401  (the import path)

from configurator import BadInput, configure
from data import Source
from kd import check_cache
from lib import checkpoint
from lib.shards import read_meta, shard_faults
from lib.tokenizer import load_tokenizer
from methods.selection import check_scores


def faults_of_source(folder):
    """Yields a sentence for everything in a source that is not as it was made."""
    meta = read_meta(folder)
    for split in sorted({shard['split'] for shard in meta['shards']}):
        try:
            # Opening it compares names and sizes.
            Source(os.path.dirname(folder), os.path.basename(folder), split, 1, packing=None)
        except BadInput as error:
            yield str(error)
    yield from shard_faults(folder, meta['shards'])
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != meta['tokenizer']['fingerprint']:
        yield f'the tokenizer in {folder} is not the one that meta.json records.'
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), 'kd', '*', 'cache.json'))):
        yield from check_cache(os.path.dirname(path))
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), '*', 'scores.json'))):
        yield from check_scores(os.path.dirname(path))


def faults_of_run(folder):
    """Yields a sentence for every checkpoint of a run that is not as it was written."""
    for name in checkpoint.complete_checkpoints(os.path.join(folder, 'ckpt')):
        path = os.path.join(folder, 'ckpt', name)
        if fault := checkpoint.fault_of(path, trusts_stamps=False):
            yield f'{path}: {fault}.'


def all_faults(look, path):
    """What `faults_of_source` or `faults_of_run` finds, until it can go no further."""
    faults = []
    try:
        for fault in look(path):
            faults.append(fault)
    except BadInput as error:
        faults.append(str(error))
    return faults


def things_in(path):
    """The sources, runs and checkpoints at a path or below it: list of (function, path)."""
    if os.path.isfile(os.path.join(path, 'meta.json')):
        return [(faults_of_source, path)]
    if os.path.isdir(os.path.join(path, 'ckpt')):
        return [(faults_of_run, path)]
    if os.path.isfile(os.path.join(path, 'manifest.json')):
        run = os.path.dirname(os.path.dirname(os.path.abspath(path)))
        return [(faults_of_run, run)]
    found = []
    for name in sorted(os.listdir(path)):
        inner = os.path.join(path, name)
        if os.path.isdir(inner) and not name.startswith('.'):
            found += things_in(inner)
    return found


if __name__ == '__main__':
    paths = [a.rstrip('/') for a in sys.argv[1:] if not a.startswith('--')]
    configure(globals(), [a for a in sys.argv[1:] if a.startswith('--')], verbose=False)
    if not paths:
        raise BadInput('say what to check: `python tools/check.py data/code out/run`.')
    n_faults = 0
    for given in paths:
        things = things_in(given)
        if not things:
            raise BadInput(f"'{given}' holds no source (meta.json) and no run (ckpt/).")
        for look, path in things:
            faults = all_faults(look, path)
            n_faults += len(faults)
            print(f'{path}: {"intact" if not faults else ""}')
            for fault in faults:
                print(f'  {fault}')
    if n_faults:
        raise BadInput(f'{n_faults} fault(s), as listed above.')
