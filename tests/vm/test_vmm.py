#!/usr/bin/env python3
"""husk-vmm with a small init: boots, and each way to end, pause, resume. Runs on a host with KVM, such as the test host.

    test_vmm.py [unittest's arguments, such as -v or Boot.test_powers_off]

HUSK_VMM, HUSK_KERNEL and HUSK_INITRAMFS name other files than those of the build.
"""

import os
import subprocess
import sys
import tempfile
import time
import unittest

import vmm

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
VMM = os.environ.get("HUSK_VMM", f"{ROOT}/target/release/husk-vmm")
KERNEL = os.environ.get("HUSK_KERNEL", f"{ROOT}/target/guest-image/vmlinux")
INITRAMFS = os.environ.get("HUSK_INITRAMFS")
CONSOLE = os.environ.get("HUSK_CONSOLE", "hvc0")


def setUpModule():
    """Builds the initramfs if none is given."""
    global INITRAMFS
    if INITRAMFS is None:
        directory = tempfile.mkdtemp()
        subprocess.run(["gcc", "-O2", "-static", "-Wall", "-o", f"{directory}/init", f"{HERE}/init.c"], check=True)
        INITRAMFS = f"{directory}/initramfs"
        subprocess.run([sys.executable, f"{ROOT}/guest-image/initramfs.py", f"{directory}/init", INITRAMFS], check=True)


class Case(unittest.TestCase):
    def start(self, test, **more):
        quiet = "quiet " if CONSOLE == "hvc0" else ""
        cmdline = f"console={CONSOLE} {quiet}panic=-1 husk.test={test} " + more.pop("cmdline", "")
        machine = vmm.Vm(VMM, KERNEL, INITRAMFS, cmdline, serial=CONSOLE == "ttyS0", **more)
        self.addCleanup(machine.kill)
        return machine


class Boot(Case):
    def test_powers_off(self):
        machine = self.start("poweroff")
        machine.until("ready")
        state, phases = "running", []
        self.assertEqual(machine.exit(), 0, machine.said())

    def test_two_vcpus_and_the_memory_are_seen(self):
        machine = self.start("poweroff", vcpus=2, memory_mib=256)
        self.assertEqual(machine.until("cpus="), "cpus=2")
        memory = int(machine.until("memory=").split("=")[1])
        self.assertTrue(200 < memory <= 256, memory)
        self.assertEqual(machine.exit(), 0)

    def test_more_memory_than_fits_below_4_gib(self):
        machine = self.start("poweroff", memory_mib=3584)
        memory = int(machine.until("memory=").split("=")[1])
        self.assertTrue(3400 < memory <= 3584, memory)
        self.assertEqual(machine.exit(), 0)

    def test_reboot_by_acpi_ends_with_reset(self):
        machine = self.start("reboot")
        self.assertEqual(machine.exit(), 3, machine.said())

    def test_triple_fault_ends_with_reset(self):
        machine = self.start("reboot", cmdline="reboot=t")
        self.assertEqual(machine.exit(), 3, machine.said())

    def test_panic_is_told(self):
        machine = self.start("panic")
        self.assertEqual(machine.exit(), 4, machine.said())
        self.assertIn("sysrq triggered crash", machine.said())


class Control(Case):
    def test_stop(self):
        machine = self.start("wait")
        machine.until("tick")
        self.assertEqual(machine.call("Stop")[0], 0)
        self.assertEqual(machine.exit(), 0)

    def test_the_vm_ends_when_the_shim_is_gone(self):
        machine = self.start("wait")
        machine.until("tick")
        machine.control.close()
        self.assertEqual(machine.exit(), 0)

    def test_status_has_the_phases(self):
        machine = self.start("wait", vcpus=2)
        machine.until("ready")
        booted = time.monotonic() - machine.start
        state, phases = machine.status()
        self.assertEqual(state, "running")
        self.assertEqual([name for name, _ in phases][:3], ["config", "jail", "memory"])
        self.assertEqual({name for name, _ in phases[3:]}, {"kernel", "devices", "first vcpu run"})
        print("\nphases in µs:", phases, f"init is ready after {booted * 1e3:.0f} ms")

    def test_pause_stops_the_guest_and_resume_lets_it_go_on(self):
        machine = self.start("wait", vcpus=2)
        machine.until("tick")
        self.assertEqual(machine.call("Resume")[0], 9, "not paused: FAILED_PRECONDITION")
        for _ in range(3):
            self.assertEqual(machine.call("Pause")[0], 0, machine.said())
            self.assertEqual(machine.call("Pause")[0], 9)
            self.assertEqual(machine.status()[0], "paused")
            machine.lines.clear()
            with self.assertRaises(TimeoutError):
                machine.until("tick", 3)
                machine.until("tick", 3)
            self.assertEqual(machine.call("Resume")[0], 0)
            machine.lines.clear()
            machine.until("tick")
        self.assertEqual(machine.call("Nothing")[0], 12, "UNIMPLEMENTED")
        self.assertEqual(machine.call("Stop")[0], 0)
        self.assertEqual(machine.exit(), 0)


class Refused(Case):
    def test_impossible_figures(self):
        for more in (dict(vcpus=0), dict(vcpus=65), dict(memory_mib=1), dict(memory_mib=1 << 40)):
            machine = self.start("poweroff", **more)
            self.assertEqual(machine.exit(), 1)
            self.assertIn("not", machine.said())

    def test_a_descriptor_named_twice(self):
        machine = self.start("poweroff", nets=[dict(tap=3, mac=[2, 0, 0, 0, 0, 1], mtu=1500)])
        self.assertEqual(machine.exit(), 1)

    def test_a_kernel_that_is_none(self):
        machine = vmm.Vm(VMM, INITRAMFS, INITRAMFS, "")
        self.assertEqual(machine.exit(), 1)
        self.assertIn("kernel", machine.said())


if __name__ == "__main__":
    unittest.main()
