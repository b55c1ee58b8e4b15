//! INIT, DESTROY, STATFS, FORGET, BATCH_FORGET.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use super::put;
use crate::server::{MOST_DATA, Request, Server};
use crate::sys::{self, Errno, node};
use crate::wire::{
    BatchForgetIn, ForgetIn, ForgetOne, InitFlags, InitIn, InitOut, MAJOR, MINOR, OLDEST_MINOR, StatfsOut,
};

/// Background requests that the guest may have under way, and how many of them make it slow down read-ahead.
const BACKGROUND: (u16, u16) = (64, 48);
/// Largest reply page count that MAX_PAGES may ask for, and Linux' own limit (FUSE_MAX_MAX_PAGES).
const MOST_PAGES: u16 = (MOST_DATA >> 12) as u16;

impl Server {
    /// Agrees on version and features. A second INIT is a rebooted guest: all that the first one held is dropped.
    pub(crate) fn init(&self, request: &mut Request<'_>, out: &mut Vec<u8>) -> sys::Result<()> {
        let init: InitIn = request.take()?;
        if init.major > MAJOR {
            // The kernel then asks again with our major version.
            put(out, &InitOut { major: MAJOR, minor: MINOR, ..InitOut::default() });
            return Ok(());
        }
        if init.major < MAJOR || init.minor < OLDEST_MINOR {
            return Err(Errno::EPROTO);
        }
        let mut offered = InitFlags::from_bits_retain(u64::from(init.flags));
        if offered.contains(InitFlags::INIT_EXT) {
            offered |= InitFlags::from_bits_retain(u64::from(request.take::<u32>()?) << 32);
        }
        let agreed = offered & InitFlags::all();
        self.forget_all()?;
        self.long_setxattr.store(agreed.contains(InitFlags::SETXATTR_EXT), Ordering::Release);
        self.ready.store(true, Ordering::Release);
        put(
            out,
            &InitOut {
                major: MAJOR,
                minor: MINOR.min(init.minor),
                max_readahead: init.max_readahead.min(MOST_DATA as u32),
                flags: agreed.bits() as u32,
                max_background: BACKGROUND.0,
                congestion_threshold: BACKGROUND.1,
                max_write: MOST_DATA as u32,
                time_gran: 1,
                max_pages: MOST_PAGES,
                flags2: (agreed.bits() >> 32) as u32,
                ..InitOut::default()
            },
        );
        Ok(())
    }

    /// The guest unmounted.
    pub(crate) fn destroy(&self) -> sys::Result<()> {
        self.ready.store(false, Ordering::Release);
        self.forget_all()
    }

    fn forget_all(&self) -> sys::Result<()> {
        self.handles.reset();
        self.tree.reset()
    }

    /// FORGET and BATCH_FORGET have no reply, so that what is wrong with one is passed over.
    pub(crate) fn forget(&self, request: &mut Request<'_>) {
        if request.header.opcode == crate::wire::opcode::FORGET {
            if let Ok(forget) = request.take::<ForgetIn>() {
                self.tree.forget(request.header.nodeid, forget.nlookup);
            }
            return;
        }
        let Ok(batch) = request.take::<BatchForgetIn>() else { return };
        for _ in 0..batch.count {
            // The body's end bounds the loop, whatever the count says.
            let Ok(one) = request.take::<ForgetOne>() else { return };
            self.tree.forget(one.nodeid, one.nlookup);
        }
    }

    /// STATFS.
    pub(crate) fn statfs(&self, request: &mut Request<'_>, out: &mut Vec<u8>) -> sys::Result<()> {
        let fd = self.tree.fd(&self.node(request)?)?;
        let figures = node::statfs(fd.as_fd())?;
        put(
            out,
            &StatfsOut {
                blocks: figures.f_blocks,
                bfree: figures.f_bfree,
                bavail: figures.f_bavail,
                files: figures.f_files,
                ffree: figures.f_ffree,
                bsize: figures.f_bsize as u32,
                namelen: figures.f_namelen as u32,
                frsize: figures.f_frsize as u32,
                ..StatfsOut::default()
            },
        );
        Ok(())
    }
}
