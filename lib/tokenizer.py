"""Tokenizers: whatever form they come in, a `tiktoken.Encoding`, its end-of-text token and a fingerprint.

    tokenizer = load_tokenizer('gpt2')                        # a tiktoken name (tiktoken downloads it once)
    tokenizer = load_tokenizer('llama3/tokenizer.model')      # a tiktoken rank file: base64 token, rank
    tokenizer = load_tokenizer('smollm2/tokenizer.json')      # a Hugging Face byte-level BPE, read directly

Everything but a tiktoken name works without a network. A rank file says nothing about its split pattern and special
tokens; those of Llama 3 are assumed for 128,000 ranks, else those of GPT-2, unless <rank file>.json stands beside it
with what is missing, which is how `save_tokenizer` writes one beside the shards.
"""
import base64
import functools
import hashlib
import json
import math
import os
import re
import unicodedata
from dataclasses import dataclass

import numpy as np
import tiktoken

from configurator import BadInput, read_json

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2's pattern on text whose digits were first cut out one by one; a space run before a digit ends its piece
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
PIECE_CHARACTERS = 1_000_000    # longer documents are encoded piece by piece
LONGEST_BLANK = 900_000
BLANK_RUN = re.compile(r'\s{%d}' % LONGEST_BLANK)
# places where no split pattern joins what stands on both sides: after a line's end, and before a single blank between words
CUTS = (re.compile(r'\S\n(?=[^\W\d_])'), re.compile(r'[^\W\d_](?= [^\W\d_])'))
END_OF_TEXT = ('<|begin_of_text|>', '<|endoftext|>', '<|end_of_text|>', '<s>', '</s>')    # documents begin with the first there is
ENDS = ('<|endoftext|>', '<|end_of_text|>', '</s>', '<|eot_id|>', '<|eom_id|>', '<|im_end|>')      # what ends a text or a turn


@dataclass
class Tokenizer:
    encoding: tiktoken.Encoding
    path: str             # what it was loaded from
    fingerprint: str      # sha256 over tokens, ids, special tokens, pattern and normalisation, 16 hex digits
    bos_id: int           # the token that every document begins with
    nfc: bool             # text is Unicode-normalised (NFC) before it is encoded
    added: re.Pattern | None    # tokens matched in the text as they stand, before it is split (runs of spaces, say)
    added_names: tuple = ()     # the same, to look for quickly
    added_mark: str = ''        # a character that all of them have, to look for more quickly
    special: re.Pattern | None = None   # all special tokens; made when it is needed
    ranks: dict = None          # bytes -> id of all tokens that are not special
    lacks_bytes: bool = False   # some single bytes have no token (SmolLM2): they are dropped, as `tokenizers` does

    @functools.cached_property
    def vocab_size(self):
        return 1 + max(*self.ranks.values(), *self.encoding._special_tokens.values())

    @functools.cached_property
    def control_ids(self):
        """Ids of the special tokens that are no part of a text (those matched in plain text are)."""
        return {i for name, i in self.encoding._special_tokens.items() if name not in self.added_names}

    def encode(self, text):
        """Text -> list of ids, special tokens in the text taken as plain characters, no BOS."""
        return self.encode_piece(text).tolist()

    def encode_marked(self, text):
        """As `encode`, but special tokens in the text are what their names say: for chat templates, not for data."""
        special = self.encoding._special_tokens
        if self.special is None:
            self.special = re.compile('(' + '|'.join(re.escape(name) for name in sorted(special, key=len, reverse=True)) + ')')
        return [i for part in self.special.split(text) if part for i in ([special[part]] if part in special else self.encode(part))]

    def encode_document(self, text):
        """Text of any length -> (n,) uint32, the ids of `encode`, in flat memory.

        Raises BadInput for text that cannot be split: a million blanks in a row, or eight million characters without a
        break between words.
        """
        if len(text) <= PIECE_CHARACTERS:
            return self.encode_piece(text)
        return np.concatenate([self.encode_piece(piece) for piece in self.pieces(text)])

    def encode_piece(self, text):
        if self.nfc:
            text = unicodedata.normalize('NFC', text)
        if self.added_mark not in text or not any(name in text for name in self.added_names):
            return self.known(self.encoding.encode_to_numpy(text, disallowed_special=()))
        ids, parts = [], self.added.split(text)         # odd parts are the added tokens themselves
        for i, part in enumerate(parts):
            ids += [self.encoding._special_tokens[part]] if i % 2 else self.encoding.encode_ordinary(part)
        return self.known(np.array(ids, dtype=np.uint32))

    def known(self, ids):
        """Ids without those that stand for bytes which the vocabulary lacks (they lie above all others)."""
        return ids[ids < self.vocab_size] if self.lacks_bytes else ids

    def pieces(self, text):
        """Yields parts of text, cut only where the ids of the parts are those of the whole."""
        start, length = 0, PIECE_CHARACTERS
        while len(text) - start > length:
            near_end = start + max(length // 2, length - 50_000), start + length
            candidates = [m.end() for cut in CUTS for m in [*cut.finditer(text, *near_end)][-5:]]
            cut = next((at for at in candidates if self.encode(text[at - 200:at + 200]) ==
                        self.encode(text[at - 200:at]) + self.encode(text[at:at + 200])), None)
            if cut is None and length < 8 * PIECE_CHARACTERS:
                length *= 2
                continue
            if cut is None:
                raise BadInput(f'a text of {len(text):,} characters has {length:,} without a break between words or lines.')
            yield self.splittable(text[start:cut])
            start, length = cut, PIECE_CHARACTERS
        yield self.splittable(text[start:])

    @staticmethod
    def splittable(piece):
        """The piece, or BadInput: tiktoken's regular expressions fail on a million blanks in a row."""
        if len(piece) > LONGEST_BLANK and BLANK_RUN.search(piece):
            raise BadInput(f'a text has more than {LONGEST_BLANK:,} blanks in a row.')
        return piece

    def decode(self, ids):
        """Ids -> text; bytes that are no UTF-8 become the replacement character, ids that no token has become nothing."""
        if self.lacks_bytes:
            ids = [i for i in ids if i < self.vocab_size]
        try:
            return self.encoding.decode(ids)
        except KeyError:                    # a model may have more rows in its table than the tokenizer has tokens
            known = {*self.ranks.values(), *self.encoding._special_tokens.values()}
            return self.encoding.decode([i for i in ids if i in known])

    def token_bytes(self):
        """Bytes of text that every id stands for, a list of length vocab_size; 0 for special and unused ids."""
        sizes = [0] * self.vocab_size
        for token, i in self.ranks.items():
            sizes[i] = len(token)
        for name, i in self.encoding._special_tokens.items():
            sizes[i] = len(name.encode()) if self.added is not None and self.added.fullmatch(name) else 0
        return sizes


def make_tokenizer(path, ranks, pattern, special_tokens, bos, nfc=False, added=()):
    """A Tokenizer of byte strings -> ids, a split pattern and special tokens (name -> id).

    bos is the name of one of the special tokens; added: names of those that are matched in plain text.
    """
    top = 1 + max(*ranks.values(), *special_tokens.values())
    spare = {bytes([b]): top + b for b in range(256) if bytes([b]) not in ranks}         # without them tiktoken dies of such a byte
    encoding = tiktoken.Encoding(os.path.basename(path), pat_str=pattern, mergeable_ranks=ranks | spare, special_tokens=special_tokens)
    content = json.dumps([[[t.hex(), i] for t, i in sorted(ranks.items())], sorted(special_tokens.items()), pattern, bos, nfc,
                          sorted(added)])
    fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
    marks = sorted(c for c in set.intersection(*map(set, added)) if not c.isalnum()) if added else ['']
    longest_first = '|'.join(re.escape(name) for name in sorted(added, key=len, reverse=True))
    return Tokenizer(encoding, path, fingerprint, special_tokens[bos], nfc, re.compile(f'({longest_first})') if added else None,
                     tuple(added), marks[-1] if marks else '', ranks=ranks, lacks_bytes=bool(spare))


def choose_bos(path, special_tokens):
    """The name of the special token that documents begin with; BadInput when there is none of the usual ones."""
    for name in END_OF_TEXT:
        if name in special_tokens:
            return name
    raise BadInput(f'{path} has none of the special tokens {", ".join(END_OF_TEXT)}, so documents cannot be told apart.')


def load_tokenizer(path):
    """A tiktoken name, a tiktoken rank file, an HF tokenizer.json, or a folder that holds one of them -> Tokenizer.

    Raises BadInput when there is no such file, or it is no byte-level BPE that tiktoken can express exactly.
    """
    if os.path.isdir(path):
        found = [n for n in ('tokenizer.tiktoken', 'tokenizer.json', 'tokenizer.model') if os.path.isfile(os.path.join(path, n))]
        if not found:
            raise BadInput(f'{path} holds no tokenizer.tiktoken, tokenizer.json or tokenizer.model.')
        path = os.path.join(path, found[0])
    if path.endswith('.json'):
        return load_tokenizer_json(path)
    if os.path.isfile(path):
        return load_rank_file(path)
    if path not in tiktoken.list_encoding_names():
        raise BadInput(f"tokenizer '{path}' is neither a file nor one of tiktoken's names "
                       f'({", ".join(tiktoken.list_encoding_names())}).')
    try:
        encoding = tiktoken.get_encoding(path)
    except Exception as error:          # requests raises whatever the network does; the reason is passed on whole
        raise BadInput(f"tokenizer '{path}' could not be downloaded ({type(error).__name__}). Without a network give a "
                       'local rank file or tokenizer.json instead.') from None
    return make_tokenizer(path, encoding._mergeable_ranks, encoding._pat_str, encoding._special_tokens,
                          choose_bos(path, encoding._special_tokens))


def load_rank_file(path):
    """Reads lines of `base64 rank` and, if it exists, the .json beside it."""
    ranks = {}
    try:
        with open(path, 'rb') as f:
            for line in f:
                if line.strip():
                    token, rank = line.split()
                    ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError:
        raise BadInput(f"{path} is no tiktoken rank file (lines of 'base64 rank'). A SentencePiece model does not work; "
                       'give the tokenizer.json of the same model.') from None
    if os.path.isfile(path + '.json'):
        extra = read_json(path + '.json')
        return make_tokenizer(path, ranks, extra['pattern'], extra['special_tokens'], extra['bos'], extra['nfc'],
                              extra['added'])
    if len(ranks) == 128000:
        names = ['<|begin_of_text|>', '<|end_of_text|>', '<|reserved_special_token_0|>', '<|reserved_special_token_1|>',
                 '<|finetune_right_pad_id|>', '<|reserved_special_token_2|>', '<|start_header_id|>', '<|end_header_id|>',
                 '<|eom_id|>', '<|eot_id|>', '<|python_tag|>']
        names += [f'<|reserved_special_token_{i}|>' for i in range(3, 3 + 256 - len(names))]
        return make_tokenizer(path, ranks, LLAMA3_PATTERN, {n: len(ranks) + i for i, n in enumerate(names)}, names[0])
    return make_tokenizer(path, ranks, GPT2_PATTERN, {'<|endoftext|>': len(ranks)}, '<|endoftext|>')


def byte_of_character():
    """The 256 characters by which byte-level BPE files write bytes: printable bytes stand for themselves, the rest follow."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def split_pattern(path, pre_tokenizer):
    """The one regular expression that a tokenizer.json's pre_tokenizer amounts to; BadInput when it is another kind."""
    if pre_tokenizer is None:
        raise BadInput(f'{path}: its pre-tokenizer splits nothing, which tiktoken cannot express.')
    steps = pre_tokenizer['pretokenizers'] if pre_tokenizer['type'] == 'Sequence' else [pre_tokenizer]
    pattern, digits = None, False
    for step in steps:
        kind = step['type']
        if kind == 'Split' and 'Regex' in step['pattern'] and (step['behavior'], step['invert']) in (
                ('Isolated', False), ('Removed', True)) and pattern is None:
            pattern = step['pattern']['Regex']
        elif kind == 'Digits' and step['individual_digits'] and pattern is None:
            pattern, digits = DIGITS_PATTERN, True
        elif kind == 'ByteLevel' and not step['add_prefix_space']:
            if step.get('use_regex', True):
                if pattern is not None and not digits:
                    raise BadInput(f'{path}: a Split followed by ByteLevel with use_regex cannot be read as one pattern.')
                pattern = pattern or GPT2_PATTERN
            elif digits:
                raise BadInput(f'{path}: Digits without the GPT-2 split cannot be read as one pattern.')
        else:
            raise BadInput(f"{path}: pre-tokenizer step '{kind}' with these options is not supported; GPT-2's ByteLevel, "
                           'Digits, and Split by a regular expression are.')
    if pattern is None:
        raise BadInput(f'{path}: its pre-tokenizer splits nothing, which tiktoken cannot express.')
    return pattern


def load_tokenizer_json(path):
    """Reads a Hugging Face tokenizer.json of a byte-level BPE, with no help from `tokenizers`.

    tiktoken merges by token id, Hugging Face by the order of `merges`; the two agree only when ids follow that order,
    which is checked. Added tokens that are not special are matched in the text as they stand, as there.
    """
    content = read_json(path)
    model = content.get('model', {})
    if model.get('type') != 'BPE' or not model.get('merges'):
        raise BadInput(f"{path}: model type {model.get('type')!r} is not supported; a byte-level BPE is.")
    if model.get('byte_fallback'):
        raise BadInput(f'{path} is a SentencePiece-style BPE with byte_fallback; only byte-level BPE is supported.')
    normalizer = content.get('normalizer')
    if normalizer is not None and normalizer['type'] != 'NFC':
        raise BadInput(f"{path}: normalizer '{normalizer['type']}' is not supported; NFC or none is.")
    special_tokens = {t['content']: t['id'] for t in content.get('added_tokens', [])}
    to_byte = byte_of_character()
    ranks = {}
    for token, i in model['vocab'].items():
        if token in special_tokens:
            continue
        try:
            ranks[bytes(to_byte[c] for c in token)] = i
        except KeyError:
            raise BadInput(f'{path}: token {token!r} is not written in byte-level characters.') from None
    last = -1
    for merge in model['merges']:
        merged = ''.join(merge.split(' ') if isinstance(merge, str) else merge)
        i = model['vocab'].get(merged)
        if i is None or i < last:
            raise BadInput(f'{path}: its token ids do not follow the order of its merges (at {merged!r}), so tiktoken would '
                           'merge in another order.')
        last = i
    pattern = split_pattern(path, content['pre_tokenizer'])
    return make_tokenizer(path, ranks, pattern, special_tokens, choose_bos(path, special_tokens), normalizer is not None,
                          [t['content'] for t in content.get('added_tokens', []) if not t['special']])


def save_tokenizer(folder, tokenizer):
    """Writes tokenizer.tiktoken and tokenizer.tiktoken.json into `folder`: load_tokenizer(folder) gives the same one."""
    encoding = tokenizer.encoding
    bos = next(name for name, i in encoding._special_tokens.items() if i == tokenizer.bos_id)
    added = [name for name in encoding._special_tokens if tokenizer.added is not None and tokenizer.added.fullmatch(name)]
    path = os.path.join(folder, 'tokenizer.tiktoken')
    with open(path, 'wb') as f:
        for token, rank in sorted(tokenizer.ranks.items(), key=lambda item: item[1]):
            f.write(base64.b64encode(token) + b' %d\n' % rank)
    with open(path + '.json', 'w', encoding='utf-8') as f:
        json.dump(dict(pattern=encoding._pat_str, special_tokens=encoding._special_tokens, bos=bos, nfc=tokenizer.nfc,
                       added=added), f)


# -- for other people's tools ------------------------------------------------------------------------------------------

def stop_ids(tokenizer):
    """Ids at which generation ends: the ends of a text and of a turn, as far as the tokenizer has them, and its BOS, before which
    a document of our shards ends.
    """
    special = tokenizer.encoding._special_tokens
    return [*dict.fromkeys([special[name] for name in ENDS if name in special] + [tokenizer.bos_id])]


def split_token(token, ranks):
    """The parts that byte-pair merges of lower rank make of a token's bytes; two, when its own merge comes last."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        merges = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
        at = merges.index(min(merges))
        if merges[at] >= ranks[token]:
            break
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return parts


def save_tokenizer_json(folder, tokenizer, add_bos, context):
    """Writes tokenizer.json and tokenizer_config.json: `tokenizers`, transformers and vLLM give the same ids from them.

    add_bos: they put BOS before a text; context: tokens that the model is made for.
    """
    encoding = tokenizer.encoding
    ranks, special = tokenizer.ranks, encoding._special_tokens
    character = {b: c for c, b in byte_of_character().items()}
    written = {token: ''.join(character[b] for b in token) for token in ranks}
    pairs = (split_token(token, ranks) for token, _ in sorted(ranks.items(), key=lambda item: item[1]) if len(token) > 1)
    merges = [[written[a], written[b]] for a, b in (pair for pair in pairs if len(pair) == 2)]
    # Oniguruma reads {1,3}+ as a repeated group and $ as the end of any line; neither changes what the pattern means here
    pattern = re.sub(r'(\{\d+(?:,\d*)?\})\+', r'\1', encoding._pat_str).replace('$', r'\z')
    bos = next(name for name, i in special.items() if i == tokenizer.bos_id)
    eos = next((name for name in ENDS if name in special), bos)
    added = [dict(id=i, content=name, single_word=False, lstrip=False, rstrip=False, normalized=False, special=name not in
                  tokenizer.added_names) for name, i in sorted(special.items(), key=lambda item: item[1])]
    byte_level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=False)
    before = [dict(SpecialToken=dict(id=bos, type_id=0))] if add_bos else []
    text, second = dict(Sequence=dict(id='A', type_id=0)), dict(Sequence=dict(id='B', type_id=1))
    content = dict(
        version='1.0', truncation=None, padding=None, added_tokens=added, normalizer=dict(type='NFC') if tokenizer.nfc else None,
        pre_tokenizer=dict(type='Sequence', pretokenizers=[
            dict(type='Split', pattern=dict(Regex=pattern), behavior='Isolated', invert=False), byte_level]),
        post_processor=dict(type='TemplateProcessing', single=[*before, text], pair=[*before, text, second],
                            special_tokens={bos: dict(id=bos, ids=[tokenizer.bos_id], tokens=[bos])}),
        decoder=byte_level, model=dict(
            type='BPE', dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None, fuse_unk=False,
            byte_fallback=False, ignore_merges=True, vocab={**{written[t]: i for t, i in ranks.items()}, **special}, merges=merges))
    with open(os.path.join(folder, 'tokenizer.json'), 'w', encoding='utf-8') as f:
        json.dump(content, f, ensure_ascii=False)
    with open(os.path.join(folder, 'tokenizer_config.json'), 'w', encoding='utf-8') as f:
        json.dump(dict(tokenizer_class='PreTrainedTokenizerFast', bos_token=bos, eos_token=eos, model_max_length=context,
                       clean_up_tokenization_spaces=False), f, indent=2)
