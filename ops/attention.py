"""Causal attention for training.

On CUDA these are torch's kernels. On a CPU, torch has no flash attention within documents and a
slow backward for short rows, so this file has one function for each.

Letters in shape comments: B rows, T tokens, H n_head, K n_kv_head, G = H / K query heads per key
head, D head_dim, n queries of a block, e keys that a block sees.
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from configurator import BadInput

BLOCK = 64  # queries per block


def suits_blocks(q, T):
    """Whether `blockwise` is faster than torch for q: in training in fp32 on a CPU."""
    # From 1,024 tokens on the scores of a block leave the cache. tools/bench.py measures it.
    on_cpu = q.device.type == 'cpu' and q.dtype == torch.float32
    return on_cpu and 256 < T <= 1024 and torch.is_grad_enabled()


def blocks_of(q, k, v, b):
    """Yields row b by blocks: (slice, scaled queries (K, G*n, D), keys and values (K, e, D))."""
    T, H, D = q.shape[1:]
    K = k.shape[2]
    queries = q[b].view(T, K, H // K, D).permute(1, 2, 0, 3)  # (K, G, T, D)
    keys = k[b].transpose(0, 1).contiguous()  # (K, T, D)
    values = v[b].transpose(0, 1).contiguous()  # (K, T, D)
    for i in range(0, T, BLOCK):
        here = slice(i, min(i + BLOCK, T))
        scaled = (queries[:, :, here] / math.sqrt(D)).flatten(1, 2)
        yield here, scaled, keys[:, : here.stop], values[:, : here.stop]


def masked_scores(queries, keys, here):
    """Scores (K, G*n, e), -inf for keys after their query."""
    n = here.stop - here.start
    scores = torch.bmm(queries, keys.transpose(1, 2))
    # Only the last n keys can be later than a query of this block.
    mask = torch.full((n, n), -math.inf, dtype=scores.dtype).triu_(1)
    scores.view(len(scores), -1, n, here.stop)[..., here.start :] += mask
    return scores


def by_key_head(part, K):
    """A view of (n, H, ...) as (K, G, n, ...)."""
    return part.view(len(part), K, -1, *part.shape[2:]).transpose(0, 1).transpose(1, 2)


@torch.library.custom_op('cheapertraining::blockwise', mutates_args=())
def blockwise(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention by blocks of queries, with all query heads of a key head in one product.

    q (B, T, H, D), k and v (B, T, K, D). Returns (output (B, T, H, D), log-sum-exp of the scores
    (B, T, H)). The backward recomputes the probabilities from these (Dao et al. 2022,
    arXiv:2205.14135, section 3.1).
    """
    # Torch's CPU kernel cuts the keys into tiles too: its products are too small for short rows.
    K = k.shape[2]
    # Row by row, so that a block's scores, (K, G*n, e), fit into the cache.
    y = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=q.dtype)
    for b in range(len(q)):
        for here, queries, keys, values in blocks_of(q, k, v, b):
            p = masked_scores(queries, keys, here)
            largest = p.amax(2, keepdim=True)  # (K, G*n, 1)
            total = p.sub_(largest).exp_().sum(2, keepdim=True)
            lse_here = by_key_head(lse[b, here], K)  # (K, G, n)
            lse_here.copy_((largest + total.log()).view_as(lse_here))
            y_here = by_key_head(y[b, here], K)  # (K, G, n, D)
            y_here.copy_(torch.bmm(p, values).div_(total).view_as(y_here))
    return y, lse


@torch.library.custom_op('cheapertraining::blockwise_backward', mutates_args=())
def blockwise_backward(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, _, D = q.shape
    K = k.shape[2]
    dq = torch.empty_like(q)
    dk = torch.zeros(B, K, T, D, dtype=q.dtype)
    dv = torch.zeros(B, K, T, D, dtype=q.dtype)
    delta = (dy * y).sum(3)  # (B, T, H)
    for b in range(B):
        for here, queries, keys, values in blocks_of(q, k, v, b):
            lse_here = by_key_head(lse[b, here], K).flatten(1, 2)[..., None]  # (K, G*n, 1)
            delta_here = by_key_head(delta[b, here], K).flatten(1, 2)[..., None]  # (K, G*n, 1)
            dy_here = by_key_head(dy[b, here], K).flatten(1, 2)  # (K, G*n, D)
            p = masked_scores(queries, keys, here).sub_(lse_here).exp_()  # (K, G*n, e)
            dv[b, :, : here.stop].baddbmm_(p.transpose(1, 2), dy_here)
            ds = torch.bmm(dy_here, values.transpose(1, 2)).sub_(delta_here).mul_(p)
            dk[b, :, : here.stop].baddbmm_(ds.transpose(1, 2), queries)
            dq_here = by_key_head(dq[b, here], K)  # (K, G, n, D)
            dq_here.copy_(torch.bmm(ds, keys).div_(math.sqrt(D)).view_as(dq_here))
    return dq, dk.transpose(1, 2).contiguous(), dv.transpose(1, 2).contiguous()


def save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def backward(ctx, dy, _dlse):
    return blockwise_backward(*ctx.saved_tensors, dy.contiguous())


blockwise.register_fake(lambda q, k, v: (torch.empty_like(q), q.new_empty(q.shape[:3])))
blockwise_backward.register_fake(
    lambda q, k, v, y, lse, dy: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
)
blockwise.register_autograd(backward, setup_context=save_for_backward)


def attend(q, k, v, mask=None, cu_seqlens=None, causal=True):
    """q (B, T, H, D), k and v (B, T_total, K, D) -> (B, T, H, D).

    mask        (B or 1, 1, T, T_total) bool, True where a query may look. Without one attention is
                causal, or reaches every key if `causal` is off.
    cu_seqlens  (documents + 1,) int32, document boundaries in the B*T stream. Attention is causal
                and stays within a document.
    """
    if cu_seqlens is not None:
        within_documents = attend_documents if q.is_cuda else attend_one_by_one
        return within_documents(q, k, v, cu_seqlens)
    is_causal = mask is None and causal
    if is_causal and suits_blocks(q, q.shape[1]):
        return blockwise(q.contiguous(), k.contiguous(), v.contiguous())[0]
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=True
    )
    return y.transpose(1, 2)


def attend_documents(q, k, v, cu_seqlens):
    """Attention within documents by the variable-length flash kernel (CUDA, bf16 or fp16)."""
    from torch.nn.attention.varlen import varlen_attn

    B, T, H, D = q.shape
    # Torch 2.11's kernel has no enable_gqa, so the key heads are repeated.
    k = k.repeat_interleave(H // k.shape[2], dim=2)
    v = v.repeat_interleave(H // v.shape[2], dim=2)
    # The option for causal attention changed its name within torch 2.x.
    if 'window_size' in inspect.signature(varlen_attn).parameters:
        causal = dict(window_size=(-1, 0))
    else:
        causal = dict(is_causal=True)
    streams = [t.reshape(B * T, H, D) for t in (q, k, v)]
    y = varlen_attn(*streams, cu_seqlens, cu_seqlens, T, T, **causal)
    return y.view(B, T, H, D)


# Every batch has other lengths, for which compiled code would be generated anew.
@torch.compiler.disable
def attend_one_by_one(q, k, v, cu_seqlens):
    """Attention within documents for a CPU, one document at a time."""
    # Memory grows with T. In one call with a (T, T) mask it would grow with the square of T.
    B, T, H, D = q.shape
    lengths = cu_seqlens.diff().tolist()
    streams = []
    for t in (q, k, v):
        streams.append(t.flatten(0, 1).transpose(0, 1)[None].split(lengths, dim=2))
    y = []
    for document in zip(*streams, strict=True):  # (1, H or K, length, D) each
        y.append(F.scaled_dot_product_attention(*document, is_causal=True, enable_gqa=True)[0])
    return torch.cat(y, 1).transpose(0, 1).view(B, T, H, D)


def check_documents(device, dtype):
    """Raises BadInput if there is no kernel for attention within documents."""
    if device.type == 'cuda' and dtype != torch.bfloat16:
        raise BadInput(
            'Attention within documents (document_mask, packing=document) needs bfloat16 on CUDA, '
            'because it uses variable-length flash attention. Set dtype=bfloat16.'
        )


def document_boundaries(doc_ids):
    """Document ids (B, T) -> (documents + 1,) int32: starts in the B*T stream, and B*T itself."""
    # A row always starts a document.
    starts = torch.ones_like(doc_ids, dtype=torch.bool)
    starts[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    starts = starts.flatten().nonzero().flatten().int()
    return F.pad(starts, (0, 1), value=doc_ids.numel())
