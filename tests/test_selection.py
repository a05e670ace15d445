"""Selection of rows: verdicts by hand, dropped rows are not drawn, scores on disk; text that
influence is not made for.
"""

import json
import shutil

import numpy as np
import pytest

import data
from configurator import BadInput
from data import MixtureLoader, Source, shared_documents, text_warnings
from methods import selection
from methods.selection import Reference, choose_next, judge
from tests.conftest import make_source, metrics, run_here, train, write_shard

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


@pytest.mark.parametrize('bos', [0, None])
def test_documents_in_two_places_are_found(tmp_path, bos):
    rng = np.random.default_rng(0)

    def document(n=400):
        return np.concatenate(([0], rng.integers(1, 64, n)))

    shared = [document(), document()]
    for name, split, documents in (
        ('probe/x', 'probe', [document(), shared[0], document(30), shared[1]]),
        ('a', 'train', [document() for _ in range(30)] + [shared[1], document(), shared[0]]),
        ('b', 'train', [document() for _ in range(40)]),
    ):
        if bos is None:  # aligned pieces: a copied file
            documents = (
                [np.concatenate(shared)] + documents if name in ('probe/x', 'a') else documents
            )
        write_shard(tmp_path / name / split / '0.bin', np.concatenate(documents))
    probe = Source(tmp_path, 'probe/x', 'probe', 16)
    assert shared_documents(probe, Source(tmp_path, 'b', 'train', 16), bos) == 0
    n = [
        shared_documents(probe, Source(tmp_path, 'a', 'train', 16), bos, rank, 2)
        for rank in range(2)
    ]
    assert sum(n) == (2 if bos == 0 else 3)
    assert (
        shared_documents(
            Source(tmp_path, 'a', 'train', 16), Source(tmp_path, 'a', 'train', 16), bos
        )
        > 30 - 1
        and data.PIECE == 256
    )


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
