"""Are the scores of PRESENCE worth anything? A trial at equal weights, for docs/RESULTS.md.

    python tests/presence_study.py --data=data/study        # an hour and a half of two cores

`data` is made by prepare/folder.py (config/study/base.py says how). Finished runs are kept.

Weighing micro-batches does two things. It prefers some of them, and it leaves fewer effective ones:
1 / sum of squared weights. The second alone costs loss. Therefore every arm has a twin with the
same weights in random order (presence_permute), so both have the same effective number, and only
their difference says what the scores are worth. Every arm and twin has its own learning rate: a
third seed decides between `factors` of that of the model, by the loss.

- mixed       micro-batches of 4 rows of all sources, 8 in a step
- by source   micro-batches of one source (presence_by_source)
- wide        20 micro-batches in a step and fewer steps, so that at tau = 1 about as many stay
              effective as the baseline has
"""
import os

import numpy as np

if __name__ == '__main__':
    import _path  # noqa: F401

from configurator import configure
from tests.studies import (
    print_header,
    print_row,
    read_arms,
    tell,
    train_arms,
    write_config,
    write_summary,
)
from tools.report import difference, holm, mean_and_range, p_text, paired, paired_p

# -- knobs --
data = 'data/study'                 # folder of prepared sources
out = 'out/presence_study'
seeds = [0, 1, 2]
factors = [0.5, 1.0, 2.0]           # of the learning rate
tuning_seed = 100                   # none of `seeds`
taus = [1.0, 0.3, 0.1, -0.1, -0.3, -1.0]
taus_by_source = [1.0, 0.3, -0.3, -1.0]
jobs = 2                            # runs at the same time, of one thread each

CLEAN = ('code', 'math', 'web_edu', 'wiki')
LEARNING_RATE = 1e-2                # of config/study/base.py
STEPS = 400
WIDE = dict(total_batch_tokens=80 * 64, max_steps=STEPS * 32 // 80, warmup_steps=8)


def pairs_of(taus, taus_by_source):
    """Name -> knobs of every arm that has a twin."""
    pairs = {f'mixed, tau {tau:g}': dict(presence_tau=tau) for tau in taus}
    for tau in taus_by_source:
        pairs[f'by source, tau {tau:g}'] = dict(presence_tau=tau, presence_by_source=True)
    pairs['wide, tau 1'] = dict(WIDE, presence_tau=1.0)
    return {name: dict(presence='store', **knobs) for name, knobs in pairs.items()}


def arms_of(pairs):
    """Name -> knobs of all arms."""
    arms = {'baseline': {}, 'wide baseline': WIDE}
    for name, knobs in pairs.items():
        arms[name] = knobs
        arms[twin(name)] = dict(knobs, presence_permute=True)
    return {name: dict(batch_size=4, **knobs) for name, knobs in arms.items()}


def twin(name):
    return f'{name}, permuted'


def file_name(name):
    return name.replace(', ', '_').replace(' ', '_').replace('-', 'minus')


def loss_of(run):
    return float(np.mean([run.final[f'val/loss_{name}'] for name in CLEAN]))


def effective(run):
    """Mean effective number of micro-batches of a run."""
    key = 'presence/effective_micro_batches'
    return float(np.mean([record[key] for record in run.records if key in record]))


def tune(arms, factors, seed, jobs, folder, *files):
    """Best learning rate of every arm: dict name -> factor. Prints the losses."""
    trials = {}
    for name, knobs in arms.items():
        for factor in factors:
            trial = f'{file_name(name)}_lr{factor:g}'
            trials[trial] = dict(knobs, learning_rate=LEARNING_RATE * factor)
    train_arms(folder, trials, [seed], jobs, *files)
    entries = read_arms(folder, trials, [seed])
    best = {}
    tell(f'\nLearning rates: mean loss of the clean sources, seed {seed}')
    print_header('arm', *(f'x {factor:g}' for factor in factors), 'chosen')
    for name in arms:
        losses = [loss_of(entries[f'{file_name(name)}_lr{x:g}', seed]) for x in factors]
        best[name] = factors[int(np.argmin(losses))]
        print_row(name, *(f'{loss:.4f}' for loss in losses), f'x {best[name]:g}')
    return best


def print_table(pairs, entries, seeds):
    runs = list(entries.values())

    def row(name, base):
        of_arm = [run for run in runs if run.arm == name]
        against = ''
        if name != base:
            against = difference(paired(runs, name, base, loss_of), 3)
        return of_arm, mean_and_range([loss_of(run) for run in of_arm], 3), against

    p = holm([paired_p(runs, name, twin(name), loss_of) for name in pairs])
    tell(f'\nMean loss of the clean sources, seeds {seeds}')
    print_header(
        'arm', 'effective micro-batches', 'loss', 'against its baseline', 'permuted: loss',
        'against its baseline', 'scores: arm against permuted (95 %)', 'p (Holm)')
    for name in ('baseline', 'wide baseline'):
        print_row(name, '8' if name == 'baseline' else '20', row(name, name)[1], '', '', '', '', '')
    for name, value in zip(pairs, p, strict=True):
        base = 'wide baseline' if name.startswith('wide') else 'baseline'
        of_arm, loss, against = row(name, base)
        _, other, other_against = row(twin(name), base)
        number = np.mean([effective(run) for run in of_arm])
        worth = difference(paired(runs, name, twin(name), loss_of), 3)
        print_row(
            name, f'{number:.1f}', loss, against, other, other_against, worth, p_text(value))


if __name__ == '__main__':
    configure(globals(), verbose=False)
    data, out = os.path.abspath(data), os.path.abspath(out)
    common = write_config(os.path.join(out, 'common.py'), dict(data_dir=data))
    files = ('config/study/base.py', common)
    pairs = pairs_of(taus, taus_by_source)
    arms = arms_of(pairs)
    best = tune(arms, factors, tuning_seed, jobs, os.path.join(out, 'tuning'), *files)
    chosen = {}
    for name, knobs in arms.items():
        chosen[file_name(name)] = dict(knobs, learning_rate=LEARNING_RATE * best[name])
    train_arms(out, chosen, seeds, jobs, *files)
    entries = read_arms(out, chosen, seeds)
    for name in arms:
        for seed in seeds:
            entries[file_name(name), seed].arm = name
    print_table(pairs, entries, seeds)
    write_summary(out)
