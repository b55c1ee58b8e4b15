"""What can't work is refused in one clear sentence, and nothing is left (the runner looks after every test)."""

import contextlib
import os
import pathlib

from harness.crictl import Pod, crictl, pod
from harness.runner import Skip

CONFIG = pathlib.Path("/etc/husk/config.toml")


@contextlib.contextmanager
def config(text):
    """The given configuration for the length of a test."""
    CONFIG.parent.mkdir(parents=True, exist_ok=True)
    CONFIG.write_text(text)
    try:
        yield
    finally:
        CONFIG.unlink()
        with contextlib.suppress(OSError):  # other tests' settings are in there
            CONFIG.parent.rmdir()


def _refused(*words, **options):
    """The pod is refused with all of these words."""
    it = Pod(**options)
    said = crictl("runp", "--runtime", "husk", it.file, check=False)
    assert said.returncode, f"the pod runs as {said.stdout}"
    missing = [word for word in words if word not in said.stderr]
    assert not missing, f"no {missing} in: {said.stderr}"
    for ident in crictl("pods", "-q").stdout.split():
        crictl("rmp", "-f", ident)


def test_missing_kernel():
    """A kernel that is not there is named."""
    with config('kernel = "/no/such/vmlinux"\n'):
        _refused("/no/such/vmlinux", "No such file")


def test_wrong_kernel():
    """A file that is no kernel is named."""
    with config('kernel = "/bin/busybox"\n'):
        _refused("/bin/busybox")


def test_missing_initramfs():
    """An initramfs that is not there is named."""
    with config('initramfs = "/no/such/initramfs"\n'):
        _refused("/no/such/initramfs", "No such file")


def test_unknown_key():
    """A key that husk does not know is refused by name and file."""
    with config("kernal = 1\n"):
        _refused("kernal", "/etc/husk/config.toml")


def test_unknown_annotation():
    """An annotation of ours that does not exist is refused by name."""
    _refused("io.husk.kernel-args", annotations={"io.husk.kernel-args": "init=/bin/sh"})


def test_too_little_memory():
    """A pod that asks for less memory than a guest needs is told so."""
    _refused("io.husk.memory-mib", "8", annotations={"io.husk.memory-mib": "8"})


def test_too_small_limit():
    """A pod whose own memory limit is too small for any program is told so; at the smallest one that is allowed it runs."""
    def resources(mebibytes):
        return {"resources": {"memory_limit_in_bytes": mebibytes << 20}}

    _refused("memory limit", linux=resources(1))
    with pod(linux=resources(4)) as it:
        assert it.start(["sleep", "1000"]).exec("echo", "small") == "small"


def test_no_kvm():
    """A host without KVM is told so by the file's name."""
    if not os.environ.get("TESTHOST"):
        raise Skip("takes /dev/kvm away, which only the test host allows")
    os.rename("/dev/kvm", "/dev/kvm.away")
    try:
        _refused("/dev/kvm", "No such file")
    finally:
        os.rename("/dev/kvm.away", "/dev/kvm")


def test_host_network():
    """The host's network can't be had; the message says what can."""
    _refused("network", "runc", linux={"security_context": {"namespace_options": {"network": 2}}})


def test_host_ipc():
    """The host's IPC namespace can't be had; the message says what can."""
    _refused("ipc", "runc", linux={"security_context": {"namespace_options": {"ipc": 2}}})


def test_missing_mount_source():
    """A volume whose source is gone is named; the pod is unharmed."""
    with pod() as it:
        box = it.start(["sleep", "1000"])
        folder = pathlib.Path("/run/husk-test/gone")
        folder.mkdir()
        wrong = it.create(["sleep", "1000"], mounts=[{"host_path": str(folder), "container_path": "/data"}])
        folder.rmdir()
        said = crictl("start", wrong.id, check=False)
        assert said.returncode and str(folder) in said.stderr, said.stderr
        assert box.exec("echo", "unharmed") == "unharmed"
