"""Benchmarks: training steps beside other codebases, single parts, and peaks of memory.

    python tools/bench.py steps                                          # speed of training steps
    python tools/bench.py steps --vs=transformers,litgpt,nanogpt-shape   # in turns with peers
    python tools/bench.py parts --parts="['loss','attention']"           # single parts
    python tools/bench.py memory --cases=plain,experts                   # against tools/plan.py
    python tools/bench.py gpu --out=out/gpu --text='text/*.jsonl.gz' --tokenizer=tokenizer.json
    python tools/bench.py gpu --out=out/gpu --rehearse=True              # the same on a CPU, tiny

All sides of a comparison run in turns, and a table gives the median and the range of the ratios.
On a CPU the time is CPU time of one thread, because the wall clock of a shared machine depends on
its other users. On a GPU it is wall time. docs/BENCHMARKS.md explains the columns and keeps the
results. --json=FILE writes the figures of `steps` and `parts` to a file as well.

steps: forward, backward, clipping and fused AdamW on random tokens, as train.py does them. A turn
is ten steps on a GPU, with one synchronisation at its end, and one step on a CPU. Every side has a
process of its own with the same memory settings, and all of them start at once. Peers come from
their PyPI packages: Llama of transformers (Qwen3 for shapes with QK-norm), the same with Liger's
kernels (`liger`, GPU only), GPT of LitGPT with its loss in one piece, and GPT-2 of transformers,
which has the shape of nanoGPT. `knob=value` is our own side with another value of a knob, as in
--vs=attention=flash,fp8=True. Compiled sides are compiled layer by layer. MFU counts FLOPs as PaLM
does, against the dense bf16 peak of the device.

parts: the functions `bench_...` below say what each of them measures. Some need knobs and run only
if they are named: tokenizer (--tokenizer and --text, for example --text='text/*.jsonl.gz'), fp8 and
train (--out, a folder for their data, and --text and --tokenizer for real text).

gpu: every check that needs a GPU, the most important first, in at most nine minutes. tools/
gpu_checks.py has the list. Results are in --out: results.md, results.json and the output of every
part.
"""
import collections
import functools
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from json import dump, dumps, loads
from types import SimpleNamespace

import _path  # noqa: F401  (puts the project's folder on the import path)

import numpy as np
import torch
import torch.nn.functional as F

from configurator import BadInput, RunFault, at_least, configure, one_of
from lib.device import device_name, leave_ranks, peak_flops, pick_dtype, start_ranks, tune_malloc
from tools import gpu_checks
from tools.commands import read_command, warn_unused

# -- knobs --
models: list | None = None       # names of SHAPES. None: what fits the device (steps), s1 (parts)
dtypes = ['auto']                # auto, as train.py chooses | float32 | bfloat16 by autocast
rounds: at_least(1) = 5          # turns of every side
tokens: at_least(1) | None = None    # tokens per row. None: those of the shape (steps), or 256
vs = ''                          # steps: peers, separated by commas
compiled = [False, True]         # steps: eager, compiled blocks, or both
rows: at_least(1) | None = None      # steps: rows of a step. None: those of the shape
kernels: one_of('auto', 'triton', 'torch') = 'auto'     # steps: as in train.py
attention: one_of('auto', 'cudnn', 'flash', 'fa3', 'fa4') = 'auto'      # steps: as in train.py
fp8 = False                      # steps: as in train.py
profile = False                  # steps: also print where the time goes
json = ''                        # file for all figures
parts: list | None = None        # parts, gpu: what to measure. None: everything
cases = ''                       # memory: names of CASES, separated by commas. '': all
tokenizer = ''                   # parts tokenizer, train and fp8: a file that load_tokenizer takes
text = ''                        # parts tokenizer, train and fp8: documents, as for prepare/text.py
out = 'out/gpu'                  # gpu, parts train and fp8: folder of results and data
minutes: at_least(0.1) = 9.0     # gpu: what does not fit into this time is skipped
fp8_steps: at_least(10) = 100    # part fp8: steps of every run
rehearse = False                 # gpu, parts: tiny sizes, to find mistakes before a GPU is there

SMALL = dict(vocab_size=8192, n_layer=6, n_head=6, n_kv_head=2, n_embd=384, ffn_dim=1024)
SMOLLM2 = dict(vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, ffn_dim=1536)
R1 = dict(vocab_size=128256, qk_norm=True, qk_norm_weight=False)
# name -> (model, rows, tokens) of a step on a CPU. A GPU takes 16 rows of 2,048 tokens.
SHAPES = {
    's1': (SMALL, 8, 512),
    'smollm2_135m': (SMOLLM2, 4, 512),
    '140m': (dict(R1, n_layer=15, n_head=9, n_kv_head=3, n_embd=576, ffn_dim=2048), 2, 512),
    '360m': (dict(R1, n_layer=15, n_head=16, n_kv_head=4, n_embd=1024, ffn_dim=4096), 1, 512),
    '950m': (dict(R1, n_layer=22, n_head=24, n_kv_head=6, n_embd=1536, ffn_dim=6144), 1, 256),
    # for rehearsals and tests
    'tiny': (dict(SMALL, vocab_size=512, n_layer=2, n_embd=96, ffn_dim=128), 2, 32),
}
# Models that are measured unless --models names others.
MODELS_ON_CPU = ['s1', 'smollm2_135m', '140m']
MODELS_ON_GPU = ['smollm2_135m', '140m', '360m', '950m']
# peer -> module that it needs
PEERS = dict(transformers='transformers', litgpt='litgpt', liger='liger_kernel')
PEERS['nanogpt-shape'] = 'transformers'
# Knobs of which a side of ours may have another value than the first side.
VARIANTS = ('kernels', 'attention', 'fp8')
# Steps of a turn on a GPU: the host runs ahead of it, as in train.py.
TURN = 10
PHASES = ('forward', 'backward', 'optimizer')
# A profiled event belongs to the first kind that has a word in its name. Only attention by blocks
# uses batched products.
KINDS = {
    'attention': ['attention', 'blockwise', 'flash', 'fmha', 'sdpa', 'aten::bmm', 'aten::baddbmm'],
    'loss': ['cross_entropy'],
    'adamw': ['adam'],
    'products': [
        'aten::mm', 'aten::addmm', 'aten::_scaled_mm', 'linear_pointwise', 'gemm', 'nvjet',
        'cutlass', 'xmma'],
}
# Kernels that torch.compile makes have the operators that they fuse in their names.
FUSED = ('triton_poi_', 'triton_red_', 'triton_per_')
# Knobs of train.py that the optimizer and the plan of memory read.
KNOBS = dict(batch_size=4, block_size=512, activation_checkpointing='none', optimizer='adamw')
KNOBS.update(reshard_after_forward=False, dtype='float32', grad_accum=1)
KNOBS.update(dp_replicate=1, dp_shard=1, tp=1, ep=1)
KNOBS.update(learning_rate=3e-4, weight_decay=0.1, beta1=0.9, beta2=0.95, adam_eps=1e-8)

# -- measuring -------------------------------------------------------------------------------------
# A function imports what it measures, so that `start` of a side contains no imports of another one.


def clock():
    """Returns seconds: wall time after the queue of a GPU, or CPU time of this process."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds_of(job):
    start = clock()
    job()
    return clock() - start


def in_turns(jobs, n_rounds, warm_up=True):
    """Runs jobs, name -> function, in turns.

    Returns median seconds (name -> float) and ratios to the first job (name -> one per round).
    """
    # The jobs alternate, so that a change of the machine's speed affects all of them.
    seconds = {name: [] for name in jobs}
    # The round of warm-up compiles, allocates and fills caches, so it is not counted.
    for i in range(n_rounds + warm_up):
        for name, job in jobs.items():
            spent = seconds_of(job)
            if i >= warm_up:
                seconds[name].append(spent)
    first = seconds[next(iter(jobs))]
    medians = {}
    ratios = {}
    for name, values in seconds.items():
        medians[name] = statistics.median(values)
        # Ratios are taken within a round, in which all jobs had the same machine.
        ratios[name] = [value / base for value, base in zip(values, first, strict=True)]
    return medians, ratios


def spread(values, spec='.2f'):
    """Returns the median and the range as text."""
    middle = statistics.median(values)
    return f'**{middle:{spec}}** ({min(values):{spec}} to {max(values):{spec}})'


TABLES = []     # what has been printed: dicts with title, columns and rows
ABOUT = {}      # date, versions and device


def print_row(*cells):
    TABLES[-1]['rows'].append([str(cell) for cell in cells])
    print('| ' + ' | '.join(TABLES[-1]['rows'][-1]) + ' |', flush=True)


def print_head(text, *names):
    TABLES.append(dict(title=text, columns=names, rows=[]))
    print('\n' + text + '\n')
    print('| ' + ' | '.join(names) + ' |')
    print('|---' * len(names) + '|', flush=True)


def write_json(**figures):
    """Writes the figures, and all tables so far, to --json."""
    if json:
        with open(json, 'w', encoding='utf-8') as f:
            dump({**ABOUT, **figures, 'tables': TABLES}, f, indent=1)


def tensor_peak(work):
    """Returns the bytes of tensors that work() holds at its peak beyond those that existed before.

    They are counted by the allocator on a GPU and by the profiler on a CPU.
    """
    # The resident memory of the process would include what malloc keeps.
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as found:
        work()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == '[memory]']
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def make_model(shape, device):
    from model import GPT, ModelConfig, init_weights
    model = GPT(ModelConfig(**shape)).to(device)
    init_weights(model, 0)
    return model


def make_optimizer(model):
    options = dict(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return torch.optim.AdamW(model.parameters(), **options)


class Trainer:
    """A model of a shape, its optimizer and random rows of n_tokens tokens."""

    def __init__(self, shape, dtype, n_tokens, device):
        self.model = make_model(shape, device)
        self.optimizer = make_optimizer(self.model)
        self.dtype = dtype
        self.n_tokens = n_tokens
        self.device = device

    def rows(self, n, n_tokens=None):
        """Returns inputs and targets, (n, T) int64 both, and None in place of document ids."""
        size = (n, (n_tokens or self.n_tokens) + 1)
        # The division makes some tokens frequent, so that the gradients of batches agree.
        ids = torch.randint(self.model.config.vocab_size, size, device=self.device) // 7
        return ids[:, :-1], ids[:, 1:].contiguous(), None

    def backward(self, batch, n_batches, objective_of=None):
        """objective_of makes the objective of GPT.loss from the inputs. None: cross-entropy."""
        inputs, targets, _ = batch
        with autocast(self.device, self.dtype):
            objective = objective_of(inputs) if objective_of else None
            loss = self.model.loss(inputs, targets, objective=objective)[0]
        (loss / (targets.numel() * n_batches)).backward()

    def step(self, batches, objective_of=None, taker=None):
        """Takes a step, plain or with a gradient taker of methods/."""
        if taker:
            taker.begin(0, 1e-4, [batch[1].numel() for batch in batches])
        for batch in batches:
            self.backward(batch, len(batches), objective_of)
            if taker:
                taker.add(None, None)
        if taker:
            taker.finish()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


# -- steps: one side in its own process ------------------------------------------------------------


@dataclass
class Work:
    """What every side of a comparison computes."""

    model: str
    dtype: str
    compiled: bool
    rows: int
    tokens: int
    kernels: str
    attention: str
    fp8: bool


def build_litgpt(s, length):
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy
    sizes = dict(n_layer=s['n_layer'], n_head=s['n_head'], n_query_groups=s['n_kv_head'])
    sizes.update(n_embd=s['n_embd'], intermediate_size=s['ffn_dim'], block_size=length)
    sizes.update(vocab_size=s['vocab_size'], padded_vocab_size=s['vocab_size'], bias=False)
    kinds = dict(norm_class_name='RMSNorm', mlp_class_name='LLaMAMLP', parallel_residual=False)
    kinds.update(rotary_percentage=1.0, norm_qk=s.get('qk_norm', False))
    model = GPT(Config(**sizes, **kinds))
    # All sides share the weight of the embedding and of the output layer.
    model.lm_head.weight = model.transformer.wte.weight
    return model, lambda run, x, y: chunked_cross_entropy(run(x), y, chunk_size=0)


def build_transformers(who, s, length, compiled):
    import transformers
    qk_norm = s.get('qk_norm', False)
    if who == 'liger':
        from liger_kernel import transformers as liger

        # The patch replaces functions and classes, so it comes before the model is made.
        patch = liger.apply_liger_kernel_to_llama
        if qk_norm:
            patch = liger.apply_liger_kernel_to_qwen3
        patch(fused_linear_cross_entropy=True, cross_entropy=False)
    # In training, a KV cache would only take memory.
    fields = dict(vocab_size=s['vocab_size'], use_cache=False, attn_implementation='sdpa')
    if who == 'nanogpt-shape':
        fields.update(n_layer=s['n_layer'], n_head=s['n_head'], n_embd=s['n_embd'])
        # GPT-2 has dropout by default, which the other sides do not compute.
        fields.update(n_positions=length, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields))
    else:
        fields.update(hidden_size=s['n_embd'], intermediate_size=s['ffn_dim'])
        fields.update(num_hidden_layers=s['n_layer'], num_attention_heads=s['n_head'])
        fields.update(num_key_value_heads=s['n_kv_head'], head_dim=s['n_embd'] // s['n_head'])
        fields.update(tie_word_embeddings=True)
        if qk_norm:
            model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**fields))
        else:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    model.train()
    # The targets are shifted already. `labels` only turns the loss on.
    if not compiled or who == 'liger':
        return model, lambda model, x, y: model(input_ids=x, shift_labels=y, labels=y).loss

    # Compiled by layers, a peer still gets the fusions of its output layer and loss.
    @torch.compile
    def head(h, y):
        logits = model.lm_head(h)
        labels = dict(labels=y, shift_labels=y, vocab_size=s['vocab_size'])
        return model.loss_function(logits, **labels)

    return model, lambda model, x, y: head(model.base_model(input_ids=x).last_hidden_state, y)


def use_attention(work, device):
    """Chooses the kernels of attention as train.py does. Returns their names."""
    from ops import attention
    shape = SHAPES[work.model][0]
    dtype = pick_dtype(work.dtype, device)[0]
    return attention.use(work.attention, device, dtype, shape['n_embd'] // shape['n_head'])


def build_ours(work, device):
    """Returns our model of a shape, with the knobs of `work`."""
    from lib.parallel import prepare_blocks
    from ops import kernels
    kernels.use(work.kernels, device)
    use_attention(work, device)
    model = make_model(SHAPES[work.model][0], device)
    if work.fp8:
        from ops import fp8
        fp8.check({**KNOBS, **asdict(model.config), 'dtype': work.dtype}, device)
        fp8.convert(model, device)
    prepare_blocks(model, work.compiled)
    return model


def build_side(who, work, device):
    """Returns a model and its loss as a function of inputs and targets, (B, T) int64."""
    if who == 'ours':
        model = build_ours(work, device)
        return model, lambda x, y: model.loss(x, y)[0] / y.numel()
    shape = SHAPES[work.model][0]
    if who == 'litgpt':
        model, loss = build_litgpt(shape, work.tokens)
        layers = model.transformer.h
    else:
        model, loss = build_transformers(who, shape, work.tokens, work.compiled)
        layers = getattr(model.base_model, 'layers', None) or model.base_model.h
    model.to(device)
    if work.compiled:
        # Layers have one shape, so they share one graph. Compiled as a whole, a peer starts several
        # times as late and is not faster (docs/BENCHMARKS.md).
        for layer in layers:
            layer.compile()
    return model, functools.partial(loss, model)


def make_update(who, model, device):
    """Returns a function of the loss, () on the device, that does what follows a backward pass."""
    if who != 'ours':
        optimizer = make_optimizer(model)

        def update(loss):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return update
    from lib import parallel
    optimizers = parallel.make_optimizers(model, KNOBS)
    not_finite = torch.zeros((), device=device)

    def update(loss):
        # As in train.py, which checks loss and norm on the device.
        norm = parallel.gradient_norm(model)
        bad = (~torch.isfinite(loss.detach() + norm)).float()
        not_finite.copy_(torch.maximum(not_finite, bad))
        parallel.clip_gradients(model, 1.0, norm)
        for optimizer in optimizers:
            parallel.step(optimizer, not_finite)
            optimizer.zero_grad(set_to_none=True)

    return update


def run_side(who, work, device):
    """Prints a line of JSON about the model after its first steps, then answers lines on stdin.

    'turn' is answered by the seconds of a step and the memory, 'phases' by the seconds of PHASES,
    'profile' by the seconds by kind. A side that lacks memory for its first steps answers that it
    waits, and tries them again at the next line.
    """
    tune_malloc()
    torch.manual_seed(0)
    dtype = pick_dtype(work.dtype, device)[0]
    on_gpu = device.type == 'cuda'
    size = (work.rows, work.tokens + 1)
    ids = torch.randint(SHAPES[work.model][0]['vocab_size'], size, device=device)
    inputs = ids[:, :-1].contiguous()
    targets = ids[:, 1:].contiguous()
    start = start_clock(on_gpu)
    if work.compiled:
        from lib.parallel import warm_compiler
        warm_compiler(device)
    model, loss = build_side(who, work, device)
    update = make_update(who, model, device)

    def step(mark=lambda: None):
        """mark: called between PHASES and around them"""
        mark()
        with autocast(device, dtype):
            value = loss(inputs, targets)
        mark()
        value.backward()
        mark()
        update(value)
        mark()

    def turn(n_steps):
        for _ in range(n_steps):
            step()

    if not starts(step):
        report(dict(waits=True), on_gpu)
        sys.stdin.readline()
        step()
    if on_gpu:
        torch.cuda.synchronize()
    about = dict(start_s=start_clock(on_gpu) - start, tokens=targets.numel(), dtype=str(dtype)[6:])
    about['parameters'] = sum(p.numel() for p in model.parameters())
    # The first step allocates the states of AdamW, so that only the second has the full peak.
    step()
    if who == 'ours':
        from model import flops_per_token
        about['flops'] = flops_per_token(model.config, work.tokens)
        about['causal'] = flops_per_token(model.config, work.tokens, causal=True)
        about['attention'] = use_attention(work, device)
    report(about, on_gpu)
    n_steps = TURN if on_gpu else 1
    for line in sys.stdin:
        # The memory that the last turn gave back is allocated again outside the timed steps.
        if on_gpu:
            step()
        if line.strip() == 'profile':
            report(profile_step(step, on_gpu), on_gpu)
        elif line.strip() == 'phases':
            at = []
            step(lambda: at.append(clock()))  # noqa: B023  (called before the next line)
            spans = [after - before for before, after in itertools.pairwise(at)]
            report(dict(zip(PHASES, spans, strict=True)), on_gpu)
        else:
            seconds = seconds_of(functools.partial(turn, n_steps)) / n_steps
            report(dict(step=seconds, memory=peak_gib(on_gpu)), on_gpu)


def start_clock(on_gpu):
    """Returns seconds for the start: wall time, or CPU time of this process and its compilers."""
    return time.perf_counter() if on_gpu else sum(os.times()[:4])


def starts(step):
    """Whether the first step has the memory that it needs. Other sides start at the same time."""
    try:
        step()
    except RuntimeError as error:
        # Not all libraries raise torch's own error.
        if 'out of memory' not in str(error) and 'ALLOC_FAILED' not in str(error):
            raise
        return False
    return True


def report(figures, on_gpu):
    # All sides are alive at once, and the others need the memory.
    if on_gpu:
        torch.cuda.empty_cache()
    print(dumps(figures), flush=True)


def peak_gib(on_gpu):
    """Returns the peak of memory: of tensors on a GPU, of the process on a CPU."""
    if on_gpu:
        return torch.cuda.max_memory_allocated() / 2**30
    with open('/proc/self/status', encoding='ascii') as f:
        return next(int(line.split()[1]) / 2**20 for line in f if line.startswith('VmHWM'))


def kind_of(name):
    """Returns the entry of KINDS for the name of an event, or 'rest'."""
    if name.startswith(FUSED):
        return 'rest'
    for kind, words in KINDS.items():
        if any(word in name for word in words):
            return kind
    return 'rest'


def profile_step(step, on_gpu):
    """Returns the seconds of a step by kind, and of the ten longest events of no kind by name."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as found:
        step()
    kinds = dict(products=0.0, attention=0.0, loss=0.0, adamw=0.0, rest=0.0)
    others = {}
    for event in found.key_averages():
        # Annotations span kernels that are counted by themselves.
        if getattr(event, 'is_user_annotation', False):
            continue
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        kind = kind_of(event.key.lower())
        kinds[kind] += seconds
        if kind == 'rest':
            others[event.key] = seconds
    longest = sorted(others.items(), key=lambda item: -item[1])[:10]
    return dict(kinds=kinds, others=dict(longest))


# -- steps: the table ------------------------------------------------------------------------------


class Side:
    """A process that takes training steps of one codebase when it is asked to."""

    def __init__(self, who, work):
        """Starts the process. who: 'ours', a peer, or 'knob=value' for ours with another value."""
        if '=' in who:
            name, _, value = who.partition('=')
            work = replace(work, **{name: value})
            who = 'ours'
        options = dict(vs=who, models=[work.model], dtypes=[work.dtype], compiled=[work.compiled])
        for name in ('rows', 'tokens', *VARIANTS):
            options[name] = getattr(work, name)
        command = [sys.executable, __file__, 'side', *(f'--{k}={v}' for k, v in options.items())]
        # CPU times are comparable with one thread only. The caller's environment takes precedence.
        env = {'OMP_NUM_THREADS': '1', **os.environ}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, env=env)
        self.turns = []
        self.about = None

    def read(self):
        """Returns the next line of JSON, or None when the process has ended."""
        for line in self.process.stdout:
            # A library may print a line of its own.
            if line.startswith('{'):
                return loads(line)
        return None

    def write(self, what):
        self.process.stdin.write(what + '\n')
        self.process.stdin.flush()

    def ask(self, what):
        self.write(what)
        answer = self.read()
        if answer is None:
            raise RunFault('one side of the benchmark ended early. Its message stands above.')
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def median(self, key):
        return statistics.median(turn[key] for turn in self.turns)


def start_sides(names, work):
    """Starts all sides at once. Returns those that run, name -> Side, and the seconds it took."""
    start = time.perf_counter()
    sides = {who: Side(who, work) for who in names}
    for side in sides.values():
        # A side that fails prints its message and leaves the others to go on.
        side.about = side.read()
    for side in sides.values():
        # Together the first steps may need more memory than there is.
        if side.about and 'waits' in side.about:
            side.write('start')
            side.about = side.read()
    return {who: side for who, side in sides.items() if side.about}, time.perf_counter() - start


def machine_speed(dtype, device):
    """Returns FLOP/s of a large matrix product in a dtype, and bytes/s of a large copy."""
    n, size = (8192, 2**30) if device.type == 'cuda' else (2048, 2**28)
    a = torch.randn(n, n, device=device).to(getattr(torch, dtype))
    # Pages that nobody has written share one page of zeros, so reading them would be too fast.
    big = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    copy = torch.empty_like(big)
    seconds = []
    for job in (lambda: a @ a, lambda: copy.copy_(big)):
        # The best of three is the ceiling, since other users of the machine only take time away.
        job()
        seconds.append(min(seconds_of(job) for _ in range(3)))
    return 2 * n**3 / seconds[0], 2 * size / seconds[1]


def floor_seconds(s, about, ceiling, bandwidth):
    """Returns the seconds that a step must take for its matrix FLOPs and for its memory traffic.

    The traffic is what remains when everything that can be fused is fused: 17 C + 5 (H + K) D + 8 F
    elements per token and block (norms, rotation, residuals, SwiGLU, forward and backward), 5 V per
    token for the logits, and 28 bytes per parameter for AdamW.
    """
    heads = (s['n_head'] + s['n_kv_head']) * s['n_embd'] // s['n_head']
    per_block = 17 * s['n_embd'] + 5 * heads + 8 * s['ffn_dim']
    n_elements = about['tokens'] * (s['n_layer'] * per_block + 5 * s['vocab_size'])
    item = 4 if about['dtype'] == 'float32' else 2
    moved = n_elements * item + 28 * about['parameters']
    return about['tokens'] * about['causal'] / ceiling, moved / bandwidth


def bench_model(work, peers, n_rounds, device):
    """Prints a row for us and for every peer. Returns the figures as a dict."""
    mode = 'compiled' if work.compiled else 'eager'
    running, started_s = start_sides(('ours', *peers), work)
    for who in peers:
        if who not in running:
            print_row(work.model, f'{work.dtype} {mode}', f'{who} did not start', *[''] * 11)
    if 'ours' not in running:
        raise RunFault('our side of the benchmark did not start. Its message stands above.')
    ours = running['ours']
    about = ours.about
    # The ceiling is measured in every round, because clock rates change under load.
    speeds = []
    for _ in range(n_rounds):
        speeds.append(machine_speed(about['dtype'], device))
        for side in running.values():
            side.turns.append(side.ask('turn'))
    # Steps that are profiled or synchronised are slower, so they follow the timed turns.
    phases = {who: side.ask('phases') for who, side in running.items()}
    profiles = {who: side.ask('profile') for who, side in running.items()}
    for side in running.values():
        side.close()

    n_tokens = about['tokens']
    step_s = ours.median('step')
    ceiling = statistics.median(speed[0] for speed in speeds)
    bandwidth = statistics.median(speed[1] for speed in speeds)
    products, moved = floor_seconds(SHAPES[work.model][0], about, ceiling, bandwidth)
    kinds = profiles['ours']['kinds']
    # The ceiling is compared with the FLOPs that causal attention needs. MFU counts like PaLM.
    rate = n_tokens * about['causal'] / step_s
    floor_share = (kinds['products'] + kinds['attention']) / sum(kinds.values())
    peak = peak_flops(device)
    mfu = n_tokens * about['flops'] / step_s / peak if peak else None
    record = dict(model=work.model, dtype=about['dtype'], compiled=work.compiled, tokens=n_tokens)
    record.update(tokens_per_second=n_tokens / step_s, mfu=mfu, flops_per_second=rate)
    record.update(ceiling=ceiling, bandwidth=bandwidth, memory=ours.turns[-1]['memory'])
    record.update(floor_share=floor_share, roofline_s=dict(products=products, moved=moved))
    record['attention'] = about['attention']
    record.update(start_s=about['start_s'], started_s=started_s, step_s=step_s)
    record.update(**profiles['ours'], peers={}, seconds=phases['ours'])
    if device.type == 'cuda':
        record['idle_s'] = step_s - sum(kinds.values())
    for who, side in running.items():
        theirs = side.median('step')
        memory = side.turns[-1]['memory']
        ratio = ''
        floors = [''] * 4
        if who == 'ours':
            floors = ['n/a' if mfu is None else f'{mfu:.1%}']
            floors.append(f'{rate / 1e9:,.0f} of {ceiling / 1e9:,.0f}')
            floors += [f'{(products + moved) / step_s:.0%}', f'{floor_share:.0%}']
        else:
            pairs = zip(side.turns, ours.turns, strict=True)
            ratios = [turn['step'] / mine['step'] for turn, mine in pairs]
            ratio = spread(ratios)
            figures = dict(tokens_per_second=n_tokens / theirs, ratio=statistics.median(ratios))
            figures.update(ratios=ratios, memory=memory, kinds=profiles[who]['kinds'])
            figures.update(start_s=side.about['start_s'], step_s=theirs)
            record['peers'][who] = figures
        cells = [f"{about['dtype']} {mode}", who, f"{side.about['start_s']:.0f}"]
        times = [f'{seconds * 1e3:,.0f}' for seconds in phases[who].values()]
        speed = f'{n_tokens / theirs:,.0f}'
        print_row(work.model, *cells, speed, ratio, *floors, f'{memory:.2f}', *times)
    return record


def bench_steps(works, peers, n_rounds, device):
    """Prints the table. Returns the figures of all works."""
    names = 'model; dtype, mode; side; start, s; tok/s; ours / theirs; MFU; GFLOP/s of ceiling'
    names += '; roofline / step; products + attention / step; peak GiB'
    phases = [f'{phase}, ms' for phase in PHASES]
    text = f'{n_rounds} rounds. auto is {pick_dtype("auto", device)[0]}. '
    text += 'The times of forward, backward and optimizer are of one step with waits between them.'
    print_head(text, *names.split('; '), *phases)
    records = []
    for work in works:
        records.append(bench_model(work, peers, n_rounds, device))
        write_json(records=records)
    return records


def print_profile(records):
    """Prints where the time of our steps goes, beside the time that they must take."""
    must = ['must: products and attention at the ceiling, ms', 'must: bytes moved, ms']
    kinds = ['products', 'attention', 'loss kernel', 'AdamW', 'other kernels', 'idle']
    names = ('model', 'attention by', 'step, ms', *must, *kinds, 'the costliest of the other')
    print_head('Our steps', *names)
    for r in records:
        mode = 'compiled' if r['compiled'] else 'eager'
        seconds = [r['step_s'], *r['roofline_s'].values(), *r['kinds'].values()]
        longest = [f'{name[:60]} {s * 1e3:,.0f}' for name, s in list(r['others'].items())[:4]]
        times = [f'{s * 1e3:,.0f}' for s in seconds]
        idle = f"{r['idle_s'] * 1e3:,.0f}" if 'idle_s' in r else 'n/a'
        name = f"{r['model']} {r['dtype']} {mode}"
        print_row(name, r['attention'], *times, idle, ', '.join(longest))


# -- parts that take a model of SHAPES -------------------------------------------------------------


def bench_influence(trainer, n_rounds):
    """Measurements of influence against steps, work on single rows, and the memory of both."""
    from influence import (
        SMALL,
        ghost_sqnorm,
        measure_probe,
        products_of_batches,
        products_of_rows,
        row_influence,
    )
    from methods.estimates import probe_direction
    from methods.reweight import flops_of_rows
    from model import flops_per_token
    model = trainer.model
    batches = [trainer.rows(16), trainer.rows(16)]
    # Random rows agree on no direction. The same rows several times give the probe one.
    agreeing = [trainer.rows(16)] * 4
    probe = {domain: [*agreeing, trainer.rows(n)] for domain, n in (('a', 2), ('b', 3), ('c', 3))}
    # As in methods/reweight.py: single rows of all sources together, in batches of training's size,
    # where a row's gradient is small; else eight batches of every source.
    by_rows = [trainer.rows(16) for _ in range(10)]
    by_batches = [trainer.rows(4) for _ in range(40)]
    n_rows = 200 + 160

    def measure(layers):
        with autocast(trainer.device, trainer.dtype):
            measured = measure_probe(model, probe, layers)
            if layers in SMALL:
                for source in by_rows:
                    products_of_rows(model, source, measured)
            else:
                products_of_batches(model, by_batches, measured)

    jobs = {'step': functools.partial(trainer.step, batches)}
    jobs.update({layers: functools.partial(measure, layers) for layers in ('all', 'last')})
    # A measurement takes minutes on a CPU. On a GPU the first one compiles kernels.
    medians, ratios = in_turns(jobs, n_rounds, warm_up=trainer.device.type == 'cuda')
    text = '200 rows of three probe sets and 5 x 32 rows of sources, against 250 steps of 32 rows. '
    text += 'The floor is the time of training on as many rows times the share of its FLOPs'
    names = ('layers', 'a step, s', 'a measurement, s', 'share of 250 steps', 'time / floor')
    print_head(text, *names)
    for layers in ('all', 'last'):
        shares = [ratio / 250 for ratio in ratios[layers]]
        times = [f"{medians['step']:.2f}", f'{medians[layers]:.1f}']
        of_training = flops_of_rows(model.config, layers, trainer.n_tokens)
        of_training /= trainer.n_tokens * flops_per_token(model.config, trainer.n_tokens)
        floors = [ratio / (n_rows / 32 * of_training) for ratio in ratios[layers]]
        print_row(layers, *times, spread(shares, '.2%'), spread(floors))

    def direction_of(batch, n_domains=1):
        return probe_direction(model, {i: [batch] * 4 for i in range(n_domains)}, 'all')

    def backward():
        trainer.backward(batches[0], 1)
        model.zero_grad()

    batch = batches[0]
    direction = direction_of(batch)
    jobs = {
        'forward and backward': backward,
        'influence of the rows on a direction': lambda: row_influence(model, batch, direction),
        'their squared norms': lambda: ghost_sqnorm(model, batch, 'all'),
    }
    with autocast(trainer.device, trainer.dtype):
        _, ratios = in_turns(jobs, n_rounds)
    print_head('Work on 16 rows in units of their forward and backward', 'job', 'units')
    for name, values in ratios.items():
        print_row(name, spread(values))

    # With so few tokens the activations take little beside the parameters.
    small = trainer.rows(2, 8)
    gradient = sum(p.nbytes for p in model.parameters())
    jobs = {
        'accumulation of two micro-batches': lambda: trainer.step([small, small]),
        'a direction of one domain': lambda: direction_of(small),
        'a direction of three domains': lambda: direction_of(small, 3),
        'sources': lambda: row_influence(model, small, direction_of(small)),
    }
    print_head(f'Memory beyond parameters, in gradients of {gradient / 2**20:.0f} MiB', 'job', '')
    for name, job in jobs.items():
        print_row(name, f'{tensor_peak(job) / gradient:.2f}')


def bench_presence(trainer, n_rounds):
    """A step of 8 micro-batches of 4 rows that PRESENCE weighs, against a plain step."""
    from methods.presence import Presence, PresenceConfig
    batches = [trainer.rows(4) for _ in range(8)]
    jobs = {'plain': functools.partial(trainer.step, batches)}
    for mode in ('stream', 'store'):
        config = asdict(PresenceConfig(presence=mode))
        training = SimpleNamespace(config=config, model=trainer.model, n_steps=100)
        taker = Presence(training, len(batches))
        jobs[mode] = functools.partial(trainer.step, batches, taker=taker)
    medians, ratios = in_turns(jobs, n_rounds)
    print_head('8 micro-batches of 4 rows', 'mode', 's per step', 'against plain')
    for mode, values in ratios.items():
        print_row(mode, f'{medians[mode]:.2f}', spread(values, '.3f'))


def random_cache(n, vocab_size, device, k=64, draws=16):
    """Returns a random kd.Cached of n tokens."""
    from kd import Cached
    logq = torch.log_softmax(torch.randn(n, k + 1) * 3, 1)
    part = vocab_size // k
    # Every id comes from a part of its own, because a cache names no id of a token twice.
    ids = torch.randint(part, (n, k)) + torch.arange(k) * part
    drawn = torch.randint(vocab_size, (n, draws))
    zeros = torch.zeros(n)
    tensors = [ids, logq[:, :k].contiguous(), logq[:, k].contiguous(), drawn, zeros]
    tensors += [ids[:, 0].contiguous(), logq[:, 0].contiguous(), zeros.long()]
    return Cached(*(t.to(device) for t in tensors), None)


def distil(h, weight, targets, token_weights=None, *, teacher, kind='forward'):
    """The objective of GPT.loss for distillation. teacher: as in kd.distillation_loss."""
    from kd import distillation_loss
    total, found = distillation_loss(h, weight, targets, token_weights, teacher=teacher, kind=kind)
    return total, found[1], found[2].bool()


def bench_kd(trainer, n_rounds):
    """A step of distillation, from a cache and from teachers that run, against a plain step."""
    from model import count_parameters, flops_per_token
    config = trainer.model.config
    batches = [trainer.rows(8), trainer.rows(8)]
    cached = random_cache(8 * trainer.n_tokens, config.vocab_size, trainer.device)

    def from_cache(inputs):
        return functools.partial(distil, teacher=cached)

    def from_teacher(teacher, inputs):
        # As in kd.py: the teacher's weights have the dtype already.
        with torch.no_grad(), torch.autocast(trainer.device.type, enabled=False):
            hidden = teacher(inputs).flatten(0, 1)
        return functools.partial(distil, teacher=(hidden, teacher.output_weight))

    jobs = {'plain': functools.partial(trainer.step, batches)}
    jobs['cache of top 64'] = functools.partial(trainer.step, batches, from_cache)
    floors = dict.fromkeys(jobs, 1.0)
    larger = dict(n_layer=12, n_head=12, n_kv_head=4, n_embd=640, ffn_dim=1728, head_dim=64)
    for changes in ({}, larger):
        teacher = make_model({**asdict(config), **changes}, trainer.device)
        teacher = teacher.frozen(trainer.dtype).eval()
        name = f"a teacher of {count_parameters(teacher.config)['total'] / 1e6:.0f}M"
        objective_of = functools.partial(from_teacher, teacher)
        jobs[name] = functools.partial(trainer.step, batches, objective_of)
        # A forward pass is a third of the FLOPs of a step.
        work = flops_per_token(teacher.config, trainer.n_tokens) / 3
        floors[name] = 1 + work / flops_per_token(config, trainer.n_tokens)
    _, ratios = in_turns(jobs, n_rounds)
    print_head('2 micro-batches of 8 rows', 'teacher', 'floor by FLOPs', 'against plain')
    for name, values in ratios.items():
        print_row(name, f'{floors[name]:.2f}', spread(values, '.3f'))


# -- parts with sizes of their own -----------------------------------------------------------------


def bench_loader(n_rounds, device):
    """Rows from 200 MB of shards in the page cache, 16 of 2,048 tokens at a time."""
    from data import MixtureLoader, Source
    from lib.shards import shard_bytes
    shares = {'a': 0.4, 'b': 0.3, 'c': 0.2, 'd': 0.1}
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for name in shares:
            os.makedirs(f'{folder}/{name}/train')
            ids = rng.integers(0, 49152, 25_000_000)
            with open(f'{folder}/{name}/train/000000.bin', 'wb') as f:
                f.writelines(shard_bytes(ids, 49152))
        sources = [Source(folder, name, 'train', 2048, 0, 49152) for name in shares]
        loader = MixtureLoader(sources, shares)
        row = np.zeros(2049, dtype=np.int32)
        shard = np.memmap(f'{folder}/a/train/000000.bin', dtype='<u2', mode='r', offset=1024)

        # The floor is one copy of every row from uint16 to int32.
        def copy():
            for i in range(16_000):
                start = i % 2000 * 2048
                row[:] = shard[start : start + 2049]

        def read():
            for _ in range(1000):
                loader.read(*loader.next_batch(16))

        medians, ratios = in_turns({'a bare copy to int32': copy, 'MixtureLoader': read}, n_rounds)
    print_head('loader', 'side', 'million tokens/s', 'time against the copy')
    for name, seconds in medians.items():
        print_row(name, f'{16_000 * 2048 / seconds / 1e6:.0f}', spread(ratios[name]))


def bench_loss(n_rounds, device):
    """The output layer and its loss, forward and backward: ours, distillation and others."""
    from ops.loss import linear_cross_entropy
    on_gpu = device.type == 'cuda'
    n = 32768 if on_gpu else 2048
    n_memory = 4096
    V = R1['vocab_size']
    if rehearse:
        n = n_memory = 64
        V = 1024
    dtype = torch.bfloat16 if on_gpu else torch.float32

    def jobs_of(n, width):
        """Returns name -> function that computes the mean loss and both gradients."""

        def some(n_rows, scale):
            return (torch.randn(n_rows, width, device=device) * scale).to(dtype)

        h = some(n, 1.0).requires_grad_()
        weight = some(V, 0.03).requires_grad_()
        targets = torch.randint(V, (n,), device=device)
        teacher = (some(n, 1.0), some(V, 0.03))
        cached = random_cache(n, V, device)
        losses = {'ours': lambda: linear_cross_entropy(h, weight, targets)[0] / n}
        # On a GPU the full logits of 32,768 tokens would take 67 GB.
        if not on_gpu:
            losses['full logits'] = lambda: F.cross_entropy(h @ weight.T, targets)
        if find_spec('torch.nn.modules.linear_cross_entropy_options'):
            from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

            for n_rows in (512, 1024):
                options = LinearCrossEntropyOptions(batch_chunk_size=n_rows)
                loss = functools.partial(F.linear_cross_entropy, h, weight, targets)
                name = f'F.linear_cross_entropy, chunks of {n_rows}'
                losses[name] = functools.partial(loss, options=options)
        if on_gpu and find_spec('liger_kernel'):
            from liger_kernel.ops import fused_linear_cross_entropy as liger

            apply = liger.LigerFusedLinearCrossEntropyFunction.apply
            losses['Liger'] = lambda: apply(h, weight, targets)[0]
        losses['distillation, top 64 of a cache'] = lambda: (
            distil(h, weight, targets, teacher=cached)[0] / n
        )
        for kind in ('forward', 'reverse', 'js'):
            losses[f'distillation, {kind}'] = lambda kind=kind: (
                distil(h, weight, targets, teacher=teacher, kind=kind)[0] / n
            )

        def run(loss):
            # Adding to old gradients would cost every job another pass over the weight.
            h.grad = weight.grad = None
            loss().backward()

        return {name: functools.partial(run, loss) for name, loss in losses.items()}

    # The width does not change the memory beyond the gradient of the weight.
    memory = {}
    logits = n_memory * V * 4
    for name, job in jobs_of(n_memory, 64).items():
        memory[name] = (tensor_peak(job) - 64 * V * dtype.itemsize) / logits
    text = f'loss: {n:,} tokens, vocabulary {V:,}, {str(dtype)[6:]}. TFLOP/s: 6 C V per token. '
    text += f"Memory: {n_memory:,} tokens, share of their fp32 logits beyond the weight's gradient"
    print_head(text, 'width', 'side', 'seconds', 'TFLOP/s', 'side / ours', 'memory')
    for width in (576, 1024, 1536) if on_gpu else (576,):
        medians, ratios = in_turns(jobs_of(n, width), n_rounds)
        for name, seconds in medians.items():
            rate = f'{6 * n * width * V / seconds / 1e12:.3f}'
            cells = [f'{seconds:.3f}', rate, spread(ratios[name]), f'{memory[name]:.1%}']
            print_row(width, name, *cells)


def bench_attention(n_rounds, device):
    """Causal attention: on a CPU ours by blocks and torch's, on a GPU all kernels that it has."""
    if device.type == 'cuda':
        bench_attention_on_gpu(n_rounds, device)
        return
    from ops.attention import blockwise

    def by_blocks(q, k, v):
        return blockwise(q, k, v)[0]

    def by_torch(q, k, v):
        heads = [t.transpose(1, 2) for t in (q, k, v)]  # (B, H or K, T, D)
        return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)

    def forward(attention, inputs):
        with torch.no_grad():
            attention(*inputs)

    def both(attention, inputs):
        y = attention(*inputs)
        torch.autograd.grad(y, inputs, torch.ones_like(y))

    sizes = 'rows, heads, key heads, tokens, head_dim'
    print_head(
        'attention: milliseconds on one thread', 'dtype', sizes, 'what', 'by blocks', 'torch',
        'torch / by blocks')
    # Our blocks are used for 257 to 1,024 tokens in float32, and 64 to 2,048 in bfloat16.
    shapes = (
        (16, 6, 2, 128, 64), (4, 6, 2, 256, 32), (16, 6, 2, 256, 64), (8, 6, 2, 512, 64),
        (4, 9, 3, 512, 64), (4, 9, 3, 1024, 64), (2, 9, 3, 2048, 64))
    for dtype in (torch.float32, torch.bfloat16):
        for B, H, K, T, D in shapes:
            options = dict(dtype=dtype, requires_grad=True)
            inputs = [torch.randn(B, T, heads, D, **options) for heads in (H, K, K)]
            for what in (both, forward):
                jobs = {}
                for attention in (by_blocks, by_torch):
                    jobs[attention.__name__] = functools.partial(what, attention, inputs)
                medians, ratios = in_turns(jobs, n_rounds)
                times = [f'{seconds * 1e3:.1f}' for seconds in medians.values()]
                cells = (str(dtype)[6:], f'{B}, {H}, {K}, {T}, {D}', what.__name__)
                print_row(*cells, *times, spread(ratios['by_torch']))


# rows, heads, key heads, tokens, tokens of a document: 140m, 360m, 950m, and 950m on long rows
ON_GPU = (
    (16, 9, 3, 2048, 256), (16, 16, 4, 2048, 256), (16, 24, 6, 2048, 256), (1, 24, 6, 32768, 2048))


def bench_attention_on_gpu(n_rounds, device, shapes=ON_GPU):
    """Forward and backward by every kernel, over full rows and within documents, in bfloat16."""
    from ops import attention

    n_calls = 10  # one call is too short for the clock
    print('\nattention, auto: ' + attention.use('auto', device))
    kernels = []
    for name in attention.BACKENDS[1:]:
        try:
            attention.use(name, device)
            kernels.append(name)
        except BadInput as error:
            print(f'{name} is not measured: {error}')
    print_head(
        'attention: bfloat16, head_dim 64, forward and backward. TFLOP/s are those of the causal '
        'half, without what the backward repeats', 'rows, heads, key heads, tokens', 'documents of',
        'kernel', 'ms', 'TFLOP/s')
    for B, H, K, T, length in shapes:
        options = dict(device=device, dtype=torch.bfloat16, requires_grad=True)
        inputs = [torch.randn(B, T, heads, 64, **options) for heads in (H, K, K)]
        upstream = torch.randn_like(inputs[0])
        starts = torch.arange(0, B * T + 1, length, dtype=torch.int32, device=device)

        def run(cu_seqlens, inputs=inputs, upstream=upstream):
            for _ in range(n_calls):
                y = attention.attend(*inputs, cu_seqlens=cu_seqlens)
                torch.autograd.grad(y, inputs, upstream)

        for cu_seqlens, span in ((None, T), (starts, length)):
            # Two products forward and four backward, over half of the scores.
            flops = 6 * B * H * T * span * 64
            for name in kernels or ['auto']:
                if name == 'cudnn' and cu_seqlens is not None:
                    continue  # flash 2 takes documents
                attention.use(name, device)
                medians, _ = in_turns({name: functools.partial(run, cu_seqlens)}, n_rounds)
                seconds = medians[name] / n_calls
                cells = (f'{B}, {H}, {K}, {T}', span if span < T else '', name)
                print_row(*cells, f'{seconds * 1e3:.2f}', f'{flops / seconds / 1e12:.0f}')
    attention.use('auto', device)


def bench_kernels(n_rounds, device):
    """On a GPU: Triton kernels of layers and rows against their references, eager and compiled.

    Layers use Triton in eager mode only, so the reference that counts for them is the eager one.
    """
    from ops import kernels as k
    if device.type != 'cuda' and not k.INTERPRETED:
        print('\nkernels: not measured, because there is no GPU here')
        return
    n_rows, T, repeats = 16, 2048, 20
    sizes = ((576, 9, 3, 2048), (1024, 16, 4, 4096), (1536, 24, 6, 6144))
    if rehearse:
        n_rows, T, repeats = 1, 8, 1
        sizes = ((64, 2, 1, 128),)
    text = f'kernels: {n_rows * T:,} tokens, bfloat16, milliseconds of forward and backward'
    names = ('Triton', 'eager reference', 'compiled reference', 'eager / Triton')
    print_head(text, 'width', 'kernel', *names, 'compiled / Triton', 'compiled, longest kernel')
    angles = torch.randn(T, 32, device=device)
    cos = torch.cat((angles.cos(), angles.cos()), 1).bfloat16()
    sin = torch.cat((-angles.sin(), angles.sin()), 1).bfloat16()

    def some(*shape):
        options = dict(device=device, dtype=torch.bfloat16, requires_grad=True)
        return torch.randn(n_rows, T, *shape, **options)

    def run(mode, function, inputs):
        k.use(mode, device)
        # One launch is too short for the clock.
        for _ in range(repeats):
            out = function(*inputs)
            out = out if isinstance(out, tuple) else (out,)
            if out[0].requires_grad:
                torch.autograd.grad(out, inputs, [torch.ones_like(o) for o in out])

    for C, H, K, n_hidden in sizes:
        x = some(C)
        residual = some(C)
        weight = torch.ones(C, device=device, requires_grad=True)
        heads = (some(H, 64), some(K, 64))
        norm = functools.partial(k.rotate_heads, cos=cos, sin=sin, norm=True, eps=1e-5)
        fixed = (x.detach(), residual.detach())
        cases = {
            'rms_norm': (functools.partial(k.rms_norm, eps=1e-5), (x, weight)),
            'add_rms_norm': (functools.partial(k.add_rms_norm, eps=1e-5), (x, residual, weight)),
            'rotate_heads, normed': (norm, heads),
            'rotate_heads': (functools.partial(k.rotate_heads, cos=cos, sin=sin), heads),
            'swiglu': (k.swiglu, (some(n_hidden), some(n_hidden))),
            'row_sqnorms': (k.row_sqnorms, fixed),
            'bilinear': (k.bilinear, (*fixed, torch.ones(C, C, device=device))),
        }
        for name, (function, inputs) in cases.items():
            # torch.compile gives all functools.partial one limit of eight graphs. Beyond it a
            # function would run without its graph, so every case begins without graphs.
            torch._dynamo.reset()
            backend = 'aot_eager' if rehearse else 'inductor'
            compiled_function = torch.compile(function, dynamic=False, backend=backend)
            jobs = {
                'Triton': functools.partial(run, 'triton', function, inputs),
                'eager': functools.partial(run, 'torch', function, inputs),
                'compiled': functools.partial(run, 'torch', compiled_function, inputs),
            }
            for job in jobs.values():
                job()
            # Graphs that are made again would be timed. torch raises an error instead.
            with torch.compiler.set_stance('fail_on_recompile'):
                medians, ratios = in_turns(jobs, n_rounds)
            times = [f'{seconds / repeats * 1e3:.3f}' for seconds in medians.values()]
            pairs = [spread(ratios['eager']), spread(ratios['compiled'])]
            print_row(C, name, *times, *pairs, longest_kernel(jobs['compiled'], device))
    # The choice of kernels is a module global, which other parts read.
    k.use('auto', device)


def longest_kernel(job, device):
    """Returns the name of the kernel that takes most of a job on a GPU, and its share, as text."""
    if device.type != 'cuda':
        return ''
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        job()
    times = {event.key: event.self_device_time_total for event in found.key_averages()}
    longest = max(times, key=times.get)
    return f'{longest[:60]} {times[longest] / sum(times.values()):.0%}'


# -- memory against the plan -----------------------------------------------------------------------

SHORT_R1 = dict(R1, n_layer=3, n_head=9, n_kv_head=3, n_embd=576, ffn_dim=2048)
WIDE = dict(SMALL, n_head=8, head_dim=48)
EXPERTS = dict(SMALL, n_layer=4, n_expert=8, n_expert_active=2, expert_ffn_dim=512)
EXPERTS.update(n_shared_expert=1, n_dense_layer=1)
SELECTIVE = dict(activation_checkpointing='selective')
FSDP = dict(dp_shard=2, reshard_after_forward=True)
# name -> (ranks, model, changes of KNOBS). The sizes are small enough for a CPU with 8 GB.
CASES = {
    'plain': (1, SMALL, dict(batch_size=8)),
    'accumulated': (1, SMALL, dict(batch_size=8, grad_accum=2)),
    'selective': (1, SMALL, dict(SELECTIVE, batch_size=8)),
    'full': (1, SMALL, dict(batch_size=8, activation_checkpointing='full')),
    'bf16': (1, SMALL, dict(dtype='bfloat16')),
    'vocabulary': (1, SHORT_R1, dict(batch_size=2)),
    'long': (1, SHORT_R1, dict(batch_size=1, block_size=2048)),
    'few tokens': (1, SHORT_R1, dict(batch_size=1, block_size=128)),
    'experts': (1, EXPERTS, {}),
    'fsdp 2': (2, SMALL, FSDP),
    'fsdp 2 whole': (2, SMALL, dict(dp_shard=2, grad_accum=2)),
    'fsdp 2 few tokens': (2, SHORT_R1, dict(FSDP, batch_size=1, block_size=128)),
    'tp 2': (2, WIDE, dict(tp=2)),
    'tp 2 selective': (2, WIDE, dict(SELECTIVE, tp=2)),
    'ep 2': (2, EXPERTS, dict(ep=2)),
    'fsdp 2 x tp 2': (4, WIDE, dict(dp_shard=2, tp=2)),
}


def measure_case(name):
    """Takes two steps of a case on the ranks that there are. Rank 0 prints the row of the table."""
    from lib import parallel
    from model import GPT, ModelConfig, init_weights
    from ops.ranks import make_layout, resolve_sizes
    from tools.plan import memory_plan
    rank, world_size, device = start_ranks('auto')
    config = ModelConfig(**CASES[name][1])
    k = {**KNOBS, **CASES[name][2]}
    if device.type == 'cuda':
        k['dtype'] = 'bfloat16'         # as in training
    sizes = resolve_sizes(world_size, k['dp_replicate'], k['dp_shard'], k['tp'], k['ep'])
    layout = make_layout(device.type, rank, world_size, sizes)
    dtype = getattr(torch, k['dtype'])
    reshards = k['reshard_after_forward']
    # As in train.py: memory is taken after sharding, so no rank ever holds the full model.
    with torch.device('meta'):
        model = GPT(config)
    checkpointing = k['activation_checkpointing']
    parallel.apply_parallelism(model, layout, dtype, False, checkpointing, reshards)
    model.to_empty(device=device)
    init_weights(model, 0)
    optimizers = parallel.make_optimizers(model, k)

    def step():
        for micro_step in range(k['grad_accum']):
            size = (k['batch_size'], k['block_size'] + 1)
            ids = torch.randint(0, config.vocab_size, size, device=device)
            # As in train.py: gradients are reduced once a step where parameters stay gathered.
            if layout is not None:
                is_last = micro_step == k['grad_accum'] - 1
                model.set_requires_gradient_sync(reshards or is_last)
            with autocast(device, dtype):
                loss, _, _ = model.loss(ids[:, :-1].int(), ids[:, 1:].contiguous())
            (loss / ids.numel()).backward()
        parallel.clip_gradients(model, 1.0, parallel.gradient_norm(model))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    # The states of AdamW exist from the second step on.
    step()
    held = list(model.parameters())
    for optimizer in optimizers:
        for state in optimizer.state.values():
            held += state.values()
    measured = sum(parallel.local_tensor(t).nbytes for t in held)
    if device.type == 'cuda':
        # The counter also has buffers and the workspaces of libraries.
        measured = torch.cuda.memory_allocated()
    measured += tensor_peak(step)
    if rank == 0:
        n_rows = k['batch_size'] * (world_size // k['tp']) * k['grad_accum']
        k['total_batch_tokens'] = n_rows * k['block_size']
        terms, moment = memory_plan(config, k, sizes, dtype.itemsize, device.type == 'cuda')
        planned = sum(terms.values())
        listed = [f'{term} {n / 2**20:,.0f}' for term, n in terms.items() if n]
        figures = f'{measured / 2**20:>12,.1f}{planned / 2**20:>10,.1f}   {planned / measured:.2f}'
        print(f'{name:<20}{figures}, {moment}: ' + ', '.join(listed), flush=True)
    leave_ranks(0)


def bench_checkpoint(n_rounds, device):
    """Checking, reading and writing a checkpoint of SmolLM2-135M with AdamW, in the page cache."""
    from lib import checkpoint
    model = make_model(SMOLLM2, device)
    optimizer = make_optimizer(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = dict(model=asdict(model.config), config={})
    with tempfile.TemporaryDirectory() as out:
        writer = checkpoint.Checkpointer(out, 1, False)
        folder = f'{out}/ckpt/step_000000'
        writer.save(0, model, [optimizer], state)
        n_bytes = sum(entry['bytes'] for entry in checkpoint.read_manifest(folder).values())
        jobs = {
            'read': lambda: checkpoint.load(folder, model, [optimizer]),
            'check, untouched since it was written': lambda: checkpoint.fault_of(folder),
            'check, every byte': lambda: checkpoint.fault_of(folder, trusts_stamps=False),
            'write': lambda: writer.save(0, model, [optimizer], state),
        }
        medians, ratios = in_turns(jobs, n_rounds)
    print_head(f'checkpoint, {n_bytes / 1e9:.2f} GB', 'job', 's', 'time against reading')
    for name, seconds in medians.items():
        print_row(name, f'{seconds:.3f}', spread(ratios[name], '.4f'))


def bench_reading(n_rounds, device):
    """Reading the text of parquet and jsonl.gz files, without tokenizing: lib/reading.py,
    prepare/hub.py, and the rows of load_dataset(..., streaming=True). The text is Python source.
    """
    import gzip

    import datasets
    import pyarrow
    import pyarrow.parquet

    from lib import reading, streaming

    datasets.disable_progress_bars()
    source = ''
    for folder, _, names in os.walk(os.path.dirname(torch.__file__)):
        for name in names:
            if name.endswith('.py') and len(source) < 30_000_000:
                with open(os.path.join(folder, name), encoding='utf-8') as f:
                    source += f.read()

    def ours(folder):
        for file in reading.local_files(folder):
            for batch in reading.read_batches(file, ['text']):
                collections.deque(reading.records_of(batch), 0)

    def by_arrow(folder):
        streaming.open_stream.cache_clear()
        stream = streaming.Stream(folder, '', '', 'train', ('text',))
        for shard in streaming.find_shards(stream):
            for batch in streaming.read_shard(shard, stream.columns):
                collections.deque(reading.records_of(batch), 0)

    def rows(folder):
        collections.deque(datasets.load_dataset(
            folder, split='train', streaming=True, cache_dir=streaming.scratch().name), 0)

    sides = {'lib/reading.py': ours, 'prepare/hub.py': by_arrow, 'rows of load_dataset': rows}
    print_head(
        f'reading {len(source.encode()) / 1e6:.0f} MB of text', 'file, characters per document',
        'side', 'ms per MB', 'time against the first')
    for size in (2000, 20_000):
        texts = [source[i:i + size] for i in range(0, len(source), size)]
        n_bytes = sum(len(text.encode()) for text in texts)
        urls = [f'https://example.com/{i}' for i in range(len(texts))]
        table = pyarrow.table(dict(url=urls, text=texts, score=[1.0] * len(texts)))
        with tempfile.TemporaryDirectory() as folder:
            for kind in ('parquet', 'jsonl.gz'):
                os.makedirs(f'{folder}/{kind}')
            pyarrow.parquet.write_table(
                table, f'{folder}/parquet/train.parquet', row_group_size=1000)
            with gzip.open(f'{folder}/jsonl.gz/train.jsonl.gz', 'wt', 6) as f:
                for record in table.to_pylist():
                    f.write(dumps(record) + '\n')
            for kind in ('parquet', 'jsonl.gz'):
                jobs = {}
                for name, side in sides.items():
                    jobs[name] = functools.partial(side, f'{folder}/{kind}')
                medians, ratios = in_turns(jobs, n_rounds)
                for name, seconds in medians.items():
                    ms = f'{seconds * 1e3 / (n_bytes / 1e6):.2f}'
                    print_row(f'{kind}, {size:,}', name, ms, spread(ratios[name]))


def bench_tokenizer(path, where, n_rounds):
    """The tokens per second of one core on 4 MB of documents: ours, tiktoken and `tokenizers`."""
    import tokenizers

    from lib.reading import local_files, read_batches, records_of
    from lib.tokenizer import RankTokenizer, load_tokenizer
    start = clock()
    ours = load_tokenizer(path)
    loaded = clock() - start
    batches = (batch for file in local_files(where) for batch in read_batches(file, ['text']))
    documents = []
    n_bytes = 0
    for record in (record for batch in batches for _, record in records_of(batch)):
        documents.append(record['text'] if isinstance(record, dict) else record)
        n_bytes += len(documents[-1].encode())
        if n_bytes > 4_000_000:
            break

    def work(encode):
        for document in documents:
            encode(document)

    encoders = {'ours': ours.encode_document}
    if isinstance(ours, RankTokenizer):
        encoders['tiktoken'] = ours.encoding.encode_ordinary
    if path.endswith('.json'):
        library = tokenizers.Tokenizer.from_file(path)
        encoders['tokenizers'] = functools.partial(library.encode, add_special_tokens=False)
    jobs = {name: functools.partial(work, encode) for name, encode in encoders.items()}
    medians, ratios = in_turns(jobs, n_rounds)
    n = sum(len(ours.encode_document(document)) for document in documents)
    print_head(
        f'tokenizer, {path}: loaded in {loaded:.1f} s; {len(documents):,} documents, '
        f'{n_bytes / 1e6:.1f} MB, {n:,} tokens', 'encoder', 'million tokens/s', 'time against ours')
    for name, seconds in medians.items():
        print_row(name, f'{n / seconds / 1e6:.2f}', spread(ratios[name]))


def bench_fp8(work, device):
    """The loss of training in bf16 and in fp8 from equal weights on equal rows.

    A run in bf16 on other rows shows what difference is noise.
    """
    from data import Feeder, MixtureLoader, Source
    vocab_size = SHAPES[work.model][0]['vocab_size']
    source_text = '' if rehearse else text
    made = gpu_checks.make_data_anyhow(out, source_text, tokenizer, vocab_size)

    def open_split(split, seed):
        options = dict(vocab_size=vocab_size)
        sources = []
        for name in made['sources']:
            sources.append(Source(made['folder'], name, split, work.tokens, seed, **options))
        return sources

    def run(fp8, seed):
        """Returns the losses of the steps, and the loss on the same validation rows."""
        model, loss = build_side('ours', replace(work, fp8=fp8), device)
        update = make_update('ours', model, device)
        sources = open_split('train', seed)
        loader = MixtureLoader(sources, dict.fromkeys(made['sources'], 1.0), seed)
        feeder = Feeder(device, work.rows)
        losses = []
        for _ in range(fp8_steps):
            (micro,) = feeder.split(loader, loader.next_batch(work.rows))
            with autocast(device, pick_dtype(work.dtype, device)[0]):
                value = loss(micro.inputs, micro.targets)
            value.backward()
            update(value)
            losses.append(value.detach())
        held_out = []
        # A graph without gradients would take longer to compile than these few batches take.
        is_eager = torch.compiler.set_stance('force_eager')
        with is_eager, torch.no_grad(), autocast(device, pick_dtype(work.dtype, device)[0]):
            for source in open_split('val', 0):
                for inputs, targets, _ in feeder.source_batches(source, range(work.rows)):
                    held_out.append(loss(inputs, targets))
        return torch.stack(losses).tolist(), torch.stack(held_out).mean().item()

    runs = {'bf16': (False, 0), 'fp8': (True, 0), 'bf16 on other rows': (False, 1)}
    if rehearse and device.type != 'cuda':
        del runs['fp8']
    text_of = f'{fp8_steps} steps of {work.rows} rows of {work.tokens}, {made["made_of"]}'
    names = ('mean loss of the last tenth', 'validation loss', 'minus that of bf16')
    print_head(f'fp8: {work.model}, {text_of}', 'run', *names)
    base = None
    for name, settings in runs.items():
        losses, held_out = run(*settings)
        base = held_out if base is None else base
        last = statistics.mean(losses[-max(1, fp8_steps // 10):])
        print_row(name, f'{last:.4f}', f'{held_out:.4f}', f'{held_out - base:+.4f}')
        write_json()


def bench_train():
    """train.py with re-weighting by influence: speed, start, and what a measurement costs."""
    figures = gpu_checks.train_run(out, text, tokenizer, rehearse)
    print_head('train.py with mixture=influence', 'figure', '')
    for name, value in figures.items():
        print_row(name, f'{value:,.3f}' if isinstance(value, float) else value)
    write_json(training=figures)


def bench_memory(names):
    """The peak of tensors in a step, measured and planned. Ranks are processes of torchrun."""
    print(f"{'case':<20}{'measured':>12}{'planned':>10}   MiB; ratio; moment of the planned peak")
    for name in names:
        launch = [sys.executable]
        n_ranks = CASES[name][0]
        if torch.cuda.is_available() and n_ranks > torch.cuda.device_count():
            print(f'{name:<20}left out: it needs {n_ranks} GPUs')
            continue
        if n_ranks > 1:
            launch += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n_ranks}']
        command = [*launch, __file__, 'case', f'--cases={name}']
        env = {**os.environ, 'OMP_NUM_THREADS': '1'}
        done = subprocess.run(command, text=True, capture_output=True, env=env)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            raise RunFault(f"the case '{name}' failed. Its message stands above.")
        print(done.stdout, end='', flush=True)


# -- the command line ------------------------------------------------------------------------------

OF_MODELS = dict(influence=bench_influence, presence=bench_presence, kd=bench_kd)
OTHERS = dict(loader=bench_loader, checkpoint=bench_checkpoint, loss=bench_loss)
OTHERS.update(attention=bench_attention, kernels=bench_kernels, reading=bench_reading)
# Parts that run only if they are named.
NAMED = ('tokenizer', 'fp8', 'train')


# Command -> knobs that it does not read.
OF_GPU = ('out', 'minutes', 'fp8_steps', 'rehearse')
OF_TEXT = ('tokenizer', 'text')
UNUSED = dict(steps=('parts', 'cases', *OF_TEXT, *OF_GPU))
UNUSED['parts'] = ('vs', 'compiled', 'rows', 'kernels', 'attention', 'fp8', 'profile', 'minutes')
UNUSED['gpu'] = ('models', 'dtypes', 'rounds', 'tokens', 'cases', 'json', *UNUSED['parts'][:-1])
UNUSED['memory'] = (
    'models', 'dtypes', 'rounds', 'tokens', 'parts', 'json', *UNUSED['parts'], *OF_TEXT, *OF_GPU)


def check_names(names, known):
    for name in names:
        if name not in known:
            raise BadInput(f"'{name}' must be one of {', '.join(map(str, known))}.")


def check_peers(names, device):
    known = [*PEERS, *(f'{name}=' for name in VARIANTS)]
    for name in names:
        knob, is_variant, _ = name.partition('=')
        check_names([knob + is_variant], known)
        # An import would take seconds, and this process does not use the package.
        if not is_variant and find_spec(PEERS[name]) is None:
            raise BadInput(f'vs = {name} needs a package. pip install {PEERS[name]}.')
    if 'liger' in names and device.type == 'cpu':
        raise BadInput('vs = liger: its kernels need a GPU.')


def run_part(part):
    """Runs one of the parts."""
    if part == 'memory':
        bench_memory(chosen_cases)
    elif part == 'tokenizer':
        bench_tokenizer(tokenizer, text, rounds)
    elif part == 'train':
        bench_train()
    elif part == 'fp8':
        work = next((work for work in works if work.compiled != rehearse), works[0])
        bench_fp8(replace(work, rows=min(work.rows, 4)), device)
    elif part == 'attention' and rehearse:
        bench_attention_on_gpu(rounds, device, ((1, 2, 1, 64, 16),))
    elif part in OTHERS:
        OTHERS[part](rounds, device)
    else:
        for name in chosen:
            for dtype in dtypes:
                precision = pick_dtype(dtype, device)[0]
                trainer = Trainer(SHAPES[name][0], precision, tokens or 256, device)
                setting = f'{str(precision)[6:]}, {trainer.n_tokens} tokens per row'
                print(f'\n{part}: {name}, {setting}')
                OF_MODELS[part](trainer, rounds)


def bench_gpu():
    """Runs the parts of tools/gpu_checks.py. Data and runs are in a folder that is deleted."""
    if device.type == 'cpu' and not rehearse:
        raise BadInput('there is no GPU here. --rehearse=True runs everything on the CPU, tiny.')
    with tempfile.TemporaryDirectory() as scratch:
        knobs = dict(fp8_steps=fp8_steps, rehearse=rehearse)
        # The parts run in the project's folder.
        knobs['text'] = ','.join(os.path.abspath(path) for path in text.split(',') if path)
        knobs['tokenizer'] = gpu_checks.full_path(tokenizer)
        planned = gpu_checks.plan(os.path.abspath(out), scratch, knobs)
        names = [part.name for part in planned]
        check_names(parts or [], names)
        gpu_checks.run_parts(
            [part for part in planned if part.name in (parts or names)], minutes,
            os.path.abspath(out))


if __name__ == '__main__':
    # `side` and `case` run in the processes that `steps` and `memory` start.
    command, arguments = read_command(('steps', 'parts', 'memory', 'gpu', 'side', 'case'))
    configure(globals(), arguments, verbose=False)
    warn_unused(arguments, UNUSED.get(command, ()), f'with {command}')
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if device.type == 'cpu':
        # Threads that wait for others spin, and CPU time would count that as work.
        torch.set_num_threads(1)
    chosen = models or (MODELS_ON_GPU if device.type == 'cuda' else MODELS_ON_CPU)
    if command == 'parts':
        chosen = models or ['s1']
    check_names(chosen, SHAPES)
    chosen_cases = cases.split(',') if cases else list(CASES)
    check_names(chosen_cases, CASES)
    check_names(dtypes, ('auto', 'float32', 'bfloat16'))
    check_names(compiled, (True, False))
    if command == 'steps' and not (dtypes and compiled):
        raise BadInput('dtypes and compiled name no case: give each of them one value or more.')
    works = []
    for name in chosen:
        _, n_rows, n_tokens = SHAPES[name]
        if device.type == 'cuda' and name != 'tiny':
            n_rows, n_tokens = 16, 2048
        size = (rows or n_rows, tokens or n_tokens)
        for dtype in dtypes:
            for mode in compiled:
                works.append(Work(name, dtype, mode, *size, kernels, attention, fp8))
    peers = vs.split(',') if vs else []
    known = [*OTHERS, *OF_MODELS, 'memory']
    if command == 'parts':
        check_names(parts or [], [*known, *NAMED])
    if 'tokenizer' in (parts or []) and not (tokenizer and text):
        raise BadInput('the part tokenizer needs --tokenizer and --text.')
    if text and not tokenizer:
        raise BadInput('--text needs --tokenizer, which makes tokens of it.')
    if command == 'steps':
        check_peers(peers, device)
    ABOUT.update(date=time.strftime('%Y-%m-%d'), python=platform.python_version())
    ABOUT.update(torch=torch.__version__, device=device_name(device))
    if command in ('steps', 'parts'):
        print(', '.join(f'{key} {value}' for key, value in ABOUT.items()))

    if command == 'side':
        run_side(vs, works[0], device)
    elif command == 'case':
        measure_case(chosen_cases[0])
    elif command == 'memory':
        bench_memory(chosen_cases)
    elif command == 'gpu':
        bench_gpu()
    elif command == 'steps':
        records = bench_steps(works, peers, rounds, device)
        if profile:
            print_profile(records)
            write_json(records=records)
    else:
        tune_malloc()
        use_attention(works[0], device)
        for part in parts or known:
            run_part(part)
            write_json()
