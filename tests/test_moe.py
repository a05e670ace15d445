"""Mixtures of experts: against a dense loop over experts, and the balance of their loads."""
import pytest
import torch
import torch.nn.functional as F

from configurator import BadInput
from model import GPT, ModelConfig, init_weights
from ops import moe

SMALL = dict(vocab_size=64, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, ffn_dim=48, n_expert=8, n_expert_active=3, expert_ffn_dim=16,
             n_shared_expert=2, n_dense_layer=1)


def small_model(**changes):
    model = GPT(ModelConfig(**{**SMALL, **changes}))
    init_weights(model, 1)
    return model


def dense(layer, x):
    """What the layer is: every token through every expert, weighted by its gate, zero for those not chosen. x (N, C)."""
    c = layer.config
    logits = x @ layer.router.weight.T
    scores = logits.sigmoid() if c.expert_score == 'sigmoid' else logits.softmax(1)
    y = 0 if layer.shared is None else layer.shared.w_down(F.silu(layer.shared.w_gate(x)) * layer.shared.w_up(x))
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(1, (scores + layer.bias).topk(c.n_expert_active).indices, True)
    gates = torch.where(chosen, scores, 0)
    if c.n_expert_active > 1:
        gates = gates / gates.sum(1, keepdim=True)
    for e in range(c.n_expert):
        out = (F.silu(x @ layer.experts.w_gate[e].T) * (x @ layer.experts.w_up[e].T)) @ layer.experts.w_down[e].T
        y = y + gates[:, e:e + 1] * out
    return y


@pytest.mark.parametrize('changes', [{}, dict(expert_score='softmax', n_shared_expert=0), dict(n_expert_active=1), dict(n_expert_active=8)])
def test_no_token_is_dropped(changes):
    layer = moe.layers(small_model(**changes))[0].double()
    torch.manual_seed(0)
    with torch.no_grad():
        layer.router.weight.copy_(torch.randn_like(layer.router.weight))
        layer.bias.copy_(torch.tensor([3.0, 0, 0, 0, 0, 0, 0, -3]))              # nearly all tokens want the first, none the last
    x = torch.randn(2, 40, 32, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x, 40)
    expected = dense(layer, x.flatten(0, 1)).view_as(x)
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()
    upstream = torch.randn_like(y)
    parameters = [p for p in layer.parameters()]
    got = torch.autograd.grad((y * upstream).sum(), [x, *parameters])
    wanted = torch.autograd.grad((expected * upstream).sum(), [x, *parameters])
    for a, b in zip(got, wanted):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_the_balance_loss_is_that_of_its_equations():
    model = small_model(n_expert_active=2)
    layer = moe.layers(model)[0]
    x = torch.randn(3, 10, 32, requires_grad=True)
    _, loss = layer(x, 10)
    total = 0
    for row in x:                                                                # DeepSeek-V3, equations 17 to 20, alpha = 1
        s = (row @ layer.router.weight.T).sigmoid()
        top = s.topk(2).indices
        for e in range(8):
            f = 8 / (2 * 10) * (top == e).sum()
            total = total + f * (s[:, e] / s.sum(1)).mean()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    g, expected = (torch.autograd.grad(t, layer.router.weight)[0] for t in (loss, total))
    assert (g - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize('rate, weight', [(1e-2, 0.0), (0.0, 0.3)])
def test_loads_even_out_on_skewed_input(rate, weight):
    # inputs that share a large component all like the same experts; within 200 steps the biases, or the loss, spread them
    torch.manual_seed(3)
    model = small_model(n_layer=1, n_dense_layer=0, n_expert_active=2)
    layer = moe.layers(model)[0]
    with torch.no_grad():
        layer.router.weight.copy_(torch.randn_like(layer.router.weight) / 32**0.5)
    optimizer = torch.optim.SGD([layer.router.weight], lr=0.5)
    common, found = torch.randn(32), []
    for step in range(200):
        x = common + torch.randn(4, 64, 32)
        _, loss = layer(x, 64)
        optimizer.zero_grad()
        (weight * loss / 4).backward()
        optimizer.step()
        found.append(moe.balance(model, rate)[0].item())
        assert not layer.load.any()
    assert found[0] > 2.0 and sum(found[-10:]) / 10 < 1.35, (found[0], found[-10:])


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
    out = model.eval().generate(idx[:, :8], 5, temperature=0)
    with torch.no_grad():
        logits = model(out[:, :-1]) @ model.output_weight.T
    assert torch.equal(logits[:, 7:].argmax(-1), out[:, 8:])                     # with a cache, token by token, the same


def test_a_frozen_model_in_bf16_keeps_its_biases_whole():
    model = small_model().frozen(torch.bfloat16)
    assert model.embed.weight.dtype == torch.bfloat16 and not model.embed.weight.requires_grad
    assert all(layer.bias.dtype == torch.float32 for layer in moe.layers(model)) and len(moe.layers(model)) == 2


@pytest.mark.parametrize('changes, part', [(dict(n_expert_active=9), 'from 1 to n_expert'), (dict(expert_ffn_dim=0), 'expert_ffn_dim'),
                                           (dict(expert_score='relu'), 'sigmoid or softmax'), (dict(n_dense_layer=4), 'n_dense_layer')])
def test_impossible_experts_are_refused(changes, part):
    with pytest.raises(BadInput, match=part):
        ModelConfig(**{**SMALL, **changes})
