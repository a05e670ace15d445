"""Selection of rows: verdicts by hand, dropped rows are not drawn, scores on disk; text that
influence is not made for.
"""

import copy
import json
import os
import pickle
import shutil
import types

from tests.conftest import need

need('orjson', 'isal', 'matplotlib')

import numpy as np
import pytest

from configurator import BadInput, RunFault, configure_script
from data import MixtureLoader, Source, text_warnings
from lib import parts
from methods import selection
from methods.selection import Reference, choose_next, judge
from tests.conftest import ROOT, make_source, metrics, run_here, train, write_shard
from tools import influence_tables

REFERENCE = Reference(influence=1.0, max_loss=4.0, min_different=0.2, max_different=0.9, n_rows=32)


def test_verdicts_by_hand():
    scores = np.array(
        [
            [0.5, 3, 0.5],
            [0.1, 3, 0.5],
            [-1, 3, 0.5],
            [2, 5, 0.5],
            [2, 3, 0.95],
            [2, 3, 0.1],
            [0.11, 3.9, 0.89],
        ]
    )
    keep, reasons = judge(scores, REFERENCE, 0.1, 0.1)
    assert keep.tolist() == [True, False, False, False, False, False, True]
    assert reasons == pytest.approx(dict(influence=2 / 7, loss=1 / 7, tokens=2 / 7))
    assert judge(scores, REFERENCE, 0.0, 0.1)[0].tolist() == [
        True,
        True,
        False,
        False,
        False,
        False,
        True,
    ]  # the paper's rule and the guards
    keep, _ = judge(
        scores, REFERENCE, 100.0, 0.5
    )  # nothing passes: the floor keeps four, the best that the guards pass first
    assert keep.tolist() == [True, True, True, False, False, False, True]
    keep, _ = judge(scores[3:6], REFERENCE, 0.1, 0.1)  # none passes the guards
    assert keep.sum() == 1


def test_different_tokens():
    assert selection.different_tokens(
        np.array([[1, 1, 1, 1], [1, 2, 1, 2], [4, 3, 2, 1]])
    ).tolist() == [0.25, 0.5, 1]


def test_reference_of_probe_rows():
    scores = np.random.default_rng(0).normal([1.0, 3.0, 0.6], [0.3, 0.2, 0.05], (400, 3))
    reference = selection.reference_of(scores)
    assert (reference.influence, reference.max_loss) == pytest.approx((1.0, 3.8), abs=0.05)
    assert (reference.min_different, reference.max_different) == pytest.approx((0.4, 0.8), abs=0.02)
    with pytest.raises(BadInput, match='must be above 0'):
        selection.reference_of(-scores)


def test_rows_are_judged_until_enough_are_kept():
    asked = []

    def score(cursors):  # every third row is good
        asked.extend(cursors)
        return np.array([[1.0 if c % 3 == 0 else 0.0, 3, 0.5] for c in cursors])

    keep, reasons, scores = choose_next(
        score, 100, 50, REFERENCE, dict(select_margin=0.1, select_keep=0.05)
    )
    assert (
        keep.sum() >= 50 and asked == list(range(100, 100 + len(keep))) and len(scores) == len(keep)
    )
    assert keep.tolist() == [c % 3 == 0 for c in asked] and reasons['influence'] == pytest.approx(
        2 / 3, abs=0.01
    )


def test_dropped_rows_are_not_drawn_and_the_state_comes_back(tiny_data):
    def new():
        return MixtureLoader(
            [Source(tiny_data, name, 'train', 16) for name in 'ab'], {'a': 0.5, 'b': 0.5}, 3
        )

    loader, rng = new(), np.random.default_rng(0)
    loader.next_batch(8)
    first, keep = loader.cursors['a'], rng.random(40) < 0.5
    loader.set_keep_mask('a', keep)
    drawn = []
    for i in range(10):
        if i == 2:
            saved = json.loads(json.dumps(loader.state_dict()))
        index, cursors = loader.next_batch(8)
        assert (index == 0).sum() == 4  # the counts follow the weights all the same
        drawn.append(sorted(cursors[index == 0].tolist()))
    kept = [first + i for i in range(40) if keep[i]]
    assert sum(drawn, []) == (kept + list(range(first + 40, 1000)))[:40]
    assert loader.dropped == {'a': 40 - len(kept), 'b': 0} and loader.drawn() == {'a': 44, 'b': 44}
    again = new()
    again.load_state_dict(saved)
    for expected in drawn[2:]:
        index, cursors = again.next_batch(8)
        assert sorted(cursors[index == 0].tolist()) == expected


def test_windows_left_out_for_good(tiny_data):
    source = Source(tiny_data, 'a', 'train', 16, 3)
    before, n = source.fingerprint(), source.n_windows
    keep = np.random.default_rng(0).random(n) < 0.3
    source.keep_windows(keep)
    for epoch in range(2):
        windows = [source.window(epoch * source.n_windows + i) for i in range(source.n_windows)]
        assert sorted(windows) == np.flatnonzero(keep).tolist()
    assert source.fingerprint() != before


# -- text that influence is not made for
# -------------------------------------------------------------------------------


def test_peculiar_text_is_noticed(shared_data):
    from lib.reading import local_files, read_batches, records_of
    from lib.tokenizer import load_tokenizer

    tokenizer, rng, T = (
        load_tokenizer(str(shared_data / 'tokenizers/bpe8k')),
        np.random.default_rng(0),
        256,
    )

    def rows_of(name):
        ids = []
        for batch in read_batches(
            local_files(str(shared_data / 'train' / f'{name}.jsonl.gz'))[0], ['text']
        ):
            ids += [i for _, record in records_of(batch) for i in tokenizer.encode(record['text'])]
            if len(ids) > 65 * T:
                return np.array(ids[: 64 * T]).reshape(64, T)

    for name in ('code', 'web_edu', 'math', 'papers', 'books', 'docs', 'qa', 'wiki'):
        assert text_warnings(rows_of(name), 8192) == [], name
    rows = rows_of('math')
    assert 'shuffled' in text_warnings(rng.permuted(rows.ravel()).reshape(rows.shape), 8192)[0]
    assert 'random' in text_warnings(rng.integers(0, 8192, rows.shape), 8192)[0]
    assert 'repetitions' in text_warnings(np.tile(rows[:8], (8, 1)), 8192)[0]


# -- in a training run
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed_data(tmp_path):
    """A clean source, and one whose rows are by turns clean and random; the probe set is text of
    the clean kind.
    """
    data_dir, rng = tmp_path / 'data', np.random.default_rng(9)
    make_source(data_dir, 'a', 20_000)
    for split, n in (('train', 20_000), ('val', 2_000)):
        make_source(tmp_path / 'more', 'a', n, seed=4)
        half = n // 32 * 16
        clean = Source(tmp_path / 'more', 'a', 'train', 16).rows(range(half // 16))[:, :16]
        rows = np.stack((clean, rng.integers(0, 64, clean.shape)), 1).reshape(
            -1
        )  # windows of 16: clean, random, clean, ...
        write_shard(data_dir / 'half' / split / '0.bin', rows)
    make_source(tmp_path / 'other', 'a', 8_000, seed=5)
    shutil.copytree(tmp_path / 'other' / 'a' / 'train', data_dir / 'probe' / 'kind' / 'probe')
    return data_dir


KNOBS = dict(
    sources={'a': 1.0, 'half': 1.0},
    probe={'kind': 1.0},
    mixture_interval=16,
    mixture_warmup=16,
    batch_size=4,
    total_batch_tokens=256,
    probe_rows=32,
    max_steps=64,
    eval_interval=64,
    save_interval=20,
)


def test_a_run_drops_the_rows_that_do_not_help(mixed_data, tmp_path):
    """Of the source that is half noise about half is kept, and the rows drawn are the clean ones;
    resumed within a round, the same.
    """
    knobs = dict(KNOBS, select='online', schedule='constant')
    by_step = train(tmp_path / 'run', mixed_data, **knobs)
    for at in (16, 32):
        assert 0.3 < by_step[at]['select/kept_half'] < 0.6 and by_step[at]['select/kept_a'] > 0.8
        assert (
            by_step[at]['select/dropped_influence_half'] > 0.4
            and by_step[at]['select/median_a'] > 0.5
        )
    assert by_step[40]['mixture/drawn_half'] == pytest.approx(
        0.5, abs=0.01
    )  # half of the batch, of kept rows alone
    assert (
        by_step[63]['mixture/epochs_half'] > 1.5 * by_step[63]['mixture/epochs_a']
    )  # dropped rows are read over
    fixed = train(tmp_path / 'fixed', mixed_data, **{**knobs, 'select': 'none'})
    assert (
        by_step[15]['train/loss'] == fixed[15]['train/loss']
        and by_step[63]['train/loss'] < fixed[63]['train/loss'] - 0.2
    )
    train(tmp_path / 'cut', mixed_data, **{**knobs, 'max_steps': 40})  # 8 steps into a round
    resumed = train(tmp_path / 'cut', mixed_data, **knobs, resume=True)
    assert [resumed[s]['train/loss'] for s in range(40, 64)] == [
        by_step[s]['train/loss'] for s in range(40, 64)
    ]


def test_selection_and_weights_together_on_two_ranks(mixed_data, tmp_path):
    knobs = dict(
        KNOBS,
        select='online',
        mixture='influence',
        influence_rows=16,
        max_steps=34,
        mixture_max=1.0,
    )
    one = train(tmp_path / 'one', mixed_data, **knobs)
    two = train(tmp_path / 'two', mixed_data, ranks=2, **{**knobs, 'batch_size': 2})
    for at in (16, 32):
        assert two[at]['mixture/asked_a'] == pytest.approx(one[at]['mixture/asked_a'], rel=0.02)
        assert two[at]['select/kept_half'] == pytest.approx(one[at]['select/kept_half'], abs=0.05)


def test_scores_beside_the_shards(mixed_data, tmp_path, monkeypatch, capsys):
    """tools/influence_tables.py score writes them, goes on after a kill, and train.py drops rows by
    them.
    """
    train(tmp_path / 'run', mixed_data, **KNOBS)
    command = [
        'tools/influence_tables.py',
        'score',
        f'--ckpt={tmp_path}/run',
        f'--data_dir={mixed_data}',
        '--sources=a,half',
        "--probe={'kind': 1}",
        '--probe_rows=32',
        f'--out={tmp_path}/influence',
        '--block_size=16',
        '--dtype=float32',
    ]
    assert run_here(command) is None
    assert 'half: 1,2' in capsys.readouterr().out
    folder = mixed_data / 'half' / 'scores'
    scores = np.load(folder / 'part_000000.npy')
    clean, noise = scores[::2, 0], scores[1::2, 0]
    assert np.median(clean) > 0.4 and np.median(noise) < 0.2 and scores.shape[1] == 3
    (folder / 'part_000000.npy').unlink()  # killed before that part was written
    with pytest.raises(BadInput, match='1 of 1 parts of its scores are missing'):
        train(tmp_path / 'early', mixed_data, **KNOBS, select='scores')
    assert run_here(command) is None and np.array_equal(np.load(folder / 'part_000000.npy'), scores)
    by_step = train(tmp_path / 'chosen', mixed_data, **KNOBS, select='scores')
    assert 0.4 < by_step[0]['select/kept_half'] < 0.65 and by_step[0]['select/kept_a'] > 0.8
    assert by_step[63]['train/loss'] < metrics(tmp_path / 'run')[63]['train/loss'] - 0.2
    for other, message in (
        (['--layers=all'], 'other settings (layers'),
        (['--rows=5000'], 'rows = 5000'),
    ):
        with pytest.raises(BadInput) as error:
            run_here(command + other)
        assert message in str(error.value)
    with pytest.raises(BadInput, match='belong to other rows'):
        train(
            tmp_path / 'other_rows',
            mixed_data,
            **{**KNOBS, 'block_size': 32, 'mixture_interval': 32},
            select='scores',
        )


def test_tables_of_influence_and_of_leaving_out(mixed_data, tmp_path, capsys):
    run_dir = tmp_path / 'run'
    train(run_dir, mixed_data, **{**KNOBS, 'save_interval': 32})
    train(tmp_path / 'without', mixed_data, **{**KNOBS, 'sources': {'a': 0.0, 'half': 1.0}})
    common = [
        f'--data_dir={mixed_data}',
        "--probe={'kind': 1, 'again': 1}",
        f'--out={tmp_path}/influence',
        '--probe_rows=64',
        '--dtype=float32',
    ]
    make_source(tmp_path / 'third', 'a', 8_000, seed=6)
    shutil.copytree(tmp_path / 'third' / 'a' / 'train', mixed_data / 'probe' / 'again' / 'probe')
    assert (
        run_here(
            [
                'tools/influence_tables.py',
                'table',
                f'--ckpt={run_dir}/ckpt/*',
                '--sources=a,half',
                '--rows=64',
                *common,
            ]
        )
        is None
    )
    shown = capsys.readouterr().out
    table = json.loads((tmp_path / 'influence/influence_table.json').read_text())
    assert (
        len(table['tables']) == 2
        and table['columns'] == ['kind', 'again', 'mean']
        and 'the t-th counts t' in shown
    )
    for found in table['tables'][1:]:  # a is text of the probe's kind, disjoint from it
        for r, se in zip(found['r']['a'], found['se']['a'], strict=False):
            assert abs(r - 1) < max(3 * se, 0.2)
        assert found['r']['half'][2] < 0.8 * found['r']['a'][2]
    assert (
        sum(table['weights'].values()) == pytest.approx(1)
        and table['weights']['a'] > table['weights']['half']
    )
    assert (tmp_path / 'influence/influence_table.png').stat().st_size > 10_000
    assert (
        run_here(
            [
                'tools/influence_tables.py',
                'table',
                f'--ckpt={run_dir}',
                '--sources=a,half',
                '--scaling=datainf',
                '--rows=32',
                *common,
            ]
        )
        is None
    )
    assert (
        run_here(
            [
                'tools/influence_tables.py',
                'loo',
                f'--ckpt={run_dir}',
                "--without={'a': '" + str(tmp_path / 'without') + "'}",
                *common,
            ]
        )
        is None
    )
    loo = json.loads((tmp_path / 'influence/influence_loo.json').read_text())
    assert (
        loo['delta']['a'][0] > 3 * loo['se']['a'][0] > 0
    )  # without the clean source the model knows less of its kind


def test_a_probe_that_is_trained_on_is_refused(mixed_data, tmp_path):
    shutil.copy(
        mixed_data / 'a' / 'train' / '000001.bin', mixed_data / 'probe' / 'kind' / 'probe' / '9.bin'
    )
    knobs = dict(KNOBS, mixture='influence', influence_rows=16, mixture_max=1.0)
    with pytest.raises(BadInput, match=r"'kind' and source 'a' \(train\) have .* in common"):
        train(tmp_path / 'run', mixed_data, **knobs)
    assert not (tmp_path / 'run').exists()


# -- damage and mistakes ---------------------------------------------------------------------------

ABOUT = dict(
    ckpt='run', step=3, weights='0' * 16, block_size=16, layers='last', seed=0,
    reference=dict(influence=1.0, max_loss=9.0, min_different=0.1, max_different=1.0, n_rows=32))


def score_rows(source, folder, rank=0, world_size=1, score=None):
    """Scores a source as the command does, by numbers that depend on the window alone."""
    def of_windows(cursors):
        windows = np.array([source.window(cursor) for cursor in cursors])
        return np.column_stack((windows / 100, np.full(len(windows), 2.0), windows % 7 / 8 + 0.1))

    run = types.SimpleNamespace(rank=rank, world_size=world_size, is_master=False)
    about = {**ABOUT, 'shards': source.fingerprint()}
    with selection.lock_scores(folder, rank):
        selection.write_scores(folder, about, source, score or of_windows, run)


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """(source 'a', the folder of its scores in three parts)."""
    monkeypatch.setattr(selection, 'PART_ROWS', 100)
    make_source(tmp_path, 'a')
    source = Source(tmp_path, 'a', 'train', 16)
    folder = tmp_path / 'a' / 'scores'
    score_rows(source, str(folder))
    return source, folder


def edit_json(path, **changes):
    """Sets fields of a JSON file. None removes the field."""
    content = json.loads(path.read_text()) | changes
    for key in changes:
        if changes[key] is None:
            del content[key]
    path.write_text(json.dumps(content))


def save_with_hash(folder, array):
    """Another array in the place of part 1, with its sha256: a hand-made file."""
    stem = folder / 'part_000001'
    np.save(f'{stem}.npy', array, allow_pickle=True)
    stem.with_suffix('.json').write_text(json.dumps({'.npy': parts.describe(f'{stem}.npy')}))


def scores_with(row, column, value):
    scores = np.full((100, 3), 0.5, np.float32)
    scores[row, column] = value
    return scores


@pytest.mark.parametrize('spoil, words', [
    (lambda f: (f / 'scores.json').write_text('[1]'), 'scores.json holds a list'),
    (lambda f: (f / 'scores.json').write_bytes(b'\xff\xfe'), 'no valid JSON'),
    (lambda f: edit_json(f / 'scores.json', reference=None), "no field 'reference'"),
    (lambda f: edit_json(f / 'scores.json', reference=[1, 2]), 'reference = .* must be dict'),
    (lambda f: edit_json(f / 'scores.json', reference={'influence': 1.0}), "no field 'max_loss'"),
    (lambda f: edit_json(f / 'scores.json', reference={**ABOUT['reference'], 'influence': -1}),
     'a number that is not possible'),
    (lambda f: edit_json(f / 'scores.json', windows='many'), "windows = 'many' must be int"),
    (lambda f: edit_json(f / 'scores.json', windows=7), 'belong to other rows .windows 7'),
    (lambda f: edit_json(f / 'scores.json', tokenizer='another'), 'other rows .tokenizer another'),
    (lambda f: (f / 'part_000001.npy').unlink(), '1 of 3 parts of its scores are missing'),
    (lambda f: shutil.copy(f / 'part_000000.npy', f / 'part_000003.npy'), 'does not belong'),
    (lambda f: (f / 'part_000001.json').unlink(), 'part_000001.json is missing'),
    (lambda f: (f / 'part_000001.json').write_text('{}'), "has no field '.npy'"),
    (lambda f: os.truncate(f / 'part_000001.npy', 0), 'has 0 bytes, not 1,328'),
    (lambda f: (f / 'part_000001.npy').write_bytes(bytes(1328)), 'the sha256 of .*1.npy is not'),
    (lambda f: save_with_hash(f, scores_with(5, 0, np.nan)), '1.npy holds numbers that are not'),
    (lambda f: save_with_hash(f, scores_with(5, 1, np.inf)), '1.npy holds numbers that are not'),
    (lambda f: save_with_hash(f, scores_with(5, 2, 0.0)), 'row 5 holds .* are no scores'),
    (lambda f: save_with_hash(f, scores_with(5, 1, -1.0)), 'row 5 holds .* are no scores'),
    (lambda f: save_with_hash(f, np.ones((99, 3), np.float32)), r'shape \(99, 3\), not float32'),
    (lambda f: save_with_hash(f, np.ones((100, 3))), 'holds float64 of shape'),
    (lambda f: save_with_hash(f, np.array([{}] * 100)), 'Object arrays cannot be loaded'),
])
def test_damaged_scores_are_refused_by_the_name_of_the_file(scored, spoil, words):
    source, folder = scored
    scores, reference, _ = selection.read_scores(str(folder), source)
    assert scores.shape == (source.n_windows, 3) and reference.influence == 1.0
    assert selection.check_scores(str(folder)) == []
    spoil(folder)
    with pytest.raises(BadInput, match=words) as error:
        selection.read_scores(str(folder), source)
    assert 'again' in str(error.value) or 'restore or delete' in str(error.value)
    if 'tokenizer' not in words:
        assert selection.check_scores(str(folder))


def test_only_damaged_parts_are_scored_again(scored, capsys):
    source, folder = scored
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    asked = []

    def counted(cursors):
        asked.append(len(cursors))
        windows = np.array([source.window(cursor) for cursor in cursors])
        return np.column_stack((windows / 100, np.full(len(windows), 2.0), windows % 7 / 8 + 0.1))

    (folder / 'part_000001.npy').write_bytes(bytes(1328))
    score_rows(source, str(folder), score=counted)
    assert asked == [100]
    # Those of a version without sha256 are checked and kept.
    for path in folder.glob('part_*.json'):
        path.unlink()
    edit_json(folder / 'scores.json', weights=None, tokenizer=None)
    score_rows(source, str(folder), score=counted)
    assert asked == [100] and 'records weights and tokenizer now' in capsys.readouterr().out
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {**after, 'scores.json': 0} == {**before, 'scores.json': 0}
    assert json.loads(after['scores.json']) == json.loads(before['scores.json'])


def test_scoring_has_one_writer_and_no_nan(scored):
    source, folder = scored
    (folder / 'part_000001.npy').unlink()
    with selection.lock_scores(str(folder), 0):
        with pytest.raises(BadInput, match='another process is writing to .*scores'):
            score_rows(source, str(folder))
        score_rows(source, str(folder), rank=1, world_size=2)       # another rank of one launch
    assert (folder / 'part_000001.npy').exists()
    (folder / 'part_000001.npy').unlink()
    with pytest.raises(RunFault, match='part_000001.npy: 100 of 100 rows have scores that are not'):
        score_rows(source, str(folder), score=lambda cursors: np.full((len(cursors), 3), np.nan))
    with pytest.raises(BadInput, match='train holds 000000.bin, so it is no folder of scores'):
        selection.lock_scores(str(folder.parent / 'train'), 0)


class Harmless:
    def __reduce__(self):
        return print, ('executed',)


def test_pickled_arrays_are_never_loaded(tmp_path, capsys):
    (tmp_path / 'x.npy').write_bytes(pickle.dumps(Harmless()))
    np.save(tmp_path / 'y.npy', np.array([Harmless()]), allow_pickle=True)
    for name in 'xy':
        with pytest.raises(BadInput, match=f'{name}.npy is no intact .npy file'):
            parts.read_array(str(tmp_path / f'{name}.npy'), None, (1,), '')
    assert capsys.readouterr().out == ''


@pytest.fixture(scope='module')
def pair():
    """find_model's dicts of a run on three sources, and of one that left 'b' out."""
    config = configure_script(str(ROOT / 'train.py'), [])
    config |= dict(sources={'a': 0.5, 'b': 0.3, 'c': 0.2}, max_steps=60, out_dir='full')
    full = dict(config=config, step=60, loader=dict(fingerprints=dict(a='1', b='2', c='3')))
    less = copy.deepcopy(full)
    less['config'] |= dict(sources={'a': 5.0, 'b': 0.0, 'c': 2.0}, out_dir='less', keep_last=9)
    return dict(checkpoint='x', state=full), dict(checkpoint='y', state=less)


@pytest.mark.parametrize('change, words', [
    (dict(sources={'a': 5.0, 'c': 2.0}), None),
    (dict(sources={'a': 0.714, 'c': 0.286}, eval_interval=3, tp=2), None),
    (dict(sources={'a': 0.5, 'b': 0.3, 'c': 0.2}), "'less' was trained on 'b' as well"),
    (dict(sources={'a': 1.0}), "more than 'b': also by c"),
    (dict(sources={'a': 5.0, 'c': 2.0, 'd': 1.0}), "more than 'b': also by d"),
    (dict(sources={'a': 2.0, 'c': 5.0}), 'weights of .* a, c got more or less'),
    (dict(seed=1), 'seed 1337 and 1'), (dict(n_layer=3), 'n_layer 15 and 3'),
    (dict(learning_rate=0.1, batch_size=2), 'batch_size 16 and 2; learning_rate 0.004 and 0.1'),
    (dict(max_steps=61), 'max_steps 60 and 61'), (dict(init_from='z'), "init_from None and 'z'"),
])
def test_loo_compares_runs_that_differ_by_the_source_alone(pair, change, words):
    full, less = copy.deepcopy(pair)
    less['state']['config'] |= change
    runs = {'': 'full', 'b': 'less'}
    if words is None:
        influence_tables.check_pair('b', runs, {'': full, 'b': less})
        return
    with pytest.raises(BadInput, match=words):
        influence_tables.check_pair('b', runs, {'': full, 'b': less})


def test_loo_needs_two_finished_runs_of_the_same_data(pair):
    runs = {'': 'full', 'b': 'less', 'd': 'less'}

    def refused(words, name='b', step=60, other_step=60, **changes):
        full, less = copy.deepcopy(pair)
        full['state']['step'] = step
        less['state']['step'] = other_step
        less['state'] |= changes.get('state', {})
        less |= changes.get('about', {})
        with pytest.raises(BadInput, match=words):
            influence_tables.check_pair(name, runs, {'': full, 'b': less, 'd': less})

    refused("'full' was not trained on 'd', only on a, b, c", name='d')
    refused("'full' is at step 60, 'less' at step 40", other_step=40)
    refused('are at step 40 of 60. Finish both', step=40, other_step=40)
    refused("'less' is an imported model", about=dict(checkpoint=None))
    refused("'less' is an imported model", state=dict(config=None))
    refused('different shards of c', state=dict(loader=dict(fingerprints=dict(a='1', c='9'))))


def test_checkpoints_of_a_table_are_of_one_model_and_in_order(capsys):
    def about(step, model='m', run='r'):
        path = f'{run}/ckpt/step_{step}'
        return dict(
            model=model, fingerprint='f', checkpoint=path, folder=run, state=dict(step=step))

    given = {'x': about(1_000_000), 'y': about(999_999)}
    assert list(influence_tables.in_order(given)) == ['y', 'x']
    assert 'in the order of their steps: y, x' in capsys.readouterr().out
    stages = {'x': about(9, run='stage1'), 'y': about(5, run='stage2')}
    assert list(influence_tables.in_order(stages)) == ['x', 'y']
    with pytest.raises(BadInput, match="'y' is another model than 'x'"):
        influence_tables.in_order({'x': about(1), 'y': about(2, model='n')})
    with pytest.raises(BadInput, match="'y' and 'x' are the same checkpoint"):
        influence_tables.in_order({'x': about(1), 'y': about(1)})
