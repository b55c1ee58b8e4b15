//! Reads and writes of a cgroup's files.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::Path,
};

use nix::errno::Errno;

use crate::CgroupError;

/// No file of a cgroup is longer but a huge cgroup.procs: that is cut.
const MAX_FILE: usize = 4 << 20;

pub(super) fn error(doing: &str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let (doing, path) = (doing.to_owned(), path.to_owned());
    move |source| CgroupError::File { doing, path, source }
}

pub(super) fn read(directory: &Path, name: &str) -> Result<String, CgroupError> {
    let path = directory.join(name);
    File::open(&path).and_then(|file| read_open(&file)).map_err(error("read", &path))
}

/// From the start, whatever was read before.
pub(super) fn read_open(file: &File) -> io::Result<String> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    while bytes.len() < MAX_FILE {
        match file.read_at(&mut chunk, bytes.len() as u64)? {
            0 => break,
            length => bytes.extend_from_slice(&chunk[..length]),
        }
    }
    String::from_utf8(bytes).map_err(|_| io::ErrorKind::InvalidData.into())
}

pub(super) fn write(directory: &Path, name: &str, value: &str) -> Result<(), CgroupError> {
    let path = directory.join(name);
    OpenOptions::new()
        .write(true)
        .open(&path)
        // One write: the kernel takes each as a whole.
        .and_then(|mut file| file.write_all(value.as_bytes()))
        .map_err(error(&format!("write \"{value}\" to"), &path))
}

/// Whether the kernel's answer was one of these.
pub(super) fn is_any(error: &CgroupError, numbers: &[Errno]) -> bool {
    match error {
        CgroupError::File { source, .. } => {
            source.raw_os_error().is_some_and(|raw| numbers.contains(&Errno::from_raw(raw)))
        }
        _ => false,
    }
}
