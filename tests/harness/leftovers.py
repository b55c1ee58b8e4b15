"""What a pod may leave on a host: processes, mounts, links, network namespaces, cgroups, sockets, files. Taken before and after,
the difference must be empty."""

import os
import pathlib
import time

from .command import output

PROGRAMS = ("husk-vmm", "husk-fs", "containerd-shim-husk-v2", "containerd-shim-runc-v2", "runc")
FOLDERS = ("/run/husk", "/run/husk-test/state", "/var/run/netns", "/run/containerd/s", "/run/containerd/fifo", "/dev/shm")


def _processes():
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            name = os.path.basename(os.readlink(entry / "exe"))
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if name in PROGRAMS:
            yield f"process {name} {entry.name} {state}"


def _files():
    for folder in FOLDERS:
        for path, folders, files in os.walk(folder):
            for name in folders + files:
                yield f"file {path}/{name}"


def _cgroups():
    for path, folders, _ in os.walk("/sys/fs/cgroup"):
        for name in folders:
            yield f"cgroup {path}/{name}"


def _sockets():
    for line in pathlib.Path("/proc/net/unix").read_text().splitlines()[1:]:
        name = line.split()[7:]
        if name and ("husk" in name[0] or "/run/containerd/s/" in name[0]) and not name[0].startswith("/run/husk-test/"):
            yield f"socket {name[0]}"


def snapshot():
    """Everything of interest that there is now."""
    links = (f"link {line.split(':')[1].strip()}" for line in output("ip", "-o", "link").splitlines())
    mounts = (f"mount {line.split()[4]}" for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines())
    return {*_processes(), *_files(), *_cgroups(), *_sockets(), *links, *mounts}


def expect_none(before, within=5):
    """Fails with the list if something is there that was not there before; what ends asynchronously (a shim that
    was told to shut down, the kernel's removal of a namespace) has `within` seconds."""
    end = time.monotonic() + within
    while True:
        left = sorted(snapshot() - before)
        if not left:
            return
        if time.monotonic() > end:
            raise AssertionError(f"left behind {within} s later:\n  " + "\n  ".join(left[:40]))
        time.sleep(0.2)
