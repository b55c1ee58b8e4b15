"""Limits: the machine is sized by the pod's, the containers' hold in the guest, and all that a pod costs is in its own cgroup."""

import json
import os
import pathlib
import re
import tempfile
import time

from harness.command import output, run
from harness.containerd import NAMESPACE, SOCKET
from harness.crictl import crictl, pids, pod

CTR = ["ctr", "-a", SOCKET, "-n", NAMESPACE]
CGROUPS = pathlib.Path("/sys/fs/cgroup")
PROGRAMS = ("containerd-shim-husk-v2", "husk-vmm", "husk-fs")
RUNTIME_CLASS = pathlib.Path(__file__).resolve().parent.parent.parent / "deploy/runtimeclass.yaml"


def limits(**resources):
    """A container's limits as CRI has them."""
    return {"resources": resources}


def setting(container, name):
    """A file of the container's cgroup."""
    return container.exec("cat", f"/sys/fs/cgroup/{name}")


def exited(container, within=60):
    """The status of a container that ends by itself."""
    end = time.monotonic() + within
    while (status := container.status())["state"] != "CONTAINER_EXITED":
        assert time.monotonic() < end, f"still {status['state']} after {within} s"
        time.sleep(0.1)
    return status


def of_spec(name, change, *command):
    """Runs a container of its own whose OCI spec is that of `ctr run` after `change`; what it prints, or what is said when it is refused."""
    folder = pathlib.Path(tempfile.mkdtemp(dir="/run/husk-test"))
    rootfs = folder / "rootfs"
    for path in ("bin", "proc", "sys", "dev"):
        (rootfs / path).mkdir(parents=True)
    run("cp", "/bin/busybox", rootfs / "bin")
    for applet in ("sh", "cat", "sleep"):
        (rootfs / "bin" / applet).symlink_to("busybox")
    spec = json.loads(output("runc", "spec", "--bundle", folder) or (folder / "config.json").read_text())
    spec["process"].update(terminal=False, args=list(command))
    spec["root"].update(path=str(rootfs), readonly=False)
    spec["linux"].setdefault("resources", {})
    change(spec)
    (folder / "config.json").write_text(json.dumps(spec))
    done = run(*CTR, "run", "--rm", "--runtime", "io.containerd.husk.v2", "--config", folder / "config.json", name, check=False)
    return done.stdout + done.stderr


def test_machine_size():
    """The machine's memory is the pod's limit and what the guest itself needs."""
    with pod(linux=limits(memory_limit_in_bytes=192 << 20, cpu_quota=50000, cpu_period=100000)) as it:
        box = it.start(["sleep", "1000"])
        total = int(re.search(r"MemTotal: *(\d+) kB", box.exec("cat", "/proc/meminfo"))[1]) >> 10
        assert 192 <= total <= 192 + 64, total
        assert box.exec("nproc") == "1"


def test_limits():
    """CPU quota and shares, memory, swap, unified settings: each is in its file of the guest's cgroup. CPUs of the host's are the pod's cgroup's
    on the host."""
    with pod() as it:
        unified = {"memory.high": str(48 << 20), "memory.low": str(8 << 20), "pids.max": "99", "memory.oom.group": "1"}
        box = it.start(["sleep", "1000"], linux=limits(cpu_period=50000, cpu_quota=20000, cpu_shares=2048, memory_limit_in_bytes=64 << 20,
                                                       memory_swap_limit_in_bytes=80 << 20, cpuset_cpus="0", cpuset_mems="0", unified=unified))
        wanted = {"cpu.max": "20000 50000", "cpu.weight": "79", "memory.max": str(64 << 20), "memory.swap.max": str(16 << 20), **unified}
        found = {name: setting(box, name) for name in wanted}
        assert found == wanted, found
        host = CGROUPS / f"husk-test/{it.id}"
        assert [(host / f"cpuset.{name}").read_text() for name in ("cpus", "mems")] == ["0\n", "0\n"]
        it.start(["sleep", "1000"])
        assert (host / "cpuset.cpus").read_text() == (host.parent / "cpuset.cpus.effective").read_text()


def test_process_limit_holds():
    """A container that may have 20 processes gets no more."""
    with pod() as it:
        box = it.start(["sleep", "1000"], linux=limits(unified={"pids.max": "20"}))
        said = crictl("exec", "-s", box.id, "sh", "-c", "for n in $(seq 40); do sleep 100 > /dev/null 2>&1 & done", check=False)
        assert "Resource temporarily unavailable" in said.stderr, said


def test_update():
    """A running container takes new limits; a memory limit beyond the host is refused with figures, and the old one stays."""
    with pod() as it:
        box = it.start(["sleep", "1000"], linux=limits(memory_limit_in_bytes=64 << 20, cpu_quota=20000, cpu_period=100000))
        crictl("update", "--memory", 32 << 20, "--cpu-quota", "70000", "--cpu-period", "100000", "--cpu-share", "512", box.id)
        assert [setting(box, name) for name in ("memory.max", "cpu.max", "cpu.weight")] == [str(32 << 20), "70000 100000", "20"]
        crictl("update", "--cpuset-cpus", "0", box.id)
        assert (CGROUPS / f"husk-test/{it.id}/cpuset.cpus").read_text() == "0\n"
        said = crictl("update", "--memory", 64 << 30, box.id, check=False)
        assert said.returncode and str(64 << 30) in said.stderr and f"{(64 << 10) + 64} MiB" in said.stderr, said.stderr
        assert setting(box, "memory.max") == str(32 << 20)


def test_limit_below_use():
    """A memory limit below what is used is refused with figures, and nothing is killed; where files' pages make the difference they are dropped."""
    with tempfile.TemporaryDirectory(dir="/run/husk-test") as folder, pod() as it:
        pathlib.Path(folder, "file").write_bytes(bytes(32 << 20))
        box = it.start(["sleep", "1000"], linux=limits(memory_limit_in_bytes=96 << 20), mounts=[{"host_path": folder, "container_path": "/files"}])
        box.exec("sh", "-c", "dd if=/dev/zero of=/dev/shm/x bs=1M count=40 2> /dev/null; cat /files/file > /dev/null")
        said = crictl("update", "--memory", 16 << 20, box.id, check=False)
        assert said.returncode and re.search(f"limit of {16 << 20} bytes is less than the 4\\d{{7}} bytes", said.stderr), said.stderr
        assert setting(box, "memory.max") == str(96 << 20) and box.state() == "CONTAINER_RUNNING"
        crictl("update", "--memory", 56 << 20, box.id)
        assert setting(box, "memory.max") == str(56 << 20) and "oom_kill 0" in setting(box, "memory.events").split("\n")


def test_out_of_memory():
    """A container whose first process is killed for memory is OOMKilled with 137, and so is one of which a child is killed where the group goes
    together; without that only the child dies."""
    hog = "tail /dev/zero"
    with pod() as it:
        first = it.start(["sh", "-c", f"exec {hog}"], linux=limits(memory_limit_in_bytes=16 << 20))
        group = it.start(["sh", "-c", f"{hog}; echo alive; sleep 1000"],
                         linux=limits(memory_limit_in_bytes=16 << 20, unified={"memory.oom.group": "1"}))
        child = it.start(["sh", "-c", f"{hog}; echo alive; sleep 1000"], linux=limits(memory_limit_in_bytes=16 << 20))
        for box in (first, group):
            status = exited(box)
            assert (status["reason"], status["exitCode"]) == ("OOMKilled", 137), status
        end = time.monotonic() + 60
        while "alive" not in child.logs():
            assert time.monotonic() < end, child.status()
            time.sleep(0.2)
        assert child.state() == "CONTAINER_RUNNING" and "alive" not in group.logs()
        assert "oom_kill 1" in setting(child, "memory.events").split("\n")


def test_block_io():
    """A container's weight among block devices is the guest's; a limit on a device of the host's is refused by its number."""
    def weight(spec):
        spec["linux"]["resources"]["blockIO"] = {"weight": 500}

    def throttle(spec):
        spec["linux"]["resources"]["blockIO"] = {"throttleReadBpsDevice": [{"major": 8, "minor": 16, "rate": 1 << 20}]}

    assert "fine" in of_spec("weight", weight, "/bin/sh", "-c", "echo fine")
    said = of_spec("throttle", throttle, "/bin/sh", "-c", "echo fine")
    assert "8:16" in said and "block device" in said and "fine" not in said, said


def test_all_limits_of_a_spec():
    """What CRI can't say and an OCI spec can: memory reservation, pids, CPU burst, idle."""
    def change(spec):
        spec["linux"]["resources"].update(memory={"limit": 64 << 20, "reservation": 32 << 20, "swap": -1}, pids={"limit": 77},
                                          cpu={"quota": 50000, "period": 100000, "burst": 1000})

    files = ["memory.low", "memory.max", "memory.swap.max", "pids.max", "cpu.max", "cpu.max.burst"]
    said = of_spec("all", change, "/bin/sh", "-c", "cat " + " ".join(f"/sys/fs/cgroup/{name}" for name in files))
    assert said.split("\n")[:6] == [str(32 << 20), str(64 << 20), "max", "77", "50000 100000", "1000"], said


def test_huge_pages():
    """Huge pages that an OCI spec's limits name are set aside before the container starts, and the limit holds; more than the machine holds is
    refused with figures."""
    def pages(mebibytes):
        def change(spec):
            spec["linux"]["resources"]["hugepageLimits"] = [{"pageSize": "2MB", "limit": mebibytes << 20}, {"pageSize": "1GB", "limit": 0}]
        return change

    script = "cat /sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages /sys/fs/cgroup/hugetlb.2MB.max"
    assert of_spec("huge", pages(16), "/bin/sh", "-c", script).split() == ["8", str(16 << 20)]
    said = of_spec("huge", pages(4096), "/bin/sh", "-c", script)
    assert "4096 MiB" in said and "io.husk.memory-mib" in said, said


def test_all_processes_are_in_the_pods_cgroup():
    """Shim, VMM and fs daemon are in the pod's cgroup on the host, also where systemd's names are used, and it goes with the pod."""
    for parent, place in (("/husk-test", "husk-test/{}"), ("husk.slice", "husk.slice/cri-containerd-{}.scope")):
        top = CGROUPS / place.partition("/")[0]
        made = not top.exists()
        if made:
            top.mkdir()
        try:
            with pod(linux={"cgroup_parent": parent}) as it:
                it.start(["sleep", "1000"])
                there = set((CGROUPS / place.format(it.id) / "cgroup.procs").read_text().split())
                wanted = {str(pid) for program in PROGRAMS for pid in pids(program)}
                # KVM's own thread for the machine, which has no program, is there too.
                threads = {pid for pid in there if not pathlib.Path(f"/proc/{pid}/cmdline").read_text()}
                assert there - threads == wanted and len(wanted) == 3, (there, wanted)
            assert not (CGROUPS / place.format(it.id)).exists()
        finally:
            if made:
                os.rmdir(top)


def test_overhead():
    """A fresh pod costs the host no more than the RuntimeClass says, beside what its container uses."""
    told = int(re.search(r"memory: (\d+)Mi", RUNTIME_CLASS.read_text())[1]) << 20
    with pod() as it:
        box = it.start(["sleep", "1000"])
        used = int(setting(box, "memory.current"))
        costs = int((CGROUPS / f"husk-test/{it.id}/memory.current").read_text())
        print(f"    the pod costs {costs >> 10} KiB, its container uses {used >> 10} KiB, the overhead is {(costs - used) >> 10} KiB", flush=True)
        assert costs - used <= told, f"{(costs - used) >> 20} MiB are more than the {told >> 20} MiB of the RuntimeClass"
