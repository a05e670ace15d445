"""Which method gives the best mixture, and at what cost? For the tables of docs/RESULTS.md.

    python tests/methods_study.py --text=folder     # about two hours of two cores

All methods run on two and on three sources of real text. `folder` holds train/, val/ and probes/.
Finished runs are kept. Model and steps are those of config/study/base.py.

- Methods only see the text of train/ and val/. The reported loss is on the text of probes/, which
  enters as sources <name>_test of weight 0.
- train.py refuses a probe set that a source contains. The probe sets of influence are made of
  val/, so that method reads sources without this text.
- Every method starts from equal weights. `fixed` has the shares of the sources' sizes, and
  `stratified` has equal shares.
- Methods that take several runs learn their mixture again for every seed.
"""
import os
import runpy

import numpy as np

if __name__ == '__main__':
    import _path  # noqa: F401

from configurator import BadInput, configure, read_json
from tests.studies import print_header, print_row, read_arms, run, train_arms, write_config
from tools.report import difference, mean_and_range, paired, weights_of
from tools.runs import flops_of

# -- knobs --
text = ''                           # folder with train/*.jsonl.gz, val/ and probes/
out = 'out/methods_study'           # prepared data, runs and tables
seeds = [0, 1, 2]                   # of initial weights and data order
m = [2, 3]                          # numbers of sources
jobs = 2                            # runs at the same time, of one thread each

SOURCES = {'code': 'code', 'math': 'math', 'web_edu': 'web'}    # source -> name of its probe set
METHODS = ('stratified', 'fixed', 'influence', 'skillit', 'doge', 'doremi', 'aioli', 'dml')
PHASED = ('skillit', 'doge', 'doremi', 'dml')                   # methods that take several runs
# The same rounds for all methods.
ROUNDS = dict(
    mixture_interval=100, mixture_warmup=100, mixture_rows=96, max_epochs=None, probe_rows=64,
    influence_rows=32)


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


def n_train_tokens(folder):
    shards = read_json(os.path.join(folder, 'meta.json'))['shards']
    return sum(shard['tokens'] for shard in shards if shard['split'] == 'train')


def learn(method, seed, folder, jobs, files):
    """Runs the phases of a method and returns the knobs that it has learned."""
    phases = os.path.join(folder, 'phases', f'{method}_seed{seed}')
    if not os.path.isfile(os.path.join(phases, 'cost.json')):
        options = [f'--seed={seed}', f'--seeds=[{seed}]', f'--jobs={jobs}', '--threads=1']
        options += [f'--method={method}', f'--out={phases}']
        run('tools/sweep.py', 'method', *options, *files)
    # The phases end with a config file of train.py, which is Python.
    found = runpy.run_path(os.path.join(phases, 'mixture.py'))
    return {name: value for name, value in found.items() if not name.startswith('_')}


def study(names, folder, data, seeds, jobs):
    """Trains all methods on the sources `names`, in folder/runs."""
    test = {f'{name}_test': 0.0 for name in names}
    equal = dict.fromkeys(names, 1.0)
    common = dict(data_dir=data, sources={**equal, **test}, **ROUNDS)
    files = ['config/study/base.py', write_config(os.path.join(folder, 'common.py'), common)]
    sizes = {name: n_train_tokens(os.path.join(data, name)) for name in names}
    shares = {name: n / sum(sizes.values()) for name, n in sizes.items()}
    arms = {
        'stratified': {},
        'fixed': dict(sources={**shares, **test}),
        'influence': dict(mixture='influence', probe=equal, data_dir=f'{data}_influence'),
        'aioli': dict(mixture='aioli'),
    }
    # With its learned mixture, a method of several runs is an arm like the others.
    learned = {}
    for method in PHASED:
        for seed in seeds:
            learned[method, seed] = learn(method, seed, folder, jobs, files)
    for seed in seeds:
        for method in PHASED:
            knobs = learned[method, seed]
            arms[method] = {**knobs, 'sources': {**test, **knobs.get('sources', equal)}}
        train_arms(folder, arms, [seed], jobs, *files)


def cost_of(entry, folder):
    """FLOPs of a run and of the phases before it, in runs without any measurement."""
    phases = os.path.join(folder, 'phases', f'{entry.arm}_seed{entry.seed}', 'cost.json')
    trained, extra = flops_of(entry.config, entry.tokens, entry.records)
    before = read_json(phases)['share_of_this_run'] if os.path.isfile(phases) else 0
    return before + 1 + extra / trained


def print_methods(names, folder, seeds):
    entries = read_arms(folder, METHODS, seeds)

    def loss(e):
        return float(np.mean([e.final[f'val/loss_{name}_test'] for name in names]))

    def perplexity(e):
        return float(np.exp(loss(e)))

    print(f'\n{len(names)} sources')
    columns = ['method', 'test perplexity (seeds)', 'against stratified (95 %)', 'wins']
    columns += [f'loss of {names[0]}', *names[1:]]
    print_header(*columns, f'weights {", ".join(names)}', 'cost, runs')
    for method in METHODS:
        local = [entries[method, seed] for seed in seeds]
        gap = wins = ''
        if method != 'stratified':
            found = paired(list(entries.values()), method, 'stratified', perplexity)
            gap = difference(found, 2)
            won = sum(loss(e) < loss(entries['stratified', e.seed]) for e in local)
            wins = f'{won} of {len(seeds)}'
        losses = []
        weights = []
        for name in names:
            losses.append(mean_and_range([e.final[f'val/loss_{name}_test'] for e in local], 3))
            weights.append(mean_and_range([weights_of(e)[-1][name] for e in local], 2))
        cost = f'{np.mean([cost_of(e, folder) for e in local]):.2f}'
        perplexities = mean_and_range([perplexity(e) for e in local], 2)
        print_row(method, perplexities, gap, wins, *losses, ', '.join(weights), cost)


if __name__ == '__main__':
    configure(globals(), verbose=False)
    if not text:
        raise BadInput('--text is missing.')
    out = os.path.abspath(out)
    text = os.path.abspath(text)
    data = os.path.join(out, 'data')
    prepare(
        text, data, train='train/{n}', val='val/{n}', train_test='val/{n}', val_test='probes/{d}')
    prepare(
        text, f'{data}_influence', f'--tokenizer={data}/code', train='train/{n}', val='probes/{d}',
        train_test='train/{n}', val_test='probes/{d}', probes='val/{n}')
    for n_sources in m:
        names = list(SOURCES)[:n_sources]
        folder = os.path.join(out, f'm{n_sources}')
        study(names, folder, data, seeds, jobs)
        print_methods(names, folder, seeds)
