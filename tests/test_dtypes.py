"""Tensors of two dtypes that meet, under the rules that autocast has on CUDA, without a GPU.

Autocast runs other operators in fp32 on CUDA than on a CPU: sums, norms and exponentials come back
in fp32, and nothing is promoted for index_copy. `cuda_rules` gives the CPU's autocast those rules.
"""
import contextlib
import os
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kd
from model import GPT, ModelConfig, init_weights
from tests.conftest import train
from tests.test_kd import cached, cross_entropy, problem, reference

BF16 = torch.bfloat16
# Operators that take tensors of one floating-point dtype only.
STRICT = re.compile(
    r'aten::(_?grouped_mm|mm|bmm|addmm|baddbmm|scatter|index_(add|copy|put))')


class OneDtype(TorchDispatchMode):
    """Raises where operators of STRICT get floating-point tensors of different dtypes."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if STRICT.match(function.name()):
            tensors = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, torch.Tensor)]
            dtypes = {t.dtype for t in tensors if t.is_floating_point()}
            assert len(dtypes) <= 1, f'{function.name()} got {dtypes}'
        return function(*args, **(kwargs or {}))


def cuda_lists():
    """The operators of CUDA's autocast from torch's own header: dict policy -> operator names."""
    header = os.path.join(os.path.dirname(torch.__file__), 'include', 'ATen', 'autocast_mode.h')
    with open(header) as f:
        text = f.read()
    found = {}
    for policy in ('LOWER_PRECISION_FP', 'FP32', 'FP32_SET_OPT_DTYPE', 'PROMOTE'):
        body = re.search(rf'#define AT_FORALL_{policy}\(_\)((?:.*\\\n)*.*)', text)[1]
        pairs = re.findall(r'_\((\w+)(?:, (\w+))?\)', body)
        found[policy] = ['.'.join(filter(None, pair)) for pair in pairs]
    return found


def under_rule(function, policy):
    """An operator as CUDA's autocast runs it."""

    def is_eligible(x):
        return isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64

    def call(*args, **kwargs):
        dtype = torch.float32
        if policy == 'LOWER_PRECISION_FP':
            dtype = torch.get_autocast_dtype('cpu')
        if policy == 'PROMOTE' and all(x.dtype == BF16 for x in args if is_eligible(x)):
            dtype = BF16
        if policy == 'FP32_SET_OPT_DTYPE':
            if is_eligible(args[0]) and kwargs.get('dtype') is None:
                kwargs = {**kwargs, 'dtype': torch.float32}
        else:
            args = [x.to(dtype) if is_eligible(x) else x for x in args]
        key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
        with torch._C._ExcludeDispatchKeyGuard(key):
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def cuda_rules():
    """Autocast on the CPU follows CUDA's lists, and no operator promotes its tensors."""
    library = torch.library.Library('aten', 'IMPL', 'AutocastCPU')
    for policy, names in cuda_lists().items():
        for name in names:
            packet, _, overload = name.partition('.')
            function = getattr(getattr(torch.ops.aten, packet, None), overload or 'default', None)
            if function is not None:
                library.impl(name, under_rule(function, policy))
    for name in ('cat', 'stack', 'index_copy'):     # promoted on CPUs only
        library.impl(name, torch.library.fallthrough_kernel)
    try:
        with OneDtype():
            yield
    finally:
        library._destroy()


def test_the_rules_are_those_of_cuda():
    x = torch.ones(4, dtype=BF16)
    place = torch.arange(4)
    with cuda_rules(), torch.autocast('cpu', BF16):
        assert x.sum().dtype == x.exp().dtype == x.softmax(0).dtype == torch.float32
        assert x.sum(0, dtype=BF16).dtype == BF16
        assert torch.nn.functional.linear(x.float(), x[None].float()).dtype == BF16
        assert (x.double().exp() + x).dtype == torch.float64
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros(4).index_copy(0, place, x)
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros(4).scatter_add_(0, place, x)
    with torch.autocast('cpu', BF16):
        assert x.sum().dtype == BF16


# -- distillation ----------------------------------------------------------------------------------

N, V = 23, 97
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, BF16: 0.03}


def taught_by(teacher, y, T, kind):
    """The teacher's probabilities at temperature T (n, V) in fp64, as the loss should see them."""
    if not isinstance(teacher, kd.Cached):
        return (y / T).softmax(1)
    if kind == 'forward' and teacher.drawn.shape[1]:
        ids, q = teacher.outcomes()
        return torch.zeros_like(y).scatter_add(1, ids, q.double())
    mass = teacher.mass().double().exp()
    rest = teacher.rest[teacher.source].double().exp().scatter(1, teacher.ids, 0)
    rest = rest / rest.sum(1, keepdim=True) * mass[:, -1:]
    return rest.scatter(1, teacher.ids, mass[:, :-1])


# The student in a dtype, or in fp32 under autocast.
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, BF16, 'autocast'])
@pytest.mark.parametrize('kind', kd.DIVERGENCES)
@pytest.mark.parametrize('of', [torch.float64, torch.float32, BF16, 'cache', 'cache with draws'])
def test_a_student_of_any_dtype_learns_from_a_teacher_of_any(dtype, kind, of):
    for alpha, T in ((1.0, 1.0), (0.4, 2.0)):
        h, w, th, tw, targets, weights = problem(3, n=N, v=V)
        # Numbers that bf16 can hold, so that only the arithmetic rounds.
        h, w, th, tw = (t.bfloat16().double() for t in (h, w, th, tw))
        y = th @ tw.T
        if isinstance(of, str):
            teacher = cached(y, targets, 8, 4 if 'draws' in of else 0, T)
        else:
            teacher = (th.to(of), tw.to(of))
        h.requires_grad_()
        w.requires_grad_()
        losses, _ = reference(h, w, taught_by(teacher, y, T, kind), targets, alpha, T, kind)
        exact = torch.autograd.grad((losses * weights).sum(), (h, w))
        stored = torch.float32 if dtype == 'autocast' else dtype
        local_h = h.detach().to(stored).requires_grad_()
        local_w = w.detach().to(stored).requires_grad_()
        with cuda_rules():
            with torch.autocast('cpu', BF16, enabled=dtype == 'autocast'):
                total, found = kd.distillation_loss(
                    local_h, local_w, targets, weights.to(stored), teacher=teacher, alpha=alpha,
                    temperature=T, kind=kind)
            total.backward()
        assert total.dtype == found.dtype == torch.promote_types(stored, torch.float32)
        worst = TOLERANCE[BF16 if dtype == 'autocast' else dtype]
        if of == BF16:
            worst = TOLERANCE[BF16]         # its logits are rounded
        for got, truth in zip((local_h.grad, local_w.grad), exact, strict=True):
            assert got.dtype == stored
            assert (got.double() - truth).norm() <= worst * truth.norm()
        valid = targets >= 0
        ce = cross_entropy(h @ w.T, targets)[valid].detach()
        assert (found[1][valid].double() - ce).norm() <= worst * ce.norm()


# -- models and runs -------------------------------------------------------------------------------

@pytest.mark.parametrize('changes', [
    {}, dict(qk_norm=True, qkv_bias=True, nope_layers=[1]),
    dict(n_expert=4, n_expert_active=2, expert_ffn_dim=16),
    dict(n_expert=4, n_expert_active=1, expert_ffn_dim=16, n_shared_expert=1)])
def test_the_residual_stream_stays_in_bf16_under_autocast(changes):
    model = GPT(ModelConfig(
        vocab_size=64, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, ffn_dim=48, **changes))
    init_weights(model, 0)
    model.balance_loss = 0.01
    seen = []
    for module in model.modules():
        if type(module).__name__ in ('Block', 'Attention', 'FeedForward', 'RMSNorm'):
            module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    idx = torch.randint(0, 64, (2, 24))
    with cuda_rules():
        with torch.autocast('cpu', BF16):
            total, losses, _ = model.loss(idx, idx.roll(-1, 1))
        total.backward()
    assert total.dtype == losses.dtype == torch.float32
    for x, out in seen:
        out = out[0] if isinstance(out, tuple) else out
        assert x.dtype == out.dtype == BF16
    assert len(seen) >= 3 * 4 + 1
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize('changes', [
    dict(mixture='influence'), dict(select='online', presence='stream'), dict(mixture='doge'),
    dict(teacher='{}/teacher', kd_alpha=0.5),
    dict(mixture='doremi', doremi_reference='{}/teacher')])
def test_methods_run_under_the_rules_of_cuda(tmp_path, layout_data, changes):
    knobs = dict(
        max_steps=6, eval_interval=6, mixture_interval=4, mixture_warmup=2, mixture_max=1.0,
        probe={'m': 1.0}, probe_rows=4, influence_rows=4, mixture_rows=4, dtype='bfloat16')
    folder = layout_data.parent
    for key, value in changes.items():
        if str(value).startswith('{}'):
            changes = {**changes, key: value.format(folder)}
            if not (folder / 'teacher').exists():
                train(folder / 'teacher', layout_data, **knobs)
    with cuda_rules():
        m = train(tmp_path / 'run', layout_data, **{**knobs, **changes})
    assert m[6]['val/loss'] < m[0]['val/loss']
