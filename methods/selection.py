"""Selection of rows by influence: their scores, what the scores are compared with, and keep masks.

MobileLLM-R1 (arXiv:2509.24945), section 6. A row is kept when its influence per token, in units of
the probe's own help, exceeds a margin times the median over probe rows that the direction has not
seen. The sign alone (margin 0, the paper's rule) does not filter noise: a model that was trained on
clean text finds nearly all random rows helpful. Hence the margin and two guards, on the loss and on
the share of different tokens in a row. Each guard is four standard deviations of the same probe
rows wide.

Scores of a full source (`tools/influence_tables.py score`) are stored beside its shards in
data/<source>/<scores>/. scores.json records how they were made. part_000000.npy and so on hold
(rows, 3) float32: influence per token, loss in nats per token, share of different tokens.
part_000000.json holds the sha256 of a part and is written last.
"""
import io
import os
from dataclasses import dataclass, fields

import numpy as np
import torch
from tqdm import tqdm

from configurator import BadInput, RunFault, at_least, between, one_of, read_json
from data import token_ids
from influence import row_influence
from kd import tokenizer_of
from lib import parts
from lib.parallel import sum_numbers

PART_ROWS = 4096        # rows of a part. A killed scoring continues at the first missing part
MADE = dict(            # fields of scores.json that reading needs
    windows=int, block_size=int, shards=str, tokenizer=str | None, weights=str, reference=dict)


@dataclass
class SelectionConfig:
    """Knobs of the selection of rows."""
    select: one_of('none', 'online', 'scores') = 'none'     # drop rows of low influence. online: by
                                # the current model. scores: by files
    select_scores: str = 'scores'       # select='scores': folder of the scores in every source's,
                                # written by tools/influence_tables.py score
    select_margin: at_least(0.0) = 0.1          # rows below this share of the probe rows'
                                # median influence are dropped. 0: the paper's rule
    select_keep: between(0.01, 1.0) = 0.1       # share of a source's rows that is kept in any case


@dataclass
class Reference:
    """What probe rows that the direction has not seen are like."""
    influence: float            # their median per token
    max_loss: float             # mean and four standard deviations, nats per token
    min_different: float        # share of different tokens: mean - four standard deviations
    max_different: float        # mean + four standard deviations
    n_rows: int


def different_tokens(rows):
    """Share of different tokens in every row: (n, T) ints -> (n,) float64."""
    ordered = np.sort(token_ids(rows), axis=1)
    return (1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)) / rows.shape[1]


def score_rows(model, feeder, source, cursors, direction):
    """Scores of the rows of a source that cursors name: (n, 3) float64 on every rank.

    The columns are influence per token, nats per token and share of different tokens. Ranks share
    the work. Rows beyond the end are repeated and ignored.
    """
    n_rows = len(cursors)
    scores = np.zeros((n_rows, 3))
    for mine in feeder.deal(n_rows, feeder.batch_size):
        rows = source.rows([cursors[min(i, n_rows - 1)] for i in mine.tolist()])
        batch = feeder.put(rows)
        influence, losses = row_influence(model, batch, direction)
        # A row without a supervised token gets 0 instead of nan.
        n_valid = (batch[1] >= 0).sum(1).clamp(min=1)
        found = torch.stack((influence / n_valid, losses.sum(1) / n_valid), 1).cpu().numpy()
        here = mine[mine < n_rows]
        scores[here] = np.column_stack((found, different_tokens(rows)))[:len(here)]
    return np.array(sum_numbers(scores.flatten(), model.layout)).reshape(-1, 3)


def reference_of(scores):
    """Makes a `Reference` from the scores (n, 3) of probe rows.

    Raises BadInput when their influence is not positive, because nothing can be compared with it.
    """
    # A few extreme probe rows would move a mean, and with it the margin of all sources.
    median = float(np.median(scores[:, 0]))
    _, mean_loss, mean_different = scores.mean(0).tolist()
    _, loss_deviation, different_deviation = scores.std(0, ddof=1).tolist()
    if not median > 0:
        raise BadInput(
            f'selection: the median influence of {len(scores)} probe rows that the direction has '
            f'not seen is {median:.3g}. It must be above 0 to compare other rows with it. Raise '
            'probe_rows, or make the probe set larger.')
    return Reference(
        influence=median, max_loss=mean_loss + 4 * loss_deviation,
        min_different=mean_different - 4 * different_deviation,
        max_different=mean_different + 4 * different_deviation, n_rows=len(scores))


def judge(scores, reference, margin, keep_min):
    """Which rows to keep, and why the others are dropped.

    scores (n, 3); keep_min: share of the rows that is kept in any case: those of highest influence,
    first of all those that pass the guards.
    Returns (keep (n,) bool, dict(influence=, loss=, tokens=) of shares). A row may count for
    several.
    """
    weak = scores[:, 0] <= margin * reference.influence
    lossy = scores[:, 1] > reference.max_loss
    odd = (scores[:, 2] < reference.min_different) | (scores[:, 2] > reference.max_different)
    keep = ~(weak | lossy | odd)
    # Without this floor, choose_next would never end on a source of which no row helps.
    fewest = int(np.ceil(keep_min * len(scores)))
    if keep.sum() < fewest:
        keep = np.zeros(len(scores), dtype=bool)
        # np.lexsort sorts by its last key first, so rows that fail a guard come last.
        keep[np.lexsort((-scores[:, 0], lossy | odd))[:fewest]] = True
    reasons = dict(
        influence=float(weak.mean()), loss=float(lossy.mean()), tokens=float(odd.mean()))
    return keep, reasons


def choose_next(score, first, n_rows, reference, config):
    """Judges the rows from cursor `first` on until n_rows of them are kept.

    score(cursors) gives the scores of rows; config: the knobs select_margin and select_keep
    Returns (keep (n,) bool, reasons as `judge`, scores (n, 3)).
    """
    scores = score(range(first, first + n_rows))
    while True:
        keep, reasons = judge(scores, reference, config['select_margin'], config['select_keep'])
        missing = n_rows - int(keep.sum())
        if missing <= 0:
            return keep, reasons, scores
        # The 0.05 limits a request to 20 times the missing rows, whatever the last share was.
        more = int(np.ceil(missing / max(keep.mean(), 0.05)))
        start = first + len(scores)
        scores = np.concatenate((scores, score(range(start, start + more))))


# -- scores of a full source, on disk --------------------------------------------------------------


def scores_fault(scores):
    """What is wrong with scores (n, 3), as half a sentence. '' if rows can have them."""
    # Zeros, such as a disk may leave after a crash, are no share of different tokens.
    is_possible = (scores[:, 1] >= 0) & (scores[:, 2] > 0) & (scores[:, 2] <= 1)
    if is_possible.all():
        return ''
    row = int(np.argmin(is_possible))
    return f'row {row} holds {scores[row].tolist()}, which are no scores'


def rows_in(part, n_windows):
    return min(PART_ROWS, n_windows - part * PART_ROWS)


def read_part(folder, part, n_windows, needs_hash=True):
    """Reads the scores (n, 3) float32 of a part. n_windows: of the full source.

    needs_hash=False: also without the file that records its sha256. Raises BadInput when the part
    is missing or damaged.
    """
    stem = parts.stem_of(folder, part)
    hint = f'Delete {stem}.* and run tools/influence_tables.py score again: it makes this part.'
    if needs_hash and (fault := parts.fault_of(stem, ('.npy',), with_hashes=True)):
        raise BadInput(f'{fault}. {hint}')
    shape = (rows_in(part, n_windows), 3)
    scores = parts.read_array(stem + '.npy', np.float32, shape, hint)
    if fault := scores_fault(scores):
        raise BadInput(f'{stem}.npy: {fault}. {hint}')
    return scores


def is_written(folder, part, n_windows, rank):
    """Whether a part is there and intact. Records the sha256 of one that a version without wrote.
    """
    stem = parts.stem_of(folder, part)
    is_older = not os.path.exists(stem + '.json') and os.path.isfile(stem + '.npy')
    try:
        read_part(folder, part, n_windows, needs_hash=not is_older)
    except BadInput:
        return False
    if is_older:
        parts.write_json(stem + '.json', {'.npy': parts.describe(stem + '.npy')}, rank)
    return True


def lock_scores(folder, rank):
    """Takes the lock of this rank in a folder of scores: a file, to be closed at the end.

    Raises BadInput when the folder holds something else.
    """
    others = []
    if os.path.isdir(folder):
        for name in sorted(os.listdir(folder)):
            if not name.startswith(('scores.json', 'part_', '.lock_')):
                others.append(name)
    if others:
        raise BadInput(
            f'{folder} holds {others[0]}, so it is no folder of scores. Give --scores another '
            'name.')
    return parts.lock(folder, rank)


def begin_scores(folder, about, rank):
    """Writes scores.json, or raises BadInput if the folder holds other scores."""
    path = os.path.join(folder, 'scores.json')
    if os.path.exists(path):
        before = read_json(path)
        parts.check_fields(before, {}, path, f'Delete {folder} and score again.')
        # An older version did not record these two. The path and step of the model have to agree.
        missing = [key for key in ('weights', 'tokenizer') if key not in before]
        # The reference is measured again, and its last digits may differ between machines.
        differing = []
        for key, value in about.items():
            if key != 'reference' and key not in missing and before.get(key) != value:
                differing.append(key)
        if differing:
            key = differing[0]
            raise BadInput(
                f'{folder} holds scores that were made with other settings '
                f'({", ".join(differing)}: {before.get(key)!r}, now {about[key]!r}). Give --scores '
                'another name, or delete it.')
        if not missing:
            return
        about = {**before, **{key: about[key] for key in missing}}
        print(f'{path} is of an older version and records {" and ".join(missing)} now')
    parts.write_json(path, about, rank)


def write_scores(folder, about, source, score, run):
    """Scores every window of a source into a folder, this rank's parts of it.

    about           JSON-able dict: how the scores are made
    score(cursors)  gives the scores of rows
    Parts that are there are kept. Row i of the parts is window i of the shards, in their order. The
    caller holds the lock of the folder.
    Raises BadInput when the folder holds scores that were made in another way, and RunFault for
    scores that are not finite.
    """
    about = {**about, 'windows': source.n_windows, 'tokenizer': tokenizer_of(source)}
    begin_scores(folder, about, run.rank)
    n_parts = -(-source.n_windows // PART_ROWS)
    todo = []
    for part in range(run.rank, n_parts, run.world_size):
        if not is_written(folder, part, source.n_windows, run.rank):
            todo.append(part)
    # Scores are stored by window, because the order of cursors depends on the seed of a run.
    # The first epoch has every window once.
    cursor_of = np.empty(source.n_windows, dtype=np.int64)
    windows = [source.window(cursor) for cursor in range(source.n_windows)]
    cursor_of[windows] = np.arange(source.n_windows)
    for part in tqdm(todo, desc=source.name, unit='part', disable=not run.is_master):
        stem = parts.stem_of(folder, part)
        cursors = cursor_of[part * PART_ROWS:(part + 1) * PART_ROWS].tolist()
        scores = score(cursors).astype(np.float32)
        if not np.isfinite(scores).all():
            raise RunFault(
                f'{stem}.npy: {int((~np.isfinite(scores)).any(1).sum())} of {len(scores)} rows '
                'have scores that are not finite. The weights of the model are damaged, or it '
                'needs --dtype=float32.')
        parts.forget(stem)
        content = io.BytesIO()
        np.save(content, scores)
        described = {'.npy': parts.write(stem + '.npy', [content.getvalue()], run.rank)}
        # This comes last, so a part with its .json file is always complete.
        parts.write_json(stem + '.json', described, run.rank)


def read_made(folder, hint):
    """Reads scores.json: (content, Reference). Raises BadInput when it is damaged."""
    path = os.path.join(folder, 'scores.json')
    about = read_json(path)
    parts.check_fields(about, MADE, path, hint)
    numbers = {f.name: int if f.type is int else int | float for f in fields(Reference)}
    parts.check_fields(about['reference'], numbers, f'{path}: reference', hint)
    reference = Reference(**{name: about['reference'][name] for name in numbers})
    if about['windows'] < 1 or not reference.influence > 0:
        raise BadInput(f'{path} holds a number that is not possible. {hint}')
    return about, reference


def read_scores(folder, source):
    """Reads (scores (windows, 3) float32, Reference, scores.json) of a source.

    Raises BadInput when they are missing, half made, damaged or belong to other rows.
    """
    hint = f'Run tools/influence_tables.py score --sources={source.name} again.'
    if not os.path.isfile(os.path.join(folder, 'scores.json')):
        raise BadInput(f"source '{source.name}': {folder} holds no scores. {hint}")
    about, reference = read_made(folder, hint)
    here = dict(
        block_size=source.block_size, windows=source.n_windows, shards=source.fingerprint(),
        tokenizer=tokenizer_of(source))
    for what, value in here.items():
        if about[what] != value:
            raise BadInput(
                f"source '{source.name}': the scores in {folder} belong to other rows ({what} "
                f'{about[what]}, here {value}). {hint}')
    n_parts = -(-source.n_windows // PART_ROWS)
    there = parts.numbers_in(folder, '.npy')
    missing = sorted(set(range(n_parts)) - set(there))
    if missing:
        raise BadInput(
            f"source '{source.name}': {len(missing)} of {n_parts} parts of its scores are "
            f'missing ({parts.stem_of(folder, missing[0])}.npy). {hint}')
    if len(there) > n_parts:
        raise BadInput(
            f"source '{source.name}': {parts.stem_of(folder, there[-1])}.npy does not belong to "
            f'scores of {n_parts} parts. Delete {folder}. {hint}')
    scores = np.concatenate(
        [read_part(folder, part, source.n_windows) for part in range(n_parts)])
    return scores, reference, about


def check_scores(folder):
    """Reads all scores in a folder. Returns what is wrong with them, a list of sentences."""
    try:
        about, _ = read_made(folder, 'Delete the folder and score again.')
    except BadInput as error:
        return [str(error)]
    n_parts = -(-about['windows'] // PART_ROWS)
    there = parts.numbers_in(folder, '.npy')
    faults = []
    if n_missing := n_parts - sum(part < n_parts for part in there):
        faults.append(
            f'{folder}: {n_missing} of {n_parts} parts are missing. Run tools/influence_tables.py '
            'score again with the same knobs: it continues.')
    for part in there:
        if part >= n_parts:
            faults.append(
                f'{parts.stem_of(folder, part)}.npy does not belong to scores of {n_parts} parts. '
                'Delete it.')
            continue
        try:
            read_part(folder, part, about['windows'])
        except BadInput as error:
            faults.append(str(error))
    return faults


def keep_scored(sources, config):
    """Drops the rows of every source that its score files condemn, for the full run.

    Returns the shares that are kept, as metrics.
    """
    kept = {}
    for source in sources:
        folder = os.path.join(config['data_dir'], source.name, config['select_scores'])
        scores, reference, _ = read_scores(folder, source)
        keep, _ = judge(
            scores.astype(np.float64), reference, config['select_margin'], config['select_keep'])
        source.keep_windows(keep)
        kept[f'select/kept_{source.name}'] = float(keep.mean())
    return kept
