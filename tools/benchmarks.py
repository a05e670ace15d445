"""Benchmarks with lm-eval, bits per byte, and files of results.

tools/evaluate.py uses them, and train.py for eval_tasks. `Scorer` is one of our models as lm-eval
sees it, `run_tasks` runs benchmarks with it, and `bits_per_byte` scores any text.
"""

import contextlib
import functools
import glob
import itertools
import json
import logging
import math
import os
import random
import time

import lm_eval
import numpy as np
import torch
import torch.distributed as dist
from jinja2 import BaseLoader, StrictUndefined, TemplateError
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

from configurator import BadInput, RunFault, check_type, did_you_mean, read_json
from lib.chat import JINJA, end_ids, render, sandbox_class
from lib.parallel import sum_numbers
from lib.reading import local_files, location, read_batches, records_of
from lib.shards import open_shard
from tools.task_files import check_task

# Set -> task -> shots. None: the task's own number.
ZERO_SHOT = 'arc_easy arc_challenge hellaswag winogrande piqa boolq openbookqa social_iqa'.split()
FEW_SHOT = dict(mmlu=5, gsm8k=8, minerva_math500=4, humaneval=0, mbpp=3)
TASK_SETS = {
    'core': dict.fromkeys(ZERO_SHOT, 0) | FEW_SHOT,
    'bitdistill': dict.fromkeys(('mnli', 'qnli', 'sst2', 'cnn_dailymail_abisee')),
}


class Scorer(TemplateLM):
    """One of our models as lm-eval sees it.

    Every rank is given all requests, processes its share, and returns all answers.
    """

    def __init__(
        self,
        model,
        tokenizer,
        context,
        batch_tokens,
        autocast=contextlib.nullcontext,
        template=None,
        quiet=False,
    ):
        """
        context       tokens that the model may see
        batch_tokens  padded tokens of a forward pass, and of a cache during generation
        autocast      makes the context manager of every forward pass
        template      chat template for the prompts, as of chat.find_template. None: plain text
        quiet         no progress bars
        """
        super().__init__()
        self.model = model
        # TemplateLM has attributes named `tokenizer`, `device`, `rank` and `world_size`.
        self.tokens = tokenizer
        self.context = context
        self.batch_tokens = batch_tokens
        self.autocast = autocast
        self.template = template
        self.end_ids = end_ids(tokenizer, template)
        self.quiet = quiet
        self.input_device = next(model.parameters()).device
        self.share_index = 0            # which share of the batches is this rank's
        self.n_shares = 1
        # The ranks of a tensor-parallel group process the same batches.
        if model.layout:
            self.share_index = model.layout.data_rank
            self.n_shares = model.layout.n_data
        elif dist.is_initialized():
            self.share_index = dist.get_rank()
            self.n_shares = dist.get_world_size()
        self.n_scored = 0               # padded tokens that went through the model
        self.n_cut = 0                  # requests that lost their beginning

    # -- text --

    @property
    def eot_token_id(self):
        return self.tokens.stop_ids[0]

    @property
    def prefix_token_id(self):
        return self.tokens.prefix_id

    @property
    def tokenizer_name(self):
        return f'{self.tokens.fingerprint}-{self.template}'.replace('/', '_')

    def tok_encode(self, string, add_special_tokens=None, **_):
        # As transformers does: special tokens in the text count, and the model's own come before
        # and after it.
        ids = self.tokens.encode_marked(string)
        if add_special_tokens is None:
            # As lm-eval does: not twice.
            add_special_tokens = not string.startswith(self.tokens.decode([self.prefix_token_id]))
        return [*self.tokens.start_ids, *ids, *self.tokens.end_ids] if add_special_tokens else ids

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        template = self.chat_template()
        text = render(self.tokens, chat_history, template, add_generation_prompt)
        if add_generation_prompt:
            return text
        # The model continues the last message, so its turn must not be closed.
        last = chat_history[-1]['content'].strip()
        if last not in text:
            raise BadInput(
                "the model's chat template does not show the last message as it is, which this "
                'task continues. Set --chat_template to llama3 or chatml, or leave it out.')
        return text[: text.rindex(last) + len(last)]

    def chat_template(self, chat_template=False):
        return JINJA.get(self.template, self.template)

    # -- work over ranks --

    def batches(self, items, extra=0):
        """Splits [(ids, ...)], longest first, into batches of at most batch_tokens padded tokens.

        extra: tokens that every row needs besides its ids.
        """
        batches = []
        width = 0
        for item in items:
            if not batches or (len(batches[-1]) + 1) * width > self.batch_tokens:
                batches.append([])
                # Items come longest first, so the first one sets the padded width of its batch.
                width = len(item[0]) + extra
            batches[-1].append(item)
        return batches

    def share(self, batches, work, what):
        """Runs work(batch) -> {request: answer} on this rank's batches. Returns all answers."""
        answers = {}
        is_silent = self.quiet or self.share_index > 0
        starts = range(0, len(batches), self.n_shares)
        for start in tqdm(starts, desc=what, disable=is_silent, dynamic_ncols=True):
            at = start + self.share_index
            # A sharded model needs all ranks in every forward pass. A rank without a batch repeats
            # the last one.
            found = work(batches[min(at, len(batches) - 1)])
            if at < len(batches):
                answers |= found
        if self.n_shares > 1:
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, answers)
            for part in parts:
                answers |= part
        return answers

    # -- log-likelihoods --

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        return self.score([(context, continuation) for _, context, continuation in requests])

    def score(self, pairs):
        """Scores [(context ids, continuation ids)]. A long pair loses its beginning.

        Returns [(log-probability in nats of the continuation, whether it is the greedy one)].
        """
        # Ids that the model reads -> [(request, continuation)]. Requests with the same input, such
        # as choices of one token, go through the model once.
        inputs = {}
        for request, (context, continuation) in enumerate(pairs):
            if len(continuation) > self.context:
                raise BadInput(f'a continuation has {len(continuation):,} tokens: raise --context.')
            ids = (*context, *continuation)
            if len(ids) > self.context + 1:
                self.n_cut += 1
            # The last token is only predicted.
            ids = ids[-(self.context + 1) : -1]
            inputs.setdefault(ids, []).append((request, continuation))
        ordered = sorted(inputs.items(), key=lambda item: (-len(item[0]), item[0]))
        answers = self.share(self.batches(ordered), self._score_batch, 'log-likelihoods')
        return [answers[request] for request in range(len(pairs))]

    def _score_batch(self, batch):
        width = len(batch[0][0])
        # Padding on the right needs no mask, because causal attention never looks at it.
        idx = torch.zeros(len(batch), width, dtype=torch.int64)     # padded on the right
        places = []         # (request, row, position, target) of every token that is scored
        for row, (ids, asked) in enumerate(batch):
            idx[row, : len(ids)] = torch.tensor(ids)
            for request, continuation in asked:
                first = len(ids) - len(continuation)
                for k, target in enumerate(continuation):
                    places.append((request, row, first + k, target))
        _, row, position, target = torch.tensor(places, device=self.input_device).T
        with self.autocast():
            losses, hits = self.model.score(idx.to(self.input_device), row, position, target)
        self.n_scored += idx.numel()
        answers = {}
        for place, loss, hit in zip(places, losses.tolist(), hits.tolist(), strict=True):
            total, is_greedy = answers.get(place[0], (0.0, True))
            answers[place[0]] = (total - loss, is_greedy and hit)
        return answers

    def rolling(self, documents):
        """Log-likelihoods of whole documents (lists of ids), in windows of the context."""
        pairs = []
        owners = []         # index of the document that a pair is from
        for i, ids in enumerate(documents):
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.context, 1):
                pairs.append(make_disjoint_window(window))
                owners.append(i)
        totals = [0.0] * len(documents)
        for i, (value, _) in zip(owners, self.score(pairs), strict=True):
            totals[i] += value
        return totals

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return self.rolling([self.tok_encode(request.args[0]) for request in requests])

    # -- generation --

    def generate_until(self, requests, disable_tqdm=False):
        # A batch has one set of options. Options as JSON -> [(ids of the prompt, request)].
        groups = {}
        for request, (context, options) in enumerate(r.args for r in requests):
            options = normalize_gen_kwargs(options, 256)
            new_tokens = options['max_gen_toks']
            if new_tokens >= self.context:
                raise BadInput(
                    f'a task generates up to {new_tokens:,} tokens, but the context has '
                    f'{self.context:,}. Raise --context, or leave the task out.'
                )
            ids = self.tok_encode(context)
            room = self.context - new_tokens
            if len(ids) > room:
                self.n_cut += 1
            key = json.dumps(options, sort_keys=True)
            groups.setdefault(key, []).append((ids[-room:], request))
        batches = []
        for key, items in groups.items():
            options = json.loads(key)
            items.sort(key=lambda item: -len(item[0]))
            for batch in self.batches(items, options['max_gen_toks']):
                batches.append((options, batch))
        answers = self.share(batches, self._generate_batch, 'generation')
        return [answers[request] for request in range(len(requests))]

    def _generate_batch(self, work):
        options, batch = work
        eos = self.tokens.decode([self.eot_token_id]) or None
        until = handle_stop_sequences(options.get('until'), eos=eos)
        # A token has at least one byte, so this many tokens contain every stop sequence.
        tail = max((len(stop.encode()) for stop in until), default=0) + 1
        width = max(len(ids) for ids, _ in batch)
        padding = [width - len(ids) for ids, _ in batch]
        # Padding on the left lets all rows continue at the same position of the cache.
        rows = [[0] * n + ids for n, (ids, _) in zip(padding, batch, strict=True)]
        max_new_tokens = options['max_gen_toks']
        steps = torch.tensor(max_new_tokens, device=self.input_device)
        # A sharded model needs every rank in every step.
        if self.n_shares > 1:
            dist.all_reduce(steps, op=dist.ReduceOp.MAX)
        stream = self.model.stream(
            torch.tensor(rows, device=self.input_device),
            int(steps),
            temperature=options.get('temperature') or 0.0,
            top_k=options.get('top_k'),
            top_p=options.get('top_p'),
            seed=1234 + min(request for _, request in batch),
            first=torch.tensor(padding, device=self.input_device) if any(padding) else None,
        )
        out = [[] for _ in batch]
        done = [False] * len(batch)
        with self.autocast():
            for n_new, token in enumerate(stream, 1):
                for row, new in enumerate(token[:, 0].tolist()):
                    if done[row]:
                        continue
                    if new not in self.tokens.control_ids:
                        out[row].append(new)
                    # Decoding the full answer at every token would take quadratic time.
                    text = self.tokens.decode(out[row][-tail:])
                    is_last = new in self.end_ids or n_new >= max_new_tokens
                    done[row] = is_last or any(stop in text for stop in until)
                # A rank that stopped alone would leave the others waiting in the next step.
                if sum_numbers([not all(done)], self.model.layout)[0] == 0:
                    break
        answers = {}
        for ids, (_, request) in zip(out, batch, strict=True):
            answers[request] = postprocess_generated_text(self.tokens.decode(ids), until, None)
        return answers


# -- tasks -----------------------------------------------------------------------------------------


@functools.cache
def task_manager():
    return TaskManager()        # takes seconds, because it reads thousands of YAML files


def expand_tasks(names, shots, manager):
    """Expands names such as ['core', '-mmlu', 'x.yaml'] to {task: shots}.

    shots: for all tasks; None: each set's or task's own. Raises BadInput for an unknown name.
    """
    tasks = {}
    for name in names:
        if name.startswith('-'):
            if name[1:] not in tasks:
                raise BadInput(f"tasks: '{name}' leaves out what is not there.")
            del tasks[name[1:]]
        elif name in TASK_SETS:
            tasks |= TASK_SETS[name]
        elif os.path.isfile(name) or name in manager.all_tasks:
            tasks[name] = None
        else:
            raise BadInput(
                f"unknown task '{name}'.{did_you_mean(name, [*TASK_SETS, *manager.all_tasks])} "
                'Tasks are those of lm-eval (`lm-eval ls tasks`), paths of YAML files, and the '
                f'sets {", ".join(TASK_SETS)}.'
            )
    return tasks if shots is None else dict.fromkeys(tasks, shots)


# What lm-eval raises for a YAML that asks for what is not there: a field, a split, a metric.
FAULTS_OF_FILES = (
    TypeError, ValueError, LookupError, AttributeError, AssertionError, SyntaxError, TemplateError)


def guard_templates():
    """Makes lm-eval render templates in a sandbox from now on. Its own tasks render the same."""
    options = dict(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    environment = sandbox_class()(**options)
    environment.filters['regex_replace'] = lm_eval.utils.regex_replace
    lm_eval.utils.env = environment


def refuse_unsafe(name):
    raise BadInput(
        f"task '{name}' runs code that the model wrote. Set --allow_code=True in a sandbox, or "
        f'leave it out: -{name} after the name of the set.'
    )


def load_tasks(names, shots=None, allow_code=False):
    """Loads tasks with their data: {task: (shots, lm-eval's task objects)}.

    names and shots as in `expand_tasks`. Raises BadInput for an unknown task and for a YAML file
    that is wrong. Unless allow_code, it also raises BadInput for a task that runs code written by
    the model, and for a YAML file that runs code of its author.
    Raises RunFault if the data cannot be loaded.
    """
    logging.getLogger('lm_eval').setLevel(logging.ERROR)
    manager = task_manager()
    tasks = expand_tasks(names, shots, manager)
    files = [name for name in tasks if name not in manager.all_tasks]
    # All files are checked before anything of one of them is loaded.
    for file in files:
        check_task(file, allow_code)
    if files and not allow_code:
        guard_templates()
    for name in tasks:
        about = manager.task_index.get(name)
        # Before the load, because lm-eval runs code of the hub while it loads such a task.
        if about is not None and (about.cfg or {}).get('unsafe_code') and not allow_code:
            refuse_unsafe(name)
    found = {}
    for name, count in tasks.items():
        # Some tasks shuffle their documents while they load. lm-eval sets the same seeds.
        random.seed(0)
        np.random.seed(1234)
        torch.manual_seed(1234)
        try:
            loaded = manager.load([name])
        except Exception as error:
            # lm-eval, datasets and the hub raise errors of any type.
            reason = (str(error).strip().splitlines() or [''])[0]
            reason = f'{type(error).__name__}: {reason}'
            if name in files and isinstance(error, FAULTS_OF_FILES):
                raise BadInput(f"task '{name}' cannot be used ({reason}). Mend its YAML.") from None
            raise RunFault(
                f"task '{name}' or its data cannot be loaded ({reason}). "
                'Check the network or the YAML, or leave it out.'
            ) from error
        runs_code = any(getattr(t, 'UNSAFE_CODE', False) for t in loaded['tasks'].values())
        if runs_code and not allow_code:
            refuse_unsafe(name)
        # A group includes its tasks and groups, so only the outermost ones are run.
        inner = set().union(*loaded['group_map'].values())
        groups = [group for label, group in loaded['groups'].items() if label not in inner]
        found[name] = (count, groups or list(loaded['tasks'].values()))
    return found


def run_tasks(scorer, tasks, limit=None, allow_code=False, done=lambda results: None):
    """Runs the tasks that load_tasks returned.

    limit: documents per task; None: all. done(results) is called after every task.
    Returns {task: dict(version, shots, seconds, n, metrics, items)} on every rank.
    metrics: {metric: [value, standard error or None]}
    items: {metric: value of every document}, where the metric has such values
    """
    results = {}
    for name, (count, loaded) in tasks.items():
        start = time.perf_counter()
        try:
            found = simple_evaluate(
                scorer,
                tasks=loaded,
                num_fewshot=count,
                limit=limit,
                apply_chat_template=scorer.template is not None,
                confirm_run_unsafe_code=allow_code,
                task_manager=task_manager(),
                bootstrap_iters=1000,
            )
        except TemplateError as error:
            raise BadInput(
                f"task '{name}': a template fails on a document ({type(error).__name__}: {error}). "
                'Mend its YAML or its data.'
            ) from None
        box = [found and summarize(found, time.perf_counter() - start)]
        # lm-eval returns its results on rank 0 only.
        if dist.is_initialized():
            dist.broadcast_object_list(box, 0)
        results |= box[0]
        done(results)
    return results


def summarize(found, seconds):
    """Converts lm-eval's result for one task or group, tasks of the group included."""
    results = {}
    for name, values in found['results'].items():
        inner = descendants(name, found['group_subtasks'])
        leaves = [leaf for leaf in found['samples'] if leaf in inner] or [name]
        metrics = {}
        items = {}
        for key, value in values.items():
            metric, _, kind = key.partition(',')
            if not kind or metric.endswith('_stderr') or not isinstance(value, (int, float)):
                continue
            label = metric if kind == 'none' else f'{metric} ({kind})'
            error = values.get(f'{metric}_stderr,{kind}')
            # lm-eval writes 'N/A' where it has no standard error.
            if not isinstance(error, float) or not math.isfinite(error):
                error = None
            metrics[label] = [value, error]
            single = []
            for leaf in leaves:
                samples = [s for s in found['samples'][leaf] if s['filter'] == kind]
                single += [sample.get(metric) for sample in samples]
            if single and all(isinstance(x, (int, float)) for x in single):
                items[label] = [float(x) for x in single]
        results[name] = dict(
            version=found['versions'].get(name),
            shots=found['n-shot'].get(leaves[0]),
            seconds=round(seconds, 1),
            n=sum(found['n-samples'][leaf]['effective'] for leaf in leaves),
            metrics=metrics,
            items=items,
        )
    return results


def descendants(name, children):
    """The set of all names below a group. children: group -> names."""
    found = set(children.get(name, []))
    for child in children.get(name, []):
        found |= descendants(child, children)
    return found


# -- bits per byte ---------------------------------------------------------------------------------


def read_documents(path, tokenizer, column, limit):
    """Reads [(ids without BOS, bytes of text)] from text files, or a source's validation shards.

    column: field of a record that holds its text; limit: number of documents. None: all.
    """
    if os.path.isfile(os.path.join(path, 'meta.json')):
        return read_shards(path, tokenizer, limit)
    documents = []
    for file in local_files(path):
        for batch in read_batches(file, [column]):
            for number, record in records_of(batch):
                text = record.get(column) if isinstance(record, dict) else record
                if isinstance(text, ValueError):
                    raise BadInput(f'{location(batch, number)}: {text}. Fix or drop the record.')
                if not isinstance(text, str):
                    where = location(batch, number)
                    raise BadInput(f"{where}: no text in '{column}'. Set --column.")
                if text:
                    ids = tokenizer.encode_document(text).tolist()
                    documents.append((ids, len(text.encode())))
                if limit is not None and len(documents) >= limit:
                    return documents
    return documents


def read_shards(path, tokenizer, limit):
    """`read_documents` of a source's folder. Raises BadInput for shards of another tokenizer."""
    meta = os.path.join(path, 'meta.json')
    try:
        theirs = read_json(meta)['tokenizer']['fingerprint']
    except (KeyError, TypeError):
        raise BadInput(
            f'{meta} does not name the tokenizer of its shards. Restore it, or prepare the source '
            'again.') from None
    if theirs != tokenizer.fingerprint:
        raise BadInput(f'{path} has another tokenizer than the model ({theirs}).')
    sizes = tokenizer.token_bytes()
    documents = []
    for shard in sorted(glob.glob(os.path.join(glob.escape(path), 'val', '*.bin'))):
        tokens = open_shard(shard).astype('int64')
        starts = (tokens == tokenizer.bos_id).nonzero()[0].tolist()
        for start, stop in itertools.pairwise([*starts, len(tokens)]):
            documents.append(tokens[start + 1 : stop].tolist())
        if limit is not None and len(documents) >= limit:
            break
    return [(ids, sum(sizes[i] for i in ids)) for ids in documents[:limit] if ids]


def bits_per_byte(scorer, documents):
    """Bits per byte and loss per token of `read_documents`' documents, as an entry of results."""
    start = time.perf_counter()
    if not documents:
        raise BadInput('bpb: there is no text to score.')
    bits = [-value / math.log(2) for value in scorer.rolling([ids for ids, _ in documents])]
    sizes = [size for _, size in documents]
    n = len(documents)
    n_bytes = sum(sizes)
    n_tokens = sum(len(ids) for ids, _ in documents)
    bpb = sum(bits) / n_bytes
    # The standard error is that of a ratio of sums.
    error = None
    if n > 1:
        squares = sum((b - bpb * size) ** 2 for b, size in zip(bits, sizes, strict=True))
        error = math.sqrt(squares * n / (n - 1)) / n_bytes
    loss = sum(bits) * math.log(2) / n_tokens
    entry = dict(version=1, shots=None, n=n, seconds=round(time.perf_counter() - start, 1))
    entry |= dict(tokens=n_tokens, bytes=n_bytes)
    entry['metrics'] = {'bpb': [bpb, error], 'loss': [loss, None]}
    # Scaled so that their mean is the bits per byte.
    entry['items'] = {'bpb': [b * n / n_bytes for b in bits]}
    return entry


# -- results ---------------------------------------------------------------------------------------


def print_results(results):
    print(
        f'\n{"task":<28}{"version":>8}{"shots":>6}  {"metric":<28}{"value":>9}{"stderr":>9}'
        f'{"n":>8}{"seconds":>9}'
    )
    for name, r in results.items():
        head = f'{name:<28.28}{str(r["version"]):>8}{str(r["shots"]):>6}'
        tail = f'{r["n"]:>8,}{r["seconds"]:>9.1f}'
        for metric, (value, error) in r['metrics'].items():
            shown = '' if error is None else f'{error:.4f}'
            print(f'{head}  {metric:<28.28}{value:>9.4f}{shown:>9}{tail}')


def compare_results(results, others):
    """Compares what two dicts of results have in common.

    Returns rows (task, metric, ours, theirs, difference, its standard error or None, how).
    """
    rows = []
    for name in [n for n in results if n in others]:
        a = results[name]
        b = others[name]
        for metric in [m for m in a['metrics'] if m in b['metrics']]:
            x, x_error = a['metrics'][metric]
            y, y_error = b['metrics'][metric]
            ours = torch.tensor(a['items'].get(metric, []), dtype=torch.float64)
            theirs = torch.tensor(b['items'].get(metric, []), dtype=torch.float64)
            same = all(a.get(key) == b.get(key) for key in ('version', 'shots', 'bytes'))
            # Differences of the same documents are paired, which is far more precise.
            error = None
            how = ''
            if same and len(ours) == len(theirs) > 1:
                error = (ours - theirs).std().item() / math.sqrt(len(ours))
                how = 'paired'
            elif x_error is not None and y_error is not None:
                error = math.hypot(x_error, y_error)
                how = 'unpaired'
            rows.append((name, metric, x, y, x - y, error, how))
    return rows


def print_differences(rows):
    """Prints the rows of `compare_results`."""
    if not rows:
        print('\nnothing to compare: the two files of results have no task and metric in common')
        return
    print(
        f'\n{"task":<28}{"metric":<24}{"here":>9}{"there":>9}{"difference":>12}{"stderr":>9}'
    )
    for name, metric, x, y, delta, error, how in rows:
        shown = '' if error is None else f'{error:>9.4f}  {how}'
        print(f'{name:<28.28}{metric:<24.24}{x:>9.4f}{y:>9.4f}{delta:>+12.4f}{shown}')


def results_path(ckpt, out):
    """The file of results. Raises BadInput if it cannot be written there.

    It is --out, or else eval.json in the run's folder, or <hub name>_eval.json here.
    """
    if out is None and os.path.isdir(ckpt):
        folder = os.path.normpath(ckpt)
        parent, name = os.path.split(folder)
        if os.path.basename(parent) == 'ckpt':      # one checkpoint of a run
            out = os.path.join(os.path.dirname(parent), f'eval_{name}.json')
        else:
            out = os.path.join(folder, 'eval.json')
    elif out is not None and os.path.isdir(out):
        raise BadInput(f"out = '{out}' is a folder. Name a file of results, {out}/eval.json.")
    elif out is None:
        out = ckpt.replace('/', '_') + '_eval.json'
    if not os.path.isdir(os.path.dirname(out) or '.'):
        raise BadInput(f"out = '{out}': there is no folder {os.path.dirname(out)}.")
    if os.path.exists(out):
        read_results(out)
    return out


def read_results(path):
    """Reads {task: entry} from a file of results or a run's folder. Raises BadInput.

    Every entry has `metrics`, and `items` unless another program wrote it.
    """
    path = os.path.join(path, 'eval.json') if os.path.isdir(path) else path
    try:
        with open(path, encoding='utf-8') as f:
            results = json.load(f)['results']
        for entry in results.values():
            for value, error in entry['metrics'].values():
                check_type(value, 'float', None)
                check_type(error, 'float | None', None)
            for values in entry.setdefault('items', {}).values():
                for value in values:
                    check_type(value, 'float', None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f'{path} is no file of results: {error!r}.') from None
    return results


def write_results(path, results, about):
    """Adds results to the file, each with the fields of `about` (dict: model, limit and so on)."""
    kept = read_results(path) if os.path.exists(path) else {}
    kept |= {name: {**entry, **about} for name, entry in results.items()}
    # A process that is killed here must not destroy the results of earlier tasks.
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        json.dump(dict(results=kept), f)
    os.replace(path + '.tmp', path)
