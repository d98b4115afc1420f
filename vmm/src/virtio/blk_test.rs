//! The device on real files, driven over its ring.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::blk::{Blk, SECTOR};
use super::device::{DeviceType, VirtioDevice};
use super::testing::{DriverQueue, Guest, Segment, readable, writable};

const IN: u32 = 0;
const OUT: u32 = 1;
const SYNC: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const FAILED: u8 = 1;
const UNSUPPORTED: u8 = 2;
/// What nobody wrote.
const UNTOUCHED: u8 = 0xee;

const SECTORS: u64 = 2048;

struct Driver {
    guest: Guest,
    queue: DriverQueue,
    file: File,
    device: Blk,
}

fn driver_on(file: File, read_only: bool) -> Driver {
    let mut device = Blk::new(file.try_clone().unwrap(), "volume-7", read_only).unwrap();
    let mut guest = Guest::new(1);
    let queue = guest.queue(0, 256);
    guest.activate(&mut device, &[&queue], 0);
    Driver {
        guest,
        queue,
        file,
        device,
    }
}

fn driver(read_only: bool) -> Driver {
    let file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..SECTORS * SECTOR).map(|n| (n / 7 % 251) as u8).collect();
    file.write_all_at(&bytes, 0).unwrap();
    driver_on(file, read_only)
}

impl Driver {
    /// Sends a request with these buffers for data: status, and bytes written.
    fn request(&mut self, kind: u32, sector: u64, data: &[Segment]) -> (u8, u32) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let (header, status) = (self.guest.place(&header), self.guest.place(&[UNTOUCHED]));
        let chain = [&[readable(header, 16)], data, &[writable(status, 1)]].concat();
        let written = self.queue.request(&chain);
        (self.guest.read(status, 1)[0], written)
    }

    fn read(&mut self, sector: u64, length: usize) -> (u8, Vec<u8>) {
        let at = self.guest.place(&vec![UNTOUCHED; length]);
        let (status, written) = self.request(IN, sector, &[writable(at, length)]);
        assert_eq!(written, if status == OK { length as u32 + 1 } else { 1 });
        (status, self.guest.read(at, length))
    }

    fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        let at = self.guest.place(bytes);
        let (status, written) = self.request(OUT, sector, &[readable(at, bytes.len())]);
        assert_eq!(written, 1);
        status
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let bytes: Vec<u8> = ranges
            .iter()
            .flat_map(|(sector, sectors, flags)| {
                let rest = [sectors.to_le_bytes(), flags.to_le_bytes()].concat();
                [&sector.to_le_bytes()[..], &rest].concat()
            })
            .collect();
        let at = self.guest.place(&bytes);
        self.request(kind, 0, &[readable(at, bytes.len())]).0
    }

    fn file_bytes(&self, sector: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.file
            .read_exact_at(&mut bytes, sector * SECTOR)
            .unwrap();
        bytes
    }

    fn capacity(&self) -> u64 {
        let mut capacity = [0; 8];
        self.device.read_config(0, &mut capacity);
        u64::from_le_bytes(capacity)
    }
}

#[test]
fn the_driver_reads_the_capacity() {
    let driver = driver(false);
    assert_eq!(driver.device.device_type(), DeviceType::Block);
    assert_eq!(driver.capacity(), SECTORS);
    let mut segments = [0; 4];
    driver.device.read_config(12, &mut segments);
    assert!(u32::from_le_bytes(segments) > 0);
}

#[test]
fn what_is_written_is_read_back() {
    let mut driver = driver(false);
    let bytes: Vec<u8> = (0..64 * SECTOR).map(|n| (n % 253) as u8).collect();
    assert_eq!(driver.write(100, &bytes), OK);
    assert_eq!(driver.request(SYNC, 0, &[]), (OK, 1));
    assert!(driver.file_bytes(100, bytes.len()) == bytes);
    assert!(driver.read(100, bytes.len()) == (OK, bytes));
    let first = driver.file_bytes(0, 512);
    assert!(driver.read(0, 512) == (OK, first));
}

#[test]
fn data_may_be_spread_over_buffers_of_any_size() {
    let mut driver = driver(false);
    let at = driver.guest.alloc(2048, 8);
    let pieces = [
        writable(at, 1),
        writable(at + 1, 700),
        writable(at + 701, 323),
    ];
    assert_eq!(driver.request(IN, 9, &pieces), (OK, 1025));
    assert!(driver.guest.read(at, 1024) == driver.file_bytes(9, 1024));
    // The status may share its buffer with the data.
    let header = driver.guest.place(&[0; 16]);
    let at = driver.guest.place(&[UNTOUCHED; 513]);
    assert_eq!(
        driver
            .queue
            .request(&[readable(header, 16), writable(at, 513)]),
        513
    );
    assert_eq!(driver.guest.read(at + 512, 1), [OK]);
    assert!(driver.guest.read(at, 512) == driver.file_bytes(0, 512));
}

#[test]
fn the_serial_is_told() {
    let mut driver = driver(false);
    let at = driver.guest.place(&[UNTOUCHED; 20]);
    assert_eq!(driver.request(GET_ID, 0, &[writable(at, 20)]), (OK, 21));
    assert_eq!(
        &driver.guest.read(at, 20),
        b"volume-7\0\0\0\0\0\0\0\0\0\0\0\0"
    );
    assert_eq!(driver.request(GET_ID, 0, &[writable(at, 3)]), (OK, 4));
}

#[test]
fn nothing_beyond_the_end_is_read_or_written() {
    let mut driver = driver(false);
    let size = driver.file.metadata().unwrap().len();
    for sector in [SECTORS, SECTORS - 1, u64::MAX, u64::MAX / SECTOR, 1 << 55] {
        let (status, bytes) = driver.read(sector, 1024);
        assert_eq!((status, bytes), (FAILED, vec![UNTOUCHED; 1024]), "{sector}");
        assert_eq!(driver.write(sector, &[1; 1024]), FAILED);
        assert_eq!(driver.ranges(DISCARD, &[(sector, 2, 0)]), FAILED);
        assert_eq!(driver.ranges(WRITE_ZEROES, &[(sector, 2, 0)]), FAILED);
    }
    assert_eq!(driver.file.metadata().unwrap().len(), size);
    assert_eq!(driver.read(SECTORS - 1, 512).0, OK);
}

#[test]
fn parts_of_sectors_and_endless_requests_fail() {
    let mut driver = driver(false);
    assert_eq!(driver.read(0, 511).0, FAILED);
    assert_eq!(driver.write(0, &[1; 513]), FAILED);
    // The same RAM over and over: more than the device holds, and than one request may.
    let at = driver.guest.alloc(1 << 20, 8);
    let many = vec![writable(at, 1 << 20); 200];
    assert_eq!(driver.request(IN, 0, &many), (FAILED, 1));
}

#[test]
fn unknown_and_broken_requests_have_their_status() {
    let mut driver = driver(false);
    for kind in [2, 3, 5, 99, u32::MAX] {
        assert_eq!(driver.request(kind, 0, &[]), (UNSUPPORTED, 1));
    }
    let at = driver.guest.place(&[UNTOUCHED; 32]);
    // Half a header.
    assert_eq!(
        driver
            .queue
            .request(&[readable(at, 15), writable(at + 16, 1)]),
        1
    );
    assert_eq!(driver.guest.read(at + 16, 1), [FAILED]);
    // No place for a status: given back, and the device goes on.
    assert_eq!(driver.queue.request(&[readable(at, 16)]), 0);
    assert_eq!(driver.read(0, 512).0, OK);
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zero() {
    let mut driver = driver(false);
    let blocks = driver.file.metadata().unwrap().blocks();
    assert_eq!(driver.ranges(DISCARD, &[(512, 512, 0), (1536, 256, 0)]), OK);
    assert!(driver.file_bytes(512, 512 * 512).iter().all(|b| *b == 0));
    assert!(driver.file_bytes(1536, 256 * 512).iter().all(|b| *b == 0));
    assert!(driver.file_bytes(511, 512).iter().any(|b| *b != 0));
    assert!(driver.file.metadata().unwrap().blocks() < blocks);
    assert_eq!(driver.ranges(WRITE_ZEROES, &[(64, 8, 1)]), OK);
    assert!(driver.file_bytes(64, 8 * 512).iter().all(|b| *b == 0));
    let status = driver.ranges(WRITE_ZEROES, &[(8, 8, 0)]);
    // Where the file system cannot (tmpfs), the driver is told.
    assert!(status == UNSUPPORTED || driver.file_bytes(8, 8 * 512).iter().all(|b| *b == 0));
    assert_eq!(driver.file.metadata().unwrap().len(), SECTORS * SECTOR);
}

#[test]
fn bad_ranges_fail() {
    let mut driver = driver(false);
    assert_eq!(driver.request(DISCARD, 0, &[]), (FAILED, 1));
    assert_eq!(driver.ranges(DISCARD, &[(0, 1, 0); 17]), FAILED);
    assert_eq!(driver.ranges(DISCARD, &[(0, 8, 1)]), UNSUPPORTED);
    assert_eq!(driver.ranges(WRITE_ZEROES, &[(0, 8, 2)]), UNSUPPORTED);
    assert_eq!(driver.ranges(DISCARD, &[(0, u32::MAX, 0)]), FAILED);
    assert_eq!(driver.ranges(DISCARD, &[(0, 0, 0)]), OK);
    let at = driver.guest.alloc(32, 8);
    assert_eq!(driver.request(DISCARD, 0, &[readable(at, 15)]).0, FAILED);
}

#[test]
fn a_read_only_device_is_not_changed() {
    let mut driver = driver(true);
    let before = driver.file_bytes(0, 4096);
    assert_eq!(driver.write(0, &[1; 512]), FAILED);
    assert_eq!(driver.ranges(DISCARD, &[(0, 8, 0)]), FAILED);
    assert_eq!(driver.ranges(WRITE_ZEROES, &[(0, 8, 0)]), FAILED);
    assert!(driver.file_bytes(0, 4096) == before);
    assert_eq!(driver.read(0, 512).0, OK);
    assert_eq!(driver.request(SYNC, 0, &[]).0, OK);
    assert_ne!(driver.device.features() & 1 << 5, 0);
    assert_eq!(driver.device.features() & (1 << 13 | 1 << 14), 0);
}

#[test]
fn a_file_that_shrank_fails_its_requests() {
    let mut driver = driver(false);
    driver.file.set_len(4096).unwrap();
    assert_eq!(driver.read(100, 512).0, FAILED);
    assert_eq!(driver.read(0, 512).0, OK);
}

#[test]
fn the_driver_is_told_of_a_new_size() {
    let mut driver = driver(false);
    let size = driver.device.size();
    size.refresh().unwrap();
    assert_eq!(driver.guest.interrupt.config_changes(), 0);
    driver.file.set_len(2 * SECTORS * SECTOR).unwrap();
    assert_eq!(size.refresh().unwrap(), 2 * SECTORS * SECTOR);
    assert_eq!(driver.guest.interrupt.config_changes(), 1);
    assert_eq!(driver.capacity(), 2 * SECTORS);
    assert_eq!(driver.write(2 * SECTORS - 1, &[7; 512]), OK);
    driver.device.reset();
    driver.file.set_len(0).unwrap();
    size.refresh().unwrap();
    assert_eq!(driver.guest.interrupt.config_changes(), 1);
}

#[test]
fn a_file_that_refuses_writes_fails_them() {
    let file = File::open("/dev/zero").unwrap();
    let mut driver = driver_on(file, false);
    assert_eq!(driver.capacity(), 0);
    assert_eq!(driver.write(0, &[1; 512]), FAILED);
    assert_eq!(driver.request(SYNC, 0, &[]).0, FAILED);
}
