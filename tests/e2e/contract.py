"""The OCI contract: the same spec on runc and on husk, and what the process sees compared (the table is tests/contract)."""

from contract.compare import GROUPS, compare, rows
from harness.runner import deadline


def test_table():
    """The table has at least 120 rows, each with a name of its own."""
    names = [name for group in GROUPS for name in rows(group)]
    twice = sorted({name for name in names if names.count(name) > 1})
    assert not twice, f"rows of one name: {twice}"
    assert len(names) >= 120, len(names)
    print(f"    {len(names)} rows", flush=True)


@deadline(180)
def test_mounts():
    """Mounts of every kind and option, masked and read-only paths, and the root's propagation are what runc makes of the same spec."""
    compare("mounts")


@deadline(180)
def test_process():
    """Users, capabilities, limits, environment, directory, descriptors and signals of a process are as on runc, in an exec too."""
    compare("process")


@deadline(180)
def test_system():
    """Devices, /proc, namespaces, cgroup, names, kernel parameters and terminals are as on runc."""
    compare("system")


@deadline(180)
def test_seccomp():
    """Seccomp profiles do what they do on runc: actions, values, conditions, flags, architectures."""
    compare("seccomp")


@deadline(180)
def test_ends():
    """What runc refuses is refused with the same words, and processes end with the same status."""
    compare("ends")
