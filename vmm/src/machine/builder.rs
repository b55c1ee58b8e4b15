//! Builds the machine: KVM, memory, vCPUs, devices, and beside them the kernel, which is loaded on a thread of its own meanwhile.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;

use husk_virtio::device::GuestMemory;
use husk_vmm_api::config::VmConfig;
use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm, VmFd};

use super::boot::{BootError, Images};
use super::devices::{self, Backends, DeviceError, EventLoop};
use super::inherited::Inherited;
use super::irq::Interrupts;
use super::memory::MemoryError;
use super::vcpu::{Buses, Template, Vcpu, VcpuError};
use super::{Built, Ending, Shared, acpi, boot, kick, layout, memory};
use crate::bus::mmio::MmioBus;
use crate::bus::pci::{ConfigPorts, PciBus};
use crate::bus::pio::PioBus;
use crate::hw::power::{self, Power};
use crate::hw::pvpanic::PvPanic;
use crate::hw::serial::Serial;
use crate::phases::Phases;

/// Most vCPUs of a VM.
const MAX_VCPUS: u8 = 64;
/// Least and most memory of a VM in MiB.
const MIN_MEMORY_MIB: u64 = 64;
const MAX_MEMORY_MIB: u64 = 1 << 20;
/// What the machine is made of.
const NEEDED: [Cap; 6] =
    [Cap::UserMemory, Cap::Irqchip, Cap::IrqRouting, Cap::Irqfd, Cap::Ioeventfd, Cap::ImmediateExit];

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BuildError {
    /// A figure of the configuration.
    #[error("{what} is {value}, not {least} to {most}")]
    Config {
        /// Which.
        what: &'static str,
        /// What it is.
        value: u64,
        /// Least that is possible.
        least: u64,
        /// Most that is possible.
        most: u64,
    },
    /// KVM is too old or no KVM.
    #[error("KVM can't do {0}")]
    Unsupported(String),
    /// An ioctl of KVM.
    #[error("Could not {doing}")]
    Kvm {
        /// What was being done.
        doing: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// Kernel and initramfs.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The devices.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

fn kvm<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> BuildError {
    move |source| BuildError::Kvm { doing, source: source.into() }
}

/// Checks the configuration's figures.
pub(crate) fn check(config: &VmConfig) -> Result<(), BuildError> {
    let figures = [
        ("The number of vCPUs", config.vcpus.into(), 1, MAX_VCPUS.into()),
        ("The memory in MiB", config.memory_mib, MIN_MEMORY_MIB, MAX_MEMORY_MIB),
    ];
    match figures.into_iter().find(|(_, value, least, most)| !(least..=most).contains(&value)) {
        Some((what, value, least, most)) => Err(BuildError::Config { what, value, least, most }),
        None => Ok(()),
    }
}

/// Builds the machine of a configuration that [`check`] found good. Its devices are served by `events`.
pub(crate) fn build(
    config: &VmConfig,
    inherited: Inherited,
    events: &mut EventLoop,
    ending: Arc<Ending>,
    phases: Phases,
) -> Result<Built, BuildError> {
    let Inherited { mut kernel, mut initramfs, kvm: system, console, dial, taps, fs } = inherited;
    kick::prepare().map_err(kvm("install the signal handler for vCPUs"))?;
    let vm = create_vm(&system)?;
    let memory = memory::create(config.memory_mib * layout::MIB)?;
    memory::attach(&vm, &memory)?;
    phases.end("memory");

    let tables = acpi::tables(config.vcpus, config.serial);
    let (entry, parts) = thread::scope(|scope| {
        let loading = thread::Builder::new().name("load".into()).spawn_scoped(scope, || {
            let images =
                Images { kernel: &mut kernel, initramfs: &mut initramfs, cmdline: &config.cmdline, acpi: &tables };
            let entry = boot::load(&memory, images);
            phases.end("kernel");
            entry
        });
        let loading = loading.map_err(kvm("start a thread to load the kernel"))?;
        let serial_output = config.serial.then(|| console.try_clone()).transpose().map_err(kvm("share the console"))?;
        let backends = Backends { console, dial, taps, fs };
        let parts = Parts::new(config, &system, vm, &memory, backends, serial_output, events);
        phases.end("devices");
        let Ok(entry) = loading.join() else {
            return Err(BuildError::Unsupported("this kernel: its loader panicked".into()));
        };
        Ok::<_, BuildError>((entry?, parts?))
    })?;

    if let Some(first) = parts.vcpus.first() {
        first.enter_kernel(entry)?;
    }
    let run_size = system.get_vcpu_mmap_size().map_err(kvm("learn the size of a vCPU's page"))?;
    let vcpus = parts.vcpus.into_iter().map(|vcpu| {
        let page = vcpu.kicker(run_size).map_err(kvm("map a vCPU's page"))?;
        Ok((vcpu, page))
    });
    let vcpus = vcpus.collect::<Result<_, BuildError>>()?;
    let shared = Shared { buses: parts.buses, gate: Arc::default(), ending, phases, _memory: memory };
    Ok(Built { vcpus, shared: Arc::new(shared) })
}

/// An empty VM.
fn create_vm(system: &Kvm) -> Result<Arc<VmFd>, BuildError> {
    if system.get_api_version() != KVM_API_VERSION as i32 {
        return Err(BuildError::Unsupported(format!("API version {KVM_API_VERSION}")));
    }
    if let Some(missing) = NEEDED.into_iter().find(|capability| !system.check_extension(*capability)) {
        return Err(BuildError::Unsupported(format!("{missing:?}")));
    }
    let vm = system.create_vm().map_err(kvm("create the VM"))?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(kvm("place KVM's identity map"))?;
    vm.set_tss_address(layout::KVM_TSS as usize).map_err(kvm("place KVM's TSS"))?;
    Ok(Arc::new(vm))
}

/// All that does not depend on the kernel.
struct Parts {
    vcpus: Vec<Vcpu>,
    buses: Buses,
}

impl Parts {
    fn new(
        config: &VmConfig,
        system: &Kvm,
        vm: Arc<VmFd>,
        memory: &Arc<GuestMemory>,
        backends: Backends,
        serial_output: Option<OwnedFd>,
        events: &mut EventLoop,
    ) -> Result<Self, BuildError> {
        let interrupts = Interrupts::new(vm.clone()).map_err(kvm("make the interrupt controllers"))?;
        let cpuid = system.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm("learn the supported CPUID"))?;
        let template = Template {
            count: config.vcpus,
            cpuid: &cpuid,
            tsc_deadline: system.check_extension(Cap::TscDeadlineTimer),
        };
        let vcpus = (0..config.vcpus).map(|id| Vcpu::new(&vm, id, &template)).collect::<Result<_, _>>()?;

        let mut pci = PciBus::default();
        devices::attach(config, backends, &interrupts, memory, events, &mut pci)?;
        let pci = Arc::new(pci);
        let mut pio = PioBus::default();
        pio.insert(layout::PCI_CONFIG_PORT, layout::PCI_CONFIG_PORTS, ConfigPorts::new(pci.clone()));
        pio.insert(layout::PVPANIC_PORT, 1, PvPanic);
        pio.insert(layout::POWER_PORT, power::PORTS, Power);
        if let Some(output) = serial_output {
            let interrupt = interrupts.pin(layout::SERIAL_GSI).map_err(kvm("make the serial port's interrupt"))?;
            pio.insert(layout::SERIAL_PORT, layout::SERIAL_PORTS, Serial::new(interrupt, File::from(output)));
        }
        Ok(Self { vcpus, buses: Buses { pio, mmio: MmioBus::new(pci) } })
    }
}
