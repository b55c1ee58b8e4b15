//! The OOM kills of a container, as its cgroup's memory.events counts them (cgroup-v2.rst).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use husk_cell::cgroup::EventsWatch;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::descriptor;
use crate::events::Events;

/// The OOM kills of a container that have been told.
pub(crate) struct Oom {
    watch: AsyncFd<EventsWatch>,
    told: AtomicU64,
}

impl Oom {
    /// Begins to watch a container's cgroup; nothing is told yet.
    pub(crate) fn new(watch: EventsWatch) -> io::Result<Self> {
        Ok(Self { watch: descriptor::watch(watch, Interest::PRIORITY)?, told: AtomicU64::new(0) })
    }

    /// Tells of new kills. Called also before an exit is told, so that the cause comes first.
    pub(crate) async fn tell(&self, id: &str, events: &Events) {
        match self.watch.get_ref().count("oom_kill") {
            Ok(kills) if kills > self.told.fetch_max(kills, Ordering::Relaxed) => events.out_of_memory(id).await,
            Ok(_) => {}
            Err(error) => tracing::debug!("Could not read the OOM kills of {id}: {error}"),
        }
    }

    /// Tells of each kill as it happens.
    pub(crate) async fn run(self: Arc<Self>, id: String, events: Arc<Events>) {
        while let Ok(mut guard) = self.watch.ready(Interest::PRIORITY).await {
            guard.clear_ready();
            self.tell(&id, &events).await;
        }
    }
}
