"""The control API, and what becomes of a VM whose shim is gone."""

import time

from .machine import machine

FAILED_PRECONDITION, UNIMPLEMENTED = 9, 12


def test_stop():
    with machine("wait") as vm:
        vm.until("tick")
        assert vm.call("Stop")[0] == 0
        assert vm.exit() == 0, vm.said()


def test_shim_gone():
    with machine("wait") as vm:
        vm.until("tick")
        vm.control.close()
        assert vm.exit() == 0, vm.said()


def test_phases():
    """Status tells each phase of the start."""
    with machine("wait", vcpus=2) as vm:
        vm.until("ready")
        ready = time.monotonic() - vm.start
        state, phases = vm.status()
        print(f"{phases} µs, ready after {ready * 1e3:.0f} ms", flush=True)
        assert state == "running"
        assert [name for name, _ in phases][:3] == ["config", "jail", "memory"], phases
        assert {name for name, _ in phases[3:]} == {"memory filled", "devices", "first vcpu run"}, phases


def test_pause_and_resume():
    """A paused guest does nothing; it goes on as if nothing had been, again and again."""
    with machine("wait", vcpus=2) as vm:
        vm.until("tick")
        assert vm.call("Resume")[0] == FAILED_PRECONDITION
        for _ in range(3):
            assert vm.call("Pause")[0] == 0, vm.said()
            assert vm.call("Pause")[0] == FAILED_PRECONDITION
            assert vm.status()[0] == "paused"
            vm.drain()
            try:
                vm.until("tick", 3)
            except TimeoutError:
                pass
            else:
                raise AssertionError("the guest runs while it is paused")
            assert vm.call("Resume")[0] == 0
            vm.until("tick")
            vm.drain()
        assert vm.call("Nothing")[0] == UNIMPLEMENTED
        assert vm.call("Stop")[0] == 0
        assert vm.exit() == 0
