"""Bad input: specs of absurd sizes and paths, ids that are none, calls in the wrong state. What comes is an error of the right kind in good time, the
pod lives on, and nothing is left (the runner looks after every test). Broken JSON, which containerd itself never passes on, is for
shim/src/spec/malformed_tests.rs."""

import json
import pathlib
import re
import time

from contract import base, sides
from contract.base import bind, mount
from harness.command import run
from harness.containerd import SOCKET, version
from harness.runner import deadline

# What containerd's errdefs calls the kinds, at the end of a message.
KINDS = ("not found", "already exists", "invalid argument", "failed precondition", "unimplemented", "not implemented", "unknown", "unavailable",
         "deadline exceeded", "resource exhausted")


def kind(done):
    """The kind of error that a command of ctr ended with; "none" if it succeeded, "some" if it is containerd 2's, which does not tell."""
    if not done.returncode:
        return "none"
    if version() >= (2, 0):
        return "some"
    found = re.search(rf"({'|'.join(KINDS)})\s*$", done.stderr.strip())
    return found[1].replace("unimplemented", "not implemented") if found else f"no kind: {done.stderr.strip()[-300:]}"


def is_kind(done, wanted):
    """Whether a command ended with this kind of error, as far as it is told."""
    return kind(done) == wanted or kind(done) == "some" and wanted != "none"


def _mounts(count):
    return lambda spec: spec["mounts"].extend(mount(f"/m/{number}", "tmpfs") for number in range(count))


def _process(**fields):
    return lambda spec: spec["process"].update(fields)


def _resources(**fields):
    return lambda spec: spec["linux"]["resources"].update(fields)


def _mount(*one):
    return lambda spec: spec["mounts"].append(mount(*one))


# Name, change of the spec, kind of error and a word of its message; no kind: it may start or be refused, as long as it is done with.
SPECS = [
    ("10,000 mounts", _mounts(10_000), "invalid argument", "mounts"),
    ("100,000 variables", _process(env=[f"V{number}=x" for number in range(100_000)]), "unknown", "65536"),
    ("a variable of 3 MiB", _process(env=[f"V={'x' * (3 << 20)}"]), "unknown", "argument list too long"),
    ("10,000 arguments", _process(args=["true"] + ["x"] * 10_000), "none", ""),
    ("no arguments", _process(args=[]), "invalid argument", "args"),
    ("an empty program", _process(args=[""]), "unknown", "program"),
    ("a NUL in an argument", _process(args=["echo", "a\0b"]), "unknown", "NUL"),
    ("least memory limit", _resources(memory={"limit": -2 ** 63}), None, ""),
    ("greatest memory limit", _resources(memory={"limit": 2 ** 63 - 1}), None, ""),
    ("memory limit of a byte", _resources(memory={"limit": 1}), None, ""),
    ("negative quota", _resources(cpu={"quota": -2 ** 63, "period": 100000}), None, ""),
    ("period of nothing", _resources(cpu={"quota": 1000, "period": 1}), "unknown", "cpu.max"),
    ("greatest shares", _resources(cpu={"shares": 2 ** 64 - 1}), "none", ""),
    ("pids limit of -2^63", _resources(pids={"limit": -2 ** 63}), "none", ""),
    ("negative rlimits in disguise", _process(rlimits=[{"type": "RLIMIT_NOFILE", "soft": 2 ** 64 - 1, "hard": 2 ** 64 - 1}]), None, ""),
    ("a relative working directory", _process(cwd="../.."), "invalid argument", "cwd"),
    ("a working directory up and away", _process(cwd="/../../../../.."), "none", ""),
    ("a destination up and away", _mount("/../../../../m", "tmpfs"), "none", ""),
    ("a relative destination", _mount("../../m", "tmpfs"), "none", ""),
    ("an empty destination", _mount("", "tmpfs"), None, ""),
    ("the root as a destination", _mount("/", "tmpfs"), None, ""),
    ("a destination in a loop of links", _mount("/links/loop/m", "tmpfs"), "unknown", "symbolic links"),
    ("a destination through /proc/self/root", _mount("/proc/self/root/m", "tmpfs"), None, ""),
    ("a destination through a descriptor", _mount("/proc/self/fd/3/m", "tmpfs"), None, ""),
    ("a destination of 5,000 characters", _mount("/" + "x" * 5000, "tmpfs"), "unknown", "too long"),
    ("a destination of 3,000 steps", _mount("/x" * 3000, "tmpfs"), None, ""),
    ("a relative source", lambda spec: spec["mounts"].append({**bind("", "/b"), "source": "etc"}), "invalid argument", "absolute"),
    ("the host's root with all that is in it", lambda spec: spec["mounts"].append({**bind("", "/b", "rbind", "ro"), "source": "/"}), "none", ""),
    ("the pod's own share directory", lambda spec: spec["mounts"].append({**bind("", "/b", "rbind"), "source": "/run/husk"}), None, ""),
    ("a device with a negative number", lambda spec: spec["linux"].update(
        devices=[{"path": "/dev/x", "type": "c", "major": -1, "minor": -1}]), "invalid argument", "/dev/x"),
    ("a device that is a path up and away", lambda spec: spec["linux"].update(
        devices=[{"path": "/dev/../../../x", "type": "c", "major": 1, "minor": 3}]), "none", ""),
    ("an unknown namespace", lambda spec: spec["linux"]["namespaces"].append({"type": "nosuch"}), "invalid argument", "nosuch"),
    ("a namespace twice", lambda spec: spec["linux"]["namespaces"].append({"type": "ipc"}), None, ""),
    ("a user namespace without maps", lambda spec: spec["linux"]["namespaces"].append({"type": "user"}), "invalid argument", "user namespace"),
    ("maps without sense", lambda spec: spec["linux"].update(
        uidMappings=[{"containerID": 2 ** 32 - 1, "hostID": 2 ** 32 - 1, "size": 2 ** 32 - 1}]), "invalid argument", "user namespace"),
    ("a mask of 10,000 paths", lambda spec: spec["linux"].update(maskedPaths=[f"/none/{n}" for n in range(10_000)]), None, ""),
    ("a mask up and away", lambda spec: spec["linux"].update(maskedPaths=["/../../../../run", "/links/loop/x"]), None, ""),
    ("a profile of 100,000 rules", lambda spec: spec["linux"].update(seccomp={
        "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"] * 100_000, "action": "SCMP_ACT_LOG"}]}), "unknown", "rules"),
    # No shim is started for it, and containerd knows no kinds of what goes wrong there.
    ("a sandbox that is not there", lambda spec: spec["annotations"].update({sides.SANDBOX: "nosuch"}), "unknown", "nosuch is gone"),
    ("a role that is none", lambda spec: spec["annotations"].update({sides.KIND: "neither"}), "invalid argument", "neither"),
]


@deadline(240)
def test_specs():
    """Specs of absurd sizes, numbers and paths start or are refused in the right words, each in good time, and the pod is unharmed by them all."""
    wrong = []
    with sides.place(), sides.Husk() as husk:
        (sides.IMAGE / "links/loop").symlink_to("loop")
        for name, change, wanted, word in SPECS:
            ident = f"bad{next(sides.COUNT)}"
            spec = base.spec()
            spec["process"]["args"] = ["true"]
            spec["annotations"] = {sides.KIND: "container", sides.SANDBOX: husk.sandbox}
            change(spec)
            start = time.monotonic()
            with sides.rootfs(ident) as root:
                done = run(*husk.raw(sides.finished(spec, ident, root), ident), stdin="", check=False, timeout=60)
            took = time.monotonic() - start
            found = kind(done)
            if wanted and (not is_kind(done, wanted) or word not in done.stderr):
                wrong.append(f"{name}: {found} instead of {wanted} with {word!r}: {done.stderr[-400:]}")
            elif found.startswith("no kind") and done.returncode > 1:
                wrong.append(f"{name}: {done.returncode} {found}")
            if took > 20:
                wrong.append(f"{name}: took {took:.0f} s")
        assert works(husk), "the pod is dead"
    assert not wrong, "\n".join(wrong)


def works(husk):
    """Whether a new container of the pod runs."""
    ident = f"good{next(sides.COUNT)}"
    spec = base.spec()
    spec["process"]["args"] = ["echo", "unharmed"]
    with sides.rootfs(ident) as root:
        return run(*husk.command(sides.finished(spec, ident, root), ident), stdin="").stdout == "unharmed\n"


IDS = ("a/b", "..", "../x", ".", "-x", "x-", "a..b", "a b", "a\tb", "ä", "x" * 77, "x" * 300)


def test_ids():
    """Ids with slashes, dots, blanks, or of 300 bytes are InvalidArgument for containers and for execs, before anything is made."""
    with sides.place(), sides.Husk() as husk, sides.sleeping(husk) as ident:
        for bad in IDS:
            done = run(*sides.CTR, "run", "-d", "--null-io", "--runtime", "io.containerd.husk.v2", "husk.test/busybox:1", bad, "true", check=False)
            assert is_kind(done, "invalid argument"), (bad, done.stderr)
            # With a logger, since ctr names its FIFOs by the id.
            done = run(*sides.CTR, "tasks", "exec", "--log-uri", "file:///run/husk-test/log", "--exec-id", bad, ident, "true", check=False, stdin="")
            assert is_kind(done, "invalid argument"), (bad, done.stderr)
        done = run(*sides.CTR, "tasks", "exec", "--exec-id", "x" * 76, ident, "echo", "longest", check=False, stdin="")
        assert done.stdout == "longest\n", done.stderr


def _states(side):
    """Calls in wrong states and of what is not there, and how each ends; the container is one that runs."""
    said = {}

    def call(name, *words):
        done = run(*sides.CTR, *words, check=False, stdin="", timeout=60)
        said[name] = kind(done)

    with sides.sleeping(side) as ident:
        call("start what runs", "tasks", "start", "-d", ident)
        call("a second container of the id", "run", "-d", "--null-io", *side.runtime, "husk.test/busybox:1", ident, "true")
        call("delete what runs", "tasks", "rm", ident)
        call("kill of what is not there", "tasks", "kill", "-s", "KILL", "nosuch")
        call("kill of an exec that is not there", "tasks", "kill", "-s", "KILL", "--exec-id", "nosuch", ident)
        call("pause of what is not there", "tasks", "pause", "nosuch")
        call("exec in what is not there", "tasks", "exec", "--exec-id", "x", "nosuch", "true")
        call("metrics of what is not there", "tasks", "metrics", "nosuch")
        call("resume of what is not paused", "tasks", "resume", ident)
        call("an exec that fails", "tasks", "exec", "--exec-id", "same", ident, "/no/such")
        call("its id again", "tasks", "exec", "--exec-id", "same", ident, "true")
        call("kill", "tasks", "kill", "-s", "KILL", ident)
        _stopped(ident)
        call("kill of the dead", "tasks", "kill", "-s", "KILL", ident)
        call("exec in the dead", "tasks", "exec", "--exec-id", "late", ident, "true")
        call("pause of the dead", "tasks", "pause", ident)
        call("start of the dead", "tasks", "start", "-d", ident)
        call("delete of the dead", "tasks", "rm", ident)
        call("delete of the deleted", "tasks", "rm", ident)
    return said


def _stopped(ident):
    end = time.monotonic() + 20
    while "STOPPED" not in next(line for line in run(*sides.CTR, "tasks", "ls").stdout.splitlines() if line.startswith(ident)):
        assert time.monotonic() < end, "not stopped after 20 s"
        time.sleep(0.05)


# Where husk's answer is another kind than that of runc's shim, and why.
OTHERWISE = {name: ("failed precondition", "runc says so in words only, for which its shim has no kind") for name in (
    "resume of what is not paused", "exec in the dead", "pause of the dead")}


def test_states():
    """Calls in the wrong state, of what is not there, or twice, are NotFound, AlreadyExists or FailedPrecondition as with runc's shim."""
    with sides.place(), sides.Husk() as husk:
        ours, theirs = _states(husk), _states(sides.RuncShim())
    assert len(ours) == 18, ours
    otherwise = OTHERWISE if version() < (2, 0) else {}
    wrong = {name: (theirs[name], ours[name]) for name in ours if otherwise.get(name, (theirs[name],))[0] != ours[name]}
    assert not wrong, f"(runc, husk): {json.dumps(wrong, indent=1)}\n of {json.dumps(theirs)}"


def test_duplicate_pod():
    """A second pod of one id, which only another namespace of containerd's can ask for, is refused, and the first is unharmed."""
    other = ("ctr", "-a", SOCKET, "-n", "other")
    with sides.place(), sides.Husk() as husk:
        spec = base.spec()
        with sides.rootfs("again") as root:
            config = husk.config(sides.finished(spec, "again", root), "again")
            done = run(*other, "run", "-d", "--null-io", *config, *husk.runtime, husk.sandbox, check=False, timeout=60)
        # containerd keeps the container of a task that failed.
        run(*other, "containers", "rm", husk.sandbox, check=False)
        run(*other, "namespaces", "rm", "other")
        # containerd's own folder of the namespace stays, empty.
        pathlib.Path("/run/husk-test/state/io.containerd.runtime.v2.task/other").rmdir()
        assert is_kind(done, "already exists") and "has a pod of this id" in done.stderr, done.stderr
        assert works(husk)
