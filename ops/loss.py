"""The loss of the output layer: hidden states and weight in, token losses and gradients out, without ever holding all logits.

The rows go through in chunks. The gradient is made in the forward, while a chunk's logits are at hand (ops/kernels.py): three products of N*C*V
instead of the four that recomputing them would take.

Letters in shape comments: N tokens, C n_embd, V vocab_size, n rows of a chunk.
"""
import torch
import torch.distributed as dist

from ops import kernels


def budget_rows(n_rows, vocab_size, device, dtype):
    """Rows of logits held at once at most: 256 MiB on the CPU, 1 GiB on a GPU."""
    return max(1, min(n_rows, (2**30 if device.type == 'cuda' else 2**28) // (vocab_size * dtype.itemsize)))


def chunk_rows(n_rows, vocab_size, device, dtype):
    """Rows of a chunk: within the budget a sixteenth of what all would take in fp32. Few large chunks: each one reads dW again."""
    least = 1024 if device.type == 'cuda' else 256
    return min(budget_rows(n_rows, vocab_size, device, dtype), max(least, n_rows * 4 // (16 * dtype.itemsize)))


def loss_dtypes(h):
    """(dtype of the products: autocast's where it is on, else the hidden states' own; dtype of everything summed)."""
    low = torch.get_autocast_dtype(h.device.type) if torch.is_autocast_enabled(h.device.type) else h.dtype
    return low, torch.promote_types(low, torch.float32)


def add_weight_gradient(dweight, logits, scaled_h):
    """dweight (V, C) += logits.T @ scaled_h, the product in their dtype, the sum in dweight's."""
    if dweight.dtype == logits.dtype:
        dweight.addmm_(logits.T, scaled_h)
    else:
        dweight += logits.T @ scaled_h


class _LinearCrossEntropy(torch.autograd.Function):
    """Weighted sum of token losses; backward only scales the gradients that the forward made."""

    @staticmethod
    def forward(ctx, h, weight, targets, token_weights, part_of):
        N, V = h.shape[0], weight.shape[0]
        needs_h, needs_weight = ctx.needs_input_grad[:2]
        dtype, high = loss_dtypes(h)
        h_low, weight_low = h.to(dtype), weight.to(dtype)
        counted, safe_targets = targets >= 0, targets.clamp(min=0)
        token_weights = torch.where(counted, 1.0 if token_weights is None else token_weights.to(high), 0.0).to(high)
        losses, hits = torch.empty(N, dtype=high, device=h.device), torch.empty(N, dtype=torch.bool, device=h.device)
        dh = torch.empty_like(h_low, dtype=high if part_of else dtype) if needs_h else None
        dweight = None
        rows = chunk_rows(N, V, h.device, dtype)
        buffer = torch.empty(rows, V, dtype=dtype, device=h.device)
        with torch.autocast(h.device.type, enabled=False):
            for start in range(0, N, rows):
                chunk = slice(start, min(start + rows, N))
                logits = torch.mm(h_low[chunk], weight_low.T, out=buffer[:chunk.stop - start])           # (n, V)
                if part_of:
                    losses[chunk], hits[chunk], scale = over_parts(logits, safe_targets[chunk], *part_of)
                else:
                    losses[chunk], hits[chunk], scale = kernels.softmax_gradient_(logits, safe_targets[chunk], needs_h or needs_weight)
                scale = scale * token_weights[chunk, None]                                               # (n, 1); applied to C columns, not V
                if needs_h:
                    dh[chunk] = ((logits @ weight_low) * scale).to(dtype)
                if needs_weight:
                    scaled_h = (h_low[chunk] * scale).to(dtype)
                    if dweight is None:
                        dweight = (logits.T @ scaled_h).to(high)
                    else:
                        add_weight_gradient(dweight, logits, scaled_h)
        if needs_weight and dweight is None:                                                             # no row at all
            dweight = torch.zeros(weight.shape, dtype=high, device=h.device)
        if part_of and needs_h:
            dist.all_reduce(dh, group=part_of[0])
        losses.masked_fill_(~counted, 0)
        hits &= counted
        ctx.save_for_backward(dh, dweight)
        ctx.dtypes = h.dtype, weight.dtype
        ctx.mark_non_differentiable(losses, hits)
        return (losses * token_weights).sum(), losses, hits

    @staticmethod
    def backward(ctx, upstream, _losses, _hits):
        dh, dweight = ctx.saved_tensors
        dh = None if dh is None else (dh * upstream).to(ctx.dtypes[0])
        dweight = None if dweight is None else dweight.mul_(upstream).to(ctx.dtypes[1])
        return dh, dweight, None, None, None


def over_parts(logits, targets, group, first):
    """`kernels.softmax_gradient_` where every rank of the group has the logits (n, V_part) of its own part of the vocabulary, from id `first` on.

    Two small all-reduces; logits are never gathered.
    """
    lse, top, at_target = kernels.softmax_statistics(logits, targets - first)
    most = torch.stack((lse, top, at_target))                                                            # (3, n)
    dist.all_reduce(most, dist.ReduceOp.MAX, group)
    total = (lse - most[0]).exp()
    dist.all_reduce(total, group=group)
    lse = most[0] + total.log()                                                                          # of the whole vocabulary
    kernels.softmax_gradient_from_(logits, targets - first, lse)
    return lse - most[2], most[2] == most[1], torch.ones_like(lse)[:, None]


def linear_cross_entropy(h, weight, targets, token_weights=None, part_of=None):
    """Cross-entropy of the logits h @ weight.T, summed with weights, without ever holding all logits.

    h (N, C) any float dtype; weight (V, C); targets (N,) int64, -1 = not counted; token_weights (N,) fp32 or None = ones
    part_of: (process group, first id) when `weight` is this rank's part of the vocabulary, from that id on; h and targets are the same on every
    rank of the group, and so are the results; dweight is of the part
    Returns (sum () fp32, losses (N,) fp32 nats, hits (N,) bool). Gradients of h and weight flow from `sum` alone; divide it
    by the number of valid tokens yourself. losses are unweighted, 0 where not counted; hits: the target has the largest
    logit. dweight is accumulated in fp32 (all of it in fp64 for fp64 input). Backward may run once. Tokens that are not counted cost as much as
    others: leave them out (`GPT.loss` does).
    """
    return _LinearCrossEntropy.apply(h, weight, targets, token_weights, part_of)
