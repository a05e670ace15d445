"""What the dataset scripts share: `prepare()` turns the files of a dataset into the shards of a source.

    files, on the hub or local  ->  parts, dealt to the ranks  ->  batches of raw records, dealt to the workers
    ->  documents (and their split, by hash)  ->  tokens  ->  shards of the part  ->  meta.json, by whoever ends last

What comes out depends on the files and the settings alone, not on workers, ranks, kills or who ended when: a part is the
work of one process, its shards are written in the order of its records, and a shard is closed at a document.
"""
import collections
import concurrent.futures
import contextlib
import fcntl
import glob
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from configurator import BadInput, RunFault
from data import open_shard, shard_header
from lib.chat import check_template, encode_chat, marked
from lib.reading import local_files, location, make_parts, read_batches, records_of, remote_files
from lib.tokenizer import load_tokenizer
from prepare.shards import PartWriter, finish_source, lock, open_source, print_table, read_json

SPLITS = ('train', 'val', 'probe')
EMPTY, DROPPED, BROKEN = 3, 4, 5        # what else a record can come to; 0 to 2 are the splits


@dataclass(frozen=True)
class Dataset:
    """What is particular to one dataset. The figures are those of its card, to plan with."""
    name: str                       # of the source: the folder <out>/<name>/
    files: list                     # globs hf://datasets/<id>@<commit>/<glob>, or https:// URLs
    columns: list                   # of a record that its conversion reads
    documents: float | None = None
    tokens: float | None = None     # by the card's tokenizer
    licence: str = ''


# -- one record --------------------------------------------------------------------------------------------------------

def hash_share(text):
    """A number in [0, 1) that is a function of the text (bytes) alone: equal documents land together, whatever their source."""
    return int.from_bytes(hashlib.sha256(text).digest()[:4], 'big') / 2**32


def split_of(share, val_fraction, probe_fraction):
    """The split of a document by its hash_share: val from below, probe from above, train between."""
    return 'val' if share < val_fraction else 'probe' if share >= 1 - probe_fraction else 'train'


def document_of(record, convert, columns=()):
    """What `convert` makes of a record: text, list of messages, or None to drop it. ValueError says why a record is broken."""
    if isinstance(record, ValueError):
        raise record
    if isinstance(record, str):         # a plain text file
        return record
    missing = [c for c in columns if c not in record]
    if missing:
        raise ValueError(f"no field '{missing[0]}' (--column says which, for your own text); the record has {list(record)}")
    try:
        document = convert(record)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f'it cannot be converted ({type(error).__name__}: {error}); the record has {list(record)}') from None
    if not isinstance(document, (str, list, type(None))):
        raise ValueError(f'no text but {type(document).__name__}')
    if isinstance(document, list) and not all(isinstance(m, dict) and isinstance(m.get('role'), str)
                                              and isinstance(m.get('content'), str) for m in document):
        raise ValueError('a message lacks role or content, or they are no text')
    return document


def plain_text(document):
    """The UTF-8 bytes of a document, or of a conversation's contents. ValueError if it is no valid Unicode."""
    try:
        return (document if isinstance(document, str) else '\n'.join(m['content'] for m in document)).encode()
    except UnicodeEncodeError:
        raise ValueError('the text holds half of a surrogate pair (a broken \\u escape)') from None


# -- the workers -------------------------------------------------------------------------------------------------------

@dataclass
class Work:
    """All that a worker needs to know."""
    tokenizer_path: str
    convert: object
    columns: list
    chat_template: str | None
    val_fraction: float
    probe_fraction: float


@dataclass
class Result:
    """The documents of a batch, one after the other, and what became of every record."""
    numbers: list                   # of the record within its file
    kinds: list                     # 0 to 2: its split; EMPTY, DROPPED, BROKEN
    ids: object                     # (tokens of all documents,) uint16 or uint32, every document with BOS in front
    masks: object                   # (the same,) uint8, None for plain text
    lengths: list                   # tokens of every document
    n_bytes: list                   # UTF-8 bytes of every document
    faults: list                    # (location, reason) of every broken record
    seconds: float = 0.0            # CPU time of tokenizing alone


_work, _tokenizer, _bos = None, None, None


def start_worker(work):
    global _work, _tokenizer, _bos
    _work, _tokenizer = work, load_tokenizer(work.tokenizer_path)
    _bos = np.array([_tokenizer.bos_id], np.uint32)


def start_process(work):
    """As start_worker, in a process of its own, which must not outlive a killed parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    start_worker(work)


def tokenize_batch(batch):
    """Batch -> Result."""
    result = Result([], [], [], [], [], [], [])
    dtype = shard_header(0, _tokenizer.vocab_size)[1]
    for number, record in records_of(batch):
        result.numbers.append(number)
        try:
            document = document_of(record, _work.convert, _work.columns)
            text = plain_text(document) if document is not None else b''
            if not text:
                result.kinds.append(DROPPED if document is None else EMPTY)
                continue
            start = time.thread_time()
            ids, mask = encode(document)
            result.seconds += time.thread_time() - start
        except ValueError as error:         # BadInput of the tokenizer among them
            result.kinds.append(BROKEN)
            result.faults.append((location(batch, number), str(error)))
            continue
        result.kinds.append(SPLITS.index(split_of(hash_share(text), _work.val_fraction, _work.probe_fraction)))
        result.ids += ids
        result.masks.append(mask)
        result.lengths.append(sum(map(len, ids)))
        result.n_bytes.append(len(text))
    result.masks = np.concatenate(result.masks) if result.ids and result.masks[0] is not None else None
    result.ids = np.concatenate(result.ids, dtype=dtype, casting='unsafe') if result.ids else np.empty(0, dtype)
    return result


def encode(document):
    """Text or messages -> ([ids of the document in parts, BOS first], mask or None)."""
    if _work.chat_template is not None:
        if isinstance(document, str) or not any(m['role'] == 'assistant' for m in document):
            raise ValueError('no conversation with an answer of the assistant')
        ids, mask = encode_chat(_tokenizer, document, _work.chat_template)
        return [ids], mask
    return [_bos, _tokenizer.encode_document(document)], None


def dealt(batches, work, workers):
    """Yields (part, file number, Result) in the order of `batches`, an iterator of (part, file number, Batch); None passes through.

    `workers` processes tokenize a bounded way ahead; 0: this process does.
    """
    if workers == 0:
        start_worker(work)
        for part, file_number, batch in batches:
            yield part, file_number, batch and tokenize_batch(batch)
        return
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(workers, context, start_process, (work,)) as pool:
        if hasattr(fcntl, 'F_SETPIPE_SZ'):          # Linux: at 64 KiB a worker waits while its batch trickles in (5 % of the time)
            for queue in (pool._call_queue, pool._result_queue):
                fcntl.fcntl(queue._writer.fileno(), fcntl.F_SETPIPE_SZ, 2**20)
        waiting = collections.deque()
        try:
            for part, file_number, batch in batches:
                waiting.append((part, file_number, batch and pool.submit(tokenize_batch, batch)))
                while len(waiting) > 6 * workers:
                    part, file_number, future = waiting.popleft()
                    yield part, file_number, future and future.result()
            for part, file_number, future in waiting:
                yield part, file_number, future and future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise RunFault('a tokenizing process died (out of memory?). What is written is safe: run again, perhaps with '
                           'fewer --workers.') from None
        finally:                # the caller may have enough tokens, or have failed: drop what has not begun
            pool.shutdown(cancel_futures=True)


# -- one rank ----------------------------------------------------------------------------------------------------------

def ranks(rank, world_size):
    """(rank, world_size, where they are from): the knobs, torchrun's variables, SLURM's, or one process."""
    if (rank is None) != (world_size is None):
        raise BadInput('--rank and --world_size go together: give both or neither.')
    found = (rank, world_size, '--rank')
    for names in (('RANK', 'WORLD_SIZE'), ('SLURM_PROCID', 'SLURM_NTASKS')):
        if found[0] is None and all(name in os.environ for name in names):
            found = (*(int(os.environ[name]) for name in names), names[0])
    if found[0] is None:
        return 0, 1, ''
    if not 0 <= found[0] < found[1]:
        raise BadInput(f'rank = {found[0]} must be at least 0 and below world_size = {found[1]}.')
    return found


@dataclass
class Job:
    """A source in the making, as one rank sees it."""
    folder: str
    parts: list                     # list of lists of File
    columns: list
    vocab_size: int
    max_tokens: int | None
    shard_tokens: int
    skip_bad: bool
    bar: object
    locks: dict = field(default_factory=dict)
    done_tokens: dict = field(default_factory=dict)      # part -> training tokens, of parts known to be done
    finishing: bool = False         # this process holds the lock of the whole source
    made: int = 0                   # tokens of this process
    seconds: float = 0.0            # CPU time that they took to tokenize

    def state(self, part):
        return read_json(os.path.join(self.folder, 'progress', f'{part:05d}.json'))

    def tokens_before(self, part):
        """Training tokens of all earlier parts, as far as they are written."""
        for p in range(part):
            if p not in self.done_tokens:
                state = self.state(p) or dict(shards=[], done=False)
                tokens = sum(s['tokens'] for s in state['shards'] if s['split'] == 'train')
                if not state['done']:
                    return sum(self.done_tokens.get(q, 0) for q in range(p)) + tokens
                self.done_tokens[p] = tokens
        return sum(self.done_tokens[p] for p in range(part))


def part_batches(job, todo):
    """Yields (part, file number, Batch) of the parts that are not done, and (part, None, None) at the end of each."""
    for part in todo:
        if (job.state(part) or {}).get('done'):
            continue
        job.locks[part] = lock(job.folder, f'{part:05d}')
        state = job.state(part) or dict(done=False, file=0, record=0)       # as it is now that nobody else can write it
        if state['done']:
            continue
        with contextlib.nullcontext() if job.finishing else lock(job.folder, 'source', wait=True):
            if os.path.isfile(os.path.join(job.folder, 'meta.json')):       # another rank has just ended it all
                return
        for i, file in enumerate(job.parts[part]):
            if i >= state['file']:
                for batch in read_batches(file, job.columns, state['record'] if i == state['file'] else 0):
                    yield part, i, batch
        yield part, None, None


def make(job, todo, work, workers):
    """Makes the parts in `todo` that are not done; stops early when the parts before hold max_tokens."""
    writer = None
    for part, file_number, result in dealt(part_batches(job, todo), work, workers):
        if writer is None:
            limit = None if job.max_tokens is None else job.max_tokens - job.tokens_before(part)
            if limit is not None and limit <= 0:
                return
            writer = PartWriter(job.folder, part, job.vocab_size, limit)
        if result is not None:
            add_result(job, writer, file_number, result)
            job.made += len(result.ids)
            job.seconds += result.seconds
            job.bar.update(len(result.ids))
        if result is None or writer.state['done']:
            if writer.is_full():
                return
            writer.commit(len(job.parts[part]), 0, done=True)
            job.locks.pop(part).close()
            writer = None


def add_result(job, writer, file_number, result):
    """Adds a batch's documents to the part, record by record; commits when a shard is full, and for good at the limit."""
    faults, document, start = iter(result.faults), 0, 0
    for number, kind in zip(result.numbers, result.kinds):
        if kind == BROKEN:
            where, reason = next(faults)
            if not job.skip_bad:
                raise BadInput(f'{where}: {reason}. Mend or drop the record, or pass --skip_bad=True to leave such out and list them.')
            writer.count('broken', f'{where}: {reason}')
        elif kind in (EMPTY, DROPPED):
            writer.count('empty' if kind == EMPTY else 'dropped')
        else:
            stop = start + result.lengths[document]
            mask = None if result.masks is None else result.masks[start:stop]
            writer.add(SPLITS[kind], result.ids[start:stop], result.n_bytes[document], mask)
            document, start = document + 1, stop
            if writer.is_full() or writer.buffered['train'] >= job.shard_tokens:
                writer.commit(file_number, number + 1, done=writer.is_full())
                if writer.state['done']:
                    return


def finish(job, tokenizer, settings, work, workers, **more):
    """Writes meta.json when every part that counts is done: its content, or None when others are still at work.

    With max_tokens the source is the parts in order up to the document that reaches it. Ranks that did not know of each
    other's tokens have made too much: the part in which the limit falls is made again, what lies behind is deleted.
    """
    for part in [*job.locks]:           # those of parts that were read ahead and are not needed
        job.locks.pop(part).close()
    with lock(job.folder, 'source', wait=True):
        job.finishing = True
        if os.path.isfile(os.path.join(job.folder, 'meta.json')):
            return read_json(os.path.join(job.folder, 'meta.json'))
        states, total = [], 0
        for part in range(len(job.parts)):
            rest = None if job.max_tokens is None else job.max_tokens - total
            state = job.state(part)
            if rest is not None and rest <= 0:
                try:
                    lock(job.folder, f'{part:05d}').close()
                except BadInput:        # another rank is at work on it, and will be the last
                    return None
                PartWriter(job.folder, part, job.vocab_size).delete()
                continue
            if state is None or not state['done']:
                return None
            tokens = sum(s['tokens'] for s in state['shards'] if s['split'] == 'train')
            if rest is not None and tokens >= rest and state['limit'] != rest:
                PartWriter(job.folder, part, job.vocab_size).delete()
                job.done_tokens.clear()
                make(job, [part], work, workers)
                state = job.state(part)
                tokens = sum(s['tokens'] for s in state['shards'] if s['split'] == 'train')
            states.append(state)
            total += tokens
        return finish_source(job.folder, tokenizer, settings, states, **more)


# -- the whole ---------------------------------------------------------------------------------------------------------

def check_space(folder, n_bytes):
    """Prints the space that n_bytes of shards in `folder` need, less what it holds already, and the space there is.

    Raises BadInput when it will not fit.
    """
    held = sum(os.path.getsize(os.path.join(where, n)) for where, _, names in os.walk(folder) for n in names if n.endswith('.bin'))
    n_bytes = max(0, n_bytes - held)
    while not os.path.isdir(folder):
        folder = os.path.dirname(os.path.abspath(folder))
    free = shutil.disk_usage(folder).free
    print(f'disk: about {n_bytes / 2**20:,.1f} MiB needed, {free / 2**20:,.1f} MiB free in {folder}')
    if n_bytes > free:
        raise BadInput(f'{folder} has {free / 2**20:,.1f} MiB free, about {n_bytes / 2**20:,.1f} MiB are needed. '
                       'Free some space, choose another --out or set --max_tokens.')


def print_plan(dataset, files, knobs, vocab_size, chat_template):
    """Documents and bytes expected; stops when the shards will not fit on the disk. Returns the tokens expected."""
    stored = sum(f.size for f in files)
    text = sum(f.size * (1 if f.path.endswith(('.jsonl', '.json', '.txt', '.md')) else 3) for f in files)     # text is 3 times its .gz
    tokens = text / 3.5
    line = f'{dataset.name}: {len(files):,} files, {stored / 2**20:,.1f} MiB stored'
    if knobs['input'] is None and dataset.tokens is not None:
        tokens = dataset.tokens
        line += f', about {dataset.documents or 0:,.0f} documents and {dataset.tokens:,.0f} tokens (its card)'
    print(line + (f'; licence: {dataset.licence}' if dataset.licence else ''))
    tokens = min(tokens, knobs['max_tokens'] or tokens)
    size = shard_header(0, vocab_size)[1].itemsize + (chat_template is not None)
    check_space(os.path.join(knobs['out'], dataset.name), int(tokens * size))
    return tokens


def find_files(dataset, knobs, folder):
    """(files, commits): local ones, or the hub's at the commits that this source was begun with."""
    if knobs['input'] is not None:
        layout = [url.split('/', 5)[5] for url in dataset.files if url.startswith('hf://')]
        return local_files(knobs['input'], layout), {}
    if not dataset.files:
        raise BadInput("--input is missing: files, a glob or a folder. Example: --input='corpus/*.jsonl.gz'")
    begun = read_json(os.path.join(folder, 'progress/source.json')) or read_json(os.path.join(folder, 'meta.json')) or {}
    commits = begun.get('settings', {}).get('commits', {}) if knobs['revision'] is None else {}
    urls = []
    for url in dataset.files:
        known = next((repo for repo in commits if url.startswith((f'hf://datasets/{repo}@', f'hf://datasets/{repo}/'))), None)
        urls.append(url if known is None else f'hf://datasets/{known}@{commits[known]}/{url.split("/", 5)[5]}')
    return remote_files(urls, knobs['revision'])


def check_probes(name, knobs):
    """BadInput when a probe set was drawn from this source with a larger share than is kept out of training now."""
    for path in glob.glob(os.path.join(glob.escape(knobs['out']), 'probe', '*', 'meta.json')):
        probe = read_json(path)['settings']
        if probe.get('source') == name and probe['probe_fraction'] > knobs['probe_fraction']:
            raise BadInput(f"{os.path.dirname(path)} was drawn from {name} with probe_fraction = {probe['probe_fraction']}; with "
                           f"{knobs['probe_fraction']} here, some of it would be trained on. Set "
                           f"--probe_fraction={probe['probe_fraction']}.")


def prepare(dataset, convert, knobs, chat_template=None):
    """Makes the source <out>/<dataset.name>/ of a dataset's records, or as much of it as falls to this rank.

    convert: record (dict) -> text, list of messages (with chat_template), or None to leave the record out; a module-level
    function, since workers import it. knobs: values of prepare/knobs.py. Goes on after a kill.
    Returns meta.json's content, None when other ranks are still at work. Raises BadInput and RunFault.
    """
    try:
        return prepare_source(dataset, convert, knobs, chat_template)
    except KeyboardInterrupt:
        print('\nstopped. What is complete is kept: run again to go on.', file=sys.stderr)
        raise SystemExit(130) from None


def prepare_source(dataset, convert, knobs, chat_template):
    if not knobs['tokenizer']:
        raise BadInput('--tokenizer is missing: a tiktoken name, a rank file, or a tokenizer.json.')
    if not 0 <= knobs['val_fraction'] + knobs['probe_fraction'] <= 1:
        raise BadInput(f"val_fraction + probe_fraction = {knobs['val_fraction'] + knobs['probe_fraction']} must lie in [0, 1].")
    check_probes(dataset.name, knobs)
    rank, world_size, origin = ranks(knobs['rank'], knobs['world_size'])
    tokenizer = load_tokenizer(knobs['tokenizer'])
    if chat_template is not None:
        check_template(tokenizer, chat_template)
    folder = os.path.join(knobs['out'], dataset.name)
    files, commits = find_files(dataset, knobs, folder)
    parts = make_parts(files)
    listing = json.dumps([[f.name, f.size] for f in files])
    settings = dict(
        dataset=dataset.files, commits=commits, files=hashlib.sha256(listing.encode()).hexdigest(),
        columns=list(dataset.columns), chat_template=chat_template, tokenizer=tokenizer.fingerprint,
        **{key: knobs[key] for key in ('max_tokens', 'shard_tokens', 'val_fraction', 'probe_fraction')})
    meta = open_source(folder, settings)
    if meta is not None:
        shutil.rmtree(os.path.join(folder, 'progress'), ignore_errors=True)
        print(f'{folder} is complete already; delete it to make it anew.')
        return meta
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    workers = max(1, cores) if knobs['workers'] is None else knobs['workers']
    expected = print_plan(dataset, files, knobs, tokenizer.vocab_size, chat_template) if rank == 0 else None
    mine = range(rank, len(parts), world_size)
    if world_size > 1:
        print(f'rank {rank} of {world_size} ({origin}): {len(mine)} of {len(parts)} parts')
    start = time.monotonic()
    with tqdm(total=expected and int(expected / world_size), unit='tok', unit_scale=True, desc=dataset.name, disable=rank > 0) as bar:
        job = Job(folder, parts, dataset.columns, tokenizer.vocab_size, knobs['max_tokens'], knobs['shard_tokens'],
                  knobs['skip_bad'], bar)
        work = Work(knobs['tokenizer'], convert, list(dataset.columns), chat_template, knobs['val_fraction'], knobs['probe_fraction'])
        make(job, mine, work, workers)
        more = dict(dataset=dataset.name, revision=commits, licence=dataset.licence)
        meta = finish(job, tokenizer, settings, work, workers, **more)
    report(dataset, folder, meta, job, time.monotonic() - start, workers, tokenizer, rank)
    return meta


def report(dataset, folder, meta, job, seconds, workers, tokenizer, rank):
    """What was made, how fast, what was left out, and for chat data one conversation with its mask."""
    if meta is None:
        print(f'rank {rank}: its {job.made:,} tokens are written in {seconds:.1f} s; other parts of {folder} are not done. The rank '
              'that ends last writes meta.json; if one was cut off, start it again.')
        return
    print_table({dataset.name: meta}, seconds if job.made else None, job.made)
    if job.seconds:
        alone = job.made / job.seconds
        share = job.made / seconds / (alone * max(1, workers))
        print(f'tokenizing alone: {alone:,.0f} tokens/s and core; {max(1, workers)} worker(s), {share:.0%} of that bound')
    left_out = {what: n for what, n in meta['counts'].items() if n}
    if left_out:
        print('records left out: ' + ', '.join(f'{n:,} {what}' for what, n in sorted(left_out.items())))
    for where in meta['skipped'][:20]:
        print(f'  {where}')
    if len(meta['skipped']) > 20:
        print(f'  ... and {len(meta["skipped"]) - 20:,} more: meta.json lists them all under "skipped"')
    if 'val' not in meta['splits'] and meta['settings']['val_fraction'] > 0:
        print(f'No document fell into validation, which train.py needs: delete {folder} and raise --val_fraction.')
    if meta['settings']['chat_template'] is not None:
        print_example(folder, meta, tokenizer)


def print_example(folder, meta, tokenizer):
    """Reads the first conversation back from its shard and mask and prints it."""
    shard = os.path.join(folder, next(s['file'] for s in meta['shards']))
    ids, mask = open_shard(shard)[:20_000], np.fromfile(shard.removesuffix('.bin') + '.mask', np.uint8, 20_000)
    ends = np.flatnonzero(ids == tokenizer.bos_id)[1:]
    end = int(ends[0]) if len(ends) else len(ids)
    print(f'the first conversation ({end:,} tokens, the loss counts {int(mask[:end].sum()):,}), what is learnt between [[ and ]]:')
    print(marked(tokenizer, ids[:end], mask[:end]))
