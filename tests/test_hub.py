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

import pyarrow
import pyarrow.parquet
import pytest

from configurator import RunFault
from lib import reading
from tests import test_prepare
from tests.conftest import ROOT, assert_one_sentence, run
from tests.test_prepare import contents, documents, read_meta, total

byte_tokenizer = test_prepare.byte_tokenizer            # fixtures
cache_folder = test_prepare.cache_folder
SHA = 'e92b25a616738fe95dc186b64dfb19f9c8525594'        # the commit that prepare/finemath.py names
FINEMATH = 'HuggingFaceTB/finemath'
NOWHERE = 'http://127.0.0.1:9'
ROUTE = re.compile(r'/(?:api/)?(?:datasets/|models/)?([^/]+/[^/]+)/?'
                   r'(revision|tree|resolve|paths-info)?/?([^/]*)/?(.*)')


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
            return self.answer(dict(id=repo, sha=sha, siblings=siblings))
        if kind == 'tree':
            return self.answer(self.entries(files, below))
        if kind == 'paths-info':
            body = self.rfile.read(int(self.headers['Content-Length']))
            asked = urllib.parse.parse_qs(body.decode()).get('paths', [])
            return self.answer([e for e in self.entries(files) if e['path'] in asked])
        if self.server.gated and not self.headers.get('Authorization'):
            return self.answer({}, 401, X_Error_Code='GatedRepo')
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
