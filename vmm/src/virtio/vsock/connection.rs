//! One stream between the guest and a Unix socket of the host.
//!
//! ```text
//!             guest ──(credit: BUFFER)──> buffer ──> Unix socket      bytes the socket does not
//!                                                                     take at once wait in buffer
//!             guest <──(guest's credit)───────────── Unix socket      read straight into the ring
//!
//!   host dials:  Dialled ── RESPONSE ──> Open        guest dials: Open, RESPONSE goes out first
//!   either side: Open ── halves shut one by one, each after its last byte ──> RST ──> Closed
//!   guest's RST: Detached while bytes of the guest still wait for the host's reader, then Closed
//! ```
//!
//! The guest never has more than [`BUFFER`] bytes outstanding, which it is told by `buf_alloc`; a
//! guest that sends more is reset. Nothing is read from the Unix socket that the guest has no room
//! for, so that the host's writer blocks in its own buffer.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{MsgFlags, recv, send};
use sepal_protocol::ports::HOST_CID;

use super::packet::{
    Header, MAX_PAYLOAD, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use crate::virtio::buffer::{Reader, Writer};

/// Bytes that one connection may hold on their way to the host: two of the guest's largest packets,
/// so that it fills one while the other is written.
pub const BUFFER: u32 = 128 * 1024;

/// The ports of both ends; the context ids are always the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ports {
    /// On the host's side.
    pub host: u32,
    /// On the guest's side.
    pub guest: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// REQUEST goes or went to the guest.
    Dialled,
    /// Bytes flow.
    Open,
    /// The guest knows it no more; what it sent is still being written to the host.
    Detached,
    /// Over.
    Closed,
}

/// Why a connection must be reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The guest sent more than it had credit for.
    #[error("{len} bytes with room for {room}")]
    Credit {
        /// Payload.
        len: u32,
        /// What would have been accepted.
        room: u32,
    },
    /// The guest sent data on a half that it had shut.
    #[error("data after shutdown")]
    DataAfterShutdown,
    /// The packet makes no sense now.
    #[error("{0:?} out of order")]
    OutOfOrder(Op),
}

/// A packet for the guest, but for addresses and credit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outgoing {
    /// What it says.
    pub op: Op,
    /// Bytes of payload, already in place.
    pub len: u32,
    /// For [`Op::Shutdown`].
    pub flags: u32,
}

/// A connection.
pub struct Connection {
    /// Its address.
    pub ports: Ports,
    /// Whether it waits in the muxer's round.
    pub queued: bool,
    stream: UnixStream,
    state: State,
    /// A packet to send before all others: REQUEST, RESPONSE or RST.
    first: Option<Op>,
    credit_update: bool,
    /// The guest was asked for credit and has not answered yet.
    credit_asked: bool,

    /// From the guest: bytes taken, written to the socket, and last told as written.
    received: u32,
    forwarded: u32,
    told: u32,
    buffer: VecDeque<u8>,
    /// SHUTDOWN flags of the guest.
    guest_shut: u32,
    /// The guest's end of file was passed on to the socket.
    passed_eof: bool,
    /// The socket takes no more: the host's reader is gone.
    no_reader: bool,

    /// To the guest: bytes sent; its buffer and what it has taken out of it.
    sent: u32,
    guest_buffer: u32,
    guest_forwarded: u32,
    /// SHUTDOWN flags sent to the guest.
    told_shut: u32,
    /// Not known to be empty.
    readable: bool,
    /// The host's writer has finished.
    eof: bool,
    /// Both halves of the socket are shut.
    hung_up: bool,
}

impl Connection {
    fn new(ports: Ports, stream: UnixStream, state: State, first: Op) -> Self {
        Self {
            ports,
            queued: false,
            stream,
            state,
            first: Some(first),
            credit_update: false,
            credit_asked: false,
            received: 0,
            forwarded: 0,
            told: 0,
            buffer: VecDeque::new(),
            guest_shut: 0,
            passed_eof: false,
            no_reader: false,
            sent: 0,
            guest_buffer: 0,
            guest_forwarded: 0,
            told_shut: 0,
            readable: true,
            eof: false,
            hung_up: false,
        }
    }

    /// The host dialled: the guest will be asked.
    pub fn dialled_by_host(ports: Ports, stream: UnixStream) -> Self {
        Self::new(ports, stream, State::Dialled, Op::Request)
    }

    /// The guest dialled and `stream` is connected: the guest will be told.
    pub fn dialled_by_guest(ports: Ports, stream: UnixStream, request: &Header) -> Self {
        let mut connection = Self::new(ports, stream, State::Open, Op::Response);
        connection.take_credit(request);
        connection
    }

    /// As if so many bytes had passed each way before, so that the counters wrap soon.
    #[cfg(test)]
    pub fn count_from(&mut self, count: u32) {
        (self.received, self.forwarded, self.told) = (count, count, count);
        (self.sent, self.guest_forwarded) = (count, count);
    }

    /// Nothing is left to do.
    pub fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    /// The guest has forgotten it: its ports may be used again.
    pub fn is_detached(&self) -> bool {
        self.state == State::Detached
    }

    /// Takes note of what epoll says of the socket, and writes what has waited for it.
    pub fn event(&mut self, flags: EpollFlags) {
        let gone = EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
        if flags.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | gone) {
            self.readable = true;
        }
        if flags.intersects(gone) {
            self.hung_up = true;
            // Nobody waits for the guest's answer any more.
            if self.state == State::Dialled {
                self.close_by_reset();
            }
        }
        if flags.intersects(EpollFlags::EPOLLOUT | gone) {
            self.flush();
        }
    }

    /// Takes a packet of the guest for this connection.
    ///
    /// # Errors
    /// The guest broke the protocol; the connection is about to be reset.
    pub fn packet(
        &mut self,
        op: Op,
        header: &Header,
        payload: &mut Reader<'_>,
    ) -> Result<(), Violation> {
        self.take_credit(header);
        let result = match (self.state, op) {
            (_, Op::Reset) => {
                self.first = None;
                self.state = State::Detached;
                self.finish_detached();
                Ok(())
            }
            (State::Dialled, Op::Response) if self.first.is_none() => self.open(),
            (State::Open, Op::Data) => self.data(header.len, payload),
            (State::Open, Op::Shutdown) => {
                self.shut(header.flags);
                Ok(())
            }
            (State::Open, Op::CreditUpdate) => Ok(()),
            (State::Open, Op::CreditRequest) => {
                self.credit_update = true;
                Ok(())
            }
            (_, op) => Err(Violation::OutOfOrder(op)),
        };
        if result.is_err() {
            self.close_by_reset();
        }
        result
    }

    fn take_credit(&mut self, header: &Header) {
        self.guest_buffer = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        // A guest that answers without giving any is not asked again: it tells by itself.
        if self.credit() > 0 {
            self.credit_asked = false;
        }
    }

    /// Bytes that the guest has room for; 0 if its counters contradict ours.
    fn credit(&self) -> u32 {
        self.guest_buffer
            .saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    fn open(&mut self) -> Result<(), Violation> {
        self.state = State::Open;
        // The socket's buffer is empty, so that one short line fits.
        let line = format!("OK {}\n", self.ports.host);
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        if send(self.stream.as_raw_fd(), line.as_bytes(), flags) != Ok(line.len()) {
            self.no_reader = true;
        }
        Ok(())
    }

    fn data(&mut self, len: u32, payload: &mut Reader<'_>) -> Result<(), Violation> {
        if self.guest_shut & SHUTDOWN_SEND != 0 {
            return Err(Violation::DataAfterShutdown);
        }
        let room = BUFFER.saturating_sub(self.received.wrapping_sub(self.forwarded));
        if len > room {
            return Err(Violation::Credit { len, room });
        }
        self.received = self.received.wrapping_add(len);
        let mut payload = payload.take(len as usize);
        while self.buffer.is_empty() && !self.no_reader && !payload.is_empty() {
            match payload.send_to(self.stream.as_fd()) {
                Ok(count) => self.forwarded = self.forwarded.wrapping_add(count as u32),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.no_reader = true,
            }
        }
        if self.no_reader {
            self.drop_buffer();
        } else if !payload.is_empty() {
            let start = self.buffer.len();
            self.buffer.resize(start + payload.len(), 0);
            let (front, back) = self.buffer.as_mut_slices();
            let split = front.len();
            if start < split {
                payload.read(&mut front[start..]);
            }
            payload.read(&mut back[start.saturating_sub(split)..]);
        }
        Ok(())
    }

    /// Everything received counts as forwarded: there is nobody to forward it to.
    fn drop_buffer(&mut self) {
        self.buffer = VecDeque::new();
        self.forwarded = self.received;
    }

    fn shut(&mut self, flags: u32) {
        self.guest_shut |= flags & SHUTDOWN_BOTH;
        if self.guest_shut & SHUTDOWN_RECEIVE != 0 {
            // The host's writer is told by EPIPE.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.after_flush();
    }

    /// Writes what waits for the socket.
    fn flush(&mut self) {
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        while !self.buffer.is_empty() {
            match send(self.stream.as_raw_fd(), self.buffer.as_slices().0, flags) {
                Ok(count) => {
                    self.buffer.drain(..count);
                    self.forwarded = self.forwarded.wrapping_add(count as u32);
                }
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => return,
                Err(_) => {
                    self.no_reader = true;
                    self.drop_buffer();
                }
            }
        }
        // An idle connection holds no memory.
        self.buffer = VecDeque::new();
        self.after_flush();
    }

    /// What waits for the last byte of the guest to be written.
    fn after_flush(&mut self) {
        if !self.buffer.is_empty() {
            return;
        }
        match self.state {
            State::Detached => self.finish_detached(),
            State::Open if self.guest_shut == SHUTDOWN_BOTH => self.close_by_reset(),
            State::Open if self.guest_shut & SHUTDOWN_SEND != 0 && !self.passed_eof => {
                self.passed_eof = true;
                let _ = self.stream.shutdown(Shutdown::Write);
            }
            _ => {}
        }
    }

    fn finish_detached(&mut self) {
        if self.buffer.is_empty() {
            self.state = State::Closed;
        }
    }

    /// RST goes to the guest, then nothing more.
    pub fn close_by_reset(&mut self) {
        if matches!(self.state, State::Dialled | State::Open) {
            // A guest that was never asked need not be told.
            if self.first == Some(Op::Request) {
                self.state = State::Closed;
            }
            self.first = Some(Op::Reset);
        }
    }

    /// Whether [`Connection::next`] may have something to say.
    pub fn has_packet(&self) -> bool {
        match self.state {
            State::Detached | State::Closed => false,
            State::Dialled => self.first.is_some(),
            State::Open => {
                self.first.is_some()
                    || self.credit_due()
                    || self.shutdown_due() != 0
                    || (self.may_read() && (self.credit() > 0 || !self.credit_asked))
            }
        }
    }

    fn may_read(&self) -> bool {
        self.readable && !self.eof && self.guest_shut & SHUTDOWN_RECEIVE == 0
    }

    /// The guest should hear of room in the buffer before it runs out of it.
    fn credit_due(&self) -> bool {
        let unsure = self.received.wrapping_sub(self.told);
        self.credit_update || (unsure >= BUFFER / 2 && self.forwarded != self.told)
    }

    /// SHUTDOWN flags that the guest has not been told.
    fn shutdown_due(&self) -> u32 {
        let send = if self.eof { SHUTDOWN_SEND } else { 0 };
        let gone = self.no_reader || (self.eof && self.hung_up);
        let receive = if gone { SHUTDOWN_RECEIVE } else { 0 };
        (send | receive) & !self.told_shut
    }

    /// The next packet for the guest. Its payload is written to `room`, which has a place for at
    /// least one byte; a packet that is returned must be sent.
    pub fn next(&mut self, room: &Writer<'_>) -> Option<Outgoing> {
        if matches!(self.state, State::Detached | State::Closed) {
            return None;
        }
        let outgoing = self.choose(room)?;
        // Each header carries the counters (`Connection::stamp`).
        self.told = self.forwarded;
        self.credit_update = false;
        Some(outgoing)
    }

    fn choose(&mut self, room: &Writer<'_>) -> Option<Outgoing> {
        if let Some(op) = self.first.take() {
            if op == Op::Reset {
                self.state = State::Closed;
            }
            return Some(Outgoing {
                op,
                len: 0,
                flags: 0,
            });
        }
        if self.state != State::Open {
            return None;
        }
        if self.may_read()
            && self.credit() > 0
            && let Some(len) = self.read(room)
        {
            self.sent = self.sent.wrapping_add(len);
            return Some(Outgoing {
                op: Op::Data,
                len,
                flags: 0,
            });
        }
        let shutdown = self.shutdown_due();
        if shutdown != 0 {
            self.told_shut |= shutdown;
            return Some(Outgoing {
                op: Op::Shutdown,
                len: 0,
                flags: self.told_shut,
            });
        }
        if self.credit_due() {
            return Some(Outgoing {
                op: Op::CreditUpdate,
                len: 0,
                flags: 0,
            });
        }
        if self.may_read() && self.credit() == 0 && !self.credit_asked {
            self.credit_asked = true;
            return Some(Outgoing {
                op: Op::CreditRequest,
                len: 0,
                flags: 0,
            });
        }
        None
    }

    fn read(&mut self, room: &Writer<'_>) -> Option<u32> {
        let most = MAX_PAYLOAD.min(self.credit() as usize);
        // `room` stays whole: if nothing is there, another connection gets it.
        let mut room = room.front(most);
        loop {
            match room.receive_from(self.stream.as_fd()) {
                Ok(0) => self.eof = true,
                Ok(count) => return Some(count as u32),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                // The host's end closed without reading all that the guest sent.
                Err(_) => {
                    self.eof = true;
                    self.hung_up = true;
                }
            }
            return None;
        }
    }

    /// The header of a packet of this connection's for the guest, with what each says of this end's
    /// buffer.
    pub fn header(&self, outgoing: &Outgoing, guest_cid: u64) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len: outgoing.len,
            kind: TYPE_STREAM,
            op: outgoing.op as u16,
            flags: outgoing.flags,
            buf_alloc: BUFFER,
            fwd_cnt: self.forwarded,
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Unread bytes in a socket that is closed make its peer's next read fail (ECONNRESET)
        // where it should see the end of file: take them out first. No more can come after the
        // shutdown.
        let _ = self.stream.shutdown(Shutdown::Both);
        let mut rest = [0; 4096];
        while matches!(
            recv(self.stream.as_raw_fd(), &mut rest, MsgFlags::MSG_DONTWAIT),
            Ok(1..) | Err(nix::Error::EINTR)
        ) {}
    }
}
