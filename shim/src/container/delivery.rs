//! How far a process's output is on its way to containerd, and the wait for it: the process's end is told after its output.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::Duration;

use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tracing::debug;

/// Bytes of an output that were handed on so far. Its sender is gone once there will be no more.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Progress {
    pub(super) bytes: u64,
}

/// One output's way.
#[derive(Clone, Debug)]
pub(super) struct Delivery {
    progress: watch::Receiver<Progress>,
    fifo: Option<PathBuf>,
}

impl Delivery {
    /// Of an output that ends in `fifo`, if it does in one.
    pub(super) fn new(progress: watch::Receiver<Progress>, fifo: Option<PathBuf>) -> Self {
        Self { progress, fifo }
    }

    /// Waits until containerd has the first `wanted` bytes, or all if there are less; false if before that nothing moves for as long as
    /// `stall`.
    pub(super) async fn wait(mut self, wanted: u64, stall: Duration) -> bool {
        let mut fifo = self.fifo.clone().map(Fifo::open).transpose().unwrap_or_else(unknown);
        let mut has_ended = false;
        loop {
            let bytes = self.progress.borrow_and_update().bytes;
            let unread = match fifo.as_mut().map(Fifo::unread).transpose() {
                Ok(unread) => unread.unwrap_or(0),
                Err(error) => {
                    fifo = unknown(error);
                    0
                }
            };
            if (has_ended || bytes >= wanted) && bytes - unread.min(bytes) >= wanted.min(bytes) {
                return true;
            }
            let more = async {
                if has_ended {
                    std::future::pending::<()>().await;
                }
                has_ended = self.progress.changed().await.is_err();
            };
            let read = async {
                match &fifo {
                    Some(Fifo { reads: Some(reads), .. }) if unread > 0 => a_read(reads).await,
                    _ => std::future::pending().await,
                }
            };
            tokio::select! {
                () = more => {}
                () = read => {}
                () = tokio::time::sleep(stall) => return false,
            }
        }
    }
}

/// Of a FIFO that can't be looked at nothing is waited for.
fn unknown(error: io::Error) -> Option<Fifo> {
    debug!("cannot tell whether the end of an output is read: {error}");
    None
}

/// A FIFO that containerd reads. It closes its end soon after it knows of a process's end, whatever is still in there (seen with 1.6), so
/// what counts is what it has read. Each read is an event of inotify(7).
struct Fifo {
    path: PathBuf,
    pipe: std::fs::File,
    /// Made when there is something to wait for: mostly all is read already, and the closing of an inotify instance blocks for milliseconds.
    reads: Option<AsyncFd<OwnedFd>>,
}

impl Fifo {
    fn open(path: PathBuf) -> io::Result<Self> {
        let pipe =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(&path)?;
        Ok(Self { path, pipe, reads: None })
    }

    /// Bytes in it. While there are some, reads are watched.
    fn unread(&mut self) -> io::Result<u64> {
        let unread = rustix::io::ioctl_fionread(&self.pipe)?;
        if unread == 0 || self.reads.is_some() {
            return Ok(unread);
        }
        let reads = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
        inotify::add_watch(&reads, &self.path, inotify::WatchFlags::ACCESS)?;
        self.reads = Some(crate::watch::readable(reads)?);
        // What was read before it was watched is not told.
        Ok(rustix::io::ioctl_fionread(&self.pipe)?)
    }
}

/// Waits until something was read since this was last called.
async fn a_read(reads: &AsyncFd<OwnedFd>) {
    let Ok(mut ready) = reads.readable().await else { return };
    // What was read is told by the pipe; the events only wake.
    let _ = ready.try_io(|reads| Ok(rustix::io::read(reads, &mut [0u8; 1024])?));
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    const STALL: Duration = Duration::from_millis(200);

    /// A FIFO with a reader and a writer.
    fn fifo(name: &str) -> (PathBuf, std::fs::File, std::fs::File) {
        let path = std::env::temp_dir().join(format!("husk-delivery-{name}-{}", std::process::id()));
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let writer = OpenOptions::new().write(true).open(&path).unwrap();
        (path, reader, writer)
    }

    #[tokio::test]
    async fn the_end_waits_until_the_reader_has_it() {
        let (path, mut reader, mut writer) = fifo("taken");
        let (progress, seen) = watch::channel(Progress { bytes: 10_000 });
        let delivery = Delivery::new(seen, Some(path.clone()));
        writer.write_all(&[7; 10_000]).unwrap();
        assert!(!delivery.clone().wait(10_000, STALL).await);
        let waiting = tokio::spawn(delivery.clone().wait(u64::MAX, STALL));
        let mut part = [0; 5_000];
        reader.read_exact(&mut part).unwrap();
        assert!(delivery.clone().wait(5_000, STALL).await);
        assert!(!delivery.wait(5_001, STALL).await);
        drop(progress);
        let waiting_longer = waiting.await.unwrap();
        assert!(!waiting_longer);
        std::fs::remove_file(path).unwrap();
    }

    #[tokio::test]
    async fn a_slow_reader_is_waited_for_as_long_as_it_reads() {
        let (path, mut reader, mut writer) = fifo("slow");
        let (progress, seen) = watch::channel(Progress { bytes: 10_000 });
        let delivery = Delivery::new(seen, Some(path.clone()));
        writer.write_all(&[7; 10_000]).unwrap();
        drop(progress);
        // Long enough for a machine on which nothing else gets its turn in time either.
        let stall = Duration::from_secs(2);
        let waiting = tokio::spawn(delivery.wait(u64::MAX, stall));
        for left in (0..4).rev() {
            tokio::time::sleep(stall / 2).await;
            assert!(!waiting.is_finished());
            reader.read_exact(&mut vec![0; if left > 0 { 1_000 } else { 7_000 }]).unwrap();
        }
        assert!(waiting.await.unwrap());
        std::fs::remove_file(path).unwrap();
    }

    #[tokio::test]
    async fn what_comes_after_the_wanted_is_not_waited_for() {
        let (progress, seen) = watch::channel(Progress { bytes: 5 });
        let delivery = Delivery::new(seen, None);
        assert!(delivery.clone().wait(5, STALL).await);
        assert!(!delivery.clone().wait(6, STALL).await);
        let waiting = tokio::spawn(delivery.clone().wait(6, STALL));
        tokio::task::yield_now().await;
        progress.send_modify(|progress| progress.bytes += 1);
        assert!(waiting.await.unwrap());
        drop(progress);
        assert!(delivery.wait(u64::MAX, STALL).await);
    }
}
