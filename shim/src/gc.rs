//! The action `gc`: removes what pods have left whose shims have ended.
//!
//! containerd does so for the tasks it knows, when it starts. This is for what it does not know any more,
//! and for machines on which it does not start.

use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use sepal_protocol::paths::pod;
use sepal_protocol::state::PodState;

use crate::cleanup::Turn;
use crate::start;

/// A shim writes its pod's state at once when it has made the directory: a directory that has had none
/// for so long has no shim.
const NEW: Duration = Duration::from_secs(60);

/// Removes them, and prints a line for each.
///
/// # Errors
/// The directory of all pods cannot be read, or something cannot be removed.
pub async fn run(state_root: &Path) -> anyhow::Result<()> {
    let entries = match std::fs::read_dir(state_root) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        other => other.with_context(|| format!("cannot read {}", state_root.display()))?,
    };
    let mut left = 0;
    for entry in entries.flatten() {
        let directory = entry.path();
        let Some(turn) = Turn::take(&directory).await else {
            continue;
        };
        let name = directory.file_name().unwrap_or_default().display();
        let (why, state) = match judge(&directory) {
            Ok(Some(orphan)) => orphan,
            Ok(None) => continue,
            Err(e) => {
                left += 1;
                eprintln!("sepal: {name}: left as it is, its state cannot be read: {e}");
                continue;
            }
        };
        let bundle = state.as_ref().map(|state| state.bundle.clone());
        let stays = turn.remove(state).await;
        if stays.is_empty() {
            println!("{name}: removed, {why}");
            if let Some(bundle) = bundle {
                start::remove_socket(&bundle);
            }
            continue;
        }
        left += 1;
        for what in stays {
            eprintln!("sepal: {name}: cannot be removed: {what}");
        }
    }
    match left {
        0 => Ok(()),
        _ => bail!("{left} of the directories in {} stay", state_root.display()),
    }
}

/// Why nobody cares for a pod's directory, and the state in it; none: somebody does, or it is another
/// directory.
fn judge(directory: &Path) -> std::io::Result<Option<(String, Option<PodState>)>> {
    match PodState::load(directory) {
        Ok(state) if state.shim.alive() => Ok(None),
        Ok(state) => {
            let why = format!("its shim (process {}) has ended", state.shim.pid);
            Ok(Some((why, Some(state))))
        }
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let about = directory.join(pod::VM).symlink_metadata();
            let age = about.ok().filter(|about| about.is_dir()).and_then(|about| {
                SystemTime::now()
                    .duration_since(about.modified().ok()?)
                    .ok()
            });
            let old = age.is_some_and(|age| age > NEW);
            Ok(old.then(|| ("it has no state".into(), None)))
        }
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use sepal_protocol::state::ProcessRef;

    use super::*;

    fn pod_of(directory: &Path, shim: ProcessRef) {
        std::fs::create_dir_all(directory.join(pod::VM)).unwrap();
        let state = PodState {
            namespace: "n".into(),
            id: "i".into(),
            bundle: directory.join("bundle"),
            created_at: 0,
            shim,
            vmm: None,
            fs: None,
            vcpus: 1,
            memory: 0,
            cgroups: Vec::new(),
            containers: Vec::new(),
        };
        state.save(directory).unwrap();
    }

    #[tokio::test]
    async fn what_a_dead_shim_left_goes_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let of = |name: &str| root.path().join(name);
        let me = ProcessRef::of(std::process::id()).unwrap();
        pod_of(&of("n+alive"), me);
        // The same pid, but another process.
        let start_time = me.start_time + 1;
        pod_of(&of("n+dead"), ProcessRef { start_time, ..me });
        std::fs::create_dir_all(of("n+new").join(pod::VM)).unwrap();
        std::fs::create_dir(of("another")).unwrap();
        run(root.path()).await.unwrap();
        let there: Vec<_> = ["n+alive", "n+dead", "n+new", "another"]
            .map(|n| of(n).exists())
            .into();
        assert_eq!(there, [true, false, true, true]);
        run(&of("nowhere")).await.unwrap();
    }
    #[tokio::test]
    async fn what_cannot_be_removed_or_read_is_kept_and_told() {
        let root = tempfile::tempdir().unwrap();
        let of = |name: &str| root.path().join(name);
        let mut me = ProcessRef::of(std::process::id()).unwrap();
        me.start_time += 1;
        pod_of(&of("n+dead"), me);
        pod_of(&of("n+odd"), me);
        std::fs::write(of("n+odd").join(pod::STATE), "{").unwrap();
        // A cgroup that is no cgroup: nobody is in it, and it does not go.
        let cgroup = of("cgroup");
        std::fs::create_dir_all(&cgroup).unwrap();
        std::fs::write(cgroup.join("file"), "").unwrap();
        let mut state = PodState::load(&of("n+dead")).unwrap();
        state.cgroups.push(cgroup.clone());
        state.save(&of("n+dead")).unwrap();
        let told = run(root.path()).await.unwrap_err().to_string();
        assert!(told.starts_with("2 of the directories"), "{told}");
        assert_eq!(PodState::load(&of("n+dead")).unwrap(), state);
        assert!(of("n+odd").exists());
        std::fs::remove_file(cgroup.join("file")).unwrap();
        std::fs::remove_dir_all(of("n+odd")).unwrap();
        run(root.path()).await.unwrap();
        assert!(!of("n+dead").exists() && !cgroup.exists());
    }
}
