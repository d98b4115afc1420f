//! The front end against a back end in a thread, over a real vhost-user connection.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::device::{ActivateError, DeviceType, Interrupt, VirtioDevice};
use super::features;
use super::fs::{Fs, FsError, TAG_LEN};
use super::fs_test_backend::server;
use super::testing::{DriverQueue, Guest, PATIENCE, readable, writable};

fn reverse(guest: &mut Guest, queue: &mut DriverQueue, text: &[u8]) {
    let (from, to) = (guest.place(text), guest.alloc(text.len(), 8));
    let written = queue.request(&[readable(from, text.len()), writable(to, text.len())]);
    assert_eq!(written as usize, text.len());
    let expected: Vec<u8> = text.iter().rev().copied().collect();
    assert_eq!(guest.read(to, text.len()), expected);
}

#[test]
fn the_tag_and_the_number_of_request_queues_are_in_the_configuration() {
    let (_server, stream) = server(3);
    let fs = Fs::new("sepal", stream, 2).unwrap();
    assert_eq!(fs.device_type(), DeviceType::Fs);
    assert_eq!(fs.queue_sizes().len(), 3);
    let mut config = [1; TAG_LEN + 8];
    fs.read_config(0, &mut config);
    assert_eq!(&config[..6], b"sepal\0");
    assert_eq!(config[TAG_LEN..], [2, 0, 0, 0, 0, 0, 0, 0]);
    // Only what concerns the guest is offered to it.
    assert_eq!(fs.features(), features::RING);
}

#[test]
fn requests_pass_through_the_back_end_and_survive_a_reset() {
    let (_server, stream) = server(2);
    let mut fs = Fs::new("sepal", stream, 1).unwrap();
    for _ in 0..3 {
        let mut guest = Guest::new(2);
        let (urgent, mut requests) = (guest.queue(0, 128), guest.queue(1, 512));
        guest.activate(&mut fs, &[&urgent, &requests], 0);
        for _ in 0..20 {
            reverse(&mut guest, &mut requests, b"a request of the file system");
        }
        // The interrupts came by the transport's descriptor.
        let call = guest.interrupt.used_fd(1).unwrap();
        let mut count = [0; 8];
        assert_eq!(nix::unistd::read(call, &mut count), Ok(8));
        assert!(u64::from_ne_bytes(count) > 0);
        fs.reset();
        // Nobody serves the queue now.
        let at = guest.place(b"late");
        requests.offer(&[readable(at, 4), writable(at, 4)]);
        requests.kick();
        assert!(requests.wait_for(Duration::from_millis(100)).is_none());
        assert!(!guest.interrupt.wants_reset());
    }
}

#[test]
fn a_back_end_that_dies_asks_for_a_reset() {
    let (server, stream) = server(2);
    let mut fs = Fs::new("sepal", stream, 1).unwrap();
    let mut guest = Guest::new(2);
    let (urgent, mut requests) = (guest.queue(0, 128), guest.queue(1, 512));
    guest.activate(&mut fs, &[&urgent, &requests], 0);
    reverse(&mut guest, &mut requests, b"alive");
    server.die();
    guest.interrupt.await_reset();
    // The driver's reset ends in bounded time, and there is no way back.
    let start = Instant::now();
    fs.reset();
    let again = fs.activate(guest.activation(&[&urgent, &requests], 0));
    assert!(matches!(again, Err(ActivateError::Vhost(_))));
    assert!(start.elapsed() < PATIENCE);
}

#[test]
fn a_back_end_that_is_none_is_refused() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    assert!(matches!(Fs::new("sepal", ours, 1), Err(FsError::Vhost(_))));
}

#[test]
fn a_back_end_with_too_few_queues_is_refused() {
    let (_server, stream) = server(2);
    assert!(matches!(
        Fs::new("sepal", stream, 2),
        Err(FsError::Lacks(_))
    ));
}

#[test]
fn a_tag_without_place_is_refused() {
    for tag in ["", "a\0b", "0123456789012345678901234567890123456"] {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert!(matches!(Fs::new(tag, ours, 1), Err(FsError::Tag(_))));
    }
}

#[test]
fn without_a_request_queue_the_device_does_not_start() {
    let (_server, stream) = server(2);
    let mut fs = Fs::new("sepal", stream, 1).unwrap();
    let mut guest = Guest::new(2);
    let urgent = guest.queue(0, 128);
    let refused = fs.activate(guest.activation(&[&urgent], 0));
    assert!(matches!(
        refused,
        Err(ActivateError::MissingQueues { got: 1, need: 2 })
    ));
}
