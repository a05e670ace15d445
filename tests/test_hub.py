"""Reading from the hub: the real huggingface_hub client against a stand-in hub on this machine."""
import hashlib
import http.server
import io
import json
import re
import shutil
import sys
import threading
import urllib.parse

from tests.conftest import need

need('pyarrow', 'orjson', 'isal')

import pyarrow
import pyarrow.parquet
import pytest

from configurator import BadInput, RunFault
from lib import reading, streaming
from tests import test_prepare
from tests.conftest import ROOT, assert_one_sentence, run, run_here
from tests.test_prepare import contents, documents, read_meta, total

byte_tokenizer = test_prepare.byte_tokenizer            # fixtures
cache_folder = test_prepare.cache_folder
SHA = 'e92b25a616738fe95dc186b64dfb19f9c8525594'        # the commit that prepare/finemath.py names
FINEMATH = 'HuggingFaceTB/finemath'
NOWHERE = 'http://127.0.0.1:9'
ROUTE = re.compile(r'/(?:api/)?(?:datasets/|models/)?([^/]+/[^/]+)/?'
                   r'(revision|tree|resolve|paths-info|auth-check)?/?([^/]*)/?(.*)')


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as reading needs.

    The server has repos {id: {path: bytes}}, sha {id: commit}, old commits, gated, and seen paths.
    """

    def log_message(self, *_):
        pass

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {'Content-Length': str(len(body)), 'ETag': '"x"', **headers}.items():
            self.send_header(key.replace('_', '-'), value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def entries(self, files, below=''):
        """The folders and files of a repository in the form of the hub."""
        folders = set()
        for path in files:
            folders.update(path[:match.start()] for match in re.finditer('/', path))
        found = [dict(type='directory', path=path, oid='x', size=0) for path in sorted(folders)]
        for path, content in files.items():
            oid = hashlib.sha1(content).hexdigest()
            found.append(dict(type='file', path=path, oid=oid, size=len(content)))
        return [entry for entry in found if entry['path'].startswith(below)]

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        self.server.seen.append(path)
        match = ROUTE.match(path)
        if match is None:
            return self.answer({}, 404)
        repo, kind, revision, below = match.groups()
        files = self.server.repos.get(repo)
        if files is None:
            return self.answer({}, 404, X_Error_Code='RepoNotFound')
        sha = self.server.sha[repo]
        if revision and revision not in (sha, 'main', *self.server.old):
            return self.answer({}, 404, X_Error_Code='RevisionNotFound')
        if kind in (None, 'revision'):
            siblings = [dict(rfilename=name) for name in files]
            if len(revision) == 40:
                sha = revision
            gated = 'auto' if self.server.gated else False
            return self.answer(dict(id=repo, sha=sha, siblings=siblings, gated=gated))
        if kind == 'tree':
            return self.answer(self.entries(files, below))
        if kind == 'paths-info':
            body = self.rfile.read(int(self.headers['Content-Length']))
            asked = urllib.parse.parse_qs(body.decode()).get('paths', [])
            return self.answer([e for e in self.entries(files) if e['path'] in asked])
        if self.server.gated and not self.headers.get('Authorization'):
            return self.answer({}, 401, X_Error_Code='GatedRepo')
        if kind == 'auth-check':
            return self.answer({})
        if below not in files:
            return self.answer({}, 404, X_Error_Code='EntryNotFound')
        content = files[below]
        span = self.headers.get('Range')
        if span is None:
            return self.answer(
                content, Accept_Ranges='bytes', X_Repo_Commit=sha, ETag=f'"{hash(below)}"')
        start, _, stop = span.removeprefix('bytes=').partition('-')
        start = int(start)
        stop = min(int(stop or len(content) - 1), len(content) - 1)
        where = f'bytes {start}-{stop}/{len(content)}'
        return self.answer(content[start:stop + 1], 206, Content_Range=where)

    do_HEAD = do_POST = do_GET


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.repos = {}
    server.sha = {FINEMATH: SHA}
    server.old = []
    server.gated = False
    server.seen = []
    server.url = f'http://127.0.0.1:{server.server_address[1]}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def parquet(texts):
    out = io.BytesIO()
    table = pyarrow.table({'url': ['u'] * len(texts), 'text': texts})
    pyarrow.parquet.write_table(table, out, row_group_size=50)
    return out.getvalue()


def run_on_hub(url, *command):
    environment = dict(
        HF_ENDPOINT=url, PYTHONPATH=str(ROOT / 'tests/ample_disk'), HF_HUB_ETAG_TIMEOUT='5',
        HF_TOKEN='', HF_HUB_DISABLE_IMPLICIT_TOKEN='1')
    return run([sys.executable, *command], **environment)


def prepare(url, tokenizer, out, *arguments, script='finemath'):
    """Runs a script of prepare/, which must succeed. Returns what it prints."""
    done = run_on_hub(
        url, f'prepare/{script}.py', f'--tokenizer={tokenizer}', f'--out={out}', '--workers=0',
        *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_dataset_is_streamed_from_the_hub_as_from_its_download(hub, tmp_path, byte_tokenizer):
    shards = [documents(300, seed=i) for i in range(3)]
    files = {'finemath-4plus/train-00000-of-00001.parquet': parquet(['not this one'])}
    for i, texts in enumerate(shards):
        files[f'finemath-3plus/train-{i:05d}-of-00003.parquet'] = parquet(texts)
    hub.repos[FINEMATH] = files
    printed = prepare(hub.url, byte_tokenizer, tmp_path, '--workers=1')
    meta = read_meta(tmp_path / 'finemath')
    assert total(meta, 'documents') == 900
    assert total(meta, 'bytes') == sum(len(text.encode()) for texts in shards for text in texts)
    assert meta['revision'] == {FINEMATH: SHA} and 'about 21,400,000 documents' in printed
    for name, content in files.items():
        path = tmp_path / 'download' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    prepare(NOWHERE, byte_tokenizer, tmp_path / 'local', f'--input={tmp_path / "download"}')

    def shards_of(folder):      # sorted, since the order of files differs between hub and disk
        made = contents(folder / 'finemath')
        return sorted(made[name] for name in made if name.endswith('.bin'))

    assert shards_of(tmp_path) == shards_of(tmp_path / 'local')


def test_an_unpinned_dataset_goes_on_at_the_commit_that_it_was_begun_with(
        hub, tmp_path, byte_tokenizer):
    repo = 'open-web-math/open-web-math'
    first = 'a' * 40
    second = 'b' * 40
    hub.repos[repo] = {
        'data/train-0.parquet': parquet(documents(200) + ['x'] * 5),
        'data/train-1.parquet': parquet(documents(200, seed=1))}
    hub.sha[repo] = first
    prepare(hub.url, byte_tokenizer, tmp_path, script='openwebmath')
    whole = contents(tmp_path / 'openwebmath')
    meta = read_meta(tmp_path / 'openwebmath')
    assert meta['revision'] == {repo: first}
    # As if it was killed at its very beginning. Meanwhile somebody uploads a new commit.
    shutil.rmtree(tmp_path / 'openwebmath')
    progress = tmp_path / 'openwebmath/progress'
    progress.mkdir(parents=True)
    (progress / 'source.json').write_text(json.dumps(dict(settings=meta['settings'])))
    hub.sha[repo] = second
    hub.old = [first]
    prepare(hub.url, byte_tokenizer, tmp_path, script='openwebmath')
    assert contents(tmp_path / 'openwebmath') == whole
    prepare(hub.url, byte_tokenizer, tmp_path / 'new', script='openwebmath')
    assert read_meta(tmp_path / 'new/openwebmath')['revision'] == {repo: second}


def test_a_branch_with_other_files_of_the_same_sizes_is_another_input(
        hub, tmp_path, byte_tokenizer):
    hub.repos[FINEMATH] = {'finemath-3plus/train-0.parquet': parquet(['a text'])}
    hub.old = ['branch']
    prepare(hub.url, byte_tokenizer, tmp_path, '--revision=branch')
    assert 'complete already' in prepare(hub.url, byte_tokenizer, tmp_path, '--revision=branch')
    hub.repos[FINEMATH] = {'finemath-3plus/train-0.parquet': parquet(['b text'])}
    done = run_on_hub(
        hub.url, 'prepare/finemath.py', '--workers=0', f'--tokenizer={byte_tokenizer}',
        f'--out={tmp_path}', '--revision=branch')
    assert_one_sentence(done, 2, 'made with other settings (files)')


def test_a_taste_reads_little(hub, tmp_path, byte_tokenizer):
    hub.repos[FINEMATH] = {}
    for i in range(2):
        texts = [text * 200 for text in documents(400, seed=i)]
        hub.repos[FINEMATH][f'finemath-3plus/train-{i}.parquet'] = parquet(texts)
    prepare(hub.url, byte_tokenizer, tmp_path, '--max_tokens=2000')
    train = read_meta(tmp_path / 'finemath')['splits']['train']
    assert train['tokens'] >= 2000 and train['documents'] < 50
    assert len({path for path in hub.seen if '/resolve/' in path}) == 1     # one of two files


def test_https_files_are_read_in_ranges(hub, monkeypatch):
    texts = documents(3000)
    lines = [json.dumps({'text': text}) + '\n' for text in texts]
    hub.repos['x/y'] = {'all.jsonl': ''.join(lines).encode()}
    hub.sha['x/y'] = 'main'
    monkeypatch.setattr(reading, 'CUT_ABOVE', 200_000)
    monkeypatch.setattr(reading, 'LARGEST_PART', 100_000)
    files, commits = reading.remote_files([f'{hub.url}/datasets/x/y/resolve/main/all.jsonl'])
    parts = reading.make_parts(files)
    assert files[0].content.startswith('"')         # the ETag
    assert commits == {} and len(parts) == -(-files[0].size // 100_000) > 5
    records = reading.records_in([file for part in parts for file in part], ['text'])
    assert [record['text'] for _, record in records] == texts


def test_an_https_file_that_is_out_of_reach_is_named(hub):
    with pytest.raises(RunFault, match='all.jsonl cannot be reached'):
        reading.remote_files([f'{NOWHERE}/all.jsonl'])
    with pytest.raises(RunFault, match='404'):
        reading.remote_files([f'{hub.url}/nothing.jsonl'])


@pytest.mark.parametrize('state, code, parts', [
    ('gated', 2, ['HuggingFaceTB/finemath is gated', 'accept its terms', 'HF_TOKEN']),
    ('missing', 2, ['HuggingFaceTB/finemath', 'does not exist on the hub', '--input']),
    ('revision', 2, ['no such revision', '--revision']),
    ('layout', 2, ['has no file finemath-3plus/*.parquet', SHA]),
    ('damaged', 2, ['train-0.parquet', 'no parquet file']),
    ('no network', 1, ['HuggingFaceTB/finemath', 'cannot be reached', '--input'])])
def test_what_goes_wrong_on_the_hub_is_one_sentence(
        hub, tmp_path, byte_tokenizer, state, code, parts):
    if state != 'missing':
        name = 'elsewhere/x.parquet' if state == 'layout' else 'finemath-3plus/train-0.parquet'
        content = b'no parquet at all' if state == 'damaged' else parquet(['a text'])
        hub.repos[FINEMATH] = {name: content}
    if state == 'revision':
        hub.sha[FINEMATH] = 'c' * 40
    hub.gated = state == 'gated'
    done = run_on_hub(
        NOWHERE if state == 'no network' else hub.url, 'prepare/finemath.py', '--workers=0',
        f'--tokenizer={byte_tokenizer}', f'--out={tmp_path}')
    assert_one_sentence(done, code, *parts)
    assert not (tmp_path / 'finemath/meta.json').exists()


@pytest.mark.parametrize('state, code, parts', [
    ('fine', 0, []),
    ('gated', 2, ['some/model is gated', 'https://huggingface.co/some/model', 'HF_TOKEN']),
    ('missing', 2, ['some/model does not exist on the hub']),
    ('revision', 2, ['no such revision', '--revision']),
    ('no network', 1, ['some/model cannot be reached', 'downloaded folder'])])
def test_a_model_comes_from_the_hub(hub, tmp_path, monkeypatch, state, code, parts):
    from tests.test_hf import their_model
    their_model('Llama', {}, tmp_path / 'hf', max_shard_size='40KB')
    if state != 'missing':
        files = {path.name: path.read_bytes() for path in (tmp_path / 'hf').iterdir()}
        hub.repos['some/model'] = {**files, 'model.bin': b'not fetched'}
        hub.sha['some/model'] = 'c' * 40
    hub.gated = state == 'gated'
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))
    command = ['tools/hf.py', 'import', '--model=some/model', f'--out={tmp_path}/ours']
    if state == 'revision':
        command.append('--revision=v2')
    done = run_on_hub(NOWHERE if state == 'no network' else hub.url, *command)
    if code:
        return assert_one_sentence(done, code, *parts)
    assert done.returncode == 0 and (tmp_path / 'ours/ckpt/latest').exists(), done.stderr
    assert not any('model.bin' in path for path in hub.seen)


# -- any dataset by its name -----------------------------------------------------------------------

ANY = 'some/data'
README = """---
license: odc-by
configs:
- config_name: one
  data_files:
  - split: train
    path: one/train-*
  - split: test
    path: one/test-*
- config_name: two
  data_files: two/*
---
Two configs.
"""


def any_dataset(n_files=3, n_rows=300):
    files = {'README.md': README.encode(), 'one/test-0.parquet': parquet(['not this one'])}
    for i in range(n_files):
        files[f'one/train-{i}.parquet'] = parquet(documents(n_rows, seed=i))
    files['two/a.jsonl'] = b'{"body": "not this one"}\n'
    return files


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def local(tmp_path):
    """A local copy of the dataset, in a folder whose name is no glob."""
    folder = tmp_path / 'my [1] *data'
    write_files(folder, any_dataset())
    return folder


@pytest.fixture
def by_name(tmp_path, byte_tokenizer):
    """Runs prepare/hub.py in this process."""
    def run_script(dataset, out='out', config='one', **knobs):
        knobs = {**dict(source='x', tokenizer=byte_tokenizer, workers=0), **knobs}
        command = ['prepare/hub.py', f'--dataset={dataset}', f'--out={tmp_path / out}']
        run_here([*command, f'--config={config}', *(f'--{k}={knobs[k]}' for k in knobs)])
        return tmp_path / out / 'x'

    return run_script


def test_a_dataset_is_prepared_by_its_name(hub, tmp_path, byte_tokenizer, local, by_name):
    hub.repos[ANY] = any_dataset()
    hub.sha[ANY] = SHA
    arguments = [f'--dataset={ANY}', '--config=one', '--source=x']
    printed = prepare(hub.url, byte_tokenizer, tmp_path / 'hub', *arguments, script='hub')
    meta = read_meta(tmp_path / 'hub/x')
    assert meta['revision'] == {ANY: SHA} and meta['settings']['commits'] == {ANY: SHA}
    assert total(meta, 'documents') == 900 and '3 files' in printed
    # The same files in a folder give the same bytes, and so does the reader of prepare/text.py.
    made = by_name(local)
    run_here(['prepare/text.py', '--source=x', f'--tokenizer={byte_tokenizer}', '--workers=0',
              f'--input={local / "one"}/train-*', f'--out={tmp_path / "text"}'])
    shards = []
    for folder in (tmp_path / 'hub/x', made, tmp_path / 'text/x'):
        found = contents(folder)
        shards.append([found[name] for name in sorted(found) if name.endswith('.bin')])
    assert shards[0] == shards[1]
    # The names of the files order them, and those of prepare/text.py begin at the glob.
    assert sorted(map(len, shards[0])) == sorted(map(len, shards[2]))
    # A new commit does not change a source that was begun.
    shutil.rmtree(tmp_path / 'hub/x')
    progress = tmp_path / 'hub/x/progress'
    progress.mkdir(parents=True)
    (progress / 'source.json').write_text(json.dumps(dict(settings=meta['settings'])))
    hub.sha[ANY] = 'b' * 40
    hub.old = [SHA]
    prepare(hub.url, byte_tokenizer, tmp_path / 'hub', *arguments, script='hub')
    assert read_meta(tmp_path / 'hub/x') == meta
    # Without --source the name is that of the dataset and its config.
    prepare(hub.url, byte_tokenizer, tmp_path / 'hub', *arguments[:2], script='hub')
    assert read_meta(tmp_path / 'hub/data_one')['revision'] == {ANY: 'b' * 40}


@pytest.mark.parametrize('state, arguments, code, parts', [
    ('config', ['--config=tow'], 2, ["no config 'tow'. Did you mean 'two'?", 'one, two']),
    ('no config', [], 2, ['several configs, and --config is missing', 'one, two']),
    ('split', ['--config=one', '--split=valid'], 2, ["no split 'valid'", 'train, test']),
    ('column', ['--config=one', '--column=txt'], 2, ["no column 'txt'. Did you mean 'text'?",
                                                     'url, text', '--column']),
    ('gated', ['--config=one'], 2, [f'{ANY} is gated', 'accept its terms', 'HF_TOKEN']),
    ('missing', [], 2, [ANY, 'does not exist on the hub', '--dataset']),
    ('revision', ['--revision=v2'], 2, ['no such revision', '--revision']),
    ('script', [], 2, ['needs a loading script (data.py)', 'refs/convert/parquet']),
    ('empty', [], 2, ['has nothing that `datasets` reads']),
    ('damaged', ['--config=one'], 2, ['cannot be read by `datasets`', 'Parquet magic bytes']),
    ('no network', [], 1, [f'{ANY} cannot be reached', '--dataset'])])
def test_what_a_dataset_lacks_is_one_sentence(
        hub, tmp_path, byte_tokenizer, monkeypatch, state, arguments, code, parts):
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))
    if state != 'missing':
        hub.repos[ANY] = any_dataset(1, 5)
        hub.sha[ANY] = SHA
    if state == 'script':
        hub.repos[ANY] = {'data.py': b'raise SystemExit("foreign code")'}
    if state == 'empty':
        hub.repos[ANY] = {'README.md': b'nothing'}
    if state == 'damaged':
        hub.repos[ANY]['one/train-0.parquet'] = b'no parquet at all'
    hub.gated = state == 'gated'
    done = run_on_hub(
        NOWHERE if state == 'no network' else hub.url, 'prepare/hub.py', f'--dataset={ANY}',
        '--workers=0', f'--tokenizer={byte_tokenizer}', f'--out={tmp_path}', *arguments)
    assert_one_sentence(done, code, *parts)
    assert not list(tmp_path.glob('data*/meta.json'))


def test_a_part_of_a_dataset_continues_at_any_row(tmp_path):
    write_files(tmp_path / 'p', {'a.parquet': parquet(documents(120))})
    # The types of `content` are mixed, which `datasets` keeps as JSON.
    turns = [dict(role='user', content='a'), dict(role='assistant', content=['x', 1], extra=2)]
    lines = [json.dumps(dict(text=turns[:1 + i % 2])) for i in range(9)]
    write_files(tmp_path / 'j', {'a.jsonl': '\n'.join(lines).encode()})
    for name, n_rows in (('p', 120), ('j', 9)):
        stream = streaming.Stream(str(tmp_path / name), '', '', 'train', ('text',))
        (shard,) = streaming.find_shards(stream)

        def rows(skip, shard=shard):
            batches = streaming.read_shard(shard, ('text',), skip)
            return [row for batch in batches for row in reading.records_of(batch)]

        whole = rows(0)
        assert [number for number, _ in whole] == list(range(n_rows))
        for skip in (1, 5, n_rows // 2, n_rows - 1, n_rows):
            assert rows(skip) == whole[skip:]
    assert [json.dumps(row) for _, row in whole] == lines


def test_a_dataset_is_prepared_by_ranks_and_after_a_fault_as_in_one_go(
        tmp_path, local, by_name, monkeypatch):
    monkeypatch.setattr(reading, 'LARGEST_PART', 1)     # a part for each file
    monkeypatch.setattr(streaming, 'ROWS', 70)
    knobs = dict(shard_tokens=20_000)
    expected = contents(by_name(local, 'one', **knobs))
    assert len({name.split('_')[0] for name in expected if 'train/' in name}) == 3
    for rank in (1, 0):
        made = by_name(local, 'ranks', rank=rank, world_size=2, **knobs)
    assert contents(made) == expected
    # A broken row stops the run. What stands before it is kept.
    broken = ' ' * 1_000_001 + 'x'
    table = pyarrow.table({'text': [*documents(200), broken, *documents(200, seed=1)]})
    pyarrow.parquet.write_table(table, local / 'one/train-1.parquet')
    with pytest.raises(BadInput, match='train-1.parquet: row 201: .*blanks in a row'):
        by_name(local, 'fault', **knobs)
    assert list((tmp_path / 'fault/x/train').iterdir())
    whole = contents(by_name(local, 'whole', skip_bad=True, **knobs))
    assert contents(by_name(local, 'fault', skip_bad=True, **knobs)) == whole


def test_conversations_of_a_dataset_get_masks(tmp_path, by_name):
    from lib.byte_level import GPT2_PATTERN
    from lib.tokenizer import make_tokenizer, save_tokenizer
    names = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
    special = {name: 256 + i for i, name in enumerate(names)}
    ranks = {bytes([b]): b for b in range(256)}
    tokenizer = make_tokenizer('x', ranks, GPT2_PATTERN, special, '<|endoftext|>')
    (tmp_path / 'chat').mkdir()
    save_tokenizer(str(tmp_path / 'chat'), tokenizer)
    rows = []
    for i in range(40):
        turns = [dict(role='user', content=f'say {i}'), dict(role='assistant', content=f'{i}')]
        rows.append(json.dumps(dict(messages=turns)) + '\n')
    write_files(tmp_path / 'in', {'train.jsonl': ''.join(rows).encode()})
    more = dict(column='messages', chat_template='chatml', tokenizer=tmp_path / 'chat')
    made = by_name(tmp_path / 'in', 'hub', config='', **more)
    run_here(['prepare/text.py', '--source=x', f'--input={tmp_path / "in"}', '--workers=0',
              f'--out={tmp_path / "text"}', *(f'--{k}={more[k]}' for k in more)])
    theirs = contents(tmp_path / 'text/x')
    ours = contents(made)
    assert {n: ours[n] for n in ours if n != 'meta.json'} == {
        n: theirs[n] for n in theirs if n != 'meta.json'}


@pytest.mark.parametrize('dataset, knobs, part', [
    ('', {}, '--dataset is missing'), ('a b', {}, 'neither a folder nor the id'),
    ('LOCAL', dict(revision='main'), 'local folder'), ('LOCAL', dict(input='x'), '--dataset names'),
    ('SAVED', {}, 'written by save_to_disk. Use prepare/text.py')])
def test_a_mistake_in_the_name_is_named(tmp_path, local, by_name, dataset, knobs, part):
    write_files(tmp_path / 'saved', {'state.json': b'{}'})
    dataset = dict(LOCAL=local, SAVED=tmp_path / 'saved').get(dataset, dataset)
    with pytest.raises(BadInput, match=part):
        by_name(dataset, **knobs)


def test_a_dataset_that_is_gone_names_what_stands_in(hub, tmp_path, byte_tokenizer):
    done = run_on_hub(
        hub.url, 'prepare/slimpajama.py', '--workers=0', f'--tokenizer={byte_tokenizer}',
        f'--out={tmp_path}')
    assert_one_sentence(
        done, 2, 'cerebras/SlimPajama-627B is not on the hub', 'February 2026', '--input',
        'prepare/dclm.py')
