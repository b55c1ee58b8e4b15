//! Exits, OOM kills and wishes for memory on their way to the shim: a bounded queue, in order, from the moment they happen until the shim asks for them.

use husk_agent_api::agent::{Event, MemoryWanted, OutOfMemory, ProcessExit};
use tokio::sync::{Mutex, MutexGuard, mpsc};

use crate::reaper::Exit;
use crate::stdio::Written;

/// Events that may wait. When that many do, the tasks that watch processes wait too, and nothing is lost.
const CAPACITY: usize = 1024;

/// The queue.
pub(crate) struct Events {
    sender: mpsc::Sender<Event>,
    receiver: Mutex<mpsc::Receiver<Event>>,
}

impl Events {
    /// An empty queue.
    pub(crate) fn new() -> Self {
        let (sender, receiver) = mpsc::channel(CAPACITY);
        Self { sender, receiver: Mutex::new(receiver) }
    }

    /// Tells that a process ended; `exec_id` is empty for a container's first process.
    pub(crate) async fn exited(&self, id: &str, exec_id: &str, exit: Exit, written: Written) {
        let mut event = Event::new();
        event.set_exit(ProcessExit {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            status: exit.status,
            time_ns: exit.time_ns,
            stdout_bytes: written.stdout,
            stderr_bytes: written.stderr,
            ..Default::default()
        });
        self.push(event).await;
    }

    /// Tells that the kernel killed a process of the container for lack of memory.
    pub(crate) async fn out_of_memory(&self, id: &str) {
        let mut event = Event::new();
        event.set_oom(OutOfMemory { id: id.to_owned(), ..Default::default() });
        self.push(event).await;
    }

    /// Tells that the machine should grow.
    pub(crate) async fn memory_wanted(&self) {
        let mut event = Event::new();
        event.set_memory_wanted(MemoryWanted::new());
        self.push(event).await;
    }

    async fn push(&self, event: Event) {
        // It can't be closed while `self` holds the receiver.
        let _ = self.sender.send(event).await;
    }

    /// The queue's other end, for as long as it is held; none when another caller holds it.
    pub(crate) fn listen(&self) -> Option<MutexGuard<'_, mpsc::Receiver<Event>>> {
        self.receiver.try_lock().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn keeps_order_and_loses_nothing_when_full() {
        let events = std::sync::Arc::new(Events::new());
        let pushing = tokio::spawn({
            let events = events.clone();
            async move {
                for status in 0..CAPACITY as u32 * 2 {
                    events.exited("c", "", Exit { status, time_ns: 1 }, Written::default()).await;
                }
            }
        });
        let mut queue = events.listen().unwrap();
        for status in 0..CAPACITY as u32 * 2 {
            assert_eq!(queue.recv().await.unwrap().exit().status, status);
        }
        pushing.await.unwrap();
    }

    #[test]
    fn has_one_listener() {
        let events = Events::new();
        let held = events.listen();
        assert!(held.is_some() && events.listen().is_none());
        drop(held);
        assert!(events.listen().is_some());
    }
}
