//! The function's configuration space (PCI Local Bus 3.0, 6.1; virtio 1.2, 4.1.4): a fixed image, the mask of bits that the guest
//! may write, and the capability list.

use super::layout;

/// Length of conventional configuration space in bytes.
pub(super) const LEN: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const BAR0: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;

/// Memory space and bus master enables, parity, SERR, INTx disable.
const COMMAND_WRITABLE: u16 = 0x0546;
/// Command: the function answers in its BAR.
const COMMAND_MEMORY: u16 = 0x0002;
/// Status: a capability list is there.
const STATUS_CAPABILITIES: u16 = 0x0010;
/// BAR: memory, 64-bit, non-prefetchable.
const BAR_64_BIT: u64 = 0x4;

/// Capability ids.
const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;
/// MSI-X message control: enable, function mask.
const MSIX_ENABLE: u16 = 0x8000;
const MSIX_MASK: u16 = 0x4000;

/// cfg_type of a virtio capability (virtio 1.2, 4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// The function's configuration space.
pub(super) struct ConfigSpace {
    bytes: [u8; LEN],
    writable: [u8; LEN],
    /// Where the MSI-X capability is.
    msix: usize,
    /// Where the capability is that reaches the BAR through configuration space.
    window: usize,
    end: usize,
    last: Option<usize>,
}

impl ConfigSpace {
    /// `bar_address` is what firmware would have programmed; 0 leaves that to the guest.
    pub(super) fn new(device_type: u32, bar_address: u64, vectors: u16) -> Self {
        let mut space =
            Self { bytes: [0; LEN], writable: [0; LEN], msix: 0, window: 0, end: FIRST_CAPABILITY, last: None };
        // Device types are below 64 (virtio 1.2, section 5).
        let id = layout::DEVICE_BASE + (device_type & 0x3f) as u16;
        space.put(0x00, &layout::VENDOR.to_le_bytes());
        space.put(0x02, &id.to_le_bytes());
        space.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        let (class, subclass) = layout::class(device_type);
        space.put(REVISION, &[1, 0, subclass, class]);
        space.put(BAR0, &(bar_address | BAR_64_BIT).to_le_bytes());
        space.put(SUBSYSTEM_VENDOR, &layout::VENDOR.to_le_bytes());
        space.put(SUBSYSTEM_VENDOR + 2, &id.to_le_bytes());

        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE.to_le_bytes());
        space.writable[BAR0..BAR0 + 8].copy_from_slice(&(!(layout::BAR_LEN - 1)).to_le_bytes());
        space.writable[INTERRUPT_LINE] = 0xff;

        space.virtio_capability(CFG_COMMON, layout::COMMON, layout::COMMON_LEN, &[]);
        space.virtio_capability(CFG_ISR, layout::ISR, 1, &[]);
        space.virtio_capability(CFG_DEVICE, layout::DEVICE, layout::DEVICE_LEN, &[]);
        let notify_len = layout::NOTIFY_MULTIPLIER * u32::from(vectors.saturating_sub(1)).max(1);
        space.virtio_capability(CFG_NOTIFY, layout::NOTIFY, notify_len, &layout::NOTIFY_MULTIPLIER.to_le_bytes());
        space.window = space.virtio_capability(CFG_PCI, 0, 0, &[0; 4]);
        // BAR number, offset, length and data of the window are the driver's.
        for offset in [4, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19] {
            space.writable[space.window + offset] = 0xff;
        }

        let control = vectors.saturating_sub(1) & 0x7ff;
        let mut msix = vec![0; 10];
        msix[..2].copy_from_slice(&control.to_le_bytes());
        msix[2..6].copy_from_slice(&(layout::MSIX_TABLE as u32).to_le_bytes());
        msix[6..].copy_from_slice(&(layout::MSIX_PBA as u32).to_le_bytes());
        space.msix = space.capability(CAP_MSIX, &msix);
        space.writable[space.msix + 2..space.msix + 4].copy_from_slice(&(MSIX_ENABLE | MSIX_MASK).to_le_bytes());
        space
    }

    /// Reads; bytes beyond the end read as zero.
    pub(super) fn read(&self, offset: u16, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(usize::from(offset) + index).copied().unwrap_or(0);
        }
    }

    /// Writes the writable bits.
    pub(super) fn write(&mut self, offset: u16, data: &[u8]) {
        for (index, value) in data.iter().enumerate() {
            let at = usize::from(offset) + index;
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = (*byte & !mask) | (value & mask);
            }
        }
    }

    /// What the guest wrote, for a snapshot: the writable bits of each byte.
    pub(super) fn save(&self) -> Vec<u8> {
        self.bytes.iter().zip(&self.writable).map(|(byte, mask)| byte & mask).collect()
    }

    /// Where BAR 0 is now. None while the guest has memory decoding off, or at no address that a BAR can have.
    pub(super) fn bar(&self) -> Option<u64> {
        let command = u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]]);
        let mut address = [0; 8];
        address.copy_from_slice(&self.bytes[BAR0..BAR0 + 8]);
        let address = u64::from_le_bytes(address) & !(layout::BAR_LEN - 1);
        (command & COMMAND_MEMORY != 0 && address != 0 && address.checked_add(layout::BAR_LEN).is_some())
            .then_some(address)
    }

    /// MSI-X enable and function mask.
    pub(super) fn msix_control(&self) -> (bool, bool) {
        let control = u16::from_le_bytes([self.bytes[self.msix + 2], self.bytes[self.msix + 3]]);
        (control & MSIX_ENABLE != 0, control & MSIX_MASK != 0)
    }

    /// The access that the driver set up in VIRTIO_PCI_CAP_PCI_CFG (virtio 1.2, 4.1.4.9), if `offset` touches its data: BAR offset and
    /// length. None if it is not a legal one.
    pub(super) fn window(&self, offset: u16, len: usize) -> Option<(u64, usize)> {
        let (start, end) = (usize::from(offset), usize::from(offset) + len);
        let data = self.window + 16;
        if end <= data || start >= data + 4 || self.bytes[self.window + 4] != 0 {
            return None;
        }
        let field = |at: usize| {
            let at = self.window + at;
            u32::from_le_bytes([self.bytes[at], self.bytes[at + 1], self.bytes[at + 2], self.bytes[at + 3]])
        };
        let (offset, len) = (field(8), field(12));
        let legal = matches!(len, 1 | 2 | 4) && offset % len == 0 && u64::from(offset) < layout::BAR_LEN;
        legal.then_some((u64::from(offset), len as usize))
    }

    /// The window's data.
    pub(super) fn window_data(&mut self) -> &mut [u8] {
        let data = self.window + 16;
        &mut self.bytes[data..data + 4]
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn virtio_capability(&mut self, cfg_type: u8, offset: u64, len: u32, more: &[u8]) -> usize {
        let mut body = vec![16 + more.len() as u8, cfg_type, 0, 0, 0, 0];
        body.extend_from_slice(&(offset as u32).to_le_bytes());
        body.extend_from_slice(&len.to_le_bytes());
        body.extend_from_slice(more);
        self.capability(CAP_VENDOR, &body)
    }

    /// Appends a capability: `body` is what follows id and next pointer.
    fn capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.end;
        match self.last {
            Some(last) => self.bytes[last + 1] = at as u8,
            None => self.bytes[CAPABILITIES] = at as u8,
        }
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.last = Some(at);
        self.end = (at + 2 + body.len()).next_multiple_of(4);
        at
    }
}
