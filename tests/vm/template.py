"""The agent in a machine that is saved, and in those restored from it: it comes to rest before anything of a pod, and then serves each."""

import contextlib
import os
import pathlib
import re
import select
import shutil
import struct
import tempfile
import time

from .files import husk_fs, share
from .machine import Vm, kernel
from .ttrpc import Client, field, fields, number, receive

FAILED_PRECONDITION = 9
READY = "husk-agent: template ready"
NONCE = "00112233445566778899aabbccddeeff"
CMDLINE = ("console=hvc0 quiet panic=-1 reboot=t init=/init tsc=reliable no_timer_check random.trust_cpu=on dummy.numdummies=0 "
           f"swiotlb=noforce pci=lastbus=0,noearly rcupdate.rcu_expedited=1 husk.nonce={NONCE} husk.template")
DEVICE_MAC = "02:00:00:00:00:01"
SHAPE = dict(nets=[dict(mac=[2, 0, 0, 0, 0, 1], mtu=65535)], jail=dict(uid=64123, gid=64123))


def initramfs():
    """The one installed with husk-vmm, with the agent in it."""
    return str(pathlib.Path(shutil.which("husk-vmm")).resolve().parent.parent / "share/husk/initramfs")


@contextlib.contextmanager
def running(*arguments, **more):
    """A VM that leaves nothing behind; what it said is shown if the test fails."""
    vm = Vm(*arguments, **SHAPE, **more)
    try:
        yield vm
    except BaseException:
        print(vm.said(), flush=True)
        raise
    finally:
        vm.kill()


@contextlib.contextmanager
def template(**shape):
    """The folder of a template."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        with running(kernel(), initramfs(), CMDLINE, save=folder, fs=dict(tag="share", request_queues=1), **shape) as vm:
            vm.until(READY)
            took = time.monotonic() - vm.start
            assert not select.select([vm.dial], [], [], 0)[0], "the agent of a template dialled"
            assert vm.call("Pause")[0] == 0
            code, response = vm.call("Save")
            assert code == 0, response
            assert vm.call("Stop")[0] == 0
            assert vm.exit() == 0
        print(f"ready after {took * 1e3:.0f} ms, {filled(folder) >> 10} KiB of memory kept", flush=True)
        yield folder


def filled(folder):
    """Bytes of a template's memory that are not zero, as the file keeps them."""
    return (folder / "memory").stat().st_blocks * 512


def code(folder):
    """A file with the whole huge pages of the kernel's section .text as the template has them, and their address."""
    elf, huge = pathlib.Path(kernel()).read_bytes(), 2 << 20
    (at,), (number, names) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<HH", elf, 60)
    sections = [struct.unpack_from("<IIQQQQ", elf, at + 64 * index) for index in range(number)]
    named = {elf[sections[names][4] + section[0]:].split(b"\0", 1)[0]: section for section in sections}
    _, _, _, virtual, _, length = named[b".text"]
    # The kernel's own map of its code (Documentation/arch/x86/x86_64/mm.rst).
    start = virtual - 0xFFFF_FFFF_8000_0000
    start, end = -(-start // huge) * huge, (start + length) // huge * huge
    with open(folder / "memory", "rb") as memory:
        memory.seek(start)
        (folder / "code").write_bytes(memory.read(end - start))
    return folder / "code", start


def own(vm, path):
    """KiB of the mapping of `path` that the VMM has for itself, and all that it has."""
    _, _, rest = pathlib.Path(f"/proc/{vm.process.pid}/smaps").read_text().partition(str(path))
    kib = {name: int(value) for name, value in re.findall(r"^(\w+): +(\d+) kB$", rest.partition("VmFlags")[0], re.M)}
    return kib["Private_Dirty"], kib["Rss"]


@contextlib.contextmanager
def restored(folder, **shape):
    """A VM from the template, its agent's client, and the milliseconds from the VMM's start to the agent's hello."""
    with share() as root, husk_fs(root) as (connection, _):
        with running(None, None, "", saved=folder, fs_socket=connection, **shape) as vm, vm.dial_guest(1024) as agent:
            hello = receive(agent, 24)
            took = (time.monotonic() - vm.start) * 1e3
            assert hello == b"HUSK\1\0\0\0" + bytes.fromhex(NONCE), hello
            yield vm, Client(agent, "husk.agent.v1.Agent"), took


def start_pod(agent, mac, name):
    """StartPod of a pod with one interface and shared files."""
    interface = field(1, mac.encode()) + field(2, name.encode()) + number(4, 1400) + number(5, 7) + field(8, DEVICE_MAC.encode())
    request = field(1, b"pod") + number(2, time.time_ns()) + field(3, os.urandom(64)) + field(4, b"share") + field(5, interface)
    return agent.call("StartPod", request)


def test_serves_a_pod_from_a_template():
    """A template keeps little memory; twice restored, its agent answers and starts a pod with an interface of another address."""
    with template(vcpus=2) as folder:
        assert filled(folder) < 48 << 20
        for mac in ("0a:58:0a:00:00:02", "0a:58:0a:00:00:03"):
            with restored(folder, vcpus=2) as (vm, agent, took):
                print(f"hello after {took:.1f} ms; {vm.status()[1]} us", flush=True)
                code, response = start_pod(agent, mac, "net7")
                assert code == 0, response
                assert start_pod(agent, mac, "net7")[0] == FAILED_PRECONDITION
                code, response = agent.call("StatsPod")
                assert code == 0, response
                names = [dict(fields(network))[1] for number, network in fields(response) if number == 1]
                assert names == [b"net7"], names
                # The listener is gone, and the shim's connection was the pod's life.
                with vm.dial_guest(1024) as again:
                    assert again.recv(1) == b""
                agent.socket.close()
                assert vm.exit() == 0, vm.said()


def test_kernels_code_is_shared():
    """Two machines from a template have one copy of their kernel's code, and each starts a pod."""
    with template() as folder, contextlib.ExitStack() as stack:
        shared = code(folder)
        vms = []
        for mac in ("0a:58:0a:00:00:02", "0a:58:0a:00:00:03"):
            vm, agent, took = stack.enter_context(restored(folder, code=shared))
            print(f"hello after {took:.1f} ms; {vm.status()[1]} us", flush=True)
            assert start_pod(agent, mac, "net7")[0] == 0, vm.said()
            vms.append(vm)
        for vm in vms:
            dirty, there = own(vm, shared[0])
            assert dirty <= 512 and there >= 1024, (dirty, there)
        assert shared[0].read_bytes() == (folder / "memory").read_bytes()[shared[1]:][:shared[0].stat().st_size]
