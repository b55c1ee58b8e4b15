//! Resource limits (setrlimit(2)).

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::{JailError, failed};

/// Descriptors of a VMM: a pair for each of vsock's 1023 connections, two of them on their way, and the machine's own.
const VMM_FILES: u64 = 4096;

/// Descriptors of an fs daemon: each file that the guest has open is one.
const FS_FILES: u64 = 1 << 20;

pub(crate) fn vmm() -> Result<(), JailError> {
    no_core()?;
    set(Resource::RLIMIT_NOFILE, VMM_FILES, "limit descriptors")
}

pub(crate) fn fs() -> Result<(), JailError> {
    no_core()?;
    // More than fs.nr_open is refused; then as many as there may be.
    match setrlimit(Resource::RLIMIT_NOFILE, FS_FILES, FS_FILES) {
        Ok(()) => Ok(()),
        Err(_) => {
            let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).map_err(failed("ask for the limit of descriptors"))?;
            set(Resource::RLIMIT_NOFILE, most, "limit descriptors")
        }
    }
}

/// Most arenas of glibc's malloc. With more than 8 threads it would count the processors to find its own limit, which it does by
/// opening a file, and that is the end of a filtered thread; a few are enough for threads that hardly allocate.
const ARENAS: libc::c_int = 4;

/// Bounds the memory allocator's arenas. Call it before any thread is filtered.
pub fn bound_arenas() {
    // SAFETY: it sets a number of the allocator's, which takes its own lock.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) };
}

/// The guest's memory belongs in no core file.
fn no_core() -> Result<(), JailError> {
    set(Resource::RLIMIT_CORE, 0, "forbid core files")
}

fn set(resource: Resource, limit: u64, step: &'static str) -> Result<(), JailError> {
    setrlimit(resource, limit, limit).map_err(failed(step))
}
