"""Products in fp8 against fp64 products of operands that are rounded here, as the formats say.

The CPU multiplies fp8 as well, so all but the last tests run without a GPU.
"""
import copy

import pytest
import torch

from configurator import BadInput
from influence import row_pass
from lib.device import DeviceConfig
from lib.parallel import prepare_blocks
from model import GPT, ModelConfig, init_weights
from ops import fp8
from ops.fp8 import Fp8Linear, convert_layers
from tests.conftest import run_here, train_command

# bits of the mantissa, smallest exponent of a normal number, largest number
E4M3 = (3, -6, 448.0)
E5M2 = (2, -14, 57344.0)
SIZES = dict(
    vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, ffn_dim=48, rope_theta=1e4)


def rounded(x, form):
    """x in fp64 as an fp8 format with one scale holds it (OCP OFP8 specification, section 5)."""
    n_bits, least, largest = form
    scale = x.double().abs().max() / largest
    y = x.double() / scale
    exponent = y.abs().clamp(min=2.0**least).log2().floor()
    step = 2.0 ** (exponent - n_bits)
    return torch.round(y / step) * step * scale


def linear(n_in=48, n_out=32, bias=False, seed=0):
    torch.manual_seed(seed)
    layer = torch.nn.Linear(n_in, n_out, bias=bias)
    layer.__class__ = Fp8Linear
    return layer


def error(got, truth):
    return ((got.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize('N', [64, 37])             # 37 rows are padded
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_products_equal_those_of_rounded_operands(N, dtype):
    layer = linear().to(dtype)
    x = torch.randn(N, 48).bfloat16().requires_grad_()
    g = (torch.randn(N, 32) * 0.01).bfloat16()
    y = layer(x)
    y.backward(g)
    x64 = rounded(x.detach(), E4M3)
    weight64 = rounded(layer.weight.detach(), E4M3)
    g64 = rounded(g, E5M2)
    assert y.dtype == x.grad.dtype == torch.bfloat16 and layer.weight.grad.dtype == dtype
    # Results in bf16 are off by 2e-3, sums in fp32 by less than 1e-6.
    assert error(y, x64 @ weight64.T) < 3e-3
    assert error(x.grad, g64 @ weight64) < 3e-3
    assert error(layer.weight.grad, g64.T @ x64) < (1e-5 if dtype == torch.float32 else 3e-3)
    # The true products are as far away as two operands with 3 or 2 bits of mantissa.
    weight = layer.weight.detach().double()
    assert 0.01 < error(y, x.detach().double() @ weight.T) < 0.05
    assert 0.02 < error(x.grad, g.double() @ weight) < 0.09
    assert 0.02 < error(layer.weight.grad, g.double().T @ x.detach().double()) < 0.09


def test_a_bias_is_added_and_leading_dimensions_stay():
    layer = linear(bias=True)
    x = torch.randn(2, 5, 48).bfloat16()
    y = layer(x)
    assert y.shape == (2, 5, 32)
    expected = rounded(x, E4M3) @ rounded(layer.weight.detach(), E4M3).T + layer.bias.double()
    assert error(y, expected) < 4e-3
    y.sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((32,), 10.0))


@pytest.mark.parametrize('power', [-60, -20, 20])
def test_no_scale_of_gradients_or_inputs_is_lost(power):
    # Gradients of the mean over a step's tokens are far smaller than the least number of any fp8.
    results = []
    for factor in (1.0, 2.0**power):
        layer = linear()
        torch.manual_seed(1)
        x = torch.randn(32, 48).bfloat16().requires_grad_()
        layer(x).backward(torch.randn(32, 32).bfloat16() * factor)
        scaled_y = linear()((x.detach() * factor))
        results.append((x.grad / factor, layer.weight.grad / factor, scaled_y / factor))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_zeros_and_values_that_are_not_finite():
    layer = linear()
    x = torch.zeros(16, 48).bfloat16().requires_grad_()
    y = layer(x)
    y.backward(torch.zeros_like(y))
    for zero in (y, x.grad, layer.weight.grad):
        assert torch.equal(zero, torch.zeros_like(zero))
    for bad in (float('nan'), float('inf')):
        for place in ('input', 'weight', 'gradient'):
            layer = linear()
            x = torch.randn(16, 48).bfloat16()
            g = torch.randn(16, 32).bfloat16()
            if place == 'input':
                x[3, 5] = bad
            elif place == 'weight':
                layer.weight.data[3, 5] = bad
            else:
                g[3, 5] = bad
            x.requires_grad_()
            y = layer(x)
            y.backward(g)
            assert place == 'gradient' or not y.isfinite().all()
            # The gradient's norm, which every step checks, is not finite either.
            if place != 'weight':
                assert not layer.weight.grad.norm().isfinite()
            if place != 'input':
                assert not x.grad.norm().isfinite()


def test_operands_lie_in_memory_as_cuda_asks(monkeypatch):
    # torch's documentation of the CUDA product: rows of a and columns of b without gaps, inner
    # dimension and width multiples of 16, e5m2 in one of the two only. A CPU takes anything.
    scaled_mm = torch._scaled_mm
    calls = []

    def strict(a, b, a_scale, b_scale, **options):
        assert a.stride(1) == 1 and a.stride(0) == a.shape[1]
        assert b.stride(0) == 1 and b.stride(1) == b.shape[0]
        assert a.shape[1] % 16 == b.shape[0] % 16 == b.shape[1] % 16 == 0
        assert b.dtype == torch.float8_e4m3fn
        assert a_scale.dtype == b_scale.dtype == torch.float32
        assert a_scale.numel() == b_scale.numel() == 1
        calls.append(options)
        return scaled_mm(a, b, a_scale, b_scale, **options)

    monkeypatch.setattr(torch, '_scaled_mm', strict)
    layer = linear()
    gradients = (torch.randn(37, 32), torch.randn(32, 37).T, torch.randn(()).expand(37, 32))
    for g in gradients:
        layer(torch.randn(37, 48).bfloat16().requires_grad_()).backward(g.bfloat16())
    assert [c.get('use_fast_accum', False) for c in calls] == [True, False, False] * 3
    with torch.no_grad():                       # one token, and inputs that are views
        layer(torch.randn(1, 1, 48))
        layer(torch.randn(1, 3, 1, 16).transpose(1, 2).reshape(1, 1, -1))
        layer(torch.randn(48, 5, 1).permute(1, 2, 0))
        layer(torch.randn(48, 1, 1).permute(1, 2, 0))
        layer(torch.randn(4, 2, 48)[:, -1])


# -- in a model ------------------------------------------------------------------------------------


def model_of(**changes):
    model = GPT(ModelConfig(**{**SIZES, **changes}))
    init_weights(model, 0)
    return model


def tokens(rows=4, length=16, seed=0):
    idx = torch.randint(0, 64, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return idx[:, :-1], idx[:, 1:]


def gradients_of(model, autocast=True):
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        total, _, _ = model.loss(*tokens())
    (total / 64).backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return [total.detach(), *found]


def test_only_attention_and_feed_forward_networks_are_converted():
    model = model_of(tie_embeddings=False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert convert_layers(model) == 2 * 7
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert type(model.lm_head) is torch.nn.Linear
    assert convert_layers(model) == 0                   # a second time changes nothing
    experts = dict(n_expert=2, n_expert_active=1, n_shared_expert=1, expert_ffn_dim=16)
    model = model_of(n_dense_layer=1, **experts)
    assert convert_layers(model) == 2 * 4 + 3
    assert not [m for m in model.blocks[1].ffn.modules() if isinstance(m, Fp8Linear)]


def test_checkpointing_and_compilation_give_the_same_gradients():
    expected = None
    for how in ('none', 'full', 'selective', 'compiled'):
        # In bf16 throughout: under autocast, a CPU rounds operands in fp8 to bf16 in some of these.
        model = model_of(n_layer=1).bfloat16()
        convert_layers(model)
        if how == 'compiled':
            # without a graph break, and without the compiler's own roundings
            for block in model.blocks:
                block.compile(fullgraph=True, backend='aot_eager')
        else:
            prepare_blocks(model, checkpointing=how)
        found = gradients_of(model, autocast=False)
        expected = expected or found
        for a, b in zip(found, expected, strict=True):
            assert error(a, b.double()) < 1e-6, how


def test_gradients_are_those_of_the_model_within_the_formats_precision():
    model = model_of()
    truth = gradients_of(copy.deepcopy(model), autocast=False)
    convert_layers(model)
    found = gradients_of(model)
    assert abs(found[0] / truth[0] - 1) < 1e-3
    for a, b in zip(found[1:], truth[1:], strict=True):
        assert error(a, b.double()) < 0.15
    largest = max(error(a, b.double()) for a, b in zip(found[1:], truth[1:], strict=True))
    assert largest > 0.02                               # it was fp8


def test_hooks_see_the_inputs_and_gradients_of_a_row():
    model = model_of()
    convert_layers(model)
    idx, targets = tokens()
    found = {}

    def at_module(name, module, a, g):
        if isinstance(module, torch.nn.Linear):
            found[name] = torch.einsum('bto,bti->oi', g.double(), a.double())

    def at_head(_name, h, weight, dh):
        z = (h @ weight.T).float()
        dz = z.softmax(1)
        dz[torch.arange(len(z)), targets.flatten()] -= 1
        dh.copy_(dz.to(h.dtype) @ weight)

    with torch.autocast('cpu', torch.bfloat16):
        row_pass(model, (idx, targets, None), 'all', at_module, at_head)
        model.loss(idx, targets)[0].backward()
    assert len(found) == 14
    for name, gradient in found.items():
        assert error(model.get_submodule(name).weight.grad, gradient) < 0.1


def test_training_in_fp8_loses_like_bf16():
    final = {}
    for name in ('bf16', 'fp8'):
        model = model_of()
        if name == 'fp8':
            convert_layers(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for step in range(40):
            # rows of a progression, which can be learned
            start = torch.randint(0, 64, (8, 1), generator=torch.Generator().manual_seed(step))
            idx = (start + 3 * torch.arange(17)) % 64
            with torch.autocast('cpu', torch.bfloat16):
                total, _, _ = model.loss(idx[:, :-1], idx[:, 1:])
            (total / 128).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total.item() / 128)
        final[name] = sum(losses[-5:]) / 5
    assert final['bf16'] < 2
    assert abs(final['fp8'] - final['bf16']) < 0.1


# -- what is refused -------------------------------------------------------------------------------


def knobs(**changes):
    sizes = dict(
        n_embd=1536, n_head=24, n_kv_head=6, head_dim=None, ffn_dim=6144, tp=1, dtype='auto')
    return {**sizes, **changes}


@pytest.mark.parametrize('changes, words', [
    (dict(n_embd=576, n_head=9), 'would be slower than bfloat16 at n_embd = 576'),
    (dict(tp=2), 'does not work with tp = 2'),
    (dict(dtype='float32'), 'Use dtype=bfloat16 or auto'),
    (dict(ffn_dim=6150), 'multiples of 16, and ffn_dim = 6150'),
    (dict(n_kv_head=3, head_dim=24), 'and n_kv_head * head_dim = 72')])
def test_what_fp8_refuses(monkeypatch, changes, words):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: (9, 0))
    cuda = torch.device('cuda')
    fp8.check(knobs(), cuda)
    with pytest.raises(BadInput, match=words.replace('*', r'\*')):
        fp8.check(knobs(**changes), cuda)


def test_a_device_without_fp8_is_refused(monkeypatch, tmp_path):
    assert not DeviceConfig().fp8
    with pytest.raises(BadInput, match="an NVIDIA GPU, and this run is on 'cpu'"):
        fp8.convert(model_of(), torch.device('cpu'))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda _: 'NVIDIA A100')
    with pytest.raises(BadInput, match='NVIDIA A100 has 8.0'):
        fp8.check(knobs(), torch.device('cuda'))
    monkeypatch.delattr(torch, '_scaled_mm')
    with pytest.raises(BadInput, match='a torch with products in fp8'):
        fp8.check(knobs(), torch.device('cuda'))
    monkeypatch.undo()
    with pytest.raises(BadInput, match='fp8 = True needs an NVIDIA GPU'):
        run_here(train_command(tmp_path / 'out', tmp_path, fp8=True, device='cpu'))
    assert not (tmp_path / 'out').exists()


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason='no GPU with fp8 here')
@pytest.mark.parametrize('compiled', [False, True])
def test_fp8_on_cuda_equals_the_cpu(compiled):
    for N, dtype in ((256, torch.float32), (250, torch.float32), (256, torch.bfloat16)):
        torch.manual_seed(0)
        x = torch.randn(N, 512).bfloat16()
        g = (torch.randn(N, 384) * 1e-6).bfloat16()
        results = []
        for device in ('cpu', 'cuda'):
            layer = linear(512, 384).to(device, dtype)
            local_x = x.to(device, copy=True).requires_grad_()
            forward = layer
            if compiled and device == 'cuda':
                forward = torch.compile(layer, fullgraph=True)
            y = forward(local_x)
            y.backward(g.to(device))
            results.append([t.double().cpu() for t in (y, local_x.grad, layer.weight.grad)])
        for a, b in zip(*results, strict=True):
            # bf16 results, and the forward's fast sums, which keep about 14 bits
            assert error(b, a) < 5e-3
