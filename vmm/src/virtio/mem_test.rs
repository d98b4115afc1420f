//! The device over its ring: what is plugged, what is refused, and what comes back.

use super::device::{ActivateError, DeviceType, VirtioDevice};
use super::mem::{BLOCK, Mem};
use super::mem_test_driver::{
    ACK, COUNT, ERROR, NACK, PLUG, REGION, STATE, UNPLUG, UNPLUG_ALL, driver, request,
};
use super::testing::{Guest, readable, writable};

#[test]
fn the_driver_finds_the_region_and_what_is_asked_of_it() {
    let driver = driver(3, 4);
    assert_eq!(driver.device.device_type(), DeviceType::Mem);
    let region = COUNT * BLOCK;
    assert_eq!(
        driver.config(),
        [BLOCK, 0, REGION, region, 4 * BLOCK, 0, 3 * BLOCK]
    );
    assert!(driver.control.request(6 * BLOCK, 100 * BLOCK));
    assert_eq!(driver.guest.interrupt.config_changes(), 1);
    assert_eq!(driver.config()[4..], [region, 0, 6 * BLOCK]);
    // What was usable once stays so.
    assert!(driver.control.request(0, 0));
    assert_eq!(driver.config()[4..], [region, 0, 0]);
}

#[test]
fn blocks_are_plugged_up_to_what_is_requested_and_their_memory_comes_back() {
    let mut driver = driver(5, COUNT);
    assert_eq!(driver.ask(PLUG, 0, 4), ACK);
    assert_eq!(driver.control.plugged(), 4 * BLOCK);
    assert_eq!(driver.config()[5], 4 * BLOCK);
    assert_eq!(driver.ask(PLUG, 4, 2), NACK, "more than requested");
    assert_eq!(driver.ask(PLUG, 6, 1), ACK, "anywhere in what is usable");
    assert_eq!(driver.state(0, 4), [ACK, 0]);
    assert_eq!(driver.state(4, 2), [ACK, 1]);
    assert_eq!(driver.state(3, 2), [ACK, 2]);

    driver.touch(0, 4);
    let before = driver.resident();
    assert_eq!(driver.ask(UNPLUG, 1, 2), ACK);
    assert_eq!(before - driver.resident(), 2 * 4096);
    let touched: Vec<_> = (0..4).map(|block| driver.touched(block)).collect();
    assert_eq!(touched, [true, false, false, true]);
    assert_eq!(driver.control.plugged(), 3 * BLOCK);
    assert_eq!(driver.ask(PLUG, 1, 1), ACK, "again");

    assert_eq!(driver.send(&request(UNPLUG_ALL, 0, 0)), [ACK, 0]);
    assert_eq!(driver.control.plugged(), 0);
    assert_eq!(driver.state(0, COUNT as u16), [ACK, 1]);
    assert!(!driver.touched(0));
}

#[test]
fn after_fewer_are_requested_none_is_plugged() {
    let mut driver = driver(4, COUNT);
    assert_eq!(driver.ask(PLUG, 0, 4), ACK);
    driver.control.request(2 * BLOCK, 0);
    assert_eq!(driver.ask(PLUG, 5, 1), NACK);
    assert_eq!(driver.ask(UNPLUG, 3, 1), ACK);
    assert_eq!(driver.ask(PLUG, 3, 1), NACK);
    assert_eq!(driver.control.plugged(), 3 * BLOCK);
}

#[test]
fn what_is_no_range_of_usable_blocks_is_refused() {
    let mut driver = driver(COUNT, 4);
    let ram = [REGION - BLOCK, 0, 4096, u64::MAX, u64::MAX - BLOCK + 1];
    let ranges = [
        (REGION, 0),
        (REGION, 5),
        (REGION, u16::MAX),
        (REGION + 4 * BLOCK, 1),
        (REGION + COUNT * BLOCK, 1),
        (REGION + 4096, 1),
        (REGION + BLOCK / 2, 1),
    ];
    let all = ranges.into_iter().chain(ram.map(|gpa| (gpa, 1)));
    for (gpa, blocks) in all {
        for kind in [PLUG, UNPLUG, STATE] {
            let answer = driver.send(&request(kind, gpa, blocks));
            assert_eq!(answer, [ERROR, 0], "{kind} {gpa:#x} {blocks}");
        }
    }
    assert_eq!(driver.control.plugged(), 0);
}

#[test]
fn what_is_plugged_already_or_not_at_all_is_refused_as_a_whole() {
    let mut driver = driver(COUNT, COUNT);
    assert_eq!(driver.ask(PLUG, 2, 2), ACK);
    driver.touch(2, 2);
    for (kind, first, blocks) in [
        (PLUG, 2, 1),
        (PLUG, 1, 2),
        (PLUG, 0, COUNT as u16),
        (UNPLUG, 1, 1),
        (UNPLUG, 3, 2),
        (UNPLUG, 0, COUNT as u16),
        (4, 2, 1),
        (u16::MAX, 2, 1),
    ] {
        assert_eq!(driver.ask(kind, first, blocks), ERROR, "{kind} {first}");
    }
    assert_eq!(driver.state(2, 2), [ACK, 0]);
    assert_eq!(driver.control.plugged(), 2 * BLOCK);
    assert!(driver.touched(2) && driver.touched(3));
}

#[test]
fn requests_cut_short_and_answers_without_room_do_no_harm() {
    let mut driver = driver(COUNT, COUNT);
    let whole = request(PLUG, REGION, 1);
    for length in [1, 2, 7, 8, 15, 16, 17] {
        assert_eq!(driver.send(&whole[..length]), [ERROR, 0], "{length}");
    }
    assert_eq!(driver.control.plugged(), 0);
    // Without padding at its end it is a request all the same.
    assert_eq!(driver.send(&whole[..18]), [ACK, 0]);
    let at = driver.guest.place(&request(UNPLUG_ALL, 0, 0));
    assert_eq!(driver.queue.request(&[readable(at, 24)]), 0);
    assert_eq!(driver.control.plugged(), 0);
    let at = driver.guest.place(&[0; 2]);
    assert_eq!(driver.queue.request(&[writable(at, 2)]), 2);
    assert_eq!(driver.guest.read(at, 2), ERROR.to_le_bytes());
}

#[test]
fn a_reset_leaves_blocks_plugged_and_nobody_to_ask() {
    let mut driver = driver(2, COUNT);
    assert_eq!(driver.ask(PLUG, 0, 2), ACK);
    driver.device.reset();
    assert!(!driver.control.request(0, 0));
    assert_eq!(driver.control.plugged(), 2 * BLOCK);
    driver.queue = driver.guest.queue(0, 16);
    driver
        .guest
        .activate(&mut driver.device, &[&driver.queue], 0);
    assert_eq!(driver.state(0, 2), [ACK, 0]);
    assert_eq!(driver.ask(UNPLUG, 0, 2), ACK);
}

#[test]
fn without_its_queue_the_device_does_not_start() {
    let mut device = Mem::new(REGION, BLOCK, false);
    let guest = Guest::new(1);
    let refused = device.activate(guest.activation(&[], 0));
    assert!(matches!(
        refused,
        Err(ActivateError::MissingQueues { got: 0, need: 1 })
    ));
}
