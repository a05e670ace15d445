"""source_rows: a run that uses a part of a source."""
import types

import numpy as np
import pytest

from configurator import BadInput
from data import MixtureLoader, Source, limit_rows
from methods.reweight import epoch_caps
from tests.conftest import make_source, train


def windows_of(source, n_epochs=1):
    return [source.window(cursor) for cursor in range(n_epochs * source.n_windows)]


def limited(data_dir, n, seed=0, name='a'):
    source = Source(data_dir, name, 'train', 16, seed)
    source.limit_windows(n)
    return source


def test_a_subset_is_read_once_per_epoch_in_another_order(tiny_data):
    full = Source(tiny_data, 'a', 'train', 16)
    source = limited(tiny_data, 50)
    assert full.n_windows == 248 and source.n_windows == 50
    windows = windows_of(source, 3)
    epochs = [windows[i:i + 50] for i in (0, 50, 100)]
    assert len(set(epochs[0])) == 50
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    # Its rows are those of the full source.
    rows = np.empty((2, 17), np.int32)
    source.read(7, rows[0])
    full.read_window(epochs[0][7], rows[1])
    assert (rows[0] == rows[1]).all()


def test_a_subset_depends_on_its_source_alone(tiny_data):
    """Seeds order it otherwise, and a smaller one is a part of a larger one."""
    one = windows_of(limited(tiny_data, 50, seed=0))
    two = windows_of(limited(tiny_data, 50, seed=1))
    assert one != two and set(one) == set(two)
    assert set(windows_of(limited(tiny_data, 20))) < set(one)
    assert set(windows_of(limited(tiny_data, 50, name='b'))) != set(one)
    # It is spread over the source: both shards of 124 windows have about half of it.
    assert 15 <= sum(window < 124 for window in one) <= 35


def test_a_subset_of_selected_rows(tiny_data):
    source = Source(tiny_data, 'a', 'train', 16)
    keep = np.arange(248) % 3 == 0
    source.keep_windows(keep)
    before = source.fingerprint()
    source.limit_windows(30)
    windows = windows_of(source)
    assert len(set(windows)) == 30 and keep[windows].all()
    assert source.fingerprint() != before


def test_epochs_and_max_epochs_count_the_subset(tiny_data):
    sources = [Source(tiny_data, name, 'train', 16) for name in 'ab']
    limit_rows(sources, {'a': 40, 'b': 248})
    assert sources[1].kept is None          # all rows: nothing to keep apart
    loader = MixtureLoader(sources, {'a': 1.0, 'b': 1.0})
    loader.next_batch(40)
    assert loader.epochs() == {'a': 20 / 40, 'b': 20 / 248}
    training = types.SimpleNamespace(
        loader=loader, names=['a', 'b'], config=dict(max_epochs=2.0), rows_after=lambda step: 120)
    # 2 epochs of 40 rows less the 20 that were read, of 120 rows to come.
    assert epoch_caps(training, 0) == pytest.approx({'a': 60 / 120, 'b': 1.0})


def test_a_run_on_a_subset_resumes_to_the_bit(tiny_data, tmp_path):
    knobs = dict(source_rows={'a': 20}, schedule='constant')
    whole = train(tmp_path / 'whole', tiny_data, **knobs)
    assert whole[11]['mixture/epochs_a'] == 36 / 20         # 3 of 4 rows in 12 steps
    assert whole[11]['mixture/epochs_b'] == 12 / 248
    full = train(tmp_path / 'full', tiny_data, **{**knobs, 'source_rows': {}, 'max_steps': 1})
    assert full[0]['val/loss'] == whole[0]['val/loss']      # validation rows are the same
    train(tmp_path / 'cut', tiny_data, **{**knobs, 'max_steps': 8})
    resumed = train(tmp_path / 'cut', tiny_data, **knobs, resume=True)
    for step in (8, 11):
        assert resumed[step]['train/loss'] == whole[step]['train/loss']
    # With another subset the cursors of the checkpoint would mean other rows.
    changed = {**knobs, 'source_rows': {'a': 21}, 'max_steps': 14}
    with pytest.raises(BadInput, match="of source 'a' .*, or the rows kept of it, have changed"):
        train(tmp_path / 'cut', tiny_data, **changed, resume=True)


@pytest.mark.parametrize('rows, message', [
    ({'c': 9}, "source_rows names 'c', which is none of the sources a, b"),
    ({'a': 0}, r"source_rows\['a'\] = 0, and the source has 248 rows of 16"),
    ({'a': 249}, r"source_rows\['a'\] = 249, and the source has 248 rows of 16")])
def test_mistakes(tiny_data, rows, message):
    sources = [Source(tiny_data, name, 'train', 16) for name in 'ab']
    with pytest.raises(BadInput, match=message):
        limit_rows(sources, rows)


def test_a_subset_smaller_than_a_batch_is_refused(tmp_path):
    make_source(tmp_path / 'data', 'a')
    knobs = dict(sources={'a': 1.0}, source_rows={'a': 3})
    with pytest.raises(BadInput, match="'a' has 3 windows .* fewer than one batch .* source_rows"):
        train(tmp_path / 'run', tmp_path / 'data', **knobs)
