"""Conversations as tokens, with a mask of what the loss counts: the assistant's words.

    messages = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}]
    ids, mask = encode_chat(tokenizer, messages, 'llama3')

There are two templates. Their special tokens are those of the same names in the tokenizer. The same
characters inside a message are plain text, so no message can end a turn. A content is encoded apart
from the header before it, because that is how it is generated.
"""

import json
import os
import time

import numpy as np

from configurator import BadInput

# What stands before the role, between role and content, after the content, and after the turn.
# <|...|> are special tokens.
TEMPLATES = {
    'llama3': (['<|start_header_id|>'], ['<|end_header_id|>', '\n\n'], ['<|eot_id|>'], []),
    'chatml': (['<|im_start|>'], ['\n'], ['<|im_end|>'], ['\n']),
}
# The same for tools that read Jinja, as a model's chat_template.jinja.
JINJA = {
    'llama3': "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n' + (message['content'] | trim) + '<|eot_id|>' }}"
    '{% endfor %}{% if add_generation_prompt %}'
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    'chatml': "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + "
    "'\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}",
}
ROLES = ('system', 'user', 'assistant', 'tool', 'ipython')


def missing_tokens(tokenizer, template):
    """The special tokens of a template that a tokenizer lacks: list of names."""
    parts = [part for group in TEMPLATES[template] for part in group]
    return [p for p in parts if p.startswith('<|') and p not in tokenizer.special_tokens]


def fitting_templates(tokenizer):
    return [name for name in TEMPLATES if not missing_tokens(tokenizer, name)]


def check_template(tokenizer, template):
    """Raises BadInput for an unknown template, and if the tokenizer lacks its special tokens."""
    if template not in TEMPLATES:
        raise BadInput(f"chat_template = '{template}' must be one of {', '.join(TEMPLATES)}.")
    missing = missing_tokens(tokenizer, template)
    if missing:
        remedy = 'Use the tokenizer of a chat model.'
        for name in fitting_templates(tokenizer)[:1]:
            remedy = f'Set chat_template={name}.'
        raise BadInput(
            f'the tokenizer {tokenizer.path} has no {", ".join(missing)}, which chat_template = '
            f"'{template}' needs. {remedy}"
        )


def encode_parts(tokenizer, parts):
    ids = []
    for part in parts:
        if part.startswith('<|'):
            ids.append(tokenizer.special_tokens[part])
        else:
            ids += tokenizer.encode(part)
    return ids


def encode_chat(tokenizer, messages, template):
    """Encodes messages, a list of {'role', 'content'}: ids (n,) uint32 and mask (n,) uint8.

    The ids begin with BOS. The mask is 1 on the assistant's content, <think> spans included, and on
    the token that ends its turn. Llama 3's template strips blanks around a content, ChatML's does
    not. Raises ValueError for a malformed message or an unknown role, and BadInput for text that
    cannot be tokenized.
    """
    before, between, after, last = TEMPLATES[template]
    ids = [np.array([tokenizer.bos_id], dtype=np.uint32)]
    mask = [np.zeros(1, dtype=np.uint8)]

    def add(part, counts):
        ids.append(np.asarray(part, dtype=np.uint32))
        mask.append(np.full(len(part), counts, dtype=np.uint8))

    for message in messages:
        role = message['role']
        content = message['content']
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(
                f'a message has role {role!r} and content of type {type(content).__name__}; the '
                f'roles are {", ".join(ROLES)}'
            )
        if template == 'llama3':
            content = content.strip()
        is_answer = role == 'assistant'
        add(encode_parts(tokenizer, [*before, role, *between]), False)
        add(tokenizer.encode_document(content), is_answer)
        add(encode_parts(tokenizer, after), is_answer)
        # Generation stops at the token that ends the turn, so no model writes what follows it.
        add(encode_parts(tokenizer, last), False)
    return np.concatenate(ids), np.concatenate(mask)


def render(tokenizer, messages, template, add_generation_prompt=True):
    """Renders messages as text by a Jinja chat template: one of JINJA, or a model's own.

    Raises BadInput if the template fails.
    """
    # Imported here, because only a model's own template needs it.
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise TemplateError(message)

    def to_json(value, **options):
        # Jinja's own filter escapes <, > and & for HTML, which would change the prompt.
        return json.dumps(value, ensure_ascii=False, indent=options.get('indent'))

    # The settings and functions that transformers gives to templates.
    # The template may come from a stranger's model, so it runs in a sandbox.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
    )
    environment.globals |= dict(raise_exception=raise_exception, strftime_now=time.strftime)
    environment.filters['tojson'] = to_json
    try:
        return environment.from_string(template).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            tools=None,
            bos_token=tokenizer.names[tokenizer.bos_id],
            eos_token=tokenizer.names[tokenizer.stop_ids[0]],
        )
    except TemplateError as error:
        raise BadInput(f"the model's chat template fails: {error}. Set --chat_template.") from None


def encode_prompt(tokenizer, messages, template):
    """Encodes messages up to the place where the assistant's answer begins: list of ids.

    template: a name in TEMPLATES, or the text of a Jinja template. In a Jinja template, names of
    special tokens inside a message become these tokens. In ours they are plain text.
    """
    if template not in TEMPLATES:
        return tokenizer.encode_marked(render(tokenizer, messages, template))
    before, between, _, _ = TEMPLATES[template]
    ids, _ = encode_chat(tokenizer, messages, template)
    return ids.tolist() + encode_parts(tokenizer, [*before, 'assistant', *between])


def find_template(folder, tokenizer, asked='auto'):
    """The chat template to use: a name in TEMPLATES, or the text of a Jinja template.

    That is the one asked for. For 'auto' it is the model's own in `folder`, or else one of
    TEMPLATES that the tokenizer has the tokens of. Raises BadInput if there is none.
    """
    if asked != 'auto':
        check_template(tokenizer, asked)
        return asked
    for name in ('chat_template.jinja', 'tokenizer_config.json'):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        with open(path, encoding='utf-8') as f:
            template = f.read()
        if name.endswith('.json'):
            template = json.loads(template).get('chat_template')
        # There may be several templates, each with a name.
        if isinstance(template, list):
            named = {t['name']: t['template'] for t in template}
            template = named.get('default')
        if template:
            return template
    fits = fitting_templates(tokenizer)
    if not fits:
        raise BadInput(f'{folder} has no chat template, and its tokenizer fits neither of ours.')
    return fits[0]


def marked(tokenizer, ids, mask):
    """The text of a conversation, with [[ and ]] around what the loss counts."""
    # The parts between the edges of the mask alternate, beginning with one that does not count.
    edges = np.flatnonzero(np.diff(mask, prepend=0, append=0)).tolist()
    text = ''
    for i, (start, stop) in enumerate(zip([0, *edges], [*edges, len(ids)], strict=True)):
        part = tokenizer.decode(ids[start:stop].tolist())
        text += f'[[{part}]]' if i % 2 else part
    return text
