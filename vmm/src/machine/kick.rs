//! Makes a vCPU leave KVM_RUN from another thread, without a race: `immediate_exit` in its shared page stops the next entry, a
//! signal ends the present one (Linux, Documentation/virt/kvm/api.rst, "The kvm_run structure").

use std::io;
use std::mem::offset_of;
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Installs the signal's handler, which does nothing: the interrupted system call is all that is wanted.
pub(crate) fn prepare() -> io::Result<()> {
    Ok(register_signal_handler(SIGRTMIN(), nothing)?)
}

/// A second mapping of a vCPU's `kvm_run`, so that it can't go away with the vCPU.
pub(crate) struct RunPage {
    page: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: the mapping belongs to no thread, and only its `immediate_exit` byte is accessed, atomically.
unsafe impl Send for RunPage {}

impl RunPage {
    /// Maps the page of a vCPU; `len` is KVM_GET_VCPU_MMAP_SIZE.
    pub(crate) fn map(vcpu: &VcpuFd, len: usize) -> io::Result<Self> {
        let size = NonZeroUsize::new(len).filter(|len| len.get() >= size_of::<kvm_run>());
        let size = size.ok_or_else(|| io::Error::other("KVM's vCPU page is too small"))?;
        // SAFETY: the descriptor is open for as long as `vcpu` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let page =
            unsafe { mmap(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, fd, 0) }?;
        Ok(Self { page, len })
    }

    fn exit_immediately(&self) {
        // SAFETY: the byte lies in the mapping, which lives as long as self, and is only written whole.
        let byte =
            unsafe { AtomicU8::from_ptr(self.page.as_ptr().cast::<u8>().add(offset_of!(kvm_run, immediate_exit))) };
        byte.store(1, Ordering::SeqCst);
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone and nobody holds a reference into it.
        let _ = unsafe { munmap(self.page, self.len) };
    }
}

/// A vCPU's thread and how to interrupt it.
pub(crate) struct Kicker {
    page: RunPage,
    thread: JoinHandle<()>,
}

impl Kicker {
    /// For the thread that runs the vCPU of this page.
    pub(crate) fn new(page: RunPage, thread: JoinHandle<()>) -> Self {
        Self { page, thread }
    }

    /// Makes the vCPU leave KVM_RUN, or not enter it.
    pub(crate) fn kick(&self) -> io::Result<()> {
        self.page.exit_immediately();
        Ok(self.thread.kill(SIGRTMIN())?)
    }
}
