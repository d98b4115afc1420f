//! A container's cgroup (v2): made before the container, read for stats, removed with it.
//!
//! libcontainer writes the limits (plan.rs sees to it that they make sense in the guest); everything
//! else about the cgroup is here. One directory per container, right below the root of the
//! hierarchy: the VM as a whole is the pod's limit.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use libcgroups::common::{CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager};
use oci_spec::runtime::LinuxResources;
use sepal_protocol::agent::{
    CpuStats, GuestInfoResponse, HugeTlbStats, IoStats, MemoryStats, PidsStats, Stats,
};

use crate::error::{Context, Error, Result};

/// Where the hierarchy is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";
/// Keeps a container's name from meeting that of a kernel file.
const PREFIX: &str = "sepal-";
/// How long a cgroup may take to empty after its processes were killed, or to freeze. A process in
/// a long system call (a slow file server) needs a while.
const SETTLE: Duration = Duration::from_secs(5);

/// How often memory is reclaimed for a lower limit. The kernel itself tries as often before it kills.
const RECLAIMS: u32 = 16;

/// Lets the children of the root cgroup use every controller that the kernel has.
///
/// # Errors
/// When the hierarchy is not mounted. A controller that refuses is left out: a limit that needs it
/// fails when it is set.
pub fn delegate(root: &Path) -> Result<()> {
    let path = root.join("cgroup.controllers");
    let controllers = fs::read_to_string(&path).context(|| format!("cannot read {path:?}"))?;
    let all: Vec<String> = controllers
        .split_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    let control = root.join("cgroup.subtree_control");
    if fs::write(&control, all.join(" ")).is_err() {
        for one in all {
            if let Err(error) = fs::write(&control, &one) {
                tracing::warn!(%error, controller = one, "cgroup controller is not available");
            }
        }
    }
    Ok(())
}

/// For a process that stays in the agent's own cgroup, the root.
#[must_use]
pub fn none() -> CgroupConfig {
    CgroupConfig {
        cgroup_path: PathBuf::from("/"),
        systemd_cgroup: false,
        container_name: String::new(),
    }
}

/// What the guest as a whole uses. The root cgroup counts CPU time, pages and I/O (cgroup-v2.rst:
/// most of its other files exist only below it); how much memory there is and is in use is what the
/// kernel says of the machine.
#[must_use]
pub fn of_guest(root: &Path, guest: &GuestInfoResponse) -> Stats {
    let whole = Cgroup {
        name: String::new(),
        path: root.into(),
    };
    let mut stats = whole.stats();
    let memory = stats.memory.mut_or_insert_default();
    memory.usage = guest.memory_total.saturating_sub(guest.memory_available);
    memory.limit = guest.memory_total;
    let pids = stats.pids.mut_or_insert_default();
    // pids.current counts below the root only: those of containers, as is wanted.
    pids.current = fs::read_dir(root)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| number(&entry.path().join("pids.current")))
        .sum();
    stats
}

/// One container's cgroup.
#[derive(Debug)]
pub struct Cgroup {
    name: String,
    path: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup of a new container.
    ///
    /// # Errors
    /// When the directory exists or cannot be made.
    pub fn create(root: &Path, container: &str) -> Result<Self> {
        let name = format!("{PREFIX}{container}");
        let path = root.join(&name);
        fs::create_dir(&path).context(|| format!("cannot make the cgroup {path:?}"))?;
        Ok(Self { name, path })
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What libcgroups needs to find it.
    #[must_use]
    pub fn config(&self, container: &str) -> CgroupConfig {
        CgroupConfig {
            cgroup_path: PathBuf::from("/").join(&self.name),
            systemd_cgroup: false,
            container_name: container.to_owned(),
        }
    }

    /// Kills everything in it, also in cgroups that the container has made below.
    pub fn kill(&self) {
        if let Err(error) = fs::write(self.path.join("cgroup.kill"), "1") {
            tracing::warn!(%error, cgroup = self.name, "cannot kill a cgroup");
        }
    }

    /// The processes in it and below, as ids of the guest's initial PID namespace.
    ///
    /// # Errors
    /// When the cgroup cannot be read.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let mut pids = Vec::new();
        for directory in self.directories() {
            match fs::read_to_string(directory.join("cgroup.procs")) {
                // What lives in another PID namespace branch shows as 0.
                Ok(text) => pids.extend(
                    text.lines()
                        .filter_map(|line| line.parse().ok())
                        .filter(|pid: &i32| *pid > 0),
                ),
                Err(_) if directory != self.path => {}
                Err(source) => {
                    let what = format!("cannot list the processes of {:?}", self.name);
                    return Err(Error::Io { what, source });
                }
            }
        }
        Ok(pids)
    }

    /// This directory and all below, parents first.
    fn directories(&self) -> Vec<PathBuf> {
        let mut all = vec![self.path.clone()];
        let mut next = 0;
        while let Some(directory) = all.get(next) {
            let below: Vec<PathBuf> = fs::read_dir(directory)
                .into_iter()
                .flatten()
                .flatten()
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path())
                .collect();
            all.extend(below);
            next += 1;
        }
        all
    }

    /// Kills what is left in it and removes it.
    ///
    /// # Errors
    /// When processes do not go away within five seconds.
    pub async fn remove(&self) -> Result<()> {
        self.kill();
        let mut pause = Duration::from_micros(500);
        let deadline = tokio::time::Instant::now() + SETTLE;
        loop {
            match self.try_remove() {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(source) if tokio::time::Instant::now() > deadline => {
                    let what = format!("cannot remove the cgroup {:?}", self.name);
                    return Err(Error::Io { what, source });
                }
                Err(_) => {}
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    fn try_remove(&self) -> io::Result<()> {
        self.directories().iter().rev().try_for_each(fs::remove_dir)
    }

    /// Stops or continues all its processes, and waits until they stand still.
    ///
    /// # Errors
    /// When they do not within five seconds.
    pub async fn freeze(&self, freeze: bool) -> Result<()> {
        let value = if freeze { "1" } else { "0" };
        fs::write(self.path.join("cgroup.freeze"), value)
            .context(|| format!("cannot freeze or thaw the cgroup {:?}", self.name))?;
        let mut pause = Duration::from_micros(500);
        let deadline = tokio::time::Instant::now() + SETTLE;
        while flat_keyed(&self.path.join("cgroup.events")).get("frozen") != Some(&u64::from(freeze))
        {
            if tokio::time::Instant::now() > deadline {
                if freeze {
                    let _ = fs::write(self.path.join("cgroup.freeze"), "0");
                }
                return Err(Error::Timeout(
                    "the container's processes do not stand still".into(),
                ));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(20));
        }
        Ok(())
    }

    /// How many of its processes the kernel has killed for want of memory.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        flat_keyed(&self.path.join("memory.events"))
            .get("oom_kill")
            .copied()
            .unwrap_or(0)
    }

    /// How many bytes it uses above `limit`.
    #[must_use]
    pub fn above(&self, limit: u64) -> u64 {
        let usage = number(&self.path.join("memory.current")).unwrap_or(0);
        usage.saturating_sub(limit)
    }

    /// Has the kernel take back what it can without killing, until no more than `limit` bytes are used.
    /// Blocks meanwhile, and says nothing of how far it came.
    pub fn reclaim(&self, limit: u64) {
        for _ in 0..RECLAIMS {
            let above = self.above(limit);
            if above == 0 {
                return;
            }
            // EAGAIN: it was less; another round may find more.
            let _ = fs::write(self.path.join("memory.reclaim"), above.to_string());
        }
    }

    /// Sets limits anew.
    ///
    /// # Errors
    /// With the file that refused its value.
    pub fn update(&self, container: &str, resources: &LinuxResources) -> Result<()> {
        let fail = |error: String| Error::Invalid(format!("cannot update the limits: {error}"));
        let cgroup =
            create_cgroup_manager(self.config(container)).map_err(|e| fail(e.to_string()))?;
        let limits = ControllerOpt {
            resources,
            disable_oom_killer: false,
            oom_score_adj: None,
            freezer_state: None,
        };
        cgroup
            .apply(&limits)
            .map_err(|error| fail(error.to_string()))
    }

    /// What the container uses. A controller that is not there reads as zero.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats {
            cpu: Some(self.cpu()).into(),
            memory: Some(self.memory()).into(),
            pids: Some(PidsStats {
                current: number(&self.path.join("pids.current")).unwrap_or(0),
                limit: number(&self.path.join("pids.max")).unwrap_or(0),
                ..Default::default()
            })
            .into(),
            io: io_stats(&fs::read_to_string(self.path.join("io.stat")).unwrap_or_default()),
            hugetlb: self.hugetlb(),
            ..Default::default()
        }
    }

    fn cpu(&self) -> CpuStats {
        let stat = flat_keyed(&self.path.join("cpu.stat"));
        let get = |key: &str| stat.get(key).copied().unwrap_or(0);
        CpuStats {
            usage_usec: get("usage_usec"),
            user_usec: get("user_usec"),
            system_usec: get("system_usec"),
            nr_periods: get("nr_periods"),
            nr_throttled: get("nr_throttled"),
            throttled_usec: get("throttled_usec"),
            ..Default::default()
        }
    }

    fn memory(&self) -> MemoryStats {
        let file = |name: &str| number(&self.path.join(name));
        MemoryStats {
            usage: file("memory.current").unwrap_or(0),
            limit: file("memory.max").unwrap_or(u64::MAX),
            swap_usage: file("memory.swap.current").unwrap_or(0),
            swap_limit: file("memory.swap.max").unwrap_or(u64::MAX),
            max_usage: file("memory.peak").unwrap_or(0),
            stat: flat_keyed(&self.path.join("memory.stat")),
            events: flat_keyed(&self.path.join("memory.events")),
            ..Default::default()
        }
    }

    fn hugetlb(&self) -> Vec<HugeTlbStats> {
        let mut stats: Vec<HugeTlbStats> = fs::read_dir(&self.path)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
                (!size.contains('.')).then(|| size.to_owned())
            })
            .map(|size| {
                let file = |what: &str| self.path.join(format!("hugetlb.{size}.{what}"));
                HugeTlbStats {
                    current: number(&file("current")).unwrap_or(0),
                    max: number(&file("max")).unwrap_or(u64::MAX),
                    failures: flat_keyed(&file("events")).get("max").copied().unwrap_or(0),
                    page_size: size,
                    ..Default::default()
                }
            })
            .collect();
        stats.sort_by(|a, b| a.page_size.cmp(&b.page_size));
        stats
    }
}

/// The single number in a file; `None` for "max" and for a file that is not there.
fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// A "flat keyed" file (cgroup-v2.rst, "Interface Files").
fn flat_keyed(path: &Path) -> HashMap<String, u64> {
    fs::read_to_string(path)
        .unwrap_or_default()
        .lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

/// `io.stat`, which is "nested keyed".
fn io_stats(text: &str) -> Vec<IoStats> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let (major, minor) = words.next()?.split_once(':')?;
            let mut stats = IoStats {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                ..Default::default()
            };
            for word in words {
                let Some((key, value)) = word.split_once('=') else {
                    continue;
                };
                let Ok(value) = value.parse() else { continue };
                match key {
                    "rbytes" => stats.rbytes = value,
                    "wbytes" => stats.wbytes = value,
                    "rios" => stats.rios = value,
                    "wios" => stats.wios = value,
                    _ => {}
                }
            }
            Some(stats)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cgroup(files: &[(&str, &str)]) -> (tempfile::TempDir, Cgroup) {
        let root = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::create(root.path(), "c1").unwrap();
        for (name, text) in files {
            fs::write(cgroup.path().join(name), text).unwrap();
        }
        (root, cgroup)
    }

    #[test]
    fn stats_are_those_of_the_files() {
        let (_root, cgroup) = cgroup(&[
            (
                "cpu.stat",
                "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_throttled 3\n",
            ),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 1024\nfile 3072\n"),
            ("memory.events", "low 0\noom 2\noom_kill 1\n"),
            ("pids.current", "7\n"),
            ("pids.max", "max\n"),
            (
                "io.stat",
                "253:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n\n254:1 \n",
            ),
            ("hugetlb.2MB.current", "2097152\n"),
            ("hugetlb.2MB.rsvd.current", "0\n"),
            ("hugetlb.2MB.max", "4194304\n"),
            ("hugetlb.2MB.events", "max 5\n"),
        ]);
        let stats = cgroup.stats();
        assert_eq!(stats.cpu.usage_usec, 1500);
        assert_eq!(stats.cpu.nr_throttled, 3);
        assert_eq!((stats.memory.usage, stats.memory.limit), (4096, u64::MAX));
        assert_eq!(stats.memory.stat["file"], 3072);
        assert_eq!((stats.pids.current, stats.pids.limit), (7, 0));
        assert_eq!(
            (stats.io[0].major, stats.io[0].wbytes, stats.io[0].rios),
            (253, 20, 1)
        );
        assert_eq!(stats.hugetlb.len(), 1);
        assert_eq!(
            (stats.hugetlb[0].max, stats.hugetlb[0].failures),
            (4_194_304, 5)
        );
        assert_eq!(cgroup.oom_kills(), 1);
    }

    #[test]
    fn what_is_above_a_limit_is_to_be_reclaimed() {
        let (_root, cgroup) = cgroup(&[("memory.current", "4096\n")]);
        assert_eq!((cgroup.above(1000), cgroup.above(4096)), (3096, 0));
        let asked = cgroup.path().join("memory.reclaim");
        cgroup.reclaim(4096);
        assert!(!asked.exists());
        cgroup.reclaim(4000);
        assert_eq!(fs::read_to_string(asked).unwrap(), "96");
    }

    #[test]
    fn files_that_are_missing_or_damaged_read_as_zero() {
        let (_root, cgroup) = cgroup(&[
            ("cpu.stat", "usage_usec\nuser_usec x\n"),
            ("io.stat", "8:x rbytes=1\n"),
        ]);
        let stats = cgroup.stats();
        assert_eq!(stats.cpu.usage_usec, 0);
        assert!(stats.io.is_empty());
        assert_eq!(cgroup.oom_kills(), 0);
    }

    #[test]
    fn the_guest_as_a_whole_is_its_root_and_its_machine() {
        let (root, _cgroup) = cgroup(&[("pids.current", "3\n")]);
        fs::write(root.path().join("cpu.stat"), "usage_usec 7\n").unwrap();
        let guest = GuestInfoResponse {
            memory_total: 100,
            memory_available: 70,
            ..Default::default()
        };
        let stats = of_guest(root.path(), &guest);
        assert_eq!((stats.memory.usage, stats.memory.limit), (30, 100));
        assert_eq!((stats.cpu.usage_usec, stats.pids.current), (7, 3));
    }

    #[test]
    fn processes_of_nested_cgroups_count() {
        let (_root, cgroup) = cgroup(&[("cgroup.procs", "12\n0\n")]);
        fs::create_dir(cgroup.path().join("inner")).unwrap();
        fs::write(cgroup.path().join("inner/cgroup.procs"), "13\n").unwrap();
        assert_eq!(cgroup.processes().unwrap(), [12, 13]);
    }

    #[test]
    fn a_second_container_of_the_same_name_is_refused() {
        let (root, _cgroup) = cgroup(&[]);
        assert!(Cgroup::create(root.path(), "c1").is_err());
    }
}
