"""PRESENCE: the micro-batches of a step weighted by their self-influence.

Thakkar et al. 2023 (arXiv:2311.00913), equations 7 to 9 and Algorithm 2. The self-influence of a
micro-batch is the squared norm s of the gradient of its mean loss over some layers (the first
block). With z-scores over the micro-batches of the step, micro-batch i has the weight softmax(tau *
z)_i instead of 1 / n. tau > 0 prefers what is new to the model, tau < 0 what is not. tau = 0 is
plain accumulation, in one process bit for bit. There is no second backward pass.

Let g_i be the gradient of micro-batch i's own mean loss, w_i its weight, v_i its share of the
step's supervised tokens, and n the number of micro-batches. The gradient of the step is

    presence_sum='tokens'           the sum of n * w_i * v_i * g_i
    presence_sum='micro_batches'    the sum of w_i * g_i, as in the paper

Both are the same where all micro-batches have equally many supervised tokens. 'tokens' is the
default, because equal weights then give the mean loss per token that a run without PRESENCE
minimises. In the paper's sum a token counts more in a micro-batch that has few.

presence_permute is a control. It gives the weights of a step to its micro-batches in random order.
What a run still gains or loses then does not come from the scores.

A micro-batch is the rows of all ranks together. Under FSDP2 its gradient is reduced before it is
weighted, so s is the norm of the full gradient and does not depend on the number of ranks.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from configurator import BadInput, at_least, between, one_of
from influence import select
from lib.parallel import local_tensor, reshard
from ops.ranks import n_replicas

# Scores whose deviation is a smaller share of their mean differ by noise only: the weights are
# equal.
EQUAL = 1e-3


@dataclass
class PresenceConfig:
    """Knobs of PRESENCE."""
    presence: one_of('off', 'store', 'stream') = 'off'      # weigh micro-batches by self-influence.
                                    # store: exact, keeps every gradient. stream: one more buffer
    presence_tau: between(-1e6, 1e6) = 1.0      # above 0 prefers what is new to the model, below 0
                                    # what is not
    presence_schedule: one_of('constant', 'two_stage', 'cosine') = 'constant'       # of tau.
                                    # two_stage: the sign turns at presence_switch. cosine:
                                    # gradually
    presence_switch: at_least(0) | None = None      # step at which two_stage turns. None: after
                                    # 10 % of the run
    presence_layers: one_of('last', 'all', 'first', 'embedding+head') = 'first'     # parameters
                                    # that the self-influence is taken of
    presence_sum: one_of('tokens', 'micro_batches') = 'tokens'      # what counts alike at equal
                                    # weights. micro_batches: the paper's sum. They differ where
                                    # micro-batches have unequal numbers of supervised tokens
    presence_by_source: bool = False    # every micro-batch holds rows of one source, so the number
                                    # of micro-batches of a step varies
    presence_permute: bool = False  # control: the weights of a step in random order. presence must
                                    # be 'store'


def tau_at(step, n_steps, config):
    """tau of a step. two_stage: tau before the switch, then -tau. cosine: from tau to -tau."""
    tau = config['presence_tau']
    if config['presence_schedule'] == 'two_stage':
        switch = config['presence_switch']
        return tau if step < (n_steps // 10 if switch is None else switch) else -tau
    if config['presence_schedule'] == 'cosine':
        return tau * math.cos(math.pi * step / max(1, n_steps - 1))
    return tau


def order_of(n, seed, step):
    """The random order in which presence_permute gives out n weights: (n,) int64.

    It depends on these numbers alone, so all ranks and a resumed run have the same.
    """
    return np.random.default_rng((seed, step)).permutation(n)


class Presence:
    """A gradient taker (methods/__init__.py) that leaves the weighted sum of gradients in .grad.

    store     keeps all n gradients until the scores are known. This is the paper's algorithm, with
              n - 1 more buffers
    stream    keeps one running sum, an online softmax that is rescaled as scores come in. It uses
              the deviation of the step before, and needs no mean, which cancels in a softmax. One
              more buffer. The first step has equal weights
    """
    def __init__(self, training, grad_accum):
        """training: methods.Training; grad_accum: micro-batches of a step of mixed sources."""
        self.training = training
        self.by_source = training.config['presence_by_source']
        self.mode = training.config['presence']
        self.layers = training.config['presence_layers']
        self.by_tokens = training.config['presence_sum'] == 'tokens'
        self.permutes = training.config['presence_permute']
        self.n = grad_accum
        self.sigma = None               # deviation of the scores of the step before
        self.parameters = None          # set at the first step, when there is a model
        if self.by_source and len(training.active) < 2:
            raise BadInput(
                'presence_by_source weighs sources against each other, and there is only one. Add '
                'a source, or leave the knob out.')
        if not self.by_source and grad_accum < 2:
            raise BadInput(
                f"presence = '{self.mode}' weighs the micro-batches of a step against each other, "
                f'and there is only {grad_accum}. Lower batch_size or raise total_batch_tokens.')
        if self.permutes and self.mode != 'store':
            raise BadInput(
                f"presence_permute needs presence = 'store', not '{self.mode}': a micro-batch may "
                'get the weight of a later one, and only store keeps its gradient until then.')

    def state_dict(self):
        return dict(n=self.n, layers=self.layers, sigma=self.sigma)

    def load_state_dict(self, state):
        if (state['n'], state['layers']) != (self.n, self.layers):
            raise BadInput(
                f"the run weighed {state['n']} micro-batches by the layers '{state['layers']}', it "
                f"would weigh {self.n} by '{self.layers}' now. Put batch_size (and the number of "
                'ranks) and presence_layers back, or start a new run with init_from.')
        self.sigma = state['sigma']

    def begin(self, step, lr, n_valid):
        """Starts a step. Every .grad is None. n_valid: supervised tokens of every micro-batch."""
        if self.parameters is None:
            self.find_parameters()
        self.tau = tau_at(step, self.training.n_steps, self.training.config)
        self.step = step
        self.shares = [n / sum(n_valid) for n in n_valid]
        self.at = 0                     # number of the micro-batch
        self.kept = []                  # gradients: of all micro-batches, or their running sum
        self.scores = []
        self.largest = None             # of the online softmax: largest exponent
        self.total = None               # of the online softmax: sum of the factors

    def find_parameters(self):
        model = self.training.model
        # After an evaluation the root's parameters are unsharded. Gradients are those of shards.
        reshard(model)
        scored = select(model, self.layers)[0]
        self.parameters = list(model.parameters())
        self.scored = list(scored.values())
        shares = [1 / n_replicas(model.layout, name) for name in scored]
        self.counts = torch.tensor(shares, dtype=torch.float64, device=self.scored[0].device)

    def add(self, micro, losses):
        """Takes the gradient of a micro-batch out of .grad, after its backward pass.

        Micro-batches without a supervised token are skipped.
        """
        share = self.shares[self.at]
        self.at += 1
        score = self.score()
        gradients = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        if not share:
            return
        # .grad is per token of the step. The score is that of the micro-batch's mean loss.
        self.scores.append(score / share**2)                   # () fp64
        if not self.by_tokens:
            # From share * g to g / n: what `finish` multiplies by n * weight.
            n = sum(share > 0 for share in self.shares)
            for gradient in gradients:
                local_tensor(gradient).div_(n * share)
        if self.mode == 'store':
            self.kept.append(gradients)
            return
        # These are tensors throughout, so nothing waits for the device.
        x = torch.zeros_like(self.scores[-1])
        if self.sigma:
            x = self.scores[-1] * (self.tau / self.sigma)
        if not self.kept:
            self.largest = x
            self.total = torch.ones_like(x)
            self.kept = [gradients]
            return
        largest = torch.maximum(x, self.largest)
        before = (self.largest - largest).exp()
        factor = (x - largest).exp()
        self.largest = largest
        self.total = self.total * before + factor
        accumulate(self.kept[0], gradients, before, factor)

    def score(self):
        """Squared norm of .grad over the scored parameters and all ranks: () fp64."""
        local = [local_tensor(p.grad) for p in self.scored]
        norms = torch.stack(torch._foreach_norm(local, dtype=torch.float64))
        s = (norms.square() * self.counts).sum()
        if dist.is_initialized():
            dist.all_reduce(s)
        return s

    def finish(self):
        """Puts the weighted sum into .grad. Returns metrics to log."""
        scores = torch.stack(self.scores)
        mean = scores.mean().item()
        sigma = scores.std(correction=0).item()
        sigma = sigma if sigma > EQUAL * mean else None
        # `add` has used the deviation of the step before, and the logged weights must agree.
        used = self.sigma if self.mode == 'stream' else sigma
        x = scores * (self.tau / used) if used else torch.zeros_like(scores)
        weights = x.softmax(0)
        factors = (x - x.max()).exp()
        # n * softmax, exactly 1 when all are equal
        factors = factors / factors.mean()
        if self.permutes:
            order = order_of(len(x), self.training.config['seed'], self.step)
            order = torch.from_numpy(order).to(x.device)
            weights = weights[order]
            factors = factors[order]
        weights = weights.tolist()
        if self.mode == 'store':
            accumulate(self.kept[0], [], factors[0], factors[0])
            for gradients, factor in zip(self.kept[1:], factors[1:], strict=True):
                accumulate(self.kept[0], gradients, torch.ones_like(factor), factor)
        else:
            accumulate(self.kept[0], [], len(scores) / self.total, self.total)
            self.sigma = sigma
        for p, gradient in zip(self.parameters, self.kept[0], strict=True):
            p.grad = gradient
        self.kept = []
        metrics = {}
        if self.permutes:
            # Without the permutation it would be the largest weight (tau > 0) or the smallest one.
            metrics['presence/weight_of_highest_score'] = weights[scores.argmax().item()]
        for i, share in enumerate(self.shares):
            if not share:
                weights.insert(i, 0.0)
        metrics |= {
            'presence/tau': self.tau,
            'presence/effective_micro_batches': 1 / sum(w * w for w in weights),
            'presence/weight_entropy': -sum(w * math.log(w) for w in weights if w > 0),
            'presence/self_influence': mean}
        for i, weight in enumerate(weights):
            metrics[f'presence/weight_{i}'] = weight
        return metrics


@torch.no_grad()
def accumulate(total, gradients, before, factor):
    """total = before * total + factor * gradients, in place.

    total, gradients: lists of tensors ([]: nothing is added); before, factor: () fp64 tensors.
    """
    for i, t in enumerate(total):
        t = local_tensor(t)
        t.mul_(before.to(t.dtype))
        if gradients:
            t.add_(local_tensor(gradients[i]).mul_(factor.to(t.dtype)))
