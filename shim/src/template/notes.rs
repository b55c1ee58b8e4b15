//! What is noted about the host's templates until its next boot, in `/run/husk/.templates` (no pod's directory, since no id begins with a dot): which
//! were verified, which could not be built; and the kernel's code that all pods from one share.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, linkat};
use rustix::io::Errno;
use tracing::warn;

use super::code::Code;
use super::files::{Kind, StoreError, check, entry};
use super::key::FileIdentity;
use super::store::Manifest;
use super::{NOTES, Template};
use crate::peer::vmm::Saved;
use crate::random;

/// How long a failed build keeps pods from starting another.
const FAILURE_REST: Duration = Duration::from_secs(600);

/// What follows a template's name in the name of the file that has its kernel's code.
const CODE: &str = ".code-";

/// The directory of notes.
#[derive(Clone, Debug)]
pub(super) struct Notes(PathBuf);

impl Notes {
    /// This host's.
    pub(super) fn of_host() -> Self {
        Self::at(NOTES.into())
    }

    /// In another place.
    pub(super) fn at(directory: PathBuf) -> Self {
        Self(directory)
    }

    /// Makes the directory.
    pub(super) fn make(&self) -> io::Result<()> {
        if let Some(parent) = self.0.parent() {
            DirBuilder::new().recursive(true).mode(0o711).create(parent)?;
        }
        match DirBuilder::new().mode(0o700).create(&self.0) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            made => made,
        }
    }

    /// A file in there.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// What is known of the template `name`, if it is the very one that was verified.
    pub(super) fn known(&self, name: &str, stamp: &str) -> Option<Known> {
        Known::parse(fs::read_to_string(self.path(name)).ok()?.strip_suffix(stamp)?)
    }

    /// Notes that this very template was verified since the host's boot, and what its agent's hello will say.
    pub(super) fn note(&self, name: &str, known: &Known, stamp: &str) {
        let path = self.path(name);
        let note = known.text() + stamp;
        if let Err(error) = self.make().and_then(|()| fs::write(&path, note)) {
            warn!("cannot note in {} that the template is sound: {error}", path.display());
        }
    }

    /// Forgets a template that is no more. Pods that have its kernel's code open keep it.
    pub(super) fn forget(&self, name: &str) {
        let _ = fs::remove_file(self.path(name));
        self.forget_code(name, None);
    }

    fn forget_code(&self, name: &str, but: Option<&Path>) {
        let prefix = format!("{name}{CODE}");
        for entry in fs::read_dir(&self.0).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&prefix) && but != Some(&entry.path()) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn failure(&self, name: &str) -> PathBuf {
        self.path(&format!("{name}.failed"))
    }

    /// Notes that a build failed, and why.
    pub(super) fn note_failure(&self, name: &str, why: &str) {
        if let Err(error) = self.make().and_then(|()| fs::write(self.failure(name), why)) {
            warn!("cannot note that a build failed: {error}");
        }
    }

    /// A build may be tried again.
    pub(super) fn forget_failure(&self, name: &str) {
        let _ = fs::remove_file(self.failure(name));
    }

    /// Why a build failed so short a time ago that it is not tried again.
    pub(super) fn failed_lately(&self, name: &str) -> Option<String> {
        let path = self.failure(name);
        let age = fs::metadata(&path).ok()?.modified().ok()?.elapsed().ok()?;
        if age < FAILURE_REST { fs::read_to_string(path).ok() } else { None }
    }

    /// The kernel's code of a template that was found, in memory until the host's next boot, and its address in the guest; nothing where it
    /// can't be shared. Made for the first pod.
    pub(super) fn share(&self, template: &Template, saved: &Saved) -> Result<Option<(OwnedFd, u64)>, StoreError> {
        let (Some(code), name) = (&template.code, &template.name) else { return Ok(None) };
        let look = |source| StoreError::Io { doing: "read the template in", path: template.directory.clone(), source };
        let memory = File::from(saved.memory.try_clone().map_err(look)?);
        let metadata = memory.metadata().map_err(look)?;
        // The file is of just this memory file: a template of the same name may take its place meanwhile.
        let identity = format!("{:x}-{:x}-{:x}", metadata.ino(), metadata.mtime(), metadata.mtime_nsec());
        let path = self.path(&format!("{name}{CODE}{identity}"));
        let failed = |doing| {
            let path = path.clone();
            move |source| StoreError::Io { doing, path, source }
        };
        if entry(&path)?.is_none() {
            self.forget_code(name, Some(&path));
            self.write_code(&memory, code, &path).map_err(failed("write"))?;
        }
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(&path).map_err(failed("open"))?;
        let metadata = file.metadata().map_err(failed("look at"))?;
        check(&path, &metadata, Kind::File)?;
        if metadata.len() != code.len() {
            // The next pod makes it anew.
            let _ = fs::remove_file(&path);
            let what = format!("it has {} bytes, not {}", metadata.len(), code.len());
            return Err(failed("use")(io::Error::other(what)));
        }
        Ok(Some((file.into(), code.start)))
    }

    /// The file appears whole, and only the first of those that are made at once does.
    fn write_code(&self, mut memory: &File, code: &Code, path: &Path) -> io::Result<()> {
        self.make()?;
        let mut file = OpenOptions::new().write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(&self.0)?;
        memory.seek(SeekFrom::Start(code.start))?;
        if io::copy(&mut memory.take(code.len()), &mut file)? != code.len() {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        // As linkat(2) says for O_TMPFILE.
        let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
        match linkat(CWD, unnamed, CWD, path, AtFlags::SYMLINK_FOLLOW) {
            Err(Errno::EXIST) => Ok(()),
            linked => Ok(linked?),
        }
    }
}

/// What tells a template that was verified from one that is or was at its place at another time, and from one of other inputs. The manifest's time is
/// that of the last use.
pub(super) fn stamp(state: &Metadata, memory: &Metadata, manifest: &Metadata, inputs: &str) -> String {
    let files = [state, memory].map(FileIdentity::of);
    format!("\n{files:?} {} {} {}\n{inputs}", manifest.dev(), manifest.ino(), manifest.len())
}

/// What a pod must know of a sound template: on one line of its note.
pub(super) struct Known {
    /// The boot nonce of its agent.
    pub(super) nonce: [u8; 16],
    /// Where its kernel's code is, if that can be shared.
    pub(super) code: Option<Code>,
}

impl Known {
    /// Nothing if the manifest's nonce is none.
    pub(super) fn of(manifest: &Manifest) -> Option<Self> {
        Some(Self { nonce: parse_nonce(&manifest.nonce)?, code: manifest.code.clone() })
    }

    fn text(&self) -> String {
        let code = self.code.as_ref().map(|code| format!(" {:x}-{:x}", code.start, code.end));
        random::hex(&self.nonce) + &code.unwrap_or_default()
    }

    fn parse(text: &str) -> Option<Self> {
        let Some((nonce, code)) = text.split_once(' ') else {
            return Some(Self { nonce: parse_nonce(text)?, code: None });
        };
        let (start, end) = code.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        Some(Self { nonce: parse_nonce(nonce)?, code: Some(Code { start: number(start)?, end: number(end)? }) })
    }
}

/// A nonce of 32 hexadecimal digits.
fn parse_nonce(text: &str) -> Option<[u8; 16]> {
    let number = u128::from_str_radix(text, 16).ok().filter(|_| text.len() == 32 && !text.starts_with('+'));
    number.map(u128::to_be_bytes)
}
