//! What the processes of a pod log goes to files in the pod's directory, which is memory of the host's. A guest
//! can have them say something as often as it likes: so the files have an end.

mod calls;
pub mod forbidden;

use std::fmt;
use std::io::{self, Stderr, Write};
use std::os::fd::AsFd;
use std::panic;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, OnceLock};
use std::thread;

use nix::unistd::{ftruncate, write};

/// The most that a log holds, in bytes.
pub const MOST: u64 = 256 * 1024;

/// Said where a log begins anew.
const BEGINS: &[u8] = b"(what was here is left out: the log was full)\n";

/// The most that is kept of what a panic says, in bytes.
const KEPT: usize = 1024;

/// A log that begins anew when it is full. Its file is open for appending; of anything else than a file
/// nothing is taken away.
pub struct Bounded<F> {
    out: F,
    written: AtomicU64,
    kept: OnceLock<Vec<u8>>,
}

impl<F: AsFd> Bounded<F> {
    /// A log that is empty.
    pub const fn new(out: F) -> Self {
        Self {
            out,
            written: AtomicU64::new(0),
            kept: OnceLock::new(),
        }
    }

    /// Has the log say this also whenever it begins anew; the first such line stays.
    fn keep(&self, mut line: Vec<u8>) {
        line.truncate(KEPT);
        line.push(b'\n');
        let _ = self.kept.set(line);
    }
}

/// This process's standard error, which the shim makes its log.
pub fn stderr() -> &'static Bounded<Stderr> {
    static LOG: LazyLock<Bounded<Stderr>> = LazyLock::new(|| Bounded::new(io::stderr()));
    &LOG
}

/// Says a line on standard error, if it can be said: eprintln! panics where it cannot.
pub fn say(line: fmt::Arguments<'_>) {
    let _ = writeln!(stderr(), "{line}");
}

/// Has the log remember this process's first panic. One in a thread that serves a guest is survived, and what
/// the guest has the process say next must not take the only word of it away.
pub fn keep_panic() {
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        let thread = thread::current();
        let name = thread.name().unwrap_or("?");
        stderr().keep(format!("first panic: thread '{name}' {panic}").into());
        report(panic);
    }));
}

/// One line each time; those of different threads stay whole. A line for which there is no room is lost and no
/// error: whoever hears of one tries to say so in the same place, and panics when that fails.
impl<F: AsFd> Write for &Bounded<F> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let length = line.len() as u64;
        let before = self.written.fetch_add(length, Ordering::Relaxed);
        if before + length > MOST {
            self.written.store(length, Ordering::Relaxed);
            if ftruncate(&self.out, 0).is_ok() {
                let _ = write(&self.out, BEGINS);
                if let Some(kept) = self.kept.get() {
                    let _ = write(&self.out, kept);
                }
            }
        }
        let _ = write(&self.out, line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::Path;

    use super::*;

    fn appending(path: &Path) -> File {
        File::options()
            .create(true)
            .append(true)
            .open(path)
            .unwrap()
    }

    #[test]
    fn a_log_that_is_full_begins_anew_with_the_line_that_found_it_so() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let log = Bounded::new(appending(&path));
        let line = [b'x'; 1024];
        for _ in 0..MOST / 1024 {
            (&log).write_all(&line).unwrap();
        }
        assert_eq!(path.metadata().unwrap().len(), MOST);
        (&log).write_all(b"one more\n").unwrap();
        let text = std::fs::read(&path).unwrap();
        assert_eq!(text, [BEGINS, b"one more\n"].concat());
        for _ in 0..10 * MOST / 1024 {
            (&log).write_all(&line).unwrap();
            assert!(path.metadata().unwrap().len() <= MOST + BEGINS.len() as u64);
        }
    }

    #[test]
    fn a_panic_is_remembered_however_much_is_said_after_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let log = Bounded::new(appending(&path));
        log.keep(b"first".to_vec());
        log.keep(b"second".to_vec());
        for _ in 0..3 * MOST / 1024 {
            (&log).write_all(&[b'x'; 1024]).unwrap();
        }
        let text = std::fs::read(&path).unwrap();
        assert!(text.starts_with(&[BEGINS, b"first\n"].concat()));
    }

    #[test]
    fn the_panic_of_a_thread_is_kept() {
        keep_panic();
        let thread = thread::Builder::new().name("device".into());
        let thread = thread.spawn(|| panic!("{}", "far".repeat(KEPT)));
        assert!(thread.unwrap().join().is_err());
        let kept = String::from_utf8_lossy(stderr().kept.get().unwrap());
        assert!(
            kept.starts_with("first panic: thread 'device' panicked at"),
            "{kept}"
        );
        assert_eq!(kept.len(), KEPT + 1);
    }

    #[test]
    fn a_line_for_which_there_is_no_room_is_no_error() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        writeln!(&Bounded::new(full), "words").unwrap();
    }

    #[test]
    fn what_is_no_file_is_written_to_for_ever() {
        let (end, other) = std::io::pipe().unwrap();
        let log = Bounded::new(other);
        let reader = std::thread::spawn(move || io::copy(&mut { end }, &mut io::sink()).unwrap());
        for _ in 0..2 * MOST / 1024 {
            (&log).write_all(&[b'x'; 1024]).unwrap();
        }
        drop(log);
        assert_eq!(reader.join().unwrap(), 2 * MOST);
    }
}
