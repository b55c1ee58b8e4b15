"""Memory of an idle pod."""

import pathlib
import re

from bench.figures import Figures
from harness.crictl import pids, pod


def _mappings(pid):
    """Each mapping's (is guest memory, Pss in KiB, Rss in KiB)."""
    guest, pss, rss = False, 0, 0
    for line in pathlib.Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            guest = "memfd:guest-memory" in line
        elif line.startswith("Pss:"):
            pss = int(line.split()[1])
        elif line.startswith("Rss:"):
            rss = int(line.split()[1])
        elif line.startswith("VmFlags:"):
            yield guest, pss, rss


def test_idle_pod(containerd):
    """PSS of shim, VMM and fs daemon, and guest memory touched, of one idle pod."""
    figures = Figures("KiB")
    with pod() as it:
        it.start(["sleep", "1000"])
        for program in ("containerd-shim-husk-v2", "husk-vmm", "husk-fs"):
            (pid,) = pids(program)
            found = list(_mappings(pid))
            figures.add(f"PSS {program}", sum(pss for guest, pss, _ in found if not guest))
            if program == "husk-vmm":
                figures.add("guest memory touched", sum(rss for guest, _, rss in found if guest))
    figures.show(containerd.log.parent)
