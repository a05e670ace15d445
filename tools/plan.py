"""What a run will cost, on paper: memory of a rank term by term, work, traffic, time, money (`train.py --dry_run=True`), and whether compiling pays.

    python train.py config/model/mobilellm_7b.py config/stage1.py --dry_run=True --plan_on=64xH100 --tp=4
    python tools/plan.py                                                    # every model on the machines of HARDWARE, in one table

Nothing is allocated and no data is needed. `python tools/bench_parts.py --parts="['memory']"` holds the memory against measured peaks.
"""
import math
import os
import shutil
import sys
from dataclasses import dataclass

import torch

if __name__ == '__main__':
    import _path  # noqa: F401

from configurator import BadInput, did_you_mean
from kd import kd_chunk_rows
from lib.device import device_name, peak_flops
from model import ModelConfig, count_parameters, flops_per_token
from ops.loss import chunk_rows
from ops.ranks import resolve_sizes, size_faults

GIB = 2**30
SPARE = 0.92            # of a GPU's memory that a plan may fill: the rest goes to the CUDA context, NCCL and pieces the allocator cannot use


@dataclass
class Machine:
    """count devices: dense bf16 FLOP/s, bytes of memory, bytes per second to a device of the same node and of another."""
    name: str
    count: int
    flops: float
    memory: float
    near: float
    far: float
    node: int = 8


# makers' data sheets: NVLink one way, and a 200 or 400 Gbit/s network card for every GPU
KINDS = {'A100-40GB': (312e12, 40, 300e9, 25e9), 'A100-80GB': (312e12, 80, 300e9, 25e9), 'H100': (989e12, 80, 450e9, 50e9),
         'H200': (989e12, 141, 450e9, 50e9), 'B200': (2250e12, 180, 900e9, 50e9)}


def machine(named, world_size, device):
    """The Machine of plan_on ('64xH100'), or world_size of what there is here: GPUs, with device 'cpu' this computer, without GPUs H100s are assumed."""
    if named is not None:
        count, _, kind = named.partition('x')
        if not count.isdigit() or int(count) < 1 or kind not in KINDS:
            raise BadInput(f"plan_on = '{named}' must be a number and a GPU, like 8xH100.{did_you_mean(kind, KINDS)} Known: {', '.join(KINDS)}.")
        flops, gib, near, far = KINDS[kind]
        return Machine(kind, int(count), flops, gib * GIB, near, far)
    if device == 'cpu':
        return Machine('CPU', world_size, 1e11, os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / world_size, 1e9, 1e9)
    if not torch.cuda.is_available():
        return machine(f'{world_size}xH100', world_size, device)
    here = torch.device('cuda')
    name, memory = device_name(here), torch.cuda.get_device_properties(here).total_memory
    near, far = next(((near, far) for kind, (_, _, near, far) in KINDS.items() if kind.split('-')[0] in name), (25e9, 12e9))
    return Machine(name, world_size, peak_flops(here) or 1e14, memory, near, far)


def choose_compile(asked, total_flops, peak, world_size, device):
    """(whether to compile blocks, why). Compiling costs 17 CPU-seconds for 6 blocks (4 cached); on CPUs it gained 0 to 16 %, in fp32 2 % (docs/BENCHMARKS.md).

    asked: the knob, None: decide; total_flops of the run; peak: FLOP/s of a device, None on a CPU.
    """
    if asked is not None:
        return asked, 'as asked'
    minutes = total_flops / (0.3 * peak * world_size if peak else 1e11) / 60       # at a speed that it may reach without
    compiler = device.type == 'cuda' or shutil.which(os.environ.get('CXX', 'g++')) is not None
    return minutes > 20 and compiler, f'about {minutes:,.0f} minutes of work' + ('' if compiler else ', no C++ compiler')


# -- memory ------------------------------------------------------------------------------------------------------------

def rank_parameters(config, sizes):
    """Parameters of a rank's part before FSDP spreads it: dict(block, root, experts, dense, routed): one block without its routed experts, the tables and
    what else is outside of blocks, the routed experts of one block; all but routed experts, and these of all blocks."""
    c, counts = config, count_parameters(config)
    block, root = (counts['non_embedding'] - counts['routed'] - c.n_embd) / c.n_layer / sizes['tp'], counts['embedding'] / sizes['tp'] + c.n_embd
    routed = counts['routed'] / (sizes['ep'] * sizes['tp'])
    return dict(block=block, root=root, experts=routed / max(1, moe_layers(c)), dense=block * c.n_layer + root, routed=routed)


def moe_layers(config):
    return config.n_layer - config.n_dense_layer if config.n_expert else 0


def too_large_whole(config, sizes):
    """Whether whole weights in bf16 and whole gradients in fp32, of a rank's part, take more than 8 GiB: then they are kept in shards."""
    part = rank_parameters(config, sizes)
    return 6 * (part['dense'] + part['routed']) > 8 * GIB


def how_it_runs(config, knobs, sizes):
    """(tokens of a rank's micro-step, micro-steps, whether weights and gradients are sharded again between them)."""
    tokens = knobs['batch_size'] * knobs['block_size']
    grad_accum = max(1, knobs['total_batch_tokens'] // (tokens * (math.prod(sizes.values()) // sizes['tp'])))
    return tokens, grad_accum, too_large_whole(config, sizes) if knobs['reshard_after_forward'] is None else knobs['reshard_after_forward']


def saved_bytes_per_token(config, low, fused, tp=1, has_experts=False):
    """Bytes that the backward of one block keeps of a token: dict(none, selective, full) by activation_checkpointing.

    low: bytes of an element in products (2 under bf16, 4 in fp32); fused: a layer keeps its inputs only (on CUDA, by kernels or by the compiler), else
    RMSNorm keeps input and result in fp32 as well, and SwiGLU its silu. tp: ranks that share the tokens between products, and the widths
    within. Without the low-precision copies of weights.
    """
    c = config
    C, heads, kv_heads = c.n_embd, c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    inner = 3 if fused else 4                                           # gate, up, (silu,) product
    attention = 2 * heads + 2 * kv_heads                                # q and what it becomes, k and v
    norms, small = 2 * C, c.n_head + 2
    if c.qk_norm:
        norms, small = norms + heads + kv_heads, small + c.n_head + c.n_kv_head
    norm_bytes = norms * low if fused else (2 * norms - (c.qk_norm and heads + kv_heads)) * 4
    if has_experts:
        k, shared = c.n_expert_active, c.n_shared_expert * c.expert_ffn_dim
        ffn = C * (c.n_shared_expert > 0) + (shared * inner + k * (c.expert_ffn_dim * inner + 3 * C) + C) / tp     # rows sent out, and twice what returns
        small += 4 * c.n_expert + 4 * k                                 # scores before and after, shares
    else:
        ffn = C + c.ffn_dim * inner / tp
    everything = (C + attention / tp + ffn) * low + (norm_bytes + 4 * small) / tp
    selective = (C + (C + 2 * heads + 2 * kv_heads) / tp) * low + 4 * c.n_head / tp    # input; q, k, v before they are turned, attention's and wo's results
    return dict(none=everything, selective=selective, full=low * C / tp)


def memory_plan(config, knobs, sizes, low, on_cuda, teacher=None):
    """Bytes that a rank holds at its fullest, term -> bytes, and in words when that is.

    knobs: train.py's; sizes: ranks.resolve_sizes; low: bytes of an element in products; teacher: ModelConfig of a teacher that runs along.
    """
    c, tp, world, n_moe = config, sizes['tp'], math.prod(sizes.values()), moe_layers(config)
    tokens, grad_accum, reshards = how_it_runs(c, knobs, sizes)
    shards, part = sizes['dp_shard'] * sizes['ep'], rank_parameters(c, sizes)
    P, whole = part['dense'] / shards + part['routed'] / sizes['dp_shard'], part['dense'] + part['routed']
    table = c.vocab_size * c.n_embd / tp
    ck, L = knobs['activation_checkpointing'], c.layer_repeat
    block = {kind: saved_bytes_per_token(c, low, on_cuda, tp, kind) for kind in (False, True)}
    kept = tokens * L * ((c.n_layer - n_moe) * block[False][ck] + n_moe * block[True][ck])
    largest = max((block[kind] for kind in ([True] if n_moe else []) + ([False] if n_moe < c.n_layer else [])), key=lambda b: b['none'])
    inner = max(c.ffn_dim, c.n_expert_active * c.expert_ffn_dim if n_moe else 0) / tp
    # of one process autocast keeps a low-precision copy of every weight; FSDP has the tables whole, and two blocks or all of them
    if world == 1:
        in_use = whole * low if low == 2 else 0
    else:
        in_use = low * (whole if not reshards else part['root'] + 2 * (part['block'] + part['experts']))
    reducing = (4 + low) * (part['block'] + part['experts']) if world > 1 else 0                  # a block's gradients, and the same on their way
    device, dtype = torch.device('cuda' if on_cuda else 'cpu'), torch.bfloat16 if low == 2 else torch.float32
    rows = (kd_chunk_rows if teacher else chunk_rows)(tokens, c.vocab_size // tp, device, dtype)
    if teacher and tp > 1:                                               # tokens are split then, not the vocabulary
        rows = kd_chunk_rows(tokens // tp, c.vocab_size, device, dtype)
    accumulated = 0 if grad_accum == 1 else 4 * (P if reshards or world == 1 else whole)
    hidden = tokens * c.n_embd * (2 * low + low / tp + 4 / tp)           # final states before and after their norm, whole, and their gradient
    head = 4 * table + rows * c.vocab_size / (1 if teacher else tp) * low * (2 if teacher else 1) + hidden
    backward = tokens * (largest['none'] - largest[ck] + (2 * inner + c.n_embd) * low)        # what runs again, and gradients between its operators
    twice = 1 + c.tie_embeddings                                         # a tied table's two gradients
    moments = {                                                          # gradients, activations, what else is there
        'in the loss': (accumulated, kept, head),
        'in the backward of the last block': (accumulated, kept, 4 * table + hidden + backward + reducing),
        'at the end of the backward': (max(accumulated, 4 * P - (4 * part['root'] / shards if world > 1 else 4 * table)), tokens * L * largest[ck], 4 * table * twice),
    }
    when = max(moments, key=lambda m: sum(moments[m]))
    gradients, activations, rest = moments[when]
    terms = {
        'parameters (fp32)': 4 * P,
        'optimizer': (8 if knobs['optimizer'] == 'adamw' else 4) * P + (4 * part['root'] / shards if knobs['optimizer'] == 'muon' else 0),
        'gradients (fp32)': gradients,
        'weights in use': in_use,
        'activations': activations,
        'loss' if when == 'in the loss' else 'backward': rest,
    }
    if teacher is not None:
        t = rank_parameters(teacher, sizes)
        T = t['dense'] / shards
        terms['teacher'] = T * low + tokens * low * (6 * teacher.n_embd + 3 * teacher.ffn_dim) / tp + (
            (t['root'] + 2 * t['block']) * low if world > 1 else 0) + (teacher.vocab_size * teacher.n_embd * low if tp > 1 else 0)
    return terms, when


# -- traffic and time --------------------------------------------------------------------------------------------------

def traffic(config, knobs, sizes, low):
    """Bytes that a rank sends in a step: dict(fsdp, replicas, tp, experts), without a teacher and checkpoints. From the sizes of what is exchanged:
    (n - 1) / n of it for a gather or a reduce-scatter among n ranks, twice that for an all-reduce."""
    c, tp, n_moe, part = config, sizes['tp'], moe_layers(config), rank_parameters(config, sizes)
    tokens, grad_accum, reshards = how_it_runs(c, knobs, sizes)
    gathers, reduces = (2 * grad_accum, grad_accum) if reshards else (1, 1)

    def among(n, whole):
        return (n - 1) / n * whole * (gathers * low + reduces * 4)
    shards, R = sizes['dp_shard'] * sizes['ep'], sizes['dp_replicate']
    fsdp = among(shards, part['dense']) + among(sizes['dp_shard'], part['routed'])
    replicas = 2 * (R - 1) / R * 4 * (part['dense'] / shards + part['routed'] / sizes['dp_shard'])
    again = knobs['activation_checkpointing'] != 'none'                 # what runs again exchanges again, but for a block's last scatter
    per_layer = 4 * c.n_layer - (2 * n_moe if not c.n_shared_expert else 0)                     # gather and scatter of attention and of feed-forward
    in_tp = (tp - 1) / tp * tokens * c.n_embd * low * (per_layer * c.layer_repeat * (2.75 if again else 2) + 4) * grad_accum
    n = sizes['ep'] * tp
    in_experts = (n - 1) / n * tokens / tp * c.n_expert_active * c.n_embd * low * 2 * n_moe * (3 if again else 2) * grad_accum
    return dict(fsdp=fsdp, replicas=replicas, tp=in_tp, experts=in_experts)


def step_time(config, knobs, sizes, low, on, teacher=None):
    """Seconds of a step: dict(compute, overlapped, waiting, total). Gathers and reductions of FSDP run beside the products; tensor parallelism and experts
    have to be waited for."""
    flops = flops_per_token(config, knobs['block_size'], causal=True) * {'none': 1, 'selective': 1 + recomputed(config) / 3, 'full': 4 / 3}[
        knobs['activation_checkpointing']] + (flops_per_token(teacher, knobs['block_size'], causal=True) / 3 if teacher else 0)
    compute = knobs['total_batch_tokens'] * flops / (knobs['plan_mfu'] * on.flops * on.count)
    sent = traffic(config, knobs, sizes, low)
    far = knobs['plan_link'] * 1e9 if knobs['plan_link'] else on.far
    n = sizes['ep'] * sizes['tp']
    overlapped = sent['fsdp'] / (on.near if n * sizes['dp_shard'] <= on.node else far) + sent['replicas'] / (on.near if on.count <= on.node else far)
    waiting = sent['tp'] / (on.near if sizes['tp'] <= on.node else far) + sent['experts'] / (on.near if n <= on.node else far)
    return dict(flops=flops, compute=compute, overlapped=overlapped, waiting=waiting, total=max(compute, overlapped) + waiting)


def recomputed(config):
    """Share of a block's forward that selective checkpointing does again: gate and up of the feed-forward network, of experts down as well."""
    c = config
    wide = c.n_expert_active * c.expert_ffn_dim + c.n_shared_expert * c.expert_ffn_dim if c.n_expert else c.ffn_dim
    products = c.n_embd * c.head_dim * (2 * c.n_head + 2 * c.n_kv_head)
    return (3 if c.n_expert else 2) * wide * c.n_embd / (products + 3 * wide * c.n_embd)


# -- what is printed ---------------------------------------------------------------------------------------------------

def plan(config, knobs, on, dtype=torch.bfloat16, teacher=None):
    """Everything about one run: dict(sizes, terms, when, total, limit, fits, sent, time). BadInput for sizes that do not make on.count ranks."""
    sizes = resolve_sizes(on.count, *(knobs[name] for name in ('dp_replicate', 'dp_shard', 'tp', 'ep')))
    on_cuda = on.name != 'CPU'
    terms, when = memory_plan(config, knobs, sizes, dtype.itemsize, on_cuda, teacher)
    total, limit = sum(terms.values()), SPARE * on.memory
    return dict(sizes=sizes, terms=terms, when=when, total=total, limit=limit, fits=total <= limit, sent=traffic(config, knobs, sizes, dtype.itemsize),
                time=step_time(config, knobs, sizes, dtype.itemsize, on, teacher))


def fastest(config, knobs, on, dtype=torch.bfloat16, teacher=None):
    """The knobs with the shortest step that fits (sizes, recomputing, rows of a micro-step): (changes, its plan), or (None, None)."""
    best, found = None, None
    powers = [2**i for i in range(11)]
    for tp in powers[:4] if knobs['optimizer'] != 'muon' else [1]:
        for ep in powers if config.n_expert else [1]:
            if on.count % (tp * ep) or size_faults(dict(dp_replicate=1, dp_shard=1, ep=ep, tp=tp), config):
                continue
            for rows in powers[6::-1]:
                micro = rows * knobs['block_size'] * on.count // tp
                if knobs['total_batch_tokens'] % micro:
                    continue
                for ck in ('none', 'selective', 'full'):
                    changes = dict(batch_size=rows, activation_checkpointing=ck, tp=tp, ep=ep, dp_replicate=1, dp_shard=-1)
                    p = plan(config, {**knobs, **changes}, on, dtype, teacher)
                    if p['fits'] and (best is None or p['time']['total'] < 0.99 * found['time']['total']):
                        best, found = changes, p
    return best, found


def as_options(knobs, changes):
    return ' '.join(f'--{name}={value}' for name, value in changes.items() if knobs[name] != value) or 'these knobs'


def remedy(config, knobs, on, dtype, teacher):
    """What to change for a plan that does not fit, in words: the fastest that does, on these GPUs or on more."""
    count = on.count
    while count <= 2**16:
        more = Machine(on.name, count, on.flops, on.memory, on.near, on.far)
        changes, _ = fastest(config, knobs, more, dtype, teacher)
        if changes:
            return ('It fits with ' if count == on.count else f'It takes {count} of them, with ') + as_options(knobs, changes)
        count *= 2
    return 'No number of them is enough: lower block_size'


def print_plan(config, knobs, on, dtype, n_steps, teacher=None):
    """What `--dry_run` prints. knobs: train.py's config; n_steps None: known only when the data is there (epochs)."""
    p, counts = plan(config, knobs, on, dtype, teacher), count_parameters(config)
    sizes, t = p['sizes'], p['time']
    print(f"dry run: {counts['total'] / 1e6:,.1f}M parameters ({counts['non_embedding'] / 1e6:,.1f}M without embeddings"
          + (f", {counts['active'] / 1e6:,.1f}M for a token" if config.n_expert else '') + f'), {on.count} x {on.name}: '
          + ' x '.join(f'{name} {n}' for name, n in sizes.items()))
    print(f"  {knobs['batch_size']} rows of {knobs['block_size']:,} tokens each in {dtype}, activation_checkpointing={knobs['activation_checkpointing']}; "
          f"fullest {p['when']}")
    for term, n_bytes in p['terms'].items():
        print(f'  {term:<24}{n_bytes / GIB:>10.2f} GiB')
    gap = (p['limit'] - p['total']) / GIB
    print(f"  {'sum':<24}{p['total'] / GIB:>10.2f} GiB: " + (
        f'fits into {on.memory / GIB:.0f} GiB, {gap:.1f} below the {SPARE:.0%} that may be filled' if p['fits'] else
        f"does not fit into {on.memory / GIB:.0f} GiB, by {-gap:.1f} GiB. {remedy(config, knobs, on, dtype, teacher)}."))
    tokens, plain = knobs['total_batch_tokens'], flops_per_token(config, knobs['block_size'], causal=True)
    print(f"a step of {tokens:,} tokens: {plain / 1e9:,.2f} GFLOP per token" + (f", {t['flops'] / 1e9:,.2f} with " + ' and '.join(
        ['the teacher'] * bool(teacher) + ['what runs again'] * (knobs['activation_checkpointing'] != 'none')) if t['flops'] != plain else '')
        + f", {tokens * t['flops'] / 1e15:,.2f} PFLOP in all")
    if on.count > 1:
        print('  a rank sends ' + ', '.join(f'{n / 1e9:,.2f} GB for {name}' for name, n in p['sent'].items() if n))
    print(f"  {t['total']:,.2f} s: {t['compute']:,.2f} s of work at an MFU of {knobs['plan_mfu']:.0%}"
          + (f", {t['overlapped']:,.2f} s of traffic beside it, {t['waiting']:,.2f} s that is waited for" if on.count > 1 else '')
          + f" ({tokens / t['total'] / on.count:,.0f} tokens/s per GPU)")
    if n_steps is None:
        print('steps: as many as `epochs` of the sources take, which a run with the data prints')
    else:
        hours = n_steps * t['total'] / 3600
        print(f"{n_steps:,} steps: {n_steps * tokens / 1e9:,.2f}B tokens, {hours / 24:,.1f} days, {hours * on.count:,.0f} GPU-hours, "
              f"${hours * on.count * knobs['plan_price']:,.0f} at ${knobs['plan_price']:g} an hour")
    if knobs['block_size'] >= 32768 and counts['total'] > 6e9:
        print('context parallelism is not built (torch\'s own does not run on the CPUs that this is tested on): long rows are split by tp alone')


# -- the table of models and machines ----------------------------------------------------------------------------------

# model, fewest GPUs and a comfortable number
HARDWARE = [('mobilellm_140m', '1xA100-40GB', '8xA100-80GB'), ('mobilellm_360m', '1xA100-40GB', '8xA100-80GB'), ('mobilellm_950m', '1xA100-80GB', '16xA100-80GB'),
            ('mobilellm_7b', '8xA100-80GB', '64xH100'), ('mobilellm_70b', '32xH100', '128xH100'), ('mobilellm_671b', '256xH100', '512xH100')]


def print_table(knobs, tokens):
    """HARDWARE, a row each: what a GPU would hold with these knobs as they are; the fastest knobs that fit; and what `tokens` tokens take then."""
    print(f"{knobs['batch_size']} rows of {knobs['block_size']:,} tokens a micro-step as they are, steps of {knobs['total_batch_tokens']:,} tokens, MFU "
          f"{knobs['plan_mfu']:.0%}, {tokens / 1e12:g}T tokens")
    print(f"{'model':<16}{'machine':<14}{'GiB as is':>10}   {'batch':>5}{'tp':>3}{'ep':>4} {'recompute':<10}{'GiB':>6}{'s a step':>10}{'tokens/s':>11}{'days':>7}{'GPU-hours':>12}")
    for name, *machines in HARDWARE:
        scope = {}
        with open(os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'config', 'model', f'{name}.py'), encoding='utf-8') as f:
            exec(compile(f.read(), name, 'exec'), scope)
        config = ModelConfig(**{k: v for k, v in scope.items() if k in ModelConfig.__dataclass_fields__})
        for named in machines:
            on = machine(named, 1, 'cuda')
            asked = plan(config, knobs, on)
            row = f"{name:<16}{named:<14}{asked['total'] / GIB:>10.1f}{'  ' if asked['fits'] else ' !'} "
            changes, p = fastest(config, knobs, on)
            if changes is None:
                print(row + f'does not fit in any way. {remedy(config, knobs, on, torch.bfloat16, None)}.')
                continue
            days = tokens / knobs['total_batch_tokens'] * p['time']['total'] / 86400
            print(row + f"{changes['batch_size']:>5}{changes['tp']:>3}{changes['ep']:>4} {changes['activation_checkpointing']:<10}{p['total'] / GIB:>6.1f}"
                  f"{p['time']['total']:>10.2f}{knobs['total_batch_tokens'] / p['time']['total']:>11,.0f}{days:>7,.0f}{24 * days * on.count:>12,.0f}")
    print('!: does not fit as it is')


if __name__ == '__main__':
    if sys.argv[1:]:
        raise BadInput('tools/plan.py takes no arguments: it prints its table of models and machines. For one run: train.py ... --dry_run=True')
    print_table(dict(batch_size=16, block_size=2048, total_batch_tokens=4_194_304, optimizer='adamw', activation_checkpointing='none', teacher=None,
                     reshard_after_forward=None, dp_replicate=1, dp_shard=-1, tp=1, ep=1, plan_mfu=0.4, plan_link=None), 2_000_000_000_000)
