"""Whole conversations packed into rows (`packing='document'`): what train.py reads in the SFT stages.

Documents begin with the beginning-of-document token, so they are found in the shards without an index; the mask beside a shard
says which of their tokens the loss counts. They are packed by best-fit decreasing: the longest first, each into the row with the
least room that it still fits in (Ding et al. 2024, arXiv:2404.10830, section 3). A row is a document's worth of positions after
another's, what is left over is padding at its end. Attention and positions stay within a document, so a packed row equals its
conversations run one by one.
"""
import bisect
from dataclasses import dataclass

import numpy as np

OVERLONG = ('truncate', 'drop')


@dataclass
class Packs:
    """Rows of documents: row i holds the documents first[i]:first[i + 1] of the arrays."""
    shard: np.ndarray           # (documents,) int32, number of the shard
    start: np.ndarray           # (documents,) int64, position of its first token there
    length: np.ndarray          # (documents,) int32, tokens that are used of it
    first: np.ndarray           # (rows + 1,) int64
    capacity: int               # tokens of a row
    n_too_long: int             # documents of more tokens than a row, truncated or dropped
    n_unsupervised: int         # documents left out since no token of theirs counts
    n_valid: int              # tokens that the loss counts

    @property
    def n_rows(self):
        return len(self.first) - 1

    @property
    def utilisation(self):
        """Share of the tokens of all rows that are no padding."""
        return int(self.length.sum()) / (self.n_rows * self.capacity) if self.n_rows else 0.0


def best_fit(lengths, capacity):
    """Packs items into bins by best-fit decreasing: (order (n,) int64, first (bins + 1,) int64), bin i holds order[first[i]:first[i + 1]].

    lengths (n,) ints, 1 to capacity. Items of one length are placed together, so the work grows with the number of different
    lengths and remaining spaces: a second for a million conversations.
    """
    by_length = np.argsort(-np.asarray(lengths), kind='stable')
    different, counts = np.unique(-np.asarray(lengths)[by_length], return_counts=True)
    bins, rooms, with_room = [], [], {}          # items of every bin; sorted spaces that bins have left; space -> these bins

    def put(room, numbers):
        if numbers and room not in with_room:
            bisect.insort(rooms, room)
            with_room[room] = []
        if numbers:
            with_room[room] += numbers
    at = 0
    for length, count in zip((-different).tolist(), counts.tolist()):
        items = by_length[at:at + count].tolist()
        at += count
        while items:
            place = bisect.bisect_left(rooms, length)
            if place == len(rooms):              # nobody has room: as many new bins as these items need
                n_new = -(-len(items) // (capacity // length))
                put(capacity, [*range(len(bins), len(bins) + n_new)])
                bins += [[] for _ in range(n_new)]
                continue
            room = rooms[place]
            each = room // length                # a bin that has got one is the fullest that the next fits into, too
            n_taken = min(len(with_room[room]), -(-len(items) // each))
            taken, left = with_room[room][:n_taken], with_room[room][n_taken:]
            for i, number in enumerate(taken):
                bins[number] += items[i * each:(i + 1) * each]
            in_last = min(each, len(items) - (n_taken - 1) * each)
            items = items[n_taken * each:]
            with_room[room] = left
            if not left:
                del rooms[place], with_room[room]
            put(room - each * length, taken[:-1])
            put(room - in_last * length, taken[-1:])
    order = np.array([item for items in bins for item in items], dtype=np.int64)
    return order, np.concatenate(([0], np.cumsum([len(items) for items in bins], dtype=np.int64)))


def pack_documents(shards, bos_id, capacity, overlong='truncate'):
    """The rows that the documents of a source make: Packs.

    shards      iterable of (tokens (n,), mask (n,) uint8 or None: every token counts); the first of a document never does
    overlong    what becomes of documents of more than `capacity` tokens: truncate | drop
    Documents of which no token counts within `capacity` are left out.
    """
    parts, n_too_long, n_unsupervised = [], 0, 0
    for number, (tokens, mask) in enumerate(shards):
        starts = np.flatnonzero(np.asarray(tokens) == bos_id)
        if not len(starts):
            continue
        length = np.diff(starts, append=len(tokens))
        counted = length - 1 if mask is None else np.add.reduceat(mask, starts, dtype=np.int64) - mask[starts]
        long = length > capacity
        n_too_long += int(long.sum())
        for i in np.flatnonzero(long):
            counted[i] = capacity - 1 if mask is None else int(mask[starts[i] + 1:starts[i] + capacity].sum())
        keep = ~long if overlong == 'drop' else np.ones_like(long)
        n_unsupervised += int((keep & (counted == 0)).sum())
        keep &= counted > 0
        parts.append((np.full(keep.sum(), number, np.int32), starts[keep], np.minimum(length[keep], capacity).astype(np.int32), counted[keep]))
    nothing = (np.zeros(0, np.int32),) * 4
    shard, start, length, counted = (np.concatenate(columns) for columns in zip(nothing, *parts))
    order, first = best_fit(length, capacity)
    return Packs(shard[order], start[order], length[order], first, capacity, n_too_long, n_unsupervised, int(counted.sum()))
