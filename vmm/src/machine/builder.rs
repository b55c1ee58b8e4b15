//! Builds the machine: KVM, memory, vCPUs, devices, and beside them the kernel, which is loaded on a thread of its own meanwhile.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::thread;

use event_manager::SubscriberOps;
use husk_snapshot::StateError;
use husk_virtio::Attached;
use husk_virtio::device::GuestMemory;
use husk_vmm_api::config::{self, VmConfig};
use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm, VmFd};

use super::barrier::{Barrier, BarrierSubscriber};
use super::boot::{BootError, Images};
use super::devices::{self, Backends, DeviceError, EventLoop};
use super::disks::Disks;
use super::generation::{self, GenerationError};
use super::inherited::{Code, Inherited, Snapshot, Start};
use super::irq::Interrupts;
use super::memory::MemoryError;
use super::saved::{MachineState, Slot, VcpuStateError};
use super::sizing::{Hotplug, Sizing};
use super::vcpu::{Buses, Template, Vcpu, VcpuError};
use super::{Built, Ending, Saving, Shared, acpi, boot, kick, layout, memory};
use crate::bus::mmio::MmioBus;
use crate::bus::pci::{ConfigPorts, PciBus, RestoreError};
use crate::bus::pio::PioBus;
use crate::hw::hotplug::{self, HotPlug, HotPlugPorts};
use crate::hw::power::{self, Power};
use crate::hw::pvpanic::PvPanic;
use crate::hw::serial::Serial;
use crate::phases::Phases;

/// Most vCPUs of a VM.
const MAX_VCPUS: u8 = 64;
/// Least and most memory of a VM in MiB.
const MIN_MEMORY_MIB: u64 = 64;
const MAX_MEMORY_MIB: u64 = 1 << 20;
/// Memory can be plugged by multiples of this in MiB, Linux' blocks.
const HOTPLUG_MIB: u64 = 128;
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
    /// The region for memory that is plugged in later.
    #[error("The memory that can be plugged in is {0} MiB, no multiple of {HOTPLUG_MIB}")]
    Hotplug(u64),
    /// A figure of a snapshot's machine.
    #[error("The snapshot's machine has {has} {what}, this one {wants}")]
    Other {
        /// Of what.
        what: &'static str,
        /// How many it has.
        has: u64,
        /// How many there should be.
        wants: u64,
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
    /// The generation id.
    #[error(transparent)]
    Generation(#[from] GenerationError),
    /// The devices.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A snapshot's state file.
    #[error(transparent)]
    State(#[from] StateError),
    /// A snapshot's memory file.
    #[error(transparent)]
    SavedMemory(#[from] husk_snapshot::MemoryError),
    /// A snapshot's vCPU.
    #[error(transparent)]
    SavedVcpu(#[from] VcpuStateError),
    /// A snapshot's devices.
    #[error(transparent)]
    SavedDevice(#[from] RestoreError),
}

impl BuildError {
    /// Whether a snapshot is damaged, or of another machine or processor: where it was taken anew it would do. A device that refuses its state
    /// is none of that: the host's side of it is more likely to have failed than a state whose checksum is right.
    pub(crate) fn is_of_snapshot(&self) -> bool {
        match self {
            Self::Other { .. } | Self::State(_) | Self::SavedVcpu(_) => true,
            Self::Memory(MemoryError::Code { .. }) => true,
            Self::SavedMemory(error) => !matches!(error, husk_snapshot::MemoryError::Guest { .. }),
            Self::SavedDevice(error) => error.is_of_other_machine(),
            _ => false,
        }
    }
}

fn kvm<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> BuildError {
    move |source| BuildError::Kvm { doing, source: source.into() }
}

/// Checks the configuration's figures.
pub(crate) fn check(config: &VmConfig) -> Result<(), BuildError> {
    let figures = [
        ("The number of vCPUs", config.vcpus.into(), 1, MAX_VCPUS.into()),
        ("The memory in MiB", config.memory_mib, MIN_MEMORY_MIB, MAX_MEMORY_MIB),
        ("The memory that can be plugged in, in MiB,", config.hotplug_mib, 0, MAX_MEMORY_MIB),
    ];
    match figures.into_iter().find(|(_, value, least, most)| !(least..=most).contains(&value)) {
        Some((what, value, least, most)) => Err(BuildError::Config { what, value, least, most }),
        None if !config.hotplug_mib.is_multiple_of(HOTPLUG_MIB) => Err(BuildError::Hotplug(config.hotplug_mib)),
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
    let Inherited { start, save, kvm: system, console, dial, taps, fs } = inherited;
    kick::prepare().map_err(kvm("install the signal handler for vCPUs"))?;
    let vm = create_vm(&system)?;
    let ram = config.memory_mib * layout::MIB;
    // What the machine begins with; devices see what is plugged in later, too.
    let boot = memory::create(ram)?;
    let slot = memory::attach(&vm, &boot)?;
    let hotplug = (config.hotplug_mib != 0).then(|| layout::hotplug(ram, config.hotplug_mib * layout::MIB));
    let memory = hotplug.as_ref().map_or(Ok(boot.clone()), |region| memory::with_hotplug(&boot, region))?;
    let hotplug = hotplug.map(|region| Hotplug::new(vm.clone(), memory.clone(), region, ram, slot));
    let (mem, hotplug) = hotplug.transpose().map_err(DeviceError::from)?.unzip();
    phases.end("memory");

    let (beginning, parts) = thread::scope(|scope| {
        let loading = thread::Builder::new().name("load".into()).spawn_scoped(scope, || {
            let beginning = fill(config, &boot, start);
            phases.end("memory filled");
            beginning
        });
        let loading = loading.map_err(kvm("start a thread to fill the memory"))?;
        let serial_output = config.serial.then(|| console.try_clone()).transpose().map_err(kvm("share the console"))?;
        let backends = Backends { console, dial, taps, fs };
        let parts = Parts::new(config, &system, &vm, &memory, (backends, mem), serial_output, events);
        phases.end("devices");
        let Ok(beginning) = loading.join() else {
            return Err(BuildError::Unsupported("this kernel or snapshot: its loader panicked".into()));
        };
        Ok::<_, BuildError>((beginning?, parts?))
    })?;
    let Parts { mut vcpus, buses, disks } = parts;
    match beginning {
        Beginning::Kernel(entry) => vcpus.first().map_or(Ok(()), |first| first.enter_kernel(entry))?,
        Beginning::Saved(state) => {
            restore(&state, config, &vm, &vcpus, &buses)?;
            phases.end("restored");
        }
    }
    let saving = save.map(|files| prepare_saving(&system, vm, boot, &mut vcpus, files, events)).transpose()?;
    let run_size = system.get_vcpu_mmap_size().map_err(kvm("learn the size of a vCPU's page"))?;
    let vcpus = vcpus.into_iter().map(|vcpu| {
        let page = vcpu.kicker(run_size).map_err(kvm("map a vCPU's page"))?;
        Ok((vcpu, page))
    });
    let vcpus = vcpus.collect::<Result<_, BuildError>>()?;
    let shared = Shared {
        buses,
        gate: Arc::default(),
        disks: Arc::new(disks),
        sizing: Arc::new(Sizing::new(config.memory_mib, hotplug)),
        ending,
        phases,
        _memory: memory,
    };
    Ok(Built { vcpus, shared: Arc::new(shared), saving })
}

/// What is in memory now.
enum Beginning {
    /// A kernel, to be entered here.
    Kernel(u64),
    /// A machine that was saved in this state.
    Saved(Box<MachineState>),
}

/// Fills guest memory with what the machine begins from.
fn fill(config: &VmConfig, memory: &GuestMemory, start: Start) -> Result<Beginning, BuildError> {
    let beginning = match (start, &config.start) {
        (Start::Boot { mut kernel, mut initramfs }, config::Start::Boot { cmdline, .. }) => {
            let acpi = acpi::tables(config.vcpus, config.serial);
            if config.save.is_some() {
                // The agent of a template clears all free memory.
                for (start, len) in layout::ram(config.memory_mib * layout::MIB) {
                    memory::make_huge(memory, start..start + len);
                }
            }
            let images = Images { kernel: &mut kernel, initramfs: &mut initramfs, cmdline, acpi: &acpi };
            Beginning::Kernel(boot::load(memory, images)?)
        }
        (Start::Restore(Snapshot { mut state, memory: file }, code), _) => {
            let (state, _) = husk_snapshot::read_state::<MachineState>(&mut state)?;
            let mut ranges = husk_snapshot::memory::filled(memory, &file)?;
            if let Some(Code { file, address }) = code {
                if config.save.is_some() {
                    return Err(BuildError::Unsupported(
                        "saving a machine whose kernel's code is another's too".into(),
                    ));
                }
                let code = memory::map_code(memory, &file, address)?;
                memory::leave_out(&mut ranges, &code);
                // The first machine makes them, for all.
                memory::make_huge(memory, code);
            }
            for part in memory::worth_huge(&ranges) {
                memory::make_huge(memory, part);
            }
            husk_snapshot::memory::restore(memory, &file, &ranges)?;
            Beginning::Saved(Box::new(state))
        }
        (Start::Boot { .. }, config::Start::Restore { .. }) => {
            return Err(BuildError::Unsupported(
                "a configuration that is not the one its descriptors were taken by".into(),
            ));
        }
    };
    generation::renew(memory)?;
    Ok(beginning)
}

/// Brings a machine that has not run into a saved state. Interrupts that the devices raise meanwhile find their controllers ready.
fn restore(
    state: &MachineState,
    config: &VmConfig,
    vm: &VmFd,
    vcpus: &[Vcpu],
    buses: &Buses,
) -> Result<(), BuildError> {
    if state.vcpus.len() != vcpus.len() {
        let (has, wants) = (state.vcpus.len() as u64, vcpus.len() as u64);
        return Err(BuildError::Other { what: "vCPUs", has, wants });
    }
    if state.hotplug_mib != config.hotplug_mib {
        let (has, wants) = (state.hotplug_mib, config.hotplug_mib);
        return Err(BuildError::Other { what: "MiB that can be plugged in", has, wants });
    }
    state.controllers.restore(vm).map_err(kvm("restore the interrupt controllers and the clock"))?;
    vcpus.iter().zip(&state.vcpus).try_for_each(|(vcpu, state)| vcpu.restore(state))?;
    buses.mmio.pci().restore(&state.functions)?;
    generation::announce(vm).map_err(kvm("tell the guest of its new generation id"))
}

/// Makes a machine that can be saved.
fn prepare_saving(
    system: &Kvm,
    vm: Arc<VmFd>,
    memory: Arc<GuestMemory>,
    vcpus: &mut [Vcpu],
    files: Snapshot,
    events: &mut EventLoop,
) -> Result<Saving, BuildError> {
    /// Bytes of KVM_GET_XSAVE, without features that the guest is not given.
    const XSAVE: i32 = 4096;
    let size = system.check_extension_int(Cap::Xsave2);
    if size > XSAVE {
        return Err(BuildError::Unsupported(format!("saving: a processor's extended state has {size} bytes")));
    }
    let msrs = system.get_msr_index_list().map_err(kvm("learn which MSRs to save"))?;
    let msrs: Arc<[u32]> = msrs.as_slice().into();
    let slots: Vec<Slot> = vcpus.iter().map(|_| Slot::default()).collect();
    for (vcpu, slot) in vcpus.iter_mut().zip(&slots) {
        vcpu.save_to(slot.clone(), msrs.clone());
    }
    let barrier = Arc::new(Barrier::new().map_err(kvm("make an event"))?);
    events.add_subscriber(Arc::new(Mutex::new(BarrierSubscriber(barrier.clone()))));
    Ok(Saving { vm, memory, barrier, slots, files })
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
    disks: Disks,
}

impl Parts {
    fn new(
        config: &VmConfig,
        system: &Kvm,
        vm: &Arc<VmFd>,
        memory: &Arc<GuestMemory>,
        (backends, mem): (Backends, Option<Attached>),
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
        let vcpus = (0..config.vcpus).map(|id| Vcpu::new(vm, id, &template)).collect::<Result<_, _>>()?;

        let pci = Arc::new(PciBus::default());
        devices::attach(config, backends, mem, &interrupts, memory, events, &pci)?;
        let event = interrupts.pin(layout::GED_GSI).map_err(kvm("make the interrupt of the generic event device"))?;
        let hotplug = Arc::new(HotPlug::new(pci.clone(), event));
        let mut pio = PioBus::default();
        pio.insert(layout::PCI_CONFIG_PORT, layout::PCI_CONFIG_PORTS, ConfigPorts::new(pci.clone()));
        pio.insert(layout::PVPANIC_PORT, 1, PvPanic);
        pio.insert(layout::POWER_PORT, power::PORTS, Power);
        pio.insert(layout::HOTPLUG_PORT, hotplug::PORTS, HotPlugPorts(hotplug.clone()));
        if let Some(output) = serial_output {
            let interrupt = interrupts.pin(layout::SERIAL_GSI).map_err(kvm("make the serial port's interrupt"))?;
            pio.insert(layout::SERIAL_PORT, layout::SERIAL_PORTS, Serial::new(interrupt, File::from(output)));
        }
        let disks = Disks::new(hotplug, interrupts, memory.clone(), config.vcpus);
        Ok(Self { vcpus, buses: Buses { pio, mmio: MmioBus::new(pci) }, disks })
    }
}
