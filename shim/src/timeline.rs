//! Where the time of a pod's start went.

use std::path::Path;
use std::sync::Mutex;

use serde::Serialize;

use crate::sys;

/// File in the pod's directory.
pub const FILE: &str = "timeline.json";

/// One stage, reached at this time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stage {
    /// `shim`, `vmm-spawned`, `vmm:...` by the VMM, `guest:...` by the guest's agent.
    pub name: String,
    /// CLOCK_MONOTONIC of the host in microseconds; for `guest:` the guest's CLOCK_BOOTTIME.
    pub us: u64,
}

/// Stages, in the order they are noted.
#[derive(Debug, Default)]
pub struct Timeline {
    stages: Mutex<Vec<Stage>>,
}

impl Timeline {
    /// Notes that a stage is reached now.
    pub fn note(&self, name: &str) {
        self.note_at(name, sys::monotonic_us());
    }

    /// Notes that a stage was reached then.
    pub fn note_at(&self, name: &str, us: u64) {
        if let Ok(mut stages) = self.stages.lock() {
            stages.push(Stage {
                name: name.into(),
                us,
            });
        }
    }

    fn stages(&self) -> Vec<Stage> {
        let mut stages = self.stages.lock().map(|s| s.clone()).unwrap_or_default();
        // The guest's own clock began when the guest did: it stays apart, at the end.
        stages.sort_by_key(|s| (s.name.starts_with("guest:"), s.us));
        stages
    }

    /// On one line: each stage with the milliseconds since the first.
    pub fn line(&self) -> String {
        let stages = self.stages();
        let start = stages.first().map_or(0, |s| s.us);
        let text = stages.iter().map(|stage| {
            let since = if stage.name.starts_with("guest:") {
                0
            } else {
                start
            };
            let us = stage.us.saturating_sub(since);
            format!("{} {}.{:01}", stage.name, us / 1000, us % 1000 / 100)
        });
        text.collect::<Vec<_>>().join(", ")
    }

    /// Writes the stages as JSON into a pod's directory.
    ///
    /// # Errors
    /// What the file system says.
    pub fn save(&self, pod: &Path) -> std::io::Result<()> {
        std::fs::write(pod.join(FILE), serde_json::to_vec(&self.stages())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_told_from_the_first_on_and_the_guests_apart() {
        let timeline = Timeline::default();
        timeline.note_at("agent", 151_200);
        timeline.note_at("guest:init", 90_000);
        timeline.note_at("shim", 1_000);
        assert_eq!(timeline.line(), "shim 0.0, agent 150.2, guest:init 90.0");
    }
}
