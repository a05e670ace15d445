"""tools/sample.py: text equals that of transformers, thoughts are dim, and it can converse."""

import os
import pty
import select
import subprocess
import sys
import time

import pytest
import torch

from configurator import BadInput
from lib import hf
from lib.byte_level import GPT2_PATTERN
from lib.chat import encode_prompt
from lib.tokenizer import make_tokenizer
from model import sample_token
from tests.conftest import ROOT, run_here
from tests.test_tokenizer import sentencepiece_bpe
from tools import sample


def text_of(capsys, ckpt, prompt, *arguments):
    capsys.readouterr()
    options = ['--device=cpu', '--dtype=float32', f'--ckpt={ckpt}', f'--prompt={prompt}']
    assert run_here(['tools/sample.py', *options, *arguments]) is None
    return capsys.readouterr().out


def test_greedy_text_is_that_of_transformers(trained, tmp_path, capsys):
    transformers = pytest.importorskip('transformers')
    hf.export_model(str(trained), str(tmp_path / 'hf'), 'auto', None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    for prompt in ('7 times ', 'the number', ''):
        ids = tokenizer(prompt, return_tensors='pt').input_ids
        with torch.no_grad():
            out = theirs.generate(ids, max_new_tokens=30, do_sample=False)[0]
        expected = tokenizer.decode(out, skip_special_tokens=True)
        for ckpt in (trained, tmp_path / 'hf'):
            text = text_of(capsys, ckpt, prompt, '--temperature=0', '--max_new_tokens=30')
            assert text.rstrip('\n') == expected


def test_greedy_text_of_a_sentencepiece_model_is_that_of_transformers(tmp_path, capsys):
    """Its decoder drops the first space of a text, but not that of a continuation."""
    transformers = pytest.importorskip('transformers')
    library = sentencepiece_bpe()
    library.save(str(tmp_path / 'tokenizer.json'))
    n = library.get_vocab_size()
    torch.manual_seed(3)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.LlamaConfig(vocab_size=n, max_position_embeddings=64, **sizes)
    theirs = transformers.LlamaForCausalLM(config).eval()
    for weights in theirs.parameters():
        weights.data.normal_(std=0.5)
    theirs.generation_config.eos_token_id = [2, 0]
    theirs.save_pretrained(tmp_path)
    (tmp_path / 'tokenizer_config.json').write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}')
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    n_spaces = 0
    for prompt in ('the number', 'the', ' 7 times \u00e9 a', '<s>the'):
        ids = tokenizer(prompt, return_tensors='pt').input_ids
        with torch.no_grad():
            out = theirs.generate(ids, max_new_tokens=20, do_sample=False)[0].tolist()
        # What transformers shows of the prompt and of the whole differs only by special tokens.
        ids = ids[0].tolist()
        new = tokenizer.decode(out, skip_special_tokens=True)
        new = new[len(tokenizer.decode(ids, skip_special_tokens=True)) :]
        text = text_of(capsys, tmp_path, prompt, '--temperature=0', '--max_new_tokens=20')
        assert text.rstrip('\n') == (prompt + new).rstrip('\n')
        n_spaces += new.startswith(' ')
    assert n_spaces


def test_seeds(trained, capsys):
    def text(*arguments):
        return text_of(capsys, trained, '1 ', '--max_new_tokens=40', *arguments)

    first = text('--seed=1')
    second = text('--seed=2')
    assert first == text('--seed=1') != second
    assert text('--seed=1', '--n_samples=2') == first + second


@pytest.mark.parametrize('top_k', [None, 3, 4])
@pytest.mark.parametrize('top_p', [None, 0.6, 0.7, 1e-9])
def test_top_k_and_top_p_draw_from_the_distribution_they_define(top_k, top_p):
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0, 2.5, 0.0]) * 0.8
    p = (logits.double() / 0.7).softmax(0)
    order = p.argsort(descending=True).tolist()[:top_k]
    kept = []
    total = 0.0
    # The most likely first, until their share of what top_k kept reaches top_p.
    for i in order:
        if top_p is None or total < top_p or not kept:
            kept.append(i)
        total += (p[i] / p[order].sum()).item()
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    tokens = sample_token(logits.expand(n, -1), 0.7, top_k, top_p, generator)
    drawn = tokens.flatten().bincount(minlength=6) / n
    wanted = torch.zeros(6, dtype=torch.float64)
    wanted[kept] = p[kept] / p[kept].sum()
    assert (drawn - wanted).abs().max() < 0.015
    assert ((drawn > 0) == (wanted > 0)).all()


def test_thoughts_are_dim_however_the_text_is_cut():
    text = 'a < b <think>if x <th then\n</thin</think> done <think>again'
    dim = text.replace('<think>', f'{sample.DIM}<think>')
    expected = dim.replace('</think>', f'</think>{sample.PLAIN}')
    for size in range(1, len(text) + 1):
        parts = [text[i : i + size] for i in range(0, len(text), size)]
        assert ''.join(sample.dimmed(parts, sample.DIM)) == expected
        assert ''.join(sample.dimmed(parts, '')) == text


def test_characters_of_several_tokens_come_whole(trained):
    tokenizer = hf.find_model(str(trained))['tokenizer']
    text = 'é한😀 plain'
    shown = list(sample.pieces([1, *tokenizer.encode(text), 2, 999], tokenizer))
    assert ''.join(shown) == text
    assert shown[0] == ''       # the first byte of é is no text yet


def test_marks_of_thoughts_that_are_tokens_are_shown():
    """<think> is an added token in Qwen3's tokenizer, but not a special one."""
    ranks = {bytes([b]): b for b in range(256)}
    special = {'<|endoftext|>': 256, '<think>': 257, '</think>': 258}
    added = ['<think>', '</think>']
    tokenizer = make_tokenizer('x', ranks, GPT2_PATTERN, special, '<|endoftext|>', added=added)
    ids = [257, *tokenizer.encode('hm'), 258, *tokenizer.encode('yes'), 256]
    assert tokenizer.encode('<think>hm</think>yes') == ids[:-1]
    assert tokenizer.control_ids == {256}
    shown = ''.join(sample.dimmed(sample.pieces(ids, tokenizer), sample.DIM))
    assert shown == f'{sample.DIM}<think>hm</think>{sample.PLAIN}yes'


def test_a_conversation_in_a_terminal(trained):
    model, tokenizer, _ = hf.open_model(str(trained), torch.device('cpu'), torch.float32)
    prompt = encode_prompt(tokenizer, [dict(role='user', content='1 in')], 'chatml')
    ids = model.generate(torch.tensor([prompt]), 6, temperature=0)[0, len(prompt) :].tolist()
    ends = [k for k, i in enumerate(ids) if i in tokenizer.stop_ids]
    ids = ids[: min([*ends, 6])]
    reply = tokenizer.decode([i for i in ids if i not in tokenizer.control_ids])
    reply = reply.replace('\n', '\r\n').encode()
    command = [sys.executable, 'tools/sample.py', f'--ckpt={trained}', '--chat=True']
    command += ['--temperature=0', '--max_new_tokens=6', '--dtype=float32', '--device=cpu']
    ours, theirs = pty.openpty()
    streams = dict(stdin=theirs, stdout=theirs, stderr=theirs)
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'TERM': 'dumb'}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **streams)
    os.close(theirs)

    def say(words, mark=b'\n> '):
        """Types a line and returns what the terminal shows up to the mark."""
        os.write(ours, words)
        out = b''
        end = time.monotonic() + 60
        while mark not in out:
            assert time.monotonic() < end, out.decode()
            if select.select([ours], [], [], 1)[0]:
                out += os.read(ours, 4096)
        return out

    try:
        assert b'context of 64 tokens' in say(b'', b'> ')
        assert reply in say(b'1 in\n')
        assert b'/reset begins anew' in say(b'x' * 80 + b'\n')
        say(b'/reset\n', b'> ')
        assert reply in say(b'1 in\n')
        os.write(ours, b'\x04')
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(ours)


@pytest.mark.parametrize('arguments, message', [
    ('--temperature=1', 'name a model'),
    ('--ckpt=CKPT --top_p=1.5', 'top_p = 1.5 must be at least'),
    ('--ckpt=CKPT --chat=True --chat_template=llama3', r'has no <\|start_header_id'),
    ('--ckpt=CKPT --chat=True --chat_template=alpaca', 'must be one of llama3, chatml'),
    (f'--ckpt=CKPT --prompt={"x" * 80}', 'has 81 tokens, the context of the model 64'),
    ('--ckpt=CKPT --prompt=a\udcff', 'prompt is not valid UTF-8 text: character 2'),
    ('--ckpt=CKPT --chat=True --system=\udcff', 'system is not valid UTF-8'),
    ('--ckpt=CKPT --n_samples=0', 'n_samples = 0 must be at least 1'),
    ('--ckpt=CKPT --seed=99999999999999999999', 'seed = 99999999999999999999 must be at least 0'),
    ('--ckpt=CKPT --dtype=int8', "dtype = 'int8' must be one of auto, float32, bfloat16"),
    ('--ckpt=CKPT --device=tpu', "device = 'tpu' must be one of auto, cpu, cuda"),
])
def test_bad_input(trained, arguments, message):
    arguments = arguments.replace('CKPT', str(trained)).split()
    with pytest.raises(BadInput, match=message):
        run_here(['tools/sample.py', '--device=cpu', *arguments])


@pytest.mark.parametrize('said, template, message', [
    (b'\xff\xfe\n', None, 'the message is not valid UTF-8'),
    (b'hello\n', '{{ 1//0 }}', 'fails in its line 1: ZeroDivisionError'),
])
def test_a_chat_that_cannot_go_on(trained, tmp_path, monkeypatch, said, template, message):
    hf.export_model(str(trained), str(tmp_path / 'hf'), 'auto', None)
    if template:
        (tmp_path / 'hf' / 'chat_template.jinja').write_text(template)
    (tmp_path / 'said').write_bytes(said)
    with open(tmp_path / 'said', encoding='utf-8') as stdin, pytest.raises(BadInput, match=message):
        monkeypatch.setattr(sys, 'stdin', stdin)
        run_here(['tools/sample.py', f'--ckpt={tmp_path}/hf', '--device=cpu', '--chat=True'])


def test_knobs_without_effect_are_said(trained, capsys):
    options = ['--device=cpu', f'--ckpt={trained}', '--max_new_tokens=1', '--temperature=0']
    run_here(['tools/sample.py', *options, '--system=x', '--top_k=5'])
    said = capsys.readouterr().err
    assert 'warning: --system has no effect without --chat=True.' in said
    assert 'warning: --top_k has no effect with --temperature=0.' in said
