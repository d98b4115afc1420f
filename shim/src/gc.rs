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

use crate::{cleanup, start};

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
        let Some(why) = orphan(&directory) else {
            continue;
        };
        let bundle = PodState::load(&directory).map(|state| state.bundle);
        cleanup::pod(&directory).await;
        if let Ok(bundle) = bundle {
            start::remove_socket(&bundle);
        }
        let name = directory.file_name().unwrap_or_default().display();
        if directory.exists() {
            left += 1;
            eprintln!("sepal: {name}: cannot be removed, see what is mounted in it");
        } else {
            println!("{name}: removed, {why}");
        }
    }
    match left {
        0 => Ok(()),
        _ => bail!("{left} of the directories in {} stay", state_root.display()),
    }
}

/// Why nobody cares for a pod's directory; none: somebody does, or it is another directory.
fn orphan(directory: &Path) -> Option<String> {
    match PodState::load(directory) {
        Ok(state) if state.shim.alive() => None,
        Ok(state) => Some(format!("its shim (process {}) has ended", state.shim.pid)),
        Err(_) => {
            let metadata = directory.join(pod::VM).symlink_metadata().ok()?;
            let age = SystemTime::now().duration_since(metadata.modified().ok()?);
            (metadata.is_dir() && age.is_ok_and(|age| age > NEW))
                .then(|| "it has no readable state".into())
        }
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
}
