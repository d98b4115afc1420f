//! What the program inherits, how its C library is to behave, and a borrow that one lacks.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

use vmm_sys_util::eventfd::EventFd;

static TAKEN: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());

/// Takes possession of a descriptor that the program was started with. `None` if it is not open or
/// has been taken before. Not to be used once descriptors of our own have been closed: their
/// numbers would be taken for inherited ones.
pub fn inherited_fd(fd: RawFd) -> Option<OwnedFd> {
    let mut taken = TAKEN.lock().unwrap_or_else(|e| e.into_inner());
    // SAFETY: F_GETFD only asks; it fails for a descriptor that is not open.
    let open = fd >= 0 && unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0;
    if !open || taken.contains(&fd) {
        return None;
    }
    taken.push(fd);
    // SAFETY: it is open, was handed to this program by whoever started it, and is given out only
    // once.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: as above; our own children would inherit it otherwise.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
    Some(fd)
}

/// Its descriptor, which the type itself does not lend.
pub fn event_fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor lives as long as the EventFd whose borrow the result carries.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Makes the C library's heap one for all threads that never shrinks. To be called while there is
/// only one thread.
///
/// glibc gives each thread a heap of its own otherwise, and opens files of /sys and /proc to decide
/// how many there may be and whether one may shrink, which confined threads must not. Devices do not
/// allocate while they work, so nobody waits for the lock; what is large is mapped by itself and
/// given back.
pub fn share_one_heap() {
    // SAFETY: mallopt(3) has no preconditions; both parameters are known to every glibc.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}
