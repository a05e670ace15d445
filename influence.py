"""Influence of data sources, and of single rows, on probe sets.

Influence predicts how much a small training step on a source lowers the loss on a probe set, which
is text of the kind that the model should become good at. It is the inner product of the gradient of
the source's mean token loss with a direction made of the gradients on the probe (MobileLLM-R1,
arXiv:2509.24945, section 5). Its unit is the probe's own help: 1 is as good as more text of the
probe, 0 is useless, negative influence is harmful. The paper's inverse Hessian predicts no better
for whole sources, so it is optional (`datainf`). The functions keep no state and change neither the
parameters nor the optimizer. tools/influence_tables.py is their command line.

Letters in shape comments: B rows, T positions, C n_embd, V vocab_size, N = B*T, I and O inputs and
outputs of a layer, K batches, D directions.
"""
import contextlib
import functools
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from configurator import BadInput, RunFault
from lib.parallel import full_tensor, local_tensor, reshard, sum_numbers
from model import RMSNorm
from ops import kernels
from ops.loss import budget_rows
from ops.ranks import full_shape, n_replicas, placed

LAYERS = ('last', 'all', 'first', 'embedding+head')
# Layers of a single block. Their gradients are small: a direction for every domain takes little
# memory, and so does the gradient of one row.
SMALL = ('last', 'first')


@dataclass
class Direction:
    """The direction in parameter space that lowers the probe's loss, in units of the probe's help.

    v            parameter name -> tensor, sharded as the parameter is
    den          domain -> squared norm of its mean gradient, without the bias that noise adds
    reliability  domain -> that norm as a share of the norm with the bias; 1: a probe without noise
    loss         domain -> nats per token
    layers       one of LAYERS
    """
    v: dict
    den: dict
    reliability: dict
    loss: dict
    layers: str


def check_layers(layers, knob='influence_layers'):
    """Raises BadInput unless `layers`, the value of a knob, is one of LAYERS."""
    if layers not in LAYERS:
        raise BadInput(f"{knob} = '{layers}' must be one of {', '.join(LAYERS)}.")


def select(model, layers):
    """The parameters of `layers`: (name -> parameter, index of the first block with a gradient)."""
    check_layers(layers)
    last = len(model.blocks) - 1
    prefixes = {
        'last': (f'blocks.{last}.', 'norm.'),
        'all': ('',),
        'first': ('blocks.0.',),
        'embedding+head': ('embed.', 'lm_head.'),
    }[layers]
    selected = {n: p for n, p in model.named_parameters() if n.startswith(prefixes)}
    return selected, last if layers == 'last' else 0


def inner(a, b):
    """Inner product of the local parts of two tensors that are sharded alike: () fp64."""
    # Chunks of four million elements keep the fp64 copies small.
    a_chunks = local_tensor(a).flatten().split(2**22)
    b_chunks = local_tensor(b).flatten().split(2**22)
    return sum(torch.dot(x.double(), y.double()) for x, y in zip(a_chunks, b_chunks, strict=True))


def global_inner(model, a, b):
    """Inner product of two gradients over all ranks: a float, summed in fp64. All ranks call it.

    a, b   parameter name -> tensor, sharded or not. The names are those of a. Replicated parameters
           count once.
    """
    total = sum(inner(a[name], b[name]) / n_replicas(model.layout, name) for name in a)
    return sum_numbers([total], every_rank=True)[0]


# -- gradients of batches --------------------------------------------------------------------------

def stream_gradients(model, batches, layers, use):
    """Runs forward and backward on every batch, and hands over each gradient as soon as it exists.

    batches   iterable of (inputs (B, T), targets (B, T) with -1 where the loss ignores the token,
              document ids or None), the local rows; every rank must give the same number
    use(name, gradient) is called during the backward pass for every selected parameter, with the
    gradient of the batch's summed loss over all ranks. It is dropped after the call: at most one
    parameter has a gradient at any time. Every .grad must be None before.
    Yields (loss in nats, number of valid tokens) of every batch, floats summed over all ranks.
    """
    reshard(model)
    selected, grad_from = select(model, layers)
    names = {parameter: name for name, parameter in selected.items()}
    n_data = model.layout.n_data if model.layout else 1

    def take(parameter):
        gradient = parameter.grad
        parameter.grad = None
        if parameter in names:
            use(names[parameter], gradient)

    with contextlib.ExitStack() as hooks:
        for parameter in model.parameters():
            if parameter.requires_grad:
                hooks.enter_context(parameter.register_post_accumulate_grad_hook(take))
        for inputs, targets, doc_ids in batches:
            loss, _, _ = model.loss(inputs, targets, doc_ids=doc_ids, grad_from=grad_from)
            # FSDP averages gradients over the ranks. The factor turns the mean into a sum.
            (loss * n_data).backward()
            yield sum_numbers([loss.detach(), (targets >= 0).sum()], model.layout)


def adam_scale(model, optimizers):
    """For `probe_direction`: name -> (Adam's second moment, constant added to its root).

    The constant is 1 % of the root's mean. Raises BadInput without AdamW's state.
    """
    reshard(model)
    state = {}
    for optimizer in optimizers:
        state |= optimizer.state
    moments = {}
    sums = []
    for name, parameter in model.named_parameters():
        # The moments of rare tokens are tiny, so these would dominate every inner product.
        if name.startswith('embed.'):
            continue
        if 'exp_avg_sq' not in state.get(parameter, {}):
            raise BadInput(f"influence_scaling = 'adam': no second moments of {name}.")
        moments[name] = state[parameter]['exp_avg_sq']
        sums.append(local_tensor(moments[name]).sqrt().sum() / n_replicas(model.layout, name))
    totals = sum_numbers(sums, every_rank=True)
    scale = {}
    for (name, moment), total in zip(moments.items(), totals, strict=True):
        scale[name] = moment, 0.01 * total / full_shape(model.layout, name, moment).numel()
    return scale


def scaled(scale, name, gradient):
    """A gradient divided by the root of Adam's second moment; unchanged where scale is None."""
    if scale is None:
        return gradient
    moment, constant = scale[name]
    return gradient / (moment.sqrt() + constant)


def takes_rows(model):
    """Whether single rows of a model can be measured: without tensor parallelism and experts."""
    return model.tp is None and not model.config.n_expert


def probes_by_rows(model, layers):
    """Whether `probe_direction` takes the gradients of single rows instead of batches."""
    return layers in SMALL and takes_rows(model)


@dataclass
class DomainSums:
    """What a domain of the probe gave. `parts` are batches or rows."""
    loss: float         # nats
    tokens: float       # valid ones
    squares: float      # squares of the tokens of every part
    pairs: float        # inner products of the gradients of different parts, over ordered pairs
    norm: float         # squared norm of the summed gradient
    parts: str          # 'batches' or 'rows'


def enter_domain(direction, domain, sums):
    """Enters den, reliability and loss of a domain into `direction` from its DomainSums."""
    # They are equal if one part has all valid tokens. den would divide by zero.
    if sums.tokens == 0 or sums.squares == sums.tokens**2:
        raise BadInput(
            f"influence: fewer than two {sums.parts} of probe '{domain}' have valid tokens.")
    # The squared norm of the mean gradient includes that of its noise. The mean inner product of
    # different parts does not, because their noise is independent.
    den = sums.pairs / (sums.tokens**2 - sums.squares)
    if not den > 0:
        raise RunFault(
            f"the {sums.parts} of the probe set '{domain}' disagree (mean inner product "
            f'{den:.3g}). The set is too small to measure influence on. Raise probe_rows, or make '
            'it larger.')
    direction.den[domain] = den
    direction.reliability[domain] = den / (sums.norm / sums.tokens**2)
    direction.loss[domain] = sums.loss / sums.tokens


def probe_by_batches(model, domain, batches, scale, direction):
    """Measures a domain of the probe from the gradients of its batches, at least two.

    Enters den, reliability and loss into `direction`. Returns (parameter name -> scaled gradient of
    the summed loss, number of valid tokens).
    """
    total = {}
    products = []               # local parts of the products of every batch with all before it

    def use(name, gradient):
        if scale is not None and name not in scale:
            return
        if name not in total:
            total[name] = gradient
            return
        # One product with the sum so far covers the pairs with all batches before, so their
        # gradients need not be kept.
        product = inner(scaled(scale, name, total[name]), gradient)
        products.append(product / n_replicas(model.layout, name))
        total[name].add_(gradient)

    found = list(stream_gradients(model, batches, direction.layers, use))
    if not total:
        raise BadInput(f"influence: scaling by Adam leaves nothing of '{direction.layers}'.")
    tokens = sum(n for _, n in found)
    gradient = {name: scaled(scale, name, tensor) for name, tensor in total.items()}
    enter_domain(direction, domain, DomainSums(
        loss=sum(loss for loss, _ in found), tokens=tokens, squares=sum(n * n for _, n in found),
        pairs=2 * sum_numbers([sum(products)], every_rank=True)[0],
        norm=global_inner(model, gradient, total), parts='batches'))
    return gradient, tokens


def probe_by_rows(model, domain, batches, scale, direction):
    """As `probe_by_batches`, from the gradients of single rows, for layers in SMALL.

    Batches may have any size, and a single one will do. The host waits for the device once.
    """
    # FSDP2 leaves the root's parameters gathered, and the result is sharded as they are.
    reshard(model)
    selected, _ = select(model, direction.layers)
    device = next(model.parameters()).device
    total = {}
    factors = {}                # name -> factor of every element under scaling, or None
    for name, parameter in selected.items():
        shape = full_shape(model.layout, name, parameter)
        total[name] = torch.zeros(shape, dtype=parameter.dtype, device=device)
        factors[name] = None
        if scale is not None:
            factors[name] = full_tensor(scaled(scale, name, torch.ones_like(parameter)))
    # Sums over rows: loss, tokens, squares of the tokens, and squared norms of the gradients. They
    # stay on the device, so that the host does not wait in every batch.
    sums = torch.zeros(4, dtype=torch.float64, device=device)

    def use(name, gradients):
        total[name] += gradients.sum(0, dtype=total[name].dtype)
        squares = gradients.to(total[name].dtype).square_()
        if factors[name] is not None:
            squares *= factors[name]
        sums[3] += squares.sum(dtype=torch.float64)

    for batch in batches:
        losses = stream_row_gradients(model, batch, direction.layers, use)
        n_valid = (batch[1] >= 0).sum(1)                                        # (B,)
        sums[:3] += torch.stack((losses.sum(), n_valid.sum(), n_valid.square().sum()))
    if model.layout is not None:
        for name, parameter in selected.items():
            dist.all_reduce(total[name])
            total[name] = placed(model.layout, name, parameter, total[name])
    loss, tokens, squares, row_norms = sum_numbers(sums.tolist())
    gradient = {name: scaled(scale, name, tensor) for name, tensor in total.items()}
    norm = global_inner(model, gradient, total)
    enter_domain(direction, domain, DomainSums(
        loss=loss, tokens=tokens, squares=squares, pairs=norm - row_norms, norm=norm,
        parts='rows'))
    return gradient, tokens


def probe_direction(model, probe, layers='last', weights=None, scale=None, units='loss'):
    """The `Direction` that lowers the loss on the probe.

    probe     domain -> batches as for `stream_gradients`. At least two, or for layers in SMALL of a
              model without tp and experts two rows
    weights   domain -> weight; None: equal weights
    scale     from `adam_scale`; None: gradients as they are
    units     'loss': influence on the weighted mean of the domains' losses, where domains with
              large gradients count more. 'own': weighted mean of the influences on the domains,
              each in units of its own help. For one domain both are the same.
    Raises RunFault when the rows or batches of a domain disagree, and BadInput for fewer than two.
    Memory: one gradient besides the result, or two with a scale.
    """
    weights = weights or dict.fromkeys(probe, 1.0)
    weight_sum = sum(weights.values())
    direction = Direction({}, {}, {}, {}, layers)
    # Rows give more pairs than batches, and one large batch is faster than several small ones.
    measure = probe_by_rows if probes_by_rows(model, layers) else probe_by_batches
    v = direction.v
    for domain, batches in probe.items():
        gradient, tokens = measure(model, domain, batches, scale, direction)
        share = weights[domain] / weight_sum / tokens
        if units == 'own':
            share /= direction.den[domain]
        # Taking the tensors out one by one frees each as soon as it is added.
        for name in list(gradient):
            part = gradient.pop(name).mul_(share)
            v[name] = v[name].add_(part) if name in v else part
    if units == 'loss':
        unit_help = sum(weights[domain] * direction.den[domain] for domain in probe) / weight_sum
        for tensor in v.values():
            tensor.div_(unit_help)
    return direction


def source_products(model, batches, directions):
    """Inner products of the gradient of every batch's summed loss with directions of equal layers.

    Returns (products (K, D) float64, valid tokens (K,) float64, loss in nats per token), numpy
    arrays and a float, over all ranks. Raises BadInput when no token is valid.
    """
    device = next(model.parameters()).device
    # On the device, so that the hooks of the backward pass do not make the host wait.
    sums = torch.zeros(len(directions), dtype=torch.float64, device=device)

    def use(name, gradient):
        for i, direction in enumerate(directions):
            if name in direction.v:
                product = inner(direction.v[name], gradient)
                sums[i] += product / n_replicas(model.layout, name)

    rows = []                   # local products of every batch
    found = []
    for loss_and_tokens in stream_gradients(model, batches, directions[0].layers, use):
        found.append(loss_and_tokens)
        rows.append(sums.clone())
        sums.zero_()
    tokens = [n for _, n in found]
    if not sum(tokens):
        raise BadInput('influence: the sample of a source has no valid token.')
    products = sum_numbers(torch.stack(rows).flatten().tolist(), every_rank=True)
    loss = sum(loss for loss, _ in found) / sum(tokens)
    return np.array(products).reshape(len(rows), -1), np.array(tokens), loss


def mean_and_error(products, tokens):
    """Influence and its standard error from products (K, D) or (K,), sums over tokens (K,).

    Returns two arrays (D,), or two floats. Raises BadInput for fewer than two batches.
    """
    k = len(tokens)
    if k < 2:
        raise BadInput(f'influence: {k} batch(es) of a source; at least two are needed.')
    total = tokens.sum()
    r = products.sum(0) / total
    # the standard error of a ratio of means over batches (Cochran 1977, section 2.11)
    residuals = products - np.multiply.outer(tokens, r)
    return r, np.sqrt((residuals**2).sum(0) * k / (k - 1)) / total


# -- single rows -----------------------------------------------------------------------------------
# A row's gradient of a linear layer is the sum over its positions of g a^T, where a is the input of
# the layer and g the gradient by its output. `row_pass` hands over a and g. All that follows works
# on them, so the gradient of a row is never formed.

def head_chunks(h, weight, targets, dh):
    """The output layer by chunks of n positions: yields (slice, dz (n, V), scale (n, 1), losses).

    h (N, C) hidden states; weight (V, C); targets (N,) int64, -1 where the loss ignores the token.
    dz * scale is the gradient of the summed loss by the logits, losses (n,) are in nats. Fills
    dh (N, C), the gradient by h.
    """
    n = budget_rows(len(h), len(weight), h.device, h.dtype)
    for start in range(0, len(h), n):
        part = slice(start, start + n)
        valid = targets[part] >= 0                                              # (n,)
        dz = h[part] @ weight.T                                                 # (n, V)
        losses, _, scale = kernels.softmax_gradient_(dz, targets[part].clamp(min=0))
        scale = scale * valid[:, None]                                          # (n, 1)
        # The scale is applied to C columns, which are fewer than V.
        dh[part] = ((dz @ weight) * scale).to(dh.dtype)
        yield part, dz, scale, losses * valid


@contextlib.contextmanager
def tappable(layers):
    """A context in which forward hooks see every module of a block."""
    # Compiled blocks and fused kernels would not call the hooks. For all blocks Triton's kernels
    # save memory, for one they would cost seconds of compilation.
    references = layers in SMALL
    with torch.compiler.set_stance('force_eager'), kernels.modules_alone(references):
        yield


def row_pass(model, batch, layers, at_module, at_head):
    """One forward and backward pass that hands over what the gradients of single rows consist of.

    at_module(name, module, a, g)   called in the backward pass for every application of a selected
                                    module: its input a (token ids for the embedding) and the
                                    gradient g of the summed loss by its output, (B, T, ...) each
    at_head(name, h, weight, dh)    called once, with the name of the module that holds the output
                                    weight (V, C), and final hidden states (N, C); it must fill
                                    dh (N, C) by `head_chunks`
    It is exact under flash attention, autocast, activation checkpointing, torch.compile and FSDP2.
    """
    if not takes_rows(model):
        raise BadInput('influence of single rows works neither with tp > 1 nor with experts.')
    inputs, _, doc_ids = batch
    selected, grad_from = select(model, layers)
    head = 'embed' if model.lm_head is None else 'lm_head'
    leaf = None                 # input of the first block that needs a gradient

    def begin(module, args):
        # The backward pass ends here: with layer_repeat, at the block's first application.
        nonlocal leaf
        if leaf is None:
            leaf = args[0].detach().requires_grad_()
            # The hooks of FlopCounterMode fail on a leaf, hence the view.
            return leaf.view_as(leaf), *args[1:]

    def tap(name, module, args, out):
        if out.requires_grad:
            a = args[0].detach()
            out.register_hook(lambda g: at_module(name, module, a, g))

    # The embedding and the output layer need no hook. They are handed over below.
    tapped = {name.rpartition('.')[0] for name in selected} - {'embed', 'lm_head'}
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(model.blocks[grad_from].register_forward_pre_hook(begin))
        for name in sorted(tapped):
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(functools.partial(tap, name)))
        # The blocks before are compiled ones where the run has compiled them for this shape. A
        # measurement compiles nothing.
        hooks.enter_context(torch.compiler.set_stance('eager_on_recompile'))
        around = functools.partial(tappable, layers)
        with torch.enable_grad():
            h = model(inputs, doc_ids, grad_from=grad_from, around=around)
        dh = h.new_empty(h.shape)
        weight = full_tensor(model.output_weight.detach()).to(h.dtype)
        with torch.no_grad():
            at_head(head, h.detach().flatten(0, 1), weight, dh.view(-1, h.shape[-1]))
        # dh was made by hand, so the backward pass begins at h and holds no logits. Activation
        # checkpointing runs blocks again in it.
        with around():
            g = torch.autograd.grad(h, leaf, dh)[0]
    if 'embed.weight' in selected:
        at_module('embed', model.embed, inputs, g)


def row_products(model, batch, directions):
    """Inner products of every row's gradient with directions of equal layers, by module.

    Returns ([module name -> (B,) float64] of every direction, losses of the tokens (B, T) float64
    in nats). A tied table is 'embed'.
    """
    inputs, targets, _ = batch
    products = [defaultdict(float) for _ in directions]
    losses = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)

    def at_module(name, module, a, g):
        for direction, found in zip(directions, products, strict=True):
            weight = full_tensor(direction.v.get(f'{name}.weight'))
            if weight is None:
                continue
            bias = full_tensor(direction.v.get(f'{name}.bias'))
            # With layer_repeat a module is applied several times, and its products add up.
            found[name] += module_products(module, a, g, weight, bias)

    def at_head(name, h, weight, dh):
        along = []                                          # (V, C) of every direction, or None
        for direction in directions:
            matrix = full_tensor(direction.v.get(f'{name}.weight'))
            along.append(None if matrix is None else matrix.to(h.dtype))
        found = torch.zeros(len(directions), len(h), dtype=torch.float64, device=h.device)
        for part, dz, scale, chunk_losses in head_chunks(h, weight, targets.flatten(), dh):
            losses.view(-1)[part] = chunk_losses.double()
            for matrix, row in zip(along, found, strict=True):
                if matrix is not None:
                    sums = (dz * (h[part] @ matrix.T)).sum(1, dtype=scale.dtype)
                    row[part] = sums * scale[:, 0]
        for matrix, row, by_module in zip(along, found, products, strict=True):
            if matrix is not None:
                by_module[name] += row.view(targets.shape).sum(1)

    row_pass(model, batch, directions[0].layers, at_module, at_head)
    return products, losses


def module_products(module, a, g, weight, bias):
    """Inner products of the rows' gradients of a module with a direction: (B,) float64.

    a, g          its input and the gradient by its output, (B, T, ...)
    weight, bias  the direction's tensors for the module; bias may be None
    """
    # <g a^T, W> at a position is <g, W a> for the direction's W.
    if isinstance(module, torch.nn.Linear):
        products = kernels.bilinear(a, g, weight)                               # (B, T)
        if bias is not None:
            products = products + (g * bias.to(g.dtype)).sum(-1, dtype=products.dtype)
        return products.sum(1, dtype=torch.float64)
    # the change of the module's output when its weight moves along the direction
    if isinstance(module, RMSNorm):
        change = F.rms_norm(a, (module.dim,), weight.to(a.dtype), module.eps)
    else:
        change = F.embedding(a, weight.to(g.dtype))
    high = torch.promote_types(g.dtype, torch.float32)
    products = (g * change).sum(-1, dtype=high)             # (B, T), of heads (B, T, H)
    return products.flatten(1).sum(1, dtype=torch.float64)


def row_influence(model, batch, directions):
    """Influence of every row of a batch: ((B, D) float64, losses of the tokens (B, T) in nats).

    It is the inner product of the gradient of the row's summed loss with each direction. It is
    exact and costs one forward and backward pass. Under FSDP2 every rank has rows of its own and
    must give the same number of batches.
    """
    products, losses = row_products(model, batch, directions)
    return torch.stack([sum(found.values()) for found in products], 1), losses


def gain_gradients(module, a, g):
    """An RMSNorm's gradient, not yet summed over positions."""
    return F.rms_norm(a, (module.dim,), None, module.eps) * g


def joined(model, use):
    """An at_module of `row_pass` that calls use(name, module, a, g) once for every module.

    With layer_repeat, a and g are those of all its applications, one after the other in T.
    """
    seen = {}                   # module name -> [(a, g)] of its applications so far

    def at_module(name, module, a, g):
        applications = seen.setdefault(name, [])
        applications.append((a, g))
        n = model.config.layer_repeat if name.startswith('blocks.') else 1
        if len(applications) == n:
            del seen[name]
            if n > 1:
                a, g = (torch.cat(tensors, 1) for tensors in zip(*applications, strict=True))
            use(name, module, a, g)

    return at_module


def stream_row_gradients(model, batch, layers, use):
    """Hands over the gradients of the rows' summed losses, for layers in SMALL.

    use(name, gradients (b, ...)) is called for every selected parameter, with the gradients of all
    rows or of some rows at a time. Returns the losses of the tokens, (N,) in nats.
    """
    losses = []

    def at_module(name, module, a, g):
        if isinstance(module, RMSNorm):
            use(f'{name}.weight', gain_gradients(module, a, g).flatten(1, -2).sum(1))
            return
        if module.bias is not None:
            use(f'{name}.bias', g.sum(1))
        # 64 million elements at a time
        n = max(1, 2**26 // module.weight.numel())
        for a_rows, g_rows in zip(a.split(n), g.split(n), strict=True):
            use(f'{name}.weight', torch.bmm(g_rows.to(a.dtype).transpose(1, 2), a_rows))

    def at_head(name, h, weight, dh):
        for _, _, _, chunk_losses in head_chunks(h, weight, batch[1].flatten(), dh):
            losses.append(chunk_losses)

    row_pass(model, batch, layers, joined(model, at_module), at_head)
    return torch.cat(losses)


def module_sqnorms(module, a, g):
    """Squared norms of the rows' gradients of an RMSNorm or a linear layer: (B,) float64."""
    if isinstance(module, RMSNorm):
        gain = gain_gradients(module, a, g).flatten(1, -2).sum(1)
        return gain.double().square().sum(1)
    squares = kernels.row_sqnorms(a, g).double()
    if module.bias is not None:
        squares += g.sum(1).double().square().sum(1)
    return squares


def embedding_sqnorms(ids, g, vocab_size):
    """Squared norms of the rows' gradients of the embedding table: (B,) float64. g (B, T, C)."""
    # The gradients of a token that occurs several times in a row add up before they are squared.
    B = len(ids)
    keys = ids + torch.arange(B, device=ids.device)[:, None] * vocab_size       # one per row, token
    unique, place = torch.unique(keys, return_inverse=True)
    sums = torch.zeros(len(unique), g.shape[-1], dtype=g.dtype, device=g.device)
    sums.index_add_(0, place.flatten(), g.flatten(0, 1))
    squares = torch.zeros(B, dtype=torch.float64, device=g.device)
    return squares.index_add_(0, unique // vocab_size, sums.double().square().sum(1))


def head_sqnorm(h, weight, targets, dh, ids):
    """Squared norm of a row's gradient of the output weight, () float64, and its rows ids (T, C).

    h, dh (T, C), targets (T,), weight (V, C): as in `head_chunks`; ids (T,) int64 or None.
    """
    T = len(h)
    V, C = weight.shape
    fits = budget_rows(T, V, h.device, h.dtype) >= T
    if fits and T * (C + V) < C * V:                        # the T x T products take less work
        [(_, dz, scale, _)] = head_chunks(h, weight, targets, dh)
        dz *= scale
        square = ((h @ h.T) * (dz @ dz.T)).sum(dtype=torch.float64)
        return square, None if ids is None else dz[:, ids].T @ h
    gradient = torch.zeros(V, C, dtype=h.dtype, device=h.device)
    for part, dz, scale, _ in head_chunks(h, weight, targets, dh):
        gradient.addmm_(dz.T, (h[part] * scale).to(h.dtype))
    square = sum(x.double().square().sum() for x in gradient.split(2**22 // C + 1))
    return square, None if ids is None else gradient[ids]


def row_sqnorms(model, batch, layers):
    """Squared norms of every row's gradient: module name -> (B,) float64. A tied table is 'embed'.

    The ghost norm (Li et al. 2021, arXiv:2110.05679, section 4): from the T x T products of
    positions, or from one row's gradient at a time where that is cheaper.
    """
    inputs, targets, _ = batch
    selected, _ = select(model, layers)
    is_tied = model.lm_head is None
    squares = defaultdict(float)
    at_tokens = None            # (B, T, C): for a tied table, rows of the output weight's gradient

    def at_module(name, module, a, g):
        if name == 'embed':
            squares[name] += embedding_sqnorms(a, g, model.config.vocab_size)
            # A tied table's two gradients add up before they are squared, hence the cross term.
            if at_tokens is not None:
                squares[name] += 2 * (at_tokens * g).sum((1, 2), dtype=torch.float64)
            return
        squares[name] = module_sqnorms(module, a, g)

    def at_head(name, h, weight, dh):
        nonlocal at_tokens
        if f'{name}.weight' not in selected:
            # dh is needed even so, because the backward pass of the blocks begins with it.
            for _ in head_chunks(h, weight, targets.flatten(), dh):
                pass
            return
        found, rows = [], []
        T = inputs.shape[1]
        for b, (h_row, dh_row) in enumerate(zip(h.split(T), dh.split(T), strict=True)):
            ids = inputs[b].long() if is_tied else None
            square, at_ids = head_sqnorm(h_row, weight, targets[b], dh_row, ids)
            found.append(square)
            rows.append(at_ids)
        squares[name] = torch.stack(found)
        if is_tied:
            at_tokens = torch.stack(rows)

    row_pass(model, batch, layers, joined(model, at_module), at_head)
    return squares


def ghost_sqnorm(model, batch, layers):
    """Squared norm of the gradient of every row's summed loss, its self-influence: (B,) float64."""
    return sum(row_sqnorms(model, batch, layers).values())


# -- with curvature --------------------------------------------------------------------------------

def add_row_gradients(model, batch, layers, total, c):
    """Adds the sum of c_i g_i to total (parameter name -> tensor). c: module name -> (B,).

    g_i is the gradient of row i's summed loss.
    """
    inputs, targets, _ = batch

    def at_module(name, module, a, g):
        factors = c[name].to(g.dtype).view(-1, *[1] * (g.dim() - 1))
        g = g * factors
        weight = total[f'{name}.weight']
        if name == 'embed':
            weight.index_add_(0, a.flatten().long(), g.flatten(0, 1).to(weight.dtype))
        elif isinstance(module, RMSNorm):
            weight += gain_gradients(module, a, g).flatten(0, -2).sum(0)
        else:
            weight += g.flatten(0, 1).T @ a.flatten(0, 1)
            if module.bias is not None:
                total[f'{name}.bias'].add_(g.flatten(0, 1).sum(0))

    def at_head(name, h, weight, dh):
        weight_total = total.get(f'{name}.weight')
        for part, dz, scale, _ in head_chunks(h, weight, targets.flatten(), dh):
            if weight_total is not None:
                factors = c[name].repeat_interleave(inputs.shape[1])[part, None] * scale
                weight_total += dz.T @ (h[part] * factors).to(h.dtype)

    row_pass(model, batch, layers, at_module, at_head)


def datainf(model, batches, direction):
    """DataInf's form of a direction: the mean over rows i of (lam I + g_i g_i^T)^-1 v, by module.

    Kwon et al. 2023 (arXiv:2310.00902), equation 5, with MobileLLM-R1's lam of a module: 0.1 * mean
    of |g_i|^2 / number of its parameters. g_i is the gradient of a row's mean token loss. Rows
    without a valid token do not count. batches is a list as for `stream_gradients`. The result is
    not in units of the probe's help (see `unit`). Raises BadInput in a process group.
    """
    if dist.is_initialized():
        raise BadInput("influence_scaling = 'datainf' works in one process only. Use none or adam.")
    # The inverse of a rank-one update makes that (v - mean of c_i g_i) / lam, where c_i is
    # <v, g_i> / (lam + |g_i|^2). It takes two passes over the rows.
    measured = []               # for every batch (tokens (B,), name -> <v, g_i>, name -> |g_i|^2)
    for batch in batches:
        n = (batch[1] >= 0).sum(1).clamp(min=1)
        [products], _ = row_products(model, batch, [direction])
        norms = row_sqnorms(model, batch, direction.layers)
        dots = {name: product / n for name, product in products.items()}
        squares = {name: norms[name] / n**2 for name in products}
        measured.append((n, dots, squares))
    # A row without a valid token has no gradient. It would only lower lam.
    valid = torch.cat([(targets >= 0).any(1) for _, targets, _ in batches])
    n_rows = int(valid.sum())
    lams = {}
    for name in dots:
        size = sum(t.numel() for key, t in direction.v.items() if key.rpartition('.')[0] == name)
        all_squares = torch.cat([squares[name] for _, _, squares in measured])
        lams[name] = 0.1 * all_squares[valid].mean().item() / size
    total = {name: torch.zeros_like(tensor) for name, tensor in direction.v.items()}
    for batch, (n, dots, squares) in zip(batches, measured, strict=True):
        c = {name: dots[name] / (lams[name] + squares[name]) / n / n_rows for name in lams}
        add_row_gradients(model, batch, direction.layers, total, c)
    v = {}
    for name, tensor in direction.v.items():
        v[name] = (tensor - total[name]) / lams[name.rpartition('.')[0]]
    return replace(direction, v=v)


def unit(model, direction, batches):
    """A direction divided by the influence that other probe rows (batches) have along it."""
    products, tokens, _ = source_products(model, batches, [direction])
    probe_help = products.sum() / tokens.sum()
    if not probe_help > 0:
        raise RunFault(f'two parts of the probe disagree ({probe_help:.3g}). Raise probe_rows.')
    return replace(direction, v={name: tensor / probe_help for name, tensor in direction.v.items()})
