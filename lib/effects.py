"""Knobs that have no effect together with the others.

A knob that does nothing is most often a mistake: kd_alpha without a teacher, or a warm-up of the
mixture that is longer than the run. `check` returns a sentence for each, which train.py prints as a
warning. They are no errors, because config files of a study share knobs that one arm does not use.
"""
import math

from configurator import BadInput


def distils(config):
    return config['teacher'] is not None or config['kd_cache'] is not None


def measures_influence(config):
    return config['mixture'] == 'influence' or config['select'] == 'online'


def mixture_is(*methods):
    return lambda config: config['mixture'] in methods


# (knobs, whether they count: a function of the config, what makes them idle where they do not)
RULES = (
    (('sample_prompt',), lambda c: c['sample_tokens'] > 0, 'without sample_tokens'),
    (('eval_tasks_interval', 'eval_tasks_limit'), lambda c: c['eval_tasks'].strip() != '',
     'without eval_tasks'),
    (('plan_on', 'plan_mfu', 'plan_link', 'plan_price'), lambda c: c['dry_run'],
     'without dry_run'),
    (('wandb_project',), lambda c: c['wandb_mode'] != 'disabled',
     "with wandb_mode = 'disabled'"),
    (('keep_every',), lambda c: c['keep_last'] > 0, 'with keep_last = 0, which keeps all'),
    # data
    (('overlong',), lambda c: c['packing'] == 'document', "without packing = 'document'"),
    (('document_mask',), lambda c: c['packing'] == 'window',
     "with packing = 'document', where attention always stays within documents"),
    (('weigh_by',), lambda c: c['mixture'] not in ('stratified', 'doge', 'doremi'),
     "with mixture = '{mixture}', which draws all sources equally"),
    (('weigh_by',), lambda c: c['mixture'] not in ('natural', 'unimax', 'schedule'),
     "with mixture = '{mixture}', which has weights of its own"),
    # optimizer and schedule
    (('warmup_steps',), lambda c: c['warmup_frac'] is None, 'beside warmup_frac'),
    (('decay_frac',), lambda c: c['schedule'] == 'wsd', "without schedule = 'wsd'"),
    (('min_lr_frac',), lambda c: c['schedule'] != 'constant', "with schedule = 'constant'"),
    # network
    (('qk_norm_weight',), lambda c: c['qk_norm'], 'without qk_norm'),
    (('n_expert_active', 'n_shared_expert', 'expert_ffn_dim', 'n_dense_layer', 'expert_score',
      'balance_rate', 'balance_loss', 'ep'), lambda c: c['n_expert'] > 0, 'without n_expert'),
    (('ffn_dim',), lambda c: c['n_expert'] == 0 or c['n_dense_layer'] > 0,
     'with n_expert and n_dense_layer = 0, where no layer is dense'),
    # distillation
    (('kd_alpha', 'kd_temperature', 'kd_divergence'), distils, 'without teacher or kd_cache'),
    # mixture methods
    (('mixture_interval',),
     lambda c: measures_influence(c) or c['mixture'] in ('ado', 'skillit', 'aioli', 'doge'),
     "with mixture = '{mixture}' and select = '{select}'"),
    (('mixture_warmup',),
     lambda c: measures_influence(c) or c['mixture'] in ('ado', 'skillit', 'aioli'),
     "with mixture = '{mixture}' and select = '{select}'"),
    (('mixture_eta',), mixture_is('influence', 'skillit', 'aioli', 'doge', 'doremi'),
     "with mixture = '{mixture}'"),
    (('mixture_eta', 'influence_kl'),
     lambda c: c['mixture'] != 'influence' or c['influence_rule'] == 'step',
     "with influence_rule = 'proportional'"),
    (('mixture_rows',), mixture_is('skillit', 'aioli', 'doge'),
     'without mixture = skillit, aioli or doge'),
    (('max_epochs',), mixture_is('influence', 'skillit', 'aioli', 'ado', 'unimax', 'schedule'),
     "with mixture = '{mixture}', which has no limit"),
    (('mixture_schedule',), mixture_is('schedule'), "without mixture = 'schedule'"),
    (('mixture_min', 'mixture_max', 'influence_rule', 'influence_kl'), mixture_is('influence'),
     "without mixture = 'influence'"),
    (('probe_rows', 'influence_layers', 'influence_scaling', 'influence_units'),
     measures_influence, "without mixture = 'influence' or select = 'online'"),
    (('influence_rows',),
     lambda c: c['mixture'] == 'influence' or c['influence_scaling'] == 'datainf',
     "without mixture = 'influence'"),
    (('skillit_graph', 'skillit_window'), mixture_is('skillit'), "without mixture = 'skillit'"),
    (('aioli_sweeps', 'aioli_steps', 'one_hot_factor', 'aioli_rule', 'aioli_ema', 'aioli_matrix'),
     mixture_is('aioli'), "without mixture = 'aioli'"),
    (('doremi_reference', 'doremi_clip', 'doremi_smoothing'), mixture_is('doremi'),
     "without mixture = 'doremi'"),
    # rows and micro-batches
    (('select_scores',), lambda c: c['select'] == 'scores', "without select = 'scores'"),
    (('select_margin', 'select_keep'), lambda c: c['select'] != 'none',
     "with select = 'none'"),
    (('presence_tau', 'presence_schedule', 'presence_layers', 'presence_sum', 'presence_permute',
      'presence_by_source'),
     lambda c: c['presence'] != 'off',
     "with presence = 'off'"),
    (('presence_switch',),
     lambda c: c['presence'] != 'off' and c['presence_schedule'] == 'two_stage',
     "without presence and presence_schedule = 'two_stage'"))


def idle_knobs(config, defaults):
    """A sentence for every group of knobs that differ from their defaults and have no effect."""
    sentences = []
    for names, counts, reason in RULES:
        changed = [name for name in names if config[name] != defaults[name]]
        if changed and not counts(config):
            shown = ', '.join(f'{name} = {config[name]!r}' for name in changed)
            verb = 'has' if len(changed) == 1 else 'have'
            sentences.append(f'{shown} {verb} no effect {reason.format(**config)}.')
    return sentences


def first_measurement(config, n_steps, n_warmup):
    """The first step at which a mixture method measures, None if the run has no such step."""
    interval = config['mixture_interval']
    first = config['mixture_warmup']
    if first is None:
        first = max(n_warmup, n_steps // 20)
    if config['mixture'] == 'aioli':
        n_sources = sum(weight > 0 for weight in config['sources'].values())
        explored = config['aioli_sweeps'] * config['aioli_steps'] * n_sources
        step = -(-first // interval) * interval
        return step if step + explored < n_steps else None
    if config['mixture'] == 'ado':
        first += interval // 2
    step = -(-max(1, first) // interval) * interval
    return step if step < n_steps else None


def check_names(config, defaults):
    """Raises BadInput for '' where a name or None is expected."""
    # An empty value on a command line is most often a shell variable that is not set.
    for name, value in config.items():
        if value == '' and defaults[name] is None:
            raise BadInput(f"{name} = '' names nothing. Leave it out, or write --{name}=None.")


def check(config, defaults, n_steps, n_warmup):
    """Sentences about knobs that were changed and have no effect in this run: list of str.

    config, defaults  train.py's knobs and their defaults, name -> value. In config, a method's
                      published settings stand in place of None (methods.as_published)
    n_steps           optimizer steps of the run; n_warmup: those of the learning-rate warm-up
    Raises BadInput for settings with which nothing sensible can be meant.
    """
    if config['init_from'] is not None and config['continue_from'] is not None:
        raise BadInput(
            f"init_from = '{config['init_from']}' and continue_from = '{config['continue_from']}' "
            'exclude each other: weights alone, or the full state of a run. Set one of them.')
    sentences = idle_knobs(config, defaults)
    if n_warmup >= n_steps:
        sentences.append(
            f'the warm-up takes {n_warmup} steps and the run has {n_steps}, so the learning rate '
            f"ends at {config['learning_rate'] * n_steps / max(1, n_warmup):.3g} and never falls. "
            'Lower warmup_steps or warmup_frac.')
    if config['learning_rate'] == 0:
        sentences.append('learning_rate = 0 trains nothing.')
    if config['stop_step'] is not None and config['stop_step'] > n_steps:
        sentences.append(
            f"stop_step = {config['stop_step']} has no effect: the run has {n_steps} steps.")
    kept = math.lcm(config['keep_every'], config['save_interval'])
    if config['keep_every'] and config['keep_last'] and kept > n_steps:
        sentences.append(
            f"keep_every = {config['keep_every']} keeps no checkpoint: with save_interval = "
            f"{config['save_interval']} the first one that it divides is at step {kept}, and the "
            f'run has {n_steps}.')
    if distils(config) and config['kd_alpha'] == 0:
        sentences.append(
            'kd_alpha = 0: the teacher teaches nothing, its loss is only measured and logged.')
    return sentences + method_warnings(config, n_steps, n_warmup)


def method_warnings(config, n_steps, n_warmup):
    """As `check`, about methods that do nothing in so short a run, or with such numbers."""
    sentences = []
    mixture = config['mixture']
    measures = measures_influence(config) or mixture in ('ado', 'skillit', 'aioli')
    if measures and first_measurement(config, n_steps, n_warmup) is None:
        asked = f"mixture = '{mixture}'"
        if config['select'] == 'online':
            asked = "select = 'online'" if mixture == 'fixed' else f"{asked}, select = 'online'"
        what = 'NEVER measures in this run, so it changes nothing'
        if mixture == 'skillit':
            what = 'NEVER measures in this run: its weights are those of the graph alone'
        warmup = config['mixture_warmup']
        if warmup is None:
            warmup = f'None (here {max(n_warmup, n_steps // 20)})'
        sentences.append(
            f'{asked} {what}: mixture_interval = {config["mixture_interval"]} and mixture_warmup = '
            f'{warmup} leave no update within {n_steps} steps. Lower them, or train for longer.')
    has_eta = mixture_is('influence', 'skillit', 'aioli', 'doge', 'doremi')
    if config['mixture_eta'] == 0 and has_eta(config):
        sentences.append(f"mixture_eta = 0: mixture = '{mixture}' measures and moves no weight.")
    # See baselines.LAST: DoGE measures its matrix in the last five steps of a round.
    if mixture == 'doge' and n_steps < config['mixture_interval'] - 4:
        sentences.append(
            f'doge logs no matrix A: it is measured at the end of mixture_interval = '
            f"{config['mixture_interval']} steps, and the run has {n_steps}.")
    if config['presence'] != 'off':
        switch = config['presence_switch']
        if config['presence_tau'] == 0:
            sentences.append(
                f"presence_tau = 0: presence = '{config['presence']}' weighs all micro-batches "
                'equally.')
        if config['presence_schedule'] == 'two_stage' and switch is not None and switch >= n_steps:
            sentences.append(
                f'presence_switch = {switch} is never reached: the run has {n_steps} steps.')
    return sentences
