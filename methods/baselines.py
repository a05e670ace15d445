"""The mixture methods that influence is compared with: Skill-It, Aioli, DoGE and DoReMi.

This file measures for them. Their rules are in rules.py. Skill-It and Aioli change the sampling
weights. DoGE and DoReMi are proxy runs: all sources are drawn equally, a weight of every source
multiplies its part of the gradient, and the mean of these weights over the run is the mixture that
another run is then trained on (`tools/sweep.py method`). They are gradient takers, see
methods/__init__.py.

Defaults are the published settings, scaled to a run of N steps with rounds of U (mixture_interval)
steps. README has this table with what each line means:

    method            published (run length)                         default here
    Aioli, 2 sources  rounds of N / 20 steps: 4 sweeps of 4 steps    4 sweeps of 0.128 U / 8 steps,
                      in 250, one-hot 0.625, eta 0.2, ema 0.1        the rest as published
                      (5,000)
    Aioli, 3 sources  rounds of N / 20 steps: 4 sweeps of 6 steps    4 sweeps of 0.288 U / 12 steps,
                      in 250, one-hot 0.5, eta 0.1, ema 0.5          the rest as published
                      (5,000)
    Aioli, 7 sources  rounds of N / 200 steps: 2 sweeps of 10 steps  2 sweeps of 0.288 U / 14 steps,
                      in 200, one-hot 0.75, eta 1, ema 0.1           the rest as published
                      (40,000)
    DoGE              mu 0.01, AdamW's rate 5e-4 falling to 1e-4,    eta = 1 / mu = 100, the rate is
                      scores within 0 and 5 (10,000)                 rules.doge_learning_rate
    DoReMi            eta 1, smoothing 1e-3, reference and proxy as  eta 1, smoothing 1e-3
                      long as the run (200,000)
    Skill-It          eta 0.2, window 3, updates every N / 10 steps, eta 0.2, window 3
                      each source alone for the full length (5,000)

Another number of sources takes Aioli's setting of the nearest number. The published numbers of
rounds need mixture_interval = N / 20 (Aioli) and N / 10 (Skill-It). Aioli's lines are the scripts
of its public code, where an ema goes with aioli_rule='reference_ema'. The paper's pseudo-code is
'accumulate'. Skill-It's line is from the scripts of Aioli's comparison. DoGE and DoReMi move their
weights at every step, so in a shorter run they move less far.

Letters in shape comments: m sources, K segments of exploration.
"""
import os
import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import kd
from configurator import BadInput, at_least, between, one_of, read_json
from influence import global_inner
from lib import parts
from lib.parallel import gradient_norm, local_tensor, reshard, sum_numbers
from lib.validate import row_losses
from methods import rules
from methods.presence import accumulate
from methods.reweight import chosen_windows, epoch_caps, set_weights
from model import flops_per_token

LAST = 5                # the matrix A of a proxy run is the mean over its last so many steps


@dataclass
class BaselineConfig:
    """Knobs of the methods that influence is compared with."""
    skillit_graph: str | None = None    # how much a run on one source helps the others: a file that
                            # `tools/sweep.py method` wrote, or .npy (rows trained, columns
                            # evaluated)
    skillit_window: at_least(1) = 3     # losses of so many updates are summed
    aioli_sweeps: at_least(1) | None = None     # how often every mixture is explored in a round.
                            # None: 4, from 6 sources on 2, fewer in a short round
    aioli_steps: at_least(1) | None = None      # steps of every exploration. None: 0.13 of a round
                            # explores with two sources, else 0.29
    one_hot_factor: between(0.0, 1.0) | None = None     # aioli: weight of the favoured source in an
                            # explored mixture; the others share the rest. None: 0.625 of two
                            # sources, 0.5 of 3 to 5, 0.75 of more; higher where an exploration
                            # has too few rows to tell
    aioli_rule: one_of('accumulate', 'reference_ema') = 'accumulate'    # accumulate: the paper's
                            # rule. reference_ema: the public code's, from the start weights each
                            # time
    aioli_ema: between(0.0, 1.0) | None = None      # share of the past in the mean of matrices. 0:
                            # each round uses its own. None: 0.1, of 3 to 5 sources 0.5
    aioli_matrix: one_of('measured', 'random') = 'measured'     # random: a control that explores
                            # as much and learns nothing
    doremi_reference: str | None = None     # run whose losses the proxy's are compared with
    doremi_clip: one_of('token', 'group') = 'token'     # where an excess loss below 0 counts as 0:
                            # token by token (the original), or in the mean of a source
    doremi_smoothing: between(0.0, 0.999) = 1e-3    # share of equal weights that is mixed in


def matrix_metrics(kind, A, names):
    """mixture/<kind>_<evaluated>_<trained> for every entry of a matrix (m, m)."""
    metrics = {}
    for a, evaluated in enumerate(names):
        for b, trained in enumerate(names):
            value = float(A[a][b])
            # JSON has no nan.
            metrics[f'mixture/{kind}_{evaluated}_{trained}'] = value if np.isfinite(value) else None
    return metrics


def aioli_settings(config):
    """Aioli's knobs with the published setting, scaled to mixture_interval, in place of None."""
    n_sources = sum(weight > 0 for weight in config['sources'].values())
    published = rules.aioli_published(n_sources)
    sweeps, steps = rules.aioli_exploration(
        n_sources, config['mixture_interval'], config['aioli_sweeps'], config['aioli_steps'])
    factor = config['one_hot_factor']
    if factor is None:
        rows = steps * (config['total_batch_tokens'] // config['block_size'])
        factor = rules.aioli_factor(n_sources, rows)
    ema = published['ema'] if config['aioli_ema'] is None else config['aioli_ema']
    return dict(
        aioli_sweeps=sweeps, aioli_steps=steps, one_hot_factor=factor, aioli_ema=ema,
        mixture_eta=rules.eta_of(config))


# -- Skill-It and Aioli ----------------------------------------------------------------------------


def read_graph(path, names):
    """Reads Skill-It's graph: (m, m) float64, row evaluated, column trained, ordered by names.

    path: .json that `tools/sweep.py method` wrote ({"groups": [...], "graph": rows of trained
    groups}), or .npy with rows trained, in the config's order. Raises BadInput when it does not
    fit.
    """
    if not path:
        raise BadInput(
            "mixture = 'skillit' needs skillit_graph, made from a run on every source alone: "
            '`python tools/sweep.py method --method=skillit ...`, or a .npy of your own, rows '
            'trained, columns evaluated.')
    if not os.path.isfile(path):
        raise BadInput(f"skillit_graph = '{path}' is no file.")
    m = len(names)
    hint = 'Make it again with `python tools/sweep.py method --method=skillit ...`.'
    if path.endswith('.npy'):
        # A .npy does not name its groups, so their order cannot be checked.
        graph = parts.read_array(path, None, (m, m), hint)
    else:
        found = read_json(path)
        parts.check_fields(found, dict(groups=list, graph=list), path, hint)
        groups = [str(group) for group in found['groups']]
        if sorted(groups) != sorted(names):
            raise BadInput(
                f"skillit_graph = '{path}' is of the groups {', '.join(groups)}, the sources are "
                f"{', '.join(names)}.")
        try:
            graph = np.array(found['graph'], dtype=np.float64)
        except (TypeError, ValueError):
            raise BadInput(f"skillit_graph = '{path}' is no table of numbers. {hint}") from None
        if graph.shape != (m, m) or not np.isfinite(graph).all():
            raise BadInput(
                f"skillit_graph = '{path}' has the shape {graph.shape}, with "
                f'{np.isfinite(graph).sum()} finite numbers; it must be {m} x {m}. {hint}')
        order = [groups.index(name) for name in names]
        graph = graph[np.ix_(order, order)]
    # A loss cannot fall by more than all of it. In per cent, one source would get all the weight.
    if graph.max() > 1:
        raise BadInput(
            f"skillit_graph = '{path}' holds {graph.max():g}. Its numbers are relative drops of a "
            f'loss, which are at most 1. {hint}')
    # Files have rows trained, as Skill-It does. rules.py has rows evaluated.
    return graph.T.astype(np.float64)


def check_names(weights, names):
    """Raises BadInput unless a checkpoint's method weighed the sources `names`, in this order."""
    # Matrices and lists of losses hold the sources by position.
    if list(weights) != list(names):
        raise BadInput(
            f"the method of the checkpoint weighed the sources {', '.join(weights)}, this run has "
            f"{', '.join(names)} with a weight above 0. Put `sources` back, in their order, or "
            "continue with --mixture=fixed.")


def within_epochs(training, step, asked):
    """The weights `asked`, lowered where they would break max_epochs if they stayed from `step` on.

    asked: dict source -> share. Returns (weights, names of the sources that were lowered).
    """
    caps = epoch_caps(training, step)
    over = [name for name in training.names if asked[name] > caps[name] + 1e-9]
    # When all sources are used up, there is no bound that could be scaled to a sum of 1.
    if not over or not sum(caps.values()) > 0:
        return asked, []
    return rules.project(asked, dict.fromkeys(training.names, 0.0), caps), over


class Online:
    """What Skill-It and Aioli share: validation losses, weights within max_epochs, and metrics."""

    def __init__(self, training):
        self.training = training
        self.state = {}
        self.n_rows = {}                # source -> validation rows that are measured
        asked = training.config['mixture_rows']
        for source in training.val_sources:
            if source.name in training.names:
                self.n_rows[source.name] = min(asked, source.n_windows)
        short = [f'{name} {n}' for name, n in self.n_rows.items() if n < asked]
        if short and training.run.is_master:
            print(
                f'warning: mixture_rows = {asked} is more than the validation rows of some '
                f'sources, of which all are measured: {", ".join(short)}.')

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        if 'weights' in state:
            check_names(state['weights'], self.training.names)
        self.state = dict(state)

    def weights(self):
        """The method's weights by source. max_epochs may hold the loader's below them."""
        loader = self.training.loader
        now = {name: loader.weights[name] for name in self.training.names}
        return self.state.get('weights', now)

    def losses(self):
        """Nats per token by source, on the same mixture_rows validation rows every time."""
        training = self.training
        config = training.config
        losses = {}
        for source in training.val_sources:
            if source.name in training.names:
                # With the same rows every time, differences of losses have less noise.
                rows = row_losses(
                    training.model, training.feeder, source, self.n_rows[source.name])
                nats, n_valid, _ = rows.sum(1)
                losses[source.name] = float(nats / n_valid)
        n_tokens = sum(self.n_rows.values()) * config['block_size']
        # A forward pass takes a third of the FLOPs of a training step.
        flops = n_tokens * flops_per_token(training.model.config, config['block_size']) / 3
        self.state['flops'] = self.state.get('flops', 0) + flops
        self.state['evaluations'] = self.state.get('evaluations', 0) + 1
        return losses

    def apply(self, step, asked, metrics, start):
        """Gives the loader the weights `asked`, within max_epochs. Returns all metrics to log."""
        training = self.training
        asked, over = within_epochs(training, step, asked)
        if over and training.run.is_master:
            tqdm.write(f'step {step}: max_epochs limits the weights of {", ".join(over)}')
        set_weights(training.loader, asked)
        # The method continues from its own weights, not from those that max_epochs has lowered.
        for name, weight in self.state['weights'].items():
            metrics[f'mixture/asked_{name}'] = weight
        metrics['mixture/extra_flops'] = self.state.get('flops', 0)
        metrics['mixture/evaluations'] = self.state.get('evaluations', 0)
        metrics['mixture/explored_steps'] = self.state.get('explored', 0)
        metrics['system/mixture_ms'] = (time.perf_counter() - start) * 1e3
        return metrics


class SkillIt(Online):
    """Chen et al. 2023 (arXiv:2307.14430)."""

    def __init__(self, training):
        super().__init__(training)
        self.graph = read_graph(training.config['skillit_graph'], training.names)

    def due(self, step):
        training = self.training
        is_time = step % training.config['mixture_interval'] == 0
        # Step 0 needs no measurement: the graph alone gives the first weights.
        return step == 0 or is_time and training.first_update <= step < training.n_steps

    def update(self, step):
        start = time.perf_counter()
        config = self.training.config
        weights = self.weights()
        losses = self.losses() if step else {}         # at step 0 all losses count as 1
        weights, rule, about = rules.update_skillit(
            weights, losses, self.state.get('rule', {}), self.graph, rules.eta_of(config),
            config['skillit_window'])
        self.state['rule'] = rule
        self.state['weights'] = weights
        metrics = matrix_metrics('A', about['A'], self.training.names) if step else {}
        return self.apply(step, weights, metrics, start)


class Aioli(Online):
    """Chen et al. 2024 (arXiv:2411.05735).

    A round begins with an exploration: aioli_sweeps times, in random order, aioli_steps steps on a
    mixture that favours one source. `update` runs at its beginning and after every such segment.
    """

    def __init__(self, training):
        super().__init__(training)
        config = training.config
        # Called for its check alone, so that a bad factor ends the run before it trains.
        rules.one_hot_mixtures(training.names, config['one_hot_factor'])
        n = len(training.names)
        self.explored = config['aioli_sweeps'] * config['aioli_steps'] * n
        if self.explored >= config['mixture_interval']:
            raise BadInput(
                'aioli explores for aioli_sweeps * aioli_steps * sources = '
                f"{config['aioli_sweeps']} * {config['aioli_steps']} * {n} = {self.explored} steps "
                f"of every {config['mixture_interval']} (mixture_interval): a round has to be "
                'longer. Raise mixture_interval, or lower aioli_sweeps or aioli_steps.')
        if training.n_steps <= self.explored:
            raise BadInput(
                f'aioli explores for {self.explored} steps, and the run has only '
                f'{training.n_steps}.')
        if training.run.is_master:
            share = self.explored / config['mixture_interval']
            print(
                f"aioli: {self.explored} of the {config['mixture_interval']} steps of a round "
                f"explore ({share:.2f}), aioli_sweeps = {config['aioli_sweeps']} times "
                f"aioli_steps = {config['aioli_steps']} on mixtures with one_hot_factor = "
                f"{config['one_hot_factor']:g}; mixture_eta = {config['mixture_eta']:g}, "
                f"aioli_ema = {config['aioli_ema']:g}.")
            if share > 0.3:
                print(
                    f'warning: aioli explores {share:.2f} of every round, and 0.13 to 0.29 are '
                    'published. Raise mixture_interval, or lower aioli_sweeps or aioli_steps.')

    def due(self, step):
        config = self.training.config
        within = step % config['mixture_interval']
        start = step - within
        # A round that the run cannot finish would explore without ever using the result.
        fits = start >= self.training.first_update and start + self.explored < self.training.n_steps
        return fits and within <= self.explored and within % config['aioli_steps'] == 0

    def update(self, step):
        start = time.perf_counter()
        config = self.training.config
        names = self.training.names
        weights = self.weights()
        losses = self.losses()
        # A small batch cannot follow a mixture exactly, so A is fitted to the rows really drawn.
        rows = self.training.loader.drawn()
        segment = step % config['mixture_interval'] // config['aioli_steps']
        if segment == 0:                # a round begins
            rng = np.random.default_rng((config['seed'], step))
            order = []
            for _ in range(config['aioli_sweeps']):
                # Losses fall more and more slowly. Random orders spread this over sources.
                order += [names[i] for i in rng.permutation(len(names))]
            seen = dict(order=order, losses=[], rows=[])
        else:
            seen = self.state.get('round') or dict(losses=[])
            if len(seen['losses']) != segment:
                raise BadInput(
                    f'step {step} is segment {segment} of a round of exploration that this run did '
                    'not begin: mixture_interval, aioli_steps or aioli_sweeps have changed since '
                    'its checkpoint. Put them back, or continue from a checkpoint at the beginning '
                    'of a round.')
            self.state['explored'] = self.state.get('explored', 0) + config['aioli_steps']
        seen = dict(
            order=seen['order'], losses=seen['losses'] + [losses], rows=seen['rows'] + [rows])
        self.state['round'] = seen
        self.state['weights'] = weights
        if segment < len(seen['order']):
            mixtures = rules.one_hot_mixtures(names, config['one_hot_factor'])
            return self.apply(step, mixtures[seen['order'][segment]], {}, start)
        metrics = self.end_round(step, seen)
        return self.apply(step, self.state['weights'], metrics, start)

    def end_round(self, step, seen):
        """Fits the matrix to the explored segments and applies the rule. Returns metrics."""
        config = self.training.config
        names = self.training.names
        drawn = np.diff([[r[n] for n in names] for r in seen['rows']], axis=0).astype(np.float64)
        drops = -np.diff([[l[n] for n in names] for l in seen['losses']], axis=0)   # (K, m) nats
        A = rules.aioli_matrix(drawn / drawn.sum(1, keepdims=True), drops)
        # D (sweeps, m evaluated, m favoured): the drops again, for the errors of their means
        favoured = np.array(seen['order'])
        D = np.stack([drops[favoured == name] for name in names], 2)
        error = np.full(A.shape, np.nan)
        if len(D) > 1:
            error = D.std(0, ddof=1) / np.sqrt(len(D))
        # With a single sweep the error is nan, the comparison is False, and there is no warning.
        unclear = float(np.mean(np.abs(D.mean(0)) < 2 * error))
        if config['aioli_matrix'] == 'random':
            rng = np.random.default_rng((config['seed'], step, 1))
            # The control keeps the size of the measured entries and loses only their information.
            A = rng.normal(size=A.shape) * np.abs(A).mean()
        weights, rule, about = rules.update_aioli(
            self.state['weights'], A, self.state.get('rule', {}), rules.eta_of(config),
            config['aioli_ema'], config['aioli_rule'])
        self.state['rule'] = rule
        self.state['weights'] = weights
        self.state['round'] = None
        if unclear > 0.5 and self.training.run.is_master:
            tqdm.write(
                f'step {step}: {unclear:.0%} of the changes that aioli measured are within two '
                'standard errors. Raise mixture_rows, aioli_sweeps or aioli_steps.')
        return {
            **matrix_metrics('A', A, names),
            **matrix_metrics('normalised', about['normalised'], names),
            **matrix_metrics('drop_se', error, names),
            'mixture/unclear': unclear}


# -- DoGE and DoReMi -------------------------------------------------------------------------------


class Proxy:
    """What DoGE and DoReMi share: a gradient taker that keeps the gradients of the sources apart.

    It leaves the sum of weight * gradient of the source's mean loss in .grad. That takes one more
    gradient per source, sharded over the ranks as the parameters are.
    """
    by_source = True

    def __init__(self, training):
        config = training.config
        mixture = config['mixture']
        for name, needed in (('presence', 'off'), ('teacher', None), ('kd_cache', None)):
            if config[name] != needed:
                raise BadInput(
                    f"mixture = '{mixture}' weighs gradients itself, so it does not work with "
                    f"{name} = '{config[name]}'. Set {name}={needed}.")
        if config['tp'] > 1 or config['n_expert']:
            raise BadInput(
                f"mixture = '{mixture}' is a proxy run, it does not work with tp > 1 or experts.")
        self.training = training
        self.parameters = None          # set at the first step, when there is a model
        self.names = training.names
        self.weights = dict.fromkeys(self.names, 1 / len(self.names))
        self.rule = {}
        self.matrices = []              # A of the last steps
        self.flops = 0.0

    def state_dict(self):
        return dict(
            weights=self.weights, rule=self.rule, matrices=self.matrices, flops=self.flops)

    def load_state_dict(self, state):
        check_names(state['weights'], self.names)
        self.weights = state['weights']
        self.rule = state['rule']
        self.matrices = state['matrices']
        self.flops = state['flops']

    def due(self, step):
        """A proxy run changes no sampling weights."""
        return False

    def begin(self, step, lr, n_valid):
        self.step = step
        self.lr = lr
        if self.parameters is None:
            # After an evaluation the root's parameters are unsharded. Gradients are those of
            # shards.
            reshard(self.training.model)
            self.parameters = list(self.training.model.parameters())
        self.n_valid = sum(n_valid)                             # supervised tokens of the step
        self.micro_shares = [n / self.n_valid for n in n_valid]
        self.at = 0                                             # number of the micro-batch
        self.gradients = {}                                     # source -> sum of its gradients
        self.shares = dict.fromkeys(self.names, 0.0)            # source -> its share of n_valid

    def source_of(self, micro):
        """The name of the one source that all rows of a micro-batch are from."""
        return self.training.loader.names[micro.source_index[0]]

    def add(self, micro, losses):
        group = self.source_of(micro)
        gradients = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        self.shares[group] += self.micro_shares[self.at]
        self.at += 1
        if group in self.gradients:
            torch._foreach_add_(local_list(self.gradients[group]), local_list(gradients))
        else:
            self.gradients[group] = gradients

    def product(self, one, other):
        """Inner product of two lists of gradients over all ranks: float."""
        model = self.training.model
        names = [name for name, _ in model.named_parameters()]
        one = dict(zip(names, one, strict=True))
        return global_inner(model, one, dict(zip(names, other, strict=True)))

    def finish(self):
        """Applies the rule and leaves the weighted gradient in .grad. Returns metrics to log."""
        one = torch.ones((), dtype=torch.float64, device=self.parameters[0].device)
        for group, gradients in self.gradients.items():         # now of the mean loss of the source
            accumulate(gradients, [], one / self.shares[group], one)
        matrix = self.update_weights()
        if matrix is not None:
            self.matrices = (self.matrices + [np.asarray(matrix).tolist()])[-LAST:]
        total = None
        for group, gradients in self.gradients.items():
            # The first gradient becomes the sum, which saves a buffer of the size of the model.
            if total is None:
                total = gradients
                accumulate(total, [], one * self.weights[group], one)
            else:
                accumulate(total, gradients, one, one * self.weights[group])
        for p, gradient in zip(self.parameters, total, strict=True):
            p.grad = gradient
        self.gradients = {}
        metrics = {}
        for name in self.names:
            metrics[f'mixture/asked_{name}'] = self.weights[name]
            metrics[f'mixture/average_{name}'] = self.rule['average'][name]
        if self.matrices:
            metrics |= matrix_metrics('A', np.mean(self.matrices, 0), self.names)
        metrics['mixture/extra_flops'] = self.flops
        return metrics


def local_list(tensors):
    return [local_tensor(t) for t in tensors]


class DoReMi(Proxy):
    """Xie et al. 2023 (arXiv:2305.10429): the excess loss above a reference model."""

    def __init__(self, training):
        super().__init__(training)
        config = training.config
        run = training.run
        if not config['doremi_reference']:
            raise BadInput(
                "mixture = 'doremi' needs doremi_reference, a model that was trained on the "
                'mixture to start from. `python tools/sweep.py method --method=doremi ...` trains '
                'it.')
        about = kd.find_teacher(
            config['doremi_reference'], config['vocab_size'], training.tokenizer,
            'doremi_reference')
        self.reference = kd.open_teacher(about, run.device, run.dtype, run.layout)
        self.reference_flops = flops_per_token(about['model'], config['block_size']) / 3

    def begin(self, step, lr, n_valid):
        super().begin(step, lr, n_valid)
        device = self.parameters[0].device
        self.sums = torch.zeros(len(self.names), dtype=torch.float64, device=device)

    def add(self, micro, losses):
        super().add(micro, losses)
        # The weights of the reference have the run's dtype already.
        with torch.no_grad(), torch.autocast(micro.inputs.device.type, enabled=False):
            _, theirs, _ = self.reference.loss(micro.inputs, micro.targets, doc_ids=micro.doc_ids)
        excess = losses.detach().double() - theirs.double()
        if self.training.config['doremi_clip'] == 'token':
            excess = excess.clamp(min=0)
        self.sums[self.names.index(self.source_of(micro))] += excess.sum()

    def update_weights(self):
        """Applies the rule. Returns the matrix A of the step."""
        config = self.training.config
        self.flops += self.n_valid * self.reference_flops
        sums = sum_numbers(self.sums.tolist(), self.training.run.layout)
        excess = {}
        for name, total in zip(self.names, sums, strict=True):
            if self.shares[name]:
                excess[name] = total / (self.shares[name] * self.n_valid)
        self.weights, self.rule, about = rules.update_doremi(
            self.weights, excess, self.rule, rules.eta_of(config), config['doremi_smoothing'])
        return about['A']


class DoGE(Proxy):
    """Fan et al. 2024 (arXiv:2310.15393): products with the gradient of a validation batch."""

    def update_weights(self):
        """Measures and applies the rule. Returns the matrix A at a round's last steps, else None.

        For A the validation batch goes through source by source, and its gradient adds up: A_ij is
        by how much the product with the gradient of source j grew with source i.
        """
        training = self.training
        config = training.config
        largest = config['grad_clip'] or np.inf
        norms = dict.fromkeys(self.names, 0.0)
        for name, gradients in self.gradients.items():
            norms[name] = self.product(gradients, gradients) ** 0.5
            if norms[name] > largest:
                # Clipped one by one: a large gradient must not shrink the others.
                torch._foreach_mul_(local_list(gradients), largest / norms[name])
                norms[name] = largest
        m = len(self.names)
        per_source = max(m, config['mixture_rows'] // m * m) // m
        parts = []
        val_sources = [s for s in training.val_sources if s.name in self.names]
        for i, source in enumerate(val_sources):
            chosen = chosen_windows(source, per_source, (config['seed'], self.step, 2, i))
            parts.append(source.rows(chosen.tolist()))
        n_tokens = sum(int((part[:, 1:] >= 0).sum()) for part in parts)
        interval = config['mixture_interval']
        # A takes m times the products, so only the last steps of a round measure it.
        by_source = self.step % interval >= interval - LAST
        if not by_source:
            parts = [np.concatenate(parts)]
        rows = []                                               # of A
        before = dict.fromkeys(self.names, 0.0)
        for part in parts:
            self.backward(part, n_tokens)
            gradients = [p.grad for p in self.parameters]
            now = {name: self.product(g, gradients) for name, g in self.gradients.items()}
            rows.append(
                [(now.get(name, 0.0) - before[name]) * len(parts) for name in self.names])
            before |= now
        norm = gradient_norm(training.model)
        factor = min(1.0, largest / (float(norm) + 1e-6))
        for p in self.parameters:
            p.grad = None
        self.flops += n_tokens * flops_per_token(training.model.config, config['block_size'])
        products = {name: before[name] * factor for name in self.names}
        self.weights, self.rule, _ = rules.update_doge(
            self.weights, products, norms, self.rule,
            rules.doge_learning_rate(self.lr, config['learning_rate']), rules.eta_of(config))
        return rows if by_source else None

    def backward(self, rows, n_tokens):
        """Adds the gradient of the summed loss of rows (n, T + 1) / n_tokens to .grad."""
        training = self.training
        batches = training.feeder.batches(lambda positions: rows[positions], len(rows))
        for inputs, targets, doc_ids in batches:
            with training.run.autocast:
                loss, _, _ = training.model.loss(inputs, targets, doc_ids=doc_ids)
            (loss * (training.run.n_data / n_tokens)).backward()
