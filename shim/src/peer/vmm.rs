//! husk-vmm: its start, and the control connection whose end is also the VM's.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use containerd_shim_protos::ttrpc::r#async::Client;
use containerd_shim_protos::ttrpc::asynchronous::transport::Socket;
use containerd_shim_protos::ttrpc::context;
use husk_vmm_api::config::{self, FsConfig, JailConfig, NetConfig, VmConfig};
use husk_vmm_api::disk;
use husk_vmm_api::exit::ExitReason;
use husk_vmm_api::vmm::{AttachDiskRequest, DetachDiskRequest, Empty, ResizeMemoryRequest};
use husk_vmm_api::vmm_ttrpc::VmmClient;
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};

use super::PeerError;
use super::helper::{self, Helper, Inherited};
use super::tail::Tail;
use crate::spec::size::Size;

/// The virtio-fs tag of the share directory.
pub(crate) const SHARED_TAG: &str = "husk";

/// Longest wait for an answer on the control connection.
const LIMIT: Duration = Duration::from_secs(5);

/// Longest wait for the end of a disk: the VMM itself gives the guest 5 s, and the last request 2 s.
const DETACH_LIMIT: Duration = Duration::from_secs(10);

/// Longest wait for the vCPUs to stop: the VMM itself gives them 5 s.
const PAUSE_LIMIT: Duration = Duration::from_secs(10);

/// Longest wait for a snapshot to be written, which can be as much as the guest has touched, onto a slow disk.
const SAVE_LIMIT: Duration = Duration::from_secs(60);

/// Longest wait for memory to be plugged in or out: the VMM itself gives the guest 5 s.
const RESIZE_LIMIT: Duration = Duration::from_secs(10);

/// What a VM is made of.
#[derive(Debug)]
pub(crate) struct Start<'a> {
    /// The pod's id.
    pub(crate) id: &'a str,
    /// husk-vmm.
    pub(crate) program: &'a Path,
    /// vCPUs and memory.
    pub(crate) size: Size,
    /// What it begins from.
    pub(crate) from: Beginning<'a>,
    /// Where it can be saved to.
    pub(crate) save: Option<Snapshot>,
    /// The VMM's end of the dial channel.
    pub(crate) dial: OwnedFd,
    /// The connection to husk-fs; none in a VM that is to be saved.
    pub(crate) fs: Option<OwnedFd>,
    /// Request queues of husk-fs.
    pub(crate) fs_request_queues: u16,
    /// Network interfaces.
    pub(crate) nets: Vec<Net>,
    /// The pod's network namespace.
    pub(crate) netns: Option<OwnedFd>,
    /// User and group id of the VMM.
    pub(crate) uid: u32,
    /// Whether there is an early serial console.
    pub(crate) serial: bool,
}

/// What a VM begins from.
#[derive(Debug)]
pub(crate) enum Beginning<'a> {
    /// A kernel.
    Kernel {
        /// Its file.
        kernel: &'a Path,
        /// The guest's initramfs.
        initramfs: &'a Path,
        /// The kernel command line.
        cmdline: String,
    },
    /// A VM that was saved.
    Saved {
        /// What it is called.
        name: &'a str,
        /// The machine.
        machine: Saved,
    },
}

/// A VM that was saved: files open for reading.
#[derive(Debug)]
pub(crate) struct Saved {
    /// What is not memory.
    pub(crate) state: OwnedFd,
    /// Guest memory.
    pub(crate) memory: OwnedFd,
    /// Its kernel's code, if all that go on from it have one copy of that; and where it is in guest memory.
    pub(crate) code: Option<(OwnedFd, u64)>,
}

impl Saved {
    fn inherit(self, inherited: &mut Inherited) -> config::Start {
        let code = self.code.map(|(file, address)| config::Code { file: inherited.add(file), address });
        config::Start::Restore { state: inherited.add(self.state), memory: inherited.add(self.memory), code }
    }
}

/// The two files that a VM can be saved into.
#[derive(Debug)]
pub(crate) struct Snapshot {
    /// What is not memory.
    pub(crate) state: OwnedFd,
    /// Guest memory.
    pub(crate) memory: OwnedFd,
}

impl Snapshot {
    fn inherit(self, inherited: &mut Inherited) -> config::Snapshot {
        config::Snapshot { state: inherited.add(self.state), memory: inherited.add(self.memory) }
    }
}

/// A network interface.
#[derive(Debug)]
pub(crate) struct Net {
    /// Its tap; none in a VM that is to be saved.
    pub(crate) tap: Option<OwnedFd>,
    /// The device's hardware address.
    pub(crate) mac: [u8; 6],
    /// Maximum transmission unit in bytes.
    pub(crate) mtu: u16,
}

/// A running VMM.
pub(crate) struct Vmm {
    /// Its process.
    pub(crate) helper: Helper,
    /// The guest's last words.
    pub(crate) console: Tail,
    client: VmmClient,
    /// Where disks' files go, and the number of the next one.
    disks: OwnedFd,
    next_disk: AtomicU64,
    /// What it began from, to name where it fails.
    origin: String,
}

impl Vmm {
    /// Starts the VMM.
    pub(crate) fn start(start: Start<'_>) -> Result<Self, PeerError> {
        let socket = |source| PeerError::Socket { doing: "make the console's pipe", source };
        let (control, vmm_control) = helper::stream_pair()?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (disks, vmm_disks) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
            .map_err(|source| PeerError::Socket { doing: "make the channel for disks", source: source.into() })?;
        let (console, vmm_console) = std::io::pipe().map_err(socket)?;
        let mut inherited = Inherited::default();
        let net = |net: Net| NetConfig { tap: net.tap.map(|tap| inherited.add(tap)), mac: net.mac, mtu: net.mtu };
        let nets = start.nets.into_iter().map(net).collect();
        let (origin, beginning) = match start.from {
            Beginning::Kernel { kernel, initramfs, cmdline } => {
                let origin = format!("kernel: {}", kernel.display());
                let kernel = inherited.add(helper::open(kernel, false, "open the guest's kernel")?);
                let initramfs = inherited.add(helper::open(initramfs, false, "open the guest's initramfs")?);
                (origin, config::Start::Boot { kernel, initramfs, cmdline })
            }
            Beginning::Saved { name, machine } => (format!("template: {name}"), machine.inherit(&mut inherited)),
        };
        let config = VmConfig {
            id: start.id.to_owned(),
            vcpus: start.size.vcpus,
            memory_mib: start.size.memory_mib,
            hotplug_mib: start.size.hotplug_mib,
            start: beginning,
            save: start.save.map(|files| files.inherit(&mut inherited)),
            kvm: inherited.add(helper::open(Path::new("/dev/kvm"), true, "open KVM")?),
            control: inherited.add(vmm_control),
            dial: inherited.add(start.dial),
            disks: Some(inherited.add(vmm_disks)),
            console: inherited.add(vmm_console.into()),
            serial: start.serial,
            nets,
            fs: Some(FsConfig {
                socket: start.fs.map(|fs| inherited.add(fs)),
                tag: SHARED_TAG.to_owned(),
                request_queues: start.fs_request_queues,
            }),
            jail: Some(JailConfig {
                uid: start.uid,
                gid: start.uid,
                netns: start.netns.map(|netns| inherited.add(netns)),
            }),
        };
        let helper = Helper::start("husk-vmm", start.program, &config, inherited)?;
        let console = Tail::read(console.into(), "console", false).map_err(socket)?;
        let client = VmmClient::new(Client::new(Socket::new(control)));
        Ok(Self { helper, console, client, disks, next_disk: AtomicU64::new(0), origin })
    }

    /// Plugs a file or block device in as a disk; its device number on the guest's PCI bus 0. `serial` has 1 to 20 plain characters.
    pub(crate) async fn attach_disk(&self, file: OwnedFd, serial: &str, read_only: bool) -> Result<u32, PeerError> {
        let number = self.next_disk.fetch_add(1, Ordering::Relaxed);
        let (bytes, fds) = (disk::encode(number), [file.as_raw_fd()]);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(self.disks.as_raw_fd(), &[IoSlice::new(&bytes)], &rights, flags, None).map_err(|errno| {
            PeerError::Socket { doing: "hand a disk over to husk-vmm", source: io::Error::from(errno) }
        })?;
        let request = AttachDiskRequest { number, serial: serial.to_owned(), read_only, ..Default::default() };
        let attached = self.client.attach_disk(context::with_duration(LIMIT), &request).await;
        let attached = attached.map_err(|error| PeerError::of_call("husk-vmm", "attach a disk", LIMIT, error))?;
        Ok(attached.device)
    }

    /// Takes a disk back, whatever the guest does. False if the guest had not let go of it.
    pub(crate) async fn detach_disk(&self, device: u32) -> Result<bool, PeerError> {
        let request = DetachDiskRequest { device, ..Default::default() };
        let detached = self.client.detach_disk(context::with_duration(DETACH_LIMIT), &request).await;
        let detached =
            detached.map_err(|error| PeerError::of_call("husk-vmm", "detach a disk", DETACH_LIMIT, error))?;
        Ok(detached.ejected)
    }

    /// Stops the vCPUs and writes the machine into the files that it was started with; the bytes of memory that are no zeroes.
    pub(crate) async fn save(&self) -> Result<u64, PeerError> {
        let paused = self.client.pause(context::with_duration(PAUSE_LIMIT), &Empty::new()).await;
        paused.map_err(|error| PeerError::of_call("husk-vmm", "pause", PAUSE_LIMIT, error))?;
        let saved = self.client.save(context::with_duration(SAVE_LIMIT), &Empty::new()).await;
        Ok(saved.map_err(|error| PeerError::of_call("husk-vmm", "save the machine", SAVE_LIMIT, error))?.memory)
    }

    /// Has the guest plug in or out until it has so many MiB beside what it booted with; how many it has then.
    pub(crate) async fn resize_memory(&self, plugged_mib: u64) -> Result<u64, PeerError> {
        let request = ResizeMemoryRequest { plugged_mib, ..Default::default() };
        let resized = self.client.resize_memory(context::with_duration(RESIZE_LIMIT), &request).await;
        let resized = resized.map_err(|error| PeerError::of_call("husk-vmm", "resize memory", RESIZE_LIMIT, error))?;
        Ok(resized.plugged_mib)
    }

    /// The VMM's own start, phase by phase, for the log.
    pub(crate) async fn phases(&self) -> Result<String, PeerError> {
        let status = self
            .client
            .status(context::with_duration(LIMIT), &Empty::new())
            .await
            .map_err(|error| PeerError::of_call("husk-vmm", "tell its status", LIMIT, error))?;
        let phases = status.phases.iter().take(32).map(|phase| format!("{}={}us", phase.name, phase.micros));
        Ok(phases.collect::<Vec<_>>().join(" "))
    }

    /// Waits for the VM's end and tells why, with the last lines of VMM and guest.
    pub(crate) async fn ended(&self) -> String {
        const LAST_WORDS: Duration = Duration::from_millis(500);
        use std::os::unix::process::ExitStatusExt;
        let status = self.helper.ended().await;
        let reason = match (status.code(), status.signal()) {
            (Some(code), _) => ExitReason::from_code(code).to_string(),
            (None, signal) => format!("the VMM was killed by signal {}", signal.unwrap_or_default()),
        };
        let log = self.helper.log.last(LAST_WORDS).await;
        let console = self.console.last(LAST_WORDS).await;
        format!("{reason} ({status}); {}; VMM: {log}; console: {console}", self.origin)
    }
}
