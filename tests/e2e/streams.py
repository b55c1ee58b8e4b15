"""Standard streams: exec, attach and terminals carry every byte, in order, with their ends."""

import fcntl
import hashlib
import os
import pty
import struct
import subprocess
import termios
import time

from harness.command import run
from harness.crictl import COMMAND, crictl, pod
from harness.runner import deadline

SIZE = 64 << 20


@deadline(300)
def test_64_mib_each_way():
    """exec -i carries 64 MiB in and 64 MiB out unchanged."""
    data = os.urandom(1 << 20) * (SIZE >> 20)
    want = hashlib.sha256(data).hexdigest()
    with pod() as it:
        box = it.start(["sleep", "1000"])
        there = run(*COMMAND, "exec", "-i", box.id, "sha256sum", stdin=data, text=False, timeout=140).stdout.split()[0].decode()
        assert there == want, "stdin"
        back = run(*COMMAND, "exec", box.id, "sh", "-c", f"head -c {SIZE} /dev/zero | tr '\\0' x", text=False, timeout=140).stdout
        assert hashlib.sha256(back).hexdigest() == hashlib.sha256(b"x" * SIZE).hexdigest(), f"stdout: {len(back)} bytes"


def test_end_of_stdin_is_seen():
    """cat ends when its input does, with all of it echoed."""
    with pod() as it:
        box = it.start(["sleep", "1000"])
        assert crictl("exec", "-i", box.id, "cat", stdin="one\ntwo\n").stdout == "one\ntwo\n"


def test_stdout_and_stderr_are_apart():
    """The two output streams don't mix."""
    with pod() as it:
        box = it.start(["sleep", "1000"])
        done = crictl("exec", box.id, "sh", "-c", "echo out; echo err >&2")
        assert (done.stdout, done.stderr) == ("out\n", "err\n")


class Terminal:
    """A program on a terminal of this side."""

    def __init__(self, *command, rows=24, columns=80):
        self.master, slave = pty.openpty()
        self.resize(rows, columns)
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
                                        preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0))
        os.close(slave)
        self.seen = b""

    def resize(self, rows, columns):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text):
        os.write(self.master, text.encode())

    def expect(self, text, within=30):
        """Reads until the text was seen; the harness's alarm ends a wait for nothing."""
        end = time.monotonic() + within
        while text.encode() not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            try:
                self.seen += os.read(self.master, 4096)
            except OSError:
                raise AssertionError(f"ended without {text!r}: {self.seen!r}") from None
        self.seen = self.seen.partition(text.encode())[2]


def test_terminal_with_resize():
    """exec -it gives a terminal of the client's size, which follows when that changes."""
    with pod() as it:
        box = it.start(["sleep", "1000"])
        terminal = Terminal(*COMMAND, "exec", "-it", box.id, "sh", rows=30, columns=100)
        terminal.expect("#")
        terminal.type("tty; stty size\n")
        terminal.expect("/dev/pts/")
        terminal.expect("30 100")
        terminal.resize(40, 120)
        for _ in range(20):
            terminal.type("stty size\n")
            terminal.expect("\n")
            terminal.expect("#")
            terminal.type("test \"$(stty size)\" = '40 120' && echo re''sized\n")
            try:
                terminal.expect("resized", within=2)
                break
            except AssertionError:
                continue
        else:
            raise AssertionError("the new size never came")
        terminal.type("exit 5\n")
        terminal.expect("exit code 5")
        terminal.process.wait(20)


def test_attach():
    """attach reaches the container's first process both ways."""
    with pod() as it:
        box = it.start(["sh", "-c", "while read line; do echo got $line; done"], stdin=True, stdin_once=False)
        with subprocess.Popen([*COMMAND, "attach", "-i", box.id], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as attached:
            attached.stdin.write("word\n")
            attached.stdin.flush()
            assert attached.stdout.readline() == "got word\n"
            attached.kill()
