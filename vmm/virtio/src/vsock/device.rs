//! The device: takes packets off the transmit queue and puts them on the receive queue; the muxer does the rest.

use std::os::fd::RawFd;

use event_manager::EventSet;
use husk_backend::dial::DialChannel;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::muxer::Muxer;
use super::wire::{HEADER_LEN, Header};
use crate::queue::{QueueError, VirtQueue};
use crate::served::{AttachError, Attached, Model, Served};

const QUEUE_SIZE: u16 = 256;
/// Most bytes of data in a packet (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE of Linux).
const MAX_PAYLOAD: usize = 64 << 10;
/// Packets a wake in each direction.
const BUDGET: usize = 128;

/// The socket device.
pub struct Vsock {
    muxer: Muxer,
    /// guest_cid (virtio 1.2, 5.10.4).
    config: [u8; 8],
}

impl Vsock {
    /// Joins the device with the channel over which connections are handed to and from the shim.
    pub fn attach(dial: DialChannel, guest_cid: u32) -> Result<Attached, AttachError> {
        let guest_cid = u64::from(guest_cid);
        let muxer =
            Muxer::new(dial, guest_cid).map_err(|source| AttachError { device: <Self as Model>::NAME, source })?;
        Served::attach(Self { muxer, config: guest_cid.to_le_bytes() })
    }

    /// Takes the guest's packets.
    fn take(&mut self, queue: &mut VirtQueue) -> Result<bool, QueueError> {
        let memory = queue.memory().clone();
        for _ in 0..BUDGET {
            let Some(chain) = queue.pop()? else {
                queue.notify()?;
                return Ok(false);
            };
            let packet = chain.readable();
            let mut header = [0; HEADER_LEN];
            if packet.read_at(&memory, 0, &mut header).is_ok() {
                let header = Header::decode(&header);
                let len = header.len as usize;
                let whole = len <= MAX_PAYLOAD && len <= packet.len() - HEADER_LEN;
                match packet.slices(&memory, HEADER_LEN, len) {
                    Ok(data) if whole => self.muxer.receive(&header, &data),
                    _ => self.muxer.reject(&header),
                }
            }
            queue.push_used(&chain, 0)?;
        }
        queue.notify()?;
        Ok(true)
    }

    /// Gives the guest its packets.
    fn give(&mut self, queue: &mut VirtQueue) -> Result<bool, QueueError> {
        let memory = queue.memory().clone();
        for _ in 0..BUDGET {
            if !self.muxer.has_packets() {
                queue.notify()?;
                return Ok(false);
            }
            let Some(chain) = queue.pop()? else {
                queue.notify()?;
                return Ok(false);
            };
            let buffer = chain.writable();
            let payload = buffer.slices(&memory, HEADER_LEN, MAX_PAYLOAD).unwrap_or_default();
            if payload.is_empty() {
                // No room for a header and a byte: of no use to anybody.
                queue.push_used(&chain, 0)?;
                continue;
            }
            let Some(header) = self.muxer.next_packet(&payload) else {
                queue.unpop(1);
                continue;
            };
            let written = match buffer.write_at(&memory, 0, &header.encode()) {
                Ok(()) => HEADER_LEN as u32 + header.len,
                Err(_) => 0,
            };
            queue.push_used(&chain, written)?;
        }
        queue.notify()?;
        Ok(true)
    }
}

impl Model for Vsock {
    const NAME: &'static str = "vsock";
    const DEVICE_TYPE: u32 = VIRTIO_ID_VSOCK;

    fn queue_max_sizes(&self) -> Vec<u16> {
        // rx, tx, event
        vec![QUEUE_SIZE, QUEUE_SIZE, 16]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn watched(&self) -> Vec<(RawFd, EventSet)> {
        vec![(self.muxer.event_fd(), EventSet::IN)]
    }

    fn host_event(&mut self, _events: EventSet) {
        self.muxer.poll();
    }

    fn stop(&mut self) {
        self.muxer.reset();
    }

    fn is_quiet(&self) -> bool {
        self.muxer.is_idle()
    }

    fn serve(&mut self, queues: &mut [VirtQueue]) -> Result<bool, QueueError> {
        let [receive, transmit, _event] = queues else { return Ok(false) };
        let take_more = self.take(transmit)?;
        let give_more = self.give(receive)?;
        Ok(take_more || give_more)
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
