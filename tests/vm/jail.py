"""The VM in its jail: nothing that it needs is denied, and the walls are there."""

import os
import pathlib

from .machine import machine

USER = 64123


def test_all_works_in_the_jail():
    """Boot, vsock both ways, pause, power off: with every wall and filter up."""
    with machine("vsock", vcpus=2, jail=dict(uid=USER, gid=USER)) as vm:
        port, connection = vm.accept()
        assert port == 1024
        assert connection.recv(5) == b"hello"
        assert vm.call("Pause")[0] == 0
        status = pathlib.Path(f"/proc/{vm.process.pid}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert vm.call("Resume")[0] == 0
        connection.sendall(b"welcome")
        vm.until("vsock=welcome")
        assert vm.exit() == 0, vm.said()
        assert fields["Uid"].split() == [str(USER)] * 4, fields["Uid"]
        assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == int(fields["CapBnd"], 16) == 0, status
        assert fields["NoNewPrivs"] == "1" and fields["Seccomp"] == "2", status


def test_namespaces():
    """The VM sees an empty root and lives in namespaces of its own."""
    with machine("wait", jail=dict(uid=USER, gid=USER)) as vm:
        vm.until("tick")
        process = f"/proc/{vm.process.pid}"
        for namespace in ("mnt", "ipc", "uts", "net"):
            assert os.readlink(f"{process}/ns/{namespace}") != os.readlink(f"/proc/self/ns/{namespace}"), namespace
        assert os.listdir(f"{process}/root") == []


def test_every_thread_is_filtered():
    with machine("wait", vcpus=2, jail=dict(uid=USER, gid=USER)) as vm:
        vm.until("tick")
        vm.status()
        threads = {}
        for task in pathlib.Path(f"/proc/{vm.process.pid}/task").iterdir():
            status = (task / "status").read_text()
            threads[(task / "comm").read_text().strip()] = "Seccomp:\t2" in status
        assert threads == {"husk-vmm": True, "vcpu0": True, "vcpu1": True, "control": True}, threads
