"""Starts that fail, and ends: the same on both sides."""

from .base import bind, mount
from .case import Ends, Refused


def _process(**fields):
    return lambda spec: spec["process"].update(fields)


def _sysctl(spec):
    spec["linux"]["sysctl"] = {"vm.swappiness": "1"}


def _unified(spec):
    spec["linux"]["resources"]["unified"] = {"no.such": "1"}


CASES = [
    Refused("missing program", _process(args=["/no/such"]), ("no such file",)),
    Refused("missing program in PATH", _process(args=["nosuch"]), ("executable file not found in $PATH",)),
    Refused("program that is not executable", _process(args=["/opt/plain"]), ("permission denied",)),
    Refused("directory as program", _process(args=["/opt"]), ("permission denied", "is a directory")),
    Refused("program without an interpreter", _process(args=["/opt/bad"]), ("no such file",)),
    Refused("program of no format", _process(args=["/opt/bare"]), ("exec format error",)),
    Refused("no arguments", _process(args=[]), ("args", "process")),
    Refused("cwd is a file", _process(cwd="/etc/passwd"), ("not a directory",)),
    Refused("relative cwd", _process(cwd="home"), ("absolute",)),
    Refused("unknown rlimit", _process(rlimits=[{"type": "RLIMIT_NONE", "soft": 1, "hard": 1}]), ("rlimit", "RLIMIT")),
    Refused("soft limit above the hard", _process(rlimits=[{"type": "RLIMIT_NOFILE", "soft": 9, "hard": 1}]), ("invalid argument",)),
    Refused("sysctl of the host", _sysctl, ("vm.swappiness",)),
    Refused("unknown cgroup file", _unified, ("no.such",)),
    Refused("bind of what is not there", lambda spec: spec["mounts"].append(bind("nosuch", "/b")), ("no such file", "No such file")),
    Refused("unknown file system", lambda spec: spec["mounts"].append(mount("/m", "nosuchfs")), ("no such device",)),
    Refused("bad option", lambda spec: spec["mounts"].append(mount("/m", "tmpfs", None, "nosuch=1")), ("invalid argument",)),
    Refused("proc through a link", lambda spec: spec["mounts"].insert(0, mount("/links/inside", "proc")), ("links", "symbolic")),
    Refused("unknown seccomp action", lambda spec: spec["linux"].update(seccomp={"defaultAction": "SCMP_ACT_NOSUCH"}), ("SCMP_ACT_NOSUCH",)),
    Refused("unknown namespace", lambda spec: spec["linux"]["namespaces"].append({"type": "nosuch"}), ("nosuch",)),
    *[Ends(f"exit {code}", ["sh", "-c", f"exit {code}"]) for code in (0, 1, 255)],
    *[Ends(f"exec: exit {code}", ["sh", "-c", f"exit {code}"], "exec") for code in (0, 3, 126, 255)],
    *[Ends(f"exec: death by {name}", ["sh", "-c", f"kill -{name} $$"], "exec") for name in ("HUP", "ILL", "ABRT", "KILL", "SEGV", "TERM")],
    Ends("TERM to a process 1 that has no handler, then KILL", ["sh", "-c", "kill -TERM $$; echo ready; sleep 1000"], signal="KILL"),
    Ends("TERM to a process 1 that has a handler", ["sh", "-c", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done"], signal="TERM"),
]
