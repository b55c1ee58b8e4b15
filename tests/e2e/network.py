"""The pod's network: what CNI gives is what the guest has, and what reaches a runc pod reaches a husk pod."""

import contextlib
import hashlib
import os
import pathlib
import re
import select
import signal
import socket
import subprocess
import threading
import time

from harness import cni, netns
from harness.cni import host_local, single
from harness.command import run
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


def test_shim_killed():
    """With a killed shim what it did in the pod's namespace is gone at once: nobody listens there any more."""
    with pod() as it:
        box = _serving(it)
        path = netns.of(it)
        assert netns.get(netns.connect(path, "127.0.0.1", 8080)) == "local"
        found = pids("containerd-shim-husk-v2")
        assert len(found) == 1, found
        whole = os.pidfd_open(found[0])  # readable once its last thread is gone, and its sockets with it
        os.kill(found[0], signal.SIGKILL)
        assert select.select([whole], [], [], 5)[0], "the shim does not end"
        os.close(whole)
        try:
            netns.connect(path, "127.0.0.1", 8080).close()
        except ConnectionRefusedError:
            pass
        else:
            raise AssertionError("something still takes connections")
        while box.state() != "CONTAINER_EXITED":  # containerd 2 removes no pod before it has seen this (deaths.py)
            time.sleep(0.05)


SERVER = ("sh", "-c", "echo pod > /index.html; httpd -f -p 80 -h /")


def _reached(it, box, addresses, gateways, far):
    """The pod is reached from `far` at all of its addresses and reaches the gateways; the guest has the routes, rules and addresses that
    the namespace `it` has on the host."""
    end = time.monotonic() + 20
    while not box.exec("sh", "-c", "netstat -ltn | grep -q ':80 ' && echo up || echo"):
        assert time.monotonic() < end, "no server in the pod"
    for address in addresses:
        assert netns.get(netns.connect(far, address, 80)) == "pod", address
    for gateway in gateways:
        host = f"[{gateway}]" if ":" in gateway else gateway
        assert box.exec("wget", "-qO-", f"http://{host}/") == "outside", gateway
    _as_on_the_host(it, box)


def _as_on_the_host(it, box):
    """The guest's addresses, routes and rules are those of the namespace."""
    script = "ip addr | grep -o 'inet6* [^ ]*' | sort; ip route; ip -6 route; ip rule; ip -6 rule; ip neigh | grep PERM; true"
    here = _settled(it.run("busybox", "sh", "-c", script.replace("ip ", "busybox ip ")))
    there = _settled(box.exec("sh", "-c", script))
    assert here == there, f"on the host:\n{here}\nin the guest:\n{there}"


def _settled(text):
    """Without what differs by nature: IPv6 routes' age, the order of equals."""
    return "\n".join(sorted(re.sub(r" +(error -?\d+|pref medium|hoplimit \d+|expires \S+)", "", line).strip() for line in text.splitlines()))


def test_cni_bridge():
    """CNI's bridge in both families with an MTU of its own: reached from the host and from outside, and reaches the outside; its IPv6
    addresses are usable at once."""
    with cni.outside() as far, cni.netns("onbridge") as it:
        addresses = it.attach("eth0", {"type": "bridge", "bridge": "testbr0", "isGateway": True, "ipMasq": True, "mtu": 1400,
                                       "ipam": host_local("10.88.1.0/24", "fd00:88:1::/64")})
        with single("onbridge", it.path, *SERVER) as box:
            _reached(it, box, addresses, ("192.0.2.2", "2001:db8::2"), "/proc/self/ns/net")
            assert netns.get(netns.connect(far.path, addresses[0], 80)) == "pod"
            link = box.exec("ip", "addr", "show", "dev", "eth0")
            assert "mtu 1400" in link and "tentative" not in link, link
            assert "dummy0" not in box.exec("ip", "link")
            for address in ("127.0.0.1", "::1", *addresses):
                assert netns.get(netns.connect(it.path, address, 80)) == "pod", address
    run("ip", "link", "del", "testbr0")


def test_cni_ptp():
    """CNI's ptp, whose routes are not the kernel's own, in both families."""
    with cni.outside() as far, cni.netns("onptp") as it:
        addresses = it.attach("eth0", {"type": "ptp", "ipMasq": True, "ipam": host_local("10.88.2.0/24", "fd00:88:2::/64")})
        with single("onptp", it.path, *SERVER) as box:
            _reached(it, box, addresses, ("192.0.2.2", "2001:db8::2"), "/proc/self/ns/net")
            assert netns.get(netns.connect(far.path, addresses[0], 80)) == "pod"


def test_cni_macvlan():
    """CNI's macvlan: a neighbour of the host reaches the pod and is reached."""
    with cni.outside() as far, cni.netns("onmacvlan") as it:
        addresses = it.attach("eth0", {"type": "macvlan", "master": "toout", "mode": "bridge",
                                       "ipam": host_local("192.0.2.0/24>192.0.2.100", "2001:db8::/64>2001:db8::100", routes=())})
        with single("onmacvlan", it.path, *SERVER) as box:
            _reached(it, box, addresses, ("192.0.2.2", "2001:db8::2"), far.path)


def test_cni_ipvlan():
    """CNI's ipvlan in its modes l2 and l3: a neighbour of the host reaches the pod and is reached."""
    with cni.outside() as far, cni.netns("onipvlan") as it:
        addresses = it.attach("eth0", {"type": "ipvlan", "master": "toout", "mode": "l2", "ipam": host_local("192.0.2.0/24>192.0.2.100", routes=())})
        with single("onipvlan", it.path, *SERVER) as box:
            _reached(it, box, addresses, ("192.0.2.2",), far.path)
    with cni.outside() as far, cni.netns("onipvlan3") as it:
        addresses = it.attach("eth0", {"type": "ipvlan", "master": "toout", "mode": "l3", "ipam": host_local("10.88.3.0/24", routes=())})
        it.ip("route", "add", "default", "dev", "eth0")
        with single("onipvlan3", it.path, *SERVER) as box:
            _reached(it, box, addresses, ("192.0.2.2",), far.path)


def test_cni_bandwidth():
    """CNI's bandwidth plugin holds for the pod: 16 Mbit/s into it and out of it are not exceeded."""
    with cni.netns("shaped") as it:
        shape = {"type": "bandwidth", "ingressRate": 16_000_000, "ingressBurst": 800_000, "egressRate": 16_000_000, "egressBurst": 800_000}
        address, = it.attach("eth0", {"type": "bridge", "bridge": "testbr1", "isGateway": True, "ipam": host_local("10.88.4.0/24")}, shape)
        with single("shaped", it.path, "sh", "-c", "nc -ll -p 9001 -e sha256sum & nc -ll -p 9002 -e head -c 8000000 /dev/zero") as box:
            end = time.monotonic() + 20
            while box.exec("sh", "-c", "netstat -ltn | grep -c ':900[12] ' || true") != "2":
                assert time.monotonic() < end, "no servers in the pod"
            start = time.monotonic()
            netns.ask(socket.create_connection((address, 9001), timeout=60), bytes(8_000_000))
            into = 64 / (time.monotonic() - start)
            start = time.monotonic()
            assert len(netns.ask(socket.create_connection((address, 9002), timeout=60))) == 8_000_000
            out = 64 / (time.monotonic() - start)
            print(f"    {into:.1f} Mbit/s in, {out:.1f} Mbit/s out", flush=True)
            assert 5 < into < 20 and 5 < out < 20, (into, out)
    run("ip", "link", "del", "testbr1")


def test_host_ports():
    """A port mapping reaches the pod from the host's localhost, from the host's address and from outside."""
    ports = [{"protocol": 0, "container_port": 8081, "host_port": 18081}]
    with cni.outside() as far, pod(port_mappings=ports) as it:
        _serving(it)
        for where, address in (("/proc/self/ns/net", "127.0.0.1"), ("/proc/self/ns/net", "192.0.2.1"), (far.path, "192.0.2.1")):
            assert netns.get(netns.connect(where, address, 18081)) == "any", address


def test_interfaces_by_hand():
    """Several interfaces with names up to 15 bytes, routes of every kind and table, routing rules, static neighbours and link-local
    addresses are in the guest as in the namespace; an interface that is down is not there."""
    with cni.netns("byhand") as it:
        for name, peer in (("eth0", "far0"), ("fifteen-bytes-9", "far1"), ("isdown", "far2")):
            it.ip("link", "add", "name", name, "type", "veth", "peer", "name", peer, "netns", "1")
        try:
            for name in ("far0", "far1"):
                run("ip", "link", "set", name, "up")
            it.ip("link", "set", "eth0", "mtu", "9000", "up")
            it.ip("link", "set", "fifteen-bytes-9", "up")
            for setting in ("eth0.accept_ra=0", "eth0.autoconf=0", "fifteen-bytes-9.accept_ra=2"):
                it.run("sysctl", "-qw", f"net.ipv6.conf.{setting}")
            it.ip("addr", "add", "10.88.5.2/24", "dev", "eth0")
            it.ip("addr", "add", "10.88.5.3/32", "dev", "eth0")
            it.ip("addr", "add", "fd00:88:5::2/64", "dev", "eth0", "nodad")
            it.ip("addr", "add", "fe80::88:2/64", "dev", "fifteen-bytes-9", "nodad")
            it.ip("addr", "add", "10.88.6.2/24", "dev", "fifteen-bytes-9")
            for route in ("default via 169.254.1.1 dev eth0 onlink", "10.88.7.0/24 via 10.88.6.1 metric 77 mtu 1300", "10.99.0.0/16 dev eth0 scope link src 10.88.5.3",
                          "unreachable 10.98.0.0/16", "blackhole 10.97.0.0/16", "default via 10.88.6.1 table 300",
                          "10.88.8.0/24 nexthop via 10.88.5.1 weight 1 nexthop via 10.88.6.1 weight 2"):
                it.ip("route", "add", *route.split())
            for route in ("default via fe80::1 dev eth0", "fd00:99::/32 via fd00:88:5::9 metric 5", "unreachable fd00:98::/32"):
                it.ip("-6", "route", "add", *route.split())
            it.ip("rule", "add", "from", "10.88.6.2", "lookup", "300", "priority", "1000")
            it.ip("-6", "rule", "add", "to", "fd00:97::/32", "lookup", "300", "priority", "1001")
            it.ip("neigh", "add", "169.254.1.1", "lladdr", "02:00:00:00:00:88", "dev", "eth0", "nud", "permanent")
            it.ip("neigh", "add", "fd00:88:5::9", "lladdr", "02:00:00:00:00:89", "dev", "eth0", "nud", "permanent")
            with single("byhand", it.path, "sleep", "1000") as box:
                _as_on_the_host(it, box)
                assert box.exec("ip", "route", "show", "table", "300") == it.run("busybox", "ip", "route", "show", "table", "300")
                settings = [box.exec("cat", f"/proc/sys/net/ipv6/conf/{name}") for name in ("eth0/accept_ra", "eth0/autoconf",
                            "fifteen-bytes-9/accept_ra", "fifteen-bytes-9/autoconf")]
                assert settings == ["0", "0", "2", "1"], settings
                links = box.exec("ip", "link")
                assert "mtu 9000" in links and "fifteen-bytes-9" in links and "isdown" not in links, links
        finally:
            for name in ("far0", "far1", "far2"):
                run("ip", "link", "del", name, check=False)


def _refused(where, *words):
    """A container in the namespace at `where` is refused with all of these words."""
    done = run(*cni.CTR, "run", "--rm", "--runtime", "io.containerd.husk.v2", "--with-ns", f"network:{where}", "husk.test/busybox:1", "refused",
               "true", check=False)
    run(*cni.CTR, "container", "rm", "refused", check=False)
    missing = [word for word in words if word not in done.stderr]
    assert done.returncode and not missing, f"no {missing} in: {done.stderr} {done.stdout}"


def test_refusals():
    """The host's own network namespace, one that is none, another pod's, and one that is too large are refused, and are unharmed."""
    _refused("/proc/1/ns/net", "/proc/1/ns/net is the host's own", "run it with runc")
    _refused("/proc/1/ns/uts", "/proc/1/ns/uts is not a network namespace")
    _refused("/no/such/netns", "/no/such/netns")
    with cni.netns("large") as it:
        batch = "".join(f"link add v{n}a type veth peer name v{n}b\nlink set v{n}a up\nlink set v{n}b up\n" for n in range(50))
        run("ip", "-n", it.name, "-batch", "-", stdin=batch)
        _refused(it.path, "100 network interfaces; 9 are possible")
    with cni.netns("wide") as it:
        batch = "link add v0 type veth peer name v1\nlink set v0 up\n" + "".join(f"addr add 10.0.{n // 200}.{n % 200}/32 dev v0\n" for n in range(300))
        run("ip", "-n", it.name, "-batch", "-", stdin=batch)
        _refused(it.path, "addresses; 256 are possible")
    with pod() as it:
        _refused(netns.of(it), "belongs to another pod")
        assert netns.get(netns.connect("/proc/self/ns/net", _with_server(it), 8081)) == "any"


def _with_server(it):
    _serving(it)
    return it.address()


def test_names():
    """Resolver settings, host name and the hosts file are those that the kubelet gives."""
    dns = {"servers": ["10.96.0.10", "fd00::a"], "searches": ["test.svc.cluster.local", "cluster.local"], "options": ["ndots:5", "edns0"]}
    with pod(hostname="pear", dns_config=dns) as it:
        hosts = pathlib.Path(it.logs) / "hosts"
        hosts.write_text("127.0.0.1 localhost\n10.0.0.9 pear.test pear\n")
        box = it.start(["sleep", "1000"], mounts=[{"host_path": str(hosts), "container_path": "/etc/hosts"}])
        lines = box.exec("cat", "/etc/resolv.conf").splitlines()
        assert [line for line in lines if line] == ["search test.svc.cluster.local cluster.local", "nameserver 10.96.0.10", "nameserver fd00::a",
                                                    "options ndots:5 edns0"], lines
        assert box.exec("hostname") == "pear" and box.exec("cat", "/etc/hostname") == "pear"
        assert "(10.0.0.9)" in box.exec("sh", "-c", "ping -c 1 -w 1 pear.test; true")
