//! System calls that have no safe wrapper in a crate we depend on.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd};

use vmm_sys_util::eventfd::EventFd;

/// Fills `buffer` from the host's random number generator (getrandom(2)).
///
/// # Errors
/// What the system says; the generator has been seeded long before a VMM runs.
pub fn random(buffer: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        let rest = &mut buffer[done..];
        // SAFETY: pointer and length are those of a slice we hold exclusively.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(got) {
            Ok(count) => done += count,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// A second descriptor of an eventfd, as the type that vhost calls want.
///
/// # Errors
/// dup(2).
pub fn eventfd_from(fd: BorrowedFd<'_>) -> io::Result<EventFd> {
    let owned = fd.as_fd().try_clone_to_owned()?;
    // SAFETY: the descriptor was just made and passes into the EventFd's ownership.
    Ok(unsafe { EventFd::from_raw_fd(owned.into_raw_fd()) })
}

/// A file mapped read-only and shared with all who map it, followed by zeroes.
#[derive(Debug)]
pub struct SharedMapping {
    address: *mut libc::c_void,
    size: usize,
}

// SAFETY: the mapping is read-only memory that lives as long as the value; any thread may read it.
unsafe impl Send for SharedMapping {}
// SAFETY: as above.
unsafe impl Sync for SharedMapping {}

impl SharedMapping {
    /// Maps `length` bytes of `file` and zeroes behind them, `size` bytes in all, starting at a
    /// multiple of `align`, a power of two that is at least a page.
    ///
    /// # Errors
    /// mmap(2); `InvalidInput` if the file would not fit.
    pub fn new(file: BorrowedFd<'_>, length: usize, size: usize, align: usize) -> io::Result<Self> {
        let reserve = size.checked_add(align);
        let (Some(reserve), true) = (reserve, align.is_power_of_two() && length <= size) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), reserve, libc::PROT_READ, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let before = start.align_offset(align);
        let address = start.wrapping_byte_add(before);
        // SAFETY: both ranges lie in the mapping just made and nobody has a pointer into it.
        unsafe {
            if before > 0 {
                libc::munmap(start, before);
            }
            libc::munmap(address.wrapping_byte_add(size), align - before);
        }
        let mapping = Self { address, size };
        if length > 0 {
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
            // SAFETY: replaces part of the range that `mapping` owns; length <= size was checked.
            let over = unsafe { libc::mmap(address, length, libc::PROT_READ, flags, fd, 0) };
            if over == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(mapping)
    }

    /// Where it is in this process.
    pub fn address(&self) -> *const u8 {
        self.address.cast()
    }

    /// Bytes, zeroes included.
    pub fn size(&self) -> usize {
        self.size
    }

    /// What a guest would see, for tests: copies out what is mapped at `offset`; how much is the smaller of both lengths.
    #[cfg(test)]
    pub fn read(&self, offset: usize, into: &mut [u8]) -> usize {
        let count = self.size.saturating_sub(offset).min(into.len());
        // SAFETY: offset + count <= size; the source is mapped readable for the life of `self`.
        unsafe {
            let source = self.address.cast::<u8>().add(offset.min(self.size));
            std::ptr::copy_nonoverlapping(source, into.as_mut_ptr(), count);
        }
        count
    }
}

impl Drop for SharedMapping {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own and goes with it.
        unsafe { libc::munmap(self.address, self.size) };
    }
}
