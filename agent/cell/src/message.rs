//! The words between the agent and a cell: JSON messages with descriptors over a seqpacket socket.
//!
//! The agent sends one [`Instruction`] (in a memfd, for it may be larger than a socket's message), the cell answers by [`Report`]s.

use std::{
    fs::File,
    io::{IoSlice, IoSliceMut, Read, Seek},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
    time::Instant,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        memfd::{MFdFlags, memfd_create},
        socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
    },
};
use oci_spec::runtime::{LinuxSeccomp, Process, Spec};
use serde::{Deserialize, Serialize};

use crate::PodNamespaces;

/// The largest instruction, bytes. A spec with seccomp profile is about 100 KiB.
pub(crate) const MAX_INSTRUCTION: u64 = 8 << 20;
/// The largest report, bytes.
const MAX_REPORT: usize = 16 << 10;
/// The most descriptors in one message: instruction, cgroup, three streams, eight namespaces.
const MAX_FDS: usize = 16;

/// What a cell is told. The descriptors beside it, in this order: its own memfd, the cgroup's directory (not for a pause), the
/// streams (unless there is a terminal), one for each of `namespaces`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Instruction {
    pub(crate) task: Task,
    /// Columns and rows, if the process gets a terminal.
    pub(crate) terminal: Option<(u16, u16)>,
    /// CLONE_NEW* of each namespace to join, whose descriptors come along.
    pub(crate) namespaces: Vec<i32>,
    /// The AppArmor profile to enter at exec, known to be loaded.
    pub(crate) apparmor: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Task {
    /// Make a container.
    Create { spec: Box<Spec> },
    /// Make a process in a container.
    Exec { process: Box<Process>, seccomp: Option<Box<LinuxSeccomp>> },
    /// Be the init of the pod's shared pid namespace, and with `pod` the first in its other namespaces.
    Pause { pod: Option<Box<PodNamespaces>> },
}

/// What a cell says. `Born` and `Ready` come from two processes, in any order.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Report {
    /// The process is there, with this pid in the agent's eyes; its pidfd comes along.
    Born { pid: u32 },
    /// The process waits for the word to exec; its terminal's master comes along if it has one.
    Ready,
    /// It failed, and why. The process ends.
    Failed { cause: String },
}

/// One end of the socket.
#[derive(Debug)]
pub(crate) struct Channel(OwnedFd);

/// A failure on the channel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChannelError {
    #[error("the other side is gone")]
    Closed,
    #[error("the deadline has passed")]
    Deadline,
    #[error("{0}")]
    System(&'static str, #[source] Errno),
    #[error("{0}")]
    Json(&'static str, #[source] serde_json::Error),
}

impl Channel {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    pub(crate) fn send(&self, bytes: &[u8], fds: &[RawFd]) -> Result<(), ChannelError> {
        let rights = [ControlMessage::ScmRights(fds)];
        let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
        match sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(_) => Ok(()),
            Err(Errno::EPIPE | Errno::ECONNRESET) => Err(ChannelError::Closed),
            Err(errno) => Err(ChannelError::System("send a message", errno)),
        }
    }

    pub(crate) fn report(&self, report: &Report, fds: &[RawFd]) -> Result<(), ChannelError> {
        let bytes = serde_json::to_vec(report).map_err(|e| ChannelError::Json("write a report", e))?;
        self.send(&bytes, fds)
    }

    /// The next message; `None` as deadline waits for ever (only the process that waits for its start does).
    pub(crate) fn receive(&self, deadline: Option<Instant>) -> Result<(Vec<u8>, Vec<OwnedFd>), ChannelError> {
        self.wait(deadline)?;
        let mut bytes = vec![0; MAX_REPORT];
        let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
        let (length, fds) = {
            let mut iov = [IoSliceMut::new(&mut bytes)];
            let message = recvmsg::<()>(self.0.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
                .map_err(|e| {
                    if e == Errno::ECONNRESET {
                        ChannelError::Closed
                    } else {
                        ChannelError::System("receive a message", e)
                    }
                })?;
            let mut fds = Vec::new();
            for control in message.cmsgs().map_err(|e| ChannelError::System("read a message's descriptors", e))? {
                if let ControlMessageOwned::ScmRights(raw) = control {
                    // SAFETY: the kernel has just installed these descriptors for us.
                    fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
            }
            (message.bytes, fds)
        };
        if length == 0 {
            return Err(ChannelError::Closed);
        }
        bytes.truncate(length);
        Ok((bytes, fds))
    }

    fn wait(&self, deadline: Option<Instant>) -> Result<(), ChannelError> {
        loop {
            let timeout = match deadline {
                None => PollTimeout::NONE,
                Some(at) => {
                    let left = at.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(ChannelError::Deadline);
                    }
                    // Rounded up, so that the last turn does not spin.
                    PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX)
                }
            };
            match poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(ChannelError::System("wait for a message", errno)),
            }
        }
    }
}

impl Instruction {
    /// Into a memfd.
    pub(crate) fn pack(&self) -> Result<OwnedFd, ChannelError> {
        let memory = memfd_create(c"cell", MFdFlags::MFD_CLOEXEC)
            .map_err(|e| ChannelError::System("make the instruction's memfd", e))?;
        let mut file = std::io::BufWriter::new(File::from(memory));
        serde_json::to_writer(&mut file, self).map_err(|e| ChannelError::Json("write the instruction", e))?;
        let file = file.into_inner().map_err(|e| {
            ChannelError::System(
                "write the instruction",
                Errno::from_raw(e.error().raw_os_error().unwrap_or(libc::EIO)),
            )
        })?;
        Ok(file.into())
    }

    /// Out of a memfd.
    pub(crate) fn unpack(memory: OwnedFd) -> Result<Self, ChannelError> {
        let mut file = File::from(memory);
        let io = |e: std::io::Error| {
            ChannelError::System("read the instruction", Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))
        };
        file.rewind().map_err(io)?;
        let mut bytes = Vec::new();
        file.take(MAX_INSTRUCTION).read_to_end(&mut bytes).map_err(io)?;
        serde_json::from_slice(&bytes).map_err(|e| ChannelError::Json("understand the instruction", e))
    }
}
