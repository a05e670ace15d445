"""Influence as tables and figures, and scores of rows, for any checkpoint.

    python tools/influence_tables.py table --ckpt=out/run --sources=code,books --probe="{'math': 1}"
    python tools/influence_tables.py loo --ckpt=out/all --without="{'code': 'out/no_code'}" \\
        --probe="{'math': 1}"
    python tools/influence_tables.py score --ckpt=out/run --sources=code --probe="{'math': 1}"

`table` prints the influence of every source on every probe domain with its standard error. `loo`
compares runs that each left a source out. `score` scores every row of the sources for train.py
--select=scores.
"""
import contextlib
import json
import os
import re
import sys
from dataclasses import asdict

import numpy as np
import torch

if __name__ == '__main__':
    import _path  # noqa: F401  (the import path)

from configurator import BadInput, RunFault, at_least, configure, one_of
from data import Feeder, Source, common_tokenizer, open_probe
from kd import source_names, weights_fingerprint
from lib import parts
from lib.device import Run, pick_dtype, start_ranks, tune_malloc
from lib.hf import check_context, find_model, load_model
from lib.reading import match_paths
from lib.schedule import count_steps
from lib.validate import row_losses
from methods import reweight, rules, selection
from methods.estimates import mean_and_error, noise_of, reliability
from ops.attention import check_documents
from tools import plots

# -- knobs --
ckpt = ''                               # run, checkpoint, imported folder or hub name. table:
                                        # several with commas, or a glob
sources = ''                            # names of sources in data_dir, with commas
probe: dict[str, float] = {}            # domain -> weight: probe sets (data_dir/probe/<domain>)
without: dict[str, str] = {}            # loo: source -> run that was trained without it
data_dir = 'data'                       # folder of the sources
block_size: at_least(1) | None = None           # tokens of a row. None: the model's context
rows = 64                               # rows of every source
probe_rows = 128                        # rows of every probe set
layers: one_of('last', 'all', 'first', 'embedding+head') = 'last'       # parameters that
                                        # influence is measured on
scaling: one_of('none', 'datainf') = 'none'     # adam needs the optimizer of a run: train.py has it
batch_size: at_least(1) = 8             # rows at a time
seed: at_least(0) = 0                   # of the choice of rows
out = 'out/influence'                   # folder for tables and figures
scores = 'scores'                       # score: folder in every source's
device: one_of('auto', 'cpu', 'cuda') = 'auto'
dtype: one_of('auto', 'float32', 'bfloat16') = 'auto'       # of matrix products; weights are fp32


# Knobs in which runs may differ that `loo` compares: where a run writes, what it logs and keeps,
# and how its ranks share the work. Shards are compared by their fingerprints, sources by weight.
FREE = (
    'out_dir', 'resume', 'sources', 'data_dir', 'prepare', 'eval_interval', 'eval_rows',
    'eval_tasks', 'eval_tasks_interval', 'eval_tasks_limit', 'save_interval', 'keep_last',
    'keep_every', 'async_save', 'sample_tokens', 'sample_prompt', 'log_interval', 'profile',
    'wandb_mode', 'wandb_project', 'plan_on', 'plan_mfu', 'plan_link', 'plan_price', 'dry_run',
    'device', 'kernels', 'dp_replicate', 'dp_shard', 'tp', 'ep', 'compile',
    'reshard_after_forward', 'activation_checkpointing', 'hang_timeout')


def row_length(config, about):
    """Tokens of a row: the knob block_size, or those that the model was trained on."""
    trained = about['state'].get('config')      # None: an imported model
    return config['block_size'] or (trained['block_size'] if trained else about['context'])


def open_all(path, about, config, run, names):
    """Opens a model with gradients and the data for it.

    about: find_model(path); names: of sources
    Returns (model, sources, probe sets, Feeder). Raises BadInput when the data was made with
    another tokenizer, or has too few rows.
    """
    # --dtype only concerns autocast. Gradients of bf16 weights would keep 8 bits.
    model = load_model(about, run.device, torch.float32).eval()
    model.requires_grad_(True)
    data_dir = config['data_dir']
    length = row_length(config, about)
    check_context(about, length)
    vocab_size = about['model'].vocab_size
    # The rows are packed as the model was trained. An imported model has no config.
    trained = about['state']['config'] if about['checkpoint'] else None
    packing = 'window'
    overlong = 'truncate'
    if trained and trained.get('packing') == 'document':
        packing = 'document'
        overlong = trained['overlong']
    opened = []
    for name in names:
        opened.append(Source(data_dir, name, 'train', length, 0, vocab_size, packing, overlong))
    probes = []
    for domain in config['probe']:
        probes.append(open_probe(data_dir, domain, length, vocab_size, packing, overlong))
    tokenizer = common_tokenizer(opened + probes)
    if tokenizer and about['fingerprint'] not in (None, tokenizer['fingerprint']):
        raise BadInput(
            f"the tokenizer of '{path}' ({about['fingerprint']}) is not that of the shards in "
            f"{data_dir} ({tokenizer['fingerprint']}).")
    needed = [(s, 'rows') for s in opened] + [(p, 'probe_rows') for p in probes]
    for source, knob in needed:
        # With fewer rows there are too few batches to separate an influence from its noise.
        if not 4 <= config[knob] <= source.n_windows:
            raise BadInput(
                f"{knob} = {config[knob]} must be at least 4 and at most what '{source.name}' has, "
                f'{source.n_windows} windows of {length} tokens.')
    bos_id = None
    # Attention is masked as in training, because the gradients depend on what a token can see.
    if trained and (trained['document_mask'] or packing == 'document') and tokenizer:
        bos_id = tokenizer['bos_id']
        check_documents(run.device, run.dtype)
    if opened:
        reweight.check_texts(probes, opened, [], tokenizer and tokenizer['bos_id'], run)
    return model, opened, probes, Feeder(run.device, config['batch_size'], bos_id=bos_id)


def measurement_of(model, feeder, probes, config):
    """The Measurement that the knobs ask for."""
    # 0 takes the place of the step, so that all checkpoints are measured on the same rows.
    return reweight.Measurement(
        model, feeder, probes, config['probe'], config['probe_rows'], config['rows'],
        (config['seed'], 0), config['layers'], config['scaling'])


def check_noise(path, measurement, probe):
    """Raises RunFault when an influence.Probe is too noisy to measure on."""
    noise = noise_of(probe, measurement.weights, measurement.units)
    if noise:
        raise RunFault(f'{path}: {noise}. Raise probe_rows, or make the probe sets larger.')


def print_rows(title, r, columns, se):
    """Prints a table of r +- se, dicts source -> list by column."""
    print(f'\n{title}\n{"":<20}' + ''.join(f'{column:>20}' for column in columns))
    for name in r:
        pairs = zip(r[name], se[name], strict=True)
        print(f'{name:<20}' + ''.join(f'{x:>12.3f} +-{error:>5.3f}' for x, error in pairs))


def write_result(config, name, result, figure):
    """Writes a result as JSON into the folder `out` and prints the paths."""
    path = os.path.join(config['out'], f'{name}.json')
    with open(path, 'w', encoding='utf-8') as f:
        json.dump(result, f, indent=1)
    print(f'{path}, {figure}')


def in_order(abouts):
    """The models of a table, path -> find_model's dict, in the order in which they count.

    Checkpoints of one run are sorted by their steps. Raises BadInput for different models, and for
    a checkpoint that is there twice.
    """
    first_path, first = next(iter(abouts.items()))
    seen = {}
    for path, about in abouts.items():
        if about['model'] != first['model'] or about['fingerprint'] != first['fingerprint']:
            raise BadInput(
                f"--ckpt: '{path}' is another model than '{first_path}', or has another tokenizer. "
                'A table is of checkpoints of one model.')
        where = os.path.realpath(about['checkpoint'] or about['folder'])
        if where in seen:
            raise BadInput(
                f"--ckpt: '{path}' and '{seen[where]}' are the same checkpoint, {where}.")
        seen[where] = path
    # The t-th counts t, so the order matters. A pattern sorts step_1000000 before step_999999.
    folders = {os.path.dirname(where) for where in seen}
    if len(folders) == 1 and first['checkpoint']:
        by_step = sorted(abouts, key=lambda path: abouts[path]['state']['step'])
        if by_step != list(abouts):
            print(f'the checkpoints are taken in the order of their steps: {", ".join(by_step)}')
        return {path: abouts[path] for path in by_step}
    return abouts


def make_table(paths, config, run):
    """Influence of every source on every probe domain at every checkpoint.

    The weights at the end are those of MobileLLM-R1 (arXiv:2509.24945), equations 5 and 6.
    """
    columns = [*config['probe'], 'mean']
    tables = []
    state = {}
    names = source_names(config['sources'], 'sources')
    for path in paths:
        if paths.count(path) > 1:
            raise BadInput(f"--ckpt names '{path}' twice.")
    abouts = in_order({path: find_model(path) for path in paths})
    paths = list(abouts)
    for path, about in abouts.items():
        model, opened, probes, feeder = open_all(path, about, config, run, names)
        measurement = measurement_of(model, feeder, probes, config)
        with run.autocast:
            probe = measurement.probe(opened)
            found = measurement.of_sources(opened, probe)
        check_noise(path, measurement, probe)
        r = found.r
        se = found.se
        print_rows(
            f"{path}, layers {config['layers']}: influence (1: as good as the probe's own text) +- "
            'standard error', r, columns, se)
        noise = {domain: 1 - value for domain, value in reliability(probe).items()}
        shown = ', '.join(f'{domain} {x:.0%}' for domain, x in noise.items())
        print(f'noise in the direction of the probe: {shown}')
        tables.append(dict(
            ckpt=path, noise=noise, r={name: x.tolist() for name, x in r.items()},
            se={name: x.tolist() for name, x in se.items()}))
        means = {name: float(x[-1]) for name, x in r.items()}
        # Bounds of 0 and 1, because the paper has none.
        weights, state, log = rules.update_proportional(
            dict.fromkeys(r, 1 / len(r)), means, state, 0.0, dict.fromkeys(r, 1.0))
    shown = ', '.join(f'{name} {weight:.3f}' for name, weight in weights.items())
    if log['kept']:
        shown = f"none, {log['kept']}"
    print(
        f'\nweights in proportion to the mean influence over {len(paths)} checkpoint(s), where the '
        f't-th counts t: {shown}')
    figure = plots.draw_table(
        os.path.join(config['out'], 'influence_table.png'), list(r), columns, list(r.values()),
        list(se.values()), f'Influence at {paths[-1]}')
    result = dict(config=config, columns=columns, tables=tables, weights=weights)
    write_result(config, 'influence_table', result, figure)


def check_pair(name, runs, abouts):
    """Raises BadInput unless a run differs from the first one by the source `name` left out alone.

    Both have the same number of steps, and what the source leaves goes to the others, whose weights
    keep their ratios. With less training of the others, their loss would rise for that reason.
    runs: source -> path, '' is the first run; abouts: the same of find_model's dicts
    """
    path = runs['']
    other = runs[name]
    for where, about in ((path, abouts['']), (other, abouts[name])):
        if not about['checkpoint'] or about['state']['config'] is None:
            raise BadInput(
                f"loo: '{where}' is an imported model. Its config is not known, so it cannot be "
                'compared. Give runs of train.py.')
    full = abouts['']['state']
    less = abouts[name]['state']
    weights = {s: w for s, w in full['config']['sources'].items() if w > 0}
    left = {s: w for s, w in less['config']['sources'].items() if w > 0}
    if name not in weights:
        raise BadInput(
            f"loo: '{path}' was not trained on '{name}', only on {', '.join(weights)}. --without "
            'names sources that it has.')
    if name in left:
        raise BadInput(f"loo: '{other}' was trained on '{name}' as well, with weight {left[name]}.")
    if set(left) != set(weights) - {name}:
        odd = sorted(set(left) ^ (set(weights) - {name}))
        raise BadInput(
            f"loo: '{other}' differs from '{path}' by more than '{name}': also by "
            f'{", ".join(odd)}.')
    equal = full['config']['mixture'] in (
        'stratified', 'natural', 'unimax', 'doge', 'doremi')
    scale = sum(left.values()) / sum(weights[s] for s in left)
    shifted = [s for s in left if abs(left[s] / (weights[s] * scale) - 1) > 0.02]
    if shifted and not equal:
        raise BadInput(
            f"loo: the weights of '{other}' are not those of '{path}' without '{name}', on any "
            f'scale: {", ".join(shifted)} got more or less than the others.')
    differing = []
    for knob, value in full['config'].items():
        there = less['config'].get(knob, value)         # an older version may lack a knob
        if knob not in FREE and there != value:
            differing.append(f'{knob} {value!r} and {there!r}')
    if differing:
        raise BadInput(
            f"loo: '{path}' and '{other}' differ by more than '{name}': {'; '.join(differing)}.")
    prints = [state['loader']['fingerprints'] for state in (full, less)]
    changed = [s for s in left if prints[0][s] != prints[1][s]]
    if changed:
        raise BadInput(
            f"loo: '{path}' and '{other}' were trained on different shards of "
            f'{", ".join(changed)}.')
    if full['step'] != less['step']:
        raise BadInput(
            f"loo: '{path}' is at step {full['step']}, '{other}' at step {less['step']}. Finish "
            'both, or give checkpoints of the same step (ckpt/step_...).')
    # A checkpoint that is named is compared as it is, a run only when it has ended.
    end = None
    if full['config']['epochs'] is None:
        end = min(count_steps(full['config'], None), full['config']['stop_step'] or 2**62)
    is_named = re.match(r'step_\d+$', os.path.basename(other.rstrip('/')))
    if end is not None and full['step'] < end and not is_named:
        raise BadInput(
            f"loo: '{path}' and '{other}' are at step {full['step']} of {end}. Finish both with "
            '--resume=True, or name checkpoints (ckpt/step_...).')


def make_loo(path, config, run):
    """What leaving a source out did to the loss on every probe domain.

    That is the loss without it minus the loss with all: MobileLLM-R1 (arXiv:2509.24945), equation
    1.
    """
    if not config['without']:
        raise BadInput(
            '--without is missing: the runs that each left a source out, '
            "--without=\"{'code': 'out/no_code'}\".")
    if '' in config['without']:
        raise BadInput("--without: '' is not the name of a source.")
    runs = {'': path, **config['without']}
    abouts = {name: find_model(where) for name, where in runs.items()}
    # Before any weights are loaded.
    for name in config['without']:
        check_pair(name, runs, abouts)
    losses = {}
    for name, where in runs.items():
        about = abouts[name]
        model, _, probes, feeder = open_all(where, about, config, run, [])
        # All runs are compared on the same rows, those of the first one's context.
        config = {**config, 'block_size': row_length(config, about)}
        with run.autocast:
            losses[name] = [
                row_losses(model, feeder, probe, config['probe_rows']) for probe in probes]
    r = {}
    se = {}
    for name in config['without']:
        r[name] = []
        se[name] = []
        for there, full in zip(losses[name], losses[''], strict=True):
            # Differences of the same rows cancel how hard a row is, so their error is smaller.
            value, error = mean_and_error(there[0] - full[0], full[1])
            r[name].append(float(value))
            se[name].append(float(error))
    columns = [*config['probe']]
    print_rows(
        f'loss without a source minus loss of {path}, nats per token (above 0: it helps) +- '
        'standard error '
        'over rows', r, columns, se)
    figure = plots.draw_table(
        os.path.join(config['out'], 'influence_loo.png'), list(r), columns, list(r.values()),
        list(se.values()), 'Loss without the source minus loss with it')
    result = dict(config=config, columns=columns, delta=r, se=se)
    write_result(config, 'influence_loo', result, figure)


def make_scores(path, config, run):
    """Scores every row of the sources, beside their shards.

    Processes that torchrun starts share the parts. Each has a full model.
    """
    names = source_names(config['sources'], 'sources')
    parts.check_name(config['scores'], 'scores')
    # Of other domains nothing is measured. For a direction of all layers they cost a pass each.
    config = {**config, 'probe': {name: w for name, w in config['probe'].items() if w > 0}}
    about = find_model(path)
    model, opened, probes, feeder = open_all(path, about, config, run, names)
    n = config['probe_rows']
    for probe in probes:
        if probe.n_windows < n + n // 2:
            raise BadInput(
                f"probe set '{probe.name}' has {probe.n_windows} windows, fewer than probe_rows = "
                f'{n} and half as many again for the comparison.')
    measurement = measurement_of(model, feeder, probes, config)
    made = dict(
        ckpt=path, step=about['state']['step'] if about['checkpoint'] else None,
        weights=weights_fingerprint(about), layers=config['layers'], scaling=config['scaling'],
        probe=config['probe'], probe_rows=n, seed=config['seed'], datainf=None)
    # DataInf's direction depends on rows of the sources too, so these settings must agree.
    if config['scaling'] == 'datainf':
        made['datainf'] = [config['sources'], config['rows']]
    folders = {s.name: os.path.join(config['data_dir'], s.name, config['scores']) for s in opened}
    with contextlib.ExitStack() as locks, run.autocast:
        # All locks are taken before anything is measured: a second launch ends here.
        for folder in folders.values():
            locks.enter_context(selection.lock_scores(folder, run.rank))
        # A row has one score, so the domains are combined before the pass over the data.
        probe = measurement.probe(opened)
        check_noise(path, measurement, probe)
        direction = measurement.direction(probe)
        reference = selection.reference_of(measurement.unseen_scores(direction))
        for source in opened:
            def score(cursors, source=source):
                return selection.score_rows(model, feeder, source, cursors, direction)

            folder = folders[source.name]
            made |= dict(
                block_size=source.block_size, shards=source.fingerprint(),
                reference=asdict(reference))
            selection.write_scores(folder, made, source, score, run)
            # With several processes, the parts of the others may not be there yet.
            if run.world_size == 1:
                print_scores(folder, source)


def print_scores(folder, source):
    """Prints what the default margin would keep."""
    scores, reference, _ = selection.read_scores(folder, source)
    keep, reasons = selection.judge(scores.astype(np.float64), reference, 0.1, 0.1)
    dropped = ', '.join(f'{reason} {share:.1%}' for reason, share in reasons.items())
    print(
        f'{source.name}: {len(scores):,} rows -> {folder}; margin 0.1 keeps {keep.mean():.1%}; '
        f'dropped for {dropped}')


def checkpoints_of(ckpt):
    """The paths that --ckpt names: several with commas, each of them may be a glob."""
    paths = []
    for part, found in match_paths(ckpt):
        # A hub name matches no folder and is passed on. Folders in .tmp are still being written.
        folders = [path for path in found if os.path.isdir(path)]
        paths += [path for path in folders if not path.endswith('.tmp')] or [part]
    return paths


if __name__ == '__main__':
    command = sys.argv[1] if len(sys.argv) > 1 else '--help'
    is_command = command in ('table', 'loo', 'score')
    asks_help = '--help' in sys.argv or '-h' in sys.argv or len(sys.argv) < 2
    # An unknown command is no config file, as which it would be read here.
    arguments = ['--help'] if asks_help else sys.argv[2:] if is_command else []
    config = configure(globals(), arguments, verbose=False)
    if not is_command or not ckpt or command != 'loo' and not sources:
        raise BadInput(
            'say `influence_tables.py table --ckpt=... --sources=... --probe=...`, `loo --ckpt=... '
            '--without=... --probe=...` or `score --ckpt=... --sources=... --probe=...`.')
    tune_malloc()
    if not probe:
        raise BadInput("--probe is missing: --probe=\"{'math': 1.0}\" with data_dir/probe/math.")
    reweight.check_probe(probe)
    # The processes only divide the parts among them, which needs no process group.
    rank, world_size, here = start_ranks(device, join=False)
    run = Run(rank, world_size, here, pick_dtype(dtype, here)[0], '')
    os.makedirs(out, exist_ok=True)
    if command == 'score':
        make_scores(ckpt, config, run)
    elif world_size > 1:
        raise BadInput(
            f'influence_tables.py {command} works in one process. Start it without torchrun.')
    elif command == 'table':
        make_table(checkpoints_of(ckpt), config, run)
    else:
        make_loo(ckpt, config, run)
