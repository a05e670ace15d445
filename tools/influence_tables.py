"""What `python tools/influence_tables.py table | loo | score` does: influence as tables and figures, and scores of rows, for any checkpoint.

config is that of influence.py's command line, name -> value, in every function.
"""
import contextlib
import glob
import json
import os
import sys

import numpy as np
import torch

if __name__ == '__main__':
    import _path  # noqa: F401

from configurator import BadInput, configure
from data import Source, batch_of, common_tokenizer
from influence import check_layers, mean_and_error
from lib.device import pick_dtype, start_ranks, tune_malloc
from lib.hf import open_model
from lib.validate import row_losses
from methods import reweight, rules, selection
from ops.attention import check_documents
from tools import plots

# -- knobs of the command line --
ckpt = ''                               # run, checkpoint, imported folder, hub name; table: several with commas, or a glob
sources = ''                            # names of sources in data_dir, with commas
probe: dict[str, float] = {}            # domain -> weight: probe sets (data_dir/probe/<domain>)
without: dict[str, str] = {}            # loo: source -> run that was trained without it
data_dir = 'data'                       # folder of the sources
block_size: int | None = None           # tokens of a row; None: the model's context
rows = 64                               # of every source
probe_rows = 128                        # of every probe set
layers = 'last'                         # parameters that influence is measured on: last | all | first | embedding+head
scaling = 'none'                        # none | datainf
batch_size = 8                          # rows at a time
seed = 0                                # of the choice of rows
out = 'out/influence'                   # folder for tables and figures
scores = 'scores'                       # score: folder in every source's
device = 'auto'                         # auto | cpu | cuda
dtype = 'auto'                          # auto | float32 | bfloat16 (autocast over fp32 weights)


def open_all(path, config, device, source_names):
    """(model with gradients, find_model's dict, sources, probe sets, function that puts rows on the device)."""
    model, _, about = open_model(path, device, torch.float32, needs_tokenizer=False)
    model.requires_grad_(True)
    length, data_dir = config['block_size'] or about['context'], config['data_dir']
    if not config['probe']:
        raise BadInput("--probe is missing: --probe=\"{'math': 1.0}\" with data_dir/probe/math.")
    reweight.check_probe(config['probe'])
    of_run = about['state']['config'] if about['checkpoint'] else None          # None for an imported model
    packing = ('document', of_run['overlong']) if of_run and of_run.get('packing') == 'document' else ('window', 'truncate')     # as it was trained
    sources = [Source(data_dir, name.strip(), 'train', length, 0, about['model'].vocab_size, *packing) for name in source_names]
    probes = [reweight.open_probe(data_dir, domain, length, about['model'].vocab_size, *packing) for domain in config['probe']]
    made_with = common_tokenizer(sources + probes)
    if made_with and about['fingerprint'] not in (None, made_with['fingerprint']):
        raise BadInput(f"the tokenizer of '{path}' ({about['fingerprint']}) is not that of the shards in {data_dir} ({made_with['fingerprint']}).")
    for source, what in [(s, 'rows') for s in sources] + [(p, 'probe_rows') for p in probes]:
        if not 4 <= config[what] <= source.n_windows:
            raise BadInput(f"{what} = {config[what]} must be at least 4 and at most what '{source.name}' has, {source.n_windows} windows of "
                           f'{length} tokens.')

    bos_id = made_with['bos_id'] if of_run and (of_run['document_mask'] or packing[0] == 'document') else None
    if bos_id is not None:
        check_documents(device, pick_dtype(config['dtype'], device)[0])

    def to_device(ids):
        return batch_of(torch.from_numpy(ids).to(device), bos_id)
    if sources:
        reweight.check_texts(probes, sources, [], made_with and made_with['bos_id'])
    return model, about, sources, probes, to_device


def print_rows(heading, names, columns, values, errors):
    print(f'\n{heading}\n{"":<20}' + ''.join(f'{column:>20}' for column in columns))
    for name in names:
        print(f'{name:<20}' + ''.join(f'{x:>12.3f} +-{e:>5.3f}' for x, e in zip(values[name], errors[name])))


def write_result(config, name, result, figure):
    path = os.path.join(config['out'], f'{name}.json')
    with open(path, 'w', encoding='utf-8') as f:
        json.dump(result, f, indent=1)
    print(f'{path}, {figure}')


def make_table(paths, config, device, autocast):
    """Influence of every source on every probe domain at every checkpoint, with standard errors; the weights of Eq. 5-6 at the end."""
    tables, state, columns = [], {}, [*config['probe'], 'mean']
    for path in paths:
        model, _, sources, probes, to_device = open_all(path, config, device, config['sources'].split(','))
        options = dict(batch_size=config['batch_size'], key=(config['seed'], 0), to_device=to_device)
        with autocast:
            directions, shares = reweight.measure_directions(model, probes, sources, config['layers'], config['probe'], config['probe_rows'],
                                                             config['rows'], scaling=config['scaling'], apart=True, **options)
            r, se = reweight.measure_sources(model, sources, directions, shares, config['rows'], **options)
        print_rows(f"{path}, layers {config['layers']}: influence (1: as good as the probe's own text) +- standard error", r, columns, r, se)
        noise = {domain: 1 - x for d in directions for domain, x in d.reliability.items()}
        print('noise in the direction of the probe: ' + ', '.join(f'{domain} {x:.0%}' for domain, x in noise.items()))
        tables.append(dict(ckpt=path, noise=noise, r={s: x.tolist() for s, x in r.items()}, se={s: x.tolist() for s, x in se.items()}))
        weights, state, log = rules.update_proportional(dict.fromkeys(r, 1 / len(r)), {s: float(x[-1]) for s, x in r.items()}, {}, state, 0.0,
                                                           dict.fromkeys(r, 1.0))
    print(f'\nweights in proportion to the mean influence over {len(paths)} checkpoint(s), the t-th counting t: '
          + (f"none, {log['kept']}" if log['kept'] else ', '.join(f'{name} {w:.3f}' for name, w in weights.items())))
    figure = plots.draw_table(os.path.join(config['out'], 'influence_table.png'), list(r), columns, list(r.values()), list(se.values()),
                              f'Influence at {paths[-1]}')
    write_result(config, 'influence_table', dict(config=config, columns=columns, tables=tables, weights=weights), figure)


def make_loo(path, config, device, autocast):
    """What leaving a source out did to the loss on every probe domain: loss without it minus loss with all (MobileLLM-R1, Eq. 1)."""
    if not config['without']:
        raise BadInput("--without is missing: the runs that each left a source out, --without=\"{'code': 'out/no_code'}\".")
    found, r, se = {}, {}, {}
    for name, where in {'': path, **config['without']}.items():
        model, about, _, probes, to_device = open_all(where, config, device, [])
        config = {**config, 'block_size': config['block_size'] or about['context']}         # the first one's: all on the same rows
        with autocast:
            found[name] = [row_losses(model, p, config['probe_rows'], config['batch_size'], to_device) for p in probes]
    for name in config['without']:
        pairs = [mean_and_error(there[0] - full[0], full[1]) for there, full in zip(found[name], found[''])]
        r[name], se[name] = [float(x) for x, _ in pairs], [float(x) for _, x in pairs]
    columns = [*config['probe']]
    print_rows(f'loss without a source minus loss of {path}, nats per token (above 0: it helps) +- standard error over rows', r, columns, r, se)
    figure = plots.draw_table(os.path.join(config['out'], 'influence_loo.png'), list(r), columns, list(r.values()), list(se.values()),
                              'Loss without the source minus loss with it')
    write_result(config, 'influence_loo', dict(config=config, columns=columns, delta=r, se=se), figure)


def make_scores(path, config, device, autocast, rank, world_size):
    """Scores of every row of the sources, beside their shards. Processes that torchrun starts share the parts, each with a whole model."""
    model, about, sources, probes, to_device = open_all(path, config, device, config['sources'].split(','))
    n = config['probe_rows']
    for p in probes:
        if p.n_windows < n + n // 2:
            raise BadInput(f"probe set '{p.name}' has {p.n_windows} windows, fewer than probe_rows = {n} and half as many again to compare with.")
    with autocast:
        options = dict(batch_size=config['batch_size'], key=(config['seed'], 0), to_device=to_device)
        directions, shares = reweight.measure_directions(model, probes, sources, config['layers'], config['probe'], n, config['rows'],
                                                         scaling=config['scaling'], **options)
        direction = directions[0] if len(directions) == 1 else reweight.joint(directions, shares)
        reference = reweight.unseen_reference(model, probes, direction, n, **options)
        for source in sources:
            folder = os.path.join(config['data_dir'], source.name, config['scores'])
            made = dict(ckpt=path, step=about['state']['step'] if about['checkpoint'] else None, block_size=source.block_size, shards=source.fingerprint(),
                        **{key: config[key] for key in ('layers', 'scaling', 'probe', 'probe_rows', 'seed')},
                        datainf=[config['sources'], config['rows']] if config['scaling'] == 'datainf' else None)
            selection.write_scores(folder, made, reference, source, lambda cursors: selection.score_rows(
                model, source, cursors, direction, config['batch_size'], to_device), rank, world_size)
            if world_size == 1:
                scores, reference, _ = selection.read_scores(folder, source)
                keep, reasons = selection.judge(scores.astype(np.float64), reference, 0.1, 0.1)
                print(f'{source.name}: {len(scores):,} rows -> {folder}; margin 0.1 keeps {keep.mean():.1%}; dropped for '
                      + ', '.join(f'{why} {share:.1%}' for why, share in reasons.items()))


def run(command, config):
    rank, world_size, device = start_ranks(config['device'], join=False)
    tune_malloc()
    dtype, _ = pick_dtype(config['dtype'], device)
    autocast = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    if config['batch_size'] < 1 or config['seed'] < 0:
        raise BadInput(f"batch_size = {config['batch_size']} must be at least 1 and seed = {config['seed']} not negative.")
    os.makedirs(config['out'], exist_ok=True)
    if command == 'score':
        make_scores(config['ckpt'], config, device, autocast, rank, world_size)
    elif world_size > 1:
        raise BadInput(f'influence.py {command} works in one process; start it without torchrun.')
    elif command == 'table':
        paths = [path for part in config['ckpt'].split(',')
                 for path in [p for p in sorted(glob.glob(part)) if os.path.isdir(p) and not p.endswith('.tmp')] or [part]]
        make_table(paths, config, device, autocast)
    else:
        make_loo(config['ckpt'], config, device, autocast)


if __name__ == '__main__':
    command = sys.argv[1] if len(sys.argv) > 1 else '--help'
    is_command = command in ('table', 'loo', 'score')
    config = configure(globals(), sys.argv[2:] if is_command else sys.argv[1:] or ['--help'], verbose=False)
    if not is_command or not ckpt or command != 'loo' and not sources:
        raise BadInput('say `influence_tables.py table --ckpt=... --sources=... --probe=...`, `loo --ckpt=... --without=... --probe=...` or '
                       '`score --ckpt=... --sources=... --probe=...`.')
    if scaling not in ('none', 'datainf'):
        raise BadInput(f"scaling = '{scaling}' must be none or datainf (adam needs the optimizer of a run: train.py has it).")
    check_layers(layers, 'layers')
    from tools import influence_tables
    influence_tables.run(command, config)
