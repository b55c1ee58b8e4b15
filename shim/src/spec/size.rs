//! How many vCPUs and how much memory a pod's virtual machine gets: what the pod's author wished, else the pod's own limits, else the default.

use std::collections::HashMap;

use oci_spec::runtime::Spec;

use super::load::Role;
use super::{SpecError, annotations};
use crate::config::{Config, MIN_MEMORY_MIB};

const MIB: u64 = 1 << 20;

/// Smallest memory limit of a pod in MiB: below it no program starts.
const MIN_LIMIT_MIB: u64 = 4;

/// Size of a virtual machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    /// Number of vCPUs.
    pub(crate) vcpus: u8,
    /// Memory in MiB.
    pub(crate) memory_mib: u64,
}

/// A pod's CPU and memory figures; 0 or less is none.
#[derive(Clone, Copy, Debug, Default)]
struct Figures {
    cpu_quota: i64,
    cpu_period: u64,
    cpu_shares: u64,
    memory_limit: i64,
}

/// The size for the pod that `spec` (of its sandbox or single container) starts, on a host with `host_cpus` CPUs.
pub(crate) fn of(spec: &Spec, role: &Role, config: &Config, host_cpus: u64) -> Result<Size, SpecError> {
    let none = HashMap::new();
    let all = spec.annotations().as_ref().unwrap_or(&none);
    let wishes = annotations::parse(all)?;
    let figures = if *role == Role::Sandbox { of_sandbox(all)? } else { of_container(spec) };
    let most = host_cpus.clamp(1, u64::from(config.max_vcpus));
    let vcpus = wishes.vcpus.map_or_else(|| vcpus(figures, config), u64::from).clamp(1, most);
    let memory_mib = match (wishes.memory_mib, u64::try_from(figures.memory_limit).unwrap_or(0)) {
        (Some(memory), _) => memory,
        (None, 0) => config.memory_mib,
        (None, limit) if limit < MIN_LIMIT_MIB * MIB => {
            return Err(SpecError::MemoryLimit { limit_bytes: limit, min_mib: MIN_LIMIT_MIB });
        }
        (None, limit) => (limit.div_ceil(MIB) + config.memory_overhead_mib).max(MIN_MEMORY_MIB),
    };
    Ok(Size { vcpus: u8::try_from(vcpus).unwrap_or(1), memory_mib })
}

/// As many vCPUs as the limit needs; without one as many as the request does, but never less than the default.
fn vcpus(figures: Figures, config: &Config) -> u64 {
    match u64::try_from(figures.cpu_quota).unwrap_or(0) {
        quota if quota > 0 && figures.cpu_period > 0 => quota.div_ceil(figures.cpu_period),
        _ => figures.cpu_shares.div_ceil(1024).max(u64::from(config.vcpus)),
    }
}

/// The figures that containerd's CRI plugin writes on the sandbox (pkg/cri/annotations).
fn of_sandbox(annotations: &HashMap<String, String>) -> Result<Figures, SpecError> {
    fn number<T: std::str::FromStr + Default>(
        annotations: &HashMap<String, String>,
        name: &str,
    ) -> Result<T, SpecError> {
        let key = format!("io.kubernetes.cri.{name}");
        let Some(value) = annotations.get(&key) else { return Ok(T::default()) };
        value.parse().map_err(|_| SpecError::AnnotationValue { key, value: value.clone(), wanted: "a whole number" })
    }
    Ok(Figures {
        cpu_quota: number(annotations, "sandbox-cpu-quota")?,
        cpu_period: number(annotations, "sandbox-cpu-period")?,
        cpu_shares: number(annotations, "sandbox-cpu-shares")?,
        memory_limit: number(annotations, "sandbox-memory")?,
    })
}

/// The limits of a single container.
fn of_container(spec: &Spec) -> Figures {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let cpu = resources.and_then(|resources| resources.cpu().as_ref());
    let memory = resources.and_then(|resources| resources.memory().as_ref());
    let limit = memory.and_then(|memory| memory.limit()).unwrap_or(0);
    // Huge pages are not part of the memory limit (cgroup-v2.rst, "HugeTLB").
    let huge = resources.and_then(|resources| resources.hugepage_limits().as_deref()).unwrap_or_default();
    let huge = huge.iter().map(|limit| limit.limit().max(0)).fold(0, i64::saturating_add);
    Figures {
        cpu_quota: cpu.and_then(|cpu| cpu.quota()).unwrap_or(0),
        cpu_period: cpu.and_then(|cpu| cpu.period()).unwrap_or(0),
        cpu_shares: cpu.and_then(|cpu| cpu.shares()).unwrap_or(0),
        memory_limit: if limit > 0 { limit.saturating_add(huge) } else { limit },
    }
}
