"""tools/evaluate.py and tools/benchmarks.py against lm-eval's own `hf` model on the exported folder, over ranks, and its files."""
import json
import math
import sys

import numpy as np
import pytest
import torch

from configurator import BadInput, RunFault
from lib import checkpoint, hf
from lib.tokenizer import DIGITS_PATTERN, load_tokenizer, make_tokenizer, save_tokenizer
from model import GPT, ModelConfig, init_weights
from tests.conftest import run, run_here, run_ranks, train
from tools import benchmarks

CONFIG = ModelConfig(vocab_size=300, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, ffn_dim=48, tie_embeddings=False)
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


@pytest.fixture(scope='module')
def model_folder(tmp_path_factory):
    """A random model whose answers differ from each other, as a folder of ours and exported; and three tasks as YAML files."""
    folder = tmp_path_factory.mktemp('evaluate')
    ranks = {bytes([b]): 3 + b for b in range(256)} | {b' t': 259, b'he': 260, b' the': 261, b'in': 262, b'ing': 263, b'er': 264}
    tokenizer = make_tokenizer('bytes', ranks, DIGITS_PATTERN, {'<|endoftext|>': 0, '<|im_start|>': 1, '<|im_end|>': 2}, '<|endoftext|>')
    model = GPT(CONFIG)
    init_weights(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6) if parameter.ndim == 2 else None
    (folder / 'ours').mkdir()
    save_tokenizer(str(folder / 'ours'), tokenizer)
    checkpoint.Checkpointer(str(folder / 'ours'), 0, False).save(0, model, [], dict(
        model=vars(CONFIG), config=None, tokenizer=tokenizer.fingerprint, context=160))
    hf.export_model(str(folder / 'ours'), str(folder / 'hf'), 'float32', None)
    rng = np.random.default_rng(0)
    words = ['cat', 'the river', 'seven', 'in', 'Zürich', 'thinking', 'error', 'x = 1']

    def some(low, high):
        return ' '.join(rng.choice(words, rng.integers(low, high)))
    rows = [dict(question=some(1, 40), choices=[some(1, 6) for _ in range(3)] + list('AB') , label=int(rng.integers(5))) for _ in range(23)]
    rows[4]['question'] = some(120, 140)              # longer than the context
    rows[5]['question'] = '<|endoftext|>' + some(3, 4)
    data = folder / 'rows.jsonl'
    data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    # without the row that begins with BOS: where it comes first, lm-eval's hf model leaves BOS out of its whole batch
    (folder / 'others.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows[:5] + rows[6:]))
    for name, text in (('choice', CHOICE), ('continue', GENERATE), ('roll', ROLLING)):
        (folder / f'{name}.yaml').write_text(text.format(name=f'local_{name}', data=folder / 'others.jsonl' if name == 'continue' else data))
    return folder


@pytest.fixture(scope='module')
def theirs(model_folder):
    """lm-eval's own hf model on the exported folder: {task: (results, samples)}, batch of 4."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    lm = HFLM(pretrained=str(model_folder / 'hf'), dtype='float32', batch_size=4, device='cpu', max_length=160)
    return {name: simple_evaluate(lm, tasks=[str(model_folder / f'{name}.yaml')], num_fewshot=shots, bootstrap_iters=100, task_manager=benchmarks.task_manager())
            for name, shots in (('choice', 2), ('continue', 0), ('roll', 0))}


def scorer(model_folder, batch_tokens=700, **options):
    device = torch.device('cpu')
    model, tokenizer, about = hf.open_model(str(model_folder / 'ours'), device, torch.float32)
    return benchmarks.Scorer(model, tokenizer, about['add_bos'], about['prefix_id'], about['context'], device, batch_tokens, quiet=True, **options)


def responses(found, name):
    return [response for sample in found['samples'][f'local_{name}'] for response in sample['resps']]


@pytest.mark.parametrize('batch_tokens', [1, 700, 100_000])
def test_scores_equal_those_of_lm_evals_hf_model(model_folder, theirs, batch_tokens, monkeypatch):
    found = {}
    original = benchmarks.simple_evaluate
    monkeypatch.setattr(benchmarks, 'simple_evaluate', lambda *args, **kwargs: found.setdefault('last', original(*args, **kwargs)))
    ours = scorer(model_folder, batch_tokens)
    for name, shots in [('choice', 2), ('continue', 0)] + [('roll', 0)] * (batch_tokens == 700):      # (bootstrapping is slow)
        found.clear()
        results = benchmarks.run_tasks(ours, benchmarks.load_tasks([str(model_folder / f'{name}.yaml')], shots))[f'local_{name}']
        expected = theirs[name]['results'][f'local_{name}']
        got, wanted = responses(found['last'], name), responses(theirs[name], name)
        if name == 'continue':
            assert got == wanted and len({str(text) for text in got}) > 10
        else:
            a, b = (np.array([np.ravel(r) for r in rows], dtype=float) for rows in (got, wanted))
            assert np.abs(a[:, 0] - b[:, 0]).max() < 1e-3 and (a[:, 1:] == b[:, 1:]).all() and a[:, 0].std() > 1
        for metric, (value, error) in results['metrics'].items():
            assert value == pytest.approx(expected[f'{metric},none'], rel=1e-6)
            if name == 'choice':
                assert error == pytest.approx(expected[f'{metric}_stderr,none']) and np.mean(results['items'][metric]) == pytest.approx(value)
        assert results['n'] == 23 - (name == 'continue') and results['shots'] == shots
    assert ours.n_cut > 0


REAL = {        # task -> the file and what lm-eval's own YAML for it says
    'arc': ('arc_challenge_validation', 'multiple_choice', 'Question: {{question}}\\nAnswer:', '{{choices.text}}',
            '{{choices.label.index(answerKey)}}'),
    'hellaswag': ('hellaswag_val_first500', 'multiple_choice', '{{activity_label}}: {{ctx}}', '{{endings}}', '{{label}}'),
    'mmlu': ('mmlu_12subjects_test', 'multiple_choice', '{{question}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nC. {{choices[2]}}\\n'
             'D. {{choices[3]}}\\nAnswer:', '["A", "B", "C", "D"]', '{{answer}}'),
    'gsm8k': ('gsm8k_test_200', 'generate_until', 'Question: {{question}}\\nAnswer:', None, '{{answer}}')}


@pytest.mark.parametrize('name', REAL)
def test_real_benchmarks_equal_lm_evals_hf_model(shared_data, tmp_path, name, monkeypatch):
    """40 questions each, a random model with a real tokenizer: every log-likelihood and every generated text."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    file, kind, text, choices, target = REAL[name]
    (tmp_path / 'rows.jsonl').write_text(''.join((shared_data / 'benchmarks' / f'{file}.jsonl').read_text().splitlines(True)[:40]))
    (tmp_path / 'task.yaml').write_text(f"""task: real
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
""" + (f"doc_to_choice: '{choices}'\n" if choices else 'generation_kwargs: {until: ["Question:"], max_gen_toks: 32}\n')
        + 'metric_list: [{metric: %s, aggregation: mean, higher_is_better: true}]\n' % ('acc' if choices else 'exact_match'))
    tokenizer = load_tokenizer(str(shared_data / 'tokenizers' / 'bpe8k'))
    config = ModelConfig(vocab_size=8192, n_layer=3, n_head=6, n_kv_head=2, n_embd=96, ffn_dim=160, tie_embeddings=False)
    model = GPT(config)
    init_weights(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim == 2 else None
    (tmp_path / 'ours').mkdir()
    save_tokenizer(str(tmp_path / 'ours'), tokenizer)
    checkpoint.Checkpointer(str(tmp_path / 'ours'), 0, False).save(0, model, [], dict(
        model=vars(config), config=None, tokenizer=tokenizer.fingerprint, context=1024))
    hf.export_model(str(tmp_path / 'ours'), str(tmp_path / 'hf'), 'float32', None)
    theirs = simple_evaluate(HFLM(pretrained=str(tmp_path / 'hf'), dtype='float32', batch_size=8, device='cpu'),
                             tasks=[str(tmp_path / 'task.yaml')], task_manager=benchmarks.task_manager())
    found = []
    original = benchmarks.simple_evaluate
    monkeypatch.setattr(benchmarks, 'simple_evaluate', lambda *args, **kwargs: found.append(original(*args, **kwargs)) or found[-1])
    results = benchmarks.run_tasks(scorer(tmp_path, 3000), benchmarks.load_tasks([str(tmp_path / 'task.yaml')]))['real']
    metric = 'acc' if choices else 'exact_match'
    assert results['metrics'][metric][0] == theirs['results']['real'][f'{metric},none'] and results['n'] == 40
    got, wanted = ([np.ravel(r) for sample in f['samples']['real'] for r in sample['resps']] for f in (found[0], theirs))
    if choices:
        a, b = np.array(got, dtype=float), np.array(wanted, dtype=float)
        print(f'{name}: {len(a)} log-likelihoods, largest difference {np.abs(a[:, 0] - b[:, 0]).max():.1e} nats')
        assert np.abs(a[:, 0] - b[:, 0]).max() < 1e-3 and (a[:, 1] == b[:, 1]).all() and a[:, 0].std() > 0.3
    else:
        assert [str(g) for g in got] == [str(w) for w in wanted] and len({str(g) for g in got}) > 20


def test_two_ranks_give_what_one_gives(model_folder, tmp_path):
    tasks = ','.join(str(model_folder / f'{name}.yaml') for name in ('choice', 'continue', 'roll'))
    bpb = tmp_path / 'text.jsonl'
    bpb.write_text(''.join(json.dumps({'text': 'the river in ' * n}) + '\n' for n in (1, 5, 40, 3)))
    arguments = ['tools/evaluate.py', f'--ckpt={model_folder / "ours"}', f'--tasks={tasks}', f'--bpb={bpb}', '--device=cpu', '--dtype=float32',
                 '--batch_tokens=600']
    out = run([sys.executable, *arguments, f'--out={tmp_path}/one.json'])
    assert out.returncode == 0, out.stdout + out.stderr
    out = run_ranks([*arguments, f'--out={tmp_path}/two.json', f'--compare={tmp_path}/one.json'], 2)
    assert out.returncode == 0, out.stdout
    results = [json.loads((tmp_path / f'{name}.json').read_text())['results'] for name in ('one', 'two')]
    assert '+0.0000   0.0000  paired' in out.stdout and 'lost their beginning' in out.stdout
    assert results[0].keys() == results[1].keys() == {'local_choice', 'local_continue', 'local_roll', f'bpb {bpb}'}
    for name, r in results[0].items():
        for metric, (value, _) in r['metrics'].items():
            assert value == pytest.approx(results[1][name]['metrics'][metric][0], rel=1e-6), (name, metric)
            assert r['items'].get(metric, []) == pytest.approx(results[1][name]['items'].get(metric, []), rel=1e-6)


def test_bits_per_byte_against_the_definition(model_folder, tmp_path, trained):
    ours = scorer(model_folder)
    text = ['the river in Zürich ' * 3, 'x = 1']
    bits, n_bytes = [], 0
    for document in text:
        ids = ours.tokens.encode(document)
        assert len(ids) < 160
        with torch.no_grad():
            logits = ours.model(torch.tensor([[0, *ids]]))[0] @ ours.model.output_weight.T
        bits.append(-sum(logits.log_softmax(-1)[i, t].item() for i, t in enumerate(ids)) / math.log(2))
        n_bytes += len(document.encode())
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'body': d}) + '\n' for d in text))
    result = benchmarks.bits_per_byte(ours, benchmarks.read_documents(str(tmp_path / 'a.jsonl'), ours.tokens, 'body', None))
    assert result['metrics']['bpb'][0] == pytest.approx(sum(bits) / n_bytes, rel=1e-5) and result['bytes'] == n_bytes
    assert np.mean(result['items']['bpb']) == pytest.approx(sum(bits) / n_bytes, rel=1e-5)
    with pytest.raises(BadInput, match="no text in 'text'"):
        benchmarks.read_documents(str(tmp_path / 'a.jsonl'), ours.tokens, 'text', None)
    # a source's validation shards: the same documents as its text, and what training reports of them
    source = trained.parent / 'data' / 'a'
    model, tokenizer, about = hf.open_model(str(trained), torch.device('cpu'), torch.float32)
    at_end = benchmarks.Scorer(model, tokenizer, True, 0, about['context'], torch.device('cpu'), 1000, quiet=True)
    documents = benchmarks.read_documents(str(source), tokenizer, 'text', None)
    lines = [json.loads(line)['text'] for line in (trained.parent / 'text.jsonl').read_text().splitlines()]
    assert 0 < len(documents) < 40 and all(tokenizer.decode(ids) in lines and len(tokenizer.decode(ids)) == n for ids, n in documents)
    logged = [json.loads(line) for line in (trained / 'metrics.jsonl').read_text().splitlines()][-1]['val/bpb_a']
    assert benchmarks.bits_per_byte(at_end, documents)['metrics']['bpb'][0] == pytest.approx(logged, rel=0.05)


def test_paired_differences_are_those_of_the_documents():
    rng = np.random.default_rng(1)
    base = rng.random(400) < 0.4
    better = base | (rng.random(400) < 0.05)

    def entry(x, **more):
        return {'t': dict(version=1, shots=0, metrics={'acc': [float(x.mean()), float(x.std(ddof=1) / 20)]}, items={'acc': x.tolist()}, **more)}
    (_, _, _, _, delta, error, how), = benchmarks.compare_results(entry(better.astype(float)), entry(base.astype(float)))
    difference = better.astype(float) - base
    assert how == 'paired' and delta == pytest.approx(difference.mean()) and error == pytest.approx(difference.std(ddof=1) / 20)
    (*_, error, how), = benchmarks.compare_results(entry(better.astype(float)), entry(base[:300].astype(float)))
    assert how == 'unpaired' and error == pytest.approx(math.hypot(better.std(ddof=1), base[:300].std(ddof=1)) / 20, rel=0.01)


@pytest.mark.parametrize('arguments, message', [
    (['--tasks=arc_eazy'], "unknown task 'arc_eazy'. Did you mean 'arc_easy'?"), ([], 'say which model and what'),
    (['--tasks=core,-mmlux'], "'-mmlux' leaves out what is not there"), (['--tasks=choice', '--compare=nowhere.json'], 'no file of results'),
    (['--tasks=choice', '--chat_template=llama3'], r'has no <\|start_header_id\|>'), (['--bpb=nowhere.txt'], 'matches no file'),
    (['--tasks=continue', '--context=20'], 'generates up to 24 tokens')])
def test_bad_input(model_folder, arguments, message):
    arguments = [a.replace('=choice', f'={model_folder}/choice.yaml').replace('=continue', f'={model_folder}/continue.yaml') for a in arguments]
    with pytest.raises(BadInput, match=message):
        run_here(['tools/evaluate.py', f'--ckpt={model_folder / "ours"}', '--device=cpu', *arguments])


def test_tasks_that_cannot_be_loaded_or_run_code(model_folder):
    missing = model_folder / 'missing.yaml'
    missing.write_text((model_folder / 'roll.yaml').read_text().replace('rows.jsonl', 'nowhere.jsonl').replace('local_roll', 'local_missing'))
    with pytest.raises(RunFault, match='missing.yaml.*cannot be loaded'):
        benchmarks.load_tasks([str(missing)])
    unsafe = model_folder / 'unsafe.yaml'
    unsafe.write_text((model_folder / 'continue.yaml').read_text().replace('local_continue', 'local_unsafe') + 'unsafe_code: true\n')
    with pytest.raises(BadInput, match='runs code that the model wrote.*--allow_code'):
        benchmarks.load_tasks([str(unsafe)])
    assert benchmarks.run_tasks(scorer(model_folder), benchmarks.load_tasks([str(unsafe)], allow_code=True), limit=3, allow_code=True)['local_unsafe']['n'] == 3


def test_prompts_as_conversations(model_folder, monkeypatch):
    """Through a chat template the prompt is one conversation with special tokens and one BOS."""
    seen = []
    ours = scorer(model_folder, template='chatml')
    monkeypatch.setattr(ours, 'score', lambda pairs: seen.extend(pairs) or [(0.0, False)] * len(pairs))
    benchmarks.run_tasks(ours, benchmarks.load_tasks([str(model_folder / 'choice.yaml')], 0), limit=2)
    context = seen[0][0]
    assert context[:2] == [0, 1] and context.count(0) == 1 and context.count(1) == 2 and context.count(2) == 1
    assert ours.tokens.decode(context).startswith('<|endoftext|><|im_start|>user\nQuestion: ')


def test_benchmarks_while_training_leave_the_run_as_it_was(model_folder, trained, tmp_path):
    """On one rank and, sharded, on two; the losses are those of a run without them."""
    knobs = dict(vocab_size=265, sources={'a': 1.0}, max_steps=4, block_size=64, total_batch_tokens=512, batch_size=2, eval_interval=4)
    tasks = dict(eval_tasks=f'{model_folder}/choice.yaml,{model_folder}/continue.yaml', eval_tasks_interval=2, eval_tasks_limit=5)
    plain = train(tmp_path / 'plain', trained.parent / 'data', **knobs)
    one = train(tmp_path / 'one', trained.parent / 'data', **knobs, **tasks)
    two = train(tmp_path / 'two', trained.parent / 'data', ranks=2, **knobs, **tasks)
    keys = [key for key in one[0] if key.startswith('eval/')]
    assert keys == ['eval/local_choice_acc', 'eval/local_choice_acc_norm', 'eval/local_continue_exact_match']
    for step in (0, 2, 4):
        assert [one[step][key] for key in keys] == pytest.approx([two[step][key] for key in keys])
    for step in range(4):
        assert one[step]['train/loss'] == plain[step]['train/loss'] == pytest.approx(two[step]['train/loss'], rel=1e-5)
    with pytest.raises(BadInput, match="unknown task 'choicee'"):
        train(tmp_path / 'bad', trained.parent / 'data', **knobs, eval_tasks='choicee')


def test_groups_of_groups_and_the_metrics_package(model_folder, monkeypatch):
    """mmlu is a group of groups; tasks such as humaneval import the package `evaluate`, which is not our script."""
    import evaluate
    assert evaluate.load and 'site-packages' in evaluate.__file__
    from datasets import Dataset, DatasetDict
    rows = Dataset.from_list([dict(question='the river?', choices=['in', 'seven', 'the cat', 'x'], answer=2, subject='any')] * 5)
    monkeypatch.setattr('lm_eval.api.task.ConfigurableTask.download',
                        lambda self, *_, **__: setattr(self, 'dataset', DatasetDict(test=rows, dev=rows)))
    results = benchmarks.run_tasks(scorer(model_folder), benchmarks.load_tasks(['mmlu'], 0), limit=2)
    assert results['mmlu']['n'] == 114 and len(results['mmlu']['items']['acc']) == 114 and results['mmlu_stem']['n'] < 60
    assert results['mmlu']['metrics']['acc'][0] == np.mean(results['mmlu']['items']['acc'])


def test_results_of_several_evaluations_stand_in_one_file(model_folder, tmp_path):
    def evaluate_now(*arguments):
        assert run_here(['tools/evaluate.py', f'--ckpt={model_folder / "ours"}', '--device=cpu', f'--out={tmp_path}/x.json', *arguments]) == 0
        return json.loads((tmp_path / 'x.json').read_text())['results']
    (tmp_path / 'a.txt').write_text('the river in Zürich')
    assert evaluate_now(f'--bpb={tmp_path}/a.txt').keys() == {f'bpb {tmp_path}/a.txt'}
    found = evaluate_now(f'--tasks={model_folder}/choice.yaml', '--limit=2')
    assert found.keys() == {f'bpb {tmp_path}/a.txt', 'local_choice'}
    assert found['local_choice']['limit'] == 2 and found[f'bpb {tmp_path}/a.txt']['limit'] is None
    (tmp_path / 'x.json').write_text('[1]')
    with pytest.raises(BadInput, match='no file of results'):
        evaluate_now(f'--bpb={tmp_path}/a.txt')
    with pytest.raises(BadInput, match='there is no folder'):
        evaluate_now(f'--bpb={tmp_path}/a.txt', f'--out={tmp_path}/nowhere/x.json')


def test_a_begun_answer_is_not_closed(model_folder):
    ours = scorer(model_folder, template='chatml')
    history = [dict(role='user', content='Say it.'), dict(role='assistant', content='It is')]
    assert ours.apply_chat_template(history, add_generation_prompt=False).endswith('<|im_start|>assistant\nIt is')
