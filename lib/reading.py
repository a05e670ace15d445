"""From files to records: local files, the Hugging Face hub and https, all as streams; nothing is loaded whole.

JSON lines (plain, .gz, .zst), parquet and plain text. A file is cut into batches of raw records here, which is cheap;
decoding them is the workers' part (prepare/common.py).
"""
import contextlib
import fnmatch
import glob
import gzip
import hashlib
import io
import os
import zlib
from dataclasses import dataclass

import orjson
from isal import igzip, isal_zlib

from configurator import BadInput, RunFault

BATCH_BYTES = 1_000_000         # raw records handed to a worker at once
LONGEST_RECORD = 100 * 2**20    # bytes of a JSON line
LONGEST_TEXT = 8_000_000        # characters of a plain text file that make one document; a longer file becomes several
CUT_ABOVE = 512 * 2**20         # plain JSON lines and parquet files above this are cut into ranges
LARGEST_PART = 256 * 2**20      # stored bytes that one rank works on at a time
ENDINGS = tuple(f'{kind}{packed}' for kind in ('.jsonl', '.json', '.txt', '.md') for packed in ('', '.gz', '.zst', '.zstd')) + (
    '.parquet',)


@dataclass(frozen=True)
class File:
    path: str           # local path, hf:// or https:// URL
    name: str           # what identifies it whatever folder or machine it lies on
    size: int           # stored bytes
    start: int = 0      # records that begin in bytes start to stop are meant
    stop: int | None = None

    def __str__(self):
        return self.path if self.stop is None else f'{self.path} from byte {self.start:,}'


@dataclass(frozen=True)
class Batch:
    file: File
    first: int          # number of the first record within the file (or its range)
    records: object     # list of bytes (JSON lines), pyarrow.RecordBatch, or list of str


# -- which files -------------------------------------------------------------------------------------------------------

def local_files(pattern, layout=()):
    """Files that a path, a glob, a folder or several of them with commas between mean.

    layout: globs of the dataset's own repository; a folder that follows it gives just those files, another all below it.
    """
    files = []
    for part in pattern.split(','):
        part = os.path.expanduser(part.strip())
        if os.path.isdir(part):
            below = [os.path.join(folder, n) for folder, _, names in os.walk(part) for n in names if n.endswith(ENDINGS)]
            names = {path: os.path.relpath(path, part) for path in below}
            found = [path for path in below if any(matches(names[path], g) for g in layout)] or below
        else:
            found = [path for path in glob.glob(part, recursive=True) if os.path.isfile(path)]
            names = {path: os.path.basename(path) for path in found}
        if not found:
            raise BadInput(f"'{part}' matches no file" + (f' ending in {", ".join(ENDINGS)}.'
                                                                   if os.path.isdir(part) else '.'))
        files += [File(path, names[path], os.path.getsize(path)) for path in found]
    return sorted(set(files), key=lambda f: f.path)


def matches(name, pattern):
    """fnmatch, but ** alone crosses folders, as on the hub."""
    if '**' in pattern:
        return fnmatch.fnmatchcase(name, pattern.replace('**/', '*').replace('**', '*'))
    return name.count('/') == pattern.count('/') and fnmatch.fnmatchcase(name, pattern)


def split_url(url):
    """'hf://datasets/owner/name@revision/glob' -> ('owner/name', revision or None, glob)."""
    owner, name, pattern = url.removeprefix('hf://datasets/').split('/', 2)
    name, _, revision = name.partition('@')
    return f'{owner}/{name}', revision or None, pattern


@contextlib.contextmanager
def reaching(what, kind='datasets/', or_local='Or give downloaded files with --input.'):
    """Turns what the hub and the network raise into one sentence. what: the id of a dataset (or, kind='', of a model), or a URL."""
    import huggingface_hub.errors as hub
    page, faults = f'https://huggingface.co/{kind}{what}', (OSError, hub.HTTPError)
    if '://' in what:
        import aiohttp
        faults += (aiohttp.ClientError,)
    try:
        yield
    except faults as error:
        cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error    # HfFileSystem wraps them
        if isinstance(cause, hub.GatedRepoError):
            raise BadInput(f'{what} is gated: accept its terms at {page}, then run `hf auth login` or set HF_TOKEN. '
                           + or_local) from None
        if isinstance(cause, hub.RevisionNotFoundError):
            raise BadInput(f'{what} has no such revision: see {page}/commits/main and give another with --revision. '
                           + or_local) from None
        if isinstance(cause, hub.RepositoryNotFoundError):
            raise BadInput(f'{what} does not exist on the hub, or needs a token: see {page}, then run `hf auth login` or set '
                           f'HF_TOKEN. {or_local}') from None
        if isinstance(cause, FileNotFoundError):
            raise BadInput(f'{what}: no such file ({error}). {or_local}') from None
        reason = str(cause).splitlines()[0] if str(cause) else ''
        raise RunFault(f'{what} cannot be reached ({type(cause).__name__}: {reason}). Check the network and run again (what is '
                       f'written is kept). {or_local}') from None


def remote_files(urls, revision=None):
    """Files behind hf:// globs and https:// URLs, and the commit of every repository: (list of File, dict id -> sha).

    An URL without a revision means the newest commit, which is looked up once. `revision` overrides what the URLs say.
    """
    import huggingface_hub.errors as hub
    from huggingface_hub import HfApi, HfFileSystem
    files, commits = [], {}
    for url in urls:
        if url.startswith('https://') or url.startswith('http://'):
            with reaching(url):
                import fsspec
                size = fsspec.filesystem('http').info(url)['size']
            files.append(File(url, url, size))
            continue
        repo, pinned, pattern = split_url(url)
        with reaching(repo):
            commits[repo] = commits.get(repo) or revision or pinned or HfApi().dataset_info(repo).sha
            root = f'datasets/{repo}@{commits[repo].replace("/", "%2F")}/'
            try:
                found = HfFileSystem().glob(root + pattern, detail=True)
            except FileNotFoundError as error:
                if isinstance(error.__cause__, (hub.RepositoryNotFoundError, hub.RevisionNotFoundError)):
                    raise
                found = {}          # the pattern's folder does not exist
        files += [File(f'hf://{path}', f'{repo}/{path.removeprefix(root)}', info['size'])
                  for path, info in found.items() if info['type'] == 'file']
        if not found:
            raise BadInput(f'{repo} has no file {pattern} at revision {commits[repo]}. Its layout may have changed: see '
                           f'https://huggingface.co/datasets/{repo}/tree/main and give --revision, or files with --input.')
    return files, commits


def make_parts(files):
    """Groups files into parts, the unit that one rank works on: list of lists of File.

    A function of names and sizes alone. Files come in the order of their hashed names, so that --max_tokens gives a fair
    taste of all; small ones are gathered, large ones cut where their format allows.
    """
    size = min(max(sum(f.size for f in files) // 64, 2**20), LARGEST_PART)
    parts, gathered = [], 0
    for file in sorted(files, key=lambda f: (hashlib.sha256(f.name.encode()).digest(), f.path)):
        if file.size > CUT_ABOVE and file.path.endswith(('.jsonl', '.json', '.parquet')):
            parts += [[File(file.path, file.name, file.size, start, min(start + LARGEST_PART, file.size))]
                      for start in range(0, file.size, LARGEST_PART)]
            gathered = 0
            continue
        if gathered == 0:
            parts.append([])
        parts[-1].append(file)
        gathered = gathered + file.size if gathered + file.size < size else 0
    return parts


# -- raw records -------------------------------------------------------------------------------------------------------

def open_bytes(file):
    """A binary stream over the file's stored bytes."""
    if '://' not in file.path:
        return open(file.path, 'rb')
    if file.path.startswith('hf://'):
        from huggingface_hub import HfFileSystem
        stream = HfFileSystem().open(file.path.removeprefix('hf://'), 'rb')
    else:
        import fsspec
        stream = fsspec.filesystem('http').open(file.path, 'rb')
    return io.BufferedReader(stream, 2**20)


def unpacked(stream, path):
    """The stream behind gzip or zstd, if the file's name says so."""
    if path.endswith('.gz'):
        return io.BufferedReader(igzip.GzipFile(fileobj=stream), 2**20)
    if path.endswith(('.zst', '.zstd')):
        import pyarrow  # zstandard's own reader ends a truncated file early without a word; this one raises
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, 'r'), 'zstd'), 2**20)
    return stream


def read_batches(file, columns, skip=0):
    """Yields the Batches of a file after its first `skip` records. BadInput for a broken file or a missing column."""
    import pyarrow
    kind = file.path.removesuffix('.gz').removesuffix('.zst').removesuffix('.zstd').rsplit('.', 1)[-1]
    where = '/'.join(file.name.split('/')[:2]) if file.path.startswith('hf://') else file.name
    with reaching(where) if '://' in file.path else contextlib.nullcontext():
        with open_bytes(file) as stream:
            try:
                if kind == 'parquet':
                    yield from parquet_batches(file, stream, columns, skip)
                elif kind in ('json', 'jsonl'):
                    yield from line_batches(file, unpacked(stream, file.path), skip)
                else:
                    yield from text_batches(file, unpacked(stream, file.path), skip)
            except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error, isal_zlib.error, pyarrow.ArrowException) as error:
                raise BadInput(f'{file.path} cannot be read: it is damaged or not what its name says ({error}). Mend or leave out '
                               'the file.') from None
            except OSError as error:        # pyarrow's name for a broken zstd or parquet stream; the system's own have a number
                if type(error) is not OSError or error.errno is not None:
                    raise
                raise BadInput(f'{file.path} cannot be read: it is damaged ({error}). Mend or leave out the file.') from None


def line_batches(file, stream, skip):
    """JSON lines: batches of about BATCH_BYTES, blank lines included (they count as records)."""
    number, lines, size, position = 0, [], 0, file.start
    if file.start:                  # a line belongs to the range that it begins in
        stream.seek(file.start - 1)
        position += len(stream.readline()) - 1
    while file.stop is None or position < file.stop:
        line = stream.readline(LONGEST_RECORD)
        if not line:
            break
        if len(line) == LONGEST_RECORD:
            raise BadInput(f'{file}: line {number + 1} is longer than {LONGEST_RECORD // 2**20} MiB: no JSON lines.')
        position += len(line)
        number += 1
        if number <= skip:
            continue
        lines.append(line)
        size += len(line)
        if size >= BATCH_BYTES:
            yield Batch(file, number - len(lines), lines)
            lines, size = [], 0
    if lines:
        yield Batch(file, number - len(lines), lines)


def text_batches(file, stream, skip):
    """Plain text: the whole file, or pieces of at most LONGEST_TEXT characters that end at the end of a line."""
    stream, number, kept = io.TextIOWrapper(stream, encoding='utf-8'), 0, ''
    while True:
        text = stream.read(LONGEST_TEXT - len(kept))
        text, kept = kept + text, ''
        if not text:
            return
        if len(text) == LONGEST_TEXT:
            end = text.rfind('\n') + 1 or LONGEST_TEXT
            text, kept = text[:end], text[end:]
        if number >= skip:
            yield Batch(file, number, [text])
        number += 1


def parquet_batches(file, stream, columns, skip):
    """Rows of the row groups that begin in the file's range, `columns` only ([]: all)."""
    import pyarrow
    import pyarrow.parquet
    try:
        parquet = pyarrow.parquet.ParquetFile(stream, buffer_size=2**20)
    except pyarrow.ArrowInvalid as error:
        raise BadInput(f'{file.path} is no parquet file: {error}') from None
    columns = columns or parquet.schema_arrow.names
    missing = [c for c in columns if c not in parquet.schema_arrow.names]
    if missing:
        raise BadInput(f"{file.path}: no column '{missing[0]}'; it has {parquet.schema_arrow.names}. (--column says which, for "
                       'your own text.)')
    number = 0
    for group in range(parquet.num_row_groups):
        about = parquet.metadata.row_group(group)
        begins = min(about.column(i).dictionary_page_offset or about.column(i).data_page_offset for i in range(about.num_columns))
        if file.stop is not None and not file.start <= begins < file.stop:
            continue
        if number + about.num_rows <= skip:
            number += about.num_rows
            continue
        rows = max(1, min(4096, BATCH_BYTES * about.num_rows // max(1, about.total_byte_size)))
        for batch in parquet.iter_batches(batch_size=rows, row_groups=[group], columns=columns):
            seen = max(0, min(skip - number, batch.num_rows))
            if seen < batch.num_rows:
                yield Batch(file, number + seen, batch.slice(seen))
            number += batch.num_rows


# -- records -----------------------------------------------------------------------------------------------------------

def records_of(batch):
    """Yields (number, record) for every record of a batch: a dict, the str of a plain text file, or the ValueError that says
    why it is none. Blank lines are passed over.
    """
    if not isinstance(batch.records, list):
        yield from enumerate(batch.records.to_pylist(), batch.first)
        return
    for i, record in enumerate(batch.records, batch.first):
        if isinstance(record, str):
            yield i, record
            continue
        try:
            record = orjson.loads(record)
        except orjson.JSONDecodeError as error:         # broken UTF-8 and halves of surrogate pairs are errors to it, too
            if not record.strip():
                continue
            record = ValueError(f'no valid JSON ({error})')
        yield i, record if isinstance(record, (dict, ValueError)) else ValueError(f'no JSON object but {type(record).__name__}')


def location(batch, number):
    """Where a record stands, for messages: file and line or row, counted from 1."""
    if not isinstance(batch.records, list):
        return f'{batch.file}: row {number + 1}'
    return f'{batch.file.path}:{number + 1}' if batch.file.start == 0 else f'{batch.file}: line {number + 1}'
