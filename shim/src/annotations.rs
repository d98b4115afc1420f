//! Annotations that the shim reads: those of CRI that group containers into pods and tell a pod's
//! resources, and `io.sepal.*`.

use std::collections::HashMap;

/// The place of a container in its pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// No sandbox: the container is a pod of its own.
    Alone,
    /// The sandbox container of a CRI pod; its id is the pod's.
    Sandbox,
    /// A container of the CRI pod whose sandbox has this id.
    Member {
        /// The sandbox's id.
        sandbox: String,
    },
}

/// Annotations as the OCI spec has them.
pub type Annotations = HashMap<String, String>;

/// containerd's and CRI-O's names: type of container, id of the sandbox.
const CRI: [(&str, &str); 2] = [
    (
        "io.kubernetes.cri.container-type",
        "io.kubernetes.cri.sandbox-id",
    ),
    (
        "io.kubernetes.cri-o.ContainerType",
        "io.kubernetes.cri-o.SandboxID",
    ),
];

/// What they call a container in its pod's description: the same for each of its lives.
pub(crate) const NAMES: [&str; 2] = [
    "io.kubernetes.cri.container-name",
    "io.kubernetes.container.name",
];

/// What containerd's CRI plug-in sums up for the whole pod, on the sandbox.
const CRI_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const CRI_CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const CRI_CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

const PREFIX: &str = "io.sepal.";
/// vCPUs of the VM.
pub const VCPUS: &str = "io.sepal.vcpus";
/// RAM of the VM in MiB.
pub const MEMORY: &str = "io.sepal.memory";
/// Most vCPUs that the VM may have while it runs.
pub const MAX_VCPUS: &str = "io.sepal.max_vcpus";
/// Most RAM that it may have, in MiB.
pub const MAX_MEMORY: &str = "io.sepal.max_memory";
/// All that a pod may ask for; what changes the trust in a pod is the node's configuration alone.
const ALLOWED: [&str; 4] = [VCPUS, MEMORY, MAX_VCPUS, MAX_MEMORY];

/// A container's name in its pod's description.
pub fn name(annotations: &Annotations) -> Option<&str> {
    let name = NAMES.iter().find_map(|key| annotations.get(*key));
    name.map(String::as_str)
}

impl Role {
    /// The role that the annotations tell.
    pub fn of(annotations: &Annotations) -> Self {
        for (kind, sandbox) in CRI {
            match annotations.get(kind).map(String::as_str) {
                Some("sandbox") => return Self::Sandbox,
                Some("container") => {
                    if let Some(sandbox) = annotations.get(sandbox) {
                        return Self::Member {
                            sandbox: sandbox.clone(),
                        };
                    }
                }
                _ => {}
            }
        }
        Self::Alone
    }
}

/// The pod's resources as CRI sums them up; none where a value is absent or means "no limit".
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CriResources {
    /// Bytes.
    pub memory: Option<i64>,
    /// Microseconds of CPU time per period.
    pub quota: Option<i64>,
    /// Microseconds.
    pub period: Option<u64>,
}

impl CriResources {
    /// Reads the sandbox's annotations; what is not a number is as good as absent.
    pub fn of(annotations: &Annotations) -> Self {
        let number = |key| annotations.get(key).and_then(|v| v.parse::<i64>().ok());
        Self {
            memory: number(CRI_MEMORY).filter(|v| *v > 0),
            quota: number(CRI_CPU_QUOTA).filter(|v| *v > 0),
            period: number(CRI_CPU_PERIOD)
                .and_then(|v| u64::try_from(v).ok())
                .filter(|v| *v > 0),
        }
    }
}

/// The first annotation `io.sepal.*` that nobody reads: it is refused rather than ignored.
pub fn unknown(annotations: &Annotations) -> Option<&str> {
    annotations
        .keys()
        .map(String::as_str)
        .filter(|key| key.starts_with(PREFIX) && !ALLOWED.contains(key))
        .min()
}

/// What is allowed, for an error message.
pub fn allowed() -> String {
    ALLOWED.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations(pairs: &[(&str, &str)]) -> Annotations {
        pairs
            .iter()
            .map(|(k, v)| (k.to_string(), v.to_string()))
            .collect()
    }

    #[test]
    fn both_cri_implementations_group_their_containers() {
        for (kind, sandbox) in CRI {
            assert_eq!(
                Role::of(&annotations(&[(kind, "sandbox"), (sandbox, "s")])),
                Role::Sandbox
            );
            assert_eq!(
                Role::of(&annotations(&[(kind, "container"), (sandbox, "s")])),
                Role::Member {
                    sandbox: "s".into()
                }
            );
        }
        assert_eq!(Role::of(&annotations(&[("a", "sandbox")])), Role::Alone);
    }

    #[test]
    fn absent_zero_and_negative_resources_are_no_limits() {
        let none = annotations(&[
            (CRI_MEMORY, "0"),
            (CRI_CPU_QUOTA, "-1"),
            (CRI_CPU_PERIOD, "x"),
        ]);
        assert_eq!(CriResources::of(&none), CriResources::default());
    }

    #[test]
    fn an_unknown_annotation_of_ours_is_found() {
        let some = annotations(&[(VCPUS, "2"), ("io.sepal.kernel", "/x"), ("other", "y")]);
        assert_eq!(unknown(&some), Some("io.sepal.kernel"));
    }
}
