"""Selection of rows by influence (MobileLLM-R1, arXiv:2509.24945, section 6): scores, what they are held against, verdicts.

A row is kept when its influence per token, in units of the probe's own help, exceeds a margin times the median over probe rows
that the direction has not seen. The sign alone (margin 0, the paper's rule) is no filter for noise: to a model that was trained
on clean text nearly all random rows look helpful. Hence the margin, and two guards, each four standard deviations of the same
probe rows wide: on the loss, and on the share of different tokens in a row.

Scores of a whole source (`tools/influence_tables.py score`) stand beside its shards, data/<source>/<scores>/: scores.json says how they were
made, part_000000.npy and so on hold (rows, 3) float32: influence per token, loss in nats per token, share of different tokens.
"""
import json
import os
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

from configurator import BadInput
from data import token_ids
from influence import row_influence
from lib.device import all_reduce_sum

PART_ROWS = 4096        # rows of a part; a killed scoring goes on at the first part that is not there


@dataclass
class Reference:
    """What probe rows that the direction has not seen are like."""
    influence: float            # their median per token
    max_loss: float             # mean and four standard deviations, nats per token
    min_different: float        # share of different tokens, likewise
    max_different: float
    n_rows: int


def different_tokens(rows):
    """Share of different tokens in every row: (n, T) ints -> (n,) float64."""
    ordered = np.sort(token_ids(rows), axis=1)
    return (1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)) / rows.shape[1]


def score_rows(model, source, cursors, direction, batch_size, to_device, rank=0, world_size=1):
    """Scores of the rows that cursors name: (n, 3) float64 on every rank. Ranks share the work, each batch_size rows at a time."""
    scores = np.zeros((len(cursors), 3))
    for start in range(0, len(cursors), batch_size * world_size):
        mine = np.arange(start + rank * batch_size, start + (rank + 1) * batch_size)
        rows = source.rows([cursors[min(i, len(cursors) - 1)] for i in mine])             # beyond the end: repeated, not kept
        batch = to_device(rows)
        influence, losses = row_influence(model, batch, direction)
        n = (batch[1] >= 0).sum(1).clamp(min=1)
        found = torch.stack((influence / n, losses.sum(1) / n), 1).cpu().numpy()
        mine = mine[mine < len(cursors)]
        scores[mine] = np.column_stack((found, different_tokens(rows)))[:len(mine)]
    return np.array(all_reduce_sum(scores.flatten())).reshape(-1, 3)


def reference_of(scores):
    """`Reference` from the scores (n, 3) of probe rows. BadInput when their influence is not positive: then it says nothing."""
    median, mean, deviation = np.median(scores[:, 0]), scores.mean(0), scores.std(0, ddof=1)
    if not median > 0:
        raise BadInput(f'selection: the median influence of {len(scores)} probe rows that the direction has not seen is {median:.3g}; it '
                       'must be above 0 to compare others with. Raise probe_rows, or make the probe set larger.')
    return Reference(float(median), *(float(x) for x in (mean[1] + 4 * deviation[1], mean[2] - 4 * deviation[2], mean[2] + 4 * deviation[2])),
                     len(scores))


def judge(scores, reference, margin, keep_min):
    """Which rows to keep: (n,) bool, and why not: dict(influence=, loss=, tokens=) of shares (a row may count for several).

    At least keep_min of the rows are kept, those of highest influence, first of all those that pass the guards.
    """
    weak = scores[:, 0] <= margin * reference.influence
    lossy = scores[:, 1] > reference.max_loss
    odd = (scores[:, 2] < reference.min_different) | (scores[:, 2] > reference.max_different)
    keep = ~(weak | lossy | odd)
    floor = int(np.ceil(keep_min * len(scores)))
    if keep.sum() < floor:
        keep = np.zeros(len(scores), dtype=bool)
        keep[np.lexsort((-scores[:, 0], lossy | odd))[:floor]] = True
    return keep, dict(influence=float(weak.mean()), loss=float(lossy.mean()), tokens=float(odd.mean()))


def choose_next(score, first, n_rows, reference, margin, keep_min):
    """Judges the rows from cursor `first` on until n_rows of them are kept: (keep (n,) bool, reasons as `judge`, scores (n, 3)).

    score(cursors) gives the scores of rows.
    """
    scores = score(range(first, first + n_rows))
    while True:
        keep, reasons = judge(scores, reference, margin, keep_min)
        missing = n_rows - int(keep.sum())
        if missing <= 0:
            return keep, reasons, scores
        more = int(np.ceil(missing / max(keep.mean(), 0.05)))
        scores = np.concatenate((scores, score(range(first + len(scores), first + len(scores) + more))))


# -- scores of a whole source, on disk ---------------------------------------------------------------------------------

def part_path(folder, part):
    return os.path.join(folder, f'part_{part:06d}.npy')


def write_scores(folder, about, reference, source, score, rank, world_size):
    """Scores every window of a source into folder, this rank's parts of it; parts that are there are kept.

    about: JSON-able dict, how the scores come about; BadInput when the folder's scores came about in another way. score(cursors)
    gives the scores of rows. Row i of the parts is window i of the shards, in their order.
    """
    path, about = os.path.join(folder, 'scores.json'), {**about, 'reference': asdict(reference), 'windows': source.n_windows}
    if os.path.isfile(path):
        with open(path, encoding='utf-8') as f:
            before = json.load(f)
        differing = [key for key in about if key != 'reference' and before.get(key) != about[key]]
        if differing:
            raise BadInput(f"{folder} holds scores that were made with other settings ({', '.join(differing)}: {before.get(differing[0])!r}, "
                           f'now {about[differing[0]]!r}). Give --scores another name, or delete it.')
    else:
        os.makedirs(folder, exist_ok=True)
        with open(f'{path}.{rank}.tmp', 'w', encoding='utf-8') as f:
            json.dump(about, f, indent=1)
        os.replace(f'{path}.{rank}.tmp', path)
    n_parts = -(-source.n_windows // PART_ROWS)
    todo = [part for part in range(rank, n_parts, world_size) if not os.path.isfile(part_path(folder, part))]
    cursor_of = np.empty(source.n_windows, dtype=np.int64)           # the first epoch names every window once
    cursor_of[[source.window(cursor) for cursor in range(source.n_windows)]] = np.arange(source.n_windows)
    for part in tqdm(todo, desc=source.name, unit='part', disable=rank > 0):
        scores = score(cursor_of[part * PART_ROWS:(part + 1) * PART_ROWS].tolist())
        with open(part_path(folder, part) + '.tmp', 'wb') as f:
            np.save(f, scores.astype(np.float32))
        os.replace(part_path(folder, part) + '.tmp', part_path(folder, part))


def read_scores(folder, source):
    """(scores (windows, 3) float32, Reference, scores.json) of a source. BadInput when they are missing, half made or of other rows."""
    hint = f'Run tools/influence_tables.py score --sources={source.name} again.'
    path = os.path.join(folder, 'scores.json')
    if not os.path.isfile(path):
        raise BadInput(f"source '{source.name}': {folder} holds no scores. {hint}")
    with open(path, encoding='utf-8') as f:
        about = json.load(f)
    for what, here in (('block_size', source.block_size), ('windows', source.n_windows), ('shards', source.fingerprint())):
        if about[what] != here:
            raise BadInput(f"source '{source.name}': the scores in {folder} are of other rows ({what} {about[what]}, here {here}). {hint}")
    parts = [part_path(folder, part) for part in range(-(-source.n_windows // PART_ROWS))]
    missing = [path for path in parts if not os.path.isfile(path)]
    if missing:
        raise BadInput(f"source '{source.name}': {len(missing)} of {len(parts)} parts of its scores are missing ({missing[0]}). {hint}")
    return np.concatenate([np.load(path) for path in parts]), Reference(**about['reference']), about
