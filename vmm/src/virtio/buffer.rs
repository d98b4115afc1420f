//! The bytes of a descriptor chain, in place in guest RAM.
//!
//! A [`Reader`] covers a chain's device-readable buffers, a [`Writer`] its device-writable ones.
//! Both are consumed from the front and hand guest RAM straight to the host's scatter-gather calls,
//! so that payload is copied once. The guest may change the bytes at any time: what is decided upon
//! must be copied out first.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::{GuestMemoryMmap, VolatileSlice};

/// Most buffers in one chain, the host's limit for one scatter-gather call (IOV_MAX, limits.h).
pub const MAX_SEGMENTS: usize = 1024;

/// Pieces of guest RAM in order. Every piece is RAM that `'m` keeps mapped.
struct Segments<'m> {
    pieces: Vec<libc::iovec>,
    /// Pieces already consumed.
    first: usize,
    /// Bytes left.
    len: usize,
    memory: PhantomData<&'m GuestMemoryMmap>,
}

impl<'m> Segments<'m> {
    const fn new() -> Self {
        Self {
            pieces: Vec::new(),
            first: 0,
            len: 0,
            memory: PhantomData,
        }
    }

    fn push(&mut self, slice: &VolatileSlice<'m>) {
        let iov_base = slice.ptr_guard_mut().as_ptr().cast();
        self.pieces.push(libc::iovec {
            iov_base,
            iov_len: slice.len(),
        });
        // Chains are shorter than 4 GiB (virtio 1.2, 2.7.5.2) and so is their sum.
        self.len += slice.len();
    }

    fn left(&self) -> &[libc::iovec] {
        let left = &self.pieces[self.first..];
        &left[..left.len().min(MAX_SEGMENTS)]
    }

    fn consume(&mut self, mut count: usize) {
        debug_assert!(count <= self.len);
        self.len = self.len.saturating_sub(count);
        while count > 0 {
            let Some(piece) = self.pieces.get_mut(self.first) else {
                return;
            };
            if count < piece.iov_len {
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(count).cast();
                piece.iov_len -= count;
                return;
            }
            count -= piece.iov_len;
            self.first += 1;
        }
    }

    /// The first `count` bytes, or all there are, without consuming them.
    fn front(&self, count: usize) -> Self {
        let count = count.min(self.len);
        let mut front = Self::new();
        for piece in &self.pieces[self.first..] {
            let iov_len = piece.iov_len.min(count - front.len);
            if iov_len == 0 {
                break;
            }
            front.pieces.push(libc::iovec {
                iov_base: piece.iov_base,
                iov_len,
            });
            front.len += iov_len;
        }
        front
    }

    /// Cuts off the first `count` bytes, or all there are.
    fn take(&mut self, count: usize) -> Self {
        let front = self.front(count);
        self.consume(front.len);
        front
    }

    /// Calls `copy` with each piece of the first `count` bytes and the offset of the piece.
    fn each(&mut self, count: usize, mut copy: impl FnMut(usize, VolatileSlice<'_>)) {
        let mut done = 0;
        for piece in &self.pieces[self.first..] {
            if done == count {
                break;
            }
            let length = piece.iov_len.min(count - done);
            // SAFETY: the piece is guest RAM that stays mapped for 'm (invariant of the type), and
            // a VolatileSlice may be shared with the guest.
            copy(done, unsafe {
                VolatileSlice::new(piece.iov_base.cast(), length)
            });
            done += length;
        }
        self.consume(count);
    }

    fn advance(&mut self, result: isize) -> io::Result<usize> {
        let count = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
        self.consume(count);
        Ok(count)
    }

    fn message(&self) -> libc::msghdr {
        // SAFETY: msghdr is plain old data for which all zeroes means: nothing.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.left().as_ptr().cast_mut();
        message.msg_iovlen = self.left().len();
        message
    }
}

fn offset(at: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(at).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

/// What the device may read of a chain.
pub struct Reader<'m>(Segments<'m>);

/// What the device may write of a chain.
pub struct Writer<'m>(Segments<'m>);

impl<'m> Reader<'m> {
    pub(super) const fn new() -> Self {
        Self(Segments::new())
    }

    pub(super) fn push(&mut self, slice: &VolatileSlice<'m>) {
        self.0.push(slice);
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// Copies out and consumes the next bytes; how many is the smaller of both lengths.
    pub fn read(&mut self, into: &mut [u8]) -> usize {
        let count = into.len().min(self.0.len);
        self.0.each(count, |at, slice| {
            slice.copy_to(&mut into[at..count]);
        });
        count
    }

    /// Copies out and consumes the next `N` bytes; `None`, and nothing is consumed, if there are
    /// fewer.
    pub fn read_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        if self.0.len < N {
            return None;
        }
        let mut array = [0; N];
        self.read(&mut array);
        Some(array)
    }

    /// Cuts off the next `count` bytes, or all there are.
    pub fn take(&mut self, count: usize) -> Self {
        Self(self.0.take(count))
    }

    /// Writes to a file, at most [`MAX_SEGMENTS`] buffers, and consumes what was written.
    ///
    /// # Errors
    /// writev(2).
    pub fn write_to(&mut self, file: BorrowedFd<'_>) -> io::Result<usize> {
        let left = self.0.left();
        // SAFETY: the iovecs are guest RAM mapped for 'm; the kernel only reads it.
        let result =
            unsafe { libc::writev(file.as_raw_fd(), left.as_ptr(), left.len() as libc::c_int) };
        self.0.advance(result)
    }

    /// Like [`Reader::write_to`] at byte `at` of a file that has positions.
    ///
    /// # Errors
    /// pwritev(2).
    pub fn write_to_at(&mut self, file: BorrowedFd<'_>, at: u64) -> io::Result<usize> {
        let at = offset(at)?;
        let left = self.0.left();
        // SAFETY: as in `write_to`.
        let result = unsafe {
            libc::pwritev(
                file.as_raw_fd(),
                left.as_ptr(),
                left.len() as libc::c_int,
                at,
            )
        };
        self.0.advance(result)
    }

    /// Sends on a connected socket without waiting and without SIGPIPE, and consumes what was
    /// taken.
    ///
    /// # Errors
    /// sendmsg(2); `WouldBlock` when the socket takes nothing now.
    pub fn send_to(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let message = self.0.message();
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: the message's iovecs are guest RAM mapped for 'm; the kernel only reads it.
        let result = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags) };
        self.0.advance(result)
    }
}

impl<'m> Writer<'m> {
    pub(super) const fn new() -> Self {
        Self(Segments::new())
    }

    pub(super) fn push(&mut self, slice: &VolatileSlice<'m>) {
        self.0.push(slice);
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// Copies in and consumes; how many bytes is the smaller of both lengths.
    pub fn write(&mut self, from: &[u8]) -> usize {
        let count = from.len().min(self.0.len);
        self.0
            .each(count, |at, slice| slice.copy_from(&from[at..count]));
        count
    }

    /// Cuts off the next `count` bytes, or all there are.
    pub fn take(&mut self, count: usize) -> Self {
        Self(self.0.take(count))
    }

    /// Where the buffers are in this process, and their lengths.
    pub fn ranges(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.0.pieces[self.0.first..]
            .iter()
            .map(|piece| (piece.iov_base.addr(), piece.iov_len))
    }

    /// Passes over the next `count` bytes, or all there are.
    pub fn skip(&mut self, count: usize) {
        self.0.consume(count.min(self.0.len));
    }

    /// Puts the pieces of `other` behind the ones here.
    pub fn append(&mut self, other: Self) {
        self.0
            .pieces
            .extend_from_slice(&other.0.pieces[other.0.first..]);
        self.0.len += other.0.len;
    }

    /// A view of the first `count` bytes, or of all there are, that leaves them here.
    pub fn front(&self, count: usize) -> Self {
        Self(self.0.front(count))
    }

    /// Reads from a file, at most [`MAX_SEGMENTS`] buffers, and consumes what came.
    ///
    /// # Errors
    /// readv(2).
    pub fn read_from(&mut self, file: BorrowedFd<'_>) -> io::Result<usize> {
        let left = self.0.left();
        // SAFETY: the iovecs are guest RAM mapped writable for 'm.
        let result =
            unsafe { libc::readv(file.as_raw_fd(), left.as_ptr(), left.len() as libc::c_int) };
        self.0.advance(result)
    }

    /// Like [`Writer::read_from`] at byte `at` of a file that has positions.
    ///
    /// # Errors
    /// preadv(2).
    pub fn read_from_at(&mut self, file: BorrowedFd<'_>, at: u64) -> io::Result<usize> {
        let at = offset(at)?;
        let left = self.0.left();
        // SAFETY: as in `read_from`.
        let result = unsafe {
            libc::preadv(
                file.as_raw_fd(),
                left.as_ptr(),
                left.len() as libc::c_int,
                at,
            )
        };
        self.0.advance(result)
    }

    /// Receives from a connected socket without waiting, and consumes what came.
    ///
    /// # Errors
    /// recvmsg(2); `WouldBlock` when nothing is there.
    pub fn receive_from(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut message = self.0.message();
        // SAFETY: the message's iovecs are guest RAM mapped writable for 'm; no control buffer is
        // given, so that descriptors sent along are dropped by the kernel.
        let result = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
        self.0.advance(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On plain memory and without a system call, so that Miri can watch (`tests/miri`).
    #[test]
    fn pieces_are_read_and_written_in_order_and_never_beyond_their_ends() {
        let mut ram = [0_u8; 64];
        let (low, high) = ram.split_at_mut(32);
        // Out of order and with gaps. None is ever empty: the ring leaves those out.
        let pieces = [&mut high[4..11], &mut low[9..20]];
        let pieces = pieces.map(VolatileSlice::from);

        let mut writer = Writer::new();
        pieces.iter().for_each(|piece| writer.push(piece));
        assert_eq!(writer.write(b"ab"), 2);
        let mut front = writer.take(6);
        assert_eq!((front.len(), writer.len()), (6, 10));
        assert_eq!(front.write(b"cdefghi"), 6);
        writer.skip(1);
        assert_eq!(writer.write(b"0123456789"), 9);
        assert!(writer.is_empty());

        let mut reader = Reader::new();
        pieces.iter().for_each(|piece| reader.push(piece));
        assert_eq!(reader.read_array(), Some(*b"abcde"));
        let mut rest = [0; 20];
        assert_eq!(reader.read(&mut rest), 13);
        assert_eq!(&rest[..13], b"fgh\x00012345678");
        assert_eq!(reader.read_array::<1>(), None);
    }
}
