"""Conversations as tokens, with a mask that says where the loss counts: on the assistant's words.

    ids, mask = encode_chat(tokenizer, [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}], 'llama3')

Two templates. A special token is the one of that name in the tokenizer; the same characters inside a message are plain
text, so nobody's words can end a turn. Contents are encoded apart from the headers around them, as they are generated.
"""
import json
import os
import time

import numpy as np

from configurator import BadInput
from lib.tokenizer import stop_ids

# what stands before the role, between role and content, and after the content; <|...|> are special tokens
TEMPLATES = {
    'llama3': (['<|start_header_id|>'], ['<|end_header_id|>', '\n\n'], ['<|eot_id|>'], []),
    'chatml': (['<|im_start|>'], ['\n'], ['<|im_end|>'], ['\n']),
}
# the same for tools that read Jinja, as a model's chat_template.jinja
JINJA = {
    'llama3': "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
              "(message['content'] | trim) + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
              "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    'chatml': "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' "
              "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
ROLES = ('system', 'user', 'assistant', 'tool', 'ipython')


def check_template(tokenizer, template):
    """Raises BadInput when there is no such template or the tokenizer lacks its special tokens."""
    if template not in TEMPLATES:
        raise BadInput(f"chat_template = '{template}' must be one of {', '.join(TEMPLATES)}.")
    have = tokenizer.encoding._special_tokens
    missing = {name: [t for part in parts for t in part if t.startswith('<|') and t not in have] for name, parts in TEMPLATES.items()}
    if missing[template]:
        fits = [name for name in TEMPLATES if not missing[name]]
        raise BadInput(f"the tokenizer {tokenizer.path} has no {', '.join(missing[template])}, which chat_template = '{template}' "
                       'needs. ' + (f'Set chat_template={fits[0]}.' if fits else 'Take the tokenizer of a chat model.'))


def encode_parts(tokenizer, parts):
    special = tokenizer.encoding._special_tokens
    return [i for part in parts for i in ([special[part]] if part.startswith('<|') else tokenizer.encode(part))]


def encode_chat(tokenizer, messages, template):
    """Messages -> (ids (n,) uint32 with BOS in front, mask (n,) uint8).

    messages: list of {'role', 'content'}. The mask is 1 on the assistant's content (<think> spans included) and the token
    that ends its turn. Llama 3's template strips blanks around a content, ChatML's does not.
    Raises ValueError for a message that is none or has an unknown role, BadInput for text that cannot be tokenized.
    """
    before, between, after, last = TEMPLATES[template]
    ids, mask = [np.array([tokenizer.bos_id], dtype=np.uint32)], [np.zeros(1, dtype=np.uint8)]

    def add(part, counts):
        ids.append(np.asarray(part, dtype=np.uint32))
        mask.append(np.full(len(part), counts, dtype=np.uint8))

    for message in messages:
        role, content = message['role'], message['content']
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(f'a message has role {role!r} and content of type {type(content).__name__}; the roles are '
                             + ', '.join(ROLES))
        add(encode_parts(tokenizer, [*before, role, *between]), 0)
        add(tokenizer.encode_document(content.strip() if template == 'llama3' else content), role == 'assistant')
        add(encode_parts(tokenizer, after), role == 'assistant')
        add(encode_parts(tokenizer, last), 0)
    return np.concatenate(ids), np.concatenate(mask)


def render(tokenizer, messages, template, add_generation_prompt=True):
    """Messages -> the text that a Jinja chat template (one of JINJA, or a model's own) makes of them."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise TemplateError(message)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
    environment.globals |= dict(raise_exception=raise_exception, strftime_now=time.strftime)
    environment.filters['tojson'] = lambda value, **options: json.dumps(value, ensure_ascii=False, indent=options.get('indent'))
    names = {i: name for name, i in tokenizer.encoding._special_tokens.items()}
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, tools=None, bos_token=names[tokenizer.bos_id],
            eos_token=names[stop_ids(tokenizer)[0]])
    except TemplateError as error:
        raise BadInput(f'the chat template of the model fails ({type(error).__name__}: {error}). Choose another with '
                       '--chat_template.') from None


def encode_prompt(tokenizer, messages, template):
    """Messages -> list of ids up to where the assistant's next words begin. template: a name, or the text of a Jinja template.

    In a model's own Jinja template special tokens in a message count as such; in ours they are plain text.
    """
    if template not in TEMPLATES:
        return tokenizer.encode_marked(render(tokenizer, messages, template))
    before, between, _, _ = TEMPLATES[template]
    return encode_chat(tokenizer, messages, template)[0].tolist() + encode_parts(tokenizer, [*before, 'assistant', *between])


def find_template(folder, tokenizer, asked='auto'):
    """The chat template to use: the one asked for by name, or ('auto') the model's own in `folder`, or ours that fits the tokenizer."""
    if asked != 'auto':
        check_template(tokenizer, asked)
        return asked
    for name in ('chat_template.jinja', 'tokenizer_config.json'):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, encoding='utf-8') as f:
                own = f.read() if name.endswith('jinja') else json.load(f).get('chat_template')
            if isinstance(own, list):               # several of them, each with a name
                own = next((t['template'] for t in own if t['name'] == 'default'), None)
            if own:
                return own
    fits = [name for name, parts in TEMPLATES.items() if all(t in tokenizer.encoding._special_tokens for t in (*parts[0], parts[2][0]))]
    if not fits:
        raise BadInput(f"the model in {folder} has no chat template, and its tokenizer has neither Llama 3's nor ChatML's tokens: it is "
                       'no chat model.')
    return fits[0]


def marked(tokenizer, ids, mask):
    """The decoded text of a conversation, what the loss counts between [[ and ]]."""
    edges = np.flatnonzero(np.diff(mask, prepend=0, append=0))
    out, at = [], 0
    for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist()):
        out += [tokenizer.decode(ids[at:start].tolist()), '[[', tokenizer.decode(ids[start:stop].tolist()), ']]']
        at = stop
    return ''.join(out) + tokenizer.decode(ids[at:].tolist())
