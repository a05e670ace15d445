"""Conversations packed into rows: packing, loss masks, attention within documents, and runs."""
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch

from configurator import BadInput
from data import MixtureLoader, Source, batch_of, best_fit, pack_documents, token_ids
from lib.byte_level import DIGITS_PATTERN
from lib.chat import encode_chat, marked
from lib.parallel import apply_parallelism
from lib.shards import open_mask, open_shard
from lib.tokenizer import make_tokenizer, save_tokenizer
from model import GPT, ModelConfig, init_weights
from prepare.shards import PartWriter, finish_source
from tests.conftest import metrics, run, run_here, train, train_command

BYTES = {bytes([b]): 3 + b for b in range(256)}
SPECIAL = {'<|endoftext|>': 0, '<|im_start|>': 1, '<|im_end|>': 2}
TOKENIZER = make_tokenizer('bytes', BYTES, DIGITS_PATTERN, SPECIAL, '<|endoftext|>')
SFT = dict(
    sources={'chat': 1.0}, vocab_size=259, packing='document', block_size=160, batch_size=4,
    total_batch_tokens=1280, max_steps=8, learning_rate=1e-2, eval_interval=8)


def conversations(n, seed=0, longest=30):
    """Messages of n conversations of one or two turns and different lengths."""
    rng = np.random.default_rng(seed)
    words = ['sun', 'river', 'seven', 'apple', 'walks', 'blue', 'and', 'not', 'the', 'a']

    def text():
        return ' '.join(rng.choice(words, rng.integers(1, longest // 5)))

    chats = []
    for _ in range(n):
        messages = []
        for _ in range(rng.integers(1, 3)):
            messages.append(dict(role='user', content=text()))
            messages.append(dict(role='assistant', content=text()))
        chats.append(messages)
    return chats


def conversation(question, answer):
    return [dict(role='user', content=question), dict(role='assistant', content=answer)]


def write_chats(
    data_dir, name, chats, splits=('train', 'val'), tokenizer=TOKENIZER, masks=True,
):
    """Writes a source of conversations in two shards per split."""
    folder = str(data_dir / name)
    os.makedirs(f'{folder}/progress')
    writer = PartWriter(folder, 0, tokenizer.vocab_size)
    for half in range(2):
        for split in splits:
            for messages in chats[half::2]:
                ids, mask = encode_chat(tokenizer, messages, 'chatml')
                writer.add(split, ids, len(ids), mask if masks else None)
        writer.commit(0, 0)
    open_shard.cache_clear()
    open_mask.cache_clear()
    return finish_source(folder, tokenizer, dict(test=True), [writer.state])


@pytest.fixture
def chat_data(tmp_path):
    write_chats(tmp_path / 'data', 'chat', conversations(300))
    return tmp_path / 'data'


def packed(data_dir, name='chat', seed=0, overlong='truncate'):
    """The training split of a source, packed into rows of 160 tokens."""
    return Source(data_dir, name, 'train', 160, seed, 259, 'document', overlong)


@pytest.mark.parametrize('seed', range(4))
def test_best_fit_is_best_fit_decreasing(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(5, 60))
    if seed % 2:
        lengths = rng.integers(1, capacity + 1, 400)
    else:
        lengths = np.minimum(rng.geometric(0.2, 400), capacity)
    order, first = best_fit(lengths, capacity)
    sizes = [lengths[order[a:b]].sum() for a, b in zip(first[:-1], first[1:], strict=True)]
    assert sorted(order.tolist()) == list(range(400))
    assert 0 < min(sizes) and max(sizes) <= capacity
    # The textbook's algorithm places one item after the other.
    rooms = []
    for length in sorted(lengths.tolist(), reverse=True):
        fits = [i for i, room in enumerate(rooms) if room >= length]
        if not fits:
            rooms.append(capacity)
            fits = [len(rooms) - 1]
        rooms[min(fits, key=lambda i: rooms[i])] -= length
    assert sorted(capacity - size for size in sizes) == sorted(rooms)
    assert [x.tolist() for x in best_fit([], 7)] == [[], [0]]


def test_rows_hold_every_conversation_once_with_its_mask(chat_data):
    source = packed(chat_data, seed=7)
    expected = []
    for messages in conversations(300):
        ids, mask = encode_chat(TOKENIZER, messages, 'chatml')
        expected.append((ids[:161].tobytes(), mask[:161].tobytes()))
    found = []
    for row in source.rows(range(source.n_windows)):
        ids = token_ids(row)
        valid = row >= 0
        starts = np.flatnonzero(ids == 0).tolist()
        assert starts[0] == 0
        n_padding = int((row[::-1] != ~1).argmax())             # padding is stored as ~1
        for a, b in zip(starts, [*starts[1:], len(row) - n_padding], strict=True):
            mask = valid[a:b].astype(np.uint8)
            found.append((ids[a:b].astype(np.uint32).tobytes(), mask.tobytes()))
    assert sorted(found) == sorted(expected)
    assert source.packs.utilisation > 0.95 and source.packs.n_too_long == 0
    messages = conversations(1)[0]
    text = marked(TOKENIZER, *encode_chat(TOKENIZER, messages, 'chatml'))
    answers = [m['content'] for m in messages if m['role'] == 'assistant']
    assert text.count('[[') == len(answers)
    assert f'[[{answers[0]}<|im_end|>]]' in text


@pytest.mark.parametrize('checkpointing', ['none', 'selective', 'full'])
def test_a_packed_row_equals_its_conversations_run_alone(chat_data, checkpointing):
    config = ModelConfig(vocab_size=259, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, ffn_dim=48)
    model = GPT(config).double()
    init_weights(model, 3)
    apply_parallelism(model, None, torch.float64, checkpointing=checkpointing)
    rows = torch.from_numpy(packed(chat_data, seed=7).rows(range(3)))
    inputs, targets, doc_ids = batch_of(rows, 0)
    assert doc_ids.max() >= 3 and (targets >= 0).sum() == (rows[:, 1:] >= 0).sum()
    loss, _, _ = model.loss(inputs, targets, doc_ids=doc_ids)
    loss.backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    alone = 0.0
    for row, ids in zip(rows, doc_ids, strict=True):
        ids = torch.cat((ids, ids[-1:]))
        ids[-1] += token_ids(row)[-1] == 0
        for d in range(1, int(ids.max()) + 1):
            tokens = row[ids == d][None]
            if tokens.shape[1] > 1:
                x, y, _ = batch_of(tokens)
                part, _, _ = model.loss(x, y)
                part.backward()
                alone += part.item()
    assert loss.item() == pytest.approx(alone, rel=1e-7)               # the rotary angles are fp32
    for p, g in zip(model.parameters(), together, strict=True):
        assert (p.grad - g).abs().max() < 1e-7 * g.abs().max()


def test_long_conversations_are_truncated_or_dropped_and_reported(tmp_path):
    chats = conversations(40)
    chats.append(conversation('u' * 200, 'never seen'))
    chats.append(conversation('u', 's' * 300))
    write_chats(tmp_path, 'chat', chats)
    truncated = packed(tmp_path)
    dropped = packed(tmp_path, overlong='drop')

    def counts(packs):
        return packs.n_too_long, packs.n_unsupervised, len(packs.length)

    assert counts(truncated.packs) == (2, 1, 41)
    assert counts(dropped.packs) == (2, 0, 40)
    # The long answer has a row for itself, to the row's end.
    rows = truncated.rows(range(truncated.n_windows))
    [row] = [row for row in rows if (token_ids(row) == 3 + ord('s')).sum() > 100]
    assert len(np.flatnonzero(token_ids(row) == 0)) == 1 and row[-1] == 3 + ord('s')
    assert dropped.fingerprint() != truncated.fingerprint()


@pytest.mark.parametrize('masks', [False, True])
def test_without_masks_all_tokens_but_the_first_of_a_document_are_valid(tmp_path, masks):
    write_chats(tmp_path, 'text', conversations(30), masks=masks)
    for path in (tmp_path / 'text/train').glob('*.mask'):
        path.write_bytes(b'\1' * path.stat().st_size)
    source = packed(tmp_path, 'text')
    rows = source.rows(range(source.n_windows))
    assert (rows >= 0).sum() == source.packs.n_valid == source.packs.length.sum() - 30


def test_loader_resumes_within_packed_rows(chat_data):
    def loader():
        return MixtureLoader([packed(chat_data, seed=7)], {'chat': 1.0}, 7)

    uninterrupted = loader()
    batches = [uninterrupted.read(*uninterrupted.next_batch(5)) for _ in range(6)]
    first = loader()
    for batch in batches[:3]:
        assert np.array_equal(first.read(*first.next_batch(5)), batch)
    resumed = loader()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for batch in batches[3:]:
        assert np.array_equal(resumed.read(*resumed.next_batch(5)), batch)


# -- runs ------------------------------------------------------------------------------------------


def test_sft_run_learns_epochs_end_it_and_it_resumes(tmp_path, chat_data, capsys):
    knobs = {**SFT, 'max_steps': None, 'epochs': 2.0, 'warmup_frac': 0.1,
             'activation_checkpointing': 'full', 'save_interval': 5}
    m = train(tmp_path / 'full', chat_data, **knobs)
    out = capsys.readouterr().out
    n_rows = packed(chat_data).n_windows
    steps = -(-2 * n_rows // 8)
    assert max(m) == steps
    last = m[steps - 1]
    assert last['mixture/epochs_chat'] == pytest.approx(2.0, abs=8 / n_rows)
    assert f'300 documents in {n_rows} rows of 160 tokens, utilisation 9' in out
    assert m[0]['val/loss'] == pytest.approx(np.log(259), rel=0.02)
    assert m[steps]['val/loss'] < 3.6
    assert m[0]['train/learning_rate'] == pytest.approx(1e-2 / round(0.1 * steps))
    assert last['train/learning_rate'] < 1.5e-3
    shutil.copytree(tmp_path / 'full', tmp_path / 'again')
    earlier = (steps - 1) // 5 * 5
    assert 0 < earlier < steps
    for name in os.listdir(tmp_path / 'again/ckpt'):
        if name not in ('latest', f'step_{earlier:06d}'):
            shutil.rmtree(tmp_path / 'again/ckpt' / name)
    (tmp_path / 'again/ckpt/latest').write_text(f'step_{earlier:06d}')
    again = train(tmp_path / 'again', chat_data, resume=True, **knobs)

    def losses(run):
        return {step: r['train/loss'] for step, r in run.items() if 'train/loss' in r}

    assert losses(again) == losses(m)
    assert again[steps]['val/loss'] == m[steps]['val/loss']


def test_the_mean_is_over_the_valid_tokens_of_all_micro_batches(tmp_path, chat_data):
    """1 x 8 rows equals 4 x 2, though the numbers of valid tokens differ.

    Activation checkpointing changes nothing.
    """
    one = train(tmp_path / 'one', chat_data, **{**SFT, 'batch_size': 8})
    knobs = {**SFT, 'batch_size': 2}
    four = train(tmp_path / 'four', chat_data, **knobs)
    full = train(tmp_path / 'full', chat_data, **knobs, activation_checkpointing='full')
    for step in range(8):
        assert four[step]['train/loss'] == pytest.approx(one[step]['train/loss'], rel=1e-5)
        assert full[step]['train/loss'] == four[step]['train/loss']


def test_sources_weighed_by_size_are_read_equally_often(tmp_path, chat_data):
    write_chats(chat_data, 'few', conversations(90, 8))
    knobs = {**SFT, 'sources': {'chat': 1.0, 'few': 1.0}, 'max_steps': None}
    m = train(tmp_path / 'run', chat_data, **knobs, weigh_by='size', epochs=1.5)
    last = m[max(m) - 1]
    assert last['mixture/epochs_chat'] == pytest.approx(1.5, abs=0.05)
    assert last['mixture/epochs_few'] == pytest.approx(1.5, abs=0.1)


def test_influence_reweights_conversations(tmp_path, chat_data):
    """One of three sources has shuffled answers. It loses weight on a probe of conversations.

    Not at once: a model that has learned nothing yet is helped by shuffled letters, too.
    """
    rng = np.random.default_rng(1)
    noise = []
    for messages in conversations(300, 1):
        shuffled = []
        for m in messages:
            shuffled.append({**m, 'content': ''.join(rng.permutation(list(m['content'])))})
        noise.append(shuffled)
    write_chats(chat_data, 'noise', noise)
    write_chats(chat_data, 'more', conversations(300, 2))
    # The additional message makes sure that no probe document is in a source.
    asked = [[dict(role='user', content='please'), *c] for c in conversations(150, 5)]
    write_chats(chat_data / 'probe', 'talk', asked, splits=('probe',))
    knobs = {**SFT, 'sources': {'chat': 1.0, 'noise': 1.0, 'more': 1.0}, 'max_steps': 56,
             'mixture': 'influence', 'mixture_interval': 16, 'mixture_warmup': 48,
             'mixture_eta': 1.0, 'probe': {'talk': 1.0}, 'probe_rows': 40, 'influence_rows': 24,
             'max_epochs': None, 'mixture_max': 0.9}
    m = train(tmp_path / 'run', chat_data, **knobs)
    others = m[55]['mixture/weight_chat'] + m[55]['mixture/weight_more']
    assert m[55]['mixture/weight_noise'] < 0.25 < others
    assert sum(m[s]['mixture/drawn_noise'] for s in range(50, 56)) / 6 < 0.28


PEAK_MEMORY = '''
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name='__main__')
except SystemExit as e:
    assert not e.code
for line in open('/proc/self/status'):
    if line.startswith('VmHWM'):
        print('peak', line.split()[1])
'''


def test_a_step_of_32768_tokens_fits_into_little_memory(tmp_path):
    """The process stays below 0.8 GiB.

    Attention of long documents never holds a T x T matrix, and activations are recomputed.
    """
    rng = np.random.default_rng(0)
    chats = []
    for _ in range(2):
        letters = 97 + rng.integers(0, 26, 34_000)
        chats.append(conversation('go', ''.join(map(chr, letters))))
    write_chats(tmp_path / 'data', 'long', chats)
    knobs = {**SFT, 'sources': {'long': 1.0}, 'block_size': 32768, 'batch_size': 1,
             'total_batch_tokens': 32768, 'max_steps': 1, 'activation_checkpointing': 'full',
             'n_layer': 2, 'n_head': 1, 'n_kv_head': 1, 'n_embd': 16, 'ffn_dim': 32,
             'eval_rows': 1, 'warmup_steps': 0}
    command = train_command(tmp_path / 'run', tmp_path / 'data', **knobs)
    done = run([sys.executable, '-c', PEAK_MEMORY, *command[1:]])
    assert done.returncode == 0, done.stderr
    first = metrics(tmp_path / 'run')[0]
    assert first['train/loss'] == pytest.approx(np.log(259), rel=0.02)
    assert int(done.stdout.split('peak ')[1]) / 2**20 < 0.8


def saved_for_backward(n_layer):
    """Returns (bytes per token that autograd saves of a model, without weights, its config)."""
    config = ModelConfig(
        vocab_size=50, n_layer=n_layer, n_head=8, n_kv_head=4, n_embd=96, ffn_dim=200, head_dim=16,
        qk_norm=True, qk_norm_weight=False)
    model = GPT(config)
    init_weights(model, 0)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(torch.zeros(2, 64, dtype=torch.long))
    return sum(t.untyped_storage().nbytes() for t in kept.values()) / 128, model.config


def test_dry_run_needs_no_data_and_its_activations_are_what_autograd_saves(tmp_path, capsys):
    command = [
        sys.executable, 'train.py', 'config/model/mobilellm_140m.py', 'config/stage5.py',
        '--dry_run=True', f'--out_dir={tmp_path}/x']
    assert run_here(command) == 0
    out = capsys.readouterr().out
    assert '140.2M parameters' in out and 'activation_checkpointing=full' in out
    assert 'fits into 80 GiB' in out and not (tmp_path / 'x').exists()
    assert run_here([*command, '--activation_checkpointing=none']) == 0
    assert 'does not fit into 80 GiB' in capsys.readouterr().out
    from tools.plan import saved_bytes_per_token
    one, _ = saved_for_backward(1)
    two, config = saved_for_backward(2)
    assert two - one == saved_bytes_per_token(config, 4, False)['none']


def prepare_chats(source, path, out, tokenizer, template='chatml', val_fraction=0.05, **knobs):
    run_here([
        sys.executable, 'prepare/text.py', f'--source={source}', f'--input={path}',
        '--column=messages', f'--chat_template={template}', f'--tokenizer={tokenizer}',
        f'--out={out}', '--workers=0', f'--val_fraction={val_fraction}',
        *(f'--{key}={value}' for key, value in knobs.items())])


def test_real_conversations_fill_their_rows(tmp_path, shared_data):
    tokenizer = shared_data / 'tokenizers/bpe8k/tokenizer.json'
    for name in ('instruct', 'gsm8k_think'):
        prepare_chats(name, shared_data / f'sft/{name}.jsonl.gz', tmp_path, tokenizer)
        for block_size in (1024, 2048, 4096):
            packs = Source(tmp_path, name, 'train', block_size, 0, 8192, 'document').packs
            assert packs.utilisation > 0.97
            assert len(packs.length) + packs.n_unsupervised > 1880
            assert 0.5 < packs.n_valid / packs.length.sum() < 0.6


def user(content='q', **more):
    return dict(role='user', content=content, **more)


def assistant(content='a', **more):
    return dict(role='assistant', content=content, **more)


CALL = dict(type='function', function=dict(name='w', arguments=dict(city='K')))
TOOL = dict(type='function', function=dict(name='w', parameters=dict(city=dict(type='string'))))
RECORDS = [
    dict(messages=[user(name='n'), assistant()], id=1, source=''),
    dict(messages=[user(), assistant(None, tool_calls=[CALL]), assistant()], tools=[TOOL]),
    dict(messages=[user(), assistant()], tools=json.dumps([TOOL])),
    dict(messages=[user(), assistant(weight=0)]),
    dict(messages=[user(), assistant('BAD', train=False), user(weight=1), assistant('GOOD')]),
    dict(messages=[user(), assistant(thinking='r'), user(), assistant(''), user()]),
    dict(messages=[user([dict(type='image_url')]), assistant()]),
    dict(messages=[{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]),
    dict(messages=[]),
]
LEFT_OUT = {
    'tool_calls': (2, 2), 'no_loss': (1, 4), 'not_trained': (1, 5), 'asks_training': (1, 5),
    'thoughts': (1, 6), 'empty_answer': (1, 6), 'no_last_answer': (1, 6), 'other_parts': (1, 7),
    'empty': (1, 9), 'key of a message: name': (1, 1), 'key of a record: id': (1, 1)}
# As Qwen3's template, it takes the thoughts out of all answers but the last one.
STRIPS = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if loop.last and m.reasoning_content %}"
    "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def write_lines(path, records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))


def prepared(folder):
    """(meta.json of a source, marked text of all its documents)."""
    meta = json.loads((folder / 'meta.json').read_text())
    text = ''
    for shard in meta['shards']:
        ids = open_shard(str(folder / shard['file']))
        mask = np.fromfile((folder / shard['file']).with_suffix('.mask'), np.uint8)
        text += marked(TOKENIZER, ids, mask)
    return meta, text


def test_what_conversations_say_is_honoured_or_counted(tmp_path, chat_data, capsys):
    write_lines(tmp_path / 'in.jsonl', RECORDS)
    prepare_chats('mine', tmp_path / 'in.jsonl', tmp_path, chat_data / 'chat', val_fraction=0)
    meta, text = prepared(tmp_path / 'mine')
    assert meta['counts'] == {what: n for what, (n, _) in LEFT_OUT.items()}
    for what, (_, line) in LEFT_OUT.items():
        assert meta['examples'][what] == f'in.jsonl:{line}'
    assert text.split('<|endoftext|>')[1:] == [
        f'<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{rest}' for rest in (
            '[[a<|im_end|>]]\n',
            'BAD<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n'
            '[[GOOD<|im_end|>]]\n',
            '[[<think>\nr\n</think>\n\na<|im_end|>]]\n<|im_start|>user\nq<|im_end|>\n'
            '<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\nq<|im_end|>\n',
            '[[a<|im_end|>]]\n')]
    said = capsys.readouterr().out
    assert '2  conversations with tool calls were left out, because the templates llama3' in said
    assert 'not used: name (1 messages) (first: in.jsonl:1)' in said
    assert '1 empty (first: in.jsonl:9)' in said


def model_with(folder, template):
    """A folder with the tokenizer of the tests and a chat template."""
    folder.mkdir()
    save_tokenizer(str(folder), TOKENIZER)
    (folder / 'chat_template.jinja').write_text(template)
    return folder


@pytest.mark.parametrize('form', ['jsonl', 'parquet'])
def test_a_models_own_template_renders_tools_and_thoughts(tmp_path, form, capsys):
    from datasets import Dataset

    records = [
        dict(messages=[user(), assistant('', tool_calls=[CALL]), assistant('b')], tools=[TOOL]),
        dict(messages=[user('u'), assistant('c', thinking='r'), user('v'), assistant('d')],
             tools=None)]
    path = tmp_path / f'in.{form}'
    if form == 'jsonl':
        write_lines(path, records)
    else:
        Dataset.from_list(records).to_parquet(str(path))
    model = model_with(tmp_path / 'model', STRIPS)
    knobs = dict(template='model', val_fraction=0)
    prepare_chats('mine', path, tmp_path / 'a', model, **knobs)
    meta, text = prepared(tmp_path / 'a/mine')
    head = '<|im_start|>{}\n{}<|im_end|>\n'
    ask = '<|im_start|>assistant\n[[{}<|im_end|>]]\n'
    documents = [
        json.dumps(TOOL) + head.format('user', 'q') + ask.format(json.dumps([CALL]))
        + ask.format('b'),
        head.format('user', 'u') + head.format('assistant', 'c') + head.format('user', 'v')
        + ask.format('d'),
        head.format('user', 'u') + ask.format('<think>r</think>c')]
    assert text == ''.join('<|endoftext|>' + document for document in documents)
    assert meta['splits']['train']['documents'] == 3
    counts = {'split': 1, 'thoughts': 1, 'role_order': 1}
    assert meta['counts'] == counts and 'role_order' in meta['examples']
    # A shard ends with a record, so that a source that was interrupted goes on with the next one.
    prepare_chats('mine', path, tmp_path / 'b', model, shard_tokens=1, **knobs)
    assert [s['documents'] for s in prepared(tmp_path / 'b/mine')[0]['shards']] == [1, 2]
    # Another template makes another source.
    (model / 'chat_template.jinja').write_text(STRIPS.replace('loop.last', 'true'))
    with pytest.raises(BadInput, match='made with other settings .*template_sha256'):
        prepare_chats('mine', path, tmp_path / 'a', model, **knobs)


def test_a_source_keeps_the_date_that_its_template_shows(tmp_path):
    write_lines(tmp_path / 'in.jsonl', [dict(messages=[user(), assistant()])])
    model = model_with(tmp_path / 'model', "{{ strftime_now('%Y') }}" + STRIPS)
    arguments = ('mine', tmp_path / 'in.jsonl', tmp_path, model, 'model')
    prepare_chats(*arguments, val_fraction=0)
    path = tmp_path / 'mine/meta.json'
    meta = json.loads(path.read_text())
    assert meta['settings']['template_date'] is not None
    meta['settings']['template_date'] = '2020-01-01'
    path.write_text(json.dumps(meta))
    prepare_chats(*arguments, val_fraction=0)       # it is complete, and not another source


# -- mistakes --------------------------------------------------------------------------------------


def test_damaged_or_missing_masks_are_refused(chat_data, tiny_data):
    def refused(words):
        open_mask.cache_clear()
        with pytest.raises(BadInput, match=words):
            packed(chat_data)

    mask = next((chat_data / 'chat/train').glob('*.mask'))
    content = mask.read_bytes()
    mask.write_bytes(content[:-3])
    refused('truncated or belongs to another shard')
    mask.unlink()
    refused('loss mask .* is missing')
    mask.write_bytes(content)
    for path in (chat_data / 'chat/train').glob('*.mask'):
        path.write_bytes(bytes(len(path.read_bytes())))
    refused('no document with a token that the loss counts')
    with pytest.raises(BadInput, match='has no meta.json'):
        Source(tiny_data, 'a', 'train', 16, packing='document')


@pytest.mark.parametrize('messages, template, words', [
    ([dict(role='user', content='hi')], 'chatml',
     'chats.jsonl:1: no conversation with an answer of the assistant'),
    ([dict(role='robot', content='hi'), dict(role='assistant', content='x')], 'chatml',
     "role 'robot'.*the roles are"),
    ([dict(role='user', content='hi'), dict(role='assistant', content='x', weight=0.5)], 'chatml',
     'chats.jsonl:1: a message has weight = 0.5. A loss mask is 0 or 1'),
    ([dict(role='user', content='hi'), dict(role='assistant', content='x', mask=False)], 'chatml',
     'chats.jsonl:1: a message has mask = false, which means'),
    ([dict(role='assistant', content='x')], 'model', 'has no chat template beside it'),
    ([dict(role='assistant', content='x')], 'llama3',
     r'has no <\|start_header_id\|>.*Set chat_template=chatml'),
])
def test_unusable_conversations_are_refused(tmp_path, chat_data, messages, template, words):
    chats = tmp_path / 'chats.jsonl'
    chats.write_text(json.dumps(dict(messages=messages)) + '\n')
    with pytest.raises(BadInput, match=words):
        prepare_chats('mine', chats, tmp_path / 'out', chat_data / 'chat', template)


def test_shards_without_a_document_make_no_rows():
    assert pack_documents([(np.array([5, 5]), None)], 0, 8).n_rows == 0


@pytest.mark.parametrize('knob, value, words', [
    ('packing', 'documents', 'packing = .* must be one of window, document'),
    ('warmup_frac', 2.0, 'warmup_frac .*at most 1'),
    ('overlong', 'cut', 'overlong = .* must be one of truncate, drop'),
    ('max_steps', None, 'nor max_tokens nor epochs'),
])
def test_impossible_knobs_are_refused(tmp_path, tiny_data, knob, value, words):
    with pytest.raises(BadInput, match=words):
        run_here(train_command(tmp_path / 'run', tiny_data, **{knob: value}))


def test_checkpointed_blocks_are_compiled_and_compute_the_same():
    import torch._dynamo
    counters = torch._dynamo.utils.counters
    config = ModelConfig(vocab_size=97, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, ffn_dim=48)

    def compile_eagerly(function, compiler=torch.compile):
        return compiler(function, backend='aot_eager')

    losses, gradients = [], []
    for compile_blocks in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model = GPT(config)
        init_weights(model, 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, 'compile', compile_eagerly)
            apply_parallelism(model, None, torch.float32, compile_blocks, 'full')
        idx = torch.arange(48).view(2, 24)
        loss = model.loss(idx, idx + 1)[0]
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.embed.weight.grad)
        assert (counters['stats']['unique_graphs'] > 0) == compile_blocks
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)
