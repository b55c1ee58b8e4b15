"""Pods and containers by crictl, as a user of CRI drives them."""

import contextlib
import itertools
import json
import os
import pathlib
import re
import tempfile

from .command import output, run
from .containerd import CLIENT_CONFIG, NAMESPACE, SANDBOXES, SOCKET, version

COUNT = itertools.count(1)
# The same tests run on runc, to tell a fault of husk from one of the tests.
HANDLER = os.environ.get("HUSK_TEST_HANDLER", "husk")


# Shared by every call of crictl here; its own default of 2 s is too short for an emulated host.
COMMAND = ["crictl", "--config", CLIENT_CONFIG]


def crictl(*arguments, **options):
    """Runs crictl against the tests' containerd."""
    return run(*COMMAND, *arguments, **options)


def exit_code(done):
    """The exit code of what `crictl exec` ran: crictl itself ends with 1 and names it."""
    told = re.search(r"exit code (\d+)", done.stderr)
    return int(told[1]) if told else done.returncode


def words(*arguments, **options):
    """What crictl prints, without the last newline."""
    return crictl(*arguments, **options).stdout.rstrip("\n")


def _file(content):
    with tempfile.NamedTemporaryFile("w", suffix=".json", dir="/run/husk-test", delete=False) as file:
        json.dump(content, file)
    return file.name


class Pod:
    """A sandbox; `handler` is husk unless runc is to be compared."""

    def __init__(self, handler=HANDLER, annotations=None, **config):
        number = next(COUNT)
        name = config.pop("name", f"pod{number}")
        self.logs = f"/run/husk-test/logs/{name}-{number}"
        os.makedirs(self.logs, exist_ok=True)
        self.config = {"metadata": {"name": name, "namespace": "test", "uid": f"uid{number}", "attempt": 1},
                       "hostname": config.pop("hostname", name), "log_directory": self.logs,
                       "annotations": annotations or {}, "linux": {"cgroup_parent": "/husk-test", **config.pop("linux", {})},
                       **config}
        self.handler = handler
        self.file = _file(self.config)
        self.id = None

    def run(self, **options):
        """crictl runp."""
        self.id = words("runp", "--runtime", self.handler, self.file, **options)
        return self

    def create(self, command, image="busybox", name=None, **config):
        """crictl create; returns the container."""
        name = name or f"c{next(COUNT)}"
        linux = config.pop("linux", {})
        security = linux.setdefault("security_context", {})
        security.setdefault("namespace_options", {"pid": 1})  # a pid namespace of its own, as the kubelet asks
        config = {"metadata": {"name": name, "attempt": 1}, "image": {"image": f"husk.test/{image}:1"},
                  "log_path": f"{name}.log", "linux": linux, **({"command": command} if command else {}), **config}
        return Container(self, words("create", "--no-pull", self.id, _file(config), self.file), name)

    def start(self, command, **options):
        """crictl create and start."""
        container = self.create(command, **options)
        crictl("start", container.id)
        return container

    def status(self):
        """The pod's status as CRI gives it."""
        return json.loads(words("inspectp", self.id))["status"]

    def address(self):
        """The pod's first address."""
        return self.status()["network"]["ip"]

    def remove(self):
        """crictl rmp -f."""
        crictl("rmp", "-f", self.id)


class Container:
    """A container of a pod."""

    def __init__(self, pod, ident, name):
        self.pod = pod
        self.id = ident
        self.name = name

    def exec(self, *command, **options):
        """What a command in the container prints (crictl exec -s)."""
        return words("exec", "-s", self.id, *command, **options)

    def status(self):
        """The container's status as CRI gives it."""
        return json.loads(words("inspect", self.id))["status"]

    def state(self):
        """CONTAINER_RUNNING and the like."""
        return self.status()["state"]

    def logs(self):
        """What the container wrote so far."""
        return words("logs", self.id)

    def log_file(self):
        """The file that the container's log goes to."""
        return pathlib.Path(self.pod.logs) / f"{self.name}.log"


@contextlib.contextmanager
def pod(**options):
    """A running pod for the length of a test, removed afterwards."""
    it = Pod(**options)
    it.run()
    try:
        yield it
    finally:
        it.remove()


def first_pod():
    """Starts and removes a pod and a container on runc: what containerd, CNI and runc make once and keep (the bridge, empty folders and
    cgroups) is there from then on."""
    with pod(handler="runc") as it:
        it.start(["sleep", "1000"])  # one that ends by itself races with its removal in containerd 1.6
    run("ctr", "-a", SOCKET, "-n", NAMESPACE, "run", "--rm", "--runtime", "io.containerd.runc.v2", "husk.test/busybox:1", "first", "true")
    if version() >= (2, 0):
        # Made for the first pod by the Sandbox API, which runc has not.
        os.makedirs(SANDBOXES, mode=0o711, exist_ok=True)


def pids(name):
    """Process ids of a program by its full path's last part."""
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if os.path.basename(os.readlink(entry / "exe")) == name:
                found.append(int(entry.name))
        except OSError:
            continue
    return sorted(found)


def host_kernel():
    """uname -r of the host."""
    return output("uname", "-r")
