"""A VM that was saved goes on in another process, as often as one likes; what is damaged is refused in words."""

import contextlib
import pathlib
import tempfile
import time

from .files import husk_fs, share
from .machine import machine

FAILED_PRECONDITION = 9
JAIL = dict(uid=64123, gid=64123)
NET = dict(mac=[2, 0, 0, 0, 0, 1], mtu=1500)


@contextlib.contextmanager
def saved(cmdline="", **shape):
    """The folder of a snapshot whose guest waits for the host, with the shape of a pod: a network and a file system, without back ends."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        with machine("template", cmdline, save=folder, nets=[NET], fs=dict(tag="share", request_queues=1), jail=JAIL, **shape) as vm:
            vm.until("waiting")
            assert vm.call("Save")[0] == FAILED_PRECONDITION
            assert vm.call("Pause")[0] == 0, vm.said()
            start = time.monotonic()
            code, response = vm.call("Save")
            assert code == 0, (response, vm.said())
            print(f"saved in {(time.monotonic() - start) * 1e3:.0f} ms, {(folder / 'state').stat().st_size} bytes of state, "
                  f"{(folder / 'memory').stat().st_blocks * 512 >> 20} MiB of memory", flush=True)
            assert vm.call("Stop")[0] == 0
            assert vm.exit() == 0, vm.said()
        yield folder


@contextlib.contextmanager
def restored(folder, **shape):
    """A VM from the snapshot."""
    with machine("", saved=folder, nets=[NET], jail=JAIL, **shape) as vm:
        yield vm


def ask(vm, command):
    """What the guest answers: a dictionary for each CPU."""
    with vm.dial_guest(1024) as connection:
        connection.sendall(command.encode())
        text = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
    return [dict(word.split("=") for word in line.split()[1:]) for line in text.splitlines()]


def test_goes_on_again_and_again():
    """Restored twice, each with its own shared files: clocks go on from the save, on each CPU, vsock and the file system work."""
    with saved(vcpus=2) as folder:
        for _ in range(2):
            with share() as root, husk_fs(root) as (connection, process):
                (root / "question").write_text("6 x 9")
                start = time.monotonic()
                with restored(folder, vcpus=2, fs_socket=connection) as vm:
                    answers = ask(vm, "files")
                    took = time.monotonic() - start
                    print(f"answered after {took * 1e3:.0f} ms; {vm.status()[1]} us", flush=True)
                    assert len(answers) == 2, vm.said()
                    assert all(0 < float(answer["monotonic"]) < 60 for answer in answers), answers
                    assert (root / "volume/answer").read_text() == "42"
                    again = ask(vm, "again")
                    passed = float(again[0]["monotonic"]) - float(answers[0]["monotonic"])
                    assert 0 < passed < 30, (answers, again)
                    with vm.dial_guest(1024) as connection:
                        connection.sendall(b"off")
                        assert vm.exit() == 0, vm.said()
                assert process.wait(20) == 0


def test_random_numbers_are_each_ones_own():
    """The kernel of each restored VM hears of its new generation, and draws numbers that no other draws, also for a process that ran before."""
    drawn = set()
    with saved(vcpus=2, cmdline="loglevel=6") as folder:
        for _ in range(2):
            with restored(folder, vcpus=2, fs=dict(tag="share", request_queues=1)) as vm:
                vm.until("crng reseeded due to virtual machine fork")
                drawn.update(answer["random"] for answer in ask(vm, "again"))
    assert len(drawn) == 4, drawn


def test_damage_is_told():
    """A damaged state, a memory file of another length, a machine of another shape: the VMM ends with the reason, and the exit code that stands for it."""
    def reason(folder, **shape):
        with restored(folder, **{"fs": dict(tag="share", request_queues=1), **shape}) as vm:
            assert vm.exit() == 5, vm.said()
            return vm.said()

    with saved() as folder:
        assert "2" in reason(folder, vcpus=2)
        assert "fs device" in reason(folder, fs=dict(tag="share", request_queues=3))
        assert "bytes where the machine has" in reason(folder, memory_mib=256)
        good = (folder / "state").read_bytes()
        for at in (0, 20, len(good) // 2):
            (folder / "state").write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1:])
            said = reason(folder)
            assert "damaged" in said or "no snapshot" in said, said
        (folder / "state").write_bytes(good[:100])
        assert "bytes where its header says" in reason(folder)
