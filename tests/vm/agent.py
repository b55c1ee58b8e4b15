"""The agent and its container maker on a host with root and cgroup2: programs that cargo built, see tests/run."""

import os

from harness.command import run
from harness.runner import deadline


def _program(name, *arguments):
    done = run(f"{os.environ['HUSK_TEST_PROGRAMS']}/{name}", *arguments, timeout=280, check=False)
    ended = [line for line in done.stdout.splitlines() if line.startswith("test result:")]
    assert done.returncode == 0 and ended and " 0 passed" not in ended[0], done.stdout[-4000:] + done.stderr[-2000:]
    assert " 0 ignored" in ended[0], f"not all tests could run here: {done.stdout[-3000:]}"


@deadline(300)
def test_agent_serves():
    """The agent's RPCs, with real containers, over local sockets in place of vsock."""
    _program("serve", "--ignored", "--test-threads", "1")
    os.rmdir("/sys/fs/cgroup/pod")  # a guest's agent ends with its machine; no container's is left within


@deadline(300)
def test_cell_makes_containers():
    """Containers of every kind, made and entered."""
    _program("containers")
