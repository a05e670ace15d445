"""Checkpoints by torch.distributed.checkpoint (DCP): weights, optimizer, data position, random
generators and config.

    out/run/ckpt/step_000500/     *.distcp and .metadata (DCP), state.json, rng_<rank>.pt, and
                                  manifest.json (every file and its size), which is written last
    out/run/ckpt/latest           the name of the newest complete checkpoint

A checkpoint is complete when it has a manifest. A run that is killed at any moment therefore leaves
the checkpoint before intact, on a disk and in an object store (lib/storage.py). Tensors are stored
in full, so another number or layout of ranks can read them. On CUDA they are copied to the CPU and
a thread writes them while training continues.
"""
import contextlib
import datetime
import io
import json
import os
import random
import re
import signal
import time
import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.api import CheckpointException

from configurator import BadInput, RunFault, at_least
from lib import storage
from lib.device import barrier
from ops.ranks import full_shape, stored_form

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


def fault_of(checkpoint):
    """What is wrong with a checkpoint folder; '' for an intact one."""
    if not _is_complete(checkpoint):
        return 'it was never finished (no manifest.json)'
    found = storage.sizes(checkpoint)
    manifest = storage.read(os.path.join(checkpoint, 'manifest.json'))
    for name, size in json.loads(manifest).items():
        if name not in found:
            return f'{name} is missing'
        if found[name] != size:
            return f'{name} has {found[name]:,} bytes, not {size:,}'
    return ''


@dataclass
class CheckpointConfig:
    """Knobs of checkpoints."""
    keep_last: at_least(0) = 2          # newest checkpoints that are kept. 0: all
    keep_every: at_least(0) = 0         # keep also those whose step is a multiple of it. 0: none
    async_save: bool | None = None      # write checkpoints while training continues. None: on CUDA


def _remove(checkpoint):
    # The manifest goes first. A kill half-way then leaves nothing that looks complete.
    if _is_complete(checkpoint):
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


class StopRequest:
    """`signal` is SIGTERM or SIGINT once one has arrived: save after this step and exit.

    A second signal ends the process at once, unless it arrives within 5 s: that is torchrun's copy.
    """

    def __init__(self):
        self.signal = 0
        self.time = 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.take)

    def take(self, number, _frame):
        if not self.signal:
            self.signal = number
            self.time = time.monotonic()
        elif time.monotonic() - self.time > 5:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


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
        self.group = None
        if asynchronous and dist.is_initialized():
            # The thread's collectives need their own group: in a shared one they would be mixed
            # with those of training.
            self.group = dist.new_group(backend='gloo', timeout=datetime.timedelta(days=1))
        if _rank() == 0:
            for name in torn_checkpoints(self.folder):              # left by a killed run
                storage.remove_folder(os.path.join(self.folder, name))
        barrier()

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
                if storage.is_folder(folder):
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
                future = dcp.async_save(tensors, checkpoint_id=folder, process_group=self.group)
                self.pending = future, folder, step
            else:
                with _no_warning():
                    dcp.save(tensors, checkpoint_id=folder)
                self._publish(folder, step)
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
                future.result()
            self._publish(folder, step)
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

    def _publish(self, folder, step):
        # The manifest lists every file, so all ranks must have written theirs.
        barrier()
        if _rank() == 0:
            manifest = json.dumps(storage.sizes(folder), indent=1).encode()
            storage.write(os.path.join(folder, 'manifest.json'), manifest)
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
            f'{last}. Free some space and continue with --resume=True.'
        ) from error


# -- where a run begins ----------------------------------------------------------------------------

def is_of(out_dir, config):
    """Whether out_dir holds no run or one with this config, which a launcher then restarts."""
    path = os.path.join(out_dir, 'config.json')
    if not storage.is_file(path):
        return True
    # `resume` may differ, since a restart sets it. JSON makes lists of tuples, as in the file.
    saved = {**json.loads(storage.read(path)), 'resume': None}
    return saved == {**json.loads(json.dumps(config)), 'resume': None}


def find_checkpoint(path, may_be_missing=False):
    """The checkpoint folder to read, given a run folder or a checkpoint folder.

    In a run folder it is the checkpoint named in `latest`, or the newest intact one where that is
    damaged. Skipped checkpoints are reported. Returns None when a run has no checkpoint. Raises
    BadInput when the path does not exist (unless may_be_missing), and when the given checkpoint or
    all of a run are damaged. Rank 0 looks, and all ranks return the same.
    """
    found = None
    if _rank() == 0:
        try:
            found = _find(path, may_be_missing)
        except BadInput as error:
            found = error
    if dist.is_initialized():
        # An error is sent, too. If rank 0 raised it here, the others would wait forever.
        box = [found]
        dist.broadcast_object_list(box, 0)
        found = box[0]
    if isinstance(found, BadInput):
        raise found
    return found


def _find(path, may_be_missing):
    if not storage.is_folder(path):
        if may_be_missing:
            return None
        raise BadInput(f"'{path}' is no folder. Give a run's out_dir or a ckpt/step_* in it.")
    folder = os.path.join(path, 'ckpt')
    parent, name = os.path.split(path.rstrip('/'))
    if not storage.is_folder(folder) and name.startswith('step_'):
        if fault := fault_of(path):
            others = ', '.join(complete_checkpoints(parent)) or 'none'
            raise BadInput(f'checkpoint {path} is damaged: {fault}. Others here: {others}.')
        return path
    candidates = _steps(folder)[::-1]
    latest = os.path.join(folder, 'latest')
    if storage.is_file(latest):
        named = storage.read(latest).decode().strip()
        candidates.sort(key=lambda name: name != named)     # the others keep their order
    faults = []
    for name in candidates:
        checkpoint = os.path.join(folder, name)
        fault = fault_of(checkpoint)
        if not fault:
            return checkpoint
        if _is_complete(checkpoint):
            faults.append(f'{name}: {fault}')
            print(f'checkpoint: {folder}/{name} is damaged ({fault}) and is skipped')
        else:
            print(f'checkpoint: {folder}/{name} was never finished and is skipped')
    if faults:
        faults = '; '.join(faults)
        raise BadInput(f'every checkpoint in {folder} is damaged: {faults}. Use another out_dir.')
    return None


def find_beginning(out_dir, resume, continue_from):
    """The checkpoint that a run begins with, or None: its own if it resumes, or continue_from's."""
    found = find_checkpoint(out_dir, may_be_missing=True) if resume else None
    if found is None and continue_from is not None:
        found = find_checkpoint(continue_from)
        if found is None:
            raise BadInput(f"continue_from = '{continue_from}' has no complete checkpoint yet.")
    return found


def read_state(checkpoint):
    """A checkpoint's state.json, a dict: step, model, config, loader and so on."""
    return json.loads(storage.read(os.path.join(checkpoint, 'state.json')))


def check_same_model(checkpoint, saved, wanted):
    """Raises BadInput, with all differences, if two model configs (dicts) differ."""
    differing = []
    for key, value in wanted.items():
        if saved.get(key) != value:
            differing.append(f'{key} {saved.get(key)!r} there, {value!r} here')
    if differing:
        raise BadInput(f'checkpoint {checkpoint} holds another model: {"; ".join(differing)}.')


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
        # `fixed` may follow any method: from here on the weights are those of `sources`.
        if name == 'mixture' and config[name] == 'fixed':
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


def load_weights(checkpoint, model, optimizers=()):
    """Reads weights, and the state that the optimizers have, in place, for any number of ranks."""
    with _no_warning():
        dcp.load(_tensors(model, optimizers), checkpoint_id=checkpoint)


def load(checkpoint, model, optimizers):
    """Reads weights, optimizer state and this rank's random generators in place.

    Returns a note for the user, or ''. Raises BadInput when the run had another optimizer.
    """
    reader = FsspecReader if storage.is_remote(checkpoint) else dcp.FileSystemReader
    stored = reader(checkpoint).read_metadata().state_dict_metadata
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
    rng = os.path.join(checkpoint, f'rng_{_rank()}.pt')
    if not storage.is_file(rng):
        return f'rank {_rank()} is new since the checkpoint: its random generators start afresh'
    set_rng_state(torch.load(io.BytesIO(storage.read(rng)), weights_only=True))
    return ''
