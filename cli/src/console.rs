//! `sepal console`: the guest's kernel log, which the VMM writes to a file.

use std::fs::File;
use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use sepal_protocol::paths::pod;
use sepal_protocol::words;

use crate::pods;

/// Between two looks at the file. It is a person who waits.
const PERIOD: Duration = Duration::from_millis(100);

/// Prints the log so far, and with `follow` what comes, until the pod's directory is gone. A terminal gets
/// nothing that it would obey: a guest writes what it likes.
///
/// # Errors
/// No such pod, or it has no log.
pub fn run(state: &Path, wanted: &str, follow: bool) -> anyhow::Result<ExitCode> {
    let pod = pods::find(state, wanted)?;
    let path = pod.directory.join(pod::CONSOLE);
    let mut file = File::open(&path).with_context(|| {
        format!(
            "pod {}: cannot open its kernel log {}",
            pod.id,
            path.display()
        )
    })?;
    let mut out = std::io::stdout().lock();
    let to_terminal = out.is_terminal();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        // Looked at first: what was written before the end is then still read.
        let alive = path.exists();
        loop {
            match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) if to_terminal => {
                    out.write_all(words::disarm(&buffer[..length]).as_bytes())?;
                }
                Ok(length) => out.write_all(&buffer[..length])?,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("cannot read the kernel log"),
            }
        }
        out.flush()?;
        if !follow || !alive {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(PERIOD);
    }
}
