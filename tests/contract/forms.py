"""Forms of outputs in which runc's and husk's are equal where what they mean is."""

import re

VIRTUAL = ("proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup2", "hugetlbfs")
# Options of a file system that its kernel decides: tmpfs's inode numbers, cgroup2's own switches.
KERNELS = {"inode64", "nsdelegate", "memory_recursiveprot", "memory_hugetlb_accounting", "seclabel"}

# Directories that the table masks: runc's cover is a plain read-only tmpfs, husk's has no room and no rights besides.
HIDDEN = {"/home", "/proc/acpi", "/sys/firmware"}


def _mount(line):
    left, _, right = line.partition(" - ")
    _, _, _, root, point, options, *tags = left.split()
    kind, source, data = right.split(" ", 2)
    tags = " ".join(tag.partition(":")[0] for tag in tags)
    return root, point, options, tags, kind, source, _data(data)


def _data(text):
    # Whether the file system itself is read-only too is nobody's to see: its one mount is.
    return ",".join(option for option in text.split(",") if option not in KERNELS | {"rw", "ro"})


def mountinfo(text):
    """Mounts, sorted, without numbers; of files on a disk (overlay here, virtio-fs there) only that they are."""
    lines = []
    for root, point, options, tags, kind, source, data in map(_mount, text.splitlines()):
        if point == "/proc/kcore":
            continue  # Which a guest's kernel has not.
        if root == "/null":
            lines.append(f"{point} hidden by /dev/null")
        elif kind == "tmpfs" and (not data or "size=0k" in data) and point in HIDDEN:
            lines.append(f"{point} hidden by an empty tmpfs")
        elif kind in VIRTUAL:
            lines.append(" ".join((point, options, tags, root, kind, source, data)))
        else:
            lines.append(" ".join((point, options, "files")))
    return "\n".join(sorted(lines))


def bound(text):
    """Bind mounts: where and how, not of what, nor whose peers they are (which the host knows, not the guest)."""
    return "\n".join(sorted(f"{point} {options}" for _, point, options, *_ in map(_mount, text.splitlines())))


def listing(text):
    """`ls -l` without dates and counts of links, and without /dev/core, a link to what a guest's kernel has not."""
    lines = []
    for line in text.splitlines():
        found = re.match(r"(\S+) +\d+ +(\S+) +(\S+) +(\d+, +\d+|\d+) \S+ +\S+ +\S+ (.*)", line)
        lines.append(" ".join(found.groups()) if found and found[1][0] in "bc" else " ".join((found[1], found[2], found[3], found[5])) if found
                     else line)
    return "\n".join(re.sub(" +", " ", line) for line in lines if not line.startswith("total ") and " core -> " not in line)


def terminal(text):
    """`stty -a` in one line, without onlcr: runc in the foreground clears it for its own terminal's sake, which no shim does."""
    return re.sub(r" -?onlcr\b", "", re.sub(r"\s+", " ", text))


def words(text):
    """Spaces and tabs as one space."""
    return "\n".join(re.sub(r"[ \t]+", " ", line).strip() for line in text.splitlines())


def streams(text):
    """Descriptors: their numbers, and whether each is a pipe or socket (which stands for the other here) or something else."""
    found = re.findall(r"(\d+) -> (\S+)", text)
    return "\n".join(f"{number} {re.sub('^(pipe|socket):.*|.*/fifo/.*', 'stream', target)}" for number, target in sorted(found))
