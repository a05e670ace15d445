"""Results on disk that many processes write in numbered parts: caches of a teacher (kd.py) and
scores of rows (methods/selection.py).

    part_000000.kd, part_000000.npy     what the part holds, in files of any endings
    part_000000.json                    bytes and sha256 of these files, written last

A part is complete when its .json is there and the sizes agree, so a killed writer continues at the
first incomplete part. Ranks of one launch write different parts. Each holds the lock of its rank,
so that a second launch of the same command ends with a sentence. Temporary names carry the rank,
because a launch with another number of ranks divides the parts in another way.
"""
import hashlib
import json
import math
import os
import re

import numpy as np

from configurator import BadInput, RunFault, read_json
from data import SAMPLE_BYTES
from lib import storage
from lib.shards import sha256_of


def stem_of(folder, part):
    """The path of a part's files without their endings."""
    return os.path.join(folder, f'part_{part:06d}')


def check_name(name, knob):
    """Raises BadInput unless a knob's value can be the name of a folder."""
    if not name or name != os.path.basename(name) or name in ('.', '..'):
        raise BadInput(f"{knob} = '{name}' must be the name of a folder, without a /.")


def check_fields(found, types, path, hint):
    """Checks the content of a JSON file that a person may have edited.

    types: name -> type or union of types that the field must have. hint: what to do about it.
    Raises BadInput when it is no dict, or when a field is missing, of another type or not finite.
    """
    if not isinstance(found, dict):
        raise BadInput(f'{path} holds a {type(found).__name__}, not named fields. {hint}')
    for name, kind in types.items():
        if name not in found:
            raise BadInput(f"{path} has no field '{name}'. {hint}")
        value = found[name]
        is_wrong = not isinstance(value, kind) or isinstance(value, bool) and kind is not bool
        if is_wrong or isinstance(value, float) and not math.isfinite(value):
            wanted = getattr(kind, '__name__', kind)
            raise BadInput(f'{path}: {name} = {value!r} must be {wanted} and finite. {hint}')


# -- writing ---------------------------------------------------------------------------------------


def lock(folder, rank):
    """Takes the lock of a rank in a folder: a file, to be closed at the end.

    Raises BadInput while another launch's process of this rank holds it.
    """
    handle = storage.lock(os.path.join(folder, f'.lock_{rank}'))
    # A process of this rank may have been killed while it wrote a part.
    for name in os.listdir(folder):
        if name.endswith(f'.{rank}.tmp'):
            os.remove(os.path.join(folder, name))
    return handle


def write(path, pieces, rank):
    """Writes a file from pieces of bytes, all or nothing. Returns dict(bytes, sha256) of it.

    Raises RunFault when the disk does not take it.
    """
    digest = hashlib.sha256()
    size = 0
    temporary = f'{path}.{rank}.tmp'
    try:
        with open(temporary, 'wb') as f:
            for piece in pieces:
                f.write(piece)
                digest.update(piece)
                size += len(piece)
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        if error.filename is not None:          # another file, which the error names
            raise
        raise RunFault(
            f'{path} could not be written ({error.strerror}); the parts before it are complete. '
            'Free some space and run again.') from error
    os.replace(temporary, path)
    return dict(bytes=size, sha256=digest.hexdigest())


def write_json(path, content, rank):
    """Writes a JSON file, all or nothing."""
    write(path, [json.dumps(content, indent=1).encode()], rank)


def forget(stem):
    """Makes a part incomplete, before its files are written anew."""
    if os.path.exists(stem + '.json'):
        os.remove(stem + '.json')


# -- checking --------------------------------------------------------------------------------------


def describe(path):
    """dict(bytes, sha256) of a file, as `write` returns it."""
    return dict(bytes=os.path.getsize(path), sha256=sha256_of(path))


def fault_of(stem, endings, with_hashes=False):
    """What is wrong with the files of a part, as half a sentence. '' for a complete part.

    with_hashes: reads the files and compares their sha256, besides the sizes
    """
    for ending in endings:
        if not os.path.isfile(stem + ending):
            return f'{stem + ending} is missing'
    path = stem + '.json'
    if not os.path.isfile(path):
        return f'{path} is missing, which is written when the part is complete'
    try:
        recorded = read_json(path)
        check_fields(recorded, dict.fromkeys(endings, dict), path, '')
        for ending in endings:
            check_fields(recorded[ending], dict(bytes=int, sha256=str), path, '')
    except BadInput as error:
        return str(error).strip().rstrip('.')
    for ending in endings:
        wanted = recorded[ending]
        size = os.path.getsize(stem + ending)
        if size != wanted['bytes']:
            return f"{stem + ending} has {size:,} bytes, not {wanted['bytes']:,}"
        if with_hashes and sha256_of(stem + ending) != wanted['sha256']:
            return f'the sha256 of {stem + ending} is not the one that {path} records'
    return ''


def sample_fault(stems, endings, seed):
    """As `fault_of`, with the hashes of a sample: parts in a random order until SAMPLE_BYTES."""
    left = SAMPLE_BYTES
    for i in np.random.default_rng(seed).permutation(len(stems)):
        if left <= 0:
            break
        if fault := fault_of(stems[i], endings, with_hashes=True):
            return fault
        left -= sum(os.path.getsize(stems[i] + ending) for ending in endings)
    return ''


def numbers_in(folder, ending):
    """The numbers of the parts of which a folder holds a file with this ending, in order."""
    found = [re.fullmatch(rf'part_(\d+){re.escape(ending)}', name) for name in os.listdir(folder)]
    return sorted(int(match[1]) for match in found if match)


def read_array(path, dtype, shape, hint):
    """Reads a .npy file, which must have this dtype and shape and be finite.

    dtype None: any numbers. Pickled objects are never loaded.
    Raises BadInput with `hint`, which says what to do.
    """
    with open(path, 'rb') as f:
        try:
            array = np.lib.format.read_array(f, allow_pickle=False)
        except OSError:
            raise
        except Exception as error:          # numpy's parser, on a damaged header
            first_line = str(error).partition('\n')[0][:200]
            raise BadInput(
                f'{path} is no intact .npy file of numbers ({first_line}). {hint}') from None
        is_too_long = f.read(1) != b''
    is_wanted = array.dtype.kind in 'fiu' if dtype is None else array.dtype == dtype
    if not is_wanted or array.shape != shape or is_too_long:
        wanted = 'numbers' if dtype is None else np.dtype(dtype)
        more = ' and more' if is_too_long else ''
        raise BadInput(
            f'{path} holds {array.dtype} of shape {array.shape}{more}, not {wanted} of shape '
            f'{shape}. {hint}')
    if not np.isfinite(array).all():
        raise BadInput(f'{path} holds numbers that are not finite. {hint}')
    return array
