"""The network: a Llama / MobileLLM transformer in one class, its loss, generation and FLOP count.

It has RMSNorm, rotary positions with optional scaling, grouped-query attention, optional QK-norm
(Qwen3, MobileLLM-R1), optional QKV bias (Qwen2), optional layers without rotary positions
(SmolLM3), SwiGLU, tied or untied embeddings, and optional repetition of every layer (MobileLLM-LS).
Weight layout and rotary convention (two halves) are those of Hugging Face's Llama, so its weights
copy over one to one.

`GPT.forward` returns hidden states. The loss (ops/loss.py) takes them and the output weight, and
works through the rows in chunks, so the B x T x V logits never exist at once. What lies between the
matrix products is in ops/kernels.py, mixtures of experts in ops/moe.py.

Under tensor parallelism (ops/ranks.py) a rank holds its part of the heads, inner widths and the
vocabulary. Between modules it also holds only its part of the tokens, (N/n, C): attention and
feed-forward begin with a gather and end with a scatter.

Letters in shape comments: B rows, T tokens, C n_embd, H n_head, K n_kv_head, D head_dim,
F ffn_dim, V vocab_size, N = B*T, n ranks of a group.
"""

import contextlib
import functools
import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import BadInput, at_least, one_of
from data import valid_positions
from ops import kernels, ranks
from ops.attention import attend, document_boundaries
from ops.loss import chunk_rows, linear_cross_entropy
from ops.moe import MixtureOfExperts
from ops.moe import layers as moe_layers

ROPE_SCALING = {       # type -> the other keys of rope_scaling
    'llama3': {'factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position'},
    'linear': {'factor'},
    'yarn': {'factor', 'original_max_position', 'beta_fast', 'beta_slow', 'attention_factor'}}


@dataclass
class ModelConfig:
    """Knobs of the network. The defaults are MobileLLM-R1 140M."""
    vocab_size: at_least(1) = 128256        # rows of the embedding table
    n_layer: at_least(1) = 15               # transformer blocks
    n_head: at_least(1) = 9                 # query heads
    n_kv_head: at_least(1) = 3              # key and value heads
    n_embd: at_least(1) = 576               # width of the residual stream
    ffn_dim: at_least(1) = 2048             # inner width of the feed-forward network
    head_dim: at_least(1) | None = None     # width of a head. None: n_embd // n_head
    tie_embeddings: bool = True             # the output weight is the embedding table
    qk_norm: bool = False                   # RMSNorm of query and key heads before the rotation
                                            # (Qwen3, MobileLLM-R1)
    qk_norm_weight: bool = True             # its learned scale (Qwen3). MobileLLM-R1 has none
    qkv_bias: bool = False                  # bias of the q, k and v projections (Qwen2)
    layer_repeat: at_least(1) = 1           # times that every layer runs in a row with the same
                                            # weights (MobileLLM-LS)
    norm_eps: at_least(0.0) = 1e-5          # epsilon of RMSNorm
    rope_theta: at_least(1.0) = 500000.0    # base of the rotary frequencies
    rope_scaling: dict | None = None        # for longer context: type (llama3, linear, yarn) and
                                            # the keys that ROPE_SCALING lists for it
    nope_layers: list[int] | None = None    # layers, from 0, without rotary positions (SmolLM3).
                                            # None: all layers have them
    n_expert: at_least(0) = 0               # routed experts of a layer. 0: a dense model
    n_expert_active: at_least(0) = 0        # routed experts that see a token
    n_shared_expert: at_least(0) = 0        # experts that see every token
    expert_ffn_dim: at_least(0) = 0         # inner width of an expert
    n_dense_layer: at_least(0) = 0          # first layers that stay dense (width ffn_dim)
    expert_score: one_of('sigmoid', 'softmax') = 'sigmoid'      # how the router scores experts:
                                            # sigmoid (DeepSeek-V3) or softmax (Mixtral)

    def __post_init__(self):
        sizes = (
            'vocab_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'ffn_dim', 'layer_repeat',
            'head_dim')
        for name in sizes:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f'{name} = {value} must be at least 1.')
        if not self.norm_eps >= 0 or not 1 <= self.rope_theta < math.inf:
            raise BadInput(
                f'norm_eps = {self.norm_eps} must be at least 0, and rope_theta = '
                f'{self.rope_theta} at least 1.')
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                nearest = round(self.n_embd / self.n_head) * self.n_head
                raise BadInput(
                    f'n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}. Try '
                    f'{nearest}, or set head_dim.')
            self.head_dim = self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise BadInput(
                f'n_head = {self.n_head} is not a multiple of n_kv_head = {self.n_kv_head}.')
        if self.head_dim % 2:
            raise BadInput(f'head_dim = {self.head_dim} is odd; rotary positions need an even one.')
        if self.n_expert:
            self.check_experts()
        if self.nope_layers is not None:
            fits = all(type(i) is int and 0 <= i < self.n_layer for i in self.nope_layers)
            if not fits or self.nope_layers != sorted(set(self.nope_layers)):
                raise BadInput(
                    f'nope_layers = {self.nope_layers} must be numbers of layers in ascending '
                    f'order, from 0 to n_layer - 1 = {self.n_layer - 1}.')
            # One form for the same model, so that two configs can be compared.
            self.nope_layers = self.nope_layers or None
        if self.rope_scaling is not None:
            kind = str(self.rope_scaling.get('type', 'llama3'))
            if kind not in ROPE_SCALING:
                raise BadInput(
                    f"rope_scaling type '{kind}' must be one of {', '.join(ROPE_SCALING)}.")
            keys = set(self.rope_scaling) - {'type'}
            if keys != ROPE_SCALING[kind]:
                raise BadInput(
                    f"rope_scaling of type '{kind}' needs exactly the keys "
                    f'{sorted(ROPE_SCALING[kind])}, got {sorted(keys)}.')
            for key in keys:
                value = self.rope_scaling[key]
                if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                    raise BadInput(
                        f"rope_scaling: {key} = {value!r} must be a finite number above 0.")
            if kind == 'llama3':
                low = self.rope_scaling['low_freq_factor']
                if not low < self.rope_scaling['high_freq_factor']:
                    raise BadInput(
                        f'rope_scaling: low_freq_factor = {low} must be below high_freq_factor.')

    def check_experts(self):
        fits = 1 <= self.n_expert_active <= self.n_expert and self.expert_ffn_dim >= 1
        if not (fits and 0 <= self.n_dense_layer <= self.n_layer and self.n_shared_expert >= 0):
            raise BadInput(
                f'n_expert = {self.n_expert} needs n_expert_active (is {self.n_expert_active}) '
                f'from 1 to n_expert, expert_ffn_dim (is {self.expert_ffn_dim}) of at least 1, '
                f'n_dense_layer (is {self.n_dense_layer}) from 0 to n_layer, and n_shared_expert '
                f'(is {self.n_shared_expert}) of at least 0.')
        if self.expert_score not in ('sigmoid', 'softmax'):
            raise BadInput(f"expert_score = '{self.expert_score}' must be sigmoid or softmax.")


# -- counts ----------------------------------------------------------------------------------------


def vector_parameters(config):
    """Parameters of a layer's norms and biases."""
    c = config
    n = 2 * c.n_embd
    if c.qk_norm and c.qk_norm_weight:
        n += 2 * c.head_dim
    if c.qkv_bias:
        n += c.head_dim * (c.n_head + 2 * c.n_kv_head)
    return n


def count_parameters(config):
    """Parameters from the formula, without building the model.

    Returns dict(total, embedding, non_embedding, active, routed). `embedding` counts the input
    table, and the output table too when it is not tied. `active` counts the parameters that one
    token passes through, `routed` those of routed experts.
    """
    c = config
    attention = 2 * c.n_embd * c.head_dim * (c.n_head + c.n_kv_head) + vector_parameters(c)
    n_moe = c.n_layer - c.n_dense_layer if c.n_expert else 0
    dense = (c.n_layer - n_moe) * 3 * c.n_embd * c.ffn_dim
    blocks = c.n_layer * attention + dense + c.n_embd
    one_expert = 3 * c.n_embd * c.expert_ffn_dim
    router = c.n_embd * c.n_expert
    moe = n_moe * (router + (c.n_expert + c.n_shared_expert) * one_expert)
    moe_active = n_moe * (router + (c.n_expert_active + c.n_shared_expert) * one_expert)
    embedding = c.vocab_size * c.n_embd * (1 if c.tie_embeddings else 2)
    return dict(
        total=blocks + moe + embedding,
        embedding=embedding,
        non_embedding=blocks + moe,
        active=blocks + moe_active + embedding,
        routed=n_moe * c.n_expert * one_expert,
    )


def flops_per_token(config, block_size, causal=False):
    """FLOPs of forward and backward for one token: 6 per matrix weight, plus attention.

    This is the PaLM count (arXiv:2204.02311, appendix B) that nanoGPT and torchtitan use:
    6 * N_matmul + 12 * layers * H * D * T. The output layer counts once, the embedding look-up not
    at all. causal=True halves the attention term, as only half of the scores are needed.
    """
    c = config
    params = count_parameters(c)
    output = c.vocab_size * c.n_embd
    layers = params['active'] - params['embedding'] - c.n_layer * vector_parameters(c) - c.n_embd
    # Two products forward, scores and values, and four backward, with 2 FLOPs per multiply-add.
    attention = 12 * c.n_layer * c.layer_repeat * c.n_head * c.head_dim * block_size
    if causal:
        attention //= 2
    return 6 * (c.layer_repeat * layers + output) + attention


# -- rotary positions ------------------------------------------------------------------------------


def rope_frequencies(config, device=None):
    """Angle per position of each pair of a head's dimensions: (D/2,) fp32.

    Su et al. 2021 (arXiv:2104.09864). rope_scaling 'linear' divides all frequencies by `factor`.
    'llama3' (Llama 3.1) divides the low ones and keeps the high ones, with a linear ramp between
    them over the number of turns within the original context. 'yarn' (arXiv:2309.00071, section
    3.2) does the same with a ramp over the dimensions.
    """
    D = config.head_dim
    scaling = config.rope_scaling
    exponents = torch.arange(0, D, 2, dtype=torch.float32, device=device) / D
    freqs = config.rope_theta**-exponents  # (D/2,)
    if scaling is None:
        return freqs
    kind = scaling.get('type', 'llama3')
    if kind == 'linear':
        return freqs / scaling['factor']
    if kind == 'yarn':

        def dimension(n_turns):
            """The real-valued dimension that turns this often within the original context."""
            inverse_frequency = scaling['original_max_position'] / (n_turns * 2 * math.pi)
            return D * math.log(inverse_frequency) / (2 * math.log(config.rope_theta))

        # Dimensions up to `low` keep their frequency, and those from `high` on are slowed fully.
        low = max(math.floor(dimension(scaling['beta_fast'])), 0)
        high = min(math.ceil(dimension(scaling['beta_slow'])), D - 1)
        slowed = (torch.arange(D // 2, device=device) - low) / max(high - low, 1e-3)
        slowed = slowed.clamp(0, 1)
        return freqs * (1 - slowed + slowed / scaling['factor'])
    turns = scaling['original_max_position'] * freqs / (2 * math.pi)
    low = scaling['low_freq_factor']
    high = scaling['high_freq_factor']
    # 1 for high frequencies, which are kept, and 0 for low ones.
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return freqs * (kept + (1 - kept) / scaling['factor'])


def rotary_tables(config, position, T, x):
    """Cosines and sines of T positions from `position` on, (T, D) each, in the dtype of x."""
    positions = torch.arange(position, position + T, device=x.device)
    angles = positions[:, None] * rope_frequencies(config, x.device)  # (T, D/2)
    cos = angles.cos()
    sin = angles.sin()
    if config.rope_scaling is not None:
        # YaRN scales the logits of attention through its queries and keys.
        factor = config.rope_scaling.get('attention_factor', 1.0)
        cos = cos * factor
        sin = sin * factor
    # The sign of the rotation is in the sines, as kernels.rotate_heads expects.
    return torch.cat((cos, cos), -1).to(x.dtype), torch.cat((-sin, sin), -1).to(x.dtype)


def cache_mask(position, T, first, device):
    """Mask of T queries over the position + T keys in a cache, first as in `GPT.forward`.

    Returns (B or 1, 1, T, T_total) bool, or None if plain causal attention is the same.
    """
    if first is None and (position == 0 or T == 1):
        return None
    n_keys = position + T
    mask = torch.ones(T, n_keys, dtype=torch.bool, device=device).tril(position)[None, None]
    if first is None:
        return mask
    keys = torch.arange(n_keys, device=device)
    # Padding sees itself, because the softmax over no key at all is NaN.
    itself = keys == keys[position:, None]
    return mask & (keys >= first[:, None, None, None]) | itself


# -- layers ----------------------------------------------------------------------------------------

# `tp` of a module is None, or the ranks.Group over which parallel.apply_parallelism has split it.


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square in fp32. Zhang & Sennrich 2019 (arXiv:1910.07467)."""

    tp = None

    def __init__(self, dim, eps, has_weight=True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim)) if has_weight else None
        self.dim = dim
        self.eps = eps

    def gain(self):
        """The weight, or None. Under tensor parallelism its gradient is summed over the group."""
        if self.tp is None or self.weight is None:
            return self.weight
        return ranks.share(self.weight, self.tp)

    def forward(self, x):
        return kernels.rms_norm(x, self.gain(), self.eps)


class Attention(nn.Module):
    tp = None

    def __init__(self, config):
        super().__init__()
        c = config
        # Local heads: apply_parallelism divides their number.
        self.n_head = c.n_head
        self.n_kv_head = c.n_kv_head
        self.head_dim = c.head_dim
        self.wq = nn.Linear(c.n_embd, c.n_head * c.head_dim, bias=c.qkv_bias)
        self.wk = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.wv = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.wo = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=False)
        self.q_norm = None
        self.k_norm = None
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.norm_eps, c.qk_norm_weight)
            self.k_norm = RMSNorm(c.head_dim, c.norm_eps, c.qk_norm_weight)

    def forward(self, x, cos, sin, mask=None, cu_seqlens=None, cache=None, position=0):
        """x (B, T, C), or this rank's part of the tokens (N/n, C) -> the same shape.

        cos, sin    (T, D), as from `rotary_tables`
        mask        (B or 1, 1, T, T_total) bool, True where a query may look; None: causal
        cu_seqlens  (documents + 1,) int32, document boundaries in the B*T stream: attention stays
                    within a document
        cache       (2, B, T_max, K, D), keys and values of the first `position` tokens. The new
                    ones are written into it.
        """
        if self.tp is not None:
            x = ranks.gather(x, self.tp)
        T = len(cos)
        q = self.wq(x).view(-1, T, self.n_head, self.head_dim)  # (B, T, H, D)
        k = self.wk(x).view(-1, T, self.n_kv_head, self.head_dim)  # (B, T, K, D)
        v = self.wv(x).view(-1, T, self.n_kv_head, self.head_dim)  # (B, T, K, D)
        if self.q_norm is None:
            q, k = kernels.rotate_heads(q, k, cos, sin)
        elif kernels.across_modules(q):
            wq = self.q_norm.gain()
            wk = self.k_norm.gain()
            q, k = kernels.rotate_heads(q, k, cos, sin, True, wq, wk, self.q_norm.eps)
        else:
            # influence.py needs calls of the modules, because it has hooks on them.
            q, k = kernels.rotate_heads(self.q_norm(q), self.k_norm(k), cos, sin)
        if cache is not None:
            cache[0, :, position : position + T] = k
            cache[1, :, position : position + T] = v
            k = cache[0, :, : position + T]
            v = cache[1, :, : position + T]
        # A single query is the last token, so it may look at every key of the cache.
        y = attend(q, k, v, mask, cu_seqlens, causal=T > 1)  # (B, T, H, D)
        y = self.wo(y.reshape(*x.shape[:-1], -1))
        return y if self.tp is None else ranks.scatter(y, self.tp)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Shazeer 2020 (arXiv:2002.05202)."""

    tp = None

    def __init__(self, config, inner):
        super().__init__()
        self.w_gate = nn.Linear(config.n_embd, inner, bias=False)
        self.w_up = nn.Linear(config.n_embd, inner, bias=False)
        self.w_down = nn.Linear(inner, config.n_embd, bias=False)

    def forward(self, x):
        if self.tp is not None:
            x = ranks.gather(x, self.tp)
        h = kernels.swiglu(self.w_gate(x), self.w_up(x))  # (B, T, F)
        y = self.w_down(h)
        return y if self.tp is None else ranks.scatter(y, self.tp)


class Block(nn.Module):
    def __init__(self, config, has_experts):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = RMSNorm(config.n_embd, config.norm_eps)
        if has_experts:
            self.ffn = MixtureOfExperts(config, FeedForward)
        else:
            self.ffn = FeedForward(config, config.ffn_dim)

    def forward(self, x, cos, sin, mask=None, cu_seqlens=None, cache=None, position=0):
        """Arguments as of `Attention.forward`. Returns (x, balance loss of its experts or None)."""
        change = self.attn(self.attn_norm(x), cos, sin, mask, cu_seqlens, cache, position)
        if kernels.across_modules(x):
            h, x = kernels.add_rms_norm(change, x, self.ffn_norm.gain(), self.ffn_norm.eps)
        else:
            # influence.py needs a call of the module, because it has a hook on it.
            x = x + change
            h = self.ffn_norm(x)
        if isinstance(self.ffn, MixtureOfExperts):
            change, balance_loss = self.ffn(h, len(cos))
            return x + change, balance_loss
        return x + self.ffn(h), None


class GPT(nn.Module):
    """The full network.

    Build it on the meta device, shard it (parallel.apply_parallelism), call `to_empty`, and then
    `init_weights`.
    """

    layout = None  # ranks.Layout, set by apply_parallelism
    tp = None
    one_graph = False  # blocks are compiled, and without gradients they run training's graph, too
    balance_loss = 0.0  # weight of the experts' balance loss in training

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList()
        for i in range(config.n_layer):
            self.blocks.append(Block(config, config.n_expert and i >= config.n_dense_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = None
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def frozen(self, dtype):
        """Converts the model to dtype for use without training, and returns it."""
        # The experts' biases stay in fp32: they are sums of steps too small for bf16.
        self.to(dtype).requires_grad_(False)
        for layer in moe_layers(self):
            layer.bias = layer.bias.float()
        return self

    @property
    def output_weight(self):
        """The output layer's weight (V, C), or this rank's part. When tied, the embedding table."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self, idx, doc_ids=None, cache=None, position=0, first=None, grad_from=0, around=None
    ):
        """Token ids to final hidden states, normed and ready for the output layer.

        idx        (B, T) int32 or int64 token ids
        doc_ids    (B, T) int, the document of every token: attention stays within it. Or document
                   boundaries, (documents + 1,) int32 (attention.document_boundaries). Computed on
                   the host, they save a GPU synchronization. None: plain causal attention. Rotary
                   positions are relative, so they do not restart with a document.
        cache      list of n_layer * layer_repeat tensors (2, B, T_max, K, D), filled in place
        position   number of tokens in the cache
        first      (B,) int64, index of every row's first token, for rows padded on the left. Needs
                   a cache.
        grad_from  first block whose parameters get a gradient. Above 0 the embedding gets none.
        around     function that makes a context for the blocks from grad_from on, or None
        Returns (B, T, C) in the compute dtype (autocast's when it is on). Under tensor parallelism
        every rank of the group gets all of it, and all must use it in the same way.
        """
        x, _ = self.hidden(idx, doc_ids, cache, position, first, grad_from, around)
        if self.tp is not None:
            x = ranks.gather(x, self.tp, replicated=True).view(*idx.shape, -1)
        return x

    def hidden(
        self, idx, doc_ids=None, cache=None, position=0, first=None, grad_from=0, around=None
    ):
        """As `forward` before its gather: (hidden states, sum of balance losses or None)."""
        T = idx.shape[1]
        wants_grad = torch.is_grad_enabled()
        if self.tp is not None:
            # A batch of generation or evaluation may have any number of tokens.
            self.tp.splits = cache is None and idx.numel() % self.tp.size == 0
            if wants_grad and not self.tp.splits:
                raise BadInput(
                    f'{idx.numel():,} tokens of a batch cannot be split over tp = {self.tp.size} '
                    'ranks. Change batch_size or block_size.'
                )
        with torch.set_grad_enabled(wants_grad and grad_from == 0):
            if self.tp is None:
                x = self.embed(idx)  # (B, T, C)
            else:
                x = ranks.embed(idx, self.embed.weight, self.tp)
        if torch.is_autocast_enabled(x.device.type):
            # The residual stream has low precision too, as under FSDP's bf16 policy.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rotary = rotary_tables(self.config, position, T, x)
        nope_layers = self.config.nope_layers or ()
        # A rotation by no angle: the layers without positions run the same code.
        identity = (torch.ones_like(rotary[0]), torch.zeros_like(rotary[1])) if nope_layers else ()
        mask = None
        cu_seqlens = None
        if doc_ids is not None:
            cu_seqlens = doc_ids if doc_ids.dim() == 1 else document_boundaries(doc_ids)
            # Batches have different numbers of documents, and the first would be a constant.
            torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
        elif cache is not None:
            mask = cache_mask(position, T, first, x.device)
        balance_loss = None
        # A repeated layer has a cache for each of its applications.
        application = 0
        for i, block in enumerate(self.blocks):
            cos, sin = identity if i in nope_layers else rotary
            has_grad = wants_grad and i >= grad_from
            # torch.compile would make a graph for each combination of the gradient mode and of an
            # input with and without a gradient. Evaluation and measurements would compile anew.
            as_trained = self.one_graph and cache is None
            context = contextlib.nullcontext()
            if around is not None and i >= grad_from:
                context = around()
            with context, torch.set_grad_enabled(has_grad or as_trained):
                for _ in range(self.config.layer_repeat):
                    kv = None if cache is None else cache[application]
                    if as_trained and not x.requires_grad:
                        x = x.detach().requires_grad_()
                    x, of_block = block(x, cos, sin, mask, cu_seqlens, kv, position)
                    if not has_grad:
                        x = x.detach()  # frees what the block has kept for a backward pass
                    balance_loss = of_block if balance_loss is None else balance_loss + of_block
                    application += 1
        return self.norm(x), balance_loss

    def loss(
        self, idx, targets, token_weights=None, doc_ids=None, grad_from=0, objective=None,
        valid=None
    ):
        """Forward and loss. Returns (weighted sum of losses () fp32, losses (B, T), hits (B, T)).

        targets        (B, T) int64, -1 where the loss ignores the token
        token_weights  (B, T) fp32 or None
        doc_ids        as in `forward`, and so is grad_from; above 0 the output weight gets no
                       gradient either
        objective      replaces `linear_cross_entropy` and takes its arguments (distillation)
        valid          positions of supervised targets from `valid_positions`: the others then cost
                       nothing in the output layer. None: all positions. Under tensor parallelism
                       an objective needs this rank's share of the positions, and losses and hits
                       are of this share.
        """
        # One call for both, because FSDP2 gathers the output weight for the length of a call.
        x, balance_loss = self.hidden(idx, doc_ids, grad_from=grad_from)
        if self.tp is not None:
            x = ranks.gather(x, self.tp, replicated=objective is None)
        h = x.flatten(0, -2)  # (N, C)
        targets = targets.flatten()  # (N,)
        if token_weights is not None:
            token_weights = token_weights.flatten()
        weight = self.output_weight
        if grad_from:
            weight = weight.detach()
        if objective is None:
            # On a GPU this would wait for the device, so the caller does it on the host.
            if valid is None and targets.device.type == 'cpu':
                valid = valid_positions(targets)
            part_of = None
            if self.tp is not None:
                part_of = (self.tp.group, self.tp.rank * len(weight))
            objective = functools.partial(linear_cross_entropy, part_of=part_of)
        elif self.tp is not None:
            # Ranks split the tokens instead of the vocabulary, so that any objective will do.
            weight = ranks.gather(weight, self.tp)
        if valid is None:
            total, losses, hits = objective(h, weight, targets, token_weights)
        else:
            if token_weights is not None:
                token_weights = token_weights[valid]
            total, *found = objective(h[valid], weight, targets[valid], token_weights)
            losses, hits = (t.new_zeros(len(h)).index_copy_(0, valid, t) for t in found)
        if balance_loss is not None and self.balance_loss:
            # The caller divides by the number of valid tokens. What remains is the rows' mean.
            n_valid = (targets >= 0).sum()
            total = total + self.balance_loss * balance_loss / len(idx) * n_valid
        return total, losses.view_as(idx), hits.view_as(idx)

    @torch.no_grad()
    def score(self, idx, rows, positions, targets):
        """Losses of single next tokens: `targets` (n,) at `positions` (n,) of `rows` (n,), int64.

        idx (B, T) is padded on the right. Logits are computed for these n places only. Returns
        (losses (n,) fp32 nats, hits (n,) bool).
        """
        h = self.forward(idx)[rows, positions]  # (n, C)
        weight = self.output_weight
        if self.tp is not None:
            weight = ranks.collect(weight, self.tp)
        weight = weight.to(h.dtype)
        losses = []
        hits = []
        # In chunks, because logits of all n places in fp32 may not fit into memory.
        step = chunk_rows(len(h), len(weight), h.device, torch.float32)
        for part, target in zip(h.split(step), targets.split(step), strict=True):
            z = F.linear(part, weight).float()  # (chunk, V)
            losses.append(z.logsumexp(-1) - z.gather(1, target[:, None])[:, 0])
            hits.append(z.argmax(-1) == target)
        return torch.cat(losses), torch.cat(hits)

    @torch.no_grad()
    def logits(self, idx, cache=None, position=0, first=None):
        """Logits of the last position only: (B, V) fp32."""
        h = self.forward(idx, cache=cache, position=position, first=first)[:, -1]
        z = F.linear(h, self.output_weight.to(h.dtype)).float()
        # Ranks have different columns, and `collect` joins rows.
        return z if self.tp is None else ranks.collect(z.T, self.tp).T

    @torch.no_grad()
    def stream(
        self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=0, first=None
    ):
        """Continues idx (B, T) with a KV cache: yields (B, 1) int64, max_new_tokens times.

        temperature, top_k and top_p are as in `sample_token`, and first as in `forward`. The same
        seed gives the same tokens.
        """
        B, T = idx.shape
        c = self.config
        device = idx.device
        attention = self.blocks[0].attn
        # Keys and values are cached in the dtype that the products return.
        dtype = attention.wk.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        shape = (2, B, T + max_new_tokens, attention.n_kv_head, c.head_dim)
        cache = []
        for _ in range(c.n_layer * c.layer_repeat):
            cache.append(torch.zeros(shape, device=device, dtype=dtype))
        generator = torch.Generator(device).manual_seed(seed)
        token = idx.long()
        position = 0
        for _ in range(max_new_tokens):
            logits = self.logits(token, cache, position, first)  # (B, V)
            position += token.shape[1]
            token = sample_token(logits, temperature, top_k, top_p, generator)
            yield token

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, stop_token=None, seed=0):
        """Extends idx (B, T) by `stream`. Returns (B, T + new) int64.

        A row that has produced stop_token is filled with it. Generation ends when every row has.
        """
        out = [idx.long()]
        done = torch.zeros(idx.shape[0], 1, dtype=torch.bool, device=idx.device)
        for token in self.stream(idx, max_new_tokens, temperature, top_k, seed=seed):
            if stop_token is not None:
                token = token.masked_fill(done, stop_token)
                done |= token == stop_token
            out.append(token)
            if done.all():
                break
        return torch.cat(out, 1)


def sample_token(logits, temperature, top_k, top_p, generator):
    """Draws a token from logits (B, V): (B, 1) int64. Temperature 0 takes the likeliest one.

    top_k keeps so many candidates, top_p the likeliest that together reach this probability.
    None keeps all.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    probabilities = (logits / temperature).softmax(-1)
    if top_p is not None:
        # A candidate stays if those before it do not reach top_p yet, so the likeliest always does.
        ordered, order = probabilities.sort(descending=True)
        likelier = ordered.cumsum(-1) - ordered
        ordered[likelier >= top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)


# -- initial weights -------------------------------------------------------------------------------

DRAWN_AT_ONCE = 4  # parameters that are drawn in threads, and are in memory in full

def fill_(tensor, name, seed, config, is_output=False):
    """Initial values of a parameter or an expert. See `init_weights`."""
    # The generator depends on the name alone, not on what was drawn before.
    digest = hashlib.sha256(f'{seed}/{name}'.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], 'little') >> 1)
    if 'norm' in name:
        tensor.fill_(1.0)
        return
    if name.endswith('bias'):
        tensor.zero_()
        return
    std = 0.02
    if 'wo.' in name or 'w_down' in name:
        # Sums of 2 * layers such outputs make up the residual stream (GPT-2).
        std = 0.02 / math.sqrt(2 * config.n_layer * config.layer_repeat)
    elif is_output:
        # Logits then have a standard deviation of at most 0.4.
        std = min(0.02, 0.4 / math.sqrt(config.n_embd))
    tensor.normal_(std=std, generator=generator)


@torch.no_grad()
def init_weights(model, seed):
    """Random weights in place, the same for any number of ranks and any device.

    Matrices are normal with std 0.02. Those that write to the residual stream are divided by
    sqrt(2 * layers). The output weight is so small that a fresh model's loss is ln(vocab_size)
    within 2 %. Norms are 1, biases 0.
    """
    def draw(named):
        name, parameter = named
        full = torch.empty(ranks.full_shape(model.layout, name, parameter))
        fill_(full, name, seed, model.config, parameter is model.output_weight)
        return full

    # Every parameter, and every expert, is drawn in full on the CPU. A rank then keeps its part.
    whole = []
    with ThreadPoolExecutor(DRAWN_AT_ONCE) as pool:
        for name, parameter in model.named_parameters():
            if '.experts.' not in name:
                whole.append((name, parameter))
                continue
            # Only the local ones: drawing all experts of a large model would take hours.
            local = torch.empty(parameter.shape)
            first = 0
            if ranks.part_of(model.layout, name):
                first = model.layout.experts.rank * len(local)
            names = [f'{name}.{first + i}' for i in range(len(local))]
            fill = functools.partial(fill_, seed=seed, config=model.config)
            list(pool.map(fill, local, names))
            parameter.copy_(ranks.sharded(parameter, local))
        for i in range(0, len(whole), DRAWN_AT_ONCE):
            part = whole[i : i + DRAWN_AT_ONCE]
            for (name, parameter), full in zip(part, pool.map(draw, part), strict=True):
                parameter.copy_(ranks.placed(model.layout, name, parameter, full))
    # The buffers are the experts' biases and loads.
    for buffer in model.buffers():
        buffer.zero_()
