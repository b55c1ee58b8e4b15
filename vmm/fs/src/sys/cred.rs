//! The calling thread's file-system identity, umask and effective capabilities. All by number: the C library would change every thread.

use super::{Result, check};

/// _LINUX_CAPABILITY_VERSION_3 (capability.h).
const VERSION: u32 = 0x2008_0522;
const CAP_DAC_OVERRIDE: u32 = 1;
const CAP_DAC_READ_SEARCH: u32 = 2;
/// Capabilities that leave the effective set when the file-system uid leaves 0 (capabilities(7)): CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH,
/// FOWNER, FSETID, LINUX_IMMUTABLE, MKNOD, MAC_OVERRIDE.
const FS_SET: u64 = 0b1_1111 | 1 << 9 | 1 << 27 | 1 << 32;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// A thread's capability sets.
#[derive(Clone, Copy, Debug)]
pub struct Caps([Data; 2]);

impl Caps {
    /// The calling thread's.
    pub fn current() -> Result<Self> {
        let mut header = Header { version: VERSION, pid: 0 };
        let mut data = [Data::default(); 2];
        // SAFETY: version 3 writes two data records, which there is room for.
        check(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) })?;
        Ok(Self(data))
    }

    /// These sets as they are for another file-system uid that may still pass directories' permissions: the guest's kernel has
    /// checked the caller against them, with the supplementary groups that we do not know.
    pub fn for_user(mut self) -> Self {
        let effective = u64::from(self.0[0].effective) | u64::from(self.0[1].effective) << 32;
        let pass = effective & (1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH);
        let effective = effective & !FS_SET | pass;
        (self.0[0].effective, self.0[1].effective) = (effective as u32, (effective >> 32) as u32);
        self
    }

    /// Makes them the calling thread's.
    pub fn apply(&self) -> Result<()> {
        let mut header = Header { version: VERSION, pid: 0 };
        // SAFETY: version 3 reads two data records, which are there.
        check(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, self.0.as_ptr()) }).map(drop)
    }
}

/// setfsuid(2); true when the thread has that uid afterwards.
pub fn set_fs_uid(uid: u32) -> bool {
    // SAFETY: takes no memory.
    unsafe {
        libc::syscall(libc::SYS_setfsuid, uid as libc::c_long);
        // -1 changes nothing and tells the present one.
        libc::syscall(libc::SYS_setfsuid, -1 as libc::c_long) as u32 == uid
    }
}

/// setfsgid(2); true when the thread has that gid afterwards.
pub fn set_fs_gid(gid: u32) -> bool {
    // SAFETY: takes no memory.
    unsafe {
        libc::syscall(libc::SYS_setfsgid, gid as libc::c_long);
        // -1 changes nothing and tells the present one.
        libc::syscall(libc::SYS_setfsgid, -1 as libc::c_long) as u32 == gid
    }
}

/// umask(2).
pub fn set_umask(mask: u32) {
    // SAFETY: takes no memory.
    unsafe { libc::umask(mask) };
}

/// unshare(CLONE_FS): from here on this thread has an umask and a working directory of its own.
pub fn own_umask() -> Result<()> {
    // SAFETY: takes no memory.
    check(unsafe { libc::unshare(libc::CLONE_FS) }).map(drop)
}
