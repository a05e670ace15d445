"""Mixtures that are given beforehand, natural, UniMax and a schedule, and ADO.

`natural` and `unimax` give the weights of a whole run. `schedule` reads weights over time from a
file. `ado` (Jiang et al. 2024, arXiv:2410.11820) fits a scaling law to the training loss of every
source while the model trains, and prefers sources whose loss still falls. Their rules are in
rules.py.

Published settings of ADO, and what they are here in a run of N steps:

    published (60,000 steps)                                    here
    law refitted every 1,000 steps                              every mixture_interval steps
    losses of the first 1,000 steps are left out                those before mixture_warmup
    every 10th loss, smoothed over 101 steps                    means over N / 600 steps
    weights anew at every step, history and average per step    the same, their mean holds for a
                                                                round of mixture_interval steps
    s 0.5, gamma1 0.1, gamma2 0.1, delta_min 0.01               the same
    prior: shares by size                                       the start weights (weigh_by='size')
"""
import math
import os
import time

import numpy as np
import torch
from tqdm import tqdm

from configurator import BadInput, did_you_mean, read_json
from data import put_on
from lib import parts
from lib.device import sum_dtype
from lib.parallel import sum_numbers
from methods import rules
from methods.baselines import check_names, within_epochs
from methods.reweight import set_weights

# -- weights of a whole run ------------------------------------------------------------------------


def natural(sources):
    """Shares in proportion to the number of rows: dict source -> rows, so all are read as often."""
    return {source.name: float(source.n_windows) for source in sources}


def unimax(sources, max_epochs, rows_read, rows_to_come):
    """Shares as equal as max_epochs allows: UniMax (Chung et al. 2023, arXiv:2304.09151).

    rows_read: dict source -> rows that the run has drawn already; rows_to_come: rows that it still
    draws of all sources together. Returns dict source -> share.
    """
    names = [source.name for source in sources]
    in_epoch = {source.name: source.n_windows for source in sources}
    read = {name: rows_read.get(name, 0) for name in names}
    caps = rules.epoch_caps(1.0, max_epochs, read, in_epoch, rows_to_come)
    equal = rules.uniform(in_epoch)
    if not sum(caps.values()) > 0:
        return equal
    return rules.project(equal, dict.fromkeys(names, 0.0), caps)


def check_supply(training):
    """Says when a run is longer than max_epochs of all its sources together."""
    max_epochs = training.config['max_epochs']
    if max_epochs is None:
        return
    n_rows = training.n_steps * training.batch_rows
    supply = sum(source.n_windows for source in training.active)
    if n_rows > max_epochs * supply and training.run.is_master:
        print(
            f'warning: the run draws {n_rows:,} rows, which are {n_rows / supply:.3g} epochs of '
            f"all sources together, more than max_epochs = {max_epochs:g}. mixture = 'unimax' "
            'then reads all of them equally often.')


# -- a schedule ------------------------------------------------------------------------------------


def read_schedule(path, names):
    """Reads a schedule of weights: {"interpolation", "points": [{"step" or "share", "weights"}]}.

    path: JSON file; names: sources with a weight above 0. Returns (interpolation, key, points):
    key is 'step' or 'share', points a list of (position, dict source -> share). Raises BadInput
    for a file that is none.
    """
    if not path:
        raise BadInput(
            "mixture = 'schedule' needs mixture_schedule, a JSON file like "
            '{"interpolation": "linear", "points": [{"share": 0, "weights": {"code": 1, ...}}, '
            '...]}.')
    if not os.path.isfile(path):
        raise BadInput(f"mixture_schedule = '{path}' is no file.")
    found = read_json(path)
    parts.check_fields(found, dict(interpolation=str, points=list), path, 'See README.')
    interpolation = found['interpolation']
    if interpolation not in ('linear', 'step'):
        raise BadInput(
            f"{path}: interpolation = '{interpolation}' must be 'linear' or 'step'.")
    unknown = sorted(set(found) - {'interpolation', 'points'})
    if unknown:
        raise BadInput(
            f"{path}: '{unknown[0]}' is no field of a schedule."
            f"{did_you_mean(unknown[0], ['interpolation', 'points'])}")
    if not found['points']:
        raise BadInput(f'{path}: points is empty. Give at least one point.')
    points = []
    first_key = None
    for number, point in enumerate(found['points']):
        where = f'{path}: point {number}'
        if not isinstance(point, dict):
            raise BadInput(f'{where} is no object with "step" or "share" and "weights".')
        keys = sorted(set(point) & {'step', 'share'})
        first_key = first_key or (keys[0] if keys else None)
        if keys != [first_key] or set(point) != {first_key, 'weights'}:
            raise BadInput(
                f'{where} has the fields {", ".join(sorted(map(str, point))) or "none"}. Every '
                'point needs "weights" and either "step" or "share", all points the same.')
        at = point[first_key]
        is_right = isinstance(at, int | float) and not isinstance(at, bool) and math.isfinite(at)
        if is_right:
            is_right = at == int(at) if first_key == 'step' else at <= 1
        if not is_right:
            kind = 'a whole number of steps' if first_key == 'step' else 'between 0 and 1'
            raise BadInput(f'{where}: {first_key} = {at!r} must be {kind}.')
        if not points and at != 0:
            raise BadInput(f'{where}: the first {first_key} is {at:g} and must be 0.')
        if points and at <= points[-1][0]:
            raise BadInput(
                f'{where}: {first_key} = {at:g} must be above that of the point before, '
                f'{points[-1][0]:g}.')
        points.append((at, schedule_point(point['weights'], names, where)))
    return interpolation, first_key, points


def schedule_point(weights, names, where):
    """The weights of a point, divided by their sum and in the order of names. Checks them."""
    if not isinstance(weights, dict):
        raise BadInput(f'{where}: weights = {weights!r} must be an object, source -> weight.')
    for name in weights:
        if name not in names:
            raise BadInput(
                f"{where} weighs the source '{name}', which has no weight in `sources`."
                f'{did_you_mean(name, names)} Sources: {", ".join(names)}.')
    missing = [name for name in names if name not in weights]
    if missing:
        raise BadInput(
            f'{where} has no weight for {", ".join(missing)}. Give 0 to leave a source out.')
    for name, weight in weights.items():
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not 0 <= weight < math.inf:
            raise BadInput(
                f"{where}: the weight of '{name}' is {weight!r}, not a number of at least 0.")
    total = sum(weights.values())
    if not 0 < total < math.inf:
        raise BadInput(f'{where}: the weights sum to {total:g}. One must be above 0.')
    return {name: weights[name] / total for name in names}


class Schedule:
    """The mixture method 'schedule': weights over time from a file.

    A linear schedule gives the loader new weights a hundred times in a run and at every point. The
    weights are a function of the step alone, but for max_epochs: when the rest of the schedule
    would draw more of a source, weights are lowered as by the other methods.
    """

    def __init__(self, training):
        path = training.config['mixture_schedule']
        self.training = training
        self.interpolation, key, points = read_schedule(path, training.names)
        n_steps = training.n_steps
        scale = n_steps if key == 'share' else 1
        self.points = [(at * scale, weights) for at, weights in points]
        # A point between two steps holds from the next one on.
        steps = {math.ceil(at) for at, _ in self.points}
        if self.interpolation == 'linear':
            last = self.points[-1][0]
            steps |= {s for s in range(0, n_steps, max(1, n_steps // 100)) if s <= last}
        self.steps = sorted(s for s in steps if s < n_steps)
        self.known = False              # whether the loader has this schedule's weights already
        self.over = []                  # sources that max_epochs limits
        late = [at for at, _ in self.points if at > n_steps]
        if late and training.run.is_master:
            print(
                f'warning: {len(late)} points of {path} are never reached: the first is at step '
                f'{late[0]:g}, and the run has {n_steps}.')

    def state_dict(self):
        return dict(interpolation=self.interpolation, points=[list(p) for p in self.points])

    def load_state_dict(self, state):
        # With a changed file the new weights count from here on.
        self.known = state == self.state_dict()

    def due(self, step):
        return step < self.training.n_steps and (not self.known or step in self.steps)

    def weights_at(self, step):
        return rules.schedule_weights(self.points, step, self.interpolation)

    def planned(self, step):
        """Rows of every source that the schedule draws from `step` on: dict."""
        ends = [s for s in self.steps if s > step] + [self.training.n_steps]
        rows = dict.fromkeys(self.training.names, 0.0)
        begin = step
        for end in ends:
            for name, weight in self.weights_at(begin).items():
                rows[name] += weight * (end - begin) * self.training.batch_rows
            begin = end
        return rows

    def update(self, step):
        start = time.perf_counter()
        self.known = True
        training = self.training
        loader = training.loader
        asked = self.weights_at(step)
        weights = asked
        over = []
        max_epochs = training.config['max_epochs']
        if max_epochs is not None:
            # The others assume that weights stay as they are. Here the future is known.
            total = {n: loader.cursors[n] + rows for n, rows in self.planned(step).items()}
            # Rows are whole, so a plan of exactly max_epochs may end half a row above.
            if any(n > max_epochs * loader.sources[name].n_windows + 1
                   for name, n in total.items()):
                weights, over = within_epochs(training, step, asked)
        if over and over != self.over and training.run.is_master:
            tqdm.write(f'step {step}: max_epochs limits the weights of {", ".join(over)}')
        self.over = over
        set_weights(loader, weights)
        metrics = {f'mixture/asked_{name}': weight for name, weight in asked.items()}
        metrics['system/mixture_ms'] = (time.perf_counter() - start) * 1e3
        return metrics


# -- ADO -------------------------------------------------------------------------------------------

POINTS = 600            # of a law in a full run: every one is the mean loss over N / 600 steps
FEWEST = 8              # points of a source without which nothing is fitted


class Ado:
    """The mixture method 'ado': Jiang et al. 2024 (arXiv:2410.11820).

    `observe` takes the losses of every micro-batch, so the method costs no pass through the model.
    Losses stay on the device until an update or a checkpoint needs them.
    """

    def __init__(self, training):
        config = training.config
        if config['tp'] > 1 and (config['teacher'] or config['kd_cache']):
            raise BadInput(
                "mixture = 'ado' needs the loss of every row, which distillation under tp > 1 "
                'spreads over ranks. Set tp=1.')
        self.training = training
        self.names = training.names
        weights = training.loader.weights
        total = sum(weights[name] for name in self.names)
        self.prior = {name: weights[name] / total for name in self.names}
        self.state = dict(rule={}, blocks=[])
        self.block = max(1, training.n_steps // POINTS)
        self.unread = []                # (step, (m, 2) tensor: sums of losses and of tokens)

    def state_dict(self):
        self.read()
        return dict(self.state, names=self.names, block=self.block)

    def load_state_dict(self, state):
        check_names(state['names'], self.names)
        self.state = dict(rule=state['rule'], blocks=state['blocks'])
        # A longer run goes on with the blocks that it has begun.
        self.block = state['block']

    def due(self, step):
        training = self.training
        interval = training.config['mixture_interval']
        # A law needs some steps after the warm-up, whose losses fall for other reasons.
        first = training.first_update + interval // 2
        return step > 0 and step % interval == 0 and first <= step < training.n_steps

    def observe(self, step, micro, losses):
        """Adds a micro-batch. losses (B, T): nats of every token, 0 where the loss ignores it."""
        names = [self.training.loader.names[i] for i in micro.source_index]
        dtype = sum_dtype(losses.device)
        # A product with a matrix of 0 and 1 sums in the same order each time, unlike index_add.
        of_source = np.array([[name == own for name in names] for own in self.names])
        of_source = put_on(torch.from_numpy(of_source).to(dtype), losses.device)      # (m, B)
        n_valid = (micro.targets >= 0).sum(1)
        rows = torch.stack((losses.detach().sum(1, dtype=dtype), n_valid.to(dtype)), 1)
        if self.unread and self.unread[-1][0] == step:
            self.unread[-1][1].add_(of_source @ rows)
        else:
            self.unread.append((step, of_source @ rows))

    def read(self):
        """Adds the losses on the device to the blocks, over all ranks."""
        if not self.unread:
            return
        sums = torch.stack([s for _, s in self.unread])                               # (n, m, 2)
        total = sum_numbers(sums.flatten().tolist(), self.training.run.layout)
        total = np.array(total).reshape(sums.shape)
        blocks = self.state['blocks']
        # Step by step, so that the sums do not depend on when they were read.
        for (step, _), of_step in zip(self.unread, total, strict=True):
            first = step - step % self.block
            if not blocks or blocks[-1]['first'] != first:
                m = len(self.names)
                blocks.append(dict(first=first, steps=0, losses=[0.0] * m, tokens=[0.0] * m))
            block = blocks[-1]
            block['steps'] += 1
            for i, (loss, n_tokens) in enumerate(of_step.tolist()):
                block['losses'][i] += loss
                block['tokens'][i] += n_tokens
        self.unread = []

    def laws(self, step):
        """The law of every source, and the number of points of the source with the fewest."""
        blocks = [b for b in self.state['blocks'] if b['first'] >= self.training.first_update]
        # Rows of all sources, at the middle of a block.
        n = np.array([b['first'] + (b['steps'] + 1) / 2 for b in blocks])
        n = n * self.training.batch_rows
        losses = np.array([b['losses'] for b in blocks]).reshape(len(blocks), -1)     # (points, m)
        tokens = np.array([b['tokens'] for b in blocks]).reshape(len(blocks), -1)
        fewest = int((tokens > 0).sum(0).min()) if len(blocks) else 0
        laws = {}
        for i, name in enumerate(self.names if fewest >= FEWEST else []):
            is_there = tokens[:, i] > 0
            mean = losses[is_there, i] / tokens[is_there, i]
            laws[name] = rules.fit_power_law(n[is_there], np.maximum(mean, 1e-6))
        return laws, fewest

    def update(self, step):
        start = time.perf_counter()
        training = self.training
        self.read()
        laws, fewest = self.laws(step)
        if not laws:
            if training.run.is_master:
                tqdm.write(
                    f'step {step}: ado keeps the weights. A source has {fewest} losses after step '
                    f'{training.first_update}, and a law needs {FEWEST}.')
            return {'mixture/points': fewest}
        steps = range(step, min(step + training.config['mixture_interval'], training.n_steps))
        asked, self.state['rule'], about = rules.update_ado(
            self.prior, laws, self.state['rule'], steps, training.batch_rows)
        weights, over = within_epochs(training, step, asked)
        if over and training.run.is_master:
            tqdm.write(f'step {step}: max_epochs limits the weights of {", ".join(over)}')
        set_weights(training.loader, weights)
        metrics = {}
        for name in self.names:
            floor, scale, exponent = laws[name]
            metrics[f'mixture/asked_{name}'] = asked[name]
            metrics[f'mixture/floor_{name}'] = floor
            metrics[f'mixture/scale_{name}'] = scale
            metrics[f'mixture/exponent_{name}'] = exponent
            metrics[f'mixture/speed_{name}'] = about['speed'][name]
        metrics['mixture/points'] = fewest
        metrics['system/mixture_ms'] = (time.perf_counter() - start) * 1e3
        return metrics
