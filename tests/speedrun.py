"""A data speedrun: who gets the lowest loss on a goal, when everything has to be paid?

    python tests/speedrun.py --text=folder                  # small: a night of two CPU cores
    python tests/speedrun.py --text=folder --scale=gpu      # one GPU, every run under 10 minutes

It prints the tables of docs/RESULTS.md and draws bits per byte against FLOPs. Finished runs are
kept, so it can be done in pieces. `folder` holds train/, val/ and probes/.

The rules. Model and FLOPs are fixed (config/study/speedrun). What is measured is the bits per byte
of text that nothing else reads: of code, math and web in equal parts (goal 'all'), or of math alone
(goal 'math'), of which the natural mixture has two thousandths. There are nine sources as they
occur, of very different size, so that repetition bites. One is nearly the same as another, and one
is noise. No method is told which.

Every arm pays for what it measures: a run with measurements is shorter by their FLOPs, a method
with proxies spends PROXY_SHARE of the budget on them. The tables show what came of it. `oracle`
pays nothing: it is the law's optimum from `n_oracle` runs of full length, and shows what a fixed
mixture could reach.

    natural         shares by size, so all sources are read equally often
    equal, unimax   equal shares, and as equal as 4 epochs allow
    schedule        natural shares for 60 % of the run, then half of it the sources like the goal
    influence       weights by influence on probe sets of the goal, step rule; _prop: proportional
                    rule; _last: that, by the last block; _select: step rule by the last block,
                    and drops rows as well
    ado             laws of the training loss, without a proxy
    aioli, doge, doremi, skillit    they see validation text of the sources, not the goal
    regmix, olmix   trees, and a law with KL term and cap on epochs, both fitted to small proxies
"""
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np

if __name__ == '__main__':
    import _path  # noqa: F401

from configurator import BadInput, at_least, configure, configure_script, one_of, pick
from methods.reweight import flops_of_rows
from model import ModelConfig, flops_per_token
from tests.methods_study import Setup, learn
from tests.studies import (
    ROOT,
    documents_of,
    print_header,
    print_row,
    read_arms,
    run,
    tell,
    train_arms,
    write_config,
    write_documents,
    write_summary,
)
from tools import plots
from tools.best_mixture import Recipe, optimum
from tools.mixing_laws import fit_law
from tools.regmix import prior_of, regmix
from tools.report import difference, holm, p_text, paired, paired_p, weights_of
from tools.runs import flops_of, read_run, sizes_of
from tools.sweep import dirichlet_mixtures

# -- knobs --
text = ''                           # folder with train/*.jsonl.gz, val/ and probes/
out = 'out/speedrun'                # prepared data, runs, tables and figures
scale: one_of('small', 'gpu') = 'small'   # config/study/speedrun/<scale>.py
goal: one_of('all', 'math') = 'all'
arms: list[str] = []                # of ARMS. []: all. `natural` always runs
seeds = [0, 1, 2]                   # of initial weights and data order
n_proxies: at_least(11) = 12        # of regmix and olmix
n_oracle: at_least(11) = 16         # runs of full length that oracle is fitted to
steps: at_least(200) | None = None  # of a run that measures nothing. None: those of the scale
jobs = 2                            # runs at the same time, of one thread each

# Source -> (file of its training text, share of the documents that is used).
SOURCES = {
    'web': ('web_edu', 1.0), 'wiki': ('wiki', 1.0), 'books': ('books', 1.0),
    'papers': ('papers', 1.0), 'qa': ('qa', 1.0), 'code': ('code', 0.05), 'math': ('math', 0.008),
    'mirror': ('wiki', 1.0), 'noise': ('noise', 1.0)}
LIKE_GOAL = {'all': ('code', 'math', 'web'), 'math': ('math',)}
DROPPED = 0.1                       # share of words that a document of `mirror` lacks
PROXY_SHARE = 0.3                   # of the budget, for phases before a run
# The proxies of regmix and olmix take a third of the FLOPs of a token of `small`, and batches of a
# quarter.
PROXY = dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=64, ffn_dim=160)

AIOLI_ROUNDS = 4
KEPT = 0.6                          # share of the rows that selection keeps, about
# Ten parts of a run, and a measurement between two of them. With the default eta of 0.3 the weights
# could hardly go from one end to the other in so few.
INFLUENCE = dict(
    mixture='influence', mixture_eta=0.45, influence_layers='embedding+head', probe_rows=32,
    influence_rows=12)
ARMS = {
    'natural': dict(mixture='natural'),
    'equal': dict(mixture='stratified'),
    'unimax': dict(mixture='unimax'),
    'schedule': dict(mixture='schedule'),
    'influence': INFLUENCE,
    'influence_prop': dict(INFLUENCE, influence_rule='proportional'),
    'influence_last': dict(INFLUENCE, influence_rule='proportional', influence_layers='last'),
    # By the last block, because the others would double the price of judging every row.
    'influence_select': dict(INFLUENCE, influence_layers='last', select='online'),
    'ado': dict(mixture='ado', weigh_by='size'),
    'aioli': dict(mixture='aioli', mixture_rows=16, aioli_sweeps=2),
    'skillit': dict(mixture_rows=16),
    'doge': {}, 'doremi': {}, 'regmix': {}, 'olmix': {}, 'oracle': {}}
BY_SOURCES = ('doge', 'doremi', 'skillit')      # phases that see validation text of the sources
# Arms whose runs depend on the goal.
BY_GOAL = (
    'schedule', 'influence', 'influence_prop', 'influence_last', 'influence_select', 'regmix',
    'olmix', 'oracle')


# -- data ------------------------------------------------------------------------------------------


def near_copies(documents):
    """Every document without a tenth of its words."""
    rng = np.random.default_rng(0)
    for document in documents:
        words = re.findall(r'\s*\S+', document)
        kept = rng.random(len(words)) >= DROPPED
        yield ''.join(word for word, keep in zip(words, kept, strict=True) if keep)


def prepare(text, data):
    """The sources, and per domain of the goal a probe set and a source that is only evaluated.

    Documents with even numbers of probes/ are the probe set, the others are evaluated.
    """
    for name, (file, share) in SOURCES.items():
        documents = list(documents_of(text, f'train/{file}'))
        documents = documents[:math.ceil(share * len(documents))]
        if name == 'mirror':
            documents = near_copies(documents)
        write_documents(f'{data}_text/train/{name}.jsonl.gz', documents)
        write_documents(f'{data}_text/val/{name}.jsonl.gz', documents_of(text, f'val/{file}'))
    for domain in LIKE_GOAL['all']:
        documents = list(documents_of(text, f'probes/{domain}'))
        write_documents(f'{data}_text/probes/{domain}.jsonl.gz', documents[::2])
        for split in ('train', 'val'):      # it is never trained on
            write_documents(f'{data}_text/{split}/{domain}_goal.jsonl.gz', documents[1::2])
    run('prepare/folder.py', f'--input={data}_text', f'--out={data}')


# -- what an arm can afford ------------------------------------------------------------------------


def common_knobs(data, steps):
    """Knobs of all runs of so many steps, phases among them."""
    return dict(
        data_dir=data, sources=dict.fromkeys(SOURCES, 1.0), max_steps=steps,
        warmup_steps=max(5, steps // 20), mixture_interval=max(1, steps // 16),
        mixture_warmup=steps // 8, log_interval=5, eval_interval=steps, eval_rows=256,
        save_interval=steps)


def model_of(files):
    """(ModelConfig, config) of train.py with these config files."""
    config = configure_script(os.path.join(ROOT, 'train.py'), list(files))
    return pick(ModelConfig, config), config


def measured_rows(arm, config, model, n_domains):
    """What the measurements of an arm cost, in trained rows: (all in all, per trained row)."""
    block_size = config['block_size']
    whole = block_size * flops_per_token(model, block_size)
    knobs = ARMS[arm]
    part = flops_of_rows(model, knobs.get('influence_layers', 'last'), block_size) / whole
    n_rows = per_row = 0.0
    if knobs.get('mixture') == 'influence':
        n_rows = 9 * part * (
            n_domains * knobs['probe_rows'] + len(SOURCES) * knobs['influence_rows'])
    if knobs.get('select') == 'online':
        # Rows of the probe to compare with, and two more rows of every source than are trained on.
        n_rows += 9 * part * (n_domains * knobs['probe_rows'] / 2 + 2 * len(SOURCES))
        # From mixture_warmup on, rows are scored until enough of them are kept.
        per_row = 9 / 10 * part / KEPT
    if 'mixture_rows' in knobs:
        # Every round of aioli evaluates all sources before, and after each exploration of 2 sweeps.
        evaluations = dict(aioli=AIOLI_ROUNDS * (2 * len(SOURCES) + 1), skillit=9)[arm]
        # A forward pass is a third of a trained row.
        n_rows += evaluations * len(SOURCES) * knobs['mixture_rows'] / 3
    return n_rows, per_row


def paid_steps(arm, steps, config, model, n_domains, phases):
    """Steps that are left for a run. phases: what was spent before, in runs of `steps`."""
    batch_rows = config['total_batch_tokens'] // config['block_size']
    fixed, per_row = measured_rows(arm, config, model, n_domains)
    return int((steps * (1 - phases) - fixed / batch_rows) / (1 + per_row))


# -- phases ----------------------------------------------------------------------------------------


def phase_steps(method, steps):
    """Steps of the runs before, so that they cost PROXY_SHARE of a run of `steps`."""
    # Reference, proxy and the reference's forward; a proxy with as many validation rows; nine runs.
    runs = {'doremi': 2 + 1 / 3, 'doge': 2.0, 'skillit': len(SOURCES)}
    return max(10, int(PROXY_SHARE * steps / runs[method]))


def learn_phases(method, seed, folder, data, base, steps, config):
    """Runs the phases of a method in BY_SOURCES. Returns (knobs of the run, cost in runs)."""
    n = phase_steps(method, steps)
    files = [base, write_config(os.path.join(folder, f'{method}.py'), common_knobs(data, n))]
    knobs = dict(mixture_rows=config['batch_size']) if method == 'doge' else {}
    # Of the two ones, the first is for laws alone.
    setup = Setup(list(SOURCES), folder, data, files, {method: knobs}, 1, 1)
    knobs, cost = learn(setup, method, seed, 1.0)[method]
    return knobs, cost * n / steps


def goal_losses(run, domains):
    return [run.final[f'val/loss_{domain}_goal'] for domain in domains]


def sweep(folder, files, n, seed, jobs, domains):
    """Trains n mixtures. Returns shares (n, sources), and losses of the goal's domains (n, k)."""
    p = dirichlet_mixtures(n, len(SOURCES))
    arms = {}
    for i, shares in enumerate(p):
        arms[f'mix{i:02d}'] = dict(mixture='fixed', sources=with_goals(shares))
    train_arms(folder, arms, [seed], jobs, *files)
    runs = read_arms(folder, arms, [seed]).values()
    return p, np.array([goal_losses(run, domains) for run in runs])


def with_goals(shares):
    """Weights of the sources, and 0 for those that are only evaluated."""
    weights = {name: round(float(share), 6) for name, share in zip(SOURCES, shares, strict=True)}
    return weights | {f'{domain}_goal': 0.0 for domain in LIKE_GOAL['all']}


def learn_mixtures(seed, folder, data, base, steps, jobs, sizes, domains):
    """The mixtures of regmix and olmix from small proxies: dict method -> (knobs, cost in runs)."""
    model, config = model_of([base])
    proxy, _ = model_of([base, *(f'--{name}={value}' for name, value in PROXY.items())])
    block_size = config['block_size']
    ratio = flops_per_token(proxy, block_size) / flops_per_token(model, block_size)
    batch_tokens = config['total_batch_tokens'] // 4
    n = max(10, int(PROXY_SHARE * steps / (n_proxies * ratio / 4)))
    common = write_config(os.path.join(folder, 'proxies.py'), {
        **common_knobs(data, n), **PROXY, 'total_batch_tokens': batch_tokens,
        'batch_size': min(config['batch_size'], batch_tokens // block_size)})
    p, losses = sweep(
        os.path.join(folder, f'proxies_seed{seed}'), [base, common], n_proxies, seed, jobs, domains)
    natural = np.array([sizes[name] for name in SOURCES], dtype=np.float64)
    natural /= natural.sum()
    # No source is read more than 4 times in the run.
    caps = 4 * natural * sum(sizes.values()) / (steps * config['total_batch_tokens'])
    trees = regmix(p, losses.mean(1), prior_of(natural, 1.0))
    law = optimum([fit_law(p, y) for y in losses.T], Recipe(0.02, natural, caps))
    cost = n_proxies * n * ratio / 4 / steps
    return {
        'regmix': (dict(mixture='fixed', sources=with_goals(trees)), cost),
        'olmix': (dict(mixture='fixed', sources=with_goals(law)), cost)}


def learn_all(names, seeds, out, data, base, steps, config, sizes):
    """Runs all phases. Returns dict (arm, seed) -> (knobs of the run, cost in runs)."""
    domains = LIKE_GOAL[goal]
    folder = os.path.join(out, f'{scale}_phases')
    learned = {}
    tasks = [(method, seed) for method in BY_SOURCES if method in names for seed in seeds]
    with ThreadPoolExecutor(jobs) as pool:
        found = pool.map(
            lambda task: learn_phases(*task, folder, data, base, steps, config), tasks)
        learned |= dict(zip(tasks, found, strict=True))
    if 'regmix' in names or 'olmix' in names:
        for seed in seeds:
            found = learn_mixtures(seed, folder, data, base, steps, jobs, sizes, domains)
            learned |= {(method, seed): found[method] for method in found if method in names}
    if 'oracle' in names:
        place = os.path.join(out, f'{scale}_oracle')
        common = write_config(os.path.join(place, 'common.py'), common_knobs(data, steps))
        p, losses = sweep(place, [base, common], n_oracle, 100, jobs, domains)
        # A weak pull to equal shares, because the law of few runs may favour a corner.
        best = optimum([fit_law(p, y) for y in losses.T], Recipe(0.005))
        for seed in seeds:
            learned['oracle', seed] = dict(mixture='fixed', sources=with_goals(best)), 0.0
    return learned


# -- runs ------------------------------------------------------------------------------------------


def arm_knobs(arm, learned, n, domains, folder):
    """Knobs of train.py for a run of n steps. learned: the knobs of its phases, {} without"""
    knobs = {**ARMS[arm], **learned}
    knobs = {
        'mixture_interval': n // 10, 'mixture_warmup': n // 10, 'max_steps': n,
        'warmup_steps': n // 20, 'eval_interval': math.ceil(n / 4), 'save_interval': n,
        'sources': {}, **knobs}
    knobs['sources'] = with_goals(np.ones(len(SOURCES))) | knobs['sources']
    if knobs.get('mixture') == 'influence':
        knobs['probe'] = dict.fromkeys(domains, 1.0)
    if arm == 'ado':
        knobs['mixture_interval'] = n // 20
    if arm == 'aioli':
        knobs |= dict(mixture_interval=n // AIOLI_ROUNDS, mixture_warmup=0)
    if arm == 'schedule':
        knobs['mixture_schedule'] = schedule_path(folder)
    return knobs


def schedule_path(folder):
    return os.path.join(folder, f'schedule_{goal}.json')


def run_name(arm):
    return f'{arm}_{goal}' if arm in BY_GOAL else arm


def write_schedule(path, sizes, domains):
    """Natural shares up to 60 % of the run. From 70 % on, half the rows are like the goal."""
    natural = {name: sizes[name] / sum(sizes.values()) for name in SOURCES}
    like = {name: 0.5 / len(domains) if name in domains else 0.0 for name in SOURCES}
    late = {name: 0.5 * natural[name] + like[name] for name in SOURCES}
    points = [dict(share=0.0, weights=natural), dict(share=0.6, weights=natural),
              dict(share=0.7, weights=late)]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w', encoding='utf-8') as f:
        json.dump(dict(interpolation='linear', points=points), f)


def bits(run, domains, at=None):
    """Mean bits per byte of the domains of the goal, at a record (None: the last evaluation)."""
    record = run.final if at is None else at
    return float(np.mean([record[f'val/bpb_{domain}_goal'] for domain in domains]))


def curve(run, phases, unit, domains):
    """(FLOPs spent, bits per byte) at every evaluation of a run. FLOPs in runs of `unit` FLOPs."""
    found = []
    extra = 0.0
    for record in run.records:
        extra = record.get('mixture/extra_flops', extra)
        if f'val/bpb_{domains[0]}_goal' in record and record['step'] > 0:
            tokens = record['step'] * run.config['total_batch_tokens']
            trained, _ = flops_of(run.config, tokens, [])
            found.append((phases + (trained + extra) / unit, bits(run, domains, record)))
    return found


def print_table(names, entries, phases, unit, domains):
    """One row for every arm. entries (arm, seed) -> run; phases (arm, seed) -> cost in runs"""
    runs = list(entries.values())

    def measure(run):
        return bits(run, domains)

    p = [paired_p(runs, arm, 'natural', measure) for arm in names if arm != 'natural']
    corrected = dict(zip([arm for arm in names if arm != 'natural'], holm(p), strict=True))
    parts = domains if len(domains) > 1 else []
    print_header(
        'arm', 'bits per byte (seeds)', 'against natural (95 %)', 'p (Holm)', *parts,
        'FLOPs before, beside', 'all', *(f'final share of {name}' for name in SOURCES))
    for arm in names:
        of_arm = {seed: run for (name, seed), run in entries.items() if name == arm}
        values = [measure(run) for run in of_arm.values()]
        seeds_text = ' / '.join(f'{value:.3f}' for value in values)
        against = '' if arm == 'natural' else difference(paired(runs, arm, 'natural', measure), 3)
        by_domain = [np.mean([bits(run, [domain]) for run in of_arm.values()]) for domain in parts]
        before = np.mean([phases.get((arm, seed), 0.0) for seed in of_arm])
        trained = np.mean([flops_of(r.config, r.tokens, [])[0] / unit for r in of_arm.values()])
        beside = np.mean([flops_of(r.config, r.tokens, r.records)[1] / unit
                          for r in of_arm.values()])
        last = [weights_of(run)[-1] for run in of_arm.values()]
        shares = [np.mean([weights.get(name, 0.0) for weights in last]) for name in SOURCES]
        print_row(
            arm, f'{np.mean(values):.3f} ({seeds_text})', against,
            p_text(corrected[arm]) if arm in corrected else '', *(f'{v:.3f}' for v in by_domain),
            f'{before:.0%}, {beside:.0%}', f'{before + trained + beside:.2f}',
            *(f'{share:.2f}' for share in shares))


if __name__ == '__main__':
    configure(globals(), verbose=False)
    if not os.path.isdir(text):
        raise BadInput(f"--text='{text}' is no folder. It holds train/, val/ and probes/.")
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise BadInput(f"arms: '{unknown[0]}' is none of {', '.join(ARMS)}.")
    text, out = os.path.abspath(text), os.path.abspath(out)
    data = os.path.join(out, 'data')
    prepare(text, data)
    base = os.path.join(ROOT, 'config/study/speedrun', f'{scale}.py')
    model, config = model_of([base])
    steps = steps or config['max_steps']
    unit = steps * config['total_batch_tokens'] * flops_per_token(model, config['block_size'])
    domains = LIKE_GOAL[goal]
    sizes = sizes_of(data, SOURCES)
    folder = os.path.join(out, scale)           # arms that do not depend on the goal serve both
    os.makedirs(os.path.join(out, f'{scale}_{goal}'), exist_ok=True)
    common = write_config(os.path.join(folder, 'common.py'), common_knobs(data, steps))
    write_schedule(schedule_path(folder), sizes, domains)
    names = [arm for arm in ARMS if arm == 'natural' or not arms or arm in arms]
    learned = learn_all(names, seeds, out, data, base, steps, config, sizes)
    costs = {key: cost for key, (_, cost) in learned.items()}
    entries = {}
    for seed in seeds:
        knobs = {}
        for arm in names:
            found, cost = learned.get((arm, seed), ({}, 0.0))
            n = paid_steps(arm, steps, config, model, len(domains), cost)
            knobs[run_name(arm)] = arm_knobs(arm, found, n, domains, folder)
        train_arms(folder, knobs, [seed], jobs, base, common)
        for arm in names:
            entry = read_run(os.path.join(folder, 'runs', f'{run_name(arm)}_seed{seed}'))
            entry.arm = arm
            entries[arm, seed] = entry
    tell(f'\ngoal {goal}, scale {scale}: {unit:.2e} FLOPs, {steps} steps without measurements')
    print_table(names, entries, costs, unit, domains)
    curves = {}
    for arm in names:
        of_seeds = [curve(entries[arm, s], costs.get((arm, s), 0.0), unit, domains) for s in seeds]
        curves[arm] = np.mean(of_seeds, 0)
    figure = plots.draw_budget(os.path.join(out, f'{scale}_{goal}', 'budget.png'), curves)
    print(f'figure: {figure}')
    write_summary(os.path.dirname(figure))
