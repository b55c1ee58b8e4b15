//! What a pod takes of the host, by its cgroup there: v2's files (Documentation/admin-guide/cgroup-v2.rst), or what v1 has of the same.

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use husk_agent_api::agent::{IoStat, StatsResponse};

use super::{CgroupError, Directory, Kind, PodCgroup, failed};

/// Most bytes of a file.
const MAX_FILE: u64 = 1 << 20;

/// At and above this v1's limit is none: it rounds "no limit" to pages (cgroup-v1/memory.rst).
const V1_NO_LIMIT: u64 = 1 << 62;

impl PodCgroup {
    /// The figures of all its processes and of what was in it before. A file that this host does not have leaves 0.
    pub(crate) fn stats(&self) -> Result<StatsResponse, CgroupError> {
        let mut stats = StatsResponse { memory_max: u64::MAX, swap_max: u64::MAX, ..StatsResponse::default() };
        for directory in &self.directories {
            match directory.kind {
                Kind::V2 => directory.read_v2(&mut stats)?,
                Kind::V1 { .. } => directory.read_v1(&mut stats)?,
            }
        }
        Ok(stats)
    }
}

impl Directory {
    fn read_v2(&self, stats: &mut StatsResponse) -> Result<(), CgroupError> {
        let cpu = keyed(&self.read("cpu.stat")?);
        let of_cpu = |key: &str| cpu.get(key).copied().unwrap_or(0);
        stats.cpu_usage_us = of_cpu("usage_usec");
        stats.cpu_user_us = of_cpu("user_usec");
        stats.cpu_system_us = of_cpu("system_usec");
        stats.cpu_nr_periods = of_cpu("nr_periods");
        stats.cpu_nr_throttled = of_cpu("nr_throttled");
        stats.cpu_throttled_us = of_cpu("throttled_usec");
        stats.pids_current = number(&self.read("pids.current")?, 0);
        stats.pids_max = number(&self.read("pids.max")?, 0);
        stats.memory_current = number(&self.read("memory.current")?, 0);
        stats.memory_max = number(&self.read("memory.max")?, u64::MAX);
        stats.memory_peak = number(&self.read("memory.peak")?, 0);
        stats.swap_current = number(&self.read("memory.swap.current")?, 0);
        stats.swap_max = number(&self.read("memory.swap.max")?, u64::MAX);
        stats.memory_stat = keyed(&self.read("memory.stat")?);
        stats.memory_events = keyed(&self.read("memory.events")?);
        stats.io = self.read("io.stat")?.lines().filter_map(io).collect();
        Ok(())
    }

    fn read_v1(&self, stats: &mut StatsResponse) -> Result<(), CgroupError> {
        // Each controller's files are in its own hierarchy only; time is in nanoseconds.
        let of = |name: &str| self.read(name).map(|text| text.trim().parse::<u64>().ok());
        if let Some(usage) = of("cpuacct.usage")? {
            stats.cpu_usage_us = usage / 1000;
            stats.cpu_user_us = of("cpuacct.usage_user")?.unwrap_or(0) / 1000;
            stats.cpu_system_us = of("cpuacct.usage_sys")?.unwrap_or(0) / 1000;
        }
        if let Some(current) = of("pids.current")? {
            stats.pids_current = current;
            stats.pids_max = of("pids.max")?.unwrap_or(0);
        }
        if let Some(current) = of("memory.usage_in_bytes")? {
            stats.memory_current = current;
            stats.memory_peak = of("memory.max_usage_in_bytes")?.unwrap_or(0);
            stats.memory_max = of("memory.limit_in_bytes")?.filter(|limit| *limit < V1_NO_LIMIT).unwrap_or(u64::MAX);
            let all = keyed(&self.read("memory.stat")?);
            let names = [
                ("anon", "total_rss"),
                ("file", "total_cache"),
                ("inactive_file", "total_inactive_file"),
                ("active_file", "total_active_file"),
                ("inactive_anon", "total_inactive_anon"),
                ("active_anon", "total_active_anon"),
                ("unevictable", "total_unevictable"),
                ("pgfault", "total_pgfault"),
                ("pgmajfault", "total_pgmajfault"),
            ];
            let renamed = names.into_iter().filter_map(|(v2, v1)| Some((v2.to_owned(), *all.get(v1)?)));
            stats.memory_stat = renamed.collect();
        }
        Ok(())
    }

    /// A file's text; empty if there is no such file.
    fn read(&self, name: &str) -> Result<String, CgroupError> {
        let path = self.path.join(name);
        read(&path).or_else(|cause| match cause.kind() {
            // ENODEV: the cgroup is being removed; EOPNOTSUPP: switched off.
            ErrorKind::NotFound | ErrorKind::Unsupported => Ok(String::new()),
            _ if cause.raw_os_error() == Some(libc::ENODEV) => Ok(String::new()),
            _ => Err(failed("read", &path)(cause)),
        })
    }
}

fn read(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_FILE).read_to_string(&mut text)?;
    Ok(text)
}

/// A file's only number; "max" and an absent one are `no_limit`.
fn number(text: &str, no_limit: u64) -> u64 {
    text.trim().parse().unwrap_or(no_limit)
}

/// Lines "KEY VALUE".
fn keyed(text: &str) -> HashMap<String, u64> {
    let pair = |line: &str| {
        let (key, value) = line.split_once(' ')?;
        Some((key.to_owned(), value.trim().parse().ok()?))
    };
    text.lines().filter_map(pair).collect()
}

/// A line "MAJOR:MINOR KEY=VALUE ..." of io.stat.
fn io(line: &str) -> Option<IoStat> {
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
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A directory with files, as a hierarchy of a kind.
    fn directory(name: &str, kind: Kind, files: &[(&str, &str)]) -> Directory {
        let path = std::env::temp_dir().join(format!("husk-cgroup-stats-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        for (name, text) in files {
            fs::write(path.join(name), text).unwrap();
        }
        Directory { root: path.clone(), path, kind }
    }

    #[test]
    fn both_versions_give_the_same_figures() {
        let v2 = directory(
            "v2",
            Kind::V2,
            &[
                ("cpu.stat", "usage_usec 5\nuser_usec 3\n"),
                ("memory.current", "100\n"),
                ("memory.max", "max\n"),
                ("memory.stat", "inactive_file 30\n"),
                ("pids.current", "4\n"),
                ("io.stat", "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n"),
            ],
        );
        let v1 = directory(
            "v1",
            Kind::V1 { cpuset: false },
            &[
                ("cpuacct.usage", "5000\n"),
                ("cpuacct.usage_user", "3000\n"),
                ("memory.usage_in_bytes", "100\n"),
                ("memory.limit_in_bytes", "9223372036854771712\n"),
                ("memory.stat", "inactive_file 1\ntotal_inactive_file 30\n"),
                ("pids.current", "4\n"),
            ],
        );
        for directory in [v2, v1] {
            let path = directory.path.clone();
            let stats = PodCgroup { directories: vec![directory] }.stats().unwrap();
            assert_eq!((stats.cpu_usage_us, stats.cpu_user_us, stats.pids_current), (5, 3, 4));
            assert_eq!((stats.memory_current, stats.memory_max), (100, u64::MAX));
            assert_eq!(stats.memory_stat["inactive_file"], 30);
            assert!(stats.io.iter().all(|io| (io.major, io.rbytes, io.wios) == (8, 1, 4)));
            fs::remove_dir_all(path).unwrap();
        }
    }
}
