"""Token shards on disk, their loss masks, and the meta.json that lists them.

A shard is a header of 256 int32 followed by the tokens. This is the format of llm.c and
modded-nanogpt for uint16, and a version of our own for uint32. Nothing here needs torch, so that
prepare/ starts quickly.
"""
import functools
import hashlib
import os

import numpy as np

from configurator import BadInput, RunFault, read_json

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
FORMATS = {                     # (magic, version) -> dtype of the tokens
    (20240520, 1): np.dtype('<u2'),
    (20240801, 7): np.dtype('<u4')}


def shard_header(n_tokens, vocab_size):
    """Returns the bytes of a header and the dtype of its tokens: uint16 if all ids fit."""
    magic, version = (20240520, 1) if vocab_size <= 2**16 else (20240801, 7)
    header = np.zeros(HEADER_INTS, dtype='<i4')
    header[:3] = magic, version, n_tokens
    return header.tobytes(), FORMATS[magic, version]


def shard_bytes(tokens, vocab_size):
    """Returns the two byte strings of a shard, header and tokens, for a 1-D array of token ids."""
    header, dtype = shard_header(len(tokens), vocab_size)
    return header, np.asarray(tokens).astype(dtype).tobytes()


def read_header(path):
    """Returns (number of tokens, dtype) of a shard.

    Raises BadInput for a file of another format, an empty file or a truncated file.
    """
    with open(path, 'rb') as f:
        beginning = f.read(HEADER_BYTES)
    # A file may end within the header, so only full integers are looked at.
    header = np.frombuffer(beginning[:len(beginning) // 4 * 4], dtype='<i4')
    kind = tuple(header[:2].tolist())
    if len(header) < HEADER_INTS or kind not in FORMATS:
        raise BadInput(
            f'{path} is no token shard: it begins with {list(kind)}, not with one of '
            f'{[list(k) for k in FORMATS]} (magic, version). Remove it or make it again.')
    n_tokens = int(header[2])
    dtype = FORMATS[kind]
    # The size is compared here, because a memory map of a truncated file fails only when it is
    # read.
    holds = (os.path.getsize(path) - HEADER_BYTES) // dtype.itemsize
    if holds != n_tokens:
        fault = 'truncated' if holds < n_tokens else 'damaged'
        raise BadInput(
            f'{path} holds {holds:,} tokens, its header says {n_tokens:,}: {fault}. '
            'Delete it and prepare the source again.')
    return n_tokens, dtype


# 64 is a bound on open files: macOS allows 256 per process, and 2T tokens are some 20,000 shards.
@functools.lru_cache(maxsize=64)
def open_shard(path):
    """Returns the tokens of a shard as a read-only memory map, for a look at all of it."""
    n_tokens, dtype = read_header(path)
    return np.memmap(path, dtype=dtype, mode='r', offset=HEADER_BYTES, shape=(n_tokens,))


@functools.lru_cache(maxsize=64)
def open_file(path):
    return open(path, 'rb', buffering=0)


def read_into(out, path, offset, start):
    """Fills an array with the items of a file from `start` on, after `offset` bytes.

    Training reads in this way, because a memory map of a file that is truncated meanwhile kills the
    process with SIGBUS. Raises RunFault instead.
    """
    n_read = os.preadv(open_file(path).fileno(), [out], offset + start * out.itemsize)
    if n_read < out.nbytes:
        raise RunFault(
            f'{path} has ended after {os.path.getsize(path):,} bytes: it was truncated while it '
            'was in use. Restore it, or prepare the source again.')


def mask_path(shard_path):
    return shard_path.removesuffix('.bin') + '.mask'


@functools.lru_cache(maxsize=64)
def open_mask(shard_path):
    """Returns the loss mask of a shard, (tokens,) uint8, or None when it has none.

    Raises BadInput when the mask has another length than the shard.
    """
    path = mask_path(shard_path)
    if not os.path.isfile(path):
        return None
    n_tokens = read_header(shard_path)[0]
    if os.path.getsize(path) != n_tokens:
        raise BadInput(
            f'{path} holds {os.path.getsize(path):,} bytes, its shard {n_tokens:,} tokens: it is '
            'truncated or belongs to another shard. Prepare the source again.')
    return np.memmap(path, dtype=np.uint8, mode='r')


def sha256_of(path):
    """The sha256 of a file: hex digits. 0.6 s per GB on one core."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


# -- meta.json -------------------------------------------------------------------------------------


def read_meta(folder):
    """Returns the meta.json of a source, None if it has none.

    Raises BadInput if an entry is missing that training needs.
    """
    path = os.path.join(folder, 'meta.json')
    if not os.path.isfile(path):
        return None
    meta = read_json(path)
    try:
        needed = [meta['vocab_size'], meta['tokenizer']['bos_id']]
        names = [meta['tokenizer']['fingerprint']]
        for shard in meta['shards']:
            needed.append(shard['tokens'])
            names += [shard['file'], shard['split'], shard['sha256'], shard.get('mask_sha256', '')]
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f'{path} is not the meta.json of a source ({type(error).__name__}: {error}). Prepare '
            'the source again.') from None
    for value in needed:
        if type(value) is not int or value < 0:
            raise BadInput(f'{path} holds {value!r} in place of a number. Prepare it again.')
    for name in names:
        if not isinstance(name, str):
            raise BadInput(f'{path} holds {name!r} in place of a name. Prepare it again.')
    if meta['tokenizer']['bos_id'] >= meta['vocab_size']:
        raise BadInput(f'{path}: bos_id is not below vocab_size. Prepare the source again.')
    return meta


def check_listing(folder, split, meta, shard_tokens):
    """Raises BadInput unless a split holds exactly the shards and masks that meta.json lists.

    shard_tokens    path -> tokens by its header, for the shards that are there
    """
    listed = {}
    for shard in meta['shards']:
        if shard['split'] == split:
            listed[os.path.join(folder, shard['file'])] = shard
    again = 'Restore it, or prepare the source again.'
    for path, shard in listed.items():
        if path not in shard_tokens:
            raise BadInput(f'{path} is missing, and {folder}/meta.json lists it. {again}')
        if shard_tokens[path] != shard['tokens']:
            raise BadInput(
                f"{path} holds {shard_tokens[path]:,} tokens, and {folder}/meta.json says "
                f"{shard['tokens']:,}: it was exchanged. {again}")
        has_mask = os.path.isfile(mask_path(path))
        if has_mask != ('mask_sha256' in shard):
            fate = 'was added' if has_mask else 'is missing'
            raise BadInput(
                f'the loss mask {mask_path(path)} {fate}, by what {folder}/meta.json lists. '
                f'{again}')
    for path in shard_tokens:
        if path not in listed:
            raise BadInput(
                f'{path} was added: {folder}/meta.json does not list it. Take it out, or prepare '
                'the source again.')


def shard_faults(folder, shards):
    """Yields a sentence for every file whose bytes are not those that meta.json records.

    shards: entries of meta.json
    """
    for shard in shards:
        path = os.path.join(folder, shard['file'])
        expected = {path: shard['sha256']}
        if 'mask_sha256' in shard:
            expected[mask_path(path)] = shard['mask_sha256']
        for file, sha256 in expected.items():
            if not os.path.isfile(file):
                yield f'{file} is missing, and {folder}/meta.json lists it.'
            elif sha256_of(file) != sha256:
                yield f'{file} has other bytes than {folder}/meta.json records.'
