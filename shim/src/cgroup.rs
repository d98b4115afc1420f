//! The pod's cgroup on the host: it holds the shim, the VMM and the file server.
//!
//! One directory in the unified hierarchy (v2), or the same path in each hierarchy (v1, hybrid).
//! Limits of containers are the guest's business; what the orchestrator sets on the parents applies
//! to the pod as a whole.

use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use crate::placement::Placement;

/// Why the pod has no cgroup.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's text is its documentation")]
pub enum Error {
    #[error("cgroup path {path:?} of the OCI spec: {reason}")]
    Path { path: String, reason: &'static str },
    #[error("cgroup {}: cannot {what}: {source}", .path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
}

/// The cgroup of a pod.
#[derive(Debug, Clone, Default)]
pub struct Cgroup {
    /// The pod's own directories.
    pub directories: Vec<PathBuf>,
}

/// A mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// Where it is mounted.
    pub mount: PathBuf,
    /// The unified one.
    pub v2: bool,
}

/// The directory below a hierarchy's root that `linux.cgroupsPath` means.
///
/// `slice:prefix:name` is systemd's form: the slice `a-b.slice` lies in `a.slice`, and the pod is
/// the scope `prefix-name.scope` in it. Without systemd nobody makes such slices, nobody removes
/// them, and the whole is one directory's name, as runc has it. An empty path is a place of our own.
///
/// # Errors
/// A path that leaves its root, or a slice's name that is none.
pub fn directory(cgroups_path: Option<&Path>, pod: &str, systemd: bool) -> Result<PathBuf, Error> {
    let path = cgroups_path.map(Path::to_string_lossy).unwrap_or_default();
    let wrong = |reason| Error::Path {
        path: path.to_string(),
        reason,
    };
    if path.is_empty() {
        return Ok(Path::new("sepal").join(pod));
    }
    let parts: Vec<_> = path.split(':').collect();
    if let [slice, prefix, name] = parts[..]
        && systemd
    {
        let mut directory = expand_slice(slice)
            .ok_or_else(|| wrong("must be slice:prefix:name with a slice like a-b.slice"))?;
        if name.is_empty() || name.contains('/') || prefix.contains('/') {
            return Err(wrong(
                "must be slice:prefix:name with a plain prefix and name",
            ));
        }
        let unit = if name.ends_with(".slice") {
            name.to_string()
        } else if prefix.is_empty() {
            format!("{name}.scope")
        } else {
            format!("{prefix}-{name}.scope")
        };
        directory.push(unit);
        return Ok(directory);
    }
    let relative = path.trim_start_matches('/');
    let plain = Path::new(relative)
        .components()
        .all(|c| matches!(c, Component::Normal(_)));
    if relative.is_empty() || !plain {
        return Err(wrong("must name a directory below the cgroup root"));
    }
    Ok(relative.into())
}

/// `a-b-c.slice` is `a.slice/a-b.slice/a-b-c.slice`, systemd.slice(5).
fn expand_slice(slice: &str) -> Option<PathBuf> {
    if slice.is_empty() {
        return Some("system.slice".into());
    }
    if slice == "-.slice" {
        return Some(PathBuf::new());
    }
    let name = slice.strip_suffix(".slice")?;
    if name.split('-').any(str::is_empty) || name.contains('/') {
        return None;
    }
    let ends = name
        .match_indices('-')
        .map(|(at, _)| at)
        .chain([name.len()]);
    Some(ends.map(|end| format!("{}.slice", &name[..end])).collect())
}

/// The hierarchies of a /proc/PID/mountinfo. Where the unified one is alone, it is the only one.
pub fn hierarchies(mountinfo: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let mut fields = left.split(' ');
        let (Some(root), Some(mount)) = (fields.nth(3), fields.next()) else {
            continue;
        };
        let v2 = match right.split(' ').next() {
            Some("cgroup") => false,
            Some("cgroup2") => true,
            _ => continue,
        };
        // A bind mount of a part, or a second mount of the same controllers, is not the hierarchy.
        let mount = PathBuf::from(mount);
        let named = right.contains("name=") || root != "/";
        if !named && !found.iter().any(|h| h.mount == mount) {
            found.push(Hierarchy { mount, v2 });
        }
    }
    if found.iter().any(|h| !h.v2) {
        found.retain(|h| !h.v2);
    }
    found
}

impl Cgroup {
    /// What the pod's cgroup will be; nothing is made yet.
    ///
    /// # Errors
    /// A path that is none.
    pub fn plan(cgroups_path: Option<&Path>, pod: &str) -> Result<Self, Error> {
        // sd_booted(3).
        let systemd = Path::new("/run/systemd/system").is_dir();
        let relative = directory(cgroups_path, pod, systemd)?;
        let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let directories = hierarchies(&mountinfo)
            .into_iter()
            .map(|h| h.mount.join(&relative))
            .collect();
        Ok(Self { directories })
    }

    /// Makes the directories and moves the processes into them.
    ///
    /// # Errors
    /// A directory cannot be made, or does not take a process.
    pub fn hold(&self, pids: &[u32]) -> Result<(), Error> {
        for directory in &self.directories {
            let io = |what| {
                move |source| Error::Io {
                    what,
                    path: directory.clone(),
                    source,
                }
            };
            std::fs::create_dir_all(directory).map_err(io("make it"))?;
            inherit_cpuset(directory);
            enable(directory, &["cpu", "memory", "pids", "io", "hugetlb"]);
            for pid in pids {
                match std::fs::write(directory.join("cgroup.procs"), pid.to_string()) {
                    Ok(()) => {}
                    // The process has ended meanwhile; whoever waits for it says so.
                    Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
                    Err(e) => return Err(io("move a process into it")(e)),
                }
            }
        }
        Ok(())
    }

    /// Lets the pod have no more of the host's huge pages of 2 MiB, in bytes, where the kernel counts them. A
    /// guest could take all that there are: they come as they are touched, and a VM has addresses for them.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn limit_huge_pages(&self, bytes: u64) -> Result<(), Error> {
        for directory in &self.directories {
            // Of version 2 and of version 1.
            let files = ["hugetlb.2MB.max", "hugetlb.2MB.limit_in_bytes"];
            let paths = files.map(|file| directory.join(file));
            if let Some(path) = paths.into_iter().find(|path| path.exists()) {
                let what = "limit the pod's huge pages";
                std::fs::write(&path, bytes.to_string()).map_err(|source| Error::Io {
                    what,
                    path,
                    source,
                })?;
            }
        }
        Ok(())
    }

    /// Confines the pod to CPUs and memory nodes of the node's, or lifts that.
    ///
    /// # Errors
    /// The kernel refuses: it has none of them, or those above have others.
    pub fn place(&self, placement: &Placement) -> Result<(), Error> {
        for directory in &self.directories {
            let v2 = directory.join("cgroup.controllers").exists();
            if v2 {
                enable(directory, &["cpuset"]);
            } else if !directory.join("cpuset.cpus").exists() {
                continue;
            }
            for (file, set) in [
                ("cpuset.cpus", &placement.cpus),
                ("cpuset.mems", &placement.mems),
            ] {
                let path = directory.join(file);
                // Without a set of its own it has that of those above; v1 wants it written down.
                let value = match set {
                    Some(set) => set.to_string(),
                    None if v2 => "\n".into(),
                    None => directory
                        .parent()
                        .and_then(|parent| std::fs::read_to_string(parent.join(file)).ok())
                        .unwrap_or_default(),
                };
                match std::fs::write(&path, value) {
                    Err(source) if set.is_some() => {
                        let what = "place the pod on its CPUs or memory nodes";
                        return Err(Error::Io { what, path, source });
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Moves this process out again and removes the directories. What is not there is no error. Answers with
    /// those that stay though nobody uses them.
    pub fn remove(&self) -> Vec<PathBuf> {
        let me = std::process::id();
        let mut stays = Vec::new();
        for directory in &self.directories {
            if !directory.exists() {
                continue;
            }
            // Only the root takes processes whatever controllers its children have.
            if processes(directory).contains(&me)
                && let Some(root) = hierarchy_root(directory)
            {
                let _ = std::fs::write(root.join("cgroup.procs"), me.to_string());
            }
            if !remove_directory(directory) && !is_in_use(directory) {
                stays.push(directory.clone());
            }
        }
        stays
    }
}

/// The processes in a cgroup; none in one that is not there.
pub(crate) fn processes(directory: &Path) -> Vec<u32> {
    let text = std::fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

/// Whether no cgroup is below it.
pub(crate) fn is_leaf(directory: &Path) -> bool {
    let mut entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    !entries.any(|entry| entry.path().is_dir())
}

/// Whether a process, or a cgroup of somebody's, is in it.
fn is_in_use(directory: &Path) -> bool {
    !is_leaf(directory) || !processes(directory).is_empty()
}

fn hierarchy_root(directory: &Path) -> Option<PathBuf> {
    let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    hierarchies(&mountinfo)
        .into_iter()
        .map(|h| h.mount)
        .find(|mount| directory.starts_with(mount))
}

/// The kernel removes a cgroup only once its last process has been reaped: shortly after its end.
/// Answers whether it is gone.
fn remove_directory(directory: &Path) -> bool {
    let mut gone = false;
    for _ in 0..50 {
        match std::fs::remove_dir(directory) {
            Ok(()) => gone = true,
            Err(e) if e.kind() == ErrorKind::NotFound => return true,
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                std::thread::sleep(std::time::Duration::from_millis(5));
                continue;
            }
            Err(e) => tracing::warn!(cgroup = %directory.display(), "cannot remove it: {e}"),
        }
        break;
    }
    // Our own parent goes with its last pod; one that others made is not empty or not ours.
    if let Some(parent) = directory.parent()
        && parent.file_name().is_some_and(|name| name == "sepal")
    {
        let _ = std::fs::remove_dir(parent);
    }
    gone
}

/// A v2 cgroup has the controllers that its parents hand down. What cannot be had is left out: the
/// pod is held all the same, only less of it is counted.
fn enable(directory: &Path, controllers: &[&str]) {
    let Some(root) = hierarchy_root(directory) else {
        return;
    };
    if !root.join("cgroup.controllers").exists() {
        return;
    }
    let parents: Vec<_> = directory
        .ancestors()
        .skip(1)
        .take_while(|p| p.starts_with(&root))
        .collect();
    for parent in parents.into_iter().rev() {
        for controller in controllers {
            let _ = std::fs::write(
                parent.join("cgroup.subtree_control"),
                format!("+{controller}"),
            );
        }
    }
}

/// A new v1 cpuset is empty and takes no process before it has CPUs and memory nodes, cpuset(7).
fn inherit_cpuset(directory: &Path) {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let path = directory.join(file);
        let empty = std::fs::read_to_string(&path).is_ok_and(|text| text.trim().is_empty());
        if !empty || directory.join("cgroup.controllers").exists() {
            continue;
        }
        let Some(parent) = directory.parent() else {
            continue;
        };
        if std::fs::read_to_string(parent.join(file)).is_ok_and(|text| text.trim().is_empty()) {
            inherit_cpuset(parent);
        }
        if let Ok(value) = std::fs::read_to_string(parent.join(file)) {
            let _ = std::fs::write(&path, value.trim());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Result<PathBuf, Error> {
        directory(Some(Path::new(text)), "p", true)
    }

    #[test]
    fn cgroupfs_and_systemd_paths_lead_to_directories() {
        assert_eq!(path("/default/t1").unwrap(), Path::new("default/t1"));
        assert_eq!(path("").unwrap(), Path::new("sepal/p"));
        assert_eq!(
            path("kubepods-burstable-podab_c.slice:cri-containerd:xy").unwrap(),
            Path::new(
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podab_c.slice/\
                 cri-containerd-xy.scope"
            )
        );
        assert_eq!(
            path(":nerdctl:x").unwrap(),
            Path::new("system.slice/nerdctl-x.scope")
        );
        assert_eq!(path("-.slice:a:b").unwrap(), Path::new("a-b.scope"));
        let without_systemd = directory(Some(Path::new("a-b.slice:c:d")), "p", false);
        assert_eq!(without_systemd.unwrap(), Path::new("a-b.slice:c:d"));
    }

    #[test]
    fn huge_pages_are_limited_where_they_are_counted() {
        let [v2, v1, none] = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let files = [
            v2.path().join("hugetlb.2MB.max"),
            v1.path().join("hugetlb.2MB.limit_in_bytes"),
        ];
        for file in &files {
            std::fs::write(file, "max").unwrap();
        }
        let cgroup = Cgroup {
            directories: [&v2, &v1, &none].map(|dir| dir.path().into()).into(),
        };
        cgroup.limit_huge_pages(4 << 20).unwrap();
        for file in &files {
            assert_eq!(std::fs::read_to_string(file).unwrap(), "4194304");
        }
        assert_eq!(none.path().read_dir().unwrap().count(), 0);
    }

    #[test]
    fn paths_that_leave_their_root_are_refused() {
        for bad in [
            "/",
            "../x",
            "/a/../../b",
            "a--b.slice:x:y",
            "a:b:c",
            "a.slice:x:",
            "a.slice:x:../y",
        ] {
            assert!(path(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn hierarchies_are_found_in_both_versions() {
        let v2 = "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        let unified = Hierarchy {
            mount: "/sys/fs/cgroup".into(),
            v2: true,
        };
        assert_eq!(hierarchies(v2), [unified]);
        let v1 = "30 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                  31 30 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                  32 30 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
                  33 30 0:29 /sub /mnt/pids rw - cgroup cgroup rw,pids\n\
                  34 30 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let memory = Hierarchy {
            mount: "/sys/fs/cgroup/memory".into(),
            v2: false,
        };
        assert_eq!(hierarchies(v1), [memory]);
    }

    #[test]
    fn a_process_is_held_and_the_directories_go() {
        if !crate::sys::is_root() {
            return;
        }
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let name = format!("/sepal/unit-test-{}", std::process::id());
        let cgroup = Cgroup::plan(Some(Path::new(&name)), "p").unwrap();
        cgroup.hold(&[child.id()]).unwrap();
        let mine = std::fs::read_to_string(format!("/proc/{}/cgroup", child.id())).unwrap();
        let _ = child.kill();
        let _ = child.wait();
        assert_eq!(cgroup.remove(), Vec::<PathBuf>::new());
        assert!(mine.contains(&name), "{mine}");
        assert!(cgroup.directories.iter().all(|d| !d.exists()));
    }
}
