"""Many runs of train.py: architectures, grids of knobs, mixtures, and methods of several runs.

    python tools/sweep.py arch --n_params="[4.5e6, 5.5e6]" --out=out/arch config/...
    python tools/sweep.py arch --grid.n_layer="[4, 8]" --grid.n_embd="[64, 96]" config/...
    python tools/sweep.py grid --grid.learning_rate="[1e-3, 2e-3]" --seeds="[0, 1]" config/...
    python tools/sweep.py configs config/study/presence --seeds="[0, 1, 2]" --out=out/x config/...
    python tools/sweep.py mixture --dirichlet --n=9 --seeds="[0, 1, 2]" --out=out/static config/...
    python tools/sweep.py mixture --break_step=200 --method=aioli --out=out/aioli config/...
    python tools/sweep.py method --method=doremi --out=out/doremi config/...
    python tools/sweep.py method --method=olmix --match_repetition=1e10 --out=out/olmix config/...
    python tools/sweep.py collect out/arch

arch        shapes of a given size, or combinations of your own lists. --dry_run=True lists them
grid        all combinations of any knobs of train.py
configs     every config file of a folder except _*.py
mixture     mixtures of the sources. With --break_step, runs that stop there (on fixed mixtures, or
            of a method) and are continued on every mixture
method      all phases of skillit, doge, doremi, dml, olmix, regmix or regmix_d. They end with a
            config file for train.py and with their cost. olmix is the law of dml, held near natural
            shares and within max_epochs. regmix_d ends with a schedule of mixtures
collect     the loss curves of a sweep in one table (tools/curves.py)

Config files and --key=value that are not knobs of this script are passed on to train.py. Every run
has its own folder. A run that fails does not stop the others. The same command continues a sweep
that was stopped. `python tools/report.py out/arch --watch=True` shows the runs while they train.
"""
import fcntl
import glob
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

if __name__ == '__main__':
    import _path  # noqa: F401  (it puts the project's folder on the import path)

from configurator import (
    BadInput,
    RunFault,
    at_least,
    between,
    configure,
    configure_script,
    did_you_mean,
    one_of,
    pick,
    read_json,
    split_arguments,
)
from data import Source, prepare_missing
from lib.log import read_metrics
from lib.schedule import count_steps
from methods.selection import keep_scored
from model import ModelConfig, count_parameters
from tools.commands import read_command, warn_unused
from tools.curves import SHAPE, collect, parse_band
from tools.mixture_reuse import expand_mixture, read_plan, runs_for
from tools.runs import (
    flops_of,
    is_finished,
    losses_at,
    read_run,
    read_table,
    token_flops,
)

# -- runs --
out = 'out/sweep'                       # folder of the runs
seeds = [0]                             # of train.py: initial weights and data order
jobs: at_least(1) = 1                   # runs at the same time
threads: at_least(1) | None = None      # threads of every run. None: cores / jobs
slurm = False                           # write scripts for sbatch and run nothing
# -- arch and grid --
grid: dict[str, list] = {}              # values of train.py's knobs, all combinations
heads = [4, 6, 8, 10, 12, 14, 16]       # arch: n_head. The shapes are all combinations of these
                                        # four lists, unless `grid` has a knob of the shape
head_widths = [8, 16, 24, 32, 40, 48, 56, 64]     # arch: n_embd / n_head
ffn_ratios = [0.5, 1, 1.5, 2]           # arch: ffn_dim / n_embd
extra_layers = [2, 4, 6, 8, 10, 12]     # arch: n_layer - n_head
n_params = [1e6, 3e8]                   # arch: fewest and most parameters, embeddings included
bands: dict = {}                        # arch: further limits, such as {'5M': None} for 10 % to
                                        # either side. collect: band -> point to compare at
                                        # (None: `at`)
dry_run = False                         # list the runs, write ablation_params.tsv, run nothing
# -- mixture and method --
method = ''                             # mixture: the parents are runs of this method, one per
                                        # seed. method: whose phases to run
design: one_of('dirichlet', 'grid') = 'dirichlet'   # space-filling, or equally spaced without 0
n: between(1, 1000) | None = None       # mixtures. A grid of three sources or more has at least n.
                                        # None: 3 (m + 1) for m sources, and at least 20 for regmix
                                        # and regmix_d. Olmix (arXiv:2602.12237) found runs linear
                                        # in m enough. The factor is ours: 3 runs for each of the
                                        # m + 1 numbers of a law
m: at_least(1) | None = None            # check that the config has this many sources. None: any
break_step: at_least(1) | None = None   # step at which parents stop and children continue them.
                                        # None: no children
child_steps: at_least(1) = 100          # steps of a child
reuse: str | None = None                # a plan of `mixing_laws.py recompute`: sources that did not
                                        # change keep their ratios, and only the others vary
target = ''                             # olmix, regmix, regmix_d: source whose loss shall be low.
                                        # '': mean of all
kl: at_least(0.0) = 0.02                # olmix: nats of mean loss per nat of KL divergence from
                                        # shares by the sizes of the sources
stages: between(1, 100) = 4             # regmix_d: mixtures of the schedule
match_repetition: at_least(1) | None = None     # tokens of the run that the mixture is for. Every
                                        # source is cut to the share of it that a run of the sweep
                                        # has of these tokens, so both repeat it as often. Without
                                        # that, proxies never see the repetition that makes a large
                                        # share of a small source bad (arXiv:2606.07597). None: all
proxy_lr_frac: between(1e-9, 1.0) = 1.0 # share of learning_rate that the runs of the sweep have,
                                        # not the recommended run. At a low rate small proxies rank
                                        # data more as large runs do (arXiv:2512.24503)
# -- collect --
unit: one_of('step', 'tokens', 'flops') = 'step'    # compare at equal step, tokens or flops
at: at_least(0.0) | None = None         # the point. None: the last that half of the runs reached
loss: one_of('val', 'train') = 'val'    # which loss
least: at_least(0.0) = 0.0              # parameters that a model must have to count for the
                                        # effects of depth, heads and inner width

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUNS = ('out', 'seeds', 'jobs', 'threads', 'slurm')
PROXIES = ('match_repetition', 'proxy_lr_frac')
SHAPES = ('heads', 'head_widths', 'ffn_ratios', 'extra_layers', 'n_params', 'bands')
# Command -> the knobs that it reads.
USED = dict(
    arch=(*RUNS, *SHAPES, 'grid', 'dry_run'), grid=(*RUNS, 'grid', 'dry_run'),
    configs=(*RUNS, 'dry_run'),
    mixture=(
        *RUNS, *PROXIES, 'dry_run', 'method', 'design', 'n', 'm', 'reuse', 'break_step',
        'child_steps'),
    method=(*RUNS, *PROXIES, 'method', 'design', 'n', 'reuse', 'target', 'kl', 'stages'),
    collect=('out', 'bands', 'unit', 'at', 'loss', 'least'))
PHASED = (                              # methods of several runs
    'skillit', 'doge', 'doremi', 'dml', 'olmix', 'regmix', 'regmix_d')
BY_TREES = ('regmix', 'regmix_d')       # those that fit trees
TREE_RUNS = 20                          # fewest runs that they take
ALONE = (                               # methods of one run
    'fixed', 'stratified', 'natural', 'unimax', 'schedule', 'influence', 'aioli', 'ado')


# -- runs ------------------------------------------------------------------------------------------


@dataclass
class Launch:
    """How the runs of a sweep are launched."""
    out: str                        # folder of the sweep
    arguments: list                 # config files and --key=value for train.py
    parallel: int = 1               # runs at the same time
    threads: int | None = None      # threads of every run. None: cores / parallel
    slurm: bool = False             # write array scripts and run nothing


@dataclass
class Job:
    """A run of train.py that a sweep makes."""
    folder: str
    knobs: dict                     # beyond those of the command line
    after: 'Job | None' = None      # the job that has to be finished before
    files: tuple = ()               # further config files

    def command(self, arguments):
        # A config file must not override a --key=value of the sweep.
        files = [a for a in arguments if not a.startswith('--')]
        given = [a for a in arguments if a.startswith('--')]
        # resume=True continues a run that was killed.
        knobs = {**self.knobs, 'out_dir': self.folder, 'resume': True}
        knobs = [f'--{key}={value}' for key, value in knobs.items()]
        return [sys.executable, 'train.py', *files, *self.files, *given, *knobs]


def train_config(arguments):
    """The config that train.py would have. Raises BadInput for what train.py would not take."""
    return configure_script(os.path.join(PROJECT, 'train.py'), arguments)


def check_same_run(job, arguments):
    """Raises BadInput if the job's folder holds a run with other knobs."""
    path = os.path.join(job.folder, 'config.json')
    if not os.path.isfile(path):
        return
    there = read_json(path)
    if not isinstance(there, dict):
        raise BadInput(f'{path} is no config of a run. Remove the run, or restore the file.')
    # JSON makes lists of tuples, so both sides have to go through it.
    wanted = json.loads(json.dumps(train_config(job.command(arguments)[2:])))
    # A run of an older version has the defaults of the knobs that came since.
    there = {**json.loads(json.dumps(train_config([]))), **there}
    for key, value in wanted.items():
        if there[key] != value:
            raise BadInput(
                f"'{job.folder}' holds a run with other knobs: {key} {there[key]!r} there, "
                f'{value!r} now. Give the sweep another --out, or remove the run.')


def start(job, arguments, environment):
    """Starts the process of a job."""
    os.makedirs(job.folder, exist_ok=True)
    # The process inherits the lock and holds it until it ends, even if the sweep is killed before.
    log = open(os.path.join(job.folder, 'log.txt'), 'a', encoding='utf-8')
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(
            f"'{job.folder}' is being trained by another process. Wait for it, or end it."
        ) from None
    # Truncated only now, because the log belongs to whoever holds the lock.
    log.truncate(0)
    return subprocess.Popen(
        job.command(arguments), cwd=PROJECT, env=environment, stdout=log, stderr=log)


def reason_of(folder):
    """The last line of a run's log that names an error, else the last line."""
    with open(os.path.join(folder, 'log.txt'), encoding='utf-8', errors='replace') as f:
        lines = [line.strip() for line in f.read().replace('\r', '\n').split('\n')]
    lines = [line for line in lines if line] or ['it printed nothing']
    errors = [line for line in lines if 'error' in line.lower()]
    return (errors or lines)[-1]


def interrupt(*_):
    raise KeyboardInterrupt


def end_all(processes):
    """Interrupts processes of train.py, which save a checkpoint and end."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    for process in processes:
        process.wait()


def train_all(queue, launch, what):
    """Trains all jobs that are not finished. Returns the folders of those that failed."""
    threads = launch.threads or max(1, os.cpu_count() // launch.parallel)
    # PyTorch takes all cores by default, and runs beside each other would fight for them.
    environment = {**os.environ, 'OMP_NUM_THREADS': str(threads)}
    waiting = [job for job in queue if not is_finished(job.folder)]
    running = {}            # process -> job
    failed = []
    bar = tqdm(total=len(queue), initial=len(queue) - len(waiting), desc=what, unit='run')
    try:
        while waiting or running:
            for job in list(waiting):
                parent = job.after
                if parent is not None and parent.folder in failed:
                    waiting.remove(job)
                    failed.append(job.folder)
                elif len(running) < launch.parallel and (
                        parent is None or is_finished(parent.folder)):
                    waiting.remove(job)
                    running[start(job, launch.arguments, environment)] = job
            time.sleep(0.1)
            for process, job in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[process]
                bar.update()
                # A run that was stopped by a signal saves and ends with exit code 0, too.
                if code != 0 or not is_finished(job.folder):
                    failed.append(job.folder)
                    tqdm.write(f'{job.folder} failed (exit code {code}): {reason_of(job.folder)}')
    finally:
        bar.close()
        end_all(running)
    return failed


def write_slurm(queue, launch):
    """Writes array scripts: one for the jobs that wait for no other, and one for their children."""
    os.makedirs(launch.out, exist_ok=True)
    parents = [job for job in queue if job.after is None]
    children = [job for job in queue if job.after is not None]
    # Two arrays, because sbatch makes one array wait for all of another.
    for name, part in (('first', parents), ('then', children)):
        if not part:
            continue
        # Task i of the array runs line i + 1 of the list of commands.
        commands = os.path.join(launch.out, f'{name}.txt')
        script = os.path.join(launch.out, f'{name}.sh')
        with open(commands, 'w', encoding='utf-8') as f:
            for job in part:
                command = ['python', *job.command(launch.arguments)[1:]]
                f.write(shlex.join(command) + '\n')
        with open(script, 'w', encoding='utf-8') as f:
            f.write(
                f'#!/bin/bash\n#SBATCH --array=0-{len(part) - 1}%{launch.parallel}\n'
                f'#SBATCH --gpus=1\n#SBATCH --requeue\ncd {shlex.quote(PROJECT)} || exit 1\n'
                'eval "$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" '
                f'{shlex.quote(os.path.abspath(commands))})"\n')
        after = ' --dependency=afterok:<id of the first job>' if name == 'then' else ''
        print(f'written: {script}, {len(part)} runs: sbatch{after} {script}')


def run_all(queue, launch, what):
    """Trains all jobs that are not finished, or writes SLURM scripts for all.

    queue   list of Job. A job starts when the one it waits for has finished
    what    label of the progress bar
    A run that fails does not stop the others. Raises RunFault at the end if some have failed, and
    when the sweep is interrupted.
    """
    for job in queue:
        check_same_run(job, launch.arguments)
    if launch.slurm:
        write_slurm(queue, launch)
        return
    # Schedulers end a job with SIGTERM. It has to end the runs as Ctrl-C does.
    signal.signal(signal.SIGTERM, interrupt)
    try:
        failed = train_all(queue, launch, what)
    except KeyboardInterrupt:
        raise RunFault('stopped and saved. The same command continues the runs.') from None
    if failed:
        names = ', '.join(failed[:5]) + (' ...' if len(failed) > 5 else '')
        raise RunFault(
            f'{len(failed)} of {len(queue)} runs failed: {names}. See log.txt in their folders. '
            'The same command tries them again.')


def make_job(out, name, seed, knobs, files=()):
    folder = os.path.join(out, f'{name}_seed{seed}')
    return Job(folder, {**knobs, 'seed': seed}, files=files)


def prepare_sources(config):
    """Makes missing sources, before several runs would make them at once.

    Returns the names of the sources that have a weight.
    Raises BadInput if the runs would not all have the same number of steps.
    """
    if config['epochs'] is not None or count_steps(config, None) is None:
        raise BadInput('runs of equal length need max_steps or max_tokens, and no epochs.')
    if config['prepare'] is not None:
        prepare_missing(config['prepare'], config['data_dir'], config['sources'])
    return [name for name, weight in config['sources'].items() if weight > 0]


# -- architectures and grids -----------------------------------------------------------------------


def arch_shapes(heads, extra_layers, head_widths, ffn_ratios):
    """All combinations as knobs of the model. The defaults are those of the published sweep."""
    shapes = []
    for h, more, width, ratio in itertools.product(heads, extra_layers, head_widths, ffn_ratios):
        shapes.append(dict(
            n_head=h, n_kv_head=h, n_layer=h + more, n_embd=h * width,
            ffn_dim=int(h * width * ratio), head_dim=None))
    return shapes


def combinations(grid, config):
    """All combinations of {name: list} as dicts. Raises BadInput for what train.py cannot take."""
    for name, values in grid.items():
        if name not in config:
            hint = did_you_mean(name, config)
            raise BadInput(f"--grid.{name}: train.py has no knob '{name}'.{hint}")
        if name in ('seed', 'out_dir', 'resume'):
            raise BadInput(f'--grid.{name}: tools/sweep.py sets that for every run. See --seeds.')
        if not isinstance(values, (list, tuple)) or not values:
            raise BadInput(f"--grid.{name}={values!r} must be a list, such as '[1, 2]'.")
        if len({repr(value) for value in values}) < len(values):
            raise BadInput(f'--grid.{name}={values!r} has a value twice: it would be one run.')
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def name_of(values):
    return '_'.join(f'{key}={value}' for key, value in values.items()).replace('/', '_')


def check_values(grid, arguments):
    """Raises BadInput if train.py would not take one of the values of a grid."""
    for name, values in grid.items():
        for value in values:
            train_config([*arguments, f'--{name}={value}'])


def grid_jobs(config, out, grid, seeds):
    if not grid:
        raise BadInput("give a list, such as --grid.learning_rate='[1e-3, 2e-3]'.")
    queue = []
    for knobs in combinations(grid, config):
        queue += [make_job(out, name_of(knobs), seed, knobs) for seed in seeds]
    return queue


def arch_jobs(config, out, grid, shapes, limits, seeds):
    """Jobs of all shapes whose parameters are within one of the limits.

    grid    further knobs, all combinations. If it has a knob of the shape, it replaces `shapes`
    shapes  list of dicts (`arch_shapes`)
    limits  list of (low, high) parameters
    Writes ablation_params.tsv to the folder `out`: the values of SHAPE and the parameters.
    """
    # Lists for n_layer or n_embd would contradict the shapes made from heads and ratios.
    if set(grid) & set(SHAPE):
        shapes = [{}]
    queue = []
    rows = {}               # line of the file -> parameters. A dict, because shapes may repeat
    impossible = []
    n_outside = 0
    for shape, values in itertools.product(shapes, combinations(grid, config)):
        knobs = {**shape, **values}
        if 'n_head' in knobs:
            knobs.setdefault('n_kv_head', knobs['n_head'])
        full = {**config, **knobs}
        dimensions = [str(full[key]) for key in SHAPE]
        others = name_of({k: v for k, v in values.items() if k not in SHAPE})
        name = '_'.join([*dimensions, others] if others else dimensions)
        # Parameters are counted from the config, no model is built. ModelConfig refuses shapes such
        # as a width that is not a multiple of the heads.
        try:
            n_params = count_parameters(pick(ModelConfig, full))['total']
        except BadInput as error:
            impossible.append(f'{name}: {error}')
            continue
        if not any(low <= n_params <= high for low, high in limits):
            n_outside += 1
            continue
        rows['\t'.join([*dimensions, str(n_params)])] = n_params
        queue += [make_job(out, name, seed, knobs) for seed in seeds]
    if impossible:
        print(f'{len(impossible)} combinations are not possible, the first is {impossible[0]}')
    sizes = f' of {min(rows.values()):,} to {max(rows.values()):,} parameters' if rows else ''
    print(f'{len(rows)} models{sizes}; {n_outside} are outside the limits')
    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, 'ablation_params.tsv')
    with open(path, 'w', encoding='utf-8') as f:
        f.writelines(row + '\n' for row in rows)
    print(f'written: {path} ({", ".join(SHAPE)}, parameters)')
    if not queue:
        raise BadInput('nothing is left to run. Widen n_params or bands, or give other lists.')
    return queue


def config_jobs(folder, launch, seeds):
    """A Job for every config file in a folder with every seed, in the order of their names."""
    pattern = os.path.join(glob.escape(folder), '[!_]*.py')
    files = sorted(glob.glob(pattern)) if folder else []
    if not files:
        raise BadInput(
            f"'{folder}' has no config file in it. Name a folder of config files: sweep.py configs "
            'config/study/presence ...')
    queue = []
    for seed, file in itertools.product(seeds, files):
        name = os.path.basename(file).removesuffix('.py')
        queue.append(make_job(launch.out, name, seed, {}, (os.path.abspath(file),)))
    # Every file may name other sources. Seeds do not change them, so one job per file is enough.
    for job in queue[:len(files)]:
        prepare_sources(train_config(job.command(launch.arguments)[2:]))
    return queue


# -- proxies ---------------------------------------------------------------------------------------


def open_sources(config, names):
    """The training Sources of these names, without the rows that select='scores' drops: a list."""
    options = dict(
        vocab_size=config['vocab_size'], packing=config['packing'], overlong=config['overlong'])
    sources = []
    for name in names:
        sources.append(Source(
            config['data_dir'], name, 'train', config['block_size'], config['seed'], **options))
    if config['select'] == 'scores':
        keep_scored(sources, config)
    return sources


def matched_rows(config, names, n_tokens, target_tokens):
    """Rows that a proxy may use of every source, for as much repetition as in the target run.

    config         train.py's knobs     names  the sources that have a weight
    n_tokens       that a proxy trains on
    target_tokens  that the target run trains on
    A source of n rows gets n * n_tokens / target_tokens of them, rounded. Zhou et al. 2026
    (arXiv:2606.07597). Returns a dict name -> rows. Raises BadInput if the target run is not
    longer, or a source would have less than one batch of rows.
    """
    if target_tokens <= n_tokens:
        raise BadInput(
            f'match_repetition = {target_tokens:,} tokens, and a run of this sweep trains on '
            f'{n_tokens:,}. It must be the tokens of a longer run, or be left out.')
    batch_rows = config['total_batch_tokens'] // config['block_size']
    rows = {}
    for source in open_sources(config, names):
        n = round(source.n_windows * n_tokens / target_tokens)
        # Below that, train.py would refuse the source: a batch would hold a row twice.
        if n < batch_rows:
            needed = math.ceil(batch_rows * target_tokens / source.n_windows)
            raise BadInput(
                f"match_repetition leaves {n} of the {source.n_windows:,} rows of source "
                f"'{source.name}', fewer than one batch ({batch_rows} rows). Let the runs of the "
                f'sweep train on {needed:,} tokens or more, lower total_batch_tokens, or leave '
                'that source out of the sweep.')
        rows[source.name] = n
    return rows


def proxy_arguments(config, names, n_steps, target_tokens, lr_frac):
    """Arguments of train.py that every run of a sweep gets, and the recommended run does not.

    config         train.py's knobs     names  the sources that have a weight
    n_steps        steps that a run of the sweep trains
    target_tokens  the knob match_repetition     lr_frac  the knob proxy_lr_frac
    """
    arguments = []
    if target_tokens is not None:
        if config['source_rows']:
            raise BadInput('match_repetition sets source_rows. Leave one of them out.')
        n_tokens = n_steps * config['total_batch_tokens']
        rows = matched_rows(config, names, n_tokens, target_tokens)
        arguments.append(f'--source_rows={rows}')
        print(
            f'match_repetition: runs of {n_tokens:,} tokens use {n_tokens / target_tokens:.4g} of '
            f'every source, rows {rows}')
    if lr_frac != 1.0:
        # min_lr_frac and the warm-up are relative to it.
        rate = config['learning_rate'] * lr_frac
        arguments.append(f'--learning_rate={rate!r}')
        print(f'proxy_lr_frac: the runs have learning_rate = {rate:g}')
    return arguments


# -- sweeps of mixtures ----------------------------------------------------------------------------


def dirichlet_mixtures(n, m, seed=0):
    """n mixtures of m sources that fill the simplex: (n, m) float64, rows sum to 1.

    Draws 16 * n points from Dirichlet(1.5) and merges the closest two into their midpoint until n
    are left.
    """
    p = np.random.default_rng(seed).dirichlet(np.full(m, 1.5), 16 * n)
    distance = ((p[:, None] - p[None]) ** 2).sum(2)
    np.fill_diagonal(distance, np.inf)
    while len(p) > n:
        i, j = np.unravel_index(distance.argmin(), distance.shape)
        p[i] = (p[i] + p[j]) / 2
        p = np.delete(p, j, 0)
        distance = np.delete(np.delete(distance, j, 0), j, 1)
        # Only the distances of the merged point are new.
        i -= i > j
        distance[i] = ((p - p[i]) ** 2).sum(1)
        distance[:, i] = distance[i]
        distance[i, i] = np.inf
    return p


def grid_mixtures(n, m):
    """The coarsest grid of shares 1/k, 2/k, ... (none 0) with at least n mixtures of m sources.

    Two sources and n = 9 give 0.1, 0.2, ... 0.9. Returns (at least n, m) float64, rows sum to 1.
    """
    k = m
    while math.comb(k - 1, m - 1) < n:
        k += 1
    # A bar of length k that is cut at m - 1 of its k - 1 inner places has m parts of at least 1.
    cuts = itertools.combinations(range(1, k), m - 1)
    return np.array([np.diff([0, *places, k]) for places in cuts]) / k


def default_n(m, method):
    """Mixtures of a sweep of m sources, for a method of several runs or '' for a sweep alone.

    Olmix (arXiv:2602.12237) finds that a number of runs linear in m is enough. The factor is three
    runs for each of the m + 1 numbers of a law.
    """
    return max(runs_for(m), TREE_RUNS if method in BY_TREES else 0)


def as_sources(names, p):
    return {name: round(float(share), 6) for name, share in zip(names, p, strict=True)}


@dataclass
class Design:
    """The mixtures of a sweep."""
    kind: str               # dirichlet (space-filling) | grid (equally spaced, without 0)
    n: int                  # mixtures
    seeds: list             # of the runs
    plan: dict | None       # of mixture_reuse.read_plan: which ratios of sources are fixed

    def mixtures(self, names, seed):
        """list of dicts source -> share"""
        free = names if self.plan is None else self.plan['sources']
        if self.kind == 'dirichlet':
            points = dirichlet_mixtures(self.n, len(free), seed)
        else:
            points = grid_mixtures(self.n, len(free))
        if self.plan is None:
            return [as_sources(names, p) for p in points]
        mixtures = []
        for p in points:
            full = expand_mixture(self.plan, dict(zip(free, p, strict=True)))
            mixtures.append(as_sources(names, [full[name] for name in names]))
        return mixtures


def make_design(kind, n, seeds, names, method, plan_path):
    """A Design for the sources `names`. See its fields.

    n          None: `default_n`       method  of several runs, '': none
    plan_path  of a file of `mixing_laws.py recompute`. None: the shares of all sources vary
    """
    plan = None if plan_path is None else read_plan(plan_path, names)
    n_free = len(names) if plan is None else len(plan['sources'])
    return Design(kind, n or default_n(n_free, method), seeds, plan)


def static_jobs(folder, names, design):
    """Every mixture with every seed.

    As in the published sweeps, every seed has its own mixtures under kind='dirichlet'. Only the
    first three are the same for all seeds, because repeated mixtures tell the noise of the seeds.
    """
    shared = design.mixtures(names, design.seeds[0])
    queue = []
    for seed in design.seeds:
        mixtures = shared
        if design.kind == 'dirichlet':
            mixtures = shared[:3] + design.mixtures(names, seed)[3:]
        for i, p in enumerate(mixtures):
            queue.append(make_job(folder, f'mix{i:02d}', seed, dict(mixture='fixed', sources=p)))
    return queue


def jobs_before(method, folder, names, seed):
    """Jobs that have to be finished before a run of the method."""
    if method == 'doremi':
        return [Job(os.path.join(folder, 'reference'), dict(mixture='stratified', seed=seed))]
    queue = []
    if method == 'skillit':
        for name in names:
            only = as_sources(names, [float(other == name) for other in names])
            knobs = dict(mixture='fixed', sources=only, seed=seed)
            queue.append(Job(os.path.join(folder, f'only_{name}'), knobs))
    return queue


def knobs_from(method, folder, names, before):
    """The knobs that tell a run of the method where the results of `jobs_before` are."""
    if method == 'doremi':
        return dict(doremi_reference=before[0].folder)
    if method != 'skillit':
        return {}
    # An edge is the share of a source's loss that training on one source alone takes away.
    graph = []
    for job in before:
        run = read_run(job.folder)
        first, _ = losses_at(run, 0)
        last, _ = losses_at(run, None)
        graph.append([(first[name] - last[name]) / first[name] for name in names])
    path = os.path.join(folder, 'graph.json')
    with open(path, 'w', encoding='utf-8') as f:
        json.dump(dict(groups=names, graph=graph), f, indent=1)
    return dict(skillit_graph=path)


def method_parents(launch, names, method, break_step, seeds):
    """One Job of the method per seed that stops at break_step. Trains what the method needs."""
    folders = [os.path.join(launch.out, 'phases', f'seed{seed}') for seed in seeds]
    before = []             # per seed a list of jobs
    for seed, folder in zip(seeds, folders, strict=True):
        before.append(jobs_before(method, folder, names, seed))
    if any(before):
        run_all(list(itertools.chain(*before)), launch, 'runs that the method starts from')
    parents = []
    for seed, folder, needed in zip(seeds, folders, before, strict=True):
        knobs = dict(mixture=method, stop_step=break_step)
        knobs |= knobs_from(method, folder, names, needed)
        parents.append(make_job(os.path.join(launch.out, 'parents'), method, seed, knobs))
    return parents


def continued_jobs(config, launch, names, design, method, break_step, child_steps):
    """Parents that stop at break_step, and children that continue each of them on every mixture.

    method  the parents are runs of this method. '': they are runs on the design's mixtures
    """
    n_steps = count_steps(config, None)
    if not 0 < break_step <= n_steps - child_steps:
        raise BadInput(
            f'break_step = {break_step} and {child_steps} steps of a child go beyond the {n_steps} '
            'steps of a run (max_steps), or break_step is below 1.')
    if launch.slurm and method in ('skillit', 'doremi'):
        raise BadInput(
            f'--slurm=True cannot make the runs that {method} starts from, which have to be '
            'finished first. Submit this command itself as a job.')
    mixtures = list(enumerate(design.mixtures(names, design.seeds[0])))
    parents = []
    if method:
        parents = method_parents(launch, names, method, break_step, design.seeds)
    else:
        for seed, (i, p) in itertools.product(design.seeds, mixtures):
            knobs = dict(mixture='fixed', sources=p, stop_step=break_step)
            folder = os.path.join(launch.out, 'parents')
            parents.append(make_job(folder, f'mix{i:02d}', seed, knobs))
    children = []
    for parent, (i, p) in itertools.product(parents, mixtures):
        name = f'{os.path.basename(parent.folder)}_to{i:02d}'
        # Nothing continues a child, so it saves only at its end.
        knobs = dict(
            mixture='fixed', sources=p, seed=parent.knobs['seed'], continue_from=parent.folder,
            stop_step=break_step + child_steps, save_interval=config['max_steps'])
        children.append(Job(os.path.join(launch.out, 'children', name), knobs, parent))
    return parents + children


# -- methods of several runs -----------------------------------------------------------------------


@dataclass
class Search:
    """What methods look for that fit the losses of runs on many mixtures."""
    target: str             # source whose loss shall be low. '': mean of all
    stages: int             # regmix_d: mixtures of the schedule
    limits: dict            # olmix: arguments of tools.best_mixture.make_recipe. {}: no limits


def check_search(search, config, names, method):
    """Raises BadInput for what would be noticed only after all runs of a method."""
    if search.target and search.target not in names:
        raise BadInput(
            f"target = '{search.target}' is none of the sources {', '.join(names)}."
            f'{did_you_mean(search.target, names)}')
    n_steps = count_steps(config, None)
    n_evaluations = -(-n_steps // config['eval_interval']) + 1
    if method == 'regmix_d' and n_evaluations <= search.stages:
        raise BadInput(
            f'{search.stages} stages need {search.stages + 1} evaluations, and eval_interval = '
            f"{config['eval_interval']} makes {n_evaluations} in {n_steps} steps. Lower it, or "
            'give fewer --stages.')


def olmix_limits(config, names, kl, n_tokens):
    """The limits of a Search by Olmix's recipe, for a run of n_tokens.

    Natural shares are those by size. Raises BadInput if max_epochs allows no mixture.
    """
    # Imported here because scipy takes a second.
    from tools.best_mixture import make_recipe
    sizes = {}
    for source in open_sources(config, names):
        sizes[source.name] = source.n_windows * source.block_size
    limits = dict(
        kl=kl, natural={}, sizes=sizes, max_epochs=config['max_epochs'], tokens=n_tokens)
    make_recipe(names, **limits)
    return limits


def learn_mixture(launch, names, design, method, search, seed):
    """Runs all phases of a method. Returns the knobs of train.py that they end with."""
    if method not in PHASED:
        hint = ''
        if method in ALONE:
            hint = f' `train.py --mixture={method}` needs no other run.'
        raise BadInput(f"method = '{method}' must be one of {', '.join(PHASED)}.{hint}")
    if launch.slurm:
        raise BadInput(
            '--slurm=True is not for methods: phases wait for each other. Submit this command '
            'itself as a job.')
    n_runs = design.n * len(design.seeds)
    if method in BY_TREES and n_runs < TREE_RUNS:
        raise BadInput(
            f'{method} fits trees to {TREE_RUNS} runs or more, and --n={design.n} with '
            f'{len(design.seeds)} seed(s) makes {n_runs}. Raise n.')
    before = jobs_before(method, launch.out, names, seed)
    if before:
        run_all(before, launch, 'runs that the method starts from')
    knobs = knobs_from(method, launch.out, names, before)
    if method == 'skillit':
        return dict(mixture='skillit', **knobs)
    if method in ('doge', 'doremi'):
        proxy = Job(os.path.join(launch.out, 'proxy'), dict(mixture=method, seed=seed, **knobs))
        run_all([proxy], launch, 'the proxy')
        # Both papers take the average of the proxy's weights over all steps, not the last ones.
        averages = [r for r in read_metrics(proxy.folder) if f'mixture/average_{names[0]}' in r]
        if not averages:
            raise BadInput(
                f"'{proxy.folder}' logged no average of its weights. Let the runs be longer than "
                'mixture_interval, and log_interval shorter.')
        shares = [averages[-1][f'mixture/average_{name}'] for name in names]
        return dict(mixture='fixed', sources=as_sources(names, shares))
    folder = os.path.join(launch.out, 'runs')
    run_all(static_jobs(folder, names, design), launch, 'runs')
    return fitted_mixture(read_table(folder), method, search, launch.out)


def fitted_mixture(table, method, search, out):
    """The knobs of train.py that a fit to the runs of a tools.runs.Table recommends.

    regmix_d writes its schedule to the folder `out`.
    """
    # Imported here because scipy takes a second.
    from tools import best_mixture, mixing_laws, regmix
    if method == 'regmix_d':
        _, schedule = regmix.regmix_d_runs(table, search.target, None, search.stages)
        path = os.path.join(out, 'schedule.json')
        with open(path, 'w', encoding='utf-8') as f:
            json.dump(schedule, f, indent=1)
        return dict(mixture='schedule', mixture_schedule=path)
    if method == 'regmix':
        shares = regmix.regmix_runs(table, search.target)['p']
    elif method == 'olmix':
        recipe = best_mixture.make_recipe(table.groups, **search.limits)
        found = mixing_laws.fit_static_runs(table.of(search.target), None, recipe)
        shares = found['optimum']['p']
    else:
        shares = mixing_laws.fit_static_runs(table, None)['optimum']['p']
    return dict(mixture='fixed', sources=as_sources(table.groups, shares))


def write_mixture(config, out, method, knobs, target_tokens):
    """Writes mixture.py, a config file for train.py, and cost.json to the folder `out`.

    target_tokens  of the run that the mixture is for. None: that of `config`
    """
    path = os.path.join(out, 'mixture.py')
    with open(path, 'w', encoding='utf-8') as f:
        f.write(
            f'# The mixture of {method}, learned by: python tools/sweep.py method '
            f'{shlex.join(sys.argv[2:])}\n')
        f.writelines(f'{name} = {value!r}\n' for name, value in knobs.items())
    # Every run of the phases is in a folder below `out`, or below `out`/runs.
    spent = 0.0
    for depth in ('*', 'runs/*'):
        for metrics in glob.glob(os.path.join(glob.escape(out), depth, 'metrics.jsonl')):
            run = read_run(os.path.dirname(metrics))
            # A run that continues another one begins at the step where that one ended.
            steps = run.step - run.records[0]['step']
            tokens = steps * config['total_batch_tokens']
            spent += sum(flops_of(run.config, tokens, run.records))
    final = count_steps(config, None) * config['total_batch_tokens'] * token_flops(config)
    cost = dict(method=method, flops=spent, share_of_this_run=spent / final)
    note = ''
    if target_tokens is not None:
        share = spent / (target_tokens * token_flops(config))
        cost.update(match_repetition=target_tokens, share_of_target_run=share)
        note = f', {share:.3f} times one of {target_tokens:,} tokens'
    with open(os.path.join(out, 'cost.json'), 'w', encoding='utf-8') as f:
        json.dump(cost, f, indent=1)
    print(f'{method}: {knobs}')
    print(
        f'cost of its phases: {spent:.3g} FLOPs, {spent / final:.2f} times a run of this config'
        f'{note}')
    print(f'train.py ... {path}')


# -- the command line ------------------------------------------------------------------------------


def check_seeds(seeds):
    is_right = seeds and all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds)
    if not is_right or len(set(seeds)) < len(seeds):
        raise BadInput(
            f'seeds = {seeds} must be a list of different whole numbers from 0 to 2**63 - 1, such '
            "as '[0, 1, 2]'.")


def check_shapes(heads, extra_layers, head_widths, ffn_ratios, n_params):
    """Raises BadInput for lists of arch that make no shapes."""
    lists = dict(heads=heads, extra_layers=extra_layers, head_widths=head_widths)
    for name, values in {**lists, 'ffn_ratios': ffn_ratios, 'n_params': n_params}.items():
        kinds = (int,) if name in lists else (int, float)
        least = 0 if name in ('extra_layers', 'n_params') else 1e-9
        if not values or any(type(v) not in kinds or v < least for v in values):
            whole = 'whole ' if name in lists else ''
            raise BadInput(f'{name} = {values} must be a list of {whole}numbers above 0.')
    if len(n_params) != 2 or n_params[0] > n_params[1]:
        raise BadInput(f'n_params = {n_params} must be [fewest, most] parameters.')


if __name__ == '__main__':
    command, rest = read_command(tuple(USED))
    folder = ''
    if command in ('configs', 'collect'):
        folders = [a for a in rest if not a.startswith('-')]
        folder = folders[0] if folders else ''
        rest = [a for a in rest if a != folder]
    # `--dirichlet` and `--grid` without a value are short for --design=...
    rest = [f'--design={a[2:]}' if a in ('--dirichlet', '--grid') else a for a in rest]
    mine, theirs = split_arguments(globals(), rest)
    if command in ('collect', ''):
        mine = rest
    configure(globals(), mine, verbose=False)
    for argument in theirs:
        if argument.startswith(('--out_dir=', '--resume=')):
            raise BadInput(f'{argument}: tools/sweep.py sets that for every run below --out.')
    own = [a[2:].partition('=')[0].partition('.')[0] for a in mine]
    warn_unused(mine, [name for name in own if name not in USED[command]], f'with {command}')
    if not out:
        raise BadInput('out is empty: name a folder for the runs, --out=out/sweep.')
    check_seeds(seeds)
    launch = Launch(out, theirs, jobs, threads, slurm)
    queue = []
    next_command = ''
    if command == 'collect':
        if out == 'out/sweep':
            out = folder if os.path.isdir(folder) else os.path.dirname(folder) or '.'
        collect(folder, out, bands, unit, at, loss, least)
    elif command == 'configs':
        queue = config_jobs(folder, launch, seeds)
        next_command = f'report.py {out}'
    else:
        config = train_config(theirs)
    if command in ('arch', 'grid'):
        combinations(grid, config)
        check_values(grid, theirs)
        next_command = f'sweep.py collect {out}'
        if command == 'grid':
            queue = grid_jobs(config, out, grid, seeds)
        else:
            check_shapes(heads, extra_layers, head_widths, ffn_ratios, n_params)
            limits = [parse_band(name) for name in bands] or [n_params]
            limits = [(max(low, n_params[0]), min(high, n_params[1])) for low, high in limits]
            shapes = arch_shapes(heads, extra_layers, head_widths, ffn_ratios)
            queue = arch_jobs(config, out, grid, shapes, limits, seeds)
        if not dry_run:
            prepare_sources(config)
    elif command == 'method':
        if dry_run:
            raise BadInput('dry_run is not for method: its later runs follow from the first ones.')
        names = prepare_sources(config)
        mixtures = make_design(design, n, seeds, names, method, reuse)
        n_steps = count_steps(config, None)
        search = Search(target, stages, {})
        check_search(search, config, names, method)
        if method == 'olmix':
            n_tokens = match_repetition or n_steps * config['total_batch_tokens']
            search.limits = olmix_limits(config, names, kl, n_tokens)
        launch.arguments = theirs + proxy_arguments(
            config, names, n_steps, match_repetition, proxy_lr_frac)
        knobs = learn_mixture(launch, names, mixtures, method, search, config['seed'])
        write_mixture(config, out, method, knobs, match_repetition)
    elif command == 'mixture':
        names = prepare_sources(config)
        if m not in (None, len(names)):
            raise BadInput(f'm = {m}, and the config has {len(names)} sources with a weight.')
        if len(names) < 2:
            raise BadInput('a sweep of mixtures needs two sources or more with a weight.')
        mixtures = make_design(design, n, seeds, names, '', reuse)
        if method:
            train_config([*theirs, f'--mixture={method}'])
        if method and break_step is None:
            raise BadInput(f'--method={method} needs --break_step, where its runs are continued.')
        # Children continue the data of their parents, so both use the same rows.
        n_steps = count_steps(config, None) if break_step is None else break_step + child_steps
        launch.arguments = theirs + proxy_arguments(
            config, names, n_steps, match_repetition, proxy_lr_frac)
        if break_step is None:
            queue = static_jobs(out, names, mixtures)
            next_command = f'mixing_laws.py fit-static {out}'
        else:
            queue = continued_jobs(
                config, launch, names, mixtures, method, break_step, child_steps)
            law = 'a-star' if method else 'fit-dynamic'
            next_command = f'mixing_laws.py {law} {out}/children'
    if dry_run:
        print(f'{len(queue)} runs')
    elif queue:
        run_all(queue, launch, 'runs')
        print(f'python tools/{next_command}')
