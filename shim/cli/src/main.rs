//! husk, the operator's command: can this machine run husk, what does it run, templates, shell completions.

mod check;
mod pods;
mod templates;

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

/// Looks after husk, the container runtime that runs each Kubernetes pod in a virtual machine of its own.
///
/// Pods are started by containerd through husk's shim (containerd-shim-husk-v2), not by this command. Begin with `husk check` on a
/// new node: it tells whether pods can run there and, where they can't, what to do.
#[derive(Parser)]
#[command(name = "husk", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Find out whether this machine can run husk, and what to do where it can't.
    ///
    /// Looks at the processor, the kernel, /dev/kvm, containerd and husk's own files, and runs a small virtual machine: the
    /// presence of /dev/kvm alone does not tell whether it can run a guest. Run it as root, as the shim runs.
    ///
    /// Each line begins with "ok", "missing" (pods can't run; the line below says how to mend it) or "note" (pods run, but
    /// something is worth knowing). Exit code: 0 if nothing is missing, else 1.
    #[command(after_help = "Examples:\n  husk check\n  husk check --json | jq '.checks[] | select(.status != \"ok\")'")]
    Check {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
        /// Look at KVM only: for scripts that choose where to run.
        #[arg(long)]
        kvm: bool,
    },
    /// List the pods that husk runs on this machine.
    ///
    /// For each pod: its id (as `crictl pods` shows it), containerd's namespace, the processes of the shim, the VMM and the fs daemon
    /// ("-" where one has ended), and the memory that they take together, in MiB (proportional set size: the guest's memory, which
    /// VMM and fs daemon share, is counted once). Run it as root.
    #[command(after_help = "Examples:\n  husk list\n  husk list --json | jq '.[].vmm'")]
    List {
        /// Print JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// List, build and remove templates, from which pods start in a fraction of a cold start's time.
    ///
    /// A template is a virtual machine that was saved once its agent was up; pods of the same size go on from it instead of booting.
    /// They lie in /var/lib/husk/templates. Nothing has to be done for them: this is for looking and for nodes that are prepared.
    /// Run it as root.
    Template {
        #[command(subcommand)]
        action: templates::Action,
    },
    /// Print a shell's completions for this command.
    #[command(after_help = "Example:\n  husk completion bash > /etc/bash_completion.d/husk")]
    Completion {
        /// The shell.
        shell: Shell,
    },
    /// Print the version.
    Version,
}

fn main() -> ExitCode {
    let mut out = std::io::stdout().lock();
    match Args::parse().command {
        Command::Check { json, kvm } => {
            let report = if kvm { check::run_kvm() } else { check::run() };
            let text = if json { report.json() } else { report.text() };
            if print(&mut out, text.as_bytes()) && report.usable() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Command::List { json } => match pods::list(Path::new(pods::ROOT)) {
            Ok(pods) => {
                let text = if json { pods::json(&pods) } else { pods::table(&pods) };
                code(print(&mut out, text.as_bytes()))
            }
            Err(error) => {
                eprintln!("husk: cannot list {}: {error}", pods::ROOT);
                ExitCode::FAILURE
            }
        },
        Command::Template { action } => {
            eprintln!("husk: {}", templates::run(&action));
            ExitCode::FAILURE
        }
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "husk", &mut script);
            code(print(&mut out, &script))
        }
        Command::Version => code(print(&mut out, concat!("husk ", env!("CARGO_PKG_VERSION"), "\n").as_bytes())),
    }
}

/// Writes all of `text`; false if nobody reads it (a closed pipe).
fn print(out: &mut impl Write, text: &[u8]) -> bool {
    out.write_all(text).and_then(|()| out.flush()).is_ok()
}

fn code(done: bool) -> ExitCode {
    if done { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_sound() {
        Args::command().debug_assert();
    }
}
