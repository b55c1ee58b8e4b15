//! One vsock connection: its two directions, their credit (virtio 1.2, 5.10.6.3), and what it has to tell the guest next.

use std::num::Wrapping;
use std::os::fd::{AsRawFd, RawFd};

use husk_backend::stream::{Stream, Transfer};
use vm_memory::VolatileSlice;

use super::wire::{Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};

/// The host's context id (virtio 1.2, 5.10.4).
pub(super) const HOST_CID: u64 = 2;

/// A connection's name: its two ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
}

impl Key {
    /// A header of a packet to the guest.
    pub(super) fn header(self, guest_cid: u64, op: u16) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.host_port,
            dst_port: self.guest_port,
            socket_type: TYPE_STREAM,
            op,
            ..Header::default()
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// We asked the guest and wait for its answer.
    Connecting,
    Established,
}

/// The guest broke a rule of the protocol; the connection ends.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Violation;

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) key: Key,
    phase: Phase,
    /// The host's side; none once there is nothing more to do with it.
    socket: Option<Stream>,
    /// The guest knows nothing of the connection any more; it exists only until its backlog is written.
    detached: bool,
    /// In the muxer's list of connections that have something to tell.
    pub(super) queued: bool,

    // What to tell the guest next.
    request: bool,
    response: bool,
    reset: bool,
    credit_update: bool,
    credit_requested: bool,
    shutdown_sent: u32,

    // From guest to host.
    guest_sends: bool,
    host_receives: bool,
    writable: bool,
    finished_writing: bool,
    backlog: Backlog,
    buf_alloc: u32,
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    /// `forwarded` as the guest last heard it.
    told: Wrapping<u32>,

    // From host to guest.
    host_sends: bool,
    guest_receives: bool,
    readable: bool,
    sent: Wrapping<u32>,
    peer_buf_alloc: u32,
    peer_forwarded: Wrapping<u32>,
}

impl Connection {
    fn new(key: Key, socket: Stream, buf_alloc: u32, phase: Phase) -> Self {
        Self {
            key,
            phase,
            socket: Some(socket),
            detached: false,
            queued: false,
            request: phase == Phase::Connecting,
            response: phase == Phase::Established,
            reset: false,
            credit_update: false,
            credit_requested: false,
            shutdown_sent: 0,
            guest_sends: true,
            host_receives: true,
            writable: true,
            finished_writing: false,
            backlog: Backlog::default(),
            buf_alloc,
            received: Wrapping(0),
            forwarded: Wrapping(0),
            told: Wrapping(0),
            host_sends: true,
            guest_receives: true,
            readable: false,
            sent: Wrapping(0),
            peer_buf_alloc: 0,
            peer_forwarded: Wrapping(0),
        }
    }

    /// A connection that the guest asked for; the guest is told that it has it.
    pub(super) fn accepted(key: Key, socket: Stream, buf_alloc: u32, request: &Header) -> Self {
        let mut connection = Self::new(key, socket, buf_alloc, Phase::Established);
        connection.learn_credit(request);
        connection
    }

    /// A connection to ask the guest for.
    pub(super) fn requested(key: Key, socket: Stream, buf_alloc: u32) -> Self {
        Self::new(key, socket, buf_alloc, Phase::Connecting)
    }

    /// The socket to watch.
    pub(super) fn socket_fd(&self) -> Option<RawFd> {
        self.socket.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// The guest has not answered our request.
    pub(super) fn is_connecting(&self) -> bool {
        self.phase == Phase::Connecting && !self.detached
    }

    /// The host's side is closed and the guest was told, so that it may use the ports again.
    pub(super) fn is_over_for_host(&self) -> bool {
        self.socket.is_none()
    }

    /// Nothing is left to do, for guest or host.
    pub(super) fn is_dead(&self) -> bool {
        self.detached && self.socket.is_none()
    }

    // What the guest sends.

    /// Every packet tells the sender's credit.
    pub(super) fn learn_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_forwarded = Wrapping(header.fwd_cnt);
        if self.peer_credit() > 0 {
            self.credit_requested = false;
        }
    }

    /// The guest grants our request.
    pub(super) fn granted(&mut self) -> Result<(), Violation> {
        if self.phase != Phase::Connecting || self.request {
            return Err(Violation);
        }
        self.phase = Phase::Established;
        Ok(())
    }

    /// The guest asks for our credit.
    pub(super) fn credit_asked(&mut self) {
        self.credit_update = true;
    }

    /// The guest ends one or both directions.
    pub(super) fn guest_shuts_down(&mut self, flags: u32) -> Result<(), Violation> {
        if self.phase != Phase::Established {
            return Err(Violation);
        }
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_sends = false;
        }
        if flags & SHUTDOWN_RECEIVE != 0 && self.guest_receives {
            self.guest_receives = false;
            if let Some(socket) = &self.socket {
                socket.stop_reading();
            }
        }
        Ok(())
    }

    /// The guest sends data, `len` bytes in `slices`.
    pub(super) fn guest_sent(&mut self, slices: &[VolatileSlice<'_>], len: u32) -> Result<(), Violation> {
        if self.phase != Phase::Established || !self.guest_sends {
            return Err(Violation);
        }
        let held = (self.received - self.forwarded).0;
        if len > self.buf_alloc.saturating_sub(held) {
            return Err(Violation);
        }
        self.received += len;
        if len == 0 {
            return Ok(());
        }
        let mut written = 0;
        if let Some(socket) = &self.socket
            && self.host_receives
            && self.writable
            && self.backlog.is_empty()
        {
            match socket.write(slices) {
                Transfer::Bytes(bytes) => written = bytes,
                Transfer::Blocked => self.writable = false,
                Transfer::Closed => self.host_receives = false,
            }
        }
        if !self.host_receives || self.socket.is_none() {
            // Nobody will ever read it.
            written = len as usize;
        }
        // At most `len`.
        self.forwarded += written as u32;
        self.backlog.append(slices, written);
        self.flush();
        Ok(())
    }

    // What the host's side does.

    /// Events of the socket.
    pub(super) fn host_event(&mut self, readable: bool, writable: bool, hung_up: bool) {
        self.readable |= readable || hung_up;
        self.writable |= writable;
        if hung_up && !self.finished_writing {
            // Both directions are closed and we closed none of them: the peer is gone.
            self.host_receives = false;
        }
        self.flush();
    }

    /// Writes of the backlog what the socket takes.
    fn flush(&mut self) {
        while let Some(socket) = &self.socket
            && self.host_receives
            && self.writable
            && !self.backlog.is_empty()
        {
            match socket.write_bytes(self.backlog.bytes()) {
                Transfer::Bytes(len) => {
                    self.backlog.consume(len);
                    // At most the backlog, which credit keeps below 2^32.
                    self.forwarded += len as u32;
                }
                Transfer::Blocked => self.writable = false,
                Transfer::Closed => self.host_receives = false,
            }
        }
        if !self.host_receives {
            self.forwarded += self.backlog.bytes().len() as u32;
            self.backlog = Backlog::default();
        }
        if (self.forwarded - self.told).0 >= self.buf_alloc / 4 {
            self.credit_update = true;
        }
    }

    /// The guest knows of the connection no more.
    pub(super) fn detach(&mut self) {
        self.detached = true;
        self.guest_sends = false;
        self.guest_receives = false;
        if self.phase == Phase::Connecting
            && let Some(socket) = self.socket.take()
        {
            socket.close();
        }
    }

    /// Draws the consequences of whatever changed: ends directions at the host's side, closes the socket.
    pub(super) fn settle(&mut self) {
        if self.phase == Phase::Connecting {
            return;
        }
        let written = self.backlog.is_empty();
        let guest_is_done = !self.guest_sends && !self.guest_receives && written;
        if guest_is_done && !self.detached {
            // The guest closed its socket and waits for our word (virtio 1.2, 5.10.6.6).
            self.reset = true;
        }
        let Some(socket) = &self.socket else { return };
        if !self.guest_sends && written && !self.finished_writing {
            self.finished_writing = true;
            socket.finish_writing();
        }
        let host_is_done = !self.host_sends && (!self.host_receives || self.finished_writing);
        if (guest_is_done || host_is_done)
            && let Some(socket) = self.socket.take()
        {
            socket.close();
        }
    }

    // What the guest hears.

    fn peer_credit(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub((self.sent - self.peer_forwarded).0)
    }

    fn wants_to_read(&self) -> bool {
        self.readable && self.host_sends && self.guest_receives && self.socket.is_some()
    }

    fn shutdown_flags(&self) -> u32 {
        let send = if self.host_sends { 0 } else { SHUTDOWN_SEND };
        let receive = if self.host_receives { 0 } else { SHUTDOWN_RECEIVE };
        send | receive
    }

    /// There is something to tell the guest, or bytes that may be there.
    pub(super) fn has_work(&self) -> bool {
        if self.detached {
            return false;
        }
        if self.request || self.response || self.reset {
            return true;
        }
        self.phase == Phase::Established
            && (self.credit_update
                || (self.wants_to_read() && (self.peer_credit() > 0 || !self.credit_requested))
                || self.shutdown_flags() & !self.shutdown_sent != 0)
    }

    /// The next packet to the guest, its data already in `payload`, which must hold at least a byte. None if there was nothing.
    pub(super) fn next_packet(&mut self, guest_cid: u64, payload: &[VolatileSlice<'_>]) -> Option<Header> {
        let (op, len, flags) = self.next(payload)?;
        if op != op::RST {
            self.told = self.forwarded;
            self.credit_update = false;
        }
        Some(Header {
            len,
            flags,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.forwarded.0,
            ..self.key.header(guest_cid, op)
        })
    }

    /// Operation, length, flags.
    fn next(&mut self, payload: &[VolatileSlice<'_>]) -> Option<(u16, u32, u32)> {
        if self.detached {
            return None;
        }
        if std::mem::take(&mut self.request) {
            return Some((op::REQUEST, 0, 0));
        }
        if std::mem::take(&mut self.response) {
            return Some((op::RESPONSE, 0, 0));
        }
        if self.reset {
            self.detach();
            return Some((op::RST, 0, 0));
        }
        if self.phase != Phase::Established {
            return None;
        }
        if self.credit_update {
            return Some((op::CREDIT_UPDATE, 0, 0));
        }
        if self.wants_to_read() {
            let credit = self.peer_credit();
            if credit > 0 {
                if let Some(len) = self.read(payload, credit) {
                    return Some((op::RW, len, 0));
                }
            } else if !self.credit_requested {
                self.credit_requested = true;
                return Some((op::CREDIT_REQUEST, 0, 0));
            }
        }
        let flags = self.shutdown_flags();
        if flags & !self.shutdown_sent != 0 {
            self.shutdown_sent = flags;
            return Some((op::SHUTDOWN, 0, flags));
        }
        None
    }

    /// Reads at most `credit` bytes of the socket into the guest's buffer.
    fn read(&mut self, payload: &[VolatileSlice<'_>], credit: u32) -> Option<u32> {
        let slices = limit(payload, credit as usize);
        match self.socket.as_ref()?.read(&slices) {
            Transfer::Bytes(len) => {
                // At most `credit`.
                let len = len as u32;
                self.sent += len;
                return Some(len);
            }
            Transfer::Blocked => self.readable = false,
            Transfer::Closed => {
                self.readable = false;
                self.host_sends = false;
            }
        }
        None
    }
}

/// The first `len` bytes of the slices.
fn limit<'a>(slices: &[VolatileSlice<'a>], mut len: usize) -> Vec<VolatileSlice<'a>> {
    let mut limited = Vec::with_capacity(slices.len());
    for slice in slices {
        let piece = slice.len().min(len);
        if piece == 0 {
            break;
        }
        if let Ok(slice) = slice.subslice(0, piece) {
            limited.push(slice);
        }
        len -= piece;
    }
    limited
}

/// Bytes that the host's socket did not take yet; the guest's credit bounds them.
#[derive(Debug, Default)]
struct Backlog {
    bytes: Vec<u8>,
    start: usize,
}

impl Backlog {
    fn is_empty(&self) -> bool {
        self.start == self.bytes.len()
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// Appends what lies beyond the first `skip` bytes of the slices.
    fn append(&mut self, slices: &[VolatileSlice<'_>], mut skip: usize) {
        if self.start > self.bytes.len() / 2 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        for slice in slices {
            let skipped = skip.min(slice.len());
            skip -= skipped;
            // `skipped` is within the slice.
            let Ok(rest) = slice.offset(skipped) else { continue };
            let end = self.bytes.len();
            self.bytes.resize(end + rest.len(), 0);
            rest.copy_to(&mut self.bytes[end..]);
        }
    }

    fn consume(&mut self, len: usize) {
        self.start += len;
        if self.is_empty() {
            // An idle connection holds no memory.
            *self = Self::default();
        }
    }
}
