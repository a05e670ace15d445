"""Tests of tools/bench.py: its commands run, and print and write the figures that they promise."""
import json
import sys

import pytest

from configurator import BadInput
from tests.conftest import assert_one_sentence, run, run_here

BENCH = [sys.executable, 'tools/bench.py']


def test_steps_run_beside_a_peer(tmp_path):
    done = run([
        *BENCH, 'steps', "--models=['s1']", '--vs=transformers', '--rows=1', '--tokens=32',
        '--rounds=2', '--compiled=[False]', '--dtypes=["float32"]', '--profile=True',
        f'--json={tmp_path}/bench.json'])
    assert done.returncode == 0, done.stderr
    (record,) = json.loads((tmp_path / 'bench.json').read_text())['records']
    peer = record['peers']['transformers']
    assert record['tokens_per_second'] > 0 and peer['ratio'] > 0 and len(peer['ratios']) == 2
    assert 0.2 < record['floor_share'] < 1
    assert record['kinds']['products'] > record['kinds']['attention'] > 0
    assert record['roofline_s']['products'] < record['step_s']
    assert sum(record['seconds'].values()) < 2 * record['step_s']
    table = [line for line in done.stdout.splitlines() if line.startswith('|')]
    # The rows of one table are as wide as its head.
    assert {line.count('|') for line in table[:4]} == {table[0].count('|')}
    assert '| s1 | float32 eager | transformers |' in done.stdout


def test_parts_print_a_ratio_for_every_side():
    parts = "--parts=['presence','kd']"
    done = run([*BENCH, 'parts', parts, '--tokens=8', '--rounds=1', '--dtypes=["float32"]'])
    assert done.returncode == 0, done.stderr
    for side in ('stream', 'store', 'cache of top 64', 'a teacher of 13M'):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f'| {side} |')]
        assert line.endswith(') |')


def test_unknown_names_and_missing_packages_are_named():
    done = run([*BENCH, 'steps', '--vs=nobody'])
    assert_one_sentence(done, 2, "'nobody' must be one of", 'transformers')
    assert_one_sentence(run([*BENCH, 'steps', '--vs=liger']), 2, 'vs = liger')
    assert_one_sentence(run([*BENCH, 'parts', "--parts=['data']"]), 2, "'data' must be one of")
    done = run([*BENCH, 'memory', '--cases=none'])
    assert_one_sentence(done, 2, "'none' must be one of", 'plain')


@pytest.mark.parametrize('arguments, message', [
    ('step', "unknown command 'step'. Did you mean 'steps'"),
    ('steps --rounds=0', 'rounds = 0 must be at least 1'),
    ('steps --tokens=0', 'tokens = 0 must be at least 1'),
    ('steps --dtypes=["int8"]', "'int8' must be one of auto, float32, bfloat16"),
    ('steps --compiled=[3]', "'3' must be one of True, False"),
    ('steps --kernels=cuda', "kernels = 'cuda' must be one of"),
])
def test_a_bad_knob_is_named(arguments, message):
    with pytest.raises(BadInput, match=message):
        run_here(['tools/bench.py', *arguments.split()])
