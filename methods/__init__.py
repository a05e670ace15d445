"""What decides the data while a model trains: mixture methods, and weights of micro-batches.

A mixture method sets the sampling weights. `make` returns an object with

    due(step)           whether it measures before this step is trained
    update(step)        measures, gives the loader new weights, and returns metrics to log
    state_dict()        what a resumed run needs, as plain numbers for JSON; load_state_dict()
                        restores it
    observe(step, micro, losses)    only of a method that learns from the training losses: takes
                        those of every micro-batch

or None when the weights are fixed. A gradient taker weighs the micro-batches of a step in place of
their plain sum. `make_taker` returns an object with

    by_source           whether every micro-batch holds rows of one source only
    begin(step, lr, n_valid)    n_valid: supervised tokens of every micro-batch, over all ranks
    add(micro, losses)  after a micro-batch's backward: takes its gradient out of .grad
    finish()            leaves the weighted sum in .grad and returns metrics to log
    state_dict()        as above

or None for the plain sum. The rules are in rules.py, and they know nothing of torch. To add a
method, write its rule there, a class that measures for it (baselines.Online has the losses and the
limits), and one line in `make`. Then add its name to `mixture` in train.py.
"""
import math
from dataclasses import dataclass, field

import torch

from configurator import BadInput, at_least, between, did_you_mean
from data import put_on
from methods import baselines, mixtures, presence, reweight, selection

# Methods whose weights stay the same for the whole run.
FIXED = ('fixed', 'stratified', 'natural', 'unimax')


@dataclass
class MixtureConfig:
    """Knobs that mixture methods share."""
    mixture_warmup: at_least(0) | None = None   # no re-weighting before this step. None: after
                                            # warmup_steps and 5 % of the run
    mixture_eta: between(0.0, 1e12) | None = None       # step size. None: influence 0.3 (1 better
                                            # than the mean multiplies by exp(0.3)), skillit 0.2,
                                            # aioli 0.2 (of two sources), 0.1 (of 3 to 5) or
                                            # 1, doge 100 (1 / mu), doremi 1
    mixture_rows: at_least(1) = 64          # skillit, aioli: fixed validation rows of every source.
                                            # doge: rows of one validation batch of all sources
    max_epochs: at_least(1e-6) | None = 4.0     # re-weighting, unimax and schedule keep every
                                            # source within so many epochs of the run. None: no
                                            # limit
    mixture_schedule: str | None = None     # schedule: JSON file of weights over time
    source_loss_weight: dict[str, float] = field(default_factory=dict)      # source -> factor of
                                            # its loss, apart from its share of the rows. Sources
                                            # that are not named have 1


OWNERS = (
    MixtureConfig, reweight.InfluenceConfig, selection.SelectionConfig, baselines.BaselineConfig,
    presence.PresenceConfig)


@dataclass
class Training:
    """What methods know of the run that they serve."""
    config: dict                # train.py's knobs, as `as_published` returns them
    run: object                 # lib.device.Run
    feeder: object              # data.Feeder
    loader: object              # data.MixtureLoader
    active: list                # Sources with a weight above 0
    val_sources: list           # validation Sources, one for every source of the loader
    probes: list                # Sources of the probe sets
    tokenizer: dict | None      # the shards' tokenizer record, None: unknown
    n_steps: int                # optimizer steps of the run
    n_warmup: int               # steps of learning-rate warm-up
    batch_rows: int             # rows of a global batch
    model: object = None        # GPT, set before the first step
    optimizers: tuple = ()      # set before the first step

    @property
    def names(self):
        return [source.name for source in self.active]

    @property
    def first_update(self):
        """The first step at which a method may change the weights."""
        warmup = self.config['mixture_warmup']
        return max(self.n_warmup, self.n_steps // 20) if warmup is None else warmup

    def rows_after(self, step):
        """Rows that the run will draw from `step` on."""
        return (self.n_steps - step) * self.batch_rows


def start_weights(config, sources, rows_to_come, rows_read):
    """The weights that a run starts with: dict source -> weight, on any positive scale.

    rows_to_come  rows that the run still draws of all sources together
    rows_read     dict source -> rows drawn before, when the run goes on with new weights
    `stratified` and the proxy runs draw all sources with a weight equally. `natural` and `unimax`
    use no more of the weights either than which are above 0.
    """
    mixture = config['mixture']
    weights = {}
    for source in sources:
        size = source.n_windows if config['weigh_by'] == 'size' else 1
        weights[source.name] = config['sources'][source.name] * size
    active = [source for source in sources if weights[source.name] > 0]
    none = dict.fromkeys(weights, 0.0)
    if mixture in ('stratified', 'doge', 'doremi'):
        return {name: float(weight > 0) for name, weight in weights.items()}
    if mixture == 'natural':
        return {**none, **mixtures.natural(active)}
    if mixture == 'unimax':
        return {**none, **mixtures.unimax(active, config['max_epochs'], rows_read, rows_to_come)}
    if mixture == 'schedule':
        names = [source.name for source in active]
        _, _, points = mixtures.read_schedule(config['mixture_schedule'], names)
        return {**none, **points[0][1]}
    return weights


def loss_weights(config, active):
    """Factors of the losses by position in `sources`: list of float. None: all are 1.

    Training minimises sum(factor * loss of a token) / number of supervised tokens, over all tokens
    of the step. The divisor is their plain number, so a factor of 2 doubles the gradient of a
    source's rows and leaves that of the others as it is. With a teacher the loss is the whole
    objective. The balance loss of experts and all logged losses have no factors.
    active: Sources with a weight above 0. Raises BadInput for factors that make no sense.
    """
    factors = config['source_loss_weight']
    names = list(config['sources'])
    for name, factor in factors.items():
        if name not in names:
            raise BadInput(
                f"source_loss_weight names '{name}', which is not in `sources`."
                f'{did_you_mean(name, names)} Sources: {", ".join(names)}.')
        if not 0 <= factor < math.inf:
            raise BadInput(
                f"source_loss_weight: the factor of '{name}' is {factor:g} and must be finite and "
                'at least 0.')
    used = {source.name: factors.get(source.name, 1.0) for source in active}
    if not any(used.values()):
        raise BadInput(
            f'source_loss_weight = {factors} leaves no source whose loss counts. Give one of them '
            'a factor above 0.')
    if all(factor == 1 for factor in used.values()):
        return None
    for knob, values in (('presence', ('store', 'stream')), ('mixture', ('doge', 'doremi'))):
        if config[knob] in values:
            raise BadInput(
                f"source_loss_weight does not work with {knob} = '{config[knob]}', which weighs "
                'gradients itself. Leave one of the two out.')
    return [factors.get(name, 1.0) for name in names]


class TokenWeights:
    """The factor of every token of a data.MicroBatch, for `GPT.loss`, which flattens it.

    No tensor, because FSDP2 casts tensors among the arguments of a call to the dtype of its
    weights. In bf16 a factor of 0.3 would be 0.3008.
    """

    def __init__(self, factors, micro):
        """factors: what `loss_weights` returned, without None"""
        self.factors = factors
        self.micro = micro

    def flatten(self):
        """(B * T,) fp32"""
        rows = torch.tensor([self.factors[i] for i in self.micro.source_index])
        shape = self.micro.targets.shape
        return put_on(rows, self.micro.targets.device)[:, None].expand(shape).flatten()


def starts_again(before, config):
    """Whether a run that goes on with changed knobs leaves the weights of its checkpoint.

    before: the knobs of the checkpoint's run
    """
    knobs = ['sources', 'mixture']
    if config['mixture'] == 'unimax':
        # With another length the old weights would break max_epochs.
        knobs += ['max_epochs', 'max_steps', 'max_tokens', 'epochs']
    return any(before[name] != config[name] for name in knobs)


def as_published(config):
    """The knobs, with the method's published setting in place of None: a dict."""
    if config['mixture'] == 'aioli':
        return {**config, **baselines.aioli_settings(config)}
    return dict(config)


def make(training):
    """The mixture method that the knobs ask for, None for fixed weights.

    Raises BadInput for settings with which the method cannot work.
    """
    mixture = training.config['mixture']
    reweight.check_probe(training.config['probe'], measures=False)
    if mixture not in FIXED and len(training.active) < 2:
        raise BadInput(
            f"mixture = '{mixture}' weighs sources against each other, and there is only one.")
    if mixture == 'unimax':
        mixtures.check_supply(training)
    if mixture in FIXED:
        if training.config['select'] == 'online':
            return reweight.Influence(training)
        return None
    if mixture == 'influence':
        return reweight.Influence(training)
    if training.config['select'] == 'online':
        raise BadInput(
            f"select = 'online' measures influence, which mixture = '{mixture}' does not. Use "
            "mixture = 'influence' or 'fixed', or select = 'scores'.")
    if mixture == 'schedule':
        return mixtures.Schedule(training)
    if mixture == 'ado':
        return mixtures.Ado(training)
    if mixture == 'skillit':
        return baselines.SkillIt(training)
    if mixture == 'aioli':
        return baselines.Aioli(training)
    if mixture == 'doge':
        return baselines.DoGE(training)
    if mixture == 'doremi':
        return baselines.DoReMi(training)
    raise ValueError(f"mixture = '{mixture}' has no method")


def make_taker(training, method, grad_accum):
    """The gradient taker of the knobs. None: plain sums. method: what `make` returned."""
    if training.config['mixture'] in ('doge', 'doremi'):
        return method
    if training.config['presence'] != 'off':
        return presence.Presence(training, grad_accum)
    return None
