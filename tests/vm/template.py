"""The agent in a machine that is saved, and in those restored from it: it comes to rest before anything of a pod, and then serves each."""

import contextlib
import os
import pathlib
import select
import shutil
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
