"""Benchmarks with the field's own code (lm-eval), and bits per byte of any text.

    python evaluate.py --ckpt=out/run --tasks=core --limit=200
    python evaluate.py --ckpt=HuggingFaceTB/SmolLM2-135M --tasks=arc_easy,my_task.yaml --compare=out/run/eval.json
    python evaluate.py --ckpt=out/run --bpb=data/finemath            # or a text, .jsonl, .jsonl.gz or parquet file
    torchrun --standalone --nproc_per_node=8 evaluate.py --ckpt=out/run --tasks=core

ckpt is a run, a checkpoint, an imported folder, a Hugging Face folder or a hub name. Task sets: `core` (MobileLLM-R1's tables)
and `bitdistill`; any task, group or tag of lm-eval and any path of a task's YAML besides; `-name` leaves one out. Results go to
a JSON file: for every task its version, shots, metrics with standard errors, number of documents, seconds and the score of every
single document, by which --compare tells a difference between two models far better than their standard errors could.
"""
import contextlib
import functools
import glob
import json
import logging
import math
import os
import time

import torch
import torch.distributed as dist
from lm_eval import __version__ as lm_eval_version
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

import hf
from chat import JINJA, find_template, render
from common import all_reduce_sum, leave_ranks, pick_dtype, start_ranks, tune_malloc
from configurator import BadInput, RunFault, configure, did_you_mean
from data import open_shard
from tokenizer import stop_ids

# task -> shots (None: the task's own number)
TASK_SETS = {
    'core': dict(arc_easy=0, arc_challenge=0, hellaswag=0, winogrande=0, piqa=0, boolq=0, openbookqa=0, social_iqa=0, mmlu=5, gsm8k=8,
                 minerva_math500=4, humaneval=0, mbpp=3),
    'bitdistill': dict(mnli=None, qnli=None, sst2=None, cnn_dailymail=None)}


class Scorer(TemplateLM):
    """One of our models as lm-eval sees it. Every rank is given all requests, does its share and ends up with all answers."""

    def __init__(self, model, tokenizer, add_bos, context, device, batch_tokens, autocast=contextlib.nullcontext, template=None,
                 quiet=False):
        """context: tokens that the model may see; batch_tokens: padded tokens of a forward pass, or of a generating batch's cache.

        A model that is sharded over the ranks needs all of them in every forward pass; so it is done whenever there are several.
        """
        super().__init__()
        self.model, self.tokens, self.add_bos, self.context = model, tokenizer, add_bos, context
        self.on, self.batch_tokens, self.autocast, self.template, self.quiet = device, batch_tokens, autocast, template, quiet
        self.my_rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.n_scored = self.n_cut = 0          # tokens that went through the model; requests that had to be cut
        self.text_of_special = {i: name for name, i in tokenizer.encoding._special_tokens.items()}

    # -- text --

    @property
    def eot_token_id(self):
        return stop_ids(self.tokens)[0]

    @property
    def prefix_token_id(self):
        return self.tokens.bos_id

    @property
    def tokenizer_name(self):
        return f'{self.tokens.fingerprint}-{self.template}'.replace('/', '_')

    def tok_encode(self, string, add_special_tokens=None, **_):
        """As transformers does it: special tokens in the text count, BOS comes first where the model's tokenizer puts it."""
        begins = string.startswith(self.text_of_special[self.tokens.bos_id])
        add = self.add_bos and not begins if add_special_tokens is None else add_special_tokens and self.add_bos
        return [self.tokens.bos_id] * add + self.tokens.encode_marked(string)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return render(self.tokens, chat_history, JINJA.get(self.template, self.template), add_generation_prompt)

    def chat_template(self, chat_template=False):
        return JINJA.get(self.template, self.template)

    # -- work over ranks --

    def share(self, batches, work, what):
        """work(batch) -> {request: answer}. Every rank does each so-many-th batch, all take part in every one; answers of all."""
        answers = {}
        for start in tqdm(range(0, len(batches), self.ranks), desc=what, disable=self.quiet or self.my_rank > 0, dynamic_ncols=True):
            at = start + self.my_rank
            done = work(batches[min(at, len(batches) - 1)])
            if at < len(batches):
                answers |= done
        if self.ranks > 1:
            parts = [None] * self.ranks
            dist.all_gather_object(parts, answers)
            answers = {key: value for part in parts for key, value in part.items()}
        return answers

    def batches(self, items, length, extra=0):
        """Cuts items, longest first, into batches of at most batch_tokens padded tokens (`extra` more per row)."""
        batches, longest = [], 0
        for item in items:
            if not batches or (len(batches[-1]) + 1) * (longest + extra) > self.batch_tokens:
                batches.append([])
                longest = length(item)
            batches[-1].append(item)
        return batches

    # -- log-likelihoods --

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        return self.score([(context, continuation) for _, context, continuation in requests])

    def score(self, pairs):
        """[(context ids, continuation ids)] -> [(sum of the continuation's log-probabilities, whether greedy decoding gives it)].

        Requests with the same input (choices of one token) go through the model once. A pair longer than the context loses its
        beginning.
        """
        inputs = {}
        for request, (context, continuation) in enumerate(pairs):
            if len(continuation) > self.context:
                raise BadInput(f'a continuation has {len(continuation):,} tokens, the context of the model {self.context:,}.')
            self.n_cut += len(context) + len(continuation) > self.context + 1
            tokens = (*context, *continuation)[-(self.context + 1):][:-1]
            inputs.setdefault(tokens, []).append((request, continuation))

        def work(batch):
            width = len(batch[0][0])
            idx = torch.zeros(len(batch), width, dtype=torch.int64)
            places = []                                               # (request, row, position, target) of every token asked for
            for row, (tokens, asked) in enumerate(batch):
                idx[row, :len(tokens)] = torch.tensor(tokens)
                places += [(request, row, len(tokens) - len(continuation) + k, target)
                           for request, continuation in asked for k, target in enumerate(continuation)]
            request, row, position, target = torch.tensor(places, device=self.on).T
            with self.autocast():
                losses, hits = self.model.score(idx.to(self.on), row, position, target)
            self.n_scored += idx.numel()
            numbers, which = request.unique(return_inverse=True)
            total = torch.zeros(len(numbers), dtype=torch.float64, device=self.on).index_add_(0, which, -losses.double())
            misses = torch.zeros(len(numbers), dtype=torch.int64, device=self.on).index_add_(0, which, (~hits).long())
            return dict(zip(numbers.tolist(), zip(total.tolist(), (misses == 0).tolist())))

        ordered = sorted(inputs.items(), key=lambda item: (-len(item[0]), item[0]))
        answers = self.share(self.batches(ordered, lambda item: len(item[0])), work, 'log-likelihoods')
        return [answers[request] for request in range(len(pairs))]

    def rolling(self, documents):
        """Log-likelihoods of whole documents (lists of ids), the first token after BOS, long ones in windows of the context."""
        windows = [(i, *make_disjoint_window(window)) for i, ids in enumerate(documents) for window in get_rolling_token_windows(
            ids, self.prefix_token_id, self.context, 1)]
        totals = [0.0] * len(documents)
        for (i, _, _), (value, _) in zip(windows, self.score([pair for _, *pair in windows])):
            totals[i] += value
        return totals

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return self.rolling([self.tok_encode(request.args[0]) for request in requests])

    # -- generation --

    def generate_until(self, requests, disable_tqdm=False):
        groups = {}
        for request, (context, options) in enumerate(r.args for r in requests):
            options = normalize_gen_kwargs(options, 256)
            new_tokens = options['max_gen_toks']
            if new_tokens >= self.context:
                raise BadInput(f'a task generates up to {new_tokens:,} tokens, more than the context of the model ({self.context:,}). Raise '
                               '--context (quality is not assured beyond what the model was trained on), or leave the task out.')
            ids = self.tok_encode(context)
            self.n_cut += len(ids) > self.context - new_tokens
            groups.setdefault(json.dumps(options, sort_keys=True), []).append((request, ids[-(self.context - new_tokens):]))
        batches = []
        for options, items in groups.items():
            items.sort(key=lambda item: -len(item[1]))
            extra = json.loads(options)['max_gen_toks']
            batches += [(json.loads(options), batch) for batch in self.batches(items, lambda item: len(item[1]), extra)]
        answers = self.share(batches, lambda batch: self.generate(*batch), 'generation')
        return [answers[request] for request in range(len(requests))]

    def generate(self, options, batch):
        """One batch of (request, prompt ids) -> {request: text}."""
        until = handle_stop_sequences(options.get('until'), eos=self.text_of_special[self.eot_token_id])
        new_tokens, stops = options['max_gen_toks'], set(stop_ids(self.tokens))
        tail = max(len(stop.encode()) for stop in until) + 1          # a token has at least one byte
        width = max(len(ids) for _, ids in batch)
        idx = torch.tensor([[0] * (width - len(ids)) + ids for _, ids in batch], device=self.on)
        first = torch.tensor([width - len(ids) for _, ids in batch], device=self.on)
        out, done = [[] for _ in batch], [False] * len(batch)
        steps = new_tokens                  # of the longest on all ranks: a sharded model needs every rank in every step
        if self.ranks > 1:
            longest = torch.tensor(new_tokens, device=self.on)
            dist.all_reduce(longest, op=dist.ReduceOp.MAX)
            steps = int(longest)
        sampling = dict(temperature=options.get('temperature') or 0.0, top_k=options.get('top_k'), top_p=options.get('top_p'))
        with self.autocast():
            for token in self.model.stream(idx, steps, **sampling, seed=1234, first=first if first.any() else None):
                for row, new in enumerate(token[:, 0].tolist()):
                    if done[row]:
                        continue
                    if new not in stops:
                        out[row].append(new)
                    text = self.tokens.decode(out[row][-tail:])
                    done[row] = new in stops or len(out[row]) >= new_tokens or any(stop in text for stop in until)
                if all_reduce_sum([not all(done)], self.on)[0] == 0:
                    break
        return {request: postprocess_generated_text(self.tokens.decode(ids), until, None) for (request, _), ids in zip(batch, out)}


# -- tasks -------------------------------------------------------------------------------------------------------------

@functools.cache
def task_manager():
    return TaskManager()                        # reads thousands of YAML files: seconds


def expand_tasks(names, shots, manager):
    """['core', '-mmlu', 'x.yaml'] -> {task: shots}. BadInput for a name that lm-eval does not know."""
    tasks = {}
    for name in names:
        if name.startswith('-'):
            if tasks.pop(name[1:], name) is name:
                raise BadInput(f"tasks: '{name}' leaves out what is not there.")
        elif name in TASK_SETS:
            tasks |= TASK_SETS[name]
        elif os.path.isfile(name) or name in manager.all_tasks:
            tasks[name] = None
        else:
            raise BadInput(f"unknown task '{name}'." + did_you_mean(name, [*TASK_SETS, *manager.all_tasks])
                           + ' Tasks are those of lm-eval (`lm-eval ls tasks`), paths of YAML files, and ' + ', '.join(TASK_SETS) + '.')
    return {name: count if shots is None else shots for name, count in tasks.items()}


def run_tasks(scorer, tasks, limit=None, shots=None, allow_code=False):
    """Runs lm-eval's tasks (list of names). Returns {task: dict(version, shots, n, seconds, metrics, items)} on every rank.

    metrics: {metric: [value, standard error or None]}; items: {metric: value of every document}, where there are such.
    BadInput for an unknown task, and for one that runs code which the model wrote unless allow_code; RunFault when its data
    cannot be loaded.
    """
    logging.getLogger('lm_eval').setLevel(logging.ERROR)
    manager, results = task_manager(), {}
    for name, count in expand_tasks(tasks, shots, manager).items():
        start = time.perf_counter()
        try:
            loaded = manager.load([name])
        except Exception as error:              # lm-eval, datasets and the hub raise what they like; the reason is passed on
            reason = (str(error).strip().splitlines() or [''])[0]
            raise RunFault(f"task '{name}' or its data cannot be loaded ({type(error).__name__}: {reason}). Check the network or the "
                           'YAML, or leave it out.') from error
        if not allow_code and any(getattr(task, 'UNSAFE_CODE', False) for task in loaded['tasks'].values()):
            raise BadInput(f"task '{name}' runs code that the model wrote. Allow it by --allow_code=True, in a sandbox, or leave it out: "
                           f'--tasks=...,-{name}')
        found = simple_evaluate(scorer, tasks=[*loaded['groups'].values()] or [*loaded['tasks'].values()], num_fewshot=count, limit=limit,
                                apply_chat_template=scorer.template is not None, confirm_run_unsafe_code=allow_code, random_seed=None,
                                numpy_random_seed=None, torch_random_seed=None, task_manager=manager, bootstrap_iters=1000)
        if found is not None:
            results |= summarize(found, time.perf_counter() - start)
    if scorer.ranks > 1:                        # lm-eval gives its results to rank 0 alone
        box = [results]
        dist.broadcast_object_list(box, 0)
        results = box[0]
    return results


def summarize(found, seconds):
    """What run_tasks returns, of lm-eval's result for one task or group (a group's tasks stand below it)."""
    results, samples = {}, found['samples']
    below = {name: [leaf for leaf in samples if leaf in reach(name, found['group_subtasks'])] for name in found['results']}
    for name, values in found['results'].items():
        leaves = below[name] or [name]
        metrics, items = {}, {}
        for key, value in values.items():
            metric, _, kind = key.partition(',')
            if not kind or metric.endswith('_stderr') or not isinstance(value, (int, float)):
                continue
            error = values.get(f'{metric}_stderr,{kind}')
            label = metric if kind == 'none' else f'{metric} ({kind})'
            metrics[label] = [value, error if isinstance(error, float) and math.isfinite(error) else None]
            single = [s.get(metric) for leaf in leaves for s in samples[leaf] if s['filter'] == kind]
            if single and all(isinstance(x, (int, float)) for x in single):
                items[label] = [float(x) for x in single]
        results[name] = dict(version=found['versions'].get(name), shots=found['n-shot'].get(leaves[0]), seconds=round(seconds, 1),
                             n=sum(found['n-samples'][leaf]['effective'] for leaf in leaves), metrics=metrics, items=items)
    return results


def reach(name, children):
    """All names below a group."""
    return {below for child in children.get(name, []) for below in (child, *reach(child, children))}


# -- bits per byte -----------------------------------------------------------------------------------------------------

def read_documents(path, tokenizer, column, limit):
    """[(ids without BOS, bytes of text)] of a text file, or of the validation shards of a source's folder."""
    if os.path.isfile(os.path.join(path, 'meta.json')):
        with open(os.path.join(path, 'meta.json'), encoding='utf-8') as f:
            about = json.load(f)['tokenizer']
        if about['fingerprint'] != tokenizer.fingerprint:
            raise BadInput(f"{path} was prepared with another tokenizer ({about['fingerprint']}) than the model's ({tokenizer.fingerprint}).")
        sizes, documents = tokenizer.token_bytes(), []
        for shard in sorted(glob.glob(os.path.join(path, 'val', '*.bin'))):
            tokens = open_shard(shard).astype('int64')
            starts = [*(tokens == tokenizer.bos_id).nonzero()[0].tolist(), len(tokens)]
            documents += [tokens[a + 1:b].tolist() for a, b in zip(starts, starts[1:])]
            if limit is not None and len(documents) >= limit:
                break
        return [(ids, sum(sizes[i] for i in ids)) for ids in documents[:limit] if ids]
    from prepare.reading import local_files, read_batches, records_of
    documents = []
    for file in local_files(path):
        for batch in read_batches(file, [column]):
            for number, record in records_of(batch):
                text = record if isinstance(record, str) else record.get(column) if isinstance(record, dict) else None
                if not isinstance(text, str):
                    raise BadInput(f"{file.path}: record {number + 1} has no text in '{column}'. --column says which field it is.")
                if text:
                    documents.append((tokenizer.encode_document(text).tolist(), len(text.encode())))
                if limit is not None and len(documents) >= limit:
                    return documents
    return documents


def bits_per_byte(scorer, documents):
    """The entry for results of `read_documents`: bits per byte and loss per token; the error is that of a ratio of sums."""
    start = time.perf_counter()
    if not documents:
        raise BadInput('bpb: there is no text to score.')
    bits = [-value / math.log(2) for value in scorer.rolling([ids for ids, _ in documents])]
    n, n_bytes, n_tokens = len(documents), sum(size for _, size in documents), sum(len(ids) for ids, _ in documents)
    bpb = sum(bits) / n_bytes
    error = math.sqrt(sum((b - bpb * size) ** 2 for b, (_, size) in zip(bits, documents)) * n / max(1, n - 1)) / n_bytes
    return dict(version=1, shots=None, n=n, seconds=round(time.perf_counter() - start, 1), tokens=n_tokens, bytes=n_bytes,
                metrics={'bpb': [bpb, error if n > 1 else None], 'loss': [sum(bits) * math.log(2) / n_tokens, None]},
                items={'bpb': [b * n / n_bytes for b in bits]})          # their mean is bpb


# -- results -----------------------------------------------------------------------------------------------------------

def print_results(results):
    print(f'\n{"task":<28}{"version":>8}{"shots":>6}  {"metric":<28}{"value":>9}{"stderr":>9}{"n":>8}{"seconds":>9}')
    for name, r in results.items():
        for metric, (value, error) in r['metrics'].items():
            print(f'{name:<28.28}{str(r["version"]):>8}{str(r["shots"]):>6}  {metric:<28.28}{value:>9.4f}'
                  + (f'{error:>9.4f}' if error is not None else f'{"":>9}') + f'{r["n"]:>8,}{r["seconds"]:>9.1f}')


def compare_results(results, others):
    """Rows (task, metric, ours, theirs, difference, its standard error or None, how) of what both have.

    Of the same documents in the same number and version the differences are paired, document by document.
    """
    rows = []
    for name in [n for n in results if n in others]:
        a, b = results[name], others[name]
        for metric in [m for m in a['metrics'] if m in b['metrics']]:
            (x, x_error), (y, y_error) = a['metrics'][metric], b['metrics'][metric]
            ours, theirs = a['items'].get(metric, []), b['items'].get(metric, [])
            same = len(ours) == len(theirs) > 1 and all(a.get(key) == b.get(key) for key in ('version', 'shots', 'bytes'))
            error, how = None, ''
            if same:
                deltas = torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
                error, how = deltas.std().item() / math.sqrt(len(ours)), 'paired'
            elif x_error is not None and y_error is not None:
                error, how = math.hypot(x_error, y_error), 'unpaired'
            rows.append((name, metric, x, y, x - y, error, how))
    return rows


def results_path(ckpt, out):
    """Where results go: --out, or eval.json in the run's folder, or <name>_eval.json here for a model of the hub."""
    if out is not None:
        return out
    if not os.path.isdir(ckpt):
        return ckpt.replace('/', '_') + '_eval.json'
    folder = os.path.normpath(ckpt)
    if os.path.basename(os.path.dirname(folder)) == 'ckpt':
        return os.path.join(os.path.dirname(os.path.dirname(folder)), f'eval_{os.path.basename(folder)}.json')
    return os.path.join(folder, 'eval.json')


def read_results(path):
    """The `results` of a file that evaluate.py wrote, or of the one in a run's folder."""
    path = os.path.join(path, 'eval.json') if os.path.isdir(path) else path
    try:
        with open(path, encoding='utf-8') as f:
            return json.load(f)
    except (OSError, ValueError) as error:
        raise BadInput(f'{path} is no file of results ({error}). Evaluate that model first.') from None


# -- knobs of the command line --
ckpt = ''                               # run, checkpoint, imported folder, Hugging Face folder or hub name
tasks = ''                              # with commas: core, bitdistill, lm-eval's tasks and groups, YAML paths; -name leaves one out
bpb = ''                                # bits per byte of these, with commas: text files, or folders of sources (their val shards)
column = 'text'                         # bpb: field of a record that holds its text
limit: int | None = None                # documents per task; None: all
num_fewshot: int | None = None          # shots; None: those of the set, or the task's own
context: int | None = None              # tokens that the model may see; None: what it was trained for
chat_template: str | None = None        # prompts as conversations: auto (the model's own) | llama3 | chatml; None: plain text
allow_code = False                      # let tasks such as humaneval run code that the model wrote
batch_tokens: int | None = None         # padded tokens of a forward pass; None: 4096 on a CPU, 65536 on a GPU
out: str | None = None                  # file of results; None: eval.json in the run's folder
compare: str | None = None              # another run's folder or file of results: print the differences
device = 'auto'                         # auto | cpu | cuda
dtype = 'auto'                          # auto | float32 | bfloat16: of the weights and the computation


def main():
    if not ckpt or not (tasks or bpb):
        raise BadInput('say which model and what: --ckpt=out/run --tasks=core, or --bpb=file.')
    tune_malloc()
    rank, _, on = start_ranks(device)
    precision, reason = pick_dtype(dtype, on)
    others = read_results(compare) if compare is not None else None
    model, tokenizer, about = hf.open_model(ckpt, on, precision)
    length = context or about['context']
    if length > about['context'] and rank == 0:
        print(f'context: {length:,} is more than the {about["context"]:,} tokens that the model was made for; quality may suffer.')
    template = find_template(about['folder'], tokenizer, chat_template) if chat_template is not None else None
    if allow_code:
        os.environ['HF_ALLOW_CODE_EVAL'] = '1'
    scorer = Scorer(model, tokenizer, about['add_bos'], length, on, batch_tokens or (65536 if on.type == 'cuda' else 4096), template=template)
    start = time.perf_counter()
    results = {f'bpb {path}': bits_per_byte(scorer, read_documents(path, tokenizer, column, limit)) for path in bpb.split(',') if path}
    names = [name.strip() for name in tasks.split(',') if name.strip()]
    if names:
        results |= run_tasks(scorer, names, limit, num_fewshot, allow_code)
    seconds = time.perf_counter() - start
    if rank == 0:
        print_results(results)
        n_scored = f'{scorer.n_scored:,} tokens scored on this rank, ' if scorer.n_scored else ''
        print(f'\n{n_scored}{seconds:.1f} s in all, {precision} ({reason})'
              + (f'; {scorer.n_cut:,} requests were longer than the context of {length:,} and lost their beginning' if scorer.n_cut else ''))
        path, where = results_path(ckpt, out), about['checkpoint'] or about['folder']
        about_run = dict(model=where, limit=limit, chat_template=chat_template, dtype=str(precision), context=length)
        before = read_results(path) if os.path.isfile(path) else {}
        kept = before['results'] if all(before.get(key) == value for key, value in about_run.items()) else {}
        with open(path + '.tmp', 'w', encoding='utf-8') as f:
            json.dump(dict(**about_run, date=time.strftime('%Y-%m-%d %H:%M'), versions=dict(lm_eval=lm_eval_version, torch=torch.__version__),
                           results={**kept, **results}), f)
        os.replace(path + '.tmp', path)
        print(f'results: {path}')
    if rank == 0 and others is not None:
        print(f'\n{"task":<28}{"metric":<24}{"here":>9}{"there":>9}{"difference":>12}{"stderr":>9}')
        for name, metric, x, y, delta, error, how in compare_results(results, others['results']):
            print(f'{name:<28.28}{metric:<24.24}{x:>9.4f}{y:>9.4f}{delta:>+12.4f}' + (f'{error:>9.4f}  {how}' if error is not None else ''))
    leave_ranks(0)


if __name__ == '__main__':
    config = configure(globals(), verbose=False)
    main()
