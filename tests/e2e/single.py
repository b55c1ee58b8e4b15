"""Containers without a pod, as `ctr run` and nerdctl start them."""

from harness.command import run
from harness.containerd import NAMESPACE, SOCKET
from harness.crictl import host_kernel

CTR = ["ctr", "-a", SOCKET, "-n", NAMESPACE]


def test_ctr_run():
    """ctr run --rm gives output and exit code of a container in a VM of its own."""
    done = run(*CTR, "run", "--rm", "--runtime", "io.containerd.husk.v2", "husk.test/busybox:1", "single1", "uname", "-r")
    assert done.stdout.strip() and done.stdout.strip() != host_kernel()
    done = run(*CTR, "run", "--rm", "--runtime", "io.containerd.husk.v2", "husk.test/busybox:1", "single2", "sh", "-c", "exit 9",
               check=False)
    assert done.returncode == 9
