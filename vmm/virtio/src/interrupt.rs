//! The device's way to the driver, and the machine's way to deliver message-signalled interrupts: the transport sits between.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::transport::pci::FunctionState;
use crate::transport::saved::SavedError;

/// How a device tells its driver something.
pub trait Interrupt: Send + Sync {
    /// Buffers of this queue were used.
    fn used(&self, queue: u16);
    /// The configuration changed.
    fn config_changed(&self);
    /// The device can't go on until the driver resets it (DEVICE_NEEDS_RESET, virtio 1.2, 2.1.2).
    fn needs_reset(&self);
    /// The event behind a queue's vector, for a back end in another process (vhost-user); none if the driver gave no vector.
    fn queue_event(&self, queue: u16) -> Option<EventFd>;
}

/// One MSI-X vector of a PCI function, delivered by the machine (KVM: a GSI with an irqfd and a route).
pub trait MsiVector: Send + Sync {
    /// Tells in advance where the interrupt will go, so that the machine can set many routes at once with the first of them.
    fn announce(&self, _address: u64, _data: u32) {}
    /// Sets where the interrupt goes. Called on each unmasked change of the table's entry.
    fn route(&self, address: u64, data: u32) -> io::Result<()>;
    /// Stops delivery (vector masked); the event's signals while masked are kept by the transport's pending bit.
    fn mask(&self) -> io::Result<()>;
    /// Signalling it delivers the interrupt.
    fn event(&self) -> &EventFd;
}

/// What the machine does for PCI functions.
pub trait Machine: Send + Sync {
    /// New vectors, not routed yet.
    fn msi_vectors(&self, count: u16) -> io::Result<Vec<Arc<dyn MsiVector>>>;
    /// From now on a write of any size by the guest to this guest-physical address signals the event, without an exit to user space.
    fn notify_on_write(&self, address: u64, event: &EventFd) -> io::Result<()>;
    /// Takes that back.
    fn forget_write(&self, address: u64, event: &EventFd) -> io::Result<()>;
}

/// A PCI function on the machine's bus. Offsets and lengths come from the guest: any value may come.
pub trait PciFunction: Send {
    /// Reads 1, 2 or 4 bytes of configuration space.
    fn config_read(&mut self, offset: u16, data: &mut [u8]);
    /// Writes 1, 2 or 4 bytes of configuration space.
    fn config_write(&mut self, offset: u16, data: &[u8]);
    /// Length in bytes of BAR 0 (64-bit, memory, non-prefetchable), a power of two.
    fn bar_len(&self) -> u64;
    /// Guest-physical address of BAR 0, which changes only by writes of configuration space. None while it answers nowhere.
    fn bar(&self) -> Option<u64>;
    /// Reads from BAR 0.
    fn bar_read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes to BAR 0.
    fn bar_write(&mut self, offset: u64, data: &[u8]);
    /// The state for a snapshot, while the vCPUs stand still.
    fn save(&self) -> Result<FunctionState, SavedError>;
    /// Tells the machine of what [`Self::restore`] will ask it for.
    fn announce(&self, _state: &FunctionState) {}
    /// Brings a function that no guest has touched into the state.
    fn restore(&mut self, state: &FunctionState) -> Result<(), SavedError>;
}
