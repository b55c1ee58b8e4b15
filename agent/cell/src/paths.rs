//! Walks of paths inside a container's root, one component at a time, that can't leave it.
//!
//! No symbolic link is ever followed by the kernel: each is read and its text walked here, with the root as `/` and as the end
//! of `..`. So /proc's magic links are but text, and a directory moved meanwhile leads nowhere else.

use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    os::fd::{AsFd, OwnedFd},
    path::{Component, Path},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat, readlinkat},
    sys::stat::{FileStat, Mode, SFlag, fstat, mkdirat},
};

/// The kernel's own limit (path_resolution(7)).
const MAX_LINKS: usize = 40;
/// More than any PATH_MAX path can have.
const MAX_STEPS: usize = 4096;

/// What to do about missing components.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    /// Fail with ENOENT.
    Fail,
    /// Make directories.
    Directory,
    /// Make directories, and an empty file as the last.
    File,
}

/// What to do about symbolic links.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Links {
    /// Follow them inside the root.
    Follow,
    /// Fail with ELOOP.
    Refuse,
}

/// Opens (O_PATH) what `path` names under `root`; a last component that is a link is followed too.
pub(crate) fn walk(root: &OwnedFd, path: &Path, missing: Missing, links: Links) -> nix::Result<OwnedFd> {
    let mut pending: VecDeque<OsString> = VecDeque::new();
    push_front(&mut pending, path);
    let mut stack = vec![root.try_clone().map_err(|_| Errno::EMFILE)?];
    let (mut followed, mut steps) = (0, 0);
    while let Some(name) = pending.pop_front() {
        steps += 1;
        if steps > MAX_STEPS {
            return Err(Errno::ENAMETOOLONG);
        }
        if name == ".." {
            if stack.len() > 1 {
                stack.pop();
            }
            continue;
        }
        let here = stack.last().unwrap_or(root);
        let entry = match open_entry(here, &name) {
            Err(Errno::ENOENT) if missing != Missing::Fail => {
                make(here, &name, missing == Missing::File && pending.is_empty())?;
                open_entry(here, &name)?
            }
            other => other?,
        };
        if !is(&fstat(&entry)?, SFlag::S_IFLNK) {
            stack.push(entry);
            continue;
        }
        followed += 1;
        if links == Links::Refuse || followed > MAX_LINKS {
            return Err(Errno::ELOOP);
        }
        let target = readlinkat(&entry, OsStr::new(""))?;
        if Path::new(&target).is_absolute() {
            stack.truncate(1);
        }
        push_front(&mut pending, Path::new(&target));
    }
    stack.pop().ok_or(Errno::ENOENT)
}

/// Opens the directory that holds the last component of `path`, making directories on the way, and returns that component.
pub(crate) fn parent<'a>(root: &OwnedFd, path: &'a Path) -> nix::Result<(OwnedFd, &'a OsStr)> {
    let name = path.file_name().ok_or(Errno::EINVAL)?;
    let directory = path.parent().ok_or(Errno::EINVAL)?;
    Ok((walk(root, directory, Missing::Directory, Links::Follow)?, name))
}

/// Whether a file is of this type.
pub(crate) fn is(stat: &FileStat, kind: SFlag) -> bool {
    stat.st_mode & SFlag::S_IFMT.bits() == kind.bits()
}

/// Opens one name, never through a link.
pub(crate) fn open_entry(directory: impl AsFd, name: &OsStr) -> nix::Result<OwnedFd> {
    openat(directory, name, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
}

/// The stat of one name, not through a link.
pub(crate) fn stat_entry(directory: impl AsFd, name: &OsStr) -> nix::Result<FileStat> {
    nix::sys::stat::fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)
}

fn make(directory: &OwnedFd, name: &OsStr, file: bool) -> nix::Result<()> {
    let made = if file {
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_WRONLY;
        openat(directory, name, flags, Mode::from_bits_truncate(0o644)).map(drop)
    } else {
        mkdirat(directory, name, Mode::from_bits_truncate(0o755))
    };
    match made {
        // Somebody else made it meanwhile: what it is, is looked at next.
        Err(Errno::EEXIST) => Ok(()),
        other => other,
    }
}

fn push_front(pending: &mut VecDeque<OsString>, path: &Path) {
    for component in path.components().rev() {
        match component {
            Component::Normal(name) => pending.push_front(name.to_owned()),
            Component::ParentDir => pending.push_front("..".into()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt, symlink},
        path::PathBuf,
    };

    use super::*;

    struct Root(PathBuf, OwnedFd);

    impl Root {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("husk-walk-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            let fd = fs::File::open(&path).unwrap().into();
            Self(path, fd)
        }
        fn walk(&self, path: &str, missing: Missing) -> nix::Result<u64> {
            walk(&self.1, Path::new(path), missing, Links::Follow).map(|fd| fstat(fd).unwrap().st_ino)
        }
        fn inode(&self, path: &str) -> u64 {
            fs::symlink_metadata(self.0.join(path)).unwrap().ino()
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn links_and_dots_stay_inside() {
        let root = Root::new("inside");
        fs::create_dir_all(root.0.join("etc")).unwrap();
        symlink("/etc", root.0.join("absolute")).unwrap();
        symlink("../../../../etc", root.0.join("up")).unwrap();
        for path in ["/absolute", "up", "/../../etc", "etc/../absolute/."] {
            assert_eq!(root.walk(path, Missing::Fail), Ok(root.inode("etc")), "{path}");
        }
    }

    #[test]
    fn dangling_links_are_completed_inside() {
        let root = Root::new("dangling");
        fs::create_dir(root.0.join("var")).unwrap();
        symlink("/run", root.0.join("var/run")).unwrap();
        let made = root.walk("/var/run/secrets/token", Missing::File).unwrap();
        assert_eq!(made, root.inode("run/secrets/token"));
        assert!(root.0.join("run/secrets/token").is_file());
    }

    #[test]
    fn loops_end_and_magic_links_are_text() {
        let root = Root::new("loops");
        symlink("b", root.0.join("a")).unwrap();
        symlink("a", root.0.join("b")).unwrap();
        symlink("/proc/self/fd/0", root.0.join("magic")).unwrap();
        assert_eq!(root.walk("a", Missing::Directory), Err(Errno::ELOOP));
        assert_eq!(root.walk("magic", Missing::Fail), Err(Errno::ENOENT));
        let proc: OwnedFd = fs::File::open("/proc").unwrap().into();
        let through = walk(&proc, Path::new("self/fd/0/etc"), Missing::Fail, Links::Follow);
        assert!(through.is_err(), "a magic link was followed");
    }

    #[test]
    fn refused_links() {
        let root = Root::new("refused");
        symlink("/elsewhere", root.0.join("proc")).unwrap();
        assert_eq!(walk(&root.1, Path::new("/proc"), Missing::Directory, Links::Refuse).unwrap_err(), Errno::ELOOP);
    }
}
