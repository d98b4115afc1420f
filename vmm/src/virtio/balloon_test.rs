//! The device over its rings; what it gives back is seen in the blocks of the memfd behind RAM.

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::balloon::{Balloon, Control, PAGE};
use super::device::{ActivateError, DeviceType, VirtioDevice};
use super::testing::{DriverQueue, Guest, HOLE, PATIENCE, readable, writable};

const STATS_VQ: u64 = 1 << 1;
const PAGE_REPORTING: u64 = 1 << 5;

struct Driver {
    guest: Guest,
    inflate: DriverQueue,
    deflate: DriverQueue,
    stats: DriverQueue,
    report: DriverQueue,
    control: Arc<Control>,
    device: Balloon,
}

/// `report` is the number of the reporting queue: 3 in Linux, 4 in the specification.
fn driver(report: u16) -> Driver {
    let mut device = Balloon::new().unwrap();
    let mut guest = Guest::new(5);
    let (inflate, deflate) = (guest.queue(0, 128), guest.queue(1, 128));
    let (stats, report) = (guest.queue(2, 16), guest.queue(report, 64));
    let queues = [&inflate, &deflate, &stats, &report];
    guest.activate(&mut device, &queues, STATS_VQ | PAGE_REPORTING);
    let control = device.control();
    Driver {
        guest,
        inflate,
        deflate,
        stats,
        report,
        control,
        device,
    }
}

impl Driver {
    /// Touches pages of RAM of its own and returns the first one's number.
    fn pages(&mut self, count: usize) -> u32 {
        let gpa = self.guest.alloc(count * PAGE as usize, PAGE);
        self.guest
            .memory
            .write_slice(&vec![7; count * PAGE as usize], GuestAddress(gpa))
            .unwrap();
        (gpa / PAGE) as u32
    }

    /// Bytes that RAM takes from the host.
    fn resident(&self) -> u64 {
        let region = self.guest.memory.iter().next().unwrap();
        region
            .file_offset()
            .unwrap()
            .file()
            .metadata()
            .unwrap()
            .blocks()
            * 512
    }

    /// Fewer pages are RAM than before, but for those that the request itself touched first.
    fn assert_freed(&self, before: u64, pages: u64) {
        let freed = (before - self.resident()) / PAGE;
        assert!(
            (pages - 8..=pages).contains(&freed),
            "{freed} pages instead of {pages}"
        );
    }

    fn page(&self, number: u32) -> Vec<u8> {
        self.guest.read(u64::from(number) * PAGE, PAGE as usize)
    }

    fn list(&mut self, numbers: &[u32]) -> u64 {
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        self.guest.place(&bytes)
    }

    fn inflate(&mut self, numbers: &[u32]) {
        let at = self.list(numbers);
        assert_eq!(self.inflate.request(&[readable(at, 4 * numbers.len())]), 0);
    }
}

#[test]
fn inflating_gives_exactly_the_listed_pages_back() {
    let mut driver = driver(3);
    let first = driver.pages(100);
    let before = driver.resident();
    // Upwards, downwards, one alone: 10..20, 39..=30, 50.
    let mut numbers: Vec<u32> = (first + 10..first + 20).collect();
    numbers.extend((first + 30..first + 40).rev());
    numbers.push(first + 50);
    driver.inflate(&numbers);
    driver.assert_freed(before, 21);
    assert_eq!(driver.control.returned(), 21 * PAGE);
    for number in first..first + 100 {
        let expected = if numbers.contains(&number) { 0 } else { 7 };
        assert!(
            driver.page(number).iter().all(|b| *b == expected),
            "{number}"
        );
    }
    let at = driver.list(&numbers);
    assert_eq!(
        driver.deflate.request(&[readable(at, 4 * numbers.len())]),
        0
    );
    driver
        .guest
        .memory
        .write_obj(9_u8, GuestAddress(u64::from(numbers[0]) * PAGE))
        .unwrap();
    assert_eq!(driver.page(numbers[0])[0], 9);
}

#[test]
fn pages_that_are_not_ram_are_left_alone() {
    let mut driver = driver(3);
    let good = driver.pages(1);
    let (hole, beyond) = ((HOLE.0 / PAGE) as u32, (HOLE.1 / PAGE) as u32 - 1);
    driver.inflate(&[hole, beyond, u32::MAX, u32::MAX - 1, good, 1 << 30]);
    assert_eq!(driver.control.returned(), PAGE);
    assert!(driver.page(good).iter().all(|b| *b == 0));
    // A run from RAM into the hole.
    driver.inflate(&[hole - 1, hole, hole + 1]);
    assert_eq!(driver.control.returned(), 2 * PAGE);
}

#[test]
fn half_numbers_and_endless_lists_do_no_harm() {
    let mut driver = driver(3);
    let number = driver.pages(1);
    let at = driver.list(&[number, number]);
    assert_eq!(driver.inflate.request(&[readable(at, 7)]), 0);
    assert_eq!(driver.control.returned(), PAGE);
    let at = driver.list(&vec![number; 100_000]);
    assert_eq!(driver.inflate.request(&[readable(at, 400_000)]), 0);
    assert_eq!(driver.inflate.request(&[writable(at, 4096)]), 0);
    assert!(driver.control.returned() < 8192 * PAGE);
}

#[test]
fn reported_pages_are_given_back_whole() {
    for number in [3, 4] {
        let mut driver = driver(number);
        let first = driver.pages(64);
        let gpa = u64::from(first) * PAGE;
        let before = driver.resident();
        let ranges = [
            writable(gpa, 16 * PAGE as usize),
            // Neither of its ends is a page's: only the seven pages in between.
            writable(gpa + 32 * PAGE + 100, 8 * PAGE as usize),
            writable(gpa + 50 * PAGE + 1, 4094),
        ];
        driver.report.request(&ranges);
        assert_eq!(driver.control.returned(), 23 * PAGE);
        driver.assert_freed(before, 23);
        assert!(driver.page(first + 15).iter().all(|b| *b == 0));
        for untouched in [16, 32, 40, 50] {
            assert!(
                driver.page(first + untouched).iter().all(|b| *b == 7),
                "{untouched}"
            );
        }
    }
}

#[test]
fn a_report_may_cross_from_one_region_of_ram_into_the_next_only_if_they_touch() {
    let mut driver = driver(3);
    driver
        .report
        .offer(&[writable(HOLE.0 - PAGE, 2 * PAGE as usize)]);
    driver.report.kick();
    driver.guest.interrupt.await_reset();
}

#[test]
fn the_target_is_told_and_what_is_held_is_heard() {
    let mut driver = driver(3);
    assert!(driver.control.set_target(100 * PAGE + 5));
    assert_eq!(driver.guest.interrupt.config_changes(), 1);
    let mut config = [0; 16];
    driver.device.read_config(0, &mut config);
    assert_eq!(config[..4], 100_u32.to_le_bytes());
    driver.device.write_config(4, &60_u32.to_le_bytes());
    assert_eq!(driver.control.held(), 60 * PAGE);
    // What is not writable is left alone.
    driver.device.write_config(0, &1_u32.to_le_bytes());
    driver.device.write_config(4, &[1, 2, 3]);
    driver.device.write_config(u64::MAX, &[1; 8]);
    driver.device.read_config(0, &mut config);
    assert_eq!(
        config[..8],
        [100_u32.to_le_bytes(), 60_u32.to_le_bytes()].concat()
    );
    driver.device.reset();
    assert_eq!(driver.control.held(), 0);
    assert!(!driver.control.set_target(0));
}

fn stat(tag: u16, value: u64) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

fn await_stats(control: &Control, expected: &[(u16, u64)]) {
    let end = Instant::now() + PATIENCE;
    while control.stats() != expected {
        assert!(Instant::now() < end, "{:?}", control.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn statistics_are_asked_for_and_kept() {
    let mut driver = driver(3);
    let at = driver.guest.place(&[stat(4, 1000), stat(5, 77)].concat());
    let head = driver.stats.offer(&[readable(at, 20)]);
    driver.stats.kick();
    await_stats(&driver.control, &[(4, 1000), (5, 77)]);
    // Asking gives the buffer back, and the driver fills it anew.
    assert_eq!(driver.stats.wait().0, head);
    let at = driver.guest.place(&[stat(4, 2000), vec![1, 2, 3]].concat());
    driver.stats.offer(&[readable(at, 13)]);
    driver.stats.kick();
    await_stats(&driver.control, &[(4, 2000)]);
}

#[test]
fn a_flood_of_statistics_is_bounded() {
    let mut driver = driver(3);
    let at = driver.guest.alloc(1 << 20, 8);
    for _ in 0..10 {
        driver.stats.offer(&[readable(at, 1 << 20)]);
    }
    driver.stats.kick();
    for _ in 0..9 {
        driver.stats.wait();
    }
    assert!(driver.control.stats().len() <= 64);
}

#[test]
fn without_both_first_queues_the_device_does_not_start() {
    let mut device = Balloon::new().unwrap();
    assert_eq!(device.device_type(), DeviceType::Balloon);
    let mut guest = Guest::new(5);
    let inflate = guest.queue(0, 128);
    let refused = device.activate(guest.activation(&[&inflate], 0));
    assert!(matches!(
        refused,
        Err(ActivateError::MissingQueues { got: 1, need: 2 })
    ));
}
