"""Attention in bf16 by blocks on a CPU against fp64, and the choice of kernels on a GPU."""
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, varlen

from configurator import BadInput
from ops import attention
from ops.attention import attend, blockwise, document_boundaries, suits_blocks


def by_torch(q, k, v):
    heads = [t.transpose(1, 2) for t in (q, k, v)]  # (B, H or K, T, D)
    y = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2)


def results(function, inputs, upstream):
    """[y, dq, dk, dv] of an attention function."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]


def errors(found, truth):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True)]


def make_inputs(B, T, H, K, D, largest, dtype=torch.bfloat16, device='cpu'):
    """Random [q, k, v], whose scores have the standard deviation `largest`, and dy."""
    torch.manual_seed(T + H)
    inputs = [torch.randn(B, T, heads, D) for heads in (H, K, K, H)]
    inputs[0] *= largest
    *inputs, upstream = [t.to(dtype).to(device) for t in inputs]
    return inputs, upstream


# Scores of standard deviation 1 are spread over many keys. At 30 one key takes nearly all.
CASES = [
    (2, 100, 6, 2, 32, 1.0),
    (3, 257, 4, 4, 64, 6.0),
    (2, 200, 4, 1, 64, 30.0),
    (1, 320, 3, 3, 16, 0.1),
    (2, 150, 6, 3, 24, 3.0)]


@pytest.mark.parametrize('B, T, H, K, D, largest', CASES)
def test_bf16_blocks_are_about_as_exact_as_torch(B, T, H, K, D, largest, monkeypatch):
    # Torch keeps scores, softmax and log-sum-exp in fp32. So do the blocks, or they would be up to
    # 40 times less exact. Both round probabilities and gradients of scores to bf16. The rows are
    # taken in two groups.
    monkeypatch.setattr(attention, 'GROUP', (B + 1) // 2 * H * 64 * T)
    inputs, upstream = make_inputs(B, T, H, K, D, largest)
    truth = results(by_torch, [t.double() for t in inputs], upstream.double())
    ours = errors(results(lambda *t: blockwise(*t)[0], inputs, upstream), truth)
    of_torch = errors(results(by_torch, inputs, upstream), truth)
    for name, error, other in zip(('y', 'dq', 'dk', 'dv'), ours, of_torch, strict=True):
        assert error < 1.35 * other, (name, error, other)


@pytest.mark.parametrize('largest', [1.0, 30.0])
def test_log_sum_exp_of_bf16_blocks_is_fp32(largest):
    (q, k, v), _ = make_inputs(2, 150, 4, 2, 64, largest)
    lse = blockwise(q, k, v)[1]
    assert lse.dtype == torch.float32
    k = k.repeat_interleave(2, 2)
    scores = torch.einsum('bthd,bshd->bths', q.double(), k.double()) / 8
    later = torch.ones(150, 150).triu(1).bool()[:, None]
    truth = scores.masked_fill(later, -math.inf).logsumexp(3)
    assert (lse - truth).abs().max() < 1e-6 * truth.abs().max()


def test_bf16_blocks_are_the_same_in_every_mode_and_traceable(monkeypatch):
    monkeypatch.setattr(attention, 'HAS_AMX', False)
    inputs, upstream = make_inputs(2, 130, 4, 2, 16, 1.0)
    assert suits_blocks(inputs[0], 130)
    with torch.no_grad():
        without = attend(*inputs)
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.equal(attend(*inputs), without)
    grads = torch.autograd.grad(attend(*inputs), inputs, upstream)
    with torch.autocast('cpu', torch.bfloat16):
        y = attend(*inputs)
        again = torch.autograd.grad(y, inputs, upstream)
    assert torch.equal(y, without)
    for a, b in zip(again, grads, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(without, blockwise(*inputs)[0])
    checks = ('test_schema', 'test_faketensor', 'test_autograd_registration')
    torch.library.opcheck(torch.ops.cheapertraining.blockwise, inputs, test_utils=checks)
    y, lse = blockwise(*inputs)
    arguments = (*inputs, y, lse, torch.randn_like(y))
    arguments = [t.detach() for t in arguments]
    torch.library.opcheck(
        torch.ops.cheapertraining.blockwise_backward, arguments, test_utils=checks[:2])


def test_bf16_documents_are_about_as_exact_as_torch(monkeypatch):
    monkeypatch.setattr(attention, 'HAS_AMX', False)
    # The second document is long enough for blocks, the first and the third are not.
    ids = torch.tensor([[0] * 20 + [1] * 150, [2] * 10 + [3] * 160])
    boundaries = document_boundaries(ids)
    inputs, upstream = make_inputs(2, 170, 4, 2, 32, 3.0)

    def by_mask(q, k, v):
        mask = (ids[:, None, :, None] == ids[:, None, None, :]).tril()  # (B, 1, T, T)
        heads = [t.transpose(1, 2) for t in (q, k, v)]
        y = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
        return y.transpose(1, 2)

    truth = results(by_mask, [t.double() for t in inputs], upstream.double())
    ours = errors(
        results(lambda *t: attend(*t, cu_seqlens=boundaries), inputs, upstream), truth)
    of_torch = errors(results(by_mask, inputs, upstream), truth)
    for name, error, other in zip(('y', 'dq', 'dk', 'dv'), ours, of_torch, strict=True):
        assert error < 1.35 * other, (name, error, other)


def test_key_heads_are_repeated_where_torch_does_not_share_them(monkeypatch):
    inputs, upstream = make_inputs(2, 40, 4, 2, 16, 1.0, torch.float64)
    shared = results(attend, inputs, upstream)
    assert attention.takes_shared_keys('cpu', torch.float32)
    assert attention.takes_shared_keys('cuda', torch.bfloat16)
    assert not attention.takes_shared_keys('cuda', torch.float32)
    assert not attention.takes_shared_keys('mps', torch.float32)
    monkeypatch.setattr(attention, 'takes_shared_keys', lambda device_type, dtype: False)
    for a, b in zip(results(attend, inputs, upstream), shared, strict=True):
        assert (a - b).abs().max() < 1e-13 * b.abs().max()


# -- kernels of a GPU ------------------------------------------------------------------------------

CPU = torch.device('cpu')
CUDA = torch.device('cuda')


@pytest.fixture
def order():
    """Restores torch's order of kernels after a test that sets it."""
    before = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
    yield
    torch.nn.attention._sdpa_kernel(before, set_priority=True)


@pytest.fixture
def gpu(monkeypatch, order):
    """Makes a GPU known: gpu(capability, cuDNN's version, kernels that can run)."""

    def there_is(major, version, able=('cudnn', 'flash', 'memory-efficient', 'math')):
        names = {
            SDPBackend.CUDNN_ATTENTION: 'cudnn', SDPBackend.FLASH_ATTENTION: 'flash',
            SDPBackend.EFFICIENT_ATTENTION: 'memory-efficient', SDPBackend.MATH: 'math'}

        def cudnn_version():
            if version == 'hidden':
                raise RuntimeError('cuDNN version incompatibility')
            return version

        def chosen(device, dtype, head_dim):
            enabled = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
            return next(names[b] for b in enabled if names[b] in able)

        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (major, 0))
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'a GPU')
        monkeypatch.setattr(torch.backends.cudnn, 'version', cudnn_version)
        monkeypatch.setattr(attention, 'chosen_backend', chosen)
        monkeypatch.setattr(attention, 'try_out', lambda *arguments: None)

    return there_is


def test_attention_of_a_gpu_is_refused_on_a_cpu():
    assert attention.use('auto', CPU) == 'torch'
    for name in ('cudnn', 'flash', 'fa3', 'fa4'):
        with pytest.raises(BadInput, match=f"attention = '{name}' needs a CUDA device"):
            attention.use(name, CPU)
    with pytest.raises(BadInput, match="'flash2' must be one of auto, cudnn, flash"):
        attention.use('flash2', CPU)


IN_FP32 = ('memory-efficient', 'math')


@pytest.mark.parametrize('major, version, able, expected', [
    (9, 91501, None, 'cuDNN 9.15.1, flash 2 within documents'),
    (10, 92200, None, 'cuDNN 9.22.0, flash 2 within documents'),
    (9, 91002, None, r'flash 2 \(cuDNN 9.10.2 is older than 9.15.1, look whether LD_LIBRARY_PATH'),
    (9, 'hidden', None, r'flash 2 \(another cuDNN hides that of torch'),
    (9, None, None, r'flash 2 \(this torch has no cuDNN\)'),
    (8, 91700, None, 'flash 2$'),
    (9, 91700, ('flash',), r'flash 2 \(cuDNN does not take head_dim = 80\)'),
    (9, 91700, IN_FP32, 'memory-efficient$')])
def test_auto_takes_cudnn_where_it_is_sound_and_says_why_not(gpu, major, version, able, expected):
    gpu(major, version, *([able] if able else []))
    assert re.match(expected, attention.use('auto', CUDA, torch.bfloat16, 80))


def test_kernels_that_are_asked_for_run_or_are_an_error(gpu, monkeypatch):
    gpu(9, 91700)
    assert attention.use('cudnn', CUDA) == 'cuDNN 9.17.0, flash 2 within documents'
    assert torch.backends.cuda.flash_sdp_enabled()
    # Torch puts cuDNN first at its first call, so it must be off.
    assert attention.use('flash', CUDA) == 'flash 2'
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.backends.cuda.math_sdp_enabled()
    assert attention.use('auto', CUDA).startswith('cuDNN')
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(BadInput, match="attention = 'flash' needs dtype=bfloat16"):
        attention.use('flash', CUDA, torch.float32)
    gpu(8, 91002)
    with pytest.raises(BadInput, match='cuDNN 9.10.2 is older'):
        attention.use('cudnn', CUDA)
    gpu(9, 91700, ('memory-efficient',))
    for name in ('cudnn', 'flash'):
        with pytest.raises(BadInput, match='torch cannot use it for head_dim = 72 in torch.bf'):
            attention.use(name, CUDA, torch.bfloat16, 72)


def test_packages_of_flash_attention_are_activated_or_named(gpu, monkeypatch):
    gpu(9, 91700)
    for name, package in (('fa3', 'flash-attn-3 --extra-index-url'), ('fa4', 'flash-attn-4,')):
        with pytest.raises(BadInput, match=f'pip install {package}'):
            attention.use(name, CUDA)
    active = []
    known = torch.nn.attention
    monkeypatch.setattr(known, 'activate_flash_attention_impl', active.append)
    monkeypatch.setattr(known, 'current_flash_attention_impl', lambda: (active or [None])[-1])
    monkeypatch.setattr(known, 'restore_flash_attention_impl', active.clear)
    assert attention.use('fa4', CUDA) == 'flash 4'
    assert active == ['FA4']
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert attention.use('auto', CUDA).startswith('cuDNN')
    assert not active
    gpu(10, 91700)
    assert attention.use('fa4', CUDA) == 'flash 4'
    with pytest.raises(BadInput, match=r"'fa3' has no kernels for GPUs of compute capability 10.x"):
        attention.use('fa3', CUDA)
    # torch 2.9 knows no other kernels, 2.11 only one.
    gpu(9, 91700)
    monkeypatch.setattr(known, 'list_flash_attention_impls', lambda: ['FA4'])
    with pytest.raises(BadInput, match='cannot use FA3'):
        attention.use('fa3', CUDA)
    monkeypatch.delattr(known, 'list_flash_attention_impls')
    with pytest.raises(BadInput, match='cannot use FA4'):
        attention.use('fa4', CUDA)


def test_kernels_that_fail_are_an_error_before_the_run(monkeypatch):
    def fail(*heads, cu_seqlens):
        raise TypeError("_flash_attn_fwd() got an unexpected keyword argument 'out'")

    monkeypatch.setattr(attention, 'attend', fail)
    with pytest.raises(BadInput, match=r"'fa4' fails for head_dim = 64 .*argument 'out'"):
        attention.try_out("attention = 'fa4'", CPU, torch.bfloat16, 64)


def test_torch_takes_the_order_that_is_set(order):
    attention.set_order(True)
    cudnn, flash, efficient, math_ = (int(b) for b in (
        SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH))
    assert torch._C._get_sdp_priority_order()[:4] == [cudnn, flash, efficient, math_]
    assert attention.chosen_backend(CPU, torch.bfloat16, 64) == 'flash'
    torch.backends.cuda.enable_flash_sdp(False)
    assert attention.chosen_backend(CPU, torch.bfloat16, 64) == 'math'


def test_documents_on_a_gpu_share_key_heads_where_torch_can(monkeypatch):
    seen = []

    def of_today(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        seen.append((tuple(k.shape), window_size, enable_gqa))
        return torch.empty_like(q)

    def of_former_times(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):
        seen.append((tuple(k.shape), is_causal))
        return torch.empty_like(q)

    for function in (of_today, of_former_times):
        monkeypatch.setattr(varlen, 'varlen_attn', function)
        with FakeTensorMode():
            q, k, v = [torch.empty(2, 8, h, 16, device='cuda') for h in (4, 2, 2)]
            boundaries = torch.zeros(4, dtype=torch.int32, device='cuda')
            assert attend(q, k, v, cu_seqlens=boundaries).shape == q.shape
    assert seen == [((16, 2, 16), (-1, 0), True), ((16, 4, 16), True)]
    # A compiled block must not break here.
    q, k, v = [torch.randn(2, 8, h, 16) for h in (4, 2, 2)]
    compiled = torch.compile(attention.attend_documents, backend='eager', fullgraph=True)
    assert compiled(q, k, v, torch.zeros(4, dtype=torch.int32)).shape == q.shape
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device here')
@pytest.mark.parametrize('name', ['cudnn', 'flash', 'fa3', 'fa4'])
def test_kernels_of_a_gpu_equal_fp64(name):
    try:
        attention.use(name, CUDA)
    except BadInput as error:
        pytest.skip(str(error))
    ids = torch.tensor([[0] * 20 + [1] * 236, [2] * 100 + [3] * 156], device=CUDA)
    same = ids[:, None, :, None] == ids[:, None, None, :]  # (B, 1, T, T)
    masks = {None: torch.ones_like(same).tril(), document_boundaries(ids): same.tril()}
    compiled = torch.compile(attend, fullgraph=True)
    try:
        for K in (2, 6):
            inputs, upstream = make_inputs(2, 256, 6, K, 64, 3.0, device=CUDA)
            exact = [t.double() for t in inputs]
            for boundaries, mask in masks.items():
                truth = results(
                    lambda *t, mask=mask: attend(*t, mask=mask), exact, upstream.double())
                for function in (attend, compiled):

                    def run(*t, function=function, boundaries=boundaries):
                        return function(*t, cu_seqlens=boundaries)

                    with torch.profiler.profile() as profiled:
                        found = results(run, inputs, upstream)
                    assert max(errors(found, truth)) < 0.01
                    names = ' '.join(event.key.lower() for event in profiled.key_averages())
                    by_cudnn = name == 'cudnn' and boundaries is None
                    assert ('cudnn' in names) == by_cudnn
                    assert by_cudnn or 'flash' in names
    finally:
        attention.use('auto', CUDA)
        torch._dynamo.reset()
