"""Skill-It, Aioli, DoGE and DoReMi at work in a training run: what they measure, when, and what it costs. The rules are in methods/rules.py.

Skill-It and Aioli change the sampling weights: train.py calls `update` at the steps that are `due`. DoGE and DoReMi are proxies: rows are drawn
alike from all sources, a weight of every source multiplies its part of the gradient, and the mean of these weights over the run is the
mixture that a run of its own is then trained on (`tools/sweep.py method`). A `Proxy` takes the place of plain accumulation for that.
"""
import json
import os
import time

import numpy as np
import torch
from tqdm import tqdm

import kd
from configurator import BadInput, check_values
from influence import inner
from lib import validate
from lib.device import all_reduce_sum
from lib.parallel import gradient_norm, local_tensor
from methods import rules
from methods.presence import accumulate
from methods.reweight import batches_of_rows, caps_of, chosen_windows
from model import flops_per_token
from ops.ranks import n_replicas

ONLINE, PROXIES = ('skillit', 'aioli'), ('doge', 'doremi')
LAST = 5                # a proxy's matrix A is the mean of its last so many steps


def check(config, sources, n_steps, vocab_size, tokenizer):
    """BadInput for settings with which one of these methods cannot work. sources: the active ones; n_steps: of the run; the rest as in
    kd.find_teacher. Returns what it says of DoReMi's reference model, None for the others.
    """
    method = config['mixture']
    check_values(config, dict(aioli_rule=('accumulate', 'reference_ema'), aioli_matrix=('measured', 'random'), doremi_clip=('token', 'group')),
                 dict(mixture_rows=(1, np.inf), skillit_window=(1, np.inf), aioli_sweeps=(1, np.inf), aioli_steps=(1, np.inf), aioli_ema=(0, 1),
                      doremi_smoothing=(0, 0.999)))
    if method not in ONLINE + PROXIES:
        return None
    if len(sources) < 2:
        raise BadInput(f"mixture = '{method}' weighs sources against each other, and there is only one.")
    if config['select'] == 'online':
        raise BadInput(f"select = 'online' measures influence, which mixture = '{method}' does not. Take mixture = 'influence' or 'fixed', or select = 'scores'.")
    if method == 'skillit':
        read_graph(config['skillit_graph'], [s.name for s in sources])
    if method == 'aioli':
        rules.one_hot_mixtures([s.name for s in sources], config['one_hot_factor'])
        explored = config['aioli_sweeps'] * config['aioli_steps'] * len(sources)
        if explored >= config['mixture_interval']:
            raise BadInput(f"aioli explores for aioli_sweeps * aioli_steps * sources = {config['aioli_sweeps']} * {config['aioli_steps']} * {len(sources)} = "
                           f"{explored} steps of every {config['mixture_interval']} (mixture_interval): a round has to be longer. Raise mixture_interval, or "
                           'lower aioli_sweeps or aioli_steps.')
        if n_steps <= explored:
            raise BadInput(f'aioli explores for {explored} steps, and the run has only {n_steps}.')
    if method in PROXIES:
        for name, what in (('presence', 'off'), ('teacher', None), ('kd_cache', None)):
            if config[name] != what:
                raise BadInput(f"mixture = '{method}' weighs gradients of its own, it does not go with {name} = '{config[name]}'. Set {name}={what}.")
        if config['tp'] > 1 or config['n_expert']:
            raise BadInput(f"mixture = '{method}' is a proxy run, it does not work with tp > 1 or experts.")
    if method == 'doremi' and not config['doremi_reference']:
        raise BadInput("mixture = 'doremi' needs doremi_reference, a model that was trained on the mixture to start from. `python tools/sweep.py method "
                       '--method=doremi ...` trains it.')
    return kd.find_teacher(config['doremi_reference'], vocab_size, tokenizer, 'doremi_reference') if method == 'doremi' else None


def read_graph(path, names):
    """Skill-It's graph in our orientation, (m, m), row evaluated, column trained, in the order of names. BadInput when it does not fit.

    path: .json as `tools/sweep.py method` writes it ({"groups": [...], "graph": rows of trained groups}), or .npy, rows trained, in the config's order.
    """
    if not path:
        raise BadInput("mixture = 'skillit' needs skillit_graph, made from a run on every source alone: `python tools/sweep.py method --method=skillit ...`, or a "
                       '.npy of your own, rows trained, columns evaluated.')
    if not os.path.isfile(path):
        raise BadInput(f"skillit_graph = '{path}' does not exist.")
    if path.endswith('.npy'):
        graph = np.load(path)
    else:
        with open(path, encoding='utf-8') as f:
            found = json.load(f)
        if set(found['groups']) != set(names):
            raise BadInput(f"skillit_graph = '{path}' is of the groups {', '.join(found['groups'])}, the sources are {', '.join(names)}.")
        order = [found['groups'].index(name) for name in names]
        graph = np.array(found['graph'])[np.ix_(order, order)]
    if graph.shape != (len(names), len(names)) or not np.isfinite(graph).all():
        raise BadInput(f"skillit_graph = '{path}' has the shape {graph.shape}, with {np.isfinite(graph).sum()} finite numbers; it takes "
                       f'{len(names)} x {len(names)}.')
    return graph.T.astype(np.float64)


# -- Skill-It and Aioli ------------------------------------------------------------------------------------------------

def due(config, step, first, n_steps, n_sources):
    """Whether `update` is called before this step is trained: at the start of a round and, for Aioli, after every explored segment."""
    start = step - step % config['mixture_interval']
    if config['mixture'] == 'skillit':
        return step == 0 or step == start >= first and step < n_steps
    explored = config['aioli_sweeps'] * config['aioli_steps'] * n_sources
    return start >= first and start + explored < n_steps and step - start <= explored and (step - start) % config['aioli_steps'] == 0


def update(model, loader, sources, val_sources, config, state, step, n_steps, batch_rows, optimizers, to_device, rank, world_size):
    """A round's beginning or the end of a segment of exploration: (state, metrics to log). Gives the loader new weights. As reweight.update."""
    start, names = time.perf_counter(), [s.name for s in sources]
    evaluated = [s for s in val_sources if s.name in names]
    within, log = (step % config['mixture_interval']) // config['aioli_steps'], {}
    weights = state.get('weights', {name: loader.weights[name] for name in names})
    if not (config['mixture'] == 'skillit' and step == 0):
        losses = evaluate(model, evaluated, config, to_device, rank, world_size)
        flops = config['mixture_rows'] * len(evaluated) * config['block_size'] * flops_per_token(model.config, config['block_size']) / 3
        state = {**state, 'flops': state.get('flops', 0) + flops, 'evaluations': state.get('evaluations', 0) + 1}
    caps = caps_of(loader, names, config, (n_steps - step) * batch_rows)
    if config['mixture'] == 'skillit':
        weights, rule, about = rules.update_skillit(weights, losses if step else {}, state.get('rule', {}), read_graph(config['skillit_graph'], names),
                                                       rules.eta_of(config), config['skillit_window'])
        state, asked = {**state, 'rule': rule, 'weights': weights}, weights
        log = matrix_metrics(about['A'], names) if step else {}
    else:
        state, asked, log = explore(loader, names, config, state, weights, step, within, losses, rank)
        weights = state['weights']
    over = [n for n in names if asked[n] > caps[n] + 1e-9]
    if over and sum(caps.values()) > 0:
        asked = rules.project(asked, dict.fromkeys(names, 0.0), caps)
        if rank == 0:
            tqdm.write(f'step {step}: max_epochs of {", ".join(over)} holds their weights down')
    loader.set_weights({**dict.fromkeys(loader.names, 0.0), **asked})
    return state, {**log, **{f'mixture/asked_{n}': w for n, w in weights.items()}, 'mixture/extra_flops': state.get('flops', 0),
                   'mixture/evaluations': state.get('evaluations', 0), 'mixture/explored_steps': state.get('explored', 0),
                   'system/mixture_ms': (time.perf_counter() - start) * 1e3}


def evaluate(model, sources, config, to_device, rank, world_size):
    """Losses on the same mixture_rows validation rows every time, by source: dict of floats, nats per token."""
    found = {}
    for source in sources:
        nats, counted, _ = validate.row_losses(model, source, config['mixture_rows'], config['batch_size'], to_device, rank=rank, world_size=world_size).sum(1)
        found[source.name] = float(nats / counted)
    return found


def explore(loader, names, config, state, weights, step, within, losses, rank):
    """Aioli at the end of segment `within` of a round (0: its beginning): (state, weights to draw by from here, metrics)."""
    rows = loader.drawn()
    mixtures_of = rules.one_hot_mixtures(names, config['one_hot_factor'])
    if within == 0:
        rng = np.random.default_rng((config['seed'], step))
        order = [names[i] for _ in range(config['aioli_sweeps']) for i in rng.permutation(len(names))]
        seen = dict(order=order, losses=[losses], rows=[rows])
    else:
        if len((state.get('round') or dict(losses=[]))['losses']) != within:
            raise BadInput(f'step {step} is segment {within} of a round of exploration that this run did not begin: mixture_interval, aioli_steps or aioli_sweeps '
                           'have changed since its checkpoint. Put them back, or go on from a checkpoint at the beginning of a round.')
        seen = {key: state['round'][key] + new for key, new in dict(order=[], losses=[losses], rows=[rows]).items()}
        state = {**state, 'explored': state.get('explored', 0) + config['aioli_steps']}
    state = {**state, 'round': seen, 'weights': weights}
    if within < len(seen['order']):
        return state, mixtures_of[seen['order'][within]], {}
    drawn = np.diff([[r[n] for n in names] for r in seen['rows']], axis=0).astype(np.float64)                 # (K, m) rows
    drops = -np.diff([[l[n] for n in names] for l in seen['losses']], axis=0)                                # (K, m) nats
    A = rules.aioli_matrix(drawn / drawn.sum(1, keepdims=True), drops)
    D = np.stack([drops[[o == n for o in seen['order']]] for n in names], 2)                                 # (sweeps, m evaluated, m favoured)
    error = D.std(0, ddof=1) / np.sqrt(len(D)) if len(D) > 1 else np.full(A.shape, np.nan)
    unclear = float(np.mean(np.abs(D.mean(0)) < 2 * error))
    if config['aioli_matrix'] == 'random':
        A = np.random.default_rng((config['seed'], step, 1)).normal(size=A.shape) * np.abs(A).mean()
    new, rule, about = rules.update_aioli(weights, A, state.get('rule', {}), rules.eta_of(config), config['aioli_ema'], config['aioli_rule'])
    if unclear > 0.5 and rank == 0:
        tqdm.write(f'step {step}: {unclear:.0%} of the changes that aioli measured are within two standard errors. Raise mixture_rows, aioli_sweeps or aioli_steps.')
    log = {**matrix_metrics(A, names), **{f'mixture/normalised_{i}_{j}': about['normalised'][a, b] for a, i in enumerate(names) for b, j in enumerate(names)},
           **{f'mixture/drop_se_{i}_{j}': error[a, b] if np.isfinite(error[a, b]) else None for a, i in enumerate(names) for b, j in enumerate(names)},
           'mixture/unclear': unclear}
    return {**state, 'rule': rule, 'weights': new, 'round': None}, new, log


def matrix_metrics(A, names):
    """mixture/A_<evaluated>_<trained> of a matrix."""
    return {f'mixture/A_{i}_{j}': float(A[a][b]) for a, i in enumerate(names) for b, j in enumerate(names)}


# -- DoGE and DoReMi ---------------------------------------------------------------------------------------------------

class Proxy:
    """Makes the micro-batches of a step out of rows of one source each, keeps the gradients of the sources apart, and leaves the sum of
    weight * gradient of the source's mean loss in .grad: one more gradient per source, spread over the ranks as the parameters are.
    """

    def __init__(self, model, config, sources, val_sources, about_reference, to_device, autocast, device, dtype, layout, state, rank, world_size):
        """sources: all of the loader's (weights 0 take no part); about_reference: from `check`; state: `state` of the run that goes on, {} at first; rank, world_size: of rows."""
        self.model, self.config, self.to_device, self.autocast = model, config, to_device, autocast
        self.names = [s.name for s in sources if config['sources'][s.name] > 0]
        self.all_names = [s.name for s in sources]
        self.val_sources = [s for s in val_sources if s.name in self.names]
        self.rank, self.world_size = rank, world_size
        self.parameters = list(model.parameters())
        self.copies = [n_replicas(model.layout, name) for name, _ in model.named_parameters()]
        self.weights = state.get('weights', dict.fromkeys(self.names, 1 / len(self.names)))
        self.rule, self.matrices, self.flops = state.get('rule', {}), state.get('matrices', []), state.get('flops', 0.0)
        self.token_flops = flops_per_token(model.config, config['block_size'])
        self.reference = None
        if about_reference is not None:
            self.reference = kd.open_teacher(about_reference, device, dtype, layout)
            self.reference_flops = flops_per_token(about_reference['model'], config['block_size']) / 3

    def state(self):
        return dict(weights=self.weights, rule=self.rule, matrices=self.matrices, flops=self.flops)

    def read(self, loader, source_index, cursors):
        """The rows of a step, (batch_size, T + 1) for every micro-batch of this rank, each from one source. What is missing to a whole micro-batch
        is repeated and does not count; every rank has the same number.
        """
        size, rows, self.groups = self.config['batch_size'], [], []
        for name in self.names:
            of_source = np.flatnonzero(source_index == self.all_names.index(name))
            for start in range(0, len(of_source), size * self.world_size):
                mine = np.arange(start + self.rank * size, start + (self.rank + 1) * size)
                chosen = of_source[np.minimum(mine, len(of_source) - 1)]
                read = loader.read(source_index[chosen], cursors[chosen])
                repeated = mine >= len(of_source)
                read[repeated] = ~(read[repeated] ^ (read[repeated] >> 31))        # the sign says that a token is not counted
                rows.append(read)
                self.groups.append(name)
        self.kept, self.shares = {}, dict.fromkeys(self.names, 0.0)
        self.sums, self.at = torch.zeros(len(self.names), dtype=torch.float64, device=self.parameters[0].device), 0
        return rows

    def see(self, inputs, targets, doc_ids, losses):
        """After a forward: losses (B, T) of the proxy, 0 where not counted."""
        if self.reference is None:
            return
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            _, theirs, _ = self.reference.loss(inputs, targets, doc_ids=doc_ids)
        excess = losses.detach().double() - theirs.double()
        excess = excess.clamp(min=0) if self.config['doremi_clip'] == 'token' else excess
        self.sums[self.names.index(self.groups[self.at])] += excess.sum()

    def add(self, share):
        """After every backward of share * (mean loss of the micro-batch over all ranks): takes the gradients out of .grad."""
        group, gradients = self.groups[self.at], [p.grad for p in self.parameters]
        self.at += 1
        for p in self.parameters:
            p.grad = None
        self.shares[group] += share
        if group in self.kept:
            torch._foreach_add_([local_tensor(g) for g in self.kept[group]], [local_tensor(g) for g in gradients])
        else:
            self.kept[group] = gradients

    def product(self, one, other):
        """Inner product of two lists of gradients over all ranks: float."""
        total = sum(inner(a, b) / n for a, b, n in zip(one, other, self.copies))
        return all_reduce_sum([total], everywhere=True)[0]

    def finish(self, step, lr, n_valid):
        """The rule, then the weighted gradient into .grad. n_valid: counted tokens of the step, by all ranks. Returns metrics to log."""
        one = torch.ones((), dtype=torch.float64, device=self.parameters[0].device)
        for group, gradients in self.kept.items():             # of the mean loss of the source
            accumulate(gradients, [], one / self.shares[group], one)
        self.flops += n_valid * (self.reference_flops if self.reference is not None else 0)
        if self.reference is not None:
            sums = all_reduce_sum(self.sums.tolist())
            excess = {name: x / (self.shares[name] * n_valid) for name, x in zip(self.names, sums) if self.shares[name]}
            self.weights, self.rule, about = rules.update_doremi(self.weights, excess, self.rule, rules.eta_of(self.config),
                                                                    self.config['doremi_smoothing'])
            matrix = about['A']
        else:
            matrix = self.measure_doge(step, lr)
        if matrix is not None:
            self.matrices = (self.matrices + [np.asarray(matrix).tolist()])[-LAST:]
        total = None
        for group, gradients in self.kept.items():
            if total is None:
                total = gradients
                accumulate(total, [], one * self.weights[group], one)
            else:
                accumulate(total, gradients, one, one * self.weights[group])
        for p, gradient in zip(self.parameters, total):
            p.grad = gradient
        self.kept = {}
        return {**{f'mixture/asked_{n}': w for n, w in self.weights.items()}, **{f'mixture/average_{n}': w for n, w in self.rule['average'].items()},
                **(matrix_metrics(np.mean(self.matrices, 0), self.names) if self.matrices else {}), 'mixture/extra_flops': self.flops}

    def measure_doge(self, step, lr):
        """DoGE's products with the gradient of a validation batch, and the new weights. Returns A, at the last steps before a round's end, or None.

        For A the batch goes source by source, and the gradient adds up: A_ij is what <., g_j> grew by with source i.
        """
        most = self.config['grad_clip'] or np.inf
        norms = {name: self.product(g, g) ** 0.5 for name, g in self.kept.items()}
        for name, gradients in self.kept.items():
            if norms[name] > most:
                torch._foreach_mul_([local_tensor(g) for g in gradients], most / norms[name])
                norms[name] = most
        n_rows = max(len(self.names), self.config['mixture_rows'] // len(self.names) * len(self.names))
        per_source = n_rows // len(self.names)
        by_source = step % self.config['mixture_interval'] >= self.config['mixture_interval'] - LAST
        read = [s.rows(chosen_windows(s, per_source, (self.config['seed'], step, 2, i)).tolist()) for i, s in enumerate(self.val_sources)]
        parts, rows, before = (read if by_source else [np.concatenate(read)]), [], dict.fromkeys(self.names, 0.0)
        n_tokens = sum(int((r[:, 1:] >= 0).sum()) for r in read)
        for part in parts:
            self.backward(part, n_tokens)
            gradients = [p.grad for p in self.parameters]
            now = {name: self.product(g, gradients) for name, g in self.kept.items()}
            rows.append([(now.get(name, 0.0) - before[name]) * len(parts) for name in self.names])
            before |= now
        norm = gradient_norm(self.model)
        factor = min(1.0, most / (float(norm) + 1e-6))
        for p in self.parameters:
            p.grad = None
        self.flops += n_tokens * self.token_flops
        self.weights, self.rule, _ = rules.update_doge(
            self.weights, {name: before[name] * factor for name in self.names}, {name: norms.get(name, 0.0) for name in self.names}, self.rule, lr,
            rules.eta_of(self.config))
        return rows if by_source else None

    def backward(self, rows, n_tokens):
        """Adds the gradient of (sum of the losses of rows (n, T + 1)) / n_tokens to .grad; every rank takes its part of the rows."""
        for inputs, targets, doc_ids in batches_of_rows(lambda i: rows[i], len(rows), 1, self.config['batch_size'], self.to_device, self.rank, self.world_size):
            with self.autocast:
                loss, _, _ = self.model.loss(inputs, targets, doc_ids=doc_ids)
            (loss * (self.world_size / n_tokens)).backward()
