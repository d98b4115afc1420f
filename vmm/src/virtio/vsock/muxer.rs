//! The worker's half: moves packets between the rings and the connections.
//!
//! Nothing here waits or spins. Sockets are watched edge-triggered; a connection with something for
//! the guest takes its place in a round and sends one packet per turn, so that a busy stream cannot
//! starve the others; each turn moves a bounded number of packets in either direction before the
//! worker looks at its events again.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use std::{collections::HashMap, io};

use nix::sys::epoll::EpollFlags;

use super::connection::{Connection, Ports};
use super::host::{Client, HANDSHAKE_TIME, Handshake, dial};
use super::packet::{HEADER_LEN, Header, Op, TYPE_STREAM};
use super::table::Table;
use crate::virtio::error::{Complaints, DeviceError};
use crate::virtio::ring::{Chain, Ring};
use crate::virtio::worker::{Handler, Next, Waits};
use sepal_protocol::ports::HOST_CID;

/// Tokens below are the worker's own.
const FIRST_TOKEN: u64 = 16;
/// Kick of the queue to the guest.
pub const RECEIVE_KICK: u64 = 0;
/// Kick of the queue from the guest.
pub const TRANSMIT_KICK: u64 = 1;
const LISTENER: u64 = 3;

/// Packets in one direction before the other has its turn.
const BATCH: u16 = 64;
/// Clients that have not said yet which port they want.
const MAX_CLIENTS: usize = 256;
/// Pause after accept(2) failed, for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The worker's state.
pub struct Muxer<'m> {
    guest_cid: u64,
    path: PathBuf,
    listener: UnixListener,
    /// The listener is watched. It is not while there is no place for another client.
    listening: bool,
    accept_from: Option<Instant>,
    receive: Ring<'m>,
    transmit: Ring<'m>,
    table: Table,
    clients: HashMap<u64, Client>,
    complaints: Complaints,
}

impl<'m> Muxer<'m> {
    /// For a guest with this context id. `path` is where `listener` listens.
    pub fn new(
        guest_cid: u64,
        path: PathBuf,
        listener: UnixListener,
        receive: Ring<'m>,
        transmit: Ring<'m>,
    ) -> Self {
        Self {
            guest_cid,
            path,
            listener,
            listening: false,
            accept_from: None,
            receive,
            transmit,
            table: Table::new(FIRST_TOKEN),
            clients: HashMap::new(),
            complaints: Complaints::default(),
        }
    }

    /// Packets of the guest, a batch of them. True: there are more, and room for the answers.
    fn take_packets(&mut self, waits: &Waits) -> Result<bool, DeviceError> {
        // Each packet may have to be answered by a RST.
        let room = self.table.room_for_resets();
        let limit = u16::try_from(room).unwrap_or(BATCH).min(BATCH);
        let Self {
            transmit,
            table,
            complaints,
            path,
            guest_cid,
            ..
        } = self;
        let mut from = FromGuest {
            table,
            complaints,
            path,
            waits,
            guest_cid: *guest_cid,
        };
        let more = transmit.serve_at_most(limit, |chain| {
            from.packet(chain);
            Ok(0)
        })?;
        Ok(more && self.table.room_for_resets() > 0)
    }

    /// Packets for the guest, a batch of them. True: there are more, and room for them.
    fn give_packets(&mut self) -> Result<bool, DeviceError> {
        let mut sent = 0;
        let mut room = true;
        self.receive.disable_kicks()?;
        while sent < BATCH && room && self.table.has_packets() {
            match self.receive.pop()? {
                Some(chain) => {
                    if self.fill(chain)? {
                        sent += 1;
                    }
                }
                None => {
                    room = self.receive.enable_kicks()?;
                    if room {
                        self.receive.disable_kicks()?;
                    }
                }
            }
        }
        if sent > 0 {
            self.receive.notify()?;
        }
        Ok(room && self.table.has_packets())
    }

    /// Puts a packet into the chain. False: there was none, and the chain is put back.
    fn fill(&mut self, mut chain: Chain<'m>) -> Result<bool, DeviceError> {
        if chain.writable.len() <= HEADER_LEN {
            let length = chain.writable.len();
            self.complaints
                .warn("vsock", &format_args!("receive buffer of {length} bytes"));
            self.receive.complete(chain.head, 0)?;
            return Ok(true);
        }
        let mut place = chain.writable.take(HEADER_LEN);
        let header = match self.table.pop_reset() {
            Some(header) => Some(header),
            None => self.next_packet(&chain),
        };
        let Some(header) = header else {
            self.receive.undo(1);
            return Ok(false);
        };
        place.write(&header.to_bytes());
        self.receive
            .complete(chain.head, HEADER_LEN as u32 + header.len)?;
        Ok(true)
    }

    fn next_packet(&mut self, chain: &Chain<'_>) -> Option<Header> {
        while let Some(token) = self.table.next_speaker() {
            let connection = self.table.get(token)?;
            let outgoing = connection.next(&chain.writable);
            let header = outgoing.map(|outgoing| connection.header(&outgoing, self.guest_cid));
            self.table.settle(token);
            if header.is_some() {
                return header;
            }
        }
        None
    }

    fn accept(&mut self, waits: &Waits) {
        while self.clients.len() < MAX_CLIENTS && !self.table.is_full() {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    self.complaints
                        .warn("vsock", &format_args!("accepting a client: {e}"));
                    self.accept_from = Some(Instant::now() + ACCEPT_PAUSE);
                    return;
                }
            };
            let token = self.table.new_token();
            if stream
                .set_nonblocking(true)
                .and_then(|()| watch(waits, &stream, token))
                .is_ok()
            {
                let deadline = Instant::now() + HANDSHAKE_TIME;
                self.clients.insert(token, Client { stream, deadline });
            }
        }
    }

    fn handshake(&mut self, token: u64) {
        let Some(client) = self.clients.get(&token) else {
            return;
        };
        match client.handshake() {
            Handshake::Waiting => {}
            Handshake::Refused => drop(self.clients.remove(&token)),
            Handshake::Wants(port) => {
                let Some(client) = self.clients.remove(&token) else {
                    return;
                };
                if !self.table.is_full() {
                    let ports = self.table.new_ports(port);
                    let connection = Connection::dialled_by_host(ports, client.stream);
                    self.table.insert(token, connection);
                    self.table.settle(token);
                }
            }
        }
    }

    /// Watches the listener exactly while another client may come. Returns when to look again.
    fn listen(&mut self, waits: &Waits) -> Result<Option<Instant>, DeviceError> {
        let now = Instant::now();
        if self.accept_from.is_some_and(|time| time <= now) {
            self.accept_from = None;
        }
        self.clients.retain(|_, client| client.deadline > now);
        let room = self.clients.len() < MAX_CLIENTS && !self.table.is_full();
        let wanted = room && self.accept_from.is_none();
        if wanted && !self.listening {
            let added = waits.add(&self.listener, EpollFlags::EPOLLIN, LISTENER);
            added.map_err(DeviceError::host("epoll_ctl"))?;
        } else if !wanted && self.listening {
            waits.remove(&self.listener);
        }
        self.listening = wanted;
        let deadline = self.clients.values().map(|client| client.deadline).min();
        Ok(deadline.into_iter().chain(self.accept_from).min())
    }
}

impl Handler for Muxer<'_> {
    fn event(&mut self, waits: &Waits, token: u64, flags: EpollFlags) -> Result<(), DeviceError> {
        match token {
            LISTENER => self.accept(waits),
            0..FIRST_TOKEN => {}
            token if self.clients.contains_key(&token) => self.handshake(token),
            token => {
                if let Some(connection) = self.table.get(token) {
                    connection.event(flags);
                    self.table.settle(token);
                }
            }
        }
        Ok(())
    }

    fn turn(&mut self, waits: &Waits) -> Result<Next, DeviceError> {
        let more_to_give = self.give_packets()?;
        let more_to_take = self.take_packets(waits)?;
        // Answers to what came: they would otherwise wait for an unrelated event.
        let more_to_give = more_to_give || (self.table.has_packets() && self.give_packets()?);
        let deadline = self.listen(waits)?;
        if more_to_give || more_to_take {
            return Ok(Next::Again);
        }
        Ok(deadline.map_or(Next::Wait, Next::At))
    }
}

fn watch(waits: &Waits, stream: impl std::os::fd::AsFd, token: u64) -> io::Result<()> {
    let input = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP;
    waits.add(
        stream,
        input | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET,
        token,
    )
}

/// What a packet of the guest may touch.
struct FromGuest<'a> {
    table: &'a mut Table,
    complaints: &'a mut Complaints,
    path: &'a PathBuf,
    waits: &'a Waits,
    guest_cid: u64,
}

impl FromGuest<'_> {
    fn packet(&mut self, mut chain: Chain<'_>) {
        let Some(header) = chain.readable.read_array::<HEADER_LEN>() else {
            self.complaints
                .warn("vsock", &"packet without a whole header");
            return;
        };
        let header = Header::parse(&header);
        if header.src_cid != self.guest_cid {
            let cid = header.src_cid;
            self.complaints
                .warn("vsock", &format_args!("packet from context id {cid}"));
            return;
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        let for_us = header.dst_cid == HOST_CID && header.kind == TYPE_STREAM;
        let token = if for_us { self.table.find(ports) } else { None };
        match (token, Op::from_u16(header.op)) {
            (None, Some(Op::Reset)) => {}
            (None, Some(Op::Request)) if for_us && header.len == 0 => self.dialled(ports, &header),
            (None, _) => self.refuse(&header),
            (Some(token), op) => {
                self.existing(token, op, &header, &mut chain);
                self.table.settle(token);
            }
        }
    }

    fn existing(&mut self, token: u64, op: Option<Op>, header: &Header, chain: &mut Chain<'_>) {
        let Some(connection) = self.table.get(token) else {
            return;
        };
        let payload = if op == Some(Op::Data) {
            header.len as usize
        } else {
            0
        };
        let op = op.filter(|_| header.len as usize == payload && payload <= chain.readable.len());
        let Some(op) = op else {
            let (op, len) = (header.op, header.len);
            self.complaints
                .warn("vsock", &format_args!("operation {op} with {len} bytes"));
            connection.close_by_reset();
            return;
        };
        if let Err(violation) = connection.packet(op, header, &mut chain.readable) {
            self.complaints.warn("vsock", &violation);
        }
    }

    fn dialled(&mut self, ports: Ports, header: &Header) {
        if self.table.is_full() {
            self.complaints.warn("vsock", &"too many connections");
            return self.refuse(header);
        }
        let stream = match dial(self.path, ports.host) {
            Ok(stream) => stream,
            Err(error) => {
                tracing::debug!(port = ports.host, "guest dialled a port in vain: {error}");
                return self.refuse(header);
            }
        };
        let token = self.table.new_token();
        if let Err(error) = watch(self.waits, &stream, token) {
            self.complaints
                .warn("vsock", &format_args!("watching a connection: {error}"));
            return self.refuse(header);
        }
        self.table
            .insert(token, Connection::dialled_by_guest(ports, stream, header));
        self.table.settle(token);
    }

    /// RST for what is no connection. Its addresses are those of the packet, turned round.
    fn refuse(&mut self, header: &Header) {
        self.table.push_reset(Header {
            src_cid: header.dst_cid,
            dst_cid: header.src_cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            kind: header.kind,
            op: Op::Reset as u16,
            ..Header::default()
        });
    }
}
