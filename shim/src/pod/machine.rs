//! The pod's virtual machine as the shim holds it: its processes, its connections, and everything on the host that must go with it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use husk_agent_api::agent::StatsResponse;
use tokio::sync::watch;
use tracing::warn;

use super::cpusets::CpuSets;
use super::disks::Disks;
use super::memory::Memory;
use super::state::{Directory, Record};
use crate::apparmor::Given;
use crate::cgroup::PodCgroup;
use crate::error::{Error, chain};
use crate::network;
use crate::network::forward::Forwarder;
use crate::peer::agent::Agent;
use crate::peer::dial::Dial;
use crate::peer::helper::Helper;
use crate::peer::vmm::Vmm;
use crate::spec::size::Size;
use crate::storage::{self, IdMap};

/// Longest wait for a killed process to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// Longest wait for the pod's cgroup to be empty.
const CGROUP_LIMIT: Duration = Duration::from_secs(5);

/// What a pod has on the host, from the first step of its start on.
pub(crate) struct Held {
    /// Its directory.
    pub(crate) directory: Directory,
    /// Its state file's content.
    pub(crate) record: Record,
    /// Its cgroup.
    pub(crate) cgroup: Option<PodCgroup>,
    /// Its fs daemon.
    pub(crate) fs: Option<Helper>,
    /// Its VMM.
    pub(crate) vmm: Option<Vmm>,
    /// What forwards connections within its network namespace to the guest.
    pub(crate) forwarder: Mutex<Option<Forwarder>>,
}

impl Held {
    /// Ends the processes and takes the network back; what containers mounted stays.
    pub(crate) async fn end_processes(&self) {
        let vmm = async {
            if let Some(vmm) = &self.vmm {
                vmm.helper.end(KILL_LIMIT).await;
            }
        };
        let fs = async {
            if let Some(fs) = &self.fs {
                fs.end(KILL_LIMIT).await;
            }
        };
        tokio::join!(vmm, fs);
        drop(self.forwarder.lock().unwrap_or_else(PoisonError::into_inner).take());
        if let Some(netns) = &self.record.netns
            && let Err(error) = network::teardown(netns).await
        {
            warn!("cannot take the pod's network back: {}", chain(&error));
        }
    }

    /// Takes everything back. Each step is tried, whatever the others do.
    pub(crate) async fn release(&mut self) {
        self.end_processes().await;
        let directory = self.directory.clone();
        let cgroup = self.cgroup.take();
        let work = move || {
            unmount_below(&directory.shared());
            if let Err(error) = storage::unmount(&directory.shared()) {
                warn!("{}", chain(&error));
            }
            if let Some(cgroup) = cgroup
                && let Err(error) = cgroup.leave().and_then(|()| cgroup.remove(CGROUP_LIMIT))
            {
                warn!("cannot remove the pod's cgroup: {}", chain(&error));
            }
            if let Err(error) = directory.remove() {
                warn!("{}", chain(&error));
            }
        };
        if let Err(error) = tokio::task::spawn_blocking(work).await {
            warn!("the release of the pod's resources was cut off: {error}");
        }
    }
}

/// Detaches every mount below `directory`, the deepest first.
pub(crate) fn unmount_below(directory: &Path) {
    let Ok(table) = std::fs::read_to_string("/proc/self/mountinfo") else { return };
    // Field 5 is the mount point (proc_pid_mountinfo(5)); a pod's directory holds none of the characters that are escaped there.
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    let mut below: Vec<_> = points.filter(|point| point.starts_with(directory) && point != directory).collect();
    below.sort();
    for point in below.iter().rev() {
        if let Err(error) = storage::unmount(point) {
            warn!("{}", chain(&error));
        }
    }
}

/// A started machine.
pub(crate) struct Machine {
    /// Connections of the guest.
    pub(crate) dial: Dial,
    /// The agent.
    pub(crate) agent: Agent,
    /// The VMM's process id, which containerd is told for every process of the pod.
    pub(crate) pid: u32,
    /// Its size.
    pub(crate) size: Size,
    /// Its cgroup.
    pub(crate) cgroup: Option<PodCgroup>,
    /// The host's CPUs that its containers name.
    pub(crate) cpusets: CpuSets,
    /// What it has on the host.
    pub(crate) held: tokio::sync::RwLock<Held>,
    directory: Directory,
    down: watch::Sender<Option<String>>,
    gone: watch::Sender<bool>,
    /// The ids of the pod's user namespace, if it has one.
    pub(crate) user_namespace: Option<IdMap>,
    /// AppArmor profiles that its kernel has.
    pub(crate) profiles: Given,
    /// Its memory.
    pub(super) memory: Memory,
    /// Its disks.
    pub(super) disks: Disks,
    stopping: AtomicBool,
    oom_score: Mutex<Option<i32>>,
}

impl Machine {
    /// A machine whose agent has started the pod.
    pub(crate) fn new(held: Held, dial: Dial, agent: Agent, size: Size, user_namespace: Option<IdMap>) -> Self {
        Self {
            dial,
            agent,
            pid: held.vmm.as_ref().map_or(0, |vmm| vmm.helper.pid),
            directory: held.directory.clone(),
            size,
            cgroup: held.cgroup.clone(),
            cpusets: CpuSets::default(),
            held: tokio::sync::RwLock::new(held),
            down: watch::Sender::new(None),
            gone: watch::Sender::new(false),
            user_namespace,
            profiles: Given::default(),
            memory: Memory::new(size),
            disks: Disks::default(),
            stopping: AtomicBool::new(false),
            oom_score: Mutex::new(None),
        }
    }

    /// The pod's directory.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The share directory.
    pub(crate) fn shared(&self) -> PathBuf {
        self.directory.shared()
    }

    /// What its processes on the host take, by its cgroup there; all zero if it has none.
    pub(crate) async fn cgroup_stats(&self) -> Result<StatsResponse, Error> {
        let Some(cgroup) = self.cgroup.clone() else { return Ok(StatsResponse::default()) };
        tokio::task::spawn_blocking(move || cgroup.stats()).await?.map_err(Error::Figures)
    }

    /// Why it no longer runs; nothing while it does.
    pub(crate) fn cause(&self) -> Option<String> {
        self.down.borrow().clone()
    }

    /// Notes that it no longer runs.
    pub(crate) fn set_down(&self, cause: &str) {
        self.down.send_replace(Some(cause.to_owned()));
    }

    /// Notes that its processes are gone too.
    pub(crate) fn set_gone(&self) {
        self.gone.send_replace(true);
    }

    /// Waits until its processes are gone.
    pub(crate) async fn gone(&self) {
        // The sender is the machine itself: the wait can't fail.
        let _ = self.gone.subscribe().wait_for(|gone| *gone).await;
    }

    /// Begins a wanted end. True the first time.
    pub(crate) fn begin_stop(&self) -> bool {
        !self.stopping.swap(true, Ordering::Relaxed)
    }

    /// Whether its end is wanted.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Lets the host's OOM killer treat the machine as it would treat the best protected of its containers.
    pub(crate) fn lower_oom_score(&self, score: i32) {
        let mut lowest = self.oom_score.lock().unwrap_or_else(PoisonError::into_inner);
        if lowest.is_some_and(|lowest| lowest <= score) {
            return;
        }
        *lowest = Some(score);
        if let Err(error) = std::fs::write(format!("/proc/{}/oom_score_adj", self.pid), score.to_string()) {
            warn!("cannot set the VMM's OOM score to {score}: {error}");
        }
    }
}
