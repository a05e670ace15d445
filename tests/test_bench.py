"""Tests of tools/bench.py: its commands run, and print and write the figures that they promise."""
import json
import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from configurator import BadInput, configure
from model import ModelConfig, flops_per_token
from tests.conftest import ROOT, assert_one_sentence, run, run_here
from tools import gpu_checks

BENCH = [sys.executable, 'tools/bench.py']


def test_steps_run_beside_a_peer(tmp_path):
    done = run([
        *BENCH, 'steps', "--models=['s1']", '--vs=transformers,kernels=torch', '--rows=1',
        '--tokens=32', '--rounds=2', '--compiled=[False]', '--dtypes=["float32"]', '--profile=True',
        f'--json={tmp_path}/bench.json'])
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / 'bench.json').read_text())
    (record,) = found['records']
    assert [row[2] for row in found['tables'][0]['rows']] == ['ours', *record['peers']]
    # Our side with another value of a knob is a side like any other.
    assert record['peers']['kernels=torch']['ratio'] > 0
    peer = record['peers']['transformers']
    assert record['tokens_per_second'] > 0 and peer['ratio'] > 0 and len(peer['ratios']) == 2
    assert 0.2 < record['floor_share'] < 1
    assert record['kinds']['products'] > record['kinds']['attention'] > 0
    assert record['roofline_s']['products'] < record['step_s']
    assert sum(record['seconds'].values()) < 3 * record['step_s']
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


def test_a_mistake_ends_with_one_sentence():
    done = run([*BENCH, 'steps', '--vs=nobody'])
    assert_one_sentence(done, 2, "'nobody' must be one of", 'transformers')


@pytest.mark.parametrize('arguments, message', [
    ('step', "unknown command 'step'. Did you mean 'steps'"),
    ('steps --rounds=0', 'rounds = 0 must be at least 1'),
    ('steps --tokens=0', 'tokens = 0 must be at least 1'),
    ('steps --dtypes=["int8"]', "'int8' must be one of auto, float32, bfloat16"),
    ('steps --compiled=[3]', "'3' must be one of True, False"),
    ('steps --kernels=cuda', "kernels = 'cuda' must be one of"),
    ('steps --vs=liger', 'vs = liger'),
    ('steps --vs=rows=3', "'rows=' must be one of .*attention="),
    ('gpu', 'there is no GPU here'),
    ('gpu --rehearse=True --parts=["speed"]', "'speed' must be one of tests, steps"),
    ('parts --parts=["data"]', "'data' must be one of"),
    ('memory --cases=none', "'none' must be one of .*plain"),
    ('parts --text=text', '--text needs --tokenizer'),
])
def test_a_bad_knob_is_named(arguments, message):
    with pytest.raises(BadInput, match=message):
        run_here(['tools/bench.py', *arguments.split()])


@pytest.fixture(scope='module')
def bench():
    """The names in tools/bench.py, as a dict."""
    hook = sys.excepthook
    path = sys.path[:]
    sys.path.insert(0, str(ROOT / 'tools'))
    sys.modules.pop('_path', None)
    try:
        yield runpy.run_path(str(ROOT / 'tools/bench.py'), run_name='bench')
    finally:
        sys.excepthook = hook
        sys.path[:] = path


@pytest.mark.parametrize('rehearse', [False, True])
def test_the_plan_for_a_gpu_fits_nine_minutes_and_its_commands_are_valid(bench, rehearse):
    knobs = dict(text='text', tokenizer='tokenizer', fp8_steps=100, rehearse=rehearse)
    parts = gpu_checks.plan('out', 'scratch', knobs)
    assert parts[0].name == 'tests' and sum(part.limit_s for part in parts) <= 9 * 60
    files = []
    for part in parts:
        for _, script, *arguments in part.commands:
            if script != 'tools/bench.py':
                assert part.name == 'tests' and 'tests/test_gpu.py' in arguments
                continue
            config = configure(dict(bench), arguments[1:], verbose=False)
            known = {*bench['OTHERS'], *bench['OF_MODELS'], *bench['NAMED']}
            assert {*(config['parts'] or [])} <= known
            assert {*(config['models'] or [])} <= {*bench['SHAPES']}
            for case in filter(None, config['cases'].split(',')):
                # A machine with one GPU can run it.
                assert bench['CASES'][case][0] == 1
            for side in filter(None, config['vs'].split(',')):
                assert side in bench['PEERS'] or side.split('=')[0] in bench['VARIANTS']
            files += [config['json']] if config['json'] else []
    # No command overwrites the figures of another one.
    assert len(files) == len(set(files)) > 8


def is_running(pid):
    stat = Path(f'/proc/{pid}/stat')
    return stat.exists() and stat.read_text().split()[2] != 'Z'


def test_a_part_that_overruns_is_killed_and_results_are_written_after_every_part(tmp_path):
    def python(code, *arguments):
        return [sys.executable, '-c', code, *arguments]

    # The process that the part starts must end, too. It ignores Ctrl-C, as a hanging one may.
    child = 'import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(99)'
    slow = (
        'import subprocess, sys, time\n'
        f'process = subprocess.Popen([sys.executable, "-c", {child!r}])\n'
        f'open("{tmp_path}/pid", "w").write(str(process.pid))\n'
        'time.sleep(99)')
    good = (
        f'import shutil; shutil.copy("{tmp_path}/results.json", "{tmp_path}/before.json")\n'
        f'open("{tmp_path}/f.json", "w").write(\'{{"tables": [{{"title": "T", "columns": ["c"], '
        '"rows": [["7"]]}]}\')')
    parts = [
        gpu_checks.Part('slow', 1, [python(slow)]),
        gpu_checks.Part('broken', 20, [python('raise SystemExit("gone wrong")')]),
        gpu_checks.Part('good', 20, [python(good, f'--json={tmp_path}/f.json')]),
        gpu_checks.Part('late', 200, [python('print(1)')]),
        gpu_checks.Part('absent', 1, [], 'a package is not installed')]
    records = gpu_checks.run_parts(parts, 0.8, str(tmp_path))
    assert [r['status'] for r in records] == ['overran', 'failed', 'done', 'skipped', 'skipped']
    assert records[0]['seconds'] < 10
    assert not is_running(int((tmp_path / 'pid').read_text()))
    # When the third part ran, the results of the two before it were in the folder.
    before = json.loads((tmp_path / 'before.json').read_text())
    assert [part['name'] for part in before['parts']] == ['slow', 'broken']
    text = (tmp_path / 'results.md').read_text()
    assert 'gone wrong' in text and '\nT\n\n| c |\n|---|\n| 7 |' in text
    assert 's were left' in text and 'a package is not installed' in text


def test_a_rehearsal_runs_a_part_as_on_a_gpu(tmp_path):
    done = run([
        *BENCH, 'gpu', '--rehearse=True', "--parts=['loss']", f'--out={tmp_path}/gpu'])
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / 'gpu/results.json').read_text())
    assert {'date', 'device', 'driver', 'torch', 'triton', 'cuda', 'cudnn'} <= {*found['about']}
    (part,) = found['parts']
    assert (part['name'], part['status']) == ('loss', 'done')
    rows = part['figures'][0]['tables'][0]['rows']
    assert [row[1] for row in rows][:2] == ['ours', 'full logits']
    assert '| loss | done |' in done.stdout and '| 576 | ours |' in done.stdout


def test_the_floor_of_a_measurement_is_its_flops_at_the_speed_of_training(tmp_path):
    shape = dict(vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, ffn_dim=48)
    config = dict(asdict(ModelConfig(**shape)), block_size=16)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    # A measurement of 8 rows of 16 tokens, of which each costs half of a trained one.
    flops = 8 * 16 * flops_per_token(ModelConfig(**shape), 16) / 2
    records = []
    for step in range(8):
        records.append({
            'step': step, 'train/loss': 1.0, 'train/tokens_per_second': 1000.0, 'train/mfu': None,
            'system/step_ms': 20.0, 'system/data_ms': 1.0, 'system/gpu_memory': None})
    for step, ms in ((3, 900.0), (6, 128.0)):
        total = step / 3 * flops
        records.append({'step': step, 'system/mixture_ms': ms, 'mixture/extra_flops': total})
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
    found = gpu_checks.training_figures(str(tmp_path), 5.0)
    # 128 tokens take 128 ms at 1,000 tokens/s, half of them 64 ms.
    assert found['floor of a measurement, ms'] == pytest.approx(64)
    assert found['later / floor'] == pytest.approx(2)
    assert found['first measurement, ms'] == 900
    assert found['later / 250 steps'] == pytest.approx(128 / (250 * 20))


@pytest.mark.parametrize('name, kind', [
    ('nvjet_tst_192x192_64x4_2x1_v_bz_coopb_nnt', 'products'),
    ('void cutlass::kernel2<cutlass_80_tensorop_bf16_s16816gemm>', 'products'),
    ('cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6', 'attention'),
    ('void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::half_t>', 'attention'),
    ('triton_red_fused__scaled_dot_product_flash_attention_backward_mm_3', 'rest'),
    ('void at::native::multi_tensor_apply_kernel<at::native::FusedAdamMathFunctor>', 'adamw'),
    ('cross_entropy_kernel', 'loss'),
])
def test_a_kernel_is_counted_by_its_kind(bench, name, kind):
    assert bench['kind_of'](name.lower()) == kind
