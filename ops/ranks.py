"""How ranks divide the work, and what they exchange inside the network.

A rank has four coordinates (r, s, e, t) in dp_replicate x dp_shard x ep x tp. The last one runs
fastest, so that a tensor-parallel group is on one node.

    rows        Ranks with the same t have different rows. The tp ranks of a group share their rows.
    parameters  FSDP2 shards them over dp_shard * ep ranks, with dp_replicate replicas.
    tp          Heads, inner widths and the vocabulary are split over the tp ranks before that. So
                are the tokens between matrix products: norms and residuals take 1 / tp of the
                memory (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2).
    experts     They are distributed over ep * tp adjacent ranks, and sharded over dp_shard.

A split parameter is a plain local tensor, so products, kernels and torch.compile need to know
nothing about the split. `SPLIT` says along which dimension the parts are joined, for initial
weights and checkpoints.

Letters in shape comments: B rows, T tokens, C n_embd, N = B*T, n ranks of a group.
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

# Module -> the dimension of its weight (and bias) that is split over tp.
SPLIT = dict(wq=0, wk=0, wv=0, wo=1, w_gate=0, w_up=0, w_down=1, embed=0, lm_head=0)
SIZES = ('dp_replicate', 'dp_shard', 'ep', 'tp')


@dataclass
class Group:
    """Ranks that share the work on the same rows."""

    group: dist.ProcessGroup
    rank: int
    size: int
    # Whether the tokens between products are split too. Without gradients their number may not be
    # divisible. Every rank then has all of them.
    splits: bool = True


@dataclass
class Layout:
    """This process's place: its groups, and the meshes over which its parameters are sharded."""

    sizes: dict
    shards: DeviceMesh  # (dp_replicate, dp_shard * ep), the ranks with this t
    expert_shards: DeviceMesh  # (dp_replicate, dp_shard), the ranks with this (e, t)
    tp: Group | None
    experts: Group | None  # ep * tp ranks
    rows: dist.ProcessGroup  # the ranks with this t
    data_rank: int
    n_data: int
    # 'tp' or 'experts' -> mesh (dp_replicate, parts, shards) that describes a split parameter in a
    # checkpoint
    stored: dict


def resolve_sizes(world_size, dp_replicate, dp_shard, tp, ep):
    """The sizes by name, with -1 filled in. Raises BadInput if they do not make world_size."""
    sizes = dict(dp_replicate=dp_replicate, dp_shard=dp_shard, ep=ep, tp=tp)
    shown = ' x '.join(f'{name} {n}' for name, n in sizes.items())
    open_sizes = [name for name, n in sizes.items() if n == -1]
    if min(sizes.values()) < -1 or 0 in sizes.values() or len(open_sizes) > 1:
        raise BadInput(f'{shown}: each must be at least 1, but one of them may be -1.')
    fixed = math.prod(n for n in sizes.values() if n != -1)
    for name in open_sizes:
        sizes[name] = world_size // fixed
    if math.prod(sizes.values()) != world_size:
        problem = f': {fixed} does not divide it' if open_sizes else f', but {fixed}'
        raise BadInput(
            f'{shown} does not make {world_size} rank(s){problem}. Change one of them to -1, or '
            'the number of processes.'
        )
    return sizes


def size_faults(sizes, config, micro_tokens=0):
    """Everything that these sizes cannot divide in a ModelConfig, as a list of phrases.

    micro_tokens: tokens of a rank's micro-step.
    """
    tp = sizes['tp']
    ep = sizes['ep']
    names = ('n_head', 'n_kv_head', 'ffn_dim', 'vocab_size')
    divided = {name: getattr(config, name) for name in names}
    divided['batch_size * block_size'] = micro_tokens
    # The routed experts are not split, only distributed.
    if config.n_shared_expert:
        divided['expert_ffn_dim'] = config.expert_ffn_dim
    faults = []
    for name, n in divided.items():
        if n % tp:
            faults.append(f'{name} = {n:,} is not a multiple of tp = {tp}')
    if config.n_expert % (ep * tp):
        faults.append(f'n_expert = {config.n_expert} is not a multiple of ep * tp = {ep * tp}')
    if ep > 1 and not config.n_expert:
        faults.append(f'ep = {ep} spreads experts, and this model has none (n_expert = 0)')
    return faults


def check_sizes(sizes, config, micro_tokens=0, whose=''):
    """Raises BadInput with everything that `size_faults` finds. whose: prefix of the message."""
    faults = size_faults(sizes, config, micro_tokens)
    if faults:
        raise BadInput(whose + '; '.join(faults) + '.')


def make_layout(device_type, rank, world_size, sizes):
    """The Layout of this process, or None if it is the only one."""
    if world_size == 1:
        return None
    R, S, e, t = (sizes[name] for name in SIZES)
    # Every mesh covers all ranks in the same order, with other dimensions merged.
    names = ('replicate', 'shard', 'part')
    row_mesh = init_device_mesh(device_type, (R, S * e, t), mesh_dim_names=names)
    expert_mesh = row_mesh
    if e > 1:
        expert_mesh = init_device_mesh(device_type, (R, S, e * t), mesh_dim_names=names)
    data_mesh = init_device_mesh(device_type, (R * S * e, t), mesh_dim_names=('data', 'tp'))
    stored = {}
    for kind, mesh in (('tp', row_mesh), ('experts', expert_mesh)):
        if mesh.size(2) > 1:
            # The full tensor is split into parts first, and each part is then sharded.
            transposed = mesh.mesh.transpose(1, 2).contiguous()
            stored[kind] = DeviceMesh(
                device_type, transposed, mesh_dim_names=('replicate', 'part', 'shard')
            )
    for mesh in (row_mesh, expert_mesh, data_mesh, *stored.values()):
        for group in mesh.get_all_groups():
            # As for the default group: lib/watch.py ends a run that hangs, and reports where.
            _set_pg_timeout(datetime.timedelta(days=1), group)
    shard_dims = ('replicate', 'shard') if R > 1 else 'shard'
    tp = experts = None
    if t > 1:
        tp = Group(row_mesh.get_group('part'), rank % t, t)
    if e * t > 1:
        experts = Group(expert_mesh.get_group('part'), rank % (e * t), e * t)
    return Layout(
        sizes=sizes,
        shards=row_mesh[shard_dims],
        expert_shards=expert_mesh[shard_dims],
        tp=tp,
        experts=experts,
        rows=data_mesh.get_group('data'),
        data_rank=rank // t,
        n_data=R * S * e,
        stored=stored,
    )


# -- parameters ------------------------------------------------------------------------------------


def part_of(layout, name):
    """(dimension, Group) along which a parameter is split, or None if it is not."""
    if layout is None:
        return None
    if '.experts.' in name:
        dim = 0
        group = layout.experts
    else:
        module = name.split('.')[-2]
        dim = SPLIT.get(module)
        group = layout.tp
    return None if dim is None or group is None else (dim, group)


def n_replicas(layout, name):
    """Number of ranks that hold the same numbers of a sharded parameter."""
    if layout is None:
        return 1
    replicate = layout.sizes['dp_replicate']
    return replicate if part_of(layout, name) else replicate * layout.sizes['tp']


def full_shape(layout, name, parameter):
    """Shape of a parameter with all its parts."""
    shape = list(parameter.shape)
    part = part_of(layout, name)
    if part:
        dim, group = part
        shape[dim] *= group.size
    return torch.Size(shape)


def placed(layout, name, parameter, full):
    """This rank's share of `full`, with device, dtype and sharding of the parameter."""
    part = part_of(layout, name)
    if part:
        dim, group = part
        full = full.chunk(group.size, dim)[group.rank]
    return sharded(parameter, full)


def sharded(parameter, local):
    """This rank's part `local`, with device, dtype and sharding of the parameter."""
    local = local.to(parameter.device, parameter.dtype)
    if not isinstance(parameter, DTensor):
        return local
    # No source rank: every rank has the same numbers, so nothing is sent.
    mesh = parameter.device_mesh
    return distribute_tensor(local, mesh, parameter.placements, src_data_rank=None)


def stored_form(layout, name, tensor):
    """A parameter, or a tensor of its shape, as a DTensor of the full shape for a checkpoint."""
    # A checkpoint with full shapes can be read into any other layout.
    part = part_of(layout, name)
    if not part or not isinstance(tensor, DTensor):
        return tensor
    shape = full_shape(layout, name, tensor)
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    kind = 'experts' if '.experts.' in name and layout.sizes['ep'] > 1 else 'tp'
    placements = (Replicate(), Shard(part[0]), Shard(0))
    local = tensor.to_local()
    mesh = layout.stored[kind]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


# -- exchange within a group -----------------------------------------------------------------------


def collect(x, group):
    """The parts of all ranks, joined along the first dimension. Has no gradient."""
    full = x.new_empty(x.shape[0] * group.size, *x.shape[1:])
    dist.all_gather_into_tensor(full, x.contiguous(), group=group.group)
    return full


def reduce_scatter(x, group):
    """This rank's part, along the first dimension, of the sum over the group."""
    local = x.new_empty(x.shape[0] // group.size, *x.shape[1:])
    dist.reduce_scatter_tensor(local, x.contiguous(), group=group.group)
    return local


def all_reduce(x, group):
    """The sum over the group."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group.group)
    return x


def local_part(x, group):
    """This rank's part of a tensor that all ranks have."""
    return x.chunk(group.size)[group.rank].contiguous()


def unchanged(x, group):
    return x.view_as(x)


class _Exchange(torch.autograd.Function):
    """Applies `there` to (x, group), and in the backward `back` to (gradient, group)."""

    @staticmethod
    def forward(ctx, x, group, there, back):
        ctx.group = group
        ctx.back = back
        return there(x, group)

    @staticmethod
    def backward(ctx, g):
        return ctx.back(g, ctx.group), None, None, None


# Where the tokens are not split, every rank has all of them and computes the same gradient.


def gather(x, group, replicated=False):
    """All tokens of the group, (N, C), from this rank's, (N/n, C).

    replicated: all ranks do the same with the result. Their gradients are equal and not summed.
    """
    if not group.splits:
        return x
    return _Exchange.apply(x, group, collect, local_part if replicated else reduce_scatter)


def scatter(x, group):
    """The sum of what the ranks computed, (..., C), for this rank's part of the tokens (N/n, C)."""
    if not group.splits:
        return _Exchange.apply(x, group, all_reduce, unchanged)
    return _Exchange.apply(x.flatten(0, -2), group, reduce_scatter, collect)


def share(weight, group):
    """A replicated parameter that each rank applies to its own tokens: sums its gradients."""
    return _Exchange.apply(weight, group, unchanged, all_reduce) if group.splits else weight


def add_up(x, group):
    """The sum over the group of something that each rank computed from its own tokens."""
    return _Exchange.apply(x, group, all_reduce, unchanged) if group.splits else x


def embed(idx, table, group):
    """Ids (B, T) and this rank's part of the table (V/n, C) -> embeddings, as from `scatter`."""
    # Each id is in the table of one rank. The others contribute zeros.
    ids = idx - group.rank * len(table)
    inside = (ids >= 0) & (ids < len(table))
    x = F.embedding(ids.clamp(0, len(table) - 1), table) * inside[..., None]
    return scatter(x, group)


class _AllToAll(torch.autograd.Function):
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
    """Sends rows to every rank of a group: the first send[0] to rank 0, and so on.

    receive: the number of rows that come from each rank.
    """
    return _AllToAll.apply(x, send, receive, group)
