"""Text that a probe set and a source have in common, found before training.

Influence on a probe set means nothing for a source that holds the text of the probe itself. Two
things are looked for, in one pass over all tokens of a source and for all probe sets at once:

- Documents that both hold, token by token.
- Runs of n tokens within a document (shingles, Broder 1997) that both hold. n tokens are about
  RUN_BYTES bytes of text, which are 13 words of English, as in Brown et al. 2020 (arXiv:2005.14165,
  appendix C). So a document is also found behind another beginning, in pieces, or inside a longer
  one: only the runs across the places where it was cut are lost. A document of fewer than n tokens
  is one run.

Text that was rewritten, or whose capitals or spaces were changed throughout, is not found.

Letters in shape comments: P probe sets, K different runs that are looked for.
"""
import math
from dataclasses import dataclass

import numpy as np

from configurator import BadInput
from data import domain_of, mix_bits
from lib.parallel import sum_numbers
from lib.shards import open_shard

RUN_BYTES = 80                  # bytes of text in a run: 13 words of English
RUN_TOKENS = 20                 # tokens of a run where no meta.json says how many bytes they are
PIECE = 256                     # tokens that are compared at once where documents are not known
SHORTEST = 15                   # shorter documents occur in many places by chance
# A probe set of more tokens is sampled. The standard error of a share of 5 % is then below 0.25 %.
MAX_RUNS = 2**14
# Legitimate sources of a probe set's own kind hold up to 3 % of its runs (licences, phrases), and
# generated text with few templates holds 18 %. They hold half of at most 2 % of its documents.
MAX_DOCUMENTS = 0.05            # share of a probe set's documents of which a source may hold half
MAX_OF_PROBE = 0.25             # share of a probe set's runs that a source may hold
MAX_OF_SOURCE = 0.5             # share of a source's runs that a probe set may hold
NOTICEABLE = 0.05               # either share from which a warning is printed
MIN_RUNS = 4                    # different runs that are needed to judge a document by itself
CHUNK = 2**15                   # tokens that are hashed at once. The arrays stay in the cache
# The base of the hash. It is odd, so it has an inverse, and 5 modulo 8, so its powers repeat only
# after 2^62 of them.
BASE = 0x9E3779B97F4A7C15


# -- documents -------------------------------------------------------------------------------------


def texts_of(tokens, bos_id):
    """Finds the documents in an array of tokens: (starts, lengths), int64, without their BOS.

    The tokens before the first BOS count as a document, which may be empty. bos_id None: all tokens
    are one document.
    """
    marks = []
    if bos_id is not None:
        for first in range(0, len(tokens), CHUNK):
            marks.append(first + np.flatnonzero(tokens[first:first + CHUNK] == bos_id))
    starts = np.concatenate(([-1], *marks)) + 1
    return starts, np.append(starts[1:] - 1, len(tokens)) - starts


def documents_of(tokens, bos_id):
    """The same. bos_id None: aligned pieces of PIECE tokens, which a copied file has as well."""
    if bos_id is not None:
        return texts_of(tokens, bos_id)
    starts = np.arange(0, len(tokens), PIECE)
    return starts, np.minimum(PIECE, len(tokens) - starts)


def hashed_documents(tokens, starts, lengths):
    """Hashes the documents of a shard: (starts (n,), ends (n,), hashes (n,) uint64).

    A hash covers the length, the first 15 and the last 15 tokens of a document. Documents of fewer
    than 15 tokens are left out.
    """
    # Comparing documents pair by pair would take quadratic time. Only those of equal hashes are
    # compared token by token.
    starts = starts[lengths >= SHORTEST]
    lengths = lengths[lengths >= SHORTEST]
    ends = starts + lengths
    base = np.uint64(BASE)
    hashes = lengths.astype(np.uint64)
    for i in range(SHORTEST):
        hashes = (hashes * base + tokens[starts + i]) * base + tokens[ends - SHORTEST + i]
    return starts, ends, hashes


# -- runs of tokens --------------------------------------------------------------------------------


def run_length(sources):
    """Tokens of a run: as many as hold RUN_BYTES bytes of the text of these Sources, by meta.json.

    A tokenizer of 2,048 tokens needs twice as many tokens for a text as one of 150,000.
    """
    n_bytes = 0
    n_tokens = 0
    for source in sources:
        splits = (source.meta or {}).get('splits', {})
        if source.split in splits:
            n_bytes += splits[source.split]['bytes']
            n_tokens += splits[source.split]['tokens']
    if n_bytes == 0:
        return RUN_TOKENS
    return min(CHUNK, max(13, math.ceil(RUN_BYTES * n_tokens / n_bytes)))


class RunHashes:
    """Hashes all runs of n tokens: the polynomial whose coefficients are the tokens, at BASE.

    Karp and Rabin 1987. All arithmetic is modulo 2^64.
    """

    def __init__(self, n):
        self.n = n
        powers = np.full(CHUNK + n, BASE, dtype=np.uint64)
        inverses = np.full(CHUNK + n, pow(BASE, -1, 2**64), dtype=np.uint64)
        powers[0] = inverses[0] = 1
        self.powers = np.multiply.accumulate(powers)
        self.inverses = np.multiply.accumulate(inverses)
        self.products = np.empty(CHUNK + n, dtype=np.uint64)
        self.sums = np.zeros(CHUNK + n, dtype=np.uint64)

    def chunks(self, tokens, starts, lengths):
        """Yields (place of the first token, hashes of runs, hashes and places of short documents).

        tokens          (N,) of a shard, whose documents are those of `texts_of`
        hashes of runs  (n,) uint64 of the runs that begin at the first token, the second and so on.
                        They are valid until the next chunk. Runs across documents are among them
        """
        short = np.flatnonzero((lengths > 0) & (lengths < self.n))
        starts = starts[short]
        lengths = lengths[short]
        for first in range(0, len(tokens), CHUNK):
            # The last runs of a chunk reach n - 1 tokens into the next one.
            chunk = tokens[first:first + CHUNK + self.n - 1]
            products = self.products[:len(chunk)]
            np.multiply(chunk, self.powers[:len(chunk)], out=products)
            np.add.accumulate(products, out=self.sums[1:len(chunk) + 1])
            low, high = np.searchsorted(starts, (first, first + CHUNK))
            at = starts[low:high] - first
            length = lengths[low:high]
            pieces = (self.sums[at + length] - self.sums[at]) * self.inverses[at]
            pieces = mix_bits(pieces, length.astype(np.uint64))
            n_runs = max(0, len(chunk) - self.n + 1)
            hashes = products[:n_runs]
            np.subtract(self.sums[self.n:self.n + n_runs], self.sums[:n_runs], out=hashes)
            np.multiply(hashes, self.inverses[:n_runs], out=hashes)
            yield first, hashes, pieces, starts[low:high]


def runs_of(probe, bos_id, hasher, limit):
    """Hashes, up to a limit, of a probe set's runs and short documents, and where they are from.

    Returns (hashes (n,) uint64, numbers of documents (n,) int64, number of documents). The numbers
    count from 0 in the order of the shards, and empty documents are left out.
    """
    hashes = []
    documents = []
    n_documents = 0
    for path in probe.paths:
        tokens = open_shard(path)
        starts, lengths = texts_of(tokens, bos_id)
        pieces, _ = documents_of(tokens, bos_id)        # where those begin that are counted
        counted = starts[lengths > 0] if bos_id is not None else pieces
        for first, runs, short, places in hasher.chunks(tokens, starts, lengths):
            at = first + np.flatnonzero(runs <= limit)
            text = np.searchsorted(starts, at, side='right') - 1
            # Runs across two documents say nothing about either.
            at = at[at + hasher.n <= starts[text] + lengths[text]]
            kept = short <= limit
            hashes += [runs[at - first], short[kept]]
            places = np.concatenate((at, places[kept]))
            number = np.searchsorted(counted, places, side='right') - 1
            documents.append(n_documents + number)
        n_documents += len(counted)
    return np.concatenate(hashes), np.concatenate(documents), n_documents


# -- the comparison --------------------------------------------------------------------------------


def limit_of(every):
    """The largest hash that is looked for when one in `every` runs is: uint64."""
    return np.uint64(2**64 // every - 1)


def filter_bits(hashes, size):
    """Places of hashes (n,) in a filter of `size` items, a power of two: (n,) int64."""
    # The highest bits choose the sample, and the lowest are the least mixed.
    return (hashes >> np.uint64(20) & np.uint64(size - 1)).view(np.int64)


@dataclass
class Wanted:
    """What is looked for in the sources: the documents and runs of all probe sets."""
    bos_id: int | None          # token that documents begin with
    hasher: RunHashes
    every: list                 # (P,) ints: one in so many runs of a probe set is looked for
    runs: np.ndarray            # (K,) uint64: the different hashes, sorted
    found_in: list              # of every probe set (number in `runs`, number of the document) of
                                # each run that is looked for: int64 arrays (n,)
    n_documents: list           # (P,) ints
    filter: np.ndarray          # bool by some bits of a hash. False: none of the runs has these
    documents: dict             # hash -> [(number of the probe set, tokens), ...]
    keys: np.ndarray            # (documents,) uint64: these hashes

    def find_runs(self, hashes):
        """Positions in `runs` of the hashes (n,) that are there, with repetitions: int64."""
        every = min(self.every)
        if every > 1:
            # compress takes half the time of an index of bools.
            hashes = hashes.compress(hashes <= limit_of(every))
        # Most hashes are no known run. Looking at the filter takes less time than a search.
        near = hashes.compress(self.filter.take(filter_bits(hashes, len(self.filter))))
        at = np.searchsorted(self.runs, near)
        at[at == len(self.runs)] = 0
        return at[self.runs[at] == near] if len(self.runs) else at[:0]

    def find_documents(self, tokens, starts, lengths):
        """Counts the documents of a shard that a probe set has as well: (P,) int64.

        starts, lengths (n,): those of `documents_of`
        """
        counts = np.zeros(len(self.every), dtype=np.int64)
        starts, ends, hashes = hashed_documents(tokens, starts, lengths)
        for i in np.flatnonzero(np.isin(hashes, self.keys)):
            document = tokens[starts[i]:ends[i]]
            equal = {p for p, other in self.documents[int(hashes[i])]
                     if np.array_equal(other, document)}
            counts[list(equal)] += 1
        return counts


def look_for(probes, bos_id):
    """Reads probe sets (Sources) and returns what to look for in the sources: Wanted.

    bos_id: the token that documents begin with, None: unknown
    """
    hasher = RunHashes(run_length(probes))
    every = []
    found = []
    documents = {}
    for p, probe in enumerate(probes):
        # A power of two, so that a probe set's sample is part of every larger sample.
        every.append(2 ** max(0, math.ceil(math.log2(probe.n_tokens / MAX_RUNS))))
        found.append(runs_of(probe, bos_id, hasher, limit_of(every[-1])))
        for path in probe.paths:
            tokens = open_shard(path)
            starts, ends, keys = hashed_documents(tokens, *documents_of(tokens, bos_id))
            for start, end, key in zip(starts, ends, keys.tolist(), strict=True):
                documents.setdefault(key, []).append((p, tokens[start:end]))
    runs = np.unique(np.concatenate([hashes for hashes, _, _ in found]))
    found_in = [(np.searchsorted(runs, hashes), number) for hashes, number, _ in found]
    filter = np.zeros(2 ** math.ceil(math.log2(16 * len(runs) + 16)), dtype=bool)
    filter[filter_bits(runs, len(filter))] = True
    return Wanted(
        bos_id, hasher, every, runs, found_in, [n for _, _, n in found], filter, documents,
        np.array(list(documents), dtype=np.uint64))


def count_common(wanted, source, rank=0, world_size=1):
    """Counts what a Source has in common with probe sets, in this rank's shards: (P + 1 + K,) ints.

    The documents that it shares with every probe set, the number of its runs, and how often it has
    each run that is looked for. These are sums over shards, so ranks add theirs.
    Reads all tokens once.
    """
    n = wanted.hasher.n
    documents = np.zeros(len(wanted.every), dtype=np.int64)
    n_runs = 0
    counts = np.zeros(len(wanted.runs), dtype=np.int64)
    for path in source.paths[rank::world_size]:
        tokens = open_shard(path)
        starts, lengths = texts_of(tokens, wanted.bos_id)
        # A document of fewer than n tokens is one run.
        n_runs += int(np.maximum(lengths - n, 0).sum() + (lengths > 0).sum())
        documents += wanted.find_documents(tokens, *documents_of(tokens, wanted.bos_id))
        for _, hashes, pieces, _ in wanted.hasher.chunks(tokens, starts, lengths):
            np.add.at(counts, wanted.find_runs(hashes), 1)
            np.add.at(counts, wanted.find_runs(pieces), 1)
    return np.concatenate((documents, [n_runs], counts))


@dataclass
class Overlap:
    """What a source has in common with a probe set."""
    n_equal: int                # documents of the source that the probe set has as well
    of_probe: float             # share of the probe set's different runs that the source has
    of_source: float            # share of the source's runs that the probe set has
    source_error: float         # its standard error. 0.0: the probe set was not sampled
    held: np.ndarray            # numbers of its documents of whose runs the source has half
    of_documents: float         # their share of the probe set's documents

    @property
    def is_leak(self):
        return (
            self.n_equal > 0 or self.of_documents > MAX_DOCUMENTS or self.of_probe > MAX_OF_PROBE
            or self.of_source - 2 * self.source_error > MAX_OF_SOURCE)

    @property
    def is_noticeable(self):
        return len(self.held) > 0 or max(self.of_probe, self.of_source) > NOTICEABLE


def overlaps(wanted, totals):
    """The Overlap with every probe set: list. totals: `count_common`, summed over ranks."""
    n_probes = len(wanted.every)
    counts = totals[n_probes + 1:]
    found = []
    for p, every in enumerate(wanted.every):
        run, document = wanted.found_in[p]
        mine = counts[np.unique(run)]
        of_probe = float((mine > 0).mean()) if len(mine) else 0.0
        n_runs = max(1, totals[n_probes])
        of_source = float(every * mine.sum() / n_runs)
        # Every different run is in the sample with probability 1 / every. Spaces in a row are one
        # run that makes up much of some sources, and multiplying it by `every` says little.
        source_error = float((every * (every - 1) * (mine**2).sum())**0.5 / n_runs)
        n_documents = wanted.n_documents[p]
        # A run of spaces may repeat itself many times in a document, and says little.
        pairs = np.unique(document * len(wanted.runs) + run)
        document, run = np.divmod(pairs, len(wanted.runs))
        looked_for = np.bincount(document, minlength=n_documents)
        n_found = np.bincount(document, counts[run] > 0, n_documents)
        held = np.flatnonzero((looked_for >= MIN_RUNS) & (2 * n_found >= looked_for))
        found.append(Overlap(
            int(totals[p]), of_probe, min(1.0, of_source), source_error, held,
            len(held) / max(1, n_documents)))
    return found


def describe(overlap, n, unit):
    """Says what an Overlap is, in runs of n tokens. unit: what the probe set's documents are."""
    text = (
        f"{overlap.n_equal:,} {unit}, {overlap.of_probe:.1%} of the probe set's runs of {n} "
        f"tokens and {overlap.of_source:.1%} of the source's in common")
    if len(overlap.held):
        numbers = ', '.join(str(i) for i in overlap.held[:5])
        more = ', ...' if len(overlap.held) > 5 else ''
        text += (
            f" (half or more of {len(overlap.held):,} of the probe set's {unit}, counted from "
            f'0: {numbers}{more})')
    return text


def check_overlap(probes, sources, bos_id, run):
    """Raises BadInput when a source holds text of a probe set. Prints what they have in common.

    probes, sources     lists of Source
    bos_id              token that documents begin with. None: unknown
    run                 its data_rank and n_data say which shards this rank reads
    All ranks must call it, and all raise together.
    """
    if not probes:
        return
    wanted = look_for(probes, bos_id)
    n = wanted.hasher.n
    unit = f'pieces of {PIECE} tokens' if bos_id is None else 'document(s)'
    leaks = []
    largest = [(0.0, '') for _ in probes]
    for i, source in enumerate(sources):
        # Sources often have one shard, so every source begins with another rank.
        mine = count_common(wanted, source, (run.data_rank + i) % run.n_data, run.n_data)
        # A run may be in the shards of any rank, and all ranks must decide alike.
        totals = np.array(sum_numbers(mine.tolist(), run.layout))
        name = f"source '{source.name}' ({source.split})"
        for p, overlap in enumerate(overlaps(wanted, totals)):
            pair = f"the probe set '{domain_of(probes[p])}' and {name} have"
            text = f'{pair} {describe(overlap, n, unit)}'
            largest[p] = max(largest[p], (overlap.of_probe, f' ({name})'))
            if overlap.is_leak:
                leaks.append(text)
            elif overlap.is_noticeable and run.is_master:
                print(
                    f'warning: {text}. Influence counts such text in favour of the source. Take '
                    'the documents that both hold out of one of them.')
    if leaks:
        raise BadInput(
            f'{"; ".join(leaks)}: influence would measure how well the source holds the probe '
            'itself. Take these documents out of one of them, or prepare the probe set anew '
            '(prepare/probe.py draws only from what its source keeps out of train/).')
    if run.is_master:
        for probe, (share, name) in zip(probes, largest, strict=True):
            print(
                f"probe: a source holds at most {share:.2%} of the probe set '{domain_of(probe)}'"
                f'{name}, in runs of {n} tokens')
