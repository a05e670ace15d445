"""The model against transformers, fp64 formulas, finite differences and published counts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import configurator
from lib import parallel
from model import GPT, ModelConfig, count_parameters, flops_per_token, init_weights
from ops import loss as loss_module
from ops.attention import attend, document_boundaries, suits_blocks
from ops.loss import linear_cross_entropy
from tests.conftest import ROOT, run_ranks

TINY = dict(vocab_size=97, n_layer=3, n_head=4, n_kv_head=2, n_embd=48, ffn_dim=80)


def build(seed=0, dtype=torch.float32, **changes):
    model = GPT(ModelConfig(**{**TINY, **changes}))
    init_weights(model, seed)
    return model.to(dtype)


def tokens(*shape, vocab_size=97):
    return torch.randint(0, vocab_size, shape)


def full_logits(model, idx):
    return model(idx) @ model.output_weight.T


# Ours -> Hugging Face's Llama, Qwen2 or Qwen3.
OUTSIDE = {
    'embed.weight': 'model.embed_tokens.weight',
    'norm.weight': 'model.norm.weight',
    'lm_head.weight': 'lm_head.weight',
}
INSIDE = {
    'attn_norm': 'input_layernorm',
    'ffn_norm': 'post_attention_layernorm',
    'attn.wq': 'self_attn.q_proj',
    'attn.wk': 'self_attn.k_proj',
    'attn.wv': 'self_attn.v_proj',
    'attn.wo': 'self_attn.o_proj',
    'attn.q_norm': 'self_attn.q_norm',
    'attn.k_norm': 'self_attn.k_norm',
    'ffn.w_gate': 'mlp.gate_proj',
    'ffn.w_up': 'mlp.up_proj',
    'ffn.w_down': 'mlp.down_proj',
}


@torch.no_grad()
def copy_from_transformers(model, other):
    source = other.state_dict()
    for name, parameter in model.named_parameters():
        if name.startswith('blocks.'):
            _, layer, rest = name.split('.', 2)
            part, kind = rest.rsplit('.', 1)
            parameter.copy_(source[f'model.layers.{layer}.{INSIDE[part]}.{kind}'])
        else:
            parameter.copy_(source[OUTSIDE[name]])


LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)


@pytest.mark.parametrize(
    'family, changes',
    [
        ('Llama', {}),
        ('Llama', dict(tie_embeddings=False, n_kv_head=4, rope_theta=10000.0)),
        ('Llama', dict(n_kv_head=1, head_dim=20)),
        ('Llama', dict(rope_scaling=dict(original_max_position=16, **LLAMA3))),
        ('Qwen3', dict(qk_norm=True, head_dim=16, norm_eps=1e-6)),
        ('Qwen2', dict(qkv_bias=True, norm_eps=1e-6)),
    ],
)
def test_logits_equal_those_of_transformers(family, changes):
    transformers = pytest.importorskip('transformers')
    ours = build(**changes)
    c = ours.config
    rope = dict(rope_type='default', rope_theta=c.rope_theta)
    if c.rope_scaling:
        rope |= dict(rope_type='llama3', original_max_position_embeddings=16, **LLAMA3)
    config = getattr(transformers, f'{family}Config')(
        vocab_size=c.vocab_size,
        hidden_size=c.n_embd,
        intermediate_size=c.ffn_dim,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head,
        head_dim=c.head_dim,
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings,
        rope_parameters=rope,
        max_position_embeddings=128,
        attn_implementation='sdpa',
    )
    torch.manual_seed(1)
    other = getattr(transformers, f'{family}ForCausalLM')(config).eval()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            # Biases of 0 and norms of 1 would test nothing.
            if 'norm' in name or 'bias' in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    copy_from_transformers(ours, other)
    idx = tokens(3, 40)
    with torch.no_grad():
        expected = other(idx).logits
        got = full_logits(ours, idx)
    assert expected.std() > 0.1
    assert (got - expected).abs().max() < 1e-5


# -- the loss --------------------------------------------------------------------------------------


def reference_loss(h, weight, targets, token_weights):
    """The definition, on full logits in fp64."""
    z = h.double() @ weight.double().T
    losses = F.cross_entropy(z, targets, ignore_index=-1, reduction='none')
    return (losses * token_weights.double()).sum(), losses


@pytest.mark.parametrize('n_rows, chunk', [(37, 8), (64, 64), (5, 1)])
def test_chunked_loss_and_gradients_equal_fp64_on_full_logits(monkeypatch, n_rows, chunk):
    monkeypatch.setattr(loss_module, 'chunk_rows', lambda *_: chunk)
    torch.manual_seed(0)
    h = torch.randn(n_rows, 24, requires_grad=True)
    weight = torch.randn(301, 24, requires_grad=True)
    targets = tokens(n_rows, vocab_size=301)
    token_weights = torch.rand(n_rows)
    targets[::4] = -1
    expected, expected_losses = reference_loss(h, weight, targets, token_weights)
    # The upstream gradient is not 1.
    grads = torch.autograd.grad(2.5 * expected, (h, weight))
    total, losses, hits = linear_cross_entropy(h, weight, targets, token_weights)
    got = torch.autograd.grad(2.5 * total, (h, weight))
    assert abs(total.item() / expected.item() - 1) < 1e-6
    assert (losses - expected_losses).abs().max() < 1e-5
    assert torch.equal(hits, (h @ weight.T).argmax(1) == targets)
    for a, b in zip(got, grads, strict=True):
        assert (a.double() - b.double()).norm() / b.double().norm() < 1e-5


def test_on_a_gpu_the_products_of_chunks_are_summed_in_fp32_and_in_place(monkeypatch):
    # A CPU has no product of bf16 matrices with an fp32 result, so this stands in for CUDA's.
    calls = []
    mm = torch.mm

    def wide_mm(a, b, out_dtype=None, out=None):
        if out_dtype is None:
            return mm(a, b, out=out)
        assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == torch.float32
        calls.append('mm')
        return mm(a.float(), b.float())

    def wide_addmm(total, a, b, out_dtype, out):
        assert total is out and out.dtype == out_dtype == torch.float32
        assert a.dtype == b.dtype == torch.bfloat16
        calls.append('addmm')
        return out.add_(mm(a.float(), b.float()))

    monkeypatch.setattr(loss_module, 'chunk_rows', lambda *_: 8)
    torch.manual_seed(0)
    h = torch.randn(60, 24).bfloat16().requires_grad_()
    weight = (torch.randn(301, 24) * 0.3).bfloat16().float().requires_grad_()
    targets = tokens(60, vocab_size=301)
    expected, _ = reference_loss(h, weight, targets, torch.ones(60))
    truth = torch.autograd.grad(expected, weight)[0].double()

    def error():
        gradient = torch.autograd.grad(linear_cross_entropy(h, weight, targets)[0], weight)[0]
        assert gradient.dtype == torch.float32
        return ((gradient.double() - truth).norm() / truth.norm()).item()

    of_bf16_products = error()
    monkeypatch.setattr(loss_module, 'adds_to_fp32', lambda _: True)
    monkeypatch.setattr(torch, 'mm', wide_mm)
    monkeypatch.setattr(torch, 'addmm', wide_addmm)
    # What remains is the rounding of the logits, of their gradient and of h * scale.
    assert error() < min(3e-3, of_bf16_products)
    assert calls == ['mm'] + ['addmm'] * 7


def test_no_sum_in_the_product_on_a_cpu():
    assert not loss_module.adds_to_fp32('cpu')


@pytest.mark.parametrize('n_rows, rows', [
    (32_768, 8192), (16_384, 4096), (2048, 1024), (700, 640), (131_072, 8320)])
def test_chunks_of_the_loss_on_a_gpu(n_rows, rows):
    # A vocabulary of 128,256 in bf16: a quarter of the rows, up to 2 GiB of logits, by 128 rows.
    got = loss_module.chunk_rows(n_rows, 128_256, torch.device('cuda'), torch.bfloat16)
    assert got == rows
    assert got * 128_256 * 2 <= 2**31
    # On a CPU it is an eighth, and up to 256 MiB.
    got = loss_module.chunk_rows(n_rows, 1024, torch.device('cpu'), torch.bfloat16)
    assert got == min(n_rows, max(256, n_rows // 8))


PARTS = """
import torch
import torch.distributed as dist
from lib.device import leave_ranks
from ops.loss import linear_cross_entropy
dist.init_process_group('gloo')
rank = dist.get_rank()
torch.manual_seed(0)
h, weight, token_weights = torch.randn(23, 12), torch.randn(41, 12), torch.rand(23)
targets = torch.randint(-1, 41, (23,))
def result(h, weight, part_of):
    h, weight = h.clone().requires_grad_(), weight.clone().requires_grad_()
    total, losses, hits = linear_cross_entropy(h, weight, targets, token_weights, part_of)
    (3 * total).backward()
    return total, losses, hits.float(), h.grad, weight.grad
full = result(h, weight, None)
first, last = (0, 25) if rank == 0 else (25, 41)          # parts of unequal size
part = result(h, weight[first:last], (dist.group.WORLD, first))
for a, b in zip(part, (*full[:4], full[4][first:last])):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
print('SAME')
leave_ranks(0)
"""


def test_loss_over_parts_of_the_vocabulary_equals_the_whole(tmp_path):
    (tmp_path / 'parts.py').write_text(PARTS)
    done = run_ranks([str(tmp_path / 'parts.py')], 2)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count('SAME') == 2


def all_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_tokens_that_are_not_counted_cost_nothing_in_the_output_layer():
    model = build(vocab_size=500)
    c = model.config
    idx = tokens(2, 32, vocab_size=500)
    flops = []
    for n_valid in (64, 16):
        targets = idx.roll(-1, 1).clone()
        targets.view(-1)[n_valid:] = -1
        weights = torch.rand(idx.shape, generator=torch.Generator().manual_seed(0))
        with FlopCounterMode(display=False) as counter:
            total, losses, _ = model.loss(idx, targets, weights)
        flops.append(counter.get_total_flops())
    # The products of 48 tokens, those of the backward included.
    assert flops[0] - flops[1] == 48 * 6 * c.n_embd * c.vocab_size
    h = model(idx).flatten(0, 1)
    expected, expected_losses, _ = linear_cross_entropy(
        h, model.output_weight, targets.flatten(), weights.flatten()
    )
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(losses.flatten(), expected_losses)
    assert not losses[1].any()
    assert torch.allclose(all_gradients(model, total), all_gradients(model, expected), atol=1e-5)
    targets[:] = -1
    total, losses, _ = model.loss(idx, targets)
    assert total == 0
    assert not losses.any()
    assert not all_gradients(model, total).any()


def test_loss_value_in_bf16_is_summed_in_fp32():
    torch.manual_seed(0)
    h = (torch.randn(512, 64) * 0.3).bfloat16()
    weight = torch.randn(1000, 64).bfloat16()
    targets = tokens(512, vocab_size=1000)
    exact, _ = reference_loss(h.float(), weight.float(), targets, torch.ones(512))
    total, _, _ = linear_cross_entropy(h, weight, targets)
    assert abs(total.item() - exact.item()) / 512 < 2e-3


def test_loss_of_certain_predictions_is_zero_not_infinite():
    h = torch.eye(4) * 300
    total, losses, hits = linear_cross_entropy(h, torch.eye(4), torch.tensor([0, 1, 2, 0]))
    assert losses.tolist() == [0, 0, 0, 300]
    assert hits.tolist() == [True, True, True, False]
    assert total == 300


def test_backward_twice_is_an_error_not_a_wrong_gradient():
    h = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(9, 8, requires_grad=True)
    total, _, _ = linear_cross_entropy(h, weight, torch.tensor([1, 2, 3, 4]))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        (2 * total).backward()


MODELS = 'model/mobilellm_140m', 'model/mobilellm_950m', 'model/smollm2_135m', 'model/llama3_8b'


@pytest.mark.parametrize('name', ['demo', *MODELS])
def test_fresh_model_predicts_uniformly(name):
    # Widths of the real models with fewer layers and tokens: the loss is ln(vocab_size) within 2 %.
    c = load_model_config(name, n_layer=2, ffn_dim=64, vocab_size=4096)
    model = GPT(c)
    init_weights(model, 0)
    torch.manual_seed(0)
    idx = tokens(1, 64, vocab_size=c.vocab_size)
    with torch.no_grad():
        total, _, _ = model.loss(idx, tokens(1, 64, vocab_size=c.vocab_size))
    assert abs(total.item() / 64 / math.log(c.vocab_size) - 1) < 0.02


def test_gradients_reach_every_parameter_and_agree_with_finite_differences():
    changes = dict(qk_norm=True, qkv_bias=True, layer_repeat=2, n_layer=2)
    model = build(dtype=torch.float64, **changes)
    idx = tokens(2, 9)
    targets = tokens(2, 9).flatten()
    parameters = list(model.parameters())
    h = model(idx).flatten(0, 1)
    total, _, _ = linear_cross_entropy(h, model.output_weight, targets)
    grads = torch.autograd.grad(total, parameters)
    torch.manual_seed(0)
    direction = [torch.randn_like(p) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
    values = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=step)
            z = full_logits(model, idx).flatten(0, 1)
            values.append(F.cross_entropy(z, targets, reduction='sum'))
    assert abs((values[0] - values[1]) / 2e-5 / slope - 1) < 1e-5
    assert all(g.abs().max() > 0 for g in grads)


# -- attention -------------------------------------------------------------------------------------


def test_blocks_are_compiled_once_for_all_and_without_graph_breaks():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build(qk_norm=True)
    idx = tokens(2, 300)  # long enough for attention by blocks
    for block in model.blocks:
        block.compile(backend='aot_eager')
    for _ in range(2):
        total, _, _ = model.loss(idx, idx.roll(-1, 1))
        total.backward()
    counters = torch._dynamo.utils.counters
    assert counters['stats']['unique_graphs'] == 1
    assert not counters['graph_break']
    torch._dynamo.reset()


def gradients_from(model, idx, grad_from):
    model.zero_grad()
    total, _, _ = model.loss(idx, idx.roll(-1, 1), grad_from=grad_from)
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('checkpointing', ['none', 'selective'])
def test_training_evaluation_and_measurements_share_one_graph(count_graphs, checkpointing):
    idx = tokens(2, 24)
    plain = build(layer_repeat=2)
    model = build(layer_repeat=2)
    parallel.prepare_blocks(model, True, checkpointing)
    for _ in range(2):
        model.eval()
        with torch.no_grad():
            total, losses, _ = model.loss(idx, idx.roll(-1, 1))
            assert not total.requires_grad
            assert torch.allclose(losses, plain.loss(idx, idx.roll(-1, 1))[1], rtol=1e-5)
        last = gradients_from(model, idx, 2)  # as influence measures it
        model.train()
        for grad_from, got in ((2, last), (0, gradients_from(model, idx, 0))):
            expected = gradients_from(plain, idx, grad_from)
            assert got.keys() == expected.keys()
            for name, gradient in got.items():
                assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6), name
    assert count_graphs() == 1
    with torch.compiler.set_stance('force_eager'):
        ids = model.generate(idx, 3, temperature=0)
    assert torch.equal(ids, plain.generate(idx, 3, temperature=0))


def test_another_number_of_documents_compiles_nothing_anew(count_graphs):
    model = build(n_layer=1)
    parallel.prepare_blocks(model, True)
    idx = tokens(2, 16)
    n_graphs = []
    for bounds in ([0, 16, 32], [0, 3, 16, 20, 32], [0, 16, 20, 32]):
        total, _, _ = model.loss(idx, idx, doc_ids=torch.tensor(bounds, dtype=torch.int32))
        total.backward()
        n_graphs.append(count_graphs())
    assert 0 < n_graphs[0] == n_graphs[2]


@pytest.mark.parametrize('T, K', [(257, 1), (300, 2), (320, 4)])
def test_attention_by_blocks_equals_fp64(T, K):
    inputs = [torch.randn(2, T, heads, 12, requires_grad=True) for heads in (4, K, K)]
    inputs64 = [t.detach().double().requires_grad_() for t in inputs]
    assert suits_blocks(inputs[0], T)
    assert not suits_blocks(inputs64[0], T)
    q, k, v = inputs64
    k = k.repeat_interleave(4 // K, 2)
    v = v.repeat_interleave(4 // K, 2)
    later = torch.ones(T, T).triu(1).bool()
    scores = torch.einsum('bthd,bshd->bhts', q, k) / 12**0.5
    p = scores.masked_fill(later, -math.inf).softmax(-1)
    truth = torch.einsum('bhts,bshd->bthd', p, v)
    got = attend(*inputs)
    assert (got - truth).norm() < 1e-6 * truth.norm()
    upstream = torch.randn(2, T, 4, 12)
    grads = torch.autograd.grad(got, inputs, upstream)
    grads64 = torch.autograd.grad(truth, inputs64, upstream.double())
    for a, b in zip(grads, grads64, strict=True):
        assert (a - b).norm() < 1e-6 * b.norm()
    checks = ('test_schema', 'test_faketensor', 'test_autograd_registration')
    torch.library.opcheck(torch.ops.cheapertraining.blockwise, inputs, test_utils=checks)


def test_document_mask_equals_documents_alone():
    model = build()
    a = tokens(1, 6)
    b = tokens(1, 9)
    both = torch.cat((a, b), 1)
    together = model(both, doc_ids=torch.tensor([[0] * 6 + [1] * 9]))
    assert torch.allclose(together[:, :6], model(a), atol=1e-5)
    assert torch.allclose(together[:, 6:], model(b), atol=1e-5)
    assert not torch.allclose(model(both)[:, 6:], model(b), atol=1e-2)


def test_document_boundaries_of_a_stream():
    starts = document_boundaries(torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]))
    assert starts.tolist() == [0, 2, 4, 8]
    assert starts.dtype == torch.int32


# -- generation ------------------------------------------------------------------------------------

VARIANTS = [{}, dict(layer_repeat=2), dict(qk_norm=True, qkv_bias=True, tie_embeddings=False)]


@pytest.mark.parametrize('changes', VARIANTS)
def test_generation_with_a_cache_equals_running_the_whole_text(changes):
    model = build(**changes)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    idx = tokens(2, 7)
    expected = idx
    for _ in range(12):
        likeliest = full_logits(model, expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, likeliest), 1)
    assert torch.equal(model.generate(idx, 12, temperature=0), expected)
    drawn = model.generate(idx, 12, seed=3)
    assert torch.equal(drawn, model.generate(idx, 12, seed=3))
    assert not torch.equal(drawn, model.generate(idx, 12, seed=4))


def test_a_second_chunk_of_prompt_sees_the_first():
    model = build()
    c = model.config
    idx = tokens(2, 11)
    cache = [torch.zeros(2, 2, 11, c.n_kv_head, c.head_dim) for _ in range(c.n_layer)]
    model(idx[:, :6], cache=cache)
    second = model(idx[:, 6:], cache=cache, position=6)
    assert torch.allclose(second, model(idx)[:, 6:], atol=1e-5)


def test_stop_token_ends_a_row_and_stays():
    out = build().generate(tokens(4, 3), 200, stop_token=5, temperature=5.0, seed=1)
    stopped = [row for row in out[:, 3:].tolist() if 5 in row]
    assert stopped
    for row in stopped:
        assert set(row[row.index(5) :]) == {5}


# -- weights and counts ----------------------------------------------------------------------------


def test_init_does_not_depend_on_order_and_differs_by_seed():
    model = build(1)
    deeper = build(1, n_layer=5)
    assert torch.equal(model.blocks[1].attn.wq.weight, deeper.blocks[1].attn.wq.weight)
    assert not torch.equal(model.embed.weight, build(2).embed.weight)


@pytest.mark.parametrize('changes', VARIANTS)
def test_flops_equal_what_torch_counts(changes):
    model = build(**changes)
    T = 32
    idx = tokens(1, T)
    targets = tokens(1, T).flatten()
    # In MATH attention the counter sees 2 products forward and 4 backward: 12 H D T.
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        F.cross_entropy(full_logits(model, idx).flatten(0, 1), targets).backward()
    assert counter.get_total_flops() == flops_per_token(model.config, T) * T


def load_model_config(name, **changes):
    """The ModelConfig of a config file, read as train.py reads it."""
    files = [str(ROOT / 'config' / f'{name}.py')]
    config = configurator.configure_script(str(ROOT / 'train.py'), files)
    return configurator.pick(ModelConfig, {**config, **changes})


@pytest.mark.parametrize(
    'name, millions, tolerance',
    [
        ('mobilellm_140m', 140.25, 0.001),
        ('mobilellm_360m', 359.4, 0.001),
        ('mobilellm_950m', 949.7, 0.001),
        ('mobilellm_7b', 7_000, 0.05),
        ('mobilellm_70b', 70_000, 0.05),
        ('mobilellm_671b', 671_000, 0.01),
        ('smollm2_135m', 134.515008, 1e-9),
        ('smollm2_360m', 361.82112, 1e-9),
        ('llama3_8b', 8030.261248, 1e-9),
    ],
)
def test_every_model_has_the_published_number_of_parameters(name, millions, tolerance):
    c = load_model_config(f'model/{name}')
    counts = count_parameters(c)
    assert abs(counts['total'] / 1e6 / millions - 1) <= tolerance
    with torch.device('meta'):
        model = GPT(c)
    assert sum(p.numel() for p in model.parameters()) == counts['total']
    embedding = model.embed.weight.numel() * (1 if c.tie_embeddings else 2)
    assert counts['embedding'] == embedding
    assert counts['non_embedding'] == counts['total'] - embedding


@pytest.mark.parametrize(
    'changes, part',
    [
        (dict(n_embd=50), 'n_embd'),
        (dict(n_kv_head=3), 'n_kv_head'),
        (dict(n_embd=20), 'odd'),
        (dict(n_layer=0), 'n_layer'),
        (dict(rope_scaling=dict(factor=8.0)), 'rope_scaling'),
    ],
)
def test_impossible_shapes_are_refused(changes, part):
    with pytest.raises(configurator.BadInput, match=part):
        ModelConfig(**{**TINY, **changes})
