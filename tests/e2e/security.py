"""What a pod's security context asks for is what its processes have."""

import json
import os
import pathlib
import tempfile
import time

from harness.command import run
from harness.containerd import NAMESPACE, SOCKET
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
    """What containerd 2 says of the runtime husk."""
    status = json.loads(crictl("info").stdout)
    found = [handler.get("features", {}) for handler in status.get("runtimeHandlers", []) if handler.get("name") == "husk"]
    if not found:
        raise Skip("this containerd does not ask runtimes for their features")
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
        assert "Operation not permitted" in _failing(box, "mount", "-t", "tmpfs", "none", "/tmp")
        # Another container shares it, and a user of it owns its streams.
        other = it.start(["sh", "-c", "id -u; readlink /proc/self/ns/user; echo err > /dev/stderr; exec sleep 1000"],
                         linux={"security_context": {**MAPPED["security_context"], "run_as_user": {"value": 1000}}})
        end = time.monotonic() + 10
        while len(said := other.logs().split()) < 3 and time.monotonic() < end:
            time.sleep(0.1)
        assert said[0] == "1000" and "err" in said and box.exec("readlink", "/proc/self/ns/user") in said, said
        assert box.exec("sh", "-c", "echo out > /dev/stdout") == "out"


def test_user_namespace_of_single():
    """ctr's --uidmap makes a container whose root is nobody outside, its pipes its own."""
    ctr = ["ctr", "-a", SOCKET, "-n", NAMESPACE, "run", "--rm", "--runtime", "io.containerd.husk.v2"]
    script = "cat /proc/self/uid_map; stat -c %u /bin/busybox; echo to > /dev/stdout"
    done = run(*ctr, "--uidmap", "0:5000:1000", "--gidmap", "0:6000:1000", "husk.test/busybox:1", "mapped1", "sh", "-c", script)
    assert done.stdout.split() == ["0", "5000", "1000", "0", "to"], done.stdout
