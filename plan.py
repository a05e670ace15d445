"""What a run will cost, on paper: memory of a process term by term, work, time (`train.py --dry_run=True`), and whether compiling pays."""
import math
import os
import shutil

import torch

from kd import kd_chunk_rows
from loss import chunk_rows
from model import count_parameters, flops_per_token

H100 = 989e12               # dense bf16 FLOP/s of the GPU that plans are made for on a machine without one
GPU_GIB = 80


def choose_compile(asked, total_flops, peak, world_size, device):
    """(whether to compile blocks, why). Compiling costs 17 CPU-seconds for 6 blocks (4 cached); on CPUs it gained 0 to 16 %, in fp32 2 % (BENCHMARKS.md).

    asked: the knob, None: decide; total_flops of the run; peak: FLOP/s of a device, None on a CPU.
    """
    if asked is not None:
        return asked, 'as asked'
    minutes = total_flops / (0.3 * peak * world_size if peak else 1e11) / 60       # at a speed that it may reach without
    compiler = device.type == 'cuda' or shutil.which(os.environ.get('CXX', 'g++')) is not None
    return minutes > 20 and compiler, f'about {minutes:,.0f} minutes of work' + ('' if compiler else ', no C++ compiler')


def too_large_whole(config, sizes):
    """Whether whole weights in bf16 and whole gradients in fp32, of a rank's part, take more than 8 GiB: then they are kept in shards."""
    counts = count_parameters(config)
    return 6 * ((counts['total'] - counts['routed']) / sizes['tp'] + counts['routed'] / (sizes['tp'] * sizes['ep'])) > 8 * 2**30


def saved_bytes_per_token(config, low, fused):
    """Bytes that the backward of one block keeps of a token, as (everything, its input alone).

    low: bytes of an element under autocast (2) or in fp32 (4); fused: a layer keeps its inputs only (on CUDA, by kernels or by the compiler), else
    RMSNorm keeps input and result in fp32 as well, and SwiGLU its silu. Without the low-precision copies of weights.
    """
    c = config
    heads, kv_heads = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    elements = 2 * c.n_embd + 2 * heads + 2 * kv_heads + (3 if fused else 4) * c.ffn_dim      # normed inputs; q and its output, k and v; gate, up, silu, product
    norms, small = 2 * c.n_embd, c.n_head + 2
    if c.qk_norm:
        norms, small = norms + heads + kv_heads, small + c.n_head + c.n_kv_head
    return elements * low + (norms * low if fused else (2 * norms - (c.qk_norm and heads + kv_heads)) * 4) + 4 * small, low * c.n_embd


def memory_plan(config, rows, block_size, shards, low, activation_checkpointing, optimizer, on_cuda, teacher=None):
    """Bytes that a process holds at its fullest, term -> bytes.

    config: ModelConfig; rows of a micro-step; shards: ranks that parameters are spread over; low: bytes of an element in products;
    teacher: ModelConfig of a teacher that runs along.
    """
    c, P, tokens = config, count_parameters(config)['total'], rows * block_size
    everything, block_input = saved_bytes_per_token(c, low, on_cuda)
    layers = c.n_layer * c.layer_repeat
    device = torch.device('cuda' if on_cuda else 'cpu')
    kept = everything * layers if activation_checkpointing == 'none' else block_input * layers + everything
    one_block = (P - c.vocab_size * c.n_embd) // c.n_layer
    # in one process autocast keeps a low-precision copy of every weight, else FSDP gathers two blocks at a time and the root's tables
    copies = P * low if shards == 1 and low == 2 else (c.vocab_size * c.n_embd * (1 if c.tie_embeddings else 2) + 2 * one_block) * low if shards > 1 else 0
    n_logits = (kd_chunk_rows if teacher else chunk_rows)(tokens, c.vocab_size, device, torch.bfloat16 if low == 2 else torch.float32)
    terms = {
        'parameters (fp32)': 4 * P // shards,
        'gradients (fp32)': 4 * P // shards,
        'optimizer': (8 if optimizer == 'adamw' else 4) * P // shards + (4 * c.vocab_size * c.n_embd // shards if optimizer == 'muon' else 0),
        'weights in use': copies,
        'activations': tokens * (kept + 3 * c.ffn_dim * low),               # and what the backward of one block makes
        'loss': n_logits * c.vocab_size * low * (2 if teacher else 1) + 4 * c.vocab_size * c.n_embd + 2 * tokens * c.n_embd * low,
    }
    if teacher is not None:
        T = count_parameters(teacher)['total']
        terms['teacher'] = T * low // shards + tokens * low * (6 * teacher.n_embd + 3 * teacher.ffn_dim) + (
            (teacher.vocab_size * teacher.n_embd * (1 if teacher.tie_embeddings else 2) + 2 * T // teacher.n_layer) * low if shards > 1 else 0)
    return terms


def print_plan(config, knobs, world_size, dtype, device, n_steps, teacher=None):
    """What `--dry_run` prints. knobs: train.py's config; n_steps None: known only when the data is there (epochs).

    A plan is for GPUs, in bfloat16 unless told otherwise, on a machine that has none as well; with device='cpu' for this machine.
    """
    on_cuda = knobs['device'] != 'cpu'
    dtype = dtype if knobs['dtype'] != 'auto' or not on_cuda else torch.bfloat16
    low = dtype.itemsize
    terms = memory_plan(config, knobs['batch_size'], knobs['block_size'], world_size, low, knobs['activation_checkpointing'], knobs['optimizer'],
                        on_cuda, teacher)
    counts = count_parameters(config)
    flops = flops_per_token(config, knobs['block_size'], causal=True) + (flops_per_token(teacher, knobs['block_size'], causal=True) / 3 if teacher else 0)
    if knobs['activation_checkpointing'] == 'full':
        flops *= 4 / 3
    print(f"dry run: {counts['total'] / 1e6:,.1f}M parameters ({counts['non_embedding'] / 1e6:,.1f}M without embeddings), {world_size} process(es), "
          f"{knobs['batch_size']} rows of {knobs['block_size']:,} tokens each in {dtype}, activation_checkpointing={knobs['activation_checkpointing']}, on "
          + ('GPUs' if on_cuda else 'the CPU'))
    for term, n_bytes in terms.items():
        print(f'  {term:<24}{n_bytes / 2**30:>10.2f} GiB')
    total = sum(terms.values()) / 2**30
    have = (torch.cuda.get_device_properties(device).total_memory if device.type == 'cuda' else
            GPU_GIB * 2**30 if on_cuda else os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')) / 2**30
    spare = 0.95 * have - total
    print(f'  {"sum":<24}{total:>10.2f} GiB: ' + (f'fits into {have:.0f} GiB with {spare:.1f} to spare' if spare >= 0 else
          f'does not fit into {have:.0f} GiB, by {-spare:.1f} GiB: lower batch_size, '
          + ('set activation_checkpointing=full, ' if knobs['activation_checkpointing'] == 'none' else '') + 'or take more ranks'))
    tokens = knobs['total_batch_tokens']
    seconds = tokens * flops / (0.4 * H100)
    print(f"a step of {tokens:,} tokens: {tokens * flops / 1e15:,.2f} PFLOP" + (' with the teacher' if teacher else '')
          + (' and the second forward' if knobs['activation_checkpointing'] == 'full' else '') + f', {seconds:,.1f} GPU-seconds on H100 at 40 % of their peak')
    if n_steps is None:
        print('steps: as many as `epochs` of the sources take, which a run with the data prints')
    else:
        print(f'{n_steps:,} steps: {n_steps * tokens / 1e9:,.2f}B tokens, {math.ceil(n_steps * seconds / 3600):,} GPU-hours')
