//! What can go wrong on the parent's side, and the report that a child sends home.

use std::{io, path::PathBuf, time::Duration};

/// Failure to make a container or a process in it. The text is one line and fit for the caller of the RPC.
#[derive(Debug, thiserror::Error)]
pub enum CellError {
    /// The request can't be served as it is: the agent answers `INVALID_ARGUMENT`.
    #[error("{0}")]
    Invalid(String),
    /// The container's first process is gone, so nothing can be joined any more.
    #[error("the container is not running")]
    NotRunning,
    /// The child said what failed, causes included, e.g. `exec "/nope": no such file or directory`.
    #[error("{0}")]
    Child(String),
    /// The child ended without a word.
    #[error("the cell ended before it {awaited}")]
    Ended {
        /// What was waited for, as a verb in the past: "reported the process it made".
        awaited: &'static str,
    },
    /// The child took too long and was killed.
    #[error("no answer within {limit:?}: waited until the cell {awaited}")]
    Deadline {
        /// What was waited for.
        awaited: &'static str,
        /// For how long.
        limit: Duration,
    },
    /// A system call of the parent failed.
    #[error("{doing}")]
    System {
        /// What was being done to what.
        doing: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The child and the parent do not understand each other: a bug.
    #[error("{doing}")]
    Protocol {
        /// What was being read or written.
        doing: &'static str,
        /// What the JSON reader says.
        #[source]
        source: serde_json::Error,
    },
}

impl CellError {
    /// Wraps an error number with what was being done.
    pub(crate) fn system(doing: impl Into<String>) -> impl FnOnce(nix::Error) -> Self {
        let doing = doing.into();
        move |errno| Self::System { doing, source: errno.into() }
    }

    /// Wraps an I/O error with what was being done.
    pub(crate) fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::System { doing, source }
    }
}

/// Failure of work on a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The path or a figure is not acceptable: the agent answers `INVALID_ARGUMENT`.
    #[error("cgroup: {0}")]
    Invalid(String),
    /// A file or directory of the cgroup refused.
    #[error("cgroup: {doing} {path}")]
    File {
        /// "write \"max\" to", "read", "create", ...
        doing: String,
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// bpf(2) refused the device program.
    #[error("cgroup: {0} the device program")]
    Devices(&'static str, #[source] io::Error),
    /// The kernel did not get there in time.
    #[error("cgroup {path}: not {awaited} within {limit:?}")]
    Deadline {
        /// The cgroup.
        path: PathBuf,
        /// "frozen", "thawed", "empty".
        awaited: &'static str,
        /// For how long it was waited.
        limit: Duration,
    },
}
