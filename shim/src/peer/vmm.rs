//! husk-vmm: its start, and the control connection whose end is also the VM's.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_shim_protos::ttrpc::r#async::Client;
use containerd_shim_protos::ttrpc::asynchronous::transport::Socket;
use containerd_shim_protos::ttrpc::context;
use husk_vmm_api::config::{self, FsConfig, JailConfig, NetConfig, VmConfig};
use husk_vmm_api::exit::ExitReason;
use husk_vmm_api::vmm::Empty;
use husk_vmm_api::vmm_ttrpc::VmmClient;

use super::PeerError;
use super::helper::{self, Helper, Inherited};
use super::tail::Tail;
use crate::config::Programs;
use crate::network::Tap;
use crate::spec::size::Size;

/// The virtio-fs tag of the share directory.
pub(crate) const SHARED_TAG: &str = "husk";

/// Longest wait for an answer on the control connection.
const LIMIT: Duration = Duration::from_secs(5);

/// What a VM is made of.
#[derive(Debug)]
pub(crate) struct Start<'a> {
    /// The pod's id.
    pub(crate) id: &'a str,
    /// Programs and guest image.
    pub(crate) programs: &'a Programs,
    /// vCPUs and memory.
    pub(crate) size: Size,
    /// The kernel command line.
    pub(crate) cmdline: String,
    /// The VMM's end of the dial channel.
    pub(crate) dial: OwnedFd,
    /// The connection to husk-fs.
    pub(crate) fs: OwnedFd,
    /// Request queues of husk-fs.
    pub(crate) fs_request_queues: u16,
    /// Taps of the pod's network.
    pub(crate) taps: Vec<Tap>,
    /// The pod's network namespace.
    pub(crate) netns: Option<OwnedFd>,
    /// User and group id of the VMM.
    pub(crate) uid: u32,
    /// Whether there is an early serial console.
    pub(crate) serial: bool,
}

/// A running VMM.
pub(crate) struct Vmm {
    /// Its process.
    pub(crate) helper: Helper,
    /// The guest's last words.
    pub(crate) console: Tail,
    client: VmmClient,
    /// What it booted, to name where it fails.
    kernel: PathBuf,
}

impl Vmm {
    /// Starts the VMM.
    pub(crate) fn start(start: Start<'_>) -> Result<Self, PeerError> {
        let socket = |source| PeerError::Socket { doing: "make the console's pipe", source };
        let (control, vmm_control) = helper::stream_pair()?;
        let (console, vmm_console) = std::io::pipe().map_err(socket)?;
        let mut inherited = Inherited::default();
        let nets = start
            .taps
            .into_iter()
            .map(|tap| NetConfig { tap: Some(inherited.add(tap.fd)), mac: tap.mac, mtu: tap.mtu })
            .collect();
        let config = VmConfig {
            id: start.id.to_owned(),
            vcpus: start.size.vcpus,
            memory_mib: start.size.memory_mib,
            start: config::Start::Boot {
                kernel: inherited.add(helper::open(&start.programs.kernel, false, "open the guest's kernel")?),
                initramfs: inherited.add(helper::open(&start.programs.initramfs, false, "open the guest's initramfs")?),
                cmdline: start.cmdline,
            },
            save: None,
            kvm: inherited.add(helper::open(Path::new("/dev/kvm"), true, "open KVM")?),
            control: inherited.add(vmm_control),
            dial: inherited.add(start.dial),
            console: inherited.add(vmm_console.into()),
            serial: start.serial,
            nets,
            fs: Some(FsConfig {
                socket: Some(inherited.add(start.fs)),
                tag: SHARED_TAG.to_owned(),
                request_queues: start.fs_request_queues,
            }),
            jail: Some(JailConfig {
                uid: start.uid,
                gid: start.uid,
                netns: start.netns.map(|netns| inherited.add(netns)),
            }),
        };
        let helper = Helper::start("husk-vmm", &start.programs.vmm, &config, inherited)?;
        let console = Tail::read(console.into(), "console", false).map_err(socket)?;
        let client = VmmClient::new(Client::new(Socket::new(control)));
        Ok(Self { helper, console, client, kernel: start.programs.kernel.clone() })
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
        format!("{reason} ({status}); kernel: {}; VMM: {log}; console: {console}", self.kernel.display())
    }
}
