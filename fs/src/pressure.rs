//! Says when descriptors run out, so that the guest can be asked to forget what it no longer needs.
//!
//! An inode of a file system without file handles costs a descriptor for as long as the guest
//! remembers it, and the guest remembers what it has memory for. Near the limit, an event is
//! signalled to whoever can make the guest let go.

use std::fs::File;
use std::io::Write;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::sys;

/// The numbers of descriptors are looked at once in so many requests.
const REQUESTS: u32 = 256;
/// So many numbers are looked at.
const SAMPLES: u32 = 64;
/// And so many of them must be taken. The kernel gives out the lowest free number: below the highest
/// one there are few gaps, unless much has been closed.
const TAKEN: usize = 60;

/// See the module.
pub struct Pressure {
    event: Option<File>,
    /// Below this number nearly all are taken when it is time.
    high: u32,
    requests: AtomicU32,
}

impl Pressure {
    /// Signals `event`, an eventfd(2) that does not block, when about three quarters of `limit` descriptors are taken.
    pub fn new(event: Option<File>, limit: u64) -> Self {
        let high = u32::try_from(limit / 4 * 3).unwrap_or(u32::MAX);
        Self {
            event,
            high: high.max(SAMPLES),
            requests: AtomicU32::new(0),
        }
    }

    /// To be called with each request.
    pub fn request(&self) {
        let Some(mut event) = self.event.as_ref() else {
            return;
        };
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        if number % REQUESTS == REQUESTS - 1 && self.is_high() {
            // A counter that is full has been signalled often enough.
            let _ = event.write(&1_u64.to_ne_bytes());
        }
    }

    fn is_high(&self) -> bool {
        let step = (self.high / SAMPLES) as usize;
        let numbers = (0..self.high).step_by(step);
        let taken = numbers.filter(|number| RawFd::try_from(*number).is_ok_and(sys::is_open));
        taken.take(TAKEN).count() == TAKEN
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;

    use nix::sys::eventfd::{EfdFlags, EventFd};

    use super::*;

    #[test]
    fn it_tells_when_most_descriptors_are_taken() {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        let mut told = File::from(event.as_fd().try_clone_to_owned().unwrap());
        let pressure = Pressure::new(Some(told.try_clone().unwrap()), 1200);
        let mut is_told = || {
            (0..REQUESTS).for_each(|_| pressure.request());
            told.read(&mut [0; 8]).is_ok()
        };
        assert!(!is_told());
        let files: Vec<_> = (0..900).map(|_| File::open("/dev/null").unwrap()).collect();
        assert!(is_told());
        drop(files);
        assert!(!is_told());
    }
}
