//! A guest's vsock driver for the tests: rings, packets, credit as they tell it to.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use sepal_protocol::ports::{GUEST_CID, HOST_CID};

use super::Vsock;
use super::connection::{BUFFER, Ports};
use super::host::port_path;
use super::packet::{HEADER_LEN, Header, MAX_PAYLOAD, Op, TYPE_STREAM};
use crate::virtio::testing::{DriverQueue, Guest, PATIENCE, readable, writable};

/// As large as Linux's receive buffers.
const RECEIVE_BUFFER: usize = 4096;
/// Long enough to be sure that nothing comes.
pub const NOTHING: Duration = Duration::from_millis(100);

/// The guest's driver: rings, and packets out of and into them.
pub struct Driver {
    pub guest: Guest,
    pub receive: DriverQueue,
    pub transmit: DriverQueue,
    /// Buffer of each receive chain by its head.
    pub buffers: HashMap<u16, u64>,
    outgoing: u64,
    /// What each header says of the guest's buffer.
    pub window: u32,
    pub device: Vsock,
    pub path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Driver {
    pub fn new() -> Self {
        let mut driver = Self::without_buffers();
        driver.give(128);
        driver
    }

    pub fn without_buffers() -> Self {
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

    pub fn give(&mut self, count: usize) {
        for _ in 0..count {
            let gpa = self.guest.alloc(RECEIVE_BUFFER, 8);
            self.give_one(gpa);
        }
        self.receive.kick();
    }

    pub fn give_one(&mut self, gpa: u64) {
        let head = self.receive.offer(&[writable(gpa, RECEIVE_BUFFER)]);
        self.buffers.insert(head, gpa);
    }

    pub fn send(&mut self, header: Header, payload: &[u8]) {
        let bytes = [&header.to_bytes(), payload].concat();
        self.send_raw(&bytes);
    }

    pub fn send_raw(&mut self, bytes: &[u8]) {
        use vm_memory::{Bytes, GuestAddress};
        self.guest
            .memory
            .write_slice(bytes, GuestAddress(self.outgoing))
            .unwrap();
        self.transmit
            .request(&[readable(self.outgoing, bytes.len())]);
    }

    pub fn header(&self, ports: Ports, op: Op) -> Header {
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

    pub fn say(&mut self, ports: Ports, op: Op) {
        let header = self.header(ports, op);
        self.send(header, &[]);
    }

    pub fn shut(&mut self, ports: Ports, flags: u32) {
        let header = Header {
            flags,
            ..self.header(ports, Op::Shutdown)
        };
        self.send(header, &[]);
    }

    pub fn data(&mut self, ports: Ports, payload: &[u8]) {
        let header = Header {
            len: payload.len() as u32,
            ..self.header(ports, Op::Data)
        };
        self.send(header, payload);
    }

    pub fn packet_within(&mut self, patience: Duration) -> Option<(Header, Vec<u8>)> {
        let (head, written) = self.receive.wait_for(patience)?;
        let gpa = self.buffers.remove(&head).unwrap();
        let bytes = self.guest.read(gpa, written as usize);
        self.give_one(gpa);
        self.receive.kick();
        let header = Header::parse(&bytes[..HEADER_LEN].try_into().unwrap());
        assert_eq!(header.len as usize, bytes.len() - HEADER_LEN);
        Some((header, bytes[HEADER_LEN..].to_vec()))
    }

    pub fn packet(&mut self) -> (Header, Vec<u8>) {
        self.packet_within(PATIENCE).expect("no packet came")
    }

    pub fn nothing_comes(&mut self) {
        let packet = self.packet_within(NOTHING);
        assert!(packet.is_none(), "unexpected {packet:?}");
    }

    /// Waits for a packet that says this for these ports.
    pub fn expect(&mut self, ports: Ports, op: Op) -> (Header, Vec<u8>) {
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
    pub fn collect(&mut self, ports: Ports, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            bytes.extend(self.expect(ports, Op::Data).1);
        }
        assert_eq!(bytes.len(), len);
        bytes
    }

    /// A program of the host dials a port of the guest, which accepts.
    pub fn host_dials(&mut self, guest: u32) -> (Ports, UnixStream) {
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
    pub fn guest_dials(&mut self, ports: Ports) -> UnixStream {
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

/// What comes until the end of file.
pub fn read_all(mut stream: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}
