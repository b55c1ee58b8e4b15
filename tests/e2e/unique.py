"""What must be one pod's alone is so in pods from one template. A pod shows that it is from one by the kernel command line. What a process draws
that ran before the save (getrandom(2)) is vm.snapshot's, since none but the agent does so in a template."""

import base64
import concurrent.futures
import socket
import struct
import time

from harness.cni import ip, netns, single
from harness.crictl import crictl
from harness.runner import deadline

from .template import MEMORY, around, build, small

ETH_P_IP = 0x800
SO_TIMESTAMPNS = 35
SYN_ACK = 0x12
# From where the host connects.
PORTS = (40001, 40002, 40003)
PRIVILEGED = {"security_context": {"privileged": True}}
# What no two pods may have in common.
SEEN = {
    "/dev/urandom": "head -c 16384 /dev/urandom | base64",
    "/dev/random": "head -c 4096 /dev/random | base64",
    "/dev/hwrng": "head -c 512 /dev/hwrng | base64",
    "boot id": "cat /proc/sys/kernel/random/boot_id",
    "uuid": "cat /proc/sys/kernel/random/uuid",
    "host name": "hostname",
    "MAC": "cat /sys/class/net/eth0/address",
    "stack": "grep -F '[stack]' /proc/self/maps",
    "vdso": "grep -F '[vdso]' /proc/self/maps",
}


def _is_from_template(box):
    return "husk.template" in box.exec("cat", "/proc/cmdline").split()


def _pieces(data, length=8):
    """All its pieces of that length."""
    return {data[at : at + length] for at in range(len(data) - length + 1)}


def _seen(box):
    """What a process in the container sees, by name."""
    script = "\n".join(f"echo '== {what}'; {command}" for what, command in SEEN.items())
    parts = box.exec("sh", "-c", script, timeout=60).split("== ")[1:]
    return {what: told.strip() for what, _, told in (part.partition("\n") for part in parts)}


def _share_nothing(one, other):
    assert set(one) == set(other) == set(SEEN) and all(one.values()) and all(other.values()), (one, other)
    for what in SEEN:
        if what.startswith("/dev/"):
            drawn = [_pieces(base64.b64decode(seen[what])) for seen in (one, other)]
            assert min(map(len, drawn)) > 256 and not drawn[0] & drawn[1], what
        else:
            assert one[what] != other[what], (what, one[what])


def _has_the_time(box):
    """The wall clock is the host's, time goes on from the start, and the kernel finds nothing wrong with any clock."""
    before = time.time()
    told = box.exec("sh", "-c", "date +%s; cut -d' ' -f1 /proc/uptime; grep btime /proc/stat; sleep 2; cut -d' ' -f1 /proc/uptime; date +%s")
    after = time.time()
    first, uptime, (_, booted), later, last = (line.split() if "btime" in line else float(line) for line in told.splitlines())
    assert before - 1.5 <= first <= last <= after + 1.5, (before, first, last, after)
    assert 0 < uptime < 600 and 1.9 < later - uptime < after - before + 0.5, (uptime, later)
    assert abs(first - uptime - float(booted)) < 3, (first, uptime, booted)
    log = box.exec("dmesg")
    assert "crng reseeded due to virtual machine fork" in log, log
    wrong = [line for line in log.splitlines() if any(word in line for word in ("stall", "unstable", "lockup", "blocked for", "skew"))]
    assert not wrong, wrong


def _has_no_machine_id(box):
    """There is no machine id but that of an image: neither the guest's files nor its firmware tell one that two pods could share."""
    said = box.exec("sh", "-c", "cat /etc/machine-id /var/lib/dbus/machine-id /sys/class/dmi/id/product_uuid /sys/hypervisor/uuid 2> /dev/null; echo none")
    assert said == "none", said


def _streams_are_apart(boxes):
    """Eight commands at once in two pods, whose vsock ports are the same: each gets its own input and gives its own output."""
    names = [box.exec("hostname") for box in boxes]

    def ask(number):
        box = boxes[number % 2]
        return crictl("exec", "-i", box.id, "sh", "-c", "read word; sleep 1; echo $word $(hostname)", stdin=f"{number}\n", timeout=100).stdout

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        said = list(pool.map(ask, range(8)))
    assert said == [f"{number} {names[number % 2]}\n" for number in range(8)], said


def _connect(port):
    """Connects to the pod's server from that port, which is free again at once."""
    end = time.monotonic() + 20
    while True:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.bind(("10.77.0.1", port))
            client.settimeout(20)
            try:
                return client.connect(("10.77.0.2", 80))
            except ConnectionRefusedError:
                assert time.monotonic() < end, "the pod's server does not listen"
        time.sleep(0.1)


def _first_numbers(name):
    """Sequence numbers with which a pod answers its first connections, and the host's time in nanoseconds. Ports and addresses are the
    same in each call, so that but for the time only the kernel's secret makes them differ (RFC 6528)."""
    with netns(name) as where, socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_IP)) as wire:
        ip("link", "add", "name", "unique0", "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("addr", "add", "10.77.0.1/24", "dev", "unique0")
        ip("link", "set", "unique0", "up")
        where.ip("addr", "add", "10.77.0.2/24", "dev", "eth0")
        where.ip("link", "set", "eth0", "up")
        wire.bind(("unique0", ETH_P_IP))
        wire.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        wire.settimeout(20)
        with single(name, where.path, "httpd", "-f", "-p", "80", annotations={"io.husk.memory-mib": str(MEMORY)}) as box:
            assert _is_from_template(box)
            for port in PORTS:
                _connect(port)
        numbers = {}
        while len(numbers) < 3:
            packet, ancillary, _, _ = wire.recvmsg(2048, 64)
            if packet[23] != socket.IPPROTO_TCP:
                continue
            # Ethernet's header has 14 bytes, IP's tells its own length.
            _, port, sequence, _, _, flags = struct.unpack_from(">HHIIBB", packet, 14 + (packet[14] & 15) * 4)
            if flags == SYN_ACK:
                seconds, nanoseconds = struct.unpack("qq", ancillary[0][2])
                numbers.setdefault(port, (sequence, seconds * 10**9 + nanoseconds))
        ip("link", "del", "unique0")
    return numbers


def _choose_their_own(one, other):
    assert set(one) == set(other) == set(PORTS), (one, other)
    alike = 0
    for port, (number, at) in one.items():
        # Linux adds a clock of 64 ns to what the secret gives (secure_seq.c).
        passed = (other[port][1] - at) // 64
        off = (other[port][0] - number - passed) % 2**32
        alike += min(off, 2**32 - off) < 10**9 // 64
    assert alike < 3, (one, other)


@deadline(180)
def test_pods_of_a_template_share_nothing():
    """Pods from one template draw no eight random bytes alike; boot id, host name, MAC, processes' memory layout, connections by vsock
    and the secret of TCP's first sequence numbers are each one's own, there is no machine id, and the clocks are right."""
    with around():
        build()
        with small(linux=PRIVILEGED) as one, small(linux=PRIVILEGED) as other:
            boxes = [it.start(["sleep", "1000"], linux=PRIVILEGED) for it in (one, other)]
            assert all(map(_is_from_template, boxes))
            _share_nothing(*map(_seen, boxes))
            _has_no_machine_id(boxes[0])
            _streams_are_apart(boxes)
            _has_the_time(boxes[0])
        _choose_their_own(_first_numbers("unique1"), _first_numbers("unique2"))
