"""Keeps, shows and judges what a run measures: bench.json, the terminal, the budgets of SPEC.md."""

import json
import pathlib
import statistics
import time

from bench import spec

# In the order in which they are shown.
SIDES = ("runc", "before", "cold", "template", "husk")


class Figures:
    """Series of one test, by line and side."""

    def __init__(self):
        self.lines = {}

    def add(self, line, side, value):
        """One more value, in the line's unit."""
        self.lines.setdefault(line, {}).setdefault(side, []).append(value)

    def timed(self, line, side, work):
        """Runs `work`, adds its time in ms, returns what it returns."""
        start = time.monotonic()
        result = work()
        self.add(line, side, (time.monotonic() - start) * 1000)
        return result

    def finish(self, folder):
        """Prints medians with their spread, adds the series to the run's file, and fails if a line misses its budget."""
        path = pathlib.Path(folder) / "bench.json"
        run = json.loads(path.read_text())
        for name, sides in self.lines.items():
            unit = spec.line(name).unit
            run["lines"][name] = {side: sides[side] for side in SIDES if side in sides}
            for side, values in run["lines"][name].items():
                low, middle, high = min(values), statistics.median(values), max(values)
                print(f"    {name:34} {side:8} {low:9.1f} / {middle:9.1f} / {high:9.1f} {unit}  (n={len(values)})", flush=True)
        path.write_text(json.dumps(run, indent=1))
        missed = []
        for budget in (budget for name in self.lines for budget in spec.line(name).budgets):
            reached = budget.reached(run["lines"])
            if reached is not None and not budget.holds(reached):
                missed.append(f"{budget.line}: {reached:.2f} where the budget is {budget.text}")
        assert not missed, "\n".join(missed)
