//! How large a pod's VM is: from its limits, the annotations and the configuration.

use oci_spec::runtime::LinuxResources;
use sepal_protocol::config::{Config, MIN_MEMORY};
use sepal_protocol::vm::CpuSpec;

use crate::annotations::{self, Annotations, CriResources};

const MIB: u64 = 1 << 20;
/// Guest RAM is mapped in these units ([`sepal_protocol::vm::MemorySpec`]).
const GRANULE: u64 = 2 * MIB;
/// Least memory limit of a container: below it not even a shell starts.
const MIN_LIMIT: u64 = 4 * MIB;
/// Most RAM of a VM: 4 TiB.
const MAX_MEMORY: u64 = 4 << 40;
/// Period of a CPU quota where the spec has none: the kernel's default, in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;

/// The size of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Size {
    /// vCPUs.
    pub cpus: CpuSpec,
    /// RAM in bytes, a multiple of 2 MiB.
    pub memory: u64,
}

/// Why no VM can have the size that is asked for.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's text is its documentation")]
pub enum Error {
    #[error(
        "memory limit of {limit} bytes is too small for a container: give it at least {} bytes",
        MIN_LIMIT
    )]
    LimitTooSmall { limit: i64 },
    #[error(
        "memory limit of {limit} bytes is more than a VM can have: at most {} bytes",
        MAX_MEMORY
    )]
    LimitTooLarge { limit: i64 },
    #[error("annotation {key}: {value:?} must be {must}")]
    Annotation {
        key: &'static str,
        value: String,
        must: String,
    },
    #[error("annotation {key} is not known: sepal reads {allowed}", allowed = annotations::allowed())]
    UnknownAnnotation { key: String },
}

impl Size {
    /// Decides the size of a pod whose first container has these annotations and limits.
    ///
    /// An annotation `io.sepal.*` tells the VM's own size. Otherwise limits count: RAM is the memory
    /// limit and room for the guest itself, vCPUs are the CPU quota rounded up.
    ///
    /// # Errors
    /// A limit or an annotation that no VM can satisfy.
    pub fn plan(
        annotations: &Annotations,
        resources: Option<&LinuxResources>,
        config: &Config,
        host_cpus: u8,
    ) -> Result<Self, Error> {
        let cri = CriResources::of(annotations);
        Self::plan_for(annotations, cri, resources, config, host_cpus)
    }

    /// As [`Size::plan`], where the pod's limits are known otherwise than by its annotations.
    ///
    /// # Errors
    /// A limit or an annotation that no VM can satisfy.
    pub fn plan_for(
        annotations: &Annotations,
        cri: CriResources,
        resources: Option<&LinuxResources>,
        config: &Config,
        host_cpus: u8,
    ) -> Result<Self, Error> {
        if let Some(key) = annotations::unknown(annotations) {
            return Err(Error::UnknownAnnotation { key: key.into() });
        }
        let memory = Self::memory(annotations, cri, resources, config)?;
        let most = config.max_vcpus.min(host_cpus.max(1));
        let boot = match annotations.get(annotations::VCPUS) {
            Some(value) => match value.parse::<u8>() {
                Ok(cpus) if (1..=config.max_vcpus).contains(&cpus) => cpus,
                _ => {
                    return Err(Error::Annotation {
                        key: annotations::VCPUS,
                        value: value.clone(),
                        must: format!("1 to {} (max_vcpus)", config.max_vcpus),
                    });
                }
            },
            None => Self::cpus_of_limits(cri, resources)
                .unwrap_or(config.vcpus)
                .clamp(1, most),
        };
        Ok(Self {
            cpus: CpuSpec { boot, max: boot },
            memory,
        })
    }

    fn memory(
        annotations: &Annotations,
        cri: CriResources,
        resources: Option<&LinuxResources>,
        config: &Config,
    ) -> Result<u64, Error> {
        if let Some(value) = annotations.get(annotations::MEMORY) {
            return match value.parse::<u64>() {
                Ok(mib) if (MIN_MEMORY..=MAX_MEMORY / MIB).contains(&mib) => {
                    Ok((mib * MIB).next_multiple_of(GRANULE))
                }
                _ => Err(Error::Annotation {
                    key: annotations::MEMORY,
                    value: value.clone(),
                    must: format!("MiB, {MIN_MEMORY} to {}", MAX_MEMORY / MIB),
                }),
            };
        }
        let own = resources
            .and_then(|r| r.memory().as_ref())
            .and_then(|m| m.limit());
        let default = config.memory * MIB;
        match cri.memory.or(own.filter(|limit| *limit > 0)) {
            None => Ok(default),
            Some(limit) => {
                let bytes = limit.unsigned_abs();
                if bytes < MIN_LIMIT {
                    return Err(Error::LimitTooSmall { limit });
                }
                let total = bytes.saturating_add(config.memory_overhead * MIB);
                if total > MAX_MEMORY {
                    return Err(Error::LimitTooLarge { limit });
                }
                // A guest needs a minimum to boot, however little its container may use.
                Ok(total.next_multiple_of(GRANULE).max(default.min(128 * MIB)))
            }
        }
    }

    fn cpus_of_limits(cri: CriResources, resources: Option<&LinuxResources>) -> Option<u8> {
        let own = resources.and_then(|r| r.cpu().as_ref());
        let quota = cri
            .quota
            .or_else(|| own.and_then(|c| c.quota()))
            .filter(|q| *q > 0)?;
        let period = cri
            .period
            .or_else(|| own.and_then(|c| c.period()))
            .filter(|p| *p > 0)
            .unwrap_or(DEFAULT_PERIOD);
        Some(u8::try_from(quota.unsigned_abs().div_ceil(period)).unwrap_or(u8::MAX))
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxCpuBuilder, LinuxMemoryBuilder, LinuxResourcesBuilder};

    use super::*;

    fn plan(
        annotations: &[(&str, &str)],
        limit: Option<i64>,
        quota: Option<i64>,
    ) -> Result<Size, Error> {
        let annotations = annotations
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
        Size::plan(
            &annotations,
            Some(&resources.build().unwrap()),
            &Config::default(),
            4,
        )
    }

    #[test]
    fn without_limits_the_configuration_decides() {
        let size = plan(&[], None, None).unwrap();
        assert_eq!(
            size,
            Size {
                cpus: CpuSpec { boot: 1, max: 1 },
                memory: 256 * MIB
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
