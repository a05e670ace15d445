"""Every knob without an effect is named, and the shipped configs of training stages have none."""
import ast
import re

import pytest

import methods
from configurator import BadInput, configure_script
from lib import effects
from lib.schedule import count_steps
from tests.conftest import ROOT

RUN = dict(max_steps=100, warmup_steps=5, sources={'a': 1.0, 'b': 1.0})


@pytest.fixture(scope='module')
def defaults():
    return configure_script(str(ROOT / 'train.py'), [])


def warnings_of(arguments, defaults):
    """What `check` says of a run with arguments like --key=value."""
    # Without `configure`, which would read all files for every case.
    config = {**defaults, **RUN}
    for argument in arguments:
        name, _, text = argument[2:].partition('=')
        try:
            config[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            config[name] = text
    return warnings_of_config(config, defaults)


def warnings_of_config(config, defaults):
    n_steps = count_steps(config, 20_000_000)
    n_warmup = config['warmup_steps']
    if config['warmup_frac'] is not None:
        n_warmup = round(config['warmup_frac'] * n_steps)
    return effects.check(methods.as_published(config), defaults, n_steps, n_warmup)


EXPERTS = ['--n_expert=4', '--n_expert_active=2', '--expert_ffn_dim=8']
INFLUENCE = ['--mixture=influence', '--mixture_interval=10', "--probe={'m': 1.0}"]


@pytest.mark.parametrize('arguments, words', [
    (['--kd_alpha=0.5'], 'kd_alpha = 0.5 has no effect without teacher or kd_cache'),
    (['--kd_temperature=2', '--kd_divergence=js'], 'have no effect without teacher'),
    (['--teacher=t', '--kd_alpha=0'], 'the teacher teaches nothing'),
    (['--n_expert_active=2'], 'n_expert_active = 2 has no effect without n_expert'),
    (['--balance_rate=0.1'], 'without n_expert'),
    ([*EXPERTS, '--ffn_dim=99'], 'ffn_dim = 99 has no effect with n_expert and n_dense_layer = 0'),
    (['--qk_norm_weight=False'], 'without qk_norm'),
    (['--warmup_frac=0.1'], 'warmup_steps = 5 has no effect beside warmup_frac'),
    (['--warmup_steps=100'], 'the warm-up takes 100 steps and the run has 100'),
    (['--warmup_steps=2000', '--warmup_frac=1.0'], 'the warm-up takes 100 steps'),
    (['--decay_frac=0.5'], "without schedule = 'wsd'"),
    (['--schedule=constant', '--min_lr_frac=0.5'], "with schedule = 'constant'"),
    (['--learning_rate=0'], 'learning_rate = 0 trains nothing'),
    (['--stop_step=101'], 'stop_step = 101 has no effect: the run has 100 steps'),
    (['--overlong=drop'], "without packing = 'document'"),
    (['--packing=document', '--document_mask=True'], "with packing = 'document'"),
    (['--mixture=stratified', '--weigh_by=size'], 'which draws all sources equally'),
    (['--eval_tasks_limit=5'], 'without eval_tasks'),
    (['--sample_prompt=x'], 'without sample_tokens'),
    (['--plan_price=3'], 'without dry_run'),
    (['--wandb_project=x'], "with wandb_mode = 'disabled'"),
    (['--keep_every=3', '--keep_last=0'], 'which keeps all'),
    (['--keep_every=7', '--save_interval=50'], 'is at step 350, and the run has 100'),
    (['--mixture_interval=10'], "with mixture = 'fixed' and select = 'none'"),
    (['--mixture=doremi', '--mixture_warmup=3'], "mixture_warmup = 3 has no effect with mixture ="),
    (['--mixture_eta=0.5'], "mixture_eta = 0.5 has no effect with mixture = 'fixed'"),
    ([*INFLUENCE, '--influence_rule=proportional', '--mixture_eta=1'], 'proportional'),
    ([*INFLUENCE, '--mixture_eta=0'], 'measures and moves no weight'),
    ([*INFLUENCE, '--mixture_interval=100'], 'NEVER measures in this run'),
    ([*INFLUENCE, '--mixture_warmup=91'], 'mixture_warmup = 91 leave no update within 100 steps'),
    ([*INFLUENCE, '--warmup_steps=95'], 'mixture_warmup = None \\(here 95\\)'),
    (['--select=online', '--mixture_interval=100'], "select = 'online' NEVER measures"),
    (['--mixture=skillit', '--mixture_interval=100'], 'its weights are those of the graph alone'),
    (['--mixture=aioli', '--mixture_interval=40', '--mixture_warmup=50', '--aioli_steps=4',
      '--aioli_sweeps=4'], 'NEVER measures'),
    (['--mixture=ado', '--mixture_interval=60', '--mixture_warmup=31'], 'NEVER measures'),
    (['--mixture=natural', '--weigh_by=size'], 'which has weights of its own'),
    (['--mixture=natural', '--max_epochs=2'], 'max_epochs = 2 has no effect'),
    (['--mixture_schedule=s'], "without mixture = 'schedule'"),
    (['--mixture=doge', '--mixture_interval=200'], 'doge logs no matrix A'),
    (['--mixture_rows=8'], 'without mixture = skillit, aioli or doge'),
    (['--mixture=doremi', '--max_epochs=2'], 'max_epochs = 2 has no effect'),
    (['--mixture_min=0.1', '--mixture=aioli', '--mixture_interval=40'], 'mixture_min = 0.1 has no'),
    (["--probe={'m': 1.0}", '--probe_rows=8'], 'probe_rows = 8 has no effect'),
    (['--select=online', '--mixture_interval=9', '--influence_rows=8'], 'influence_rows = 8 has'),
    (['--skillit_graph=g.json'], "without mixture = 'skillit'"),
    (['--aioli_steps=2'], "without mixture = 'aioli'"),
    (['--doremi_clip=group'], "without mixture = 'doremi'"),
    (['--select_scores=s'], "without select = 'scores'"),
    (['--select_keep=0.5'], "with select = 'none'"),
    (['--presence_tau=2'], "with presence = 'off'"),
    (['--presence=store', '--presence_switch=5'], "presence_schedule = 'two_stage'"),
    (['--presence=store', '--presence_tau=0'], 'weighs all micro-batches equally'),
    (['--presence=store', '--presence_schedule=two_stage', '--presence_switch=100'],
     'is never reached'),
])
def test_a_knob_without_effect_is_named(defaults, arguments, words):
    found = warnings_of(arguments, defaults)
    assert len(found) == 1 and re.search(words, found[0]), found


@pytest.mark.parametrize('arguments', [
    ['--teacher=t', '--kd_cache=c', '--kd_alpha=0.5'], [*EXPERTS, '--balance_loss=0'],
    ["--probe={'m': 1.0}"], [*INFLUENCE, '--mixture_eta=1', '--max_epochs=None', '--probe_rows=8'],
    ['--mixture=skillit', '--mixture_interval=10', '--mixture_rows=8', '--skillit_graph=g'],
    ['--mixture=aioli', '--mixture_interval=40', '--mixture_warmup=0', '--one_hot_factor=0.6'],
    ['--mixture=ado', '--mixture_interval=60', '--mixture_warmup=30', '--max_epochs=1'],
    ['--mixture=unimax', '--max_epochs=1'], ['--mixture=schedule', '--mixture_schedule=s'],
    ['--mixture=doge', '--mixture_interval=20'], ['--stop_step=100'], ['--keep_every=50'],
    ['--select=scores', '--select_keep=0.5'], ['--warmup_steps=99'],
    ['--select=online', '--mixture_interval=9', '--influence_scaling=datainf',
     '--influence_rows=8'],
    ['--presence=stream', '--presence_schedule=two_stage', '--presence_switch=99'],
    ['--schedule=wsd', '--decay_frac=0.5'], ['--resume=True', '--continue_from=x'],
])
def test_knobs_with_an_effect_are_not_named(defaults, arguments):
    arguments = ['--save_interval=50', *arguments]
    assert warnings_of(arguments, defaults) == []


def test_two_beginnings_exclude_each_other(defaults):
    words = "init_from = 'a' and continue_from = 'b' exclude"
    with pytest.raises(BadInput, match=words):
        warnings_of(['--init_from=a', '--continue_from=b'], defaults)


@pytest.mark.parametrize('name', ['teacher', 'kd_cache', 'init_from', 'prepare'])
def test_an_empty_name_is_an_error(defaults, name):
    effects.check_names(defaults, defaults)
    with pytest.raises(BadInput, match=f"{name} = '' names nothing"):
        effects.check_names({**defaults, name: ''}, defaults)


def test_every_rule_is_about_knobs_that_exist(defaults):
    for names, counts, _ in effects.RULES:
        assert set(names) <= set(defaults), names
        counts(defaults)


@pytest.mark.parametrize('stage', ['1', '2', '3', '3b', '4', '5'])
def test_the_shipped_stages_have_no_idle_knob(defaults, stage):
    model = 'config/model/mobilellm_140m.py'
    config = configure_script(str(ROOT / 'train.py'), [model, f'config/stage{stage}.py'])
    assert warnings_of_config(config, defaults) == []
