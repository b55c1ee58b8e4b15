//! `husk-fs --config-fd N`: serves a pod's share directory to its VM until the vhost-user front end disconnects, then exits with 0.

use std::error::Error;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use husk_fs::backend::{Backend, Daemon, Memory};
use husk_fs::config::Config;
use husk_fs::server::Server;
use husk_fs::sys::open::{SelfFd, directory_path};
use husk_jail::FsJail;
use husk_jail::seccomp::{self, ThreadKind};
use vhost::vhost_user::{Error as VhostError, Listener};
use vhost_user_backend::Error as BackendError;
use vm_memory::GuestMemoryMmap;

/// The file system daemon of one husk pod. It is started by the shim.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Number of an inherited descriptor from which the configuration (JSON) is read to its end.
    #[arg(long)]
    config_fd: RawFd,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = error.to_string();
            let mut cause = error.source();
            while let Some(error) = cause {
                text = format!("{text}: {error}");
                cause = error.source();
            }
            eprintln!("husk-fs: {text}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    let config = Config::read(arguments.config_fd)?;
    start_log(&config.id);
    let listener = config.listener()?;
    // Taken before /proc is out of sight.
    let own = SelfFd::open()?;
    enter_jail(&config.root, &[listener.as_raw_fd(), own.raw()])?;
    let server = Server::new(directory_path(c"/")?, own)?;

    let memory = Memory::new(GuestMemoryMmap::new());
    let backend = Arc::new(Backend::new(server, memory.clone(), config.request_queues));
    // Starts the queues' threads, which put up their own filter.
    let mut daemon = Daemon::new("vhost-user".to_owned(), backend, memory).map_err(|error| error.to_string())?;
    // The thread that speaks vhost-user is started behind it and inherits it.
    seccomp::install(ThreadKind::FsMain)?;
    daemon.start(&mut Listener::from(listener)).map_err(|error| error.to_string())?;
    tracing::debug!("the front end is connected");
    let end = daemon.wait();
    // Dropping it would wait for the queues' threads, and one of them may be stuck in a dead network file system.
    std::mem::forget(daemon);
    match end {
        Ok(()) | Err(BackendError::HandleRequest(VhostError::Disconnected | VhostError::PartialMessage)) => Ok(()),
        Err(error) => Err(error.to_string().into()),
    }
}

/// Enters the jail, after which `/` is the share.
fn enter_jail(root: &Path, keep: &[RawFd]) -> Result<(), Box<dyn Error>> {
    let identity = |path: &Path| std::fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    let share = identity(root)?;
    husk_jail::enter_fs(&FsJail { root, keep })?;
    if identity(Path::new("/"))? != share {
        return Err("The jail's root is not the share".into());
    }
    Ok(())
}

/// Logs to stderr, a line an event, each with the pod's id; RUST_LOG filters.
fn start_log(id: &str) {
    let prefix = format!("pod={id} ");
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::builder()
                .with_default_directive(tracing_subscriber::filter::LevelFilter::INFO.into())
                .from_env_lossy(),
        )
        .with_ansi(false)
        .with_writer(move || Line { prefix: prefix.clone() })
        .init();
}

/// Writes one event with the prefix before it.
struct Line {
    prefix: String,
}

impl Write for Line {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        // One write, so that lines of several threads do not mix.
        let mut line = std::mem::take(&mut self.prefix).into_bytes();
        line.extend_from_slice(event);
        io::stderr().write_all(&line)?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
