"""Reading from the hub: the real huggingface_hub client against a stand-in hub on this machine."""
import http.server
import json
import re
import shutil
import sys
import threading
import urllib.parse

import pytest

from configurator import RunFault
from lib import reading
from tests.conftest import ROOT, assert_one_sentence, run
from tests.test_prepare import byte_tokenizer, contents, documents  # noqa: F401  (a fixture among them)

SHA = 'e92b25a616738fe95dc186b64dfb19f9c8525594'         # the commit that prepare/finemath.py names


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as reading needs. The server has: repos {id: {path: bytes}}, sha {id: commit}, gated."""

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
        folders = {path[:m.start()] for path in files for m in re.finditer('/', path)}
        return [dict(type='directory', path=p, oid='x', size=0) for p in sorted(folders) if p.startswith(below)] + [
            dict(type='file', path=p, oid='x', size=len(content)) for p, content in files.items() if p.startswith(below)]

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        self.server.seen.append(path)
        match = re.match(r'/(?:api/)?(?:datasets/|models/)?([^/]+/[^/]+)/?(revision|tree|resolve|paths-info)?/?([^/]*)/?(.*)', path)
        if match is None:
            return self.answer({}, 404)
        repo, kind, revision, below = match.groups()
        files = self.server.repos.get(repo)
        if files is None:
            return self.answer({}, 404, X_Error_Code='RepoNotFound')
        if revision and revision not in (self.server.sha[repo], 'main', *self.server.old):
            return self.answer({}, 404, X_Error_Code='RevisionNotFound')
        if kind in (None, 'revision'):
            return self.answer(dict(id=repo, sha=self.server.sha[repo], siblings=[dict(rfilename=name) for name in files]))
        if kind == 'tree':
            return self.answer(self.entries(files, below))
        if kind == 'paths-info':
            length = int(self.headers['Content-Length'])
            asked = urllib.parse.parse_qs(self.rfile.read(length).decode()).get('paths', [])
            return self.answer([e for e in self.entries(files) if e['path'] in asked])
        if self.server.gated and not self.headers.get('Authorization'):
            return self.answer({}, 401, X_Error_Code='GatedRepo')
        if below not in files:
            return self.answer({}, 404, X_Error_Code='EntryNotFound')
        content, span = files[below], self.headers.get('Range')
        if span is None:
            return self.answer(content, Accept_Ranges='bytes', X_Repo_Commit=self.server.sha[repo], ETag=f'"{hash(below)}"')
        start, _, stop = span.removeprefix('bytes=').partition('-')
        stop = min(int(stop or len(content) - 1), len(content) - 1)
        return self.answer(content[int(start):stop + 1], 206, Content_Range=f'bytes {start}-{stop}/{len(content)}')

    do_HEAD = do_POST = do_GET


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.repos, server.sha, server.old, server.gated, server.seen = {}, {}, [], False, []
    server.url = f'http://127.0.0.1:{server.server_address[1]}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def parquet(texts):
    import io

    import pyarrow
    import pyarrow.parquet
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({'url': ['u'] * len(texts), 'text': texts}), out, row_group_size=50)
    return out.getvalue()


def finemath(hub_url, tokenizer, *arguments, script='finemath', **env):
    return run([sys.executable, f'prepare/{script}.py', f'--tokenizer={tokenizer}', *arguments], HF_ENDPOINT=hub_url, PYTHONPATH=str(ROOT / 'tests/ample_disk'),
               HF_HUB_ETAG_TIMEOUT='5', HF_TOKEN='', HF_HUB_DISABLE_IMPLICIT_TOKEN='1', **env)


def test_a_dataset_is_streamed_from_the_hub_as_from_its_download(hub, tmp_path, byte_tokenizer):  # noqa: F811
    shards = [documents(300, seed=i) for i in range(3)]
    hub.repos['HuggingFaceTB/finemath'] = {f'finemath-3plus/train-{i:05d}-of-00003.parquet': parquet(t) for i, t in enumerate(shards)}
    hub.repos['HuggingFaceTB/finemath']['finemath-4plus/train-00000-of-00001.parquet'] = parquet(['not this one'])
    hub.sha['HuggingFaceTB/finemath'] = SHA
    done = finemath(hub.url, byte_tokenizer, f'--out={tmp_path}', '--workers=1')
    assert done.returncode == 0, done.stderr
    meta = json.loads((tmp_path / 'finemath/meta.json').read_text())
    assert sum(s['documents'] for s in meta['splits'].values()) == 900
    assert sum(s['bytes'] for s in meta['splits'].values()) == sum(len(t.encode()) for texts in shards for t in texts)
    assert meta['revision'] == {'HuggingFaceTB/finemath': SHA} and 'about 21,400,000 documents' in done.stdout
    for name, content in hub.repos['HuggingFaceTB/finemath'].items():
        (tmp_path / 'download' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'download' / name).write_bytes(content)
    local = finemath('http://127.0.0.1:9', byte_tokenizer, f'--out={tmp_path / "local"}', f'--input={tmp_path / "download"}', '--workers=0')
    assert local.returncode == 0, local.stderr
    texts = lambda folder: sorted(b''.join(v for k, v in contents(folder).items() if k.endswith('.bin')))  # noqa: E731
    assert texts(tmp_path / 'finemath') == texts(tmp_path / 'local/finemath')       # the order of files is each place's own


def test_an_unpinned_dataset_goes_on_at_the_commit_that_it_was_begun_with(hub, tmp_path, byte_tokenizer):  # noqa: F811
    repo, first, second = 'open-web-math/open-web-math', 'a' * 40, 'b' * 40
    hub.repos[repo] = {'data/train-0.parquet': parquet(documents(200) + ['x'] * 5), 'data/train-1.parquet': parquet(documents(200, seed=1))}
    hub.sha[repo] = first
    done = finemath(hub.url, byte_tokenizer, f'--out={tmp_path}', '--workers=0', script='openwebmath')
    assert done.returncode == 0, done.stderr
    whole = contents(tmp_path / 'openwebmath')
    meta = json.loads(whole['meta.json'])
    assert meta['revision'] == {repo: first}
    # as if killed at its very beginning; meanwhile somebody uploads a new commit
    shutil.rmtree(tmp_path / 'openwebmath')
    (tmp_path / 'openwebmath/progress').mkdir(parents=True)
    (tmp_path / 'openwebmath/progress/source.json').write_text(json.dumps(dict(settings=meta['settings'])))
    hub.sha[repo], hub.old = second, [first]
    done = finemath(hub.url, byte_tokenizer, f'--out={tmp_path}', '--workers=0', script='openwebmath')
    assert done.returncode == 0 and contents(tmp_path / 'openwebmath') == whole, done.stderr
    fresh = finemath(hub.url, byte_tokenizer, f'--out={tmp_path / "new"}', '--workers=0', script='openwebmath')
    assert fresh.returncode == 0 and json.loads((tmp_path / 'new/openwebmath/meta.json').read_text())['revision'] == {repo: second}


def test_a_taste_reads_little(hub, tmp_path, byte_tokenizer):  # noqa: F811
    hub.repos['HuggingFaceTB/finemath'] = {f'finemath-3plus/train-{i}.parquet': parquet(
        [t * 200 for t in documents(400, seed=i)]) for i in range(2)}
    hub.sha['HuggingFaceTB/finemath'] = SHA
    done = finemath(hub.url, byte_tokenizer, f'--out={tmp_path}', '--workers=0', '--max_tokens=2000')
    assert done.returncode == 0, done.stderr
    meta = json.loads((tmp_path / 'finemath/meta.json').read_text())
    assert meta['splits']['train']['tokens'] >= 2000 and meta['splits']['train']['documents'] < 50
    resolved = {path for path in hub.seen if '/resolve/' in path}
    assert len(resolved) == 1          # the second file is never opened


def test_https_files_are_read_in_ranges(hub, tmp_path, byte_tokenizer, monkeypatch):  # noqa: F811
    texts = documents(3000)
    hub.repos['x/y'] = {'all.jsonl': ''.join(json.dumps({'text': t}) + '\n' for t in texts).encode()}
    hub.sha['x/y'] = 'main'
    monkeypatch.setattr(reading, 'CUT_ABOVE', 200_000)
    monkeypatch.setattr(reading, 'LARGEST_PART', 100_000)
    files, commits = reading.remote_files([f'{hub.url}/datasets/x/y/resolve/main/all.jsonl'])
    parts = reading.make_parts(files)
    assert commits == {} and len(parts) == -(-files[0].size // 100_000) > 5
    found = [r['text'] for part in parts for f in part for batch in reading.read_batches(f, ['text']) for _, r in reading.records_of(batch)]
    assert found == texts


def test_an_https_file_that_is_out_of_reach_is_named(hub):
    for url, message in (('http://127.0.0.1:9/all.jsonl', 'all.jsonl cannot be reached'), (f'{hub.url}/nothing.jsonl', '404')):
        with pytest.raises(RunFault, match=message):
            reading.remote_files([url])


@pytest.mark.parametrize('state, code, parts', [
    ('gated', 2, ['HuggingFaceTB/finemath is gated', 'accept its terms', 'HF_TOKEN']),
    ('missing', 2, ['HuggingFaceTB/finemath', 'does not exist on the hub', '--input']),
    ('revision', 2, ['no such revision', '--revision']),
    ('layout', 2, ['has no file finemath-3plus/*.parquet', SHA]),
    ('damaged', 2, ['train-0.parquet', 'no parquet file']),
    ('no network', 1, ['HuggingFaceTB/finemath', 'cannot be reached', '--input']),
])
def test_what_goes_wrong_on_the_hub_is_one_sentence(hub, tmp_path, byte_tokenizer, state, code, parts):  # noqa: F811
    if state != 'missing':
        name = 'elsewhere/x.parquet' if state == 'layout' else 'finemath-3plus/train-0.parquet'
        hub.repos['HuggingFaceTB/finemath'] = {name: b'no parquet at all' if state == 'damaged' else parquet(['a text'])}
        hub.sha['HuggingFaceTB/finemath'] = 'c' * 40 if state == 'revision' else SHA
    hub.gated = state == 'gated'
    done = finemath('http://127.0.0.1:9' if state == 'no network' else hub.url, byte_tokenizer, f'--out={tmp_path}', '--workers=0')
    assert_one_sentence(done, code, *parts)
    assert not (tmp_path / 'finemath/meta.json').exists()


@pytest.mark.parametrize('state, code, parts', [
    ('fine', 0, []), ('gated', 2, ['some/model is gated', 'https://huggingface.co/some/model', 'HF_TOKEN']),
    ('missing', 2, ['some/model does not exist on the hub']), ('revision', 2, ['no such revision', '--revision']),
    ('no network', 1, ['some/model cannot be reached', 'downloaded folder'])])
def test_a_model_comes_from_the_hub(hub, tmp_path, state, code, parts):
    from tests.test_hf import their_model
    their_model('Llama', {}, tmp_path / 'hf', max_shard_size='40KB')
    if state != 'missing':
        hub.repos['some/model'] = {path.name: path.read_bytes() for path in (tmp_path / 'hf').iterdir()} | {'model.bin': b'not fetched'}
        hub.sha['some/model'] = 'c' * 40
    hub.gated = state == 'gated'
    done = run([sys.executable, 'tools/hf.py', 'import', '--model=some/model', f'--out={tmp_path}/ours', *(['--revision=v2'] * (state == 'revision'))],
               HF_ENDPOINT='http://127.0.0.1:9' if state == 'no network' else hub.url, HF_HOME=str(tmp_path / 'home'), HF_TOKEN='',
               HF_HUB_ETAG_TIMEOUT='5', HF_HUB_DISABLE_IMPLICIT_TOKEN='1')
    if code:
        return assert_one_sentence(done, code, *parts)
    assert done.returncode == 0 and (tmp_path / 'ours/ckpt/latest').exists(), done.stderr
    assert not any('model.bin' in path for path in hub.seen)
