#!/usr/bin/env python3
"""Tests of nested.py on memory made by hand: `python3 nested_test.py`."""

import struct
import unittest

import nested

HOST_RIP = 0xFFFF_FFFF_C082_A20C
GUEST_RIP = 0xFFFF_FFFF_8101_E1C7
VMCB, SAVE, APIC = 0x3000, 0x5000, 0x7000


def page(**fields):
    """A page with 64 bit values at nested.py's offsets."""
    data = bytearray(nested.PAGE)
    for name, value in fields.items():
        struct.pack_into("<Q", data, getattr(nested, name), value)
    return data


def vmcb(rip, flags=0x202):
    return page(INTERCEPTS=1, IOPM=0x10000, ASID=1, NP_ENABLE=1, EFER=0x1D01, RIP=rip, RFLAGS=flags, CS=0x10)


def save():
    return page(EFER=0x1D01, RIP=HOST_RIP, RAX=VMCB, CS=0x10)


def apic(*in_service):
    data = page()
    struct.pack_into("<I", data, nested.APIC_VERSION, nested.KVM_APIC_VERSIONS[0])
    struct.pack_into("<I", data, nested.APIC_SVR, 0x1FF)
    for vector in in_service:
        data[nested.APIC_ISR + vector // 32 * 16 + vector % 32 // 8] |= 1 << vector % 8
    return data


class Fake:
    """Memory with the given pages."""

    def __init__(self, pages):
        self.data = bytearray(0x10000)
        for address, data in pages.items():
            self.data[address : address + nested.PAGE] = data

    def chunks(self):
        yield 0, bytes(self.data)

    def address(self, offset):
        return offset


def judge(pages):
    found = nested.sample(Fake(pages))
    return found, " ".join(nested.verdicts(found, found))


class Marks(unittest.TestCase):
    def test_a_healthy_guest_shows_no_mark(self):
        found, text = judge({VMCB: vmcb(GUEST_RIP), SAVE: save(), APIC: apic()})
        self.assertEqual([len(found[kind]) for kind in ("vmcbs", "saves", "apics")], [1, 1, 1])
        self.assertIn("mark 1 not seen", text)
        self.assertIn("mark 2 not seen", text)

    def test_an_exit_carried_out_twice_is_mark_1(self):
        self.assertIn("mark 1 seen", judge({VMCB: vmcb(HOST_RIP), SAVE: save()})[1])

    def test_a_vector_in_service_with_interrupts_off_may_be_mark_2(self):
        text = judge({VMCB: vmcb(GUEST_RIP, 0x2), SAVE: save(), APIC: apic(0x24)})[1]
        self.assertIn("mark 2 possible", text)
        self.assertIn("[36]", text)

    def test_a_vector_in_service_with_interrupts_on_is_not(self):
        self.assertIn("mark 2 not seen", judge({VMCB: vmcb(GUEST_RIP), SAVE: save(), APIC: apic(0x24)})[1])

    def test_a_save_area_that_names_no_control_block_is_none(self):
        self.assertIn("can't be decided", judge({VMCB + 0x1000: vmcb(GUEST_RIP), SAVE: save()})[1])

    def test_without_a_nested_guest_nothing_is_decided(self):
        self.assertIn("nothing to decide", judge({})[1])


if __name__ == "__main__":
    unittest.main()
