"""Many runs of train.py: architectures, grids of any knobs, mixtures for the mixing laws, and the phases of methods that take several runs.

    python tools/sweep.py arch --n_params="[4.5e6, 5.5e6]" --out=out/arch config/...                         # shapes of a size; --dry_run=True lists them
    python tools/sweep.py arch --grid.n_layer="[4, 8]" --grid.n_embd="[64, 96]" --out=out/arch config/...    # or of lists of your own
    python tools/sweep.py grid --grid.learning_rate="[1e-3, 2e-3]" --seeds="[0, 1]" --out=out/lr config/...  # any knobs of train.py
    python tools/sweep.py configs config/study/presence --seeds="[0, 1, 2]" --out=out/presence config/...    # every config file of a folder, but for _*.py
    python tools/sweep.py collect out/arch                                                                   # their curves in one table: tools/curves.py

    python tools/sweep.py mixture --dirichlet --n=9 --seeds="[0, 1, 2]" --out=out/static config/...          # every mixture with every seed
    python tools/sweep.py mixture --dirichlet --break_step=200 --out=out/dynamic config/...                  # parents, each continued by every mixture
    python tools/sweep.py mixture --dirichlet --break_step=200 --method=aioli --out=out/aioli config/...     # the same from a method's own trajectory
    python tools/sweep.py method --method=doremi --out=out/doremi config/...                                 # skillit | doge | doremi | dml | regmix

What tools/sweep.py does not know itself (config files, --key=value) is train.py's. Every run has a folder of its own; one that fails does not stop the
others; the same command again goes on where it stopped. --slurm=True writes array scripts in the place of running anything.
`method` ends with a config file that train.py takes, and with what the phases have cost.
"""
import ast
import fcntl
import glob
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, fields

import numpy as np
from tqdm import tqdm

if __name__ == '__main__':
    import _path  # noqa: F401

from configurator import BadInput, RunFault, configure, did_you_mean, parse_knobs
from data import prepare_missing
from lib.device import read_metrics
from lib.schedule import count_steps
from model import ModelConfig, count_parameters
from tools.curves import SHAPE, collect, parse_band
from tools.runs import flops_of, is_finished, planned_steps, read_run, read_table, token_flops

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# -- knobs --
out = 'out/sweep'                       # folder of the runs
design = 'dirichlet'                    # mixtures: dirichlet (space-filling) | grid (equally spaced, endpoints left out)
n = 9                                   # mixtures (a grid of three sources or more: at least)
m: int | None = None                    # sources; None: as many as the config has. Only checked
seeds = [0]                             # of train.py: initial weights and data order
break_step: int | None = None           # step at which parents stop and children continue them; None: no children
child_steps = 100                       # steps of a child
method = ''                             # mixture: parents are runs of this method, with every seed | method: which one
target = ''                             # method=regmix: source whose loss is to be low; '': the mean of all
heads = [4, 6, 8, 10, 12, 14, 16]       # arch: n_head; the shapes are all combinations of these four, unless `grid` has a shape's knob
head_widths = [8, 16, 24, 32, 40, 48, 56, 64]     # arch: n_embd / n_head
ffn_ratios = [0.5, 1, 1.5, 2]           # arch: ffn_dim / n_embd
extra_layers = [2, 4, 6, 8, 10, 12]     # arch: n_layer - n_head
grid: dict[str, list] = {}              # arch, grid: values of train.py's knobs, all combinations
n_params = [1e6, 3e8]                   # arch: parameters of a model, tables included: the fewest and the most
bands: dict = {}                        # arch: further limits, such as {'5M': None} (10 % to either side) | collect: band -> point to compare at (None: `at`)
unit = 'step'                           # collect: compare at equal step | tokens | flops
at: float | None = None                 # collect: the point; None: the last that half of the runs came to
loss = 'val'                            # collect: val | train
least = 0.0                             # collect: parameters that a model must have to count for what depth, heads and inner width do
dry_run = False                         # arch, grid: say what there is to run, write ablation_params.tsv, run nothing
jobs = 1                                # runs at a time
threads: int | None = None              # of every run; None: cores / jobs
slurm = False                           # write scripts for sbatch, run nothing

PHASED = ('skillit', 'doge', 'doremi', 'dml', 'regmix')


# -- mixtures ----------------------------------------------------------------------------------------------------------

def dirichlet_mixtures(n, m, seed=0):
    """n mixtures of m groups that fill the simplex: 16 * n draws from Dirichlet(1.5), of which the closest two become their midpoint until n are left."""
    p = np.random.default_rng(seed).dirichlet(np.full(m, 1.5), 16 * n)
    distance = ((p[:, None] - p[None]) ** 2).sum(2)
    np.fill_diagonal(distance, np.inf)
    while len(p) > n:
        i, j = np.unravel_index(distance.argmin(), distance.shape)
        p[i] = (p[i] + p[j]) / 2
        p, distance = np.delete(p, j, 0), np.delete(np.delete(distance, j, 0), j, 1)
        i -= i > j
        distance[i] = distance[:, i] = ((p - p[i]) ** 2).sum(1)
        distance[i, i] = np.inf
    return p


def grid_mixtures(n, m):
    """The coarsest grid of shares 1/k, 2/k, ... (none 0) with at least n mixtures: for two groups and 9 mixtures 0.1, 0.2, ... 0.9."""
    def parts(k, m):
        return [[k]] if m == 1 else [[first, *rest] for first in range(1, k - m + 2) for rest in parts(k - first, m - 1)]
    k = m
    while len(parts(k, m)) < n:
        k += 1
    return np.array(parts(k, m)) / k


# -- runs --------------------------------------------------------------------------------------------------------------

@dataclass
class Job:
    """A run of train.py to be: its folder, what it sets beyond the command line, the run that has to be finished before it, its own config file."""
    folder: str
    knobs: dict = field(default_factory=dict)
    after: 'Job | None' = None
    file: str | None = None                 # comes after the command line's files, before its --key=value

    def command(self, arguments):
        """resume=True: what was there before a kill goes on."""
        knobs = {**self.knobs, 'out_dir': self.folder, 'resume': True}
        files = [a for a in arguments if not a.startswith('--')] + ([self.file] if self.file else [])
        return [sys.executable, 'train.py', *files, *(a for a in arguments if a.startswith('--')), *(f'--{key}={value}' for key, value in knobs.items())]


def train_config(arguments):
    """The config that train.py would have, without running it. BadInput for what train.py would not take."""
    path = os.path.join(ROOT, 'train.py')
    with open(path, encoding='utf-8') as f:
        source = f.read()
    knobs, scope = parse_knobs(source, path), {'__file__': path}
    for node in ast.parse(source).body:
        name = node.target.id if isinstance(node, ast.AnnAssign) else node.targets[0].id if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) else ''
        if name in knobs and name not in scope:
            scope[name] = ast.literal_eval(node.value)
    return configure(scope, arguments, verbose=False)


def check_same_run(job, arguments):
    """BadInput when the folder holds a run with other knobs than the command's, which must not pass for this one."""
    path = os.path.join(job.folder, 'config.json')
    if not os.path.isfile(path):
        return
    with open(path, encoding='utf-8') as f:
        there = json.load(f)
    wanted = json.loads(json.dumps(train_config(job.command(arguments)[2:])))
    changed = [f'{key} {there.get(key)!r} there, {value!r} now' for key, value in wanted.items() if there.get(key) != value]
    if changed:
        raise BadInput(f"'{job.folder}' holds a run with other knobs: {'; '.join(changed[:5])}. Give the sweep another --out, or take the run away.")


def start(job, arguments, environment):
    """The process of a run, its log locked for as long as it lives: a sweep that was killed may have left it behind."""
    os.makedirs(job.folder, exist_ok=True)
    log = open(os.path.join(job.folder, 'log.txt'), 'a', encoding='utf-8')
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"'{job.folder}' is being trained by another process, perhaps of a sweep that was killed. Wait for it, or end it.") from None
    log.truncate(0)
    return subprocess.Popen(job.command(arguments), cwd=ROOT, env=environment, stdout=log, stderr=log)


def interrupt(*_):
    raise KeyboardInterrupt


def run_all(runs, arguments, what):
    """Trains all that are not finished, `jobs` at a time, those they wait for first. RunFault at the end names the ones that failed."""
    for job in runs:
        check_same_run(job, arguments)
    if slurm:
        return write_slurm(runs, arguments)
    signal.signal(signal.SIGTERM, interrupt)
    waiting, running, failed = [job for job in runs if not is_finished(job.folder)], {}, []
    lines = [tqdm(total=1, position=i + 1, leave=False, disable=None, bar_format='{desc:<50.50}{n_fmt:>8}/{total_fmt} steps{postfix}') for i in range(jobs)]
    environment = {**os.environ, 'OMP_NUM_THREADS': str(threads or max(1, os.cpu_count() // jobs))}
    with tqdm(total=len(runs), initial=len(runs) - len(waiting), desc=what, unit='run') as bar:
        try:
            while waiting or running:
                for job in waiting[:]:
                    if job.after is not None and job.after.folder in failed:
                        waiting.remove(job)
                        failed.append(job.folder)
                    elif len(running) < jobs and (job.after is None or is_finished(job.after.folder)):
                        waiting.remove(job)
                        running[start(job, arguments, environment)] = job
                time.sleep(0.1)
                for line, job in itertools.zip_longest(lines, running.values()):
                    show(line, job)
                for process in [p for p in running if p.poll() is not None]:
                    job = running.pop(process)
                    if process.returncode or not is_finished(job.folder):
                        failed.append(job.folder)
                        tqdm.write(f'{job.folder} failed (exit code {process.returncode}): {reason(job.folder)}')
                    bar.update()
        except KeyboardInterrupt:
            raise RunFault('stopped; the runs under way were saved. The same command again goes on.') from None
        finally:                                               # those that an error leaves behind are saved and ended as well
            for line in lines:
                line.close()
            for process in running:
                process.send_signal(signal.SIGINT)
            for process in running:
                process.wait()
    if failed:
        raise RunFault(f'{len(failed)} of {len(runs)} runs failed: {", ".join(failed[:5])}{" ..." if len(failed) > 5 else ""}; see log.txt in their folders. '
                       'The same command again tries them anew.')


def show(line, job):
    """A line of the live table: a run's step and loss, from what it has logged, read every two seconds. Empty without a run."""
    if line.disable or time.monotonic() - getattr(line, 'shown', 0) < 2:
        return
    line.shown = time.monotonic()
    if job is None:
        return line.clear()
    records, path = read_metrics(job.folder), os.path.join(job.folder, 'config.json')
    logged = [r for r in records[-20:] if 'train/loss' in r]
    if os.path.isfile(path):
        with open(path, encoding='utf-8') as f:
            line.total = planned_steps(json.load(f)) or 0
    line.n = logged[-1]['step'] + 1 if logged else 0
    line.set_description_str(os.path.basename(job.folder), refresh=False)
    line.set_postfix_str(f'loss {logged[-1]["train/loss"]:.3f}, {logged[-1]["train/tokens_per_second"]:,.0f} tokens/s' if logged else 'starts')


def reason(folder):
    """The last line of a run's log that says something."""
    with open(os.path.join(folder, 'log.txt'), encoding='utf-8', errors='replace') as f:
        lines = [line.strip() for line in f.read().replace('\r', '\n').split('\n') if line.strip()]
    return next((line for line in lines[::-1] if 'error' in line.lower()), lines[-1] if lines else 'it printed nothing')


def write_slurm(runs, arguments):
    """Array scripts in `out`: one for the runs that wait for none, one for their children."""
    os.makedirs(out, exist_ok=True)
    before = ''
    for name, part in (('first', [j for j in runs if j.after is None]), ('then', [j for j in runs if j.after is not None])):
        if not part:
            continue
        commands, script = os.path.join(out, f'{name}.txt'), os.path.join(out, f'{name}.sh')
        with open(commands, 'w', encoding='utf-8') as f:
            f.writelines(shlex.join(['python', *job.command(arguments)[1:]]) + '\n' for job in part)
        with open(script, 'w', encoding='utf-8') as f:
            f.write(f'#!/bin/bash\n#SBATCH --array=0-{len(part) - 1}%{jobs}\n#SBATCH --gpus=1\n#SBATCH --requeue\n'
                    f'cd {shlex.quote(ROOT)} || exit 1\neval "$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(os.path.abspath(commands))})"\n')
        print(f'written: {script}, {len(part)} runs: {before}sbatch {script}' + (' --dependency=afterok:<that job>' if before else ''))
        before = 'after the first, '


# -- architectures and grids -------------------------------------------------------------------------------------------

def arch_shapes():
    """The grid of heads, head_widths, ffn_ratios and extra_layers; as they are by default, that of the published sweep."""
    return [dict(n_head=h, n_kv_head=h, n_layer=h + more, n_embd=h * width, ffn_dim=int(h * width * ratio), head_dim=None)
            for h in heads for more in extra_layers for width in head_widths for ratio in ffn_ratios]


def combinations(lists):
    """All combinations of {name: list} as dicts; BadInput for what is no list."""
    for name, values in lists.items():
        if not isinstance(values, (list, tuple)) or not values:
            raise BadInput(f"--grid.{name}={values!r} must be a list of values, such as --grid.{name}='[1, 2]'.")
    return [dict(zip(lists, values)) for values in itertools.product(*lists.values())]


def grid_sweep(config, arguments, arch):
    """Runs of every combination with every seed. arch: shapes whose parameters are within the budget."""
    unknown = [name for name in grid if name not in config]
    if unknown:
        raise BadInput(f"--grid.{unknown[0]}: train.py has no knob '{unknown[0]}'.{did_you_mean(unknown[0], config)}")
    if not arch and not grid:
        raise BadInput("give a list, such as --grid.learning_rate='[1e-3, 2e-3]'.")
    in_model = [f.name for f in fields(ModelConfig)]
    shapes = arch_shapes() if arch and not set(grid) & set(SHAPE) else [{}]
    limits, jobs_to_run, rows, impossible, outside = [parse_band(name) for name in bands], [], [], [], 0
    for shape, values in itertools.product(shapes, combinations(grid)):
        knobs = {**shape, **values}
        if arch and 'n_head' in knobs and 'n_kv_head' not in knobs:
            knobs['n_kv_head'] = knobs['n_head']
        full = {**config, **knobs}
        name = '_'.join([*([str(full[k]) for k in SHAPE] if arch else ()), *(f'{k}={v}' for k, v in values.items() if not arch or k not in SHAPE)])
        if arch:
            try:
                n = count_parameters(ModelConfig(**{k: full[k] for k in in_model}))['total']
            except BadInput as error:
                impossible.append(f'{name}: {error}')
                continue
            if not n_params[0] <= n <= n_params[1] or limits and not any(low <= n <= high for low, high in limits):
                outside += 1
                continue
            rows.append((*(full[k] for k in SHAPE), n))
        jobs_to_run += [Job(os.path.join(out, name.replace('/', '_') + f'_seed{seed}'), {**knobs, 'seed': seed}) for seed in seeds]
    if impossible:
        print(f'{len(impossible)} combinations are not possible, the first is {impossible[0]}')
    if arch:
        rows = list(dict.fromkeys(rows))
        print(f'{len(rows)} models' + (f' of {min(r[-1] for r in rows):,} to {max(r[-1] for r in rows):,} parameters' if rows else '') + f'; {outside} are outside of the budget')
        os.makedirs(out, exist_ok=True)
        with open(os.path.join(out, 'ablation_params.tsv'), 'w', encoding='utf-8') as f:
            f.writelines('\t'.join(map(str, row)) + '\n' for row in rows)
        print(f'written: {os.path.join(out, "ablation_params.tsv")} ({", ".join(SHAPE)}, parameters)')
    if not jobs_to_run:
        raise BadInput('nothing is left to run. Widen n_params or bands, or give other lists.')
    if dry_run:
        print(f'{len(jobs_to_run)} runs')
        return
    sources_of(config)
    run_all(jobs_to_run, arguments, 'runs')
    print(f'python tools/sweep.py collect {out}')


def config_sweep(folder, arguments):
    """Runs of every config file in a folder with every seed, in the order of their names."""
    files = sorted(glob.glob(os.path.join(glob.escape(folder), '[!_]*.py'))) if os.path.isdir(folder) else []
    if not files:
        raise BadInput(f"'{folder}' has no config file in it. Say `tools/sweep.py configs FOLDER`, a folder of files that train.py takes.")
    jobs_to_run = [Job(os.path.join(out, f'{os.path.basename(file)[:-3]}_seed{seed}'), dict(seed=seed), file=os.path.abspath(file)) for seed in seeds for file in files]
    for job in jobs_to_run[:len(files)]:
        sources_of(train_config(job.command(arguments)[2:]))
    run_all(jobs_to_run, arguments, 'runs')
    print(f'python tools/report.py {out}')


# -- sweeps of mixtures ------------------------------------------------------------------------------------------------

def as_sources(names, p):
    return {name: round(float(x), 6) for name, x in zip(names, p)}


def designed(names, seed=0):
    """The sweep's mixtures: list of dicts source -> share."""
    if design not in ('dirichlet', 'grid'):
        raise BadInput(f"design = '{design}' must be dirichlet or grid.")
    points = dirichlet_mixtures(n, len(names), seed) if design == 'dirichlet' else grid_mixtures(n, len(names))
    return [as_sources(names, p) for p in points]


def static_jobs(folder, names, seeds):
    """Every mixture with every seed. Every seed has mixtures of its own under design='dirichlet', as the published sweeps do, but the first
    three are the first seed's: where mixtures are repeated, seed noise is known.
    """
    shared = designed(names, seeds[0])
    return [Job(os.path.join(folder, f'mix{i:02d}_seed{seed}'), dict(mixture='fixed', sources=p, seed=seed)) for seed in seeds
            for i, p in enumerate(shared[:3] + designed(names, seed)[3:] if design == 'dirichlet' else shared)]


def child_jobs(folder, parents, names, config):
    """Every parent continued by every mixture."""
    return [Job(os.path.join(folder, f'{os.path.basename(parent.folder)}_to{i:02d}'), dict(
        mixture='fixed', sources=p, seed=parent.knobs['seed'], continue_from=parent.folder, stop_step=break_step + child_steps,
        save_interval=config['max_steps']), parent) for parent in parents for i, p in enumerate(designed(names, seeds[0]))]


def mixture_sweep(config, arguments):
    names = sources_of(config)
    if slurm and method in ('skillit', 'doremi'):
        raise BadInput(f"--slurm=True cannot make what {method} starts from (its own runs, one after the other). Submit this command itself as a job.")
    if m is not None and m != len(names):
        raise BadInput(f'm = {m}, and the config has {len(names)} sources with a weight: {", ".join(names)}.')
    if len(names) < 2:
        raise BadInput('a sweep of mixtures needs two sources or more with a weight.')
    if break_step is None:
        if method:
            raise BadInput(f"--method={method} goes with --break_step: runs of the method are stopped there, and continued by fixed mixtures.")
        run_all(static_jobs(out, names, seeds), arguments, 'runs')
        print(f'python tools/mixing_laws.py fit-static {out}')
        return
    last = count_steps(config, None)
    if not 0 < break_step <= last - child_steps:
        raise BadInput(f'break_step = {break_step} and {child_steps} steps of a child go beyond the {last} steps of a run (max_steps), or there is nothing before.')
    parents_folder, children_folder = os.path.join(out, 'parents'), os.path.join(out, 'children')
    if method:
        folders = {seed: os.path.join(out, 'phases', f'seed{seed}') for seed in seeds}
        before = {seed: jobs_before(method, folders[seed], names, seed) for seed in seeds}
        if any(before.values()):
            run_all([job for seed in seeds for job in before[seed]], arguments, 'runs that the method starts from')
        parents = [Job(os.path.join(parents_folder, f'{method}_seed{seed}'), dict(
            mixture=method, seed=seed, stop_step=break_step, **needs_of(method, folders[seed], names, before[seed]))) for seed in seeds]
    else:
        parents = [Job(os.path.join(parents_folder, f'mix{i:02d}_seed{seed}'), dict(mixture='fixed', sources=p, seed=seed, stop_step=break_step))
                   for seed in seeds for i, p in enumerate(designed(names, seeds[0]))]
    run_all(parents + child_jobs(children_folder, parents, names, config), arguments, 'parents and children')
    print(f'python tools/mixing_laws.py {"a-star" if method else "fit-dynamic"} {children_folder}')


def sources_of(config):
    """Names of the sources with a weight; prepares what is not there, before runs at the same time would."""
    if config['epochs'] is not None or count_steps(config, None) is None:
        raise BadInput('a sweep needs max_steps or max_tokens, and no epochs: its runs have to be equally long.')
    if config['prepare'] is not None:
        prepare_missing(config['prepare'], config['data_dir'], config['sources'])
    return [name for name, weight in config['sources'].items() if weight > 0]


# -- methods of several runs -------------------------------------------------------------------------------------------

def jobs_before(method, folder, names, seed):
    """The runs that have to be there before a run of the method."""
    if method == 'skillit':
        return [Job(os.path.join(folder, f'only_{name}'), dict(mixture='fixed', sources=as_sources(names, [float(o == name) for o in names]), seed=seed))
                for name in names]
    return [Job(os.path.join(folder, 'reference'), dict(mixture='stratified', seed=seed))] if method == 'doremi' else []


def needs_of(method, folder, names, before):
    """What a run of the method has to have (Skill-It's graph, DoReMi's reference), of `jobs_before`: the knobs that say where it is."""
    if method == 'skillit':
        graph = []
        for job in before:
            first, last = read_run(job.folder, at=0), read_run(job.folder)
            graph.append(((first.loss - last.loss) / first.loss).tolist())
        path = os.path.join(folder, 'graph.json')
        with open(path, 'w', encoding='utf-8') as f:
            json.dump(dict(groups=names, graph=graph), f, indent=1)
        return dict(skillit_graph=path)
    return dict(doremi_reference=before[0].folder) if method == 'doremi' else {}


def method_phases(config, arguments):
    if method not in PHASED:
        raise BadInput(f"method = '{method}' must be one of {', '.join(PHASED)}." + (f' `train.py --mixture={method}` needs no other run.'
                       if method in ('fixed', 'stratified', 'influence', 'aioli') else ''))
    if slurm:
        raise BadInput('--slurm=True is of `tools/sweep.py mixture`: phases wait for each other. Submit this command itself as a job.')
    names, seed = sources_of(config), config['seed']
    before = jobs_before(method, out, names, seed)
    if before:
        run_all(before, arguments, 'runs that the method starts from')
    knobs = needs_of(method, out, names, before)
    weights = None
    if method in ('doge', 'doremi'):
        proxy = Job(os.path.join(out, 'proxy'), dict(mixture=method, seed=seed, **knobs))
        run_all([proxy], arguments, 'the proxy')
        last = [r for r in read_metrics(proxy.folder) if f'mixture/average_{names[0]}' in r][-1]
        weights = {name: last[f'mixture/average_{name}'] for name in names}
    elif method in ('dml', 'regmix'):
        from tools import mixing_laws
        folder = os.path.join(out, 'runs')
        run_all(static_jobs(folder, names, seeds), arguments, 'runs')
        table = read_table(folder)
        found = (mixing_laws.fit_static_runs(table, None)['optimum'] if method == 'dml' else mixing_laws.regmix_runs(table, target))['p']
        weights = as_sources(table.groups, found)
    path = os.path.join(out, 'mixture.py')
    with open(path, 'w', encoding='utf-8') as f:
        f.write(f'# The mixture of {method}, learned by: python tools/sweep.py method {shlex.join(sys.argv[2:])}\n'
                + (f"mixture = 'skillit'\nskillit_graph = {knobs['skillit_graph']!r}\n" if method == 'skillit' else
                   f"mixture = 'fixed'\nsources = { {name: round(w, 6) for name, w in weights.items()} }\n"))
    final = count_steps(config, None) * config['total_batch_tokens'] * token_flops(config)
    done = [read_run(os.path.dirname(path)) for depth in ('*', 'runs/*') for path in glob.glob(os.path.join(glob.escape(out), depth, 'metrics.jsonl'))]
    spent = sum(sum(flops_of(run.config, run.tokens, run.records)) for run in done)
    with open(os.path.join(out, 'cost.json'), 'w', encoding='utf-8') as f:
        json.dump(dict(method=method, flops=spent, share_of_this_run=spent / final), f, indent=1)
    print(f'{method}: ' + (', '.join(f'{name} {w:.4f}' for name, w in weights.items()) if weights else f'graph {knobs["skillit_graph"]}'))
    print(f'cost of its phases: {spent:.3g} FLOPs, {spent / final:.2f} times a run of this config\ntrain.py ... {path}')


# -- the command line --------------------------------------------------------------------------------------------------

if __name__ == '__main__':
    command = sys.argv[1] if len(sys.argv) > 1 else '--help'
    with open(__file__, encoding='utf-8') as _f:
        own = parse_knobs(_f.read(), __file__)
    if command == 'collect':
        configure(globals(), sys.argv[3:], verbose=False)
        folder = sys.argv[2] if len(sys.argv) > 2 else ''
        collect(folder, out if out != 'out/sweep' else folder if os.path.isdir(folder) else os.path.dirname(folder) or '.', bands, unit, at, loss, least)
        sys.exit()
    first = 3 if command == 'configs' else 2
    given = [f'--design={a[2:]}' if a in ('--grid', '--dirichlet') else a for a in sys.argv[first:]]
    mine = [a for a in given if a.startswith('--') and a[2:].partition('=')[0].partition('.')[0] in own]
    theirs = [a for a in given if a not in mine]
    configure(globals(), mine if command in ('arch', 'grid', 'configs', 'mixture', 'method') else ['--help'], verbose=False)
    for a in theirs:
        if a.startswith(('--out_dir=', '--resume=')):
            raise BadInput(f'{a}: tools/sweep.py sets that for every run. --out=folder says where they all go.')
    if command == 'configs':
        config_sweep(sys.argv[2] if len(sys.argv) > 2 else '', theirs)
        sys.exit()
    train_knobs = train_config(theirs)
    if command in ('arch', 'grid'):
        grid_sweep(train_knobs, theirs, command == 'arch')
    else:
        (mixture_sweep if command == 'mixture' else method_phases)(train_knobs, theirs)
