//! The shim's peers of a pod: VMM, fs daemon and agent, each behind a typed client whose every call has a deadline.

pub(crate) mod agent;
pub(crate) mod dial;
pub(crate) mod fs;
pub(crate) mod helper;
pub(crate) mod tail;
pub(crate) mod vmm;

use std::io;
use std::time::Duration;

use containerd_shim_protos::ttrpc::{self, Code};
use husk_agent_api::hello::HelloError;
use thiserror::Error;

/// Why a peer could not be started, reached, or did not do what it was asked.
#[derive(Debug, Error)]
pub(crate) enum PeerError {
    /// A process could not be started.
    #[error("cannot start {name}: {doing}")]
    Spawn {
        /// The program.
        name: &'static str,
        /// What failed.
        doing: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A local socket or descriptor.
    #[error("cannot {doing}")]
    Socket {
        /// What failed.
        doing: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The peer refused or failed.
    #[error("{peer} cannot {call}: {message}")]
    Refused {
        /// Who.
        peer: &'static str,
        /// What it was asked.
        call: &'static str,
        /// Its answer's code.
        code: Code,
        /// Its answer's words.
        message: String,
    },
    /// The connection failed or ended.
    #[error("the connection to {peer} failed: {call}")]
    Connection {
        /// Who.
        peer: &'static str,
        /// What it was asked.
        call: &'static str,
        /// Why.
        #[source]
        source: ttrpc::Error,
    },
    /// No answer in time.
    #[error("waited {limit:?} for {what}")]
    Deadline {
        /// What was awaited.
        what: &'static str,
        /// How long.
        limit: Duration,
    },
    /// Too many connections are awaited.
    #[error("{0} connections of the guest are awaited already")]
    TooManyExpected(usize),
    /// The connection was dropped before it came.
    #[error("the virtual machine ended before it connected {0}")]
    NotDialled(&'static str),
    /// The agent is not the one that was started.
    #[error("the guest's agent said a wrong hello")]
    Hello(#[from] HelloError),
}

impl PeerError {
    /// The status code for containerd: the agent's own for what it refused.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Refused { code, .. } => *code,
            Self::Deadline { .. } => Code::DEADLINE_EXCEEDED,
            Self::Connection { .. } | Self::NotDialled(_) => Code::UNAVAILABLE,
            _ => Code::INTERNAL,
        }
    }

    /// Whether the peer said that there is no such thing.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code: Code::NOT_FOUND, .. })
    }

    /// The error of a ttrpc call.
    fn of_call(peer: &'static str, call: &'static str, limit: Duration, error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) if status.code() == Code::DEADLINE_EXCEEDED => {
                Self::Deadline { what: call, limit }
            }
            ttrpc::Error::RpcStatus(status) => {
                Self::Refused { peer, call, code: status.code(), message: status.message().to_owned() }
            }
            source => Self::Connection { peer, call, source },
        }
    }
}
