//! A process's streams: containerd's FIFOs (or `binary:` and `file:` loggers) on one side, vsock connections of the guest on the
//! other, joined by copying with back-pressure both ways.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_agent_api::agent::Stdio;
use thiserror::Error;
use tokio::io::{AsyncBufReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tracing::{debug, warn};

use super::delivery::{Delivery, Progress};
use super::logger::Logger;
use crate::peer::PeerError;
use crate::peer::dial::{Dial, Expected};

/// Bytes copied at a time: what a pipe holds by default.
const CHUNK: usize = 64 << 10;

/// Longest wait for the guest's connections after the agent has said that it made them.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Longest wait for containerd to open its end of an output FIFO.
const READER_LIMIT: Duration = Duration::from_secs(10);

/// Longest time in which containerd takes nothing of a deleted process's output.
const DRAIN_STALL: Duration = Duration::from_secs(2);

/// Where containerd wants a process's streams; empty is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Paths {
    /// A FIFO.
    pub(crate) stdin: String,
    /// A FIFO or a logger's URI.
    pub(crate) stdout: String,
    /// A FIFO or a logger's URI; unused with a terminal.
    pub(crate) stderr: String,
    /// Whether the process has a terminal.
    pub(crate) terminal: bool,
}

/// Why streams could not be joined.
#[derive(Debug, Error)]
pub(crate) enum StdioError {
    /// A FIFO or file.
    #[error("cannot open the {stream} {path}", path = path.display())]
    Open {
        /// Which stream.
        stream: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A URI that husk doesn't know.
    #[error("cannot use {0} for a stream: fifo, file and binary are possible")]
    Scheme(String),
    /// The logger's program.
    #[error("cannot start the logger {program}: {doing}", program = program.display())]
    Logger {
        /// Its path.
        program: PathBuf,
        /// What failed.
        doing: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The guest's end.
    #[error("cannot connect the process's streams")]
    Guest(#[from] PeerError),
}

/// One end of an output stream on the host.
struct Output {
    writer: Box<dyn AsyncWrite + Send + Unpin>,
    /// The FIFO behind it, if it is one.
    fifo: Option<PathBuf>,
}

/// Where an output goes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Target {
    Fifo(PathBuf),
    File(PathBuf),
    Binary {
        /// What follows `binary://`.
        uri: String,
        /// Whether the logger must say that it is ready (`binary-v2`); else its silence is enough.
        says_ready: bool,
    },
}

impl Target {
    /// Reads a path or URI of containerd's; nothing for an empty one.
    pub(super) fn parse(text: &str) -> Result<Option<Self>, StdioError> {
        if text.is_empty() {
            return Ok(None);
        }
        Ok(Some(match text.split_once("://") {
            None | Some(("fifo", _)) => Self::Fifo(text.strip_prefix("fifo://").unwrap_or(text).into()),
            Some(("file", path)) => Self::File(path.into()),
            Some((scheme @ ("binary" | "binary-v2"), rest)) => {
                Self::Binary { uri: rest.to_owned(), says_ready: scheme == "binary-v2" }
            }
            Some(_) => return Err(StdioError::Scheme(text.to_owned())),
        }))
    }
}

/// The host's ends, open, and the ports on which the guest's are awaited.
pub(crate) struct Pending {
    stdin: Option<(Expected, pipe::Receiver, OwnedFd)>,
    stdout: Option<(Expected, Output)>,
    stderr: Option<(Expected, Output)>,
    logger: Option<Logger>,
    terminal: bool,
}

impl Pending {
    /// Opens the host's ends and a port for each.
    pub(crate) async fn open(paths: &Paths, dial: &Dial, namespace: &str, id: &str) -> Result<Self, StdioError> {
        let stdin = match paths.stdin.as_str() {
            "" => None,
            path => {
                let (read, write) = open_stdin(Path::new(path))?;
                Some((dial.expect_stream()?, read, write))
            }
        };
        let stdout = Target::parse(&paths.stdout)?;
        let stderr = if paths.terminal { None } else { Target::parse(&paths.stderr)? };
        let mut logger = None;
        let (stdout, stderr) = if let Some(Target::Binary { uri, says_ready }) = &stdout {
            // One logger takes both streams, as containerd's own shims have it.
            let started = Logger::start(uri, *says_ready, namespace, id).await?;
            let (out, err) = (started.stdout, started.stderr);
            logger = Some(started.logger);
            (Some(Output::of(out)), (!paths.terminal).then(|| Output::of(err)))
        } else {
            (open_output("stdout", stdout).await?, open_output("stderr", stderr).await?)
        };
        let expect = |output: Option<Output>| match output {
            Some(output) => dial.expect_stream().map(|expected| Some((expected, output))),
            None => Ok(None),
        };
        Ok(Self { stdin, stdout: expect(stdout)?, stderr: expect(stderr)?, logger, terminal: paths.terminal })
    }

    /// What the agent is told.
    pub(crate) fn request(&self, size: Option<(u32, u32)>) -> Stdio {
        let (width, height) = size.unwrap_or_default();
        Stdio {
            stdin_port: self.stdin.as_ref().map_or(0, |(expected, _, _)| expected.port),
            stdout_port: self.stdout.as_ref().map_or(0, |(expected, _)| expected.port),
            stderr_port: self.stderr.as_ref().map_or(0, |(expected, _)| expected.port),
            terminal: self.terminal,
            width,
            height,
            ..Default::default()
        }
    }

    /// Joins both ends, after the agent has made its connections.
    pub(crate) async fn join(self) -> Result<Streams, StdioError> {
        let mut copies = JoinSet::new();
        let mut deliveries = Deliveries::default();
        for (stream, pending, delivery) in
            [("stdout", self.stdout, &mut deliveries.stdout), ("stderr", self.stderr, &mut deliveries.stderr)]
        {
            if let Some((expected, output)) = pending {
                let guest = expected.stream(stream, CONNECT_LIMIT).await?;
                let (progress, seen) = watch::channel(Progress::default());
                *delivery = Some(Delivery::new(seen, output.fifo.clone()));
                copies.spawn(copy_output(stream, guest, output.writer, progress));
            }
        }
        let stdin = match self.stdin {
            Some((expected, read, write)) => {
                let guest = expected.stream("stdin", CONNECT_LIMIT).await?;
                Some(Input { keeper: Some(write), copy: tokio::spawn(copy_input(read, guest)) })
            }
            None => None,
        };
        Ok(Streams { copies, deliveries, stdin, logger: self.logger })
    }
}

/// The joined streams of a process.
#[derive(Debug)]
pub(crate) struct Streams {
    /// Of its outputs.
    copies: JoinSet<()>,
    deliveries: Deliveries,
    stdin: Option<Input>,
    logger: Option<Logger>,
}

/// How far a process's outputs are.
#[derive(Clone, Debug, Default)]
pub(super) struct Deliveries {
    stdout: Option<Delivery>,
    stderr: Option<Delivery>,
}

/// Bytes of a process's outputs: those that were written up to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    /// On stdout.
    pub(crate) stdout: u64,
    /// On stderr.
    pub(crate) stderr: u64,
}

impl Written {
    /// To the outputs' own end, which is there once the last writer is gone.
    pub(crate) const ALL: Self = Self { stdout: u64::MAX, stderr: u64::MAX };
}

impl Deliveries {
    /// Waits until that much is with containerd, or all there is; false if before that containerd takes nothing for as long as `stall`.
    pub(super) async fn wait(self, written: Written, stall: Duration) -> bool {
        let wait = async |delivery: Option<Delivery>, bytes| match delivery {
            Some(delivery) => delivery.wait(bytes, stall).await,
            None => true,
        };
        let (stdout, stderr) = tokio::join!(wait(self.stdout, written.stdout), wait(self.stderr, written.stderr));
        stdout && stderr
    }
}

/// The joined stdin. The shim keeps a writer of the FIFO itself, so that clients may come, go and come back (`attach`, containerd's
/// restart); the process sees the end only when containerd says so and every writer has closed.
#[derive(Debug)]
struct Input {
    keeper: Option<OwnedFd>,
    copy: JoinHandle<()>,
}

impl Streams {
    /// containerd's CloseIO: once every client has closed the FIFO and it is drained, the process sees the end of its input.
    pub(crate) fn close_stdin(&mut self) {
        if let Some(input) = &mut self.stdin {
            input.keeper = None;
        }
    }

    /// How far the outputs are.
    pub(super) fn deliveries(&self) -> Deliveries {
        self.deliveries.clone()
    }

    /// Waits until that much of the output is with containerd, then closes everything.
    pub(crate) async fn drain(mut self, id: &str, written: Written) {
        if !self.deliveries().wait(written, DRAIN_STALL).await {
            warn!("output of {id} is not taken for {DRAIN_STALL:?} after its end; the rest is dropped");
        }
        // What it has left running may go on writing.
        self.copies.shutdown().await;
        if let Some(logger) = self.logger.take() {
            logger.finish();
        }
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        if let Some(input) = &self.stdin {
            input.copy.abort();
        }
    }
}

/// Opens the stdin FIFO: the reading end, and the writer that is kept until CloseIO.
fn open_stdin(path: &Path) -> Result<(pipe::Receiver, OwnedFd), StdioError> {
    let failed = |source| StdioError::Open { stream: "stdin", path: path.to_owned(), source };
    let read = pipe::OpenOptions::new().open_receiver(path).map_err(failed)?;
    let write =
        OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path).map_err(failed)?;
    Ok((read, write.into()))
}

/// Opens an output.
async fn open_output(stream: &'static str, target: Option<Target>) -> Result<Option<Output>, StdioError> {
    match target {
        None => Ok(None),
        Some(Target::Binary { uri, .. }) => Err(StdioError::Scheme(format!("binary://{uri} (as {stream} alone)"))),
        Some(Target::File(path)) => open_file(stream, &path).await.map(Some),
        Some(Target::Fifo(path)) => {
            let failed = |source| StdioError::Open { stream, path: path.clone(), source };
            let kind = tokio::fs::metadata(&path).await.map_err(failed)?.file_type();
            if !kind.is_fifo() {
                return open_file(stream, &path).await.map(Some);
            }
            // Held until our own is open: a reader that sees the last writer go takes that for the end.
            let _writer = await_reader(&path).await.map_err(failed)?;
            // With a reader of our own the pipe outlives containerd's: it may restart, or turn its log over, and open the FIFO again.
            let fifo = pipe::OpenOptions::new().read_write(true).open_sender(&path).map_err(failed)?;
            Ok(Some(Output { fifo: Some(path), ..Output::of(fifo) }))
        }
    }
}

/// Opens a log file to append to, in a folder that may have to be made.
async fn open_file(stream: &'static str, path: &Path) -> Result<Output, StdioError> {
    let opening = async {
        if let Some(parent) = path.parent() {
            tokio::fs::create_dir_all(parent).await?;
        }
        tokio::fs::OpenOptions::new().append(true).create(true).open(path).await
    };
    opening.await.map(Output::of).map_err(|source| StdioError::Open { stream, path: path.to_owned(), source })
}

impl Output {
    fn of(writer: impl AsyncWrite + Send + Unpin + 'static) -> Self {
        Self { writer: Box::new(writer), fifo: None }
    }
}

/// Waits until someone has the FIFO open for reading, else what a quick process writes would be lost with our own reader. The file
/// that comes back is a writer of it.
async fn await_reader(path: &Path) -> io::Result<std::fs::File> {
    match OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path) {
        // ENXIO: nobody reads yet (fifo(7)).
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {}
        other => return other,
    }
    let blocking_path = path.to_owned();
    let opening = tokio::task::spawn_blocking(move || OpenOptions::new().write(true).open(blocking_path));
    match tokio::time::timeout(READER_LIMIT, opening).await {
        Ok(done) => done.map_err(io::Error::other)?,
        Err(_) => {
            warn!("nobody reads {} after {READER_LIMIT:?}", path.display());
            // Opening both ends lets the waiting thread go.
            OpenOptions::new().read(true).write(true).open(path)
        }
    }
}

/// Guest to containerd, to the end.
async fn copy_output(
    stream: &'static str,
    guest: UnixStream,
    mut to: Box<dyn AsyncWrite + Send + Unpin>,
    progress: watch::Sender<Progress>,
) {
    let mut guest = BufReader::with_capacity(CHUNK, guest);
    let copying = async {
        loop {
            let chunk = guest.fill_buf().await?;
            if chunk.is_empty() {
                return io::Result::Ok(());
            }
            // Each part that a slow reader lets in is progress.
            let length = to.write(chunk).await?;
            if length == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            to.flush().await?;
            guest.consume(length);
            progress.send_modify(|progress| progress.bytes += length as u64);
        }
    };
    if let Err(error) = copying.await {
        debug!("the copying of {stream} ended: {error}");
    }
}

/// containerd to guest, to the end, which is passed on.
async fn copy_input(fifo: pipe::Receiver, mut guest: UnixStream) {
    if let Err(error) = tokio::io::copy_buf(&mut BufReader::with_capacity(CHUNK, fifo), &mut guest).await {
        debug!("the copying of stdin ended: {error}");
    }
    let _ = guest.shutdown().await;
    // The socket is kept until the agent has closed its end, or the process's streams are closed.
    let _ = guest.readable().await;
}

#[cfg(test)]
#[path = "stdio_tests.rs"]
mod tests;
