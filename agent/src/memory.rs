//! The pod's memory. A machine begins small. When the containers have taken half of what it has it asks for more, and while that is being
//! added they may go on to three quarters; beyond, the kernel slows them down and kills nothing (memory.high, cgroup-v2.rst).

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use husk_cell::CgroupError;
use husk_cell::cgroup::Cgroup;
use nix::errno::Errno;
use nix::sys::sysinfo::sysinfo;
use thiserror::Error;
use tokio::io::Interest;
use tokio::task::spawn_blocking;

use crate::descriptor;
use crate::events::Events;

const MIB: u64 = 1 << 20;

/// Why the pod's memory is not watched.
#[derive(Debug, Error)]
pub(crate) enum MemoryError {
    #[error("Could not read how much memory there is")]
    Total(#[source] Errno),
    #[error("Could not read how much memory the pod has taken")]
    Read(#[source] CgroupError),
    #[error("Could not set the pod's memory.high")]
    Mark(#[source] CgroupError),
    #[error("Could not watch the pod's memory")]
    Watch(#[source] CgroupError),
    #[error("Could not wait for the pod's memory events")]
    Wait(#[source] io::Error),
    #[error("A thread of the agent ended early")]
    Thread(#[from] tokio::task::JoinError),
}

/// The memory of all containers together.
pub(crate) struct Memory {
    /// The cgroup above theirs.
    pod: Cgroup,
    events: Arc<Events>,
    /// The machine may grow, and has not been asked to.
    may_ask: AtomicBool,
    watched: AtomicBool,
    /// Bytes that the machine had when the pod was started.
    at_start: OnceLock<u64>,
    /// Held while marks are decided and set.
    room: Mutex<Room>,
}

/// Bytes that the machine has, and that it could get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Room {
    total: u64,
    growth: u64,
}

impl Memory {
    /// Of a machine that stays as it is, until [`Self::changed`] says otherwise.
    pub(crate) fn new(pod: Cgroup, events: Arc<Events>) -> Self {
        Self {
            pod,
            events,
            may_ask: AtomicBool::new(false),
            watched: AtomicBool::new(false),
            at_start: OnceLock::new(),
            room: Mutex::default(),
        }
    }

    /// Sets the marks for what the machine has now, `plugged_mib` more than when this was first called, if it can grow by further `growth_mib`;
    /// else there are none.
    pub(crate) async fn changed(self: &Arc<Self>, growth_mib: u64, plugged_mib: u64) -> Result<(), MemoryError> {
        let at_start = match self.at_start.get() {
            Some(&bytes) => bytes,
            None => {
                let bytes = sysinfo().map_err(MemoryError::Total)?.ram_total();
                *self.at_start.get_or_init(|| bytes)
            }
        };
        // The kernel counts new memory only when it is in use, which is later than it has taken it.
        let room = Room {
            total: at_start.saturating_add(plugged_mib.saturating_mul(MIB)),
            growth: growth_mib.saturating_mul(MIB),
        };
        if growth_mib > 0 && !self.watched.swap(true, Ordering::Relaxed) {
            let watch = self.pod.watch_own_memory().map_err(MemoryError::Watch)?;
            let watch = descriptor::watch(watch, Interest::PRIORITY).map_err(MemoryError::Wait)?;
            let memory = self.clone();
            tokio::spawn(async move {
                let mut seen = 0;
                while let Ok(mut guard) = watch.ready(Interest::PRIORITY).await {
                    guard.clear_ready();
                    let passed = watch.get_ref().count("high").unwrap_or(0);
                    if passed > seen && memory.may_ask.load(Ordering::Acquire) {
                        memory.clone().passed().await;
                    }
                    seen = passed;
                }
            });
        }
        if growth_mib == 0 && !self.watched.load(Ordering::Relaxed) {
            return Ok(());
        }
        let memory = self.clone();
        // Where more is used than the mark the kernel first takes file pages back.
        if spawn_blocking(move || memory.set_mark(room)).await?? {
            self.events.memory_wanted().await;
        }
        Ok(())
    }

    /// Sets the first mark. True: it is passed already, and the machine is to be asked for more.
    fn set_mark(&self, new: Room) -> Result<bool, MemoryError> {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        *room = new;
        let growth = room.growth;
        let held = self.pod.memory_held().map_err(MemoryError::Read)?;
        let asks = growth > 0 && held > room.ask_at();
        let mark = match growth {
            0 => None,
            _ if !asks => Some(room.ask_at()),
            // Beyond both marks the containers would stand still at once.
            _ => (held < room.slow_at()).then(|| room.slow_at()),
        };
        self.pod.set_memory_high(mark).map_err(MemoryError::Mark)?;
        self.may_ask.store(growth > 0 && !asks, Ordering::Release);
        Ok(asks)
    }

    /// The containers have passed the mark.
    async fn passed(self: Arc<Self>) {
        let memory = self.clone();
        let asks = spawn_blocking(move || {
            let room = memory.room.lock().unwrap_or_else(PoisonError::into_inner);
            let held = memory.pod.memory_held().map_err(MemoryError::Read)?;
            let asks = memory.may_ask.load(Ordering::Acquire) && room.is_needed(held);
            if asks {
                memory.may_ask.store(false, Ordering::Release);
            }
            Ok(asks)
        });
        match asks.await.map_err(MemoryError::from).and_then(|asks| asks) {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => return tracing::warn!("{}", crate::display(error)),
        }
        let memory = self.clone();
        let raising = spawn_blocking(move || {
            let room = memory.room.lock().unwrap_or_else(PoisonError::into_inner);
            // If the machine has grown meanwhile the marks are newer ones.
            if memory.may_ask.load(Ordering::Acquire) || room.growth == 0 {
                return Ok(());
            }
            memory.pod.set_memory_high(Some(room.slow_at())).map_err(MemoryError::Mark)
        });
        // Told first: the mark's setting may wait for the kernel.
        let (_, raised) = tokio::join!(self.events.memory_wanted(), raising);
        if let Err(error) = raised.map_err(MemoryError::from).and_then(|raised| raised) {
            tracing::warn!("{}", crate::display(error));
        }
    }
}

impl Room {
    /// Where the machine is asked to grow.
    fn ask_at(&self) -> u64 {
        self.total / 2
    }

    /// Where the containers are slowed down until it has. What is left is the kernel's and the agent's, and for the page table of new memory.
    fn slow_at(&self) -> u64 {
        self.total / 4 * 3
    }

    /// Whether the machine should grow with `held` bytes that can't be taken back. Files' pages alone make it grow to half of what it can be: the
    /// total lacks what the kernel has taken for itself.
    fn is_needed(&self, held: u64) -> bool {
        self.total / 4 * 5 < self.growth || held > self.ask_at() / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_alone_make_a_machine_grow_to_half_of_what_it_can_be() {
        let room = Room { total: 240 * MIB, growth: 768 * MIB };
        assert!(room.is_needed(0));
        let room = Room { total: 480 * MIB, growth: 512 * MIB };
        assert!(!room.is_needed(120 * MIB));
        assert!(room.is_needed(121 * MIB));
        assert!(room.ask_at() < room.slow_at() && room.slow_at() < room.total);
    }
}
