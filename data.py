"""Sources of token shards, and the order in which their rows are read.

A source is a folder with `train/*.bin`, `val/*.bin` (and others) and `meta.json`, which
lib/shards.py reads. A row is read by one system call, without worker processes. What meta.json
says of the shards is checked when a source is opened, and the bytes of a sample of them when
training starts (`check_sample`).

The rows of a run are a pure function of a few integers. Each source is a permuted set of windows of
block_size + 1 tokens. The permutation is a keyed bijection, so 2T tokens need no index. One cursor
per source counts the rows that have been read. For every global batch the mixture decides how many
rows each source gives. This does not depend on ranks: every rank reads its part of the global
batch, so a run continues unchanged with another number of ranks.

With `packing='document'` (SFT) a row holds whole documents instead of a window, see
`pack_documents`.

Letters in shape comments: B rows, T tokens, n rows or tokens of an array.
"""
import bisect
import glob
import hashlib
import itertools
import os
import subprocess
import sys
from dataclasses import dataclass, field

import numpy as np
import torch

from configurator import BadInput, did_you_mean
from lib.shards import (
    FORMATS,
    HEADER_BYTES,
    check_listing,
    mask_path,
    open_mask,
    open_shard,
    read_header,
    read_into,
    read_meta,
    shard_faults,
)
from ops.attention import document_boundaries

MASK_DTYPE = np.dtype(np.uint8)
WEIGHT_UNIT = 2**32             # weights are held as integers that sum to this, so nothing drifts
PERMUTATION_BLOCK = 4096        # positions that are permuted at once
SAMPLE_BYTES = 2**26            # bytes of shards that are hashed at the start of a run: 40 ms


@dataclass
class DataConfig:
    """Knobs of the rows that a run uses."""
    source_rows: dict[str, int] = field(default_factory=dict)   # source -> training rows that the
                                    # run uses of it, a fixed random subset. Others: all rows.
                                    # tools/sweep.py --match_repetition sets it for proxies


# -- the bytes of a source -------------------------------------------------------------------------


def check_sample(sources, seed):
    """Compares the bytes of some shards with meta.json: SAMPLE_BYTES of them, or a little more.

    seed: chooses the shards. Raises BadInput for a shard that was changed. `tools/check.py`
    compares all of them.
    """
    shards = []
    for source in sources:
        folder = os.path.join(source.data_dir, source.name)
        for shard in source.meta['shards'] if source.meta else ():
            if shard['split'] == source.split:
                shards.append((folder, shard))
    budget = SAMPLE_BYTES
    for i in permute(np.arange(len(shards)), len(shards), derive_keys(4, seed, 'sample')):
        folder, shard = shards[i]
        if budget <= 0:
            break
        budget -= os.path.getsize(os.path.join(folder, shard['file']))
        for fault in shard_faults(folder, [shard]):
            raise BadInput(
                f'{fault} Restore it, or prepare the source again. `python tools/check.py {folder}`'
                ' looks at all shards.')


# -- permutation -----------------------------------------------------------------------------------


def mix_bits(x, key):
    """The finaliser of splitmix64: uint64 array and key -> uint64 array with well-mixed bits."""
    x = (x + key) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_keys(n, *what):
    """n uint64 keys from the repr of any values, the same in every process and on every machine."""
    return np.frombuffer(hashlib.shake_256(repr(what).encode()).digest(8 * n), dtype='<u8')


def permute(positions, n, keys):
    """Applies a bijection of range(n) to an int array. keys: (4,) uint64. Returns int64.

    A Feistel network of four rounds on the next power of four, applied again until the value falls
    below n (Black & Rogaway 2002, cycle walking).
    """
    # Both halves of a position have the same number of bits, so the domain is a power of four. It
    # is less than four times n, so a value is walked fewer than four times on average.
    half = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    out = np.asarray(positions, dtype=np.uint64).copy()
    todo = np.arange(len(out))
    with np.errstate(over='ignore'):
        while len(todo):
            left = out[todo] >> half
            right = out[todo] & mask
            for key in keys:
                left, right = right, left ^ (mix_bits(right, key) & mask)
            value = (left << half) | right
            out[todo] = value
            todo = todo[value >= n]
    return out.astype(np.int64)


# -- packing of documents --------------------------------------------------------------------------


@dataclass
class Packs:
    """Rows of whole documents. Row i holds the documents first[i]:first[i + 1] of the arrays."""
    shard: np.ndarray           # (documents,) int32, number of the shard
    start: np.ndarray           # (documents,) int64, position of the first token in the shard
    length: np.ndarray          # (documents,) int32, tokens that are used
    first: np.ndarray           # (rows + 1,) int64
    capacity: int               # tokens of a row
    n_too_long: int             # documents of more tokens than a row, truncated or dropped
    n_unsupervised: int         # documents without a supervised token, which were left out
    n_valid: int                # tokens that the loss counts

    @property
    def n_rows(self):
        return len(self.first) - 1

    @property
    def utilisation(self):
        """Share of the tokens of all rows that is not padding."""
        return int(self.length.sum()) / (self.n_rows * self.capacity) if self.n_rows else 0.0


def best_fit(lengths, capacity):
    """Packs items into bins by best-fit decreasing (Ding et al. 2024, arXiv:2404.10830, section 3).

    lengths   (n,) ints from 1 to capacity
    Returns (order (n,) int64, first (bins + 1,) int64): bin i holds order[first[i]:first[i + 1]].
    Every item, longest first, goes into the bin with the least room that still takes it. Items of
    one length are placed together, so the work grows with the number of different lengths and
    rooms: a million conversations take a second.
    """
    by_length = np.argsort(-np.asarray(lengths), kind='stable')
    negative, counts = np.unique(-np.asarray(lengths)[by_length], return_counts=True)
    bins = []               # items of every bin
    rooms = []              # sorted: the different amounts of room that bins have left
    with_room = {}          # room -> numbers of these bins

    def put(room, numbers):
        if numbers and room not in with_room:
            bisect.insort(rooms, room)
            with_room[room] = []
        if numbers:
            with_room[room] += numbers

    at = 0
    for length, count in zip((-negative).tolist(), counts.tolist(), strict=True):
        items = by_length[at:at + count].tolist()
        at += count
        while items:
            place = bisect.bisect_left(rooms, length)
            if place == len(rooms):              # no bin has room: open as many as these items need
                n_new = -(-len(items) // (capacity // length))
                put(capacity, [*range(len(bins), len(bins) + n_new)])
                bins += [[] for _ in range(n_new)]
                continue
            # A bin that has taken one of these items is then the fullest that takes the next one.
            room = rooms[place]
            each = room // length
            n_taken = min(len(with_room[room]), -(-len(items) // each))
            taken = with_room[room][:n_taken]
            left = with_room[room][n_taken:]
            for i, number in enumerate(taken):
                bins[number] += items[i * each:(i + 1) * each]
            in_last = min(each, len(items) - (n_taken - 1) * each)
            items = items[n_taken * each:]
            with_room[room] = left
            if not left:
                del rooms[place], with_room[room]
            put(room - each * length, taken[:-1])
            put(room - in_last * length, taken[-1:])
    order = np.array([item for items in bins for item in items], dtype=np.int64)
    sizes = np.array([len(items) for items in bins], dtype=np.int64)
    return order, np.concatenate(([0], np.cumsum(sizes)))


def pack_documents(shards, bos_id, capacity, overlong='truncate'):
    """Packs the documents of a source into rows: Packs.

    shards      iterable of (tokens (n,), mask (n,) uint8 or None when the loss counts every token)
    bos_id      token that every document begins with. The loss never counts it
    capacity    tokens of a row
    overlong    what to do with a document of more tokens: truncate | drop
    Documents without a supervised token within `capacity` are left out. Attention and positions
    stay within a document, so a packed row equals its conversations run one by one.
    """
    # shard, start, length and supervised tokens of every document
    columns = [[np.zeros(0, np.int32)] for _ in range(4)]
    n_too_long = 0
    n_unsupervised = 0
    for number, (tokens, mask) in enumerate(shards):
        starts = np.flatnonzero(np.asarray(tokens) == bos_id)
        if not len(starts):
            continue
        length = np.diff(starts, append=len(tokens))
        if mask is None:
            n_valid = length - 1
        else:
            n_valid = np.add.reduceat(mask, starts, dtype=np.int64) - mask[starts]
        # A truncated document keeps only the supervised tokens of its beginning.
        too_long = length > capacity
        n_too_long += int(too_long.sum())
        for i in np.flatnonzero(too_long):
            inside = slice(starts[i] + 1, starts[i] + capacity)
            n_valid[i] = capacity - 1 if mask is None else int(mask[inside].sum())
        keep = ~too_long if overlong == 'drop' else np.ones_like(too_long)
        n_unsupervised += int((keep & (n_valid == 0)).sum())
        keep &= n_valid > 0
        columns[0].append(np.full(keep.sum(), number, np.int32))
        columns[1].append(starts[keep])
        columns[2].append(np.minimum(length[keep], capacity).astype(np.int32))
        columns[3].append(n_valid[keep])
    shard, start, length, n_valid = [np.concatenate(column) for column in columns]
    # Document numbers follow the rows, so a row reads a contiguous part of the arrays.
    order, first = best_fit(length, capacity)
    return Packs(
        shard[order], start[order], length[order], first, capacity, n_too_long, n_unsupervised,
        int(n_valid.sum()))


# -- sources ---------------------------------------------------------------------------------------


class Source:
    """One split of one source: its shards as a permuted, endless sequence of rows of T + 1 tokens.

    packing 'window': a row is a window of the stream. A source with masks is refused. Neighbouring
    windows of a shard share one token: the last target of one is the first input of the next. The
    tail of a shard that fills no window is not used.
    packing 'document': a row holds whole documents and padding. A token that the loss ignores as a
    target is stored as ~id, which is negative. overlong: what to do with documents longer than a
    row. `meta` is the content of meta.json, or None for shards that were made elsewhere. Raises
    BadInput where meta.json and the files differ.
    """

    def __init__(self, data_dir, name, split, block_size, seed=0, vocab_size=None, packing='window',
                 overlong='truncate'):
        self.data_dir = data_dir
        self.name = name
        self.split = split
        self.block_size = block_size
        self.seed = seed
        self.vocab_size = vocab_size
        # The order of these checks leads from the most likely mistake to the rarest.
        if not name or os.path.isabs(name) or {'', '.', '..'} & set(name.split('/')):
            raise BadInput(f"source '{name}' must be the name of a folder in {data_dir}.")
        folder = os.path.join(data_dir, name)
        if not os.path.isdir(folder):
            there = sorted(os.listdir(data_dir)) if os.path.isdir(data_dir) else []
            raise BadInput(
                f"source '{name}': {folder} does not exist.{did_you_mean(name, there)} Make it "
                'with a script in prepare/, or set data_dir.')
        self.meta = read_meta(folder)          # None for shards that were made elsewhere
        if os.path.isdir(os.path.join(folder, 'progress')) and self.meta is None:
            raise BadInput(
                f"source '{name}': {folder} is half prepared (it holds progress/ and no "
                'meta.json). Run its script in prepare/ again. It continues where it stopped.')
        if self.meta is None and glob.glob(os.path.join(glob.escape(folder), 'tokenizer.*')):
            raise BadInput(
                f"source '{name}': {folder} has a tokenizer but no meta.json, which says what its "
                'shards are. Restore it, or prepare the source again.')
        # Sorted, because the numbers of windows depend on the order of the shards.
        self.paths = sorted(glob.glob(os.path.join(glob.escape(folder), split, '*.bin')))
        headers = [read_header(path) for path in self.paths]
        self.shard_tokens = [n_tokens for n_tokens, _ in headers]
        self.shard_dtypes = [dtype for _, dtype in headers]
        if self.meta is not None:
            tokens = dict(zip(self.paths, self.shard_tokens, strict=True))
            check_listing(folder, split, self.meta, tokens)
        if not self.paths:
            raise BadInput(
                f"source '{name}': {folder}/{split} holds no *.bin shards. Prepare the source "
                'again.')
        if packing == 'window' and any(os.path.isfile(mask_path(path)) for path in self.paths):
            raise BadInput(
                f"source '{name}' ({split}) has loss masks, and packing = 'window' would train on "
                "every token. Set packing='document' to follow the masks, or prepare the source as "
                'plain text, without a chat_template.')
        # A window never crosses the end of a shard.
        windows = [max(0, n - 1) // block_size for n in self.shard_tokens]
        self.first_window = [0, *itertools.accumulate(windows)]
        self.n_windows = self.first_window[-1]
        self.n_tokens = sum(self.shard_tokens)
        if self.n_windows == 0 and packing == 'window':
            raise BadInput(
                f"source '{name}' ({split}): {self.n_tokens:,} tokens do not fill one window of "
                f'block_size + 1 = {block_size + 1}. Lower block_size or prepare more.')
        if self.meta is not None and vocab_size is not None:
            if self.meta['vocab_size'] > vocab_size:
                raise BadInput(
                    f"source '{name}' was tokenized with a vocabulary of "
                    f"{self.meta['vocab_size']:,}, the model's vocab_size is {vocab_size:,}. Set "
                    "vocab_size, or prepare the source with the model's tokenizer.")
        self.kept = None               # numbers of the windows that are left. None: all
        # What a row is read into, before it becomes int32.
        self.buffers = {}
        for dtype in (*FORMATS.values(), MASK_DTYPE):
            self.buffers[dtype] = np.empty(block_size + 1, dtype)
        self._block_cache = {}
        self.overlong = overlong
        self.packs = None              # Packs with packing='document'
        if packing == 'document':
            self.pack()

    def pack(self):
        """Makes the documents the rows of this source. Reads 500 million tokens per second."""
        if self.meta is None:
            raise BadInput(
                f"source '{self.name}' has no meta.json that names the token which documents begin "
                "with, and packing='document' needs it.")
        # A shard without its mask would be trained on in full, so a mixed source is refused.
        without = [path for path in self.paths if not os.path.isfile(mask_path(path))]
        if 0 < len(without) < len(self.paths):
            raise BadInput(
                f"source '{self.name}' ({self.split}): {without[0]} and {len(without) - 1} more "
                'shards have no .mask, others have. Prepare the source again.')
        bos_id = self.meta['tokenizer']['bos_id']
        self.pad_id = 1 if bos_id == 0 else 0          # not BOS, so that padding begins no document
        shards = ((open_shard(path), open_mask(path)) for path in self.paths)
        self.packs = pack_documents(shards, bos_id, self.block_size + 1, self.overlong)
        self.has_mask = not without
        self.n_windows = self.packs.n_rows
        if self.n_windows == 0:
            raise BadInput(
                f"source '{self.name}' ({self.split}) has no document with a token that the loss "
                f'counts within block_size + 1 = {self.block_size + 1} tokens '
                f'({self.packs.n_too_long:,} are longer). Raise block_size, or look at its masks.')

    def keep_windows(self, keep):
        """Removes the windows where keep (n_windows,) bool is False. Epochs then cover the rest."""
        self._keep(np.flatnonzero(keep))

    def limit_windows(self, n):
        """Keeps n of the windows that are left, at random. Epochs then cover these.

        The choice depends on the source's name and its number of windows alone, not on the seed.
        All runs with the same n read the same windows, and those with fewer read some of them.
        """
        keys = derive_keys(4, 'subset', self.name, self.split)
        chosen = np.sort(permute(np.arange(n), self.n_windows, keys))
        self._keep(chosen if self.kept is None else self.kept[chosen])

    def _keep(self, windows):
        """Leaves the windows with these numbers (n,), sorted."""
        self.kept = windows
        self.n_windows = len(windows)
        # The cached blocks are permutations of the former number of windows.
        self._block_cache.clear()

    def fingerprint(self):
        """16 hex digits over the names, lengths, ends and recorded hashes of the shards.

        It changes when the data changes, or the choice of windows that are kept.
        """
        digest = hashlib.sha256()
        recorded = {s['file']: s['sha256'] for s in self.meta['shards']} if self.meta else {}
        folder = os.path.dirname(os.path.dirname(self.paths[0]))
        for path, n_tokens in zip(self.paths, self.shard_tokens, strict=True):
            sha256 = recorded.get(os.path.relpath(path, folder), '')
            digest.update(f'{os.path.basename(path)} {n_tokens} {sha256}'.encode())
            digest.update(shard_ends(path))
        if self.kept is not None:
            digest.update(self.kept.tobytes())
        if self.packs is not None:
            masked = sorted(s.get('mask_sha256', '') for s in self.meta['shards'])
            digest.update(f'{self.block_size} {self.overlong} {self.n_windows} {masked}'.encode())
        return digest.hexdigest()[:16]

    def shard_fingerprints(self):
        """16 hex digits for every shard of the split and its mask, by its path in data_dir."""
        found = {}
        for path in self.paths:
            digest = hashlib.sha256(shard_ends(path))
            if os.path.isfile(mask_path(path)):
                with open(mask_path(path), 'rb') as f:
                    digest.update(f.read(2**16))
            found[os.path.relpath(path, self.data_dir)] = digest.hexdigest()[:16]
        for shard in self.meta['shards'] if self.meta else ():
            if shard['split'] == self.split:
                path = os.path.join(self.name, shard['file'])
                found[path] += shard['sha256'][:16] + shard.get('mask_sha256', '')[:16]
        return found

    def window(self, cursor):
        """The number of the window that row `cursor` is. Every epoch is another permutation."""
        epoch, position = divmod(int(cursor), self.n_windows)
        # A block of positions shares the cost of numpy's calls in `permute`.
        block = position // PERMUTATION_BLOCK
        if (epoch, block) not in self._block_cache:
            # A few blocks suffice: cursors move on, and validation rereads its first rows.
            if len(self._block_cache) > 8:
                self._block_cache.clear()
            first = block * PERMUTATION_BLOCK
            positions = np.arange(first, min(first + PERMUTATION_BLOCK, self.n_windows))
            keys = derive_keys(4, self.seed, self.name, self.split, epoch)
            self._block_cache[epoch, block] = permute(positions, self.n_windows, keys).tolist()
        window = self._block_cache[epoch, block][position % PERMUTATION_BLOCK]
        return window if self.kept is None else int(self.kept[window])

    def read(self, cursor, out):
        """Copies row `cursor` into out (T + 1,)."""
        self.read_window(self.window(cursor), out)

    def read_window(self, window, out):
        """Copies a window, by its number in the order of the shards, into out (T + 1,)."""
        if self.packs is not None:
            self.read_pack(window, out)
            return
        shard = bisect.bisect_right(self.first_window, window) - 1
        start = (window - self.first_window[shard]) * self.block_size
        stored = self.buffers[self.shard_dtypes[shard]]
        read_into(stored, self.paths[shard], HEADER_BYTES, start)
        out[:] = stored

    def read_pack(self, row, out):
        """Copies a row of documents and padding into out. Ignored tokens become ~id."""
        at = 0
        for i in range(self.packs.first[row], self.packs.first[row + 1]):
            shard = int(self.packs.shard[i])
            path = self.paths[shard]
            start = int(self.packs.start[i])
            length = int(self.packs.length[i])
            part = out[at:at + length]
            stored = self.buffers[self.shard_dtypes[shard]][:length]
            read_into(stored, path, HEADER_BYTES, start)
            part[:] = stored
            if self.has_mask:
                mask = self.buffers[MASK_DTYPE][:length]
                read_into(mask, mask_path(path), 0, start)
                np.invert(part, out=part, where=mask == 0)
            # The first token of a document is no target of the document before it.
            part[0] = ~token_ids(part[0])
            at += len(part)
        out[at:] = ~self.pad_id

    def rows(self, cursors):
        """Returns (n, T + 1) int32 rows. Raises BadInput for a token id outside the vocabulary."""
        out = np.empty((len(cursors), self.block_size + 1), dtype=np.int32)
        for i, cursor in enumerate(cursors):
            self.read(cursor, out[i])
        self.check_ids(out)
        return out

    def check_ids(self, rows):
        """Raises BadInput when a row of this source holds a token id outside the vocabulary."""
        ids = rows if self.packs is None else token_ids(rows)
        low = int(ids.min())
        high = int(ids.max())
        if self.vocab_size is not None and not 0 <= low <= high < self.vocab_size:
            bad = high if low >= 0 else low % 2**32
            raise BadInput(
                f"source '{self.name}' ({os.path.dirname(self.paths[0])}) holds token id {bad}, "
                f"the model's vocab_size is {self.vocab_size}: its shards were made with another "
                'tokenizer. Prepare the source again or set vocab_size.')


def shard_ends(path):
    """The first and the last 1,024 tokens of a shard, as bytes.

    They stand for it where hashing terabytes at every start would take hours.
    """
    n_tokens, dtype = read_header(path)
    n_bytes = min(n_tokens, 1024) * dtype.itemsize
    with open(path, 'rb') as f:
        f.seek(HEADER_BYTES)
        first = f.read(n_bytes)
        f.seek(-n_bytes, os.SEEK_END)
        return first + f.read(n_bytes)


def check_unchanged(sources, before, checkpoint):
    """Raises BadInput if shards that evaluations read have changed since a checkpoint was written.

    before      dict '<source>/<split>' -> `shard_fingerprints`, as the checkpoint holds it
    """
    for source in sources:
        known = before.get(f'{source.name}/{source.split}')
        if known is None:               # this source or probe set is new, or the version older
            continue
        now = source.shard_fingerprints()
        for path in sorted({*known, *now}):
            if known.get(path) != now.get(path):
                raise BadInput(
                    f'{os.path.join(source.data_dir, path)} has changed since {checkpoint} was '
                    'written, so evaluations before and after could not be compared. Restore it, '
                    'or start a new run with init_from.')


def open_probe(data_dir, domain, block_size, vocab_size, packing='window', overlong='truncate'):
    """Opens the probe set of a domain: data_dir/probe/<domain>, or that source's split probe/."""
    if '/' in domain or domain in ('', '.', '..'):
        raise BadInput(
            f"probe: '{domain}' must be the name of a folder in {data_dir}/probe, without a /.")
    has_folder = os.path.isdir(os.path.join(data_dir, 'probe', domain))
    has_split = os.path.isdir(os.path.join(data_dir, domain, 'probe'))
    name = domain if has_split and not has_folder else f'probe/{domain}'
    return Source(data_dir, name, 'probe', block_size, 0, vocab_size, packing, overlong)


def domain_of(probe):
    """The domain of a probe set that `open_probe` opened."""
    return probe.name.split('/')[-1]


def common_tokenizer(sources):
    """The tokenizer record of meta.json that all sources share. None when none has a meta.json.

    Raises BadInput when two sources were made with different tokenizers.
    """
    known = {s.name: s.meta['tokenizer'] for s in sources if s.meta is not None}
    if not known:
        return None
    first_name, first = next(iter(known.items()))
    for name, tokenizer in known.items():
        if tokenizer['fingerprint'] != first['fingerprint']:
            raise BadInput(
                f"source '{name}' was made with tokenizer {tokenizer.get('name')} "
                f"({tokenizer['fingerprint']}), '{first_name}' with {first.get('name')} "
                f"({first['fingerprint']}). Prepare one of them again.")
        if tokenizer['bos_id'] != first['bos_id']:
            raise BadInput(
                f"documents begin with token {tokenizer['bos_id']} in source '{name}', and with "
                f"{first['bos_id']} in '{first_name}', by their meta.json. Prepare one of them "
                'again.')
    return first


def common_template(data_dir, sources):
    """(name, folder of a source) of the chat template that all conversations were made with.

    (None, None): there is none, or several.
    """
    found = {}
    for source in sources:
        settings = (source.meta or {}).get('settings', {})
        if settings.get('chat_template') is not None:
            key = settings['chat_template'], settings.get('template_sha256')
            found.setdefault(key, os.path.join(data_dir, source.name))
    if len(found) != 1:
        return None, None
    (name, _), folder = found.popitem()
    return name, folder


def prepare_missing(script, data_dir, names):
    """Runs a script of prepare/ when one of the sources `names` is not in data_dir.

    script: a path from here or from the project's folder
    """
    if all(os.path.isfile(os.path.join(data_dir, name, 'meta.json')) for name in names):
        return
    if not os.path.isfile(script):
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), script)
    print(f'data: {data_dir} is not complete; running {script}', flush=True)
    if subprocess.run([sys.executable, script, f'--out={data_dir}']).returncode:
        raise BadInput(f'{script} failed. Its message stands above.')


def limit_rows(sources, source_rows):
    """Limits Sources to the numbers of rows of the knob source_rows: dict name -> int.

    Raises BadInput for a name that is no source, and for a number that the source does not have.
    """
    by_name = {source.name: source for source in sources}
    for name, n in source_rows.items():
        if name not in by_name:
            raise BadInput(
                f"source_rows names '{name}', which is none of the sources {', '.join(by_name)}."
                f'{did_you_mean(name, by_name)}')
        n_windows = by_name[name].n_windows
        if not 1 <= n <= n_windows:
            raise BadInput(
                f"source_rows['{name}'] = {n}, and the source has {n_windows:,} rows of "
                f'{by_name[name].block_size} tokens. Give a number from 1 to {n_windows}.')
        if n < n_windows:
            by_name[name].limit_windows(n)


def check_sources(sources, trained, batch_rows):
    """Reads a row of every Source, so that shards of another tokenizer are found before training.

    Raises BadInput as well when a source in `trained` has less than a batch of rows.
    """
    for source in sources:
        source.rows([0])
    for source in trained:
        if source.n_windows < batch_rows:
            raise BadInput(
                f"source '{source.name}' has {source.n_windows} windows of {source.block_size} "
                f'tokens, fewer than one batch ({batch_rows} rows). Prepare more of it, or lower '
                'total_batch_tokens or block_size. select and source_rows leave fewer, too.')


def report_packing(sources):
    """Prints documents, rows and supervised tokens of every source with packing='document'."""
    for source in sources:
        packs = source.packs
        supervised = packs.n_valid / max(1, packs.length.sum())
        text = (
            f'{source.name} ({source.split}): {len(packs.length):,} documents in {packs.n_rows:,} '
            f'rows of {packs.capacity - 1:,} tokens, utilisation {packs.utilisation:.1%}, '
            f'{supervised:.0%} of the tokens are supervised')
        if not source.has_mask:
            text += ' (no masks)'
        if packs.n_too_long:
            fate = 'truncated' if source.overlong == 'truncate' else 'dropped'
            text += f'; {packs.n_too_long:,} documents are longer than a row and were {fate}'
        if packs.n_unsupervised:
            text += f'; {packs.n_unsupervised:,} were left out because no token is supervised'
        print(text)


# -- warnings about text ---------------------------------------------------------------------------


def entropy(ids):
    """Entropy in nats of the frequencies of token ids (n,)."""
    share = np.bincount(ids) / len(ids)
    return -(share[share > 0] * np.log(share[share > 0])).sum()


def count_pairs(ids, vocab_size):
    """Number of different pairs of neighbours in rows (n, T)."""
    return len(np.unique(ids[:, :-1] * vocab_size + ids[:, 1:]))


def text_warnings(rows, vocab_size):
    """Describes what is unusual in a sample of rows (n, T): list of str, [] for ordinary text.

    Shuffled or random tokens: neighbours form as many different pairs as in another order. The
    entropy of random tokens is that of a uniform distribution as well. Repeated text: most runs of
    8 tokens occur more than once. Text whose words were shuffled as a whole is not found.
    """
    found = []
    rng = np.random.default_rng(0)
    tokens = token_ids(rows).astype(np.int64)
    # A sample cannot show all of a vocabulary, so it is compared with random samples of its size.
    uniform = rng.integers(vocab_size, size=tokens.size)
    permuted = rng.permuted(tokens.ravel()).reshape(tokens.shape)
    if count_pairs(tokens, vocab_size) > 0.98 * count_pairs(permuted, vocab_size):
        is_random = entropy(tokens.ravel()) > 0.98 * entropy(uniform)
        kind = 'random' if is_random else 'shuffled'
        found.append(f'its tokens say nothing about their neighbours, as if they were {kind}')
    T = tokens.shape[1]
    if T > 8:
        runs = 0
        with np.errstate(over='ignore'):
            for i in range(8):
                runs = runs + mix_bits(tokens[:, i:T - 7 + i].astype(np.uint64), np.uint64(i))
        if len(np.unique(runs)) < 0.5 * runs.size:
            found.append('more than half of its runs of 8 tokens are repetitions')
    return found


# -- from rows to batches --------------------------------------------------------------------------


def token_ids(rows):
    """Token ids of int32 rows, without the sign that marks what the loss ignores."""
    return rows ^ (rows >> 31)


def document_ids(rows, bos_id):
    """Number of the document within its row for every token: same shape, int."""
    return (rows == bos_id).cumsum(1)


def batch_of(rows, bos_id=None):
    """Splits rows (B, T + 1), an int32 tensor, into inputs, targets and document ids.

    bos_id  token that documents begin with. None: attention may cross documents, and there are no
            ids
    Returns inputs (B, T) int32, targets (B, T) int64 with -1 where the loss ignores the token, and
    document ids (B, T) or None.
    """
    # Tokens that the loss ignores are still read as inputs.
    inputs = token_ids(rows)[:, :-1]
    targets = rows[:, 1:].long().clamp(min=-1)
    return inputs, targets, None if bos_id is None else document_ids(inputs, bos_id)


def valid_positions(targets, group=None):
    """Flat positions of the supervised targets (>= 0) on the CPU: (n,) int64, None when all are.

    targets  int64 of any shape
    group    ranks.Group of tensor parallelism: every rank of it then gets its share of the
             positions, for `GPT.loss` with an objective. None: all positions
    """
    valid = (targets.flatten() >= 0).nonzero()[:, 0]
    if group is not None:
        return valid[group.rank::group.size]
    return None if len(valid) == targets.numel() else valid


def put_on(tensor, device):
    """Copies a CPU tensor (or None) to the device without waiting for the copy."""
    if tensor is None:
        return None
    if torch.device(device).type != 'cuda':
        return tensor.to(device)
    # From pageable memory the copy would wait for the device.
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass
class MicroBatch:
    """The rows of one forward and backward pass on this rank. Tensors are on the device."""
    inputs: torch.Tensor                # (B, T) int32
    targets: torch.Tensor               # (B, T) int64, -1 where the loss ignores the token
    doc_ids: torch.Tensor | None        # document boundaries (documents + 1,) int32, or None
    valid: torch.Tensor | None          # flat positions of the supervised targets, None: all
    n_valid: int                        # supervised targets of this rank
    source_index: np.ndarray            # (B,) which source every row is from
    cursors: np.ndarray                 # (B,) which row of that source


@dataclass
class Feeder:
    """Turns rows into batches on the device, for this rank.

    rank, world_size    of the ranks that have rows of their own: all, without tensor parallelism
    bos_id              token that documents begin with. None: attention may cross documents
    valid_group         ranks.Group that shares the supervised positions, see `valid_positions`
    """
    device: torch.device
    batch_size: int             # rows per rank and micro-step
    rank: int = 0
    world_size: int = 1
    bos_id: int | None = None
    valid_group: object = None

    def put(self, rows):
        """(n, T + 1) int32 array -> inputs (n, T), targets (n, T), document boundaries or None."""
        # Boundaries are found on the CPU. On a GPU their number would have to be waited for.
        inputs, targets, doc_ids = batch_of(torch.from_numpy(rows), self.bos_id)
        boundaries = None if doc_ids is None else document_boundaries(doc_ids)
        return [put_on(t, self.device) for t in (inputs, targets, boundaries)]

    def deal(self, n_rows, size):
        """Yields this rank's positions in range(n_rows), `size` at a time: (size,) int arrays.

        Every rank yields the same number of arrays. Positions at the end may be n_rows or more: the
        caller repeats a row there and ignores the result.
        """
        for start in range(0, n_rows, size * self.world_size):
            yield np.arange(start + self.rank * size, start + (self.rank + 1) * size)

    def batches(self, read, n_rows, n_batches=1):
        """Yields this rank's part of at least n_batches batches, if there are enough rows.

        read(positions) gives rows (n, T + 1) int32 for a list of positions in range(n_rows).
        Yields (inputs, targets, document boundaries or None). Every rank yields the same number.
        Rows that fill up the last batch are repetitions whose targets are all -1.
        """
        size = max(1, min(self.batch_size, n_rows // (n_batches * self.world_size)))
        for mine in self.deal(n_rows, size):
            # All ranks run the same number of batches, or FSDP's collectives would hang.
            inputs, targets, doc_ids = self.put(read([min(int(i), n_rows - 1) for i in mine]))
            targets = targets.clone()
            targets[max(0, n_rows - int(mine[0])):] = -1
            yield inputs, targets, doc_ids

    def source_batches(self, source, cursors, n_batches=1):
        """As `batches`, for the rows of a source that cursors (n,) name."""
        def read(positions):
            return source.rows([int(cursors[i]) for i in positions])
        return self.batches(read, len(cursors), n_batches)

    def split(self, loader, batch, by_source=False):
        """This rank's micro-batches of a global batch that `loader.next_batch` returned: list.

        by_source   every micro-batch holds rows of one source. Rows that fill up the last one of a
                    source are repetitions without a supervised token
        """
        source_index, cursors = batch
        micro_batches = []
        for rows, fill in self.parts(source_index, by_source):
            read = loader.read(source_index[rows], cursors[rows])
            # ~id marks a token that the loss ignores.
            read[fill] = ~token_ids(read[fill])
            inputs, targets, doc_ids = self.put(read)
            # Counted on the host, so that nothing waits for the device before the first backward.
            on_host = torch.from_numpy(read[:, 1:])
            valid = put_on(valid_positions(on_host, self.valid_group), self.device)
            n_valid = int((on_host >= 0).sum())
            micro_batches.append(MicroBatch(
                inputs, targets, doc_ids, valid, n_valid, source_index[rows], cursors[rows]))
        return micro_batches

    def parts(self, source_index, by_source):
        """Positions in the global batch of every micro-batch of this rank: yields (rows, fill).

        rows (B,) ints, fill (B,) bool: True where a row is a repetition. Micro-step m is the rows
        from m * batch_size * world_size on, and each rank takes batch_size of them in turn.
        """
        groups = [np.arange(len(source_index))]
        if by_source:
            groups = [np.flatnonzero(source_index == s) for s in np.unique(source_index)]
        for group in groups:
            for mine in self.deal(len(group), self.batch_size):
                yield group[np.minimum(mine, len(group) - 1)], mine >= len(group)


# -- the mixture -----------------------------------------------------------------------------------


def check_weights(weights, names):
    """Divides weights (dict name -> weight) by their sum.

    Raises BadInput unless there is one weight for each of `names`, all are finite, none is negative
    and one is above 0.
    """
    for name in weights:
        if name not in names:
            raise BadInput(
                f"weights name the source '{name}', which is not there.{did_you_mean(name, names)} "
                f'Sources: {", ".join(names)}.')
    missing = [name for name in names if name not in weights]
    if missing:
        raise BadInput(
            f'weights are missing for the source(s) {", ".join(missing)}. Give 0 to leave one out.')
    bad = {name: w for name, w in weights.items() if not np.isfinite(w) or w < 0}
    total = sum(weights.values())
    if bad or total <= 0:
        raise BadInput(
            'mixture weights must be finite, none negative, and sum to more than 0; got '
            f'{bad or weights}.')
    return {name: weights[name] / total for name in names}


class MixtureLoader:
    """Draws rows from several sources so that the counts follow the weights, batch after batch.

    While the weights stay the same, the number of rows drawn from a source never differs by one
    whole row from its share of all rows, at the end of any batch. Every row is a job that is due
    when the share of its source reaches a whole number. Serving the earliest due date first meets
    all dates (a schedule exists, because the fluid one does). What is owed is carried over a change
    of weights. All numbers are integers, so nothing drifts, and the state is two of them per source
    besides the weights.
    """

    def __init__(self, sources, weights, seed=0):
        """sources: list of Source with one block_size. weights: dict name -> share (any scale)."""
        self.sources = {source.name: source for source in sources}
        self.names = list(self.sources)
        self.seed = seed
        self.cursors = dict.fromkeys(self.names, 0)      # rows read so far, dropped ones included
        self.dropped = dict.fromkeys(self.names, 0)      # rows that a keep mask dropped
        self.credits = dict.fromkeys(self.names, 0)      # rows owed, in WEIGHT_UNITs; they sum to 0
        # name -> (first cursor, keep (n,) bool from there on)
        self.keep_masks = dict.fromkeys(self.names, (0, np.zeros(0, dtype=bool)))
        self.logged = dict.fromkeys(self.names, 0)       # rows drawn at the last call of `metrics`
        self.set_weights(weights)

    def set_weights(self, weights):
        """Sets the weights (dict name -> share) from the next batch on."""
        shares = check_weights(weights, self.names)
        # Rounding down leaves a few units over. They go to the largest remainders.
        exact = {name: share * WEIGHT_UNIT for name, share in shares.items()}
        units = {name: int(x) for name, x in exact.items()}
        by_remainder = sorted(self.names, key=lambda name: units[name] - exact[name])
        for name in by_remainder[:WEIGHT_UNIT - sum(units.values())]:
            units[name] += 1
        self.units = units
        # What is owed to or by a source that is now switched off goes to the heaviest source.
        heaviest = max(self.names, key=lambda name: units[name])
        for name in self.names:
            if units[name] == 0:
                self.credits[heaviest] += self.credits[name]
                self.credits[name] = 0

    @property
    def weights(self):
        """dict name -> share that is in force."""
        return {name: units / WEIGHT_UNIT for name, units in self.units.items()}

    def drawn(self):
        """dict name -> rows that have been trained on."""
        return {name: self.cursors[name] - self.dropped[name] for name in self.names}

    def epochs(self):
        """dict name -> how many times the source has been read, dropped rows included."""
        return {name: self.cursors[name] / s.n_windows for name, s in self.sources.items()}

    def metrics(self):
        """Weights, shares of the rows drawn since the last call, and epochs of every source."""
        drawn = self.drawn()
        since = {name: n - self.logged[name] for name, n in drawn.items()}
        self.logged = drawn
        weights = self.weights
        epochs = self.epochs()
        metrics = {}
        for name in self.names:
            metrics[f'mixture/weight_{name}'] = weights[name]
            metrics[f'mixture/drawn_{name}'] = since[name] / sum(since.values())
            metrics[f'mixture/epochs_{name}'] = epochs[name]
        return metrics

    def count_rows(self, batch):
        """Rows of every source in a batch that `next_batch` returned: dict name -> int."""
        counts = np.bincount(batch[0], minlength=len(self.names)).tolist()
        return dict(zip(self.names, counts, strict=True))

    def set_keep_mask(self, name, keep):
        """Drops the next rows of a source where keep (n,) bool is False. Later rows are kept."""
        self.keep_masks[name] = self.cursors[name], keep

    def _take(self, name, n_rows):
        """Returns the next n_rows cursors that are not dropped, and moves the cursor past them."""
        first, keep = self.keep_masks[name]
        taken = []
        cursor = self.cursors[name]
        while len(taken) < n_rows:
            if cursor - first >= len(keep) or keep[cursor - first]:
                taken.append(cursor)
            else:
                self.dropped[name] += 1
            cursor += 1
        self.cursors[name] = cursor
        return taken

    def _counts(self, n_rows):
        """Rows of every source in the next batch of n_rows: dict name -> int, sum n_rows."""
        # What every source is owed by the end of this batch, if all earlier debts are paid.
        owed = {name: self.credits[name] + n_rows * self.units[name] for name in self.names}
        # rows that are due by the end of this batch
        counts = {name: max(0, x // WEIGHT_UNIT) for name, x in owed.items()}
        spare = n_rows - sum(counts.values())
        due_later = []
        for name in self.names:
            if self.units[name] and owed[name] > 0 and owed[name] % WEIGHT_UNIT:
                due_later.append(name)

        def due(name):          # batches until the next row is due; ties go to the one owed most
            rest = owed[name] % WEIGHT_UNIT
            return -(-(WEIGHT_UNIT - rest) // (n_rows * self.units[name])), -rest

        for name in sorted(due_later, key=due)[:max(0, spare)]:
            counts[name] += 1
        spare = n_rows - sum(counts.values())
        # Only right after a change of weights, when credits and weights do not fit together.
        while spare:
            sign = 1 if spare > 0 else -1
            able = [name for name in self.names if (self.units if sign > 0 else counts)[name]]
            name = max(able, key=lambda n: sign * (owed[n] - counts[n] * WEIGHT_UNIT))
            counts[name] += sign
            spare -= sign
        return counts

    def next_batch(self, n_rows):
        """Decides the next global batch and moves on.

        Returns (source index (n_rows,), cursor (n_rows,)), int64 arrays. The order of rows within
        the batch is shuffled by a key made of the seed and the rows drawn so far.
        """
        counts = self._counts(n_rows)
        drawn = sum(self.cursors.values())
        index = np.repeat(np.arange(len(self.names)), [counts[name] for name in self.names])
        cursors = []
        for name in self.names:
            cursors += self._take(name, counts[name])
        # Shuffled, so that a micro-batch is not made of one source.
        with np.errstate(over='ignore'):
            key = derive_keys(1, self.seed, drawn)[0]
            order = np.argsort(mix_bits(np.arange(n_rows, dtype=np.uint64), key), kind='stable')
        for name in self.names:
            self.credits[name] += n_rows * self.units[name] - counts[name] * WEIGHT_UNIT
        return index[order], np.array(cursors, dtype=np.int64)[order]

    def read(self, index, cursors):
        """Reads the rows of a batch, or of a part of it, in its order: (n, T + 1) int32."""
        sources = [self.sources[name] for name in self.names]
        out = np.empty((len(index), sources[0].block_size + 1), dtype=np.int32)
        for i, (s, cursor) in enumerate(zip(index.tolist(), cursors.tolist(), strict=True)):
            sources[s].read(cursor, out[i])
        # One check for the batch. Per row it would cost more than the reading.
        limit = min((s.vocab_size for s in sources if s.vocab_size is not None), default=2**31)
        ids = out if sources[0].packs is None else token_ids(out)
        if len(out) and not 0 <= int(ids.min()) <= int(ids.max()) < limit:
            for s in np.unique(index):          # the error of this call names the source
                sources[s].check_ids(out[index == s])
        return out

    def state_dict(self):
        """Everything that the coming batches depend on: integers and text by source name."""
        # 'verdicts' is the name of the keep masks in checkpoints.
        verdicts = {}
        for name, (first, keep) in self.keep_masks.items():
            verdicts[name] = [first, len(keep), np.packbits(keep).tobytes().hex()]
        return dict(
            cursors=dict(self.cursors), dropped=dict(self.dropped), credits=dict(self.credits),
            units=dict(self.units), verdicts=verdicts,
            fingerprints={name: source.fingerprint() for name, source in self.sources.items()})

    def load_state_dict(self, state):
        """Restores a state. Raises BadInput when the sources or their shards have changed."""
        if set(state['cursors']) != set(self.names):
            raise BadInput(
                f"the checkpoint's sources are {sorted(state['cursors'])}, the config's "
                f'{sorted(self.names)}. To continue with other sources start a new run with '
                'init_from.')
        # Cursors mean other rows when the shards are others, so a changed source cannot be resumed.
        for name, source in self.sources.items():
            if state['fingerprints'][name] != source.fingerprint():
                raise BadInput(
                    f"the shards of source '{name}' ({os.path.dirname(source.paths[0])}), or the "
                    'rows kept of it, have changed since the checkpoint was written. Restore them, '
                    'or start a new run with init_from.')
        for key in ('cursors', 'dropped', 'credits', 'units'):
            setattr(self, key, {name: int(state[key][name]) for name in self.names})
        for name, (first, n, packed) in state['verdicts'].items():
            bits = np.frombuffer(bytes.fromhex(packed), dtype=np.uint8)
            self.keep_masks[name] = first, np.unpackbits(bits, count=n).astype(bool)
        self.logged = self.drawn()
