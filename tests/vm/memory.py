"""Memory that is plugged in and out while the guest runs, and memory that goes back to the host when the guest frees it."""

import contextlib
import os
import pathlib
import re
import tempfile
import time

from .files import husk_fs, share
from .machine import machine
from .snapshot import ask, restored, saved

INVALID_ARGUMENT, FAILED_PRECONDITION = 3, 9
JAIL = dict(uid=64123, gid=64123)
# As the shim asks for: most of what is plugged can be unplugged again, the kernel gets its share.
POLICY = "swiotlb=noforce memory_hotplug.online_policy=auto-movable"


def wait_for(what, condition, limit=30):
    """Waits until `condition()` is true, which nothing tells by an event of its own. What it gave, and how long it took."""
    start = time.monotonic()
    while not (value := condition()):
        if time.monotonic() - start > limit:
            raise TimeoutError(f"waited {limit} s for {what}")
        time.sleep(0.02)
    return value, time.monotonic() - start


def tell(vm, command):
    """What the guest answers to a command, as text."""
    with vm.dial_guest(1024) as connection:
        connection.sendall(command.encode())
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


def total(vm):
    """MiB that the guest's kernel has."""
    return int(re.search(r"MemTotal: +(\d+)", tell(vm, "read /proc/meminfo"))[1]) >> 10


def touched(vm):
    """MiB of guest memory that the host holds pages for."""
    folder, held = f"/proc/{vm.process.pid}/fd", 0
    for name in os.listdir(folder):
        # Others than those of memory come and go.
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"{folder}/{name}").startswith("/memfd:guest-memory"):
                held += os.stat(f"{folder}/{name}").st_blocks * 512
    return held >> 20


def plug(vm, mib):
    """Has the guest plug or unplug; its kernel's total follows, less what describes the memory itself (1/64). The seconds it took."""
    boot = vm.memory()[0]
    start = time.monotonic()
    assert vm.resize(mib) == mib, (vm.memory(), vm.said())
    answered = time.monotonic() - start
    # The last block is in use a moment after it is plugged.
    wanted = range((boot + mib) * 15 // 16 - 32, boot + mib + 1)
    has, more = wait_for(f"{boot} + {mib} MiB in the guest", lambda: (has := total(vm)) in wanted and has)
    print(f"{mib} MiB plugged: answered in {answered * 1e3:.0f} ms, in use after {(answered + more) * 1e3:.0f} ms; "
          f"the guest has {has} MiB, {touched(vm)} MiB touched", flush=True)
    assert vm.memory()[2:] == (mib, mib)


@contextlib.contextmanager
def grown(**shape):
    """A VM of 256 MiB with a region of 16 GiB, whose guest waits for the host."""
    with machine("template", cmdline=POLICY, memory_mib=256, hotplug_mib=16384, jail=JAIL, **shape) as vm:
        vm.until("waiting")
        assert vm.memory() == (256, 16384, 0, 0)
        yield vm


def test_grows_and_shrinks():
    """A guest of two vCPUs and a file system grows by steps from 256 MiB to 2 GiB, uses files there, and shrinks back."""
    with share() as root, husk_fs(root) as (connection, process), grown(vcpus=2, fs_socket=connection) as vm:
        print(f"{touched(vm)} MiB touched at the start", flush=True)
        for mib in (256, 768, 1792):
            plug(vm, mib)
        # Into memory that is plugged, husk-fs reads and writes as into any other.
        (root / "question").write_text("6 x 9")
        tell(vm, "files")
        assert (root / "volume/answer").read_text() == "42"
        plug(vm, 256)
        # Here and there the kernel has taken memory for itself, which it can't let go of.
        assert vm.resize(0) <= 64
        tell(vm, "off")
        assert vm.exit() == 0, vm.said()
        assert process.wait(20) == 0


def test_freed_memory_goes_back():
    """Memory in use is not unplugged; freed, it goes back to the host by itself, whether the guest booted with it or it was plugged."""
    # Small, since in the test host a guest takes 20 MiB a second: a page's first touch is a nested fault.
    with machine("template", cmdline=POLICY, hotplug_mib=1024, jail=JAIL) as vm:
        vm.until("waiting")
        plug(vm, 128)
        before = touched(vm)
        # Plugged memory first, then what it booted with.
        tell(vm, "hold 150")
        assert touched(vm) >= before + 140
        assert vm.resize(0) > 40, (vm.memory(), vm.said())
        assert touched(vm) >= before + 140
        # Linux has unplugged all that was free: whoever wanted some now, as a connection does, would be killed for it.
        assert vm.resize(128) == 128, (vm.memory(), vm.said())
        tell(vm, "hold 0")
        _, took = wait_for("freed memory to come back", lambda: touched(vm) < before + 25)
        print(f"150 MiB came back within {took:.1f} s; {touched(vm)} MiB touched, {before} before", flush=True)
        plug(vm, 0)


def test_grows_after_restore():
    """A template whose region is empty is restored twice; each grows, shrinks and gives memory back. Its memory file holds no region."""
    with saved(vcpus=2, hotplug_mib=16384, cmdline=POLICY) as folder:
        assert (folder / "memory").stat().st_size == 128 << 20
        for hold in (50, 0):
            with share() as root, husk_fs(root) as (connection, _), \
                    restored(folder, vcpus=2, hotplug_mib=16384, fs_socket=connection) as vm:
                assert len(ask(vm, "again")) == 2
                print(f"{touched(vm)} MiB touched after the restore", flush=True)
                plug(vm, 384)
                before = touched(vm)
                tell(vm, f"hold {hold}")
                assert touched(vm) >= before + hold // 2
                tell(vm, "hold 0")
                wait_for("memory to come back", lambda: touched(vm) < before + 20)
                plug(vm, 0)
                tell(vm, "off")
                assert vm.exit() == 0, vm.said()
        with restored(folder, vcpus=2, hotplug_mib=8192, fs=dict(tag="share", request_queues=1)) as vm:
            assert vm.exit() == 5 and "has 16384 MiB that can be plugged in, this one 8192" in vm.said(), vm.said()


def test_refusals():
    """What can't be resized or saved is refused in words."""
    with tempfile.TemporaryDirectory() as name, grown(save=pathlib.Path(name)) as vm:
        assert vm.resize(129 * 128) == -INVALID_ARGUMENT
        assert vm.resize(1 << 63) == -INVALID_ARGUMENT
        assert vm.resize(3) == -INVALID_ARGUMENT
        assert vm.memory() == (256, 16384, 0, 0)
        plug(vm, 256)
        assert vm.call("Pause")[0] == 0
        assert vm.resize(512) == -FAILED_PRECONDITION
        # A snapshot keeps nothing of what is plugged.
        code, _ = vm.call("Save")
        assert code == FAILED_PRECONDITION
        assert vm.call("Resume")[0] == 0
        plug(vm, 0)
    with machine("template") as vm:
        vm.until("waiting")
        assert (vm.resize(0), vm.resize(2), vm.memory()) == (0, -INVALID_ARGUMENT, (128, 0, 0, 0))
    with machine("poweroff", hotplug_mib=100) as vm:
        assert vm.exit() == 1 and "no multiple of 128" in vm.said(), vm.said()


def test_hostile_driver():
    """A driver that asks for what it may not have, with buffers where no memory is plugged, gets refusals and no memory."""
    with machine("hostile", memory_mib=128, hotplug_mib=1024, jail=JAIL) as vm:
        vm.until("waiting")
        # It does what it likes; nobody waits for it here.
        vm.resize(128)
        vm.until("done")
        said = dict(line.split(": ") for line in vm.lines if ": " in line)
        assert said["before"] == "3 3 0" and said["usable"] == "64", vm.said()
        assert said["wrong"] == " ".join(["3"] * 10), vm.said()
        assert said["plugged"] == "0 1 3" and said["unplugged"] == "3 0 3 3", vm.said()
        assert said["elsewhere"] == "3 77" and said["out of memory"] == "99", vm.said()
        assert said["with it"] == "status 0xf" and said["rings elsewhere"] == "status 0xf", vm.said()
        # Without the feature, and for a buffer that is nowhere, the device asks for a reset.
        assert [line for line in vm.lines if line.startswith("then")] == ["then: status 0x4f"] * 2, vm.said()
        assert vm.memory() == (128, 1024, 128, 124), vm.memory()
        assert vm.exit() == 0, vm.said()
