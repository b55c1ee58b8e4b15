//! `tmpcopyup`: a tmpfs that starts with a copy of the directory it covers.

use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    dir::Dir,
    fcntl::{AtFlags, OFlag, openat, readlinkat},
    sys::stat::{Mode, SFlag, fchmod, fstat, mkdirat},
    unistd::{Gid, Uid, fchown, fchownat, symlinkat},
};

use crate::{
    fault::{Doing, Fault, Step},
    paths::{is, stat_entry},
};

/// The image's author decides what is there: deeper trees and more entries are refused.
const MAX_DEPTH: usize = 64;
const MAX_ENTRIES: usize = 100_000;

/// Copies directories, regular files and links from `from` (O_PATH) to the detached mount `to`. The tmpfs's size limits the bytes.
pub(crate) fn copy(from: &OwnedFd, to: &OwnedFd) -> Step<()> {
    let mut left = MAX_ENTRIES;
    copy_directory(from, to, MAX_DEPTH, &mut left).doing(|| "copy up")
}

fn copy_directory(from: &OwnedFd, to: &OwnedFd, depth: usize, left: &mut usize) -> Step<()> {
    if depth == 0 {
        return Err(Fault::new("the directory is too deep"));
    }
    let source = openat(from, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .doing(|| "open a directory")?;
    let mut listing = Dir::from_fd(source).doing(|| "list a directory")?;
    let names: Vec<_> = listing
        .iter()
        .map(|entry| entry.map(|e| e.file_name().to_owned()))
        .collect::<Result<_, _>>()
        .doing(|| "list a directory")?;
    for name in names.iter().filter(|n| n.as_bytes() != b"." && n.as_bytes() != b"..") {
        *left = left.checked_sub(1).ok_or_else(|| Fault::new("the directory has too many entries"))?;
        let name = std::ffi::OsStr::new(name.to_str().map_err(|_| Fault::new("a file name is not UTF-8"))?);
        copy_entry(from, to, name, depth, left).doing(|| name.to_string_lossy().into_owned())?;
    }
    Ok(())
}

fn copy_entry(from: &OwnedFd, to: &OwnedFd, name: &std::ffi::OsStr, depth: usize, left: &mut usize) -> Step<()> {
    let stat = stat_entry(from, name).doing(|| "stat")?;
    let (uid, gid) = (Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)));
    let mode = Mode::from_bits_truncate(stat.st_mode & 0o7777);
    if is(&stat, SFlag::S_IFDIR) {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let inner = openat(from, name, flags, Mode::empty()).doing(|| "open")?;
        mkdirat(to, name, Mode::S_IRWXU).doing(|| "make")?;
        let copy = openat(to, name, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
            .doing(|| "open the copy")?;
        copy_directory(&inner, &copy, depth - 1, left)?;
        finish(&copy, uid, gid, mode)
    } else if is(&stat, SFlag::S_IFLNK) {
        let target = readlinkat(from, name).doing(|| "read the link")?;
        symlinkat(target.as_os_str(), to, name).doing(|| "make the link")?;
        fchownat(to, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW).doing(|| "set the owner")
    } else if is(&stat, SFlag::S_IFREG) {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let mut input = File::from(openat(from, name, flags, Mode::empty()).doing(|| "open")?);
        if !is(&fstat(&input).doing(|| "stat")?, SFlag::S_IFREG) {
            return Err(Fault::new("it changed meanwhile"));
        }
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        let mut output = File::from(openat(to, name, flags, Mode::S_IRWXU).doing(|| "make")?);
        std::io::copy(&mut input, &mut output).doing(|| "copy")?;
        finish(&output, uid, gid, mode)
    } else {
        // Devices, FIFOs and sockets are nobody's data.
        Ok(())
    }
}

/// Owner first: changing it clears set-id bits.
fn finish(file: impl AsFd, uid: Option<Uid>, gid: Option<Gid>, mode: Mode) -> Step<()> {
    fchown(&file, uid, gid).doing(|| "set the owner")?;
    fchmod(&file, mode).doing(|| "set the mode")
}
