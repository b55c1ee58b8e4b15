"""Standard streams: exec, attach and terminals carry every byte, in order, with their ends."""

import fcntl
import hashlib
import os
import pty
import struct
import subprocess
import termios
import threading
import time

from harness.command import run
from harness.crictl import COMMAND, crictl, pod
from harness.runner import deadline, full

from .single import CTR

MIB = 1 << 20


def _chunks(count):
    """A MiB of noise, `count` times, told apart by its number."""
    noise = os.urandom(MIB - 8)
    return (number.to_bytes(8, "big") + noise for number in range(count))


@deadline(full(280, 3000))
def test_64_mib_each_way():
    """exec -i carries 64 MiB (1 GiB with HUSK_TEST_FULL) in and out again unchanged."""
    with pod() as it:
        box = it.start(["sleep", "1000"])
        sent, back = hashlib.sha256(), hashlib.sha256()
        with subprocess.Popen([*COMMAND, "exec", "-i", box.id, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
            def send():
                for chunk in _chunks(full(64, 1024)):
                    sent.update(chunk)
                    client.stdin.write(chunk)
                client.stdin.close()

            sending = threading.Thread(target=send)
            sending.start()
            while chunk := client.stdout.read1(MIB):
                back.update(chunk)
            sending.join()
            assert client.wait() == 0
        assert back.hexdigest() == sent.hexdigest()


def test_end_of_stdin_is_seen():
    """cat ends when its input does, with all of it echoed."""
    with pod() as it:
        box = it.start(["sleep", "1000"])
        assert crictl("exec", "-i", box.id, "cat", stdin="one\ntwo\n").stdout == "one\ntwo\n"


def test_half_closed():
    """The end of its input leaves a process its output; a process that closes its input early ends as it wants."""
    with pod() as it:
        box = it.start(["sleep", "1000"])
        done = crictl("exec", "-i", box.id, "sh", "-c", "wc -c; sleep 1; echo later; sleep 1; echo last", stdin="x" * 100_000)
        assert done.stdout.split() == ["100000", "later", "last"]
        assert crictl("exec", "-i", box.id, "sh", "-c", "exec 0<&-; sleep 1; echo done", stdin="x" * 3_000_000).stdout == "done\n"


def test_stdin_once():
    """The end of the one client's input is that of a container that takes input once."""
    with pod() as it:
        box = it.start(["cat"], stdin=True, stdin_once=True)
        assert crictl("attach", "-i", box.id, stdin="one\ntwo\n").stdout == "one\ntwo\n"
        end = time.monotonic() + 20
        while box.state() != "CONTAINER_EXITED":
            assert time.monotonic() < end
            time.sleep(0.1)
        assert box.status()["exitCode"] == 0


def test_slow_reader():
    """A client that reads nothing stops the process that writes; when it reads again, slowly, nothing is lost, also not what was on its way
    when the process ended."""
    size = 3 * MIB
    with pod() as it:
        box = it.start(["sleep", "1000"])
        script = f"head -c {size} /dev/zero | tr '\\0' x"
        with subprocess.Popen([*CTR, "task", "exec", "--exec-id", "slow", box.id, "sh", "-c", script], stdout=subprocess.PIPE,
                              stdin=subprocess.DEVNULL) as client:
            assert client.stdout.read(1) == b"x"
            time.sleep(3)
            assert len(run(*CTR, "task", "ps", box.id).stdout.splitlines()) > 2, "the writer did not wait for its reader"
            got = client.stdout.read(size - (MIB >> 1))
            # The rest fits the buffers on the way: the process ends now.
            while chunk := client.stdout.read(64 << 10):
                got += chunk
                time.sleep(0.5)
            assert client.wait() == 0
        assert len(got) == size - 1 and set(got) == {ord("x")}, len(got)


@deadline(full(120, 600))
def test_last_words():
    """What a process writes just before its end is never lost: 40 quick execs (100 with HUSK_TEST_FULL), both streams."""
    count, start = full(40, 100), time.monotonic()
    with pod() as it:
        box = it.start(["sleep", "1000"])
        for number in range(count):
            done = crictl("exec", box.id, "sh", "-c", f"head -c 70000 /dev/zero; echo err{number} >&2; echo last{number}")
            assert done.stderr == f"err{number}\n" and done.stdout == "\0" * 70_000 + f"last{number}\n", (number, len(done.stdout), done.stderr)
    print(f"    {count} in {time.monotonic() - start:.0f} s", flush=True)


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


class Attached:
    """crictl attach -i."""

    def __init__(self, box):
        self.process = subprocess.Popen([*COMMAND, "attach", "-i", box.id], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def say(self, line):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def hear(self):
        return self.process.stdout.readline().rstrip("\n")

    def leave(self):
        self.process.kill()
        self.process.communicate()


def test_attach():
    """Two clients are attached to the first process: each hears all and can speak; one that leaves and comes back changes nothing."""
    with pod() as it:
        box = it.start(["sh", "-c", "while read line; do echo got $line; done"], stdin=True, stdin_once=False)
        one, two = Attached(box), Attached(box)
        one.say("a")
        assert one.hear() == "got a"
        # Whether the second was there in time for that is open, so it goes on from its own word.
        two.say("b")
        heard = two.hear()
        assert heard in ("got a", "got b")
        if heard == "got a":
            assert two.hear() == "got b"
        assert one.hear() == "got b"
        one.leave()
        two.say("c")
        assert two.hear() == "got c"
        one = Attached(box)
        one.say("d")
        assert two.hear() == "got d" and one.hear() == "got d"
        for client in (one, two):
            client.leave()
        assert box.state() == "CONTAINER_RUNNING"
