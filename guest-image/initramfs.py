#!/usr/bin/env python3
"""Writes the guest's initramfs: the agent as /init, empty mount points, /dev/console. Uncompressed cpio, format "newc".

    initramfs.py AGENT OUT

The format is that of the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. Written here rather than by cpio(1),
so that the bytes depend on the agent alone: no device nodes to make as root, no inode numbers, times or directory order of this machine.
"""

import stat
import sys

# What the agent mounts upon or writes into; a container's files come by virtio-fs or as block devices.
DIRECTORIES = ["dev", "etc", "proc", "run", "sys", "tmp"]
MODES = {"tmp": 0o1777}


def entry(number, name, mode, data=b"", device=(0, 0)):
    """One member: header of 13 hexadecimal fields, name, data, each padded to 4 bytes."""
    links = 2 if stat.S_ISDIR(mode) else 1
    path = name.encode() + b"\0"
    fields = [number, mode, 0, 0, links, 0, len(data), 0, 0, device[0], device[1], len(path), 0]
    header = b"070701" + b"".join(b"%08x" % field for field in fields)
    return padded(header + path) + padded(data)


def padded(data):
    return data + b"\0" * (-len(data) % 4)


def refuse_dynamic(agent, path):
    """Nothing but the agent is in the initramfs, so it must be an ELF file for x86-64 without an interpreter (PT_INTERP)."""
    if agent[:5] != b"\x7fELF\x02" or agent[18:20] != b"\x3e\x00":
        sys.exit(f"initramfs.py: {path} is not an ELF program for x86-64")
    offset = int.from_bytes(agent[32:40], "little")
    size, count = (int.from_bytes(agent[at : at + 2], "little") for at in (54, 56))
    for at in range(offset, offset + size * count, size):
        if agent[at : at + 4] == b"\x03\0\0\0":
            sys.exit(f"initramfs.py: {path} is dynamically linked; the agent must be static")


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: initramfs.py AGENT OUT")
    with open(sys.argv[1], "rb") as file:
        agent = file.read()
    refuse_dynamic(agent, sys.argv[1])
    members = [(name, stat.S_IFDIR | MODES.get(name, 0o755), b"", (0, 0)) for name in DIRECTORIES]
    # The kernel opens /dev/console for init before init can mount devtmpfs.
    members.append(("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1)))
    members.append(("init", stat.S_IFREG | 0o755, agent, (0, 0)))
    members.sort()
    with open(sys.argv[2], "wb") as file:
        for number, (name, mode, data, device) in enumerate(members, 1):
            file.write(entry(number, name, mode, data, device))
        file.write(entry(0, "TRAILER!!!", 0))


if __name__ == "__main__":
    main()
