"""What the files beside a model's weights say: special tokens, end ids and the chat template.

    config.json             eos_token_id, if generation_config.json names none
    generation_config.json  eos_token_id: one id, or a list
    tokenizer_config.json   bos_token, eos_token, pad_token, unk_token, additional special tokens,
                            chat_template (one, or a list of named ones)
    special_tokens_map.json the same tokens, in older folders
    chat_template.jinja     the template. It wins over the one in tokenizer_config.json
    additional_chat_templates/<name>.jinja  further templates

The order in which they count is that of transformers 5.
"""

import glob
import os
from dataclasses import dataclass, field

from configurator import BadInput, read_json, read_source

# The files that describe how a model is used. A copy of a model's folder needs them.
NAMES = (
    'tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json',
    'chat_template.jinja', 'added_tokens.json')
TEMPLATE_FOLDER = 'additional_chat_templates'
# Tokens that these classes of transformers have when tokenizer_config.json names none.
CLASS_TOKENS = {
    'GPT2Tokenizer': dict.fromkeys(('bos_token', 'eos_token', 'unk_token'), '<|endoftext|>'),
    'LlamaTokenizer': dict(bos_token='<s>', eos_token='</s>', unk_token='<unk>'),
    'Qwen2Tokenizer': dict.fromkeys(('eos_token', 'pad_token', 'unk_token'), '<|endoftext|>'),
    'GemmaTokenizer': dict(
        bos_token='<bos>', eos_token='<eos>', pad_token='<pad>', unk_token='<unk>',
        mask_token='<mask>'),
}


@dataclass(frozen=True)
class ModelFiles:
    """What a folder says. A file that is missing says nothing."""
    folder: str
    config: dict | None = None      # config.json in Hugging Face's form. None: there is none
    tokens: dict = field(default_factory=dict)      # bos_token, eos_token, pad_token, unk_token and
                                    # other keys that end in _token -> name, of those that have one
    more_special: tuple = ()        # names of additional special tokens
    eos_ids: tuple = ()             # ids that end a text, by generation_config.json or config.json
    describes_tokens: bool = False  # there is a tokenizer_config.json or special_tokens_map.json
    templates: dict = field(default_factory=dict)   # name -> text of a Jinja template

    @property
    def template(self):
        """The default chat template. None: there is none."""
        return self.templates.get('default')


def read_object(path):
    """The dict in a JSON file. {}: there is no such file. Raises BadInput for any other content."""
    if not os.path.isfile(path):
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise BadInput(f'{path} is no JSON object. Download it again, or restore it.')
    return content


def token_name(path, key, value):
    """The name of a token that a file gives as text, or as a dict with its content."""
    name = value.get('content') if isinstance(value, dict) else value
    if not isinstance(name, str):
        raise BadInput(
            f'{path}: {key} must be text, or an object with the text `content`. It is '
            f'{value!r:.80}. Restore the file of the model.')
    return name


def read_tokens(folder):
    """Returns ({key: name}, names of additional special tokens) of a folder. Raises BadInput."""
    config_path = os.path.join(folder, 'tokenizer_config.json')
    config = read_object(config_path)
    found = dict.fromkeys(config, config_path)
    merged = dict(config)
    # Newer folders describe every token in tokenizer_config.json. Then transformers does not read
    # the older file.
    if 'added_tokens_decoder' not in config:
        path = os.path.join(folder, 'special_tokens_map.json')
        for key, value in read_object(path).items():
            merged[key] = value
            found[key] = path
    tokens = {}
    more = []
    kind = config.get('tokenizer_class')
    if isinstance(kind, str):
        tokens |= CLASS_TOKENS.get(kind.removesuffix('Fast'), {})
    for key, value in merged.items():
        if key in ('additional_special_tokens', 'extra_special_tokens'):
            names = value or []
            if isinstance(names, dict):
                tokens |= {k: token_name(found[key], k, v) for k, v in names.items()}
            elif isinstance(names, list):
                more += [token_name(found[key], key, name) for name in names]
            else:
                raise BadInput(
                    f'{found[key]}: {key} must be a list of tokens. Restore the file of the model.')
        elif key.endswith('_token') and value is None:
            tokens.pop(key, None)
        # add_bos_token and its like are settings and no tokens.
        elif key.endswith('_token') and not isinstance(value, bool):
            tokens[key] = token_name(found[key], key, value)
    return tokens, tuple(dict.fromkeys(more))


def read_eos_ids(path, content):
    """The ids in the field eos_token_id of a file: a tuple. Raises BadInput for anything else."""
    value = content.get('eos_token_id')
    ids = [] if value is None else value if isinstance(value, list) else [value]
    # A bool is an int to isinstance.
    if not all(type(i) is int and i >= 0 for i in ids):
        raise BadInput(
            f'{path}: eos_token_id = {value!r} must be an id or a list of ids. Restore the file of '
            'the model.')
    return tuple(dict.fromkeys(ids))


def read_templates(folder):
    """Returns {name: text} of the chat templates in a folder. Raises BadInput for a damaged one."""
    templates = {}
    path = os.path.join(folder, 'tokenizer_config.json')
    given = read_object(path).get('chat_template')
    if isinstance(given, list):
        for entry in given:
            if not (isinstance(entry, dict) and {'name', 'template'} <= entry.keys()):
                raise BadInput(
                    f"{path}: every entry of the list chat_template needs `name` and `template`. "
                    'Mend it, or set --chat_template.')
            templates[entry['name']] = entry['template']
    elif given is not None:
        templates['default'] = given
    for text in templates.values():
        if not isinstance(text, str):
            raise BadInput(
                f'{path}: chat_template must be text, it is of type {type(text).__name__}. Mend '
                'it, or set --chat_template.')
    files = [os.path.join(folder, 'chat_template.jinja')]
    files += glob.glob(os.path.join(glob.escape(folder), TEMPLATE_FOLDER, '*.jinja'))
    from_files = {}
    for path in files:
        if os.path.isfile(path):
            name = os.path.basename(path).removesuffix('.jinja')
            from_files['default' if path == files[0] else name] = read_source(path)
    # Files of their own replace what tokenizer_config.json has.
    return {name: text for name, text in (from_files or templates).items() if text}


def read_model_files(folder):
    """Reads what a folder says about its model. Raises BadInput for a damaged file."""
    config = read_object(os.path.join(folder, 'config.json'))
    # The config.json of a run holds the knobs of train.py.
    if 'model_type' not in config:
        config = None
    path = os.path.join(folder, 'generation_config.json')
    content = read_object(path)
    if content.get('eos_token_id') is None and config is not None:
        path = os.path.join(folder, 'config.json')
        content = config
    tokens, more_special = read_tokens(folder)
    described = any(os.path.isfile(os.path.join(folder, name)) for name in NAMES[:2])
    return ModelFiles(
        folder, config, tokens, more_special, read_eos_ids(path, content), described,
        read_templates(folder))
