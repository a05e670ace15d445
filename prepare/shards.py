"""From tokenized documents to the shards of a source. A kill at any moment loses no complete shard.

A source is made of parts, and one process at a time works on a part. A shard is written to a
temporary name, synced and renamed. Then progress/<part>.json, renamed in the same way, says which
records the shards hold. meta.json replaces progress/ when all parts are done. The bytes depend
neither on kills nor on which process worked on which part.
"""
import collections
import glob
import hashlib
import json
import math
import os
import re
import shutil

import numpy as np

from configurator import BadInput, read_json
from lib import storage
from lib.messages import NOTES
from lib.shards import mask_path, read_header, shard_header
from lib.tokenizer import save_tokenizer

# -- files -----------------------------------------------------------------------------------------


def write_atomic(path, parts):
    """Writes byte strings or arrays to a temporary file, syncs it and renames it to `path`.

    Returns the sha256 of the content. An OSError that it raises names `path`.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f'{path}.tmp'
    # Hashing while writing saves reading the shard again.
    digest = hashlib.sha256()
    try:
        with open(temporary, 'wb') as f:
            for part in parts:
                f.write(part)
                digest.update(part)
            f.flush()
            # The progress written next names this file, so its bytes must be on the disk before.
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        # write() and fsync() name no file. The user wants to know which disk is full.
        error.filename = path
        raise
    return digest.hexdigest()


def json_bytes(content):
    return json.dumps(content, indent=1, sort_keys=True).encode()


def write_json(path, content):
    write_atomic(path, [json_bytes(content)])


def read_record(path, remedy, **kinds):
    """Returns the dict in a JSON file of a source, or None if the file does not exist.

    remedy  the sentence that ends the message about a damaged file
    kinds   the type of every entry that must be there
    Raises BadInput for a damaged file, and for one of another structure.
    """
    if not os.path.lexists(path):
        return None
    try:
        content = read_json(path)
    except BadInput:
        raise BadInput(f'{path} is no valid JSON: it was cut off or damaged. {remedy}') from None
    for key, kind in kinds.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise BadInput(
                f"{path} has another structure than this script writes: '{key}' is missing or of "
                f'another type. {remedy}')
    return content


def check_entries(path, remedy, entries, keys):
    """Raises BadInput unless every entry is a dict with these keys: `file` and `split` text, others
    integers.
    """
    for entry in entries:
        for key in keys:
            kind = str if key in ('file', 'split') else int
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                raise BadInput(
                    f"{path} has another structure than this script writes: '{key}' of a shard or "
                    f'split is missing or of another type. {remedy}')


def read_meta(folder):
    """Returns the content of a source's meta.json, or None. Raises BadInput for a damaged one."""
    path = os.path.join(folder, 'meta.json')
    remedy = f'Delete the folder {folder} and prepare it again.'
    meta = read_record(
        path, remedy, settings=dict, shards=list, splits=dict, counts=dict, skipped=list)
    if meta is not None:
        check_entries(path, remedy, meta['shards'], ('file', 'split', 'tokens'))
        check_entries(path, remedy, meta['splits'].values(), ('tokens', 'documents', 'bytes'))
    return meta


def settings_of(folder):
    """Returns the settings of a source that is begun or complete, else None."""
    # A kill may leave progress/ beside a meta.json, which then is the newer one.
    meta = read_meta(folder)
    if meta is not None:
        return meta['settings']
    remedy = f'Delete the folder {folder} and prepare it again.'
    begun = read_record(os.path.join(folder, 'progress/source.json'), remedy, settings=dict)
    return None if begun is None else begun['settings']


def check_shards(folder, shards, remedy):
    """Raises BadInput if a shard that is recorded is not on the disk with all its tokens.

    shards  entries of meta.json or of PartWriter.state
    remedy  the sentence that ends the message
    """
    for shard in shards:
        path = os.path.join(folder, shard['file'])
        try:
            n_tokens = read_header(path)[0]
            n_mask = os.path.getsize(mask_path(path)) if 'mask_sha256' in shard else n_tokens
        except FileNotFoundError as error:
            raise BadInput(f'{error.filename} is recorded, but it is missing. {remedy}') from None
        except BadInput:
            n_tokens = n_mask = -1
        if not n_tokens == n_mask == shard['tokens']:
            raise BadInput(
                f"{path} or its mask was truncated or replaced since it was made: it does not hold "
                f"the {shard['tokens']:,} tokens that were written. {remedy}")


def source_folder(out, name, option='--source'):
    """Returns the folder <out>/<name> of a source. Raises BadInput for a name that is none.

    option: what gave the name, for the message
    """
    if '://' in out:
        raise BadInput(f"--out='{out}' is a URL, and sources are written to local folders only.")
    if not out or os.path.lexists(out) and not os.path.isdir(out):
        raise BadInput(f"--out='{out}' is no folder. Give the folder of all sources.")
    if not re.fullmatch(r'\w[^/=\x00-\x1f]*', name) or name == 'probe':
        raise BadInput(
            f"{option}: '{name}' cannot be the name of a source, which is a folder in {out}. It "
            "must begin with a letter or digit, without '/' and '=', and not be 'probe'.")
    return os.path.join(out, name)


# -- locks -----------------------------------------------------------------------------------------


def lock_path(folder, name):
    """The path of a lock beside the source. The file stays, since a removed one locks nothing."""
    folder = os.path.abspath(folder)
    # Beside the source, so that deleting the source does not remove a lock that is held.
    locks = os.path.join(os.path.dirname(folder), '.locks')
    return os.path.join(locks, os.path.basename(folder), f'{name}.lock')


def lock(folder, name, wait=False):
    """Takes a lock of a source, see lib/storage.py. Returns its file.

    Raises BadInput when another process holds the lock, unless it should wait.
    """
    try:
        return storage.lock(lock_path(folder, name), math.inf if wait else 0.0)
    except BadInput:
        raise BadInput(
            f'another run is writing to {folder}. Wait for it, or give this one another '
            '--out.') from None


def has_parts(folder):
    """Returns whether a part of a half-done source has written anything."""
    return bool(glob.glob(os.path.join(glob.escape(folder), 'progress', '[0-9]*.json')))


def nothing_done(folder):
    """Returns whether no part has written anything and no process is working on one."""
    if has_parts(folder):
        return False
    locks = os.path.dirname(lock_path(folder, ''))
    try:
        for path in glob.glob(os.path.join(glob.escape(locks), '[0-9]*.lock')):
            lock(folder, os.path.basename(path).removesuffix('.lock')).close()
    except BadInput:
        return False
    return True


# -- a source --------------------------------------------------------------------------------------


def open_source(folder, settings):
    """Begins or continues a source. Returns the content of meta.json if it is complete, else None.

    settings  JSON-able dict of everything that the result depends on
    Raises BadInput for a folder that was made with other settings or by something else, and for one
    in which files are damaged or missing.
    """
    # All ranks start at once. The first one begins the source, the others find it begun.
    with lock(folder, 'source', wait=True):
        names = os.listdir(folder) if os.path.isdir(folder) else []
        if names and not {'progress', 'meta.json'} & set(names):
            raise BadInput(
                f'{folder} is not empty and was not made by this script. Delete it or choose '
                'another name or --out.')
        meta = read_meta(folder)
        old = settings_of(folder)
        if old is None and has_parts(folder):
            raise BadInput(
                f'{folder}/progress has lost its source.json, which says how the source was begun. '
                f'Delete the folder {folder} and prepare it again.')
        if old not in (None, settings) and (meta is not None or not nothing_done(folder)):
            changed = [k for k in {*settings, *old} if old.get(k) != settings.get(k)]
            raise BadInput(
                f'{folder} was made with other settings ({", ".join(sorted(changed))}). Delete it '
                'to make it again.')
        if meta is not None:
            remedy = f'Delete the folder {folder} and prepare it again.'
            check_shards(folder, meta['shards'], remedy)
        # A source that failed before it wrote anything may begin again with other settings.
        if old != settings:
            write_json(os.path.join(folder, 'progress/source.json'), dict(settings=settings))
    return meta


def joined(header, arrays, dtype):
    """Yields the header, then the arrays, a thousand joined at a time.

    This needs few writes, and no second copy of the full shard.
    """
    yield header
    for i in range(0, len(arrays), 1000):
        yield np.concatenate(arrays[i:i + 1000], dtype=dtype, casting='unsafe')


def count_tokens(state):
    """Returns the training tokens that a part has written. state: PartWriter.state."""
    return sum(shard['tokens'] for shard in state['shards'] if shard['split'] == 'train')


def progress_path(folder, part):
    return os.path.join(folder, 'progress', f'{part:05d}.json')


def remove_part(folder, part):
    """Removes a part. Progress goes first, so that a kill leaves the part as not begun."""
    if os.path.exists(progress_path(folder, part)):
        os.remove(progress_path(folder, part))
    for path in glob.glob(os.path.join(glob.escape(folder), '*', f'{part:05d}_*')):
        os.remove(path)


class PartWriter:
    """Collects the documents of a part. Every `commit` writes a numbered shard of each split."""

    def __init__(self, folder, part, vocab_size, limit=None):
        """limit: training tokens after which the part is full; None: no limit."""
        self.folder = folder
        self.part = part
        self.vocab_size = vocab_size
        self.buffers = collections.defaultdict(list)       # split -> [(ids, mask, bytes of text)]
        self.buffered = collections.Counter()              # split -> tokens
        self.progress = progress_path(folder, part)
        # Without its progress a part begins again, so a damaged file may simply be deleted.
        self.remedy = f'Delete {self.progress}. Then this part of the source is made again.'
        self.state = self.read_state()
        if self.state is None:
            self.state = dict(
                shards=[], commits=0, file=0, record=0, done=False, counts={}, examples={},
                skipped=[], limit=limit)
        # A part that is continued keeps its first limit. Another one would give other shards.
        self.limit = self.state['limit']

    def read_state(self):
        """Returns the progress of a part that is begun, else None. Raises BadInput if damaged."""
        state = read_record(
            self.progress, self.remedy, shards=list, commits=int, file=int, record=int, done=bool,
            counts=dict, skipped=list, limit=int | None)
        if state is not None:
            # Older versions have not written it.
            state.setdefault('examples', {})
            keys = ('file', 'split', 'tokens', 'documents', 'bytes')
            check_entries(self.progress, self.remedy, state['shards'], keys)
        return state

    def check_shards(self):
        """Raises BadInput if a shard that the part has written is damaged or missing."""
        check_shards(self.folder, self.state['shards'], self.remedy)

    def is_full(self):
        if self.limit is None:
            return False
        return count_tokens(self.state) + self.buffered['train'] >= self.limit

    def add(self, split, ids, n_bytes, mask=None):
        """Adds a document.

        ids      (n,) integers, BOS first
        n_bytes  length of its text in UTF-8
        mask     (n,) uint8, 1 for the tokens that the loss counts; None for plain text
        """
        self.buffers[split].append((ids, mask, n_bytes))
        self.buffered[split] += len(ids)

    def count(self, what, where, n=1):
        """Counts a record that gave no document, or n places in it that were changed or not used.

        what: a key of NOTES, 'key of a record: ...' or 'key of a message: ...', 'broken', 'empty'
        or 'dropped'; where: its location, and the fault of a broken one
        """
        self.state['counts'][what] = self.state['counts'].get(what, 0) + n
        if what == 'broken':
            self.state['skipped'].append(where)
        else:
            self.state['examples'].setdefault(what, where)

    def commit(self, file, record, done=False):
        """Writes the buffered documents, one shard per split, and then the progress.

        file, record  where the part continues
        """
        # A kill before the progress is written leaves shards of this number. The part then
        # continues from its last progress and writes the same shards over them.
        for split, documents in sorted(self.buffers.items()):
            ids, masks, n_bytes = zip(*documents, strict=True)
            name = f'{split}/{self.part:05d}_{self.state["commits"]:05d}'
            path = os.path.join(self.folder, name)
            n_tokens = self.buffered[split]
            shard = dict(
                file=f'{name}.bin', split=split, tokens=n_tokens, documents=len(documents),
                bytes=sum(n_bytes))
            header, dtype = shard_header(n_tokens, self.vocab_size)
            shard['sha256'] = write_atomic(f'{path}.bin', joined(header, ids, dtype))
            if masks[0] is not None:
                content = joined(b'', masks, np.uint8)
                shard['mask_sha256'] = write_atomic(f'{path}.mask', content)
                shard['loss_tokens'] = sum(int(mask.sum()) for mask in masks)
            self.state['shards'].append(shard)
        commits = self.state['commits'] + bool(self.buffers)
        self.state.update(commits=commits, file=file, record=record, done=done)
        self.buffers.clear()
        self.buffered.clear()
        write_json(self.progress, self.state)

    def delete(self):
        remove_part(self.folder, self.part)


def plain_counts(counts, examples):
    """Returns a line with the counts of records that are broken, dropped or empty, in a list."""
    parts = []
    for what in ('broken', 'dropped', 'empty'):
        if what in counts:
            # The broken ones are listed one by one.
            first = f' (first: {examples[what]})' if what in examples else ''
            parts.append(f'{counts[what]:,} {what}{first}')
    return [f'records left out: {", ".join(parts)}'] if parts else []


def count_lines(counts, examples):
    """Returns lines that say what was left out or changed: counts and first places of meta.json."""
    table = []
    for what, sentence in NOTES.items():
        if what in counts:
            table.append(f'{counts[what]:>12,}  {sentence} (first: {examples[what]})')
    for kind in ('message', 'record'):
        beginning = f'key of a {kind}: '
        keys = {w.removeprefix(beginning): w for w in sorted(counts) if w.startswith(beginning)}
        if keys:
            names = ', '.join(f'{key} ({counts[w]:,} {kind}s)' for key, w in keys.items())
            first = examples[[*keys.values()][0]]
            table.append(f'{"":12}  keys of a {kind} that are not used: {names} (first: {first})')
    if table:
        table.insert(0, 'left out, changed or not used:')
    return plain_counts(counts, examples) + table


def finish_source(folder, tokenizer, settings, states, **more):
    """Writes the tokenizer and meta.json, and removes progress/. Returns the content of meta.json.

    states  PartWriter.state of every part, in order
    more    further entries of meta.json
    Raises BadInput for a source without tokens.
    """
    shards = []
    skipped = []
    counts = collections.Counter()
    examples = {}
    for state in states:
        shards += state['shards']
        skipped += state['skipped']
        counts.update(state['counts'])
        examples = state['examples'] | examples
    if examples:
        more['examples'] = examples
    if not any(shard['tokens'] for shard in shards):
        reasons = plain_counts(counts, examples)
        for what, sentence in NOTES.items():
            if what in counts:
                reasons.append(f'{counts[what]:,} {sentence} (first: {examples[what]})')
        if skipped:
            reasons.append(f'The first broken one is {skipped[0]}')
        reasons = '. '.join(reasons or ['The input holds no text'])
        raise BadInput(f'nothing to write to {folder}. {reasons}.')
    splits = {}
    for shard in shards:
        totals = splits.setdefault(shard['split'], collections.Counter())
        for key in ('tokens', 'documents', 'bytes', 'loss_tokens'):
            if key in shard:
                totals[key] += shard[key]
    about = dict(
        name=tokenizer.path, fingerprint=tokenizer.fingerprint, bos_id=tokenizer.bos_id)
    meta = dict(
        settings=settings, shards=shards, splits=dict(sorted(splits.items())), counts=counts,
        skipped=skipped, vocab_size=tokenizer.vocab_size, tokenizer=about, **more)
    # meta.json comes after everything that it describes: it marks the source as complete.
    save_tokenizer(folder, tokenizer)
    write_json(os.path.join(folder, 'meta.json'), meta)
    shutil.rmtree(os.path.join(folder, 'progress'))
    return meta


def encode_text(tokenizer, text):
    """Returns the arguments of PartWriter.add for a text: (ids (n,) with BOS first, bytes)."""
    ids = np.concatenate(([tokenizer.bos_id], tokenizer.encode_document(text)))
    return ids, len(text.encode())


def write_source(folder, tokenizer, settings, splits, more_files=()):
    """Writes a small source in one go. Returns the content of meta.json.

    splits      dict from every split to its documents, an iterable of arguments of PartWriter.add
    more_files  pairs of a name and the bytes of a further file
    Of two processes the second one waits, and then finds the source complete.
    """
    with lock(folder, '00000', wait=True):
        meta = open_source(folder, settings)
        if meta is not None:
            return meta
        # A small source is not continued: remove what a killed run left behind.
        remove_part(folder, 0)
        writer = PartWriter(folder, 0, tokenizer.vocab_size)
        for split, documents in splits.items():
            for document in documents:
                writer.add(split, *document)
        for name, content in more_files:
            write_atomic(os.path.join(folder, name), [content])
        writer.commit(1, 0, done=True)
        return finish_source(folder, tokenizer, settings, [writer.state])


def print_table(metas, seconds=None, tokens_made=None):
    """Prints documents, tokens and bytes per token for every source and split, then the speed.

    metas        dict from the name of a source to the content of its meta.json
    seconds      time that was needed; None: no speed is printed
    tokens_made  tokens made in these seconds; None: all tokens in `metas`
    """
    print(f'{"source":<28}{"split":<8}{"documents":>14}{"tokens":>18}{"bytes/token":>13}')
    total = 0
    for name, meta in metas.items():
        for split, n in meta['splits'].items():
            total += n['tokens']
            ratio = n['bytes'] / n['tokens']
            print(f'{name:<28}{split:<8}{n["documents"]:>14,}{n["tokens"]:>18,}{ratio:>13.2f}')
    if not seconds:
        return
    made = total if tokens_made is None else tokens_made
    print(f'{made:,} tokens in {seconds:.1f} s: {made / seconds:,.0f} tokens/s')
