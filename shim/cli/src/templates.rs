//! `husk template`: templates are the shim's, which has all that is needed to list, build and remove them.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use clap::Subcommand;
use serde_json::{Value, json};

/// The shim's program, beside this one.
const SHIM: &str = "containerd-shim-husk-v2";

/// What to do with templates.
#[derive(Debug, Subcommand)]
pub(crate) enum Action {
    /// List the templates of this machine.
    ///
    /// For each: its name (vCPUs, memory, and a number that stands for all else that shaped it), what it takes of the disk, its age, and
    /// whether pods start from it. One that was made with another kernel, initramfs, VMM, processor, host kernel or configuration is
    /// not used, and goes with the next build.
    #[command(
        after_help = "Examples:\n  husk template list\n  husk template list --json | jq '.[] | select(.usable | not)'"
    )]
    List {
        /// Print JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Build a template now, and wait for it.
    ///
    /// Pods build theirs in the background after the first cold start of a size (unless the configuration says otherwise); this is for
    /// nodes whose first pods should start fast too. It takes about as long as a cold start. If there is a sound one, nothing is done.
    #[command(after_help = "Examples:\n  husk template build\n  husk template build --vcpus 2 --memory-mib 576")]
    Build {
        /// vCPUs of the pods that are to start from it. Default: those of a pod that says nothing about its CPUs.
        #[arg(long, value_name = "N")]
        vcpus: Option<u8>,
        /// Memory in MiB of their virtual machines: a pod's limit and `memory_overhead_mib` of the configuration. Default: that of a
        /// pod that says nothing about its memory.
        #[arg(long, value_name = "MIB")]
        memory_mib: Option<u64>,
    },
    /// Remove templates; running pods have nothing of them any more.
    #[command(after_help = "Examples:\n  husk template remove 1cpu-256mib-0123abcd\n  husk template remove --all")]
    Remove {
        /// Their names, as `husk template list` shows them.
        #[arg(value_name = "NAME", required_unless_present = "all")]
        names: Vec<String>,
        /// Remove all of them.
        #[arg(long, conflicts_with = "names")]
        all: bool,
    },
}

impl Action {
    /// As the shim reads it (shim/src/template/command.rs).
    fn request(&self) -> Value {
        match self {
            Self::List { json } => json!({ "list": { "json": json } }),
            Self::Build { vcpus, memory_mib } => {
                json!({ "build": { "vcpus": vcpus, "memory_mib": memory_mib, "background": null } })
            }
            Self::Remove { names, all } => json!({ "remove": { "names": names, "all": all } }),
        }
    }
}

/// Becomes the shim's program; returns only if that can't be.
pub(crate) fn run(action: &Action) -> String {
    match shim() {
        Ok(shim) => {
            let error = Command::new(&shim).arg("template").arg(action.request().to_string()).exec();
            format!("cannot run {}: {error}", shim.display())
        }
        Err(error) => format!("cannot find this program's own directory: {error}"),
    }
}

fn shim() -> io::Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name(SHIM))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_as_the_shim_reads_them() {
        let build = Action::Build { vcpus: Some(2), memory_mib: None };
        assert_eq!(build.request().to_string(), r#"{"build":{"background":null,"memory_mib":null,"vcpus":2}}"#);
        assert_eq!(Action::List { json: true }.request().to_string(), r#"{"list":{"json":true}}"#);
        let remove = Action::Remove { names: vec!["x".to_owned()], all: false };
        assert_eq!(remove.request().to_string(), r#"{"remove":{"all":false,"names":["x"]}}"#);
    }
}
