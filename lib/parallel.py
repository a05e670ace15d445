"""How a model is spread over ranks and compiled, and what its sharded tensors need.

Tensor and expert parallelism come first (`split`), then activation checkpointing and torch.compile
(`prepare_blocks`), then FSDP2 block by block: the caller applies `fully_shard` to what `fsdp_parts`
yields. Sums over ranks, the norm of sharded gradients and the optimizers are here as well.
"""
import functools
import importlib
import math
import os
import shutil
from dataclasses import dataclass

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

from configurator import at_least, one_of
from model import count_parameters
from ops import ranks
from ops.moe import MixtureOfExperts

# Operators whose results selective checkpointing keeps: attention of every kind.
ATTENTION = (
    '_scaled_dot_product_flash_attention', '_scaled_dot_product_flash_attention_for_cpu',
    '_scaled_dot_product_efficient_attention', '_scaled_dot_product_cudnn_attention',
    '_flash_attention_forward', '_varlen_attn', 'blockwise')


@dataclass
class ParallelConfig:
    """Knobs of parallelism, activation memory and compilation.

    The product of dp_replicate, dp_shard, tp and ep is the number of ranks. One of them may be -1,
    which stands for the ranks that are left.
    """
    dp_replicate: int = 1           # replicas of the sharded model (HSDP)
    dp_shard: int = -1              # ranks that shard a replica (FSDP2), together with those of ep
    tp: int = 1                     # ranks that split heads, inner widths, vocabulary and tokens
                                    # (tensor and sequence parallelism)
    ep: int = 1                     # ranks, times tp, that the experts of a layer are spread over
    reshard_after_forward: bool | None = None   # shard weights again after a block's forward pass,
                                    # and gradients after every micro-step. None: for large models
    activation_checkpointing: one_of('none', 'selective', 'full') = 'none'      # full: a block
                                    # keeps its input only and runs again in the backward pass.
                                    # selective: it also keeps attention and narrow products
    compile: bool | None = None     # torch.compile for every block. None: if the run is long enough
    hang_timeout: at_least(0.0) = 1800.0    # seconds without progress after which a run of several
                                    # ranks ends and names the rank that hangs. 0: never


# -- sums over ranks -------------------------------------------------------------------------------


def sum_numbers(values, layout=None, every_rank=False):
    """Sums a list of numbers over the ranks that have rows of their own: list of float.

    every_rank: over all ranks. The sum goes through the hosts, so it waits for numbers on a GPU.
    """
    if not dist.is_initialized():
        return [float(value) for value in values]
    total = torch.tensor([float(value) for value in values], dtype=torch.float64)
    dist.all_reduce(total, group=None if every_rank or layout is None else layout.rows)
    return total.tolist()


def sum_over_ranks(tensor, layout, every_rank=False):
    """The same for a tensor, in place and without waiting for the device."""
    if layout is not None:
        dist.all_reduce(tensor, group=None if every_rank else layout.rows)
    return tensor


# -- spreading a model -----------------------------------------------------------------------------


def n_moe_layers(config):
    return config.n_layer - config.n_dense_layer if config.n_expert else 0


def rank_parameters(config, sizes):
    """Counts a rank's parameters before FSDP shards them: a dict.

    block      one block without its routed experts
    root       everything outside of blocks: tables and the final norm
    experts    the routed experts of one block
    dense      all parameters but routed experts
    routed     the routed experts of all blocks
    """
    counts = count_parameters(config)
    blocks = counts['non_embedding'] - counts['routed'] - config.n_embd
    block = blocks / config.n_layer / sizes['tp']
    root = counts['embedding'] / sizes['tp'] + config.n_embd
    routed = counts['routed'] / (sizes['ep'] * sizes['tp'])
    experts = routed / max(1, n_moe_layers(config))
    dense = block * config.n_layer + root
    return dict(block=block, root=root, experts=experts, dense=dense, routed=routed)


def too_large_replicated(config, sizes):
    """Whether a rank's unsharded weights in bf16 and gradients in fp32 take more than 8 GiB."""
    part = rank_parameters(config, sizes)
    return 6 * (part['dense'] + part['routed']) > 8 * 2**30


def choose_compile(asked, total_flops, peak, run):
    """Decides whether to compile the blocks: (bool, the reason as text).

    asked: the knob; total_flops: of the training run; peak: FLOP/s of a device, None on a CPU.
    Compiling costs 17 CPU-seconds for 6 blocks (4 when cached). On CPUs it gained 0 to 16 %, in
    fp32 2 %.
    """
    if asked is not None:
        return asked, 'as asked'
    if run.device.type == 'mps':
        return False, "torch.compile is a prototype on Apple's GPUs"
    speed = 0.3 * peak * run.world_size if peak else 1e11       # FLOP/s without compilation
    minutes = total_flops / speed / 60
    reason = f'about {minutes:,.0f} minutes of work'
    if run.device.type != 'cuda' and shutil.which(os.environ.get('CXX', 'g++')) is None:
        return False, f'{reason}, no C++ compiler'
    return minutes > 20, reason


def warm_compiler(device):
    """Starts the processes in which torch.compile builds the kernels of a GPU.

    They need seconds for their imports. Until they are there, kernels are built one by one.
    """
    if device.type == 'cuda':
        compiler = importlib.import_module('torch._inductor.async_compile')
        # A version without this function starts them when the first graph is compiled.
        getattr(compiler, 'maybe_warm_pool', lambda: None)()


def split(model, layout):
    """Gives every module this rank's part of its weights, and the groups that it works with.

    model: a GPT on the meta device. layout: ranks.Layout, None for a single process.
    """
    if layout is None:
        return
    for name, parameter in list(model.named_parameters()):
        part = ranks.part_of(layout, name)
        if part:
            dim, group = part
            shape = list(parameter.shape)
            shape[dim] //= group.size
            owner, _, last = name.rpartition('.')
            local = nn.Parameter(parameter.new_empty(shape), parameter.requires_grad)
            setattr(model.get_submodule(owner), last, local)
    model.layout = layout
    for module in model.modules():
        if hasattr(type(module), 'tp'):
            module.tp = layout.tp
        if isinstance(module, MixtureOfExperts):
            module.group = layout.experts
    for block in model.blocks if layout.tp else []:
        block.attn.n_head //= layout.tp.size
        block.attn.n_kv_head //= layout.tp.size


def prepare_blocks(model, compile_blocks=False, checkpointing='none'):
    """Compiles the forward of every block and lets it keep fewer activations.

    checkpointing  'none'; 'full': a block keeps its input only and runs again in the backward pass
                   (Chen et al. 2016, arXiv:1604.06174); 'selective': it also keeps attention and
                   its products, so only those of the feed-forward network run again (of experts
                   all)
    """
    again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if checkpointing == 'selective':
        # The experts' own FSDP hooks run inside a block and mark their work for the profiler: more
        # often in the recomputation than when the weights are there already.
        SAC_IGNORED_OPS.update((
            torch.ops.profiler._record_function_enter_new.default,
            torch.ops.profiler._record_function_exit._RecordFunction))
    # Experts count their tokens where there are gradients, and a teacher has no graph of training.
    trained = all(p.requires_grad for p in model.parameters()) and not n_moe_layers(model.config)
    model.one_graph = compile_blocks and trained
    for block in model.blocks:
        if checkpointing == 'full':
            # torch.compile goes inside the checkpoint: around it nothing would be compiled.
            inner = torch.compile(block.forward) if compile_blocks else block.forward
            block.forward = functools.partial(again, inner)
        elif checkpointing == 'selective':
            # It goes around the checkpoint here, because operators decide what is kept.
            # shapes (local inner width, C) of the weights whose products run again
            wide = set()
            for name, parameter in block.named_parameters():
                if 'w_gate' in name:
                    wide.add(frozenset(parameter.shape[-2:]))
            context = functools.partial(
                create_selective_checkpoint_contexts, functools.partial(checkpoint_policy, wide))
            inner = functools.partial(again, block.forward, context_fn=context)
            block.forward = torch.compile(inner) if compile_blocks else inner
        elif compile_blocks:
            block.compile()


def checkpoint_policy(wide, context, op, *args, **_):
    """Selective checkpointing's decision about an operator. A product of attention runs again, too,
    if its weight has one of the shapes in `wide`.
    """
    name = op._schema.name.split('::')[1]
    is_narrow = False
    if name in ('mm', 'addmm', '_scaled_mm'):
        # The weight is the last tensor. Products in fp8 have their scales after it.
        weight = args[1] if name == '_scaled_mm' else args[-1]
        is_narrow = frozenset(weight.shape) not in wide
    if is_narrow or name in ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def fsdp_parts(model, layout, dtype, reshard_after_forward=True):
    """Yields (module, keyword arguments of fully_shard) in the order in which FSDP2 wants them.

    Experts, block by block, then the rest: embeddings, final norm, output layer. Products are in
    dtype, reductions in fp32. Call `finish_sharding` afterwards. layout None: nothing to shard.
    """
    if layout is None:
        return
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    options = dict(mp_policy=policy, reshard_after_forward=reshard_after_forward)
    for block in model.blocks:
        if isinstance(block.ffn, MixtureOfExperts):
            yield block.ffn.experts, dict(mesh=layout.expert_shards, **options)
        yield block, dict(mesh=layout.shards, **options)
    yield model, dict(mesh=layout.shards, mp_policy=policy, reshard_after_forward=False)


def finish_sharding(model, layout):
    """Sets what FSDP2 has to know after `fully_shard`."""
    if layout is None:
        return
    for block in model.blocks:
        if isinstance(block.ffn, MixtureOfExperts) and layout.sizes['ep'] > 1:
            # Fewer ranks share the experts, but their gradients come from the tokens of all ranks.
            block.ffn.experts.set_gradient_divide_factor(float(layout.n_data))
            # A group of one rank divides by itself already and would do so twice.
            if layout.expert_shards.size(-1) > 1:
                block.ffn.experts.set_force_sum_reduction_for_comms(True)
    for method in ('loss', 'logits', 'score'):
        register_fsdp_forward_method(model, method)


def apply_parallelism(model, layout, dtype, compile_blocks=False, checkpointing='none',
                      reshard_after_forward=True):
    """Does all of the above for a GPT on the meta device. train.py does it step by step."""
    split(model, layout)
    prepare_blocks(model, compile_blocks, checkpointing)
    for module, options in fsdp_parts(model, layout, dtype, reshard_after_forward):
        fully_shard(module, **options)
    finish_sharding(model, layout)


def reshard(model):
    """Shards the root's parameters. FSDP2 leaves them gathered after a forward pass alone."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def sync_gradients(model, is_last, every_micro_step, reshard_after_forward):
    """Sets when FSDP2 reduces gradients: after the last micro-step, if they fit unsharded.

    every_micro_step  reduce after each one, because something takes the gradients of micro-batches
                      apart
    """
    model.set_requires_gradient_sync(every_micro_step or reshard_after_forward or is_last)
    # Between replicas of the model the last micro-step always suffices.
    model.set_requires_all_reduce(every_micro_step or is_last)
    model.set_reshard_after_backward(reshard_after_forward or is_last)


def full_tensor(tensor):
    """The full tensor of a sharded one, gathered from all ranks. None stays None."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor):
    """This rank's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# -- gradients and optimizers ----------------------------------------------------------------------


@functools.cache
def on_device(numbers, device):
    """A tuple of numbers as a tensor. It is made once: the host would wait for every copy."""
    return torch.tensor(numbers, device=device)


def gradient_norm(model):
    """Norm of all gradients over all ranks: () fp32 on the device."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    norms = torch.stack(torch._foreach_norm([local_tensor(gradient) for _, gradient in named]))
    if model.layout is None:
        return torch.linalg.vector_norm(norms)
    shares = tuple(1 / ranks.n_replicas(model.layout, name) for name, _ in named)
    total = (norms.double().square() * on_device(shares, norms.device)).sum()
    dist.all_reduce(total)
    return total.sqrt().float()


def clip_gradients(model, largest, norm):
    """Scales all gradients so that their norm, which is `norm`, is at most `largest`."""
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    gradients = [local_tensor(p.grad) for p in model.parameters() if p.grad is not None]
    torch._foreach_mul_(gradients, factor)


def make_optimizers(model, config):
    """[AdamW], or [AdamW, Muon] with Muon for the matrices of the blocks. config: train.py's knobs.

    Norms and biases have no weight decay. Experts have a group of their own: other ranks share
    them, and one fused call takes tensors of one mesh.
    """
    experts = []
    in_blocks = []
    others = []
    vectors = []
    for name, parameter in model.named_parameters():
        if '.experts.' in name:
            experts.append(parameter)
        elif parameter.ndim < 2:
            vectors.append(parameter)
        elif name.startswith('blocks.'):
            in_blocks.append(parameter)
        else:
            others.append(parameter)
    uses_muon = config['optimizer'] == 'muon'
    decay = config['weight_decay']
    groups = []
    for parameters, weight_decay in (
            (others if uses_muon else in_blocks + others, decay), (experts, decay), (vectors, 0.0)):
        if parameters:
            groups.append(dict(params=parameters, weight_decay=weight_decay))
    optimizers = [torch.optim.AdamW(
        groups, lr=config['learning_rate'], betas=(config['beta1'], config['beta2']),
        eps=config['adam_eps'], fused=True)]
    if uses_muon:
        # The update is scaled to AdamW's RMS, so one learning rate serves both (arXiv:2502.16982).
        optimizers.append(torch.optim.Muon(
            in_blocks, lr=config['learning_rate'], weight_decay=decay,
            adjust_lr_fn='match_rms_adamw'))
    return optimizers


def learning_rate_at(step, config, n_steps, n_warmup):
    """Linear warm-up from 0, then the schedule down to min_lr_frac * learning_rate at n_steps.

    config: train.py's knobs; n_steps: of the run; n_warmup: steps of the warm-up
    """
    peak = config['learning_rate']
    low = config['min_lr_frac']
    if step < n_warmup:
        return peak * (step + 1) / n_warmup
    done = (step - n_warmup) / max(1, n_steps - n_warmup)
    if config['schedule'] == 'constant':
        return peak
    if config['schedule'] == 'linear':
        share = 1 - done
    elif config['schedule'] == 'cosine':
        share = 0.5 * (1 + math.cos(math.pi * done))
    else:                               # wsd
        share = min(1.0, (1 - done) / config['decay_frac'])
    return peak * (low + (1 - low) * share)


def set_learning_rate(optimizers, lr):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = lr


def step(optimizer, not_finite):
    """One step of the optimizer, or none when `not_finite`, () fp32, is 1.

    Fused AdamW decides that on the device. For other optimizers, and for the one of Apple's GPUs,
    which ignores the number, the host waits for it.
    """
    if isinstance(optimizer, torch.optim.AdamW) and not_finite.device.type != 'mps':
        optimizer.found_inf = not_finite
    elif not_finite:
        return
    optimizer.step()
