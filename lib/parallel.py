"""How a model is compiled and spread over ranks (tensor and expert parallelism, then FSDP2 per block), what its sharded tensors need, and how host and
device do not wait for each other."""
import functools

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ops import ranks
from ops.moe import MixtureOfExperts

# names of operators whose results selective checkpointing keeps: attention of every kind
ATTENTION = ('_scaled_dot_product_flash_attention', '_scaled_dot_product_flash_attention_for_cpu', '_scaled_dot_product_efficient_attention',
             '_scaled_dot_product_cudnn_attention', '_flash_attention_forward', '_varlen_attn', 'blockwise')
# the experts' own FSDP hooks lie within a block and mark what they do for the profiler: more often when it runs again than when weights are there already
SAC_IGNORED_OPS |= {torch.ops.profiler._record_function_enter_new.default, torch.ops.profiler._record_function_exit._RecordFunction}


def apply_parallelism(model, layout, dtype, compile_blocks=False, checkpointing='none', reshard_after_forward=True):
    """Prepares a GPT on the meta device: its parts, activation checkpointing, compiled blocks, and shards over the layout (None: one process).

    checkpointing   'none'; 'full': a block keeps its input alone and runs again in the backward (Chen et al. 2016, arXiv:1604.06174); 'selective':
                    also attention's result and its products, so that only those of the feed-forward network run again (of experts all)
    reshard_after_forward  whole weights are given up after a block's forward, and gathered again for its backward
    Sharded block by block; products in dtype, reductions in fp32.
    """
    if layout is not None:
        split(model, layout)
    for block in model.blocks:
        prepare_block(block, compile_blocks, checkpointing)
    if layout is None:
        return
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if dtype != torch.float32 else MixedPrecisionPolicy()
    options = dict(mp_policy=policy, reshard_after_forward=reshard_after_forward)
    for block in model.blocks:
        if isinstance(block.ffn, MixtureOfExperts):
            experts = fully_shard(block.ffn.experts, mesh=layout.expert_shards, **options)
            if layout.sizes['ep'] > 1:                         # fewer ranks share them, but their gradients are of the tokens of all
                experts.set_gradient_divide_factor(float(layout.n_data))
                if layout.expert_shards.size(-1) > 1:          # a group of one divides by itself, and would do so twice
                    experts.set_force_sum_reduction_for_comms(True)
        fully_shard(block, mesh=layout.shards, **options)
    fully_shard(model, mesh=layout.shards, mp_policy=policy, reshard_after_forward=False)      # the rest: embeddings, final norm, output layer
    for method in ('loss', 'logits', 'score'):
        register_fsdp_forward_method(model, method)


def split(model, layout):
    """Gives every module this rank's part of its weights, and the groups that it works with."""
    for name, parameter in list(model.named_parameters()):
        part = ranks.part_of(layout, name)
        if part:
            dim, group = part
            shape = list(parameter.shape)
            shape[dim] //= group.size
            owner, _, last = name.rpartition('.')
            setattr(model.get_submodule(owner), last, nn.Parameter(parameter.new_empty(shape), parameter.requires_grad))
    model.layout = layout
    for module in model.modules():
        if hasattr(type(module), 'tp'):
            module.tp = layout.tp
        if isinstance(module, MixtureOfExperts):
            module.group = layout.experts
    for block in model.blocks if layout.tp else []:
        block.attn.n_head //= layout.tp.size
        block.attn.n_kv_head //= layout.tp.size


def prepare_block(block, compiles, checkpointing):
    """Compiles a block's forward and lets it keep less of its activations."""
    if checkpointing == 'full':
        inner = torch.compile(block.forward) if compiles else block.forward        # within the checkpoint: around one nothing would be compiled
        block.forward = functools.partial(checkpoint, inner, use_reentrant=False, preserve_rng_state=False)
    elif checkpointing == 'selective':
        wide = {frozenset(p.shape[-2:]) for name, p in block.named_parameters() if 'w_gate' in name}            # (inner width of this rank's part, C)
        inner = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False,
                                  context_fn=functools.partial(create_selective_checkpoint_contexts, functools.partial(kept, wide)))
        block.forward = torch.compile(inner) if compiles else inner                # around it: what is kept is chosen by operators
    elif compiles:
        block.compile()


def kept(wide, context, op, *args, **_):
    """The policy of selective checkpointing, of every operator in a block's forward. wide: shapes of weights whose products run again; one of attention's
    that has the same shape does so, too."""
    name = op._schema.name.split('::')[1]
    narrow = name in ('mm', 'addmm') and frozenset(args[-1].shape) not in wide
    return CheckpointPolicy.MUST_SAVE if narrow or name in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


def full_tensor(tensor):
    """A tensor that every rank holds all of; None stays None."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor):
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def put(tensor, device):
    """A tensor of the CPU (or None) on the device, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if tensor is not None and torch.device(device).type == 'cuda' else tensor


def to_host(tensor):
    """Begins to copy a tensor to the CPU: (copy, event to wait for before it is read, None: it is there)."""
    if not tensor.is_cuda:
        return tensor, None
    copy, event = tensor.to('cpu', non_blocking=True), torch.cuda.Event()      # into pinned memory
    event.record()
    return copy, event


def read(copy, event):
    """What `to_host` copied, as a list of floats, as soon as it is there."""
    if event is not None:
        event.synchronize()
    return copy.tolist()


def sum_over_ranks(tensor, layout, everywhere=False):
    """The sum over the ranks that have rows of their own (everywhere: over all), in place and without waiting for the device."""
    if layout is not None:
        dist.all_reduce(tensor, group=None if everywhere else layout.rows)
    return tensor


def gradient_norm(model):
    """Norm of all gradients, over all ranks: () fp32 on the device."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    norms = torch.stack(torch._foreach_norm([local_tensor(g) for _, g in named]))
    if model.layout is None:
        return torch.linalg.vector_norm(norms)
    share = torch.tensor([1 / ranks.n_replicas(model.layout, name) for name, _ in named], device=norms.device)
    total = (norms.double().square() * share).sum()
    dist.all_reduce(total)
    return total.sqrt().float()


def clip_gradients(model, most, norm):
    """Scales all gradients so that their norm, `norm`, is at most `most`."""
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local_tensor(p.grad) for p in model.parameters() if p.grad is not None], factor)


def make_optimizers(model, name, learning_rate, weight_decay, betas, eps):
    """[AdamW], or [AdamW, Muon] with Muon for the blocks' matrices ('muon'). Norms and biases have no weight decay.

    Experts have groups of their own: other ranks share them, and one call takes tensors of one mesh.
    """
    named = list(model.named_parameters())
    experts = [p for n, p in named if '.experts.' in n]
    in_blocks = [p for n, p in named if p.ndim == 2 and n.startswith('blocks.')]
    others = [p for n, p in named if p.ndim == 2 and not n.startswith('blocks.')]
    vectors = [p for _, p in named if p.ndim < 2]
    by_adamw = others if name == 'muon' else in_blocks + others
    groups = [dict(params=params, weight_decay=decay) for params, decay in ((by_adamw, weight_decay), (experts, weight_decay), (vectors, 0.0)) if params]
    optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)]
    if name == 'muon':     # the update is scaled to AdamW's RMS, so one learning rate serves both (arXiv:2502.16982)
        optimizers.append(torch.optim.Muon(in_blocks, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn='match_rms_adamw'))
    return optimizers


def step(optimizer, not_finite):
    """A step of the optimizer, or none at all when `not_finite` () fp32 is 1. Fused AdamW decides that on the device; for others the host waits."""
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.found_inf = not_finite
    elif not_finite:
        return
    optimizer.step()


def reshard(model):
    """Shards what FSDP2 left whole: after a forward without a backward (an evaluation) the root's parameters are."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
