"""A pod's machine starts small and grows when its containers need memory, up to what the pod may have: nothing is killed on the way."""

import os
import re
import tempfile
import time

from harness.command import wait
from harness.crictl import crictl, exit_code, pod
from harness.runner import deadline, full

from . import template
from .resources import exited, limits, setting

# What a program takes in all, in MiB: more than a machine starts with. An emulated one touches 30 MiB a second.
MUCH = full(320, 1536)


def total(box):
    """The machine's memory in MiB, as its kernel counts it."""
    return int(re.search(r"MemTotal: *(\d+) kB", box.exec("cat", "/proc/meminfo"))[1]) >> 10


def take(mebibytes):
    """A command that touches so much memory as fast as it can, in the kernel and at once."""
    return f"dd if=/dev/zero of=/dev/null bs={mebibytes}M count=1 2> /dev/null"


def timed(box, script):
    """Runs a script that must end well; how many seconds it took."""
    begun = time.monotonic()
    done = crictl("exec", "-s", box.id, "sh", "-c", script, check=False)
    assert exit_code(done) == 0, (done, setting(box, "memory.events"), total(box))
    return time.monotonic() - begun


def kills(box):
    """How many of the container's processes the OOM killer has taken."""
    return int(re.search(r"oom_kill (\d+)", setting(box, "memory.events"))[1])


def _grows_on_demand(box):
    """A program that takes more than the machine has, as fast as it can, gets it."""
    assert total(box) <= 256, total(box)
    first, large = timed(box, take(MUCH)), total(box)
    print(f"    {MUCH} MiB are taken in {first:.2f} s; the machine has {large} MiB", flush=True)
    assert MUCH < large <= 2048 and kills(box) == 0, (large, setting(box, "memory.events"))


def test_grows_as_fast_as_memory_is_taken():
    """A pod starts with 256 MiB or less of its 2 GiB; a program that takes more than that as fast as it can gets it."""
    with pod() as it:
        _grows_on_demand(it.start(["sleep", "1000"]))


def test_grows_for_many_at_once():
    """Eight programs that take memory at once all get it."""
    with pod() as it:
        box = it.start(["sleep", "1000"])
        each = f"{take(MUCH // 8)} && echo well"
        said = box.exec("sh", "-c", f"for n in 1 2 3 4 5 6 7 8; do ({each}) & done; wait")
        assert said.split() == ["well"] * 8 and kills(box) == 0, (said, setting(box, "memory.events"))


def test_grows_for_a_tmpfs():
    """A file system in the guest's memory is filled beyond what the machine started with."""
    with pod(linux={"security_context": {"privileged": True}}) as it:
        box = it.start(["sleep", "1000"], linux={"security_context": {"privileged": True}})
        assert exit_code(crictl("exec", "-s", box.id, "sh", "-c", f"mkdir /fill && mount -t tmpfs -o size=2g none /fill && "
                                f"dd if=/dev/zero of=/fill/x bs=8M count={MUCH // 8} 2> /dev/null")) == 0
        assert total(box) > MUCH


def test_limit_of_a_container():
    """A container finds as much memory as its limit names, which is more than the machine started with, and can use it; what takes more than that
    is killed, the other container is not, and the machine has what the pod may have and no more."""
    with pod(linux=limits(memory_limit_in_bytes=384 << 20)) as it:
        other = it.start(["sleep", "1000"], linux=limits(memory_limit_in_bytes=64 << 20))
        assert total(other) <= 256
        box = it.start(["sleep", "1000"], linux=limits(memory_limit_in_bytes=320 << 20))
        assert total(box) > 320
        took = timed(box, take(304))
        print(f"    304 MiB are taken in {took:.2f} s", flush=True)
        assert total(box) <= 384 + 64 and kills(box) == 0
        greedy = it.start(["sh", "-c", f"exec {take(512)}"], linux=limits(memory_limit_in_bytes=128 << 20))
        assert exited(greedy)["reason"] == "OOMKilled"
        assert other.state() == "CONTAINER_RUNNING" and total(other) <= 384 + 64


def test_files_do_not_take_all():
    """A large file that is read makes the machine grow to half of what it may have at most: its pages are dropped for new ones."""
    with tempfile.TemporaryDirectory(dir="/run/husk-test") as folder, pod(linux=limits(memory_limit_in_bytes=960 << 20)) as it:
        with open(f"{folder}/large", "wb") as file:
            os.truncate(file.fileno(), 900 << 20)
        box = it.start(["sleep", "1000"], mounts=[{"host_path": folder, "container_path": "/large"}])
        took = timed(box, "cat /large/large > /dev/null")
        print(f"    900 MiB are read in {took:.2f} s; the machine has {total(box)} MiB", flush=True)
        assert total(box) <= 512, (total(box), setting(box, "memory.current"), setting(box, "memory.stat"))
        timed(box, take(320))
        assert total(box) > 512 and kills(box) == 0


def _follows_resizes(box):
    """Raises the limit of a container in a pod with little memory beyond what the pod could have, tries what is refused, and lowers it."""
    crictl("update", "--memory", 400 << 20, box.id)
    timed(box, take(350))
    assert 350 < total(box) <= 400 + 64 and kills(box) == 0
    said = crictl("update", "--memory", 1 << 40, box.id, check=False)
    assert said.returncode and str(1 << 40) in said.stderr and re.search(r"\d+ MiB is the most", said.stderr), said.stderr
    box.exec("sh", "-c", "dd if=/dev/zero of=/dev/shm/x bs=1M count=48 2> /dev/null")
    said = crictl("update", "--memory", 32 << 20, box.id, check=False)
    assert said.returncode and str(32 << 20) in said.stderr and "in use" in said.stderr, said.stderr
    assert setting(box, "memory.max") == str(400 << 20) and box.exec("echo", "unharmed") == "unharmed"
    crictl("update", "--memory", 200 << 20, box.id)
    wait(lambda: total(box) <= 256 + 8, within=30)
    timed(box, take(128))
    assert kills(box) == 0


def test_resize_in_place():
    """A container's memory limit is raised beyond what the pod could have, and the machine follows; lowered again, the memory goes back. A limit
    for which the machine would be larger than the host, or below what is used, is refused with figures, and the old one stays."""
    with pod(linux=limits(memory_limit_in_bytes=128 << 20)) as it:
        _follows_resizes(it.start(["sleep", "1000"], linux=limits(memory_limit_in_bytes=128 << 20)))


@deadline(240)
def test_grows_from_a_template(containerd):
    """Pods that go on from one template grow as those that booted: one on demand, another as its container's limit is raised and lowered, with the same
    refusals."""
    with template.around():
        template.build(256)
        log = template.Log(containerd)
        with pod() as it:
            _grows_on_demand(it.start(["sleep", "1000"]))
        with pod(linux=limits(memory_limit_in_bytes=256 << 20)) as it:
            _follows_resizes(it.start(["sleep", "1000"], linux=limits(memory_limit_in_bytes=256 << 20)))
        assert log.starts() == ["template"] * 2, log.said()
