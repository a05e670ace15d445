"""train.py on tiny data, as a user runs it."""
import json
import math
import random
import resource
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from configurator import BadInput
from lib import parallel
from lib.byte_level import GPT2_PATTERN
from lib.checkpoint import find_checkpoint, read_state
from lib.shards import open_shard
from lib.tokenizer import make_tokenizer, save_tokenizer
from tests.conftest import (
    ROOT,
    assert_one_sentence,
    list_again,
    list_shards,
    make_source,
    metrics,
    options,
    run,
    run_here,
    run_ranks,
    start,
    train,
    train_command,
    write_shard,
)


def weights_of(out_dir):
    """Every tensor of the newest checkpoint, weights and optimizer state: name -> tensor."""
    folder = find_checkpoint(str(out_dir))
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {}
    for key, about in stored.items():
        tensors[key] = torch.zeros(about.size, dtype=about.properties.dtype)
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


def assert_same_run(a, b):
    """Checks that two runs have the same final weights and optimizer state, and logged the same
    losses, bit for bit.
    """
    weights = weights_of(a)
    other_weights = weights_of(b)
    assert weights.keys() == other_weights.keys() and len(weights) > 10
    for key, tensor in weights.items():
        assert torch.equal(tensor, other_weights[key]), key
    compared = ('train/loss', 'val/', 'mixture/weight', 'mixture/epochs', 'train/grad_norm')
    other = metrics(b)
    for step, record in metrics(a).items():
        for key in record:
            if key.startswith(compared):
                assert record[key] == other[step][key], (step, key)


def number_of_lines(log):
    return len(log.read_text().splitlines()) if log.exists() else 0


# -- learning --------------------------------------------------------------------------------------

def test_a_run_learns_and_leaves_everything_behind(tmp_path, tiny_data, capsys):
    out = tmp_path / 'run'
    m = train(out, tiny_data, max_steps=160)
    assert abs(m[0]['val/loss'] - np.log(64)) < 0.1
    # The best possible loss is 0.7 nats, because one token in ten is random.
    assert m[160]['val/loss_a'] < 1.5 and m[160]['val/loss_b'] < 2.0
    assert m[159]['train/accuracy'] > 0.6 and m[159]['train/tokens'] == 160 * 64
    for key in (
            'train/perplexity', 'train/learning_rate', 'train/grad_norm', 'train/tokens_per_second',
            'system/step_ms', 'system/data_ms', 'mixture/weight_a', 'mixture/drawn_b'):
        assert key in m[159]
    # The table of peaks does not have a CPU.
    assert m[159]['train/mfu'] is None
    assert json.loads((out / 'config.json').read_text())['max_steps'] == 160
    assert (out / 'curves.png').read_bytes()[:4] == b'\x89PNG'
    assert (out / 'ckpt/latest').read_text() == 'step_000160'
    kept = sorted(path.name for path in (out / 'ckpt').iterdir())
    assert kept == ['latest', 'step_000156', 'step_000160']
    printed = capsys.readouterr().out
    for part in ('loss before', 'curves.png', 'step_000160'):
        assert part in printed
    for name, share in (('a', 0.75), ('b', 0.25)):
        drawn = sum(m[step][f'mixture/drawn_{name}'] for step in range(160)) / 160
        assert drawn == pytest.approx(share, abs=0.01)


def test_golden_loss_curve(tmp_path, tiny_data):
    # fp32, one thread, seed 1337. If this fails, the data order, the initial weights, the model,
    # the loss or the optimizer has changed.
    m = train(tmp_path / 'run', tiny_data, max_steps=40)
    for step, loss in {0: 4.20349, 10: 3.39487, 20: 2.79139, 39: 2.23056}.items():
        assert m[step]['train/loss'] == pytest.approx(loss, rel=2e-3)


def test_one_batch_can_be_overfitted(tmp_path):
    data = tmp_path / 'data'
    for split in ('train', 'val'):
        tokens = np.random.default_rng(0).integers(0, 64, 4 * 16 + 1)
        write_shard(data / 'x' / split / '0.bin', tokens)
    m = train(
        tmp_path / 'run', data, sources={'x': 1.0}, max_steps=150, learning_rate=2e-2,
        schedule='constant', weight_decay=0.0)
    assert m[0]['train/loss'] > 4 and m[149]['train/loss'] < 0.05


def test_accumulating_micro_batches_equals_one_large_batch(tmp_path, tiny_data):
    one = train(tmp_path / 'one', tiny_data, batch_size=8, total_batch_tokens=128)
    eight = train(tmp_path / 'eight', tiny_data, batch_size=1, total_batch_tokens=128)
    for step in range(12):
        for key, tolerance in (('train/loss', 1e-5), ('train/grad_norm', 1e-3)):
            assert one[step][key] == pytest.approx(eight[step][key], rel=tolerance)


# Muon orthogonalises in bf16, which makes rounding visible.
@pytest.mark.parametrize('changes, tolerance', [
    ({}, 1e-5), (dict(tie_embeddings=False, layer_repeat=2), 1e-5), (dict(optimizer='muon'), 1e-3)])
def test_two_ranks_equal_one(tmp_path, tiny_data, changes, tolerance):
    knobs = dict(max_steps=20, batch_size=1, eval_interval=10, eval_rows=5, **changes)
    one = train(tmp_path / 'one', tiny_data, **knobs)
    two = train(tmp_path / 'two', tiny_data, ranks=2, **knobs)
    for step in range(20):
        expected = pytest.approx(two[step]['train/loss'], rel=tolerance)
        assert one[step]['train/loss'] == expected, step
    for step in (0, 10, 20):
        for key in ('val/loss_a', 'val/loss_b'):
            assert one[step][key] == pytest.approx(two[step][key], rel=tolerance)


@pytest.mark.parametrize('schedule, expected', [
    ('linear', [0.5, 1, 0.55, 0.145]), ('cosine', [0.5, 1, 0.55, 0.1055]),
    ('wsd', [0.5, 1, 1, 0.325]), ('constant', [0.5, 1, 1, 1])])
def test_schedules(tmp_path, tiny_data, schedule, expected):
    m = train(
        tmp_path / 'run', tiny_data, schedule=schedule, max_steps=22, warmup_steps=2,
        learning_rate=1.0, grad_clip=1e-9, optimizer='adamw', decay_frac=0.2, min_lr_frac=0.1,
        eval_interval=100, weight_decay=0.0)
    rates = [m[step]['train/learning_rate'] for step in (0, 2, 12, 21)]
    assert rates == pytest.approx(expected, abs=2e-3)


def test_compiled_run_gives_the_same_losses(tmp_path, tiny_data):
    if shutil.which('g++') is None:
        pytest.skip('torch.compile on the CPU needs a C++ compiler, and g++ is not here')
    eager = train(tmp_path / 'eager', tiny_data, max_steps=6)
    compiled = train(tmp_path / 'compiled', tiny_data, max_steps=6, compile=True)
    for step in range(6):
        expected = pytest.approx(eager[step]['train/loss'], rel=1e-4)
        assert compiled[step]['train/loss'] == expected


def test_a_compiled_run_has_one_graph(tmp_path, tiny_data, count_graphs):
    # It evaluates, trains, and writes a sample.
    tokenizer = make_tokenizer(
        'x', {bytes([b]): b for b in range(63)}, GPT2_PATTERN, {'<|endoftext|>': 63},
        '<|endoftext|>')
    record = dict(name='x', fingerprint=tokenizer.fingerprint, bos_id=63)
    for name in 'ab':
        save_tokenizer(str(tiny_data / name), tokenizer)
        (tiny_data / name / 'meta.json').write_text(json.dumps(dict(
            tokenizer=record, vocab_size=64, shards=list_shards(tiny_data / name))))
    # 5 rows are one batch and a half.
    m = train(
        tmp_path / 'run', tiny_data, compile=True, max_steps=4, eval_interval=2, eval_rows=5,
        sample_tokens=4)
    assert m[4]['val/loss'] < m[0]['val/loss']
    assert count_graphs() == 1


def test_document_mask_changes_what_is_seen(tmp_path, tiny_data):
    ranks = {bytes([b]): b for b in range(63)}
    tokenizer = make_tokenizer('x', ranks, GPT2_PATTERN, {'<|endoftext|>': 63}, '<|endoftext|>')
    record = dict(name='x', fingerprint=tokenizer.fingerprint, bos_id=63)
    for name in 'ab':
        (tiny_data / name / 'tok').mkdir()
        save_tokenizer(str(tiny_data / name), tokenizer)
        shards = list_shards(tiny_data / name)
        meta = json.dumps(dict(vocab_size=64, shards=shards, tokenizer=record))
        (tiny_data / name / 'meta.json').write_text(meta)
    plain = train(tmp_path / 'plain', tiny_data)
    masked = train(tmp_path / 'masked', tiny_data, document_mask=True)
    assert plain[0]['train/loss'] == pytest.approx(masked[0]['train/loss'], rel=0.01)
    assert plain[0]['train/loss'] != masked[0]['train/loss']
    assert 'val/bpb_a' in plain[0]


def test_every_logged_step_took_time(tmp_path, tiny_data):
    m = train(tmp_path / 'run', tiny_data, max_steps=12, eval_interval=6)
    step_ms = [m[step]['system/step_ms'] for step in range(12)]
    assert min(step_ms) > 0.2 * sorted(step_ms)[6]
    for step in range(12):
        assert 0 < m[step]['system/data_ms'] < step_ms[step]


# -- stopping, resuming, initial weights -----------------------------------------------------------

@pytest.mark.parametrize('dtype, optimizer', [
    ('float32', 'adamw'), ('bfloat16', 'adamw'), ('float32', 'muon')])
def test_killed_and_resumed_run_equals_the_uninterrupted_one(
    tmp_path, tiny_data, capsys, dtype, optimizer,
):
    knobs = dict(
        dtype=dtype, optimizer=optimizer, max_steps=40, save_interval=3, document_mask=False)
    train(tmp_path / 'whole', tiny_data, **knobs)
    command = train_command(tmp_path / 'killed', tiny_data, resume=True, **knobs)
    rng = random.Random(dtype + optimizer)
    log = tmp_path / 'killed/metrics.jsonl'
    for _ in range(3):
        n_lines = number_of_lines(log)
        process = start(command, tmp_path / 'log', {})
        wanted = n_lines + rng.randint(1, 12)
        while process.is_alive() and number_of_lines(log) < wanted:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.03)
        assert process.is_alive(), 'the run ended before it could be killed'
        process.kill()
        process.join()
    capsys.readouterr()
    assert run_here(command) == 0 and 'resume: ' in capsys.readouterr().out
    assert_same_run(tmp_path / 'whole', tmp_path / 'killed')
    assert not list((tmp_path / 'killed/ckpt').glob('*.tmp'))


def test_sigterm_saves_and_the_resumed_run_equals_the_uninterrupted_one(tmp_path, tiny_data):
    knobs = dict(max_steps=300, eval_interval=300, save_interval=1000)
    process = start(train_command(tmp_path / 'run', tiny_data, **knobs), tmp_path / 'log', {})
    while number_of_lines(tmp_path / 'run/metrics.jsonl') <= 5:
        time.sleep(0.01)
    process.terminate()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    assert 'stopped by a signal' in (tmp_path / 'log').read_text()
    stopped_at = read_state(find_checkpoint(str(tmp_path / 'run')))['step']
    assert 5 <= stopped_at < 300
    train(tmp_path / 'run', tiny_data, resume=True, **knobs)
    train(tmp_path / 'whole', tiny_data, **knobs)
    assert_same_run(tmp_path / 'whole', tmp_path / 'run')


def test_checkpoint_of_two_ranks_continues_on_one_and_on_two(tmp_path, tiny_data):
    decayed = train(tmp_path / 'decayed', tiny_data, batch_size=1)
    knobs = dict(batch_size=1, schedule='constant')
    constant = train(tmp_path / 'constant', tiny_data, **knobs)
    train(tmp_path / 'run', tiny_data, ranks=2, max_steps=4, async_save=True, **knobs)
    shutil.copytree(tmp_path / 'run', tmp_path / 'copy')
    one = train(tmp_path / 'run', tiny_data, resume=True, **knobs)
    two = train(tmp_path / 'copy', tiny_data, ranks=2, resume=True, **knobs)
    for step in range(12):
        expected = pytest.approx(constant[step]['train/loss'], rel=1e-5)
        assert one[step]['train/loss'] == expected
        assert two[step]['train/loss'] == expected
    assert decayed[11]['train/loss'] != constant[11]['train/loss']


def test_background_saves_hold_the_same_as_waiting_ones(tmp_path, tiny_data):
    knobs = dict(ranks=2, batch_size=1, max_steps=8, save_interval=2)
    train(tmp_path / 'sync', tiny_data, async_save=False, **knobs)
    train(tmp_path / 'async', tiny_data, async_save=True, **knobs)
    assert_same_run(tmp_path / 'sync', tmp_path / 'async')
    # If training overtook a save, its checkpoint would hold later weights.
    for name in ('step_000006', 'step_000008'):
        for run_dir in ('sync', 'async'):
            (tmp_path / run_dir / 'ckpt/latest').write_text(name)
        assert_same_run(tmp_path / 'sync', tmp_path / 'async')


def test_resuming_with_other_weights_takes_them(tmp_path, tiny_data):
    train(tmp_path / 'run', tiny_data, max_steps=4)
    sources = {'a': 0.25, 'b': 0.75}
    m = train(tmp_path / 'run', tiny_data, max_steps=12, resume=True, sources=sources)
    assert m[3]['mixture/weight_a'] == pytest.approx(0.75)
    assert m[11]['mixture/weight_a'] == pytest.approx(0.25)
    drawn = sum(m[step]['mixture/drawn_a'] for step in range(4, 12)) / 8
    assert drawn == pytest.approx(0.25, abs=0.04)


def test_init_from_takes_weights_only(tmp_path, tiny_data):
    first = train(tmp_path / 'first', tiny_data, max_steps=30)
    second = train(tmp_path / 'second', tiny_data, init_from=tmp_path / 'first', seed=7)
    assert second[0]['val/loss'] == pytest.approx(first[30]['val/loss'], rel=1e-6)
    assert second[0]['train/learning_rate'] == pytest.approx(1e-2 / 2)
    assert second[0]['train/tokens'] == 64


# -- faults: one sentence, the exit code, nothing lost ---------------------------------------------

@pytest.mark.parametrize('knobs, parts', [
    (dict(warmup_step=3), ["unknown name 'warmup_step'", "'warmup_steps'"]),
    (dict(max_steps='many'), ['max_steps must be int | None']),
    (dict(sources={'a': 1, 'bb': 1}), ["source 'bb'", 'does not exist']),
    (dict(sources={'a': 0, 'b': 0}), ['sum to more than 0']),
    (dict(sources={'a': 2, 'b': -1}), ['negative']),
    (dict(sources={}), ['sources is empty']),
    (dict(total_batch_tokens=100), ['not a multiple', '2 * 16 * 1 = 32', 'Try 96']),
    (dict(total_batch_tokens=16), ['Try 32']),
    (dict(total_batch_tokens=16 * 400, batch_size=400),
     ['fewer than one batch', '400 rows', "source 'a'"]),
    (dict(vocab_size=32), ['token id', 'vocab_size is 32']),
    (dict(n_embd=33), ['n_embd = 33', 'Try 32']),
    (dict(optimizer='sgd'), ["optimizer = 'sgd'", 'adamw, muon']),
    (dict(mixture='influence'), ['needs probe sets', 'prepare/probe.py']),
    (dict(mixture='doremy'), ['must be one of']),
    (dict(dtype='fp8'), ["dtype = 'fp8'"]),
    (dict(max_steps='None'), ['neither max_steps nor max_tokens']),
    (dict(eval_interval=0), ['eval_interval = 0']),
    (dict(init_from='nowhere'), ["'nowhere'"]),
    (dict(document_mask=True), ['meta.json']),
    (dict(n_expert=8), ['n_expert_active (is 0)', 'expert_ffn_dim']),
    (dict(tp=2), ['tp 2 does not make 1 rank', '2 does not divide it']),
    (dict(schedule='wsd', decay_frac=0.0), ['decay_frac = 0.0']),
    (dict(keep_last=-1), ['keep_last = -1']),
    (dict(learning_rate=-1), ['learning_rate = -1']),
    (dict(n_head=0), ['n_head = 0']),
    (dict(head_dim=0), ['head_dim = 0']),
    (dict(max_steps=0), ['0 steps']),
])
def test_mistakes_in_the_config_get_one_sentence(tmp_path, tiny_data, knobs, parts):
    with pytest.raises(BadInput) as error:
        run_here(train_command(tmp_path / 'run', tiny_data, **knobs))
    for part in parts:
        assert part in str(error.value)
    assert not (tmp_path / 'run').exists()


def test_a_mistake_ends_with_exit_code_2_and_no_traceback(tmp_path, tiny_data):
    done = run_ranks(train_command(tmp_path / 'run', tiny_data, warmup=3), 1)
    assert_one_sentence(done, 2, "unknown name 'warmup'")
    done = run(train_command(tmp_path / 'run', tiny_data, sources={'a': 1, 'bb': 1}))
    assert_one_sentence(done, 2, "source 'bb'")


def test_truncated_shard_gets_one_sentence(tmp_path, tiny_data):
    shard = tiny_data / 'b/train/000001.bin'
    shard.write_bytes(shard.read_bytes()[:-100])
    message = f'{shard} holds 1,950 tokens, its header says 2,000: truncated'
    with pytest.raises(BadInput, match=message):
        train(tmp_path / 'run', tiny_data)


def content_of(folder):
    """The bytes of every file below a folder: path -> bytes."""
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_used_out_dir_is_refused_and_untouched(tmp_path, tiny_data):
    train(tmp_path / 'run', tiny_data)
    before = content_of(tmp_path / 'run')
    with pytest.raises(BadInput, match='already holds a run.*--resume=True'):
        train(tmp_path / 'run', tiny_data)
    assert content_of(tmp_path / 'run') == before


def test_resume_with_another_model_config_or_data_is_refused(tmp_path, tiny_data):
    train(tmp_path / 'run', tiny_data)

    def assert_refused(message, max_steps=16, **knobs):
        with pytest.raises(BadInput, match=message):
            train(tmp_path / 'run', tiny_data, resume=True, max_steps=max_steps, **knobs)

    assert_refused('another model: ffn_dim 48 there, 64 here', ffn_dim=64)
    assert_refused('total_batch_tokens was 64', total_batch_tokens=128)
    assert_refused('step 12, beyond the 6 steps', max_steps=6)
    assert_refused(r"sources are \['a', 'b'\]", sources={'a': 1.0})
    make_source(tiny_data, 'b', seed=5)
    assert_refused("source 'b'.*changed")
    # With the old shards and knobs the run continues.
    make_source(tiny_data, 'b')
    assert max(train(tmp_path / 'run', tiny_data, resume=True, max_steps=16)) == 16


# The most bytes of a file: too few for the weights, and too few even for the random generators.
@pytest.mark.skipif(not hasattr(resource, 'prlimit'), reason='needs Linux')
@pytest.mark.parametrize('most', [100_000, 9_000])
def test_full_disk_while_saving_leaves_the_checkpoint_before(tmp_path, tiny_data, most):
    def limit(processes):
        # No file may grow beyond this size, as if the disk were full.
        resource.prlimit(processes[0].pid, resource.RLIMIT_FSIZE, (most, most))

    train(tmp_path / 'run', tiny_data, max_steps=4)
    command = train_command(tmp_path / 'run', tiny_data, resume=True, max_steps=8)
    done = run_ranks(command, 1, during=limit)
    assert_one_sentence(
        done, 1, 'checkpoint of step 8 could not be written', 'step_000004 is the last good one')
    kept = sorted(path.name for path in (tmp_path / 'run/ckpt').iterdir())
    assert kept == ['latest', 'step_000004']
    train(tmp_path / 'run', tiny_data, resume=True, max_steps=8)
    assert read_state(find_checkpoint(str(tmp_path / 'run')))['step'] == 8


def test_diverging_run_stops_before_the_optimizer_and_names_the_batch(tmp_path, tiny_data):
    command = train_command(
        tmp_path / 'run', tiny_data, learning_rate=1e38, grad_clip=0.0, save_interval=1,
        warmup_steps=0, schedule='constant', max_steps=40)
    parts = (
        'the optimizer was not stepped', 'Last good checkpoint: ',
        "Rows of the batch by source: {'a': ")
    assert_one_sentence(run_ranks(command, 1), 1, *parts)


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_a_step_of_numbers_that_are_not_finite_changes_nothing(name):
    p = torch.nn.Parameter(torch.randn(4, 4))
    if name == 'adamw':
        optimizer = torch.optim.AdamW([p], fused=True)
    else:
        optimizer = torch.optim.Muon([p])
    ones = torch.ones(4, 4)
    nans = torch.full((4, 4), math.nan)
    for not_finite, gradient in ((0.0, ones), (1.0, nans), (1.0, ones), (0.0, ones)):
        before = [t.clone() for t in (p.detach(), *optimizer.state[p].values())]
        p.grad = gradient
        parallel.step(optimizer, torch.tensor(not_finite))
        after = [p.detach(), *optimizer.state[p].values()]
        # The first step creates the optimizer's state, so `after` may be longer.
        is_equal = [torch.equal(a, b) for a, b in zip(before, after, strict=False)]
        assert all(is_equal) == bool(not_finite)


def test_a_failed_rank_is_named(tmp_path, tiny_data):
    command = train_command(tmp_path / 'run', tiny_data, ranks=2, total_batch_tokens=100)
    done = run_ranks(command, 2)
    assert done.returncode != 0 and '[rank ' in done.stderr and 'not a multiple' in done.stderr


# -- the files of the project ----------------------------------------------------------------------

CONFIGS = [str(path.relative_to(ROOT / 'config')) for path in (ROOT / 'config').rglob('*.py')]


@pytest.mark.parametrize('name', sorted(CONFIGS))
def test_every_config_loads(tmp_path, capsys, name):
    files = [f'config/{name}']
    if name.startswith('tiny/'):
        files.insert(0, 'config/tiny/model.py')
    if name.startswith('study/'):
        files.insert(0, 'config/study/base.py')
    if name.startswith('ablation/'):
        files.insert(0, 'config/ablation/base.py')
    knobs = dict(
        out_dir=tmp_path / 'run', data_dir=tmp_path, prepare=None, mixture='fixed', device='cpu')
    # These mistakes are found after the config has been read: no sources, or no folder for them.
    mistake = 'sources is empty' if 'model' in name else 'does not exist'
    with pytest.raises(BadInput, match=mistake):
        run_here(['train.py', *files, *options(knobs)])
    out = capsys.readouterr().out
    assert 'differ from the defaults' in out and f'config/{name}:' in out


def test_demo_builds_its_data_trains_and_writes_text(tmp_path):
    knobs = dict(
        out_dir=tmp_path / 'run', data_dir=tmp_path / 'demo', max_steps=12, eval_interval=12,
        eval_rows=8)
    done = run([sys.executable, 'train.py', 'config/demo.py', *options(knobs)])
    assert done.returncode == 0, done.stderr
    m = metrics(tmp_path / 'run')
    assert abs(m[0]['val/loss'] / np.log(4096) - 1) < 0.02
    assert m[12]['val/loss'] < m[0]['val/loss'] - 0.3
    # Bits per byte must agree roughly with the number of bytes that the source records.
    for source in ('code', 'docs', 'math', 'noise'):
        meta = json.loads((tmp_path / 'demo' / source / 'meta.json').read_text())['splits']['val']
        expected = m[12][f'val/loss_{source}'] / np.log(2) * meta['tokens'] / meta['bytes']
        assert m[12][f'val/bpb_{source}'] == pytest.approx(expected, rel=0.4)
    for part in (
            'running prepare/demo.py', 'bits/byte', 'curves.png',
            'sample: Problem: Compute 12 * 7 + 5.'):
        assert part in done.stdout


@pytest.mark.parametrize('name, key', [
    ('influence_dynamic', 'mixture/influence_math'), ('presence_two_stage', 'presence/weight_7')])
def test_tiny_ablations_run(tmp_path, demo_data, name, key):
    knobs = dict(
        out_dir=tmp_path / 'run', data_dir=demo_data, max_steps=13, mixture_interval=6,
        mixture_warmup=6, log_interval=1, n_layer=2, eval_rows=8, probe_rows=16, influence_rows=8,
        eval_interval=13)
    files = [f'config/ablation/{name}.py', 'config/ablation/tiny.py']
    assert run_here(['train.py', *files, *options(knobs)]) == 0
    m = metrics(tmp_path / 'run')
    if name == 'presence_two_stage':
        # The first stage is a tenth of the run.
        assert [m[step]['presence/tau'] for step in (0, 1)] == [1, -1]
    assert any(key in record for record in m.values())
    assert m[13]['val/loss'] < m[0]['val/loss']


def test_the_tiny_stages_follow_each_other(tmp_path, demo_data):
    """Every stage's own config, cut short, starts from the stage before. Its objective falls."""
    # The distillation cache is written into the data, for a source that is made small here.
    data = shutil.copytree(demo_data, tmp_path / 'data')
    shard = data / 'noise/train/00000_00000.bin'
    write_shard(shard, open_shard(str(shard))[:20_000].copy(), 4096)
    list_again(data / 'noise')
    short = dict(
        data_dir=data, max_steps=10, total_batch_tokens=1024, batch_size=4, log_interval=1,
        eval_interval=10, eval_rows=4, save_interval=10, n_layer=2, compile=False)
    teacher = tmp_path / 'teacher'
    first = {}                      # stage -> validation loss before the first step
    last = {}                       # stage -> validation loss after the last step
    before = None                   # the stage whose weights the next one starts from
    for name in ('stage1', 'stage2', 'teacher', 'stage3', 'stage3b', 'stage4', 'stage5'):
        knobs = {**short, 'out_dir': tmp_path / name}
        if before and name != 'teacher':
            knobs['init_from'] = tmp_path / before
        if name == 'stage2':
            knobs |= dict(mixture_interval=9, mixture_warmup=9, probe_rows=4, influence_rows=4)
        if name == 'stage3b':
            cache = dict(teacher=teacher, source='noise', data_dir=data, block_size=256)
            run_here(['kd.py', 'cache', *options(cache)])
            knobs['sources'] = {'noise': 1.0}
        if name.startswith('stage3'):
            knobs['teacher'] = teacher
        if name == 'stage5':
            knobs['batch_size'] = 1
        files = ['config/tiny/model.py', f'config/tiny/{name}.py']
        assert run_here(['train.py', *files, *options(knobs)]) == 0
        m = metrics(tmp_path / name)
        first[name] = m[0]['val/loss']
        last[name] = m[max(m)]['val/loss']
        # A teacher that was trained so briefly knows less than its student, so the validation loss
        # of stages 3 and 3b need not fall.
        if name == 'stage3':
            distance = m[0]['kd/loss']
            assert m[9]['kd/loss'] < distance
        elif name == 'stage3b':
            assert max(m[step]['kd/loss'] for step in range(10)) < distance / 2
        else:
            assert last[name] < first[name] - 0.02, (first, last)
        if name != 'teacher':
            before = name
    assert first['stage2'] == pytest.approx(last['stage1'], rel=1e-6)
