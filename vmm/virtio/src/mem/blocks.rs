//! The account of the region's blocks: which are plugged, and what a driver may ask for. Every figure of a request is checked here.

use std::io;
use std::ops::Range;

use super::BLOCK;
use super::wire::{self, Config, Response, State};

/// The blocks of a region.
pub(super) struct Blocks {
    /// Guest-physical.
    region: Range<u64>,
    /// What the host asks the guest to have plugged, in bytes.
    requested: u64,
    /// Of each block that the driver may use, from the region's start.
    plugged: Vec<bool>,
    /// Number of plugged ones.
    count: u64,
}

impl Blocks {
    /// Nothing is plugged, nothing may be.
    pub(super) fn new(region: Range<u64>) -> Self {
        Self { region, requested: 0, plugged: Vec::new(), count: 0 }
    }

    /// The host wants so much plugged, within the first `usable` bytes of the region. What once was usable stays so.
    pub(super) fn request(&mut self, requested: u64, usable: u64) {
        let usable = usable.min(self.region.end - self.region.start) / BLOCK;
        if usable > self.plugged.len() as u64 {
            // At most one a block of a region that is in this process's address space.
            self.plugged.resize(usable as usize, false);
        }
        self.requested = requested.min(self.usable());
    }

    /// Bytes of the region's beginning that the driver may use.
    pub(super) fn usable(&self) -> u64 {
        self.plugged.len() as u64 * BLOCK
    }

    /// Bytes that are plugged.
    pub(super) fn plugged(&self) -> u64 {
        self.count * BLOCK
    }

    pub(super) fn config(&self) -> Config {
        Config {
            block_size: BLOCK,
            address: self.region.start,
            region_size: self.region.end - self.region.start,
            usable_region_size: self.usable(),
            plugged_size: self.plugged(),
            requested_size: self.requested,
        }
    }

    /// Plugs blocks that all are unplugged, no more than the host asks for.
    pub(super) fn plug(&mut self, range: wire::Range) -> Response {
        let Some(blocks) = self.find(range) else { return Response::Error };
        if self.plugged() + u64::from(range.blocks) * BLOCK > self.requested {
            return Response::Nack;
        }
        if self.state_of(&blocks) != State::Unplugged {
            return Response::Error;
        }
        self.plugged[blocks].fill(true);
        self.count += u64::from(range.blocks);
        Response::Ack
    }

    /// Unplugs blocks that all are plugged. `discard` gives memory (address and bytes) back to the host.
    pub(super) fn unplug(&mut self, range: wire::Range, discard: impl Fn(u64, u64) -> io::Result<()>) -> Response {
        let Some(blocks) = self.find(range).filter(|blocks| self.state_of(blocks) == State::Plugged) else {
            return Response::Error;
        };
        if discard(range.address, u64::from(range.blocks) * BLOCK).is_err() {
            return Response::Busy;
        }
        self.plugged[blocks].fill(false);
        self.count -= u64::from(range.blocks);
        Response::Ack
    }

    /// Unplugs whatever is plugged.
    pub(super) fn unplug_all(&mut self, discard: impl Fn(u64, u64) -> io::Result<()>) -> Response {
        if self.usable() != 0 && discard(self.region.start, self.usable()).is_err() {
            return Response::Busy;
        }
        self.plugged.fill(false);
        self.count = 0;
        Response::Ack
    }

    /// What the blocks are.
    pub(super) fn state(&self, range: wire::Range) -> Response {
        self.find(range).map_or(Response::Error, |blocks| Response::State(self.state_of(&blocks)))
    }

    /// The numbers of the blocks; none unless it is at least one, all of them whole and usable.
    fn find(&self, range: wire::Range) -> Option<Range<usize>> {
        let offset = range.address.checked_sub(self.region.start)?;
        if range.blocks == 0 || !offset.is_multiple_of(BLOCK) {
            return None;
        }
        let first = usize::try_from(offset / BLOCK).ok()?;
        let end = first.checked_add(range.blocks.into())?;
        (end <= self.plugged.len()).then_some(first..end)
    }

    fn state_of(&self, blocks: &Range<usize>) -> State {
        let blocks = &self.plugged[blocks.clone()];
        match blocks.iter().filter(|plugged| **plugged).count() {
            0 => State::Unplugged,
            count if count == blocks.len() => State::Plugged,
            _ => State::Mixed,
        }
    }
}
