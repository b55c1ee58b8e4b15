//! A container's terminal: made in its own devpts, by descriptors only (CVE-2025-52565).

use std::{
    ffi::OsStr,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use nix::{
    fcntl::{OFlag, openat},
    sys::{
        stat::{Mode, SFlag, fstat, makedev},
        statfs::{DEVPTS_SUPER_MAGIC, fstatfs},
    },
    unistd::{Gid, Uid, fchown},
};

use crate::{
    fault::{Doing, Fault, Step},
    paths::{self, Links, Missing, is},
    sys,
};

/// Both ends of a terminal.
pub(crate) struct Terminal {
    /// The agent's end.
    pub(crate) master: OwnedFd,
    /// The process's end.
    pub(crate) slave: OwnedFd,
}

/// Makes a terminal of the given size in the devpts at /dev/pts below `root`.
pub(crate) fn open(root: &OwnedFd, (width, height): (u16, u16)) -> Step<Terminal> {
    let missing = |_| Fault::new("a terminal needs a devpts at /dev/pts");
    let pts = paths::walk(root, Path::new("/dev/pts"), Missing::Fail, Links::Refuse).map_err(missing)?;
    let kind = fstatfs(&pts).doing(|| "look at /dev/pts")?.filesystem_type();
    let ptmx = paths::open_entry(&pts, OsStr::new("ptmx")).map_err(missing)?;
    let stat = fstat(&ptmx).doing(|| "look at /dev/pts/ptmx")?;
    // In a real devpts nobody can put a file of this name; the number is that of ptmx (devices.txt, major 5).
    if kind != DEVPTS_SUPER_MAGIC || !is(&stat, SFlag::S_IFCHR) || stat.st_rdev != makedev(5, 2) {
        return Err(Fault::new("/dev/pts is not a devpts"));
    }
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let master = openat(&pts, "ptmx", flags, Mode::empty()).doing(|| "open /dev/pts/ptmx")?;
    sys::unlock_terminal(&master).doing(|| "unlock the terminal")?;
    let slave = sys::terminal_peer(&master).doing(|| "open the terminal's other end")?;
    if width != 0 && height != 0 {
        sys::set_window_size(&slave, width, height).doing(|| "set the terminal's size")?;
    }
    Ok(Terminal { master, slave })
}

impl Terminal {
    /// Shows the terminal as /dev/console.
    pub(crate) fn bind_console(&self, root: &OwnedFd) -> Step<()> {
        let target =
            paths::walk(root, Path::new("/dev/console"), Missing::File, Links::Refuse).doing(|| "make /dev/console")?;
        let tree = sys::clone_tree(Some(self.slave.as_fd()), c"", false).doing(|| "clone the terminal")?;
        sys::attach(tree, target).doing(|| "bind /dev/console")
    }

    /// Gives it to the process's user, so that the user may open it again by name.
    pub(crate) fn give_to(&self, uid: u32) -> Step<()> {
        fchown(&self.slave, Some(Uid::from_raw(uid)), None::<Gid>).doing(|| "give the terminal to the user")
    }
}
