"""Which rank does what, and what ranks exchange inside the network: tensor and sequence parallelism, experts, sums over ranks.

A rank stands at (r, s, e, t) of dp_replicate x dp_shard x ep x tp, t running fastest, so that a tensor-parallel group is on one node:

    rows        the dp_replicate * dp_shard * ep ranks of one t have rows of their own; the tp ranks beside each have the same
    parameters  FSDP2 spreads them over dp_shard * ep ranks and copies them dp_replicate times
    tp          heads, inner widths and vocabulary are split over the group before that, and the tokens between the products too, so that norms
                and residuals take 1 / tp of the memory (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2)
    experts     are spread over the ep * tp ranks that stand together, and by FSDP2 over dp_shard

A split parameter is the rank's own plain part: products, kernels and torch.compile see ordinary tensors. `SPLIT` says where the parts lie in
the whole, for initial weights and checkpoints.

Letters in shape comments: B rows, T tokens, C n_embd, N = B*T, n ranks of a group, E experts.
"""
import datetime
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from configurator import BadInput

# end of a parameter's name -> the dimension that is split over tp (of experts: over ep x tp)
SPLIT = {**dict.fromkeys(('wq.weight', 'wk.weight', 'wv.weight', 'wq.bias', 'wk.bias', 'wv.bias', 'w_gate.weight', 'w_up.weight', 'embed.weight',
                          'lm_head.weight', 'experts.w_gate', 'experts.w_up', 'experts.w_down'), 0),
         'wo.weight': 1, 'w_down.weight': 1}
SIZES = ('dp_replicate', 'dp_shard', 'ep', 'tp')


@dataclass
class Group:
    """Ranks that share the work on the same rows."""
    group: dist.ProcessGroup
    rank: int
    size: int
    splits: bool = True         # the tokens between the products too; off where their number cannot be divided (only without gradients)


@dataclass
class Layout:
    """Of this process: the meshes that parameters are sharded over, its groups, and which rows are its own."""
    sizes: dict
    shards: DeviceMesh          # (dp_replicate, dp_shard * ep), of this t
    expert_shards: DeviceMesh   # (dp_replicate, dp_shard), of this (e, t)
    tp: Group | None
    experts: Group | None       # ep x tp
    rows: dist.ProcessGroup     # the ranks of this t
    data_rank: int
    n_data: int
    stored: dict                # 'tp' and 'experts' -> mesh (dp_replicate, parts, shards) that describes a split parameter to a checkpoint


def resolve_sizes(world_size, dp_replicate, dp_shard, tp, ep):
    """The sizes in the order of SIZES, -1 (one of them) replaced by what is left. BadInput when they are not world_size together."""
    sizes = dict(zip(SIZES, (dp_replicate, dp_shard, ep, tp)))
    shown = ' x '.join(f'{name} {n}' for name, n in sizes.items())
    open_ones, fixed = [name for name, n in sizes.items() if n == -1], math.prod(n for n in sizes.values() if n != -1)
    if min(sizes.values()) < -1 or 0 in sizes.values() or len(open_ones) > 1:
        raise BadInput(f'{shown}: every one must be at least 1, and one of them may be -1, the rest.')
    if world_size % fixed or not open_ones and fixed != world_size:
        raise BadInput(f'{shown} does not make {world_size} rank(s)' + (f': {fixed} does not divide it.' if open_ones else f', but {fixed}.')
                       + ' Change one of them to -1, or the number of processes.')
    return {name: world_size // fixed if n == -1 else n for name, n in sizes.items()}


def size_faults(sizes, config, micro_tokens=0):
    """Everything in a ModelConfig that cannot be divided so, in words. micro_tokens: of a rank's micro-step."""
    tp, spread = sizes['tp'], sizes['ep'] * sizes['tp']
    whole = dict(n_head=config.n_head, n_kv_head=config.n_kv_head, ffn_dim=config.ffn_dim, vocab_size=config.vocab_size,
                 **{'batch_size * block_size': micro_tokens}, **({'expert_ffn_dim': config.expert_ffn_dim} if config.n_shared_expert else {}))
    faults = [f'{name} = {n:,} is not a multiple of tp = {tp}' for name, n in whole.items() if n % tp]
    if config.n_expert % spread:
        faults.append(f'n_expert = {config.n_expert} is not a multiple of ep * tp = {spread}')
    if sizes['ep'] > 1 and not config.n_expert:
        faults.append(f"ep = {sizes['ep']} spreads experts, and this model has none (n_expert = 0)")
    return faults


def check_sizes(sizes, config, micro_tokens=0, whose=''):
    """BadInput for what `size_faults` finds."""
    if faults := size_faults(sizes, config, micro_tokens):
        raise BadInput(whose + '; '.join(faults) + '.')


def make_layout(device_type, rank, world_size, sizes):
    """The Layout of this process, None for a single one."""
    if world_size == 1:
        return None
    R, S, e, t = (sizes[name] for name in SIZES)
    by_rows = init_device_mesh(device_type, (R, S * e, t), mesh_dim_names=('replicate', 'shard', 'tp'))
    by_experts = init_device_mesh(device_type, (R, S, e * t), mesh_dim_names=('replicate', 'shard', 'part')) if e > 1 else by_rows
    part = by_experts.mesh_dim_names[-1]
    data = init_device_mesh(device_type, (R * S * e, t), mesh_dim_names=('data', 'tp'))
    stored = {kind: DeviceMesh(device_type, mesh.mesh.transpose(1, 2).contiguous(), mesh_dim_names=('replicate', 'part', 'shard'))
              for kind, mesh in (('tp', by_rows), ('experts', by_experts)) if mesh.size(2) > 1}
    for group in {g for mesh in (by_rows, by_experts, data, *stored.values()) for g in mesh.get_all_groups()}:
        _set_pg_timeout(datetime.timedelta(days=1), group)          # as the group of all: lib/watch.py ends what hangs, and says why
    return Layout(sizes, *(mesh['replicate', 'shard'] if R > 1 else mesh['shard'] for mesh in (by_rows, by_experts)),
                  Group(by_rows.get_group('tp'), rank % t, t) if t > 1 else None,
                  Group(by_experts.get_group(part), rank % (e * t), e * t) if e * t > 1 else None,
                  data.get_group('data'), rank // t, R * S * e, stored)


# -- parameters --------------------------------------------------------------------------------------------------------

def part_of(layout, name):
    """(dimension, Group) that a parameter is split by, or None where every rank of a group has all of it."""
    group = None if layout is None else layout.experts if '.experts.' in name else layout.tp
    ends = [end for end in SPLIT if name.endswith(end)]
    return (SPLIT[ends[0]], group) if ends and group is not None else None


def n_replicas(layout, name):
    """Ranks that hold the same numbers of a sharded parameter."""
    if layout is None:
        return 1
    return layout.sizes['dp_replicate'] * (1 if part_of(layout, name) else layout.sizes['tp'])


def full_shape(layout, name, parameter):
    """The shape of a parameter with all parts."""
    shape, part = list(parameter.shape), part_of(layout, name)
    if part:
        shape[part[0]] *= part[1].size
    return torch.Size(shape)


def placed(layout, name, parameter, whole):
    """What this rank holds of a parameter, given all of it: on its device, in its dtype, sharded as it is."""
    part = part_of(layout, name)
    return sharded(parameter, whole.chunk(part[1].size, part[0])[part[1].rank] if part else whole)


def sharded(parameter, own):
    """`own`, all of the rank's part, on the parameter's device, in its dtype, sharded as it is."""
    own = own.to(parameter.device, parameter.dtype)
    return distribute_tensor(own, parameter.device_mesh, parameter.placements, src_data_rank=None) if isinstance(parameter, DTensor) else own


def stored_form(layout, name, tensor):
    """A parameter, or a tensor of its shape, for a checkpoint, which then has the whole and may be read by any other layout."""
    part = part_of(layout, name)
    if not part or not isinstance(tensor, DTensor):
        return tensor
    shape = full_shape(layout, name, tensor)
    stride = tuple(math.prod(shape[i + 1:]) for i in range(len(shape)))
    mesh = layout.stored['experts' if '.experts.' in name and layout.sizes['ep'] > 1 else 'tp']
    return DTensor.from_local(tensor.to_local(), mesh, (Replicate(), Shard(part[0]), Shard(0)), run_check=False, shape=shape, stride=stride)


# -- tokens of a tensor-parallel group ---------------------------------------------------------------------------------

def _gathered(x, group):
    whole = x.new_empty(x.shape[0] * group.size, *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group.group)
    return whole


def _reduced(x, group):
    own = x.new_empty(x.shape[0] // group.size, *x.shape[1:])
    dist.reduce_scatter_tensor(own, x.contiguous(), group=group.group)
    return own


class _Gather(torch.autograd.Function):
    """(N/n, C) -> (N, C). Backward: ranks' gradients are added up (`replicated`: they are the same already), own part."""

    @staticmethod
    def forward(ctx, x, group, replicated):
        ctx.group, ctx.replicated = group, replicated
        return _gathered(x, group)

    @staticmethod
    def backward(ctx, g):
        return (g.chunk(ctx.group.size)[ctx.group.rank].contiguous() if ctx.replicated else _reduced(g, ctx.group)), None, None


class _Scatter(torch.autograd.Function):
    """(N, C), summands of the group's ranks -> (N/n, C), own part of their sum."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _reduced(x, group)

    @staticmethod
    def backward(ctx, g):
        return _gathered(g, ctx.group), None


class _Share(torch.autograd.Function):
    """A parameter that all ranks of the group have, each using it on its own part: gradients are added up."""

    @staticmethod
    def forward(ctx, weight, group):
        ctx.group = group
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, g):
        g = g.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(g, group=ctx.group.group)
        return g, None


class _Add(torch.autograd.Function):
    """The sum over the group, whose gradient all ranks have alike."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        dist.all_reduce(x, group=group.group)
        return x

    @staticmethod
    def backward(ctx, g):
        return g, None


def gather(x, group, replicated=False):
    """The tokens of all ranks, (N, C), from this one's (N/n, C). replicated: what follows is the same on every rank."""
    return x if group is None or not group.splits else _Gather.apply(x, group, replicated)


def collect(x, group):
    """The parts of all ranks along the first dimension, without gradients."""
    return _gathered(x, group)


def scatter(x, group):
    """What this rank keeps of (..., C), to which every rank contributes a summand: (N/n, C) of its tokens, or all of it where they are not split."""
    if group is None:
        return x
    return _Scatter.apply(x.flatten(0, -2), group) if group.splits else _Add.apply(x, group)


def share(weight, group):
    return weight if weight is None or group is None or not group.splits else _Share.apply(weight, group)


def add_up(x, group):
    """The sum over a group of what each of its ranks has of its own tokens."""
    return x if group is None or not group.splits else _Add.apply(x, group)


def embed(idx, table, group):
    """(B, T) ids -> (B, T, C); of a group whose ranks each have a part of the table: what `scatter` leaves of it."""
    if group is None:
        return F.embedding(idx, table)
    ids = idx - group.rank * len(table)
    inside = (ids >= 0) & (ids < len(table))
    return scatter(F.embedding(ids.clamp(0, len(table) - 1), table) * inside[..., None], group)


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks of a group: the first send[0] to rank 0, and so on; receive: how many come from each."""

    @staticmethod
    def forward(ctx, x, send, receive, group):
        ctx.splits = send, receive, group
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=group.group)
        return out

    @staticmethod
    def backward(ctx, g):
        send, receive, group = ctx.splits
        return _AllToAll.apply(g, receive, send, group), None, None, None


def exchange(x, send, receive, group):
    return _AllToAll.apply(x, send, receive, group)
