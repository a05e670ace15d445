"""Probe sets and adopted shards."""
import gzip
import json
import random
import re
import sys

import numpy as np
import pytest

from configurator import BadInput
from data import Source, open_shard
from lib.tokenizer import load_tokenizer
from tests.conftest import assert_one_sentence, run, write_shard
from tests.test_datasets import run_script
from tests.test_prepare import byte_tokenizer, contents, prepare, write_lines  # noqa: F401  (a fixture among them)


def sentences(n, seed):
    """Documents of 40 to 80 made-up words, all different."""
    rng = random.Random(seed)
    return [' '.join(''.join(rng.choice('abcdefghij') for _ in range(rng.randint(2, 7))) for _ in range(rng.randint(40, 80)))
            for _ in range(n)]


def share(text):
    import hashlib
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32


def probe(tmp_path, tokenizer, *arguments):
    return run([sys.executable, 'prepare/probe.py', f'--tokenizer={tokenizer}', f'--out={tmp_path}', "--sources={'math': 'text'}",
                f'--input.math={tmp_path / "in.jsonl"}', *arguments])


def chosen(tmp_path):
    with gzip.open(tmp_path / 'probe/math/documents.jsonl.gz', 'rt') as f:
        return [json.loads(line)['text'] for line in f]


def test_probe_documents_are_good_different_and_in_no_training_shard(tmp_path, byte_tokenizer):  # noqa: F811
    texts = sentences(3000, seed=0)
    candidates = [t for t in texts if share(t) >= 0.9]

    def in_probe(make):       # a variant whose own hash falls into the probe's share
        return next(t for t in map(make, range(2000)) if share(t) >= 0.9)
    near = in_probe(lambda i: candidates[0] + f' and{i}')
    copied = ' '.join(candidates[1].split()[5:18])                       # 13 words in a row of an evaluation item
    short, binary = in_probe(lambda i: f'short {i}'), in_probe(lambda i: sentences(1, i + 10**6)[0] + '\x00' * 40)
    lines = texts + [near, candidates[2], short, binary]
    write_lines(tmp_path / 'in.jsonl', lines)
    (tmp_path / 'eval.jsonl').write_text(json.dumps({'question': {'stem': f'Is it so: {copied.upper()}?'}, 'label': 1}) + '\n')
    n = len(candidates)
    arguments = [f'--evaluation={tmp_path / "eval.jsonl"}', '--probe_fraction=0.1']
    done = probe(tmp_path, byte_tokenizer, f'--samples={n - 1}', *arguments)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / 'probe/math/report.json').read_text())
    assert report['read'] <= 3004 and report['dropped']['contaminated'] == 1
    taken = chosen(tmp_path)
    assert len(taken) == n - 1 and set(taken) <= {*candidates, near} and candidates[1] not in taken
    assert len({candidates[0], near} & set(taken)) <= 1
    # one more than there is: everything is read, every planted fault named
    greedy = probe(tmp_path / 'greedy', byte_tokenizer, f'--samples={n + 1}', f'--input.math={tmp_path / "in.jsonl"}', *arguments)
    assert_one_sentence(greedy, 2, f'only {n - 1} of {n + 1:,} documents', '--probe_fraction')
    assert re.search('dropped: 1 contaminated, 1 exact duplicate, 1 length, 1 near duplicate, 1 unprintable', greedy.stdout), greedy.stdout
    # the source itself, made by its own script: its training and validation shards hold none of the probe
    assert_one_sentence(prepare('source=text', f'input={tmp_path / "in.jsonl"}', f'tokenizer={byte_tokenizer}', f'out={tmp_path}'), 2,
                        'some of it would be trained on', '--probe_fraction=0.1')
    assert prepare('source=text', f'input={tmp_path / "in.jsonl"}', f'tokenizer={byte_tokenizer}', f'out={tmp_path}',
                   'probe_fraction=0.1', 'workers=0').returncode == 0
    tokenizer = load_tokenizer(byte_tokenizer)

    def texts_of(folder):
        found = set()
        for path in folder.glob('*.bin'):
            stream = np.frombuffer(path.read_bytes(), '<u2', offset=1024)
            found |= {tokenizer.decode(part[1:].tolist()) for part in np.split(stream, np.flatnonzero(stream == tokenizer.bos_id))[1:]}
        return found
    probe_texts = texts_of(tmp_path / 'probe/math/probe')
    assert probe_texts == set(taken)
    assert probe_texts.isdisjoint(texts_of(tmp_path / 'text/train') | texts_of(tmp_path / 'text/val'))
    assert len(texts_of(tmp_path / 'text/train')) > 2000
    assert Source(tmp_path / 'probe', 'math', 'probe', 64).n_windows > 100          # what training reads
    wider = probe(tmp_path, byte_tokenizer, '--samples=10', '--probe_fraction=0.2', '--sources.more=text', f'--input.more={tmp_path / "in.jsonl"}',
                  "--sources={'more': 'text'}")
    assert_one_sentence(wider, 2, 'input names the domain')


def test_probe_refuses_a_source_that_keeps_too_little_out(tmp_path, byte_tokenizer):  # noqa: F811
    write_lines(tmp_path / 'in.jsonl', sentences(200, seed=1))
    assert prepare('source=text', f'input={tmp_path / "in.jsonl"}', f'tokenizer={byte_tokenizer}', f'out={tmp_path}', 'workers=0').returncode == 0
    done = probe(tmp_path, byte_tokenizer, '--samples=5', '--evaluation=', '--probe_fraction=0.2')
    assert_one_sentence(done, 2, '0.005', 'probe_fraction = 0.2', 'Lower it')
    assert not (tmp_path / 'probe/math/meta.json').exists()


def test_score_and_repeatability(tmp_path, byte_tokenizer):  # noqa: F811
    texts = sentences(1000, seed=2)
    (tmp_path / 'in.jsonl').write_text(''.join(json.dumps({'text': t, 'score': i % 5}) + '\n' for i, t in enumerate(texts)))
    arguments = ['--samples=8', '--evaluation=', '--probe_fraction=0.1', '--min_score=4']
    for folder in ('a', 'b'):
        done = probe(tmp_path / folder, byte_tokenizer, *arguments, f'--input.math={tmp_path / "in.jsonl"}')
        assert done.returncode == 0 and 'not checked against any benchmark' in done.stdout, done.stderr
    assert contents(tmp_path / 'a') == contents(tmp_path / 'b')
    assert all(texts.index(t) % 5 == 4 for t in chosen(tmp_path / 'a'))


# -- adopted shards ----------------------------------------------------------------------------------------------------

def test_foreign_shards_become_a_source_by_links_alone(tmp_path, byte_tokenizer):  # noqa: F811
    tokenizer, texts = load_tokenizer(byte_tokenizer), sentences(60, seed=3)
    for name, part in (('fineweb_val_000000.bin', texts[:10]), ('fineweb_train_000001.bin', texts[10:40]), ('fineweb_train_000002.bin', texts[40:])):
        write_shard(tmp_path / 'in' / name, np.concatenate([[tokenizer.bos_id, *tokenizer.encode(t)] for t in part]), 259)
    arguments = ['--source=fineweb', f'--input={tmp_path / "in/*.bin"}', f'--tokenizer={byte_tokenizer}', f'--out={tmp_path}']
    assert run_script('adopt', *arguments) == 0
    meta = json.loads((tmp_path / 'fineweb/meta.json').read_text())
    assert {s: n['documents'] for s, n in meta['splits'].items()} == {'train': 50, 'val': 10}
    assert sum(n['bytes'] for n in meta['splits'].values()) == sum(len(t.encode()) for t in texts)
    assert (tmp_path / 'fineweb/train/fineweb_train_000001.bin').is_symlink()
    row = Source(tmp_path, 'fineweb', 'val', 30, vocab_size=259).rows([0])[0]
    assert tokenizer.decode([t for t in row.tolist() if t != tokenizer.bos_id]) in ''.join(texts)
    assert run_script('adopt', *arguments) == 0                          # again: complete already


def test_shards_of_another_tokenizer_are_not_adopted(tmp_path, byte_tokenizer, capsys):  # noqa: F811
    def adopt():
        return run_script('adopt', '--source=x', f'--input={tmp_path / "*.bin"}', f'--tokenizer={byte_tokenizer}', f'--out={tmp_path / "out"}')
    for tokens, message in (([258, 70, 900], 'token id 900'), ([70, 71, 72], 'never occurs')):
        write_shard(tmp_path / 'a.bin', np.array(tokens), 1000)
        with pytest.raises(BadInput, match=message):
            adopt()
    (tmp_path / 'a.bin').write_bytes(b'\0' * 3000)
    open_shard.cache_clear()
    with pytest.raises(BadInput, match='no token shard'):
        adopt()
