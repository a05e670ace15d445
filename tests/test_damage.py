"""Damaged data, checkpoints and logs, two writers of one folder, and how scripts end."""
import errno
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from configurator import BadInput, RunFault, flush_or_drop, print_once, sentence_of
from data import Source, check_sample, check_unchanged
from lib import checkpoint, hf, shards, storage
from lib.byte_level import GPT2_PATTERN
from lib.device import check_memory, launched_ranks
from lib.log import read_metrics
from lib.shards import sha256_of
from lib.tokenizer import make_tokenizer, save_tokenizer
from tests.conftest import (
    ROOT,
    assert_one_sentence,
    list_shards,
    make_source,
    metrics,
    run,
    sign_again,
    train,
    train_command,
)

# -- what meta.json says ---------------------------------------------------------------------------


def describe_source(folder):
    """Writes the meta.json of a source, and a tokenizer of single bytes beside it."""
    ranks = {bytes([b]): b for b in range(63)}
    tokenizer = make_tokenizer('x', ranks, GPT2_PATTERN, {'<|endoftext|>': 63}, '<|endoftext|>')
    save_tokenizer(str(folder), tokenizer)
    record = dict(name='x', fingerprint=tokenizer.fingerprint, bos_id=63)
    meta = dict(vocab_size=64, shards=list_shards(folder), tokenizer=record)
    (folder / 'meta.json').write_text(json.dumps(meta))


@pytest.fixture
def described(tmp_path):
    """A folder of two sources with meta.json. 'b' has loss masks."""
    folder = tmp_path / 'data'
    make_source(folder, 'a')
    make_source(folder, 'b')
    for path in (folder / 'b').glob('*/*.bin'):
        n_tokens = shards.read_header(str(path))[0]
        path.with_suffix('.mask').write_bytes(b'\0\1' * (n_tokens // 2))
    for name in 'ab':
        describe_source(folder / name)
    return folder


def swap(one, other):
    one.rename(one.with_suffix('.old'))
    other.rename(one)
    one.with_suffix('.old').rename(other)


def flip(path, at=None):
    """Inverts 16 bytes of a file, in its middle or from a position on."""
    content = bytearray(path.read_bytes())
    at = len(content) // 2 if at is None else at
    content[at:at + 16] = bytes(255 - byte for byte in content[at:at + 16])
    path.write_bytes(content)


def change_meta(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_intact_sources_are_opened(described):
    sources = [Source(described, 'a', 'train', 16), Source(described, 'a', 'val', 16)]
    check_sample(sources, 0)
    assert sources[0].rows(range(8)).shape == (8, 17)


@pytest.mark.parametrize('change, message', [
    (lambda d: (d / 'a/train/000001.bin').unlink(), 'a/train/000001.bin is missing'),
    (lambda d: shutil.rmtree(d / 'a/train'), 'a/train/000000.bin is missing'),
    (lambda d: shutil.copy(d / 'a/train/000000.bin', d / 'a/train/x.bin'), 'x.bin was added'),
    (lambda d: swap(d / 'a/train/000000.bin', d / 'a/val/000000.bin'), 'it was exchanged'),
    (lambda d: swap(d / 'a/train/000000.bin', d / 'a/train/000001.bin'),
     'train/00000.*.bin has other bytes'),
    (lambda d: flip(d / 'a/train/000000.bin'), 'a/train/000000.bin has other bytes'),
    (lambda d: flip(d / 'a/train/000000.bin', 900), 'a/train/000000.bin has other bytes'),
    (lambda d: (d / 'a/train/000000.mask').write_bytes(b'\1' * 2000), '000000.mask was added'),
    (lambda d: (d / 'a/meta.json').unlink(), 'has a tokenizer but no meta.json'),
    (lambda d: (d / 'a/meta.json').write_text('{"shards": ['), 'no valid JSON'),
    (lambda d: (d / 'a/meta.json').write_text('[1]'), 'not the meta.json of a source'),
    (lambda d: (d / 'a/meta.json').write_bytes(b'\xff\xfe{}'), 'no valid JSON'),
    (lambda d: change_meta(d / 'a/meta.json', vocab_size='64'), "holds '64' in place"),
    (lambda d: change_meta(d / 'a/meta.json', vocab_size=9), 'bos_id is not below'),
    (lambda d: change_meta(d / 'a/meta.json', shards=[]), 'was added'),
    (lambda d: change_meta(d / 'a/meta.json', tokenizer=None), 'not the meta.json of a source')])
def test_shards_that_are_not_those_of_meta_json_are_refused(described, change, message):
    change(described)
    with pytest.raises(BadInput, match=message):
        check_sample([Source(described, 'a', 'train', 16)], 0)


@pytest.mark.parametrize('change, message', [
    (lambda d: [p.unlink() for p in (d / 'b/train').glob('*.mask')], '000000.mask is missing'),
    (lambda d: (d / 'b/train/000001.mask').unlink(), '000001.mask is missing'),
    (lambda d: flip(d / 'b/train/000001.mask'), '000001.mask has other bytes'),
    (lambda d: swap(d / 'b/train/000000.mask', d / 'b/val/000000.mask'), 'belongs to another')])
def test_masks_that_are_not_those_of_meta_json_are_refused(described, change, message):
    shards.open_mask.cache_clear()
    change(described)
    with pytest.raises(BadInput, match=message):
        check_sample([Source(described, 'b', 'train', 16, packing='document')], 0)


def test_masks_are_not_ignored_by_windows(described):
    with pytest.raises(BadInput, match="packing='document'.*prepare the source as plain text"):
        Source(described, 'b', 'train', 16)


def test_a_tokenizer_that_is_not_that_of_the_shards_is_refused(tmp_path, described):
    ranks = {bytes([b]): 62 - b for b in range(63)}
    other = make_tokenizer('y', ranks, GPT2_PATTERN, {'<|endoftext|>': 63}, '<|endoftext|>')
    save_tokenizer(str(described / 'a'), other)
    with pytest.raises(BadInput, match='the tokenizer in .*/a .* is not the one'):
        train(tmp_path / 'run', described, sources={'a': 1.0})
    assert not (tmp_path / 'run').exists()


def test_a_validation_shard_that_changed_before_a_resume_is_named(tmp_path, tiny_data):
    train(tmp_path / 'run', tiny_data, max_steps=4)
    swap(tiny_data / 'a/val/000001.bin', tiny_data / 'b/val/000001.bin')
    with pytest.raises(BadInput, match='a/val/000001.bin has changed since'):
        train(tmp_path / 'run', tiny_data, resume=True)
    source = Source(tiny_data, 'a', 'val', 16)
    check_unchanged([source], {'a/val': source.shard_fingerprints()}, 'a checkpoint')


def test_a_shard_truncated_while_it_is_read_is_a_sentence(tiny_data):
    source = Source(tiny_data, 'a', 'train', 16)
    source.rows(range(100))
    for path in source.paths:
        os.truncate(path, 1100)
    with pytest.raises(RunFault, match='000000.bin has ended after 1,100 bytes|000001.bin'):
        source.rows(range(100))


def test_check_reads_every_byte(tmp_path, described):
    train(tmp_path / 'run', described, sources={'a': 1.0}, max_steps=4)
    command = [sys.executable, 'tools/check.py', str(described / 'a'), str(tmp_path / 'run')]
    done = run(command)
    assert done.returncode == 0 and done.stdout.count('intact') == 2, done.stderr
    flip(described / 'a/val/000001.bin')
    flip(next((tmp_path / 'run/ckpt/step_000004').glob('*.distcp')))
    done = run(command)
    assert_one_sentence(done, 2, '2 fault(s)')
    assert 'val/000001.bin has other bytes' in done.stdout
    assert 'step_000004: __0_0.distcp has other bytes' in done.stdout


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def run_of_8(tmp_path_factory, layout_data):
    folder = tmp_path_factory.mktemp('damage') / 'run'
    train(folder, layout_data, max_steps=8, schedule='constant')
    return folder


@pytest.fixture
def damaged(tmp_path, run_of_8):
    """A copy of a run whose checkpoints are at the steps 4 and 8."""
    return shutil.copytree(run_of_8, tmp_path / 'run')


@pytest.mark.parametrize('damage', ['zeros', 'flip', 'cut', 'empty', 'unreadable'])
@pytest.mark.parametrize(
    'name', ['.metadata', '__0_0.distcp', 'state.json', 'rng_0.pt', 'manifest.json'])
def test_a_checkpoint_with_a_damaged_file_is_passed_over(damaged, name, damage, capsys):
    path = damaged / 'ckpt/step_000008' / name
    content = path.read_bytes()
    if damage == 'flip':
        flip(path)
    elif damage == 'unreadable':
        path.unlink()
        path.mkdir()
    else:
        kept = dict(zeros=bytes(len(content)), cut=content[:-5], empty=b'')
        path.write_bytes(kept[damage])
    assert checkpoint.find_checkpoint(str(damaged)).endswith('step_000004')
    assert 'step_000008' in capsys.readouterr().out


def test_a_run_goes_on_from_the_checkpoint_before(damaged, layout_data, capsys):
    knobs = dict(resume=True, max_steps=12, schedule='constant')
    shutil.copytree(damaged, damaged.parent / 'whole')
    whole = train(damaged.parent / 'whole', layout_data, **knobs)
    flip(damaged / 'ckpt/step_000008/__0_0.distcp')
    resumed = train(damaged, layout_data, **knobs)
    assert '__0_0.distcp has other bytes than were written) and is skipped' in (
        capsys.readouterr().out)
    assert resumed[12]['val/loss'] == whole[12]['val/loss']


def test_an_untouched_file_is_not_hashed_again(damaged, monkeypatch):
    hashed = []
    sha256_of_file = checkpoint.sha256_of

    def counted(path):
        hashed.append(os.path.basename(path))
        return sha256_of_file(path)

    monkeypatch.setattr(checkpoint, 'sha256_of', counted)
    newest = damaged / 'ckpt/step_000008'
    # A copy has other inodes and times, so all of its files are read.
    assert checkpoint.find_checkpoint(str(damaged)) == str(newest)
    assert sorted(hashed) == ['.metadata', '__0_0.distcp', 'rng_0.pt', 'state.json']
    sign_again(newest)
    hashed.clear()
    manifest = newest / 'manifest.json'
    later = manifest.stat().st_mtime_ns + 10**9
    os.utime(manifest, ns=(later, later))
    assert checkpoint.find_checkpoint(str(damaged)) == str(newest) and not hashed
    # Neither the size nor the time of the last change tells that this one was written again.
    path = newest / '__0_0.distcp'
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert checkpoint.find_checkpoint(str(damaged)).endswith('step_000004')
    # A file that was written a moment before its manifest is not trusted.
    sign_again(newest)
    hashed.clear()
    os.utime(manifest, ns=(0, 0))
    assert checkpoint.find_checkpoint(str(damaged)) == str(newest) and len(hashed) == 4


class Gadget:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_opening_a_checkpoint_runs_no_code(damaged, layout_data, tmp_path):
    folder = damaged / 'ckpt/step_000008'
    path = folder / '.metadata'
    intact = pickle.loads(path.read_bytes())
    touched = tmp_path / 'touched'
    outside = pickle.loads(path.read_bytes())
    first = next(iter(outside.storage_data))
    outside.storage_data[first].relative_path = '../step_000004/__0_0.distcp'
    # torch unpickles an entry of this kind freely, when it reads the tensor.
    free = pickle.loads(path.read_bytes())
    name = next(iter(free.state_dict_metadata))
    free.state_dict_metadata[name] = torch.distributed.checkpoint.metadata.BytesStorageMetadata()
    hidden = pickle.loads(path.read_bytes())
    hidden.planner_data = Gadget(os.mkdir, str(touched))
    for evil in (
            Gadget(os.system, f'touch {touched}'), Gadget(eval, f'open({str(touched)!r}, "w")'),
            Gadget(subprocess.call, ['touch', str(touched)]), Gadget(getattr, 'x', 'upper'),
            Gadget(torch.load, io.BytesIO(b'')), outside, free, hidden, 5, None, {}):
        path.write_bytes(pickle.dumps(evil))
        sign_again(folder)
        with pytest.raises(BadInput, match='.metadata'):
            checkpoint.read_metadata(str(folder))
    assert not touched.exists()
    path.write_bytes(pickle.dumps(Gadget(os.system, f'touch {touched}')))
    sign_again(folder)
    with pytest.raises(BadInput, match='names posix.system'):
        hf.open_model(str(damaged), torch.device('cpu'), torch.float32, needs_tokenizer=False)
    for knobs in (dict(resume=True), dict(init_from=damaged), dict(continue_from=damaged)):
        out = damaged if 'resume' in knobs else tmp_path / 'new'
        with pytest.raises(BadInput, match='names posix.system'):
            train(out, layout_data, **knobs)
    assert not touched.exists()
    path.write_bytes(pickle.dumps(intact))
    assert checkpoint.read_metadata(str(folder)).state_dict_metadata == intact.state_dict_metadata


def changed_state(folder, **changes):
    state = json.loads((folder / 'state.json').read_text())
    (folder / 'state.json').write_text(json.dumps({**state, **changes}))
    sign_again(folder)


@pytest.mark.parametrize('changes', [
    dict(step='8'), dict(step=-1), dict(model=None), dict(model={'n_head': 'x'}), dict(config=[]),
    dict(config={}), dict(loader=None), dict(loader={'cursors': {'a': 1, 'b': 1}})])
def test_a_state_of_another_structure_is_one_sentence(damaged, layout_data, changes):
    changed_state(damaged / 'ckpt/step_000008', **changes)
    with pytest.raises(BadInput, match='state.json'):
        train(damaged, layout_data, resume=True, max_steps=12)


# -- logs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'end', [b'{"step": 9, "tr', b'\0' * 512, b'\0' * 99 + b'\n', b'12\n\xff\n'])
def test_a_torn_end_of_the_log_is_left_out(damaged, layout_data, end):
    with open(damaged / 'metrics.jsonl', 'ab') as f:
        f.write(end)
    resumed = train(damaged, layout_data, resume=True, max_steps=12)
    assert max(resumed) == 12


def test_damage_within_the_log_is_named(damaged):
    lines = (damaged / 'metrics.jsonl').read_bytes().split(b'\n')
    for bad in (b'{"step": 1', b'[]', b'{"loss": 1}', b'\xff\xff'):
        (damaged / 'metrics.jsonl').write_bytes(b'\n'.join([lines[0], bad, *lines[1:]]))
        with pytest.raises(BadInput, match='metrics.jsonl:2 is no record'):
            read_metrics(damaged)


def test_the_log_survives_checkpoints_that_were_moved_away(damaged, layout_data):
    before = (damaged / 'metrics.jsonl').read_bytes()
    shutil.move(damaged / 'ckpt', damaged.parent / 'elsewhere')
    train(damaged, layout_data, resume=True, max_steps=4)
    assert (damaged / 'metrics.1.jsonl').read_bytes() == before
    assert max(metrics(damaged)) == 4


def test_a_folder_in_which_no_step_was_made_can_be_used(tmp_path, tiny_data):
    with pytest.raises(BadInput, match='W&B|wandb'):
        train(tmp_path / 'run', tiny_data, wandb_mode='online', max_steps=2)
    assert max(train(tmp_path / 'run', tiny_data, max_steps=2)) == 2


# -- one writer ------------------------------------------------------------------------------------


HOLD = 'import sys; from lib import storage; l = storage.lock(sys.argv[1]); print(1, flush=True)\n'


@pytest.fixture
def holder(damaged):
    """A process that holds the lock of a run."""
    command = [sys.executable, '-c', HOLD + 'sys.stdin.read()', str(damaged / '.lock')]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_killed(
        damaged, layout_data, holder):
    before = sorted(damaged.rglob('*'))
    with pytest.raises(BadInput, match=f'another process is writing to {damaged}'):
        train(damaged, layout_data, resume=True, max_steps=12)
    assert sorted(damaged.rglob('*')) == before
    holder.kill()
    holder.wait()
    assert max(train(damaged, layout_data, resume=True, max_steps=12)) == 12


def test_a_lock_is_waited_for(damaged, holder):
    start = time.monotonic()
    with pytest.raises(BadInput):
        storage.lock(str(damaged / '.lock'), 0.3)
    assert time.monotonic() - start >= 0.3
    holder.kill()
    storage.lock(str(damaged / '.lock'), 10.0).close()


# -- how scripts end -------------------------------------------------------------------------------


@pytest.mark.parametrize('error, code, part', [
    (BadInput('x'), 2, 'x'), (RunFault('x'), 1, 'x'), (KeyboardInterrupt(), 130, 'interrupted'),
    (BrokenPipeError(), 141, ''), (MemoryError('x'), 1, 'out of memory'),
    (OSError(errno.ENOSPC, 'No space left on device', 'f'), 1, 'Free some space'),
    (OSError(errno.EIO, 'Input/output error'), 1, 'Input/output error'),
    (OSError(errno.EACCES, 'Permission denied', 'f'), 2, "'f' cannot be read or written: Perm"),
    (OSError(errno.ENAMETOOLONG, 'File name too long', 'f'), 2, 'too long'),
    (OSError(errno.EROFS, 'Read-only file system', b'f'), 2, 'Read-only'),
    (RuntimeError('gloo: Connection reset'), 1, 'connection to another rank broke'),
    (RuntimeError('DefaultCPUAllocator: can not allocate'), 1, 'out of memory')])
def test_errors_that_a_user_can_mend_are_sentences(error, code, part):
    message, found = sentence_of(error)
    assert found == code and part in message


@pytest.mark.parametrize('error', [RuntimeError('x'), ValueError('x'), KeyError('x'), OSError('x')])
def test_bugs_keep_their_traceback(error):
    assert sentence_of(error) is None


def test_torchrun_quotes_the_sentence_once(tmp_path, monkeypatch, capsys):
    paths = []
    for rank in range(2):
        paths.append(tmp_path / f'attempt_0/{rank}/error.json')
        paths[rank].parent.mkdir(parents=True)
    monkeypatch.setenv('WORLD_SIZE', '2')
    for restarts in ('1', '0'):
        monkeypatch.setenv('TORCHELASTIC_MAX_RESTARTS', restarts)
        monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '0')
        for rank in range(2):
            monkeypatch.setenv('RANK', str(rank))
            monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(paths[rank]))
            print_once(f'error: it failed ({restarts})')
    printed = capsys.readouterr().err
    # torchrun would have restarted the first attempt, and quotes nothing then.
    assert printed.count('[rank 0] error: it failed (1)') == 1 and 'failed (0)' not in printed
    quoted = json.loads(paths[0].read_text())['message']['extraInfo']['py_callstack']
    assert quoted == '[rank 0] error: it failed (0)' and not paths[1].exists()


def test_under_torchrun_the_sentence_comes_last_and_once(tmp_path, tiny_data):
    done = run(train_command(tmp_path / 'run', tiny_data, ranks=2, warmup=3))
    text = done.stdout + done.stderr
    assert done.returncode == 1 and text.count("unknown name 'warmup'") == 1
    assert "unknown name 'warmup'" in text.strip().splitlines()[-2]


@pytest.mark.parametrize('variables, part', [
    (dict(RANK='0'), 'not WORLD_SIZE, MASTER_ADDR'), (dict(RANK='x', WORLD_SIZE='2'), "RANK = 'x'"),
    (dict(RANK='2', WORLD_SIZE='2'), 'below WORLD_SIZE'),
    (dict(RANK='-1', WORLD_SIZE='2'), "RANK = '-1'")])
def test_odd_variables_of_a_launcher_are_refused(monkeypatch, variables, part):
    if len(variables) > 1:
        variables = dict(MASTER_ADDR='localhost', MASTER_PORT='29500', **variables)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=part):
        launched_ranks(True)


@pytest.fixture
def stop_request(monkeypatch):
    before = {n: signal.getsignal(n) for n in checkpoint.SIGNALS}
    monkeypatch.setattr(sys, 'stdout', sys.stdout)
    monkeypatch.setattr(sys, 'stderr', sys.stderr)
    yield checkpoint.StopRequest
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_hangup_asks_a_run_to_stop_unless_it_is_ignored(stop_request):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)                # as nohup does
    stop = stop_request()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.signal
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stop = stop_request()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.signal == signal.SIGHUP


def closed_pipe():
    """A text stream to a pipe whose reader has gone away."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, 'w')


def test_a_reader_that_goes_away_asks_a_run_to_stop(stop_request):
    stop = stop_request()
    pipe = checkpoint.Pipe(closed_pipe(), stop)
    print('x' * 100_000, file=pipe)
    assert stop.signal == signal.SIGPIPE
    print('x' * 100_000, file=pipe, flush=True)
    stream = closed_pipe()
    stream.write('x')
    flush_or_drop(stream)
    stream.close()


def test_help_ends_quietly_when_its_reader_goes_away():
    command = f'{sys.executable} tools/report.py --help | head -c 1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ['bash', '-c', command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith(('141\n', '0\n')) and done.stderr == ''


@pytest.mark.parametrize('knobs', [
    dict(n_layer=10**9), dict(n_embd=2_000_000), dict(vocab_size=10**12)])
def test_a_model_larger_than_memory_is_refused(tmp_path, tiny_data, knobs):
    with pytest.raises(BadInput, match='gradients and optimizer needs .* GiB, and .* has'):
        train(tmp_path / 'run', tiny_data, **knobs)
    check_memory(1.0, torch.device('cpu'), 'a float')


def test_hashes_are_sha256(tmp_path):
    (tmp_path / 'x').write_bytes(b'abc')
    # FIPS 180-2, appendix B.1
    known = 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'
    assert sha256_of(tmp_path / 'x') == checkpoint.sha256_of(str(tmp_path / 'x')) == known
