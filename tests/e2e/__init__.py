"""husk under a private containerd with a CNI bridge."""

import contextlib
import sys

from harness import crictl
from harness.containerd import Containerd, installed


@contextlib.contextmanager
def environment(logs, binaries, images, **options):
    """containerd, for the length of the run."""
    missing = installed()
    if missing:
        sys.exit(f"tests: not installed here: {', '.join(missing)} (see tests/packages)")
    containerd = Containerd(logs, binaries, images, **options)
    containerd.start()
    try:
        containerd.load("pause", "busybox")
        crictl.first_pod()
        yield containerd
    finally:
        containerd.stop()
