//! Work inside a network namespace: on a thread of its own that ends afterwards, so that no thread of the runtime ever is in
//! another namespace than the shim's.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::NetworkError;

/// Longest time that a piece of work in a namespace may take.
const LIMIT: Duration = Duration::from_secs(5);

/// Opens the namespace at `path`.
pub(super) fn open(path: &Path) -> Result<OwnedFd, NetworkError> {
    File::open(path).map(OwnedFd::from).map_err(|cause| NetworkError::Open { path: path.to_owned(), cause })
}

/// Whether it is the namespace of this process: the host's.
pub(super) fn is_own(netns: &OwnedFd) -> bool {
    let own = nix::sys::stat::stat("/proc/self/ns/net");
    let other = nix::sys::stat::fstat(netns);
    matches!((own, other), (Ok(own), Ok(other)) if (own.st_dev, own.st_ino) == (other.st_dev, other.st_ino))
}

/// Runs `work` on a new thread inside the namespace; `what` names it in errors. Inside, the runtime is at hand, so that
/// sockets made there can be registered with it.
pub(super) async fn within<T: Send + 'static>(
    netns: &OwnedFd,
    what: &'static str,
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, NetworkError> {
    let thread_error = |cause| NetworkError::Thread { what, cause };
    let netns = netns.try_clone().map_err(thread_error)?;
    let runtime = tokio::runtime::Handle::current();
    let (done, result) = oneshot::channel();
    std::thread::Builder::new()
        .name("netns".into())
        .spawn(move || {
            let outcome = setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)
                .map_err(|errno| NetworkError::Enter { cause: errno.into() })
                .and_then(|()| {
                    let _runtime = runtime.enter();
                    work()
                });
            // Nobody listens any more only if the deadline passed; what the work made is then dropped here.
            let _ = done.send(outcome);
        })
        .map_err(thread_error)?;
    match timeout(LIMIT, result).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(_)) => {
            Err(NetworkError::Thread { what, cause: std::io::Error::other("the thread ended without a result") })
        }
        Err(_) => Err(NetworkError::Deadline { what, limit: LIMIT }),
    }
}
