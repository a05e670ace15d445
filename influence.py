"""Influence of every source on probe sets: what a small step on the source does to the loss on text that one wants to be good at.

The influence of a source is the inner product of the gradient of its mean token loss with a direction made of the gradients
on the probe: one backward pass per batch of the source, no gradient of a single row. (MobileLLM-R1, arXiv:2509.24945, section 5,
without the Hessian: on source level it predicts no better.) In units of the probe's own help: r = 1 is as good as other text of
the probe, 0 useless, negative harmful. The influence of single rows costs one forward and backward for all of them. Nothing
here keeps state; parameters and optimizer are not touched.
"""
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import mixtures
from common import all_reduce_sum
from configurator import BadInput, RunFault
from model import chunk_rows, linear_cross_entropy

LAYERS = ('last', 'all', 'first', 'embedding+head')


@dataclass
class Direction:
    """v: parameter name -> tensor (sharded as the parameter is); den: domain -> squared norm of its gradient, without the noise;
    loss: domain -> nats per token."""
    v: dict
    den: dict
    loss: dict
    layers: str


def check_layers(layers):
    if layers not in LAYERS:
        raise BadInput(f"influence_layers = '{layers}' must be one of {', '.join(LAYERS)}.")


def select(model, layers):
    """(name -> parameter that influence is measured on, first block that needs a gradient). BadInput for an unknown name."""
    check_layers(layers)
    last = len(model.blocks) - 1
    prefixes = {'last': (f'blocks.{last}.', 'norm.'), 'all': ('',), 'first': ('blocks.0.',), 'embedding+head': ('embed.', 'lm_head.')}[layers]
    return {n: p for n, p in model.named_parameters() if n.startswith(prefixes)}, last if layers == 'last' else 0


def _local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _dot(a, b, device):
    """Inner product over all names and ranks: float, summed in fp64."""
    return all_reduce_sum([sum((_local(a[n]).double() * _local(b[n]).double()).sum().item() for n in a)], device)[0]


def mean_gradient(model, batches, layers, against=None):
    """Gradient of the mean token loss over all batches and ranks, accumulated in the parameters' own .grad (which must be None).

    batches   iterable of (inputs (B, T), targets (B, T) with -1 = not counted, document ids or None): this rank's rows; every
              rank gives the same number
    against   name -> tensor, or None: a direction whose inner product with every batch's gradient is wanted
    Returns (name -> gradient, loss in nats per token, [(inner product with the batch's sum, its tokens)]). All .grad are None again.
    """
    parameters, grad_from = select(model, layers)
    device = next(iter(parameters.values())).device
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    losses, tokens, products, before = 0.0, 0, [], 0.0
    for inputs, targets, doc_ids in batches:
        loss, _, _ = model.loss(inputs, targets, doc_ids=doc_ids, grad_from=grad_from)
        (loss * world_size).backward()                         # FSDP averages over ranks; this makes it a sum
        loss_sum, n = all_reduce_sum([loss.detach(), (targets >= 0).sum()], device)
        losses, tokens = losses + loss_sum, tokens + n
        if against is not None:
            now = _dot(against, {name: p.grad for name, p in parameters.items()}, device)
            products.append((now - before, n))
            before = now
    if tokens == 0:
        raise BadInput('influence: a sample without a single counted token.')
    gradient = {name: p.grad.detach() / tokens for name, p in parameters.items()}
    model.zero_grad(set_to_none=True)
    return gradient, losses / tokens, products


def probe_direction(model, probe, layers='last', weights=None):
    """The direction that lowers the probe's loss: the sum over domains of weight * gradient / its squared norm.

    probe     domain -> (batches, batches): two disjoint halves, as for `mean_gradient`. Their inner product is the squared norm
              without the noise that it would have with itself.
    weights   domain -> weight; None: alike. RunFault when the halves of a domain disagree: the probe is too small.
    """
    weights = weights or dict.fromkeys(probe, 1.0)
    total = sum(weights.values())
    v, den, loss = None, {}, {}
    for domain, halves in probe.items():
        (a, loss_a, _), (b, loss_b, _) = (mean_gradient(model, half, layers) for half in halves)
        device = next(iter(a.values())).device
        den[domain], loss[domain] = _dot(a, b, device), (loss_a + loss_b) / 2
        if den[domain] <= 0:
            raise RunFault(f"the two halves of the probe set '{domain}' disagree (inner product {den[domain]:.3g}): it is too small to "
                           'measure influence on. Raise probe_rows, or make the probe set larger.')
        scale = weights[domain] / total / den[domain] / 2
        part = {name: (a[name] + b[name]) * scale for name in a}
        v = part if v is None else {name: v[name] + part[name] for name in v}
    return Direction(v, den, loss, layers)


def group_influence(model, sources, direction):
    """Influence of every source: (r, se, loss), dicts by source, floats.

    sources   source -> batches as for `mean_gradient`, at least two each (from their spread comes the standard error)
    """
    r, se, loss = {}, {}, {}
    for name, batches in sources.items():
        _, loss[name], products = mean_gradient(model, batches, direction.layers, direction.v)
        tokens, k = sum(n for _, n in products), len(products)
        if k < 2:
            raise BadInput(f"influence: source '{name}' gives {k} batch(es); at least two are needed for a standard error.")
        r[name] = sum(p for p, _ in products) / tokens
        se[name] = (sum((p - r[name] * n) ** 2 for p, n in products) * k / (k - 1)) ** 0.5 / tokens
    return r, se, loss


def row_influence(model, batch, direction, per_position=False):
    """Influence of every row of a batch, exact, for the work of one forward and backward: (B,) float64, in nats per row.

    Every module with a direction V adds eps_i * V(its input) to its output, eps = 0: the derivative of row i's loss by eps_i is
    the inner product of its gradient with V, and no gradient of a parameter is ever formed. Divided by the counted tokens of
    all rows, the sum over rows is `group_influence`. per_position=True: (B, T), the part of every position of the inputs
    (where the gradient of a weight arises, not the token whose loss it is). For one process: FSDP2's modules are not gated yet.
    """
    inputs, targets, doc_ids = batch
    v, grad_from = direction.v, select(model, direction.layers)[1]
    modules = dict(model.named_modules())
    eps = torch.zeros(inputs.shape if per_position else (len(inputs), 1), dtype=next(iter(v.values())).dtype, device=inputs.device,
                      requires_grad=True)

    def gate(name):
        weight, bias = v.get(f'{name}.weight'), v.get(f'{name}.bias')

        def add(module, args, out):
            a = args[0].detach()
            if isinstance(module, torch.nn.Linear):
                change = torch.nn.functional.linear(a, weight.to(a.dtype), None if bias is None else bias.to(a.dtype))
            elif isinstance(module, torch.nn.Embedding):
                change = torch.nn.functional.embedding(a, weight)
            else:                                               # RMSNorm: its output per unit of gain, times the direction
                change = torch.nn.functional.rms_norm(a, (module.dim,), weight.to(a.dtype), module.eps)
            at = eps if out.dim() == 3 else eps[:, None]        # heads stand before positions in the QK-norm's (B, H, T, D)
            return out + at.unsqueeze(-1).to(out.dtype) * change
        return modules[name].register_forward_hook(add)
    hooks = [gate(name) for name in sorted({n.rsplit('.', 1)[0] for n in v if not n.startswith('lm_head.')})]
    try:
        h = model(inputs, doc_ids, grad_from=grad_from)
    finally:
        for hook in hooks:
            hook.remove()
    weight = model.output_weight.detach()
    loss, _, _ = linear_cross_entropy(h.flatten(0, 1), weight, targets.flatten())
    rows = torch.zeros_like(eps) if not hooks else torch.autograd.grad(loss, eps)[0]
    rows = rows.double()
    head = v.get('embed.weight' if model.lm_head is None else 'lm_head.weight')
    if head is not None:                                        # the output layer's own part: d loss / d logits times V h
        part = head_products(h.detach().flatten(0, 1), weight, head, targets.flatten()).view(targets.shape)
        rows = rows + (part if per_position else part.sum(1, keepdim=True))
    return rows if per_position else rows[:, 0]


@torch.no_grad()
def head_products(h, weight, direction, targets):
    """Inner product of the output layer's gradient at every position with a direction (V, C): (N,) float64, logits by chunks."""
    out = torch.zeros(len(h), dtype=torch.float64, device=h.device)
    for start in range(0, len(h), chunk_rows(len(h), len(weight), h.device, torch.float32)):
        part = slice(start, start + chunk_rows(len(h), len(weight), h.device, torch.float32))
        d = (h[part] @ weight.to(h.dtype).T).softmax(-1)                                 # (n, V)
        d.scatter_add_(1, targets[part].clamp(min=0)[:, None], torch.full_like(d[:, :1], -1))
        out[part] = ((d * (h[part] @ direction.to(h.dtype).T)).sum(-1) * (targets[part] >= 0)).double()
    return out


# -- in a training run -------------------------------------------------------------------------------------------------

def check(sources, probes, weights, layers, source_rows, probe_rows, interval_rows, world_size):
    """BadInput for settings with which a re-weighting cannot work. sources, probes: lists of Source; weights: domain -> weight."""
    check_layers(layers)
    if not probes:
        raise BadInput("mixture = 'influence' needs probe sets: --probe=\"{'math': 1.0}\" with data_dir/probe/math (prepare/probe.py makes it).")
    if min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise BadInput(f'probe = {weights}: weights must not be negative, and one must be above 0.')
    fewest = max(4, 2 * world_size)             # every rank has a row in two batches at least
    if source_rows < fewest or probe_rows < fewest:
        raise BadInput(f'influence_rows = {source_rows} and probe_rows = {probe_rows} must be at least {fewest} on {world_size} rank(s).')
    own = source_rows * len(sources) + probe_rows * len(probes)
    if own > interval_rows:
        raise BadInput(f'a re-weighting reads {own:,} rows, more than the {interval_rows:,} that are trained on in between. Raise '
                       'mixture_interval, or lower influence_rows or probe_rows.')
    for source, rows, what in [(s, source_rows, 'influence_rows') for s in sources] + [(p, probe_rows, 'probe_rows') for p in probes]:
        if source.n_windows < rows:
            raise BadInput(f"'{source.name}' has {source.n_windows} windows of {source.block_size} tokens, fewer than {what} = {rows}. Prepare "
                           f'more of it, or lower {what}.')


def sample_batches(source, n_rows, batch_size, key, to_device, rank, world_size):
    """Batches of n_rows rows of a source, chosen by `key` (ints) alone and not by what has been trained on, this rank's part.

    Every rank yields the same number of batches; what is missing to a whole one is repeated and does not count.
    """
    rng = np.random.default_rng(key)
    chosen = rng.permutation(source.n_windows)[:n_rows] if source.n_windows < 2**24 else rng.integers(source.n_windows, size=n_rows)
    for start in range(0, len(chosen), batch_size * world_size):
        mine = range(start + rank * batch_size, start + (rank + 1) * batch_size)
        inputs, targets, doc_ids = to_device(source.rows([int(chosen[min(i, len(chosen) - 1)]) for i in mine]))
        targets = targets.clone()
        targets[max(0, len(chosen) - mine.start):] = -1
        yield inputs, targets, doc_ids


def measure(model, probes, sources, layers, weights, probe_rows, source_rows, batch_size, key, to_device, rank, world_size):
    """One measurement within a run: (Direction, r, se) by probe_rows rows of every probe set and source_rows of every source.

    probes, sources: lists of Source. The rows are a function of `key`, a tuple of ints (seed and step), so that a resumed run
    measures the same.
    """
    small = max(1, min(batch_size, source_rows // (4 * world_size)))              # at least four batches of a source
    options = dict(to_device=to_device, rank=rank, world_size=world_size)
    halves = {}
    for i, probe in enumerate(probes):
        batches = list(sample_batches(probe, probe_rows, max(1, min(batch_size, probe_rows // (2 * world_size))), (*key, 0, i), **options))
        halves[probe.name.split('/')[-1]] = batches[::2], batches[1::2]
    direction = probe_direction(model, halves, layers, weights)
    r, se, _ = group_influence(model, {source.name: sample_batches(source, source_rows, small, (*key, 1, i), **options)
                                       for i, source in enumerate(sources)}, direction)
    return direction, r, se


def reweight(model, loader, sources, probes, config, state, step, rows_to_come, to_device, rank, world_size):
    """Measures and gives the loader its new weights, in force from the next batch on. Returns (state, metrics to log).

    sources: those with a weight; config: train.py's knobs; state: what the last call returned, {} at first; rows_to_come: of the
    whole run. Sources whose influence is lost in noise, and all of them when all are harmful, keep their weights.
    """
    start = time.perf_counter()
    direction, r, se = measure(model, probes, sources, config['influence_layers'], config['probe'], config['probe_rows'],
                               config['influence_rows'], config['batch_size'], (config['seed'], step), to_device, rank, world_size)
    caps = mixtures.epoch_caps(config['mixture_max'], config['max_epochs'], {s.name: loader.cursors[s.name] for s in sources},
                               {s.name: s.n_windows for s in sources}, rows_to_come)
    weights, state, log = mixtures.update_influence({s.name: loader.weights[s.name] for s in sources}, r, se, state, config['mixture_eta'],
                                                    config['mixture_min'], caps)
    if not log['kept']:
        loader.set_weights({**dict.fromkeys(loader.names, 0.0), **weights})
    elif rank == 0:
        tqdm.write(f"step {step}: the weights stay as they are, {log['kept']}")
    return state, {**{f'mixture/influence_{name}': value for name, value in r.items()},
                   **{f'mixture/influence_se_{name}': value for name, value in se.items()},
                   **{f'mixture/asked_{name}': value for name, value in weights.items()},
                   **{f'probe/loss_{domain}': value for domain, value in direction.loss.items()},
                   'system/mixture_ms': (time.perf_counter() - start) * 1e3}
