"""padding.py VMLINUX: makes zeroes of whole pages of padding in a kernel's code.

The linker fills the gaps around the entry code, which begins and ends with a huge page of its own, with breakpoint instructions: 2 MiB
of each VM's memory, in which nothing ever runs. A page of zeroes takes no memory in a template, and none in what is restored from it.
"""

import struct
import sys

PAGE = 4096
PT_LOAD, EXECUTABLE = 1, 1


def code(image):
    """Offset and length of each loaded segment that can be executed (ELF-64, little-endian)."""
    (table,), (count,) = struct.unpack_from("<Q", image, 32), struct.unpack_from("<H", image, 56)
    for number in range(count):
        kind, flags, offset, _, _, length = struct.unpack_from("<IIQQQQ", image, table + 56 * number)
        if kind == PT_LOAD and flags & EXECUTABLE:
            yield offset, length


def main(path):
    with open(path, "r+b") as file:
        image = file.read()
        for start, length in code(image):
            for offset in range(start, start + length - PAGE + 1, PAGE):
                if image[offset : offset + PAGE] == b"\xcc" * PAGE:
                    file.seek(offset)
                    file.write(bytes(PAGE))


if __name__ == "__main__":
    main(sys.argv[1])
