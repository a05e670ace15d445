"""The figures of docs/RESULTS.md are those of the summaries that the studies wrote.

A section of RESULTS.md that names docs/summaries/<name>.md, or several of them, may only have table
rows whose numbers stand in one row of one of these files, rounded as RESULTS has them.
"""
import re
from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal

import pytest

from tests.conftest import ROOT

DOCS = ROOT / 'docs'
NUMBER = re.compile(r'(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.]*\w)')


def numbers_in(line):
    """The numbers of a table row: list of Decimal. 1,024 is one number."""
    found = []
    for text in NUMBER.findall(line.replace('**', '').replace('%', ' ')):
        found.append(Decimal(text.replace(',', '').lstrip('+')))
    return found


def agrees(number, exact):
    """Whether `exact` is the number, or rounds to it at the number's last digit."""
    if number == exact:
        return True
    if exact.as_tuple().exponent > number.as_tuple().exponent:
        return False
    unit = Decimal(1).scaleb(number.as_tuple().exponent)
    return any(exact.quantize(unit, how) == number for how in (ROUND_HALF_EVEN, ROUND_HALF_UP))


def missing_of(row, summary):
    """The numbers of a row that no single row of the summary has, at its best: list."""
    wanted = numbers_in(row)
    fewest = wanted
    for line in summary:
        exact = numbers_in(line)
        missing = [n for n in wanted if not any(agrees(n, e) for e in exact)]
        if len(missing) < len(fewest):
            fewest = missing
    return fewest


def sections_with_summaries():
    """(title, rows of tables, names of the summaries) of every section that names one."""
    found = []
    for section in re.split(r'^#+ ', (DOCS / 'RESULTS.md').read_text(), flags=re.M)[1:]:
        names = sorted(set(re.findall(r'summaries/([\w-]+\.md)', section)))
        if names:
            rows = [line for line in section.splitlines() if line.startswith('|')]
            found.append((section.splitlines()[0], [row for row in rows if numbers_in(row)], names))
    return found


@pytest.mark.parametrize(
    'title, rows, names', sections_with_summaries(), ids=lambda value: str(value)[:40])
def test_figures_are_those_of_the_summaries(title, rows, names):
    lines = []
    for name in names:
        lines += (DOCS / 'summaries' / name).read_text().splitlines()
    lines = [line for line in lines if line.startswith('|')]
    wrong = []
    for row in rows:
        missing = missing_of(row, lines)
        if missing:
            wrong.append(f'{", ".join(map(str, missing))} in {row}')
    assert not wrong, f'{title}, not in {", ".join(names)}:\n' + '\n'.join(wrong)


def test_every_summary_is_used():
    used = {name for _, _, names in sections_with_summaries() for name in names}
    assert used == {path.name for path in (DOCS / 'summaries').glob('*.md')}


def test_a_wrong_figure_is_noticed():
    summary = ['| joint | 4.2917 (4.2810 to 4.3011) | -0.0586 | 14,336 |']
    assert not missing_of('| joint: three probes | 4.292 (4.281 to 4.301) | **-0.059** |', summary)
    assert missing_of('| joint | 4.293 | -0.059 |', summary) == [Decimal('4.293')]
    assert missing_of('| joint | 4.292 | 0.059 |', summary) == [Decimal('0.059')]
