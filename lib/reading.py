"""From files to records. Reads local files, the Hugging Face hub and https as streams.

The formats are JSON lines, plain text (both also as .gz or .zst) and parquet. The ending of a name
says which one a file has, in capitals or not. Another ending is an error. This file only cuts a
file into batches of raw records, which is cheap. The workers of prepare/common.py decode them.
"""
import collections
import contextlib
import fnmatch
import glob
import gzip
import hashlib
import io
import os
import zlib
from dataclasses import dataclass, replace

import fsspec
import orjson
from isal import igzip, isal_zlib

from configurator import BadInput, RunFault

BATCH_BYTES = 1_000_000         # raw records that a worker gets at once
LONGEST_RECORD = 100 * 2**20    # bytes of a JSON line
LONGEST_TEXT = 8_000_000        # characters of a document of a plain text file
CUT_ABOVE = 512 * 2**20         # larger plain JSON lines and parquet files are cut into ranges
LARGEST_PART = 256 * 2**20      # stored bytes that one rank works on at a time
LINES = ('.jsonl', '.ndjson', '.jl', '.json')       # JSON lines
TEXTS = ('.txt', '.md')
PLAIN = (*LINES, *TEXTS)
PACKED = ('.gz', '.zst', '.zstd')
KNOWN = f"{', '.join(PLAIN)} (also with {', '.join(PACKED)}) and .parquet"
BOM = b'\xef\xbb\xbf'            # Windows begins a UTF-8 file with it
MAGIC = {                       # how files begin that are no text
    b'\x1f\x8b': 'gzip', b'\x28\xb5\x2f\xfd': 'zstd', b'PAR1': 'parquet', b'PK\x03\x04': 'zip',
    b'\xff\xfe': 'UTF-16', b'\xfe\xff': 'UTF-16'}


@dataclass(frozen=True)
class File:
    path: str           # local path, hf:// or https:// URL
    name: str           # identifies the file, whatever folder or machine it is on
    size: int           # stored bytes
    start: int = 0      # only the records that begin in bytes start to stop are read
    stop: int | None = None
    content: str = ''   # changes with the content: a sha256, or what the hub or server gives. '':
                        # not known

    def __str__(self):
        return self.path if self.stop is None else f'{self.path} from byte {self.start:,}'


@dataclass(frozen=True)
class Batch:
    file: File
    first: int          # number of the first record within the file (or its range)
    records: object     # list of bytes (JSON lines), pyarrow.RecordBatch, or list of str


# -- which files -----------------------------------------------------------------------------------


def kind_of(path):
    """Returns 'lines', 'text' or 'parquet' by the ending of a path or URL. None: another ending."""
    name = path.lower()
    if '://' in name:
        name = name.partition('?')[0]
    if name.endswith('.parquet'):
        return 'parquet'
    for packing in PACKED:
        name = name.removesuffix(packing)
    if name.endswith(LINES):
        return 'lines'
    return 'text' if name.endswith(TEXTS) else None


def check_kind(path):
    """Returns the kind of a file. Raises BadInput for an ending that is not known."""
    kind = kind_of(path)
    if kind is None:
        raise BadInput(
            f"{path}: files with this ending are not read. Known are {KNOWN}. Convert the file, or "
            'rename it if its ending is wrong.')
    return kind


def local_files(pattern, layout=(), say=print):
    """Returns the Files that a path, a glob or a folder means, or several separated by commas.

    layout  globs of the dataset's repository. A folder that contains files of this layout gives
            only those. Any other folder gives all files below it that can be read.
    say     gets one sentence about the files of a folder that are left out, and one about empty
            files
    Raises BadInput if nothing matches, and for a file outside a folder with an unknown ending.
    """
    found = {}      # absolute path -> File: patterns may overlap, and a file is read once
    # A name may contain a comma or the characters of a glob.
    parts = [pattern] if os.path.exists(os.path.expanduser(pattern)) else pattern.split(',')
    for part in parts:
        part = os.path.expanduser(part.strip())
        if '://' in part:
            raise BadInput(f"'{part}' is a URL, and only local files can be given. Download it.")
        if os.path.isdir(part):
            paths = files_below(part, layout, say)
        else:
            # Names do not depend on where the files lie. They order the parts, so a copy of the
            # files in another folder gives the same source.
            paths = [(path, os.path.basename(path)) for path in files_matching(part, say)]
        for path, name in paths:
            found.setdefault(os.path.abspath(path), File(path, name, os.path.getsize(path)))
    files = sorted(found.values(), key=lambda f: f.path)
    empty = [file.path for file in files if file.size == 0]
    if empty:
        say(f'{len(empty):,} of {len(files):,} input files are empty, for example {empty[0]}')
    return files


def check_regular(path):
    """Raises BadInput for a link to nothing and for a device or pipe."""
    if not os.path.exists(path):
        raise BadInput(f'{path} is a link to {os.readlink(path)}, which does not exist.')
    if not os.path.isfile(path):
        raise BadInput(f'{path} is no regular file.')


def files_matching(pattern, say):
    """Returns the paths of the files that a path or glob means. Raises BadInput as local_files."""
    paths = [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)
    files = []
    folders = []
    for path in paths:
        if os.path.isdir(path):
            folders.append(path)
            continue
        check_regular(path)
        check_kind(path)
        files.append(path)
    if not files:
        raise BadInput(
            f"'{pattern}' matches no file. Give a file, a glob in quotes, a folder, or several "
            'separated by commas.')
    if folders and '**' not in pattern:
        say(f"'{pattern}': {len(folders):,} folders are left out, for example {folders[0]}")
    return files


def files_below(folder, layout, say):
    """Returns [(path, path relative to `folder`)] of the files in a folder that can be read.

    Raises BadInput if there is none.
    """
    below = []
    left_out = collections.Counter()
    example = {}

    def leave_out(why, name):
        left_out[why] += 1
        example.setdefault(why, name)

    def fail(error):
        raise error

    # Without onerror, os.walk passes over folders that it must not read.
    for where, folders, names in os.walk(folder, onerror=fail):
        for name in list(folders):
            path = os.path.join(where, name)
            if name.startswith('.'):
                leave_out('hidden', os.path.relpath(path, folder))
                folders.remove(name)
            elif os.path.islink(path):
                leave_out('a link to a folder', os.path.relpath(path, folder))
        for name in names:
            path = os.path.join(where, name)
            relative = os.path.relpath(path, folder)
            if name.startswith('.'):
                leave_out('hidden', relative)
            elif kind_of(name) is None:
                leave_out(f"ending '{os.path.splitext(name)[1].lower()}'", relative)
            else:
                check_regular(path)
                below.append((path, relative))
    # A download of a full repository also holds files that the dataset does not use.
    in_layout = [entry for entry in below if any(matches(entry[1], g) for g in layout)]
    if in_layout:
        for _, relative in sorted({*below} - {*in_layout}):
            leave_out("not in the dataset's layout", relative)
        below = in_layout
    reasons = ', '.join(f'{n:,} {why} ({example[why]})' for why, n in left_out.most_common(6))
    if not below:
        there = f' It has {reasons}.' if reasons else ''
        raise BadInput(f"'{folder}' has no file that can be read.{there} Known are {KNOWN}.")
    if reasons:
        say(f"'{folder}': {len(below):,} files are read, {left_out.total():,} left out: {reasons}")
    return below


def matches(name, pattern):
    """As fnmatch, but only ** crosses folders, as on the hub."""
    if '**' in pattern:
        return fnmatch.fnmatchcase(name, pattern.replace('**/', '*').replace('**', '*'))
    same_depth = name.count('/') == pattern.count('/')
    return same_depth and fnmatch.fnmatchcase(name, pattern)


def split_url(url):
    """'hf://datasets/owner/name@revision/glob' -> ('owner/name', revision or None, glob)."""
    owner, name, pattern = url.removeprefix('hf://datasets/').split('/', 2)
    name, _, revision = name.partition('@')
    return f'{owner}/{name}', revision or None, pattern


@contextlib.contextmanager
def reaching(what, kind='datasets/', or_local='Or give downloaded files with --input.'):
    """Turns the exceptions of the hub and of the network into BadInput and RunFault.

    what      the id of a dataset, the id of a model (with kind=''), or a URL
    or_local  the sentence that says how to use local files instead
    """
    import huggingface_hub.errors as hub

    faults = (OSError, hub.HTTPError)
    if '://' in what:
        import aiohttp
        faults += (aiohttp.ClientError,)
    page = f'https://huggingface.co/{kind}{what}'
    sign_in = 'run `hf auth login` or set HF_TOKEN'
    try:
        yield
    except faults as error:
        cause = error
        if isinstance(error, FileNotFoundError) and error.__cause__:  # HfFileSystem wraps them
            cause = error.__cause__
        if isinstance(cause, hub.GatedRepoError):
            message = f'is gated: accept its terms at {page}, then {sign_in}'
        elif isinstance(cause, hub.RevisionNotFoundError):
            message = f'has no such revision: see {page}/commits/main and give one with --revision'
        elif isinstance(cause, hub.RepositoryNotFoundError):
            message = f'does not exist on the hub, or needs a token: see {page}, then {sign_in}'
        elif isinstance(cause, FileNotFoundError):
            message = f'has no such file ({error})'
        else:
            reason = str(cause).partition('\n')[0]
            raise RunFault(
                f'{what} cannot be reached ({type(cause).__name__}: {reason}). Check the network '
                f'and run again. What is written is kept. {or_local}'
            ) from None
        raise BadInput(f'{what} {message}. {or_local}') from None


def remote_files(urls, revision=None):
    """Finds the files behind hf:// globs and https:// URLs. Returns (list of File, commits).

    commits   dict from the id of every repository to the sha of its commit
    revision  overrides those in the URLs. Without one a URL means the newest commit
    Raises BadInput for a repository, revision or file that does not exist. Raises RunFault without
    a network.
    """
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    files = []
    commits = {}
    for url in urls:
        if url.startswith(('https://', 'http://')):
            with reaching(url):
                about = fsspec.filesystem('http').info(url)
            files.append(File(url, url, about['size'], content=about.get('ETag', '')))
            continue
        repo, pinned, pattern = split_url(url)
        with reaching(repo):
            # All globs of a repository read the same commit, even if a new one appears meanwhile.
            if repo not in commits:
                commits[repo] = revision or pinned or HfApi().dataset_info(repo).sha
            # A revision such as refs/convert/parquet contains slashes.
            root = f'datasets/{repo}@{commits[repo].replace("/", "%2F")}/'
            try:
                found = HfFileSystem().glob(root + pattern, detail=True)
            except FileNotFoundError as error:
                if isinstance(error.__cause__, (RepositoryNotFoundError, RevisionNotFoundError)):
                    raise
                found = {}  # the folder of the pattern does not exist
        for path, info in found.items():
            if info['type'] == 'file':
                name = f'{repo}/{path.removeprefix(root)}'
                content = info['lfs'].sha256 if info.get('lfs') else info.get('blob_id', '')
                files.append(File(f'hf://{path}', name, info['size'], content=content))
        if not found:
            raise BadInput(
                f'{repo} has no file {pattern} at revision {commits[repo]}. Its layout may have '
                f'changed: see https://huggingface.co/datasets/{repo}/tree/main and give '
                '--revision, or files with --input.')
    return files, commits


def make_parts(files):
    """Groups files into parts, the units that a rank works on. Returns a list of lists of File.

    The result depends only on names and sizes. Files come in the order of their hashed names, so
    that --max_tokens gives a fair sample of all of them. Small files are gathered into one part.
    Large ones are cut where their format allows it.
    """
    # Many files make about 64 parts, and more above 16 GiB, so that many ranks can share a source.
    # A small source has fewer, of at least 1 MiB.
    size = min(max(sum(f.size for f in files) // 64, 2**20), LARGEST_PART)
    parts = []
    gathered = 0        # stored bytes of the last part; 0: the next file begins a new one
    for file in sorted(files, key=lambda f: (hashlib.sha256(f.name.encode()).digest(), f.path)):
        # Other files are not cut: compressed lines must be unpacked from their start.
        if file.size > CUT_ABOVE and file.path.lower().endswith((*LINES, '.parquet')):
            for start in range(0, file.size, LARGEST_PART):
                stop = min(start + LARGEST_PART, file.size)
                parts.append([replace(file, start=start, stop=stop)])
            gathered = 0
            continue
        if gathered == 0:
            parts.append([])
        parts[-1].append(file)
        gathered += file.size
        if gathered >= size:
            gathered = 0
    return parts


# -- raw records -----------------------------------------------------------------------------------


def open_bytes(file):
    """Opens a binary stream over the file's stored bytes."""
    if '://' not in file.path:
        return open(file.path, 'rb')
    fs, path = fsspec.core.url_to_fs(file.path)
    # fsspec's files find line ends in Python. This buffer does it in C.
    return io.BufferedReader(fs.open(path, 'rb'), 2**20)


def unpacked(stream, path):
    """Returns the stream of the unpacked content if the file's name ends in .gz, .zst or .zstd."""
    path = path.lower()
    if path.endswith('.gz'):
        return io.BufferedReader(igzip.GzipFile(fileobj=stream), 2**20)
    if path.endswith(('.zst', '.zstd')):
        # The package zstandard silently ends early in a truncated file. pyarrow raises.
        import pyarrow

        file = pyarrow.PythonFile(stream, 'r')
        return io.BufferedReader(pyarrow.CompressedInputStream(file, 'zstd'), 2**20)
    return stream


def read_batches(file, columns, skip=0):
    """Yields the Batches of a File after its first `skip` records.

    columns  fields of a parquet row to read; []: all
    Raises BadInput for a damaged file, an unknown ending or a missing column.
    """
    import pyarrow

    damage = (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error, isal_zlib.error)
    damage += (pyarrow.ArrowException,)
    kind = check_kind(file.path)
    if file.size == 0 and not file.path.lower().endswith(PLAIN):
        raise BadInput(f'{file.path} is empty, so it is damaged. Repair or leave out the file.')
    guard = contextlib.nullcontext()
    if '://' in file.path:
        # The name of a file from the hub begins with the owner and name of its dataset.
        is_hub = file.path.startswith('hf://')
        guard = reaching('/'.join(file.name.split('/')[:2]) if is_hub else file.name)
    with guard, open_bytes(file) as stream:
        try:
            if kind == 'parquet':
                yield from parquet_batches(file, stream, columns, skip)
            elif kind == 'lines':
                yield from line_batches(file, unpacked(stream, file.path), skip)
            else:
                yield from text_batches(file, unpacked(stream, file.path), skip)
        except (*damage, OSError) as error:
            # For a damaged zst or parquet stream pyarrow raises an OSError without a number.
            is_pyarrows = type(error) is OSError and error.errno is None
            if not isinstance(error, damage) and not is_pyarrows:
                raise
            raise BadInput(
                f'{file.path} cannot be read: it is damaged or not what its name says ({error}). '
                'Repair or leave out the file.') from None


def check_lines(path, stream):
    """Raises BadInput for a file of another format, such as one JSON array, by its beginning.

    It reads nothing from the stream.
    """
    start = stream.peek(2**16)
    for magic, name in MAGIC.items():
        if start.startswith(magic):
            raise BadInput(
                f'{path} begins like a file of the format {name}, and its ending says JSON lines. '
                'Rename or convert it.')
    start = start.removeprefix(BOM).lstrip()
    first, end, rest = start.partition(b'\n')
    if first[:1] == b'[':
        kind = 'array'
    elif first.rstrip() == b'{' or first[:1] == b'{' and rest.lstrip(b' \t')[:1] == b'"':
        kind = 'object'
    else:
        return
    try:
        orjson.loads(first)
    except orjson.JSONDecodeError:
        pass            # the value goes on after the line
    else:
        # A record that is an array may stand between others. `records_of` reports it.
        if kind == 'object' or rest.strip():
            return
    way = "'.[]' " if kind == 'array' else '. '
    raise BadInput(
        f'{path} is a JSON {kind} and not JSON lines, which have one object per line. Convert it: '
        f'jq -c {way}{os.path.basename(path)} > new.jsonl')


def line_batches(file, stream, skip):
    """Yields batches of about BATCH_BYTES of JSON lines. Blank lines count as records."""
    if file.start == 0:
        check_lines(file.path, stream)
    number = 0
    lines = []
    size = 0
    position = file.start
    # A line belongs to the range in which it begins. The range may begin in the middle of one, or
    # right after a line end, which is why this reads from the byte before.
    if file.start:
        stream.seek(file.start - 1)
        position += len(stream.readline()) - 1
    while file.stop is None or position < file.stop:
        # The limit keeps a file without line ends from filling the memory. A line of 124 MiB took
        # 1,025 MB in a worker (docs/BENCHMARKS.md).
        line = stream.readline(LONGEST_RECORD)
        if not line:
            break
        if len(line) == LONGEST_RECORD:
            raise BadInput(
                f'{file}: line {number + 1} is longer than {LONGEST_RECORD // 2**20} MiB. The file '
                'does not hold JSON lines.')
        position += len(line)
        if number == 0 and file.start == 0:
            line = line.removeprefix(BOM)
        number += 1
        if number <= skip:
            continue
        lines.append(line)
        size += len(line)
        if size >= BATCH_BYTES:
            yield Batch(file, number - len(lines), lines)
            lines = []
            size = 0
    if lines:
        yield Batch(file, number - len(lines), lines)


def text_batches(file, stream, skip):
    """Yields a plain text file, cut after a line end where it exceeds LONGEST_TEXT characters."""
    stream = io.TextIOWrapper(stream, encoding='utf-8')
    number = 0
    kept = ''
    while True:
        text = kept + stream.read(LONGEST_TEXT - len(kept))
        kept = ''
        if not text:
            return
        if len(text) == LONGEST_TEXT:
            end = text.rfind('\n') + 1 or LONGEST_TEXT
            # The rest begins the next document. Only a line above the limit is split between two.
            kept = text[end:]
            text = text[:end]
        if number >= skip:
            yield Batch(file, number, [text])
        number += 1


def parquet_batches(file, stream, columns, skip):
    """Yields the rows of the row groups that begin in the file's range, with these columns only."""
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(stream, buffer_size=2**20)
    except pyarrow.ArrowInvalid as error:
        raise BadInput(f'{file.path} is no parquet file: {error}') from None
    there = parquet.schema_arrow.names
    for column in columns:
        if column not in there:
            raise BadInput(
                f"{file.path}: no column '{column}'. It has {there}. For your own text, --column "
                'says which column to read.')
    number = 0
    for group in range(parquet.num_row_groups):
        about = parquet.metadata.row_group(group)
        chunks = [about.column(i) for i in range(about.num_columns)]
        # The row group belongs to the range in which its first byte lies.
        begin = min(chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks)
        if file.stop is not None and not file.start <= begin < file.stop:
            continue
        # A part that is continued passes over full row groups without reading them.
        if number + about.num_rows <= skip:
            number += about.num_rows
            continue
        # Rows differ in length between datasets. A batch should have about as many bytes as one of
        # JSON lines.
        rows = BATCH_BYTES * about.num_rows // max(1, about.total_byte_size)
        rows = max(1, min(4096, rows))
        wanted = list(columns) or there
        for batch in parquet.iter_batches(batch_size=rows, row_groups=[group], columns=wanted):
            seen = max(0, min(skip - number, batch.num_rows))
            if seen < batch.num_rows:
                yield Batch(file, number + seen, batch.slice(seen))
            number += batch.num_rows


# -- records ---------------------------------------------------------------------------------------


def records_of(batch):
    """Yields (number, record) for every record of a Batch, blank lines left out.

    A record is a dict, or a str from a plain text file. A broken one is the ValueError that says
    what is wrong with it.
    """
    if not isinstance(batch.records, list):
        yield from enumerate(batch.records.to_pylist(), batch.first)
        return
    for i, raw in enumerate(batch.records, batch.first):
        if isinstance(raw, str):
            yield i, raw
            continue
        try:
            # orjson also rejects broken UTF-8 and half of a surrogate pair.
            record = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            # A blank line gives no record but keeps its number, because `skip` counts it.
            if not raw.strip():
                continue
            reason = str(error)
            try:
                raw.decode()
            except UnicodeDecodeError as not_text:
                reason = f'not UTF-8: {not_text}'
            record = ValueError(f'no valid JSON ({reason})')
        else:
            if not isinstance(record, dict):
                record = ValueError(f'no JSON object but {type(record).__name__}')
        yield i, record


def location(batch, number):
    """Returns where a record is, for messages: the file, and the line or row counted from 1."""
    if not isinstance(batch.records, list):
        return f'{batch.file}: row {number + 1}'
    if batch.file.start > 0:
        return f'{batch.file}: line {number + 1}'
    return f'{batch.file.path}:{number + 1}'


def records_in(files, columns):
    """Yields (location, record) for every record of the Files. Raises BadInput for a broken one."""
    for file in files:
        for batch in read_batches(file, columns):
            for number, record in records_of(batch):
                where = location(batch, number)
                if isinstance(record, ValueError):
                    raise BadInput(f'{where}: {record}. Fix or drop the record.')
                yield where, record


def texts_in(files):
    """Yields the texts in the Files: plain text files, or the field `text`.

    Raises BadInput for a record without text.
    """
    for where, record in records_in(files, ['text']):
        text = record.get('text') if isinstance(record, dict) else record
        if not isinstance(text, str):
            raise BadInput(f"{where}: no text in the field 'text'.")
        yield text
