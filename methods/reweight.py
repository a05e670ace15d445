"""Influence at work in a training run: every mixture_interval steps it is measured, sets the weights of the sources and drops rows.

train.py calls `check` before training and `update` in its loop; `measure` serves `tools/influence_tables.py table` as well. What is measured
on is a function of seed and step alone, so a resumed run measures the same.
"""
import os
import time

import numpy as np
from tqdm import tqdm

from configurator import BadInput, check_values
from data import Source, shared_documents, text_warnings
from influence import (
    Direction,
    adam_scale,
    check_layers,
    datainf,
    mean_and_error,
    probe_direction,
    source_products,
    unit,
)
from lib.device import all_reduce_sum
from methods import rules, selection
from model import flops_per_token

MIXTURES, UNITS = ('fixed', 'stratified', 'influence'), ('loss', 'own')
SCALINGS, RULES, SELECTIONS = ('none', 'adam', 'datainf'), ('step', 'proportional'), ('none', 'online', 'scores')
SMALL = ('last', 'first')       # layers of which a direction for every domain takes little memory; of the others there is one for all


def open_probe(data_dir, domain, block_size, vocab_size, packing='window', overlong='truncate'):
    """The probe set of a domain: data_dir/probe/<domain>, or else the split probe/ of the source of that name."""
    if '/' in domain:
        raise BadInput(f"probe: '{domain}' must be the name of a folder in {data_dir}/probe, without a /.")
    name = f'probe/{domain}' if os.path.isdir(os.path.join(data_dir, 'probe', domain)) or not os.path.isdir(
        os.path.join(data_dir, domain, 'probe')) else domain
    return Source(data_dir, name, 'probe', block_size, 0, vocab_size, packing, overlong)


def domain_of(probe):
    return probe.name.split('/')[-1]


def check_probe(weights):
    if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise BadInput(f'probe = {weights}: weights must not be negative, and one must be above 0.')


def check(config, sources, probes, interval_rows, world_size):
    """BadInput for settings with which a re-weighting or selection cannot work; returns whether the run measures influence at all.

    config: train.py's knobs; sources, probes: lists of Source; interval_rows: rows that are trained on between two measurements.
    """
    check_values(config, dict(influence_scaling=SCALINGS, influence_units=UNITS, influence_rule=RULES, select=SELECTIONS), {})
    measures = config['mixture'] == 'influence' or config['select'] == 'online'
    if not measures:
        return False
    check_layers(config['influence_layers'])
    if config['influence_scaling'] == 'adam' and config['optimizer'] != 'adamw':
        raise BadInput(f"influence_scaling = 'adam' needs AdamW's moments, and optimizer = '{config['optimizer']}'.")
    if config['influence_scaling'] == 'datainf' and world_size > 1:
        raise BadInput(f"influence_scaling = 'datainf' works on one rank only, and there are {world_size}. Use none or adam.")
    by_rows = config['influence_scaling'] == 'datainf' and "influence_scaling = 'datainf'" or config['select'] == 'online' and "select = 'online'"
    if by_rows and (config['tp'] > 1 or config['n_expert']):
        raise BadInput(f'{by_rows} looks at single rows, which it cannot do under tensor parallelism or with experts. Leave it out, or set tp=1.')
    weights, source_rows, probe_rows = config['probe'], config['influence_rows'], config['probe_rows']
    if not probes:
        raise BadInput("influence needs probe sets: --probe=\"{'math': 1.0}\" with data_dir/probe/math (prepare/probe.py makes it).")
    check_probe(weights)
    fewest = max(4, 2 * world_size)             # every rank has a row in two batches at least
    if source_rows < fewest or probe_rows < fewest:
        raise BadInput(f'influence_rows = {source_rows} and probe_rows = {probe_rows} must be at least {fewest} on {world_size} rank(s).')
    own = source_rows * len(sources) * (config['mixture'] == 'influence') + probe_rows * len(probes)
    if own > interval_rows:
        raise BadInput(f'a measurement reads {own:,} rows, more than the {interval_rows:,} that are trained on in between. Raise '
                       'mixture_interval, or lower influence_rows or probe_rows.')
    if config['max_epochs'] is not None and config['max_epochs'] <= 0:
        raise BadInput(f"max_epochs = {config['max_epochs']} must be above 0, or None for no cap.")
    unseen = probe_rows // 2 if config['select'] == 'online' else 0           # probe rows that others are compared with
    read = sources if config['mixture'] == 'influence' or config['influence_scaling'] == 'datainf' else []
    for source, rows, what in [(s, source_rows, 'influence_rows') for s in read] + [(p, probe_rows + unseen, 'probe_rows') for p in probes]:
        if source.n_windows < rows:
            raise BadInput(f"'{source.name}' has {source.n_windows} windows of {source.block_size} tokens, fewer than {what} = {rows}"
                           + (' (half as many again are compared with)' if unseen and what == 'probe_rows' else '')
                           + f'. Prepare more of it, or lower {what}.')
    if config['mixture'] == 'influence':
        rules.check_bounds(len(sources), config['mixture_min'], config['mixture_max'])
    return True


def check_texts(probes, sources, val_sources, bos_id, rank=0, world_size=1):
    """BadInput when a probe set shares documents with what is trained or validated on; a warning for text that is none.

    bos_id: the token that documents begin with, None: unknown, which is said.
    """
    if rank == 0:
        for source in sources:
            for found in text_warnings(source.rows(range(min(64, source.n_windows))), source.vocab_size):
                print(f"warning: source '{source.name}': {found}. Influence is not made for such text; look at it, and at its weight.")
    if bos_id is None and rank == 0:
        print('probe: these shards do not say where documents begin; aligned pieces of 256 tokens are compared with those of the sources')
    for probe in probes:
        for source in sources + val_sources:
            n = int(all_reduce_sum([shared_documents(probe, source, bos_id, rank, world_size)])[0])
            if n:
                raise BadInput(f"the probe set '{domain_of(probe)}' and source '{source.name}' ({source.split}) have {n:,} document(s) in common: "
                               'influence would measure how well the source holds the probe itself. Prepare one of them anew '
                               '(prepare/probe.py draws only from what its source keeps out of train/).')


# -- measuring ---------------------------------------------------------------------------------------------------------

def chosen_windows(source, n_rows, key):
    """n_rows row numbers (cursors) of a source, chosen by `key` (ints) alone and not by what has been trained on."""
    rng = np.random.default_rng(key)
    return rng.permutation(source.n_windows)[:n_rows] if source.n_windows < 2**24 else rng.integers(source.n_windows, size=n_rows)


def batches_of(source, chosen, n_batches, batch_size, to_device, rank, world_size):
    """This rank's part of at least n_batches batches (if the rows suffice) of up to batch_size rows per rank: rows `chosen` of a source.

    Every rank yields the same number of batches; what is missing to a whole one is repeated and does not count.
    """
    return batches_of_rows(lambda positions: source.rows([int(chosen[i]) for i in positions]), len(chosen), n_batches, batch_size, to_device, rank, world_size)


def batches_of_rows(read, n_rows, n_batches, batch_size, to_device, rank, world_size):
    """The same of n_rows rows of any origin; read(list of positions) gives them, (n, T + 1) int32."""
    size = max(1, min(batch_size, n_rows // (n_batches * world_size)))
    for start in range(0, n_rows, size * world_size):
        mine = range(start + rank * size, start + (rank + 1) * size)
        inputs, targets, doc_ids = to_device(read([min(i, n_rows - 1) for i in mine]))
        targets = targets.clone()
        targets[max(0, n_rows - mine.start):] = -1
        yield inputs, targets, doc_ids


def joint(directions, shares):
    """One direction from one per domain: the sum of share * direction, whose influence is the mean of theirs."""
    v = {name: sum(share * d.v[name] for d, share in zip(directions, shares)) for name in directions[0].v}
    return Direction(v, *({key: value for d in directions for key, value in getattr(d, field).items()} for field in ('den', 'reliability', 'loss')),
                     directions[0].layers)


def measure_directions(model, probes, sources, layers, weights, probe_rows, source_rows, batch_size, key, to_device, rank=0, world_size=1,
                       scaling='none', units='loss', optimizers=(), apart=False):
    """Directions of the probe sets and what each counts: (list of Direction, list of shares that sum to 1).

    probes, sources: lists of Source; weights: domain -> weight; key: tuple of ints that the choice of rows is made by. One direction
    per domain where apart is True or they are small, else one for all. units: as in `probe_direction`. scaling 'datainf' takes the rows of the sources as well.
    """
    options = dict(batch_size=batch_size, to_device=to_device, rank=rank, world_size=world_size)
    rows = {domain_of(p): chosen_windows(p, probe_rows, (*key, 0, i)) for i, p in enumerate(probes)}
    first = {d: chosen if scaling != 'datainf' else chosen[:len(chosen) // 2] for d, chosen in rows.items()}
    scale = adam_scale(model, optimizers) if scaling == 'adam' else None
    batches = {domain_of(p): batches_of(p, first[domain_of(p)], 4, **options) for p in probes}
    together = not apart and layers not in SMALL and scaling != 'datainf'
    groups = [weights] if together else [{domain: 1.0} for domain in weights]
    directions = [probe_direction(model, {domain: batches[domain] for domain in group}, layers, group, scale, units) for group in groups]
    counts = [1.0] if together else [weight * (d.den[domain] if units == 'loss' else 1) for (domain, weight), d in zip(weights.items(), directions)]
    shares = [count / sum(counts) for count in counts]
    if scaling == 'datainf':
        fisher = [b for i, s in enumerate(sources) for b in batches_of(s, chosen_windows(s, source_rows, (*key, 1, i)), 1, **options)]
        by_domain = {domain_of(p): p for p in probes}
        directions = [unit(model, datainf(model, fisher, d), batches_of(by_domain[domain], rows[domain][len(first[domain]):], 2, **options))
                      for d, domain in zip(directions, weights)]
    return directions, shares


def measure_sources(model, sources, directions, shares, source_rows, batch_size, key, to_device, rank=0, world_size=1):
    """Influence of every source along the directions and along their mean: (r, se), dicts source -> (D + 1,) float64, the mean last."""
    r, se = {}, {}
    for i, source in enumerate(sources):
        batches = batches_of(source, chosen_windows(source, source_rows, (*key, 1, i)), 8, batch_size, to_device, rank, world_size)
        products, tokens, _ = source_products(model, batches, directions)
        r[source.name], se[source.name] = mean_and_error(np.column_stack((products, products @ shares)), tokens)
    return r, se


# -- the update --------------------------------------------------------------------------------------------------------

def flops_of_rows(config, layers, block_size):
    """FLOPs of one row that is measured: a forward, and a backward as far as the layers need it ('last': one block and the output layer)."""
    whole, head = flops_per_token(config, block_size), 6 * config.vocab_size * config.n_embd
    return block_size * (whole + 2 * (head + (whole - head) / config.n_layer if layers == 'last' else whole)) / 3


def update(model, loader, sources, probes, config, state, step, n_steps, batch_rows, optimizers, to_device, rank, world_size):
    """Measures; gives the loader new weights and verdicts on its next rows, in force from the next batch on.

    sources: those with a weight; config: train.py's knobs; state: what the last call returned, {} at first; n_steps: of the run;
    batch_rows: of a step. Sources whose influence is lost in noise keep their weights relative to each other, and all
    of them do when all are lost or harmful. Returns (state, metrics to log).
    """
    start = time.perf_counter()
    key, rows = (config['seed'], step), config['influence_rows']
    weights = {domain: weight for domain, weight in config['probe'].items() if weight > 0}       # of the others the loss is logged, no more
    probes = [p for p in probes if domain_of(p) in weights]
    options = dict(batch_size=config['batch_size'], to_device=to_device, rank=rank, world_size=world_size)
    directions, shares = measure_directions(model, probes, sources, config['influence_layers'], weights, config['probe_rows'], rows,
                                            key=key, scaling=config['influence_scaling'], units=config['influence_units'],
                                            optimizers=optimizers, **options)
    n_rows, spent, log = len(probes) * config['probe_rows'] + len(sources) * rows * (config['influence_scaling'] == 'datainf'), state.get('flops', 0), {}
    for d in directions:
        log |= {f'probe/reliability_{domain}': value for domain, value in d.reliability.items()}
        for domain, value in d.reliability.items():
            if value < 0.5 and rank == 0:
                tqdm.write(f"step {step}: warning: {1 - value:.0%} of the probe set '{domain}''s direction is noise. Raise probe_rows.")
    if config['mixture'] == 'influence':
        r, se = measure_sources(model, sources, directions, shares, rows, key=key, **options)
        n_rows += len(sources) * rows
        state, weights_log = set_weights(loader, config, state, step, (n_steps - step) * batch_rows, r, se, rank)
        log |= weights_log
        if len(directions) > 1:
            log |= {f'mixture/influence_{name}_{domain}': float(value) for name in r for domain, value in zip(weights, r[name])}
    if config['select'] == 'online':
        direction = directions[0] if len(directions) == 1 else joint(directions, shares)
        verdicts_log, n_judged = set_keep_masks(model, loader, sources, probes, direction, config, step, batch_rows, key, options)
        log, n_rows = log | verdicts_log, n_rows + n_judged
    spent += n_rows * flops_of_rows(model.config, config['influence_layers'], config['block_size'])
    return {**state, 'flops': spent}, {**log, 'mixture/extra_flops': spent, 'system/mixture_ms': (time.perf_counter() - start) * 1e3}


def caps_of(loader, names, config, rows_to_come):
    """The largest weights with which max_epochs holds until the end of the run, by source."""
    return rules.epoch_caps(1.0, config['max_epochs'], {name: loader.cursors[name] for name in names},
                               {name: loader.sources[name].n_windows for name in names}, rows_to_come)


def set_weights(loader, config, state, step, rows_to_come, r, se, rank):
    """The mixture rule: (state, metrics). r, se: as `measure_sources` gives them."""
    r, se = {name: float(x[-1]) for name, x in r.items()}, {name: float(x[-1]) for name, x in se.items()}
    before = {name: loader.weights[name] for name in r}
    caps = caps_of(loader, r, config, rows_to_come)
    high = {name: min(cap, config['mixture_max']) for name, cap in caps.items()}
    if not sum(caps.values()) > 0:
        weights, log = before, dict(kept='every source has been read max_epochs times')
    elif config['influence_rule'] == 'proportional':
        weights, state, log = rules.update_proportional(before, r, se, state, config['mixture_min'], high)
    else:
        weights, state, log = rules.update_influence(before, r, se, state, rules.eta_of(config), config['mixture_min'], high)
    over = [name for name in r if before[name] > caps[name] + 1e-9]
    if log['kept'] and over and sum(caps.values()) > 0:                   # nothing else moves, but max_epochs holds
        weights = rules.project(before, dict.fromkeys(r, 0.0), caps)
        log['kept'] += f"; but for max_epochs of {', '.join(over)}"
    if weights is not before:
        loader.set_weights({**dict.fromkeys(loader.names, 0.0), **weights})
    if log['kept'] and rank == 0:
        tqdm.write(f"step {step}: the weights stay as they are, {log['kept']}")
    return state, {**{f'mixture/influence_{name}': value for name, value in r.items()},
                   **{f'mixture/influence_se_{name}': value for name, value in se.items()},
                   **{f'mixture/asked_{name}': value for name, value in weights.items()}}


def unseen_reference(model, probes, direction, probe_rows, batch_size, key, to_device, rank=0, world_size=1):
    """What probe rows are like that the direction of the same key has not seen: selection.Reference."""
    scores = [selection.score_rows(model, p, chosen_windows(p, probe_rows + probe_rows // 2, (*key, 0, i))[probe_rows:].tolist(), direction,
                                   batch_size, to_device, rank, world_size) for i, p in enumerate(probes)]
    return selection.reference_of(np.concatenate(scores))


def set_keep_masks(model, loader, sources, probes, direction, config, step, batch_rows, key, options):
    """Judges the rows that the sources will give until the next update. Returns metrics and the number of rows looked at."""
    reference = unseen_reference(model, probes, direction, config['probe_rows'], key=key, **options)
    log, medians, n_judged = {'select/reference': reference.influence}, [], len(probes) * (config['probe_rows'] // 2)
    for source in sources:
        def score(cursors):
            return selection.score_rows(model, source, cursors, direction, **options)
        n_rows = int(np.ceil(loader.weights[source.name] * batch_rows * config['mixture_interval'])) + 2      # at most two rows off
        keep, reasons, scores = selection.choose_next(score, loader.cursors[source.name], n_rows, reference, config['select_margin'],
                                                      config['select_keep'])
        loader.set_keep_masks(source.name, keep)
        n_judged += len(scores)
        low, median, high = np.quantile(scores[:, 0], (0.1, 0.5, 0.9)) / reference.influence
        medians.append((median, loader.weights[source.name]))
        log |= {f'select/kept_{source.name}': float(keep.mean()), f'select/p10_{source.name}': low, f'select/median_{source.name}': median,
                f'select/p90_{source.name}': high, **{f'select/dropped_{why}_{source.name}': share for why, share in reasons.items()}}
    if sum(median * weight for median, weight in medians) <= 0 and options['rank'] == 0:
        tqdm.write(f'step {step}: the median row no longer helps the probe: selection has little left to choose from')
    return log, n_judged


def keep_scored(data_dir, sources, config):
    """select = 'scores': leaves out the rows of every source that its score files condemn, for the whole run. Returns the shares kept, to log."""
    kept = {}
    for source in sources:
        scores, reference, about = selection.read_scores(os.path.join(data_dir, source.name, config['select_scores']), source)
        keep, _ = selection.judge(scores.astype(np.float64), reference, config['select_margin'], config['select_keep'])
        source.keep_windows(keep)
        kept[f'select/kept_{source.name}'] = float(keep.mean())
    return kept
