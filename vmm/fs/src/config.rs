//! The daemon's configuration: JSON on an inherited descriptor.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Most request queues: with the queue for FORGETs, as many as vhost-user-backend's 64-bit mask holds.
pub const MOST_QUEUES: u16 = 63;
/// Longest configuration in bytes.
const LONGEST: u64 = 64 << 10;

/// One share.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The pod's id, on every line of the log.
    pub id: String,
    /// The share directory.
    pub root: PathBuf,
    /// Number of the inherited, listening unix stream socket that the vhost-user front end connects to.
    pub socket: RawFd,
    /// Request queues, 1 to 63; each is served by a thread of its own.
    pub request_queues: u16,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The descriptor could not be read.
    #[error("Cannot read the configuration")]
    Read(#[source] std::io::Error),
    /// It is not what it should be.
    #[error("Cannot understand the configuration")]
    Parse(#[source] serde_json::Error),
    /// A value is out of its range.
    #[error("request_queues is {0}, but must be 1 to {MOST_QUEUES}")]
    Queues(u16),
    /// A number is no descriptor of ours.
    #[error("Descriptor {0} of the configuration is not open")]
    Descriptor(RawFd),
}

/// Takes over an inherited descriptor.
fn inherited(fd: RawFd) -> Result<OwnedFd, ConfigError> {
    // SAFETY: takes no memory; any number is allowed.
    if fd <= 2 || unsafe { libc::fcntl(fd, libc::F_GETFD) } == -1 {
        return Err(ConfigError::Descriptor(fd));
    }
    // SAFETY: it is open, and by the command line's contract it was made for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Config {
    /// Reads it from descriptor `fd` to the end and closes that.
    pub fn read(fd: RawFd) -> Result<Self, ConfigError> {
        let mut text = String::new();
        File::from(inherited(fd)?).take(LONGEST).read_to_string(&mut text).map_err(ConfigError::Read)?;
        Self::parse(&text)
    }

    /// Reads it from its text.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let config: Self = serde_json::from_str(text).map_err(ConfigError::Parse)?;
        if !(1..=MOST_QUEUES).contains(&config.request_queues) {
            return Err(ConfigError::Queues(config.request_queues));
        }
        Ok(config)
    }

    /// Takes over the listening socket; to be called once.
    pub fn listener(&self) -> Result<UnixListener, ConfigError> {
        Ok(UnixListener::from(inherited(self.socket)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_and_sound_configurations_pass() {
        let sound = r#"{"id":"p","root":"/run/husk/p/shared","socket":5,"request_queues":2}"#;
        assert_eq!(Config::parse(sound).unwrap().request_queues, 2);
        for bad in [
            r#"{"id":"p","root":"/r","socket":5,"request_queues":0}"#,
            r#"{"id":"p","root":"/r","socket":5,"request_queues":64}"#,
            r#"{"id":"p","root":"/r","socket":5,"request_queues":1,"more":1}"#,
            r#"{"id":"p","root":"/r","request_queues":1}"#,
            "",
        ] {
            assert!(Config::parse(bad).is_err(), "{bad}");
        }
    }
}
