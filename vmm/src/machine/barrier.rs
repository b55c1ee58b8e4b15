//! Lets another thread wait until the event loop has done all that there was to do.

use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::lock::lock;

/// The waiting thread's side.
pub(crate) struct Barrier {
    event: EventFd,
    rounds: Mutex<u64>,
    changed: Condvar,
}

/// The event loop's side.
pub(crate) struct BarrierSubscriber(pub(crate) Arc<Barrier>);

impl Barrier {
    /// Not waited at.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { event: EventFd::new(EFD_NONBLOCK)?, rounds: Mutex::new(0), changed: Condvar::new() })
    }

    /// Waits until everything that was ready at the call has been handled; false if the time is over before. The second round begins
    /// after all events of the first, among which this one may have been the first to be seen.
    pub(crate) fn pass(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        (0..2).all(|_| self.round(end))
    }

    fn round(&self, end: Instant) -> bool {
        let mut rounds = lock(&self.rounds);
        let wanted = *rounds + 1;
        // Can only fail when the counter is full, and then the loop is awake already.
        let _ = self.event.write(1);
        while *rounds < wanted {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            rounds = self.changed.wait_timeout(rounds, left).unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
        true
    }
}

impl MutEventSubscriber for BarrierSubscriber {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.0.event, EventSet::IN)) {
            tracing::error!(?error, "Could not watch for those who wait for the event loop");
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let _ = self.0.event.read();
        *lock(&self.0.rounds) += 1;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::EventLoop;
    use event_manager::SubscriberOps;

    #[test]
    fn passes_after_two_rounds_and_never_without_a_loop() {
        let barrier = Arc::new(Barrier::new().unwrap());
        assert!(!barrier.pass(Duration::from_millis(1)));
        let mut events = EventLoop::new().unwrap();
        events.add_subscriber(Arc::new(Mutex::new(BarrierSubscriber(barrier.clone()))));
        let waiting = std::thread::spawn(move || barrier.pass(Duration::from_secs(10)));
        while !waiting.is_finished() {
            events.run_with_timeout(10).unwrap();
        }
        assert!(waiting.join().unwrap());
    }
}
