//! The blocking work on cells and cgroups (husk-cell), with the agent's errors; what is `async` here runs it on a thread.

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use husk_cell::cgroup::Cgroup;
use husk_cell::{CgroupError, CreateRequest, Created};
use oci_spec::runtime::{LinuxNamespaceType, Process as OciProcess, Spec};
use tokio::task::spawn_blocking;

use crate::boot::{CGROUP_DIR, POD_CGROUP};
use crate::container::{ContainerError, Result};

/// The pod's shared pid namespace.
const POD_PID_NAMESPACE: &str = "/run/husk/ns/pid";

/// How long the kernel may take to freeze, thaw, or end a container's processes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// The agent is exempt from the kernel's OOM killer, and what it starts must not inherit that.
pub(crate) fn set_oom_score(process: &mut OciProcess) {
    if process.oom_score_adj().is_none() {
        process.set_oom_score_adj(Some(0));
    }
}

/// The blocking part of making a container. On failure nothing is left.
pub(crate) fn build(
    id: String,
    mut spec: Spec,
    stdio: husk_cell::Stdio,
    namespace: &Mutex<()>,
) -> Result<(Created, Cgroup)> {
    if let Some(process) = spec.process_mut() {
        set_oom_score(process);
    }
    let linux = spec.linux().clone().unwrap_or_default();
    let shared = linux.namespaces().iter().flatten().any(|namespace| {
        namespace.typ() == LinuxNamespaceType::Pid && namespace.path().as_deref() == Some(Path::new(POD_PID_NAMESPACE))
    });
    if shared {
        let _making = namespace.lock().unwrap_or_else(PoisonError::into_inner);
        husk_cell::ensure_pod_pid_namespace(Path::new(POD_PID_NAMESPACE))
            .map_err(|source| ContainerError::Cell { what: "make the pod's shared pid namespace".into(), source })?;
    }
    let path = linux.cgroups_path().clone().unwrap_or_else(|| Path::new("/").join(&id));
    let path = path.to_str().ok_or_else(|| ContainerError::Unfit("The spec's cgroupsPath is no UTF-8".into()))?;
    let what = format!("make the cgroup of container {id}");
    let cgroup = Cgroup::create(&Path::new(CGROUP_DIR).join(POD_CGROUP), path)
        .map_err(|source| ContainerError::Cgroup { what: what.clone(), source })?;
    let limit = || {
        let resources = linux.resources().as_ref();
        if let Some(resources) = resources {
            cgroup.set(resources)?;
        }
        // Without a word about devices a container still gets the default ones only.
        cgroup.restrict_devices(resources.and_then(|r| r.devices().as_deref()).unwrap_or_default())
    };
    let created = limit().map_err(|source| ContainerError::Cgroup { what, source }).and_then(|()| {
        let what = format!("make container {id}");
        husk_cell::create(CreateRequest { id, spec, stdio, cgroup: cgroup.clone() })
            .map_err(|source| ContainerError::Cell { what, source })
    });
    match created {
        Ok(created) => Ok((created, cgroup)),
        Err(error) => {
            if let Err(left) = cgroup.kill().and_then(|()| cgroup.remove(PATIENCE)) {
                tracing::warn!("{}", crate::context("A cgroup is left over", left));
            }
            Err(error)
        }
    }
}

/// Kills every process of a container.
pub(crate) async fn kill(id: &str, cgroup: Cgroup) -> Result<()> {
    on_cgroup(format!("kill container {id}"), move || cgroup.kill()).await
}

/// Kills every process of a container and removes its cgroup.
pub(crate) async fn remove(id: &str, cgroup: Cgroup) -> Result<()> {
    on_cgroup(format!("remove container {id}"), move || cgroup.kill().and_then(|()| cgroup.remove(PATIENCE))).await
}

pub(crate) async fn on_cgroup<T: Send + 'static>(
    what: String,
    work: impl FnOnce() -> std::result::Result<T, CgroupError> + Send + 'static,
) -> Result<T> {
    spawn_blocking(work).await?.map_err(|source| ContainerError::Cgroup { what, source })
}
