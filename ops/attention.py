"""Causal attention for training.

On CUDA these are torch's kernels, and `use` chooses between them. On a CPU, torch has no flash
attention within documents and a slow backward for short rows, so this file has one function for
each.

Letters in shape comments: B rows, T tokens, H n_head, K n_kv_head, G = H / K query heads per key
head, D head_dim, n queries of a block, e keys that a block sees.
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from configurator import BadInput

# What `use` takes. flash: version 2, which torch contains. fa3 and fa4 are packages.
BACKENDS = ('auto', 'cudnn', 'flash', 'fa3', 'fa4')
# package -> (its name for torch, compute capabilities of its kernels, arguments of pip install)
PACKAGES = {
    'fa3': ('FA3', (9,), 'flash-attn-3 --extra-index-url https://download.pytorch.org/whl/{cuda}'),
    'fa4': ('FA4', (9, 10), 'flash-attn-4'),
}
OLDEST_CUDNN = 91501  # 9.15.1. Earlier ones read wrong memory for some lengths (pytorch#169849).

BLOCK = 64  # queries per block
GROUP = 2**20  # scores of a block for which several rows are taken together in bf16, 4 MiB
# AMX multiplies bf16 so fast that the fp32 products of `forward_in_bf16` would slow it down.
HAS_AMX = torch.cpu._is_amx_tile_supported()


# -- kernels of a GPU ------------------------------------------------------------------------------


def use(asked, device, dtype=None, head_dim=64):
    """Sets torch's attention kernels for this process and returns their names.

    asked     'cudnn', 'flash', 'fa3', 'fa4', or 'auto': cuDNN on Hopper and Blackwell if its
              version is sound, otherwise flash
    dtype     of queries and keys (None: bfloat16); head_dim: their width
    Within documents it is always a flash kernel. Inputs that the kernel cannot take, such as
    float32 or a mask, go to torch's memory-efficient kernel.
    Raises BadInput if `asked` is unknown, or is not 'auto' and cannot run here.
    """
    if asked not in BACKENDS:
        raise BadInput(f"attention = '{asked}' must be one of {', '.join(BACKENDS)}.")
    wish = f"attention = '{asked}'"
    if device.type != 'cuda':
        if asked != 'auto':
            raise BadInput(f'{wish} needs a CUDA device and finds none. Use attention=auto.')
        return 'torch'
    dtype = dtype or torch.bfloat16
    if asked != 'auto' and dtype not in (torch.bfloat16, torch.float16):
        raise BadInput(f'{wish} needs dtype=bfloat16. Set it, or use attention=auto.')
    major = torch.cuda.get_device_capability(device)[0]
    fault = cudnn_fault()
    if asked == 'cudnn' and fault:
        raise BadInput(f'{wish}: {fault}. Mend that, or use attention=auto.')
    by_cudnn = asked == 'cudnn' or (asked == 'auto' and major in (9, 10) and not fault)
    activate_flash(asked, major)
    set_order(by_cudnn)
    chosen = chosen_backend(device, dtype, head_dim)
    if asked != 'auto':
        if chosen != ('cudnn' if by_cudnn else 'flash'):
            gpu = torch.cuda.get_device_name(device)
            raise BadInput(
                f'{wish}: torch cannot use it for head_dim = {head_dim} in {dtype} on {gpu}. '
                'Use attention=auto.')
        try_out(wish, device, dtype, head_dim)
    flash = {'fa3': 'flash 3', 'fa4': 'flash 4'}.get(asked, 'flash 2')
    if chosen == 'cudnn':
        return f'cuDNN {cudnn_version()}, {flash} within documents'
    if chosen != 'flash':
        return chosen
    if asked == 'auto' and major in (9, 10):
        return f'{flash} ({fault or f"cuDNN does not take head_dim = {head_dim}"})'
    return flash


def cudnn_version():
    """cuDNN's version as text, '9.15.1'."""
    version = torch.backends.cudnn.version()
    return f'{version // 10000}.{version // 100 % 100}.{version % 100}'


def cudnn_fault():
    """Why cuDNN's attention is not to be used, as part of a sentence, or None."""
    try:
        version = torch.backends.cudnn.version()
    except RuntimeError:
        # Torch refuses one that is older than the one it was compiled with.
        return 'another cuDNN hides that of torch, look at LD_LIBRARY_PATH'
    if version is None:
        return 'this torch has no cuDNN'
    if version < OLDEST_CUDNN:
        return (
            f'cuDNN {cudnn_version()} is older than 9.15.1, look whether LD_LIBRARY_PATH hides '
            'that of torch')
    return None


def activate_flash(asked, major):
    """Makes 'fa3' or 'fa4' torch's flash attention, and torch's version 2 for any other name."""
    known = torch.nn.attention
    if asked not in PACKAGES:
        # Older versions of torch have no other kernels, or cannot go back from them.
        if getattr(known, 'current_flash_attention_impl', lambda: None)() is not None:
            known.restore_flash_attention_impl()
        return
    name, majors, package = PACKAGES[asked]
    wish = f"attention = '{asked}'"
    if name not in getattr(known, 'list_flash_attention_impls', list)():
        raise BadInput(
            f'{wish}: torch {torch.__version__} cannot use {name}. torch 2.13 can. Install it, or '
            'use attention=auto.')
    if major not in majors:
        raise BadInput(
            f'{wish} has no kernels for GPUs of compute capability {major}.x. Use attention=auto.')
    try:
        known.activate_flash_attention_impl(name)
    except (ImportError, RuntimeError) as error:
        cuda = 'cu' + (torch.version.cuda or '').replace('.', '')
        raise BadInput(
            f'{wish}: {error}. Run pip install {package.format(cuda=cuda)}, or use '
            'attention=auto.') from error


def set_order(by_cudnn):
    """Sets the kernels that torch's attention tries, in order. The first that can run is taken."""
    backends = torch.nn.attention.SDPBackend
    order = [backends.FLASH_ATTENTION, backends.EFFICIENT_ATTENTION, backends.MATH]
    if by_cudnn:
        order.insert(0, backends.CUDNN_ATTENTION)
    # This is what the context sdpa_kernel enters. A context would be entered in every layer, and
    # be traced. The others are off, because torch sets its own order at the first call.
    torch.nn.attention._sdpa_kernel(order, set_priority=True)


def some_heads(device, dtype, head_dim):
    """Random queries (1, 128, 2, D), keys and values (1, 128, 1, D) that require gradients."""
    options = dict(device=device, dtype=dtype, requires_grad=True)
    return [torch.randn(1, 128, heads, head_dim, **options) for heads in (2, 1, 1)]


def chosen_backend(device, dtype, head_dim):
    """The kernel that torch takes: 'cudnn', 'flash', 'memory-efficient' or 'math'."""
    backends = torch.nn.attention.SDPBackend
    names = {
        int(backends.CUDNN_ATTENTION): 'cudnn', int(backends.FLASH_ATTENTION): 'flash',
        int(backends.EFFICIENT_ATTENTION): 'memory-efficient', int(backends.MATH): 'math'}
    with torch.enable_grad():
        heads = [t.transpose(1, 2) for t in some_heads(device, dtype, head_dim)]
        return names[torch._fused_sdp_choice(*heads, is_causal=True, enable_gqa=True)]


def try_out(wish, device, dtype, head_dim):
    """Runs attention forward and backward. Raises BadInput if a kernel fails."""
    boundaries = torch.tensor([0, 50, 128], dtype=torch.int32, device=device)
    try:
        with torch.enable_grad():
            for cu_seqlens in (None, boundaries):
                attend(*some_heads(device, dtype, head_dim), cu_seqlens=cu_seqlens).sum().backward()
        torch.cuda.synchronize(device)
    except (ImportError, RuntimeError, AssertionError, TypeError, ValueError) as error:
        # The packages are compiled at their first call, and raise errors of all kinds.
        raise BadInput(
            f'{wish} fails for head_dim = {head_dim} in {dtype}: {error}. Use attention=auto.'
        ) from error


# -- blocks on a CPU -------------------------------------------------------------------------------


def suits_blocks(q, T):
    """Whether `blockwise` is faster than torch for q on a CPU: in fp32 in training, bf16 always."""
    # tools/bench.py measures both. For longer rows torch's tiles are large enough.
    if q.device.type != 'cpu':
        return False
    if q.dtype == torch.bfloat16:
        least = 64 if torch.is_grad_enabled() else 128
        return least <= T <= 2048 and not HAS_AMX
    return q.dtype == torch.float32 and 256 < T <= 1024 and torch.is_grad_enabled()


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


def grouped(t, K):
    """A view of (b, T, H, ...) as (b, K, T, G, ...)."""
    return t.unflatten(2, (K, -1)).transpose(1, 2)


def widened(t, column=None):
    """(b, K, T, G, D) -> fp32 (b*K, T*G, D), or (b*K, T*G, D + 1) with this last column."""
    b, K, T, G, D = t.shape
    out = torch.empty(b, K, T, G, D + (column is not None))
    out[..., :D] = t
    if column is not None:
        out[..., D] = column
    return out.view(b * K, T * G, -1)


def groups_of_rows(B, T, H):
    """Slices of the B rows, which attention in bf16 takes together."""
    size = max(1, GROUP // (H * min(BLOCK, T) * T))
    return [slice(i, min(i + size, B)) for i in range(0, B, size)]


def mask_later_(scores, here, G):
    """Sets scores (b*K, n*G, e) of keys after their query to -inf, in place."""
    n = here.stop - here.start
    # Only the last n keys can be later than a query of this block.
    mask = torch.full((n, n), -math.inf).triu_(1)
    scores.unflatten(1, (n, G))[..., here.start :] += mask[:, None]


def in_three(x):
    """Three bf16 tensors whose sum is the fp32 tensor x."""
    high = x.bfloat16()
    rest = x - high.float()
    middle = rest.bfloat16()
    return high, middle, (rest - middle.float()).bfloat16()


def with_columns(t, columns):
    """bf16 (b, K, T, G, D) -> (b*K, T*G, D + 8), with these columns (b, K, T, G) or zeros added."""
    b, K, T, G, D = t.shape
    # Products are faster if all sizes are multiples of 8.
    out = torch.zeros(b, K, T, G, D + 8, dtype=t.dtype)
    out[..., :D] = t
    for i, column in enumerate(columns):
        out[..., D + i] = column
    return out.view(b * K, T * G, -1)


# In bf16, torch's products on a CPU round their result to bf16, too. Scores need fp32, as a large
# one would change its probability by several percent, so their products are fp32 products of the
# bf16 inputs. The other five products take and give bf16. The error is 0.6 to 1.3 times that of
# torch's own attention. Autocast is off, because it would make all products bf16.


@torch.autocast('cpu', enabled=False)
def forward_in_bf16(q, k, v):
    """`blockwise` for bf16: (output in bf16, log-sum-exp in fp32)."""
    B, T, H, D = q.shape
    K = k.shape[2]
    G = H // K
    y = torch.empty_like(q)
    lse = torch.empty(B, T, H)
    for rows in groups_of_rows(B, T, H):
        # exp2 takes a third of the time of exp on a CPU, so the scores are in units of log(2).
        queries = widened(grouped(q[rows], K)).mul_(1 / (math.sqrt(D) * math.log(2)))
        keys = widened(grouped(k[rows], K)).transpose(1, 2)  # (b*K, D, T)
        values = grouped(v[rows], K).reshape(-1, T, D)  # (b*K, T, D)
        out = torch.empty(queries.shape, dtype=q.dtype)  # (b*K, T*G, D)
        largest = torch.empty(*queries.shape[:2], 1)
        total = torch.empty(*queries.shape[:2], 1)
        for i in range(0, T, BLOCK):
            here = slice(i, min(i + BLOCK, T))
            # The G queries of a token that share a key head lie side by side.
            mine = slice(here.start * G, here.stop * G)
            p = torch.bmm(queries[:, mine], keys[:, :, : here.stop])  # (b*K, n*G, e)
            mask_later_(p, here, G)
            torch.amax(p, 2, keepdim=True, out=largest[:, mine])
            p.sub_(largest[:, mine]).exp2_()
            torch.sum(p, 2, keepdim=True, out=total[:, mine])
            # Divided before the product, so that the output is rounded once.
            p.mul_(total[:, mine].reciprocal())
            out[:, mine] = torch.bmm(p.bfloat16(), values[:, : here.stop])
        y_rows = grouped(y[rows], K)  # (b, K, T, G, D)
        y_rows.copy_(out.view_as(y_rows))
        lse_rows = grouped(lse[rows], K)  # (b, K, T, G)
        lse_rows.copy_(total.log2_().add_(largest).mul_(math.log(2)).view_as(lse_rows))
    return y, lse


@torch.autocast('cpu', enabled=False)
def backward_in_bf16(q, k, v, y, lse, dy):
    """`blockwise_backward` for bf16. dk and dv are summed over the blocks in fp32."""
    B, T, H, D = q.shape
    K = k.shape[2]
    G = H // K
    dq = torch.empty_like(q)
    dk = torch.empty_like(k)
    dv = torch.empty_like(v)
    for rows in groups_of_rows(B, T, H):
        q_rows = grouped(q[rows], K)  # (b, K, T, G, D)
        dy_rows = grouped(dy[rows], K)
        queries = q_rows.reshape(-1, T * G, D)
        upstream = dy_rows.reshape(-1, T * G, D)
        keys = grouped(k[rows], K).reshape(-1, T, D)
        # A last column, against ones in the keys, subtracts the log-sum-exp from the scores within
        # the product. It includes 1 / sqrt(D), so p and ds below are scaled by it.
        shift = grouped(lse[rows], K) / -math.log(2) - math.log2(D) / 2
        wide_queries = widened(q_rows, shift)
        wide_queries[..., :D] *= 1 / (math.sqrt(D) * math.log(2))
        wide_keys = widened(grouped(k[rows], K), 1.0).transpose(1, 2)  # (b*K, D + 1, T)
        # In the same way the product of y and dy is subtracted from the gradients of a query's
        # probabilities. Only the difference is rounded to bf16.
        delta = (grouped(y[rows], K).float() * dy_rows).sum(4)  # (b, K, T, G)
        wide_upstream = with_columns(dy_rows, in_three(-delta))
        wide_values = with_columns(grouped(v[rows], K), [1.0] * 3).transpose(1, 2)
        dq_sum = torch.empty_like(queries)
        dk_sum = torch.zeros(keys.shape)
        dv_sum = torch.zeros(keys.shape)
        for i in range(0, T, BLOCK):
            here = slice(i, min(i + BLOCK, T))
            mine = slice(here.start * G, here.stop * G)
            p = torch.bmm(wide_queries[:, mine], wide_keys[:, :, : here.stop])  # (b*K, n*G, e)
            mask_later_(p, here, G)
            p.exp2_()
            dv_sum[:, : here.stop] += torch.bmm(p.bfloat16().transpose(1, 2), upstream[:, mine])
            dp = torch.bmm(wide_upstream[:, mine], wide_values[:, :, : here.stop])
            ds = p.mul_(dp).bfloat16()
            dk_sum[:, : here.stop] += torch.bmm(ds.transpose(1, 2), queries[:, mine])
            dq_sum[:, mine] = torch.bmm(ds, keys[:, : here.stop])
        dq_rows = grouped(dq[rows], K)
        dq_rows.copy_(dq_sum.view_as(dq_rows))
        dk_rows = grouped(dk[rows], K)
        dk_rows.copy_(dk_sum.view_as(dk_rows))
        dv_rows = grouped(dv[rows], K)
        dv_rows.copy_(dv_sum.mul_(math.sqrt(D)).view_as(dv_rows))
    return dq, dk, dv


@torch.library.custom_op('cheapertraining::blockwise', mutates_args=())
def blockwise(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention by blocks of queries, with all query heads of a key head in one product.

    q (B, T, H, D), k and v (B, T, K, D), contiguous and of one dtype. Returns (output
    (B, T, H, D), log-sum-exp of the scores (B, T, H), fp32 if q is bf16). The backward recomputes
    the probabilities from these (Dao et al. 2022, arXiv:2205.14135, section 3.1).
    """
    if q.dtype == torch.bfloat16:
        return forward_in_bf16(q, k, v)
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
    if q.dtype == torch.bfloat16:
        return backward_in_bf16(q, k, v, y, lse, dy)
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


@blockwise.register_fake
def _(q, k, v):
    dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=dtype)


blockwise_backward.register_fake(
    lambda q, k, v, y, lse, dy: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
)
blockwise.register_autograd(backward, setup_context=save_for_backward)


# -- the calls of a layer --------------------------------------------------------------------------


def attend_by_torch(q, k, v, mask=None, is_causal=False):
    """Torch's attention, for the shapes of `attend`."""
    shares_keys = takes_shared_keys(q.device.type, q.dtype)
    if not shares_keys:
        G = q.shape[2] // k.shape[2]
        k = k.repeat_interleave(G, dim=2)
        v = v.repeat_interleave(G, dim=2)
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=shares_keys
    )
    return y.transpose(1, 2)


def takes_shared_keys(device_type, dtype):
    """Whether torch's attention reads key heads that several query heads share.

    On CUDA only the kernels for bf16 and fp16 do, and in fp32 the one that holds all scores would
    run. Torch documents nothing about Apple's GPUs.
    """
    if device_type == 'cuda':
        return dtype in (torch.bfloat16, torch.float16)
    return device_type == 'cpu'


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
    if is_causal and q.shape[1] == k.shape[1] and suits_blocks(q, q.shape[1]):
        return blockwise(q.contiguous(), k.contiguous(), v.contiguous())[0]
    return attend_by_torch(q, k, v, mask, is_causal)


def attend_documents(q, k, v, cu_seqlens):
    """Attention within documents by the variable-length flash kernel (CUDA, bf16 or fp16)."""
    from torch.nn.attention.varlen import varlen_attn

    B, T, H, D = q.shape
    # The options have changed within torch 2.x.
    known = inspect.signature(varlen_attn).parameters
    options = dict(window_size=(-1, 0)) if 'window_size' in known else dict(is_causal=True)
    if 'enable_gqa' in known:
        options['enable_gqa'] = True
    else:
        k = k.repeat_interleave(H // k.shape[2], dim=2)
        v = v.repeat_interleave(H // v.shape[2], dim=2)
    streams = [t.flatten(0, 1) for t in (q, k, v)]
    y = varlen_attn(*streams, cu_seqlens, cu_seqlens, T, T, **options)
    return y.view(B, T, H, D)


# Every batch has other lengths, for which compiled code would be generated anew.
@torch.compiler.disable
def attend_one_by_one(q, k, v, cu_seqlens):
    """Attention within documents for a CPU, one document at a time."""
    # Memory grows with T. In one call with a (T, T) mask it would grow with the square of T.
    lengths = cu_seqlens.diff().tolist()
    streams = [t.flatten(0, 1)[None].split(lengths, dim=1) for t in (q, k, v)]
    y = []
    for document in zip(*streams, strict=True):  # (1, length, H or K, D) each
        # In fp32 a single row gains nothing by blocks.
        if q.dtype == torch.bfloat16 and suits_blocks(q, document[0].shape[1]):
            y.append(blockwise(*[t.contiguous() for t in document])[0])
        else:
            y.append(attend_by_torch(*document, is_causal=True))
    return torch.cat(y, 1).view(q.shape)


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
