//! A process's streams: pipes or a terminal on its side, a connection each on the shim's, and a task each that copies with back
//! pressure. Output is copied until the last writer has closed, however long the process itself has been gone.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use husk_agent_api::agent::Stdio;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::pty::Winsize;
use thiserror::Error;
use tokio::io::AsyncWriteExt;

use crate::descriptor::Descriptor;
use crate::dial::{Connection, Dialler};

/// Bytes copied at once: a pipe's capacity (pipe(7)). A buffer exists only while there is something to copy.
const BUFFER: usize = 64 * 1024;

/// Why a process has no streams.
#[derive(Debug, Error)]
pub(crate) enum StdioError {
    #[error("Could not make the pipes of a process")]
    Pipe(#[source] io::Error),
    #[error("Could not dial port {port} of the shim for a process's {stream}")]
    Dial {
        stream: &'static str,
        port: u32,
        #[source]
        source: io::Error,
    },
    #[error("Could not set up the copying of a process's streams")]
    Attach(#[source] io::Error),
    #[error("Could not resize the terminal")]
    Resize(#[source] Errno),
}

/// The agent's ends of the pipes.
#[derive(Default)]
pub(crate) struct Ends {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

/// The connections to the shim.
pub(crate) struct Connections {
    stdin: Option<Connection>,
    stdout: Option<Connection>,
    stderr: Option<Connection>,
}

/// What the cell gets, and the ends that stay here.
pub(crate) fn prepare(stdio: &Stdio) -> Result<(husk_cell::Stdio, Ends), StdioError> {
    if stdio.terminal {
        let (width, height) = (clamp(stdio.width), clamp(stdio.height));
        return Ok((husk_cell::Stdio::Terminal { width, height }, Ends::default()));
    }
    let mut ends = Ends::default();
    let pipe = |port: u32, ours: &mut Option<OwnedFd>, input: bool| -> io::Result<OwnedFd> {
        if port == 0 {
            return Ok(fs::OpenOptions::new().read(true).write(true).open("/dev/null")?.into());
        }
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        let (kept, given) = if input { (write, read) } else { (read, write) };
        *ours = Some(kept);
        Ok(given)
    };
    let stdin = pipe(stdio.stdin_port, &mut ends.stdin, true).map_err(StdioError::Pipe)?;
    let stdout = pipe(stdio.stdout_port, &mut ends.stdout, false).map_err(StdioError::Pipe)?;
    let stderr = pipe(stdio.stderr_port, &mut ends.stderr, false).map_err(StdioError::Pipe)?;
    Ok((husk_cell::Stdio::Fds { stdin, stdout, stderr }, ends))
}

/// Connects every stream that there is, all at once.
pub(crate) async fn dial(dialler: &Dialler, stdio: &Stdio) -> Result<Connections, StdioError> {
    let dial = async |stream, port| {
        if port == 0 {
            return Ok(None);
        }
        dialler.dial(port).await.map(Some).map_err(|source| StdioError::Dial { stream, port, source })
    };
    let stderr_port = if stdio.terminal { 0 } else { stdio.stderr_port };
    let (stdin, stdout, stderr) = tokio::try_join!(
        dial("stdin", stdio.stdin_port),
        dial("stdout", stdio.stdout_port),
        dial("stderr", stderr_port)
    )?;
    Ok(Connections { stdin, stdout, stderr })
}

/// What is kept of a process's streams.
#[derive(Default)]
pub(crate) struct Attached {
    /// Its terminal, if it has one.
    pub terminal: Option<Terminal>,
    /// Its pipes.
    pub outputs: Outputs,
}

/// Starts the copying. `master` is the terminal's, if there is one.
pub(crate) fn attach(ends: Ends, connections: Connections, master: Option<OwnedFd>) -> Result<Attached, StdioError> {
    let open = |end: OwnedFd| Descriptor::new(end).map_err(StdioError::Attach);
    if let Some(master) = master {
        let master = Arc::new(open(master)?);
        tokio::spawn(copy_terminal(master.clone(), connections.stdin, connections.stdout));
        return Ok(Attached { terminal: Some(Terminal { master }), outputs: Outputs::default() });
    }
    if let (Some(end), Some(connection)) = (ends.stdin, connections.stdin) {
        tokio::spawn(copy_input(open(end)?, connection));
    }
    let copy = |end: Option<OwnedFd>, connection: Option<Connection>| {
        let (Some(end), Some(connection)) = (end, connection) else { return Ok(None) };
        let output = Arc::new(Output { end: open(end)?, read: AtomicU64::new(0) });
        tokio::spawn(copy_output(output.clone(), connection));
        Ok(Some(output))
    };
    let stdout = copy(ends.stdout, connections.stdout)?;
    let stderr = copy(ends.stderr, connections.stderr)?;
    Ok(Attached { terminal: None, outputs: Outputs { stdout, stderr } })
}

/// A pipe that a process writes to.
struct Output {
    end: Descriptor,
    /// Bytes read so far.
    read: AtomicU64,
}

impl Output {
    /// Bytes written so far.
    fn written(&self) -> u64 {
        // Nothing is read between the two: all copying is on this one thread.
        let waiting = self.end.waiting().unwrap_or_else(|error| {
            tracing::warn!("Could not tell how much output waits: {error}");
            0
        });
        self.read.load(Ordering::Relaxed).saturating_add(waiting)
    }
}

/// The pipes that a process writes to.
#[derive(Default)]
pub(crate) struct Outputs {
    stdout: Option<Arc<Output>>,
    stderr: Option<Arc<Output>>,
}

/// Bytes that were written to a process's pipes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Written {
    pub stdout: u64,
    pub stderr: u64,
}

impl Outputs {
    /// What was written to them until now.
    pub(crate) fn written(&self) -> Written {
        let of = |output: &Option<Arc<Output>>| output.as_ref().map_or(0, |output| output.written());
        Written { stdout: of(&self.stdout), stderr: of(&self.stderr) }
    }
}

/// A process's terminal.
pub(crate) struct Terminal {
    master: Arc<Descriptor>,
}

mod ioctls {
    // ioctl_tty(2).
    nix::ioctl_write_ptr_bad!(set_window_size, nix::libc::TIOCSWINSZ, nix::pty::Winsize);
}

impl Terminal {
    /// Sets its size in characters.
    pub(crate) fn resize(&self, width: u32, height: u32) -> Result<(), StdioError> {
        let size = Winsize { ws_row: clamp(height), ws_col: clamp(width), ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the kernel reads one winsize and keeps no pointer.
        unsafe { ioctls::set_window_size(self.master.as_raw_fd(), &size) }.map_err(StdioError::Resize)?;
        Ok(())
    }
}

fn clamp(characters: u32) -> u16 {
    u16::try_from(characters).unwrap_or(u16::MAX)
}

async fn copy_input(end: Descriptor, connection: Connection) {
    // Either the shim has no more, or nobody is left to read it. What is dropped here is closed: the process sees the end of
    // its input, the shim that of the connection.
    tokio::select! {
        () = from_shim(&connection, &end) => {}
        () = end.readers_gone() => {}
    }
}

async fn copy_output(output: Arc<Output>, mut connection: Connection) {
    to_shim(&output.end, &output.read, Some(&mut connection)).await;
    // The shim may have closed it already.
    let _ = connection.shutdown().await;
}

async fn copy_terminal(master: Arc<Descriptor>, stdin: Option<Connection>, mut stdout: Option<Connection>) {
    let input = async {
        if let Some(stdin) = stdin {
            // The end of the input leaves the terminal open, as a terminal's line does.
            from_shim(&stdin, &master).await;
        }
        std::future::pending::<()>().await;
    };
    let read = AtomicU64::new(0);
    tokio::select! {
        () = to_shim(&master, &read, stdout.as_mut()) => {}
        () = input => {}
    }
    if let Some(mut stdout) = stdout {
        let _ = stdout.shutdown().await;
    }
}

/// Copies from a pipe or terminal to the shim until its end, and counts in `read`. Where the shim takes no more, the rest is read and dropped, so that
/// the process neither blocks nor dies of its log.
async fn to_shim(from: &Descriptor, read: &AtomicU64, mut to: Option<&mut Connection>) {
    while from.readable().await.is_ok() {
        let mut buffer = vec![0; BUFFER];
        loop {
            match from.try_read(&mut buffer) {
                Ok(0) => return,
                Ok(length) => {
                    read.fetch_add(length as u64, Ordering::Relaxed);
                    if let Some(connection) = &mut to
                        && let Err(error) = connection.write_all(&buffer[..length]).await
                    {
                        tracing::debug!("The shim takes no more output: {error}");
                        to = None;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::warn!("Could not read a process's output: {error}");
                    return;
                }
            }
            // A process that writes without pause must not keep the others from their turn.
            tokio::task::consume_budget().await;
        }
    }
}

/// Copies from the shim to a pipe or terminal until its end.
async fn from_shim(from: &Connection, to: &Descriptor) {
    while from.readable().await.is_ok() {
        let mut buffer = vec![0; BUFFER];
        loop {
            match from.try_read(&mut buffer) {
                Ok(0) => return,
                Ok(length) => {
                    if to.write_all(&buffer[..length]).await.is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
            tokio::task::consume_budget().await;
        }
    }
}

#[cfg(test)]
#[path = "stdio_tests.rs"]
mod tests;
