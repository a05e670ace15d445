"""Checkpoints: weights, optimizer, data position, random generators and config, by torch.distributed.checkpoint (DCP).

    out/run/ckpt/step_000500/     *.distcp and .metadata (DCP: reshards to any number of ranks), state.json, rng_<rank>.pt,
                                  manifest.json (every file and its size, written last)
    out/run/ckpt/latest           the name of the newest complete one

A checkpoint is written under a temporary name and renamed when it is whole, so a kill at any moment leaves the one before
it good. On CUDA the tensors are copied to the CPU and written by a thread while training goes on.
"""
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import time
import warnings

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from common import barrier
from configurator import BadInput, RunFault
from ranks import stored_form, whole_shape

warnings.filterwarnings('ignore', message='torch.distributed is disabled')      # DCP's remark on every run of one process

# knobs that a run keeps to its end
FIXED = ('seed', 'block_size', 'total_batch_tokens', 'packing', 'overlong', 'optimizer', 'mixture', 'presence', 'select', 'select_scores',
         'select_margin', 'select_keep')


def _remove(folder):
    """Deletes a checkpoint; renamed first, so that a kill half-way leaves nothing that looks complete."""
    os.replace(folder, folder + '.old.tmp')
    shutil.rmtree(folder + '.old.tmp')


def _rank():
    return dist.get_rank() if dist.is_initialized() else 0


def _tensors(model, optimizers):
    """Flat dict of everything that DCP stores: 'model.<name>' and 'optim.<name>.<key>'."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f'model.{name}': stored_form(model.layout, name, parameter.detach()) for parameter, name in names.items()}
    tensors |= {f'model.{name}': value for name, value in model.state_dict().items() if name not in names.values()}        # biases of experts
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
    """Saves into out_dir/ckpt and keeps the newest `keep_last` (0: all). Every rank makes one and calls every method."""

    def __init__(self, out_dir, keep_last, asynchronous):
        self.folder = os.path.join(out_dir, 'ckpt')
        self.keep_last, self.asynchronous = keep_last, asynchronous
        self.pending = None          # (future, temporary folder, step) of a save that a thread is writing
        # the thread's collectives need a group of their own: on a shared one they would meet training's out of order
        self.group = dist.new_group(backend='gloo') if asynchronous and dist.is_initialized() else None
        if _rank() == 0 and os.path.isdir(self.folder):
            for name in os.listdir(self.folder):
                if name.endswith('.tmp'):           # a killed run's half-written checkpoint
                    path = os.path.join(self.folder, name)
                    shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
        barrier()

    def save(self, step, model, optimizers, state):
        """Saves the run as it stands before `step` is trained. state: JSON-able dict, the same on every rank.

        Raises RunFault when it cannot be written (full disk); the checkpoint before stays good.
        """
        self.finish()
        temporary = os.path.join(self.folder, f'step_{step:06d}.tmp')
        try:
            if _rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                os.makedirs(temporary)
            barrier()
            rng = io.BytesIO()               # torch.save into a file turns a full disk into another kind of error
            torch.save(rng_state(), rng)
            with open(os.path.join(temporary, f'rng_{_rank()}.pt'), 'wb') as f:
                f.write(rng.getvalue())
            if _rank() == 0:
                with open(os.path.join(temporary, 'state.json'), 'w', encoding='utf-8') as f:
                    json.dump({'step': step, **state}, f)
            tensors = _tensors(model, optimizers)
            if self.asynchronous:
                self.pending = dcp.async_save(tensors, checkpoint_id=temporary, process_group=self.group), temporary, step
            else:
                dcp.save(tensors, checkpoint_id=temporary, no_dist=not dist.is_initialized())
                self._publish(temporary, step)
        except (OSError, CheckpointException) as error:
            self._fail(temporary, step, error)

    def finish(self):
        """Waits for a save in the background and puts it in its place."""
        if self.pending is not None:
            future, temporary, step = self.pending
            self.pending = None
            try:
                future.result()
                self._publish(temporary, step)
            except (OSError, CheckpointException) as error:
                self._fail(temporary, step, error)

    def poll(self):
        """Puts a background save in its place once every rank has written it; call it every step, it does not wait."""
        if self.pending is not None:
            done = torch.tensor(int(self.pending[0].done()))
            if dist.is_initialized():
                dist.all_reduce(done, op=dist.ReduceOp.MIN)
            if done.item():
                self.finish()

    def _publish(self, temporary, step):
        """Rank 0: manifest, rename, `latest`, and the oldest out. A rename is atomic, so is each of these steps."""
        barrier()
        if _rank() == 0:
            files = {name: os.path.getsize(os.path.join(temporary, name)) for name in sorted(os.listdir(temporary))}
            with open(os.path.join(temporary, 'manifest.json'), 'w', encoding='utf-8') as f:
                json.dump(files, f, indent=1)
                f.flush()
                os.fsync(f.fileno())
            final = temporary.removesuffix('.tmp')
            if os.path.isdir(final):                 # saved before, by a run that was since resumed from an older one
                _remove(final)
            os.replace(temporary, final)
            latest = os.path.join(self.folder, 'latest')
            with open(latest + '.tmp', 'w', encoding='utf-8') as f:
                f.write(os.path.basename(final))
                f.flush()
                os.fsync(f.fileno())
            os.replace(latest + '.tmp', latest)
            older = [name for name in complete_checkpoints(self.folder) if int(name[5:]) <= step]
            for name in older[:-self.keep_last] if self.keep_last else []:
                _remove(os.path.join(self.folder, name))
        barrier()

    def _fail(self, temporary, step, error):
        shutil.rmtree(temporary, ignore_errors=True)
        good = complete_checkpoints(self.folder)
        where = f'{self.folder}/{good[-1]} is the last good one' if good else 'there is no earlier one'
        reason = str(error).strip().splitlines()[-1]
        raise RunFault(f'the checkpoint of step {step} could not be written to {self.folder} ({reason}); {where}. '
                       'Free some space and go on with --resume=True.') from error


def complete_checkpoints(folder):
    """Names of the finished checkpoints in a ckpt folder, oldest first."""
    if not os.path.isdir(folder):
        return []
    return sorted((name for name in os.listdir(folder) if re.fullmatch(r'step_\d+', name)), key=lambda name: int(name[5:]))


def find_checkpoint(path):
    """The checkpoint folder that a run folder (its latest) or a checkpoint folder means, verified; None when a run has none.

    Raises BadInput when the path does not exist or a file of the checkpoint is missing or has another size.
    """
    if not os.path.isdir(path):
        raise BadInput(f"'{path}' is no folder; give a run's out_dir or one of its ckpt/step_* folders.")
    folder, chosen = os.path.join(path, 'ckpt'), path
    if os.path.isdir(folder) or not os.path.basename(os.path.normpath(path)).startswith('step_'):
        names = complete_checkpoints(folder)
        if not names:
            return None
        latest = os.path.join(folder, 'latest')
        if os.path.isfile(latest):
            with open(latest, encoding='utf-8') as f:
                named = f.read().strip()
            chosen = os.path.join(folder, named)
        else:
            chosen = os.path.join(folder, names[-1])
    others = [n for n in complete_checkpoints(os.path.dirname(chosen)) if n != os.path.basename(chosen)]
    hint = f' Others here: {", ".join(others)}; to use one, write its name into {os.path.dirname(chosen)}/latest.' if others else ''
    manifest = os.path.join(chosen, 'manifest.json')
    if not os.path.isfile(manifest):
        raise BadInput(f'checkpoint {chosen} is incomplete: manifest.json is missing.{hint}')
    with open(manifest, encoding='utf-8') as f:
        files = json.load(f)
    for name, size in files.items():
        file = os.path.join(chosen, name)
        if not os.path.isfile(file):
            raise BadInput(f'checkpoint {chosen} is incomplete: {name} is missing.{hint}')
        if os.path.getsize(file) != size:
            raise BadInput(f'checkpoint {chosen} is damaged: {name} has {os.path.getsize(file):,} bytes, not {size:,}.{hint}')
    return chosen


def read_state(checkpoint):
    """The state.json of a checkpoint: step, model, config, loader and whatever else was saved."""
    with open(os.path.join(checkpoint, 'state.json'), encoding='utf-8') as f:
        return json.load(f)


def check_same_model(checkpoint, saved, wanted):
    """BadInput that lists every field in which the saved model config (dict) differs from the wanted one."""
    differing = [f'{key} {saved.get(key)!r} there, {wanted[key]!r} here' for key in wanted if saved.get(key) != wanted[key]]
    if differing:
        raise BadInput(f'checkpoint {checkpoint} holds another model: {"; ".join(differing)}.')


def check_resumable(checkpoint, saved, config, saved_model, model, n_steps):
    """BadInput when the run in a checkpoint (saved: its state.json) cannot go on with this config, model (dicts) and number of steps."""
    if saved['config'] is None:
        raise BadInput(f"'{config['out_dir']}' is an imported model, no run that could go on. Train it with --init_from={config['out_dir']} and "
                       'another --out_dir.')
    check_same_model(checkpoint, saved_model, model)
    for name in FIXED:
        if name in saved['config'] and saved['config'][name] != config[name]:            # an older version may not have had this knob
            raise BadInput(f"{name} was {saved['config'][name]!r} in {checkpoint}, it is {config[name]!r} now; a resumed run cannot "
                           'change it. Put it back, or start a new run with init_from.')
    if saved['step'] > n_steps:
        raise BadInput(f"{checkpoint} is at step {saved['step']}, beyond the {n_steps} steps asked for: nothing is left to train. Raise "
                       'max_steps (or max_tokens, or epochs).')


def load_weights(checkpoint, model):
    """Model weights only (init_from), into the model in place, whatever the number of ranks."""
    dcp.load(_tensors(model, []), checkpoint_id=checkpoint, no_dist=not dist.is_initialized())


def load(checkpoint, model, optimizers):
    """Weights, optimizer state and this rank's random generators, in place. Returns a note for the user, '' when all is as it was."""
    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = _tensors(model, [])
    names = {parameter: name for name, parameter in model.named_parameters()}
    states = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group['params']:
                prefix = f'optim.{names[parameter]}.'
                states[optimizer, parameter] = {
                    key.removeprefix(prefix): torch.zeros_like(parameter.detach(), dtype=stored[key].properties.dtype)
                    if tuple(stored[key].size) == tuple(whole_shape(model.layout, names[parameter], parameter))
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
    if not os.path.isfile(rng):
        return f'rank {_rank()} was not there when the checkpoint was written; its random generators start anew'
    set_rng_state(torch.load(rng, weights_only=True))
    return ''
