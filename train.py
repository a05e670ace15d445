"""Trains a language model on a mixture of sources. This file is the whole story of a run, top to bottom.

    python train.py config/demo.py                                                        # a laptop, a few minutes
    torchrun --standalone --nproc_per_node=8 train.py config/model/mobilellm_140m.py config/stage1.py      # one node
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=HOST --master_port=29500 \\
        train.py config/model/mobilellm_950m.py config/stage1.py                          # the first of two nodes

Config files and --key=value apply from left to right; --help lists every knob. A run lives in out_dir: config.json,
metrics.jsonl, ckpt/, curves.png. Killed or stopped, it goes on with --resume=True and ends as if nothing had happened.
A fresh model starts at a loss of ln(vocab_size): 8.3 for the demo, 11.8 for a vocabulary of 128,256.
"""
import contextlib
import json
import math
import os
import signal
import time
from dataclasses import asdict, fields

import torch
from tqdm import tqdm

import kd
import teacher_cache
from configurator import BadInput, RunFault, check_values, configure
from data import (
    MixtureLoader,
    Source,
    batch_of,
    check_sources,
    common_tokenizer,
    prepare_missing,
    report_packing,
    rows_of_rank,
)
from lib import checkpoint, hf, parallel, storage, validate, watch
from lib import device as lib_device
from lib import schedule as schedules
from lib.device import (
    all_reduce_sum,
    barrier,
    device_name,
    leave_ranks,
    peak_flops,
    pick_dtype,
    start_ranks,
    tune_malloc,
)
from lib.log import MetricsLog, Progress, start_trace
from methods import baselines, reweight
from methods import presence as self_influence
from model import (
    GPT,
    ModelConfig,
    count_parameters,
    flops_per_token,
    init_weights,
    valid_positions,
)
from ops import moe, ranks
from ops.attention import check_documents, document_boundaries
from ops.kernels import use as use_kernels
from packing import OVERLONG
from tools import plan

# -- input and output --
out_dir = 'out/run'                     # folder of this run; must be new unless resume=True
resume = False                          # go on with the run in out_dir, bit for bit; starts it when it has no checkpoint yet
continue_from: str | None = None        # run or checkpoint whose end, whole, is this run's beginning: weights, optimizer, data position; other weights of sources may follow
init_from: str | None = None            # weights (only) to begin with: run, checkpoint, Hugging Face folder or hub name; None: random
seed = 1337                             # of initial weights and data order
log_interval = 10                       # steps between two lines in metrics.jsonl
eval_interval = 1000                    # steps between two evaluations; there is one before the first and after the last step
eval_rows = 128                         # fixed validation rows of every source
eval_tasks = ''                         # benchmarks to run while training, with commas, as tools/evaluate.py's --tasks
eval_tasks_interval = 5000              # steps between two runs of them, the first before training
eval_tasks_limit: int | None = 200      # documents of each; None: all
save_interval = 1000                    # steps between two checkpoints; there is one after the last step
keep_last = 2                           # checkpoints kept; 0: all
keep_every = 0                          # and every one whose step is a multiple of it; 0: no others
async_save: bool | None = None          # write checkpoints while training goes on; None: on CUDA
wandb_mode = 'disabled'                 # online | offline | disabled
wandb_project = 'cheapertraining'       # W&B project
sample_tokens = 0                       # tokens of text to generate after training
sample_prompt = ''                      # what the text begins with
# -- data --
data_dir = 'data'                       # folder of the sources
sources: dict[str, float] = {}          # source -> start weight in the mixture, any positive scale
weigh_by = 'rows'                       # weights are shares of the rows drawn: rows | size: times the rows that a source has, so 1.0 reads all equally often
prepare: str | None = None              # script that makes the sources when they are not there (gets --out=data_dir)
block_size = 2048                       # tokens of a row
batch_size = 16                         # rows per rank and micro-step
total_batch_tokens = 524288             # tokens of an optimizer step over all ranks; gives grad_accum
packing = 'window'                      # rows are windows of the stream | document: whole documents, with their loss masks (SFT)
overlong = 'truncate'                   # packing='document': documents longer than a row: truncate | drop
document_mask = False                   # packing='window': attention stays within a document
# -- mixture --
mixture = 'fixed'                       # how weights change while training: fixed | stratified (equal) | influence | skillit | aioli | doge | doremi (proxies)
mixture_interval = 1000                 # steps between two re-weightings
mixture_warmup: int | None = None       # no re-weighting before this step; None: after warmup_steps and 5 % of the run
mixture_eta: float | None = None        # step of a re-weighting; None: influence 0.3 (influence 1: times exp(0.3)), skillit and aioli 0.2, doge 100 (1 / mu), doremi 1
mixture_min = 0.02                      # influence: smallest weight of a source
mixture_max = 0.6                       # influence: largest weight of a source
mixture_rows = 64                       # skillit, aioli: fixed validation rows of every source; doge: rows of a validation batch of all
max_epochs: float | None = 4.0          # re-weighting keeps every source within that many epochs of the run; None: no cap
probe: dict[str, float] = {}            # domain -> weight: probe sets (data_dir/probe/<domain>) that influence is measured on
probe_rows = 64                         # rows of every probe set, a new choice at every re-weighting
influence_rows = 32                     # rows of every source, likewise
influence_layers = 'last'               # parameters that influence is measured on: last | all | first | embedding+head
influence_scaling = 'none'              # gradients as they are, divided by Adam's root of the moment, or DataInf: none | adam | datainf
influence_units = 'loss'                # several domains: influence on their mean loss | own: mean of what each gains relative to itself
influence_rule = 'step'                 # step (mixture_eta) | proportional (weight = mean influence, as MobileLLM-R1)
skillit_graph: str | None = None        # what a run on one source does for the others: file of `tools/sweep.py method`, or .npy (rows trained, columns evaluated)
skillit_window = 3                      # skillit: losses of that many rounds are summed
aioli_sweeps = 4                        # aioli: times that every mixture is explored in a round
aioli_steps = 4                         # aioli: steps of each
one_hot_factor = 0.75                   # aioli: weight of the favoured source in an explored mixture; the others share the rest
aioli_rule = 'accumulate'               # aioli: accumulate (the paper) | reference_ema (the public code: from the start weights, each time)
aioli_ema: float | None = None          # aioli: share of the past in the mean of matrices; None: each round's own
aioli_matrix = 'measured'               # aioli: measured | random (a control: as much exploration, no information)
doremi_reference: str | None = None     # doremi: run whose losses the proxy's are compared with
doremi_clip = 'token'                   # doremi: excess loss below 0 counts as 0 token by token (the original) | group: the source's mean
doremi_smoothing = 1e-3                 # doremi: share of equal weights that is mixed in
select = 'none'                         # rows dropped for low influence: none | online (by the model as it is) | scores (files)
select_scores = 'scores'                # select='scores': folder in every source's, written by tools/influence_tables.py score
select_margin = 0.1                     # rows below this share of the probe rows' median influence are dropped; 0: the paper's rule
select_keep = 0.1                       # share of every source's rows that is kept in any case
# -- distillation --
teacher: str | None = None              # model to learn from: run, checkpoint, Hugging Face folder or hub name, of the same tokenizer
kd_cache: str | None = None             # what it said, written by `kd.py cache --name=...`; `teacher` is then compared with the cache's, no more
kd_alpha = 1.0                          # share of the distillation loss; the rest is cross-entropy
kd_temperature = 1.0                    # of both distributions; the loss is multiplied by its square
kd_divergence = 'forward'               # forward KL(teacher || student) | reverse | js (Jensen-Shannon)
# -- self-influence of micro-batches (PRESENCE) --
presence = 'off'                        # weigh micro-batches by self-influence: off | store (exact) | stream (one buffer)
presence_tau = 1.0                      # above 0: what is new to the model counts more; below 0: less
presence_schedule = 'constant'          # of tau: constant | two_stage (the sign turns at presence_switch) | cosine (turns gradually)
presence_switch: int | None = None      # step at which two_stage turns; None: after 10 % of the run
presence_layers = 'first'               # parameters that the self-influence is taken of, as influence_layers
# -- model (defaults: MobileLLM-R1 140M) --
vocab_size = 128256                     # rows of the embedding table
n_layer = 15                            # transformer blocks
n_head = 9                              # query heads
n_kv_head = 3                           # key and value heads
n_embd = 576                            # width of the residual stream
ffn_dim = 2048                          # inner width of the feed-forward network
head_dim: int | None = None             # width of a head; None: n_embd / n_head
tie_embeddings = True                   # output weight = embedding table
qk_norm = False                         # RMSNorm of query and key heads
qk_norm_weight = True                   # learned scale of the QK-norm; False: none (MobileLLM-R1)
qkv_bias = False                        # bias in the q, k, v projections
layer_repeat = 1                        # times that every layer runs in a row
norm_eps = 1e-5                         # epsilon of RMSNorm
rope_theta = 500000.0                   # base of the rotary frequencies
rope_scaling: dict | None = None        # longer context: type=llama3 | linear | yarn, factor, ... (model.ROPE_SCALING)
n_expert = 0                            # routed experts of a layer; 0: dense
n_expert_active = 0                     # routed experts per token
n_shared_expert = 0                     # experts that see every token
expert_ffn_dim = 0                      # inner width of an expert
n_dense_layer = 0                       # first layers without experts
expert_score = 'sigmoid'                # of the router: sigmoid | softmax
balance_rate = 1e-3                     # step of the biases that even out the load of experts; 0: they stay as they are
balance_loss = 1e-4                     # weight of the loss on uneven loads within a row; 0: none
# -- optimizer and schedule --
optimizer = 'adamw'                     # adamw | muon (matrices of the blocks; AdamW for the rest)
learning_rate = 4e-3                    # peak
weight_decay = 0.1                      # of matrices and embeddings
beta1 = 0.9                             # Adam
beta2 = 0.95                            # Adam
adam_eps = 1e-8                         # Adam
grad_clip = 1.0                         # largest global gradient norm; 0: off
max_steps: int | None = None            # optimizer steps. Of these three the one that ends first
max_tokens: int | None = None           # tokens
stop_step: int | None = None            # ends before this step, saved and evaluated, with the schedule of the whole run; others may continue it
epochs: float | None = None             # times the rows of all sources together
warmup_steps = 2000                     # linear from 0
warmup_frac: float | None = None        # share of the steps, in the place of warmup_steps
schedule = 'linear'                     # after the warm-up: linear | cosine | wsd (linear over the last decay_frac) | constant
decay_frac = 0.2                        # wsd: share of the steps that decay
min_lr_frac = 0.1                       # learning rate at the end, as a share of the peak
# -- system --
device = 'auto'                         # auto | cpu | cuda
dtype = 'auto'                          # auto | float32 | bfloat16 (autocast over fp32 weights)
kernels = 'auto'                        # auto: Triton on CUDA, but for layers inside torch.compile | triton: everywhere | torch: the references
compile: bool | None = None             # torch.compile every block; None: when the run is long enough to gain by it
activation_checkpointing = 'none'       # full: blocks keep their input only and run again in the backward | selective: but for attention, narrow products
dp_replicate = 1                        # copies of the sharded model (HSDP). The four sizes make the number of ranks; one may be -1, the rest
dp_shard = -1                           # ranks that a copy is spread over (FSDP2), with those of ep
tp = 1                                  # ranks that heads, inner widths, vocabulary and tokens are split over (tensor and sequence parallelism)
ep = 1                                  # ranks, times tp, that the experts of a layer are spread over
reshard_after_forward: bool | None = None       # shards weights again after a block's forward, and gradients after every micro-step; None: of large models
hang_timeout = 1800.0                   # seconds without progress after which a run of several ranks ends, with the name of the one that hangs; 0: never
profile = False                         # write a trace of a few steps, rank 0's, to out_dir/trace.json (ui.perfetto.dev shows it)
dry_run = False                         # print what the run would cost, on paper, and stop; needs no data
plan_on: str | None = None              # dry_run: on which GPUs, like 64xH100; None: on what there is here
plan_mfu = 0.4                          # dry_run: share of the peak that products reach
plan_link: float | None = None          # dry_run: GB/s from a GPU to other nodes; None: 25 (A100) or 50
plan_price = 2.5                        # dry_run: dollars of a GPU-hour
config = configure(globals())

# -- derived values and checks -----------------------------------------------------------------------------------------
keeps_memory, resume = tune_malloc(), resume or watch.is_restarted() and checkpoint.is_of(out_dir, config)
rank, world_size, device = start_ranks(config['device'])
is_master = rank == 0
torch.manual_seed(seed + rank)
dtype, dtype_reason = pick_dtype(config['dtype'], device)
kernels_in_use = use_kernels(kernels, device)
check_values(config, dict(optimizer=('adamw', 'muon'), schedule=('linear', 'cosine', 'wsd', 'constant'), mixture=reweight.MIXTURES + baselines.ONLINE + baselines.PROXIES, overlong=OVERLONG,
                          packing=('window', 'document'), weigh_by=('rows', 'size'), wandb_mode=('online', 'offline', 'disabled'), activation_checkpointing=('none', 'selective', 'full')),
             {**dict.fromkeys(('block_size', 'batch_size', 'total_batch_tokens', 'log_interval', 'eval_interval', 'eval_rows', 'eval_tasks_interval',
                               'save_interval', 'mixture_interval', 'stop_step'), (1, math.inf)),
              **dict.fromkeys(('keep_last', 'keep_every', 'warmup_steps', 'weight_decay', 'adam_eps', 'grad_clip', 'learning_rate', 'sample_tokens', 'seed', 'balance_rate', 'balance_loss', 'hang_timeout'), (0, math.inf)),
              **dict.fromkeys(('min_lr_frac', 'warmup_frac'), (0, 1)), 'beta1': (0, 0.9999), 'beta2': (0, 0.999999), 'decay_frac': (1e-9, 1), 'select_keep': (0.01, 1)})
if not sources:
    raise BadInput("sources is empty. Give a config file, or --sources=\"{'name': weight}\" with folders of data_dir.")
if max_steps is None and max_tokens is None and epochs is None:
    raise BadInput('neither max_steps nor max_tokens nor epochs says how long to train. Set one.')
planned = plan.machine(plan_on, world_size, config['device']) if dry_run else None
world_size = planned.count if dry_run else world_size
sizes = ranks.resolve_sizes(world_size, dp_replicate, dp_shard, tp, ep)
n_data = world_size // tp                                      # ranks that have rows of their own
grad_accum = schedules.count_micro_steps(total_batch_tokens, batch_size, block_size, n_data)
batch_rows = total_batch_tokens // block_size                  # rows of a global batch
self_influence.check(presence, presence_schedule, presence_layers, grad_accum)
distils = kd.check(config)
model_config = ModelConfig(**{f.name: config[f.name] for f in fields(ModelConfig)})
ranks.check_sizes(sizes, model_config, batch_size * block_size)
if optimizer == 'muon' and (tp > 1 or n_expert):
    raise BadInput("optimizer = 'muon' needs whole matrices, and " + (f'tp = {tp} splits them' if tp > 1 else 'experts are stacks of them') + '. Use adamw.')
if dry_run:
    _teacher = hf.find_model(teacher, weights=False)['model'] if teacher and not kd_cache else None
    if is_master:
        plan.print_plan(model_config, config, planned, torch.bfloat16 if planned.name != 'CPU' and config['dtype'] == 'auto' else dtype,
                        schedules.count_steps(config, None), _teacher)
    leave_ranks(0)

# -- the run folder ----------------------------------------------------------------------------------------------------
found = checkpoint.find_beginning(out_dir, resume, continue_from)
used = [name for name in ('metrics.jsonl', 'ckpt') if name in storage.names(out_dir)]
run_folder = storage.local_folder(out_dir)                     # of the small files; out_dir, unless that is in an object store
if used and not resume:
    raise BadInput(f"out_dir '{out_dir}' already holds a run ({', '.join(used)}). Go on with it by --resume=True, or choose "
                   'another --out_dir.')
barrier()                                                      # nobody writes before everybody has looked
layout = ranks.make_layout(device.type, rank, world_size, sizes)
data_rank = layout.data_rank if layout else 0
lib_device.rows_group = layout and layout.rows
checkpointer = checkpoint.Checkpointer(out_dir, keep_last, device.type == 'cuda' if async_save is None else async_save, keep_every)

# -- data --------------------------------------------------------------------------------------------------------------
if prepare is not None:
    if is_master:
        prepare_missing(prepare, data_dir, sources)
    barrier()
train_sources = [Source(data_dir, name, 'train', block_size, seed, vocab_size, packing, overlong) for name in sources]
val_sources = [Source(data_dir, name, 'val', block_size, 0, vocab_size, packing, overlong) for name in sources]
active = [s for s in train_sources if sources[s.name] > 0]
probes = [reweight.open_probe(data_dir, domain, block_size, vocab_size, packing, overlong) for domain in probe]
if packing == 'document' and is_master:
    report_packing(train_sources + val_sources)
shards_tokenizer = common_tokenizer(train_sources + val_sources + probes)
about_teacher = kd.find_teacher(teacher, vocab_size, shards_tokenizer) if teacher else None
caches = teacher_cache.open_caches(config, active, about_teacher, vocab_size) if kd_cache else {}
kept_shares = reweight.keep_scored(data_dir, active, config) if select == 'scores' else {}
start_weights = {s.name: sources[s.name] * (s.n_windows if weigh_by == 'size' else 1) for s in train_sources}
if mixture in ('stratified', *baselines.PROXIES):
    start_weights = {name: float(weight > 0) for name, weight in start_weights.items()}
n_steps = schedules.count_steps(config, sum(s.n_windows for s in active))
n_warmup = warmup_steps if warmup_frac is None else round(warmup_frac * n_steps)
end_step = n_steps if stop_step is None else min(stop_step, n_steps)
loader = MixtureLoader(train_sources, start_weights, seed)
check_sources(train_sources + val_sources + probes, active, batch_rows)
about_reference = baselines.check(config, active, n_steps, vocab_size, shards_tokenizer)
measures = reweight.check(config, active, probes, mixture_interval * batch_rows, n_data)
if measures and found is None:
    reweight.check_texts(probes, active, val_sources, shards_tokenizer and shards_tokenizer['bos_id'], data_rank, n_data)
if document_mask and shards_tokenizer is None:
    raise BadInput('document_mask needs the beginning-of-document token, and these sources have no meta.json that names it.')
bos_id = shards_tokenizer['bos_id'] if document_mask or packing == 'document' else None
if bos_id is not None:
    check_documents(device, dtype)
tokenizer, token_bytes = None, None
if shards_tokenizer is not None:
    from lib.tokenizer import load_tokenizer, save_tokenizer
    tokenizer = load_tokenizer(os.path.join(data_dir, next(s.name for s in train_sources if s.meta is not None)))
    token_bytes = torch.tensor(tokenizer.token_bytes() + [0] * (vocab_size - tokenizer.vocab_size), device=device)
benchmarks = [name.strip() for name in eval_tasks.split(',') if name.strip()]
if benchmarks:
    from tools.benchmarks import Scorer, load_tasks, run_tasks
    if tokenizer is None:
        raise BadInput('eval_tasks needs a tokenizer, and these sources have no meta.json that names one.')
    with checkpoint.untouched_rng():
        benchmarks = load_tasks(benchmarks)                    # an unknown name shows here


def to_device(rows):
    """(n, T + 1) int32 numpy -> inputs (n, T) int32, targets (n, T) int64 with -1 = not counted, boundaries of documents or None, on the device."""
    inputs, targets, doc_ids = batch_of(torch.from_numpy(rows), bos_id)
    return [parallel.put(t, device) for t in (inputs, targets, None if doc_ids is None else document_boundaries(doc_ids))]


# -- model: on the meta device, sharded, then memory, then values ------------------------------------------------------
with torch.device('meta'):
    model = GPT(model_config)
peak, token_flops = peak_flops(device), flops_per_token(model_config, block_size)
if reshard_after_forward is None:
    reshard_after_forward = plan.too_large_whole(model_config, sizes)
compile, _reason = plan.choose_compile(compile, n_steps * total_batch_tokens * token_flops, peak, world_size, device)
parallel.apply_parallelism(model, layout, dtype, compile, activation_checkpointing, reshard_after_forward)
model.to_empty(device=device)
model.balance_loss = balance_loss
counts = count_parameters(model_config)
if is_master:
    print(f"model: {counts['total'] / 1e6:.2f}M parameters, {counts['non_embedding'] / 1e6:.2f}M without embeddings; {token_flops / 1e6:,.1f} MFLOP per token")
    print(f'device: {world_size} x {device_name(device)}, {dtype} ({dtype_reason}), compile={compile} ({_reason}), kernels: {kernels_in_use}'
          + (', malloc keeps freed memory' if keeps_memory and device.type == 'cpu' else ''))
    print(f'batch: {batch_rows} rows of {block_size} = {total_batch_tokens:,} tokens, {grad_accum} micro-steps; {n_steps} steps')
distiller = None
if distils:
    distiller = kd.Distiller(config, None if kd_cache else kd.open_teacher(about_teacher, device, dtype, layout, compile), caches, train_sources, device)
autocast = (torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext())

# -- optimizer ---------------------------------------------------------------------------------------------------------
optimizers = parallel.make_optimizers(model, optimizer, learning_rate, weight_decay, (beta1, beta2), adam_eps)

# -- init_from, resume -------------------------------------------------------------------------------------------------
first_step, mixture_state, presence_state = 0, {}, None
if found is not None:
    saved = checkpoint.read_state(found)
    checkpoint.check_resumable(found, saved, config, asdict(ModelConfig(**saved['model'])), asdict(model_config), end_step)
    loader.load_state_dict(saved['loader'])
    if (saved['config']['sources'], saved['config']['mixture']) != (sources, mixture):           # other weights were asked for: in force from here
        loader.set_weights(start_weights)
    _note = checkpoint.load(found, model, optimizers)
    first_step, mixture_state, presence_state = saved['step'], saved['mixture_state'], saved['presence_state']
    _changed = [k for k in config if k not in ('resume', 'out_dir') and saved['config'].get(k) != config[k]]
    if is_master:
        print(f'resume: {found}, step {first_step}' + (f'; changed since: {", ".join(_changed)}' if _changed else ''))
    if _note:
        print(f'resume: {_note}')
elif init_from is not None:
    _where = hf.start_from(init_from, model, tokenizer and tokenizer.fingerprint)
    if is_master:
        print(f'init_from: weights of {_where}')
else:
    init_weights(model, seed)
    if is_master and resume:
        print(f'resume: {out_dir} has no checkpoint yet; starting at step 0')
metrics_log = None
if is_master:
    os.makedirs(storage.download(out_dir) if used else run_folder, exist_ok=True)
    with open(os.path.join(run_folder, 'config.json'), 'w', encoding='utf-8') as f:
        json.dump(config, f, indent=1)
    if tokenizer is not None:
        save_tokenizer(run_folder, tokenizer)
    metrics_log = MetricsLog(run_folder, first_step, config, wandb_mode, wandb_project)
barrier()


# -- evaluate, save ----------------------------------------------------------------------------------------------------
def evaluate():
    """Loss and bits per byte of every source on its first eval_rows validation rows, and of the probe sets on theirs: metrics to log."""
    with autocast:
        return validate.evaluate(model, val_sources, probes, loader.weights, eval_rows, batch_size, to_device, token_bytes, data_rank, n_data)


def run_benchmarks():
    """eval_tasks with the model as it is, on all ranks: metrics to log. The random generators are left as they were."""
    scorer = Scorer(model, tokenizer, True, tokenizer.bos_id, block_size, device, batch_size * block_size, lambda: autocast, quiet=True)
    with checkpoint.untouched_rng(), torch.compiler.set_stance('force_eager'):      # their many shapes would use up the limit of recompilations
        results = run_tasks(scorer, benchmarks, eval_tasks_limit)
    return {f'eval/{name}_{metric}': value for name, r in results.items() for metric, (value, _) in r['metrics'].items()}


def save(step):
    """A checkpoint of the run before `step` is trained. Returns seconds that it took from training."""
    return checkpointer.save(step, model, optimizers, dict(
        config=config, model=asdict(model_config), loader=loader.state_dict(), tokenizer=tokenizer and tokenizer.fingerprint,
        context=block_size, mixture_state=proxy.state() if proxy else mixture_state, presence_state=micro.state() if micro is not proxy else None))


def more_metrics(values, n_valid):
    """Of the sums over ranks that distillation and experts add to a step's."""
    return {**(kd.metrics(values, n_valid) if distiller else {}), **(dict(zip(moe.METRICS, values[-3:])) if n_expert else {})}


# -- the loop ----------------------------------------------------------------------------------------------------------
proxy = None
if mixture in baselines.PROXIES:
    proxy = baselines.Proxy(model, config, train_sources, val_sources, about_reference, to_device, autocast, device, dtype, layout, mixture_state, data_rank, n_data)
micro = self_influence.MicroBatches(model, presence_layers, presence, grad_accum, presence_state) if presence != 'off' else proxy      # takes the gradients
my_rows = rows_of_rank(batch_rows, batch_size, data_rank, n_data).reshape(grad_accum, batch_size)
first_reweighting = max(n_warmup, n_steps // 20) if mixture_warmup is None else mixture_warmup
last_saved, drawn_before = first_step if found else None, loader.drawn()
watcher = watch.Watch(rank, world_size, hang_timeout)
stop, not_finite = checkpoint.StopRequest(), torch.zeros((), device=device)        # 1 from the first loss or norm on that is not finite
bar = tqdm(total=end_step, initial=first_step, disable=not is_master, unit='step', dynamic_ncols=True)
progress = Progress(bar, metrics_log, checkpointer, total_batch_tokens, token_flops, peak and peak * world_size, device)
tracer = start_trace(os.path.join(run_folder, 'trace.json')) if profile and is_master else None
for step in range(first_step, end_step + 1):
    lr = schedules.learning_rate_at(step, config, n_steps, n_warmup)
    for group in (g for o in optimizers for g in o.param_groups):
        group['lr'] = lr
    watcher.at(step, 'begins')
    checkpointer.poll()
    terminated, interrupted = all_reduce_sum([stop.signal == signal.SIGTERM, stop.signal == signal.SIGINT], everywhere=True)
    stopping = int(signal.SIGTERM) if terminated else int(signal.SIGINT) if interrupted else 0      # the same on every rank
    saves = (step % save_interval == 0 or step == end_step or stopping) and step > 0 and step != last_saved
    news, benchmarks_due = kept_shares if step == first_step else {}, benchmarks and (step % eval_tasks_interval == 0 or step == end_step)
    evaluates = step % eval_interval == 0 or step == end_step or benchmarks_due
    reweights = measures and max(1, first_reweighting) <= step < n_steps and step % mixture_interval == 0 or mixture in baselines.ONLINE and baselines.due(
        config, step, first_reweighting, n_steps, len(active))
    progress.read(saves or stopping or evaluates or reweights)
    if saves:
        watcher.at(step, 'saves')
        news = news | {'system/save_ms': 1e3 * save(step)}     # before the evaluation: nothing that it does can lose the step
        last_saved = step
    if stopping:
        break
    if evaluates:
        watcher.at(step, 'evaluates', patient=bool(benchmarks_due))
        model.eval()
        news = news | evaluate() | (run_benchmarks() if benchmarks_due else {})
        model.train()
    if reweights:
        watcher.at(step, 'measures for the mixture')
        checkpointer.finish()                                  # an error in there must not cost the checkpoint that is being written
        model.eval()                                           # experts do not count what is only measured
        with autocast:
            mixture_state, measured = (reweight if measures else baselines).update(model, loader, active, probes if measures else val_sources, config, mixture_state,
                                                                                step, n_steps, batch_rows, optimizers, to_device, data_rank, n_data)
        model.train()
        news = news | measured
    if news:
        if is_master:
            metrics_log.write(step, news)
        progress.restart()
    if step == end_step:
        break

    # this rank's rows of the global batch; the number of valid tokens over all ranks is known before the first backward
    watcher.at(step, 'reads its rows')
    t0 = time.perf_counter()
    source_index, cursors = loader.next_batch(batch_rows)
    rows = proxy.read(loader, source_index, cursors) if proxy else [loader.read(source_index[part], cursors[part]) for part in my_rows]
    micro_batches = [(*to_device(r), parallel.put(valid_positions(torch.from_numpy(r[:, 1:]), model.tp if distiller else None), device)) for r in rows]
    read_s = time.perf_counter() - t0
    watcher.at(step, 'trains')
    n_tokens = all_reduce_sum([(r[:, 1:] >= 0).sum() for r in rows])
    n_valid = sum(n_tokens)
    if not n_valid:
        progress.read(True)
        raise RunFault(f'the batch of step {step} has no token that the loss counts. Raise total_batch_tokens, or look at the masks of the sources.')
    if micro is not proxy:
        micro.begin(self_influence.tau_at(step, n_steps, presence_tau, presence_schedule, presence_switch))
    loss_sum, n_hits = torch.zeros(2, device=device, dtype=torch.float64)
    for micro_step, (inputs, targets, doc_ids, valid) in enumerate(micro_batches):
        if layout is not None:                                 # gradients cross the network once, after the last micro-step, where there is room for whole ones
            is_last = micro_step == len(micro_batches) - 1
            model.set_requires_gradient_sync(bool(micro or reshard_after_forward) or is_last)
            model.set_requires_all_reduce(bool(micro) or is_last)           # between copies of the model, in any case
            model.set_reshard_after_backward(reshard_after_forward or is_last)
        with autocast:
            objective = distiller and distiller.objective(inputs, doc_ids, source_index[my_rows[micro_step]], cursors[my_rows[micro_step]], valid)
            loss, losses, hits = model.loss(inputs, targets, doc_ids=doc_ids, objective=objective, valid=valid)
        if proxy:
            proxy.see(inputs, targets, doc_ids, losses)
        (loss * (n_data / n_valid)).backward()                 # FSDP averages over ranks; the loss is a sum over all of them
        loss_sum += losses.sum()                               # cross-entropy, also where the loss is another
        n_hits += hits.sum()
        if micro:                                              # takes the gradient away; `finish` puts the weighted sum in its place
            micro.add(n_tokens[micro_step] / n_valid)
    micro_metrics = proxy.finish(step, lr, n_valid) if proxy else micro.finish() if micro else {}
    grad_norm = parallel.gradient_norm(model)
    sums = parallel.sum_over_ranks(torch.stack((loss_sum, n_hits, *(distiller.take() if distiller else ()))), layout, everywhere=bool(distiller))
    not_finite = torch.maximum(not_finite, (~torch.isfinite(sums[0] + grad_norm)).float())
    if grad_clip > 0:
        parallel.clip_gradients(model, grad_clip, grad_norm)
    for o in optimizers:
        parallel.step(o, not_finite)                               # leaves everything as it is once a number was not finite
        o.zero_grad(set_to_none=True)
    loads = moe.balance(model, balance_rate)
    logs = is_master and ((step + 1) % log_interval == 0 or step + 1 == end_step)
    if logs:
        drawn = {name: n - drawn_before[name] for name, n in loader.drawn().items()}
        drawn_before = loader.drawn()
    if tracer:
        tracer.step()
    progress.add(step, torch.cat((sums, loads, grad_norm[None])), n_valid, {name: int((source_index == i).sum()) for i, name in enumerate(loader.names)}, read_s, {
        'train/learning_rate': lr, **{f'mixture/weight_{name}': weight for name, weight in loader.weights.items()},
        **{f'mixture/drawn_{name}': n / sum(drawn.values()) for name, n in drawn.items()},
        **{f'mixture/epochs_{name}': n for name, n in loader.epochs().items()}, **micro_metrics} if logs else None, more_metrics)
watcher.at(step, 'ends')
bar.close()
checkpointer.finish()
if tracer:
    tracer.stop()

# -- what is left behind -----------------------------------------------------------------------------------------------
if stopping:
    if is_master:
        print(f'stopped by a signal before step {step}; {"saved" if step else "nothing to save yet"}. Go on with --resume=True.', flush=True)
elif is_master:
    from tools.plots import draw_run, print_run
    print_run(run_folder, loader.epochs())
    print(f'curves: {draw_run(run_folder)}\ncheckpoint: {os.path.join(out_dir, "ckpt", f"step_{end_step:06d}")}')
if not stopping and sample_tokens and tokenizer is not None:
    prompt = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(sample_prompt)]], device=device)
    with autocast:
        ids = model.generate(prompt, sample_tokens, temperature=0.8, top_k=50, stop_token=tokenizer.bos_id, seed=seed)
    if is_master:
        print(f'sample: {tokenizer.decode([i for i in ids[0].tolist() if i != tokenizer.bos_id])}')
if is_master:
    metrics_log.close()
    storage.upload(out_dir)
barrier()                                                      # a launcher may kill the others when one has ended
leave_ranks(128 + stopping if stopping else 0)
