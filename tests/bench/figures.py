"""Keeps and shows measured series."""

import json
import pathlib
import statistics
import time


class Figures:
    """Named series of one run."""

    def __init__(self, unit):
        self.unit = unit
        self.series = {}

    def add(self, name, value):
        self.series.setdefault(name, []).append(value)

    def timed(self, name, work):
        """Runs `work`, adds its time in ms, returns what it returns."""
        start = time.monotonic()
        result = work()
        self.add(name, (time.monotonic() - start) * 1000)
        return result

    def show(self, folder, file="bench.json"):
        """Prints min / median / max and adds the series to the run's file."""
        for name, values in self.series.items():
            low, middle, high = min(values), statistics.median(values), max(values)
            print(f"    {name:34} {low:9.0f} / {middle:9.0f} / {high:9.0f} {self.unit}  (n={len(values)})", flush=True)
        path = pathlib.Path(folder) / file
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, **{n: {"unit": self.unit, "values": v} for n, v in self.series.items()}}, indent=1))
