"""The log of a run: metrics.jsonl and W&B, the progress of its steps, and a trace of a few of
them.
"""
import json
import math
import os
import time
from dataclasses import dataclass

import torch

from configurator import BadInput, RunFault, at_least, one_of


@dataclass
class LogConfig:
    """Knobs of logging."""
    wandb_mode: one_of('online', 'offline', 'disabled') = 'disabled'    # Weights & Biases
    wandb_project: str = 'cheapertraining'      # W&B project
    log_interval: at_least(1) = 10      # steps between two lines in metrics.jsonl
    profile: bool = False               # write a trace of a few steps of rank 0 to
                                        # out_dir/trace.json (for ui.perfetto.dev)


def read_metrics(out_dir):
    """The records of a run's metrics.jsonl: list of dict, [] when there is none.

    A killed run or machine may leave a torn end: half a line, or a block of zeros. It is left out,
    and a message says so if it is more than the beginning of a line. Raises BadInput when lines are
    damaged that others follow, and for values that are no numbers.
    """
    path = os.path.join(out_dir, 'metrics.jsonl')
    if not os.path.isfile(path):
        return []
    with open(path, 'rb') as f:
        *complete, torn = f.read().split(b'\n')
    records = []
    for line in complete:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or type(record.get('step')) is not int:
            record = None
        for name, value in (record or {}).items():
            if not isinstance(value, int | float | None):
                raise BadInput(f'{path}:{len(records) + 1}: {name} = {value!r} is no number.')
        records.append(record)
    while records and records[-1] is None:
        records.pop()
    n_torn = len(complete) - len(records)
    if n_torn or torn and not torn.startswith(b'{'):
        print(f'{path}: its end is torn, and {n_torn or "the last"} line(s) are left out')
    if None in records:
        raise BadInput(
            f'{path}:{records.index(None) + 1} is no record of a run, and others follow it. Delete '
            'this line.')
    return records


def put_aside(out_dir):
    """Renames metrics.jsonl to the first free metrics.<n>.jsonl. Returns that name."""
    n = 1
    while os.path.exists(os.path.join(out_dir, f'metrics.{n}.jsonl')):
        n += 1
    name = f'metrics.{n}.jsonl'
    os.rename(os.path.join(out_dir, 'metrics.jsonl'), os.path.join(out_dir, name))
    return name


def start_wandb(out_dir, config):
    """Starts a run of W&B, None when it is disabled. Raises BadInput without a key or a network."""
    if config['wandb_mode'] == 'disabled':
        return None
    try:
        import wandb
    except ImportError:
        raise BadInput(
            'wandb is not installed. `pip install wandb`, or set wandb_mode=disabled.') from None
    try:
        return wandb.init(
            project=config['wandb_project'], dir=out_dir, config=config, mode=config['wandb_mode'])
    except wandb.Error as error:
        raise BadInput(
            f"wandb_mode = '{config['wandb_mode']}': W&B does not start ({error}). Run `wandb "
            'login`, or set wandb_mode to offline or disabled.') from None


class MetricsLog:
    """metrics.jsonl in the run folder, one object per logged step, and W&B under the same names."""

    def __init__(self, out_dir, first_step, config):
        """Drops the lines of steps from first_step on, which a killed run may have left.

        A run that begins at step 0 puts the log of another beginning aside, as metrics.<n>.jsonl.
        """
        self.path = os.path.join(out_dir, 'metrics.jsonl')
        self.wandb = start_wandb(out_dir, config)       # first: without a key nothing is written
        before = read_metrics(out_dir)
        records = [r for r in before if r['step'] < first_step]
        if before and first_step == 0:
            name = put_aside(out_dir)
            print(f'log: the {len(before)} records of an earlier beginning are kept in {name}')
        # A kill while the kept lines are written must not lose the metrics of the run.
        temporary = self.path + '.tmp'
        with open(temporary, 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(r) + '\n' for r in records)
        os.replace(temporary, self.path)
        # Line buffering: a line is written when it is complete.
        self.file = open(self.path, 'a', encoding='utf-8', buffering=1)

    def write(self, step, metrics):
        self.file.write(json.dumps({'step': step, **metrics}) + '\n')
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)

    def close(self):
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()


def copy_to_host(tensor):
    """Starts to copy a tensor to the CPU: (copy, event to wait for before it is read, or None)."""
    if not tensor.is_cuda:
        return tensor, None
    copy = tensor.to('cpu', non_blocking=True)          # into pinned memory
    # To wait for this event is not to wait for steps that were issued after the copy.
    event = torch.cuda.Event()
    event.record()
    return copy, event


@dataclass
class Issued:
    """A step that the host has issued and whose numbers it has not read yet."""
    step: int
    sums: torch.Tensor          # loss sum, hits, other sums, gradient norm
    event: object               # to wait for before `sums` is read, None: they are there
    n_valid: float              # supervised tokens over all ranks
    rows: dict                  # source -> rows in the batch
    read_s: float               # seconds that reading the batch took
    metrics: dict | None        # to be logged with the step, None: the step is not logged


class Progress:
    """Checks and logs steps in their order.

    On a GPU a step is read when the next one has been issued, so the device never waits for the
    host.
    """

    def __init__(self, bar, metrics_log, batch_tokens, flops_per_token, peak, device, last_good):
        """
        bar                 tqdm bar of the run's steps
        metrics_log         MetricsLog, None on ranks that do not log
        batch_tokens        tokens of a step, over all ranks
        flops_per_token     FLOPs of forward and backward
        peak                FLOP/s of all devices together, None: unknown
        last_good()         path of the last complete checkpoint or 'none', for the error about a
                            step whose loss is not finite
        """
        self.bar = bar
        self.log = metrics_log
        self.batch_tokens = batch_tokens
        self.flops_per_token = flops_per_token
        self.peak = peak
        self.device = device
        self.last_good = last_good
        self.unread = []
        self.more_metrics = lambda sums, n_valid: {}        # the other sums of a step as metrics
        self.restart()

    def restart(self):
        """Restarts the clock after something that is not a training step."""
        self.start = time.perf_counter()
        self.steps = 0
        self.reading_s = 0.0

    def add(self, step, sums, n_valid, rows, read_s, metrics):
        """Adds a step that has been issued. The arguments are the fields of `Issued`."""
        copy, event = copy_to_host(sums)
        self.unread.append(Issued(step, copy, event, n_valid, rows, read_s, metrics))

    def read(self, everything):
        """Checks and logs the steps that are ready. everything: waits for the newest one, too."""
        # On a CPU nothing runs ahead. is_late is also the number of steps that may stay unread.
        is_late = self.device.type == 'cuda' and not everything
        while len(self.unread) > is_late:
            self.report(self.unread.pop(0))

    def report(self, issued):
        if issued.event is not None:
            issued.event.synchronize()
        loss_sum, n_hits, *others, grad_norm = issued.sums.tolist()
        loss = loss_sum / issued.n_valid
        # The next step may be issued already. It changes nothing, because train.py's optimizers
        # check the same numbers on the device.
        if not math.isfinite(loss_sum) or not math.isfinite(grad_norm):
            raise RunFault(
                f'loss is {loss:.4g} and gradient norm {grad_norm:.4g} at step {issued.step}; the '
                f'optimizer was not stepped. Last good checkpoint: {self.last_good()}. Rows of the '
                f'batch by source: {issued.rows}. Lower learning_rate or look at these sources, '
                'then --resume=True.')
        self.steps += 1
        self.reading_s += issued.read_s
        self.bar.update()
        if issued.metrics is None:
            return
        # A mean since the last logged step. To time single steps, the host would have to wait for
        # each.
        dt_s = (time.perf_counter() - self.start) / self.steps
        tokens_per_second = self.batch_tokens / dt_s
        mfu = None
        if self.peak:
            mfu = tokens_per_second * self.flops_per_token / self.peak
        memory_gib = None
        if self.device.type == 'cuda':
            memory_gib = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.log.write(issued.step, {
            'train/loss': loss,
            # math.exp raises an OverflowError above 709, and a diverging loss can get there.
            'train/perplexity': math.exp(min(loss, 50)),
            'train/accuracy': n_hits / issued.n_valid,
            'train/grad_norm': grad_norm,
            'train/tokens': (issued.step + 1) * self.batch_tokens,
            'train/tokens_per_second': tokens_per_second,
            'train/mfu': mfu,
            'system/step_ms': dt_s * 1e3,
            'system/data_ms': self.reading_s / self.steps * 1e3,
            'system/gpu_memory': memory_gib,
            **issued.metrics,
            **self.more_metrics(others, issued.n_valid)})
        self.bar.set_postfix_str(f'loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s')
        self.restart()


def start_trace(path):
    """Starts a profiler that writes steps 5 to 7 from now to a file for ui.perfetto.dev.

    Call its `step` after every training step and its `stop` at the end.
    """
    tracer = torch.profiler.profile(
        # The first steps compile kernels and are not typical. The warm-up hides the profiler's
        # start.
        schedule=torch.profiler.schedule(wait=3, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda profile: profile.export_chrome_trace(path))
    tracer.start()
    return tracer
