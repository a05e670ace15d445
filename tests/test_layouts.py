"""Layouts of ranks against one process: losses, gradient norms, checkpoints across them, and what runs beside training."""
import json
import shutil

import numpy as np
import pytest

from configurator import BadInput
from model import ModelConfig
from ops.ranks import check_sizes, resolve_sizes
from tests.conftest import (
    assert_one_sentence,
    make_source,
    metrics,
    run_here,
    run_ranks,
    train,
    train_command,
    write_shard,
)

HEADS = dict(n_head=4, n_kv_head=2, qk_norm=True, batch_size=1)
EXPERTS = dict(n_expert=4, n_expert_active=2, expert_ffn_dim=16, n_shared_expert=1, n_dense_layer=1, balance_loss=0.01)


def write_data(folder):
    """Sources 'a' and 'b', and a probe set 'm' that is more like one of them."""
    make_source(folder, 'a')
    make_source(folder, 'b')
    noisy = np.random.default_rng(5)
    write_shard(folder / 'probe/m/probe/0.bin', np.cumsum(np.where(noisy.random(1600) < 0.9, 3, noisy.integers(0, 64, 1600))) % 64)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('layouts') / 'data'
    write_data(folder)
    return folder


def assert_equal_runs(one, other, keys=('train/loss', 'train/grad_norm', 'val/loss'), tolerance=1e-4):
    compared = 0
    for step in one:
        for key in one[step]:
            if key.startswith(keys):
                assert other[step][key] == pytest.approx(one[step][key], rel=tolerance, abs=1e-7), (step, key)
                compared += 1
    assert compared > 20


@pytest.mark.parametrize('ranks, layout, model', [
    (2, dict(tp=2), {}),
    (2, dict(tp=2, activation_checkpointing='selective'), dict(tie_embeddings=False, layer_repeat=2, qkv_bias=True)),
    (4, dict(dp_replicate=2, reshard_after_forward=True), dict(total_batch_tokens=128)),
    (2, dict(ep=2, activation_checkpointing='selective'), EXPERTS),
    (4, dict(ep=2, dp_shard=2), EXPERTS)])
def test_every_layout_trains_as_one_process_does(tmp_path, data, ranks, layout, model):
    knobs = dict(max_steps=12, eval_interval=6, save_interval=100, **HEADS, **model)
    one = train(tmp_path / 'one', data, **knobs)
    many = train(tmp_path / 'many', data, ranks=ranks, **knobs, **layout)
    assert_equal_runs(one, many)
    if 'n_expert' in model:
        assert [many[s]['moe/imbalance'] for s in range(12)] == pytest.approx([one[s]['moe/imbalance'] for s in range(12)], abs=1e-6)


def test_bf16_over_ranks_is_within_noise(tmp_path, data):
    knobs = dict(max_steps=12, eval_interval=6, dtype='bfloat16', **HEADS, **EXPERTS)
    one = train(tmp_path / 'one', data, **knobs)
    many = train(tmp_path / 'many', data, ranks=2, tp=2, **knobs)
    assert_equal_runs(one, many, ('train/loss', 'val/loss'), 0.02)


def test_a_compiled_run_under_tensor_parallelism_is_the_same(tmp_path, data):
    if shutil.which('g++') is None:
        pytest.skip('torch.compile on the CPU needs a C++ compiler, g++ is not here')
    knobs = dict(max_steps=8, **HEADS)
    assert_equal_runs(train(tmp_path / 'one', data, **knobs), train(tmp_path / 'two', data, ranks=2, tp=2, compile=True, **knobs))


def go_on_in_turns(tmp_path, data, layouts, **knobs):
    """A run that changes its layout every three steps ends as one process that never stopped."""
    knobs = dict(schedule='constant', eval_interval=3, save_interval=3, keep_last=0, **HEADS, **knobs)
    whole = train(tmp_path / 'whole', data, max_steps=3 * len(layouts), **knobs)
    for i, (ranks, layout) in enumerate(layouts):
        changed = train(tmp_path / 'run', data, ranks=ranks, max_steps=3 * (i + 1), resume=True, **knobs, **layout)
    assert_equal_runs(whole, changed)


def test_checkpoints_pass_from_layout_to_layout(tmp_path, data):
    go_on_in_turns(tmp_path, data, [(2, dict(tp=2)), (1, {}), (4, dict(tp=2)), (2, dict(dp_shard=2))])


def test_checkpoints_of_experts_pass_from_layout_to_layout(tmp_path, data):
    go_on_in_turns(tmp_path, data, [(2, dict(ep=2)), (1, {}), (4, dict(ep=2, tp=2))], **EXPERTS)


@pytest.mark.parametrize('ranks, layout, model', [(4, dict(tp=2), {}), (2, dict(ep=2), EXPERTS)])
def test_influence_moves_the_weights_as_in_one_process(tmp_path, data, ranks, layout, model):
    knobs = dict(max_steps=26, mixture='influence', mixture_interval=12, mixture_warmup=12, probe={'m': 1.0}, probe_rows=16, influence_rows=16, max_epochs=None,
                 mixture_max=0.95, learning_rate=5e-4, influence_layers='all', influence_scaling='adam', **{**HEADS, 'batch_size': 2}, **model)
    one = train(tmp_path / 'one', data, **{**knobs, 'batch_size': 4})           # as many rows in a batch as of both ranks
    many = train(tmp_path / 'many', data, ranks=ranks, **knobs, **layout)
    assert one[12]['mixture/weight_a'] != pytest.approx(0.75, abs=1e-3) and one[25]['mixture/weight_a'] != pytest.approx(one[12]['mixture/weight_a'], abs=1e-3)
    assert_equal_runs(one, many, ('train/loss', 'mixture/weight', 'mixture/influence_', 'probe/'))


def test_self_influence_is_that_of_one_process(tmp_path, data):
    knobs = dict(max_steps=8, presence='store', presence_layers='all', total_batch_tokens=128, **HEADS)
    one = train(tmp_path / 'one', data, **{**knobs, 'batch_size': 2})
    many = train(tmp_path / 'many', data, ranks=4, tp=2, **knobs)
    assert_equal_runs(one, many, ('train/loss', 'train/grad_norm', 'presence/'))


def test_distillation_and_text_under_tensor_parallelism(tmp_path, data):
    train(tmp_path / 'teacher', data, max_steps=12, **{**HEADS, 'n_embd': 48})
    knobs = dict(max_steps=8, teacher=tmp_path / 'teacher', kd_alpha=0.7, kd_temperature=2.0, document_mask=False, **HEADS)
    one = train(tmp_path / 'one', data, **knobs)
    two = train(tmp_path / 'two', data, ranks=2, tp=2, **knobs)
    assert_equal_runs(one, two, ('train/loss', 'train/grad_norm', 'train/accuracy', 'kd/', 'val/loss'))


def test_text_and_benchmarks_of_a_split_model_are_those_of_a_whole_one(tmp_path, trained, capsys):
    # 8 questions of two answers, and text by sampling, from the same weights
    questions = [dict(question=f'{a} times {b} is', answers=[f' {a * b},', f' {a * b + 1},'], gold=0) for a, b in zip(range(3, 11), range(2, 10))]
    (tmp_path / 'questions.jsonl').write_text(''.join(json.dumps(q) + '\n' for q in questions))
    (tmp_path / 'task.yaml').write_text(f'''task: products
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/questions.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{answers}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}]
''')
    knobs = dict(vocab_size=266, sources={'a': 1.0}, block_size=64, total_batch_tokens=256, n_kv_head=2, eval_interval=30, save_interval=30)
    train(tmp_path / 'base', trained.parent / 'data', max_steps=30, **knobs)
    knobs |= dict(init_from=tmp_path / 'base', max_steps=1, learning_rate=1e-9, eval_tasks=f'{tmp_path}/task.yaml', batch_size=1, sample_tokens=20,
                  sample_prompt='3 times')
    said, found = [], []
    for name, ranks, layout in (('one', 1, {}), ('many', 2, dict(tp=2))):
        command = train_command(tmp_path / name, trained.parent / 'data', ranks=ranks, **knobs, **layout)
        capsys.readouterr()
        if ranks == 1:
            assert run_here(command) == 0
            out = capsys.readouterr().out
        else:
            done = run_ranks(command, ranks)
            out = done.stdout
            assert done.returncode == 0, out[-3000:]
        said.append(out.split('sample: ')[1].splitlines()[0])
        found.append(metrics(tmp_path / name)[0]['eval/products_acc'])
    assert said[0] == said[1] and found[0] == found[1]


# -- mistakes ----------------------------------------------------------------------------------------------------------

def test_sizes_are_resolved_or_refused():
    assert resolve_sizes(64, 2, -1, 4, 2) == dict(dp_replicate=2, dp_shard=4, ep=2, tp=4)
    assert resolve_sizes(4, -1, 1, 2, 1)['dp_replicate'] == 2
    for sizes, part in (((3, 1, 1, 1), 'but 3'), ((-1, -1, 1, 1), 'one of them may be -1'), ((1, -1, 3, 1), '3 does not divide'), ((0, 1, 1, 1), 'at least 1')):
        with pytest.raises(BadInput, match=part):
            resolve_sizes(8, *sizes)


def test_what_cannot_be_divided_is_listed_together():
    sizes = dict(dp_replicate=1, dp_shard=1, ep=2, tp=2)
    config = ModelConfig(vocab_size=101, n_layer=2, n_head=3, n_kv_head=3, n_embd=36, ffn_dim=48, n_expert=6, n_expert_active=2, expert_ffn_dim=8)
    with pytest.raises(BadInput, match=r'n_head = 3 is not a multiple of tp = 2; n_kv_head = 3 .*vocab_size = 101 .*n_expert = 6 is not a multiple of ep \* tp = 4'):
        check_sizes(sizes, config, 64)
    with pytest.raises(BadInput, match='ep = 2 spreads experts, and this model has none'):
        check_sizes(dict(sizes, tp=1), ModelConfig(n_layer=1), 64)


def test_what_a_layout_cannot_do_is_refused(tmp_path, data):
    for knobs, part in ((dict(optimizer='muon'), "optimizer = 'muon' needs whole matrices, and tp = 2 splits them"),
                        (dict(mixture='influence', probe={'m': 1.0}, select='online'), "select = 'online' looks at single rows")):
        command = train_command(tmp_path / 'run', data, ranks=2, tp=2, **knobs, **HEADS)
        assert_one_sentence(run_ranks(command, 2), 2, part)
