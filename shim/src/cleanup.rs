//! Removes what a pod has left, from its directory alone: after a crash there is nobody to ask.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use sepal_protocol::state::{PodState, ProcessRef};
use tokio::io::Interest;

use crate::cgroup::Cgroup;
use crate::rootfs::{self, Share};
use crate::sys;

/// Longest wait for a killed process to be gone.
const KILL: Duration = Duration::from_secs(5);

/// Kills the pod's processes, unmounts its share, removes its cgroups and its directory.
///
/// Idempotent, and content with whatever is there.
pub async fn pod(directory: &Path) {
    let state = PodState::load(directory).ok();
    if let Some(state) = &state {
        // The shim first: the others die with it, and it must not start new ones.
        for process in [Some(state.shim), state.vmm, state.fs]
            .into_iter()
            .flatten()
        {
            if process.pid != std::process::id() {
                kill(process).await;
            }
        }
        // What was spawned a moment before the crash is in no file, but in the pod's cgroup.
        for cgroup in &state.cgroups {
            for process in ours_in(cgroup) {
                kill(process).await;
            }
        }
    }
    let directory = directory.to_path_buf();
    let cgroups = state.map(|s| s.cgroups).unwrap_or_default();
    let work = move || {
        Share::of(&directory).remove_all();
        Cgroup {
            directories: cgroups,
        }
        .remove();
        remove_directory(&directory);
    };
    if let Err(e) = tokio::task::spawn_blocking(work).await {
        tracing::error!("clean-up has panicked: {e}");
    }
}

/// Removes a pod's directory with the files in it, unless something is still mounted below.
pub fn remove_directory(directory: &Path) {
    let share = Share::of(directory);
    if share.path().exists() {
        rootfs::unmount_below(share.path());
        tracing::error!(
            path = %share.path().display(),
            "not empty after unmounting: left as it is, look what is in it"
        );
        return;
    }
    match std::fs::remove_dir_all(directory) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => tracing::warn!(path = %directory.display(), "cannot remove it: {e}"),
    }
}

async fn kill(process: ProcessRef) {
    let Ok(pidfd) = sys::pidfd_open(process.pid) else {
        return;
    };
    // Checked with the descriptor open: now the pid cannot become another process.
    if !process.alive() || sys::pidfd_kill(&pidfd, Signal::SIGKILL).is_err() {
        return;
    }
    let Ok(copy) = pidfd.as_fd().try_clone_to_owned() else {
        return;
    };
    let Ok(watched) = sys::watch(copy, Interest::READABLE) else {
        return;
    };
    if tokio::time::timeout(KILL, watched.readable())
        .await
        .is_err()
    {
        tracing::error!(pid = process.pid, "does not die");
    }
}

/// Our programs among the processes of a cgroup: its path was given by others, who may use it too.
fn ours_in(cgroup: &Path) -> Vec<ProcessRef> {
    let text = std::fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let ours = |pid: &u32| {
        std::fs::read_to_string(format!("/proc/{pid}/comm"))
            .is_ok_and(|name| matches!(name.trim_end(), "sepal-vmm" | "sepal-fs"))
    };
    text.lines()
        .filter_map(|l| l.parse().ok())
        .filter(ours)
        .filter_map(ProcessRef::of)
        .collect()
}
