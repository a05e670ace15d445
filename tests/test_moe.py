"""Mixtures of experts: against a dense loop over experts, and the balance of their loads."""

import pytest
import torch
import torch.nn.functional as F

from configurator import BadInput
from model import GPT, ModelConfig, init_weights
from ops import moe

SMALL = dict(vocab_size=64, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, ffn_dim=48)
SMALL |= dict(n_expert=8, n_expert_active=3, expert_ffn_dim=16, n_shared_expert=2, n_dense_layer=1)


def small_model(**changes):
    model = GPT(ModelConfig(**{**SMALL, **changes}))
    init_weights(model, 1)
    return model


def swiglu(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def dense(layer, x):
    """The definition: every token (N, C) through every expert, weighted by its gate.

    The gate is zero for an expert that is not chosen.
    """
    c = layer.config
    logits = x @ layer.router.weight.T
    scores = logits.sigmoid() if c.expert_score == 'sigmoid' else logits.softmax(1)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(1, (scores + layer.bias).topk(c.n_expert_active).indices, True)
    gates = torch.where(chosen, scores, 0)
    if c.n_expert_active > 1:
        gates = gates / gates.sum(1, keepdim=True)
    y = 0
    if layer.shared is not None:
        shared = layer.shared
        y = swiglu(x, shared.w_gate.weight, shared.w_up.weight, shared.w_down.weight)
    experts = layer.experts
    for e in range(c.n_expert):
        out = swiglu(x, experts.w_gate[e], experts.w_up[e], experts.w_down[e])
        y = y + gates[:, e : e + 1] * out
    return y


@pytest.mark.parametrize(
    'changes',
    [
        {},
        dict(expert_score='softmax', n_shared_expert=0),
        dict(n_expert_active=1),
        dict(n_expert_active=8),
    ],
)
def test_no_token_is_dropped(changes):
    layer = moe.layers(small_model(**changes))[0].double()
    torch.manual_seed(0)
    with torch.no_grad():
        layer.router.weight.copy_(torch.randn_like(layer.router.weight))
        # Nearly all tokens want the first expert, and none the last.
        layer.bias[0] = 3
        layer.bias[-1] = -3
    x = torch.randn(2, 40, 32, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x, 40)
    expected = dense(layer, x.flatten(0, 1)).view_as(x)
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()
    upstream = torch.randn_like(y)
    inputs = [x, *layer.parameters()]
    grads = torch.autograd.grad(y, inputs, upstream)
    expected_grads = torch.autograd.grad(expected, inputs, upstream)
    for a, b in zip(grads, expected_grads, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_the_balance_loss_is_that_of_its_equations():
    layer = moe.layers(small_model(n_expert_active=2))[0]
    x = torch.randn(3, 10, 32, requires_grad=True)
    _, loss = layer(x, 10)
    total = 0
    # DeepSeek-V3, equations 17 to 20, alpha = 1.
    for row in x:
        s = (row @ layer.router.weight.T).sigmoid()
        top = s.topk(2).indices
        for e in range(8):
            f = 8 / (2 * 10) * (top == e).sum()
            total = total + f * (s[:, e] / s.sum(1)).mean()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    (grad,) = torch.autograd.grad(loss, layer.router.weight)
    (expected,) = torch.autograd.grad(total, layer.router.weight)
    assert (grad - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize('rate, weight', [(1e-2, 0.0), (0.0, 0.3)])
def test_loads_even_out_on_skewed_input(rate, weight):
    # Inputs that share a large component all choose the same experts. Within 200 steps the biases,
    # or the loss, distribute them.
    torch.manual_seed(3)
    model = small_model(n_layer=1, n_dense_layer=0, n_expert_active=2)
    layer = moe.layers(model)[0]
    with torch.no_grad():
        layer.router.weight.copy_(torch.randn_like(layer.router.weight) / 32**0.5)
    optimizer = torch.optim.SGD([layer.router.weight], lr=0.5)
    common = torch.randn(32)
    found = []
    for _ in range(200):
        x = common + torch.randn(4, 64, 32)
        _, loss = layer(x, 64)
        optimizer.zero_grad()
        (weight * loss / 4).backward()
        optimizer.step()
        found.append(moe.balance(model, rate)[0].item())
        assert not layer.load.any()
    assert found[0] > 2.0
    assert sum(found[-10:]) / 10 < 1.35, found[-10:]


def test_a_model_learns_and_its_experts_differ():
    torch.manual_seed(0)
    model = small_model()
    idx = torch.randint(0, 64, (4, 33))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss, _, _ = model.loss(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        (loss / 128).backward()
        optimizer.step()
        moe.balance(model, 1e-3)
    assert loss.item() / 128 < 1.0
    # Token by token with a cache, the model says the same.
    out = model.eval().generate(idx[:, :8], 5, temperature=0)
    with torch.no_grad():
        logits = model(out[:, :-1]) @ model.output_weight.T
    assert torch.equal(logits[:, 7:].argmax(-1), out[:, 8:])


def test_a_frozen_model_in_bf16_keeps_its_biases_whole():
    model = small_model().frozen(torch.bfloat16)
    assert model.embed.weight.dtype == torch.bfloat16
    assert not model.embed.weight.requires_grad
    assert [layer.bias.dtype for layer in moe.layers(model)] == [torch.float32] * 2


@pytest.mark.parametrize(
    'changes, part',
    [
        (dict(n_expert_active=9), 'from 1 to n_expert'),
        (dict(expert_ffn_dim=0), 'expert_ffn_dim'),
        (dict(expert_score='relu'), 'sigmoid or softmax'),
        (dict(n_dense_layer=4), 'n_dense_layer'),
    ],
)
def test_impossible_experts_are_refused(changes, part):
    with pytest.raises(BadInput, match=part):
        ModelConfig(**{**SMALL, **changes})
