"""Token shards on disk, and which row comes when.

A source is a folder with `train/*.bin`, `val/*.bin` (and others) and `meta.json`. A shard is 256 int32 and then the tokens:
llm.c's and modded-nanogpt's format for uint16, a version of our own for uint32. Reading is a memory map and one copy; no
worker processes (tools/bench_parts.py measures it).

The rows of a run are a pure function of a few integers: each source is a permuted set of windows of block_size + 1 tokens,
permuted by a keyed bijection (so 2T tokens need no index), and a cursor per source says how far it has been read. The
mixture decides per global batch how many rows every source gives. None of it knows about ranks: a rank reads its own rows
of the global batch, so a run goes on unchanged with another number of them.
"""
import functools
import glob
import hashlib
import json
import os
import subprocess
import sys

import numpy as np

from configurator import BadInput, did_you_mean
from packing import pack_documents

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
FORMATS = {(20240520, 1): np.dtype('<u2'), (20240801, 7): np.dtype('<u4')}      # (magic, version) -> token dtype
WEIGHT_UNIT = 2**32             # mixture weights are held as integers that sum to this, so nothing drifts
PERMUTATION_BLOCK = 4096        # positions permuted at once
PIECE = 256                     # tokens that are compared at once where documents are not known


# -- shards ------------------------------------------------------------------------------------------------------------

def shard_header(n_tokens, vocab_size):
    """(the header's bytes, dtype of the tokens behind it: uint16 if the vocabulary allows, else uint32)."""
    magic, version = (20240520, 1) if vocab_size <= 2**16 else (20240801, 7)
    header = np.zeros(HEADER_INTS, dtype='<i4')
    header[:3] = magic, version, n_tokens
    return header.tobytes(), FORMATS[magic, version]


def shard_bytes(tokens, vocab_size):
    """A 1-D array of token ids as the two byte strings of a shard: header and tokens."""
    header, dtype = shard_header(len(tokens), vocab_size)
    return header, np.asarray(tokens).astype(dtype).tobytes()


def read_header(path):
    """(number of tokens, dtype) of a shard. Raises BadInput for a foreign, empty or truncated file."""
    with open(path, 'rb') as f:
        beginning = f.read(HEADER_BYTES)
    header = np.frombuffer(beginning[:len(beginning) // 4 * 4], dtype='<i4')
    if len(header) < HEADER_INTS or (int(header[0]), int(header[1])) not in FORMATS:
        raise BadInput(f'{path} is no token shard: it begins with {header[:2].tolist()}, not with one of '
                       f'{[list(k) for k in FORMATS]} (magic, version). Remove it or make it again.')
    n_tokens, dtype = int(header[2]), FORMATS[int(header[0]), int(header[1])]
    holds = (os.path.getsize(path) - HEADER_BYTES) // dtype.itemsize
    if holds != n_tokens:
        raise BadInput(f'{path} holds {holds:,} tokens, its header says {n_tokens:,}: '
                       f'{"truncated" if holds < n_tokens else "damaged"}. Delete it and prepare the source again.')
    return n_tokens, dtype


@functools.lru_cache(maxsize=64)        # a bound on open files (macOS allows 256); 2T tokens are some 20,000 shards
def open_shard(path):
    n_tokens, dtype = read_header(path)
    return np.memmap(path, dtype=dtype, mode='r', offset=HEADER_BYTES, shape=(n_tokens,))


@functools.lru_cache(maxsize=64)
def open_mask(path):
    """The loss mask beside a shard, (tokens,) uint8, None when there is none. BadInput when it has another length."""
    mask_path, n_tokens = path.removesuffix('.bin') + '.mask', read_header(path)[0]
    if not os.path.isfile(mask_path):
        return None
    if os.path.getsize(mask_path) != n_tokens:
        raise BadInput(f'{mask_path} holds {os.path.getsize(mask_path):,} bytes, its shard {n_tokens:,} tokens: truncated or of another shard. '
                       'Prepare the source again.')
    return np.memmap(mask_path, dtype=np.uint8, mode='r')


# -- permutation -------------------------------------------------------------------------------------------------------

def _mix(x, key):
    """splitmix64's finaliser: uint64 array and key -> well-mixed uint64 array."""
    x = (x + key) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_keys(n, *what):
    """n uint64 keys from the repr of anything: the same in every process and on every machine."""
    return np.frombuffer(hashlib.shake_256(repr(what).encode()).digest(8 * n), dtype='<u8')


def permute(positions, n, keys):
    """Bijection of range(n) applied to an int array: a four-round Feistel network on the next power of four, walked until
    the value falls below n (Black & Rogaway 2002, cycle walking). keys: (4,) uint64. Returns int64.
    """
    half = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    out = np.asarray(positions, dtype=np.uint64).copy()
    todo = np.arange(len(out))
    with np.errstate(over='ignore'):
        while len(todo):
            left, right = out[todo] >> half, out[todo] & mask
            for key in keys:
                left, right = right, left ^ (_mix(right, key) & mask)
            value = (left << half) | right
            out[todo] = value
            todo = todo[value >= n]
    return out.astype(np.int64)


# -- sources -----------------------------------------------------------------------------------------------------------

class Source:
    """One split of one source: its shards as a permuted, endless sequence of rows of block_size + 1 tokens.

    packing 'window': a row is a window of the stream; masks are not looked at. Neighbouring windows of a shard share one token
    (the last target of one is the first input of the next); the tail of a shard that fills no window is not used.
    packing 'document': a row holds whole documents and padding (packing.py); a token that the loss does not count as a target is
    stored as ~id, so it is negative. overlong: documents longer than a row, truncate | drop.
    `meta` is meta.json's content, or None for shards made elsewhere.
    """

    def __init__(self, data_dir, name, split, block_size, seed=0, vocab_size=None, packing='window', overlong='truncate'):
        self.name, self.split, self.block_size, self.seed, self.vocab_size = name, split, block_size, seed, vocab_size
        folder = os.path.join(data_dir, name)
        if not os.path.isdir(folder):
            there = sorted(os.listdir(data_dir)) if os.path.isdir(data_dir) else []
            raise BadInput(f"source '{name}': {folder} does not exist.{did_you_mean(name, there)} Make it with a script in "
                           'prepare/, or set data_dir.')
        if os.path.isdir(os.path.join(folder, 'progress')) and not os.path.isfile(os.path.join(folder, 'meta.json')):
            raise BadInput(f"source '{name}': {folder} is half prepared (it holds progress/ and no meta.json). Run its script "
                           'in prepare/ again; it goes on where it stopped.')
        self.paths = sorted(glob.glob(os.path.join(folder, split, '*.bin')))
        if not self.paths:
            raise BadInput(f"source '{name}': {folder}/{split} holds no *.bin shards. Prepare the source again.")
        headers = [read_header(path) for path in self.paths]
        self.shard_tokens = [n for n, _ in headers]
        self.first_window = np.concatenate(([0], np.cumsum([max(0, n - 1) // block_size for n in self.shard_tokens])))
        self.n_windows = int(self.first_window[-1])
        self.n_tokens = sum(self.shard_tokens)
        if self.n_windows == 0 and packing == 'window':
            raise BadInput(f"source '{name}' ({split}): {self.n_tokens:,} tokens do not fill one window of block_size + 1 = "
                           f'{block_size + 1}. Lower block_size or prepare more.')
        meta_path = os.path.join(folder, 'meta.json')
        self.meta = None
        if os.path.isfile(meta_path):
            with open(meta_path, encoding='utf-8') as f:
                self.meta = json.load(f)
            if vocab_size is not None and self.meta['vocab_size'] > vocab_size:
                raise BadInput(f"source '{name}' was tokenized with a vocabulary of {self.meta['vocab_size']:,}, the model's "
                               f'vocab_size is {vocab_size:,}. Set vocab_size, or prepare the source with its tokenizer.')
        self.kept = None               # window numbers that `keep_windows` left, ascending; None: all
        self._block_cache = {}
        self.overlong, self.packs = overlong, None      # packs: packing.Packs with packing='document'
        if packing == 'document':
            self.pack()

    def pack(self):
        """Finds the documents and makes them the rows of this source. Reads every token once, a second for 500 million."""
        if self.meta is None:
            raise BadInput(f"source '{self.name}' has no meta.json that names the token which documents begin with; packing='document' needs it.")
        without = [path for path in self.paths if not os.path.isfile(path.removesuffix('.bin') + '.mask')]
        if 0 < len(without) < len(self.paths):
            raise BadInput(f"source '{self.name}' ({self.split}): {without[0]} and {len(without) - 1} more shards have no .mask, others have. "
                           'Prepare the source again.')
        self.pad_id = 1 if self.meta['tokenizer']['bos_id'] == 0 else 0       # any but BOS, so that padding begins no document
        self.packs = pack_documents(((open_shard(path), open_mask(path)) for path in self.paths), self.meta['tokenizer']['bos_id'],
                                    self.block_size + 1, self.overlong)
        self.has_mask, self.n_windows = not without, self.packs.n_rows
        if self.n_windows == 0:
            raise BadInput(f"source '{self.name}' ({self.split}) has no document with a token that the loss counts within block_size + 1 = "
                           f'{self.block_size + 1} tokens ({self.packs.n_too_long:,} are longer). Raise block_size, or look at its masks.')

    def keep_windows(self, keep):
        """Leaves out the windows where keep (n_windows,) bool is False, for good: epochs are of the rest."""
        self.kept = np.flatnonzero(keep)
        self.n_windows = len(self.kept)
        self._block_cache.clear()

    def fingerprint(self):
        """16 hex digits over shard names, lengths, first and last tokens and recorded hashes: changes when the data does, or what is kept of it."""
        digest = hashlib.sha256()
        recorded = {s['file']: s['sha256'] for s in self.meta['shards']} if self.meta else {}
        for path, n_tokens in zip(self.paths, self.shard_tokens):
            tokens = open_shard(path)
            digest.update(f'{os.path.basename(path)} {n_tokens} '
                          f'{recorded.get(os.path.relpath(path, os.path.dirname(os.path.dirname(path))), "")}'.encode())
            digest.update(tokens[:1024].tobytes() + tokens[-1024:].tobytes())
        if self.kept is not None:
            digest.update(self.kept.tobytes())
        if self.packs is not None:
            masked = sorted(s.get('mask_sha256', '') for s in self.meta['shards'])
            digest.update(f'{self.block_size} {self.overlong} {self.n_windows} {masked}'.encode())
        return digest.hexdigest()[:16]

    def window(self, cursor):
        """The window that the cursor-th row is: epochs follow one another, each a permutation of its own."""
        epoch, position = divmod(int(cursor), self.n_windows)
        block = position // PERMUTATION_BLOCK
        if (epoch, block) not in self._block_cache:
            if len(self._block_cache) > 8:
                self._block_cache.clear()
            positions = np.arange(block * PERMUTATION_BLOCK, min((block + 1) * PERMUTATION_BLOCK, self.n_windows))
            keys = derive_keys(4, self.seed, self.name, self.split, epoch)
            self._block_cache[epoch, block] = permute(positions, self.n_windows, keys).tolist()
        window = self._block_cache[epoch, block][position % PERMUTATION_BLOCK]
        return window if self.kept is None else int(self.kept[window])

    def read(self, cursor, out):
        """Copies the cursor-th row into out (block_size + 1,)."""
        self.read_window(self.window(cursor), out)

    def read_window(self, window, out):
        """Copies a window, by its number in the shards' order, into out (block_size + 1,)."""
        if self.packs is not None:
            return self.read_pack(window, out)
        shard = int(np.searchsorted(self.first_window, window, side='right')) - 1
        start = (window - int(self.first_window[shard])) * self.block_size
        out[:] = open_shard(self.paths[shard])[start:start + self.block_size + 1]

    def read_pack(self, row, out):
        """Copies a row of documents into out, tokens that are not counted as ~id, then padding."""
        at = 0
        for i in range(self.packs.first[row], self.packs.first[row + 1]):
            path, start, length = self.paths[self.packs.shard[i]], self.packs.start[i], self.packs.length[i]
            part = out[at:at + length]
            part[:] = open_shard(path)[start:start + length]
            if self.has_mask:
                np.invert(part, out=part, where=open_mask(path)[start:start + length] == 0)
            part[0] = ~token_ids(part[0])                      # no document begins because of the one before it
            at += length
        out[at:] = ~self.pad_id

    def rows(self, cursors):
        """(n, block_size + 1) int32 rows; BadInput when one holds a token id that the model's vocabulary lacks."""
        out = np.empty((len(cursors), self.block_size + 1), dtype=np.int32)
        for i, cursor in enumerate(cursors):
            self.read(cursor, out[i])
        self.check_ids(out)
        return out

    def check_ids(self, rows):
        """Raises BadInput when a row of this source holds a token id outside the vocabulary."""
        rows = rows if self.packs is None else token_ids(rows)
        if self.vocab_size is not None and not 0 <= int(rows.min()) <= int(rows.max()) < self.vocab_size:
            bad = int(rows.max()) if rows.min() >= 0 else int(rows.min()) % 2**32
            raise BadInput(f"source '{self.name}' ({os.path.dirname(self.paths[0])}) holds token id {bad}, the model's "
                           f'vocab_size is {self.vocab_size}: shards of another tokenizer. Prepare the source again or set vocab_size.')


def common_tokenizer(sources):
    """The tokenizer record (meta.json's 'tokenizer') that all sources share, None when none of them has a meta.json.

    Raises BadInput when two sources were made with different tokenizers.
    """
    known = {s.name: s.meta['tokenizer'] for s in sources if s.meta is not None}
    if not known:
        return None
    first_name, first = next(iter(known.items()))
    for name, tokenizer in known.items():
        if tokenizer['fingerprint'] != first['fingerprint']:
            raise BadInput(f"source '{name}' was made with tokenizer {tokenizer['name']} ({tokenizer['fingerprint']}), "
                           f"'{first_name}' with {first['name']} ({first['fingerprint']}). Prepare one of them again.")
    return first


def text_warnings(rows, vocab_size):
    """What is odd about a sample of a Source's rows (n, T) of ids below vocab_size, in words: list of str, [] for ordinary text.

    Random or shuffled tokens: neighbours form as many different pairs as they do in another order; random ones: their entropy is
    that of uniform ones, too. Repeated text: most runs of 8 tokens come more than once. (Words shuffled whole are not noticed.)
    """
    found, rng = [], np.random.default_rng(0)
    tokens = token_ids(rows).astype(np.int64)
    uniform = rng.integers(vocab_size, size=tokens.size)

    def entropy(ids):
        share = np.bincount(ids) / len(ids)
        return -(share[share > 0] * np.log(share[share > 0])).sum()

    def n_pairs(ids):
        return len(np.unique(ids[:, :-1] * vocab_size + ids[:, 1:]))
    if n_pairs(tokens) > 0.98 * n_pairs(rng.permuted(tokens.ravel()).reshape(tokens.shape)):
        found.append('its tokens say nothing about their neighbours, as if they were '
                     + ('random' if entropy(tokens.ravel()) > 0.98 * entropy(uniform) else 'shuffled'))
    with np.errstate(over='ignore'):
        runs = sum(_mix(tokens[:, i:tokens.shape[1] - 7 + i].astype(np.uint64), np.uint64(i)) for i in range(8)) if tokens.shape[1] > 8 else None
    if runs is not None and len(np.unique(runs)) < 0.5 * runs.size:
        found.append('more than half of its runs of 8 tokens are repetitions')
    return found


def shared_documents(probe, source, bos_id, rank=0, world_size=1):
    """Number of documents of `probe` that stand in `source` as well, token for token, in this rank's part of the shards.

    Both are Sources. Reads all tokens of the source once, a second for 300 million in the page cache. Documents of fewer than 16 tokens are
    not compared; without bos_id (shards without meta.json) aligned pieces of PIECE tokens are.
    """
    def pieces(path):                       # tokens; where documents begin and end; a hash of length, first and last 16 tokens: (n,) uint64
        tokens = open_shard(path)
        starts = np.arange(0, len(tokens), PIECE) if bos_id is None else np.flatnonzero(tokens == bos_id)
        ends = np.append(starts[1:], len(tokens))[:len(starts)]
        starts, ends = (x[ends - starts >= 16] for x in (starts, ends))
        places = np.concatenate((starts[:, None] + np.arange(16), ends[:, None] - 1 - np.arange(16)), 1)
        with np.errstate(over='ignore'):
            words = tokens[places].astype(np.uint64)
            return tokens, starts, ends, sum((_mix(words[:, i], np.uint64(i)) for i in range(32)), _mix((ends - starts).astype(np.uint64), np.uint64(32)))
    wanted = {}
    for path in probe.paths:
        tokens, starts, ends, hashes = pieces(path)
        for start, end, key in zip(starts, ends, hashes.tolist()):
            wanted.setdefault(key, []).append(tokens[start:end])
    known, n = np.array(list(wanted), dtype=np.uint64), 0
    for path in source.paths[rank::world_size]:
        tokens, starts, ends, hashes = pieces(path)
        for i in np.flatnonzero(np.isin(hashes, known)):
            n += any(np.array_equal(document, tokens[starts[i]:ends[i]]) for document in wanted[int(hashes[i])])
    return n


def report_packing(sources):
    """Prints of every source (packing='document') how many documents, rows and counted tokens it has, and what was cut or left out."""
    for source in sources:
        p = source.packs
        print(f"{source.name} ({source.split}): {len(p.length):,} documents in {p.n_rows:,} rows of {p.capacity - 1:,} tokens, utilisation "
              f'{p.utilisation:.1%}, {p.n_valid / max(1, p.length.sum()):.0%} of the tokens count' + ('' if source.has_mask else ' (no masks)')
              + (f'; {p.n_too_long:,} longer than a row, {dict(truncate="truncated", drop="dropped")[source.overlong]}' if p.n_too_long else '')
              + (f'; {p.n_unsupervised:,} left out, since no token of theirs counts' if p.n_unsupervised else ''))


def prepare_missing(script, data_dir, names):
    """Runs a script of prepare/ when one of the sources `names` is not in data_dir."""
    if any(not os.path.isfile(os.path.join(data_dir, name, 'meta.json')) for name in names):
        print(f'data: {data_dir} is not complete; running {script}', flush=True)
        if subprocess.run([sys.executable, script, f'--out={data_dir}']).returncode:
            raise BadInput(f'{script} failed; its message stands above.')


def check_sources(sources, trained, batch_rows):
    """Reads a row of every Source, so that shards of another tokenizer show; BadInput, too, when one of those trained on has less than a batch of rows."""
    for source in sources:
        source.rows([0])
    for source in trained:
        if source.n_windows < batch_rows:
            raise BadInput(f"source '{source.name}' has {source.n_windows} windows of {source.block_size} tokens, fewer than one batch "
                           f'({batch_rows} rows). Prepare more of it, or lower total_batch_tokens or block_size.')


# -- from rows to batches ----------------------------------------------------------------------------------------------

def token_ids(rows):
    """A Source's rows without the sign that says what is not counted: int arrays or tensors of 32 bits."""
    return rows ^ (rows >> 31)


def batch_of(rows, bos_id=None):
    """A Source's rows (n, T + 1), an int32 tensor -> inputs (n, T) int32, targets (n, T) int64 with -1 = not counted, document ids.

    bos_id: the token that documents begin with; None: attention is not kept within documents, and there are no ids.
    """
    inputs = token_ids(rows)[:, :-1]
    return inputs, rows[:, 1:].long().clamp(min=-1), None if bos_id is None else document_ids(inputs, bos_id)


def valid_positions(targets, group=None):
    """The positions of supervised targets (>= 0) in a flattened CPU tensor, or None when all of them are supervised.

    targets  int64 of any shape
    group    ranks.Group of tensor parallelism: every rank then gets its share of the positions, for `GPT.loss` with an
             objective. None: all positions
    Returns (n,) int64 or None.
    """
    valid = (targets.flatten() >= 0).nonzero()[:, 0]
    if group is not None:
        return valid[group.rank::group.size]
    return None if len(valid) == targets.numel() else valid


def document_ids(rows, bos_id):
    """Number of the document that every token belongs to within its row: same shape, int. Documents begin with bos_id."""
    return (rows == bos_id).cumsum(1)


# -- the mixture -------------------------------------------------------------------------------------------------------

def check_weights(weights, names):
    """dict name -> weight for exactly `names`, finite, none negative, sum above 0; returns them divided by their sum."""
    for name in weights:
        if name not in names:
            raise BadInput(f"weights name the source '{name}', which is not there.{did_you_mean(name, names)} "
                           f'Sources: {", ".join(names)}.')
    missing = [name for name in names if name not in weights]
    if missing:
        raise BadInput(f'weights say nothing of the source(s) {", ".join(missing)}. Give 0 to leave one out.')
    bad = {name: w for name, w in weights.items() if not np.isfinite(w) or w < 0}
    total = sum(weights.values())
    if bad or total <= 0:
        raise BadInput(f'mixture weights must be finite, none negative, and sum to more than 0; got {bad or weights}.')
    return {name: weights[name] / total for name in names}


class MixtureLoader:
    """Draws rows from several sources so that counts follow the weights, batch after batch.

    While the weights stand, the rows drawn from a source never differ by one whole row from its share of all rows, at the
    end of any batch. Every row is a job that becomes due when its source's share reaches a whole number; earliest due date
    first meets all dates (a schedule exists, because the fluid one does). What is owed is carried over a change of weights.
    Integers throughout: no drift, and the state is two of them per source, besides the weights.
    """

    def __init__(self, sources, weights, seed=0):
        """sources: list of Source with the same block_size; weights: dict name -> share (any positive scale)."""
        self.sources = {source.name: source for source in sources}
        self.names = list(self.sources)
        self.seed = seed
        self.cursors = {name: 0 for name in self.names}          # rows drawn so far, and dropped
        self.dropped = {name: 0 for name in self.names}          # those of them that a verdict dropped
        self.keep_masks = {name: (0, np.zeros(0, dtype=bool)) for name in self.names}      # first cursor, keep (n,) from there on
        self.credits = {name: 0 for name in self.names}          # rows owed, in WEIGHT_UNITs; they sum to 0
        self.set_weights(weights)

    def set_weights(self, weights):
        """New weights (dict name -> share), in force from the next batch on. Raises BadInput if they make no sense."""
        shares = check_weights(weights, self.names)
        exact = {name: share * WEIGHT_UNIT for name, share in shares.items()}
        units = {name: int(x) for name, x in exact.items()}
        by_remainder = sorted(self.names, key=lambda name: units[name] - exact[name])
        for name in by_remainder[:WEIGHT_UNIT - sum(units.values())]:
            units[name] += 1
        self.units = units
        heaviest = max(self.names, key=lambda name: units[name])
        for name in self.names:                 # what is owed to or by a source that is now switched off goes to the heaviest
            if units[name] == 0:
                self.credits[heaviest] += self.credits[name]
                self.credits[name] = 0

    @property
    def weights(self):
        """dict name -> share in force."""
        return {name: units / WEIGHT_UNIT for name, units in self.units.items()}

    def drawn(self):
        """dict name -> rows that have been trained on."""
        return {name: self.cursors[name] - self.dropped[name] for name in self.names}

    def set_keep_masks(self, name, keep):
        """The next rows of a source are dropped where keep (n,) bool is False; those after them are all kept."""
        self.keep_masks[name] = self.cursors[name], keep

    def _take(self, name, n_rows):
        """The next n_rows cursors that are not dropped: list. Moves on behind them."""
        first, keep = self.keep_masks[name]
        taken, cursor = [], self.cursors[name]
        while len(taken) < n_rows:
            if cursor - first >= len(keep) or keep[cursor - first]:
                taken.append(cursor)
            else:
                self.dropped[name] += 1
            cursor += 1
        self.cursors[name] = cursor
        return taken

    def epochs(self):
        """dict name -> how often the source has been read (1.5: once and a half), dropped rows included."""
        return {name: self.cursors[name] / source.n_windows for name, source in self.sources.items()}

    def _counts(self, n_rows):
        """Rows that every source gives to the next batch of n_rows: dict name -> int, sum n_rows."""
        owed = {name: self.credits[name] + n_rows * self.units[name] for name in self.names}
        counts = {name: max(0, x // WEIGHT_UNIT) for name, x in owed.items()}                # due by the end of this batch
        spare = n_rows - sum(counts.values())
        due_later = [name for name in self.names if self.units[name] and owed[name] > 0 and owed[name] % WEIGHT_UNIT]

        def due(name):          # batches until the next row of this source is due; ties go to the one owed most
            rest = owed[name] % WEIGHT_UNIT
            return -(-(WEIGHT_UNIT - rest) // (n_rows * self.units[name])), -rest

        for name in sorted(due_later, key=due)[:max(0, spare)]:
            counts[name] += 1
        spare = n_rows - sum(counts.values())
        while spare:            # only just after a change of weights, when credits and weights no longer fit together
            sign = 1 if spare > 0 else -1
            able = [name for name in self.names if (self.units[name] if sign > 0 else counts[name])]
            name = max(able, key=lambda n: sign * (owed[n] - counts[n] * WEIGHT_UNIT))
            counts[name] += sign
            spare -= sign
        return counts

    def next_batch(self, n_rows):
        """Decides the next global batch and moves on. Returns (source index (n_rows,), cursor (n_rows,)), int64 arrays.

        The order of rows within the batch is shuffled by a key made of the seed and the rows drawn so far.
        """
        counts = self._counts(n_rows)
        drawn = sum(self.cursors.values())
        index = np.repeat(np.arange(len(self.names)), [counts[name] for name in self.names])
        cursor = np.array([cursor for name in self.names for cursor in self._take(name, counts[name])], dtype=np.int64)
        with np.errstate(over='ignore'):
            order = np.argsort(_mix(np.arange(n_rows, dtype=np.uint64), derive_keys(1, self.seed, drawn)[0]), kind='stable')
        for name in self.names:
            self.credits[name] += n_rows * self.units[name] - counts[name] * WEIGHT_UNIT
        return index[order], cursor[order]

    def read(self, index, cursors):
        """The rows that `next_batch` (or a part of it) names: (n, block_size + 1) int32, in that order."""
        sources = [self.sources[name] for name in self.names]
        out = np.empty((len(index), sources[0].block_size + 1), dtype=np.int32)
        for i, (s, cursor) in enumerate(zip(index.tolist(), cursors.tolist())):
            sources[s].read(cursor, out[i])
        limit = min((s.vocab_size for s in sources if s.vocab_size is not None), default=2**31)
        ids = out if sources[0].packs is None else token_ids(out)
        if len(out) and not 0 <= int(ids.min()) <= int(ids.max()) < limit:
            for s in np.unique(index):          # the error names the source
                sources[s].check_ids(out[index == s])
        return out

    def state_dict(self):
        """Everything that the coming batches depend on, as plain integers and text by source name."""
        verdicts = {name: [first, len(keep), np.packbits(keep).tobytes().hex()] for name, (first, keep) in self.keep_masks.items()}
        return dict(cursors=dict(self.cursors), dropped=dict(self.dropped), credits=dict(self.credits), units=dict(self.units), verdicts=verdicts,
                    fingerprints={name: source.fingerprint() for name, source in self.sources.items()})

    def load_state_dict(self, state):
        """Takes up a state; BadInput when the sources are others, or their shards have changed since it was saved."""
        if set(state['cursors']) != set(self.names):
            raise BadInput(f"the checkpoint's sources are {sorted(state['cursors'])}, the config's {sorted(self.names)}; to go on "
                           'with other sources start a new run with init_from.')
        for name, source in self.sources.items():
            if state['fingerprints'][name] != source.fingerprint():
                raise BadInput(f"the shards of source '{name}' ({os.path.dirname(source.paths[0])}), or the rows kept of it, have changed since "
                               'the checkpoint was written. Restore them, or start a new run with init_from.')
        self.cursors, self.dropped, self.credits, self.units = (
            {name: int(state[key][name]) for name in self.names} for key in ('cursors', 'dropped', 'credits', 'units'))
        for name, (first, n, packed) in state['verdicts'].items():
            self.keep_masks[name] = first, np.unpackbits(np.frombuffer(bytes.fromhex(packed), dtype=np.uint8), count=n).astype(bool)


def rows_of_rank(n_rows, batch_size, rank, world_size):
    """Positions in the global batch that a rank trains on, micro-step by micro-step: (n_rows / world_size,) int array.

    Micro-step m is rows m * batch_size * world_size onwards, each rank its batch_size of them in turn.
    """
    return np.arange(n_rows).reshape(-1, world_size, batch_size)[:, rank].ravel()
