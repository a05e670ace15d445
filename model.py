"""The network: a Llama / MobileLLM transformer in one class, its loss, generation and FLOP count.

RMSNorm, rotary positions (with scaling), grouped-query attention, optional QK-norm (Qwen3, MobileLLM-R1), optional QKV bias
(Qwen2), SwiGLU, tied or untied embeddings, optional repetition of every layer (MobileLLM-LS). Weight layout and rotary
convention (two halves) are those of Hugging Face's Llama, so its weights copy over one to one.

`GPT.forward` returns hidden states. The loss is a function of hidden states and the output weight (ops/loss.py) and works through the
rows in chunks, so the B x T x V logits never exist at once. What lies between the matrix products is in ops/kernels.py, mixtures of experts in ops/moe.py.

Under tensor parallelism (ops/ranks.py) a module's weights are this rank's part of its heads, inner width or vocabulary, and its
tokens between modules are its part of them, (N/n, C); attention and feed-forward begin with a gather and end with a scatter.

Letters in shape comments: B rows, T tokens, C n_embd, H n_head, K n_kv_head, D head_dim, F ffn_dim, V vocab_size, N = B*T, n ranks of a group.
"""
import functools
import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import BadInput
from data import valid_positions
from ops import kernels, ranks
from ops.attention import attend, document_boundaries
from ops.loss import chunk_rows, linear_cross_entropy
from ops.moe import MixtureOfExperts
from ops.moe import layers as moe_layers

ROPE_SCALING = {       # type -> its numbers
    'llama3': {'factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position'},
    'linear': {'factor'},
    'yarn': {'factor', 'original_max_position', 'beta_fast', 'beta_slow', 'attention_factor'}}


@dataclass
class ModelConfig:
    vocab_size: int = 128256
    n_layer: int = 15
    n_head: int = 9
    n_kv_head: int = 3
    n_embd: int = 576
    ffn_dim: int = 2048
    head_dim: int | None = None           # None: n_embd // n_head
    tie_embeddings: bool = True
    qk_norm: bool = False                 # RMSNorm of every query and key head before the rotation (Qwen3, MobileLLM-R1)
    qk_norm_weight: bool = True           # its learned scale (Qwen3); MobileLLM-R1 has none
    qkv_bias: bool = False                # bias of the q, k and v projections (Qwen2)
    layer_repeat: int = 1                 # every layer runs this many times in a row with the same weights (MobileLLM-LS)
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: dict | None = None      # for longer context: type (llama3, linear, yarn) and what ROPE_SCALING lists for it
    n_expert: int = 0                     # mixture of experts: routed experts of a layer, 0 = dense
    n_expert_active: int = 0              # routed experts that see a token
    n_shared_expert: int = 0              # experts that see every token
    expert_ffn_dim: int = 0
    n_dense_layer: int = 0                # first layers that stay dense (width ffn_dim)
    expert_score: str = 'sigmoid'         # how the router scores experts: sigmoid (DeepSeek-V3) or softmax (Mixtral)

    def __post_init__(self):
        for name in ('vocab_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'ffn_dim', 'layer_repeat', 'head_dim'):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise BadInput(f'{name} = {getattr(self, name)} must be at least 1.')
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise BadInput(f'n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}. '
                               f'Try {round(self.n_embd / self.n_head) * self.n_head}, or set head_dim.')
            self.head_dim = self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise BadInput(f'n_head = {self.n_head} is not a multiple of n_kv_head = {self.n_kv_head}.')
        if self.head_dim % 2:
            raise BadInput(f'head_dim = {self.head_dim} is odd; rotary positions need an even one.')
        if self.n_expert:
            if not (1 <= self.n_expert_active <= self.n_expert and self.expert_ffn_dim >= 1 and 0 <= self.n_dense_layer <= self.n_layer
                    and self.n_shared_expert >= 0):
                raise BadInput(f'n_expert = {self.n_expert} needs n_expert_active (is {self.n_expert_active}) from 1 to n_expert, expert_ffn_dim '
                               f'(is {self.expert_ffn_dim}) of at least 1, and n_dense_layer (is {self.n_dense_layer}) from 0 to n_layer.')
            if self.expert_score not in ('sigmoid', 'softmax'):
                raise BadInput(f"expert_score = '{self.expert_score}' must be sigmoid or softmax.")
        if self.rope_scaling is not None:
            kind = self.rope_scaling.get('type', 'llama3')
            if kind not in ROPE_SCALING:
                raise BadInput(f"rope_scaling type '{kind}' must be one of {', '.join(ROPE_SCALING)}.")
            if set(self.rope_scaling) - {'type'} != ROPE_SCALING[kind]:
                raise BadInput(f"rope_scaling of type '{kind}' needs exactly the keys {sorted(ROPE_SCALING[kind])}, got "
                               f'{sorted(set(self.rope_scaling) - {"type"})}.')


# -- counts ------------------------------------------------------------------------------------------------------------

def count_parameters(config):
    """Parameters from the formula, without building the model: dict(total, embedding, non_embedding, active, routed).

    `embedding` counts the input table, and the output table too when it is not tied; `active` is what one token passes
    through (all of it in a dense model); `routed` those of routed experts.
    """
    c = config
    attention = c.n_embd * c.head_dim * (2 * c.n_head + 2 * c.n_kv_head)
    attention += c.head_dim * (c.n_head + 2 * c.n_kv_head) * c.qkv_bias + 2 * c.head_dim * (c.qk_norm and c.qk_norm_weight) + 2 * c.n_embd
    n_moe = c.n_layer - c.n_dense_layer if c.n_expert else 0
    one_expert = 3 * c.n_embd * c.expert_ffn_dim
    router = c.n_embd * c.n_expert
    blocks = c.n_layer * attention + (c.n_layer - n_moe) * 3 * c.n_embd * c.ffn_dim + c.n_embd
    moe = n_moe * (router + (c.n_expert + c.n_shared_expert) * one_expert)
    routed = n_moe * c.n_expert * one_expert
    moe_active = n_moe * (router + (c.n_expert_active + c.n_shared_expert) * one_expert)
    embedding = c.vocab_size * c.n_embd * (1 if c.tie_embeddings else 2)
    return dict(total=blocks + moe + embedding, embedding=embedding, non_embedding=blocks + moe,
                active=blocks + moe_active + embedding, routed=routed)


def flops_per_token(config, block_size, causal=False):
    """FLOPs of forward and backward for one token: 6 per matrix weight it meets, plus attention.

    The PaLM count (arXiv:2204.02311, appendix B) that nanoGPT and torchtitan use: 6 * N_matmul + 12 * layers * H * D * T,
    the output layer once and the embedding look-up not at all. causal=True halves the attention term, the honest count.
    """
    c = config
    params = count_parameters(c)
    matmul = params['active'] - params['embedding'] + c.vocab_size * c.n_embd
    matmul -= c.n_embd * (2 * c.n_layer + 1) + c.n_layer * (
        2 * c.head_dim * (c.qk_norm and c.qk_norm_weight) + c.head_dim * (c.n_head + 2 * c.n_kv_head) * c.qkv_bias)      # norms and biases
    matmul += (c.layer_repeat - 1) * (matmul - c.vocab_size * c.n_embd)
    attention = 12 * c.n_layer * c.layer_repeat * c.n_head * c.head_dim * block_size
    return 6 * matmul + (attention // 2 if causal else attention)


# -- rotary positions --------------------------------------------------------------------------------------------------

def rope_frequencies(config, device=None):
    """Angle per position of every pair of a head's dimensions: (D/2,) fp32. Su et al. 2021 (arXiv:2104.09864).

    rope_scaling 'linear' slows all waves by `factor`; 'llama3' (Llama 3.1) slows the long ones and keeps the short ones, with
    a linear ramp over the number of turns within the original context; 'yarn' (arXiv:2309.00071, section 3.2) the same with
    a ramp over the dimensions.
    """
    D, scaling = config.head_dim, config.rope_scaling
    freqs = config.rope_theta ** -(torch.arange(0, D, 2, dtype=torch.float32, device=device) / D)      # (D/2,)
    if scaling is None:
        return freqs
    kind = scaling.get('type', 'llama3')
    if kind == 'linear':
        return freqs / scaling['factor']
    if kind == 'yarn':
        def dimension(n_turns):             # the (real) dimension whose wave turns that often within the original context
            return D * math.log(scaling['original_max_position'] / (n_turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))
        low = max(math.floor(dimension(scaling['beta_fast'])), 0)
        high = min(math.ceil(dimension(scaling['beta_slow'])), D - 1)
        slowed = ((torch.arange(D // 2, device=device) - low) / max(high - low, 1e-3)).clamp(0, 1)
        return freqs * (1 - slowed + slowed / scaling['factor'])
    turns = scaling['original_max_position'] * freqs / (2 * math.pi)     # rotations within the original context
    low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
    keep = ((turns - low) / (high - low)).clamp(0, 1)                    # 1: short wave, kept; 0: long wave, slowed
    return freqs * (keep + (1 - keep) / scaling['factor'])


# -- layers ------------------------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square in fp32. Zhang & Sennrich 2019 (arXiv:1910.07467). weight may be left out."""
    tp = None

    def __init__(self, dim, eps, has_weight=True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim)) if has_weight else None
        self.dim, self.eps = dim, eps

    def gain(self):
        return ranks.share(self.weight, self.tp)

    def forward(self, x):
        return kernels.rms_norm(x, self.gain(), self.eps)


class Attention(nn.Module):
    tp = None                                             # ranks.Group: this rank then has n_head of the heads

    def __init__(self, config):
        super().__init__()
        c = config
        self.n_head, self.n_kv_head, self.head_dim = c.n_head, c.n_kv_head, c.head_dim
        self.wq = nn.Linear(c.n_embd, c.n_head * c.head_dim, bias=c.qkv_bias)
        self.wk = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.wv = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.wo = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps, c.qk_norm_weight) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps, c.qk_norm_weight) if c.qk_norm else None

    def forward(self, x, cos, sin, mask=None, cu_seqlens=None, cache=None, position=0):
        """x (B, T, C), or this rank's tokens of it (N/n, C) -> the same shape. cos, sin (T, D).

        mask        (B or 1, 1, T, T_total) bool, True where a query may look; None: plain causal
        cu_seqlens  (documents + 1,) int32, document boundaries in the B*T stream: attention stays between them
        cache       (2, B, T_max, K, D): keys and values of the first `position` tokens, extended in place
        """
        x, T = ranks.gather(x, self.tp), len(cos)
        q = self.wq(x).view(-1, T, self.n_head, self.head_dim)                        # (B, T, H, D)
        k = self.wk(x).view(-1, T, self.n_kv_head, self.head_dim)                     # (B, T, K, D)
        v = self.wv(x).view(-1, T, self.n_kv_head, self.head_dim)                     # (B, T, K, D)
        norm = ()
        if self.q_norm is not None and kernels.across_modules(q):
            norm = True, self.q_norm.gain(), self.k_norm.gain(), self.q_norm.eps
        elif self.q_norm is not None:                     # as modules: influence.py has hooks on them
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = kernels.rotate_heads(q, k, cos, sin, *norm)
        if cache is not None:
            cache[0, :, position:position + T] = k
            cache[1, :, position:position + T] = v
            k, v = cache[0, :, :position + T], cache[1, :, :position + T]
        y = attend(q, k, v, mask, cu_seqlens, causal=T > 1).reshape(*x.shape[:-1], -1)          # (B, T, H*D)
        return ranks.scatter(self.wo(y), self.tp)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Shazeer 2020 (arXiv:2002.05202)."""
    tp = None                                             # ranks.Group: this rank then has its part of the inner width

    def __init__(self, config, inner):
        super().__init__()
        self.w_gate = nn.Linear(config.n_embd, inner, bias=False)
        self.w_up = nn.Linear(config.n_embd, inner, bias=False)
        self.w_down = nn.Linear(inner, config.n_embd, bias=False)

    def forward(self, x):
        x = ranks.gather(x, self.tp)
        return ranks.scatter(self.w_down(kernels.swiglu(self.w_gate(x), self.w_up(x))), self.tp)       # (B, T, F) inside


class Block(nn.Module):
    def __init__(self, config, has_experts):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.ffn = MixtureOfExperts(config, FeedForward) if has_experts else FeedForward(config, config.ffn_dim)

    def forward(self, x, cos, sin, mask=None, cu_seqlens=None, cache=None, position=0):
        """As Attention's, with the balance loss of the layer's experts beside (None: there is none)."""
        change = self.attn(self.attn_norm(x), cos, sin, mask, cu_seqlens, cache, position)
        if kernels.across_modules(x):
            h, x = kernels.add_rms_norm(change, x, self.ffn_norm.gain(), self.ffn_norm.eps)
        else:                                             # as a module: influence.py has hooks on it
            x = x + change
            h = self.ffn_norm(x)
        change, imbalance = self.ffn(h, len(cos)) if isinstance(self.ffn, MixtureOfExperts) else (self.ffn(h), None)
        return x + change, imbalance


class GPT(nn.Module):
    """The whole network. Build it on the meta device, shard it (parallel.apply_parallelism), `to_empty` it, then call `init_weights`."""
    layout = tp = None                                    # ranks.Layout and its tensor-parallel Group, set by parallel.apply_parallelism
    balance_loss = 0.0                                    # weight of the experts' balance loss while training

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, config.n_expert and i >= config.n_dense_layer) for i in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def frozen(self, dtype):
        """The model itself, to be run and not trained: weights in dtype. The biases of experts, which are sums of small steps, stay fp32."""
        self.to(dtype).requires_grad_(False)
        for layer in moe_layers(self):
            layer.bias = layer.bias.float()
        return self

    @property
    def output_weight(self):
        """The output layer's weight (V, C), or this rank's part of it: the embedding table itself when tied."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, idx, doc_ids=None, cache=None, position=0, first=None, grad_from=0):
        """Token ids to final hidden states, normed and ready for the output layer.

        idx       (B, T) int32 or int64 token ids
        doc_ids   (B, T) int, document number of every token: attention stays within a document. Or their boundaries, (documents + 1,) int32
                  (attention.document_boundaries): made on the host, they spare a GPU being waited for. None: plain causal.
                  Rotary positions are relative, so they need not restart where a document does.
        cache     list of n_layer * layer_repeat tensors (2, B, T_max, K, D), filled in place; position: tokens in it
        first     (B,) int64 or None: index of every row's first token, for rows padded on the left (only with a cache)
        grad_from first block whose parameters get a gradient; above 0 the embedding gets none either
        Returns (B, T, C) in the compute dtype (autocast's when it is on). Under tensor parallelism all ranks of the group have all of it,
        and are to use it alike.
        """
        x, _ = self.hidden(idx, doc_ids, cache, position, first, grad_from)
        return ranks.gather(x, self.tp, replicated=True).view(*idx.shape, -1)

    def hidden(self, idx, doc_ids=None, cache=None, position=0, first=None, grad_from=0):
        """As `forward`, but (B, T, C) or this rank's tokens of it, (N/n, C); beside it the sum of the layers' balance losses, None: there is none."""
        T = idx.shape[1]
        if self.tp is not None:
            self.tp.splits = cache is None and idx.numel() % self.tp.size == 0
            if not self.tp.splits and torch.is_grad_enabled():
                raise BadInput(f'{idx.numel():,} tokens of a batch cannot be split over tp = {self.tp.size} ranks. Change batch_size or block_size.')
        wanted = torch.is_grad_enabled()
        with torch.set_grad_enabled(wanted and grad_from == 0):
            x = ranks.embed(idx, self.embed.weight, self.tp) if self.tp is not None else self.embed(idx)          # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))     # the residual stream too, as under FSDP's bf16 policy
        angles = torch.arange(position, position + T, device=x.device)[:, None] * rope_frequencies(self.config, x.device)
        cos, sin = angles.cos(), angles.sin()                                         # (T, D/2)
        if self.config.rope_scaling is not None:
            cos, sin = (t * self.config.rope_scaling.get('attention_factor', 1.0) for t in (cos, sin))      # YaRN
        cos, sin = torch.cat((cos, cos), -1).to(x.dtype), torch.cat((-sin, sin), -1).to(x.dtype)    # (T, D)
        mask, cu_seqlens = None, None
        if doc_ids is not None:
            cu_seqlens = doc_ids if doc_ids.dim() == 1 else document_boundaries(doc_ids)
        elif cache is not None and (first is not None or position > 0 and T > 1):
            mask = torch.ones(T, position + T, dtype=torch.bool, device=x.device).tril(position)[None, None]
            if first is not None:             # padding sees itself alone, for an empty softmax is NaN
                keys = torch.arange(position + T, device=x.device)
                mask = mask & (keys >= first[:, None, None, None]) | (keys == keys[position:, None])          # (B, 1, T, T_total)
        application, imbalance = 0, None
        for i, block in enumerate(self.blocks):
            with torch.set_grad_enabled(wanted and i >= grad_from):
                for _ in range(self.config.layer_repeat):
                    x, more = block(x, cos, sin, mask, cu_seqlens, None if cache is None else cache[application], position)
                    imbalance = more if imbalance is None else imbalance + more
                    application += 1
        return self.norm(x), imbalance

    def loss(self, idx, targets, token_weights=None, doc_ids=None, grad_from=0, objective=None, valid=None):
        """Forward and loss in one call (under FSDP2 this is where the output weight is whole).

        targets (B, T) int64, -1 where the loss ignores the token; token_weights (B, T) fp32 or None. Returns `linear_cross_entropy`'s three
        results: sum () fp32 with gradient; losses (B, T) and hits (B, T) without. grad_from: as in `forward`; above 0 the output
        weight gets no gradient. objective: a function in the place of linear_cross_entropy (distillation), None: that. valid: what
        `valid_positions` says of targets, so that others cost nothing in the output layer, and the objective sees these positions alone;
        None: all go through it, but for linear_cross_entropy on the CPU, where looking costs nothing. Under tensor parallelism an objective sees
        the positions that this rank is given in `valid`, which are to be a part of them for every rank: losses and hits are of these.
        """
        x, imbalance = self.hidden(idx, doc_ids, grad_from=grad_from)
        h, targets = ranks.gather(x, self.tp, replicated=objective is None).flatten(0, -2), targets.flatten()       # (N, C), (N,)
        flat_weights = None if token_weights is None else token_weights.flatten()
        weight = self.output_weight.detach() if grad_from else self.output_weight
        if valid is None and objective is None and targets.device.type == 'cpu':
            valid = valid_positions(targets)
        if objective is None:
            part_of = None if self.tp is None else (self.tp.group, self.tp.rank * len(weight))
            objective = functools.partial(linear_cross_entropy, part_of=part_of)
        elif self.tp is not None:                         # tokens are split in place of the vocabulary: then any objective will do
            weight = ranks.gather(weight, self.tp)
        if valid is None:
            total, losses, hits = objective(h, weight, targets, flat_weights)
        else:
            total, *some = objective(h[valid], weight, targets[valid], None if flat_weights is None else flat_weights[valid])
            losses, hits = (torch.zeros(len(h), dtype=t.dtype, device=t.device).index_copy_(0, valid, t) for t in some)
        if imbalance is not None and self.balance_loss:
            total = total + self.balance_loss * imbalance / len(idx) * (targets >= 0).sum()        # the rows' mean, once the total is divided by the valid tokens
        return total, losses.view_as(idx), hits.view_as(idx)

    @torch.no_grad()
    def score(self, idx, rows, positions, targets):
        """Losses of some next tokens: what `targets` (n,) costs at `positions` (n,) of `rows` (n,), int64 each.

        idx (B, T), padded on the right. Logits are made for these n places alone. Returns losses (n,) fp32 nats, hits (n,) bool.
        """
        h = self.forward(idx)[rows, positions]                                        # (n, C)
        weight = self.full_output_weight().to(h.dtype)
        losses, hits = [], []
        step = chunk_rows(len(h), len(weight), h.device, torch.float32)
        for part, target in zip(h.split(step), targets.split(step)):
            z = F.linear(part, weight).float()                                        # (chunk, V)
            losses.append(z.logsumexp(-1) - z.gather(1, target[:, None])[:, 0])
            hits.append(z.argmax(-1) == target)
        return torch.cat(losses), torch.cat(hits)

    @torch.no_grad()
    def logits(self, idx, cache=None, position=0, first=None):
        """Logits of the last position only: (B, V) fp32."""
        h = self.forward(idx, cache=cache, position=position, first=first)[:, -1]
        z = F.linear(h, self.output_weight.to(h.dtype)).float()
        return z if self.tp is None else ranks.collect(z.T, self.tp).T

    def full_output_weight(self):
        return self.output_weight if self.tp is None else ranks.collect(self.output_weight, self.tp)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=0, first=None):
        """Continues idx (B, T) token by token with a KV cache: yields (B, 1) int64, max_new_tokens times.

        temperature 0 takes the likeliest token; top_k and top_p keep that many candidates, and the likeliest that have that
        much probability together. Same seed, same tokens. first: as in `forward`.
        """
        B, T = idx.shape
        c, device = self.config, idx.device
        dtype = (torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type)
                 else self.blocks[0].attn.wk.weight.dtype)
        cache = [torch.zeros(2, B, T + max_new_tokens, self.blocks[0].attn.n_kv_head, c.head_dim, device=device, dtype=dtype)
                 for _ in range(c.n_layer * c.layer_repeat)]
        generator = torch.Generator(device).manual_seed(seed)
        token, position = idx.long(), 0
        for _ in range(max_new_tokens):
            logits = self.logits(token, cache, position, first)                       # (B, V)
            position += token.shape[1]
            token = sample_token(logits, temperature, top_k, top_p, generator)
            yield token

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, stop_token=None, seed=0):
        """Extends idx (B, T) by `stream`. Returns (B, T + new) int64.

        A row that has produced stop_token is filled with it, and generation ends when every row has.
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
    """logits (B, V) -> (B, 1) int64, drawn as `GPT.stream` says."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    probabilities = (logits / temperature).softmax(-1)
    if top_p is not None:
        ordered, order = probabilities.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0             # what the likelier ones before have reached already
        probabilities = torch.zeros_like(probabilities).scatter_(1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)


@torch.no_grad()
def init_weights(model, seed):
    """Random weights in place, the same for any number of ranks and any device.

    Every parameter (of experts every one) has its own generator, seeded by its name, on the CPU; a sharded parameter keeps its part. Matrices are
    normal with std 0.02, those that write into the residual stream divided by sqrt(2 * layers) (GPT-2), the output weight
    small enough that a fresh model's loss is ln(vocab_size) within 2 %; norms are 1, biases 0.
    """
    c = model.config

    def fill(tensor, name, is_output):
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f'{seed}/{name}'.encode()).digest()[:8], 'little') >> 1)
        if 'norm' in name:
            tensor.fill_(1.0)
        elif name.endswith('bias'):
            tensor.zero_()
        elif 'wo.' in name or 'w_down' in name:
            tensor.normal_(std=0.02 / math.sqrt(2 * c.n_layer * c.layer_repeat), generator=generator)
        elif is_output:
            tensor.normal_(std=min(0.02, 0.4 / math.sqrt(c.n_embd)), generator=generator)     # logits of std <= 0.4
        else:
            tensor.normal_(std=0.02, generator=generator)
    for name, parameter in model.named_parameters():
        if '.experts.' in name:                           # the rank's own ones alone: all of a large model's would take hours
            own = torch.empty(parameter.shape)
            first = model.layout.experts.rank * len(own) if ranks.part_of(model.layout, name) else 0
            for i, expert in enumerate(own):
                fill(expert, f'{name}.{first + i}', False)
            parameter.copy_(ranks.sharded(parameter, own))
        else:
            whole = torch.empty(ranks.full_shape(model.layout, name, parameter))
            fill(whole, name, parameter is model.output_weight)
            parameter.copy_(ranks.placed(model.layout, name, parameter, whole))
    for buffer in model.buffers():                        # of experts: biases and loads
        buffer.zero_()
