//! The start of a pod's machine: network, share directory and fs daemon at once, then the VMM and the agent's hello (`power`), then
//! StartPod.
//! Whatever fails on the way, everything made so far is taken back.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::ttrpc::Code;
use husk_agent_api::agent::{IdRange, StartPodRequest, UserNamespace};
use thiserror::Error;
use tracing::info;

use super::machine::{Held, Machine};
use super::power::{self, HostEnds, PoweredOn};
use super::recover;
use super::state::{Directory, Identity, Record, StateError};
use crate::cgroup::{CgroupError, PodCgroup};
use crate::config::{Config, ConfigError, Programs};
use crate::id::Id;
use crate::network::{self, NetworkError, Prepared};
use crate::peer::PeerError;
use crate::peer::agent::{Agent, Events};
use crate::peer::dial::Dial;
use crate::peer::fs;
use crate::peer::vmm;
use crate::random;
use crate::spec::load::PodSpec;
use crate::spec::size::Size;
use crate::storage::IdMap;
use crate::storage::idmap::Range;
use crate::template::background::Birthplace;
use crate::template::{self, Inputs, Sought};

/// What the log says of a pod that booted.
const COLD: &str = "cold";

/// Bytes of entropy that the guest is given (the agent's limit is 512).
const ENTROPY: usize = 64;

/// Why a pod's machine did not start.
#[derive(Debug, Error)]
pub(crate) enum BootError {
    /// The shim's installation.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The pod's directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// Another shim has the pod's directory.
    #[error("another shim (process {0}) has a pod of this id")]
    Taken(u32),
    /// The network.
    #[error("cannot connect the pod's network")]
    Network(#[from] NetworkError),
    /// The cgroup.
    #[error("cannot use the pod's cgroup")]
    Cgroup(#[from] CgroupError),
    /// VMM, fs daemon or agent.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// Something ended that must live.
    #[error("waited for {what}, but {cause}")]
    Ended {
        /// What was awaited.
        what: &'static str,
        /// What happened instead.
        cause: String,
    },
    /// No hello in time.
    #[error("waited {limit:?} for {what}; the console's last lines: {console}")]
    Silent {
        /// What was awaited.
        what: &'static str,
        /// How long.
        limit: Duration,
        /// What the guest said.
        console: String,
    },
    /// No random bytes.
    #[error("cannot read random bytes")]
    Random(#[source] std::io::Error),
    /// Work that was cut off.
    #[error("the work on the pod's directory ended early")]
    Cut(#[from] tokio::task::JoinError),
}

impl BootError {
    /// The status code for containerd.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Taken(_) => Code::ALREADY_EXISTS,
            Self::Silent { .. } => Code::DEADLINE_EXCEEDED,
            Self::Peer(error) => error.code(),
            Self::Network(error) if error.is_refusal() => Code::INVALID_ARGUMENT,
            _ => Code::INTERNAL,
        }
    }
}

/// What a machine is started from.
pub(crate) struct Request<'a> {
    /// The pod's id.
    pub(crate) id: &'a Id,
    /// containerd's namespace.
    pub(crate) namespace: &'a str,
    /// The shim's socket for containerd.
    pub(crate) socket: &'a str,
    /// The shim's configuration.
    pub(crate) config: &'a Config,
    /// The pod's part of the spec.
    pub(crate) pod: PodSpec,
    /// The machine's size.
    pub(crate) size: Size,
    /// Where a template may be built, if one may.
    pub(crate) birthplace: Option<&'a Arc<Birthplace>>,
}

/// How long each phase took, for the one line that measurements are made from.
#[derive(Debug, Default)]
struct Phases {
    network: Duration,
    share: Duration,
    template: Duration,
    vmm: Duration,
    hello: Duration,
    start_pod: Duration,
}

/// A machine whose pod is started.
struct Assembled {
    dial: Dial,
    agent: Agent,
    events: Events,
    /// What it began from, for the log.
    origin: &'static str,
    /// The template that is to be built for the next.
    wanted: Option<Inputs>,
}

/// Starts a pod's machine.
pub(crate) async fn boot(request: Request<'_>) -> Result<(Machine, Events), Box<BootError>> {
    let programs = request.config.programs().map_err(|error| Box::new(error.into()))?;
    let begun = Instant::now();
    let mut held = claim(&request).await?;
    let mut phases = Phases::default();
    match assemble(&request, &programs, &mut held, &mut phases).await {
        Ok(Assembled { dial, agent, events, origin, wanted }) => {
            let ms = |duration: Duration| duration.as_secs_f64() * 1000.0;
            info!(
                "pod started start={origin} vcpus={} memory_mib={} network_ms={:.1} share_ms={:.1} template_ms={:.1} vmm_ms={:.1} hello_ms={:.1} start_pod_ms={:.1} total_ms={:.1}",
                request.size.vcpus,
                request.size.memory_mib,
                ms(phases.network),
                ms(phases.share),
                ms(phases.template),
                ms(phases.vmm),
                ms(phases.hello),
                ms(phases.start_pod),
                ms(begun.elapsed()),
            );
            if let (Some(wanted), Some(birthplace)) = (wanted, request.birthplace.cloned()) {
                // Not before containerd has its answer.
                tokio::spawn(async move { template::build_in_background(&wanted, &birthplace) });
            }
            Ok((Machine::new(held, dial, agent, request.size, request.pod.user_namespace), events))
        }
        Err(error) => {
            held.release().await;
            Err(Box::new(error))
        }
    }
}

/// Makes the pod's directory with a first state file. What a dead shim left there is cleaned up before.
async fn claim(request: &Request<'_>) -> Result<Held, BootError> {
    let directory = Directory::of(request.id);
    if directory.path().exists() {
        let former = directory.read().ok().flatten().unwrap_or_default();
        if let Some(shim) = former.shim.filter(|shim| shim.is_there()) {
            return Err(BootError::Taken(shim.pid));
        }
        recover::clean(&directory, &former).await;
    }
    directory.make()?;
    let record = Record {
        namespace: request.namespace.to_owned(),
        socket: request.socket.into(),
        shim: Identity::of(std::process::id()),
        netns: request.pod.netns.clone(),
        cgroups_path: request.pod.cgroups_path.clone(),
        ..Record::default()
    };
    let mut held = Held { directory, record, cgroup: None, fs: None, vmm: None, forwarder: Mutex::default() };
    match held.directory.write(&held.record) {
        Ok(()) => Ok(held),
        Err(error) => {
            held.release().await;
            Err(error.into())
        }
    }
}

/// Everything that can fail once the directory is there.
async fn assemble(
    request: &Request<'_>,
    programs: &Programs,
    held: &mut Held,
    phases: &mut Phases,
) -> Result<Assembled, BootError> {
    let (network, share, sought) = tokio::join!(
        connect_network(request),
        share_files(request, programs, held),
        seek_template(request.config, programs, request.size)
    );
    let (network, network_took) = network.inspect_err(|error| {
        if error.is_refusal() {
            held.record.netns = None;
        }
    })?;
    let (fs, share_took) = share?;
    let (Sought { found, wanted }, template_took) = sought?;
    (phases.network, phases.share, phases.template) = (network_took, share_took, template_took);
    let (netns, taps, mut network) = match network {
        Some(found) => {
            let Prepared { netns, taps, interfaces, routes, rules, neighbours } = found;
            let network = StartPodRequest { interfaces, routes, rules, neighbours, ..Default::default() };
            (Some(netns), taps, network)
        }
        None => Default::default(),
    };
    // A template has one network interface.
    let suits = taps.len() == 1;
    let mut ends = HostEnds { fs: Some(fs), taps, netns };
    let restored = match found.filter(|_| suits) {
        Some((template, machine)) => power::restore(request, programs, held, &template, machine, &mut ends).await?,
        None => None,
    };
    let (origin, powered) = match restored {
        Some(powered) => {
            for interface in &mut network.interfaces {
                interface.device_mac = template::MAC_TEXT.to_owned();
            }
            ("template", powered)
        }
        None => (COLD, power::boot(request, programs, held, ends).await?),
    };
    let PoweredOn { dial, agent, vmm_took, hello_took } = powered;
    (phases.vmm, phases.hello) = (vmm_took, hello_took);

    let starting = Instant::now();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let start_pod = StartPodRequest {
        hostname: request.pod.hostname.clone(),
        time_ns: u64::try_from(now.as_nanos()).unwrap_or(0),
        entropy: random::bytes::<ENTROPY>().map_err(BootError::Random)?.to_vec(),
        shared_tag: vmm::SHARED_TAG.to_owned(),
        sysctls: request.pod.sysctls.clone(),
        growth_mib: request.size.growth_mib(),
        user_namespace: request.pod.user_namespace.as_ref().map(user_namespace).into(),
        ..network
    };
    let started = async {
        let (started, events) = tokio::join!(agent.start_pod(&start_pod), agent.events());
        started?;
        Ok(events?)
    };
    let events = power::while_alive("the agent to start the pod", held, started).await?;
    phases.start_pod = starting.elapsed();
    let wanted = wanted.filter(|_| suits && origin == COLD);
    Ok(Assembled { dial, agent, events, origin, wanted })
}

/// Looks for a template, on a thread for what blocks.
async fn seek_template(
    config: &Config,
    programs: &Programs,
    size: Size,
) -> Result<(Sought, Duration), tokio::task::JoinError> {
    let (config, programs) = (config.clone(), programs.clone());
    // Its own time, not that of what runs beside it.
    let seek = move || {
        let begun = Instant::now();
        let sought = template::seek(&config, &programs, size);
        (sought, begun.elapsed())
    };
    tokio::task::spawn_blocking(seek).await
}

/// The ids of the pod's user namespace, for the agent.
fn user_namespace(map: &IdMap) -> UserNamespace {
    let lines = |ranges: &[Range]| {
        let line = |range: &Range| IdRange {
            inside: range.inside,
            outside: range.outside,
            size: range.size,
            ..Default::default()
        };
        ranges.iter().map(line).collect()
    };
    UserNamespace { uids: lines(map.uids()), gids: lines(map.gids()), ..Default::default() }
}

/// Joins taps to the pod's network.
async fn connect_network(request: &Request<'_>) -> Result<(Option<Prepared>, Duration), NetworkError> {
    let begun = Instant::now();
    let prepared = match &request.pod.netns {
        Some(netns) => Some(network::prepare(netns).await?),
        None => None,
    };
    Ok((prepared, begun.elapsed()))
}

/// Moves into the pod's cgroup, makes the share directory and starts the fs daemon there; gives the VMM's connection to it.
async fn share_files(
    request: &Request<'_>,
    programs: &Programs,
    held: &mut Held,
) -> Result<(OwnedFd, Duration), BootError> {
    let begun = Instant::now();
    let directory = held.directory.clone();
    let cgroups_path = request.pod.cgroups_path.clone();
    let work = move || -> Result<Option<PodCgroup>, BootError> {
        directory.mount_shared()?;
        if cgroups_path.is_empty() {
            return Ok(None);
        }
        let cgroup = PodCgroup::find(&cgroups_path)?;
        cgroup.join()?;
        Ok(Some(cgroup))
    };
    held.cgroup = tokio::task::spawn_blocking(work).await??;
    let vmm_fs = start_fs(request, programs, held)?;
    Ok((vmm_fs, begun.elapsed()))
}

/// Starts the fs daemon; gives the VMM's connection to it.
pub(super) fn start_fs(request: &Request<'_>, programs: &Programs, held: &mut Held) -> Result<OwnedFd, BootError> {
    let queues = request.config.fs_request_queues;
    let directory = &held.directory;
    let (fs, vmm_fs) = fs::start(&programs.fs, request.id, directory.path(), &directory.shared(), queues)?;
    held.record.fs = Identity::of(fs.pid);
    held.fs = Some(fs);
    held.directory.write(&held.record)?;
    Ok(vmm_fs)
}
