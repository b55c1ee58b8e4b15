//! A function's state in a snapshot: what the guest wrote into configuration space and the vectors' table, and the transport's state.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::function::{NO_VECTOR, PciInterrupt, VirtioPciFunction};
use super::msix::VectorState;
use crate::interrupt::Interrupt;
use crate::transport::saved::{SavedError, TransportState};

/// The state of one function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionState {
    /// What the guest wrote into configuration space.
    config: Vec<u8>,
    vectors: Vec<VectorState>,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    transport: TransportState,
}

impl VirtioPciFunction {
    /// The state, while the vCPUs stand still.
    pub(super) fn saved(&self) -> Result<FunctionState, SavedError> {
        Ok(FunctionState {
            config: self.config.save(),
            vectors: self.shared.msix.save(),
            config_vector: self.shared.config_vector.load(Ordering::Acquire),
            queue_vectors: self.queue_vectors.clone(),
            transport: self.transport.save()?,
        })
    }

    /// Announces the vectors that [`Self::replay`] will connect.
    pub(super) fn announce_vectors(&self, state: &FunctionState) {
        self.shared.msix.announce(&state.vectors);
    }

    /// Brings a function that no guest has touched into the state. Each queue is then looked at once, and each of its vectors raised
    /// once: what was under way in either direction when the state was taken is not lost, and one time too many does no harm.
    pub(super) fn replay(&mut self, state: &FunctionState) -> Result<(), SavedError> {
        let vectors = |count: usize| (state.vectors.len(), state.queue_vectors.len()) == (count, count - 1);
        if !vectors(self.shared.msix.len()) {
            return Err(SavedError::Vectors(self.transport.name()));
        }
        self.config.write(0, &state.config);
        self.follow_bar();
        self.shared.msix.restore(&state.vectors);
        let (enabled, masked) = self.config.msix_control();
        self.shared.msix.set_control(enabled, masked);
        self.shared.config_vector.store(self.known_vector(state.config_vector), Ordering::Release);
        self.queue_vectors = state.queue_vectors.iter().map(|vector| self.known_vector(*vector)).collect();
        let interrupt: Arc<dyn Interrupt> =
            Arc::new(PciInterrupt { shared: self.shared.clone(), queue_vectors: self.queue_vectors.clone() });
        self.transport.restore(&state.transport, || interrupt.clone())?;
        if !self.transport.is_frozen() {
            return Ok(());
        }
        for (index, vector) in (0..).zip(&self.queue_vectors) {
            self.transport.notify(usize::from(index));
            if *vector != NO_VECTOR {
                interrupt.used(index);
            }
        }
        Ok(())
    }
}
