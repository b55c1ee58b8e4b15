//! A container's figures in the form that containerd's CRI plugin reads: io.containerd.cgroups.v2.Metrics.

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PidsStat,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{self, Message, MessageField};
use husk_agent_api::agent::{StatsPodResponse, StatsResponse};

/// The message's name, as containerd's typeurl writes it.
const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// Most entries of a list that the guest sends.
const MAX_ENTRIES: usize = 256;

/// Most characters of a name that the guest sends.
const MAX_NAME: usize = 64;

/// A container's figures, or a pod's.
#[derive(Clone, Debug, Default)]
pub(crate) struct Figures {
    /// Of its cgroup: in the guest, for a sandbox the pod's on the host.
    pub(crate) cgroup: StatsResponse,
    /// Of the pod's interfaces; for a sandbox or a single container.
    pub(crate) pod: StatsPodResponse,
}

/// containerd's form of the figures.
fn metrics(Figures { cgroup: stats, pod }: &Figures) -> Metrics {
    let memory = |name: &str| stats.memory_stat.get(name).copied().unwrap_or(0);
    let events = |name: &str| stats.memory_events.get(name).copied().unwrap_or(0);
    let memory_stat = MemoryStat {
        anon: memory("anon"),
        file: memory("file"),
        kernel_stack: memory("kernel_stack"),
        slab: memory("slab"),
        sock: memory("sock"),
        shmem: memory("shmem"),
        file_mapped: memory("file_mapped"),
        file_dirty: memory("file_dirty"),
        file_writeback: memory("file_writeback"),
        anon_thp: memory("anon_thp"),
        inactive_anon: memory("inactive_anon"),
        active_anon: memory("active_anon"),
        inactive_file: memory("inactive_file"),
        active_file: memory("active_file"),
        unevictable: memory("unevictable"),
        slab_reclaimable: memory("slab_reclaimable"),
        slab_unreclaimable: memory("slab_unreclaimable"),
        pgfault: memory("pgfault"),
        pgmajfault: memory("pgmajfault"),
        workingset_refault: memory("workingset_refault_anon").saturating_add(memory("workingset_refault_file")),
        workingset_activate: memory("workingset_activate_anon").saturating_add(memory("workingset_activate_file")),
        workingset_nodereclaim: memory("workingset_nodereclaim"),
        pgrefill: memory("pgrefill"),
        pgscan: memory("pgscan"),
        pgsteal: memory("pgsteal"),
        pgactivate: memory("pgactivate"),
        pgdeactivate: memory("pgdeactivate"),
        pglazyfree: memory("pglazyfree"),
        pglazyfreed: memory("pglazyfreed"),
        thp_fault_alloc: memory("thp_fault_alloc"),
        thp_collapse_alloc: memory("thp_collapse_alloc"),
        usage: stats.memory_current,
        usage_limit: stats.memory_max,
        swap_usage: stats.swap_current,
        swap_limit: stats.swap_max,
        max_usage: stats.memory_peak,
        swap_max_usage: stats.swap_peak,
        ..Default::default()
    };
    let memory_events = MemoryEvents {
        low: events("low"),
        high: events("high"),
        max: events("max"),
        oom: events("oom"),
        oom_kill: events("oom_kill"),
        oom_group_kill: events("oom_group_kill"),
        ..Default::default()
    };
    let io = stats.io.iter().take(MAX_ENTRIES).map(|io| IOEntry {
        major: io.major,
        minor: io.minor,
        rbytes: io.rbytes,
        wbytes: io.wbytes,
        rios: io.rios,
        wios: io.wios,
        ..Default::default()
    });
    let hugetlb = stats.hugetlb.iter().take(MAX_ENTRIES).map(|pages| HugeTlbStat {
        current: pages.current,
        max: pages.max,
        pagesize: pages.page_size.chars().take(MAX_NAME).collect(),
        failcnt: pages.failures,
        ..Default::default()
    });
    let network = pod.network.iter().take(MAX_ENTRIES).map(|interface| NetworkStat {
        name: interface.name.chars().take(MAX_NAME).collect(),
        rx_bytes: interface.rx_bytes,
        rx_packets: interface.rx_packets,
        rx_errors: interface.rx_errors,
        rx_dropped: interface.rx_dropped,
        tx_bytes: interface.tx_bytes,
        tx_packets: interface.tx_packets,
        tx_errors: interface.tx_errors,
        tx_dropped: interface.tx_dropped,
        ..Default::default()
    });
    Metrics {
        pids: MessageField::some(PidsStat { current: stats.pids_current, limit: stats.pids_max, ..Default::default() }),
        cpu: MessageField::some(CPUStat {
            usage_usec: stats.cpu_usage_us,
            user_usec: stats.cpu_user_us,
            system_usec: stats.cpu_system_us,
            nr_periods: stats.cpu_nr_periods,
            nr_throttled: stats.cpu_nr_throttled,
            throttled_usec: stats.cpu_throttled_us,
            nr_bursts: stats.cpu_nr_bursts,
            burst_usec: stats.cpu_burst_us,
            ..Default::default()
        }),
        memory: MessageField::some(memory_stat),
        memory_events: MessageField::some(memory_events),
        io: MessageField::some(IOStat { usage: io.collect(), ..Default::default() }),
        hugetlb: hugetlb.collect(),
        network: network.collect(),
        ..Default::default()
    }
}

/// The figures, packed for containerd.
pub(crate) fn pack(figures: &Figures) -> Result<Any, protobuf::Error> {
    Ok(Any { type_url: TYPE_URL.to_owned(), value: metrics(figures).write_to_bytes()?, ..Default::default() })
}

#[cfg(test)]
mod tests {
    use husk_agent_api::agent;

    use super::*;

    #[test]
    fn figures_keep_their_places() {
        let mut cgroup =
            StatsResponse { memory_current: 7, memory_max: u64::MAX, cpu_usage_us: 9, ..Default::default() };
        cgroup.memory_stat.insert("inactive_file".to_owned(), 3);
        cgroup.memory_events.insert("oom_kill".to_owned(), 1);
        let pages = agent::HugetlbStat { page_size: "2MB".to_owned(), current: 5, max: 6, ..Default::default() };
        cgroup.hugetlb.push(pages);
        let interface =
            agent::NetworkStat { name: "eth0".to_owned(), rx_bytes: 1, tx_dropped: 8, ..Default::default() };
        let pod = StatsPodResponse { network: vec![interface], ..Default::default() };
        let any = pack(&Figures { cgroup, pod }).unwrap();
        assert_eq!(any.type_url, TYPE_URL);
        let metrics = Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((metrics.memory.usage, metrics.memory.usage_limit), (7, u64::MAX));
        assert_eq!((metrics.memory.inactive_file, metrics.memory_events.oom_kill), (3, 1));
        assert_eq!((metrics.cpu.usage_usec, metrics.pids.current), (9, 0));
        let pages = &metrics.hugetlb[0];
        assert_eq!((pages.pagesize.as_str(), pages.current, pages.max), ("2MB", 5, 6));
        let interface = &metrics.network[0];
        assert_eq!((interface.name.as_str(), interface.rx_bytes, interface.tx_dropped), ("eth0", 1, 8));
    }

    #[test]
    fn the_guests_lists_are_bounded() {
        let many = MAX_ENTRIES + 1;
        let interface = agent::NetworkStat { name: "x".repeat(many), ..Default::default() };
        let cgroup = StatsResponse {
            io: vec![Default::default(); many],
            hugetlb: vec![Default::default(); many],
            ..Default::default()
        };
        let pod = StatsPodResponse { network: vec![interface; many], ..Default::default() };
        let metrics = metrics(&Figures { cgroup, pod });
        assert_eq!([metrics.io.usage.len(), metrics.hugetlb.len(), metrics.network.len()], [MAX_ENTRIES; 3]);
        assert_eq!(metrics.network[0].name.len(), MAX_NAME);
    }
}
