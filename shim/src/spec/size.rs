//! How many vCPUs and how much memory a pod's virtual machine gets, and how much it can grow: what the pod's author wished, else the pod's own limits, else the default.

use std::collections::HashMap;

use nix::sys::sysinfo::sysinfo;
use nix::unistd::{SysconfVar, sysconf};
use oci_spec::runtime::Spec;

use super::load::Role;
use super::{SpecError, annotations};
use crate::config::{Config, MIN_MEMORY_MIB};

const MIB: u64 = 1 << 20;

/// Smallest memory limit of a pod in MiB: below it no program starts.
const MIN_LIMIT_MIB: u64 = 4;

/// Size of a virtual machine. But for the ceiling it depends on the host and its configuration alone, in all but the smallest pods: machines of one
/// size are made from one template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    /// Number of vCPUs.
    pub(crate) vcpus: u8,
    /// Memory in MiB that it boots with.
    pub(crate) memory_mib: u64,
    /// Most memory in MiB that can be plugged in beside it.
    pub(crate) hotplug_mib: u64,
    /// Memory in MiB that it grows to when its containers need it.
    pub(crate) ceiling_mib: u64,
    /// The ceiling is made of the containers' limits.
    pub(crate) follows_limits: bool,
    /// Memory in MiB beyond the containers' limits.
    pub(crate) overhead_mib: u64,
}

impl Size {
    /// That of a machine that stays as it boots, on this host.
    pub(crate) fn fixed(vcpus: u8, memory_mib: u64, hotplug_mib: u64) -> Self {
        Self { vcpus, memory_mib, hotplug_mib, ceiling_mib: memory_mib, follows_limits: false, overhead_mib: 0 }
    }

    /// MiB by which a machine that has just booted can grow.
    pub(crate) fn growth_mib(&self) -> u64 {
        self.ceiling_mib.saturating_sub(self.memory_mib).min(self.hotplug_mib)
    }
}

/// What the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Host {
    /// CPUs that are online, whatever the shim itself may use.
    pub(crate) cpus: u64,
    /// Memory in MiB.
    pub(crate) memory_mib: u64,
}

impl Host {
    /// This one.
    pub(crate) fn here() -> Self {
        let online = sysconf(SysconfVar::_NPROCESSORS_ONLN).ok().flatten();
        let cpus = online.and_then(|number| u64::try_from(number).ok()).unwrap_or(1);
        Self { cpus, memory_mib: sysinfo().map_or(0, |host| host.ram_total() / MIB) }
    }

    /// The region for memory that is plugged in: whole GiB, so that it doesn't differ by what firmware and kernel keep for themselves.
    pub(crate) fn hotplug_mib(&self) -> u64 {
        (self.memory_mib / 1024 * 1024).max(4096)
    }
}

/// A pod's CPU and memory figures; 0 or less is none.
#[derive(Clone, Copy, Debug, Default)]
struct Figures {
    cpu_quota: i64,
    cpu_period: u64,
    cpu_shares: u64,
    memory_limit: i64,
}

/// The size for the pod that `spec` (of its sandbox or single container) starts on this host.
pub(crate) fn of(spec: &Spec, role: &Role, config: &Config, host: Host) -> Result<Size, SpecError> {
    let none = HashMap::new();
    let all = spec.annotations().as_ref().unwrap_or(&none);
    let wishes = annotations::parse(all)?;
    let figures = if *role == Role::Sandbox { of_sandbox(all)? } else { of_container(spec) };
    let most = host.cpus.clamp(1, u64::from(config.max_vcpus));
    let vcpus = wishes.vcpus.map_or_else(|| vcpus(figures, config), u64::from).clamp(1, most);
    let limit = u64::try_from(figures.memory_limit).unwrap_or(0);
    let ceiling = match (wishes.memory_mib, limit) {
        (Some(memory), _) => memory,
        (None, 0) => config.memory_mib,
        (None, limit) if limit < MIN_LIMIT_MIB * MIB => {
            return Err(SpecError::MemoryLimit { limit_bytes: limit, min_mib: MIN_LIMIT_MIB });
        }
        (None, limit) => (limit.div_ceil(MIB) + config.memory_overhead_mib).max(MIN_MEMORY_MIB),
    };
    let memory_mib = ceiling.min(config.boot_memory_mib);
    let hotplug_mib = host.hotplug_mib();
    Ok(Size {
        vcpus: u8::try_from(vcpus).unwrap_or(1),
        memory_mib,
        hotplug_mib,
        ceiling_mib: ceiling.min(memory_mib + hotplug_mib),
        follows_limits: wishes.memory_mib.is_none() && limit > 0,
        overhead_mib: config.memory_overhead_mib,
    })
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
