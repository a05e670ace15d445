"""PRESENCE (Thakkar et al. 2023, arXiv:2311.00913): the micro-batches of a step weighed by their self-influence.

The self-influence of a micro-batch is the squared norm s of the gradient of its mean loss, over some layers (the first block).
With z-scores over the micro-batches of the step, micro-batch i counts softmax(tau * z)_i instead of 1 / n: tau > 0 prefers what is
new to the model, tau < 0 what is not, tau = 0 is plain accumulation, in one process bit for bit. (Equations 7 to 9, Algorithm 2.) No second backward.

A micro-batch is the rows of all ranks together: under FSDP2 its gradient is reduced before it is weighed, so `s` is the norm of
the whole and does not depend on how many ranks share the rows.
"""
import math

import torch
import torch.distributed as dist

from configurator import BadInput, check_values
from influence import check_layers, select
from lib.parallel import local_tensor
from ops.ranks import n_replicas

MODES, SCHEDULES = ('off', 'store', 'stream'), ('constant', 'two_stage', 'cosine')
EQUAL = 1e-3            # scores whose deviation is a smaller share of their mean are noise: all count alike


def check(mode, schedule, layers, grad_accum):
    """BadInput for settings with which there is nothing to weigh."""
    check_layers(layers, 'presence_layers')
    check_values(dict(presence=mode, presence_schedule=schedule), dict(presence=MODES, presence_schedule=SCHEDULES), {})
    if mode != 'off' and grad_accum < 2:
        raise BadInput(f"presence = '{mode}' weighs the micro-batches of a step against each other, and there is only {grad_accum}. Lower "
                       'batch_size or raise total_batch_tokens.')


def tau_at(step, n_steps, tau, schedule, switch):
    """tau of a step. two_stage: tau before step `switch` (None: a tenth of n_steps), -tau from it on; cosine: from tau to -tau."""
    if schedule == 'two_stage':
        return tau if step < (n_steps // 10 if switch is None else switch) else -tau
    if schedule == 'cosine':
        return tau * math.cos(math.pi * step / max(1, n_steps - 1))
    return tau


class MicroBatches:
    """Collects the gradients of a step's micro-batches and leaves their weighted sum in .grad.

    store     keeps all n gradients until the scores are known: the paper's algorithm, n - 1 more buffers
    stream    keeps one running sum (an online softmax, rescaled as scores come in) with the deviation of the step before, since
              the mean cancels in a softmax: one more buffer. The first step counts all alike.
    """

    def __init__(self, model, layers, mode, n, saved=None):
        """layers: those that s is taken of, as in influence.py; n: micro-batches of a step; saved: `state` of the run that goes on."""
        scored = select(model, layers)[0]
        self.parameters, self.scored = list(model.parameters()), list(scored.values())
        self.counts = torch.tensor([1 / n_replicas(model.layout, name) for name in scored], dtype=torch.float64, device=self.scored[0].device)
        self.mode, self.layers, self.n, self.sigma = mode, layers, n, saved['sigma'] if saved else None
        if saved and (saved['n'], saved['layers']) != (n, layers):
            raise BadInput(f"the run weighed {saved['n']} micro-batches by the layers '{saved['layers']}', it would weigh {n} by '{layers}' now. Put "
                           'batch_size (and the number of ranks) and presence_layers back, or start a new run with init_from.')
        self.begin(0.0)

    def state(self):
        """What the coming steps depend on, for a checkpoint."""
        return dict(n=self.n, layers=self.layers, sigma=self.sigma)

    def begin(self, tau):
        """A new step; every .grad is None."""
        self.tau, self.kept, self.scores, self.empty = tau, [], [], []
        self.largest = self.total = None                       # of the online softmax: largest exponent, sum of the factors

    def add(self, share):
        """After every backward of share * (mean loss of the micro-batch): takes the gradients out of .grad. One without a counted token (0) has no part."""
        score = self.score()
        gradients = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        if not share:
            self.empty.append(len(self.scores) + len(self.empty))
            return
        self.scores.append(score / share**2)                   # () fp64
        if self.mode == 'store':
            self.kept.append(gradients)
            return
        # tensors throughout: nothing waits for the device
        x = self.scores[-1] * (self.tau / self.sigma) if self.sigma else torch.zeros_like(self.scores[-1])
        if not self.kept:
            self.largest, self.total, self.kept = x, torch.ones_like(x), [gradients]
            return
        largest = torch.maximum(x, self.largest)
        before, factor = (self.largest - largest).exp(), (x - largest).exp()
        self.largest, self.total = largest, self.total * before + factor
        accumulate(self.kept[0], gradients, before, factor)

    def score(self):
        """Squared norm of .grad over the scored parameters and all ranks: () fp64."""
        norms = torch.stack(torch._foreach_norm([local_tensor(p.grad) for p in self.scored], dtype=torch.float64))
        s = (norms.square() * self.counts).sum()
        if dist.is_initialized():
            dist.all_reduce(s)
        return s

    def finish(self):
        """Puts the weighted sum into .grad. Returns what is logged of the step; the effective number is 1 / sum of squared weights."""
        scores = torch.stack(self.scores)
        mean, sigma = scores.mean().item(), scores.std(correction=0).item()
        used = self.sigma if self.mode == 'stream' else sigma if sigma > EQUAL * mean else None
        x = scores * (self.tau / used) if used else torch.zeros_like(scores)
        weights = x.softmax(0)
        if self.mode == 'store':
            factors = (x - x.max()).exp()
            factors = factors / factors.mean()                 # n * softmax, exactly 1 where all are alike
            accumulate(self.kept[0], [], factors[0], factors[0])
            for gradients, factor in zip(self.kept[1:], factors[1:]):
                accumulate(self.kept[0], gradients, torch.ones_like(factor), factor)
        else:
            accumulate(self.kept[0], [], len(scores) / self.total, self.total)
            self.sigma = sigma if sigma > EQUAL * mean else None
        for p, gradient in zip(self.parameters, self.kept[0]):
            p.grad = gradient
        self.kept = []
        weights = weights.tolist()
        for i in self.empty:
            weights.insert(i, 0.0)
        return {'presence/tau': self.tau, 'presence/effective_micro_batches': 1 / sum(w * w for w in weights),
                'presence/weight_entropy': -sum(w * math.log(w) for w in weights if w > 0), 'presence/self_influence': mean,
                **{f'presence/weight_{i}': w for i, w in enumerate(weights)}}


@torch.no_grad()
def accumulate(total, gradients, before, factor):
    """total = before * total + factor * gradients, lists of tensors in place; before and factor are () fp64 tensors."""
    total, gradients = ([local_tensor(t) for t in tensors] for tensors in (total, gradients))
    for i, t in enumerate(total):
        t.mul_(before.to(t.dtype))
        if gradients:
            t.add_(gradients[i].mul_(factor.to(t.dtype)))
