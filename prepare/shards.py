"""From tokenized documents to the shards of a source, so that a kill at any moment loses nothing that was complete.

A source is made of parts, each the work of one process at a time. Shards go to a temporary name, are synced and renamed;
then progress/<part>.json (renamed likewise) says which records they hold. meta.json replaces progress/ when all parts are
done. The bytes depend neither on kills nor on who worked on which part.
"""
import collections
import fcntl
import glob
import hashlib
import json
import os
import shutil

import numpy as np

from configurator import BadInput
from data import shard_header
from lib.tokenizer import save_tokenizer


def write_atomic(path, parts):
    """Writes byte strings or arrays to `path` by way of a temporary file, synced and renamed: all or nothing.

    Returns their sha256.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary, digest = f'{path}.tmp', hashlib.sha256()
    try:
        with open(temporary, 'wb') as f:
            for part in parts:
                f.write(part)
                digest.update(part)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        error.filename = path
        raise
    return digest.hexdigest()


def write_json(path, content):
    write_atomic(path, [json.dumps(content, indent=1, sort_keys=True).encode()])


def read_json(path):
    """The content of a JSON file of ours, None when there is none."""
    if not os.path.isfile(path):
        return None
    with open(path, encoding='utf-8') as f:
        return json.load(f)


def lock_path(folder, name):
    """Beside the source and never removed, since a lock on a removed file keeps nobody out."""
    folder = os.path.abspath(folder)
    return os.path.join(os.path.dirname(folder), '.locks', os.path.basename(folder), f'{name}.lock')


def lock(folder, name, wait=False):
    """Takes a lock that ends with the process, and returns it (close it to let go). BadInput when another run has it."""
    path = lock_path(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle = open(path, 'w')
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        handle.close()
        raise BadInput(f'another run is writing to {folder}. Wait for it, or give this one another --out.') from None
    return handle


def nothing_done(folder):
    """True when no part has written anything and no process is at work on one."""
    if glob.glob(os.path.join(glob.escape(folder), 'progress', '[0-9]*.json')):
        return False
    try:
        for path in glob.glob(os.path.join(glob.escape(os.path.dirname(lock_path(folder, 'x'))), '[0-9]*.lock')):
            lock(folder, os.path.basename(path).removesuffix('.lock')).close()
    except BadInput:
        return False
    return True


def open_source(folder, settings):
    """Begins or goes on with a source. Returns meta.json's content when it is complete already, else None.

    settings: JSON-able dict of all that the result depends on. A folder made with others is refused.
    """
    with lock(folder, 'source', wait=True):         # ranks start at once
        if os.path.isdir(folder) and os.listdir(folder) and not {'progress', 'meta.json'} & set(os.listdir(folder)):
            raise BadInput(f'{folder} is not empty and was not made by this script. Delete it or choose another name or --out.')
        meta, begun = (read_json(os.path.join(folder, name)) for name in ('meta.json', 'progress/source.json'))
        there = (meta or begun or dict(settings=None))['settings']
        if there is not None and there != settings and (meta is not None or not nothing_done(folder)):
            changed = sorted(k for k in {*settings, *there} if there.get(k) != settings.get(k))
            raise BadInput(f'{folder} was made with other settings ({", ".join(changed)}). Delete it to make it anew.')
        if there != settings:           # a new source, or one that failed before it wrote anything and whose mistake is mended
            write_json(os.path.join(folder, 'progress/source.json'), dict(settings=settings))
    return meta


def joined(header, arrays, dtype):
    """Yields the header, then the arrays a thousand at a time: few writes, and no second copy of the whole shard."""
    yield header
    for i in range(0, len(arrays), 1000):
        yield np.concatenate(arrays[i:i + 1000], dtype=dtype, casting='unsafe')


class PartWriter:
    """Collects the documents of one part and writes a numbered shard of each split at every `commit`."""

    def __init__(self, folder, part, vocab_size, limit=None):
        """limit: training tokens after which the part is full, None for no limit."""
        self.folder, self.part, self.vocab_size = folder, part, vocab_size
        self.buffers = collections.defaultdict(list)       # split -> [(ids, mask or None, bytes of text)]
        self.buffered = collections.Counter()              # split -> tokens
        self.state = read_json(self.progress_path) or dict(
            shards=[], commits=0, file=0, record=0, done=False, limit=limit, counts={}, skipped=[])
        self.limit = self.state['limit']        # of its beginning, for the same shards

    @property
    def progress_path(self):
        return os.path.join(self.folder, 'progress', f'{self.part:05d}.json')

    def n_tokens(self, split):
        """Tokens of a split so far, written or waiting."""
        return sum(s['tokens'] for s in self.state['shards'] if s['split'] == split) + self.buffered[split]

    def is_full(self):
        return self.limit is not None and self.n_tokens('train') >= self.limit

    def add(self, split, ids, n_bytes, mask=None):
        """Adds one document: ids (n,) with BOS in front; n_bytes of UTF-8 text; mask (n,) uint8, 1 where the loss counts."""
        self.buffers[split].append((ids, mask, n_bytes))
        self.buffered[split] += len(ids)

    def count(self, what, where=None):
        """Counts a record that gave no document; where: location and reason of a broken one."""
        self.state['counts'][what] = self.state['counts'].get(what, 0) + 1
        if where is not None:
            self.state['skipped'].append(where)

    def commit(self, file, record, done=False):
        """Writes what waits, one shard per split, then the progress: the part goes on at this record of this file."""
        for split, documents in sorted(self.buffers.items()):
            shard = dict(file=f'{split}/{self.part:05d}_{self.state["commits"]:05d}.bin', split=split, tokens=self.buffered[split],
                         documents=len(documents), bytes=sum(n for _, _, n in documents))
            header, dtype = shard_header(shard['tokens'], self.vocab_size)
            path = os.path.join(self.folder, shard['file'])
            shard['sha256'] = write_atomic(path, joined(header, [ids for ids, _, _ in documents], dtype))
            masks = [mask for _, mask, _ in documents]
            if masks[0] is not None:
                shard['mask_sha256'] = write_atomic(path.removesuffix('.bin') + '.mask', joined(b'', masks, np.uint8))
                shard['loss_tokens'] = sum(int(mask.sum()) for mask in masks)
            self.state['shards'].append(shard)
        self.state.update(commits=self.state['commits'] + bool(self.buffers), file=file, record=record, done=done)
        self.buffers.clear()
        self.buffered.clear()
        write_json(self.progress_path, self.state)

    def delete(self):
        """Forgets the part: progress first, so that a kill in between leaves it unmade."""
        if os.path.exists(self.progress_path):
            os.remove(self.progress_path)
        for path in glob.glob(os.path.join(glob.escape(self.folder), '*', f'{self.part:05d}_*')):
            os.remove(path)


def finish_source(folder, tokenizer, settings, states, **more):
    """Writes the tokenizer and meta.json and removes progress/. states: PartWriter.state of every part, in order."""
    shards = [s for state in states for s in state['shards']]
    if not any(s['tokens'] for s in shards):
        raise BadInput(f'nothing to write to {folder}: the input holds no text (or max_tokens is 0).')
    counts = collections.Counter()
    for state in states:
        counts.update(state['counts'])
    keys = ['tokens', 'documents', 'bytes'] + ['loss_tokens'] * ('loss_tokens' in shards[0])
    splits = {split: {key: sum(s[key] for s in shards if s['split'] == split) for key in keys}
              for split in sorted({s['split'] for s in shards})}
    save_tokenizer(folder, tokenizer)
    meta = dict(settings=settings, shards=shards, splits=splits, vocab_size=tokenizer.vocab_size, counts=counts,
                skipped=[where for state in states for where in state['skipped']],
                tokenizer=dict(name=tokenizer.path, fingerprint=tokenizer.fingerprint, bos_id=tokenizer.bos_id), **more)
    write_json(os.path.join(folder, 'meta.json'), meta)
    shutil.rmtree(os.path.join(folder, 'progress'))
    return meta


def print_table(metas, seconds=None, tokens_made=None):
    """One line per source and split: documents, tokens, bytes per token; then the time. metas: name -> meta.json's content.

    tokens_made: tokens that took these seconds, when that is not all of them.
    """
    print(f'{"source":<28}{"split":<8}{"documents":>14}{"tokens":>18}{"bytes/token":>13}')
    for name, meta in metas.items():
        for split, n in meta['splits'].items():
            print(f'{name:<28}{split:<8}{n["documents"]:>14,}{n["tokens"]:>18,}{n["bytes"] / n["tokens"]:>13.2f}')
    if not seconds:
        return
    made = sum(n['tokens'] for meta in metas.values() for n in meta['splits'].values()) if tokens_made is None else tokens_made
    print(f'{made:,} tokens in {seconds:.1f} s: {made / seconds:,.0f} tokens/s')
