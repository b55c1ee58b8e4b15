"""Outside judges of the files in a pod, programs that others wrote to find what file systems do wrong or that depend on what they do right:
fsx, fio's verify, stress-ng's file-system class, dpkg. Volumes are ext4, for direct I/O and true fsync. (fsstress is in no
package of Debian; stress-ng's class does what it does.)"""

import contextlib
import re
import tempfile

from harness.crictl import HANDLER, crictl, pod
from harness.runner import deadline, full

from .filesystem import ALL, ext4

FSX = """flen = 1048576
[weights]
close_open = 2
invalidate = 2
mapread = 10
mapwrite = 10
read = 10
write = 10
truncate = 5
fsync = 1
fdatasync = 1
posix_fallocate = 2
punch_hole = 5
sendfile = 5
posix_fadvise = 2
copy_file_range = 5
"""

# Through the page cache, through a mapping that is shared, and past the cache with many requests at a time.
FIO = {"cached": ["--ioengine=psync"], "mapped": ["--ioengine=mmap"], "direct": ["--ioengine=libaio", "--iodepth=8", "--direct=1"]}

# The class `filesystem`, but for what makes thousands of files before it begins (chdir, dir, link, symlink), what is not of files (eventfd,
# ioprio, procfs, binderfs) and bind-mount, which wants to mount.
STRESSORS = ["access", "chattr", "chmod", "chown", "copy-file", "dentry", "dirdeep", "dirmany", "dnotify", "dup", "fallocate", "fanotify",
             "fcntl", "fiemap", "file-ioctl", "filename", "flock", "fpunch", "fsize", "fstat", "getdent", "handle", "hdd", "inode-flags",
             "inotify", "io", "iomix", "lease", "locka", "lockf", "lockofd", "mknod", "open", "rename", "sync-file", "touch", "utime",
             "verity", "xattr"]
SMALL = ["--copy-file-bytes", "128m", "--dentries", "32", "--fallocate-bytes", "1m", "--hdd-bytes", "1m",
         "--iomix-bytes", "1m", "--sync-file-bytes", "1m", "--fiemap-bytes", "1m", "--open-max", "1000"]


@contextlib.contextmanager
def volume(mib=768):
    """An empty ext4 volume of the host's that user 1000 may write."""
    with tempfile.TemporaryDirectory(dir="/run/husk-test") as base, ext4(f"{base}/volume", mib, "-E", "root_owner=1000:1000") as folder:
        yield folder


def judge(it, folder, **options):
    """A container of the judges' image with the volume at /volume."""
    return it.start(["sleep", "1000"], image="judges", mounts=[{"host_path": folder, "container_path": "/volume"}], **options)


@deadline(240)
def test_fsx_and_fio_verify(containerd):
    """Random operations on one file give what fsx expects, on a volume and on the root; what fio writes at random is what it reads, cached,
    mapped and direct."""
    containerd.load("judges")
    with volume() as folder, pod() as it:
        box = judge(it, folder)
        box.exec("sh", "-c", f"printf '{FSX}' > /fsx.toml")
        for seed, place in enumerate(("/volume", "/root"), start=1):
            box.exec("fsx", "-q", "-q", "-f", "/fsx.toml", "-N", str(full(500, 100000)), "-S", str(seed), "-P", "/tmp", f"{place}/fsx")
        for name, engine in FIO.items():
            box.exec("fio", f"--name={name}", *engine, "--directory=/volume", f"--size={full(2, 64)}m", "--bsrange=512-64k", "--blockalign=512",
                     "--rw=randwrite", "--verify=crc32c", "--verify_fatal=1", "--randseed=7", "--fallocate=none")


@deadline(240)
def test_stress_ng(containerd):
    """stress-ng's file-system class, all stressors at once on a volume, finds nothing to complain of that it does not find on the host's own
    files."""
    containerd.load("judges")
    said = _stressed(HANDLER)
    if _complaints(said):
        new = _complaints(said) - _complaints(_stressed("runc"))
        assert not new, f"{sorted(new)} in:\n{said}"


def _stressed(handler):
    """What stress-ng says in a pod on this runtime."""
    with volume() as folder, pod(handler=handler) as it:
        box = judge(it, folder, linux=dict(ALL))
        stressors = [word for name in STRESSORS for word in (f"--{name}", "1")]
        done = crictl("exec", "-s", box.id, "stress-ng", "--temp-path", "/volume", "--timeout", str(full(5, 120)), "--verify", "--no-rand-seed",
                      *SMALL, *stressors, check=False)
        said = done.stdout + done.stderr
        assert " completed in " in said, said
        return said


def _complaints(said):
    """Who complains, without process ids and other numbers."""
    return {re.sub(r"\d+", "N", line) for line in re.findall(r"stress-ng: (?:fail|error): +\[\d+\] (.*)", said)}


@deadline(240)
def test_dpkg(containerd):
    """dpkg installs packages in a pod, their files are whole and work, and it removes them without a trace."""
    containerd.load("debian")
    with pod() as it:
        box = it.start(["sleep", "1000"], image="debian")
        names = full(["less", "sudo"], ["less", "sudo", "tzdata"])
        before = box.exec("find", "/etc", "/usr", "-xdev", "!", "-path", "/etc/*-")
        box.exec("sh", "-c", "DEBIAN_FRONTEND=noninteractive dpkg -i " + " ".join(f"/debs/{name}_*.deb" for name in names))
        for name in names:
            assert box.exec("dpkg-query", "-W", "-f", "${db:Status-Abbrev}", name).strip() == "ii", name
            # Nothing but what the image leaves out by its own dpkg.cfg.
            wrong = [line for line in box.exec("dpkg", "--verify", name).splitlines() if not line.startswith("missing ")]
            assert not wrong, wrong
        assert box.exec("readlink", "-f", "/usr/bin/pager") == "/usr/bin/less"
        assert box.exec("stat", "-c", "%a %u", "/usr/bin/sudo") == "4755 0"
        box.exec("dpkg", "--purge", *names)
        after = box.exec("find", "/etc", "/usr", "-xdev", "!", "-path", "/etc/*-")
        assert before == after, set(before.splitlines()) ^ set(after.splitlines())
