//! The `log` records of virtiofsd, one line each on standard error, which the shim reads.

use std::io::Write;

use log::{LevelFilter, Log, Metadata, Record};

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            // One write per line, so that lines of different threads stay whole. With standard
            // error gone there is nobody left to tell.
            let line = format!(
                "{} {}: {}\n",
                record.level(),
                record.target(),
                record.args()
            );
            let _ = sepal_log::stderr().write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// Sends records up to `level` to standard error, which remembers a panic. Called once.
pub fn install(level: LevelFilter) {
    sepal_log::keep_panic();
    static LOGGER: Stderr = Stderr;
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(level);
    }
}
