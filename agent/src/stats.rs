//! A container's figures as the API has them.

use husk_agent_api::agent::{IoStat, StatsResponse};
use husk_cell::cgroup::Stats;

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
        ..Default::default()
    }
}
