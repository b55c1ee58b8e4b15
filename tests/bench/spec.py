"""The lines of SPEC.md, with their units and budgets: what a figure is called there is what it is called here."""

import fnmatch
import functools
import pathlib
import re
import statistics

SPEC = pathlib.Path(__file__).resolve().parent / "SPEC.md"
BUDGET = re.compile(r"(?P<side>\w+) (?P<sign><=|>=) (?P<limit>[\d.]+)(?: x (?P<other>\w+)(?: of (?P<line>[^;]+))?)?$")


class Budget:
    """`side <= 0.9 x other`, `side <= 0.9 x other of line`, or `side <= 10`, which is in the line's unit; >= likewise."""

    def __init__(self, line, text):
        found = BUDGET.match(text)
        if not found:
            raise ValueError(f"SPEC.md, {line}: no budget: {text!r}")
        self.text = text
        self.line = line
        self.side, self.sign, self.other = found["side"], found["sign"], found["other"]
        self.limit = float(found["limit"])
        self.of = found["line"] or line

    def reached(self, lines):
        """The ratio, or the median; None where the run has not measured it."""
        value = lines.get(self.line, {}).get(self.side)
        if value is None or self.other is None:
            return None if value is None else statistics.median(value)
        other = lines.get(self.of, {}).get(self.other)
        return None if other is None else statistics.median(value) / statistics.median(other)

    def holds(self, value):
        """Whether that is within the budget. Figures are judged as they are told: with two decimals."""
        return round(value, 2) <= self.limit if self.sign == "<=" else round(value, 2) >= self.limit


class Line:
    """A row of SPEC.md."""

    def __init__(self, name, unit, what, how, budgets):
        self.name, self.unit, self.what, self.how = name, unit, what, how
        self.budgets = [Budget(name, text.strip()) for text in budgets.split(";") if text.strip()]


@functools.cache
def lines():
    """Every row of the table of lines, in order."""
    _, _, table = SPEC.read_text().partition("| line |")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:] if row.startswith("|")]
    return [Line(*row) for row in rows]


def line(name):
    """The row of a name: its own, or the first whose pattern matches."""
    for row in lines():
        if row.name == name or fnmatch.fnmatchcase(name, row.name):
            return row
    raise KeyError(f"tests/bench/SPEC.md has no line {name!r}")
