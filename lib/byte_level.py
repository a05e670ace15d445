"""Byte-level BPE: which tokenizer.json tiktoken can express exactly, and how one is written.

tiktoken encodes several times faster than the package `tokenizers`. `read_plain` says whether the
two give the same ids by the rules of both. `find_difference` compares them on awkward texts.
"""

import math
import re

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2's pattern on text that was first split at every digit: spaces before a digit are one piece.
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
QWEN_PATTERN = LLAMA3_PATTERN.replace('{1,3}', '')
# Unlike Llama 3's, it keeps all blanks at the end of a text together.
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r'|\s++$|\s*[\r\n]|\s+(?!\S)|\s'
)
O200K_PATTERN = (
    r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+'
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r'|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*'
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r'|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)

# -- rank files that come without a description ----------------------------------------------------

LLAMA3_SPECIAL = (
    '<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|> <|reserved_special_token_1|> '
    '<|finetune_right_pad_id|> <|reserved_special_token_2|> <|start_header_id|> <|end_header_id|> '
    '<|eom_id|> <|eot_id|> <|python_tag|>'
).split()
LLAMA4_SPECIAL = (
    '<|begin_of_text|> <|end_of_text|> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> '
    '<|header_start|> <|header_end|> <|eom|> <|eot|> <|step|>'
).split()
LLAMA4_VISION = (
    '<|image_start|> <|image_end|> <|vision_reserved_special_token_0|> '
    '<|vision_reserved_special_token_1|> <|tile_x_separator|> <|tile_y_separator|> '
    '<|vision_reserved_special_token_2|> <|vision_reserved_special_token_3|> '
    '<|vision_reserved_special_token_4|> <|vision_reserved_special_token_5|> <|image|> '
    '<|vision_reserved_special_token_6|> <|patch|>'
).split()


def reserved(kind, low, high):
    return [f'<|{kind}reserved_special_token_{i}|>' for i in range(low, high)]


def llama4_special():
    """Names of the 2,048 special tokens of Llama 4, in the order of their ids."""
    names = [*LLAMA4_SPECIAL, *reserved('text_post_train_', 0, 6)]
    names += ['<|python_start|>', '<|python_end|>', '<|finetune_right_pad|>']
    names += reserved('text_post_train_', 8, 69)
    names += [*LLAMA4_VISION, *reserved('vision_', 7, 1048)]
    names += reserved('reasoning_', 0, 8)
    names += ['<|reasoning_thinking_start|>', '<|reasoning_thinking_end|>']
    return names + reserved('', 0, 2048 - len(names))


def known_ranks(n):
    """(pattern, special tokens as name -> id, NFC) of the rank file with n tokens. None: unknown.

    From tiktoken's own list, and from the code that Llama 3, Llama 4 and Qwen were published with.
    """
    end = '<|endoftext|>'
    if n == 50256:      # GPT-2, r50k_base
        return GPT2_PATTERN, {end: 50256}, False
    if n == 50280:      # p50k_base. Its ranks leave out the id 50256
        return GPT2_PATTERN, {end: 50256}, False
    if n == 100256:     # cl100k_base
        fim = ['<|fim_prefix|>', '<|fim_middle|>', '<|fim_suffix|>']
        names = dict(zip([end, *fim], range(100257, 100261), strict=True))
        return CL100K_PATTERN, names | {'<|endofprompt|>': 100276}, False
    if n == 199998:     # o200k_base
        return O200K_PATTERN, {end: 199999, '<|endofprompt|>': 200018}, False
    if n == 128000:     # Llama 3
        names = LLAMA3_SPECIAL + reserved('', 3, 3 + 256 - len(LLAMA3_SPECIAL))
        return LLAMA3_PATTERN, {name: n + i for i, name in enumerate(names)}, False
    if n == 200000:
        return O200K_PATTERN, {name: n + i for i, name in enumerate(llama4_special())}, False
    if n == 151643:     # Qwen
        names = [end, '<|im_start|>', '<|im_end|>', *(f'<|extra_{i}|>' for i in range(205))]
        return QWEN_PATTERN, {name: n + i for i, name in enumerate(names)}, True
    return None


# -- tokenizer.json --------------------------------------------------------------------------------


class NotPlain(ValueError):
    """Says why tiktoken cannot express a tokenizer.json."""


def byte_of_character():
    """The 256 characters that stand for bytes in byte-level BPE files: dict character -> byte."""
    # Printable bytes stand for themselves. The others are numbered from 256.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def steps_of(part, key):
    """The steps of a normalizer, pre-tokenizer or decoder: a list, without nested Sequences."""
    if part is None:
        return []
    if part['type'] != 'Sequence':
        return [part]
    return [step for inner in part[key] for step in steps_of(inner, key)]


def is_isolated(split):
    """Whether the expression of a Split matches the pieces themselves."""
    return (split['behavior'], split['invert']) in (('Isolated', False), ('Removed', True))


def split_pattern(pre_tokenizer):
    """The regular expression that a tokenizer.json's pre_tokenizer is equivalent to.

    Raises NotPlain if it is of a kind that one expression cannot replace.
    """
    pattern = None
    digits = False
    for step in steps_of(pre_tokenizer, 'pretokenizers'):
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
                raise NotPlain('its Split and ByteLevel with use_regex are not one pattern')
            if digits and not splits:
                raise NotPlain('its Digits without the split of GPT-2 are not one pattern')
            if splits and is_first:
                pattern = GPT2_PATTERN
        else:
            raise NotPlain(f"it has the pre-tokenizer step '{kind}' in a form of its own")
    if pattern is None:
        raise NotPlain('its pre-tokenizer splits nothing')
    return pattern


def overlaps(a, b):
    """Whether two different names can share characters of a text."""
    if a in b or b in a:
        return True
    shorter = min(len(a), len(b))
    ends = ((a[-n:] == b[:n] or b[-n:] == a[:n]) for n in range(1, shorter))
    return any(ends)


def has_options(token):
    """Whether an added token (of `tokenizers`) matches more or less than its name."""
    return token.single_word or token.lstrip or token.rstrip


def check_added(tokens, nfc):
    """Raises NotPlain for added tokens that one search in the text before NFC cannot find.

    tokens: of `tokenizers`. Only those that are not special are matched in plain text.
    """
    for token in tokens:
        if token.special:
            continue
        if has_options(token):
            raise NotPlain(f'its added token {token.content!r} has lstrip, rstrip or single_word')
        # NFC does not change blanks, so these are the same before and after.
        if token.normalized and nfc and token.content.strip(' \t\n\r'):
            raise NotPlain(f'its added token {token.content!r} is matched after the normalizer')
        # `tokenizers` searches for the two kinds one after the other.
        for other in tokens:
            if other.normalized != token.normalized and overlaps(token.content, other.content):
                raise NotPlain(f'its added tokens {token.content!r} and {other.content!r} overlap')


def marks_need_library(tokens, nfc):
    """Whether the names of special tokens in a text cannot be found by one search before NFC.

    tokens: added tokens of `tokenizers`.
    """
    changed = [token for token in tokens if token.normalized]
    as_they_are = [token for token in tokens if not token.normalized]
    if any(has_options(token) for token in tokens):
        return True
    if nfc and any(token.content.strip(' \t\n\r') for token in changed):
        return True
    return any(overlaps(a.content, b.content) for a in changed for b in as_they_are)


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


def check_merges(model, library, ranks, specials):
    """Raises NotPlain unless merging by the order of ids is merging by the list of merges.

    model: of the tokenizer.json; library: the tokenizer of `tokenizers`; ranks: bytes -> id;
    specials: name -> added token. If every token is reached by merges, in the order of the ids,
    then a token's last merge joins the parts that tiktoken joins.
    """
    bpe = library.model
    last = -1
    for merge in model['merges']:
        merged = merge.replace(' ', '') if isinstance(merge, str) else ''.join(merge)
        i = model['vocab'].get(merged, -1)
        if i < last or i < 0:
            raise NotPlain(f'its ids do not follow the order of its merges, at {merged!r}')
        last = i
    to_byte = byte_of_character()
    whole = bpe.ignore_merges       # words that are tokens are taken as they are
    lacks_bytes = any(bytes([b]) not in ranks for b in range(256))
    if lacks_bytes and model.get('unk_token') is not None:
        raise NotPlain('it has a token for unknown bytes')
    bpe.ignore_merges = False
    try:
        for word, i in model['vocab'].items():
            special = specials.get(word)
            if len(word) == 1 and special is None:
                continue
            made = bpe.tokenize(word)
            is_reached = len(made) == 1 and made[0].id == i
            if special is None and not is_reached:
                token = bytes(to_byte[c] for c in word)
                if not whole or lacks_bytes or len(split_token(token, ranks)) == 2:
                    raise NotPlain(f'no merge makes {word!r} of its vocabulary')
            # In plain text, the name of a special token is not this token.
            if special is not None and special.special:
                pieces = library.pre_tokenizer.pre_tokenize_str(word)
                if is_reached or (whole and [piece for piece, _ in pieces] == [word]):
                    raise NotPlain(f'its special token {word!r} is also an ordinary one')
    finally:
        bpe.ignore_merges = whole


def read_plain(content, library):
    """What tiktoken needs of a tokenizer.json: a dict of options of `make_tokenizer`.

    content: of the file; library: the same as a Tokenizer of `tokenizers`. Raises NotPlain.
    """
    model = content['model']
    if model.get('type') != 'BPE':
        raise NotPlain(f'its model is {model.get("type", "of no stated type")}')
    if not model['merges']:
        raise NotPlain('it has no merges')
    for key in ('byte_fallback', 'continuing_subword_prefix', 'end_of_word_suffix'):
        if model.get(key):
            raise NotPlain(f'it has {key}')
    normalizers = [step['type'] for step in steps_of(content.get('normalizer'), 'normalizers')]
    if normalizers not in ([], ['NFC']):
        raise NotPlain(f'it has the normalizer {" and ".join(normalizers)}')
    nfc = bool(normalizers)
    pattern = split_pattern(content.get('pre_tokenizer'))
    steps = steps_of(content['pre_tokenizer'], 'pretokenizers')
    if all(step['type'] != 'ByteLevel' for step in steps):
        raise NotPlain('it has no ByteLevel pre-tokenizer')
    tokens = library.get_added_tokens_decoder()
    check_added(list(tokens.values()), nfc)
    special_tokens = {token.content: i for i, token in tokens.items()}
    to_byte = byte_of_character()
    ranks = {}
    for token, i in model['vocab'].items():
        if token in special_tokens:
            continue
        if not to_byte.keys() >= set(token):
            raise NotPlain(f'its token {token!r} is not written in byte-level characters')
        ranks[bytes(to_byte[c] for c in token)] = i
    if not ranks or len({*ranks.values(), *tokens}) < len(ranks) + len(tokens):
        raise NotPlain('several of its tokens have one id')
    check_merges(model, library, ranks, {token.content: token for token in tokens.values()})
    # Added tokens that are not special are matched in plain text.
    added = [token.content for token in tokens.values() if not token.special]
    return dict(ranks=ranks, pattern=pattern, special_tokens=special_tokens, nfc=nfc, added=added)


def to_oniguruma(pattern):
    """A tiktoken pattern as `tokenizers` must have it to mean the same."""
    # Oniguruma reads {1,3}+ as a repeated group and $ as the end of any line.
    return re.sub(r'(\{\d+(?:,\d*)?\})\+', r'\1', pattern).replace('$', r'\z')


# -- comparing -------------------------------------------------------------------------------------

AWKWARD_TEXTS = (
    '', ' ', '\n', '\r\n', '\t', 'a', 'Hello world', '  two  spaces   three    four ',
    'I\'ll I\'LL we\'ve WE\'VE don\'t DON\'T she\'d SHE\'D it\'s IT\'S they\'re THEY\'RE I\'m I'
    '\'M \'tis \'\'s \'S\'',
    'l\'\xe9t\xe9 \u2019s rock\u2019n\u2019roll \'sAll \'llama \'\u017fx \'r e',
    '0 1 12 123 1234 12345 1234567890 3.14159 1,000,000 1e-9 0x1F 10:30 a1b22c333d4444 007',
    ' 1  22   333 x1 y 2z\n3\n44\n\n555',
    '\u0663\u0664 \xb2\xb3\xbd \u2167 \u0967\u0968\u0969\u0966 \uff11\uff12\uff13 \U0001d7d8'
    '\U0001d7d9 \u2460\u2461 \u3021\u3022',
    'line\nline\n\nline\n\n\nline\r\nline\r\n\r\nline\rline\n\r\nend\n',
    'x \n y\n \n  z \t\n\t\tw  \n\n\n',
    'a' + ' ' * 7 + 'b' + ' ' * 40 + 'c' + '\t' * 9 + 'd' + '\n' * 12 + 'e' + ' \n' * 5 + 'f',
    'trailing   ', '   leading', '\n\nleading', 'end\n\n', 'end \n', 'x\t',
    '\xa0\xa0x\xa0 y \xa0z',
    'thin\u2009em\u2003ideo\u3000line\u2028para\u2029nel\x85vt\x0bff\x0c mmsp\u205f nnbsp\u202f'
    ' mvs\u180e ogham\u1680.',
    'zero\u200bwidth\u200cnon\u200djoiner\ufeffbom\u2060wj\xadshy\u200elrm\u200frlm\u202eover'
    '\u202c',
    ''.join(map(chr, [*range(32), *range(0x7f, 0xa1)])) + ' \0\0 a\0b',
    'a\x13b c\x04d \x1b[0m \x1cfs\x1dgs\x1ers\x1fus',
    'e\u0301 \xe9 a\u030a\u0323 \u1ea1\u030a o\u0308\u0304 q\u0307\u0323 q\u0323\u0307 \u212b '
    '\u2126 K\u212a \u037e ; \u1fef ` x\u0338 <\u0338 =\u0338 >\u0338 \ufb01 \ufb02 \u01c4 '
    '\u1e9b\u0323',
    '\u0301start \u0301 \n\u0301x \t\u0308 \u20dd\u0344 \u0f73\u0f75 \u0958\u0931 \u09c7\u09be',
    'Stra\xdfe \u0130stanbul \u0131 \u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2 \u01c5 \u01c6 '
    '\xc6sir \u0152uvre \u1e9e \ua7b3 na\xefve caf\xe9 Vi\u1ec7t Nam \u017divio CamelCaseHTTPSe'
    'rver',
    '\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0457\u0436\u0430\u043a \u0451'
    '\u043b\u043a\u0430',
    '\u4f60\u597d\uff0c\u4e16\u754c\u3002\u4eca\u5929\u662f2024\u5e741\u67081\u65e5\uff01\u300c'
    '\u5f15\u7528\u300d\U00020000\U0002a6d6',
    '\u3053\u3093\u306b\u3061\u306f \u30ab\u30bf\u30ab\u30ca\u30fc \u304c\u3099\u3000\uff76'
    '\uff9e\u30fb \u3042\u3044 \u4ee4\u548c',
    '\uc548\ub155\ud558\uc138\uc694 \u1112\u1161\u11ab\u1100\u1173\u11af \u314e\u314f\u3134 '
    '\uac00\u11a8',
    '\u0645\u0631\u062d\u0628\u0627 \u0628\u0650\u0633\u0652\u0645\u0650 \u0627\u0644\u0644'
    '\u0651\u0647 \u0661\u0662\u0663 \ufdfa \ufefb',
    '\u05e9\u05b8\u05dc\u05d5\u05b9\u05dd \u05d0\u05f2\u05b7 \ufb2a \ufb49',
    '\u0928\u092e\u0938\u094d\u0924\u0947 \u0915\u094d\u0937 \u0958 \u0915\u093c \u0c28\u0c2e '
    '\u0ba8\u0bbf \u0bca \u0bc6\u0bbe',
    '\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0e33 \u0eb3 \u1019\u103c\u1014\u103a\u1019\u102c '
    '\u1780\u17d2\u1798 \u0f56\u0f7c\u0f51 \u10d2\u10d0 \u0531\u0580 \u1200\u1208',
    '\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f44d\U0001f3fd'
    ' \U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7 \u2764\ufe0f 1\ufe0f\u20e3 \U0001f9d1\U0001f3ff'
    '\u200d\U0001f680',
    '\U0001d465\xb2 + \U0001d466\xb2 \u2264 \u222b\u2080\xb9 \u2202f/\u2202x \u2260 \u2192 '
    '\u2211 \u20ac\xa3\xa5\u20b9 \u2022 \u2026 \u2014 \u2013 \xab\xbb \u201c\u201d \u2018\u2019'
    ' \u2122\xae',
    '\ue000\uf8ff \U000f1234 \U0010ffff \ufffd \ufffe \uffff \U0001fae8 \u0378 \U000e0001'
    '\U000e0041',
    'def f(x):\n    """Doc."""\n    if x != 0 and not y:\n\t\treturn {"a": [1, 2], **kw}  # end'
    '\n\n\nclass A(B):\n        pass\n',
    'for (int i=0;i<n;++i){a[i]+=b->c%d;}//x\n/* **/ #include <a.h>\n$x = @$y[\'k\'] ?? `ls -la'
    '`; \\\\n \\t',
    '<div class="a">&nbsp;<b>x</b></div><!-- c --> https://example.com/a?b=c&d=%20#e me@example'
    '.org',
    '...!!! ??? --- === *** ___ ~~~ ((())) [[[]]] {{{}}} <<<>>> ||| /// \\\\\\ :;:; ,., "" \'\''
    ' `` ^^ @@ ## $$ %% && ++',
    'Donaudampfschifffahrtsgesellschaftskapitaen pneumonoultramicroscopicsilicovolcanoconiosis',
    'x' * 300 + ' ' + 'ab' * 200 + ' ' + '\u4e2d\u6587' * 60 + ' ' + '9' * 130 + ' ' + '-' * 150,
    'THE QUICK brown Fox tHe iPhone McDonald e.g. i.e. U.S.A. Ph.D. o\'clock ROCK\'N\'ROLL Y\'A'
    'LL\'D\'VE',
    '\u2581\u2581x \u2581 a\u2581b <0x0A> <0xFF> ##ing @@ </w> \u0120word \u010a \u0109 \xc4'
    '\u0142',
    '<s> </s> <unk> <pad> <bos> <eos> [CLS] [SEP] [MASK] <mask> <think> </think> <tool_call> <|'
    'x|>',
)


def awkward_texts(ranks, special_tokens):
    """AWKWARD_TEXTS and texts of a tokenizer's own rare and long tokens, as a list of strings."""
    texts = list(AWKWARD_TEXTS)
    names = [*special_tokens][:40] + [*special_tokens][-40:]
    texts += ['a'.join(names), ' '.join(names), ''.join(f'\n{name} \n x{name}1' for name in names)]
    in_order = sorted(ranks, key=ranks.get)
    long = sorted(ranks, key=len)[-150:]
    for tokens in (in_order[256:400], in_order[-150:], long):
        words = [token.decode(errors='replace') for token in tokens]
        texts += [''.join(words), ' '.join(words), '\n'.join(words[::-1])]
        # The first half of one beside the second half of the next.
        texts.append(''.join(w[: (len(w) + 1) // 2] + v[len(v) // 2 :]
                             for w, v in zip(words, words[1:], strict=False)))
    return texts


def find_difference(encode, library, texts):
    """The first text that encode(text) and `tokenizers` give other ids. None: there is none."""
    library.encode_special_tokens = True
    for text in texts:
        if encode(text) != library.encode(text, add_special_tokens=False).ids:
            return text
    return None
