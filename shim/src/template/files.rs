//! The files of templates: what husk believes of them, and takes away.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tracing::warn;

/// Why a template can't be used, made or removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// A file or directory.
    #[error("cannot {doing} {path}", path = path.display())]
    Io {
        /// What failed.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file or directory that is not as husk makes it: somebody else could have put anything there.
    #[error("{path} {what}: it must be root's, a {kind} with mode {mode:o}; husk leaves it alone", path = path.display())]
    Foreign {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        what: String,
        /// What it must be.
        kind: &'static str,
        /// The mode that it must have.
        mode: u32,
    },
    /// Another process makes or removes templates, and does not come to an end.
    #[error("waited {limit:?} for {path}, the right to make templates, which {holder} has", path = path.display())]
    Locked {
        /// The lock.
        path: PathBuf,
        /// How long.
        limit: Duration,
        /// Who has it.
        holder: String,
    },
    /// The template is broken and of no use to anybody.
    #[error("the template {path} is damaged: {what}", path = path.display())]
    Damaged {
        /// Its directory.
        path: PathBuf,
        /// In which way.
        what: String,
    },
}

/// What a path must be.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Directory,
    File,
}

/// What is at `path`, not followed; nothing if nothing is.
pub(super) fn entry(path: &Path) -> Result<Option<Metadata>, StoreError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        found => found.map(Some).map_err(|source| StoreError::Io { doing: "look at", path: path.to_owned(), source }),
    }
}

/// Refuses what others than root could have made or changed.
pub(super) fn check(path: &Path, metadata: &Metadata, kind: Kind) -> Result<(), StoreError> {
    let (is_kind, kind, wanted) = match kind {
        Kind::Directory => (metadata.is_dir(), "directory", 0o700),
        Kind::File => (metadata.is_file(), "regular file", 0o600),
    };
    let mode = metadata.mode() & 0o7777;
    let what = if !is_kind {
        format!("is no {kind}")
    } else if metadata.uid() != 0 || metadata.gid() != 0 {
        format!("belongs to {}:{}", metadata.uid(), metadata.gid())
    } else if mode != wanted {
        format!("has mode {mode:o}")
    } else {
        return Ok(());
    };
    Err(StoreError::Foreign { path: path.to_owned(), what, kind, mode: wanted })
}

pub(super) fn missing(directory: &Path, name: &str) -> StoreError {
    StoreError::Damaged { path: directory.to_owned(), what: format!("its file {name} is not there") }
}

/// Opens a file of a template.
pub(super) fn open(directory: &Path, name: &str) -> Result<(File, Metadata), StoreError> {
    let path = directory.join(name);
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path);
    let opened = file.and_then(|file| file.metadata().map(|metadata| (file, metadata)));
    let (file, metadata) = opened.map_err(|source| match source.kind() {
        ErrorKind::NotFound => missing(directory, name),
        _ => StoreError::Io { doing: "open", path: path.clone(), source },
    })?;
    check(&path, &metadata, Kind::File)?;
    Ok((file, metadata))
}

/// Removes a directory of files that is husk's own.
pub(super) fn delete(directory: &Path) {
    if let Err(error) = fs::remove_dir_all(directory)
        && error.kind() != ErrorKind::NotFound
    {
        warn!("cannot remove {}: {error}", directory.display());
    }
}
