"""Probe sets and adopted shards."""
import gzip
import json
import random
import re
import sys

from tests.conftest import need

need('orjson', 'isal')

import numpy as np
import pytest

from configurator import BadInput
from data import Source
from lib.shards import open_shard
from lib.tokenizer import load_tokenizer
from prepare.adopt import split_of
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
cache_folder = test_prepare.cache_folder
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
    short_item = {'question': {'stem': 'Too short to be found?'}, 'label': 0}
    (tmp_path / 'eval.jsonl').write_text(f'{json.dumps(item)}\n{json.dumps(short_item)}\n')
    arguments = [f'--evaluation={tmp_path / "eval.jsonl"}', '--probe_fraction=0.1']
    n = len(candidates)
    done = probe(tmp_path, knobs['tokenizer'], path, f'--samples={n - 1}', *arguments)
    assert done.returncode == 0, done.stderr
    assert 'evaluation: 1 records have no text of 13 words' in done.stdout
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


def probe_here(out, tokenizer, *arguments):
    run_here(['prepare/probe.py', f'--tokenizer={tokenizer}', f'--out={out}', *arguments])


@pytest.mark.parametrize('arguments, message', [
    (['--sources={}'], 'sources is empty'),
    (["--sources={'math': 'common'}"], 'prepare/common.py makes no source'),
    (["--sources={'math': 'dolmino'}"], 'prepare/dolmino.py makes no source'),
    (["--sources={'math': '../train'}"], 'no script prepare/../train.py'),
    (["--sources={'../x': 'text'}", '--input={}'], "'../x' cannot be the name"),
    (['--input.math=chat.jsonl', "--sources={'math': 'tulu3'}"], 'chat.jsonl:1: .*conversation'),
    (['--min_score=1'], "in.jsonl:1: min_score needs a number in the field 'score'"),
    (['--min_chars=9', '--max_chars=8'], 'min_chars = 9 is larger'),
    (['--samples=0'], 'samples = 0'), (['--probe_fraction=-1'], 'probe_fraction = -1'),
    (['--probe_fraction=2'], 'probe_fraction = 2'), (['--min_printable=2'], 'min_printable = 2'),
    (['--evaluation=in.xlsx'], 'in.xlsx: files with this ending')])
def test_mistakes_in_probe_sets_are_named(tmp_path, byte_tokenizer, arguments, message):
    messages = [{'role': role, 'content': 'x'} for role in ('user', 'assistant')]
    (tmp_path / 'chat.jsonl').write_text(json.dumps({'messages': messages}))
    (tmp_path / 'in.jsonl').write_text(json.dumps({'text': 'hello', 'score': 'high'}))
    (tmp_path / 'in.xlsx').write_text('hello')
    arguments = [re.sub(r'=(in|chat)[.]', rf'={tmp_path}/\1.', argument) for argument in arguments]
    with pytest.raises(BadInput, match=message):
        probe_here(
            tmp_path / 'out', byte_tokenizer, "--sources={'math': 'text'}", '--evaluation=',
            f'--input.math={tmp_path}/in.jsonl', '--min_chars=0', '--probe_fraction=1', *arguments)


def test_probe_sets_of_edited_texts_are_others(tmp_path, byte_tokenizer, capsys):
    texts = sentences(60, seed=4)
    arguments = ["--sources={'math': 'text'}", '--samples=3', '--probe_fraction=0.5']

    def draw(path, benchmark):
        probe_here(
            tmp_path / 'out', byte_tokenizer, f'--input.math={path}', f'--evaluation={benchmark}',
            *arguments)

    path = write_lines(tmp_path / 'in.jsonl', texts)
    benchmark = write_lines(tmp_path / 'eval.jsonl', ['a question of ' + 'many words ' * 9])
    draw(path, benchmark)
    copy = write_lines(tmp_path / 'copy/in.jsonl', texts)
    draw(copy, benchmark)       # complete already, and the same content
    for edited in (copy, benchmark):
        content = edited.read_text()
        edited.write_text(content.swapcase().replace('TEXT', 'text'))
        with pytest.raises(BadInput, match='made with other settings .(files|evaluation).'):
            draw(copy, benchmark)
        edited.write_text(content)


# -- adopted shards --------------------------------------------------------------------------------


def adopt(folder, tokenizer, out, pattern='*.bin'):
    open_shard.cache_clear()
    run_here(['prepare/adopt.py', '--source=x', f'--input={folder / pattern}',
              f'--tokenizer={tokenizer}', f'--out={out}'])


@pytest.mark.parametrize('path, split', [
    ('dump/shard_000.bin', 'train'), ('x/retrieval_000.bin', 'train'), ('x/web_val_0.bin', 'val'),
    ('x/val/000.bin', 'val'), ('validation/000.bin', 'val'), ('x/a-validation-1.bin', 'val'),
    ('x/val.bin', 'val'), ('x/val000.bin', 'val'), ('x/VAL_0.bin', 'val'), ('Val/0.bin', 'val'),
    ('x/interval.bin', 'train'), ('x/valid_0.bin', 'train'), ('val/x/0.bin', 'train'),
    ('x/value_1.bin', 'train'), ('evaluation/0.bin', 'train')])
def test_the_word_val_makes_a_validation_shard(path, split):
    assert split_of(f'/data/{path}') == split


def make_shards(folder, tokenizer, texts):
    """Writes a shard for every text. texts: path below `folder` -> text."""
    for name, text in texts.items():
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        write_shard(folder / name, np.array(ids), 259)


def test_shards_of_one_name_are_refused_and_those_of_folders_kept_apart(tmp_path, byte_tokenizer):
    tokenizer = load_tokenizer(byte_tokenizer)
    make_shards(tmp_path, tokenizer, {'in/a/0.bin': 'one', 'in/b/0.bin': 'two words'})
    with pytest.raises(BadInput, match='in/a/0.bin and .*in/b/0.bin would both be train/0.bin'):
        adopt(tmp_path, byte_tokenizer, tmp_path / 'out', 'in/*/0.bin')
    make_shards(tmp_path, tokenizer, {'two/train/0.bin': 'one', 'two/val/0.bin': 'two words'})
    adopt(tmp_path, byte_tokenizer, tmp_path / 'out', 'two/*/0.bin')
    splits = read_meta(tmp_path / 'out/x')['splits']
    assert {split: about['bytes'] for split, about in splits.items()} == {'train': 3, 'val': 9}
    for split in splits:
        link = tmp_path / 'out/x' / split / '0.bin'
        assert link.resolve() == tmp_path / 'two' / split / '0.bin'


def test_no_link_is_kept_that_is_not_asked_for(tmp_path, byte_tokenizer):
    tokenizer = load_tokenizer(byte_tokenizer)
    make_shards(tmp_path, tokenizer, {'a/0.bin': 'one', 'a/1.bin': 'two', 'b/0.bin': 'three'})
    make_shards(tmp_path, tokenizer, {'c/0.bin': 'three'})
    # As a killed run leaves it: links and no meta.json.
    adopt(tmp_path / 'a', byte_tokenizer, tmp_path)
    (tmp_path / 'x/meta.json').unlink()
    (tmp_path / 'x/progress').mkdir()
    adopt(tmp_path / 'b', byte_tokenizer, tmp_path)
    links = {path.name: path.resolve() for path in (tmp_path / 'x/train').iterdir()}
    assert links == {'0.bin': tmp_path / 'b/0.bin'}
    # With meta.json nothing is replaced.
    with pytest.raises(BadInput, match=r'other settings \(files\)'):
        adopt(tmp_path / 'a', byte_tokenizer, tmp_path)
    with pytest.raises(BadInput, match='0.bin is not a link to .*c/0.bin, but to .*b/0.bin'):
        adopt(tmp_path / 'c', byte_tokenizer, tmp_path)
    make_shards(tmp_path, tokenizer, {'b/0.bin': 'threE'})
    with pytest.raises(BadInput, match=r'other settings \(files\)'):
        adopt(tmp_path / 'b', byte_tokenizer, tmp_path)


@pytest.mark.parametrize('name, message', [
    ('folder', 'is a folder. Name its files'), ('a.txt', 'no shard, which is a file with'),
    ('gone.bin', 'is a link to nowhere, which does not exist'), ('none*', 'matches no file')])
def test_what_is_no_shard_is_not_adopted(tmp_path, byte_tokenizer, name, message):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'a.txt').touch()
    (tmp_path / 'gone.bin').symlink_to('nowhere')
    with pytest.raises(BadInput, match=message):
        adopt(tmp_path, byte_tokenizer, tmp_path / 'out', name)


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
