"""Influence of data sources, and of single rows, on probe sets: gradients and their products.

Influence predicts how much a small training step on a source lowers the loss on a probe set, which
is text of the kind that the model should become good at. It is the inner product of the gradient of
the source's mean token loss with a direction made of the gradients on the probe (MobileLLM-R1,
arXiv:2509.24945, section 5). The paper's inverse Hessian predicts no better for whole sources, so
it is optional (`datainf`). The functions keep no state and change neither the parameters nor the
optimizer. methods/estimates.py makes influence and its errors of the products.
tools/influence_tables.py is their command line.

Letters in shape comments: B rows, T positions, C n_embd, V vocab_size, N = B*T, I and O inputs and
outputs of a layer, K batches, P parts of the probe.
"""
import contextlib
import functools
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from configurator import BadInput
from data import put_on
from lib.parallel import full_tensor, local_tensor, reshard, sum_numbers
from model import RMSNorm
from ops import kernels
from ops.loss import budget_rows
from ops.ranks import full_shape, n_replicas, placed

LAYERS = ('last', 'all', 'first', 'embedding+head')
# Layers of a single block. Their gradients are small: those of many parts of the probe take little
# memory, and so does the gradient of one row.
SMALL = ('last', 'first')
# Gradients of so many parts of the probe sets are kept, to tell how noisy the probe is.
PARTS = 24


@dataclass
class Probe:
    """Gradients of parts of the probe sets, and what it takes to see the noise in them.

    parts    list of (parameter name -> tensor, sharded as the parameter is): the gradient of the
             summed loss of every part, scaled if asked
    domains  names of the probe sets
    at       (P,) ints: the number of every part's domain
    gram     (P, P) float64: inner products of the parts' gradients
    norms    (P,) float64: squared norms of the gradients of the part's units, summed. A unit is a
             row, or the part where single rows are not measured
    tokens   (P,) valid tokens; squares (P,): squares of the units' tokens, summed
    layers   one of LAYERS
    """
    parts: list
    domains: list
    at: np.ndarray
    gram: np.ndarray
    norms: np.ndarray
    tokens: np.ndarray
    squares: np.ndarray
    layers: str


@dataclass
class Direction:
    """The direction in parameter space that lowers the probe's loss, in units of the probe's help.

    v       parameter name -> tensor, sharded as the parameter is
    layers  one of LAYERS
    """
    v: dict
    layers: str


class TooFewTokens(BadInput):
    """The rows that were chosen of a probe set have too few valid tokens. Others may have more."""


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


def products(left, right):
    """Inner products of the local parts of tensors that are sharded alike: (n, m) fp64.

    left, right   lists of n and m tensors of equal shape
    """
    total = 0.0
    # Chunks of a few million elements keep the fp64 copies small.
    size = max(1, 2**23 // (len(left) + len(right)))
    left = [local_tensor(tensor).flatten().split(size) for tensor in left]
    right = [local_tensor(tensor).flatten().split(size) for tensor in right]
    for a, b in zip(zip(*left, strict=True), zip(*right, strict=True), strict=True):
        total = total + torch.stack(a).double() @ torch.stack(b).double().T
    return total


def global_inner(model, a, b):
    """Inner product of two gradients over all ranks: a float, summed in fp64. All ranks call it.

    a, b   parameter name -> tensor, sharded or not. The names are those of a. Replicated parameters
           count once.
    """
    total = 0.0
    for name in a:
        total = total + products([a[name]], [b[name]])[0, 0] / n_replicas(model.layout, name)
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
    """Whether the gradients of single rows are taken instead of those of batches."""
    return layers in SMALL and takes_rows(model)


def parts_of_domain(layers, n_domains):
    """Number of parts of every domain. Gradients of layers that are not in SMALL are large."""
    return max(4, PARTS // n_domains) if layers in SMALL else 4


@dataclass
class DomainParts:
    """The parts of one domain: fields as in `Probe`."""
    parts: list
    norms: list | None      # None: every part is one unit
    tokens: list
    squares: list


def parts_of_batches(model, batches, layers, n_parts):
    """The batches are dealt to n_parts parts, whose gradients add up: DomainParts."""
    parts = [{} for _ in range(n_parts)]
    tokens = [0.0] * n_parts
    at = 0                      # part of the batch that is being measured

    def use(name, gradient):
        if name in parts[at]:
            parts[at][name] += gradient
        else:
            parts[at][name] = gradient

    for _, n in stream_gradients(model, batches, layers, use):
        tokens[at] += n
        at = (at + 1) % n_parts
    return DomainParts(parts, None, tokens, [n * n for n in tokens])


def parts_of_rows(model, batches, layers, scale, n_parts):
    """The rows are dealt to n_parts parts, for layers in SMALL: DomainParts.

    Batches may have any size, and a single one will do. The host waits for the device once.
    """
    # FSDP2 leaves the root's parameters gathered, and the result is sharded as they are.
    reshard(model)
    selected, _ = select(model, layers)
    device = next(model.parameters()).device
    rank, n_data = (model.layout.data_rank, model.layout.n_data) if model.layout else (0, 1)
    total = {}                  # name -> (n_parts, ...)
    factors = {}                # name -> factor of every element under scaling, or None
    for name, parameter in selected.items():
        shape = full_shape(model.layout, name, parameter)
        total[name] = torch.zeros(n_parts, *shape, dtype=parameter.dtype, device=device)
        factors[name] = None
        if scale is not None:
            factors[name] = full_tensor(scaled(scale, name, torch.ones_like(parameter)))
    # Sums over the rows of a part: tokens, squares of the tokens, and squared norms of the
    # gradients. They stay on the device, so that the host does not wait in every batch.
    sums = torch.zeros(3, n_parts, dtype=torch.float64, device=device)
    n_rows = 0                  # of this rank, before the batch

    def use(name, first, gradients):
        gradients = gradients.to(total[name].dtype)
        b = len(gradients)
        # Row by row, because index_add_ sums in any order on a GPU.
        for at, gradient in zip(part_of_row[first:first + b], gradients, strict=True):
            total[name][at] += gradient
        squares = gradients.square()
        if factors[name] is not None:
            squares *= factors[name]
        squares = squares.flatten(1).sum(1, dtype=torch.float64)
        sums[2] += member[:, first:first + b] @ squares

    for batch in batches:
        B = len(batch[0])
        part_of_row = [((n_rows + i) * n_data + rank) % n_parts for i in range(B)]
        member = F.one_hot(torch.tensor(part_of_row), n_parts).T.double()       # (n_parts, B)
        member = put_on(member.contiguous(), device)
        n_rows += B
        stream_row_gradients(model, batch, layers, use)
        n_valid = (batch[1] >= 0).sum(1).double()                               # (B,)
        sums[:2] += torch.stack((n_valid, n_valid.square())) @ member.T
    parts = [{} for _ in range(n_parts)]
    for name, parameter in selected.items():
        if model.layout is not None:
            dist.all_reduce(total[name])
        for part, gradient in zip(parts, total.pop(name), strict=True):
            part[name] = placed(model.layout, name, parameter, gradient)
    tokens, squares, norms = np.array(sum_numbers(sums.flatten().tolist())).reshape(3, -1).tolist()
    return DomainParts(parts, norms, tokens, squares)


def gram_of(model, parts, scale):
    """Inner products (P, P) float64 of the parts' gradients over all ranks. Scales them in place.

    Under scaling one side of a product is scaled, which the parts are afterwards.
    """
    total = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    for name in list(parts[0]):
        if scale is not None and name not in scale:
            for part in parts:
                del part[name]
            continue
        plain = [part[name] for part in parts]
        for part in parts:
            part[name] = scaled(scale, name, part[name])
        found = products([part[name] for part in parts], plain)
        total += found.cpu() / n_replicas(model.layout, name)
    return np.array(sum_numbers(total.flatten().tolist(), every_rank=True)).reshape(total.shape)


def measure_probe(model, probe, layers='last', scale=None, n_parts=None):
    """Measures the gradients of the probe sets: `Probe`.

    probe     domain -> batches as for `stream_gradients`. At least two, or for layers in SMALL of a
              model without tp and experts two rows
    scale     from `adam_scale`; None: gradients as they are
    n_parts   parts of a domain. None: as `parts_of_domain` has it
    Raises TooFewTokens for fewer than two rows or batches with a valid token. Memory: a gradient
    for every part.
    """
    by_rows = probes_by_rows(model, layers)
    if n_parts is None:
        n_parts = parts_of_domain(layers, len(probe))
    parts, at, norms, tokens, squares = [], [], [], [], []
    for i, (domain, batches) in enumerate(probe.items()):
        if by_rows:
            found = parts_of_rows(model, batches, layers, scale, n_parts)
        else:
            found = parts_of_batches(model, batches, layers, n_parts)
        n_tokens = sum(found.tokens)
        if n_tokens == 0 or sum(found.squares) == n_tokens**2:
            kind = 'rows' if by_rows else 'batches'
            raise TooFewTokens(
                f"influence: fewer than two {kind} of probe '{domain}' have valid tokens.")
        for j, n in enumerate(found.tokens):
            if n:
                at.append(i)
                parts.append(found.parts[j])
                norms.append(found.norms[j] if by_rows else None)
                tokens.append(n)
                squares.append(found.squares[j])
    gram = gram_of(model, parts, scale)
    if not parts[0]:
        raise BadInput(f"influence: scaling by Adam leaves nothing of '{layers}'.")
    norms = np.array(norms, dtype=np.float64) if by_rows else gram.diagonal().copy()
    return Probe(
        parts, list(probe), np.array(at), gram, norms, np.array(tokens), np.array(squares), layers)


def products_of_batches(model, batches, probe):
    """Inner products of the gradient of every batch's summed loss with the probe's parts.

    Returns (products (K, P), valid tokens (K,)), numpy float64 over all ranks.
    """
    device = next(model.parameters()).device
    # On the device, so that the hooks of the backward pass do not make the host wait.
    sums = torch.zeros(len(probe.parts), dtype=torch.float64, device=device)

    def use(name, gradient):
        if name in probe.parts[0]:
            found = products([part[name] for part in probe.parts], [gradient])[:, 0]
            sums.add_(found, alpha=1 / n_replicas(model.layout, name))

    rows = []                   # local products of every batch
    tokens = []
    for _, n in stream_gradients(model, batches, probe.layers, use):
        tokens.append(n)
        rows.append(sums.clone())
        sums.zero_()
    flat = sum_numbers(torch.stack(rows).flatten().tolist(), every_rank=True)
    return np.array(flat).reshape(len(rows), -1), np.array(tokens)


def products_of_rows(model, batch, probe):
    """Inner products of every row's gradient with the probe's parts, for layers in SMALL.

    Returns (B, P) float64, on the device. The gradient of the row's summed loss is formed, so many
    parts cost hardly more than one.
    """
    found = torch.zeros(
        len(batch[0]), len(probe.parts), dtype=torch.float64, device=batch[0].device)

    def use(name, first, gradients):
        if name in probe.parts[0]:
            parts = [full_tensor(part[name]) for part in probe.parts]
            found[first:first + len(gradients)] += products(list(gradients), parts)

    stream_row_gradients(model, batch, probe.layers, use)
    return found


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


def row_products(model, batch, layers, directions):
    """Inner products of every row's gradient with directions, by module.

    directions   list of (parameter name -> tensor, sharded as the parameter is)
    Returns ([module name -> (B,) float64] of every direction, losses of the tokens (B, T) float64
    in nats). A tied table is 'embed'.
    """
    inputs, targets, _ = batch
    by_direction = [defaultdict(float) for _ in directions]
    losses = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)

    def at_module(name, module, a, g):
        for v, found in zip(directions, by_direction, strict=True):
            weight = full_tensor(v.get(f'{name}.weight'))
            if weight is None:
                continue
            bias = full_tensor(v.get(f'{name}.bias'))
            # With layer_repeat a module is applied several times, and its products add up.
            found[name] += module_products(module, a, g, weight, bias)

    def at_head(name, h, weight, dh):
        along = []                                          # (V, C) of every direction, or None
        for v in directions:
            matrix = full_tensor(v.get(f'{name}.weight'))
            along.append(None if matrix is None else matrix.to(h.dtype))
        found = torch.zeros(len(directions), len(h), dtype=torch.float64, device=h.device)
        for part, dz, scale, chunk_losses in head_chunks(h, weight, targets.flatten(), dh):
            losses.view(-1)[part] = chunk_losses.double()
            for matrix, row in zip(along, found, strict=True):
                if matrix is not None:
                    sums = (dz * (h[part] @ matrix.T)).sum(1, dtype=scale.dtype)
                    row[part] = sums * scale[:, 0]
        for matrix, row, by_module in zip(along, found, by_direction, strict=True):
            if matrix is not None:
                by_module[name] += row.view(targets.shape).sum(1)

    row_pass(model, batch, layers, at_module, at_head)
    return by_direction, losses


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


def row_influence(model, batch, direction):
    """Influence of every row of a batch: ((B,) float64, losses of the tokens (B, T) in nats).

    It is the inner product of the gradient of the row's summed loss with the direction. It is
    exact and costs one forward and backward pass. Under FSDP2 every rank has rows of its own and
    must give the same number of batches.
    """
    [found], losses = row_products(model, batch, direction.layers, [direction.v])
    return sum(found.values()), losses


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

    use(name, first, gradients (b, ...)) is called for every selected parameter, with the gradients
    of the b rows from number `first` on. Returns the losses of the tokens, (N,) in nats.
    """
    losses = []

    def at_module(name, module, a, g):
        if isinstance(module, RMSNorm):
            use(f'{name}.weight', 0, gain_gradients(module, a, g).flatten(1, -2).sum(1))
            return
        if module.bias is not None:
            use(f'{name}.bias', 0, g.sum(1))
        # 64 million elements at a time
        n = max(1, 2**26 // module.weight.numel())
        for first in range(0, len(a), n):
            a_rows = a[first:first + n]
            g_rows = g[first:first + n].to(a.dtype)
            use(f'{name}.weight', first, torch.bmm(g_rows.transpose(1, 2), a_rows))

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

def add_row_gradients(model, batch, layers, totals, factors):
    """Adds the sum of c_i g_i to every total, where g_i is the gradient of row i's summed loss.

    totals    list of (parameter name -> tensor)
    factors   for every total the c: module name -> (B,)
    """
    inputs, targets, _ = batch

    def at_module(name, module, a, g):
        for total, by_module in zip(totals, factors, strict=True):
            c = by_module[name].to(g.dtype).view(-1, *[1] * (g.dim() - 1))
            weighted = g * c
            weight = total[f'{name}.weight']
            if name == 'embed':
                rows = weighted.flatten(0, 1).to(weight.dtype)
                weight.index_add_(0, a.flatten().long(), rows)
            elif isinstance(module, RMSNorm):
                weight += gain_gradients(module, a, weighted).flatten(0, -2).sum(0)
            else:
                weight += weighted.flatten(0, 1).T @ a.flatten(0, 1)
                if module.bias is not None:
                    total[f'{name}.bias'].add_(weighted.flatten(0, 1).sum(0))

    def at_head(name, h, weight, dh):
        for part, dz, scale, _ in head_chunks(h, weight, targets.flatten(), dh):
            for total, by_module in zip(totals, factors, strict=True):
                if f'{name}.weight' in total:
                    c = by_module[name].repeat_interleave(inputs.shape[1])[part, None] * scale
                    total[f'{name}.weight'] += dz.T @ (h[part] * c).to(h.dtype)

    row_pass(model, batch, layers, at_module, at_head)


def datainf(model, batches, probe):
    """DataInf's form of a probe: its parts become the mean over rows i of (lam I + g_i g_i^T)^-1 h.

    Kwon et al. 2023 (arXiv:2310.00902), equation 5, module by module, with MobileLLM-R1's lam of a
    module: 0.1 * mean of |g_i|^2 / number of its parameters. h is the gradient of a part, g_i that
    of a row's mean token loss. Rows without a valid token do not count. batches is a list as for
    `stream_gradients`. The parts are the units of the result. Raises BadInput in a process group.
    """
    if dist.is_initialized():
        raise BadInput("influence_scaling = 'datainf' works in one process only. Use none or adam.")
    # The inverse of a rank-one update makes that (h - mean of c_i g_i) / lam, where c_i is
    # <h, g_i> / (lam + |g_i|^2). It takes two passes over the rows.
    measured = []       # of every batch: tokens (B,), for every part name -> <h, g_i> (B,),
                        # name -> |g_i|^2 (B,)
    for batch in batches:
        n = (batch[1] >= 0).sum(1).clamp(min=1)
        by_part, _ = row_products(model, batch, probe.layers, probe.parts)
        norms = row_sqnorms(model, batch, probe.layers)
        dots = [{name: product / n for name, product in found.items()} for found in by_part]
        squares = {name: norms[name] / n**2 for name in by_part[0]}
        measured.append((n, dots, squares))
    # A row without a valid token has no gradient. It would only lower lam.
    valid = torch.cat([(targets >= 0).any(1) for _, targets, _ in batches])
    n_rows = int(valid.sum())
    lams = {}
    for name in squares:
        size = sum(t.numel() for key, t in probe.parts[0].items() if key.rpartition('.')[0] == name)
        all_squares = torch.cat([squares[name] for _, _, squares in measured])
        lams[name] = 0.1 * all_squares[valid].mean().item() / size
    totals = []
    for part in probe.parts:
        totals.append({name: torch.zeros_like(tensor) for name, tensor in part.items()})
    for batch, (n, dots, squares) in zip(batches, measured, strict=True):
        factors = []
        for found in dots:
            factors.append({
                name: found[name] / (lams[name] + squares[name]) / n / n_rows for name in lams})
        add_row_gradients(model, batch, probe.layers, totals, factors)
    bent = []
    gram = 0.0
    for part, total in zip(probe.parts, totals, strict=True):
        bent.append({
            name: (part[name] - total[name]) / lams[name.rpartition('.')[0]] for name in part})
    for name in bent[0]:
        pair = [[part[name] for part in parts] for parts in (bent, probe.parts)]
        gram = gram + products(*pair).cpu().numpy()
    # What single rows would give is not known, so the noise is that of the parts.
    return replace(
        probe, parts=bent, gram=gram, norms=gram.diagonal().copy(), squares=probe.tokens**2)
