"""Triton kernels for the work between matrix products, each beside its PyTorch reference.

The reference is the definition, and it is what runs on a CPU. `use` chooses between the two.

    losses      softmax_gradient_ (cross-entropy; in two steps for a vocabulary split over ranks),
                divergence_gradient_ and cached_gradient_ (distillation). Each replaces a chunk of
                logits by its gradient. ops/loss.py and kd.py do the matrix products around them.
    layers      rms_norm, add_rms_norm, rotate_heads (QK-norm and rotary positions), swiglu
    influence   bilinear and row_sqnorms: the inner product of a row's gradient of a linear layer
                with a direction, and the squared norm of that gradient

Inputs are fp32 or bf16 of any size, sums are fp32. There are no atomic additions, so the same
input gives the same bits. Every launch is an operator of torch.library that fills tensors it is
given: one node of a compiled graph.

Letters in shape comments: N tokens, V vocab_size, C n_embd, H heads, K key heads, D head_dim,
B rows, T positions, I and O inputs and outputs of a linear layer.
"""

import contextlib
import math
import os
import shutil

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from configurator import BadInput

try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.language import constexpr
except ImportError:
    # Triton does not exist for every system. The definitions below must still be importable.
    triton = constexpr = None

    def jit(function):
        return function


Tensors = list[Tensor]

MODES = ('auto', 'triton', 'torch')
# between the teacher's and the student's distributions; kernels know them by their index
DIVERGENCES = ('forward', 'reverse', 'js')
# with TRITON_INTERPRET=1 the kernels run in Python, on CPU tensors
INTERPRETED = triton is not None and os.environ.get('TRITON_INTERPRET') == '1'
# the reason why kernels cannot run on this system, or None
MISSING = None
if triton is None:
    MISSING = 'Triton is not installed'
elif not (INTERPRETED or os.environ.get('CC') or shutil.which('gcc') or shutil.which('clang')):
    MISSING = 'Triton needs a C compiler, gcc or clang'
# Cached tokens per position that cached_gradient_ can take. It compares each one with every other.
CACHED_MOST = 256
# Programs of a norm's backward. Each one writes a row of the weight's gradient.
PROGRAMS = 1024

mode = 'auto'
# What `modules_alone` sets.
hooked = False
by_reference = False


def use(asked, device):
    """Sets how kernels are chosen from now on, and returns 'triton' or 'torch' for `device`.

    asked   'triton', 'torch' (the references), or 'auto': Triton on CUDA. Inside torch.compile
            'auto' takes the references of layers, which the compiler fuses with their neighbours.
    Raises BadInput if `asked` is unknown, or is 'triton' where Triton cannot run.
    """
    global mode
    if asked not in MODES:
        raise BadInput(f"kernels = '{asked}' must be one of {', '.join(MODES)}.")
    on_gpu = device.type == 'cuda'
    if asked == 'triton' and MISSING:
        raise BadInput(f"kernels = 'triton': {MISSING}. Install it, or use kernels=auto.")
    if asked == 'triton' and not on_gpu and not INTERPRETED:
        raise BadInput("kernels = 'triton' needs a CUDA device and finds none. Use kernels=auto.")
    mode = asked
    if asked == 'triton':
        return 'triton'
    if asked == 'torch' or not on_gpu:
        return 'torch'
    return f'torch ({MISSING}: slower)' if MISSING else 'triton'


def by_triton(x, fusable=False):
    """Whether a kernel takes tensor x. fusable: torch.compile could fuse the reference."""
    # fp64 is for tests and finite differences: the kernels would round it to fp32.
    if mode == 'torch' or MISSING or x.dtype == torch.float64:
        return False
    if mode == 'triton':
        return x.is_cuda or INTERPRETED
    return x.is_cuda and not (fusable and (torch.compiler.is_compiling() or by_reference))


def across_modules(x):
    """Whether one kernel may do the work of several modules, which skips their hooks."""
    return not hooked and by_triton(x, fusable=True)


@contextlib.contextmanager
def modules_alone(references=False):
    """A context in which every module is called, so that forward hooks see all of them.

    references: with kernels='auto', layers take their references. In a run whose blocks are
    compiled, Triton would compile its kernels of layers for this context alone.
    """
    global hooked, by_reference
    before = hooked, by_reference
    hooked = True
    by_reference = references
    try:
        yield
    finally:
        hooked, by_reference = before


def vocabulary_launch(V, largest_block, warps=8):
    """Launch options for kernels that overwrite rows of V logits in place, block by block."""
    # A block has at least one element per thread. In a smaller one several threads would hold
    # copies of the same element, and one could read it after another has overwritten it.
    block = min(largest_block, max(32, triton.next_power_of_2(V)))
    return dict(BLOCK=block, num_warps=min(warps, block // 32))


@jit
def load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@jit
def load_logits(z, cols, V):
    return tl.load(z + cols, mask=cols < V, other=-float('inf')).to(tl.float32)


# -- cross-entropy ---------------------------------------------------------------------------------


@jit
def add_to_lanes(x, m, s, inverse):
    """Online softmax per lane: m is the largest x so far, s the sum of exp((x - m) * inverse)."""
    # Either the new term or the rescaling of the old sum is exp(0), so one exponential is enough.
    gap = x - m
    e = tl.exp(-tl.abs(gap) * inverse)
    return tl.maximum(m, x), tl.where(gap > 0, s * e + 1.0, s + e)


@jit
def cross_entropy_kernel(
    logits, targets, found, V, STATISTICS: constexpr, GRADIENT: constexpr, BLOCK: constexpr
):
    row = tl.program_id(0)
    n = tl.num_programs(0)
    # 64 bits: a chunk of 16,384 rows of a vocabulary of 131,072 has 2**31 logits.
    z = logits + row.to(tl.int64) * V
    cols = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    if STATISTICS:
        inside = (target >= 0) & (target < V)
        # This must come first: the loop of the gradient overwrites the logit at the target.
        at_target = tl.load(z + target, mask=inside, other=-float('inf')).to(tl.float32)
        m = tl.full((BLOCK,), -1e30, tl.float32)
        s = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            x = load_logits(z, start + cols, V)
            m, s = add_to_lanes(x, m, s, 1.0)
        largest = tl.max(m, 0)
        lse = largest + tl.log(tl.sum(s * tl.exp(m - largest), 0))
        tl.store(found + row, lse)
        if GRADIENT:
            hit = inside & (at_target == largest)
            tl.store(found + n + row, tl.where(inside, lse - at_target, 0.0))
            tl.store(found + 2 * n + row, tl.where(hit, 1.0, 0.0))
        else:
            tl.store(found + n + row, at_target)
            tl.store(found + 2 * n + row, largest)
    else:
        lse = tl.load(found + row)
    if GRADIENT:
        for start in range(0, V, BLOCK):
            x = load_logits(z, start + cols, V)
            p = tl.exp(x - lse) - tl.where(start + cols == target, 1.0, 0.0)
            tl.store(z + start + cols, p, mask=start + cols < V)


@custom_op('cheapertraining::cross_entropy', mutates_args=('logits', 'found'))
def cross_entropy(
    logits: Tensor, targets: Tensor, found: Tensor, statistics: bool, gradient: bool
) -> None:
    # found (3, n) fp32. Row 0 is the log-sum-exp: written with `statistics`, else read. With both
    # flags the other two are loss and hit. With `statistics` alone they are the logit at the target
    # (-inf if the target is outside of [0, V)) and the largest logit.
    n, V = logits.shape
    launch = vocabulary_launch(V, 4096)
    cross_entropy_kernel[(n,)](logits, targets, found, V, statistics, gradient, **launch)


def softmax_statistics(logits, targets):
    """First step of cross-entropy over one part of the vocabulary.

    logits   (n, V_part) fp32 or bf16, contiguous
    targets  (n,) int64, relative to the part's first token; outside of [0, V_part) in other parts
    Returns (log-sum-exp, largest logit, logit at the target or -inf), (n,) fp32 each.
    """
    n, V = logits.shape
    if by_triton(logits):
        found = torch.empty(3, n, dtype=torch.float32, device=logits.device)
        cross_entropy(logits, targets, found, True, False)
        return found[0], found[2], found[1]
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    inside = (targets >= 0) & (targets < V)
    at_target = z.gather(1, targets.clamp(0, V - 1)[:, None])[:, 0].masked_fill(~inside, -math.inf)
    return z.logsumexp(1), z.amax(1), at_target


def softmax_gradient_(logits, targets, wanted=True):
    """Losses of a chunk of logits, and its unscaled gradient in place.

    logits   (n, V) fp32 or bf16, contiguous; undefined afterwards if no gradient is `wanted`
    targets  (n,) int64 in [0, V)
    Returns (losses (n,) nats, hits (n,) bool, scale (n, 1)), fp32 or fp64 as the logits. A hit is a
    target with the largest logit, ties included. logits * scale is d losses / d logits.
    """
    n, V = logits.shape
    device = logits.device
    high = torch.promote_types(logits.dtype, torch.float32)
    if by_triton(logits):
        scale = torch.ones(n, 1, dtype=high, device=device)
        if not wanted:
            lse, largest, at_target = softmax_statistics(logits, targets)
            return lse - at_target, at_target == largest, scale
        found = torch.empty(3, n, dtype=high, device=device)
        cross_entropy(logits, targets, found, True, True)
        return found[1], found[2].bool(), scale
    losses = torch.empty(n, dtype=high, device=device)
    hits = torch.empty(n, dtype=torch.bool, device=device)
    sums = torch.empty(n, 1, dtype=high, device=device)
    # On a CPU all passes over a strip find it in the cache.
    strip = n if logits.is_cuda else max(1, 2**20 // V)
    for i in range(0, n, strip):
        here = slice(i, min(i + strip, n))
        z = logits[here].to(high)
        target = targets[here, None]
        target_logit = z.gather(1, target)  # (strip, 1)
        largest = z.amax(1, keepdim=True)  # (strip, 1)
        z.sub_(largest).exp_()
        total = sums[here].copy_(z.sum(1, keepdim=True))
        losses[here] = (largest + total.log() - target_logit)[:, 0]
        hits[here] = (target_logit == largest)[:, 0]
        if wanted:
            # `total` times softmax - one-hot: the caller scales later, C columns instead of V.
            z.scatter_add_(1, target, -total)
            logits[here] = z
    return losses, hits, sums.reciprocal_()


def softmax_gradient_from_(logits, targets, lse):
    """Second step over one part of the vocabulary: logits become softmax - one-hot in place.

    logits and targets as in `softmax_statistics`; lse (n,) fp32 over the full vocabulary.
    """
    V = logits.shape[1]
    if by_triton(logits):
        cross_entropy(logits, targets, lse[None], False, True)
        return
    p = (logits - lse[:, None]).exp_()
    inside = (targets >= 0) & (targets < V)
    p.scatter_add_(1, targets.clamp(0, V - 1)[:, None], -inside.to(p.dtype)[:, None])
    logits.copy_(p)


# -- distillation ----------------------------------------------------------------------------------


@jit
def read_row(z, V, inverse, SOFT: constexpr, BLOCK: constexpr):
    """Largest logit of a row, its first index, log-sum-exp at the temperature, log-sum-exp at 1."""
    cols = tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), -1e30, tl.float32)
    index = tl.zeros((BLOCK,), tl.int32)
    s = tl.zeros((BLOCK,), tl.float32)
    s1 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = load_logits(z, start + cols, V)
        index = tl.where(x > m, start + cols, index)
        if SOFT:
            _, s = add_to_lanes(x, m, s, inverse)
        m, s1 = add_to_lanes(x, m, s1, 1.0)
    top = tl.max(m, 0)
    # Each lane has the first index of its own maximum, so this is the first of all.
    first = tl.min(tl.where(m == top, index, V), 0)
    lz1 = top + tl.log(tl.sum(s1 * tl.exp(m - top), 0))
    lz = lz1
    if SOFT:
        lz = top * inverse + tl.log(tl.sum(s * tl.exp((m - top) * inverse), 0))
    return top, first, lz, lz1


@jit
def divergence_terms(x, y, lz, ly, inverse, KIND: constexpr):
    """A token's term of the divergence D, and of c, the part of the gradient that depends on it."""
    # kd.divergence has the formulae. Beyond the vocabulary both logits are -inf and both terms 0.
    lp = x * inverse - lz
    lq = y * inverse - ly
    p = tl.exp(lp)
    q = tl.exp(lq)
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
def mixed_gradient(g, x, lz1, is_target, alpha, temperature):
    """Gradient of alpha * T^2 * D + (1 - alpha) * cross-entropy. g: that of D by logits / T."""
    cross_entropy = tl.exp(x - lz1) - tl.where(is_target, 1.0, 0.0)
    return alpha * temperature * g + (1 - alpha) * cross_entropy


@jit
def divergence_kernel(
    student, teacher, targets, found, V, alpha, temperature,
    KIND: constexpr, SOFT: constexpr, BLOCK: constexpr
):
    row = tl.program_id(0)
    n = tl.num_programs(0)
    z = student + row.to(tl.int64) * V
    y = teacher + row.to(tl.int64) * V
    cols = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    inverse = 1.0 / temperature
    # Read now: the last loop overwrites the student's logits.
    at_target = tl.load(z + target).to(tl.float32)
    top, first, lz, lz1 = read_row(z, V, inverse, SOFT, BLOCK)
    teacher_top, _, ly, ly1 = read_row(y, V, inverse, SOFT, BLOCK)
    d = tl.zeros((BLOCK,), tl.float32)
    c = tl.zeros((BLOCK,), tl.float32)
    if KIND > 0:
        # The gradient p * (c / p - sum of c) needs the sum first.
        for start in range(0, V, BLOCK):
            here = start + cols < V
            x = load_logits(z, start + cols, V)
            x2 = load_logits(y, start + cols, V)
            d_part, c_part = divergence_terms(x, x2, lz, ly, inverse, KIND)
            d += tl.where(here, d_part, 0.0)
            c += tl.where(here, c_part, 0.0)
    c_sum = tl.sum(c, 0)
    for start in range(0, V, BLOCK):
        here = start + cols < V
        x = load_logits(z, start + cols, V)
        x2 = load_logits(y, start + cols, V)
        d_part, g = divergence_terms(x, x2, lz, ly, inverse, KIND)
        if KIND == 0:
            d += tl.where(here, d_part, 0.0)
        else:
            g -= tl.exp(x * inverse - lz) * c_sum
        g = mixed_gradient(g, x, lz1, start + cols == target, alpha, temperature)
        tl.store(z + start + cols, g, mask=here)
    agrees = tl.load(y + first).to(tl.float32) == teacher_top
    tl.store(found + row, tl.sum(d, 0))
    tl.store(found + n + row, lz1 - at_target)
    tl.store(found + 2 * n + row, tl.where(at_target == top, 1.0, 0.0))
    tl.store(found + 3 * n + row, ly1 - tl.load(y + target).to(tl.float32))
    tl.store(found + 4 * n + row, tl.where(agrees, 1.0, 0.0))


@custom_op('cheapertraining::divergence_gradient_', mutates_args=('student', 'found'))
def divergence_gradient_(
    student: Tensor, teacher: Tensor, targets: Tensor, found: Tensor,
    alpha: float, temperature: float, kind: int
) -> None:
    """The student's logits become the gradient of alpha * T^2 * D + (1 - alpha) * cross-entropy.

    student and teacher are (n, V) logits, targets (n,) int64 in [0, V), kind is an index in
    DIVERGENCES. found (5, n) fp32 is filled with D, the student's loss and hit, the teacher's loss,
    and whether both have the same likeliest token. The reference is kd.strip_gradient.
    """
    n, V = student.shape
    soft = temperature != 1
    launch = vocabulary_launch(V, 2048)
    divergence_kernel[(n,)](
        student, teacher, targets, found, V, alpha, temperature, kind, soft, **launch
    )


@jit
def cached_kernel(
    student, ids, q, targets, found, top_id, V, W, alpha, temperature,
    SOFT: constexpr, BLOCK_W: constexpr, BLOCK: constexpr
):
    row = tl.program_id(0)
    n = tl.num_programs(0)
    z = student + row.to(tl.int64) * V
    cols = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    inverse = 1.0 / temperature
    w = tl.arange(0, BLOCK_W)
    given = w < W
    at = tl.load(ids + row.to(tl.int64) * W + w, mask=given, other=-1)
    mass = tl.load(q + row.to(tl.int64) * W + w, mask=given, other=0.0)
    zi = load(z + at, given)
    at_target = tl.load(z + target).to(tl.float32)
    top, first, lz, lz1 = read_row(z, V, inverse, SOFT, BLOCK)
    for start in range(0, V, BLOCK):
        x = load_logits(z, start + cols, V)
        p = tl.exp(x * inverse - lz)
        g = mixed_gradient(p, x, lz1, start + cols == target, alpha, temperature)
        tl.store(z + start + cols, g, mask=start + cols < V)
    # The cached tokens are now written a second time, by other threads than above.
    tl.debug_barrier()
    # A token may have been drawn several times: its probabilities add up.
    together = tl.sum(tl.where(at[:, None] == at[None, :], mass[None, :], 0.0), 1)
    gap = tl.exp(zi * inverse - lz) - together
    g = mixed_gradient(gap, zi, lz1, at == target, alpha, temperature)
    tl.store(z + at, g, mask=given)
    tl.store(found + row, tl.sum(mass * (zi * inverse - lz), 0))
    tl.store(found + n + row, lz1 - at_target)
    tl.store(found + 2 * n + row, tl.where(at_target == top, 1.0, 0.0))
    tl.store(top_id + row, first)


@custom_op('cheapertraining::cached_gradient_', mutates_args=('student', 'found', 'top_id'))
def cached_gradient_(
    student: Tensor, ids: Tensor, q: Tensor, targets: Tensor, found: Tensor, top_id: Tensor,
    alpha: float, temperature: float
) -> None:
    """As `divergence_gradient_` for the forward KL against cached probabilities.

    ids (n, W) int64 are tokens and q (n, W) fp32 their probabilities; repeated tokens add up.
    found (3 or more, n) fp32 is filled with the sum of q log p, the student's loss and hit, and
    top_id (n,) int32 with the student's likeliest token. The reference is kd.against_cache.
    """
    n, V = student.shape
    W = ids.shape[1]
    soft = temperature != 1
    launch = dict(BLOCK_W=max(16, triton.next_power_of_2(W)), **vocabulary_launch(V, 4096, 16))
    cached_kernel[(n,)](
        student, ids, q, targets, found, top_id, V, W, alpha, temperature, soft, **launch
    )


# -- norms -----------------------------------------------------------------------------------------


@jit
def rms_norm_kernel(x, residual, gain, out, total, C, eps, BLOCK: constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    here = cols < C
    a = load(x + row * C + cols, here)
    if residual is not None:
        a += load(residual + row * C + cols, here)
        # The norm sees the sum as the next layer will read it, in its own dtype.
        rounded = a.to(total.dtype.element_ty)
        tl.store(total + row * C + cols, rounded, mask=here)
        a = rounded.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(a * a, 0) / C + eps)
    tl.store(out + row * C + cols, a * r * load(gain + cols, here), mask=here)


@jit
def rms_norm_backward_kernel(
    total, gain, dout, dtotal, dx, dgain, N, C, eps, ROWS, BLOCK: constexpr
):
    # A program takes ROWS rows and writes one row of the gain's gradient, to be summed.
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    weight = load(gain + cols, cols < C)
    dweight = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, ROWS):
        row = program * ROWS + i
        # Rows beyond N load zeros and so add nothing to the gain's gradient.
        here = cols < tl.where(row < N, C, 0)
        a = load(total + row * C + cols, here)
        g = load(dout + row * C + cols, here)
        r = 1.0 / tl.sqrt(tl.sum(a * a, 0) / C + eps)
        a *= r
        dweight += g * a
        g *= weight
        d = r * (g - a * (tl.sum(g * a, 0) / C))
        if dtotal is not None:
            d += load(dtotal + row * C + cols, here)
        tl.store(dx + row * C + cols, d, mask=here)
    tl.store(dgain + program * C + cols, dweight, mask=cols < C)


def norm_launch(C):
    """Launch options for kernels that hold a row of C elements at once."""
    return dict(BLOCK=triton.next_power_of_2(C), num_warps=4 if C <= 1024 else 8)


@custom_op('cheapertraining::rms_norm_forward', mutates_args=('out', 'total'))
def rms_norm_forward(
    x: Tensor, residual: Tensor | None, gain: Tensor, out: Tensor, total: Tensor | None, eps: float
) -> None:
    C = x.shape[-1]
    programs = x.numel() // C
    rms_norm_kernel[(programs,)](x, residual, gain, out, total, C, eps, **norm_launch(C))


@custom_op('cheapertraining::rms_norm_backward', mutates_args=('dx', 'dgain'))
def rms_norm_backward(
    total: Tensor, gain: Tensor, dout: Tensor, dtotal: Tensor | None, dx: Tensor, dgain: Tensor,
    eps: float
) -> None:
    C = total.shape[-1]
    N = total.numel() // C
    programs = len(dgain)
    rows = triton.cdiv(N, programs)
    rms_norm_backward_kernel[(programs,)](
        total, gain, dout, dtotal, dx, dgain, N, C, eps, rows, **norm_launch(C)
    )


class _RMSNorm(torch.autograd.Function):
    # Saves only its input (the sum). The backward computes the root mean square again.
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        x = x.contiguous()
        out = torch.empty_like(x)
        total = None
        if residual is not None:
            residual = residual.contiguous()
            total = torch.empty_like(x)
        rms_norm_forward(x, residual, weight, out, total, eps)
        ctx.save_for_backward(x if total is None else total, weight)
        ctx.eps = eps
        return out if total is None else (out, total)

    @staticmethod
    def backward(ctx, dout, dtotal=None):
        total, weight = ctx.saved_tensors
        C = total.shape[-1]
        has_residual = dtotal is not None
        if has_residual:
            dtotal = dtotal.contiguous()
        dx = torch.empty_like(total)
        programs = max(1, min(PROGRAMS, total.numel() // C))
        dweight = torch.empty(programs, C, dtype=torch.float32, device=total.device)
        rms_norm_backward(total, weight, dout.contiguous(), dtotal, dx, dweight, ctx.eps)
        return dx, dx if has_residual else None, dweight.sum(0).to(weight.dtype), None


def rms_norm(x, weight, eps):
    """x / rms(x) * weight, the mean square in fp32. Zhang & Sennrich 2019 (arXiv:1910.07467).

    x (..., C); weight (C,), or None for a norm without one. Returns (..., C) in the dtype of x.
    """
    if weight is not None and by_triton(x, fusable=True):
        return _RMSNorm.apply(x, None, weight, eps)
    # From torch 2.12 on, CUDA's autocast would return fp32.
    with torch.autocast(x.device.type, enabled=False):
        gain = None if weight is None else weight.to(x.dtype)
        return F.rms_norm(x, (x.shape[-1],), gain, eps)


def add_rms_norm(x, residual, weight, eps):
    """(rms_norm(x + residual), x + residual) in one pass. x and residual (..., C), same dtype."""
    if by_triton(x, fusable=True):
        return _RMSNorm.apply(x, residual, weight, eps)
    # The sum is rounded to the dtype of x before the norm, as in the kernel.
    total = x + residual
    return rms_norm(total, weight, eps), total


# -- queries and keys ------------------------------------------------------------------------------


@jit
def load_halves(pointers, half, mask):
    """The elements of a head that rotate together: those of its first and of its second half."""
    return load(pointers, mask), load(pointers + half, mask)


@jit
def store_halves(pointers, half, mask, a, b):
    tl.store(pointers, a, mask=mask)
    tl.store(pointers + half, b, mask=mask)


@jit
def turn_heads(
    x, gain, cos, sin, y, token, H, D, eps, NORM: constexpr, BLOCK_H: constexpr, BLOCK_D: constexpr
):
    """Norms and rotates the H heads of a token. cos, sin: pointers to the row of its position."""
    x += token * H * D
    y += token * H * D
    h = tl.arange(0, BLOCK_H)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    half = D // 2
    inside = d < half
    here = (h < H) & inside
    a, b = load_halves(x + h * D + d, half, here)
    if NORM:
        r = 1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)
        a *= r[:, None]
        b *= r[:, None]
        if gain is not None:
            gain_a, gain_b = load_halves(gain + d, half, inside)
            a *= gain_a
            b *= gain_b
    c = load(cos + d, inside)
    # The first half of the sines is negated.
    s = load(sin + half + d, inside)
    store_halves(y + h * D + d, half, here, a * c - b * s, b * c + a * s)


@jit
def turn_heads_back(
    x, gain, cos, sin, dout, dx, dgain, token, H, D, eps, BLOCK_H: constexpr, BLOCK_D: constexpr
):
    """Gradients of `turn_heads`. x is None if the heads have no norm."""
    dout += token * H * D
    dx += token * H * D
    h = tl.arange(0, BLOCK_H)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    half = D // 2
    inside = d < half
    here = (h < H) & inside
    c = load(cos + d, inside)
    s = load(sin + half + d, inside)
    u, v = load_halves(dout + h * D + d, half, here)
    ga = u * c + v * s
    gb = v * c - u * s
    if x is not None:
        a, b = load_halves(x + token * H * D + h * D + d, half, here)
        r = 1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)
        a *= r[:, None]
        b *= r[:, None]
        if gain is not None:
            sum_a = tl.sum(ga * a, 0)[None, :]
            sum_b = tl.sum(gb * b, 0)[None, :]
            store_halves(dgain + d, half, inside, sum_a, sum_b)
            gain_a, gain_b = load_halves(gain + d, half, inside)
            ga *= gain_a
            gb *= gain_b
        mean = (tl.sum(ga * a, 1) + tl.sum(gb * b, 1)) / D
        ga = r[:, None] * (ga - a * mean[:, None])
        gb = r[:, None] * (gb - b * mean[:, None])
    store_halves(dx + h * D + d, half, here, ga, gb)


@jit
def rotate_kernel(
    q, k, wq, wk, cos, sin, q_out, k_out, T, H, K, D, eps, NORM: constexpr,
    BLOCK_H: constexpr, BLOCK_K: constexpr, BLOCK_D: constexpr
):
    token = tl.program_id(0).to(tl.int64)
    cos += token % T * D
    sin += token % T * D
    turn_heads(q, wq, cos, sin, q_out, token, H, D, eps, NORM, BLOCK_H, BLOCK_D)
    turn_heads(k, wk, cos, sin, k_out, token, K, D, eps, NORM, BLOCK_K, BLOCK_D)


@jit
def rotate_backward_kernel(
    q, k, wq, wk, cos, sin, dq_out, dk_out, dq, dk, dgains, T, H, K, D, eps,
    BLOCK_H: constexpr, BLOCK_K: constexpr, BLOCK_D: constexpr
):
    token = tl.program_id(0).to(tl.int64)
    cos += token % T * D
    sin += token % T * D
    # A row of dgains (tokens, 2, D) per token, summed by the caller, as atomics would not repeat.
    dgains += token * 2 * D
    turn_heads_back(q, wq, cos, sin, dq_out, dq, dgains, token, H, D, eps, BLOCK_H, BLOCK_D)
    turn_heads_back(k, wk, cos, sin, dk_out, dk, dgains + D, token, K, D, eps, BLOCK_K, BLOCK_D)


def launch_rotation(kernel, shapes, arguments, *options):
    """Launches one program per token. shapes: tensors of the shapes of queries and keys."""
    B, T, H, D = shapes[0].shape
    K = shapes[1].shape[2]
    blocks = [triton.next_power_of_2(size) for size in (H, K, D // 2)]
    kernel[(B * T,)](*arguments, T, H, K, D, *options, *blocks)


# Each list holds a tensor for the queries and one for the keys. `gains` is empty for a norm without
# weights, and `heads` is empty in the backward of a rotation without a norm.


@custom_op('cheapertraining::rotate_forward', mutates_args=('out',))
def rotate_forward(
    heads: Tensors, gains: Tensors, angles: Tensors, out: Tensors, eps: float, norm: bool
) -> None:
    arguments = *heads, *(gains or (None, None)), *angles, *out
    launch_rotation(rotate_kernel, heads, arguments, eps, norm)


@custom_op('cheapertraining::rotate_backward', mutates_args=('filled',))
def rotate_backward(
    heads: Tensors, gains: Tensors, angles: Tensors, dout: Tensors, filled: Tensors, eps: float
) -> None:
    arguments = *(heads or (None, None)), *(gains or (None, None)), *angles, *dout, *filled
    launch_rotation(rotate_backward_kernel, dout, arguments, eps)


class _RotateHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, wq, wk, cos, sin, eps, norm):
        heads = [q.contiguous(), k.contiguous()]
        gains = [] if wq is None else [wq, wk]
        angles = [cos.contiguous(), sin.contiguous()]
        out = [torch.empty_like(x) for x in heads]
        rotate_forward(heads, gains, angles, out, eps, norm)
        # The gradient of a rotation alone does not need its input.
        ctx.save_for_backward(*angles, *gains, *(heads if norm else []))
        ctx.n_gains = len(gains)
        ctx.eps = eps
        return tuple(out)

    @staticmethod
    def backward(ctx, *dout):
        cos, sin, *saved = ctx.saved_tensors
        gains = saved[: ctx.n_gains]
        heads = saved[ctx.n_gains :]
        dout = [g.contiguous() for g in dout]
        dx = [torch.empty_like(g) for g in dout]
        B, T, _, D = dout[0].shape
        shape = (B * T, 2, D) if gains else (1,)
        dgains = torch.empty(shape, dtype=torch.float32, device=cos.device)
        rotate_backward(heads, gains, [cos, sin], dout, [*dx, dgains], ctx.eps)
        dwq, dwk = dgains.sum(0).to(gains[0].dtype) if gains else (None, None)
        return *dx, dwq, dwk, None, None, None, None


def apply_rope(x, cos, sin):
    """Rotates x (..., T, heads, D) by cos, sin (T, D), the first half of sin negated.

    An element's partner is half of D away, as in Hugging Face.
    """
    half = x.shape[-1] // 2
    turned = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


def rotate_heads(q, k, cos, sin, norm=False, wq=None, wk=None, eps=0.0):
    """Queries (B, T, H, D) and keys (B, T, K, D), rotated by cos, sin (T, D) as in `apply_rope`.

    With `norm`, rms_norm is applied to each head before, with weights wq and wk (D,) or None.
    """
    if by_triton(q, fusable=True):
        return _RotateHeads.apply(q, k, wq, wk, cos, sin, eps, norm)
    if norm:
        q = rms_norm(q, wq, eps)
        k = rms_norm(k, wk, eps)
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin)


# -- SwiGLU ----------------------------------------------------------------------------------------


@jit
def swiglu_kernel(gate, up, out, n, BLOCK: constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = load(gate + i, i < n)
    u = load(up + i, i < n)
    tl.store(out + i, g / (1.0 + tl.exp(-g)) * u, mask=i < n)


@jit
def swiglu_backward_kernel(gate, up, dout, dgate, dup, n, BLOCK: constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = load(gate + i, i < n)
    u = load(up + i, i < n)
    d = load(dout + i, i < n)
    s = 1.0 / (1.0 + tl.exp(-g))
    tl.store(dgate + i, d * u * s * (1.0 + g * (1.0 - s)), mask=i < n)
    tl.store(dup + i, d * g * s, mask=i < n)


def launch_elements(kernel, *tensors):
    n = tensors[0].numel()
    kernel[(triton.cdiv(n, 2048),)](*tensors, n, BLOCK=2048, num_warps=8)


@custom_op('cheapertraining::swiglu_forward', mutates_args=('out',))
def swiglu_forward(gate: Tensor, up: Tensor, out: Tensor) -> None:
    launch_elements(swiglu_kernel, gate, up, out)


@custom_op('cheapertraining::swiglu_backward', mutates_args=('dgate', 'dup'))
def swiglu_backward(gate: Tensor, up: Tensor, dout: Tensor, dgate: Tensor, dup: Tensor) -> None:
    launch_elements(swiglu_backward_kernel, gate, up, dout, dgate, dup)


class _SwiGLU(torch.autograd.Function):
    # Saves only gate and up, where autograd would also save silu(gate).
    @staticmethod
    def forward(ctx, gate, up):
        gate = gate.contiguous()
        up = up.contiguous()
        out = torch.empty_like(gate)
        swiglu_forward(gate, up, out)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx, dout):
        gate, up = ctx.saved_tensors
        dgate = torch.empty_like(gate)
        dup = torch.empty_like(up)
        swiglu_backward(gate, up, dout.contiguous(), dgate, dup)
        return dgate, dup


def swiglu(gate, up):
    """silu(gate) * up, any shape. Shazeer 2020 (arXiv:2002.05202)."""
    return _SwiGLU.apply(gate, up) if by_triton(gate, fusable=True) else F.silu(gate) * up


# -- gradients of rows -----------------------------------------------------------------------------

# Triton's interpreter would multiply the bit patterns of bf16 numbers.
WIDE = constexpr(INTERPRETED) if triton else None


@jit
def tile_product(x, y, x_inside, y_inside, x_step, y_step, n_k, BLOCK: constexpr):
    """A tile of a matrix product: the sum over k < n_k of x[i, k] * y[k, j]."""
    # x is a column of pointers to x[i, 0], and x_inside says which of the rows exist. x_step is the
    # distance in memory from k to k + 1. For y they are a row of pointers to y[0, j] and so on.
    total = tl.zeros((x.shape[0], y.shape[1]), tl.float32)
    for start in range(0, n_k, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x_mask = x_inside & (k[None, :] < n_k)
        y_mask = y_inside & (k[:, None] < n_k)
        x_tile = tl.load(x + k[None, :] * x_step, mask=x_mask, other=0.0)
        y_tile = tl.load(y + k[:, None] * y_step, mask=y_mask, other=0.0)
        if WIDE:
            x_tile = x_tile.to(tl.float32)
            y_tile = y_tile.to(tl.float32)
        total = tl.dot(x_tile, y_tile, total, input_precision='ieee')
    return total


@jit
def bilinear_kernel(a, g, v, out, N, I, O, ROWS: constexpr, BLOCK_O: constexpr, BLOCK_I: constexpr):
    base = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    row = rows[:, None]
    # The base is 64-bit and the offsets within a program 32-bit, which saves registers.
    left = tl.minimum(N - base, ROWS).to(tl.int32)
    a += base * I
    g += base * O
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, O, BLOCK_O):
        o = first + tl.arange(0, BLOCK_O)[None, :]
        product = tile_product(a + row * I, v + o * I, row < left, o < O, 1, 1, I, BLOCK_I)
        total += tl.sum(product * load(g + row * O + o, (row < left) & (o < O)), 1)
    tl.store(out + base + rows, total, mask=rows < left)


# Bytes of a row of a tile that tile_product loads at once.
TILE_BYTES = 128


@custom_op('cheapertraining::bilinear_forward', mutates_args=('out',))
def bilinear_forward(a: Tensor, g: Tensor, v: Tensor, out: Tensor) -> None:
    N, I = a.shape
    O = g.shape[1]
    programs = triton.cdiv(N, 64)
    step = TILE_BYTES // a.element_size()
    bilinear_kernel[(programs,)](a, g, v, out, N, I, O, 64, 64, step)


def bilinear(a, g, v):
    """<g, v a> at every position, the inner product of v with a layer's gradient g a^T.

    a (..., I), g (..., O), v (O, I). Returns (...) fp32. The kernel never stores the product v a.
    """
    if by_triton(a):
        out = torch.empty(a.shape[:-1], dtype=torch.float32, device=a.device)
        flat_a = a.flatten(0, -2).contiguous()
        flat_g = g.flatten(0, -2).to(a.dtype).contiguous()
        bilinear_forward(flat_a, flat_g, v.to(a.dtype).contiguous(), out)
        return out
    high = torch.promote_types(g.dtype, torch.float32)
    return (g * F.linear(a, v.to(a.dtype))).sum(-1, dtype=high)


@jit
def position_pairs_kernel(a, g, out, T, I, O, TILES, BLOCK_T: constexpr, BLOCK: constexpr):
    """Sum over a tile of position pairs (s, t) of <a_s, a_t> <g_s, g_t>."""
    # The matrix is symmetric: a tile below the diagonal counts twice, one above it is skipped.
    b = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0)
    m = pair // TILES
    n = pair % TILES
    a += b * T * I
    g += b * T * O
    s = m * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    t = n * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
    a_pairs = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    g_pairs = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    if n <= m:
        a_pairs = tile_product(a + s * I, a + t * I, s < T, t < T, 1, 1, I, BLOCK)
        g_pairs = tile_product(g + s * O, g + t * O, s < T, t < T, 1, 1, O, BLOCK)
    total = tl.sum(tl.sum(a_pairs * g_pairs, 1), 0)
    tl.store(out + b * TILES * TILES + pair, tl.where(n < m, 2.0 * total, total))


@jit
def gradient_tiles_kernel(
    a, g, out, T, I, O, TILES_I, BLOCK_O: constexpr, BLOCK_I: constexpr, BLOCK_T: constexpr
):
    """Sum of squares of a tile of a row's gradient g^T a."""
    b = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    a += b * T * I
    g += b * T * O
    o = tile // TILES_I * BLOCK_O + tl.arange(0, BLOCK_O)[:, None]
    i = tile % TILES_I * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    product = tile_product(g + o, a + i, o < O, i < I, O, I, T, BLOCK_T)
    tl.store(out + b * tl.num_programs(0) + tile, tl.sum(tl.sum(product * product, 1), 0))


@custom_op('cheapertraining::row_norm_parts', mutates_args=('out',))
def row_norm_parts(a: Tensor, g: Tensor, out: Tensor, by_positions: bool) -> None:
    B, T, I = a.shape
    O = g.shape[2]
    grid = (out.shape[1], B)
    step = TILE_BYTES // a.element_size()
    if by_positions:
        position_pairs_kernel[grid](a, g, out, T, I, O, triton.cdiv(T, 64), 64, step)
    else:
        gradient_tiles_kernel[grid](a, g, out, T, I, O, triton.cdiv(I, 64), 64, 64, step)


def row_sqnorms(a, g):
    """Squared norms of the rows' gradients g_b^T a_b of a linear layer: (B,) fp32.

    a (B, T, I), g (B, T, O). Computed from the T x T products of positions (the ghost norm, Li et
    al. 2021, arXiv:2110.05679, section 4) or from the gradient itself, whichever is less work. The
    kernels store neither, only sums over tiles.
    """
    B, T, I = a.shape
    O = g.shape[-1]
    by_positions = T * (I + O) < I * O
    if by_triton(a):
        if by_positions:
            tiles = triton.cdiv(T, 64) ** 2
        else:
            tiles = triton.cdiv(I, 64) * triton.cdiv(O, 64)
        out = torch.empty(B, tiles, dtype=torch.float32, device=a.device)
        row_norm_parts(a.contiguous(), g.to(a.dtype).contiguous(), out, by_positions)
        return out.sum(1)
    high = torch.promote_types(a.dtype, torch.float32)
    if by_positions:
        return ((a @ a.transpose(1, 2)) * (g @ g.transpose(1, 2))).sum((1, 2), dtype=high)
    return torch.stack([(g[b].T @ a[b]).to(high).square().sum() for b in range(B)])
