//! Interrupts: KVM's in-kernel APICs, and message-signalled vectors of PCI functions as GSIs with a route and an irqfd.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use husk_virtio::interrupt::{Machine, MsiVector};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::layout::IOAPIC_PINS;
use crate::lock::lock;

/// GSIs that KVM routes (KVM_MAX_IRQ_ROUTES); far more than a full bus needs.
const GSIS: u32 = 4096;

/// The VM's interrupt routes. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Interrupts {
    shared: Arc<Shared>,
}

struct Shared {
    vm: Arc<VmFd>,
    state: Mutex<State>,
}

struct State {
    next_gsi: u32,
    /// Those of vectors that are gone.
    free_gsis: Vec<u32>,
    /// Address and data of each routed vector.
    routes: BTreeMap<u32, (u64, u32)>,
    /// Those that are to be set with the next change.
    announced: BTreeMap<u32, (u64, u32)>,
}

impl Interrupts {
    /// Makes the in-kernel interrupt controllers. Comes before any vCPU.
    pub(crate) fn new(vm: Arc<VmFd>) -> io::Result<Self> {
        vm.create_irq_chip()?;
        let state =
            State { next_gsi: IOAPIC_PINS, free_gsis: Vec::new(), routes: BTreeMap::new(), announced: BTreeMap::new() };
        Ok(Self { shared: Arc::new(Shared { vm, state: Mutex::new(state) }) })
    }

    /// An event that raises a pin of the I/O APIC.
    pub(crate) fn pin(&self, gsi: u32) -> io::Result<EventFd> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        self.shared.vm.register_irqfd(&event, gsi)?;
        Ok(event)
    }
}

impl Machine for Interrupts {
    fn msi_vectors(&self, count: u16) -> io::Result<Vec<Arc<dyn MsiVector>>> {
        let vector = |gsi| -> io::Result<Arc<dyn MsiVector>> {
            let event = EventFd::new(EFD_NONBLOCK).inspect_err(|_| self.shared.free_gsi(gsi))?;
            Ok(Arc::new(Vector { gsi, event, connected: Mutex::new(false), shared: self.shared.clone() }))
        };
        // A vector that is made gives its GSI back when it is dropped, whatever becomes of the others.
        (0..count).map(|_| vector(self.shared.take_gsi()?)).collect()
    }

    fn notify_on_write(&self, address: u64, event: &EventFd) -> io::Result<()> {
        // Without data to match KVM takes writes of any length.
        Ok(self.shared.vm.register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }

    fn forget_write(&self, address: u64, event: &EventFd) -> io::Result<()> {
        Ok(self.shared.vm.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }
}

impl Shared {
    fn take_gsi(&self) -> io::Result<u32> {
        let mut state = lock(&self.state);
        if let Some(gsi) = state.free_gsis.pop() {
            return Ok(gsi);
        }
        if state.next_gsi == GSIS {
            return Err(io::Error::other("no interrupts left"));
        }
        state.next_gsi += 1;
        Ok(state.next_gsi - 1)
    }

    /// Its route goes with the next change of the table.
    fn free_gsi(&self, gsi: u32) {
        let mut state = lock(&self.state);
        state.routes.remove(&gsi);
        state.announced.remove(&gsi);
        state.free_gsis.push(gsi);
    }

    /// Adds or changes a route. KVM takes the whole table at once and waits for readers of the old one, so nothing is done for no change.
    fn route(&self, gsi: u32, address: u64, data: u32) -> io::Result<()> {
        let mut state = lock(&self.state);
        let mut announced = std::mem::take(&mut state.announced);
        let is_new = !announced.is_empty();
        state.routes.append(&mut announced);
        if state.routes.insert(gsi, (address, data)) == Some((address, data)) && !is_new {
            return Ok(());
        }
        let pins = (0..IOAPIC_PINS).map(pin_route);
        let messages = state.routes.iter().map(|(gsi, (address, data))| message_route(*gsi, *address, *data));
        let entries: Vec<_> = pins.chain(messages).collect();
        let routing = KvmIrqRouting::from_entries(&entries).map_err(|e| io::Error::other(format!("{e:?}")))?;
        Ok(self.vm.set_gsi_routing(&routing)?)
    }
}

fn pin_route(pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi: pin, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip: KVM_IRQCHIP_IOAPIC, pin };
    entry
}

fn message_route(gsi: u32, address: u64, data: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: address as u32,
        address_hi: (address >> 32) as u32,
        data,
        ..Default::default()
    };
    entry
}

struct Vector {
    gsi: u32,
    event: EventFd,
    /// Whether KVM listens to the event.
    connected: Mutex<bool>,
    shared: Arc<Shared>,
}

impl MsiVector for Vector {
    fn announce(&self, address: u64, data: u32) {
        lock(&self.shared.state).announced.insert(self.gsi, (address, data));
    }

    fn route(&self, address: u64, data: u32) -> io::Result<()> {
        let mut connected = lock(&self.connected);
        self.shared.route(self.gsi, address, data)?;
        if !*connected {
            self.shared.vm.register_irqfd(&self.event, self.gsi)?;
            *connected = true;
        }
        Ok(())
    }

    fn mask(&self) -> io::Result<()> {
        let mut connected = lock(&self.connected);
        if *connected {
            self.shared.vm.unregister_irqfd(&self.event, self.gsi)?;
            *connected = false;
        }
        Ok(())
    }

    fn event(&self) -> &EventFd {
        &self.event
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        // Where KVM can't let go of it, closing the event makes it.
        let _ = self.mask();
        self.shared.free_gsi(self.gsi);
    }
}
