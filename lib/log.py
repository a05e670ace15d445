"""What the steps of a run found: read late, checked, logged; the log; and a trace of a few of them."""
import json
import math
import os
import time

import torch

from configurator import RunFault
from lib import checkpoint, parallel
from lib.device import read_metrics


class MetricsLog:
    """metrics.jsonl in the run folder, one object per logged step, and W&B under the same names when it is on."""

    def __init__(self, out_dir, first_step, config, wandb_mode, wandb_project):
        """Going on at first_step drops the lines of later steps (and a torn last line) that a killed run left."""
        self.path = os.path.join(out_dir, 'metrics.jsonl')
        records = [r for r in read_metrics(out_dir) if r['step'] < first_step]
        temporary = self.path + '.tmp'
        with open(temporary, 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(r) + '\n' for r in records)
        os.replace(temporary, self.path)
        self.file = open(self.path, 'a', encoding='utf-8', buffering=1)      # a line is on its way when it is complete
        self.wandb = None
        if wandb_mode != 'disabled':
            import wandb
            self.wandb = wandb.init(project=wandb_project, dir=out_dir, config=config, mode=wandb_mode)

    def write(self, step, metrics):
        self.file.write(json.dumps({'step': step, **metrics}) + '\n')
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)

    def close(self):
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()


class Progress:
    """Reports steps in their order, on a GPU each when the next one is under way, so that it never waits for the host."""

    def __init__(self, bar, metrics_log, checkpointer, batch_tokens, flops_per_token, peak, device):
        """peak: FLOP/s of all devices together, None: unknown; metrics_log: None on ranks that do not log."""
        self.bar, self.log, self.checkpointer = bar, metrics_log, checkpointer
        self.batch_tokens, self.flops_per_token, self.peak, self.device = batch_tokens, flops_per_token, peak, device
        self.unread = []
        self.restart()

    def restart(self):
        """The clock begins anew: what came between two steps was none."""
        self.start, self.steps, self.reading_s = time.perf_counter(), 0, 0.0

    def add(self, step, sums, n_valid, source_counts, read_s, metrics, more=lambda values, n_valid: {}):
        """A step as it was issued. sums: tensor of loss sum, hits, what `more` turns into metrics, gradient norm; metrics: to be logged, None: nothing."""
        self.unread.append((step, *parallel.to_host(sums), n_valid, source_counts, read_s, metrics, more))

    def read(self, everything):
        """Reports what is there; everything: the newest step as well, which is waited for."""
        while self.unread and (len(self.unread) > (self.device.type == 'cuda') or everything):
            self.report(*self.unread.pop(0))

    def report(self, step, sums, event, n_valid, source_counts, read_s, metrics, more):
        loss_sum, n_hits, *values, grad_norm = parallel.read(sums, event)
        if not math.isfinite(loss_sum) or not math.isfinite(grad_norm):
            self.checkpointer.finish()
            good = checkpoint.complete_checkpoints(self.checkpointer.folder)
            raise RunFault(f'loss is {loss_sum / n_valid:.4g} and gradient norm {grad_norm:.4g} at step {step}; the optimizer '
                           f'was not stepped. Last good checkpoint: {os.path.join(self.checkpointer.folder, good[-1]) if good else "none"}. '
                           f'Rows of the batch by source: {source_counts}. Lower learning_rate or look at these sources, then --resume=True.')
        self.steps, self.reading_s = self.steps + 1, self.reading_s + read_s
        self.bar.update()
        if metrics is None:
            return
        dt = (time.perf_counter() - self.start) / self.steps
        tokens_per_second, loss = self.batch_tokens / dt, loss_sum / n_valid
        self.log.write(step, {
            'train/loss': loss, 'train/perplexity': math.exp(min(loss, 50)), 'train/accuracy': n_hits / n_valid, 'train/grad_norm': grad_norm,
            'train/tokens': (step + 1) * self.batch_tokens, 'train/tokens_per_second': tokens_per_second,
            'train/mfu': tokens_per_second * self.flops_per_token / self.peak if self.peak else None,
            'system/step_ms': dt * 1e3, 'system/data_ms': self.reading_s / self.steps * 1e3,
            'system/gpu_memory': torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == 'cuda' else None,
            **metrics, **more(values, n_valid)})
        self.bar.set_postfix_str(f'loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s')
        self.restart()


def start_trace(path):
    """A profiler that writes steps 5 to 7 after its start to a file for Perfetto (ui.perfetto.dev); call its `step` after each, `stop` at the end."""
    tracer = torch.profiler.profile(schedule=torch.profiler.schedule(wait=3, warmup=1, active=3, repeat=1),
                                    on_trace_ready=lambda profile: profile.export_chrome_trace(path))
    tracer.start()
    return tracer
