"""Tokenizers of several formats, as `tiktoken.Encoding`s with an end-of-text token and a
fingerprint.

    tokenizer = load_tokenizer('gpt2')                      # a tiktoken name, downloaded once
    tokenizer = load_tokenizer('llama3/tokenizer.model')    # a tiktoken rank file
    tokenizer = load_tokenizer('smollm2/tokenizer.json')    # a Hugging Face byte-level BPE

Only a tiktoken name needs a network. A rank file (lines of base64 token and rank) contains neither
its split pattern nor its special tokens. They are read from `<rank file>.json` if that exists.
`save_tokenizer` writes both files beside the shards. Without it, a file of 128,000 ranks
is taken for Llama 3's and any other for GPT-2's.
"""

import base64
import hashlib
import json
import math
import os
import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import tiktoken

from configurator import BadInput, read_json

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2's pattern on text that was first split at every digit: spaces before a digit are one piece.
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
LLAMA3_SPECIAL = (
    '<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|> <|reserved_special_token_1|> '
    '<|finetune_right_pad_id|> <|reserved_special_token_2|> <|start_header_id|> <|end_header_id|> '
    '<|eom_id|> <|eot_id|> <|python_tag|>'
).split()
PIECE_CHARACTERS = 1_000_000    # longer documents are encoded in pieces
LONGEST_BLANK = 900_000         # tiktoken's regular expressions fail on a million blanks in a row
BLANK_RUN = re.compile(r'\s{%d}' % LONGEST_BLANK)
# No split pattern joins the two sides of these places: the end of a line before a letter, and a
# single space between two words.
CUTS = (re.compile(r'\S\n(?=[^\W\d_])'), re.compile(r'[^\W\d_](?= [^\W\d_])'))
# A document begins with the first of these that the tokenizer has.
END_OF_TEXT = ('<|begin_of_text|>', '<|endoftext|>', '<|end_of_text|>', '<s>', '</s>')
# What reading a file of another form raises.
OTHER_FORM = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError)
# These end a text or a turn of a conversation.
ENDS = ('<|endoftext|>', '<|end_of_text|>', '</s>', '<|eot_id|>', '<|eom_id|>', '<|im_end|>')


def any_of(names):
    """A pattern that matches any of the names, longer ones first, as a group (for re.split)."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile('(' + '|'.join(re.escape(name) for name in longest_first) + ')')


@dataclass
class Tokenizer:
    encoding: tiktoken.Encoding
    path: str               # what it was loaded from
    fingerprint: str        # 16 hex digits of a sha256 over everything that determines the ids
    bos_id: int             # the first token of every document
    ranks: dict             # bytes -> id of every token that is not special
    special_tokens: dict    # name -> id
    nfc: bool               # text is normalized to Unicode's NFC before it is encoded
    added: tuple            # special tokens that plain text may contain, such as runs of spaces
    prefix_id: int          # the token before a text that has no context
    add_bos: bool = True    # whether the model expects BOS before a text

    @cached_property
    def vocab_size(self):
        return 1 + max(*self.ranks.values(), *self.special_tokens.values())

    @cached_property
    def names(self):
        """Id -> name of every special token."""
        return {i: name for name, i in self.special_tokens.items()}

    @cached_property
    def control_ids(self):
        """Ids of the special tokens that are not part of a text."""
        return {i for name, i in self.special_tokens.items() if name not in self.added}

    @cached_property
    def stop_ids(self):
        """Ids that end generation. The first one is reported to other tools as EOS."""
        # BOS is one of them, because in our shards it follows the end of a document.
        ids = [self.special_tokens[name] for name in ENDS if name in self.special_tokens]
        return list(dict.fromkeys([*ids, self.bos_id]))

    @cached_property
    def lacks_bytes(self):
        # SmolLM2 has no token for some control characters. `tokenizers` drops them, and so do we.
        return any(bytes([b]) not in self.ranks for b in range(256))

    @cached_property
    def _special_pattern(self):
        return any_of(self.special_tokens)

    @cached_property
    def _added_pattern(self):
        return any_of(self.added)

    @cached_property
    def _added_mark(self):
        # A character that all added tokens contain, or ''. Most texts do not contain it, and one
        # search for it is faster than one for every token.
        shared = set.intersection(*map(set, self.added)) if self.added else set()
        return max((c for c in shared if not c.isalnum()), default='')

    def encode(self, text):
        """Returns the ids of a text as a list, without BOS. Names of special tokens are text."""
        return self._encode_piece(text).tolist()

    def encode_marked(self, text):
        """`encode` for chat templates: names of special tokens in the text become these tokens."""
        ids = []
        for part in self._special_pattern.split(text):
            if part in self.special_tokens:
                ids.append(self.special_tokens[part])
            else:
                ids += self.encode(part)
        return ids

    def encode_document(self, text):
        """Returns the ids of `encode` as (n,) uint32, for a text of any length, in little memory.

        Raises BadInput for 900,000 blanks in a row and for eight million characters without a break
        between words.
        """
        if len(text) <= PIECE_CHARACTERS:
            return self._encode_piece(text)
        return np.concatenate([self._encode_piece(piece) for piece in self.pieces(text)])

    def _encode_piece(self, text):
        if self.nfc:
            text = unicodedata.normalize('NFC', text)
        if self._added_mark in text and any(name in text for name in self.added):
            ids = []
            for i, part in enumerate(self._added_pattern.split(text)):
                # The odd parts are the added tokens.
                if i % 2:
                    ids.append(self.special_tokens[part])
                else:
                    ids += self.encoding.encode_ordinary(part)
            ids = np.array(ids, dtype=np.uint32)
        else:
            ids = self.encoding.encode_to_numpy(text, disallowed_special=())
        # tiktoken's tokens of the missing bytes lie above all others.
        return ids[ids < self.vocab_size] if self.lacks_bytes else ids

    def pieces(self, text):
        """Yields pieces of a text whose ids together are those of the text. Raises BadInput."""
        start = 0
        length = PIECE_CHARACTERS
        while start < len(text):
            cut = len(text)
            if cut - start > length:
                cut = self._find_cut(text, start + length // 2, start + length)
            if cut is None and length >= 8 * PIECE_CHARACTERS:
                raise BadInput(f'a text has {length:,} characters without a break between words.')
            if cut is None:
                length *= 2
                continue
            piece = text[start:cut]
            if len(piece) > LONGEST_BLANK and BLANK_RUN.search(piece):
                raise BadInput(f'a text has more than {LONGEST_BLANK:,} blanks in a row.')
            yield piece
            start = cut
            length = PIECE_CHARACTERS

    def _find_cut(self, text, low, high):
        """A place in text[low:high] where both sides can be encoded on their own, or None."""
        # CUTS hold for the usual patterns. Encoding the surroundings proves a place for this one.
        for pattern in CUTS:
            for match in list(pattern.finditer(text, max(low, high - 50_000), high))[-5:]:
                at = match.end()
                both = self.encode(text[at - 200 : at + 200])
                if both == self.encode(text[at - 200 : at]) + self.encode(text[at : at + 200]):
                    return at
        return None

    def decode(self, ids):
        """Returns the text of ids. Invalid UTF-8 becomes U+FFFD. Ids of no token are dropped."""
        if self.lacks_bytes:
            ids = [i for i in ids if i < self.vocab_size]
        try:
            return self.encoding.decode(ids)
        except KeyError:
            # A model's table may have more rows than the tokenizer has tokens.
            known = {*self.ranks.values(), *self.special_tokens.values()}
            return self.encoding.decode([i for i in ids if i in known])

    def token_bytes(self):
        """Bytes of text that every id stands for: a list of length vocab_size. Control tokens and
        unused ids have 0."""
        sizes = [0] * self.vocab_size
        for token, i in self.ranks.items():
            sizes[i] = len(token)
        for name in self.added:
            sizes[self.special_tokens[name]] = len(name.encode())
        return sizes


def check_ids(path, ranks, special_tokens):
    """Raises BadInput unless every token has an id of its own that fits into 32 bits."""
    ids = [*ranks.values(), *special_tokens.values()]
    if not ranks:
        raise BadInput(f'{path} holds no tokens. Restore the tokenizer.')
    # A bool is an int to isinstance.
    if not all(type(i) is int and 0 <= i < 2**32 for i in ids) or len(set(ids)) < len(ids):
        raise BadInput(
            f'{path}: the ids of its tokens must be different whole numbers from 0 to 2**32 - 1. '
            'Restore the tokenizer.')


def make_tokenizer(path, ranks, pattern, special_tokens, bos=None, nfc=False, added=()):
    """Makes a Tokenizer.

    ranks           bytes -> id
    pattern         regular expression that splits text before the merges
    special_tokens  name -> id
    bos             name of the special token that begins a document. None: the first in END_OF_TEXT
    added           names of special tokens that are matched in plain text
    Raises BadInput if there is no special token to begin a document with, and for ids that cannot
    be right.
    """
    if bos is None:
        bos = next((name for name in END_OF_TEXT if name in special_tokens), None)
    check_ids(path, ranks, special_tokens)
    if bos is None:
        raise BadInput(f'{path} has no special tokens to begin documents: {" ".join(END_OF_TEXT)}.')
    # tiktoken crashes on a byte that has no token.
    top = 1 + max(*ranks.values(), *special_tokens.values())
    spare = {bytes([b]): top + b for b in range(256) if bytes([b]) not in ranks}
    encoding = tiktoken.Encoding(
        os.path.basename(path),
        pat_str=pattern,
        mergeable_ranks=ranks | spare,
        special_tokens=special_tokens,
    )
    # Whatever changes the ids of a text must change the fingerprint.
    tokens = [[token.hex(), i] for token, i in sorted(ranks.items())]
    content = [tokens, sorted(special_tokens.items()), pattern, bos, nfc, sorted(added)]
    fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    bos_id = special_tokens[bos]
    added = tuple(added)
    return Tokenizer(
        encoding, path, fingerprint, bos_id, ranks, special_tokens, nfc, added, prefix_id=bos_id
    )


# -- reading ---------------------------------------------------------------------------------------


def load_tokenizer(path):
    """Loads a tiktoken name, a tiktoken rank file, a tokenizer.json, or a folder with one of them.

    Raises BadInput if there is none, or if tiktoken cannot express it exactly.
    """
    try:
        return read_tokenizer(path)
    except OTHER_FORM as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f'{path} is no tokenizer of a form that is supported ({type(error).__name__}: '
            f'{error}). It is damaged, or of another kind.') from None


def read_tokenizer(path):
    """`load_tokenizer` for files whose form is right."""
    if os.path.isdir(path):
        for name in ('tokenizer.tiktoken', 'tokenizer.json', 'tokenizer.model'):
            if os.path.isfile(os.path.join(path, name)):
                return load_tokenizer(os.path.join(path, name))
        raise BadInput(f'{path} has no tokenizer.tiktoken, tokenizer.json or tokenizer.model.')
    if path.endswith('.json'):
        return load_tokenizer_json(path)
    if os.path.isfile(path):
        return load_rank_file(path)
    known = tiktoken.list_encoding_names()
    if path not in known:
        raise BadInput(f"tokenizer '{path}' is neither a file nor one of {', '.join(known)}.")
    try:
        encoding = tiktoken.get_encoding(path)
    except Exception as error:
        # tiktoken passes on whatever the network raises.
        raise BadInput(
            f"tokenizer '{path}' could not be downloaded ({type(error).__name__}). Without a "
            'network, give a local rank file or tokenizer.json.'
        ) from None
    ranks = encoding._mergeable_ranks
    return make_tokenizer(path, ranks, encoding._pat_str, encoding._special_tokens)


def load_rank_file(path):
    """Reads lines of `base64 rank`, and <path>.json if it exists."""
    ranks = {}
    try:
        with open(path, 'rb') as f:
            for line in f:
                if line.strip():
                    token, rank = line.split()
                    ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError:
        raise BadInput(
            f"{path} is not a tiktoken rank file (lines of 'base64 rank'). A SentencePiece model "
            'does not work either: give the tokenizer.json of the same model.'
        ) from None
    if os.path.isfile(path + '.json'):
        extra = read_json(path + '.json')
        keys = ('pattern', 'special_tokens', 'bos', 'nfc', 'added')
        return make_tokenizer(path, ranks, *(extra[key] for key in keys))
    if len(ranks) == 128000:
        names = list(LLAMA3_SPECIAL)
        names += [f'<|reserved_special_token_{i}|>' for i in range(3, 3 + 256 - len(names))]
        special_tokens = {name: len(ranks) + i for i, name in enumerate(names)}
        return make_tokenizer(path, ranks, LLAMA3_PATTERN, special_tokens)
    return make_tokenizer(path, ranks, GPT2_PATTERN, {'<|endoftext|>': len(ranks)})


def byte_of_character():
    """The 256 characters that stand for bytes in byte-level BPE files: dict character -> byte."""
    # Printable bytes stand for themselves. The others are numbered from 256.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def is_isolated(split):
    """Whether the expression of a Split matches the pieces themselves."""
    return (split['behavior'], split['invert']) in (('Isolated', False), ('Removed', True))


def split_pattern(path, pre_tokenizer):
    """The regular expression that a tokenizer.json's pre_tokenizer is equivalent to.

    Raises BadInput if it is of a kind that one expression cannot replace.
    """
    steps = [] if pre_tokenizer is None else [pre_tokenizer]
    if steps and pre_tokenizer['type'] == 'Sequence':
        steps = pre_tokenizer['pretokenizers']
    pattern = None
    digits = False
    for step in steps:
        kind = step['type']
        is_first = pattern is None
        if kind == 'Split' and is_first and 'Regex' in step['pattern'] and is_isolated(step):
            pattern = step['pattern']['Regex']
        elif kind == 'Digits' and is_first and step['individual_digits']:
            pattern = DIGITS_PATTERN
            digits = True
        elif kind == 'ByteLevel' and not step['add_prefix_space']:
            splits = step.get('use_regex', True)
            if splits and not is_first and not digits:
                raise BadInput(f'{path}: Split and ByteLevel with use_regex are not one pattern.')
            if digits and not splits:
                raise BadInput(f'{path}: Digits without the split of GPT-2 are not one pattern.')
            if splits and is_first:
                pattern = GPT2_PATTERN
        else:
            raise BadInput(
                f"{path}: pre-tokenizer step '{kind}' with these options is not supported. GPT-2's "
                'ByteLevel, Digits, and Split by a regular expression are.'
            )
    if pattern is None:
        raise BadInput(f'{path}: its pre-tokenizer splits nothing, which tiktoken cannot express.')
    return pattern


def load_tokenizer_json(path):
    """Reads a Hugging Face tokenizer.json of a byte-level BPE without the package `tokenizers`."""
    content = read_json(path)
    model = content.get('model', {})
    if model.get('type') != 'BPE' or not model.get('merges'):
        raise BadInput(f'{path}: model type {model.get("type")!r} is not supported; a BPE is.')
    if model.get('byte_fallback'):
        raise BadInput(f'{path} is a BPE with byte_fallback; only byte-level BPE is supported.')
    normalizer = content.get('normalizer')
    if normalizer is not None and normalizer['type'] != 'NFC':
        raise BadInput(f"{path}: normalizer '{normalizer['type']}' is not supported; NFC is.")
    added_tokens = content.get('added_tokens', [])
    special_tokens = {t['content']: t['id'] for t in added_tokens}
    to_byte = byte_of_character()
    ranks = {}
    for token, i in model['vocab'].items():
        if token in special_tokens:
            continue
        if not to_byte.keys() >= set(token):
            raise BadInput(f'{path}: token {token!r} is not written in byte-level characters.')
        ranks[bytes(to_byte[c] for c in token)] = i
    # tiktoken merges by token id, Hugging Face by the order of `merges`. They agree only if the ids
    # follow that order.
    last = -1
    for merge in model['merges']:
        merged = merge.replace(' ', '') if isinstance(merge, str) else ''.join(merge)
        i = model['vocab'].get(merged, -1)
        if i < last or i < 0:
            raise BadInput(f'{path}: ids do not follow the order of its merges, at {merged!r}.')
        last = i
    pattern = split_pattern(path, content['pre_tokenizer'])
    # Added tokens that are not special are matched in plain text.
    added = [t['content'] for t in added_tokens if not t['special']]
    nfc = normalizer is not None
    tokenizer = make_tokenizer(path, ranks, pattern, special_tokens, nfc=nfc, added=added)
    post = content.get('post_processor') or {}
    firsts = [(step.get('single') or [{}])[0] for step in post.get('processors', [post])]
    tokenizer.add_bos = any('SpecialToken' in first for first in firsts)
    config_file = os.path.join(os.path.dirname(path), 'tokenizer_config.json')
    if os.path.isfile(config_file):
        config = read_json(config_file)
        if not isinstance(config, dict):
            raise BadInput(f'{config_file} is no JSON object. Restore the file of the model.')
        tokenizer.prefix_id = prefix_id(config, tokenizer)
    return tokenizer


def prefix_id(config, tokenizer):
    """The token before a text without context, by a tokenizer_config.json (dict)."""
    # lm-eval takes BOS, or else EOS.
    for key in ('bos_token', 'eos_token'):
        name = config.get(key)
        if isinstance(name, dict):
            name = name['content']
        if name in tokenizer.special_tokens:
            return tokenizer.special_tokens[name]
    return tokenizer.bos_id


# -- writing ---------------------------------------------------------------------------------------


def write_json(path, content, indent=None):
    with open(path, 'w', encoding='utf-8') as f:
        json.dump(content, f, indent=indent, ensure_ascii=False)


def save_tokenizer(folder, tokenizer):
    """Writes tokenizer.tiktoken and tokenizer.tiktoken.json, which load_tokenizer(folder) reads."""
    path = os.path.join(folder, 'tokenizer.tiktoken')
    with open(path, 'wb') as f:
        for token, rank in sorted(tokenizer.ranks.items(), key=lambda item: item[1]):
            f.write(base64.b64encode(token) + b' %d\n' % rank)
    special = tokenizer.special_tokens
    added = [name for name in special if name in tokenizer.added]
    extra = dict(pattern=tokenizer.encoding._pat_str, special_tokens=special)
    extra |= dict(bos=tokenizer.names[tokenizer.bos_id], nfc=tokenizer.nfc, added=added)
    write_json(path + '.json', extra)


def split_token(token, ranks):
    """The parts of a token that its own merge joins: list of bytes, usually two."""
    # Applies the merges of lower rank, as the encoder does.
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        merges = [ranks.get(parts[i] + parts[i + 1], math.inf) for i in range(len(parts) - 1)]
        at = merges.index(min(merges))
        if merges[at] >= ranks[token]:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def save_tokenizer_json(folder, tokenizer, context):
    """Writes tokenizer.json and tokenizer_config.json for `tokenizers`, transformers and vLLM.

    They produce the same ids and put BOS before a text. context: the model's context in tokens.
    """
    bos = tokenizer.names[tokenizer.bos_id]
    character = {b: c for c, b in byte_of_character().items()}
    written = {token: ''.join(character[b] for b in token) for token in tokenizer.ranks}
    merges = []
    for token in sorted(tokenizer.ranks, key=tokenizer.ranks.get):
        parts = split_token(token, tokenizer.ranks)
        if len(parts) == 2:
            merges.append([written[part] for part in parts])
    vocab = {written[token]: i for token, i in tokenizer.ranks.items()} | tokenizer.special_tokens
    model = dict(type='BPE', dropout=None, unk_token=None, continuing_subword_prefix=None)
    model |= dict(end_of_word_suffix=None, fuse_unk=False, byte_fallback=False)
    model |= dict(ignore_merges=True, vocab=vocab, merges=merges)
    added_tokens = []
    for name, i in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1]):
        options = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
        is_special = name not in tokenizer.added
        added_tokens.append(dict(id=i, content=name, **options, special=is_special))
    # Oniguruma reads {1,3}+ as a repeated group and $ as the end of any line. The changed pattern
    # means the same here.
    pattern = re.sub(r'(\{\d+(?:,\d*)?\})\+', r'\1', tokenizer.encoding._pat_str)
    split = dict(type='Split', pattern=dict(Regex=pattern.replace('$', r'\z')))
    split |= dict(behavior='Isolated', invert=False)
    byte_level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=False)
    single = [dict(SpecialToken=dict(id=bos, type_id=0)), dict(Sequence=dict(id='A', type_id=0))]
    pair = [*single, dict(Sequence=dict(id='B', type_id=1))]
    ids = {bos: dict(id=bos, ids=[tokenizer.bos_id], tokens=[bos])}
    post = dict(type='TemplateProcessing', single=single, pair=pair, special_tokens=ids)
    content = dict(version='1.0', truncation=None, padding=None, added_tokens=added_tokens)
    content['normalizer'] = dict(type='NFC') if tokenizer.nfc else None
    content['pre_tokenizer'] = dict(type='Sequence', pretokenizers=[split, byte_level])
    content |= dict(post_processor=post, decoder=byte_level, model=model)
    write_json(os.path.join(folder, 'tokenizer.json'), content)
    about = dict(tokenizer_class='PreTrainedTokenizerFast', bos_token=bos)
    about |= dict(eos_token=tokenizer.names[tokenizer.stop_ids[0]], model_max_length=context)
    about['clean_up_tokenization_spaces'] = False
    write_json(os.path.join(folder, 'tokenizer_config.json'), about, indent=2)
