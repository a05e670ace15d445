"""Triton kernels for what lies between the matrix products, each beside its PyTorch reference, which is the CPU's path and the truth.

    losses      softmax_gradient_ (cross-entropy; in two steps for a vocabulary over several ranks), divergence_gradient_ (distillation),
                cached_gradient_ (from a cache of top k): a chunk of logits becomes its gradient in place. ops/loss.py and kd.py have the products
    layers      rms_norm, add_rms_norm, rotate_heads (QK-norm and rotary positions), swiglu: for model.py
    influence   bilinear, row_sqnorms: what a row's gradient of a linear layer has with a direction, and its squared norm

fp32 or bf16 in, sums in fp32, no atomics, so the same input gives the same bits; any sizes. `use` chooses: 'triton', 'torch', or
'auto', which is Triton on CUDA, but for layers inside torch.compile, which fuses the references into what stands around them. Every
launch is an operator of torch.library that fills tensors it is given, so compiled graphs pass through.

Letters in shape comments: N tokens, V vocab_size, C n_embd, H heads, D head_dim, B rows, T positions, I and O a layer's inputs and outputs.
"""
import contextlib
import math
import os
import shutil

import torch
import torch.nn.functional as F
from torch import Tensor

from configurator import BadInput

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:             # no Triton for this system: the references below are all there is
    triton, jit = None, lambda function: function

    class tl:
        constexpr = object

MODES = ('auto', 'triton', 'torch')
DIVERGENCES = ('forward', 'reverse', 'js')      # the teacher's and the student's distributions; kernels know them by number
INTERPRETED = triton is not None and os.environ.get('TRITON_INTERPRET') == '1'       # kernels run in Python, on CPU tensors
COMPILER = os.environ.get('CC') or shutil.which('gcc') or shutil.which('clang')
MISSING = 'Triton is not installed' if triton is None else None if COMPILER or INTERPRETED else 'Triton needs a C compiler, gcc or clang'
CACHED_MOST = 256               # tokens that a cache names at most for its kernel, which compares each with each
PROGRAMS = 1024                 # of a norm's backward at most, each with a row of the weight's gradient
mode, hooked = 'auto', False


def use(asked, device):
    """From now on kernels are chosen by `asked` (MODES). Returns in words what that is on `device`. BadInput for Triton where it cannot be."""
    global mode
    if asked not in MODES:
        raise BadInput(f"kernels = '{asked}' must be one of {', '.join(MODES)}.")
    on_gpu = device.type == 'cuda'
    if asked == 'triton' and MISSING:
        raise BadInput(f"kernels = 'triton': {MISSING}. Install it, or use kernels=auto.")
    if asked == 'triton' and not on_gpu and not INTERPRETED:
        raise BadInput("kernels = 'triton' needs a CUDA device, and this run has none. Use kernels=auto.")
    mode = asked
    if asked == 'auto' and on_gpu and MISSING:
        return f'torch ({MISSING}: slower)'
    return 'triton' if asked == 'triton' or asked == 'auto' and on_gpu else 'torch'


def by_triton(x, fusable=False):
    """Whether a kernel takes tensor x. fusable: torch.compile fuses the reference with its neighbours."""
    if mode == 'torch' or MISSING or x.dtype == torch.float64:
        return False
    if mode == 'triton':
        return x.is_cuda or INTERPRETED
    return x.is_cuda and not (fusable and torch.compiler.is_compiling())


def across_modules(x):
    """Whether a kernel does what several modules would, whose hooks then see nothing."""
    return not hooked and by_triton(x, fusable=True)


@contextlib.contextmanager
def modules_alone():
    """Within it every module is called, for the sake of hooks."""
    global hooked
    before, hooked = hooked, True
    try:
        yield
    finally:
        hooked = before


def operator(*filled):
    """Registers a function that launches a kernel, and fills the tensors of these names, with torch.library."""
    return lambda function: torch.library.custom_op(f'cheapertraining::{function.__name__}', function, mutates_args=filled)


def next_power_of_2(n):
    return 1 << (n - 1).bit_length()


def vocabulary_block(V, most, warps=8):
    """Launch options for rows of V: every thread has elements of its own, none a copy of another's, for rows are written over in place."""
    block = min(most, max(32, next_power_of_2(V)))
    return dict(BLOCK=block, num_warps=min(warps, block // 32))


# -- cross-entropy -----------------------------------------------------------------------------------------------------

@jit
def add_to_lanes(x, m, s, inverse):
    """Adds exp((x - m) * inverse) to the sums of a block's lanes at the cost of one exponential. m: largest x so far, s relative to it."""
    gap = x - m
    e = tl.exp(-tl.abs(gap) * inverse)
    return tl.maximum(m, x), tl.where(gap > 0, s * e + 1.0, s + e)


@jit
def cross_entropy_kernel(logits, targets, lse, loss, hit, top, V, STATISTICS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row. Statistics alone leave (lse, top, logit at the target in `loss`) of this part of the vocabulary."""
    row, cols = tl.program_id(0), tl.arange(0, BLOCK)
    z, target = logits + row.to(tl.int64) * V, tl.load(targets + row)
    if STATISTICS:
        inside = (target >= 0) & (target < V)
        at_target = tl.load(z + target, mask=inside, other=-float('inf')).to(tl.float32)      # here, before any thread may write it over
        m, s = tl.full((BLOCK,), -1e30, tl.float32), tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            x = tl.load(z + start + cols, mask=start + cols < V, other=-float('inf')).to(tl.float32)
            m, s = add_to_lanes(x, m, s, 1.0)
        largest = tl.max(m, 0)
        log_sum = largest + tl.log(tl.sum(s * tl.exp(m - largest), 0))
        tl.store(lse + row, log_sum)
        if GRADIENT:
            tl.store(loss + row, tl.where(inside, log_sum - at_target, 0.0))
            tl.store(hit + row, inside & (at_target == largest))
        else:
            tl.store(loss + row, at_target)
            tl.store(top + row, largest)
    else:
        log_sum = tl.load(lse + row)
    if GRADIENT:
        for start in range(0, V, BLOCK):
            here = start + cols < V
            x = tl.load(z + start + cols, mask=here, other=-float('inf')).to(tl.float32)
            p = tl.exp(x - log_sum) - tl.where(start + cols == target, 1.0, 0.0)
            tl.store(z + start + cols, p.to(logits.dtype.element_ty), mask=here)


@operator('logits', 'lse', 'loss', 'hit', 'top')
def cross_entropy(logits: Tensor, targets: Tensor, lse: Tensor, loss: Tensor, hit: Tensor, top: Tensor, statistics: bool, gradient: bool) -> None:
    n, V = logits.shape
    cross_entropy_kernel[(n,)](logits, targets, lse, loss, hit, top, V, statistics, gradient, **vocabulary_block(V, 4096))


def softmax_statistics(logits, targets):
    """Of a part of the vocabulary, logits (n, V_part), targets (n,) counted from its first token (outside of [0, V_part): in another part):
    (lse, largest logit, logit at the target or -inf), (n,) fp32 each."""
    n, V = logits.shape
    if by_triton(logits):
        lse, at_target, top = (torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(3))
        cross_entropy(logits, targets, lse, at_target, torch.empty_like(lse, dtype=torch.bool), top, True, False)
        return lse, top, at_target
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    inside = (targets >= 0) & (targets < V)
    at_target = z.gather(1, targets.clamp(0, V - 1)[:, None])[:, 0].masked_fill(~inside, -math.inf)
    return z.logsumexp(1), z.amax(1), at_target


def softmax_gradient_(logits, targets, wanted=True):
    """Losses of a chunk of logits, which become their gradient, unscaled, in place (`wanted`; else what is left in them means nothing).

    logits (n, V) fp32 or bf16, contiguous; targets (n,) int64 in [0, V)
    Returns losses (n,) nats, hits (n,) bool (the target has the largest logit, a tie counts), scale (n, 1): logits * scale is then
    d losses / d logits. All but logits in fp32 (fp64 of fp64).
    """
    (n, V), device = logits.shape, logits.device
    high = torch.promote_types(logits.dtype, torch.float32)
    losses, hits = torch.empty(n, dtype=high, device=device), torch.empty(n, dtype=torch.bool, device=device)
    if by_triton(logits) and not wanted:
        lse, largest, at_target = softmax_statistics(logits, targets)
        return lse - at_target, at_target == largest, torch.ones(n, 1, dtype=high, device=device)
    if by_triton(logits):
        cross_entropy(logits, targets, torch.empty_like(losses), losses, hits, torch.empty_like(losses), True, True)
        return losses, hits, torch.ones(n, 1, dtype=high, device=device)
    sums = torch.empty(n, 1, dtype=high, device=device)
    strip = n if logits.is_cuda else max(1, 2**20 // V)         # on the CPU the passes over a strip stay in its cache
    for i in range(0, n, strip):
        here = slice(i, min(i + strip, n))
        z, target = logits[here].to(high), targets[here, None]
        target_logit, largest = z.gather(1, target), z.amax(1, keepdim=True)                 # (strip, 1)
        z.sub_(largest).exp_()
        total = sums[here].copy_(z.sum(1, keepdim=True))
        losses[here] = (largest + total.log() - target_logit)[:, 0]
        hits[here] = (target_logit == largest)[:, 0]
        if wanted:                                              # `total` times the gradient, softmax - one-hot: scaled when it has C columns, not V
            z.scatter_add_(1, target, -total)
            logits[here] = z
    return losses, hits, sums.reciprocal_()


def softmax_gradient_from_(logits, targets, lse):
    """The second step over parts of the vocabulary, after `softmax_statistics`: logits (n, V_part) become softmax - one-hot in place, lse (n,) over the whole vocabulary; targets as before."""
    n, V = logits.shape
    if by_triton(logits):
        unused = torch.empty_like(lse)
        cross_entropy(logits, targets, lse, unused, torch.empty_like(lse, dtype=torch.bool), torch.empty_like(lse), False, True)
        return
    p = (logits - lse[:, None]).exp_()
    inside = (targets >= 0) & (targets < V)
    p.scatter_add_(1, targets.clamp(0, V - 1)[:, None], -inside.to(p.dtype)[:, None])
    logits.copy_(p)


# -- distillation ------------------------------------------------------------------------------------------------------

@jit
def read_student(z, V, inverse, SOFT: tl.constexpr, BLOCK: tl.constexpr):
    """(largest logit, its first index, log-sum-exp at the temperature, log-sum-exp at 1) of a row."""
    cols = tl.arange(0, BLOCK)
    m, index = tl.full((BLOCK,), -1e30, tl.float32), tl.zeros((BLOCK,), tl.int32)
    s, s1 = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(z + start + cols, mask=start + cols < V, other=-float('inf')).to(tl.float32)
        index = tl.where(x > m, start + cols, index)
        if SOFT:
            _, s = add_to_lanes(x, m, s, inverse)
        m, s1 = add_to_lanes(x, m, s1, 1.0)
    top = tl.max(m, 0)
    first = tl.min(tl.where(m == top, index, V), 0)
    lz1 = top + tl.log(tl.sum(s1 * tl.exp(m - top), 0))
    lz = lz1
    if SOFT:
        lz = top * inverse + tl.log(tl.sum(s * tl.exp((m - top) * inverse), 0))
    return top, first, lz, lz1


@jit
def gap_of(x, y, lz, ly, inverse, KIND: tl.constexpr):
    """Per outcome: (part of D, part of c that depends on it; see kd.divergence). Outcomes beyond the vocabulary are -inf in both: 0."""
    lp, lq = x * inverse - lz, y * inverse - ly
    p, q = tl.exp(lp), tl.exp(lq)
    if KIND == 0:
        return tl.where(q > 0, q * (lq - lp), 0.0), p - q
    if KIND == 1:
        d = tl.where(p > 0, p * (lp - lq), 0.0)
        return d, d
    most = tl.maximum(lp, lq)
    lm = most + tl.log(0.5 + 0.5 * tl.exp(-tl.abs(lp - lq)))
    c = tl.where(p > 0, 0.5 * p * (lp - lm), 0.0)
    return c + tl.where(q > 0, 0.5 * q * (lq - lm), 0.0), c


@jit
def divergence_kernel(student, teacher, targets, found, N, V, alpha, temperature, KIND: tl.constexpr, SOFT: tl.constexpr, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0), tl.arange(0, BLOCK)
    z, y = student + row.to(tl.int64) * V, teacher + row.to(tl.int64) * V
    target, inverse = tl.load(targets + row), 1.0 / temperature
    at_target = tl.load(z + target).to(tl.float32)
    top, first, lz, lz1 = read_student(z, V, inverse, SOFT, BLOCK)
    their_top, _, ly, ly1 = read_student(y, V, inverse, SOFT, BLOCK)
    d, c = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if KIND > 0:                                              # the gradient p * (c / p - sum of c) needs the sum first
        for start in range(0, V, BLOCK):
            here = start + cols < V
            x = tl.load(z + start + cols, mask=here, other=-float('inf')).to(tl.float32)
            x2 = tl.load(y + start + cols, mask=here, other=-float('inf')).to(tl.float32)
            d_part, c_part = gap_of(x, x2, lz, ly, inverse, KIND)
            d, c = d + tl.where(here, d_part, 0.0), c + tl.where(here, c_part, 0.0)
    c_sum = tl.sum(c, 0)
    for start in range(0, V, BLOCK):
        here = start + cols < V
        x = tl.load(z + start + cols, mask=here, other=-float('inf')).to(tl.float32)
        x2 = tl.load(y + start + cols, mask=here, other=-float('inf')).to(tl.float32)
        d_part, g = gap_of(x, x2, lz, ly, inverse, KIND)
        if KIND == 0:
            d += tl.where(here, d_part, 0.0)
        else:
            g -= tl.exp(x * inverse - lz) * c_sum
        g = alpha * temperature * g + (1 - alpha) * (tl.exp(x - lz1) - tl.where(start + cols == target, 1.0, 0.0))
        tl.store(z + start + cols, g.to(student.dtype.element_ty), mask=here)
    tl.store(found + row, tl.sum(d, 0))
    tl.store(found + N + row, lz1 - at_target)
    tl.store(found + 2 * N + row, tl.where(at_target == top, 1.0, 0.0))
    tl.store(found + 3 * N + row, ly1 - tl.load(y + target).to(tl.float32))
    tl.store(found + 4 * N + row, tl.where(tl.load(y + first).to(tl.float32) == their_top, 1.0, 0.0))


@operator('student', 'found')
def divergence_gradient_(student: Tensor, teacher: Tensor, targets: Tensor, found: Tensor, alpha: float, temperature: float, kind: int) -> None:
    """Student's logits (n, V) become the gradient of alpha * T^2 * D + (1 - alpha) * cross-entropy; teacher (n, V); targets (n,) in [0, V).

    found (5, n) fp32 gets D, the student's loss and hit, the teacher's loss, agreement. kind: number in kd.DIVERGENCES. Its reference is kd.strip_gradient.
    """
    n, V = student.shape
    divergence_kernel[(n,)](student, teacher, targets, found, n, V, alpha, temperature, kind, temperature != 1, **vocabulary_block(V, 2048))


@jit
def cached_kernel(student, ids, q, targets, found, top_id, N, V, W, alpha, temperature, SOFT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr):
    row, cols, w = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, BLOCK_W)
    z, target, inverse = student + row.to(tl.int64) * V, tl.load(targets + row), 1.0 / temperature
    given = w < W
    at = tl.load(ids + row.to(tl.int64) * W + w, mask=given, other=-1)
    mass = tl.load(q + row.to(tl.int64) * W + w, mask=given, other=0.0)
    zi = tl.load(z + at, mask=given, other=0.0).to(tl.float32)
    at_target = tl.load(z + target).to(tl.float32)
    top, first, lz, lz1 = read_student(z, V, inverse, SOFT, BLOCK)
    for start in range(0, V, BLOCK):
        here = start + cols < V
        x = tl.load(z + start + cols, mask=here, other=-float('inf')).to(tl.float32)
        g = alpha * temperature * tl.exp(x * inverse - lz) + (1 - alpha) * (tl.exp(x - lz1) - tl.where(start + cols == target, 1.0, 0.0))
        tl.store(z + start + cols, g.to(student.dtype.element_ty), mask=here)
    tl.debug_barrier()                                        # the cached ids are written again, by other threads
    together = tl.sum(tl.where(at[:, None] == at[None, :], mass[None, :], 0.0), 1)           # an id may have been drawn several times
    g = alpha * temperature * (tl.exp(zi * inverse - lz) - together) + (1 - alpha) * (tl.exp(zi - lz1) - tl.where(at == target, 1.0, 0.0))
    tl.store(z + at, g.to(student.dtype.element_ty), mask=given)
    tl.store(found + row, tl.sum(mass * (zi * inverse - lz), 0))
    tl.store(found + N + row, lz1 - at_target)
    tl.store(found + 2 * N + row, tl.where(at_target == top, 1.0, 0.0))
    tl.store(top_id + row, first)


@operator('student', 'found', 'top_id')
def cached_gradient_(student: Tensor, ids: Tensor, q: Tensor, targets: Tensor, found: Tensor, top_id: Tensor, alpha: float, temperature: float) -> None:
    """The same for forward KL against probabilities q (n, W) fp32 of ids (n, W) int64, which may repeat: they add up.

    found (3, n) fp32 gets sum of q log p, the student's loss and hit; top_id (n,) int32 its likeliest token. Its reference is kd.against_cache.
    """
    (n, V), W = student.shape, ids.shape[1]
    cached_kernel[(n,)](student, ids, q, targets, found, top_id, n, V, W, alpha, temperature, temperature != 1,
                        BLOCK_W=max(16, next_power_of_2(W)), **vocabulary_block(V, 4096, 16))


# -- norms -------------------------------------------------------------------------------------------------------------

@jit
def rms_norm_kernel(x, residual, weight, out, total, C, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    here = cols < C
    a = tl.load(x + row * C + cols, mask=here, other=0.0).to(tl.float32)
    if ADD:
        a += tl.load(residual + row * C + cols, mask=here, other=0.0).to(tl.float32)
        rounded = a.to(total.dtype.element_ty)
        tl.store(total + row * C + cols, rounded, mask=here)
        a = rounded.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(a * a, 0) / C + eps)
    gain = tl.load(weight + cols, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * C + cols, (a * r * gain).to(out.dtype.element_ty), mask=here)


@jit
def rms_norm_backward_kernel(total, weight, dout, dtotal, dx, dweight, N, C, eps, ROWS, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """A program takes ROWS rows and leaves one row of the weight's gradient, to be summed."""
    program, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    gain, dgain = tl.load(weight + cols, mask=cols < C, other=0.0).to(tl.float32), tl.zeros((BLOCK,), tl.float32)
    for i in range(0, ROWS):
        row = program * ROWS + i
        here = cols < tl.where(row < N, C, 0)
        a = tl.load(total + row * C + cols, mask=here, other=0.0).to(tl.float32)
        g = tl.load(dout + row * C + cols, mask=here, other=0.0).to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(a * a, 0) / C + eps)
        a *= r
        dgain += g * a
        g *= gain
        d = r * (g - a * (tl.sum(g * a, 0) / C))
        if ADD:
            d += tl.load(dtotal + row * C + cols, mask=here, other=0.0).to(tl.float32)
        tl.store(dx + row * C + cols, d.to(dx.dtype.element_ty), mask=here)
    tl.store(dweight + program * C + cols, dgain, mask=cols < C)


def row_warps(n_columns):
    return 4 if n_columns <= 1024 else 8


@operator('out', 'total')
def rms_norm_forward(x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, total: Tensor, eps: float, add: bool) -> None:
    C = x.shape[-1]
    rms_norm_kernel[(x.numel() // C,)](x, residual, weight, out, total, C, eps, add, BLOCK=next_power_of_2(C), num_warps=row_warps(C))


@operator('dx', 'dweight')
def rms_norm_backward(total: Tensor, weight: Tensor, dout: Tensor, dtotal: Tensor, dx: Tensor, dweight: Tensor, eps: float, add: bool) -> None:
    C, programs = total.shape[-1], len(dweight)
    N = total.numel() // C
    rms_norm_backward_kernel[(programs,)](total, weight, dout, dtotal, dx, dweight, N, C, eps, -(-N // programs), add, BLOCK=next_power_of_2(C),
                                          num_warps=row_warps(C))


class _RMSNorm(torch.autograd.Function):
    """Keeps its input (the sum) alone: the root mean square is taken again in the backward."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        x = x.contiguous()
        residual = None if residual is None else residual.contiguous()
        out, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
        rms_norm_forward(x, x if residual is None else residual, weight, out, torch.empty_like(x) if residual is None else total, eps, residual is not None)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.add = eps, residual is not None
        return (out, total) if ctx.add else out

    @staticmethod
    def backward(ctx, dout, dtotal=None):
        total, weight = ctx.saved_tensors
        dout = dout.contiguous()
        dtotal = dtotal.contiguous() if ctx.add else dout
        dx = torch.empty_like(total)
        dweight = torch.empty(max(1, min(PROGRAMS, total.numel() // total.shape[-1])), total.shape[-1], dtype=torch.float32, device=total.device)
        rms_norm_backward(total, weight, dout, dtotal, dx, dweight, ctx.eps, ctx.add)
        return dx, dx if ctx.add else None, dweight.sum(0).to(weight.dtype), None


def rms_norm(x, weight, eps):
    """x / rms(x) * weight over the last dimension, the mean square in fp32. x (..., C), weight (C,) or None (1 everywhere). Zhang & Sennrich 2019."""
    if weight is not None and by_triton(x, fusable=True):
        return _RMSNorm.apply(x, None, weight, eps)
    with torch.autocast(x.device.type, enabled=False):      # from torch 2.12 on, CUDA's autocast would return fp32
        return F.rms_norm(x, (x.shape[-1],), None if weight is None else weight.to(x.dtype), eps)


def add_rms_norm(x, residual, weight, eps):
    """(rms_norm(x + residual), x + residual) in one pass. x, residual (..., C) of one dtype."""
    if by_triton(x, fusable=True):
        return _RMSNorm.apply(x, residual, weight, eps)
    total = x + residual
    return rms_norm(total, weight, eps), total


# -- queries and keys --------------------------------------------------------------------------------------------------

@jit
def turn_heads(x, weight, cos, sin, out, H, D, eps, NORM: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """All heads of a token, (H, D) at x: normed, then rotated. cos, sin: this position's D numbers; sin's first half has the sign."""
    h, d, half = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :], D // 2
    here = (h < H) & (d < half)
    a = tl.load(x + h * D + d, mask=here, other=0.0).to(tl.float32)
    b = tl.load(x + h * D + half + d, mask=here, other=0.0).to(tl.float32)
    if NORM:
        r = 1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)
        a, b = a * r[:, None], b * r[:, None]
        if WEIGHT:
            a *= tl.load(weight + d, mask=d < half, other=0.0).to(tl.float32)
            b *= tl.load(weight + half + d, mask=d < half, other=0.0).to(tl.float32)
    c = tl.load(cos + d, mask=d < half, other=0.0).to(tl.float32)
    s = tl.load(sin + half + d, mask=d < half, other=0.0).to(tl.float32)
    tl.store(out + h * D + d, (a * c - b * s).to(out.dtype.element_ty), mask=here)
    tl.store(out + h * D + half + d, (b * c + a * s).to(out.dtype.element_ty), mask=here)


@jit
def turn_heads_back(x, weight, cos, sin, dout, dx, dweight, H, D, eps, NORM: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_H: tl.constexpr,
                    BLOCK_D: tl.constexpr):
    h, d, half = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :], D // 2
    here = (h < H) & (d < half)
    c = tl.load(cos + d, mask=d < half, other=0.0).to(tl.float32)
    s = tl.load(sin + half + d, mask=d < half, other=0.0).to(tl.float32)
    u = tl.load(dout + h * D + d, mask=here, other=0.0).to(tl.float32)
    v = tl.load(dout + h * D + half + d, mask=here, other=0.0).to(tl.float32)
    ga, gb = u * c + v * s, v * c - u * s
    if NORM:
        a = tl.load(x + h * D + d, mask=here, other=0.0).to(tl.float32)
        b = tl.load(x + h * D + half + d, mask=here, other=0.0).to(tl.float32)
        r = 1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)
        a, b = a * r[:, None], b * r[:, None]
        if WEIGHT:
            inside = tl.arange(0, BLOCK_D) < half
            tl.store(dweight + tl.arange(0, BLOCK_D), tl.sum(ga * a, 0), mask=inside)
            tl.store(dweight + half + tl.arange(0, BLOCK_D), tl.sum(gb * b, 0), mask=inside)
            ga *= tl.load(weight + d, mask=d < half, other=0.0).to(tl.float32)
            gb *= tl.load(weight + half + d, mask=d < half, other=0.0).to(tl.float32)
        mean = (tl.sum(ga * a, 1) + tl.sum(gb * b, 1)) / D
        ga, gb = r[:, None] * (ga - a * mean[:, None]), r[:, None] * (gb - b * mean[:, None])
    tl.store(dx + h * D + d, ga.to(dx.dtype.element_ty), mask=here)
    tl.store(dx + h * D + half + d, gb.to(dx.dtype.element_ty), mask=here)


@jit
def rotate_kernel(q, k, wq, wk, cos, sin, q_out, k_out, T, H, K, D, eps, NORM: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_H: tl.constexpr,
                  BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = token % T * D
    turn_heads(q + token * H * D, wq, cos + at, sin + at, q_out + token * H * D, H, D, eps, NORM, WEIGHT, BLOCK_H, BLOCK_D)
    turn_heads(k + token * K * D, wk, cos + at, sin + at, k_out + token * K * D, K, D, eps, NORM, WEIGHT, BLOCK_K, BLOCK_D)


@jit
def rotate_backward_kernel(q, k, wq, wk, cos, sin, dq_out, dk_out, dq, dk, dweights, T, H, K, D, eps, NORM: tl.constexpr, WEIGHT: tl.constexpr,
                           BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at, qt, kt, dw = token % T * D, token * H * D, token * K * D, dweights + token * 2 * D
    turn_heads_back(q + qt, wq, cos + at, sin + at, dq_out + qt, dq + qt, dw, H, D, eps, NORM, WEIGHT, BLOCK_H, BLOCK_D)
    turn_heads_back(k + kt, wk, cos + at, sin + at, dk_out + kt, dk + kt, dw + D, K, D, eps, NORM, WEIGHT, BLOCK_K, BLOCK_D)


def head_sizes(q, k):
    (B, T, H, D), K = q.shape, k.shape[2]
    return B * T, (T, H, K, D), dict(BLOCK_H=next_power_of_2(H), BLOCK_K=next_power_of_2(K), BLOCK_D=next_power_of_2(D // 2))


@operator('q_out', 'k_out')
def rotate_forward(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, k_out: Tensor, eps: float, norm: bool,
                   weight: bool) -> None:
    n, sizes, sized = head_sizes(q, k)
    rotate_kernel[(n,)](q, k, wq, wk, cos, sin, q_out, k_out, *sizes, eps, norm, weight, **sized)


@operator('dq', 'dk', 'dweights')
def rotate_backward(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor, dq_out: Tensor, dk_out: Tensor, dq: Tensor, dk: Tensor,
                    dweights: Tensor, eps: float, norm: bool, weight: bool) -> None:
    n, sizes, sized = head_sizes(q, k)
    rotate_backward_kernel[(n,)](q, k, wq, wk, cos, sin, dq_out, dk_out, dq, dk, dweights, *sizes, eps, norm, weight, **sized)


class _RotateHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, wq, wk, cos, sin, eps, norm):
        q, k, cos, sin = (t.contiguous() for t in (q, k, cos, sin))
        q_out, k_out, weight = torch.empty_like(q), torch.empty_like(k), wq is not None
        gains = (wq, wk) if weight else (cos, cos)
        rotate_forward(q, k, *gains, cos, sin, q_out, k_out, eps, norm, weight)
        ctx.save_for_backward(q if norm else None, k if norm else None, *gains, cos, sin)      # a rotation alone needs neither
        ctx.options = eps, norm, weight
        return q_out, k_out

    @staticmethod
    def backward(ctx, dq_out, dk_out):
        q, k, wq, wk, cos, sin = ctx.saved_tensors
        weight, (B, T, _, D), dq_out, dk_out = ctx.options[2], dq_out.shape, dq_out.contiguous(), dk_out.contiguous()
        dq, dk = torch.empty_like(dq_out), torch.empty_like(dk_out)
        dweights = torch.empty((B * T, 2, D) if weight else (1,), dtype=torch.float32, device=dq.device)
        q, k = (dq_out, dk_out) if q is None else (q, k)
        rotate_backward(q, k, wq, wk, cos, sin, dq_out, dk_out, dq, dk, dweights, *ctx.options)
        dwq, dwk = dweights.sum(0).to(wq.dtype) if weight else (None, None)
        return dq, dk, dwq, dwk, None, None, None, None


def apply_rope(x, cos, sin):
    """Rotates x (..., T, heads, D) by cos, sin (T, D): first and second half of D are the pairs, as in Hugging Face."""
    half = x.shape[-1] // 2
    turned = torch.cat((x[..., half:], x[..., :half]), dim=-1)           # the sign of the swapped half sits in `sin`
    return x * cos[:, None] + turned * sin[:, None]


def rotate_heads(q, k, cos, sin, norm=False, wq=None, wk=None, eps=0.0):
    """Queries (B, T, H, D) and keys (B, T, K, D), each head normed (`norm`, with gains (D,) or None) and rotated by cos, sin (T, D)."""
    if by_triton(q, fusable=True):
        return _RotateHeads.apply(q, k, wq, wk, cos, sin, eps, norm)
    if norm:
        q, k = rms_norm(q, wq, eps), rms_norm(k, wk, eps)
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin)


# -- SwiGLU ------------------------------------------------------------------------------------------------------------

@jit
def swiglu_kernel(gate, up, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g, u = tl.load(gate + i, mask=i < n, other=0.0).to(tl.float32), tl.load(up + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(out + i, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=i < n)


@jit
def swiglu_backward_kernel(gate, up, dout, dgate, dup, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g, u = tl.load(gate + i, mask=i < n, other=0.0).to(tl.float32), tl.load(up + i, mask=i < n, other=0.0).to(tl.float32)
    d, s = tl.load(dout + i, mask=i < n, other=0.0).to(tl.float32), 1.0 / (1.0 + tl.exp(-g))
    tl.store(dgate + i, (d * u * s * (1.0 + g * (1.0 - s))).to(dgate.dtype.element_ty), mask=i < n)
    tl.store(dup + i, (d * g * s).to(dup.dtype.element_ty), mask=i < n)


@operator('out')
def swiglu_forward(gate: Tensor, up: Tensor, out: Tensor) -> None:
    swiglu_kernel[(-(-gate.numel() // 2048),)](gate, up, out, gate.numel(), BLOCK=2048, num_warps=8)


@operator('dgate', 'dup')
def swiglu_backward(gate: Tensor, up: Tensor, dout: Tensor, dgate: Tensor, dup: Tensor) -> None:
    swiglu_backward_kernel[(-(-gate.numel() // 2048),)](gate, up, dout, dgate, dup, gate.numel(), BLOCK=2048, num_warps=8)


class _SwiGLU(torch.autograd.Function):
    """Keeps gate and up alone."""

    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        swiglu_forward(gate, up, out)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx, dout):
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        swiglu_backward(gate, up, dout.contiguous(), dgate, dup)
        return dgate, dup


def swiglu(gate, up):
    """silu(gate) * up, any shape. Shazeer 2020 (arXiv:2002.05202)."""
    return _SwiGLU.apply(gate, up) if by_triton(gate, fusable=True) else F.silu(gate) * up


# -- gradients of rows -------------------------------------------------------------------------------------------------

WIDE = tl.constexpr(INTERPRETED) if triton else None          # the interpreter multiplies the bits of bf16


@jit
def dot(x, y, total):
    if WIDE:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, total, input_precision='ieee')


@jit
def bilinear_kernel(a, g, v, out, N, I, O, ROWS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    base, row = tl.program_id(0).to(tl.int64) * ROWS, tl.arange(0, ROWS)
    a, g, out = a + base * I, g + base * O, out + base
    left, i, total = tl.minimum(N - base, ROWS).to(tl.int32), tl.arange(0, BLOCK_I), tl.zeros((ROWS,), tl.float32)
    for first in range(0, O, BLOCK_O):
        o = first + tl.arange(0, BLOCK_O)
        product = tl.zeros((ROWS, BLOCK_O), tl.float32)
        for start in range(0, I, BLOCK_I):
            x = tl.load(a + row[:, None] * I + start + i[None, :], mask=(row[:, None] < left) & (start + i[None, :] < I), other=0.0)
            w = tl.load(v + o[None, :] * I + start + i[:, None], mask=(o[None, :] < O) & (start + i[:, None] < I), other=0.0)
            product = dot(x, w, product)
        y = tl.load(g + row[:, None] * O + o[None, :], mask=(row[:, None] < left) & (o[None, :] < O), other=0.0).to(tl.float32)
        total += tl.sum(product * y, 1)
    tl.store(out + row, total, mask=row < left)


@operator('out')
def bilinear_forward(a: Tensor, g: Tensor, v: Tensor, out: Tensor) -> None:
    (N, I), O = a.shape, g.shape[1]
    bilinear_kernel[(-(-N // 64),)](a, g, v, out, N, I, O, ROWS=64, BLOCK_O=64, BLOCK_I=32 if a.dtype == torch.float32 else 64)


def bilinear(a, g, v):
    """<g, v a> of every position: (..., ) fp32. a (..., I), g (..., O), v (O, I): what the gradient g a^T has with v, without the product v a in memory."""
    if by_triton(a):
        out = torch.empty(a.shape[:-1], dtype=torch.float32, device=a.device)
        bilinear_forward(a.flatten(0, -2).contiguous(), g.flatten(0, -2).to(a.dtype).contiguous(), v.to(a.dtype).contiguous(), out)
        return out
    return (g * F.linear(a, v.to(a.dtype))).sum(-1, dtype=torch.promote_types(g.dtype, torch.float32))


@jit
def position_pairs_kernel(a, g, out, T, I, O, TILES, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):
    """Sum over a tile of position pairs (s, t) of <a_s, a_t> <g_s, g_t>; a tile off the diagonal stands for its mirror image too."""
    b, pair = tl.program_id(1).to(tl.int64), tl.program_id(0)
    m, n = pair // TILES, pair % TILES
    a, g = a + b * T * I, g + b * T * O
    k, s, t = tl.arange(0, BLOCK), m * BLOCK_T + tl.arange(0, BLOCK_T), n * BLOCK_T + tl.arange(0, BLOCK_T)
    a_pairs, g_pairs = tl.zeros((BLOCK_T, BLOCK_T), tl.float32), tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    if n <= m:
        for start in range(0, I, BLOCK):
            x = tl.load(a + s[:, None] * I + start + k[None, :], mask=(s[:, None] < T) & (start + k[None, :] < I), other=0.0)
            y = tl.load(a + t[None, :] * I + start + k[:, None], mask=(t[None, :] < T) & (start + k[:, None] < I), other=0.0)
            a_pairs = dot(x, y, a_pairs)
        for start in range(0, O, BLOCK):
            x = tl.load(g + s[:, None] * O + start + k[None, :], mask=(s[:, None] < T) & (start + k[None, :] < O), other=0.0)
            y = tl.load(g + t[None, :] * O + start + k[:, None], mask=(t[None, :] < T) & (start + k[:, None] < O), other=0.0)
            g_pairs = dot(x, y, g_pairs)
    total = tl.sum(tl.sum(a_pairs * g_pairs, 1), 0)
    tl.store(out + b * TILES * TILES + pair, tl.where(n < m, 2.0 * total, total))


@jit
def gradient_tiles_kernel(a, g, out, T, I, O, TILES_I, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr):
    """Sum of squares of a tile of a row's gradient g^T a."""
    b, tile = tl.program_id(1).to(tl.int64), tl.program_id(0)
    o, i, k = tile // TILES_I * BLOCK_O + tl.arange(0, BLOCK_O), tile % TILES_I * BLOCK_I + tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_T)
    product, a, g = tl.zeros((BLOCK_O, BLOCK_I), tl.float32), a + b * T * I, g + b * T * O
    for start in range(0, T, BLOCK_T):
        t = start + k
        x = tl.load(g + t[None, :] * O + o[:, None], mask=(t[None, :] < T) & (o[:, None] < O), other=0.0)
        y = tl.load(a + t[:, None] * I + i[None, :], mask=(t[:, None] < T) & (i[None, :] < I), other=0.0)
        product = dot(x, y, product)
    tl.store(out + b * tl.num_programs(0) + tile, tl.sum(tl.sum(product * product, 1), 0))


@operator('out')
def row_norm_parts(a: Tensor, g: Tensor, out: Tensor, by_positions: bool) -> None:
    (B, T, I), O = a.shape, g.shape[2]
    step = 32 if a.dtype == torch.float32 else 64
    if by_positions:
        position_pairs_kernel[(out.shape[1], B)](a, g, out, T, I, O, -(-T // 64), BLOCK_T=64, BLOCK=step)
    else:
        gradient_tiles_kernel[(out.shape[1], B)](a, g, out, T, I, O, -(-I // 64), BLOCK_O=64, BLOCK_I=64, BLOCK_T=step)


def row_sqnorms(a, g):
    """Squared norms of the rows' gradients g_b^T a_b of a linear layer: (B,) fp32. a (B, T, I), g (B, T, O).

    From the T x T products of positions (the ghost norm, Li et al. 2021, arXiv:2110.05679, section 4) or from the gradient itself, whatever
    takes less work; by kernels neither is in memory, only sums over their tiles.
    """
    (B, T, I), O = a.shape, g.shape[-1]
    by_positions = T * (I + O) < I * O
    if by_triton(a):
        tiles = (-(-T // 64)) ** 2 if by_positions else -(-I // 64) * -(-O // 64)
        out = torch.empty(B, tiles, dtype=torch.float32, device=a.device)
        row_norm_parts(a.contiguous(), g.to(a.dtype).contiguous(), out, by_positions)
        return out.sum(1)
    high = torch.promote_types(a.dtype, torch.float32)
    if by_positions:
        return ((a @ a.transpose(1, 2)) * (g @ g.transpose(1, 2))).sum((1, 2), dtype=high)
    return torch.stack([(g[b].T @ a[b]).to(high).square().sum() for b in range(B)])
