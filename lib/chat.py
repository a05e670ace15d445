"""Conversations as tokens, with a mask of what the loss counts: the assistant's words.

    messages = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}]
    ids, mask = encode_chat(tokenizer, messages, 'llama3')

There are two templates of ours. Their special tokens are those of the same names in the tokenizer.
The same characters inside a message are plain text, so no message can end a turn. A content is
encoded apart from the header before it, because that is how it is generated.

A model's own template is a Jinja program in the model's folder. It gets what transformers gives it.
Names of special tokens inside a message become these tokens there, as in transformers.
"""

import collections
import contextlib
import datetime
import functools
import json
import math
import os
import re
import signal
import threading
from dataclasses import dataclass

import numpy as np

from configurator import BadInput
from lib.messages import REASONING, LeftOut, read_conversation, with_thoughts
from lib.model_files import read_model_files
from lib.tokenizer import RankTokenizer

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
# The special tokens that transformers gives to templates.
NAMED_TOKENS = [f'{kind}_token' for kind in 'bos eos unk sep pad cls mask'.split()]
# The block of a template that marks what the assistant writes.
GENERATION = re.compile(r'\{%-?\s*generation\s*-?%\}')
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


def joins_pieces(tokenizer):
    """Whether pieces of a text may be encoded apart. SentencePiece puts a space before a text."""
    if isinstance(tokenizer, RankTokenizer):        # of tiktoken, which never does
        return True
    return tokenizer.decode([*tokenizer.encode('a'), *tokenizer.encode('b')]) == 'ab'


def encode_after(tokenizer, before, text, names=True):
    """Ids of a text (list) that stands after the text `before`, for any tokenizer.

    names: whether names of special tokens become these tokens
    """
    encode = tokenizer.encode_marked if names else tokenizer.encode
    if not before:
        return encode(text)
    # A tokenizer may put a space after a special token, but puts none inside a text.
    ends = [name for name in tokenizer.special_tokens if before.endswith(name)]
    before = max(ends, key=len) if names and ends else '\n'
    start = encode(before)
    ids = encode(before + text)
    if ids[:len(start)] != start:
        raise BadInput(
            f'the tokenizer {tokenizer.path} encodes {text!r:.40} otherwise at the beginning of an '
            'answer, so conversations cannot be made with it.')
    return ids[len(start):]


def encode_chat(tokenizer, messages, template):
    """Encodes a list of messages by one of TEMPLATES: ids (n,) uint32 and mask (n,) uint8.

    The ids begin with BOS. The mask is 1 on the assistant's content, <think> spans included, and on
    the token that ends its turn, unless the message says otherwise (`weight`, `train`, ...; see
    lib/messages.py). Llama 3's template strips blanks around a content, ChatML's does not. Raises
    ValueError for a malformed message or an unknown role, LeftOut (a ValueError) for tool calls,
    and BadInput for text that cannot be tokenized.
    """
    return encode_conversation(tokenizer, read_conversation(messages), template)


def encode_conversation(tokenizer, conversation, template):
    """`encode_chat` for a Conversation."""
    if conversation.has_tools:
        raise LeftOut('tool_calls')
    before, between, after, last = TEMPLATES[template]
    end = encode_parts(tokenizer, after)
    rest = encode_parts(tokenizer, last)
    parts = [[tokenizer.bos_id]]
    counted = [False]
    joins = joins_pieces(tokenizer)
    if not joins:
        rest = encode_after(tokenizer, *after, ''.join(last))
    for message, counts in zip(conversation.messages, conversation.trained, strict=True):
        role = message['role']
        if role not in ROLES:
            raise ValueError(f'a message has role {role!r}; the roles are {", ".join(ROLES)}')
        content = with_thoughts(message)
        if template == 'llama3':
            content = content.strip()
        if joins:
            header = encode_parts(tokenizer, [*before, role, *between])
            words = tokenizer.encode_document(content)
        else:
            header = tokenizer.encode_marked(''.join([*before, role, *between]))
            words = encode_after(tokenizer, between[-1], content, names=False)
        parts += header, words, end, rest
        # Generation stops at the token that ends the turn, so no model writes what follows it.
        counted += False, counts, counts, False
    return join_parts(parts, counted)


def join_parts(parts, counted):
    """Joins parts of ids: ids (n,) uint32 and mask (n,) uint8, 1 in the parts that are counted."""
    ids = np.concatenate(parts, dtype=np.uint32, casting='unsafe')
    return ids, np.repeat(np.array(counted, dtype=np.uint8), [len(part) for part in parts])


def end_ids(tokenizer, template=None):
    """Ids that end an answer: list. Those of the tokenizer, and the end of a turn in TEMPLATES."""
    ids = list(tokenizer.stop_ids)
    if template in TEMPLATES:
        ids += encode_parts(tokenizer, TEMPLATES[template][2])
    return list(dict.fromkeys(ids))


# -- Jinja -----------------------------------------------------------------------------------------


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


class TemplateRefused(BadInput):
    """A chat template raised an exception on purpose. Its message is `reason`."""
    def __init__(self, message, reason):
        super().__init__(message)
        self.reason = reason


class Tracker:
    """Where the generation blocks of a rendering are."""
    def __init__(self):
        self.length = 0         # of the text so far, in characters
        self.blocks = []        # (start, text) of every block


@functools.cache
def jinja_environment():
    """The environment of chat templates: the settings, tags and functions of transformers 5."""
    from jinja2 import TemplateError, nodes, pass_eval_context
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.utils import Namespace

    class Generation(Extension):
        tags = {'generation'}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
            return nodes.CallBlock(self.call_method('_mark'), [], [], body).set_lineno(line)

        @pass_eval_context
        def _mark(self, context, caller):
            text = caller()
            tracker = self.environment.tracker
            tracker.blocks.append((tracker.length, text))
            return text

    class Dict:
        # The type itself would give a template more than is needed.
        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args, **kwargs):
            return dict.fromkeys(*args, **kwargs)

    class PublicNamespace(Namespace):
        # Names with an underscore in front could reach Python's own attributes.
        def __init__(*args, **kwargs):
            self, *rest = args
            for name in dict(*rest, **kwargs):
                PublicNamespace._check(name)
            Namespace.__init__(self, *rest, **kwargs)

        def __setitem__(self, name, value):
            PublicNamespace._check(name)
            Namespace.__setitem__(self, name, value)

        @staticmethod
        def _check(name):
            if str(name).startswith('_'):
                raise SecurityError(f"a namespace must not have the attribute '{name}'")

    def raise_exception(message):
        raise TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own filter escapes <, > and & for HTML, which would change the prompt.
        options = dict(indent=indent, separators=separators, sort_keys=sort_keys)
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    # A template may come from a stranger's model, so it runs in a sandbox.
    environment = sandbox_class()(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, 'jinja2.ext.loopcontrols'])
    environment.globals |= dict(
        raise_exception=raise_exception, dict=Dict(), namespace=PublicNamespace)
    environment.filters['tojson'] = to_json
    return environment


@functools.lru_cache(maxsize=16)
def compiled(template):
    """The program of a Jinja template (text). Compiling takes longer than most renderings."""
    return jinja_environment().from_string(template)


def strftime_on(date, form):
    """What the function strftime_now gives. date: 'YYYY-MM-DD', or None for now."""
    now = datetime.datetime.now() if date is None else datetime.datetime.fromisoformat(date)
    return now.strftime(form)


def as_given(message):
    """A message as transformers 5 gives it to a template: without nulls, thoughts by all names."""
    message = {key: value for key, value in message.items() if value is not None}
    thoughts = [message[key] for key in REASONING if key in message]
    if thoughts:
        message = {'thinking': thoughts[0], **message, 'reasoning_content': thoughts[0]}
    return message


def render(
    tokenizer, messages, template, add_generation_prompt=True, tools=None, date=None, spans=None
):
    """Renders messages as text by a Jinja chat template: one of JINJA, or a model's own.

    tools  list of descriptions of functions, or None
    date   'YYYY-MM-DD' for templates that show the date. None: today
    spans  a list that gets (start, stop), in characters, of every generation block
    Raises TemplateRefused, a BadInput, if the template does so on purpose. Raises BadInput if it
    fails in any other way, or takes longer than MOST_SECONDS.
    """
    from jinja2 import TemplateError

    values = {key: tokenizer.tokens[key] for key in NAMED_TOKENS if key in tokenizer.tokens}
    values |= dict(
        messages=[as_given(m) for m in messages], tools=tools, documents=None,
        add_generation_prompt=add_generation_prompt,
        strftime_now=functools.partial(strftime_on, date))
    # Ours begin with BOS, whatever the model's own does.
    if template in JINJA.values():
        values['bos_token'] = tokenizer.names[tokenizer.bos_id]
    tracker = jinja_environment().tracker = Tracker()
    parts = []
    try:
        with time_limit(MOST_SECONDS):
            for part in compiled(template).generate(values):
                parts.append(part)
                tracker.length += len(part)
    except Exception as error:
        # A template is a program of somebody else, which may raise anything.
        line = line_in_template(error)
        where = '' if line is None else f' in its line {line}'
        folder = os.path.dirname(tokenizer.path) or '.'
        reason = f'{type(error).__name__}: {error}'.rstrip('.')
        message = (
            f'the chat template of the model in {folder} fails{where}: {reason}. Mend it, or set '
            '--chat_template to llama3 or chatml.')
        # Jinja raises only subclasses of it.
        if type(error) is TemplateError:
            raise TemplateRefused(message, str(error)) from None
        raise BadInput(message) from None
    text = ''.join(parts)
    if spans is not None:
        end = 0
        for start, block in tracker.blocks:
            # In a macro or a `set` block the template does not know how much stands before.
            if start < end or not text.startswith(block, start):
                raise BadInput(
                    f'the chat template of the model in {os.path.dirname(tokenizer.path) or "."} '
                    'has generation blocks inside a macro, a variable or one another. Take them '
                    'out of there.')
            end = start + len(block)
            spans.append((start, end))
    return text


def encode_prompt(tokenizer, messages, template):
    """Encodes messages up to the place where the assistant's answer begins: list of ids.

    template: a name in TEMPLATES, or the text of a Jinja template. In a Jinja template, names of
    special tokens inside a message become these tokens. In ours they are plain text.
    """
    if template not in TEMPLATES:
        return tokenizer.encode_marked(render(tokenizer, messages, template))
    before, between, _, _ = TEMPLATES[template]
    ids, _ = encode_chat(tokenizer, messages, template)
    header = [*before, 'assistant', *between]
    if joins_pieces(tokenizer):
        return ids.tolist() + encode_parts(tokenizer, header)
    return ids.tolist() + tokenizer.encode_marked(''.join(header))


def find_template(folder, tokenizer, asked='auto'):
    """The chat template to use: a name in TEMPLATES, or the text of a Jinja template.

    That is the one asked for. For 'auto' it is the model's own in `folder`, or else one of
    TEMPLATES that the tokenizer has the tokens of. Raises BadInput if there is none, and if the
    model's own is damaged.
    """
    if asked != 'auto':
        check_template(tokenizer, asked)
        return asked
    template = default_template(folder)
    if template is not None:
        return template
    fits = fitting_templates(tokenizer)
    if not fits:
        raise BadInput(f'{folder} has no chat template, and its tokenizer fits neither of ours.')
    return fits[0]


def default_template(folder):
    """The text of the model's own template in a folder, None if it has none. Raises BadInput."""
    files = read_model_files(folder)
    if files.templates and files.template is None:
        raise BadInput(
            f"{folder} has chat templates ({', '.join(sorted(files.templates))}), but none is "
            "named 'default'. Set --chat_template.")
    return files.template


# -- a model's own template for training data ------------------------------------------------------


@dataclass(frozen=True)
class ModelTemplate:
    """The chat templates of a model's folder, as training data needs them."""
    texts: dict             # name -> text of a Jinja template
    date: str | None = None     # 'YYYY-MM-DD' for templates that show the date. None: they do not

    def for_tools(self, tools):
        """The text for a conversation with these tools (a list or None), as transformers chooses"""
        if tools is not None and 'tool_use' in self.texts:
            return self.texts['tool_use']
        return self.texts['default']


def read_model_template(tokenizer, date):
    """The ModelTemplate of the folder that a Tokenizer was loaded from. Raises BadInput.

    date: 'YYYY-MM-DD', for templates that show the date
    """
    folder = os.path.dirname(tokenizer.path) or '.'
    # A name of tiktoken has no folder.
    if not os.path.isfile(tokenizer.path) or default_template(folder) is None:
        raise BadInput(
            f'--chat_template=model: the tokenizer {tokenizer.path} has no chat template beside '
            'it (chat_template.jinja, or chat_template in tokenizer_config.json). Give the folder '
            'of a chat model with --tokenizer, or set --chat_template to llama3 or chatml.')
    texts = read_model_files(folder).templates
    texts = {name: texts[name] for name in ('default', 'tool_use') if name in texts}
    shows_date = any('strftime_now' in text for text in texts.values())
    return ModelTemplate(texts, date if shows_date else None)


def spans_of_blocks(conversation, spans):
    """The generation blocks that the loss counts: spans of render() -> list of (start, stop)."""
    trained = [
        counts for m, counts in zip(conversation.messages, conversation.trained, strict=True)
        if m['role'] == 'assistant']
    if all(trained):
        return spans
    if len(spans) != len(trained):
        raise LeftOut('unclear_blocks')
    return [span for span, counts in zip(spans, trained, strict=True) if counts]


def split_by_prefixes(tokenizer, conversation, rendered):
    """Finds what the assistant writes by renderings without generation blocks.

    rendered: function (n, add_generation_prompt) -> the first n messages as text
    Returns (documents, number of answers that are in none of them). A document is (text, spans that
    count, number of messages). An answer counts in the whole conversation if the text up to it is
    the beginning of the whole. Some templates change it when the conversation goes on: Qwen3's
    takes its thoughts out. Such an answer gets a document that ends with it.
    """
    n = len(conversation.messages)
    whole = rendered(n, False)
    documents = [(whole, [], n)]
    n_lost = 0
    for i in np.flatnonzero(conversation.trained).tolist():
        prompt = rendered(i, True) if i else None
        text = whole if i == n - 1 else rendered(i + 1, False)
        # Without a prompt, nobody knows which part of the text is generated.
        if prompt is None or not text.startswith(prompt):
            n_lost += 1
            continue
        # The blanks that a template puts after the end of a turn are not generated.
        stop = len(text.rstrip())
        if not any(text.endswith(name, len(prompt), stop) for name in tokenizer.special_tokens):
            stop = len(text)
        span = (len(prompt), stop)
        if whole.startswith(text):
            documents[0][1].append(span)
        else:
            documents.append((text, [span], i + 1))
    return [document for document in documents if document[1]], n_lost


def check_tools(conversation, text):
    """Raises LeftOut if a template (text) cannot show the tools of a conversation."""
    keys = {key for m in conversation.messages for key in m if m[key]}
    for key in ('tool_calls', 'function_call'):
        if key in keys and key not in text:
            raise LeftOut('tools_not_shown')
    if conversation.tools and 'tools' not in text:
        raise LeftOut('tools_not_shown')


def note_unseen(conversation, messages, text, shown, notes):
    """Notes what a template (text) leaves out of what is `shown`, and keys that it does not use."""
    for message in messages:
        if message['content'].rpartition('</think>')[2].strip() not in shown:
            notes['not_shown'] += 1
        if message.get('reasoning_content', '').strip() not in shown:
            notes['thoughts_not_shown'] += 1
    for key, n in conversation.keys.items():
        if key not in text:
            notes[f'key of a message: {key}'] += n


def encode_by_model(tokenizer, conversation, template):
    """Encodes a Conversation by a ModelTemplate. Returns (documents, notes).

    A document is (ids (n,) uint32, mask (n,) uint8, number of messages in it). Most conversations
    are one document, see split_by_prefixes. The ids begin with BOS, which separates documents in
    shards. The mask is 1 on the generation blocks of the template. If the template has none, it is
    1 on what the template puts after the prompt of an answer, up to the end of the turn. Both sides
    of an edge of the mask are encoded apart, because that is how they are generated. Raises LeftOut
    for what the template does not show or refuses, and ValueError if the template writes BOS.
    """
    notes = collections.Counter()
    text = template.for_tools(conversation.tools)
    check_tools(conversation, text)
    messages = conversation.messages
    if not any(name in text for name in REASONING):
        messages = [
            {key: with_thoughts(m) if key == 'content' else value for key, value in m.items()
             if key != 'reasoning_content'} for m in messages]

    def rendered(n, add_generation_prompt, spans=None):
        return render(
            tokenizer, messages[:n], text, add_generation_prompt, conversation.tools,
            template.date, spans)

    try:
        if GENERATION.search(text):
            spans = []
            whole = rendered(len(messages), False, spans)
            texts = [(whole, spans_of_blocks(conversation, spans), len(messages))]
        else:
            texts, n_lost = split_by_prefixes(tokenizer, conversation, rendered)
            if n_lost:
                notes['no_prompt'] = n_lost
            if len(texts) > 1:
                notes['split'] = 1
    except TemplateRefused as error:
        raise LeftOut('template_refuses', error.reason) from None
    note_unseen(conversation, messages, text, '\0'.join(t for t, _, _ in texts), notes)
    documents = []
    joins = joins_pieces(tokenizer)
    for whole, spans, n in texts:
        # The parts between the edges alternate, beginning with one that does not count.
        edges = [0, *(edge for span in spans for edge in span), len(whole)]
        parts = [
            tokenizer.encode_marked(whole[start:stop]) if joins
            else encode_after(tokenizer, whole[:start], whole[start:stop])
            for start, stop in zip(edges[:-1], edges[1:], strict=True)]
        if parts[0][:1] != [tokenizer.bos_id]:
            parts[0] = [tokenizer.bos_id, *parts[0]]
        ids, mask = join_parts(parts, np.arange(len(parts)) % 2)
        if (ids[1:] == tokenizer.bos_id).any():
            name = tokenizer.names[tokenizer.bos_id]
            if name in conversation.text():
                raise LeftOut('holds_bos')
            raise ValueError(
                f"the model's template writes {name} inside a conversation, and this token begins "
                'a document in the shards. Set --chat_template to llama3 or chatml')
        documents.append((ids, mask, n))
    return documents, notes


def marked(tokenizer, ids, mask):
    """The text of a conversation, with [[ and ]] around what the loss counts."""
    # The parts between the edges of the mask alternate, beginning with one that does not count.
    edges = np.flatnonzero(np.diff(mask, prepend=0, append=0)).tolist()
    text = ''
    for i, (start, stop) in enumerate(zip([0, *edges], [*edges, len(ids)], strict=True)):
        part = tokenizer.decode(ids[start:stop].tolist())
        text += f'[[{part}]]' if i % 2 else part
    return text
