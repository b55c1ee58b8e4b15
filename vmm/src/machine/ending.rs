//! The end of the VM: whoever comes upon it says so here, and the main loop ends the process.

use std::io;
use std::sync::Mutex;

use event_manager::{EventOps, Events, MutEventSubscriber};
use std::sync::Arc;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::lock::lock;
use husk_vmm_api::exit::ExitReason;

/// Shared by all threads.
pub(crate) struct Ending {
    reason: Mutex<Option<ExitReason>>,
    event: EventFd,
}

impl Ending {
    /// Not ended yet.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { reason: Mutex::new(None), event: EventFd::new(EFD_NONBLOCK)? })
    }

    /// Ends the VM; the first reason counts.
    pub(crate) fn end(&self, reason: ExitReason) {
        lock(&self.reason).get_or_insert(reason);
        // Can only fail when the counter is full, and then the main loop is awake already.
        let _ = self.event.write(1);
    }

    /// The reason, once there is one.
    pub(crate) fn reason(&self) -> Option<ExitReason> {
        *lock(&self.reason)
    }
}

/// Wakes the main loop at the end.
pub(crate) struct EndingSubscriber(pub(crate) Arc<Ending>);

impl MutEventSubscriber for EndingSubscriber {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.0.event, EventSet::IN)) {
            tracing::error!(%error, "Could not watch for the VM's end");
            self.0.end(ExitReason::Failed);
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        // Left readable: the loop looks at the reason after each round.
    }
}
