//! All virtio devices that a machine has from the start: the only place that knows them (disks come later, see `disks`). Each device is joined to its back end here, in the order in
//! which the guest finds them: rng, console, vsock, balloon, mem, fs, nets.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use event_manager::{EventManager, SubscriberOps};
use husk_backend::dial::DialChannel;
use husk_backend::entropy::Entropy;
use husk_backend::sink::Sink;
use husk_backend::tap::Tap;
use husk_virtio::balloon::Balloon;
use husk_virtio::console::Console;
use husk_virtio::device::GuestMemory;
use husk_virtio::fs::{Fs, FsError};
use husk_virtio::net::Net;
use husk_virtio::rng::Rng;
use husk_virtio::served::AttachError;
use husk_virtio::transport::pci;
use husk_virtio::vsock::Vsock;
use husk_virtio::{Attached, Subscriber, VirtioPciFunction};
use husk_vmm_api::config::VmConfig;

use super::irq::Interrupts;
use crate::bus::pci::{PciBus, PciError};

/// The main thread's loop, which serves all devices.
pub(crate) type EventLoop = EventManager<Subscriber>;

/// The guest's vsock address; the host's is 2.
const GUEST_CID: u32 = 3;

/// What the host gives.
pub(crate) struct Backends {
    pub(crate) console: OwnedFd,
    pub(crate) dial: OwnedFd,
    pub(crate) taps: Vec<Option<OwnedFd>>,
    pub(crate) fs: Option<UnixStream>,
}

/// Why a device isn't there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeviceError {
    /// The host's side.
    #[error("Could not make the {device}'s back end")]
    Backend {
        /// Which.
        device: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The device and its back end.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The file system and husk-fs.
    #[error(transparent)]
    Fs(#[from] FsError),
    /// The PCI function.
    #[error("Could not make the PCI function of a device")]
    Function(#[from] pci::PciError),
    /// The bus.
    #[error(transparent)]
    Bus(#[from] PciError),
}

fn backend(device: &'static str) -> impl FnOnce(io::Error) -> DeviceError {
    move |source| DeviceError::Backend { device, source }
}

/// Puts every device of the configuration on the bus. `mem` is made by whoever sizes memory.
pub(crate) fn attach(
    config: &VmConfig,
    backends: Backends,
    mem: Option<Attached>,
    interrupts: &Interrupts,
    memory: &Arc<GuestMemory>,
    events: &mut EventLoop,
    pci: &PciBus,
) -> Result<(), DeviceError> {
    let mut put = |attached: Attached| -> Result<(), DeviceError> {
        let (device, bar) = pci.next()?;
        let function = VirtioPciFunction::new(attached.device, Arc::new(interrupts.clone()), bar, memory.clone())?;
        pci.insert(device, Box::new(function))?;
        events.add_subscriber(attached.subscriber);
        Ok(())
    };
    put(Rng::attach(Entropy)?)?;
    put(Console::attach(Sink::new(backends.console).map_err(backend("console"))?)?)?;
    put(Vsock::attach(DialChannel::new(backends.dial).map_err(backend("vsock"))?, GUEST_CID)?)?;
    put(Balloon::attach()?)?;
    mem.map_or(Ok(()), &mut put)?;
    if let Some(fs) = &config.fs {
        put(Fs::attach(backends.fs, &fs.tag, fs.request_queues)?)?;
    }
    for (net, tap) in config.nets.iter().zip(backends.taps) {
        let tap = tap.map(Tap::new).transpose().map_err(backend("net"))?;
        put(Net::attach(tap, net.mac, net.mtu)?)?;
    }
    Ok(())
}
