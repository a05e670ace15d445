"""Tokenizers of several formats, with an end-of-text token and a fingerprint.

    tokenizer = load_tokenizer('gpt2')                      # a tiktoken name, downloaded once
    tokenizer = load_tokenizer('llama3/tokenizer.model')    # a tiktoken rank file
    tokenizer = load_tokenizer('smollm2/tokenizer.json')    # any tokenizer of Hugging Face
    tokenizer = load_tokenizer('gpt2/vocab.bpe')            # GPT-2's older form, two files

Only a tiktoken name needs a network. A tokenizer.json is read by the package `tokenizers`. If it is
a plain byte-level BPE, tiktoken encodes, which is several times faster and gives the same ids.
Otherwise `tokenizers` encodes, and a sentence says why.

A rank file (lines of base64 token and rank) contains neither its split pattern nor its special
tokens. They are read from `<rank file>.json` if that exists. `save_tokenizer` writes both files
beside the shards. Without it, the number of ranks must be that of a known tokenizer.

The other files of a model's folder (lib/model_files.py) say which tokens end a text.
"""

import base64
import codecs
import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import sys
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import tiktoken
import tokenizers

from configurator import BadInput, read_json, read_source
from lib.byte_level import (
    NotPlain,
    awkward_texts,
    byte_of_character,
    find_difference,
    known_ranks,
    marks_need_library,
    overlaps,
    read_plain,
    split_token,
    steps_of,
    to_oniguruma,
)
from lib.model_files import read_model_files, read_object

PIECE_CHARACTERS = 1_000_000    # longer documents are encoded in pieces
LONGEST_WHOLE = 50_000_000      # of a document that cannot be cut: 4 GiB of memory in `tokenizers`
LONGEST_BLANK = 900_000         # tiktoken's regular expressions fail on a million blanks in a row
BLANK_RUN = re.compile(r'\s{%d}' % LONGEST_BLANK)
# No split pattern joins the two sides of these places: the end of a line before a letter, and a
# single space between two words.
CUTS = (re.compile(r'\S\n(?=[^\W\d_])'), re.compile(r'[^\W\d_](?= [^\W\d_])'))
# A document begins with the first of these that the tokenizer has.
END_OF_TEXT = ('<|begin_of_text|>', '<|endoftext|>', '<|end_of_text|>', '<s>', '</s>')
PAIR_OF = {
    'vocab.json': 'merges.txt', 'merges.txt': 'vocab.json', 'encoder.json': 'vocab.bpe',
    'vocab.bpe': 'encoder.json'}
LIKE_BOS = re.compile(r'\W*(bos|bos_token|cls|begin.of.(text|sentence)|startoftext)\W*', re.I)
LIKE_EOS = re.compile(r'\W*(eos|eos_token|eot|sep|end.of.(text|sentence))\W*', re.I)
# What reading a file of another form raises.
OTHER_FORM = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError)
# These end a text or a turn of a conversation.
ENDS = ('<|endoftext|>', '<|end_of_text|>', '</s>', '<|eot_id|>', '<|eom_id|>', '<|im_end|>')
# Characters that NFC leaves as they are, whatever stands around them. All have been in Unicode for
# long, so that no later version of it changes them.
FIXED = (
    '\0-\u02ff\u038e-\u03a1\u03a3-\u0482\u048a-\u052f\u05d0-\u05ea\u061b-\u064a\u0660-\u066f'
    '\u0671-\u06d5\u0904-\u093b\u093d-\u094c\u0960-\u097f\u0e01-\u0e37\u0e3f-\u0e47\u10d0-\u10fa'
    '\u1e00-\u1eff\u2002-\u2064\u2074-\u208e\u20a0-\u20bf\u2100-\u2125\u212c-\u218b\u2190-\u2328'
    '\u232b-\u2426\u2460-\u2adb\u2add-\u2b73\u3000-\u3029\u3041-\u3096\u309b-\u30ff\u3105-\u312e'
    '\u3131-\u318e\u3220-\ua48c\uac00-\uf8ff\ufe00-\ufe0f\ufe30-\ufe52\ufeff\uff01-\uffbe\ufffd'
    '\U0001d400-\U0001d454\U0001d552-\U0001d6a5\U0001f300-\U0001f6d2\U00020000-\U0002a6d6'
)
NOT_FIXED = re.compile(f'[^{FIXED}]+')
BYTE_TOKEN = re.compile('<0x[0-9A-F]{2}>')
STREAM_TOKENS = 64              # are decoded together while a text is written
# Normalizers and pre-tokenizers of `tokenizers` that look only at the next few characters.
LOCAL_STEPS = {
    'NFC', 'NFD', 'NFKC', 'NFKD', 'Nmt', 'Lowercase', 'StripAccents', 'BertNormalizer',
    'Precompiled', 'Split', 'ByteLevel', 'Digits', 'Punctuation', 'Whitespace', 'WhitespaceSplit',
    'BertPreTokenizer', 'UnicodeScripts'}
SPLITTING = {'Split', 'Whitespace', 'WhitespaceSplit', 'BertPreTokenizer'}


@functools.lru_cache(maxsize=10_000)
def nfc_of(part):
    return tokenizers.normalizers.NFC().normalize_str(part)


@functools.cache
def not_fixed_units():
    """Which of the 65,536 units of UTF-16 may be of a character that NFC changes: (65536,) bool."""
    table = np.array([NOT_FIXED.match(chr(c)) is not None for c in range(65536)])
    table[0xd800:0xe000] = True         # halves of characters above U+FFFF
    return table


def to_nfc(text):
    """Normalizes a text to Unicode's NFC, as `tokenizers` does, whatever the version of Python."""
    if text.isascii():
        return text
    # Most texts do not change. A table says so faster than a regular expression.
    units = np.frombuffer(text.encode('utf-16-le', 'surrogatepass'), '<u2')
    if not not_fixed_units()[units[units > 0x2ff]].any():
        return text
    parts = []
    end = 0
    for match in NOT_FIXED.finditer(text):
        # A mark may combine with the character before it.
        start = max(match.start() - 1, end)
        parts += [text[end:start], nfc_of(text[start : match.end()])]
        end = match.end()
    return ''.join([*parts, text[end:]])


def any_of(names):
    """A pattern that matches any of the names, longer ones first, as a group (for re.split)."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile('(' + '|'.join(re.escape(name) for name in longest_first) + ')')


@functools.cache
def announce(note):
    """Prints a note on a tokenizer, once in a run: not in worker processes and on other ranks."""
    rank = os.environ.get('RANK') or os.environ.get('SLURM_PROCID') or '0'
    if multiprocessing.parent_process() is None and rank == '0':
        print(note, file=sys.stderr)


@dataclass(kw_only=True)
class Tokenizer:
    """What is common to RankTokenizer (tiktoken) and LibraryTokenizer (`tokenizers`)."""
    path: str               # what it was loaded from
    fingerprint: str        # 16 hex digits of a sha256 over everything that determines the ids
    bos_id: int             # the first token of every document
    vocab_size: int
    special_tokens: dict    # name -> id of all added tokens
    added: tuple            # those that plain text may contain, such as runs of spaces
    tokens: dict            # bos_token, eos_token and others -> name, for chat templates
    stop_ids: list          # ids that end generation. The first one is reported to tools as EOS
    prefix_id: int          # the token before a text that has no context
    start_ids: tuple        # ids that the model expects before a text
    end_ids: tuple = ()     # and after it
    source: str | None = None       # text of the tokenizer.json, if a rank file cannot express it
    note: str = ''          # what a user should know about how it was read

    @cached_property
    def names(self):
        """Id -> name of every special token."""
        return {i: name for name, i in self.special_tokens.items()}

    @cached_property
    def control_ids(self):
        """Ids of the special tokens that are not part of a text."""
        return {i for name, i in self.special_tokens.items() if name not in self.added}

    def encode_document(self, text):
        """Returns the ids of `encode` as (n,) uint32, for a text of any length, in little memory.

        Raises BadInput for 900,000 blanks in a row and for eight million characters without a break
        between words. A tokenizer whose texts cannot be cut takes 50 million characters.
        """
        if len(text) <= PIECE_CHARACTERS:
            return np.asarray(self._encode_piece(text), dtype=np.uint32)
        pieces = [np.asarray(self._encode_piece(piece), np.uint32) for piece in self.pieces(text)]
        return np.concatenate(pieces)

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


@dataclass(kw_only=True)
class RankTokenizer(Tokenizer):
    """A byte-level BPE, encoded by tiktoken."""
    encoding: tiktoken.Encoding
    ranks: dict             # bytes -> id of every token that is not special
    nfc: bool               # text is normalized to Unicode's NFC before it is encoded

    @cached_property
    def lacks_bytes(self):
        # SmolLM2 has no token for some control characters. `tokenizers` drops them, and so do we.
        return any(bytes([b]) not in self.ranks for b in range(256))

    @cached_property
    def _splitter(self):
        pattern = tokenizers.Regex(to_oniguruma(self.encoding._pat_str))
        return tokenizers.pre_tokenizers.Split(pattern, 'isolated')

    @cached_property
    def _special_pattern(self):
        return any_of(self.special_tokens)

    @cached_property
    def _added_pattern(self):
        # A token that begins within the name of a special token is not found, so names of special
        # tokens that share characters with an added one are searched for, too.
        shared = [n for n in self.special_tokens if any(overlaps(n, a) for a in self.added)]
        return any_of({*self.added, *shared})

    @cached_property
    def _added_names(self):
        return set(self.added)

    @cached_property
    def _added_mark(self):
        # A character that all added tokens contain, or ''. Most texts do not contain it, and one
        # search for it is faster than one for every token.
        shared = set.intersection(*map(set, self.added)) if self.added else set()
        return max((c for c in shared if not c.isalnum()), default='')

    @cached_property
    def _library(self):
        return open_library(self.source, self.path)

    def encode(self, text):
        """Returns the ids of a text as a list, without BOS. Names of special tokens are text."""
        return self._encode_piece(text).tolist()

    def encode_marked(self, text):
        """`encode` for chat templates: names of special tokens in the text become these tokens."""
        if self.source is not None:
            return library_ids(self._library, text, marked=True)
        return self._encode_around(self._special_pattern.split(text))

    def _encode_around(self, parts):
        """Ids (list) of alternating text and name of a special token."""
        ids = []
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self.special_tokens[part])
            elif self.lacks_bytes:
                ids += self._encode_text(part).tolist()
            else:
                ids += self.encoding.encode_ordinary(to_nfc(part) if self.nfc else part)
        return ids

    def _encode_piece(self, text):
        if self._added_mark not in text or all(name not in text for name in self.added):
            return self._encode_text(text)
        # Names of the special tokens stay text.
        parts = ['']
        for i, part in enumerate(self._added_pattern.split(text)):
            if i % 2 and part in self._added_names:
                parts += [part, '']
            else:
                parts[-1] += part
        return np.array(self._encode_around(parts), dtype=np.uint32)

    def _encode_text(self, text):
        """Ids of a text that has no added tokens: (n,) uint32."""
        if self.nfc:
            text = to_nfc(text)
        ids = self.encoding.encode_to_numpy(text, disallowed_special=())
        # tiktoken's tokens of the missing bytes lie above all others.
        if not self.lacks_bytes or not len(ids) or ids.max() < self.vocab_size:
            return ids
        # Where bytes are missing, `tokenizers` merges what stands around them.
        ids = []
        for piece, _ in self._splitter.pre_tokenize_str(text):
            kept = bytes(b for b in piece.encode() if bytes([b]) in self.ranks)
            if kept:
                ids += self.encoding._encode_single_piece(kept)
        return np.array(ids, dtype=np.uint32)

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

    def stream(self, tokens, before=()):
        """Yields the text of ids that come one by one, as soon as characters are complete.

        before: ids of the text that they continue. Here they do not matter.
        """
        # A character of several bytes may be spread over several tokens.
        decoder = codecs.getincrementaldecoder('utf-8')('replace')
        for token in tokens:
            # A model may have more ids than the tokenizer.
            with contextlib.suppress(KeyError):
                if token < self.vocab_size:
                    yield decoder.decode(self.encoding.decode_single_token_bytes(token))
        yield decoder.decode(b'', final=True)

    def token_bytes(self):
        """Bytes of text that every id stands for: a list of length vocab_size. Control tokens and
        unused ids have 0."""
        sizes = [0] * self.vocab_size
        for token, i in self.ranks.items():
            sizes[i] = len(token)
        for name in self.added:
            sizes[self.special_tokens[name]] = len(name.encode())
        return sizes


@contextlib.contextmanager
def rust_errors(sentence, remedy=''):
    """Turns what the package `tokenizers` raises into BadInput with its reason in brackets."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    # It raises Exception itself, and a panic of its Rust code is no Exception.
    except BaseException as error:
        raise BadInput(f'{sentence} ({error}). {remedy}'.rstrip()) from None


def open_library(text, path):
    """Reads the text of a tokenizer.json: a Tokenizer of the package `tokenizers`.

    Truncation, padding and dropout are off, because they would change the ids of a text. Raises
    BadInput for a file that the package does not take.
    """
    reads = f'is no tokenizer that the package tokenizers {tokenizers.__version__} reads'
    with rust_errors(f'{path} {reads}', 'It is damaged, or of another kind.'):
        library = tokenizers.Tokenizer.from_str(text)
    library.no_truncation()
    library.no_padding()
    if getattr(library.model, 'dropout', None) is not None:
        library.model.dropout = None
    return library


def library_ids(library, text, marked=False):
    """The ids (list) that `tokenizers` gives a text, without what its post-processor adds.

    marked: names of special tokens in the text become these tokens. Raises BadInput for a text that
    it cannot encode.
    """
    library.encode_special_tokens = not marked
    # For example, a character may have no token while there is none for unknown ones.
    with rust_errors('the tokenizer cannot encode a text'):
        return library.encode(text, add_special_tokens=False).ids


@dataclass(kw_only=True)
class LibraryTokenizer(Tokenizer):
    """Any tokenizer.json, encoded by the package `tokenizers`."""
    library: tokenizers.Tokenizer

    @cached_property
    def _content(self):
        content = json.loads(self.source)
        # Only these parts are needed.
        return {key: content.get(key) for key in ('normalizer', 'pre_tokenizer', 'decoder')}

    @cached_property
    def can_cut(self):
        """Whether a place that `_find_cut` found is one. Not if a text gets a prefix, for example.
        """
        before = steps_of(self._content['normalizer'], 'normalizers')
        splits = steps_of(self._content['pre_tokenizer'], 'pretokenizers')
        known = all(step['type'] in LOCAL_STEPS for step in before + splits)
        has_prefix = any(step.get('add_prefix_space') for step in splits)
        at_blanks = any(
            step['type'] in SPLITTING or step.get('use_regex', step['type'] == 'ByteLevel')
            for step in splits)
        return known and at_blanks and not has_prefix

    def encode(self, text):
        """Returns the ids of a text as a list, without BOS. Names of special tokens are text."""
        return library_ids(self.library, text)

    _encode_piece = encode

    def encode_marked(self, text):
        """`encode` for chat templates: names of special tokens in the text become these tokens."""
        return library_ids(self.library, text, marked=True)

    def pieces(self, text):
        if self.can_cut:
            yield from super().pieces(text)
        elif len(text) > LONGEST_WHOLE:
            raise BadInput(
                f'a text has {len(text):,} characters. This tokenizer must encode it as a whole, '
                f'which needs too much memory above {LONGEST_WHOLE:,}.')
        else:
            yield text

    def decode(self, ids):
        """Returns the text of ids. Invalid UTF-8 becomes U+FFFD. Ids of no token are dropped."""
        return self.library.decode(ids, skip_special_tokens=False)

    def stream(self, tokens, before=()):
        """Yields the text of ids that come one by one, as soon as characters are complete.

        before: ids of the text that they continue. A text of its own may lose its first space.
        """
        ids = list(before)[-STREAM_TOKENS // 2 :]
        shown = self.decode(ids)        # the text of `ids`, which is known or was yielded
        for token in tokens:
            ids.append(token)
            # The text of a byte may change with the next byte.
            if BYTE_TOKEN.fullmatch(self.library.id_to_token(token) or ''):
                continue
            text = self.decode(ids)
            if not text.endswith('\ufffd'):
                # A decoder may change what was shown. Then the text goes on behind what it kept.
                yield text[len(os.path.commonprefix([shown, text])) :]
                shown = text
                # Decoding all of a long text at every token would take quadratic time.
                kept = self.decode(ids[-STREAM_TOKENS // 2 :])
                if len(ids) > STREAM_TOKENS and shown.endswith(kept.lstrip()):
                    ids = ids[-STREAM_TOKENS // 2 :]
                    shown = kept
        text = self.decode(ids)
        yield text[len(os.path.commonprefix([shown, text])) :]

    def token_bytes(self):
        """Bytes of text that every id stands for: a list of length vocab_size.

        Control tokens and unused ids have 0. U+2581 and the end of a word stand for a space, which
        is one byte. The space that some tokenizers put before a text is counted, too, so that such
        a text has one byte more than it should.
        """
        to_byte = byte_of_character()
        content = self._content
        steps = steps_of(content['decoder'], 'decoders')
        steps += steps_of(content['pre_tokenizer'], 'pretokenizers')
        kinds = {step['type'] for step in steps}
        model = self.library.model
        suffix = getattr(model, 'end_of_word_suffix', None) or ''
        prefix = getattr(model, 'continuing_subword_prefix', None) or ''
        byte_fallback = 'ByteFallback' in kinds or getattr(model, 'byte_fallback', False)
        is_wordpiece = isinstance(model, tokenizers.models.WordPiece)
        sizes = [0] * self.vocab_size
        for token, i in self.library.get_vocab(with_added_tokens=True).items():
            if token in self.special_tokens:
                sizes[i] = len(token.encode()) if token in self.added else 0
            elif byte_fallback and BYTE_TOKEN.fullmatch(token):
                sizes[i] = 1
            elif 'ByteLevel' in kinds and to_byte.keys() >= set(token):
                sizes[i] = len(token)
            else:
                word = token
                if suffix and word.endswith(suffix):
                    word = word.removesuffix(suffix) + ' '
                if prefix and word.startswith(prefix):
                    word = word.removeprefix(prefix)
                elif is_wordpiece:
                    word = ' ' + word
                sizes[i] = len(word.replace('\u2581', ' ').encode())
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


def default_stops(special_tokens, bos_id):
    """Ids that end generation if the model's folder names none."""
    names = [name for name in ENDS if name in special_tokens]
    names = names or [name for name in special_tokens if LIKE_EOS.fullmatch(name)]
    # BOS is one of them, because in our shards it follows the end of a document.
    ids = [special_tokens[name] for name in names]
    return list(dict.fromkeys([*ids, bos_id]))


def make_tokenizer(path, ranks, pattern, special_tokens, bos=None, nfc=False, added=()):
    """Makes a RankTokenizer.

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
    bos_id = special_tokens[bos]
    return RankTokenizer(
        path=path,
        fingerprint=digest(content),
        bos_id=bos_id,
        vocab_size=top,
        special_tokens=special_tokens,
        added=tuple(added),
        start_ids=(bos_id,),
        encoding=encoding,
        ranks=ranks,
        nfc=nfc,
        **said_by_names(special_tokens, bos),
    )


def digest(content):
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def said_by_names(special_tokens, bos):
    """What the folder of a model may say otherwise: a dict of attributes of a Tokenizer."""
    bos_id = special_tokens[bos]
    stop_ids = default_stops(special_tokens, bos_id)
    names = {i: name for name, i in special_tokens.items()}
    tokens = dict(bos_token=bos, eos_token=names[stop_ids[0]])
    return dict(tokens=tokens, stop_ids=stop_ids, prefix_id=bos_id)


# -- reading ---------------------------------------------------------------------------------------


def load_tokenizer(path):
    """Loads a tiktoken name, a file of a tokenizer, or a folder with one of them.

    Raises BadInput if there is none, and for a file of another form.
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
        names = ('tokenizer.tiktoken', 'tokenizer.json', 'tokenizer.model', *PAIR_OF)
        for name in names:
            if os.path.isfile(os.path.join(path, name)):
                return load_tokenizer(os.path.join(path, name))
        raise BadInput(f'{path} has no tokenizer: none of {", ".join(names)}.')
    if os.path.basename(path) in PAIR_OF and os.path.isfile(path):
        return load_vocab_and_merges(path)
    if path.endswith('.json'):
        if not os.path.isfile(path):
            raise BadInput(f'{path} does not exist.')
        return load_tokenizer_json(path, read_object(path), read_source(path))
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
        tokenizer = make_tokenizer(path, ranks, *(extra[key] for key in keys))
    else:
        known = known_ranks(len(ranks))
        if known is None:
            raise BadInput(
                f'{path} has {len(ranks):,} tokens, which is the number of no tokenizer that is '
                'known here, and it does not say how it splits text. Give the tokenizer.json of '
                f'the same model, or write {path}.json with pattern, special_tokens (name: id), '
                'bos, nfc and added.')
        pattern, special_tokens, nfc = known
        tokenizer = make_tokenizer(path, ranks, pattern, special_tokens, nfc=nfc)
    by_name = {token.decode(errors='replace'): i for token, i in ranks.items()}
    by_name |= tokenizer.special_tokens
    describe(tokenizer, read_model_files(os.path.dirname(path)), by_name.get)
    return tokenizer


def load_vocab_and_merges(path):
    """Reads GPT-2's older form: a vocabulary and a list of merges. path: of one of the two files.

    Raises BadInput if they are not GPT-2's, because they do not say how text is split.
    """
    folder = os.path.dirname(path)
    other = os.path.join(folder, PAIR_OF[os.path.basename(path)])
    if not os.path.isfile(other):
        raise BadInput(f'{path} needs {other}, which is missing.')
    vocab_path, merges_path = (path, other) if path.endswith('.json') else (other, path)
    vocab = read_object(vocab_path)
    files = read_model_files(folder)
    config = read_object(os.path.join(folder, 'tokenizer_config.json'))
    kind = config.get('tokenizer_class') or (files.config or {}).get('model_type')
    end = '<|endoftext|>'
    is_gpt2 = len(vocab) == 50257 and vocab.get(end) == 50256
    if not is_gpt2 and kind not in ('GPT2Tokenizer', 'GPT2TokenizerFast', 'gpt2'):
        raise BadInput(
            f"{vocab_path} is not GPT-2's vocabulary, and it does not say how text is split before "
            'the merges. Give the tokenizer.json of the same model.')
    lines = read_source(merges_path).split('\n')
    merges = [line.split(' ') for line in lines if line and not line.startswith('#version')]
    byte_level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=True)
    added = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    content = dict(version='1.0', added_tokens=[])
    if end in vocab:
        content['added_tokens'] = [dict(id=vocab[end], content=end, **added)]
    content |= dict(pre_tokenizer=byte_level, decoder=byte_level)
    content['model'] = dict(type='BPE', vocab=vocab, merges=merges)
    return load_tokenizer_json(path, content, json.dumps(content))


def declared_tokens(folder):
    """Tokens that files beside a tokenizer.json declare: [(id, AddedToken)], in order of the ids.
    """
    config = read_object(os.path.join(folder, 'tokenizer_config.json'))
    declared = config.get('added_tokens_decoder')
    flags = ('single_word', 'lstrip', 'rstrip', 'normalized', 'special')
    tokens = []
    for i, token in (declared or {}).items():
        options = {key: token[key] for key in flags if key in token}
        tokens.append((int(i), tokenizers.AddedToken(token['content'], **options)))
    if declared is None:
        # An older form of the same.
        named = read_model_files(folder)
        special = {*named.tokens.values(), *named.more_special}
        more = read_object(os.path.join(folder, 'added_tokens.json'))
        for name, i in more.items():
            tokens.append((i, tokenizers.AddedToken(name, special=name in special)))
    return sorted(tokens, key=lambda token: token[0])


def add_declared(library, files):
    """Adds tokens that the folder names and the tokenizer.json lacks, as transformers does.

    Returns (whether any was added, sentences about those that could not be).
    """
    notes = []
    there = {token.content: token for token in library.get_added_tokens_decoder().values()}
    changed = False
    for i, token in declared_tokens(files.folder):
        old = there.get(token.content)
        if old is not None:
            token.special = old.special
        if old is None or repr(old) != repr(token):
            library.add_tokens([token])
            changed = True
        there[token.content] = token
        given = library.token_to_id(token.content)
        if given != i:
            notes.append(f'{token.content!r} has the id {given}, its folder says {i}.')
    for name in dict.fromkeys([*files.tokens.values(), *files.more_special]):
        i = library.token_to_id(name)
        if i is None:
            notes.append(f'{name!r} has no id, so it is left out.')
        # A word that plain text contains stays a word.
        elif name not in there and library_ids(library, name) != [i]:
            library.add_special_tokens([tokenizers.AddedToken(name, special=True)])
            changed = True
    return changed, notes


def ids_around(library, path):
    """The ids that the post-processor of a tokenizer.json puts before and after a text."""
    # Not every tokenizer has a token for 'a'.
    for text in ('a', *itertools.islice(library.get_vocab(with_added_tokens=False), 20)):
        with contextlib.suppress(BadInput):
            n = len(library_ids(library, text))
            encoded = library.encode(text, add_special_tokens=True)
            if n and len(encoded.ids) >= n:
                is_text = [not mark for mark in encoded.special_tokens_mask]
                start = is_text.index(True)
                return tuple(encoded.ids[:start]), tuple(encoded.ids[start + n :])
    raise BadInput(f'{path} makes no tokens of a text. It is damaged, or of another kind.')


def find_bos(special_tokens, tokens, start_ids, by_names):
    """The name of the token that begins documents. None: there are no special tokens.

    special_tokens: name -> id; tokens: what the folder says; start_ids: of the post-processor;
    by_names: END_OF_TEXT counts before what folder and post-processor say.
    """
    names = {i: name for name, i in special_tokens.items()}
    said = [tokens.get('bos_token'), *(names.get(i) for i in start_ids[:1])]
    candidates = [*END_OF_TEXT, *said] if by_names else [*said, *END_OF_TEXT]
    candidates.append(tokens.get('eos_token'))
    for pattern in (LIKE_BOS, LIKE_EOS):
        candidates += [name for name in special_tokens if pattern.fullmatch(name)]
    candidates += special_tokens
    return next((name for name in candidates if name in special_tokens), None)


def describe(tokenizer, files, id_of):
    """Sets what the other files of the folder say. files: ModelFiles; id_of(name): id or None."""
    if files.describes_tokens:
        tokenizer.tokens = dict(files.tokens)
    eos = id_of(files.tokens.get('eos_token')) if files.describes_tokens else None
    ids = [i for i in (eos, *files.eos_ids) if i is not None]
    if ids:
        tokenizer.stop_ids = list(dict.fromkeys(ids))
        if not files.describes_tokens and ids[0] in tokenizer.names:
            tokenizer.tokens['eos_token'] = tokenizer.names[ids[0]]
    # lm-eval takes BOS, or else EOS.
    named = [id_of(tokenizer.tokens.get(key)) for key in ('bos_token', 'eos_token')]
    tokenizer.prefix_id = next((i for i in named if i is not None), tokenizer.bos_id)


def load_tokenizer_json(path, content, source):
    """Makes a Tokenizer of a tokenizer.json and of the files beside path.

    content: of the file; source: its text.
    """
    files = read_model_files(os.path.dirname(path))
    library = open_library(source, path)
    changed, notes = add_declared(library, files)
    if changed:
        source = library.to_str()
        content = json.loads(source)
    if content['model'].get('dropout') is not None:
        notes.append('its dropout is off, so that a text has the same ids every time.')
    start_ids, end_ids = ids_around(library, path)
    tokens = library.get_added_tokens_decoder()
    special_tokens = {token.content: i for i, token in tokens.items()}
    special_tokens = dict(sorted(special_tokens.items(), key=lambda item: item[1]))
    bos = find_bos(special_tokens, files.tokens, start_ids, by_names=True)
    if bos is None:
        raise BadInput(
            f'{path} has no special tokens to begin documents, such as {" ".join(END_OF_TEXT)}.')
    try:
        tokenizer = make_plain(path, content, library, bos)
        if marks_need_library(tokens.values(), tokenizer.nfc):
            tokenizer.source = source
    except NotPlain as reason:
        notes.append(f'{reason}. The package tokenizers encodes, exactly but slower than tiktoken.')
        bos = find_bos(special_tokens, files.tokens, start_ids, by_names=False)
        tokenizer = LibraryTokenizer(
            path=path,
            fingerprint=library_digest(content, tokens, bos),
            bos_id=special_tokens[bos],
            vocab_size=1 + max(library.get_vocab(with_added_tokens=True).values()),
            special_tokens=special_tokens,
            added=tuple(token.content for token in tokens.values() if not token.special),
            start_ids=(),
            source=source,
            library=library,
            **said_by_names(special_tokens, bos),
        )
    tokenizer.start_ids = start_ids
    tokenizer.end_ids = end_ids
    describe(tokenizer, files, lambda name: name and library.token_to_id(name))
    # transformers takes the one of the padding that is saved.
    if files.describes_tokens and content.get('padding'):
        tokenizer.tokens.setdefault('pad_token', content['padding']['pad_token'])
    if notes:
        tokenizer.note = f'{path}: {" ".join(notes)}'
        announce(tokenizer.note)
    return tokenizer


def make_plain(path, content, library, bos):
    """A RankTokenizer with the ids of a tokenizer.json. Raises NotPlain if there is none."""
    options = read_plain(content, library)
    try:
        tokenizer = make_tokenizer(path, bos=bos, **options)
        texts = awkward_texts(options['ranks'], options['special_tokens'])
        text = find_difference(tokenizer.encode, library, texts)
    except BadInput:
        raise
    except ValueError as error:
        raise NotPlain(f'tiktoken does not take its pattern ({error})') from None
    if text is not None:
        raise NotPlain(f'tiktoken gives other ids for {text[:40]!r}')
    return tokenizer


def library_digest(content, tokens, bos):
    """The fingerprint of a tokenizer.json that `tokenizers` encodes.

    tokens: id -> its added token. Files that say the same in an older and a newer form are equal.
    """
    model = dict(content['model'])
    if model.get('type') == 'BPE':
        model['merges'] = [m.split(' ') if isinstance(m, str) else m for m in model['merges']]
        defaults = dict.fromkeys(('fuse_unk', 'byte_fallback', 'ignore_merges'), False)
        model = {**defaults, **model}
    model = {key: value for key, value in model.items() if key != 'dropout' and value is not None}
    steps = [content.get('normalizer'), content.get('pre_tokenizer')]
    added = [
        [i, t.content, t.single_word, t.lstrip, t.rstrip, t.normalized, t.special]
        for i, t in sorted(tokens.items())]
    parts = [json.dumps(part, sort_keys=True) for part in (model, steps)]
    return digest([*parts, added, bos])


# -- writing ---------------------------------------------------------------------------------------


def write_json(path, content, indent=None):
    with open(path, 'w', encoding='utf-8') as f:
        json.dump(content, f, indent=indent, ensure_ascii=False)


def save_tokenizer(folder, tokenizer):
    """Writes the files from which load_tokenizer(folder) makes the same tokenizer.

    They are tokenizer.tiktoken and tokenizer.tiktoken.json, or tokenizer.json and the names of its
    special tokens in tokenizer_config.json if a rank file cannot express it.
    """
    if tokenizer.source is not None:
        write_source(folder, tokenizer.source)
        write_json(os.path.join(folder, 'tokenizer_config.json'), tokenizer.tokens, indent=2)
        return
    path = os.path.join(folder, 'tokenizer.tiktoken')
    with open(path, 'wb') as f:
        for token, rank in sorted(tokenizer.ranks.items(), key=lambda item: item[1]):
            f.write(base64.b64encode(token) + b' %d\n' % rank)
    special = tokenizer.special_tokens
    added = [name for name in special if name in tokenizer.added]
    extra = dict(pattern=tokenizer.encoding._pat_str, special_tokens=special)
    extra |= dict(bos=tokenizer.names[tokenizer.bos_id], nfc=tokenizer.nfc, added=added)
    write_json(path + '.json', extra)


def write_source(folder, source):
    with open(os.path.join(folder, 'tokenizer.json'), 'w', encoding='utf-8', newline='') as f:
        f.write(source)


def save_tokenizer_json(folder, tokenizer, context):
    """Writes tokenizer.json and tokenizer_config.json for `tokenizers` and transformers.

    They produce the same ids. Those of a rank file put BOS before a text. context: the model's
    context in tokens.
    """
    about = dict(tokenizer_class='PreTrainedTokenizerFast', **tokenizer.tokens)
    about |= dict(model_max_length=context, clean_up_tokenization_spaces=False)
    write_json(os.path.join(folder, 'tokenizer_config.json'), about, indent=2)
    if tokenizer.source is not None:
        write_source(folder, tokenizer.source)
        return
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
    split = dict(type='Split', pattern=dict(Regex=to_oniguruma(tokenizer.encoding._pat_str)))
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
