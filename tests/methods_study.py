"""Which method gives the best mixture, and at what cost? For the tables of docs/RESULTS.md.

    python tests/methods_study.py --text=folder     # about two hours of two cores

All methods run on two and on three sources of real text. `folder` holds train/, val/ and probes/.
Finished runs are kept. The model is that of config/study/base.py.

- Methods only see the text of train/ and val/. The reported loss is on the text of probes/, which
  enters as sources <name>_test of weight 0.
- train.py refuses a probe set that a source contains. The probe sets of influence are made of
  val/, so that method reads sources without this text.
- Every method starts from equal weights and has its published setting, scaled to the length of the
  run (`settings`). `natural` has the shares of the sources' sizes, `stratified` equal ones.
  `aioli_random` is a control that explores as Aioli does and learns nothing.
- Methods that take several runs learn their mixture again for every seed. dml, olmix and regmix
  fit the same runs.
- Tuning: every method with a step size is trained with `factors` times its default on another
  seed. The lowest loss on the text of val/ decides. The test text has no part in it.
- With two or three large sources unimax is the same as stratified. A last set cuts math to a few
  rows, which equal shares would repeat more often than unimax allows.
- Every method is compared with stratified. Intervals are of one comparison alone, and the p values
  have Holm's correction over all comparisons of all sets.
"""
import math
import os
import runpy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

if __name__ == '__main__':
    import _path  # noqa: F401

from configurator import BadInput, at_least, between, configure, read_json
from methods import rules
from tests.studies import (
    print_header,
    print_row,
    read_arms,
    run,
    tell,
    train_arms,
    write_config,
    write_summary,
)
from tools.report import difference, holm, mean_and_range, p_text, paired, paired_p, weights_of
from tools.runs import flops_of
from tools.sweep import TREE_RUNS

# -- knobs --
text = ''                           # folder with train/*.jsonl.gz, val/ and probes/
out = 'out/methods_study'           # prepared data, runs and tables
seeds = [0, 1, 2]                   # of initial weights and data order
m = [2, 3]                          # numbers of sources
arms: list[str] = []                # of the methods in METHODS. []: all. stratified always runs
mixtures: between(1, 1000) = 9      # runs that dml and olmix fit their law to, as published
                                    # (arXiv:2411.05735). From 20 on, regmix is fitted to them too
tune = [2, 3]                       # numbers of sources for which step sizes are tuned
factors = [1 / 3, 1.0, 3.0]         # of the default step size
tuning_seed = 100                   # none of `seeds`
small_rows: at_least(0) = 400       # rows of math in the set with a small source. 0: no such set
steps: at_least(40) = 400           # of every run
overrides: dict = {}                # more knobs of train.py for all runs, such as
                                    # {'eval_rows': 16}
jobs = 2                            # runs at the same time, of one thread each

SOURCES = {'code': 'code', 'math': 'math', 'web_edu': 'web'}    # source -> name of its probe set
SMALL = 'math'                                                  # the source that is cut
METHODS = (
    'stratified', 'natural', 'influence', 'skillit', 'doge', 'doremi', 'aioli', 'aioli_random',
    'ado', 'dml', 'olmix', 'regmix')
BY_LAW = ('dml', 'olmix', 'regmix')                             # fitted to the same runs
PHASED = ('skillit', 'doge', 'doremi', *BY_LAW)                 # methods that take several runs
PROXIES = ('doge', 'doremi')                                    # whose step size is the proxy's
TUNED = ('influence', 'skillit', 'doge', 'doremi', 'aioli')     # methods with a step size


def settings(n_steps):
    """Knobs of every method that differ from the defaults: dict method -> knobs.

    The defaults are published settings. What depends on the length of a run is scaled to n_steps:

    skillit     an update every tenth of the run, as published
    aioli       published are 20 rounds, each with 4 sweeps of 4 to 6 steps over the mixtures. So
                short a run has no room for them: 4 rounds keep the 4 sweeps and the explored share
                of a round (0.13 of it with two sources, 0.29 with three). The first round begins
                with the run, as published
    ado         published: the first 60th of the run is left out, then a law every 60th. A law needs
                8 losses after the warm-up of the learning rate, so it is every 20th here
    influence   no published setting for a run of this length. As in config/study/influence, the
                weights may move after an eighth of the run, 14 times
    """
    aioli = dict(mixture='aioli', mixture_interval=n_steps // 4, mixture_warmup=0)
    return {
        'stratified': dict(mixture='stratified'),
        'natural': dict(mixture='natural'),
        'influence': dict(
            mixture='influence', mixture_interval=n_steps // 16, mixture_warmup=n_steps // 8,
            probe_rows=64, influence_rows=32),
        'skillit': dict(mixture_interval=n_steps // 10, mixture_warmup=n_steps // 10),
        # These two change their weights at every step. The interval is that of the log.
        'doge': dict(mixture_interval=n_steps // 4),
        'doremi': dict(mixture_interval=n_steps // 4),
        'aioli': aioli,
        'aioli_random': dict(aioli, aioli_matrix='random'),
        'ado': dict(mixture='ado', mixture_interval=n_steps // 20),
        'unimax': dict(mixture='unimax'),
        **dict.fromkeys(BY_LAW, {}),
    }


# -- data ------------------------------------------------------------------------------------------


def prepare(text, folder, *options, **places):
    """Makes sources and probe sets in `folder` from links that give every text its place.

    places  split -> text, where {n} is the source and {d} its probe set. A split that ends in _test
            belongs to the source <name>_test.
    """
    for name, domain in SOURCES.items():
        for place, origin in places.items():
            split, _, test = place.partition('_')
            file = f'{name}_test.jsonl.gz' if test else f'{name}.jsonl.gz'
            path = os.path.join(f'{folder}_text', split, file)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if not os.path.islink(path):
                origin = origin.format(n=name, d=domain)
                os.symlink(os.path.join(text, f'{origin}.jsonl.gz'), path)
    run('prepare/folder.py', f'--input={folder}_text', f'--out={folder}', *options)


def prepare_all(text, data):
    """The sources in `data`, and those of influence, which has val/ as probe sets."""
    prepare(
        text, data, train='train/{n}', val='val/{n}', train_test='val/{n}', val_test='probes/{d}')
    prepare(
        text, f'{data}_influence', f'--tokenizer={data}/code', train='train/{n}', val='probes/{d}',
        train_test='train/{n}', val_test='probes/{d}', probes='val/{n}')


# -- runs ------------------------------------------------------------------------------------------


@dataclass
class Setup:
    """What the runs of one set of sources share."""
    names: list             # of the sources
    folder: str
    data: str               # folder of prepared data
    files: list             # config files of all runs
    settings: dict          # method -> knobs
    mixtures: int           # runs that laws are fitted to
    jobs: int

    @property
    def equal(self):
        return dict.fromkeys(self.names, 1.0)

    @property
    def test(self):
        return {f'{name}_test': 0.0 for name in self.names}


def with_factor(method, factor):
    """'doge_x3': a method with three times its default step size. 'doge' with the default."""
    return method if factor == 1 else f'{method}_x{factor:.2g}'


def default_eta(setup, method):
    return rules.eta_of(dict(mixture=method, mixture_eta=None, sources=setup.equal))


def eta_knobs(setup, method, factor):
    """The knob of a step size of `factor` times the default. {}: the default itself"""
    return {} if factor == 1 else dict(mixture_eta=default_eta(setup, method) * factor)


def learn(setup, phase, seed, factor):
    """Runs the phases of a method. Returns dict method -> (knobs that it has learned, cost).

    phase   a method of PHASED, or 'law' for those of BY_LAW in settings
    cost    in runs without any measurement
    """
    methods = [phase]
    name = with_factor(phase, factor)
    if phase == 'law':
        methods = [method for method in BY_LAW if method in setup.settings]
        name = f'law{setup.mixtures}'
    phases = os.path.join(setup.folder, 'phases', f'{name}_seed{seed}')
    learned = {}
    for method in methods:
        kept = {}           # what sweep.py writes -> where it stays, because laws share a folder
        for file in ('mixture.py', 'cost.json'):
            kept[file] = os.path.join(phases, f'{method}_{file}')
        if not os.path.isfile(kept['cost.json']):
            knobs = dict(setup.settings[method])
            if method in PROXIES:
                knobs |= eta_knobs(setup, method, factor)
            options = [f'--seed={seed}', f'--seeds=[{seed}]', f'--n={setup.mixtures}', '--jobs=1']
            options += ['--threads=1', f'--method={method}', f'--out={phases}']
            options += [f'--{key}={value}' for key, value in knobs.items()]
            run('tools/sweep.py', 'method', *options, *setup.files, log=f'{phases}.log')
            for file, place in kept.items():
                os.replace(os.path.join(phases, file), place)
        # The phases end with a config file of train.py, which is Python.
        found = runpy.run_path(kept['mixture.py'])
        knobs = {key: value for key, value in found.items() if not key.startswith('_')}
        learned[method] = knobs, read_json(kept['cost.json'])['share_of_this_run']
    return learned


def learn_all(setup, seeds, factors):
    """Runs the phases of all methods of the setup, several at the same time.

    factors     method -> factors of its step size
    Returns dict (method, factor, seed) -> what `learn` has for the method.
    """
    tasks = []
    for seed in seeds:
        for method in setup.settings:
            if method in PROXIES:
                tasks += [(method, seed, factor) for factor in factors.get(method, [1.0])]
            elif method == 'skillit':
                # Its graph does not depend on the step size.
                tasks.append((method, seed, 1.0))
        if set(BY_LAW) & set(setup.settings):
            tasks.append(('law', seed, 1.0))
    learned = {}
    with ThreadPoolExecutor(setup.jobs) as pool:
        results = pool.map(lambda task: learn(setup, *task), tasks)
        for (_, seed, factor), found in zip(tasks, results, strict=True):
            for method, result in found.items():
                learned[method, factor, seed] = result
    return learned


def arm_knobs(setup, method, factor, learned):
    """Knobs of train.py for a run of the method. learned: the knobs of its phases, {} without"""
    knobs = {**setup.settings[method], **learned}
    knobs['sources'] = {**setup.test, **knobs.get('sources', setup.equal)}
    if method == 'influence':
        knobs.update(probe=setup.equal, data_dir=f'{setup.data}_influence')
    if method not in PROXIES:
        own = 'aioli' if method == 'aioli_random' else method
        knobs.update(eta_knobs(setup, own, factor))
    return knobs


def phases_of(learned, method, factor, seed):
    """(knobs, cost) of a method's phases, ({}, 0) for a method of one run."""
    return learned.get((method, factor if method in PROXIES else 1.0, seed), ({}, 0.0))


def own_cost(entry):
    """FLOPs of a run, in runs without any measurement."""
    trained, extra = flops_of(entry.config, entry.tokens, entry.records)
    return 1 + extra / trained


def mean_loss(entry, names, kind):
    """Mean loss of the sources. kind: 'val' or 'test' text"""
    if kind == 'test':
        keys = [f'val/loss_{name}_test' for name in names]
    elif entry.config['mixture'] == 'influence':
        # The probe sets of this method are made of val/, and its sources do not hold that text.
        keys = [f'probe/loss_{name}' for name in names]
    else:
        keys = [f'val/loss_{name}' for name in names]
    return float(np.mean([entry.final[key] for key in keys]))


def tune_steps(setup, factors, seed):
    """Trains every method with every step size. Returns (dict method -> best factor, costs).

    The best has the lowest mean loss on val/. costs: dict method -> runs that its tuning took
    """
    tuned = {method: knobs for method, knobs in setup.settings.items() if method in TUNED}
    setup = replace(setup, settings=tuned)
    learned = learn_all(setup, [seed], dict.fromkeys(tuned, factors))
    arms = {}
    for method in tuned:
        for factor in factors:
            knobs, _ = phases_of(learned, method, factor, seed)
            arms[with_factor(method, factor)] = arm_knobs(setup, method, factor, knobs)
    place = os.path.join(setup.folder, 'tuning')
    train_arms(place, arms, [seed], setup.jobs, *setup.files)
    entries = read_arms(place, arms, [seed])
    best = {}
    costs = {}
    # Those of influence are on other rows of this text than those of the others.
    tell(f'\nStep sizes, {len(setup.names)} sources: mean loss on the text of val/, seed {seed}')
    print_header('method', 'default', *(f'x {factor:.2g}' for factor in factors), 'chosen')
    for method in tuned:
        of_method = [entries[with_factor(method, factor), seed] for factor in factors]
        losses = [mean_loss(entry, setup.names, 'val') for entry in of_method]
        # Where the weights did not move, all losses are equal, and the default stays.
        order = [(loss, abs(math.log(x)), x) for loss, x in zip(losses, factors, strict=True)]
        best[method] = min(order)[2]
        costs[method] = sum(own_cost(entry) for entry in of_method)
        # Phases that the step sizes share are in `learned` once.
        costs[method] += sum(cost for key, (_, cost) in learned.items() if key[0] == method)
        cells = [f'{loss:.4f}' for loss in losses]
        print_row(method, f'{default_eta(setup, method):g}', *cells, f'x {best[method]:.2g}')
    return best, costs


# -- tables ----------------------------------------------------------------------------------------


@dataclass
class Result:
    """The runs of one set of sources."""
    title: str
    names: list             # sources that the mean is over
    methods: list           # the first is the baseline
    entries: dict           # (method, seed) -> run
    costs: dict             # (method, seed) -> runs that the method takes
    tuning: dict            # method -> runs that its tuning took

    def perplexity(self, entry):
        return float(np.exp(mean_loss(entry, self.names, 'test')))

    def p_values(self):
        """p of every method but the baseline."""
        runs = list(self.entries.values())
        base = self.methods[0]
        return [paired_p(runs, method, base, self.perplexity) for method in self.methods[1:]]


def study(title, setup, seeds, best, tuning):
    """Trains all methods of the setup with the chosen factors of their step sizes: a Result."""
    learned = learn_all(setup, seeds, {method: [factor] for method, factor in best.items()})
    for seed in seeds:
        arms = {}
        for method in setup.settings:
            knobs, _ = phases_of(learned, method, best[method], seed)
            arms[method] = arm_knobs(setup, method, best[method], knobs)
        train_arms(setup.folder, arms, [seed], setup.jobs, *setup.files)
    entries = read_arms(setup.folder, setup.settings, seeds)
    costs = {}
    for (method, seed), entry in entries.items():
        _, before = phases_of(learned, method, best[method], seed)
        costs[method, seed] = before + own_cost(entry)
    return Result(title, setup.names, list(setup.settings), entries, costs, tuning)


def print_result(result, seeds, p, corrected):
    """A Markdown table. p, corrected: of all methods but the baseline"""
    base = result.methods[0]
    names = result.names
    tell(f'\n{result.title}')
    columns = ['method', 'test perplexity (seeds)', f'against {base} (95 %)', 'p', 'p (Holm)']
    columns += ['wins', f'loss of {names[0]}', *names[1:], f'weights {", ".join(names)}']
    print_header(*columns, 'cost, runs', 'tuning, runs')
    runs = list(result.entries.values())
    for i, method in enumerate(result.methods):
        local = [result.entries[method, seed] for seed in seeds]
        compared = [''] * 4
        if method != base:
            found = paired(runs, method, base, result.perplexity)
            won = 0
            for entry in local:
                rival = result.entries[base, entry.seed]
                won += result.perplexity(entry) < result.perplexity(rival)
            compared = [
                difference(found, 2), p_text(p[i - 1]), p_text(corrected[i - 1]),
                f'{won} of {len(seeds)}']
        losses = []
        weights = []
        for name in names:
            losses.append(mean_and_range([e.final[f'val/loss_{name}_test'] for e in local], 3))
            weights.append(mean_and_range([weights_of(e)[-1][name] for e in local], 2))
        perplexities = mean_and_range([result.perplexity(e) for e in local], 2)
        cost = np.mean([result.costs[method, seed] for seed in seeds])
        tuned = f'{result.tuning[method]:.2f}' if method in result.tuning else ''
        print_row(
            method, perplexities, *compared, *losses, ', '.join(weights), f'{cost:.2f}', tuned)


def print_results(results, seeds):
    """The tables of all sets, whose comparisons are corrected together."""
    p = [result.p_values() for result in results]
    corrected = holm([value for of_set in p for value in of_set])
    n_all = len(corrected)
    clear = sum(value is not None and value < 0.05 for value in corrected)
    for result, of_set in zip(results, p, strict=True):
        print_result(result, seeds, of_set, corrected[:len(of_set)])
        corrected = corrected[len(of_set):]
    print(
        f"\n{n_all} comparisons with {METHODS[0]}. By Holm's correction, {clear} of them have a p "
        f'below 0.05.')


def make_setup(folder, data, names, chosen, common, mixtures, jobs):
    """A Setup for the sources `names`. chosen: method -> knobs; common: knobs of all runs"""
    test = {f'{name}_test': 0.0 for name in names}
    common = dict(common, data_dir=data, sources={**dict.fromkeys(names, 1.0), **test})
    files = ['config/study/base.py', write_config(os.path.join(folder, 'common.py'), common)]
    return Setup(names, folder, data, files, chosen, mixtures, jobs)


if __name__ == '__main__':
    configure(globals(), verbose=False)
    if not text:
        raise BadInput('--text is missing.')
    unknown = [name for name in arms if name not in METHODS]
    if unknown:
        raise BadInput(f"arms: '{unknown[0]}' is none of the methods {', '.join(METHODS)}.")
    if tuning_seed in seeds:
        raise BadInput(
            f'tuning_seed = {tuning_seed} is one of seeds = {seeds}. Step sizes would be chosen on '
            'a run that is reported. Take another one.')
    if 1.0 not in factors:
        raise BadInput(f'factors = {factors} must have 1.0 among them, the default step size.')
    methods = [name for name in METHODS if not arms or name in arms or name == METHODS[0]]
    if mixtures < TREE_RUNS and 'regmix' in methods:
        methods.remove('regmix')
        tell(f'regmix is left out: it takes {TREE_RUNS} runs, and mixtures = {mixtures}.')
    out = os.path.abspath(out)
    data = os.path.join(out, 'data')
    prepare_all(os.path.abspath(text), data)
    knobs = settings(steps)
    common = {'max_steps': steps, 'mixture_rows': 96, 'max_epochs': None, **overrides}
    results = []
    for n_sources in m:
        setup = make_setup(
            os.path.join(out, f'm{n_sources}'), data, list(SOURCES)[:n_sources],
            {method: knobs[method] for method in methods}, common, mixtures, jobs)
        best = dict.fromkeys(METHODS, 1.0)
        tuning = {}
        if n_sources in tune:
            found, tuning = tune_steps(setup, factors, tuning_seed)
            best |= found
        # The control explores as the method does.
        best['aioli_random'] = best['aioli']
        results.append(study(f'{n_sources} sources', setup, seeds, best, tuning))
    if small_rows:
        common |= dict(source_rows={SMALL: small_rows}, max_epochs=4.0)
        setup = make_setup(
            os.path.join(out, 'small'), data, list(SOURCES),
            {method: knobs[method] for method in ('stratified', 'natural', 'unimax')}, common,
            mixtures, jobs)
        best = dict.fromkeys(setup.settings, 1.0)
        title = f'{len(SOURCES)} sources, {SMALL} cut to {small_rows} rows'
        results.append(study(title, setup, seeds, best, {}))
    print_results(results, seeds)
    write_summary(out)
