//! Where things are in BAR 0 and in configuration space. The common configuration's fields are in `function`.

/// Length of BAR 0 in bytes.
pub(super) const BAR_LEN: u64 = 0x8000;
/// Common configuration (virtio 1.2, 4.1.4.3).
pub(super) const COMMON: u64 = 0x0000;
/// Length of the common configuration without the fields of features that are not offered.
pub(super) const COMMON_LEN: u32 = 56;
/// ISR status (virtio 1.2, 4.1.4.5).
pub(super) const ISR: u64 = 0x1000;
/// Device-specific configuration (virtio 1.2, 4.1.4.6).
pub(super) const DEVICE: u64 = 0x2000;
/// Length of the device-specific configuration's window.
pub(super) const DEVICE_LEN: u32 = 0x1000;
/// Notification area (virtio 1.2, 4.1.4.4), one address a queue.
pub(super) const NOTIFY: u64 = 0x3000;
/// Distance of two queues' notification addresses in bytes.
pub(super) const NOTIFY_MULTIPLIER: u32 = 4;
/// MSI-X table (PCI Local Bus 3.0, 6.8.2).
pub(super) const MSIX_TABLE: u64 = 0x4000;
/// MSI-X pending bit array.
pub(super) const MSIX_PBA: u64 = 0x6000;
/// Most queues of a function: its vectors' table must fit between MSIX_TABLE and MSIX_PBA.
pub(super) const MAX_QUEUES: usize = 255;

/// virtio's PCI vendor.
pub(super) const VENDOR: u16 = 0x1af4;
/// Device id of virtio device type 0.
pub(super) const DEVICE_BASE: u16 = 0x1040;

/// Base class, sub-class of a virtio device type, as other machine monitors give them.
pub(super) fn class(device_type: u32) -> (u8, u8) {
    match device_type {
        1 => (0x02, 0x00),      // network: Ethernet
        2 => (0x01, 0x80),      // block: other storage
        3 | 19 => (0x07, 0x80), // console, vsock: other communication
        26 => (0x01, 0x80),     // file system: other storage
        _ => (0xff, 0x00),      // no class fits
    }
}
