"""Many pods at once, and what they cost when they do nothing."""

import concurrent.futures
import statistics
import time

from bench import host
from bench.figures import Figures
from bench.sides import fastest, side
from harness.crictl import Pod
from harness.runner import deadline, full

# Seconds that idle pods have to become idle (helper threads end after ten), and are watched.
SETTLE, WATCH = 12, 20


def _at_once(work, items):
    """Does `work` on all at once; how long each took in ms, and all together."""
    def timed(item):
        begun = time.monotonic()
        work(item)
        return (time.monotonic() - begun) * 1000

    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(timed, items)), (time.monotonic() - start) * 1000


def _start(figures, name, make, number):
    """Starts that many pods at once."""
    pods = [make() for _ in range(number)]
    took, total = _at_once(lambda it: it.run(timeout=300), pods)
    figures.add(f"{number} at once: total", name, total)
    figures.add(f"{number} at once: starts a second", name, number * 1000 / total)
    figures.add(f"{number} at once: median", name, statistics.median(took))
    figures.add(f"{number} at once: 99th of 100", name, sorted(took)[min(number - 1, int(number * 0.99))])
    return pods


def _end(pods):
    _at_once(Pod.remove, pods)


def _weigh(figures, number):
    """Memory of the pods' processes, each pod's share."""
    totals = []
    for what, found in host.all_pids().items():
        assert len(found) == number, (what, found)
        weighed = [host.memory(pid) for pid in found]
        pss = sum(pss for pss, _ in weighed) / number
        figures.add(f"PSS of a pod, {number}: {what}", "husk", pss)
        totals.append(pss)
        if what == "VMM":
            figures.add(f"guest memory touched, {number}", "husk", sum(touched for _, touched in weighed) / number)
    figures.add(f"PSS of a pod, {number}", "husk", sum(totals))


def _watch(figures, number):
    """What the pods do while nobody wants anything of them, each pod's share."""
    found = [pid for some in host.all_pids().values() for pid in some]
    time.sleep(SETTLE)

    def counters():
        return time.monotonic(), sum(map(host.switches, found)), sum(map(host.cpu_ms, found)), host.vcpu_exits()

    before = counters()
    time.sleep(WATCH)
    seconds, switches, cpu, exits = (None if b is None else b - a for a, b in zip(before, counters()))
    figures.add("wake-ups", "husk", switches / seconds / number)
    figures.add("idle CPU", "husk", cpu / seconds / number)
    if exits is not None:
        figures.add("vCPU exits", "husk", exits / seconds / number)


@deadline(full(900, 3600))
def test_many(containerd):
    """1, 5 and 20 (and 50) pods at once; then memory, wake-ups and CPU time of idle pods with a container each."""
    figures = Figures()
    name = fastest()
    # The longest start that the shim waits for is that of a host which has nothing else to do.
    for number in (1, 5, 20, *full((), (50,))):
        with side("runc") as make:
            _end(_start(figures, "runc", make, number))
        with side(name, hello_timeout_s=300) as make:
            free = host.available_mib()
            pods = _start(figures, name, make, number)
            if number in (1, 20):
                for it in pods:
                    it.start(["sleep", "100000"])
                _weigh(figures, number)
                figures.add(f"host memory of a pod, {number}", "husk", (free - host.available_mib()) / number)
            if number == 20:
                _watch(figures, number)
            _end(pods)
    figures.finish(containerd.log.parent)
