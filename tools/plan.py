"""Estimates what a run will cost: memory of a rank by term, work, traffic, time and money.

    python train.py config/model/mobilellm_7b.py config/stage1.py --dry_run=True --plan_on=64xH100
    python tools/plan.py        # all models on the machines of HARDWARE, in one table

Nothing is allocated, and no data is needed. `tools/bench.py memory` compares it with measured
peaks.

`knobs` is train.py's config (dict) and `sizes` the result of ranks.resolve_sizes throughout. `low`
is the size of an element in matrix products: 2 bytes in bf16, 4 in fp32.
"""

import math
import os
import runpy
import sys
from dataclasses import dataclass, fields, replace

if __name__ == '__main__':
    import _path  # noqa: F401  (puts the project's folder on the import path)

import torch

from configurator import BadInput, did_you_mean
from kd import kd_chunk_rows
from lib.device import GIB, GPUS, Gpu, device_name, find_gpu
from lib.parallel import n_moe_layers, rank_parameters, too_large_replicated
from model import ModelConfig, count_parameters, flops_per_token
from ops.loss import chunk_rows
from ops.ranks import SIZES, resolve_sizes, size_faults

NODE = 8            # GPUs of a node
# The share of a GPU's memory that a plan may fill. The CUDA context, NCCL and fragments that the
# allocator cannot use need the rest.
SPARE = 0.92
# cuBLAS keeps a workspace for each thread that calls it, and the backward pass has its own thread.
# On Hopper each has 32 MiB. Older GPUs take 8, which is not worth a distinction.
WORKSPACES = 2 * 32 * 2**20


@dataclass
class Machine:
    name: str
    count: int      # devices
    gpu: Gpu


def machine(named, world_size, device):
    """The Machine that plan_on names ('64xH100'), or world_size devices of this one.

    device 'cpu' plans for this computer's CPU, and any other for H100s if there is no GPU.
    Raises BadInput for an unknown name.
    """
    if named is not None:
        count, _, kind = named.partition('x')
        known = [kind for kind, gpu in GPUS.items() if gpu.memory is not None]
        if not count.isdigit() or int(count) < 1 or kind not in known:
            raise BadInput(
                f"plan_on = '{named}' must be a number and a GPU, like 8xH100."
                f'{did_you_mean(kind, known)} Known: {", ".join(known)}.'
            )
        return Machine(kind, int(count), GPUS[kind])
    if device == 'cpu':
        memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / world_size
        return Machine('CPU', world_size, Gpu(1e11, memory, 1e9, 1e9))
    if not torch.cuda.is_available():
        return Machine('H100', world_size, GPUS['H100'])
    here = torch.device('cuda')
    memory = torch.cuda.get_device_properties(here).total_memory
    gpu = replace(find_gpu(here) or Gpu(1e14), memory=memory)
    return Machine(device_name(here), world_size, gpu)


# -- memory ----------------------------------------------------------------------------------------


def how_it_runs(config, knobs, sizes):
    """Returns (tokens of a rank's micro-step, micro-steps, reshard_after_forward)."""
    tokens = knobs['batch_size'] * knobs['block_size']
    n_data = math.prod(sizes.values()) // sizes['tp']
    grad_accum = max(1, knobs['total_batch_tokens'] // (tokens * n_data))
    reshards = knobs['reshard_after_forward']
    if reshards is None:
        reshards = too_large_replicated(config, sizes)
    return tokens, grad_accum, reshards


def saved_bytes_per_token(config, low, fused, tp=1, has_experts=False):
    """Bytes per token that one block saves for its backward, without low-precision weights.

    fused: a layer saves only its inputs (on CUDA: by the Triton kernels in eager mode, which save
    the same as compiled blocks). Otherwise RMSNorm also saves its input and result in fp32, and
    SwiGLU its silu.
    tp: ranks that split the tokens between products, and the widths within.
    Returns a dict by activation_checkpointing: none, selective, full.
    """
    c = config
    C = c.n_embd
    q = c.n_head * c.head_dim
    kv = c.n_kv_head * c.head_dim
    attention = 2 * q + 2 * kv              # q, k and v, and attention's result
    qk_norm = q + kv if c.qk_norm else 0
    # fp32 numbers: log-sum-exp of every head, and one number of every norm.
    small = c.n_head + 2
    if c.qk_norm:
        small += c.n_head + c.n_kv_head
    norm_bytes = (2 * C + qk_norm) * low if fused else (4 * C + qk_norm) * 4
    # Gate, up and their product, and silu if it is not fused.
    inner = 3 if fused else 4
    if has_experts:
        k = c.n_expert_active
        shared = c.n_shared_expert * c.expert_ffn_dim
        # A row is saved when it is sent out, and twice when its result returns.
        routed = k * (c.expert_ffn_dim * inner + 3 * C)
        ffn = C * (c.n_shared_expert > 0) + (shared * inner + routed + C) / tp
        # Scores before and after the router, and shares.
        small += 4 * c.n_expert + 4 * k
    else:
        ffn = C + c.ffn_dim * inner / tp
    # Selective: input, q, k and v before the rotation, results of attention and of wo.
    selective = (C + (C + attention) / tp) * low + 4 * c.n_head / tp
    everything = (C + attention / tp + ffn) * low + (norm_bytes + 4 * small) / tp
    return dict(none=everything, selective=selective, full=low * C / tp)


def logits_bytes(config, tokens, tp, low, on_cuda, distils):
    """Bytes of a chunk of logits in the loss, of student and teacher if the run distils."""
    device = torch.device('cuda' if on_cuda else 'cpu')
    dtype = torch.bfloat16 if low == 2 else torch.float32
    V = config.vocab_size
    # With distillation, tensor parallelism splits the tokens, not the vocabulary.
    if distils:
        return kd_chunk_rows(tokens // tp, V, device, dtype) * V * low * 2
    return chunk_rows(tokens, V // tp, device, dtype) * V / tp * low


def teacher_bytes(teacher, sizes, tokens, low):
    """Bytes of a teacher's weights, and of its activations, which it keeps for one block only."""
    part = rank_parameters(teacher, sizes)
    widths = 6 * teacher.n_embd + 3 * teacher.ffn_dim
    total = part['dense'] / (sizes['dp_shard'] * sizes['ep']) * low
    total += tokens * low * widths / sizes['tp']
    if math.prod(sizes.values()) > 1:
        total += (part['root'] + 2 * part['block']) * low
    # Tensor parallelism splits the tokens of the loss, which needs the full output table then.
    if sizes['tp'] > 1:
        total += teacher.vocab_size * teacher.n_embd * low
    return total


def memory_plan(config, knobs, sizes, low, on_cuda, teacher=None):
    """Estimates the memory of a rank at its peak: (dict term -> bytes, the moment of the peak).

    on_cuda: whether layers are fused. teacher: ModelConfig of a teacher in the process, or None.
    """
    c = config
    tp = sizes['tp']
    is_single = math.prod(sizes.values()) == 1
    shards = sizes['dp_shard'] * sizes['ep']
    n_moe = n_moe_layers(c)
    tokens, grad_accum, reshards = how_it_runs(c, knobs, sizes)
    part = rank_parameters(c, sizes)
    block_parameters = part['block'] + part['experts']
    full = part['dense'] + part['routed']
    stored = part['dense'] / shards + part['routed'] / sizes['dp_shard']
    table = c.vocab_size * c.n_embd / tp

    # In one process, autocast keeps a low-precision copy of every weight. FSDP gathers the tables
    # and two blocks, or everything.
    if is_single:
        in_use = full * low if low == 2 else 0
    elif reshards:
        in_use = low * (part['root'] + 2 * block_parameters)
    else:
        in_use = low * full

    checkpointing = knobs['activation_checkpointing']
    dense = saved_bytes_per_token(c, low, on_cuda, tp)
    moe = saved_bytes_per_token(c, low, on_cuda, tp, has_experts=True)
    blocks = (c.n_layer - n_moe) * dense[checkpointing] + n_moe * moe[checkpointing]
    kept = tokens * c.layer_repeat * blocks
    largest = max([moe] * (n_moe > 0) + [dense] * (n_moe < c.n_layer), key=lambda b: b['none'])
    last_block = tokens * c.layer_repeat * largest[checkpointing]

    accumulated = 0
    if grad_accum > 1:
        accumulated = 4 * (stored if reshards or is_single else full)
    # Final hidden states before and after their norm, gathered, and their gradient.
    hidden = tokens * c.n_embd * (2 * low + low / tp + 4 / tp)
    in_loss = 4 * table + logits_bytes(c, tokens, tp, low, on_cuda, teacher is not None) + hidden
    if low == 2 and not on_cuda:
        # A chunk's part of the table's gradient, before it is added up in fp32. On CUDA the product
        # itself adds.
        in_loss += low * table
    # What runs again, the gradients between its operators, and FSDP's buffers of a block.
    inner = c.ffn_dim
    if n_moe:
        inner = max(inner, c.n_expert_active * c.expert_ffn_dim)
    again = largest['none'] - largest[checkpointing] + (2 * inner / tp + c.n_embd) * low
    reducing = 0 if is_single else (4 + low) * block_parameters
    in_backward = 4 * table + hidden + tokens * again + reducing
    root_gradient = 4 * table if is_single else 4 * part['root'] / shards
    at_end = max(accumulated, 4 * stored - root_gradient)
    # A tied table has two gradients.
    tied = 1 + c.tie_embeddings
    # Gradients, activations and the rest at the moments that can be the peak.
    moments = {
        'in the loss': (accumulated, kept, in_loss),
        'in the backward of the last block': (accumulated, kept, in_backward),
        'at the end of the backward': (at_end, last_block, 4 * table * tied),
    }
    when = max(moments, key=lambda m: sum(moments[m]))
    gradients, activations, rest = moments[when]

    optimizer = (8 if knobs['optimizer'] == 'adamw' else 4) * stored
    # Muon leaves the tables to AdamW.
    if knobs['optimizer'] == 'muon':
        optimizer += 4 * part['root'] / shards
    terms = {
        'parameters (fp32)': 4 * stored,
        'optimizer': optimizer,
        'gradients (fp32)': gradients,
        'weights in use': in_use,
        'activations': activations,
        'loss' if when == 'in the loss' else 'backward': rest,
    }
    if on_cuda:
        terms['workspaces (cuBLAS)'] = WORKSPACES
    if teacher is not None:
        terms['teacher'] = teacher_bytes(teacher, sizes, tokens, low)
    return terms, when


# -- traffic and time ------------------------------------------------------------------------------


def traffic(config, knobs, sizes, low):
    """Bytes that a rank sends in a step: dict(fsdp, replicas, tp, experts).

    Teachers and checkpoints are not included. A gather or a reduce-scatter among n ranks sends
    (n - 1) / n of what is exchanged, an all-reduce twice that.
    """
    c = config
    tp = sizes['tp']
    n_moe = n_moe_layers(c)
    part = rank_parameters(c, sizes)
    tokens, grad_accum, reshards = how_it_runs(c, knobs, sizes)
    gathers = 2 * grad_accum if reshards else 1
    reduces = grad_accum if reshards else 1

    def among(n, full):
        return (n - 1) / n * full * (gathers * low + reduces * 4)

    shards = sizes['dp_shard'] * sizes['ep']
    n_replicas = sizes['dp_replicate']
    fsdp = among(shards, part['dense']) + among(sizes['dp_shard'], part['routed'])
    stored = part['dense'] / shards + part['routed'] / sizes['dp_shard']
    replicas = 2 * (n_replicas - 1) / n_replicas * 4 * stored
    # A block that runs again exchanges again, except for its last scatter.
    again = knobs['activation_checkpointing'] != 'none'
    # Attention and feed-forward have a gather and a scatter each.
    exchanges = 4 * c.n_layer
    if not c.n_shared_expert:
        exchanges -= 2 * n_moe
    exchanges = exchanges * c.layer_repeat * (2.75 if again else 2) + 4
    in_tp = (tp - 1) / tp * tokens * c.n_embd * low * exchanges * grad_accum
    n = sizes['ep'] * tp
    rows = tokens / tp * c.n_expert_active
    passes = 2 * n_moe * (3 if again else 2) * grad_accum
    in_experts = (n - 1) / n * rows * c.n_embd * low * passes
    return dict(fsdp=fsdp, replicas=replicas, tp=in_tp, experts=in_experts)


def recomputed(config):
    """The share of a block's forward that selective checkpointing repeats."""
    # These are the products gate and up of the feed-forward network, and down in experts.
    c = config
    attention = c.n_embd * c.head_dim * (2 * c.n_head + 2 * c.n_kv_head)
    repeated = 2
    width = c.ffn_dim
    if c.n_expert:
        repeated = 3
        width = (c.n_expert_active + c.n_shared_expert) * c.expert_ffn_dim
    return repeated * width * c.n_embd / (attention + 3 * width * c.n_embd)


def step_time(config, knobs, sizes, low, on, teacher=None):
    """Estimates a step in seconds: dict(flops per token, compute, overlapped, waiting, total)."""
    repeats = dict(none=1, selective=1 + recomputed(config) / 3, full=4 / 3)
    flops = flops_per_token(config, knobs['block_size'], causal=True)
    flops = flops * repeats[knobs['activation_checkpointing']]
    if teacher is not None:
        flops += flops_per_token(teacher, knobs['block_size'], causal=True) / 3
    compute = knobs['total_batch_tokens'] * flops / (knobs['plan_mfu'] * on.gpu.flops * on.count)
    far = knobs['plan_link'] * 1e9 if knobs['plan_link'] else on.gpu.far

    def rate(n_ranks):
        return on.gpu.near if n_ranks <= NODE else far

    sent = traffic(config, knobs, sizes, low)
    # FSDP's communication overlaps with the products. Tensor and expert parallelism wait.
    n = sizes['ep'] * sizes['tp']
    overlapped = sent['fsdp'] / rate(n * sizes['dp_shard']) + sent['replicas'] / rate(on.count)
    waiting = sent['tp'] / rate(sizes['tp']) + sent['experts'] / rate(n)
    seconds = dict(compute=compute, overlapped=overlapped, waiting=waiting)
    return dict(flops=flops, **seconds, total=max(compute, overlapped) + waiting)


# -- a plan ----------------------------------------------------------------------------------------


def plan(config, knobs, on, dtype=torch.bfloat16, teacher=None):
    """Everything about one run: dict(sizes, terms, when, total, limit, fits, sent, time).

    Raises BadInput for sizes that do not make on.count ranks.
    """
    sizes = resolve_sizes(on.count, *(knobs[k] for k in ('dp_replicate', 'dp_shard', 'tp', 'ep')))
    low = dtype.itemsize
    terms, when = memory_plan(config, knobs, sizes, low, on.name != 'CPU', teacher)
    total = sum(terms.values())
    limit = SPARE * on.gpu.memory
    found = dict(sizes=sizes, terms=terms, when=when, total=total, limit=limit)
    found['fits'] = total <= limit
    found['sent'] = traffic(config, knobs, sizes, low)
    found['time'] = step_time(config, knobs, sizes, low, on, teacher)
    return found


def choices(config, knobs, count):
    """Yields the changes of knobs that `fastest` compares on `count` devices."""
    powers = [2**i for i in range(11)]
    for tp in powers[:4] if knobs['optimizer'] != 'muon' else [1]:
        for ep in powers if config.n_expert else [1]:
            sizes = dict(zip(SIZES, (1, 1, ep, tp), strict=True))
            if count % (tp * ep) or size_faults(sizes, config):
                continue
            for rows in powers[6::-1]:
                if knobs['total_batch_tokens'] % (rows * knobs['block_size'] * count // tp):
                    continue
                changes = dict(batch_size=rows, activation_checkpointing='none', tp=tp, ep=ep)
                changes |= dict(dp_replicate=1, dp_shard=-1)
                for checkpointing in ('none', 'selective', 'full'):
                    yield {**changes, 'activation_checkpointing': checkpointing}


def fastest(config, knobs, on, dtype=torch.bfloat16, teacher=None):
    """The knobs with the shortest step that fits: (changes, its plan), or (None, None)."""
    best = None
    found = None
    for changes in choices(config, knobs, on.count):
        p = plan(config, {**knobs, **changes}, on, dtype, teacher)
        # A later choice must be 1 % faster, so that equal ones do not replace each other.
        if p['fits'] and (best is None or p['time']['total'] < 0.99 * found['time']['total']):
            best = changes
            found = p
    return best, found


def remedy(config, knobs, on, dtype, teacher):
    """What to change if a plan does not fit: the fastest that does, on these GPUs or on more."""
    count = on.count
    while count <= 2**16:
        changes, _ = fastest(config, knobs, replace(on, count=count), dtype, teacher)
        if changes:
            options = [f'--{k}={value}' for k, value in changes.items() if knobs[k] != value]
            start = 'It fits with ' if count == on.count else f'It needs {count} of them, with '
            return start + (' '.join(options) or 'these knobs')
        count *= 2
    return 'No number of them is enough: lower block_size'


# -- printing --------------------------------------------------------------------------------------


def print_plan(config, knobs, on, dtype, n_steps, teacher=None):
    """Prints what `--dry_run` reports. n_steps: None if only the data can tell (epochs)."""
    p = plan(config, knobs, on, dtype, teacher)
    counts = {name: n / 1e6 for name, n in count_parameters(config).items()}
    checkpointing = knobs['activation_checkpointing']
    tokens = knobs['total_batch_tokens']
    active = f', {counts["active"]:,.1f}M per token' if config.n_expert else ''
    print(
        f'dry run: {counts["total"]:,.1f}M parameters ({counts["non_embedding"]:,.1f}M without '
        f'embeddings{active}), {on.count} x {on.name}: '
        + ' x '.join(f'{name} {n}' for name, n in p['sizes'].items())
    )
    print(
        f'  {knobs["batch_size"]} rows of {knobs["block_size"]:,} tokens each in {dtype}, '
        f'activation_checkpointing={checkpointing}; peak {p["when"]}'
    )
    for term, n_bytes in p['terms'].items():
        print(f'  {term:<24}{n_bytes / GIB:>10.2f} GiB')
    memory = on.gpu.memory / GIB
    gap = (p['limit'] - p['total']) / GIB
    if p['fits']:
        verdict = f'fits into {memory:.0f} GiB, {gap:.1f} below the {SPARE:.0%} that may be filled'
    else:
        change = remedy(config, knobs, on, dtype, teacher)
        verdict = f'does not fit into {memory:.0f} GiB, by {-gap:.1f} GiB. {change}.'
    print(f'  {"sum":<24}{p["total"] / GIB:>10.2f} GiB: {verdict}')

    t = p['time']
    plain = flops_per_token(config, knobs['block_size'], causal=True)
    extra = ''
    if t['flops'] != plain:
        causes = ['the teacher'] * (teacher is not None)
        causes += ['recomputation'] * (checkpointing != 'none')
        extra = f', {t["flops"] / 1e9:,.2f} with {" and ".join(causes)}'
    total = tokens * t['flops'] / 1e15
    print(
        f'a step of {tokens:,} tokens: {plain / 1e9:,.2f} GFLOP per token{extra}, '
        f'{total:,.2f} PFLOP in total'
    )
    parts = [f'{t["compute"]:,.2f} s of work at an MFU of {knobs["plan_mfu"]:.0%}']
    if on.count > 1:
        sent = [f'{n / 1e9:,.2f} GB for {name}' for name, n in p['sent'].items() if n]
        print(f'  a rank sends {", ".join(sent)}')
        parts.append(f'{t["overlapped"]:,.2f} s of traffic that overlaps')
        parts.append(f'{t["waiting"]:,.2f} s of waiting')
    rate = tokens / t['total'] / on.count
    print(f'  {t["total"]:,.2f} s: {", ".join(parts)} ({rate:,.0f} tokens/s per GPU)')
    if n_steps is None:
        print('steps: a run with the data prints how many `epochs` of the sources take')
    else:
        hours = n_steps * t['total'] / 3600
        price = knobs['plan_price']
        print(
            f'{n_steps:,} steps: {n_steps * tokens / 1e9:,.2f}B tokens, {hours / 24:,.1f} days, '
            f'{hours * on.count:,.0f} GPU-hours, ${hours * on.count * price:,.0f} at ${price:g} an '
            'hour'
        )
    if knobs['block_size'] >= 32768 and counts['total'] > 6000:
        print('context parallelism is not implemented: only tp splits long rows')


# Model, the fewest GPUs, and a comfortable number.
HARDWARE = [
    ('mobilellm_140m', '1xA100-40GB', '8xA100-80GB'),
    ('mobilellm_360m', '1xA100-40GB', '8xA100-80GB'),
    ('mobilellm_950m', '1xA100-80GB', '16xA100-80GB'),
    ('mobilellm_7b', '8xA100-80GB', '64xH100'),
    ('mobilellm_70b', '32xH100', '128xH100'),
    ('mobilellm_671b', '256xH100', '512xH100'),
]


def load_model_config(name):
    """The ModelConfig of config/model/<name>.py."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    scope = runpy.run_path(os.path.join(root, 'config', 'model', f'{name}.py'))
    names = [f.name for f in fields(ModelConfig) if f.name in scope]
    return ModelConfig(**{name: scope[name] for name in names})


def print_table(knobs, tokens):
    """Prints a row for each pair of HARDWARE.

    It contains the memory of a GPU with these knobs, the fastest knobs that fit, and the time that
    they need for `tokens` tokens.
    """
    batch = knobs['total_batch_tokens']
    print(
        f'{knobs["batch_size"]} rows of {knobs["block_size"]:,} tokens a micro-step as they are, '
        f'steps of {batch:,} tokens, MFU {knobs["plan_mfu"]:.0%}, {tokens / 1e12:g}T tokens'
    )
    print(
        f'{"model":<16}{"machine":<14}{"GiB as is":>10}   {"batch":>5}{"tp":>3}{"ep":>4} '
        f'{"recompute":<10}{"GiB":>6}{"s a step":>10}{"tokens/s":>11}{"days":>7}{"GPU-hours":>12}'
    )
    for name, *machines in HARDWARE:
        config = load_model_config(name)
        for named in machines:
            on = machine(named, 1, 'cuda')
            asked = plan(config, knobs, on)
            mark = ' ' if asked['fits'] else '!'
            row = f'{name:<16}{named:<14}{asked["total"] / GIB:>10.1f} {mark} '
            best, p = fastest(config, knobs, on)
            if best is None:
                change = remedy(config, knobs, on, torch.bfloat16, None)
                print(f'{row}does not fit in any way. {change}.')
                continue
            seconds = p['time']['total']
            days = tokens / batch * seconds / 86400
            print(
                f'{row}{best["batch_size"]:>5}{best["tp"]:>3}{best["ep"]:>4} '
                f'{best["activation_checkpointing"]:<10}{p["total"] / GIB:>6.1f}{seconds:>10.2f}'
                f'{batch / seconds:>11,.0f}{days:>7,.0f}{24 * days * on.count:>12,.0f}'
            )
    print('!: does not fit as it is')


if __name__ == '__main__':
    if '--help' in sys.argv or '-h' in sys.argv:
        print(__doc__.strip())
        raise SystemExit(0)
    if sys.argv[1:]:
        raise BadInput(
            f"tools/plan.py takes no arguments, got '{sys.argv[1]}'. For one run: train.py ... "
            '--dry_run=True')
    knobs = dict(batch_size=16, block_size=2048, total_batch_tokens=4_194_304, optimizer='adamw')
    knobs |= dict(activation_checkpointing='none', reshard_after_forward=None)
    knobs |= dict(dp_replicate=1, dp_shard=-1, tp=1, ep=1, plan_mfu=0.4, plan_link=None)
    print_table(knobs, 2_000_000_000_000)
