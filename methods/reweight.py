"""Influence at work in a training run: it sets the weights of the sources and drops rows.

Every mixture_interval steps `Influence.update` measures the influence of every source on the probe
sets (influence.py), changes the sampling weights by a rule (rules.py), and with select='online'
marks the rows to drop until the next update (selection.py). The rows that are measured are a
function of seed and step alone, so a resumed run measures the same. `Measurement` serves
tools/influence_tables.py as well.

Letters in shape comments: D directions, n rows.
"""
import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

from configurator import BadInput, at_least, between, one_of
from data import domain_of, shared_documents, text_warnings
from influence import (
    SMALL,
    Direction,
    adam_scale,
    datainf,
    mean_and_error,
    probe_direction,
    probes_by_rows,
    row_influence,
    source_products,
    takes_rows,
    unit,
)
from lib.parallel import sum_numbers
from methods import rules, selection
from model import flops_per_token


@dataclass
class InfluenceConfig:
    """Knobs of re-weighting by influence."""
    probe: dict[str, float] = field(default_factory=dict)       # domain -> weight: probe sets
                                # (data_dir/probe/<domain>) that influence is measured on
    probe_rows: at_least(1) = 64        # rows of every probe set, chosen anew at every update
    influence_rows: at_least(1) = 32    # rows of every source, chosen anew at every update
    influence_layers: one_of('last', 'all', 'first', 'embedding+head') = 'last'     # parameters
                                # that influence is measured on
    influence_scaling: one_of('none', 'adam', 'datainf') = 'none'       # gradients as they are,
                                # divided by the root of Adam's second moment, or DataInf
    influence_units: one_of('loss', 'own') = 'loss'     # loss: influence on the mean loss of the
                                # domains. own: mean of the influences, each relative to its domain
    influence_rule: one_of('step', 'proportional') = 'step'     # step: multiplies weights, see
                                # mixture_eta. proportional: weight = mean influence (MobileLLM-R1)
    mixture_min: between(0.0, 1.0) = 0.02       # smallest weight of a source
    mixture_max: between(0.0, 1.0) = 0.6        # largest weight of a source


# -- measuring -------------------------------------------------------------------------------------


def chosen_windows(source, n_rows, key):
    """Chooses n_rows cursors of a source by `key`, a tuple of ints, alone: (n_rows,) int array."""
    rng = np.random.default_rng(key)
    # A permutation of a very large source is slow, and there repetitions are rare.
    # `unseen_reference` relies on a longer choice beginning with the rows of a shorter one.
    if source.n_windows < 2**24:
        return rng.permutation(source.n_windows)[:n_rows]
    return rng.integers(source.n_windows, size=n_rows)


def joint(directions, shares):
    """The sum of share * direction over the domains. Its influence is the mean of theirs."""
    v = {}
    for name in directions[0].v:
        v[name] = sum(share * d.v[name] for d, share in zip(directions, shares, strict=True))
    den, reliability, loss = {}, {}, {}
    for d in directions:
        den |= d.den
        reliability |= d.reliability
        loss |= d.loss
    return Direction(v, den, reliability, loss, directions[0].layers)


@dataclass
class Measurement:
    """One measurement of influence: on which rows of the probe sets, and in which units."""
    model: object
    feeder: object              # data.Feeder
    probes: list                # Sources of the probe sets
    weights: dict               # domain -> weight
    probe_rows: int             # rows of every probe set
    source_rows: int            # rows of every source
    key: tuple                  # ints by which rows are chosen
    layers: str = 'last'
    scaling: str = 'none'       # none | adam | datainf
    units: str = 'loss'         # see influence.probe_direction
    optimizers: tuple = ()      # with scaling='adam'
    apart: bool = False         # one direction for every domain, whatever memory it takes

    def chosen_rows(self, i, source):
        """Cursors of the chosen rows of source number i: (source_rows,) int array."""
        # The 1 separates sources from probe sets, which have 0 in this place of the key.
        return chosen_windows(source, self.source_rows, (*self.key, 1, i))

    def directions(self, sources):
        """Directions of the probe sets and what each counts: (list of Direction, list of shares).

        The shares sum to 1. There is one direction per domain where `apart` is set or where they
        are small, else one for all. DataInf measures on rows of `sources` as well.
        """
        by_domain = {domain_of(probe): probe for probe in self.probes}
        rows = {}
        batches = {}
        rest = {}               # DataInf: rows for the unit of influence
        for i, (domain, probe) in enumerate(by_domain.items()):
            rows[domain] = chosen_windows(probe, self.probe_rows, (*self.key, 0, i))
            n_first = self.probe_rows
            # DataInf bends a direction after its unit was taken, so other rows set the unit anew.
            if self.scaling == 'datainf':
                n_first = len(rows[domain]) // 2
            rest[domain] = rows[domain][n_first:]
            # Where single rows are measured, batches are as large as in training.
            n_batches = 1 if probes_by_rows(self.model, self.layers) else 4
            first = rows[domain][:n_first]
            batches[domain] = self.feeder.source_batches(probe, first, n_batches)
        scale = adam_scale(self.model, self.optimizers) if self.scaling == 'adam' else None
        # With DataInf every domain needs a unit of its own, so its directions are never joined.
        is_joint = not self.apart and self.layers not in SMALL and self.scaling != 'datainf'
        groups = [self.weights] if is_joint else [{domain: 1.0} for domain in self.weights]
        directions = []
        for group in groups:
            probe_batches = {domain: batches[domain] for domain in group}
            directions.append(probe_direction(
                self.model, probe_batches, self.layers, group, scale, self.units))
        counts = [1.0]
        if not is_joint:
            counts = []
            for (domain, weight), d in zip(self.weights.items(), directions, strict=True):
                # As in a joint direction, where domains of large gradients count more.
                counts.append(weight * (d.den[domain] if self.units == 'loss' else 1))
        if self.scaling == 'datainf':
            fisher = []
            for i, source in enumerate(sources):
                fisher += self.feeder.source_batches(source, self.chosen_rows(i, source))
            for i, domain in enumerate(self.weights):
                bent = datainf(self.model, fisher, directions[i])
                others = self.feeder.source_batches(by_domain[domain], rest[domain], 2)
                directions[i] = unit(self.model, bent, others)
        return directions, [count / sum(counts) for count in counts]

    def of_sources(self, sources, directions, shares):
        """Influence of every source along the directions and along their mean.

        Returns (r, se): dicts source -> (D + 1,) float64, the mean last. se is the standard error.
        """
        measure = self.products_of_rows if takes_rows(self.model) else self.products_of_batches
        r = {}
        se = {}
        for source, (products, tokens) in zip(sources, measure(sources, directions), strict=True):
            # Domains share these rows, so the error of the mean does not follow from theirs.
            columns = np.column_stack((products, products @ shares))
            r[source.name], se[source.name] = mean_and_error(columns, tokens)
        return r, se

    def products_of_rows(self, sources, directions):
        """Yields (products (n, D), tokens (n,)) of the chosen rows of every source, on every rank.

        The rows of all sources are measured together, in batches as large as in training.
        """
        rows = []                   # (source, cursor)
        ends = []                   # of every source in rows
        for i, source in enumerate(sources):
            rows += [(source, int(cursor)) for cursor in self.chosen_rows(i, source)]
            ends.append(len(rows))

        def read(positions):
            return np.concatenate([rows[i][0].rows([rows[i][1]]) for i in positions])

        found = []                  # (B, D + 1) of every batch, on the device: products and tokens
        for batch in self.feeder.batches(read, len(rows)):
            products, _ = row_influence(self.model, batch, directions)
            n_valid = (batch[1] >= 0).sum(1, keepdim=True)
            found.append(torch.cat((products, n_valid), 1))
        mine = torch.cat(found).cpu().numpy()
        sums = np.zeros((len(rows), mine.shape[1]))
        positions = np.concatenate(list(self.feeder.deal(len(rows), len(found[0]))))
        here = positions < len(rows)
        sums[positions[here]] = mine[here]
        sums = np.array(sum_numbers(sums.flatten(), self.model.layout)).reshape(sums.shape)
        for part in np.split(sums, ends[:-1]):
            yield part[:, :-1], part[:, -1]

    def products_of_batches(self, sources, directions):
        """Yields (products (K, D), tokens (K,)) of K batches of every source's chosen rows."""
        for i, source in enumerate(sources):
            # The standard error is over batches, so there have to be several.
            batches = self.feeder.source_batches(source, self.chosen_rows(i, source), 8)
            products, tokens, _ = source_products(self.model, batches, directions)
            yield products, tokens

    def unseen_reference(self, direction):
        """selection.Reference of probe rows that a direction of the same key has not seen."""
        scores = []
        for i, probe in enumerate(self.probes):
            n_rows = self.probe_rows + self.probe_rows // 2
            chosen = chosen_windows(probe, n_rows, (*self.key, 0, i))[self.probe_rows:].tolist()
            scores.append(selection.score_rows(self.model, self.feeder, probe, chosen, direction))
        return selection.reference_of(np.concatenate(scores))


def flops_of_rows(config, layers, block_size):
    """FLOPs of a row that is measured: a forward, and a backward as far as the layers need it.

    'last' needs the backward of one block, and of the output layer the half that leads to the
    block. For all others a full backward is counted.
    """
    full = flops_per_token(config, block_size)
    backward = 2 * full / 3
    if layers == 'last':
        head = 6 * config.vocab_size * config.n_embd
        backward = head / 3 + 2 * (full - head) / (3 * config.n_layer)
    return block_size * (full / 3 + backward)


# -- checks ----------------------------------------------------------------------------------------


def check_probe(weights, measures=True):
    """Raises BadInput unless the weights of the probe sets make sense.

    measures=False: only their losses are logged, and all weights may be 0
    """
    total = sum(weights.values())
    is_sum_possible = total < math.inf and (total > 0 or not measures)
    if min(weights.values(), default=0) < 0 or not is_sum_possible:
        raise BadInput(
            f'probe = {weights}: no weight may be negative, one must be above 0, and their sum '
            'must be finite.')


def check(training):
    """Raises BadInput for settings with which influence cannot be measured."""
    config = training.config
    n_data = training.run.n_data
    scaling = config['influence_scaling']
    reweights = config['mixture'] == 'influence'
    selects = config['select'] == 'online'
    if scaling == 'adam' and config['optimizer'] != 'adamw':
        raise BadInput(
            "influence_scaling = 'adam' needs AdamW's moments, and optimizer = "
            f"'{config['optimizer']}'.")
    if scaling == 'datainf' and n_data > 1:
        raise BadInput(
            f"influence_scaling = 'datainf' works on one rank only, and there are {n_data}. Use "
            'none or adam.')
    by_rows = "influence_scaling = 'datainf'" if scaling == 'datainf' else "select = 'online'"
    if (scaling == 'datainf' or selects) and (config['tp'] > 1 or config['n_expert']):
        raise BadInput(
            f'{by_rows} measures single rows, which works neither under tensor parallelism nor '
            'with experts. Leave it out, or set tp=1.')
    if not training.probes:
        raise BadInput(
            "influence needs probe sets: --probe=\"{'math': 1.0}\" with data_dir/probe/math "
            '(prepare/probe.py makes it).')
    check_probe(config['probe'])
    source_rows = config['influence_rows']
    probe_rows = config['probe_rows']
    fewest = max(4, 2 * n_data)         # every rank has a row in at least two batches
    if source_rows < fewest or probe_rows < fewest:
        raise BadInput(
            f'influence_rows = {source_rows} and probe_rows = {probe_rows} must be at least '
            f'{fewest} on {n_data} rank(s).')
    n_rows = probe_rows * len(training.probes)
    if reweights:
        n_rows += source_rows * len(training.active)
    interval_rows = config['mixture_interval'] * training.batch_rows
    if n_rows > interval_rows:
        raise BadInput(
            f'a measurement reads {n_rows:,} rows, more than the {interval_rows:,} that are '
            'trained on in between. Raise mixture_interval, or lower influence_rows or probe_rows.')
    needed = []                         # (source, rows that are read of it, their description)
    if reweights or scaling == 'datainf':
        for source in training.active:
            needed.append((source, source_rows, f'influence_rows = {source_rows}'))
    for probe in training.probes:
        if selects:
            what = f'probe_rows = {probe_rows} and half as many again for the comparison'
            needed.append((probe, probe_rows + probe_rows // 2, what))
        else:
            needed.append((probe, probe_rows, f'probe_rows = {probe_rows}'))
    for source, rows, what in needed:
        if source.n_windows < rows:
            raise BadInput(
                f"'{source.name}' has {source.n_windows} windows of {source.block_size} tokens, "
                f'fewer than {what}. Prepare more of it, or lower {what.partition(" ")[0]}.')
    if reweights:
        # exp(mixture_eta) has to be a number.
        if rules.eta_of(config) > 500:
            raise BadInput(
                f"mixture_eta = {config['mixture_eta']:g} is too large: an influence of 1 would "
                'multiply a weight by exp(mixture_eta). Use at most 500.')
        rules.check_bounds(len(training.active), config['mixture_min'], config['mixture_max'])


def check_texts(probes, sources, val_sources, bos_id, run):
    """Raises BadInput when a probe set shares documents with a source. Warns of text that is none.

    bos_id: the token that documents begin with, None: unknown, which is printed.
    """
    if run.is_master:
        for source in sources:
            # A few rows show whether a source is text. Reading all of it would take too long.
            rows = source.rows(range(min(64, source.n_windows)))
            for found in text_warnings(rows, source.vocab_size):
                print(
                    f"warning: source '{source.name}': {found}. Influence is not made for such "
                    'text. Check the source and its weight.')
        if bos_id is None:
            print(
                'probe: these shards do not record where documents begin. Aligned pieces of 256 '
                'tokens are compared with those of the sources.')
    for probe in probes:
        for source in sources + val_sources:
            found = shared_documents(probe, source, bos_id, run.data_rank, run.n_data)
            # Each rank searches its part. All of them need the sum, so that all raise together.
            n = int(sum_numbers([found], run.layout)[0])
            if n:
                raise BadInput(
                    f"the probe set '{domain_of(probe)}' and source '{source.name}' "
                    f'({source.split}) have {n:,} document(s) in common: influence would measure '
                    'how well the source holds the probe itself. Prepare one of them anew '
                    '(prepare/probe.py draws only from what its source keeps out of train/).')


# -- the update ------------------------------------------------------------------------------------


def epoch_caps(training, step):
    """The largest weights with which max_epochs holds until the end of the run: dict by source."""
    loader = training.loader
    read = {name: loader.cursors[name] for name in training.names}
    in_epoch = {name: loader.sources[name].n_windows for name in training.names}
    return rules.epoch_caps(
        1.0, training.config['max_epochs'], read, in_epoch, training.rows_after(step))


def set_weights(loader, weights):
    """Gives the loader these weights. Sources that are not in them get 0."""
    loader.set_weights({**dict.fromkeys(loader.names, 0.0), **weights})


class Influence:
    """The mixture method 'influence', and the selection of rows with select='online'.

    Sources whose influence cannot be told from noise keep their weights relative to each other. All
    sources keep them when all are lost in noise or harmful.
    """

    def __init__(self, training):
        check(training)
        self.training = training
        self.rule_state = {}
        self.flops = 0.0            # spent on measurements

    def state_dict(self):
        return {**self.rule_state, 'flops': self.flops}

    def load_state_dict(self, state):
        self.rule_state = dict(state)
        self.flops = self.rule_state.pop('flops', 0.0)

    def due(self, step):
        training = self.training
        # At step 0 Adam has no moments, and an untrained model says little about its data.
        first = max(1, training.first_update)
        is_time = step % training.config['mixture_interval'] == 0
        return first <= step < training.n_steps and is_time

    def update(self, step):
        start = time.perf_counter()
        training = self.training
        config = training.config
        # Of the other domains only the loss is logged.
        weights = {domain: weight for domain, weight in config['probe'].items() if weight > 0}
        probes = [p for p in training.probes if domain_of(p) in weights]
        measurement = Measurement(
            training.model, training.feeder, probes, weights, config['probe_rows'],
            config['influence_rows'], (config['seed'], step), config['influence_layers'],
            config['influence_scaling'], config['influence_units'], training.optimizers)
        directions, shares = measurement.directions(training.active)
        n_rows = len(probes) * config['probe_rows']
        if config['influence_scaling'] == 'datainf':
            n_rows += len(training.active) * config['influence_rows']
        metrics = {}
        for direction in directions:
            for domain, value in direction.reliability.items():
                metrics[f'probe/reliability_{domain}'] = value
                if value < 0.5 and training.run.is_master:
                    tqdm.write(
                        f"step {step}: warning: {1 - value:.0%} of the probe set '{domain}''s "
                        'direction is noise. Raise probe_rows.')
        if config['mixture'] == 'influence':
            r, se = measurement.of_sources(training.active, directions, shares)
            n_rows += len(training.active) * config['influence_rows']
            metrics |= self.reweight(step, r, se)
            if len(directions) > 1:
                for name in r:
                    # r has one more column than domains, the mean, which is logged already.
                    for domain, value in zip(weights, r[name], strict=False):
                        metrics[f'mixture/influence_{name}_{domain}'] = float(value)
        if config['select'] == 'online':
            # Scoring is a pass over many rows, so it is done once for all domains together.
            direction = directions[0] if len(directions) == 1 else joint(directions, shares)
            selected, n_scored = self.select(step, measurement, direction)
            metrics |= selected
            n_rows += n_scored
        row_flops = flops_of_rows(
            training.model.config, config['influence_layers'], config['block_size'])
        self.flops += n_rows * row_flops
        metrics['mixture/extra_flops'] = self.flops
        metrics['system/mixture_ms'] = (time.perf_counter() - start) * 1e3
        return metrics

    def reweight(self, step, r, se):
        """Applies the rule to what `Measurement.of_sources` returned. Returns metrics."""
        training = self.training
        config = training.config
        loader = training.loader
        r = {name: float(x[-1]) for name, x in r.items()}
        se = {name: float(x[-1]) for name, x in se.items()}
        before = {name: loader.weights[name] for name in r}
        caps = epoch_caps(training, step)
        # max_epochs takes precedence over mixture_min: see how rules.project treats its bounds.
        high = {name: min(cap, config['mixture_max']) for name, cap in caps.items()}
        some_left = sum(caps.values()) > 0
        if not some_left:
            weights = before
            kept = 'every source has been read max_epochs times'
        elif config['influence_rule'] == 'proportional':
            weights, self.rule_state, log = rules.update_proportional(
                before, r, se, self.rule_state, config['mixture_min'], high)
            kept = log['kept']
        else:
            weights, self.rule_state, log = rules.update_influence(
                before, r, se, self.rule_state, rules.eta_of(config), config['mixture_min'], high)
            kept = log['kept']
        over = [name for name in r if before[name] > caps[name] + 1e-9]
        if kept and over and some_left:         # nothing else moves, but max_epochs has to hold
            weights = rules.project(before, dict.fromkeys(r, 0.0), caps)
            kept += f"; only max_epochs lowers {', '.join(over)}"
        if weights is not before:
            set_weights(loader, weights)
        if kept and training.run.is_master:
            tqdm.write(f'step {step}: the weights stay as they are, {kept}')
        metrics = {}
        for name in r:
            metrics[f'mixture/influence_{name}'] = r[name]
            metrics[f'mixture/influence_se_{name}'] = se[name]
            metrics[f'mixture/asked_{name}'] = weights[name]
        return metrics

    def select(self, step, measurement, direction):
        """Judges the rows that the sources give until the next update: (metrics, rows scored)."""
        training = self.training
        config = training.config
        loader = training.loader
        reference = measurement.unseen_reference(direction)
        metrics = {'select/reference': reference.influence}
        n_scored = len(measurement.probes) * (config['probe_rows'] // 2)
        median_help = 0.0
        for source in training.active:
            def score(cursors, source=source):
                return selection.score_rows(
                    training.model, training.feeder, source, cursors, direction)

            weight = loader.weights[source.name]
            # The loader is at most two rows off the share of a source.
            n_rows = int(np.ceil(weight * training.batch_rows * config['mixture_interval'])) + 2
            first = loader.cursors[source.name]
            keep, reasons, scores = selection.choose_next(score, first, n_rows, reference, config)
            loader.set_keep_mask(source.name, keep)
            n_scored += len(scores)
            low, median, high = np.quantile(scores[:, 0], (0.1, 0.5, 0.9)) / reference.influence
            median_help += median * weight
            metrics[f'select/kept_{source.name}'] = float(keep.mean())
            metrics[f'select/p10_{source.name}'] = low
            metrics[f'select/median_{source.name}'] = median
            metrics[f'select/p90_{source.name}'] = high
            for reason, share in reasons.items():
                metrics[f'select/dropped_{reason}_{source.name}'] = share
        if median_help <= 0 and training.run.is_master:
            tqdm.write(
                f'step {step}: the median row no longer helps the probe, so selection has little '
                'left to choose from.')
        return metrics, n_scored
