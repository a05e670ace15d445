"""Architecture sweeps: the published picks from the published curves, files of three kinds, and a sweep that is run."""
import json
import math

import numpy as np
import pytest

from configurator import BadInput
from model import GPT, ModelConfig
from tests.conftest import TINY, run_here
from tools import curves
from tools.sweep import arch_shapes

BANDS = {'3M-5M': 1_500_000, '7.5M-10M': 1_000_000, '12.5M-15M': 800_000, '22.5M-25M': 640_000, '45M-50M': 500_000}
PICKS = ['10_22_160_240', '10_20_240_360', '16_26_256_384', '10_22_320_640', '14_24_448_896']


@pytest.fixture
def published(shared_data):
    folder = shared_data.parent / 'reference' / 'arch_ablation'
    if not folder.is_dir():
        pytest.skip('needs the published curves of an architecture sweep (../shared/reference/arch_ablation)')
    return folder


@pytest.mark.parametrize('loss, ranks', [('train', [1, 1, 2, 1, 1]), ('val', [1, 1, 2, 2, 1])])
def test_one_rule_gives_the_published_picks(published, tmp_path, loss, ranks):
    found = curves.collect(str(published), str(tmp_path), BANDS, 'step', 500_000, loss, 1e6)
    assert [p['pick'] for p in found['picks'].values()] == PICKS
    assert [p['pick_rank'] for p in found['picks'].values()] == ranks
    assert [(p['n_reached'], p['n_band']) for p in found['picks'].values()] == [(42, 113), (41, 70), (37, 52), (23, 31), (21, 25)]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ('pareto.png', 'bands.png', 'curves.csv'))
    if loss == 'train':                                        # the three remarks of those who made the sweep, as its README checked them
        e = found['effects']
        assert e['n'] == 915 and e['spearman'] == pytest.approx(-0.994, abs=1e-3)
        assert e['groups']['ffn_dim / n_embd = 0.5']['mean'] == pytest.approx(0.0065, abs=3e-4)
        assert e['groups']['ffn_dim / n_embd = 2']['mean'] == pytest.approx(-0.003, abs=5e-4)
        assert e['groups']['deep for the heads']['mean'] == pytest.approx(-0.003, abs=5e-4)


def test_a_table_reads_as_its_curves_do(published):
    """The CSV of a band has the same points, some of them twice."""
    whole = {c.name: c for c in curves.read_curves(str(published), 'train')}
    table = curves.read_curves(str(published / 'loss_3M_5M.csv'), 'train')
    assert len(table) == 113
    for curve in table:
        n = min(len(curve.loss), len(whole[curve.name].loss))
        assert curve.params == whole[curve.name].params and np.array_equal(curve.loss[:n], whole[curve.name].loss[:n])


def test_the_grid_is_the_published_one_and_counts_are_of_the_models(published):
    listed = {tuple(map(int, line.split('\t')[:4])) for line in (published / 'ablation_params.tsv').read_text().splitlines()}
    assert {tuple(s[k] for k in curves.SHAPE) for s in arch_shapes()} == listed and len(arch_shapes()) == 1344


def law(params, shape, step):
    """A loss that falls with size and time, a little with depth, and not with heads."""
    return 6 - 0.3 * math.log(params) + 0.5 * step ** -0.3 - 0.01 * math.log2(shape[1])


def write_states(folder, stop=lambda shape: 4000):
    """trainer_state.json files of a made-up sweep, two checkpoints of one of them."""
    rows = []
    for heads in (2, 6, 10, 12):
        for layers in (heads + 2, heads + 10):
            for width, ratio in ((8, 1), (8, 2), (32, 2)):
                shape = (heads, layers, heads * width, heads * width * ratio)
                params = layers * (4 * shape[2] ** 2 + 3 * shape[2] * shape[3])
                rows.append((*shape, params))
                name, last = '_'.join(map(str, shape)), stop(shape)
                for checkpoint in (['checkpoint-2000', 'checkpoint-4000'] if heads == 2 else ['']):
                    where = folder / name / checkpoint
                    where.mkdir(parents=True)
                    until = int(checkpoint[11:]) if checkpoint else last
                    (where / 'trainer_state.json').write_text(json.dumps(dict(global_step=until, total_flos=6.0 * params * until * 100, log_history=[
                        dict(step=s, loss=law(params, shape, s) + 0.1, epoch=1) for s in range(500, until + 1, 500)] + [
                        dict(step=s, eval_loss=law(params, shape, s)) for s in range(1000, until + 1, 1000)])))
    (folder / 'ablation_params.tsv').write_text(''.join('\t'.join(map(str, row)) + '\n' for row in rows))
    return {'_'.join(map(str, row[:4])): row[4] for row in rows}


def test_states_of_hugging_face_at_equal_steps_and_flops(tmp_path, capsys):
    params = write_states(tmp_path / 'runs', stop=lambda shape: 4000 if shape[0] < 12 else 2000)
    found = curves.collect(str(tmp_path / 'runs'), str(tmp_path / 'out'), {}, 'step', None, 'val', 0)
    assert found['effects']['n'] == 18 and found['effects']['at'] == 4000        # the others stopped before
    for p in found['picks'].values():
        assert p['rows'] and all(row['loss'] == pytest.approx(law(row['params'], tuple(map(int, row['shape'].split('_'))), p['at'])) for row in p['rows'])
    again = curves.collect(str(tmp_path / 'out' / 'curves.csv'), str(tmp_path / 'again'), {}, 'step', None, 'val', 0)
    assert again['effects'] == found['effects']                                  # what it writes it also reads
    early = curves.collect(str(tmp_path / 'runs'), str(tmp_path / 'early'), {}, 'step', 2000, 'val', 0)['effects']
    assert early['n'] == 24 and early['slopes']['doubling n_layer']['nats'] == pytest.approx(-0.01, abs=1e-6)
    equal = curves.pick(curves.read_curves(str(tmp_path / 'runs'), 'val'), 0, 1e9, 'flops', 6.0 * min(params.values()) * 100 * 4000)
    assert equal['n_reached'] == sum(6.0 * n * 100 * 1000 <= equal['at'] for n in params.values())         # the large ones had not logged by then
    narrow = [c for c in curves.read_curves(str(tmp_path / 'runs'), 'val') if c.shape[2] == 8 * c.shape[0]]
    assert len(narrow) == 16 and curves.effects(narrow, 'step', 2000)['slopes'] is None                   # the width follows from the heads
    with pytest.raises(BadInput, match='does not say its tokens. Compare by step'):
        curves.collect(str(tmp_path / 'runs'), str(tmp_path / 'out'), {'1k-1B': 10}, 'tokens', None, 'val', 0)
    with pytest.raises(BadInput, match='none of the 24 runs .* came to step 9,000. The last that half of them reached: 4,000'):
        curves.collect(str(tmp_path / 'runs'), str(tmp_path / 'out'), {'1k-1B': 9000}, 'step', None, 'val', 0)
    with pytest.raises(BadInput, match="bands: 'five' must be such as 5M"):
        curves.parse_band('five')
    (tmp_path / 'runs' / 'ablation_params.tsv').unlink()
    with pytest.raises(BadInput, match='does not say how many parameters'):
        curves.read_curves(str(tmp_path / 'runs'), 'val')


def test_a_sweep_of_shapes_and_a_grid(tmp_path, tiny_data, capsys):
    tiny = [f'--{k}={v}' for k, v in {**TINY, 'max_steps': 4, 'save_interval': 4, 'eval_interval': 2, 'data_dir': tiny_data, 'sources': {'a': 1.0, 'b': 1.0}}.items()]
    shapes = ['--grid.n_layer=[1, 2]', '--grid.n_embd=[16]', '--grid.n_head=[2, 3]', '--n_params=[1e3, 1e5]']
    run_here(['tools/sweep.py', 'arch', *shapes, f'--out={tmp_path / "arch"}', '--jobs=2', *tiny])
    assert '2 combinations are not possible, the first is 3_1_16_48: n_embd = 16 is not a multiple of n_head = 3' in capsys.readouterr().out
    rows = [tuple(map(int, line.split('\t'))) for line in (tmp_path / 'arch' / 'ablation_params.tsv').read_text().splitlines()]
    assert len(rows) == 2
    for heads, layers, width, inner, n in rows:
        built = GPT(ModelConfig(vocab_size=64, n_layer=layers, n_head=heads, n_kv_head=heads, n_embd=width, ffn_dim=inner))
        assert sum(p.numel() for p in built.parameters()) == n
    run_here(['tools/sweep.py', 'collect', str(tmp_path / 'arch'), '--unit=flops'])
    found = json.loads((tmp_path / 'arch' / 'collect.json').read_text())
    assert found['effects'] is None and sum(len(p['rows']) for p in found['picks'].values()) >= 1
    with pytest.raises(BadInput, match="no knob 'n_layers'. Did you mean 'n_layer'"):
        run_here(['tools/sweep.py', 'grid', '--grid.n_layers=[1]', *tiny])
    with pytest.raises(BadInput, match='nothing is left to run. Widen n_params'):
        run_here(['tools/sweep.py', 'arch', '--dry_run=True', '--n_params=[1, 2]', f'--out={tmp_path / "none"}', *tiny])
