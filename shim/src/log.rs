//! The shim's log: lines into the FIFO `log` of the bundle, which containerd copies into its own.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Mutex;

use sepal_protocol::config::LogLevel;
use tracing::level_filters::LevelFilter;

/// Never blocks and never fails: a log that nobody reads must not hold up a pod.
struct Fifo(File);

impl Write for Fifo {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        // A full FIFO: containerd is away. The line is dropped.
        let _ = self.0.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Sends what is traced to containerd's log FIFO in `bundle`, or to standard error without one.
pub fn init(bundle: &Path, level: LogLevel) {
    // For reading as well: the open does not wait, and containerd may go and come again.
    let fifo = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(bundle.join("log"));
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let format = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_target(false)
        .with_max_level(level);
    // Set once per process; a second time, in tests, is of no consequence.
    let _ = match fifo {
        Ok(file) => format.with_writer(Mutex::new(Fifo(file))).try_init(),
        Err(_) => format.with_writer(std::io::stderr).try_init(),
    };
}
