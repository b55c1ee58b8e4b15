//! husk-agent: process 1 of the guest. It mounts what it needs, dials the shim, and serves the agent's API until the connection
//! ends; then the machine is powered off. The same program is the maker of containers (`cell`).

mod apparmor;
mod boot;
mod cell;
mod container;
mod descriptor;
mod dial;
mod disk;
mod events;
mod forward;
mod huge;
mod listen;
mod log;
mod memory;
mod net;
mod oom;
mod pod;
mod process;
mod reaper;
mod rpc;
mod session;
mod shutdown;
mod stats;
mod stdio;
mod sysctl;
mod template;
mod user;

use std::fmt::Display;
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use dial::Dialler;
use nix::sys::signal::{SigHandler, Signal, signal};
use shutdown::Machine;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["cell", ..] => {
            // What is ignored stays so over exec, SIGPIPE by Rust's start-up code, and containers expect the defaults.
            for signal_number in Signal::iterator() {
                // SAFETY: it installs no handler, and there is no other thread. SIGKILL and SIGSTOP refuse.
                let _ = unsafe { signal(signal_number, SigHandler::SigDfl) };
            }
            husk_cell::child::main()
        }
        ["serve", directory] => serve(directory),
        _ if std::process::id() == 1 => init(),
        _ => {
            eprintln!(
                "husk-agent is process 1 of a husk VM; for tests: husk-agent serve DIRECTORY, the connection as standard input"
            );
            ExitCode::from(2)
        }
    }
}

/// Process 1. It never returns: the kernel panics when its init ends.
fn init() -> ! {
    let machine = Machine::PowerOff;
    shutdown::on_panic(machine);
    if let Err(error) = run(Dialler::Vsock, None) {
        eprintln!("husk-agent: {error}");
    }
    machine.off()
}

/// For tests: serves the connection given as standard input and takes streams from Unix sockets `<directory>/<port>`, in a machine
/// that others have set up and that is not powered off.
fn serve(directory: &str) -> ExitCode {
    use std::os::fd::AsFd;
    let outcome = std::io::stdin().as_fd().try_clone_to_owned().map_err(display).and_then(|connection| {
        log::start("husk.log=debug");
        run(Dialler::Unix(directory.into()), Some(connection))
    });
    if let Err(error) = outcome {
        eprintln!("husk-agent: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Boots (unless a connection is given), serves, and returns when the connection has ended and every container is killed.
fn run(dialler: Dialler, connection: Option<OwnedFd>) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(display)?;
    let outcome = runtime.block_on(async {
        let machine = if connection.is_some() { Machine::Exit } else { Machine::PowerOff };
        // The handler stands before the first child can end.
        let children = reaper::Children::new().map_err(display)?;
        let connection = match connection {
            Some(connection) => dial::from_descriptor(connection).map_err(display)?,
            None => {
                // It runs when the boot first waits.
                tokio::spawn(forward::serve());
                boot::boot(&dialler).await.map_err(display)?
            }
        };
        rpc::serve(connection, dialler, children, machine).await.map_err(display)
    });
    // Not waiting for threads that wait for a container.
    runtime.shutdown_background();
    outcome
}

/// An error with all its causes, on one line.
fn display(error: impl std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}

/// One line from an error and what was being done.
fn context(what: impl Display, error: impl std::error::Error) -> String {
    format!("{what}: {}", display(error))
}
