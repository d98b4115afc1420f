//! A ring against a driver that does as it should, and against one that does not.

use std::os::fd::AsFd;

use super::device::Interrupt;
use super::error::{DeviceError, RingError};
use super::features::EVENT_IDX;
use super::ring::{Chain, Ring};
use super::testing::{
    DriverQueue, Guest, HOLE, INDIRECT, NEXT, TestInterrupt, WRITE, readable, writable,
};

const SIZE: u16 = 16;

fn guest() -> (Guest, DriverQueue) {
    let mut guest = Guest::new(1);
    let queue = guest.queue(0, SIZE);
    (guest, queue)
}

fn ring<'m>(guest: &'m Guest, queue: &DriverQueue, features: u64) -> Ring<'m> {
    Ring::new(
        queue.active(),
        &guest.memory,
        guest.interrupt.clone(),
        features,
    )
}

fn refusal(result: Result<Option<Chain<'_>>, DeviceError>) -> RingError {
    match result {
        Err(DeviceError::Ring { queue: 0, source }) => source,
        Err(other) => panic!("another error: {other:?}"),
        Ok(chain) => panic!("accepted: {:?}", chain.map(|c| c.head)),
    }
}

#[test]
fn a_chain_is_read_and_answered_across_its_buffers() {
    let (mut guest, mut queue) = guest();
    let (a, b) = (guest.place(b"hel"), guest.place(b"lo, device"));
    let (c, d) = (guest.alloc(4, 1), guest.alloc(8, 1));
    let head = queue.offer(&[
        readable(a, 3),
        readable(b, 10),
        writable(c, 4),
        writable(d, 8),
    ]);
    let mut ring = ring(&guest, &queue, 0);
    let mut chain = ring.pop().unwrap().unwrap();
    assert_eq!(
        (chain.head, chain.readable.len(), chain.writable.len()),
        (head, 13, 12)
    );
    assert_eq!(chain.readable.read_array::<5>().unwrap(), *b"hello");
    assert_eq!(chain.readable.read_array::<9>(), None);
    assert_eq!(chain.readable.take(2).len(), 2);
    let mut rest = [0; 16];
    assert_eq!(chain.readable.read(&mut rest), 6);
    assert_eq!(&rest[..6], b"device");
    assert_eq!(chain.writable.write(b"answ"), 4);
    assert_eq!(chain.writable.write(b"ered, too long"), 8);
    ring.complete(head, 12).unwrap();
    ring.notify().unwrap();
    assert!(ring.pop().unwrap().is_none());
    drop(ring);
    assert_eq!(queue.wait(), (head, 12));
    assert_eq!(guest.interrupt.count(0), 1);
    assert_eq!(
        [guest.read(c, 4), guest.read(d, 8)].concat(),
        b"answered, to"
    );
}

#[test]
fn file_input_and_output_goes_straight_to_and_from_the_buffers() {
    let (mut guest, mut queue) = guest();
    let text: Vec<u8> = (0..=255).cycle().take(9000).collect();
    let from = guest.place(&text);
    let to = guest.alloc(9000, 1);
    queue.offer(&[
        readable(from, 4000),
        readable(from + 4000, 5000),
        writable(to, 9000),
    ]);
    let mut ring = ring(&guest, &queue, 0);
    let mut chain = ring.pop().unwrap().unwrap();
    let file = tempfile::tempfile().unwrap();
    let mut first = chain.readable.take(4500);
    assert_eq!(first.write_to_at(file.as_fd(), 0).unwrap(), 4500);
    assert_eq!(
        chain.readable.write_to_at(file.as_fd(), 4500).unwrap(),
        4500
    );
    assert!(chain.readable.is_empty());
    assert_eq!(chain.writable.read_from_at(file.as_fd(), 0).unwrap(), 9000);
    assert_eq!(guest.read(to, 9000), text);
}

#[test]
fn a_buffer_may_cross_from_one_region_of_ram_into_the_next_but_not_into_the_hole() {
    let (guest, mut queue) = guest();
    queue.offer(&[readable(HOLE.0 - 8, 8)]);
    queue.offer(&[readable(HOLE.0 - 8, 9)]);
    let mut ring = ring(&guest, &queue, 0);
    assert_eq!(ring.pop().unwrap().unwrap().readable.len(), 8);
    assert!(matches!(
        refusal(ring.pop()),
        RingError::NotRam { len: 9, .. }
    ));
}

#[test]
fn an_indirect_table_is_followed() {
    let (mut guest, mut queue) = guest();
    let (a, b, table) = (guest.place(b"in"), guest.alloc(3, 1), guest.alloc(32, 16));
    queue.write_desc_at(table, a, 2, NEXT, 1);
    queue.write_desc_at(table + 16, b, 3, WRITE, 0);
    queue.write_desc(5, table, 32, INDIRECT, 0);
    queue.offer_head(5);
    let mut ring = ring(&guest, &queue, 0);
    let mut chain = ring.pop().unwrap().unwrap();
    assert_eq!((chain.head, chain.writable.len()), (5, 3));
    assert_eq!(chain.readable.read_array::<2>().unwrap(), *b"in");
}

#[test]
fn a_loop_is_refused() {
    let (mut guest, mut queue) = guest();
    let a = guest.alloc(8, 8);
    queue.write_desc(0, a, 8, NEXT, 1);
    queue.write_desc(1, a, 8, NEXT, 0);
    queue.offer_head(0);
    assert!(matches!(
        refusal(ring(&guest, &queue, 0).pop()),
        RingError::Unterminated { head: 0 }
    ));
}

#[test]
fn a_link_out_of_the_table_is_refused() {
    let (mut guest, mut queue) = guest();
    let a = guest.alloc(8, 8);
    queue.write_desc(3, a, 8, NEXT, SIZE);
    queue.offer_head(3);
    assert!(matches!(
        refusal(ring(&guest, &queue, 0).pop()),
        RingError::Unterminated { head: 3 }
    ));
}

#[test]
fn a_head_out_of_the_table_is_refused() {
    for head in [SIZE, u16::MAX] {
        let (guest, mut queue) = guest();
        queue.offer_head(head);
        assert!(matches!(
            refusal(ring(&guest, &queue, 0).pop()),
            RingError::Head { .. }
        ));
    }
}

#[test]
fn buffers_outside_of_ram_are_refused() {
    for (gpa, len) in [
        (HOLE.0, 1),
        (u64::MAX, 1),
        (u64::MAX - 7, 16),
        (0x1000, u32::MAX),
        (1 << 40, 4096),
    ] {
        let (guest, mut queue) = guest();
        queue.write_desc(0, gpa, len, 0, 0);
        queue.offer_head(0);
        assert!(matches!(
            refusal(ring(&guest, &queue, 0).pop()),
            RingError::NotRam { .. }
        ));
    }
}

#[test]
fn an_empty_buffer_is_refused() {
    let (guest, mut queue) = guest();
    queue.write_desc(0, 0x1000, 0, 0, 0);
    queue.offer_head(0);
    assert!(matches!(
        refusal(ring(&guest, &queue, 0).pop()),
        RingError::ZeroLength { head: 0 }
    ));
}

#[test]
fn a_readable_buffer_behind_a_writable_one_is_refused() {
    let (mut guest, mut queue) = guest();
    let a = guest.alloc(8, 8);
    queue.offer(&[writable(a, 4), readable(a, 4)]);
    assert!(matches!(
        refusal(ring(&guest, &queue, 0).pop()),
        RingError::Order { .. }
    ));
}

#[test]
fn an_indirect_table_in_an_indirect_table_is_refused() {
    let (mut guest, mut queue) = guest();
    let (outer, inner, a) = (guest.alloc(32, 16), guest.alloc(16, 16), guest.alloc(8, 8));
    queue.write_desc_at(inner, a, 8, 0, 0);
    // As the table's first entry, and behind a good one.
    for good_ones in 0..2 {
        let at = outer + 16 * good_ones;
        queue.write_desc_at(outer, a, 8, NEXT, 1);
        queue.write_desc_at(at, inner, 16, INDIRECT, 0);
        queue.write_desc(0, outer, 32, INDIRECT, 0);
        queue.offer_head(0);
        let mut ring = ring(&guest, &queue, 0);
        for _ in 0..good_ones {
            refusal(ring.pop());
        }
        assert!(matches!(
            refusal(ring.pop()),
            RingError::Unterminated { head: 0 }
        ));
    }
}

#[test]
fn bad_indirect_tables_are_refused() {
    for (gpa, len) in [(0x2000, 0), (0x2000, 17), (HOLE.0, 16), (0x2000, 16 << 16)] {
        let (guest, mut queue) = guest();
        queue.write_desc(0, gpa, len, INDIRECT, 0);
        queue.offer_head(0);
        let refusal = refusal(ring(&guest, &queue, 0).pop());
        assert!(
            matches!(
                refusal,
                RingError::Unterminated { .. } | RingError::ZeroLength { .. }
            ),
            "{refusal:?}"
        );
    }
}

#[test]
fn a_chain_of_thousands_of_buffers_is_refused() {
    let (mut guest, mut queue) = guest();
    let (table, a) = (guest.alloc(16 * 4096, 16), guest.alloc(8, 8));
    for n in 0..4096_u16 {
        queue.write_desc_at(table + 16 * u64::from(n), a, 8, NEXT, n + 1);
    }
    queue.write_desc(0, table, 16 * 4096, INDIRECT, 0);
    queue.offer_head(0);
    assert!(matches!(
        refusal(ring(&guest, &queue, 0).pop()),
        RingError::TooLong { .. }
    ));
}

#[test]
fn an_index_that_ran_away_is_refused() {
    let (guest, queue) = guest();
    queue.set_available_index(SIZE + 1);
    assert!(matches!(
        refusal(ring(&guest, &queue, 0).pop()),
        RingError::Ring(_)
    ));
}

#[test]
fn requests_put_back_come_again() {
    let (mut guest, mut queue) = guest();
    let a = guest.alloc(8, 8);
    let heads: Vec<u16> = (0..3).map(|_| queue.offer(&[writable(a, 8)])).collect();
    let mut ring = ring(&guest, &queue, 0);
    assert_eq!(ring.pop().unwrap().unwrap().head, heads[0]);
    ring.pop().unwrap().unwrap();
    ring.pop().unwrap().unwrap();
    ring.undo(2);
    assert_eq!(ring.pop().unwrap().unwrap().head, heads[1]);
}

#[test]
fn serving_stops_after_a_ring_full_and_says_so() {
    let (mut guest, mut queue) = guest();
    let a = guest.alloc(8, 8);
    for _ in 0..SIZE {
        queue.offer(&[writable(a, 8)]);
    }
    let mut ring = ring(&guest, &queue, 0);
    assert!(ring.serve(|_| Ok(3)).unwrap());
    assert!(!ring.serve(|_| Ok(3)).unwrap());
    for _ in 0..SIZE {
        assert_eq!(queue.wait().1, 3);
    }
    assert!(queue.used().is_none());
}

#[test]
fn with_event_indexes_only_wanted_interrupts_are_raised() {
    let (mut guest, mut queue) = guest();
    let a = guest.alloc(8, 8);
    for _ in 0..4 {
        queue.offer(&[writable(a, 8)]);
    }
    // The driver wants to hear of the third request only.
    queue.set_used_event(2);
    let mut ring = ring(&guest, &queue, EVENT_IDX);
    let mut interrupts = Vec::new();
    for _ in 0..4 {
        let head = ring.pop().unwrap().unwrap().head;
        ring.complete(head, 0).unwrap();
        ring.notify().unwrap();
        interrupts.push(guest.interrupt.count(0));
    }
    assert_eq!(interrupts, [0, 0, 1, 1]);
    // And the device says from where on it wants kicks.
    assert!(!ring.enable_kicks().unwrap());
    assert_eq!(queue.available_event(), 4);
}

#[test]
fn the_interrupt_stand_in_has_a_descriptor_for_each_queue() {
    let interrupt = TestInterrupt::new(2);
    assert!(interrupt.used_fd(1).is_some());
    assert!(interrupt.used_fd(2).is_none());
}
