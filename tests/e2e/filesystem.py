"""Files in a pod are as local files: the same operations (tests/e2e/fsops) in a container on runc, whose files are the host's own, and in one
on husk, compared line by line; on the container's root, on an ext4 volume and on a tmpfs volume, the volumes with a second container
of the pod as the other process. What differs is a row of vmm/docs/files.md, with its reason, and nothing else may."""

import contextlib
import ctypes
import os
import pathlib
import struct
import tempfile
import time

from harness.command import output, run
from harness.crictl import HANDLER, pids, pod
from harness.runner import deadline, full

DOCUMENT = pathlib.Path(__file__).resolve().parent.parent.parent / "vmm/docs/files.md"
PLACES = ("root", "ext4", "tmpfs")
ALL = {"security_context": {"capabilities": {"add_capabilities": ["ALL"]}}}


@contextlib.contextmanager
def mounted(folder, *arguments):
    """A file system for the length of a test."""
    os.makedirs(folder)
    run("mount", *arguments, folder)
    try:
        yield folder
    finally:
        run("umount", folder)


@contextlib.contextmanager
def ext4(folder, mib, *options, mount="loop"):
    """An ext4 file system in a file."""
    with tempfile.NamedTemporaryFile(dir="/run/husk-test") as image:
        os.truncate(image.name, mib << 20)
        run("mkfs.ext4", "-q", *options, image.name)
        with mounted(folder, "-o", mount, image.name):
            yield folder


def limit_user(folder, user, kib):
    """Limits what a user may have on a file system with quotas (quotactl(2): Q_SETQUOTA, QIF_BLIMITS)."""
    device = output("findmnt", "-no", "SOURCE", folder).encode()
    limit = struct.pack("8QI", kib, kib, 0, 0, 0, 0, 0, 0, 1)
    assert ctypes.CDLL(None, use_errno=True).quotactl(0x800008 << 8, device, user, limit) == 0, os.strerror(ctypes.get_errno())


@contextlib.contextmanager
def volumes():
    """The host's side of the volumes."""
    with tempfile.TemporaryDirectory(dir="/run/husk-test") as base, contextlib.ExitStack() as stack:
        stack.enter_context(ext4(f"{base}/ext4", 64, "-O", "quota", mount="loop,usrquota"))
        limit_user(f"{base}/ext4", 3000, 1024)
        stack.enter_context(mounted(f"{base}/tmpfs", "-t", "tmpfs", "volume"))
        stack.enter_context(ext4(f"{base}/small-ext4", 8))
        stack.enter_context(mounted(f"{base}/small-tmpfs", "-t", "tmpfs", "-o", "size=3m", "small"))
        os.makedirs(f"{base}/read-only")
        pathlib.Path(f"{base}/read-only/there").write_text("there")
        yield base


def outcomes(handler, base):
    """What the operations gave, by place and operation, in a pod on this runtime."""
    mounts = []
    for name in ("ext4", "tmpfs"):
        os.makedirs(f"{base}/{name}/{handler}/quota")
        os.chmod(f"{base}/{name}/{handler}/quota", 0o777)
        mounts.append({"host_path": f"{base}/{name}/{handler}", "container_path": f"/{name}"})
        mounts.append({"host_path": f"{base}/small-{name}", "container_path": f"/small-{name}"})
    mounts.append({"host_path": f"{base}/read-only", "container_path": "/read-only", "readonly": True})
    with pod(handler=handler) as it:
        box = it.start(["sleep", "1000"], image="fsops", mounts=mounts, linux=dict(ALL))
        peer = it.start(["sh", "-c", "fsops peer /ext4/socket & fsops peer /tmpfs/socket & wait"], image="fsops", mounts=mounts, linux=dict(ALL))
        box.exec("mkdir", "-p", "/root/work", "/ext4/work", "/tmpfs/work")
        end = time.monotonic() + 20
        while peer.logs().count("listening") < 2:
            assert time.monotonic() < end, f"the peer does not listen: {peer.logs()}"
        lines = []
        for place in PLACES:
            words = ["env"]
            if place != "root":
                words += [f"FSOPS_SMALL=/small-{place}", "FSOPS_READONLY=/read-only"]
            if place == "ext4":
                words += ["FSOPS_QUOTA=/ext4/quota"]
            words += ["fsops", place, f"/{place}/work"] + ([f"/{place}/socket"] if place != "root" else [])
            lines += box.exec(*words, timeout=110).splitlines()
    return {tuple(line.split(" ", 2)[:2]): line.split(" ", 2)[2] for line in lines}


def allowed():
    """The rows of the document's table of differences: place, operation, outcome on the host, outcome in a pod."""
    rows, here = set(), f"root on {output('findmnt', '-no', 'FSTYPE', '-T', '/var/lib/containerd/husk-test')}"
    for line in DOCUMENT.read_text().splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 5:
            operations, places, local, there, _ = cells
            for operation in operations.split("`, `"):
                rows |= {(place.replace(here, "root"), operation, local, there) for place in (PLACES if places == "all" else places.split(", "))
                         if place in (*PLACES, here)}
    return rows


@deadline(200)
def test_operations_as_on_local_files(containerd):
    """All operations of fsops give in a pod what they give on the host's files, but for the documented differences."""
    containerd.load("fsops")
    with volumes() as base:
        local, there = (outcomes(handler, base) for handler in ("runc", HANDLER))
    for place in PLACES:
        assert local[place, "all"] == "done" and there[place, "all"] == "done", (place, sorted(set(local) ^ set(there)))
    keys = dict.fromkeys([*local, *there])
    found = {(place, operation, local.get((place, operation), "-"), there.get((place, operation), "-")) for place, operation in keys
             if local.get((place, operation)) != there.get((place, operation))}
    new, gone = sorted(found - allowed()), sorted(allowed() - found)
    print(f"{len(keys)} operations, {len(found)} differ", flush=True)
    assert not new, "not as on the host:\n" + "\n".join(" ".join(row) for row in new)
    assert not gone, "a documented difference is none any more:\n" + "\n".join(" ".join(row) for row in gone)


@deadline(full(200, 7200))
def test_many_files_walked_need_few_descriptors():
    """A walk over more files than are kept at hand leaves husk-fs with a bounded number of descriptors, with handles (tmpfs) and without
    (overlay), and every file can still be read."""
    number = full(6000, 1_000_000)
    with tempfile.TemporaryDirectory(dir="/run/husk-test") as base, contextlib.ExitStack() as stack:
        with_handles = stack.enter_context(mounted(f"{base}/tmpfs", "-t", "tmpfs", "many"))
        for part in ("lower", "upper", "work"):
            os.makedirs(f"{with_handles}/{part}")
        for file in range(number):
            folder = f"{with_handles}/lower/{file // 500}"
            if file % 500 == 0:
                os.makedirs(folder)
            pathlib.Path(folder, str(file)).write_text("x")
        options = ",".join(f"{part}dir={with_handles}/{part}" for part in ("lower", "upper", "work"))
        without = stack.enter_context(mounted(f"{base}/overlay", "-t", "overlay", "-o", options, "many"))
        with pod() as it:
            box = it.start(["sleep", "1000"], mounts=[{"host_path": f"{with_handles}/lower", "container_path": "/handles"},
                                                      {"host_path": without, "container_path": "/names"}])
            daemon = pathlib.Path(f"/proc/{pids('husk-fs')[0]}")
            for folder in ("/names", "/handles"):
                before = _held(daemon)
                assert box.exec("sh", "-c", f"find {folder} -type f -size -2 | wc -l", timeout=7000) == str(number)
                after = _held(daemon)
                print(f"{folder}: {number} files, descriptors {before[0]} then {after[0]}, resident {before[1]} KiB then {after[1]} KiB", flush=True)
                assert after[0] < 4300, after
                assert after[1] - before[1] < number + 4096, "more than 1 KiB a file"
            # The first ones are long cold.
            assert box.exec("sh", "-c", "cat /names/0/1* /handles/0/2* | wc -c") == "222"
            box.exec("sh", "-c", "mv /names/0 /names/zero; rm /names/zero/7; mv /names/zero/8 /names/1/eight")
            assert box.exec("sh", "-c", "ls /names/zero | wc -l; cat /names/1/eight /names/zero/9") == "498\nxx"


@deadline(full(120, 600))
def test_a_directory_of_many_files():
    """A directory with 3,000 files (100,000 with HUSK_TEST_FULL) is listed with each of them once, also while others come and go; all of them
    can be found by name, and removed."""
    number = full(3000, 100_000)
    with tempfile.TemporaryDirectory(dir="/run/husk-test") as folder:
        for file in range(number):
            os.close(os.open(f"{folder}/{file}", os.O_CREAT))
        with pod() as it:
            box = it.start(["sleep", "1000"], mounts=[{"host_path": folder, "container_path": "/many"}])
            changing = "(while [ ! -e /enough ]; do touch /many/x$((n += 1)); mv /many/x$n /many/y; done) &"
            listed = box.exec("sh", "-c", f"{changing} ls -1 /many 2> /dev/null | grep -v '[xy.]' > /list; touch /enough; wait; sort -u /list | wc -l; wc -l < /list",
                              timeout=500)
            assert listed.split() == [str(number)] * 2, listed
            assert box.exec("sh", "-c", f"cd /many; ls {number - 1} 7; rm -f y; cat 1 {number // 2}").split() == sorted(["7", f"{number - 1}"])
            box.exec("sh", "-c", "rm -r /many/*", timeout=500)
        assert not os.listdir(folder)


def _held(daemon):
    """Descriptors of a process, and its resident memory in KiB."""
    status = dict(line.split(":", 1) for line in (daemon / "status").read_text().splitlines())
    return len(os.listdir(daemon / "fd")), int(status["VmRSS"].split()[0])
