"""Many at once."""

import concurrent.futures
import os
import pathlib
import re
import time

from harness.command import run
from harness.crictl import Pod, pids, pod
from harness.runner import deadline, full

from .single import CTR


@deadline(300)
def test_ten_pods_at_once():
    """10 pods started together all run, and are gone without a trace after removal."""
    pods = [Pod() for _ in range(10)]
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        try:
            list(pool.map(lambda it: it.run(timeout=200), pods))
            boxes = list(pool.map(lambda it: it.start(["sleep", "1000"]), pods))
            assert [box.state() for box in boxes] == ["CONTAINER_RUNNING"] * 10
            assert len({it.address() for it in pods}) == 10
        finally:
            list(pool.map(lambda it: it.remove() if it.id else None, pods))


@deadline(240)
def test_fifty_execs_at_once():
    """50 execs at once in one container each give their own output."""
    it = Pod().run()
    try:
        box = it.start(["sleep", "1000"])
        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            said = list(pool.map(lambda n: box.exec("echo", f"number {n}", timeout=200), range(50)))
        assert said == [f"number {n}" for n in range(50)]
    finally:
        it.remove()


def _figures(status, descriptors):
    """Threads, KiB in memory and descriptors of a process."""
    value = {key: int(number) for key, number in re.findall(r"(Threads|VmRSS):\s*(\d+)", status)}
    return {"threads": value["Threads"], "memory": value["VmRSS"], "descriptors": descriptors}


def _held(box):
    """What the pod's processes on the host and the agent in its guest hold."""
    of = {}
    for name in ("containerd-shim-husk-v2", "husk-vmm", "husk-fs"):
        folder = pathlib.Path(f"/proc/{pids(name)[0]}")
        of[name] = _figures((folder / "status").read_text(), len(os.listdir(folder / "fd")))
    agent = box.exec("sh", "-c", "cat /proc/1/status; ls /proc/1/fd | wc -l")
    print(f"    {agent.split()[1]}")
    of["husk-agent"] = _figures(agent, int(agent.split()[-1]))
    return of


@deadline(full(180, 1800))
def test_execs_in_a_row_leak_nothing():
    """60 execs in a row (1,000 with HUSK_TEST_FULL) leave shim, VMM, fs daemon and agent with the descriptors, threads and memory that they
    had."""
    everything = {"security_context": {"privileged": True, "namespace_options": {"pid": 2}}}
    count = full(60, 1000)
    with pod(linux=everything) as it:
        box = it.start(["sleep", "100000"], linux=everything)

        def execs(what, number):
            for n in range(number):
                run(*CTR, "task", "exec", "--exec-id", f"{what}{n}", box.id, "true")

        # Pools, caches and lists have their size then.
        execs("first", 30)
        before, start = _held(box), time.monotonic()
        execs("then", count)
        print(f"    {count} in {time.monotonic() - start:.0f} s", flush=True)
        after = _held(box)
    print(f"    {before}\n    {after}", flush=True)
    for name, had in before.items():
        has = after[name]
        assert has["descriptors"] <= had["descriptors"] + 1, (name, had, has)
        # Threads for blocking work come and go.
        assert has["threads"] <= had["threads"] + 4, (name, had, has)
        # The VMM's memory is the guest's too, which that fills with its cache.
        assert name == "husk-vmm" or has["memory"] <= had["memory"] + 1024, (name, had, has)
