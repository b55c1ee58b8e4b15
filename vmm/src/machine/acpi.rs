//! The ACPI tables (ACPI 6.5): hardware-reduced, with what Linux needs to find processors, PCI, power-off and
//! pvpanic, to let PCI devices come and go, and to tell a restored guest that it is one.

use acpi_tables::aml::{self, AddressSpace, AddressSpaceCacheable, EISAName, Memory32Fixed, Name, ResourceTemplate};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{self, AccessSize, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink, fadt};

use super::layout;
use crate::bus::pci::{FIRST_SLOT, SLOTS};
use crate::hw::{hotplug, power};

const OEM: [u8; 6] = *b"HUSK  ";
const OEM_TABLE: [u8; 8] = *b"HUSKVMM ";
const OEM_REVISION: u32 = 1;
/// Length of a table's header, ACPI 6.5, table 5.4.
const HEADER_LEN: u32 = 36;
/// FADT, IAPC_BOOT_ARCH (ACPI 6.5, table 5.10): no VGA (bit 2), no PCIe ASPM (bit 4), no CMOS clock (bit 5); no 8042 either (bit 1).
const BOOT_ARCH: u16 = 1 << 2 | 1 << 4 | 1 << 5;

/// The tables as they lie in memory from [`layout::ACPI_TABLES`] on; the RSDP comes first.
pub(crate) fn tables(vcpus: u8, serial: bool) -> Vec<u8> {
    let mut blob = Blob(vec![0; Rsdp::len()]);
    let dsdt = blob.push(&dsdt(serial));
    let entries = [blob.push(&fadt(dsdt)), blob.push(&madt(vcpus)), blob.push(&mcfg())];
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    for address in entries {
        xsdt.add_entry(address);
    }
    let xsdt = blob.push(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    blob.0[..rsdp.len()].copy_from_slice(&rsdp);
    blob.0
}

struct Blob(Vec<u8>);

impl Blob {
    /// Appends a table and tells its address.
    fn push(&mut self, table: &dyn Aml) -> u64 {
        self.0.resize(self.0.len().next_multiple_of(16), 0);
        let address = layout::ACPI_TABLES + self.0.len() as u64;
        table.to_aml_bytes(&mut self.0);
        address
    }
}

fn port(address: u16) -> GAS {
    GAS::new(gas::AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address.into())
}

fn fadt(dsdt: u64) -> fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .preferred_pm_profile(PmProfile::EnterpriseServer);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(power::SLEEP_STATUS);
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(layout::LAPIC));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    // Its id only has to differ from those of the processors.
    madt.add_structure(IoApic::new(vcpus, layout::IOAPIC, 0));
    madt
}

fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM, 0, 0, 0);
    mcfg
}

fn dsdt(serial: bool) -> Sdt {
    let mut code = Vec::new();
    let zero = aml::ZERO;
    // _S5: the sleep type that the guest writes into the sleep control register to power off.
    Name::new("_S5_".into(), &aml::Package::new(vec![&power::SLEEP_TYPE_S5, &zero, &zero, &zero]))
        .to_aml_bytes(&mut code);
    let mut devices = vec![pci_root(), event_device(), generation_id(), ecam_reservation(), pvpanic()];
    if serial {
        devices.push(serial_port());
    }
    code.extend(aml::Scope::raw("_SB_".into(), devices.concat()));
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_LEN, 2, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&code);
    dsdt
}

fn device(name: &str, hid: &dyn Aml, more: &[&dyn Aml], resources: Vec<&dyn Aml>) -> Vec<u8> {
    let hid = Name::new("_HID".into(), hid);
    let uid = Name::new("_UID".into(), &aml::ZERO);
    let crs = Name::new("_CRS".into(), &ResourceTemplate::new(resources));
    let mut children: Vec<&dyn Aml> = vec![&hid, &uid, &crs];
    children.extend(more);
    let mut bytes = Vec::new();
    aml::Device::new(name.into(), children).to_aml_bytes(&mut bytes);
    bytes
}

fn pci_root() -> Vec<u8> {
    let window_end = layout::PCI_WINDOW + layout::PCI_WINDOW_LEN - 1;
    let config = aml::IO::new(layout::PCI_CONFIG_PORT, layout::PCI_CONFIG_PORT, 1, layout::PCI_CONFIG_PORTS as u8);
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout::PCI_WINDOW as u32,
        window_end as u32,
        None,
    );
    let compatible = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    let segment = Name::new("_SEG".into(), &aml::ZERO);
    let bus = Name::new("_BBN".into(), &aml::ZERO);
    let coherent = Name::new("_CCA".into(), &aml::ONE);
    let (registers, fields) = hotplug_registers();
    let slots: Vec<_> = (0..SLOTS).map(slot).collect();
    let look = look_at_slots();
    let mut children: Vec<&dyn Aml> = vec![&compatible, &segment, &bus, &coherent, &registers, &fields, &look];
    children.extend(slots.iter().map(|slot| slot as &dyn Aml));
    device(
        "PCI0",
        &EISAName::new("PNP0A08"),
        &children,
        vec![&AddressSpace::new_bus_number(0u16, 0u16), &config, &window],
    )
}

/// Bytes that are AML already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn raw(aml: &dyn Aml) -> Raw {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    Raw(bytes)
}

/// The registers of `hw::hotplug`: PHIN (inserted), PHRM (removing), PHEJ (eject).
fn hotplug_registers() -> (Raw, aml::Field) {
    let (port, len) = (layout::HOTPLUG_PORT, hotplug::PORTS);
    let region = raw(&aml::OpRegion::new("PHPR".into(), aml::OpRegionSpace::SystemIO, &port, &len));
    // One after the other, 32 bits each, from hotplug::INSERTED on.
    let fields = vec![
        aml::FieldEntry::Named(*b"PHIN", 32),
        aml::FieldEntry::Named(*b"PHRM", 32),
        aml::FieldEntry::Named(*b"PHEJ", 32),
    ];
    let rule = aml::FieldUpdateRule::WriteAsZeroes;
    (region, aml::Field::new("PHPR".into(), aml::FieldAccessType::DWord, aml::FieldLockRule::NoLock, rule, fields))
}

fn slot_name(slot: u8) -> String {
    format!("SL{slot:02X}")
}

/// A slot: its address on the bus, its number for people, and how the guest lets go of what is in it (ACPI 6.5, section 6.3.3).
fn slot(slot: u8) -> Raw {
    let device = FIRST_SLOT + slot;
    let address = Name::new("_ADR".into(), &(u32::from(device) << 16));
    let number = Name::new("_SUN".into(), &device);
    let (register, bit) = (aml::Path::new("PHEJ"), 1u32 << slot);
    let eject = aml::Store::new(&register, &bit);
    let eject = aml::Method::new("_EJ0".into(), 1, true, vec![&eject]);
    raw(&aml::Device::new(slot_name(slot).as_str().into(), vec![&address, &number, &eject]))
}

/// Method PHOT: tells of each slot what the registers say. 1 is a device check, 3 an eject request (ACPI 6.5, table 5.141).
fn look_at_slots() -> Raw {
    let mut body = Vec::new();
    for (register, local, value) in [("PHIN", 0, 1u8), ("PHRM", 1, 3u8)] {
        let (register, local) = (aml::Path::new(register), aml::Local(local));
        body.push(raw(&aml::Store::new(&local, &register)));
        for slot in 0..SLOTS {
            let (bit, place) = (1u32 << slot, aml::Path::new(&slot_name(slot)));
            // What is stored nowhere: a condition is a number.
            let has = aml::And::new(&aml::ZERO, &local, &bit);
            body.push(raw(&aml::If::new(&has, vec![&aml::Notify::new(&place, &value)])));
        }
    }
    raw(&aml::Method::new("PHOT".into(), 0, true, body.iter().map(|term| term as &dyn Aml).collect()))
}

/// The generic event device (ACPI 6.5, section 5.6.9): one interrupt says that the slots are to be looked at, the other that there is a
/// new generation id.
fn event_device() -> Vec<u8> {
    let (event, generation, device_changed) = (aml::Arg(0), aml::Path::new(GENERATION_DEVICE), 0x80u8);
    let is_generation = aml::Equal::new(&event, &layout::GENERATION_GSI);
    let tell = aml::Notify::new(&generation, &device_changed);
    let look = aml::MethodCall::new("\\_SB_.PCI0.PHOT".into(), vec![]);
    let (tell, look) = (aml::If::new(&is_generation, vec![&tell]), aml::Else::new(vec![&look]));
    let method = aml::Method::new("_EVT".into(), 1, true, vec![&tell, &look]);
    let line = |gsi| aml::Interrupt::new(true, true, false, false, gsi);
    device("GED0", &"ACPI0013", &[&method], vec![&line(layout::GED_GSI), &line(layout::GENERATION_GSI)])
}

/// Where the generation device is.
const GENERATION_DEVICE: &str = "\\_SB_.VGEN";

/// The generation id's device: found by its compatible id, ADDR is the id's address in two halves (Microsoft, "Virtual Machine
/// Generation ID", the host's side).
fn generation_id() -> Vec<u8> {
    let kind = "VM_Gen_Counter";
    let (compatible, description) = (Name::new("_CID".into(), &kind), Name::new("_DDN".into(), &kind));
    let (low, high) = (layout::GENERATION_ID as u32, (layout::GENERATION_ID >> 32) as u32);
    let address = Name::new("ADDR".into(), &aml::Package::new(vec![&low, &high]));
    device("VGEN", &"HUSK0001", &[&compatible, &description, &address], vec![])
}

/// Linux uses the enhanced configuration space only if a motherboard resource claims it (PCI Firmware 3.3, section 4.1.2).
fn ecam_reservation() -> Vec<u8> {
    let ecam = Memory32Fixed::new(true, layout::ECAM as u32, layout::ECAM_LEN as u32);
    device("ECAM", &EISAName::new("PNP0C02"), &[], vec![&ecam])
}

fn pvpanic() -> Vec<u8> {
    device("PVPN", &"QEMU0001", &[], vec![&aml::IO::new(layout::PVPANIC_PORT, layout::PVPANIC_PORT, 1, 1)])
}

fn serial_port() -> Vec<u8> {
    let ports = aml::IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, layout::SERIAL_PORTS as u8);
    device(
        "COM1",
        &EISAName::new("PNP0501"),
        &[],
        vec![&ports, &aml::Interrupt::new(true, true, false, false, layout::SERIAL_GSI)],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(blob: &[u8], at: usize) -> usize {
        u32::from_le_bytes(blob[at..at + 4].try_into().unwrap()) as usize
    }

    fn table(blob: &[u8], address: u64) -> &[u8] {
        let at = (address - layout::ACPI_TABLES) as usize;
        let table = &blob[at..at + u32_at(blob, at + 4)];
        assert_eq!(table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0, "checksum");
        table
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn every_table_is_reached_from_the_rsdp_and_sums_to_zero() {
        let blob = tables(64, true);
        assert!(blob.len() as u64 <= layout::ACPI_TABLES_LEN);
        assert_eq!(&blob[..8], b"RSD PTR ");
        let xsdt = table(&blob, u64_at(&blob, 24));
        let names: Vec<_> = xsdt[36..].chunks(8).map(|entry| table(&blob, u64_at(entry, 0))[..4].to_vec()).collect();
        assert_eq!(names, [b"FACP", b"APIC", b"MCFG"]);
        let fadt = table(&blob, u64_at(xsdt, 36));
        assert_eq!(&table(&blob, u64_at(fadt, 140))[..4], b"DSDT");
    }

    #[test]
    fn madt_has_every_vcpu() {
        let blob = tables(3, false);
        let xsdt = table(&blob, u64_at(&blob, 24));
        let madt = table(&blob, u64_at(xsdt, 44));
        assert_eq!(madt.len(), 44 + 3 * 8 + 12);
    }
}
