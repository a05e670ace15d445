"""Input files are known by their content, so an edited file is never taken for the old one.

A local file is known by its sha256. Hashing reads every byte, so the hashes are kept in the user's
cache folder: $XDG_CACHE_HOME/cheapertraining/inputs or else ~/.cache/cheapertraining/inputs. There
is one JSON file for every list of input files. A hash counts as long as the size, the times of the
last change and the inode of its file are the same. The cache is not beside the sources, because
these depend on content and settings alone. When it cannot be written, every start hashes the input.
"""
import concurrent.futures
import contextlib
import hashlib
import json
import math
import os
import time
from dataclasses import dataclass, replace

from tqdm import tqdm

from configurator import BadInput
from lib import storage
from lib.shards import sha256_of

SETTLED_S = 2.0         # a younger file may change again without another time: clocks have ticks
SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class Known:
    """What is known of a local file."""
    stamp: tuple        # of the moment when it was hashed
    sha256: str


def stamp_of(path):
    """Returns (size, time of the last change of content, of content or state in ns, inode)."""
    about = os.stat(path)
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino


def hash_file(path):
    """Returns the Known of a file. Raises BadInput if the file changes meanwhile."""
    stamp = stamp_of(path)
    digest = sha256_of(path)        # releases Python's lock, so that several threads hash at once
    if stamp_of(path) != stamp:
        raise BadInput(f'{path} changes while it is read. Wait until it is complete.')
    return Known(stamp, digest)


def cache_path(paths):
    """The file of the cache for a list of paths. None: the user has no folder for it."""
    folder = os.environ.get('XDG_CACHE_HOME', '')
    if not os.path.isabs(folder):
        folder = os.path.join(os.path.expanduser('~'), '.cache')
    if not os.path.isabs(folder):
        return None
    name = hashlib.sha256('\n'.join(paths).encode(errors='surrogateescape')).hexdigest()[:16]
    return os.path.join(folder, 'cheapertraining', 'inputs', f'{name}.json')


def lock_cache(path):
    """Waits for the lock of a file of the cache and takes it."""
    # Lock files stay. Lists with the same two digits share one, so that there are few.
    folder, name = os.path.split(path)
    return storage.lock(os.path.join(folder, f'{name[:2]}.lock'), math.inf)


def read_cache(path):
    """Returns {path: Known} of a file of the cache: {} if there is none, or if it is damaged."""
    try:
        with open(path, encoding='utf-8') as f:
            entries = json.load(f)
        return {path: Known(tuple(stamp), sha256) for path, stamp, sha256 in entries}
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def write_cache(path, known):
    """Keeps the hashes of the files that have been left alone for SETTLED_S."""
    limit = time.time_ns() - int(1e9 * SETTLED_S)
    entries = [[p, k.stamp, k.sha256] for p, k in known.items() if max(k.stamp[1:3]) < limit]
    if not entries:
        return
    try:
        storage.write(path, json.dumps(entries).encode())
    except OSError as error:
        print_no_cache(path, error)


def print_no_cache(path, error):
    print(
        f'the hashes of the input files cannot be kept in {os.path.dirname(path)} '
        f'({error.strerror}). Every start reads the input once more.')


def hash_files(paths, known, save):
    """Hashes files with several threads. The results go into `known` {path: Known}.

    save: is called now and then, because a killed process must not begin again with terabytes
    """
    n_bytes = sum(map(os.path.getsize, paths))
    threads = min(16, len(os.sched_getaffinity(0)))
    last = time.monotonic()
    with (
            tqdm(total=n_bytes, unit='B', unit_scale=True, desc='hashing the input',
                 disable=n_bytes < 2**30) as bar,
            concurrent.futures.ThreadPoolExecutor(threads) as pool):
        try:
            futures = {pool.submit(hash_file, path): path for path in paths}
            for future in concurrent.futures.as_completed(futures):
                known[futures[future]] = future.result()
                bar.update(known[futures[future]].stamp[0])
                if time.monotonic() - last > SAVE_EVERY_S:
                    save()
                    last = time.monotonic()
        finally:
            pool.shutdown(cancel_futures=True)


def know(paths):
    """Returns {path: Known} for local files, from the cache or by hashing them.

    Of several processes with the same files one hashes. The others wait for it.
    """
    absolute = sorted({os.path.abspath(path) for path in paths})
    cache = cache_path(absolute)
    known = {}
    with contextlib.ExitStack() as held:
        if cache is not None:
            try:
                held.enter_context(lock_cache(cache))
                entries = read_cache(cache)
            except OSError as error:
                print_no_cache(cache, error)
                cache = None
            else:
                for path in absolute:
                    if path in entries and entries[path].stamp == stamp_of(path):
                        known[path] = entries[path]
        n_found = len(known)

        def save():
            if cache is not None and len(known) > n_found:
                write_cache(cache, known)

        hash_files([path for path in absolute if path not in known], known, save)
        save()
    return {path: known[os.path.abspath(path)] for path in paths}


def with_content(files):
    """Returns (Files with their content, {path: Known} of the local ones). files: list of File."""
    known = know([file.path for file in files if '://' not in file.path])
    found = []
    for file in files:
        if file.path in known:
            about = known[file.path]
            file = replace(file, size=about.stamp[0], content=about.sha256)
        found.append(file)
    return found, known


def fingerprint(files):
    """Returns a sha256 over names, sizes and content of the Files, wherever they lie."""
    listing = json.dumps([[file.name, file.size, file.content] for file in files])
    return hashlib.sha256(listing.encode()).hexdigest()


def check_unchanged(known):
    """Raises BadInput if a file has another content than in `known` {path: Known}."""
    for path, before in known.items():
        # Another time alone, after `touch`, is no other content.
        if stamp_of(path) != before.stamp and hash_file(path).sha256 != before.sha256:
            raise BadInput(
                f'{path} was changed while it was read. Delete the half-done source and run again.')
