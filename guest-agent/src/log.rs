//! The agent's log goes into the kernel's, and so to the console that the VMM records.
//!
//! A small subscriber of our own: the usual ones cost more memory than the rest of the agent, and
//! the processes that prepare a container must also be able to hand their first error to the agent
//! ([`report_errors_to`]).

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use nix::sys::socket::{MsgFlags, send};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Longest line, in bytes: the kernel cuts records of /dev/kmsg at about 1,000.
const MAX_LINE: usize = 900;
/// First byte of a message by which a helper process reports an error of libcontainer.
pub const ERROR_REPORT: u8 = b'E';

/// First byte of a message by which a helper process hands on what else it logs.
pub const LOG_REPORT: u8 = b'L';

static REPORT: AtomicI32 = AtomicI32::new(-1);

/// Sends what this process and its children log to a socket instead, each line as one packet of
/// [`ERROR_REPORT`] or [`LOG_REPORT`] and text. Meant for the forked helper processes.
pub fn report_errors_to(socket: RawFd) {
    REPORT.store(socket, Ordering::Relaxed);
}

/// Starts logging, from `level` upwards, to /dev/kmsg; without one to standard error.
pub fn start(level: Level) {
    let out = File::options().write(true).open("/dev/kmsg").ok();
    let log = KernelLog {
        out,
        level,
        next_span: AtomicU64::new(1),
    };
    // Fails only when there is a subscriber already, as in a test of the library.
    let _ = tracing::subscriber::set_global_default(log);
}

/// The level that the kernel command line asks for by `sepal.log=debug`; info otherwise.
#[must_use]
pub fn level_of_command_line(command_line: &str) -> Level {
    command_line
        .split_ascii_whitespace()
        .find_map(|word| word.strip_prefix("sepal.log="))
        .and_then(|level| level.parse().ok())
        .unwrap_or(Level::INFO)
}

struct KernelLog {
    out: Option<File>,
    level: Level,
    next_span: AtomicU64,
}

impl Subscriber for KernelLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Of libraries only what is wrong is kept, for libcontainer tells of every step at debug and
        // info. Trace, which nothing of ours uses, asks for that.
        let most = match self.level {
            Level::TRACE => Level::DEBUG,
            level if metadata.target().starts_with("sepal") => level,
            _ => Level::WARN,
        };
        *metadata.level() <= most
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(self.next_span.fetch_add(1, Ordering::Relaxed))
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let text = line.finish();
        let socket = REPORT.load(Ordering::Relaxed);
        if socket >= 0 {
            // The log's own descriptor is closed here.
            let is_error = *event.metadata().level() == Level::ERROR;
            let mut packet = vec![if is_error { ERROR_REPORT } else { LOG_REPORT }];
            packet.extend_from_slice(text.as_bytes());
            // The agent may have given up on us: nothing to be done about that here.
            let _ = send(
                socket,
                &packet,
                MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
            );
            return;
        }
        // Priorities of syslog(3), facility "daemon".
        let priority = 24
            + match *event.metadata().level() {
                Level::ERROR => 3,
                Level::WARN => 4,
                Level::INFO => 6,
                _ => 7,
            };
        match &self.out {
            Some(out) => {
                let _ = (&*out).write_all(format!("<{priority}>sepal-agent: {text}\n").as_bytes());
            }
            None => eprintln!("sepal-agent: {text}"),
        }
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Line {
    fn finish(self) -> String {
        let mut text = match (self.message.is_empty(), self.fields.is_empty()) {
            (false, false) => format!("{}: {}", self.message, self.fields),
            (false, true) => self.message,
            _ => self.fields,
        };
        if text.len() > MAX_LINE {
            let mut end = MAX_LINE;
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            text.truncate(end);
        }
        text
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a String cannot fail.
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            let comma = if self.fields.is_empty() { "" } else { ", " };
            write!(self.fields, "{comma}{}={value:?}", field.name())
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn level_comes_from_the_command_line() {
        assert_eq!(
            level_of_command_line("quiet sepal.log=debug ro"),
            Level::DEBUG
        );
        assert_eq!(level_of_command_line("sepal.log=noisy"), Level::INFO);
    }

    #[test]
    fn long_lines_are_cut_between_characters() {
        let line = Line {
            message: "ä".repeat(MAX_LINE),
            fields: String::new(),
        };
        assert_eq!(line.finish().len(), MAX_LINE);
    }
}
