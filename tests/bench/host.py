"""What a pod's processes on the host cost, as /proc and KVM's counters tell it."""

import contextlib
import pathlib
import re

from harness.command import run
from harness.crictl import pids

# A pod's processes, by what they are.
PROGRAMS = {"shim": "containerd-shim-husk-v2", "VMM": "husk-vmm", "fs": "husk-fs"}


def memory(pid):
    """A process's proportional set size without guest memory, and how much of the guest's memory it has in its page table; MiB. Of the kernel's
    code, which pods from one template share, its share counts."""
    guest, code, pss, touched = False, False, 0, 0
    for line in pathlib.Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            guest, code = "memfd:guest-memory" in line, "/.templates/" in line
        elif line.startswith("Pss:") and code:
            touched += int(line.split()[1])
        elif line.startswith("Pss:") and not guest:
            pss += int(line.split()[1])
        elif line.startswith("Rss:") and guest:
            touched += int(line.split()[1])
    return pss / 1024, touched / 1024


def _tasks(pid, name):
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # It has ended meanwhile.
            yield (task / name).read_text()


def cpu_ms(pid):
    """CPU time of all threads that live (Documentation/scheduler/sched-stats.rst: ns on the CPU)."""
    return sum(int(text.split()[0]) for text in _tasks(pid, "schedstat")) / 1e6


def switches(pid):
    """How often its threads were switched away from: each time they were woken or had to wait."""
    return sum(int(number) for text in _tasks(pid, "status") for number in re.findall(r"ctxt_switches:\s+(\d+)", text))


def vcpu_exits():
    """Exits of all vCPUs of the host so far; None where there is no debugfs."""
    folder = pathlib.Path("/sys/kernel/debug/kvm")
    if not folder.exists():
        run("mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug", check=False)
    counters = list(folder.glob("*-*/exits"))
    return sum(int(counter.read_text()) for counter in counters) if counters else None


def available_mib():
    """Memory that the host could still give (proc_meminfo(5), MemAvailable)."""
    return int(re.search(r"MemAvailable:\s+(\d+)", pathlib.Path("/proc/meminfo").read_text())[1]) / 1024


def all_pids():
    """Process ids of every pod's processes, by what they are."""
    return {what: pids(program) for what, program in PROGRAMS.items()}
