"""Pods by containerd's Sandbox API (handler husk-sandbox, `sandboxer = "shim"`): no pause container, everything else as ever."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import time

from harness import crictl
from harness.command import run
from harness.containerd import needs
from harness.crictl import Pod, pids
from vm.ttrpc import Client, field, fields

from .single import CTR


@contextlib.contextmanager
def pod(**options):
    """A pod on husk-sandbox."""
    needs(2)
    it = Pod(handler="husk-sandbox", **options).run()
    try:
        yield it
    finally:
        it.remove()


def test_life_without_a_pause_container():
    """A pod runs, restarts its only container and is removed; containerd has no container for the sandbox itself."""
    with pod() as it:
        assert it.status()["state"] == "SANDBOX_READY"
        for _ in range(2):
            box = it.start(["sh", "-c", "echo here; exit 5"])
            while box.state() != "CONTAINER_EXITED":
                time.sleep(0.05)
            assert box.status()["exitCode"] == 5
            crictl.crictl("rm", box.id)
        box = it.start(["sleep", "1000"])
        containers = [line.split()[0] for line in run(*CTR, "containers", "ls").stdout.splitlines()[1:]]
        assert it.id not in containers and box.id in containers, containers
        assert it.id in run(*CTR, "sandboxes", "ls").stdout
        crictl.crictl("stopp", it.id)
        assert it.status()["state"] == "SANDBOX_NOTREADY"
        assert box.state() == "CONTAINER_EXITED"


def test_names_address_and_dns():
    """Host name, address, resolver, table of hosts and kernel parameters are the pod's."""
    dns = {"servers": ["10.123.0.53"], "searches": ["a.example", "b.example"], "options": ["ndots:3"]}
    with pod(hostname="fig", dns_config=dns, linux={"sysctls": {"net.core.somaxconn": "77"}}) as it:
        box = it.start(["sleep", "1000"])
        assert box.exec("hostname") == box.exec("cat", "/etc/hostname") == "fig"
        assert it.address() in box.exec("ip", "-4", "addr", "show", "eth0")
        assert box.exec("cat", "/etc/resolv.conf").splitlines() == ["search a.example b.example", "nameserver 10.123.0.53", "options ndots:3"]
        assert box.exec("cat", "/etc/hosts") == pathlib.Path("/etc/hosts").read_text().rstrip("\n")
        assert box.exec("cat", "/proc/sys/net/core/somaxconn") == "77"


def test_containers_share_the_pod():
    """Two containers have one /dev/shm and one localhost; a pod's own limits make its machine."""
    limits = {"resources": {"memory_limit_in_bytes": 200 << 20, "cpu_quota": 100000, "cpu_period": 100000}}
    with pod(linux=limits) as it:
        one = it.start(["sh", "-c", "echo shared > /dev/shm/x; echo page > /index.html; httpd -f -p 127.0.0.1:8080 -h /"])
        two = it.start(["sh", "-c", "until wget -qO- http://127.0.0.1:8080/index.html; do usleep 50000; done; cat /dev/shm/x; sleep 1000"])
        end = time.monotonic() + 20
        while two.logs() != "page\nshared":
            assert time.monotonic() < end, two.logs()
            time.sleep(0.1)
        assert one.exec("cat", "/proc/sys/kernel/hostname") == two.exec("hostname")
        total = int(one.exec("sh", "-c", "grep MemTotal /proc/meminfo").split()[1])
        assert total < 400 << 10, total
        info = json.loads(crictl.words("inspectp", it.id))["info"]
        assert info["pid"] == pids("husk-vmm")[0] and info["processStatus"] == "running", info


def test_stats_of_the_pod():
    """The pod's stats are what its processes take of the host, and its interfaces'."""
    with pod() as it:
        it.start(["sleep", "1000"])
        stats = json.loads(crictl.words("statsp", "-o", "json", it.id))["stats"][0]["linux"]
        assert int(stats["cpu"]["usageCoreNanoSeconds"]["value"]) > 0, stats
        assert int(stats["memory"]["workingSetBytes"]["value"]) > 20 << 20, stats
        assert stats["network"]["defaultInterface"]["name"] == "eth0", stats


def test_containerd_restarts(containerd):
    """containerd's own end and return leave the pod running, and usable afterwards."""
    with pod() as it:
        box = it.start(["sleep", "1000"])
        containerd.kill()
        containerd.start()
        assert it.status()["state"] == "SANDBOX_READY"
        assert box.exec("echo", "still here") == "still here"


def test_calls_that_containerd_leaves_out():
    """Ping and Platform of the Sandbox API, which containerd's CRI plugin has little use for, are answered; what is of another sandbox is
    NotFound."""
    with pod() as it, socket.socket(socket.AF_UNIX) as connection:
        connection.connect(json.loads(pathlib.Path(f"/run/husk/{it.id}/state.json").read_text())["socket"].removeprefix("unix://"))
        shim = Client(connection, "containerd.runtime.sandbox.v1.Sandbox")
        assert shim.call("PingSandbox", field(1, it.id.encode())) == (0, b"")
        # PlatformResponse's Platform: os and architecture.
        code, answer = shim.call("Platform", field(1, it.id.encode()))
        platform = dict(fields(dict(fields(answer))[1])) if code == 0 else answer
        assert (code, platform[1], platform[2]) == (0, b"linux", b"amd64"), (code, platform)
        # 5 is NotFound.
        assert shim.call("SandboxStatus", field(1, b"another"))[0] == 5


def _dies(program):
    with pod() as it:
        box = it.start(["sleep", "1000"])
        os.kill(pids(program)[0], signal.SIGKILL)
        start = time.monotonic()
        while box.state() != "CONTAINER_EXITED" or it.status()["state"] != "SANDBOX_NOTREADY":
            assert time.monotonic() - start < 10, f"{box.state()}, {it.status()['state']}"
            time.sleep(0.05)
        print(f"    told after {time.monotonic() - start:.1f} s", flush=True)


def test_vmm_killed():
    """kill -9 of the VMM ends containers and pod."""
    _dies("husk-vmm")


def test_shim_killed():
    """kill -9 of the shim ends containers and pod."""
    _dies("containerd-shim-husk-v2")


def test_refusals():
    """What can't be is refused with the pod's creation, in words, and nothing is left."""
    needs(2)
    for options, words in [({"linux": {"security_context": {"namespace_options": {"network": 2}}}}, "network namespace"),
                           ({"annotations": {"io.husk.kernel-args": "x"}}, "io.husk.kernel-args"),
                           ({"linux": {"resources": {"memory_limit_in_bytes": 1 << 20}}}, "memory limit")]:
        it = Pod(handler="husk-sandbox", **options)
        said = crictl.crictl("runp", "--runtime", "husk-sandbox", it.file, check=False)
        assert said.returncode and words in said.stderr, said.stderr
        assert not crictl.words("pods", "-q")
