"""What is kept of a failed test: the daemons' log of its time, the processes and where each of their threads waits, the kernel's log."""

import os
import pathlib

from .command import run

NESTED = pathlib.Path(__file__).resolve().parent.parent / "testhost/nested-report"

PROGRAMS = ("husk-vmm", "husk-fs", "containerd-shim-husk-v2", "crictl", "containerd")


def _threads(process):
    for task in sorted((process / "task").iterdir()):
        try:
            yield f"  {task.name} {(task / 'comm').read_text().strip()} {(task / 'wchan').read_text()} {(task / 'syscall').read_text().strip()}"
            yield "    " + (task / "stack").read_text().replace("\n", "\n    ")
        except OSError:
            continue


def _processes():
    for process in sorted(pathlib.Path("/proc").glob("[0-9]*")):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if any(name in command.split(" ")[0] for name in PROGRAMS):
            yield f"{process.name} {command}"
            yield from _threads(process)


def emulator(name):
    """What the emulator's state says of a hang while it lasts: the verdict lines of tests/testhost, none where there is no emulator."""
    if not os.environ.get("TESTHOST"):
        return ""
    done = run(NESTED, name, check=False)
    return done.stdout or done.stderr


def write(folder, name, log, offset):
    """Writes the report and returns its path."""
    path = pathlib.Path(folder) / f"{name}.report.txt"
    said = ""
    if log:
        with open(log, "rb") as file:
            file.seek(offset)
            said = file.read().decode(errors="replace")
    parts = ["# containerd and shims", said, "# processes", *_processes(),
             "# kernel", run("dmesg", check=False).stdout[-8000:]]
    path.write_text("\n".join(parts))
    return str(path)
