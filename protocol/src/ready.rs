//! The agent's first words.

use serde::{Deserialize, Serialize};

/// Longest line that the shim reads from the ready port, in bytes.
pub const MAX_LINE: usize = 4096;

/// One JSON line, sent by the agent to [`crate::ports::READY`] when its service listens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentReady {
    /// Version of the agent's package.
    pub version: String,
    /// `uname -r` of the guest.
    pub kernel: String,
    /// Boot stages in order.
    pub stages: Vec<Stage>,
}

/// A point in the guest's boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// `init`, `mounts`, `share`, `listening`.
    pub name: String,
    /// Guest's CLOCK_BOOTTIME in microseconds.
    pub boottime_us: u64,
}
