"""tools/hf.py against transformers: import, logits, export, and every kind of broken folder."""
import json
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from configurator import BadInput
from lib import hf
from lib.tokenizer import load_tokenizer
from tests.conftest import ROOT, run, train

transformers = pytest.importorskip('transformers')
LLAMA3_ROPE = dict(rope_type='llama3', rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=16)
YARN = dict(rope_type='yarn', rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)
SIZES = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
             max_position_embeddings=128)
LLAMA4 = dict(head_dim=8, intermediate_size_mlp=72, moe_layers=[], attn_temperature_tuning=False, no_rope_layers=[1] * 3)
CASES = [
    ('Llama', dict(tie_word_embeddings=True)), ('Llama', dict(num_key_value_heads=6, rope_parameters=dict(rope_type='default', rope_theta=1e5))),
    ('Llama', dict(head_dim=20, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)),
    ('Llama', dict(rope_parameters=dict(rope_type='linear', factor=2.5, rope_theta=10000.0))), ('Llama', dict(rope_parameters=YARN)),
    ('Qwen2', dict(tie_word_embeddings=True)), ('Qwen2', dict(rope_parameters={**YARN, 'beta_fast': 8.0, 'attention_factor': 1.25})),
    ('Qwen3', dict(head_dim=16)), ('Qwen3', dict(head_dim=8, tie_word_embeddings=True, num_key_value_heads=1)),
    ('Llama4', dict(tie_word_embeddings=True)), ('Llama4', dict(use_qk_norm=False)),
]


def their_model(family, changes, folder, dtype=torch.float32, **options):
    """A random model of transformers, with biases and norms that matter, saved into `folder`."""
    config_class = getattr(transformers, 'Llama4TextConfig' if family == 'Llama4' else f'{family}Config')
    sizes = {**SIZES, **(LLAMA4 if family == 'Llama4' else {}), **changes}
    torch.manual_seed(len(str(changes)))
    model = getattr(transformers, f'{family}ForCausalLM')(config_class(**sizes)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(0.3 * noise) if 'norm' in name or 'bias' in name else parameter.mul_(4)
    model.save_pretrained(folder, **options)
    return model


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
    assert (our_logits(tmp_path / 'hf', idx) - expected).abs().max() < 1e-5           # the folder as it is
    assert (our_logits(tmp_path / 'ours', idx) - expected).abs().max() < 1e-5         # imported
    hf.export_model(str(tmp_path / 'ours'), str(tmp_path / 'back'), 'auto', None)
    before, after = load_file(tmp_path / 'hf' / 'model.safetensors'), load_file(tmp_path / 'back' / 'model.safetensors')
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)

    # a run of ours with these weights has no config.json of theirs: it is written anew
    state = tmp_path / 'ours' / 'ckpt' / 'step_000000' / 'state.json'
    size = state.stat().st_size
    text = json.dumps({**json.loads(state.read_text()), 'hf': None})
    state.write_text(text + ' ' * (size - len(text)))
    hf.export_model(str(tmp_path / 'ours'), str(tmp_path / 'new'), 'auto', None)
    loaded, about = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'new', output_loading_info=True)
    assert not about['missing_keys'] and not about['unexpected_keys'] and not about['mismatched_keys']
    with torch.no_grad():
        assert (loaded.eval()(idx).logits - expected).abs().max() < 1e-5
    if changes.get('use_qk_norm', True):
        assert type(loaded).__name__ == f'{family}ForCausalLM'
    assert (our_logits(tmp_path / 'new', idx) - expected).abs().max() < 1e-5


def test_sharded_files_and_bfloat16(tmp_path, monkeypatch):
    theirs = their_model('Llama', dict(tie_word_embeddings=False), tmp_path / 'hf', dtype=torch.bfloat16, max_shard_size='40KB')
    assert len(list((tmp_path / 'hf').glob('*.safetensors'))) > 3
    monkeypatch.setattr(hf, 'SHARD_BYTES', 30_000)
    hf.import_model(str(tmp_path / 'hf'), None, str(tmp_path / 'ours'))
    hf.export_model(str(tmp_path / 'ours'), str(tmp_path / 'back'), 'auto', None)
    assert len(list((tmp_path / 'back').glob('*.safetensors'))) > 3
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'back', dtype='auto')
    assert loaded.dtype == torch.bfloat16
    for (name, a), (_, b) in zip(theirs.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_shared_layers_are_written_out(tmp_path):
    """MobileLLM with layer sharing has no code in transformers: its layers, run twice, are a Llama with every layer twice."""
    theirs = their_model('Llama', dict(tie_word_embeddings=True), tmp_path / 'hf')
    config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
    config |= dict(model_type='mobilellm', architectures=['MobileLLMForCausalLM'], layer_sharing=True, share_embedding=True,
                   tie_word_embeddings=False, rope_theta=10000.0)
    del config['rope_parameters']
    (tmp_path / 'hf' / 'config.json').write_text(json.dumps(config))
    theirs.model.layers = torch.nn.ModuleList(layer for layer in theirs.model.layers for _ in range(2))
    theirs.config.num_hidden_layers = 6
    idx = torch.randint(0, 97, (2, 30))
    with torch.no_grad():
        expected = theirs(idx, use_cache=False).logits
    assert (our_logits(tmp_path / 'hf', idx) - expected).abs().max() < 1e-5
    hf.import_model(str(tmp_path / 'hf'), None, str(tmp_path / 'ours'))
    hf.export_model(str(tmp_path / 'ours'), str(tmp_path / 'back'), 'auto', None)
    with torch.no_grad():
        assert (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'back').eval()(idx).logits - expected).abs().max() < 1e-5


def test_a_run_is_exported_with_its_tokenizer(tmp_path, trained):
    text = 'Ünïcode 12345 words\n\n  and   blanks, don\'t!\r\n 1  2 '
    hf.export_model(str(trained), str(tmp_path / 'hf'), 'auto', 'chatml')
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    ours = load_tokenizer(str(trained))
    assert tokenizer(text).input_ids == [ours.bos_id, *ours.encode(text)]
    assert tokenizer.decode(ours.encode(text)) == text
    messages = [dict(role='system', content='Be brief.'), dict(role='user', content='  Hi <there>\n')]
    from lib.chat import JINJA, encode_prompt
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert rendered == encode_prompt(ours, messages, 'chatml') == encode_prompt(ours, messages, JINJA['chatml'])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    idx = torch.randint(0, 60, (1, 16))
    with torch.no_grad():
        assert (loaded.eval()(idx).logits - our_logits(trained, idx)).abs().max() < 1e-5
    assert loaded.generation_config.eos_token_id == [0, 2]


def test_init_from_a_hugging_face_folder_on_one_and_two_ranks(tmp_path, tiny_data):
    their_model('Qwen3', dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                              num_key_value_heads=1, head_dim=16, tie_word_embeddings=True), tmp_path / 'hf')
    hf.import_model(str(tmp_path / 'hf'), None, str(tmp_path / 'ours'))
    knobs = dict(qk_norm=True, norm_eps=1e-6, rope_theta=10000.0, max_steps=3, batch_size=1)
    losses = []
    for name, source, ranks in (('a', 'hf', 1), ('b', 'ours', 1), ('c', 'hf', 2)):
        by_step = train(tmp_path / name, tiny_data, ranks=ranks, init_from=tmp_path / source, **knobs)
        losses.append([record['train/loss'] for record in by_step.values() if 'train/loss' in record])
    assert losses[0] == losses[1] and losses[0] == pytest.approx(losses[2], rel=1e-5) and len(losses[0]) == 3
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    from data import MixtureLoader, Source
    weights = {'a': 0.75, 'b': 0.25}
    index, cursors = (loader := MixtureLoader([Source(str(tiny_data), n, 'train', 16, 1337, 64) for n in weights], weights, 1337)).next_batch(4)
    rows = torch.from_numpy(loader.read(index, cursors)).long()
    with torch.no_grad():
        assert model(rows, labels=rows).loss.item() == pytest.approx(losses[0][0], rel=1e-5)
    with pytest.raises(BadInput, match='imported model'):
        train(tmp_path / 'ours', tiny_data, resume=True, **knobs)


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in {**content, **changes}.items() if value != 'gone'}))


BROKEN = [
    (dict(model_type='gemma3'), r"model_type 'gemma3'.*llama, qwen2"), (dict(hidden_act='gelu'), "hidden_act = 'gelu'"),
    (dict(attention_bias=True), 'attention_bias = True'), (dict(hidden_size='gone'), "no field 'hidden_size'"),
    (dict(rope_parameters=dict(rope_type='dynamic', factor=2.0)), "rope_type 'dynamic'"), (dict(quantization_config={}), 'quantization_config'),
    (dict(num_hidden_layers=4), r'missing: .*layers\.3.*\(9\)'), (dict(num_hidden_layers=2), r'not known: .*layers\.2.*\(9\)'),
    (dict(intermediate_size=96), r'gate_proj\.weight has shape \[80, 48\], the config asks for \[96, 48\]'),
    (dict(dtype='float8'), "dtype 'float8'"), (dict(model_type='llama4_text', intermediate_size_mlp=80, moe_layers=[], no_rope_layers=[1, 1, 0]), 'no_rope_layers'),
    (dict(model_type='llama4_text', intermediate_size_mlp=80), 'no_rope_layers|moe_layers')]


@pytest.mark.parametrize('changes, message', BROKEN)
def test_configs_and_tensors_that_do_not_fit(tmp_path, changes, message):
    their_model('Llama', {}, tmp_path / 'hf')
    edit(tmp_path / 'hf' / 'config.json', **changes)
    with pytest.raises(BadInput, match=message):
        hf.import_model(str(tmp_path / 'hf'), None, str(tmp_path / 'ours'))
    assert not (tmp_path / 'ours' / 'ckpt').exists()


def test_damaged_files_and_folders(tmp_path):
    their_model('Llama', {}, tmp_path / 'hf', max_shard_size='40KB')
    first = sorted((tmp_path / 'hf').glob('*.safetensors'))[0]
    whole = first.read_bytes()
    first.write_bytes(whole[:-100])
    with pytest.raises(BadInput, match='damaged or cut off'):
        hf.open_model(str(tmp_path / 'hf'), 'cpu', torch.float32, needs_tokenizer=False)
    first.unlink()
    with pytest.raises(BadInput, match=f'{first.name} is missing'):
        hf.open_model(str(tmp_path / 'hf'), 'cpu', torch.float32, needs_tokenizer=False)
    for path in (tmp_path / 'hf').glob('*.safetensors*'):
        path.unlink()
    with pytest.raises(BadInput, match='no .safetensors file'):
        hf.open_model(str(tmp_path / 'hf'), 'cpu', torch.float32, needs_tokenizer=False)
    with pytest.raises(BadInput, match='neither a folder here nor a model'):
        hf.find_model('nothing-here')
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
    for arguments, code, message in (
            (['import', f'--model={tmp_path}/hf', f'--out={tmp_path}/ours'], 0, 'Llama|llama'), (['import', '--out=x'], 2, 'tools/hf.py import'),
            (['import', f'--model={tmp_path}/hf', f'--out={tmp_path}/ours'], 2, 'already holds'),
            (['export', f'--ckpt={tmp_path}/ours', f'--out={tmp_path}/back', '--dtype=bfloat16'], 0, 'bfloat16'),
            (['export', f'--ckpt={tmp_path}/ours', f'--out={tmp_path}/back'], 2, 'not empty')):
        result = run([sys.executable, 'tools/hf.py', *arguments])
        output = result.stdout + result.stderr
        assert result.returncode == code and any(m in output for m in message.split('|')) and 'Traceback' not in output, output
    with safe_open(tmp_path / 'back' / 'model.safetensors', framework='pt') as f:
        assert all(f.get_slice(name).get_dtype() == 'BF16' for name in f.keys())


def test_a_vocabulary_that_lacks_bytes(tmp_path):
    """SmolLM2's has no token for some control characters: `tokenizers` drops them, and so do we."""
    from tokenizers import Tokenizer

    from lib.tokenizer import GPT2_PATTERN, make_tokenizer, save_tokenizer, save_tokenizer_json
    ranks = {bytes([b]): b + 1 for b in range(256) if b not in (0x13, 0x14, 0xf1)}
    ours = make_tokenizer('x', ranks, GPT2_PATTERN, {'<|endoftext|>': 0}, '<|endoftext|>')
    save_tokenizer_json(str(tmp_path), ours, False, 64)
    theirs = Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    for text in ('a\x13b', '\x14\x13', 'é\U000f1234 z', 'plain'):
        assert ours.encode(text) == ours.encode_document(text).tolist() == theirs.encode(text).ids
    assert ours.vocab_size == 257 and len(ours.token_bytes()) == 257
    save_tokenizer(str(tmp_path), ours)
    again = load_tokenizer(str(tmp_path))
    assert again.fingerprint == ours.fingerprint and again.encode('a\x13b') == ours.encode('a\x13b')


@pytest.mark.parametrize('name', ['out/my run', 'a--b/c', 'tests/nothing', '../nothing', 'no'])
def test_what_is_neither_a_folder_nor_a_model(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(BadInput, match='neither a folder here nor a model'):
        hf.find_model(name)
