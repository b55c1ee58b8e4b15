"""The guest boots, sees its machine, and each way in which it ends has its exit code."""

from .machine import machine

POWER_OFF, FAILED, RESET, PANIC = 0, 1, 3, 4


def test_power_off():
    """ACPI's S5 ends the VM; until then the guest printed to virtio-console and nothing is lost."""
    with machine("poweroff") as vm:
        assert vm.exit() == POWER_OFF, vm.said()
        assert vm.lines[-1] == "ready", vm.said()


def test_devices():
    """PCI functions come in their order, the entropy device is the kernel's source, the clock is KVM's."""
    with machine("poweroff", hotplug_mib=128) as vm:
        vm.until("ready")
        ids = [line.split("id=")[1] for line in sorted(vm.lines) if line.startswith("device ")]
        # Host bridge, rng, console, vsock, balloon, mem: 0x1040 and the virtio device type.
        assert ids == ["0x0008", "0x1044", "0x1043", "0x1053", "0x1045", "0x1058"], vm.said()
        assert "rng=virtio_rng.0" in vm.lines, vm.said()
        assert "clocksource=kvm-clock" in vm.lines or "clocksource=tsc" in vm.lines, vm.said()


def test_two_vcpus_and_memory():
    with machine("poweroff", vcpus=2, memory_mib=256) as vm:
        assert vm.until("cpus=") == "cpus=2"
        memory = int(vm.until("memory=").split("=")[1])
        assert 200 < memory <= 256, memory
        assert vm.exit() == POWER_OFF


def test_memory_above_4_gib():
    """More than 3 GiB lie in two regions."""
    with machine("poweroff", memory_mib=3584) as vm:
        memory = int(vm.until("memory=").split("=")[1])
        assert 3400 < memory <= 3584, memory
        assert vm.exit() == POWER_OFF


def test_reboot_by_acpi():
    with machine("reboot") as vm:
        assert vm.exit() == RESET, vm.said()


def test_triple_fault():
    with machine("reboot", "reboot=t") as vm:
        assert vm.exit() == RESET, vm.said()


def test_panic():
    """pvpanic tells, and the kernel's last words are on the console."""
    with machine("panic") as vm:
        assert vm.exit() == PANIC, vm.said()
        assert "sysrq triggered crash" in vm.said()


def test_serial_console():
    """ttyS0 shows the kernel's messages and init's."""
    with machine("poweroff", console="ttyS0") as vm:
        vm.until("Linux version")
        vm.until("hello from init")
        assert vm.exit() == POWER_OFF, vm.said()
