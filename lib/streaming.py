"""The rows of any dataset of the hub, through the package `datasets` in streaming mode.

A Stream is a split of a dataset at a commit. Its files are its Shards, which are read by their
numbers of rows as lib/reading.py reads a File. Local folders that are laid out as a dataset of the
hub work as well. No code of a dataset is run.
"""
import contextlib
import functools
import os
import tempfile
from dataclasses import dataclass, replace

from configurator import BadInput, did_you_mean
from lib import reading

PATHS_AT_ONCE = 500              # files that one request asks the hub about
ROWS = 1000                      # rows that `datasets` gives at once


@dataclass(frozen=True)
class Stream:
    """A split of a dataset at a commit."""
    name: str           # id on the hub, or absolute path of a folder
    commit: str         # '' for a folder
    config: str         # '': the default
    split: str
    columns: tuple      # that every row must have
    reads_all: bool = False     # conversations: other columns may belong to them

    def __str__(self):
        return f"{self.name}, config '{self.config or 'default'}', split '{self.split}'"


@dataclass(frozen=True)
class Shard(reading.File):
    """A file of a Stream."""
    stream: Stream | None = None
    index: int = 0


def said(stream, error):
    """Returns the beginning of an error's message on one line."""
    message = ' '.join(str(error).split())
    if not stream.commit:
        message = message.replace(place_of(stream.name), stream.name)
    return message[:300] or type(error).__name__


@functools.cache
def scratch():
    """A folder for what `datasets` writes to a cache. It is removed at the end of the process."""
    return tempfile.TemporaryDirectory(prefix='datasets_')


@functools.cache
def place_of(folder):
    """Makes a folder with links to the files of a local one. Returns its path.

    `datasets` uses the path in its globs, where a character such as [ has a meaning.
    """
    place = os.path.realpath(tempfile.mkdtemp(dir=scratch().name))
    for where, below, names in os.walk(folder):
        below[:] = [name for name in below if not name.startswith('.')]
        linked = os.path.join(place, os.path.relpath(where, folder))
        os.makedirs(linked, exist_ok=True)
        for name in names:
            os.symlink(os.path.join(where, name), os.path.join(linked, name))
    return place


@contextlib.contextmanager
def reporting(stream, what=''):
    """Turns what `datasets` raises into BadInput and RunFault. what: is read; '': the stream"""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    guard = contextlib.nullcontext()
    if stream.commit:
        guard = reading.reaching(stream.name, or_local='Or give a downloaded copy as --dataset.')
    with guard:
        try:
            yield
        except BadInput:
            raise
        except httpx.HTTPError as error:
            raise ConnectionError(str(error)) from None
        # It is foreign code with errors of many kinds.
        except Exception as error:
            # For a damaged file pyarrow raises an OSError without a number.
            is_pyarrows = type(error) is OSError and error.errno is None
            if isinstance(error, (OSError, HfHubHTTPError)) and not is_pyarrows:
                raise
            raise BadInput(
                f'{what or stream} cannot be read by `datasets`: {said(stream, error)}') from None


def names_of(stream):
    """Returns the names of the configs of a dataset."""
    import datasets

    place = stream.name if stream.commit else place_of(stream.name)
    with reporting(stream):
        return datasets.get_dataset_config_names(
            place, revision=stream.commit or None, cache_dir=scratch().name)


def open_builder(stream):
    """Returns the builder of `datasets` for a Stream. Raises BadInput and RunFault."""
    import datasets
    import huggingface_hub

    # They would break the progress bar, and all errors are reported below.
    datasets.disable_progress_bars()
    for library in (datasets, huggingface_hub):
        library.logging.set_verbosity(library.logging.CRITICAL)
    place = stream.name if stream.commit else place_of(stream.name)
    with reporting(stream):
        try:
            # An empty cache, since `datasets` would take a dataset from it after an error.
            return datasets.load_dataset_builder(
                place, stream.config or None, revision=stream.commit or None,
                cache_dir=scratch().name)
        except datasets.exceptions.DatasetNotFoundError as error:
            raise BadInput(f'{stream.name} cannot be opened: {said(stream, error)}') from None
        except (datasets.exceptions.DatasetsError, datasets.data_files.EmptyDatasetError) as error:
            raise BadInput(
                f'{stream.name} has nothing that `datasets` reads: {said(stream, error)}') from None
        except RuntimeError as error:
            if 'scripts are no longer supported' not in str(error):
                raise
            raise BadInput(
                f'{stream.name} needs a loading script ({str(error).split()[-1]}), and no code of '
                'a dataset is run. The hub keeps many of these as parquet files, too: try '
                '--revision=refs/convert/parquet.') from None
        except ValueError as error:
            is_missing = str(error).startswith('Config name is missing')
            if not is_missing and 'BuilderConfig' not in str(error):
                raise
    names = names_of(stream)
    fault = 'several configs, and --config is missing.'
    if not is_missing:
        fault = f"no config '{stream.config}'.{did_you_mean(stream.config, names)}"
    raise BadInput(f'{stream.name} has {fault} Its configs: {listed(names)}.')


def listed(names):
    names = list(map(str, names))
    more = f' and {len(names) - 40} more' if len(names) > 40 else ''
    return ', '.join(names[:40]) + more


@functools.cache
def open_stream(stream):
    """Returns (datasets.IterableDataset, list of the paths or URLs of its shards) of a Stream.

    Raises BadInput for a split or column that does not exist, and as `open_builder`.
    """
    from datasets.packaged_modules.parquet.parquet import ParquetConfig

    builder = open_builder(stream)
    files = builder.config.data_files or {}
    if stream.split not in files:
        raise BadInput(
            f"{stream.name} has no split '{stream.split}'."
            f'{did_you_mean(stream.split, map(str, files))} Its splits: {listed(files)}.')
    with reporting(stream):
        rows = builder.as_streaming_dataset(split=stream.split)
        if rows.features is not None:
            check_columns(stream, list(rows.features))
        if isinstance(builder.config, ParquetConfig) and not stream.reads_all:
            # Only now the columns are known. The others are not even read.
            builder.config.columns = list(stream.columns)
            rows = builder.as_streaming_dataset(split=stream.split)
    paths = list(files[stream.split])
    if rows.num_shards != len(paths):
        raise BadInput(
            f'{stream} has {rows.num_shards} shards of {len(paths)} files. Datasets that '
            f'`datasets` reads as {type(builder).__name__} are not supported.')
    return rows, paths


def check_columns(stream, there):
    for name in stream.columns:
        if name not in there:
            raise BadInput(
                f"{stream} has no column '{name}'.{did_you_mean(name, there)} Its columns: "
                f'{listed(there)}. Give one with --column.')


def read_shard(shard, columns, skip=0):
    """Yields the Batches of a Shard after its first `skip` rows. See reading.read_batches."""
    stream = shard.stream
    rows, _ = open_stream(stream)
    if rows.features is not None:
        columns = list(columns or rows.features)
    rows = rows.shard(rows.num_shards, shard.index)
    with reporting(stream, shard.path):
        # Mixed types, for example in messages, are kept as JSON, which only `datasets` decodes.
        is_plain = rows.features is not None and 'Json(' not in str(
            [rows.features[name] for name in columns])
        rows = rows.select_columns(columns) if rows.features is not None else rows
        rows = rows.skip(skip)
        if is_plain:
            rows = rows.with_format('arrow')
        for batch in rows.iter(batch_size=ROWS):
            if is_plain:
                for part in batch.combine_chunks().to_batches():
                    yield from reading.slices(shard, part, skip)
                    skip += part.num_rows
                continue
            check_columns(stream, list(batch))
            wanted = columns or list(batch)
            n_rows = len(batch[wanted[0]])
            records = [{name: batch[name][i] for name in wanted} for i in range(n_rows)]
            yield reading.Batch(shard, skip, records)
            skip += n_rows


def find_shards(stream):
    """Returns the Shards of a Stream, with the sizes and contents that the hub knows."""
    from huggingface_hub import HfApi

    _, paths = open_stream(stream)
    found = []
    if not stream.commit:
        for i, path in enumerate(paths):
            name = os.path.relpath(path, place_of(stream.name))
            path = os.path.join(stream.name, name)
            found.append(Shard(path, name, os.path.getsize(path), stream=stream, index=i))
        return found
    root = f'hf://datasets/{stream.name}@{stream.commit}/'
    names = [path.removeprefix(root) for path in paths if path.startswith(root)]
    about = {}
    with reading.reaching(stream.name):
        for start in range(0, len(names), PATHS_AT_ONCE):
            chosen = names[start:start + PATHS_AT_ONCE]
            for info in HfApi().get_paths_info(
                    stream.name, chosen, revision=stream.commit, repo_type='dataset'):
                about[info.path] = info
    for i, path in enumerate(paths):
        shard = Shard(path, path.removeprefix(root), 0, stream=stream, index=i)
        info = about.get(shard.name)
        if info is not None:
            content = info.lfs.sha256 if info.lfs else info.blob_id
            shard = replace(shard, size=info.size, content=content)
        found.append(shard)
    return found


def find_commit(name, revision):
    """Returns (sha of the commit, licence) of a dataset on the hub. revision None: the newest."""
    from huggingface_hub import HfApi

    with reading.reaching(name, or_local='Or give a local folder as --dataset.'):
        api = HfApi()
        info = api.dataset_info(name, revision=revision)
        if getattr(info, 'gated', False):
            api.auth_check(name, repo_type='dataset')
    card = info.card_data or {}
    licence = card.get('license') or 'none named on its card'
    return info.sha, licence if isinstance(licence, str) else ', '.join(licence)
