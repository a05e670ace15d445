"""Speed, side by side with a peer, as ratios of single-thread CPU time (wall clocks of shared machines lie).

    python bench.py                             # all of it, about 40 minutes on a CPU
    python bench.py --parts="['data']"          # reading rows only

step     forward, backward and AdamW on the SmolLM2-135M shape, B=4 T=512, ours and transformers' Llama, both eager and both
         compiled, alternating, the same dtype and memory settings; on CUDA in wall time
data     rows from shards in the page cache, block_size 2048, as train.py reads them
prepare  prepare/text.py with `workers` processes on `text_mb` of JSON lines, gzipped and as parquet, against tiktoken's
         encode_ordinary alone on the same text in one thread
evaluate log-likelihoods by evaluate.py and by lm-eval's own `hf` model on the same SmolLM2-135M shape: requests of four endings
         with one context, and of four one-token answers; alternating in one process
influence  one measurement (200 rows of three probe sets, 5 x 32 of sources) against the 250 steps of 32 rows that it comes after;
         single rows, their norms, whole matrices against a forward and backward of the same rows; memory in units of the gradient
presence a step of 8 micro-batches weighed by self-influence against a plain one
kd       a step of distillation, from a teacher that runs along and from a cache of top 64, against a plain one; memory of the loss with
         a vocabulary of 128,256
Floors: a step cannot be faster than its matrix products, 6 FLOP per weight and token; reading a row is one copy.
"""
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

from configurator import BadInput, configure

# -- knobs --
parts = ['step', 'data', 'prepare', 'evaluate', 'influence', 'presence', 'kd']      # what to measure
compiled = [False, True]         # eager, compiled or both
dtypes = ['float32', 'bfloat16']     # float32, and bfloat16 autocast over fp32 weights
rounds = 3                       # alternating rounds
steps = 3                        # timed steps per round and side
batch_size = 4                   # rows
block_size = 512                 # tokens of a row
n_layer = 30                     # 30 is SmolLM2-135M; fewer for a quick look
workers = 2                      # of prepare
text_mb = 400                    # of prepare: megabytes of text, the files below over and over
text = ''                        # JSONL files with a field `text`, a glob; '': the source files of Python's library
tokenizer = ''                   # of prepare; '': a BPE of 32,768 tokens trained on 10 MB of the text
peer = ''                        # internal: run one side and print its seconds per step
config = configure(globals(), verbose=False)


def make_step(who, dtype, compile_it):
    """A function that takes one training step, and the FLOPs of its matrix products and attention."""
    import torch
    from common import tune_malloc
    from model import GPT, ModelConfig, flops_per_token, init_weights
    tune_malloc()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.manual_seed(0)
    c = ModelConfig(vocab_size=49152, n_layer=n_layer, n_head=9, n_kv_head=3, n_embd=576, ffn_dim=1536, rope_theta=100000.0)
    idx = torch.randint(0, c.vocab_size, (batch_size, block_size + 1), device=device)
    inputs, targets = idx[:, :-1], idx[:, 1:].contiguous()
    if who == 'ours':
        model = GPT(c).to(device)
        init_weights(model, 0)
        if compile_it:
            for block in model.blocks:
                block.compile()

        def loss():
            return model.loss(inputs, targets)[0] / targets.numel()
    else:
        from transformers import LlamaConfig, LlamaForCausalLM
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, tie_word_embeddings=True, use_cache=False,
            attn_implementation='sdpa')).to(device)
        forward = torch.compile(model) if compile_it else model

        def loss():
            return forward(input_ids=inputs, labels=inputs).loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=dtype == 'bfloat16'):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == 'cuda':
            torch.cuda.synchronize()
    return step, flops_per_token(c, block_size, causal=True) * inputs.numel()


def run_side():
    """One side in a process of its own: warms up, then answers every line on stdin with the median seconds of its steps."""
    import torch
    who, dtype, compile_it = peer.split(',')
    step, flops = make_step(who, dtype, compile_it == 'True')
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    for _ in range(2):
        step()
    print('ready', flops, flush=True)
    for _ in sys.stdin:
        seconds = []
        for _ in range(steps):
            start = clock()
            step()
            seconds.append(clock() - start)
        with open('/proc/self/status', encoding='ascii') as f:
            peak = next(int(line.split()[1]) / 2**20 for line in f if line.startswith('VmHWM'))
        print(statistics.median(seconds), peak, flush=True)


def start_side(who, dtype, compile_it):
    overrides = [f'--{key}={config[key]}' for key in ('steps', 'batch_size', 'block_size', 'n_layer')]
    process = subprocess.Popen([sys.executable, __file__, f'--peer={who},{dtype},{compile_it}', *overrides], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    ready = process.stdout.readline().split()
    if ready[:1] != ['ready']:
        raise BadInput(f'the benchmark of {who} did not start; its message stands above.')
    return process, float(ready[1])


def bench_step(dtype, compile_it):
    """Both sides stay alive and take turns; prints the median of the rounds' ratios and their range."""
    sides = {who: start_side(who, dtype, compile_it) for who in ('ours', 'transformers')}
    seconds, memory = {who: [] for who in sides}, {}
    for _ in range(rounds):
        for who, (process, _) in sides.items():
            process.stdin.write('go\n')
            process.stdin.flush()
            value, peak = process.stdout.readline().split()
            seconds[who].append(float(value))
            memory[who] = float(peak)
    for process, _ in sides.values():
        process.stdin.close()
        process.wait()
    ratios = [b / a for a, b in zip(seconds['ours'], seconds['transformers'])]
    tokens, flops = batch_size * block_size, sides['ours'][1]
    print(f"| {dtype} | {'compiled' if compile_it else 'eager'} | {tokens / statistics.median(seconds['ours']):.0f} | "
          f"{tokens / statistics.median(seconds['transformers']):.0f} | **{statistics.median(ratios):.2f}** "
          f"({min(ratios):.2f} to {max(ratios):.2f}) | {flops / statistics.median(seconds['ours']) / 1e9:.0f} | "
          f"{memory['ours']:.1f} / {memory['transformers']:.1f} |", flush=True)


def bench_data():
    """Millions of tokens per CPU-second from 200 MB of shards through MixtureLoader, 16 rows of 2048 at a time."""
    import numpy as np
    from data import MixtureLoader, Source, shard_bytes
    with tempfile.TemporaryDirectory() as folder:
        for name in ('a', 'b', 'c', 'd'):
            os.makedirs(f'{folder}/{name}/train')
            for i in range(5):
                with open(f'{folder}/{name}/train/{i:06d}.bin', 'wb') as f:
                    f.writelines(shard_bytes(np.random.default_rng(i).integers(0, 49152, 5_000_000), 49152))
        loader = MixtureLoader([Source(folder, name, 'train', 2048, 0, 49152) for name in 'abcd'],
                               {'a': 0.4, 'b': 0.3, 'c': 0.2, 'd': 0.1})
        rates = []
        for _ in range(rounds + 1):
            start = time.process_time()
            for _ in range(1000):
                loader.read(*loader.next_batch(16))
            rates.append(1000 * 16 * 2048 / (time.process_time() - start) / 1e6)
        row = np.zeros(2049, dtype=np.int32)
        tokens = np.memmap(f'{folder}/a/train/000000.bin', dtype='<u2', mode='r', offset=1024)
        start = time.process_time()
        for i in range(16_000):
            row[:] = tokens[i % 2000 * 2048:i % 2000 * 2048 + 2049]
        floor = 16_000 * 2048 / (time.process_time() - start) / 1e6
    print(f'data: {statistics.median(rates[1:]):.0f} million tokens per CPU-second ({min(rates[1:]):.0f} to {max(rates[1:]):.0f}); '
          f'the copy alone {floor:.0f}')


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
    from prepare.reading import local_files, read_batches, records_of
    from tokenizer import LLAMA3_PATTERN, load_tokenizer, make_tokenizer, save_tokenizer

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
                               capture_output=True, cwd=os.path.dirname(os.path.abspath(__file__)))
                rate = repeats * n_tokens / (time.perf_counter() - start)
                rows.append((n_tokens / seconds / 1e6, at_once / 1e6, rate / 1e6, rate * seconds / n_tokens / workers, rate / at_once,
                             repeats * seconds / (children() - cpu)))
            cells = [f'{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})' for v in zip(*rows)]
            print(f'| {kind} | ' + ' | '.join(cells) + ' |', flush=True)


def bench_evaluate():
    """Tokens of requests per second of CPU time (wall time on CUDA), evaluate.py against lm-eval's hf model."""
    import random
    from dataclasses import asdict
    import torch
    import checkpoint
    import hf
    from benchmarks import Scorer        # before lm_eval, for the sake of its imports
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from model import GPT, ModelConfig, init_weights
    from tokenizer import LLAMA3_PATTERN, make_tokenizer, save_tokenizer
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
    from common import tune_malloc
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


def in_turns(jobs, warm_up=True):
    """Median CPU seconds of every job, {name: function}, and their ratios to the first by round: alternating, `rounds` times."""
    seconds = {name: [] for name in jobs}
    for i in range(rounds + warm_up):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            if i or not warm_up:
                seconds[name].append(time.process_time() - start)
    first = next(iter(jobs))
    ratios = {name: [b / a for a, b in zip(seconds[first], values)] for name, values in seconds.items()}
    return {name: statistics.median(values) for name, values in seconds.items()}, ratios


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
            """As reweight.py: a direction for every domain, or one for all where they are large."""
            groups = [probe] if layers == 'all' else [{domain: batches} for domain, batches in probe.items()]
            directions = [probe_direction(model, group, layers) for group in groups]
            for batches in sources:
                source_products(model, batches, directions)
        medians, ratios = in_turns({'step': lambda: train_step(model, optimizer, parts), 'last': lambda: measure('last'), 'all': lambda: measure('all')},
                                   warm_up=not shape)
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
    medians, ratios = in_turns(jobs)
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
    from presence import MicroBatches
    model, optimizer, rows = small_model()
    parts = [rows(4) for _ in range(8)]
    sides = {mode: MicroBatches(model, 'first', mode, 8) for mode in ('stream', 'store')}
    medians, ratios = in_turns({'plain': lambda: train_step(model, optimizer, parts),
                                **{mode: (lambda micro=micro: train_step(model, optimizer, parts, micro)) for mode, micro in sides.items()}})
    print('presence: 12.6M parameters, 8 micro-batches of 4 rows of 256 tokens, float32\n\n| mode | s per step | against plain (range) |\n|---|---|---|')
    for mode, values in ratios.items():
        print(f'| {mode} | {medians[mode]:.2f} | **{statistics.median(values):.3f}** ({min(values):.3f} to {max(values):.3f}) |', flush=True)


def random_cache(n, vocab_size, k=64, draws=16):
    """kd.Cached of n tokens, random."""
    import torch
    from kd import Cached
    logq = torch.log_softmax(torch.randn(n, k + 1) * 3, 1)
    ids = torch.rand(n, vocab_size).topk(k, 1).indices if vocab_size < 10_000 else torch.randint(vocab_size // k, (n, k)) + torch.arange(k) * (vocab_size // k)
    return Cached(ids, logq[:, :k].contiguous(), logq[:, k].contiguous(), torch.randint(vocab_size, (n, draws)), torch.zeros(n), ids[:, 0],
                  logq[:, 0].contiguous(), torch.zeros(n, dtype=torch.long), None)


def bench_kd():
    """Steps of a student of 12.6M parameters, and the loss alone with a vocabulary of 128,256, in CPU time of one thread."""
    import functools
    import torch
    from kd import distillation_loss
    from loss import linear_cross_entropy
    from model import flops_per_token
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
    _, ratios = in_turns(jobs)
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
    _, ratios = in_turns(jobs)
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
    from loss import linear_cross_entropy
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


if peer == 'memory':
    measure_memory()
elif peer == 'kd_memory':
    measure_kd_memory()
elif peer:
    run_side()
else:
    import torch
    print(f'{time.strftime("%Y-%m-%d")}, Python {platform.python_version()}, torch {torch.__version__}, '
          f'{torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"}')
    if 'data' in parts:
        bench_data()
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
    if 'kd' in parts:
        bench_kd()
    if 'step' in parts:
        print(f'step: {n_layer} layers of SmolLM2-135M, B={batch_size} T={block_size}\n\n'
              '| dtype | mode | ours tok/s | transformers tok/s | ratio (range) | ours GFLOP/s | peak GiB |\n|---|---|---|---|---|---|---|')
        for _dtype in dtypes:
            for _compile in compiled:
                bench_step(_dtype, _compile)
