//! The gate before KVM_RUN: closed, it holds every vCPU.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::lock::lock;

/// One gate for all vCPUs.
#[derive(Default)]
pub(crate) struct Gate {
    closed: AtomicBool,
    waiting: Mutex<usize>,
    changed: Condvar,
}

impl Gate {
    /// Whether vCPUs have to wait.
    pub(crate) fn closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Waits until it opens: as long as the shim wants.
    pub(crate) fn wait(&self) {
        let mut waiting = lock(&self.waiting);
        *waiting += 1;
        self.changed.notify_all();
        while self.closed() {
            waiting = self.changed.wait(waiting).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        *waiting -= 1;
    }

    /// Closes it; vCPUs come here when they next leave KVM_RUN.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// Waits until `count` vCPUs are here; false if the time is over before.
    pub(crate) fn wait_for(&self, count: usize, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let mut waiting = lock(&self.waiting);
        while *waiting < count {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            waiting = self.changed.wait_timeout(waiting, left).unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
        true
    }

    /// Opens it.
    pub(crate) fn open(&self) {
        let _waiting = lock(&self.waiting);
        self.closed.store(false, Ordering::SeqCst);
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn holds_until_opened() {
        let gate = Arc::new(Gate::default());
        gate.close();
        assert!(!gate.wait_for(1, Duration::from_millis(1)));
        let waiter = std::thread::spawn({
            let gate = gate.clone();
            move || gate.wait()
        });
        assert!(gate.wait_for(1, Duration::from_secs(10)));
        gate.open();
        waiter.join().unwrap();
        assert!(gate.wait_for(0, Duration::ZERO));
    }
}
