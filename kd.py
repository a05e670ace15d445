"""Distillation: the losses, the teacher, and the cache of what a teacher said.

The student learns the teacher's distribution of the next token. The teacher runs beside the
student, or it has run once before and its distributions are read from a cache:

    python train.py ... --teacher=meta-llama/Llama-3.1-8B-Instruct
    python kd.py cache --teacher=out/teacher --source=code,math --name=big
    python train.py ... --sources="{'code': 1.0, 'math': 1.0}" --kd_cache=big

The loss of a token is alpha * T^2 * D(teacher, student) + (1 - alpha) * cross-entropy. D compares
the distributions at temperature T (Hinton et al. 2015, arXiv:1503.02531, section 2). The factor T^2
is there because the gradients of softened logits shrink by it. The loss and its gradient are
computed from hidden states in chunks of tokens, so the logits of neither model are ever held.

The cache of a source is a folder, data/<source>/kd/<name>/:

    cache.json        the teacher, the rows and the settings that it was made with
    part_000000.kd    records of PART_TOKENS tokens, windows in their order in the source
    part_000000.npy   probabilities beyond the k likeliest, summed over them, (V,) float64
    part_000000.json  bytes and sha256 of these two files, written last

A record describes the next token at one position: ids and log-probabilities (fp16) of the k
likeliest, the log of the mass of all others, some ids drawn from them, the sum of q log q, the
likeliest id, and the log-probability of the token that followed. A window has block_size records.
The teacher saw the same context as the student, so a cache fits one block_size, packing and
document_mask. It fits every order of the rows and every mixture. A billion tokens take 458 GB with
k=64, draws=16 and a vocabulary above 65,536, and 296 GB with a smaller one (k=0: 74 and 40 GB).

Letters in shape comments: N tokens, C n_embd, V vocab_size, n tokens of a chunk, S tokens of a
strip of it, K cached ids of a token, M ids drawn from the others.
"""
import contextlib
import hashlib
import io
import math
import os
import sys
from dataclasses import asdict, dataclass

if __name__ == '__main__':
    from configurator import install_hook
    install_hook()      # first: Ctrl-C may come while torch is imported

import fsspec
import numpy as np
import torch
from tqdm import tqdm

from configurator import BadInput, RunFault, at_least, between, configure, one_of, pick, read_json
from data import Source, batch_of, common_tokenizer, derive_keys, put_on
from lib import hf, parallel, parts, storage
from lib.device import device_name, pick_dtype, start_ranks, tune_malloc
from lib.shards import open_file
from model import GPT
from ops import ranks
from ops.attention import check_documents
from ops.kernels import CACHED_MOST, DIVERGENCES, by_triton, cached_gradient_, divergence_gradient_
from ops.loss import ChunkedLoss, chunk_rows, loss_dtypes

PART_TOKENS = 2**21     # tokens of a file; a cache continues at the first part that is missing
LOG_ZERO = -30.0        # stored as the log of zero, which fp16 can hold
ENDINGS = ('.kd', '.npy')       # of the files of a part
MADE = dict(            # fields of cache.json. With draws there are seed and batch_size, too
    teacher=str, weights=str, vocab_size=int, k=int, draws=int, temperature=int | float, dtype=str,
    block_size=int, packing=str, document_mask=bool, overlong=str | None, tokenizer=str | None,
    shards=str, windows=int)


@dataclass
class DistillConfig:
    """Knobs of distillation."""
    kd_cache: str | None = None             # learn from this cache, which `kd.py cache --name=...`
                                            # wrote; `teacher` is only compared with its teacher
    kd_alpha: between(0.0, 1.0) = 1.0       # weight of the distillation loss; the rest is
                                            # cross-entropy
    kd_temperature: between(1e-3, 1e3) = 1.0        # temperature of both distributions; the loss is
                                            # multiplied by its square
    kd_divergence: one_of('forward', 'reverse', 'js') = 'forward'
                                            # forward KL(teacher || student), reverse KL(student ||
                                            # teacher), or js (Jensen-Shannon)


@dataclass
class CacheConfig:
    """Knobs of `kd.py cache`."""
    teacher: str = ''                       # run, checkpoint, Hugging Face folder or hub name
    source: str = ''                        # sources, separated by commas; train/ is cached
    name: str = 'teacher'                   # name of the cache: --kd_cache of train.py
    data_dir: str = 'data'                  # folder of the sources
    block_size: at_least(1) = 2048          # tokens of a row. This and the next three knobs must be
                                            # those of the run that reads the cache
    packing: one_of('window', 'document') = 'window'        # rows are windows or whole documents
    overlong: one_of('truncate', 'drop') = 'truncate'       # documents longer than a row
    document_mask: bool = False             # packing='window': attention stays within documents
    k: at_least(0) = 64                     # likeliest ids stored of every token
    draws: at_least(0) = 16                 # ids drawn from all others. 0: these are known only by
                                            # their mean over the source
    temperature: between(1e-3, 1e3) = 1.0   # kd_temperature of the run that reads the cache
    seed: at_least(0) = 1337                # seed of the draws
    batch_size: at_least(1) = 4             # rows that the teacher reads at once
    device: one_of('auto', 'cpu', 'cuda') = 'auto'
    dtype: one_of('auto', 'float32', 'bfloat16') = 'auto'       # dtype of the teacher


# -- divergences -----------------------------------------------------------------------------------


def divergence(lp, lq, kind):
    """D (S, 1) in nats, and its gradient (S, V) by the student's softened logits.

    lp, lq  (S, V) log-probabilities of student and teacher
    """
    # The gradient is c - p * sum(c), where c is dD / dlp as if the entries of lp were independent.
    p = lp.exp()
    if kind == 'forward':       # KL(q || p), c = -q
        q = lq.exp()
        return (q * (lq - lp)).sum(1, keepdim=True), p.sub_(q)
    if kind == 'reverse':       # KL(p || q), c = p * (lp - lq + 1)
        gap = lp - lq
        d = (p * gap).sum(1, keepdim=True)
        return d, (p * (gap + 1)).sub_(p * (d + 1))
    # js: the mean of KL(q || m) and KL(p || m) with m = (p + q) / 2
    lm = torch.logaddexp(lp, lq) - math.log(2)
    c = p * (0.5 * (lp - lm))
    d = (c + 0.5 * lq.exp() * (lq - lm)).sum(1, keepdim=True)
    return d, c.sub_(p * c.sum(1, keepdim=True))


@dataclass
class Cached:
    """What a cache holds of N tokens, at the temperature it was made with, on the device."""
    ids: torch.Tensor               # (N, K) int64, the likeliest tokens. K may be 0
    logq: torch.Tensor              # (N, K) fp32, their log-probabilities
    tail: torch.Tensor              # (N,) fp32, log of the mass of all other tokens
    drawn: torch.Tensor             # (N, M) int64, tokens drawn from those others. M may be 0
    negentropy: torch.Tensor        # (N,) fp32, sum of q log q
    top: torch.Tensor               # (N,) int64, the likeliest token
    target_logq: torch.Tensor       # (N,) fp32, log-probability of the next token at temperature 1
    source: torch.Tensor            # (N,) int64, row of `rest` that belongs to the token's source
    rest: torch.Tensor | None       # (sources, V) fp32, log of the mean distribution of the other
                                    # tokens of every source, or None if it is not needed

    def part(self, rows):
        """The same of some tokens. rows: a slice, or positions (n,) int64."""
        *tokens, rest = vars(self).values()
        return Cached(*[t[rows] for t in tokens], rest)

    def mass(self):
        """Log-probabilities (N, K + 1) of the ids and of all others together."""
        # They are normalised again, because fp16 has rounded them.
        return torch.log_softmax(torch.cat((self.logq, self.tail[:, None]), 1), 1)

    def outcomes(self):
        """The ids that a record names, and their probabilities: (N, K + M) each."""
        mass = self.mass().exp()
        M = self.drawn.shape[1]
        # Each drawn id gets an M-th of the mass of the others.
        per_draw = (mass[:, -1:] / M).expand(-1, M)
        return torch.cat((self.ids, self.drawn), 1), torch.cat((mass[:, :-1], per_draw), 1)


def against_cache(lp, cached, kind):
    """As `divergence`, with a cache in place of the teacher's log-probabilities."""
    # A cache is in fp32. Operations in place need the dtype of the student's numbers.
    if kind == 'forward' and cached.drawn.shape[1]:
        # Draws make the divergence and its gradient right on average.
        ids, q = cached.outcomes()
        q = q.to(lp.dtype)
        d = cached.negentropy[:, None] - (q * lp.gather(1, ids)).sum(1, keepdim=True)
        return d, lp.exp().scatter_add_(1, ids, -q)
    # The other divergences need a probability of every token. Beyond the K likeliest the mass is
    # spread like the mean of the source, which loses how it depends on the context. Spread like
    # the student's own distribution it would teach nothing there, which cost far more.
    mass = cached.mass().to(lp.dtype)
    lq = cached.rest[cached.source].to(lp.dtype)                                      # (S, V)
    covered = lq.gather(1, cached.ids).exp().sum(1, keepdim=True).clamp(max=1 - 1e-6)
    lq = lq + (mass[:, -1:] - torch.log1p(-covered))
    lq.scatter_(1, cached.ids, mass[:, :-1])
    d, gradient = divergence(lp, lq, kind)
    if kind == 'forward':       # with the teacher's exact entropy
        d = cached.negentropy[:, None] - (lq.exp_() * lp).sum(1, keepdim=True)
    return d, gradient


# -- the loss --------------------------------------------------------------------------------------


def kd_chunk_rows(n_rows, vocab_size, device, dtype):
    """Rows of a chunk, at most half of `chunk_rows`: the logits of two models are held at once."""
    most = max(1, chunk_rows(n_rows, vocab_size, device, dtype) // 2)
    return min(most, max(64, n_rows * 4 // (32 * dtype.itemsize)))


def strip_gradient(z, y, target, alpha, temperature, kind):
    """Loss and gradient of a few tokens.

    z       (S, V) the student's logits
    y       (S, V) the teacher's logits, or Cached of S tokens
    target  (S, 1) int64 next tokens
    Returns (gradient of the loss by z (S, V), found (5, S) as in `distillation_loss`).
    """
    largest, top = z.max(1, keepdim=True)
    hit = z.gather(1, target) == largest                           # a tie counts as a hit
    lp = torch.log_softmax(z / temperature, 1)
    lp1 = lp if temperature == 1 else torch.log_softmax(z, 1)
    loss = -lp1.gather(1, target)
    if isinstance(y, Cached):
        teacher_loss = -y.target_logq[:, None]
        agrees = top == y.top[:, None]
        d, gradient = against_cache(lp, y, kind)
    else:
        teacher_loss = y.logsumexp(1, keepdim=True) - y.gather(1, target)
        agrees = y.gather(1, top) == y.amax(1, keepdim=True)
        d, gradient = divergence(lp, torch.log_softmax(y / temperature, 1), kind)
    # T^2 of the loss times the 1 / T by which the logits were divided.
    gradient.mul_(alpha * temperature)
    if alpha < 1:
        gradient.add_(lp1.exp(), alpha=1 - alpha)
        gradient.scatter_add_(1, target, torch.full_like(loss, alpha - 1))
    return gradient, torch.cat((d, loss, hit, teacher_loss, agrees), 1).T


def chunk_gradient_(logits, theirs, targets, alpha, temperature, kind):
    """Turns a chunk of the student's logits (n, V) into the gradient of its losses, in place.

    theirs  the teacher's logits (n, V), or Cached of n tokens
    Returns found (5, n) as in `distillation_loss`.
    """
    n, V = logits.shape
    high = torch.promote_types(logits.dtype, torch.float32)
    found = torch.empty(5, n, dtype=high, device=logits.device)
    is_cached = isinstance(theirs, Cached)
    if by_triton(logits) and not is_cached:
        kind = DIVERGENCES.index(kind)
        divergence_gradient_(logits, theirs, targets, found, alpha, temperature, kind)
        return found
    n_drawn = theirs.drawn.shape[1] if is_cached else 0
    if by_triton(logits) and kind == 'forward' and 0 < n_drawn <= CACHED_MOST - theirs.ids.shape[1]:
        top = torch.empty(n, dtype=torch.int32, device=logits.device)
        ids, q = theirs.outcomes()
        cached_gradient_(logits, ids, q, targets, found, top, alpha, temperature)
        found[0] = theirs.negentropy - found[0]
        found[3] = -theirs.target_logq
        found[4] = top == theirs.top
        return found
    # Here: the CPU, caches without draws, and other divergences from a cache. Several fp32 copies
    # of a strip are made, so on the CPU a strip is small enough for the processor's cache.
    strip = max(1, (2**22 if logits.is_cuda else 2**20) // V)
    for i in range(0, n, strip):
        here = slice(i, min(i + strip, n))
        y = theirs.part(here) if is_cached else theirs[here].to(high)
        logits[here], found[:, here] = strip_gradient(
            logits[here].to(high), y, targets[here, None], alpha, temperature, kind)
    return found


def distillation_loss(
    h, weight, targets, token_weights=None, *, teacher, alpha=1.0, temperature=1.0, kind='forward',
):
    """Sum of alpha * T^2 * D + (1 - alpha) * cross-entropy over tokens, with weights.

    h, weight      (N, C) and (V, C) of the student, any float dtype
    targets        (N,) int64, -1 where the loss ignores the token
    token_weights  (N,) or None: ones
    teacher        (hidden states (N, C_t), output weight (V, C_t)) of a teacher with the same
                   vocabulary, or Cached of these tokens
    Returns (sum () fp32, found (5, N) fp32). found holds D in nats, the student's cross-entropy and
    hit, the teacher's cross-entropy, and whether their arg-max agree; 0 at ignored tokens. Only
    `sum` carries gradients (see `ChunkedLoss`).
    """
    N = len(h)
    V = len(weight)
    dtype, high = loss_dtypes(h)
    rows = kd_chunk_rows(N, V, h.device, dtype)
    found = torch.empty(5, N, dtype=high, device=h.device)
    is_cached = isinstance(teacher, Cached)
    if not is_cached:
        teacher_h, teacher_weight = teacher
        buffer = torch.empty(rows, V, dtype=teacher_h.dtype, device=h.device)

    def chunk_losses(logits, targets, chunk, _needs_gradient):
        if is_cached:
            theirs = teacher.part(chunk)
        else:
            theirs = buffer[:len(logits)]
            torch.mm(teacher_h[chunk], teacher_weight.T, out=theirs)                  # (n, V)
        part = chunk_gradient_(logits, theirs, targets, alpha, temperature, kind)     # (5, n)
        found[:, chunk] = part
        return alpha * temperature**2 * part[0] + (1 - alpha) * part[1], 1.0

    total, _ = ChunkedLoss.apply(h, weight, (targets, token_weights), chunk_losses, rows, None)
    return total, found.masked_fill_(targets < 0, 0)


# -- the teacher -----------------------------------------------------------------------------------


def find_teacher(path, vocab_size, tokenizer, knob='teacher'):
    """Returns hf.find_model of a teacher, or of another model that the knob `knob` names.

    vocab_size  rows of the student's embedding table
    tokenizer   tokenizer of the shards as meta.json records it, or None if it is unknown
    Raises BadInput if the model's tokenizer or vocabulary differs from the student's.
    """
    about = hf.find_model(path)
    check_teacher(about, path, vocab_size, tokenizer, knob)
    return about


def check_teacher(about, path, vocab_size, tokenizer, knob='teacher'):
    """Raises BadInput if the model hf.find_model(path) does not fit, see `find_teacher`."""
    if tokenizer is not None and about['fingerprint'] not in (None, tokenizer['fingerprint']):
        found = about['tokenizer']
        theirs = path if isinstance(found, BadInput) else found.path
        raise BadInput(
            f"{knob} = '{path}' has the tokenizer {theirs} ({about['fingerprint']}), the shards "
            f"have {tokenizer['name']} ({tokenizer['fingerprint']}): the two must have the same. "
            'Prepare the sources with its tokenizer, or take another model.')
    rows = about['model'].vocab_size
    if rows != vocab_size:
        raise BadInput(
            f"{knob} = '{path}' has a vocabulary of {rows:,} rows, this run of {vocab_size:,}. "
            f'Set vocab_size = {rows}, or take another model.')


def weights_fingerprint(about):
    """16 hex digits that identify a model's weights."""
    # Reading all of a large model takes minutes, so three pieces of every file are hashed.
    fields = asdict(about['model'])
    if fields['nope_layers'] is None:
        del fields['nope_layers']       # caches that are older than this field stay valid
    digest = hashlib.sha256(repr(sorted(fields.items())).encode())
    folder = about['checkpoint'] or about['folder']
    for name in sorted(storage.names(folder)):
        if not name.endswith(('.distcp', '.safetensors')):
            continue
        with fsspec.open(os.path.join(folder, name), 'rb') as f:
            size = f.seek(0, os.SEEK_END)
            digest.update(f'{name} {size}'.encode())
            for at in (0, size // 2, max(0, size - 2**16)):
                f.seek(at)
                digest.update(f.read(2**16))
    return digest.hexdigest()[:16]


def open_teacher(about, device, dtype, layout=None, compile_blocks=False):
    """The frozen teacher in `dtype`, distributed over `layout` like the student (None: not at all).

    about  from `find_teacher`
    Raises BadInput if it cannot be divided like that.
    """
    if layout is not None:
        sizes = dict(layout.sizes)
        if not about['model'].n_expert:
            sizes['ep'] = 1
        ranks.check_sizes(sizes, about['model'], whose='the teacher: ')
    with torch.device('meta'):
        model = GPT(about['model']).frozen(dtype)
    parallel.apply_parallelism(model, layout, dtype, compile_blocks)
    model.to_empty(device=device)
    hf.load_weights(about, model)
    return model.eval()


# -- files of a cache ------------------------------------------------------------------------------


def record_dtype(vocab_size, k, draws):
    """The record of a position: 6 k + 4 draws + 10 bytes, or 4 k + 2 draws + 8 with short ids."""
    token = np.dtype('<u4') if vocab_size > 2**16 else np.dtype('<u2')
    return np.dtype([
        ('ids', token, (k,)), ('logq', '<f2', (k,)), ('drawn', token, (draws,)), ('tail', '<f2'),
        ('negentropy', '<f2'), ('target', '<f2'), ('top', token)])


def parts_of(source):
    """The windows of every part of a source's cache: list of range."""
    n = source.n_windows
    step = max(1, PART_TOKENS // source.block_size)
    return [range(start, min(start + step, n)) for start in range(0, n, step)]


def tokenizer_of(source):
    """Fingerprint of the tokenizer of a source's shards. None: unknown."""
    return source.meta['tokenizer']['fingerprint'] if source.meta else None


def rows_of(source, config):
    """What the rows of a source depend on. config: the knobs of train.py or CacheConfig, a dict."""
    is_packed = config['packing'] == 'document'
    return dict(
        block_size=config['block_size'], packing=config['packing'],
        document_mask=config['document_mask'] or is_packed,
        overlong=config['overlong'] if is_packed else None,
        tokenizer=tokenizer_of(source),
        shards=source.fingerprint(), windows=source.n_windows)


def source_names(text, knob):
    """The names in a knob that lists sources with commas.

    Raises BadInput for an empty name, or for one that is there twice.
    """
    names = [name.strip() for name in text.split(',')]
    if '' in names:
        raise BadInput(f"{knob} = '{text}' has an empty name. Give names with a comma in between.")
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"{knob} = '{text}' names '{name}' twice.")
    return names


def records_fault(records, vocab_size):
    """What is wrong with some records, as half a sentence. '' if a teacher can have said them."""
    # Without the k likeliest, zeros would pass the other checks.
    if not np.frombuffer(records.tobytes(), dtype=np.uint8).any():
        return 'it holds nothing but zeros'
    for name in ('ids', 'drawn', 'top'):
        largest = int(records[name].max(initial=0))
        if largest >= vocab_size:
            return f'it holds token id {largest}, and the vocabulary has {vocab_size} tokens'
    for name in ('tail', 'negentropy', 'target'):
        if not np.isfinite(records[name]).all():
            return f'{name} holds a number that is not finite'
    # exp turns -inf, which stands for 0, into a finite number, and leaves nan and inf.
    with np.errstate(over='ignore'):
        mass = np.exp(records['logq'].astype(np.float64)).sum(-1)
        mass = mass + np.exp(records['tail'].astype(np.float64))
    # fp16 rounds a log-probability of 16 by 0.004, so true sums are off by less than that.
    if not (np.abs(mass - 1) < 0.02).all():
        worst = mass[np.argmax(np.abs(mass - 1))]
        return f'the probabilities of a token sum to {worst:.4g}, not to 1'
    if records['negentropy'].max() > 0.02 or records['target'].max() > 0.02:
        return 'it holds the logarithm of a probability above 1'
    return ''


def few_records(path, block_size, record):
    """A few records of a .kd file: of its first, its middle and its last window, and the last."""
    size = os.path.getsize(path) // record.itemsize
    n_windows = size // block_size
    few = min(4, block_size)
    starts = [window * block_size for window in (0, n_windows // 2, n_windows - 1)] + [size - few]
    found = []
    with open(path, 'rb') as f:
        for start in starts:
            f.seek(start * record.itemsize)
            found.append(np.frombuffer(f.read(few * record.itemsize), record))
    return found


def part_fault(stem, n_records, made, with_hashes=False):
    """What is wrong with a part of a cache, as half a sentence. '' for an intact one.

    n_records: what the part must hold; made: content of cache.json; with_hashes: as parts.fault_of
    """
    fault = parts.fault_of(stem, ENDINGS, with_hashes)
    if fault:
        return fault
    record = record_dtype(made['vocab_size'], made['k'], made['draws'])
    path = stem + '.kd'
    n_bytes = n_records * record.itemsize
    if os.path.getsize(path) != n_bytes:
        return f'{path} has {os.path.getsize(path):,} bytes, not {n_bytes:,}'
    for records in few_records(path, made['block_size'], record):
        if fault := records_fault(records, made['vocab_size']):
            return f'{path}: {fault}'
    return ''


def read_made(folder, hint):
    """Reads cache.json. Raises BadInput when it cannot be what `kd.py cache` wrote."""
    path = os.path.join(folder, 'cache.json')
    made = read_json(path)
    parts.check_fields(made, MADE, path, hint)
    is_possible = (
        min(made['vocab_size'], made['block_size'], made['windows']) >= 1
        and 0 <= made['k'] <= made['vocab_size'] and 0 <= made['draws'] <= made['vocab_size']
        and made['temperature'] > 0)
    if not is_possible:
        raise BadInput(f'{path} holds a number that is not possible. {hint}')
    return made


# -- writing a cache -------------------------------------------------------------------------------


@torch.no_grad()
def records_of(h, weight, targets, dtype, temperature, generator):
    """The records of N positions.

    h        (N, C) hidden states of the teacher, weight (V, C) its output weight
    targets  (N,) int64 next tokens. At -1 the record holds the log-probability of token 0
    dtype    from `record_dtype`
    Returns (records (N,), sum of the probabilities beyond the k likeliest (V,) float64).
    """
    k = dtype['ids'].shape[0]
    draws = dtype['drawn'].shape[0]
    records = np.zeros(len(h), dtype)
    beyond = torch.zeros(len(weight), dtype=torch.float64, device=h.device)
    step = max(1, chunk_rows(len(h), len(weight), h.device, torch.float32) // 4)
    for start in range(0, len(h), step):
        here = slice(start, start + step)
        out = records[here]
        y = (h[here] @ weight.T).float()                                              # (n, V)
        lq = torch.log_softmax(y / temperature, 1)
        q = lq.exp()
        target = targets[here, None].clamp(min=0)
        target_logq = torch.log_softmax(y, 1).gather(1, target)[:, 0]
        out['target'] = target_logq.clamp(min=-60000).cpu()
        out['negentropy'] = (q * lq).sum(1).cpu()
        out['top'] = lq.argmax(1).cpu()
        values, ids = lq.topk(k, 1)                                                   # (n, k)
        out['ids'] = ids.cpu()
        out['logq'] = values.cpu()
        # Summing the others is exact where their mass is small. 1 minus the likeliest is not.
        q.scatter_(1, ids, 0)
        beyond += q.sum(0, dtype=torch.float64)
        out['tail'] = q.sum(1).log().clamp(min=LOG_ZERO).cpu()
        if draws:
            q.clamp_(min=1e-30)
            drawn = torch.multinomial(q, draws, replacement=True, generator=generator)
            out['drawn'] = drawn.cpu()
    return records, beyond.cpu().numpy()


def teacher_batches(teacher, source, part, windows, bos_id, config):
    """Runs the teacher over the windows of a part. Yields `records_of` of every batch."""
    device = teacher.output_weight.device
    record = record_dtype(teacher.config.vocab_size, config.k, config.draws)
    # The draws depend on the part, so its bytes are the same on any number of ranks.
    key = derive_keys(1, config.seed, source.name, part)[0]
    generator = torch.Generator(device).manual_seed(int(key >> 1))
    for start in range(0, len(windows), config.batch_size):
        batch = windows[start:start + config.batch_size]
        rows = np.empty((len(batch), config.block_size + 1), dtype=np.int32)
        for i, window in enumerate(batch):
            source.read_window(window, rows[i])
        source.check_ids(rows)
        inputs, targets, doc_ids = batch_of(torch.from_numpy(rows).to(device), bos_id)
        with torch.no_grad():
            h = teacher(inputs, doc_ids).flatten(0, 1)                                # (N, C)
        yield records_of(
            h, teacher.output_weight, targets.flatten(), record, config.temperature, generator)


def write_part(stem, batches, bar, rank):
    """Writes the files of a part from `teacher_batches`."""
    beyond = 0.0

    def pieces():
        nonlocal beyond
        for records, sums in batches:
            if not np.isfinite(records['negentropy']).all():
                raise RunFault(
                    f'{stem}.kd: the teacher gave probabilities that are not finite. Its weights '
                    'are damaged, or --dtype=float32 is needed.')
            yield records.tobytes()
            beyond = beyond + sums
            bar.update(len(records))

    parts.forget(stem)
    described = {'.kd': parts.write(stem + '.kd', pieces(), rank)}
    array = io.BytesIO()
    np.save(array, beyond)
    described['.npy'] = parts.write(stem + '.npy', [array.getvalue()], rank)
    # This comes last, so a part with its .json file is always complete.
    parts.write_json(stem + '.json', described, rank)


def adopt_part(stem, n_records, record, vocab_size, rank):
    """Records the sha256 of a part that a version without them has written.

    All of its records are checked, because two writers could spoil such a part. Returns whether the
    part is intact and need not be made anew.
    """
    n_bytes = n_records * record.itemsize
    if os.path.exists(stem + '.json') or not all(os.path.isfile(stem + e) for e in ENDINGS):
        return False
    if os.path.getsize(stem + '.kd') != n_bytes:
        return False
    step = 2**12                # records; a stretch of so many zeros is no teacher's
    with open(stem + '.kd', 'rb') as f:
        for _ in range(0, n_records, step):
            if records_fault(np.frombuffer(f.read(step * record.itemsize), record), vocab_size):
                return False
    try:
        parts.read_array(stem + '.npy', np.float64, (vocab_size,), '')
    except BadInput:
        return False
    parts.write_json(stem + '.json', {e: parts.describe(stem + e) for e in ENDINGS}, rank)
    print(f'{stem}.kd is of a version that kept no sha256; it is intact, and is recorded now')
    return True


def begin_cache(folder, made, rank):
    """Writes cache.json, or raises BadInput if the folder holds a cache with other settings."""
    path = os.path.join(folder, 'cache.json')
    if os.path.exists(path):
        there = read_json(path)
        parts.check_fields(there, {}, path, f'Delete {folder} and run `kd.py cache` again.')
        for key, value in made.items():
            # An older version did not record the tokenizer. The shards are the same in any case.
            is_older = key == 'tokenizer' and key not in there
            if key != 'teacher' and not is_older and there.get(key) != value:
                raise BadInput(
                    f'{folder} holds a cache that was made with other settings ({key}: '
                    f'{there.get(key)!r}, now {value!r}). Choose another --name, or delete it.')
        if 'tokenizer' in there:
            return
        made = {**there, 'tokenizer': made['tokenizer']}
    parts.write_json(path, made, rank)


def write_caches(config):
    """Writes the caches that a CacheConfig asks for. Each rank makes some of the parts.

    Raises BadInput for settings that do not fit, and while another launch writes the same caches.
    """
    if not config.k and not config.draws:
        raise BadInput('k = 0 and draws = 0 store nothing of the teacher. Set one of them.')
    parts.check_name(config.name, 'name')
    names = source_names(config.source, 'source')
    tune_malloc()
    rank, world_size, device = start_ranks(config.device, join=False)
    dtype, reason = pick_dtype(config.dtype, device)
    about = hf.find_model(config.teacher)
    vocab_size = about['model'].vocab_size
    sources = []
    for name in names:
        sources.append(Source(
            config.data_dir, name, 'train', config.block_size, 0, vocab_size, config.packing,
            config.overlong))
    tokenizer = common_tokenizer(sources)
    check_teacher(about, config.teacher, vocab_size, tokenizer)
    hf.check_context(about, config.block_size)
    for knob in ('k', 'draws'):
        if getattr(config, knob) > vocab_size:
            raise BadInput(
                f"{knob} = {getattr(config, knob)} is more than the teacher's vocabulary of "
                f'{vocab_size}.')
    bos_id = None
    if config.document_mask or config.packing == 'document':
        if tokenizer is None:
            raise BadInput(
                'document_mask needs the beginning-of-document token, and these sources have no '
                'meta.json that names it.')
        bos_id = tokenizer['bos_id']
        check_documents(device, dtype)
    made = dict(
        teacher=config.teacher, weights=weights_fingerprint(about), vocab_size=vocab_size,
        k=config.k, draws=config.draws, temperature=config.temperature, dtype=str(dtype))
    if config.draws:
        made |= dict(seed=config.seed, batch_size=config.batch_size)
    with contextlib.ExitStack() as locks:
        # All locks are taken at once, before the teacher is loaded: a second launch ends here.
        for source in sources:
            folder = cache_folder(config.data_dir, source, config.name)
            locks.enter_context(parts.lock(folder, rank))
            begin_cache(folder, {**made, **rows_of(source, asdict(config))}, rank)
        teacher = open_teacher(about, device, dtype)
        if rank == 0:
            print(
                f'teacher: {config.teacher} in {dtype} ({reason}) on {world_size} x '
                f'{device_name(device)}')
        for source in sources:
            write_cache(source, teacher, bos_id, config, (rank, world_size))


def cache_folder(data_dir, source, name):
    return os.path.join(data_dir, source.name, 'kd', name)


def write_cache(source, teacher, bos_id, config, ranks):
    """Writes this rank's parts of a source's cache. ranks: (rank, world_size)."""
    rank, world_size = ranks
    vocab_size = teacher.config.vocab_size
    record = record_dtype(vocab_size, config.k, config.draws)
    folder = cache_folder(config.data_dir, source, config.name)
    n_tokens = source.n_windows * config.block_size
    if rank == 0:
        gib = n_tokens * record.itemsize / 2**30
        print(f'{folder}: {n_tokens:,} tokens x {record.itemsize} bytes = {gib:,.2f} GiB')
    windows = parts_of(source)
    todo = []
    for part in range(rank, len(windows), world_size):
        stem = parts.stem_of(folder, part)
        n_records = len(windows[part]) * config.block_size
        is_there = not parts.fault_of(stem, ENDINGS)
        if not is_there and not adopt_part(stem, n_records, record, vocab_size, rank):
            todo.append(part)
    total = sum(len(windows[part]) for part in todo) * config.block_size
    bar = tqdm(total=total, unit='tok', unit_scale=True, desc=source.name, disable=rank > 0)
    with bar:
        for part in todo:
            batches = teacher_batches(teacher, source, part, windows[part], bos_id, config)
            write_part(parts.stem_of(folder, part), batches, bar, rank)


# -- reading a cache -------------------------------------------------------------------------------


class Cache:
    """The cache of one source."""

    def __init__(self, config, source, about):
        """Opens and checks the cache of a Source.

        config  train.py's knobs
        about   `find_teacher` of the knob `teacher`, or None
        Raises BadInput if the cache is missing, incomplete or damaged, if it was made from other
        rows, with another teacher or temperature, or if it does not suffice for the divergence.
        Of every part the sizes and a few records are checked, of a sample of parts the sha256.
        """
        self.folder = cache_folder(config['data_dir'], source, config['kd_cache'])
        self.block_size = source.block_size
        whose = f"source '{source.name}': the cache in {self.folder}"
        again = (
            f"Run `kd.py cache --source={source.name} --name={config['kd_cache']}` with the knobs "
            'of this run.')
        if not os.path.isfile(os.path.join(self.folder, 'cache.json')):
            raise BadInput(f'{whose} does not exist. {again}')
        made = read_made(self.folder, f'{again} If that is refused, delete {self.folder} first.')
        needed = dict(
            vocab_size=config['vocab_size'], temperature=config['kd_temperature'],
            **rows_of(source, config))
        for key, value in needed.items():
            if made[key] != value:
                raise BadInput(
                    f'{whose} was made for {key} = {made[key]!r}, this run has {value!r}. {again}')
        weights = made['weights'] if about is None else weights_fingerprint(about)
        if made['weights'] != weights:
            raise BadInput(
                f"{whose} was made by another teacher ({made['teacher']}, {made['weights']}) than "
                f"teacher = '{config['teacher']}' ({weights}). {again}")
        is_forward = config['kd_divergence'] == 'forward'
        if not made['k'] and not is_forward:
            raise BadInput(
                f"{whose} holds draws only, and kd_divergence = '{config['kd_divergence']}' cannot "
                'be computed from draws. Make a cache with --k=64.')
        self.vocab_size = made['vocab_size']
        self.record = record_dtype(made['vocab_size'], made['k'], made['draws'])
        windows = parts_of(source)
        self.part_windows = len(windows[0])
        stems = [parts.stem_of(self.folder, part) for part in range(len(windows))]
        for part, stem in enumerate(stems):
            missing = [e for e in (*ENDINGS, '.json') if not os.path.isfile(stem + e)]
            if missing:
                raise BadInput(
                    f'{whose} is incomplete: {stem + missing[0]} is missing. {again} It continues.')
            fault = part_fault(stem, len(windows[part]) * source.block_size, made)
            if fault:
                raise BadInput(f'{whose} is damaged: {fault}. Delete {stem}.* first. {again}')
        if fault := parts.sample_fault(stems, ENDINGS, config['seed']):
            raise BadInput(f'{whose} is damaged: {fault}. Delete that part first. {again}')
        needs_rest = not is_forward or not made['draws']
        self.rest = self.read_rest(stems) if needs_rest else None

    def read_rest(self, stems):
        """Log of the mean distribution beyond the k likeliest, over up to 64 parts: (V,) fp32."""
        total = 0
        for part in np.unique(np.linspace(0, len(stems) - 1, min(len(stems), 64)).astype(int)):
            path = stems[part] + '.npy'
            hint = f'Delete {stems[part]}.* and run `kd.py cache` again.'
            beyond = parts.read_array(path, np.float64, (self.vocab_size,), hint)
            if beyond.min() < 0:
                raise BadInput(f'{path} holds probabilities below 0. {hint}')
            total = total + beyond
        # A token that never occurred must not be impossible.
        total = total + max(total.sum(), 1e-9) * 1e-4 / len(total)
        return torch.from_numpy(np.log(total / total.sum())).float()

    def read(self, number, out):
        """Copies the records of a window into out (block_size,).

        Raises RunFault if they cannot be read, or hold a token id outside the vocabulary.
        """
        part, at = divmod(number, self.part_windows)
        stem = parts.stem_of(self.folder, part)
        again = f'Delete {stem}.*, run `kd.py cache` again and continue with --resume=True.'
        n_read = os.preadv(open_file(stem + '.kd').fileno(), [out.view(np.uint8)], at * out.nbytes)
        if n_read != out.nbytes:
            raise RunFault(
                f'{stem}.kd was cut off after this run began: window {number} ends after '
                f'{n_read:,} of {out.nbytes:,} bytes. {again}')
        largest = max(int(out[name].max(initial=0)) for name in ('ids', 'drawn', 'top'))
        if largest >= self.vocab_size:
            raise RunFault(
                f'{stem}.kd is damaged: window {number} holds token id {largest}, and the '
                f'vocabulary has {self.vocab_size} tokens. {again}')


def check_cache(folder):
    """Reads all of a cache. Returns what is wrong with it, a list of sentences."""
    try:
        made = read_made(folder, 'Delete the folder and run `kd.py cache` again.')
    except BadInput as error:
        return [str(error)]
    step = max(1, PART_TOKENS // made['block_size'])
    n_parts = -(-made['windows'] // step)
    there = parts.numbers_in(folder, '.kd')
    faults = []
    if n_missing := n_parts - sum(part < n_parts for part in there):
        faults.append(
            f'{folder}: {n_missing} of {n_parts} parts are missing. Run `kd.py cache` again with '
            'the same knobs: it continues.')
    for part in there:
        stem = parts.stem_of(folder, part)
        if part >= n_parts:
            faults.append(f'{stem}.kd does not belong to this cache of {n_parts} parts. Delete it.')
            continue
        n_windows = min(step, made['windows'] - part * step)
        fault = part_fault(stem, n_windows * made['block_size'], made, with_hashes=True)
        if fault:
            faults.append(
                f'{fault}. Delete {stem}.* and run `kd.py cache` again with the same knobs.')
            continue
        try:
            hint = f'Delete {stem}.* and run `kd.py cache` again.'
            parts.read_array(stem + '.npy', np.float64, (made['vocab_size'],), hint)
        except BadInput as error:
            faults.append(str(error))
    return faults


def read_cached(records, source, rest, device):
    """Cached of N tokens.

    records  (N,) of `record_dtype`
    source   (N,) int64, the row of `rest` (sources, V) that belongs to each. rest may be None
    """

    def put(field, dtype):
        return put_on(torch.from_numpy(records[field].astype(dtype)), device)

    return Cached(
        put('ids', np.int64), put('logq', np.float32), put('tail', np.float32),
        put('drawn', np.int64), put('negentropy', np.float32), put('top', np.int64),
        put('target', np.float32), put_on(torch.from_numpy(source), device), rest)


# -- distillation in a run -------------------------------------------------------------------------


@dataclass
class TeacherInfo:
    """The teacher of a run."""
    about: dict | None      # from `find_teacher`, or None if the run names only a cache
    caches: dict            # source name -> Cache. Empty: the teacher runs beside the student


def prepare(config, sources, tokenizer):
    """Finds the teacher of a run and opens its caches: TeacherInfo, or None without distillation.

    config     train.py's knobs
    sources    the Sources that are trained on
    tokenizer  as for `find_teacher`
    Raises BadInput if the teacher or a cache does not fit the run.
    """
    if not config['teacher'] and not config['kd_cache']:
        return None
    about = None
    if config['teacher']:
        about = find_teacher(config['teacher'], config['vocab_size'], tokenizer)
        hf.check_context(about, config['block_size'])
    caches = {}
    if config['kd_cache']:
        caches = {source.name: Cache(config, source, about) for source in sources}
    if len({cache.record for cache in caches.values()}) > 1:
        raise BadInput(
            f"kd_cache = '{config['kd_cache']}': the caches of these sources differ in k or draws. "
            'Make them with the same values.')
    return TeacherInfo(about, caches)


def make_distiller(config, info, sources, run):
    """The Distiller of a run, or None without distillation. Loads a teacher that runs along.

    config   train.py's knobs
    info     from `prepare`
    sources  the loader's Sources, in its order
    run      has the attributes device, dtype, layout and compile_blocks
    """
    return None if info is None else Distiller(config, info, sources, run)


class Distiller:
    """Makes the objective of every micro-batch and sums up what is logged."""

    def __init__(self, config, info, sources, run):
        self.caches = info.caches
        self.cached_sources = list(info.caches)
        self.sources = sources
        self.device = run.device
        self.teacher = None
        if not info.caches:
            self.teacher = open_teacher(
                info.about, run.device, run.dtype, run.layout, run.compile_blocks)
        rests = [cache.rest for cache in info.caches.values() if cache.rest is not None]
        self.rest = torch.stack(rests).to(run.device) if rests else None        # (sources, V)
        self.options = dict(
            alpha=config['kd_alpha'], temperature=config['kd_temperature'],
            kind=config['kd_divergence'])
        # Sums of D, the teacher's loss and agreement. `sums` sets them back to 0.
        self.totals = torch.zeros(3, dtype=torch.float64, device=run.device)

    def objective(self, micro):
        """The loss of a data.MicroBatch, as `GPT.loss` takes it.

        Uses its inputs (B, T), doc_ids (boundaries or None), valid (positions (n,), or None: all),
        source_index (B,) and cursors (B,).
        """
        if self.teacher is None:
            teacher = self.read_caches(micro)
        else:
            teacher = self.run_teacher(micro)

        def loss(h, weight, targets, token_weights):
            total, found = distillation_loss(
                h, weight, targets, token_weights, teacher=teacher, **self.options)
            logged = torch.stack((found[0], found[3], found[4]))                      # (3, N)
            self.totals += logged.sum(1, dtype=torch.float64)
            return total, found[1], found[2].bool()

        return loss

    def read_caches(self, micro):
        length = micro.inputs.shape[1]
        record = next(iter(self.caches.values())).record
        # Every window is read to its place, which saves copies of large records.
        records = np.empty((len(micro.cursors), length), record)
        numbers = []
        for row, index, cursor in zip(records, micro.source_index, micro.cursors, strict=True):
            source = self.sources[index]
            self.caches[source.name].read(source.window(cursor), row)
            numbers.append(self.cached_sources.index(source.name))
        source_of_token = np.repeat(numbers, length)
        cached = read_cached(records.reshape(-1), source_of_token, self.rest, self.device)
        return cached if micro.valid is None else cached.part(micro.valid)

    @torch.no_grad()
    def run_teacher(self, micro):
        # The teacher's weights have the dtype it computes in, so autocast would do nothing useful.
        with torch.autocast(self.device.type, enabled=False):
            hidden = self.teacher(micro.inputs, micro.doc_ids).flatten(0, 1)          # (N, C_t)
        if micro.valid is not None:
            hidden = hidden[micro.valid]
        weight = parallel.full_tensor(self.teacher.output_weight)
        if self.teacher.tp:
            weight = ranks.collect(weight, self.teacher.tp)
        return hidden, weight

    def sums(self):
        """Sums over this rank's valid tokens since the last call: (3,) fp64."""
        sums = self.totals
        self.totals = torch.zeros_like(sums)
        return sums

    def metrics(self, values, n_valid):
        """Metrics of a step. values: `sums`, summed over ranks; n_valid: number of valid tokens."""
        names = ('kd/loss', 'kd/teacher_loss', 'kd/teacher_agreement')
        return {name: value / n_valid for name, value in zip(names, values, strict=False)}


# -- the command line ------------------------------------------------------------------------------

if __name__ == '__main__':
    _is_cache = sys.argv[1:2] == ['cache']
    _asks_help = '--help' in sys.argv or '-h' in sys.argv or len(sys.argv) < 2
    # An unknown command is no config file, as which it would be read here.
    _arguments = ['--help'] if _asks_help else sys.argv[2:] if _is_cache else []
    config = configure(globals(), _arguments, verbose=False, owners=(CacheConfig,))
    if not _is_cache or not config['teacher'] or not config['source']:
        raise BadInput('the command is `kd.py cache --teacher=... --source=...`.')
    write_caches(pick(CacheConfig, config))
