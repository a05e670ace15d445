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
"""
import json
import os
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from configurator import BadInput, between, one_of, read_json
from data import token_ids
from influence import row_influence
from lib.parallel import sum_numbers

PART_ROWS = 4096        # rows of a part. A killed scoring continues at the first missing part


@dataclass
class SelectionConfig:
    """Knobs of the selection of rows."""
    select: one_of('none', 'online', 'scores') = 'none'     # drop rows of low influence. online: by
                                # the current model. scores: by files
    select_scores: str = 'scores'       # select='scores': folder of the scores in every source's,
                                # written by tools/influence_tables.py score
    select_margin: float = 0.1  # rows below this share of the probe rows' median influence are
                                # dropped. 0: the paper's rule
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


def part_path(folder, part):
    return os.path.join(folder, f'part_{part:06d}.npy')


def write_scores(folder, about, source, score, run):
    """Scores every window of a source into a folder, this rank's parts of it.

    about           JSON-able dict: how the scores are made
    score(cursors)  gives the scores of rows
    Parts that are there are kept. Row i of the parts is window i of the shards, in their order.
    Raises BadInput when the folder holds scores that were made in another way.
    """
    path = os.path.join(folder, 'scores.json')
    about = {**about, 'windows': source.n_windows}
    if os.path.isfile(path):
        before = read_json(path)
        # The reference is measured again, and its last digits may differ between machines.
        differing = [k for k in about if k != 'reference' and before.get(k) != about[k]]
        if differing:
            key = differing[0]
            raise BadInput(
                f'{folder} holds scores that were made with other settings '
                f'({", ".join(differing)}: {before.get(key)!r}, now {about[key]!r}). Give --scores '
                'another name, or delete it.')
    else:
        os.makedirs(folder, exist_ok=True)
        temporary = f'{path}.{run.rank}.tmp'
        with open(temporary, 'w', encoding='utf-8') as f:
            json.dump(about, f, indent=1)
        os.replace(temporary, path)
    n_parts = -(-source.n_windows // PART_ROWS)
    todo = []
    for part in range(run.rank, n_parts, run.world_size):
        if not os.path.isfile(part_path(folder, part)):
            todo.append(part)
    # Scores are stored by window, because the order of cursors depends on the seed of a run.
    # The first epoch has every window once.
    cursor_of = np.empty(source.n_windows, dtype=np.int64)
    windows = [source.window(cursor) for cursor in range(source.n_windows)]
    cursor_of[windows] = np.arange(source.n_windows)
    for part in tqdm(todo, desc=source.name, unit='part', disable=not run.is_master):
        scores = score(cursor_of[part * PART_ROWS:(part + 1) * PART_ROWS].tolist())
        # A part that exists counts as done, so it appears only when it is complete.
        temporary = part_path(folder, part) + '.tmp'
        with open(temporary, 'wb') as f:
            np.save(f, scores.astype(np.float32))
        os.replace(temporary, part_path(folder, part))


def read_scores(folder, source):
    """Reads (scores (windows, 3) float32, Reference, scores.json) of a source.

    Raises BadInput when they are missing, half made or belong to other rows.
    """
    hint = f'Run tools/influence_tables.py score --sources={source.name} again.'
    path = os.path.join(folder, 'scores.json')
    if not os.path.isfile(path):
        raise BadInput(f"source '{source.name}': {folder} holds no scores. {hint}")
    about = read_json(path)
    here = dict(
        block_size=source.block_size, windows=source.n_windows, shards=source.fingerprint())
    for what, value in here.items():
        if about[what] != value:
            raise BadInput(
                f"source '{source.name}': the scores in {folder} belong to other rows ({what} "
                f'{about[what]}, here {value}). {hint}')
    parts = [part_path(folder, part) for part in range(-(-source.n_windows // PART_ROWS))]
    missing = [path for path in parts if not os.path.isfile(path)]
    if missing:
        raise BadInput(
            f"source '{source.name}': {len(missing)} of {len(parts)} parts of its scores are "
            f'missing ({missing[0]}). {hint}')
    scores = np.concatenate([np.load(path) for path in parts])
    return scores, Reference(**about['reference']), about


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
