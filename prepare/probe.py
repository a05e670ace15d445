"""Probe sets, one per domain, that re-weighting measures against -> data/probe/<domain>/.

    python prepare/probe.py --tokenizer=path/to/tokenizer.json --samples=1000
    python prepare/probe.py --tokenizer=tokenizer.json --sources="{'math': 'text'}" --input.math='my/*.jsonl' \\
        --evaluation='benchmarks/*.jsonl'

Candidates are the documents whose hash falls into the last `probe_fraction`: the dataset's own script keeps exactly these out
of its training shards, so the two are disjoint, exact duplicates included. From them are dropped, counted and named: text of a
length, or with a share of unprintable characters, or with a score outside the bounds; text that shares 13 words in a row with
an evaluation set (Brown et al. 2020, arXiv 2005.14165, appendix C); exact and near duplicates of a document that is in already
(MinHash over 5-word shingles, estimated Jaccard similarity 0.8; Broder 1997). A domain is a source with one split, `probe`;
documents.jsonl.gz beside it has the text, report.json what was dropped.
"""
import collections
import gzip
import importlib
import json
import os
import re

import _path  # noqa: F401

import datasketch
import numpy as np
from tqdm import tqdm

from configurator import BadInput, configure
from lib.reading import local_files, location, make_parts, read_batches, records_of, remote_files
from lib.tokenizer import load_tokenizer
from prepare.common import document_of, hash_share, plain_text, split_of
from prepare.shards import (
    PartWriter,
    finish_source,
    open_source,
    print_table,
    read_json,
    write_atomic,
    write_json,
)

# -- knobs --
sources: dict[str, str] = {'code': 'starcoder', 'math': 'finemath', 'web': 'fineweb_edu'}   # domain -> script in prepare/
input: dict[str, str] = {}       # domain -> local files instead of the hub
evaluation = 'core'              # local files of benchmarks; core: those of the recipe, from the hub; '': no decontamination
tokenizer = ''                   # tiktoken name, rank file, tokenizer.json, or a folder that holds one
samples = 1000                   # documents per domain
out = 'data'                     # folder of all sources; the probe sets go to <out>/probe/
probe_fraction = 0.005           # the same as, or less than, the source's
min_chars = 200                  # a document's length
max_chars = 20_000
min_printable = 0.99             # share of printable characters, blanks and line ends
min_score: float | None = None   # of the record's field `score` (FineWeb-Edu, FineMath)

HUB = 'hf://datasets/'
CORE = [HUB + name for name in (
    'allenai/ai2_arc@210d026faf9955653af8916fad021475a3f00453/ARC-*/test-*.parquet',
    'cais/mmlu@c30699e8356da336a370243923dbaf21066bb9fe/all/test-*.parquet',
    'Rowan/hellaswag@218ec52e09a7e7462a5400043bb9a69a41d06b76/data/validation-*.parquet', 'google/boolq/data/validation-*.parquet',
    'allenai/winogrande@01e74176c63542e6b0bcb004dcdea22d94fb67b5/winogrande_xl/validation-*.parquet',
    'baber/piqa@142f6d7367fd9877f0fb3b5734ea6a545f54cdd1/**/*.parquet', 'HuggingFaceH4/MATH-500/test.jsonl',
    'allenai/openbookqa@388097ea7776314e93a529163e0fea805b8a6454/main/test-*.parquet', 'openai/openai_humaneval/**/*.parquet',
    'allenai/social_i_qa@refs%2Fconvert%2Fparquet/default/validation/*.parquet', 'google-research-datasets/mbpp/full/test-*.parquet',
    'openai/gsm8k@740312add88f781978c0658806c59bc2815b9866/main/test-*.parquet')]
N_GRAM, SHINGLE, SIMILARITY = 13, 5, 0.8


def words_of(text):
    return re.findall(r'\w+', text.lower())


def n_grams(words, n):
    return {hash(tuple(words[i:i + n])) for i in range(len(words) - n + 1)}


def strings_in(record):
    """All text in a record, however nested."""
    if isinstance(record, str):
        yield record
    elif isinstance(record, (dict, list)):
        for part in record.values() if isinstance(record, dict) else record:
            yield from strings_in(part)


def evaluation_grams():
    """The 13-grams of all text in the evaluation sets. An item of fewer words cannot be found and counts for nothing."""
    if not evaluation:
        print('evaluation is empty: the probe sets are not checked against any benchmark')
        return set()
    files = remote_files(CORE)[0] if evaluation == 'core' else local_files(evaluation)
    grams, n_records = set(), 0
    for file in files:
        for batch in read_batches(file, []):
            for number, record in records_of(batch):
                if isinstance(record, ValueError):
                    raise BadInput(f'{location(batch, number)}: {record}.')
                n_records += 1
                for text in strings_in(record):
                    grams |= n_grams(words_of(text), N_GRAM)
    print(f'evaluation: {len(files)} files, {n_records:,} records, {len(grams):,} different runs of {N_GRAM} words')
    return grams


def shortcoming(text, record, grams, known):
    """Why a candidate is no good, in a word or two, or None. known: datasketch.MinHashLSH of the documents taken."""
    if not min_chars <= len(text) <= max_chars:
        return 'length'
    if sum(c.isprintable() or c.isspace() for c in text) < min_printable * len(text):
        return 'unprintable'
    if min_score is not None and record['score'] < min_score:
        return 'score'
    words = words_of(text)
    if not grams.isdisjoint(n_grams(words, N_GRAM)):
        return 'contaminated'
    if text in known:
        return 'exact duplicate'
    sketch = datasketch.MinHash(num_perm=128, seed=1)
    sketch.update_batch([' '.join(words[i:i + SHINGLE]).encode() for i in range(max(1, len(words) - SHINGLE + 1))])
    if known.query(sketch):
        return 'near duplicate'
    known.insert(text, sketch)
    return None


def candidates(script, files, report):
    """Yields (where, text, record) of the records whose hash marks them for the probe; counts all that it reads."""
    columns = script.DATASET.columns + ['score'] * (min_score is not None)
    for file in (file for part in make_parts(files) for file in part):
        for batch in read_batches(file, columns):
            for number, record in records_of(batch):
                try:
                    text = document_of(record, script.text_of, columns if isinstance(record, dict) else ())
                    share = hash_share(plain_text(text)) if text else None
                except ValueError as error:
                    raise BadInput(f'{location(batch, number)}: {error}. Mend or drop the record.') from None
                report['read'] += 1
                if share is not None and split_of(share, 0, probe_fraction) == 'probe':
                    report['candidates'] += 1
                    yield location(batch, number), text, record


def choose(domain, grams):
    """The domain's documents, [(where, text)], and the report: what was read, taken, and dropped for which reason."""
    script = importlib.import_module(f'prepare.{sources[domain]}')
    source = os.path.join(out, script.DATASET.name)
    made = read_json(os.path.join(source, 'meta.json')) or read_json(os.path.join(source, 'progress/source.json'))
    if made is not None and made['settings']['probe_fraction'] < probe_fraction:
        raise BadInput(f"{source} keeps only {made['settings']['probe_fraction']} of its documents out of training, probe_fraction = "
                       f'{probe_fraction} asks for more. Lower it, or prepare the source again.')
    files = local_files(input[domain]) if domain in input else remote_files(script.DATASET.files)[0]
    known = datasketch.MinHashLSH(threshold=SIMILARITY, num_perm=128)
    taken, report, dropped = [], collections.Counter(), collections.defaultdict(list)
    with tqdm(total=samples, desc=domain, unit='doc') as bar:
        for where, text, record in candidates(script, files, report):
            reason = shortcoming(text, record, grams, known)
            if reason is not None:
                dropped[reason].append(where)
                continue
            taken.append((where, text))
            bar.update()
            if len(taken) == samples:
                break
    counts = {reason: len(where) for reason, where in dropped.items()}
    print(f"{domain}: {report['read']:,} documents read, {report['candidates']:,} in the probe's share, {len(taken):,} taken; dropped: "
          + (', '.join(f'{n:,} {reason}' for reason, n in sorted(counts.items())) or 'none'))
    if len(taken) < samples:
        raise BadInput(f"{domain}: only {len(taken):,} of {samples:,} documents found. Lower --samples, loosen the bounds, or raise "
                       '--probe_fraction here and for the source.')
    return taken, dict(report, taken=len(taken), dropped=counts, dropped_documents=dropped)


def write_domain(domain, made_with, documents, report, settings):
    """Writes the domain's shard, text, report and meta.json. Returns meta.json's content."""
    folder = os.path.join(out, 'probe', domain)
    writer = PartWriter(folder, 0, made_with.vocab_size)
    for _, text in documents:
        ids = made_with.encode_document(text)
        writer.add('probe', np.concatenate((np.array([made_with.bos_id], ids.dtype), ids)), len(text.encode()))
    writer.commit(1, 0, done=True)
    lines = ''.join(json.dumps(dict(text=text, where=where), ensure_ascii=False) + '\n' for where, text in documents)
    write_atomic(os.path.join(folder, 'documents.jsonl.gz'), [gzip.compress(lines.encode(), mtime=0)])
    write_json(os.path.join(folder, 'report.json'), report)
    return finish_source(folder, made_with, settings, [writer.state])


def main():
    made_with = load_tokenizer(tokenizer)
    metas, grams = {}, None
    for domain in sources:
        name = importlib.import_module(f'prepare.{sources[domain]}').DATASET.name
        settings = dict(source=name, domains=sources, input=input, evaluation=evaluation, tokenizer=made_with.fingerprint,
                        samples=samples, probe_fraction=probe_fraction, bounds=[min_chars, max_chars, min_printable, min_score])
        metas[domain] = open_source(os.path.join(out, 'probe', domain), settings)
        if metas[domain] is None:
            grams = evaluation_grams() if grams is None else grams
            documents, report = choose(domain, grams)
            metas[domain] = write_domain(domain, made_with, documents, report, settings)
    print_table({f'probe/{domain}': meta for domain, meta in metas.items()})


if __name__ == '__main__':
    configure(globals())
    if not tokenizer:
        raise BadInput('--tokenizer is missing: a tiktoken name, a rank file, or a tokenizer.json.')
    if set(input) - set(sources):
        raise BadInput(f"input names the domain '{min(set(input) - set(sources))}', which sources do not. Domains: "
                       f"{', '.join(sources)}.")
    for domain, script in sources.items():
        if not os.path.isfile(os.path.join(os.path.dirname(os.path.abspath(__file__)), f'{script}.py')):
            raise BadInput(f"sources.{domain}: there is no script prepare/{script}.py.")
    main()
