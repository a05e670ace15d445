"""Influence of sources, and of single rows, on probe sets: what a small step on them does to the loss on text that one wants to be good at.

    python tools/influence_tables.py table --ckpt=out/run --sources=code,books --probe="{'math': 1, 'web': 1}"     # source x domain, with errors
    python tools/influence_tables.py loo --ckpt=out/all --without="{'code': 'out/no_code'}" --probe="{'math': 1}"  # what leaving a source out cost
    python tools/influence_tables.py score --ckpt=out/run --sources=code --probe="{'math': 1}"                     # every row of a source

The influence of a source is the inner product of the gradient of its mean token loss with a direction made of the gradients
on the probe: one backward pass per batch of the source, no gradient of a single row. (MobileLLM-R1, arXiv:2509.24945, section 5,
without the Hessian, which predicts no better on source level; `datainf` has it.) In units of the probe's own help: r = 1 is as
good as more text of the probe, 0 useless, negative harmful. The functions keep no state; parameters and optimizer are not touched.

Letters in shape comments: B rows, T positions, C n_embd, V vocab_size, N = B*T, I and O a layer's inputs and outputs, D directions,
K batches.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from configurator import BadInput, RunFault
from lib.device import all_reduce_sum
from lib.parallel import full_tensor, local_tensor, reshard
from model import RMSNorm
from ops import kernels
from ops.loss import budget_rows
from ops.ranks import full_shape, n_replicas

LAYERS = ('last', 'all', 'first', 'embedding+head')


@dataclass
class Direction:
    """What lowers the loss on the probe, of unit influence.

    v            parameter name -> tensor (fp32, sharded as the parameter is)
    den          domain -> squared norm of its mean gradient, without the noise that would add to it
    reliability  domain -> that, as a share of the squared norm with the noise: 1 is a probe without noise
    loss         domain -> nats per token
    """
    v: dict
    den: dict
    reliability: dict
    loss: dict
    layers: str


def check_layers(layers, knob='influence_layers'):
    if layers not in LAYERS:
        raise BadInput(f"{knob} = '{layers}' must be one of {', '.join(LAYERS)}.")


def select(model, layers):
    """(name -> parameter that influence is measured on, first block that needs a gradient). BadInput for an unknown name."""
    check_layers(layers)
    last = len(model.blocks) - 1
    prefixes = {'last': (f'blocks.{last}.', 'norm.'), 'all': ('',), 'first': ('blocks.0.',), 'embedding+head': ('embed.', 'lm_head.')}[layers]
    return {n: p for n, p in model.named_parameters() if n.startswith(prefixes)}, last if layers == 'last' else 0


def inner(a, b):
    """Inner product of two tensors, of this rank's parts where they are sharded: () fp64, four million elements at a time."""
    a, b = local_tensor(a), local_tensor(b)
    parts = zip(a.flatten().split(2**22), b.flatten().split(2**22))
    return sum(torch.dot(x.double(), y.double()) for x, y in parts)


# -- gradients of batches ----------------------------------------------------------------------------------------------

def stream_gradients(model, batches, layers, use):
    """Forward and backward on every batch; use(name, gradient) sees every gradient when the backward pass has just made it.

    The gradient, of the sum of the batch's token losses over all ranks, is dropped after that: there is never a whole one, and
    every .grad, which must be None before, is None again.
    batches   iterable of (inputs (B, T), targets (B, T) with -1 = not counted, document ids or None): this rank's rows; every
              rank gives the same number
    Yields (loss in nats, counted tokens) of every batch, floats summed over all ranks.
    """
    reshard(model)
    selected, grad_from = select(model, layers)
    names = {parameter: name for name, parameter in selected.items()}
    n_data = model.layout.n_data if model.layout else dist.get_world_size() if dist.is_initialized() else 1

    def take(parameter):
        gradient, parameter.grad = parameter.grad, None
        if parameter in names:
            use(names[parameter], gradient)
    hooks = [p.register_post_accumulate_grad_hook(take) for p in model.parameters() if p.requires_grad]
    try:
        for inputs, targets, doc_ids in batches:
            loss, _, _ = model.loss(inputs, targets, doc_ids=doc_ids, grad_from=grad_from)
            (loss * n_data).backward()                             # FSDP averages over ranks; this makes it a sum
            yield all_reduce_sum([loss.detach(), (targets >= 0).sum()])
    finally:
        for hook in hooks:
            hook.remove()


def adam_scale(model, optimizers):
    """For `probe_direction`: name -> (Adam's second moment, what is added to its root: 1 % of the root's mean).

    The embedding table is left out: a rare token's moment is tiny, so it would count far too much. BadInput without AdamW.
    """
    reshard(model)
    state = {p: s for optimizer in optimizers for p, s in optimizer.state.items()}
    moments = {}
    for name, parameter in model.named_parameters():
        if not name.startswith('embed.'):
            if 'exp_avg_sq' not in state.get(parameter, {}):
                raise BadInput(f"influence_scaling = 'adam' needs AdamW's second moments, and there are none of {name}.")
            moments[name] = state[parameter]['exp_avg_sq']
    sums = all_reduce_sum([local_tensor(m).sqrt().sum() / n_replicas(model.layout, name) for name, m in moments.items()], everywhere=True)
    return {name: (m, 0.01 * total / full_shape(model.layout, name, m).numel()) for (name, m), total in zip(moments.items(), sums)}


def probe_direction(model, probe, layers='last', weights=None, scale=None, units='loss'):
    """The direction that lowers the probe's loss, in units of the probe's own help.

    probe     domain -> batches as for `stream_gradients`, at least two. The squared norm is the mean inner product of different
              batches, free of the noise that a gradient's product with itself has.
    weights   domain -> weight; None: alike
    units     'loss': influence on the weighted mean of the domains' losses, so a domain with much left to learn (a large gradient)
              counts more; 'own': the weighted mean of the influences on the domains, each in units of its own help. Of one
              domain both are the same: its mean gradient / its squared norm.
    scale     `adam_scale`: gradients are divided by the root of the moment; None: they are taken as they are
    RunFault when a domain's batches disagree. Holds one gradient besides the result while it works.
    """
    weights = weights or dict.fromkeys(probe, 1.0)
    v, den, reliability, loss = {}, {}, {}, {}

    def scaled(name, tensor):
        return tensor if scale is None else tensor / (scale[name][0].sqrt() + scale[name][1])
    for domain, batches in probe.items():
        total, products = {}, []
        losses, tokens, squares = 0.0, 0.0, 0.0

        def use(name, gradient):
            if scale is not None and name not in scale:
                return
            if name in total:
                products.append(inner(scaled(name, total[name]), gradient) / n_replicas(model.layout, name))        # with all batches before
                total[name].add_(gradient)
            else:
                total[name] = gradient
        for batch_loss, n in stream_gradients(model, batches, layers, use):
            losses, tokens, squares = losses + batch_loss, tokens + n, squares + n * n
        if not total or tokens == 0 or squares == tokens**2:
            raise BadInput(f"influence: the probe set '{domain}' gives " + ('fewer than two batches with counted tokens.' if total else
                           f"no gradient of the layers '{layers}' that scaling by Adam leaves in."))
        pairs, norm = all_reduce_sum([sum(products), sum(inner(scaled(n, g), g) / n_replicas(model.layout, n) for n, g in total.items())], everywhere=True)
        den[domain], loss[domain] = 2 * pairs / (tokens**2 - squares), losses / tokens
        if not den[domain] > 0:
            raise RunFault(f"the batches of the probe set '{domain}' disagree (mean inner product {den[domain]:.3g}): it is too small to "
                           'measure influence on. Raise probe_rows, or make the probe set larger.')
        reliability[domain] = den[domain] / (norm / tokens**2)
        share = weights[domain] / sum(weights.values()) / tokens / (den[domain] if units == 'own' else 1)
        for name in list(total):
            part = scaled(name, total.pop(name)).mul_(share)
            v[name] = v[name].add_(part) if name in v else part
    if units == 'loss':
        unit_help = sum(weights[domain] * den[domain] for domain in probe) / sum(weights.values())
        v = {name: tensor.div_(unit_help) for name, tensor in v.items()}
    return Direction(v, den, reliability, loss, layers)


def source_products(model, batches, directions):
    """Inner products of every batch's gradient (of its summed loss) with directions over the same layers.

    Returns (products (K, D) float64, tokens (K,) float64, loss in nats per token), numpy, over all ranks.
    """
    sums, rows, losses, tokens = torch.zeros(len(directions), dtype=torch.float64, device=next(model.parameters()).device), [], 0.0, []

    def use(name, gradient):
        for i, direction in enumerate(directions):
            if name in direction.v:
                sums[i] += inner(direction.v[name], gradient) / n_replicas(model.layout, name)
    for batch_loss, n in stream_gradients(model, batches, directions[0].layers, use):
        rows.append(sums.clone())
        sums.zero_()
        losses, tokens = losses + batch_loss, tokens + [n]
    if not sum(tokens):
        raise BadInput('influence: a sample without a single counted token.')
    products = all_reduce_sum(torch.stack(rows).flatten().tolist(), everywhere=True)
    return np.array(products).reshape(len(rows), -1), np.array(tokens), losses / sum(tokens)


def mean_and_error(products, tokens):
    """Influence and its standard error: (D,) each, or floats, from products (K, D) or (K,) with sums over tokens (K,).

    The error is that of a ratio of means over batches (Cochran 1977, section 2.11). BadInput for fewer than two batches.
    """
    k, total = len(tokens), tokens.sum()
    if k < 2:
        raise BadInput(f'influence: {k} batch(es) of a source; at least two are needed for a standard error.')
    r = products.sum(0) / total
    spread = products - np.multiply.outer(tokens, r)
    return r, np.sqrt((spread**2).sum(0) * k / (k - 1)) / total


# -- single rows -------------------------------------------------------------------------------------------------------

def head_gradient(h, weight, targets, use):
    """d (summed loss) / d h of the output layer, by chunks: (N, C). h (N, C); weight (V, C); targets (N,) int64, -1 = not counted.

    use(part, dz, losses) sees the logits' gradient (n, V) and the losses (n,) of every chunk of positions, a slice.
    """
    dh = torch.empty_like(h)
    n = budget_rows(len(h), len(weight), h.device, torch.float32)
    for start in range(0, len(h), n):
        part = slice(start, start + n)
        counted, target = targets[part, None] >= 0, targets[part, None].clamp(min=0)
        z = h[part] @ weight.T
        z = z.to(torch.promote_types(z.dtype, torch.float32))                             # (n, V)
        losses = (z.logsumexp(1, keepdim=True) - z.gather(1, target)) * counted
        dz = z.softmax(1).scatter_add_(1, target, -torch.ones_like(losses)).mul_(counted)
        dh[part] = dz.to(h.dtype) @ weight
        use(part, dz, losses[:, 0])
    return dh


def row_pass(model, batch, layers, at_module, at_head):
    """One forward and backward without a gradient of any parameter, in which functions see what rows' gradients are made of.

    at_module(name, module, a, g)   of every application of a selected module: its input a (token ids of the embedding) and the
                                    gradient g of the summed loss by its output, (B, T, ...) each
    at_head(h, weight)              final hidden states (B, T, C) and output weight (V, C); returns the gradient by h
    Exact under flash SDPA, autocast, activation checkpointing and FSDP2; compiled blocks run eagerly for its time, for what
    is compiled would not see the hooks.
    """
    if model.tp is not None or model.config.n_expert:
        raise BadInput('influence of single rows cannot be measured under tensor parallelism or with experts. That of sources can.')
    inputs, _, doc_ids = batch
    selected, grad_from = select(model, layers)
    modules, leaf = dict(model.named_modules()), []
    tapped = sorted({name.rpartition('.')[0] for name in selected} - {'embed', 'lm_head'})

    def begin(module, args):                    # the gradient is wanted down to here: the embedding's output
        if not leaf:
            leaf.append(args[0].detach().requires_grad_())
            return leaf[0].view_as(leaf[0]), *args[1:]      # no leaf: FlopCounterMode's own hooks cannot do with one

    def tap(name):
        def hook(module, args, out):
            if out.requires_grad:
                a = args[0].detach()
                out.register_hook(lambda g: at_module(name, module, a, g))
        return modules[name].register_forward_hook(hook)
    hooks = [tap(name) for name in tapped] + [model.blocks[grad_from].register_forward_pre_hook(begin)]
    try:
        with torch.compiler.set_stance('force_eager'), torch.enable_grad(), kernels.modules_alone():
            h = model(inputs, doc_ids, grad_from=grad_from)
            with torch.no_grad():
                dh = at_head(h.detach(), full_tensor(model.output_weight.detach()).to(h.dtype))
            g = torch.autograd.grad(h, leaf[0], dh)[0]
    finally:
        for hook in hooks:
            hook.remove()
    if 'embed.weight' in selected:
        at_module('embed', model.embed, inputs, g)


def row_products(model, batch, direction):
    """Inner products of every row's gradient with a direction, layer by layer and position by position.

    Returns (module name -> (B, T) float64, losses (B, T) of the tokens in nats); a tied table's two parts are both under 'embed'.
    """
    inputs, targets, _ = batch
    v, head = direction.v, 'embed' if model.lm_head is None else 'lm_head'
    products = {}

    def add(name, part):
        products[name] = products[name] + part.double() if name in products else part.double()

    def at_module(name, module, a, g):
        weight, bias = full_tensor(v.get(f'{name}.weight')), full_tensor(v.get(f'{name}.bias'))
        if weight is None:
            return
        if isinstance(module, torch.nn.Linear):
            part = kernels.bilinear(a, g, weight)
            add(name, part if bias is None else part + (g * bias.to(g.dtype)).sum(-1, dtype=part.dtype))
            return
        if isinstance(module, RMSNorm):                    # its output per unit of gain, times the direction
            change = torch.nn.functional.rms_norm(a, (module.dim,), weight.to(a.dtype), module.eps)
        else:
            change = torch.nn.functional.embedding(a, weight.to(g.dtype))
        part = (g * change).sum(-1, dtype=torch.promote_types(g.dtype, torch.float32))
        add(name, part.sum(2) if part.dim() == 3 else part)

    losses = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)

    def at_head(h, weight):
        towards = full_tensor(v.get(f'{head}.weight'))
        towards = None if towards is None else towards.to(h.dtype)
        h, parts = h.flatten(0, 1), torch.zeros_like(losses).flatten()

        def use(part, dz, chunk_losses):
            losses.view(-1)[part] = chunk_losses.double()
            if towards is not None:
                parts[part] = (dz * (h[part] @ towards.T)).sum(1).double()
        dh = head_gradient(h, weight, targets.flatten(), use)
        if towards is not None:
            add(head, parts.view(targets.shape))
        return dh.view(*targets.shape, -1)
    row_pass(model, batch, direction.layers, at_module, at_head)
    return products, losses


def row_influence(model, batch, direction):
    """Influence of every row of a batch, exact, for the work of one forward and backward: ((B,) float64, losses (B, T) in nats).

    The inner product of the gradient of the row's summed loss with the direction. A layer's part of it is the sum over positions
    of <g, V a>: a its input, g the gradient by its output, V the direction, so that no gradient of a parameter is ever formed.
    Under FSDP2 every rank
    has its own rows and gives the same number of batches.
    """
    products, losses = row_products(model, batch, direction)
    return sum(products.values()).sum(1), losses


def row_sqnorms(model, batch, layers):
    """Squared norms of every row's gradient, layer by layer: module name -> (B,) float64; a tied table as a whole is 'embed'.

    The ghost norm (Li et al. 2021, arXiv:2110.05679, section 4): of a linear layer either from the T x T products of positions
    or from one row's gradient at a time, whatever is cheaper. What a tied table gets as embedding and as output layer adds up
    before it is squared, hence the cross term.
    """
    inputs, targets, _ = batch
    selected, (B, T) = select(model, layers)[0], inputs.shape
    head = 'embed' if model.lm_head is None else 'lm_head'
    squares = {}                                              # module name -> (B,)
    seen = {}                                                 # module name -> [(a, g)] of its applications so far
    at_tokens = None                                          # (B, T, C) rows of the output weight's gradient, for the cross term

    def add(name, part):
        squares[name] = squares[name] + part.double() if name in squares else part.double()

    def at_module(name, module, a, g):
        if name == 'embed':
            unique, place = torch.unique(a + torch.arange(B, device=a.device)[:, None] * model.config.vocab_size, return_inverse=True)
            sums = torch.zeros(len(unique), g.shape[-1], dtype=g.dtype, device=g.device).index_add_(0, place.flatten(), g.flatten(0, 1))
            part = torch.zeros(B, dtype=torch.float64, device=g.device)
            add(name, part.index_add_(0, unique // model.config.vocab_size, sums.double().square().sum(1)))
            if at_tokens is not None:
                add(name, 2 * (at_tokens * g).sum((1, 2), dtype=torch.float64))
            return
        seen.setdefault(name, []).append((a, g))
        if len(seen[name]) == model.config.layer_repeat or not name.startswith('blocks.'):
            uses = seen.pop(name)                             # a layer that runs several times: its gradients add up, too
            if isinstance(module, RMSNorm):
                gain = sum((torch.nn.functional.rms_norm(a, (module.dim,), None, module.eps) * g).flatten(1, -2).sum(1) for a, g in uses)
                add(name, gain.double().square().sum(1))
                return
            a, g = (torch.cat(parts, 1) for parts in zip(*uses))          # (B, repeats * T, I), (B, repeats * T, O)
            if module.bias is not None:
                add(name, g.sum(1).double().square().sum(1))
            add(name, kernels.row_sqnorms(a, g))

    def at_head(h, weight):
        nonlocal at_tokens
        if f'{head}.weight' not in selected:
            return head_gradient(h.flatten(0, 1), weight, targets.flatten(), lambda *_: None).view_as(h)
        dh, norms = torch.empty_like(h), torch.zeros(B, dtype=torch.float64, device=h.device)
        at_tokens = torch.zeros_like(h) if head == 'embed' else None
        (V, C), chunk = weight.shape, budget_rows(T, len(weight), h.device, torch.float32)
        by_positions = T * (C + V) < C * V and chunk >= T
        for b in range(B):
            G = None if by_positions else torch.zeros(V, C, dtype=h.dtype, device=h.device)

            def use(part, dz, _):
                dz, hb, ids = dz.to(h.dtype), h[b, part], inputs[b].long()
                if by_positions:
                    norms[b] += ((hb @ hb.T) * (dz @ dz.T)).sum(dtype=torch.float64)
                    if at_tokens is not None:
                        at_tokens[b] = dz[:, ids].T @ hb
                else:
                    G.addmm_(dz.T, hb)
            dh[b] = head_gradient(h[b], weight, targets[b], use)
            if not by_positions:
                norms[b] = sum(x.double().square().sum() for x in G.split(2**22 // C + 1))
                if at_tokens is not None:
                    at_tokens[b] = G[inputs[b].long()]
        add(head, norms)
        return dh
    row_pass(model, batch, layers, at_module, at_head)
    return squares


def ghost_sqnorm(model, batch, layers):
    """Squared norm of the gradient of every row's summed loss, its self-influence: (B,) float64, for one forward and backward."""
    return sum(row_sqnorms(model, batch, layers).values())


# -- with curvature ----------------------------------------------------------------------------------------------------

def datainf(model, batches, direction, lam=None):
    """The direction as DataInf bends it: the mean over rows i of (lam I + g_i g_i^T)^-1 v, for every layer by itself.

    Kwon et al. 2023 (arXiv:2310.00902), equation 5, with MobileLLM-R1's lam of a layer: 0.1 * mean of |g_i|^2 / its parameters.
    g_i are the gradients of rows' mean token losses, of rows with counted tokens. Two passes over the rows, no gradient of a row:
    the inverse of a rank-one matrix makes it (v - mean of c_i g_i) / lam with c_i = <v, g_i> / (lam + |g_i|^2).
    batches   list as for `stream_gradients`; lam: one number for all layers, or None. Only in one process. The result is not in
              units of the probe's help; `unit` makes it so.
    """
    if dist.is_initialized():
        raise BadInput("influence_scaling = 'datainf' works in one process only. Use none or adam.")
    dots, squares, counted = {}, {}, torch.cat([(targets >= 0).any(1) for _, targets, _ in batches])       # padding is no row
    for batch in batches:
        n = (batch[1] >= 0).sum(1).clamp(min=1)
        products, norms = row_products(model, batch, direction)[0], row_sqnorms(model, batch, direction.layers)
        for name in products:
            dots.setdefault(name, []).append(products[name].sum(1) / n)
            squares.setdefault(name, []).append(norms[name] / n**2)
    dots, squares = ({name: torch.cat(parts) for name, parts in d.items()} for d in (dots, squares))
    sizes = {name: sum(v.numel() for key, v in direction.v.items() if key.rpartition('.')[0] == name) for name in dots}
    lams = {name: 0.1 * squares[name][counted].mean().item() / sizes[name] if lam is None else lam for name in dots}
    total = {name: torch.zeros_like(v) for name, v in direction.v.items()}
    n_rows, start = int(counted.sum()), 0
    for batch in batches:
        part, n = slice(start, start + len(batch[0])), (batch[1] >= 0).sum(1).clamp(min=1)
        start = part.stop
        add_row_gradients(model, batch, direction.layers, total,
                          {name: dots[name][part] / (lams[name] + squares[name][part]) / n / n_rows for name in dots})
    v = {name: (v - total[name]) / lams[name.rpartition('.')[0]] for name, v in direction.v.items()}
    return Direction(v, direction.den, direction.reliability, direction.loss, direction.layers)


def add_row_gradients(model, batch, layers, total, c):
    """Adds sum_i c_i g_i to total (name -> tensor), with weights c of their own for every module (name -> (B,)); g_i of summed losses."""
    inputs, targets, _ = batch
    head = 'embed' if model.lm_head is None else 'lm_head'

    def at_module(name, module, a, g):
        g = g * c[name].to(g.dtype).view(-1, *[1] * (g.dim() - 1))
        if name == 'embed':
            total['embed.weight'].index_add_(0, a.flatten().long(), g.flatten(0, 1).to(total['embed.weight'].dtype))
        elif isinstance(module, RMSNorm):
            total[f'{name}.weight'] += (torch.nn.functional.rms_norm(a, (module.dim,), None, module.eps) * g).flatten(0, -2).sum(0)
        else:
            total[f'{name}.weight'] += g.flatten(0, 1).T @ a.flatten(0, 1)
            if module.bias is not None:
                total[f'{name}.bias'] += g.flatten(0, 1).sum(0)

    def at_head(h, weight):
        flat = h.flatten(0, 1)

        def use(part, dz, _):
            if f'{head}.weight' in total:
                share = c[head].to(h.dtype).repeat_interleave(h.shape[1])[part, None]
                total[f'{head}.weight'] += (dz.to(h.dtype) * share).T @ flat[part]
        return head_gradient(flat, weight, targets.flatten(), use).view_as(h)
    row_pass(model, batch, layers, at_module, at_head)


def unit(model, direction, batches):
    """A direction divided by its inner product with the mean gradient of other probe rows (batches): their influence is 1 then."""
    products, tokens, _ = source_products(model, batches, [direction])
    own = products.sum() / tokens.sum()
    if not own > 0:
        raise RunFault(f'the probe is too small to measure influence on: two parts of it disagree (inner product {own:.3g}). Raise probe_rows.')
    return Direction({name: v / own for name, v in direction.v.items()}, direction.den, direction.reliability, direction.loss, direction.layers)
