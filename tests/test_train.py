"""train.py as a user runs it, on tiny data."""
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
from data import open_shard
from lib import parallel
from lib.checkpoint import find_checkpoint, read_state
from tests.conftest import (
    ROOT,
    assert_one_sentence,
    make_source,
    metrics,
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
    tensors = {key: torch.zeros(m.size, dtype=m.properties.dtype) for key, m in stored.items()}
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


def assert_same_run(a, b):
    """The same final weights and optimizer state, and the same logged losses, bit for bit."""
    one, two = weights_of(a), weights_of(b)
    assert one.keys() == two.keys() and len(one) > 10
    for key in one:
        assert torch.equal(one[key], two[key]), key
    for step, record in metrics(a).items():
        other = metrics(b)[step]
        for key in record:
            if key.startswith(('train/loss', 'val/', 'mixture/weight', 'mixture/epochs', 'train/grad_norm')):
                assert record[key] == other[key], (step, key)


def test_a_run_learns_and_leaves_everything_behind(tmp_path, tiny_data, capsys):
    out = tmp_path / 'run'
    m = train(out, tiny_data, max_steps=160)
    assert abs(m[0]['val/loss'] - np.log(64)) < 0.1
    assert m[160]['val/loss_a'] < 1.5 and m[160]['val/loss_b'] < 2.0      # 90 % of the steps are one stride: 0.7 nats at best
    assert m[159]['train/accuracy'] > 0.6 and m[159]['train/tokens'] == 160 * 64
    for key in ('train/perplexity', 'train/learning_rate', 'train/grad_norm', 'train/tokens_per_second', 'system/step_ms',
                'system/data_ms', 'mixture/weight_a', 'mixture/drawn_b'):
        assert key in m[159]
    assert m[159]['train/mfu'] is None                                  # a CPU's peak is not in the table
    assert json.loads((out / 'config.json').read_text())['max_steps'] == 160
    assert (out / 'curves.png').read_bytes()[:4] == b'\x89PNG'
    assert (out / 'ckpt/latest').read_text() == 'step_000160'
    assert sorted(p.name for p in (out / 'ckpt').iterdir()) == ['latest', 'step_000156', 'step_000160']
    printed = capsys.readouterr().out
    for part in ('loss before', 'curves.png', 'step_000160'):
        assert part in printed
    drawn = [sum(m[s][f'mixture/drawn_{n}'] for s in range(160)) / 160 for n in 'ab']
    assert drawn == pytest.approx([0.75, 0.25], abs=0.01)


def test_golden_loss_curve(tmp_path, tiny_data):
    # fp32, one thread, seed 1337: a change here is a change of the data order, the init, the model, the loss or the optimizer
    m = train(tmp_path / 'run', tiny_data, max_steps=40)
    golden = {0: 4.20349, 10: 3.39487, 20: 2.79139, 39: 2.23056}
    assert [m[s]['train/loss'] for s in golden] == pytest.approx(list(golden.values()), rel=2e-3)


def test_one_batch_can_be_overfitted(tmp_path):
    data = tmp_path / 'data'
    for split in ('train', 'val'):
        write_shard(data / 'x' / split / '0.bin', np.random.default_rng(0).integers(0, 64, 4 * 16 + 1))
    m = train(tmp_path / 'run', data, sources={'x': 1.0}, max_steps=150, learning_rate=2e-2, schedule='constant', weight_decay=0.0)
    assert m[0]['train/loss'] > 4 and m[149]['train/loss'] < 0.05


@pytest.mark.parametrize('dtype, optimizer', [('float32', 'adamw'), ('bfloat16', 'adamw'), ('float32', 'muon')])
def test_killed_and_resumed_run_equals_the_uninterrupted_one(tmp_path, tiny_data, capsys, dtype, optimizer):
    knobs = dict(dtype=dtype, optimizer=optimizer, max_steps=40, save_interval=3, document_mask=False)
    train(tmp_path / 'whole', tiny_data, **knobs)
    command = train_command(tmp_path / 'killed', tiny_data, resume=True, **knobs)
    rng, kills, log = random.Random(dtype + optimizer), 0, tmp_path / 'killed/metrics.jsonl'
    while kills < 3:
        lines = len(log.read_text().splitlines()) if log.exists() else 0
        process = start(command, tmp_path / 'log', {})
        wanted = lines + rng.randint(1, 12)
        while process.is_alive() and not (log.exists() and len(log.read_text().splitlines()) >= wanted):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.03)
        assert process.is_alive(), 'the run ended before it could be killed'
        process.kill()
        process.join()
        kills += 1
    capsys.readouterr()
    assert run_here(command) == 0 and 'resume: ' in capsys.readouterr().out
    assert_same_run(tmp_path / 'whole', tmp_path / 'killed')
    assert not list((tmp_path / 'killed/ckpt').glob('*.tmp'))


def test_sigterm_saves_and_the_resumed_run_equals_the_whole(tmp_path, tiny_data):
    knobs = dict(max_steps=300, eval_interval=300, save_interval=1000)
    process = start(train_command(tmp_path / 'run', tiny_data, **knobs), tmp_path / 'log', {})
    log = tmp_path / 'run/metrics.jsonl'
    while not (log.exists() and len(log.read_text().splitlines()) > 5):
        time.sleep(0.01)
    process.terminate()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM and 'stopped by a signal' in (tmp_path / 'log').read_text()
    stopped_at = read_state(find_checkpoint(str(tmp_path / 'run')))['step']
    assert 5 <= stopped_at < 300
    train(tmp_path / 'run', tiny_data, resume=True, **knobs)
    train(tmp_path / 'whole', tiny_data, **knobs)
    assert_same_run(tmp_path / 'whole', tmp_path / 'run')


def test_accumulating_micro_batches_equals_one_large_batch(tmp_path, tiny_data):
    one = train(tmp_path / 'one', tiny_data, batch_size=8, total_batch_tokens=128)
    eight = train(tmp_path / 'eight', tiny_data, batch_size=1, total_batch_tokens=128)
    for step in range(12):
        assert one[step]['train/loss'] == pytest.approx(eight[step]['train/loss'], rel=1e-5)
        assert one[step]['train/grad_norm'] == pytest.approx(eight[step]['train/grad_norm'], rel=1e-3)


@pytest.mark.parametrize('changes, tolerance', [
    ({}, 1e-5), (dict(tie_embeddings=False, layer_repeat=2), 1e-5),
    (dict(optimizer='muon'), 1e-3)])       # Muon orthogonalises in bf16, which makes rounding visible
def test_two_ranks_equal_one(tmp_path, tiny_data, changes, tolerance):
    knobs = dict(max_steps=20, batch_size=1, eval_interval=10, eval_rows=5, **changes)
    one = train(tmp_path / 'one', tiny_data, **knobs)
    two = train(tmp_path / 'two', tiny_data, ranks=2, **knobs)
    for step in range(20):
        assert one[step]['train/loss'] == pytest.approx(two[step]['train/loss'], rel=tolerance), step
    for step in (0, 10, 20):
        for key in ('val/loss_a', 'val/loss_b'):
            assert one[step][key] == pytest.approx(two[step][key], rel=tolerance)


def test_checkpoint_of_two_ranks_goes_on_with_one_and_back(tmp_path, tiny_data):
    whole = train(tmp_path / 'whole', tiny_data, batch_size=1)
    train(tmp_path / 'run', tiny_data, ranks=2, batch_size=1, max_steps=4, schedule='constant', async_save=True)
    shutil.copytree(tmp_path / 'run', tmp_path / 'copy')
    constant = train(tmp_path / 'constant', tiny_data, batch_size=1, schedule='constant')
    one = train(tmp_path / 'run', tiny_data, batch_size=1, schedule='constant', resume=True)
    two = train(tmp_path / 'copy', tiny_data, ranks=2, batch_size=1, schedule='constant', resume=True)
    for step in range(12):
        assert one[step]['train/loss'] == pytest.approx(constant[step]['train/loss'], rel=1e-5)
        assert two[step]['train/loss'] == pytest.approx(constant[step]['train/loss'], rel=1e-5)
    assert whole[11]['train/loss'] != constant[11]['train/loss']


def test_background_saves_hold_the_same_as_waiting_ones(tmp_path, tiny_data):
    knobs = dict(ranks=2, batch_size=1, max_steps=8, save_interval=2)
    train(tmp_path / 'sync', tiny_data, async_save=False, **knobs)
    train(tmp_path / 'async', tiny_data, async_save=True, **knobs)
    assert_same_run(tmp_path / 'sync', tmp_path / 'async')
    for name in ('step_000006', 'step_000008'):      # a save that training overtook would hold later weights
        for run_dir in ('sync', 'async'):
            (tmp_path / run_dir / 'ckpt/latest').write_text(name)
        assert_same_run(tmp_path / 'sync', tmp_path / 'async')


def test_resuming_with_other_weights_takes_them(tmp_path, tiny_data):
    train(tmp_path / 'run', tiny_data, max_steps=4)
    m = train(tmp_path / 'run', tiny_data, max_steps=12, resume=True, sources={'a': 0.25, 'b': 0.75})
    assert m[3]['mixture/weight_a'] == pytest.approx(0.75) and m[11]['mixture/weight_a'] == pytest.approx(0.25)
    assert sum(m[s]['mixture/drawn_a'] for s in range(4, 12)) / 8 == pytest.approx(0.25, abs=0.04)


def test_init_from_takes_weights_only(tmp_path, tiny_data):
    first = train(tmp_path / 'first', tiny_data, max_steps=30)
    second = train(tmp_path / 'second', tiny_data, init_from=tmp_path / 'first', seed=7)
    assert second[0]['val/loss'] == pytest.approx(first[30]['val/loss'], rel=1e-6)
    assert second[0]['train/learning_rate'] == pytest.approx(1e-2 / 2) and second[0]['train/tokens'] == 64


@pytest.mark.parametrize('schedule, expected', [
    ('linear', [0.5, 1, 0.55, 0.145]), ('cosine', [0.5, 1, 0.55, 0.1055]), ('wsd', [0.5, 1, 1, 0.325]), ('constant', [0.5, 1, 1, 1])])
def test_schedules(tmp_path, tiny_data, schedule, expected):
    m = train(tmp_path / 'run', tiny_data, schedule=schedule, max_steps=22, warmup_steps=2, learning_rate=1.0, grad_clip=1e-9,
              optimizer='adamw', decay_frac=0.2, min_lr_frac=0.1, eval_interval=100, weight_decay=0.0)
    assert [m[s]['train/learning_rate'] for s in (0, 2, 12, 21)] == pytest.approx(expected, abs=2e-3)


def test_compiled_run_gives_the_same_losses(tmp_path, tiny_data):
    if shutil.which('g++') is None:
        pytest.skip('torch.compile on the CPU needs a C++ compiler, g++ is not here')
    eager = train(tmp_path / 'eager', tiny_data, max_steps=6)
    compiled = train(tmp_path / 'compiled', tiny_data, max_steps=6, compile=True)
    for step in range(6):
        assert compiled[step]['train/loss'] == pytest.approx(eager[step]['train/loss'], rel=1e-4)


def test_document_mask_changes_what_is_seen(tmp_path, tiny_data):
    for name in 'ab':
        (tiny_data / name / 'tok').mkdir()
        ranks = {bytes([b]): b for b in range(63)}
        from lib.tokenizer import GPT2_PATTERN, make_tokenizer, save_tokenizer
        tokenizer = make_tokenizer('x', ranks, GPT2_PATTERN, {'<|endoftext|>': 63}, '<|endoftext|>')
        save_tokenizer(str(tiny_data / name), tokenizer)
        (tiny_data / name / 'meta.json').write_text(json.dumps(
            dict(vocab_size=64, shards=[], tokenizer=dict(name='x', fingerprint=tokenizer.fingerprint, bos_id=63))))
    plain = train(tmp_path / 'plain', tiny_data)
    masked = train(tmp_path / 'masked', tiny_data, document_mask=True)
    assert plain[0]['train/loss'] == pytest.approx(masked[0]['train/loss'], rel=0.01)
    assert plain[0]['train/loss'] != masked[0]['train/loss']
    assert 'val/bpb_a' in plain[0]


# -- bad input: one sentence, exit code 2, nothing lost ----------------------------------------------------------------

@pytest.mark.parametrize('knobs, parts', [
    (dict(warmup_step=3), ["unknown name 'warmup_step'", "'warmup_steps'"]),
    (dict(max_steps='many'), ['max_steps must be int | None']),
    (dict(sources={'a': 1, 'bb': 1}), ["source 'bb'", 'does not exist']),
    (dict(sources={'a': 0, 'b': 0}), ['sum to more than 0']),
    (dict(sources={'a': 2, 'b': -1}), ['negative']),
    (dict(sources={}), ['sources is empty']),
    (dict(total_batch_tokens=100), ['not a multiple', '2 * 16 * 1 = 32', 'Try 96']),
    (dict(total_batch_tokens=16), ['Try 32']),
    (dict(total_batch_tokens=16 * 400, batch_size=400), ['fewer than one batch', '400 rows', "source 'a'"]),
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
    assert_one_sentence(run_ranks(train_command(tmp_path / 'run', tiny_data, warmup=3), 1), 2, "unknown name 'warmup'")
    assert_one_sentence(run(train_command(tmp_path / 'run', tiny_data, sources={'a': 1, 'bb': 1})), 2, "source 'bb'")


def test_truncated_shard_gets_one_sentence(tmp_path, tiny_data):
    shard = tiny_data / 'b/train/000001.bin'
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(BadInput, match=f'{shard} holds 1,950 tokens, its header says 2,000: truncated'):
        train(tmp_path / 'run', tiny_data)


def test_used_out_dir_is_refused_and_untouched(tmp_path, tiny_data):
    train(tmp_path / 'run', tiny_data)
    before = {p: p.read_bytes() for p in (tmp_path / 'run').rglob('*') if p.is_file()}
    with pytest.raises(BadInput, match='already holds a run.*--resume=True'):
        train(tmp_path / 'run', tiny_data)
    assert {p: p.read_bytes() for p in (tmp_path / 'run').rglob('*') if p.is_file()} == before


@pytest.fixture
def finished(tmp_path, tiny_data):
    train(tmp_path / 'run', tiny_data)
    return tmp_path / 'run'


def test_resume_with_changed_shards_model_or_damaged_files_is_refused(finished, tiny_data):
    def refused(message, **knobs):
        with pytest.raises(BadInput, match=message):
            train(finished, tiny_data, resume=True, max_steps=16, **knobs)

    refused('another model: ffn_dim 48 there, 64 here', ffn_dim=64)
    refused('total_batch_tokens was 64', total_batch_tokens=128)
    with pytest.raises(BadInput, match='step 12, beyond the 6 steps'):
        train(finished, tiny_data, resume=True, max_steps=6)
    refused(r"sources are \['a', 'b'\]", sources={'a': 1.0})
    make_source(tiny_data, 'b', seed=5)
    refused("source 'b'.*changed")
    make_source(tiny_data, 'b')
    assert max(train(finished, tiny_data, resume=True, max_steps=16)) == 16        # everything put back: it goes on


@pytest.mark.skipif(not hasattr(resource, 'prlimit'), reason='needs Linux')
@pytest.mark.parametrize('most', [100_000, 9_000])      # bytes: the weights do not fit; not even the random generators
def test_full_disk_while_saving_leaves_the_checkpoint_before(tmp_path, tiny_data, most):
    def limit(processes):        # a file may not grow beyond that, as if the disk were full
        resource.prlimit(processes[0].pid, resource.RLIMIT_FSIZE, (most, most))
    train(tmp_path / 'run', tiny_data, max_steps=4)
    done = run_ranks(train_command(tmp_path / 'run', tiny_data, resume=True, max_steps=8), 1, during=limit)
    assert_one_sentence(done, 1, 'checkpoint of step 8 could not be written', 'step_000004 is the last good one')
    assert sorted(p.name for p in (tmp_path / 'run/ckpt').iterdir()) == ['latest', 'step_000004']
    train(tmp_path / 'run', tiny_data, resume=True, max_steps=8)
    assert read_state(find_checkpoint(str(tmp_path / 'run')))['step'] == 8


def test_every_logged_step_took_time(tmp_path, tiny_data):
    by_step = train(tmp_path / 'run', tiny_data, max_steps=12, eval_interval=6)
    ms = [by_step[step]['system/step_ms'] for step in range(12)]
    assert min(ms) > 0.2 * sorted(ms)[6] and all(0 < by_step[step]['system/data_ms'] < ms[step] for step in range(12))


def test_diverging_run_stops_before_the_optimizer_and_names_the_batch(tmp_path, tiny_data):
    done = run_ranks(train_command(tmp_path / 'run', tiny_data, learning_rate=1e38, grad_clip=0.0, save_interval=1, warmup_steps=0,
                                   schedule='constant', max_steps=40), 1)
    assert_one_sentence(done, 1, 'the optimizer was not stepped', 'Last good checkpoint: ', "Rows of the batch by source: {'a': ")


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_a_step_of_numbers_that_are_not_finite_changes_nothing(name):
    p = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = torch.optim.AdamW([p], fused=True) if name == 'adamw' else torch.optim.Muon([p])
    for not_finite, gradient in ((0.0, torch.ones(4, 4)), (1.0, torch.full((4, 4), math.nan)), (1.0, torch.ones(4, 4)), (0.0, torch.ones(4, 4))):
        before = [t.clone() for t in (p.detach(), *optimizer.state[p].values())]
        p.grad = gradient
        parallel.step(optimizer, torch.tensor(not_finite))
        after = [p.detach(), *optimizer.state[p].values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after)) == bool(not_finite)


def test_a_failed_rank_is_named(tmp_path, tiny_data):
    done = run_ranks(train_command(tmp_path / 'run', tiny_data, ranks=2, total_batch_tokens=100), 2)
    assert done.returncode != 0 and '[rank ' in done.stderr and 'not a multiple' in done.stderr


# -- the files of the project ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', sorted(str(p.relative_to(ROOT / 'config')) for p in (ROOT / 'config').rglob('*.py')))
def test_every_config_loads(tmp_path, capsys, name):
    # the mistakes that are found after a config has been read show that it was: no sources, or no folder for them
    with pytest.raises(BadInput, match='sources is empty' if 'model' in name else 'does not exist'):
        run_here(['train.py', *['config/tiny/model.py'] * name.startswith('tiny/'), *['config/study/base.py'] * name.startswith('study/'), f'config/{name}', f'--out_dir={tmp_path / "run"}',
                  f'--data_dir={tmp_path}', '--prepare=None', '--mixture=fixed', '--device=cpu'])
    out = capsys.readouterr().out
    assert 'differ from the defaults' in out and f'config/{name}:' in out


def test_demo_builds_its_data_trains_and_writes_text(tmp_path):
    done = run([sys.executable, 'train.py', 'config/demo.py', f'--out_dir={tmp_path / "run"}', f'--data_dir={tmp_path / "demo"}',
                '--max_steps=12', '--eval_interval=12', '--eval_rows=8'])
    assert done.returncode == 0, done.stderr
    m = metrics(tmp_path / 'run')
    assert abs(m[0]['val/loss'] / np.log(4096) - 1) < 0.02 and m[12]['val/loss'] < m[0]['val/loss'] - 0.3
    for source in ('code', 'docs', 'math', 'noise'):      # bits per byte against the shard's own count of bytes, roughly
        meta = json.loads((tmp_path / 'demo' / source / 'meta.json').read_text())['splits']['val']
        expected = m[12][f'val/loss_{source}'] / np.log(2) * meta['tokens'] / meta['bytes']
        assert m[12][f'val/bpb_{source}'] == pytest.approx(expected, rel=0.4)
    for part in ('running prepare/demo.py', 'bits/byte', 'curves.png', 'sample: Problem: Compute 12 * 7 + 5.'):
        assert part in done.stdout


@pytest.mark.parametrize('name, key', [('influence_dynamic', 'mixture/influence_math'), ('presence_two_stage', 'presence/weight_7')])
def test_tiny_ablations_run(tmp_path, demo_data, name, key):
    knobs = dict(out_dir=tmp_path / 'run', data_dir=demo_data, max_steps=13, mixture_interval=6, mixture_warmup=6, log_interval=1, n_layer=2,
                 eval_rows=8, probe_rows=16, influence_rows=8, eval_interval=13)
    assert run_here(['train.py', f'config/ablation/{name}.py', 'config/ablation/tiny.py', *(f'--{k}={v}' for k, v in knobs.items())]) == 0
    m = metrics(tmp_path / 'run')
    if name == 'presence_two_stage':                 # a tenth of the run
        assert [m[s]['presence/tau'] for s in (0, 1)] == [1, -1]
    assert any(key in record for record in m.values()) and m[13]['val/loss'] < m[0]['val/loss']


def test_the_tiny_stages_follow_each_other(tmp_path, demo_data):
    """Every stage's own config, cut short, each from the one before; what it trains on falls in all of them."""
    demo_data = shutil.copytree(demo_data, tmp_path / 'data')       # a cache is written into it, of a source that is made small
    write_shard(demo_data / 'noise/train/00000_00000.bin', open_shard(str(demo_data / 'noise/train/00000_00000.bin'))[:20_000].copy(), 4096)
    losses, before = {}, None
    short = dict(data_dir=demo_data, max_steps=10, total_batch_tokens=1024, batch_size=4, log_interval=1, eval_interval=10, eval_rows=4, save_interval=10,
                 n_layer=2, compile=False)
    for name in ('stage1', 'stage2', 'teacher', 'stage3', 'stage3b', 'stage4', 'stage5'):
        knobs = {**short, 'out_dir': tmp_path / name}
        if before and name != 'teacher':
            knobs['init_from'] = tmp_path / before
        if name == 'stage2':
            knobs |= dict(mixture_interval=9, mixture_warmup=9, probe_rows=4, influence_rows=4)
        if name == 'stage3b':
            run_here(['kd.py', 'cache', f'--teacher={tmp_path / "teacher"}', '--source=noise', f'--data_dir={demo_data}', '--block_size=256'])
            knobs['sources'] = {'noise': 1.0}
        if name.startswith('stage3'):
            knobs['teacher'] = tmp_path / 'teacher'
        if name == 'stage5':
            knobs['batch_size'] = 1
        assert run_here(['train.py', 'config/tiny/model.py', f'config/tiny/{name}.py', *(f'--{k}={v}' for k, v in knobs.items())]) == 0
        m = metrics(tmp_path / name)
        losses[name] = m[0]['val/loss'], m[max(m)]['val/loss']
        if name == 'stage3':                                 # so short a teacher knows less than its student
            far = m[0]['kd/loss']
            assert m[9]['kd/loss'] < far
        elif name == 'stage3b':
            assert max(m[s]['kd/loss'] for s in range(10)) < far / 2
        else:
            assert losses[name][1] < losses[name][0] - 0.02, losses
        if name != 'teacher':
            before = name
    assert losses['stage2'][0] == pytest.approx(losses['stage1'][1], rel=1e-6)
