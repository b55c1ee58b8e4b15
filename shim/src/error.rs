//! What goes wrong in the shim, as containerd sees it: each kind has a ttrpc status code, and the message is the whole chain of causes.

use containerd_shim_protos::ttrpc::{self, Code};
use thiserror::Error;

use crate::apparmor::ProfileError;
use crate::cgroup::CgroupError;
use crate::container::stdio::StdioError;
use crate::id::IdError;
use crate::peer::PeerError;
use crate::pod::create::BootError;
use crate::spec::SpecError;
use crate::storage::StorageError;

/// Why a request of containerd failed.
#[derive(Debug, Error)]
pub(crate) enum Error {
    /// No such container or process.
    #[error("{what} {id} does not exist")]
    NotFound {
        /// Kind of thing.
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// There is one already.
    #[error("{what} {id} exists already")]
    AlreadyExists {
        /// Kind of thing.
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// The process has ended.
    #[error("process {id} has already finished")]
    Finished {
        /// Its id.
        id: String,
    },
    /// It is not in the state that the request needs.
    #[error("cannot {doing} {id}: it is {state}")]
    State {
        /// What was asked.
        doing: &'static str,
        /// Of what.
        id: String,
        /// What it is instead.
        state: &'static str,
    },
    /// The pod's machine is not there (any more).
    #[error("cannot {doing}: the pod's virtual machine is not running{cause}")]
    Down {
        /// What was asked.
        doing: &'static str,
        /// ": why", or nothing.
        cause: String,
    },
    /// husk does not do this.
    #[error("{0}")]
    Unsupported(&'static str),
    /// Something took too long.
    #[error("waited {limit:?} for {what}")]
    Late {
        /// What was awaited.
        what: &'static str,
        /// How long.
        limit: std::time::Duration,
    },
    /// A message that can't be understood.
    #[error("cannot understand the {what}")]
    Message {
        /// Which part.
        what: &'static str,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A bad id.
    #[error(transparent)]
    Id(#[from] IdError),
    /// A spec that can't be run.
    #[error("the container's OCI spec cannot be run in a virtual machine")]
    Spec(#[from] SpecError),
    /// The pod did not start.
    #[error("the pod's virtual machine did not start")]
    Boot(#[from] Box<BootError>),
    /// An AppArmor profile.
    #[error("the process cannot run under its AppArmor profile")]
    Profile(#[from] ProfileError),
    /// The container's streams.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// The container's files.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The agent or the VMM.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The pod's cgroup.
    #[error("cannot keep the pod to the CPUs and memory nodes that its containers name")]
    Cgroup(#[from] CgroupError),
    /// What the pod takes of the host.
    #[error("cannot read what the pod takes of the host")]
    Figures(#[source] CgroupError),
    /// A memory limit for which the machine would have to be larger than the host.
    #[error(
        "the new limit of {limit} bytes of memory would let the pod's virtual machine grow to {wanted_mib} MiB, and {has_mib} MiB is the most \
         that this host can give it"
    )]
    BeyondHost {
        /// Bytes.
        limit: i64,
        /// What the machine could then grow to.
        wanted_mib: u64,
        /// What is possible.
        has_mib: u64,
    },
    /// A limit that the machine can't follow.
    #[error(
        "the new limit of {wanted} is more than the pod's virtual machine has ({has}), which does not grow: start the pod anew with it"
    )]
    Beyond {
        /// What was asked for.
        wanted: String,
        /// What there is.
        has: String,
    },
    /// Work that was cut off.
    #[error("the work on the request ended early")]
    Cut(#[from] tokio::task::JoinError),
}

impl Error {
    /// The status code that containerd expects for this kind.
    fn code(&self) -> Code {
        match self {
            Self::NotFound { .. } | Self::Finished { .. } => Code::NOT_FOUND,
            Self::AlreadyExists { .. } => Code::ALREADY_EXISTS,
            Self::State { .. } | Self::Down { .. } => Code::FAILED_PRECONDITION,
            Self::Late { .. } => Code::DEADLINE_EXCEEDED,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Id(_) | Self::Spec(_) | Self::Message { .. } | Self::Beyond { .. } | Self::BeyondHost { .. } => {
                Code::INVALID_ARGUMENT
            }
            Self::Peer(error) => error.code(),
            Self::Boot(error) => error.code(),
            Self::Profile(ProfileError::Peer(error)) => error.code(),
            Self::Profile(ProfileError::Read { .. } | ProfileError::Cut(_)) => Code::INTERNAL,
            Self::Profile(_) => Code::INVALID_ARGUMENT,
            Self::Stdio(_) | Self::Storage(_) | Self::Cgroup(_) | Self::Figures(_) | Self::Cut(_) => Code::INTERNAL,
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        ttrpc::error::get_rpc_status(error.code(), chain(&error))
    }
}

/// The message of an error and of every cause behind it.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_the_whole_chain_and_the_right_code() {
        let error = Error::Spec(SpecError::Hooks("createRuntime"));
        match ttrpc::Error::from(error) {
            ttrpc::Error::RpcStatus(status) => {
                assert_eq!(status.code(), Code::INVALID_ARGUMENT);
                assert!(status.message().contains("cannot be run in a virtual machine: "), "{}", status.message());
                assert!(status.message().contains("createRuntime"), "{}", status.message());
            }
            other => panic!("{other}"),
        }
    }
}
