"""husk under a private containerd with a CNI bridge."""

import contextlib
import sys

from harness import crictl
from harness.command import run
from harness.containerd import NAMESPACE, SOCKET, Containerd, installed


@contextlib.contextmanager
def environment(logs, binaries, images):
    """containerd, for the length of the run."""
    missing = installed()
    if missing:
        sys.exit(f"tests: not installed here: {', '.join(missing)} (see tests/packages)")
    containerd = Containerd(logs, binaries, images)
    containerd.start()
    try:
        containerd.load("pause", "busybox")
        # What containerd, CNI and runc make once and keep (the bridge, empty folders and cgroups) is there before the first test looks.
        with crictl.pod(handler="runc") as pod:
            pod.start(["true"])
        run("ctr", "-a", SOCKET, "-n", NAMESPACE, "run", "--rm", "--runtime", "io.containerd.runc.v2", "husk.test/busybox:1", "first", "true")
        yield containerd
    finally:
        containerd.stop()
