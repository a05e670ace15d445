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
from prepare.common import hash_share
from tests import test_prepare
from tests.conftest import assert_one_sentence, run, run_here, write_shard
from tests.test_prepare import (
    assert_refused,
    contents,
    documents_in,
    prepare,
    read_meta,
    total,
    write_lines,
)

byte_tokenizer = test_prepare.byte_tokenizer        # fixtures
knobs = test_prepare.knobs


def sentences(n, seed):
    """Documents of 40 to 80 made-up words, all different."""
    rng = random.Random(seed)
    texts = []
    for _ in range(n):
        words = []
        for _ in range(rng.randint(40, 80)):
            words.append(''.join(rng.choice('abcdefghij') for _ in range(rng.randint(2, 7))))
        texts.append(' '.join(words))
    return texts


def is_candidate(text):
    return hash_share(text.encode()) >= 0.9


def candidate(make):
    """The first variant make(0), make(1), ... whose own hash is in the last tenth."""
    return next(text for text in map(make, range(2000)) if is_candidate(text))


def probe(out, tokenizer, texts, *arguments):
    return run([
        sys.executable, 'prepare/probe.py', f'--tokenizer={tokenizer}', f'--out={out}',
        "--sources={'math': 'text'}", f'--input.math={texts}', *arguments])


def chosen(folder):
    with gzip.open(folder / 'probe/math/documents.jsonl.gz', 'rt') as f:
        return [json.loads(line)['text'] for line in f]


def test_probe_documents_are_good_different_and_in_no_training_shard(tmp_path, knobs):
    tokenizer = load_tokenizer(knobs['tokenizer'])
    texts = sentences(3000, seed=0)
    candidates = [text for text in texts if is_candidate(text)]
    near = candidate(lambda i: candidates[0] + f' and{i}')
    copied = ' '.join(candidates[1].split()[5:18])          # 13 words in a row
    short = candidate(lambda i: f'short {i}')
    binary = candidate(lambda i: sentences(1, i + 10**6)[0] + '\x00' * 40)
    path = write_lines(tmp_path / 'in.jsonl', [*texts, near, candidates[2], short, binary])
    item = {'question': {'stem': f'Is it so: {copied.upper()}?'}, 'label': 1}
    (tmp_path / 'eval.jsonl').write_text(json.dumps(item) + '\n')
    arguments = [f'--evaluation={tmp_path / "eval.jsonl"}', '--probe_fraction=0.1']
    n = len(candidates)
    done = probe(tmp_path, knobs['tokenizer'], path, f'--samples={n - 1}', *arguments)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / 'probe/math/report.json').read_text())
    assert report['read'] <= 3004 and report['dropped']['contaminated'] == 1
    taken = chosen(tmp_path)
    assert len(taken) == n - 1 and set(taken) <= {*candidates, near}
    assert candidates[1] not in taken and len({candidates[0], near} & set(taken)) <= 1
    # With more samples than there are, everything is read and every planted fault is named.
    greedy = probe(tmp_path / 'all', knobs['tokenizer'], path, f'--samples={n + 1}', *arguments)
    message = f'only {n - 1} of {n + 1:,} documents'
    assert_one_sentence(greedy, 2, message, '--probe_fraction')
    drops = '1 contaminated, 1 exact duplicate, 1 length, 1 near duplicate, 1 unprintable'
    assert re.search(f'dropped: {drops}', greedy.stdout), greedy.stdout
    # The source's own script keeps the probe set out of its training and validation shards.
    knobs.update(source='text', input=path)
    assert_refused('some of it would be trained on', '--probe_fraction=0.1', **knobs)
    prepare(**knobs, probe_fraction=0.1)

    def texts_of(folder):
        found = set()
        for shard in (tmp_path / folder).glob('*.bin'):
            found.update(map(tokenizer.decode, documents_in(shard, tokenizer.bos_id)))
        return found

    probe_texts = texts_of('probe/math/probe')
    trained = texts_of('text/train')
    assert probe_texts == set(taken) and len(trained) > 2000
    assert probe_texts.isdisjoint(trained | texts_of('text/val'))
    # Training reads the probe set as a source.
    assert Source(tmp_path / 'probe', 'math', 'probe', 64).n_windows > 100
    stray = probe(tmp_path, knobs['tokenizer'], path, "--sources={'more': 'text'}")
    assert_one_sentence(stray, 2, 'input names the domain')


def test_probe_refuses_a_source_that_keeps_too_little_out(tmp_path, knobs):
    path = write_lines(tmp_path / 'in.jsonl', sentences(200, seed=1))
    prepare(**{**knobs, 'source': 'text', 'input': path})
    arguments = ['--samples=5', '--evaluation=', '--probe_fraction=0.2']
    done = probe(tmp_path, knobs['tokenizer'], path, *arguments)
    assert_one_sentence(done, 2, '0.005', 'probe_fraction = 0.2', 'Lower it')
    assert not (tmp_path / 'probe/math/meta.json').exists()


def test_score_and_repeatability(tmp_path, byte_tokenizer):
    texts = sentences(1000, seed=2)
    lines = [json.dumps({'text': text, 'score': i % 5}) + '\n' for i, text in enumerate(texts)]
    (tmp_path / 'in.jsonl').write_text(''.join(lines))
    arguments = ['--samples=8', '--evaluation=', '--probe_fraction=0.1', '--min_score=4']
    for folder in ('a', 'b'):
        done = probe(tmp_path / folder, byte_tokenizer, tmp_path / 'in.jsonl', *arguments)
        assert done.returncode == 0, done.stderr
        assert 'not checked against any benchmark' in done.stdout
    assert contents(tmp_path / 'a') == contents(tmp_path / 'b')
    assert all(texts.index(text) % 5 == 4 for text in chosen(tmp_path / 'a'))


# -- adopted shards --------------------------------------------------------------------------------


def adopt(folder, tokenizer, out):
    run_here(['prepare/adopt.py', '--source=x', f'--input={folder / "*.bin"}',
              f'--tokenizer={tokenizer}', f'--out={out}'])


def test_foreign_shards_become_a_source_by_links_alone(tmp_path, byte_tokenizer):
    tokenizer = load_tokenizer(byte_tokenizer)
    texts = sentences(60, seed=3)
    parts = {'val_000000': texts[:10], 'train_000001': texts[10:40], 'train_000002': texts[40:]}
    for name, part in parts.items():
        ids = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in part]
        write_shard(tmp_path / 'in' / f'fineweb_{name}.bin', np.concatenate(ids), 259)
    for _ in range(2):              # the second time it is complete already
        adopt(tmp_path / 'in', byte_tokenizer, tmp_path)
    meta = read_meta(tmp_path / 'x')
    documents = {split: about['documents'] for split, about in meta['splits'].items()}
    assert documents == {'train': 50, 'val': 10}
    assert total(meta, 'bytes') == sum(len(text.encode()) for text in texts)
    assert (tmp_path / 'x/train/fineweb_train_000001.bin').is_symlink()
    row = Source(tmp_path, 'x', 'val', 30, vocab_size=259).rows([0])[0].tolist()
    assert tokenizer.decode([t for t in row if t != tokenizer.bos_id]) in ''.join(texts)


def test_shards_of_another_tokenizer_are_not_adopted(tmp_path, byte_tokenizer):
    for tokens, message in (([258, 70, 900], 'token id 900'), ([70, 71, 72], 'never occurs')):
        write_shard(tmp_path / 'a.bin', np.array(tokens), 1000)
        with pytest.raises(BadInput, match=message):
            adopt(tmp_path, byte_tokenizer, tmp_path / 'out')
    (tmp_path / 'a.bin').write_bytes(b'\0' * 3000)
    open_shard.cache_clear()
    with pytest.raises(BadInput, match='no token shard'):
        adopt(tmp_path, byte_tokenizer, tmp_path / 'out')
