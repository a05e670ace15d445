"""What the scripts in prepare/ share: reading documents, tokenizing on several cores, writing shards.

A source is written so that a kill at any moment loses nothing that was complete and leaves nothing half done: shards go to
a temporary name, are synced and renamed, and `progress.json` (renamed likewise) says how many documents the finished ones
hold. Run again with the same settings and the script goes on there; the bytes that come out do not depend on it, nor on
the number of workers. When all is done, meta.json replaces progress.json.
"""
import collections
import concurrent.futures
import glob
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import time
import zlib

import numpy as np

from configurator import BadInput, RunFault
from data import shard_bytes
from tokenizer import load_tokenizer, save_tokenizer

BATCH_CHARACTERS = 500_000      # text handed to a worker at once
TEXT_ENDINGS = ('.jsonl', '.json', '.jsonl.gz', '.json.gz', '.jsonl.zst', '.json.zst', '.parquet',
                '.txt', '.txt.gz', '.txt.zst', '.md')


# -- reading documents -------------------------------------------------------------------------------------------------

def find_files(pattern):
    """Files that a path, a glob, a folder (searched through) or several of them with commas between mean, sorted."""
    files = []
    for part in pattern.split(','):
        part = os.path.expanduser(part.strip())
        if os.path.isdir(part):
            found = [os.path.join(folder, n) for folder, _, names in os.walk(part) for n in names if n.endswith(TEXT_ENDINGS)]
        else:
            found = [path for path in glob.glob(part, recursive=True) if os.path.isfile(path)]
        if not found:
            raise BadInput(f"--input: '{part}' matches no file" + (f' ending in {", ".join(TEXT_ENDINGS)}.'
                                                                   if os.path.isdir(part) else '.'))
        files += found
    return sorted(set(files))


def open_text(path):
    """A text stream (UTF-8) over a plain, .gz or .zst file."""
    if path.endswith('.gz'):
        return gzip.open(path, 'rt', encoding='utf-8')
    if path.endswith('.zst'):
        import pyarrow          # zstandard's own reader ends a truncated file early without a word; this one raises
        return io.TextIOWrapper(pyarrow.input_stream(path, compression='zstd'), encoding='utf-8')
    return open(path, encoding='utf-8')


def unreadable(path):
    """The errors that mean a file's bytes are not what its name says."""
    errors = (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error)
    return (*errors, OSError) if path.endswith('.zst') else errors        # pyarrow's name for a broken stream


def read_documents(files, column):
    """Yields the text of one document after the other. JSONL: a record a line; parquet: a row; other files: the whole.

    `column` is the field that holds the text. Raises BadInput with file and line for a broken record.
    """
    for path in files:
        try:
            if path.endswith('.parquet'):
                yield from read_parquet(path, column)
            elif '.json' in os.path.basename(path):
                with open_text(path) as f:
                    for number, line in enumerate(f, 1):
                        if line.strip():
                            yield record_text(line, column, f'{path}:{number}')
            else:
                with open_text(path) as f:
                    yield f.read()
        except unreadable(path) as error:
            raise BadInput(f'{path} cannot be read as UTF-8 text: {error}. Mend or leave out the file.') from None


def record_text(line, column, where):
    """The text of one JSON line."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise BadInput(f'{where}: no valid JSON ({error}).') from None
    if not isinstance(record, dict) or not isinstance(record.get(column), str):
        keys = list(record) if isinstance(record, dict) else type(record).__name__
        raise BadInput(f"{where}: no text under '{column}'; the record has {keys}. Set --column.")
    try:
        record[column].encode()
    except UnicodeEncodeError:
        raise BadInput(f'{where}: the text holds half of a surrogate pair (a broken \\u escape). Mend or drop the record.') from None
    return record[column]


def read_parquet(path, column):
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise BadInput(f'{path} is no parquet file: {error}') from None
    if column not in file.schema_arrow.names:
        raise BadInput(f"{path}: no column '{column}'; it has {file.schema_arrow.names}. Set --column.")
    kind = file.schema_arrow.field(column).type
    if not pyarrow.types.is_string(kind) and not pyarrow.types.is_large_string(kind):
        raise BadInput(f"{path}: column '{column}' is {kind}, not text. Set --column.")
    batches = file.iter_batches(batch_size=1000, columns=[column])
    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowException, OSError) as error:
            raise BadInput(f'{path} is damaged: {error}. Mend or leave out the file.') from None
        if batch is None:
            return
        yield from (text for text in batch.column(0).to_pylist() if text is not None)


# -- writing -----------------------------------------------------------------------------------------------------------

def write_atomic(path, *parts):
    """Writes byte strings to `path` by way of a temporary file, synced and renamed: all or nothing."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f'{path}.tmp'
    try:
        with open(temporary, 'wb') as f:
            for part in parts:
                f.write(part)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        error.filename = path
        raise


def write_json(path, content):
    write_atomic(path, json.dumps(content, indent=1, sort_keys=True).encode())


class SourceWriter:
    """Collects tokenized documents per split and writes a numbered shard of each split at every `commit`."""

    def __init__(self, folder, tokenizer, settings):
        """settings: JSON-able dict of everything that the result depends on. A folder made with others is refused."""
        self.folder, self.tokenizer, self.settings = folder, tokenizer, settings
        self.buffers = collections.defaultdict(list)       # split -> [(ids, bytes of text)]
        self.buffered = collections.Counter()              # split -> tokens
        self.shards, self.n_consumed, self.n_commits, self.complete = [], 0, 0, False
        for name in ('progress.json', 'meta.json'):
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                with open(path, encoding='utf-8') as f:
                    state = json.load(f)
                if state['settings'] != settings:
                    changed = sorted(k for k in settings if state['settings'].get(k) != settings[k])
                    raise BadInput(f'{folder} was made with other settings ({", ".join(changed)}). Delete it to make it anew.')
                self.shards, self.n_consumed, self.n_commits = state['shards'], state['consumed'], state['commits']
                self.complete = name == 'meta.json'
                break
        else:
            if os.path.isdir(folder) and os.listdir(folder):
                raise BadInput(f'{folder} is not empty and was not made by this script. Delete it or choose another --source.')

    def n_tokens(self, split):
        """Tokens of a split so far, written or waiting."""
        return sum(s['tokens'] for s in self.shards if s['split'] == split) + self.buffered[split]

    def add(self, split, ids, n_bytes):
        """Adds one document: ids (n,) without BOS, which is put in front; n_bytes of UTF-8 text."""
        ids = np.concatenate(([self.tokenizer.bos_id], ids)).astype(np.uint32)
        self.buffers[split].append((ids, n_bytes))
        self.buffered[split] += len(ids)

    def commit(self):
        """Writes what waits, one shard per split, and then progress.json."""
        for split, documents in sorted(self.buffers.items()):
            header, body = shard_bytes(np.concatenate([ids for ids, _ in documents]), self.tokenizer.vocab_size)
            name = f'{split}/{self.n_commits:06d}.bin'
            write_atomic(os.path.join(self.folder, name), header, body)
            self.shards.append(dict(file=name, split=split, tokens=self.buffered[split], documents=len(documents),
                                    bytes=sum(n for _, n in documents), sha256=hashlib.sha256(header + body).hexdigest()))
        self.buffers.clear()
        self.buffered.clear()
        self.n_commits += 1
        write_json(os.path.join(self.folder, 'progress.json'), self.state())

    def state(self):
        return dict(settings=self.settings, shards=self.shards, consumed=self.n_consumed, commits=self.n_commits)

    def finish(self):
        """Writes the rest, the tokenizer and meta.json; the source is complete with that."""
        if self.buffers:
            self.commit()
        if not self.shards:
            raise BadInput(f'nothing to write to {self.folder}: the input holds no text (or max_tokens is 0).')
        save_tokenizer(self.folder, self.tokenizer)
        tokenizer = dict(name=self.tokenizer.path, fingerprint=self.tokenizer.fingerprint, bos_id=self.tokenizer.bos_id)
        splits = {split: {key: sum(s[key] for s in self.shards if s['split'] == split) for key in ('tokens', 'documents', 'bytes')}
                  for split in sorted({s['split'] for s in self.shards})}
        write_json(os.path.join(self.folder, 'meta.json'), dict(
            self.state(), tokenizer=tokenizer, vocab_size=self.tokenizer.vocab_size, splits=splits,
            dataset=self.settings.get('dataset'), revision=self.settings.get('revision')))
        progress = os.path.join(self.folder, 'progress.json')
        if os.path.exists(progress):
            os.remove(progress)
        self.complete = True


# -- tokenizing --------------------------------------------------------------------------------------------------------

_worker_tokenizer = None


def _start_worker(tokenizer_path):
    global _worker_tokenizer
    _worker_tokenizer = load_tokenizer(tokenizer_path)


def _tokenize(texts):
    return [np.asarray(_worker_tokenizer.encode(text), dtype=np.uint32) for text in texts]


def batches_of(documents):
    """Groups texts into lists of about BATCH_CHARACTERS."""
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenized(documents, tokenizer_path, workers):
    """Yields (text, ids) in the order of `documents`, tokenized by `workers` processes a bounded way ahead."""
    if workers <= 1:
        _start_worker(tokenizer_path)
        for batch in batches_of(documents):
            yield from zip(batch, _tokenize(batch))
        return
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (tokenizer_path,)) as pool:
        waiting = collections.deque()
        try:
            for batch in batches_of(documents):
                waiting.append((batch, pool.submit(_tokenize, batch)))
                if len(waiting) > 3 * workers:
                    texts, future = waiting.popleft()
                    yield from zip(texts, future.result())
            for texts, future in waiting:
                yield from zip(texts, future.result())
        except concurrent.futures.process.BrokenProcessPool:
            raise RunFault('a tokenizing process died (out of memory?). What is written is safe: run again, perhaps with '
                           'fewer --workers.') from None
        except GeneratorExit:               # the caller has enough tokens; drop what has not begun
            pool.shutdown(cancel_futures=True)
            raise


def check_space(folder, n_bytes):
    """Prints the space that n_bytes of shards in `folder` need, less what it holds already, and the space there is.

    Raises BadInput when it will not fit.
    """
    held = sum(os.path.getsize(path) for path in glob.glob(os.path.join(folder, '**', '*.bin'), recursive=True))
    n_bytes = max(0, n_bytes - held)
    while not os.path.isdir(folder):
        folder = os.path.dirname(os.path.abspath(folder))
    free = shutil.disk_usage(folder).free
    print(f'disk: about {n_bytes / 2**20:,.1f} MiB needed, {free / 2**20:,.1f} MiB free in {folder}')
    if n_bytes > free:
        raise BadInput(f'{folder} has {free / 2**20:,.1f} MiB free, about {n_bytes / 2**20:,.1f} MiB are needed. '
                       'Free some space, choose another --out or set --max_tokens.')


def split_of(text, val_fraction):
    """'val' for val_fraction of all documents, chosen by their hash, else 'train': equal documents land together."""
    return 'val' if int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) < val_fraction * 2**32 else 'train'


def write_source(folder, documents, tokenizer_path, settings, max_tokens, shard_tokens, val_fraction, workers, progress):
    """Tokenizes documents (iterator of str, the same at every call) into the shards of `folder`. Returns its SourceWriter.

    max_tokens: training tokens to stop after (None: all). shard_tokens: a shard is closed at the first document that
    reaches it. progress: called with the characters of every document passed. Goes on after a kill (module docstring).
    """
    tokenizer = load_tokenizer(tokenizer_path)
    settings = dict(settings, tokenizer=tokenizer.fingerprint, max_tokens=max_tokens, shard_tokens=shard_tokens,
                    val_fraction=val_fraction)
    writer = SourceWriter(folder, tokenizer, settings)
    if writer.complete:
        print(f'{folder} is complete already; delete it to make it anew.')
        return writer
    if writer.n_consumed:
        print(f'{folder}: going on after {writer.n_consumed:,} documents and {len(writer.shards)} shards')
    documents = iter(documents)
    for _, text in zip(range(writer.n_consumed), documents):
        progress(len(text))
    if max_tokens is None or writer.n_tokens('train') < max_tokens:
        for text, ids in tokenized(documents, tokenizer_path, workers):
            progress(len(text))
            writer.n_consumed += 1
            if len(ids) == 0:
                continue
            writer.add(split_of(text, val_fraction), ids, len(text.encode()))
            if writer.buffered['train'] >= shard_tokens:
                writer.commit()
            if max_tokens is not None and writer.n_tokens('train') >= max_tokens:
                break
    writer.finish()
    return writer


def print_table(writers, seconds):
    """One line per source and split: documents, tokens, bytes per token; then the time."""
    print(f'{"source":<24}{"split":<8}{"documents":>12}{"tokens":>16}{"bytes/token":>13}')
    total = 0
    for writer in writers:
        for split in sorted({s['split'] for s in writer.shards}):
            shards = [s for s in writer.shards if s['split'] == split]
            tokens, n_bytes = sum(s['tokens'] for s in shards), sum(s['bytes'] for s in shards)
            total += tokens
            print(f'{os.path.basename(writer.folder):<24}{split:<8}{sum(s["documents"] for s in shards):>12,}{tokens:>16,}'
                  f'{n_bytes / tokens:>13.2f}')
    print(f'{total:,} tokens in {seconds:.1f} s: {total / seconds:,.0f} tokens/s')


def stopwatch():
    """A function that returns the seconds since now."""
    start = time.monotonic()
    return lambda: time.monotonic() - start
