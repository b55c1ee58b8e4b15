//! The VM's generation id (Microsoft, "Virtual Machine Generation ID", 2018; Linux, drivers/virt/vmgenid.c): 16 random bytes in guest memory,
//! others in each machine that is restored, at which the guest's kernel seeds its random numbers anew before it draws any.

use std::io;

use husk_backend::entropy::Entropy;
use husk_virtio::device::GuestMemory;
use kvm_ioctls::VmFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;

/// Length of the id in bytes.
const LEN: usize = 16;

/// Why the machine has no id.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GenerationError {
    /// The host's random numbers.
    #[error("Could not draw a generation id")]
    Entropy(#[source] io::Error),
    /// Guest memory.
    #[error("Could not write the generation id into guest memory")]
    Write(#[source] GuestMemoryError),
}

/// Gives the machine an id that no other has. Comes after its memory was filled.
pub(crate) fn renew(memory: &GuestMemory) -> Result<(), GenerationError> {
    let mut id = [0; LEN];
    Entropy.fill(&mut id).map_err(GenerationError::Entropy)?;
    memory.write_slice(&id, GuestAddress(layout::GENERATION_ID)).map_err(GenerationError::Write)
}

/// Tells a restored guest that it has a new id: an edge of the interrupt, which is pending when the vCPUs run.
pub(crate) fn announce(vm: &VmFd) -> io::Result<()> {
    vm.set_irq_line(layout::GENERATION_GSI, true)?;
    Ok(vm.set_irq_line(layout::GENERATION_GSI, false)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::memory;

    #[test]
    fn each_id_is_another_and_fills_its_place() {
        let memory = memory::create(2 * layout::MIB).unwrap();
        let read = || memory.read_obj::<[u8; LEN + 1]>(GuestAddress(layout::GENERATION_ID)).unwrap();
        renew(&memory).unwrap();
        let first = read();
        renew(&memory).unwrap();
        assert!(first[..LEN] != read()[..LEN] && first[..LEN] != [0; LEN] && first[LEN] == 0);
    }
}
