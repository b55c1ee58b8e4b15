"""What a pod's security context asks for is what its processes have."""

import json
import os
import pathlib
import re
import tempfile

from harness import netns
from harness.command import run, wait
from harness.containerd import NAMESPACE, SOCKET, needs
from harness.crictl import crictl, pod
from harness.runner import Skip

PROFILE = """
#include <tunables/global>
profile husk-test-no-write flags=(attach_disconnected) {
  file,
  capability,
  network,
  signal,
  deny /** w,
  /dev/* w,
}
profile husk-test-quiet flags=(attach_disconnected) {
  file,
  signal,
  deny /secret r,
}
"""


def _failing(box, *command):
    """A command in a container fails; what it says."""
    done = crictl("exec", "-s", box.id, *command, check=False)
    assert done.returncode, f"{' '.join(command)} succeeded"
    return done.stdout + done.stderr


def _load(text):
    """Loads AppArmor profiles into the host's kernel."""
    if not pathlib.Path("/sys/kernel/security/apparmor").exists():
        raise Skip("the host has no AppArmor")
    run("apparmor_parser", "--replace", "--skip-cache", stdin=text)


def test_users():
    """Users, groups and the image's own groups of a user are what CRI asks for, also of an executed process."""
    def of(box):
        return box.exec("sh", "-c", "id -u; id -g; id -G").split("\n")

    with pod() as it:
        def box(image="busybox", **context):
            return it.start(["sleep", "1000"], image=image, linux={"security_context": context})

        assert of(box()) == ["0", "0", "0"]
        plain = box(run_as_user={"value": 1000}, run_as_group={"value": 3000}, supplemental_groups=[5000])
        uid, gid, groups = of(plain)
        assert (uid, gid) == ("1000", "3000") and {"3000", "2000", "5000"} <= set(groups.split()), groups
        named = box(run_as_username="user", no_new_privs=True, capabilities={"drop_capabilities": ["ALL"]})
        assert of(named)[:2] == ["1000", "1000"]
        status = dict(line.split(":\t") for line in named.exec("cat", "/proc/self/status").splitlines() if ":\t" in line)
        assert status["NoNewPrivs"] == "1" and status["CapBnd"] == status["CapEff"] == "0" * 16, status


def test_privileged():
    """A privileged container has the guest's devices and none of the host's, writes to /proc/sys and /sys, and has every capability."""
    privileged = {"security_context": {"privileged": True}}
    with pod(linux=privileged) as it:
        box = it.start(["sleep", "1000"], linux=privileged)
        found = box.exec("find", "/dev", "(", "-type", "c", "-o", "-type", "b", ")").split()
        assert {"/dev/hvc0", "/dev/kmsg", "/dev/net/tun", "/dev/null"} <= set(found), found
        assert not {"/dev/kvm", "/dev/vhost-net", "/dev/loop0", "/dev/console"} & set(found), found
        box.exec("sh", "-c", "echo 7 > /proc/sys/vm/swappiness; head -c 0 /dev/kmsg; mkdir /sys/fs/cgroup/below; rmdir /sys/fs/cgroup/below")
        assert box.exec("cat", "/proc/sys/vm/swappiness") == "7"
        full = box.exec("sh", "-c", "grep CapEff /proc/self/status; cat /proc/sys/kernel/cap_last_cap").split()
        assert int(full[1], 16) == (2 << int(full[2])) - 1, full
        plain = it.start(["sleep", "1000"])
        assert "hvc0" not in plain.exec("ls", "/dev")


def test_host_processes():
    """With hostPID the containers see the processes of their virtual machine, not the host's."""
    host = {"security_context": {"namespace_options": {"pid": 2}}}
    with pod(linux=host) as it:
        it.start(["sleep", "4321"], linux=host)
        other = it.start(["sleep", "1000"], linux=host)
        seen = other.exec("ps", "-o", "args")
        assert "sleep 4321" in seen and "containerd" not in seen, seen


def test_apparmor():
    """A profile of the host holds in the guest, for a container and for what is executed in it; without one the default holds."""
    _load(PROFILE)
    with pod() as it:
        def box(profile):
            return it.start(["sleep", "1000"], linux={"security_context": {"apparmor_profile": profile}})

        strict = box("localhost/husk-test-no-write")
        assert strict.exec("cat", "/proc/1/attr/current") == "husk-test-no-write (enforce)"
        assert strict.exec("cat", "/proc/self/attr/current") == "husk-test-no-write (enforce)"
        assert "Permission denied" in _failing(strict, "touch", "/tmp/file")
        free = box("unconfined")
        assert free.exec("cat", "/proc/self/attr/current") == "unconfined"
        free.exec("touch", "/file")
        usual = box("runtime/default")
        assert usual.exec("cat", "/proc/self/attr/current") == "cri-containerd.apparmor.d (enforce)"
        # A child profile comes with its parent; a replaced one is the host's newest.
        _load(PROFILE.replace("deny /** w,", ""))
        box("localhost/husk-test-no-write").exec("touch", "/file")
        quiet = box("localhost/husk-test-quiet")
        assert quiet.exec("cat", "/proc/self/attr/current") == "husk-test-quiet (enforce)"


def test_apparmor_unknown():
    """A profile that the host does not have is refused by name, and the pod is unharmed."""
    _load(PROFILE)
    with pod() as it:
        box = it.create(["sleep", "1000"], linux={"security_context": {"apparmor_profile": "localhost/husk-test-quiet"}})
        run("apparmor_parser", "--remove", stdin=PROFILE)
        said = crictl("start", box.id, check=False)
        assert said.returncode and "husk-test-quiet" in said.stderr and "not loaded on this host" in said.stderr, said.stderr
        assert it.start(["sleep", "1000"]).exec("echo", "unharmed") == "unharmed"


IDS = [{"container_id": 0, "host_id": 100000, "length": 65536}]
MAPPED = {"security_context": {"namespace_options": {"pid": 1, "userns_options": {"mode": 0, "uids": IDS, "gids": IDS}}}}


def _handler_features():
    """What containerd 2 says of the runtime husk: older ones don't ask."""
    needs(2)
    status = json.loads(crictl("info").stdout)
    found = [handler.get("features", {}) for handler in status.get("runtimeHandlers", []) if handler.get("name") == "husk"]
    return found[0]


def test_user_namespace():
    """A pod's user namespace: root in it is nobody outside, its files and volumes are mapped, and the network is its own."""
    features = _handler_features()
    assert features.get("user_namespaces") and features.get("recursive_read_only_mounts"), features
    with tempfile.TemporaryDirectory(dir="/var/lib/containerd/husk-test") as folder, pod(
            hostname="mapped", linux={**MAPPED, "sysctls": {"kernel.shm_rmid_forced": "1", "net.ipv4.ip_forward": "1"}}) as it:
        os.chmod(folder, 0o755)
        volume = {"host_path": folder, "container_path": "/data", "uidMappings": IDS, "gidMappings": IDS}
        capable = {"security_context": {**MAPPED["security_context"], "capabilities": {"add_capabilities": ["NET_ADMIN"]}}}
        box = it.start(["sleep", "4321"], linux=capable, mounts=[volume])
        assert box.exec("cat", "/proc/self/uid_map").split() == ["0", "100000", "65536"]
        assert box.exec("cat", "/proc/1/gid_map").split() == ["0", "100000", "65536"]
        assert box.exec("stat", "-c", "%u %g", "/bin/busybox", "/etc/hosts", "/data", "/dev/shm") == "\n".join(["0 0"] * 4)
        box.exec("sh", "-c", "echo mine > /data/file; chown 33:44 /data/file; echo x > /root-file; echo x > /dev/shm/x")
        status = os.stat(f"{folder}/file")
        assert (status.st_uid, status.st_gid) == (33, 44)
        assert box.exec("stat", "-c", "%u %g", "/data/file", "/root-file") == "33 44\n0 0"
        # What belongs to the namespace: names, network, ipc.
        assert box.exec("hostname") == "mapped"
        assert it.address() in box.exec("ip", "-4", "addr", "show", "eth0")
        box.exec("ping", "-c", "1", "-w", "20", "10.123.0.1")
        box.exec("ip", "link", "add", "dummy7", "type", "bridge")
        assert box.exec("cat", "/proc/sys/kernel/shm_rmid_forced", "/proc/sys/net/ipv4/ip_forward") == "1\n1"
        # What does not: the machine.
        for denied in (["mount", "-t", "tmpfs", "none", "/tmp"], ["sh", "-c", "echo 7 > /proc/sys/vm/swappiness"]):
            assert re.search("denied|not permitted|Read-only", said := _failing(box, *denied)), said
        assert box.exec("cat", "/proc/self/attr/current") == "cri-containerd.apparmor.d (enforce)"
        # Who connects from the host's namespace of the pod is passed on into the guest's.
        it.start(["sh", "-c", "echo inside > /index.html; exec httpd -f -p 127.0.0.1:80 -h /"], linux=MAPPED)
        wait(lambda: netns.get(netns.connect(netns.of(it), "127.0.0.1", 80)) == "inside", 15, (OSError, AssertionError))
        # Another container shares it, and a user of it owns its streams.
        other = it.start(["sh", "-c", "id -u; readlink /proc/self/ns/user; echo err > /dev/stderr; exec sleep 1000"],
                         linux={"security_context": {**MAPPED["security_context"], "run_as_user": {"value": 1000}}})
        wait(lambda: "stderr F err" in other.log_file().read_text(), 15, (OSError,))
        assert other.logs().split() == ["1000", box.exec("readlink", "/proc/self/ns/user")]
        assert box.exec("sh", "-c", "echo out > /dev/stdout") == "out"


def test_user_namespace_of_single():
    """ctr's --uidmap makes a container whose root is nobody outside, its pipes its own."""
    ctr = ["ctr", "-a", SOCKET, "-n", NAMESPACE, "run", "--rm", "--runtime", "io.containerd.husk.v2"]
    script = "cat /proc/self/uid_map; stat -c %u /bin/busybox; echo to > /dev/stdout"
    done = run(*ctr, "--uidmap", "0:5000:65536", "--gidmap", "0:6000:65536", "husk.test/busybox:1", "mapped1", "sh", "-c", script)
    assert done.stdout.split() == ["0", "5000", "65536", "0", "to"], done.stdout
