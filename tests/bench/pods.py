"""Times of a pod's life, husk and runc in turn."""

import re

from bench.figures import Figures
from harness.crictl import Pod, crictl
from harness.runner import deadline

ROUNDS = 7


@deadline(600)
def test_life(containerd):
    """runp, create+start, exec and rmp, with husk's phases."""
    figures = Figures("ms")
    phases = Figures("ms")
    for number in range(ROUNDS + 1):
        kept = figures if number else Figures("ms")
        kept.timed("client", lambda: crictl("version"))
        for handler in ("runc", "husk"):
            offset = containerd.log.stat().st_size
            pod = Pod(handler=handler)
            kept.timed(f"{handler} runp", pod.run)
            box = kept.timed(f"{handler} create+start", lambda: pod.start(["sleep", "1000"]))
            kept.timed(f"{handler} exec", lambda: box.exec("true"))
            kept.timed(f"{handler} rmp", pod.remove)
            if handler == "husk" and number:
                with open(containerd.log) as log:
                    log.seek(offset)
                    for name, value in re.findall(r"(\w+)_ms=([\d.]+)", "".join(l for l in log if " pod started " in l)):
                        phases.add(f"husk start: {name}", float(value))
    figures.show(containerd.log.parent)
    phases.show(containerd.log.parent)
