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
from harness.command import output, run
from harness.crictl import Pod, pids, pod
from harness.runner import deadline, full

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
    DROP_IN.parent.mkdir(parents=True, exist_ok=True)
    DROP_IN.write_text(config)
    try:
        yield
    finally:
        DROP_IN.unlink()
        for path in ROOT.glob("[0-9]*"):
            if path.name not in before:
                shutil.rmtree(path)
                for note in NOTES.glob(f"{path.name}*"):
                    note.unlink()
        for note in [*NOTES.glob("*.failed"), NOTES / "build.log"]:
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
            assert seen[0][1] != seen[1][1] and "02:00:00:00:00:01" not in str(seen) and {mtu for *_, mtu in seen} == {"1500"}, seen
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
                for pid in pids("containerd-shim-husk-v2"):
                    with contextlib.suppress(OSError):
                        words = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                        if words[1] == b"template" and b"background" in words[2] and pathlib.Path(f"/proc/{pid}/stat").read_text().split()[18] == "19":
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


@deadline(300)
def test_a_killed_build_harms_nothing(containerd):
    """A build that is killed at any point leaves no process, and nothing that the next build or pod minds."""
    def at_start(_):
        return True

    def at_machine(_):
        return bool(pids("husk-vmm"))

    def at_files(_):
        return any(ROOT.glob(".building-*/memory"))

    def at_writing(_):
        return any(path.stat().st_blocks for path in ROOT.glob(".building-*/memory"))

    def at_end(_):
        return any(ROOT.glob(".building-*/manifest.json"))

    with around():
        for point in (at_start, at_machine, at_files, at_writing, at_end):
            builder = subprocess.Popen(["husk", "template", "build", "--memory-mib", str(MEMORY)], stdout=subprocess.DEVNULL)
            while not point(builder) and builder.poll() is None:
                time.sleep(0.001)
            builder.send_signal(signal.SIGKILL)
            builder.wait()
            end = time.monotonic() + 10
            while pids("husk-vmm"):
                assert time.monotonic() < end, f"the VMM outlives its builder, killed {point.__name__}"
                time.sleep(0.05)
        log = Log(containerd)
        with small():
            assert len(log.starts()) == 1
        build()
        assert not list(ROOT.glob(".building-*")) and not list(ROOT.glob(".removed-*"))
        log = Log(containerd)
        with small():
            assert log.starts() == ["template"]


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
    """A damaged state, damaged, truncated or missing memory: the pod boots within the same start, with a warning, and the template is gone."""
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
    with around():
        for word, damage in damages.items():
            folder = build()
            damage(folder)
            log = Log(containerd)
            with small() as it:
                assert log.starts() == ["cold"], log.said()
                assert it.start(["sleep", "1000"]).exec("echo", "well") == "well"
            warnings = [line for line in log.said().splitlines() if "level=warn" in line and "template" in line]
            assert any(word in line and folder.name in line for line in warnings), (word, log.said()[-4000:])
            assert not folder.exists()


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


def test_an_upgrade_never_uses_an_old_one(containerd):
    """A template of another kernel file is not used, is listed with the reason, and goes with the next build."""
    kernel = pathlib.Path(shutil.which("husk-vmm")).resolve().parent.parent / "share/husk/vmlinux"
    times = kernel.stat().st_atime_ns, kernel.stat().st_mtime_ns
    with around():
        old = build()
        try:
            os.utime(kernel)
            log = Log(containerd)
            with small():
                assert log.starts() == ["cold"]
            row = listed()[old.name]
            assert not row["usable"] and row["reason"] == "made with another kernel", row
            new = build()
            assert new.name != old.name and not old.exists()
        finally:
            os.utime(kernel, ns=times)
        log = Log(containerd)
        with small():
            assert log.starts() == ["cold"]


@deadline(full(120, 1500))
def test_many_one_after_another(containerd):
    """Pods started and removed one after another, all from a template, leave nothing."""
    with around():
        build()
        with small():
            pass
        before = leftovers.snapshot()
        log = Log(containerd)
        number = full(5, 200)
        for _ in range(number):
            with small():
                pass
        assert log.starts() == ["template"] * number
        leftovers.expect_none(before)
