"""Times of a pod's life, and where a start's time goes."""

import re
import subprocess
import time

from bench import host
from bench.figures import Figures
from bench.sides import side, sides
from harness.containerd import NAMESPACE, SOCKET
from harness.crictl import crictl
from harness.runner import deadline, full

TYPES = {"runc": "io.containerd.runc.v2", "before": "io.containerd.before.v2"}


def _said(log, offset, what):
    """The line of the shims' log since `offset` that holds `what`; a shim's line is there before containerd's answer, or soon after."""
    end = time.monotonic() + 10
    while True:
        with open(log) as file:
            file.seek(offset)
            for line in file:
                if what in line:
                    return line
        assert time.monotonic() < end, f"no line with {what!r} in the log"
        time.sleep(0.02)


@deadline(full(500, 1500))
def test_life(containerd):
    """runp, create+start, exec and rmp, with the shim's account of the start."""
    figures = Figures()
    for number in range(full(7, 21) + 1):
        kept = figures if number else Figures()
        kept.timed("client", "husk", lambda: crictl("version"))
        for name in sides():
            with side(name) as make:
                offset = containerd.log.stat().st_size
                pod = make()
                kept.timed("runp", name, pod.run)
                if name != "runc":
                    phases = dict(re.findall(r"(\w+)_ms=([\d.]+)", _said(containerd.log, offset, " pod started ")))
                    total = float(phases.pop("total"))
                    for phase, took in phases.items():
                        kept.add(f"start: {phase}", name, float(took))
                    kept.add("start: outside of the shim", name, kept.lines["runp"][name][-1] - total)
                    kept.add("hello", name, float(phases["vmm"]) + float(phases["hello"]))
                    for what, found in host.all_pids().items():
                        kept.add(f"CPU of a start: {what}", name, host.cpu_ms(found[0]))
                box = kept.timed("create+start", name, lambda: pod.start(["sleep", "1000"]))
                kept.timed("exec", name, lambda: box.exec("true"))
                kept.timed("rmp", name, pod.remove)
    figures.finish(containerd.log.parent)


@deadline(200)
def test_first_output(containerd):
    """From `ctr run` to the container's first byte."""
    figures = Figures()
    for number in range(full(5, 15) + 1):
        kept = figures if number else Figures()
        for name in sides():
            with side(name):
                command = ["ctr", "-a", SOCKET, "-n", NAMESPACE, "run", "--rm", "--runtime", TYPES.get(name, "io.containerd.husk.v2"),
                           "husk.test/busybox:1", f"first-{name}-{number}", "echo", "x"]
                start = time.monotonic()
                with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as client:
                    assert client.stdout.read(1) == b"x"
                    kept.add("first output", name, (time.monotonic() - start) * 1000)
                    assert client.wait(60) == 0
    figures.finish(containerd.log.parent)


@deadline(200)
def test_phases(containerd):
    """The VMM's own account of its start."""
    figures = Figures()
    for _ in range(3):
        for name in sides():
            if name == "runc":
                continue
            with side(name, log_level="debug") as make:
                offset = containerd.log.stat().st_size
                pod = make().run()
                told = _said(containerd.log, offset, "VMM started")
                before = 0
                for phase, micros in re.findall(r"(\w[\w ]*)=(\d+)us", told.partition("VMM started")[2]):
                    figures.add(f"VMM: {phase.strip()}", name, (int(micros) - before) / 1000)
                    before = int(micros)
                pod.remove()
    figures.finish(containerd.log.parent)
