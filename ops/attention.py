"""Causal attention for training: torch's kernels, and two of our own for the CPU, where there is no flash attention for documents and a slow backward.

Letters in shape comments: B rows, T tokens, H n_head, K n_kv_head, G = H / K query heads of a key, D head_dim, n queries of a block, e keys it sees.
"""
import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from configurator import BadInput

BLOCK = 64              # queries at a time


def suits_blocks(q, T):
    """Whether `blockwise` is the faster one for q: fp32 on a CPU, training, at lengths where its scores stay in the cache (tools/bench_parts.py measures it)."""
    return q.device.type == 'cpu' and q.dtype == torch.float32 and 256 < T <= 1024 and torch.is_grad_enabled()


def blocks_of(q, k, v, b):
    """Row b by blocks of queries: yields (slice of queries, scaled queries (K, G*n, D), keys and values so far (K, e, D))."""
    (T, H, D), K = q.shape[1:], k.shape[2]
    queries = q[b].view(T, K, H // K, D).permute(1, 2, 0, 3)                                          # (K, G, T, D)
    keys, values = k[b].transpose(0, 1).contiguous(), v[b].transpose(0, 1).contiguous()               # (K, T, D)
    for i in range(0, T, BLOCK):
        here = slice(i, min(i + BLOCK, T))
        yield here, (queries[:, :, here] / math.sqrt(D)).flatten(1, 2), keys[:, :here.stop], values[:, :here.stop]


def scores_of(queries, keys, here):
    """(K, G*n, e): what lies after a query is -inf."""
    n = here.stop - here.start
    scores = torch.bmm(queries, keys.transpose(1, 2))
    mask = torch.full((n, n), -math.inf, dtype=scores.dtype).triu_(1)
    scores.view(len(scores), -1, n, here.stop)[..., here.start:] += mask
    return scores


def folded(t, b, here, K):
    """Part `here` of row b of t (B, T, H, ...) as (K, G*n, ...)."""
    part = t[b, here]
    return part.view(len(part), K, -1, *part.shape[2:]).transpose(0, 1).transpose(1, 2).flatten(1, 2)


def unfold_(t, b, here, K, values):
    """The way back: t[b, here] = values."""
    part = t[b, here]
    part.view(len(part), K, -1, *part.shape[2:]).transpose(0, 1).transpose(1, 2).copy_(values.view(K, -1, len(part), *part.shape[2:]))


@torch.library.custom_op('cheapertraining::blockwise', mutates_args=())
def blockwise(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention block by block of queries, on what they see alone, query heads of one key together: q (B, T, H, D), k and v (B, T, K, D).

    Returns (output (B, T, H, D), log-sum-exp of the scores (B, T, H)). The backward makes the probabilities again from these (Dao et al. 2022,
    arXiv:2205.14135, section 3.1). torch's own for the CPU works on tiles of keys, which for short rows leaves its products too small.
    """
    y, lse, K = torch.empty_like(q), torch.empty(q.shape[:3], dtype=q.dtype), k.shape[2]
    for b in range(len(q)):
        for here, queries, keys, values in blocks_of(q, k, v, b):
            p = scores_of(queries, keys, here)
            largest = p.amax(2, keepdim=True)                                                         # (K, G*n, 1)
            total = p.sub_(largest).exp_().sum(2, keepdim=True)
            unfold_(lse, b, here, K, largest + total.log())
            unfold_(y, b, here, K, torch.bmm(p, values).div_(total))
    return y, lse


@torch.library.custom_op('cheapertraining::blockwise_backward', mutates_args=())
def blockwise_backward(q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, _, D), K = q.shape, k.shape[2]
    dq, delta = torch.empty_like(q), (dy * y).sum(3)                                                  # (B, T, H)
    dk, dv = torch.zeros(B, K, T, D, dtype=q.dtype), torch.zeros(B, K, T, D, dtype=q.dtype)
    for b in range(B):
        for here, queries, keys, values in blocks_of(q, k, v, b):
            p = scores_of(queries, keys, here).sub_(folded(lse, b, here, K)[..., None]).exp_()        # (K, G*n, e)
            dy_here = folded(dy, b, here, K)                                                          # (K, G*n, D)
            dv[b, :, :here.stop].baddbmm_(p.transpose(1, 2), dy_here)
            ds = torch.bmm(dy_here, values.transpose(1, 2)).sub_(folded(delta, b, here, K)[..., None]).mul_(p)
            dk[b, :, :here.stop].baddbmm_(ds.transpose(1, 2), queries)
            unfold_(dq, b, here, K, torch.bmm(ds, keys).div_(math.sqrt(D)))
    return dq, dk.transpose(1, 2).contiguous(), dv.transpose(1, 2).contiguous()


blockwise.register_fake(lambda q, k, v: (torch.empty_like(q), q.new_empty(q.shape[:3])))
blockwise_backward.register_fake(lambda q, k, v, y, lse, dy: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)))
blockwise.register_autograd(lambda ctx, dy, _: blockwise_backward(*ctx.saved_tensors, dy.contiguous()),
                            setup_context=lambda ctx, inputs, output: (ctx.save_for_backward(*inputs, *output), ctx.mark_non_differentiable(output[1])))


def attend(q, k, v, mask=None, cu_seqlens=None, causal=True):
    """q (B, T, H, D), k and v (B, T_total, K, D) -> (B, T, H, D).

    mask        (B or 1, 1, T, T_total) bool, True where a query may look; None: plain causal (`causal`), or everything
    cu_seqlens  (documents + 1,) int32, document boundaries in the B*T stream: attention stays between them
    """
    if cu_seqlens is not None:
        return (attend_documents if q.is_cuda else attend_one_by_one)(q, k, v, cu_seqlens)
    if mask is None and causal and suits_blocks(q, q.shape[1]):
        return blockwise(q.contiguous(), k.contiguous(), v.contiguous())[0]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and causal, enable_gqa=True).transpose(1, 2)


def attend_documents(q, k, v, cu_seqlens):
    """Causal attention within documents by the variable-length flash kernel (CUDA, bf16/fp16)."""
    from torch.nn.attention.varlen import varlen_attn
    B, T, H, D = q.shape
    k, v = (t.repeat_interleave(H // t.shape[2], dim=2) for t in (k, v))      # enable_gqa is missing from torch 2.11
    causal = dict(window_size=(-1, 0)) if 'window_size' in inspect.signature(varlen_attn).parameters else dict(is_causal=True)
    y = varlen_attn(*(t.reshape(B * T, H, D) for t in (q, k, v)), cu_seqlens, cu_seqlens, T, T, **causal)      # the option's name changed within torch 2.x
    return y.view(B, T, H, D)


@torch.compiler.disable         # every batch has other lengths: compiled code would be made anew for each
def attend_one_by_one(q, k, v, cu_seqlens):
    """The same document by document, for the CPU, in memory that grows with T and not with its square."""
    B, T, H, D = q.shape
    lengths = cu_seqlens.diff().tolist()
    streams = (t.flatten(0, 1).transpose(0, 1).split(lengths, dim=1) for t in (q, k, v))                # (H or K, length, D) each
    y = [F.scaled_dot_product_attention(*(t[None] for t in qkv), is_causal=True, enable_gqa=True)[0] for qkv in zip(*streams)]
    return torch.cat(y, 1).transpose(0, 1).view(B, T, H, D)


def check_documents(device, dtype):
    """BadInput where attention within documents has no kernel."""
    if device.type == 'cuda' and dtype != torch.bfloat16:
        raise BadInput('attention within documents (document_mask, packing=document) works in bfloat16 only on CUDA: variable-length flash attention. '
                       'Set dtype=bfloat16.')


def document_boundaries(doc_ids):
    """doc_ids (B, T) -> (documents + 1,) int32: starts of the documents in the B*T stream, and its end."""
    starts = torch.ones_like(doc_ids, dtype=torch.bool)
    starts[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    starts = starts.flatten().nonzero().flatten().int()
    return F.pad(starts, (0, 1), value=doc_ids.numel())
