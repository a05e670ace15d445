"""Every dataset script on records of its dataset's own schema (columns, types and oddities of the public cards)."""
import ast
import gzip
import json
import runpy
import sys

import numpy as np
import pytest

from configurator import BadInput
from data import open_shard
from lib.chat import marked
from lib.tokenizer import GPT2_PATTERN, load_tokenizer, make_tokenizer, save_tokenizer
from tests.conftest import ROOT

SPECIAL = ['<|endoftext|>', '<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>', '<|im_start|>', '<|im_end|>']
SCRIPTS = sorted(p.stem for p in (ROOT / 'prepare').glob('*.py') if 'from prepare.common import Dataset, prepare' in p.read_text() and p.stem != 'text')
WARC = dict(fetch_time=1, content_mime_type='text/html', warc_filename='w', warc_record_offset=1, warc_record_length=2)
CODE = dict(max_stars_repo_path='a.py', max_stars_repo_name='o/r', max_stars_count=3, id='7')
OLMO = dict(id='1', source='wiki', added='2024-11-01', created='2020-01-01', version='v0', metadata={'length': 3}, attributes={})
THINK = '<think>\nLet me see.\n</think>\n\nThe answer is \\boxed{4}.'

# script -> [(file in the dataset's layout, records, documents expected: text, or (user, assistant))]
CASES = {
    'finemath': [('finemath-3plus/train-00000-of-00128.parquet', [dict(
        url='u', **WARC, text='Let $x=1$.', token_count=4, char_count=10, metadata='{"found_math": true}', score=3.2, int_score=3,
        crawl='CC-MAIN-2023-50', snapshot_type='latest', language='en', language_score=.9)], ['Let $x=1$.'])],
    'fineweb_edu': [('data/CC-MAIN-2024-10/train-00000-of-00020.parquet', [dict(
        text='Plants make sugar.', id='<urn:uuid:1>', dump='CC-MAIN-2024-10', url='u', file_path='s3://x', language='en',
        language_score=.97, token_count=4, score=3.1, int_score=3)], ['Plants make sugar.'])],
    'starcoder': [('python/train-00000-of-00059.parquet', [
        dict(CODE, content='<reponame>o/r<filename>a.py<gh_stars>10-100\nimport os\n'), dict(CODE, content='x = "<filename>"\n')],
        ['import os\n', 'x = "<filename>"\n']),
        ('git-commits-cleaned/train-00000-of-00055.parquet', [dict(content='<commit_before>a<commit_msg>b<commit_after>c', sha='1')],
         ['<commit_before>a<commit_msg>b<commit_after>c'])],
    'openwebmath': [('data/train-00000-of-00114-5a023365406cf0ec.parquet', [dict(
        url='u', text='$$a^2$$', date='2020-01-01', metadata='{"extraction_info": {"found_math": true}}')], ['$$a^2$$'])],
    'wikipedia': [('data/wiki/wiki-0000.json.gz', [dict(OLMO, text='Anarchism is a philosophy.')], ['Anarchism is a philosophy.'])],
    'arxiv': [('arxiv/train/arXiv_000.jsonl.zst', [dict(text='\\section{Introduction} We show', meta=dict(
        timestamp='2023-03-29', yymm='2106', arxiv_id='2106.00001', language='en', url='https://arxiv.org/abs/2106.00001'))],
        ['\\section{Introduction} We show'])],
    'stackexchange': [('stackexchange.jsonl', [dict(text='Q: Why?\n\nA: Because.', meta=dict(
        language='en', url='https://stackoverflow.com/q/1', timestamp='2023-03', source='stackexchange', question_score='3'))],
        ['Q: Why?\n\nA: Because.'])],
    'algebraic_stack': [
        ('algebraic-stack/train/agda0000.jsonl.zst', [dict(text='module A where\n', meta=dict(size=15, ext='agda', lang='Agda'))], ['module A where\n']),
        ('algebraic-stack/train/github-coq-train-0001.jsonl.zst', [], []),                # empty frames are among its files
        ('algebraic-stack/train/lean_proofsteps.jsonl.zst', [dict(text='theorem t : true')], ['theorem t : true'])],
    'nemotron_science': [('SFT/science/science.jsonl', [
        dict(version='v1', input=[dict(role='user', content='What is heat?')], output='<think>\nhm\n</think>\nEnergy.', category='science',
             license='cc-by-4.0', reasoning='on', generator='DeepSeek-R1', used_in_training='yes', system_prompt='detailed thinking on'),
        dict(input='<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ndetailed thinking off<|eot_id|><|start_header_id|>user'
                   '<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n', output='So.<|eot_id|>')],
        ['What is heat?\n\n<think>\nhm\n</think>\nEnergy.', 'Why?\n\nSo.'])],
    'nemotron_code': [(f'SFT/code/code_v1{v}.jsonl', [dict(input=[dict(role='user', content=f'Sort{v}.')], output='sorted(x)', category='code',
        reasoning='off', system_prompt='detailed thinking off')], [f'Sort{v}.\n\nsorted(x)']) for v in ('', '.1')],
    'nemotron_math': [('SFT/math/math_v1.1.jsonl', [dict(input=[dict(role='user', content='2+2?')], output='4', category='math')], ['2+2?\n\n4'])],
    'cosmopedia': [('data/stories/train-00000-of-00043.parquet', [dict(
        text='Once upon a time', prompt='Write a story', text_token_length=4, seed_data='ultrachat', format='story', audience='general')],
        ['Once upon a time'])],
    'natural_reasoning': [('full.jsonl', [
        dict(question='Why blue?', reference_answer='', responses=[dict(response_model='Llama3.3-70B-Instruct', response='Scattering.')]),
        dict(question='And?', reference_answer='42', responses=[]), dict(question='No answer', reference_answer='', responses=[])],
        ['Why blue?\n\nScattering.', 'And?\n\n42'])],
    'pes2o': [('data/v2/train-00000-of-00020.json.gz', [dict(
        added='2023-01-03', created='2015-01-01', id='123', source='s2orc/train', text='Title\n\nAbstract.', version='v2')], ['Title\n\nAbstract.'])],
    'dclm': [('filtered/OH_eli5_vs_rw_v2_bigram_200k_train/fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train/processed_data/'
              'global-shard_01_of_10/local-shard_0_of_10/shard_00000000_processed.parquet', [dict(
                  bff_contained_ngram_count_before_dedupe=1, language_id_whole_page_fasttext=dict(en=.9), previous_word_count=3,
                  text='A web page.', url='u', warcinfo='w')], ['A web page.'])],
    'github_code': [('above-2-stars/train_000.parquet', [dict(repo_id='o/r', size=9, file_path='a.c', content='int x;\n')], ['int x;\n'])],
    'slimpajama': [('train/chunk1/example_train_0.jsonl.zst', [
        dict(text='A page.', meta=dict(redpajama_set_name='RedPajamaC4')), dict(text='A novel.', meta=dict(redpajama_set_name='RedPajamaBook'))],
        ['A page.'])],
    'dolmino': [
        ('data/math/gsm8k/main/train/0.jsonl.zst', [dict(text='1+1=2', id='a')], ['1+1=2']),
        ('data/math/gsm8k/main/test/0.jsonl.zst', [dict(text='a test item', id='a')], []),
        ('data/math/tinyGSM-MIND/problem-solving/tiny_gsm_inline_part1.jsonl.gz', [dict(text='def f(): return 2', id='b', extra=[1])], ['def f(): return 2']),
        ('data/math/tulu_math/personahub_math_v5/train_0000.jsonl', [dict(text='A problem.', source='x')], ['A problem.']),
        ('data/flan/tulu_flan-0000.json.gz', [dict(OLMO, text='of another subset')], [])],
    'nemotron_pretraining_code': [('Synthetic-Code/part_000000.parquet', [dict(id='1', text='print(1)', metadata=dict(category='c'))], ['print(1)'])],
    'nemotron_cc_math': [(f'{part}/part_000000.parquet', [dict(id='1', text=f'sum of {part}', metadata=dict(
        category='math', models_used=['phi-4'], warc_filename='w', warc_id='1', nemocurator_scores=3.1, finemath_scores=3.3))], expected)
        for part, expected in (('3', ['sum of 3']), ('4plus', ['sum of 4plus']), ('4plus_MIND', []))],
    'benchmark_train': [
        ('unfiltered.nocontext/train-00000-of-00001.parquet', [dict(
            question='Who?', question_id='tc_1', question_source='x', entity_pages=dict(title=['t']), answer=dict(
                aliases=['Bob', 'B'], normalized_value='bob', value='Bob', type='WikipediaEntity'))], ['Question: Who?\nAnswer: Bob']),
        ('main/train-00000-of-00001.parquet', [dict(id='7-9', question_stem='The sun is', choices=dict(
            text=['a star', 'a cat'], label=['A', 'B']), answerKey='A')], ['Question: The sun is\nAnswer: a star']),
        ('nq_open/train-00000-of-00001.parquet', [dict(question='where is it', answer=['Rome', 'Roma'])], ['Question: where is it\nAnswer: Rome']),
        ('data/piqa/train.parquet', [dict(goal='Open a jar', sol1='twist', sol2='eat', label=0)], ['Question: Open a jar\nAnswer: twist']),
        ('main/train-00001-of-00001.parquet', [dict(question='48/2?', answer='<<48/2=24>>24\n#### 24')], ['Question: 48/2?\nAnswer: <<48/2=24>>24\n#### 24']),
        ('data/train-00000-of-00001.parquet', [dict(question='is it so', answer=True, passage='It is.')], ['It is.\nQuestion: is it so?\nAnswer: yes']),
        ('ARC-Easy/train-00000-of-00001.parquet', [dict(id='M1', question='Which?', choices=dict(text=['x', 'y'], label=['1', '2']), answerKey='2')],
         ['Question: Which?\nAnswer: y'])],
    'tulu3': [('data/train-00000-of-00006.parquet', [dict(id='a', source='s', messages=[
        dict(content='Hi', role='user'), dict(content='Hello!', role='assistant')])], [('Hi', 'Hello!')])],
    'openmathreasoning': [('data/cot-00000-of-00144.parquet', [dict(
        expected_answer='4', problem_type='has_answer_extracted', problem_source='aops', generation_model='DeepSeek-R1',
        pass_rate_72b_tir='0.9', problem='2+2?', generated_solution=THINK, inference_mode='cot', used_in_kaggle=True)], [('2+2?', THINK)])],
    'opensciencereasoning': [('train/OpenScienceReasoning-2.parquet', [dict(input='Pick (A) or (B).', output=THINK, expected_answer='B')],
                              [('Pick (A) or (B).', THINK)])],
    'opencodereasoning': [('train/python/train-00000-of-00070.parquet', [
        dict(id='1', question_id='q', question='-', r1_generation=THINK, qwq_critique='', solution='x', judgement='right', pass_rate='1.0',
             source='codeforces', license='cc', dataset=d, split=s, difficulty='EASY', index=i)
        for d, s, i in (('taco', 'train', '1'), ('apps', 'test', '0'), ('code_contests', 'valid', '0'), ('open-r1/codeforces', 'train', '0'),
                        ('open-r1/codeforces', 'train', '1'))],
        [('Taco 1', THINK), ('Apps test 0', THINK), ('Contest', THINK),
         ('Sum.\n\nInput\n\nn\n\nOutput\n\nm\n\nExamples\n\nInput\n\n1\n\nOutput\n\n2\n\nInput\n\n3\n\nOutput\n\n4\n\nNote\n\nEasy.', THINK)])],
}
FORCES = dict(input_format='n', output_format='m', examples=[dict(input='1', output='2'), dict(input='3', output='4')], note='Easy.')
QUESTIONS = {
    'BAAI/TACO/ALL/train-00000-of-00009.parquet': [dict(question='Taco 0', input_output='')],
    'BAAI/TACO/ALL/train-00001-of-00009.parquet': [dict(question='Taco 1', input_output='')],
    'BAAI/TACO/ALL/test-00000-of-00001.parquet': [dict(question='Taco test')],
    'codeparrot/apps/train.jsonl': [dict(id=0, question='Apps 0')], 'codeparrot/apps/test.jsonl': [dict(id=0, question='Apps test 0')],
    **{f'deepmind/code_contests/data/{s}-00000-of-00001.parquet': [dict(name='a', description='Contest')] for s in ('train', 'valid', 'test')},
    **{f'open-r1/codeforces/data/{s}-00000-of-00001.parquet': [dict(FORCES, description='Sum.'), dict(FORCES, description=None)]
       for s in ('train', 'test')},
}


def write_records(path, records):
    import pyarrow
    import pyarrow.parquet
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ''.join(json.dumps(r) + '\n' for r in records).encode()
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
    """Every byte a token, and the special tokens of both templates."""
    folder = str(tmp_path_factory.mktemp('tok'))
    save_tokenizer(folder, make_tokenizer('x', {bytes([b]): b for b in range(256)}, GPT2_PATTERN,
                                          {name: 256 + i for i, name in enumerate(SPECIAL)}, '<|begin_of_text|>'))
    return folder


def run_script(name, *arguments):
    """Runs prepare/<name>.py in this process. Returns the exit code."""
    before, hook = sys.argv, sys.excepthook
    sys.argv = [f'prepare/{name}.py', *arguments]
    try:
        runpy.run_path(str(ROOT / 'prepare' / f'{name}.py'), run_name='__main__')
        return 0
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv, sys.excepthook = before, hook


def documents_of(folder, tokenizer):
    """[(ids, mask or None)] of every document of a source, all splits."""
    found = []
    for shard in json.loads((folder / 'meta.json').read_text())['shards']:
        ids = np.array(open_shard(str(folder / shard['file'])))
        mask_file = folder / (shard['file'][:-4] + '.mask')
        mask = np.fromfile(mask_file, np.uint8) if mask_file.exists() else np.zeros(len(ids), np.uint8)
        assert len(mask) == len(ids)
        starts = [*np.flatnonzero(ids == tokenizer.bos_id), len(ids)]
        found += [(ids[a:b], mask[a:b]) for a, b in zip(starts, starts[1:])]
    return found


def test_every_script_has_a_case():
    assert set(CASES) == set(SCRIPTS)


@pytest.mark.parametrize('name', SCRIPTS)
def test_records_of_the_true_schema_become_the_right_documents(tmp_path, chat_tokenizer, name, capsys):
    extra = {'dolmino': ['--subset=math'], 'opencodereasoning': [f'--questions={tmp_path / "questions"}']}.get(name, [])
    for path, records in QUESTIONS.items() if name == 'opencodereasoning' else ():
        write_records(tmp_path / 'questions' / path, records)
    for path, records, _ in CASES[name]:
        write_records(tmp_path / 'in' / path, records)
    assert run_script(name, f'--input={tmp_path / "in"}', f'--tokenizer={chat_tokenizer}', f'--out={tmp_path / "out"}', '--workers=0', *extra) == 0
    tokenizer = load_tokenizer(chat_tokenizer)
    expected = [document for _, _, documents in CASES[name] for document in documents]
    found = documents_of(tmp_path / 'out' / (name + '_math' * (name == 'dolmino')), tokenizer)
    if isinstance(expected[0], str):
        assert sorted(tokenizer.decode(ids[1:].tolist()) for ids, _ in found) == sorted(expected)
        return
    header = '<|start_header_id|>{}<|end_header_id|>\n\n'.format
    assert sorted(marked(tokenizer, *document) for document in found) == sorted(
        f'<|begin_of_text|>{header("user")}{user}<|eot_id|>{header("assistant")}[[{answer}<|eot_id|>]]' for user, answer in expected)
    assert 'what is learnt between [[ and ]]' in capsys.readouterr().out


@pytest.mark.parametrize('messages', [[{'content': 'Hi'}], [{'role': 'user', 'content': None}], ['Hi'], [{'role': 'user', 'content': 'Hi'}], 'Hi'])
def test_a_conversation_that_is_none_is_named_with_its_line(tmp_path, chat_tokenizer, messages):
    write_records(tmp_path / 'a.jsonl', [dict(messages=messages)])
    with pytest.raises(BadInput, match='a.jsonl:1: '):
        run_script('tulu3', f'--input={tmp_path / "a.jsonl"}', f'--tokenizer={chat_tokenizer}', f'--out={tmp_path / "out"}', '--workers=0')


@pytest.mark.parametrize('name', SCRIPTS)
def test_scripts_say_where_their_data_comes_from(name):
    text = (ROOT / 'prepare' / f'{name}.py').read_text()
    script = runpy.run_path(str(ROOT / 'prepare' / f'{name}.py'), run_name='x')
    dataset = script['DATASET'] if 'DATASET' in script else script['dataset_of']('math')
    doc = ast.get_docstring(ast.parse(text))
    assert f'python prepare/{name}.py' in doc and 'https://' in doc and 'tokens' in doc and dataset.licence
    for url in dataset.files:
        assert url.startswith(('hf://datasets/', 'https://')) and (
            '@' not in url or len(url.split('@')[1].split('/')[0]) == 40), url     # a pin is a whole commit
