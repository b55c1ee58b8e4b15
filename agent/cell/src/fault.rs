//! A failure inside a cell: what was being done and why it failed, as the one line that goes to the agent.

use std::fmt::Display;

use nix::errno::Errno;

/// One line: `mount "/data": no such file or directory`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Fault(String);

/// The result of a step in a cell.
pub(crate) type Step<T> = Result<T, Fault>;

impl Fault {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

/// Says what was being done when something failed.
pub(crate) trait Doing<T> {
    /// The text is made only on failure.
    fn doing<S: Display>(self, what: impl FnOnce() -> S) -> Step<T>;
}

impl<T> Doing<T> for Result<T, Errno> {
    fn doing<S: Display>(self, what: impl FnOnce() -> S) -> Step<T> {
        self.map_err(|errno| Fault(format!("{}: {}", what(), describe(errno))))
    }
}

impl<T> Doing<T> for Result<T, Fault> {
    fn doing<S: Display>(self, what: impl FnOnce() -> S) -> Step<T> {
        self.map_err(|fault| Fault(format!("{}: {fault}", what())))
    }
}

impl<T> Doing<T> for Result<T, std::io::Error> {
    fn doing<S: Display>(self, what: impl FnOnce() -> S) -> Step<T> {
        self.map_err(|error| match error.raw_os_error() {
            Some(raw) => Fault(format!("{}: {}", what(), describe(Errno::from_raw(raw)))),
            None => Fault(format!("{}: {error}", what())),
        })
    }
}

/// The C library's words with a small first letter, as every other runtime writes them.
pub(crate) fn describe(errno: Errno) -> String {
    let text = errno.desc();
    let mut chars = text.chars();
    match (chars.next(), chars.clone().next()) {
        // "I/O error" stays.
        (Some(first), Some(second)) if second.is_lowercase() || second == ' ' => {
            first.to_lowercase().chain(chars).collect()
        }
        _ => text.to_owned(),
    }
}
