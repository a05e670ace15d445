"""Every dataset script on records with the columns, types and oddities of its dataset."""
import ast
import collections
import gzip
import json
import runpy

from tests.conftest import need

need('pyarrow')

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from configurator import BadInput
from lib.byte_level import GPT2_PATTERN
from lib.chat import marked
from lib.shards import open_shard
from lib.tokenizer import load_tokenizer, make_tokenizer, save_tokenizer
from tests.conftest import ROOT, run_here

HEADER = '<|start_header_id|>{}<|end_header_id|>\n\n'
SPECIAL = ['<|endoftext|>', '<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>']
SPECIAL += ['<|eot_id|>', '<|im_start|>', '<|im_end|>']
SCRIPTS = []
OF_ANY_DATA = ('text', 'hub', 'common')     # they belong to no dataset
for script in sorted((ROOT / 'prepare').glob('*.py')):
    if 'owners=(PrepareConfig,)' in script.read_text() and script.stem not in OF_ANY_DATA:
        SCRIPTS.append(script.stem)

# A block for every file: the script, the path in the layout of its dataset, the records as JSON,
# and after '=' the expected documents: texts, or pairs of a question and an answer.
CASES = r"""
finemath finemath-3plus/train-00000-of-00128.parquet
{"url": "u", "fetch_time": 1, "content_mime_type": "text/html", "warc_filename": "w",
 "warc_record_offset": 1, "warc_record_length": 2, "text": "Let $x=1$.", "token_count": 4,
 "char_count": 10, "metadata": "{\"found_math\": true}", "score": 3.2, "int_score": 3,
 "crawl": "CC-MAIN-2023-50", "snapshot_type": "latest", "language": "en", "language_score": 0.9}
= "Let $x=1$."

fineweb_edu data/CC-MAIN-2024-10/train-00000-of-00020.parquet
{"text": "Plants make sugar.", "id": "<urn:uuid:1>", "dump": "CC-MAIN-2024-10", "url": "u",
 "file_path": "s3://x", "language": "en", "language_score": 0.97, "token_count": 4, "score": 3.1,
 "int_score": 3}
= "Plants make sugar."

starcoder python/train-00000-of-00059.parquet
{"max_stars_repo_path": "a.py", "max_stars_repo_name": "o/r", "max_stars_count": 3, "id": "7",
 "content": "<reponame>o/r<filename>a.py<gh_stars>10-100\nimport os\n"}
{"max_stars_repo_path": "a.py", "max_stars_repo_name": "o/r", "max_stars_count": 3, "id": "7",
 "content": "x = \"<filename>\"\n"}
= "import os\n" "x = \"<filename>\"\n"

starcoder git-commits-cleaned/train-00000-of-00055.parquet
{"content": "<commit_before>a<commit_msg>b<commit_after>c", "sha": "1"}
= "<commit_before>a<commit_msg>b<commit_after>c"

openwebmath data/train-00000-of-00114-5a023365406cf0ec.parquet
{"url": "u", "text": "$$a^2$$", "date": "2020-01-01",
 "metadata": "{\"extraction_info\": {\"found_math\": true}}"}
= "$$a^2$$"

wikipedia data/wiki/wiki-0000.json.gz
{"id": "1", "source": "wiki", "added": "2024-11-01", "created": "2020-01-01", "version": "v0",
 "metadata": {"length": 3}, "attributes": {}, "text": "Anarchism is a philosophy."}
= "Anarchism is a philosophy."

arxiv arxiv/train/arXiv_000.jsonl.zst
{"text": "\\section{Introduction} We show", "meta": {"timestamp": "2023-03-29", "yymm": "2106",
 "arxiv_id": "2106.00001", "language": "en", "url": "https://arxiv.org/abs/2106.00001"}}
= "\\section{Introduction} We show"

stackexchange stackexchange.jsonl
{"text": "Q: Why?\n\nA: Because.", "meta": {"language": "en", "timestamp": "2023-03",
 "url": "https://stackoverflow.com/q/1", "source": "stackexchange", "question_score": "3"}}
= "Q: Why?\n\nA: Because."

algebraic_stack algebraic-stack/train/agda0000.jsonl.zst
{"text": "module A where\n", "meta": {"size": 15, "ext": "agda", "lang": "Agda"}}
= "module A where\n"

algebraic_stack algebraic-stack/train/github-coq-train-0001.jsonl.zst
=

algebraic_stack algebraic-stack/train/lean_proofsteps.jsonl.zst
{"text": "theorem t : true"}
= "theorem t : true"

nemotron_science SFT/science/science.jsonl
{"version": "v1", "input": [{"role": "user", "content": "What is heat?"}], "license": "cc-by-4.0",
 "output": "<think>\nhm\n</think>\nEnergy.", "category": "science", "reasoning": "on",
 "generator": "DeepSeek-R1", "used_in_training": "yes", "system_prompt": "detailed thinking on"}
{"output": "So.<|eot_id|>", "input": "START"}
= "What is heat?\n\n<think>\nhm\n</think>\nEnergy." "Why?\n\nSo."

nemotron_code SFT/code/code_v1.jsonl
{"input": [{"role": "user", "content": "Sort."}], "output": "sorted(x)", "category": "code",
 "reasoning": "off", "system_prompt": "detailed thinking off"}
= "Sort.\n\nsorted(x)"

nemotron_code SFT/code/code_v1.1.jsonl
{"input": [{"role": "user", "content": "Sort.1."}], "output": "sorted(x)", "category": "code"}
= "Sort.1.\n\nsorted(x)"

nemotron_math SFT/math/math_v1.1.jsonl
{"input": [{"role": "user", "content": "2+2?"}], "output": "4", "category": "math"}
= "2+2?\n\n4"

cosmopedia data/stories/train-00000-of-00043.parquet
{"text": "Once upon a time", "prompt": "Write a story", "text_token_length": 4,
 "seed_data": "ultrachat", "format": "story", "audience": "general"}
= "Once upon a time"

natural_reasoning full.jsonl
{"question": "Why blue?", "reference_answer": "",
 "responses": [{"response_model": "Llama3.3-70B-Instruct", "response": "Scattering."}]}
{"question": "And?", "reference_answer": "42", "responses": []}
{"question": "No answer", "reference_answer": "", "responses": []}
= "Why blue?\n\nScattering." "And?\n\n42"

pes2o data/v2/train-00000-of-00020.json.gz
{"added": "2023-01-03", "created": "2015-01-01", "id": "123", "source": "s2orc/train",
 "text": "Title\n\nAbstract.", "version": "v2"}
= "Title\n\nAbstract."

dclm filtered/OH_eli5_vs_rw_v2/processed_data/global-shard_01_of_10/shard_00000000.parquet
{"bff_contained_ngram_count_before_dedupe": 1, "language_id_whole_page_fasttext": {"en": 0.9},
 "previous_word_count": 3, "text": "A web page.", "url": "u", "warcinfo": "w"}
= "A web page."

climbmix shard_00000.parquet
{"text": "Weather and climate."}
= "Weather and climate."

github_code above-2-stars/train_000.parquet
{"repo_id": "o/r", "size": 9, "file_path": "a.c", "content": "int x;\n"}
= "int x;\n"

slimpajama train/chunk1/example_train_0.jsonl.zst
{"text": "A page.", "meta": {"redpajama_set_name": "RedPajamaC4"}}
{"text": "A novel.", "meta": {"redpajama_set_name": "RedPajamaBook"}}
= "A page."

dolmino data/math/gsm8k/main/train/0.jsonl.zst
{"text": "1+1=2", "id": "a"}
= "1+1=2"

dolmino data/math/gsm8k/main/test/0.jsonl.zst
{"text": "a test item", "id": "a"}
=

dolmino data/math/tinyGSM-MIND/problem-solving/tiny_gsm_inline_part1.jsonl.gz
{"text": "def f(): return 2", "id": "b", "extra": [1]}
= "def f(): return 2"

dolmino data/math/tulu_math/personahub_math_v5/train_0000.jsonl
{"text": "A problem.", "source": "x"}
= "A problem."

dolmino data/flan/tulu_flan-0000.json.gz
{"id": "1", "text": "of another subset"}
=

nemotron_pretraining_code Synthetic-Code/part_000000.parquet
{"id": "1", "text": "print(1)", "metadata": {"category": "c"}}
= "print(1)"

nemotron_cc_math 3/part_000000.parquet
{"id": "1", "text": "sum", "metadata": {"category": "math", "models_used": ["phi-4"],
 "warc_filename": "w", "warc_id": "1", "nemocurator_scores": 3.1, "finemath_scores": 3.3}}
= "sum"

nemotron_cc_math 4plus/part_000000.parquet
{"id": "1", "text": "sum of 4plus", "metadata": {"category": "math"}}
= "sum of 4plus"

nemotron_cc_math 4plus_MIND/part_000000.parquet
{"id": "1", "text": "sum of 4plus_MIND", "metadata": {"category": "math"}}
=

benchmark_train unfiltered.nocontext/train-00000-of-00001.parquet
{"question": "Who?", "question_id": "tc_1", "question_source": "x",
 "entity_pages": {"title": ["t"]}, "answer": {"aliases": ["Bob", "B"], "value": "Bob",
 "normalized_value": "bob", "type": "WikipediaEntity"}}
= "Question: Who?\nAnswer: Bob"

benchmark_train main/train-00000-of-00001.parquet
{"id": "7-9", "question_stem": "The sun is", "answerKey": "A",
 "choices": {"text": ["a star", "a cat"], "label": ["A", "B"]}}
= "Question: The sun is\nAnswer: a star"

benchmark_train nq_open/train-00000-of-00001.parquet
{"question": "where is it", "answer": ["Rome", "Roma"]}
= "Question: where is it\nAnswer: Rome"

benchmark_train data/piqa/train.parquet
{"goal": "Open a jar", "sol1": "twist", "sol2": "eat", "label": 0}
= "Question: Open a jar\nAnswer: twist"

benchmark_train main/train-00001-of-00001.parquet
{"question": "48/2?", "answer": "<<48/2=24>>24\n#### 24"}
= "Question: 48/2?\nAnswer: <<48/2=24>>24\n#### 24"

benchmark_train data/train-00000-of-00001.parquet
{"question": "is it so", "answer": true, "passage": "It is."}
= "It is.\nQuestion: is it so?\nAnswer: yes"

benchmark_train ARC-Easy/train-00000-of-00001.parquet
{"id": "M1", "question": "Which?", "choices": {"text": ["x", "y"], "label": ["1", "2"]},
 "answerKey": "2"}
= "Question: Which?\nAnswer: y"

tulu3 data/train-00000-of-00006.parquet
{"id": "a", "source": "s", "messages": [{"content": "Hi", "role": "user"},
 {"content": "Hello!", "role": "assistant"}]}
= ["Hi", "Hello!"]

openmathreasoning data/cot-00000-of-00144.parquet
{"expected_answer": "4", "problem_type": "has_answer_extracted", "problem_source": "aops",
 "generation_model": "DeepSeek-R1", "pass_rate_72b_tir": "0.9", "problem": "2+2?",
 "generated_solution": "THINK", "inference_mode": "cot", "used_in_kaggle": true}
= ["2+2?", "THINK"]

opensciencereasoning train/OpenScienceReasoning-2.parquet
{"input": "Pick (A) or (B).", "output": "THINK", "expected_answer": "B"}
= ["Pick (A) or (B).", "THINK"]

opencodereasoning train/python/train-00000-of-00070.parquet
{"dataset": "taco", "split": "train", "index": "1", "r1_generation": "THINK", "id": "1",
 "question_id": "q", "question": "-", "qwq_critique": "", "solution": "x", "judgement": "right",
 "pass_rate": "1.0", "source": "codeforces", "license": "cc", "difficulty": "EASY"}
{"dataset": "apps", "split": "test", "index": "0", "r1_generation": "THINK"}
{"dataset": "code_contests", "split": "valid", "index": "0", "r1_generation": "THINK"}
{"dataset": "open-r1/codeforces", "split": "train", "index": "0", "r1_generation": "THINK"}
{"dataset": "open-r1/codeforces", "split": "train", "index": "1", "r1_generation": "THINK"}
= ["Taco 1", "THINK"] ["Apps test 0", "THINK"] ["Contest", "THINK"] ["PROBLEM", "THINK"]
"""
# The datasets that hold the problems of opencodereasoning. The last problem is empty.
PROBLEMS = r"""
questions BAAI/TACO/ALL/train-00000-of-00009.parquet
{"question": "Taco 0", "input_output": ""}

questions BAAI/TACO/ALL/train-00001-of-00009.parquet
{"question": "Taco 1", "input_output": ""}

questions BAAI/TACO/ALL/test-00000-of-00001.parquet
{"question": "Taco test"}

questions codeparrot/apps/train.jsonl
{"id": 0, "question": "Apps 0"}

questions codeparrot/apps/test.jsonl
{"id": 0, "question": "Apps test 0"}

questions deepmind/code_contests/data/SPLIT-00000-of-00001.parquet
{"name": "a", "description": "Contest"}

questions open-r1/codeforces/data/SPLIT-00000-of-00001.parquet
{"input_format": "n", "output_format": "m", "note": "Easy.", "description": "Sum.",
 "examples": [{"input": "1", "output": "2"}, {"input": "3", "output": "4"}]}
{"input_format": "n", "output_format": "m", "note": "Easy.", "description": null, "examples": []}
"""
MARKS = {       # what stands for longer text in the records
    'THINK': '<think>\nLet me see.\n</think>\n\nThe answer is \\boxed{4}.',
    'START': (
        f"<|begin_of_text|>{HEADER.format('system')}detailed thinking off<|eot_id|>"
        f"{HEADER.format('user')}Why?<|eot_id|>{HEADER.format('assistant')}"),
    'PROBLEM': ('Sum.\n\nInput\n\nn\n\nOutput\n\nm\n\nExamples\n\nInput\n\n1\n\nOutput\n\n2\n\n'
                'Input\n\n3\n\nOutput\n\n4\n\nNote\n\nEasy.')}


def json_values(text):
    """Returns the JSON values that follow one another in a text."""
    for mark, meaning in MARKS.items():
        text = text.replace(mark, json.dumps(meaning)[1:-1])
    values = []
    while text := text.strip():
        value, end = json.JSONDecoder().raw_decode(text)
        values.append(value)
        text = text[end:]
    return values


def parse(text):
    """Returns dict script -> [(path, records, expected documents)]."""
    cases = collections.defaultdict(list)
    for block in text.strip().split('\n\n'):
        head, _, body = block.partition('\n')
        records, _, documents = f'\n{body}'.partition('\n=')
        script, path = head.split()
        cases[script].append((path, json_values(records), json_values(documents)))
    return cases


CASES = parse(CASES)


def write_records(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ''.join(json.dumps(record) + '\n' for record in records).encode()
    if path.suffix == '.parquet':
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == '.gz':
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == '.zst':
        path.write_bytes(pyarrow.compress(lines, codec='zstd', asbytes=True))
    else:
        path.write_bytes(lines)


@pytest.fixture(scope='module')
def chat_tokenizer(tmp_path_factory):
    """A tokenizer with a token for every byte and the special tokens of both templates."""
    folder = str(tmp_path_factory.mktemp('tok'))
    ranks = {bytes([b]): b for b in range(256)}
    special = {name: 256 + i for i, name in enumerate(SPECIAL)}
    tokenizer = make_tokenizer('x', ranks, GPT2_PATTERN, special, '<|begin_of_text|>')
    save_tokenizer(folder, tokenizer)
    return folder


def run_script(name, input, tokenizer, out, *arguments):
    run_here([f'prepare/{name}.py', f'--input={input}', f'--tokenizer={tokenizer}', f'--out={out}',
              '--workers=0', *arguments])


def documents_of(folder, tokenizer):
    """[(ids, mask)] of every document of a source, all splits. The mask of text is 0."""
    found = []
    for shard in json.loads((folder / 'meta.json').read_text())['shards']:
        ids = np.array(open_shard(str(folder / shard['file'])))
        mask = np.zeros(len(ids), np.uint8)
        mask_file = (folder / shard['file']).with_suffix('.mask')
        if mask_file.exists():
            mask = np.fromfile(mask_file, np.uint8)
        assert len(mask) == len(ids)
        starts = np.flatnonzero(ids == tokenizer.bos_id)[1:]
        found += zip(np.split(ids, starts), np.split(mask, starts), strict=True)
    return found


def test_every_script_has_a_case():
    assert set(CASES) == set(SCRIPTS)


@pytest.mark.parametrize('name', SCRIPTS)
def test_records_of_the_true_schema_become_the_right_documents(
        tmp_path, chat_tokenizer, name, capsys):
    arguments = []
    source = name
    if name == 'dolmino':
        arguments = ['--subset=math']
        source = 'dolmino_math'
    if name == 'opencodereasoning':
        arguments = [f'--questions={tmp_path / "questions"}']
        for path, records, _ in parse(PROBLEMS)['questions']:
            for split in ('train', 'valid', 'test'):
                write_records(tmp_path / 'questions' / path.replace('SPLIT', split), records)
    expected = []
    for path, records, documents in CASES[name]:
        write_records(tmp_path / 'in' / path, records)
        expected += documents
    run_script(name, tmp_path / 'in', chat_tokenizer, tmp_path / 'out', *arguments)
    tokenizer = load_tokenizer(chat_tokenizer)
    found = documents_of(tmp_path / 'out' / source, tokenizer)
    if isinstance(expected[0], str):
        texts = [tokenizer.decode(ids[1:].tolist()) for ids, _ in found]
        assert sorted(texts) == sorted(expected)
        return
    texts = []
    for question, answer in expected:
        user = f"{HEADER.format('user')}{question}<|eot_id|>"
        assistant = f"{HEADER.format('assistant')}[[{answer}<|eot_id|>]]"
        texts.append(f'<|begin_of_text|>{user}{assistant}')
    assert sorted(marked(tokenizer, ids, mask) for ids, mask in found) == sorted(texts)
    assert 'between [[ and ]]' in capsys.readouterr().out


@pytest.mark.parametrize('messages', [
    [{'content': 'Hi'}], [{'role': 'user', 'content': None}], ['Hi'],
    [{'role': 'user', 'content': 'Hi'}], 'Hi'])
def test_a_conversation_that_is_none_is_named_with_its_line(tmp_path, chat_tokenizer, messages):
    write_records(tmp_path / 'a.jsonl', [dict(messages=messages)])
    with pytest.raises(BadInput, match='a.jsonl:1: '):
        run_script('tulu3', tmp_path / 'a.jsonl', chat_tokenizer, tmp_path / 'out')


@pytest.mark.parametrize('name', SCRIPTS)
def test_scripts_say_where_their_data_comes_from(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'prepare'))      # for `import _path`, as Python does
    path = ROOT / 'prepare' / f'{name}.py'
    script = runpy.run_path(str(path), run_name='x')
    dataset = script['DATASET'] if 'DATASET' in script else script['dataset_of']('math')
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert f'python prepare/{name}.py' in doc and 'https://' in doc and 'tokens' in doc
    assert dataset.licence
    for url in dataset.files:
        assert url.startswith(('hf://datasets/', 'https://')), url
        if '@' in url:
            assert len(url.split('@')[1].split('/')[0]) == 40, url      # a pin is a full commit
