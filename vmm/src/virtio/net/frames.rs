//! Frames between the tap and the rings, copied once, by readv(2) and writev(2).
//!
//! A frame is only read when the ring has room for the largest one: until then it waits in the tap's
//! own queue, which drops what is too much. Receive buffers taken out of the ring are kept until a
//! frame fills them.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;

use super::tap::{HEADER_LEN, Tap};
use super::{GUEST_TSO4, GUEST_TSO6, MRG_RXBUF};
use crate::virtio::buffer::Writer;
use crate::virtio::error::{Complaints, DeviceError, RingError};
use crate::virtio::ring::{Chain, Ring};

/// Largest frame that needs cutting, with its Ethernet header (virtio 1.2, 5.1.6.3.1).
const LARGEST_FRAME: usize = 65_550;
/// Ethernet and VLAN headers before the MTU's bytes.
const LINK_HEADERS: usize = 18;
/// The field of the header that says over how many buffers a frame was spread.
const NUM_BUFFERS: usize = 10;
/// Frames in one direction before the other has its turn.
const BATCH: u16 = 64;

/// Frames for the guest.
pub struct Receiver<'m> {
    ring: Ring<'m>,
    /// Receive buffers in the order of the ring, none of them used yet.
    waiting: VecDeque<Chain<'m>>,
    room: usize,
    /// Bytes that the next frame may need.
    largest: usize,
    merge: bool,
    /// The tap is not known to be empty.
    pub readable: bool,
    complaints: Complaints,
}

impl<'m> Receiver<'m> {
    /// For a driver that accepted these features.
    pub fn new(ring: Ring<'m>, features: u64, mtu: u16) -> Self {
        let uncut = features & (GUEST_TSO4 | GUEST_TSO6) != 0;
        let frame = if uncut {
            LARGEST_FRAME
        } else {
            LINK_HEADERS + usize::from(mtu)
        };
        Self {
            ring,
            waiting: VecDeque::new(),
            room: 0,
            largest: HEADER_LEN + frame,
            merge: features & MRG_RXBUF != 0,
            readable: true,
            complaints: Complaints::default(),
        }
    }

    /// Moves a batch of frames. True: there may be more, and room for them.
    ///
    /// # Errors
    /// A broken ring, or a tap that fails.
    pub fn turn(&mut self, tap: &Tap) -> Result<bool, DeviceError> {
        let mut frames = 0;
        self.ring.disable_kicks()?;
        while self.readable && frames < BATCH && self.make_room()? {
            if self.read(tap)? {
                frames += 1;
            }
        }
        if frames > 0 {
            self.ring.notify()?;
        }
        Ok(self.readable && frames == BATCH)
    }

    /// Takes buffers until the largest frame fits. False: the driver has to offer more first, and
    /// will kick.
    fn make_room(&mut self) -> Result<bool, DeviceError> {
        let size = self.ring.size();
        let mut useless = 0;
        loop {
            // Without merging a frame gets one buffer, which must be large enough (5.1.6.3.1):
            // the tap cuts off what is too much.
            let enough = if self.merge {
                self.room >= self.largest
            } else {
                !self.waiting.is_empty()
            };
            if enough {
                return Ok(true);
            }
            match self.ring.pop()? {
                Some(chain) if chain.writable.len() < HEADER_LEN => {
                    self.complaints
                        .warn("net", &"receive buffer without room for a header");
                    self.ring.complete(chain.head, 0)?;
                    useless += 1;
                    // A driver that goes on offering them would keep us here.
                    if useless > size {
                        return Err(overrun(size));
                    }
                }
                Some(_) if self.waiting.len() == usize::from(size) => return Err(overrun(size)),
                Some(chain) => {
                    self.room += chain.writable.len();
                    self.waiting.push_back(chain);
                }
                None => {
                    if !self.ring.enable_kicks()? {
                        return Ok(false);
                    }
                    self.ring.disable_kicks()?;
                }
            }
        }
    }

    /// Reads one frame. False: there was none.
    fn read(&mut self, tap: &Tap) -> Result<bool, DeviceError> {
        let mut room = Writer::new();
        let most = if self.merge { self.waiting.len() } else { 1 };
        for chain in self.waiting.iter().take(most) {
            room.append(chain.writable.front(usize::MAX));
            if room.len() >= self.largest {
                break;
            }
        }
        match room.read_from(tap.as_fd()) {
            Ok(count) if count >= HEADER_LEN => self.used(count).map(|()| true),
            Ok(_) => Ok(true),
            Err(e) => match e.raw_os_error() {
                Some(libc::EAGAIN) => {
                    self.readable = false;
                    Ok(false)
                }
                Some(libc::EINTR) => Ok(false),
                // The frame was not fit to be delivered and is gone.
                Some(libc::EFAULT | libc::EINVAL | libc::EMSGSIZE) => {
                    self.complaints
                        .warn("net", &format_args!("frame dropped: {e}"));
                    Ok(true)
                }
                // The interface was removed: there is nothing to read until it is back.
                Some(libc::EBADFD | libc::EIO | libc::ENXIO) => {
                    self.readable = false;
                    Ok(false)
                }
                _ => Err(DeviceError::host("reading from the tap")(e)),
            },
        }
    }

    /// Gives back the buffers that a frame of `count` bytes has filled.
    fn used(&mut self, count: usize) -> Result<(), DeviceError> {
        let mut heads = Vec::with_capacity(1);
        let mut left = count;
        let mut header = None;
        while left > 0 {
            let Some(chain) = self.waiting.pop_front() else {
                break;
            };
            self.room -= chain.writable.len();
            let filled = left.min(chain.writable.len());
            left -= filled;
            heads.push((chain.head, filled as u32));
            header.get_or_insert_with(|| chain.writable.front(HEADER_LEN));
        }
        if let Some(mut header) = header {
            header.skip(NUM_BUFFERS);
            header.write(&(heads.len() as u16).to_le_bytes());
        }
        for (head, filled) in heads {
            self.ring.complete(head, filled)?;
        }
        Ok(())
    }
}

fn overrun(size: u16) -> DeviceError {
    let source = RingError::Overrun { size };
    DeviceError::Ring { queue: 0, source }
}

/// Frames of the guest.
pub struct Transmitter<'m> {
    ring: Ring<'m>,
    /// The tap took no more at the last try.
    pub full: bool,
    complaints: Complaints,
}

impl<'m> Transmitter<'m> {
    /// For a queue of the guest's frames.
    pub fn new(ring: Ring<'m>) -> Self {
        Self {
            ring,
            full: false,
            complaints: Complaints::default(),
        }
    }

    /// Moves a batch of frames. True: there are more, and the tap takes them.
    ///
    /// # Errors
    /// A broken ring.
    pub fn turn(&mut self, tap: &Tap) -> Result<bool, DeviceError> {
        let mut frames = 0;
        self.ring.disable_kicks()?;
        while !self.full && frames < BATCH {
            let Some(chain) = self.ring.pop()? else {
                if self.ring.enable_kicks()? {
                    self.ring.disable_kicks()?;
                    continue;
                }
                break;
            };
            let head = chain.head;
            if self.write(chain, tap) {
                self.ring.complete(head, 0)?;
                frames += 1;
            } else {
                self.ring.undo(1);
            }
        }
        if frames > 0 {
            self.ring.notify()?;
        }
        Ok(frames == BATCH)
    }

    /// Writes one frame. False: not now.
    fn write(&mut self, mut chain: Chain<'_>, tap: &Tap) -> bool {
        let length = chain.readable.len();
        if length <= HEADER_LEN || length > HEADER_LEN + LARGEST_FRAME {
            self.complaints
                .warn("net", &format_args!("frame of {length} bytes"));
            return true;
        }
        loop {
            match chain.readable.write_to(tap.as_fd()) {
                Ok(_) => return true,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.full = true;
                    return false;
                }
                // A header that contradicts the frame, or an interface that is down: as on any
                // wire, the frame is lost.
                Err(e) => {
                    self.complaints
                        .warn("net", &format_args!("frame not sent: {e}"));
                    return true;
                }
            }
        }
    }
}
