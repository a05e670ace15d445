"""Trains a language model on a mixture of data sources. This file is the full story of a run.

    python train.py config/demo.py                                          # a laptop, minutes
    torchrun --standalone --nproc_per_node=8 train.py \\
        config/model/mobilellm_140m.py config/stage1.py                     # one node
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=HOST --master_port=29500 \\
        train.py config/model/mobilellm_950m.py config/stage1.py            # the first of two nodes

Config files and --key=value apply from left to right. --help lists every knob. A run lives in
out_dir: config.json, metrics.jsonl, ckpt/, curves.png. A run that was killed or stopped continues
with --resume=True and ends as if nothing had happened. A fresh model starts at a loss of
ln(vocab_size): 8.3 for the demo, 11.8 for a vocabulary of 128,256.
"""
from configurator import install_hook

install_hook()                      # first: Ctrl-C may come while torch is imported

import json
import os
import time
from dataclasses import asdict

import torch
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

import kd
import methods
from configurator import BadInput, RunFault, at_least, between, configure, one_of, pick
from data import (
    DataConfig,
    Feeder,
    MixtureLoader,
    Source,
    check_sample,
    check_sources,
    check_unchanged,
    common_template,
    common_tokenizer,
    limit_rows,
    open_probe,
    prepare_missing,
    report_packing,
)
from lib import checkpoint, effects, hf, parallel, storage
from lib import device as devices
from lib.log import LogConfig, MetricsLog, Progress, start_trace
from lib.schedule import count_micro_steps, count_steps
from lib.tokenizer import load_tokenizer, save_tokenizer
from lib.validate import evaluate
from lib.watch import Watch
from methods import reweight, selection
from model import GPT, ModelConfig, count_parameters, flops_per_token, init_weights
from ops import moe, ranks
from ops.attention import check_documents
from ops.fp8 import check as check_fp8
from ops.fp8 import convert as convert_to_fp8

# -- input and output --
out_dir = 'out/run'                 # folder of this run. It must be new unless resume=True
resume = False                      # continue the run in out_dir exactly, or start it if it has no
                                    # checkpoint yet
continue_from: str | None = None    # run or checkpoint whose full state this run begins with:
                                    # weights, optimizer, data position. `sources` may have other
                                    # weights
init_from: str | None = None        # initial weights: run, checkpoint, Hugging Face folder or hub
                                    # name. None: random
seed: between(0, 4294967295) = 1337 # of initial weights and data order
eval_interval: at_least(1) = 1000   # steps between evaluations, the first before training
eval_rows: at_least(1) = 128        # fixed validation rows of every source
eval_tasks = ''                     # benchmarks to run while training, with commas, as --tasks of
                                    # tools/evaluate.py
eval_tasks_interval: at_least(1) = 5000     # steps between runs of them, the first before training
eval_tasks_limit: at_least(1) | None = 200   # documents of each benchmark. None: all
save_interval: at_least(1) = 1000   # steps between checkpoints. There is one after the last step
sample_tokens: at_least(0) = 0      # tokens of text to generate after training
sample_prompt = ''                  # beginning of that text
# -- data --
data_dir = 'data'                   # folder of the sources
sources: dict[str, float] = {}      # source -> start weight in the mixture, on any positive scale
weigh_by: one_of('rows', 'size') = 'rows'       # rows: weights are shares of the rows drawn. size:
                                    # weights are multiplied by the rows of a source, so 1.0 reads
                                    # all of them equally often
prepare: str | None = None          # script that makes missing sources (it gets --out=data_dir)
block_size: at_least(1) = 2048      # tokens of a row
batch_size: at_least(1) = 16        # rows per rank and micro-step
total_batch_tokens: at_least(1) = 524288        # tokens of an optimizer step over all ranks. It
                                    # gives the number of micro-steps
packing: one_of('window', 'document') = 'window'        # window: rows are windows of the stream.
                                    # document: full documents with their loss masks (SFT)
overlong: one_of('truncate', 'drop') = 'truncate'       # packing='document': what to do with
                                    # documents longer than a row
document_mask = False               # packing='window': attention stays within a document
# -- objective --
mixture: one_of(
    'fixed', 'stratified', 'natural', 'unimax', 'schedule', 'influence', 'ado', 'skillit', 'aioli',
    'doge', 'doremi') = 'fixed'     # how the weights change while training. stratified: equal.
                                    # natural: by size. unimax: as equal as max_epochs allows.
                                    # schedule: see mixture_schedule. doge and doremi are proxy runs
mixture_interval: at_least(1) = 1000        # steps between two updates of the weights
teacher: str | None = None          # model to distil from: run, checkpoint, Hugging Face folder or
                                    # hub name, with the same tokenizer
balance_rate: at_least(0.0) = 1e-3  # experts: step of the biases that even out their load. 0: none
balance_loss: at_least(0.0) = 1e-4  # experts: weight of the loss on uneven loads within a row
# -- optimizer and schedule --
optimizer: one_of('adamw', 'muon') = 'adamw'    # muon: for matrices of the blocks, with AdamW for
                                    # the rest
learning_rate: at_least(0.0) = 4e-3     # peak
weight_decay: at_least(0.0) = 0.1   # of matrices and embeddings
beta1: between(0.0, 0.9999) = 0.9   # Adam
beta2: between(0.0, 0.999999) = 0.95        # Adam
adam_eps: at_least(0.0) = 1e-8      # Adam
grad_clip: at_least(0.0) = 1.0      # largest global gradient norm. 0: no clipping
max_steps: int | None = None        # optimizer steps. The smallest of max_steps, max_tokens and
                                    # epochs counts
max_tokens: int | None = None       # tokens
epochs: float | None = None         # times the rows of all sources together
stop_step: at_least(1) | None = None        # end before this step, saved and evaluated, with the
                                    # schedule of the full run. Another run may continue it
warmup_steps: at_least(0) = 2000    # linear from 0
warmup_frac: between(0.0, 1.0) | None = None    # share of the steps, in place of warmup_steps
schedule: one_of('linear', 'cosine', 'wsd', 'constant') = 'linear'      # after the warm-up. wsd:
                                    # linear over the last decay_frac
decay_frac: between(1e-9, 1.0) = 0.2        # wsd: share of the steps that decay
min_lr_frac: between(0.0, 1.0) = 0.1        # learning rate at the end, as a share of the peak
# -- cost on paper --
dry_run = False                     # print what the run would cost and stop. It needs no data
plan_on: str | None = None          # dry_run: GPUs, like 64xH100. None: what there is here
plan_mfu: between(1e-3, 1.0) = 0.4  # dry_run: share of the peak that matrix products reach
plan_link: at_least(1e-3) | None = None     # dry_run: GB/s from a GPU to other nodes. None: 25
                                    # (A100) or 50
plan_price: at_least(0.0) = 2.5     # dry_run: dollars of a GPU-hour

# Every other knob is declared in the file that reads it.
config = configure(globals(), owners=(
    ModelConfig, DataConfig, kd.DistillConfig, *methods.OWNERS, devices.DeviceConfig,
    parallel.ParallelConfig, checkpoint.CheckpointConfig, LogConfig))

# -- derived values and checks ---------------------------------------------------------------------
# A launcher that restarts a failed run repeats the same command, without --resume.
if devices.is_restarted() and checkpoint.is_of(out_dir, config):
    resume = True
run = devices.start(config)
torch.manual_seed(seed + run.rank)
if config['compile'] is not False and not dry_run:
    parallel.warm_compiler(run.device)      # in the background, while data and model are prepared
effects.check_names(config, config.defaults)
if not out_dir:
    raise BadInput("out_dir = '' names no folder. Give the folder of this run.")
for folder in (data_dir, *(os.path.join(data_dir, name) for name in sources)):
    if os.path.realpath(out_dir) == os.path.realpath(folder):
        raise BadInput(f"out_dir = '{out_dir}' is a folder of the data. Give another --out_dir.")
if not sources:
    raise BadInput(
        "sources is empty. Give a config file, or --sources=\"{'name': weight}\" with folders of "
        'data_dir.')
if max_steps is None and max_tokens is None and epochs is None:
    raise BadInput('neither max_steps nor max_tokens nor epochs says how long to train. Set one.')
model_config = pick(ModelConfig, config)
n_ranks = run.world_size
if dry_run:
    from tools import plan
    planned = plan.machine(plan_on, run.world_size, config['device'])
    n_ranks = planned.count
sizes = ranks.resolve_sizes(
    n_ranks, config['dp_replicate'], config['dp_shard'], config['tp'], config['ep'])
grad_accum = count_micro_steps(config, n_ranks // config['tp'])
batch_rows = total_batch_tokens // block_size           # rows of a global batch
ranks.check_sizes(sizes, model_config, batch_size * block_size)
if optimizer == 'muon' and (config['tp'] > 1 or model_config.n_expert):
    reason = 'experts are stacks of them'
    if config['tp'] > 1:
        reason = f"tp = {config['tp']} splits them"
    raise BadInput(f"optimizer = 'muon' needs full matrices, and {reason}. Use adamw.")
if dry_run:
    plan_dtype = run.dtype
    if planned.name != 'CPU' and config['dtype'] == 'auto':
        plan_dtype = torch.bfloat16
    plan_teacher = None
    if teacher and not config['kd_cache']:
        plan_teacher = hf.find_model(teacher, weights=False)['model']
    if run.is_master:
        n_steps = count_steps(config, None)
        plan.print_plan(model_config, config, planned, plan_dtype, n_steps, plan_teacher)
    devices.leave_ranks(0)
if config['fp8']:
    check_fp8(config, run.device)


def check_memory():
    """Raises BadInput for a model that cannot fit. Activations, which are estimates, do not count.
    """
    from tools import plan
    terms, _ = plan.memory_plan(
        model_config, config, sizes, run.dtype.itemsize, run.device.type == 'cuda')
    needed = sum(n for name, n in terms.items() if name not in ('activations', 'loss', 'backward'))
    # The ranks of a node share the memory of their CPUs.
    n_local = 1
    if run.device.type == 'cpu' and run.world_size > 1:
        n_local = devices.environment_number('LOCAL_WORLD_SIZE', 1)
    devices.check_memory(n_local * needed, run.device, 'the model with gradients and optimizer')


check_memory()

# -- the run folder --------------------------------------------------------------------------------
# Checked before anything is written: a second run in the folder would mix the two logs.
devices.on_master(lambda: storage.check_writable(out_dir))
used = devices.on_master(lambda: checkpoint.holds_run(out_dir))
run_folder = storage.local_folder(out_dir)              # out_dir, unless that is in an object store
if used and not resume:
    raise BadInput(
        f"out_dir '{out_dir}' already holds a run ({used}). Continue it with --resume=True, or "
        'choose another --out_dir.')
# A folder that is there is locked now, a new one when it is made: a mistake leaves nothing behind.
# The machine of a killed rank may keep the lock of an NFS mount for the server's lease.
patience_s = 120.0 if devices.is_restarted() else 0.0
devices.on_master(lambda: storage.lock_folder(run_folder, patience_s, must_exist=True))
found = checkpoint.find_beginning(out_dir, resume, continue_from)
layout = ranks.make_layout(run.device.type, run.rank, run.world_size, sizes)
run.join(layout)
saves_async = config['async_save']
if saves_async is None:
    saves_async = run.device.type == 'cuda'
checkpointer = checkpoint.Checkpointer(
    out_dir, config['keep_last'], saves_async, config['keep_every'])

# -- data ------------------------------------------------------------------------------------------
if prepare is not None:
    devices.on_master(lambda: prepare_missing(prepare, data_dir, sources))
row_options = dict(vocab_size=model_config.vocab_size, packing=packing, overlong=overlong)
train_sources = []
val_sources = []
for name in sources:
    train_sources.append(Source(data_dir, name, 'train', block_size, seed, **row_options))
    val_sources.append(Source(data_dir, name, 'val', block_size, 0, **row_options))
active = [source for source in train_sources if sources[source.name] > 0]
probes = [open_probe(data_dir, domain, block_size, **row_options) for domain in config['probe']]
all_sources = train_sources + val_sources + probes
shards_tokenizer = common_tokenizer(all_sources)        # what meta.json records, None: unknown
if packing == 'document' and run.is_master:
    report_packing(train_sources + val_sources)
# Before the model is built, so that a mistake about the teacher or its cache shows at once.
distillation = kd.prepare(config, active, shards_tokenizer)             # None: cross-entropy
news = {}                                               # metrics that no training step gives
if config['select'] == 'scores':
    news = selection.keep_scored(active, config)
limit_rows(train_sources, config['source_rows'])
# After the selection of rows, which changes how many rows an epoch has.
n_steps = count_steps(config, sum(source.n_windows for source in active))
n_warmup = warmup_steps if warmup_frac is None else round(warmup_frac * n_steps)
end_step = n_steps if stop_step is None else min(stop_step, n_steps)
method_config = methods.as_published(config)            # published settings in place of None
for sentence in effects.check(method_config, config.defaults, n_steps, n_warmup):
    if run.is_master:
        print(f'warning: {sentence}')
start_weights = methods.start_weights(config, train_sources, n_steps * batch_rows, {})
loader = MixtureLoader(train_sources, start_weights, seed)
check_sources(all_sources, active, batch_rows)
devices.on_master(lambda: check_sample(all_sources, seed))
evaluated = {}                                          # what check_unchanged compares at a resume
for source in val_sources + probes:
    evaluated[f'{source.name}/{source.split}'] = source.shard_fingerprints()
bos_id = None                                           # not None: attention stays within documents
if document_mask or packing == 'document':
    if shards_tokenizer is None:
        raise BadInput(
            'document_mask needs the token that documents begin with, and these sources have no '
            'meta.json that names it.')
    bos_id = shards_tokenizer['bos_id']
    check_documents(run.device, run.dtype)
valid_group = layout.tp if layout and distillation else None
feeder = Feeder(run.device, batch_size, run.data_rank, run.n_data, bos_id, valid_group)
# The methods check their settings now. They get the model when it is there.
training = methods.Training(
    method_config, run, feeder, loader, active, val_sources, probes, shards_tokenizer, n_steps,
    n_warmup, batch_rows)
method = methods.make(training)                         # None: fixed weights
loss_weights = methods.loss_weights(config, active)     # None: all losses count the same
observe = getattr(method, 'observe', None)              # None: the method needs no training losses
taker = methods.make_taker(training, method, grad_accum)        # None: gradients are summed
if isinstance(method, reweight.Influence) and found is None:
    first_token = shards_tokenizer and shards_tokenizer['bos_id']
    reweight.check_texts(probes, active, val_sources, first_token, run)
tokenizer = None
token_bytes = None                                      # (V,) bytes of every token
if shards_tokenizer is not None:
    folder = next(source.name for source in all_sources if source.meta is not None)
    folder = os.path.join(data_dir, folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != shards_tokenizer['fingerprint']:
        raise BadInput(
            f"the tokenizer in {folder} ({tokenizer.fingerprint}) is not the one that its shards "
            f"were made with ({shards_tokenizer['fingerprint']}, by meta.json). Restore it, or "
            'prepare the source again.')
    if tokenizer.bos_id != shards_tokenizer['bos_id']:
        raise BadInput(
            f"documents begin with token {tokenizer.bos_id} by the tokenizer in {folder}, and with "
            f"{shards_tokenizer['bos_id']} by its meta.json. Restore them, or prepare the source "
            'again.')
    padding = [0] * (model_config.vocab_size - tokenizer.vocab_size)
    token_bytes = torch.tensor(tokenizer.token_bytes() + padding, device=run.device)
if sample_tokens and tokenizer is None:
    raise BadInput('sample_tokens needs a tokenizer, and these sources have no meta.json.')
tasks = [name.strip() for name in eval_tasks.split(',') if name.strip()]
if tasks:
    from tools.benchmarks import Scorer, load_tasks, run_tasks
    if tokenizer is None:
        raise BadInput('eval_tasks needs a tokenizer, and these sources have no meta.json.')
    with checkpoint.untouched_rng():
        tasks = load_tasks(tasks)                       # an unknown name is an error here

# -- model: on the meta device, split, compiled, sharded; then memory, then values -----------------
# On the meta device a model takes no memory, so one that no single rank could hold is built, too.
with torch.device('meta'):
    model = GPT(model_config)
peak = devices.peak_flops(run.device)
token_flops = flops_per_token(model_config, block_size)
reshard_after_forward = config['reshard_after_forward']
if reshard_after_forward is None:
    reshard_after_forward = parallel.too_large_replicated(model_config, sizes)
total_flops = n_steps * total_batch_tokens * token_flops
run.compile_blocks, compile_reason = parallel.choose_compile(
    config['compile'], total_flops, peak, run)
parallel.split(model, layout)
if config['fp8']:
    n_converted = convert_to_fp8(model, run.device)
    slow = '' if run.compile_blocks else ' (slower than bfloat16 without compile=True)'
    run.description += f', {n_converted} linear layers in fp8{slow}'
parallel.prepare_blocks(model, run.compile_blocks, config['activation_checkpointing'])
for module, fsdp_options in parallel.fsdp_parts(model, layout, run.dtype, reshard_after_forward):
    fully_shard(module, **fsdp_options)
parallel.finish_sharding(model, layout)
model.to_empty(device=run.device)
model.balance_loss = balance_loss
if run.is_master:
    counts = count_parameters(model_config)
    print(
        f"model: {counts['total'] / 1e6:.2f}M parameters, {counts['non_embedding'] / 1e6:.2f}M "
        f'without embeddings; {token_flops / 1e6:,.1f} MFLOP per token')
    print(
        f'device: {run.world_size} x {devices.device_name(run.device)}, {run.description}, '
        f'compile={run.compile_blocks} ({compile_reason})')
    print(
        f'batch: {batch_rows} rows of {block_size} = {total_batch_tokens:,} tokens, {grad_accum} '
        f'micro-steps; {n_steps} steps')
distiller = kd.make_distiller(config, distillation, train_sources, run)
optimizers = parallel.make_optimizers(model, config)
training.model = model
training.optimizers = optimizers

# -- resume, init_from or random weights -----------------------------------------------------------
first_step = 0
start = None                                            # what find_model says of init_from
started_from = {}                                       # config and context of init_from's model
if found is not None:
    saved = checkpoint.read_state(found)
    with checkpoint.understanding(found):
        saved_model = asdict(ModelConfig(**saved['model']))
        checkpoint.check_resumable(
            found, saved, config, saved_model, asdict(model_config), end_step)
        # The loader compares the shards with those of the checkpoint before any weights are read.
        loader.load_state_dict(saved['loader'])
        check_unchanged(val_sources + probes, saved.get('evaluated', {}), found)
        first_step = saved['step']
        if methods.starts_again(saved['config'], config):
            rows_to_come = (n_steps - first_step) * batch_rows
            loader.set_weights(methods.start_weights(       # they count from here on
                config, train_sources, rows_to_come, loader.cursors))
        note = checkpoint.load(found, model, optimizers)
        started_from = saved.get('started_from', {})
        # The state of another method says nothing to this one.
        if method and saved['mixture_state'] and saved['config']['mixture'] == mixture:
            method.load_state_dict(saved['mixture_state'])
        if taker and taker is not method and saved['presence_state']:
            taker.load_state_dict(saved['presence_state'])
    if run.is_master:
        changed = []
        for name, value in config.items():
            if name not in ('resume', 'out_dir') and saved['config'].get(name) != value:
                changed.append(name)
        since = f'; changed since: {", ".join(changed)}' if changed else ''
        print(f'resume: {found}, step {first_step}{since}')
    if note:
        print(f'resume: {note}')
elif init_from is not None:
    start = hf.start_from(init_from, model, tokenizer and tokenizer.fingerprint)
    started_from = dict(hf=start['hf'], context=start['context'])
    if run.is_master:
        print(f'init_from: weights of {start["checkpoint"] or start["folder"]}')
else:
    init_weights(model, seed)
    if run.is_master and resume:
        print(f'resume: {out_dir} has no checkpoint yet; starting at step 0')
metrics_log = None
devices.on_master(lambda: storage.lock_folder(run_folder, patience_s))
if run.is_master:
    if used:
        storage.download(out_dir)
    storage.write(os.path.join(run_folder, 'config.json'), json.dumps(config, indent=1).encode())
    # What stands in the folder of a run that goes on is kept.
    if tokenizer is not None and not used:
        save_tokenizer(run_folder, tokenizer)
        about = start if found is None else hf.find_model(found)
        # What the model's folder says about its use holds for shards of the same tokenizer.
        if about is not None and about['fingerprint'] == tokenizer.fingerprint:
            hf.copy_companions(about['folder'], run_folder)
        template, template_folder = common_template(data_dir, train_sources)
        if template is not None:
            hf.write_template(run_folder, template, template_folder)
    metrics_log = MetricsLog(run_folder, first_step, config)
devices.barrier()


# -- what a step may call --------------------------------------------------------------------------
def is_due(step, interval):
    return step % interval == 0 or step == end_step


def save(step):
    """Saves the run as it is before `step` is trained. Returns metrics."""
    watcher.at = (step, 'saves')
    presence_state = None
    if taker and taker is not method:
        presence_state = taker.state_dict()
    seconds = checkpointer.save(step, model, optimizers, dict(
        config=config, model=asdict(model_config), loader=loader.state_dict(), evaluated=evaluated,
        tokenizer=tokenizer and tokenizer.fingerprint, started_from=started_from,
        hf=started_from.get('hf'), context=max(block_size, started_from.get('context', 0)),
        mixture_state=method.state_dict() if method else {}, presence_state=presence_state))
    return {'system/save_ms': 1e3 * seconds}


def validate(step):
    """Loss and bits per byte of every source, and loss of every probe set. Returns metrics."""
    watcher.at = (step, 'evaluates')
    model.eval()
    with run.autocast:
        metrics = evaluate(
            model, feeder, val_sources, probes, loader.weights, eval_rows, token_bytes)
    model.train()
    return metrics


def run_benchmarks(step):
    """Runs eval_tasks on all ranks, without a change of random generators. Returns metrics."""
    watcher.at = (step, 'runs benchmarks')
    model.eval()
    scorer = Scorer(
        model, tokenizer, block_size, batch_size * block_size, lambda: run.autocast, quiet=True)
    # The many shapes of benchmarks would use up torch.compile's limit of recompilations.
    with checkpoint.untouched_rng(), torch.compiler.set_stance('force_eager'):
        results = run_tasks(scorer, tasks, eval_tasks_limit)
    model.train()
    metrics = {}
    for name, result in results.items():
        for metric, (value, _) in result['metrics'].items():
            metrics[f'eval/{name}_{metric}'] = value
    return metrics


def update_mixture(step):
    """Lets the mixture method measure and change the weights. Returns metrics."""
    watcher.at = (step, 'measures for the mixture')
    checkpointer.finish()               # a failure here must not cost the checkpoint being written
    model.eval()                        # experts ignore the load of measurements
    with run.autocast:
        metrics = method.update(step)
    model.train()
    return metrics


def raise_no_supervised_token(step):
    progress.read(everything=True)
    raise RunFault(
        f'the batch of step {step} has no supervised token. Raise total_batch_tokens, or check the '
        'masks of the sources.')


def more_metrics(sums, n_valid):
    """Metrics that distillation and MoE layers add to a step. sums: over all ranks."""
    metrics = distiller.metrics(sums, n_valid) if distiller else {}
    if model_config.n_expert:
        metrics |= dict(zip(moe.METRICS, sums[-3:], strict=True))
    return metrics


def agree_to_stop():
    """The signal, by which any rank was asked to stop, else 0. The same on every rank."""
    received = [stop.signal == number for number in checkpoint.SIGNALS]
    for number, n_ranks in zip(
            checkpoint.SIGNALS, parallel.sum_numbers(received, every_rank=True), strict=True):
        if n_ranks:
            return int(number)
    return 0


def forward_backward(micro, is_last):
    """Adds a micro-batch's gradient to .grad. Returns its summed cross-entropy and hits."""
    if layout is not None:
        parallel.sync_gradients(model, is_last, bool(taker), reshard_after_forward)
    with run.autocast:
        objective = distiller.objective(micro) if distiller else None
        weights = methods.TokenWeights(loss_weights, micro) if loss_weights else None
        loss, losses, hits = model.loss(
            micro.inputs, micro.targets, weights, doc_ids=micro.doc_ids, objective=objective,
            valid=micro.valid)
    # `loss` is a sum over tokens. It is divided by the supervised tokens of the step, over all
    # micro-batches and ranks. FSDP averages over ranks, so n_data turns that into a sum.
    (loss * (run.n_data / n_valid)).backward()
    if taker:
        taker.add(micro, losses)
    if observe:
        observe(step, micro, losses)
    return torch.stack((losses.sum().to(sum_dtype), hits.sum().to(sum_dtype)))


def log_step(step, step_metrics):
    """Hands the step to `progress`, which reads its numbers when the device has them."""
    is_logged = (step + 1) % config['log_interval'] == 0 or step + 1 == end_step
    metrics = None
    if is_logged and run.is_master:
        metrics = {**loader.metrics(), **step_metrics}
    rows = loader.count_rows(batch)
    progress.add(step, torch.cat((sums, loads, grad_norm[None])), n_valid, rows, read_s, metrics)


# -- the loop --------------------------------------------------------------------------------------
last_saved = first_step if found else None
watcher = Watch(run.rank, run.world_size, config['hang_timeout'])
stop = checkpoint.StopRequest()
not_finite = torch.zeros((), device=run.device)         # 1 once a loss or norm was not finite
sum_dtype = devices.sum_dtype(run.device)
bar = tqdm(
    total=end_step, initial=first_step, disable=not run.is_master, unit='step', dynamic_ncols=True)
progress = Progress(
    bar, metrics_log, total_batch_tokens, token_flops, peak and peak * run.world_size, run.device,
    checkpointer.last_good)
progress.more_metrics = more_metrics
tracer = None
if config['profile'] and run.is_master:
    tracer = start_trace(os.path.join(run_folder, 'trace.json'))
for step in range(first_step, end_step + 1):
    watcher.at = (step, 'begins')
    lr = parallel.learning_rate_at(step, config, n_steps, n_warmup)
    parallel.set_learning_rate(optimizers, lr)
    if checkpointer.pending:
        checkpointer.poll()
    stopping = agree_to_stop()
    saves = step > 0 and step != last_saved and (stopping or is_due(step, save_interval))
    runs_tasks = tasks and is_due(step, eval_tasks_interval)
    evaluates = is_due(step, eval_interval) or runs_tasks
    updates = method is not None and method.due(step)
    progress.read(everything=saves or stopping or evaluates or updates)
    if saves:                                           # before the evaluation, which may fail
        news |= save(step)
        last_saved = step
    if stopping:
        break
    if evaluates:
        news |= validate(step)
    if runs_tasks:
        news |= run_benchmarks(step)
    if updates:
        news |= update_mixture(step)
    if news:
        if run.is_master:
            metrics_log.write(step, news)
        news = {}
        progress.restart()
    if step == end_step:
        break

    # This rank's part of the global batch. Supervised tokens are counted before the first backward.
    watcher.at = (step, 'reads its rows')
    start = time.perf_counter()
    batch = loader.next_batch(batch_rows)
    micro_batches = feeder.split(loader, batch, by_source=bool(taker) and taker.by_source)
    read_s = time.perf_counter() - start
    watcher.at = (step, 'trains')
    micro_valid = parallel.sum_numbers([micro.n_valid for micro in micro_batches], layout)
    n_valid = sum(micro_valid)                          # of the step, over all ranks
    if not n_valid:
        raise_no_supervised_token(step)
    if taker:
        taker.begin(step, lr, micro_valid)
    sums = torch.zeros(2, device=run.device, dtype=sum_dtype)               # cross-entropy, hits
    for micro in micro_batches:
        sums += forward_backward(micro, is_last=micro is micro_batches[-1])
    step_metrics = taker.finish() if taker else {}
    grad_norm = parallel.gradient_norm(model)
    if distiller:
        sums = torch.cat((sums, distiller.sums()))
    sums = parallel.sum_over_ranks(sums, layout, every_rank=bool(distiller))
    not_finite = torch.maximum(not_finite, (~torch.isfinite(sums[0] + grad_norm)).float())
    if grad_clip > 0:
        parallel.clip_gradients(model, grad_clip, grad_norm)
    for o in optimizers:
        parallel.step(o, not_finite)                    # no change once a number was not finite
        o.zero_grad(set_to_none=True)
    loads = moe.balance(model, balance_rate) if model_config.n_expert else sums[:0]
    if tracer:
        tracer.step()
    log_step(step, {'train/learning_rate': lr, **step_metrics})
watcher.at = (step, 'ends')
bar.close()
checkpointer.finish()
if tracer:
    tracer.stop()

# -- what is left behind ---------------------------------------------------------------------------
if stopping:
    if run.is_master:
        kept = 'saved' if step else 'nothing to save yet'
        print(f'stopped by a signal before step {step}; {kept}. Continue with --resume=True.')
elif run.is_master:
    from tools.plots import draw_run, print_run
    print_run(run_folder, loader.epochs())
    print(f'curves: {draw_run(run_folder)}')
    print(f'checkpoint: {os.path.join(out_dir, "ckpt", f"step_{end_step:06d}")}')
if not stopping and sample_tokens:
    prompt = torch.tensor(
        [[tokenizer.bos_id, *tokenizer.encode(sample_prompt)]], device=run.device)
    # The length grows with every token, for which blocks would be compiled again.
    with run.autocast, torch.compiler.set_stance('force_eager'):
        ids = model.generate(
            prompt, sample_tokens, temperature=0.8, top_k=50, stop_token=tokenizer.bos_id,
            seed=seed)
    if run.is_master:
        text = tokenizer.decode([i for i in ids[0].tolist() if i != tokenizer.bos_id])
        print(f'sample: {text}')
if run.is_master:
    metrics_log.close()
    storage.upload(out_dir)
    storage.unlock_folder(run_folder)
devices.barrier()                               # a launcher may kill the others when one has ended
devices.leave_ranks(128 + stopping if stopping else 0)
