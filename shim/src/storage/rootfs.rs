//! A container's root file system: containerd's list of mounts, mounted in order.

use std::fs::create_dir_all;
use std::io::{Error, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::mount::{MsFlags, mount};
use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat, openat2};

use super::idmap::{IdMap, Mapped};
use super::volume::{BindOptions, Propagation, attach, bind_at, bind_mapped, unmount};
use super::{StorageError, step};

/// mount(2) takes one page of options, its last byte a NUL.
const MAX_DATA: usize = 4095;

/// Most layers of an overlay (Linux's fs/overlayfs: OVL_MAX_STACK).
const MAX_LAYERS: usize = 500;

/// Types of file system that containerd's snapshotters use.
const TYPES: [&str; 7] = ["overlay", "ext4", "xfs", "btrfs", "erofs", "squashfs", "tmpfs"];

/// One mount of a container's root file system, as containerd gives it (`containerd.types.Mount`).
#[derive(Clone, Debug, Default)]
pub(crate) struct RootfsMount {
    /// Type: overlay, bind, or a file system on a block device.
    pub(crate) kind: String,
    /// Device, directory or file.
    pub(crate) source: String,
    /// Path below the root file system's directory; empty: the directory itself.
    pub(crate) target: String,
    /// As in mount(8)'s `-o`.
    pub(crate) options: Vec<String>,
}

/// Mounts `mounts`, in order, on `target` (made if absent). All or nothing. `scratch` names a directory that may be made for the time
/// of the call, where nobody else looks.
pub(crate) fn mount_rootfs(mounts: &[RootfsMount], target: &Path, scratch: &Path) -> Result<(), StorageError> {
    create_dir_all(target).map_err(step("a root file system", target, "make the directory"))?;
    for one in mounts {
        if let Err(error) = mount_one(one, target, scratch) {
            // The first error is the one to tell.
            let _ = unmount(target);
            return Err(error);
        }
    }
    Ok(())
}

/// Makes the files among `targets`, paths in a root file system that nobody uses yet, that are missing there. Where that can't be, because of
/// what the image has there or has not, the guest will say so.
pub(crate) fn make_targets(root: &Path, targets: &[PathBuf]) {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(root) = open(root, flags | OFlags::NOFOLLOW, Mode::empty()) else { return };
    // No link of the image leads out of it, and nothing is made in what else is mounted there.
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    for target in targets {
        let (Some(directory), Some(name)) = (target.parent(), target.file_name()) else { continue };
        let Ok(directory) = openat2(&root, directory, flags, Mode::empty(), resolve) else { continue };
        let create = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let _ = openat(&directory, name, create, Mode::from_raw_mode(0o644));
    }
}

fn mount_one(one: &RootfsMount, root: &Path, scratch: &Path) -> Result<(), StorageError> {
    let name = format!("{} {}", one.kind, one.source);
    let options = Options::parse(&one.options);
    let mapped = options.mapped().map_err(step(&name, root, "make a user namespace of uidmap and gidmap"))?;
    let place = Place::open(&name, root, &one.target)?;
    if options.bind || one.kind == "bind" {
        let how = BindOptions {
            readonly: options.readonly(),
            readonly_below: options.readonly(),
            recursive: options.recursive,
            propagation: Propagation::Private,
        };
        return bind_at(Path::new(&one.source), &place.directory, root, how, mapped.as_ref());
    }
    if !TYPES.contains(&one.kind.as_str()) {
        return Err(step(&name, root, "type of file system")(Error::from(ErrorKind::Unsupported)));
    }
    if options.looped {
        return Err(step(&name, root, "option loop")(Error::from(ErrorKind::Unsupported)));
    }
    // An overlay over mapped layers shows their files as the map has them; its upper directory has such ids already.
    let layers = mapped.as_ref().filter(|_| one.kind == "overlay").map(|mapped| Layers::new(scratch, mapped));
    let (data, _open) = if layers.is_some() || (one.kind == "overlay" && options.data.len() > MAX_DATA) {
        shorten(&options.data, layers.as_ref()).map_err(step(&name, root, "open the layers"))?
    } else {
        (options.data.clone(), Vec::new())
    };
    if data.len() > MAX_DATA {
        return Err(step(&name, root, format!("{} bytes of options", data.len()))(Error::from(
            ErrorKind::InvalidInput,
        )));
    }
    let data = (!data.is_empty()).then_some(data.as_str());
    // As in `bind`: only husk-fs uses it.
    let flags = options.flags | MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(Some(one.source.as_str()), &place.path, Some(one.kind.as_str()), flags, data)
        .map_err(step(&name, root, "mount"))?;
    if mapped.is_some() && layers.is_none() {
        // On top of itself, with its ids mapped.
        let plain = Place::open(&name, root, &one.target)?.directory;
        let how = BindOptions { readonly: options.readonly(), ..BindOptions::default() };
        attach(&plain, &plain, &name, root, how, mapped.as_ref())?;
    }
    Ok(())
}

/// Where to mount: open, and named by its descriptor for mount(2). A place inside a root file system is resolved below it, whatever
/// links the image has.
struct Place {
    path: PathBuf,
    directory: OwnedFd,
}

impl Place {
    fn open(name: &str, root: &Path, below: &str) -> Result<Self, StorageError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let below = if below.is_empty() { "/" } else { below };
        let directory = open(root, flags | OFlags::NOFOLLOW, Mode::empty())
            .and_then(|root| openat2(&root, below, flags, Mode::empty(), resolve))
            .map_err(step(name, root, format!("open {below} in it")))?;
        Ok(Self { path: format!("/proc/self/fd/{}", directory.as_raw_fd()).into(), directory })
    }
}

/// mount(8)'s options, sorted into what mount(2) takes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) flags: MsFlags,
    bind: bool,
    recursive: bool,
    pub(super) looped: bool,
    /// containerd's maps of ids: not for mount(2).
    uids: Option<String>,
    gids: Option<String>,
    /// What is the file system's own, joined by commas.
    pub(super) data: String,
}

impl Options {
    pub(super) fn parse(options: &[String]) -> Self {
        let mut parsed = Self {
            flags: MsFlags::empty(),
            bind: false,
            recursive: false,
            looped: false,
            uids: None,
            gids: None,
            data: String::new(),
        };
        for option in options {
            match option.as_str() {
                map if map.starts_with("uidmap=") => parsed.uids = Some(map["uidmap=".len()..].to_owned()),
                map if map.starts_with("gidmap=") => parsed.gids = Some(map["gidmap=".len()..].to_owned()),
                "bind" => parsed.bind = true,
                "rbind" => (parsed.bind, parsed.recursive) = (true, true),
                "loop" => parsed.looped = true,
                "defaults" | "" => {}
                other => match flag(other) {
                    Some((flag, true)) => parsed.flags.insert(flag),
                    Some((flag, false)) => parsed.flags.remove(flag),
                    None => {
                        if !parsed.data.is_empty() {
                            parsed.data.push(',');
                        }
                        parsed.data.push_str(other);
                    }
                },
            }
        }
        parsed
    }

    /// Whether its ids are to be mapped.
    pub(super) fn maps_ids(&self) -> bool {
        self.uids.is_some() || self.gids.is_some()
    }

    /// The map of ids, if there is to be one.
    fn mapped(&self) -> Result<Option<Mapped>, Error> {
        let invalid = || Error::new(ErrorKind::InvalidInput, "they are no two maps of ids");
        match (&self.uids, &self.gids) {
            (None, None) => Ok(None),
            (Some(uids), Some(gids)) => {
                let namespace = IdMap::of_options(uids, gids).ok_or_else(invalid)?.namespace()?;
                Ok(Some(Mapped { namespace: Arc::new(namespace), recursive: false }))
            }
            _ => Err(invalid()),
        }
    }

    pub(super) fn readonly(&self) -> bool {
        self.flags.contains(MsFlags::MS_RDONLY)
    }
}

/// The flag that an option sets or clears.
fn flag(option: &str) -> Option<(MsFlags, bool)> {
    Some(match option {
        "ro" => (MsFlags::MS_RDONLY, true),
        "rw" => (MsFlags::MS_RDONLY, false),
        "nosuid" => (MsFlags::MS_NOSUID, true),
        "suid" => (MsFlags::MS_NOSUID, false),
        "nodev" => (MsFlags::MS_NODEV, true),
        "dev" => (MsFlags::MS_NODEV, false),
        "noexec" => (MsFlags::MS_NOEXEC, true),
        "exec" => (MsFlags::MS_NOEXEC, false),
        "noatime" => (MsFlags::MS_NOATIME, true),
        "atime" => (MsFlags::MS_NOATIME, false),
        "nodiratime" => (MsFlags::MS_NODIRATIME, true),
        "diratime" => (MsFlags::MS_NODIRATIME, false),
        "relatime" => (MsFlags::MS_RELATIME, true),
        "norelatime" => (MsFlags::MS_RELATIME, false),
        "strictatime" => (MsFlags::MS_STRICTATIME, true),
        "nostrictatime" => (MsFlags::MS_STRICTATIME, false),
        "sync" => (MsFlags::MS_SYNCHRONOUS, true),
        "async" => (MsFlags::MS_SYNCHRONOUS, false),
        "dirsync" => (MsFlags::MS_DIRSYNC, true),
        "lazytime" => (MsFlags::MS_LAZYTIME, true),
        "nolazytime" => (MsFlags::MS_LAZYTIME, false),
        _ => return None,
    })
}

/// An overlay's options with each directory named by a descriptor, so that any number of layers up to `MAX_LAYERS` that fits a page
/// in this form can be mounted whatever the length of their paths, and with the ids of the lower ones mapped. The descriptors must live
/// until the mount is made.
fn shorten(data: &str, mapped: Option<&Layers<'_>>) -> Result<(String, Vec<OwnedFd>), Error> {
    let mut short = Vec::new();
    let mut opened = Vec::new();
    for option in data.split(',') {
        let Some((key @ ("lowerdir" | "upperdir" | "workdir"), paths)) = option.split_once('=') else {
            short.push(option.to_owned());
            continue;
        };
        let mut names = Vec::new();
        for path in paths.split(':') {
            if opened.len() >= MAX_LAYERS {
                return Err(Error::new(ErrorKind::InvalidInput, "too many layers"));
            }
            let explain = |error: Error| Error::new(error.kind(), format!("{path}: {error}"));
            let layer = match mapped {
                Some(layers) if key == "lowerdir" => layers.map(path, opened.len()).map_err(explain)?,
                _ => open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                    .map_err(|errno| explain(errno.into()))?,
            };
            names.push(format!("/proc/self/fd/{}", layer.as_raw_fd()));
            opened.push(layer);
        }
        short.push(format!("{key}={}", names.join(":")));
    }
    Ok((short.join(","), opened))
}

/// Mounts of an overlay's layers with their ids mapped, for the time of its mounting: overlayfs takes no layer that is mounted nowhere,
/// and keeps a mount of its own.
struct Layers<'a> {
    directory: &'a Path,
    mapped: &'a Mapped,
}

impl<'a> Layers<'a> {
    fn new(directory: &'a Path, mapped: &'a Mapped) -> Self {
        Self { directory, mapped }
    }

    /// Mounts the layer at `path` as the one with this number, and opens it.
    fn map(&self, path: &str, number: usize) -> Result<OwnedFd, Error> {
        let place = self.directory.join(number.to_string());
        create_dir_all(&place)?;
        let how = BindOptions { readonly: true, ..BindOptions::default() };
        bind_mapped(Path::new(path), &place, how, Some(self.mapped)).map_err(Error::other)?;
        Ok(open(&place, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
    }
}

impl Drop for Layers<'_> {
    fn drop(&mut self) {
        for entry in std::fs::read_dir(self.directory).into_iter().flatten().flatten() {
            // What can't be unmounted keeps its directory, and goes with the pod's mount namespace.
            if unmount(&entry.path()).is_ok() {
                let _ = std::fs::remove_dir(entry.path());
            }
        }
        let _ = std::fs::remove_dir(self.directory);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(options: &[&str]) -> Options {
        Options::parse(&options.iter().map(|&option| option.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn sorts_options() {
        let options = parsed(&["rw", "ro", "nosuid", "index=off", "lowerdir=/a:/b", "defaults"]);
        assert_eq!(options.flags, MsFlags::MS_RDONLY | MsFlags::MS_NOSUID);
        assert_eq!(options.data, "index=off,lowerdir=/a:/b");
        assert!(parsed(&["rbind", "ro"]).recursive);
        assert!(!parsed(&["ro", "rw"]).readonly());
    }

    #[test]
    fn names_layers_by_descriptor() {
        let (data, layers) = shorten("lowerdir=/usr:/etc,upperdir=/tmp,userxattr", None).unwrap();
        let [a, b, c] = [&layers[0], &layers[1], &layers[2]].map(|fd| format!("/proc/self/fd/{}", fd.as_raw_fd()));
        assert_eq!(data, format!("lowerdir={a}:{b},upperdir={c},userxattr"));
        assert!(shorten("lowerdir=/no/such/layer", None).unwrap_err().to_string().contains("/no/such/layer"));
        let many = format!("lowerdir={}", vec!["/usr"; MAX_LAYERS + 1].join(":"));
        assert!(shorten(&many, None).is_err());
    }
}
