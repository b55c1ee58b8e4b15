//! containerd-shim-husk-v2: containerd's shim for pods in virtual machines, runtime type `io.containerd.husk.v2`. One daemon a pod.

mod apparmor;
mod cgroup;
mod config;
mod container;
mod daemon;
mod error;
mod features;
mod id;
mod launch;
mod logging;
mod network;
mod peer;
mod pod;
mod random;
mod remove;
mod service;
mod spec;
mod storage;
mod template;
mod watch;

use std::io::Write;
use std::process::ExitCode;

use containerd_shim::Flags;
use containerd_shim_protos::protobuf::Message;

/// The runtime's name in containerd's configuration.
const RUNTIME: &str = "io.containerd.husk.v2";

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let outcome = match &arguments[..] {
        [action, request] if action == template::command::ACTION => {
            let done = template::command::run(&request.to_string_lossy()).map_err(|error| error::chain(&error));
            done.and_then(|text| print(text.as_bytes()))
        }
        _ => containerd_shim::parse(&arguments).map_err(|error| error.to_string()).and_then(|flags| run(&flags)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            let _ = writeln!(std::io::stderr(), "{RUNTIME}: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Does what the flags say; the error is a message with all its causes.
fn run(flags: &Flags) -> Result<(), String> {
    if flags.version {
        return print(format!("containerd-shim-husk-v2:\n  Version:  {}\n", env!("CARGO_PKG_VERSION")).as_bytes());
    }
    if flags.info {
        let info = features::info().map_err(|error| error.to_string())?;
        return print(&info.write_to_bytes().map_err(|error| error.to_string())?);
    }
    match flags.action.as_str() {
        "start" => match launch::start(flags).map_err(|error| error::chain(&error))? {
            Some(daemon) => daemon::run(daemon).map_err(|error| error::chain(&error)),
            None => Ok(()),
        },
        "delete" => print(&remove::delete(flags).map_err(|error| error::chain(&error))?),
        other => Err(format!("unknown action {other:?}: start and delete are possible")),
    }
}

fn print(bytes: &[u8]) -> Result<(), String> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(|error| format!("cannot write to stdout: {error}"))
}
