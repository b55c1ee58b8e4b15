"""The two sides: runc by its own command, husk by ctr in one pod (the container type and sandbox id are the CRI plugin's annotations)."""

import contextlib
import copy
import fcntl
import itertools
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import termios

from harness.command import Failed, run
from harness.containerd import NAMESPACE, SOCKET

from . import base

CTR = ("ctr", "-a", SOCKET, "-n", NAMESPACE)
IMAGE = base.PLACE / "image"
COUNT = itertools.count(1)
KIND, SANDBOX = "io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"
SIZE = (33, 101)
# The longest that one container runs.
LIMIT = 60


class Runc:
    """runc, with a bundle for each container."""
    name = "runc"

    def _bundle(self, spec, ident):
        folder = base.PLACE / ident
        (folder / "config.json").write_text(json.dumps(spec))
        return ("runc", "run", "--bundle", folder)

    def command(self, spec, ident, _single=False):
        """Runs a container to its end."""
        return (*self._bundle(spec, ident), ident)

    def start(self, spec, ident):
        """Starts a container and leaves it running."""
        quiet, log = subprocess.DEVNULL, base.PLACE / ident / "log"
        program, *rest = self._bundle(spec, ident)
        # Whatever it is given as standard error the container keeps.
        done = subprocess.run((program, "--log", log, *rest, "-d", ident), stdin=quiet, stdout=quiet, stderr=quiet, timeout=LIMIT)
        if done.returncode:
            raise Failed(f"runc did not start {ident}: {log.read_text()}")

    def exec(self, ident, args, terminal=False):
        """Runs a process in a running container."""
        return ("runc", "exec", *(["-t"] if terminal else []), ident, *args)

    def kill(self, ident, signal):
        """Sends a signal to a container's first process."""
        run("runc", "kill", ident, signal)

    def remove(self, ident):
        """Ends and removes a container."""
        run("runc", "delete", "-f", ident)


class RuncShim:
    """runc by its shim and ctr, for what is the shim's part."""
    name = "shim"
    runtime = ("--runtime", "io.containerd.runc.v2")

    def config(self, spec, ident):
        """ctr's words for a spec."""
        path = base.PLACE / f"{ident}.json"
        path.write_text(json.dumps(spec))
        return ("--config", path)

    def start(self, spec, ident):
        """Starts a container and leaves it running."""
        run(*CTR, "run", "-d", *self.config(spec, ident), *self.runtime, ident, timeout=LIMIT)

    def remove(self, ident):
        """Ends and removes a container, or what is left of it."""
        run(*CTR, "tasks", "rm", "-f", ident, check=False)
        run(*CTR, "containers", "rm", ident)


class Husk(RuncShim):
    """husk, by ctr, in a pod."""
    name = "husk"
    runtime = ("--runtime", "io.containerd.husk.v2")

    def __init__(self):
        self.sandbox = f"contract{next(COUNT)}"

    def __enter__(self):
        spec = base.spec()
        spec["annotations"] = {KIND: "sandbox", SANDBOX: self.sandbox}
        spec["linux"]["cgroupsPath"] = f"/husk-test/{self.sandbox}"
        with rootfs(self.sandbox) as spec["root"]["path"]:
            super().start(spec, self.sandbox)
        return self

    def __exit__(self, *_):
        self.remove(self.sandbox)

    def _member(self, spec):
        return {**spec, "annotations": {KIND: "container", SANDBOX: self.sandbox}}

    def command(self, spec, ident, single=False):
        """Runs a container to its end."""
        return self.raw(spec if single else self._member(spec), ident)

    def raw(self, spec, ident):
        """Runs a container to its end, by the spec as it is."""
        tty = ["--tty"] if spec["process"].get("terminal") else []
        return (*CTR, "run", "--rm", *tty, *self.config(spec, ident), *self.runtime, ident)

    def start(self, spec, ident):
        """Starts a container and leaves it running."""
        super().start(self._member(spec), ident)

    def exec(self, ident, args, terminal=False):
        """Runs a process in a running container."""
        return (*CTR, "tasks", "exec", *(["--tty"] if terminal else []), "--exec-id", f"e{next(COUNT)}", ident, *args)

    def kill(self, ident, signal):
        """Sends a signal to a container's first process."""
        run(*CTR, "tasks", "kill", "-s", signal, ident)


@contextlib.contextmanager
def rootfs(ident):
    """A root file system of its own for one container, as snapshots are: an overlay on the image."""
    folder = base.PLACE / ident
    for name in ("upper", "work", "rootfs"):
        (folder / name).mkdir(parents=True)
    try:
        run("mount", "-t", "overlay", "overlay", "-o", f"lowerdir={IMAGE},upperdir={folder}/upper,workdir={folder}/work", folder / "rootfs")
        try:
            yield str(folder / "rootfs")
        finally:
            run("umount", folder / "rootfs")
    finally:
        run("rm", "-rf", folder)  # However deep a mount's destination was.


@contextlib.contextmanager
def place():
    """The image with what the table needs in it, and the volume."""
    IMAGE.mkdir(parents=True)
    own = base.PLACE / f"image{next(COUNT)}"  # Each time another: containerd 2 forgets one that was unmounted only some time later.
    own.mkdir()
    try:
        run(*CTR, "images", "mount", "--rw", "husk.test/busybox:1", own)
        run("mount", "--bind", own, IMAGE)
        _fill_image()
        _fill_volume(base.PLACE / "volume")
        yield
    finally:
        below = base.PLACE / "volume/tree/below"
        if os.path.ismount(below):
            run("umount", below)
        if os.path.ismount(IMAGE):
            run("umount", IMAGE)
        if os.path.ismount(own):
            run(*CTR, "images", "unmount", "--rm", own)
        shutil.rmtree(base.PLACE)


def _fill_image():
    for folder in ("opt", "links", "target", "root/closed", "run"):
        (IMAGE / folder).mkdir(exist_ok=True)
    (IMAGE / "links/inside").symlink_to("/target")
    (IMAGE / "links/up").symlink_to("../../../../../target-up")
    (IMAGE / "etc/hostname").write_text("from the image\n")
    (IMAGE / "etc/shadow").write_text("secret\n")
    (IMAGE / "etc/shadow").chmod(0o600)
    (IMAGE / "root/closed").chmod(0o700)
    for name, text, mode in (("plain", "", 0o644), ("bare", "echo bare\n", 0o755), ("bad", "#!/no/such\n", 0o755)):
        (IMAGE / "opt" / name).write_text(text)
        (IMAGE / "opt" / name).chmod(mode)


def _fill_volume(volume):
    # A tree of its own for recursive binds: in one pod a directory that is shown with and without what is mounted below it is one (design.md).
    for tree in ("dir", "tree"):
        (volume / tree / "below").mkdir(parents=True)
        (volume / tree / "inner").write_text("inner\n")
        (volume / tree / "run").write_text("#!/bin/sh\necho ran\n")
        (volume / tree / "run").chmod(0o755)
    (volume / "file").write_text("text\n")
    (volume / "link").symlink_to("dir")
    run("mount", "-t", "tmpfs", "tmpfs", volume / "tree/below")
    (volume / "tree/below/deep").write_text("deep\n")


def finished(spec, ident, root):
    """A copy of the spec with what each container has for itself."""
    spec = copy.deepcopy(spec)
    spec["root"]["path"] = root
    spec["linux"]["cgroupsPath"] = f"/husk-test/{ident}"
    return spec


def on_terminal(command):
    """Runs a command on a terminal of its own; its status and what was written there."""
    master, slave = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE, 0, 0))
    with subprocess.Popen([str(word) for word in command], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
                          preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0)) as process:
        os.close(slave)
        seen = b""
        try:
            # Ends with the last holder of the terminal, which the test's own deadline bounds.
            while part := os.read(master, 65536):
                seen += part
        except OSError:
            pass
        finally:
            os.close(master)
        return process.wait(LIMIT), re.sub("\r+\n", "\n", seen.decode(errors="replace"))


@contextlib.contextmanager
def sleeping(side):
    """A container that sleeps; gives its id."""
    ident = f"{side.name}{next(COUNT)}"
    spec = base.spec()
    spec["process"]["args"] = ["sleep", "1000"]
    with rootfs(ident) as root:
        side.start(finished(spec, ident, root), ident)
        try:
            yield ident
        finally:
            side.remove(ident)
