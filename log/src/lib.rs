//! What the processes of a pod log goes to files in the pod's directory, which is memory of the host's. A guest
//! can have them say something as often as it likes: so the files have an end.

use std::io::{self, Stderr, Write};
use std::os::fd::AsFd;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::unistd::{ftruncate, write};

/// The most that a log holds, in bytes.
pub const MOST: u64 = 256 * 1024;

/// Said where a log begins anew.
const BEGINS: &[u8] = b"(what was here is left out: the log was full)\n";

/// A log that begins anew when it is full. Its file is open for appending; of anything else than a file
/// nothing is taken away.
pub struct Bounded<F> {
    out: F,
    written: AtomicU64,
}

impl<F: AsFd> Bounded<F> {
    /// A log that is empty.
    pub const fn new(out: F) -> Self {
        Self {
            out,
            written: AtomicU64::new(0),
        }
    }
}

/// This process's standard error, which the shim makes its log.
pub fn stderr() -> &'static Bounded<Stderr> {
    static LOG: LazyLock<Bounded<Stderr>> = LazyLock::new(|| Bounded::new(io::stderr()));
    &LOG
}

/// One line each time; those of different threads stay whole.
impl<F: AsFd> Write for &Bounded<F> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let length = line.len() as u64;
        let before = self.written.fetch_add(length, Ordering::Relaxed);
        if before + length > MOST {
            self.written.store(length, Ordering::Relaxed);
            if ftruncate(&self.out, 0).is_ok() {
                write(&self.out, BEGINS)?;
            }
        }
        Ok(write(&self.out, line)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn a_log_that_is_full_begins_anew_with_the_line_that_found_it_so() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let file = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .unwrap();
        let log = Bounded::new(file);
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
