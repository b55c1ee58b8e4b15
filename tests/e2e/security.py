"""What a pod's security context asks for is what its processes have."""

import pathlib

from harness.command import run
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
