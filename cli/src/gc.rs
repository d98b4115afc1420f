//! `sepal gc`: the shim's program knows how to remove what pods leave.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;

const SHIM: &str = "containerd-shim-sepal-v2";

/// Becomes the shim's program.
///
/// # Errors
/// It is not there.
pub fn run() -> anyhow::Result<std::process::ExitCode> {
    let beside = std::env::current_exe()
        .ok()
        .map(|own| own.with_file_name(SHIM))
        .filter(|path| path.exists());
    let program = beside.unwrap_or_else(|| PathBuf::from(SHIM));
    let error = Command::new(&program).arg("gc").exec();
    Err(error).with_context(|| format!("cannot run {}", program.display()))
}
