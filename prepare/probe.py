"""Probe sets, one per domain, that re-weighting measures against -> data/probe/<domain>/.

    python prepare/probe.py --tokenizer=tokenizer.json --samples=1000
    python prepare/probe.py --tokenizer=tokenizer.json --sources="{'math': 'text'}" \\
        --input.math='my/*.jsonl' --evaluation='benchmarks/*.jsonl'

The candidates are the documents whose hash is in the last `probe_fraction`. The script of the
dataset keeps exactly these out of its training shards, so the two sets are disjoint, even for exact
duplicates. A candidate is dropped, counted and named in these cases:

- Its length, its share of unprintable characters or its score is outside the bounds.
- It shares 13 words in a row with an evaluation set (Brown et al. 2020, arXiv 2005.14165,
  appendix C).
- It is an exact or near duplicate of a document that was taken (MinHash over 5-word shingles,
  estimated Jaccard similarity 0.8; Broder 1997).

A domain is a source with one split, `probe`. Its documents.jsonl.gz holds the text and its
report.json what was dropped.
"""
import collections
import dataclasses
import gzip
import importlib
import itertools
import json
import os
import re

import _path  # noqa: F401  (import path)

import datasketch
from tqdm import tqdm

from configurator import BadInput, at_least, between, configure
from lib.reading import local_files, make_parts, records_in, remote_files
from lib.tokenizer import load_tokenizer
from prepare import inputs, shards
from prepare.common import document_of, hash_share, hub_files, plain_text, split_of

# -- knobs --
sources: dict[str, str] = {'code': 'starcoder', 'math': 'finemath', 'web': 'fineweb_edu'}
                                 # domain -> script in prepare/
input: dict[str, str] = {}       # domain -> local files instead of the hub
evaluation = 'core'              # local files of benchmarks. core: those of the recipe, from the
                                 # hub. '': no decontamination
tokenizer = ''                   # tiktoken name, rank file, tokenizer.json, or folder with one
samples: at_least(1) = 1000      # documents per domain
out = 'data'                     # folder of all sources. The probe sets go to <out>/probe/
probe_fraction: between(0.0, 1.0) = 0.005    # at most the probe_fraction of the source
min_chars: at_least(0) = 200     # shortest document
max_chars: at_least(1) = 20_000  # longest document
min_printable: between(0.0, 1.0) = 0.99      # share of printable characters, spaces and line ends
min_score: float | None = None   # of the record's field `score` (FineWeb-Edu, FineMath)

CORE = [f'hf://datasets/{name}' for name in (
    'allenai/ai2_arc@210d026faf9955653af8916fad021475a3f00453/ARC-*/test-*.parquet',
    'cais/mmlu@c30699e8356da336a370243923dbaf21066bb9fe/all/test-*.parquet',
    'Rowan/hellaswag@218ec52e09a7e7462a5400043bb9a69a41d06b76/data/validation-*.parquet',
    'google/boolq/data/validation-*.parquet',
    'allenai/winogrande@01e74176c63542e6b0bcb004dcdea22d94fb67b5/winogrande_xl/'
    'validation-*.parquet',
    'baber/piqa@142f6d7367fd9877f0fb3b5734ea6a545f54cdd1/**/*.parquet',
    'HuggingFaceH4/MATH-500/test.jsonl',
    'allenai/openbookqa@388097ea7776314e93a529163e0fea805b8a6454/main/test-*.parquet',
    'openai/openai_humaneval/**/*.parquet',
    'allenai/social_i_qa@refs%2Fconvert%2Fparquet/default/validation/*.parquet',
    'google-research-datasets/mbpp/full/test-*.parquet',
    'openai/gsm8k@740312add88f781978c0658806c59bc2815b9866/main/test-*.parquet')]
N_GRAM = 13
SHINGLE = 5
SIMILARITY = 0.8
BOUNDS = ('min_chars', 'max_chars', 'min_printable', 'min_score')


# -- contamination ---------------------------------------------------------------------------------


def words_of(text):
    # Copies of a text differ in punctuation, spaces and capitals.
    return re.findall(r'\w+', text.lower())


def n_grams(words, n):
    # Hashes take less memory than words. Those of strings differ in every process, so they must not
    # be stored.
    return {hash(tuple(words[i:i + n])) for i in range(len(words) - n + 1)}


def strings_in(record):
    """Yields all text in a record, however nested."""
    if isinstance(record, str):
        yield record
    elif isinstance(record, (dict, list)):
        for part in record.values() if isinstance(record, dict) else record:
            yield from strings_in(part)


def evaluation_grams(files):
    """Returns the 13-grams of all text in evaluation sets.

    Copies of a record without a text of 13 words cannot be found. Their number is printed.
    files: list of File. None: the benchmarks of CORE
    """
    if files == []:
        print('evaluation is empty: the probe sets are not checked against any benchmark')
        return set()
    if files is None:
        files, _ = remote_files(CORE)
    grams = set()
    n_records = 0
    n_short = 0
    for _, record in records_in(files, []):
        n_records += 1
        found = set()
        for text in strings_in(record):
            found |= n_grams(words_of(text), N_GRAM)
        n_short += not found
        grams |= found
    print(
        f'evaluation: {len(files)} files, {n_records:,} records, {len(grams):,} different runs of '
        f'{N_GRAM} words')
    if n_short:
        print(
            f'evaluation: {n_short:,} records have no text of {N_GRAM} words, so documents that '
            'quote them are not dropped')
    return grams


# -- documents -------------------------------------------------------------------------------------


def dataset_of(script):
    """Returns the Dataset of a script in prepare/. Raises BadInput if it has none."""
    here = os.path.dirname(os.path.abspath(__file__))
    if not script.isidentifier() or not os.path.isfile(os.path.join(here, f'{script}.py')):
        raise BadInput(f'sources: there is no script prepare/{script}.py.')
    module = importlib.import_module(f'prepare.{script}')
    if not hasattr(module, 'DATASET'):
        raise BadInput(f'sources: prepare/{script}.py makes no source of one dataset.')
    return module.DATASET


def fault_of(text, record, config, grams, known):
    """Returns why a candidate is dropped, in one or two words, or None. A good one gets known.

    grams  13-grams of the evaluation sets
    known  datasketch.MinHashLSH of the documents that were taken
    """
    # The sketch costs the most, so all other tests come before it.
    if not config['min_chars'] <= len(text) <= config['max_chars']:
        return 'length'
    if sum(c.isprintable() or c.isspace() for c in text) < config['min_printable'] * len(text):
        return 'unprintable'
    if config['min_score'] is not None and score_of(record) < config['min_score']:
        return 'score'
    words = words_of(text)
    if not grams.isdisjoint(n_grams(words, N_GRAM)):
        return 'contaminated'
    if text in known:
        return 'exact duplicate'
    # A text of fewer than five words still has one shingle.
    starts = range(max(1, len(words) - SHINGLE + 1))
    sketch = datasketch.MinHash(num_perm=128, seed=1)
    sketch.update_batch([' '.join(words[i:i + SHINGLE]).encode() for i in starts])
    if known.query(sketch):
        return 'near duplicate'
    known.insert(text, sketch)
    return None


def score_of(record):
    """Returns the field `score` of a record. Raises ValueError if it is no number."""
    score = record.get('score') if isinstance(record, dict) else None
    if not isinstance(score, (int, float)):
        raise ValueError("min_score needs a number in the field 'score'")
    return score


def candidates(dataset, files, probe_fraction, report):
    """Yields (where, text, record) of the records whose hash chooses them. report counts them."""
    parts = make_parts(files)       # the order in which the script of the dataset reads them
    for where, record in records_in(itertools.chain(*parts), dataset.columns):
        try:
            text = document_of(record, dataset)
            if isinstance(text, list):
                raise ValueError('it is a conversation, and probe sets are of text')
            share = hash_share(plain_text(text)) if text else 0
        except ValueError as error:
            raise BadInput(f'{where}: {error}. Fix or drop the record.') from None
        report['read'] += 1
        # val has the low end of the shares and the probe the high one, so val's fraction can be 0.
        if split_of(share, 0, probe_fraction) == 'probe':
            report['candidates'] += 1
            yield where, text, record


def choose(domain, files, config, grams):
    """Chooses the documents of a domain. Returns ([(where, text)], report).

    files: list of File. None: those of the domain's script on the hub
    The report says what was read, taken, and dropped for which reason. Raises BadInput if there are
    too few documents, or if the source was trained on some of them.
    """
    dataset = dataset_of(config['sources'][domain])
    source = os.path.join(config['out'], dataset.name)
    settings = shards.settings_of(source)
    asked = config['probe_fraction']
    # A source that another script made, such as adopt.py, keeps nothing out.
    kept_out = 0.0 if settings is None else settings.get('probe_fraction', 0.0)
    if settings is not None and kept_out < asked:
        raise BadInput(
            f'{source} keeps only {kept_out} of its documents out of training, '
            f'probe_fraction = {asked} asks for more. Lower it, or prepare the source again.')
    if files is None:
        files, _ = hub_files(dataset, dataset.files)
    # A parquet file is read only in the columns that are named.
    if config['min_score'] is not None:
        dataset = dataclasses.replace(dataset, columns=[*dataset.columns, 'score'])
    known = datasketch.MinHashLSH(threshold=SIMILARITY, num_perm=128)
    taken = []
    report = collections.Counter()
    dropped = collections.defaultdict(list)
    with tqdm(total=config['samples'], desc=domain, unit='doc') as bar:
        for where, text, record in candidates(dataset, files, asked, report):
            try:
                fault = fault_of(text, record, config, grams, known)
            except ValueError as error:
                raise BadInput(f'{where}: {error}.') from None
            if fault is not None:
                dropped[fault].append(where)
                continue
            taken.append((where, text))
            bar.update()
            if len(taken) == config['samples']:
                break
    counts = {fault: len(where) for fault, where in sorted(dropped.items())}
    drops = ', '.join(f'{n:,} {fault}' for fault, n in counts.items()) or 'none'
    print(
        f"{domain}: {report['read']:,} documents read, {report['candidates']:,} in the share of "
        f'the probe, {len(taken):,} taken; dropped: {drops}')
    if len(taken) < config['samples']:
        raise BadInput(
            f"{domain}: only {len(taken):,} of {config['samples']:,} documents found. Lower "
            '--samples, loosen the bounds, or raise --probe_fraction here and for the source.')
    return taken, dict(report, taken=len(taken), dropped=counts, dropped_documents=dropped)


def main(config):
    made_with = load_tokenizer(config['tokenizer'])
    # Local files are known by their content. Those of the hub are known by their URLs, so that
    # complete sets need no network. None stands for them.
    benchmarks = None
    known_benchmarks = CORE
    if config['evaluation'] == '':
        benchmarks = known_benchmarks = []
    elif config['evaluation'] != 'core':
        benchmarks, _ = inputs.with_content(local_files(config['evaluation']))
        known_benchmarks = inputs.fingerprint(benchmarks)
    metas = {}
    grams = None
    for domain, script in config['sources'].items():
        probes = os.path.join(config['out'], 'probe')
        folder = shards.source_folder(probes, domain, 'sources')
        dataset = dataset_of(script)
        files = None
        known_files = dataset.files
        if domain in config['input']:
            files, _ = inputs.with_content(local_files(config['input'][domain]))
            known_files = inputs.fingerprint(files)
        settings = dict(
            source=dataset.name, domains=config['sources'], files=known_files,
            evaluation=known_benchmarks, tokenizer=made_with.fingerprint,
            bounds=[config[key] for key in BOUNDS], samples=config['samples'],
            probe_fraction=config['probe_fraction'])
        meta = shards.open_source(folder, settings)
        if meta is None:
            # Reading the benchmarks takes long. Sets that are complete do not need them.
            if grams is None:
                grams = evaluation_grams(benchmarks)
            documents, report = choose(domain, files, config, grams)
            lines = ''
            for where, text in documents:
                lines += json.dumps(dict(text=text, where=where), ensure_ascii=False) + '\n'
            # gzip stores the time of writing, which would change the bytes from run to run.
            more_files = [
                ('documents.jsonl.gz', gzip.compress(lines.encode(), mtime=0)),
                ('report.json', shards.json_bytes(report))]
            encoded = (shards.encode_text(made_with, text) for _, text in documents)
            meta = shards.write_source(
                folder, made_with, settings, {'probe': encoded}, more_files)
        metas[f'probe/{domain}'] = meta
    shards.print_table(metas)


if __name__ == '__main__':
    config = configure(globals())
    if not tokenizer:
        raise BadInput('--tokenizer is missing: a tiktoken name, a rank file, or a tokenizer.json.')
    if not sources:
        raise BadInput("sources is empty. Example: --sources=\"{'math': 'finemath'}\"")
    if min_chars > max_chars:
        raise BadInput(f'min_chars = {min_chars} is larger than max_chars = {max_chars}.')
    for domain in input:
        if domain not in sources:
            raise BadInput(
                f"input names the domain '{domain}', which sources do not. Domains: "
                f"{', '.join(sources)}.")
    main(config)
