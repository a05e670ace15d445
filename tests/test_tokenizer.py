"""Every tokenizer.json gives the ids, the text and the ends that its library and lm-eval give."""

import itertools
import json
import random
import types

import pytest
import tiktoken
import tokenizers
from tiktoken_ext import openai_public
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from configurator import BadInput
from lib import tokenizer as tokenizer_module
from lib.byte_level import AWKWARD_TEXTS, known_ranks
from lib.tokenizer import (
    FIXED,
    LibraryTokenizer,
    RankTokenizer,
    load_tokenizer,
    make_tokenizer,
    save_tokenizer,
    save_tokenizer_json,
    to_nfc,
)
from tests.test_prepare import documents

BLOCKS = (
    (0x20, 0x7e), (0, 0x20), (0x7f, 0xff), (0x100, 0x24f), (0x300, 0x36f), (0x370, 0x3ff),
    (0x400, 0x4ff), (0x590, 0x5ff), (0x600, 0x6ff), (0x900, 0x97f), (0xe00, 0xe7f),
    (0x1100, 0x11ff), (0x1e00, 0x1fff), (0x2000, 0x206f), (0x2100, 0x22ff), (0x3000, 0x30ff),
    (0x4e00, 0x9fff), (0xac00, 0xd7a3), (0xe000, 0xe0ff), (0xfb00, 0xfdff), (0xfe00, 0xffff),
    (0x1f300, 0x1faff), (0x1d400, 0x1d7ff), (0x10000, 0x10ffff))
BLANKS = (' ', '  ', '    ', '\n', '\n\n', '\r\n', '\t', ' \n', '\u00a0', '\u3000', '')
END = '<|endoftext|>'


def awkward_500(library):
    """500 texts of all scripts, with a tokenizer's own added tokens and longest words."""
    rng = random.Random(0)
    vocab = sorted(library.get_vocab(), key=lambda word: (len(word), word))
    words = []
    for word in vocab[-200:] + rng.sample(vocab, min(200, len(vocab))):
        words.append(word.replace('\u0120', ' ').replace('\u2581', ' '))
    names = [token.content for token in library.get_added_tokens_decoder().values()][:40]
    texts = []
    for _ in range(500):
        text = ''
        for _ in range(rng.randint(1, 12)):
            kind = rng.random()
            if kind < 0.25:
                whole = rng.choice(AWKWARD_TEXTS)
                at = rng.randint(0, len(whole))
                text += whole[at : at + rng.randint(1, 60)]
            elif kind < 0.6:
                low, high = rng.choice(BLOCKS)
                text += ''.join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 12)))
            elif kind < 0.75 and names:
                text += rng.choice(names)
            elif kind < 0.9:
                word = rng.choice(words)
                text += word[rng.randint(0, len(word)) :] + rng.choice(words)
            else:
                text += str(rng.randint(0, 10 ** rng.randint(1, 12)))
            text += rng.choice(BLANKS)
        texts.append(text)
    return texts


def truth(path):
    library = tokenizers.Tokenizer.from_file(str(path))
    library.no_truncation()
    library.no_padding()
    return library


def ids_of(library, text, marked=False):
    library.encode_special_tokens = not marked
    return library.encode(text, add_special_tokens=False).ids


def assert_equal(ours, library, texts):
    """Ids of documents and of prompts, whole texts and texts that are written token by token."""
    for n, text in enumerate(texts):
        assert ours.encode(text) == ids_of(library, text), text
        ids = ids_of(library, text, marked=True)
        assert ours.encode_marked(text) == ids, text
        shown = library.decode(ids, skip_special_tokens=False)
        assert ours.decode(ids) == shown, text
        if n % 10 == 0:
            assert ''.join(ours.stream(ids)) == shown, text


# -- every kind ------------------------------------------------------------------------------------

ADDED = [
    AddedToken('<L>', lstrip=True), AddedToken('<R>', rstrip=True, normalized=False),
    AddedToken('<W>', single_word=True), AddedToken('Caf\u00e9', normalized=True),
    AddedToken('  ', normalized=False)]


def byte_level_bpe(normalizer=None, pre_tokenizer=None, specials=(END, '<|im_start|>'), **options):
    library = tokenizers.Tokenizer(models.BPE(**options))
    library.normalizer = normalizer
    library.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    more = {}
    if 'end_of_word_suffix' in options:
        more = dict(end_of_word_suffix=options['end_of_word_suffix'])
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(specials), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **more)
    library.train_from_iterator(documents(100), trainer)
    return library


def sentencepiece_bpe(added=()):
    """As Llama 2 has it: no pre-tokenizer, a space before the text, bytes in place of unknowns."""
    marks = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256))]
    library = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token='<unk>'))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='never')
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=marks, show_progress=False)
    library.train_from_iterator(documents(100), trainer)
    content = json.loads(library.to_str())
    content['added_tokens'] = content['added_tokens'][:3]
    content['pre_tokenizer'] = None
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    library.normalizer = normalizers.Sequence([
        normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')])
    library.decoder = decoders.Sequence([
        decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(' ', 1, 0)])
    library.post_processor = processors.TemplateProcessing('<s> $A', None, [('<s>', 1)])
    library.add_tokens(list(added))
    return library


def unigram():
    """As T5 has it."""
    library = tokenizers.Tokenizer(models.Unigram())
    library.normalizer = normalizers.Sequence([
        normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(' {2,}'), ' ')])
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=['<pad>', '</s>', '<unk>'], unk_token='<unk>',
        show_progress=False)
    library.train_from_iterator(documents(100), trainer)
    library.post_processor = processors.TemplateProcessing('$A </s>', None, [('</s>', 1)])
    return library


def wordpiece():
    """As BERT has it."""
    library = tokenizers.Tokenizer(models.WordPiece(unk_token='[UNK]'))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=['[PAD]', '[UNK]', '[CLS]', '[SEP]'], show_progress=False)
    library.train_from_iterator(documents(100), trainer)
    library.post_processor = processors.BertProcessing(('[SEP]', 3), ('[CLS]', 2))
    return library


def with_tokens(library, tokens, special=False):
    add = library.add_special_tokens if special else library.add_tokens
    add(list(tokens))
    return library


def gpt4_split():
    split = pre_tokenizers.Split(tokenizers.Regex(known_ranks(199998)[0]), 'isolated')
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])


def deepseek_split():
    patterns = (r'\p{N}{1,3}', r'\s+')
    splits = [pre_tokenizers.Split(tokenizers.Regex(p), 'isolated') for p in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])


PLAIN = {
    'byte level': byte_level_bpe,
    'ignore_merges': lambda: byte_level_bpe(ignore_merges=True),
    'NFC': lambda: byte_level_bpe(normalizers.NFC()),
    'NFC in a sequence': lambda: byte_level_bpe(normalizers.Sequence([normalizers.NFC()])),
    'blanks after NFC': lambda: with_tokens(
        byte_level_bpe(normalizers.NFC()), [AddedToken(' ' * n) for n in (4, 3, 2)]),
    'added before NFC': lambda: with_tokens(
        byte_level_bpe(normalizers.NFC()), [AddedToken('<think>', normalized=False)]),
    'o200k': lambda: byte_level_bpe(pre_tokenizer=gpt4_split()),
    'special with rstrip': lambda: with_tokens(
        byte_level_bpe(), [AddedToken('<|user|>', rstrip=True, normalized=False)], special=True),
}
LIBRARY = {
    'sentencepiece': sentencepiece_bpe,
    'sentencepiece with added': lambda: sentencepiece_bpe(ADDED),
    'unigram': unigram,
    'wordpiece': wordpiece,
    'NFKC': lambda: byte_level_bpe(normalizers.NFKC()),
    'lowercase': lambda: byte_level_bpe(normalizers.Lowercase()),
    'prefix space': lambda: byte_level_bpe(pre_tokenizer=pre_tokenizers.ByteLevel(True)),
    'several splits': lambda: byte_level_bpe(pre_tokenizer=deepseek_split()),
    'suffix': lambda: byte_level_bpe(end_of_word_suffix='</w>'),
    **{f'added {token.content!r}': make for token, make in (
        (token, lambda token=token: with_tokens(byte_level_bpe(normalizers.NFC()), [token]))
        for token in ADDED[:4])},
    'added beside special': lambda: with_tokens(
        byte_level_bpe(), [AddedToken('>x', normalized=True), AddedToken('<|im', special=False)]),
    'a word that is special': lambda: with_tokens(
        byte_level_bpe(ignore_merges=True), ['the'], special=True),
}


@pytest.mark.parametrize('kind', [*PLAIN, *LIBRARY])
def test_a_tokenizer_json_gives_what_its_library_gives(tmp_path, kind, capsys):
    library = {**PLAIN, **LIBRARY}[kind]()
    library.save(str(tmp_path / 'tokenizer.json'))
    ours = load_tokenizer(str(tmp_path / 'tokenizer.json'))
    assert type(ours) is (RankTokenizer if kind in PLAIN else LibraryTokenizer)
    # The run says so, once.
    assert ('The package tokenizers encodes' in ours.note) == (kind in LIBRARY)
    load_tokenizer(str(tmp_path))
    assert capsys.readouterr().err.count(ours.note) == 1 or not ours.note
    texts = awkward_500(library)
    assert_equal(ours, library, texts)
    assert ours.vocab_size == library.get_vocab_size() == len(ours.token_bytes())
    assert ours.decode([10**6, ours.vocab_size]) == ''.join(ours.stream([10**6])) == ''
    text = texts[0] + 'a b'
    added = [*ours.start_ids, *ours.encode_marked(text), *ours.end_ids]
    library.encode_special_tokens = False
    assert added == library.encode(text).ids
    # A copy is the same, and so is what an export writes.
    for name in ('copy', 'export'):
        (tmp_path / name).mkdir()
    save_tokenizer(str(tmp_path / 'copy'), ours)
    again = load_tokenizer(str(tmp_path / 'copy'))
    assert again.fingerprint == ours.fingerprint and again.bos_id == ours.bos_id
    assert all(again.encode_marked(text) == ours.encode_marked(text) for text in texts[:50])
    save_tokenizer_json(str(tmp_path / 'export'), ours, 64)
    exported = truth(tmp_path / 'export/tokenizer.json')
    assert all(ids_of(exported, text) == ours.encode(text) for text in texts[:50])


@pytest.mark.parametrize('name, fingerprint', [
    ('bpe8k', '6c44d5ba209d1c78'), ('dolma2', 'fa79f01138c3c82f'), ('gpt2', '743fa6753f320cc3'),
    ('gpt_neox_20b', '46f0c6fd702497e5')])
def test_real_tokenizers_keep_their_fingerprints(shared_data, name, fingerprint):
    path = shared_data / 'tokenizers' / name / 'tokenizer.json'
    ours = load_tokenizer(str(path))
    assert type(ours) is RankTokenizer and ours.fingerprint == fingerprint and not ours.note
    library = truth(path)
    assert_equal(ours, library, awkward_500(library))


def changed(content, change):
    model = content['model']
    n = len(model['vocab'])
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    if change == 'a word that no merge makes':
        model['vocab']['zzqq'] = n
    elif change == 'a merge is missing':
        del model['merges'][20]
    elif change == 'a merge of other halves':
        for i, (a, b) in enumerate((('z', 'v'), ('q', 'z'), ('qz', 'v'))):
            model['vocab'][a + b] = n + i
            model['merges'].append([a, b])
    elif change == 'the order of merges':
        model['merges'][5], model['merges'][50] = model['merges'][50], model['merges'][5]
    elif change == 'an id that the library does not give':
        content['added_tokens'].append(dict(id=n + 50, content='<T>', **flags))
    elif change == 'a pattern that means another thing':
        split = dict(type='Split', behavior='Isolated', invert=False)
        split['pattern'] = dict(Regex=r'\p{N}{1,3}+|[^\p{N}]+')
        steps = [split, {**content['pre_tokenizer'], 'use_regex': False}]
        content['pre_tokenizer'] = dict(type='Sequence', pretokenizers=steps)
        model['merges'] = [m for m in model['merges'] if m[0] not in '12']
        model['vocab']['12'] = n
        model['merges'].append(['1', '2'])
        model['vocab']['1212'] = n + 1
        model['merges'].append(['12', '12'])
    elif change == 'dropout':
        model['dropout'] = 0.5
    elif change == 'truncation and padding':
        content['truncation'] = dict(
            direction='Right', max_length=3, strategy='LongestFirst', stride=0)
        content['padding'] = dict(
            strategy=dict(Fixed=20), direction='Right', pad_to_multiple_of=None, pad_id=0,
            pad_type_id=0, pad_token=END)
    elif change == 'merges as text':
        model['merges'] = [' '.join(m) for m in model['merges']]


@pytest.mark.parametrize('change', [
    'a word that no merge makes', 'a merge is missing', 'a merge of other halves',
    'the order of merges', 'an id that the library does not give',
    'a pattern that means another thing', 'dropout', 'truncation and padding', 'merges as text'])
def test_a_changed_file_gives_what_its_library_gives(tmp_path, change):
    content = json.loads(byte_level_bpe().to_str())
    changed(content, change)
    path = tmp_path / 'tokenizer.json'
    path.write_text(json.dumps(content))
    library = truth(path)
    library.model.dropout = None
    ours = load_tokenizer(str(path))
    texts = ['zzqq qzv x<T> 12 1212 12121 121212', *documents(20, seed=3)]
    texts += awkward_500(library)[:50]
    assert_equal(ours, library, texts)
    assert ('dropout is off' in ours.note) == (change == 'dropout')


def test_files_of_an_older_and_a_newer_form_have_one_fingerprint(tmp_path):
    content = json.loads(sentencepiece_bpe().to_str())
    fingerprints = set()
    for form in ('new', 'old', 'another'):
        if form == 'old':
            content['model']['merges'] = [' '.join(m) for m in content['model']['merges']]
            del content['model']['ignore_merges'], content['model']['dropout']
            content['decoder'] = None
        if form == 'another':
            content['normalizer'] = None
        (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
        fingerprints.add(load_tokenizer(str(tmp_path)).fingerprint)
    assert len(fingerprints) == 2


def test_missing_bytes_are_dropped_within_a_word(tmp_path):
    """The library merges what stands around a byte that has no token."""
    content = json.loads(byte_level_bpe().to_str())
    for b in (0x13, 0x14, 0xF1):
        word = next(c for c, byte in tokenizer_module.byte_of_character().items() if byte == b)
        del content['model']['vocab'][word]
    path = tmp_path / 'tokenizer.json'
    path.write_text(json.dumps(content))
    ours = load_tokenizer(str(path))
    assert type(ours) is RankTokenizer
    library = truth(path)
    texts = ['th\x13e t\x14he \x13\x14', '\x13', '\u00e9\U000f1234 the\U000f1234re', 'plain']
    assert_equal(ours, library, texts + awkward_500(library)[:100])


# -- NFC -------------------------------------------------------------------------------------------


def test_nfc_is_that_of_the_library():
    nfc = normalizers.NFC().normalize_str
    ranges = [*range(0xd800), *range(0xe000, 0x10000), *range(0x1d400, 0x1f000, 7)]
    # A mark of the lowest class moves before a mark of any other class, and U+0345 behind.
    for form in ('{}', 'a{}\u0334', 'e\u0345{}', '\u1100{}\u11a8', '{}\u0301'):
        text = '\n'.join(form.format(chr(c)) for c in ranges)
        assert to_nfc(text) == nfc(text), form
    fixed = ''.join(c for c in map(chr, ranges) if tokenizer_module.re.match(f'[{FIXED}]', c))
    assert nfc(fixed) == fixed and len(fixed) > 50_000
    rng = random.Random(2)
    for _ in range(300):
        low, high = rng.choice(BLOCKS)
        codes = [rng.choice((rng.randint(low, high), 0x301, 0x41, 0x323)) for _ in range(30)]
        text = ''.join(map(chr, codes))
        assert to_nfc(text) == nfc(text), text


# -- long texts ------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind, is_cut', [
    ('NFKC', True), ('wordpiece', True), ('sentencepiece', False), ('unigram', False),
    ('prefix space', False)])
def test_a_long_text_is_cut_only_where_that_is_exact(tmp_path, monkeypatch, kind, is_cut):
    library = LIBRARY[kind]()
    library.save(str(tmp_path / 'tokenizer.json'))
    ours = load_tokenizer(str(tmp_path))
    text = '\n'.join(documents(60))
    monkeypatch.setattr(tokenizer_module, 'PIECE_CHARACTERS', 1000)
    assert ours.encode_document(text).tolist() == ids_of(library, text)
    assert (len(list(ours.pieces(text))) > 5) == is_cut
    if not is_cut:
        monkeypatch.setattr(tokenizer_module, 'LONGEST_WHOLE', 1000)
        with pytest.raises(BadInput, match='must encode it as a whole'):
            ours.encode_document(text)


def test_a_text_is_written_as_it_comes(tmp_path):
    """Long texts, characters of several bytes, and bytes that are no character."""
    library = sentencepiece_bpe()
    library.save(str(tmp_path / 'tokenizer.json'))
    ours = load_tokenizer(str(tmp_path))
    byte = {b: library.token_to_id(f'<0x{b:02X}>') for b in range(256)}
    ids = ours.encode('the number \U0001f600 is') + [byte[0xff]] + ours.encode('x ' * 900)
    shown = list(ours.stream(ids))
    assert ''.join(shown) == ours.decode(ids) and len(shown) > 500
    assert '\U0001f600' in ''.join(shown) and max(map(len, shown)) < 30
    # All bytes in a row are one character or none, so they wait for what follows.
    for tail in ([], [byte[0xff]], [byte[0x41]]):
        ids = [byte[b] for b in '\u20ac'.encode()] + tail
        assert ''.join(ours.stream(ids)) == ours.decode(ids)


def test_bytes_that_tokens_stand_for(tmp_path):
    text = 'the number 7, two \u00e9\n\n words \U0001f600'
    for kind in ('byte level', 'sentencepiece', 'NFKC'):
        library = {**PLAIN, **LIBRARY}[kind]()
        library.save(str(tmp_path / 'tokenizer.json'))
        ours = load_tokenizer(str(tmp_path))
        sizes = ours.token_bytes()
        n_bytes = sum(sizes[i] for i in ours.encode(text))
        # The space that is put before the text is counted.
        assert n_bytes == len(text.encode()) + (kind == 'sentencepiece')
        assert sizes[ours.bos_id] == 0


# -- what the folder says --------------------------------------------------------------------------

SAID = {
    'nothing': ({}, {}),
    'eos': (dict(bos_token='<s>', eos_token='</s>'), {}),
    'several ends': (dict(bos_token=None, eos_token='<|im_end|>'), dict(eos_token_id=[3, 1, 3])),
    'adds': (dict(bos_token='<s>', eos_token='</s>', add_bos_token=True, add_eos_token=True), {}),
    'a word as padding': (dict(eos_token='</s>', pad_token='the'), dict(eos_token_id=1)),
}
TEXTS = ['Hello', '', '<s> hi </s>x', ' a\u0301 <|im_end|>\n<s>', 'x<T> y', '<s>']
TEMPLATES = {
    None: None, 'before': '<s> $A', 'both': '<s> $A </s>', 'after': '$A </s>'}


@pytest.mark.parametrize('said', SAID)
@pytest.mark.parametrize('template', [*TEMPLATES, 'roberta', 'bert', 'sequence', 'bytes'])
def test_prompts_are_those_of_transformers_and_lm_eval(tmp_path, monkeypatch, said, template):
    transformers = pytest.importorskip('transformers')
    huggingface = pytest.importorskip('lm_eval.models.huggingface')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    library = byte_level_bpe(specials=['<s>', '</s>', END, '<|im_end|>'])
    library.add_tokens([AddedToken('<T>', normalized=False)])
    pairs = [('<s>', 0), ('</s>', 1)]
    bos_and_eos = (('</s>', 1), ('<s>', 0))
    form = TEMPLATES.get(template)
    library.post_processor = {
        'roberta': processors.RobertaProcessing(*bos_and_eos, add_prefix_space=False),
        'bert': processors.BertProcessing(*bos_and_eos),
        'bytes': processors.ByteLevel(),
        'sequence': processors.Sequence([
            processors.ByteLevel(), processors.TemplateProcessing('<s> $A', None, pairs)]),
    }.get(template) or (form and processors.TemplateProcessing(form, None, pairs))
    library.save(str(tmp_path / 'tokenizer.json'))
    config, generation = SAID[said]
    config = dict(tokenizer_class='PreTrainedTokenizerFast', **config)
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
    (tmp_path / 'generation_config.json').write_text(json.dumps(generation))
    ours = load_tokenizer(str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.tokens == theirs.special_tokens_map
    # lm-eval's own model of transformers, without a model.
    peer = types.SimpleNamespace(tokenizer=theirs, add_bos_token=None)
    peer.prefix_token_id = theirs.bos_token_id
    if peer.prefix_token_id is None:
        peer.prefix_token_id = theirs.eos_token_id
    if peer.prefix_token_id is not None:
        assert ours.prefix_id == peer.prefix_token_id
    peer.prefix_token_id = ours.prefix_id
    from tools.benchmarks import Scorer
    scorer = types.SimpleNamespace(tokens=ours, prefix_token_id=ours.prefix_id)
    for text in TEXTS:
        prompt = [*ours.start_ids, *ours.encode_marked(text), *ours.end_ids]
        assert prompt == theirs(text).input_ids, text
        for special in (None, True, False):
            expected = huggingface.HFLM.tok_encode(peer, text, add_special_tokens=special)
            assert Scorer.tok_encode(scorer, text, add_special_tokens=special) == expected, text
    ends = generation.get('eos_token_id', [])
    ends = ends if isinstance(ends, list) else [ends]
    if theirs.eos_token_id is not None:
        ends = [theirs.eos_token_id, *ends]
    assert ours.stop_ids == (list(dict.fromkeys(ends)) or [2, 1, 3])


DECLARED = dict(lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)


@pytest.mark.parametrize('files, note', [
    (dict(tokenizer_config=dict(
        added_tokens_decoder={'NEXT': {**DECLARED, 'content': '<X>'}})), ''),
    (dict(tokenizer_config={}, added_tokens={'<X>': 'NEXT'}), ''),
    (dict(tokenizer_config=dict(
        added_tokens_decoder={'0': {**DECLARED, 'content': END, 'rstrip': True}})), ''),
    (dict(tokenizer_config=dict(
        added_tokens_decoder={'900': {**DECLARED, 'content': '<X>'}})), 'its folder says 900'),
    (dict(tokenizer_config=dict(pad_token='<nowhere>')), 'left out')])
def test_tokens_that_only_the_folder_names(tmp_path, files, note):
    transformers = pytest.importorskip('transformers')
    library = byte_level_bpe()
    library.save(str(tmp_path / 'tokenizer.json'))
    files['tokenizer_config']['tokenizer_class'] = 'PreTrainedTokenizerFast'
    n = library.get_vocab_size()
    for name, content in files.items():
        text = json.dumps(content).replace(': "NEXT"', f': {n}').replace('NEXT', str(n))
        (tmp_path / f'{name}.json').write_text(text)
    ours = load_tokenizer(str(tmp_path))
    assert note in ours.note and bool(note) == bool(ours.note)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = f'a <X> b<X>{END}  c'
    ids = theirs(text).input_ids
    assert ours.encode_marked(text) == ids and ours.decode(ids) == theirs.decode(ids)
    (tmp_path / 'copy').mkdir()
    save_tokenizer(str(tmp_path / 'copy'), ours)
    again = load_tokenizer(str(tmp_path / 'copy'))
    assert again.encode_marked(text) == ids and again.fingerprint == ours.fingerprint


@pytest.mark.parametrize('specials, config, bos', [
    ([END, '<bos>'], {}, END), (['<pad>', '<eos>', '<bos>'], {}, '<bos>'),
    (['<A>', '<B>'], dict(bos_token='<B>'), '<B>'), (['<A>', '<B>'], dict(eos_token='<B>'), '<B>'),
    (['<\uff5cbegin\u2581of\u2581sentence\uff5c>', '<x>'], {},
     '<\uff5cbegin\u2581of\u2581sentence\uff5c>'),
    (['<META>', '<EOT>'], {}, '<EOT>'), (['[UNK]'], {}, '[UNK]')])
def test_the_token_that_begins_documents(tmp_path, specials, config, bos):
    byte_level_bpe(specials=specials).save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
    ours = load_tokenizer(str(tmp_path))
    assert ours.names[ours.bos_id] == bos


# -- other files -----------------------------------------------------------------------------------


@pytest.mark.parametrize('name, n', [
    ('gpt2', 50256), ('r50k_base', 50256), ('p50k_base', 50280), ('cl100k_base', 100256),
    ('o200k_base', 199998)])
def test_bare_rank_files_are_read_as_tiktoken_defines_them(monkeypatch, name, n):
    monkeypatch.setattr(openai_public, 'load_tiktoken_bpe', lambda *a, **k: {})
    monkeypatch.setattr(openai_public, 'data_gym_to_mergeable_bpe_ranks', lambda *a, **k: {})
    known = getattr(openai_public, name)()
    pattern, special_tokens, nfc = known_ranks(n)
    assert special_tokens == known['special_tokens'] and not nfc
    # Merges of blanks, digits and letters show where a pattern splits.
    ranks = {bytes([b]): b for b in range(256)}
    for a, b in itertools.product(' \n\r1a/.\'s', repeat=2):
        ranks[(a + b).encode()] = len(ranks)
    for token in (b'123', b'  \n', b'   ', b"'s", b'\n\n\n', b'1234', b'aaaa'):
        ranks.setdefault(token, len(ranks))
    ours = make_tokenizer('x', ranks, pattern, {END: 10**5}, END)
    theirs = tiktoken.Encoding(
        'x', pat_str=known['pat_str'], mergeable_ranks=ranks, special_tokens={})
    rng = random.Random(3)
    for _ in range(400):
        text = ''.join(rng.choice(" \n\r1a/.'sS\t2b\u00e9") for _ in range(40))
        assert ours.encode(text) == theirs.encode_ordinary(text), text


def test_known_rank_files_and_others(tmp_path):
    sizes = {n: len(known_ranks(n)[1]) for n in (50256, 128000, 151643, 200000)}
    assert sizes == {50256: 1, 128000: 256, 151643: 208, 200000: 2048}
    assert known_ranks(128000)[1]['<|eot_id|>'] == 128009
    # By the code of Llama 4 and of Qwen.
    llama4 = known_ranks(200000)[1]
    assert llama4['<|header_start|>'] == 200005 and llama4['<|eot|>'] == 200008
    assert llama4['<|python_start|>'] == 200016 and llama4['<|finetune_right_pad|>'] == 200018
    assert llama4['<|image_start|>'] == 200080 and llama4['<|patch|>'] == 200092
    assert llama4['<|reasoning_thinking_end|>'] == 201143
    assert llama4['<|reserved_special_token_0|>'] == 201144
    assert known_ranks(151643)[1]['<|im_end|>'] == 151645 and known_ranks(151643)[2]
    path = tmp_path / 'x.tiktoken'
    path.write_bytes(b'IQ== 0\nIg== 1\n')
    with pytest.raises(BadInput, match='2 tokens, .* no tokenizer that is known .*x.tiktoken.json'):
        load_tokenizer(str(path))
    path.write_bytes(b'\x0a\x0e\x0a\x05<unk>\x15\x00\n')
    with pytest.raises(BadInput, match='not a tiktoken rank file .*SentencePiece'):
        load_tokenizer(str(path))


def test_the_older_form_of_gpt2(tmp_path, shared_data):
    folder = shared_data / 'tokenizers/gpt2'
    for old, new in (('encoder.json', 'vocab.json'), ('vocab.bpe', 'merges.txt')):
        (tmp_path / new).write_bytes((folder / old).read_bytes())
    for path in (folder / 'vocab.bpe', tmp_path):
        ours = load_tokenizer(str(path))
        assert ours.fingerprint == '743fa6753f320cc3'
        ids = truth(folder / 'tokenizer.json').encode(f"it's{END} 12").ids
        assert ours.encode_marked(f"it's{END} 12") == ids
    (tmp_path / 'merges.txt').write_text('#version: 0.2\na b c\n')
    with pytest.raises(BadInput, match='damaged'):
        load_tokenizer(str(tmp_path))
    (tmp_path / 'vocab.json').write_text('{"a": 0, "b": 1, "ab": 2}')
    with pytest.raises(BadInput, match="is not GPT-2's vocabulary"):
        load_tokenizer(str(tmp_path))
    (tmp_path / 'merges.txt').unlink()
    with pytest.raises(BadInput, match='merges.txt, which is missing'):
        load_tokenizer(str(tmp_path / 'vocab.json'))


BPE = '"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}'


@pytest.mark.parametrize('content, message', [
    ('{}', 'Model missing'),
    ('[]', 'no JSON object'),
    ('{"model"', 'no valid JSON'),
    ('{"model": []}', 'is no tokenizer that'),
    ('{"model": {"type": "Unigram", "vocab": []}}', 'makes no tokens'),
    ('{"model": {"type": "BPE", "merges": ["a b"]}}', 'Missing vocab'),
    ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}', '`b` out of vocabulary'),
    ('{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', 'integer `-1`'),
    (f'{{{BPE}}}', 'has no special tokens to begin documents'),
    (f'{{{BPE}, "version": "9"}}', "Unknown tokenizer version '9'"),
    (f'{{{BPE}, "normalizer": {{"type": "New"}}}}', 'is no tokenizer that'),
    (f'{{{BPE}, "normalizer": {{"type": "Precompiled", "precompiled_charsmap": "AAAA"}}}}',
     'Precompiled'),
    (f'{{{BPE}, "pre_tokenizer": {{"type": "Split", "pattern": {{"Regex": "("}}, "behavior": '
     '"Isolated", "invert": false}}', 'parenthesis'),
    ('{"config": {}, "vocab": [], "special_tokens": []}', 'is no tokenizer that'),
])
def test_a_damaged_tokenizer_json_is_one_sentence(tmp_path, content, message):
    (tmp_path / 'tokenizer.json').write_text(content)
    with pytest.raises(BadInput, match=message) as caught:
        load_tokenizer(str(tmp_path))
    assert '\n' not in str(caught.value) and 'tokenizer.json' in str(caught.value)


def test_a_text_that_has_no_tokens_is_refused(tmp_path):
    library = tokenizers.Tokenizer(models.WordLevel({'a': 0, '<s>': 1}, unk_token='[UNK]'))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(['<s>'])
    library.save(str(tmp_path / 'tokenizer.json'))
    ours = load_tokenizer(str(tmp_path))
    assert ours.encode('a a') == [0, 0]
    for text in ('b', 'a\ud800'):
        with pytest.raises(BadInput, match='cannot encode a text'):
            ours.encode_document(text)
