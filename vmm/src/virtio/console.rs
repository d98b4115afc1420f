//! virtio-console (virtio 1.2, section 5.3): the guest's hvc0, where its kernel log goes.
//!
//! Text flows from the guest only. The last lines stay in memory for reports ([`Log::tail`]) and,
//! if there is a file, the last [`FILE_LIMIT`] bytes in it: however much the guest writes, neither
//! grows beyond its bound.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard};

use nix::sys::epoll::EpollFlags;

use super::device::{ActivateError, Activation, DeviceType, SHARED_VECTORS, VirtioDevice};
use super::error::DeviceError;
use super::features;
use super::ring::Ring;
use super::worker::{Handler, Next, Waits, Worker};

/// Lines kept in memory.
pub const TAIL_LINES: usize = 200;
/// Bytes kept of a line; what is longer becomes several lines.
pub const LINE_LIMIT: usize = 1024;
/// Most bytes in the file. It lies in /run, which is memory.
pub const FILE_LIMIT: u64 = 1 << 20;
/// Bytes kept when the file is full: enough to see what went before, and rarely copied.
const FILE_KEEP: u64 = FILE_LIMIT / 2;

/// Bytes copied out of the guest at once.
const PIECE: usize = 4096;
const QUEUE_SIZES: [u16; 2] = [16, 64];
const TRANSMIT: u16 = 1;

/// The guest's words.
#[derive(Default)]
pub struct Log {
    state: Mutex<LogState>,
}

#[derive(Default)]
struct LogState {
    lines: VecDeque<String>,
    unfinished: Vec<u8>,
    file: Option<LogFile>,
}

struct LogFile {
    file: File,
    size: u64,
}

impl Log {
    /// A log that is kept in memory and, if given, in a file opened for reading and writing, which
    /// is emptied.
    ///
    /// # Errors
    /// The file cannot be truncated.
    pub fn new(file: Option<File>) -> io::Result<Arc<Self>> {
        let file = match file {
            Some(file) => {
                file.set_len(0)?;
                Some(LogFile { file, size: 0 })
            }
            None => None,
        };
        Ok(Arc::new(Self {
            state: Mutex::new(LogState {
                file,
                ..LogState::default()
            }),
        }))
    }

    /// The last lines, oldest first, the unfinished one included. Free of control characters.
    pub fn tail(&self) -> Vec<String> {
        let state = self.state();
        let mut lines: Vec<String> = state.lines.iter().cloned().collect();
        if !state.unfinished.is_empty() {
            lines.push(printable(&state.unfinished));
        }
        lines
    }

    /// Adds what the guest wrote.
    pub fn write(&self, bytes: &[u8]) {
        let mut state = self.state();
        state.split(bytes);
        if let Some(file) = &mut state.file
            && let Err(error) = file.append(bytes)
        {
            tracing::warn!("console file given up: {error}");
            state.file = None;
        }
    }

    fn state(&self) -> MutexGuard<'_, LogState> {
        // Nothing in here panics half-way; and a log is better torn than lost.
        self.state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl LogState {
    fn split(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte != b'\n' {
                self.unfinished.push(byte);
            }
            if byte == b'\n' || self.unfinished.len() == LINE_LIMIT {
                if self.lines.len() == TAIL_LINES {
                    self.lines.pop_front();
                }
                let line = printable(&self.unfinished);
                self.unfinished.clear();
                self.lines.push_back(line);
            }
        }
    }
}

/// Text for people and terminals: a guest must not steer the terminal that shows a report.
fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.trim_end_matches('\r')
        .chars()
        .filter(|c| *c == '\t' || !c.is_control())
        .collect()
}

impl LogFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.size + bytes.len() as u64 > FILE_LIMIT {
            self.drop_older_half()?;
        }
        self.file.write_all_at(bytes, self.size)?;
        self.size += bytes.len() as u64;
        Ok(())
    }

    fn drop_older_half(&mut self) -> io::Result<()> {
        let keep = self.size.min(FILE_KEEP);
        let mut kept = vec![0; keep as usize];
        self.file.read_exact_at(&mut kept, self.size - keep)?;
        let mark = b"[earlier console output dropped]\n";
        self.file.set_len(0)?;
        self.file.write_all_at(mark, 0)?;
        self.file.write_all_at(&kept, mark.len() as u64)?;
        self.size = mark.len() as u64 + keep;
        Ok(())
    }
}

/// The device.
pub struct Console {
    log: Arc<Log>,
    worker: Option<Worker>,
}

impl Console {
    /// A console that writes to `log`.
    pub fn new(log: Arc<Log>) -> Self {
        Self { log, worker: None }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn vectors(&self) -> u16 {
        SHARED_VECTORS
    }

    fn features(&self) -> u64 {
        features::RING
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        // Neither VIRTIO_CONSOLE_F_SIZE nor F_MULTIPORT: no field has a meaning.
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            memory,
            queues,
            interrupt,
            features,
        } = activation;
        let got = queues.len();
        let transmit = queues.into_iter().find(|queue| queue.index == TRANSMIT);
        let Some(transmit) = transmit else {
            return Err(ActivateError::MissingQueues {
                got,
                need: QUEUE_SIZES.len(),
            });
        };
        let (theirs, log) = (interrupt.clone(), Arc::clone(&self.log));
        let body = move |waits: &Waits| {
            waits
                .add_kick(&transmit.kick, 0)
                .map_err(DeviceError::host("epoll_ctl"))?;
            let transmit = Ring::new(transmit, &memory, theirs, features);
            waits.serve(&mut Transmitter { transmit, log })
        };
        self.worker = Some(Worker::spawn(
            "virtio-console",
            DeviceType::Console,
            interrupt,
            body,
        )?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

struct Transmitter<'m> {
    transmit: Ring<'m>,
    log: Arc<Log>,
}

impl Handler for Transmitter<'_> {
    fn event(&mut self, _: &Waits, _: u64, _: EpollFlags) -> Result<(), DeviceError> {
        Ok(())
    }

    fn turn(&mut self, _: &Waits) -> Result<Next, DeviceError> {
        let log = &self.log;
        let more = self.transmit.serve(|mut chain| {
            let mut piece = [0; PIECE];
            // The rest of a request beyond what the log keeps would be forgotten at once.
            let mut left = FILE_LIMIT as usize;
            while left > 0 {
                let count = chain.readable.read(&mut piece);
                if count == 0 {
                    break;
                }
                log.write(&piece[..count]);
                left = left.saturating_sub(count);
            }
            Ok(0)
        })?;
        Ok(if more { Next::Again } else { Next::Wait })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{DriverQueue, Guest, readable, writable};
    use super::*;

    fn device(file: Option<File>) -> (Guest, DriverQueue, Console, Arc<Log>) {
        let mut guest = Guest::new(2);
        let (receive, transmit) = (guest.queue(0, 16), guest.queue(1, 64));
        let log = Log::new(file).unwrap();
        let mut console = Console::new(Arc::clone(&log));
        guest.activate(&mut console, &[&receive, &transmit], 0);
        (guest, transmit, console, log)
    }

    fn say(guest: &mut Guest, transmit: &mut DriverQueue, text: &[u8]) {
        let at = guest.place(text);
        assert_eq!(transmit.request(&[readable(at, text.len())]), 0);
    }

    fn contents(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn lines_arrive_whole_however_they_were_cut() {
        let file = tempfile::tempfile().unwrap();
        let (mut guest, mut transmit, mut console, log) = device(Some(file.try_clone().unwrap()));
        say(&mut guest, &mut transmit, b"[ 0.1] first");
        assert_eq!(log.tail(), ["[ 0.1] first"]);
        say(&mut guest, &mut transmit, b" line\r\nsecond\nthi");
        say(&mut guest, &mut transmit, b"rd\n");
        assert_eq!(log.tail(), ["[ 0.1] first line", "second", "third"]);
        assert_eq!(contents(&file), b"[ 0.1] first line\r\nsecond\nthird\n");
        console.reset();
    }

    #[test]
    fn control_characters_do_not_reach_a_report() {
        let (mut guest, mut transmit, _console, log) = device(None);
        say(
            &mut guest,
            &mut transmit,
            b"\x1b]0;title\x07a\tb\xff\x00c\n",
        );
        assert_eq!(log.tail(), ["]0;titlea\tb\u{fffd}c"]);
    }

    #[test]
    fn a_flood_leaves_only_the_last_of_it() {
        let file = tempfile::tempfile().unwrap();
        let (mut guest, mut transmit, _console, log) = device(Some(file.try_clone().unwrap()));
        let text: String = (0..8192).map(|n| format!("line {n:06}\n")).collect();
        let at = guest.place(text.as_bytes());
        for _ in 0..40 {
            transmit.request(&[readable(at, text.len())]);
            assert!(file.metadata().unwrap().len() <= FILE_LIMIT);
        }
        let tail = log.tail();
        assert_eq!(tail.len(), TAIL_LINES);
        assert_eq!(tail[TAIL_LINES - 1], "line 008191");
        let kept = contents(&file);
        assert!(kept.len() as u64 >= FILE_KEEP);
        assert!(kept.starts_with(b"[earlier console output dropped]\n"));
        assert!(kept.ends_with(b"line 008190\nline 008191\n"));
    }

    #[test]
    fn a_line_without_an_end_is_cut() {
        let (mut guest, mut transmit, _console, log) = device(None);
        say(&mut guest, &mut transmit, &[b'x'; 3 * LINE_LIMIT + 7]);
        let lengths: Vec<usize> = log.tail().iter().map(String::len).collect();
        assert_eq!(lengths, [LINE_LIMIT, LINE_LIMIT, LINE_LIMIT, 7]);
    }

    #[test]
    fn a_file_that_fails_does_not_stop_the_console() {
        let read_only = File::open("/dev/null").unwrap();
        let log = Log::new(None).unwrap();
        log.state().file = Some(LogFile {
            file: read_only,
            size: 0,
        });
        log.write(b"still here\n");
        assert_eq!(log.tail(), ["still here"]);
        assert!(log.state().file.is_none());
    }

    #[test]
    fn a_chain_that_asks_the_console_to_write_gets_nothing() {
        let (mut guest, mut transmit, _console, log) = device(None);
        let at = guest.place(b"untouched");
        assert_eq!(transmit.request(&[writable(at, 9)]), 0);
        assert_eq!(guest.read(at, 9), b"untouched");
        assert!(log.tail().is_empty());
    }

    #[test]
    fn without_a_transmit_queue_the_device_does_not_start() {
        let mut guest = Guest::new(2);
        let receive = guest.queue(0, 16);
        let mut console = Console::new(Log::new(None).unwrap());
        let refused = console.activate(guest.activation(&[&receive], 0));
        assert!(matches!(
            refused,
            Err(ActivateError::MissingQueues { got: 1, need: 2 })
        ));
    }
}
