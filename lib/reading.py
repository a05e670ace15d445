"""From files to records. Reads local files, the Hugging Face hub and https as streams.

The formats are JSON lines, CSV, plain text (all of them also packed), parquet and Arrow. The ending
of a name says which one a file has, in capitals or not. Another ending is an error. This file only
cuts a file into batches of raw records, which is cheap. The workers of prepare/common.py decode
them.
"""
import bz2
import collections
import contextlib
import csv
import fnmatch
import glob
import gzip
import hashlib
import io
import lzma
import os
import zlib
from dataclasses import dataclass, replace

import fsspec
import orjson
from isal import igzip, isal_zlib

from configurator import BadInput, RunFault, read_json

BATCH_BYTES = 1_000_000         # raw records that a worker gets at once
LONGEST_RECORD = 100 * 2**20    # bytes of a JSON line
LONGEST_FIELD = 25 * 2**20      # characters of a field of a CSV file
LONGEST_TEXT = 8_000_000        # characters of a document of a plain text file
CUT_ABOVE = 512 * 2**20         # larger plain JSON lines and parquet files are cut into ranges
LARGEST_PART = 256 * 2**20      # stored bytes that one rank works on at a time
LINES = ('.jsonl', '.ndjson', '.jl', '.json')       # JSON lines
TEXTS = ('.txt', '.md')
TABLES = ('.csv', '.tsv')
PLAIN = (*LINES, *TEXTS, *TABLES)
ARROW = ('.parquet', '.arrow')  # read by pyarrow, and packed within the file
PACKED = ('.gz', '.zst', '.zstd', '.xz', '.bz2')
KNOWN = f"{', '.join(PLAIN)} (also with {', '.join(PACKED)}), {' and '.join(ARROW)}"
BOM = b'\xef\xbb\xbf'            # Windows begins a UTF-8 file with it
MAGIC = {                       # how files begin that are no text
    b'\x1f\x8b': 'gzip', b'\x28\xb5\x2f\xfd': 'zstd', b'\xfd7zXZ': 'xz', b'PK\x03\x04': 'zip',
    b'PAR1': 'parquet', b'ARROW1': 'Arrow', b'\xff\xfe': 'UTF-16', b'\xfe\xff': 'UTF-16',
    **{b'BZh%d1AY&SY' % level: 'bzip2' for level in range(1, 10)}}
DESCRIPTIONS = ('state.json', 'dataset_info.json', 'dataset_dict.json')     # by save_to_disk
END_OF_STREAM = bytes.fromhex('ffffffff00000000')       # of Arrow's stream format


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
    records: object     # list of bytes (JSON lines), pyarrow.RecordBatch, list of str (text), or
                        # list of dict or ValueError (rows of CSV). b'' is a blank line


# -- which files -----------------------------------------------------------------------------------


def split_packing(path):
    """'a.JSONL.gz' -> ('a.JSONL', '.gz'). The second is '' for a file that is not packed."""
    for packing in PACKED:
        if path.lower().endswith(packing):
            return path[:-len(packing)], packing
    return path, ''


def kind_of(path):
    """Returns the kind of a file by the ending of a path or URL. None: another ending.

    The kinds are 'lines', 'text', 'csv', 'tsv', 'parquet' and 'arrow'.
    """
    name = path.lower()
    if '://' in name:
        name = name.partition('?')[0]
    if name.endswith(ARROW):
        return name.rpartition('.')[2]
    name = split_packing(name)[0]
    if name.endswith(LINES):
        return 'lines'
    if name.endswith(TABLES):
        return name.rpartition('.')[2]
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
    for part, matching in match_paths(pattern):
        if '://' in part:
            raise BadInput(f"'{part}' is a URL, and only local files can be given. Download it.")
        if matching == [part] and os.path.isdir(part):
            paths = files_below(part, layout, say)
        else:
            # Names do not depend on where the files lie. They order the parts, so a copy of the
            # files in another folder gives the same source.
            paths = [(path, os.path.basename(path)) for path in chosen_files(part, matching, say)]
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


def match_paths(pattern):
    """Returns [(part, paths)] for a path or a glob, or for several of them separated by commas.

    What exists is taken by its name, even if that has a comma, a ~ or the characters of a glob. So
    are the folders at the beginning of a glob. The paths of a part that matches nothing are [].
    """
    whole = match_path(pattern)
    if whole[1] or ',' not in pattern:
        return [whole]
    return [match_path(part.strip()) for part in pattern.split(',')]


def match_path(pattern):
    """Returns (the pattern with ~ for the user's folder expanded, sorted paths that match it)."""
    expanded = os.path.expanduser(pattern)
    for name in (pattern, expanded):
        if os.path.lexists(name):
            return name, [name]
        folder = os.path.dirname(name)
        while folder and not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        # 'a[1]/*.txt' is everything in the folder a[1], if there is one.
        paths = glob.glob(glob.escape(folder) + name[len(folder):], recursive=True)
        if paths:
            return name, sorted(paths)
    return expanded, []


def chosen_files(pattern, paths, say):
    """Returns the paths that match `pattern`, without folders. Raises BadInput as local_files."""
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
        saved = saved_files(where, names)
        for name in names:
            path = os.path.join(where, name)
            relative = os.path.relpath(path, folder)
            if name.startswith('.'):
                leave_out('hidden', relative)
            elif name in DESCRIPTIONS and (saved is not None or name == 'dataset_dict.json'):
                leave_out('a description', relative)
            elif saved is not None and name not in saved:
                leave_out('not named in state.json', relative)
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


def saved_files(folder, names):
    """Returns the names of the data files of a folder that save_to_disk of `datasets` wrote.

    names: those of all files in the folder. Returns None for any other folder. Raises BadInput if a
    data file is missing.
    """
    if not {'state.json', 'dataset_info.json'} <= {*names}:
        return None
    path = os.path.join(folder, 'state.json')
    state = read_json(path)
    entries = state.get('_data_files') if isinstance(state, dict) else None
    if not isinstance(entries, list):
        return None
    files = [entry.get('filename') if isinstance(entry, dict) else None for entry in entries]
    missing = [str(name) for name in files if name not in names]
    if missing:
        raise BadInput(
            f"{path} names {', '.join(missing)}, which is not in the folder. Save the dataset "
            'again.')
    return files


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


class NotOnHub(BadInput):
    """The hub has no such repository, or does not show it."""


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
        fault = BadInput
        if isinstance(error, FileNotFoundError) and error.__cause__:  # HfFileSystem wraps them
            cause = error.__cause__
        if isinstance(cause, hub.GatedRepoError):
            message = f'is gated: accept its terms at {page}, then {sign_in}'
        elif isinstance(cause, hub.RevisionNotFoundError):
            message = f'has no such revision: see {page}/commits/main and give one with --revision'
        elif isinstance(cause, hub.DisabledRepoError):
            message = f'is disabled on the hub: see {page}'
            fault = NotOnHub
        elif isinstance(cause, hub.RepositoryNotFoundError):
            fault = NotOnHub
            message = f'does not exist on the hub, or needs a token: see {page}, then {sign_in}'
        elif isinstance(cause, FileNotFoundError):
            message = f'has no such file ({error})'
        else:
            reason = str(cause).partition('\n')[0]
            raise RunFault(
                f'{what} cannot be reached ({type(cause).__name__}: {reason}). Check the network '
                f'and run again. What is written is kept. {or_local}'
            ) from None
        raise fault(f'{what} {message}. {or_local}') from None


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


def make_parts(files, cut=True):
    """Groups files into parts, the units that a rank works on. Returns a list of lists of File.

    The result depends only on names and sizes. Files come in the order of their hashed names, so
    that --max_tokens gives a fair sample of all of them. Small files are gathered into one part.
    Large ones are cut where their format allows it, unless `cut` is False.
    """
    # Many files make about 64 parts, and more above 16 GiB, so that many ranks can share a source.
    # A small source has fewer, of at least 1 MiB.
    size = min(max(sum(f.size for f in files) // 64, 2**20), LARGEST_PART)
    parts = []
    gathered = 0        # stored bytes of the last part; 0: the next file begins a new one
    for file in sorted(files, key=lambda f: (hashlib.sha256(f.name.encode()).digest(), f.path)):
        # Other files are not cut: compressed lines must be unpacked from their start.
        can_cut = cut and file.path.lower().endswith((*LINES, '.parquet'))
        if file.size > CUT_ABOVE and can_cut:
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


class Unpacked(io.RawIOBase):
    """The unpacked bytes of .xz or .bz2, one compressed stream after the other.

    The files of the standard library end without an error at a later stream that is damaged.
    """

    def __init__(self, stream, new, padding=b''):
        """new: makes a decompressor; padding: the byte that may stand between two streams"""
        self.stream = stream
        self.new = new
        self.padding = padding
        self.decompressor = new()

    def readable(self):
        return True

    def readinto(self, buffer):
        while True:
            raw = b''
            if self.decompressor.eof:
                raw = self.decompressor.unused_data.lstrip(self.padding)
                while not raw:
                    raw = self.stream.read(2**18)
                    if not raw:
                        return 0
                    raw = raw.lstrip(self.padding)
                self.decompressor = self.new()
            elif self.decompressor.needs_input:
                raw = self.stream.read(2**18)
                if not raw:
                    raise EOFError('it ends in the middle')
            content = self.decompressor.decompress(raw, len(buffer))
            if content:
                buffer[:len(content)] = content
                return len(content)


def unpacked(stream, path):
    """Returns the stream of the unpacked content of a file whose name ends as those of PACKED."""
    packing = split_packing(path)[1]
    if packing == '.gz':
        return io.BufferedReader(igzip.GzipFile(fileobj=stream), 2**20)
    if packing == '.xz':
        return io.BufferedReader(Unpacked(stream, lzma.LZMADecompressor, b'\0'), 2**20)
    if packing == '.bz2':
        return io.BufferedReader(Unpacked(stream, bz2.BZ2Decompressor), 2**20)
    if packing:
        # The package zstandard silently ends early in a truncated file. pyarrow raises.
        import pyarrow

        file = pyarrow.PythonFile(stream, 'r')
        return io.BufferedReader(pyarrow.CompressedInputStream(file, 'zstd'), 2**20)
    return stream


def read_batches(file, columns, skip=0):
    """Yields the Batches of a File after its first `skip` records.

    columns  fields to read of a row (parquet, Arrow, CSV); []: all
    Raises BadInput for a damaged file, an unknown ending or a missing column.
    """
    import pyarrow

    damage = (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error, isal_zlib.error)
    damage += (lzma.LZMAError, pyarrow.ArrowException)
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
                return
            if kind == 'arrow':
                yield from arrow_batches(file, stream, columns, skip)
                return
            stream = unpacked(stream, file.path)
            if file.start == 0:
                check_start(file.path, kind, stream)
            if kind == 'lines':
                yield from line_batches(file, stream, skip)
            elif kind == 'text':
                yield from text_batches(file, stream, skip)
            else:
                yield from table_batches(file, stream, columns, skip)
        except (*damage, OSError) as error:
            # For a damaged stream pyarrow and bz2 raise an OSError without a number.
            has_no_number = type(error) is OSError and error.errno is None
            if not isinstance(error, damage) and not has_no_number:
                raise
            raise BadInput(
                f'{file.path} cannot be read: it is damaged or not what its name says ({error}). '
                'Repair or leave out the file.') from None


def check_start(path, kind, stream):
    """Raises BadInput for a file of another format than its ending says, by its beginning.

    It reads nothing from the stream.
    """
    start = stream.peek(2**16)
    says = dict(lines='JSON lines', text='plain text').get(kind, kind.upper())
    for magic, name in MAGIC.items():
        # The beginnings of letters and digits alone may be those of a text.
        if start.startswith(magic) and (kind == 'lines' or not magic.isalnum()):
            raise BadInput(
                f'{path} begins like a file of the format {name}, and its ending says {says}. '
                'Rename or convert it.')
    # Every second byte of Latin letters in UTF-16 is zero. A UTF-8 text may hold some zeros.
    if len(start) >= 4 and start[:4096].count(0) * 3 > len(start[:4096]):
        raise BadInput(
            f'{path} begins with as many zero bytes as UTF-16 has, and {says} must be UTF-8. '
            'Convert it.')
    if kind == 'lines':
        check_lines(path, start)


def check_lines(path, start):
    """Raises BadInput for one JSON array or object in place of JSON lines. start: first bytes"""
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
    """Yields a plain text file as one document, or several where it exceeds LONGEST_TEXT."""
    stream = io.TextIOWrapper(stream, encoding='utf-8-sig')
    number = 0
    kept = ''
    while True:
        text = kept + stream.read(LONGEST_TEXT - len(kept))
        kept = ''
        if not text:
            return
        if len(text) == LONGEST_TEXT:
            # The rest begins the next document.
            end = last_break(text)
            kept = text[end:]
            text = text[:end]
        if number >= skip:
            yield Batch(file, number, [text])
        number += 1


def last_break(text):
    """Returns where to cut a text: after the last paragraph, else line, sentence or word.

    It looks at the second half only, so that no document is short. Without a break in it, it
    returns the length of the text.
    """
    for mark in ('\n\n', '\n', '. ', ' '):
        start = text.rfind(mark, len(text) // 2)
        if start >= 0:
            return start + len(mark)
    return len(text)


def column_indices(path, columns, there):
    """Returns the indices in `there` (names) of the columns to read; []: of all of them.

    Raises BadInput for a column that is missing or that two have the name of.
    """
    for column in columns:
        if column not in there:
            raise BadInput(
                f"{path}: no column '{column}'. It has {there}. For your own text, --column says "
                'which column to read.')
    wanted = columns or there
    for column in wanted:
        if there.count(column) > 1:
            raise BadInput(f"{path}: two columns have the name '{column}'. Rename one of them.")
    return [there.index(column) for column in wanted]


def lines_of(file, stream):
    """Yields the lines of a text stream, line ends included. Raises BadInput for a huge one."""
    while line := stream.readline(LONGEST_FIELD):
        if len(line) == LONGEST_FIELD:
            raise BadInput(
                f'{file}: a line is longer than {LONGEST_FIELD // 2**20} million characters. '
                'The file does not hold CSV.')
        yield line


def table_batches(file, stream, columns, skip):
    """Yields batches of the rows of a CSV or TSV file, by the rules of Python's `csv`, strictly.

    Records are dicts of these columns. One that is no row of the table is a ValueError.
    """
    csv.field_size_limit(LONGEST_FIELD)
    # Bytes that are no UTF-8 pass here. They break only their own record, in `records_of`.
    stream = io.TextIOWrapper(stream, encoding='utf-8-sig', errors='surrogateescape', newline='')
    delimiter = '\t' if kind_of(file.path) == 'tsv' else ','
    rows = csv.reader(lines_of(file, stream), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
    except csv.Error as error:
        raise BadInput(f'{file.path}: the header line is broken ({error}).') from None
    if not header:
        raise BadInput(f'{file.path} has no header line, which names the columns.')
    indices = column_indices(file.path, columns, header)
    names = [header[i] for i in indices]
    number = 0
    records = []
    size = 0
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            row = error
        if row is None:
            break
        number += 1
        if number <= skip:
            continue
        if isinstance(row, csv.Error):
            records.append(ValueError(f'no valid CSV up to line {rows.line_num} ({row})'))
        elif not row:
            records.append(b'')
        elif len(row) != len(header):
            records.append(ValueError(
                f'it has {len(row)} fields and the header line has {len(header)} (line '
                f'{rows.line_num})'))
        else:
            values = [row[i] for i in indices]
            records.append(dict(zip(names, values, strict=True)))
            size += sum(map(len, values))
        size += 100         # a row of short fields costs memory, too
        if size >= BATCH_BYTES:
            yield Batch(file, number - len(records), records)
            records = []
            size = 0
    if records:
        yield Batch(file, number - len(records), records)


def arrow_batches(file, stream, columns, skip):
    """Yields the rows of an Arrow file (IPC), in the file or in the stream format."""
    import pyarrow

    is_file = stream.read(6) == b'ARROW1'
    open_arrow = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
    if not is_file:
        # Without its end pyarrow takes a stream that is cut between two batches for a full one.
        stream.seek(max(0, file.size - len(END_OF_STREAM)))
        if stream.read() != END_OF_STREAM:
            raise BadInput(
                f'{file.path} is damaged, or no Arrow file: it has no end mark of the stream '
                'format. Repair or leave out the file.')
    stream.seek(0)
    schema = open_arrow(stream).schema
    indices = column_indices(file.path, columns, schema.names)
    stream.seek(0)
    options = pyarrow.ipc.IpcReadOptions(included_fields=indices)
    reader = open_arrow(stream, options=options)
    batches = reader
    if is_file:
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    number = 0
    for batch in batches:
        if number + batch.num_rows > skip:
            yield from slices(file, batch, number, max(0, skip - number))
        number += batch.num_rows


def slices(file, batch, first, skip=0):
    """Yields a pyarrow.RecordBatch after its first `skip` rows in Batches of about BATCH_BYTES.

    first: the number of its first row in the file
    """
    import pyarrow

    rows = max(1, BATCH_BYTES * batch.num_rows // max(1, batch.nbytes))
    for start in range(skip, batch.num_rows, rows):
        stop = min(start + rows, batch.num_rows)
        # A slice would send all rows to the worker, because pickle writes the full buffers.
        chosen = batch.take(pyarrow.array(range(start, stop)))
        yield Batch(file, first + start, chosen)


def parquet_batches(file, stream, columns, skip):
    """Yields the rows of the row groups that begin in the file's range, with these columns only."""
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(stream, buffer_size=2**20)
    except pyarrow.ArrowInvalid as error:
        raise BadInput(f'{file.path} is no parquet file: {error}') from None
    there = parquet.schema_arrow.names
    column_indices(file.path, columns, there)
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
        if isinstance(raw, (str, ValueError)):
            yield i, raw
            continue
        if isinstance(raw, dict):
            yield i, checked_row(raw)
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


def checked_row(row):
    """Returns a row of a CSV file, or the ValueError for bytes that are no UTF-8."""
    for name, value in row.items():
        if not isinstance(value, str):      # another reader may give other values
            continue
        try:
            value.encode()
        except UnicodeEncodeError:
            return ValueError(f"the field '{name}' is not UTF-8")
    return row


def location(batch, number):
    """Returns where a record is, for messages: the file, and the line or row counted from 1.

    The rows of a CSV file do not include its header line.
    """
    is_row = not isinstance(batch.records, list) or kind_of(batch.file.path) in ('csv', 'tsv')
    if is_row or isinstance(batch.records[number - batch.first], dict):
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
