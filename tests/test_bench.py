"""tools/bench.py runs, and prints and writes what it says."""
import json
import sys

from tests.conftest import assert_one_sentence, run


def test_bench_runs_beside_a_peer(tmp_path):
    done = run([sys.executable, 'tools/bench.py', "--models=['s1']", '--vs=transformers', '--rows=1', '--tokens=32', '--rounds=2', '--compiled=[False]',
                '--dtypes=["float32"]', '--profile=True', f'--json={tmp_path}/bench.json'])
    assert done.returncode == 0, done.stderr
    (record,) = json.loads((tmp_path / 'bench.json').read_text())['records']
    assert record['tokens_per_second'] > 0 and record['peers']['transformers']['ratio'] > 0 and len(record['peers']['transformers']['ratios']) == 2
    assert 0.2 < record['floor_share'] < 1 and record['kinds']['products'] > record['kinds']['attention'] > 0
    assert record['roofline_s']['products'] < record['step_s'] and record['seconds']['influence'] > 0
    table = [line for line in done.stdout.splitlines() if line.startswith('|')]
    assert {line.count('|') for line in table[:4]} == {table[0].count('|')}          # one table, all rows as wide as its head
    assert '| s1 | float32 eager | transformers |' in done.stdout


def test_peers_that_are_not_there_are_named():
    assert_one_sentence(run([sys.executable, 'tools/bench.py', '--vs=nobody']), 2, "'nobody' must be one of", 'transformers')
    assert_one_sentence(run([sys.executable, 'tools/bench.py', '--side=liger,s1,float32,False']), 2, 'its kernels need a GPU')
