"""Disks that come and go while the guest runs; its init says what it sees of them."""

import contextlib
import os
import pathlib
import tempfile

from .machine import machine

USER = 64123
INVALID_ARGUMENT, NOT_FOUND, RESOURCE_EXHAUSTED, FAILED_PRECONDITION = 3, 5, 8, 9
SECTORS = 2048


@contextlib.contextmanager
def image(first=b"from the host"):
    """A file of 1 MiB as a disk's content."""
    with tempfile.NamedTemporaryFile(dir="/run") as file:
        file.write(first)
        file.truncate(SECTORS * 512)
        yield pathlib.Path(file.name)


def threads(vm):
    return sum((task / "comm").read_text() == "disk\n" for task in pathlib.Path(f"/proc/{vm.process.pid}/task").iterdir())


def descriptors(vm):
    return len(os.listdir(f"/proc/{vm.process.pid}/fd"))


def test_comes_is_used_and_goes():
    """Two disks appear by name, are read and written, and go when they are asked for; all of it in the jail."""
    with machine("disks", vcpus=2, jail=dict(uid=USER, gid=USER)) as vm, image() as one, image(b"another") as two:
        vm.until("ready")
        first = vm.attach_disk(one, "serial-1")
        assert "serial=serial-1 sectors=2048 ro=0 first=from the host written=1" in vm.until("disk vda")
        second = vm.attach_disk(two, "serial-2", read_only=True)
        assert "serial=serial-2 sectors=2048 ro=1 first=another written=0" in vm.until("disk vdb")
        assert (first, second, threads(vm)) == (16, 17, 4)
        assert one.read_bytes()[512:530] == b"written by a guest" and one.read_bytes()[1024:1536] == bytes(512)
        assert two.read_bytes()[512:530] == bytes(18)
        for device, name in ((first, "vda"), (second, "vdb")):
            assert vm.detach_disk(device) == (0, True, True), vm.said()
            vm.until(f"gone {name}")
        assert threads(vm) == 0
        assert vm.call("Stop")[0] == 0
        assert vm.exit() == 0, vm.said()


def test_twenty_times_leaves_nothing():
    """Attached and detached over and over, a disk leaves neither threads nor descriptors, and its slot is used again."""
    with machine("disks", vcpus=2) as vm, image() as file:
        vm.until("ready")
        before = None
        for round in range(20):
            assert vm.attach_disk(file, f"disk{round}") == 16
            vm.until("disk vda")
            assert vm.detach_disk(16) == (0, True, True), vm.said()
            vm.until("gone vda")
            vm.drain()
            before = before or descriptors(vm)
        assert (descriptors(vm), threads(vm)) == (before, 0)


def test_refusals():
    """What is no disk is refused in words, and there are 16 of them."""
    with machine("disks", cmdline="acpiphp.disable=1") as vm, image() as file:
        vm.until("ready")
        assert vm.detach_disk(16)[0] == NOT_FOUND
        assert vm.call("AttachDisk", bytes([8, 99, 18, 1, 65]))[0] == FAILED_PRECONDITION
        assert vm.attach_disk(file, "x" * 21) == -INVALID_ARGUMENT
        assert vm.attach_disk(file, "a b") == -INVALID_ARGUMENT
        assert vm.attach_disk("/dev/null", "null", read_only=True) == -INVALID_ARGUMENT
        with open(file) as readable:
            assert vm.attach_disk(readable.name, "x", mode=os.O_RDONLY) == -INVALID_ARGUMENT
        assert [vm.attach_disk(file, f"d{number}") for number in range(16)] == list(range(16, 32))
        assert vm.attach_disk(file, "more") == -RESOURCE_EXHAUSTED
        assert vm.call("Stop")[0] == 0
        assert vm.exit() == 0, vm.said()


def test_a_guest_that_keeps_a_disk_loses_it():
    """A guest that does not eject is waited for 5 s; then the disk is gone, its file closed, and the guest runs on."""
    with machine("disks", cmdline="acpiphp.disable=1") as vm, image() as file:
        vm.until("ready")
        before = descriptors(vm)
        assert vm.attach_disk(file, "kept") == 16
        assert vm.detach_disk(16) == (0, False, True), vm.said()
        assert (descriptors(vm), threads(vm)) == (before, 0)
        # The guest may still hold on to what was there, so the slot is not used again.
        assert vm.attach_disk(file, "next") == 17
        assert vm.detach_disk(16)[0] == NOT_FOUND
        assert vm.status()[0] == "running"
        assert vm.call("Stop")[0] == 0
        assert vm.exit() == 0, vm.said()
