//! What one thread that serves requests owns: its buffers, its umask, and how it acts as the guest's caller.

use crate::sys::cred::{self, Caps};
use crate::sys::{self, Errno};

/// A serving thread's own. Made on the thread that uses it and never moved to another.
#[derive(Debug)]
pub struct Worker {
    /// The request's body.
    pub body: Vec<u8>,
    /// The reply's payload.
    pub reply: Vec<u8>,
    own_umask: bool,
    umask: u32,
    caps: Caps,
}

impl Worker {
    /// For the calling thread.
    pub fn new() -> sys::Result<Self> {
        let own_umask = cred::own_umask();
        if let Err(errno) = own_umask {
            tracing::warn!(%errno, "this thread shares its umask: default ACLs of directories are applied after the umask");
        }
        cred::set_umask(0);
        Ok(Self { body: Vec::new(), reply: Vec::new(), own_umask: own_umask.is_ok(), umask: 0, caps: Caps::current()? })
    }

    /// Runs `make` (which creates an entry with the mode that it is given) with the file-system uid and gid of the guest's caller, so that
    /// the new file belongs to it and set-group-id directories and default ACLs work as they do on the host.
    pub fn create_as<T>(
        &mut self,
        (uid, gid): (u32, u32),
        mode: u32,
        umask: u32,
        make: impl FnOnce(u32) -> sys::Result<T>,
    ) -> sys::Result<T> {
        let umask = umask & 0o777;
        let mode = if self.own_umask {
            if umask != self.umask {
                cred::set_umask(umask);
                self.umask = umask;
            }
            mode
        } else {
            mode & !umask
        };
        if (uid, gid) == (0, 0) {
            return make(mode);
        }
        let _identity = Identity::switch(uid, gid, &self.caps)?;
        make(mode)
    }
}

/// The thread as somebody else, until dropped.
struct Identity<'a>(&'a Caps);

impl<'a> Identity<'a> {
    fn switch(uid: u32, gid: u32, caps: &'a Caps) -> sys::Result<Self> {
        if uid == u32::MAX || gid == u32::MAX {
            return Err(Errno::EINVAL);
        }
        let identity = Self(caps);
        if !cred::set_fs_gid(gid) || !cred::set_fs_uid(uid) {
            return Err(Errno::EPERM);
        }
        if uid != 0 {
            caps.for_user().apply()?;
        }
        Ok(identity)
    }
}

impl Drop for Identity<'_> {
    fn drop(&mut self) {
        let back = cred::set_fs_uid(0) && cred::set_fs_gid(0) && self.0.apply().is_ok();
        if !back {
            // The thread's next request would act as the wrong user; it has no way on.
            tracing::error!("cannot go back to the daemon's own user");
            std::process::abort();
        }
    }
}
