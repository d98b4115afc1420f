//! The device on a real tap. The tap lives in a network namespace that the test makes for itself;
//! a packet socket on the tap is the host's network. Without the right to make a namespace the
//! tests say so and do nothing.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use super::tap::HEADER_LEN;
use super::*;
use crate::virtio::testing::{DriverQueue, Guest, PATIENCE, Segment, WRITE, readable, writable};

const MAC_ADDRESS: [u8; 6] = [0x02, 0, 0, 0, 0, 1];
/// For experiments (IEEE 802).
const PROTOCOL: u16 = 0x88b5;
const IPV4: u16 = 0x0800;
const NOTHING: Duration = Duration::from_millis(100);
const LARGEST: usize = 65_562;

/// A tap in a namespace of its own, and the network behind it.
struct Wire {
    tap: File,
    network: OwnedFd,
}

#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    value: [u8; 24],
}

mod ioctl {
    nix::ioctl_write_ptr_bad!(
        create,
        nix::request_code_write!(b'T', 202, 4),
        super::InterfaceRequest
    );
    nix::ioctl_write_ptr_bad!(set_flags, libc::SIOCSIFFLAGS, super::InterfaceRequest);
    nix::ioctl_write_ptr_bad!(set_mtu, libc::SIOCSIFMTU, super::InterfaceRequest);
    nix::ioctl_read_bad!(get_index, libc::SIOCGIFINDEX, super::InterfaceRequest);
}

fn checked(result: libc::c_int) -> libc::c_int {
    assert!(result >= 0, "{}", io::Error::last_os_error());
    result
}

impl InterfaceRequest {
    fn new(value: &[u8]) -> Self {
        let mut request = Self {
            name: [0; 16],
            value: [0; 24],
        };
        request.name[..4].copy_from_slice(b"tap0");
        request.value[..value.len()].copy_from_slice(value);
        request
    }
}

/// Runs in a thread that has left for a new namespace; descriptors keep what they were opened in.
fn wire_here(mtu: u32, offloads: bool) -> Wire {
    let tap = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
    // SAFETY: each ioctl below reads or writes one interface request that outlives it; each socket
    // is new and owned once.
    unsafe {
        ioctl::create(
            tap.as_raw_fd(),
            &InterfaceRequest::new(&flags.to_ne_bytes()),
        )
        .unwrap();
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // The kernel cuts only what it knows.
        let protocol = if offloads { IPV4 } else { PROTOCOL }.to_be();
        let network = checked(libc::socket(libc::AF_PACKET, kind, protocol.into()));
        let network = OwnedFd::from_raw_fd(network);
        let fd = network.as_raw_fd();
        ioctl::set_mtu(fd, &InterfaceRequest::new(&mtu.to_ne_bytes())).unwrap();
        let up = libc::IFF_UP as u16;
        ioctl::set_flags(fd, &InterfaceRequest::new(&up.to_ne_bytes())).unwrap();
        let mut request = InterfaceRequest::new(&[]);
        ioctl::get_index(fd, &mut request).unwrap();
        if offloads {
            let on: libc::c_int = 1;
            let size = size_of::<libc::c_int>() as libc::socklen_t;
            let on = (&raw const on).cast();
            checked(libc::setsockopt(
                fd,
                libc::SOL_PACKET,
                libc::PACKET_VNET_HDR,
                on,
                size,
            ));
        }
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = i32::from_ne_bytes(request.value[..4].try_into().unwrap());
        let size = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        checked(libc::bind(fd, (&raw const address).cast(), size));
        Wire { tap, network }
    }
}

/// `None`, and a message, where the test may not make one.
fn wire(mtu: u32, offloads: bool) -> Option<Wire> {
    std::thread::spawn(move || {
        if let Err(error) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
            eprintln!("skipped: cannot make a network namespace: {error}");
            return None;
        }
        if File::open("/dev/net/tun").is_err() {
            eprintln!("skipped: no /dev/net/tun");
            return None;
        }
        // No words of the kernel's own on the wire.
        let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        Some(wire_here(mtu, offloads))
    })
    .join()
    .unwrap()
}

struct Driver {
    guest: Guest,
    receive: DriverQueue,
    transmit: DriverQueue,
    control: DriverQueue,
    /// Receive buffers in the order in which they were offered.
    offered: VecDeque<(u64, usize)>,
    network: OwnedFd,
    device: Net,
}

impl Driver {
    fn new(wire: Wire, features: u64) -> Self {
        let mut device = Net::new(MAC_ADDRESS, 1500, wire.tap, None).unwrap();
        let mut guest = Guest::new(3);
        let (receive, transmit) = (guest.queue(0, 256), guest.queue(1, 256));
        let control = guest.queue(2, 64);
        guest.activate(&mut device, &[&receive, &transmit, &control], features);
        let (offered, network) = (VecDeque::new(), wire.network);
        Self {
            guest,
            receive,
            transmit,
            control,
            offered,
            network,
            device,
        }
    }

    fn give(&mut self, count: usize, size: usize) {
        for _ in 0..count {
            let gpa = self.guest.alloc(size, 8);
            self.receive.offer(&[writable(gpa, size)]);
            self.offered.push_back((gpa, size));
        }
        self.receive.kick();
    }

    /// What came for the guest: number of buffers, header and frame.
    fn received(&mut self, patience: Duration) -> Option<(u16, Vec<u8>)> {
        let (_, written) = self.receive.wait_for(patience)?;
        let (gpa, _) = self.offered.pop_front().unwrap();
        let mut bytes = self.guest.read(gpa, written as usize);
        let buffers = u16::from_le_bytes([bytes[10], bytes[11]]);
        for _ in 1..buffers {
            let (_, written) = self.receive.wait();
            let (gpa, size) = self.offered.pop_front().unwrap();
            assert!(written as usize <= size);
            bytes.extend(self.guest.read(gpa, written as usize));
        }
        Some((buffers, bytes))
    }

    fn send(&mut self, header: &[u8; HEADER_LEN], frame: &[u8]) {
        let (header, at) = (self.guest.place(header), self.guest.place(frame));
        self.transmit
            .request(&[readable(header, HEADER_LEN), readable(at, frame.len())]);
    }

    fn command(&mut self, request: &[Segment]) -> u8 {
        let ack = self.guest.place(&[9]);
        let segments = [request, &[writable(ack, 1)]].concat();
        self.control.request(&segments);
        self.guest.read(ack, 1)[0]
    }

    fn network_sends(&self, bytes: &[u8]) {
        let sent = nix::sys::socket::send(
            self.network.as_raw_fd(),
            bytes,
            nix::sys::socket::MsgFlags::empty(),
        );
        assert_eq!(sent, Ok(bytes.len()));
    }

    fn network_receives(&self, patience: Duration) -> Option<Vec<u8>> {
        let end = Instant::now() + patience;
        let mut bytes = vec![0; 70_000];
        loop {
            let flags = nix::sys::socket::MsgFlags::MSG_DONTWAIT;
            match nix::sys::socket::recv(self.network.as_raw_fd(), &mut bytes, flags) {
                Ok(count) => {
                    bytes.truncate(count);
                    return Some(bytes);
                }
                Err(nix::Error::EAGAIN) if Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(nix::Error::EAGAIN) => return None,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

fn frame(length: usize, seed: u8) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(MAC_ADDRESS);
    frame.extend(PROTOCOL.to_be_bytes());
    frame.extend((0..length - 14).map(|n| (n as u8).wrapping_add(seed)));
    frame
}

#[test]
fn the_driver_reads_address_link_and_mtu() {
    let Some(wire) = wire(1500, false) else {
        return;
    };
    let driver = Driver::new(wire, 0);
    let mut config = [9; 14];
    driver.device.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0xdc, 5, 0, 0]);
}

#[test]
fn a_descriptor_that_is_no_tap_is_refused() {
    let file = File::open("/dev/null").unwrap();
    assert!(matches!(
        Net::new(MAC_ADDRESS, 1500, file, None),
        Err(NetError::Tap(_))
    ));
}

#[test]
fn frames_pass_both_ways() {
    let Some(wire) = wire(1500, false) else {
        return;
    };
    let mut driver = Driver::new(wire, MRG_RXBUF);
    driver.give(64, 1600);
    for n in 0..200_u8 {
        let there = frame(60 + 7 * usize::from(n), n);
        driver.send(&[0; HEADER_LEN], &there);
        assert!(driver.network_receives(PATIENCE).unwrap() == there);
        let back = frame(1514 - usize::from(n), n);
        driver.network_sends(&back);
        let (buffers, bytes) = driver.received(PATIENCE).unwrap();
        assert_eq!(buffers, 1);
        assert!(bytes[HEADER_LEN..] == back);
        driver.give(1, 1600);
    }
}

#[test]
fn a_frame_is_spread_over_small_buffers() {
    let Some(wire) = wire(1500, false) else {
        return;
    };
    let mut driver = Driver::new(wire, MRG_RXBUF);
    driver.give(64, 100);
    let sent = frame(1000, 3);
    driver.network_sends(&sent);
    let (buffers, bytes) = driver.received(PATIENCE).unwrap();
    assert_eq!(buffers, 11);
    assert!(bytes[HEADER_LEN..] == sent);
}

#[test]
fn without_merging_each_frame_has_its_buffer() {
    let Some(wire) = wire(1500, false) else {
        return;
    };
    let mut driver = Driver::new(wire, 0);
    driver.give(4, 1526);
    for n in 0..4 {
        driver.network_sends(&frame(1500, n));
    }
    for n in 0..4 {
        let (buffers, bytes) = driver.received(PATIENCE).unwrap();
        assert_eq!(buffers, 1);
        assert!(bytes[HEADER_LEN..] == frame(1500, n));
    }
}

#[test]
fn frames_wait_in_the_tap_until_there_are_buffers() {
    let Some(wire) = wire(1500, false) else {
        return;
    };
    let mut driver = Driver::new(wire, MRG_RXBUF);
    for n in 0..50 {
        driver.network_sends(&frame(600, n));
    }
    assert!(driver.received(NOTHING).is_none());
    driver.give(60, 1600);
    for n in 0..50 {
        let (_, bytes) = driver.received(PATIENCE).unwrap();
        assert!(bytes[HEADER_LEN..] == frame(600, n));
    }
    driver.network_sends(&frame(600, 77));
    assert_eq!(
        &driver.received(PATIENCE).unwrap().1[HEADER_LEN..],
        frame(600, 77)
    );
}

/// A TCP segment of IPv4, as a sender with offloads leaves it: uncut, its checksum to be filled in.
fn uncut(payload: usize) -> (Vec<u8>, Vec<u8>) {
    let mut frame = frame(14 + 40 + payload, 1);
    frame[12..14].copy_from_slice(&IPV4.to_be_bytes());
    let total = (40 + payload) as u16;
    frame[14..34].copy_from_slice(&[
        0x45,
        0,
        (total >> 8) as u8,
        total as u8,
        0,
        0,
        0,
        0,
        64,
        6,
        0,
        0,
        10,
        0,
        0,
        1,
        10,
        0,
        0,
        2,
    ]);
    frame[34..54].copy_from_slice(&[
        0x10, 0, 0x20, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0x10, 0, 0, 0, 0, 0,
    ]);
    // NEEDS_CSUM, TCPv4, header 54, segments of 1400, checksum from 34 at 16.
    let header = vec![1, 1, 54, 0, 0x78, 5, 34, 0, 16, 0];
    (header, frame)
}

#[test]
fn uncut_segments_pass_both_ways_when_agreed_on() {
    let Some(wire) = wire(1500, true) else { return };
    let offloads = CSUM | GUEST_CSUM | GUEST_TSO4 | HOST_TSO4;
    let mut driver = Driver::new(wire, MRG_RXBUF | offloads);
    driver.give(64, 2048);
    let (header, frame) = uncut(40_000);
    driver.network_sends(&[header.clone(), frame.clone()].concat());
    let (buffers, bytes) = driver.received(PATIENCE).unwrap();
    assert_eq!(buffers, 20);
    assert_eq!(bytes[..10], header);
    assert!(bytes[HEADER_LEN..] == frame);

    let mut full = [0; HEADER_LEN];
    full[..10].copy_from_slice(&header);
    driver.send(&full, &frame);
    let bytes = driver.network_receives(PATIENCE).unwrap();
    assert_eq!(bytes[..2], header[..2]);
    assert!(bytes[10..] == frame);
}

#[test]
fn segments_are_cut_for_a_driver_that_takes_no_uncut_ones() {
    let Some(wire) = wire(1500, true) else { return };
    let mut driver = Driver::new(wire, MRG_RXBUF);
    driver.give(64, 2048);
    let (header, frame) = uncut(4000);
    driver.network_sends(&[header, frame].concat());
    let mut payload = 0;
    while payload < 4000 {
        let (buffers, bytes) = driver.received(PATIENCE).unwrap();
        assert_eq!((buffers, bytes[0] & 1, bytes[1]), (1, 0, 0));
        payload += bytes.len() - HEADER_LEN - 54;
    }
    assert_eq!(payload, 4000);
}

#[test]
fn offloads_are_turned_off_and_on_by_the_control_queue() {
    let Some(wire) = wire(1500, true) else { return };
    let features = MRG_RXBUF | CTRL_VQ | CTRL_GUEST_OFFLOADS | GUEST_CSUM | GUEST_TSO4;
    let mut driver = Driver::new(wire, features);
    driver.give(128, 2048);
    for (wanted, cut) in [(0, true), (GUEST_CSUM | GUEST_TSO4, false)] {
        let request = driver
            .guest
            .place(&[&[5, 0][..], &wanted.to_le_bytes()].concat());
        assert_eq!(driver.command(&[readable(request, 10)]), 0);
        let (header, frame) = uncut(2000);
        driver.network_sends(&[header, frame].concat());
        let (_, bytes) = driver.received(PATIENCE).unwrap();
        assert_eq!(bytes.len() < 2000, cut);
        if cut {
            driver.received(PATIENCE).unwrap();
        }
    }
}

#[test]
fn bad_commands_are_refused() {
    let Some(wire) = wire(1500, false) else {
        return;
    };
    let mut driver = Driver::new(wire, CTRL_VQ | CTRL_GUEST_OFFLOADS | GUEST_CSUM);
    let not_agreed = GUEST_CSUM | GUEST_TSO6;
    let nonsense: [Vec<u8>; 6] = [
        vec![5],
        vec![5, 0],
        vec![5, 0, 1, 0, 0],
        [&[5, 0][..], &not_agreed.to_le_bytes()].concat(),
        [&[5, 1][..], &[0; 8]].concat(),
        vec![0xff; 300],
    ];
    for bytes in nonsense {
        let at = driver.guest.place(&bytes);
        assert_eq!(driver.command(&[readable(at, bytes.len())]), 1, "{bytes:?}");
    }
    assert_eq!(driver.command(&[]), 1);
    let at = driver.guest.place(&[5, 0]);
    assert_eq!(driver.control.request(&[readable(at, 2)]), 0);
}

#[test]
fn bad_frames_are_dropped_and_good_ones_still_pass() {
    let Some(wire) = wire(1500, false) else {
        return;
    };
    let mut driver = Driver::new(wire, 0);
    let at = driver.guest.alloc(LARGEST + 100, 8);
    for length in [1, HEADER_LEN, HEADER_LEN + 1, LARGEST + 1] {
        driver.transmit.request(&[readable(at, length)]);
    }
    // Nothing to read in it at all.
    driver.transmit.request(&[writable(at, 2000)]);
    // A header that wants a checksum beyond the frame.
    let mut header = [0; HEADER_LEN];
    (header[0], header[6], header[7]) = (1, 0xff, 0xff);
    driver.send(&header, &frame(100, 0));
    // A kind of segment that nobody knows.
    let mut header = [0; HEADER_LEN];
    header[1] = 0x7f;
    driver.send(&header, &frame(100, 0));
    assert!(driver.network_receives(NOTHING).is_none());
    driver.send(&[0; HEADER_LEN], &frame(100, 5));
    assert_eq!(driver.network_receives(PATIENCE).unwrap(), frame(100, 5));
}

#[test]
fn a_receive_buffer_without_room_for_the_header_is_given_back() {
    let Some(wire) = wire(1500, false) else {
        return;
    };
    let mut driver = Driver::new(wire, MRG_RXBUF);
    driver.give(1, HEADER_LEN - 1);
    assert_eq!(driver.receive.wait().1, 0);
    driver.offered.clear();
    driver.give(2, 1600);
    driver.network_sends(&frame(100, 1));
    assert_eq!(
        &driver.received(PATIENCE).unwrap().1[HEADER_LEN..],
        frame(100, 1)
    );
}

#[test]
fn receive_buffers_that_are_on_offer_again_and_again_stop_the_device() {
    let Some(wire) = wire(1500, false) else {
        return;
    };
    // None of them has been used when there are more than the queue has.
    let mut driver = Driver::new(wire, MRG_RXBUF);
    let gpa = driver.guest.alloc(64, 8);
    driver
        .receive
        .write_desc(0, gpa, HEADER_LEN as u32, WRITE, 0);
    let begun = Instant::now();
    while !driver.guest.interrupt.wants_reset() {
        driver.receive.offer_head(0);
        driver.receive.kick();
        assert!(begun.elapsed() < PATIENCE, "they are taken for ever");
    }
    driver.device.reset();
}

#[test]
fn a_frame_larger_than_its_only_buffer_is_cut_off_there() {
    let Some(wire) = wire(1500, false) else {
        return;
    };
    let mut driver = Driver::new(wire, 0);
    driver.give(1, 64);
    driver.give(1, 1600);
    driver.network_sends(&frame(1000, 1));
    driver.network_sends(&frame(50, 2));
    let (_, bytes) = driver.received(PATIENCE).unwrap();
    assert!(bytes[HEADER_LEN..] == frame(1000, 1)[..64 - HEADER_LEN]);
    let (_, bytes) = driver.received(PATIENCE).unwrap();
    assert!(bytes[HEADER_LEN..] == frame(50, 2));
}

#[test]
fn a_reset_device_serves_again() {
    let Some(wire) = wire(1500, false) else {
        return;
    };
    let mut driver = Driver::new(wire, MRG_RXBUF);
    driver.give(8, 1600);
    driver.device.reset();
    driver.network_sends(&frame(100, 1));
    assert!(driver.received(NOTHING).is_none());
    driver.receive = driver.guest.queue(0, 256);
    driver.transmit = driver.guest.queue(1, 256);
    driver.offered.clear();
    let activation = driver
        .guest
        .activation(&[&driver.receive, &driver.transmit], MRG_RXBUF);
    driver.device.activate(activation).unwrap();
    driver.give(8, 1600);
    assert_eq!(
        &driver.received(PATIENCE).unwrap().1[HEADER_LEN..],
        frame(100, 1)
    );
}

#[test]
fn a_broken_ring_stops_the_device() {
    let Some(wire) = wire(1500, false) else {
        return;
    };
    let mut driver = Driver::new(wire, 0);
    driver.transmit.write_desc(0, 1 << 40, 60, 0, 0);
    driver.transmit.offer_head(0);
    driver.transmit.kick();
    driver.guest.interrupt.await_reset();
    driver.device.reset();
}

#[test]
fn the_kernel_moves_frames_where_it_has_vhost_net() {
    let Ok(vhost) = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/vhost-net")
    else {
        eprintln!("skipped: no /dev/vhost-net");
        return;
    };
    let Some(wire) = wire(1500, false) else {
        return;
    };
    let mut device = Net::new(MAC_ADDRESS, 1500, wire.tap, Some(vhost)).unwrap();
    let mut guest = Guest::new(3);
    let (receive, transmit) = (guest.queue(0, 256), guest.queue(1, 256));
    let control = guest.queue(2, 64);
    let features = MRG_RXBUF | features::VERSION_1;
    let activation = guest.activation(&[&receive, &transmit, &control], features);
    device.activate(activation).unwrap();
    let (offered, network) = (VecDeque::new(), wire.network);
    let mut driver = Driver {
        guest,
        receive,
        transmit,
        control,
        offered,
        network,
        device,
    };
    driver.give(8, 1600);
    driver.send(&[0; HEADER_LEN], &frame(900, 2));
    assert_eq!(driver.network_receives(PATIENCE).unwrap(), frame(900, 2));
    driver.network_sends(&frame(800, 1));
    assert_eq!(
        &driver.received(PATIENCE).unwrap().1[HEADER_LEN..],
        frame(800, 1)
    );
    driver.device.reset();
    driver.network_sends(&frame(800, 1));
    assert!(driver.received(NOTHING).is_none());
}
