"""Text from a model, token by token in the terminal; with --chat=True a conversation.

    python tools/sample.py --ckpt=out/run --prompt='The river'
    python tools/sample.py --ckpt=HuggingFaceTB/SmolLM2-135M-Instruct --chat=True --temperature=0.6 --top_p=0.95

ckpt is a run, a checkpoint, an imported folder, a Hugging Face folder or a hub name. A conversation is put into the model's own
chat template, or the one of ours that fits its tokenizer. Thoughts (<think> ... </think>) are shown dim. In a conversation
Ctrl-C ends an answer, /reset begins anew, /exit or Ctrl-D leaves.
"""
import codecs
import contextlib
import sys

import torch

if __name__ == '__main__':
    import _path  # noqa: F401

from configurator import BadInput, configure
from lib import hf
from lib.chat import encode_prompt, find_template
from lib.device import pick_dtype, start_ranks, tune_malloc
from lib.tokenizer import stop_ids

# -- knobs --
ckpt = ''                               # run, checkpoint, imported folder, Hugging Face folder or hub name
prompt = ''                             # what the text begins with
chat = False                            # a conversation; prompt, if there is one, is its first message
system = ''                             # chat: the system message
chat_template = 'auto'                  # chat: auto (the model's own, or the one that fits) | llama3 | chatml
n_samples = 1                           # texts, each with its own seed
max_new_tokens = 256                    # tokens of a text or an answer, at most
temperature = 0.8                       # 0: always the likeliest token
top_k: int | None = 50                  # draw from that many of the likeliest tokens; None: from all
top_p: float | None = None              # draw from the likeliest tokens with that much probability together
seed = 1337                             # same seed, same text
device = 'auto'                         # auto | cpu | cuda
dtype = 'auto'                          # auto | float32 | bfloat16
DIM, PLAIN = '\x1b[2m', '\x1b[0m'


def pieces(tokens, tokenizer):
    """Ids -> text as soon as it is whole characters, without special tokens."""
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    for token in tokens:
        if token not in tokenizer.control_ids:
            with contextlib.suppress(KeyError):         # a row of the table that is no token
                yield decoder.decode(tokenizer.encoding.decode_single_token_bytes(token))
    yield decoder.decode(b'', final=True)


def dimmed(texts, on):
    """Passes text on, `on` and off around thoughts. What may be the beginning of a mark waits for the rest of it."""
    marks, waiting = ('<think>', '</think>'), ''
    for text in texts:
        waiting += text
        while True:
            at, mark = min((waiting.find(m), m) for m in marks if m in waiting) if any(m in waiting for m in marks) else (-1, '')
            if at < 0:
                break
            yield waiting[:at] + (on + mark if mark == marks[0] else mark + (PLAIN if on else ''))
            waiting = waiting[at + len(mark):]
        kept = max((n for m in marks for n in range(1, len(m)) if waiting.endswith(m[:n])), default=0)
        yield waiting[:len(waiting) - kept]
        waiting = waiting[len(waiting) - kept:]
    yield waiting


def answer(model, tokenizer, context, ids, number):
    """Prints what follows the ids (list), as it comes. Returns its text. BadInput when the ids fill the context already."""
    room = min(max_new_tokens, context - len(ids))
    if room < 1:
        raise BadInput(f'the text so far has {len(ids):,} tokens, the context of the model {context:,}: nothing can follow.')
    stops, said = set(stop_ids(tokenizer)), []

    def until_stop():
        for token in model.stream(torch.tensor([ids], device=next(model.parameters()).device), room, temperature, top_k, top_p, seed + number):
            if token.item() in stops:
                return
            said.append(token.item())
            yield token.item()
    colour = sys.stdout.isatty()
    try:
        for text in dimmed(pieces(until_stop(), tokenizer), DIM if colour else ''):
            print(text, end='', flush=True)
    except KeyboardInterrupt:
        if not chat:
            raise
    print(PLAIN if colour else '')
    return tokenizer.decode([i for i in said if i not in tokenizer.control_ids])


def converse(model, tokenizer, context, template):
    """The conversation in the terminal."""
    print(f'context of {context:,} tokens; /reset begins anew, /exit leaves')
    beginning = [dict(role='system', content=system)] if system else []
    messages, first, turn = [*beginning], prompt, 0
    while True:
        try:
            said = first or input('> ')
        except (EOFError, KeyboardInterrupt):
            print()
            return
        first = ''
        if said.strip() == '/exit':
            return
        if said.strip() == '/reset':
            messages = [*beginning]
        elif said.strip():
            messages.append(dict(role='user', content=said))
            try:
                reply = answer(model, tokenizer, context, encode_prompt(tokenizer, messages, template), turn)
                messages.append(dict(role='assistant', content=reply))
                turn += 1
            except BadInput as error:
                messages.pop()
                print(f'{error} /reset begins anew.')


def main():
    if not ckpt:
        raise BadInput('say which model: --ckpt=out/run.')
    for name, value, fine in (('temperature', temperature, temperature >= 0), ('top_k', top_k, top_k is None or top_k > 0),
                              ('top_p', top_p, top_p is None or 0 < top_p <= 1), ('max_new_tokens', max_new_tokens, max_new_tokens > 0)):
        if not fine:
            raise BadInput(f'{name} = {value} is out of range.')
    tune_malloc()
    on = start_ranks(device)[2]
    model, tokenizer, about = hf.open_model(ckpt, on, pick_dtype(dtype, on)[0])
    if chat:
        import readline  # noqa: F401  (arrow keys and history in input())
        return converse(model, tokenizer, about['context'], find_template(about['folder'], tokenizer, chat_template))
    ids = tokenizer.encode_marked(prompt)
    for i in range(n_samples):
        print(prompt, end='', flush=True)
        answer(model, tokenizer, about['context'], [tokenizer.bos_id] * (about['add_bos'] or not ids) + ids, i)


if __name__ == '__main__':
    config = configure(globals(), verbose=False)
    main()
