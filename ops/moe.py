"""Mixture-of-experts layers: every token goes through a few of many feed-forward networks, and through shared ones. No token is dropped.

The router scores experts by a sigmoid (DeepSeek-V3, arXiv:2412.19437, section 2.1.2) or softmax (Mixtral, arXiv:2401.04088) of an fp32 product; the
best n_expert_active are weighted by their scores, made to sum to 1. Two means against a few experts getting all tokens: a bias on
the scores that only the choice sees, moved after every step towards the experts with too little (`balance`; auxiliary-loss-free, arXiv:2408.15664),
and a loss on every row's shares (`balance_loss` in train.py; DeepSeek-V3, equations 17 to 20).

Under expert parallelism every rank of a group has its part of the experts, and tokens travel there and back in two exchanges.

Letters in shape comments: B rows, T tokens, C n_embd, N tokens of this rank, E n_expert, k n_expert_active, F expert_ffn_dim, m rows of tokens for experts.
"""
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from ops import kernels, ranks


class Experts(nn.Module):
    """The routed experts that this rank has, each a SwiGLU network, as stacked matrices."""

    def __init__(self, config):
        super().__init__()
        E, C, inner = config.n_expert, config.n_embd, config.expert_ffn_dim
        self.w_gate = nn.Parameter(torch.empty(E, inner, C))
        self.w_up = nn.Parameter(torch.empty(E, inner, C))
        self.w_down = nn.Parameter(torch.empty(E, C, inner))

    def forward(self, x, counts):
        """x (m, C), rows in the order of their experts; counts (E,) int64 rows of each -> (m, C)."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        x, gate, up, down = x.to(dtype), self.w_gate.to(dtype), self.w_up.to(dtype), self.w_down.to(dtype)
        if x.is_cuda and dtype == torch.bfloat16 and not (x.shape[1] % 8 or gate.shape[1] % 8):         # 16 bytes from row to row
            ends = counts.cumsum(0).to(torch.int32)             # the last must lie before the end of the rows: one more of them
            h = kernels.swiglu(*(F.grouped_mm(F.pad(x, (0, 0, 0, 1)), w.mT, offs=ends) for w in (gate, up)))
            return F.grouped_mm(h, down.mT, offs=ends)[:len(x)]
        parts = zip(x.split(counts.tolist()), gate.unbind(), up.unbind(), down.unbind())
        return torch.cat([F.linear(kernels.swiglu(F.linear(rows, g), F.linear(rows, u)), d) for rows, g, u, d in parts])


class MixtureOfExperts(nn.Module):
    tp = group = None           # ranks.Group of tensor parallelism, and of the ranks that the experts are spread over

    def __init__(self, config, feed_forward):
        """feed_forward(config, inner width): the module of the shared experts, which are one wider network."""
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = Experts(config)
        self.shared = feed_forward(config, config.n_shared_expert * config.expert_ffn_dim) if config.n_shared_expert else None
        self.register_buffer('bias', torch.zeros(config.n_expert))                         # on the scores, for the choice alone
        self.register_buffer('load', torch.zeros(config.n_expert))       # tokens of every expert since the last `balance`

    def forward(self, x, T):
        """x (B, T, C), or (N, C) of a rank that has a part of the tokens -> (the same shape, () fp32 balance loss or None without gradients).

        The loss is the sum over the B rows, each E * sum(share of the choices * mean share of the scores) over the experts: 1 when all are alike.
        """
        c, tokens = self.config, x.flatten(0, -2)
        scores, chosen, gates = self.route(tokens)
        flat, loss = chosen.flatten(), None                                                               # (N*k,)
        counts = torch.zeros(c.n_expert, dtype=torch.int64, device=x.device).scatter_add_(0, flat, torch.ones_like(flat))      # not bincount: it waits
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.load += counts
            loss = self.row_balance(scores, chosen, T)
        order = flat.argsort(stable=True)                                                                 # (N*k,)
        sorted_out = self.through_experts(tokens[order // c.n_expert_active], counts)
        y = torch.empty_like(sorted_out).index_copy(0, order, sorted_out).view(len(tokens), -1, x.shape[-1])       # (N, k, C)
        y = (y * gates.to(y.dtype)[..., None]).sum(1).view(x.shape)
        return y if self.shared is None else y + self.shared(x), loss

    def route(self, tokens):
        """tokens (N, C) -> scores (N, E) fp32, the experts chosen (N, k) int64, best first, and their weights (N, k) fp32."""
        c = self.config
        with torch.autocast(tokens.device.type, enabled=False):
            high = torch.promote_types(tokens.dtype, torch.float32)
            logits = F.linear(tokens.to(high), ranks.share(self.router.weight, self.tp).to(high))
        scores = logits.sigmoid() if c.expert_score == 'sigmoid' else logits.softmax(1)
        chosen = (scores.detach() + self.bias).topk(c.n_expert_active).indices
        gates = scores.gather(1, chosen)
        return scores, chosen, gates / gates.sum(1, keepdim=True) if c.n_expert_active > 1 else gates

    def row_balance(self, scores, chosen, T):
        c, N = self.config, len(scores)
        first = self.tp.rank * N if self.tp is not None and self.tp.splits else 0
        n_rows = (self.tp.size * N if self.tp is not None and self.tp.splits else N) // T
        row = (first + torch.arange(N, device=scores.device)) // T                                        # (N,)
        probabilities = scores / scores.sum(1, keepdim=True)
        per_row = torch.zeros(n_rows, c.n_expert, dtype=scores.dtype, device=scores.device)
        P = ranks.add_up(per_row.index_add(0, row, probabilities), self.tp) / T                           # (B, E)
        ones = torch.ones_like(chosen, dtype=scores.dtype)
        f = ranks.add_up(per_row.view(-1).index_add(0, (row[:, None] * c.n_expert + chosen).flatten(), ones.flatten()).view_as(per_row), self.tp)
        return (c.n_expert / (c.n_expert_active * T) * f * P).sum()

    @torch.compiler.disable         # counts are data: a graph cannot hold them
    def through_experts(self, x, counts):
        """x (m, C) in the order of their experts, counts (E,) -> (m, C) what their experts make of them, wherever these are."""
        if self.group is None:
            return self.experts(x, counts)
        n = self.group.size
        theirs = torch.empty_like(counts)                                              # (n * E/n,) rows that every rank has for my experts
        dist.all_to_all_single(theirs, counts, group=self.group.group)
        send, receive = torch.stack((counts, theirs)).view(2, n, -1).sum(2).tolist()           # the host has to know: it waits here
        arrived = ranks.exchange(x, send, receive, self.group)                         # by rank, then by expert
        per_rank = theirs.view(n, -1)                                                  # (n, E/n)
        expert = torch.arange(per_rank.shape[1], device=x.device).repeat(n).repeat_interleave(theirs, output_size=len(arrived))
        order = expert.argsort(stable=True)
        out = self.experts(arrived[order], per_rank.sum(0))
        return ranks.exchange(torch.empty_like(out).index_copy(0, order, out), receive, send, self.group)


def layers(model):
    return [m for m in model.modules() if isinstance(m, MixtureOfExperts)]


@torch.no_grad()
def balance(model, rate):
    """After a step: moves the biases by `rate` towards the experts with less than the mean load, and forgets the loads.

    Returns (3,) fp64 on the device: load of the fullest expert over the mean, averaged over layers; the same of the worst layer; share of
    experts with less than a tenth of the mean. () where the model has no experts.
    """
    found = layers(model)
    if not found:
        return torch.zeros(0, dtype=torch.float64, device=next(model.parameters()).device)
    load = torch.stack([m.load for m in found])                                        # (layers, E)
    if dist.is_initialized():
        dist.all_reduce(load)
    mean = load.mean(1, keepdim=True)
    for m, gap in zip(found, mean - load):
        m.bias += rate * gap.sign()
        m.load.zero_()
    fullest = load.amax(1) / mean[:, 0]
    return torch.stack((fullest.mean(), fullest.max(), (load < 0.1 * mean).float().mean())).double()


METRICS = ('moe/imbalance', 'moe/imbalance_worst', 'moe/idle')
