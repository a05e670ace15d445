"""Files of a run, in a local folder or in an object store.

fsspec reaches a store by its URL (gs://, s3://). The store's driver, gcsfs or s3fs, must be
installed. A store can neither append nor rename, so nothing here needs that. Files that a run
appends to (metrics.jsonl), or that others open by name (the tokenizer), are in a local folder
(`local_folder`). They are copied to the store with every checkpoint.
"""
import contextlib
import errno
import fcntl
import hashlib
import os
import re
import time

import fsspec

from configurator import BadInput

MIRRORS = os.path.join('out', 'remote')         # local folders of runs whose out_dir is in a store


def is_remote(path):
    return '://' in path


def system(path):
    """(fsspec file system, path in it). Raises BadInput when its driver is missing."""
    if path.startswith('~'):            # fsspec expands it, and the other functions do not
        raise BadInput(f"'{path}' begins with ~, which only a shell expands. Write it in full.")
    if re.match(r'[a-z0-9]+:/[^/]|://', path):
        raise BadInput(f"'{path}' is no address of a store, which begins like gs://bucket.")
    try:
        return fsspec.core.url_to_fs(path)
    except Exception as error:          # a driver's code, which may raise anything
        raise BadInput(
            f"'{path}' cannot be reached: {type(error).__name__}: {first_line(error)}.") from None


def first_line(error):
    return str(error).strip().partition('\n')[0]


@contextlib.contextmanager
def reaching(path):
    """Turns what the driver of a store raises into an OSError that names the path."""
    try:
        yield
    except (BadInput, FileNotFoundError):
        raise
    except Exception as error:          # a driver's code, which may raise anything
        if not is_remote(path):
            raise
        reason = f'{type(error).__name__}: {first_line(error)}'
        raise OSError(errno.EIO, reason, path) from None


def is_folder(path):
    fs, at = system(path)
    with reaching(path):
        return fs.isdir(at)


def is_file(path):
    fs, at = system(path)
    with reaching(path):
        return fs.isfile(at)


def listing(folder, detail):
    """fsspec's listing of a folder, paths or (detail) dicts; [] if the folder does not exist."""
    fs, at = system(folder)
    with reaching(folder):
        fs.invalidate_cache()           # drivers of stores keep old listings
        return fs.ls(at, detail=detail) if fs.isdir(at) else []


def names(folder):
    """Names of everything in a folder, sorted; [] if it does not exist."""
    # Without detail: asking for a file's size fails if the file is removed meanwhile.
    return sorted(os.path.basename(path.rstrip('/')) for path in listing(folder, False))


def sizes(folder):
    """Name -> bytes of the files in a folder."""
    files = [entry for entry in listing(folder, True) if entry['type'] == 'file']
    return {os.path.basename(entry['name']): entry['size'] for entry in files}


def read(path):
    fs, at = system(path)
    with reaching(path), fs.open(at, 'rb') as f:
        return f.read()


def write(path, content):
    """Writes a file of these bytes, all or nothing: on a local disk it is synced and renamed."""
    if is_remote(path):
        fs, at = system(path)
        # A store shows an object only once it is complete, so there is nothing to rename.
        with reaching(path):
            fs.pipe_file(at, content)
        return
    with open(path + '.tmp', 'wb') as f:
        f.write(content)
        f.flush()
        # Without the sync, a crash after the rename could leave an empty file.
        os.fsync(f.fileno())
    os.replace(path + '.tmp', path)


def make_folder(path):
    fs, at = system(path)
    with reaching(path):
        fs.makedirs(at, exist_ok=True)


def remove_file(path):
    fs, at = system(path)
    with reaching(path):
        fs.rm_file(at)


def remove_folder(path):
    """Removes a folder with its content. Of a symbolic link only the link is removed."""
    if os.path.islink(path):
        os.unlink(path)
        return
    fs, at = system(path)
    with reaching(path):
        # Removing the last object of a store's folder removes the folder, and rm would then fail.
        if fs.exists(at):
            fs.rm(at, recursive=True)


def check_writable(folder):
    """Raises BadInput when a store cannot be written to. It writes and removes a small file."""
    if not is_remote(folder):
        return
    if folder.startswith('memory://'):
        print(f"warning: '{folder}' is lost when this process ends.")
    path = os.path.join(folder, 'writable')
    try:
        was_there = is_folder(folder)
        make_folder(folder)
        write(path, b'')
        remove_file(path)
        if not was_there:
            remove_folder(folder)
    except OSError as error:
        raise BadInput(
            f"'{folder}' cannot be written to ({error.strerror or error}). Look at the address, "
            'the network and the credentials, or give another folder.') from None


def local_folder(out_dir):
    """Where a run's small files are: out_dir, or out/remote/<its name and a hash> for a store."""
    if not is_remote(out_dir):
        return out_dir
    # Two runs of the same name in different buckets must not share a folder.
    digest = hashlib.sha256(out_dir.encode()).hexdigest()[:8]
    return os.path.join(MIRRORS, f'{os.path.basename(out_dir.rstrip("/"))}-{digest}')


def lock(path, wait_s=0.0):
    """Takes the lock that the local file `path` stands for. Returns the file.

    wait_s  seconds to wait for another process that holds it. math.inf: for ever
    The lock ends when the file is closed or the process ends, however it ends. It is flock's: it
    also holds between the machines of an NFS mount (Linux 2.6.12 and later, not with the mount
    options nolock or local_lock), where the server frees the lock of a machine that died after its
    lease, by default 90 s. The file stays, because a lock on a removed file excludes nobody.
    Raises BadInput when another process holds it.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    handle = open(path, 'a', encoding='utf-8')      # 'w' would empty the target of a link
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            handle.close()
            raise BadInput(
                f'another process is writing to {os.path.dirname(path) or "."}. Wait for it, stop '
                'it, or write to another folder.') from None
    return handle


HELD = {}       # folder -> the lock that this process holds on it


def lock_folder(folder, wait_s, must_exist=False):
    """Makes this process the only one that writes into a local folder, which is made if need be.

    must_exist: does nothing if there is no such folder. The lock ends with the process, or with
    `unlock_folder`. Raises BadInput when another process holds it (see `lock`).
    """
    if must_exist and not os.path.isdir(folder):
        return
    # A second run in one process takes over the lock of the first.
    unlock_folder(folder)
    HELD[folder] = lock(os.path.join(folder, '.lock'), wait_s)


def unlock_folder(folder):
    if folder in HELD:
        HELD.pop(folder).close()


def download(out_dir, folder=None):
    """Copies a run's small files from a store into a folder, and returns the folder.

    folder: None for `local_folder`, where the training run has them. A local run's files stay where
    they are: the result is then out_dir.
    """
    if not is_remote(out_dir):
        return out_dir
    folder = folder or local_folder(out_dir)
    os.makedirs(folder, exist_ok=True)
    # Only the files directly in out_dir. Checkpoints are large and are read where they are.
    for name in sizes(out_dir):
        write(os.path.join(folder, name), read(os.path.join(out_dir, name)))
    return folder


def upload(out_dir):
    """Copies a run's small files to its store. It does nothing for a local run."""
    if is_remote(out_dir):
        folder = local_folder(out_dir)
        for name in sizes(folder):
            if name == '.lock':
                continue
            write(os.path.join(out_dir, name), read(os.path.join(folder, name)))
