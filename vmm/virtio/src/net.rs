//! The network device (virtio 1.2, 5.1): frames between the driver and a tap, checksums and segmentation left to whoever needs them
//! done. Both sides speak the same 12-byte header, which passes through but for the number of buffers.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use event_manager::EventSet;
use husk_backend::stream::Transfer;
use husk_backend::tap::{HEADER_LEN, Offloads, Tap};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::interrupt::Interrupt;
use crate::queue::{QueueError, VirtQueue};
use crate::served::{AttachError, Attached, Model, Served};

const QUEUE_SIZE: u16 = 256;
/// Largest frame with its header: 64 KiB of IP packet behind an Ethernet header with a VLAN tag.
const MAX_FRAME: usize = HEADER_LEN + 18 + 65535;
/// Frames a wake in each direction.
const BUDGET: usize = 64;
/// Where num_buffers is in the header (virtio 1.2, 5.1.6).
const NUM_BUFFERS: usize = 10;
/// Smallest MTU that the device offers (virtio 1.2, 5.1.4.1).
const MIN_MTU: u16 = 68;

/// The network device.
pub struct Net {
    /// None in a machine that becomes a template: nothing comes, and what is sent is lost.
    tap: Option<Tap>,
    /// mac, status, max_virtqueue_pairs, mtu (virtio 1.2, 5.1.4).
    config: [u8; 12],
    mergeable: bool,
    /// A frame read from the tap that the driver has no buffers for yet.
    frame: Box<[u8]>,
    frame_len: usize,
    /// The tap may have a frame: its events are edge-triggered.
    readable: bool,
    dropped: u64,
}

/// What became of a frame for the driver.
enum Delivery {
    Done,
    /// The driver has to add buffers first.
    Waiting,
}

impl Net {
    /// Joins the device with a tap; without one its driver can start it, and that is all.
    pub fn attach(tap: Option<Tap>, mac: [u8; 6], mtu: u16) -> Result<Attached, AttachError> {
        if mtu < MIN_MTU {
            let source = io::Error::new(io::ErrorKind::InvalidInput, format!("an MTU of {mtu} is below {MIN_MTU}"));
            return Err(AttachError { device: <Self as Model>::NAME, source });
        }
        Served::attach(Self::new(tap, mac, mtu))
    }

    fn new(tap: Option<Tap>, mac: [u8; 6], mtu: u16) -> Self {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&mac);
        config[6..8].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..12].copy_from_slice(&mtu.to_le_bytes());
        let frame = vec![0; MAX_FRAME].into_boxed_slice();
        Self { tap, config, mergeable: false, frame, frame_len: 0, readable: true, dropped: 0 }
    }

    /// Frames from the tap to the driver.
    fn receive(&mut self, queue: &mut VirtQueue) -> Result<bool, QueueError> {
        let mut more = true;
        for _ in 0..BUDGET {
            if self.frame_len == 0 && !self.read_frame() {
                more = false;
                break;
            }
            match self.deliver(queue)? {
                Delivery::Done => self.frame_len = 0,
                Delivery::Waiting => {
                    more = false;
                    break;
                }
            }
        }
        queue.notify()?;
        Ok(more)
    }

    fn read_frame(&mut self) -> bool {
        let Some(tap) = self.tap.as_ref().filter(|_| self.readable) else { return false };
        match tap.read(&mut self.frame) {
            Transfer::Bytes(len) if len >= HEADER_LEN => {
                self.frame_len = len;
                true
            }
            _ => {
                self.readable = false;
                false
            }
        }
    }

    /// Copies the frame to one buffer, or to as many as it needs.
    fn deliver(&mut self, queue: &mut VirtQueue) -> Result<Delivery, QueueError> {
        let memory = queue.memory().clone();
        let frame = &mut self.frame[..self.frame_len];
        let mut chains = Vec::new();
        let mut room = 0;
        while room < frame.len() {
            if chains.len() >= usize::from(if self.mergeable { QUEUE_SIZE } else { 1 }) {
                // It fits into no buffers that this driver could give.
                self.dropped += 1;
                break;
            }
            let Some(chain) = queue.pop()? else {
                // At most QUEUE_SIZE.
                queue.unpop(chains.len() as u16);
                return Ok(Delivery::Waiting);
            };
            room += chain.writable().len();
            chains.push(chain);
        }
        if room < frame.len() {
            for chain in &chains {
                queue.push_used(chain, 0)?;
            }
            return Ok(Delivery::Done);
        }
        frame[NUM_BUFFERS..HEADER_LEN].copy_from_slice(&(chains.len() as u16).to_le_bytes());
        let mut rest: &[u8] = frame;
        for chain in &chains {
            let (now, later) = rest.split_at(rest.len().min(chain.writable().len()));
            let written = if chain.writable().write_at(&memory, 0, now).is_ok() { now.len() } else { 0 };
            // At most MAX_FRAME.
            queue.push_used(chain, written as u32)?;
            rest = later;
        }
        // The driver must find all buffers of a frame at once.
        queue.publish()?;
        Ok(Delivery::Done)
    }

    /// Frames from the driver to the tap.
    fn transmit(&mut self, queue: &mut VirtQueue) -> Result<bool, QueueError> {
        let memory = queue.memory().clone();
        let mut more = true;
        for _ in 0..BUDGET {
            let Some(chain) = queue.pop()? else {
                more = false;
                break;
            };
            let readable = chain.readable();
            let sent = match &self.tap {
                Some(tap) if (HEADER_LEN..=MAX_FRAME).contains(&readable.len()) => {
                    readable.slices(&memory, 0, readable.len()).is_ok_and(|slices| tap.write(&slices).is_ok())
                }
                _ => false,
            };
            if !sent {
                self.dropped += 1;
            }
            queue.push_used(&chain, 0)?;
        }
        queue.notify()?;
        Ok(more)
    }
}

impl Model for Net {
    const NAME: &'static str = "net";
    const DEVICE_TYPE: u32 = VIRTIO_ID_NET;

    fn queue_max_sizes(&self) -> Vec<u16> {
        // receiveq1, transmitq1
        vec![QUEUE_SIZE, QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_MRG_RXBUF,
        ]
        .into_iter()
        .fold(0, |features, bit| features | 1 << bit)
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn watched(&self) -> Vec<(RawFd, EventSet)> {
        let tap = self.tap.iter().map(|tap| (tap.as_raw_fd(), EventSet::IN | EventSet::EDGE_TRIGGERED));
        tap.collect()
    }

    fn host_event(&mut self, _events: EventSet) {
        self.readable = true;
    }

    fn start(&mut self, features: u64, _interrupt: &Arc<dyn Interrupt>) -> Result<(), io::Error> {
        let has = |bit: u32| features & (1 << bit) != 0;
        self.mergeable = has(VIRTIO_NET_F_MRG_RXBUF);
        let Some(tap) = &self.tap else { return Ok(()) };
        tap.set_offloads(Offloads {
            checksum: has(VIRTIO_NET_F_GUEST_CSUM),
            tso4: has(VIRTIO_NET_F_GUEST_TSO4),
            tso6: has(VIRTIO_NET_F_GUEST_TSO6),
        })
    }

    fn stop(&mut self) {
        tracing::debug!(dropped = self.dropped, "the driver reset the network device");
        self.frame_len = 0;
        self.readable = true;
    }

    fn is_quiet(&self) -> bool {
        self.tap.is_none()
    }

    fn serve(&mut self, queues: &mut [VirtQueue]) -> Result<bool, QueueError> {
        let [receive, transmit] = queues else { return Ok(false) };
        let transmit_more = self.transmit(transmit)?;
        let receive_more = self.receive(receive)?;
        Ok(transmit_more || receive_more)
    }
}

#[cfg(test)]
#[path = "net_tests.rs"]
mod tests;
