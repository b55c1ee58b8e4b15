"""critest, the CRI's own test suite (tests/tools, tests/images/critest), on a private containerd. Each of its specs is a test here."""

import contextlib
import os
import pathlib
import subprocess
import sys
import time

from harness import crictl
from harness.command import Failed, run
from harness.containerd import Containerd, installed

from .specs import collect

__all__ = ["collect", "environment"]

FOLDER = pathlib.Path("/run/husk-test/critest")
REGISTRY = """version: 0.1
log: {{level: warn}}
storage: {{filesystem: {{rootdirectory: {images}/registry}}, maintenance: {{uploadpurging: {{enabled: false}}, readonly: {{enabled: true}}}}}}
http: {{addr: "127.0.0.1:5000"}}
"""
# Every registry's name leads to ours.
HOSTS = """server = "http://127.0.0.1:5000"
[host."http://127.0.0.1:5000"]
  capabilities = ["pull", "resolve"]
"""


@contextlib.contextmanager
def registry(logs):
    """A registry on loopback with critest's images, for the length of the run."""
    hosts = pathlib.Path("/run/husk-test/certs.d/_default/hosts.toml")
    hosts.parent.mkdir(parents=True, exist_ok=True)
    hosts.write_text(HOSTS)
    config = FOLDER / "registry.yml"
    config.write_text(REGISTRY.format(images=os.environ["HUSK_CRITEST"]))
    with open(logs / "registry.log", "w") as log:
        process = subprocess.Popen(["docker-registry", "serve", config], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while run("curl", "-fs", "http://127.0.0.1:5000/v2/", check=False).returncode:
            if process.poll() is not None or time.monotonic() > end:
                raise Failed(f"docker-registry does not serve: {(logs / 'registry.log').read_text()[-3000:]}")
        yield
    finally:
        process.kill()
        process.wait(10)


@contextlib.contextmanager
def environment(logs, binaries, images):
    """containerd and the registry. critest's scratch files are on a shared mount, as a node's root is, and open to all users."""
    missing = installed("docker-registry", "apparmor_parser", "curl")
    if missing:
        sys.exit(f"tests: not installed here: {', '.join(missing)} (see tests/packages)")
    (FOLDER / "tmp").mkdir(parents=True, exist_ok=True)
    (FOLDER / "tmp").chmod(0o1777)
    os.environ["TMPDIR"] = str(FOLDER / "tmp")
    # critest calls sudo to load its AppArmor profiles; we are root.
    sudo = FOLDER / "bin/sudo"
    sudo.parent.mkdir(exist_ok=True)
    sudo.write_text('#!/bin/sh\nexec "$@"\n')
    sudo.chmod(0o755)
    os.environ["PATH"] = f"{sudo.parent}:{os.environ['PATH']}"
    # The suite tries the file system of containerd's state to learn whether the host can map ids.
    containerd = Containerd(logs, binaries, images, state_on_disk=True)
    with registry(logs):
        containerd.start()
        try:
            containerd.load("pause", "busybox")
            crictl.first_pod()
            yield containerd
        finally:
            containerd.stop()
