"""Training speed on one device, part by part, against its floor, and side by side with other codebases.

    python tools/bench.py                                                  # CPU: three shapes; GPU: four models that fit. About 15 minutes
    python tools/bench.py --vs=transformers,nanogpt-shape                  # and peers, in turns with ours: ratios and their spread
    python tools/bench.py --models="['360m']" --tokens=1024 --profile=True # one shape; where the time of a step goes

A step is forward, backward, clipping and AdamW (fused) on random tokens, every side in a process of its own with the same memory settings. CPU
figures are CPU time of one thread, since wall clocks of shared machines lie; GPU figures are wall time. Peers come from their PyPI packages:

    transformers   LlamaForCausalLM (Qwen3ForCausalLM where the shape has QK-norm)       liger   the same with Liger's kernels (GPU)
    litgpt         GPT of LitGPT, its loss in one piece                                   nanogpt-shape   transformers' GPT-2, nanoGPT's network

Columns: MFU in the PaLM count against the device's dense bf16 peak; `ceiling`, a large matrix product in the same run; `floor`, the share of the
step that its matrix products and attention alone take, by the profiler; `start`, CPU-seconds until the first step is done, compiling included (little where it is cached); then milliseconds of a step, and what a micro-batch more costs
when its influence is measured on the last block, when two micro-batches are weighed by PRESENCE, and when it is distilled from a cache of top 64.
docs/BENCHMARKS.md keeps what it printed. tools/bench_parts.py measures single parts.
"""
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from json import dump, dumps, loads

import _path  # noqa: F401

from configurator import BadInput, configure

SHAPES = {          # name -> model, rows x tokens on a CPU; a GPU takes 16 x 2048
    's1': (dict(vocab_size=8192, n_layer=6, n_head=6, n_kv_head=2, n_embd=384, ffn_dim=1024), 8, 512),
    'smollm2_135m': (dict(vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, ffn_dim=1536), 4, 512),
    '140m': (dict(vocab_size=128256, n_layer=15, n_head=9, n_kv_head=3, n_embd=576, ffn_dim=2048, qk_norm=True, qk_norm_weight=False), 2, 512),
    '360m': (dict(vocab_size=128256, n_layer=15, n_head=16, n_kv_head=4, n_embd=1024, ffn_dim=4096, qk_norm=True, qk_norm_weight=False), 1, 512),
    '950m': (dict(vocab_size=128256, n_layer=22, n_head=24, n_kv_head=6, n_embd=1536, ffn_dim=6144, qk_norm=True, qk_norm_weight=False), 1, 256)}
PEERS = ('transformers', 'litgpt', 'liger', 'nanogpt-shape')
PARTS = ('data', 'forward', 'backward', 'optimizer', 'influence', 'presence', 'kd')

# -- knobs --
models: list | None = None       # names of SHAPES; None: s1, smollm2_135m and 140m on a CPU, all but s1 on a GPU
vs = ''                          # peers, with commas
dtypes = ['auto']                # auto (as train.py chooses) | float32 | bfloat16 (autocast over fp32 weights)
compiled = [False, True]         # eager, blocks compiled, or both
rounds = 5                       # turns of every side
steps = 1                        # timed steps of a turn
tokens: int | None = None        # of a row, None: the shape's
rows: int | None = None          # of a step, None: the shape's
kernels = 'auto'                 # as train.py's
profile = False                  # also print where the time of a step goes
json = ''                        # file for all figures
side = ''                        # internal: one side in its own process
config = configure(globals(), verbose=False)


# -- one side, in its own process --------------------------------------------------------------------------------------

def build_ours(shape, compile_it, device):
    from model import GPT, ModelConfig, init_weights
    from ops.kernels import use
    use(kernels, device)
    model = GPT(ModelConfig(**shape)).to(device)
    init_weights(model, 0)
    for block in model.blocks if compile_it else []:
        block.compile()
    return model, lambda inputs, targets: model.loss(inputs, targets)[0] / targets.numel()


def build_peer(who, shape, compile_it, device, length):
    """(model, loss of a batch) of another codebase; the batch's targets are its inputs one on, as ours."""
    import torch
    s, qk_norm = shape, shape.get('qk_norm', False)
    try:
        if who == 'liger':
            from liger_kernel.transformers import (
                apply_liger_kernel_to_llama,
                apply_liger_kernel_to_qwen3,
            )
            (apply_liger_kernel_to_qwen3 if qk_norm else apply_liger_kernel_to_llama)(fused_linear_cross_entropy=True, cross_entropy=False)
        if who == 'litgpt':
            from litgpt import GPT, Config
            from litgpt.utils import chunked_cross_entropy
            model = GPT(Config(n_layer=s['n_layer'], n_head=s['n_head'], n_query_groups=s['n_kv_head'], n_embd=s['n_embd'], block_size=length,
                               intermediate_size=s['ffn_dim'], padded_vocab_size=s['vocab_size'], vocab_size=s['vocab_size'], norm_class_name='RMSNorm',
                               mlp_class_name='LLaMAMLP', bias=False, parallel_residual=False, rotary_percentage=1.0, norm_qk=qk_norm)).to(device)
            model.lm_head.weight = model.transformer.wte.weight
            run = torch.compile(model) if compile_it else model
            return model, lambda inputs, targets: chunked_cross_entropy(run(inputs), targets, chunk_size=0)
        from transformers import (
            GPT2Config,
            GPT2LMHeadModel,
            LlamaConfig,
            LlamaForCausalLM,
            Qwen3Config,
            Qwen3ForCausalLM,
        )
    except ImportError as e:
        raise BadInput(f'vs = {who} needs its package here ({e}). pip install {dict(liger="liger-kernel").get(who, who.split("-")[0])}.')
    if who == 'nanogpt-shape':
        model = GPT2LMHeadModel(GPT2Config(vocab_size=s['vocab_size'], n_positions=length, n_embd=s['n_embd'], n_layer=s['n_layer'], n_head=s['n_head'],
                                           resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False, attn_implementation='sdpa'))
    else:
        settings = dict(vocab_size=s['vocab_size'], hidden_size=s['n_embd'], intermediate_size=s['ffn_dim'], num_hidden_layers=s['n_layer'],
                        num_attention_heads=s['n_head'], num_key_value_heads=s['n_kv_head'], tie_word_embeddings=True, use_cache=False,
                        attn_implementation='sdpa', head_dim=s['n_embd'] // s['n_head'])
        model = Qwen3ForCausalLM(Qwen3Config(**settings)) if qk_norm else LlamaForCausalLM(LlamaConfig(**settings))
    model.to(device).train()
    run = torch.compile(model) if compile_it else model
    return model, lambda inputs, targets: run(input_ids=inputs, shift_labels=targets, labels=targets).loss


def extra_parts(model, batch, autocast):
    """Seconds of a measurement of influence (a batch, last block), and of what PRESENCE adds to two micro-batches and a cached teacher to one."""
    import torch

    from influence import Direction, select, source_products
    from kd import distillation_loss
    from methods.presence import MicroBatches
    from tools.bench_common import clock, random_cache
    inputs, targets = batch
    direction = Direction({name: torch.ones_like(p) for name, p in select(model, 'last')[0].items()}, {}, {}, {}, 'last')
    cached = random_cache(targets.numel(), model.config.vocab_size, device=targets.device)

    def distil(h, weight, targets, token_weights):
        total, found = distillation_loss(h, weight, targets, token_weights, teacher=cached)
        return total, found[1], found[2].bool()

    def passes(n, micro=None, objective=None):
        if micro:
            micro.begin(1.0)
        for _ in range(n):
            with autocast():
                loss = model.loss(inputs, targets, objective=objective)[0]
            (loss / (n * targets.numel())).backward()
            if micro:
                micro.add(1 / n)
        if micro:
            micro.finish()
        model.zero_grad()

    def influence():
        with autocast():
            source_products(model, [(inputs, targets, None)], [direction])
    micro = MicroBatches(model, 'first', 'stream', 2)
    jobs = dict(plain=lambda: passes(1), presence=lambda: passes(2, micro), kd=lambda: passes(1, objective=distil), influence=influence)
    found = {name: [] for name in jobs}
    for _ in range(2 if targets.numel() * model.config.n_layer > 40_000 else 4):
        for name, job in jobs.items():
            start = clock()
            job()
            found[name].append(clock() - start)
    plain, presence, kd, influence = (statistics.median(found[name][1:]) for name in jobs)         # without the first, which warms up
    return dict(influence=influence, presence=presence - 2 * plain, kd=kd - plain)


def run_side():
    """Warms up, prints a line of JSON about itself, then answers every line on stdin with a line of JSON: seconds of a step and its parts, memory."""
    import torch

    from lib.device import peak_flops, pick_dtype, tune_malloc
    from tools.bench_common import clock
    tune_malloc()
    who, name, dtype, compile_it = side.split(',')
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if who == 'liger' and device.type == 'cpu':
        raise BadInput('vs = liger: its kernels need a GPU.')
    dtype = pick_dtype(dtype, device)[0]
    shape, B, T = SHAPES[name]
    B, T = (16, 2048) if device.type == 'cuda' else (B, T)
    B, T = rows or B, tokens or T
    torch.manual_seed(0)
    stream = torch.randint(0, shape['vocab_size'], (B, T + 1), device=device)
    batch = stream[:, :-1].contiguous(), stream[:, 1:].contiguous()
    start = cpu_seconds()
    model, loss = build_ours(shape, compile_it == 'True', device) if who == 'ours' else build_peer(who, shape, compile_it == 'True', device, T)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def autocast():
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def step():
        """Seconds of forward, backward, optimizer."""
        at = [clock()]
        with autocast():
            value = loss(*batch)
        at.append(clock())
        value.backward()
        at.append(clock())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        at.append(clock())
        return [b - a for a, b in zip(at, at[1:])]
    step()
    about = dict(start_s=cpu_seconds() - start, tokens=B * T, parameters=sum(p.numel() for p in model.parameters()), dtype=str(dtype)[6:],
                 peak=peak_flops(device))
    step()
    if who == 'ours':
        from model import flops_per_token
        about.update(flops=flops_per_token(model.config, T), causal=flops_per_token(model.config, T, causal=True))
    if device.type == 'cuda':
        torch.cuda.empty_cache()
    print(dumps(about), flush=True)
    for line in sys.stdin:
        if line.strip() == 'rest':
            print(dumps(dict(**where_it_goes(step, device), **(extra_parts(model, batch, autocast) if who == 'ours' else {}))), flush=True)
            continue
        if device.type == 'cuda':
            step()                                             # the memory that the turn before gave back
        found = [step() for _ in range(steps)]
        parts = [statistics.median(values) for values in zip(*found)]
        print(dumps(dict(step=statistics.median(sum(f) for f in found), **dict(zip(('forward', 'backward', 'optimizer'), parts)), memory=peak_memory(device))),
              flush=True)
        if device.type == 'cuda':
            torch.cuda.empty_cache()                           # the others need it


def cpu_seconds():
    """Of this process and those that it waited for, compilers among them."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def peak_memory(device):
    """GiB: of the process on a CPU, of tensors on a GPU."""
    import torch
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**30
    with open('/proc/self/status', encoding='ascii') as f:
        return next(int(line.split()[1]) / 2**20 for line in f if line.startswith('VmHWM'))


def where_it_goes(step, device):
    """Seconds of a step by kind, from torch's profiler: matrix products, attention, the optimizer, and the ten costliest others by name."""
    from torch.profiler import ProfilerActivity, profile
    cuda = device.type == 'cuda'
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        step()
    kinds, others = dict(products=0.0, attention=0.0, adamw=0.0, rest=0.0), {}
    for event in found.key_averages():
        seconds, name = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6, event.key
        kind = next((kind for kind, words in (('attention', ('attention', 'blockwise', 'flash', 'fmha')), ('adamw', ('adam',)),
                                              ('products', ('aten::mm', 'aten::addmm', 'linear_pointwise', 'gemm', 'nvjet', 'cutlass', 'xmma')))
                     if any(word in name.lower() for word in words)), 'rest')
        kinds[kind] += seconds
        if kind == 'rest':
            others[name] = seconds
    inside = ('aten::bmm', 'aten::baddbmm_')                   # of blockwise attention, which calls them (its exponentials stay in the rest)
    for name in inside:
        seconds = others.pop(name, 0.0)
        kinds['attention'], kinds['rest'] = kinds['attention'] + seconds, kinds['rest'] - seconds
    return dict(kinds=kinds, others=dict(sorted(others.items(), key=lambda item: -item[1])[:10]))


# -- the table ---------------------------------------------------------------------------------------------------------

def start_side(*what):
    overrides = [f'--{key}={config[key]}' for key in ('steps', 'tokens', 'rows', 'kernels')]
    process = subprocess.Popen([sys.executable, __file__, f'--side={",".join(map(str, what))}', *overrides], text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, env={**os.environ, 'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', '1')})
    line = process.stdout.readline()
    if not line.startswith('{'):
        raise BadInput(f'the benchmark of {what[0]} did not start; its message stands above.')
    return process, loads(line)


def ask(process, line='step'):
    process.stdin.write(line + '\n')
    process.stdin.flush()
    answer = process.stdout.readline()
    answer = loads(answer) if answer else {}
    if not answer or 'error' in answer:
        raise BadInput('one side of the benchmark ended before its time' + (f": {answer['error']}" if answer else '; its message stands above.'))
    return answer


def machine(dtype):
    """(FLOP/s of a large matrix product in this dtype, bytes/s of a large copy), as now."""
    import torch
    cuda = torch.cuda.is_available()
    device, n, size = ('cuda', 8192, 2**30) if cuda else ('cpu', 2048, 2**28)
    a, big = torch.randn(n, n, device=device).to(getattr(torch, dtype)), torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    other, found = torch.empty_like(big), []
    for job in (lambda: a @ a, lambda: other.copy_(big)):
        job()
        best = float('inf')
        for _ in range(3):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter() if cuda else time.process_time()
            job()
            if cuda:
                torch.cuda.synchronize()
            best = min(best, (time.perf_counter() if cuda else time.process_time()) - start)
        found.append(best)
    return 2 * n**3 / found[0], 2 * size / found[1]


def floor_seconds(name, n_tokens, flops, parameters, ceiling, bandwidth, item):
    """What a step must take: matrix FLOPs at the machine's ceiling, and the bytes that must move whatever is fused, at its bandwidth.

    Bytes of an element in activations: item. Per token and block 17 C + 5 (H + K) D + 8 F elements (norms, rotation, residuals, SwiGLU, forward and
    backward), 5 V of the logits, 28 bytes per parameter of AdamW.
    """
    s = SHAPES[name][0]
    heads = (s['n_head'] + s['n_kv_head']) * s['n_embd'] // s['n_head']
    moved = n_tokens * item * (s['n_layer'] * (17 * s['n_embd'] + 5 * heads + 8 * s['ffn_dim']) + 5 * s['vocab_size']) + 28 * parameters
    return n_tokens * flops / ceiling, moved / bandwidth


def data_seconds(n_tokens):
    """CPU-seconds that train.py's loader takes for so many tokens."""
    from tools.bench_common import loader_rate
    return n_tokens / (statistics.median(loader_rate()[0]) * 1e6)


def bench_model(name, dtype, compile_it, peers):
    """A row of the table, and a row for every peer: prints them, returns the figures."""
    sides = {who: start_side(who, name, dtype, compile_it) for who in ('ours', *peers)}
    for who in [who for who, (_, about) in sides.items() if 'error' in about]:
        print(f"| {name} | {dtype} {'compiled' if compile_it else 'eager'} | {who}: {sides.pop(who)[1]['error']} |" + ' |' * (8 + len(PARTS)), flush=True)
    if 'ours' not in sides:
        for process, _ in sides.values():
            process.kill()
        return None
    about, peers = sides['ours'][1], [who for who in peers if who in sides]
    found, ceilings = {who: [] for who in sides}, []
    for _ in range(rounds):
        ceilings.append(machine(about['dtype']))
        for who, (process, _) in sides.items():
            found[who].append(ask(process))
    rest = {who: ask(process, 'rest') for who, (process, _) in sides.items()}
    for process, _ in sides.values():
        process.stdin.close()
        process.wait()
    seconds = {who: statistics.median(f['step'] for f in values) for who, values in found.items()}
    ceiling, bandwidth = (statistics.median(values) for values in zip(*ceilings))
    mine, kinds = seconds['ours'], rest['ours']['kinds']
    ms = dict(data=data_seconds(about['tokens']), **{part: statistics.median(f[part] for f in found['ours']) for part in ('forward', 'backward', 'optimizer')},
              **{part: rest['ours'][part] for part in ('influence', 'presence', 'kd')})
    products, moved = floor_seconds(name, about['tokens'], about['causal'], about['parameters'], ceiling, bandwidth, 4 if about['dtype'] == 'float32' else 2)
    record = dict(model=name, dtype=about['dtype'], compiled=compile_it, tokens=about['tokens'], tokens_per_second=about['tokens'] / mine,
                  mfu=about['tokens'] / mine * about['flops'] / about['peak'] if about['peak'] else None, flops_per_second=about['tokens'] * about['causal'] / mine,
                  ceiling=ceiling, bandwidth=bandwidth, memory=found['ours'][-1]['memory'], floor_share=(kinds['products'] + kinds['attention']) / sum(kinds.values()),
                  roofline_s=dict(products=products, moved=moved), start_s=about['start_s'], seconds=ms, step_s=mine, kinds=kinds, others=rest['ours']['others'], peers={})
    mode = 'compiled' if compile_it else 'eager'
    mfu = f"{record['mfu']:.1%}" if record['mfu'] is not None else 'n/a'
    print(f"| {name} | {about['dtype']} {mode} | ours | {about['start_s']:.0f} | {record['tokens_per_second']:,.0f} | | {mfu} | {record['flops_per_second'] / 1e9:,.0f} of "
          f"{ceiling / 1e9:,.0f} | {(products + moved) / mine:.0%} | {record['floor_share']:.0%} | {record['memory']:.2f} | "
          + ' | '.join(f'{ms[part] * 1e3:,.0f}' for part in PARTS) + ' |', flush=True)
    for who in peers:
        ratios = [theirs['step'] / ours['step'] for ours, theirs in zip(found['ours'], found[who])]
        record['peers'][who] = dict(tokens_per_second=about['tokens'] / seconds[who], ratio=statistics.median(ratios), ratios=ratios, memory=found[who][-1]['memory'],
                                    kinds=rest[who]['kinds'])
        parts = [statistics.median(f[part] for f in found[who]) * 1e3 for part in ('forward', 'backward', 'optimizer')]
        print(f"| {name} | {about['dtype']} {mode} | {who} | {sides[who][1]['start_s']:.0f} | {about['tokens'] / seconds[who]:,.0f} | **{statistics.median(ratios):.2f}** ({min(ratios):.2f} to "
              f"{max(ratios):.2f}) | | | | | {found[who][-1]['memory']:.2f} | | {parts[0]:,.0f} | {parts[1]:,.0f} | {parts[2]:,.0f} | | | |", flush=True)
    return record


def print_profile(records):
    """Where the time of our steps goes, against what it must take."""
    print('\n| model | step, ms | must: products and attention at the ceiling, ms | must: bytes moved, ms | products | attention | AdamW | rest, ms | the costliest of the rest |'
          '\n|---|---|---|---|---|---|---|---|---|')
    for r in records:
        must, k = r['roofline_s'], r['kinds']
        worst = ', '.join(f'{name} {s * 1e3:,.0f}' for name, s in list(r['others'].items())[:4])
        print(f"| {r['model']} {r['dtype']} {'compiled' if r['compiled'] else 'eager'} | {r['step_s'] * 1e3:,.0f} | {must['products'] * 1e3:,.0f} | {must['moved'] * 1e3:,.0f} | "
              + ' | '.join(f'{k[kind] * 1e3:,.0f}' for kind in ('products', 'attention', 'adamw', 'rest')) + f' | {worst} |')


def main():
    import torch

    from lib.device import device_name, pick_dtype
    cuda = torch.cuda.is_available()
    device = torch.device('cuda' if cuda else 'cpu')
    chosen = models or (['smollm2_135m', '140m', '360m', '950m'] if cuda else ['s1', 'smollm2_135m', '140m'])
    peers = [who.strip() for who in vs.split(',') if who.strip()]
    for given, known in ((chosen, SHAPES), (peers, PEERS)):
        for name in given:
            if name not in known:
                raise BadInput(f"'{name}' must be one of {', '.join(known)}.")
    if not cuda:
        torch.set_num_threads(1)
    print(f'{time.strftime("%Y-%m-%d")}, Python {platform.python_version()}, torch {torch.__version__}, {device_name(device)}'
          + ('' if cuda else ', one thread, CPU time') + f', {rounds} rounds of {steps} step(s); auto is {pick_dtype("auto", device)[0]}\n\n'
          '| model | dtype, mode | side | start, s | tok/s | ours / theirs | MFU | GFLOP/s of ceiling | roofline / step | products + attention / step | peak GiB | '
          + ' | '.join(f'{part}, ms' for part in PARTS) + ' |\n' + '|---' * (11 + len(PARTS)) + '|')
    records = [bench_model(name, dtype, compile_it, peers) for name in chosen for dtype in dtypes for compile_it in compiled]
    records = [record for record in records if record is not None]
    if profile:
        print_profile(records)
    if json:
        about = dict(date=time.strftime('%Y-%m-%d'), python=platform.python_version(), torch=torch.__version__, device=device_name(device), records=records)
        with open(json, 'w', encoding='utf-8') as f:
            dump(about, f, indent=1)


if side:
    import torch
    try:
        run_side()
    except torch.OutOfMemoryError as e:
        print(dumps(dict(error=str(e).split('. ')[0])), flush=True)
else:
    main()
