"""A run's files, in a folder or in an object store (gs://, s3://, whatever fsspec knows; its driver, gcsfs or s3fs, has to be installed).

A store has neither append nor rename: nothing here needs them. What a run appends to (metrics.jsonl) or others read by name (the tokenizer) lives
in a local folder, `local_folder`, and is copied to the store with every checkpoint.
"""
import hashlib
import os

import fsspec

from configurator import BadInput

MIRRORS = os.path.join('out', 'remote')         # local folders of runs whose out_dir is in a store


def is_remote(path):
    return '://' in path


def system(path):
    """(fsspec file system, path within it). BadInput when its driver is missing."""
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


def names(folder):
    """Names in a folder, sorted; none when it is not there."""
    fs, at = system(folder)
    fs.invalidate_cache()               # stores remember listings
    return sorted(os.path.basename(p.rstrip('/')) for p in fs.ls(at, detail=False)) if fs.isdir(at) else []


def sizes(folder):
    """Name -> bytes of the files in a folder."""
    fs, at = system(folder)
    fs.invalidate_cache()
    return {os.path.basename(f['name']): f['size'] for f in fs.ls(at, detail=True) if f['type'] == 'file'} if fs.isdir(at) else {}


def read(path):
    fs, at = system(path)
    with fs.open(at, 'rb') as f:
        return f.read()


def write(path, content):
    """A file of these bytes, all of it or none: on a local disk it is synced and renamed."""
    if is_remote(path):
        fs, at = system(path)
        fs.pipe_file(at, content)
        return
    with open(path + '.tmp', 'wb') as f:
        f.write(content)
        f.flush()
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
    if fs.exists(at):
        fs.rm(at, recursive=True)


def local_folder(out_dir):
    """Where the run's small files live: out_dir itself, or out/remote/<its name and a hash>."""
    if not is_remote(out_dir):
        return out_dir
    return os.path.join(MIRRORS, f'{os.path.basename(out_dir.rstrip("/"))}-{hashlib.sha256(out_dir.encode()).hexdigest()[:8]}')


def download(out_dir, folder=None):
    """Brings the small files of a run in a store here, to a folder (None: `local_folder`, which is the training run's own). Returns it; of a run on a disk,
    its folder as it is."""
    folder = folder if folder and is_remote(out_dir) else local_folder(out_dir)
    if is_remote(out_dir):
        os.makedirs(folder, exist_ok=True)
        for name in sizes(out_dir):
            write(os.path.join(folder, name), read(os.path.join(out_dir, name)))
    return folder


def upload(out_dir):
    """And back."""
    if is_remote(out_dir):
        folder = local_folder(out_dir)
        for name in os.listdir(folder):
            if os.path.isfile(os.path.join(folder, name)):
                with open(os.path.join(folder, name), 'rb') as f:
                    write(os.path.join(out_dir, name), f.read())
