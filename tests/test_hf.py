"""Import, logits and export against transformers, and every kind of broken folder."""

import json
import shutil
import sys

from tests.conftest import need

need('safetensors')

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from configurator import BadInput
from data import MixtureLoader, Source
from lib import checkpoint, hf
from lib.byte_level import GPT2_PATTERN
from lib.chat import JINJA, encode_prompt
from lib.families import make_config
from lib.tokenizer import load_tokenizer, make_tokenizer, save_tokenizer, save_tokenizer_json
from model import GPT, ModelConfig, init_weights
from tests.conftest import ROOT, run, sign_again, train

transformers = pytest.importorskip('transformers')
LLAMA3_ROPE = dict(rope_type='llama3', rope_theta=500000.0, factor=8.0, low_freq_factor=1.0)
LLAMA3_ROPE |= dict(high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = dict(rope_type='yarn', rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)
SIZES = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3)
SIZES |= dict(num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=128)
LLAMA4 = dict(head_dim=8, intermediate_size_mlp=72, moe_layers=[], no_rope_layers=[1] * 3)
LLAMA4 |= dict(attn_temperature_tuning=False)
MOE = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32)
PLAIN = dict(rope_type='default', rope_theta=1e5)
CASES = [
    ('Llama', dict(tie_word_embeddings=True)),
    ('Llama', dict(num_key_value_heads=6, rope_parameters=PLAIN)),
    ('Llama', dict(head_dim=20, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)),
    ('Llama', dict(rope_parameters=dict(rope_type='linear', factor=2.5, rope_theta=10000.0))),
    ('Llama', dict(rope_parameters=YARN)),
    ('Qwen2', dict(tie_word_embeddings=True)),
    ('Qwen2', dict(rope_parameters={**YARN, 'beta_fast': 8.0, 'attention_factor': 1.25})),
    ('Qwen3', dict(head_dim=16)),
    ('Qwen3', dict(head_dim=8, tie_word_embeddings=True, num_key_value_heads=1)),
    ('Llama4', dict(tie_word_embeddings=True)),
    ('Llama4', dict(use_qk_norm=False)),
    ('Llama4', dict(use_qk_norm=False, rope_parameters=YARN)),
    ('Llama4', dict(rope_parameters={**YARN, 'attention_factor': 1.0})),
    ('Llama4', dict(rope_parameters=LLAMA3_ROPE)),
    ('Mistral', dict(sliding_window=None)),
    ('Mistral', dict(sliding_window=128, head_dim=16, tie_word_embeddings=True)),
    ('SmolLM3', dict(num_hidden_layers=5)),
    ('SmolLM3', dict(no_rope_layers=[0, 1, 0], tie_word_embeddings=False, rope_parameters=YARN)),
    ('SmolLM3', dict(no_rope_layer_interval=2, rope_parameters=LLAMA3_ROPE)),
    ('Qwen3Moe', dict(num_experts_per_tok=3, norm_topk_prob=True, mlp_only_layers=[0])),
    ('Qwen3Moe', dict(num_experts_per_tok=1, tie_word_embeddings=True, head_dim=16)),
    ('Qwen3Moe', dict(norm_topk_prob=True, decoder_sparse_step=3)),
    ('Qwen3Moe', dict(num_experts=0)),
]
# As which class a model without its config.json is exported, if it is another one.
EXPORTED_AS = {'Llama4': 'Qwen3ForCausalLM', 'Mistral': 'LlamaForCausalLM'}


def their_model(family, changes, folder, dtype=torch.float32, **options):
    """A random model of transformers, with biases and norms that matter, saved into `folder`."""
    config_name = 'Llama4TextConfig' if family == 'Llama4' else f'{family}Config'
    sizes = {**SIZES, **changes}
    if family == 'Llama4':
        sizes = {**SIZES, **LLAMA4, **changes}
    if family == 'Qwen3Moe':
        sizes = {**SIZES, **MOE, **changes}
    if family == 'SmolLM3':
        sizes |= dict(pad_token_id=0, bos_token_id=0, eos_token_id=1)
    config = getattr(transformers, config_name)(**sizes)
    torch.manual_seed(len(str(changes)))
    model = getattr(transformers, f'{family}ForCausalLM')(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if 'norm' in name or 'bias' in name:
                parameter.add_(0.3 * noise)
            else:
                parameter.mul_(4)
    model.save_pretrained(folder, **options)
    return model


def load_theirs(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def config_of(folder):
    return hf.find_model(str(folder))['model']


def our_logits(path, idx, dtype=torch.float32):
    model, _, _ = hf.open_model(str(path), torch.device('cpu'), dtype, needs_tokenizer=False)
    with torch.no_grad():
        return model(idx) @ model.output_weight.T


@pytest.mark.parametrize('family, changes', CASES)
def test_import_and_export_equal_transformers(tmp_path, family, changes):
    theirs = their_model(family, changes, tmp_path / 'hf')
    idx = torch.randint(0, 97, (2, 60))
    with torch.no_grad():
        expected = theirs(idx).logits
    assert expected.std() > 0.1
    hf.import_model(str(tmp_path / 'hf'), None, str(tmp_path / 'ours'))
    hf.export_model(str(tmp_path / 'ours'), str(tmp_path / 'back'), 'auto', None)
    before = load_file(tmp_path / 'hf' / 'model.safetensors')
    after = load_file(tmp_path / 'back' / 'model.safetensors')
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    # Without their config.json, as in a run of ours, a new one is written.
    state = tmp_path / 'ours' / 'ckpt' / 'step_000000' / 'state.json'
    state.write_text(json.dumps({**json.loads(state.read_text()), 'hf': None}))
    sign_again(state.parent)
    hf.export_model(str(tmp_path / 'ours'), str(tmp_path / 'new'), 'auto', None)
    loaded, about = load_theirs(tmp_path / 'new', output_loading_info=True)
    for fault in ('missing_keys', 'unexpected_keys', 'mismatched_keys'):
        assert not about[fault]
    with torch.no_grad():
        assert (loaded.eval()(idx).logits - expected).abs().max() < 1e-5
    assert config_of(tmp_path / 'back') == config_of(tmp_path / 'hf')
    if changes.get('use_qk_norm', True) and 0 not in changes.values():
        assert type(loaded).__name__ == EXPORTED_AS.get(family, f'{family}ForCausalLM')
    for folder in ('hf', 'ours', 'new'):
        assert (our_logits(tmp_path / folder, idx) - expected).abs().max() < 1e-5


def test_sharded_files_and_bfloat16(tmp_path, monkeypatch):
    options = dict(dtype=torch.bfloat16, max_shard_size='40KB')
    theirs = their_model('Llama', dict(tie_word_embeddings=False), tmp_path / 'hf', **options)
    assert len(list((tmp_path / 'hf').glob('*.safetensors'))) > 3
    monkeypatch.setattr(hf, 'SHARD_BYTES', 30_000)
    hf.import_model(str(tmp_path / 'hf'), None, str(tmp_path / 'ours'))
    hf.export_model(str(tmp_path / 'ours'), str(tmp_path / 'back'), 'auto', None)
    assert len(list((tmp_path / 'back').glob('*.safetensors'))) > 3
    loaded = load_theirs(tmp_path / 'back', dtype='auto')
    assert loaded.dtype == torch.bfloat16
    for (name, a), (_, b) in zip(theirs.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_shared_layers_are_written_out(tmp_path):
    """transformers has no code for MobileLLM with shared layers, but a Llama with every layer twice
    is the same network."""
    theirs = their_model('Llama', dict(tie_word_embeddings=True), tmp_path / 'hf')
    config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
    config |= dict(model_type='mobilellm', architectures=['MobileLLMForCausalLM'])
    config |= dict(layer_sharing=True, share_embedding=True, tie_word_embeddings=False)
    config |= dict(rope_theta=10000.0)
    del config['rope_parameters']
    (tmp_path / 'hf' / 'config.json').write_text(json.dumps(config))
    twice = []
    for layer in theirs.model.layers:
        twice += [layer, layer]
    theirs.model.layers = torch.nn.ModuleList(twice)
    theirs.config.num_hidden_layers = 6
    idx = torch.randint(0, 97, (2, 30))
    with torch.no_grad():
        expected = theirs(idx, use_cache=False).logits
    assert (our_logits(tmp_path / 'hf', idx) - expected).abs().max() < 1e-5
    hf.import_model(str(tmp_path / 'hf'), None, str(tmp_path / 'ours'))
    hf.export_model(str(tmp_path / 'ours'), str(tmp_path / 'back'), 'auto', None)
    with torch.no_grad():
        logits = load_theirs(tmp_path / 'back').eval()(idx).logits
    assert (logits - expected).abs().max() < 1e-5


def test_a_run_is_exported_with_its_tokenizer(tmp_path, trained):
    text = "Ünïcode 12345 words\n\n  and   blanks, don't!\r\n 1  2 "
    hf.export_model(str(trained), str(tmp_path / 'hf'), 'auto', 'chatml')
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    ours = load_tokenizer(str(trained))
    assert tokenizer(text).input_ids == [ours.bos_id, *ours.encode(text)]
    assert tokenizer.decode(ours.encode(text)) == text
    messages = [dict(role='system', content='Be brief.')]
    messages.append(dict(role='user', content='  Hi <there>\n'))
    options = dict(add_generation_prompt=True, return_dict=False)
    rendered = tokenizer.apply_chat_template(messages, **options)
    assert rendered == encode_prompt(ours, messages, 'chatml')
    assert rendered == encode_prompt(ours, messages, JINJA['chatml'])
    loaded = load_theirs(tmp_path / 'hf')
    idx = torch.randint(0, 60, (1, 16))
    with torch.no_grad():
        assert (loaded.eval()(idx).logits - our_logits(trained, idx)).abs().max() < 1e-5
    assert loaded.generation_config.eos_token_id == [0, 2]


def test_init_from_a_hugging_face_folder_on_one_and_two_ranks(tmp_path, tiny_data):
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    their_model('Qwen3', dict(**sizes, tie_word_embeddings=True), tmp_path / 'hf')
    hf.import_model(str(tmp_path / 'hf'), None, str(tmp_path / 'ours'))
    knobs = dict(qk_norm=True, norm_eps=1e-6, rope_theta=10000.0, max_steps=3, batch_size=1)

    def losses(name, source, ranks):
        start = tmp_path / source
        by_step = train(tmp_path / name, tiny_data, ranks=ranks, init_from=start, **knobs)
        return [record['train/loss'] for record in by_step.values() if 'train/loss' in record]

    first = losses('a', 'hf', 1)
    assert len(first) == 3
    assert losses('b', 'ours', 1) == first
    assert losses('c', 'hf', 2) == pytest.approx(first, rel=1e-5)
    weights = {'a': 0.75, 'b': 0.25}
    sources = [Source(str(tiny_data), name, 'train', 16, 1337, 64) for name in weights]
    loader = MixtureLoader(sources, weights, 1337)
    index, cursors = loader.next_batch(4)
    rows = torch.from_numpy(loader.read(index, cursors)).long()
    with torch.no_grad():
        loss = load_theirs(tmp_path / 'hf').eval()(rows, labels=rows).loss
    assert loss.item() == pytest.approx(first[0], rel=1e-5)
    with pytest.raises(BadInput, match='imported model'):
        train(tmp_path / 'ours', tiny_data, resume=True, **knobs)


LLAMA4_TYPE = dict(model_type='llama4_text', intermediate_size_mlp=80)
BROKEN = [
    (dict(model_type='gemma3'), r"model_type 'gemma3'.*llama, qwen2"),
    (dict(hidden_act='gelu'), "hidden_act = 'gelu'"),
    (dict(attention_bias=True), 'attention_bias = True'),
    (dict(hidden_size=None), "no field 'hidden_size'"),
    (dict(rope_parameters=dict(rope_type='dynamic', factor=2.0)), "rope_type 'dynamic'"),
    (dict(quantization_config={}), 'quantization_config'),
    (dict(num_hidden_layers=4), r'missing: .*layers\.3.*\(9\)'),
    (dict(num_hidden_layers=2), r'not known: .*layers\.2.*\(9\)'),
    (dict(intermediate_size=96), r'gate_proj\.weight has shape \[80, 48\], .* \[96, 48\]'),
    (dict(dtype='float8'), "dtype 'float8'"),
    (dict(**LLAMA4_TYPE, moe_layers=[], no_rope_layers=[1, 1, 0]), 'no_rope_layers'),
    (LLAMA4_TYPE, 'no_rope_layers|moe_layers'),
    (dict(**LLAMA4_TYPE, moe_layers=[], no_rope_layers=[1] * 3, rope_parameters=YARN),
     'attention_factor other than 1.0'),
]


@pytest.mark.parametrize('changes, message', BROKEN)
def test_configs_and_tensors_that_do_not_fit(tmp_path, changes, message):
    their_model('Llama', {}, tmp_path / 'hf')
    path = tmp_path / 'hf' / 'config.json'
    config = json.loads(path.read_text()) | changes
    if changes == dict(hidden_size=None):
        del config['hidden_size']
    path.write_text(json.dumps(config))
    with pytest.raises(BadInput, match=message):
        hf.import_model(str(tmp_path / 'hf'), None, str(tmp_path / 'ours'))
    assert not (tmp_path / 'ours' / 'ckpt').exists()


def test_damaged_files_and_folders(tmp_path):
    def expect(message):
        with pytest.raises(BadInput, match=message):
            hf.open_model(str(tmp_path / 'hf'), 'cpu', torch.float32, needs_tokenizer=False)

    their_model('Llama', {}, tmp_path / 'hf', max_shard_size='40KB')
    first = sorted((tmp_path / 'hf').glob('*.safetensors'))[0]
    first.write_bytes(first.read_bytes()[:-100])
    expect('damaged or cut off')
    first.unlink()
    expect(f'{first.name} is missing')
    for path in (tmp_path / 'hf').glob('*.safetensors*'):
        path.unlink()
    expect('no .safetensors file')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(BadInput, match='neither a complete checkpoint'):
        hf.find_model(str(tmp_path / 'empty'))


def test_a_tokenizer_larger_than_the_model(tmp_path, trained):
    their_model('Llama', dict(vocab_size=20), tmp_path / 'hf')
    for name in ('tokenizer.tiktoken', 'tokenizer.tiktoken.json'):
        shutil.copy(trained / name, tmp_path / 'hf' / name)
    with pytest.raises(BadInput, match='the tokenizer has .* they do not belong together'):
        hf.open_model(str(tmp_path / 'hf'), 'cpu', torch.float32)


def test_the_command_line(tmp_path):
    their_model('Llama', {}, tmp_path / 'hf')
    theirs = f'import --model={tmp_path}/hf --out={tmp_path}/ours'
    ours = f'export --ckpt={tmp_path}/ours --out={tmp_path}/back'
    for arguments, code, message in [
        (theirs, 0, 'llama'),
        ('import --out=x', 2, 'tools/hf.py import'),
        (theirs, 2, 'already holds'),
        (ours + ' --dtype=bfloat16', 0, 'bfloat16'),
        (ours, 2, 'not empty'),
    ]:
        result = run([sys.executable, 'tools/hf.py', *arguments.split()])
        output = result.stdout + result.stderr
        assert result.returncode == code, output
        assert message in output
        assert 'Traceback' not in output
    with safe_open(tmp_path / 'back' / 'model.safetensors', framework='pt') as f:
        assert all(f.get_slice(name).get_dtype() == 'BF16' for name in f.keys())


def test_a_vocabulary_that_lacks_bytes(tmp_path):
    """SmolLM2 has no token for some control characters: `tokenizers` drops them, and so do we."""
    tokenizers = pytest.importorskip('tokenizers')
    ranks = {bytes([b]): b + 1 for b in range(256) if b not in (0x13, 0x14, 0xF1)}
    ours = make_tokenizer('x', ranks, GPT2_PATTERN, {'<|endoftext|>': 0}, '<|endoftext|>')
    save_tokenizer_json(str(tmp_path), ours, 64)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    for text in ('a\x13b', '\x14\x13', 'é\U000f1234 z', 'plain'):
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ours.encode_document(text).tolist() == expected
    assert ours.vocab_size == len(ours.token_bytes()) == 257
    save_tokenizer(str(tmp_path), ours)
    again = load_tokenizer(str(tmp_path))
    assert again.fingerprint == ours.fingerprint
    assert again.encode('a\x13b') == ours.encode('a\x13b')


@pytest.mark.parametrize('name', ['out/my run', 'a--b/c', 'tests/x', '../nothing', 'no'])
def test_what_is_neither_a_folder_nor_a_model(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(BadInput, match='neither a folder here nor a model'):
        hf.find_model(name)


@pytest.fixture(scope='module')
def small_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp('small')
    their_model('Llama', {}, folder / 'hf')
    return folder / 'hf'


def opened(folder):
    return hf.open_model(str(folder), 'cpu', torch.float32, needs_tokenizer=False)


@pytest.mark.parametrize('changes, message', [
    (dict(hidden_size='48'), "hidden_size must be int .*, got str '48'"),
    (dict(hidden_size=None), 'must be int, got NoneType'),
    (dict(hidden_size=-48), 'hidden_size = -48 must be at least 1'),
    (dict(hidden_size=48.5), 'hidden_size must be int'),
    (dict(num_attention_heads=0), 'num_attention_heads = 0 must be at least 1'),
    (dict(num_attention_heads=5, head_dim=None), 'not a multiple of n_head = 5'),
    (dict(num_key_value_heads=4), 'not a multiple of n_kv_head = 4'),
    (dict(num_hidden_layers=10**9), 'must be at most'),
    (dict(vocab_size=-1), 'vocab_size = -1'),
    (dict(vocab_size=10**13), 'needs .* GiB, and .* CPU has .* GiB'),
    (dict(head_dim=15), 'head_dim = 15 is odd'),
    (dict(rope_scaling=[1]), 'rope_scaling must be dict'),
    (dict(rope_scaling='linear'), 'rope_scaling must be dict'),
    (dict(rope_parameters=dict(rope_type='linear')), "has no field 'factor'"),
    (dict(rope_parameters=dict(rope_type='linear', factor='two')), 'factor must be float'),
    (dict(rope_parameters=dict(rope_type='linear', factor=-2)), 'factor = -2.0 must be a number'),
    (dict(rope_parameters={**YARN, 'original_max_position_embeddings': 0}), '_embeddings = 0.0'),
    (dict(rope_parameters=dict(rope_theta=0)), 'rope_theta = 0.0 must be a number above 0'),
    (dict(rope_parameters=dict(rope_theta='big')), 'rope_theta must be float'),
    (dict(rms_norm_eps=-1.0), 'rms_norm_eps = -1.0'),
    (dict(rms_norm_eps=float('nan')), 'rms_norm_eps = nan'),
    (dict(layer_types=5), 'layer_types must be list'),
    (dict(max_position_embeddings='long'), 'max_position_embeddings must be int'),
    (dict(tie_word_embeddings='no'), 'tie_word_embeddings must be bool'),
    (dict(model_type=['llama']), "model_type '.'llama'.' is not supported"),
    (dict(tie_word_embeddings=None), 'tie_word_embeddings must be bool'),
    (dict(architectures=['LlamaForSequenceClassification']), "architectures = .'LlamaForSeq"),
    (dict(architectures=['Qwen2ForCausalLM']), "only .'LlamaForCausalLM'"),
    (dict(architectures='LlamaForCausalLM'), 'architectures must be list'),
    (dict(attention_dropout='no'), 'attention_dropout must be float'),
    (dict(pretraining_tp='two'), 'pretraining_tp must be int'),
    (dict(torch_dtype='bf16'), "torch_dtype 'bf16' is not supported"),
    (dict(dtype=16), 'dtype must be str'),
    (dict(mlp_bias=True), 'mlp_bias = True is not supported, only False'),
    (dict(hidden_act=None), 'hidden_act = None'),
    (dict(attn_logit_softcapping=30.0), 'attn_logit_softcapping = 30.0'),
    (dict(logit_scale=0.5), 'logit_scale = 0.5 is not supported, only 1.0'),
    (dict(rope_interleaved=True), 'rope_interleaved = True'),
    (dict(sliding_window=64), 'sliding_window = 64 is not supported'),
    (dict(model_type='mistral'), None),
    (dict(model_type='mistral', max_position_embeddings=8192), 'sliding_window = 4096 is not'),
    (dict(model_type='mistral', sliding_window='no'), 'sliding_window must be int'),
    (dict(layer_types=['full_attention', 'sliding_attention']), "'sliding_attention'"),
    (dict(rope_parameters=dict(full_attention=PLAIN)), "'full_attention' in the parameters"),
    (dict(rope_parameters=dict(**PLAIN, llama_4_scaling_beta=0.1)), 'llama_4_scaling_beta'),
    (dict(rope_scaling=dict(type='linear', factor=2.0)), 'contradict each other'),
    (dict(model_type='smollm3', no_rope_layers=[1, 1]), 'no_rope_layers must have a 0 or a 1'),
    (dict(model_type='smollm3', no_rope_layers=[1, 'a', 1]), 'no_rope_layers must have'),
    (dict(model_type='smollm3', no_rope_layers=5), 'no_rope_layers must be list'),
    (dict(model_type='smollm3', num_hidden_layers=None), 'num_hidden_layers must be int'),
    (dict(model_type='qwen3_moe'), 'norm_topk_prob = False is not supported, only True'),
    (dict(model_type='qwen3_moe', norm_topk_prob='x'), 'norm_topk_prob must be bool'),
    (dict(model_type='qwen3_moe', norm_topk_prob=True, mlp_only_layers=[1]), 'mlp_only_layers'),
    (dict(model_type='qwen3_moe', norm_topk_prob=True, num_experts=4, num_experts_per_tok=5),
     'n_expert = 4 needs n_expert_active'),
])
def test_an_odd_config_is_named_by_its_field(small_model, tmp_path, changes, message):
    config = json.loads((small_model / 'config.json').read_text())
    if 'model_type' in changes:
        config['architectures'] = None
    (tmp_path / 'config.json').write_text(json.dumps({**config, **changes}))
    # The folder holds no weights, which is found after everything about the config.
    with pytest.raises(BadInput, match=message or 'no .safetensors file'):
        opened(tmp_path)


@pytest.mark.parametrize('name, content, message', [
    ('config.json', b'[]', 'no JSON object'),
    ('config.json', b'{"model_type"', 'no valid JSON'),
    ('config.json', b'\xff\xfe', 'no valid JSON'),
    ('model.safetensors', b'', 'damaged or cut off'),
    ('model.safetensors', b'some text ' * 20, 'damaged or cut off'),
    ('model.safetensors.index.json', b'{}', 'has no weight_map'),
    ('model.safetensors.index.json', b'[]', 'has no weight_map'),
    ('model.safetensors.index.json', b'{"weight_map": {}}', 'has no weight_map'),
    ('model.safetensors.index.json', b'{"weight_map": {"a": 5}}', 'has no weight_map'),
    ('model.safetensors.index.json', b'{"weight_map": {"a": "x.safetensors"}}', 'x.s.* is missing'),
    ('model.safetensors.index.json', b'{"weight_map": {"a": "../x.safetensors"}}', 'weight_map'),
    ('tokenizer.json', b'{"model"', 'no valid JSON'),
    ('tokenizer.json', b'[]', 'no JSON object'),
    ('tokenizer_config.json', b'[]', 'no JSON object'),
    ('tokenizer_config.json', b'{"chat_template": 5}', 'chat_template must be text'),
    ('generation_config.json', b'[]', 'no JSON object'),
    ('generation_config.json', b'\xff', 'no valid JSON'),
])
def test_a_damaged_file_of_a_model(small_model, tmp_path, name, content, message):
    shutil.copytree(small_model, tmp_path / 'hf')
    (tmp_path / 'hf' / name).write_bytes(content)
    with pytest.raises(BadInput, match=message):
        opened(tmp_path / 'hf')


@pytest.mark.parametrize('name, tensor, message', [
    ('model.norm.weight', torch.ones(47), r'has shape .47., the config asks for .48.'),
    ('model.norm.weight', torch.ones(48, dtype=torch.int64), 'has dtype I64'),
    ('model.norm.weight', torch.ones(48).to(torch.float8_e4m3fn), 'has dtype F8_E4M3'),
    ('model.norm.weight', None, 'missing: model.norm.weight'),
    ('more.weight', torch.ones(3), 'not known: more.weight'),
])
def test_tensors_that_do_not_fit_are_named(small_model, tmp_path, name, tensor, message):
    shutil.copytree(small_model, tmp_path / 'hf')
    path = tmp_path / 'hf' / 'model.safetensors'
    tensors = {**load_file(path), name: tensor}
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    with pytest.raises(BadInput, match=message):
        opened(tmp_path / 'hf')
    save_file(load_file(small_model / 'model.safetensors'), path)
    shutil.copy(path, tmp_path / 'hf' / 'copy.safetensors')
    with pytest.raises(BadInput, match='is in two files'):
        opened(tmp_path / 'hf')


# -- which weights a folder holds ------------------------------------------------------------------


def copy_model(small_model, folder, **changes):
    """A copy of a model, with changes to its config.json. Returns (path, its tensors)."""
    shutil.copytree(small_model, folder)
    path = folder / 'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return load_file(folder / 'model.safetensors')


def test_links_and_folders_that_are_no_weights(small_model, tmp_path):
    copy_model(small_model, tmp_path / 'hf')
    (tmp_path / 'hf/a.safetensors').symlink_to('nowhere')
    (tmp_path / 'hf/b.safetensors').mkdir()
    opened(tmp_path / 'hf')
    (tmp_path / 'hf/model.safetensors').unlink()
    with pytest.raises(BadInput, match='no .safetensors file'):
        opened(tmp_path / 'hf')


def write_index(folder, weight_map):
    content = json.dumps(dict(metadata={}, weight_map=weight_map))
    (folder / 'model.safetensors.index.json').write_text(content)


def assert_as_transformers(folder, said='', capsys=None):
    theirs = load_theirs(folder, dtype=torch.float32).eval()
    idx = torch.randint(0, 97, (1, 40))
    with torch.no_grad():
        expected = theirs(idx).logits
    assert (our_logits(folder, idx) - expected).abs().max() < 1e-5
    assert said in capsys.readouterr().out


@pytest.mark.parametrize('name', ['adapter_model', 'optimizer', 'consolidated'])
def test_other_files_beside_the_weights_are_passed_over(small_model, tmp_path, capsys, name):
    copy_model(small_model, tmp_path / 'hf')
    save_file({'layers.0.attention.wq.weight': torch.zeros(3)}, tmp_path / f'hf/{name}.safetensors')
    assert_as_transformers(tmp_path / 'hf', f'{name}.safetensors is not part of the model', capsys)
    # So they are beside an index.
    (tmp_path / 'hf/model.safetensors').rename(tmp_path / 'hf/model-00001-of-00001.safetensors')
    tensors = load_file(tmp_path / 'hf/model-00001-of-00001.safetensors')
    write_index(tmp_path / 'hf', dict.fromkeys(tensors, 'model-00001-of-00001.safetensors'))
    assert_as_transformers(tmp_path / 'hf', f'{name}.safetensors is not part of the model', capsys)


def test_weights_that_could_be_one_or_the_other_are_refused(small_model, tmp_path):
    folder = tmp_path / 'hf'
    tensors = copy_model(small_model, folder)
    names = sorted(tensors)
    halves = {'model-00001-of-00002.safetensors': names[:9]}
    halves['model-00002-of-00002.safetensors'] = names[9:]

    def write_halves():
        for file, part in halves.items():
            save_file({name: tensors[name] for name in part}, folder / file)

    def expect(*parts):
        with pytest.raises(BadInput) as caught:
            opened(folder)
        assert all(part in str(caught.value) for part in parts), caught.value

    weight_map = {name: file for file, part in halves.items() for name in part}
    # An older index and its shards beside a single file.
    write_halves()
    write_index(folder, weight_map)
    expect('in two files, model-0000', 'model.safetensors')
    # The shards are whole without it, with an index and without.
    (folder / 'model.safetensors').unlink()
    opened(folder)
    (folder / 'model.safetensors.index.json').unlink()
    opened(folder)
    # An index that is not of these files.
    write_index(folder, weight_map | {names[0]: 'model-00002-of-00002.safetensors'})
    expect(f'{names[0]} is in model-00002-of-00002', 'but model-00001-of-00002.safetensors has it')
    write_index(folder, weight_map | {'more.weight': 'model-00001-of-00002.safetensors'})
    expect('more.weight is in model-00001-of-00002', 'no file has it')
    # Shards of another split.
    write_index(folder, weight_map)
    shutil.copy(
        folder / 'model-00001-of-00002.safetensors', folder / 'model-00001-of-00003.safetensors')
    expect('in two files, model-00001-of-00002.safetensors and model-00001-of-00003.safetensors')
    # Only one of the shards, without an index.
    for file in ('model.safetensors.index.json', 'model-00001-of-00003.safetensors'):
        (folder / file).unlink()
    (folder / 'model-00002-of-00002.safetensors').unlink()
    expect('missing: ')


@pytest.mark.parametrize('tied, stored, is_tied, said', [
    (True, ('embed', 'other head'), False, 'config.json ties the output weight'),
    (True, ('embed', 'same head'), True, ''),
    (True, ('embed', 'same head in bfloat16'), False, 'config.json ties the output weight'),
    (True, ('embed',), True, ''),
    (True, ('same head',), True, ''),
    (False, ('embed', 'same head'), False, ''),
    (False, ('embed', 'other head'), False, ''),
    (False, ('embed',), None, 'missing: lm_head.weight .* set tie_word_embeddings to true'),
    (False, ('other head',), None, 'missing: model.embed_tokens.weight'),
    (True, (), None, 'missing: model.embed_tokens.weight'),
    (True, ('embed', 'short head'), None, 'lm_head.weight has shape .50, 48.'),
])
def test_a_model_is_tied_as_its_tensors_are(small_model, tmp_path, capsys, tied, stored, is_tied,
                                            said):
    folder = tmp_path / 'hf'
    tensors = copy_model(small_model, folder, tie_word_embeddings=tied)
    embed = tensors.pop('model.embed_tokens.weight')
    forms = {
        'embed': ('model.embed_tokens.weight', embed),
        'other head': ('lm_head.weight', tensors.pop('lm_head.weight')),
        'same head': ('lm_head.weight', embed.clone()),
        'same head in bfloat16': ('lm_head.weight', embed.bfloat16()),
        'short head': ('lm_head.weight', embed[:50].clone())}
    tensors |= dict(forms[name] for name in stored)
    save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
    if is_tied is None:
        with pytest.raises(BadInput, match=said):
            opened(folder)
        return
    assert hf.find_model(str(folder))['model'].tie_embeddings == is_tied
    assert_as_transformers(folder, said, capsys)
    # So is it after import and export.
    hf.import_model(str(folder), None, str(tmp_path / 'ours'), 'float32')
    hf.export_model(str(tmp_path / 'ours'), str(tmp_path / 'back'), 'auto', None)
    assert json.loads((tmp_path / 'back/config.json').read_text())['tie_word_embeddings'] == is_tied
    idx = torch.arange(40)[None]
    difference = our_logits(tmp_path / 'ours', idx) - our_logits(folder, idx)
    assert difference.abs().max() == 0
    assert_as_transformers(tmp_path / 'back', '', capsys)


@pytest.mark.parametrize('stored, config, asked, dtype, said', [
    ('float32', 'bfloat16', 'auto', 'float32', 'config.json says bfloat16, but the files hold f'),
    ('bfloat16', 'float16', 'auto', 'bfloat16', 'config.json says float16, but'),
    ('float16', None, 'auto', 'float16', ''),
    ('bfloat16', 'bfloat16', 'float32', 'float32', 'converted to float32, as asked'),
    ('float32', 'float32', 'bfloat16', 'bfloat16', 'converted to bfloat16, as asked'),
    ('float64', None, 'auto', 'float32', 'the files hold float64: all weights are stored in f'),
    ('bfloat16 norm', 'float32', 'auto', 'float32', 'bfloat16 (1 tensors, such as model.norm.w'),
])
def test_an_import_keeps_the_dtype_of_the_files(
        small_model, tmp_path, capsys, stored, config, asked, dtype, said):
    tensors = copy_model(small_model, tmp_path / 'hf', dtype=config)
    for name, tensor in tensors.items():
        if stored != 'bfloat16 norm' or name == 'model.norm.weight':
            tensors[name] = tensor.to(getattr(torch, stored.split()[0]))
    # Old files hold these beside all weights.
    tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = torch.ones(4)
    save_file(tensors, tmp_path / 'hf/model.safetensors', metadata={'format': 'pt'})
    hf.import_model(str(tmp_path / 'hf'), None, str(tmp_path / 'ours'), asked)
    out = capsys.readouterr().out
    assert said in out
    assert ('the files hold' in out) == bool(said)
    hf.export_model(str(tmp_path / 'ours'), str(tmp_path / 'back'), 'auto', None)
    assert json.loads((tmp_path / 'back/config.json').read_text())['dtype'] == dtype
    after = load_file(tmp_path / 'back/model.safetensors')
    for name, tensor in after.items():
        assert torch.equal(tensor, tensors[name].to(getattr(torch, dtype)))


@pytest.mark.parametrize('value, asked, message', [
    (1e5, 'float16', r'up_proj.weight reaches 1e.05, which is beyond the range of torch.float16'),
    (float('nan'), 'auto', 'up_proj.weight holds NaN or infinite values'),
    (float('-inf'), 'bfloat16', 'up_proj.weight holds NaN or infinite values'),
])
def test_weights_that_are_not_finite_are_named(small_model, tmp_path, value, asked, message):
    tensors = copy_model(small_model, tmp_path / 'hf')
    tensors['model.layers.1.mlp.up_proj.weight'][3, 5] = value
    save_file(tensors, tmp_path / 'hf/model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(BadInput, match=message):
        hf.import_model(str(tmp_path / 'hf'), None, str(tmp_path / 'ours'), asked)
    if value != 1e5:
        with pytest.raises(BadInput, match=message):
            opened(tmp_path / 'hf')
        return
    hf.import_model(str(tmp_path / 'hf'), None, str(tmp_path / 'ours'))
    with pytest.raises(BadInput, match='w_up.weight holds .* beyond the range of float16'):
        hf.export_model(str(tmp_path / 'ours'), str(tmp_path / 'back'), 'float16', None)
    assert not (tmp_path / 'back').exists()


def test_experts_in_the_stacked_form_of_transformers_5(tmp_path):
    theirs = their_model(
        'Qwen3Moe', dict(norm_topk_prob=True), tmp_path / 'hf', save_original_format=False)
    assert 'model.layers.0.mlp.experts.gate_up_proj' in load_file(tmp_path / 'hf/model.safetensors')
    idx = torch.randint(0, 97, (2, 30))
    with torch.no_grad():
        expected = theirs(idx).logits
    assert (our_logits(tmp_path / 'hf', idx) - expected).abs().max() < 1e-5


def test_layers_without_positions_generate_as_transformers(tmp_path):
    theirs = their_model('SmolLM3', dict(num_hidden_layers=4), tmp_path / 'hf')
    prompt = torch.randint(0, 97, (1, 9))
    expected = theirs.generate(
        prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    model = opened(tmp_path / 'hf')[0]
    assert model.config.nope_layers == [3]
    assert torch.equal(model.generate(prompt, 20, temperature=0), expected)
    # Padding on the left changes nothing, with positions or without.
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt], 1)
    first = torch.tensor([4])
    tokens = torch.cat(list(model.stream(padded, 20, temperature=0, first=first)), 1)
    assert torch.equal(tokens, expected[:, 9:])


@pytest.mark.parametrize('layers', [[3], [1, 0], [0, 0], [-1], [True], ['0'], 'ab'])
def test_layers_without_positions_that_do_not_exist(layers):
    with pytest.raises(BadInput, match='nope_layers'):
        make_config(dict(n_layer=3, nope_layers=layers), 'state.json')


# -- export ----------------------------------------------------------------------------------------


def save_ours(folder, context=128, **fields):
    """Saves a random model of ours as a run folder without a tokenizer."""
    sizes = dict(vocab_size=97, n_layer=3, n_head=6, n_kv_head=2, n_embd=48, ffn_dim=80)
    config = ModelConfig(**{**sizes, **fields})
    model = GPT(config)
    init_weights(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    state = dict(model=vars(config), config=None, tokenizer=None, context=context)
    checkpoint.Checkpointer(str(folder), 0, False).save(0, model, [], state)


OUR_YARN = dict(type='yarn', factor=2.0, original_max_position=64, beta_fast=32, beta_slow=1)
OUR_YARN |= dict(attention_factor=1.1)
R1 = dict(qk_norm=True, qk_norm_weight=False)
EXPERTS = dict(
    n_expert=4, n_expert_active=2, expert_ffn_dim=16, expert_score='softmax', qk_norm=True)


@pytest.mark.parametrize('fields, family, model_type', [
    (R1, 'auto', 'qwen3'),
    (dict(**R1, rope_scaling=OUR_YARN), 'auto', 'qwen3'),
    (dict(**R1, head_dim=16, tie_embeddings=False, layer_repeat=2), 'qwen3', 'qwen3'),
    (R1, 'llama4_text', 'llama4_text'),
    ({}, 'auto', 'llama'),
    ({}, 'mistral', 'mistral'),
    ({}, 'smollm3', 'smollm3'),
    ({}, 'llama4_text', 'llama4_text'),
    (dict(nope_layers=[0, 2], layer_repeat=2, head_dim=10), 'auto', 'smollm3'),
    (EXPERTS, 'auto', 'qwen3_moe'),
    (dict(**EXPERTS, qk_norm_weight=False, n_dense_layer=1), 'auto', 'qwen3_moe'),
])
def test_our_models_as_each_family(tmp_path, fields, family, model_type):
    save_ours(tmp_path / 'run', **fields)
    hf.export_model(str(tmp_path / 'run'), str(tmp_path / 'hf'), 'auto', None, family)
    config = json.loads((tmp_path / 'hf/config.json').read_text())
    assert config['model_type'] == model_type
    loaded, about = load_theirs(tmp_path / 'hf', output_loading_info=True)
    for fault in ('missing_keys', 'unexpected_keys', 'mismatched_keys'):
        assert not about[fault]
    idx = torch.randint(0, 97, (2, 60))
    with torch.no_grad():
        expected = loaded.eval()(idx).logits
    assert (our_logits(tmp_path / 'run', idx) - expected).abs().max() < 1e-5
    assert (our_logits(tmp_path / 'hf', idx) - expected).abs().max() < 1e-5
    # What transformers 5 writes, and beside it the field that older readers need.
    loaded.save_pretrained(tmp_path / 'theirs')
    theirs = json.loads((tmp_path / 'theirs/config.json').read_text())
    assert config['rope_parameters'] == theirs['rope_parameters']
    assert config['rope_theta'] == config['rope_parameters']['rope_theta']
    assert config['dtype'] == theirs['dtype'] and 'torch_dtype' not in config
    assert config['max_position_embeddings'] == 128
    for name in ('bos_token_id', 'eos_token_id', 'pad_token_id'):
        assert config[name] is None


@pytest.mark.parametrize('fields, family, message', [
    ({}, 'qwen3', 'as qwen3 .Qwen3ForCausalLM.: it has norms of queries and keys .qk_norm.'),
    ({}, 'qwen2', 'have biases .qkv_bias.'),
    (dict(qkv_bias=True), 'llama', 'have no biases .qkv_bias.'),
    (dict(qkv_bias=True, qk_norm=True), 'auto', 'as qwen3 .* have no biases .qkv_bias.'),
    (dict(qk_norm=True), 'llama4_text', 'have no weights .qk_norm_weight.'),
    (R1, 'llama', 'has no norms of queries and keys'),
    (dict(**R1, rope_scaling=OUR_YARN), 'llama4_text', 'undo the attention_factor'),
    (dict(nope_layers=[1]), 'llama', 'all of its layers have rotary positions .nope_layers.'),
    (dict(nope_layers=[1], qk_norm=True), 'auto', 'as smollm3 .* no norms'),
    (EXPERTS, 'qwen3', 'it has no experts'),
    (R1, 'qwen3_moe', 'it has experts'),
    (EXPERTS | dict(qk_norm=False), 'auto', 'as qwen3_moe .* has norms'),
    (EXPERTS | dict(expert_score='sigmoid'), 'auto', 'softmax scores .expert_score.'),
    (EXPERTS | dict(n_shared_expert=1), 'auto', 'none is shared .n_shared_expert.'),
    ({}, 'gpt2', "family = 'gpt2' must be auto or one of llama, qwen2"),
])
def test_a_family_that_cannot_express_a_model(tmp_path, fields, family, message):
    save_ours(tmp_path / 'run', **fields)
    with pytest.raises(BadInput, match=message):
        hf.export_model(str(tmp_path / 'run'), str(tmp_path / 'hf'), 'auto', None, family)
    assert not (tmp_path / 'hf').exists()


def test_biases_that_balance_experts_cannot_be_exported(tmp_path):
    save_ours(tmp_path / 'run', **EXPERTS)
    model, _, about = opened(tmp_path / 'run')
    model.blocks[1].ffn.bias += 0.001
    state = dict(about['state'])
    del state['step']
    checkpoint.Checkpointer(str(tmp_path / 'run'), 0, False).save(1, model, [], state)
    with pytest.raises(BadInput, match='biases that balance the experts'):
        hf.export_model(str(tmp_path / 'run'), str(tmp_path / 'hf'), 'auto', None)


TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def test_an_export_after_training_keeps_what_the_folder_said(tmp_path, trained):
    """The model's context, family, fields, token ids and templates outlive short training."""
    sizes = dict(vocab_size=265, max_position_embeddings=8192, sliding_window=None)
    sizes |= dict(bos_token_id=0, eos_token_id=[0, 2], pad_token_id=1)
    their_model('Mistral', dict(**sizes, tie_word_embeddings=True), tmp_path / 'hf')
    for name in ('tokenizer.tiktoken', 'tokenizer.tiktoken.json'):
        shutil.copy(trained / name, tmp_path / 'hf')
    # The ids stand in config.json alone.
    (tmp_path / 'hf/generation_config.json').unlink()
    (tmp_path / 'hf/chat_template.jinja').write_text(TEMPLATE)
    (tmp_path / 'hf/additional_chat_templates').mkdir()
    (tmp_path / 'hf/additional_chat_templates/tool_use.jinja').write_text('tools')
    knobs = dict(
        vocab_size=265, n_layer=3, n_head=6, n_kv_head=2, n_embd=48, ffn_dim=80, norm_eps=1e-6,
        rope_theta=50000.0, sources={'a': 1.0}, max_steps=2, warmup_steps=1, block_size=64,
        total_batch_tokens=128, batch_size=2)
    for start, name in (('hf', 'first'), ('first', 'second')):
        train(tmp_path / name, trained.parent / 'data', init_from=tmp_path / start, **knobs)
    hf.export_model(str(tmp_path / 'second'), str(tmp_path / 'back'), 'bfloat16', None)
    config = json.loads((tmp_path / 'back/config.json').read_text())
    before = json.loads((tmp_path / 'hf/config.json').read_text())
    changed = ('rope_parameters', 'rope_theta', 'rope_scaling', 'dtype', 'transformers_version')
    for key, value in before.items():
        if key not in changed:
            assert config[key] == value, key
    assert config['rope_parameters'] == dict(rope_type='default', rope_theta=50000.0)
    assert config['dtype'] == 'bfloat16'
    generation = json.loads((tmp_path / 'back/generation_config.json').read_text())
    assert generation == dict(bos_token_id=0, eos_token_id=[0, 2], pad_token_id=1)
    assert (tmp_path / 'back/chat_template.jinja').read_text() == TEMPLATE
    tool_use = tmp_path / 'back/additional_chat_templates/tool_use.jinja'
    assert tool_use.read_text() == 'tools'
    loaded = load_theirs(tmp_path / 'back', dtype=torch.float32).eval()
    assert type(loaded).__name__ == 'MistralForCausalLM'
    idx = torch.randint(0, 265, (1, 40))
    with torch.no_grad():
        difference = loaded(idx).logits - our_logits(tmp_path / 'back', idx)
    assert difference.abs().max() < 1e-5
    # Our template ends turns with a token of its own.
    hf.export_model(str(tmp_path / 'second'), str(tmp_path / 'chat'), 'auto', 'chatml', 'llama')
    generation = json.loads((tmp_path / 'chat/generation_config.json').read_text())
    end = load_tokenizer(str(trained)).special_tokens['<|im_end|>']
    assert generation['eos_token_id'] == list(dict.fromkeys([0, 2, end]))
    assert (tmp_path / 'chat/chat_template.jinja').read_text() == JINJA['chatml']


def test_floats_of_a_config_agree_within_rounding():
    scaling = dict(type='linear', factor=8.0)
    ours = vars(ModelConfig(norm_eps=1e-5, rope_scaling=scaling))
    rounded = {**scaling, 'factor': float(np.float32(8.000001))}
    through_gguf = {**ours, 'norm_eps': 9.999999747378752e-06, 'rope_scaling': rounded}
    checkpoint.check_same_model('x', through_gguf, ours)
    for other in (
        dict(norm_eps=1.1e-5), dict(n_layer=16), dict(tie_embeddings=False),
        dict(rope_scaling={**scaling, 'factor': 8.1}), dict(rope_scaling=None),
        dict(rope_scaling=dict(type='yarn', factor=8.0)),
    ):
        with pytest.raises(BadInput, match=next(iter(other))):
            checkpoint.check_same_model('x', {**ours, **other}, ours)


def test_nothing_is_computed_beyond_the_chunks_of_llama_4(tmp_path):
    their_model('Llama4', dict(attention_chunk_size=32), tmp_path / 'hf')
    hf.import_model(str(tmp_path / 'hf'), None, str(tmp_path / 'ours'))
    for name in ('hf', 'ours'):
        about = hf.find_model(str(tmp_path / name))
        assert about['context'] == about['limit'] == 32
        hf.check_context(about, 32)
        with pytest.raises(BadInput, match='33 tokens are more than the 32'):
            hf.check_context(about, 33)
    their_model('Llama4', dict(attention_chunk_size=None), tmp_path / 'full')
    about = hf.find_model(str(tmp_path / 'full'))
    assert about['limit'] is None and about['context'] == 128


def test_an_import_keeps_end_ids_that_stand_in_config_json_alone(small_model, tmp_path):
    copy_model(small_model, tmp_path / 'hf', eos_token_id=[5, 7], bos_token_id=None)
    (tmp_path / 'hf/generation_config.json').write_text('{"temperature": 0.6}')
    for name in ('added_tokens.json', 'special_tokens_map.json'):
        (tmp_path / 'hf' / name).write_text('{}')
    hf.import_model(str(tmp_path / 'hf'), None, str(tmp_path / 'ours'))
    assert hf.find_model(str(tmp_path / 'ours'))['files'].eos_ids == (5, 7)
    kept = json.loads((tmp_path / 'ours/generation_config.json').read_text())
    assert kept == dict(temperature=0.6, eos_token_id=[5, 7])
    assert (tmp_path / 'ours/added_tokens.json').exists()
    (tmp_path / 'hf/config.json').write_text(
        (tmp_path / 'hf/config.json').read_text().replace('[5, 7]', '"</s>"').replace('5,', ''))
    with pytest.raises(BadInput, match='eos_token_id'):
        opened(tmp_path / 'hf')
