import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import configurator
from model import GPT, ModelConfig, count_parameters, flops_per_token, init_weights
from ops import loss as loss_module
from ops.attention import attend, document_boundaries, suits_blocks
from ops.loss import linear_cross_entropy, token_losses
from tests.conftest import ROOT, run_ranks

TINY = dict(vocab_size=97, n_layer=3, n_head=4, n_kv_head=2, n_embd=48, ffn_dim=80)


def build(seed=0, dtype=torch.float32, **changes):
    model = GPT(ModelConfig(**{**TINY, **changes}))
    init_weights(model, seed)
    return model.to(dtype)


def copy_from_transformers(model, theirs):
    """Copies a Hugging Face Llama, Qwen2 or Qwen3 model's weights by name."""
    source = theirs.state_dict()
    renames = {'embed.weight': 'model.embed_tokens.weight', 'norm.weight': 'model.norm.weight', 'lm_head.weight': 'lm_head.weight'}
    inside = {'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm', 'attn.wq': 'self_attn.q_proj',
              'attn.wk': 'self_attn.k_proj', 'attn.wv': 'self_attn.v_proj', 'attn.wo': 'self_attn.o_proj',
              'attn.q_norm': 'self_attn.q_norm', 'attn.k_norm': 'self_attn.k_norm', 'ffn.w_gate': 'mlp.gate_proj',
              'ffn.w_up': 'mlp.up_proj', 'ffn.w_down': 'mlp.down_proj'}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith('blocks.'):
                _, layer, rest = name.split('.', 2)
                part, kind = rest.rsplit('.', 1)
                name = f'model.layers.{layer}.{inside[part]}.{kind}'
            parameter.copy_(source[renames.get(name, name)])


@pytest.mark.parametrize('family, changes, theirs', [
    ('Llama', {}, {}),
    ('Llama', dict(tie_embeddings=False, n_kv_head=4, rope_theta=10000.0), {}),
    ('Llama', dict(n_kv_head=1, head_dim=20), {}),
    ('Llama', dict(rope_scaling=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=16)), {}),
    ('Qwen3', dict(qk_norm=True, head_dim=16, norm_eps=1e-6), {}),
    ('Qwen2', dict(qkv_bias=True, norm_eps=1e-6), {}),
])
def test_logits_equal_those_of_transformers(family, changes, theirs):
    transformers = pytest.importorskip('transformers')
    ours = build(**changes)
    c = ours.config
    rope = dict(rope_type='default', rope_theta=c.rope_theta)
    if c.rope_scaling:
        rope |= dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
    config = getattr(transformers, f'{family}Config')(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings, rope_parameters=rope, max_position_embeddings=128, attn_implementation='sdpa')
    torch.manual_seed(1)
    other = getattr(transformers, f'{family}ForCausalLM')(config).eval()
    with torch.no_grad():
        for name, parameter in other.named_parameters():         # biases and norms other than 0 and 1, or they test nothing
            if 'norm' in name or 'bias' in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    copy_from_transformers(ours, other)
    idx = torch.randint(0, c.vocab_size, (3, 40))
    with torch.no_grad():
        expected = other(idx).logits
        got = ours(idx) @ ours.output_weight.T
    assert expected.std() > 0.1
    assert (got - expected).abs().max() < 1e-5


def reference_loss(h, weight, targets, token_weights):
    """The definition, on full logits in fp64."""
    losses = F.cross_entropy(h.double() @ weight.double().T, targets, ignore_index=-1, reduction='none')
    return (losses * token_weights.double()).sum(), losses


@pytest.mark.parametrize('n_rows, chunk', [(37, 8), (64, 64), (5, 1)])
def test_chunked_loss_and_gradients_equal_fp64_on_full_logits(monkeypatch, n_rows, chunk):
    monkeypatch.setattr(loss_module, 'chunk_rows', lambda *_: chunk)
    torch.manual_seed(0)
    h, weight = torch.randn(n_rows, 24, requires_grad=True), torch.randn(301, 24, requires_grad=True)
    targets, token_weights = torch.randint(0, 301, (n_rows,)), torch.rand(n_rows)
    targets[::4] = -1
    expected, expected_losses = reference_loss(h, weight, targets, token_weights)
    grads = torch.autograd.grad(2.5 * expected, (h, weight))
    total, losses, hits = linear_cross_entropy(h, weight, targets, token_weights)
    got = torch.autograd.grad(2.5 * total, (h, weight))          # an upstream gradient other than 1
    assert abs(total.item() / expected.item() - 1) < 1e-6
    assert (losses - expected_losses).abs().max() < 1e-5
    assert torch.equal(hits, (h @ weight.T).argmax(1) == targets)
    for a, b in zip(got, grads):
        assert ((a.double() - b.double()).norm() / b.double().norm()) < 1e-5


def test_blocks_are_compiled_once_for_all_and_without_graph_breaks():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, idx = build(qk_norm=True), torch.randint(0, 97, (2, 300))           # attention by blocks
    for block in model.blocks:
        block.compile(backend='aot_eager')
    for _ in range(2):
        total, _, _ = model.loss(idx, idx.roll(-1, 1))
        total.backward()
    counters = torch._dynamo.utils.counters
    assert counters['stats']['unique_graphs'] == 1 and not counters['graph_break']
    torch._dynamo.reset()


@pytest.mark.parametrize('T, K', [(257, 1), (300, 2), (320, 4)])
def test_attention_by_blocks_equals_fp64(T, K):
    q, k, v = (torch.randn(2, T, heads, 12, requires_grad=True) for heads in (4, K, K))
    q64, k64, v64 = (t.detach().double().requires_grad_() for t in (q, k, v))
    assert suits_blocks(q, T) and not suits_blocks(q64, T)
    scores = torch.einsum('bthd,bshd->bhts', q64, k64.repeat_interleave(4 // K, 2)) / 12**0.5
    truth = torch.einsum('bhts,bshd->bthd', scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1), v64.repeat_interleave(4 // K, 2))
    got, upstream = attend(q, k, v), torch.randn(2, T, 4, 12)
    assert (got - truth).norm() < 1e-6 * truth.norm()
    for a, b in zip(torch.autograd.grad(got, (q, k, v), upstream), torch.autograd.grad(truth, (q64, k64, v64), upstream.double())):
        assert (a - b).norm() < 1e-6 * b.norm()
    torch.library.opcheck(torch.ops.cheapertraining.blockwise, (q, k, v), test_utils=('test_schema', 'test_faketensor', 'test_autograd_registration'))


PARTS = '''
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
whole = result(h, weight, None)
first = 25 * rank                                   # parts of unequal size
part = result(h, weight[first:25 if rank == 0 else 41], (dist.group.WORLD, first))
for a, b in zip(part, (*whole[:4], whole[4][first:25 if rank == 0 else 41])):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
print('SAME')
leave_ranks(0)
'''


def test_loss_over_parts_of_the_vocabulary_equals_the_whole(tmp_path):
    (tmp_path / 'parts.py').write_text(PARTS)
    done = run_ranks([str(tmp_path / 'parts.py')], 2)
    assert done.returncode == 0 and done.stdout.count('SAME') == 2, done.stdout


def test_tokens_that_are_not_counted_cost_nothing_in_the_output_layer():
    model, idx = build(vocab_size=500), torch.randint(0, 500, (2, 32))
    work, grads = [], []
    for share in (1, 4):
        targets = idx.roll(-1, 1).clone()
        targets.view(-1)[64 // share:] = -1
        weights = torch.rand(idx.shape, generator=torch.Generator().manual_seed(0))
        with FlopCounterMode(display=False) as counter:
            total, losses, hits = model.loss(idx, targets, weights)
        work.append(counter.get_total_flops())
    c = model.config
    assert work[0] - work[1] == 48 * 6 * c.n_embd * c.vocab_size             # the products of 48 tokens, backward ones included
    every, losses_of_all, _ = linear_cross_entropy(model(idx).flatten(0, 1), model.output_weight, targets.flatten(), weights.flatten())
    assert total.item() == pytest.approx(every.item(), rel=1e-6) and torch.allclose(losses.flatten(), losses_of_all) and not losses[1].any()
    for loss in (total, every):
        model.zero_grad()
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*grads, atol=1e-5)
    targets[:] = -1
    total, losses, _ = model.loss(idx, targets)
    model.zero_grad()
    total.backward()
    assert total == 0 and not losses.any() and all(not p.grad.any() for p in model.parameters())


def test_loss_value_in_bf16_is_summed_in_fp32():
    torch.manual_seed(0)
    h, weight, targets = torch.randn(512, 64) * 0.3, torch.randn(1000, 64), torch.randint(0, 1000, (512,))
    exact = reference_loss(h.bfloat16().float(), weight.bfloat16().float(), targets, torch.ones(512))[0] / 512
    total, _, _ = linear_cross_entropy(h.bfloat16(), weight.bfloat16(), targets)
    assert abs(total.item() / 512 - exact.item()) < 2e-3


def test_loss_of_certain_predictions_is_zero_not_infinite():
    h, weight = torch.eye(4) * 300, torch.eye(4)
    total, losses, hits = linear_cross_entropy(h, weight, torch.tensor([0, 1, 2, 0]))
    assert losses[:3].abs().max() == 0 and losses[3] == 300 and hits.tolist() == [True] * 3 + [False] and total == 300


@pytest.mark.parametrize('reduction', ['none', 'row'])
def test_token_losses_carry_a_gradient_of_their_own(monkeypatch, reduction):
    monkeypatch.setattr(loss_module, 'chunk_rows', lambda *_: 7)
    torch.manual_seed(0)
    h, weight = torch.randn(3, 11, 16, dtype=torch.float64, requires_grad=True), torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 50, (3, 11))
    targets[1, 2:] = -1
    plain = F.cross_entropy((h @ weight.T).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction='none').view(3, 11)
    plain = plain if reduction == 'none' else plain.sum(1)
    got = token_losses(h, weight, targets, reduction)
    upstream = torch.randn_like(plain)
    assert torch.allclose(got, plain, atol=1e-12)
    for a, b in zip(torch.autograd.grad((got * upstream).sum(), (h, weight)), torch.autograd.grad((plain * upstream).sum(), (h, weight))):
        assert torch.allclose(a, b, atol=1e-12)


def test_backward_twice_is_an_error_not_a_wrong_gradient():
    h, weight = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    total, _, _ = linear_cross_entropy(h, weight, torch.tensor([1, 2, 3, 4]))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        (2 * total).backward()


@pytest.mark.parametrize('name', ['demo', 'model/mobilellm_140m', 'model/mobilellm_950m', 'model/smollm2_135m', 'model/llama3_8b'])
def test_fresh_model_predicts_uniformly(name):
    # widths of the real models, two layers, a smaller vocabulary: the loss of a fresh model is ln(vocab_size) within 2 %
    c = load_model_config(name, n_layer=2, ffn_dim=64, vocab_size=4096)
    model = GPT(c)
    init_weights(model, 0)
    torch.manual_seed(0)
    idx = torch.randint(0, c.vocab_size, (1, 64))
    with torch.no_grad():
        total, losses, _ = model.loss(idx, torch.randint(0, c.vocab_size, (1, 64)))
    assert abs(total.item() / 64 / math.log(c.vocab_size) - 1) < 0.02


def test_gradients_reach_every_parameter_and_agree_with_finite_differences():
    model = build(dtype=torch.float64, qk_norm=True, qkv_bias=True, layer_repeat=2, n_layer=2)
    idx, targets = torch.randint(0, 97, (2, 9)), torch.randint(0, 97, (2, 9))
    parameters = list(model.parameters())

    def loss():
        return token_losses(model(idx).double(), model.output_weight, targets).double().sum()

    grads = torch.autograd.grad(loss(), parameters)
    torch.manual_seed(0)
    direction = [torch.randn_like(p) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(grads, direction))
    values = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for p, d in zip(parameters, direction):
                p.add_(d, alpha=step)
            values.append(F.cross_entropy((model(idx) @ model.output_weight.T).flatten(0, 1), targets.flatten(), reduction='sum'))
    assert abs((values[0] - values[1]) / 2e-5 / slope - 1) < 1e-5
    assert all(g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize('changes', [{}, dict(layer_repeat=2), dict(qk_norm=True, qkv_bias=True, tie_embeddings=False)])
def test_generation_with_a_cache_equals_running_the_whole_text(changes):
    model = build(**changes)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    idx = torch.randint(0, 97, (2, 7))
    expected = idx
    for _ in range(12):
        expected = torch.cat((expected, (model(expected)[:, -1] @ model.output_weight.T).argmax(-1, keepdim=True)), 1)
    assert torch.equal(model.generate(idx, 12, temperature=0), expected)
    assert torch.equal(model.generate(idx, 12, seed=3), model.generate(idx, 12, seed=3))
    assert not torch.equal(model.generate(idx, 12, seed=3), model.generate(idx, 12, seed=4))


def test_a_second_chunk_of_prompt_sees_the_first():
    model = build()
    c = model.config
    idx = torch.randint(0, 97, (2, 11))
    cache = [torch.zeros(2, 2, 11, c.n_kv_head, c.head_dim) for _ in range(c.n_layer)]
    model(idx[:, :6], cache=cache)
    assert torch.allclose(model(idx[:, 6:], cache=cache, position=6), model(idx)[:, 6:], atol=1e-5)


def test_stop_token_ends_a_row_and_stays():
    model = build()
    out = model.generate(torch.randint(0, 97, (4, 3)), 200, stop_token=5, temperature=5.0, seed=1)
    for row in out[:, 3:].tolist():
        if 5 in row:
            assert set(row[row.index(5):]) == {5}
    assert any(5 in row for row in out[:, 3:].tolist())


def test_document_mask_equals_documents_alone():
    model = build()
    a, b = torch.randint(0, 97, (1, 6)), torch.randint(0, 97, (1, 9))
    together = model(torch.cat((a, b), 1), doc_ids=torch.tensor([[0] * 6 + [1] * 9]))
    assert torch.allclose(together[:, :6], model(a), atol=1e-5)
    assert torch.allclose(together[:, 6:], model(b), atol=1e-5)
    assert not torch.allclose(model(torch.cat((a, b), 1))[:, 6:], model(b), atol=1e-2)


def test_document_boundaries_of_a_stream():
    starts = document_boundaries(torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]))
    assert starts.tolist() == [0, 2, 4, 8] and starts.dtype == torch.int32


def test_init_does_not_depend_on_order_and_differs_by_seed():
    assert torch.equal(build(1).blocks[1].attn.wq.weight, build(1, n_layer=5).blocks[1].attn.wq.weight)
    assert not torch.equal(build(1).embed.weight, build(2).embed.weight)


@pytest.mark.parametrize('changes', [{}, dict(layer_repeat=2), dict(tie_embeddings=False, qk_norm=True, qkv_bias=True)])
def test_flops_equal_what_torch_counts(changes):
    model = build(**changes)
    T = 32
    idx, targets = torch.randint(0, 97, (1, T)), torch.randint(0, 97, (1, T))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        F.cross_entropy((model(idx) @ model.output_weight.T).flatten(0, 1), targets.flatten()).backward()
    # the counter sees the MATH attention's products: 2 forward and 4 backward, which is the 12 H D T of the formula
    assert counter.get_total_flops() == flops_per_token(model.config, T) * T


def load_model_config(name, **changes):
    """The ModelConfig of a config file, read as train.py reads it."""
    scope = {'__file__': str(ROOT / 'train.py')}
    knobs = configurator.parse_knobs((ROOT / 'train.py').read_text(), 'train.py')
    code = (ROOT / 'train.py').read_text().split('config = configure(')[0]
    exec(compile(code, 'train.py', 'exec'), scope)
    assert set(knobs) <= set(scope)
    config = configurator.configure(scope, [str(ROOT / 'config' / f'{name}.py')], verbose=False)
    fields = ModelConfig.__dataclass_fields__
    return ModelConfig(**{**{key: config[key] for key in fields}, **changes})


@pytest.mark.parametrize('name, millions, tolerance', [
    ('mobilellm_140m', 140.25, 0.001), ('mobilellm_360m', 359.4, 0.001), ('mobilellm_950m', 949.7, 0.001),
    ('mobilellm_7b', 7_000, 0.05), ('mobilellm_70b', 70_000, 0.05), ('mobilellm_671b', 671_000, 0.01),
    ('smollm2_135m', 134.515008, 1e-9), ('smollm2_360m', 361.82112, 1e-9), ('llama3_8b', 8030.261248, 1e-9)])
def test_every_model_has_the_published_number_of_parameters(name, millions, tolerance):
    c = load_model_config(f'model/{name}')
    counts = count_parameters(c)
    assert abs(counts['total'] / 1e6 / millions - 1) <= tolerance
    with torch.device('meta'):
        model = GPT(c)
    assert sum(p.numel() for p in model.parameters()) == counts['total']
    embedding = model.embed.weight.numel() * (1 if c.tie_embeddings else 2)
    assert counts['embedding'] == embedding and counts['non_embedding'] == counts['total'] - embedding


@pytest.mark.parametrize('changes, part', [
    (dict(n_embd=50), 'n_embd'), (dict(n_kv_head=3), 'n_kv_head'), (dict(n_embd=20), 'odd'), (dict(n_layer=0), 'n_layer'),
    (dict(rope_scaling=dict(factor=8.0)), 'rope_scaling')])
def test_impossible_shapes_are_refused(changes, part):
    with pytest.raises(configurator.BadInput, match=part):
        ModelConfig(**{**TINY, **changes})
