//! The pod's directory `/run/husk/<id>` and its state file, which is written before things exist that would need cleaning, so that
//! the `delete` action can clean up after a shim that was killed.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::id::Id;
use crate::peer::helper::start_time;

/// Where pods' directories are.
pub(crate) const ROOT: &str = "/run/husk";

/// Largest state file in bytes.
const MAX_SIZE: u64 = 64 << 10;

/// A process, told apart from a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Identity {
    /// Process id.
    pub(crate) pid: u32,
    /// Clock ticks from boot to its start.
    pub(crate) start_time: u64,
}

impl Identity {
    /// The identity of a running process.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        start_time(pid).map(|start_time| Self { pid, start_time })
    }

    /// Whether it still runs (or is not yet reaped).
    pub(crate) fn is_there(self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }
}

/// What a pod has on the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// The shim's socket for containerd.
    pub(crate) socket: PathBuf,
    /// The shim.
    pub(crate) shim: Option<Identity>,
    /// The VMM.
    pub(crate) vmm: Option<Identity>,
    /// The fs daemon.
    pub(crate) fs: Option<Identity>,
    /// The pod's network namespace.
    pub(crate) netns: Option<PathBuf>,
    /// The pod's cgroup, as in the OCI spec; empty is none.
    pub(crate) cgroups_path: String,
}

/// Why the directory or the state file could not be used.
#[derive(Debug, Error)]
pub(crate) enum StateError {
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
    /// The state file is not the shim's.
    #[error("cannot understand {path}", path = path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// A pod's directory.
#[derive(Clone, Debug)]
pub(crate) struct Directory(PathBuf);

impl Directory {
    /// The directory of pod `id`; nothing is made.
    pub(crate) fn of(id: &Id) -> Self {
        Self::below(Path::new(ROOT), id)
    }

    fn below(root: &Path, id: &Id) -> Self {
        Self(root.join(&**id))
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// The share directory.
    pub(crate) fn shared(&self) -> PathBuf {
        self.0.join("shared")
    }

    /// Makes it, for root alone. It must not be there yet.
    pub(crate) fn make(&self) -> Result<(), StateError> {
        let failed = |source| StateError::Io { doing: "make the pod's directory", path: self.0.clone(), source };
        if let Some(parent) = self.0.parent() {
            DirBuilder::new().recursive(true).mode(0o711).create(parent).map_err(failed)?;
        }
        DirBuilder::new().mode(0o700).create(&self.0).map_err(failed)?;
        DirBuilder::new().mode(0o755).create(self.shared()).map_err(failed)
    }

    /// Puts a small file system of its own on the share directory. It is a shared mount: what is mounted below it later must appear
    /// in the fs daemon's mount namespace.
    pub(crate) fn mount_shared(&self) -> Result<(), StateError> {
        let path = self.shared();
        let failed = |source: nix::Error| StateError::Io {
            doing: "mount the share directory",
            path: path.clone(),
            source: source.into(),
        };
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("husk"), &path, Some("tmpfs"), flags, Some("mode=0755,size=4m")).map_err(failed)?;
        mount(None::<&str>, &path, None::<&str>, MsFlags::MS_SHARED, None::<&str>).map_err(failed)
    }

    /// Writes the state file; whoever reads it sees all of it or what was before.
    pub(crate) fn write(&self, record: &Record) -> Result<(), StateError> {
        let path = self.0.join("state.json");
        let new = self.0.join("state.json.new");
        let failed = |source| StateError::Io { doing: "write", path: path.clone(), source };
        let text = serde_json::to_vec(record).map_err(|error| failed(error.into()))?;
        fs::write(&new, text).map_err(failed)?;
        fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        fs::rename(&new, &path).map_err(failed)
    }

    /// Reads the state file; nothing if there is none.
    pub(crate) fn read(&self) -> Result<Option<Record>, StateError> {
        let path = self.0.join("state.json");
        let failed = |source| StateError::Io { doing: "read", path: path.clone(), source };
        match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Ok(metadata) if metadata.len() > MAX_SIZE => return Err(failed(io::ErrorKind::FileTooLarge.into())),
            other => other.map_err(failed)?,
        };
        let text = fs::read(&path).map_err(failed)?;
        serde_json::from_slice(&text).map(Some).map_err(|source| StateError::Parse { path, source })
    }

    /// Removes it. Nothing of a container's files can be below it: `shared` must be unmounted, and is removed only if empty.
    pub(crate) fn remove(&self) -> Result<(), StateError> {
        let failed = |source| StateError::Io { doing: "remove", path: self.0.clone(), source };
        let gone = |outcome: io::Result<()>| match outcome {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(failed),
        };
        let entries = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(failed)?,
        };
        gone(fs::remove_dir(self.shared()))?;
        // The state file goes last: whatever fails before can be tried again.
        for entry in entries {
            let entry = entry.map_err(failed)?;
            if entry.file_name() != "shared" && entry.file_name() != "state.json" {
                gone(fs::remove_file(entry.path()))?;
            }
        }
        gone(fs::remove_file(self.0.join("state.json")))?;
        gone(fs::remove_dir(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_kept_and_the_directory_leaves_nothing() {
        let root = std::env::temp_dir().join(format!("husk-state-{}", std::process::id()));
        let directory = Directory::below(&root, &Id::parse("pod").unwrap());
        assert_eq!(directory.read().unwrap(), None);
        directory.make().unwrap();
        assert!(directory.make().is_err());
        let record = Record {
            namespace: "k8s.io".to_owned(),
            shim: Identity::of(std::process::id()),
            netns: Some("/var/run/netns/x".into()),
            ..Record::default()
        };
        directory.write(&record).unwrap();
        assert_eq!(directory.read().unwrap(), Some(record));
        directory.remove().unwrap();
        assert!(!directory.path().exists());
        directory.remove().unwrap();
        fs::remove_dir(root).unwrap();
    }

    #[test]
    fn what_is_left_in_the_share_directory_is_never_deleted() {
        let root = std::env::temp_dir().join(format!("husk-state-left-{}", std::process::id()));
        let directory = Directory::below(&root, &Id::parse("pod").unwrap());
        directory.make().unwrap();
        fs::write(directory.shared().join("precious"), "x").unwrap();
        assert!(directory.remove().is_err());
        assert!(directory.shared().join("precious").exists());
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn identities_tell_a_reused_number() {
        let own = Identity::of(std::process::id()).unwrap();
        assert!(own.is_there());
        assert!(!Identity { start_time: own.start_time + 1, ..own }.is_there());
    }
}
