"""The spec that every case changes: what containerd's CRI plugin writes for a container, with namespaces of its own."""

import pathlib

PLACE = pathlib.Path("/run/husk-test/contract")
# What cases bind: made by sides.py.
VOLUME = str(PLACE / "volume")
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CAPABILITIES = [f"CAP_{name}" for name in (
    "CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP", "NET_BIND_SERVICE", "SYS_CHROOT",
    "KILL", "AUDIT_WRITE")]
KINDS = ("pid", "ipc", "uts", "mount", "network", "cgroup")


def mount(destination, kind, source=None, *options):
    """A mount of the spec."""
    return {"destination": destination, "type": kind, "source": source or kind, "options": list(options)}


def bind(source, destination, *options):
    """A bind mount of something below the volume; the first option is bind unless it is rbind."""
    options = options if options[:1] in (("bind",), ("rbind",)) else ("bind", *options)
    return {"destination": destination, "type": "bind", "source": f"{VOLUME}/{source}".rstrip("/"), "options": list(options)}


def spec():
    """A new copy."""
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0}, "args": ["sh"], "env": [PATH, "TERM=xterm"], "cwd": "/", "noNewPrivileges": True, "oomScoreAdj": 0,
            "capabilities": {which: list(CAPABILITIES) for which in ("bounding", "effective", "permitted")},
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 1024}]},
        "root": {"path": "rootfs"},
        "hostname": "box",
        "mounts": [
            mount("/proc", "proc", None, "nosuid", "noexec", "nodev"),
            mount("/dev", "tmpfs", None, "nosuid", "strictatime", "mode=755", "size=65536k"),
            mount("/dev/pts", "devpts", None, "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
            mount("/dev/mqueue", "mqueue", None, "nosuid", "noexec", "nodev"),
            mount("/sys", "sysfs", None, "nosuid", "noexec", "nodev", "ro"),
            mount("/sys/fs/cgroup", "cgroup", None, "nosuid", "noexec", "nodev", "relatime", "ro"),
            mount("/dev/shm", "tmpfs", "shm", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k")],
        "annotations": {},
        "linux": {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": [{"type": kind} for kind in KINDS],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/no_such", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]}}
