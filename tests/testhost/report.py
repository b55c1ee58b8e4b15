#!/usr/bin/env python3
"""Reports on a test host that hangs, from outside, through QEMU's monitor and QEMU's memory.

    report.py MONITOR QEMU_PID HOST_MIB

Prints "verdict:" lines first, what they rest on after them. README.md says what this can decide and what not.
"""

import json
import socket
import sys
import time

import nested


class Monitor:
    """QMP (QEMU's docs/interop/qmp-spec): JSON lines over a Unix socket. Each wait ends after 20 s."""

    def __init__(self, path):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(20)
        connection.connect(path)
        self.stream = connection.makefile("rw")
        self.stream.readline()
        self.call("qmp_capabilities")

    def call(self, name, **arguments):
        json.dump({"execute": name, "arguments": arguments}, self.stream)
        self.stream.write("\n")
        self.stream.flush()
        while True:
            answer = json.loads(self.stream.readline())
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise OSError(f"{name}: {answer['error']['desc']}")

    def human(self, line):
        return self.call("human-monitor-command", **{"command-line": line})


def without_vectors(text):
    """Registers without the floating point and vector ones, which tell nothing here."""
    return "\n".join(line for line in text.splitlines() if not line.startswith(("FCW", "FPR", "XMM", "YMM", "ZMM", "Opmask")))


def main():
    path, pid, mebibytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    monitor = Monitor(path)
    samples = []
    registers = []
    # Two samples half a second apart tell a processor that goes round in a circle from one that stands still.
    for _ in range(2):
        monitor.call("stop")
        try:
            registers.append(without_vectors(monitor.human("info registers -a")))
            # "Host virtual address for 0x0 (pc.ram) is 0x7f..."
            base = int(monitor.human("gpa2hva 0").split()[-1], 16)
            with nested.Memory(pid, base, mebibytes << 20) as memory:
                samples.append(nested.sample(memory))
        finally:
            monitor.call("cont")
        time.sleep(0.5)
    for line in nested.verdicts(*samples):
        print("verdict:", line)
    for number, sample in enumerate(samples, 1):
        print(f"\n== sample {number}: nested guests, as the host's memory has them")
        for line in nested.describe(sample):
            print(line)
    for number, text in enumerate(registers, 1):
        print(f"\n== sample {number}: info registers -a (the host's processors, or a nested guest's while one runs)\n{text}")
    for line in ("info status", "info cpus", "info lapic 0", "info pic"):
        try:
            print(f"\n== {line}\n{monitor.human(line)}")
        except OSError as error:
            print(error)


if __name__ == "__main__":
    main()
