//! husk-fs: the vhost-user daemon that shows the pod's share directory to the guest.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::PeerError;
use super::helper::{Helper, Inherited};
use super::vmm::Vmm;

/// Longest wait for the VMM's own end after husk-fs ended well, and for the last lines of husk-fs's log.
const CAUSE_LIMIT: Duration = Duration::from_secs(1);

/// husk-fs's configuration.
#[derive(Debug, Serialize)]
struct FsConfig<'a> {
    /// The pod's id, on every line of its log.
    id: &'a str,
    /// The directory that it shows.
    root: PathBuf,
    /// The listening socket to which the VMM's vhost-user front end is already connected.
    socket: i32,
    /// Number of request queues.
    request_queues: u16,
}

/// Starts husk-fs on `root`. The descriptor is the VMM's, connected before the daemon even runs; its socket's name, made in
/// `directory`, is gone again then.
pub(crate) fn start(
    program: &Path,
    id: &str,
    directory: &Path,
    root: &Path,
    request_queues: u16,
) -> Result<(Helper, OwnedFd), PeerError> {
    let failed = |source| PeerError::Socket { doing: "make the socket between VMM and husk-fs", source };
    let path = directory.join("fs.sock");
    let listener = UnixListener::bind(&path).map_err(failed)?;
    let connected = UnixStream::connect(&path).map_err(failed)?;
    std::fs::remove_file(&path).map_err(failed)?;
    let mut inherited = Inherited::default();
    let socket = inherited.add(listener.into());
    let config = FsConfig { id, root: root.to_owned(), socket, request_queues };
    Ok((Helper::start("husk-fs", program, &config, inherited)?, connected.into()))
}

/// Waits for husk-fs's end, for ever if there is none, and tells the cause. It ends well when its connection to the VMM breaks: if the
/// VMM ends too, that is the cause.
pub(crate) async fn ended(fs: Option<&Helper>, vmm: Option<&Vmm>) -> String {
    let Some(fs) = fs else { return std::future::pending().await };
    let status = fs.ended().await;
    if let (true, Some(vmm)) = (status.success(), vmm)
        && let Ok(cause) = tokio::time::timeout(CAUSE_LIMIT, vmm.ended()).await
    {
        return cause;
    }
    format!("husk-fs ended ({status}): {}", fs.log.last(CAUSE_LIMIT).await)
}
