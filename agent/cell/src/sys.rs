//! Linux calls that neither nix nor libc wraps: the mount API by descriptors, clone3, close_range, pidfds.
//! Sources: mount_setattr(2), open_tree(2), move_mount(2), fsopen(2), clone(2), include/uapi/linux/mount.h.

use std::{
    ffi::{CStr, CString},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

use nix::{Result, errno::Errno};

/// linux/mount.h `MOUNT_ATTR_*`.
pub(crate) mod attr {
    pub(crate) const RDONLY: u64 = 0x1;
    pub(crate) const NOSUID: u64 = 0x2;
    pub(crate) const NODEV: u64 = 0x4;
    pub(crate) const NOEXEC: u64 = 0x8;
    pub(crate) const ATIME_MASK: u64 = 0x70;
    pub(crate) const NOATIME: u64 = 0x10;
    pub(crate) const STRICTATIME: u64 = 0x20;
    pub(crate) const NODIRATIME: u64 = 0x80;
    pub(crate) const NOSYMFOLLOW: u64 = 0x20_0000;
}

const OPEN_TREE_CLONE: u32 = 1;
const OPEN_TREE_CLOEXEC: u32 = libc::O_CLOEXEC as u32;
const AT_EMPTY_PATH: u32 = 0x1000;
const AT_RECURSIVE: u32 = 0x8000;
const MOVE_MOUNT_F_EMPTY_PATH: u32 = 0x4;
const MOVE_MOUNT_T_EMPTY_PATH: u32 = 0x40;
const FSOPEN_CLOEXEC: u32 = 1;
const FSMOUNT_CLOEXEC: u32 = 1;
const FSCONFIG_SET_FLAG: u32 = 0;
const FSCONFIG_SET_STRING: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;

/// `clone3` puts the child into [`CloneArgs::cgroup`] (linux/sched.h).
pub(crate) const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// What a mount's attributes are to become; `struct mount_attr` (linux/mount.h).
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MountAttr {
    pub(crate) set: u64,
    pub(crate) clear: u64,
    pub(crate) propagation: u64,
    pub(crate) userns_fd: u64,
}

fn fd(result: libc::c_long) -> Result<OwnedFd> {
    let raw = Errno::result(result)?;
    // SAFETY: the kernel has just made this descriptor for us, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw as RawFd) })
}

/// A detached copy of the mount at `path`, seen from `dir` (an empty path: `dir` itself); `recursive`: with all mounts below.
pub(crate) fn clone_tree(dir: Option<BorrowedFd<'_>>, path: &CStr, recursive: bool) -> Result<OwnedFd> {
    let mut flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH;
    if recursive {
        flags |= AT_RECURSIVE;
    }
    let at = dir.map_or(libc::AT_FDCWD, |fd| fd.as_raw_fd());
    // SAFETY: `path` is a C string that outlives the call; the kernel keeps no pointer.
    fd(unsafe { libc::syscall(libc::SYS_open_tree, at, path.as_ptr(), flags) })
}

/// Attaches the detached mount `tree` on top of `target`.
pub(crate) fn attach(tree: impl AsFd, target: impl AsFd) -> Result<()> {
    let (from, to) = (tree.as_fd().as_raw_fd(), target.as_fd().as_raw_fd());
    // SAFETY: both paths are C string constants.
    let done = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            from,
            c"".as_ptr(),
            to,
            c"".as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
        )
    };
    Errno::result(done).map(drop)
}

/// Changes a mount, or with `recursive` it and all below.
pub(crate) fn set_attributes(mount: impl AsFd, change: MountAttr, recursive: bool) -> Result<()> {
    if change == MountAttr::default() {
        return Ok(());
    }
    let flags = AT_EMPTY_PATH | if recursive { AT_RECURSIVE } else { 0 };
    // SAFETY: `change` is a live `struct mount_attr` of the size given.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const change,
            size_of::<MountAttr>(),
        )
    };
    Errno::result(done).map(drop)
}

/// A new, detached mount of a file system of `kind`. Options without a value are flags. On failure the kernel's own words, if it has any.
pub(crate) fn new_filesystem(
    kind: &str,
    source: Option<&str>,
    options: &[(String, Option<String>)],
    attributes: u64,
) -> std::result::Result<OwnedFd, (String, Errno)> {
    let c = |text: &str| CString::new(text).map_err(|_| ("a NUL byte in an option".to_owned(), Errno::EINVAL));
    let name = c(kind)?;
    // SAFETY: `name` is a C string that outlives the call.
    let context = fd(unsafe { libc::syscall(libc::SYS_fsopen, name.as_ptr(), FSOPEN_CLOEXEC) })
        .map_err(|errno| (format!("file system type \"{kind}\""), errno))?;
    let configure = |command: u32, key: Option<&CStr>, value: Option<&CStr>| {
        let pointer = |text: Option<&CStr>| text.map_or(ptr::null(), CStr::as_ptr);
        // SAFETY: the strings outlive the call, null where the command takes none.
        let done =
            unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, pointer(key), pointer(value), 0) };
        Errno::result(done).map(drop)
    };
    if let Some(source) = source {
        configure(FSCONFIG_SET_STRING, Some(c"source"), Some(&c(source)?))
            .map_err(|errno| (format!("source \"{source}\""), errno))?;
    }
    for (key, value) in options {
        let (ckey, cvalue) = (c(key)?, value.as_deref().map(c).transpose()?);
        let command = if cvalue.is_some() { FSCONFIG_SET_STRING } else { FSCONFIG_SET_FLAG };
        configure(command, Some(&ckey), cvalue.as_deref()).map_err(|errno| (explain(&context, key), errno))?;
    }
    configure(FSCONFIG_CMD_CREATE, None, None).map_err(|errno| (explain(&context, kind), errno))?;
    // SAFETY: no pointers are passed.
    fd(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, attributes) })
        .map_err(|errno| (kind.to_owned(), errno))
}

/// The newest message in the file system context's log, else what was being set.
fn explain(context: &OwnedFd, what: &str) -> String {
    let mut text = [0_u8; 256];
    match nix::unistd::read(context, &mut text) {
        Ok(length) => format!("{what} ({})", String::from_utf8_lossy(&text[..length]).trim()),
        Err(_) => what.to_owned(),
    }
}

/// The child of [`fork_into`].
pub(crate) enum Forked {
    /// We are the child.
    Child,
    /// We are the parent.
    Parent {
        /// The child's pid as we see it.
        pid: i32,
        /// The child itself.
        pidfd: OwnedFd,
    },
}

/// `struct clone_args` (linux/sched.h), version 2.
#[repr(C, align(8))]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Forks with `namespaces` (CLONE_NEW*) new for the child, which is born in `cgroup` if given and is a child of our parent, not of us.
///
/// # Safety
/// The process must have one thread only, or the child may find locks held that nobody will ever release.
pub(crate) unsafe fn fork_into(namespaces: u64, cgroup: Option<BorrowedFd<'_>>) -> Result<Forked> {
    let mut pidfd: RawFd = -1;
    let mut args = CloneArgs {
        flags: namespaces | (libc::CLONE_PARENT | libc::CLONE_PIDFD) as u64,
        pidfd: &raw mut pidfd as u64,
        ..CloneArgs::default()
    };
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: as fork: no stack, no TLS; the caller vouches that we are the only thread. `args` and `pidfd` are live.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) };
    match Errno::result(pid)? {
        0 => Ok(Forked::Child),
        // SAFETY: clone3 succeeded with CLONE_PIDFD, so it stored a descriptor that is ours.
        pid => Ok(Forked::Parent { pid: pid as i32, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } }),
    }
}

/// A descriptor of the process `pid`, which must be an unreaped child of ours (else the pid may be somebody else's by now).
pub(crate) fn pidfd_open(pid: i32) -> Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    fd(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// SIGKILL; an already dead process is success.
pub(crate) fn pidfd_kill(pidfd: impl AsFd) -> Result<()> {
    let raw = pidfd.as_fd().as_raw_fd();
    // SAFETY: a null siginfo is allowed.
    let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, raw, libc::SIGKILL, ptr::null::<()>(), 0) };
    match Errno::result(sent) {
        Ok(_) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Every descriptor from `first` on closes at exec.
pub(crate) fn close_on_exec_from(first: u32) -> Result<()> {
    // SAFETY: only a flag of descriptors changes, none is closed.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    Errno::result(done).map(drop)
}

/// Joins a new session keyring called `name`, so that the container can't reach the agent's. A kernel without keys is fine.
pub(crate) fn new_session_keyring(name: &CStr) -> Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    // SAFETY: `name` is a C string that outlives the call.
    let done = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) };
    match Errno::result(done) {
        Ok(_) | Err(Errno::ENOSYS) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// The calling process's I/O priority, class and level packed as in linux/ioprio.h (ioprio_set(2)).
pub(crate) fn set_io_priority(packed: libc::c_int) -> Result<()> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    // SAFETY: no pointers are passed.
    Errno::result(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, packed) }).map(drop)
}

/// The calling process's scheduling policy (sched_setattr(2)).
pub(crate) fn set_scheduler(attributes: &libc::sched_attr) -> Result<()> {
    // SAFETY: the kernel reads a live sched_attr, whose `size` is its own.
    Errno::result(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, ptr::from_ref(attributes), 0) }).map(drop)
}

/// The other end of a terminal's master, without any path (ioctl_tty(2), TIOCGPTPEER).
pub(crate) fn terminal_peer(master: impl AsFd) -> Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes flags by value and returns a new descriptor.
    fd(unsafe { libc::ioctl(master.as_fd().as_raw_fd(), libc::TIOCGPTPEER, flags) }.into())
}

/// Unlocks a terminal's other end (TIOCSPTLCK).
pub(crate) fn unlock_terminal(master: impl AsFd) -> Result<()> {
    let locked: libc::c_int = 0;
    // SAFETY: the kernel reads one int.
    Errno::result(unsafe { libc::ioctl(master.as_fd().as_raw_fd(), libc::TIOCSPTLCK, &raw const locked) }).map(drop)
}

/// Sets a terminal's size in characters.
pub(crate) fn set_window_size(terminal: impl AsFd, width: u16, height: u16) -> Result<()> {
    let size = libc::winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel reads one winsize.
    Errno::result(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }).map(drop)
}

/// Makes `terminal` the controlling one of our session.
pub(crate) fn take_terminal(terminal: impl AsFd) -> Result<()> {
    // SAFETY: TIOCSCTTY takes an int by value.
    Errno::result(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSCTTY, 0) }).map(drop)
}

/// Makes `source` also the descriptor `number`, open across exec.
pub(crate) fn duplicate_onto(source: impl AsFd, number: RawFd) -> Result<()> {
    let raw = source.as_fd().as_raw_fd();
    if raw == number {
        // SAFETY: only a descriptor flag is cleared.
        return Errno::result(unsafe { libc::fcntl(raw, libc::F_SETFD, 0) }).map(drop);
    }
    // SAFETY: `number` is one of 0, 1, 2, which no OwnedFd of this program holds while it is replaced.
    Errno::result(unsafe { libc::dup2(raw, number) }).map(drop)
}

/// Gives every signal its default action (signal(7)), also 32 and 33, which the C library keeps for itself and leaves ignored where it
/// has spawned a program. Raw, since its own sigaction refuses these.
pub(crate) fn reset_signals() {
    /// The kernel's own `struct sigaction` on x86_64 and most others: handler, flags, restorer, mask.
    const DEFAULT: [u64; 4] = [0; 4];
    const SIGNALS: libc::c_int = 64;
    for signal in 1..=SIGNALS {
        // SAFETY: the kernel reads one sigaction, whose mask is of 8 bytes. SIGKILL and SIGSTOP are refused, which is fine.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, DEFAULT.as_ptr(), ptr::null::<()>(), 8) };
    }
}

/// Installs a seccomp filter for this process (seccomp(2)). `program` is what libseccomp exports: an array of `struct sock_filter`.
pub(crate) fn install_filter(program: &mut [libc::sock_filter], flags: libc::c_ulong) -> Result<()> {
    let length = libc::c_ushort::try_from(program.len()).map_err(|_| Errno::EINVAL)?;
    let prog = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    // SAFETY: `prog` describes a live array.
    let done = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const prog) };
    Errno::result(done).map(drop)
}
