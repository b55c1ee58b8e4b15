//! The host's templates: `/var/lib/husk/templates/<name>/{manifest.json,state,memory}`, each directory root's own with mode 0700,
//! each file with 0600. A template appears whole, by a rename, and only under the lock; whoever has its files open may go on with them
//! when it is removed. What is noted about templates until the host's next boot lies in `/run/husk/.templates`, which is no pod's
//! directory since no id begins with a dot.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, SystemTime};

use husk_snapshot::{FormatError, MemoryError};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::code::Code;
use super::key::{FileIdentity, Inputs};
use super::{NOTES, Template};
use crate::error::chain;
use crate::peer::vmm::{Saved, Snapshot};
use crate::random;

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

/// How long a failed build keeps pods from starting another.
const FAILURE_REST: Duration = Duration::from_secs(600);

/// The lock's file.
const LOCK: &str = ".lock";

/// Beginnings of the names of what is being made and taken away. No template's name begins so.
const BUILDING: &str = ".building-";
const REMOVED: &str = ".removed-";

/// What follows a template's name in the name of the file that has its kernel's code, and while that is written.
const CODE: &str = ".code-";
const NEW_CODE: &str = ".new-code-";

/// The templates of a host.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    root: PathBuf,
    notes: PathBuf,
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
        Self { root: ROOT.into(), notes: NOTES.into() }
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
        let noted = fs::read_to_string(self.notes.join(&name)).ok();
        let known = match noted.as_deref().and_then(|noted| noted.strip_suffix(&stamp)).and_then(Known::parse) {
            Some(known) => known,
            None => {
                let Some(known) = self.inspect(&directory, inputs, (&state, &memory))? else { return Ok(None) };
                self.note(&name, &known, &stamp);
                known
            }
        };
        self.note_use(&path, &manifest);
        let template = Template { name, nonce: known.nonce, directory, inode, code: known.code };
        Ok(Some((template, Saved { state: state.into(), memory: memory.into(), code: None })))
    }

    /// The kernel's code of a template that was found, in memory until the host's next boot, and its address in the guest; nothing where it
    /// can't be shared. Made for the first pod.
    pub(super) fn share(&self, template: &Template, saved: &Saved) -> Result<Option<(OwnedFd, u64)>, StoreError> {
        let (Some(code), name) = (&template.code, &template.name) else { return Ok(None) };
        let look = |source| StoreError::Io { doing: "read the template in", path: template.directory.clone(), source };
        let mut memory = File::from(saved.memory.try_clone().map_err(look)?);
        let metadata = memory.metadata().map_err(look)?;
        // The file is of just this memory file: a template of the same name may take its place meanwhile.
        let identity = format!("{:x}-{:x}-{:x}", metadata.ino(), metadata.mtime(), metadata.mtime_nsec());
        let path = self.notes.join(format!("{name}{CODE}{identity}"));
        let failed = |doing| {
            let path = path.clone();
            move |source| StoreError::Io { doing, path, source }
        };
        let wanted = code.end.saturating_sub(code.start);
        if entry(&path)?.is_none() {
            self.forget(name, CODE);
            let made = self.notes.join(format!("{name}{NEW_CODE}{}", std::process::id()));
            let mut make = || {
                self.make_notes()?;
                let mut options = OpenOptions::new();
                let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&made)?;
                memory.seek(SeekFrom::Start(code.start))?;
                let copied = io::copy(&mut (&memory).take(wanted), &mut file)?;
                if copied == wanted { fs::rename(&made, &path) } else { Err(ErrorKind::UnexpectedEof.into()) }
            };
            make().inspect_err(|_| _ = fs::remove_file(&made)).map_err(failed("write"))?;
        }
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(&path).map_err(failed("open"))?;
        let metadata = file.metadata().map_err(failed("look at"))?;
        check(&path, &metadata, Kind::File)?;
        if metadata.len() != wanted {
            return Err(failed("use")(io::Error::other(format!("it has {} bytes, not {wanted}", metadata.len()))));
        }
        Ok(Some((file.into(), code.start)))
    }

    /// Removes files with the kernel's code of templates that were called so; pods that have them open keep them.
    fn forget(&self, name: &str, kind: &str) {
        let prefix = format!("{name}{kind}");
        for entry in fs::read_dir(&self.notes).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                let _ = fs::remove_file(entry.path());
            }
        }
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
            self.note(&name, &known, &stamp(state, memory, file, &manifest.inputs.text()));
        }
        let _ = fs::remove_file(self.failure(&name));
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
        let _ = fs::remove_file(self.failure(name));
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
        let _ = fs::remove_file(self.notes.join(&name));
        self.forget(&name, CODE);
        self.forget(&name, NEW_CODE);
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

    /// Notes that this very template was verified since the host's boot, and what its agent's hello will say.
    fn note(&self, name: &str, known: &Known, stamp: &str) {
        let path = self.notes.join(name);
        let note = known.text() + stamp;
        if let Err(error) = self.make_notes().and_then(|()| fs::write(&path, note)) {
            warn!("cannot note in {} that the template is sound: {error}", path.display());
        }
    }

    /// The directory of notes.
    pub(super) fn make_notes(&self) -> io::Result<()> {
        if let Some(parent) = self.notes.parent() {
            DirBuilder::new().recursive(true).mode(0o711).create(parent)?;
        }
        match DirBuilder::new().mode(0o700).create(&self.notes) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            made => made,
        }
    }

    /// A file beside the notes.
    pub(super) fn note_path(&self, name: &str) -> PathBuf {
        self.notes.join(name)
    }

    fn failure(&self, name: &str) -> PathBuf {
        self.notes.join(format!("{name}.failed"))
    }

    /// Notes that a build failed, and why.
    pub(super) fn note_failure(&self, name: &str, why: &str) {
        if let Err(error) = self.make_notes().and_then(|()| fs::write(self.failure(name), why)) {
            warn!("cannot note that a build failed: {error}");
        }
    }

    /// Why a build failed so short a time ago that it is not tried again.
    pub(super) fn failed_lately(&self, name: &str) -> Option<String> {
        let path = self.failure(name);
        let age = fs::metadata(&path).ok()?.modified().ok()?.elapsed().ok()?;
        if age < FAILURE_REST { fs::read_to_string(path).ok() } else { None }
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

/// What a path must be.
#[derive(Clone, Copy)]
enum Kind {
    Directory,
    File,
}

/// What is at `path`, not followed; nothing if nothing is.
fn entry(path: &Path) -> Result<Option<Metadata>, StoreError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        found => found.map(Some).map_err(|source| StoreError::Io { doing: "look at", path: path.to_owned(), source }),
    }
}

/// Refuses what others than root could have made or changed.
fn check(path: &Path, metadata: &Metadata, kind: Kind) -> Result<(), StoreError> {
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

fn missing(directory: &Path, name: &str) -> StoreError {
    StoreError::Damaged { path: directory.to_owned(), what: format!("its file {name} is not there") }
}

/// What tells a template that was verified from one that is or was at its place at another time, and from one of other inputs. The manifest's time is
/// that of the last use.
fn stamp(state: &Metadata, memory: &Metadata, manifest: &Metadata, inputs: &str) -> String {
    let files = [state, memory].map(FileIdentity::of);
    format!("\n{files:?} {} {} {}\n{inputs}", manifest.dev(), manifest.ino(), manifest.len())
}

/// What a pod must know of a sound template: on one line of its note.
struct Known {
    nonce: [u8; 16],
    code: Option<Code>,
}

impl Known {
    /// Nothing if the manifest's nonce is none.
    fn of(manifest: &Manifest) -> Option<Self> {
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

/// Opens a file of a template.
fn open(directory: &Path, name: &str) -> Result<(File, Metadata), StoreError> {
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

/// Removes a directory of files that is husk's own.
fn delete(directory: &Path) {
    if let Err(error) = fs::remove_dir_all(directory)
        && error.kind() != ErrorKind::NotFound
    {
        warn!("cannot remove {}: {error}", directory.display());
    }
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
