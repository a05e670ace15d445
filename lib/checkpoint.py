"""Checkpoints by torch.distributed.checkpoint (DCP): weights, optimizer, data position, random
generators and config.

    out/run/ckpt/step_000500/     *.distcp and .metadata (DCP), state.json, rng_<rank>.pt, and
                                  manifest.json (bytes, sha256 and stamp of every file), written
                                  last
    out/run/ckpt/latest           the name of the newest complete checkpoint

A checkpoint is complete when it has a manifest. A run that is killed at any moment therefore leaves
the checkpoint before intact, on a disk and in an object store (lib/storage.py). Tensors are stored
in full, so another number or layout of ranks can read them. On CUDA they are copied to the CPU and
a thread writes them while training continues.

Before a checkpoint is read, its files are compared with the manifest, and the ranks share this
work. A file whose stamp (times of change and inode) is still the one of the manifest was not
touched since, and is not hashed again: this makes the check of a resumed run free. Nothing in a
checkpoint can run code: see `read_metadata`.
"""
import concurrent.futures
import contextlib
import datetime
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import signal
import sys
import time
import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata

from configurator import BadInput, RunFault, at_least, parse_json
from lib import storage
from lib.device import barrier, on_master
from model import ModelConfig
from ops.ranks import full_shape, stored_form

# values of `mixture` whose weights are given beforehand
GIVEN = ('fixed', 'stratified', 'natural', 'unimax', 'schedule')
# knobs that a resumed run cannot change
FIXED = ('seed', 'block_size', 'total_batch_tokens', 'packing', 'overlong', 'optimizer', 'mixture',
         'presence', 'select', 'select_scores', 'select_margin', 'select_keep')


# -- folders of checkpoints ------------------------------------------------------------------------

def _steps(folder):
    """Names of the checkpoints in a ckpt folder, complete or not, oldest first."""
    steps = [name for name in storage.names(folder) if re.fullmatch(r'step_\d+', name)]
    # The names of steps from 1,000,000 on are longer, so their order as strings would be wrong.
    return sorted(steps, key=lambda name: int(name[5:]))


def _is_complete(checkpoint):
    return storage.is_file(os.path.join(checkpoint, 'manifest.json'))


def complete_checkpoints(folder):
    """Names of the complete checkpoints in a ckpt folder, oldest first."""
    return [name for name in _steps(folder) if _is_complete(os.path.join(folder, name))]


def torn_checkpoints(folder):
    """Names of the checkpoints in a ckpt folder that were never finished, oldest first."""
    return [name for name in _steps(folder) if not _is_complete(os.path.join(folder, name))]


def read_manifest(checkpoint):
    """A checkpoint's manifest: dict name -> dict(bytes, sha256, stamp). Raises BadInput if damaged.

    A manifest of an older version holds bytes alone. They are then all that can be compared.
    """
    path = os.path.join(checkpoint, 'manifest.json')
    found = parse_json(storage.read(path), path)
    if not isinstance(found, dict) or not {'.metadata', 'state.json'} <= found.keys():
        raise BadInput(f'{path} does not list the files of a checkpoint.')
    if all(type(entry) is int for entry in found.values()):
        return {name: dict(bytes=entry, sha256=None) for name, entry in found.items()}
    for name, entry in found.items():
        if not isinstance(entry, dict) or type(entry.get('bytes')) is not int:
            raise BadInput(f'{path} does not say how many bytes {name} has.')
        if not isinstance(entry.get('sha256'), str):
            raise BadInput(f'{path} does not say the sha256 of {name}.')
    return found


def sha256_of(path):
    """The sha256 of a file on a disk or in a store: hex digits. 0.6 s per GB on one core."""
    fs, at = storage.system(path)
    with fs.open(at, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


# A file may change again within a tick of the file system's clock, and its stamp stays the same.
SETTLED_NS = 50_000_000


def stamp_of(path):
    """What changes when a local file is touched: [times in ns, inode]. None for one in a store."""
    if storage.is_remote(path):
        return None
    about = os.stat(path)
    return [about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


def is_untouched(path, entry, manifest_ns):
    """Whether a file is as it was when its manifest was written. False: it may have changed."""
    stamp = entry.get('stamp')
    if not isinstance(stamp, list) or stamp != stamp_of(path):
        return False
    return stamp[1] + SETTLED_NS < manifest_ns


def fault_of(checkpoint, rank=0, world_size=1, trusts_stamps=True):
    """What is wrong with a checkpoint folder; '' for an intact one.

    Names and sizes of all files are compared, and the hashes of every world_size-th file. With
    trusts_stamps, those of untouched files are not.
    """
    if not _is_complete(checkpoint):
        return 'it was never finished (no manifest.json)'
    try:
        manifest = read_manifest(checkpoint)
        found = storage.sizes(checkpoint)
        for name, entry in manifest.items():
            if name not in found:
                return f'{name} is missing'
            if found[name] != entry['bytes']:
                return f'{name} has {found[name]:,} bytes, not {entry["bytes"]:,}'
        for name in found:
            if name not in manifest and re.fullmatch(r'__\d+_\d+\.distcp|rng_\d+\.pt', name):
                return f'{name} is not listed in manifest.json'
        written = stamp_of(os.path.join(checkpoint, 'manifest.json'))
        for name in sorted(manifest)[rank::world_size]:
            path = os.path.join(checkpoint, name)
            entry = manifest[name]
            if trusts_stamps and written and is_untouched(path, entry, written[0]):
                continue
            if entry['sha256'] is not None and sha256_of(path) != entry['sha256']:
                return f'{name} has other bytes than were written'
    except BadInput as error:
        return str(error)
    except OSError as error:
        return f'it cannot be read ({error.strerror or error})'
    return ''


@dataclass
class CheckpointConfig:
    """Knobs of checkpoints."""
    keep_last: at_least(0) = 2          # newest checkpoints that are kept. 0: all
    keep_every: at_least(0) = 0         # keep also those whose step is a multiple of it. 0: none
    async_save: bool | None = None      # write checkpoints while training continues. None: on CUDA


def _remove(checkpoint):
    # The manifest goes first. A kill half-way then leaves nothing that looks complete. What a
    # symbolic link points to may belong to another run.
    if not os.path.islink(checkpoint) and _is_complete(checkpoint):
        storage.remove_file(os.path.join(checkpoint, 'manifest.json'))
    storage.remove_folder(checkpoint)


# -- what is saved ---------------------------------------------------------------------------------

def _rank():
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def _no_warning():
    """Silences DCP's warning about every run of a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='torch.distributed is disabled')
        yield


def _tensors(model, optimizers):
    """Everything that DCP stores: 'model.<name>' and 'optim.<name>.<key>' -> tensor."""
    layout = model.layout
    tensors = {}
    names = {}
    for name, parameter in model.named_parameters():
        names[parameter] = name
        tensors[f'model.{name}'] = stored_form(layout, name, parameter.detach())
    # The state dict also has buffers: biases and loads of experts.
    for name, value in model.state_dict().items():
        tensors.setdefault(f'model.{name}', value)
    # The names make the state independent of how an optimizer groups its parameters.
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            name = names[parameter]
            for key, value in state.items():
                tensors[f'optim.{name}.{key}'] = stored_form(layout, name, value)
    return tensors


def rng_state():
    """Every random generator of this process, in types that torch.load(weights_only=True) reads."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return dict(
        torch=torch.get_rng_state(),
        # Reading the state would initialize CUDA in a process that only uses the CPU.
        cuda=torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        python=random.getstate(),
        numpy=(kind, keys.tolist(), position, has_gauss, gauss),
    )


def set_rng_state(state):
    torch.set_rng_state(state['torch'])
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])
    version, internal, gauss = state['python']
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state['numpy']))


@contextlib.contextmanager
def untouched_rng():
    """Restores the random generators at the end, so that foreign code may use them within."""
    before = rng_state()
    yield
    set_rng_state(before)


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE)


class StopRequest:
    """`signal` is one of SIGNALS once it has arrived: save after this step and exit.

    A second signal ends the process at once, unless it arrives within 5 s: that is torchrun's copy.
    SIGPIPE stands for a reader of stdout or stderr that has gone away.
    """

    def __init__(self):
        self.signal = 0
        self.time = 0.0
        for number in SIGNALS:
            # nohup makes a process ignore SIGHUP. Python itself ignores SIGPIPE, and a write to a
            # closed pipe raises BrokenPipeError instead.
            if number != signal.SIGPIPE and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.take)
        sys.stdout = Pipe(sys.stdout, self)
        sys.stderr = Pipe(sys.stderr, self)

    def take(self, number, _frame):
        if not self.signal:
            self.signal = number
            self.time = time.monotonic()
        elif time.monotonic() - self.time > 5:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class Pipe:
    """stdout or stderr of a run. When its reader goes away (`| head`), it asks the run to stop."""

    def __init__(self, stream, stop):
        self.stream = stream
        self.stop = stop

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self.lose()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.lose()

    def lose(self):
        """Sends the rest of the output nowhere."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        self.stop.take(signal.SIGPIPE, None)


def entries_of(folder):
    """The manifest's entries of the files that this rank has written into a checkpoint."""
    entries = {}
    for name, size in storage.sizes(folder).items():
        # DCP's files are __<rank>_<number>.distcp. Rank 0 wrote those without a rank.
        of_rank = re.match(r'(?:__|rng_)(\d+)[_.]', name)
        if int(of_rank[1] if of_rank else 0) == _rank():
            path = os.path.join(folder, name)
            entries[name] = dict(bytes=size, sha256=sha256_of(path), stamp=stamp_of(path))
    return entries


class Checkpointer:
    """Saves into out_dir/ckpt. Every rank makes one and calls every method.

    It keeps the newest `keep_last` checkpoints (0: all), and those whose step is a multiple of
    `keep_every` (0: no others). With `asynchronous` a thread writes them.
    """

    def __init__(self, out_dir, keep_last, asynchronous, keep_every=0):
        self.out_dir = out_dir
        self.folder = os.path.join(out_dir, 'ckpt')
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.asynchronous = asynchronous
        self.pending = None          # (future, folder, step) of a save that a thread is writing
        self.while_pending = contextlib.ExitStack()
        self.thread = concurrent.futures.ThreadPoolExecutor(1, 'manifest')
        self.group = None
        if asynchronous and dist.is_initialized():
            # The thread's collectives need their own group: in a shared one they would be mixed
            # with those of training.
            self.group = dist.new_group(backend='gloo', timeout=datetime.timedelta(days=1))
        on_master(self.clean)

    def clean(self):
        """Removes what a killed run has left half-written."""
        if storage.is_file(self.folder):
            raise BadInput(f'{self.folder} is a file. It must be a folder for checkpoints.')
        for name in torn_checkpoints(self.folder):
            storage.remove_folder(os.path.join(self.folder, name))

    def save(self, step, model, optimizers, state):
        """Saves the run as it is before `step` is trained. Returns the seconds that this took.

        state: dict for state.json, the same on every rank. Raises RunFault when a file cannot be
        written (full disk). The previous checkpoint stays intact.
        """
        start = time.perf_counter()
        # Only one save is in flight, because it holds a copy of all tensors in the CPU's memory.
        self.finish()
        folder = os.path.join(self.folder, f'step_{step:06d}')
        try:
            if _rank() == 0:
                # A run that was resumed from an older checkpoint saves this step again.
                if storage.is_folder(folder) or os.path.islink(folder):
                    _remove(folder)
                storage.make_folder(folder)
            barrier()
            # The generators differ between ranks, so every rank writes a file of its own.
            rng = io.BytesIO()
            torch.save(rng_state(), rng)
            storage.write(os.path.join(folder, f'rng_{_rank()}.pt'), rng.getvalue())
            if _rank() == 0:
                content = json.dumps({'step': step, **state}).encode()
                storage.write(os.path.join(folder, 'state.json'), content)
            tensors = _tensors(model, optimizers)
            if self.asynchronous:
                # DCP warns from its thread, so the warning is silenced until `finish`.
                self.while_pending.enter_context(_no_warning())
                written = dcp.async_save(tensors, checkpoint_id=folder, process_group=self.group)

                def hash_when_written():
                    written.result()
                    return entries_of(folder)

                self.pending = self.thread.submit(hash_when_written), folder, step
            else:
                with _no_warning():
                    dcp.save(tensors, checkpoint_id=folder)
                self._publish(folder, step, entries_of(folder))
        except (OSError, CheckpointException) as error:
            self._fail(folder, step, error)
        return time.perf_counter() - start

    def finish(self):
        """Waits for a save in the background and completes it."""
        if self.pending is None:
            return
        future, folder, step = self.pending
        self.pending = None
        try:
            with self.while_pending:
                entries = future.result()
            self._publish(folder, step, entries)
        except (OSError, CheckpointException) as error:
            self._fail(folder, step, error)

    def last_good(self):
        """Path of the newest complete checkpoint, or 'none'. Waits for a save in the background."""
        self.finish()
        good = complete_checkpoints(self.folder)
        return os.path.join(self.folder, good[-1]) if good else 'none'

    def poll(self):
        """Completes a pending save if all ranks have written their parts. It does not wait.

        Call it at every step while `pending` is not None, on all ranks.
        """
        if self.pending is not None:
            # Ranks end their writing at different times. All must publish at the same step, because
            # `_publish` waits for all ranks.
            done = torch.tensor(int(self.pending[0].done()))
            if dist.is_initialized():
                dist.all_reduce(done, op=dist.ReduceOp.MIN)
            if done.item():
                self.finish()

    def _publish(self, folder, step, entries):
        # The manifest lists every file, so all ranks must have written theirs.
        parts = [entries]
        if dist.is_initialized():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, entries)
        if _rank() == 0:
            manifest = {name: entry for part in parts for name, entry in part.items()}
            content = json.dumps(manifest, indent=1, sort_keys=True).encode()
            storage.write(os.path.join(folder, 'manifest.json'), content)
            storage.write(os.path.join(self.folder, 'latest'), os.path.basename(folder).encode())
            storage.upload(self.out_dir)
            if self.keep_last:
                # Later checkpoints are left from before a resume at an older one. They must not
                # push out the checkpoint that was just written.
                done = [n for n in complete_checkpoints(self.folder) if int(n[5:]) <= step]
                for name in done[:-self.keep_last]:
                    if not self.keep_every or int(name[5:]) % self.keep_every:
                        _remove(os.path.join(self.folder, name))
        barrier()

    def _fail(self, folder, step, error):
        if _rank() == 0:
            # On a full disk this frees what the torn files take.
            storage.remove_folder(folder)
        good = complete_checkpoints(self.folder)
        last = f'{self.folder}/{good[-1]} is the last good one' if good else 'no earlier one exists'
        reason = str(error).strip().splitlines()[-1]
        raise RunFault(
            f'the checkpoint of step {step} could not be written to {self.folder} ({reason}): '
            f'{last}. Free some space, or make the folder writable, and continue with '
            '--resume=True.'
        ) from error


# -- where a run begins ----------------------------------------------------------------------------

def is_of(out_dir, config):
    """Whether out_dir holds no run or one with this config, which a launcher then restarts."""
    path = os.path.join(out_dir, 'config.json')
    if not storage.is_file(path):
        return True
    # `resume` may differ, since a restart sets it. JSON makes lists of tuples, as in the file.
    saved = parse_json(storage.read(path), path)
    wanted = {**json.loads(json.dumps(config)), 'resume': None}
    return isinstance(saved, dict) and {**saved, 'resume': None} == wanted


def holds_run(out_dir):
    """What of a run is in out_dir, as text; '' if nothing is, or only a run that never began."""
    folder = os.path.join(out_dir, 'ckpt')
    found = [f'ckpt/{name}' for name in complete_checkpoints(folder)]
    sizes = storage.sizes(out_dir)
    if sizes.get('metrics.jsonl'):
        found.append('metrics.jsonl')
    # A run would overwrite the config.json of a Hugging Face model.
    found += [name for name in sizes if name.startswith('model.safetensors')]
    return ', '.join(found)


def find_checkpoint(path, may_be_missing=False):
    """The checkpoint folder to read, given a run folder or a checkpoint folder.

    In a run folder it is the checkpoint named in `latest`, or the newest intact one where that is
    damaged. Skipped checkpoints are reported. Returns None when a run has no checkpoint. Raises
    BadInput when the path does not exist (unless may_be_missing), and when the given checkpoint or
    all of a run are damaged. All ranks call this and get the same.
    """
    candidates = on_master(lambda: _candidates(path, may_be_missing))
    faults = []
    for checkpoint in candidates:
        fault = _shared_fault_of(checkpoint)
        if not fault:
            return checkpoint
        if checkpoint == path.rstrip('/'):
            others = ', '.join(complete_checkpoints(os.path.dirname(checkpoint))) or 'none'
            raise BadInput(f'checkpoint {path} is damaged: {fault}. Others here: {others}.')
        is_torn = not _is_complete(checkpoint)
        if _rank() == 0:
            how = 'was never finished' if is_torn else f'is damaged ({fault})'
            print(f'checkpoint: {checkpoint} {how} and is skipped')
        if not is_torn:
            faults.append(f'{os.path.basename(checkpoint)}: {fault}')
    if faults:
        raise BadInput(
            f'every checkpoint in {path} is damaged: {"; ".join(faults)}. Use another out_dir.')
    return None


def _candidates(path, may_be_missing):
    """The checkpoint folders to look at in turn."""
    if not storage.is_folder(path):
        if may_be_missing:
            return []
        raise BadInput(f"'{path}' is no folder. Give a run's out_dir or a ckpt/step_* in it.")
    folder = os.path.join(path, 'ckpt')
    path = path.rstrip('/')
    if not storage.is_folder(folder) and os.path.basename(path).startswith('step_'):
        return [path]
    names = _steps(folder)[::-1]
    latest = os.path.join(folder, 'latest')
    if storage.is_file(latest):
        named = storage.read(latest).decode(errors='replace').strip()
        names.sort(key=lambda name: name != named)      # the others keep their order
    return [os.path.join(folder, name) for name in names]


def _shared_fault_of(checkpoint):
    """As `fault_of`, with the hashes shared among the ranks. The same on every rank."""
    if not dist.is_initialized():
        return fault_of(checkpoint)
    faults = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault_of(checkpoint, _rank(), dist.get_world_size()))
    return next((fault for fault in faults if fault), '')


def find_beginning(out_dir, resume, continue_from):
    """The checkpoint that a run begins with, or None: its own if it resumes, or continue_from's."""
    found = find_checkpoint(out_dir, may_be_missing=True) if resume else None
    if found is None and continue_from is not None:
        found = find_checkpoint(continue_from)
        if found is None:
            raise BadInput(f"continue_from = '{continue_from}' has no complete checkpoint yet.")
    return found


def read_state(checkpoint):
    """A checkpoint's state.json, a dict: step, model, config, loader and so on.

    Raises BadInput if an entry is missing or not understood.
    """
    path = os.path.join(checkpoint, 'state.json')
    state = parse_json(storage.read(path), path)
    again = 'It was changed, or written by another version.'
    step = state.get('step') if isinstance(state, dict) else None
    if type(step) is not int or step < 0:
        raise BadInput(f'{path} does not say which step it is of. {again}')
    named = re.fullmatch(r'step_(\d+)', os.path.basename(checkpoint.rstrip('/')))
    if named and int(named[1]) != step:
        raise BadInput(
            f'{path} is of step {step}, by its folder of step {int(named[1])}: the folder was '
            'renamed, or the file belongs to another checkpoint. Put it back.')
    if not isinstance(state.get('config', ''), dict | None):
        raise BadInput(f'{path} has no config. {again}')
    try:
        ModelConfig(**state['model'])
    except (KeyError, TypeError) as error:
        raise BadInput(f'{path} does not describe a model ({error}). {again}') from None
    return state


@contextlib.contextmanager
def understanding(checkpoint):
    """Turns what a state.json of another structure causes into BadInput."""
    try:
        yield
    except BadInput:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(
            f'{checkpoint}/state.json is not understood ({type(error).__name__}: {error}). It was '
            'changed, or written by another version.') from error


def is_same(a, b):
    """Whether two values of a model config are equal, floats within rounding to fp32."""
    # Weights that went through a GGUF have an epsilon of 9.999999747378752e-06 for 1e-5.
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    return a == b


def differences(saved, wanted):
    """What differs between two model configs (dicts): list of phrases."""
    found = []
    for key, value in wanted.items():
        if not is_same(saved.get(key), value):
            found.append(f'{key} {saved.get(key)!r} there, {value!r} here')
    return found


def check_same_model(checkpoint, saved, wanted):
    """Raises BadInput, with all differences, if two model configs (dicts) differ."""
    found = differences(saved, wanted)
    if found:
        raise BadInput(f'checkpoint {checkpoint} holds another model: {"; ".join(found)}.')


def check_resumable(checkpoint, saved, config, saved_model, model, end_step):
    """Raises BadInput if the run in a checkpoint cannot continue as asked.

    saved: its state.json; config: train.py's knobs; saved_model, model: model configs as dicts.
    """
    if saved['config'] is None:
        raise BadInput(
            f"'{config['out_dir']}' is an imported model and no run to resume. Train it with "
            f'--init_from={config["out_dir"]} and another --out_dir.'
        )
    check_same_model(checkpoint, saved_model, model)
    for name in FIXED:
        # Weights that are given beforehand may follow any method: they count from here on.
        if name == 'mixture' and config[name] in GIVEN:
            continue
        before = saved['config'].get(name, config[name])    # an older version may lack a knob
        if before != config[name]:
            raise BadInput(
                f'{name} was {before!r} in {checkpoint} and is {config[name]!r} now. A resumed run '
                'cannot change it. Put it back, or start a new run with init_from.'
            )
    if saved['step'] > end_step:
        raise BadInput(
            f'{checkpoint} is at step {saved["step"]}, beyond the {end_step} steps asked for. '
            'Nothing is left to train. Raise max_steps (or max_tokens, epochs, stop_step).'
        )


# -- reading ---------------------------------------------------------------------------------------

def _empty_state(stored, name, parameter, layout, group):
    """Tensors for the optimizer's state of a parameter. stored: DCP's metadata, key -> about it."""
    state = {}
    for key, about in stored.items():
        if not key.startswith(f'optim.{name}.'):
            continue
        dtype = about.properties.dtype
        if tuple(about.size) == tuple(full_shape(layout, name, parameter)):
            tensor = torch.zeros_like(parameter.detach(), dtype=dtype)
        else:
            # a count of steps, which fused optimizers keep on the device
            device = parameter.device if group.get('fused') else 'cpu'
            tensor = torch.zeros(about.size, dtype=dtype, device=device)
        state[key.removeprefix(f'optim.{name}.')] = tensor
    return state


# Whatever torch's own metadata is made of, besides dtypes.
METADATA_CLASSES = {
    ('torch.distributed.checkpoint.metadata', name) for name in (
        'ChunkStorageMetadata', 'Metadata', 'MetadataIndex', 'StorageMeta', 'TensorProperties',
        'TensorStorageMetadata', '_MEM_FORMAT_ENCODING')} | {
    ('torch.distributed.checkpoint.filesystem', '_StorageInfo'),
    ('torch.serialization', '_get_layout'), ('torch', 'Size'), ('pathlib', 'PosixPath')}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        is_dtype = module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in METADATA_CLASSES:
            raise pickle.UnpicklingError(f'it names {module}.{name}')
        return super().find_class(module, name)


def read_metadata(checkpoint):
    """DCP's metadata of a checkpoint, without running code that the file may hold.

    torch reads the file with pickle.load, which calls whatever it names. Here it may name only the
    classes of METADATA_CLASSES. It may describe nothing but tensors, because torch would unpickle
    other entries freely, too. Raises BadInput for anything else.
    """
    path = os.path.join(checkpoint, '.metadata')
    try:
        found = _MetadataUnpickler(io.BytesIO(storage.read(path))).load()
        entries = list(found.state_dict_metadata.values())
        files = list(found.storage_data.values())
        is_safe = all(isinstance(entry, TensorStorageMetadata) for entry in entries)
        # A file outside the folder, or a transform of the bytes, is nothing that `save` writes.
        is_safe = is_safe and all(
            os.path.basename(info.relative_path) == info.relative_path
            and not info.transform_descriptors for info in files)
    except Exception as error:          # a damaged pickle may raise anything
        raise BadInput(
            f'{path} is not what torch writes ({error}), and it is not opened: it may be damaged, '
            'or hold code of a stranger.') from None
    if not is_safe:
        raise BadInput(f'{path} describes other things than tensors, and it is not opened.')
    return found


def _reader(checkpoint):
    """DCP's reader of a folder on a disk or in a store, with our `read_metadata`."""
    kind = FsspecReader if storage.is_remote(checkpoint) else dcp.FileSystemReader
    reader = kind(checkpoint)

    def read(*_args, **_options):
        found = read_metadata(checkpoint)
        found.storage_meta = StorageMeta(load_id=reader.load_id)
        return found

    reader.read_metadata = read
    return reader


def load_weights(checkpoint, model, optimizers=()):
    """Reads weights, and the state that the optimizers have, in place, for any number of ranks."""
    tensors = _tensors(model, optimizers)
    # torch checks neither, and would fail deep inside.
    stored = read_metadata(checkpoint).state_dict_metadata
    for name, tensor in tensors.items():
        if name not in stored or tuple(stored[name].size) != tuple(tensor.shape):
            there = tuple(stored[name].size) if name in stored else 'nothing'
            raise BadInput(
                f'checkpoint {checkpoint} holds {there} for {name}, and the model needs '
                f'{tuple(tensor.shape)}. It belongs to another model.')
    try:
        with _no_warning():
            dcp.load(tensors, storage_reader=_reader(checkpoint))
    except (CheckpointException, EOFError, pickle.UnpicklingError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(
            f'the weights in {checkpoint} cannot be read ({reason[-1]}): a file is damaged. '
            'Restore it, or use another checkpoint.') from None


def load(checkpoint, model, optimizers):
    """Reads weights, optimizer state and this rank's random generators in place.

    Returns a note for the user, or ''. Raises BadInput when the run had another optimizer.
    """
    stored = read_metadata(checkpoint).state_dict_metadata
    names = {parameter: name for name, parameter in model.named_parameters()}
    # An optimizer has no state before its first step, so the tensors to read into are made here.
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group['params']:
                state = _empty_state(stored, names[parameter], parameter, model.layout, group)
                if not state:
                    raise BadInput(
                        f'checkpoint {checkpoint} has no optimizer state for {names[parameter]}. '
                        'Resume with the optimizer that it was written with.'
                    )
                optimizer.state[parameter] = state
    load_weights(checkpoint, model, optimizers)
    # Every step of the run is one of each optimizer.
    step = read_state(checkpoint)['step']
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            if 'step' in state and int(state['step']) != step:
                raise BadInput(
                    f"{checkpoint}/state.json is of step {step}, and the weights of step "
                    f"{int(state['step'])} ({names[parameter]}): its files are of different "
                    'checkpoints. Restore them, or use another checkpoint.')
    rng = os.path.join(checkpoint, f'rng_{_rank()}.pt')
    if not storage.is_file(rng):
        return f'rank {_rank()} is new since the checkpoint: its random generators start afresh'
    try:
        set_rng_state(torch.load(io.BytesIO(storage.read(rng)), weights_only=True))
    except Exception as error:          # a damaged pickle may raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(
            f'{rng} does not hold the random generators of a run ({reason[0][:200]}). Restore it, '
            'or use another checkpoint.') from None
    return ''
