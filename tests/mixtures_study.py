"""Do recommended mixtures hold on runs that were not used to choose them?

    python tests/mixtures_study.py --runs=dclm_127_runs.json --natural="{...}"      # minutes
    python tests/mixtures_study.py --runs=dclm_ratios.csv --metrics=dclm_metrics.csv

It reads a sweep of mixtures, such as the public one of Olmix (arXiv:2602.12237: 127 runs of 24
topics), and prints two Markdown tables: what each recipe recommends from all runs, and how the
methods choose among held-out runs. In every split of a repeated K-fold, a method sees the other
runs only. It is judged by the actual losses of the held-out runs:

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
from tests.studies import print_header, print_row
from tools.best_mixture import Recipe, find_columns, kl_of, make_recipe, optimum
from tools.mixing_laws import fit_law, fit_static
from tools.regmix import columns_of, fit_trees, prior_of, regmix
from tools.runs import read_table

# -- knobs --
runs = ''                           # JSON table of runs, folder of runs, or CSV of ratios
metrics = ''                        # CSV of metrics
families: dict[str, list] = {}      # means of metrics (see tools/mixing_laws.py)
target = 'mean'                     # the loss to lower. '': the mean of all
natural: dict[str, float] = {}      # natural shares. {}: those of DCLM's topics, else by size
strengths = [0.0, 0.005, 0.02, 0.05]    # of the KL term
folds = 5
repeats = 4                         # splits into folds

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


def distance(p, q):
    """Total variation between mixtures p (..., M) and q (M,): the share that differs, (...)."""
    return np.abs(p - q).sum(-1) / 2


def print_recipes(names, p, y, shares, strengths):
    """What the law of all runs recommends under every strength of the KL term."""
    columns = find_columns(names, p)
    law = fit_static(columns.reduce(p), y)
    left_out = law.report['leave_one_out']['r2']
    print(f'{len(p)} runs of {len(names)} sources, R2 {law.report["fit"]["r2"]:.3f}, '
          f'with each run left out once {left_out:.3f}')
    start = float(law(columns.reduce(shares)))
    alone = float(law(columns.reduce(optimum([law], None, columns))))
    print(f'predicted for natural shares {start:.4f}, lowest observed {y.min():.4f}')
    print_header(
        'KL', 'predicted', 'gain on natural', 'cost of KL', 'sources above 1 %', 'largest share',
        'distance to the nearest run')
    for kl in strengths:
        best = optimum([law], Recipe(kl, shares), columns)
        value = float(law(columns.reduce(best)))
        j = int(best.argmax())
        print_row(
            kl, f'{value:.4f}', f'{start - value:.4f}', f'{value - alone:.4f}',
            int((best > 0.01).sum()), f'{names[j]} {best[j]:.3f}',
            f'{distance(p, best).min():.2f}')


def methods_on(names, p, y, shares, strengths):
    """Every method with what it learned from runs p (n, M), y (n,): dict name -> (score, best).

    score: a function from mixtures (h, M) to (h,), lower is better. best (M,): its recommendation.
    """
    columns = find_columns(names, p)
    q = columns.reduce(p)
    law = fit_law(q, y)
    trees = fit_trees(q, y)
    found = {}
    for kl in strengths:
        best = optimum([law], Recipe(kl, shares), columns)

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


def judge(names, p, y, shares, strengths):
    """Yields (method, rank, regret favoured, regret nearest, distance) of every split."""
    for repeat in range(repeats):
        parts = np.array_split(np.random.default_rng(repeat).permutation(len(y)), folds)
        for part in parts:
            train = np.setdiff1d(np.arange(len(y)), part)
            test_p = p[part]
            test_y = y[part]
            for name, (score, best) in methods_on(
                    names, p[train], y[train], shares, strengths).items():
                scores = score(test_p)
                far = distance(test_p, best)
                rank = spearmanr(scores, test_y).statistic
                favoured = test_y[scores.argmin()] - test_y.min()
                yield name, rank, favoured, test_y[far.argmin()] - test_y.min(), far.min()
            yield 'a run at random', 0.0, *[test_y.mean() - test_y.min()] * 2, np.nan


if __name__ == '__main__':
    configure(globals(), verbose=False)
    if not os.path.exists(runs):
        raise BadInput(f"--runs='{runs}' does not exist. Name a table or folder of runs.")
    table = read_table(runs, metrics, families).of(target)
    if not natural and set(table.groups) == set(DCLM):
        natural = DCLM
    recipe = make_recipe(table.groups, 0.0, natural, table.sizes, None, None)
    p = table.p
    y = table.loss.mean(1)
    print(f'natural shares: {"those of DCLM" if natural is DCLM else recipe.source}')
    print_recipes(table.groups, p, y, recipe.natural, strengths)
    rows = {}
    for name, *figures in judge(table.groups, p, y, recipe.natural, strengths):
        rows.setdefault(name, []).append(figures)
    n_splits = folds * repeats
    print(f'\n{n_splits} splits ({folds} folds, {repeats} times), means and standard deviations')
    print_header('method', 'rank', 'regret, favoured', 'regret, nearest', 'distance to nearest')
    for name, figures in rows.items():
        mean = np.mean(figures, 0)
        spread = np.std(figures, 0)
        cells = [f'{a:.3f} ± {b:.3f}' for a, b in zip(mean[:3], spread[:3], strict=True)]
        print_row(name, *cells, f'{mean[3]:.2f}')
