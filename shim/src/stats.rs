//! A container's use of resources, from the agent's message to containerd's.

use containerd_shim::util::convert_to_any;
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PidsStat,
};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use sepal_protocol::agent::Stats;

use crate::error::{Error, Result};

/// `io.containerd.cgroups.v2.Metrics`, which `ctr metrics`, nerdctl and CRI understand.
pub fn metrics(stats: &Stats) -> Metrics {
    let mut metrics = Metrics::new();
    metrics.cpu = MessageField::some(cpu(stats));
    metrics.memory = MessageField::some(memory(stats));
    metrics.pids = MessageField::some(PidsStat {
        current: stats.pids.current,
        limit: stats.pids.limit,
        ..Default::default()
    });
    let event = |name: &str| stats.memory.events.get(name).copied().unwrap_or(0);
    metrics.memory_events = MessageField::some(MemoryEvents {
        low: event("low"),
        high: event("high"),
        max: event("max"),
        oom: event("oom"),
        oom_kill: event("oom_kill"),
        oom_group_kill: event("oom_group_kill"),
        ..Default::default()
    });
    let entry = |io: &sepal_protocol::agent::IoStats| IOEntry {
        major: io.major,
        minor: io.minor,
        rbytes: io.rbytes,
        wbytes: io.wbytes,
        rios: io.rios,
        wios: io.wios,
        ..Default::default()
    };
    metrics.io = MessageField::some(IOStat {
        usage: stats.io.iter().map(entry).collect(),
        ..Default::default()
    });
    let hugetlb = |page: &sepal_protocol::agent::HugeTlbStats| HugeTlbStat {
        current: page.current,
        max: page.max,
        pagesize: page.page_size.clone(),
        failcnt: page.failures,
        ..Default::default()
    };
    metrics.hugetlb = stats.hugetlb.iter().map(hugetlb).collect();
    let network = |nic: &sepal_protocol::agent::InterfaceStats| NetworkStat {
        name: nic.name.clone(),
        rx_bytes: nic.rx_bytes,
        rx_packets: nic.rx_packets,
        rx_errors: nic.rx_errors,
        rx_dropped: nic.rx_dropped,
        tx_bytes: nic.tx_bytes,
        tx_packets: nic.tx_packets,
        tx_errors: nic.tx_errors,
        tx_dropped: nic.tx_dropped,
        ..Default::default()
    };
    metrics.network = stats.network.iter().map(network).collect();
    metrics
}

/// As an answer carries it.
///
/// # Errors
/// It cannot be encoded.
pub fn to_any(metrics: Metrics) -> Result<Any> {
    convert_to_any(Box::new(metrics)).map_err(|e| Error::Invalid {
        what: "metrics",
        reason: e.to_string(),
    })
}

fn cpu(stats: &Stats) -> CPUStat {
    let cpu = &stats.cpu;
    CPUStat {
        usage_usec: cpu.usage_usec,
        user_usec: cpu.user_usec,
        system_usec: cpu.system_usec,
        nr_periods: cpu.nr_periods,
        nr_throttled: cpu.nr_throttled,
        throttled_usec: cpu.throttled_usec,
        ..Default::default()
    }
}

fn memory(stats: &Stats) -> MemoryStat {
    let memory = &stats.memory;
    let of = |name: &str| memory.stat.get(name).copied().unwrap_or(0);
    MemoryStat {
        anon: of("anon"),
        file: of("file"),
        kernel_stack: of("kernel_stack"),
        slab: of("slab"),
        sock: of("sock"),
        shmem: of("shmem"),
        file_mapped: of("file_mapped"),
        file_dirty: of("file_dirty"),
        file_writeback: of("file_writeback"),
        anon_thp: of("anon_thp"),
        inactive_anon: of("inactive_anon"),
        active_anon: of("active_anon"),
        inactive_file: of("inactive_file"),
        active_file: of("active_file"),
        unevictable: of("unevictable"),
        slab_reclaimable: of("slab_reclaimable"),
        slab_unreclaimable: of("slab_unreclaimable"),
        pgfault: of("pgfault"),
        pgmajfault: of("pgmajfault"),
        workingset_refault: of("workingset_refault_anon")
            .saturating_add(of("workingset_refault_file")),
        workingset_activate: of("workingset_activate_anon")
            .saturating_add(of("workingset_activate_file")),
        workingset_nodereclaim: of("workingset_nodereclaim"),
        pgrefill: of("pgrefill"),
        pgscan: of("pgscan"),
        pgsteal: of("pgsteal"),
        pgactivate: of("pgactivate"),
        pgdeactivate: of("pgdeactivate"),
        pglazyfree: of("pglazyfree"),
        pglazyfreed: of("pglazyfreed"),
        thp_fault_alloc: of("thp_fault_alloc"),
        thp_collapse_alloc: of("thp_collapse_alloc"),
        usage: memory.usage,
        usage_limit: memory.limit,
        swap_usage: memory.swap_usage,
        swap_limit: memory.swap_limit,
        max_usage: memory.max_usage,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use sepal_protocol::agent::{MemoryStats, PidsStats};

    use super::*;

    #[test]
    fn what_the_guest_counts_arrives_under_its_name() {
        let memory = MemoryStats {
            usage: 7,
            limit: u64::MAX,
            stat: [
                ("anon".to_string(), 5),
                ("workingset_refault_file".to_string(), 2),
            ]
            .into(),
            events: [("oom_kill".to_string(), 1)].into(),
            ..Default::default()
        };
        let stats = Stats {
            memory: MessageField::some(memory),
            pids: MessageField::some(PidsStats {
                current: 3,
                limit: 9,
                ..Default::default()
            }),
            ..Default::default()
        };
        let metrics = metrics(&stats);
        assert_eq!((metrics.memory.usage, metrics.memory.anon), (7, 5));
        assert_eq!(metrics.memory.workingset_refault, 2);
        assert_eq!(metrics.memory_events.oom_kill, 1);
        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, 9));
        let any = to_any(metrics).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
    }

    #[test]
    fn counts_that_no_kernel_has_do_not_overflow() {
        let kinds = [
            "refault_anon",
            "refault_file",
            "activate_anon",
            "activate_file",
        ];
        let memory = MemoryStats {
            stat: kinds
                .map(|kind| (format!("workingset_{kind}"), u64::MAX))
                .into(),
            ..Default::default()
        };
        let metrics = metrics(&Stats {
            memory: MessageField::some(memory),
            ..Default::default()
        });
        assert_eq!(metrics.memory.workingset_refault, u64::MAX);
        assert_eq!(metrics.memory.workingset_activate, u64::MAX);
    }
}
