//! What the devices of this process share: a device model behind a lock, driven by the transport on vCPU threads and served by the
//! event loop. The loop's thread is the only one that touches queues and back ends.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{ActivateError, Activation, Position, VirtioDevice};
use crate::interrupt::Interrupt;
use crate::queue::{QueueError, VirtQueue};

/// What the event loop runs.
pub type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// A device joined with its back end: one part for the transport, one for the event loop.
pub struct Attached {
    /// Goes to the transport, see [`crate::VirtioPciFunction::new`].
    pub device: Arc<Mutex<dyn VirtioDevice>>,
    /// Goes to the event loop.
    pub subscriber: Subscriber,
}

/// Why a device could not be attached to its back end.
#[derive(Debug, thiserror::Error)]
#[error("Could not attach the {device} device to its back end")]
pub struct AttachError {
    /// The device's name.
    pub device: &'static str,
    /// What failed.
    #[source]
    pub source: std::io::Error,
}

/// A device model: what is particular to a device.
pub(crate) trait Model: Send + 'static {
    /// Name, for logs.
    const NAME: &'static str;
    /// Device type (virtio 1.2, section 5).
    const DEVICE_TYPE: u32;
    /// Largest size of each queue.
    fn queue_max_sizes(&self) -> Vec<u16>;
    /// Features offered.
    fn features(&self) -> u64;
    /// Device-specific configuration.
    fn config(&self) -> &[u8];
    /// Descriptors of the back end to watch for the device's whole life.
    fn watched(&self) -> Vec<(RawFd, EventSet)> {
        Vec::new()
    }
    /// A watched descriptor is ready.
    fn host_event(&mut self, _events: EventSet) {}
    /// The driver is ready; `serve` follows. `interrupt` is for configuration changes; queues have their own.
    fn start(&mut self, _features: u64, _interrupt: &Arc<dyn Interrupt>) -> Result<(), std::io::Error> {
        Ok(())
    }
    /// The driver reset the device.
    fn stop(&mut self) {}
    /// Whether a snapshot may be taken: nothing is held that is neither in guest memory nor in the queues' positions.
    fn is_quiet(&self) -> bool {
        true
    }
    /// Does all that can be done on all queues, up to a budget. True if the budget ended it.
    fn serve(&mut self, queues: &mut [VirtQueue]) -> Result<bool, QueueError>;
}

/// A model on the event loop.
pub(crate) struct Served<M> {
    model: M,
    /// Signalled when the loop has to look: activation, reset, or work left over.
    wake: EventFd,
    state: State,
    /// The model was started and not stopped.
    started: bool,
    /// Queue events that the loop watches.
    watched: Vec<Arc<EventFd>>,
}

enum State {
    /// Not activated, or reset.
    Idle,
    /// The driver is ready; the loop has not seen it yet.
    Activated(Box<Running>),
    /// Being served.
    Running(Box<Running>),
}

struct Running {
    features: u64,
    queues: Vec<VirtQueue>,
    events: Vec<Arc<EventFd>>,
    interrupt: Arc<dyn Interrupt>,
}

impl<M: Model> Served<M> {
    pub(crate) fn attach(model: M) -> Result<Attached, AttachError> {
        let wake = EventFd::new(EFD_NONBLOCK).map_err(|source| AttachError { device: M::NAME, source })?;
        let served = Self { model, wake, state: State::Idle, started: false, watched: Vec::new() };
        let served = Arc::new(Mutex::new(served));
        Ok(Attached { device: served.clone(), subscriber: served })
    }

    fn wake(&self) {
        // Fails only if the event is signalled already.
        let _ = self.wake.write(1);
    }

    /// Follows what the transport did: stops, then starts the model.
    fn follow(&mut self, ops: &mut EventOps<'_>) {
        if self.started && !matches!(self.state, State::Running(_)) {
            self.started = false;
            self.model.stop();
        }
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Activated(running) => {
                for event in &running.events {
                    if self.watched.iter().any(|watched| Arc::ptr_eq(watched, event)) {
                        continue;
                    }
                    match ops.add(Events::new(&**event, EventSet::IN)) {
                        Ok(()) => self.watched.push(event.clone()),
                        Err(error) => tracing::error!(device = M::NAME, ?error, "could not watch a queue"),
                    }
                }
                self.started = true;
                match self.model.start(running.features, &running.interrupt) {
                    Ok(()) => self.state = State::Running(running),
                    Err(error) => {
                        tracing::error!(device = M::NAME, %error, "could not start the device");
                        running.interrupt.needs_reset();
                    }
                }
            }
            other => self.state = other,
        }
    }

    fn serve(&mut self) {
        let State::Running(running) = &mut self.state else { return };
        match self.model.serve(&mut running.queues) {
            Ok(false) => {}
            Ok(true) => self.wake(),
            Err(error) => {
                tracing::warn!(device = M::NAME, %error, "the driver broke a queue, the device needs a reset");
                running.interrupt.needs_reset();
                // `started` stays: the model is stopped when the loop next follows the state.
                self.state = State::Idle;
                self.wake();
            }
        }
    }
}

impl<M: Model> VirtioDevice for Served<M> {
    fn name(&self) -> &'static str {
        M::NAME
    }

    fn device_type(&self) -> u32 {
        M::DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        self.model.queue_max_sizes()
    }

    fn features(&self) -> u64 {
        self.model.features()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(self.model.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut queues = Vec::with_capacity(activation.queues.len());
        let mut events = Vec::with_capacity(activation.queues.len());
        for (index, queue) in (0..).zip(activation.queues) {
            let Some((queue, event)) = queue else {
                return Err(ActivateError { device: M::NAME, reason: format!("queue {index} is not enabled") });
            };
            queues.push(VirtQueue::new(index, queue, activation.memory.clone(), activation.interrupt.clone()));
            events.push(event);
        }
        let (features, interrupt) = (activation.features, activation.interrupt);
        self.state = State::Activated(Box::new(Running { features, queues, events, interrupt }));
        self.wake();
        Ok(())
    }

    fn reset(&mut self) {
        self.state = State::Idle;
        self.wake();
    }

    fn positions(&self) -> Option<Vec<Position>> {
        match &self.state {
            State::Idle => Some(vec![Position::default(); self.model.queue_max_sizes().len()]),
            State::Activated(running) | State::Running(running) => {
                self.model.is_quiet().then(|| running.queues.iter().map(VirtQueue::position).collect())
            }
        }
    }
}

impl<M: Model> MutEventSubscriber for Served<M> {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let fd = events.fd();
        if fd == self.wake.as_raw_fd() {
            let _ = self.wake.read();
        } else if let Some(event) = self.watched.iter().find(|event| event.as_raw_fd() == fd) {
            let _ = event.read();
        } else {
            self.model.host_event(events.event_set());
        }
        self.follow(ops);
        self.serve();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let wake = (self.wake.as_raw_fd(), EventSet::IN);
        for (fd, set) in self.model.watched().into_iter().chain([wake]) {
            if let Err(error) = ops.add(Events::new_raw(fd, set)) {
                tracing::error!(device = M::NAME, ?error, "could not watch the device's back end");
            }
        }
    }
}

/// Reads device-specific configuration; what lies beyond its end stays as it is.
pub(crate) fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    let Some(config) = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)) else { return };
    let len = config.len().min(data.len());
    data[..len].copy_from_slice(&config[..len]);
}

#[cfg(test)]
#[path = "served_tests.rs"]
mod tests;
