//! What the program inherits.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

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
    unsafe {
        libc::fcntl(
            std::os::fd::AsRawFd::as_raw_fd(&fd),
            libc::F_SETFD,
            libc::FD_CLOEXEC,
        )
    };
    Some(fd)
}
