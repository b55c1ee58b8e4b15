"""The pod's network: what CNI gives is what the guest has, and what reaches a runc pod reaches a husk pod."""

import contextlib
import hashlib
import os
import pathlib
import re
import socket
import subprocess
import threading
import time

from harness import netns
from harness.crictl import COMMAND, crictl, pids, pod
from harness.runner import deadline

SERVERS = """mkdir /a /b /c; echo local > /a/index.html; echo any > /b/index.html; echo six > /c/index.html
httpd -p 127.0.0.1:8080 -h /a; httpd -p 8081 -h /b; httpd -p [::1]:8082 -h /c
nc -ll -p 9000 -e cat & nc -ll -p 9001 -e sha256sum & echo serving; wait"""


def _serving(it):
    """A container with servers on the pod's localhost and on all of its addresses."""
    box = it.start(["sh", "-c", SERVERS])
    end = time.monotonic() + 20
    while crictl("exec", "-s", box.id, "sh", "-c", "netstat -ltn | grep -c -E ':(8080|8081|8082|9000|9001) '", check=False).stdout.strip() != "5":
        assert time.monotonic() < end, box.logs()
    return box


@contextlib.contextmanager
def _forwarded(it, *ports):
    """crictl port-forward of the given ports to free ones here."""
    with subprocess.Popen([*COMMAND, "port-forward", it.id, *(f":{port}" for port in ports)],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            found = {}
            while len(found) < len(ports):
                line = process.stdout.readline()
                assert line, f"crictl port-forward ended with {process.wait()}"
                if told := re.match(r"Forwarding from 127\.0\.0\.1:(\d+) -> (\d+)", line):
                    found[int(told[2])] = int(told[1])
            yield found
        finally:
            process.kill()


def test_port_forward():
    """crictl port-forward reaches servers on the pod's localhost, on all addresses and on ::1 alone; a port without a server ends at once."""
    with pod() as it:
        _serving(it)
        with _forwarded(it, 8080, 8081, 8082, 9) as ports:
            for port, text in ((8080, "local"), (8081, "any"), (8082, "six")):
                assert netns.get(socket.create_connection(("127.0.0.1", ports[port]), timeout=20)) == text
            start = time.monotonic()
            with contextlib.suppress(ConnectionResetError):
                assert netns.ask(socket.create_connection(("127.0.0.1", ports[9]), timeout=20)) == b""
            assert time.monotonic() - start < 3


def test_own_addresses():
    """From within the pod's namespace on the host, its localhost in both families and its address reach the guest; a server sees its
    own localhost as the client; a port without a server is refused soon; a half-closed connection still answers."""
    with pod() as it:
        box = _serving(it)
        path = netns.of(it)
        for address in ("127.0.0.1", "::1", it.address()):
            assert netns.get(netns.connect(path, address, 8081)) == "any", address
            assert netns.ask(netns.connect(path, address, 9000), b"half closed\n") == b"half closed\n", address
        assert netns.get(netns.connect(path, "127.0.0.1", 8080)) == "local"
        assert netns.get(netns.connect(path, "::1", 8082)) == "six"
        with netns.connect(path, "127.0.0.1", 9000) as open_one:
            seen = box.exec("netstat", "-tn")
            assert re.search(r"127\.0\.0\.1:\d+ +(::ffff:)?127\.0\.0\.1:9000 +ESTABLISHED", seen), seen
            for address in ("127.0.0.1", "::1", it.address()):
                start = time.monotonic()
                try:
                    assert netns.ask(netns.connect(path, address, 9), b"anybody?") == b""
                    raise AssertionError("a port without a server took bytes")
                except (ConnectionError, socket.timeout) as refused:
                    assert isinstance(refused, ConnectionError), refused
                assert time.monotonic() - start < 2
            open_one.sendall(b"x")
            assert open_one.recv(1) == b"x"


@deadline(300)
def test_own_address_carries_much():
    """100 MiB each way through the pod's localhost arrive unchanged, while the slow side holds the other back."""
    data = os.urandom(1 << 20) * 100
    want = hashlib.sha256(data).hexdigest()
    with pod() as it:
        _serving(it)
        path = netns.of(it)
        start = time.monotonic()
        assert netns.ask(netns.connect(path, "127.0.0.1", 9001), data).split()[0].decode() == want
        took = time.monotonic() - start
        print(f"    {100 / took:.0f} MiB/s in", flush=True)
        start = time.monotonic()
        with netns.connect(path, "127.0.0.1", 9000, timeout=60) as echo:
            sent = threading.Thread(target=lambda: (echo.sendall(data), echo.shutdown(socket.SHUT_WR)))
            sent.start()
            time.sleep(1)  # nothing is read: what does not fit must wait, not be lost
            digest = hashlib.sha256()
            while piece := echo.recv(1 << 18):
                digest.update(piece)
            sent.join()
        print(f"    {100 / (time.monotonic() - start):.0f} MiB/s there and back", flush=True)
        assert digest.hexdigest() == want
