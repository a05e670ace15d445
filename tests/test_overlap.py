"""Text that probe sets and sources have in common, against sets of n-grams counted one by one."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from configurator import BadInput
from data import Source
from lib import overlap
from lib.overlap import check_overlap, count_common, look_for, overlaps, run_length
from tests.conftest import free_port, write_shard

VOCAB = 2000
BOS = 0
ALONE = SimpleNamespace(data_rank=0, n_data=1, layout=None, is_master=True)


def document(rng, n=300):
    """Tokens of a document, without its BOS. Frequencies are those of text, by Zipf's law."""
    return np.minimum(rng.zipf(1.2, n), VOCAB - 1)


def write(folder, name, split, documents, n_shards=1):
    """Writes documents as the shards of a Source."""
    shards = [documents[i::n_shards] for i in range(n_shards)]
    for i, part in enumerate(shards):
        tokens = np.concatenate([np.concatenate(([BOS], d)) for d in part])
        write_shard(folder / name / split / f'{i}.bin', tokens, VOCAB)
    return Source(folder, name, split, 16, vocab_size=VOCAB)


def grams(documents, n):
    """All runs of n tokens within documents, with repetitions. A shorter document is one run."""
    found = []
    for d in documents:
        d = tuple(int(token) for token in d)
        found += [d[i:i + n] for i in range(len(d) - n + 1)] if len(d) >= n else [d]
    return found


def compare(probe, source, bos_id=BOS):
    wanted = look_for([probe], bos_id)
    return overlaps(wanted, count_common(wanted, source))[0]


def noted(documents):
    """The documents with a few tokens before each, as if they began with "Note. "."""
    return [np.concatenate(([7, 8, 9], d)) for d in documents]


def cut(documents):
    """Halves of the documents, in another order."""
    return [half for d in documents for half in (d[len(d) // 2:], d[:len(d) // 2])]


def embedded(documents, rng):
    """The documents inside documents that are three times longer."""
    return [np.concatenate((document(rng), d, document(rng))) for d in documents]


def test_shares_are_those_of_sets_of_n_grams(tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, 'CHUNK', 256)      # many boundaries between chunks
    rng = np.random.default_rng(0)
    common = [document(rng, n) for n in (700, 5, 19, 20, 21, 40, 256, 1)]
    probe_documents = common + [document(rng, n) for n in (900, 30, 3, 19)]
    phrase = document(rng, 45)
    probe_documents.append(np.concatenate((document(rng, 60), phrase, phrase)))
    documents = [document(rng, n) for n in rng.integers(1, 400, 60)]
    documents += [np.concatenate((document(rng, 33), phrase)), common[0][100:400], common[1],
                  common[2][1:], common[3], common[4][:-1], np.concatenate((common[5], phrase))]
    probe = write(tmp_path, 'p', 'probe', probe_documents, 2)
    source = write(tmp_path, 's', 'train', documents, 3)
    ours = compare(probe, source)
    in_probe = set(grams(probe_documents, 20))
    in_source = grams(documents, 20)
    shared = in_probe & set(in_source)
    assert 0.1 < len(shared) / len(in_probe) < 0.5
    assert ours.of_probe == len(shared) / len(in_probe)
    assert ours.of_source == sum(run in in_probe for run in in_source) / len(in_source)
    assert ours.n_equal == 1                        # common[3]; common[1] has only 5 tokens
    # The documents in the order of the shards, of which the source has half of four runs or more.
    ordered = probe_documents[::2] + probe_documents[1::2]
    held = []
    for i, d in enumerate(ordered):
        runs = set(grams([d], 20))
        if len(runs) >= 4 and sum(run in shared for run in runs) >= len(runs) / 2:
            held.append(i)
    assert ours.held.tolist() == held and len(held) == 1
    assert ours.of_documents == 1 / 13


def test_a_sample_estimates_the_shares(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    documents = [document(rng, 400) for _ in range(60)]
    probe = write(tmp_path, 'p', 'probe', documents)
    other = write(tmp_path, 'q', 'probe', documents[:20])
    source = write(tmp_path, 's', 'train', documents[:18] + [document(rng) for _ in range(90)])
    exact = compare(probe, source)
    monkeypatch.setattr(overlap, 'MAX_RUNS', 2**11)
    wanted = look_for([probe, other], BOS)
    assert wanted.every == [16, 4] and len(wanted.runs) < 5000
    sampled, second = overlaps(wanted, count_common(wanted, source))
    assert exact.of_probe == pytest.approx(0.3, abs=0.01)
    assert sampled.of_probe == pytest.approx(exact.of_probe, abs=0.05)      # 4 standard errors
    assert sampled.of_source == pytest.approx(exact.of_source, abs=0.05)
    assert second.of_probe == pytest.approx(0.9, abs=0.05)
    assert sampled.held.tolist() == exact.held.tolist() == list(range(18))
    # Another probe set beside it changes nothing.
    assert compare(probe, source).of_probe == sampled.of_probe


def test_one_run_that_fills_a_source_is_no_leak_by_sampling(tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, 'MAX_RUNS', 2**10)
    rng = np.random.default_rng(6)
    clean = [np.concatenate((document(rng, 100), np.full(40, 1))) for _ in range(200)]
    # The hash of 20 equal tokens. The sample is the lowest sixteenth of all hashes.
    ones = sum(pow(overlap.BASE, j, 2**64) for j in range(20))
    in_sample = next(t for t in range(5, VOCAB) if t * ones % 2**64 < 2**60)
    not_in_it = next(t for t in range(5, VOCAB) if t * ones % 2**64 >= 2**60)
    estimates = []
    for token in (in_sample, not_in_it):
        spaced = [np.concatenate((document(rng, 300), np.full(40, token))) for _ in range(30)]
        source = write(tmp_path, 's', 'train', [np.where(d == 1, token, d) for d in clean])
        probe = write(tmp_path, 'p', 'probe', spaced)
        assert look_for([probe], BOS).every == [16]
        ours = compare(probe, source)
        estimates.append(ours.of_source)
        assert not ours.is_leak
    # The truth is a sixth.
    assert estimates[0] == 1 and estimates[1] < 0.05
    repeated = write(tmp_path, 's', 'train', noted(spaced[:5] * 100))
    assert compare(write(tmp_path, 'p', 'probe', spaced), repeated).is_leak


@pytest.mark.parametrize('change', ['as it is', 'noted', 'cut', 'embedded', 'short', 'one'])
def test_a_source_that_holds_the_probe_is_refused(tmp_path, change, capsys):
    rng = np.random.default_rng(2)
    documents = [document(rng, 12 if change == 'short' else 300) for _ in range(30)]
    probe = write(tmp_path, 'probe/kind', 'probe', documents)
    leaked = {
        'as it is': documents, 'noted': noted(documents), 'cut': cut(documents),
        'embedded': embedded(documents, rng), 'short': documents, 'one': documents[3:4]}[change]
    clean = [document(rng) for _ in range(400)]
    source = write(tmp_path, 'a', 'train', clean + leaked, 2)
    val = write(tmp_path, 'b', 'val', clean)
    with pytest.raises(BadInput, match=r"'kind' and source 'a' \(train\) have .* in common") as e:
        check_overlap([probe], [val, source], BOS, ALONE)
    assert "'b'" not in str(e.value)
    n_equal = {'as it is': 30, 'one': 1}.get(change, 0)
    assert f'have {n_equal} document(s), ' in str(e.value)
    if change in ('noted', 'embedded'):
        assert "100.0% of the probe set's runs of 20 tokens" in str(e.value)
        assert '30 of the probe set' in str(e.value) and '0, 1, 2, 3, 4, ...)' in str(e.value)
    # The same text in a validation source is refused as well.
    leaky = write(tmp_path, 'c', 'val', clean + leaked)
    with pytest.raises(BadInput, match=r"source 'c' \(val\)"):
        check_overlap([probe], [val, leaky], BOS, ALONE)


def test_a_source_of_its_own_passes_and_little_in_common_is_reported(tmp_path, capsys):
    rng = np.random.default_rng(3)
    documents = [document(rng) for _ in range(60)]
    probe = write(tmp_path, 'probe/kind', 'probe', documents)
    clean = write(tmp_path, 'a', 'train', [document(rng) for _ in range(300)])
    ours = compare(probe, clean)
    assert ours.of_probe < 0.001 and ours.n_equal == 0 and not len(ours.held)
    check_overlap([probe], [clean], BOS, ALONE)
    out = capsys.readouterr().out
    assert 'warning' not in out and "at most 0.00% of the probe set 'kind'" in out
    # A licence before every document is one run among many.
    licence = document(rng, 200)
    clean = [np.concatenate((licence, document(rng))) for _ in range(300)]
    licensed = [np.concatenate((licence, d)) for d in documents]
    probe = write(tmp_path, 'probe/kind', 'probe', licensed)
    source = write(tmp_path, 'a', 'train', clean)
    ours = compare(probe, source)
    assert ours.of_probe < 0.015 < 0.3 < ours.of_source and not ours.is_leak
    # One document with another beginning is no reason to stop.
    probe = write(tmp_path, 'probe/kind', 'probe', documents)
    source = write(tmp_path, 'a', 'train', clean + noted(documents[7:8]))
    check_overlap([probe], [source], BOS, ALONE)
    assert 'half or more of 1 of the probe set' in capsys.readouterr().out
    source = write(tmp_path, 'a', 'train', noted(documents[7:8] * 1200) + clean)
    with pytest.raises(BadInput, match="(6|7)[0-9].[0-9]% of the source's in common"):
        check_overlap([probe], [source], BOS, ALONE)


def test_shards_without_documents_are_compared_at_any_offset(tmp_path, capsys):
    rng = np.random.default_rng(4)
    documents = [document(rng, 600) for _ in range(20)]
    probe = write(tmp_path, 'probe/kind', 'probe', documents)
    others = [document(rng, 600) for _ in range(20)]
    same = write(tmp_path, 'a', 'train', documents)
    shifted = write(tmp_path, 'b', 'train', [others[0][:77], *documents])
    other = write(tmp_path, 'c', 'train', others)
    aligned = compare(probe, same, None)
    assert aligned.n_equal == 20 * 601 // 256 + 1 and aligned.of_probe == 1
    moved = compare(probe, shifted, None)
    assert moved.n_equal == 0 and moved.of_probe > 0.99 and len(moved.held) == 47
    assert compare(probe, other, None).of_probe == 0
    with pytest.raises(BadInput, match='have 0 pieces of 256 tokens, 100.0%'):
        check_overlap([probe], [shifted], None, ALONE)


def check_as_rank(rank, folder, port):
    dist.init_process_group(
        'gloo', init_method=f'tcp://localhost:{port}', rank=rank, world_size=2)
    run = SimpleNamespace(data_rank=rank, n_data=2, layout=None, is_master=rank == 0)
    probe = Source(folder, 'p', 'probe', 16)
    source = Source(folder, 's', 'train', 16)
    try:
        check_overlap([probe], [source], BOS, run)
    except BadInput as error:
        (folder / f'rank{rank}').write_text(str(error))
    dist.destroy_process_group()


def test_two_ranks_find_what_one_does(tmp_path):
    rng = np.random.default_rng(5)
    documents = [document(rng, 200) for _ in range(12)]
    probe = write(tmp_path, 'p', 'probe', documents, 3)
    # Both ranks find the same documents, so adding their shares would count these twice.
    twice = noted(documents[:4]) + embedded(documents[:4], rng)
    source = write(tmp_path, 's', 'train', [document(rng) for _ in range(30)] + twice, 5)
    wanted = look_for([probe], BOS)
    parts = [count_common(wanted, source, rank, 2) for rank in range(2)]
    assert (sum(parts) == count_common(wanted, source)).all()
    both = overlaps(wanted, sum(parts))[0]
    assert both.of_probe == pytest.approx(1 / 3, abs=0.01) and len(both.held) == 4
    with pytest.raises(BadInput) as alone:
        check_overlap([probe], [source], BOS, ALONE)
    mp.start_processes(check_as_rank, (tmp_path, free_port()), 2, start_method='fork')
    for rank in range(2):
        assert (tmp_path / f'rank{rank}').read_text() == str(alone.value)


def test_runs_hold_as_much_text_with_every_tokenizer(tmp_path):
    for vocab_size, n_bytes, n in ((259, 1000, 80), (2048, 2700, 30), (150_000, 4700, 18)):
        write_shard(tmp_path / 'p/probe/0.bin', np.arange(1000), vocab_size)
        probe = Source(tmp_path, 'p', 'probe', 16)
        assert run_length([probe]) == 20            # meta.json is missing
        probe.meta = dict(splits=dict(probe=dict(bytes=n_bytes, tokens=1000)))
        assert run_length([probe]) == n
