//! Streams between real Unix sockets and a guest driver over real rings: what flows, what does not,
//! and how it ends.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use sepal_protocol::ports::GUEST_CID;

use super::connection::{BUFFER, Ports};
use super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::vsock_test_driver::{Driver, NOTHING, read_all};
use crate::virtio::device::VirtioDevice;
use crate::virtio::testing::{Noise, PATIENCE};

#[test]
fn the_driver_reads_its_context_id() {
    let driver = Driver::new();
    let mut cid = [0; 8];
    driver.device.read_config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), GUEST_CID);
}

#[test]
fn sixty_four_mebibytes_pass_in_both_directions_at_once_through_small_windows() {
    const TOTAL: usize = 64 << 20;
    const PIECE: usize = 16 * 1024;
    let mut driver = Driver::new();
    driver.window = 24 * 1024;
    let (ports, stream) = driver.host_dials(1024);

    let (mut to_guest, mut from_guest) = (stream.try_clone().unwrap(), stream);
    let writer = std::thread::spawn(move || {
        let (mut noise, mut piece) = (Noise(1), vec![0; PIECE]);
        for _ in 0..TOTAL / PIECE {
            noise.fill(&mut piece);
            to_guest.write_all(&piece).unwrap();
        }
        to_guest.shutdown(Shutdown::Write).unwrap();
    });
    // Nobody reads until the guest has used up its credit.
    let (start, started) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        started.recv().unwrap();
        let (mut noise, mut expected, mut piece) = (Noise(2), vec![0; PIECE], vec![0; PIECE]);
        for _ in 0..TOTAL / PIECE {
            noise.fill(&mut expected);
            from_guest.read_exact(&mut piece).unwrap();
            assert!(piece == expected, "bytes from the guest were changed");
        }
        assert_eq!(from_guest.read(&mut piece).unwrap(), 0);
    });

    // The guest's side, with the credit of both ends.
    let (mut noise_in, mut noise_out) = (Noise(1), Noise(2));
    let mut pending: VecDeque<u8> = VecDeque::new();
    let (mut received, mut sent) = (0_usize, 0_usize);
    let (mut room, mut forwarded) = (BUFFER, 0_u32);
    let (mut piece, mut expected) = (vec![0; PIECE], vec![0; PIECE]);
    let mut host_finished = false;
    while sent < TOTAL || !host_finished {
        let credit = room.wrapping_add(forwarded).wrapping_sub(sent as u32);
        let sendable = sent < TOTAL && credit as usize >= PIECE;
        if sendable {
            noise_out.fill(&mut piece);
            let header = Header {
                len: PIECE as u32,
                fwd_cnt: (received - pending.len()) as u32,
                ..driver.header(ports, Op::Data)
            };
            driver.send(header, &piece);
            sent += PIECE;
            if sent == TOTAL {
                let flags = SHUTDOWN_SEND;
                let fwd_cnt = (received - pending.len()) as u32;
                let header = Header {
                    flags,
                    fwd_cnt,
                    ..driver.header(ports, Op::Shutdown)
                };
                driver.send(header, &[]);
            }
        } else {
            let _ = start.send(());
        }
        let patience = if sent < TOTAL {
            Duration::ZERO
        } else {
            PATIENCE
        };
        while let Some((header, payload)) = driver.packet_within(patience) {
            (room, forwarded) = (header.buf_alloc, header.fwd_cnt);
            match Op::from_u16(header.op).unwrap() {
                Op::Data => {
                    received += payload.len();
                    pending.extend(payload);
                    assert!(
                        pending.len() <= driver.window as usize,
                        "sent beyond the credit"
                    );
                }
                Op::Shutdown => host_finished = header.flags & SHUTDOWN_SEND != 0,
                Op::CreditUpdate | Op::CreditRequest => {}
                other => panic!("{other:?}"),
            }
            if pending.len() >= PIECE {
                for byte in &mut piece {
                    *byte = pending.pop_front().unwrap();
                }
                noise_in.fill(&mut expected);
                assert!(piece == expected, "bytes from the host were changed");
                let fwd_cnt = (received - pending.len()) as u32;
                let header = Header {
                    fwd_cnt,
                    ..driver.header(ports, Op::CreditUpdate)
                };
                driver.send(header, &[]);
            }
            if host_finished {
                break;
            }
        }
    }
    assert_eq!((received, pending.len()), (TOTAL, 0));
    writer.join().unwrap();
    reader.join().unwrap();
    driver.shut(ports, SHUTDOWN_BOTH);
    loop {
        match Op::from_u16(driver.packet().0.op) {
            Some(Op::Reset) => break,
            Some(Op::CreditUpdate | Op::Shutdown) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn the_guest_dials_the_host() {
    let mut driver = Driver::new();
    let ports = Ports {
        host: 1025,
        guest: 5000,
    };
    let mut stream = driver.guest_dials(ports);
    driver.data(ports, b"ready\n");
    let mut line = [0; 6];
    stream.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"ready\n");
    stream.write_all(b"thanks").unwrap();
    assert_eq!(driver.collect(ports, 6), b"thanks");
}

#[test]
fn dialling_a_port_without_listener_is_reset() {
    let mut driver = Driver::new();
    let ports = Ports {
        host: 99,
        guest: 5000,
    };
    driver.say(ports, Op::Request);
    driver.expect(ports, Op::Reset);
    driver.nothing_comes();
}

#[test]
fn a_guest_that_refuses_ends_the_clients_connection() {
    let mut driver = Driver::new();
    let mut stream = UnixStream::connect(&driver.path).unwrap();
    stream.write_all(b"CONNECT 7\n").unwrap();
    let (request, _) = driver.packet();
    driver.say(
        Ports {
            host: request.src_port,
            guest: 7,
        },
        Op::Reset,
    );
    assert_eq!(read_all(&stream), b"");
    driver.nothing_comes();
}

#[test]
fn a_client_that_gives_up_dialling_resets_the_guests_end() {
    let mut driver = Driver::new();
    let mut stream = UnixStream::connect(&driver.path).unwrap();
    stream.write_all(b"CONNECT 7\n").unwrap();
    let (request, _) = driver.packet();
    drop(stream);
    let ports = Ports {
        host: request.src_port,
        guest: 7,
    };
    driver.expect(ports, Op::Reset);
    // An answer that crossed it.
    driver.say(ports, Op::Response);
    driver.expect(ports, Op::Reset);
}

#[test]
fn a_client_that_speaks_another_language_is_turned_away() {
    let mut driver = Driver::new();
    let mut stream = UnixStream::connect(&driver.path).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let end = stream.read(&mut [0; 8]);
    let turned_away =
        matches!(&end, Ok(0)) || end.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset);
    assert!(turned_away);
    driver.nothing_comes();
}

#[test]
fn bytes_sent_right_behind_the_connect_line_reach_the_guest() {
    let mut driver = Driver::new();
    let mut stream = UnixStream::connect(&driver.path).unwrap();
    stream.write_all(b"CONNECT 7\nhasty").unwrap();
    let (request, _) = driver.packet();
    let ports = Ports {
        host: request.src_port,
        guest: 7,
    };
    driver.nothing_comes();
    driver.say(ports, Op::Response);
    assert_eq!(driver.collect(ports, 5), b"hasty");
}

#[test]
fn the_hosts_half_close_comes_behind_its_last_byte_and_leaves_the_other_half_open() {
    let mut driver = Driver::new();
    let (ports, mut stream) = driver.host_dials(1);
    stream.write_all(&[7; 10_000]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(driver.collect(ports, 10_000), [7; 10_000]);
    let (shutdown, _) = driver.expect(ports, Op::Shutdown);
    assert_eq!(shutdown.flags, SHUTDOWN_SEND);
    driver.data(ports, b"still talking");
    let mut bytes = [0; 13];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"still talking");
    driver.data(ports, b"last words");
    driver.shut(ports, SHUTDOWN_BOTH);
    driver.expect(ports, Op::Reset);
    assert_eq!(read_all(&stream), b"last words");
}

#[test]
fn the_guests_half_close_leaves_the_other_half_open() {
    let mut driver = Driver::new();
    let (ports, mut stream) = driver.host_dials(1);
    driver.data(ports, b"question");
    driver.shut(ports, SHUTDOWN_SEND);
    assert_eq!(read_all(&stream), b"question");
    stream.write_all(&[1; 9000]).unwrap();
    assert_eq!(driver.collect(ports, 9000), [1; 9000]);
    drop(stream);
    let mut flags = 0;
    while flags != SHUTDOWN_BOTH {
        flags = driver.expect(ports, Op::Shutdown).0.flags;
    }
    driver.say(ports, Op::Reset);
    driver.nothing_comes();
}

#[test]
fn what_the_guest_wrote_before_it_closed_reaches_a_slow_reader() {
    for reset_by_guest in [false, true] {
        let mut driver = Driver::new();
        let (ports, stream) = driver.host_dials(1);
        // Fill the socket and the connection's buffer behind it: some is left in the device.
        let (mut noise, mut piece, mut sent) = (Noise(3), vec![0; 4096], Vec::new());
        let (mut room, mut forwarded) = (BUFFER, 0_u32);
        loop {
            while let Some((header, _)) = driver.packet_within(NOTHING) {
                (room, forwarded) = (header.buf_alloc, header.fwd_cnt);
            }
            let credit = room - (sent.len() as u32 - forwarded);
            if credit < piece.len() as u32 {
                break;
            }
            for _ in 0..credit as usize / piece.len() {
                noise.fill(&mut piece);
                driver.data(ports, &piece);
                sent.extend_from_slice(&piece);
            }
        }
        driver.shut(ports, SHUTDOWN_BOTH);
        if reset_by_guest {
            // As Linux does when the answer to its SHUTDOWN takes too long.
            driver.say(ports, Op::Reset);
            driver.nothing_comes();
            assert!(read_all(&stream) == sent);
        } else {
            // The answer must not come while bytes are on their way.
            driver.nothing_comes();
            assert!(read_all(&stream) == sent);
            driver.expect(ports, Op::Reset);
        }
    }
}

#[test]
fn a_closed_host_end_is_told_behind_its_last_byte() {
    let mut driver = Driver::new();
    driver.window = 4096;
    let (ports, mut stream) = driver.host_dials(1);
    stream.write_all(&[5; 20_000]).unwrap();
    drop(stream);
    let mut got = 0;
    loop {
        let (header, payload) = driver.packet();
        got += payload.len();
        match Op::from_u16(header.op).unwrap() {
            Op::Data | Op::CreditRequest => {
                let header = Header {
                    fwd_cnt: got as u32,
                    ..driver.header(ports, Op::CreditUpdate)
                };
                driver.send(header, &[]);
            }
            Op::Shutdown => {
                assert_eq!((header.flags, got), (SHUTDOWN_BOTH, 20_000));
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    driver.say(ports, Op::Reset);
    driver.nothing_comes();
}

#[test]
fn the_guest_learns_that_nobody_reads_any_more() {
    let mut driver = Driver::new();
    let (ports, stream) = driver.host_dials(1);
    stream.shutdown(Shutdown::Read).unwrap();
    driver.data(ports, b"into the void");
    let (shutdown, _) = driver.expect(ports, Op::Shutdown);
    assert_eq!(shutdown.flags, SHUTDOWN_RECEIVE);
}

#[test]
fn the_host_learns_that_the_guest_reads_no_more() {
    let mut driver = Driver::new();
    let (ports, mut stream) = driver.host_dials(1);
    driver.shut(ports, SHUTDOWN_RECEIVE);
    let end = Instant::now() + PATIENCE;
    while stream.write_all(&[0; 1000]).is_ok() {
        assert!(Instant::now() < end);
    }
    driver.data(ports, b"but writes");
    let mut bytes = [0; 10];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"but writes");
}

#[test]
fn a_guest_without_room_holds_the_host_back() {
    let mut driver = Driver::new();
    driver.window = 5000;
    let (ports, mut stream) = driver.host_dials(1);
    stream.set_write_timeout(Some(NOTHING)).unwrap();
    let mut written = 0;
    while let Ok(count) = stream.write(&[9; 1000]) {
        written += count;
        assert!(written < 10 << 20, "the device buffers without bound");
    }
    assert_eq!(driver.collect(ports, 5000), [9; 5000]);
    // It asks for credit once, and does not insist when there is none.
    driver.expect(ports, Op::CreditRequest);
    driver.say(ports, Op::CreditUpdate);
    driver.nothing_comes();
    let header = Header {
        fwd_cnt: 5000,
        ..driver.header(ports, Op::CreditUpdate)
    };
    driver.send(header, &[]);
    assert_eq!(driver.collect(ports, 5000), [9; 5000]);
}

#[test]
fn a_guest_that_sends_beyond_its_credit_is_reset() {
    let mut driver = Driver::new();
    let (ports, _stream) = driver.host_dials(1);
    // Nobody reads: at most the socket's buffer and the device's fit.
    let piece = vec![0; 32 * 1024];
    for _ in 0..64 {
        driver.data(ports, &piece);
    }
    loop {
        match Op::from_u16(driver.packet().0.op).unwrap() {
            Op::CreditUpdate => {}
            Op::Reset => break,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn credit_is_told_on_request() {
    let mut driver = Driver::new();
    let (ports, mut stream) = driver.host_dials(1);
    driver.data(ports, &[1; 100]);
    stream.read_exact(&mut [0; 100]).unwrap();
    driver.say(ports, Op::CreditRequest);
    let (update, _) = driver.expect(ports, Op::CreditUpdate);
    assert_eq!((update.buf_alloc, update.fwd_cnt), (BUFFER, 100));
}

#[test]
fn a_stream_with_nothing_to_say_does_not_end_the_next_one() {
    let mut driver = Driver::without_buffers();
    driver.give(4);
    let (quiet_ports, mut quiet) = driver.host_dials(1);
    let (ports, mut stream) = driver.host_dials(2);
    for _ in 0..200 {
        // Both are woken at once, and the quiet one has nothing any more at its second turn.
        quiet.write_all(b"q").unwrap();
        stream.write_all(b"s").unwrap();
        let mut spoke = [driver.packet(), driver.packet()].map(|(header, payload)| {
            assert_eq!(Op::from_u16(header.op), Some(Op::Data), "{header:?}");
            (header.src_port, payload)
        });
        spoke.sort();
        assert_eq!(
            spoke,
            [(quiet_ports.host, b"q".into()), (ports.host, b"s".into())]
        );
    }
}
