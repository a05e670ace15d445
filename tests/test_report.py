"""tools/report.py: differences against scipy, refusals and marks, a page without other files."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

from tests.conftest import need

need('scipy', 'matplotlib')

import numpy as np
import pytest
from scipy import stats

from configurator import BadInput
from model import ModelConfig
from tests.conftest import ROOT, TINY, run_here
from tools import report

SHAPE = {k: v for k, v in TINY.items() if k in ModelConfig.__dataclass_fields__}
CONFIG = {
    **TINY, **asdict(ModelConfig(**SHAPE)), 'sources': {'a': 0.5, 'b': 0.5}, 'data_dir': 'nowhere',
    'packing': 'window', 'mixture': 'fixed', 'seed': 0, 'stop_step': None, 'max_tokens': None,
    'epochs': None, 'warmup_frac': None}


def make_run(folder, losses, seed, steps=12, tokenizer=None, **knobs):
    """A run folder whose sources a and b end at these losses."""
    config = {**CONFIG, 'seed': seed, 'out_dir': str(folder), **knobs}
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(config))
    if tokenizer:
        (folder / 'tokenizer.tiktoken').write_text(tokenizer)
    records = []
    for step in range(steps + 1):
        records.append({
            'step': step, 'train/loss': 3.0, 'train/tokens_per_second': 100.0,
            'system/step_ms': 640.0, 'mixture/weight_a': 0.5, 'mixture/weight_b': 0.5})
        if step % 6 == 0:
            evaluated = {'step': step, 'val/loss': 9.9}
            for name, loss in zip('ab', losses, strict=True):
                evaluated[f'val/loss_{name}'] = loss + (12 - step) / 10
                evaluated[f'val/bpb_{name}'] = evaluated[f'val/loss_{name}'] / 2
            records.append(evaluated)
    lines = [json.dumps(record) + '\n' for record in records]
    (folder / 'metrics.jsonl').write_text(''.join(lines))
    return folder


def page(tmp_path, *paths, **knobs):
    """Makes a report. Returns the Markdown and the HTML."""
    options = [f'--{key}={value}' for key, value in knobs.items()]
    out = tmp_path / 'report'
    run_here(['tools/report.py', *map(str, paths), f'--out={out}', *options])
    return (out / 'report.md').read_text(), (out / 'report.html').read_text()


def row(markdown, begins):
    """The cells of the first row whose first cell is `begins`."""
    for line in markdown.splitlines():
        if line.startswith(f'| {begins} |'):
            return [cell.strip() for cell in line.strip('|').split('|')]
    raise AssertionError(f'no row {begins}')


def interval(values, others):
    """The mean of paired differences with its 95 % interval, by scipy."""
    found = stats.ttest_rel(values, others).confidence_interval()
    return f'{(values - others).mean():+.4f} ({found.low:+.4f} to {found.high:+.4f})'


def test_paired_differences_with_their_interval(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.normal(3, 0.1, (4, 2))               # (seeds, sources)
    other = rng.normal(2.9, 0.1, (4, 2))
    runs = tmp_path / 'runs'
    for seed in range(4):
        make_run(runs / f'fixed_seed{seed}', base[seed], seed)
        make_run(runs / f'moved_seed{seed}', other[seed], seed, mixture='influence')
    # This run has no partner of the same seed, so it must not count.
    make_run(runs / 'moved_seed9', (1.0, 1.0), 9, mixture='influence')
    markdown, page_html = page(tmp_path, runs)
    means = base.mean(1)
    expected = f'{means.mean():.4f} ({means.min():.4f} to {means.max():.4f})'
    assert row(markdown, 'fixed')[:4] == ['fixed', '4', expected, f'{np.exp(means.mean()):.3f}']
    p = stats.ttest_rel(other.mean(1), means).pvalue
    assert row(markdown, 'moved')[4:] == [interval(other.mean(1), means), f'{p:.2g}']
    # Two sources are two comparisons.
    p = stats.ttest_rel(other, base, axis=0).pvalue
    corrected = np.maximum(np.minimum(1, 2 * p.min()), p)
    assert row(markdown, 'moved − fixed')[1:] == [
        f'{interval(other[:, i], base[:, i])}, p {corrected[i]:.2g}' for i in range(2)]
    assert row(markdown, 'mixture') == ['mixture', 'fixed', 'influence']
    assert not re.search(r'(src|href)="(?!data:)', page_html)
    assert page_html.count('data:image/png;base64,') == 3
    assert 'width=device-width' in page_html and 'http-equiv' not in page_html


def by_definition(p):
    """Holm 1979: the i-th smallest of n p values is rejected at a level if it and all smaller ones
    are at most level / (n - i), i from 0. Returns the lowest level at which each is rejected."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    lowest = {}
    for rank, i in enumerate(order):
        needed = [p[j] * (len(p) - k) for k, j in enumerate(order[:rank + 1])]
        lowest[i] = min(1.0, max(needed))
    return [lowest[i] for i in range(len(p))]


def test_holms_correction_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 14):
        for _ in range(20):
            p = rng.uniform(0, 1, n) ** 3
            np.testing.assert_allclose(report.holm(list(p)), by_definition(p), rtol=1e-12)
    # The example of Holm's step-down: 0.01 * 4, 0.02 * 3 twice (not 0.02 * 2), 0.9.
    assert report.holm([0.02, 0.9, 0.01, 0.02]) == pytest.approx([0.06, 0.9, 0.04, 0.06])
    assert report.holm([None, 0.04, None]) == [None, 0.04, None]
    assert report.holm([]) == []


def test_chance_alone_is_called_a_difference_in_5_per_cent_of_studies():
    """14 arms without an effect: some p is below 0.05 in half of the studies, corrected in 5 %."""
    rng = np.random.default_rng(0)
    found = np.zeros((400, 2))
    for study in found:
        d = rng.normal(size=(14, 3))
        p = list(stats.ttest_1samp(d, 0, axis=1).pvalue)
        study[:] = min(p) < 0.05, min(report.holm(p)) < 0.05
    plain, corrected = found.mean(0)
    assert plain > 0.4 and corrected < 0.08


def test_many_arms_are_corrected_together_and_other_sources_stand_beside(tmp_path):
    rng = np.random.default_rng(1)
    losses = rng.normal(3, 0.1, (4, 3, 2))          # (arms, seeds, sources)
    for i, of_arm in enumerate(losses):
        for seed in range(3):
            rate = 1e-3 * (i + 1)
            make_run(tmp_path / 'runs' / f'{"wxyz"[i]}_seed{seed}', of_arm[seed], seed,
                     learning_rate=rate)
    markdown, _ = page(tmp_path, tmp_path / 'runs', sources="['a']")
    arms = markdown.split('## Arms')[1].split('## ')[0]
    assert 'Mean loss of a with equal weights. Beside it, each alone: b.' in arms
    assert row(arms, 'arm')[4:] == [
        'against w (95 %)', 'p (Holm)', 'b (range)', 'b against w (95 %)']
    p = [stats.ttest_rel(losses[i, :, 0], losses[0, :, 0]).pvalue for i in (1, 2, 3)]
    for i, corrected in zip((1, 2, 3), by_definition(p), strict=True):
        cells = row(arms, 'wxyz'[i])
        assert cells[4] == interval(losses[i, :, 0], losses[0, :, 0])
        assert cells[5] == f'{corrected:.2g}'
        assert cells[6].startswith(f'{losses[i, :, 1].mean():.4f} (')
        assert cells[7] == interval(losses[i, :, 1], losses[0, :, 1])
    assert row(arms, 'w')[5] == '' and row(arms, 'w')[7] == ''


def test_arms_without_any_spread_have_a_p():
    """Arms that are the same run by run do not differ. scipy has nan there."""
    def runs_of(arm, losses):
        return [SimpleNamespace(arm=arm, seed=i, status='finished', final=loss)
                for i, loss in enumerate(losses)]

    def p(losses, others):
        runs = runs_of('x', losses) + runs_of('base', others)
        return report.paired_p(runs, 'x', 'base', lambda run: run.final)

    assert p([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1
    assert p([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]) == 0
    assert p([1.0], [2.0]) is None and p([], []) is None
    x, y = [1.0, 2.5, 3.0], [1.5, 2.0, 4.0]
    assert p(x, y) == pytest.approx(stats.ttest_rel(x, y).pvalue, rel=1e-12)


def test_one_seed_and_unfinished_runs_claim_nothing(tmp_path):
    make_run(tmp_path / 'a', (3.0, 3.2), 0)
    make_run(tmp_path / 'b', (2.9, 3.0), 0, learning_rate=2e-3)
    broken = make_run(tmp_path / 'c', (1.0, 1.0), 0, steps=7, learning_rate=3e-3)
    old = time.time() - 3600
    os.utime(broken / 'metrics.jsonl', (old, old))
    make_run(tmp_path / 'd', (1.0, 1.0), 0, steps=7, learning_rate=4e-3)
    markdown, _ = page(tmp_path, *(tmp_path / name for name in 'abcd'))
    assert [row(markdown, name)[3] for name in 'abcd'] == [
        'finished', 'finished', 'stopped at step 7 of 12',
        'training at step 7 of 12, 0 minutes to go']
    arms = markdown.split('## Arms')[1].split('## ')[0]
    assert row(arms, 'b')[4] == '-0.1500 (one seed, no interval)'
    assert row(arms, 'c')[4] == 'n/a'
    assert "'c' is not finished (stopped at step 7)" in markdown


def test_losses_of_other_tokenizers_or_rows_are_refused_but_not_bits_per_byte(tmp_path):
    a = make_run(tmp_path / 'a', (3.0, 3.2), 0, tokenizer='one')
    b = make_run(tmp_path / 'b', (2.9, 3.0), 0, tokenizer='two')
    message = "runs 'a' and 'b' have different tokenizers: .* say --metric=bpb"
    with pytest.raises(BadInput, match=message):
        page(tmp_path, a, b)
    markdown, _ = page(tmp_path, a, b, metric='bpb')
    assert "'a' and 'b' have different tokenizers: bits per byte are compared" in markdown
    assert '1.5500' in row(markdown, 'a')
    c = make_run(tmp_path / 'c', (2.9, 3.0), 0, tokenizer='one', eval_rows=8)
    with pytest.raises(BadInput, match='different eval_rows'):
        page(tmp_path, a, c)


def test_losses_on_other_validation_data_are_refused(tmp_path):
    runs = []
    for name in ('one', 'two'):
        source = tmp_path / 'data' / name / 'a'
        source.mkdir(parents=True)
        meta = dict(shards=[dict(split='val', sha256=f'hash of {name}')])
        (source / 'meta.json').write_text(json.dumps(meta))
        runs.append(make_run(tmp_path / name, (2.9, 3.0), 0, data_dir=str(source.parent)))
    with pytest.raises(BadInput, match="different validation data of 'a'"):
        page(tmp_path, *runs)


def test_folders_without_runs_are_refused(tmp_path):
    with pytest.raises(BadInput, match='is no folder'):
        page(tmp_path, tmp_path / 'nothing')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(BadInput, match='has no run in it'):
        page(tmp_path, tmp_path / 'empty')


def test_scores_have_their_standard_errors(tmp_path):
    a = make_run(tmp_path / 'a', (3.0, 3.2), 0)
    results = dict(arc_easy=dict(metrics=dict(acc=[0.31, 0.02])))
    (a / 'eval.json').write_text(json.dumps(dict(results=results)))
    b = make_run(tmp_path / 'b', (2.9, 3.0), 0, learning_rate=2e-3)
    markdown, _ = page(tmp_path, a, b)
    assert row(markdown, 'arc_easy acc')[1:] == ['0.3100 ± 0.0200', 'n/a']


def watch(path, out):
    """Starts a report that renews itself. Returns its process once the first page is there."""
    process = subprocess.Popen(
        [sys.executable, 'tools/report.py', str(path), f'--out={out}', '--watch=True',
         '--refresh=0.5'], cwd=ROOT)
    while not (out / 'report.html').exists():
        assert process.poll() is None
        time.sleep(0.02)
    return process


def test_the_page_follows_a_run_that_trains(tmp_path):
    """--watch renews the page while the run trains. The last page does not reload itself."""
    one = make_run(tmp_path / 'one', (3.0, 3.2), 0, steps=7)
    live = tmp_path / 'live'
    watcher = watch(one, live)
    assert 'http-equiv="refresh"' in (live / 'report.html').read_text()
    assert row((live / 'report.md').read_text(), 'one')[3].startswith('training at step 7 of 12')
    ended = make_run(tmp_path / 'ended', (3.0, 3.2), 0)
    shutil.copy(ended / 'metrics.jsonl', one / 'new')
    (one / 'new').rename(one / 'metrics.jsonl')
    assert watcher.wait(120) == 0
    assert 'http-equiv' not in (live / 'report.html').read_text()
    assert row((live / 'report.md').read_text(), 'one')[3] == 'finished'


def test_a_run_that_appears_later_is_taken_in(tmp_path):
    make_run(tmp_path / 'runs' / 'first', (3.0, 3.2), 0)
    late = make_run(tmp_path / 'late', (3.0, 3.2), 1)
    watcher = watch(tmp_path / 'runs', tmp_path / 'out')
    late.rename(tmp_path / 'runs' / 'second')
    assert watcher.wait(120) == 0
    assert row((tmp_path / 'out' / 'report.md').read_text(), 'second')[3] == 'finished'


def test_a_diverged_run_takes_no_part_and_records_are_sorted(tmp_path):
    make_run(tmp_path / 'a', (3.0, 3.2), 0)
    make_run(tmp_path / 'b', (2.9, 3.0), 0, learning_rate=2e-3)
    for name, loss in (('c', None), ('d', float('nan'))):
        run_folder = make_run(tmp_path / name, (1.0, 1.0), 0, learning_rate=len(name) + ord(name))
        path = run_folder / 'metrics.jsonl'
        lines = path.read_text().splitlines()
        lines[-1] = json.dumps({**json.loads(lines[-1]), 'val/loss_a': loss})
        path.write_text('\n'.join(lines) + '\n')
    # Two processes that wrote to one file leave its steps out of order.
    path = tmp_path / 'b' / 'metrics.jsonl'
    lines = path.read_text().splitlines()
    path.write_text('\n'.join(lines[8:] + lines[:8]) + '\n')
    markdown, _ = page(tmp_path, *(tmp_path / name for name in 'abcd'))
    arms = markdown.split('## Arms')[1].split('## ')[0]
    assert row(arms, 'b')[4] == '-0.1500 (one seed, no interval)'
    for name in 'cd':
        assert row(arms, name)[2] == 'n/a'
        assert f"'{name}' has diverged: its last losses are not finite" in markdown
    # exp of a loss of 77,158 has no float.
    make_run(tmp_path / 'e', (77158.0, 77158.0), 0)
    markdown, _ = page(tmp_path, tmp_path / 'e')
    assert row(markdown, 'e')[6] == 'inf'


@pytest.mark.parametrize('name, damage, message', [
    ('config.json', '[]', 'no config of a run'),
    ('config.json', 'null', 'no config of a run'),
    ('config.json', '', 'no valid JSON'),
    ('config.json', dict(n_layer='DELETE'), "has no knob 'n_layer'"),
    ('config.json', dict(sources='DELETE'), "has no knob 'sources'"),
    ('config.json', dict(seed='zero'), "seed must be int, got str 'zero'"),
    ('config.json', dict(n_embd='64'), "n_embd must be int, got str '64'"),
    ('config.json', dict(n_head=0), 'config.json: n_head = 0 must be at least 1'),
    ('config.json', dict(total_batch_tokens=0), 'total_batch_tokens = 0'),
    ('config.json', dict(sources=['a']), 'sources must be dict'),
    ('config.json', dict(sources={'a': -1.0}), 'are no weights'),
    ('config.json', dict(max_steps='many'), 'max_steps must be int'),
    ('metrics.jsonl', '{"step": 0, "val/loss": "low"}\n', "val/loss = 'low' is no number"),
    ('metrics.jsonl', '{"step": 0, "val/loss": -2.5}\n', 'is negative'),
    ('eval.json', '[1]', 'no file of results'),
    ('eval.json', '{"results": {"t": 5}}', 'no file of results'),
    ('eval.json', '{"results": {"t": {"metrics": {"acc": ["x", null]}}}}', 'no file of results'),
])
def test_a_damaged_run_is_named(tmp_path, name, damage, message):
    folder = make_run(tmp_path / 'a', (3.0, 3.2), 0)
    if isinstance(damage, dict):
        config = {**json.loads((folder / name).read_text()), **damage}
        damage = json.dumps({k: v for k, v in config.items() if v != 'DELETE'})
    (folder / name).write_text(damage)
    with pytest.raises(BadInput, match=message):
        page(tmp_path, folder)


def test_a_config_of_another_version_may_have_more_knobs(tmp_path):
    folder = make_run(tmp_path / 'a', (3.0, 3.2), 0, a_knob_of_later=5)
    assert row(page(tmp_path, folder)[0], 'a')[3] == 'finished'
