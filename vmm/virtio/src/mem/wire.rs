//! What the driver asks and is told, and the device's configuration (virtio 1.3, 5.15.4 and 5.15.6; Linux,
//! include/uapi/linux/virtio_mem.h).
#![forbid(unsafe_code)]

/// Length of a request in bytes (struct virtio_mem_req).
pub(super) const REQUEST_LEN: usize = 24;
/// Length of a response in bytes (struct virtio_mem_resp).
pub(super) const RESPONSE_LEN: usize = 10;
/// Length of the configuration in bytes (struct virtio_mem_config).
pub(super) const CONFIG_LEN: usize = 56;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Plug(Range),
    Unplug(Range),
    UnplugAll,
    State(Range),
    /// Nothing that this device knows.
    Unknown,
}

/// Blocks, as the driver names them: nothing is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) address: u64,
    pub(super) blocks: u16,
}

impl Request {
    pub(super) fn parse(bytes: &[u8; REQUEST_LEN]) -> Self {
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let mut address = [0; 8];
        address.copy_from_slice(&bytes[8..16]);
        let range = Range { address: u64::from_le_bytes(address), blocks: half(16) };
        match half(0) {
            PLUG => Self::Plug(range),
            UNPLUG => Self::Unplug(range),
            UNPLUG_ALL => Self::UnplugAll,
            STATE => Self::State(range),
            _ => Self::Unknown,
        }
    }
}

/// What the driver is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Response {
    Ack,
    /// More than the host asked for.
    Nack,
    /// Not now.
    Busy,
    Error,
    State(State),
}

/// What blocks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Plugged,
    Unplugged,
    Mixed,
}

impl Response {
    pub(super) fn encode(self) -> [u8; RESPONSE_LEN] {
        let (kind, state) = match self {
            Self::Ack => (0, 0),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
            Self::State(State::Plugged) => (0, 0),
            Self::State(State::Unplugged) => (0, 1),
            Self::State(State::Mixed) => (0, 2),
        };
        let mut bytes = [0; RESPONSE_LEN];
        bytes[0] = kind;
        bytes[8] = state;
        bytes
    }
}

/// The configuration's fields, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Config {
    pub(super) block_size: u64,
    pub(super) address: u64,
    pub(super) region_size: u64,
    pub(super) usable_region_size: u64,
    pub(super) plugged_size: u64,
    pub(super) requested_size: u64,
}

impl Config {
    pub(super) fn encode(&self) -> [u8; CONFIG_LEN] {
        // The second word is the NUMA node, which only VIRTIO_MEM_F_ACPI_PXM makes valid.
        let words = [
            self.block_size,
            0,
            self.address,
            self.region_size,
            self.usable_region_size,
            self.plugged_size,
            self.requested_size,
        ];
        let mut bytes = [0; CONFIG_LEN];
        for (bytes, word) in bytes.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}
