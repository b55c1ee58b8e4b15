//! The host's templates: `/var/lib/husk/templates/<name>/{manifest.json,state,memory}`, each directory root's own with mode 0700,
//! each file with 0600. A template appears whole, by a rename, and only under the lock; whoever has its files open may go on with them
//! when it is removed.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, SystemTime};

use husk_snapshot::{FormatError, MemoryError};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::Template;
use super::code::Code;
use super::files::{Kind, StoreError, check, delete, entry, missing, open};
use super::key::Inputs;
use super::notes::{Known, Notes, stamp};
use crate::error::chain;
use crate::peer::vmm::{Saved, Snapshot};

/// Where templates are.
const ROOT: &str = "/var/lib/husk/templates";

/// Templates kept; the least recently used go.
const KEPT: usize = 8;

/// A template's manifest among its files.
const MANIFEST: &str = "manifest.json";

/// Largest manifest in bytes.
const MAX_MANIFEST: u64 = 64 << 10;

/// Largest state file in bytes.
const MAX_STATE: u64 = husk_snapshot::STATE_MAX + husk_snapshot::wire::HEADER_LEN as u64;

/// A use is noted no more often than this.
const USE_GRAIN: Duration = Duration::from_secs(3600);

/// The lock's file.
const LOCK: &str = ".lock";

/// Beginnings of the names of what is being made and taken away. No template's name begins so.
const BUILDING: &str = ".building-";
const REMOVED: &str = ".removed-";

/// The templates of a host.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    root: PathBuf,
    /// What is noted about them.
    pub(super) notes: Notes,
}

/// A template's manifest.json.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    /// The boot nonce of its agent, in hexadecimal digits.
    pub(super) nonce: String,
    /// When it was made, in seconds since the epoch.
    pub(super) created_s: u64,
    /// Length of its memory file in bytes: all memory that the machine can have.
    pub(super) memory_length: u64,
    /// Where its kernel's code is, if that can be shared.
    pub(super) code: Option<Code>,
    /// All that shaped it.
    pub(super) inputs: Inputs,
}

/// The right to make and remove templates. It goes with the last process that has its descriptor.
#[derive(Debug)]
pub(crate) struct Lock(File);

impl Lock {
    /// One that this process has taken or inherited. Whoever waits for it in vain reads in its file who has it.
    pub(super) fn of(mut file: File) -> Self {
        let note = format!("{:<10}\n", std::process::id());
        if let Err(error) = file.rewind().and_then(|()| file.write_all(note.as_bytes())) {
            warn!("cannot note in the lock of the templates who has it: {error}");
        }
        Self(file)
    }

    /// Its file.
    pub(super) fn file(&self) -> &File {
        &self.0
    }
}

impl Store {
    /// This host's.
    pub(crate) fn of_host() -> Self {
        Self { root: ROOT.into(), notes: Notes::of_host() }
    }

    /// The template that fits `inputs`, its files open and sound.
    pub(crate) fn find(&self, inputs: &Inputs) -> Result<Option<(Template, Saved)>, StoreError> {
        let text = inputs.text();
        let name = inputs.name_by(&text);
        let directory = self.root.join(&name);
        if !self.is_there()? {
            return Ok(None);
        }
        let Some(metadata) = entry(&directory)? else { return Ok(None) };
        check(&directory, &metadata, Kind::Directory)?;
        let inode = metadata.ino();
        let ((state, state_metadata), (memory, memory_metadata)) =
            (open(&directory, "state")?, open(&directory, "memory")?);
        let path = directory.join(MANIFEST);
        let manifest = entry(&path)?.ok_or_else(|| missing(&directory, MANIFEST))?;
        check(&path, &manifest, Kind::File)?;

        let stamp = stamp(&state_metadata, &memory_metadata, &manifest, &text);
        let known = match self.notes.known(&name, &stamp) {
            Some(known) => known,
            None => {
                let Some(known) = self.inspect(&directory, inputs, (&state, &memory))? else { return Ok(None) };
                self.notes.note(&name, &known, &stamp);
                known
            }
        };
        self.note_use(&path, &manifest);
        let template = Template { name, nonce: known.nonce, directory, inode, code: known.code };
        Ok(Some((template, Saved { state: state.into(), memory: memory.into(), code: None })))
    }

    /// Looks at all of a template: what a pod must know of it, if it fits `inputs`.
    fn inspect(
        &self,
        directory: &Path,
        inputs: &Inputs,
        (state, memory): (&File, &File),
    ) -> Result<Option<Known>, StoreError> {
        let damaged = |what: String| StoreError::Damaged { path: directory.to_owned(), what };
        let unreadable = |source| StoreError::Io { doing: "read the template in", path: directory.to_owned(), source };
        let manifest = self.manifest(directory)?;
        if manifest.inputs != *inputs {
            return Ok(None);
        }
        let known = Known::of(&manifest).ok_or_else(|| damaged("its nonce is none".to_owned()))?;
        if memory.metadata().map_err(unreadable)?.len() != manifest.memory_length {
            return Err(damaged("its memory has another length than it should".to_owned()));
        }
        verify(state, memory).map_err(|error| match error {
            VerifyError::Read(source) => unreadable(source),
            broken => damaged(chain(&broken)),
        })?;
        Ok(Some(known))
    }

    /// Whether there is a root directory, as it must be.
    fn is_there(&self) -> Result<bool, StoreError> {
        match entry(&self.root)? {
            Some(metadata) => check(&self.root, &metadata, Kind::Directory).map(|()| true),
            None => Ok(false),
        }
    }

    fn manifest(&self, directory: &Path) -> Result<Manifest, StoreError> {
        let mut text = Vec::new();
        let (file, _) = open(directory, MANIFEST)?;
        file.take(MAX_MANIFEST + 1).read_to_end(&mut text).map_err(|source| StoreError::Io {
            doing: "read",
            path: directory.join(MANIFEST),
            source,
        })?;
        serde_json::from_slice(&text).map_err(|error| StoreError::Damaged {
            path: directory.to_owned(),
            what: format!("its manifest.json is none of this version of husk: {error}"),
        })
    }

    /// Takes the lock, if nobody has it. Makes the root directory.
    pub(crate) fn try_lock(&self) -> Result<Option<Lock>, StoreError> {
        let file = self.lock_file()?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => Ok(None),
            locked => locked.map(|()| Some(Lock::of(file))).map_err(|errno| self.failed("lock")(errno.into())),
        }
    }

    /// Waits for the lock, but no longer than `limit`. After that this process must end: it still has a thread that waits.
    pub(super) fn lock(&self, limit: Duration) -> Result<Lock, StoreError> {
        if let Some(lock) = self.try_lock()? {
            return Ok(lock);
        }
        let file = self.lock_file()?;
        let (done, taken) = mpsc::channel();
        // flock(2) knows no time limit.
        let wait = move || {
            let _ = done.send(flock(&file, FlockOperation::LockExclusive).map(|()| file));
        };
        std::thread::Builder::new().spawn(wait).map_err(self.failed("wait for the lock in"))?;
        match taken.recv_timeout(limit) {
            Ok(locked) => locked.map(Lock::of).map_err(|errno| self.failed("lock")(errno.into())),
            Err(_) => Err(StoreError::Locked { path: self.root.join(LOCK), limit, holder: self.holder() }),
        }
    }

    /// Who has the lock.
    fn holder(&self) -> String {
        let noted = fs::read_to_string(self.root.join(LOCK)).ok();
        let Some(pid) = noted.and_then(|noted| noted.trim().parse::<u32>().ok()) else {
            return "a process that has not said which".to_owned();
        };
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).trim_end_matches('\0').replace('\0', " ");
        if words.is_empty() { format!("process {pid}, which is gone") } else { format!("process {pid} ({words})") }
    }

    fn lock_file(&self) -> Result<File, StoreError> {
        if !self.is_there()? {
            let parent = self.root.parent().unwrap_or(Path::new("/"));
            let made = DirBuilder::new().recursive(true).create(parent);
            let made = made.and_then(|()| DirBuilder::new().mode(0o700).create(&self.root));
            match made {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                made => made.map_err(self.failed("make"))?,
            }
        }
        let path = self.root.join(LOCK);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let file = options.open(&path);
        file.map_err(|source| StoreError::Io { doing: "open the lock", path, source })
    }

    /// Removes what builds that were killed, and removals, have left.
    pub(super) fn sweep(&self, _: &Lock) {
        for entry in self.entries() {
            let Some(name) = entry.file_name().and_then(|name| name.to_str()) else { continue };
            if name.starts_with(BUILDING) || name.starts_with(REMOVED) {
                delete(&entry);
            }
        }
    }

    fn entries(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.root).into_iter().flatten();
        entries.filter_map(|entry| Some(entry.ok()?.path())).collect()
    }

    /// Makes the directory and the two empty files for a template that is to be made.
    pub(super) fn begin(&self, name: &str, _: &Lock) -> Result<(PathBuf, Snapshot), StoreError> {
        let directory = self.root.join(format!("{BUILDING}{name}"));
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| StoreError::Io { doing: "make", path, source }
        };
        DirBuilder::new().mode(0o700).create(&directory).map_err(failed(&directory))?;
        let create = |name: &str| {
            let path = directory.join(name);
            let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
            file.map_err(failed(&path))
        };
        let (state, memory) = (create("state")?, create("memory")?);
        Ok((directory.clone(), Snapshot { state: state.into(), memory: memory.into() }))
    }

    /// Puts a template, whose files are written, in its place, where it is durable.
    pub(super) fn finish(&self, made: &Path, manifest: &Manifest, lock: &Lock) -> Result<(), StoreError> {
        let name = manifest.inputs.name();
        let directory = self.root.join(&name);
        let failed = |doing, path: &Path| {
            let path = path.to_owned();
            move |source| StoreError::Io { doing, path, source }
        };
        let path = made.join(MANIFEST);
        let write = || {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            file.write_all(&serde_json::to_vec_pretty(manifest)?)?;
            file.sync_all()
        };
        write().map_err(failed("write", &path))?;
        // husk-vmm has synced state and memory.
        File::open(made).and_then(|directory| directory.sync_all()).map_err(failed("sync", made))?;
        if let Some(metadata) = entry(&directory)? {
            check(&directory, &metadata, Kind::Directory)?;
            self.take_away(&directory)?;
        }
        fs::rename(made, &directory).map_err(failed("rename", made))?;
        File::open(&self.root).and_then(|root| root.sync_all()).map_err(failed("sync", &self.root))?;
        let files = ["state", "memory", MANIFEST].map(|file| fs::symlink_metadata(directory.join(file)));
        if let ([Ok(state), Ok(memory), Ok(file)], Some(known)) = (&files, Known::of(manifest)) {
            // It lies in the host's memory as it was written.
            self.notes.note(&name, &known, &stamp(state, memory, file, &manifest.inputs.text()));
        }
        self.notes.forget_failure(&name);
        self.sweep(lock);
        Ok(())
    }

    /// Gives up what [`Store::begin`] made.
    pub(super) fn abandon(&self, made: &Path) {
        delete(made);
    }

    /// Removes a template that is of no use, unless another has taken its place meanwhile.
    pub(crate) fn remove(&self, template: &Template) -> Result<(), StoreError> {
        match entry(&template.directory)? {
            Some(metadata) if metadata.ino() == template.inode => self.take_away(&template.directory),
            _ => Ok(()),
        }
    }

    /// Removes the template `name`, or what is left of one. False if there is none.
    pub(crate) fn remove_named(&self, name: &str) -> Result<bool, StoreError> {
        let directory = self.root.join(name);
        if !is_name(name) || !self.is_there()? || entry(&directory)?.is_none() {
            return Ok(false);
        }
        self.notes.forget_failure(name);
        self.take_away(&directory).map(|()| true)
    }

    /// The name goes at once, the files then.
    fn take_away(&self, directory: &Path) -> Result<(), StoreError> {
        let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let away = self.root.join(format!("{REMOVED}{name}-{}", std::process::id()));
        fs::rename(directory, &away).map_err(|source| StoreError::Io {
            doing: "remove the template",
            path: directory.to_owned(),
            source,
        })?;
        self.notes.forget(&name);
        delete(&away);
        Ok(())
    }

    /// Removes templates that no longer fit this host, then those beyond the number that is kept.
    pub(super) fn prune(&self, fits: impl Fn(&Inputs) -> bool, _: &Lock) {
        let mut listed = self.list();
        listed.sort_by_key(|listed| std::cmp::Reverse(listed.used));
        let mut kept = 0;
        for listed in listed {
            let is_good = listed.manifest.as_ref().is_ok_and(|manifest| fits(&manifest.inputs));
            if is_good && kept < KEPT {
                kept += 1;
                continue;
            }
            if matches!(listed.manifest, Err(StoreError::Io { .. } | StoreError::Foreign { .. })) {
                continue;
            }
            if let Err(error) = self.take_away(&self.root.join(&listed.name)) {
                warn!("{}", chain(&error));
            }
        }
    }

    /// Every template, in order of name, with what is wrong with it.
    pub(super) fn list(&self) -> Vec<Listed> {
        let mut found = Vec::new();
        for directory in self.entries() {
            let Some(name) = directory.file_name().and_then(|name| name.to_str()).filter(|name| is_name(name)) else {
                continue;
            };
            let manifest = entry(&directory).and_then(|metadata| {
                metadata.map_or(Ok(()), |metadata| check(&directory, &metadata, Kind::Directory))?;
                self.manifest(&directory)
            });
            let bytes =
                ["state", "memory"].map(|file| fs::metadata(directory.join(file)).map_or(0, |m| m.blocks() * 512));
            let used = fs::metadata(directory.join(MANIFEST)).and_then(|metadata| metadata.modified());
            found.push(Listed {
                name: name.to_owned(),
                manifest,
                bytes: bytes.iter().sum(),
                used: used.unwrap_or(SystemTime::UNIX_EPOCH),
            });
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        found
    }

    /// Notes the use by the manifest's time. Where that can't be, it will be thought unused.
    fn note_use(&self, manifest: &Path, metadata: &Metadata) {
        let age = metadata.modified().ok().and_then(|modified| modified.elapsed().ok());
        if age.is_none_or(|age| age >= USE_GRAIN) {
            let _ = File::open(manifest).and_then(|file| file.set_modified(SystemTime::now()));
        }
    }

    fn failed(&self, doing: &'static str) -> impl FnOnce(io::Error) -> StoreError {
        let path = self.root.clone();
        move |source| StoreError::Io { doing, path, source }
    }
}

/// A template as it is listed.
#[derive(Debug)]
pub(super) struct Listed {
    /// What it is called.
    pub(super) name: String,
    /// Its manifest, or why that can't be had.
    pub(super) manifest: Result<Manifest, StoreError>,
    /// What it takes of the disk.
    pub(super) bytes: u64,
    /// Its last use, to the hour.
    pub(super) used: SystemTime,
}

/// Whether a template can be called so, as in `1cpu-256mib-0123abcd`.
fn is_name(name: &str) -> bool {
    let parts: Vec<_> = name.split('-').collect();
    let [cpus, memory, sum] = parts[..] else { return false };
    let is_number = |part: Option<&str>| {
        part.is_some_and(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let is_sum = sum.len() == 8 && sum.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_number(cpus.strip_suffix("cpu")) && is_number(memory.strip_suffix("mib")) && is_sum
}

/// Why files are no snapshot.
#[derive(Debug, thiserror::Error)]
enum VerifyError {
    #[error("it can't be read")]
    Read(#[source] io::Error),
    #[error(transparent)]
    State(#[from] FormatError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Checks both files' checksums, which takes the reading of all of them. The state can be read from its beginning afterwards.
fn verify(mut state: &File, memory: &File) -> Result<(), VerifyError> {
    let mut bytes = Vec::new();
    state.take(MAX_STATE + 1).read_to_end(&mut bytes).map_err(VerifyError::Read)?;
    let (_, sum) = husk_snapshot::wire::decode(&bytes)?;
    husk_snapshot::memory::verify(memory, sum).map_err(|error| match error {
        MemoryError::File { source, .. } => VerifyError::Read(source),
        damaged => damaged.into(),
    })?;
    state.rewind().map_err(VerifyError::Read)
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
