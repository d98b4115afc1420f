//! What the runtime can do, as the OCI runtime-spec has it tell ("features" and "features-linux").
//!
//! Orchestrators decide by it what they ask for: Kubernetes refuses a recursively read-only volume
//! (`rro`) or a user namespace (`user` and `idmap`) for a runtime that does not name it. Names that
//! are left out are not supported; fields that are left out are not known.

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use serde_json::{Value, json};

/// How containerd knows the type in a message (typeurl).
const TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Options of mounts that are no file system's own. Without `shared`: no mount of a guest reaches the
/// host.
const MOUNT_OPTIONS: &[&str] = &[
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "idmap",
    "mand",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "remount",
    "rexec",
    "ridmap",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "rw",
    "slave",
    "strictatime",
    "suid",
    "sync",
];

/// The features as a message carries them: JSON below containerd's name for their type.
pub fn any() -> Any {
    Any {
        type_url: TYPE_URL.into(),
        value: features().to_string().into_bytes(),
        ..Default::default()
    }
}

fn features() -> Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.1",
        "hooks": [
            "prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"
        ],
        "mountOptions": MOUNT_OPTIONS,
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            // The pod's own on the host. systemd's names are understood, systemd is not asked.
            "cgroup": {
                "v1": true, "v2": true, "systemd": false, "systemdUser": false, "rdma": false
            },
            // Not SCMP_ACT_NOTIFY: who would listen is on the host.
            "seccomp": {
                "enabled": true,
                "actions": [
                    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS",
                    "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP"
                ],
                "operators": [
                    "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT",
                    "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE"
                ],
                "archs": ["SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"]
            },
            // The guest's kernel enforces the host's policy.
            "apparmor": { "enabled": true },
            // The host's SELinux knows nothing of a guest's processes.
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": true } }
        }
    })
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::Features;

    use super::*;

    #[test]
    fn what_is_told_is_what_the_specification_has() {
        let message = any();
        let features: Features = serde_json::from_slice(&message.value).unwrap();
        let mounts = features.mount_options().as_ref().unwrap();
        assert!(mounts.is_sorted() && mounts.iter().any(|o| o == "rro"));
        let linux = features.linux().as_ref().unwrap();
        let extensions = linux.mount_extensions().as_ref().unwrap();
        let idmap = extensions.idmap().as_ref().unwrap();
        assert_eq!(*idmap.enabled(), Some(true), "user namespaces of pods");
        // Each name was understood.
        let again = serde_json::to_value(&features).unwrap();
        assert_eq!(again["hooks"], super::features()["hooks"]);
        for field in ["namespaces", "cgroup"] {
            assert_eq!(again["linux"][field], super::features()["linux"][field]);
        }
    }
}
