"""Every Triton kernel against fp64 autograd on plain formulas: on a GPU, or in a process of its own under Triton's interpreter; and compiled ahead of
time for GPUs that are not here."""
import os
import subprocess
import sys
import tempfile

import pytest
import torch
import torch.nn.functional as F

import kd
from influence import ghost_sqnorm, probe_direction, row_influence
from model import GPT, ModelConfig, init_weights
from ops import kernels
from ops import loss as loss_module
from ops.loss import linear_cross_entropy
from tests.conftest import metrics, run, train_command

DEVICE = torch.device('cuda' if torch.cuda.is_available() and not kernels.INTERPRETED else 'cpu')


def runs(test):
    reason = 'needs a GPU or the interpreter: test_every_kernel_under_the_interpreter runs it'
    return pytest.mark.gpu(pytest.mark.skipif(not kernels.INTERPRETED and DEVICE.type == 'cpu', reason=reason)(test))


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def poisoned_outputs_and_triton():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)                 # fills what torch.empty gives with NaN
    if kernels.INTERPRETED or DEVICE.type == 'cuda':
        kernels.use('triton', DEVICE)
    yield
    kernels.use('auto', DEVICE)
    torch.use_deterministic_algorithms(before)


def random(*shape, dtype=torch.float32, scale=1.0, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale).to(DEVICE, dtype).requires_grad_()


def doubles(*tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def assert_near(got, truth, dtype):
    assert got.shape == truth.shape and got.isfinite().all()
    assert (got.double() - truth).norm() <= TOLERANCE[dtype] * truth.norm() + 1e-12


def assert_same_gradients(outputs, truths, inputs, true_inputs, dtype):
    """Values, and gradients under an upstream gradient that is another for every element."""
    for got, truth in zip(outputs, truths):
        assert_near(got, truth, dtype)
    upstream = [random(*t.shape, seed=7 + i).detach() for i, t in enumerate(truths)]
    torch.autograd.backward(outputs, [u.to(o.dtype) for u, o in zip(upstream, outputs)])
    torch.autograd.backward(truths, [u.to(o.dtype).double() for u, o in zip(upstream, outputs)])
    for got, truth in zip(inputs, true_inputs):
        if got is not None:
            assert_near(got.grad, truth.grad, dtype)


def targets_of(n, vocab_size):
    targets = torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(n)).to(DEVICE)
    targets[::5] = -1
    return targets


# -- losses ------------------------------------------------------------------------------------------------------------

@runs
@pytest.mark.parametrize('dtype', list(TOLERANCE))
@pytest.mark.parametrize('V', [50, 4096, 5003])
def test_cross_entropy(monkeypatch, V, dtype):
    monkeypatch.setattr(loss_module, 'chunk_rows', lambda *_: 8)
    h, weight, targets = random(21, 24, dtype=dtype), random(V, 24, dtype=dtype, scale=0.3), targets_of(21, V)
    token_weights = torch.rand(21, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    h64, weight64 = doubles(h, weight)
    total, losses, hits = linear_cross_entropy(h, weight, targets, token_weights)
    z = h64 @ weight64.T
    truth = F.cross_entropy(z, targets, ignore_index=-1, reduction='none')
    (total * 3).backward()
    (truth * token_weights * 3).sum().backward()
    assert_near(total, (truth * token_weights).sum(), dtype)
    assert_near(losses, truth, dtype)
    if dtype == torch.float32:
        assert torch.equal(hits, (z.argmax(1) == targets) & (targets >= 0))
    assert_near(h.grad, h64.grad, dtype)
    assert_near(weight.grad, weight64.grad, dtype)
    with torch.no_grad():                                                    # an evaluation: no gradient is made
        again = linear_cross_entropy(h, weight, targets, token_weights)
    assert torch.equal(again[1], losses) and torch.equal(again[2], hits)


@runs
@pytest.mark.parametrize('dtype', list(TOLERANCE))
def test_cross_entropy_over_parts_of_the_vocabulary(dtype):
    logits, targets = random(6, 1003, dtype=dtype, scale=3).detach(), torch.tensor([0, 399, 400, 1002, 7, 600], device=DEVICE)
    z = logits.double()
    parts, firsts = [p.contiguous() for p in logits.split([400, 603], 1)], (0, 400)
    found = [kernels.softmax_statistics(part, targets - first) for part, first in zip(parts, firsts)]
    lse = torch.logsumexp(torch.stack([f[0] for f in found]), 0)
    assert_near(lse, z.logsumexp(1), dtype)
    assert torch.equal(torch.stack([f[1] for f in found]).amax(0).double(), z.amax(1))
    assert torch.equal(torch.stack([f[2] for f in found]).amax(0).double(), z.gather(1, targets[:, None])[:, 0])
    for part, first in zip(parts, firsts):
        kernels.softmax_gradient_from_(part, targets - first, lse)
    assert_near(torch.cat(parts, 1), z.softmax(1) - F.one_hot(targets, 1003), dtype)


def random_cache(n, vocab_size):
    """Top 5 and 4 draws of random teachers; the draws repeat themselves and the ids."""
    q = (random(n, vocab_size, scale=2, seed=3).detach().cpu()).log_softmax(1)
    top = q.topk(5, 1)
    drawn = torch.randint(vocab_size, (n, 4), generator=torch.Generator().manual_seed(2))
    drawn[:, 1], drawn[:, 3] = drawn[:, 0], top.indices[:, 2]
    cached = kd.Cached(top.indices, top.values, (1 - top.values.exp().sum(1)).log(), drawn, (q.exp() * q).sum(1), top.indices[:, 0], q[:, 0].clone(),
                       torch.zeros(n, dtype=torch.long), None)
    return kd.Cached(*(None if t is None else t.to(DEVICE) for t in vars(cached).values()))


@runs
@pytest.mark.parametrize('dtype', list(TOLERANCE))
@pytest.mark.parametrize('kind, alpha, temperature', [('forward', 1.0, 1.0), ('forward', 0.3, 2.0), ('reverse', 0.7, 0.5), ('js', 0.3, 4.0), ('js', 1.0, 1.0),
                                                      ('cached', 1.0, 1.0), ('cached', 0.3, 2.0)])
def test_distillation(monkeypatch, kind, alpha, temperature, dtype):
    monkeypatch.setattr(kd, 'kd_chunk_rows', lambda *_: 8)
    n, V = 13, 2500
    h, weight, targets = random(n, 24, dtype=dtype), random(V, 24, dtype=dtype, scale=0.3), targets_of(n, V)
    teacher = random(n, 32, dtype=dtype, seed=1).detach(), random(V, 32, dtype=dtype, scale=0.3, seed=1).detach()
    h64, weight64 = doubles(h, weight)
    z = h64 @ weight64.T
    lp = (z / temperature).log_softmax(1)
    if kind == 'cached':
        teacher = random_cache(n, V)
        ids, mass = teacher.outcomes()
        d = teacher.negentropy.double() - (mass.double() * lp.gather(1, ids)).sum(1)
        their_loss, agrees = -teacher.target_logq, z.argmax(1) == teacher.top
    else:
        y = teacher[0].double() @ teacher[1].double().T
        lq = (y / temperature).log_softmax(1)
        lm = torch.logaddexp(lp, lq) - torch.tensor(2.0).double().log()
        kl = [F.kl_div(b, a, reduction='none', log_target=True).sum(1) for a, b in ((lq, lp), (lp, lq), (lq, lm), (lp, lm))]
        d = {'forward': kl[0], 'reverse': kl[1], 'js': (kl[2] + kl[3]) / 2}[kind]
        their_loss, agrees = F.cross_entropy(y, targets, ignore_index=-1, reduction='none'), z.argmax(1) == y.argmax(1)
    ce, counted = F.cross_entropy(z, targets, ignore_index=-1, reduction='none'), targets >= 0
    truth = (alpha * temperature**2 * d + (1 - alpha) * ce)[counted].sum()
    total, found = kd.distillation_loss(h, weight, targets, teacher=teacher, alpha=alpha, temperature=temperature,
                                        kind='forward' if kind == 'cached' else kind)
    (total * 0.5).backward()
    (truth * 0.5).backward()
    assert_near(total, truth, dtype)
    for got, true in zip(found, (d, ce, None, their_loss)):
        if true is not None:
            assert_near(got, true.double() * counted, dtype)
    if dtype == torch.float32:
        assert torch.equal(found[2].bool(), (z.argmax(1) == targets) & counted) and torch.equal(found[4].bool(), agrees & counted)
    assert_near(h.grad, h64.grad, dtype)
    assert_near(weight.grad, weight64.grad, dtype)


# -- layers ------------------------------------------------------------------------------------------------------------

@runs
@pytest.mark.parametrize('dtype', list(TOLERANCE))
@pytest.mark.parametrize('shape', [(2, 5, 40), (3, 3), (11, 8), (3, 576)])
def test_norm_and_residual(monkeypatch, shape, dtype):
    monkeypatch.setattr(kernels, 'PROGRAMS', 4)
    x, residual, weight = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1), random(shape[-1])
    x64, residual64, weight64 = doubles(x, residual, weight)

    def norm(t):
        return t / (t.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight64
    total64 = x64 + residual64
    got, total = kernels.add_rms_norm(x, residual, weight, 1e-5)
    assert_same_gradients((got, total), (norm(total64), total64), (x, residual, weight), (x64, residual64, weight64), dtype)
    x.grad = weight.grad = x64.grad = weight64.grad = None
    assert_same_gradients((kernels.rms_norm(x, weight, 1e-5),), (norm(x64),), (x, weight), (x64, weight64), dtype)


@runs
@pytest.mark.parametrize('dtype', list(TOLERANCE))
@pytest.mark.parametrize('norm, has_weight', [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize('H, K, D', [(3, 1, 20), (4, 2, 16)])
def test_rotated_heads(H, K, D, norm, has_weight, dtype):
    q, k = random(2, 5, H, D, dtype=dtype), random(2, 5, K, D, dtype=dtype, seed=1)
    wq, wk = (random(D, seed=2), random(D, seed=3)) if has_weight else (None, None)
    angles = torch.arange(5)[:, None] / 3 ** torch.arange(D // 2)
    cos, sin = angles.cos().to(DEVICE), angles.sin().to(DEVICE)
    got = kernels.rotate_heads(q, k, torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1), norm, wq, wk, 1e-6)
    q64, k64, wq64, wk64 = doubles(q, k, wq, wk)

    def truth(x, weight):
        if norm:
            x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 if weight is None else weight)
        turned = torch.complex(x[..., :D // 2], x[..., D // 2:]) * torch.polar(torch.ones_like(angles).double(), angles.double()).to(DEVICE)[:, None]
        return torch.cat((turned.real, turned.imag), -1)
    assert_same_gradients(got, (truth(q64, wq64), truth(k64, wk64)), (q, k, wq, wk), (q64, k64, wq64, wk64), dtype)


@runs
@pytest.mark.parametrize('dtype', list(TOLERANCE))
@pytest.mark.parametrize('n', [7, 4099])
def test_swiglu(n, dtype):
    gate, up = random(n, dtype=dtype, scale=4), random(n, dtype=dtype, seed=1)
    gate64, up64 = doubles(gate, up)
    assert_same_gradients((kernels.swiglu(gate, up),), (gate64 * gate64.sigmoid() * up64,), (gate, up), (gate64, up64), dtype)


# -- gradients of rows -------------------------------------------------------------------------------------------------

@runs
@pytest.mark.parametrize('dtype', list(TOLERANCE))
@pytest.mark.parametrize('T, I, O', [(5, 70, 33), (70, 100, 130), (130, 40, 20)])
def test_gradients_of_rows(T, I, O, dtype):
    a, g, v = (random(*shape, dtype=dtype).detach() for shape in ((2, T, I), (2, T, O), (O, I)))
    a64, g64, v64 = a.double(), g.double(), v.double()
    assert_near(kernels.row_sqnorms(a, g), (g64.transpose(1, 2) @ a64).square().sum((1, 2)), dtype)
    got, truth = kernels.bilinear(a, g, v), (g64 * (a64 @ v64.T)).sum(2)
    assert_near(got, truth, dtype)


# -- the model ---------------------------------------------------------------------------------------------------------

SMALL = dict(vocab_size=67, n_layer=2, n_head=2, n_kv_head=1, n_embd=16, ffn_dim=24, head_dim=8)


def small_model(**changes):
    model = GPT(ModelConfig(**SMALL | changes)).to(DEVICE)
    init_weights(model, 0)
    return model


def small_batch():
    idx = torch.randint(67, (2, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets = idx.roll(-1, 1).clone()
    targets[0, :6] = -1
    return idx, targets, None


@runs
@pytest.mark.parametrize('changes', [dict(), dict(qk_norm=True), dict(qk_norm=True, qk_norm_weight=False, tie_embeddings=False), dict(qkv_bias=True)])
def test_model_with_kernels_equals_model_without(changes):
    gradients = []
    for mode in ('torch', 'triton'):
        kernels.use(mode, DEVICE)
        model, (idx, targets, _) = small_model(**changes), small_batch()
        total, losses, hits = model.loss(idx, targets)
        (total / 7).backward()
        gradients.append([total.detach()[None], losses.flatten(), *(p.grad.flatten() for p in model.parameters())])
    for ours, theirs in zip(*gradients):
        assert_near(theirs, ours.double(), torch.float32)


@runs
def test_influence_with_kernels_equals_influence_without():
    model, batch = small_model(qk_norm=True), small_batch()
    found = []
    for mode in ('torch', 'triton'):
        kernels.use(mode, DEVICE)
        direction = probe_direction(model, {'x': [small_batch(), (small_batch()[0].flip(1), small_batch()[1], None), small_batch()]}, 'all')
        found.append([row_influence(model, batch, direction)[0], ghost_sqnorm(model, batch, 'all')])
    for ours, theirs in zip(*found):
        assert_near(theirs, ours, torch.float32)


@runs
def test_compiled_graphs_pass_through_the_operators():
    model, (idx, targets, _) = small_model(qk_norm=True), small_batch()
    eager = model.loss(idx, targets)[0]
    for block in model.blocks:
        block.compile(fullgraph=True, backend='aot_eager')
    compiled = model.loss(idx, targets)[0]
    assert torch.equal(eager, compiled)
    compiled.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# -- without a GPU -----------------------------------------------------------------------------------------------------

@pytest.mark.skipif(kernels.INTERPRETED or kernels.triton is None, reason='this is the inner process, or there is no Triton')
def test_every_kernel_under_the_interpreter():
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-n0', '-p', 'no:cacheprovider', __file__], capture_output=True, text=True,
                          env={**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stdout[-4000:]
    assert ' passed' in done.stdout and 'failed' not in done.stdout


@pytest.mark.skipif(kernels.INTERPRETED or kernels.triton is None, reason='this is the inner process, or there is no Triton')
def test_two_ranks_train_the_same_with_kernels_and_without(tmp_path, tiny_data):
    found = {}
    for mode in ('torch', 'triton'):
        done = run(train_command(tmp_path / mode, tiny_data, ranks=2, kernels=mode, n_layer=1, qk_norm=True, max_steps=4, save_interval=4, eval_interval=4),
                   TRITON_INTERPRET='1')
        assert done.returncode == 0 and f'kernels: {mode}' in done.stdout, done.stderr
        found[mode] = metrics(tmp_path / mode)
    for step in range(4):
        for name in ('train/loss', 'train/grad_norm'):
            assert found['triton'][step][name] == pytest.approx(found['torch'][step][name], rel=1e-6)
    assert found['triton'][4]['val/loss'] == pytest.approx(found['torch'][4]['val/loss'], rel=1e-6) and found['triton'][3]['train/loss'] < found['triton'][0]['train/loss']


BF16, FP32, INT, FLOAT, IDS = '*bf16', '*fp32', 'i32', 'fp32', '*i64'
KERNELS = {        # arguments in order, constants at training shapes, warps
    'cross_entropy_kernel': ([BF16, IDS, FP32, FP32, '*i1', FP32, INT], dict(STATISTICS=True, GRADIENT=True, BLOCK=4096), 8),
    'divergence_kernel': ([BF16, BF16, IDS, FP32, INT, INT, FLOAT, FLOAT], dict(KIND=2, SOFT=True, BLOCK=2048), 8),
    'cached_kernel': ([BF16, IDS, FP32, IDS, FP32, '*i32', INT, INT, INT, FLOAT, FLOAT], dict(SOFT=True, BLOCK=4096, BLOCK_W=128), 16),
    'rms_norm_kernel': ([BF16, BF16, FP32, BF16, BF16, INT, FLOAT], dict(ADD=True, BLOCK=2048), 8),
    'rms_norm_backward_kernel': ([BF16, FP32, BF16, BF16, BF16, FP32, INT, INT, FLOAT, INT], dict(ADD=True, BLOCK=2048), 8),
    'rotate_kernel': ([BF16, BF16, FP32, FP32, BF16, BF16, BF16, BF16, INT, INT, INT, INT, FLOAT],
                      dict(NORM=True, WEIGHT=True, BLOCK_H=32, BLOCK_K=8, BLOCK_D=32), 4),
    'rotate_backward_kernel': ([BF16, BF16, FP32, FP32, BF16, BF16, BF16, BF16, BF16, BF16, FP32, INT, INT, INT, INT, FLOAT],
                               dict(NORM=True, WEIGHT=True, BLOCK_H=32, BLOCK_K=8, BLOCK_D=32), 4),
    'swiglu_kernel': ([BF16, BF16, BF16, INT], dict(BLOCK=2048), 8),
    'swiglu_backward_kernel': ([BF16, BF16, BF16, BF16, BF16, INT], dict(BLOCK=2048), 8),
    'bilinear_kernel': ([BF16, BF16, BF16, FP32, INT, INT, INT], dict(ROWS=64, BLOCK_O=64, BLOCK_I=64), 4),
    'position_pairs_kernel': ([BF16, BF16, FP32, INT, INT, INT, INT], dict(BLOCK_T=64, BLOCK=64), 4),
    'gradient_tiles_kernel': ([BF16, BF16, FP32, INT, INT, INT, INT], dict(BLOCK_O=64, BLOCK_I=64, BLOCK_T=64), 4)}


@pytest.mark.skipif(kernels.INTERPRETED or kernels.triton is None, reason='needs Triton, not interpreted')
def test_every_kernel_is_in_the_table():
    assert {name for name in vars(kernels) if name.endswith('_kernel')} == set(KERNELS)


@pytest.mark.skipif(kernels.INTERPRETED or kernels.triton is None, reason='needs Triton, not interpreted')
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('name', KERNELS)
def test_kernels_compile_for_ampere_and_hopper(name, aligned):
    # sizes and addresses that are multiples of 16, and any: then rows' products may spill, which costs speed alone
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    types, constants, warps = KERNELS[name]
    function = getattr(kernels, name)
    names = function.arg_names
    signature = dict(zip(names, types + ['constexpr'] * len(constants)))
    attrs = {(i,): [['tt.divisibility', 16]] for i, t in enumerate(types) if t != FLOAT} if aligned else {}
    source = ASTSource(function, signature, {(names.index(c),): value for c, value in constants.items()}, attrs)
    for capability in (80, 90):
        compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=dict(num_warps=warps))
        assert compiled.metadata.shared <= 64 * 1024
        with tempfile.NamedTemporaryFile(suffix='.cubin') as f:
            f.write(compiled.asm['cubin'])
            f.flush()
            dump = subprocess.run([os.path.join(os.path.dirname(nvidia.__file__), 'bin', 'cuobjdump'), '--dump-resource-usage', f.name], text=True,
                                  capture_output=True, check=True).stdout
        used = dict(part.split(':')[:2] for part in dump[dump.index('REG:'):].split() if part[:3] in ('REG', 'STA'))
        assert int(used['REG']) * 32 * warps <= 65536                          # at least one block fits into a multiprocessor
        assert int(used['STACK']) <= (16 if aligned else 512)                  # bytes spilled to memory, a thread
        if ' dot(' in function.src and aligned and capability == 90:
            assert 'wgmma' in compiled.asm['ptx']


def test_triton_where_it_cannot_be_is_one_sentence(monkeypatch):
    cpu = torch.device('cpu')
    monkeypatch.setattr(kernels, 'INTERPRETED', False)
    with pytest.raises(kernels.BadInput, match='needs a CUDA device'):
        kernels.use('triton', cpu)
    with pytest.raises(kernels.BadInput, match='must be one of'):
        kernels.use('cuda', cpu)
    monkeypatch.setattr(kernels, 'MISSING', 'Triton is not installed')
    with pytest.raises(kernels.BadInput, match='not installed'):
        kernels.use('triton', torch.device('cuda'))
    assert 'not installed' in kernels.use('auto', torch.device('cuda')) and kernels.use('auto', cpu) == 'torch'
