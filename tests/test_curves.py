"""Architecture sweeps: published picks from published curves, files of three kinds, a sweep."""
import json
import math
from itertools import product

from tests.conftest import need

need('scipy', 'matplotlib')

import numpy as np
import pytest

from configurator import BadInput
from model import GPT, ModelConfig
from tests.conftest import TINY, run_here
from tools import curves, sweep

BANDS = {
    '3M-5M': 1_500_000, '7.5M-10M': 1_000_000, '12.5M-15M': 800_000, '22.5M-25M': 640_000,
    '45M-50M': 500_000}
PICKS = ['10_22_160_240', '10_20_240_360', '16_26_256_384', '10_22_320_640', '14_24_448_896']
REACHED = [(42, 113), (41, 70), (37, 52), (23, 31), (21, 25)]       # of how many runs of a band


@pytest.fixture
def published(shared_data):
    folder = shared_data.parent / 'reference' / 'arch_ablation'
    if not folder.is_dir():
        pytest.skip(
            'needs the published curves of an architecture sweep '
            '(../shared/reference/arch_ablation)')
    return folder


@pytest.mark.parametrize('loss, ranks', [('train', [1, 1, 2, 1, 1]), ('val', [1, 1, 2, 2, 1])])
def test_one_rule_gives_the_published_picks(published, tmp_path, loss, ranks):
    found = curves.collect(str(published), str(tmp_path), BANDS, 'step', 500_000, loss, 1e6)
    picks = found['picks'].values()
    assert [p['pick'] for p in picks] == PICKS
    assert [p['pick_rank'] for p in picks] == ranks
    assert [(p['n_reached'], p['n_band']) for p in picks] == REACHED
    for name in ('pareto.png', 'bands.png', 'curves.csv'):
        assert (tmp_path / name).stat().st_size > 10_000
    if loss == 'train':
        # The README of the published sweep states these effects.
        e = found['effects']
        assert e['n'] == 915 and e['spearman'] == pytest.approx(-0.994, abs=1e-3)
        groups = e['groups']
        assert groups['ffn_dim / n_embd = 0.5']['mean'] == pytest.approx(0.0065, abs=3e-4)
        assert groups['ffn_dim / n_embd = 2']['mean'] == pytest.approx(-0.003, abs=5e-4)
        assert groups['deep for the heads']['mean'] == pytest.approx(-0.003, abs=5e-4)


def test_a_table_reads_as_its_curves_do(published):
    """The CSV of a band has the same points as the JSON of all runs, some of them twice."""
    full = {curve.name: curve for curve in curves.read_curves(str(published), 'train')}
    table = curves.read_curves(str(published / 'loss_3M_5M.csv'), 'train')
    assert len(table) == 113
    for curve in table:
        other = full[curve.name]
        n = min(len(curve.loss), len(other.loss))
        assert curve.params == other.params and np.array_equal(curve.loss[:n], other.loss[:n])


def test_the_default_grid_is_the_published_one(published):
    listed = set()
    for line in (published / 'ablation_params.tsv').read_text().splitlines():
        listed.add(tuple(int(n) for n in line.split('\t')[:4]))
    shapes = sweep.arch_shapes(
        sweep.heads, sweep.extra_layers, sweep.head_widths, sweep.ffn_ratios)
    assert len(shapes) == 1344
    assert {tuple(shape[key] for key in curves.SHAPE) for shape in shapes} == listed


def law(params, shape, step):
    """A loss that falls with size and time, a little with depth, and not with heads."""
    return 6 - 0.3 * math.log(params) + 0.5 * step ** -0.3 - 0.01 * math.log2(shape[1])


def write_state(folder, params, shape, last):
    """A trainer_state.json that follows the law up to step `last`."""
    history = []
    for step in range(500, last + 1, 500):
        history.append(dict(step=step, loss=law(params, shape, step) + 0.1, epoch=1))
    for step in range(1000, last + 1, 1000):
        history.append(dict(step=step, eval_loss=law(params, shape, step)))
    state = dict(global_step=last, total_flos=6.0 * params * last * 100, log_history=history)
    folder.mkdir(parents=True)
    (folder / 'trainer_state.json').write_text(json.dumps(state))


def write_states(folder, stop=lambda shape: 4000):
    """A made-up sweep of 24 shapes that end at stop(shape). Some have two checkpoints.

    Returns name -> parameters.
    """
    counts = {}
    for heads, (width, ratio) in product((2, 6, 10, 12), ((8, 1), (8, 2), (32, 2))):
        for layers in (heads + 2, heads + 10):
            shape = (heads, layers, heads * width, heads * width * ratio)
            params = layers * (4 * shape[2] ** 2 + 3 * shape[2] * shape[3])
            name = '_'.join(map(str, shape))
            counts[name] = params
            if heads == 2:
                write_state(folder / name / 'checkpoint-2000', params, shape, 2000)
                write_state(folder / name / 'checkpoint-4000', params, shape, 4000)
            else:
                write_state(folder / name, params, shape, stop(shape))
    lines = [name.replace('_', '\t') + f'\t{params}\n' for name, params in counts.items()]
    (folder / 'ablation_params.tsv').write_text(''.join(lines))
    return counts


def collect(path, out, bands=(), unit='step', at=None):
    return curves.collect(str(path), str(out), dict(bands), unit, at, 'val', 0)


def test_states_of_hugging_face_at_equal_steps_and_flops(tmp_path):
    runs = tmp_path / 'runs'
    counts = write_states(runs, stop=lambda shape: 4000 if shape[0] < 12 else 2000)
    found = collect(runs, tmp_path / 'out')
    # The shapes of 12 heads stopped before.
    assert found['effects']['n'] == 18 and found['effects']['at'] == 4000
    for p in found['picks'].values():
        assert p['rows']
        for row in p['rows']:
            shape = tuple(int(n) for n in row['shape'].split('_'))
            assert row['loss'] == pytest.approx(law(row['params'], shape, p['at']))
    again = collect(tmp_path / 'out' / 'curves.csv', tmp_path / 'again')
    assert again['effects'] == found['effects']
    early = collect(runs, tmp_path / 'early', at=2000)['effects']
    assert early['n'] == 24
    assert early['slopes']['doubling n_layer']['nats'] == pytest.approx(-0.01, abs=1e-6)

    every = curves.read_curves(str(runs), 'val')
    least = 6.0 * min(counts.values()) * 100
    equal = curves.pick_architectures(every, (0, 1e9), 'flops', least * 4000)
    # The large models had not logged anything by then.
    logged = [n for n in counts.values() if 6.0 * n * 100 * 1000 <= equal['at']]
    assert equal['n_reached'] == len(logged)
    # The width of these follows from the heads.
    narrow = [curve for curve in every if curve.shape[2] == 8 * curve.shape[0]]
    assert len(narrow) == 16 and curves.effects(narrow, 'step', 2000)['slopes'] is None


def test_curves_that_cannot_be_compared_are_refused(tmp_path):
    runs = tmp_path / 'runs'
    write_states(runs)
    with pytest.raises(BadInput, match='does not say its tokens. Compare by step'):
        collect(runs, tmp_path / 'out', {'1k-1B': 10}, 'tokens')
    message = 'none of the 24 runs .* came to step 9,000. The last that half of them reached: 4,000'
    with pytest.raises(BadInput, match=message):
        collect(runs, tmp_path / 'out', {'1k-1B': 9000})
    with pytest.raises(BadInput, match="bands: 'five' must be such as 5M"):
        curves.parse_band('five')
    (runs / 'ablation_params.tsv').unlink()
    with pytest.raises(BadInput, match='does not say how many parameters'):
        curves.read_curves(str(runs), 'val')


def test_a_sweep_of_shapes_and_a_grid(tmp_path, tiny_data, capsys):
    knobs = {
        **TINY, 'max_steps': 4, 'save_interval': 4, 'eval_interval': 2, 'data_dir': tiny_data,
        'sources': {'a': 1.0, 'b': 1.0}}
    tiny = [f'--{key}={value}' for key, value in knobs.items()]
    arch = tmp_path / 'arch'
    run_here([
        'tools/sweep.py', 'arch', '--grid.n_layer=[1, 2]', '--grid.n_embd=[16]',
        '--grid.n_head=[2, 3]', '--n_params=[1e3, 1e5]', f'--out={arch}', '--jobs=2', *tiny])
    message = '2 combinations are not possible, the first is 3_1_16_48: n_embd = 16 is not a mult'
    assert message in capsys.readouterr().out
    rows = (arch / 'ablation_params.tsv').read_text().splitlines()
    assert len(rows) == 2
    for row in rows:
        heads, layers, width, inner, n = (int(field) for field in row.split('\t'))
        built = GPT(ModelConfig(
            vocab_size=64, n_layer=layers, n_head=heads, n_kv_head=heads, n_embd=width,
            ffn_dim=inner))
        assert sum(p.numel() for p in built.parameters()) == n
    run_here(['tools/sweep.py', 'collect', str(arch), '--unit=flops'])
    found = json.loads((arch / 'collect.json').read_text())
    assert found['effects'] is None and any(p['rows'] for p in found['picks'].values())
    with pytest.raises(BadInput, match="no knob 'n_layers'. Did you mean 'n_layer'"):
        run_here(['tools/sweep.py', 'grid', '--grid.n_layers=[1]', *tiny])
    with pytest.raises(BadInput, match='nothing is left to run. Widen n_params'):
        out = tmp_path / 'none'
        run_here([
            'tools/sweep.py', 'arch', '--dry_run=True', '--n_params=[1, 2]', f'--out={out}', *tiny])


def save_state(folder, name, history, **about):
    path = folder / name / 'trainer_state.json'
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(dict(global_step=40, total_flos=4e9, log_history=history, **about)))


def test_a_diverged_run_is_never_the_best_and_the_last_of_equal_steps_counts(tmp_path, capsys):
    nan = float('nan')
    steps = (10, 20, 30, 40)
    save_state(tmp_path, '2_4_64_128', [dict(step=s, loss=9 - s / 10) for s in steps])
    history = [dict(step=10, loss=7.5, grad_norm=1.0)]
    history += [dict(step=s, loss=0.0, grad_norm=nan) for s in steps[1:]]
    save_state(tmp_path, '2_4_64_160', history)
    # It was resumed at step 20, whose first log counts no more.
    losses = ((10, 8.0), (20, 7.0), (30, 3.0), (20, 7.1), (30, 6.1), (40, 5.1))
    save_state(tmp_path, '2_4_64_192', [dict(step=s, loss=y) for s, y in losses])
    rows = [f'2\t4\t64\t{width}\t{100_000 + width}\n' for width in (128, 160, 192)]
    (tmp_path / 'ablation_params.tsv').write_text(''.join(rows))
    bands = {'1k-1M': None}
    found = curves.collect(str(tmp_path), str(tmp_path / 'o'), bands, 'step', 25, 'train', 0)
    got = {row['shape']: row['loss'] for row in found['picks']['1k-1M']['rows']}
    assert got == pytest.approx({'2_4_64_128': 6.5, '2_4_64_192': 6.6})
    assert 'left out: 3 points of 1 runs' in capsys.readouterr().out


STATE = '{"global_step": 5, "log_history": [{"step": 1, "loss": 2}]}'
CSV = 'step,loss,params,config\n1,2.0,100,2_4_64_128\n'


@pytest.mark.parametrize('name, content, message', [
    ('r_2_4_64_128/trainer_state.json', b'[]', 'no trainer_state.json'),
    ('r_2_4_64_128/trainer_state.json', b'{"global_step": 5}', "KeyError: 'log_history'"),
    ('r_2_4_64_128/trainer_state.json', b'{"global_step": 5, "log_history": [3]}', 'no trainer'),
    ('r_2_4_64_128/trainer_state.json', STATE.replace('1', '"1"').encode(), 'must be int'),
    ('r_2_4_64_128/trainer_state.json', STATE[:-3].encode(), 'no valid JSON'),
    ('r_2_4_64_128/trainer_state.json', STATE.replace('2', '"x"').encode(), 'loss must be float'),
    ('r_2_4_64_128/trainer_state.json', STATE.replace('2', '-2').encode(), 'which cannot be'),
    ('r_1/trainer_state.json', STATE.encode(), 'does not name a shape'),
    ('ablation_params.tsv', b'2\t4\t64\n', 'tsv:1 must be five whole numbers'),
    ('ablation_params.tsv', b'2\t4\t64\t128\tmany\n', 'tsv:1 must be five whole numbers'),
    ('ablation_params.tsv', b'\xff\n', 'is not UTF-8'),
    ('t.csv', b'', 'has no column'),
    ('t.csv', b'\xff\xfe', 'is not UTF-8'),
    ('t.csv', CSV.replace('2.0', 'low').encode(), "t.csv:2: loss is 'low', which is no number"),
    ('t.csv', CSV.replace('100', '').encode(), 't.csv:2 needs a config'),
    ('t.csv', (CSV + '5\n').encode(), 't.csv:3 needs a config'),
    ('t.json', b'null', 'no table of curves'),
    ('t.json', b'{"meta": {"first_step": "1", "step_stride": 1}, "runs": {}}', 'must be int'),
    ('t.json', b'{"meta": {"first_step": 1, "step_stride": 1}, "runs": []}', 'no table of curves'),
])
def test_a_damaged_table_is_an_error(tmp_path, name, content, message):
    (tmp_path / 'ablation_params.tsv').write_text('2\t4\t64\t128\t1000\n')
    if name.endswith('.tsv'):
        save_state(tmp_path, '2_4_64_128', [dict(step=1, loss=2.0)])
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    is_table = path.suffix == '.csv' or path.name == 't.json'
    with pytest.raises(BadInput, match=message):
        curves.read_curves(str(path if is_table else tmp_path), 'train')


@pytest.mark.parametrize('band', ['1.2.3', '5X', '', '1e999', None])
def test_a_band_that_is_no_size(tmp_path, band):
    with pytest.raises(BadInput, match='bands: '):
        curves.collect(str(tmp_path), str(tmp_path), {band: None}, 'step', None, 'val', 0)
