"""tools/sample.py: the same text as transformers, thoughts shown dim, conversations in the right template."""
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
from lib.chat import encode_prompt
from model import sample_token
from tests.conftest import ROOT, run_here
from tools import sample


def text_of(capsys, *arguments):
    assert run_here(['tools/sample.py', '--device=cpu', '--dtype=float32', *arguments]) is None
    return capsys.readouterr().out


def test_greedy_text_is_that_of_transformers(trained, tmp_path, capsys):
    transformers = pytest.importorskip('transformers')
    hf.export_model(str(trained), str(tmp_path / 'hf'), 'auto', None)
    capsys.readouterr()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    for prompt in ('7 times ', 'the number', ''):
        ids = tokenizer(prompt, return_tensors='pt').input_ids
        with torch.no_grad():
            out = theirs.generate(ids, max_new_tokens=30, do_sample=False)[0]
        expected = tokenizer.decode(out, skip_special_tokens=True)
        for ckpt in (trained, tmp_path / 'hf'):
            capsys.readouterr()
            assert text_of(capsys, f'--ckpt={ckpt}', f'--prompt={prompt}', '--temperature=0', '--max_new_tokens=30').rstrip('\n') == expected


def test_seeds(trained, capsys):
    texts = [text_of(capsys, f'--ckpt={trained}', '--prompt=1 ', '--max_new_tokens=40', f'--seed={seed}') for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    both = text_of(capsys, f'--ckpt={trained}', '--prompt=1 ', '--max_new_tokens=40', '--seed=1', '--n_samples=2')
    assert both == texts[0] + texts[2]


@pytest.mark.parametrize('top_k, top_p', [(None, None), (3, None), (None, 0.6), (4, 0.7), (None, 1e-9)])
def test_top_k_and_top_p_draw_from_the_distribution_they_define(top_k, top_p):
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0, 2.5, 0.0]) * 0.8
    p = (logits.double() / 0.7).softmax(0)
    order = p.argsort(descending=True).tolist()
    if top_k:
        order = order[:top_k]
    kept, total = [], 0.0
    for i in order:                                   # likeliest first, until their share of what top_k left reaches top_p
        if top_p is None or total < top_p or not kept:
            kept.append(i)
        total += (p[i] / p[order].sum()).item()
    generator = torch.Generator().manual_seed(0)
    n = 20_000
    drawn = sample_token(logits.expand(n, -1), 0.7, top_k, top_p, generator).flatten().bincount(minlength=6) / n
    wanted = torch.zeros(6, dtype=torch.float64)
    wanted[kept] = p[kept] / p[kept].sum()
    assert (drawn - wanted).abs().max() < 0.015 and ((drawn > 0) == (wanted > 0)).all()


def test_thoughts_are_dim_however_the_text_is_cut():
    text = 'a < b <think>if x <th then\n</thin</think> done <think>again'
    on, off = sample.DIM, sample.PLAIN
    expected = f'a < b {on}<think>if x <th then\n</thin</think>{off} done {on}<think>again'
    for size in range(1, len(text) + 1):
        parts = [text[i:i + size] for i in range(0, len(text), size)]
        assert ''.join(sample.dimmed(parts, on)) == expected
        assert ''.join(sample.dimmed(parts, '')) == text


def test_characters_of_several_tokens_come_whole(trained):
    tokenizer = hf.find_model(str(trained))['tokenizer']
    text = 'é한😀 plain'
    ids = tokenizer.encode(text)
    shown = list(sample.pieces([1, *ids, 2, 999], tokenizer))
    assert ''.join(shown) == text and '\ufffd' not in ''.join(shown) and shown[0] == ''


def read_until(terminal, mark, seconds=60):
    out, end = b'', time.monotonic() + seconds
    while mark not in out:
        assert time.monotonic() < end, out.decode()
        if select.select([terminal], [], [], 1)[0]:
            out += os.read(terminal, 4096)
    return out.decode()


def test_a_conversation_in_a_terminal(trained):
    model, tokenizer, _ = hf.open_model(str(trained), torch.device('cpu'), torch.float32)
    prompt = encode_prompt(tokenizer, [dict(role='user', content='1 in')], 'chatml')
    expected = model.generate(torch.tensor([prompt]), 6, temperature=0)[0, len(prompt):].tolist()
    reply = tokenizer.decode([i for i in expected[:next((k for k, i in enumerate(expected) if i in (0, 2)), 6)] if i > 2])
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, 'tools/sample.py', f'--ckpt={trained}', '--chat=True', '--temperature=0', '--max_new_tokens=6',
                                '--dtype=float32', '--device=cpu'], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT,
                               env={**os.environ, 'OMP_NUM_THREADS': '1', 'TERM': 'dumb'})
    os.close(theirs)
    try:
        assert 'context of 64 tokens' in read_until(ours, b'> ')
        os.write(ours, b'1 in\n')
        assert reply.replace('\n', '\r\n') in read_until(ours, b'\n> ')
        os.write(ours, b'x' * 80 + b'\n')
        assert '/reset begins anew' in read_until(ours, b'\n> ')
        os.write(ours, b'/reset\n')
        read_until(ours, b'> ')
        os.write(ours, b'1 in\n')
        assert reply.replace('\n', '\r\n') in read_until(ours, b'\n> ')
        os.write(ours, b'\x04')
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(ours)


@pytest.mark.parametrize('arguments, message', [
    ([], 'say which model'), (['--top_p=1.5'], 'top_p = 1.5 is out of range'), (['--chat=True', '--chat_template=llama3'], r'has no <\|start_header_id'),
    (['--prompt=' + 'x' * 80], 'has 81 tokens, the context of the model 64'), (['--chat_template=alpaca', '--chat=True'], 'must be one of llama3, chatml')])
def test_bad_input(trained, arguments, message):
    with pytest.raises(BadInput, match=message):
        run_here(['tools/sample.py', '--device=cpu', *([f'--ckpt={trained}'] if arguments else []), *arguments])


def test_marks_of_thoughts_that_are_tokens_are_shown():
    """In Qwen3's tokenizer <think> is an added token, and no special one."""
    from lib.tokenizer import GPT2_PATTERN, make_tokenizer
    tokenizer = make_tokenizer('x', {bytes([b]): b for b in range(256)}, GPT2_PATTERN, {'<|endoftext|>': 256, '<think>': 257, '</think>': 258},
                               '<|endoftext|>', added=['<think>', '</think>'])
    ids = [257, *tokenizer.encode('hm'), 258, *tokenizer.encode('yes'), 256]
    assert tokenizer.encode('<think>hm</think>yes') == ids[:-1] and tokenizer.control_ids == {256}
    assert ''.join(sample.dimmed(sample.pieces(ids, tokenizer), sample.DIM)) == f'{sample.DIM}<think>hm</think>{sample.PLAIN}yes'
