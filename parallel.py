"""How a model is compiled and spread over ranks (FSDP2 per block), what its sharded tensors need, and how host and device do not wait for each other."""
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from model import checkpoint_activations


def spread(model, mesh, dtype, compile_blocks=False, checkpointing='none'):
    """Prepares a GPT on the meta device: activation checkpointing (none | full), compiled blocks, and shards over the mesh (None: one process).

    Sharded block by block; products in dtype, reductions in fp32.
    """
    for block in model.blocks if compile_blocks else []:
        if checkpointing == 'none':
            block.compile()
        else:
            block.forward = torch.compile(block.forward)       # within the checkpoint: around one nothing would be compiled
    if checkpointing == 'full':
        checkpoint_activations(model)
    if mesh is None:
        return
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if dtype != torch.float32 else MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)            # the rest: embeddings, final norm, output layer
    for method in ('loss', 'logits', 'score'):
        register_fsdp_forward_method(model, method)


def whole(tensor):
    """A tensor that every rank holds all of; None stays None."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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


def sum_over_ranks(tensor):
    """The sum over all ranks, in place and without waiting for the device."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def step(optimizer, spoilt):
    """A step of the optimizer, or none at all when `spoilt` () fp32 is 1. Fused AdamW decides that on the device; for others the host waits."""
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.found_inf = spoilt
    elif spoilt:
        return
    optimizer.step()


def reshard(model):
    """Shards what FSDP2 left whole: after a forward without a backward (an evaluation) the root's parameters are."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
