"""Layouts of several ranks against one process: losses, norms, checkpoints, and methods."""
import json
import shutil

import pytest

from configurator import BadInput
from model import ModelConfig
from ops.ranks import check_sizes, resolve_sizes
from tests.conftest import (
    assert_one_sentence,
    metrics,
    run_here,
    run_ranks,
    train,
    train_command,
)

HEADS = dict(n_head=4, n_kv_head=2, qk_norm=True, batch_size=1)
EXPERTS = dict(
    n_expert=4, n_expert_active=2, expert_ffn_dim=16, n_shared_expert=1, n_dense_layer=1,
    balance_loss=0.01)


def assert_equal_runs(
    one, other, keys=('train/loss', 'train/grad_norm', 'val/loss'), tolerance=1e-4,
):
    """Checks that two runs logged the same numbers up to rounding. keys: prefixes of metrics."""
    compared = 0
    for step in one:
        for key, value in one[step].items():
            if key.startswith(keys):
                expected = pytest.approx(value, rel=tolerance, abs=1e-7)
                assert other[step][key] == expected, (step, key)
                compared += 1
    assert compared > 20


UNTIED = dict(tie_embeddings=False, layer_repeat=2, qkv_bias=True)
SELECTIVE = dict(activation_checkpointing='selective')


@pytest.mark.parametrize('ranks, layout, model', [
    (2, dict(tp=2), {}),
    (2, dict(tp=2, **SELECTIVE), UNTIED),
    (4, dict(dp_replicate=2, reshard_after_forward=True), dict(total_batch_tokens=128)),
    (2, dict(ep=2, **SELECTIVE), EXPERTS),
    (4, dict(ep=2, dp_shard=2), EXPERTS)])
def test_every_layout_trains_as_one_process_does(tmp_path, layout_data, ranks, layout, model):
    knobs = dict(max_steps=12, eval_interval=6, save_interval=100, **HEADS, **model)
    one = train(tmp_path / 'one', layout_data, **knobs)
    many = train(tmp_path / 'many', layout_data, ranks=ranks, **knobs, **layout)
    assert_equal_runs(one, many)
    if 'n_expert' in model:
        for step in range(12):
            expected = pytest.approx(one[step]['moe/imbalance'], abs=1e-6)
            assert many[step]['moe/imbalance'] == expected


def test_bf16_over_ranks_is_within_noise(tmp_path, layout_data):
    knobs = dict(max_steps=12, eval_interval=6, dtype='bfloat16', **HEADS, **EXPERTS)
    one = train(tmp_path / 'one', layout_data, **knobs)
    many = train(tmp_path / 'many', layout_data, ranks=2, tp=2, **knobs)
    assert_equal_runs(one, many, ('train/loss', 'val/loss'), 0.02)


def test_a_compiled_run_under_tensor_parallelism_is_the_same(tmp_path, layout_data):
    if shutil.which('g++') is None:
        pytest.skip('torch.compile on the CPU needs a C++ compiler, and g++ is not here')
    knobs = dict(max_steps=8, **HEADS)
    one = train(tmp_path / 'one', layout_data, **knobs)
    two = train(tmp_path / 'two', layout_data, ranks=2, tp=2, compile=True, **knobs)
    assert_equal_runs(one, two)


# -- checkpoints -----------------------------------------------------------------------------------

def assert_layouts_can_change(tmp_path, data, layouts, **knobs):
    """Checks that a run whose layout changes every three steps equals one that never stopped."""
    knobs = dict(
        schedule='constant', eval_interval=3, save_interval=3, keep_last=0, **HEADS, **knobs)
    uninterrupted = train(tmp_path / 'whole', data, max_steps=3 * len(layouts), **knobs)
    for i, (ranks, layout) in enumerate(layouts):
        changed = train(
            tmp_path / 'run', data, ranks=ranks, max_steps=3 * (i + 1), resume=True, **knobs,
            **layout)
    assert_equal_runs(uninterrupted, changed)


def test_checkpoints_pass_from_layout_to_layout(tmp_path, layout_data):
    layouts = [(2, dict(tp=2)), (1, {}), (4, dict(tp=2)), (2, dict(dp_shard=2))]
    assert_layouts_can_change(tmp_path, layout_data, layouts)


def test_checkpoints_of_experts_pass_from_layout_to_layout(tmp_path, layout_data):
    layouts = [(2, dict(ep=2)), (1, {}), (4, dict(ep=2, tp=2))]
    assert_layouts_can_change(tmp_path, layout_data, layouts, **EXPERTS)


# -- methods ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('ranks, layout, model', [(4, dict(tp=2), {}), (2, dict(ep=2), EXPERTS)])
def test_influence_moves_the_weights_as_in_one_process(
    tmp_path, layout_data, ranks, layout, model,
):
    knobs = dict(
        HEADS, max_steps=26, mixture='influence', mixture_interval=12, mixture_warmup=12,
        probe={'m': 1.0}, probe_rows=16, influence_rows=16, max_epochs=None, mixture_max=0.95,
        learning_rate=5e-4, influence_layers='all', influence_scaling='adam', **model)
    # One process has as many rows in a batch as the two ranks have together.
    one = train(tmp_path / 'one', layout_data, **{**knobs, 'batch_size': 4})
    many = train(
        tmp_path / 'many', layout_data, ranks=ranks, **{**knobs, 'batch_size': 2}, **layout)
    first = one[12]['mixture/weight_a']
    assert first != pytest.approx(0.75, abs=1e-3)
    assert one[25]['mixture/weight_a'] != pytest.approx(first, abs=1e-3)
    compared = ('train/loss', 'mixture/weight', 'mixture/influence_', 'probe/')
    assert_equal_runs(one, many, compared)


def test_self_influence_is_that_of_one_process(tmp_path, layout_data):
    knobs = dict(
        HEADS, max_steps=8, presence='store', presence_layers='all', total_batch_tokens=128)
    one = train(tmp_path / 'one', layout_data, **{**knobs, 'batch_size': 2})
    many = train(tmp_path / 'many', layout_data, ranks=4, tp=2, **knobs)
    assert_equal_runs(one, many, ('train/loss', 'train/grad_norm', 'presence/'))


def test_distillation_under_tensor_parallelism(tmp_path, layout_data):
    train(tmp_path / 'teacher', layout_data, max_steps=12, n_embd=48, **HEADS)
    knobs = dict(
        max_steps=8, teacher=tmp_path / 'teacher', kd_alpha=0.7, kd_temperature=2.0,
        document_mask=False, **HEADS)
    one = train(tmp_path / 'one', layout_data, **knobs)
    two = train(tmp_path / 'two', layout_data, ranks=2, tp=2, **knobs)
    compared = ('train/loss', 'train/grad_norm', 'train/accuracy', 'kd/', 'val/loss')
    assert_equal_runs(one, two, compared)


TASK = '''task: products
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/questions.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{answers}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc}]
'''


def test_text_and_benchmarks_of_a_split_model_are_those_of_a_full_one(tmp_path, trained, capsys):
    # 8 questions with two answers each, and sampled text, from the same weights.
    with open(tmp_path / 'questions.jsonl', 'w') as f:
        for b in range(2, 10):
            a = b + 1
            answers = [f' {a * b},', f' {a * b + 1},']
            question = dict(question=f'{a} times {b} is', answers=answers, gold=0)
            f.write(json.dumps(question) + '\n')
    (tmp_path / 'task.yaml').write_text(TASK.replace('FOLDER', str(tmp_path)))
    data = trained.parent / 'data'
    knobs = dict(
        vocab_size=266, sources={'a': 1.0}, block_size=64, total_batch_tokens=256, n_kv_head=2,
        eval_interval=30, save_interval=30)
    train(tmp_path / 'base', data, max_steps=30, **knobs)
    knobs |= dict(
        init_from=tmp_path / 'base', max_steps=1, learning_rate=1e-9, batch_size=1,
        eval_tasks=f'{tmp_path}/task.yaml', sample_tokens=20, sample_prompt='3 times')
    capsys.readouterr()
    assert run_here(train_command(tmp_path / 'one', data, **knobs)) == 0
    printed_by_one = capsys.readouterr().out
    many = run_ranks(train_command(tmp_path / 'many', data, ranks=2, tp=2, **knobs), 2)
    assert many.returncode == 0, many.stdout[-3000:]
    texts = []
    for printed in (printed_by_one, many.stdout):
        texts.append(printed.split('sample: ')[1].splitlines()[0])
    assert texts[0] == texts[1]
    key = 'eval/products_acc'
    assert metrics(tmp_path / 'one')[0][key] == metrics(tmp_path / 'many')[0][key]


# -- mistakes --------------------------------------------------------------------------------------

def test_sizes_are_resolved_or_refused():
    assert resolve_sizes(64, 2, -1, 4, 2) == dict(dp_replicate=2, dp_shard=4, ep=2, tp=4)
    assert resolve_sizes(4, -1, 1, 2, 1)['dp_replicate'] == 2
    for sizes, part in (
            ((3, 1, 1, 1), 'but 3'),
            ((-1, -1, 1, 1), 'one of them may be -1'),
            ((1, -1, 3, 1), '3 does not divide'),
            ((0, 1, 1, 1), 'at least 1')):
        with pytest.raises(BadInput, match=part):
            resolve_sizes(8, *sizes)


def test_what_cannot_be_divided_is_listed_together():
    sizes = dict(dp_replicate=1, dp_shard=1, ep=2, tp=2)
    config = ModelConfig(
        vocab_size=101, n_layer=2, n_head=3, n_kv_head=3, n_embd=36, ffn_dim=48, n_expert=6,
        n_expert_active=2, expert_ffn_dim=8)
    faults = (
        r'n_head = 3 is not a multiple of tp = 2; n_kv_head = 3 .*vocab_size = 101 .*'
        r'n_expert = 6 is not a multiple of ep \* tp = 4')
    with pytest.raises(BadInput, match=faults):
        check_sizes(sizes, config, 64)
    with pytest.raises(BadInput, match='ep = 2 spreads experts, and this model has none'):
        check_sizes(dict(sizes, tp=1), ModelConfig(n_layer=1), 64)


def test_what_a_layout_cannot_do_is_refused(tmp_path, layout_data):
    muon = dict(optimizer='muon')
    online = dict(mixture='influence', probe={'m': 1.0}, select='online')
    for knobs, part in (
            (muon, "optimizer = 'muon' needs full matrices, and tp = 2 splits them"),
            (online, "select = 'online' measures single rows")):
        command = train_command(tmp_path / 'run', layout_data, ranks=2, tp=2, **knobs, **HEADS)
        assert_one_sentence(run_ranks(command, 2), 2, part)
