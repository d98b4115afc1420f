//! The VMM's virtio devices, each with a hostile guest at its rings.
//!
//! Beside what every target finds (panics, endless loops, memory that is not the guest's) each looks at
//! what its device must never let a guest do.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use sepal_vmm::virtio::balloon::{self, Balloon};
use sepal_vmm::virtio::blk::Blk;
use sepal_vmm::virtio::console::{Console, FILE_LIMIT, Log};
use sepal_vmm::virtio::fs::Fs;
use sepal_vmm::virtio::mem::{self, Mem};
use sepal_vmm::virtio::pmem::{ALIGN, Pmem};
use sepal_vmm::virtio::rng::Rng;
use sepal_vmm::virtio::vsock::Vsock;
use sepal_vmm::virtio::vsock::host::port_path;

use crate::guest::{Guest, HIGH, HIGH_SIZE, Host, memory_file};
use crate::input::Input;

/// Rings, chains and buffers, by the device that does least with them.
pub fn rng(data: &[u8]) {
    Guest::drive(Input::new(data), &mut Rng::default(), ());
}

/// Flushes of persistent memory.
pub fn pmem(data: &[u8]) {
    Guest::drive(Input::new(data), &mut Pmem::new(1 << 32, ALIGN), ());
}

/// The guest's words: its log stays small, whatever comes, and fit for a terminal.
pub fn console(data: &[u8]) {
    let file = memory_file(0);
    let log = Log::new(file.try_clone().ok()).expect("a file in memory is emptied");
    Guest::drive(Input::new(data), &mut Console::new(Arc::clone(&log)), ());
    let length = file.metadata().expect("it is open").len();
    assert!(length <= FILE_LIMIT, "the console file has {length} bytes");
    for line in log.tail() {
        let control = |c: char| c.is_control() && c != '\t';
        assert!(!line.contains(control), "{line:?}");
    }
}

const DISK: u64 = 64 << 10;

/// Requests to a disk, which stays as large as it is and, read-only, as it is.
pub fn blk(data: &[u8]) {
    let mut input = Input::new(data);
    let read_only = input.byte() & 1 != 0;
    let file = memory_file(DISK);
    let mark = *b"what was there";
    file.write_all_at(&mark, 512).expect("a file in memory");
    let theirs = file.try_clone().expect("descriptors are left");
    let mut device = Blk::new(theirs, "a-serial", read_only).expect("it has a size");
    Guest::drive(input, &mut device, ());
    let length = file.metadata().expect("it is open").len();
    assert_eq!(length, DISK, "the disk's size has changed");
    if read_only {
        let mut there = vec![0; DISK as usize];
        file.read_exact_at(&mut there, 0).expect("a file in memory");
        let kept = there[512..].starts_with(&mark);
        let others = there.iter().filter(|byte| **byte != 0).count();
        assert!(
            kept && others == mark.len(),
            "a read-only disk was written to"
        );
    }
}

struct Sizes(Arc<balloon::Control>);

impl Host for Sizes {
    fn act(&mut self, input: &mut Input) {
        match input.below(3) {
            0 => drop(self.0.stats()),
            _ => drop(self.0.set_target(input.u32().into())),
        }
    }
}

/// Pages that come and go, free page reports, statistics.
pub fn balloon(data: &[u8]) {
    let mut device = Balloon::new().expect("descriptors are left");
    let control = device.control();
    Guest::drive(Input::new(data), &mut device, Sizes(Arc::clone(&control)));
    let _ = (control.held(), control.returned(), control.stats());
}

struct Plugs(Arc<mem::Control>);

impl Host for Plugs {
    fn act(&mut self, input: &mut Input) {
        let (wanted, usable) = (input.u32(), input.u32());
        self.0.request(wanted.into(), usable.into());
    }
}

/// Memory that is plugged: never more than was granted at some time. The host gives its pages when they
/// are plugged, or as they are touched.
pub fn mem(data: &[u8]) {
    let mut input = Input::new(data);
    let taken = input.byte() & 1 != 0;
    let mut device = Mem::new(HIGH, HIGH_SIZE, taken);
    let control = device.control();
    Guest::drive(input, &mut device, Plugs(Arc::clone(&control)));
    assert!(control.plugged() <= HIGH_SIZE);
}

/// Programs of the host, and a server that the guest may dial at port 1; at port 2 nobody listens.
struct Programs {
    path: PathBuf,
    server: UnixListener,
    streams: Vec<UnixStream>,
}

impl Host for Programs {
    fn act(&mut self, input: &mut Input) {
        match input.below(6) {
            0 => {
                if let Ok(stream) = UnixStream::connect(&self.path) {
                    let line = match input.byte() {
                        0..=199 => format!("CONNECT {}\n", input.byte()).into_bytes(),
                        _ => input.some(),
                    };
                    self.keep(stream, &line);
                }
            }
            1 => {
                if let Ok((stream, _)) = self.server.accept() {
                    self.keep(stream, &[]);
                }
            }
            2 => {
                let bytes = match input.byte() {
                    0..=99 => input.some(),
                    _ => vec![7; usize::from(input.u16())],
                };
                if let Some(stream) = self.one(input) {
                    // It may be full, or closed by the guest.
                    let _ = stream.write(&bytes);
                }
            }
            3 => {
                if let Some(stream) = self.one(input) {
                    let _ = stream.read(&mut [0; 4096]);
                }
            }
            4 => {
                let how = match input.below(3) {
                    0 => std::net::Shutdown::Read,
                    1 => std::net::Shutdown::Write,
                    _ => std::net::Shutdown::Both,
                };
                if let Some(stream) = self.one(input) {
                    let _ = stream.shutdown(how);
                }
            }
            _ => {
                if !self.streams.is_empty() {
                    self.streams.swap_remove(input.below(self.streams.len()));
                }
            }
        }
    }
}

impl Programs {
    fn keep(&mut self, mut stream: UnixStream, first: &[u8]) {
        if stream.set_nonblocking(true).is_ok() {
            let _ = stream.write(first);
            self.streams.push(stream);
        }
    }

    fn one(&mut self, input: &mut Input) -> Option<&mut UnixStream> {
        let index = input.below(self.streams.len());
        self.streams.get_mut(index)
    }
}

/// A directory of this process, for sockets.
fn directory() -> &'static Path {
    static DIRECTORY: OnceLock<tempfile::TempDir> = OnceLock::new();
    let made = || tempfile::tempdir().expect("there is a place for temporary files");
    DIRECTORY.get_or_init(made).path()
}

/// Packets of the guest: connections either way, credit, ends.
pub fn vsock(data: &[u8]) {
    // Two runs side by side, as tests do, must not meet.
    let run = tempfile::tempdir_in(directory()).expect("there is a place for sockets");
    let path = run.path().join("v");
    let server = UnixListener::bind(port_path(&path, 1)).expect("nobody else is there");
    server.set_nonblocking(true).expect("a socket can be so");
    let mut device = Vsock::new(3, path.clone()).expect("nobody else is there");
    let programs = Programs {
        path,
        server,
        streams: Vec::new(),
    };
    Guest::drive(Input::new(data), &mut device, programs);
}

/// The answers of a file server that a guest has taken over, to the VMM that hands it the queues.
pub fn fs(data: &[u8]) {
    let mut input = Input::new(data);
    let (ours, theirs) = UnixStream::pair().expect("descriptors are left");
    let mut theirs = theirs;
    // Messages of vhost-user: request, flags, size, payload; then the end, so that nobody waits.
    for _ in 0..32 {
        if input.is_empty() {
            break;
        }
        let kind = input.byte();
        let mut message = Vec::new();
        if kind & 0x80 == 0 {
            // An answer (version 1, REPLY) of as many bytes as it says.
            let payload = match input.below(4) {
                0..=2 => input.u64().to_le_bytes().to_vec(),
                _ => input.some(),
            };
            message.extend(u32::from(kind).to_le_bytes());
            message.extend(5_u32.to_le_bytes());
            message.extend((payload.len() as u32).to_le_bytes());
            message.extend(payload);
        } else {
            message = input.some();
        }
        if theirs.write_all(&message).is_err() {
            break;
        }
    }
    let _ = theirs.shutdown(std::net::Shutdown::Write);
    let Ok(mut device) = Fs::new("sepal", ours, 1) else {
        return;
    };
    // What it drives is only the hand-over: the rings are the file server's.
    Guest::drive(Input::new(&[0xff; 8]), &mut device, ());
    assert!(theirs.as_raw_fd() >= 0);
}
