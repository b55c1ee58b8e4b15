//! A queue's thread: waits for the driver's notifications and does its requests, one after the other.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use husk_backend::event;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::request::Medium;
use crate::interrupt::Interrupt;
use crate::queue::{QueueError, VirtQueue};

/// A queue between transport and worker.
pub(super) struct Lane {
    /// None: not activated, reset, or broken by the driver. Locked by the worker for the length of a request.
    running: Mutex<Option<Running>>,
    /// The transport wants the lock: no further request before it had it.
    yielding: AtomicBool,
    /// The device is gone.
    ended: AtomicBool,
    /// Signalled when one of these changed.
    wake: EventFd,
}

/// An activated queue.
pub(super) struct Running {
    pub(super) queue: VirtQueue,
    pub(super) notified: Arc<EventFd>,
    pub(super) interrupt: Arc<dyn Interrupt>,
}

impl Lane {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            running: Mutex::new(None),
            yielding: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            wake: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// The worker begins to serve the queue.
    pub(super) fn start(&self, running: Running) {
        *self.lock() = Some(running);
        self.wake();
    }

    /// Returns when the queue and the guest's memory are no longer used: the vCPU that resets the device waits for the request that is
    /// being done.
    pub(super) fn stop(&self) {
        self.yielding.store(true, Ordering::SeqCst);
        *self.lock() = None;
        self.yielding.store(false, Ordering::SeqCst);
        self.wake();
    }

    /// The worker ends after its present request. Nobody waits for that here.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        self.wake();
    }

    fn wake(&self) {
        // Fails only if the event is signalled already.
        let _ = self.wake.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a queue's thread does.
pub struct Worker {
    pub(super) lane: Arc<Lane>,
    pub(super) medium: Arc<Medium>,
}

impl Worker {
    /// Serves the queue until the device is gone. Call it on a thread of its own: it waits for the host's storage.
    pub fn run(self) -> io::Result<()> {
        while !self.lane.ended.load(Ordering::SeqCst) {
            let notified = self.lane.lock().as_ref().map(|running| running.notified.clone());
            match &notified {
                Some(notified) => event::wait(&[&self.lane.wake, notified])?,
                None => event::wait(&[&self.lane.wake])?,
            }
            // What is signalled from here on is seen in the next round.
            for event in [Some(&self.lane.wake), notified.as_deref()].into_iter().flatten() {
                let _ = event.read();
            }
            while self.serve_one() {}
        }
        Ok(())
    }

    /// Does the next request. False if there is none, or none may be begun.
    fn serve_one(&self) -> bool {
        if self.lane.ended.load(Ordering::SeqCst) || self.lane.yielding.load(Ordering::SeqCst) {
            return false;
        }
        let mut lane = self.lane.lock();
        let Some(running) = &mut *lane else { return false };
        match serve(&self.medium, &mut running.queue) {
            Ok(more) => more,
            Err(error) => {
                tracing::warn!(%error, "the driver broke a queue of a disk, which needs a reset");
                running.interrupt.needs_reset();
                *lane = None;
                false
            }
        }
    }
}

fn serve(medium: &Medium, queue: &mut VirtQueue) -> Result<bool, QueueError> {
    let Some(chain) = queue.pop()? else { return Ok(false) };
    let written = medium.serve(&queue.memory().clone(), &chain);
    queue.push_used(&chain, written)?;
    queue.notify()?;
    Ok(true)
}
