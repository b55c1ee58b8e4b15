//! From the VMM's start to the agent's hello: a boot, or a template's machine that goes on.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use husk_agent_api::RPC_PORT;
use husk_vmm_api::exit::ExitReason;
use tokio::net::UnixStream;
use tracing::{debug, warn};

use super::command_line;
use super::create::{BootError, Request, start_fs};
use super::machine::Held;
use super::state::Identity;
use crate::config::Programs;
use crate::error::chain;
use crate::network::Tap;
use crate::network::forward::Forwarder;
use crate::peer::PeerError;
use crate::peer::agent::Agent;
use crate::peer::dial::Dial;
use crate::peer::fs;
use crate::peer::helper::Helper;
use crate::peer::vmm::{self, Beginning, Net, Saved, Vmm};
use crate::random;
use crate::template::{self, Template};

/// Longest wait for a killed process to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// What of the host the machine is joined with.
pub(super) struct HostEnds {
    /// The connection to husk-fs.
    pub(super) fs: Option<OwnedFd>,
    /// Taps of the pod's network.
    pub(super) taps: Vec<Tap>,
    /// The pod's network namespace, in which the VMM then lives.
    pub(super) netns: Option<OwnedFd>,
}

/// A machine whose agent has said hello.
pub(super) struct PoweredOn {
    /// Connections of the guest.
    pub(super) dial: Dial,
    /// The agent.
    pub(super) agent: Agent,
    /// How long the VMM's start took.
    pub(super) vmm_took: Duration,
    /// How long the agent took from there.
    pub(super) hello_took: Duration,
}

/// Boots the guest's kernel.
pub(super) async fn boot(
    request: &Request<'_>,
    programs: &Programs,
    held: &mut Held,
    ends: HostEnds,
) -> Result<PoweredOn, BootError> {
    let nonce = random::bytes::<16>().map_err(BootError::Random)?;
    let (dial, vmm_dial) = Dial::new()?;
    let hello = dial.expect(RPC_PORT)?;
    let limit = request.config.hello_timeout();
    let begun = Begun {
        from: Beginning::Kernel {
            kernel: &programs.kernel,
            initramfs: &programs.initramfs,
            cmdline: command_line::boot(request.config, &nonce),
        },
        nets: ends.taps.into_iter().map(|tap| Net { tap: Some(tap.fd), mac: tap.mac, mtu: tap.mtu }).collect(),
        fs: ends.fs,
        netns: ends.netns,
        nonce,
    };
    let stream = async move { hello.stream("the agent's connection", limit).await };
    on(request, programs, held, (dial, vmm_dial), begun, stream).await
}

/// Longest wait for husk-fs's end once the VMM has ended.
const FS_LIMIT: Duration = Duration::from_secs(1);

/// Lets a template's machine go on. Where that fails and a boot may do better, there is nothing, and `ends` can be used for that; if it was the
/// template's own fault, the template is removed.
pub(super) async fn restore(
    request: &Request<'_>,
    programs: &Programs,
    held: &mut Held,
    template: &Template,
    machine: Saved,
    ends: &mut HostEnds,
) -> Result<Option<PoweredOn>, BootError> {
    let (dial, vmm_dial) = Dial::new()?;
    let copied = |source| PeerError::Socket { doing: "share the pod's network with husk-vmm", source };
    // A tap lives as long as one of its descriptors.
    let net = |tap: &Tap| Ok(Net { tap: Some(tap.fd.try_clone()?), mac: template::MAC, mtu: template::MTU });
    let begun = Begun {
        from: Beginning::Saved { name: &template.name, machine },
        nets: ends.taps.iter().map(net).collect::<io::Result<_>>().map_err(copied)?,
        fs: ends.fs.take(),
        netns: ends.netns.as_ref().map(OwnedFd::try_clone).transpose().map_err(copied)?,
        nonce: template.nonce,
    };
    // The guest listens already: its agent answers as soon as it runs.
    let caller = dial.caller();
    let stream = async move { caller.call(RPC_PORT).await };
    let error = match on(request, programs, held, (dial, vmm_dial), begun, stream).await {
        Ok(powered) => return Ok(Some(powered)),
        Err(error) => error,
    };
    // Without a VMM, or where it was killed, a boot would fare no better.
    let killed = |vmm: &Vmm| vmm.helper.status().and_then(|status| status.signal()) == Some(libc::SIGKILL);
    let Some(vmm) = held.vmm.take_if(|vmm| !killed(vmm)) else { return Err(error) };
    let is_unfit = is_templates_fault(&error, &vmm, held.fs.as_ref()).await;
    let fate = if is_unfit { "removed" } else { "kept, since the fault is not its own" };
    warn!("the pod starts without the template {}, which is {fate}: {}", template.name, chain(&error));
    vmm.helper.end(KILL_LIMIT).await;
    if let Some(fs) = held.fs.take() {
        fs.end(KILL_LIMIT).await;
    }
    if is_unfit {
        template::discard(template);
    }
    ends.fs = Some(start_fs(request, programs, held)?);
    Ok(None)
}

/// Whether a machine that did not come as far as its agent's hello shows that its template is of no use to any pod.
async fn is_templates_fault(error: &BootError, vmm: &Vmm, fs: Option<&Helper>) -> bool {
    let Some(status) = vmm.helper.status() else {
        return matches!(error, BootError::Silent { .. } | BootError::Peer(PeerError::Hello(_)));
    };
    match status.code().map(ExitReason::from_code) {
        Some(ExitReason::Snapshot) => true,
        Some(ExitReason::Panic | ExitReason::Reset | ExitReason::PowerOff) => {
            // husk-fs ends well where the VMM goes before it. A guest whose husk-fs goes first can do all of that.
            let Some(fs) = fs else { return true };
            tokio::time::timeout(FS_LIMIT, fs.ended()).await.is_ok_and(|status| status.success())
        }
        // The VMM itself failed, or was killed.
        Some(ExitReason::Failed) | None => false,
    }
}

/// What a machine is to begin from, and be joined with.
struct Begun<'a> {
    from: Beginning<'a>,
    nets: Vec<Net>,
    fs: Option<OwnedFd>,
    netns: Option<OwnedFd>,
    nonce: [u8; 16],
}

/// Starts the VMM and waits for the agent's hello on what `stream` gives.
async fn on(
    request: &Request<'_>,
    programs: &Programs,
    held: &mut Held,
    (dial, vmm_dial): (Dial, OwnedFd),
    begun: Begun<'_>,
    stream: impl Future<Output = Result<UnixStream, PeerError>>,
) -> Result<PoweredOn, BootError> {
    let Begun { from, nets, fs, netns, nonce } = begun;
    // The VMM takes the namespace with it; what forwards connections works in it as long as the pod lives.
    let own_netns = netns.as_ref().and_then(|netns| netns.try_clone().ok());
    let spawning = Instant::now();
    let vmm = Vmm::start(vmm::Start {
        id: request.id,
        program: &programs.vmm,
        size: request.size,
        from,
        save: None,
        dial: vmm_dial,
        fs,
        fs_request_queues: request.config.fs_request_queues,
        nets,
        netns,
        uid: request.config.vmm_uid_base.saturating_add(std::process::id()),
        serial: request.config.serial,
    })?;
    held.record.vmm = Identity::of(vmm.helper.pid);
    let console = vmm.console.clone();
    held.vmm = Some(vmm);
    held.directory.write(&held.record)?;
    let vmm_took = spawning.elapsed();

    let booting = Instant::now();
    let limit = request.config.hello_timeout();
    let greeting = async { Agent::greet(stream.await?, &nonce).await };
    let greeting = async {
        match tokio::time::timeout(limit, greeting).await {
            Ok(Err(PeerError::Deadline { .. })) | Err(_) => {
                Err(BootError::Silent { what: "the agent's hello", limit, console: console.last(Duration::ZERO).await })
            }
            Ok(other) => other.map_err(BootError::from),
        }
    };
    // Made while the guest starts, so that it costs the start nothing.
    let (agent, forwarder) =
        tokio::join!(while_alive("the agent's hello", held, greeting), forward_connections(own_netns, &dial));
    let agent = agent?;
    held.forwarder = Mutex::new(forwarder);
    Ok(PoweredOn { dial, agent, vmm_took, hello_took: booting.elapsed() })
}

/// Awaits `work`, unless VMM or fs daemon end before.
pub(super) async fn while_alive<T>(
    what: &'static str,
    held: &Held,
    work: impl Future<Output = Result<T, BootError>>,
) -> Result<T, BootError> {
    let vmm_ended = || async {
        match &held.vmm {
            Some(vmm) => vmm.ended().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        // A broken connection is only the trace of an end whose cause is better told.
        cause = vmm_ended() => Err(BootError::Ended { what, cause }),
        cause = fs::ended(held.fs.as_ref(), held.vmm.as_ref()) => Err(BootError::Ended { what, cause }),
        done = work => match done {
            Err(BootError::Peer(PeerError::NotDialled(_) | PeerError::Connection { .. } | PeerError::Socket { .. })) => {
                match tokio::time::timeout(Duration::from_secs(2), vmm_ended()).await {
                    Ok(cause) => Err(BootError::Ended { what, cause }),
                    Err(_) => done,
                }
            }
            done => done,
        },
    }
}

/// Forwards connections to the pod's own addresses within its namespace. A pod on a host that can't is a pod all the same.
async fn forward_connections(netns: Option<OwnedFd>, dial: &Dial) -> Option<Forwarder> {
    let begun = Instant::now();
    match Forwarder::start(&netns?, dial.caller()).await {
        Ok(forwarder) => {
            debug!("forwarding connections within the pod's network namespace after {:?}", begun.elapsed());
            Some(forwarder)
        }
        Err(error) => {
            warn!("port-forward will not reach this pod: {}", chain(&error));
            None
        }
    }
}
