"""Starts husk-vmm as the shim does, with a configuration and descriptors by number, and a guest whose init is init.c.

husk-vmm is that of PATH and the kernel the one installed with it; HUSK_KERNEL names another.
"""

import contextlib
import functools
import json
import os
import pathlib
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

from .ttrpc import Client, field, fields, number

HERE = pathlib.Path(__file__).parent


def kernel():
    installed = pathlib.Path(shutil.which("husk-vmm")).resolve().parent.parent / "share/husk/vmlinux"
    return os.environ.get("HUSK_KERNEL", str(installed))


@functools.cache
def initramfs():
    """The tests' own, made once."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="husk-test-"))
    subprocess.run(["gcc", "-O2", "-static", "-Wall", "-o", folder / "init", HERE / "init.c", HERE / "hostile.c"], check=True)
    builder = HERE.parent.parent / "guest-image/initramfs.py"
    subprocess.run([sys.executable, builder, folder / "init", folder / "initramfs"], check=True)
    return str(folder / "initramfs")


@contextlib.contextmanager
def machine(test, cmdline="", console="hvc0", **more):
    """A VM whose init does `test`, see init.c."""
    quiet = "quiet" if console == "hvc0" else ""
    line = f"console={console} {quiet} panic=-1 no_timer_check tsc=reliable husk.test={test} {cmdline}"
    vm = Vm(more.pop("kernel", None) or kernel(), initramfs(), line, serial=console == "ttyS0", **more)
    try:
        yield vm
    except BaseException:
        vm.kill()
        print(vm.said(), file=sys.stderr)
        raise
    finally:
        vm.kill()


class Vm:
    """One husk-vmm process. Every wait has a deadline."""

    def __init__(self, kernel, initramfs, cmdline, vcpus=1, memory_mib=128, fs_socket=None, saved=None, save=None, code=None, **more):
        self.control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.vmm = Client(self.control, "husk.vmm.v1.Vmm")
        self.dial, dial = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.dial.setblocking(False)
        dial.setblocking(False)
        self.files, files = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.disk_number = 0
        console, console_write = os.pipe()
        fds = {
            "kvm": os.open("/dev/kvm", os.O_RDWR),
            "control": control.detach(),
            "dial": dial.detach(),
            "disks": files.detach(),
            "console": console_write,
        }
        config = dict(id="test", vcpus=vcpus, memory_mib=memory_mib, **{**fds, **more})
        if fs_socket is not None:
            fds["fs"] = fs_socket.detach()
            config["fs"] = dict(socket=fds["fs"], tag="share", request_queues=1)
        if saved:
            fds["state"], fds["memory"] = (os.open(saved / name, os.O_RDONLY) for name in ("state", "memory"))
            config["start"] = dict(restore=dict(state=fds["state"], memory=fds["memory"]))
            if code:
                path, address = code
                fds["code"] = os.open(path, os.O_RDONLY)
                config["start"]["restore"]["code"] = dict(file=fds["code"], address=address)
        else:
            fds["kernel"], fds["initramfs"] = os.open(kernel, os.O_RDONLY), os.open(initramfs, os.O_RDONLY)
            config["start"] = dict(boot=dict(kernel=fds["kernel"], initramfs=fds["initramfs"], cmdline=cmdline))
        if save:
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
            fds["save state"], fds["save memory"] = (os.open(save / name, flags, 0o600) for name in ("state", "memory"))
            config["save"] = dict(state=fds["save state"], memory=fds["save memory"])
        config_fd, write = os.pipe()
        os.write(write, json.dumps(config).encode())
        os.close(write)
        self.start = time.monotonic()
        self.process = subprocess.Popen(
            ["husk-vmm", "--config-fd", str(config_fd)], pass_fds=[config_fd, *fds.values()], stderr=subprocess.PIPE
        )
        for fd in (config_fd, *fds.values()):
            os.close(fd)
        self.console, self.lines, self.partial = console, [], b""
        self.log = []
        self.logger = threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True)
        self.logger.start()

    def until(self, wanted, limit=100):
        """Reads the console up to a line that holds `wanted`; None waits for its end."""
        end = time.monotonic() + limit
        seen = 0
        while True:
            for line in self.lines[seen:]:
                if wanted is not None and wanted in line:
                    return line
            seen = len(self.lines)
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.console], [], [], left)[0]:
                raise TimeoutError(f"waited {limit} s for {wanted!r} on the console, which said:\n" + self.said())
            data = os.read(self.console, 65536)
            if not data:
                if wanted is None:
                    return None
                raise EOFError(f"the console ended before {wanted!r}; it said:\n" + self.said())
            *whole, self.partial = (self.partial + data).split(b"\n")
            self.lines += [line.decode(errors="replace").rstrip("\r") for line in whole]

    def drain(self):
        """Forgets what the console said so far."""
        while select.select([self.console], [], [], 0)[0] and os.read(self.console, 65536):
            pass
        self.lines, self.partial = [], b""

    def said(self):
        """Console, exit code and log so far, to find out what went wrong."""
        log = b"".join(self.log).decode(errors="replace")
        return "\n".join(self.lines) + f"\n-- exit code {self.process.poll()}, log:\n{log}"

    def exit(self, limit=100):
        """The exit code, with the console read to its end."""
        self.until(None, limit)
        code = self.process.wait(limit)
        self.logger.join(limit)
        return code

    def attach_disk(self, path, serial, read_only=False, mode=None):
        """Hands a file over and plugs it in; the PCI device number, or the status code below zero."""
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) if mode is None else mode)
        self.disk_number += 1
        socket.send_fds(self.files, [struct.pack("<Q", self.disk_number)], [fd])
        os.close(fd)
        request = number(1, self.disk_number) + field(2, serial.encode()) + number(3, int(read_only))
        code, response = self.call("AttachDisk", request)
        return -code if code else dict(fields(response))[1]

    def detach_disk(self, device):
        """Asks for a disk: the status code, whether the guest ejected it, and whether its file is closed."""
        code, response = self.call("DetachDisk", number(1, device))
        told = {} if code else dict(fields(response))
        return code, bool(told.get(1)), bool(told.get(2))

    def call(self, method, payload=b"", limit=20):
        """Calls a method of husk.vmm.v1.Vmm; returns its status code and the response's bytes."""
        return self.vmm.call(method, payload, limit)

    def status(self):
        """State, and each phase's end in microseconds."""
        code, response = self.call("Status")
        assert code == 0, code
        state, phases = None, []
        for key, value in fields(response):
            if key == 1:
                state = value.decode()
            elif key == 2:
                phase = dict(fields(value))
                phases.append((phase[1].decode(), phase.get(2, 0)))
        return state, phases

    def memory(self):
        """The guest's memory in MiB: booted with, room to plug, requested, plugged."""
        memory = dict(fields(dict(fields(self.call("Status")[1]))[3]))
        return tuple(memory.get(number, 0) for number in (1, 2, 3, 4))

    def resize(self, plugged_mib):
        """Asks the guest to have so much plugged: MiB that it has then, or the status code below zero."""
        code, response = self.call("ResizeMemory", number(1, plugged_mib))
        return -code if code else dict(fields(response)).get(1, 0)

    def accept(self, limit=100):
        """The guest's next connection: port and socket."""
        if not select.select([self.dial], [], [], limit)[0]:
            raise TimeoutError("waited for the guest to dial; the console said:\n" + self.said())
        message, fds, _, _ = socket.recv_fds(self.dial, 8, 1)
        kind, port = struct.unpack("<II", message)
        assert kind == 1, kind
        return port, socket.socket(fileno=fds[0])

    def dial_guest(self, port):
        """A connection to a port of the guest."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            socket.send_fds(self.dial, [struct.pack("<II", 2, port)], [theirs.fileno()])
        ours.settimeout(60)
        return ours

    def kill(self):
        """Leaves nothing behind, however the test ended."""
        if self.process.stderr.closed:
            return
        self.process.kill()
        self.process.wait()
        self.logger.join()
        self.process.stderr.close()
        self.control.close()
        self.dial.close()
        self.files.close()
        os.close(self.console)
