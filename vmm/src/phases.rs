//! How long the phases of the start took.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::lock::lock;

/// Ends of phases, counted from the start of the process. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Phases {
    start: Instant,
    ends: Arc<Mutex<Vec<(&'static str, u64)>>>,
}

impl Phases {
    /// Begins now.
    pub(crate) fn start() -> Self {
        Self { start: Instant::now(), ends: Arc::default() }
    }

    /// A phase is over.
    pub(crate) fn end(&self, name: &'static str) {
        lock(&self.ends).push((name, self.start.elapsed().as_micros() as u64));
    }

    /// Each phase's end in microseconds from the start.
    pub(crate) fn list(&self) -> Vec<(&'static str, u64)> {
        lock(&self.ends).clone()
    }
}
