//! The model of a stream: two strings of bytes, and how far each side has come in them.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use sepal_protocol::ports::{GUEST_CID, HOST_CID};

use super::connection::BUFFER;
use super::packet::{
    Header, MAX_PAYLOAD, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use super::vsock_model_test_wires::Wire;
use crate::virtio::testing::Noise;

/// Something that is done. What makes no sense in a situation is left out there.
#[derive(Debug, Clone)]
pub enum Step {
    /// The guest sends so many bytes, as far as it has credit.
    Send(usize),
    /// The guest sends until it has no more credit.
    Flood,
    /// The guest sends all that it has credit for, and then more.
    Overrun(usize),
    /// Packets that come reach the guest, at most so many.
    Hear(usize),
    /// The guest's program reads so many bytes.
    Take(usize),
    /// The guest has room for so many bytes from now on.
    Window(u32),
    /// The guest tells of its room.
    Tell,
    /// The guest asks for the device's.
    Ask,
    /// The guest tells of more bytes than it can have read.
    Lie,
    /// The guest's flags.
    GuestShuts(u32),
    GuestResets,
    /// The guest sends what is out of order.
    Nonsense(Op),
    /// The host's program writes, reads, and so on.
    Write(usize),
    Read(usize),
    ProgramShuts(Shutdown),
    ProgramCloses,
}

/// The most that anyone sends in one case.
const MOST: usize = 2 << 20;
/// What the guest sends, and what the program sends.
static STRINGS: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| [1, 2].map(|n| Noise(n).bytes(MOST)));

/// Both ends of a stream and what they know of it.
pub struct Stream<W> {
    wire: W,
    program: Option<UnixStream>,

    /// Bytes that the guest has sent, that the program has read, and that the guest has been told to
    /// have left the device.
    sent: usize,
    read: usize,
    forwarded: usize,
    guest_shut: u32,
    program_reads: bool,
    /// The program has seen the end of file.
    ended: bool,

    /// Bytes that the program has written, that have come to the guest, and to the guest's program.
    written: usize,
    received: usize,
    taken: usize,
    window: u32,
    /// How many the device may have sent by what the guest said last, and at most by all that it said
    /// since there was no packet for it.
    limit: (u64, u64),
    /// The device knows that the guest reads no more.
    deaf: bool,
    /// The device has asked for credit in vain.
    asked: bool,
    program_writes: bool,
    /// The device's flags.
    told_shut: u32,

    /// The guest broke the rules: what it has sent may be lost.
    broken: bool,
    /// RST has come.
    reset: bool,
}

fn says(op: Op) -> Header {
    Header {
        op: op as u16,
        ..Header::default()
    }
}

impl<W: Wire> Stream<W> {
    /// Nothing happens by itself.
    const ALONE: bool = W::PATIENCE.is_zero();

    /// A stream that was just opened, by a guest that has told of a `window`.
    pub fn new((wire, program): (W, UnixStream), window: u32) -> Self {
        program.set_nonblocking(true).unwrap();
        Self {
            wire,
            program: Some(program),
            sent: 0,
            read: 0,
            forwarded: 0,
            guest_shut: 0,
            program_reads: true,
            ended: false,
            written: 0,
            received: 0,
            taken: 0,
            window,
            limit: (window.into(), window.into()),
            deaf: false,
            asked: false,
            program_writes: true,
            told_shut: 0,
            broken: false,
            reset: false,
        }
    }

    /// Does all that, and then what is left to be done of every stream.
    pub fn run(mut self, steps: &[Step]) {
        for step in steps {
            if matches!(step, Step::GuestResets) && !self.is_over() {
                self.guest_shut = SHUTDOWN_BOTH;
                self.say(says(Op::Reset), &[]);
                self.hear(1000);
                return self.end();
            }
            self.step(step);
        }
        self.finish();
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Hear(most) => drop(self.hear(most)),
            Step::Take(count) => self.taken = self.received.min(self.taken + count),
            Step::Window(window) => self.window = window,
            Step::Write(count) => self.write(count),
            Step::Read(count) => drop(self.read(count)),
            Step::ProgramShuts(how) => self.program_shuts(how),
            Step::ProgramCloses => {
                (self.program_reads, self.program_writes) = (false, false);
                self.program = None;
            }
            _ if self.is_over() => {}
            Step::Tell => self.say(says(Op::CreditUpdate), &[]),
            Step::Ask => {
                self.say(says(Op::CreditRequest), &[]);
                assert!(!Self::ALONE || self.hear(1), "no answer");
            }
            Step::Lie => self.lie(),
            Step::GuestShuts(flags) => self.guest_shuts(flags),
            Step::Nonsense(op) => self.nonsense(op),
            _ if self.guest_shut & SHUTDOWN_SEND != 0 => {}
            Step::Send(count) => self.send(count),
            Step::Flood => self.flood(),
            Step::Overrun(more) => self.overrun(more),
            Step::GuestResets => unreachable!("the last step"),
        }
    }

    /// Whether the guest has nothing more to say.
    fn is_over(&self) -> bool {
        self.reset || self.broken || self.guest_shut == SHUTDOWN_BOTH
    }

    fn say(&mut self, header: Header, payload: &[u8]) {
        let ports = self.wire.ports();
        let taken = self.wire.counted().wrapping_add(self.taken as u32);
        let header = Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: ports.guest,
            dst_port: ports.host,
            len: payload.len() as u32,
            kind: TYPE_STREAM,
            buf_alloc: self.window,
            fwd_cnt: taken.wrapping_add(header.fwd_cnt),
            ..header
        };
        self.wire.send(header, payload);
        self.now_may_send(self.taken as u64 + u64::from(self.window));
        self.deaf |= Self::ALONE && self.guest_shut & SHUTDOWN_RECEIVE != 0;
    }

    fn now_may_send(&mut self, limit: u64) {
        // A packet that waits in the ring went by what the guest had said before.
        let most = if Self::ALONE { 0 } else { self.limit.1 };
        self.limit = (limit, limit.max(most));
        self.asked &= limit <= self.received as u64;
    }

    /// Bytes that the guest may still send.
    fn credit(&self) -> usize {
        (BUFFER as usize).saturating_sub(self.sent - self.forwarded)
    }

    /// Whether it need not be told yet of more.
    fn has_room(&self) -> bool {
        self.credit() > BUFFER as usize / 2
    }

    /// Bytes that have come to the program's socket, if it can be said; all, if nobody reads there.
    fn arrived(&self) -> usize {
        let Some(program) = self.program.as_ref().filter(|_| self.program_reads) else {
            return self.sent;
        };
        let mut waiting: libc::c_int = 0;
        // SAFETY: the pointer is to an int that outlives the call.
        let done = unsafe { libc::ioctl(program.as_raw_fd(), libc::FIONREAD, &raw mut waiting) };
        assert_eq!(done, 0);
        self.read + waiting as usize
    }

    fn send(&mut self, count: usize) {
        let count = count.min(self.credit()).min(MAX_PAYLOAD);
        if count > 0 && count <= MOST - self.sent {
            self.send_all(count);
        }
    }

    fn send_all(&mut self, count: usize) {
        let payload = &STRINGS[0][self.sent..][..count];
        self.sent += count;
        self.say(says(Op::Data), payload);
        let held = self.sent - self.arrived();
        assert!(held <= BUFFER as usize, "the device holds {held} bytes");
    }

    fn flood(&mut self) {
        for _ in 0..8 {
            self.send(MAX_PAYLOAD);
            self.hear(1000);
        }
    }

    /// Sends beyond what the guest was told. The device may have room all the same.
    fn overrun(&mut self, more: usize) {
        self.flood();
        let credit = self.credit();
        if !self.program_reads || credit >= MAX_PAYLOAD || MAX_PAYLOAD > MOST - self.sent {
            return;
        }
        let count = credit + 1 + more % (MAX_PAYLOAD - credit);
        let room = BUFFER as usize - (self.sent - self.arrived());
        if count <= room {
            self.send_all(count);
        } else if Self::ALONE {
            self.broken = true;
            self.say(says(Op::Data), &STRINGS[0][self.sent..][..count]);
        }
    }

    fn nonsense(&mut self, op: Op) {
        if op == Op::Data {
            // It is none unless the guest has said that there is no more.
            self.guest_shuts(SHUTDOWN_SEND);
        }
        if !self.is_over() {
            self.broken = true;
            self.say(says(op), &[]);
        }
    }

    fn lie(&mut self) {
        // Of a guest with so little room nothing can be on its way that it has not seen.
        let window = std::mem::replace(&mut self.window, 1000);
        let asked = self.asked;
        let lie = Header {
            fwd_cnt: 1 << 30,
            ..says(Op::CreditUpdate)
        };
        self.say(lie, &[]);
        self.now_may_send(0);
        (self.window, self.asked) = (window, asked);
    }

    fn guest_shuts(&mut self, flags: u32) {
        self.guest_shut |= flags;
        let shutdown = Header {
            flags,
            ..says(Op::Shutdown)
        };
        self.say(shutdown, &[]);
    }

    /// Takes packets, at most so many. Whether one came.
    fn hear(&mut self, most: usize) -> bool {
        for count in 0..most {
            let Some((header, payload)) = self.wire.packet() else {
                self.limit.1 = self.limit.0;
                self.deaf = self.guest_shut & SHUTDOWN_RECEIVE != 0;
                if Self::ALONE && !self.is_over() {
                    self.nothing_is_left_unsaid();
                }
                return count > 0;
            };
            self.heard(header, &payload);
        }
        most > 0
    }

    fn heard(&mut self, header: Header, payload: &[u8]) {
        assert!(!self.reset, "{header:?} behind RST");
        let ports = self.wire.ports();
        assert_eq!(
            (header.src_port, header.dst_port),
            (ports.host, ports.guest)
        );
        assert_eq!(header.buf_alloc, BUFFER);
        let told = self.wire.counted().wrapping_add(self.forwarded as u32);
        self.forwarded += header.fwd_cnt.wrapping_sub(told) as usize;
        let arrived = self.arrived();
        assert!(self.forwarded <= arrived, "told of more than has arrived");
        let exact = Self::ALONE && self.program_reads && !self.broken;
        assert!(!exact || self.forwarded == arrived, "told of less");

        match Op::from_u16(header.op).unwrap() {
            Op::Data => self.heard_data(payload),
            Op::Shutdown => self.heard_shutdown(header.flags),
            Op::CreditRequest if Self::ALONE => {
                assert!(self.received as u64 >= self.limit.0, "there is credit");
                assert!(!self.asked, "asked again");
                self.asked = true;
            }
            Op::CreditRequest | Op::CreditUpdate => {}
            Op::Reset => {
                let done = self.guest_shut == SHUTDOWN_BOTH && arrived == self.sent;
                assert!(done || self.broken, "RST too early");
                self.reset = true;
            }
            other => panic!("{other:?}"),
        }
    }

    fn heard_data(&mut self, payload: &[u8]) {
        assert!(!payload.is_empty() && !self.deaf);
        assert_eq!(self.told_shut & SHUTDOWN_SEND, 0, "data behind the end");
        let there = &STRINGS[1][self.received..self.written];
        assert!(there.starts_with(payload), "other bytes came to the guest");
        self.received += payload.len();
        assert!(self.received as u64 <= self.limit.1, "beyond the credit");
    }

    fn heard_shutdown(&mut self, flags: u32) {
        assert_ne!(flags & !self.told_shut, 0, "told again");
        assert_eq!(flags & self.told_shut, self.told_shut);
        if flags & SHUTDOWN_SEND != 0 {
            assert!(!self.program_writes, "there may be more");
            assert_eq!(self.received, self.written, "not the last byte");
        }
        if flags & SHUTDOWN_RECEIVE != 0 {
            // To a guest that has sent all that it will it does not matter.
            let sent_all = self.guest_shut & SHUTDOWN_SEND != 0;
            assert!(!self.program_reads || sent_all, "there is a reader");
            let counted = !Self::ALONE || self.forwarded == self.sent;
            assert!(counted, "room is taken by what nobody reads");
        }
        self.told_shut = flags;
    }

    /// The device is silent: the guest knows all that it must, or cannot take more.
    fn nothing_is_left_unsaid(&self) {
        let knows = self.forwarded == self.arrived() || !self.program_reads;
        assert!(knows || self.has_room(), "room is not told of");
        if self.deaf {
            return;
        }
        if self.limit.0 > self.received as u64 {
            assert_eq!(self.received, self.written, "bytes do not come");
            let told = self.told_shut & SHUTDOWN_SEND != 0;
            assert_eq!(told, !self.program_writes, "the end does not come");
        } else {
            assert!(self.asked || self.received == self.written, "no asking");
        }
    }

    fn write(&mut self, count: usize) {
        let Some(program) = self.program.as_mut().filter(|_| self.program_writes) else {
            return;
        };
        let rest = &STRINGS[1][self.written..];
        match program.write(&rest[..count.min(rest.len())]) {
            Ok(count) => self.written += count,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::BrokenPipe);
                let ended = self.guest_shut & SHUTDOWN_RECEIVE != 0 || self.broken;
                assert!(ended, "the guest still reads");
            }
        }
    }

    /// Lets the program read. Whether it got anything; the end of file is `None`.
    fn read(&mut self, count: usize) -> Option<bool> {
        let Some(program) = self.program.as_mut().filter(|_| self.program_reads) else {
            return Some(false);
        };
        let mut bytes = vec![0; count];
        match program.read(&mut bytes) {
            Ok(0) if count > 0 => {
                let whole = self.read == self.sent && self.guest_shut & SHUTDOWN_SEND != 0;
                assert!(whole || self.broken, "the end comes too early");
                self.ended = true;
                None
            }
            Ok(count) => {
                let there = &STRINGS[0][self.read..self.sent];
                assert!(there.starts_with(&bytes[..count]), "other bytes came out");
                self.read += count;
                Some(count > 0)
            }
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::WouldBlock);
                Some(false)
            }
        }
    }

    fn program_shuts(&mut self, how: Shutdown) {
        self.program_reads &= how == Shutdown::Write;
        self.program_writes &= how == Shutdown::Read;
        if let Some(program) = &self.program {
            program.shutdown(how).unwrap();
        }
    }

    /// Goes on until `done`, with a guest and a program that read.
    fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let mut end = Instant::now() + W::PATIENCE;
        while !done(self) {
            let ended = self.ended;
            let mut moved = self.hear(100);
            moved |= self.read(MOST) == Some(true) || self.ended != ended;
            if self.taken < self.received && !self.is_over() {
                self.taken = self.received;
                self.say(says(Op::CreditUpdate), &[]);
                moved = true;
            }
            if moved {
                end = Instant::now() + W::PATIENCE;
            } else {
                wait(end, what);
            }
        }
    }

    /// Whatever has happened: what was sent arrives, and then the end of it.
    fn finish(mut self) {
        if !self.is_over() {
            self.window = 256 * 1024;
            self.say(says(Op::CreditUpdate), &[]);
            let hears = self.guest_shut & SHUTDOWN_RECEIVE == 0;
            let sends = self.guest_shut & SHUTDOWN_SEND == 0;
            self.until("something does not arrive", |it| {
                // The last byte, and then room for more or the end.
                let next = if sends { it.has_room() } else { it.ended };
                let at_program = it.read == it.sent && next;
                let at_guest = it.received == it.written;
                (at_program || !it.program_reads) && (at_guest || !hears)
            });
            self.program_shuts(Shutdown::Write);
            let gone = if self.program_reads {
                0
            } else {
                SHUTDOWN_RECEIVE
            };
            let told = if hears { SHUTDOWN_SEND | gone } else { 0 };
            self.until("the end is not told", |it| it.told_shut & told == told);
            self.guest_shuts(SHUTDOWN_BOTH);
        }
        self.until("no RST", |it| it.reset);
        self.end();
    }

    /// After RST of either side: what is left for the program, and nothing for the guest.
    fn end(&mut self) {
        let mut end = Instant::now() + W::PATIENCE;
        loop {
            assert!(!self.hear(1), "the guest knows it no more");
            match self.read(MOST) {
                _ if !self.program_reads => break,
                None => break,
                Some(true) => end = Instant::now() + W::PATIENCE,
                Some(false) => wait(end, "the program is not told of the end"),
            }
        }
    }
}

fn wait(end: Instant, what: &str) {
    assert!(Instant::now() < end, "{what}");
    std::thread::sleep(Duration::from_micros(50));
}
