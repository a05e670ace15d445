"""Writes text with a model, token by token in the terminal, or holds a conversation with it.

    python tools/sample.py --ckpt=out/run --prompt='The river'
    python tools/sample.py --ckpt=HuggingFaceTB/SmolLM2-135M-Instruct --chat=True --temperature=0.6

ckpt is a run, a checkpoint, an imported folder, a Hugging Face folder or a hub name. A conversation
uses the model's own chat template, or else one of ours that fits its tokenizer. Thoughts (<think>
... </think>) are dim. In a conversation, Ctrl-C ends an answer, /reset starts again, and /exit or
Ctrl-D leaves.
"""

import functools
import re
import sys

if __name__ == '__main__':
    import _path  # noqa: F401  (puts the project's folder on the import path)

import torch

from configurator import BadInput, at_least, between, configure, one_of
from lib import hf
from lib.chat import encode_prompt, end_ids, find_template
from lib.device import pick_dtype, start_ranks, tune_malloc
from tools.commands import check_text, warn_unused

# -- knobs --
ckpt = ''                               # run, checkpoint, imported folder, Hugging Face folder or
                                        # hub name
prompt = ''                             # beginning of the text
chat = False                            # hold a conversation. `prompt` is its first message
system = ''                             # chat: the system message
chat_template = 'auto'                  # chat: llama3 or chatml; auto: the model's own, or the one
                                        # that fits
n_samples: at_least(1) = 1              # number of texts, each with its own seed
max_new_tokens: at_least(1) = 256       # maximum length of a text or an answer, in tokens
temperature: at_least(0.0) = 0.8        # 0: always the most likely token
top_k: at_least(1) | None = 50          # sample from this many of the most likely tokens; None: all
top_p: between(1e-9, 1.0) | None = None # sample from the most likely tokens with this much
                                        # probability together
seed: between(0, 9_223_372_036_854_775_807) = 1337  # the same seed gives the same text
device: one_of('auto', 'cpu', 'cuda', 'mps') = 'auto'   # auto: a GPU when there is one
dtype: one_of('auto', 'float32', 'bfloat16') = 'auto'       # of weights and computation

DIM = '\x1b[2m'
PLAIN = '\x1b[0m'
MARKS = ('<think>', '</think>')
MARK = re.compile('|'.join(MARKS))


def pieces(tokens, tokenizer, before=()):
    """Turns ids into text as soon as characters are complete. Leaves out control tokens.

    before: ids of the text that they continue.
    """
    shown = (token for token in tokens if token not in tokenizer.control_ids)
    return tokenizer.stream(shown, [i for i in before if i not in tokenizer.control_ids])


def dimmed(texts, on):
    """Yields the texts with `on` before and PLAIN after every thought. on='': unchanged."""
    off = PLAIN if on else ''
    waiting = ''
    for text in texts:
        waiting += text
        while match := MARK.search(waiting):
            shown = on + match[0] if match[0] == '<think>' else match[0] + off
            yield waiting[: match.start()] + shown
            waiting = waiting[match.end() :]
        # An end that may begin a mark waits for the next text.
        end = len(waiting)
        for mark in MARKS:
            for n in range(1, len(mark)):
                if waiting.endswith(mark[:n]):
                    end = min(end, len(waiting) - n)
        yield waiting[:end]
        waiting = waiting[end:]
    yield waiting


def answer(model, tokenizer, context, sampling, ids, number, ends=None):
    """Prints the continuation of ids (list) while it is generated, and returns its text.

    context: of the model, in tokens; sampling: options of GPT.stream; number: added to the seed;
    ends: ids that end an answer in a conversation, where Ctrl-C ends it as well. None: a text.
    Raises BadInput if the ids fill the context.
    """
    room = min(sampling['max_new_tokens'], context - len(ids))
    if room < 1:
        raise BadInput(f'the text has {len(ids):,} tokens, the context of the model {context:,}.')
    # With one seed for all, every sample would be the same text.
    options = {**sampling, 'max_new_tokens': room, 'seed': sampling['seed'] + number}
    prompt = torch.tensor([ids], device=next(model.parameters()).device)
    new = []

    def until_stop():
        for token in model.stream(prompt, **options):
            if token.item() in (ends or tokenizer.stop_ids):
                return
            new.append(token.item())
            yield token.item()

    has_colour = sys.stdout.isatty()
    # An answer is a text of its own.
    texts = pieces(until_stop(), tokenizer, ids if ends is None else ())
    try:
        for text in dimmed(texts, DIM if has_colour else ''):
            print(text, end='', flush=True)
    except KeyboardInterrupt:
        if ends is None:
            raise
    # Ctrl-C or the limit may end a text inside a thought, so the colour is always reset.
    print(PLAIN if has_colour else '')
    return tokenizer.decode([i for i in new if i not in tokenizer.control_ids])


def converse(write, encode, system, first):
    """Holds a conversation in the terminal.

    write(ids, number) prints and returns an answer; encode(messages) makes the ids of its prompt;
    system: the system message or ''; first: the first message, '' asks for it.
    """
    beginning = [dict(role='system', content=system)] if system else []
    messages = list(beginning)
    turn = 0
    while True:
        try:
            said = first or input('> ')
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError as error:
            raise BadInput(f'the message is not valid UTF-8 text ({error}).') from None
        check_text('the message', said)
        first = ''
        if said.strip() == '/exit':
            return
        if said.strip() == '/reset':
            messages = list(beginning)
        elif said.strip():
            messages.append(dict(role='user', content=said))
            try:
                reply = write(encode(messages), turn)
                messages.append(dict(role='assistant', content=reply))
                turn += 1
            except BadInput as error:
                # A message that does not fit would make all later prompts too long as well.
                messages.pop()
                print(f'{error} /reset begins anew.')


if __name__ == '__main__':
    configure(globals(), verbose=False)
    if not ckpt:
        raise BadInput('ckpt is missing: name a model, for example --ckpt=out/run.')
    check_text('prompt', prompt)
    check_text('system', system)
    if chat:
        warn_unused(sys.argv[1:], ['n_samples'], 'with --chat=True')
    else:
        warn_unused(sys.argv[1:], ['system', 'chat_template'], 'without --chat=True')
    if temperature == 0:
        warn_unused(sys.argv[1:], ['top_k', 'top_p', 'seed'], 'with --temperature=0')
    tune_malloc()
    _, _, here = start_ranks(device, unfit=None)
    model, tokenizer, about = hf.open_model(ckpt, here, pick_dtype(dtype, here)[0])
    context = about['context']
    sampling = dict(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    sampling |= dict(top_k=top_k, top_p=top_p)
    write = functools.partial(answer, model, tokenizer, context, sampling)
    if chat:
        import readline  # noqa: F401  (arrow keys and history in input())

        template = find_template(about['folder'], tokenizer, chat_template)
        print(f'context of {context:,} tokens; /reset begins anew, /exit leaves')
        encode = functools.partial(encode_prompt, tokenizer, template=template)
        # A template that fails on any message would fail on every one.
        encode([dict(role='user', content='Hi')])
        write = functools.partial(write, ends=end_ids(tokenizer, template))
        converse(write, encode, system, prompt)
    else:
        ids = [*tokenizer.start_ids, *tokenizer.encode_marked(prompt), *tokenizer.end_ids]
        # Without a prompt there would be no position to predict the first token from.
        ids = ids or [tokenizer.bos_id]
        for i in range(n_samples):
            print(prompt, end='', flush=True)
            write(ids, i)
