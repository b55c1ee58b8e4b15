//! Guest memory: one sealed memfd per region, mapped shared, since husk-fs maps it too.

use std::fs::File;
use std::io;
use std::sync::Arc;

use husk_virtio::device::GuestMemory;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::mmap::FromRangesError;
use vm_memory::{Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::layout;

/// Why the guest has no memory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    /// The memfd.
    #[error("Could not make the memory file of {len} bytes")]
    File {
        /// Its length.
        len: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The mapping.
    #[error("Could not map guest memory")]
    Map(#[source] FromRangesError),
    /// The KVM slot.
    #[error("Could not give KVM the memory at {address:#x}")]
    Slot {
        /// Guest-physical start.
        address: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Makes `len` bytes of guest memory; nothing of it is there before it is touched.
pub(crate) fn create(len: u64) -> Result<Arc<GuestMemory>, MemoryError> {
    let mut ranges = Vec::new();
    for (start, len) in layout::ram(len) {
        let file = memory_file(len).map_err(|source| MemoryError::File { len, source })?;
        ranges.push((GuestAddress(start), len as usize, Some(FileOffset::new(file, 0))));
    }
    GuestMemory::from_ranges_with_files(ranges).map(Arc::new).map_err(MemoryError::Map)
}

/// Sealed, so that whoever else maps the file can't shrink it and have this process killed by SIGBUS.
fn memory_file(len: u64) -> io::Result<File> {
    let file = File::from(memfd_create(c"guest-memory", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.set_len(len)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

/// Shows the memory to the guest.
///
/// The caller keeps `memory` for as long as the VM lives.
pub(crate) fn attach(vm: &VmFd, memory: &GuestMemory) -> Result<(), MemoryError> {
    for (slot, region) in memory.iter().enumerate() {
        let address = region.start_addr().raw_value();
        let failed = |source| MemoryError::Slot { address, source };
        let host = region.get_host_address(MemoryRegionAddress(0)).map_err(|e| failed(io::Error::other(e)))?;
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            guest_phys_addr: address,
            memory_size: region.len(),
            userspace_addr: host as u64,
            flags: 0,
        };
        // SAFETY: the range is the whole of a mapping that outlives the VM, as the caller warrants, and overlaps no other slot.
        unsafe { vm.set_user_memory_region(region) }.map_err(|e| failed(e.into()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn memory_is_shared_and_sealed() {
        let memory = create(4 * layout::MIB).unwrap();
        memory.write_obj(7u32, GuestAddress(0x1000)).unwrap();
        let region = memory.iter().next().unwrap();
        let file = region.file_offset().unwrap().file();
        assert!(file.set_len(0).is_err());
        let mut bytes = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, 0x1000).unwrap();
        assert_eq!(u32::from_le_bytes(bytes), 7);
    }
}
