"""Templates: pods go on from a saved machine; what is wrong with one costs a cold start and nothing else."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time

from harness import leftovers
from harness.command import output, run, wait
from harness.crictl import Pod, pids, pod
from harness.runner import deadline, full
from harness.settings import settings

ROOT = pathlib.Path("/var/lib/husk/templates")
NOTES = pathlib.Path("/run/husk/.templates")
DROP_IN = pathlib.Path("/etc/husk/config.d/50-template-test.toml")
# A size of this file's own, and a small one, since a template's whole memory is touched once.
MEMORY = 160


def small(memory=MEMORY, **options):
    """A pod of that size."""
    return pod(annotations={"io.husk.memory-mib": str(memory)}, **options)


def listed():
    """The templates by name."""
    return {row["name"]: row for row in json.loads(output("husk", "template", "list", "--json"))}


def build(memory=MEMORY):
    """Builds one; its directory."""
    said = output("husk", "template", "build", "--vcpus", "1", "--memory-mib", str(memory))
    (name,) = [name for name, row in listed().items() if row["memory_mib"] == memory and row["usable"]]
    assert said == "there already" or said.startswith(f"{name} built in "), said
    return ROOT / name


class Log:
    """What containerd and shims have said since this was made."""

    def __init__(self, containerd):
        self.path, self.offset = containerd.log, containerd.log.stat().st_size

    def said(self):
        with open(self.path, errors="replace") as log:
            log.seek(self.offset)
            return log.read()

    def starts(self):
        """How each pod started."""
        return re.findall(r" pod started start=(\w+) ", self.said())

    def until(self, text, within=30):
        """Waits until it was said."""
        end = time.monotonic() + within
        while text not in self.said():
            assert time.monotonic() < end, f"not said within {within} s: {text}\n{self.said()[-3000:]}"
            time.sleep(0.1)


@contextlib.contextmanager
def around(config=""):
    """The test's templates and configuration are its own."""
    before, had_notes = {path.name for path in ROOT.glob("[0-9]*")}, NOTES.exists()
    try:
        with settings(DROP_IN, config):
            yield
    finally:
        for path in ROOT.glob("[0-9]*"):
            if path.name not in before:
                shutil.rmtree(path)
                for note in NOTES.glob(f"{path.name}*"):
                    note.unlink()
        for note in [*NOTES.glob("*.failed"), NOTES / "build.log", NOTES / "processor"]:
            note.unlink(missing_ok=True)
        if not had_notes:
            shutil.rmtree(NOTES, ignore_errors=True)


def test_pods_go_on_from_a_template(containerd):
    """A template is built, listed and removed by the command line; two pods from it run as any other, with their own addresses and names."""
    with around():
        name = build().name
        assert re.fullmatch(r"1cpu-160mib-[0-9a-f]{8}", name), name
        assert output("husk", "template", "build", "--vcpus", "1", "--memory-mib", str(MEMORY)) == "there already"
        row = listed()[name]
        assert row["usable"] and row["vcpus"] == 1 and 1 << 20 < row["disk_bytes"] < MEMORY << 20, row
        assert re.search(rf"{name} +1 +{MEMORY} .* usable", output("husk", "template", "list"))
        log = Log(containerd)
        with small(hostname="one") as one, small(hostname="two") as two:
            assert log.starts() == ["template", "template"], log.said()
            seen = []
            for it in (one, two):
                box = it.start(["sleep", "1000"])
                assert it.address() in box.exec("ip", "-4", "addr", "show", "eth0")
                seen.append((box.exec("hostname"), box.exec("cat", "/sys/class/net/eth0/address"), box.exec("cat", "/sys/class/net/eth0/mtu")))
                assert abs(float(box.exec("date", "+%s")) - time.time()) < 30
                box.exec("wget", "-q", "-O", "/dev/null", "-T", "5", "http://10.123.0.1:1", check=False)
            assert [name for name, _, _ in seen] == ["one", "two"]
            assert seen[0][1] != seen[1][1] and "02:68:75:73:6b:00" not in str(seen) and {mtu for *_, mtu in seen} == {"1500"}, seen
        said = output("husk", "template", "remove", name)
        assert said == f"{name} removed" and name not in listed() and not (ROOT / name).exists()
        assert "no template" in run("husk", "template", "remove", name, check=False).stderr
        log = Log(containerd)
        with small():
            assert log.starts() == ["cold"]


@deadline(240)
def test_built_beside_the_first_pods(containerd):
    """Pods of a new size that start at once boot, one build serves them all, outside their cgroups, and the next go on from it."""
    with around('templates = "auto"\n'):
        log = Log(containerd)
        pods = [Pod(annotations={"io.husk.memory-mib": str(MEMORY)}) for _ in range(3)]
        seen = set()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            running = [pool.submit(it.run) for it in pods]
            end = time.monotonic() + 60
            while "template" not in log.starts() and not any(row["usable"] for name, row in listed().items() if "-160mib-" in name):
                assert time.monotonic() < end, log.said()[-3000:]
                for pid in _builders():
                    with contextlib.suppress(OSError):
                        if pathlib.Path(f"/proc/{pid}/stat").read_text().split()[18] == "19":
                            seen.add((pid, pathlib.Path(f"/proc/{pid}/cgroup").read_text()))
                time.sleep(0.05)
            for done in running:
                done.result()
        for it in pods:
            it.remove()
        assert log.starts()[0] == "cold" and log.said().count("is being built") == 1, log.said()
        assert len(seen) == 1 and "husk-test" not in str(seen), seen
        log = Log(containerd)
        with small() as it:
            assert log.starts() == ["template"]
            assert it.start(["sleep", "1000"]).exec("echo", "hello") == "hello"


def _builders():
    """Process ids of builders in the background."""
    def is_one(pid):
        with contextlib.suppress(OSError):
            words = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            return words[1:2] == [b"template"] and b"background" in words[2]
    return [pid for pid in pids("containerd-shim-husk-v2") if is_one(pid)]


# How far a build has come.
POINTS = {
    "start": lambda: True,
    "machine": lambda: bool(pids("husk-vmm")),
    "files": lambda: any(ROOT.glob(".building-*/memory")),
    "writing": lambda: any(path.stat().st_blocks for path in ROOT.glob(".building-*/memory")),
    "end": lambda: any(ROOT.glob(".building-*/manifest.json")),
}


def _killed(when):
    """Kills a build at a point of POINTS or after seconds, and waits until it is gone with its machine; whether it had ended before."""
    builder = subprocess.Popen(["husk", "template", "build", "--memory-mib", str(MEMORY)], stdout=subprocess.DEVNULL)
    if isinstance(when, str):
        while not POINTS[when]() and builder.poll() is None:
            time.sleep(0.001)
    else:
        with contextlib.suppress(subprocess.TimeoutExpired):
            builder.wait(when)
    builder.kill()
    had_ended = builder.wait() == 0
    _no_machine(f"killed {when}")
    return had_ended


def _no_machine(why):
    end = time.monotonic() + 10
    while pids("husk-vmm"):
        assert time.monotonic() < end, f"the VMM outlives its builder, {why}"
        time.sleep(0.05)


@deadline(full(300, 900))
def test_a_killed_build_harms_nothing(containerd):
    """A build that is killed at any point, or whose VMM is, leaves no process, no template that is not whole, and nothing that the next build or
    pod minds."""
    with around():
        delays = full((0.3, 1, 2.5), [number / 4 for number in range(1, 41)])
        for when in (*POINTS, *delays):
            if _killed(when):
                run("husk", "template", "remove", "--all")
            assert not listed(), (when, listed())
        builder = subprocess.Popen(["husk", "template", "build", "--memory-mib", str(MEMORY)], stderr=subprocess.PIPE, text=True)
        wait(POINTS["machine"], within=20)
        os.kill(pids("husk-vmm")[0], signal.SIGKILL)
        said = builder.communicate(timeout=20)[1]
        assert builder.returncode == 1 and "killed by signal 9" in said, said
        assert not list(ROOT.glob("[0-9.]*mib-*")), list(ROOT.iterdir())
        log = Log(containerd)
        with small():
            assert len(log.starts()) == 1
        _killed("writing")
        build()
        assert not list(ROOT.glob(".building-*")) and not list(ROOT.glob(".removed-*"))
        log = Log(containerd)
        with small():
            assert log.starts() == ["template"]


@deadline(240)
def test_a_killed_build_in_the_background(containerd):
    """Where a build in the background is killed, its machine goes too, the pod that started it runs on, and the next pod starts another."""
    with around('templates = "auto"\n'):
        log = Log(containerd)
        with small() as it:
            assert log.starts() == ["cold"]
            wait(lambda: _builders() and len(pids("husk-vmm")) == 2, within=60)
            os.kill(_builders()[0], signal.SIGKILL)
            wait(lambda: len(pids("husk-vmm")) == 1, within=10)
            assert it.start(["sleep", "1000"]).exec("echo", "well") == "well"
        assert not listed()
        with small():
            wait(lambda: any(row["usable"] for row in listed().values()), within=60)
        assert not list(ROOT.glob(".building-*")) and log.starts() == ["cold", "cold"]
        with small():
            assert log.starts()[2:] == ["template"]


@deadline(120)
def test_a_dead_fs_daemon_is_no_fault_of_a_template(containerd):
    """husk-fs ends before a restored machine is up: the pod boots with another, and the template stays and serves the next pod."""
    flag, program = pathlib.Path("/run/husk-test/fs-flag"), pathlib.Path("/run/husk-test/fs-once")
    program.write_text(f'#!/bin/sh\n[ -e {flag} ] && exec {shutil.which("husk-fs")} "$@"\n: > {flag}\nexit 1\n')
    program.chmod(0o755)
    with around(f'fs = "{program}"\n'):
        folder = build()
        log = Log(containerd)
        with small() as it:
            assert log.starts() == ["cold"], log.said()
            assert it.start(["sleep", "1000"]).exec("echo", "well") == "well"
        said = [line for line in log.said().splitlines() if "level=warn" in line and folder.name in line]
        assert any("is kept, since the fault is not its own" in line and "husk-fs" in line for line in said), log.said()[-4000:]
        with small():
            assert log.starts() == ["cold", "template"], log.said()
    flag.unlink()
    program.unlink()


def _alter(path, at):
    """Changes a byte behind the file's time, as a failing disk does."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=times)


@deadline(300)
def test_damage_costs_a_cold_start(containerd):
    """A damaged state, damaged, truncated or missing memory: the pod boots within the same start, with a warning, and a new template takes the
    place of the old one."""
    def state_unnoticed(folder):
        _alter(folder / "state", 1000)

    def after_boot(folder):
        shutil.rmtree(NOTES)
        _alter(folder / "memory", _filled(folder / "memory"))

    damages = {
        "state": state_unnoticed,
        "checksum": after_boot,
        "length": lambda folder: os.truncate(folder / "memory", 1 << 20),
        "memory is not there": lambda folder: (folder / "memory").unlink(),
    }
    with around('templates = "auto"\n'):
        folder = build()
        for word, damage in damages.items():
            before = folder.stat().st_ino
            damage(folder)
            log = Log(containerd)
            with small() as it:
                assert log.starts() == ["cold"], log.said()
                assert it.start(["sleep", "1000"]).exec("echo", "well") == "well"
            warnings = [line for line in log.said().splitlines() if "level=warn" in line and "template" in line]
            assert any(word in line and folder.name in line for line in warnings), (word, log.said()[-4000:])
            wait(lambda: folder.stat().st_ino != before and not _builders(), within=60, despite=(OSError,))
        log = Log(containerd)
        with small():
            assert log.starts() == ["template"]


def _filled(path):
    """Where a sparse file has data."""
    with open(path, "rb") as file:
        return os.lseek(file.fileno(), 0, os.SEEK_DATA)


@deadline(300)
def test_a_directory_that_is_not_husks_own(containerd):
    """A wrong owner or mode, a read-only or full directory: a warning with its path, a cold start, nothing touched."""
    def cold(word, path):
        log = Log(containerd)
        with small() as it:
            assert log.starts() == ["cold"], log.said()
            assert it.start(["sleep", "1000"]).exec("echo", "well") == "well"
            log.until("template")
        warnings = [line for line in log.said().splitlines() if "level=warn" in line]
        assert any(word in line and str(path) in line for line in warnings), (word, log.said()[-4000:])

    with around('templates = "auto"\n'):
        folder = build()
        os.chmod(folder, 0o755)
        cold("has mode 755", folder)
        os.chmod(folder, 0o700)
        os.chown(folder / "state", 1000, 0)
        cold("belongs to 1000:0", folder / "state")
        os.chown(folder / "state", 0, 0)
        os.chmod(ROOT, 0o711)
        cold("has mode 711", ROOT)
        os.chmod(ROOT, 0o700)
        os.chown(ROOT, 1000, 1000)
        cold("belongs to 1000:1000", ROOT)
        os.chown(ROOT, 0, 0)
        assert (folder / "memory").exists()
        shutil.rmtree(folder)
        run("mount", "--bind", ROOT, ROOT)
        try:
            run("mount", "-o", "remount,bind,ro", ROOT)
            cold("Read-only file system", ROOT)
        finally:
            run("umount", ROOT)
        run("mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", ROOT)
        try:
            said = run("husk", "template", "build", "--memory-mib", str(MEMORY), check=False).stderr
            assert "No space left" in said and str(ROOT) in said, said
            assert not list(ROOT.glob("[0-9.]*[0-9b]-*")), list(ROOT.iterdir())
            log = Log(containerd)
            with small():
                assert log.starts() == ["cold"]
            end = time.monotonic() + 60
            while not list(NOTES.glob("*.failed")):
                assert time.monotonic() < end, log.said()
                time.sleep(0.2)
            cold("No space left", ROOT)
        finally:
            run("umount", ROOT)


@deadline(240)
def test_an_upgrade_never_uses_an_old_one(containerd):
    """A template of another kernel, initramfs (and agent), VMM or shim is not used, is listed with the reason, and goes with the next build."""
    programs = pathlib.Path(shutil.which("husk-vmm")).resolve().parent
    files = {"vmm": programs / "husk-vmm", "shim": programs / "containerd-shim-husk-v2", "initramfs": programs.parent / "share/husk/initramfs",
             "kernel": programs.parent / "share/husk/vmlinux"}
    times = {path: (path.stat().st_atime_ns, path.stat().st_mtime_ns) for path in files.values()}
    with around():
        try:
            old = build()
            for number, (what, path) in enumerate(files.items()):
                os.utime(path)
                if what in ("vmm", "kernel"):
                    log = Log(containerd)
                    with small():
                        assert log.starts() == ["cold"]
                row = listed()[old.name]
                assert not row["usable"] and what in row["reason"].removeprefix("made with another ").split(", "), row
                assert number or row["reason"] == "made with another vmm", row
            new = build()
            assert new.name != old.name and not old.exists()
        finally:
            for path, at in times.items():
                os.utime(path, ns=at)
        log = Log(containerd)
        with small():
            assert log.starts() == ["cold"]


def _threads():
    """Of programs: the kernel's own come and go with its work. (PF_KTHREAD in proc_pid_stat(5)'s flags.)"""
    count = 0
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            count += 0 if int(fields[6]) & 0x200000 else int(fields[17])
    return count


def _figures():
    """What the host has in use of what could leak."""
    meminfo = dict(re.findall(r"(\w+): +(\d+) kB", pathlib.Path("/proc/meminfo").read_text()))
    cgroups = dict(line.split() for line in pathlib.Path("/sys/fs/cgroup/cgroup.stat").read_text().splitlines())
    return {"shared memory KiB": int(meminfo["Shmem"]), "kernel stacks KiB": int(meminfo["KernelStack"]), "kernel objects KiB": int(meminfo["SUnreclaim"]),
            "anonymous memory KiB": int(meminfo["AnonPages"]), "threads": _threads(),
            "open files": int(pathlib.Path("/proc/sys/fs/file-nr").read_text().split()[0]), "cgroups": int(cgroups["nr_descendants"]),
            "dying cgroups": int(cgroups["nr_dying_descendants"]), "sockets": int(re.search(r"used (\d+)", pathlib.Path("/proc/net/sockstat").read_text())[1]),
            "templates KiB": sum(path.stat().st_blocks for path in ROOT.rglob("*")) // 2}


@deadline(full(120, 1700))
def test_many_one_after_another(containerd):
    """Pods started and removed one after another, all from a template (200 with HUSK_TEST_FULL), leave nothing, and the host has no more in use."""
    with around():
        build()
        number = full(5, 200)
        # What is made once and kept.
        for _ in range(full(2, 5)):
            with small():
                pass
        before, had = leftovers.snapshot(), _figures()
        log, start = Log(containerd), time.monotonic()
        for _ in range(number):
            with small():
                pass
        print(f"    {number} in {time.monotonic() - start:.0f} s", flush=True)
        assert log.starts() == ["template"] * number
        leftovers.expect_none(before)
        has = _figures()
        print(f"    {had}\n    {has}", flush=True)
        # Kernel's and containerd's own caches come and go; one page, one descriptor or one thread a pod would be seen among 200.
        slack = {"anonymous memory KiB": 24 << 10, "kernel objects KiB": (8 << 10) + number * 16, "dying cgroups": 2 * number, "open files": 128}
        grown = {what: (had[what], value) for what, value in has.items() if value > had[what] + slack.get(what, 1024 if "KiB" in what else 8)}
        assert not grown, grown


@deadline(full(180, 600))
def test_larger_shapes(containerd):
    """Machines that begin with more memory, and with two vCPUs, go on from templates of their own; the guest sees all of it."""
    memory = full(1024, 2048)
    online = pathlib.Path("/run/husk-test/online")
    online.write_text("0-1\n")
    with around(f"boot_memory_mib = {memory}\nmemory_mib = 3072\n"):
        # An emulated host has one CPU, beyond which no pod has vCPUs; the shim reads the number here (sysconf(3)).
        run("mount", "--bind", online, "/sys/devices/system/cpu/online")
        try:
            for vcpus, annotations in ((1, {}), (2, {"io.husk.vcpus": "2", "io.husk.memory-mib": str(MEMORY)})):
                size = MEMORY if annotations else memory
                start = time.monotonic()
                said = output("husk", "template", "build", "--vcpus", vcpus, "--memory-mib", size)
                assert f"{vcpus}cpu-{size}mib-" in said, said
                print(f"    {said} (all {time.monotonic() - start:.1f} s)", flush=True)
                for _ in range(2):
                    log = Log(containerd)
                    with pod(annotations=annotations) as it:
                        assert log.starts() == ["template"], log.said()
                        print(re.findall(r"pod started .*", log.said())[-1], flush=True)
                        box = it.start(["sleep", "1000"])
                        seen = box.exec("sh", "-c", "nproc; grep MemTotal /proc/meminfo; cat /proc/interrupts").splitlines()
                        assert int(seen[0]) == vcpus and size * 0.75 < int(seen[1].split()[1]) >> 10 <= size, seen
                        # Both are alive: each counts ticks of its own.
                        ticks = [line.split()[1:1 + vcpus] for line in seen if line.strip().startswith("LOC:")][0]
                        assert all(map(int, ticks)), seen
        finally:
            run("umount", "/sys/devices/system/cpu/online")
            online.unlink()
