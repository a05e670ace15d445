import json
import random
import struct

import numpy as np
import pytest
import torch

from configurator import BadInput
from data import (
    Feeder,
    MixtureLoader,
    Source,
    check_weights,
    common_tokenizer,
    derive_keys,
    document_ids,
    permute,
)
from lib.shards import open_shard, read_header, shard_bytes
from tests.conftest import list_shards, make_source, write_shard


def test_shard_written_by_hand_in_llm_c_format_is_read(tmp_path):
    # llm.c: 256 little-endian int32, of which magic 20240520, version 1, number of tokens; then
    # uint16 tokens
    folder = tmp_path / 'x' / 'train'
    folder.mkdir(parents=True)
    (folder / 'fineweb_train_000001.bin').write_bytes(
        struct.pack('<256i', 20240520, 1, 6, *[0] * 253)
        + struct.pack('<6H', 50256, 1, 2, 65535, 4, 5)
    )
    source = Source(tmp_path, 'x', 'train', block_size=2)
    assert source.n_windows == 2
    assert sorted(source.rows([0, 1]).tolist()) == [[2, 65535, 4], [50256, 1, 2]]


@pytest.mark.parametrize(
    'vocab_size, kind, magic, version', [(50257, 'H', 20240520, 1), (128256, 'I', 20240801, 7)]
)
def test_our_shards_are_read_by_an_independent_reader(tmp_path, vocab_size, kind, magic, version):
    tokens = [0, 7, vocab_size - 1, 3]
    path = tmp_path / 'a.bin'
    path.write_bytes(b''.join(shard_bytes(tokens, vocab_size)))
    content = path.read_bytes()
    header = struct.unpack_from('<256i', content)
    assert header[:3] == (magic, version, 4) and not any(header[3:])
    assert list(struct.unpack_from(f'<4{kind}', content, 1024)) == tokens
    assert len(content) == 1024 + 4 * struct.calcsize(kind)
    assert open_shard(str(path)).tolist() == tokens


@pytest.mark.parametrize('n', [1, 2, 3, 10, 64, 1000, 4097])
def test_permutation_is_a_bijection_that_depends_on_its_key(n):
    a, b = (permute(np.arange(n), n, derive_keys(4, key)) for key in ('a', 'b'))
    assert sorted(a) == list(range(n)) == sorted(b)
    if n >= 64:
        assert a.tolist() != b.tolist()
        assert abs(np.corrcoef(a, np.arange(n))[0, 1]) < 0.25


def test_every_window_is_seen_once_per_epoch_in_another_order_each_time(tmp_path):
    write_shard(
        tmp_path / 'x/train/0.bin', np.arange(0, 501), 1000
    )  # windows of 10: 50, then 30 of the next shard
    write_shard(tmp_path / 'x/train/1.bin', np.arange(501, 807), 1000)
    source = Source(tmp_path, 'x', 'train', block_size=10, seed=3)
    assert source.n_windows == 80
    epochs = [source.rows(range(80 * e, 80 * e + 80))[:, 0].tolist() for e in range(2)]
    expected = [*range(0, 500, 10), *range(501, 801, 10)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == expected
    assert epochs[0] != epochs[1] != expected
    rows = source.rows(range(80))
    assert (np.diff(rows, axis=1) == 1).all() and rows.shape == (
        80,
        11,
    )  # a window never runs over a shard's end


def loader_of(tmp_path, weights, n_tokens=20_000, seed=0):
    for name in weights:
        if not (tmp_path / name).exists():
            make_source(tmp_path, name, n_tokens)
    return MixtureLoader(
        [Source(tmp_path, name, 'train', 16, seed) for name in weights], weights, seed
    )


class Endless:
    """A source of which only the name matters: the mixture's arithmetic reads nothing."""

    def __init__(self, name):
        self.name = name


@pytest.mark.parametrize('trial', range(40))
def test_counts_stay_within_one_row_of_the_weights_at_every_step(trial):
    rng = random.Random(trial)
    names = [f's{i}' for i in range(rng.randint(2, 15))]
    weights = {name: rng.random() ** rng.choice([1, 3, 8]) + 1e-4 for name in names}
    loader = MixtureLoader([Endless(name) for name in names], weights)
    total, n_rows, sum_weights = 0, rng.choice([1, 3, 8, 64]), sum(weights.values())
    for _ in range(300):
        loader.next_batch(n_rows)
        total += n_rows
        for name in names:
            assert abs(loader.cursors[name] - total * weights[name] / sum_weights) < 1


def test_new_weights_are_obeyed_by_the_next_batch_and_what_is_owed_stays_small():
    names = list('abcde')
    loader = MixtureLoader([Endless(n) for n in names], dict.fromkeys(names, 1.0))
    rng = random.Random(0)
    for _ in range(200):
        weights = {n: rng.random() for n in names}
        before = dict(loader.cursors)
        loader.set_weights(weights)
        loader.next_batch(20)
        for n in names:
            assert (
                abs(loader.cursors[n] - before[n] - 20 * weights[n] / sum(weights.values())) < 2.5
            )
    loader.set_weights({'a': 1, 'b': 0, 'c': 0, 'd': 0, 'e': 0})
    before = dict(loader.cursors)
    loader.next_batch(64)
    assert {n: loader.cursors[n] - before[n] for n in names} == {
        'a': 64,
        'b': 0,
        'c': 0,
        'd': 0,
        'e': 0,
    }


def test_global_batch_does_not_depend_on_the_number_of_ranks(tmp_path):
    weights = {'a': 0.5, 'b': 0.3, 'c': 0.2}
    whole = loader_of(tmp_path, weights)
    index, cursor = whole.next_batch(24)
    batch = whole.read(index, cursor)
    for world_size, batch_size in ((1, 8), (2, 4), (4, 2), (3, 8)):
        parts = [rows_of_rank(index, batch_size, rank, world_size) for rank in range(world_size)]
        assert sorted(np.concatenate(parts)) == list(range(24))
        for part in parts:
            assert np.array_equal(whole.read(index[part], cursor[part]), batch[part])
    # In every micro-step the ranks together hold the rows of one process with the larger batch.
    assert rows_of_rank(np.zeros(8), 2, 0, 2).tolist() == [0, 1, 4, 5]
    assert rows_of_rank(np.zeros(8), 2, 1, 2).tolist() == [2, 3, 6, 7]


def rows_of_rank(source_index, batch_size, rank, world_size):
    """Positions in the global batch that a rank trains on, in the order of its micro-steps."""
    feeder = Feeder(torch.device('cpu'), batch_size, rank, world_size)
    parts = list(feeder.parts(source_index, by_source=False))
    assert not any(fill.any() for _, fill in parts)
    return np.concatenate([rows for rows, _ in parts])


@pytest.mark.parametrize('world_size', [1, 2, 3])
def test_micro_batches_by_source_hold_every_row_once(tmp_path, world_size):
    loader = loader_of(tmp_path, {'a': 0.5, 'b': 0.3, 'c': 0.2})
    batch = loader.next_batch(24)
    rows = loader.read(*batch)
    seen = []
    counts = set()
    for rank in range(world_size):
        feeder = Feeder(torch.device('cpu'), 4, rank, world_size)
        micro_batches = feeder.split(loader, batch, by_source=True)
        counts.add(len(micro_batches))
        for micro in micro_batches:
            assert len(set(micro.source_index)) == 1 and len(micro.inputs) == 4
            supervised = (micro.targets >= 0).any(1).numpy()
            assert micro.n_valid == (micro.targets >= 0).sum()
            seen += zip(micro.source_index[supervised], micro.cursors[supervised], strict=False)
    assert len(counts) == 1  # every rank has the same number of them
    assert sorted(seen) == sorted(zip(*batch, strict=False)) and len(seen) == len(rows)


def test_state_of_a_few_integers_continues_the_same_batches(tmp_path):
    weights = {'a': 0.5, 'b': 0.3, 'c': 0.2}
    one = loader_of(tmp_path, weights)
    for _ in range(7):
        one.next_batch(9)
    one.set_weights({'a': 0.1, 'b': 0.1, 'c': 0.8})
    one.next_batch(9)
    state = json.loads(json.dumps(one.state_dict()))
    two = loader_of(tmp_path, weights)
    two.load_state_dict(state)
    for _ in range(5):
        a, b = one.next_batch(9), two.next_batch(9)
        assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])
        assert np.array_equal(one.read(*a), two.read(*b))
    assert all(
        isinstance(v, int) for key in ('cursors', 'credits', 'units') for v in state[key].values()
    )


def test_rows_of_a_batch_come_from_the_sources_that_it_names(tmp_path):
    write_shard(tmp_path / 'low/train/0.bin', np.full(4000, 1))
    write_shard(tmp_path / 'high/train/0.bin', np.full(4000, 2))
    loader = MixtureLoader(
        [Source(tmp_path, n, 'train', 16) for n in ('low', 'high')], {'low': 3, 'high': 1}
    )
    index, cursor = loader.next_batch(100)
    assert np.array_equal(loader.read(index, cursor)[:, 0], np.where(index == 0, 1, 2))
    assert (index == 0).sum() == 75 and 0 < np.flatnonzero(index)[
        0
    ] < 30  # shuffled within the batch


def test_resuming_with_other_shards_is_refused(tmp_path):
    loader = loader_of(tmp_path, {'a': 1, 'b': 1})
    state = loader.state_dict()
    make_source(tmp_path, 'b', 20_000, seed=1)
    open_shard.cache_clear()  # another process would read the new file
    changed = loader_of(tmp_path, {'a': 1, 'b': 1})
    with pytest.raises(BadInput, match="shards of source 'b'.*changed"):
        changed.load_state_dict(state)
    with pytest.raises(BadInput, match='sources are'):
        loader_of(tmp_path, {'a': 1, 'c': 1}).load_state_dict(state)


def test_epochs_are_counted(tmp_path):
    loader = loader_of(tmp_path, {'a': 1})
    loader.next_batch(3 * loader.sources['a'].n_windows // 2)
    assert abs(loader.epochs()['a'] - 1.5) < 0.01


def test_document_ids_count_the_beginnings():
    assert document_ids(np.array([[5, 0, 5, 5, 0, 0], [0, 1, 1, 1, 1, 1]]), 0).tolist() == [
        [0, 1, 1, 1, 2, 3],
        [1] * 6,
    ]


@pytest.mark.parametrize(
    'damage, message',
    [
        (lambda b: b[:-20], 'truncated'),
        (lambda b: b + b'xx' * 3, 'damaged'),
        (lambda b: b[:100], 'no token shard'),
        (lambda b: b'', 'no token shard'),
        (lambda b: b'GGUF' + b[4:], 'no token shard'),
    ],
)
def test_damaged_and_foreign_shards_are_refused(tmp_path, damage, message):
    header, body = shard_bytes(np.arange(100), 64)
    path = tmp_path / 'bad.bin'
    path.write_bytes(damage(header + body))
    with pytest.raises(BadInput, match=message) as error:
        read_header(str(path))
    assert str(path) in str(error.value)


def test_token_ids_beyond_the_vocabulary_are_refused_by_source(tmp_path):
    make_source(tmp_path, 'good')
    write_shard(tmp_path / 'bad/train/0.bin', np.full(4000, 900), 1000)
    loader = MixtureLoader(
        [Source(tmp_path, n, 'train', 16, vocab_size=64) for n in ('good', 'bad')],
        {'good': 1, 'bad': 1},
    )
    with pytest.raises(BadInput, match="'bad'.*token id 900.*vocab_size is 64"):
        loader.read(*loader.next_batch(8))


@pytest.mark.parametrize(
    'weights, message',
    [
        ({'a': 1, 'bb': 1}, "'bb'"),
        ({'a': 1}, 'missing for the source.* b'),
        ({'a': 1, 'b': -1}, 'negative'),
        ({'a': 0, 'b': 0}, 'sum to more than 0'),
        ({'a': float('nan'), 'b': 1}, 'finite'),
    ],
)
def test_impossible_weights_are_refused(weights, message):
    with pytest.raises(BadInput, match=message):
        check_weights(weights, ['a', 'b'])


def test_missing_folders_empty_splits_and_short_sources_are_refused(tmp_path):
    make_source(tmp_path, 'fineweb')
    with pytest.raises(BadInput, match="Did you mean 'fineweb'"):
        Source(tmp_path, 'fineweeb', 'train', 16)
    with pytest.raises(BadInput, match='holds no'):
        Source(tmp_path, 'fineweb', 'test', 16)
    with pytest.raises(BadInput, match='do not fill one window'):
        Source(tmp_path, 'fineweb', 'train', 4000)
    (tmp_path / 'fineweb/progress').mkdir()
    with pytest.raises(BadInput, match='half prepared'):
        Source(tmp_path, 'fineweb', 'train', 16)


def test_two_tokenizers_in_one_run_are_refused(tmp_path):
    sources = []
    for name, fingerprint in (('a', '1234'), ('b', '5678')):
        make_source(tmp_path, name)
        (tmp_path / name / 'meta.json').write_text(
            json.dumps(
                dict(
                    vocab_size=64,
                    shards=list_shards(tmp_path / name),
                    tokenizer=dict(name=name + '.json', fingerprint=fingerprint, bos_id=0),
                )
            )
        )
        sources.append(Source(tmp_path, name, 'train', 16))
    assert common_tokenizer(sources[:1])['fingerprint'] == '1234'
    with pytest.raises(BadInput, match="'b'.*b.json.*5678.*'a'.*1234"):
        common_tokenizer(sources)
    with pytest.raises(BadInput, match='vocabulary of 64, the model'):
        Source(tmp_path, 'a', 'train', 16, vocab_size=32)
