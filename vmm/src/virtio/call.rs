//! Descriptors by which another process, or the kernel, raises a queue's interrupt.

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{ActivateError, Interrupt};
use super::sys;

/// The descriptor to hand to whoever serves queue `index`. True beside it: the transport has none,
/// this is a new one, and the device must raise the interrupt itself each time it is written to.
///
/// # Errors
/// No descriptor to be had.
pub fn call_descriptor(
    interrupt: &dyn Interrupt,
    index: u16,
) -> Result<(EventFd, bool), ActivateError> {
    let call = match interrupt.used_fd(index) {
        Some(fd) => (sys::eventfd_from(fd), false),
        None => (EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK), true),
    };
    Ok((call.0.map_err(ActivateError::Worker)?, call.1))
}
