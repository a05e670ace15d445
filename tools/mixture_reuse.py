"""A sweep of mixtures after sources were added, revised or dropped, which reuses an earlier one.

As in Olmix (Chen et al. 2026, arXiv:2602.12237, section on mixture reuse): the sources that did not
change keep the ratios that were recommended for them. They count as one source, KEPT, and the new
sweep only varies the sources that changed, and KEPT. Dropping sources needs no run at all.

`python tools/mixing_laws.py recompute out/sweep --add=...` writes such a plan, which tools/sweep.py
reads. fit-static finds the fixed ratios in the runs of the new sweep by itself.
"""
from configurator import BadInput, did_you_mean, read_json

KEPT = 'kept sources'

# A law of m sources has m + 1 parameters per evaluated group. The fits take two to three runs each.
RUNS_PER_PARAMETER = 3


def runs_for(n_sources):
    """Runs of a sweep that determines the laws of so many sources. 0 for a single one."""
    return RUNS_PER_PARAMETER * (n_sources + 1) if n_sources > 1 else 0


def plan_reuse(names, best, add, drop, free):
    """Plans the sweep for a changed set of sources.

    names  of the M sources of the earlier sweep       best  (M,) the mixture it recommends
    add    names of new sources      drop  of those no longer used
    free   of earlier ones whose share is chosen anew, such as revised ones
    Returns a dict: frozen (source -> share among the sources that keep their ratios), sources (of
    the new sweep, KEPT first), runs, runs_without, note. Raises BadInput for names that do not fit.
    """
    for what, given in (('drop', drop), ('free', free)):
        for name in given:
            if name not in names:
                raise BadInput(
                    f"{what}: '{name}' is no source of these runs.{did_you_mean(name, names)}")
    for name in add:
        if name in names or name == KEPT:
            raise BadInput(f"add: '{name}' is a source already. If it was revised, use --free.")
    every = [*add, *drop, *free]
    twice = {name for name in every if every.count(name) > 1}
    if twice:
        raise BadInput(f'{", ".join(sorted(twice))}: named twice in add, drop and free.')
    if not every:
        raise BadInput('nothing has changed: name sources in --add, --drop or --free.')
    shares = {
        name: float(p) for name, p in zip(names, best, strict=True) if name not in [*drop, *free]}
    total = sum(shares.values())
    if total <= 0:
        raise BadInput(
            'no source keeps a ratio: the best mixture has nothing of those that are left. Make a '
            'whole new sweep.')
    frozen = {name: p / total for name, p in shares.items()}
    sources = [KEPT, *free, *add] if free or add else [KEPT]
    runs = runs_for(len(sources))
    n_all = len(frozen) + len(free) + len(add)
    without = runs_for(n_all)
    if runs:
        how = f'{runs} runs over {len(sources)} sources ({", ".join(sources)})'
    else:
        how = 'no run: the sources that are left keep their ratios'
    note = (
        f'with reuse: {how}. Without: {without} runs over {n_all} sources. It saves '
        f'{without - runs} runs, {100 * (1 - runs / max(without, 1)):.0f} %.')
    return dict(
        frozen=frozen, sources=sources, runs=runs, runs_without=without, note=note)


def read_plan(path, names):
    """Reads a plan that `plan_reuse` made, for a sweep of the sources `names`.

    Raises BadInput for another file, and unless the plan is about these sources.
    """
    plan = read_json(path)
    try:
        frozen = {str(name): float(p) for name, p in plan['frozen'].items()}
        sources = [str(name) for name in plan['sources']]
        is_right = abs(sum(frozen.values()) - 1) < 1e-3 and min(frozen.values()) >= 0
        is_right = is_right and sources[0] == KEPT
    except (LookupError, TypeError, ValueError, AttributeError):
        is_right = False
    if not is_right:
        raise BadInput(
            f'{path} is not what `mixing_laws.py recompute` writes. Write it again with that.')
    planned = {*frozen, *sources[1:]}
    if planned != set(names):
        differing = ', '.join(sorted(planned ^ set(names)))
        raise BadInput(
            f'{path} and the config do not have the same sources: only one has {differing}. Give '
            'every source of the plan a weight in --sources, and no other.')
    if len(sources) < 2:
        raise BadInput(
            f'{path} needs no sweep: the sources that are left keep their ratios. Train with '
            f'--sources="{frozen}".')
    return dict(frozen=frozen, sources=sources)


def expand_mixture(plan, mixture):
    """Shares of all sources from shares of those in a plan.

    mixture: dict source of the plan -> share, KEPT among them. Returns a dict source -> share.
    """
    found = {name: p * mixture[KEPT] for name, p in plan['frozen'].items()}
    return found | {name: p for name, p in mixture.items() if name != KEPT}
