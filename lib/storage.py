"""Files of a run, in a local folder or in an object store.

fsspec reaches a store by its URL (gs://, s3://). The store's driver, gcsfs or s3fs, must be
installed. A store can neither append nor rename, so nothing here needs that. Files that a run
appends to (metrics.jsonl), or that others open by name (the tokenizer), are in a local folder
(`local_folder`). They are copied to the store with every checkpoint.
"""
import hashlib
import os

import fsspec

from configurator import BadInput

MIRRORS = os.path.join('out', 'remote')         # local folders of runs whose out_dir is in a store


def is_remote(path):
    return '://' in path


def system(path):
    """(fsspec file system, path in it). Raises BadInput when its driver is missing."""
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise BadInput(f"'{path}' cannot be reached: {error}.") from None


def is_folder(path):
    fs, at = system(path)
    return fs.isdir(at)


def is_file(path):
    fs, at = system(path)
    return fs.isfile(at)


def listing(folder, detail):
    """fsspec's listing of a folder, paths or (detail) dicts; [] if the folder does not exist."""
    fs, at = system(folder)
    fs.invalidate_cache()               # drivers of stores keep old listings
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
    with fs.open(at, 'rb') as f:
        return f.read()


def write(path, content):
    """Writes a file of these bytes, all or nothing: on a local disk it is synced and renamed."""
    if is_remote(path):
        fs, at = system(path)
        # A store shows an object only once it is complete, so there is nothing to rename.
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
    fs.makedirs(at, exist_ok=True)


def remove_file(path):
    fs, at = system(path)
    fs.rm_file(at)


def remove_folder(path):
    fs, at = system(path)
    # Removing the last object of a store's folder removes the folder, and rm would then fail.
    if fs.exists(at):
        fs.rm(at, recursive=True)


def local_folder(out_dir):
    """Where a run's small files are: out_dir, or out/remote/<its name and a hash> for a store."""
    if not is_remote(out_dir):
        return out_dir
    # Two runs of the same name in different buckets must not share a folder.
    digest = hashlib.sha256(out_dir.encode()).hexdigest()[:8]
    return os.path.join(MIRRORS, f'{os.path.basename(out_dir.rstrip("/"))}-{digest}')


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
            write(os.path.join(out_dir, name), read(os.path.join(folder, name)))
