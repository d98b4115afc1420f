//! End-to-end tests of Sepal with the real `ctr` and `nerdctl`, in one of two beds.
//!
//! The tests live in `tests/*.rs`, one file by subject; this crate is what they are written with:
//! a [`Bed`] to run commands in, [`Container`]s that are removed when they go out of scope, and a
//! [`Terminal`]. `tests/run` brings a bed up, runs them and takes it down.
//!
//! Every test is `#[ignore]`d for a plain `cargo test`, which has no bed; `tests/run` includes them.
//!
//! | variable | meaning | default |
//! |---|---|---|
//! | `SEPAL_BED` | `native` or `node` | `native` |
//! | `SEPAL_BED_NAME`, `SEPAL_NODE_NAME` | which bed of that kind | `default`, `node` |
//! | `SEPAL_TEST_RUNTIME` | containerd's name of the runtime | `io.containerd.sepal.v2` |
//!
//! With `SEPAL_TEST_RUNTIME=io.containerd.runc.v2` the same tests run against runc: the control that
//! shows a test asks for what a container runtime does, and not for what Sepal happens to do.

mod bed;
mod cluster;
mod command;
mod container;
#[cfg(test)]
mod features;
mod inotify;
mod loop_device;
mod pods;
mod terminal;

pub use bed::{Bed, Kind, Scratch};
pub use cluster::{Cluster, Namespace, Offered, Pod};
pub use command::{Command, Outcome, Running};
pub use container::{Client, Container};
pub use inotify::watch;
pub use loop_device::LoopDevice;
pub use pods::{CtrPod, PodProcess};
pub use terminal::Terminal;

use std::time::{Duration, Instant};

/// Asks `condition` again and again until it gives a value.
///
/// # Panics
/// After `patience` (stretched for a slow bed) with `what` was waited for.
#[track_caller]
pub fn eventually<T>(
    what: &str,
    patience: Duration,
    mut condition: impl FnMut() -> Option<T>,
) -> T {
    let deadline = Instant::now() + bed::stretched(patience);
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(
            Instant::now() < deadline,
            "waited {patience:?} in vain: {what}"
        );
        // A look costs the emulated processor more, too.
        std::thread::sleep(bed::stretched(Duration::from_millis(50)));
    }
}

/// Seconds as a [`Duration`], for tests that read like prose.
pub const fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}
