//! A driver of the device for its tests. The region is the test guest's upper RAM, so that what is
//! given back is seen in the memfd behind it.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use nix::unistd::{Whence, lseek};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::device::VirtioDevice;
use super::mem::{BLOCK, Control, Mem};
use super::testing::{DriverQueue, Guest, HOLE, readable, writable};

pub const REGION: u64 = HOLE.1;
/// Blocks of the region that are RAM.
pub const COUNT: u64 = 8;

pub const PLUG: u16 = 0;
pub const UNPLUG: u16 = 1;
pub const UNPLUG_ALL: u16 = 2;
pub const STATE: u16 = 3;

pub const ACK: u16 = 0;
pub const NACK: u16 = 1;
pub const BUSY: u16 = 2;
pub const ERROR: u16 = 3;

pub struct Driver {
    pub guest: Guest,
    pub queue: DriverQueue,
    pub control: Arc<Control>,
    pub device: Mem,
}

/// A driver that may plug `requested` blocks of the first `usable`.
pub fn driver(requested: u64, usable: u64) -> Driver {
    let device = Mem::new(REGION, COUNT * BLOCK, false);
    let asked = device.control().request(requested * BLOCK, usable * BLOCK);
    assert!(!asked);
    Driver::new(device)
}

pub fn request(kind: u16, gpa: u64, blocks: u16) -> Vec<u8> {
    let mut bytes = vec![0; 24];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&gpa.to_le_bytes());
    bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
    bytes
}

impl Driver {
    pub fn new(mut device: Mem) -> Self {
        let control = device.control();
        let mut guest = Guest::new(1);
        let queue = guest.queue(0, 16);
        guest.activate(&mut device, &[&queue], 0);
        Self {
            guest,
            queue,
            control,
            device,
        }
    }

    /// Another driver takes over, as after a kexec.
    pub fn restart(&mut self) {
        self.device.reset();
        self.queue = self.guest.queue(0, 16);
        self.guest.activate(&mut self.device, &[&self.queue], 0);
    }

    /// The answer's type and state.
    pub fn send(&mut self, bytes: &[u8]) -> [u16; 2] {
        let at = self.guest.place(bytes);
        let answer = self.guest.place(&[0xee; 10]);
        let written = self
            .queue
            .request(&[readable(at, bytes.len()), writable(answer, 10)]);
        assert_eq!(written, 10);
        let answer = self.guest.read(answer, 10);
        assert_eq!(answer[2..8], [0; 6]);
        [0, 8].map(|at| u16::from_le_bytes([answer[at], answer[at + 1]]))
    }

    /// A request for blocks of the region; the answer's type.
    pub fn ask(&mut self, kind: u16, first: u64, blocks: u16) -> u16 {
        self.send(&request(kind, REGION + first * BLOCK, blocks))[0]
    }

    pub fn state(&mut self, first: u64, blocks: u16) -> [u16; 2] {
        self.send(&request(STATE, REGION + first * BLOCK, blocks))
    }

    pub fn config(&self) -> Vec<u64> {
        let mut config = [0; 56];
        self.device.read_config(0, &mut config);
        let words = config.chunks_exact(8);
        words
            .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
            .collect()
    }

    /// Writes to a page of each of some blocks.
    pub fn touch(&self, first: u64, blocks: u64) {
        for block in first..first + blocks {
            let gpa = GuestAddress(REGION + block * BLOCK + 4096);
            self.guest.memory.write_obj(7_u8, gpa).unwrap();
        }
    }

    pub fn touched(&self, block: u64) -> bool {
        self.guest.read(REGION + block * BLOCK + 4096, 1) == [7]
    }

    /// Bytes that RAM takes from the host.
    pub fn resident(&self) -> u64 {
        self.file(|file| file.metadata().unwrap().blocks() * 512)
    }

    /// Whether anything was touched in a block since it was plugged.
    pub fn holds(&self, block: u64) -> bool {
        let start = HOLE.0 + block * BLOCK;
        self.file(|file| {
            let data = lseek(file, start as i64, Whence::SeekData);
            data.is_ok_and(|at| (at as u64) < start + BLOCK)
        })
    }

    fn file<T>(&self, look: impl FnOnce(&File) -> T) -> T {
        let region = self.guest.memory.iter().next().unwrap();
        look(region.file_offset().unwrap().file())
    }
}
