//! The device under a load, and against a guest that breaks the rules: bounds, bad packets, resets.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use super::connection::Ports;
use super::host::port_path;
use super::packet::{HEADER_LEN, Header, Op, SHUTDOWN_SEND};
use super::table::{MAX_CONNECTIONS, MAX_RESETS};
use super::vsock_test_driver::{Driver, NOTHING, read_all};
use crate::virtio::device::VirtioDevice;
use crate::virtio::testing::{readable, writable};

fn more_descriptors() {
    let limit = libc::rlimit {
        rlim_cur: 16_384,
        rlim_max: 16_384,
    };
    // SAFETY: a plain system call on a value that outlives it.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) };
    assert_eq!(result, 0, "this test needs the right to open 16384 files");
}

#[test]
fn a_thousand_connections_do_not_mix_up() {
    more_descriptors();
    let mut driver = Driver::new();
    let mut streams = Vec::new();
    for n in 0..1000 {
        streams.push(driver.host_dials(10_000 + n));
    }
    for (n, (ports, _)) in streams.iter().enumerate() {
        driver.data(*ports, format!("to {n:04}").as_bytes());
    }
    for (n, (_, stream)) in streams.iter_mut().enumerate() {
        let mut text = [0; 7];
        stream.read_exact(&mut text).unwrap();
        assert_eq!(text, format!("to {n:04}").as_bytes());
        stream.write_all(format!("from {n:04}").as_bytes()).unwrap();
    }
    let mut texts = HashMap::new();
    while texts.len() < streams.len() {
        let (header, payload) = driver.packet();
        assert_eq!(Op::from_u16(header.op), Some(Op::Data), "{header:?}");
        texts.insert(
            Ports {
                host: header.src_port,
                guest: header.dst_port,
            },
            payload,
        );
    }
    for (n, (ports, _)) in streams.iter().enumerate() {
        assert_eq!(texts[ports], format!("from {n:04}").as_bytes());
    }
}

#[test]
fn connections_are_bounded_and_a_free_place_is_used() {
    more_descriptors();
    let mut driver = Driver::new();
    let listener = UnixListener::bind(port_path(&driver.path, 1)).unwrap();
    let mut accepted = Vec::new();
    for guest in 0..MAX_CONNECTIONS as u32 {
        let ports = Ports { host: 1, guest };
        driver.say(ports, Op::Request);
        driver.expect(ports, Op::Response);
        accepted.push(listener.accept().unwrap().0);
    }
    let one_more = Ports {
        host: 1,
        guest: u32::MAX,
    };
    driver.say(one_more, Op::Request);
    driver.expect(one_more, Op::Reset);
    // Nor is there place for a client of the host: it waits at the door.
    let mut client = UnixStream::connect(&driver.path).unwrap();
    client.write_all(b"CONNECT 7\n").unwrap();
    driver.nothing_comes();
    driver.say(Ports { host: 1, guest: 5 }, Op::Reset);
    assert_eq!(driver.packet().0.dst_port, 7);
}

#[test]
fn a_busy_stream_does_not_starve_another() {
    let mut driver = Driver::new();
    driver.window = u32::MAX;
    let (busy_ports, mut busy) = driver.host_dials(1);
    let (ports, mut stream) = driver.host_dials(2);
    std::thread::spawn(move || while busy.write_all(&[0; 65_536]).is_ok() {});
    for _ in 0..100 {
        driver.expect(busy_ports, Op::Data);
    }
    stream.write_all(b"me too").unwrap();
    let mut packets = 0;
    while driver.packet().0.src_port != ports.host {
        packets += 1;
        // All buffers that were filled before it, and some in the meantime.
        assert!(packets < 2000, "starved");
    }
}

#[test]
fn packets_for_what_is_no_connection_are_reset_or_dropped() {
    let mut driver = Driver::new();
    let ports = Ports { host: 1, guest: 2 };
    for op in [
        Op::Response,
        Op::Shutdown,
        Op::Data,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        driver.say(ports, op);
        driver.expect(ports, Op::Reset);
    }
    driver.say(ports, Op::Reset);
    driver.nothing_comes();
    // From somebody else's context id: no answer.
    let forged = Header {
        src_cid: 9,
        ..driver.header(ports, Op::Request)
    };
    driver.send(forged, &[]);
    driver.nothing_comes();
    // To somebody else's, of another type, or of no known operation.
    let good = driver.header(ports, Op::Request);
    for bad in [
        Header { dst_cid: 9, ..good },
        Header {
            dst_cid: u64::MAX,
            ..good
        },
        Header { kind: 2, ..good },
        Header { kind: 0, ..good },
        Header { op: 0, ..good },
        Header { op: 99, ..good },
        Header { len: 1, ..good },
    ] {
        driver.send(bad, &[]);
        let (reset, _) = driver.packet();
        assert_eq!(Op::from_u16(reset.op), Some(Op::Reset), "{bad:?}");
        assert_eq!((reset.src_cid, reset.kind), (bad.dst_cid, bad.kind));
        assert_eq!(
            (reset.src_port, reset.dst_port),
            (bad.dst_port, bad.src_port)
        );
    }
}

#[test]
fn bad_packets_for_a_connection_reset_it_and_only_it() {
    let mut driver = Driver::new();
    let (good, mut stream) = driver.host_dials(1);
    let cases: [fn(Header) -> Header; 7] = [
        |h| Header { op: 0, ..h },
        |h| Header { op: u16::MAX, ..h },
        |h| Header {
            op: Op::Request as u16,
            ..h
        },
        |h| Header {
            op: Op::Response as u16,
            ..h
        },
        |h| Header { len: 1, ..h },
        |h| Header { len: u32::MAX, ..h },
        |h| Header {
            op: Op::Shutdown as u16,
            len: 7,
            ..h
        },
    ];
    for (n, case) in cases.into_iter().enumerate() {
        let (ports, theirs) = driver.host_dials(100 + n as u32);
        let header = case(driver.header(ports, Op::Data));
        driver.send(header, &[]);
        driver.expect(ports, Op::Reset);
        assert_eq!(read_all(&theirs), b"");
    }
    let (ports, _theirs) = driver.host_dials(99);
    driver.shut(ports, SHUTDOWN_SEND);
    driver.data(ports, b"after the end");
    driver.expect(ports, Op::Reset);

    driver.data(good, b"fine");
    let mut text = [0; 4];
    stream.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"fine");
}

#[test]
fn packets_and_buffers_too_short_for_a_header_are_given_back() {
    let mut driver = Driver::without_buffers();
    driver.send_raw(&[0; HEADER_LEN - 1]);
    let at = driver.guest.alloc(64, 8);
    let small = driver.receive.offer(&[writable(at, HEADER_LEN)]);
    let ports = Ports { host: 1, guest: 2 };
    driver.say(ports, Op::Data);
    assert_eq!(driver.receive.wait(), (small, 0));
    driver.give(1);
    driver.expect(ports, Op::Reset);
}

#[test]
fn a_guest_that_takes_no_answers_is_not_listened_to_without_bound() {
    let mut driver = Driver::without_buffers();
    let mut heads = Vec::new();
    let bytes: Vec<u8> = (0..200)
        .flat_map(|n| {
            driver
                .header(Ports { host: 1, guest: n }, Op::Data)
                .to_bytes()
        })
        .collect();
    let at = driver.guest.place(&bytes);
    for n in 0..200 {
        heads.push(
            driver
                .transmit
                .offer(&[readable(at + n * HEADER_LEN as u64, HEADER_LEN)]),
        );
    }
    driver.transmit.kick();
    for head in &heads[..MAX_RESETS] {
        assert_eq!(driver.transmit.wait().0, *head);
    }
    assert!(driver.transmit.wait_for(NOTHING).is_none());
    driver.give(128);
    for guest in 0..200 {
        driver.expect(Ports { host: 1, guest }, Op::Reset);
    }
    for head in &heads[MAX_RESETS..] {
        assert_eq!(driver.transmit.wait().0, *head);
    }
}

#[test]
fn a_reset_device_hangs_up_and_serves_again() {
    let mut driver = Driver::new();
    let (_, stream) = driver.host_dials(1);
    driver.device.reset();
    assert_eq!(read_all(&stream), b"");

    driver.receive = driver.guest.queue(0, 256);
    driver.transmit = driver.guest.queue(1, 256);
    let activation = driver
        .guest
        .activation(&[&driver.receive, &driver.transmit], 0);
    driver.device.activate(activation).unwrap();
    driver.buffers.clear();
    driver.give(16);
    driver.host_dials(1);
}

#[test]
fn a_broken_ring_stops_the_device_and_hangs_up() {
    let mut driver = Driver::new();
    let (_, stream) = driver.host_dials(1);
    driver.transmit.write_desc(0, 1 << 40, 44, 0, 0);
    driver.transmit.offer_head(0);
    driver.transmit.kick();
    driver.guest.interrupt.await_reset();
    assert_eq!(read_all(&stream), b"");
}

#[test]
fn the_socket_goes_with_the_device() {
    let driver = Driver::new();
    let path = driver.path.clone();
    assert!(path.exists());
    drop(driver.device);
    assert!(!path.exists());
}
