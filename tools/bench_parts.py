"""Speed of single parts, as ratios of alternating runs in single-thread CPU time (wall clocks of shared machines lie); on a GPU in wall time.

    python tools/bench_parts.py                             # all of them, about 30 minutes on a CPU
    python tools/bench_parts.py --parts="['data']"          # reading rows only

data     rows from shards in the page cache, block_size 2048, as train.py reads them
prepare  prepare/text.py with `workers` processes on `text_mb` of JSON lines, gzipped and as parquet, against tiktoken's
         encode_ordinary alone on the same text in one thread
evaluate log-likelihoods by tools/evaluate.py and by lm-eval's own `hf` model on the same SmolLM2-135M shape: requests of four endings
         with one context, and of four one-token answers; alternating in one process
influence  one measurement (200 rows of three probe sets, 5 x 32 of sources) against the 250 steps of 32 rows that it comes after;
         single rows, their norms, whole matrices against a forward and backward of the same rows; memory in units of the gradient
presence a step of 8 micro-batches weighed by self-influence against a plain one
aioli    a round of exploration without its training steps, against bare forward passes over the validation rows that it evaluates on
laws     wall seconds of static laws with leave-one-out on tables of 5 and 7 groups as large as the published ones
kd       a step of distillation, from a teacher that runs along and from a cache of top 64, against a plain one; memory of the loss with
         a vocabulary of 128,256
loss     the output layer and its loss, 128,256 x 576: ours against full logits, torch's F.linear_cross_entropy (2.13) and, on a GPU, Liger's
attention  forward and backward of causal attention on the CPU: ours by blocks against torch's
saves    a checkpoint of weights and AdamW's states: wall seconds that training waits for it, written at once and in the background
kernels  on a GPU: every Triton kernel of a layer against its reference under torch.compile, at training shapes
tools/bench.py has whole steps.
"""
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import _path  # noqa: F401

from configurator import configure
from tools.bench_common import in_turns, loader_rate, random_cache, random_shards, spread

# -- knobs --
parts = ['data', 'prepare', 'evaluate', 'influence', 'presence', 'aioli', 'laws', 'kd', 'loss', 'attention', 'saves', 'kernels']      # what to measure
dtypes = ['float32', 'bfloat16']     # float32, and bfloat16 autocast over fp32 weights
rounds = 3                       # alternating rounds
n_layer = 30                     # 30 is SmolLM2-135M; fewer for a quick look
workers = 2                      # of prepare
text_mb = 400                    # of prepare: megabytes of text, the files below over and over
text = ''                        # JSONL files with a field `text`, a glob; '': the source files of Python's library
tokenizer = ''                   # of prepare; '': a BPE of 32,768 tokens trained on 10 MB of the text
peer = ''                        # internal: measure memory in a process of its own
config = configure(globals(), verbose=False)


def bench_prepare():
    """Tokens per second of the whole preparation against encode_ordinary alone, in CPU time and in wall time."""
    import glob
    import gzip
    import json
    import multiprocessing
    import resource
    import sysconfig

    import pyarrow
    import pyarrow.parquet
    import rustbpe

    from lib.reading import local_files, read_batches, records_of
    from lib.tokenizer import LLAMA3_PATTERN, load_tokenizer, make_tokenizer, save_tokenizer

    def children():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    if text:
        texts = [r['text'] for f in local_files(text) for batch in read_batches(f, ['text']) for _, r in records_of(batch)]
    else:
        texts = [open(path, encoding='utf-8', errors='replace').read()
                 for path in sorted(glob.glob(os.path.join(sysconfig.get_path('stdlib'), '**', '*.py'), recursive=True))]
    n_bytes = sum(len(t.encode()) for t in texts)
    repeats = max(1, round(text_mb * 1e6 / n_bytes))
    with tempfile.TemporaryDirectory() as folder:
        path = tokenizer
        if not path:
            bpe = rustbpe.Tokenizer()
            bpe.train_from_iterator(iter(texts[::max(1, n_bytes // 10_000_000)]), 32767, pattern=LLAMA3_PATTERN)
            ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
            path = folder
            save_tokenizer(folder, make_tokenizer('bench', ranks, LLAMA3_PATTERN, {'<|endoftext|>': len(ranks)}, '<|endoftext|>'))
        encode = load_tokenizer(path).encoding.encode_ordinary
        lines = gzip.compress(''.join(json.dumps({'text': t}) + '\n' for t in texts).encode(), 6)
        for i in range(repeats):
            with open(f'{folder}/{i:03d}.jsonl.gz', 'wb') as f:
                f.write(lines)
            pyarrow.parquet.write_table(pyarrow.table({'text': texts}), f'{folder}/{i:03d}.parquet', row_group_size=1000)
        print(f'prepare: {repeats * n_bytes / 1e6:.0f} MB of text, {workers} workers, {os.cpu_count()} cores; Mtok/s of '
              'encode_ordinary in one thread (CPU time), of as many processes at once, of prepare (wall)\n\n| input | one | at once | prepare | prepare / '
              '(workers x one) | prepare / at once | CPU time, encode_ordinary / prepare |\n|---|---|---|---|---|---|---|')

        def encode_all():
            return sum(len(encode(t)) + 1 for t in texts)
        for kind in ('jsonl.gz', 'parquet'):
            rows = []
            for i in range(rounds):
                start = time.process_time()
                n_tokens = encode_all()
                seconds = time.process_time() - start
                crowd = [multiprocessing.get_context('fork').Process(target=encode_all) for _ in range(workers)]
                start = time.perf_counter()
                for process in crowd:
                    process.start()
                for process in crowd:
                    process.join()
                at_once = workers * n_tokens / (time.perf_counter() - start)
                cpu, start = children(), time.perf_counter()
                subprocess.run([sys.executable, 'prepare/text.py', f'--source={kind}{i}', f'--input={folder}/*.{kind}',
                                f'--workers={workers}', f'--tokenizer={path}', f'--out={folder}/out{i}'], check=True,
                               capture_output=True, cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
                rate = repeats * n_tokens / (time.perf_counter() - start)
                rows.append((n_tokens / seconds / 1e6, at_once / 1e6, rate / 1e6, rate * seconds / n_tokens / workers, rate / at_once,
                             repeats * seconds / (children() - cpu)))
            cells = [f'{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})' for v in zip(*rows)]
            print(f'| {kind} | ' + ' | '.join(cells) + ' |', flush=True)


def bench_evaluate():
    """Tokens of requests per second of CPU time (wall time on CUDA), tools/evaluate.py against lm-eval's hf model."""
    import random
    from dataclasses import asdict

    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from lib import checkpoint, hf
    from lib.tokenizer import LLAMA3_PATTERN, make_tokenizer, save_tokenizer
    from model import GPT, ModelConfig, init_weights
    from tools.benchmarks import Scorer  # before lm_eval, for the sake of its imports
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    clock = time.perf_counter if device.type == 'cuda' else time.process_time
    rng = random.Random(0)
    words = [f' {a}{b}' for a in ('sol', 'ter', 'min', 'pra', 'lum') for b in ('a', 'en', 'ist', 'or', 'ung', 'y', 'ive', 'ok')]

    def some(low, high):
        return ''.join(rng.choice(words) for _ in range(rng.randrange(low, high)))
    requests = {'four endings': [Instance('loglikelihood', {}, (context, some(8, 24)), 0)
                                 for context in [some(40, 90) for _ in range(24)] for _ in range(4)],
                'four one-token answers': [Instance('loglikelihood', {}, (context, word), 0)
                                           for context in [some(150, 400) for _ in range(12)] for word in words[:4]]}
    with tempfile.TemporaryDirectory() as folder:
        ranks = {bytes([b]): b for b in range(256)}
        for word in words:                      # every word is one token, made of its prefixes
            for n in range(2, len(word) + 1):
                ranks.setdefault(word[:n].encode(), len(ranks))
        ours = make_tokenizer('bench', ranks, LLAMA3_PATTERN, {'<|endoftext|>': len(ranks)}, '<|endoftext|>')
        c = ModelConfig(vocab_size=49152, n_layer=n_layer, n_head=9, n_kv_head=3, n_embd=576, ffn_dim=1536, rope_theta=100000.0)
        model = GPT(c)
        init_weights(model, 0)
        save_tokenizer(folder, ours)
        checkpoint.Checkpointer(folder, 0, False).save(0, model, [], dict(model=asdict(c), config=None, tokenizer=None, context=2048))
        hf.export_model(folder, f'{folder}/hf', 'float32', None)
        print(f"evaluate: {n_layer} layers of SmolLM2-135M, tokens of requests per second\n\n"
              '| dtype | requests | ours | hf, batches of 16 | ratio (range) | largest difference, nats |\n|---|---|---|---|---|---|')
        for dtype in dtypes:
            precision = getattr(torch, dtype)
            model, tokens, about = hf.open_model(folder, device, precision)
            sides = (Scorer(model, tokens, about['add_bos'], about['prefix_id'], 2048, device, 65536 if device.type == 'cuda' else 4096, quiet=True),
                     HFLM(pretrained=f'{folder}/hf', dtype=dtype, batch_size=16, device=device.type, max_length=2048))
            for kind, asked in requests.items():
                n_tokens = sum(len(tokens.encode(a + b)) for a, b in (r.args for r in asked))
                seconds, answers = [], []
                for _ in range(rounds):
                    seconds.append([])
                    for side in sides:
                        start = clock()
                        answers.append(side.loglikelihood(asked, disable_tqdm=True))
                        seconds[-1].append(clock() - start)
                ratios = [theirs / mine for mine, theirs in seconds]
                far = max(abs(a[0] - b[0]) for a, b in zip(answers[0], answers[1]))
                best = [n_tokens / min(side) for side in zip(*seconds)]
                print(f'| {dtype} | {kind} | {best[0]:,.0f} | {best[1]:,.0f} | **{statistics.median(ratios):.2f}** ({min(ratios):.2f} to '
                      f'{max(ratios):.2f}) | {far:.1e} |', flush=True)


def small_model(length=256, **changes):
    """12.6M parameters, their optimizer, and a function for batches of n random rows of so many tokens."""
    import torch

    from lib.device import tune_malloc
    from model import GPT, ModelConfig, init_weights
    if 'memory' not in peer:
        tune_malloc()
    c = ModelConfig(**{**dict(vocab_size=8192, n_layer=6, n_head=6, n_kv_head=2, n_embd=384, ffn_dim=1024), **changes})
    model = GPT(c)
    init_weights(model, 0)

    def rows(n, length=length):
        ids = torch.randint(0, c.vocab_size, (n, length + 1)) // 7          # tokens of unequal frequency: the probe has a direction
        return ids[:, :-1], ids[:, 1:].contiguous(), None
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True), rows


def train_step(model, optimizer, parts, micro=None):
    """A step on some micro-batches as train.py takes it; micro: presence.MicroBatches or None."""
    import torch
    if micro:
        micro.begin(1.0)
    for inputs, targets, _ in parts:
        (model.loss(inputs, targets)[0] / (targets.numel() * len(parts))).backward()
        if micro:
            micro.add(1 / len(parts))
    if micro:
        micro.finish()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def bench_influence():
    """One measurement of sources, single rows against forward and backward, and memory."""
    from influence import ghost_sqnorm, probe_direction, row_influence, row_matrix, source_products
    print('influence: float32\n\n| parameters | tokens of a row | layers | a step of 32 rows, s | a measurement, s | share of 250 steps (range) |\n'
          '|---|---|---|---|---|---|')
    for shape, length in ((dict(), 256), (dict(vocab_size=49152, n_layer=n_layer, n_head=9, n_kv_head=3, n_embd=576, ffn_dim=1536), 64)):
        model, optimizer, rows = small_model(length, **shape)
        parts = [rows(16), rows(16)]
        one = rows(16)                                         # again and again: batches that agree
        probe = {domain: [one] * 4 + [rows(n)] for domain, n in (('code', 2), ('math', 3), ('web', 3))}
        sources = [[rows(4) for _ in range(8)] for _ in range(5)]

        def measure(layers):
            """As methods/reweight.py: a direction for every domain, or one for all where they are large."""
            groups = [probe] if layers == 'all' else [{domain: batches} for domain, batches in probe.items()]
            directions = [probe_direction(model, group, layers) for group in groups]
            for batches in sources:
                source_products(model, batches, directions)
        medians, ratios = in_turns({'step': lambda: train_step(model, optimizer, parts), 'last': lambda: measure('last'), 'all': lambda: measure('all')},
                                   rounds, warm_up=not shape)
        size = sum(p.numel() for p in model.parameters()) / 1e6
        for layers in ('all', 'last'):
            shares = [x / 250 for x in ratios[layers]]
            print(f"| {size:.1f}M | {length} | {layers} | {medians['step']:.2f} | {medians[layers]:.1f} | **{statistics.median(shares):.2%}** ({min(shares):.2%} "
                  f'to {max(shares):.2%}) |', flush=True)
    model, optimizer, rows = small_model(vocab_size=1024, n_layer=4, n_embd=128, n_head=4, ffn_dim=352, tie_embeddings=False)
    batch, probe = rows(64, 128), rows(32, 128)
    halves = [tuple(None if t is None else t[i::2] for t in probe) for i in range(2)]
    direction = probe_direction(model, {'x': halves}, 'all')

    def backward():
        model.loss(batch[0], batch[1])[0].backward()
        model.zero_grad()

    def mean_probe():
        row_influence(model, batch, probe_direction(model, {'x': halves}, 'all'))
    jobs = {'forward and backward of 64 rows': backward, 'influence of the rows on a direction': lambda: row_influence(model, batch, direction),
            'their squared norms': lambda: ghost_sqnorm(model, batch, 'all'),
            'group: 32 probe rows, then the 64 as a source': lambda: source_products(model, [batch], [probe_direction(model, {'x': halves}, 'all')]),
            'rows on the mean probe: both of it': mean_probe, 'matrix of 64 x 32 rows': lambda: row_matrix(model, batch, probe, 'all')}
    medians, ratios = in_turns(jobs, rounds)
    print('\nunit: forward and backward of 64 rows of 128 tokens, 4 layers of width 128, vocabulary 1024, untied\n\n| job | units (range) |\n|---|---|')
    for name, values in ratios.items():
        print(f'| {name} | **{statistics.median(values):.2f}** ({min(values):.2f} to {max(values):.2f}) |', flush=True)
    print('\n' + subprocess.run([sys.executable, __file__, '--peer=memory', f'--n_layer={n_layer}'], text=True, stdout=subprocess.PIPE, check=True,
                                env={**os.environ, 'OMP_NUM_THREADS': '1', 'MALLOC_MMAP_THRESHOLD_': '65536'}).stdout)     # freed is freed


def peak(work):
    """Bytes of resident memory that work() needs at its fullest beyond what there was."""
    def resident(key):
        with open('/proc/self/status', encoding='ascii') as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))
    with open('/proc/self/clear_refs', 'w', encoding='ascii') as f:
        f.write('5')                                       # the peak begins anew
    before = resident('VmRSS')
    kept = work()
    used = resident('VmHWM') - before
    del kept
    return used


def measure_memory():
    """Peaks of resident memory, in a process of its own with malloc as it is: SmolLM2-135M's shape, where tiny rows leave parameters alone."""
    from influence import probe_direction, source_products
    model, _, rows = small_model(vocab_size=49152, n_layer=n_layer, n_head=9, n_kv_head=3, n_embd=576, ffn_dim=1536)
    gradient = sum(p.numel() * p.element_size() for p in model.parameters())
    batch = rows(2, 8)

    def accumulate():
        for _ in range(2):
            model.loss(batch[0], batch[1])[0].backward()
        model.zero_grad(set_to_none=True)
    accumulate()
    plain, one, three = (peak(work) / gradient for work in (accumulate, *(lambda d=d: probe_direction(model, {i: [batch] * 4 for i in range(d)}, 'all')
                                                                          for d in (1, 3))))
    direction = probe_direction(model, {'x': [batch] * 4}, 'all')
    sources = peak(lambda: source_products(model, [batch] * 4, [direction])) / gradient + 1      # the direction was there before
    print(f'memory beyond parameters, in gradients ({gradient / 2**20:.0f} MiB): accumulation of two micro-batches {plain:.2f}; probe direction '
          f'over all layers {one:.2f} with one domain, {three:.2f} with three; sources {sources:.2f}', flush=True)


def bench_presence():
    from methods.presence import MicroBatches
    model, optimizer, rows = small_model()
    parts = [rows(4) for _ in range(8)]
    sides = {mode: MicroBatches(model, 'first', mode, 8) for mode in ('stream', 'store')}
    medians, ratios = in_turns({'plain': lambda: train_step(model, optimizer, parts),
                                **{mode: (lambda micro=micro: train_step(model, optimizer, parts, micro)) for mode, micro in sides.items()}})
    print('presence: 12.6M parameters, 8 micro-batches of 4 rows of 256 tokens, float32\n\n| mode | s per step | against plain (range) |\n|---|---|---|')
    for mode, values in ratios.items():
        print(f'| {mode} | {medians[mode]:.2f} | **{statistics.median(values):.3f}** ({min(values):.3f} to {max(values):.3f}) |', flush=True)


def bench_aioli():
    """A round of Aioli: 1 + 12 evaluations of three sources, the solve and the new weights, against 13 times the same forward passes."""
    import torch

    from data import MixtureLoader, Source, batch_of
    from methods import baselines
    model, _, _ = small_model(vocab_size=1024, n_layer=4, n_embd=128, n_head=4, ffn_dim=352)
    config = dict(mixture='aioli', mixture_interval=100, aioli_sweeps=4, aioli_steps=4, one_hot_factor=0.5, aioli_rule='accumulate', aioli_ema=None,
                  aioli_matrix='measured', mixture_eta=None, mixture_rows=64, block_size=256, batch_size=16, max_epochs=None, seed=0)

    def to_device(rows):
        inputs, targets, _ = batch_of(torch.from_numpy(rows), 0)
        return inputs, targets, None
    with tempfile.TemporaryDirectory() as folder:
        for name in 'abc':
            random_shards(folder, name, 1, 500_000, 1024)
        sources = [Source(folder, name, 'train', 256, 0, 1024) for name in 'abc']
        batches = [to_device(s.rows(range(i, i + 16))) for s in sources for i in range(0, config['mixture_rows'], 16)]

        def a_round():
            loader, state = MixtureLoader(sources, dict.fromkeys('abc', 1.0)), {}
            for step in range(100, 149, config['aioli_steps']):
                state, _ = baselines.update(model, loader, sources, sources, config, state, step, 10_000, 16, [], to_device, 0, 1)
                for _ in range(config['aioli_steps']):
                    loader.next_batch(16)

        @torch.no_grad()
        def passes():
            for _ in range(13):
                for inputs, targets, _ in batches:
                    model.loss(inputs, targets)
        medians, ratios = in_turns({'passes': passes, 'round': a_round}, rounds)
    print(f"aioli: a round of 13 evaluations of 3 x 64 rows of 256 tokens {medians['round']:.1f} s; against bare forward passes {spread(ratios['round'])}")


def bench_laws():
    """Fits of all groups of a table, each with every run left out once: 26 mixtures of 5 groups at 4 sizes, 24 mixtures of 7."""
    import numpy as np

    from tools.mixing_laws import fit_static
    rng, start = np.random.default_rng(0), time.perf_counter()
    n_fits = 0
    for m, n, tables in ((5, 26, 4), (7, 24, 1)):
        for _ in range(tables):
            p, A = rng.dirichlet(np.ones(m), n), rng.normal(size=(m, m)) * 0.5 + 2 * np.eye(m)
            losses = 2 + np.exp(-p @ A.T) + 0.005 * rng.normal(size=(n, m))
            for y in losses.T:
                fit_static(p, y)
                n_fits += 1
    print(f'laws: {n_fits} fits with leave-one-out {time.perf_counter() - start:.1f} s')


def bench_kd():
    """Steps of a student of 12.6M parameters, and the loss alone with a vocabulary of 128,256, in CPU time of one thread."""
    import functools

    import torch

    from kd import distillation_loss
    from model import flops_per_token
    from ops.loss import linear_cross_entropy
    model, optimizer, rows = small_model()
    batches = [rows(8), rows(8)]
    teachers = {name: small_model(**shape)[0].requires_grad_(False).eval() for name, shape in (
        ('a teacher of its own size', dict()), ('a teacher of 67M', dict(n_layer=12, n_head=12, n_kv_head=4, n_embd=640, ffn_dim=1728, head_dim=64)))}
    cached = random_cache(8 * 256, 8192)

    def step(objective):
        for inputs, targets, _ in batches:
            (model.loss(inputs, targets, objective=objective and objective(inputs))[0] / (2 * targets.numel())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def loss(h, weight, targets, token_weights, teacher):
        total, found = distillation_loss(h, weight, targets, token_weights, teacher=teacher)
        return total, found[1], found[2].bool()

    def online(teacher, inputs):
        with torch.no_grad():
            return functools.partial(loss, teacher=(teacher(inputs).flatten(0, 1), teacher.output_weight))
    jobs = {'plain': lambda: step(None), 'cache of top 64': lambda: step(lambda _: functools.partial(loss, teacher=cached)),
            **{name: (lambda t=t: step(functools.partial(online, t))) for name, t in teachers.items()}}
    _, ratios = in_turns(jobs, rounds)
    work = flops_per_token(model.config, 256)
    print('kd: student of 12.6M parameters, 2 micro-batches of 8 rows of 256 tokens, float32, steps against a plain one\n\n'
          '| teacher | floor by FLOPs | measured (range) |\n|---|---|---|')
    for name, values in ratios.items():
        floor = 1 + (flops_per_token(teachers[name].config, 256) / 3 / work if name in teachers else 0)
        print(f'| {name} | {floor:.2f} | **{statistics.median(values):.3f}** ({min(values):.3f} to {max(values):.3f}) |', flush=True)
    V, C, N = 128256, 576, 512
    h, weight, targets = torch.randn(N, C, requires_grad=True), torch.randn(V, C).mul_(0.05).requires_grad_(), torch.randint(V, (N,))
    other, cached = (torch.randn(N, C), torch.randn(V, C).mul_(0.05)), random_cache(N, V)
    jobs = {'cross-entropy': lambda: linear_cross_entropy(h, weight, targets)[0].backward(),
            'top 64 from a cache': lambda: distillation_loss(h, weight, targets, teacher=cached)[0].backward(),
            **{f'{kind} from hidden states': (lambda kind=kind: distillation_loss(h, weight, targets, teacher=other, kind=kind)[0].backward())
               for kind in ('forward', 'reverse', 'js')}}
    _, ratios = in_turns(jobs, rounds)
    print(f'\nthe loss and its gradient alone, {N} tokens, width {C}, vocabulary {V:,}, float32; products: 3 of the student, 1 of the teacher\n\n'
          '| loss | floor by FLOPs | measured (range) |\n|---|---|---|')
    for name, values in ratios.items():
        print(f"| {name} | {4 / 3 if 'hidden' in name else 1:.2f} | **{statistics.median(values):.2f}** ({min(values):.2f} to {max(values):.2f}) |", flush=True)
    print('\n' + subprocess.run([sys.executable, __file__, '--peer=kd_memory'], text=True, stdout=subprocess.PIPE, check=True,
                                env={**os.environ, 'OMP_NUM_THREADS': '1', 'MALLOC_MMAP_THRESHOLD_': '65536'}).stdout)


def measure_kd_memory():
    """Peaks of the loss of 4096 tokens with a vocabulary of 128,256, beyond the gradient of the output weight; narrow, since width does not count."""
    import torch

    from kd import distillation_loss
    from ops.loss import linear_cross_entropy
    V, C, N = 128256, 64, 4096
    h, weight, targets = torch.randn(N, C, requires_grad=True), torch.randn(V, C).mul_(0.1).requires_grad_(), torch.randint(V, (N,))
    other, cached, full = (torch.randn(N, C), torch.randn(V, C).mul_(0.1)), random_cache(N, V), N * V * 4

    def used(work):
        h.grad = weight.grad = None
        return (peak(lambda: work()[0].backward()) - V * C * 4) / full
    distillation_loss(h[:64], weight, targets[:64], teacher=(other[0][:64], other[1]))[0].backward()         # warm
    jobs = {'cross-entropy': lambda: linear_cross_entropy(h, weight, targets), 'top 64 from a cache': lambda: distillation_loss(h, weight, targets, teacher=cached),
            **{f'{kind} KD': (lambda kind=kind: distillation_loss(h, weight, targets, teacher=other, kind=kind)) for kind in ('forward', 'js')}}
    print(f'memory of the loss of {N} tokens, vocabulary {V:,}, float32, beyond the gradients, as a share of one model\'s logits '
          f'({full / 2**30:.2f} GiB): ' + ', '.join(f'{name} {used(job):.1%}' for name, job in jobs.items()), flush=True)


def bench_loss():
    """The output layer and its loss, forward and backward."""
    import torch

    from lib.device import tune_malloc
    from ops.loss import linear_cross_entropy
    tune_malloc()
    cuda = torch.cuda.is_available()
    device, low, (N, V) = ('cuda', torch.bfloat16, (32768, 128256)) if cuda else ('cpu', torch.float32, (2048, 128256))
    print(f'loss: {N:,} tokens, vocabulary {V:,}, {str(low)[6:]}, gradients of both; TFLOP/s counted as 6 C V per token\n\n'
          '| width | side | seconds | TFLOP/s | theirs / ours | loss |\n|---|---|---|---|---|---|')
    for C in (576, 1024, 1536) if cuda else (576,):
        torch.manual_seed(0)
        h = torch.randn(N, C, device=device).to(low).requires_grad_()
        weight = (torch.randn(V, C, device=device) * 0.03).to(low).requires_grad_()
        targets, values = torch.randint(V, (N,), device=device), {}

        def run(name, loss):
            h.grad = weight.grad = None
            value = loss()
            value.backward()
            values[name] = value.item()
        jobs = {'ours': lambda: linear_cross_entropy(h, weight, targets)[0] / N}
        if not cuda:                                     # a GPU would need 67 GB
            jobs['full logits'] = lambda: torch.nn.functional.cross_entropy((h @ weight.T).float(), targets)
        try:
            from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions
        except ImportError:
            print('(this torch has no F.linear_cross_entropy)')
        else:
            for rows in (512, 1024):
                options = LinearCrossEntropyOptions(batch_chunk_size=rows)
                jobs[f'F.linear_cross_entropy, chunks of {rows}'] = lambda o=options: torch.nn.functional.linear_cross_entropy(h, weight, targets, options=o)
        if cuda:
            try:
                from liger_kernel.ops.fused_linear_cross_entropy import (
                    LigerFusedLinearCrossEntropyFunction as Liger,
                )
                jobs['Liger'] = lambda: Liger.apply(h, weight, targets)[0]
            except ImportError:
                print('(liger-kernel is not installed)')
        medians, ratios = in_turns({name: (lambda name=name, job=job: run(name, job)) for name, job in jobs.items()}, rounds)
        for name, seconds in medians.items():
            print(f'| {C} | {name} | {seconds:.3f} | {6 * N * C * V / seconds / 1e12:.3f} | {spread(ratios[name])} | {values[name]:.5f} |', flush=True)


def bench_attention():
    """Causal attention of fp32 rows on one thread, forward and backward: torch's and ours."""
    import torch
    import torch.nn.functional as F

    from lib.device import tune_malloc
    from ops.attention import blockwise
    tune_malloc()
    print('attention: head_dim 64, float32, milliseconds of forward and backward\n\n| rows, heads, key heads, tokens | torch | by blocks | torch / by blocks |\n|---|---|---|---|')
    for B, H, K, T in ((16, 6, 2, 256), (8, 6, 2, 512), (4, 9, 3, 512), (4, 9, 3, 1024), (2, 9, 3, 2048)):
        q, k, v = (torch.randn(B, T, heads, 64, requires_grad=True) for heads in (H, K, K))

        def theirs():
            y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True)
            torch.autograd.grad(y, (q, k, v), torch.ones_like(y))

        def ours():
            y = blockwise(q, k, v)[0]
            torch.autograd.grad(y, (q, k, v), torch.ones_like(y))
        medians, ratios = in_turns({'ours': ours, 'theirs': theirs}, rounds)
        print(f"| {B}, {H}, {K}, {T} | {medians['theirs'] * 1e3:.0f} | {medians['ours'] * 1e3:.0f} | {spread(ratios['theirs'])} |", flush=True)


def bench_saves():
    """SmolLM2-135M's shape (of n_layer), where the temporary folder is; steps go on while a background save is written."""
    import torch

    from lib.checkpoint import Checkpointer
    model, optimizer, rows = small_model(vocab_size=49152, n_layer=n_layer, n_head=9, n_kv_head=3, n_embd=576, ffn_dim=1536)
    batch = [rows(1)]
    if torch.cuda.is_available():
        model, batch = model.cuda(), [tuple(t.cuda() for t in batch[0][:2]) + (None,)]
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    train_step(model, optimizer, batch)
    waited, n_steps = {'at once': [], 'background': []}, 0
    with tempfile.TemporaryDirectory() as folder:
        savers = {name: Checkpointer(os.path.join(folder, name.split()[0]), 1, name == 'background') for name in waited}
        for i in range(rounds + 1):
            for name, saver in savers.items():
                seconds, start = saver.save(i, model, [optimizer], {}), time.perf_counter()
                while saver.pending is not None:
                    train_step(model, optimizer, batch)
                    n_steps += 1
                    saver.poll()
                if i:
                    waited[name].append(seconds)
                    if name == 'background':
                        written = time.perf_counter() - start + seconds
        size = sum(os.path.getsize(os.path.join(at, f)) for at, _, files in os.walk(savers['at once'].folder) for f in files)
    print(f"\nsaves of {size / 1e9:.2f} GB: training waits {spread(waited['at once'])} s when written at once, {spread(waited['background'])} s in the background "
          f'({written:.1f} s until it is complete, {n_steps / (rounds + 1):.1f} steps meanwhile)')


def bench_kernels():
    """Kernels of layers, forward and backward, against their references compiled, for 32,768 tokens; and of rows' gradients."""
    import torch

    from ops import kernels
    device = torch.device('cuda')
    print('kernels: 32,768 tokens, bfloat16, milliseconds of forward and backward; GB/s of the bytes that must move\n\n'
          '| width | kernel | Triton | compiled reference | reference / Triton |\n|---|---|---|---|---|')
    for C, H, K, ffn in ((576, 9, 3, 2048), (1024, 16, 4, 4096), (1536, 24, 6, 6144)):
        def some(*shape):
            return torch.randn(16, 2048, *shape, device=device, dtype=torch.bfloat16, requires_grad=True)
        x, residual, weight, q, k, gate, up = some(C), some(C), torch.ones(C, device=device, requires_grad=True), some(H, 64), some(K, 64), some(ffn), some(ffn)
        angles = torch.randn(2048, 32, device=device)
        cos, sin = torch.cat((angles.cos(),) * 2, 1).bfloat16(), torch.cat((-angles.sin(), angles.sin()), 1).bfloat16()
        cases = {'rms_norm': (lambda: (kernels.rms_norm(x, weight, 1e-5),), (x, weight)),
                 'add_rms_norm': (lambda: kernels.add_rms_norm(x, residual, weight, 1e-5), (x, residual, weight)),
                 'rotate_heads, normed': (lambda: kernels.rotate_heads(q, k, cos, sin, True, None, None, 1e-5), (q, k)),
                 'rotate_heads': (lambda: kernels.rotate_heads(q, k, cos, sin), (q, k)),
                 'swiglu': (lambda: (kernels.swiglu(gate, up),), (gate, up)),
                 'row_sqnorms': (lambda: (kernels.row_sqnorms(x.detach(), residual.detach()),), ()),
                 'bilinear': (lambda: (kernels.bilinear(x.detach(), residual.detach(), torch.ones(C, C, device=device)),), ())}
        for name, (job, inputs) in cases.items():
            compiled = torch.compile(job)

            def run(mode, function):
                kernels.use(mode, device)
                for _ in range(20):
                    out = function()
                    if inputs:
                        torch.autograd.grad(out, inputs, [torch.ones_like(o) for o in out])
            medians, ratios = in_turns({'triton': lambda: run('triton', job), 'compiled': lambda: run('torch', compiled)}, rounds)
            print(f"| {C} | {name} | {medians['triton'] * 50:.3f} | {medians['compiled'] * 50:.3f} | {spread(ratios['compiled'])} |", flush=True)
    kernels.use('auto', device)


if peer == 'memory':
    measure_memory()
elif peer == 'kd_memory':
    measure_kd_memory()
else:
    import torch
    print(f'{time.strftime("%Y-%m-%d")}, Python {platform.python_version()}, torch {torch.__version__}, '
          f'{torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"}')
    if 'data' in parts:
        _rates, _copy = loader_rate(rounds)
        print(f'data: {spread(_rates, 0)} million tokens per CPU-second; the copy alone {_copy:.0f}')
    if 'prepare' in parts:
        bench_prepare()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    if 'evaluate' in parts:
        bench_evaluate()
    if 'influence' in parts:
        bench_influence()
    if 'presence' in parts:
        bench_presence()
    if 'aioli' in parts:
        bench_aioli()
    if 'laws' in parts:
        bench_laws()
    if 'kd' in parts:
        bench_kd()
    if 'loss' in parts:
        bench_loss()
    if 'attention' in parts:
        bench_attention()
    if 'saves' in parts:
        bench_saves()
    if 'kernels' in parts:
        if torch.cuda.is_available():
            bench_kernels()
        else:
            print('kernels: not measured, there is no GPU here')
