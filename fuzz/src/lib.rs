//! Fuzz targets: one function each, which gives bytes to the code that has to bear them.
//!
//! Who writes those bytes in the field is said in docs/fuzzing.md. The functions are plain Rust: a stable
//! compiler replays the corpora (`tests/replay.rs`), the programs of `fuzz_targets/` run them under
//! libFuzzer. A target returns when the input was dealt with, by whatever answer; a panic is a finding.

pub mod agent;
pub mod boot;
pub mod control;
pub mod devices;
pub mod fuse;
pub mod guest;
pub mod input;
pub mod json;
pub mod machine;
pub mod net;
pub mod pods;
pub mod texts;

/// A target's name, which is that of its corpus and its program, and its function.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 19] = [
    ("agent", agent::agent),
    ("balloon", devices::balloon),
    ("blk", devices::blk),
    ("boot", boot::boot),
    ("console", devices::console),
    ("control", control::control),
    ("fs", devices::fs),
    ("fuse", fuse::fuse),
    ("image", boot::image),
    ("limits", pods::limits),
    ("machine", machine::machine),
    ("mem", devices::mem),
    ("net", net::net),
    ("oci_spec", pods::oci_spec),
    ("pmem", devices::pmem),
    ("pod_spec", pods::pod_spec),
    ("rng", devices::rng),
    ("texts", texts::texts),
    ("vsock", devices::vsock),
];
