"""Conversations as tokens, with a mask of what the loss counts: the assistant's words.

    messages = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}]
    ids, mask = encode_chat(tokenizer, messages, 'llama3')

There are two templates. Their special tokens are those of the same names in the tokenizer. The same
characters inside a message are plain text, so no message can end a turn. A content is encoded apart
from the header before it, because that is how it is generated.
"""

import contextlib
import functools
import json
import math
import os
import signal
import threading
import time

import numpy as np

from configurator import BadInput, read_json, read_source

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
# Limits of a stranger's template.
MOST_ITEMS = 10**7          # items or characters that a product may have
MOST_SECONDS = 10           # time of a rendering


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


@functools.cache
def sandbox_class():
    """The class of Jinja environments for templates that a stranger may have written.

    Such a template reaches no private attribute, changes no value that it is given, and makes no
    large range and no large product.
    """
    # Imported here, because only templates need it.
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Sandbox(ImmutableSandboxedEnvironment):
        # Jinja would evaluate a product of constants in C, where no time limit reaches it.
        intercepted_binops = frozenset(('*', '**'))

        def call_binop(self, context, operator, left, right):
            sizes = [len(x) if hasattr(x, '__len__') else abs(x) for x in (left, right)]
            if operator == '**' and max(sizes) > 100 or math.prod(sizes) > MOST_ITEMS:
                raise SecurityError(f"'{operator}' of values as large as these is not allowed")
            return super().call_binop(context, operator, left, right)

    return Sandbox


@contextlib.contextmanager
def time_limit(seconds):
    """Raises TimeoutError in the block after so many seconds, if this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield               # Python runs the handlers of signals in the main thread only
        return

    def stop(*_):
        raise TimeoutError(f'it ran for more than {seconds} seconds')

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def line_in_template(error):
    """The line of a template that an error comes from. None: unknown."""
    line = getattr(error, 'lineno', None)
    traceback = error.__traceback__
    while traceback is not None:
        # Jinja gives the frames of a template this name, and the template's lines.
        if traceback.tb_frame.f_code.co_filename == '<template>':
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def render(tokenizer, messages, template, add_generation_prompt=True):
    """Renders messages as text by a Jinja chat template: one of JINJA, or a model's own.

    Raises BadInput if the template fails in any way, or takes longer than MOST_SECONDS.
    """
    from jinja2 import TemplateError

    def raise_exception(message):
        raise TemplateError(message)

    def to_json(value, **options):
        # Jinja's own filter escapes <, > and & for HTML, which would change the prompt.
        return json.dumps(value, ensure_ascii=False, indent=options.get('indent'))

    # The settings and functions that transformers gives to templates.
    # The template may come from a stranger's model, so it runs in a sandbox.
    environment = sandbox_class()(
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
    )
    environment.globals |= dict(raise_exception=raise_exception, strftime_now=time.strftime)
    environment.filters['tojson'] = to_json
    values = dict(messages=messages, add_generation_prompt=add_generation_prompt, tools=None)
    values['bos_token'] = tokenizer.names[tokenizer.bos_id]
    values['eos_token'] = tokenizer.names[tokenizer.stop_ids[0]]
    try:
        with time_limit(MOST_SECONDS):
            return environment.from_string(template).render(values)
    except Exception as error:
        # A template is a program of somebody else, which may raise anything.
        line = line_in_template(error)
        where = '' if line is None else f' in its line {line}'
        folder = os.path.dirname(tokenizer.path) or '.'
        reason = f'{type(error).__name__}: {error}'.rstrip('.')
        raise BadInput(
            f'the chat template of the model in {folder} fails{where}: {reason}. Mend it, or set '
            '--chat_template to llama3 or chatml.'
        ) from None


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


def read_template(path):
    """The Jinja template in a chat_template.jinja or tokenizer_config.json. None: it has none.

    Raises BadInput if the file is damaged or of another form.
    """
    if not path.endswith('.json'):
        return read_source(path)
    config = read_json(path)
    if not isinstance(config, dict):
        raise BadInput(f'{path} is no JSON object. Restore the file of the model.')
    template = config.get('chat_template')
    # There may be several templates, each with a name.
    if isinstance(template, list):
        try:
            template = {t['name']: t['template'] for t in template}['default']
        except (KeyError, TypeError):
            raise BadInput(
                f"{path}: chat_template is a list without a template named 'default'. Set "
                '--chat_template.'
            ) from None
    if template is not None and not isinstance(template, str):
        raise BadInput(
            f'{path}: chat_template must be text, it is of type {type(template).__name__}. Mend '
            'it, or set --chat_template.'
        )
    return template


def find_template(folder, tokenizer, asked='auto'):
    """The chat template to use: a name in TEMPLATES, or the text of a Jinja template.

    That is the one asked for. For 'auto' it is the model's own in `folder`, or else one of
    TEMPLATES that the tokenizer has the tokens of. Raises BadInput if there is none, and if the
    model's own is damaged.
    """
    if asked != 'auto':
        check_template(tokenizer, asked)
        return asked
    for name in ('chat_template.jinja', 'tokenizer_config.json'):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            template = read_template(path)
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
