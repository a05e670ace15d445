"""Preparing text: formats, kills, ranks, limits, broken input, tokenizers, and the demo's data."""
import bz2
import concurrent.futures
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

from tests.conftest import need

need('pyarrow', 'orjson', 'isal')

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from configurator import BadInput
from data import Source
from lib import reading
from lib import tokenizer as tokenizer_module
from lib.byte_level import DIGITS_PATTERN, GPT2_PATTERN, LLAMA3_PATTERN
from lib.shards import open_shard
from lib.tokenizer import load_tokenizer, make_tokenizer, save_tokenizer
from prepare import inputs
from prepare.adopt import find_shards
from prepare.common import PrepareConfig, check_space, find_rank
from prepare.demo import cut_docstrings, math_problem
from prepare.shards import lock, source_folder
from tests.conftest import ROOT, assert_one_sentence, run, run_here, run_ranks

WORDS = 'the cat sat on a mat and then it ran away from 12 dogs near 305 old houses naïve café 中文'
WORDS = [*WORDS.split(), '\n\n']
END = '<|endoftext|>'


def documents(n, seed=0):
    rng = random.Random(seed)
    return [' '.join(rng.choice(WORDS) for _ in range(rng.randint(1, 400))) for _ in range(n)]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    """A cache of hashes for each test, so that none comes into the user's folder."""
    folder = tmp_path_factory.mktemp('cache')
    monkeypatch.setenv('XDG_CACHE_HOME', str(folder))
    return folder / 'cheapertraining/inputs'


@pytest.fixture
def byte_tokenizer(tmp_path):
    """256 bytes, ' t' and 'he', and an end-of-text token, saved as a rank file."""
    ranks = {bytes([b]): b for b in range(256)} | {b' t': 256, b'he': 257}
    folder = tmp_path / 'tok'
    folder.mkdir()
    save_tokenizer(str(folder), make_tokenizer('x', ranks, GPT2_PATTERN, {END: 258}, END))
    return str(folder)


@pytest.fixture
def knobs(tmp_path, byte_tokenizer):
    """Knobs of prepare/text.py for a source x in tmp_path. The tests add --input."""
    return dict(source='x', tokenizer=byte_tokenizer, out=tmp_path, workers=0)


def command(**knobs):
    """The command line of prepare/text.py."""
    return [sys.executable, 'prepare/text.py', *(f'--{key}={knobs[key]}' for key in knobs)]


def prepare(env=None, **knobs):
    """Runs prepare/text.py, which must succeed. Returns what it prints."""
    done = run(command(**knobs), **(env or {}))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_refused(*parts, **knobs):
    assert_one_sentence(run_ranks(command(**knobs), 1), 2, *parts)


def refusal(**knobs):
    """The message with which prepare/text.py, run in this process, refuses its input."""
    with pytest.raises(BadInput) as error:
        run_here(command(**knobs))
    return str(error.value)


def contents(folder):
    files = [path for path in sorted(folder.rglob('*')) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read_meta(folder):
    return json.loads((folder / 'meta.json').read_text())


def total(meta, key):
    return sum(split[key] for split in meta['splits'].values())


def documents_in(path, bos_id):
    """The token ids of every document of a shard of 16 bits, without BOS."""
    stream = np.frombuffer(path.read_bytes(), dtype='<u2', offset=1024)
    return [part[1:].tolist() for part in np.split(stream, np.flatnonzero(stream == bos_id))[1:]]


def records_of(file, skip=0):
    """[(number, record)] of a File after its first `skip` records."""
    batches = reading.read_batches(file, ['text'], skip)
    return [entry for batch in batches for entry in reading.records_of(batch)]


def write_lines(path, texts, field='text'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps({field: text}) + '\n' for text in texts))
    return path


@pytest.fixture(scope='module')
def many_files(tmp_path_factory):
    """A folder of seven files of 1 to 3 MB, which make several parts."""
    folder = tmp_path_factory.mktemp('many')
    for i in range(7):
        write_lines(folder / f'{i}.jsonl', documents(1500 + 700 * (i % 3), seed=i))
    return folder


def table_bytes(texts, delimiter):
    """A CSV file with the texts in the column `body`, as Python's csv writes it."""
    out = io.StringIO(newline='')
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerows([['id', 'body'], *enumerate(texts)])
    return out.getvalue().encode()


def arrow_bytes(table, new=pyarrow.ipc.new_stream, rows=7):
    out = io.BytesIO()
    with new(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return out.getvalue()


def test_text_of_every_form_becomes_the_same_tokens(tmp_path, knobs):
    texts = documents(60)
    lines = write_lines(tmp_path / 'a.jsonl', texts, 'body').read_bytes()
    (tmp_path / 'b.jsonl.gz').write_bytes(gzip.compress(lines, mtime=0))
    (tmp_path / 'c.jsonl.zst').write_bytes(pyarrow.compress(lines, codec='zstd', asbytes=True))
    table = pyarrow.table({'body': texts})
    pyarrow.parquet.write_table(table, tmp_path / 'd.parquet')
    forms = {
        'e.jsonl.xz': lzma.compress(lines), 'f.JL.BZ2': bz2.compress(lines),
        'g.csv': table_bytes(texts, ','),
        'h.tsv.gz': gzip.compress(table_bytes(texts, '\t'), mtime=0),
        'i.arrow': arrow_bytes(table), 'j.arrow': arrow_bytes(table, pyarrow.ipc.new_file)}
    for name, content in forms.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / 'folder').mkdir()
    # Files are read in the order of their hashed names.
    names = [f'{i:03d}.txt' for i in range(60)]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    for name, text in zip(names, texts, strict=True):
        (tmp_path / 'folder' / name).write_text(text, newline='')
    knobs.update(out=tmp_path / 'out', column='body', val_fraction=0.2, probe_fraction=0.2)
    splits = ('train', 'val', 'probe')
    results = []
    for name in ('a.jsonl', 'b.jsonl.gz', 'c.jsonl.zst', 'd.parquet', *forms, 'folder'):
        run_here(command(**{**knobs, 'source': name, 'input': tmp_path / name}))
        made = contents(tmp_path / 'out' / name)
        results.append({key: made[key] for key in made if key.endswith('.bin')})
        assert results[-1] == results[0]
    assert set(results[0]) == {f'{split}/00000_00000.bin' for split in splits}
    # By definition a shard holds BOS and the tokens of a document, one document after the other.
    folder = tmp_path / 'out' / 'a.jsonl'
    tokenizer = load_tokenizer(knobs['tokenizer'])
    decoded = []
    for split in splits:
        decoded += map(tokenizer.decode, documents_in(folder / split / '00000_00000.bin', 258))
    assert sorted(decoded) == sorted(texts)
    meta = read_meta(folder)
    assert total(meta, 'documents') == 60
    assert total(meta, 'bytes') == sum(len(text.encode()) for text in texts)
    assert 0 < meta['splits']['val']['documents'] < 30
    assert 0 < meta['splits']['probe']['documents'] < 30


def test_killed_preparation_goes_on_to_the_same_bytes(tmp_path, knobs, many_files):
    knobs.update(input=many_files, shard_tokens=400_000)
    prepare(**{**knobs, 'out': tmp_path / 'whole', 'workers': 2})
    expected = contents(tmp_path / 'whole')
    assert sum(name.startswith('x/train/') for name in expected) > 20
    kills = 0
    rng = random.Random(0)
    target = tmp_path / 'killed' / 'x'

    def n_shards():
        return len(list(target.glob('train/*.bin')))

    while not (target / 'meta.json').exists():
        knobs.update(out=target.parent, workers=kills % 2)
        process = subprocess.Popen(
            command(**knobs), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted = n_shards() + rng.randint(1, 6)
        while process.poll() is None and (kills >= 5 or n_shards() < wanted):
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 3 and contents(target.parent) == expected


@pytest.mark.parametrize('limit', [None, 2_500_000])
def test_ranks_on_one_folder_give_the_bytes_of_one_process(tmp_path, knobs, many_files, limit):
    knobs.update(input=many_files, shard_tokens=400_000, max_tokens=limit)
    prepare(**{**knobs, 'out': tmp_path / 'one'})
    expected = contents(tmp_path / 'one')
    tokens = json.loads(expected['x/meta.json'])['splits']['train']['tokens']
    assert limit is None or limit <= tokens < limit + 2000
    # Three ranks at once, by knobs.
    knobs['out'] = tmp_path / 'three'
    ranks = []
    for rank in range(3):
        ranks.append(subprocess.Popen(
            command(**knobs, rank=rank, world_size=3), cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE))
    for process in ranks:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert contents(tmp_path / 'three') == expected
    # Two ranks one after the other, by the variables of torchrun and of SLURM.
    knobs['out'] = tmp_path / 'two'
    assert 'The rank that ends last' in prepare(dict(RANK='1', WORLD_SIZE='2'), **knobs)
    with pytest.raises(BadInput, match='half prepared'):
        Source(tmp_path / 'two', 'x', 'train', 16)
    prepare(dict(SLURM_PROCID='0', SLURM_NTASKS='2'), **knobs)
    assert contents(tmp_path / 'two') == expected


def test_a_second_run_on_one_output_is_refused(tmp_path, knobs, many_files):
    knobs['input'] = many_files
    assert_refused("no field 'body'", **knobs, column='body')
    with lock(str(tmp_path / 'x'), '00000'):        # as a run at work holds it
        assert_refused('another run is writing to', 'another --out', **knobs, column='body')
        assert_refused('other settings (columns)', **knobs)
    prepare(**knobs)
    assert_refused('go together', **knobs, rank=1)
    assert_refused('below world_size', **knobs, rank=2, world_size=2)


def test_max_tokens_stops_and_a_finished_source_is_left_alone(tmp_path, knobs):
    knobs['input'] = write_lines(tmp_path / 'in.jsonl', documents(2000))
    prepare(**knobs, max_tokens=5000)
    before = contents(tmp_path / 'x')
    assert 5000 <= read_meta(tmp_path / 'x')['splits']['train']['tokens'] < 8000
    assert 'complete already' in prepare(**knobs, max_tokens=5000)
    assert contents(tmp_path / 'x') == before
    assert_refused('max_tokens', 'Delete', **knobs, max_tokens=9000)


def test_broken_records_are_skipped_only_when_asked_for_and_then_listed(tmp_path, knobs):
    lines = [json.dumps({'text': text}) for text in documents(400)]
    lines[17] = '{"text": 5}'
    lines[200] = 'no json'
    lines[311] = '{"body": "x"}'
    lines[350] = json.dumps({'text': ' ' * 1_000_001 + 'x'})
    knobs.update(input=tmp_path / 'in.jsonl', shard_tokens=3000)
    knobs['input'].write_text('\n'.join(lines))
    assert_refused('in.jsonl:18', 'no text but int', '--skip_bad=True', **knobs)
    printed = prepare(**knobs, skip_bad=True)       # continues after what stands before the fault
    assert '4 broken' in printed and 'in.jsonl:201: no valid JSON' in printed
    meta = read_meta(tmp_path / 'x')
    assert meta['counts'] == {'broken': 4}
    found = [where.split('in.jsonl:')[1].split(':')[0] for where in meta['skipped']]
    assert found == ['18', '201', '312', '351']
    assert 'blanks in a row' in meta['skipped'][3]
    assert total(meta, 'documents') == 396


def test_what_will_not_fit_is_refused_before_it_begins(tmp_path):
    check_space(str(tmp_path / 'x'), 1000)
    with pytest.raises(BadInput, match='are needed. Free some space'):
        check_space(str(tmp_path / 'x'), 10**18)


def test_ctrl_c_stops_with_a_sentence_and_the_next_run_goes_on(tmp_path, knobs, many_files):
    knobs.update(input=many_files, workers=2, shard_tokens=20_000)
    prepare(**{**knobs, 'out': tmp_path / 'whole'})
    knobs['out'] = tmp_path / 'cut'

    def obey():         # the workers of xdist ignore Ctrl-C, and their children would inherit that
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        command(**knobs), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=obey)
    while not list((tmp_path / 'cut').glob('x/train/*.bin')) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert 'Run again to continue' in errors and 'Traceback' not in errors
    prepare(**knobs)
    assert contents(tmp_path / 'cut/x') == contents(tmp_path / 'whole/x')


def test_large_files_are_cut_into_ranges_that_together_are_the_whole(tmp_path, monkeypatch):
    texts = documents(3000)
    write_lines(tmp_path / 'a.jsonl', texts)
    table = pyarrow.table({'text': texts})
    pyarrow.parquet.write_table(table, tmp_path / 'b.parquet', row_group_size=100)
    monkeypatch.setattr(reading, 'CUT_ABOVE', 100_000)
    monkeypatch.setattr(reading, 'LARGEST_PART', 70_001)
    monkeypatch.setattr(reading, 'BATCH_BYTES', 30_000)
    for name in ('a.jsonl', 'b.parquet'):
        parts = reading.make_parts(reading.local_files(str(tmp_path / name)))
        assert len(parts) >= 4
        found = []
        for (file,) in parts:
            records = records_of(file)
            found += [record['text'] for _, record in records]
            for skip in (1, len(records) // 2, len(records)):       # a part continues anywhere
                assert records_of(file, skip) == records[skip:]
        assert found == texts


def test_a_long_plain_text_becomes_documents_that_together_are_the_file(tmp_path, monkeypatch):
    text = '\n'.join(documents(300))
    (tmp_path / 'a.txt').write_text(text, newline='')
    monkeypatch.setattr(reading, 'LONGEST_TEXT', 20_000)
    (file,) = reading.local_files(str(tmp_path / 'a.txt'))
    records = records_of(file)
    pieces = [piece for _, piece in records]
    assert ''.join(pieces) == text and len(pieces) > 5
    assert all(piece.endswith('\n') and len(piece) <= 20_000 for piece in pieces[:-1])
    assert records_of(file, 3) == records[3:]


@pytest.mark.parametrize('unit, end', [
    ('A line.\nThe last of them.\n\n', '.\n\n'), ('A line. It goes on.\n', 'on.\n'),
    ('One sentence. ', '. '), ('word ', ' '), ('x', 'x'), ('A line.\r\n\r\n', '.\n\n')])
def test_a_long_plain_text_is_cut_at_the_best_place(tmp_path, monkeypatch, unit, end):
    text = unit * 400
    monkeypatch.setattr(reading, 'LONGEST_TEXT', 300)
    # A heading at the beginning of a document without paragraphs is no document.
    (tmp_path / 'a.txt').write_text('Title\n\n' + text, newline='')
    pieces = list(reading.texts_in(reading.local_files(str(tmp_path / 'a.txt'))))
    assert ''.join(pieces) == ('Title\n\n' + text).replace('\r', '')
    assert all(piece.endswith(end) and 150 <= len(piece) <= 300 for piece in pieces[:-1])
    # A text within the limit stays one document.
    monkeypatch.setattr(reading, 'LONGEST_TEXT', len(text) + 8)
    assert len(list(reading.texts_in(reading.local_files(str(tmp_path / 'a.txt'))))) == 1


def test_training_reads_what_was_prepared(tmp_path, knobs):
    (tmp_path / 'in.txt').write_text('the cat sat on the mat. ' * 200)
    prepare(**knobs, input=tmp_path / 'in.txt', val_fraction=0)
    row = Source(tmp_path, 'x', 'train', 30, vocab_size=259).rows([0])[0]
    text = load_tokenizer(str(tmp_path / 'x')).decode([t for t in row.tolist() if t != 258])
    assert 'cat sat on' in text


PACKED = gzip.compress(b'{"text": "hello"}\n' * 99, mtime=0)


@pytest.mark.parametrize('name, content, extra, parts', [
    ('a.jsonl', b'{"text": "x"}\n{"text": \n', {}, ['a.jsonl:2', 'JSON']),
    ('a.jsonl', b'{"body": "x"}\n', {}, ["a.jsonl:1: no field 'text'", 'body', '--column']),
    ('a.jsonl', b'{"text": "\xff\xfe"}\n', {}, ['a.jsonl', 'UTF-8']),
    ('a.jsonl.gz', PACKED[:-20], {}, ['a.jsonl.gz', 'cannot be read']),
    ('a.jsonl.gz', b'plain', {}, ['a.jsonl.gz', 'cannot be read']),
    ('a.parquet', b'no parquet', {}, ['a.parquet', 'no parquet file']),
    ('a.jsonl', b'{"text": "x\\ud83d"}\n', {}, ['a.jsonl:1', 'surrogate']),
    ('a.txt', b'', {}, ['holds no text']),
    ('b.jsonl', b'{"text": "x"}\n', dict(input='nowhere/*.jsonl'), ['matches no file']),
    ('b.jsonl', b'{"text": "x"}\n', dict(tokenizer='nope'), ["tokenizer 'nope'", 'neither a file']),
    ('b.jsonl', b'{"text": "x"}\n', dict(source=''), ['--source is missing']),
    ('b.jsonl', b'{"text": "x"}\n', dict(max_token=1), ["'max_tokens'"])])
def test_bad_input_gets_one_sentence(tmp_path, knobs, name, content, extra, parts):
    (tmp_path / name).write_bytes(content)
    assert_refused(*parts, **{**knobs, 'input': tmp_path / name, **extra})


@pytest.mark.parametrize('broken', ['foreign', 'truncated'])
def test_broken_zst_gets_one_sentence(tmp_path, knobs, broken):
    lines = b''.join(b'{"text": "document %d"}\n' % i for i in range(50_000))
    whole = pyarrow.compress(lines, codec='zstd', asbytes=True)
    content = b'no zst at all' if broken == 'foreign' else whole[:-10]
    (tmp_path / 'a.jsonl.zst').write_bytes(content)
    knobs.update(input=tmp_path / 'a.jsonl.zst', workers=1)
    assert_refused('a.jsonl.zst', 'cannot be read', **knobs)


# -- inputs are known by their content -------------------------------------------------------------


def test_an_edited_input_is_another_one_and_a_copy_elsewhere_is_the_same(tmp_path, knobs, capsys):
    # meta.json says where the empty one is.
    path = write_lines(tmp_path / 'in/a.jsonl', ['', *documents(30)])
    run_here(command(**knobs, input=path))
    made = contents(tmp_path / 'x')
    (tmp_path / 'other').mkdir()
    copy = tmp_path / 'other/a.jsonl'
    copy.write_bytes(path.read_bytes())
    os.utime(copy, (0, 0))
    run_here(command(**knobs, input=copy))
    assert 'complete already' in capsys.readouterr().out and contents(tmp_path / 'x') == made
    shutil.rmtree(tmp_path / 'x')
    run_here(command(**knobs, input=copy))
    assert contents(tmp_path / 'x') == made
    copy.write_bytes(copy.read_bytes().replace(b'cat', b'cow'))
    os.utime(copy, (0, 0))
    message = refusal(**knobs, input=copy)
    assert 'other settings (files)' in message and 'Delete it' in message
    assert contents(tmp_path / 'x') == made


def test_an_input_is_hashed_once_and_again_after_an_edit(tmp_path, monkeypatch, cache_folder):
    paths = [str(write_lines(tmp_path / f'{i}.jsonl', documents(3, i))) for i in range(4)]
    expected = {path: hashlib.sha256(open(path, 'rb').read()).hexdigest() for path in paths}
    hashed = []

    def hash_file(path, true=inputs.hash_file):
        hashed.append(path)
        return true(path)

    def known():
        hashed.clear()
        return {path: about.sha256 for path, about in inputs.know(paths).items()}

    monkeypatch.setattr(inputs, 'hash_file', hash_file)
    # The files are younger than SETTLED_S. An edit in the same tick of the clock has no other time.
    assert known() == known() == expected and sorted(hashed) == paths
    monkeypatch.setattr(inputs, 'SETTLED_S', 0.0)
    time.sleep(0.01)
    assert known() == expected and sorted(hashed) == paths
    assert known() == expected and not hashed
    content = open(paths[1], 'rb').read()
    with open(paths[1], 'r+b') as f:
        f.write(content.swapcase())
    os.utime(paths[1], ns=(0, os.stat(paths[2]).st_mtime_ns))
    expected[paths[1]] = hashlib.sha256(content.swapcase()).hexdigest()
    assert known() == expected and hashed == [paths[1]]
    (cache,) = cache_folder.glob('*.json')
    for damage in (b'', b'[1]', b'{"a": 1}', b'[["x", 1, 2]]', b'\xff'):
        cache.write_bytes(damage)
        assert known() == expected and sorted(hashed) == paths


def test_of_several_ranks_one_hashes(tmp_path, monkeypatch):
    paths = [str(write_lines(tmp_path / f'{i}.jsonl', documents(3, i))) for i in range(4)]
    hashed = []

    def hash_file(path, true=inputs.hash_file):
        hashed.append(path)
        return true(path)

    monkeypatch.setattr(inputs, 'hash_file', hash_file)
    monkeypatch.setattr(inputs, 'SETTLED_S', 0.0)
    time.sleep(0.01)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(inputs.know, [paths] * 3)
    assert sorted(hashed) == paths and all(known == first for known in others)


def test_without_a_cache_folder_inputs_are_hashed_every_time(tmp_path, monkeypatch, capsys):
    path = str(write_lines(tmp_path / 'a.jsonl', documents(3)))
    (tmp_path / 'file').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    for _ in range(2):
        sha256 = inputs.know([path])[path].sha256
        assert sha256 == hashlib.sha256(open(path, 'rb').read()).hexdigest()
        assert 'cannot be kept' in capsys.readouterr().out


def test_an_input_that_changes_meanwhile_is_an_error(tmp_path):
    path = str(write_lines(tmp_path / 'a.jsonl', documents(3)))
    known = inputs.know([path])
    os.utime(path, (0, 0))
    inputs.check_unchanged(known)
    with open(path, 'r+b') as f:
        f.write(b'#')
    with pytest.raises(BadInput, match='was changed while it was read'):
        inputs.check_unchanged(known)


# -- which files, and of what kind -----------------------------------------------------------------

LINE = b'{"text": "hello"}\n'


TABLE = pyarrow.table({'id': [1], 'text': ['hello']})


@pytest.mark.parametrize('name, content', [
    ('a.csv', b'id,text\n1,hello\n'), ('a.CSV', b'text\r\nhello\r\n'),
    ('a.TSV', b'text\tid\nhello\t1'),
    ('a.csv', reading.BOM + b'text\nhello\n'), ('a.csv', b'"text"\n"hello"\n\n'),
    ('a.txt', reading.BOM + b'hello'), ('a.csv.bz2', bz2.compress(b'text\nhello\n')),
    ('a.tsv.Xz', lzma.compress(b'text\nhello\n')), ('a.Arrow', arrow_bytes(TABLE)),
    ('a.jsonl.xz', lzma.compress(LINE[:5]) + lzma.compress(LINE[5:]) + b'\0\0\0\0'),
    ('a.jsonl.bz2', bz2.compress(LINE[:5]) + bz2.compress(LINE[5:])),
    ('a.jsonl', LINE), ('a.ndjson', LINE), ('a.jl', LINE), ('a.JSONL', LINE), ('a.Json', LINE),
    ('a.JSONL.GZ', gzip.compress(LINE, mtime=0)), ('a.TXT', b'hello'),
    ('a.ndjson.ZST', pyarrow.compress(LINE, 'zstd', True)),
    ('a.MD.gz', gzip.compress(b'hello', mtime=0)), ('a.jsonl', reading.BOM + LINE)])
def test_the_ending_says_what_a_file_holds(tmp_path, byte_tokenizer, name, content):
    (tmp_path / name).write_bytes(content)
    assert list(reading.texts_in(reading.local_files(str(tmp_path / name)))) == ['hello']
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / name).write_bytes(content)
    assert list(reading.texts_in(reading.local_files(str(tmp_path / 'in')))) == ['hello']
    # tools/evaluate.py --bpb reads the same.
    need('lm_eval')
    from tools.benchmarks import read_documents
    tokenizer = load_tokenizer(byte_tokenizer)
    expected = [(tokenizer.encode('hello'), 5)]
    assert read_documents(str(tmp_path / name), tokenizer, 'text', None) == expected


@pytest.mark.parametrize('name', [
    'a.tab', 'a.zip', 'a.html', 'a.parquet.gz', 'a.arrow.xz', 'a.jsonl.gz.xz', 'a.jsonl.lzma',
    'a.gz', 'a.dat', 'a.xlsx', 'jsonl', 'a'])
def test_other_endings_are_refused_and_in_a_folder_left_out_with_a_word(tmp_path, name):
    (tmp_path / name).write_bytes(b'id,text\n1,hello\n')
    for pattern in (tmp_path / name, tmp_path / '*'):
        with pytest.raises(BadInput, match=f'{name}: files with this ending .*ndjson'):
            reading.local_files(str(pattern))
    with pytest.raises(BadInput, match=f'no file that can be read.*{name}'):
        reading.local_files(str(tmp_path))
    (tmp_path / 'b.jsonl').write_bytes(LINE)
    (tmp_path / '.hidden.jsonl').write_bytes(LINE)
    said = []
    (file,) = reading.local_files(str(tmp_path), say=said.append)
    assert file.name == 'b.jsonl'
    assert '1 files are read, 2 left out' in said[0]
    assert f'({name})' in said[0] and '1 hidden' in said[0]


@pytest.mark.parametrize('content, parts', [
    (json.dumps([{'text': 'x'}]).encode(), 'JSON array .*jq'),
    (json.dumps([{'text': 'x'}] * 3, indent=1).encode(), 'JSON array .*jq'),
    (b'\n' + json.dumps({'text': 'x', 'n': 1}, indent=4).encode(), 'JSON object .*jq'),
    (b'{"text": "x",\n "n": 1}\n', 'JSON object .*jq'),
    (LINE + b'[1]\n', 'a.json:2: no JSON object but list'),
    (b'[1]\n' + LINE, 'a.json:1: no JSON object but list'),
    (b'{"text": \n' + LINE, 'a.json:1: no valid JSON'),
    (LINE + '{"text": "é"}'.encode('latin-1'), 'a.json:2: no valid JSON .not UTF-8'),
    (LINE.decode().encode('utf-16'), 'begins like a file of the format UTF-16'),
    (gzip.compress(LINE, mtime=0), 'begins like a file of the format gzip'),
    (pyarrow.compress(LINE, 'zstd', True), 'begins like a file of the format zstd')])
def test_json_that_is_not_lines_is_named(tmp_path, content, parts):
    for name, packed in (('a.json', content), ('b/a.json.gz', gzip.compress(content, mtime=0))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(BadInput, match=parts.replace('.json:', '.json[.gz]*:')):
            list(reading.texts_in(reading.local_files(str(tmp_path / name))))


TEXTS = ['a, "quoted" one', 'two\nlines', 'CR\r\nLF', 'ü \0 \t', 'NA', 'x' * 200_000]


def test_fields_of_a_table_are_exact_and_reading_continues_at_any_row(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, 'BATCH_BYTES', 300)
    for delimiter, name in ((',', 'a.csv'), ('\t', 'a.tsv')):
        (tmp_path / name).write_bytes(table_bytes(TEXTS * 3, delimiter))
        (file,) = reading.local_files(str(tmp_path / name))
        rows = [(number, record) for batch in reading.read_batches(file, ['body'])
                for number, record in reading.records_of(batch)]
        assert [row['body'] for _, row in rows] == TEXTS * 3
        for skip in range(len(rows) + 1):
            batches = reading.read_batches(file, ['body'], skip)
            assert [row for b in batches for row in reading.records_of(b)] == rows[skip:]
    for new in (pyarrow.ipc.new_file, pyarrow.ipc.new_stream):
        table = pyarrow.table({'text': TEXTS * 3, 'n': range(18)})
        (tmp_path / 'a.arrow').write_bytes(arrow_bytes(table, new))
        (file,) = reading.local_files(str(tmp_path / 'a.arrow'))
        rows = records_of(file)
        assert rows == list(enumerate({'text': text} for text in TEXTS * 3))
        for skip in range(len(rows) + 1):
            assert records_of(file, skip) == rows[skip:]


@pytest.mark.parametrize('content, part', [
    (b'', 'no header line'), (b'\n1,2\n', 'no header line'),
    (b'id,body\n1,2\n', r"no column 'text'. It has \['id', 'body'\].*--column"),
    (b'id;text\n1;x\n', r"no column 'text'. It has \['id;text'\]"),
    (b'text,text\n1,2\n', "two columns have the name 'text'"),
    (b'id,text\n1,x\n1,2,3\n', r'a.csv: row 2: it has 3 fields .* has 2 \(line 3\)'),
    (b'id,text\n1,"x\ny"\n1\n', r'a.csv: row 2: it has 1 fields .* has 2 \(line 4\)'),
    (b'id,text\n1,"x\n2,y\n', 'a.csv: row 1: no valid CSV up to line 3'),
    (b'id,text\n1,"a" b\n', 'a.csv: row 1: no valid CSV up to line 2'),
    ('text\né\n'.encode('latin-1'), "a.csv: row 1: the field 'text' is not UTF-8"),
    ('text\nx\n'.encode('utf-16'), 'begins like a file of the format UTF-16.*says CSV'),
    ('text\nx\n'.encode('utf-16-le'), 'UTF-16'),
    (gzip.compress(b'text\nx', mtime=0), 'format gzip')])
def test_a_broken_table_is_named_with_its_place(tmp_path, content, part):
    (tmp_path / 'a.csv').write_bytes(content)
    with pytest.raises(BadInput, match=part):
        list(reading.texts_in(reading.local_files(str(tmp_path / 'a.csv'), say=[].append)))


def test_broken_rows_are_left_out_and_listed(tmp_path, knobs):
    content = b'id,text\n1,good\n2\n\n3,"also\ngood"\n4,x"y\n5,"x"y\n6,\xff\n7,end\n'
    (tmp_path / 'a.csv').write_bytes(content)
    run_here(command(**knobs, input=tmp_path / 'a.csv', skip_bad=True, val_fraction=0))
    meta = read_meta(tmp_path / 'x')
    found = [where.split('a.csv: ')[1].split(':')[0] for where in meta['skipped']]
    assert found == ['row 2', 'row 6', 'row 7']
    assert total(meta, 'documents') == 4
    assert total(meta, 'bytes') == len('good' + 'also\ngood' + 'x"y' + 'end')


@pytest.mark.parametrize('content', [
    'hello'.encode('utf-16'), 'hello'.encode('utf-16-be'), 'hello'.encode('utf-16-le'),
    gzip.compress(b'hello', mtime=0), lzma.compress(b'hello'), bz2.compress(b'hello')])
def test_a_text_file_that_is_no_text_is_named(tmp_path, content):
    for name in ('a.txt', 'a.md.gz'):
        packed = content if name == 'a.txt' else gzip.compress(content, mtime=0)
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(BadInput, match=f'{name} begins .*Convert|{name} begins .* convert'):
            list(reading.texts_in(reading.local_files(str(tmp_path / name))))
    # Zeros and the letters of a format are no reason.
    (tmp_path / 'b.txt').write_bytes(b'PAR1 \0 is text')
    assert [*reading.texts_in(reading.local_files(str(tmp_path / 'b.txt')))] == ['PAR1 \0 is text']


@pytest.mark.parametrize('name, content', [
    (f'a.jsonl.{ending}', content)
    for ending, pack in (('xz', lzma.compress), ('bz2', bz2.compress))
    for content in (
        pack(LINE * 99)[:-4], pack(LINE)[:9], pack(LINE) + pack(LINE)[:-3], b'nothing packed',
        pack(LINE) + b'damaged', pack(LINE) + pack(LINE)[:-3] + b'abc')]
    + [('a.arrow', arrow_bytes(TABLE, new)[:-cut])
       for new in (pyarrow.ipc.new_file, pyarrow.ipc.new_stream) for cut in (1, 8, 60, 300)]
    + [('a.arrow', b'junk'), ('a.arrow', b'more than eight bytes of junk')])
def test_damaged_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=f'{name} (cannot be read|is damaged)'):
        list(reading.texts_in(reading.local_files(str(tmp_path / name))))


def test_a_dataset_of_save_to_disk_is_read_without_its_descriptions(tmp_path):
    datasets = pytest.importorskip('datasets')
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({'text': ['a', 'b', 'c']}).save_to_disk(tmp_path / 's', num_shards=2)
    (tmp_path / 's/cache-1.arrow').write_bytes(arrow_bytes(TABLE))      # as `map` leaves behind
    said = []
    files = reading.local_files(str(tmp_path / 's'), say=said.append)
    assert list(reading.texts_in(files)) == ['a', 'b', 'c'] and 'cache-1.arrow' in str(said)
    next(tmp_path.glob('s/data-*2.arrow')).unlink()
    with pytest.raises(BadInput, match='state.json names data-.*not in the folder'):
        reading.local_files(str(tmp_path / 's'))


ODD = ['a[1]', 'a*b', 'a?', 'a,b', '~', '~a', 'a b', 'ü 中', 'a{b}', "a'b"]


@pytest.mark.parametrize('name', ODD)
def test_a_path_is_a_path(tmp_path, monkeypatch, knobs, name):
    # Folders that the name would match as a glob.
    for other in ('a1', 'axb', 'ax', 'a'):
        write_lines(tmp_path / other / f'{other}.jsonl', ['of another folder'])
    folder = tmp_path / name
    write_lines(folder / f'{name}.jsonl', documents(9))
    monkeypatch.chdir(tmp_path)
    patterns = [f'{name}/{name}.jsonl', f'{name}', f'{name}/*.jsonl', f'{tmp_path}/{name}/**']
    for pattern in patterns:
        files = reading.local_files(pattern)
        assert [file.name for file in files] == [f'{name}.jsonl'], pattern
    knobs.update(out=folder, source=f's{name}', input=f'{folder}/*.jsonl', val_fraction=0)
    run_here(command(**knobs))
    run_here(command(**knobs))      # complete already
    rows = Source(str(folder), f's{name}', 'train', 30, vocab_size=259).rows([0])
    assert rows.shape == (1, 31)
    need('lm_eval')
    from tools.benchmarks import read_documents
    made = folder / f's{name}'
    assert len(read_documents(str(made), load_tokenizer(str(made)), 'text', None)) == 0    # no val
    assert list(find_shards(f'{made}/train/*.bin')) == ['train/00000_00000.bin']


@pytest.mark.parametrize('name', ['a.jsonl.gz', 'a.txt.zst', 'a.parquet', 'a.csv.xz', 'a.arrow'])
def test_an_empty_packed_file_is_damaged(tmp_path, name):
    (tmp_path / name).touch()
    said = []
    files = reading.local_files(str(tmp_path / name), say=said.append)
    assert '1 of 1 input files are empty' in said[0]
    with pytest.raises(BadInput, match=f'{name} is empty'):
        list(reading.texts_in(files))


def test_files_are_found_once_and_links_to_nothing_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('a,b.jsonl', 'c[1].jsonl', 'd.jsonl'):
        write_lines(tmp_path / 'in' / name, ['x'])
        assert [f.name for f in reading.local_files(f'in/{name}')] == [name]
    assert len(reading.local_files(f'in/d.jsonl,./in/d.jsonl,in,{tmp_path}/in')) == 3
    (tmp_path / 'in/gone.jsonl').symlink_to('nowhere')
    for pattern in ('in', 'in/gone.jsonl', 'in/*'):
        with pytest.raises(BadInput, match='gone.jsonl is a link to nowhere, which does not exist'):
            reading.local_files(pattern)
    for pattern in ('hf://datasets/x/y/z.jsonl', 'https://x/y.jsonl'):
        with pytest.raises(BadInput, match='is a URL'):
            reading.local_files(pattern)


# -- mistakes --------------------------------------------------------------------------------------

MESSAGES = json.dumps({'text': [
    {'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]}).encode()
CHAT = {name: 300 + i for i, name in enumerate((END, '<|im_start|>', '<|im_end|>'))}


@pytest.mark.parametrize('name, content, extra, parts', [
    ('a.jsonl', MESSAGES, {}, ['a.jsonl:1', 'list of messages', '--chat_template']),
    ('a.jsonl', LINE, dict(chat_template='chatml'), ['a.jsonl:1', 'holds text', '--chat_template']),
    ('a.txt', b'hello', dict(chat_template='chatml'), ['a.txt', 'holds text', '--chat_template']),
    ('a.jsonl', MESSAGES, dict(chat_template='lama'), ['llama3, chatml']),
    ('a.jsonl', MESSAGES, dict(chat_template='llama3'), ['has no <|start_header_id|>', 'chatml']),
    ('a.jsonl', LINE * 3, dict(column='b', skip_bad=True), ['3 broken', "no field 'b'"]),
    ('a.txt', 'é'.encode('latin-1'), {}, ['a.txt', 'utf-8']),
    ('a.txt.gz', gzip.compress('é'.encode('latin-1'), mtime=0), {}, ['a.txt.gz', 'utf-8']),
    ('a.jsonl', b'\n\n', {}, ['holds no text']),
    ('a.jsonl', LINE, dict(max_tokens=0), ['max_tokens = 0', 'at least 1']),
    ('a.jsonl', LINE, dict(shard_tokens=-1), ['shard_tokens = -1', 'at least 1']),
    ('a.jsonl', LINE, dict(workers=-1), ['workers = -1', 'at least 0']),
    ('a.jsonl', LINE, dict(val_fraction=-0.1), ['val_fraction = -0.1']),
    ('a.jsonl', LINE, dict(probe_fraction=1.1), ['probe_fraction = 1.1']),
    ('a.jsonl', LINE, dict(rank=0), ['go together']),
    ('a.jsonl', LINE, dict(rank=0, world_size=0), ['world_size = 0']),
    ('a.jsonl', LINE, dict(revision='main'), ['--revision', '--input'])])
def test_a_mistake_is_named(tmp_path, knobs, name, content, extra, parts):
    ranks = {bytes([b]): b for b in range(256)}
    (tmp_path / 'chat').mkdir()
    save_tokenizer(str(tmp_path / 'chat'), make_tokenizer('x', ranks, GPT2_PATTERN, CHAT, END))
    (tmp_path / name).write_bytes(content)
    knobs['tokenizer'] = tmp_path / 'chat'
    message = refusal(**{**knobs, 'input': tmp_path / name, **extra})
    assert all(part in message for part in parts), message
    assert not (tmp_path / 'x/meta.json').exists()


@pytest.mark.parametrize('name', [
    '', '.', '..', '../x', 'a/b', '/x', '-x', '.x', 'a=b', 'a\nb', 'probe'])
def test_a_source_has_the_name_of_a_folder(tmp_path, name):
    with pytest.raises(BadInput, match='cannot be the name of a source'):
        source_folder(str(tmp_path), name)
    for good in ('a', 'docs.jsonl', 'my data-2_x', 'été'):
        assert source_folder(str(tmp_path), good) == str(tmp_path / good)


def test_out_is_a_local_folder(tmp_path, knobs):
    knobs['input'] = write_lines(tmp_path / 'in.jsonl', ['x'])
    assert 'no folder' in refusal(**{**knobs, 'out': knobs['input']})
    assert 'local folders only' in refusal(**{**knobs, 'out': 'gs://bucket/data'})


@pytest.mark.parametrize('variables, parts', [
    (dict(RANK='0'), 'only one is set'), (dict(WORLD_SIZE='2'), 'only one is set'),
    (dict(RANK='x', WORLD_SIZE='2'), "RANK = 'x' must be a whole number"),
    (dict(RANK='', WORLD_SIZE='2'), "RANK = '' must be a whole number"),
    (dict(RANK='-1', WORLD_SIZE='2'), "RANK = '-1' must be"),
    (dict(RANK='0', WORLD_SIZE='0'), "WORLD_SIZE = '0' must be .* at least 1"),
    (dict(RANK='2', WORLD_SIZE='2'), 'below world_size'),
    (dict(SLURM_PROCID='0', SLURM_NTASKS='1.5'), "SLURM_NTASKS = '1.5' must be")])
def test_odd_variables_of_the_launcher_are_named(monkeypatch, variables, parts):
    for name in ('RANK', 'WORLD_SIZE', 'SLURM_PROCID', 'SLURM_NTASKS'):
        monkeypatch.delenv(name, raising=False)
    assert find_rank(PrepareConfig()) == (0, 1, '')
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=parts):
        find_rank(PrepareConfig())


# -- what stands half done, or is damaged ----------------------------------------------------------


@pytest.fixture
def half(tmp_path, knobs):
    """Knobs of a source x that is half done, since its last record is broken."""
    lines = write_lines(tmp_path / 'in.jsonl', documents(60)).read_bytes()
    (tmp_path / 'in.jsonl').write_bytes(lines + b'broken\n')
    knobs.update(input=tmp_path / 'in.jsonl', shard_tokens=10_000)
    assert 'no valid JSON' in refusal(**knobs)
    assert len(list((tmp_path / 'x/train').glob('*.bin'))) >= 3
    return knobs


@pytest.mark.parametrize('damage', ['missing', 'truncated', 'zeros'])
def test_a_shard_that_is_gone_is_found_before_the_source_goes_on(tmp_path, half, damage):
    shard = min((tmp_path / 'x/train').glob('*.bin'))
    content = shard.read_bytes()
    if damage == 'missing':
        shard.unlink()
    else:
        shard.write_bytes(content[:-100] if damage == 'truncated' else bytes(len(content)))
    open_shard.cache_clear()
    message = refusal(**half, skip_bad=True)
    assert shard.name in message and 'Delete' in message and 'progress/00000.json' in message
    # The remedy works and gives the bytes of a source that was never damaged.
    (tmp_path / 'x/progress/00000.json').unlink()
    run_here(command(**half, skip_bad=True))
    run_here(command(**{**half, 'out': tmp_path / 'whole'}, skip_bad=True))
    assert contents(tmp_path / 'x') == contents(tmp_path / 'whole/x')
    shard.unlink()
    message = refusal(**half, skip_bad=True)
    assert f'{shard} is recorded, but it is missing. Delete the folder' in message


DAMAGES = [b'{"sh', b'', b'[]', b'null', b'{}', b'\xff', b'{"settings": 1, "shards": {}}']


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('name, remedy', [
    ('progress/00000.json', 'Delete .*00000.json. Then this part'),
    ('progress/source.json', 'Delete the folder')])
def test_damaged_progress_is_named(tmp_path, half, damage, name, remedy):
    path = tmp_path / 'x' / name
    path.write_bytes(damage)
    assert re.search(f'{path} (is no valid JSON|has another structure).*{remedy}', refusal(**half))


def test_progress_without_its_settings_does_not_go_on(tmp_path, half):
    (tmp_path / 'x/progress/source.json').unlink()
    assert 'has lost its source.json' in refusal(**half)


@pytest.mark.parametrize('damage', [*DAMAGES, 'shards'])
def test_a_damaged_meta_is_named(tmp_path, knobs, damage):
    knobs['input'] = write_lines(tmp_path / 'in.jsonl', ['some text'] * 9)
    run_here(command(**knobs))
    path = tmp_path / 'x/meta.json'
    if damage == 'shards':
        damage = json.dumps(json.loads(path.read_text()) | dict(shards=[1])).encode()
    path.write_bytes(damage)
    parts = f'{path} (is no valid JSON|has another structure).*Delete the folder'
    assert re.search(parts, refusal(**knobs))


# -- tokenizers ------------------------------------------------------------------------------------

SAMPLES = [
    *documents(20, seed=1), "I'll  say 3.14  \t x\n\n  y = [1,2]   # end ",
    'e\u0301 5²½ ٣٤ \u00a0\u2003 z', '']
SPLIT = (r"(?i:'s|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r'|\s*[\r\n]+|\s+(?!\S)|\s+')


def trained_tokenizer_json(tmp_path, pre_tokenizer, normalizer=None, specials=(END,)):
    """Trains a tokenizer of the package tokenizers. Returns (path, tokenizer)."""
    tokenizers = pytest.importorskip('tokenizers')
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(tokenizers)
    if normalizer:
        tokenizer.normalizer = getattr(tokenizers.normalizers, normalizer)()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(specials),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(documents(200), trainer)
    path = str(tmp_path / 'tokenizer.json')
    tokenizer.save(path)
    return path, tokenizer


def byte_level(tokenizers, use_regex=True):
    return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


@pytest.mark.parametrize('kind', ['gpt2', 'digits', 'split', 'nfc'])
def test_tokenizer_json_gives_the_ids_of_tokenizers(tmp_path, kind):
    def pre_tokenizer(tokenizers):
        p = tokenizers.pre_tokenizers
        if kind == 'digits':
            return p.Sequence([p.Digits(individual_digits=True), byte_level(tokenizers)])
        if kind == 'split':
            split = p.Split(tokenizers.Regex(SPLIT), 'isolated')
            return p.Sequence([split, byte_level(tokenizers, use_regex=False)])
        return byte_level(tokenizers)

    normalizer = 'NFC' if kind == 'nfc' else None
    path, theirs = trained_tokenizer_json(tmp_path, pre_tokenizer, normalizer)
    ours = load_tokenizer(path)
    assert ours.vocab_size == theirs.get_vocab_size()
    for text in SAMPLES:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
    sizes = ours.token_bytes()
    ids = ours.encode(SAMPLES[0])
    assert sum(sizes[i] for i in ids) == len(SAMPLES[0].encode()) and sizes[ours.bos_id] == 0
    save_tokenizer(str(tmp_path), ours)
    again = load_tokenizer(str(tmp_path / 'tokenizer.tiktoken'))
    assert again.fingerprint == ours.fingerprint and again.encode(SAMPLES[0]) == ids


BLOCKS = ((0x1f300, 0x1faff), (0x4e00, 0x9fff), (0, 0x20), (0x7f, 0xa0), (0xac00, 0xd7a3),
          (0x600, 0x6ff), (0x300, 0x36f), (0x2000, 0x206f), (0xe000, 0xe0ff), (0x10000, 0x10ffff))


def nasty_texts():
    """What is rare in real text: all of Unicode, names of special tokens, long lines, blanks."""
    rng = random.Random(1)
    for low, high in BLOCKS:
        for _ in range(100):
            text = ''
            for _ in range(60):
                is_odd = rng.random() < 0.7
                text += chr(rng.randint(low, high)) if is_odd else rng.choice(' \n\tabc1.é')
            yield text
    yield '👩‍👩‍👧‍👦 🇩🇪 👍🏽 e\u0301 \u00a0x\u3000y\r\n\r\n \t \x0b\x0c\x85\u2028z'
    yield ('<|endoftext|> a <|im_start|>user\nhi<|im_end|> <|begin_of_text|><|eot_id|> </s> <s> '
           '<think>x</think> |||IP_ADDRESS||| <|extra_id_0|>')
    yield from ('x' * 100_000, 'abc def ' * 30_000, ' ' * 50_000 + 'q', '0123456789' * 5000)
    yield from ('word\n' * 50_000, '中文' * 30_000)


@pytest.mark.parametrize('name', ['gpt2', 'dolma2', 'bpe8k', 'gpt_neox_20b'])
def test_real_tokenizers_give_the_ids_of_tokenizers(shared_data, name):
    tokenizers = pytest.importorskip('tokenizers')
    path = str(shared_data / 'tokenizers' / name / 'tokenizer.json')
    ours = load_tokenizer(path)
    theirs = tokenizers.Tokenizer.from_file(path)
    theirs.encode_special_tokens = True         # names of special tokens in text are text
    texts = list(nasty_texts())
    for domain in sorted((shared_data / 'val').glob('*.jsonl.gz')):
        with gzip.open(domain, 'rt') as f:
            texts += [json.loads(line)['text'] for line in [*f][:25]]
    whole = '\n'.join(texts[-150:])
    for text in (*texts, whole):
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode_document(text).tolist() == expected, text[:200]
    assert len(list(ours.pieces(whole * 4))) > 1


@pytest.mark.parametrize('pattern', [GPT2_PATTERN, LLAMA3_PATTERN, DIGITS_PATTERN])
def test_a_document_of_any_length_gets_the_ids_of_the_whole(monkeypatch, pattern):
    ranks = {bytes([b]): b for b in range(256)}
    for token in (b' t', b'he', b' the', b'\n\n', b'  ', b'00', b'aa'):
        ranks[token] = len(ranks)
    ours = make_tokenizer('x', ranks, pattern, {END: 300}, END)
    text = '\n'.join(documents(400)) + '  \n\n ' * 50 + 'a' * 3000 + ' end of it. ' * 300
    whole = ours.encoding.encode_ordinary(text)
    monkeypatch.setattr(tokenizer_module, 'PIECE_CHARACTERS', 2000)
    assert ours.encode_document(text).tolist() == whole and len(list(ours.pieces(text))) > 20
    monkeypatch.setattr(tokenizer_module, 'PIECE_CHARACTERS', 300)
    with pytest.raises(BadInput, match='without a break'):
        ours.encode_document(text)
    monkeypatch.undo()
    with pytest.raises(BadInput, match='blanks in a row'):
        ours.encode_document('a b\n' + ' ' * 1_000_001)


# -- the demo's data -------------------------------------------------------------------------------

MODULE = '''"""Top."""
import os


class A:
    """Of A."""
    x = 1

    def f(self):
        """Of f,
        two lines."""
        return "kept"
'''


def test_docstrings_are_cut_out_and_collected():
    code, docstrings = cut_docstrings(MODULE)
    assert docstrings == [('', 'Top.'), ('.A', 'Of A.'), ('.A.f', 'Of f,\ntwo lines.')]
    assert code == (
        'import os\n\n\nclass A:\n    x = 1\n\n    def f(self):\n        return "kept"\n')


def test_generated_mathematics_is_right():
    rng = random.Random(5)
    checked = 0
    for _ in range(2000):
        question, _, answer = math_problem(rng)
        checked += 1
        if question.startswith('Compute '):
            assert eval(question.removeprefix('Compute ').rstrip('.')) == int(answer)
        elif question.startswith('Solve x^2'):
            equation = question.removeprefix('Solve ').removesuffix(' = 0.')
            equation = equation.replace('^', '**').replace(')x', ')*x')
            for x in answer.removeprefix('x = ').split(' or x = '):
                assert eval(equation, {'x': int(x)}) == 0
        elif 'greatest common' in question:
            a, b = question.rstrip('.').split(' divisor of ')[1].split(' and ')
            assert int(answer) == np.gcd(int(a), int(b))
        elif '%' in question:
            percent, whole = question.removeprefix('What is ').rstrip('?').split('% of ')
            assert int(percent) * int(whole) == 100 * int(answer)
        else:
            checked -= 1
    assert checked > 800


def pair_information(stream):
    """Nats that a token tells about the next one: many in text, few in shuffled text."""
    pairs = stream[:-1].astype(np.int64) * 4096 + stream[1:]
    counts = np.unique(pairs, return_counts=True)[1]
    return (np.log(counts) * counts).sum() / counts.sum()


def test_demo_data_is_repeatable_disjoint_and_its_noise_is_shuffled(tmp_path, demo_data):
    done = run([sys.executable, 'prepare/demo.py', f'--out={tmp_path / "two"}'])
    assert done.returncode == 0, done.stderr
    assert contents(demo_data) == contents(tmp_path / 'two')
    tokenizer = load_tokenizer(str(demo_data / 'code'))
    assert tokenizer.vocab_size == 4096
    seen = {}
    for source in ('code', 'docs', 'math', 'noise', 'chat', 'reasoning'):
        meta = read_meta(demo_data / source)
        splits = meta['splits']
        assert meta['vocab_size'] == 4096
        assert meta['tokenizer']['fingerprint'] == tokenizer.fingerprint
        assert splits['train']['tokens'] > 150_000 and splits['val']['tokens'] > 10_000
        assert ('probe' in splits) == (source in ('code', 'docs', 'math'))
        for split in splits:
            path = demo_data / source / split / '00000_00000.bin'
            for document in map(tuple, documents_in(path, tokenizer.bos_id)):
                assert document not in seen, (source, split, seen[document])
                seen[document] = (source, split)
    code, noise = (
        np.fromfile(demo_data / source / 'train/00000_00000.bin', '<u2', offset=1024)
        for source in ('code', 'noise'))
    assert 'import ' in tokenizer.decode(code[:4000].tolist())
    assert pair_information(code[:len(noise)]) > pair_information(noise) + 1


def test_a_folder_of_texts_becomes_sources_that_share_a_tokenizer(tmp_path):
    words = 'the model reads a little more of every source and writes down what it has seen there'
    rng = np.random.default_rng(0)
    texts = {}
    for split, n, names in (('train', 30, 'ab'), ('val', 5, 'ab'), ('probes', 4, 'x')):
        for name in names:
            found = [f'{name} ' + ' '.join(rng.choice(words.split(), 60)) for _ in range(n)]
            path = write_lines(tmp_path / 'text' / split / f'{name}.jsonl', found)
            packed = gzip.compress(path.read_bytes(), mtime=0)
            (path.parent / f'{name}.jsonl.gz').write_bytes(packed)
            path.unlink()
            texts[split, name] = found

    def prepare_folder(text, out, *more):
        run_here(['prepare/folder.py', f'--input={text}', f'--out={tmp_path / out}', *more])

    def bytes_of(folder):
        (path,) = (tmp_path / folder).glob('*.bin')
        return path.read_bytes()

    prepare_folder(tmp_path / 'text', 'data', '--vocab_size=300')
    tokenizer = load_tokenizer(str(tmp_path / 'data/a'))
    assert tokenizer.vocab_size <= 300
    for folder, key in (('a/train', ('train', 'a')), ('b/val', ('val', 'b')),
                        ('probe/x/probe', ('probes', 'x'))):
        (path,) = (tmp_path / 'data' / folder).glob('*.bin')
        assert [*map(tokenizer.decode, documents_in(path, tokenizer.bos_id))] == texts[key]
    # A second run keeps what is there. A source made with the tokenizer of another equals it.
    before = (tmp_path / 'data/a/meta.json').stat().st_mtime_ns
    prepare_folder(tmp_path / 'text', 'data', '--vocab_size=300')
    assert (tmp_path / 'data/a/meta.json').stat().st_mtime_ns == before
    more = ["--sources=['b']", f'--tokenizer={tmp_path / "data/a"}']
    prepare_folder(tmp_path / 'text', 'other', *more)
    assert bytes_of('data/b/train') == bytes_of('other/b/train')
    with pytest.raises(BadInput, match="has no train/<source>.jsonl.gz in it"):
        prepare_folder(tmp_path / 'data', 'x')
    # An edited text is another one, even one that the tokenizer was not trained on.
    more = [f'--tokenizer={tmp_path / "data/a"}']
    path = write_lines(tmp_path / 'text/val/a.jsonl', [t.swapcase() for t in texts['val', 'a']])
    (tmp_path / 'text/val/a.jsonl.gz').unlink()
    with pytest.raises(BadInput, match=r'data/a was made with other settings \(files\)'):
        prepare_folder(tmp_path / 'text', 'data', *more)
    for content, message in (
            ('{"text": \n', 'a.jsonl:1: no valid JSON'),
            ('{"x": 1}', "no text in the field 'text'"), (None, 'has no val/a.jsonl.gz')):
        path.write_text(content) if content else path.unlink()
        with pytest.raises(BadInput, match=message):
            prepare_folder(tmp_path / 'text', 'fresh', *more)
    for argument in ('--vocab_size=10', '--vocab_size=0'):
        with pytest.raises(BadInput, match='must be at least 259'):
            prepare_folder(tmp_path / 'text', 'fresh', argument)
    write_lines(tmp_path / 'text/val/a.jsonl', ['x'])
    (tmp_path / 'text/val/a.JSONL.gz').write_bytes(gzip.compress(LINE, mtime=0))
    with pytest.raises(BadInput, match='a.jsonl and .*a.JSONL.gz have the same name'):
        prepare_folder(tmp_path / 'text', 'fresh', *more)
    with pytest.raises(BadInput, match='leave it out with --tokenizer'):
        prepare_folder(tmp_path / 'text', 'fresh', '--vocab_size=300', *more)
