"""Measures husk with runc beside it, in turn in the same run; figures go to bench.json and the terminal. Lines and budgets: SPEC.md."""

import contextlib
import datetime
import json
import os
import pathlib
import re
import tempfile

from e2e import environment as containerd
from harness.command import output


def _about():
    cpu = pathlib.Path("/proc/cpuinfo").read_text()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": ("the test host, " if os.environ.get("TESTHOST") else "") + f"{len(re.findall('^processor', cpu, re.M))} x "
                   + re.search(r"model name\s+: (.*)", cpu)[1].strip(),
        "kernel": output("uname", "-r"),
        "containerd": output("containerd", "--version").split()[2].lstrip("v"),
        "runc": output("runc", "--version").splitlines()[0].split()[-1],
        "command": "sudo " + "HUSK_TEST_FULL=1 " * (os.environ.get("HUSK_TEST_FULL") == "1") + "./tests/run bench",
    }


@contextlib.contextmanager
def environment(logs, binaries, images):
    """containerd, for the length of the run. HUSK_BENCH_BEFORE names the folder of another build of husk (its bin and share), which is
    measured in turn with this one, as the runtime `before`."""
    (pathlib.Path(logs) / "bench.json").write_text(json.dumps({"about": _about(), "lines": {}}))
    with contextlib.ExitStack() as stack:
        runtimes = {}
        if before := os.environ.get("HUSK_BENCH_BEFORE"):
            # containerd finds a shim by its type's name in PATH; the shim finds its own programs beside what the link leads to.
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            os.symlink(f"{before}/bin/containerd-shim-husk-v2", f"{folder}/containerd-shim-before-v2")
            os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
            runtimes["before"] = "io.containerd.before.v2"
        yield stack.enter_context(containerd(logs, binaries, images, runtimes=runtimes))
