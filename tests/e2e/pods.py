"""A pod's life by crictl: what is asked for at start is what the container sees, and it ends as it should."""

import json
import time

from harness.command import Failed
from harness.crictl import crictl, exit_code, host_kernel, pod


def test_runs_in_a_kernel_of_its_own():
    """The container shows the guest's kernel, not the host's."""
    with pod() as it:
        box = it.start(["sleep", "1000"])
        assert box.state() == "CONTAINER_RUNNING"
        assert box.exec("uname", "-r") != host_kernel()


def test_names_and_address():
    """Hostname and address are the pod's, with the default route out."""
    with pod(hostname="fig") as it:
        box = it.start(["sleep", "1000"])
        assert box.exec("hostname") == "fig"
        assert it.address() in box.exec("ip", "-4", "addr", "show", "eth0")
        assert "default via 10.123.0.1" in box.exec("ip", "route")


def test_own_cgroup():
    """The container is at the root of a cgroup of its own, and its limits are set there."""
    with pod() as it:
        box = it.start(["sleep", "1000"], linux={"resources": {"memory_limit_in_bytes": 64 << 20, "cpu_quota": 50000,
                                                               "cpu_period": 100000}})
        assert box.exec("cat", "/proc/self/cgroup") == "0::/"
        assert box.exec("cat", "/sys/fs/cgroup/memory.max") == str(64 << 20)
        assert box.exec("cat", "/sys/fs/cgroup/cpu.max") == "50000 100000"


def test_two_containers_share_the_pod():
    """Two containers reach each other over localhost and don't see each other's processes or files."""
    with pod() as it:
        server = it.start(["sh", "-c", "echo from the server > /index.html; httpd -f -p 127.0.0.1:8080 -h /"])
        client = it.start(["sleep", "1000"])
        assert client.exec("wget", "-qO-", "http://127.0.0.1:8080/index.html") == "from the server"
        assert "httpd" not in client.exec("ps")
        assert "index.html" not in client.exec("ls", "/")
        assert server.exec("hostname") == client.exec("hostname")


def test_shared_processes():
    """With shareProcessNamespace containers see each other's processes, and end with the pod."""
    shared = {"security_context": {"namespace_options": {"pid": 0}}}
    with pod() as it:
        it.start(["sleep", "4321"], linux=shared)
        other = it.start(["sleep", "1000"], linux=shared)
        assert "sleep 4321" in other.exec("ps")


def test_exit_codes():
    """Exit codes 0, 1, 42 and death by a signal come back from exec and from a container."""
    with pod() as it:
        box = it.start(["sleep", "1000"])
        for code in (0, 1, 42):
            assert exit_code(crictl("exec", box.id, "sh", "-c", f"exit {code}", check=False)) == code
        assert exit_code(crictl("exec", box.id, "sh", "-c", "kill -9 $$", check=False)) == 137
        done = it.start(["sh", "-c", "exit 7"])
        assert _exited(done)["exitCode"] == 7


def test_missing_command_is_told_at_once():
    """A command that does not exist is containerd's StartError with the cause; the pod is unharmed."""
    with pod() as it:
        box = it.start(["sleep", "1000"])
        wrong = it.create(["/no/such/program"])
        start = time.monotonic()
        said = crictl("start", wrong.id, check=False)
        assert said.returncode and "/no/such/program" in said.stderr and "no such file" in said.stderr.lower(), said.stderr
        assert time.monotonic() - start < 10
        assert wrong.status()["reason"] == "StartError"
        assert box.exec("echo", "unharmed") == "unharmed"
        said = crictl("exec", "-s", box.id, "/no/such/program", check=False)
        assert said.returncode and "/no/such/program" in said.stderr, said.stderr


def test_stop_is_graceful_then_not():
    """Stop sends SIGTERM, which the process sees; one that ignores it is killed after its grace."""
    with pod() as it:
        polite = it.start(["sh", "-c", "trap 'echo got term; exit 3' TERM; while :; do sleep 1; done"])
        crictl("stop", "--timeout", "30", polite.id)
        assert _exited(polite)["exitCode"] == 3
        assert "got term" in polite.logs()
        deaf = it.start(["sh", "-c", "trap '' TERM; while :; do sleep 1; done"])
        start = time.monotonic()
        crictl("stop", "--timeout", "2", deaf.id)
        assert 2 <= time.monotonic() - start < 20
        assert _exited(deaf)["exitCode"] == 137


def test_restarts_within_a_pod():
    """A pod whose last container was removed takes another one."""
    with pod() as it:
        for _ in range(3):
            box = it.start(["sh", "-c", "echo here"])
            _exited(box)
            assert box.logs() == "here"
            crictl("rm", box.id)


def test_logs_are_whole():
    """What a process writes just before its end is in its log, both streams, to the last byte."""
    with pod() as it:
        box = it.start(["sh", "-c", "seq 1 3000; echo the end >&2"])
        _exited(box)
        end = time.monotonic() + 10
        while len(lines := box.log_file().read_text().splitlines()) < 3001:
            assert time.monotonic() < end, f"{len(lines)} lines of 3001, last {lines[-3:]}, {box.status()}"
            time.sleep(0.1)
        said = [line.split(" ", 3)[3] for line in lines if " stdout F " in line]
        assert said == [str(number) for number in range(1, 3001)]
        assert any(line.endswith(" stderr F the end") for line in lines)


def test_volume():
    """A directory of the host is seen and written in the container; a read-only one is not written."""
    import tempfile
    with tempfile.TemporaryDirectory(dir="/run/husk-test") as folder, pod() as it:
        open(f"{folder}/from-host", "w").write("hello")
        box = it.start(["sleep", "1000"], mounts=[{"host_path": folder, "container_path": "/rw"},
                                                  {"host_path": folder, "container_path": "/ro", "readonly": True}])
        assert box.exec("cat", "/rw/from-host") == "hello"
        box.exec("sh", "-c", "echo back > /rw/from-guest")
        assert open(f"{folder}/from-guest").read() == "back\n"
        try:
            box.exec("sh", "-c", "echo no > /ro/never")
        except Failed as error:
            assert "Read-only file system" in str(error)
        else:
            raise AssertionError("wrote to a read-only volume")


def test_stats_and_oom():
    """Stats tell of the guest's cgroup; a container that takes too much is OOMKilled."""
    with pod() as it:
        box = it.start(["sleep", "1000"])
        stats = json.loads(crictl("stats", "-o", "json", box.id).stdout)["stats"][0]
        assert int(stats["memory"]["workingSetBytes"]["value"]) > 0
        greedy = it.start(["sh", "-c", "tail /dev/zero"], linux={"resources": {"memory_limit_in_bytes": 16 << 20}})
        assert _exited(greedy, within=60)["reason"] == "OOMKilled"


def _exited(container, within=30):
    """The status of a container that ends by itself."""
    end = time.monotonic() + within
    while True:
        status = container.status()
        if status["state"] == "CONTAINER_EXITED":
            return status
        assert time.monotonic() < end, f"still {status['state']} after {within} s"
        time.sleep(0.2)
