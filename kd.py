"""Distillation: the student learns the teacher's distribution of the next token, from a teacher that runs along or from a cache.

    python train.py ... --teacher=meta-llama/Llama-3.1-8B-Instruct                     # runs along: a run, a folder, a hub name
    python kd.py cache --teacher=out/teacher --source=code,math --name=big             # or once: -> data/code/kd/big/, data/math/kd/big/
    python train.py ... --sources="{'code': 1.0, 'math': 1.0}" --kd_cache=big

The loss of a token is alpha * T^2 * D(teacher, student) + (1 - alpha) * cross-entropy, D of both distributions at temperature T
(Hinton et al. 2015, arXiv:1503.02531, section 2; T^2 since gradients of softened logits shrink by it). D: forward KL(teacher ||
student), reverse KL(student || teacher), or the Jensen-Shannon divergence. It is taken from hidden states of both, a few rows of
logits at a time, gradient included, so neither one's B x T x V logits ever exist. teacher_cache.py keeps the teacher's words on disk.

Letters in shape comments: N = B*T tokens, C n_embd, V vocab_size, S rows of a strip, K cached ids of a token.
"""
import hashlib
import math
import os
import sys
from dataclasses import asdict, dataclass

import fsspec
import numpy as np
import torch

from configurator import BadInput, check_values, configure
from lib import hf, parallel, storage
from model import GPT
from ops import ranks
from ops.kernels import CACHED_MOST, DIVERGENCES, by_triton, cached_gradient_, divergence_gradient_
from ops.loss import add_weight_gradient, chunk_rows, loss_dtypes

# -- divergences -------------------------------------------------------------------------------------------------------

def divergence(lp, lq, kind):
    """D of the student's distribution from the teacher's, and what its gradient is made of.

    lp, lq (S, M): log-probabilities of the student and of the teacher over M outcomes. kind: forward KL(q || p), reverse KL(p || q),
    js: the mean of KL(q || m) and KL(p || m) with m = (p + q) / 2.
    Returns (D (S, 1) in nats, c (S, M), total (S, 1) or float): c = dD / dlp as if all lp were free, total its sum, so that the
    gradient by the student's logits is c - p * total.
    """
    if kind == 'forward':
        q = lq.exp()
        return (q * (lq - lp)).sum(1, keepdim=True), -q, -1.0
    p = lp.exp()
    if kind == 'reverse':
        gap = lp - lq
        d = (p * gap).sum(1, keepdim=True)
        return d, p * (gap + 1), d + 1
    lm = torch.logaddexp(lp, lq) - math.log(2)
    c = p * (0.5 * (lp - lm))
    return (c + 0.5 * lq.exp() * (lq - lm)).sum(1, keepdim=True), c, c.sum(1, keepdim=True)


@dataclass
class Cached:
    """What a cache holds of N tokens, on the device: of the distribution at the temperature that it was made with.

    ids (N, K) int64, logq (N, K) fp32: the likeliest tokens (K may be 0); tail (N,): log of what all others have together; drawn (N, M) int64:
    tokens drawn from those others (M may be 0); negentropy (N,): sum of q log q; top (N,) int64: the likeliest token; target_logq (N,):
    log-probability of the next token at temperature 1; source (N,) int64: number of the row of `rest` (sources, V), log-probabilities of the
    others as they are on average over that source, None where they are not needed.
    """
    ids: torch.Tensor
    logq: torch.Tensor
    tail: torch.Tensor
    drawn: torch.Tensor
    negentropy: torch.Tensor
    top: torch.Tensor
    target_logq: torch.Tensor
    source: torch.Tensor
    rest: torch.Tensor | None

    def part(self, rows):
        *tokens, rest = vars(self).values()
        return Cached(*(t[rows] for t in tokens), rest)

    def mass(self):
        """Log-probabilities of the ids and of all others together, which sum to 1 in spite of fp16: (N, K + 1)."""
        return torch.log_softmax(torch.cat((self.logq, self.tail[:, None]), 1), 1)

    def outcomes(self):
        """The tokens that it names, drawn ones with an M-th of the others' mass each: ids (N, K + M), probabilities (N, K + M)."""
        mass, M = self.mass().exp(), self.drawn.shape[1]
        return torch.cat((self.ids, self.drawn), 1), torch.cat((mass[:, :-1], (mass[:, -1:] / M).expand(-1, M)), 1)


def read_cached(records, source, rest, device):
    """Records of a cache (teacher_cache.record_dtype), a list of arrays, `source` the number of each -> Cached of all their tokens in a row."""
    source = np.repeat(source, [len(r) for r in records])
    records = np.concatenate(records)

    def put(field, dtype):
        return parallel.put(torch.from_numpy(records[field].astype(dtype)), device)
    return Cached(put('ids', np.int64), put('logq', np.float32), put('tail', np.float32), put('drawn', np.int64), put('negentropy', np.float32),
                  put('top', np.int64), put('target', np.float32), parallel.put(torch.from_numpy(source), device), rest)


def against(lp, lq, kind):
    """(D (S, 1), its gradient by the student's softened logits (S, V)) from log-probabilities (S, V) of student and teacher."""
    d, c, total = divergence(lp, lq, kind)
    return d, c.sub_(lp.exp() * total)


def against_cache(lp, cached, kind):
    """The same against a cache.

    The K likeliest tokens count as they are. The mass of all the others goes to the M tokens that were drawn from them, a M-th to each: right on
    average, value and gradient, which is what the forward divergence needs. Without draws, and for the other divergences, which need a probability
    for every token, it is spread as it is on average over the source: what is lost is how the rest depends on the context. (Left to the student's
    own distribution the rest teaches nothing, which cost far more.) The forward divergence has the teacher's true entropy.
    """
    if kind == 'forward' and cached.drawn.shape[1]:
        ids, q = cached.outcomes()
        d = cached.negentropy[:, None] - (q * lp.gather(1, ids)).sum(1, keepdim=True)
        return d, lp.exp().scatter_add_(1, ids, -q)
    mass = cached.mass()
    lq = cached.rest[cached.source]                                                  # (S, V)
    covered = lq.gather(1, cached.ids).exp().sum(1, keepdim=True).clamp(max=1 - 1e-6)
    lq = (lq + (mass[:, -1:] - torch.log1p(-covered))).scatter_(1, cached.ids, mass[:, :-1])
    d, gradient = against(lp, lq, kind)
    if kind == 'forward':
        d = cached.negentropy[:, None] - (lq.exp_() * lp).sum(1, keepdim=True)
    return d, gradient


# -- the loss ----------------------------------------------------------------------------------------------------------

def kd_chunk_rows(n_rows, vocab_size, device, dtype):
    """Rows of logits of both at once: together a sixteenth of one model's fp32 logits, and no more than `model.chunk_rows` allows."""
    return min(max(1, chunk_rows(n_rows, vocab_size, device, dtype) // 2), max(64, n_rows * 4 // (32 * dtype.itemsize)))


class _Distill(torch.autograd.Function):
    """Weighted sum of token losses; gradients are made in the forward, as in model._LinearCrossEntropy."""

    @staticmethod
    def forward(ctx, h, weight, targets, token_weights, teacher, alpha, temperature, kind):
        (N, V), device = (h.shape[0], weight.shape[0]), h.device
        dtype, high = loss_dtypes(h)
        h_low, weight_low = h.to(dtype), weight.to(dtype)
        counted, safe_targets = targets >= 0, targets.clamp(min=0)
        token_weights = torch.where(counted, 1.0 if token_weights is None else token_weights.to(high), 0.0).to(high)
        dh = torch.empty_like(h_low) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros(weight.shape, dtype=high, device=device) if ctx.needs_input_grad[1] else None
        found = torch.empty(5, N, dtype=high, device=device)       # D, student's loss and hit, teacher's loss, agreement
        rows = kd_chunk_rows(N, V, device, dtype)
        buffer = torch.empty(rows, V, dtype=dtype, device=device)
        other = None if isinstance(teacher, Cached) else torch.empty(rows, V, dtype=teacher[0].dtype, device=device)
        with torch.autocast(device.type, enabled=False):
            for start in range(0, N, rows):
                part = slice(start, min(start + rows, N))
                logits = torch.mm(h_low[part], weight_low.T, out=buffer[:part.stop - start])                     # (n, V)
                theirs = teacher.part(part) if other is None else torch.mm(teacher[0][part], teacher[1].T, out=other[:part.stop - start])
                found[:, part] = chunk_gradient_(logits, theirs, safe_targets[part], alpha, temperature, kind)
                scale = token_weights[part, None]
                if dh is not None:
                    dh[part] = ((logits @ weight_low) * scale).to(dtype)
                if dweight is not None:
                    add_weight_gradient(dweight, logits, (h_low[part] * scale).to(dtype))
        found.masked_fill_(~counted, 0)
        ctx.save_for_backward(dh, dweight)
        ctx.dtypes = h.dtype, weight.dtype
        losses = alpha * temperature**2 * found[0] + (1 - alpha) * found[1]
        ctx.mark_non_differentiable(found)
        return (losses * token_weights).sum(), found

    @staticmethod
    def backward(ctx, upstream, _found):
        dh, dweight = ctx.saved_tensors
        dh = None if dh is None else (dh * upstream).to(ctx.dtypes[0])
        dweight = None if dweight is None else dweight.mul_(upstream).to(ctx.dtypes[1])
        return dh, dweight, *(None,) * 6


def chunk_gradient_(logits, theirs, targets, alpha, temperature, kind):
    """A chunk of the student's logits (n, V) becomes the gradient of its losses in place. theirs: the teacher's logits (n, V), or Cached of n tokens.

    Returns (5, n), as `distillation_loss`. By a kernel, but for caches without draws or of more than 256 tokens, and for other divergences than forward
    against a cache.
    """
    n, V = logits.shape
    high, device = torch.promote_types(logits.dtype, torch.float32), logits.device
    found = torch.empty(5, n, dtype=high, device=device)
    if by_triton(logits) and not isinstance(theirs, Cached):
        divergence_gradient_(logits, theirs, targets, found, alpha, temperature, DIVERGENCES.index(kind))
        return found
    if by_triton(logits) and kind == 'forward' and 0 < theirs.drawn.shape[1] <= CACHED_MOST - theirs.ids.shape[1]:
        top, ids, q = torch.empty(n, dtype=torch.int32, device=device), *theirs.outcomes()
        cached_gradient_(logits, ids, q, targets, found, top, alpha, temperature)
        found[0] = theirs.negentropy - found[0]
        found[3], found[4] = -theirs.target_logq, top == theirs.top
        return found
    strip = max(1, (2**22 if logits.is_cuda else 2**20) // V)       # of which a few fp32 copies are made
    for i in range(0, n, strip):
        here = slice(i, min(i + strip, n))
        y = theirs.part(here) if isinstance(theirs, Cached) else theirs[here].to(high)
        gradient, found[:, here] = strip_gradient(logits[here].to(high), y, targets[here, None], alpha, temperature, kind)
        logits[here] = gradient
    return found


def strip_gradient(z, y, target, alpha, temperature, kind):
    """A few tokens. z (S, V): student's logits; y: the teacher's, or Cached; target (S, 1).

    Returns (gradient of the loss by z (S, V), (5, S): D, student's loss, hit, teacher's loss, agreement).
    """
    largest, top = z.max(1, keepdim=True)
    hit = z.gather(1, target) == largest                                                 # a tie counts as a hit
    lp = torch.log_softmax(z / temperature, 1)
    lp1 = lp if temperature == 1 else torch.log_softmax(z, 1)
    loss = -lp1.gather(1, target)
    if isinstance(y, Cached):
        teacher_loss, agrees = -y.target_logq[:, None], top == y.top[:, None]
        d, gradient = against_cache(lp, y, kind)
    else:
        teacher_loss = y.logsumexp(1, keepdim=True) - y.gather(1, target)
        agrees = y.gather(1, top) == y.amax(1, keepdim=True)
        d, gradient = against(lp, torch.log_softmax(y / temperature, 1), kind)
    gradient.mul_(alpha * temperature)                       # T^2, and 1 / T by which the logits were divided
    if alpha < 1:
        gradient.add_(lp1.exp(), alpha=1 - alpha).scatter_add_(1, target, torch.full_like(loss, alpha - 1))
    return gradient, torch.cat((d, loss, hit, teacher_loss, agrees), 1).T


def distillation_loss(h, weight, targets, token_weights=None, *, teacher, alpha=1.0, temperature=1.0, kind='forward'):
    """alpha * T^2 * D + (1 - alpha) * cross-entropy, summed over tokens with weights, without ever holding all logits.

    h (N, C), weight (V, C): the student's, any float dtype; targets (N,) int64, -1 = not counted; token_weights (N,) or None = ones
    teacher: (hidden states (N, C_t), output weight (V, C_t)) of a teacher with the same vocabulary, or Cached of these tokens
    Returns (sum () fp32, found (5, N) fp32: D in nats, student's cross-entropy and hit, teacher's cross-entropy, same arg-max; 0 where not
    counted). Gradients of h and weight flow from `sum` alone, dweight is accumulated in fp32. Backward may run once.
    """
    return _Distill.apply(h, weight, targets, token_weights, teacher, alpha, temperature, kind)


# -- the teacher -------------------------------------------------------------------------------------------------------

def check(config):
    """BadInput for knobs of train.py with which there is nothing to distil. Returns whether the run distils."""
    check_values(config, dict(kd_divergence=DIVERGENCES), dict(kd_alpha=(0, 1), kd_temperature=(1e-3, math.inf)))
    return bool(config['teacher'] or config['kd_cache'])


def find_teacher(path, vocab_size, tokenizer, knob='teacher'):
    """hf.find_model of a teacher (or another model that `knob` names). BadInput when its tokenizer or vocabulary is not the student's.

    vocab_size: rows of the student's table; tokenizer: of the shards, as meta.json records it, None: unknown.
    """
    about = hf.find_model(path)
    if tokenizer is not None and about['fingerprint'] not in (None, tokenizer['fingerprint']):
        theirs = path if isinstance(about['tokenizer'], BadInput) else about['tokenizer'].path
        raise BadInput(f"{knob} = '{path}' has the tokenizer {theirs} ({about['fingerprint']}), the shards have {tokenizer['name']} "
                       f"({tokenizer['fingerprint']}): the two must have the same. Prepare the sources with its tokenizer, or take another "
                       'model.')
    if about['model'].vocab_size != vocab_size:
        raise BadInput(f"{knob} = '{path}' has a vocabulary of {about['model'].vocab_size:,} rows, this run of {vocab_size:,}. Set vocab_size = "
                       f"{about['model'].vocab_size}, or take another model.")
    return about


def weights_fingerprint(about):
    """16 hex digits over a model's shape and the ends and sizes of its weight files: another model gives others."""
    digest = hashlib.sha256(repr(sorted(asdict(about['model']).items())).encode())
    folder = about['checkpoint'] or about['folder']
    for name in sorted(n for n in storage.names(folder) if n.endswith(('.distcp', '.safetensors'))):
        with fsspec.open(os.path.join(folder, name), 'rb') as f:
            size = f.seek(0, os.SEEK_END)
            digest.update(f'{name} {size}'.encode())
            for at in (0, size // 2, max(0, size - 2**16)):
                f.seek(at)
                digest.update(f.read(2**16))
    return digest.hexdigest()[:16]


def open_teacher(about, device, dtype, layout=None, compile_blocks=False):
    """The teacher, frozen, in `dtype`, spread over the ranks like the student (None: whole on this process). BadInput when it cannot be divided so."""
    if layout is not None:
        ranks.check_sizes({**layout.sizes, 'ep': layout.sizes['ep'] if about['model'].n_expert else 1}, about['model'], whose='the teacher: ')
    with torch.device('meta'):
        model = GPT(about['model']).frozen(dtype)
    parallel.apply_parallelism(model, layout, dtype, compile_blocks)
    model.to_empty(device=device)
    hf.load_weights(about, model)
    return model.eval()


class Distiller:
    """Makes the objective of every micro-batch and adds up what is logged; `teacher` is a GPT, or None with caches by source."""

    def __init__(self, config, teacher, caches, sources, device):
        """config: train.py's knobs; caches: source name -> Cache; sources: the loader's."""
        self.teacher, self.caches, self.device = teacher, caches, device
        self.sources = sources
        self.cached_sources = list(caches)
        rests = [cache.rest for cache in caches.values() if cache.rest is not None]
        self.rest = torch.stack(rests).to(device) if rests else None           # (sources, V)
        self.options = dict(alpha=config['kd_alpha'], temperature=config['kd_temperature'], kind=config['kd_divergence'])
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)         # D, teacher's loss, agreement; zeroed by `take`

    def objective(self, inputs, doc_ids, source_index, cursors, counted):
        """For `GPT.loss` on this micro-batch: inputs (B, T), document ids or None; source_index, cursors (B,): where the rows are from; counted: as
        given to `GPT.loss`."""
        if self.teacher is None:
            sources = [self.sources[i] for i in source_index]
            teacher = read_cached([self.caches[s.name].window(s.window(cursor)) for s, cursor in zip(sources, cursors)],
                                  [self.cached_sources.index(s.name) for s in sources], self.rest, self.device)
            teacher = teacher if counted is None else teacher.part(counted)
        else:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                hidden = self.teacher(inputs, doc_ids).flatten(0, 1)                     # (N, C_t)
                weight = parallel.full_tensor(self.teacher.output_weight)
                teacher = hidden if counted is None else hidden[counted], ranks.collect(weight, self.teacher.tp) if self.teacher.tp else weight

        def loss(h, weight, targets, token_weights):
            total, found = distillation_loss(h, weight, targets, token_weights, teacher=teacher, **self.options)
            self.sums += torch.stack((found[0], found[3], found[4])).sum(1, dtype=torch.float64)
            return total, found[1], found[2].bool()
        return loss

    def take(self):
        """The sums since the last call over this rank's counted tokens: (3,) fp64."""
        sums, self.sums = self.sums, torch.zeros_like(self.sums)
        return sums


def metrics(sums, n_valid):
    """What is logged of a step: sums over all ranks of what `Distiller.take` gives, and the number of counted tokens."""
    return {name: x / n_valid for name, x in zip(('kd/loss', 'kd/teacher_loss', 'kd/teacher_agreement'), sums)}


# -- knobs of the command line --
teacher = ''                            # run folder, checkpoint, Hugging Face folder or hub name
source = ''                             # source(s) to cache the training split of, with commas
name = 'teacher'                        # the cache is data_dir/<source>/kd/<name>/; --kd_cache=<name> in train.py
data_dir = 'data'                       # folder of the sources
block_size = 2048                       # tokens of a row, as in the run that reads it; so are the next three
packing = 'window'                      # window | document
overlong = 'truncate'                   # packing='document': documents longer than a row, truncate | drop
document_mask = False                   # packing='window': attention stays within a document
k = 64                                  # likeliest ids of a token that are kept; 0: none
draws = 16                              # ids drawn from all the others; 0: none, the others are then known by their mean over the source
temperature = 1.0                       # kd_temperature of the run that reads it
seed = 1337                             # of the draws
batch_size = 4                          # rows at a time
device = 'auto'                         # auto | cpu | cuda
dtype = 'auto'                          # of the teacher: auto | float32 | bfloat16

if __name__ == '__main__':
    command = sys.argv[1] if len(sys.argv) > 1 else '--help'
    config = configure(globals(), sys.argv[2:] if command == 'cache' else sys.argv[1:] or ['--help'], verbose=False)
    if command != 'cache' or not teacher or not source:
        raise BadInput('say `kd.py cache --teacher=... --source=...`.')
    import teacher_cache
    teacher_cache.write(config)
