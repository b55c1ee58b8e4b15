//! Joins the guest's vsock connections with host sockets. Packets come from and go to the device; sockets come and go by the dial
//! channel. The guest is hostile: connections, queued refusals, buffered bytes and work at a time are all bounded.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use husk_backend::dial::{DialChannel, Received};
use husk_backend::stream::Stream;
use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::connection::{Connection, HOST_CID, Key, Violation};
use super::wire::{Header, TYPE_STREAM, op};

/// Most connections at a time, those included that only wait for their last bytes to be written.
pub(super) const MAX_CONNECTIONS: usize = 1023;
/// Most refusals waiting for a buffer of the guest; a driver that lets more come up gets no answer to some.
const MAX_REFUSALS: usize = 256;
/// Our receive buffer of a connection while there are few, and when there are many.
const BUF_ALLOC: u32 = 256 << 10;
const BUF_ALLOC_CROWDED: u32 = 64 << 10;
const CROWDED: usize = 32;
/// How long the guest may take to answer a request.
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);
/// First port that host-initiated connections come from.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// Events and dials handled at a time.
pub(super) const EVENTS: usize = 64;
const DIALS: usize = 16;

/// What an event of the muxer's epoll is about; connections have numbers from FIRST_TOKEN on.
const DIAL_TOKEN: u64 = 0;
const TIMER_TOKEN: u64 = 1;
const FIRST_TOKEN: u64 = 2;

/// The muxer.
pub(super) struct Muxer {
    guest_cid: u64,
    dial: Option<DialChannel>,
    epoll: Epoll,
    timer: TimerFd,
    connections: HashMap<u64, Connection>,
    by_key: HashMap<Key, u64>,
    /// Connections with something to tell the guest, each at most once, served in turn.
    ready: VecDeque<u64>,
    /// Resets for connections that do not exist.
    refusals: VecDeque<Key>,
    /// When requests to the guest expire; in order, as all have the same time.
    deadlines: VecDeque<(Instant, u64)>,
    next_token: u64,
    next_port: u32,
}

impl Muxer {
    pub(super) fn new(dial: DialChannel, guest_cid: u64) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let timer = TimerFd::new().map_err(io::Error::from)?;
        epoll.ctl(ControlOperation::Add, dial.as_raw_fd(), EpollEvent::new(EventSet::IN, DIAL_TOKEN))?;
        epoll.ctl(ControlOperation::Add, timer.as_raw_fd(), EpollEvent::new(EventSet::IN, TIMER_TOKEN))?;
        Ok(Self {
            guest_cid,
            dial: Some(dial),
            epoll,
            timer,
            connections: HashMap::new(),
            by_key: HashMap::new(),
            ready: VecDeque::new(),
            refusals: VecDeque::new(),
            deadlines: VecDeque::new(),
            next_token: FIRST_TOKEN,
            next_port: FIRST_HOST_PORT,
        })
    }

    /// Readable while there are events for [`Self::poll`].
    pub(super) fn event_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// No connection is there, and nothing is to be told to the guest.
    pub(super) fn is_idle(&self) -> bool {
        self.connections.is_empty() && self.refusals.is_empty()
    }

    /// Handles host-side events, as many as one round takes.
    pub(super) fn poll(&mut self) {
        let mut events = [EpollEvent::default(); EVENTS];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) => {
                if error.kind() != io::ErrorKind::Interrupted {
                    tracing::error!(%error, "could not wait for vsock events");
                }
                return;
            }
        };
        for event in &events[..count] {
            match event.data() {
                DIAL_TOKEN => self.take_dials(),
                TIMER_TOKEN => self.expire(Instant::now()),
                token => {
                    let Some(connection) = self.connections.get_mut(&token) else { continue };
                    let set = event.event_set();
                    connection.host_event(
                        set.intersects(EventSet::IN | EventSet::READ_HANG_UP),
                        set.contains(EventSet::OUT),
                        set.intersects(EventSet::HANG_UP | EventSet::ERROR),
                    );
                    self.settle(token);
                }
            }
        }
    }

    /// A packet from the guest; `data` holds the `header.len` bytes behind the header.
    pub(super) fn receive(&mut self, header: &Header, data: &[VolatileSlice<'_>]) {
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return;
        }
        let key = Key { host_port: header.dst_port, guest_port: header.src_port };
        let Some(&token) = self.by_key.get(&key) else {
            match header.op {
                op::REQUEST if header.socket_type == TYPE_STREAM => self.accept(key, header),
                op::RST => {}
                _ => self.refuse(key),
            }
            return;
        };
        let Some(connection) = self.connections.get_mut(&token) else { return };
        if header.socket_type != TYPE_STREAM {
            self.abort(token);
            return;
        }
        connection.learn_credit(header);
        let result = match header.op {
            op::RESPONSE => connection.granted(),
            op::RW => connection.guest_sent(data, header.len),
            op::SHUTDOWN => connection.guest_shuts_down(header.flags),
            op::CREDIT_UPDATE => Ok(()),
            op::CREDIT_REQUEST => {
                connection.credit_asked();
                Ok(())
            }
            op::RST => {
                self.detach(token);
                return;
            }
            op::REQUEST if connection.is_over_for_host() => {
                // The guest uses a port again whose last connection it has forgotten.
                self.detach(token);
                self.accept(key, header);
                return;
            }
            _ => Err(Violation),
        };
        match result {
            Ok(()) => self.settle(token),
            Err(Violation) => self.abort(token),
        }
    }

    /// A packet from the guest that can't be read as its header says.
    pub(super) fn reject(&mut self, header: &Header) {
        let key = Key { host_port: header.dst_port, guest_port: header.src_port };
        match self.by_key.get(&key) {
            Some(token) => self.abort(*token),
            None => self.refuse(key),
        }
    }

    /// There may be a packet for the guest.
    pub(super) fn has_packets(&self) -> bool {
        !self.refusals.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest: its header, its data already in `payload`, which must hold at least a byte.
    pub(super) fn next_packet(&mut self, payload: &[VolatileSlice<'_>]) -> Option<Header> {
        if let Some(key) = self.refusals.pop_front() {
            return Some(key.header(self.guest_cid, op::RST));
        }
        while let Some(token) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&token) else { continue };
            connection.queued = false;
            let key = connection.key;
            let packet = connection.next_packet(self.guest_cid, payload);
            if packet.is_some_and(|packet| packet.op == op::RST) {
                self.by_key.remove(&key);
            }
            self.settle(token);
            if packet.is_some() {
                return packet;
            }
        }
        None
    }

    /// The driver reset the device: the guest knows no connection any more. What it sent is still written to the host's sockets.
    pub(super) fn reset(&mut self) {
        self.refusals.clear();
        let tokens: Vec<u64> = self.by_key.values().copied().collect();
        tokens.into_iter().for_each(|token| self.detach(token));
        self.ready.clear();
    }

    /// Number of connections.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.connections.len()
    }

    fn refuse(&mut self, key: Key) {
        if self.refusals.len() < MAX_REFUSALS {
            self.refusals.push_back(key);
        }
    }

    fn buf_alloc(&self) -> u32 {
        if self.connections.len() < CROWDED { BUF_ALLOC } else { BUF_ALLOC_CROWDED }
    }

    /// The guest asks for a connection.
    fn accept(&mut self, key: Key, request: &Header) {
        match self.hand_over(key, request) {
            Ok(()) => {}
            Err(error) => {
                tracing::debug!(port = key.host_port, %error, "refused a connection of the guest");
                self.refuse(key);
            }
        }
    }

    fn hand_over(&mut self, key: Key, request: &Header) -> io::Result<()> {
        if self.connections.len() >= MAX_CONNECTIONS {
            return Err(io::Error::other("too many connections"));
        }
        let Some(dial) = &self.dial else { return Err(io::Error::other("the dial channel is closed")) };
        let (socket, end) = Stream::pair()?;
        dial.guest_dialled(key.host_port, end)?;
        self.insert(Connection::accepted(key, socket, self.buf_alloc(), request))?;
        Ok(())
    }

    /// The shim asks for connections.
    fn take_dials(&mut self) {
        for _ in 0..DIALS {
            let Some(dial) = &self.dial else { return };
            match dial.receive() {
                Received::Dial { port, stream } => self.dial_guest(port, stream),
                Received::Malformed => tracing::warn!("dropped a malformed message on the dial channel"),
                Received::Empty => return,
                Received::Closed => {
                    let _ = self.epoll.ctl(ControlOperation::Delete, dial.as_raw_fd(), EpollEvent::default());
                    self.dial = None;
                    return;
                }
            }
        }
    }

    fn dial_guest(&mut self, guest_port: u32, socket: Stream) {
        if self.connections.len() >= MAX_CONNECTIONS {
            socket.close();
            return;
        }
        // Fewer connections than ports: a free one comes within MAX_CONNECTIONS steps.
        let key = loop {
            let key = Key { host_port: self.next_port, guest_port };
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_HOST_PORT).max(FIRST_HOST_PORT);
            if !self.by_key.contains_key(&key) {
                break key;
            }
        };
        let connection = Connection::requested(key, socket, self.buf_alloc());
        match self.insert(connection) {
            Ok(token) => {
                let deadline = Instant::now() + CONNECT_DEADLINE;
                self.deadlines.push_back((deadline, token));
                if self.deadlines.len() == 1 {
                    self.arm();
                }
            }
            Err(error) => tracing::warn!(%error, "could not watch a connection"),
        }
    }

    fn insert(&mut self, connection: Connection) -> io::Result<u64> {
        let token = self.next_token;
        self.next_token += 1;
        if let Some(fd) = connection.socket_fd() {
            let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
            self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))?;
        }
        self.by_key.insert(connection.key, token);
        self.connections.insert(token, connection);
        self.settle(token);
        Ok(token)
    }

    /// The guest did not answer these requests in time.
    fn expire(&mut self, now: Instant) {
        while let Some((deadline, token)) = self.deadlines.front().copied() {
            let connecting = self.connections.get(&token).is_some_and(Connection::is_connecting);
            if connecting && deadline > now {
                break;
            }
            self.deadlines.pop_front();
            if connecting {
                tracing::debug!("the guest did not answer a connection request in time");
                self.abort(token);
            }
        }
        self.arm();
    }

    /// Sets the timer to the first deadline.
    fn arm(&mut self) {
        let result = match self.deadlines.front() {
            // A timer of zero would be none.
            Some((deadline, _)) => {
                let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
                self.timer.reset(left, None)
            }
            None => self.timer.clear(),
        };
        if let Err(error) = result {
            tracing::error!(%error, "could not set the vsock timer");
        }
    }

    /// Ends a connection, and tells the guest.
    fn abort(&mut self, token: u64) {
        if let Some(connection) = self.connections.get(&token) {
            self.refuse(connection.key);
        }
        self.detach(token);
    }

    /// The guest knows no more of the connection.
    fn detach(&mut self, token: u64) {
        if let Some(connection) = self.connections.get_mut(&token) {
            self.by_key.remove(&connection.key);
            connection.detach();
        }
        self.settle(token);
    }

    /// Draws the consequences of whatever happened to a connection.
    fn settle(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        connection.settle();
        if connection.is_dead() {
            self.connections.remove(&token);
        } else if connection.has_work() && !connection.queued {
            connection.queued = true;
            self.ready.push_back(token);
        }
    }
}

#[cfg(test)]
#[path = "muxer_props.rs"]
mod props;
#[cfg(test)]
#[path = "muxer_tests.rs"]
mod tests;
