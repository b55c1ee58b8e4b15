"""Whatever dies, containerd is told the truth soon and nothing stays behind."""

import os
import signal
import time

from harness.containerd import version
from harness.crictl import HANDLER, Pod, crictl, pids


def _dies(kill, within=2):
    """Starts a pod with a container, kills something, and wants the container dead within so many seconds."""
    it = Pod().run()
    try:
        box = it.start(["sleep", "1000"])
        start = kill(box) or time.monotonic()
        while box.state() != "CONTAINER_EXITED":
            assert time.monotonic() - start < 10, "the container's death was never told"
            time.sleep(0.05)
        took = time.monotonic() - start
        print(f"    told after {took:.1f} s", flush=True)
        assert took < within, f"the container's death was told after {took:.1f} s"
    finally:
        it.remove()


def _kill9(program):
    def kill(_box):
        found = pids(program)
        assert len(found) == 1, f"{program}: {found}"
        os.kill(found[0], signal.SIGKILL)
    return kill


def test_vmm_killed():
    """kill -9 of the VMM."""
    _dies(_kill9("husk-vmm"))


def test_fs_daemon_killed():
    """kill -9 of the fs daemon."""
    _dies(_kill9("husk-fs"))


def test_shim_killed():
    """kill -9 of the shim."""
    # containerd 2 tells itself of the exit before it has forgotten the dead shim; when its CRI service is the quicker one, its deletion
    # of the task fails with "ttrpc: closed" and is tried again 2 s later. With runc's shim it is the same (HUSK_TEST_HANDLER=runc).
    _dies(_kill9(f"containerd-shim-{HANDLER.removesuffix('-sandbox')}-v2"), within=4 if version() >= (2, 0) else 2)


def test_guest_panics():
    """A panic of the guest's kernel."""
    it = Pod(linux={"security_context": {"privileged": True}}).run()
    try:
        box = it.start(["sleep", "1000"], linux={"security_context": {"privileged": True}})
        crictl("exec", "-s", box.id, "sh", "-c", "echo c > /proc/sysrq-trigger", check=False)
        start = time.monotonic()
        while box.state() != "CONTAINER_EXITED":
            assert time.monotonic() - start < 2, "the container's death was not told within 2 s"
            time.sleep(0.05)
    finally:
        it.remove()


def test_containerd_restarts(containerd):
    """containerd's own end and return leave a pod running, and usable afterwards."""
    it = Pod().run()
    try:
        box = it.start(["sleep", "1000"])
        containerd.kill()
        containerd.start()
        assert box.state() == "CONTAINER_RUNNING"
        assert box.exec("echo", "still here") == "still here"
    finally:
        it.remove()
