"""Many at once."""

import concurrent.futures
import os
import pathlib
import re
import tempfile
import threading
import time

from harness.command import run, wait
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
    """50 execs that run at once in one container each give their own output, and end together."""
    # That many crictl at once would keep each other from reaching containerd within gRPC's 10 s.
    starting = threading.Semaphore(10)
    with tempfile.TemporaryDirectory(dir="/run/husk-test") as folder, pod() as it:
        box = it.start(["sleep", "1000"], mounts=[{"host_path": folder, "container_path": "/at"}])
        box.exec("mkfifo", "/go")

        def start(n):
            """Runs until somebody opens /go for writing."""
            started = pathlib.Path(folder, str(n))
            with starting:
                said = pool.submit(box.exec, "sh", "-c", f"echo number {n}; touch /at/{n}; cat /go; echo done", timeout=200)
                wait(lambda: started.exists() or said.done(), within=100)
            return said

        with concurrent.futures.ThreadPoolExecutor(100) as pool:
            execs = list(pool.map(start, range(50)))
            assert not any(said.done() for said in execs)
            box.exec("sh", "-c", ": > /go")
            assert [said.result() for said in execs] == [f"number {n}\ndone" for n in range(50)]


def _held(box):
    """Threads, KiB of memory (without the guest's) and descriptors that the pod's processes on the host hold, and all of its guest's
    together."""
    of = {}
    for name in ("containerd-shim-husk-v2", "husk-vmm", "husk-fs"):
        folder = pathlib.Path(f"/proc/{pids(name)[0]}")
        value = dict(re.findall(r"(\w+):\s*(\d+)", (folder / "status").read_text()))
        of[name] = int(value["Threads"]), int(value["RssAnon"]), len(os.listdir(folder / "fd"))
    # The agent is not among the processes that a container sees, but these are the kernel's own counts.
    threads, files, memory = box.exec("sh", "-c", "cat /proc/loadavg /proc/sys/fs/file-nr; grep AnonPages /proc/meminfo").splitlines()
    of["guest"] = int(threads.split()[3].split("/")[1]), int(memory.split()[1]), int(files.split()[0])
    return of


@deadline(full(180, 1800))
def test_execs_in_a_row_leak_nothing():
    """100 execs in a row (1,000 with HUSK_TEST_FULL) leave shim, VMM, fs daemon and guest with the descriptors, threads and memory that they
    had."""
    count = full(100, 1000)
    with pod() as it:
        box = it.start(["sleep", "100000"])

        def execs(what, number):
            for n in range(number):
                run(*CTR, "task", "exec", "--exec-id", f"{what}{n}", box.id, "true")

        # Pools, caches and lists have their size then.
        execs("first", 20)
        before, start = _held(box), time.monotonic()
        execs("then", count)
        print(f"    {count} in {time.monotonic() - start:.0f} s", flush=True)
        after = _held(box)
    print(f"    {before}\n    {after}", flush=True)
    for name, (threads, memory, descriptors) in before.items():
        has = after[name]
        # Threads for blocking work come and go.
        assert has[0] <= threads + 4, (name, before, after)
        assert has[1] <= memory + 1024, (name, before, after)
        # The guest's kernel counts its open files in batches of some ten.
        assert has[2] <= descriptors + (count // 2 if name == "guest" else 1), (name, before, after)
