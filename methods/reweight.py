"""Influence at work in a training run: it sets the weights of the sources and drops rows.

Every mixture_interval steps `Influence.update` measures the influence of every source on the probe
sets (influence.py, estimates.py), changes the sampling weights by a rule (rules.py), and with
select='online' marks the rows to drop until the next update (selection.py). Seed and step choose
the rows that are measured, and the checkpoint holds their number, so a resumed run measures the
same. `Measurement` serves tools/influence_tables.py as well.

Letters in shape comments: P parts of the probe, K batches, n rows.
"""
import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

from configurator import BadInput, RunFault, at_least, between, one_of
from data import domain_of, text_warnings
from influence import (
    TooFewTokens,
    adam_scale,
    datainf,
    measure_probe,
    parts_of_domain,
    probes_by_rows,
    products_of_batches,
    products_of_rows,
)
from lib.overlap import check_overlap
from lib.parallel import sum_numbers
from methods import rules, selection
from methods.estimates import direction_of, estimate, noise_of, reliability
from model import flops_per_token


@dataclass
class InfluenceConfig:
    """Knobs of re-weighting by influence."""
    probe: dict[str, float] = field(default_factory=dict)       # domain -> weight: probe sets
                                # (data_dir/probe/<domain>) that influence is measured on
    probe_rows: at_least(1) = 64        # rows of every probe set, chosen anew at every update.
                                # After a measurement that is lost in noise, twice as many
    influence_rows: at_least(1) = 32    # rows of every source, chosen anew at every update
    influence_layers: one_of('last', 'all', 'first', 'embedding+head') = 'last'     # parameters
                                # that influence is measured on. all and embedding+head take the
                                # memory of four gradients for every probe set
    influence_scaling: one_of('none', 'adam', 'datainf') = 'none'       # gradients as they are,
                                # divided by the root of Adam's second moment, or DataInf
    influence_units: one_of('loss', 'own') = 'loss'     # loss: influence on the mean loss of the
                                # domains. own: mean of the influences, each relative to its domain
    influence_rule: one_of('step', 'proportional') = 'step'     # step: multiplies weights, see
                                # mixture_eta. proportional: weight = mean influence (MobileLLM-R1)
    influence_kl: at_least(0.0) = 0.0   # step: above 0 pulls the weights to those of the start, so
                                # that under a constant influence r they converge to start *
                                # exp(r / influence_kl). 0: the best sources go to mixture_max
    mixture_min: between(0.0, 1.0) = 0.02       # smallest weight of a source
    mixture_max: between(0.0, 1.0) = 0.6        # largest weight of a source


MORE_ROWS = 8           # a noisy probe is read with at most so many times probe_rows
FIRST = 3               # so many measurements that say nothing end a run at its start


# -- measuring -------------------------------------------------------------------------------------


def chosen_windows(source, n_rows, key):
    """Chooses n_rows cursors of a source by `key`, a tuple of ints, alone: (n_rows,) int array."""
    rng = np.random.default_rng(key)
    # A permutation of a very large source is slow, and there repetitions are rare.
    # `unseen_scores` relies on a longer choice beginning with the rows of a shorter one.
    if source.n_windows < 2**24:
        return rng.permutation(source.n_windows)[:n_rows]
    return rng.integers(source.n_windows, size=n_rows)


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
    units: str = 'loss'         # see estimates.factors_of
    optimizers: tuple = ()      # with scaling='adam'

    def chosen_rows(self, i, source):
        """Cursors of the chosen rows of source number i: (source_rows,) int array."""
        # The 1 separates sources from probe sets, which have 0 in this place of the key.
        return chosen_windows(source, self.source_rows, (*self.key, 1, i))

    def probe(self, sources):
        """The probe sets as influence.Probe. DataInf measures on rows of `sources` as well."""
        # DataInf works on every part, row by row.
        n_parts = 4 if self.scaling == 'datainf' else None
        # Where single rows are measured, batches are as large as in training.
        n_batches = 1
        if not probes_by_rows(self.model, self.layers):
            n_batches = parts_of_domain(self.layers, len(self.probes))
        batches = {}
        for i, probe in enumerate(self.probes):
            rows = chosen_windows(probe, self.probe_rows, (*self.key, 0, i))
            batches[domain_of(probe)] = self.feeder.source_batches(probe, rows, n_batches)
        scale = adam_scale(self.model, self.optimizers) if self.scaling == 'adam' else None
        probe = measure_probe(self.model, batches, self.layers, scale, n_parts)
        if self.scaling == 'datainf':
            fisher = []
            for i, source in enumerate(sources):
                fisher += self.feeder.source_batches(source, self.chosen_rows(i, source))
            probe = datainf(self.model, fisher, probe)
        return probe

    def of_sources(self, sources, probe):
        """Influence of every source on the probe: estimates.Estimate."""
        by_rows = probes_by_rows(self.model, self.layers)
        found = self.by_rows(sources, probe) if by_rows else self.by_batches(sources, probe)
        names = [source.name for source in sources]
        return estimate(probe, self.weights, self.units, dict(zip(names, found, strict=True)))

    def direction(self, probe):
        """The joint direction of the probe. Raises RunFault when its parts disagree."""
        return direction_of(probe, self.weights, self.units)

    def by_rows(self, sources, probe):
        """(products (n, P), tokens (n,)) of the chosen rows of every source, on every rank: list.

        The rows of all sources are measured together, in batches as large as in training.
        """
        rows = []                   # (source, cursor)
        ends = []                   # of every source in rows
        for i, source in enumerate(sources):
            rows += [(source, int(cursor)) for cursor in self.chosen_rows(i, source)]
            ends.append(len(rows))

        def read(positions):
            return np.concatenate([rows[i][0].rows([rows[i][1]]) for i in positions])

        found = []                  # (B, P + 1) of every batch, on the device: products and tokens
        for batch in self.feeder.batches(read, len(rows)):
            n_valid = (batch[1] >= 0).sum(1, keepdim=True)
            found.append(torch.cat((products_of_rows(self.model, batch, probe), n_valid), 1))
        mine = torch.cat(found).cpu().numpy()
        sums = np.zeros((len(rows), mine.shape[1]))
        positions = np.concatenate(list(self.feeder.deal(len(rows), len(found[0]))))
        here = positions < len(rows)
        sums[positions[here]] = mine[here]
        sums = np.array(sum_numbers(sums.flatten(), self.model.layout)).reshape(sums.shape)
        return [(part[:, :-1], part[:, -1]) for part in np.split(sums, ends[:-1])]

    def by_batches(self, sources, probe):
        """(products (K, P), tokens (K,)) of K batches of the chosen rows of every source: list."""
        found = []
        for i, source in enumerate(sources):
            # The standard error is over batches, so there have to be several.
            batches = self.feeder.source_batches(source, self.chosen_rows(i, source), 8)
            found.append(products_of_batches(self.model, batches, probe))
        return found

    def unseen_scores(self, direction):
        """Scores (n, 3) of probe rows that a direction of the same key has not seen."""
        scores = []
        for i, probe in enumerate(self.probes):
            n_rows = self.probe_rows + self.probe_rows // 2
            chosen = chosen_windows(probe, n_rows, (*self.key, 0, i))[self.probe_rows:].tolist()
            scores.append(selection.score_rows(self.model, self.feeder, probe, chosen, direction))
        return np.concatenate(scores)


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
        # Above 1 the weights would swing around what they should converge to.
        if config['influence_kl'] * rules.eta_of(config) > 1:
            raise BadInput(
                f"influence_kl = {config['influence_kl']:g} times mixture_eta = "
                f'{rules.eta_of(config):g} must be at most 1. Lower one of them.')
        rules.check_bounds(len(training.active), config['mixture_min'], config['mixture_max'])


def check_texts(probes, sources, val_sources, bos_id, run):
    """Raises BadInput when a source holds text of a probe set. Warns of text that is none.

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
                'tokens are compared with those of the sources in place of documents.')
    check_overlap(probes, sources + val_sources, bos_id, run)


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

    Sources whose influence cannot be told from that of the others keep their weights relative to
    each other. When a measurement is lost in the noise of the probe, everything stays as it is, and
    the next one reads twice as many probe rows. Only a probe on which no measurement succeeds from
    the start ends the run.
    """

    def __init__(self, training):
        check(training)
        self.training = training
        self.rule_state = {}
        self.flops = 0.0            # spent on measurements
        self.probe_rows = training.config['probe_rows']         # of the next measurement
        self.failed = 0             # measurements lost in noise since the start; -1: one succeeded

    def state_dict(self):
        return {
            **self.rule_state, 'flops': self.flops, 'probe_rows': self.probe_rows,
            'failed': self.failed}

    def load_state_dict(self, state):
        self.rule_state = dict(state)
        self.flops = self.rule_state.pop('flops', 0.0)
        rows = self.rule_state.pop('probe_rows', 0)
        self.probe_rows = min(max(rows, self.probe_rows), self.most_rows())
        self.failed = self.rule_state.pop('failed', 0)

    def due(self, step):
        training = self.training
        # At step 0 Adam has no moments, and an untrained model says little about its data.
        first = max(1, training.first_update)
        is_time = step % training.config['mixture_interval'] == 0
        return first <= step < training.n_steps and is_time

    def measured_probes(self):
        """The probe sets with a weight. Of the others only the loss is logged."""
        weights = self.training.config['probe']
        return [probe for probe in self.training.probes if weights[domain_of(probe)] > 0]

    def most_rows(self):
        """The most rows of every probe set that a measurement may read."""
        training = self.training
        config = training.config
        probes = self.measured_probes()
        fewest = min(probe.n_windows for probe in probes)
        if config['select'] == 'online':        # half as many again for the comparison
            fewest = fewest * 2 // 3
        # A measurement must not cost more than the training between two of them.
        rows = config['mixture_interval'] * training.batch_rows
        if config['mixture'] == 'influence':
            rows -= config['influence_rows'] * len(training.active)
        asked = config['probe_rows']
        return max(asked, min(MORE_ROWS * asked, fewest, rows // len(probes)))

    def update(self, step):
        start = time.perf_counter()
        training = self.training
        config = training.config
        probes = self.measured_probes()
        weights = {domain_of(probe): config['probe'][domain_of(probe)] for probe in probes}
        n_probe = self.probe_rows
        measurement = Measurement(
            training.model, training.feeder, probes, weights, n_probe, config['influence_rows'],
            (config['seed'], step), config['influence_layers'], config['influence_scaling'],
            config['influence_units'], training.optimizers)
        n_rows = len(probes) * n_probe
        if config['influence_scaling'] == 'datainf':
            n_rows += len(training.active) * config['influence_rows']
        metrics = {'probe/rows': n_probe}
        try:
            probe = measurement.probe(training.active)
        except TooFewTokens as error:
            noise = str(error).rstrip('.')
        else:
            for domain, value in reliability(probe).items():
                metrics[f'probe/reliability_{domain}'] = value
            noise = noise_of(probe, weights, config['influence_units'])
        if config['mixture'] == 'influence':
            found = None
            if not noise:
                found = measurement.of_sources(training.active, probe)
                n_rows += len(training.active) * config['influence_rows']
            metrics |= self.reweight(step, found, list(weights))
        if config['select'] == 'online':
            # Without a mask, all rows are kept until the next update.
            reference = None
            if not noise:
                direction = measurement.direction(probe)
                scores = measurement.unseen_scores(direction)
                n_rows += len(scores)
                if np.median(scores[:, 0]) > 0:
                    reference = selection.reference_of(scores)
                else:
                    noise = 'most probe rows that were not used do not agree with the direction'
            if reference is not None:
                selected, n_scored = self.select(step, reference, direction)
                metrics |= selected
                n_rows += n_scored
        metrics['probe/noisy'] = float(bool(noise))
        self.after(step, noise)
        row_flops = flops_of_rows(
            training.model.config, config['influence_layers'], config['block_size'])
        self.flops += n_rows * row_flops
        metrics['mixture/extra_flops'] = self.flops
        metrics['system/mixture_ms'] = (time.perf_counter() - start) * 1e3
        return metrics

    def after(self, step, noise):
        """Takes note of whether a measurement said something. Raises RunFault if none ever did."""
        if not noise:
            self.failed = -1
            return
        if self.failed >= 0:
            self.failed += 1
        if self.failed == FIRST:
            raise RunFault(
                f'step {step}: the first {FIRST} measurements of influence say nothing, the last '
                f'one with {self.probe_rows} rows of every probe set: {noise}. Raise probe_rows, '
                'make the probe set larger, or let mixture_warmup be longer.')
        more = min(2 * self.probe_rows, self.most_rows())
        if self.training.run.is_master:
            then = f'The next one reads {more} rows of every probe set.'
            if more == self.probe_rows:
                then = f'It already reads as many rows as it may ({more} of every probe set).'
            tqdm.write(
                f'step {step}: warning: this measurement of influence says nothing, and nothing '
                f'changes: {noise}. {then}')
        self.probe_rows = more

    def reweight(self, step, found, domains):
        """Applies the rule to an estimates.Estimate, or None: nothing is known. Returns metrics."""
        training = self.training
        config = training.config
        loader = training.loader
        names = training.names
        before = {name: loader.weights[name] for name in names}
        caps = epoch_caps(training, step)
        # max_epochs takes precedence over mixture_min: see how rules.project treats its bounds.
        high = {name: min(cap, config['mixture_max']) for name, cap in caps.items()}
        low = config['mixture_min']
        some_left = sum(caps.values()) > 0
        weights = before
        kept = 'the measurement says nothing'
        if not some_left:
            kept = 'every source has been read max_epochs times'
        elif found is not None:
            r = {name: float(found.r[name][-1]) for name in names}
            if config['influence_rule'] == 'proportional':
                weights, self.rule_state, log = rules.update_proportional(
                    before, r, self.rule_state, low, high)
            else:
                weights, self.rule_state, log = rules.update_influence(
                    before, r, found.cov, self.rule_state, rules.eta_of(config), low, high,
                    config['influence_kl'])
            kept = log['kept']
        over = [name for name in names if before[name] > caps[name] + 1e-9]
        if kept and over and some_left:         # nothing else moves, but max_epochs has to hold
            weights = rules.project(before, dict.fromkeys(names, 0.0), caps)
            kept += f"; only max_epochs lowers {', '.join(over)}"
        if weights is not before:
            set_weights(loader, weights)
        if kept and found is not None and training.run.is_master:
            tqdm.write(f'step {step}: the weights stay as they are, {kept}')
        metrics = {}
        for name in names:
            metrics[f'mixture/asked_{name}'] = weights[name]
            if found is None:
                continue
            values = dict(zip(domains, found.r[name], strict=False))    # r ends with the mean
            values = {f'{name}_{domain}': value for domain, value in values.items()}
            if len(domains) == 1:
                values = {}
            values[name] = found.r[name][-1]
            values[f'se_{name}'] = found.se[name][-1]
            for key, value in values.items():
                # JSON has neither nan nor infinity.
                value = float(value) if np.isfinite(value) else None
                metrics[f'mixture/influence_{key}'] = value
        return metrics

    def select(self, step, reference, direction):
        """Judges the rows that the sources give until the next update: (metrics, rows scored)."""
        training = self.training
        config = training.config
        loader = training.loader
        metrics = {'select/reference': reference.influence}
        n_scored = 0
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
