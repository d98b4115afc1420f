//! What is between the model's guest and the host's programs: a whole device, or one connection alone.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{setsockopt, sockopt::SndBuf};
use sepal_protocol::ports::GUEST_CID;
use vm_memory::VolatileSlice;

use super::connection::{Connection, Ports};
use super::packet::{Header, Op};
use super::vsock_test_driver::Driver;
use crate::virtio::buffer::{Reader, Writer};
use crate::virtio::testing::PATIENCE;

/// How to talk to the device.
pub trait Wire {
    /// How long what must come may take; none if nothing happens but by the calls below.
    const PATIENCE: Duration;

    /// The one connection's.
    fn ports(&self) -> Ports;

    /// Bytes that each side counts as passed before the first.
    fn counted(&self) -> u32;

    /// Gives the device a packet, which it has taken when this returns.
    fn send(&mut self, header: Header, payload: &[u8]);

    /// The next packet for the guest, if one is there.
    fn packet(&mut self) -> Option<(Header, Vec<u8>)>;
}

/// The device with its rings and its worker, which acts when it likes.
pub struct Device {
    driver: Driver,
    ports: Ports,
}

impl Device {
    /// A connection of a guest that has so many receive buffers and bytes for what comes.
    pub fn new(buffers: usize, window: u32, guest_dials: bool) -> (Self, UnixStream) {
        let mut driver = Driver::without_buffers();
        driver.window = window;
        driver.give(buffers);
        let ports = Ports { host: 9, guest: 1 };
        let (ports, stream) = if guest_dials {
            (ports, driver.guest_dials(ports))
        } else {
            driver.host_dials(ports.guest)
        };
        (Self { driver, ports }, stream)
    }
}

impl Wire for Device {
    const PATIENCE: Duration = PATIENCE;

    fn ports(&self) -> Ports {
        self.ports
    }

    fn counted(&self) -> u32 {
        0
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        self.driver.send(header, payload);
    }

    fn packet(&mut self) -> Option<(Header, Vec<u8>)> {
        self.driver.packet_within(Duration::ZERO)
    }
}

/// How a connection alone is set up.
#[derive(Debug, Clone)]
pub struct Setup {
    pub guest_dials: bool,
    /// What the guest says of its buffer at first.
    pub window: u32,
    /// Bytes that each side counts as passed before the first.
    pub counted: u32,
    /// Bytes of the device's and of the program's socket buffer; the kernel has its own least.
    pub buffers: (usize, usize),
    /// Bytes of a receive buffer, and of each of the pieces of all buffers.
    pub room: usize,
    pub piece: usize,
}

/// One connection, which acts only when it is called.
pub struct Alone {
    connection: Option<Connection>,
    ports: Ports,
    epoll: Epoll,
    setup: Setup,
}

impl Alone {
    pub fn new(setup: Setup) -> (Self, UnixStream) {
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        setsockopt(&ours, SndBuf, &setup.buffers.0).unwrap();
        setsockopt(&theirs, SndBuf, &setup.buffers.1).unwrap();
        ours.set_nonblocking(true).unwrap();
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let edges = EpollFlags::EPOLLET | EpollFlags::EPOLLRDHUP;
        let flags = edges | EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT;
        epoll.add(&ours, EpollEvent::new(flags, 0)).unwrap();

        let ports = Ports { host: 9, guest: 1 };
        let said = Header {
            buf_alloc: setup.window,
            ..Header::default()
        };
        let connection = if setup.guest_dials {
            Connection::dialled_by_guest(ports, ours, &said)
        } else {
            Connection::dialled_by_host(ports, ours)
        };
        let mut wire = Self {
            connection: Some(connection),
            ports,
            epoll,
            setup,
        };
        let first = Op::from_u16(wire.packet().unwrap().0.op);
        if wire.setup.guest_dials {
            assert_eq!(first, Some(Op::Response));
        } else {
            assert_eq!(first, Some(Op::Request));
            let op = Op::Response as u16;
            wire.send(Header { op, ..said }, &[]);
            let mut line = [0; 5];
            theirs.read_exact(&mut line).unwrap();
            assert_eq!(&line, b"OK 9\n");
        }
        let count = wire.setup.counted;
        wire.connection.as_mut().unwrap().count_from(count);
        (wire, theirs)
    }

    /// What `crate::virtio::vsock::table` does with one that is over.
    fn settle(&mut self) {
        self.connection.take_if(|connection| connection.is_closed());
    }
}

impl Wire for Alone {
    const PATIENCE: Duration = Duration::ZERO;

    fn ports(&self) -> Ports {
        self.ports
    }

    fn counted(&self) -> u32 {
        self.setup.counted
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        let connection = self.connection.as_mut().unwrap();
        let (op, mut payload) = (Op::from_u16(header.op).unwrap(), payload.to_vec());
        let mut reader = Reader::new();
        for piece in payload.chunks_mut(self.setup.piece) {
            reader.push(&VolatileSlice::from(piece));
        }
        // What it says of a guest that breaks the rules is only for the log.
        let _ = connection.packet(op, &header, &mut reader);
        self.settle();
    }

    fn packet(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut events = [EpollEvent::empty()];
        let count = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap();
        let connection = self.connection.as_mut()?;
        for event in &events[..count] {
            connection.event(event.events());
        }
        let mut packet = None;
        if connection.has_packet() {
            let mut room = vec![0; self.setup.room];
            let mut writer = Writer::new();
            for piece in room.chunks_mut(self.setup.piece) {
                writer.push(&VolatileSlice::from(piece));
            }
            if let Some(outgoing) = connection.next(&writer) {
                let header = connection.header(&outgoing, GUEST_CID);
                room.truncate(outgoing.len as usize);
                packet = Some((header, room));
            } else {
                assert!(
                    !connection.has_packet(),
                    "it would be asked in vain for ever"
                );
            }
        }
        self.settle();
        packet
    }
}
