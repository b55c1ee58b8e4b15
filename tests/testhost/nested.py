"""Finds in the memory of an emulated AMD host what tells how its nested guests fare: KVM's control blocks and interrupt controllers.

Three kinds of page are looked for in all of the host's memory, by their shape:
 - host save areas: QEMU's `vmrun` puts the host's state there in the form of a VMCB; its RIP is the instruction behind
   `vmrun`, its RAX the address of the VMCB that was run;
 - VMCBs (AMD64 manual volume 2, appendix B): the nested guest's state at its last exit;
 - local APIC pages of KVM (arch/x86/kvm/lapic.c): the nested guest's vectors in service (ISR) and requested (IRR).
"""

import struct

PAGE = 4096
CHUNK = 16 << 20
# In QEMU's q35 memory up to 2816 MiB lies below 4 GiB whole, else 2 GiB of it (hw/i386/pc_q35.c).
LOW_WHOLE = 0xB000_0000
LOW_SPLIT = 0x8000_0000

EFER_SVME = 1 << 12
EFER_LONG = 1 << 10 | 1 << 8
RFLAGS_IF = 1 << 9
EVENT_VALID = 1 << 31

# Offsets into a VMCB.
INTERCEPTS, IOPM, ASID, INT_CTL, EXIT_CODE, EXIT_INT_INFO, NP_ENABLE, EVENT_INJ = 0x10, 0x40, 0x58, 0x60, 0x70, 0x88, 0x90, 0xA8
CS, EFER, CR3, RFLAGS, RIP, RSP, RAX = 0x410, 0x4D0, 0x550, 0x570, 0x578, 0x5D8, 0x5F8
# Offsets into a local APIC page, and version registers that KVM's has (without and with directed EOI).
APIC_VERSION, APIC_SVR, APIC_ISR, APIC_IRR = 0x30, 0xF0, 0x100, 0x200
KVM_APIC_VERSIONS = (0x0005_0014, 0x0105_0014)


class Memory:
    """The host's memory, read through /proc/PID/mem of its QEMU, where it lies in one piece at base."""

    def __init__(self, pid, base, size):
        self.file = open(f"/proc/{pid}/mem", "rb", buffering=0)
        self.pagemap = open(f"/proc/{pid}/pagemap", "rb", buffering=0)
        self.base = base
        self.size = size
        self.low = size if size < LOW_WHOLE else LOW_SPLIT

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.pagemap.close()

    def address(self, offset):
        """Guest-physical address of an offset into the memory."""
        return offset if offset < self.low else (4 << 30) + offset - self.low

    def chunks(self):
        """(offset, bytes) of each piece of the memory that holds anything."""
        for offset in range(0, self.size, CHUNK):
            length = min(CHUNK, self.size - offset)
            self.pagemap.seek((self.base + offset) // PAGE * 8)
            entries = memoryview(self.pagemap.read(length // PAGE * 8)).cast("Q")
            # Bits 63 and 62 (Documentation/admin-guide/mm/pagemap.rst): present, swapped.
            if any(entry >> 62 for entry in entries.tolist()):
                self.file.seek(self.base + offset)
                yield offset, self.file.read(length)


def u32(page, offset):
    return struct.unpack_from("<I", page, offset)[0]


def u64(page, offset):
    return struct.unpack_from("<Q", page, offset)[0]


def sample(memory):
    """{"saves": [...], "vmcbs": [...], "apics": [...]}, each (physical address, page)."""
    found = {"saves": [], "vmcbs": [], "apics": []}
    for offset, data in memory.chunks():
        efers = memoryview(data).cast("Q")[EFER // 8 :: PAGE // 8].tolist()
        versions = memoryview(data).cast("I")[APIC_VERSION // 4 :: PAGE // 4].tolist()
        for index, (efer, version) in enumerate(zip(efers, versions)):
            if efer < 1 << 16 and efer & EFER_SVME:
                kind = control_kind(data[index * PAGE : (index + 1) * PAGE])
            elif version in KVM_APIC_VERSIONS and is_apic(data[index * PAGE : (index + 1) * PAGE]):
                kind = "apics"
            else:
                continue
            if kind:
                page = data[index * PAGE : (index + 1) * PAGE]
                found[kind].append((memory.address(offset + index * PAGE), page))
    # A host save area's RAX names a VMCB; a page that merely looks like one does not.
    addresses = {address for address, _ in found["vmcbs"]}
    found["saves"] = [(address, page) for address, page in found["saves"] if u64(page, RAX) in addresses]
    return found


def control_kind(page):
    """A VMCB has intercepts and an ASID; a host save area has state only, of a 64 bit kernel."""
    if u32(page, INTERCEPTS) & 1 and u32(page, ASID) and u64(page, IOPM) and u64(page, IOPM) % PAGE == 0:
        return "vmcbs"
    kernel = u64(page, RIP) >> 47 == 0x1FFFF and u64(page, EFER) & EFER_LONG == EFER_LONG and u64(page, RAX) % PAGE == 0
    return "saves" if kernel and not any(page[:INT_CTL]) else None


def is_apic(page):
    """Registers are 32 bits wide, 16 bytes apart; between them is nothing."""
    return u32(page, APIC_SVR) & ~0x13FF == 0 and not any(any(page[at + 4 : at + 16]) for at in range(0, 0x300, 16))


def vectors(page, offset):
    """The interrupt vectors set in one of an APIC's 256 bit registers."""
    return [word * 32 + bit for word in range(8) for bit in range(32) if u32(page, offset + word * 16) >> bit & 1]


def verdicts(first, second):
    """One line for each mark of an emulator's hang (design.md): seen or not, and on what ground."""
    hosts = {u64(page, RIP) for _, page in first["saves"] + second["saves"]}
    if not second["vmcbs"]:
        return ["no nested guest's control block is in the host's memory: nothing to decide about the emulator"]
    if not hosts:
        return ["no host save area found beside the control blocks: mark 1 can't be decided"]
    lines = []
    twice = [address for address, page in second["vmcbs"] if u64(page, RIP) in hosts]
    if twice:
        lines.append(f"mark 1 seen: saved RIP is the host's behind vmrun in VMCB {', '.join(map(hex, twice))}: the emulator's hang")
    else:
        lines.append(f"mark 1 not seen: no saved RIP of {len(second['vmcbs'])} VMCBs is the host's behind vmrun")
    lines.append(second_mark(first, second))
    return lines


def second_mark(first, second):
    """A vector stays in service while a guest's interrupts stay off. The second delivery itself leaves no trace of its own."""
    before = {address: vectors(page, APIC_ISR) for address, page in first["apics"]}
    stuck = [f"APIC {address:#x} vectors {vectors(page, APIC_ISR)}" for address, page in second["apics"]
             if vectors(page, APIC_ISR) and before.get(address) == vectors(page, APIC_ISR)]
    earlier = dict(first["vmcbs"])
    off = [f"VMCB {address:#x} RIP {u64(page, RIP):#x}" for address, page in second["vmcbs"]
           if not u64(page, RFLAGS) & RFLAGS_IF and address in earlier and not u64(earlier[address], RFLAGS) & RFLAGS_IF]
    if stuck and off:
        return (f"mark 2 possible: in service in both samples: {'; '.join(stuck)}; interrupts off in both: {'; '.join(off)}. "
                "A guest of ours that hangs in an interrupt handler looks the same: look at RIP")
    return "mark 2 not seen: no vector in service in both samples beside a guest with interrupts off in both"


def describe(found):
    """One line for each page found."""
    for address, page in found["saves"]:
        yield f"host save area {address:#x}: RIP {u64(page, RIP):#x} RAX (its VMCB) {u64(page, RAX):#x} CR3 {u64(page, CR3):#x}"
    for address, page in found["vmcbs"]:
        injected, interrupted = u64(page, EVENT_INJ), u64(page, EXIT_INT_INFO)
        yield (f"VMCB {address:#x}: ASID {u32(page, ASID)} NPT {u64(page, NP_ENABLE) & 1} RIP {u64(page, RIP):#x} RSP {u64(page, RSP):#x} "
               f"RAX {u64(page, RAX):#x} RFLAGS {u64(page, RFLAGS):#x} CR3 {u64(page, CR3):#x} exit {u64(page, EXIT_CODE):#x} "
               f"int_ctl {u64(page, INT_CTL):#x}" + event(" injecting", injected) + event(" interrupted delivery of", interrupted))
    for address, page in found["apics"]:
        yield f"APIC {address:#x}: in service {vectors(page, APIC_ISR)} requested {vectors(page, APIC_IRR)}"


def event(label, value):
    return f"{label} vector {value & 0xFF} type {value >> 8 & 7}" if value & EVENT_VALID else ""
