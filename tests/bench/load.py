"""What containers do under load: files, network, streams, memory; by load.c, which every side runs."""

import contextlib
import pathlib
import re
import subprocess
import tempfile
import time

from bench import host
from bench.figures import Figures
from bench.sides import fastest, pod_of, sides
from harness.command import run
from harness.containerd import NAMESPACE, SOCKET
from harness.runner import deadline, full

MIB = 1 << 20
# Of small files in one folder, of MiB through a stream, of MiB that a container frees.
SMALL, STREAM, FREED = 1000, 4, 512
GATEWAY = "10.123.0.1"
ROUNDS = full(3, 9)


@contextlib.contextmanager
def _folder():
    """A folder of the host's with the program, for a container's /bench."""
    with tempfile.TemporaryDirectory(dir="/run/husk-test") as name:
        folder = pathlib.Path(name)
        run("gcc", "-O2", "-static", "-o", folder / "load", pathlib.Path(__file__).with_name("load.c"))
        yield folder


def _box(it, folder, **more):
    return it.start(["sleep", "1000"], mounts=[{"host_path": str(folder), "container_path": "/bench"}], **more)


def _told(figures, name, output):
    for line, value in re.findall(r"^(.+)=([\d.]+)$", output, re.M):
        figures.add(line, name, float(value))


def _shared():
    """The sides that differ in what they do with files, network and streams: not in how they were started."""
    return [name for name in sides() if name in ("runc", "before", fastest())]


@deadline(full(300, 1200))
def test_files(containerd):
    """Sequential and random reading and writing, and 1,000 small files, in a volume: never read in the pod before, and once more."""
    figures = Figures()
    with _folder() as folder, contextlib.ExitStack() as stack:
        boxes = {name: _box(stack.enter_context(pod_of(name)), folder) for name in _shared()}
        for number in range(full(2, ROUNDS)):
            for name, box in boxes.items():
                place = folder / f"{name}-{number}"
                (place / "made").mkdir(parents=True)
                for file in ("read", "random"):
                    (place / file).write_bytes(bytes(32 * MIB))
                for file in range(SMALL):
                    (place / "made" / str(file)).write_bytes(b"0123456789")
                _told(figures, name, box.exec("/bench/load", "files", f"/bench/{place.name}", str(SMALL)))
                run("rm", "-r", place)
    figures.finish(containerd.log.parent)


@deadline(full(200, 600))
def test_network(containerd):
    """TCP between pod and host: much at once, and requests one after the other."""
    figures = Figures()
    with _folder() as folder, contextlib.ExitStack() as stack:
        boxes = {name: _box(stack.enter_context(pod_of(name)), folder) for name in _shared()}
        server = subprocess.Popen([folder / "load", "serve", GATEWAY], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        try:
            server.stdout.readline()
            for _ in range(ROUNDS):
                for name, box in boxes.items():
                    _told(figures, name, box.exec("/bench/load", "net", GATEWAY))
        finally:
            server.kill()
            server.communicate()
    figures.finish(containerd.log.parent)


def _exec(box, number, *command):
    return subprocess.Popen(["ctr", "-a", SOCKET, "-n", NAMESPACE, "task", "exec", "--exec-id", f"stream-{number}", box.id, *command],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@deadline(full(200, 600))
def test_streams(containerd):
    """An exec's standard streams, from its first byte to its last."""
    figures = Figures()
    with contextlib.ExitStack() as stack:
        boxes = {name: stack.enter_context(pod_of(name)).start(["sleep", "1000"]) for name in _shared()}
        for number in range(ROUNDS):
            for name, box in boxes.items():
                with _exec(box, f"out-{number}", "head", "-c", str(STREAM * MIB), "/dev/zero") as client:
                    got = len(client.stdout.read1())
                    start = time.monotonic()
                    got += len(client.stdout.read())
                    figures.add("exec stream: out", name, got / 1e6 / (time.monotonic() - start))
                    assert client.wait() == 0 and got == STREAM * MIB, got
                with _exec(box, f"in-{number}", "sh", "-c", "read -r line; echo; wc -c") as client:
                    client.stdin.write(b"\n")
                    client.stdin.flush()
                    client.stdout.readline()
                    start = time.monotonic()
                    client.stdin.write(bytes(STREAM * MIB))
                    client.stdin.close()
                    assert int(client.stdout.read()) == STREAM * MIB
                    figures.add("exec stream: in", name, STREAM * MIB / 1e6 / (time.monotonic() - start))
                    assert client.wait() == 0
    figures.finish(containerd.log.parent)


@deadline(200)
def test_memory_given_back(containerd):
    """What the host has back 10 s after a container has freed 512 MiB."""
    figures = Figures()

    def touched():
        (pid,) = host.all_pids()["VMM"]
        return host.memory(pid)[1]

    with _folder() as folder, pod_of(fastest()) as it:
        box = _box(it, folder)
        before = touched()
        with _exec(box, "touch", "/bench/load", "touch", str(FREED)) as client:
            assert client.stdout.readline() == b"filled\n"
            full_of = touched()
            client.stdin.close()
            assert client.wait() == 0
        time.sleep(10)
        figures.add("memory given back", "husk", 100 * (full_of - touched()) / (full_of - before))
    figures.finish(containerd.log.parent)
