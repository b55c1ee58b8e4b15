//! Ids of containers and exec processes, checked once where they come in: they become file names, so nothing else may.

use std::borrow::Borrow;
use std::fmt;
use std::ops::Deref;

use thiserror::Error;

/// Longest id in bytes, as in containerd's `identifiers` package.
const MAX_LENGTH: usize = 76;

/// A checked id: runs of ASCII letters and digits, joined by single `.`, `_` or `-`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Id(String);

/// Why an id was refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum IdError {
    /// Empty or too long.
    #[error("an id has 1 to {MAX_LENGTH} characters, this one has {0}")]
    Length(usize),
    /// Other characters, or separators at an end or in a row.
    #[error("the id {0:?} is not made of letters and digits joined by '.', '_' or '-'")]
    Characters(String),
}

impl Id {
    /// Checks an id.
    pub(crate) fn parse(text: &str) -> Result<Self, IdError> {
        if text.is_empty() || text.len() > MAX_LENGTH {
            return Err(IdError::Length(text.len()));
        }
        let runs = text.split(['.', '_', '-']);
        let is_run = |run: &str| !run.is_empty() && run.bytes().all(|byte| byte.is_ascii_alphanumeric());
        if !runs.into_iter().all(is_run) {
            return Err(IdError::Characters(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl Deref for Id {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for Id {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_what_containerd_accepts() {
        for id in ["a", "0f3c", "my-pod_1.x", &"a".repeat(76)] {
            assert_eq!(Id::parse(id).as_deref(), Ok(id));
        }
    }

    #[test]
    fn refuses_what_could_leave_a_directory_or_is_too_long() {
        for id in ["..", ".", "-a", "a-", "a..b", "a/b", "a\0", "ä", "a b"] {
            assert_eq!(Id::parse(id), Err(IdError::Characters(id.to_owned())), "{id}");
        }
        assert_eq!(Id::parse(""), Err(IdError::Length(0)));
        assert_eq!(Id::parse(&"a".repeat(77)), Err(IdError::Length(77)));
    }
}
