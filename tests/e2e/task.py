"""containerd's Task API by ctr: its calls, its events, and loggers other than FIFOs."""

import concurrent.futures
import contextlib
import itertools
import os
import pathlib
import re
import signal
import socket
import subprocess
import time

from contract import base, sides
from contract.base import mount
from harness.command import run, wait
from harness.containerd import NAMESPACE
from harness.crictl import crictl, pids, pod
from harness.runner import deadline
from vm.ttrpc import Client, field, fields

from .single import CTR

COUNT = itertools.count(1)
FOLDER = pathlib.Path("/run/husk-test")


def ctr(*arguments, **options):
    """Runs ctr against the tests' containerd."""
    return run(*CTR, *arguments, **options)


@contextlib.contextmanager
def single(*command, options=()):
    """A container in a VM of its own, removed afterwards; its id."""
    ident = f"task{next(COUNT)}"
    quiet = [] if "--log-uri" in options else ["--null-io"]
    ctr("run", "-d", *quiet, *options, "--runtime", "io.containerd.husk.v2", "husk.test/busybox:1", ident, *command)
    try:
        yield ident
    finally:
        ctr("task", "rm", "-f", ident, check=False)
        ctr("containers", "rm", ident)


def state(ident):
    """The task's status as `ctr task ls` prints it."""
    lines = [line.split() for line in ctr("task", "ls").stdout.splitlines()]
    return next((line[2] for line in lines if line[0] == ident), None)


class Events:
    """`ctr events` for the length of a with."""

    def __enter__(self):
        self.file = open(FOLDER / "events", "w+")
        self.process = subprocess.Popen([*CTR, "events"], stdout=self.file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        # It says nothing until there is an event, so one is made until it was seen.
        self.mark()
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.file.close()

    def mark(self):
        """Returns once the events so far are here."""
        name = f"mark{next(COUNT)}"
        tried = itertools.count(1)

        def seen():
            label = f"{name}-{next(tried)}"
            ctr("namespaces", "create", label)
            ctr("namespaces", "rm", label)
            time.sleep(0.1)
            return name in self.text()

        wait(seen)

    def text(self):
        return pathlib.Path(self.file.name).read_text()

    def of(self, ident):
        """Topic and text of the events of a task, in order."""
        found = [re.search(r" (/tasks/\S+) (\{.*\})", line) for line in self.text().splitlines()]
        return [(event[1], event[2]) for event in found if event and f'"{ident}"' in event[2]]


@deadline(180)
def test_events_tell_a_life():
    """create, start, exec, pause, resume, OOM, exit and delete are events, in order, with exit codes."""
    with Events() as events:
        with single("sleep", "1000", options=["--memory-limit", str(24 << 20)]) as ident:
            assert ctr("task", "exec", "--exec-id", "e1", ident, "sh", "-c", "exit 3", check=False).returncode == 3
            ctr("task", "pause", ident)
            assert state(ident) == "PAUSED"
            ctr("task", "resume", ident)
            assert state(ident) == "RUNNING"
            assert ctr("task", "exec", "--exec-id", "e2", ident, "tail", "/dev/zero", check=False).returncode == 137
            ctr("task", "kill", "-s", "SIGTERM", ident)
            ctr("task", "kill", "-s", "SIGKILL", ident)
            wait(lambda: state(ident) == "STOPPED")
            ctr("task", "rm", ident)
            events.mark()
            seen = events.of(ident)
    topics = [topic.removeprefix("/tasks/") for topic, _ in seen]
    assert topics == ["create", "start", "exec-added", "exec-started", "exit", "paused", "resumed", "exec-added", "exec-started",
                      "oom", "exit", "exit", "delete"], seen
    exits = [text for topic, text in seen if topic == "/tasks/exit"]
    assert '"id":"e1"' in exits[0] and '"exit_status":3' in exits[0], exits
    assert '"id":"e2"' in exits[1] and '"exit_status":137' in exits[1], exits
    assert f'"id":"{ident}"' in exits[2] and '"exit_status":137' in exits[2], exits


def test_processes_are_the_guests():
    """Pids are the processes that the container has in the guest, execs by their id; the host's VMM is not among them."""
    with single("sleep", "1000") as ident:
        ctr("task", "exec", "-d", "--fifo-dir", FOLDER / "fifos", "--exec-id", "more", ident, "sleep", "500")
        lines = [line.split(None, 1) for line in ctr("task", "ps", ident).stdout.splitlines()[1:]]
        assert len(lines) == 2 and ["more" in line[1] for line in lines] in ([True, False], [False, True]), lines
        assert str(pids("husk-vmm")[0]) not in [line[0] for line in lines]
        ctr("task", "kill", "--exec-id", "more", "-s", "SIGKILL", ident)
        wait(lambda: len(ctr("task", "ps", ident).stdout.splitlines()) == 2)
        assert state(ident) == "RUNNING"


def test_metrics_are_of_the_guests_cgroup():
    """Metrics have the container's own figures: CPU time, memory with its events, processes."""
    with single("sh", "-c", "head -c 8000000 /dev/zero > /dev/shm/x; sleep 1000 & exec sleep 1001",
                options=["--memory-limit", str(64 << 20)]) as ident:
        def table():
            return dict(line.split() for line in ctr("task", "metrics", ident).stdout.splitlines() if len(line.split()) == 2)

        # The shell goes on to its last program after the file is written.
        wait(lambda: (seen := table())["pids.current"] == "2" and int(seen["memory.usage"]) > 8_000_000)
        now = table()
        assert now["pids.current"] == "2" and int(now["memory.usage"]) < 64 << 20 and int(now["cpu.usage_usec"]) > 0, now


def _connected(ident):
    """A client of a task's shim."""
    connection = socket.socket(socket.AF_UNIX)
    address = pathlib.Path(f"/run/husk-test/state/io.containerd.runtime.v2.task/{NAMESPACE}/{ident}/address").read_text()
    connection.connect(address.removeprefix("unix://"))
    return Client(connection, "containerd.task.v2.Task")


def test_metrics_of_a_pod_have_its_network():
    """A pod's own metrics count what its interfaces carried."""
    with pod() as it:
        box, shim = it.start(["sleep", "1000"]), _connected(it.id)

        def received():
            # By hand, since ctr of containerd 1.6 does not know them: StatsResponse's Any, Metrics.network, NetworkStat's name and rx_bytes.
            code, answer = shim.call("Stats", field(1, it.id.encode()))
            assert code == 0, answer
            interfaces = [dict(fields(value)) for number, value in fields(dict(fields(dict(fields(answer))[1]))[2]) if number == 9]
            return {interface[1]: interface.get(2, 0) for interface in interfaces}[b"eth0"]

        before = received()
        box.exec("ping", "-c", "5", "-i", "0.2", "-s", "1000", "10.123.0.1")
        assert before + 5000 < received() < before + 20000, (before, received())
        shim.socket.close()


def test_metrics_have_huge_pages():
    """A container's metrics count its huge pages by their size, with their limit, which may be more than the machine started with."""
    spec, ident = base.spec(), f"task{next(COUNT)}"
    spec["process"]["args"] = ["sh", "-c", f"fallocate -l {20 << 20} /huge/file; sleep 1000"]
    spec["mounts"].append(mount("/huge", "hugetlbfs", "none", "pagesize=2M"))
    spec["linux"]["resources"]["hugepageLimits"] = [{"pageSize": "2MB", "limit": 320 << 20}]
    with sides.place(), sides.Husk() as husk, sides.rootfs(ident) as root:
        husk.start(sides.finished(spec, ident, root), ident)
        shim = _connected(husk.sandbox)

        def pages():
            code, answer = shim.call("Stats", field(1, ident.encode()))
            assert code == 0, answer
            # StatsResponse's Any, Metrics.hugetlb; HugeTlbStat's current, max, pagesize and failcnt.
            sizes = [dict(fields(value)) for number, value in fields(dict(fields(dict(fields(answer))[1]))[2]) if number == 7]
            size = {size[3]: size for size in sizes}[b"2MB"]
            return size.get(1, 0), size[2], size.get(4, 0)

        try:
            end = time.monotonic() + 20
            while (found := pages()) != (20 << 20, 320 << 20, 0):
                assert time.monotonic() < end, (found, ctr("task", "ps", ident).stdout)
                time.sleep(0.1)
        finally:
            shim.socket.close()
            husk.remove(ident)


def test_waits_and_connections():
    """Thirty clients that wait for one process are all told of its end, once, with the same status and time, and so is one that asks
    afterwards; Connect tells the shim's process and the machine's."""
    with single("sleep", "1000") as ident:
        clients = [_connected(ident) for _ in range(30)]
        code, answer = clients[0].call("Connect", field(1, ident.encode()))
        told = dict(fields(answer))
        assert (code, [told[1]], [told[2]]) == (0, pids("containerd-shim-husk-v2"), pids("husk-vmm")), (code, told)
        with concurrent.futures.ThreadPoolExecutor(len(clients)) as pool:
            waits = [pool.submit(client.call, "Wait", field(1, ident.encode()), 60) for client in clients]
            ctr("task", "kill", "-s", "SIGKILL", ident)
            ends = {wait.result() for wait in waits}
        ends.add(clients[0].call("Wait", field(1, ident.encode())))
        ((code, answer),) = ends
        assert code == 0 and dict(fields(answer))[1] == 137, ends
        for client in clients:
            client.socket.close()


def test_kill_of_all():
    """kill --all reaches every process of the container."""
    with single("sh", "-c", "trap 'exit 4' TERM; sleep 1000 & sleep 1001 & wait; wait; wait") as ident:
        wait(lambda: len(ctr("task", "ps", ident).stdout.splitlines()) == 4)
        ctr("task", "kill", "--all", "-s", "SIGTERM", ident)
        wait(lambda: state(ident) == "STOPPED")


def test_checkpoint_is_refused():
    """A checkpoint is refused in words, and so is a container that is to go on from one."""
    with single("sleep", "1000") as ident:
        said = ctr("task", "checkpoint", ident, check=False)
        assert said.returncode and "husk cannot checkpoint a container" in said.stderr, said.stderr
        connection = _connected(ident)
        # CreateTaskRequest's id, bundle and checkpoint; 12 is Unimplemented.
        code, said = connection.call("Create", field(1, b"restored") + field(2, b"/none") + field(8, b"/run/husk-test/checkpoint"))
        assert (code, said) == (12, b"husk cannot restore a container from a checkpoint"), (code, said)
        connection.socket.close()


def test_file_logger_and_pause():
    """file:// takes the output, in a folder that is made for it; a paused container adds nothing to it."""
    log = FOLDER / "new" / "folder" / "log"
    with single("sh", "-c", "while :; do echo tick; usleep 20000; done", options=["--log-uri", f"file://{log}"]) as ident:
        wait(lambda: log.exists() and log.stat().st_size > 20)
        ctr("task", "pause", ident)
        time.sleep(0.3)
        size = log.stat().st_size
        time.sleep(0.5)
        assert log.stat().st_size == size
        ctr("task", "resume", ident)
        wait(lambda: log.stat().st_size > size)
    run("rm", "-r", FOLDER / "new")


def test_binary_logger():
    """binary:// starts a logger with its arguments, which gets both streams to their ends and knows whose they are."""
    program, taken = FOLDER / "logger", FOLDER / "taken"
    program.write_text(f"#!/bin/sh\nexec 5>&-\n(cat <&3 > {taken}.out) & cat <&4 > {taken}.err\nwait\n"
                       f"echo $CONTAINER_NAMESPACE $CONTAINER_ID $1 $2 > {taken}.end\n")
    program.chmod(0o755)
    with single("sh", "-c", "echo out; echo err >&2", options=["--log-uri", f"binary://{program}?key=some%20value"]) as ident:
        wait(lambda: state(ident) == "STOPPED")
    end = pathlib.Path(f"{taken}.end")
    wait(lambda: end.exists() and end.read_text())
    said = [pathlib.Path(f"{taken}.{kind}").read_text() for kind in ("out", "err", "end")]
    assert said == ["out\n", "err\n", f"k8s.io {ident} key some value\n"], said


def test_update_of_a_running_container():
    """Memory, CPU quota and shares of a running container change, in the guest's cgroup."""
    with pod() as it:
        box = it.start(["sleep", "1000"])

        def now(*files):
            return [box.exec("cat", f"/sys/fs/cgroup/{file}") for file in files]

        crictl("update", "--memory", str(96 << 20), "--cpu-quota", "30000", "--cpu-period", "100000", "--cpu-share", "2048",
               box.id)
        assert now("memory.max", "cpu.max", "cpu.weight") == [str(96 << 20), "30000 100000", "79"]


def _took(events, ident, exec_id, script):
    """Seconds until the end of such an exec is told and the exec deleted. Since containerd 2 ctr itself stays until the end of the output,
    which is that of the program left behind, with any runtime; what counts is what containerd is told, and the output by then."""
    start = time.monotonic()
    with subprocess.Popen([*CTR, "task", "exec", "--fifo-dir", FOLDER / "fifos", "--exec-id", exec_id, ident, "sh", "-c", script],
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as client:
        try:
            wait(lambda: any(topic == "/tasks/exit" and f'"{exec_id}"' in text for topic, text in events.of(ident)))
            assert client.stdout.readline() == b"said\n"
        finally:
            client.kill()
    # The client of before containerd 2 may have done it.
    ctr("task", "delete", "--exec-id", exec_id, ident, check=False)
    return time.monotonic() - start


def test_a_daemon_left_behind_delays_nothing():
    """An exec that leaves a program with its output open ends at once, with all that it wrote itself."""
    with single("sleep", "1000") as ident, Events() as events:
        plain = min(_took(events, ident, f"plain{n}", "echo said") for n in range(2))
        left = min(_took(events, ident, f"left{n}", "sleep 300 & echo said") for n in range(2))
        print(f"    {plain:.2f} s without, {left:.2f} s with a daemon", flush=True)
        assert left < plain + 1


def test_the_exit_code_is_known_when_the_vm_dies():
    """A process that has ended, but whose output is still being taken when the VM dies, ended as it did."""
    ident = f"task{next(COUNT)}"
    with Events() as events, subprocess.Popen(
            [*CTR, "run", "--runtime", "io.containerd.husk.v2", "husk.test/busybox:1", ident, "sh", "-c",
             "echo begun; sleep 2; head -c 150000 /dev/zero | tr '\\0' x; exit 7"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        try:
            # The client takes no more; what is left of the output is on its way when the process ends.
            assert client.stdout.readline() == b"begun\n"
            os.kill(client.pid, signal.SIGSTOP)
            wait(lambda: len(ctr("task", "ps", ident).stdout.splitlines()) == 1)
            os.kill(pids("husk-vmm")[0], signal.SIGKILL)
            wait(lambda: any(topic == "/tasks/exit" for topic, _ in events.of(ident)))
            exits = [text for topic, text in events.of(ident) if topic == "/tasks/exit"]
            assert '"exit_status":7' in exits[0], exits
        finally:
            os.kill(client.pid, signal.SIGCONT)
            client.communicate()
            ctr("task", "rm", "-f", ident, check=False)
            ctr("containers", "rm", ident)

