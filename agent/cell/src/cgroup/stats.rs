//! A cgroup's figures, as StatsResponse of agent.proto names them.

use std::{collections::BTreeMap, fs, path::Path};

use nix::errno::Errno;

use super::files;
use crate::CgroupError;

/// The most devices that are told; a guest has a handful.
const MAX_DEVICES: usize = 256;

/// What StatsResponse of agent.proto holds, field by field. A file that the guest doesn't have leaves 0.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Stats {
    /// pids.current
    pub pids_current: u64,
    /// pids.max; 0: no limit
    pub pids_max: u64,
    /// cpu.stat usage_usec
    pub cpu_usage_us: u64,
    /// cpu.stat user_usec
    pub cpu_user_us: u64,
    /// cpu.stat system_usec
    pub cpu_system_us: u64,
    /// cpu.stat nr_periods
    pub cpu_nr_periods: u64,
    /// cpu.stat nr_throttled
    pub cpu_nr_throttled: u64,
    /// cpu.stat throttled_usec
    pub cpu_throttled_us: u64,
    /// memory.current, bytes
    pub memory_current: u64,
    /// memory.max, bytes; u64::MAX: no limit
    pub memory_max: u64,
    /// memory.swap.current, bytes
    pub swap_current: u64,
    /// memory.swap.max, bytes; u64::MAX: no limit
    pub swap_max: u64,
    /// memory.stat, whole
    pub memory_stat: BTreeMap<String, u64>,
    /// memory.events, whole
    pub memory_events: BTreeMap<String, u64>,
    /// io.stat, a device each
    pub io: Vec<IoStat>,
    /// cpu.stat nr_bursts
    pub cpu_nr_bursts: u64,
    /// cpu.stat burst_usec
    pub cpu_burst_us: u64,
    /// memory.peak, bytes
    pub memory_peak: u64,
    /// memory.swap.peak, bytes
    pub swap_peak: u64,
    /// hugetlb.*, a page size each
    pub hugetlb: Vec<HugetlbStat>,
}

/// The hugetlb files of a page size.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct HugetlbStat {
    /// As in the files' names: 2MB.
    pub page_size: String,
    /// hugetlb.SIZE.current, bytes
    pub current: u64,
    /// hugetlb.SIZE.max, bytes; u64::MAX: no limit
    pub max: u64,
    /// hugetlb.SIZE.events max
    pub failures: u64,
}

/// A line of io.stat.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct IoStat {
    /// Device number.
    pub major: u64,
    /// Device number.
    pub minor: u64,
    /// Bytes read.
    pub rbytes: u64,
    /// Bytes written.
    pub wbytes: u64,
    /// Reads.
    pub rios: u64,
    /// Writes.
    pub wios: u64,
}

pub(super) fn read(directory: &Path) -> Result<Stats, CgroupError> {
    let file = |name: &str| match files::read(directory, name) {
        Ok(text) => Ok(text),
        // This guest has no such controller.
        Err(error) if files::is_any(&error, &[Errno::ENOENT, Errno::EOPNOTSUPP]) => Ok(String::new()),
        Err(error) => Err(error),
    };
    let cpu = file("cpu.stat")?;
    let of_cpu = |key: &str| lookup(&cpu, key).unwrap_or(0);
    Ok(Stats {
        pids_current: number(&file("pids.current")?, 0),
        pids_max: number(&file("pids.max")?, 0),
        cpu_usage_us: of_cpu("usage_usec"),
        cpu_user_us: of_cpu("user_usec"),
        cpu_system_us: of_cpu("system_usec"),
        cpu_nr_periods: of_cpu("nr_periods"),
        cpu_nr_throttled: of_cpu("nr_throttled"),
        cpu_throttled_us: of_cpu("throttled_usec"),
        memory_current: number(&file("memory.current")?, 0),
        memory_max: number(&file("memory.max")?, u64::MAX),
        swap_current: number(&file("memory.swap.current")?, 0),
        swap_max: number(&file("memory.swap.max")?, u64::MAX),
        memory_stat: flat_keyed(&file("memory.stat")?),
        memory_events: flat_keyed(&file("memory.events")?),
        io: io_stat(&file("io.stat")?),
        cpu_nr_bursts: of_cpu("nr_bursts"),
        cpu_burst_us: of_cpu("burst_usec"),
        memory_peak: number(&file("memory.peak")?, 0),
        swap_peak: number(&file("memory.swap.peak")?, 0),
        hugetlb: hugetlb(directory)?,
    })
}

/// memory.current in bytes.
pub(super) fn current(directory: &Path) -> Result<u64, CgroupError> {
    Ok(number(&files::read(directory, "memory.current")?, 0))
}

/// What of it reclaim can't get, in bytes.
pub(super) fn held(directory: &Path) -> Result<u64, CgroupError> {
    let stat = files::read(directory, "memory.stat")?;
    let taken_back = ["active_file", "inactive_file", "slab_reclaimable"].map(|key| lookup(&stat, key).unwrap_or(0));
    Ok(current(directory)?.saturating_sub(taken_back.iter().sum()))
}

/// Every page size that this kernel counts.
fn hugetlb(directory: &Path) -> Result<Vec<HugetlbStat>, CgroupError> {
    let mut stats = Vec::new();
    for entry in fs::read_dir(directory).map_err(files::error("list", directory))? {
        let name = entry.map_err(files::error("list", directory))?.file_name();
        let size = name.to_str().and_then(|name| name.strip_prefix("hugetlb.")?.strip_suffix(".current"));
        // hugetlb.SIZE.rsvd.current counts reservations.
        let Some(size) = size.filter(|size| !size.contains('.')) else { continue };
        stats.push(HugetlbStat {
            page_size: size.to_owned(),
            current: number(&files::read(directory, &format!("hugetlb.{size}.current"))?, 0),
            max: number(&files::read(directory, &format!("hugetlb.{size}.max"))?, u64::MAX),
            failures: lookup(&files::read(directory, &format!("hugetlb.{size}.events"))?, "max").unwrap_or(0),
        });
    }
    stats.sort_by(|a, b| a.page_size.cmp(&b.page_size));
    Ok(stats)
}

/// A file's only number; "max" and an absent one are `no_limit`.
fn number(text: &str, no_limit: u64) -> u64 {
    text.trim().parse().unwrap_or(no_limit)
}

/// Lines "KEY VALUE" (cgroup-v2.rst, "Format").
fn flat_keyed(text: &str) -> BTreeMap<String, u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?)))
        .collect()
}

/// One value of such a file.
pub(super) fn lookup(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.parse().ok())
}

/// Lines "MAJOR:MINOR KEY=VALUE ..." (nested keyed).
fn io_stat(text: &str) -> Vec<IoStat> {
    text.lines()
        .filter_map(|line| {
            let (device, values) = line.split_once(' ')?;
            let (major, minor) = device.split_once(':')?;
            let mut stat = IoStat { major: major.parse().ok()?, minor: minor.parse().ok()?, ..IoStat::default() };
            for (key, value) in values.split(' ').filter_map(|pair| pair.split_once('=')) {
                let value = value.parse().unwrap_or(0);
                match key {
                    "rbytes" => stat.rbytes = value,
                    "wbytes" => stat.wbytes = value,
                    "rios" => stat.rios = value,
                    "wios" => stat.wios = value,
                    _ => {}
                }
            }
            Some(stat)
        })
        .take(MAX_DEVICES)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages() {
        let directory = std::env::temp_dir().join(format!("husk-hugetlb-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let files = [("current", "4194304\n"), ("max", "max\n"), ("events", "max 3\n"), ("rsvd.current", "1\n")];
        for (name, text) in files {
            fs::write(directory.join(format!("hugetlb.2MB.{name}")), text).unwrap();
        }
        let stats = hugetlb(&directory).unwrap();
        fs::remove_dir_all(&directory).unwrap();
        let wanted = HugetlbStat { page_size: "2MB".to_owned(), current: 4 << 20, max: u64::MAX, failures: 3 };
        assert_eq!(stats, [wanted]);
    }

    #[test]
    fn formats() {
        assert_eq!(number("max\n", u64::MAX), u64::MAX);
        assert_eq!(number("42\n", 0), 42);
        assert_eq!(lookup("oom 1\noom_kill 2\n", "oom_kill"), Some(2));
        assert_eq!(lookup("oom_group_kill 3\noom 1\n", "oom"), Some(1));
        assert_eq!(flat_keyed("anon 5\nfile x\n").len(), 1);
        let io = io_stat("8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\nbroken\n254:1 \n");
        assert_eq!(io[0], IoStat { major: 8, minor: 0, rbytes: 1, wbytes: 2, rios: 3, wios: 4 });
        assert_eq!(io.len(), 2);
    }
}
