"""What decides the data while a model trains: mixture methods, and weights of micro-batches.

A mixture method sets the sampling weights. `make` returns an object with

    due(step)           whether it measures before this step is trained
    update(step)        measures, gives the loader new weights, and returns metrics to log
    state_dict()        what a resumed run needs, as plain numbers for JSON; load_state_dict()
                        restores it

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
from dataclasses import dataclass

from configurator import BadInput, at_least, between
from methods import baselines, presence, reweight, selection


@dataclass
class MixtureConfig:
    """Knobs that mixture methods share."""
    mixture_warmup: at_least(0) | None = None   # no re-weighting before this step. None: after
                                            # warmup_steps and 5 % of the run
    mixture_eta: between(0.0, 1e12) | None = None       # step size. None: influence 0.3 (an
                                            # influence of 1 multiplies by exp(0.3)), skillit and
                                            # aioli 0.2, doge 100 (1 / mu), doremi 1
    mixture_rows: at_least(1) = 64          # skillit, aioli: fixed validation rows of every source.
                                            # doge: rows of one validation batch of all sources
    max_epochs: at_least(1e-6) | None = 4.0     # re-weighting keeps every source within so many
                                            # epochs of the run. None: no limit


OWNERS = (
    MixtureConfig, reweight.InfluenceConfig, selection.SelectionConfig, baselines.BaselineConfig,
    presence.PresenceConfig)


@dataclass
class Training:
    """What methods know of the run that they serve."""
    config: dict                # train.py's knobs
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


def start_weights(config, sources):
    """The weights that a run starts with: dict source -> weight, on any positive scale.

    `stratified` and the proxy runs draw all sources with a weight equally.
    """
    weights = {}
    for source in sources:
        size = source.n_windows if config['weigh_by'] == 'size' else 1
        weights[source.name] = config['sources'][source.name] * size
    if config['mixture'] in ('stratified', 'doge', 'doremi'):
        return {name: float(weight > 0) for name, weight in weights.items()}
    return weights


def make(training):
    """The mixture method that the knobs ask for, None for fixed weights.

    Raises BadInput for settings with which the method cannot work.
    """
    mixture = training.config['mixture']
    reweight.check_probe(training.config['probe'], measures=False)
    if mixture not in ('fixed', 'stratified') and len(training.active) < 2:
        raise BadInput(
            f"mixture = '{mixture}' weighs sources against each other, and there is only one.")
    if mixture in ('fixed', 'stratified'):
        if training.config['select'] == 'online':
            return reweight.Influence(training)
        return None
    if mixture == 'influence':
        return reweight.Influence(training)
    if training.config['select'] == 'online':
        raise BadInput(
            f"select = 'online' measures influence, which mixture = '{mixture}' does not. Use "
            "mixture = 'influence' or 'fixed', or select = 'scores'.")
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
