//! Points in a pod's life at which a test can hold the shim, to break something just then.
//!
//! They are there with the feature `faults` alone, which only `tests/faults/run` builds; otherwise a point
//! is nothing. A test that has made the directory [`ROOT`]`/<container id>` finds the name of each point
//! that was passed there, a line each, in `passed`. The point whose name and number (how many times it had
//! been passed before) are in `hold` writes this process's id to `held` and waits until that file is gone.

/// Where tests say what they want, a directory for each id that containerd runs the program with.
#[cfg(feature = "faults")]
pub const ROOT: &str = "/run/sepal-faults";

#[cfg(feature = "faults")]
mod points {
    use std::collections::HashMap;
    use std::fs::{self, File};
    use std::io::Write;
    use std::path::{Path, PathBuf};
    use std::sync::{Mutex, OnceLock};
    use std::time::Duration;

    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    static PASSED: Mutex<Option<HashMap<&'static str, u32>>> = Mutex::new(None);

    /// This process is containerd's of this container.
    pub fn of(id: &str) {
        let _ = DIRECTORY.set(Path::new(super::ROOT).join(id));
    }

    /// The pod's life has come to this point.
    pub fn at(point: &'static str) {
        let Some(directory) = DIRECTORY.get().filter(|directory| directory.exists()) else {
            return;
        };
        let number = {
            let mut passed = PASSED.lock().unwrap_or_else(|poison| poison.into_inner());
            let count = passed.get_or_insert_default().entry(point).or_default();
            *count += 1;
            *count - 1
        };
        let this = format!("{point} {number}");
        let mut list = File::options();
        let list = list
            .append(true)
            .create(true)
            .open(directory.join("passed"));
        // What cannot be written here is missed there.
        let _ = list.and_then(|mut list| writeln!(list, "{this}"));
        let hold = directory.join("hold");
        if !fs::read_to_string(&hold).is_ok_and(|wanted| wanted.trim() == this) {
            return;
        }
        let (new, held) = (directory.join("new"), directory.join("held"));
        let told = fs::remove_file(hold)
            .and_then(|()| fs::write(&new, std::process::id().to_string()))
            .and_then(|()| fs::rename(new, &held));
        while told.is_ok() && held.exists() {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

#[cfg(feature = "faults")]
pub use points::{at, of};

/// This process is containerd's of this container.
#[cfg(not(feature = "faults"))]
pub const fn of(_id: &str) {}

/// The pod's life has come to this point.
#[cfg(not(feature = "faults"))]
pub const fn at(_point: &str) {}
