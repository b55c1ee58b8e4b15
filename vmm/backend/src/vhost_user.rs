//! The front end of a vhost-user device: the handshake with a back end in another process. Once its queues run, that process serves
//! them alone; here remain only stopping them and noticing that it is gone.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

/// How long the back end may take to answer.
const DEADLINE: Duration = Duration::from_secs(2);

/// Why the back end does not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// A resource of our own.
    #[error("Could not prepare the vhost-user connection")]
    Prepare(#[source] io::Error),
    /// A message that failed, or was not answered in time.
    #[error("The vhost-user back end did not take {what}")]
    Message {
        /// What was sent.
        what: &'static str,
        /// What happened.
        #[source]
        source: vhost::Error,
    },
    /// It can't do what the device needs.
    #[error("The vhost-user back end lacks {0}")]
    Lacks(&'static str),
    /// Too few queues.
    #[error("The vhost-user back end has {has} queues where {needs} are needed")]
    Queues {
        /// What it has.
        has: u64,
        /// What the device needs.
        needs: u64,
    },
}

/// One region of guest memory, as the back end has to know it.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// Where the guest has it.
    pub guest_address: u64,
    /// Length in bytes.
    pub len: u64,
    /// Where this process has it.
    pub our_address: u64,
    /// The file behind it.
    pub fd: RawFd,
    /// Where in the file it begins.
    pub offset: u64,
}

/// One queue to hand over. Addresses are this process's (vhost-user, "Memory access").
#[derive(Debug)]
pub struct Vring<'a> {
    /// The queue.
    pub index: usize,
    /// Number of descriptors.
    pub size: u16,
    /// Where the descriptor table is.
    pub descriptors: u64,
    /// Where the available ring is.
    pub available: u64,
    /// Where the used ring is.
    pub used: u64,
    /// The next entry of the available ring.
    pub next_available: u16,
    /// Signalled by the driver.
    pub kick: &'a EventFd,
    /// Signalled for the driver.
    pub call: &'a EventFd,
}

/// A connection to a back end, with the features known.
pub struct VhostUser {
    frontend: Frontend,
    features: u64,
    watchdog: Watchdog,
}

/// Cuts the connection when an answer is overdue. The event loop watches `timer` and then calls `expired`; that ends the wait of
/// whichever thread is in it.
#[derive(Clone)]
pub struct Watchdog {
    timer: Arc<Mutex<Timer>>,
    timer_fd: RawFd,
    stream: Arc<UnixStream>,
}

struct Timer {
    fd: TimerFd,
    /// When the conversation that is under way must have ended.
    deadline: Option<Instant>,
}

impl VhostUser {
    /// Negotiates with the back end behind a connected socket. It must serve at least `queues` queues.
    pub fn connect(stream: UnixStream, queues: u16) -> Result<Self, VhostUserError> {
        let watchdog = Watchdog::new(&stream).map_err(VhostUserError::Prepare)?;
        let frontend = Frontend::from_stream(stream, queues.into());
        let mut connection = Self { frontend, features: 0, watchdog };
        // No event loop runs yet that could watch the timer.
        let watchdog = connection.watchdog.clone();
        let (done, finished) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                if finished.recv_timeout(DEADLINE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                    watchdog.cut();
                }
            });
            let result = connection.negotiate(queues);
            drop(done);
            result
        })?;
        Ok(connection)
    }

    fn negotiate(&mut self, queues: u16) -> Result<(), VhostUserError> {
        let frontend = &mut self.frontend;
        frontend.set_owner().map_err(message("the session"))?;
        self.features = frontend.get_features().map_err(message("the request for its features"))?;
        if self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(VhostUserError::Lacks("protocol features"));
        }
        let offered = frontend.get_protocol_features().map_err(message("the request for its protocol features"))?;
        if !offered.contains(VhostUserProtocolFeatures::MQ) {
            return Err(VhostUserError::Lacks("several queues"));
        }
        frontend.set_protocol_features(VhostUserProtocolFeatures::MQ).map_err(message("the protocol features"))?;
        let has = frontend.get_queue_num().map_err(message("the request for its queues"))?;
        if has < queues.into() {
            return Err(VhostUserError::Queues { has, needs: queues.into() });
        }
        Ok(())
    }

    /// The virtio features that the back end offers.
    pub fn features(&self) -> u64 {
        self.features & !VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    /// What the event loop needs to enforce the deadline.
    pub fn watchdog(&self) -> Watchdog {
        self.watchdog.clone()
    }

    /// Hands over memory and queues and lets them run. No message here has an answer to wait for.
    pub fn start(&mut self, features: u64, regions: &[Region], vrings: &[Vring<'_>]) -> Result<(), VhostUserError> {
        let _guard = self.watchdog.arm().map_err(VhostUserError::Prepare)?;
        let frontend = &mut self.frontend;
        let features = features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        frontend.set_features(features).map_err(message("the features"))?;
        let table: Vec<_> = regions
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.guest_address,
                memory_size: region.len,
                userspace_addr: region.our_address,
                mmap_offset: region.offset,
                mmap_handle: region.fd,
            })
            .collect();
        frontend.set_mem_table(&table).map_err(message("the memory table"))?;
        for vring in vrings {
            let config = VringConfigData {
                queue_max_size: vring.size,
                queue_size: vring.size,
                flags: 0,
                desc_table_addr: vring.descriptors,
                used_ring_addr: vring.used,
                avail_ring_addr: vring.available,
                log_addr: None,
            };
            frontend.set_vring_num(vring.index, vring.size).map_err(message("a queue's size"))?;
            frontend.set_vring_addr(vring.index, &config).map_err(message("a queue's addresses"))?;
            frontend.set_vring_base(vring.index, vring.next_available).map_err(message("a queue's position"))?;
            frontend.set_vring_call(vring.index, vring.call).map_err(message("a queue's interrupt"))?;
            frontend.set_vring_kick(vring.index, vring.kick).map_err(message("a queue's notification"))?;
        }
        for vring in vrings {
            frontend.set_vring_enable(vring.index, true).map_err(message("a queue's start"))?;
        }
        Ok(())
    }

    /// Stops queues: when it returns the back end no longer touches them.
    pub fn stop(&mut self, queues: &[usize]) -> Result<(), VhostUserError> {
        let _guard = self.watchdog.arm().map_err(VhostUserError::Prepare)?;
        for queue in queues {
            self.frontend.set_vring_enable(*queue, false).map_err(message("a queue's stop"))?;
        }
        for queue in queues {
            self.frontend.get_vring_base(*queue).map_err(message("a queue's end"))?;
        }
        Ok(())
    }
}

fn message(what: &'static str) -> impl Fn(vhost::Error) -> VhostUserError {
    move |source| VhostUserError::Message { what, source }
}

impl Watchdog {
    fn new(stream: &UnixStream) -> io::Result<Self> {
        let fd = TimerFd::new().map_err(io::Error::from)?;
        let timer_fd = fd.as_raw_fd();
        let timer = Arc::new(Mutex::new(Timer { fd, deadline: None }));
        Ok(Self { timer, timer_fd, stream: Arc::new(stream.try_clone()?) })
    }

    /// The timer to watch for reading.
    pub fn timer(&self) -> RawFd {
        self.timer_fd
    }

    /// The connection to watch for its end.
    pub fn connection(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// The timer's event was seen: ends the connection if an answer is overdue indeed. Never waits.
    pub fn expired(&self) {
        let mut timer = self.lock();
        // The conversation may have ended, and another begun, since the event was seen.
        let overdue = timer.deadline.is_some_and(|deadline| deadline <= Instant::now());
        if overdue {
            let _ = timer.fd.clear();
            drop(timer);
            self.cut();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Timer> {
        self.timer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cut(&self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    fn arm(&self) -> io::Result<Armed> {
        let mut timer = self.lock();
        // Taken before the timer starts, so that it has passed when the timer fires.
        let deadline = Instant::now() + DEADLINE;
        timer.fd.reset(DEADLINE, None).map_err(io::Error::from)?;
        timer.deadline = Some(deadline);
        Ok(Armed(self.clone()))
    }
}

/// Disarms the timer at the end of a conversation.
struct Armed(Watchdog);

impl Drop for Armed {
    fn drop(&mut self) {
        let mut timer = self.0.lock();
        timer.deadline = None;
        let _ = timer.fd.clear();
    }
}
