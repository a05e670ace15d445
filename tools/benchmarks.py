"""Our models in lm-eval, bits per byte, and files of results: what tools/evaluate.py and train.py's eval_tasks run.

`Scorer` is the model class, `run_tasks` runs benchmarks with it, `bits_per_byte` scores any text.
"""
import contextlib
import functools
import glob
import json
import logging
import math
import os
import random
import time

import numpy as np
import torch
import torch.distributed as dist
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from configurator import BadInput, RunFault, did_you_mean
from data import open_shard
from lib.chat import JINJA, render
from lib.device import all_reduce_sum
from lib.tokenizer import stop_ids

# task -> shots (None: the task's own number)
TASK_SETS = {
    'core': dict(arc_easy=0, arc_challenge=0, hellaswag=0, winogrande=0, piqa=0, boolq=0, openbookqa=0, social_iqa=0, mmlu=5, gsm8k=8,
                 minerva_math500=4, humaneval=0, mbpp=3),
    'bitdistill': dict(mnli=None, qnli=None, sst2=None, cnn_dailymail_abisee=None)}


class Scorer(TemplateLM):
    """One of our models as lm-eval sees it. Every rank is given all requests, does its share and ends up with all answers."""

    def __init__(self, model, tokenizer, add_bos, prefix_id, context, device, batch_tokens, autocast=contextlib.nullcontext,
                 template=None, quiet=False):
        """add_bos: whether text begins with BOS; prefix_id: what comes before a text without context (both from hf.find_model).

        context: tokens that the model may see; batch_tokens: padded tokens of a forward pass, or of a generating batch's cache.

        A model that is sharded over the ranks needs all of them in every forward pass; so it is done whenever there are several.
        """
        super().__init__()
        self.model, self.tokens, self.add_bos, self.prefix_id, self.context = model, tokenizer, add_bos, prefix_id, context
        self.on, self.batch_tokens, self.autocast, self.template, self.quiet = device, batch_tokens, autocast, template, quiet
        layout = model.layout                   # ranks of a tensor-parallel group do the same batches
        self.my_rank, self.ranks = (layout.data_rank, layout.n_data) if layout else (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.n_scored = self.n_cut = 0          # tokens that went through the model; requests that had to be cut
        self.text_of_special = {i: name for name, i in tokenizer.encoding._special_tokens.items()}

    # -- text --

    @property
    def eot_token_id(self):
        return stop_ids(self.tokens)[0]

    @property
    def prefix_token_id(self):
        return self.prefix_id

    @property
    def tokenizer_name(self):
        return f'{self.tokens.fingerprint}-{self.template}'.replace('/', '_')

    def tok_encode(self, string, add_special_tokens=None, **_):
        """As transformers does it: special tokens in the text count, BOS comes first where the model's tokenizer puts it."""
        begins = string.startswith(self.text_of_special[self.tokens.bos_id])
        add = self.add_bos and not begins if add_special_tokens is None else add_special_tokens and self.add_bos
        return [self.tokens.bos_id] * add + self.tokens.encode_marked(string)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        text = render(self.tokens, chat_history, JINJA.get(self.template, self.template), add_generation_prompt)
        if add_generation_prompt:
            return text
        said = chat_history[-1]['content'].strip()              # the last message is to be continued: its turn is not closed
        return text[:text.rindex(said) + len(said)]

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
            parts = [None] * dist.get_world_size()
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
        out, done, n_new = [[] for _ in batch], [False] * len(batch), 0
        steps = new_tokens                  # of the longest on all ranks: a sharded model needs every rank in every step
        if self.ranks > 1:
            longest = torch.tensor(new_tokens, device=self.on)
            dist.all_reduce(longest, op=dist.ReduceOp.MAX)
            steps = int(longest)
        sampling = dict(temperature=options.get('temperature') or 0.0, top_k=options.get('top_k'), top_p=options.get('top_p'),
                        seed=1234 + min(request for request, _ in batch))
        with self.autocast():
            for token in self.model.stream(idx, steps, **sampling, first=first if first.any() else None):
                n_new += 1
                for row, new in enumerate(token[:, 0].tolist()):
                    if done[row]:
                        continue
                    if new not in self.tokens.control_ids:
                        out[row].append(new)
                    text = self.tokens.decode(out[row][-tail:])
                    done[row] = new in stops or n_new >= new_tokens or any(stop in text for stop in until)
                if all_reduce_sum([not all(done)])[0] == 0:
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


def load_tasks(names, shots=None, allow_code=False):
    """{task: (shots, lm-eval's task objects)} of names as in `expand_tasks`, with their data.

    BadInput for an unknown task, and for one that runs code which the model wrote unless allow_code; RunFault when its data
    cannot be loaded.
    """
    logging.getLogger('lm_eval').setLevel(logging.ERROR)
    manager, found = task_manager(), {}
    for name, count in expand_tasks(names, shots, manager).items():
        random.seed(0)                          # as lm-eval: some tasks shuffle their documents while they load
        np.random.seed(1234)
        torch.manual_seed(1234)
        try:
            loaded = manager.load([name])
        except Exception as error:              # lm-eval, datasets and the hub raise what they like; the reason is passed on
            reason = (str(error).strip().splitlines() or [''])[0]
            raise RunFault(f"task '{name}' or its data cannot be loaded ({type(error).__name__}: {reason}). Check the network or the "
                           'YAML, or leave it out.') from error
        if not allow_code and any(getattr(task, 'UNSAFE_CODE', False) for task in loaded['tasks'].values()):
            raise BadInput(f"task '{name}' runs code that the model wrote. Allow it in a sandbox (tools/evaluate.py --allow_code=True), or leave "
                           f'it out: -{name} after the name of the set.')
        inner = {child for children in loaded['group_map'].values() for child in children}
        groups = [group for label, group in loaded['groups'].items() if label not in inner]
        found[name] = count, groups or [*loaded['tasks'].values()]
    return found


def run_tasks(scorer, tasks, limit=None, allow_code=False, done=lambda results: None):
    """Runs what load_tasks returned. Returns {task: dict(version, shots, n, seconds, metrics, items)} on every rank.

    metrics: {metric: [value, standard error or None]}; items: {metric: value of every document}, where there are such.
    done(results) is called after every task with what there is so far.
    """
    results = {}
    for count, loaded in tasks.values():
        start = time.perf_counter()
        found = simple_evaluate(scorer, tasks=loaded, num_fewshot=count, limit=limit, apply_chat_template=scorer.template is not None,
                                confirm_run_unsafe_code=allow_code, random_seed=0, numpy_random_seed=1234, torch_random_seed=1234,
                                task_manager=task_manager(), bootstrap_iters=1000)
        box = [found and summarize(found, time.perf_counter() - start)]
        if dist.is_initialized():               # lm-eval gives its results to rank 0 alone
            dist.broadcast_object_list(box, 0)
        results |= box[0]
        done(results)
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
    from lib.reading import local_files, read_batches, records_of
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
    """Where results go: --out, or eval.json in the run's folder, or <name>_eval.json here for a model of the hub. BadInput when
    they cannot go there.
    """
    if out is None and not os.path.isdir(ckpt):
        out = ckpt.replace('/', '_') + '_eval.json'
    if out is None:
        folder = os.path.normpath(ckpt)
        is_step = os.path.basename(os.path.dirname(folder)) == 'ckpt'
        out = os.path.join(os.path.dirname(os.path.dirname(folder)) if is_step else folder,
                           f'eval_{os.path.basename(folder)}.json' if is_step else 'eval.json')
    if not os.path.isdir(os.path.dirname(out) or '.'):
        raise BadInput(f"out = '{out}': there is no folder {os.path.dirname(out)}.")
    if os.path.exists(out):
        read_results(out)
    return out


def read_results(path):
    """{task: entry} of a file that tools/evaluate.py wrote, or of the one in a run's folder. BadInput when it is none."""
    path = os.path.join(path, 'eval.json') if os.path.isdir(path) else path
    try:
        with open(path, encoding='utf-8') as f:
            return json.load(f)['results']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f'{path} is no file of results ({type(error).__name__}: {error}). Evaluate that model first.') from None


def write_results(path, results, about):
    """Adds results to the file, every entry with `about` (dict: model, limit, ...); tasks that stand in it already are replaced."""
    kept = read_results(path) if os.path.exists(path) else {}
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        json.dump(dict(results=kept | {name: {**entry, **about} for name, entry in results.items()}), f)
    os.replace(path + '.tmp', path)
