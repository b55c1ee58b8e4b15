//! The control API: ttrpc on the socket that the shim handed over, on a thread of its own.

mod server;
mod socket;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use husk_backend::files::FileChannel;
use husk_jail::seccomp::{self, SeccompError, ThreadKind};
use husk_vmm_api::exit::ExitReason;

use crate::machine::{Ending, Running};
use crate::phases::Phases;

/// Why the control API does not work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    /// The socket or the runtime.
    #[error("Could not set up the control socket")]
    Io(#[from] io::Error),
    /// ttrpc.
    #[error("Could not serve the control API")]
    Serve(#[source] ttrpc::Error),
    /// The filter.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
}

/// Serves `socket` until the VM ends. Disks' files come on `files`.
pub(crate) fn start(
    socket: UnixStream,
    files: Option<FileChannel>,
    machine: Running,
    ending: Arc<Ending>,
    phases: Phases,
) -> Result<(), ControlError> {
    let span = tracing::Span::current();
    thread::Builder::new().name("control".into()).spawn(move || {
        let _entered = span.enter();
        if let Err(error) = serve(socket, files, machine, ending.clone(), phases) {
            tracing::error!(error = crate::chain(&error), "The control API ended");
            ending.end(ExitReason::Failed);
        }
    })?;
    Ok(())
}

fn serve(
    socket: UnixStream,
    files: Option<FileChannel>,
    machine: Running,
    ending: Arc<Ending>,
    phases: Phases,
) -> Result<(), ControlError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    seccomp::install(ThreadKind::Control)?;
    socket.set_nonblocking(true)?;
    runtime.block_on(async {
        let (socket, stop) = socket::ControlSocket::new(tokio::net::UnixStream::from_std(socket)?, ending);
        server::serve(socket, server::Control::new(machine, files, phases, stop)).await.map_err(ControlError::Serve)
    })
}
