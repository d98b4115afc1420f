//! Removes what a pod has left, from its directory alone: after a crash there is nobody to ask.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use sepal_protocol::state::{PodState, ProcessRef};
use tokio::io::Interest;

use crate::cgroup::{self, Cgroup};
use crate::rootfs::{self, Share};
use crate::sys;

/// Longest wait for a killed process to be gone.
const KILL: Duration = Duration::from_secs(5);

/// How long descriptors may be wanting for the removal of what has been made, and how often it is tried.
const SHORTAGE: Duration = Duration::from_secs(10);
const ATTEMPTS: usize = 5;
const PAUSE: Duration = Duration::from_secs(1);
/// How often a cgroup is looked through for processes of ours, which make no others.
const PASSES: usize = 5;

/// The right to judge what is in a pod's directory, and to remove it: of `delete`, `gc` and a new pod of the
/// same name one comes after the other. It is a lock on the directory itself, and goes with it.
pub struct Turn {
    directory: PathBuf,
    _lock: Flock<File>,
}

impl Turn {
    /// Waits for it. None: there is no such directory, or no longer.
    pub async fn take(directory: &Path) -> Option<Self> {
        const AGAIN: Duration = Duration::from_millis(20);
        let mut options = File::options();
        options.read(true);
        options.custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW);
        let end = Instant::now() + SHORTAGE;
        loop {
            let mut file = match options.open(directory) {
                Ok(file) => file,
                // There may be one again in a moment.
                Err(e) if is_want(&e) && Instant::now() < end => {
                    tokio::time::sleep(AGAIN).await;
                    continue;
                }
                Err(_) => return None,
            };
            let lock = loop {
                match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                    Ok(lock) => break lock,
                    Err((back, Errno::EWOULDBLOCK | Errno::EINTR)) => file = back,
                    Err((_, e)) => {
                        tracing::error!(path = %directory.display(), "cannot lock it: {e}");
                        return None;
                    }
                }
                tokio::time::sleep(AGAIN).await;
            };
            // Who had it before may have removed the directory, and another have made a new one.
            if is_at(&lock, directory) {
                return Some(Self {
                    directory: directory.into(),
                    _lock: lock,
                });
            }
        }
    }

    /// Kills the pod's processes, unmounts its share, removes its cgroups and its directory. Answers with what
    /// stays, in words; then the directory stays, too, with the state in it for whoever tries again.
    ///
    /// Idempotent, and content with whatever is there.
    pub async fn remove(self, state: Option<PodState>) -> Vec<String> {
        let mut stays = Vec::new();
        if let Some(state) = &state {
            // The shim first: the others die with it, and it must not start new ones.
            let known = [Some(state.shim), state.vmm, state.fs];
            for process in known.into_iter().flatten() {
                if process.pid != std::process::id() {
                    stays.extend(kill(process).await);
                }
            }
            for cgroup in &state.cgroups {
                stays.extend(empty(cgroup, &self.directory).await);
            }
        }
        let directory = self.directory.clone();
        let directories = state.map(|s| s.cgroups).unwrap_or_default();
        let work = move || {
            Share::of(&directory).remove_all();
            let cgroups = Cgroup { directories }.remove();
            stays.extend(
                cgroups
                    .iter()
                    .map(|path| format!("{} stays", path.display())),
            );
            if stays.is_empty() {
                stays.extend(remove_directory(&directory));
            }
            stays
        };
        let done = tokio::task::spawn_blocking(work).await;
        done.unwrap_or_else(|e| vec![format!("clean-up has panicked: {e}")])
    }
}

/// Whether it is descriptors or memory that is wanting.
fn is_want(error: &std::io::Error) -> bool {
    let code = error.raw_os_error();
    [libc::EMFILE, libc::ENFILE, libc::ENOMEM]
        .map(Some)
        .contains(&code)
}

fn is_at(file: &File, path: &Path) -> bool {
    let id = |about: std::fs::Metadata| (about.dev(), about.ino());
    let there = std::fs::symlink_metadata(path).map(id).ok();
    there.is_some() && there == file.metadata().map(id).ok()
}

/// [`Turn::remove`] with the state that is in the directory. What stays is in the log.
pub async fn pod(directory: &Path) {
    for _ in 0..ATTEMPTS {
        let Some(turn) = Turn::take(directory).await else {
            return;
        };
        let state = PodState::load(directory).ok();
        let stays = turn.remove(state).await;
        if stays.is_empty() {
            return;
        }
        for what in stays {
            tracing::error!(path = %directory.display(), "cannot be removed: {what}");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Removes a pod's directory with the files in it, unless something is still mounted below. Answers with why
/// it stays.
pub fn remove_directory(directory: &Path) -> Option<String> {
    let share = Share::of(directory);
    if share.path().exists() {
        rootfs::unmount_below(share.path());
        let path = share.path().display();
        return Some(format!(
            "{path} is not empty after unmounting: look what is in it"
        ));
    }
    match std::fs::remove_dir_all(directory) {
        Ok(()) => None,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
        Err(e) => Some(format!("{}: {e}", directory.display())),
    }
}

/// Ends a process. Answers with what is wrong if it does not end.
async fn kill(process: ProcessRef) -> Option<String> {
    let pidfd = sys::pidfd_open(process.pid).ok()?;
    // Checked with the descriptor open: now the pid cannot become another process.
    if !process.alive() || sys::pidfd_kill(&pidfd, Signal::SIGKILL).is_err() {
        return None;
    }
    let copy = pidfd.as_fd().try_clone_to_owned().ok()?;
    let watched = sys::watch(copy, Interest::READABLE).ok()?;
    let gone = tokio::time::timeout(KILL, watched.readable()).await;
    gone.err()
        .map(|_| format!("process {} does not die", process.pid))
}

/// Ends the pod's processes in a cgroup, and answers with what does not end. The cgroup's path was given by
/// others, who may use it too, and another pod of ours may have the same; where nobody else is, nor below, it is
/// killed as a whole.
async fn empty(cgroup: &Path, directory: &Path) -> Vec<String> {
    let mut stays = Vec::new();
    for _ in 0..PASSES {
        stays.clear();
        let all = cgroup::processes(cgroup);
        let mut ours = all.clone();
        ours.retain(|pid| is_of(*pid, directory));
        if ours.is_empty() {
            break;
        }
        if ours == all && cgroup::is_leaf(cgroup) {
            // Version 1 has no such file, and version 2 not before Linux 5.14.
            let _ = std::fs::write(cgroup.join("cgroup.kill"), "1");
        }
        for process in ours.into_iter().filter_map(ProcessRef::of) {
            stays.extend(kill(process).await);
        }
    }
    stays
}

/// Whether a process is a VMM or a file server of this directory's pod, by its name and what it was started with.
fn is_of(pid: u32, directory: &Path) -> bool {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    if !matches!(name.trim_end(), "sepal-vmm" | "sepal-fs") {
        return false;
    }
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let share = Share::of(directory);
    let (name, share) = (directory.file_name(), share.path());
    let mut words = line.split(|byte| *byte == 0).map(OsStr::from_bytes);
    let mut before = OsStr::new("");
    words.any(|word| {
        let of_vmm = before == "--pod" && Some(word) == name;
        let of_server = before == "--share" && word == share;
        before = word;
        of_vmm || of_server
    })
}

#[cfg(test)]
#[path = "cleanup_test.rs"]
mod tests;
