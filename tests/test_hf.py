"""Import, logits and export against transformers, and every kind of broken folder."""

import json
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from configurator import BadInput
from data import MixtureLoader, Source
from lib import hf
from lib.chat import JINJA, encode_prompt
from lib.tokenizer import (
    GPT2_PATTERN,
    load_tokenizer,
    make_tokenizer,
    save_tokenizer,
    save_tokenizer_json,
)
from tests.conftest import ROOT, run, sign_again, train

transformers = pytest.importorskip('transformers')
LLAMA3_ROPE = dict(rope_type='llama3', rope_theta=500000.0, factor=8.0, low_freq_factor=1.0)
LLAMA3_ROPE |= dict(high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = dict(rope_type='yarn', rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)
SIZES = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3)
SIZES |= dict(num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=128)
LLAMA4 = dict(head_dim=8, intermediate_size_mlp=72, moe_layers=[], no_rope_layers=[1] * 3)
LLAMA4 |= dict(attn_temperature_tuning=False)
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
]


def their_model(family, changes, folder, dtype=torch.float32, **options):
    """A random model of transformers, with biases and norms that matter, saved into `folder`."""
    config_name = 'Llama4TextConfig' if family == 'Llama4' else f'{family}Config'
    sizes = {**SIZES, **changes}
    if family == 'Llama4':
        sizes = {**SIZES, **LLAMA4, **changes}
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
    if changes.get('use_qk_norm', True):
        assert type(loaded).__name__ == f'{family}ForCausalLM'
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
])
def test_an_odd_config_is_named_by_its_field(small_model, tmp_path, changes, message):
    config = json.loads((small_model / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps({**config, **changes}))
    with pytest.raises(BadInput, match=message):
        opened(tmp_path)


@pytest.mark.parametrize('name, content, message', [
    ('config.json', b'[]', 'no JSON object'),
    ('config.json', b'{"model_type"', 'no valid JSON'),
    ('config.json', b'\xff\xfe', 'no valid JSON'),
    ('model.safetensors', b'', 'damaged or cut off'),
    ('model.safetensors', b'some text ' * 20, 'damaged or cut off'),
    ('model.safetensors.index.json', b'{}', 'has no weight_map'),
    ('model.safetensors.index.json', b'[]', 'has no weight_map'),
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


@pytest.mark.parametrize('content, message', [
    ('{}', 'model type None'),
    ('{"model": []}', 'no tokenizer of a form that is supported'),
    ('{"model": {"type": "Unigram", "vocab": []}}', "model type 'Unigram'"),
    ('{"model": {"type": "BPE", "merges": ["a b"]}}', "KeyError: 'vocab'"),
    ('{"model": {"type": "BPE", "merges": [["a", "b"]], "vocab": {"a": 1, "b": 1, "ab": 2}}, '
     '"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false}, "added_tokens": '
     '[{"content": "<s>", "id": 9, "special": true}]}', 'must be different whole numbers'),
])
def test_a_tokenizer_of_another_kind(tmp_path, content, message):
    (tmp_path / 'tokenizer.json').write_text(content)
    with pytest.raises(BadInput, match=message):
        load_tokenizer(str(tmp_path))
