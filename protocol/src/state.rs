//! What a pod leaves on the host for whoever cleans up after a crash, and for `sepal list`.
//!
//! The shim writes `<pod>/state.json` before a thing exists and again when it knows more, always by
//! rename, so that a reader never sees half a file.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::paths;

/// Longest state file that is read, in bytes.
const MAX_FILE: u64 = 1024 * 1024;

/// One pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodState {
    /// containerd's namespace.
    pub namespace: String,
    /// The sandbox's or the single container's id.
    pub id: String,
    /// containerd's bundle of the pod.
    pub bundle: PathBuf,
    /// When the pod was begun, in seconds since the Unix epoch.
    pub created_at: u64,
    /// The shim.
    pub shim: ProcessRef,
    /// The VMM, once it has been spawned.
    #[serde(default)]
    pub vmm: Option<ProcessRef>,
    /// The file server, once it has been spawned.
    #[serde(default)]
    pub fs: Option<ProcessRef>,
    /// vCPUs of the VM.
    #[serde(default)]
    pub vcpus: u8,
    /// RAM of the VM in bytes.
    #[serde(default)]
    pub memory: u64,
    /// The pod's own cgroup directories, to be removed with it: one (v2) or one per hierarchy (v1).
    #[serde(default)]
    pub cgroups: Vec<PathBuf>,
    /// Ids of the containers in the pod.
    #[serde(default)]
    pub containers: Vec<String>,
}

/// A process that is not mistaken for a later one with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRef {
    /// In the host's PID namespace.
    pub pid: u32,
    /// Field 22 of /proc/PID/stat, proc_pid_stat(5), in clock ticks since boot.
    pub start_time: u64,
}

impl ProcessRef {
    /// The process that has this pid now; none: there is no such process, or it is a zombie.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold anything; what follows the last one is numbers.
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        if matches!(fields.next()?, "Z" | "X") {
            return None;
        }
        let start_time = fields.nth(18)?.parse().ok()?;
        Some(Self { pid, start_time })
    }

    /// Whether this very process still lives.
    pub fn alive(&self) -> bool {
        Self::of(self.pid) == Some(*self)
    }
}

impl PodState {
    /// Name of a pod's directory. Ids are unique only within one of containerd's namespaces, and
    /// `+` is in neither's alphabet. The length is bounded because Unix sockets are made in it.
    pub fn pod_id(namespace: &str, id: &str) -> String {
        let name = format!("{namespace}+{id}");
        if name.len() <= 76 {
            return name;
        }
        // FNV-1a, 64 bits, over the whole name: what is cut off still tells two names apart.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        let kept: String = name.chars().filter(char::is_ascii).take(59).collect();
        format!("{kept}~{hash:016x}")
    }

    /// Reads the state in a pod's directory.
    ///
    /// # Errors
    /// The file is not there, too long, or not such a file.
    pub fn load(pod: &Path) -> std::io::Result<Self> {
        let path = pod.join(paths::pod::STATE);
        if std::fs::metadata(&path)?.len() > MAX_FILE {
            return Err(std::io::Error::other("state file is too long"));
        }
        Ok(serde_json::from_slice(&std::fs::read(path)?)?)
    }

    /// Writes the state into a pod's directory, by rename.
    ///
    /// # Errors
    /// What the file system says.
    pub fn save(&self, pod: &Path) -> std::io::Result<()> {
        let path = pod.join(paths::pod::STATE);
        let new = path.with_extension("json.new");
        std::fs::write(&new, serde_json::to_vec_pretty(self)?)?;
        std::fs::rename(new, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_lives_and_an_older_one_with_its_pid_does_not() {
        let me = ProcessRef::of(std::process::id()).unwrap();
        assert!(me.alive());
        assert!(
            !ProcessRef {
                start_time: me.start_time - 1,
                ..me
            }
            .alive()
        );
    }

    #[test]
    fn long_names_stay_distinct_and_short() {
        let a = PodState::pod_id("k8s.io", &"a".repeat(76));
        let b = PodState::pod_id("k8s.io", &format!("{}b", "a".repeat(75)));
        assert_ne!(a, b);
        assert!(a.len() <= 76 && b.len() <= 76);
        assert_eq!(PodState::pod_id("default", "t1"), "default+t1");
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let state = PodState {
            namespace: "default".into(),
            id: "t1".into(),
            bundle: "/b".into(),
            created_at: 7,
            shim: ProcessRef {
                pid: 1,
                start_time: 2,
            },
            vmm: None,
            fs: None,
            vcpus: 1,
            memory: 1 << 28,
            cgroups: vec!["/sys/fs/cgroup/sepal/t1".into()],
            containers: vec!["t1".into()],
        };
        state.save(dir.path()).unwrap();
        assert_eq!(PodState::load(dir.path()).unwrap(), state);
    }
}
