//! Where the time of a start goes.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Stages passed, in order, as CLOCK_MONOTONIC in microseconds: the clock that shim and file
/// server use as well, so that their stages can be laid side by side.
#[derive(Debug, Default)]
pub struct Stages(Vec<(String, u64)>);

impl Stages {
    /// Notes that `name` has been reached.
    pub fn reached(&mut self, name: &str) {
        self.at(name, now());
    }

    /// Notes that `name` was reached at `time`.
    pub fn at(&mut self, name: &str, time: u64) {
        self.0.push((name.into(), time));
    }

    /// All of them.
    pub fn into_inner(self) -> Vec<(String, u64)> {
        self.0
    }

    /// Logs them as milliseconds since the first.
    pub fn log(&self) {
        let Some((_, first)) = self.0.first() else {
            return;
        };
        for (name, time) in &self.0 {
            let since = Duration::from_micros(time.saturating_sub(*first));
            tracing::debug!(stage = name, ?since);
        }
    }
}

/// CLOCK_MONOTONIC in microseconds.
pub fn now() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |time| Duration::from(time).as_micros() as u64)
}
