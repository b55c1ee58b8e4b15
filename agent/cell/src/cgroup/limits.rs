//! OCI resources (made for v1) as v2's files. The conversions are those of the runtime-spec's v2 guide and of runc.

use std::fs;
use std::path::Path;

use nix::errno::Errno;
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};

use super::{files, stats};
use crate::CgroupError;

/// The kernel's default CPU period, µs.
const DEFAULT_PERIOD: u64 = 100_000;
/// Files of memory that reclaim spares.
const PROTECTION: [&str; 2] = ["memory.low", "memory.min"];
/// The most entries of a cgroup's directory: more than it has files and a pod containers.
const MAX_CHILDREN: usize = 8192;
/// The most entries of `unified`.
const MAX_UNIFIED: usize = 256;

/// A file and what goes into it.
#[derive(Debug, PartialEq, Eq)]
struct Setting {
    file: String,
    value: String,
    /// Whether a guest without this file is fine.
    optional: bool,
}

pub(super) fn apply(directory: &Path, resources: &LinuxResources) -> Result<(), CgroupError> {
    if let Some(memory) = resources.memory() {
        check_usage(directory, memory)?;
    }
    for setting in settings(resources)? {
        match files::write(directory, &setting.file, &setting.value) {
            Err(error) if setting.optional && files::is_any(&error, &[Errno::ENOENT, Errno::EOPNOTSUPP]) => {}
            other => other?,
        }
        if PROTECTION.contains(&setting.file.as_str()) {
            protect_parent(directory, &setting.file)?;
        }
    }
    Ok(())
}

/// Protects the cgroup above as much as all below it together: a cgroup's own protection counts no further (cgroup-v2.rst, memory.min).
fn protect_parent(directory: &Path, file: &str) -> Result<(), CgroupError> {
    // The root has no such file.
    let Some(parent) = directory.parent().filter(|parent| parent.join(file).exists()) else { return Ok(()) };
    let mut sum = 0_u64;
    for entry in fs::read_dir(parent).map_err(files::error("list", parent))?.take(MAX_CHILDREN) {
        // One that is not there any more has none.
        let Ok(text) = files::read(&entry.map_err(files::error("list", parent))?.path(), file) else { continue };
        sum = sum.saturating_add(text.trim().parse().unwrap_or(u64::MAX));
    }
    let value = if sum > i64::MAX as u64 { "max".to_owned() } else { sum.to_string() };
    files::write(parent, file, &value)
}

fn settings(resources: &LinuxResources) -> Result<Vec<Setting>, CgroupError> {
    let mut all = Settings(Vec::new());
    if let Some(cpu) = resources.cpu() {
        cpu_settings(&mut all, cpu);
    }
    if let Some(memory) = resources.memory() {
        memory_settings(&mut all, memory)?;
    }
    if let Some(pids) = resources.pids() {
        // 0 is "not given" in what Kubernetes sends.
        match pids.limit() {
            0 => {}
            limit => all.need("pids.max", max_if_negative(limit)),
        }
    }
    if let Some(io) = resources.block_io() {
        io_settings(&mut all, io);
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        let size = limit.page_size();
        if size.is_empty() || !size.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(CgroupError::Invalid(format!("huge page size \"{}\"", size.escape_debug())));
        }
        all.want(&format!("hugetlb.{size}.max"), max_if_negative(limit.limit()));
        all.want(&format!("hugetlb.{size}.rsvd.max"), max_if_negative(limit.limit()));
    }
    let unified = resources.unified().iter().flatten().collect::<Vec<_>>();
    if unified.len() > MAX_UNIFIED {
        return Err(CgroupError::Invalid("more than 256 unified settings".into()));
    }
    for (file, value) in unified {
        check_name(file)?;
        all.need(file, value.clone());
    }
    Ok(all.0)
}

struct Settings(Vec<Setting>);

impl Settings {
    fn need(&mut self, file: &str, value: String) {
        self.0.push(Setting { file: file.to_owned(), value, optional: false });
    }

    fn want(&mut self, file: &str, value: String) {
        self.0.push(Setting { file: file.to_owned(), value, optional: true });
    }
}

fn cpu_settings(all: &mut Settings, cpu: &LinuxCpu) {
    if let Some(shares) = cpu.shares().filter(|&shares| shares != 0) {
        // 2..=262144 becomes 1..=10000.
        let weight = 1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142;
        all.need("cpu.weight", weight.to_string());
    }
    let quota = cpu.quota().filter(|&quota| quota != 0);
    let period = cpu.period().filter(|&period| period != 0);
    if quota.is_some() || period.is_some() {
        let period = period.unwrap_or(DEFAULT_PERIOD);
        all.need("cpu.max", format!("{} {period}", max_if_negative(quota.unwrap_or(-1))));
    }
    if let Some(burst) = cpu.burst() {
        all.want("cpu.max.burst", burst.to_string());
    }
    if let Some(idle) = cpu.idle() {
        all.want("cpu.idle", idle.to_string());
    }
    // The host's sets may name CPUs that the guest doesn't have: the shim decides what it sends, the kernel what it takes.
    for (file, set) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(set) = set.as_deref().filter(|set| !set.is_empty()) {
            all.need(file, set.to_owned());
        }
    }
}

fn memory_settings(all: &mut Settings, memory: &LinuxMemory) -> Result<(), CgroupError> {
    let limit = memory.limit().filter(|&limit| limit != 0);
    if let Some(reservation) = memory.reservation().filter(|&reservation| reservation != 0) {
        all.need("memory.low", max_if_negative(reservation));
    }
    if let Some(swap) = memory.swap().filter(|&swap| swap != 0) {
        // v1's figure is memory and swap together.
        let value = match (swap, limit) {
            (swap, _) if swap < 0 => "max".to_owned(),
            (_, Some(limit)) if limit < 0 => "max".to_owned(),
            (swap, Some(limit)) if swap >= limit => (swap - limit).to_string(),
            (swap, Some(limit)) => {
                return Err(CgroupError::Invalid(format!("memory and swap of {swap} is less than memory of {limit}")));
            }
            (_, None) => return Err(CgroupError::Invalid("a swap limit without a memory limit".into())),
        };
        // A guest without swap has no such file, and needs none.
        all.want("memory.swap.max", value);
    }
    if let Some(limit) = limit {
        all.need("memory.max", max_if_negative(limit));
    }
    Ok(())
}

fn io_settings(all: &mut Settings, io: &LinuxBlockIo) {
    if let Some(weight) = io.weight().filter(|&weight| weight != 0) {
        // 10..=1000 becomes 1..=10000.
        let converted = 1 + (u64::from(weight.clamp(10, 1000)) - 10) * 9999 / 990;
        all.want("io.weight", converted.to_string());
        all.want("io.bfq.weight", weight.to_string());
    }
    let limits: [(&str, &Option<Vec<LinuxThrottleDevice>>); 4] = [
        ("rbps", io.throttle_read_bps_device()),
        ("wbps", io.throttle_write_bps_device()),
        ("riops", io.throttle_read_iops_device()),
        ("wiops", io.throttle_write_iops_device()),
    ];
    for (key, devices) in limits {
        for device in devices.iter().flatten() {
            all.need("io.max", format!("{}:{} {key}={}", device.major(), device.minor(), device.rate()));
        }
    }
}

/// Lowering a limit below what is used would get something killed.
/// What reclaim can take is not in use, but where the spec says so (checkBeforeUpdate).
fn check_usage(directory: &Path, memory: &LinuxMemory) -> Result<(), CgroupError> {
    let Some(limit) = memory.limit().and_then(|limit| u64::try_from(limit).ok()).filter(|&limit| limit > 0) else {
        return Ok(());
    };
    let strictly = memory.check_before_update().unwrap_or(false);
    let used = if strictly { stats::current(directory)? } else { stats::held(directory)? };
    if used <= limit {
        return Ok(());
    }
    Err(CgroupError::Invalid(format!("a memory limit of {limit} bytes is less than the {used} bytes that are in use")))
}

fn max_if_negative(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

/// A controller's file: "memory.high". The kernel's own (cgroup.procs, ...) are not the spec's business.
fn check_name(file: &str) -> Result<(), CgroupError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let controller = file.split_once('.').map_or("", |(controller, _)| controller);
    if file.len() > 64 || !file.bytes().all(plain) || controller.is_empty() || controller == "cgroup" {
        return Err(CgroupError::Invalid(format!("unified setting \"{}\"", file.escape_debug())));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> Result<Vec<(String, String)>, CgroupError> {
        let resources: LinuxResources = serde_json::from_str(json).unwrap();
        settings(&resources).map(|all| all.into_iter().map(|s| (s.file, s.value)).collect())
    }

    fn one(json: &str, file: &str) -> Option<String> {
        of(json).unwrap().into_iter().find(|(name, _)| name == file).map(|(_, value)| value)
    }

    #[test]
    fn cpu() {
        for (shares, weight) in [(1024, "39"), (2, "1"), (1, "1"), (262_144, "10000"), (u64::MAX, "10000")] {
            assert_eq!(one(&format!(r#"{{"cpu":{{"shares":{shares}}}}}"#), "cpu.weight").unwrap(), weight);
        }
        assert_eq!(one(r#"{"cpu":{"quota":50000,"period":100000}}"#, "cpu.max").unwrap(), "50000 100000");
        assert_eq!(one(r#"{"cpu":{"quota":-1}}"#, "cpu.max").unwrap(), "max 100000");
        assert_eq!(one(r#"{"cpu":{"shares":0,"quota":0,"period":0}}"#, "cpu.max"), None);
    }

    #[test]
    fn memory() {
        let json = r#"{"memory":{"limit":1000,"swap":1500,"reservation":500}}"#;
        assert_eq!(one(json, "memory.max").unwrap(), "1000");
        assert_eq!(one(json, "memory.swap.max").unwrap(), "500");
        assert_eq!(one(json, "memory.low").unwrap(), "500");
        assert_eq!(one(r#"{"memory":{"limit":1000,"swap":1000}}"#, "memory.swap.max").unwrap(), "0");
        assert_eq!(one(r#"{"memory":{"limit":-1,"swap":-1}}"#, "memory.max").unwrap(), "max");
        assert!(of(r#"{"memory":{"swap":1000}}"#).is_err());
        assert!(of(r#"{"memory":{"limit":1000,"swap":999}}"#).is_err());
    }

    #[test]
    fn names_of_files_are_checked() {
        assert_eq!(one(r#"{"unified":{"memory.high":"5"}}"#, "memory.high").unwrap(), "5");
        for name in ["cgroup.procs", "../memory.max", "memory", ".x", "a/b.c"] {
            assert!(of(&format!(r#"{{"unified":{{"{name}":"1"}}}}"#)).is_err(), "{name}");
        }
        assert!(of(r#"{"hugepageLimits":[{"pageSize":"2MB/../x","limit":1}]}"#).is_err());
    }

    #[test]
    fn the_rest() {
        assert_eq!(one(r#"{"pids":{"limit":-1}}"#, "pids.max").unwrap(), "max");
        assert_eq!(one(r#"{"blockIO":{"weight":1000}}"#, "io.weight").unwrap(), "10000");
        let io = r#"{"blockIO":{"throttleReadBpsDevice":[{"major":8,"minor":1,"rate":5}]}}"#;
        assert_eq!(one(io, "io.max").unwrap(), "8:1 rbps=5");
    }
}
