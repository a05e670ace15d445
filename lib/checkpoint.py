"""Checkpoints: weights, optimizer, data position, random generators and config, by torch.distributed.checkpoint (DCP).

    out/run/ckpt/step_000500/     *.distcp and .metadata (DCP: reshards to any number of ranks), state.json, rng_<rank>.pt,
                                  manifest.json (every file and its size, written last)
    out/run/ckpt/latest           the name of the newest complete one

A checkpoint counts from the moment that its manifest is there, so a kill at any moment leaves the one before it good, on a disk as in an object store
(lib/storage.py). It holds whole tensors, whatever the layout of the ranks that wrote it, and is read into any other. On CUDA the
tensors are copied to the CPU and written by a thread while training goes on.
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

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.api import CheckpointException

from configurator import BadInput, RunFault
from lib import storage
from lib.device import barrier
from ops.ranks import full_shape, stored_form

warnings.filterwarnings('ignore', message='torch.distributed is disabled')      # DCP's remark on every run of one process

# knobs that a run keeps to its end
FIXED = ('seed', 'block_size', 'total_batch_tokens', 'packing', 'overlong', 'optimizer', 'mixture', 'presence', 'select', 'select_scores',
         'select_margin', 'select_keep')


def _remove(folder):
    """Deletes a checkpoint, its manifest first, so that a kill half-way leaves nothing that looks complete."""
    manifest = os.path.join(folder, 'manifest.json')
    if storage.is_file(manifest):
        storage.remove_file(manifest)
    storage.remove_folder(folder)


def _rank():
    return dist.get_rank() if dist.is_initialized() else 0


def _tensors(model, optimizers):
    """Flat dict of everything that DCP stores: 'model.<name>' and 'optim.<name>.<key>'."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f'model.{name}': stored_form(model.layout, name, parameter.detach()) for parameter, name in names.items()}
    tensors |= {f'model.{name}': value for name, value in model.state_dict().items() if name not in names.values()}        # biases and loads of experts
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            tensors |= {f'optim.{names[parameter]}.{key}': stored_form(model.layout, names[parameter], value) for key, value in state.items()}
    return tensors


def rng_state():
    """Every random generator of this process, in types that torch.load(weights_only=True) reads."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return dict(torch=torch.get_rng_state(), cuda=torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
                python=random.getstate(), numpy=(kind, keys.tolist(), position, has_gauss, gauss))


def set_rng_state(state):
    torch.set_rng_state(state['torch'])
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])
    version, internal, gauss = state['python']
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state['numpy']))


@contextlib.contextmanager
def untouched_rng():
    """Within it other people's code may use the random generators; they are left as they were."""
    before = rng_state()
    yield
    set_rng_state(before)


class StopRequest:
    """`signal` becomes SIGTERM or SIGINT when one comes: save after this step and exit. One more, later than torchrun's copy of the first, ends at once."""

    def __init__(self):
        self.signal, self.time = 0, 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.take)

    def take(self, number, _frame):
        if not self.signal:
            self.signal, self.time = number, time.monotonic()
        elif time.monotonic() - self.time > 5:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class Checkpointer:
    """Saves into out_dir/ckpt and keeps the newest `keep_last` (0: all) and every one whose step is a multiple of keep_every (0: no others).

    Every rank makes one and calls every method.
    """

    def __init__(self, out_dir, keep_last, asynchronous, keep_every=0):
        self.out_dir, self.folder = out_dir, os.path.join(out_dir, 'ckpt')
        self.keep_last, self.keep_every, self.asynchronous = keep_last, keep_every, asynchronous
        self.pending = None          # (future, folder, step) of a save that a thread is writing
        # the thread's collectives need a group of their own: on a shared one they would meet training's out of order
        self.group = dist.new_group(backend='gloo', timeout=datetime.timedelta(days=1)) if asynchronous and dist.is_initialized() else None
        if _rank() == 0:
            for name in torn_checkpoints(self.folder):              # what a killed run left
                storage.remove_folder(os.path.join(self.folder, name))
        barrier()

    def save(self, step, model, optimizers, state):
        """Saves the run as it stands before `step` is trained. state: JSON-able dict, the same on every rank. Returns seconds that training waited.

        Raises RunFault when it cannot be written (full disk); the checkpoint before stays good.
        """
        start = time.perf_counter()
        self.finish()
        folder = os.path.join(self.folder, f'step_{step:06d}')
        try:
            if _rank() == 0:
                if storage.is_folder(folder):                       # saved before, by a run that was since resumed from an older one
                    _remove(folder)
                storage.make_folder(folder)
            barrier()
            rng = io.BytesIO()
            torch.save(rng_state(), rng)
            storage.write(os.path.join(folder, f'rng_{_rank()}.pt'), rng.getvalue())
            if _rank() == 0:
                storage.write(os.path.join(folder, 'state.json'), json.dumps({'step': step, **state}).encode())
            tensors = _tensors(model, optimizers)
            if self.asynchronous:
                self.pending = dcp.async_save(tensors, checkpoint_id=folder, process_group=self.group), folder, step
            else:
                dcp.save(tensors, checkpoint_id=folder, no_dist=not dist.is_initialized())
                self._publish(folder, step)
        except (OSError, CheckpointException) as error:
            self._fail(folder, step, error)
        return time.perf_counter() - start

    def finish(self):
        """Waits for a save in the background and completes it."""
        if self.pending is not None:
            future, folder, step = self.pending
            self.pending = None
            try:
                future.result()
                self._publish(folder, step)
            except (OSError, CheckpointException) as error:
                self._fail(folder, step, error)

    def poll(self):
        """Completes a background save once every rank has written its part; call it every step, it does not wait."""
        if self.pending is not None:
            done = torch.tensor(int(self.pending[0].done()))
            if dist.is_initialized():
                dist.all_reduce(done, op=dist.ReduceOp.MIN)
            if done.item():
                self.finish()

    def _publish(self, folder, step):
        """Rank 0: manifest, `latest`, small files of a run in a store, and the oldest out."""
        barrier()
        if _rank() == 0:
            storage.write(os.path.join(folder, 'manifest.json'), json.dumps(storage.sizes(folder), indent=1).encode())
            storage.write(os.path.join(self.folder, 'latest'), os.path.basename(folder).encode())
            storage.upload(self.out_dir)
            older = [name for name in complete_checkpoints(self.folder) if int(name[5:]) <= step]
            for name in older[:-self.keep_last] if self.keep_last else []:
                if not self.keep_every or int(name[5:]) % self.keep_every:
                    _remove(os.path.join(self.folder, name))
        barrier()

    def _fail(self, folder, step, error):
        if _rank() == 0:
            storage.remove_folder(folder)
        good = complete_checkpoints(self.folder)
        where = f'{self.folder}/{good[-1]} is the last good one' if good else 'there is no earlier one'
        reason = str(error).strip().splitlines()[-1]
        raise RunFault(f'the checkpoint of step {step} could not be written to {self.folder} ({reason}); {where}. '
                       'Free some space and go on with --resume=True.') from error


def _steps(folder):
    """Names of checkpoints in a ckpt folder, complete or not, oldest first."""
    return sorted((name for name in storage.names(folder) if re.fullmatch(r'step_\d+', name)), key=lambda name: int(name[5:]))


def complete_checkpoints(folder):
    """Names of the finished checkpoints in a ckpt folder, oldest first."""
    return [name for name in _steps(folder) if storage.is_file(os.path.join(folder, name, 'manifest.json'))]


def torn_checkpoints(folder):
    """Names of those that were never finished."""
    return [name for name in _steps(folder) if not storage.is_file(os.path.join(folder, name, 'manifest.json'))]


def fault_of(checkpoint):
    """What is wrong with a checkpoint folder, '' when nothing is."""
    manifest = os.path.join(checkpoint, 'manifest.json')
    if not storage.is_file(manifest):
        return 'it was never finished (no manifest.json)'
    found = storage.sizes(checkpoint)
    for name, size in json.loads(storage.read(manifest)).items():
        if name not in found:
            return f'{name} is missing'
        if found[name] != size:
            return f'{name} has {found[name]:,} bytes, not {size:,}'
    return ''


def is_of(out_dir, config):
    """Whether the run in out_dir, if there is one, has this config: then a launcher's second start is the same run's."""
    path = os.path.join(out_dir, 'config.json')
    if not storage.is_file(path):
        return True
    return {**json.loads(storage.read(path)), 'resume': None} == {**json.loads(json.dumps(config)), 'resume': None}


def find_checkpoint(path, may_be_missing=False):
    """The checkpoint folder that a run folder or a checkpoint folder means; None when a run has none. Of a run it is the one named in `latest`, or,
    where that is damaged (which is said), the newest good one.

    Rank 0 looks, and tells the others. BadInput when the path does not exist (but for may_be_missing), a checkpoint that was named itself is damaged, or
    all of a run are.
    """
    if not dist.is_initialized():
        return _find(path, may_be_missing)
    box = [None]
    if _rank() == 0:
        try:
            box = [_find(path, may_be_missing)]
        except BadInput as error:
            box = [error]
    dist.broadcast_object_list(box, 0)
    if isinstance(box[0], BadInput):
        raise box[0]
    return box[0]


def _find(path, may_be_missing):
    if not storage.is_folder(path):
        if may_be_missing:
            return None
        raise BadInput(f"'{path}' is no folder; give a run's out_dir or one of its ckpt/step_* folders.")
    folder = os.path.join(path, 'ckpt')
    if not storage.is_folder(folder) and os.path.basename(os.path.normpath(path)).startswith('step_'):
        if fault := fault_of(path):
            raise BadInput(f'checkpoint {path} is damaged: {fault}. Others here: {", ".join(complete_checkpoints(os.path.dirname(os.path.normpath(path)))) or "none"}.')
        return path
    candidates = _steps(folder)[::-1]
    latest = os.path.join(folder, 'latest')
    if storage.is_file(latest) and (named := storage.read(latest).decode().strip()) in candidates:
        candidates = [named] + [name for name in candidates if name != named]
    torn, damaged = torn_checkpoints(folder), []
    for name in candidates:
        if name in torn:
            print(f'checkpoint: {folder}/{name} was never finished, and is passed over')
        elif fault := fault_of(os.path.join(folder, name)):
            damaged.append(f'{name}: {fault}')
            print(f'checkpoint: {folder}/{name} is damaged ({fault}), and is passed over')
        else:
            return os.path.join(folder, name)
    if damaged:
        raise BadInput(f'every checkpoint in {folder} is damaged: {"; ".join(damaged)}. Put one back, or start anew in another out_dir.')
    return None


def find_beginning(out_dir, resume, continue_from):
    """The checkpoint that train.py's run begins with: its own to go on with, else that of continue_from, else None. BadInput when that one has none."""
    own = find_checkpoint(out_dir, may_be_missing=True) if resume else None
    if own is not None or continue_from is None:
        return own
    found = find_checkpoint(continue_from)
    if found is None:
        raise BadInput(f"continue_from = '{continue_from}' has no complete checkpoint to begin with. Let that run come to its end first.")
    return found


def read_state(checkpoint):
    """The state.json of a checkpoint: step, model, config, loader and whatever else was saved."""
    return json.loads(storage.read(os.path.join(checkpoint, 'state.json')))


def check_same_model(checkpoint, saved, wanted):
    """BadInput that lists every field in which the saved model config (dict) differs from the wanted one."""
    differing = [f'{key} {saved.get(key)!r} there, {wanted[key]!r} here' for key in wanted if saved.get(key) != wanted[key]]
    if differing:
        raise BadInput(f'checkpoint {checkpoint} holds another model: {"; ".join(differing)}.')


def check_resumable(checkpoint, saved, config, saved_model, model, end_step):
    """BadInput when the run in a checkpoint (saved: its state.json) cannot go on with this config, model (dicts) and last step."""
    if saved['config'] is None:
        raise BadInput(f"'{config['out_dir']}' is an imported model, no run that could go on. Train it with --init_from={config['out_dir']} and "
                       'another --out_dir.')
    check_same_model(checkpoint, saved_model, model)
    for name in FIXED:
        if name == 'mixture' and config[name] == 'fixed':      # whatever it was: from here the weights are those of `sources`
            continue
        if name in saved['config'] and saved['config'][name] != config[name]:            # an older version may not have had this knob
            raise BadInput(f"{name} was {saved['config'][name]!r} in {checkpoint}, it is {config[name]!r} now; a resumed run cannot "
                           'change it. Put it back, or start a new run with init_from.')
    if saved['step'] > end_step:
        raise BadInput(f"{checkpoint} is at step {saved['step']}, beyond the {end_step} steps asked for: nothing is left to train. Raise "
                       'max_steps (or max_tokens, epochs, stop_step).')


def load_weights(checkpoint, model):
    """Model weights only (init_from), into the model in place, whatever the number of ranks."""
    dcp.load(_tensors(model, []), checkpoint_id=checkpoint, no_dist=not dist.is_initialized())


def load(checkpoint, model, optimizers):
    """Weights, optimizer state and this rank's random generators, in place. Returns a note for the user, '' when all is as it was."""
    stored = (FsspecReader if storage.is_remote(checkpoint) else dcp.FileSystemReader)(checkpoint).read_metadata().state_dict_metadata
    tensors = _tensors(model, [])
    names = {parameter: name for name, parameter in model.named_parameters()}
    states = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group['params']:
                prefix = f'optim.{names[parameter]}.'
                states[optimizer, parameter] = {
                    key.removeprefix(prefix): torch.zeros_like(parameter.detach(), dtype=stored[key].properties.dtype)
                    if tuple(stored[key].size) == tuple(full_shape(model.layout, names[parameter], parameter))
                    else torch.zeros(stored[key].size, dtype=stored[key].properties.dtype,
                                     device=parameter.device if group.get('fused') else 'cpu')
                    for key in stored if key.startswith(prefix)}
                if not states[optimizer, parameter]:
                    raise BadInput(f'checkpoint {checkpoint} has no optimizer state for {names[parameter]}: it was written with '
                                   'another optimizer. Resume with that one, or start a new run with init_from.')
                tensors |= {prefix + key: stored_form(model.layout, names[parameter], value) for key, value in states[optimizer, parameter].items()}
    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=not dist.is_initialized())
    for (optimizer, parameter), state in states.items():
        optimizer.state[parameter] = state
    rng = os.path.join(checkpoint, f'rng_{_rank()}.pt')
    if not storage.is_file(rng):
        return f'rank {_rank()} was not there when the checkpoint was written; its random generators start anew'
    set_rng_state(torch.load(io.BytesIO(storage.read(rng)), weights_only=True))
    return ''
