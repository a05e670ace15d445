"""What a conversation of a dataset says: messages, thoughts, tools, and what the loss counts.

    conversation = read_conversation([{'role': 'user', 'content': 'Hi'}, ...])

Nothing is dropped in silence. What cannot be honoured raises LeftOut or ValueError. What is changed
or not used is counted in `Conversation.notes` and `Conversation.keys`.
"""

import collections
import json
from dataclasses import dataclass, field

# The names of a message's thoughts, in the order in which transformers looks for them.
REASONING = ('reasoning_content', 'thinking', 'reasoning')
# Keys of a message that say whether the loss counts it, and whether 1 means that it does. Their
# users: OpenAI and Mistral (weight), Axolotl (train), Tinker (trainable), ms-swift and AgentTuning
# (loss, loss_scale), torchtune (masked).
FLAGS = dict(
    weight=True, train=True, trainable=True, loss=True, loss_weight=True, loss_scale=True,
    loss_mask=True, mask=True, masked=False)
PLAIN_KEYS = {'role', 'content'}
READ_KEYS = {'role', 'content', 'tool_calls', 'function_call', *REASONING, *FLAGS}
# `from` in the form of ShareGPT -> role.
SHAREGPT_ROLES = dict(
    system='system', human='user', user='user', gpt='assistant', assistant='assistant',
    tool='tool', observation='tool')
# Roles of tool results that only a model's own template can show.
TOOL_ROLES = ('function', 'observation', 'tool_response', 'tool_call', 'function_call')


# What is counted. A number stands before every sentence. First what is left out, then what is
# changed or kept as it is.
NOTES = dict(
    tool_calls="conversations with tool calls were left out, because the templates llama3 and "
        "chatml do not render them. --chat_template=model uses the template of the tokenizer's "
        'folder',
    tools_not_shown="conversations with tool calls were left out, because the model's template "
        'does not render them',
    other_parts='conversations with parts that are no text, such as images, were left out',
    template_refuses="conversations were left out, because the model's template refuses them",
    unclear_blocks='conversations with answers that have no loss were left out, because the '
        "generation blocks of the model's template are not one for every answer",
    holds_bos='conversations were left out, because a message holds the name of the token that '
        'begins a document',
    no_loss='conversations were left out, because no answer in them has a loss: they are empty, or '
        'weight, train or the like says so',
    not_trained='answers have no loss, because weight, train or the like says so',
    empty_answer='empty answers have no loss',
    split="conversations became several documents. The model's template shows an answer otherwise "
        'once the conversation goes on, so it stands in a document that ends with it',
    no_prompt="answers have no loss, because the model's template has no prompt that they follow",
    asks_training="messages of users, tools and system ask for a loss (weight, train or the like). "
        "Only the assistant's words have one",
    thoughts='thoughts of answers stood in a field of their own and are read as <think> spans',
    two_thoughts='thoughts in a field of their own are not used, because the content of the answer '
        'has others',
    thoughts_not_shown="thoughts are not shown by the model's template",
    not_shown="messages are not shown as they are by the model's template",
    parts_joined='contents that were lists of parts were joined as text',
    tool_role='conversations with results of tools are kept, with the results as turns of their '
        'own',
    role_order='conversations have roles out of order (two users or answers in a row, an answer '
        'first, a system message later). They are kept as they are',
    no_last_answer='conversations do not end with an answer. They are kept, and the last turn has '
        'no loss')


class LeftOut(ValueError):
    """A conversation that is left out and counted.

    what    a key of NOTES, or 'empty' or 'dropped' of prepare/common.py
    detail  what is said beside the place, or ''
    """
    def __init__(self, what, detail=''):
        super().__init__(detail or what)
        self.what = what
        self.detail = detail


@dataclass
class Conversation:
    messages: list      # dicts without null entries. The content is text, the thoughts are under
                        # `reasoning_content`
    trained: list       # of every message: whether the loss may count it
    tools: list | None  # descriptions of tools, as a template gets them
    notes: collections.Counter = field(default_factory=collections.Counter)     # key of NOTES -> n
    keys: collections.Counter = field(default_factory=collections.Counter)  # keys of messages that
                        # only a template may use -> messages

    @property
    def has_tools(self):
        """Whether it has tool calls, or tools to call."""
        for m in self.messages:
            if m.get('tool_calls') or m.get('function_call') or m['role'] in TOOL_ROLES:
                return True
        return bool(self.tools)

    def text(self, n=None):
        """What the first n messages say, thoughts included, for hashes and counts of bytes."""
        return '\n'.join(map(with_thoughts, self.messages[:n]))


def with_thoughts(message):
    """The content of a message, after its thoughts in the form of Qwen3's template."""
    if 'reasoning_content' not in message:
        return message['content']
    thoughts = message['reasoning_content'].strip('\n')
    return f"<think>\n{thoughts}\n</think>\n\n{message['content'].lstrip(chr(10))}"


def from_sharegpt(message):
    """A message with `from` and `value` as one with `role` and `content`."""
    message = dict(message)
    name = message.pop('from')
    value = message.pop('value')
    if name != 'function_call':
        return dict(role=SHAREGPT_ROLES.get(name, name), content=value, **message)
    try:
        call = json.loads(value)
    except (TypeError, ValueError):
        call = None
    calls = call if isinstance(call, list) else [call]
    if not all(isinstance(call, dict) and 'name' in call for call in calls):
        raise ValueError('a message from function_call holds no JSON object with `name`')
    calls = [dict(type='function', function=call) for call in calls]
    return dict(role='assistant', content='', tool_calls=calls, **message)


def join_parts(message, notes):
    """The message with its list of parts as text. Raises LeftOut for images and other parts."""
    text = ''
    thoughts = ''
    for part in message['content']:
        kind = part.get('type', 'text') if isinstance(part, dict) else None
        if isinstance(part, str):
            text += part
        elif kind == 'text' and isinstance(part.get('text'), str):
            text += part['text']
        elif kind == 'thinking' and isinstance(part.get('thinking'), str):
            thoughts += part['thinking']
        else:
            raise LeftOut('other_parts')
    notes['parts_joined'] += 1
    message = {**message, 'content': text}
    if thoughts and not any(key in message for key in REASONING):
        message['reasoning_content'] = thoughts
    return message


def flag_of(message):
    """Whether a message says that the loss counts it: True, False, or None if it says nothing."""
    verdicts = set()
    for key, meaning in FLAGS.items():
        if key not in message:
            continue
        value = message[key]
        if key == 'mask' and isinstance(value, bool):
            raise ValueError(
                f'a message has mask = {json.dumps(value)}, which means that the loss counts it in '
                'some formats and that it does not in others. Give mask 1 (counted) or 0, or '
                '`train` or `masked` with true or false')
        if not isinstance(value, (int, float)) or value not in (0, 1):
            raise ValueError(
                f'a message has {key} = {value!r:.80}. A loss mask is 0 or 1 here, so give 0 or 1 '
                '(false or true)')
        verdicts.add(bool(value) == meaning)
    if len(verdicts) == 2:
        given = ', '.join(f'{key} = {message[key]!r}' for key in FLAGS if key in message)
        raise ValueError(f'a message has {given}, which contradict each other')
    return verdicts.pop() if verdicts else None


def move_thoughts(message, notes):
    """The message with its thoughts under `reasoning_content` alone, or without that field."""
    names = [key for key in REASONING if key in message]
    if not names or message['role'] != 'assistant':
        return message
    thoughts = message[names[0]]
    if not isinstance(thoughts, str):
        raise ValueError(f'{names[0]} of a message is no text but {type(thoughts).__name__}')
    message = {key: value for key, value in message.items() if key not in names}
    if '</think>' in message['content']:
        if thoughts.strip() not in message['content']:
            notes['two_thoughts'] += 1
    elif thoughts.strip():
        notes['thoughts'] += 1
        message['reasoning_content'] = thoughts
    return message


def read_message(message, conversation):
    """Adds a message of a record to a Conversation."""
    notes = conversation.notes
    # Most messages have a role and a content, and need no more than this.
    is_plain = isinstance(message, dict) and message.keys() == PLAIN_KEYS
    if isinstance(message, dict) and not (is_plain and isinstance(message['content'], str)):
        # transformers drops what is null as well.
        message = {key: value for key, value in message.items() if value is not None}
        if 'role' not in message and 'from' in message and 'value' in message:
            message = from_sharegpt(message)
        if message.get('role') == 'assistant':
            message.setdefault('content', '')
        if isinstance(message.get('content'), list):
            message = join_parts(message, notes)
    if not (isinstance(message, dict) and isinstance(message.get('role'), str)
            and isinstance(message.get('content'), str)):
        raise ValueError(
            'a message has no role or no content, or one of them is no text. A message looks like '
            '{"role": "user", "content": "Hi"}')
    flag = None
    if len(message) > 2:
        message = move_thoughts(message, notes)
        flag = flag_of(message)
        for key, value in message.items():
            if key not in READ_KEYS and value not in ('', [], {}):
                conversation.keys[key] += 1
            elif key in REASONING and message['role'] != 'assistant' and value != '':
                conversation.keys[key] += 1
    is_answer = message['role'] == 'assistant'
    if flag is True and not is_answer:
        notes['asks_training'] += 1
    elif flag is False and is_answer:
        notes['not_trained'] += 1
    elif is_answer and not message['content'].strip() and not (message.keys() & {
            'reasoning_content', 'tool_calls', 'function_call'}):
        notes['empty_answer'] += 1
        flag = False
    conversation.messages.append(message)
    conversation.trained.append(is_answer and flag is not False)


def note_order(conversation):
    """Counts roles that are out of order."""
    roles = [m['role'] for m in conversation.messages]
    if roles[-1] != 'assistant':
        conversation.notes['no_last_answer'] += 1
    if roles[0] == 'system':
        roles = roles[1:]
    before = None
    for role in roles:
        if role in ('assistant', 'user') and role == before or role == 'system':
            break
        if before is None and role != 'user':
            break
        before = role
    else:
        return
    conversation.notes['role_order'] += 1


def read_tools(tools):
    """The list of tools of a record, which may be written as JSON. None: none is given."""
    if isinstance(tools, str):
        if not tools.strip():
            return None
        try:
            tools = json.loads(tools)
        except ValueError:
            raise ValueError('`tools` is text, but no JSON') from None
    if tools is not None and not (
            isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError('`tools` is no list of objects that describe a tool each')
    return tools


def read_conversation(messages, tools=None):
    """Reads a list of messages: {'role', 'content'}, or {'from', 'value'} as ShareGPT has them.

    tools: a list, JSON or None
    Returns a Conversation. Raises LeftOut if it has parts that are no text, and ValueError if it is
    malformed.
    """
    conversation = Conversation([], [], read_tools(tools))
    for message in messages:
        read_message(message, conversation)
    if messages:
        note_order(conversation)
    return conversation


def without_nulls(value):
    """A value without the null entries of its dicts. Parquet gives every dict all fields."""
    if isinstance(value, dict):
        return {key: without_nulls(v) for key, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(v) for v in value]
    return value
