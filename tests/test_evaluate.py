"""Benchmarks and bits per byte against lm-eval's own `hf` model, over ranks, and result files."""

import collections
import json
import math
import shutil

from tests.conftest import need

need('lm_eval.models.utils', 'lm_eval.tasks', 'yaml', 'jinja2', 'orjson', 'isal')

import numpy as np
import pytest
import torch

from configurator import BadInput, RunFault
from lib import checkpoint, hf
from lib.byte_level import DIGITS_PATTERN
from lib.tokenizer import load_tokenizer, make_tokenizer, save_tokenizer
from model import GPT, ModelConfig, init_weights
from tests.conftest import run_here, run_ranks, train
from tools import benchmarks

CHOICE = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
fewshot_split: validation
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2.0}}
"""
GENERATE = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: generate_until
doc_to_text: "{{{{question}}}} "
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["e", "\\n\\n"], max_gen_toks: 24, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
ROLLING = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
metadata: {{version: 1.0}}
"""


def save_model(folder, config, tokenizer, scale, context):
    """Saves a random model whose answers differ as folder/ours, and exports it to folder/hf."""
    model = GPT(config)
    init_weights(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    ours = folder / 'ours'
    ours.mkdir()
    save_tokenizer(str(ours), tokenizer)
    state = dict(model=vars(config), config=None, tokenizer=None, context=context)
    checkpoint.Checkpointer(str(ours), 0, False).save(0, model, [], state)
    hf.export_model(str(ours), str(folder / 'hf'), 'float32', None)


def write_lines(path, records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))


@pytest.fixture(scope='module')
def model_folder(tmp_path_factory):
    """A random model, and three tasks as YAML files."""
    folder = tmp_path_factory.mktemp('evaluate')
    merges = [b' t', b'he', b' the', b'in', b'ing', b'er']
    ranks = {token: 3 + i for i, token in enumerate([*(bytes([b]) for b in range(256)), *merges])}
    special = {'<|endoftext|>': 0, '<|im_start|>': 1, '<|im_end|>': 2}
    tokenizer = make_tokenizer('bytes', ranks, DIGITS_PATTERN, special)
    sizes = dict(vocab_size=300, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, ffn_dim=48)
    save_model(folder, ModelConfig(**sizes, tie_embeddings=False), tokenizer, 6, 160)
    rng = np.random.default_rng(0)
    words = ['cat', 'the river', 'seven', 'in', 'Zürich', 'thinking', 'error', 'x = 1']

    def some(low, high):
        return ' '.join(rng.choice(words, rng.integers(low, high)))

    rows = []
    for _ in range(23):
        question = some(1, 40)
        choices = [some(1, 6) for _ in range(3)]
        rows.append(dict(question=question, choices=[*choices, 'A', 'B']))
        rows[-1]['label'] = int(rng.integers(5))
    rows[4]['question'] = some(120, 140)        # longer than the context
    rows[5]['question'] = '<|endoftext|>' + some(3, 4)
    write_lines(folder / 'rows.jsonl', rows)
    # Without the row that begins with BOS. If it comes first, lm-eval's hf model leaves BOS out of
    # its whole batch.
    write_lines(folder / 'others.jsonl', rows[:5] + rows[6:])
    for name, text in (('choice', CHOICE), ('continue', GENERATE), ('roll', ROLLING)):
        data = folder / ('others.jsonl' if name == 'continue' else 'rows.jsonl')
        (folder / f'{name}.yaml').write_text(text.format(name=f'local_{name}', data=data))
    return folder


def run_theirs(folder, name, **options):
    """The result of lm-eval's own hf model on the exported folder."""
    from lm_eval.models.huggingface import HFLM

    setting = dict(dtype='float32', batch_size=4, device='cpu', max_length=160)
    setting |= options.pop('setting', {})
    lm = HFLM(pretrained=str(folder / 'hf'), **setting)
    tasks = [str(folder / f'{name}.yaml')]
    manager = benchmarks.task_manager()
    return benchmarks.simple_evaluate(lm, tasks=tasks, task_manager=manager, **options)


@pytest.fixture(scope='module')
def theirs(model_folder):
    found = {}
    for name, shots in (('choice', 2), ('continue', 0), ('roll', 0)):
        found[name] = run_theirs(model_folder, name, num_fewshot=shots, bootstrap_iters=100)
    return found


def scorer(model_folder, batch_tokens=700, **options):
    path = str(model_folder / 'ours')
    model, tokenizer, about = hf.open_model(path, torch.device('cpu'), torch.float32)
    context = about['context']
    return benchmarks.Scorer(model, tokenizer, context, batch_tokens, quiet=True, **options)


def run_ours(ours, path, shots=None, **options):
    """benchmarks.run_tasks on a YAML file: {task: entry}."""
    tasks = benchmarks.load_tasks([str(path)], shots, options.get('allow_code', False))
    return benchmarks.run_tasks(ours, tasks, **options)


@pytest.fixture
def found(monkeypatch):
    """A list to which every result of lm-eval with our model is appended."""
    results = []
    original = benchmarks.simple_evaluate

    def simple_evaluate(*args, **kwargs):
        results.append(original(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(benchmarks, 'simple_evaluate', simple_evaluate)
    return results


def responses(result, task):
    """Every response of the model: texts, or (log-likelihood, is_greedy) flattened."""
    flat = []
    for sample in result['samples'][task]:
        flat += [np.ravel(response) for response in sample['resps']]
    return flat


def assert_same_scores(got, wanted, spread):
    """The same log-likelihoods, to 1e-3 nats, and greedy flags. They must also vary."""
    a = np.array(got, dtype=float)
    b = np.array(wanted, dtype=float)
    assert np.abs(a[:, 0] - b[:, 0]).max() < 1e-3
    assert (a[:, 1:] == b[:, 1:]).all()
    assert a[:, 0].std() > spread


def assert_same_texts(got, wanted, n_different):
    texts = [str(text) for text in got]
    assert texts == [str(text) for text in wanted]
    assert len(set(texts)) > n_different


@pytest.mark.parametrize('batch_tokens', [1, 700, 100_000])
def test_scores_equal_those_of_lm_evals_hf_model(model_folder, theirs, batch_tokens, found):
    ours = scorer(model_folder, batch_tokens)
    shots = {'choice': 2, 'continue': 0}
    if batch_tokens == 700:     # once, because bootstrapping is slow
        shots['roll'] = 0
    for name, count in shots.items():
        task = f'local_{name}'
        results = run_ours(ours, model_folder / f'{name}.yaml', count)[task]
        expected = theirs[name]['results'][task]
        got = responses(found[-1], task)
        wanted = responses(theirs[name], task)
        if name == 'continue':
            assert_same_texts(got, wanted, 10)
        else:
            assert_same_scores(got, wanted, 1)
        for metric, (value, error) in results['metrics'].items():
            assert value == pytest.approx(expected[f'{metric},none'], rel=1e-6)
            if name == 'choice':
                assert error == pytest.approx(expected[f'{metric}_stderr,none'])
                assert np.mean(results['items'][metric]) == pytest.approx(value)
        assert results['n'] == (22 if name == 'continue' else 23)
        assert results['shots'] == count
    assert ours.n_cut > 0


def test_every_end_id_of_a_folder_ends_a_text_as_in_lm_evals_hf_model(
        model_folder, theirs, tmp_path, found):
    """Ordinary tokens that greedy texts contain become end ids of generation_config.json."""
    before = [text[0] for text in responses(theirs['continue'], 'local_continue')]
    shutil.copytree(model_folder / 'hf', tmp_path / 'hf')
    shutil.copy(model_folder / 'continue.yaml', tmp_path)
    _, tokenizer, _ = hf.open_model(str(tmp_path / 'hf'), torch.device('cpu'), torch.float32)
    letters = collections.Counter(c for text in before for c in set(text) if c.isascii())
    path = tmp_path / 'hf' / 'generation_config.json'
    ends = [tokenizer.encode(letter)[0] for letter, _ in letters.most_common(3)]
    path.write_text(json.dumps({**json.loads(path.read_text()), 'eos_token_id': ends}))
    expected = responses(run_theirs(tmp_path, 'continue', num_fewshot=0), 'local_continue')
    model, tokenizer, about = hf.open_model(
        str(tmp_path / 'hf'), torch.device('cpu'), torch.float32)
    ours = benchmarks.Scorer(model, tokenizer, about['context'], 700, quiet=True)
    run_ours(ours, tmp_path / 'continue.yaml', 0)
    got = responses(found[-1], 'local_continue')
    assert_same_texts(got, expected, 5)
    assert sum(len(a[0]) < len(b) for a, b in zip(expected, before, strict=True)) > 5


# Task -> its file, and what lm-eval's own YAML for it says: text, choices and target.
QUESTION = 'Question: {{question}}\\nAnswer:'
LETTERS = '\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nC. {{choices[2]}}\\nD. {{choices[3]}}'
LABEL = '{{choices.label.index(answerKey)}}'
REAL = {
    'arc': ('arc_challenge_validation', QUESTION, '{{choices.text}}', LABEL),
    'hellaswag': (
        'hellaswag_val_first500', '{{activity_label}}: {{ctx}}', '{{endings}}', '{{label}}'),
    'mmlu': (
        'mmlu_12subjects_test', '{{question}}' + LETTERS + '\\nAnswer:', '["A", "B", "C", "D"]',
        '{{answer}}'),
    'gsm8k': ('gsm8k_test_200', QUESTION, None, '{{answer}}'),
}


@pytest.mark.parametrize('name', REAL)
def test_real_benchmarks_equal_lm_evals_hf_model(shared_data, tmp_path, name, found):
    """40 questions each: every log-likelihood and every generated text, with a real tokenizer."""
    file, text, choices, target = REAL[name]
    lines = (shared_data / 'benchmarks' / f'{file}.jsonl').read_text().splitlines(True)
    (tmp_path / 'rows.jsonl').write_text(''.join(lines[:40]))
    metric = 'acc' if choices else 'exact_match'
    task = ['task: real', 'dataset_path: json', 'test_split: test']
    task.append(f'dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}')
    task += [f'doc_to_text: "{text}"', f'doc_to_target: "{target}"']
    if choices:
        task += ['output_type: multiple_choice', f"doc_to_choice: '{choices}'"]
    else:
        task.append('output_type: generate_until')
        task.append('generation_kwargs: {until: ["Question:"], max_gen_toks: 32}')
    task.append('metric_list: [{metric: %s, aggregation: mean, higher_is_better: true}]' % metric)
    (tmp_path / 'task.yaml').write_text('\n'.join(task) + '\n')
    tokenizer = load_tokenizer(str(shared_data / 'tokenizers' / 'bpe8k'))
    sizes = dict(vocab_size=8192, n_layer=3, n_head=6, n_kv_head=2, n_embd=96, ffn_dim=160)
    save_model(tmp_path, ModelConfig(**sizes, tie_embeddings=False), tokenizer, 4, 1024)
    theirs = run_theirs(tmp_path, 'task', setting=dict(batch_size=8, max_length=1024))
    results = run_ours(scorer(tmp_path, 3000), tmp_path / 'task.yaml')['real']
    assert results['n'] == 40
    assert results['metrics'][metric][0] == theirs['results']['real'][f'{metric},none']
    got = responses(found[-1], 'real')
    wanted = responses(theirs, 'real')
    if choices:
        assert_same_scores(got, wanted, 0.3)
    else:
        assert_same_texts(got, wanted, 20)


def test_two_ranks_give_what_one_gives(model_folder, tmp_path):
    tasks = ','.join(str(model_folder / f'{name}.yaml') for name in ('choice', 'continue', 'roll'))
    bpb = tmp_path / 'text.jsonl'
    write_lines(bpb, [dict(text='the river in ' * n) for n in (1, 5, 40, 3)])
    command = ['tools/evaluate.py', f'--ckpt={model_folder / "ours"}', f'--tasks={tasks}']
    command += [f'--bpb={bpb}', '--device=cpu', '--dtype=float32', '--batch_tokens=600']
    assert run_here([*command, f'--out={tmp_path}/one.json']) == 0
    out = run_ranks([*command, f'--out={tmp_path}/two.json', f'--compare={tmp_path}/one.json'], 2)
    assert out.returncode == 0, out.stdout
    assert '+0.0000   0.0000  paired' in out.stdout
    assert 'lost their beginning' in out.stdout
    one = json.loads((tmp_path / 'one.json').read_text())['results']
    two = json.loads((tmp_path / 'two.json').read_text())['results']
    names = {'local_choice', 'local_continue', 'local_roll', f'bpb {bpb}'}
    assert one.keys() == two.keys() == names
    for name, r in one.items():
        for metric, (value, _) in r['metrics'].items():
            assert value == pytest.approx(two[name]['metrics'][metric][0], rel=1e-6)
            items = two[name]['items'].get(metric, [])
            assert r['items'].get(metric, []) == pytest.approx(items, rel=1e-6)


def test_bits_per_byte_against_the_definition(model_folder, tmp_path):
    ours = scorer(model_folder)
    texts = ['the river in Zürich ' * 3, 'x = 1']
    bits = 0
    n_bytes = 0
    for text in texts:
        ids = ours.tokens.encode(text)
        assert len(ids) < 160
        with torch.no_grad():
            logits = ours.model(torch.tensor([[0, *ids]]))[0] @ ours.model.output_weight.T
        log_p = logits.log_softmax(-1)
        bits -= sum(log_p[i, token].item() for i, token in enumerate(ids)) / math.log(2)
        n_bytes += len(text.encode())
    path = tmp_path / 'a.jsonl'
    write_lines(path, [dict(body=text) for text in texts])
    documents = benchmarks.read_documents(str(path), ours.tokens, 'body', None)
    result = benchmarks.bits_per_byte(ours, documents)
    assert result['metrics']['bpb'][0] == pytest.approx(bits / n_bytes, rel=1e-5)
    assert np.mean(result['items']['bpb']) == pytest.approx(bits / n_bytes, rel=1e-5)
    assert result['bytes'] == n_bytes
    with pytest.raises(BadInput, match="no text in 'text'"):
        benchmarks.read_documents(str(path), ours.tokens, 'text', None)


def test_bits_per_byte_of_a_source_are_those_that_training_reports(trained):
    source = trained.parent / 'data' / 'a'
    model, tokenizer, about = hf.open_model(str(trained), torch.device('cpu'), torch.float32)
    documents = benchmarks.read_documents(str(source), tokenizer, 'text', None)
    assert 0 < len(documents) < 40
    lines = (trained.parent / 'text.jsonl').read_text().splitlines()
    texts = {json.loads(line)['text'] for line in lines}
    for ids, n_bytes in documents:
        assert tokenizer.decode(ids) in texts
        assert len(tokenizer.decode(ids)) == n_bytes
    at_end = benchmarks.Scorer(model, tokenizer, about['context'], 1000, quiet=True)
    bpb = benchmarks.bits_per_byte(at_end, documents)['metrics']['bpb'][0]
    last = (trained / 'metrics.jsonl').read_text().splitlines()[-1]
    assert bpb == pytest.approx(json.loads(last)['val/bpb_a'], rel=0.05)


def test_paired_differences_are_those_of_the_documents():
    rng = np.random.default_rng(1)
    base = rng.random(400) < 0.4
    better = (base | (rng.random(400) < 0.05)).astype(float)
    base = base.astype(float)

    def entry(x):
        metrics = {'acc': [x.mean(), x.std(ddof=1) / 20]}
        return {'t': dict(version=1, shots=0, metrics=metrics, items={'acc': x.tolist()})}

    [(*_, delta, error, how)] = benchmarks.compare_results(entry(better), entry(base))
    assert how == 'paired'
    assert delta == pytest.approx((better - base).mean())
    assert error == pytest.approx((better - base).std(ddof=1) / 20)
    [(*_, error, how)] = benchmarks.compare_results(entry(better), entry(base[:300]))
    assert how == 'unpaired'
    expected = math.hypot(better.std(ddof=1), base[:300].std(ddof=1)) / 20
    assert error == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize('arguments, message', [
    ('--tasks=arc_eazy', "unknown task 'arc_eazy'. Did you mean 'arc_easy'?"),
    ('--limit=1', 'name a model and what to score'),
    ('--tasks=core,-mmlux', "'-mmlux' leaves out what is not there"),
    ('--tasks=DIR/choice.yaml --compare=nowhere.json', 'no file of results'),
    ('--tasks=DIR/choice.yaml --chat_template=llama3', r'has no <\|start_header_id\|>'),
    ('--bpb=nowhere.txt', 'matches no file'),
    ('--tasks=DIR/continue.yaml --context=20', 'generates up to 24 tokens'),
    ('--tasks=,', 'tasks and bpb hold no name'),
    ('--tasks=DIR/choice.yaml --limit=0', 'limit = 0 must be at least 1'),
    ('--tasks=DIR/choice.yaml --num_fewshot=-1', 'num_fewshot = -1 must be at least 0'),
    ('--tasks=DIR/choice.yaml --context=0', 'context = 0 must be at least 1'),
    ('--tasks=DIR/choice.yaml --batch_tokens=0', 'batch_tokens = 0 must be at least 1'),
    ('--tasks=DIR/choice.yaml --dtype=int8', "dtype = 'int8' must be one of"),
    ('--tasks=DIR/choice.yaml --out=DIR', 'is a folder. Name a file of results'),
    ('--tasks=arc_easy,humaneval', "task 'humaneval' runs code that the model wrote"),
])
def test_bad_input(model_folder, arguments, message):
    arguments = arguments.replace('DIR', str(model_folder)).split()
    command = ['tools/evaluate.py', f'--ckpt={model_folder / "ours"}', '--device=cpu', *arguments]
    with pytest.raises(BadInput, match=message):
        run_here(command)


def test_tasks_that_cannot_be_loaded_or_run_code(model_folder, tmp_path):
    roll = (model_folder / 'roll.yaml').read_text().replace('rows.jsonl', 'nowhere.jsonl')
    missing = tmp_path / 'missing.yaml'
    missing.write_text(roll.replace('local_roll', 'local_missing'))
    with pytest.raises(RunFault, match='missing.yaml.*cannot be loaded'):
        benchmarks.load_tasks([str(missing)])
    generate = (model_folder / 'continue.yaml').read_text() + 'unsafe_code: true\n'
    unsafe = tmp_path / 'unsafe.yaml'
    unsafe.write_text(generate.replace('local_continue', 'local_unsafe'))
    with pytest.raises(BadInput, match='runs code that the model wrote.*--allow_code'):
        benchmarks.load_tasks([str(unsafe)])
    results = run_ours(scorer(model_folder), unsafe, limit=3, allow_code=True)
    assert results['local_unsafe']['n'] == 3


def test_prompts_as_conversations(model_folder, monkeypatch):
    """Through a chat template, the prompt is one conversation with special tokens and one BOS."""
    seen = []

    def score(pairs):
        seen.extend(pairs)
        return [(0.0, False)] * len(pairs)

    ours = scorer(model_folder, template='chatml')
    monkeypatch.setattr(ours, 'score', score)
    run_ours(ours, model_folder / 'choice.yaml', 0, limit=2)
    context = seen[0][0]
    assert context[:2] == [0, 1]
    assert [context.count(i) for i in (0, 1, 2)] == [1, 2, 1]
    assert ours.tokens.decode(context).startswith('<|endoftext|><|im_start|>user\nQuestion: ')


def test_a_begun_answer_is_not_closed(model_folder):
    ours = scorer(model_folder, template='chatml')
    history = [dict(role='user', content='Say it.'), dict(role='assistant', content='It is')]
    text = ours.apply_chat_template(history, add_generation_prompt=False)
    assert text.endswith('<|im_start|>assistant\nIt is')


PLAIN_TASK = """task: t
dataset_path: json
dataset_kwargs: {data_files: {validation: rows.jsonl}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: ["a", "b"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def task_file(folder, old, new):
    """A YAML file in which `old` is replaced, or new is added, beside a module that leaves a trace
    when it is imported.
    """
    (folder / 'utils.py').write_text(f"open({str(folder / 'trace')!r}, 'w')\ndef f(x): return x\n")
    (folder / 'rows.jsonl').write_text('{"question": "q", "choices": ["a", "b"]}\n')
    text = PLAIN_TASK.replace('rows.jsonl', str(folder / 'rows.jsonl'))
    path = folder / 'task.yaml'
    path.write_text(text.replace(old, new) if old else text + new)
    return str(path)


CALLS_OUT = "{{ cycler.__init__.__globals__.os.system('touch trace') }}"


@pytest.mark.parametrize('old, new, line, what', [
    ('', 'process_docs: !function utils.f\n', 10, '!function utils.f runs Python'),
    ('{{question}}', CALLS_OUT, 6, "calls 'system'"),
    ('"{{question}}"', f'|\n  Question:\n  {CALLS_OUT}', 8, "calls 'system'"),
    ('{{question}}', "{{ question['__class__'] }}", 6, "attribute '__class__'"),
    ('{{question}}', "{{ question|attr('x') }}", 6, "filter 'attr'"),
    ('{{question}}', '{% macro f() %}{% endmacro %}', 6, 'kind Macro'),
    ('', 'metadata: {x: &a "{{lipsum()}}"}\ndescription: *a\n', 10, "calls 'lipsum'"),
    ('metric: acc', 'metric: somebody/acc', 9, "metric 'somebody/acc'"),
    ('metric: acc', 'hf_evaluate: true, metric: acc', 9, 'hf_evaluate'),
    ('dataset_path: json', 'dataset_path: utils.py', 2, 'Python script'),
    ('{data_files', '{trust_remote_code: true, data_files', 3, 'trust_remote_code'),
    ('', 'use_prompt: other.yaml:p\n', 10, 'template of another file'),
])
def test_a_task_that_runs_code_of_its_author_needs_allow_code(tmp_path, old, new, line, what):
    path = task_file(tmp_path, old, new)
    with pytest.raises(BadInput) as refused:
        benchmarks.load_tasks([path])
    message = str(refused.value)
    assert message.startswith(f'{path}:{line}: ') and what in message and '--allow_code' in message
    # The same in a file that another one includes.
    (tmp_path / 'other.yaml').write_text('include: task.yaml\ntask: other\n')
    with pytest.raises(BadInput, match=f'task.yaml:{line}: '):
        benchmarks.load_tasks([str(tmp_path / 'other.yaml')])
    assert not (tmp_path / 'trace').exists()


def test_allow_code_loads_what_runs_code(tmp_path):
    path = task_file(tmp_path, '', 'process_docs: !function utils.f\n')
    assert benchmarks.load_tasks([path], allow_code=True).keys() == {path}
    assert (tmp_path / 'trace').exists()


def test_plain_templates_need_no_flag_and_render_in_a_sandbox(tmp_path):
    import lm_eval

    text = "{% for c in choices %}{{ loop.index }}{{ c|upper }}{% endfor %} {{ question.strip() }}"
    path = task_file(tmp_path, '{{question}}', text + " {{ choices.index('b') }} {{ 'x____' }}")
    [(_, [task])] = benchmarks.load_tasks([path]).values()
    assert task.doc_to_text(task.eval_docs[0]) == '1A2B q 1 x____'
    with pytest.raises(Exception, match='unsafe'):
        lm_eval.utils.apply_template('{{ q[key] }}', dict(q='a', key='__class__'))
    with pytest.raises(Exception, match='Range too big'):
        lm_eval.utils.apply_template('{{ range(10**9) }}', {})


@pytest.mark.parametrize('old, new, message', [
    (PLAIN_TASK, '- a\n', 'must be a mapping'),
    (PLAIN_TASK, 'a: [', 'no valid YAML'),
    ('task: t\n', '', 'neither a `task` nor a `group`'),
    ('task: t\n', 'task: 5\n', 'task.yaml:1: task must be of YAML type str'),
    ('doc_to_text', 'doc_to_txt', "6: unknown field 'doc_to_txt'. Did you mean 'doc_to_text'"),
    ('multiple_choice', 'choice', "5: output_type 'choice' must be one of"),
    ('validation_split: validation\n', '', 'needs a dataset_path'),
    ('validation_split: validation', 'validation_split: x', "cannot be used .KeyError: 'x'"),
    ('{{question}}', '{{quest}}', "UndefinedError: 'quest' is undefined"),
    ('{{question}}', '{{question', '6: the template is wrong'),
    ('aggregation: mean', 'aggregation: maen', "9: aggregation 'maen' must be one of"),
    ('metric: acc, ', '', 'needs a field `metric`'),
    ('', 'include: nowhere.yaml\n', '10: include: there is no file'),
    ('', 'include: task.yaml\n', 'includes itself'),
    ('', 'description: !!python/object/apply:os.getcwd []\n', '10: the tag .* is not supported'),
    ('', 'metadata: &a [*a]\n', 'one contains itself'),
])
def test_a_task_file_that_is_wrong(tmp_path, old, new, message):
    path = task_file(tmp_path, old, new)
    if old == PLAIN_TASK:
        (tmp_path / 'task.yaml').write_text(new)
    with pytest.raises(BadInput, match=message):
        benchmarks.load_tasks([path])


def test_a_task_file_that_is_not_utf8_or_grows_by_its_aliases(tmp_path):
    path = tmp_path / 'task.yaml'
    path.write_bytes(b'task: \xe9\xff\n')
    with pytest.raises(BadInput, match='is not UTF-8'):
        benchmarks.load_tasks([str(path)])
    lines = ['a0: &a0 [x, x]'] + [f'a{i}: &a{i} [*a{i - 1}, *a{i - 1}]' for i in range(1, 60)]
    path.write_text('\n'.join(lines))
    with pytest.raises(BadInput, match='aliases are written out'):
        benchmarks.load_tasks([str(path)])


def test_benchmarks_while_training_leave_the_run_as_it_was(model_folder, trained, tmp_path):
    """On one rank and, sharded, on two. The losses are those of a run without benchmarks."""
    data = trained.parent / 'data'
    knobs = dict(vocab_size=265, sources={'a': 1.0}, max_steps=4, block_size=64, batch_size=2)
    knobs |= dict(total_batch_tokens=512, eval_interval=4)
    tasks = dict(eval_tasks=f'{model_folder}/choice.yaml,{model_folder}/continue.yaml')
    tasks |= dict(eval_tasks_interval=2, eval_tasks_limit=5)
    plain = train(tmp_path / 'plain', data, **knobs)
    one = train(tmp_path / 'one', data, **knobs, **tasks)
    two = train(tmp_path / 'two', data, ranks=2, **knobs, **tasks)
    metrics = ['choice_acc', 'choice_acc_norm', 'continue_exact_match']
    keys = [f'eval/local_{metric}' for metric in metrics]
    assert [key for key in one[0] if key.startswith('eval/')] == keys
    for step in (0, 2, 4):
        assert [one[step][key] for key in keys] == pytest.approx([two[step][key] for key in keys])
    for step in range(4):
        loss = one[step]['train/loss']
        assert loss == plain[step]['train/loss']
        assert loss == pytest.approx(two[step]['train/loss'], rel=1e-5)
    with pytest.raises(BadInput, match="unknown task 'choicee'"):
        train(tmp_path / 'bad', data, **knobs, eval_tasks='choicee')


def test_groups_of_groups_and_the_metrics_package(model_folder, monkeypatch):
    """mmlu is a group of groups. Tasks such as humaneval import the package `evaluate`, which must
    not be our script."""
    import evaluate
    from datasets import Dataset, DatasetDict

    assert evaluate.load and 'site-packages' in evaluate.__file__
    row = dict(question='the river?', choices=['in', 'seven', 'the cat', 'x'])
    row |= dict(answer=2, subject='any')
    rows = Dataset.from_list([row] * 5)

    def download(self, *_, **__):
        self.dataset = DatasetDict(test=rows, dev=rows)

    monkeypatch.setattr('lm_eval.api.task.ConfigurableTask.download', download)
    results = run_ours(scorer(model_folder), 'mmlu', 0, limit=2)
    assert results['mmlu']['n'] == len(results['mmlu']['items']['acc']) == 114
    assert results['mmlu_stem']['n'] < 60
    assert results['mmlu']['metrics']['acc'][0] == np.mean(results['mmlu']['items']['acc'])


def test_results_of_several_evaluations_stand_in_one_file(model_folder, tmp_path):
    out = tmp_path / 'x.json'
    bpb = f'--bpb={tmp_path}/a.txt'

    def evaluate_now(*arguments):
        command = ['tools/evaluate.py', f'--ckpt={model_folder / "ours"}', '--device=cpu']
        assert run_here([*command, f'--out={out}', *arguments]) == 0
        return json.loads(out.read_text())['results']

    (tmp_path / 'a.txt').write_text('the river in Zürich')
    name = f'bpb {tmp_path}/a.txt'
    assert evaluate_now(bpb).keys() == {name}
    found = evaluate_now(f'--tasks={model_folder}/choice.yaml', '--limit=2')
    assert found.keys() == {name, 'local_choice'}
    assert found['local_choice']['limit'] == 2
    assert found[name]['limit'] is None
    out.write_text('[1]')
    with pytest.raises(BadInput, match='no file of results'):
        evaluate_now(bpb)
    with pytest.raises(BadInput, match='there is no folder'):
        evaluate_now(bpb, f'--out={tmp_path}/nowhere/x.json')
