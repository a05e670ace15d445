"""tools/report.py: its differences against scipy's, what it refuses and marks, and a page that needs nothing else."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pytest
from scipy import stats

from configurator import BadInput
from model import ModelConfig
from tests.conftest import ROOT, TINY, run_here, start, train_command
from tools import report

SHAPE = {k: v for k, v in TINY.items() if k in ModelConfig.__dataclass_fields__}
CONFIG = {**TINY, **asdict(ModelConfig(**SHAPE)), 'sources': {'a': 0.5, 'b': 0.5}, 'data_dir': 'nowhere', 'packing': 'window', 'mixture': 'fixed', 'seed': 0, 'stop_step': None, 'max_tokens': None,
          'epochs': None, 'warmup_frac': None}


def make_run(folder, losses, seed, steps=12, tokenizer=None, **knobs):
    """A run folder whose sources a and b end at these losses."""
    config = {**CONFIG, 'seed': seed, 'out_dir': str(folder), **knobs}
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(config))
    if tokenizer:
        (folder / 'tokenizer.tiktoken').write_text(tokenizer)
    with open(folder / 'metrics.jsonl', 'w') as f:
        for step in range(steps + 1):
            logged = {'step': step, 'train/loss': 3.0, 'train/tokens_per_second': 100.0, 'system/step_ms': 640.0, 'mixture/weight_a': 0.5, 'mixture/weight_b': 0.5}
            f.write(json.dumps(logged) + '\n')
            if step % 6 == 0:
                values = {f'val/loss_{name}': loss + (12 - step) / 10 for name, loss in zip('ab', losses)}
                f.write(json.dumps({'step': step, 'val/loss': 9.9, **values, **{k.replace('loss', 'bpb'): v / 2 for k, v in values.items()}}) + '\n')
    return folder


def page(tmp_path, *paths, **knobs):
    run_here(['tools/report.py', *map(str, paths), f'--out={tmp_path / "report"}', *(f'--{k}={v}' for k, v in knobs.items())])
    return (tmp_path / 'report' / 'report.md').read_text(), (tmp_path / 'report' / 'report.html').read_text()


def row(markdown, begins):
    return [cell.strip() for cell in next(line for line in markdown.splitlines() if line.startswith(f'| {begins} |')).strip('|').split('|')]


def test_paired_differences_with_their_interval(tmp_path):
    rng = np.random.default_rng(0)
    base, other = rng.normal(3, 0.1, (4, 2)), rng.normal(2.9, 0.1, (4, 2))
    for seed in range(4):
        make_run(tmp_path / 'runs' / f'fixed_seed{seed}', base[seed], seed)
        make_run(tmp_path / 'runs' / f'moved_seed{seed}', other[seed], seed, mixture='influence')
    make_run(tmp_path / 'runs' / 'moved_seed9', (1.0, 1.0), 9, mixture='influence')            # has no partner
    markdown, page_html = page(tmp_path, tmp_path / 'runs')
    expected = stats.ttest_rel(other.mean(1), base.mean(1)).confidence_interval()
    mean = (other - base).mean()
    assert row(markdown, 'moved')[4] == f'{mean:+.4f} ({expected.low:+.4f} to {expected.high:+.4f})'
    assert row(markdown, 'fixed')[:4] == ['fixed', '4', f'{base.mean():.4f} ({base.mean(1).min():.4f} to {base.mean(1).max():.4f})', f'{np.exp(base.mean()):.3f}']
    by_source = stats.ttest_rel(other[:, 1], base[:, 1]).confidence_interval()
    assert row(markdown, 'moved − fixed')[2] == f'{(other - base)[:, 1].mean():+.4f} ({by_source.low:+.4f} to {by_source.high:+.4f})'
    assert row(markdown, 'mixture') == ['mixture', 'fixed', 'influence']
    assert not re.search(r'(src|href)="(?!data:)', page_html) and page_html.count('data:image/png;base64,') == 3
    assert 'width=device-width' in page_html and 'http-equiv' not in page_html


def test_one_seed_and_unfinished_runs_claim_nothing(tmp_path):
    make_run(tmp_path / 'a', (3.0, 3.2), 0)
    make_run(tmp_path / 'b', (2.9, 3.0), 0, learning_rate=2e-3)
    broken = make_run(tmp_path / 'c', (1.0, 1.0), 0, steps=7, learning_rate=3e-3)
    old = time.time() - 3600
    os.utime(broken / 'metrics.jsonl', (old, old))
    make_run(tmp_path / 'd', (1.0, 1.0), 0, steps=7, learning_rate=4e-3)
    markdown, _ = page(tmp_path, *(tmp_path / name for name in 'abcd'))
    assert [row(markdown, n)[3] for n in 'abcd'] == ['finished', 'finished', 'stopped at step 7 of 12', 'training at step 7 of 12, 0 minutes to go']
    arms = markdown.split('## Arms')[1].split('## ')[0]
    assert row(arms, 'b')[4] == '-0.1500 (one seed, no interval)' and row(arms, 'c')[4] == 'n/a'
    assert "'c' is not finished (stopped at step 7)" in markdown


def test_losses_of_other_tokenizers_or_rows_are_refused_but_not_bits_per_byte(tmp_path):
    make_run(tmp_path / 'a', (3.0, 3.2), 0, tokenizer='one')
    make_run(tmp_path / 'b', (2.9, 3.0), 0, tokenizer='two')
    with pytest.raises(BadInput, match="runs 'a' and 'b' have different tokenizers: .* say --metric=bpb"):
        page(tmp_path, tmp_path / 'a', tmp_path / 'b')
    markdown, _ = page(tmp_path, tmp_path / 'a', tmp_path / 'b', metric='bpb')
    assert "'a' and 'b' have different tokenizers: bits per byte are compared" in markdown and '1.5500' in row(markdown, 'a')
    make_run(tmp_path / 'c', (2.9, 3.0), 0, tokenizer='one', eval_rows=8)
    with pytest.raises(BadInput, match='different eval_rows'):
        page(tmp_path, tmp_path / 'a', tmp_path / 'c')
    make_run(tmp_path / 'd', (2.9, 3.0), 0, tokenizer='one', data_dir=str(tmp_path / 'other'))
    for name, digest in (('other', 'x'), ('mine', 'y')):
        (tmp_path / name / 'a').mkdir(parents=True)
        (tmp_path / name / 'a' / 'meta.json').write_text(json.dumps(dict(shards=[dict(split='val', sha256=digest)])))
    make_run(tmp_path / 'e', (2.9, 3.0), 0, tokenizer='one', data_dir=str(tmp_path / 'mine'))
    with pytest.raises(BadInput, match="different validation data of 'a'"):
        page(tmp_path, tmp_path / 'd', tmp_path / 'e')
    with pytest.raises(BadInput, match='is no folder'):
        page(tmp_path, tmp_path / 'nothing')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(BadInput, match='has no run in it'):
        page(tmp_path, tmp_path / 'empty')


def test_scores_have_their_standard_errors(tmp_path):
    folder = make_run(tmp_path / 'a', (3.0, 3.2), 0)
    (folder / 'eval.json').write_text(json.dumps(dict(results={'arc_easy': dict(metrics=dict(acc=[0.31, 0.02]))})))
    make_run(tmp_path / 'b', (2.9, 3.0), 0, learning_rate=2e-3)
    markdown, _ = page(tmp_path, tmp_path / 'a', tmp_path / 'b')
    assert row(markdown, 'arc_easy acc')[1:] == ['0.3100 ± 0.0200', 'n/a']


def test_the_page_follows_a_run_that_trains(tmp_path, tiny_data):
    """--watch writes the page while the run goes on, and ends with it; the last page does not load itself again."""
    process = start(train_command(tmp_path / 'one', tiny_data, max_steps=600, eval_interval=50), os.path.join(tmp_path, 'log'), {'OMP_NUM_THREADS': '1'})
    while not (tmp_path / 'one' / 'metrics.jsonl').exists():
        time.sleep(0.02)
    watcher = subprocess.Popen([sys.executable, 'tools/report.py', str(tmp_path / 'one'), f'--out={tmp_path / "live"}', '--watch=True', '--refresh=0.2'], cwd=ROOT)
    seen = set()
    while watcher.poll() is None:
        path = tmp_path / 'live' / 'report.html'
        if path.exists():
            seen.add('http-equiv="refresh"' in path.read_text())
        time.sleep(0.02)
    process.join()
    assert True in seen and watcher.returncode == 0 and 'http-equiv' not in (tmp_path / 'live' / 'report.html').read_text()
    assert row((tmp_path / 'live' / 'report.md').read_text(), 'one')[3] == 'finished'
    assert report.is_finished(str(tmp_path / 'one'))
    (tmp_path / 'runs').mkdir()
    shutil.copytree(tmp_path / 'one', tmp_path / 'runs' / 'first')                       # a folder of runs: one that appears later is taken in
    watcher = subprocess.Popen([sys.executable, 'tools/report.py', str(tmp_path / 'runs'), f'--out={tmp_path / "more"}', '--watch=True', '--refresh=0.5'], cwd=ROOT)
    while not (tmp_path / 'more' / 'report.html').exists():
        time.sleep(0.02)
    shutil.copytree(tmp_path / 'one', tmp_path / 'late')
    (tmp_path / 'late').rename(tmp_path / 'runs' / 'second')
    assert watcher.wait(120) == 0 and row((tmp_path / 'more' / 'report.md').read_text(), 'second')[3] == 'finished'
