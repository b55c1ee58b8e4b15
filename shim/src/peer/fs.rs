//! husk-fs: the vhost-user daemon that shows the pod's share directory to the guest.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::PeerError;
use super::helper::{Helper, Inherited};

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
