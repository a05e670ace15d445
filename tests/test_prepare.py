import gzip
import hashlib
import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from configurator import BadInput
from data import Source
from lib import reading
from lib import tokenizer as tokenizer_module
from lib.tokenizer import (
    DIGITS_PATTERN,
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    load_tokenizer,
    make_tokenizer,
    save_tokenizer,
)
from prepare.common import check_space
from prepare.demo import cut_docstrings, math_problem
from prepare.shards import lock
from tests.conftest import ROOT, assert_one_sentence, run, run_here

WORDS = 'the cat sat on a mat and then it ran away from 12 dogs near 305 old houses naïve café 中文 \n\n'.split(' ')


def documents(n, seed=0):
    rng = random.Random(seed)
    return [' '.join(rng.choice(WORDS) for _ in range(rng.randint(1, 400))) for _ in range(n)]


@pytest.fixture
def byte_tokenizer(tmp_path):
    """256 bytes, ' t' and 'he', and an end-of-text token, saved as a rank file."""
    ranks = {bytes([b]): b for b in range(256)} | {b' t': 256, b'he': 257}
    folder = tmp_path / 'tok'
    folder.mkdir()
    save_tokenizer(str(folder), make_tokenizer('x', ranks, GPT2_PATTERN, {'<|endoftext|>': 258}, '<|endoftext|>'))
    return str(folder)


def prepare(*arguments, **options):
    return run([sys.executable, 'prepare/text.py', *(f'--{a}' for a in arguments)], **options)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def test_text_of_every_form_becomes_the_same_tokens(tmp_path, byte_tokenizer):
    import pyarrow
    import pyarrow.parquet
    texts = documents(60)
    lines = ''.join(json.dumps({'body': t}) + '\n' for t in texts)
    (tmp_path / 'a.jsonl').write_text(lines)
    (tmp_path / 'b.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
    (tmp_path / 'c.jsonl.zst').write_bytes(pyarrow.compress(lines.encode(), codec='zstd', asbytes=True))
    pyarrow.parquet.write_table(pyarrow.table({'body': texts}), tmp_path / 'd.parquet')
    (tmp_path / 'folder').mkdir()
    names = sorted((f'{i:03d}.txt' for i in range(60)), key=lambda name: hashlib.sha256(name.encode()).digest())
    for name, text in zip(names, texts):        # files are read in the order of their hashed names
        (tmp_path / 'folder' / name).write_text(text, newline='')
    results = []
    for name in ('a.jsonl', 'b.jsonl.gz', 'c.jsonl.zst', 'd.parquet', 'folder'):
        done = prepare(f'source={name}', f'input={tmp_path / name}', f'tokenizer={byte_tokenizer}', f'out={tmp_path / "out"}',
                       'column=body', 'val_fraction=0.2', 'probe_fraction=0.2', 'workers=0')
        assert done.returncode == 0, done.stderr
        results.append({k: v for k, v in contents(tmp_path / 'out' / name).items() if k.endswith('.bin')})
    assert all(r == results[0] for r in results) and set(results[0]) == {f'{s}/00000_00000.bin' for s in ('train', 'val', 'probe')}
    # against the definition: BOS and the document's tokens, one after the other; val and train together are everything
    tokenizer = load_tokenizer(byte_tokenizer)
    decoded = []
    for split in ('train', 'val', 'probe'):
        stream = np.frombuffer(results[0][f'{split}/00000_00000.bin'], dtype='<u2', offset=1024)
        decoded += [tokenizer.decode(part[1:].tolist()) for part in np.split(stream, np.flatnonzero(stream == 258))[1:]]
    assert sorted(decoded) == sorted(texts)
    meta = json.loads((tmp_path / 'out/a.jsonl/meta.json').read_text())
    assert sum(s['documents'] for s in meta['splits'].values()) == 60
    assert sum(s['bytes'] for s in meta['splits'].values()) == sum(len(t.encode()) for t in texts)
    assert 0 < meta['splits']['val']['documents'] < 30 and 0 < meta['splits']['probe']['documents'] < 30


def write_lines(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
    return path


@pytest.fixture(scope='module')
def many_files(tmp_path_factory):
    """Seven files of 1 to 3 MB, so several parts; a folder."""
    folder = tmp_path_factory.mktemp('many')
    for i in range(7):
        write_lines(folder / f'{i}.jsonl', documents(1500 + 700 * (i % 3), seed=i))
    return folder


def test_killed_preparation_goes_on_to_the_same_bytes(tmp_path, byte_tokenizer, many_files):
    arguments = [f'input={many_files}', f'tokenizer={byte_tokenizer}', 'shard_tokens=400000', 'source=x']
    done = prepare(f'out={tmp_path / "whole"}', 'workers=2', *arguments)
    assert done.returncode == 0, done.stderr
    expected = contents(tmp_path / 'whole')
    assert sum(name.startswith('x/train/') for name in expected) > 20
    kills, target, rng = 0, tmp_path / 'killed' / 'x', random.Random(0)
    while not (target / 'meta.json').exists():
        process = subprocess.Popen(
            [sys.executable, 'prepare/text.py', f'--out={tmp_path / "killed"}', f'--workers={kills % 2}',
             *(f'--{a}' for a in arguments)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted = len(list(target.glob('train/*.bin'))) + rng.randint(1, 6)
        while process.poll() is None and not (kills < 5 and len(list(target.glob('train/*.bin'))) >= wanted):
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 3 and contents(target.parent) == expected


@pytest.mark.parametrize('max_tokens', [None, 2_500_000])
def test_ranks_on_one_folder_give_the_bytes_of_one_process(tmp_path, byte_tokenizer, many_files, max_tokens):
    arguments = [f'input={many_files}', f'tokenizer={byte_tokenizer}', 'shard_tokens=400000', 'source=x', 'workers=0',
                 f'max_tokens={max_tokens}']
    assert prepare(f'out={tmp_path / "one"}', *arguments).returncode == 0
    expected = contents(tmp_path / 'one')
    tokens = json.loads(expected['x/meta.json'])['splits']['train']['tokens']
    assert max_tokens is None or max_tokens <= tokens < max_tokens + 2000
    # three ranks at once, by knobs; two one after the other, by torchrun's and SLURM's variables
    command = [sys.executable, 'prepare/text.py', f'--out={tmp_path / "three"}', '--world_size=3', *(f'--{a}' for a in arguments)]
    ranks = [subprocess.Popen([*command, f'--rank={r}'], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for r in range(3)]
    for process in ranks:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert contents(tmp_path / 'three') == expected
    first = prepare(f'out={tmp_path / "two"}', *arguments, RANK='1', WORLD_SIZE='2')
    assert first.returncode == 0 and 'The rank that ends last' in first.stdout, first.stdout
    with pytest.raises(BadInput, match='half prepared'):
        Source(tmp_path / 'two', 'x', 'train', 16)
    assert prepare(f'out={tmp_path / "two"}', *arguments, SLURM_PROCID='0', SLURM_NTASKS='2').returncode == 0
    assert contents(tmp_path / 'two') == expected


def test_a_second_run_on_one_output_is_refused(tmp_path, byte_tokenizer, many_files):
    arguments = [f'--input={many_files}', f'--tokenizer={byte_tokenizer}', '--source=x', '--workers=0', f'--out={tmp_path}']
    assert_one_sentence(run([sys.executable, 'prepare/text.py', *arguments, '--column=body']), 2, "no field 'body'")
    with lock(str(tmp_path / 'x'), '00000'):        # as a run at work holds it
        assert_one_sentence(run([sys.executable, 'prepare/text.py', *arguments, '--column=body']), 2, 'another run is writing to', 'another --out')
        assert_one_sentence(run([sys.executable, 'prepare/text.py', *arguments]), 2, 'other settings (columns)')
    assert run([sys.executable, 'prepare/text.py', *arguments]).returncode == 0
    for extra, message in ((['--rank=1'], 'go together'), (['--rank=2', '--world_size=2'], 'below world_size')):
        assert_one_sentence(run([sys.executable, 'prepare/text.py', *arguments, *extra]), 2, message)


def test_max_tokens_stops_and_a_finished_source_is_left_alone(tmp_path, byte_tokenizer):
    source = write_lines(tmp_path / 'in.jsonl', documents(2000))
    arguments = ['source=x', f'input={source}', f'tokenizer={byte_tokenizer}', f'out={tmp_path}', 'max_tokens=5000']
    assert prepare(*arguments).returncode == 0
    before = contents(tmp_path / 'x')
    tokens = json.loads(before['meta.json'])['splits']['train']['tokens']
    assert 5000 <= tokens < 8000
    again = prepare(*arguments)
    assert again.returncode == 0 and 'complete already' in again.stdout and contents(tmp_path / 'x') == before
    assert_one_sentence(prepare(*arguments[:-1], 'max_tokens=9000'), 2, 'max_tokens', 'Delete')


def test_broken_records_are_skipped_only_when_asked_for_and_then_listed(tmp_path, byte_tokenizer):
    texts = documents(400)
    lines = [json.dumps({'text': t}) for t in texts]
    lines[17], lines[200], lines[311], lines[350] = '{"text": 5}', 'no json', '{"body": "x"}', json.dumps({'text': ' ' * 1_000_001 + 'x'})
    (tmp_path / 'in.jsonl').write_text('\n'.join(lines))
    arguments = ['source=x', f'input={tmp_path / "in.jsonl"}', f'tokenizer={byte_tokenizer}', f'out={tmp_path}', 'workers=0', 'shard_tokens=3000']
    assert_one_sentence(prepare(*arguments), 2, 'in.jsonl:18', 'no text but int', '--skip_bad=True')
    done = prepare(*arguments, 'skip_bad=True')         # goes on after what was written before the fault
    assert done.returncode == 0 and '4 broken' in done.stdout and 'in.jsonl:201: no valid JSON' in done.stdout, done.stdout
    meta = json.loads((tmp_path / 'x/meta.json').read_text())
    assert meta['counts'] == {'broken': 4} and [w.split('in.jsonl:')[1].split(':')[0] for w in meta['skipped']] == ['18', '201', '312', '351']
    assert 'blanks in a row' in meta['skipped'][3]
    assert sum(s['documents'] for s in meta['splits'].values()) == 396


def test_what_will_not_fit_is_refused_before_it_begins(tmp_path):
    check_space(str(tmp_path / 'x'), 1000)
    with pytest.raises(BadInput, match='are needed. Free some space'):
        check_space(str(tmp_path / 'x'), 10**18)


def test_ctrl_c_stops_with_a_sentence_and_the_next_run_goes_on(tmp_path, byte_tokenizer, many_files):
    arguments = [f'--input={many_files}', f'--tokenizer={byte_tokenizer}', '--source=x', '--workers=2', '--shard_tokens=20000']
    assert run([sys.executable, 'prepare/text.py', *arguments, f'--out={tmp_path / "whole"}']).returncode == 0
    command = [sys.executable, 'prepare/text.py', *arguments, f'--out={tmp_path / "cut"}']
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))      # xdist's workers ignore it, and so would theirs
    while not list((tmp_path / 'cut').glob('x/train/*.bin')) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and 'run again to go on' in errors and 'Traceback' not in errors
    assert run(command).returncode == 0
    assert contents(tmp_path / 'cut/x') == contents(tmp_path / 'whole/x')


def test_large_files_are_cut_into_ranges_that_together_are_the_whole(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet
    texts = documents(3000)
    write_lines(tmp_path / 'a.jsonl', texts)
    pyarrow.parquet.write_table(pyarrow.table({'text': texts}), tmp_path / 'b.parquet', row_group_size=100)
    monkeypatch.setattr(reading, 'CUT_ABOVE', 100_000)
    monkeypatch.setattr(reading, 'LARGEST_PART', 70_001)
    monkeypatch.setattr(reading, 'BATCH_BYTES', 30_000)
    for name in ('a.jsonl', 'b.parquet'):
        parts = reading.make_parts(reading.local_files(str(tmp_path / name)))
        assert len(parts) >= 4 and all(len(part) == 1 for part in parts)
        read = [[(i, r['text']) for batch in reading.read_batches(f, ['text']) for i, r in reading.records_of(batch)] for f, in parts]
        assert [text for part in read for _, text in part] == texts
        for (file,), records in zip(parts, read):       # a part goes on anywhere
            for skip in (1, len(records) // 2, len(records)):
                rest = [(i, r['text']) for b in reading.read_batches(file, ['text'], skip) for i, r in reading.records_of(b)]
                assert rest == records[skip:]


def test_a_long_plain_text_becomes_documents_that_together_are_the_file(tmp_path, monkeypatch):
    text = '\n'.join(documents(300))
    (tmp_path / 'a.txt').write_text(text, newline='')
    monkeypatch.setattr(reading, 'LONGEST_TEXT', 20_000)
    file, = reading.local_files(str(tmp_path / 'a.txt'))
    pieces = [record for batch in reading.read_batches(file, []) for _, record in reading.records_of(batch)]
    assert ''.join(pieces) == text and len(pieces) > 5 and all(p.endswith('\n') and len(p) <= 20_000 for p in pieces[:-1])
    assert [r for b in reading.read_batches(file, [], 3) for _, r in reading.records_of(b)] == pieces[3:]


def test_training_reads_what_was_prepared(tmp_path, byte_tokenizer):
    (tmp_path / 'in.txt').write_text('the cat sat on the mat. ' * 200)
    assert prepare('source=x', f'input={tmp_path / "in.txt"}', f'tokenizer={byte_tokenizer}', f'out={tmp_path}', 'val_fraction=0').returncode == 0
    row = Source(tmp_path, 'x', 'train', 30, vocab_size=259).rows([0])[0]
    assert 'cat sat on' in load_tokenizer(str(tmp_path / 'x')).decode([t for t in row.tolist() if t != 258])


@pytest.mark.parametrize('name, content, extra, parts', [
    ('a.jsonl', b'{"text": "x"}\n{"text": \n', [], ['a.jsonl:2', 'JSON']),
    ('a.jsonl', b'{"body": "x"}\n', [], ["a.jsonl:1: no field 'text'", 'body', '--column']),
    ('a.jsonl', b'{"text": "\xff\xfe"}\n', [], ['a.jsonl', 'UTF-8']),
    ('a.jsonl.gz', gzip.compress(b'{"text": "hello"}\n' * 99, mtime=0)[:-20], [], ['a.jsonl.gz', 'cannot be read']),
    ('a.jsonl.gz', b'plain', [], ['a.jsonl.gz', 'cannot be read']),
    ('a.parquet', b'no parquet', [], ['a.parquet', 'no parquet file']),
    ('a.jsonl', b'{"text": "x\\ud83d"}\n', [], ['a.jsonl:1', 'surrogate']),
    ('a.txt', b'', [], ['holds no text']),
    ('b.jsonl', b'{"text": "x"}\n', ['input=nowhere/*.jsonl'], ['matches no file']),
    ('b.jsonl', b'{"text": "x"}\n', ['tokenizer=nope'], ["tokenizer 'nope'", 'neither a file']),
    ('b.jsonl', b'{"text": "x"}\n', ['source='], ['--source is missing']),
    ('b.jsonl', b'{"text": "x"}\n', ['max_token=1'], ["'max_tokens'"]),
])
def test_bad_input_gets_one_sentence(tmp_path, byte_tokenizer, name, content, extra, parts):
    (tmp_path / name).write_bytes(content)
    done = prepare('source=x', f'input={tmp_path / name}', f'tokenizer={byte_tokenizer}', f'out={tmp_path}', 'workers=1', *extra)
    assert_one_sentence(done, 2, *parts)


@pytest.mark.parametrize('broken', ['foreign', 'truncated'])
def test_broken_zst_gets_one_sentence(tmp_path, byte_tokenizer, broken):
    import pyarrow
    lines = b''.join(b'{"text": "document %d"}\n' % i for i in range(50_000))
    whole = pyarrow.compress(lines, codec='zstd', asbytes=True)
    (tmp_path / 'a.jsonl.zst').write_bytes(b'no zst at all' if broken == 'foreign' else whole[:-10])
    done = prepare('source=x', f'input={tmp_path / "a.jsonl.zst"}', f'tokenizer={byte_tokenizer}', f'out={tmp_path}', 'workers=1')
    assert_one_sentence(done, 2, 'a.jsonl.zst', 'cannot be read')


# -- tokenizers --------------------------------------------------------------------------------------------------------

SAMPLES = [*documents(20, seed=1), "I'll  say 3.14  \t x\n\n  y = [1,2]   # end ", 'e\u0301 5²½ ٣٤ \u00a0\u2003 z', '']


def trained_tokenizer_json(tmp_path, pre_tokenizer, normalizer=None, specials=('<|endoftext|>',)):
    tokenizers = pytest.importorskip('tokenizers')
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(tokenizers)
    if normalizer:
        tokenizer.normalizer = getattr(tokenizers.normalizers, normalizer)()
    tokenizer.train_from_iterator(documents(200), tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(specials), initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    path = str(tmp_path / 'tokenizer.json')
    tokenizer.save(path)
    return path, tokenizer


@pytest.mark.parametrize('kind', ['gpt2', 'digits', 'split', 'nfc'])
def test_tokenizer_json_gives_the_ids_of_tokenizers(tmp_path, kind):
    def pre_tokenizer(t):
        p = t.pre_tokenizers
        if kind == 'digits':
            return p.Sequence([p.Digits(individual_digits=True), p.ByteLevel(add_prefix_space=False)])
        if kind == 'split':
            pattern = t.Regex(r"(?i:'s|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
            return p.Sequence([p.Split(pattern, 'isolated'), p.ByteLevel(add_prefix_space=False, use_regex=False)])
        return p.ByteLevel(add_prefix_space=False)
    path, theirs = trained_tokenizer_json(tmp_path, pre_tokenizer, 'NFC' if kind == 'nfc' else None)
    ours = load_tokenizer(path)
    assert ours.vocab_size == theirs.get_vocab_size()
    for text in SAMPLES:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
    sizes = ours.token_bytes()
    assert sum(sizes[i] for i in ours.encode(SAMPLES[0])) == len(SAMPLES[0].encode()) and sizes[ours.bos_id] == 0
    save_tokenizer(str(tmp_path), ours)
    again = load_tokenizer(str(tmp_path / 'tokenizer.tiktoken'))
    assert again.fingerprint == ours.fingerprint and again.encode(SAMPLES[0]) == ours.encode(SAMPLES[0])


def nasty_texts():
    """What real text has little of: scripts and symbols of all Unicode, special tokens' names, very long lines, blanks."""
    rng = random.Random(1)
    for low, high in ((0x1f300, 0x1faff), (0x4e00, 0x9fff), (0, 0x20), (0x7f, 0xa0), (0xac00, 0xd7a3), (0x600, 0x6ff), (0x300, 0x36f),
                      (0x2000, 0x206f), (0xe000, 0xe0ff), (0x10000, 0x10ffff)):
        for _ in range(100):
            yield ''.join(chr(rng.randint(low, high)) if rng.random() < 0.7 else rng.choice(' \n\tabc1.é') for _ in range(60))
    yield '👩‍👩‍👧‍👦 🇩🇪 👍🏽 e\u0301 \u00a0x\u3000y\r\n\r\n \t \x0b\x0c\x85\u2028z'
    yield '<|endoftext|> a <|im_start|>user\nhi<|im_end|> <|begin_of_text|><|eot_id|> </s> <s> <think>x</think> |||IP_ADDRESS||| <|extra_id_0|>'
    yield from ('x' * 100_000, 'abc def ' * 30_000, ' ' * 50_000 + 'q', '0123456789' * 5000, 'word\n' * 50_000, '中文' * 30_000)


@pytest.mark.parametrize('name', ['gpt2', 'dolma2', 'bpe8k', 'gpt_neox_20b'])
def test_real_tokenizers_give_the_ids_of_tokenizers(shared_data, name):
    tokenizers = pytest.importorskip('tokenizers')
    path = str(shared_data / 'tokenizers' / name / 'tokenizer.json')
    ours, theirs = load_tokenizer(path), tokenizers.Tokenizer.from_file(path)
    theirs.encode_special_tokens = True         # names of special tokens in text are text
    texts = list(nasty_texts())
    for domain in sorted((shared_data / 'val').glob('*.jsonl.gz')):
        with gzip.open(domain, 'rt') as f:
            texts += [json.loads(line)['text'] for line in [*f][:25]]
    for text in texts:
        assert ours.encode_document(text).tolist() == theirs.encode(text, add_special_tokens=False).ids, text[:200]
    whole = '\n'.join(text for text in texts[-150:])
    assert ours.encode_document(whole).tolist() == theirs.encode(whole, add_special_tokens=False).ids
    assert len(list(ours.pieces(whole * 4))) > 1


@pytest.mark.parametrize('pattern', [GPT2_PATTERN, LLAMA3_PATTERN, DIGITS_PATTERN])
def test_a_document_of_any_length_gets_the_ids_of_the_whole(monkeypatch, pattern):
    ranks = {bytes([b]): b for b in range(256)} | {t: 256 + i for i, t in enumerate([b' t', b'he', b' the', b'\n\n', b'  ', b'00', b'aa'])}
    ours = make_tokenizer('x', ranks, pattern, {'<|endoftext|>': 300}, '<|endoftext|>')
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


@pytest.mark.parametrize('change, message', [
    (lambda j: j.update(normalizer={'type': 'NFKC'}), 'NFKC'),
    (lambda j: j['model'].update(type='Unigram'), 'Unigram'),
    (lambda j: j['model'].update(byte_fallback=True), 'byte_fallback'),
    (lambda j: j['model']['merges'].reverse(), 'order of its merges'),
    (lambda j: j.update(added_tokens=[]), 'special tokens'),
    (lambda j: j.update(pre_tokenizer={'type': 'Whitespace'}), 'Whitespace'),
    (lambda j: j.update(pre_tokenizer=None), 'splits nothing'),
])
def test_tokenizers_that_cannot_be_read_exactly_are_refused(tmp_path, change, message):
    path, _ = trained_tokenizer_json(tmp_path, lambda t: t.pre_tokenizers.ByteLevel(add_prefix_space=False))
    content = json.loads(open(path).read())
    change(content)
    open(path, 'w').write(json.dumps(content))
    with pytest.raises(BadInput, match=message):
        load_tokenizer(path)


# -- the demo's data ---------------------------------------------------------------------------------------------------

def test_docstrings_are_cut_out_and_collected():
    text = '"""Top."""\nimport os\n\n\nclass A:\n    """Of A."""\n    x = 1\n\n    def f(self):\n        """Of f,\n        two lines."""\n        return "kept"\n'
    code, docstrings = cut_docstrings(text)
    assert docstrings == [('', 'Top.'), ('.A', 'Of A.'), ('.A.f', 'Of f,\ntwo lines.')]
    assert code == 'import os\n\n\nclass A:\n    x = 1\n\n    def f(self):\n        return "kept"\n'


def test_generated_mathematics_is_right():
    rng = random.Random(5)
    checked = 0
    for _ in range(2000):
        problem = math_problem(rng)
        lines = problem.split('\n')
        answer = lines[-1].removeprefix('Answer: ')
        if lines[0].startswith('Problem: Compute '):
            assert eval(lines[0].removeprefix('Problem: Compute ').rstrip('.')) == int(answer)
            checked += 1
        elif lines[0].startswith('Problem: Solve x^2'):
            equation = lines[0].removeprefix('Problem: Solve ').removesuffix(' = 0.').replace('^', '**').replace(')x', ')*x')
            for x in answer.removeprefix('x = ').split(' or x = '):
                assert eval(equation, {'x': int(x)}) == 0
            checked += 1
        elif 'greatest common' in lines[0]:
            a, b = (int(w) for w in lines[0].rstrip('.').replace('Problem: Find the greatest common divisor of ', '').split(' and '))
            assert int(answer) == np.gcd(a, b)
            checked += 1
        elif '%' in lines[0]:
            percent, whole = lines[0].removeprefix('Problem: What is ').rstrip('?').split('% of ')
            assert int(percent) * int(whole) == 100 * int(answer)
            checked += 1
    assert checked > 800


def test_demo_data_is_repeatable_disjoint_and_its_noise_is_shuffled(tmp_path, demo_data):
    folders = [demo_data, tmp_path / 'two']
    done = run([sys.executable, 'prepare/demo.py', f'--out={folders[1]}'])
    assert done.returncode == 0, done.stderr
    assert contents(folders[0]) == contents(folders[1])
    tokenizer = load_tokenizer(str(folders[0] / 'code'))
    assert tokenizer.vocab_size == 4096
    seen = {}
    for source in ('code', 'docs', 'math', 'noise', 'chat', 'reasoning'):
        meta = json.loads((folders[0] / source / 'meta.json').read_text())
        assert meta['vocab_size'] == 4096 and meta['tokenizer']['fingerprint'] == tokenizer.fingerprint
        assert meta['splits']['train']['tokens'] > 150_000 and meta['splits']['val']['tokens'] > 10_000
        assert ('probe' in meta['splits']) == (source in ('code', 'docs', 'math'))
        for split in meta['splits']:
            stream = np.frombuffer((folders[0] / source / split / '00000_00000.bin').read_bytes(), dtype='<u2', offset=1024)
            for part in np.split(stream, np.flatnonzero(stream == tokenizer.bos_id))[1:]:
                assert part.tobytes() not in seen, (source, split, seen[part.tobytes()])
                seen[part.tobytes()] = (source, split)
    code = np.frombuffer((folders[0] / 'code/train/00000_00000.bin').read_bytes(), dtype='<u2', offset=1024)
    noise = np.frombuffer((folders[0] / 'noise/train/00000_00000.bin').read_bytes(), dtype='<u2', offset=1024)
    assert 'import ' in tokenizer.decode(code[:4000].tolist())

    def pair_information(stream):      # nats that the token before tells of a token: high in text, low when shuffled
        pairs = np.unique(stream[:-1].astype(np.int64) * 4096 + stream[1:], return_counts=True)[1]
        return (np.log(pairs) * pairs).sum() / pairs.sum()
    assert pair_information(code[:len(noise)]) > pair_information(noise) + 1


def test_a_folder_of_texts_becomes_sources_that_share_a_tokenizer(tmp_path, capsys):
    words = 'the model reads a little more of every source and writes down what it has seen there today'.split()
    rng = np.random.default_rng(0)
    texts = {split: [' '.join(rng.choice(words, 60)) + '.' for _ in range(n)] for split, n in (('train', 30), ('val', 5), ('probes', 4))}
    for split, names in (('train', 'ab'), ('val', 'ab'), ('probes', 'x')):
        (tmp_path / 'text' / split).mkdir(parents=True)
        for name in names:
            with gzip.open(tmp_path / 'text' / split / f'{name}.jsonl.gz', 'wt') as f:
                f.writelines(json.dumps(dict(text=name + ' ' + text)) + '\n' for text in texts[split])
    command = ['prepare/folder.py', f'--input={tmp_path / "text"}', f'--out={tmp_path / "data"}', '--vocab_size=300']
    run_here(command)
    tokenizer = load_tokenizer(str(tmp_path / 'data' / 'a'))
    assert tokenizer.vocab_size <= 300
    for folder, split, name in (('a', 'train', 'a'), ('b', 'val', 'b'), ('probe/x', 'probe', 'x')):
        (path,) = (tmp_path / 'data' / folder / split).glob('*.bin')
        ids = np.fromfile(path, dtype='<u2', offset=1024).tolist()
        documents = [d for d in tokenizer.decode(ids).split(tokenizer.decode([tokenizer.bos_id])) if d]
        assert documents == [f'{name} {text}' for text in texts['probes' if folder == 'probe/x' else split]]
    before = (tmp_path / 'data' / 'a' / 'meta.json').stat().st_mtime_ns
    run_here(command)
    assert (tmp_path / 'data' / 'a' / 'meta.json').stat().st_mtime_ns == before
    run_here([*command[:2], "--sources=['b']", f'--tokenizer={tmp_path / "data" / "a"}', f'--out={tmp_path / "other"}'])       # its tokens are those of data/b
    same = [next((tmp_path / folder / 'b' / 'train').glob('*.bin')).read_bytes() for folder in ('data', 'other')]
    assert same[0] == same[1]
    with pytest.raises(BadInput, match="has no train/<source>.jsonl.gz in it"):
        run_here(['prepare/folder.py', f'--input={tmp_path / "data"}'])
