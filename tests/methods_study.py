"""Which method gives the better mixture, and at what cost? All of them on two and three sources of real text; the tables of docs/RESULTS.md.

    python tests/methods_study.py --text=folder            # about two hours of two cores beside other work; a run that is there is not made again

`folder` holds train/, val/ and probes/. Methods see the text of train/ and val/ alone (influence: probe sets made of val/, and for its sake, since train.py
refuses a probe that a source holds as well, sources without it); what counts is the loss on the text of probes/, which none of them has seen: sources
<name>_test of weight 0. Every method starts from equal weights; `fixed` has the shares of the
sources' sizes, `stratified` equal ones. Methods of several runs learn their mixture anew for every seed. Model and steps are config/study/base.py.
"""
import json
import os

import numpy as np

from configurator import BadInput, configure
from tests.studies import read_arms, run
from tools import sweep
from tools.report import difference, mean_and_range, paired, weights_of
from tools.runs import flops_of

# -- knobs --
text = ''                        # folder with train/*.jsonl.gz, val/ and probes/
out = 'out/methods_study'        # prepared data, runs and tables
seeds = [0, 1, 2]                # of initial weights and data order
m = [2, 3]                       # numbers of sources
jobs = 2                         # runs at the same time, of one thread each
configure(globals(), verbose=False)

SOURCES = {'code': 'code', 'math': 'math', 'web_edu': 'web'}           # source -> probe set of its kind
METHODS = ('stratified', 'fixed', 'influence', 'skillit', 'doge', 'doremi', 'aioli', 'dml')
ROUNDS = dict(mixture_interval=100, mixture_warmup=100, mixture_rows=96, max_epochs=None, probe_rows=64, influence_rows=32)


def prepare(folder, *options, **places):
    """Sources and probe sets in `folder`, of links that give every text its place; places: split -> text, {n} the source, {d} its probe set's name."""
    for name, domain in SOURCES.items():
        for place, origin in places.items():
            split, _, test = place.partition('_')
            path = os.path.join(f'{folder}_text', split, f'{name}{"_test" * bool(test)}.jsonl.gz')
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if not os.path.islink(path):
                os.symlink(os.path.abspath(os.path.join(text, f'{origin.format(n=name, d=domain)}.jsonl.gz')), path)
    run('prepare/folder.py', f'--input={folder}_text', f'--out={folder}', *options)


def tokens_of(folder):
    with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
        return sum(shard['tokens'] for shard in json.load(f)['shards'] if shard['split'] == 'train')


def study(names, data):
    """All runs on these sources. Returns their folder."""
    folder, test = os.path.join(out, f'm{len(names)}'), {f'{name}_test': 0.0 for name in names}
    arguments = ['config/study/base.py', f'--data_dir={data}', f'--sources={ {**dict.fromkeys(names, 1.0), **test} }', *(f'--{k}={v}' for k, v in ROUNDS.items())]
    learned = {}
    for method in (method for method in METHODS if method in sweep.PHASED):
        for seed in seeds:
            where = os.path.join(folder, 'phases', f'{method}_seed{seed}')
            if not os.path.isfile(os.path.join(where, 'cost.json')):
                run('tools/sweep.py', 'method', f'--method={method}', f'--seed={seed}', f'--seeds=[{seed}]', f'--jobs={jobs}', '--threads=1', f'--out={where}', *arguments)
            learned[method, seed] = os.path.join(where, 'mixture.py')
    sizes = {name: tokens_of(os.path.join(data, name)) for name in names}
    knobs = {'fixed': dict(sources={**{name: n / sum(sizes.values()) for name, n in sizes.items()}, **test}), 'stratified': {},
             'influence': dict(mixture='influence', probe=dict.fromkeys(names, 1.0), data_dir=f'{data}_influence'), 'aioli': dict(mixture='aioli')}
    sweep.jobs, sweep.threads = jobs, 1
    for seed in seeds:
        runs = []
        for method in METHODS:
            own = {'seed': seed, **knobs.get(method, {})}
            if (method, seed) in learned:
                found = sweep.train_config([*arguments, learned[method, seed]])
                own |= dict(mixture=found['mixture'], skillit_graph=found['skillit_graph'], sources={**dict.fromkeys(test, 0.0), **found['sources']})
            runs.append(sweep.Job(os.path.join(folder, 'runs', f'{method}_seed{seed}'), own))
        sweep.run_all(runs, arguments, f'seed {seed}')
    return folder


def print_table(names, folder):
    entries = read_arms(os.path.join(folder, 'runs'), METHODS, seeds)
    every = list(entries.values())

    def loss(e):
        return float(np.mean([e.final[f'val/loss_{name}_test'] for name in names]))

    def perplexity(e):
        return float(np.exp(loss(e)))
    print(f'\n{len(names)} sources\n\n| method | test perplexity (seeds) | against stratified (95 %) | wins | loss of {" | ".join(names)} | weights {", ".join(names)} | cost, runs |'
          + '\n' + '|---' * (6 + len(names)) + '|')
    for method in METHODS:
        own = [entries[method, seed] for seed in seeds]
        wins = sum(loss(entries[method, seed]) < loss(entries['stratified', seed]) for seed in seeds)
        costs = []
        for seed, e in zip(seeds, own):
            path = os.path.join(folder, 'phases', f'{method}_seed{seed}', 'cost.json')
            trained, extra = flops_of(e.config, e.tokens, e.records)
            costs.append((json.load(open(path, encoding='utf-8'))['share_of_this_run'] if os.path.isfile(path) else 0) + 1 + extra / trained)
        weights = np.array([[weights_of(e)[-1][n] for n in names] for e in own])
        cells = [mean_and_range([e.final[f'val/loss_{n}_test'] for e in own], 3) for n in names]
        print(f'| {method} | {mean_and_range([perplexity(e) for e in own], 2)} | ' + ('' if method == 'stratified' else difference(paired(every, method, 'stratified', perplexity), 2))
              + f' | {"" if method == "stratified" else f"{wins} of {len(seeds)}"} | ' + ' | '.join(cells) + ' | ' + ', '.join(mean_and_range(w, 2) for w in weights.T)
              + f' | {np.mean(costs):.2f} |')


if __name__ == '__main__':
    if not text:
        raise BadInput('--text is missing.')
    out = os.path.abspath(out)
    data = os.path.join(out, 'data')
    prepare(data, train='train/{n}', val='val/{n}', train_test='val/{n}', val_test='probes/{d}')
    prepare(f'{data}_influence', f'--tokenizer={data}/code', train='train/{n}', val='probes/{d}', train_test='train/{n}', val_test='probes/{d}', probes='val/{n}')
    for n in m:
        names = list(SOURCES)[:n]
        print_table(names, study(names, data))
