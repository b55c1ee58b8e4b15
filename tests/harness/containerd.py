"""A private containerd (the first in PATH) with a CNI bridge and the runtimes runc and husk, for one run of tests."""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import socket
import subprocess
import time

from .command import Failed, output, run
from .runner import Older

SOCKET = "/run/husk-test/containerd.sock"
NAMESPACE = "k8s.io"
CLIENT_CONFIG = "/run/husk-test/crictl.yaml"
SANDBOXES = f"/run/husk-test/state/io.containerd.sandbox.controller.v1.shim/{NAMESPACE}"

# husk's own configuration in a run of tests.
TEMPLATES = pathlib.Path("/etc/husk/config.d/00-husk-test.toml")

CONFIG = """version = {format}
root = "/var/lib/containerd/husk-test"
state = "/run/husk-test/state"
[grpc]
  address = "{socket}"
{own}
[plugins."{cri}".cni]
  {bin_dir}
  conf_dir = "/run/husk-test/cni"
[plugins."{cri}".containerd]
  default_runtime_name = "husk"
  [plugins."{cri}".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins."{cri}".containerd.runtimes.husk]
    runtime_type = "io.containerd.husk.v2"
    pod_annotations = ["io.husk.*"]
{sandbox}{more}"""

# A further runtime, by its handler.
RUNTIME = """  [plugins."{cri}".containerd.runtimes.{handler}]
    runtime_type = "{type}"
"""

# husk by the Sandbox API, without a pause container: containerd 2.
SANDBOX = """  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.husk-sandbox]
    runtime_type = "io.containerd.husk.v2"
    sandboxer = "shim"
    disable_pause_image_pull = true
"""

# What the versions put differently (containerd's docs/cri/config.md of release/1.7 and release/2.0).
CONFIG_1 = {"format": 2, "sandbox": "", "cri": "io.containerd.grpc.v1.cri", "bin_dir": 'bin_dir = "/usr/lib/cni"', "own": """
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "husk.test/pause:1"
[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "/run/husk-test/certs.d"
"""}
# The two switches are off as in containerd 1, so that a test means the same on every version.
CONFIG_2 = {"format": 3, "sandbox": SANDBOX, "cri": "io.containerd.cri.v1.runtime", "bin_dir": 'bin_dirs = ["/usr/lib/cni"]', "own": """
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "husk.test/pause:1"
[plugins."io.containerd.cri.v1.images".registry]
  config_path = "/run/husk-test/certs.d"
[plugins."io.containerd.cri.v1.runtime"]
  enable_unprivileged_ports = false
  enable_unprivileged_icmp = false
"""}

NETWORK = {
    "cniVersion": "1.0.0", "name": "husk-test", "plugins": [
        {"type": "bridge", "bridge": "husk0", "isGateway": True, "ipMasq": False,
         "ipam": {"type": "host-local", "dataDir": "/run/husk-test/ipam", "ranges": [[{"subnet": "10.123.0.0/16"}]],
                  "routes": [{"dst": "0.0.0.0/0"}]}},
        {"type": "portmap", "capabilities": {"portMappings": True}}]}


@functools.cache
def version():
    """The containerd that is first in PATH: (1, 6) and the like."""
    return tuple(int(part) for part in output("containerd", "--version").split()[2].lstrip("v").split(".")[:2])


def needs(major):
    """Skips a test for which this containerd is too old."""
    if version() < (major, 0):
        raise Older(f"needs containerd {major}")


class Containerd:
    """The daemon; `log` is what it and the shims say."""

    def __init__(self, logs, binaries, images, state_on_disk=False, runtimes=None):
        self.log = pathlib.Path(logs) / "containerd.log"
        self.binaries = binaries
        self.images = images
        self.state_on_disk = state_on_disk
        self.runtimes = runtimes or {}
        self.process = None
        self.loaded = set()
        self.made = []

    def start(self):
        """Starts the daemon and returns once it said that it is ready."""
        for folder in ("/run/husk-test/cni", "/var/lib/containerd/husk-test"):
            os.makedirs(folder, exist_ok=True)
        self._disk("/var/lib/containerd/husk-test")
        # No build in the background, which the tests would take for something left behind.
        self.made += [folder for folder in (TEMPLATES.parent.parent, TEMPLATES.parent) if not folder.exists()]
        TEMPLATES.parent.mkdir(parents=True, exist_ok=True)
        TEMPLATES.write_text('templates = "existing"\n')
        pathlib.Path("/run/husk-test/cni/10-husk.conflist").write_text(json.dumps(NETWORK))
        config = pathlib.Path("/run/husk-test/config.toml")
        form = CONFIG_2 if version() >= (2, 0) else CONFIG_1
        more = "".join(RUNTIME.format(cri=form["cri"], handler=handler, type=kind) for handler, kind in self.runtimes.items())
        config.write_text(CONFIG.format(socket=SOCKET, more=more, **form))
        pathlib.Path(CLIENT_CONFIG).write_text(f"runtime-endpoint: unix://{SOCKET}\nimage-endpoint: unix://{SOCKET}\ntimeout: 60\n")
        ready = "/run/husk-test/ready.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            pathlib.Path(ready).unlink(missing_ok=True)
            notify.bind(ready)
            notify.settimeout(60)
            env = {**os.environ, "PATH": f"{self.binaries}:{os.environ['PATH']}", "NOTIFY_SOCKET": ready}
            with open(self.log, "a") as log:
                self.process = subprocess.Popen(["containerd", "-c", str(config)], env=env, stdin=subprocess.DEVNULL,
                                                stdout=log, stderr=log)
            try:
                while b"READY=1" not in notify.recv(4096):
                    pass
            except TimeoutError:
                raise Failed(f"containerd was not ready after 60 s: {self.log.read_text()[-3000:]}") from None
        # READY=1 comes before the CRI plugin serves, and nothing tells of that.
        end = time.monotonic() + 60
        while run("crictl", "--config", CLIENT_CONFIG, "version", check=False).returncode:
            if time.monotonic() > end:
                raise Failed(f"containerd's CRI service was not ready after 60 s: {self.log.read_text()[-3000:]}")

    def _disk(self, folder):
        """Gives a containerd that knows of ID-mapped mounts a file system that has them: the test host's tmpfs does not (Linux 6.1)."""
        if version() < (2, 0) or not os.environ.get("TESTHOST") or os.path.ismount(folder):
            return
        image = "/var/lib/containerd/disk"
        with open(image, "w") as file:
            file.truncate(3 << 30)
        run("mkfs.ext4", "-q", "-O", "^has_journal", "-E", "nodiscard", image)
        run("mount", "-o", "loop", image, folder)
        if self.state_on_disk:
            for state in (f"{folder}/state", "/run/husk-test/state"):
                os.makedirs(state, exist_ok=True)
            run("mount", "--bind", f"{folder}/state", "/run/husk-test/state")

    def load(self, *names):
        """Loads images of tests/images by name, each once."""
        for name in set(names) - self.loaded:
            run("ctr", "-a", SOCKET, "-n", NAMESPACE, "images", "import", "--local" if version() >= (2, 0) else "--digests",
                f"{self.images}/{name}.tar", timeout=300)
            self.loaded.add(name)

    def stop(self):
        """Ends the daemon; the pods stay, as on a real node. husk's configuration is again as it was."""
        self.process.terminate()
        self.process.wait(30)
        TEMPLATES.unlink(missing_ok=True)
        while self.made:
            # Where somebody has put something into it meanwhile, it stays.
            with contextlib.suppress(OSError):
                self.made.pop().rmdir()

    def kill(self):
        """Ends the daemon without a chance to tidy up."""
        self.process.kill()
        self.process.wait(30)


def installed(*more):
    """Programs that a run needs, and `more`, of which none is there."""
    return [name for name in ("containerd", "ctr", "crictl", "runc", "ip", *more) if not shutil.which(name)]
