"""What the kubelet's probes and hooks do, as they reach a runtime: execs with a timeout, and a pod that is very slow."""

import pathlib
import time

from harness.crictl import crictl, pids, pod


def test_a_probe_that_takes_too_long_is_killed_with_all_it_started():
    """An exec beyond its timeout is killed, its children too (runc leaves those running); the container goes on."""
    with pod() as it:
        box = it.start(["sleep", "1000"])
        start = time.monotonic()
        said = crictl("exec", "-s", "--timeout", "2", box.id, "sh", "-c", "sleep 777 & (sleep 778; true) & sleep 779; true", check=False)
        took = time.monotonic() - start
        assert said.returncode and "timeout" in said.stderr, said
        assert 2 <= took < 8, took
        left = [line for line in box.exec("ps").splitlines() if "sleep 77" in line]
        assert not left, left
        assert box.state() == "CONTAINER_RUNNING"


def test_hooks():
    """postStart and preStop, which the kubelet runs as execs: the first may come as soon as the container is started, the second tells
    process 1 to finish its work, which then gets SIGTERM."""
    script = """work() { echo begun; while [ ! -e /finish ]; do usleep 50000; done; echo finished; touch /finished; }
trap 'echo told to end; exit 0' TERM; cat /hook; work; while :; do usleep 50000; done"""
    with pod() as it:
        box = it.create(["sh", "-c", "until [ -e /hook ]; do usleep 20000; done; " + script])
        crictl("start", box.id)
        box.exec("sh", "-c", "echo hooked > /made; mv /made /hook")
        box.exec("sh", "-c", "touch /finish; until [ -e /finished ]; do usleep 50000; done")
        crictl("stop", "--timeout", "30", box.id)
        assert box.logs().splitlines() == ["hooked", "begun", "finished", "told to end"], box.logs()
        assert box.status()["exitCode"] == 0


def test_a_throttled_pod_lives():
    """A pod that its host gives 1 % of a CPU for 6 s lives, and is as before afterwards."""
    with pod() as it:
        box = it.start(["sh", "-c", "while :; do :; done"])
        vmm = pids("husk-vmm")
        cgroup = next(pathlib.Path("/sys/fs/cgroup").glob(f"**/{it.id}"))
        (cgroup / "cpu.max").write_text("1000 100000")
        try:
            end = time.monotonic() + 6
            while time.monotonic() < end:
                assert box.state() == "CONTAINER_RUNNING"
                time.sleep(0.5)
            assert int(dict(line.split() for line in (cgroup / "cpu.stat").read_text().splitlines())["nr_throttled"]) > 20
        finally:
            (cgroup / "cpu.max").write_text("max 100000")
        assert box.exec("echo", "alive") == "alive"
        assert pids("husk-vmm") == vmm and box.state() == "CONTAINER_RUNNING"
