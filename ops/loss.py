"""The loss of the output layer, computed without holding the logits of all tokens at once.

Hidden states and the output weight go in, token losses and gradients come out. `ChunkedLoss` holds
the loop over chunks of tokens. `linear_cross_entropy` and the distillation loss of kd.py both use
it. The forward pass makes the gradients while it has the logits of a chunk (ops/kernels.py). This
takes three products of N*C*V operations. Recomputing the logits in the backward would take four.

Letters in shape comments: N tokens, C n_embd, V vocab_size, n tokens of a chunk.
"""
import functools

import torch
import torch.distributed as dist

from ops import kernels


def budget_rows(n_rows, vocab_size, device, dtype):
    """Most rows of logits that are held at once: 256 MiB on the CPU, 1 GiB on a GPU."""
    budget = 2**30 if device.type == 'cuda' else 2**28
    return max(1, min(n_rows, budget // (vocab_size * dtype.itemsize)))


def chunk_rows(n_rows, vocab_size, device, dtype):
    """Rows of a chunk: a sixteenth of the memory of all logits in fp32, on a GPU an eighth.

    The logits of a chunk take at most 256 MiB, on a GPU 2 GiB. Chunks have a minimum size, because
    every chunk reads and writes the weight's gradient. On a GPU that is why there are fewer of
    them: with bf16 logits 4 chunks as long as they fit into 2 GiB each.
    """
    if device.type == 'cuda':
        parts, least, budget, tile = 8, 1024, 2**31, 128
    else:
        parts, least, budget, tile = 16, 256, 2**28, 1
    rows = max(least, n_rows * 4 // (parts * dtype.itemsize))
    rows = min(n_rows, rows, budget // (vocab_size * dtype.itemsize))
    # GPUs multiply tiles of this many rows.
    return max(1, rows - rows % tile if rows > tile else rows)


@functools.cache
def adds_to_fp32(device_type):
    """Whether a bf16 product can be added to an fp32 matrix in place, without a bf16 result.

    torch can on CUDA, from 2.10 on (`addmm` with out_dtype; before, it wanted a bf16 matrix).
    """
    if device_type != 'cuda':
        return False
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device_type)
    total = ones.float()
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


def loss_dtypes(h):
    """Returns (dtype of the products, dtype of all sums).

    The products use autocast's dtype where autocast is on, else the dtype of the hidden states.
    """
    low = h.dtype
    if torch.is_autocast_enabled(h.device.type):
        low = torch.get_autocast_dtype(h.device.type)
    return low, torch.promote_types(low, torch.float32)


def add_product(total, a, b, high):
    """total + a @ b in dtype `high`, in place. total None: a @ b, without a pass over zeros."""
    if high == a.dtype:
        return a @ b if total is None else total.addmm_(a, b)
    # The sum is in fp32: in bf16 it would lose small terms of later chunks.
    if high == torch.float32 and adds_to_fp32(a.device.type):
        if total is None:
            return torch.mm(a, b, out_dtype=high)
        # 8 bytes of memory traffic per element. A bf16 product and its addition would take 12.
        return torch.addmm(total, a, b, out_dtype=high, out=total)
    product = a @ b
    if total is None:
        return product.to(high)
    # Mixed dtypes are added by way of a copy in fp32. On a CPU that of a strip stays in the cache.
    for strip, addend in zip(total.split(512), product.split(512), strict=True):
        strip.add_(addend)
    return total


class ChunkedLoss(torch.autograd.Function):
    """Weighted sum of token losses. The forward makes the gradients, the backward scales them."""

    @staticmethod
    def forward(ctx, h, weight, tokens, chunk_losses, rows, group):
        """
        h, weight     hidden states (N, C) and output weight (V, C), any float dtype
        tokens        (targets (N,) int64 with -1 for ignored tokens, weights (N,) or None: ones)
        chunk_losses  chunk_losses(logits (n, V), targets (n,), chunk, needs_gradient) turns logits
                      in place into the gradient of the token losses. It returns the losses (n,)
                      and a factor, (n, 1) or a number, that the gradient is still multiplied by.
                      targets are 0 at ignored tokens, chunk is the slice of N
        rows          tokens of a chunk
        group         process group that dh is summed over, or None
        Returns (sum (), losses (N,) unweighted and 0 at ignored tokens), both in fp32 (fp64 for
        fp64 input). Only the sum has a gradient, and its backward may run once.
        """
        targets, token_weights = tokens
        N = len(h)
        needs_h, needs_weight = ctx.needs_input_grad[:2]
        dtype, high = loss_dtypes(h)
        h_low = h.to(dtype)
        weight_low = weight.to(dtype)
        valid = targets >= 0
        # gather and scatter fail on -1. The weight 0 takes ignored tokens out of the gradient.
        safe_targets = targets.clamp(min=0)
        token_weights = 1.0 if token_weights is None else token_weights.to(high)
        token_weights = torch.where(valid, token_weights, 0.0).to(high)
        losses = torch.empty(N, dtype=high, device=h.device)
        dh = None
        if needs_h:
            # The sum of the ranks' parts is in fp32, so that it does not round at every addition.
            dh = torch.empty_like(h_low, dtype=dtype if group is None else high)
        dweight = None
        # All chunks share this buffer, so only one chunk of logits exists at a time.
        buffer = torch.empty(rows, len(weight), dtype=dtype, device=h.device)
        # The dtypes are chosen above, and autocast must not change them.
        with torch.autocast(h.device.type, enabled=False):
            for start in range(0, N, rows):
                chunk = slice(start, min(start + rows, N))
                logits = buffer[:chunk.stop - start]
                torch.mm(h_low[chunk], weight_low.T, out=logits)                      # (n, V)
                losses[chunk], scale = chunk_losses(
                    logits, safe_targets[chunk], chunk, needs_h or needs_weight)
                # The scale is applied to the C columns of h and dh, which are fewer than V.
                scale = scale * token_weights[chunk, None]                            # (n, 1)
                if needs_h:
                    dh[chunk] = ((logits @ weight_low) * scale).to(dtype)
                if not needs_weight:
                    continue
                scaled_h = (h_low[chunk] * scale).to(dtype)
                dweight = add_product(dweight, logits.T, scaled_h, high)
        if needs_weight and dweight is None:        # N = 0
            dweight = torch.zeros(weight.shape, dtype=high, device=h.device)
        if needs_h and group is not None:
            dist.all_reduce(dh, group=group)
        # Until here an ignored token has the loss of target 0.
        losses.masked_fill_(~valid, 0)
        ctx.save_for_backward(dh, dweight)
        ctx.dtypes = h.dtype, weight.dtype
        ctx.mark_non_differentiable(losses)
        return (losses * token_weights).sum(), losses

    @staticmethod
    def backward(ctx, upstream, _losses):
        dh, dweight = ctx.saved_tensors
        if dh is not None:
            dh = (dh * upstream).to(ctx.dtypes[0])
        if dweight is not None:
            # In place, to save a second (V, C) tensor. This is why backward may run only once.
            dweight = dweight.mul_(upstream).to(ctx.dtypes[1])
        return dh, dweight, None, None, None, None


def over_parts(logits, targets, group, first):
    """`kernels.softmax_gradient_` where each rank has the logits of a part of the vocabulary.

    logits (n, V_part): this rank's part, from id `first` on. Makes two small all-reduces over the
    group and never gathers logits.
    """
    lse, top, at_target = kernels.softmax_statistics(logits, targets - first)
    # One maximum serves all three: the largest lse keeps `exp` from overflowing, and at_target is
    # -inf on the ranks without the target.
    most = torch.stack((lse, top, at_target))                                         # (3, n)
    dist.all_reduce(most, dist.ReduceOp.MAX, group)
    total = (lse - most[0]).exp()
    dist.all_reduce(total, group=group)
    lse = most[0] + total.log()                                   # of the full vocabulary
    kernels.softmax_gradient_from_(logits, targets - first, lse)
    return lse - most[2], most[2] == most[1], torch.ones_like(lse)[:, None]


def linear_cross_entropy(h, weight, targets, token_weights=None, part_of=None):
    """Weighted sum of the cross-entropies of the logits h @ weight.T.

    h              (N, C) any float dtype
    weight         (V, C)
    targets        (N,) int64, -1 where the loss ignores the token
    token_weights  (N,) fp32, or None: ones
    part_of        (process group, first id) if `weight` is this rank's part of the vocabulary from
                   that id on. h, targets and results are then equal on all ranks of the group, and
                   the weight's gradient is that of the part
    Returns (sum () fp32, losses (N,) fp32 nats, hits (N,) bool). Only `sum` carries gradients.
    Divide it by the number of valid tokens yourself. losses are unweighted, and 0 where the token
    is ignored. A hit is a target with the largest logit. The weight's gradient is accumulated in
    fp32. With fp64 input everything is fp64. Backward may run once. Ignored tokens cost as much as
    others, so leave them out beforehand (`GPT.loss` does).
    """
    hits = torch.empty(len(h), dtype=torch.bool, device=h.device)
    group = None if part_of is None else part_of[0]

    def chunk_losses(logits, targets, chunk, needs_gradient):
        if part_of is None:
            found = kernels.softmax_gradient_(logits, targets, needs_gradient)
        else:
            found = over_parts(logits, targets, *part_of)
        losses, hits[chunk], scale = found
        return losses, scale

    rows = chunk_rows(len(h), len(weight), h.device, loss_dtypes(h)[0])
    tokens = (targets, token_weights)
    total, losses = ChunkedLoss.apply(h, weight, tokens, chunk_losses, rows, group)
    return total, losses, hits & (targets >= 0)
