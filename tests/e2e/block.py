"""Block devices: raw volumes and root file systems that are disks of the pod's machine, plugged in for a container and taken back."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import socket
import struct
import subprocess
import time

from harness.command import Failed, run
from harness.containerd import NAMESPACE, SOCKET
from harness.crictl import crictl, pids, pod
from vm.machine import field, fields

MIB = 1 << 20


@contextlib.contextmanager
def loop(mib=4, first=b"from the host"):
    """A loop device over a file; both of them."""
    run("modprobe", "loop", check=False)
    file = pathlib.Path(f"/run/husk-test/disk-{time.monotonic_ns()}")
    file.write_bytes(first)
    os.truncate(file, mib * MIB)
    device = run("losetup", "--find", "--show", file).stdout.strip()
    try:
        yield device, file
    finally:
        run("losetup", "--detach", device)
        file.unlink()


def volume(device, path="/dev/data", permissions="rwm"):
    """A raw block volume as the kubelet asks for it."""
    return {"host_path": device, "container_path": path, "permissions": permissions}


def _vmm():
    (pid,) = pids("husk-vmm")
    return pid


def _held(pid):
    """Descriptors and disk threads of the VMM."""
    tasks = pathlib.Path(f"/proc/{pid}/task").iterdir()
    return len(os.listdir(f"/proc/{pid}/fd")), sum((task / "comm").read_text() == "disk\n" for task in tasks)


def _open_files(pid):
    """What the VMM has open."""
    return {os.readlink(link) for link in pathlib.Path(f"/proc/{pid}/fd").iterdir()}


def _fails(call, *words):
    try:
        call()
    except Failed as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(f"it did not fail with {words}")


def test_raw_volumes():
    """Raw block volumes, two at once, are read and written through to the host's device with the guest's own numbers; a read-only one
    is not written; they leave the guest with their container."""
    with loop() as (one, file), loop(8, b"another") as (two, _), pod() as it:
        watcher, used = it.start(["sleep", "1000"]), {one, two}
        assert watcher.exec("ls", "/sys/block") == ""
        box = it.start(["sleep", "1000"], devices=[volume(one), volume(two, "/dev/ro", "r")])
        assert used <= _open_files(_vmm())
        assert box.exec("head", "-c", "13", "/dev/data") == "from the host"
        assert box.exec("head", "-c", "7", "/dev/ro") == "another"
        assert box.exec("sh", "-c", "cat /sys/block/vd*/size") == "8192\n16384"
        box.exec("sh", "-c", "echo from the guest | dd of=/dev/data bs=512 seek=8 conv=fsync,sync 2>/dev/null")
        run("blockdev", "--flushbufs", one)
        assert file.read_bytes()[4096:4110] == b"from the guest"
        _fails(lambda: box.exec("sh", "-c", "echo x > /dev/ro"), "ermi")
        assert box.exec("sh", "-c", "cat /sys/block/vd*/ro") == "0\n1"
        metrics = json.loads(run("ctr", "-a", SOCKET, "-n", NAMESPACE, "task", "metrics", "--format", "json", box.id).stdout)
        assert any(int(disk.get("wbytes", 0)) >= 512 for disk in metrics["io"]["usage"]), metrics["io"]
        assert watcher.exec("sh", "-c", "ls /sys/block | wc -w") == "2"
        _fails(lambda: watcher.exec("sh", "-c", "mknod /dev/stolen b 254 0; head -c 1 /dev/stolen"), "ermi")
        crictl("rm", "-f", box.id)
        assert watcher.exec("ls", "/sys/block") == ""
        assert not used & _open_files(_vmm())


def test_a_volume_of_two_containers():
    """Two containers that ask for the same device have the same disk; it goes with the second."""
    with loop() as (device, _), pod() as it:
        watcher = it.start(["sleep", "1000"])
        first, second = (it.start(["sleep", "1000"], devices=[volume(device)]) for _ in range(2))
        first.exec("sh", "-c", "echo shared > /dev/data")
        assert second.exec("head", "-c", "6", "/dev/data") == "shared"
        crictl("rm", "-f", first.id)
        assert watcher.exec("ls", "/sys/block") == "vda"
        assert second.exec("head", "-c", "6", "/dev/data") == "shared"
        crictl("rm", "-f", second.id)
        assert watcher.exec("ls", "/sys/block") == ""


def test_volumes_come_and_go():
    """Ten containers with a volume, one after the other, leave no descriptor and no thread in the VMM."""
    with loop() as (device, _), pod() as it:
        it.start(["sleep", "1000"])
        vmm, before = _vmm(), None
        for _ in range(10):
            box = it.create(["sleep", "1000"], devices=[volume(device)])
            crictl("start", box.id)
            assert box.exec("head", "-c", "13", "/dev/data") == "from the host"
            crictl("rm", "-f", box.id)
            before = before or _held(vmm)
        assert _held(vmm) == before and before[1] == 0, (before, _held(vmm))


def test_removed_under_load():
    """A container that is removed while it writes to its volume ends, and the pod is well."""
    with loop(64) as (device, _), pod() as it:
        watcher = it.start(["sleep", "1000"])
        box = it.start(["sh", "-c", "while :; do dd if=/dev/zero of=/dev/data bs=1M count=60 2>/dev/null; done"],
                       devices=[volume(device)])
        box.exec("true")
        crictl("rm", "-f", box.id)
        assert watcher.exec("ls", "/sys/block") == ""
        assert watcher.exec("echo", "well") == "well"


def _image(path):
    """busybox as a file system in an image file."""
    tree = pathlib.Path(f"{path}.tree")
    for name in ("bin", "proc", "dev", "sys", "etc"):
        (tree / name).mkdir(parents=True)
    run("cp", shutil.which("busybox"), tree / "bin/busybox")
    for name in ("sh", "grep", "mount"):
        (tree / "bin" / name).symlink_to("busybox")
    run("mkfs.ext4", "-q", "-d", tree, path, "32M")
    shutil.rmtree(tree)


class Shim:
    """A shim as containerd starts it, with a bundle of the test's own: for root file systems that only some snapshotters give."""

    def __init__(self, name, command):
        self.id = name
        self.bundle = pathlib.Path(f"/run/husk-test/{name}")
        self.bundle.mkdir()
        spec = json.loads(run("ctr", "oci", "spec").stdout)
        spec["process"]["args"] = command
        spec["process"]["terminal"] = False
        spec["linux"]["cgroupsPath"] = f"/husk-test/{name}"
        (self.bundle / "config.json").write_text(json.dumps(spec))
        env = {**os.environ, "TTRPC_ADDRESS": f"{SOCKET}.ttrpc", "GRPC_ADDRESS": SOCKET}
        words = ["-namespace", NAMESPACE, "-id", name, "-address", SOCKET, "-publish-binary", shutil.which("containerd"), "start"]
        # It logs into a FIFO of its bundle, as the runtime's library does.
        os.mkfifo(self.bundle / "log")
        self.log = os.open(self.bundle / "log", os.O_RDWR | os.O_NONBLOCK)
        said = subprocess.run(["containerd-shim-husk-v2", *words], cwd=self.bundle, env=env, stdin=subprocess.DEVNULL,
                              capture_output=True, check=True, text=True, timeout=60)
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(said.stdout.strip().removeprefix("unix://"))
        self.socket.settimeout(90)
        self.stream = -1

    def call(self, method, payload):
        """Calls a method of containerd.task.v2.Task; its response's fields, or the error's words."""
        request = field(1, b"containerd.task.v2.Task") + field(2, method.encode()) + field(3, payload)
        self.stream += 2
        self.socket.sendall(struct.pack(">IIBB", len(request), self.stream, 1, 0) + request)
        length, _, _, _ = struct.unpack(">IIBB", self._receive(10))
        response = dict(fields(self._receive(length)))
        status = dict(fields(response.get(1, b"")))
        if status.get(1):
            raise Failed(status.get(2, b"").decode())
        return dict(fields(response.get(2, b"")))

    def _receive(self, length):
        data = b""
        while len(data) < length:
            data += self.socket.recv(length - len(data)) or _ended()
        return data

    def run(self, *mounts):
        """Runs the container on a root file system of these mounts to its end; the exit status."""
        rootfs = b"".join(field(3, b"".join(field(number, value.encode()) for number, value in
                                            [(1, kind), (2, str(source)), *((4, option) for option in options)]))
                          for kind, source, options in mounts)
        self.call("Create", field(1, self.id.encode()) + field(2, str(self.bundle).encode()) + rootfs)
        self.call("Start", field(1, self.id.encode()))
        status = self.call("Wait", field(1, self.id.encode())).get(1, 0)
        self.call("Delete", field(1, self.id.encode()))
        return status

    def end(self):
        """Shuts it down and removes the bundle."""
        with contextlib.suppress(Failed, OSError):
            self.call("Shutdown", field(1, self.id.encode()) + bytes([16, 1]))
        self.socket.close()
        os.close(self.log)
        shutil.rmtree(self.bundle)


def _ended():
    raise Failed("the shim closed the connection")


@contextlib.contextmanager
def shim(name, *command):
    """A shim for the length of a test."""
    it = Shim(name, list(command))
    try:
        yield it
    finally:
        it.end()


def test_root_file_system_on_a_disk():
    """A root file system that is an image with the option loop, as containerd's blockfile snapshotter gives it, or a block device, is a
    disk of the guest's and mounted nowhere on the host; what the container wrote is in it afterwards, and it is clean."""
    image = pathlib.Path("/run/husk-test/root.img")
    _image(image)
    run("modprobe", "loop", check=False)
    device = run("losetup", "--find", "--show", image).stdout.strip()
    try:
        for number, source, options in ((1, image, ["loop", "noatime"]), (2, device, [])):
            script = f"grep ' / ' /proc/mounts > /made{number}; echo by the guest >> /made{number}; exit {number}"
            with shim(f"disk-root{number}", "sh", "-c", script) as it:
                assert it.run(("ext4", source, options)) == number
            run("blockdev", "--flushbufs", device)
            assert "clean" == re.search("Filesystem state: +(.*)", run("dumpe2fs", "-h", image).stdout)[1]
            made = run("debugfs", "-R", f"cat /made{number}", image).stdout
            assert made.startswith("/dev/vda / ext4 rw") and made.endswith("by the guest\n"), made
            assert ("noatime" in made) == (number == 1), made
    finally:
        run("losetup", "--detach", device)
        image.unlink()


def test_a_claimed_device_is_refused():
    """A root file system on a device that the host has mounted is refused by its name, and nothing is left."""
    image, folder = pathlib.Path("/run/husk-test/claimed.img"), pathlib.Path("/run/husk-test/claimed")
    _image(image)
    folder.mkdir()
    run("modprobe", "loop", check=False)
    device = run("losetup", "--find", "--show", image).stdout.strip()
    run("mount", device, folder)
    try:
        with shim("disk-claimed", "sh", "-c", "true") as it:
            _fails(lambda: it.run(("ext4", device, [])), device, "busy")
    finally:
        run("umount", folder)
        run("losetup", "--detach", device)
        folder.rmdir()
        image.unlink()
