//! GETXATTR, LISTXATTR, SETXATTR, REMOVEXATTR. Names go through as they are; which of them the host lets us set is the host's affair.

use std::ffi::CStr;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use super::put;
use crate::server::{Request, Server};
use crate::sys::{self, Errno, node, xattr};
use crate::wire::{GetxattrIn, GetxattrOut, SETXATTR_ACL_KILL_SGID, SetxattrCompatIn, SetxattrIn};

/// XATTR_SIZE_MAX and XATTR_LIST_MAX of limits.h.
const MOST_BYTES: u32 = 64 << 10;
/// XATTR_NAME_MAX of limits.h.
const LONGEST_NAME: usize = 255;

fn take_xattr_name<'a>(request: &mut Request<'a>) -> sys::Result<&'a CStr> {
    let name = request.body.take_string().ok_or(Errno::EINVAL)?;
    if name.count_bytes() == 0 || name.count_bytes() > LONGEST_NAME { Err(Errno::ERANGE) } else { Ok(name) }
}

/// Gives the bytes that `read` puts into a buffer of `size` bytes, or their number if `size` is 0.
fn sized(size: u32, out: &mut Vec<u8>, read: impl FnOnce(&mut [u8]) -> sys::Result<usize>) -> sys::Result<()> {
    if size == 0 {
        let size = read(&mut [])? as u32;
        put(out, &GetxattrOut { size, padding: 0 });
    } else {
        out.resize(size.min(MOST_BYTES) as usize, 0);
        let length = read(out)?;
        out.truncate(length);
    }
    Ok(())
}

impl Server {
    pub(crate) fn getxattr(&self, request: &mut Request<'_>, out: &mut Vec<u8>) -> sys::Result<()> {
        let node = self.node(request)?;
        let GetxattrIn { size, .. } = request.take()?;
        let name = take_xattr_name(request)?;
        let fd = self.tree.fd(&node)?;
        sized(size, out, |buffer| xattr::get(fd.as_fd(), name, buffer))
    }

    pub(crate) fn listxattr(&self, request: &mut Request<'_>, out: &mut Vec<u8>) -> sys::Result<()> {
        let node = self.node(request)?;
        let GetxattrIn { size, .. } = request.take()?;
        let fd = self.tree.fd(&node)?;
        sized(size, out, |buffer| xattr::list(fd.as_fd(), buffer))
    }

    pub(crate) fn setxattr(&self, request: &mut Request<'_>) -> sys::Result<()> {
        let node = self.node(request)?;
        let set = if self.long_setxattr.load(Ordering::Acquire) {
            request.take::<SetxattrIn>()?
        } else {
            let SetxattrCompatIn { size, flags } = request.take()?;
            SetxattrIn { size, flags, ..SetxattrIn::default() }
        };
        let name = take_xattr_name(request)?;
        if set.size > MOST_BYTES {
            return Err(Errno::E2BIG);
        }
        let value = request.body.take_bytes(set.size as usize).ok_or(Errno::EINVAL)?;
        let fd = self.tree.fd(&node)?;
        xattr::set(fd.as_fd(), name, value, set.flags as i32)?;
        if set.setxattr_flags & SETXATTR_ACL_KILL_SGID != 0 {
            // The caller is not of the file's group; the host's kernel, asked by root, does not drop the bit itself.
            let mode = u32::from(node::stat(fd.as_fd())?.stx_mode);
            if mode & libc::S_ISGID != 0 {
                node::chmod(&self.own, fd.as_fd(), mode & 0o7777 & !libc::S_ISGID)?;
            }
        }
        Ok(())
    }

    pub(crate) fn removexattr(&self, request: &mut Request<'_>) -> sys::Result<()> {
        let node = self.node(request)?;
        let name = take_xattr_name(request)?;
        xattr::remove(self.tree.fd(&node)?.as_fd(), name)
    }
}
