//! File handles (name_to_handle_at(2), open_by_handle_at(2)): a file's name that costs no descriptor. Opening one needs CAP_DAC_READ_SEARCH.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use super::{Result, check, new_fd};

/// MAX_HANDLE_SZ of the kernel's fs.h.
const MAX_BYTES: usize = 128;

/// `struct file_handle` with room for the longest handle.
#[repr(C)]
struct Raw {
    bytes: u32,
    kind: i32,
    data: [u8; MAX_BYTES],
}

/// A file's handle within its file system. Only ever made from a descriptor, never from the guest's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileHandle {
    kind: i32,
    data: Box<[u8]>,
}

impl FileHandle {
    /// The handle of what `fd` refers to; EOPNOTSUPP on file systems without handles.
    pub fn of(fd: BorrowedFd<'_>) -> Result<Self> {
        let mut raw = Raw { bytes: MAX_BYTES as u32, kind: 0, data: [0; MAX_BYTES] };
        let mut mount_id = 0;
        // SAFETY: `raw` is laid out as the kernel's file_handle and says how much room follows its head; `mount_id` is an int.
        check(unsafe {
            libc::name_to_handle_at(
                fd.as_raw_fd(),
                c"".as_ptr(),
                (&raw mut raw).cast(),
                &raw mut mount_id,
                libc::AT_EMPTY_PATH,
            )
        })?;
        let length = (raw.bytes as usize).min(MAX_BYTES);
        Ok(Self { kind: raw.kind, data: raw.data[..length].into() })
    }

    /// Opens the file through `mount`, a real (not O_PATH) descriptor on the mount it was seen on; that mount's read-only flag holds.
    pub fn open(&self, mount: BorrowedFd<'_>, flags: i32) -> Result<OwnedFd> {
        let mut raw = Raw { bytes: self.data.len() as u32, kind: self.kind, data: [0; MAX_BYTES] };
        raw.data[..self.data.len()].copy_from_slice(&self.data);
        // SAFETY: `raw` is laid out as the kernel's file_handle and its length field is true.
        new_fd(
            unsafe { libc::open_by_handle_at(mount.as_raw_fd(), (&raw mut raw).cast(), flags | libc::O_CLOEXEC) }
                .into(),
        )
    }
}
