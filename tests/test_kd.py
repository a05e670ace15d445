"""Tests of kd.py.

The loss is compared with full logits in fp64. Others check what a cache holds, what is refused, and
runs that distil.
"""
import dataclasses
import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kd
from configurator import BadInput, RunFault
from data import Source
from lib import parts
from tests.conftest import make_source, run_here, train, train_command

N, C, V = 37, 24, 211


def problem(seed=0, n=N, c=C, v=V, c_teacher=40):
    """Hidden states and weights of a student and a teacher, targets with ignored ones, token
    weights; fp64.
    """
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(n, c, generator=g, dtype=torch.float64)
    w = torch.randn(v, c, generator=g, dtype=torch.float64) / c**0.5 * 1.5
    th = torch.randn(n, c_teacher, generator=g, dtype=torch.float64)
    tw = torch.randn(v, c_teacher, generator=g, dtype=torch.float64) / c_teacher**0.5 * 2
    targets = torch.randint(0, v, (n,), generator=g)
    targets[::5] = -1
    weights = torch.rand(n, generator=g, dtype=torch.float64) + 0.5
    return h, w, th, tw, targets, weights


def reference(h, w, q, targets, alpha, T, kind):
    """Losses and D from full logits, (n,) each. q (n, V): the teacher's probabilities at T."""
    z = h @ w.T
    p = (z / T).softmax(1)
    if kind == 'forward':
        d = F.kl_div(p.log(), q, reduction='none').sum(1)
    elif kind == 'reverse':
        d = F.kl_div(q.log(), p, reduction='none').sum(1)
    else:
        m = (p + q) / 2
        to_teacher = F.kl_div(m.log(), q, reduction='none')
        to_student = F.kl_div(m.log(), p, reduction='none')
        d = 0.5 * (to_teacher + to_student).sum(1)
    ce = cross_entropy(z, targets)
    return (alpha * T * T * d + (1 - alpha) * ce) * (targets >= 0), d


def cross_entropy(z, targets):
    return F.cross_entropy(z, targets, ignore_index=-1, reduction='none')


def close(found, exact, tolerance=1e-5):
    return (found.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize('kind', kd.DIVERGENCES)
@pytest.mark.parametrize('T', [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize('alpha', [0.0, 0.3, 1.0])
def test_loss_and_gradient_equal_full_logits_in_fp64(monkeypatch, kind, T, alpha):
    # There are several chunks, and the last one is smaller.
    monkeypatch.setattr(kd, 'kd_chunk_rows', lambda *_: 16)
    h, w, th, tw, targets, weights = problem()
    h.requires_grad_()
    w.requires_grad_()
    q = (th @ tw.T / T).softmax(1)
    losses, d = reference(h, w, q, targets, alpha, T, kind)
    exact = (losses * weights).sum()
    (0.37 * exact).backward()
    hf = h.detach().float().requires_grad_()
    wf = w.detach().float().requires_grad_()
    total, found = kd.distillation_loss(
        hf, wf, targets, weights.float(), teacher=(th.float(), tw.float()), alpha=alpha,
        temperature=T, kind=kind)
    (0.37 * total).backward()
    valid = targets >= 0
    assert close(total.detach(), exact.detach())
    assert close(hf.grad, h.grad) and close(wf.grad, w.grad)
    assert close(found[0][valid], d.detach()[valid])
    assert (hf.grad[~valid] == 0).all() and (found[:, ~valid] == 0).all()
    z = h.detach() @ w.detach().T
    y = th @ tw.T
    assert close(found[1][valid], cross_entropy(z, targets)[valid])
    assert close(found[3][valid], cross_entropy(y, targets)[valid])
    assert torch.equal(found[2].bool(), (z.argmax(1) == targets) & valid)
    assert torch.equal(found[4].bool(), (z.argmax(1) == y.argmax(1)) & valid)


def cached(y, targets, k, draws, T=1.0, seed=0):
    """What a cache would hold of the logits y (n, V), by way of its records."""
    v = y.shape[1]
    record = kd.record_dtype(v, k, draws)
    generator = torch.Generator().manual_seed(seed)
    records, beyond = kd.records_of(y.float(), torch.eye(v), targets, record, T, generator)
    rest = torch.from_numpy(np.log(beyond / max(beyond.sum(), 1e-9) + 1e-9)).float()[None]
    return kd.read_cached(records, np.zeros(len(records), dtype=np.int64), rest, 'cpu')


@pytest.mark.parametrize('kind', kd.DIVERGENCES)
@pytest.mark.parametrize('T', [0.5, 2.0])
def test_top_k_is_the_divergence_from_the_k_and_the_mean_of_the_rest(kind, T):
    h, w, th, tw, targets, _ = problem(1)
    h.requires_grad_()
    w.requires_grad_()
    y = th @ tw.T
    k = 13
    c = cached(y, targets, k, 0, T)
    # The teacher's distribution as the cache knows it, made here without the records.
    true = (y / T).softmax(1)
    values, ids = true.topk(k)
    beyond = true.scatter(1, ids, 0)
    mean = (beyond.sum(0) / beyond.sum() + 1e-9).repeat(N, 1).scatter(1, ids, 0)
    q = mean / mean.sum(1, keepdim=True) * beyond.sum(1, keepdim=True)
    q = q.scatter(1, ids, values)
    losses, d = reference(h, w, q, targets, 1.0, T, kind)
    losses.sum().backward()
    hf = h.detach().float().requires_grad_()
    wf = w.detach().float().requires_grad_()
    total, found = kd.distillation_loss(
        hf, wf, targets, teacher=c, alpha=1.0, temperature=T, kind=kind)
    total.backward()
    valid = targets >= 0
    # The tolerance is that of fp16.
    assert close(hf.grad, h.grad, 2e-3) and close(wf.grad, w.grad, 2e-3)
    if kind == 'forward':       # it uses the teacher's exact entropy
        d = (true * true.log()).sum(1) - (q * (h @ w.T / T).log_softmax(1)).sum(1)
    assert close(found[0][valid], d.detach()[valid], 2e-3)
    assert close(found[3][valid], cross_entropy(y, targets)[valid], 1e-3)
    assert torch.equal(found[4].bool(), ((h @ w.T).argmax(1) == y.argmax(1)) & valid)


@pytest.mark.parametrize('draws', [0, 4])
def test_all_ids_in_the_cache_are_the_teacher_itself(draws):
    h, w, th, tw, targets, weights = problem(2)
    y = th @ tw.T
    losses, _ = reference(h, w, y.softmax(1), targets, 1.0, 1.0, 'forward')
    exact = (losses * weights).sum()
    teacher = cached(y, targets, V, draws)
    total, _ = kd.distillation_loss(h.float(), w.float(), targets, weights.float(), teacher=teacher)
    assert total == pytest.approx(exact.item(), rel=1e-3)            # fp16


@pytest.mark.parametrize('k', [0, 6])
def test_draws_are_right_on_average_and_the_likeliest_make_them_quieter(k):
    """Compares the mean of 400 caches with the exact divergence and gradient.

    Caches with as many ids but without draws are off by far more.
    """
    h, w, th, tw, targets, _ = problem(3)
    y = th @ tw.T / 2                                   # a broad teacher: much mass in the tail
    hx = h.clone().requires_grad_()
    losses, _ = reference(hx, w, y.softmax(1), targets, 1.0, 1.0, 'forward')
    exact = losses.sum()
    exact.backward()

    def measure(k, draws, seed=0):
        x = h.float().requires_grad_()
        teacher = cached(y, targets, k, draws, seed=seed)
        total, _ = kd.distillation_loss(x, w.float(), targets, teacher=teacher)
        total.backward()
        return total.item(), x.grad.double()

    values, gradients = zip(*[measure(k, 8, seed) for seed in range(400)], strict=True)
    gradients = torch.stack(gradients)
    error = np.std(values) / 20
    assert abs(np.mean(values) - exact.item()) < 4 * error and error < 0.01 * exact.item()
    bias = (gradients.mean(0) - hx.grad).norm()
    noise = gradients.std(0).norm()
    assert bias < 2 * noise / 20
    assert (measure(8 + k, 0)[1] - hx.grad).norm() > 2 * bias
    if k:
        draws_alone = torch.stack([measure(0, 8, seed)[1] for seed in range(30)])
        assert noise < 0.9 * draws_alone.std(0).norm()


@pytest.mark.parametrize('kind', kd.DIVERGENCES)
def test_a_certain_student_and_teacher_give_no_nan(kind):
    z = torch.tensor([[200.0, 0, 0, 0, -200]])
    target = torch.tensor([0])
    for y in (z, -z):
        for teacher in ((y, torch.eye(5)), cached(y, target, 2, 0), cached(y, target, 2, 3)):
            h = z.clone().requires_grad_()
            total, _ = kd.distillation_loss(h, torch.eye(5), target, teacher=teacher, kind=kind)
            total.backward()
            assert math.isfinite(total.item()) and h.grad.isfinite().all(), y


def test_bf16_autocast_stays_near_fp32():
    h, w, th, tw, targets, _ = problem(4)
    losses, gradients = [], []
    for low in (False, True):
        x = h.float().requires_grad_()
        dtype = torch.bfloat16 if low else torch.float32
        with torch.autocast('cpu', torch.bfloat16, enabled=low):
            teacher = (th.to(dtype), tw.to(dtype))
            total, _ = kd.distillation_loss(x, w.float(), targets, teacher=teacher)
        total.backward()
        losses.append(total.item())
        gradients.append(x.grad)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert (gradients[1] - gradients[0]).norm() < 0.03 * gradients[0].norm()


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def taught(tmp_path_factory):
    """(data folder of two sources, run of a teacher that is wider than TINY and trained longer)."""
    folder = tmp_path_factory.mktemp('taught')
    for name in 'ab':
        make_source(folder / 'data', name)
    train(folder / 'teacher', folder / 'data', n_embd=48, ffn_dim=96, max_steps=150,
          eval_interval=150, save_interval=150, total_batch_tokens=128)
    return folder / 'data', folder / 'teacher'


def cache(data_dir, teacher_dir, name, **knobs):
    """Does what `kd.py cache` does, on both sources."""
    kd.write_caches(kd.CacheConfig(
        teacher=str(teacher_dir), data_dir=str(data_dir), name=name, source='a,b', block_size=16,
        dtype='float32', **knobs))


def test_a_distilled_student_learns_faster_and_resumes_bit_for_bit(tmp_path, taught):
    data, teacher = taught
    knobs = dict(max_steps=60, eval_interval=60, save_interval=30)
    plain = train(tmp_path / 'plain', data, **knobs)
    knobs['teacher'] = teacher
    m = train(tmp_path / 'kd', data, **knobs)
    assert m[59]['kd/loss'] < 0.5 * m[0]['kd/loss']
    assert m[60]['val/loss'] < plain[60]['val/loss'] - 0.05
    assert m[0]['kd/teacher_loss'] < 1.5
    assert m[0]['kd/teacher_agreement'] < 0.2 < 0.5 < m[59]['kd/teacher_agreement']
    # train/loss is the cross-entropy in both runs.
    assert m[0]['train/loss'] == pytest.approx(plain[0]['train/loss'], rel=1e-6)
    shutil.copytree(tmp_path / 'kd', tmp_path / 'again')
    shutil.rmtree(tmp_path / 'again/ckpt/step_000060')
    (tmp_path / 'again/ckpt/latest').write_text('step_000030')
    again = train(tmp_path / 'again', data, resume=True, **knobs)
    for step in range(30, 60):
        for key in m[step]:
            if key.startswith(('kd/', 'train/loss', 'train/grad_norm')):
                assert again[step][key] == m[step][key], (step, key)
    assert again[60]['val/loss'] == m[60]['val/loss']


def test_alpha_zero_is_plain_training(tmp_path, taught):
    data, teacher = taught
    plain = train(tmp_path / 'plain', data)
    distilled = train(tmp_path / 'kd', data, teacher=teacher, kd_alpha=0.0)
    for step in range(12):
        assert distilled[step]['train/loss'] == pytest.approx(plain[step]['train/loss'], rel=1e-5)


def test_a_cache_teaches_what_its_teacher_does_also_while_weights_move(tmp_path, taught):
    data, teacher = taught
    cache(data, teacher, 'all', k=64, draws=0)
    cache(data, teacher, 'few', k=6, draws=12)
    online = train(tmp_path / 'online', data, teacher=teacher)
    for name, tolerance in (('all', 2e-3), ('few', 0.1)):
        m = train(tmp_path / name, data, kd_cache=name, teacher=teacher)
        tolerances = {'kd/loss': tolerance, 'kd/teacher_loss': 2e-3, 'train/loss': tolerance}
        for step in range(12):
            for key, far in tolerances.items():
                expected = pytest.approx(online[step][key], rel=far)
                assert m[step][key] == expected, (name, step, key)
            agreement = online[step]['kd/teacher_agreement']
            assert m[step]['kd/teacher_agreement'] == pytest.approx(agreement, abs=0.06)
    make_source(tmp_path, 'a', n_tokens=4001, seed=5)
    shutil.copytree(tmp_path / 'a/val', data / 'probe/a/probe', dirs_exist_ok=True)
    # This rule moves the weights whatever the errors of so few rows are.
    knobs = dict(mixture='influence', mixture_interval=4, mixture_warmup=2, probe={'a': 1.0},
                 influence_rule='proportional', probe_rows=8, influence_rows=4, mixture_max=0.95)
    from_cache = train(tmp_path / 'moved_cache', data, **knobs, kd_cache='all')[11]
    online = train(tmp_path / 'moved_online', data, **knobs, teacher=teacher)[11]
    assert from_cache['mixture/weight_a'] != 0.75
    assert from_cache['mixture/weight_a'] == pytest.approx(online['mixture/weight_a'], abs=1e-3)
    assert from_cache['kd/loss'] == pytest.approx(online['kd/loss'], rel=5e-3)


def test_a_cache_of_packed_conversations_teaches_what_its_teacher_does(tmp_path):
    from tests.test_sft import SFT, conversations, write_chats
    data = tmp_path / 'data'
    teacher = tmp_path / 'teacher'
    write_chats(data, 'chat', conversations(300))
    knobs = {**SFT, 'block_size': 160, 'max_steps': 6, 'eval_interval': 6}
    train(teacher, data, **{**knobs, 'n_embd': 48, 'max_steps': 30})
    run_here([
        sys.executable, 'kd.py', 'cache', f'--data_dir={data}', f'--teacher={teacher}',
        '--source=chat', '--block_size=160', '--packing=document', '--dtype=float32', '--k=259',
        '--draws=0'])
    online = train(tmp_path / 'online', data, **knobs, teacher=teacher)
    from_cache = train(tmp_path / 'cached', data, **knobs, kd_cache='teacher')
    for step in range(6):
        for key in ('kd/loss', 'kd/teacher_loss', 'train/loss'):
            expected = pytest.approx(online[step][key], rel=3e-3)
            assert from_cache[step][key] == expected, (step, key)
    knobs['overlong'] = 'drop'
    with pytest.raises(BadInput, match="was made for overlong = 'truncate', this run has 'drop'"):
        run_here(train_command(tmp_path / 'x', data, **knobs, kd_cache='teacher'))


def test_presence_and_draws_go_with_distillation(tmp_path, taught):
    data, teacher = taught
    cache(data, teacher, 'drawn', k=0, draws=12)
    m = train(tmp_path / 'run', data, kd_cache='drawn', presence='store', max_steps=30)
    assert m[29]['kd/loss'] < 0.6 * m[0]['kd/loss']
    assert m[29]['presence/effective_micro_batches'] > 1
    with pytest.raises(BadInput, match="draws only, and kd_divergence = 'js' cannot be computed"):
        run_here(train_command(tmp_path / 'js', data, kd_cache='drawn', kd_divergence='js'))


def test_two_ranks_share_the_teacher_and_equal_one(tmp_path, taught):
    data, teacher = taught
    knobs = dict(teacher=teacher, kd_alpha=0.5, kd_temperature=2.0, max_steps=6, eval_interval=6)
    one = train(tmp_path / 'one', data, batch_size=4, **knobs)
    two = train(tmp_path / 'two', data, ranks=2, batch_size=2, activation_checkpointing='full',
                **knobs)
    keys = ('kd/loss', 'kd/teacher_loss', 'kd/teacher_agreement', 'train/loss', 'train/grad_norm')
    for step in range(6):
        for key in keys:
            assert two[step][key] == pytest.approx(one[step][key], rel=2e-5), (step, key)


def test_an_interrupted_cache_continues_and_two_ranks_make_the_same_bytes(
    tmp_path, taught, monkeypatch,
):
    data = tmp_path / 'data'
    teacher = taught[1]
    for name in 'ab':
        make_source(data, name)
    monkeypatch.setattr(kd, 'PART_TOKENS', 40 * 16)
    cache(data, teacher, 'full', k=8)
    calls = []
    records_of = kd.records_of

    class Interrupted(Exception):
        pass

    def interrupt(*arguments):
        calls.append(0)
        if len(calls) == 25:
            raise Interrupted
        return records_of(*arguments)

    def fill_disk(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(kd, 'records_of', interrupt)
    with pytest.raises(Interrupted):
        cache(data, teacher, 'parts', k=8)
    parts = sorted((data / 'a/kd/parts').glob('*.kd'))
    assert 0 < len(parts) < len(list((data / 'a/kd/full').glob('*.kd')))
    assert (data / 'a/kd/parts/part_000002.kd.0.tmp').exists()
    monkeypatch.setattr(kd, 'records_of', fill_disk)
    message = (r'part_000002.kd could not be written \(No space left on device\); the parts before '
               'it are complete')
    with pytest.raises(RunFault, match=message):
        cache(data, teacher, 'parts', k=8)
    monkeypatch.setattr(kd, 'records_of', records_of)
    with pytest.raises(BadInput, match='is incomplete: .*part_000002.kd is missing'):
        run_here(train_command(tmp_path / 'early', data, kd_cache='parts', sources={'a': 1.0}))
    before = parts[0].stat().st_mtime_ns
    for rank in range(2):
        monkeypatch.setenv('RANK', str(rank))
        monkeypatch.setenv('WORLD_SIZE', '2')
        cache(data, teacher, 'parts', k=8)
    assert parts[0].stat().st_mtime_ns == before
    for path in (data / 'a/kd/full').iterdir():
        assert (data / 'a/kd/parts' / path.name).read_bytes() == path.read_bytes(), path


# -- mistakes --------------------------------------------------------------------------------------


def test_mistakes_are_one_sentence(tmp_path, taught, trained):
    data = tmp_path / 'data'
    teacher = taught[1]
    for name in 'ab':
        make_source(data, name)
    cache(data, teacher, 'x', k=4)

    def refused(words, **knobs):
        knobs = {'sources': {'a': 1.0}, **knobs}
        with pytest.raises(BadInput, match=words):
            run_here(train_command(tmp_path / 'run', data, **knobs))

    refused('vocabulary of 265 rows, this run of 64. Set vocab_size = 265', teacher=trained)
    refused('kd_divergence = .* must be one of forward, reverse, js', teacher=teacher,
            kd_divergence='kl')
    refused('kd_alpha = 1.5 must be at least 0 and at most 1', teacher=teacher, kd_alpha=1.5)
    refused('does not exist. Run `kd.py cache --source=a --name=y`', kd_cache='y')
    refused('was made for temperature = 1.0, this run has 2.0', kd_cache='x', kd_temperature=2.0)
    refused('was made for block_size = 16, this run has 32', kd_cache='x', block_size=32)
    train(tmp_path / 'other', data, n_embd=48, ffn_dim=96, max_steps=1)
    refused('was made by another teacher .* than teacher = .*other', kd_cache='x',
            teacher=tmp_path / 'other')
    with pytest.raises(BadInput, match='cache that was made with other settings .k: 4, now 5'):
        cache(data, teacher, 'x', k=5)
    part = data / 'a/kd/x/part_000000.kd'
    part.write_bytes(part.read_bytes()[:-7])
    refused('part_000000.kd has .* bytes, not .*. Delete .* Run `kd.py cache', kd_cache='x')
    make_source(data, 'a', seed=1)
    refused('was made for shards = ', kd_cache='x')


def test_a_teacher_of_another_tokenizer_is_refused_by_both_names(tmp_path, trained):
    """`trained` is a model of 265 tokens. The shards have as many, of another tokenizer."""
    from lib.byte_level import DIGITS_PATTERN
    from lib.tokenizer import make_tokenizer
    from tests.test_sft import SPECIAL, write_chats
    ranks = {bytes([b]): 3 + b for b in range(256)}
    for pair in (b'ab', b'cd', b'ef', b'gh', b'ij', b'kl'):
        ranks[pair] = 3 + len(ranks)
    other = make_tokenizer('others', ranks, DIGITS_PATTERN, SPECIAL, '<|endoftext|>')
    chats = []
    for n in range(2, 30):
        answer = dict(role='assistant', content='words ' * n)
        chats.append([dict(role='user', content='abc'), answer])
    write_chats(tmp_path / 'data', 'chat', chats, tokenizer=other)
    knobs = dict(sources={'chat': 1.0}, vocab_size=265, packing='document', block_size=64,
                 total_batch_tokens=128, teacher=trained)
    message = (r'has the tokenizer .*trained.* \(\w{16}\), the shards have others \(\w{16}\): the '
               'two must have the same')
    with pytest.raises(BadInput, match=message):
        run_here(train_command(tmp_path / 'run', tmp_path / 'data', **knobs))


# -- damage ----------------------------------------------------------------------------------------


def edit_json(path, **changes):
    """Sets fields of a JSON file. None removes the field."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            del content[key]
        else:
            content[key] = value
    path.write_text(json.dumps(content))


def overwrite(path, at, content):
    with open(path, 'r+b') as f:
        f.seek(at)
        f.write(content)


@pytest.fixture(scope='module')
def spoilt(tmp_path_factory, taught):
    """(data folder with an intact cache 'x' of source 'a' in six parts, the folder of the cache).

    A test spoils a copy of it.
    """
    folder = tmp_path_factory.mktemp('spoilt')
    make_source(folder / 'data', 'a')
    patch = pytest.MonkeyPatch()
    patch.setattr(kd, 'PART_TOKENS', 40 * 16)
    kd.write_caches(kd.CacheConfig(
        teacher=str(taught[1]), data_dir=str(folder / 'data'), name='x', source='a', block_size=16,
        dtype='float32', k=4, draws=2))
    yield folder / 'data', folder / 'data/a/kd/x'
    patch.undo()


RECORD = kd.record_dtype(64, 4, 2).itemsize
PART = 'part_000002'


@pytest.mark.parametrize('spoil, words', [
    (lambda f: (f / 'cache.json').write_text('[]'), 'holds a list, not named fields'),
    (lambda f: (f / 'cache.json').write_text('{"k": 4'), 'no valid JSON'),
    (lambda f: edit_json(f / 'cache.json', shards=None), "has no field 'shards'"),
    (lambda f: edit_json(f / 'cache.json', k='four'), "k = 'four' must be int"),
    (lambda f: edit_json(f / 'cache.json', draws=True), 'draws = True must be int'),
    (lambda f: edit_json(f / 'cache.json', temperature=float('nan')), 'must be .* finite'),
    (lambda f: edit_json(f / 'cache.json', draws=-2), 'a number that is not possible'),
    (lambda f: edit_json(f / 'cache.json', k=3), 'is damaged: .*bytes, not'),
    (lambda f: edit_json(f / 'cache.json', tokenizer='0123'), 'was made for tokenizer = '),
    (lambda f: (f / f'{PART}.kd').unlink(), f'is incomplete: .*{PART}.kd is missing'),
    (lambda f: (f / f'{PART}.npy').unlink(), f'is incomplete: .*{PART}.npy is missing'),
    (lambda f: (f / f'{PART}.json').unlink(), f'is incomplete: .*{PART}.json is missing'),
    (lambda f: (f / f'{PART}.json').write_text('null'), f'is damaged: .*{PART}.json holds a None'),
    (lambda f: (f / f'{PART}.json').write_text('{".kd": 3, ".npy": 4}'), '.kd = 3 must be dict'),
    (lambda f: os.truncate(f / f'{PART}.kd', 1000), 'is damaged: .*has 1,000 bytes, not'),
    (lambda f: os.truncate(f / f'{PART}.npy', 100), 'is damaged: .*npy has 100 bytes, not'),
    (lambda f: overwrite(f / f'{PART}.kd', 0, bytes(40 * 16 * RECORD)), 'nothing but zeros'),
    (lambda f: overwrite(f / f'{PART}.kd', 20 * 16 * RECORD, bytes(4 * RECORD)), 'but zeros'),
    (lambda f: overwrite(f / f'{PART}.kd', (40 * 16 - 1) * RECORD, bytes(RECORD)), 'sum to'),
    (lambda f: overwrite(f / f'{PART}.kd', 0, b'\xff' * RECORD), 'holds token id 65535'),
    (lambda f: overwrite(f / f'{PART}.kd', 10 * RECORD, b'\x01\x02'), 'the sha256 of .*kd is not'),
    (lambda f: overwrite(f / f'{PART}.npy', 200, b'\x01\x02'), 'the sha256 of .*npy is not'),
])
def test_a_damaged_cache_is_refused_by_the_name_of_the_file(
    tmp_path, spoilt, monkeypatch, spoil, words,
):
    shutil.copytree(spoilt[0], tmp_path / 'data')
    folder = tmp_path / 'data/a/kd/x'
    monkeypatch.setattr(kd, 'PART_TOKENS', 40 * 16)
    assert kd.check_cache(str(folder)) == []
    spoil(folder)
    source = Source(tmp_path / 'data', 'a', 'train', 16, 0, 64)
    config = dict(
        data_dir=str(tmp_path / 'data'), kd_cache='x', vocab_size=64, kd_temperature=1.0,
        block_size=16, packing='window', document_mask=False, kd_divergence='forward', seed=1)
    with pytest.raises(BadInput, match=words) as error:
        kd.Cache(config, source, None)
    assert 'kd.py cache' in str(error.value) or 'restore or delete' in str(error.value)
    if 'tokenizer' not in words:
        assert kd.check_cache(str(folder))


def test_a_part_that_is_cut_off_while_a_run_reads_it_is_one_sentence(tmp_path, spoilt, monkeypatch):
    shutil.copytree(spoilt[0], tmp_path / 'data')
    folder = tmp_path / 'data/a/kd/x'
    monkeypatch.setattr(kd, 'PART_TOKENS', 40 * 16)
    source = Source(tmp_path / 'data', 'a', 'train', 16, 0, 64)
    config = dict(
        data_dir=str(tmp_path / 'data'), kd_cache='x', vocab_size=64, kd_temperature=1.0,
        block_size=16, packing='window', document_mask=False, kd_divergence='forward', seed=1)
    cache = kd.Cache(config, source, None)
    rows = np.empty(16, cache.record)
    cache.read(85, rows)                        # the sixth window of the third part
    expected = np.fromfile(folder / f'{PART}.kd', cache.record)[5 * 16:6 * 16]
    assert rows.tobytes() == expected.tobytes()
    os.truncate(folder / f'{PART}.kd', 5 * 16 * RECORD + 7)
    with pytest.raises(RunFault, match=f'{PART}.kd was cut off after this run began: window 85'):
        cache.read(85, rows)


def test_a_second_launch_is_refused_while_the_first_lives(tmp_path, taught, spoilt, monkeypatch):
    shutil.copytree(spoilt[0], tmp_path / 'data')
    folder = tmp_path / 'data/a/kd/x'
    monkeypatch.setattr(kd, 'PART_TOKENS', 40 * 16)
    (folder / f'{PART}.kd').write_bytes(b'')

    def again(source='a'):
        kd.write_caches(kd.CacheConfig(
            teacher=str(taught[1]), data_dir=str(tmp_path / 'data'), name='x', source=source,
            block_size=16, dtype='float32', k=4, draws=2))

    (folder / 'part_000001.kd.0.tmp').write_bytes(b'of a killed process')
    (folder / 'part_000001.kd.3.tmp').write_bytes(b'of a process that lives')
    with parts.lock(str(folder), 0):
        with pytest.raises(BadInput, match='another process is writing to .*kd/x'):
            again()
        assert (folder / f'{PART}.kd').stat().st_size == 0
        monkeypatch.setenv('RANK', '1')
        monkeypatch.setenv('WORLD_SIZE', '2')
        again()                                 # another rank of the first launch
        monkeypatch.delenv('RANK')
    assert (folder / f'{PART}.kd').stat().st_size == 0
    again()
    assert [path.name for path in folder.glob('*.tmp')] == ['part_000001.kd.3.tmp']
    assert kd.check_cache(str(folder)) == []
    for path in spoilt[1].iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path
    for source, words in (('a,a', "names 'a' twice"), ('a,', 'has an empty name')):
        with pytest.raises(BadInput, match=words):
            again(source)


def test_parts_of_an_older_version_are_checked_once_and_kept(
    tmp_path, taught, spoilt, monkeypatch, capsys,
):
    shutil.copytree(spoilt[0], tmp_path / 'data')
    folder = tmp_path / 'data/a/kd/x'
    monkeypatch.setattr(kd, 'PART_TOKENS', 40 * 16)
    for path in folder.glob('part_*.json'):
        path.unlink()
    edit_json(folder / 'cache.json', tokenizer=None)
    # Two writers have left a stretch of zeros that the few records of a part do not show.
    overwrite(folder / f'{PART}.kd', 10 * 16 * RECORD, bytes(16 * RECORD))
    before = (folder / 'part_000001.kd').stat().st_mtime_ns
    kd.write_caches(kd.CacheConfig(
        teacher=str(taught[1]), data_dir=str(tmp_path / 'data'), name='x', source='a',
        block_size=16, dtype='float32', k=4, draws=2))
    assert 'part_000001.kd is of a version that kept no sha256; it is intact' in (
        capsys.readouterr().out)
    assert (folder / 'part_000001.kd').stat().st_mtime_ns == before
    for path in spoilt[1].glob('part_*'):
        assert (folder / path.name).read_bytes() == path.read_bytes(), path
    made = json.loads((folder / 'cache.json').read_text())
    assert made == json.loads((spoilt[1] / 'cache.json').read_text())


@pytest.mark.parametrize('change, words', [
    (dict(name='a/b'), "name = 'a/b' must be the name of a folder"),
    (dict(name=''), "name = '' must be the name of a folder"),
    (dict(k=0, draws=0), 'store nothing of the teacher'),
    (dict(k=65), "more than the teacher's vocabulary of 64"),
    (dict(source='a,c'), "source 'c': .* does not exist"),
    (dict(teacher='none'), "'none' is neither a folder here"),
])
def test_mistakes_of_the_command_are_one_sentence(tmp_path, taught, change, words):
    make_source(tmp_path, 'a')
    config = kd.CacheConfig(
        teacher=str(taught[1]), data_dir=str(tmp_path), source='a', block_size=16, dtype='float32')
    with pytest.raises(BadInput, match=words):
        kd.write_caches(dataclasses.replace(config, **change))
    assert not (tmp_path / 'a/kd').exists()
