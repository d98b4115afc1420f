//! How large a pod's VM is: from its limits, the annotations and the configuration.

use nix::unistd::{SysconfVar, sysconf};
use sepal_protocol::config::{self, Config, MIN_MEMORY};
use sepal_protocol::vm::CpuSpec;

use crate::annotations::{self, Annotations};
use crate::limits::{CPU, Totals};

const MIB: u64 = 1 << 20;
/// How many huge pages the host has set aside.
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
/// Guest RAM is mapped in these units ([`sepal_protocol::vm::MemorySpec`]).
const GRANULE: u64 = 2 * MIB;
/// Least memory limit of a container: below it not even a shell starts.
const MIN_LIMIT: u64 = 4 * MIB;
/// Most RAM of a VM.
const MAX_MEMORY: u64 = config::MAX_MEMORY * MIB;

/// The size of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Size {
    /// vCPUs.
    pub cpus: CpuSpec,
    /// RAM in bytes, a multiple of 2 MiB.
    pub memory: u64,
    /// What it may grow to, likewise.
    pub max_memory: u64,
    /// What it may have of huge pages beside that, likewise.
    pub max_huge: u64,
}

/// What the host has, in which a VM's size finds its bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// Processors.
    pub cpus: u8,
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of it that are set aside as huge pages of 2 MiB.
    pub huge: u64,
}

/// Why no VM can have the size that is asked for.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's text is its documentation")]
pub enum Error {
    #[error(
        "memory limit of {limit} bytes is too small for a container: give it at least {} bytes",
        MIN_LIMIT
    )]
    LimitTooSmall { limit: u64 },
    #[error(
        "memory limit of {limit} bytes is more than a VM can have: at most {} bytes",
        MAX_MEMORY
    )]
    LimitTooLarge { limit: u64 },
    #[error("annotation {key}: {value:?} must be {must}")]
    Annotation {
        key: &'static str,
        value: String,
        must: String,
    },
    #[error("annotation {key} is not known: sepal reads {allowed}", allowed = annotations::allowed())]
    UnknownAnnotation { key: String },
}

impl Host {
    /// This one.
    pub fn here() -> Self {
        // Not available_parallelism(), which is what this process may use: it is in the pod's cgroup.
        let cpus = sysconf(SysconfVar::_NPROCESSORS_ONLN).ok().flatten();
        let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kilobytes = info
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:"))
            .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        let huge = std::fs::read_to_string(HUGE_PAGES).unwrap_or_default();
        let huge: u64 = huge.trim().parse().unwrap_or(0);
        Self {
            cpus: u8::try_from(cpus.unwrap_or(1)).unwrap_or(u8::MAX),
            memory: kilobytes.unwrap_or(0).saturating_mul(1024),
            huge: huge.saturating_mul(GRANULE),
        }
    }
}

impl Size {
    /// Decides the size of a pod that may use these totals and has these annotations.
    ///
    /// An annotation `io.sepal.*` tells the VM's own size. Otherwise limits count: RAM is the memory
    /// limit and room for the guest itself, vCPUs are the CPU quota rounded up.
    ///
    /// # Errors
    /// A limit or an annotation that no VM can satisfy.
    pub fn plan(
        annotations: &Annotations,
        totals: Totals,
        config: &Config,
        host: Host,
    ) -> Result<Self, Error> {
        if let Some(key) = annotations::unknown(annotations) {
            return Err(Error::UnknownAnnotation { key: key.into() });
        }
        let memory = Self::memory(annotations, totals, config)?;
        let most = config.max_vcpus.min(host.cpus.max(1));
        let by_limits = totals
            .cpu
            .map(|cpu| u8::try_from(cpu.div_ceil(CPU)).unwrap_or(u8::MAX))
            .unwrap_or(config.vcpus)
            .clamp(1, most);
        let fixed = cpus(annotations, annotations::VCPUS, config)?;
        let boot = fixed.unwrap_or(by_limits);
        // Each CPU that may come costs the guest 0.4 MiB from the start: they are for pods whose limit
        // can be raised.
        let room = match (fixed, totals.cpu) {
            (None, Some(_)) => boot.saturating_mul(2).min(most),
            _ => boot,
        };
        let max = cpus(annotations, annotations::MAX_VCPUS, config)?.unwrap_or(room);
        Ok(Self {
            cpus: CpuSpec {
                boot,
                max: max.max(boot),
            },
            memory,
            max_memory: Self::max_memory(annotations, config, host)?.max(memory),
            max_huge: host.huge.min(MAX_MEMORY),
        })
    }

    fn memory(annotations: &Annotations, totals: Totals, config: &Config) -> Result<u64, Error> {
        if let Some(bytes) = mebibytes(annotations, annotations::MEMORY)? {
            return Ok(bytes);
        }
        let default = config.memory * MIB;
        match totals.memory {
            None => Ok(default),
            Some(limit) if limit < MIN_LIMIT => Err(Error::LimitTooSmall { limit }),
            Some(limit) => {
                let total = limit.saturating_add(config.memory_overhead * MIB);
                if total > MAX_MEMORY {
                    return Err(Error::LimitTooLarge { limit });
                }
                // A guest needs a minimum to boot, however little its container may use.
                Ok(total.next_multiple_of(GRANULE).max(default.min(128 * MIB)))
            }
        }
    }

    fn max_memory(annotations: &Annotations, config: &Config, host: Host) -> Result<u64, Error> {
        let configured = match config.max_memory {
            0 => host.memory,
            mebibytes => mebibytes.saturating_mul(MIB),
        };
        let asked = mebibytes(annotations, annotations::MAX_MEMORY)?;
        // The node's administrator has the last word.
        let max = asked.map_or(configured, |asked| asked.min(configured));
        Ok(max.min(MAX_MEMORY) / GRANULE * GRANULE)
    }
}

fn cpus(
    annotations: &Annotations,
    key: &'static str,
    config: &Config,
) -> Result<Option<u8>, Error> {
    let Some(value) = annotations.get(key) else {
        return Ok(None);
    };
    match value.parse::<u8>() {
        Ok(cpus) if (1..=config.max_vcpus).contains(&cpus) => Ok(Some(cpus)),
        _ => Err(Error::Annotation {
            key,
            value: value.clone(),
            must: format!("1 to {} (max_vcpus)", config.max_vcpus),
        }),
    }
}

fn mebibytes(annotations: &Annotations, key: &'static str) -> Result<Option<u64>, Error> {
    let Some(value) = annotations.get(key) else {
        return Ok(None);
    };
    match value.parse::<u64>() {
        Ok(mib) if (MIN_MEMORY..=MAX_MEMORY / MIB).contains(&mib) => {
            Ok(Some((mib * MIB).next_multiple_of(GRANULE)))
        }
        _ => Err(Error::Annotation {
            key,
            value: value.clone(),
            must: format!("MiB, {MIN_MEMORY} to {}", MAX_MEMORY / MIB),
        }),
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxCpuBuilder, LinuxMemoryBuilder, LinuxResourcesBuilder};

    use crate::annotations::CriResources;
    use crate::limits::Limits;

    use super::*;

    const HOST: Host = Host {
        cpus: 4,
        memory: 8 << 30,
        huge: 64 << 20,
    };

    fn plan(
        annotations: &[(&str, &str)],
        limit: Option<i64>,
        quota: Option<i64>,
    ) -> Result<Size, Error> {
        let annotations: Annotations = annotations
            .iter()
            .map(|(k, v)| (k.to_string(), v.to_string()))
            .collect();
        let mut resources = LinuxResourcesBuilder::default();
        if let Some(limit) = limit {
            resources =
                resources.memory(LinuxMemoryBuilder::default().limit(limit).build().unwrap());
        }
        if let Some(quota) = quota {
            let cpu = LinuxCpuBuilder::default()
                .quota(quota)
                .period(100_000_u64)
                .build()
                .unwrap();
            resources = resources.cpu(cpu);
        }
        let limits = Limits::of(Some(&resources.build().unwrap()));
        let totals = limits.of_pod(CriResources::of(&annotations));
        Size::plan(&annotations, totals, &Config::default(), HOST)
    }

    #[test]
    fn the_hosts_processors_are_counted_and_not_those_that_this_thread_may_use() {
        use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
        let this = nix::unistd::Pid::from_raw(0);
        let all = sched_getaffinity(this).unwrap();
        let first = (0..CpuSet::count()).find(|cpu| all.is_set(*cpu).unwrap());
        let mut one = CpuSet::new();
        one.set(first.unwrap()).unwrap();
        let before = Host::here().cpus;
        // Of this thread, which ends with the test.
        sched_setaffinity(this, &one).unwrap();
        assert_eq!(Host::here().cpus, before);
    }

    #[test]
    fn without_limits_the_configuration_decides() {
        let size = plan(&[], None, None).unwrap();
        assert_eq!(
            size,
            Size {
                cpus: CpuSpec { boot: 1, max: 1 },
                memory: 256 * MIB,
                max_memory: 8 << 30,
                max_huge: 64 << 20,
            }
        );
        assert_eq!(plan(&[], Some(-1), Some(-1)).unwrap(), size);
    }

    #[test]
    fn limits_get_room_for_the_guest_and_whole_cpus() {
        let size = plan(&[], Some(512 << 20), Some(150_000)).unwrap();
        assert_eq!(size.memory, (512 + 64) * MIB);
        assert_eq!(size.cpus.boot, 2);
        assert_eq!(
            plan(&[], None, Some(9_900_000)).unwrap().cpus.boot,
            4,
            "the host has four"
        );
        assert_eq!(plan(&[], Some(8 << 20), None).unwrap().memory, 128 * MIB);
    }

    #[test]
    fn the_sandbox_annotations_count_for_the_pod() {
        let cri = [
            ("io.kubernetes.cri.sandbox-memory", "1073741824"),
            ("io.kubernetes.cri.sandbox-cpu-quota", "200000"),
            ("io.kubernetes.cri.sandbox-cpu-period", "100000"),
        ];
        let size = plan(&cri, None, None).unwrap();
        assert_eq!((size.memory, size.cpus.boot), ((1024 + 64) * MIB, 2));
    }

    #[test]
    fn our_annotations_tell_the_vm_itself() {
        let size = plan(
            &[(annotations::MEMORY, "129"), (annotations::VCPUS, "3")],
            Some(1 << 30),
            None,
        )
        .unwrap();
        assert_eq!((size.memory, size.cpus.boot), (130 * MIB, 3));
    }

    #[test]
    fn how_far_a_vm_can_grow_is_the_hosts_the_nodes_and_the_pods_word() {
        let plan = |annotations: &[(&str, &str)], cpu: Option<u64>, config: &Config| {
            let annotations = annotations
                .iter()
                .map(|(k, v)| (k.to_string(), v.to_string()))
                .collect();
            let totals = Totals { memory: None, cpu };
            let size = Size::plan(&annotations, totals, config, HOST).unwrap();
            (size.max_memory / MIB, size.cpus.max)
        };
        let mut config = Config::default();
        assert_eq!(plan(&[], None, &config), (8192, 1));
        assert_eq!(plan(&[], Some(CPU / 2), &config), (8192, 2));
        assert_eq!(plan(&[], Some(3 * CPU), &config), (8192, 4));
        let pod = [
            (annotations::MAX_MEMORY, "2048"),
            (annotations::MAX_VCPUS, "3"),
        ];
        assert_eq!(plan(&pod, None, &config), (2048, 3));
        config.max_memory = 1000;
        config.max_vcpus = 3;
        assert_eq!(plan(&[], Some(2 * CPU), &config), (1000, 3));
        assert_eq!(plan(&pod, None, &config), (1000, 3));
        // What it has at once counts in any case, and what is told does not change.
        let large = [(annotations::MEMORY, "3000"), (annotations::VCPUS, "2")];
        assert_eq!(plan(&large, Some(CPU), &config), (3000, 2));
        let small = [(annotations::MAX_VCPUS, "1"), (annotations::VCPUS, "2")];
        assert_eq!(plan(&small, None, &config).1, 2);
    }

    #[test]
    fn what_no_vm_can_satisfy_is_refused_in_a_sentence() {
        for (annotations, limit, text) in [
            (
                &[][..],
                Some(1 << 20),
                "memory limit of 1048576 bytes is too small",
            ),
            (&[][..], Some(i64::MAX), "more than a VM can have"),
            (
                &[(annotations::MEMORY, "12")][..],
                None,
                "annotation io.sepal.memory: \"12\" must be",
            ),
            (
                &[(annotations::VCPUS, "0")][..],
                None,
                "annotation io.sepal.vcpus: \"0\" must be",
            ),
            (
                &[(annotations::MAX_MEMORY, "1e9")][..],
                None,
                "annotation io.sepal.max_memory: \"1e9\" must be",
            ),
            (
                &[(annotations::MAX_VCPUS, "9")][..],
                None,
                "annotation io.sepal.max_vcpus: \"9\" must be",
            ),
            (
                &[("io.sepal.kernel", "/x")][..],
                None,
                "annotation io.sepal.kernel is not known",
            ),
        ] {
            let message = plan(annotations, limit, None).unwrap_err().to_string();
            assert!(message.contains(text), "{message}");
        }
    }
}
