"""Do recommended mixtures hold on runs that were not used to choose them?

    python tests/mixtures_study.py --runs=dclm_127_runs.json --natural="{...}"      # minutes
    python tests/mixtures_study.py --runs=dclm_ratios.csv --metrics=dclm_metrics.csv
    python tests/mixtures_study.py --runs=train_mixture_1m.csv --metrics=train_pile_loss_1m.csv \\
        --held=test_mixture_1B.csv --held_metrics=test_pile_loss_1B.csv --target=''

It reads a sweep of mixtures, such as the public ones of Olmix (arXiv:2602.12237: 127 runs of 24
topics) and RegMix (arXiv:2407.01492: 512 runs of 17 domains, and others to test on), and prints
Markdown tables: what each recipe recommends from all runs, how well losses are predicted by laws,
linear functions and trees, how many runs that takes, and how the methods choose among held-out
runs. Those are a second sweep (`held`), perhaps of larger models, which all runs are fitted for; or
a part of the first: in every split of a repeated K-fold, a method sees the other runs only. It is
judged by the actual losses of the held-out runs:

- rank: Spearman correlation of its scores with the losses. A mixture without scores (natural,
  equal, the best run seen) is scored by the distance (total variation) to it
- regret, favoured: loss of the run that it scores best, minus that of the best held-out run
- regret, nearest: the same for the run whose mixture is nearest to the one it recommends
"""
import os

if __name__ == '__main__':
    import _path  # noqa: F401

import numpy as np
from scipy.stats import spearmanr

from configurator import BadInput, configure
from tests.studies import print_header, print_row, tell, write_summary
from tools.best_mixture import Recipe, find_columns, kl_of, make_recipe, optimum
from tools.mixing_laws import fit_law, fit_static, r2
from tools.regmix import columns_of, fit_trees, prior_of, regmix
from tools.runs import read_table

# -- knobs --
runs = ''                           # JSON table of runs, folder of runs, or CSV of ratios
metrics = ''                        # CSV of metrics
held = ''                           # a second sweep like `runs`, to judge on. '': parts of `runs`
held_metrics = ''                   # its CSV of metrics
families: dict[str, list] = {}      # means of metrics (see tools/mixing_laws.py)
out = 'out/mixtures_study'          # folder of the summary
target = 'mean'                     # the loss to lower. '': the mean of all
natural: dict[str, float] = {}      # natural shares. {}: those of DCLM or the Pile, else by size
strengths = [0.0, 0.005, 0.02, 0.05]    # of the KL term
folds = 5
repeats = 5                         # splits into folds, and choices of a number of runs
numbers = [24, 32, 48, 64, 96, 128, 256]        # of runs that predictions are made from

# DCLM's topics, by the tokens of the pool that the public swarm draws from (allenai/olmix,
# configs/examples/fit/dclm_per_family.yaml, relative_sizes, rounded).
DCLM = dict(
    adult_content=0.0114, art_and_design=0.0171, crime_and_law=0.0376, education_and_jobs=0.0382,
    electronics_and_hardware=0.0225, entertainment=0.0950, fashion_and_beauty=0.0092,
    finance_and_business=0.0657, food_and_dining=0.0203, games=0.0511, health=0.1009,
    history_and_geography=0.0280, home_and_hobbies=0.0346, industrial=0.0106, literature=0.0537,
    politics=0.0984, religion=0.0403, science_math_and_technology=0.0693, social_life=0.0444,
    software=0.0251, software_development=0.0484, sports_and_fitness=0.0346,
    transportation=0.0269, travel_and_tourism=0.0167)

# The Pile's domains, by their tokens (sail-sg/regmix, regression_fitting/regression.ipynb,
# rounded).
PILE = dict(
    arxiv=0.1133, freelaw=0.0796, nih_exporter=0.0039, pubmed_central=0.1854, wikipedia_en=0.0511,
    dm_mathematics=0.0160, github=0.1018, philpapers=0.0037, stackexchange=0.0665,
    enron_emails=0.0018, gutenberg_pg_19=0.0271, pile_cc=0.2369, ubuntu_irc=0.0118,
    europarl=0.0079, hackernews=0.0080, pubmed_abstracts=0.0388, uspto_backgrounds=0.0464)
PILE = {f'train_the_pile_{name}': share for name, share in PILE.items()}


def distance(p, q):
    """Total variation between mixtures p (..., M) and q (M,): the share that differs, (...)."""
    return np.abs(p - q).sum(-1) / 2


def print_recipes(names, p, losses, shares, strengths):
    """What the laws of all runs recommend under every strength of the KL term."""
    columns = find_columns(names, p)
    laws = [fit_static(columns.reduce(p), y) for y in losses.T]
    fit, left_out = (
        np.mean([law.report[kind]['r2'] for law in laws]) for kind in ('fit', 'leave_one_out'))
    tell(
        f'{len(p)} runs of {len(names)} sources, R2 {fit:.3f}, '
        f'with each run left out once {left_out:.3f}')

    def predict(mixture):
        return float(np.mean([law(columns.reduce(mixture)) for law in laws]))

    start = predict(shares)
    alone = predict(optimum(laws, None, columns))
    tell(f'predicted for natural shares {start:.4f}, lowest observed {losses.mean(1).min():.4f}')
    print_header(
        'KL', 'predicted', 'gain on natural', 'cost of KL', 'sources above 1 %', 'largest share',
        'distance to the nearest run')
    for kl in strengths:
        best = optimum(laws, Recipe(kl, shares), columns)
        value = predict(best)
        j = int(best.argmax())
        print_row(
            kl, f'{value:.4f}', f'{start - value:.4f}', f'{value - alone:.4f}',
            int((best > 0.01).sum()), f'{names[j]} {best[j]:.3f}',
            f'{distance(p, best).min():.2f}')


def law_of_mean(laws):
    """The mean of laws as a function from mixtures (h, M) to (h,)."""
    return lambda x: np.mean([law(x) for law in laws], 0)


def predictors(names, p, losses):
    """Functions from mixtures (h, M) to their mean loss (h,), fitted to p (n, M) and losses (n, k).

    Every loss has a law of its own, because a mean of laws is none.
    """
    columns = find_columns(names, p)
    q = columns.reduce(p)
    y = losses.mean(1)
    law = law_of_mean([fit_law(q, loss) for loss in losses.T])
    trees = fit_trees(q, y)
    slopes = np.linalg.lstsq(q, y, rcond=None)[0]       # shares sum to 1: no intercept is needed
    return {
        'law': lambda x: law(columns.reduce(x)),
        'linear': lambda x: columns.reduce(x) @ slopes,
        'trees': lambda x: trees.predict(columns.reduce(x))}


PREDICTORS = ('law', 'linear', 'trees')


def print_losses(table, second):
    """How well every loss of a sweep is predicted: of a second sweep, where there is one.

    Without it, every tenth run in turn is left out.
    """
    if second:
        tell('\nFitted to all runs and judged on the second sweep: R2 and rank correlation')
    else:
        tell('\nTen folds, the left-out runs together: R2 and rank correlation')
    print_header('loss', *(f'{name}, {kind}' for name in PREDICTORS for kind in ('R2', 'rank')))
    part = np.random.default_rng(0).permutation(len(table.runs)) % 10
    found = []
    for i, name in enumerate(table.evaluated):
        y = table.loss[:, i]
        if second:
            fitted = predictors(table.groups, table.p, y[:, None])
            y = second.loss[:, i]
            predicted = [fitted[method](second.p) for method in PREDICTORS]
        else:
            predicted = np.zeros((len(PREDICTORS), len(y)))
            for k in range(10):
                kept = part != k
                fitted = predictors(table.groups, table.p[kept], y[kept, None])
                predicted[:, ~kept] = [fitted[method](table.p[~kept]) for method in PREDICTORS]
        found.append([[r2(y, x), spearmanr(x, y).statistic] for x in predicted])
        print_row(name, *(f'{value:.3f}' for value in np.ravel(found[-1])))
    print_row('mean of the rows', *(f'{value:.3f}' for value in np.ravel(np.mean(found, 0))))


def print_numbers(names, p, losses, held, numbers):
    """How well a number of runs predicts the others, or the runs of `held`: (p, y) or None."""
    y = losses.mean(1)
    where = 'a second sweep' if held else 'the runs that were left out'
    # A law of few runs may be far off at a single mixture, so a mean of R2 would say nothing.
    tell(f'\nBy number of runs, medians of {repeats} choices of them, judged on {where}')
    # Losses of larger models are lower, so only their order can be predicted.
    kinds = ('rank', 'regret') if held else ('R2', 'rank', 'regret')
    print_header('runs', *(f'{name}, {kind}' for name in PREDICTORS for kind in kinds))
    # A law needs more runs than sources, and without a second sweep some runs have to be left out.
    most = len(p) if held else len(p) - 20
    for number in sorted({n for n in numbers if n <= most} | ({len(p)} if held else set())):
        if number < p.shape[1] + 2:
            continue
        found = []
        for repeat in range(repeats if number < len(p) else 1):
            order = np.random.default_rng(repeat).permutation(len(p))
            kept, left = order[:number], order[number:]
            test_p, test_y = held or (p[left], y[left])
            fitted = predictors(names, p[kept], losses[kept])
            figures = []
            for method in PREDICTORS:
                x = fitted[method](test_p)
                regret = test_y[x.argmin()] - test_y.min()
                figure = dict(
                    R2=r2(test_y, x), rank=spearmanr(x, test_y).statistic, regret=regret)
                figures.append([figure[kind] for kind in kinds])
            found.append(figures)
        print_row(number, *(f'{value:.3f}' for value in np.ravel(np.median(found, 0))))


def methods_on(names, p, losses, shares, strengths):
    """Every method with what it learned from runs p (n, M), losses (n, k): dict of (score, best).

    score: a function from mixtures (h, M) to (h,), lower is better. best (M,): its recommendation.
    """
    columns = find_columns(names, p)
    q = columns.reduce(p)
    y = losses.mean(1)
    laws = [fit_law(q, loss) for loss in losses.T]
    law = law_of_mean(laws)
    trees = fit_trees(q, y)
    found = {}
    for kl in strengths:
        best = optimum(laws, Recipe(kl, shares), columns)

        def score(other, kl=kl):
            penalty = kl * kl_of(other, shares) if kl else 0.0
            return law(columns.reduce(other)) + penalty

        found[f'law, KL {kl:g}' if kl else 'law alone'] = (score, best)
    for name, prior in (('natural', prior_of(shares, 1.0)), ('equal', None)):
        best = columns.expand(regmix(q, y, columns_of(prior, columns)))
        found[f'RegMix, {name} prior'] = (lambda x: trees.predict(columns.reduce(x)), best)
    points = {
        'natural': shares, 'equal shares': np.full(len(names), 1 / len(names)),
        'best run seen': p[y.argmin()]}
    for name, point in points.items():
        found[name] = (lambda x, point=point: distance(x, point), point)
    return found


def judge(names, p, losses, held, shares, strengths):
    """Yields (method, rank, regret favoured, regret nearest, distance) of every split.

    held: (p, y) of a second sweep to judge on, with all runs fitted once. None: parts of the runs
    """
    splits = []
    for repeat in range(repeats):
        splits += np.array_split(np.random.default_rng(repeat).permutation(len(p)), folds)
    if held:
        splits = [np.array([], dtype=np.int64)]
    for part in splits:
        train = np.setdiff1d(np.arange(len(p)), part)
        test_p, test_y = held or (p[part], losses[part].mean(1))
        methods = methods_on(names, p[train], losses[train], shares, strengths)
        for name, (score, best) in methods.items():
            scores = score(test_p)
            far = distance(test_p, best)
            rank = spearmanr(scores, test_y).statistic
            favoured = test_y[scores.argmin()] - test_y.min()
            yield name, rank, favoured, test_y[far.argmin()] - test_y.min(), far.min()
        yield 'a run at random', 0.0, *[test_y.mean() - test_y.min()] * 2, np.nan


if __name__ == '__main__':
    configure(globals(), verbose=False)
    os.makedirs(out, exist_ok=True)
    if not os.path.exists(runs):
        raise BadInput(f"--runs='{runs}' does not exist. Name a table or folder of runs.")
    whole = read_table(runs, metrics, families)
    table = whole.of(target)
    where = ''
    for known, shares in (('DCLM', DCLM), ('the Pile', PILE)):
        if not natural and set(table.groups) == set(shares):
            natural = shares
            where = f'those of {known}'
    recipe = make_recipe(table.groups, 0.0, natural, table.sizes, None, None)
    p = table.p
    losses = table.loss
    tell(f'natural shares: {where or recipe.source}')
    second = judged_on = None
    if held:
        second = read_table(held, held_metrics, families)
        if (second.groups, second.evaluated) != (whole.groups, whole.evaluated):
            raise BadInput(
                f'{held} has other sources or losses than {runs}, or another order of them.')
        judged_on = second.p, second.of(target).loss.mean(1)
    print_recipes(table.groups, p, losses, recipe.natural, strengths)
    print_losses(whole, second)
    print_numbers(table.groups, p, losses, judged_on, numbers)
    rows = {}
    for name, *figures in judge(table.groups, p, losses, judged_on, recipe.natural, strengths):
        rows.setdefault(name, []).append(figures)
    if held:
        tell('\nFitted to all runs and judged on the second sweep')
    else:
        n_splits = folds * repeats
        tell(f'\n{n_splits} splits ({folds} folds, {repeats} times), means and standard deviations')
    print_header('method', 'rank', 'regret, favoured', 'regret, nearest', 'distance to nearest')
    for name, figures in rows.items():
        mean = np.mean(figures, 0)
        spread = np.std(figures, 0)
        cells = [f'{value:.3f}' for value in mean[:3]]
        if not held:
            cells = [f'{a:.3f} ± {b:.3f}' for a, b in zip(mean[:3], spread[:3], strict=True)]
        print_row(name, *cells, f'{mean[3]:.2f}')
    write_summary(out)
