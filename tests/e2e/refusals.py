"""What can't work is refused in one clear sentence, and nothing is left (the runner looks after every test)."""

import os
import pathlib

from contract import base, sides
from contract.base import bind, mount
from harness.command import run
from harness.containerd import version
from harness.crictl import Pod, crictl, pod
from harness.runner import Skip, deadline
from harness.settings import settings

from . import block, malformed

CONFIG = pathlib.Path("/etc/husk/config.toml")


def config(text):
    """The given configuration for the length of a test."""
    return settings(CONFIG, text)


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


def _linux(**fields):
    return lambda spec: spec["linux"].update(fields)


def _resources(**fields):
    return lambda spec: spec["linux"]["resources"].update(fields)


def _namespace(kind, path=None, **fields):
    """Another namespace in place of the spec's of this kind, and further fields of the linux section."""
    def change(spec):
        others = [namespace for namespace in spec["linux"]["namespaces"] if namespace["type"] != kind]
        spec["linux"].update(namespaces=[*others, {"type": kind, **({"path": path} if path else {})}], **fields)
    return change


def _mount(one, **fields):
    return lambda spec: spec["mounts"].append({**one, **fields})


def _map(inside):
    return [{"containerID": inside, "hostID": 100000, "size": 65536}]


def _user(uids, gids):
    return _namespace("user", uidMappings=uids, gidMappings=gids)


DISK = "/dev/to-be-named"
LOOP_CONTROL = {"path": "/dev/loop-control", "type": "c", "major": 10, "minor": 237}
# What is asked for, how the spec is changed, the kind of error, and words of its message: the rows of shim/docs/refusals.md.
SPECS = [
    ("another's cgroup namespace", _namespace("cgroup", "/proc/1/ns/cgroup"), "invalid argument", "the cgroup namespace at /proc/1/ns/cgroup is not the pod's"),
    ("a user namespace without group ids", _user(_map(0), []), "invalid argument", "a user namespace and valid uidMappings and gidMappings"),
    ("a user namespace without root", _user(_map(1), _map(0)), "invalid argument", "have no line for id 0"),
    ("a user namespace that is not the pod's", _user(_map(0), _map(0)), "invalid argument", "other uidMappings or gidMappings than its pod's"),
    ("hooks", lambda spec: spec.update(hooks={"createRuntime": [{"path": "/bin/true"}]}), "invalid argument", "createRuntime hooks"),
    ("a seccomp listener", _linux(seccomp={"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/x.sock"}), "invalid argument", "a listener on the host"),
    ("intelRdt", _linux(intelRdt={"closID": "x"}), "invalid argument", "the spec asks for intelRdt"),
    ("execCPUAffinity", lambda spec: spec["process"].update(execCPUAffinity={"initial": "0"}), "invalid argument", "the spec asks for an execCPUAffinity"),
    ("a device of the host", _linux(devices=[LOOP_CONTROL]), "invalid argument", "the device /dev/loop-control (10:237) of the host"),
    ("limits of a device", _resources(blockIO={"throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 9}]}), "invalid argument", "block device 8:0"),
    ("huge pages of no size", _resources(hugepageLimits=[{"pageSize": "64KB", "limit": 1 << 20}]), "invalid argument", "no huge pages of 64 KiB"),
    ("a sysctl of the machine's", _linux(sysctl={"vm.swappiness": "1"}), "invalid argument", "the kernel parameter vm.swappiness"),
    ("a bind of nothing", _mount({"destination": "/b", "type": "bind", "options": ["bind"]}), "invalid argument", "the mount on /b has no source"),
    ("a bind of a disk", _mount(bind("", "/b"), source=DISK), "invalid argument", "a block device as its source: give it as a device"),
    ("a shared bind", _mount(bind("dir", "/b", "rbind", "rshared")), "invalid argument", "(Bidirectional)"),
    ("a tmpfs with mapped ids", _mount(mount("/t", "tmpfs"), uidMappings=_map(0), gidMappings=_map(0)), "invalid argument", "binds of files and directories only"),
    ("a bind with one map", _mount(bind("dir", "/b"), uidMappings=_map(0)), "invalid argument", "no valid uidMappings and gidMappings"),
    ("idmap without ids", _mount(bind("dir", "/b", "rbind", "idmap")), "invalid argument", "the container has none"),
    ("seccomp's notifications", _linux(seccomp={"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["getcwd"], "action": "SCMP_ACT_NOTIFY"}]}),
     "unknown", "SCMP_ACT_NOTIFY is not supported"),
    ("swap without a memory limit", _resources(memory={"swap": 1 << 30}), "invalid argument", "a swap limit without a memory limit"),
    ("a soft limit above the hard", lambda spec: spec["process"].update(rlimits=[{"type": "RLIMIT_CORE", "soft": 2, "hard": 1}]), "unknown",
     "set RLIMIT_CORE to 2:1"),
    ("an I/O priority of 9", lambda spec: spec["process"].update(ioPriority={"class": "IOPRIO_CLASS_BE", "priority": 9}), "unknown",
     "I/O priority 9 is not one of 0 to 7"),
    ("another wall clock", _namespace("time", timeOffsets={"realtime": {"secs": 1}}), "unknown", "time offset of clock realtime"),
]
# Since which containerd ctr passes them on: older ones know older specifications.
SINCE = {"execCPUAffinity": (2, 0), "an I/O priority of 9": (1, 7), "another wall clock": (1, 7)}


@deadline(200)
def test_specs():
    """What an OCI spec can ask for and a pod can't have is refused in its own words, and the pod is unharmed by it all."""
    wrong = []
    with sides.place(), block.loop() as (disk, _), sides.Husk() as husk:
        for name, change, kind, words in SPECS:
            if version() < SINCE.get(name, (0,)):
                continue
            ident = f"refused{next(sides.COUNT)}"
            spec = base.spec()
            spec["process"]["args"] = ["true"]
            change(spec)
            for one in spec["mounts"]:
                one.update(source=disk) if one.get("source") == DISK else None
            with sides.rootfs(ident) as root:
                done = run(*husk.command(sides.finished(spec, ident, root), ident), stdin="", check=False, timeout=60)
            if not malformed.is_kind(done, kind) or words not in done.stderr:
                wrong.append(f"{name}: not {kind!r} with {words!r}: {done.returncode} {done.stderr[-400:]}")
        with sides.sleeping(husk) as ident:
            done = run(*sides.CTR, "tasks", "exec", "--log-uri", "http://nobody/x", "--exec-id", "x", ident, "true", check=False, stdin="")
            if "http://nobody/x" not in done.stderr or "fifo, file and binary are possible" not in done.stderr:
                wrong.append(f"a stream that is none: {done.returncode} {done.stderr[-400:]}")
        assert malformed.works(husk), "the pod is dead"
    assert not wrong, "\n".join(wrong)
