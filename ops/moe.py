"""Mixture-of-experts layers: every token goes through a few of many feed-forward networks.

The router scores the experts by a sigmoid (DeepSeek-V3, arXiv:2412.19437, section 2.1.2) or softmax
(Mixtral, arXiv:2401.04088). The best n_expert_active are weighted by their scores. Shared experts
see every token. No token is dropped. Two mechanisms keep a few experts from getting all tokens:

    bias    is added to the scores when experts are chosen, but not in their weights. After every
            step `balance` raises it for experts with too few tokens (arXiv:2408.15664).
    loss    depends on the shares of experts in each row (DeepSeek-V3, equations 17 to 20).

Under expert parallelism each rank of a group has a part of the experts. Tokens travel to them and
back in two exchanges.

Letters in shape comments: B rows, T tokens, C n_embd, N local tokens, E n_expert,
k n_expert_active, n ranks of a group, m tokens for local experts.
"""

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from ops import kernels, ranks

METRICS = ('moe/imbalance', 'moe/imbalance_worst', 'moe/idle')  # what `balance` returns


class Experts(nn.Module):
    """The routed experts of this rank, each a SwiGLU network, as stacked matrices."""

    def __init__(self, config):
        super().__init__()
        E = config.n_expert
        C = config.n_embd
        inner = config.expert_ffn_dim
        self.w_gate = nn.Parameter(torch.empty(E, inner, C))
        self.w_up = nn.Parameter(torch.empty(E, inner, C))
        self.w_down = nn.Parameter(torch.empty(E, C, inner))

    def forward(self, x, counts):
        """x (m, C), sorted by expert; counts (E,) int64, rows of each expert. Returns (m, C)."""
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        gate = self.w_gate.to(dtype)
        up = self.w_up.to(dtype)
        down = self.w_down.to(dtype)
        # Grouped products need rows that start at a multiple of 16 bytes.
        aligned = x.shape[1] % 8 == 0 and gate.shape[1] % 8 == 0
        if x.is_cuda and dtype == torch.bfloat16 and aligned:
            # The last group must end before the last row, so there is one row more.
            padded = F.pad(x, (0, 0, 0, 1))
            ends = counts.cumsum(0).to(torch.int32)
            gated = F.grouped_mm(padded, gate.mT, offs=ends)
            h = kernels.swiglu(gated, F.grouped_mm(padded, up.mT, offs=ends))
            return F.grouped_mm(h, down.mT, offs=ends)[: len(x)]
        # Unbound once: the backward of single look-ups would add up full-sized gradients.
        experts = zip(gate.unbind(), up.unbind(), down.unbind(), strict=True)
        out = []
        for rows, (g, u, d) in zip(x.split(counts.tolist()), experts, strict=True):
            h = kernels.swiglu(F.linear(rows, g), F.linear(rows, u))
            out.append(F.linear(h, d))
        return torch.cat(out)


class MixtureOfExperts(nn.Module):
    tp = None  # ranks.Group of tensor parallelism
    group = None  # ranks.Group over which the experts are distributed

    def __init__(self, config, feed_forward):
        """feed_forward(config, inner width): module for the shared experts, as one wide network."""
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = Experts(config)
        self.shared = None
        if config.n_shared_expert:
            self.shared = feed_forward(config, config.n_shared_expert * config.expert_ffn_dim)
        self.register_buffer('bias', torch.zeros(config.n_expert))
        # tokens of every expert since the last `balance`
        self.register_buffer('load', torch.zeros(config.n_expert))

    def forward(self, x, T):
        """Returns (output in the shape of x, balance loss () fp32 or None without gradients).

        x (B, T, C), or (N, C) on a rank with a part of the tokens. The loss adds up, for each row,
        E * sum over experts of (share of the choices * mean share of the scores). This is 1 for a
        row that uses all experts equally.
        """
        c = self.config
        tokens = x.flatten(0, -2)  # (N, C)
        scores, chosen, gates = self.route(tokens)
        flat = chosen.flatten()  # (N*k,)
        # torch.bincount would make the host wait for the GPU.
        counts = torch.zeros(c.n_expert, dtype=torch.int64, device=x.device)
        counts = counts.scatter_add_(0, flat, torch.ones_like(flat))
        loss = None
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.load += counts
            loss = self.row_balance(scores, chosen, T)
        order = flat.argsort(stable=True)  # (N*k,)
        sorted_out = self.through_experts(tokens[order // c.n_expert_active], counts)
        y = torch.empty_like(sorted_out).index_copy(0, order, sorted_out)
        y = y.view(len(tokens), -1, x.shape[-1])  # (N, k, C)
        # With the dtype given, because CUDA's autocast would return fp32 from here on.
        y = (y * gates.to(y.dtype)[..., None]).sum(1, dtype=y.dtype).view(x.shape)
        return y if self.shared is None else y + self.shared(x), loss

    def route(self, tokens):
        """tokens (N, C) -> scores (N, E) fp32, chosen experts (N, k) int64, weights (N, k) fp32."""
        c = self.config
        weight = self.router.weight
        if self.tp is not None:
            weight = ranks.share(weight, self.tp)
        # bf16 would give the same score to experts that are close.
        with torch.autocast(tokens.device.type, enabled=False):
            high = torch.promote_types(tokens.dtype, torch.float32)
            logits = F.linear(tokens.to(high), weight.to(high))
        scores = logits.sigmoid() if c.expert_score == 'sigmoid' else logits.softmax(1)
        chosen = (scores.detach() + self.bias).topk(c.n_expert_active).indices
        gates = scores.gather(1, chosen)
        # A single weight stays as it is: normalized it would be 1, and the router without gradient.
        if c.n_expert_active > 1:
            gates = gates / gates.sum(1, keepdim=True)
        return scores, chosen, gates

    def row_balance(self, scores, chosen, T):
        """The balance loss of `forward`, from scores (N, E) and chosen experts (N, k)."""
        c = self.config
        # A rank's part of the tokens may end in the middle of a row, so rows are summed by index
        # and then over the group.
        N = len(scores)
        first = 0
        n_tokens = N
        if self.tp is not None and self.tp.splits:
            first = self.tp.rank * N
            n_tokens = self.tp.size * N
        row = (first + torch.arange(N, device=scores.device)) // T  # (N,)
        zeros = torch.zeros(n_tokens // T, c.n_expert, dtype=scores.dtype, device=scores.device)
        score_sums = zeros.index_add(0, row, scores / scores.sum(1, keepdim=True))  # (B, E)
        places = (row[:, None] * c.n_expert + chosen).flatten()  # (N*k,)
        ones = torch.ones_like(places, dtype=scores.dtype)
        choices = zeros.view(-1).index_add(0, places, ones).view_as(zeros)  # (B, E)
        if self.tp is not None:
            score_sums = ranks.add_up(score_sums, self.tp)
            choices = ranks.add_up(choices, self.tp)
        return (c.n_expert / (c.n_expert_active * T) * choices * (score_sums / T)).sum()

    # The number of tokens per expert is data, which a compiled graph cannot contain.
    @torch.compiler.disable
    def through_experts(self, x, counts):
        """As `Experts.forward` for all experts, which may be on other ranks."""
        if self.group is None:
            return self.experts(x, counts)
        n = self.group.size
        arriving = torch.empty_like(counts)  # (n * E/n,) rows from every rank for each local expert
        dist.all_to_all_single(arriving, counts, group=self.group.group)
        # The host must know the sizes of the messages, so it waits for the GPU here.
        send, receive = torch.stack((counts, arriving)).view(2, n, -1).sum(2).tolist()
        arrived = ranks.exchange(x, send, receive, self.group)  # sorted by rank, then by expert
        per_rank = arriving.view(n, -1)  # (n, E/n)
        expert = torch.arange(per_rank.shape[1], device=x.device).repeat(n)
        expert = expert.repeat_interleave(arriving, output_size=len(arrived))
        order = expert.argsort(stable=True)
        out = self.experts(arrived[order], per_rank.sum(0))
        out = torch.empty_like(out).index_copy(0, order, out)
        return ranks.exchange(out, receive, send, self.group)


def layers(model):
    return [m for m in model.modules() if isinstance(m, MixtureOfExperts)]


@torch.no_grad()
def balance(model, rate):
    """After a step: moves biases by `rate` towards experts below the mean load, and resets loads.

    Returns METRICS, (3,) fp64 on the device: load of the fullest expert over the mean, averaged
    over layers; the same of the worst layer; share of experts with less than a tenth of the mean.
    Returns an empty tensor for a model without experts.
    """
    found = layers(model)
    if not found:
        return torch.zeros(0, dtype=torch.float64, device=next(model.parameters()).device)
    load = torch.stack([layer.load for layer in found])  # (layers, E)
    if dist.is_initialized():
        dist.all_reduce(load)
    mean = load.mean(1, keepdim=True)
    for layer, gap in zip(found, mean - load, strict=True):
        layer.bias += rate * gap.sign()
        layer.load.zero_()
    fullest = load.amax(1) / mean[:, 0]
    idle = (load < 0.1 * mean).float().mean()
    return torch.stack((fullest.mean(), fullest.max(), idle)).double()
