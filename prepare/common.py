"""What the dataset scripts share: `prepare()` makes a source of the files of a dataset.

    files, on the hub or local  ->  parts, dealt to the ranks
    ->  batches of raw records, dealt to the workers  ->  documents (and their split, by hash)
    ->  tokens  ->  shards of the part  ->  meta.json, written by the rank that ends last

The result depends only on the content of the files and on the settings. It does not depend on
workers, ranks or kills. One process works on a part, its shards follow the order of its records,
and a shard ends with a document.
"""
import collections
import concurrent.futures
import contextlib
import datetime
import fcntl
import functools
import glob
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from tqdm import tqdm

from configurator import BadInput, RunFault, at_least, between, pick
from lib import reading
from lib.byte_level import LLAMA3_PATTERN
from lib.chat import (
    ModelTemplate,
    check_template,
    encode_by_model,
    encode_conversation,
    marked,
    read_model_template,
)
from lib.messages import Conversation, LeftOut, read_conversation, without_nulls
from lib.model_files import TEMPLATE_FOLDER
from lib.shards import open_shard, shard_header
from lib.tokenizer import load_tokenizer, make_tokenizer
from prepare import inputs, shards


@dataclass(frozen=True)
class PrepareConfig:
    """The knobs that all dataset scripts share."""
    tokenizer: str = ''              # tiktoken name, rank file, tokenizer.json, or folder with one
    input: str | None = None         # file, glob, folder, or several with commas. None: the hub
    revision: str | None = None      # commit of the dataset on the hub. None: the script's
    out: str = 'data'                # folder of all sources
    max_tokens: at_least(1) | None = None   # training tokens to stop after. None: everything
    shard_tokens: at_least(1) = 100_000_000     # training tokens after which a shard is closed
    val_fraction: between(0.0, 1.0) = 0.01      # share of the documents for validation, chosen by
                                                # hash
    probe_fraction: between(0.0, 1.0) = 0.005   # share for probe sets, chosen by hash
                                                # (prepare/probe.py)
    skip_bad: bool = False           # list broken records instead of stopping at the first one
    workers: at_least(0) | None = None      # tokenizing processes. 0: this one. None: one per core
    rank: at_least(0) | None = None  # of this process. None: as torchrun or SLURM says, or alone
    world_size: at_least(1) | None = None   # processes that share the work, with workers of their
                                            # own


@dataclass(frozen=True)
class Dataset:
    """A dataset. The figures are those of its card, for planning.

    `convert` turns a record (dict) into text, into a list of messages, or into None, which leaves
    it out. It is a module-level function, since the workers import it.
    """
    name: str                       # of the source, which is the folder <out>/<name>/
    files: list                     # globs hf://datasets/<id>@<commit>/<glob>, or https:// URLs
    columns: tuple = ('text',)      # fields of a record that `convert` reads. (): all
    convert: Callable | None = None     # None: the first column is the document
    documents: float | None = None
    tokens: float | None = None     # of the card's tokenizer
    licence: str = ''
    gone: str = ''                  # if the hub no longer has it: since when, and what stands in
    chat_template: str | None = None    # of conversations; prepare() sets it
    template: ModelTemplate | None = None       # of chat_template = 'model'; prepare() sets it
    more_settings: dict = field(default_factory=dict)   # what else the result depends on


# -- one record ------------------------------------------------------------------------------------


def hash_share(text):
    """Returns a number in [0, 1) that depends only on the text (bytes).

    Equal documents get the same number, whatever their source.
    """
    return int.from_bytes(hashlib.sha256(text).digest()[:4], 'big') / 2**32


SPLITS = ('train', 'val', 'probe')


def split_of(share, val_fraction, probe_fraction):
    """Returns the split of a document with this hash_share: val is lowest, probe is highest."""
    if share < val_fraction:
        return 'val'
    return 'probe' if share >= 1 - probe_fraction else 'train'


def document_of(record, dataset):
    """Converts a record. Returns text, a list of messages, or None to leave it out.

    For a dataset with a chat_template, a list of messages becomes a Conversation (lib/messages.py).
    Raises LeftOut, and ValueError, which says why the record is broken.
    """
    if isinstance(record, ValueError):
        raise record
    if isinstance(record, str):         # from a plain text file
        return record
    for column in dataset.columns:
        if column not in record:
            raise ValueError(
                f"no field '{column}' (for your own text, --column says which field to read); the "
                f'record has {list(record)}')
    if dataset.convert is None:
        document = record[dataset.columns[0]]
    else:
        try:
            document = dataset.convert(record)
        # These are what a record of an unexpected shape causes. Others are bugs of the converter.
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f'it cannot be converted ({type(error).__name__}: {error}); the record has '
                f'{list(record)}') from None
    if isinstance(document, list) and dataset.chat_template is not None:
        # A converter names in `columns` what it reads. Without one, the record may hold more.
        rest = {} if dataset.convert else record
        document = read_conversation(document, rest.get('tools'))
        for key, value in rest.items():
            if key not in ('tools', dataset.columns[0]) and value not in (None, '', [], {}):
                document.notes[f'key of a record: {key}'] = 1
    elif not isinstance(document, (str, list, type(None))):
        raise ValueError(f'no text but {type(document).__name__}')
    return document


def plain_text(document):
    """Returns the UTF-8 bytes of a document, or of the contents of a conversation.

    Raises ValueError if it is not valid Unicode.
    """
    if isinstance(document, Conversation):
        document = document.text()
    try:
        return document.encode()
    except UnicodeEncodeError:
        raise ValueError('the text has half of a surrogate pair (a broken \\u escape)') from None


def conversation(question, answer):
    return [dict(role='user', content=question), dict(role='assistant', content=answer)]


LLAMA3_TURN = re.compile(
    r'<\|start_header_id\|>(\w+)<\|end_header_id\|>\s*(.*?)<\|eot_id\|>', re.DOTALL)


def nemotron_text(record):
    """Converts a record of the Llama-Nemotron data: questions and answer, blank lines between.

    In older files `input` is a string with the marks of Llama 3's template.
    """
    turns = record['input']
    if isinstance(turns, str):
        found = LLAMA3_TURN.findall(turns) or [('user', turns)]
        turns = [dict(role=role, content=content) for role, content in found]
    parts = [turn['content'] for turn in turns if turn['role'] != 'system' and turn['content']]
    return '\n\n'.join([*parts, record['output'].removesuffix('<|eot_id|>')])


def nemotron_dataset(kind, documents, tokens):
    """Returns the Dataset of one kind of the Llama-Nemotron post-training data: code, math, ..."""
    repository = 'hf://datasets/nvidia/Llama-Nemotron-Post-Training-Dataset'
    files = [f'{repository}@8e1e47a67ced79723ad0735efc5a45f8bb5aabd6/SFT/{kind}/*.jsonl']
    card = dict(documents=documents, tokens=tokens, licence='CC BY 4.0')
    return Dataset(f'nemotron_{kind}', files, ('input', 'output'), nemotron_text, **card)


# -- workers ---------------------------------------------------------------------------------------


tokenizer_of = functools.cache(load_tokenizer)      # every process loads it once


def tokenize_batch(dataset, config, batch):
    """Converts and tokenizes the records of a Batch. Returns (records, ids, masks).

    records  list of (number within the file, kind, tokens, bytes of text, place, notes). The kind
             is a split, or says why the record gave no document: 'empty', 'dropped', 'broken', or
             what LeftOut says. The place says where the record is, and what is wrong with it. None:
             there is nothing to say. notes: Counter of what was changed or not used
    ids      (n,) uint16 or uint32, all documents one after the other, each with BOS first
    masks    (n,) uint8; None for plain text
    """
    tokenizer = tokenizer_of(config.tokenizer)
    records = []
    ids = []
    masks = []
    # meta.json has these places, and a copy of the files in another folder must give the same one.
    named = replace(batch, file=replace(batch.file, path=batch.file.name))
    fills_nulls = dataset.chat_template is not None and not isinstance(batch.records, list)
    for number, record in reading.records_of(batch):
        try:
            document = document_of(without_nulls(record) if fills_nulls else record, dataset)
            if isinstance(document, list):
                raise ValueError(
                    'it holds a list of messages. Set --chat_template=llama3 or chatml to make '
                    'conversations of it')
            text = b'' if document is None else plain_text(document)
            if not text:
                raise LeftOut('dropped' if document is None else 'empty')
            documents, notes = encode(tokenizer, document, text, dataset)
        except LeftOut as error:
            place = reading.location(named, number) + (error.detail and f': {error.detail}')
            records.append((number, error.what, 0, 0, place, {}))
            continue
        # BadInput, which the tokenizer raises, is a ValueError.
        except ValueError as error:
            place = f'{reading.location(batch, number)}: {error}'
            records.append((number, 'broken', 0, 0, place, {}))
            continue
        # The hash is of the text, so every tokenizer gives the same split.
        split = split_of(hash_share(text), config.val_fraction, config.probe_fraction)
        place = reading.location(named, number) if notes else None
        for parts, mask, n_bytes in documents:
            records.append((number, split, sum(map(len, parts)), n_bytes, place, notes))
            notes = {}
            ids += parts
            masks.append(mask)
    # uint16, where the ids fit, halves what a worker sends back.
    dtype = shard_header(0, tokenizer.vocab_size)[1]
    if not ids:
        return records, np.empty(0, dtype), None
    all_ids = np.concatenate(ids, dtype=dtype, casting='unsafe')
    return records, all_ids, None if masks[0] is None else np.concatenate(masks)


def encode(tokenizer, document, text, dataset):
    """Encodes a text or a Conversation. text: its UTF-8 bytes.

    Returns (documents, notes). A document is ([ids in parts, BOS first], mask or None, bytes of
    text). Raises LeftOut and ValueError.
    """
    template = dataset.chat_template
    if template is None:
        bos = np.array([tokenizer.bos_id], np.uint32)
        return [([bos, tokenizer.encode_document(document)], None, len(text))], {}
    if isinstance(document, str):
        raise ValueError(
            'it holds text, and chat_template needs a list of messages. Leave out --chat_template '
            'for text, or name the field with the messages by --column')
    roles = [m['role'] for m in document.messages]
    if 'assistant' not in roles:
        raise ValueError('no conversation with an answer of the assistant')
    notes = document.notes
    if template == 'model':
        found, more = encode_by_model(tokenizer, document, dataset.template)
        documents = [
            ([ids], mask, len(document.text(n).encode())) for ids, mask, n in found if mask.any()]
        notes.update(more)
    else:
        ids, mask = encode_conversation(tokenizer, document, template)
        documents = [([ids], mask, len(text))] if mask.any() else []
        if 'tool' in roles or 'ipython' in roles:
            notes['tool_role'] = 1
        for key, n in document.keys.items():
            notes[f'key of a message: {key}'] = n
    if not documents:
        raise LeftOut('no_loss')
    return documents, dict(notes)


def start_process():
    """Initializes a worker process, which must not outlive a killed parent."""
    # Ctrl-C reaches all processes of a terminal. Only the parent reacts, and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    # sys.exit in a thread would end only that thread, hence os._exit.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def tokenized(job, batches):
    """Yields (part, file number, result of tokenize_batch) for tuples (part, file number, Batch).

    They keep their order. None in place of a Batch gives None. The worker processes tokenize a
    limited number of batches ahead. With job.workers = 0 this process does it.
    """
    workers = job.workers
    tokenize = functools.partial(tokenize_batch, job.dataset, job.config)
    if workers == 0:
        for part, file_number, batch in batches:
            yield part, file_number, batch and tokenize(batch)
        return
    # Arrow and fsspec start threads. A process forked while they hold a lock could hang.
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(workers, context, start_process) as pool:
        if hasattr(fcntl, 'F_SETPIPE_SZ'):
            # A pipe of Linux holds 64 KiB, a batch 1 MB. With small pipes workers wait for their
            # batches 5 % of the time.
            for queue in (pool._call_queue, pool._result_queue):
                fcntl.fcntl(queue._writer.fileno(), fcntl.F_SETPIPE_SZ, 2**20)
        waiting = collections.deque()
        try:
            for part, file_number, batch in batches:
                future = batch and pool.submit(tokenize, batch)
                waiting.append((part, file_number, future))
                # Reading is faster than tokenizing. Without a limit the batches would fill the
                # memory.
                if len(waiting) > 6 * workers:
                    part, file_number, future = waiting.popleft()
                    yield part, file_number, future and future.result()
            for part, file_number, future in waiting:
                yield part, file_number, future and future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise RunFault(
                'a tokenizing process died (out of memory?). What is written is safe: run again, '
                'perhaps with fewer --workers.') from None
        finally:
            # The caller may have enough tokens or may have failed. Drop what has not begun.
            pool.shutdown(cancel_futures=True)


# -- one rank --------------------------------------------------------------------------------------


def number_in(variable, low):
    """Returns an environment variable as an int. Raises BadInput if it is none, or below `low`."""
    text = os.environ[variable]
    if not text.isdecimal() or int(text) < low:
        raise BadInput(
            f"the environment variable {variable} = '{text}' must be a whole number of at least "
            f'{low}. torchrun and SLURM set it. Unset it to prepare with one process.')
    return int(text)


def find_rank(config):
    """Returns (rank, world_size, where they come from): knobs, torchrun, SLURM or one process.

    Raises BadInput for one of the two without the other, and for values that do not fit.
    """
    if (config.rank is None) != (config.world_size is None):
        raise BadInput('--rank and --world_size go together: give both or neither.')
    rank = config.rank
    world_size = config.world_size
    origin = '--rank'
    if rank is None and ('RANK' in os.environ) != ('WORLD_SIZE' in os.environ):
        raise BadInput(
            'of the environment variables RANK and WORLD_SIZE only one is set. Start the ranks '
            'with torchrun, set both, or unset it.')
    # torchrun comes first. It may run under SLURM, with several ranks in one SLURM task.
    for names in (('RANK', 'WORLD_SIZE'), ('SLURM_PROCID', 'SLURM_NTASKS')):
        if rank is None and all(name in os.environ for name in names):
            rank = number_in(names[0], 0)
            world_size = number_in(names[1], 1)
            origin = names[0]
    if rank is None:
        return 0, 1, ''
    if not 0 <= rank < world_size:
        raise BadInput(
            f'rank = {rank} ({origin}) must be at least 0 and below world_size = {world_size}.')
    return rank, world_size, origin


@dataclass
class Job:
    """The preparation of a source, as one rank sees it."""
    dataset: Dataset
    config: PrepareConfig
    folder: str
    parts: list                     # list of lists of File
    settings: dict                  # of open_source
    workers: int
    bar: tqdm
    locks: dict = field(default_factory=dict)           # part -> lock that this process holds
    done_tokens: dict = field(default_factory=dict)     # part -> training tokens, of complete parts
    read: Callable = reading.read_batches       # (File, columns, skip) -> Batches
    finishing: bool = False         # this process holds the lock of the source
    made: int = 0                   # tokens that this process made

    def release(self):
        """Gives up the locks of all parts."""
        for handle in self.locks.values():
            handle.close()
        self.locks.clear()

    def state(self, part):
        return self.writer(part).state

    def tokens_before(self, part):
        """Returns the training tokens of all earlier parts, up to the first incomplete one."""
        total = 0
        for p in range(part):
            if p not in self.done_tokens:
                state = self.state(p)
                if not state['done']:
                    return total + shards.count_tokens(state)
                self.done_tokens[p] = shards.count_tokens(state)
            total += self.done_tokens[p]
        return total

    def writer(self, part, limit=None):
        vocab_size = tokenizer_of(self.config.tokenizer).vocab_size
        return shards.PartWriter(self.folder, part, vocab_size, limit)


def part_batches(job, todo):
    """Yields (part, file number, Batch) of the incomplete parts, and a Batch of None after each."""
    for part in todo:
        writer = job.writer(part)
        if writer.state['done']:
            writer.check_shards()
            continue
        job.locks[part] = shards.lock(job.folder, f'{part:05d}')
        # Read the state again, now that no other process can change it.
        writer = job.writer(part)
        state = writer.state
        if state['done']:
            continue
        writer.check_shards()
        # Another rank may be finishing the source, and would not know of shards from here on. Wait
        # for it, and stop if it has written meta.json.
        guard = contextlib.nullcontext()
        if not job.finishing:
            guard = shards.lock(job.folder, 'source', wait=True)
        with guard:
            if os.path.isfile(os.path.join(job.folder, 'meta.json')):
                return
        # A record of messages may have `tools` and other keys, which are counted.
        columns = job.dataset.columns
        if job.dataset.chat_template is not None and job.dataset.convert is None:
            columns = ()
        skip = state['record']
        for i in range(state['file'], len(job.parts[part])):
            for batch in job.read(job.parts[part][i], columns, skip):
                yield part, i, batch
            skip = 0
        yield part, None, None


def make(job, todo):
    """Makes the incomplete parts of `todo`. Stops early when earlier parts reach max_tokens."""
    writer = None
    for part, file_number, result in tokenized(job, part_batches(job, todo)):
        if writer is None:
            # Earlier parts of other ranks may still grow. Then this part gets too high a limit, and
            # `finish` makes it again.
            limit = job.config.max_tokens
            if limit is not None:
                limit -= job.tokens_before(part)
                if limit <= 0:
                    return
            writer = job.writer(part, limit)
        if result is not None:
            add_result(job.config, writer, file_number, result)
            n_tokens = len(result[1])
            job.made += n_tokens
            job.bar.update(n_tokens)
        if result is None or writer.state['done']:
            # The limit is reached here at the latest. `finish` deletes the parts after that.
            if writer.is_full():
                return
            writer.commit(len(job.parts[part]), 0, done=True)
            job.locks.pop(part).close()
            writer = None


def add_result(config, writer, file_number, result):
    """Adds the result of tokenize_batch to a part. Commits full shards and a full part."""
    records, ids, masks = result
    start = 0
    for i, (number, kind, n_tokens, n_bytes, place, notes) in enumerate(records):
        if kind == 'broken' and not config.skip_bad:
            raise BadInput(
                f'{place}. Fix or drop the record, or pass --skip_bad=True to leave out and list '
                'such records.')
        for what, n in notes.items():
            writer.count(what, place, n)
        if kind not in SPLITS:
            writer.count(kind, place)
            continue
        stop = start + n_tokens
        mask = None if masks is None else masks[start:stop]
        writer.add(kind, ids[start:stop], n_bytes, mask)
        start = stop
        # All documents of a record go to one shard, because a source continues after a record.
        if i + 1 < len(records) and records[i + 1][0] == number:
            continue
        if writer.is_full() or writer.buffered['train'] >= config.shard_tokens:
            writer.commit(file_number, number + 1, done=writer.is_full())
            if writer.state['done']:
                return


def finish(job):
    """Writes meta.json if all parts are complete.

    Returns its content, or None if other ranks are still working. With max_tokens the source
    consists of the parts in order, up to the document that reaches the limit. Ranks that did not
    know of each other's tokens have made too many: the part in which the limit falls is made again,
    and later parts are deleted.
    """
    # The workers read ahead, so there may be locks of parts that are not needed.
    job.release()
    with shards.lock(job.folder, 'source', wait=True):
        job.finishing = True
        meta = shards.read_meta(job.folder)
        if meta is not None:
            return meta
        states = []
        rest = math.inf if job.config.max_tokens is None else job.config.max_tokens
        for part in range(len(job.parts)):
            state = job.state(part)
            if rest <= 0:
                # If another rank is still working on the part, that rank will finish the source.
                try:
                    shards.lock(job.folder, f'{part:05d}').close()
                except BadInput:
                    return None
                job.writer(part).delete()
                continue
            if not state['done']:
                return None
            if shards.count_tokens(state) >= rest and state['limit'] != rest:
                job.writer(part).delete()
                job.done_tokens.clear()
                make(job, [part])
                state = job.state(part)
            # Somebody may have removed a shard since it was written.
            job.writer(part).check_shards()
            states.append(state)
            rest -= shards.count_tokens(state)
        # A run that trains on the conversations can copy their template.
        if job.dataset.template is not None:
            for name, text in job.dataset.template.texts.items():
                file = 'chat_template.jinja'
                if name != 'default':
                    file = os.path.join(TEMPLATE_FOLDER, f'{name}.jinja')
                shards.write_atomic(os.path.join(job.folder, file), [text.encode()])
        return shards.finish_source(
            job.folder, tokenizer_of(job.config.tokenizer), job.settings, states,
            dataset=job.dataset.name, revision=job.settings['commits'],
            licence=job.dataset.licence)


# -- a source --------------------------------------------------------------------------------------


def check_space(folder, n_bytes):
    """Prints the space that n_bytes of shards need in `folder`, and the space that is free.

    Shards that are there already count as written. Raises BadInput if the others do not fit.
    """
    for where, _, names in os.walk(folder):
        paths = [os.path.join(where, name) for name in names if name.endswith('.bin')]
        n_bytes -= sum(map(os.path.getsize, paths))
    n_bytes = max(0, n_bytes)
    # The folder may not exist yet. Its nearest existing parent is on the same disk.
    while not os.path.isdir(folder):
        folder = os.path.dirname(os.path.abspath(folder))
    free = shutil.disk_usage(folder).free
    needed = f'about {n_bytes / 2**20:,.1f} MiB'
    print(f'disk: {needed} needed, {free / 2**20:,.1f} MiB free in {folder}')
    if n_bytes > free:
        raise BadInput(
            f'{folder} has {free / 2**20:,.1f} MiB free, {needed} are needed. Free some space, '
            'choose another --out or set --max_tokens.')


def print_plan(dataset, config, files, vocab_size):
    """Prints the expected documents and bytes, and checks the disk. Returns the expected tokens."""
    stored = 0
    text = 0
    for file in files:
        stored += file.size
        # Text is about 3 times as large as its packed or parquet file.
        is_plain = file.path.lower().endswith((*reading.PLAIN, '.arrow'))
        text += file.size if is_plain else 3 * file.size
    line = f'{dataset.name}: {len(files):,} files, {stored / 2**20:,.1f} MiB stored'
    # A rough estimate. Only the progress bar and the check of the disk use it.
    tokens = text / 3.5
    if config.input is None and dataset.tokens is not None:
        tokens = dataset.tokens
        documents = dataset.documents or 0
        line += f', about {documents:,.0f} documents and {tokens:,.0f} tokens (by its card)'
    if dataset.licence:
        line += f'; licence: {dataset.licence}'
    print(line)
    if config.max_tokens:
        tokens = min(tokens, config.max_tokens)
    size = shard_header(0, vocab_size)[1].itemsize
    if dataset.chat_template is not None:
        size += 1                   # a byte of the mask
    check_space(os.path.join(config.out, dataset.name), int(tokens * size))
    return tokens


def find_files(dataset, config, folder, say):
    """Returns (files, commits): --input, or the hub at the commits that the source began with.

    say: see reading.local_files
    """
    if config.input is not None:
        if config.revision is not None:
            raise BadInput(
                '--revision is a commit on the hub, and --input gives local files in its place. '
                'Leave out one of them.')
        layout = [reading.split_url(url)[2] for url in dataset.files if url.startswith('hf://')]
        return reading.local_files(config.input, layout, say), {}
    if not dataset.files:
        raise BadInput(
            "--input is missing: files, a glob or a folder. Example: --input='corpus/*.jsonl.gz'")
    # A source without a pinned commit must not change to a newer one in the middle.
    commits = {}
    if config.revision is None:
        commits = (shards.settings_of(folder) or {}).get('commits', {})
    urls = []
    for url in dataset.files:
        if url.startswith('hf://'):
            repo, _, pattern = reading.split_url(url)
            if repo in commits:
                url = f'hf://datasets/{repo}@{commits[repo]}/{pattern}'
        urls.append(url)
    return hub_files(dataset, urls, config.revision)


def hub_files(dataset, urls, revision=None):
    """As reading.remote_files, which says what stands in for a dataset that is gone."""
    try:
        return reading.remote_files(urls, revision)
    except reading.NotOnHub:
        if not dataset.gone:
            raise
        repo = reading.split_url(urls[0])[0]
        raise BadInput(f'{repo} {dataset.gone}') from None


def check_probes(name, config):
    """Raises BadInput if a probe set was drawn from a larger share than is now set aside."""
    for path in glob.glob(os.path.join(glob.escape(config.out), 'probe', '*', 'meta.json')):
        probe = shards.read_meta(os.path.dirname(path))['settings']
        drawn = probe.get('probe_fraction')
        if probe.get('source') == name and drawn is not None and drawn > config.probe_fraction:
            raise BadInput(
                f'{os.path.dirname(path)} was drawn from {name} with probe_fraction = {drawn}. '
                f'With {config.probe_fraction} here, some of it would be trained on. Set '
                f'--probe_fraction={drawn}.')


def prepare(dataset, config, chat_template=None, found=None, read=reading.read_batches):
    """Makes the source <out>/<dataset.name>/, or this rank's share of it. Continues after a kill.

    config         what `configure` returns for the script, with the knobs of PrepareConfig
    chat_template  for a dataset of conversations: 'llama3', 'chatml', or 'model' for the template
                   of the tokenizer's folder
    found, read    (files, commits) as find_files returns them, and the function that reads such a
                   file. None: the files of the dataset
    Returns the content of meta.json, or None if other ranks are still working. Raises BadInput and
    RunFault.
    """
    try:
        dataset = replace(dataset, chat_template=chat_template)
        return prepare_source(dataset, pick(PrepareConfig, config), found, read)
    except KeyboardInterrupt:
        print('\nstopped. What is complete is kept. Run again to continue.', file=sys.stderr)
        raise SystemExit(130) from None


def prepare_source(dataset, config, found, read):
    if not config.tokenizer:
        raise BadInput('--tokenizer is missing: a tiktoken name, a rank file, or a tokenizer.json.')
    reserved = config.val_fraction + config.probe_fraction
    if not 0 <= reserved <= 1:
        raise BadInput(f'val_fraction + probe_fraction = {reserved} must lie in [0, 1].')
    check_probes(dataset.name, config)
    rank, world_size, origin = find_rank(config)
    tokenizer = tokenizer_of(config.tokenizer)
    folder = shards.source_folder(config.out, dataset.name)
    if dataset.chat_template == 'model':
        # A source that goes on another day shows the date on which it was begun.
        begun = shards.settings_of(folder) or {}
        date = begun.get('template_date') or datetime.date.today().isoformat()
        template = read_model_template(tokenizer, date)
        content = json.dumps([template.texts, tokenizer.tokens], sort_keys=True).encode()
        settings = dict(
            template_sha256=hashlib.sha256(content).hexdigest(), template_date=template.date)
        settings |= dataset.more_settings
        dataset = replace(dataset, template=template, more_settings=settings)
    elif dataset.chat_template is not None:
        check_template(tokenizer, dataset.chat_template)
    say = print if rank == 0 else lambda _: None
    files, commits = found or find_files(dataset, config, folder, say)
    files, known = inputs.with_content(files)
    # All that the bytes depend on. Names are relative to --input, so that a copy of the files in
    # another folder gives the same source.
    settings = dict(
        dataset=dataset.files, columns=list(dataset.columns), commits=commits,
        files=inputs.fingerprint(files), tokenizer=tokenizer.fingerprint,
        chat_template=dataset.chat_template, max_tokens=config.max_tokens,
        shard_tokens=config.shard_tokens, val_fraction=config.val_fraction,
        probe_fraction=config.probe_fraction, **dataset.more_settings)
    meta = shards.open_source(folder, settings)
    if meta is not None:
        # A kill right after meta.json was written leaves progress/ behind.
        shutil.rmtree(os.path.join(folder, 'progress'), ignore_errors=True)
        print(f'{folder} is complete already. Delete it to make it again.')
        return meta
    workers = config.workers
    if workers is None:
        local_ranks = 1
        if 'LOCAL_WORLD_SIZE' in os.environ:
            local_ranks = number_in('LOCAL_WORLD_SIZE', 1)
        # SLURM and taskset may allow only some of the machine's cores.
        workers = max(1, len(os.sched_getaffinity(0)) // local_ranks)
    expected = None
    if rank == 0:
        expected = int(print_plan(dataset, config, files, tokenizer.vocab_size) / world_size)
    parts = reading.make_parts(files, cut=read is reading.read_batches)
    # Dealt in turn, so that all ranks begin with early parts. With max_tokens only these count.
    mine = range(rank, len(parts), world_size)
    if world_size > 1:
        print(f'rank {rank} of {world_size} ({origin}): {len(mine)} of {len(parts)} parts')
    start = time.monotonic()
    bar = tqdm(
        total=expected, unit='tok', unit_scale=True, desc=dataset.name, disable=rank > 0)
    with bar:
        job = Job(dataset, config, folder, parts, settings, workers, bar, read=read)
        try:
            make(job, mine)
            inputs.check_unchanged(known)
            meta = finish(job)
        finally:
            job.release()
    seconds = time.monotonic() - start
    if meta is None:
        print(
            f'rank {rank}: its {job.made:,} tokens are written in {seconds:.1f} s. Other parts of '
            f'{folder} are not done. The rank that ends last writes meta.json. If one was '
            'interrupted, start it again.')
    else:
        shards.print_table({dataset.name: meta}, seconds if job.made else None, job.made)
        report(folder, meta, tokenizer)
    return meta


def report(folder, meta, tokenizer):
    """Prints what was left out and, for chat data, one conversation with its mask."""
    for line in shards.count_lines(meta['counts'], meta.get('examples', {})):
        print(line)
    for where in meta['skipped'][:20]:
        print(f'  {where}')
    if len(meta['skipped']) > 20:
        print(f'  ... and {len(meta["skipped"]) - 20:,} more, all in meta.json under "skipped"')
    if 'val' not in meta['splits'] and meta['settings']['val_fraction'] > 0:
        print(
            'No document fell into validation, which train.py needs: delete '
            f'{folder} and raise --val_fraction.')
    if meta['settings']['chat_template'] is None:
        return
    # Read the first conversation back from its shard: this shows what training will see.
    path = os.path.join(folder, meta['shards'][0]['file'])
    ids = open_shard(path)[:20_000]
    mask = np.fromfile(path.removesuffix('.bin') + '.mask', np.uint8, 20_000)
    end = [*np.flatnonzero(ids == tokenizer.bos_id)[1:], len(ids)][0]
    print(
        f'the first conversation ({end:,} tokens, {mask[:end].sum():,} of them with a loss). What '
        'is learnt stands between [[ and ]]:')
    print(marked(tokenizer, ids[:end], mask[:end]))


END_OF_TEXT = '<|endoftext|>'
SPECIAL = (END_OF_TEXT, '<|im_start|>', '<|im_end|>')
# Digits one by one: arithmetic is learned sooner.
PATTERN = LLAMA3_PATTERN.replace(r'\p{N}{1,3}', r'\p{N}')


def train_tokenizer(texts, vocab_size):
    """Trains a byte-level BPE of `vocab_size` tokens, the last of them special."""
    import rustbpe
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(iter(texts), vocab_size - len(SPECIAL), pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
    return make_tokenizer('demo', ranks, PATTERN, special, END_OF_TEXT)
