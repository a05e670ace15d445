"""What a model's folder says, against transformers, and what a run keeps of it."""

import json
import shutil

import pytest

from configurator import BadInput
from lib import hf
from lib.chat import JINJA
from lib.model_files import read_model_files
from lib.tokenizer import load_tokenizer, save_tokenizer_json
from tests.conftest import metrics, run_here, train_command

transformers = pytest.importorskip('transformers')
CONTENT = dict(lstrip=False, rstrip=False, normalized=False, single_word=False)
TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"


@pytest.fixture(scope='module')
def tokenizer_json(tmp_path_factory):
    """A tokenizer.json with the special tokens of this file, as text."""
    tokenizers = pytest.importorskip('tokenizers')
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<pad>', '<unk>', '<s>', '</s>']
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=special, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False)
    tokenizer.train_from_iterator(['a b'], trainer)
    return tokenizer.to_str()


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f'{name}.json').write_text(json.dumps(content))


@pytest.mark.parametrize('config, special_map', [
    (dict(bos_token=None, eos_token='<|im_end|>', pad_token='<pad>'), None),
    (dict(bos_token={'__type': 'AddedToken', 'content': '<s>', **CONTENT}), None),
    (dict(eos_token='<|im_end|>'), dict(eos_token='</s>', bos_token='<s>')),
    (dict(eos_token='<|im_end|>'), dict(pad_token={'content': '<pad>', **CONTENT})),
    (dict(eos_token='<|im_end|>', added_tokens_decoder={
        '2': {'content': '<|im_end|>', **CONTENT, 'special': True}}), dict(eos_token='</s>')),
    (dict(tokenizer_class='PreTrainedTokenizerFast', add_bos_token=True), None),
    (dict(bos_token='<s>', additional_special_tokens=['<|im_start|>', '<|im_end|>']), None),
    (dict(bos_token='<s>', extra_special_tokens=dict(think_token='<unk>')), None),
], ids=str)
def test_special_tokens_are_those_of_transformers(tmp_path, tokenizer_json, config, special_map):
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', **config}
    write(tmp_path, tokenizer_config=config)
    if special_map is not None:
        write(tmp_path, special_tokens_map=special_map)
    (tmp_path / 'tokenizer.json').write_text(tokenizer_json)
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path).special_tokens_map
    expected = {k: str(v) for k, v in expected.items() if k.endswith('_token')}
    assert read_model_files(str(tmp_path)).tokens == expected


@pytest.mark.parametrize('generation, config, expected', [
    (dict(eos_token_id=[7, 3, 7]), dict(eos_token_id=1), (7, 3)),
    (dict(eos_token_id=2), None, (2,)),
    (dict(eos_token_id=None), dict(eos_token_id=[5, 6]), (5, 6)),
    ({}, dict(eos_token_id=4), (4,)),
    (None, dict(eos_token_id=4), (4,)),
    (None, None, ()),
])
def test_end_ids_of_a_folder(tmp_path, generation, config, expected):
    if generation is not None:
        write(tmp_path, generation_config=generation)
    if config is not None:
        write(tmp_path, config=dict(model_type='llama', **config))
    assert read_model_files(str(tmp_path)).eos_ids == expected


@pytest.mark.parametrize('name, content, message', [
    ('tokenizer_config', [1], 'is no JSON object'),
    ('tokenizer_config', dict(eos_token=5), 'eos_token must be text'),
    ('tokenizer_config', dict(eos_token={'id': 5}), 'eos_token must be text'),
    ('tokenizer_config', dict(additional_special_tokens='<s>'), 'must be a list'),
    ('tokenizer_config', dict(chat_template=5), 'chat_template must be text'),
    ('tokenizer_config', dict(chat_template=['x']), '`name` and `template`'),
    ('special_tokens_map', dict(bos_token=['<s>']), 'bos_token must be text'),
    ('generation_config', dict(eos_token_id='2'), "eos_token_id = '2' must be an id"),
    ('generation_config', dict(eos_token_id=[2, True]), 'must be an id'),
    ('generation_config', dict(eos_token_id=-1), 'must be an id'),
    ('config', dict(model_type='llama', eos_token_id=1.5), 'must be an id'),
])
def test_damaged_files_are_named(tmp_path, name, content, message):
    write(tmp_path, **{name: content})
    with pytest.raises(BadInput, match=message) as raised:
        read_model_files(str(tmp_path))
    assert f'{name}.json' in str(raised.value)


def test_templates_of_a_folder(tmp_path):
    named = [dict(name='default', template='A'), dict(name='tool_use', template='B')]
    write(tmp_path, tokenizer_config=dict(chat_template=named))
    assert read_model_files(str(tmp_path)).templates == dict(default='A', tool_use='B')
    (tmp_path / 'chat_template.jinja').write_text('C')
    assert read_model_files(str(tmp_path)).templates == dict(default='C')
    (tmp_path / 'additional_chat_templates').mkdir()
    (tmp_path / 'additional_chat_templates' / 'rag.jinja').write_text('D')
    assert read_model_files(str(tmp_path)).templates == dict(default='C', rag='D')


def test_continued_training_keeps_context_template_and_end_ids(tmp_path, demo_data):
    """A model of 8,192 tokens is trained on in rows of 128, resumed and exported."""
    tokenizer = load_tokenizer(str(demo_data / 'code'))
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True)
    folder = tmp_path / 'hf'
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer_json(str(folder), tokenizer, 8192)
    ends = [tokenizer.special_tokens['<|im_end|>'], tokenizer.bos_id]
    write(folder, generation_config=dict(eos_token_id=ends))
    (folder / 'chat_template.jinja').write_text(TEMPLATE)
    sizes = dict(n_layer=1, n_head=2, n_kv_head=1, n_embd=32, ffn_dim=64, rope_theta=10000.0)
    sizes |= dict(vocab_size=config.vocab_size, block_size=128, batch_size=2, save_interval=1)
    sizes |= dict(total_batch_tokens=256, sources={'code': 1.0}, init_from=folder, max_steps=2)
    command = train_command(tmp_path / 'run', demo_data, **sizes)
    assert run_here([*command, '--stop_step=1']) == 0
    shutil.rmtree(folder)       # what a resumed run needs is in its own folder
    assert run_here([*command, '--resume=True']) == 0
    assert len(metrics(tmp_path / 'run')) >= 2
    hf.export_model(str(tmp_path / 'run'), str(tmp_path / 'back'), 'auto', None)
    exported = json.loads((tmp_path / 'back' / 'config.json').read_text())
    assert exported['max_position_embeddings'] == 8192
    assert (tmp_path / 'back' / 'chat_template.jinja').read_text() == TEMPLATE
    again = json.loads((tmp_path / 'back' / 'generation_config.json').read_text())
    assert again['eos_token_id'] == ends


def test_a_run_gets_the_template_that_it_trains_on(tmp_path, shared_data):
    """One of ours for the user's conversations, or that of the model that prepared them."""
    chats = []
    for i in range(1, 60):
        turns = dict(role='user', content='q' * i), dict(role='assistant', content='a')
        chats.append(dict(messages=turns))
    (tmp_path / 'chats.jsonl').write_text(''.join(json.dumps(chat) + '\n' for chat in chats))
    model = tmp_path / 'model'
    model.mkdir()
    shutil.copy(shared_data / 'tokenizers/bpe8k/tokenizer.json', model)
    own = TEMPLATE.replace('eos_token', "'<|im_end|>'")
    (model / 'chat_template.jinja').write_text(own)
    data = tmp_path / 'data'
    sizes = dict(n_layer=1, n_head=1, n_kv_head=1, n_embd=8, ffn_dim=8, vocab_size=8192)
    sizes |= dict(block_size=64, batch_size=2, total_batch_tokens=128, packing='document')
    for template, expected in (('chatml', JINJA['chatml']), ('model', own)):
        assert not run_here([
            'prepare/text.py', f'--source={template}', f'--input={tmp_path}/chats.jsonl',
            '--column=messages', f'--chat_template={template}', f'--tokenizer={model}',
            f'--out={data}', '--workers=0', '--val_fraction=0.2'])
        sizes |= dict(sources={template: 1.0}, max_steps=1)
        run = tmp_path / f'run_{template}'
        assert not run_here(train_command(run, data, **sizes))
        assert (run / 'chat_template.jinja').read_text() == expected


def test_a_template_in_tokenizer_config_json_survives_a_resume_and_continue_from(
        tmp_path, shared_data):
    """The tokenizer is one that only `tokenizers` encodes, so its files are those of the model."""
    content = json.loads((shared_data / 'tokenizers/bpe8k/tokenizer.json').read_text())
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, rms_norm_eps=1e-5, tie_word_embeddings=True)
    model = tmp_path / 'hf'
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    write(model, tokenizer={**content, 'normalizer': dict(type='NFKC')}, tokenizer_config=dict(
        tokenizer_class='PreTrainedTokenizerFast', eos_token='<|im_end|>', chat_template=TEMPLATE))
    texts = [dict(text=f'Document {i} goes on for a while.') for i in range(99)]
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(text) + '\n' for text in texts))
    assert not run_here([
        'prepare/text.py', '--source=a', f'--input={tmp_path}/a.jsonl', f'--tokenizer={model}',
        f'--out={tmp_path}/data', '--workers=0', '--val_fraction=0.2'])
    sizes = dict(n_layer=1, n_head=1, n_kv_head=1, n_embd=8, ffn_dim=8, vocab_size=8192)
    sizes |= dict(rope_theta=10000.0, block_size=32, batch_size=2, total_batch_tokens=64)
    sizes |= dict(sources={'a': 1.0}, max_steps=2, save_interval=1)
    command = train_command(tmp_path / 'run', tmp_path / 'data', **sizes)
    assert not run_here([*command, f'--init_from={model}', '--stop_step=1'])
    assert not run_here([*command, f'--init_from={model}', '--resume=True'])
    other = train_command(tmp_path / 'other', tmp_path / 'data', **{**sizes, 'max_steps': 3})
    assert not run_here([*other, f'--continue_from={tmp_path}/run'])
    for name in ('run', 'other'):
        about = hf.find_model(str(tmp_path / name))
        assert about['files'].template == TEMPLATE
        assert about['tokenizer'].tokens['eos_token'] == '<|im_end|>'
    # A run from random weights learns that BOS follows the end of a document.
    scratch = train_command(tmp_path / 'scratch', tmp_path / 'data', **{**sizes, 'max_steps': 1})
    assert not run_here(scratch)
    tokenizer = hf.find_model(str(tmp_path / 'scratch'))['tokenizer']
    assert tokenizer.stop_ids == [tokenizer.special_tokens['<|im_end|>'], tokenizer.bos_id]
