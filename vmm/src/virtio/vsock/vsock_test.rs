//! The device between real Unix sockets and a guest driver over real rings.

use std::collections::{HashMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use sepal_protocol::ports::{GUEST_CID, HOST_CID};

use super::Vsock;
use super::connection::{BUFFER, Ports};
use super::host::port_path;
use super::packet::{
    HEADER_LEN, Header, MAX_PAYLOAD, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
    TYPE_STREAM,
};
use super::table::{MAX_CONNECTIONS, MAX_RESETS};
use crate::virtio::device::VirtioDevice;
use crate::virtio::testing::{DriverQueue, Guest, PATIENCE, readable, writable};

/// As large as Linux's receive buffers.
const RECEIVE_BUFFER: usize = 4096;
/// Long enough to be sure that nothing comes.
const NOTHING: Duration = Duration::from_millis(100);

/// The guest's driver: rings, and packets out of and into them.
struct Driver {
    guest: Guest,
    receive: DriverQueue,
    transmit: DriverQueue,
    /// Buffer of each receive chain by its head.
    buffers: HashMap<u16, u64>,
    outgoing: u64,
    /// What each header says of the guest's buffer.
    window: u32,
    device: Vsock,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Driver {
    fn new() -> Self {
        let mut driver = Self::without_buffers();
        driver.give(128);
        driver
    }

    fn without_buffers() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let mut device = Vsock::new(GUEST_CID, path.clone()).unwrap();
        let mut guest = Guest::new(3);
        let (receive, transmit) = (guest.queue(0, 256), guest.queue(1, 256));
        let events = guest.queue(2, 16);
        guest.activate(&mut device, &[&receive, &transmit, &events], 0);
        let outgoing = guest.alloc(HEADER_LEN + MAX_PAYLOAD, 8);
        let (buffers, window) = (HashMap::new(), 256 * 1024);
        Self {
            guest,
            receive,
            transmit,
            buffers,
            outgoing,
            window,
            device,
            path,
            _dir: dir,
        }
    }

    fn give(&mut self, count: usize) {
        for _ in 0..count {
            let gpa = self.guest.alloc(RECEIVE_BUFFER, 8);
            self.give_one(gpa);
        }
        self.receive.kick();
    }

    fn give_one(&mut self, gpa: u64) {
        let head = self.receive.offer(&[writable(gpa, RECEIVE_BUFFER)]);
        self.buffers.insert(head, gpa);
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        let bytes = [&header.to_bytes(), payload].concat();
        self.send_raw(&bytes);
    }

    fn send_raw(&mut self, bytes: &[u8]) {
        use vm_memory::{Bytes, GuestAddress};
        self.guest
            .memory
            .write_slice(bytes, GuestAddress(self.outgoing))
            .unwrap();
        self.transmit
            .request(&[readable(self.outgoing, bytes.len())]);
    }

    fn header(&self, ports: Ports, op: Op) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: ports.guest,
            dst_port: ports.host,
            kind: TYPE_STREAM,
            op: op as u16,
            buf_alloc: self.window,
            ..Header::default()
        }
    }

    fn say(&mut self, ports: Ports, op: Op) {
        let header = self.header(ports, op);
        self.send(header, &[]);
    }

    fn shut(&mut self, ports: Ports, flags: u32) {
        let header = Header {
            flags,
            ..self.header(ports, Op::Shutdown)
        };
        self.send(header, &[]);
    }

    fn data(&mut self, ports: Ports, payload: &[u8]) {
        let header = Header {
            len: payload.len() as u32,
            ..self.header(ports, Op::Data)
        };
        self.send(header, payload);
    }

    fn packet_within(&mut self, patience: Duration) -> Option<(Header, Vec<u8>)> {
        let (head, written) = self.receive.wait_for(patience)?;
        let gpa = self.buffers.remove(&head).unwrap();
        let bytes = self.guest.read(gpa, written as usize);
        self.give_one(gpa);
        self.receive.kick();
        let header = Header::parse(&bytes[..HEADER_LEN].try_into().unwrap());
        assert_eq!(header.len as usize, bytes.len() - HEADER_LEN);
        Some((header, bytes[HEADER_LEN..].to_vec()))
    }

    fn packet(&mut self) -> (Header, Vec<u8>) {
        self.packet_within(PATIENCE).expect("no packet came")
    }

    fn nothing_comes(&mut self) {
        let packet = self.packet_within(NOTHING);
        assert!(packet.is_none(), "unexpected {packet:?}");
    }

    /// Waits for a packet that says this for these ports.
    fn expect(&mut self, ports: Ports, op: Op) -> (Header, Vec<u8>) {
        let (header, payload) = self.packet();
        let got = Ports {
            host: header.src_port,
            guest: header.dst_port,
        };
        assert_eq!(
            (got, Op::from_u16(header.op)),
            (ports, Some(op)),
            "{header:?}"
        );
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST_CID));
        assert_eq!(header.kind, TYPE_STREAM);
        (header, payload)
    }

    /// Collects data up to a length.
    fn collect(&mut self, ports: Ports, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            bytes.extend(self.expect(ports, Op::Data).1);
        }
        assert_eq!(bytes.len(), len);
        bytes
    }

    /// A program of the host dials a port of the guest, which accepts.
    fn host_dials(&mut self, guest: u32) -> (Ports, UnixStream) {
        let mut stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
            .write_all(format!("CONNECT {guest}\n").as_bytes())
            .unwrap();
        let (header, _) = self.packet();
        assert_eq!(
            (Op::from_u16(header.op), header.dst_port),
            (Some(Op::Request), guest)
        );
        assert_eq!(header.buf_alloc, BUFFER);
        let ports = Ports {
            host: header.src_port,
            guest,
        };
        self.say(ports, Op::Response);
        let expected = format!("OK {}\n", ports.host);
        let mut answer = vec![0; expected.len()];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(String::from_utf8(answer).unwrap(), expected);
        (ports, stream)
    }

    /// The guest dials a port of the host, where a program accepts.
    fn guest_dials(&mut self, ports: Ports) -> UnixStream {
        let path = port_path(&self.path, ports.host);
        let listener = UnixListener::bind(&path).unwrap();
        self.say(ports, Op::Request);
        let (stream, _) = listener.accept().unwrap();
        self.expect(ports, Op::Response);
        std::fs::remove_file(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }
}

fn read_all(mut stream: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Bytes that do not repeat (xorshift), so that lost, doubled or swapped ones are seen.
struct Noise(u64);

impl Noise {
    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

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
    let reader = std::thread::spawn(move || {
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
    let mut out_of_credit = 0;
    while sent < TOTAL || !host_finished {
        let credit = room.wrapping_add(forwarded).wrapping_sub(sent as u32);
        if sent < TOTAL && credit as usize >= PIECE {
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
            out_of_credit += 1;
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
    assert!(
        out_of_credit > 0,
        "the window was never full: the test tests nothing"
    );
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
    let mut cases: Vec<fn(Header) -> Header> = Vec::new();
    cases.push(|h| Header { op: 0, ..h });
    cases.push(|h| Header { op: u16::MAX, ..h });
    cases.push(|h| Header {
        op: Op::Request as u16,
        ..h
    });
    cases.push(|h| Header {
        op: Op::Response as u16,
        ..h
    });
    cases.push(|h| Header {
        op: Op::Data as u16,
        len: 1,
        ..h
    });
    cases.push(|h| Header {
        op: Op::Data as u16,
        len: u32::MAX,
        ..h
    });
    cases.push(|h| Header {
        op: Op::Shutdown as u16,
        len: 7,
        ..h
    });
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
