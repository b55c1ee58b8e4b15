"""Configurations that can't work are refused with a line that says why, and exit code 1."""

from .machine import initramfs, machine


def refused(vm, *words):
    assert vm.exit() == 1, vm.said()
    for word in words:
        assert word in vm.said(), vm.said()


def test_impossible_figures():
    for more, word in ((dict(vcpus=0), "vCPUs"), (dict(vcpus=65), "vCPUs"), (dict(memory_mib=1), "memory"), (dict(memory_mib=1 << 40), "memory")):
        with machine("poweroff", **more) as vm:
            refused(vm, word, "not")


def test_descriptors():
    """One that is closed, and a standard stream."""
    for tap in (1000, 0):
        with machine("poweroff", nets=[dict(tap=tap, mac=[2, 0, 0, 0, 0, 1], mtu=1500)]) as vm:
            refused(vm, f"Descriptor {tap} for the tap")


def test_unknown_key():
    with machine("poweroff", surprise=1) as vm:
        refused(vm, "surprise")


def test_no_kernel():
    with machine("poweroff", kernel=initramfs()) as vm:
        refused(vm, "Could not load the kernel")


def test_long_command_line():
    with machine("poweroff", "x" * 2048) as vm:
        refused(vm, "command line")
