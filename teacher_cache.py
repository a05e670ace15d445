"""A teacher's words on disk: `kd.py cache` writes them once, `train.py --kd_cache=<name>` reads them.

    data/<source>/kd/<name>/cache.json       what teacher, rows and method they come from
                            part_000000.kd   and so on: records of PART_TOKENS tokens, the windows of the source in order
                            part_000000.npy  sums over these tokens of the probabilities beyond the k likeliest, (V,) float64

A record holds of one position: ids and log-probabilities (fp16) of the k likeliest next tokens, the log of the mass of all the others and a few
ids drawn from them, the sum of q log q, the likeliest id, and the log-probability of the next token. A window has block_size records; its
context is what the student sees, so a cache fits one block_size, packing and document_mask, whatever the order and the mixture.
Disk per billion tokens: 458 GB with k=64, draws=16 and a vocabulary above 65,536, 296 GB up to there; 74 and 40 GB with k=0.
"""
import functools
import json
import math
import os

import numpy as np
import torch
from tqdm import tqdm

from configurator import BadInput, RunFault, check_values
from data import Source, batch_of, common_tokenizer, derive_keys
from kd import find_teacher, open_teacher, weights_fingerprint
from lib import hf
from lib.device import device_name, pick_dtype, start_ranks, tune_malloc
from ops.attention import check_documents
from ops.loss import chunk_rows
from packing import OVERLONG

PART_TOKENS = 2**21     # of a file; a killed cache goes on at the first part that is not there
LOG_ZERO = -30.0        # the log of what is nothing, for fp16


def record_dtype(vocab_size, k, draws):
    """One position's record: 6 k + 4 draws + 10 bytes above 65,536 tokens, 4 k + 2 draws + 8 up to there."""
    token = np.dtype('<u4') if vocab_size > 2**16 else np.dtype('<u2')
    return np.dtype([('ids', token, (k,)), ('logq', '<f2', (k,)), ('drawn', token, (draws,)), ('tail', '<f2'), ('negentropy', '<f2'), ('target', '<f2'),
                     ('top', token)])


def part_windows(block_size):
    return max(1, PART_TOKENS // block_size)


def part_path(folder, part):
    return os.path.join(folder, f'part_{part:06d}.kd')


# -- writing -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def records_of(h, weight, targets, dtype, temperature, generator):
    """Records of N positions from hidden states h (N, C), output weight (V, C) and next tokens targets (N,) int64.

    Positions whose target is -1 get one as well, with the log-probability of token 0. Returns (records (N,) of record_dtype, sum over positions
    of the probabilities beyond the k likeliest (V,) float64).
    """
    k, draws = dtype['ids'].shape[0], dtype['drawn'].shape[0]
    records, beyond = np.zeros(len(h), dtype), torch.zeros(len(weight), dtype=torch.float64, device=h.device)
    step = max(1, chunk_rows(len(h), len(weight), h.device, torch.float32) // 4)
    for start in range(0, len(h), step):
        y = (h[start:start + step] @ weight.T).float()                                   # (n, V)
        lq = torch.log_softmax(y / temperature, 1)
        q = lq.exp()
        out = records[start:start + step]
        out['target'] = torch.log_softmax(y, 1).gather(1, targets[start:start + step, None].clamp(min=0))[:, 0].clamp(min=-60000).cpu()
        out['negentropy'] = (q * lq).sum(1).cpu()
        out['top'] = lq.argmax(1).cpu()
        values, ids = lq.topk(k, 1)                                                      # (n, k)
        out['ids'], out['logq'] = ids.cpu(), values.cpu()
        q.scatter_(1, ids, 0)
        beyond += q.sum(0, dtype=torch.float64)
        out['tail'] = q.sum(1).log().clamp(min=LOG_ZERO).cpu()                           # summed over the others: exact when small
        if draws:
            out['drawn'] = torch.multinomial(q.clamp_(min=1e-30), draws, replacement=True, generator=generator).cpu()
    return records, beyond.cpu().numpy()


def describe(config, about, source, vocab_size, dtype):
    """What a cache depends on, as cache.json holds it."""
    drawn = dict(seed=config['seed'], batch_size=config['batch_size']) if config['draws'] else {}
    return dict(teacher=config['teacher'], weights=weights_fingerprint(about), vocab_size=vocab_size, k=config['k'], draws=config['draws'],
                temperature=config['temperature'], dtype=str(dtype), **drawn, **rows_of(source, config))


def rows_of(source, config):
    """What the rows of a source depend on. config: kd.py's knobs or train.py's."""
    packed = config['packing'] == 'document'
    return dict(block_size=config['block_size'], packing=config['packing'], document_mask=config['document_mask'] or packed,
                overlong=config['overlong'] if packed else None, shards=source.fingerprint(), windows=source.n_windows)


def write(config):
    """What `kd.py cache` does, this rank's parts of it. config: its knobs."""
    check_values(config, dict(packing=('window', 'document'), overlong=OVERLONG), dict(temperature=(1e-3, math.inf), **dict.fromkeys(
        ('batch_size', 'block_size'), (1, math.inf)), **dict.fromkeys(('k', 'draws', 'seed'), (0, math.inf))))
    if not config['k'] and not config['draws']:
        raise BadInput('k = 0 and draws = 0 keep nothing of the teacher. Set one of them.')
    tune_malloc()
    rank, world_size, device = start_ranks(config['device'], join=False)
    dtype, reason = pick_dtype(config['dtype'], device)
    names = [name.strip() for name in config['source'].split(',')]
    vocab_size = hf.find_model(config['teacher'])['model'].vocab_size
    sources = [Source(config['data_dir'], name, 'train', config['block_size'], 0, vocab_size, config['packing'], config['overlong'])
               for name in names]
    tokenizer = common_tokenizer(sources)
    about = find_teacher(config['teacher'], vocab_size, tokenizer)
    if config['k'] > vocab_size:
        raise BadInput(f"k = {config['k']} is more than the teacher's vocabulary of {vocab_size}.")
    if config['document_mask'] and tokenizer is None:
        raise BadInput('document_mask needs the beginning-of-document token, and these sources have no meta.json that names it.')
    bos_id = tokenizer['bos_id'] if config['document_mask'] or config['packing'] == 'document' else None
    if bos_id is not None:
        check_documents(device, dtype)
    teacher = open_teacher(about, device, dtype)
    if rank == 0:
        print(f"teacher: {config['teacher']} in {dtype} ({reason}) on {world_size} x {device_name(device)}")
    for source in sources:
        folder = os.path.join(config['data_dir'], source.name, 'kd', config['name'])
        begin(folder, describe(config, about, source, vocab_size, dtype), rank)
        per_part, record = part_windows(config['block_size']), record_dtype(vocab_size, config['k'], config['draws'])
        todo = [p for p in range(rank, -(-source.n_windows // per_part), world_size) if not os.path.isfile(part_path(folder, p))]
        n_tokens = source.n_windows * config['block_size']
        if rank == 0:
            print(f'{folder}: {n_tokens:,} tokens x {record.itemsize} bytes = {n_tokens * record.itemsize / 2**30:,.2f} GiB')
        windows = {part: range(part * per_part, min((part + 1) * per_part, source.n_windows)) for part in todo}
        with tqdm(total=sum(map(len, windows.values())) * config['block_size'], unit='tok', unit_scale=True, desc=source.name, disable=rank > 0) as bar:
            for part in todo:
                write_part(part_path(folder, part), windows[part], source, teacher, bos_id, record, config, part, device, bar)


def begin(folder, about, rank):
    """Writes cache.json, or compares it with what is there."""
    path = os.path.join(folder, 'cache.json')
    if os.path.isfile(path):
        with open(path, encoding='utf-8') as f:
            there = json.load(f)
        changed = [key for key in about if key != 'teacher' and there.get(key) != about[key]]
        if changed:
            raise BadInput(f'{folder} holds a cache that was made otherwise ({changed[0]}: {there.get(changed[0])!r}, now {about[changed[0]]!r}). '
                           'Give --name another name, or delete it.')
        return
    os.makedirs(folder, exist_ok=True)
    with open(f'{path}.{rank}.tmp', 'w', encoding='utf-8') as f:
        json.dump(about, f, indent=1)
    os.replace(f'{path}.{rank}.tmp', path)


def write_part(path, windows, source, teacher, bos_id, record, config, part, device, bar):
    """One file, by way of a temporary name: all or nothing."""
    generator = torch.Generator(device).manual_seed(int(derive_keys(1, config['seed'], source.name, part)[0] >> 1))
    beyond = 0.0
    try:
        with open(f'{path}.tmp', 'wb') as f:
            for start in range(0, len(windows), config['batch_size']):
                part_rows = windows[start:start + config['batch_size']]
                rows = np.empty((len(part_rows), config['block_size'] + 1), dtype=np.int32)
                for row, window in zip(rows, part_rows):
                    source.read_window(window, row)
                source.check_ids(rows)
                inputs, targets, doc_ids = batch_of(torch.from_numpy(rows).to(device), bos_id)
                with torch.no_grad():
                    h = teacher(inputs, doc_ids).flatten(0, 1)
                records, sums = records_of(h, teacher.output_weight, targets.flatten(), record, config['temperature'], generator)
                f.write(records.tobytes())
                beyond = beyond + sums
                bar.update(inputs.numel())
            f.flush()
            os.fsync(f.fileno())
        with open(path.removesuffix('.kd') + '.npy', 'wb') as f:
            np.save(f, beyond)
    except OSError as error:
        if os.path.exists(f'{path}.tmp'):
            os.remove(f'{path}.tmp')
        raise RunFault(f'{path} could not be written ({error.strerror}); the parts before it are complete. Free some space and run again.') from error
    os.replace(f'{path}.tmp', path)


# -- reading -----------------------------------------------------------------------------------------------------------

class Cache:
    """The cache of one source, memory-mapped."""

    def __init__(self, folder, about):
        self.folder, self.about = folder, about
        self.record = record_dtype(about['vocab_size'], about['k'], about['draws'])
        self.block_size, self.rest = about['block_size'], None

    def read_rest(self, n_parts):
        """Sets `rest`, the mean distribution beyond the k likeliest as log-probabilities (V,) fp32, of up to 64 parts."""
        parts = np.unique(np.linspace(0, n_parts - 1, min(n_parts, 64)).astype(int))
        total = sum(np.load(part_path(self.folder, p).removesuffix('.kd') + '.npy') for p in parts)
        total = total + max(total.sum(), 1e-9) * 1e-4 / len(total)          # a token that never came is not impossible
        self.rest = torch.from_numpy(np.log(total / total.sum())).float()

    def window(self, number):
        """Records of a window: (block_size,) of `record`."""
        part, at = divmod(number, part_windows(self.block_size))
        return open_part(part_path(self.folder, part), self.record)[at * self.block_size:(at + 1) * self.block_size]


@functools.lru_cache(maxsize=64)
def open_part(path, record):
    return np.memmap(path, dtype=record, mode='r')


def open_caches(config, sources, about, vocab_size):
    """source -> Cache for a run (train.py's config) on these Sources. about: hf.find_model of `teacher`, None when the run names none.

    BadInput when one is missing, cut off, of other rows, of another teacher or temperature, or cannot serve the divergence.
    """
    caches = {}
    for source in sources:
        folder = os.path.join(config['data_dir'], source.name, 'kd', config['kd_cache'])
        again = f"Run `kd.py cache --source={source.name} --name={config['kd_cache']}` with the knobs of this run."
        if not os.path.isfile(os.path.join(folder, 'cache.json')):
            raise BadInput(f"source '{source.name}': {folder} holds no cache of a teacher. {again}")
        with open(os.path.join(folder, 'cache.json'), encoding='utf-8') as f:
            there = json.load(f)
        here = dict(vocab_size=vocab_size, temperature=config['kd_temperature'], **rows_of(source, config))
        for what, value in here.items():
            if there[what] != value:
                raise BadInput(f"source '{source.name}': the cache in {folder} was made for {what} = {there[what]!r}, this run has {value!r}. {again}")
        if about is not None and there['weights'] != weights_fingerprint(about):
            raise BadInput(f"source '{source.name}': the cache in {folder} was made by another teacher ({there['teacher']}, {there['weights']}) than "
                           f"teacher = '{config['teacher']}' ({weights_fingerprint(about)}). {again}")
        if not there['k'] and config['kd_divergence'] != 'forward':
            raise BadInput(f"source '{source.name}': the cache in {folder} holds draws only, from which kd_divergence = '{config['kd_divergence']}' cannot be "
                           'told, but the forward one. Make one with --k=64.')
        cache = caches[source.name] = Cache(folder, there)
        per_part = part_windows(source.block_size)
        n_parts = -(-source.n_windows // per_part)
        for part in range(n_parts):
            path, n = part_path(folder, part), min(per_part, source.n_windows - part * per_part) * source.block_size
            if not os.path.isfile(path):
                raise BadInput(f"source '{source.name}': {path} is missing, the cache is half made. {again} It goes on where it stopped.")
            if os.path.getsize(path) != n * cache.record.itemsize:
                raise BadInput(f'{path} has {os.path.getsize(path):,} bytes, not {n * cache.record.itemsize:,}: cut off or damaged. Delete it. {again}')
        if not there['draws'] or config['kd_divergence'] != 'forward':
            cache.read_rest(n_parts)
    if len({c.record for c in caches.values()}) > 1:
        raise BadInput(f"kd_cache = '{config['kd_cache']}': the caches of these sources differ in k or draws. Make them alike.")
    return caches

