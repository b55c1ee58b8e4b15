//! Figures as the API has them: a container's, and those of the pod's network.

use std::fs;
use std::io;

use husk_agent_api::agent::{HugetlbStat, IoStat, NetworkStat, StatsResponse};
use husk_cell::cgroup::Stats;

/// Most interfaces that are told: a pod has a handful, but a container may make more.
const MAX_INTERFACES: usize = 64;

/// The counters of the pod's interfaces but loopback, as /proc/net/dev has them (proc_pid_net(5)).
pub(crate) fn network() -> io::Result<Vec<NetworkStat>> {
    Ok(interfaces(&fs::read_to_string("/proc/net/dev")?))
}

/// Lines "NAME: 8 numbers received, 8 numbers sent" below two of headings.
fn interfaces(text: &str) -> Vec<NetworkStat> {
    let interface = |line: &str| {
        let (name, counters) = line.split_once(':')?;
        let counters: Vec<u64> = counters.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect();
        let [rx_bytes, rx_packets, rx_errors, rx_dropped, _, _, _, _, tx_bytes, tx_packets, tx_errors, tx_dropped, ..] =
            counters[..]
        else {
            return None;
        };
        Some(NetworkStat {
            name: name.trim().to_owned(),
            rx_bytes,
            rx_packets,
            rx_errors,
            rx_dropped,
            tx_bytes,
            tx_packets,
            tx_errors,
            tx_dropped,
            ..Default::default()
        })
    };
    text.lines().skip(2).filter_map(interface).filter(|stat| stat.name != "lo").take(MAX_INTERFACES).collect()
}

/// The response to StatsContainer.
pub(crate) fn response(stats: Stats) -> StatsResponse {
    StatsResponse {
        pids_current: stats.pids_current,
        pids_max: stats.pids_max,
        cpu_usage_us: stats.cpu_usage_us,
        cpu_user_us: stats.cpu_user_us,
        cpu_system_us: stats.cpu_system_us,
        cpu_nr_periods: stats.cpu_nr_periods,
        cpu_nr_throttled: stats.cpu_nr_throttled,
        cpu_throttled_us: stats.cpu_throttled_us,
        memory_current: stats.memory_current,
        memory_max: stats.memory_max,
        swap_current: stats.swap_current,
        swap_max: stats.swap_max,
        memory_stat: stats.memory_stat.into_iter().collect(),
        memory_events: stats.memory_events.into_iter().collect(),
        io: stats
            .io
            .into_iter()
            .map(|line| IoStat {
                major: line.major,
                minor: line.minor,
                rbytes: line.rbytes,
                wbytes: line.wbytes,
                rios: line.rios,
                wios: line.wios,
                ..Default::default()
            })
            .collect(),
        cpu_nr_bursts: stats.cpu_nr_bursts,
        cpu_burst_us: stats.cpu_burst_us,
        memory_peak: stats.memory_peak,
        swap_peak: stats.swap_peak,
        hugetlb: stats
            .hugetlb
            .into_iter()
            .map(|pages| HugetlbStat {
                page_size: pages.page_size,
                current: pages.current,
                max: pages.max,
                failures: pages.failures,
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_interfaces() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes packets errs drop fifo frame compressed multicast|bytes\n    \
            lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 10 2 3 4 0 0 0 0 50 6 7 8 0 0 0 0\n broken: 1 2\n";
        let stats = interfaces(text);
        assert_eq!(stats.len(), 1);
        let stat = &stats[0];
        assert_eq!((stat.name.as_str(), stat.rx_bytes, stat.rx_dropped), ("eth0", 10, 4));
        assert_eq!((stat.tx_bytes, stat.tx_packets, stat.tx_errors, stat.tx_dropped), (50, 6, 7, 8));
    }
}
