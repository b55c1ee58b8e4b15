//! How a VMM process ends: its exit code tells the shim why.

use std::fmt;

/// Why the VM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest powered itself off, or the shim asked for the end.
    PowerOff,
    /// The VMM failed; its last line of log says how.
    Failed,
    /// The guest reset itself (a reboot is the end of a pod).
    Reset,
    /// The guest's kernel panicked.
    Panic,
    /// The snapshot to go on from is damaged, or of another machine or processor; the last line of log says how.
    Snapshot,
}

impl ExitReason {
    /// The process's exit code.
    pub fn code(self) -> u8 {
        match self {
            Self::PowerOff => 0,
            Self::Failed => 1,
            Self::Reset => 3,
            Self::Panic => 4,
            Self::Snapshot => 5,
        }
    }

    /// The reason behind an exit code.
    pub fn from_code(code: i32) -> Self {
        match code {
            0 => Self::PowerOff,
            3 => Self::Reset,
            4 => Self::Panic,
            5 => Self::Snapshot,
            _ => Self::Failed,
        }
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PowerOff => "the guest powered off",
            Self::Failed => "the VMM failed",
            Self::Reset => "the guest reset itself",
            Self::Panic => "the guest's kernel panicked",
            Self::Snapshot => "the snapshot can't be used",
        })
    }
}
