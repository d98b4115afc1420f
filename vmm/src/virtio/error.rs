//! Why a device stops serving its queues, and how it complains of single bad requests.

use std::io;
use std::time::{Duration, Instant};

/// What the driver did wrong with a ring. The device stops and sets NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The ring itself cannot be followed: its index ran away, or it left RAM.
    #[error("ring is broken")]
    Ring(#[from] virtio_queue::Error),
    /// A chain's head lies beyond the descriptor table.
    #[error("chain head {head} in a queue of {size}")]
    Head {
        /// Index of the descriptor.
        head: u16,
        /// Descriptors in the table.
        size: u16,
    },
    /// A chain that is empty, loops, or links or points to where no descriptor can be
    /// (virtio 1.2, 2.7.5), among them an indirect table inside another (2.7.5.3.1).
    #[error("chain {head} does not end")]
    Unterminated {
        /// Index of its first descriptor.
        head: u16,
    },
    /// More buffers than any request needs.
    #[error("chain {head} has more than {max} buffers")]
    TooLong {
        /// Index of its first descriptor.
        head: u16,
        /// The limit.
        max: usize,
    },
    /// A buffer outside of guest RAM.
    #[error("buffer of {len} bytes at {gpa:#x} is not RAM")]
    NotRam {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        len: u32,
    },
    /// A buffer of no bytes.
    #[error("buffer of no bytes in chain {head}")]
    ZeroLength {
        /// Index of the chain's first descriptor.
        head: u16,
    },
    /// More buffers on offer than the queue has descriptors.
    #[error("more buffers than a queue of {size} has")]
    Overrun {
        /// Descriptors in the table.
        size: u16,
    },
    /// A device-readable buffer behind a device-writable one (virtio 1.2, 2.7.4.2).
    #[error("readable buffer behind a writable one in chain {head}")]
    Order {
        /// Index of the chain's first descriptor.
        head: u16,
    },
}

/// Why a device's worker ended before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver broke a ring.
    #[error("queue {queue}")]
    Ring {
        /// Its number in the device.
        queue: u16,
        /// How.
        source: RingError,
    },
    /// The host refused what the device cannot do without.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The back end that serves the device is gone.
    #[error("back end closed its connection")]
    BackEndGone,
}

impl DeviceError {
    /// For `map_err`: names what was tried.
    pub fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

/// Lets one complaint through in a while, so that a guest cannot flood the log.
#[derive(Debug, Default)]
pub struct Complaints {
    last: Option<Instant>,
    withheld: u64,
}

impl Complaints {
    const PAUSE: Duration = Duration::from_secs(10);

    /// Logs that the guest asked for what cannot be done, unless another complaint was logged
    /// less than ten seconds ago.
    pub fn warn(&mut self, device: &'static str, complaint: &dyn std::fmt::Display) {
        let now = Instant::now();
        if self
            .last
            .is_some_and(|last| now.duration_since(last) < Self::PAUSE)
        {
            self.withheld += 1;
            return;
        }
        tracing::warn!(device, withheld = self.withheld, "bad request: {complaint}");
        self.last = Some(now);
        self.withheld = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::Complaints;

    #[test]
    fn a_flood_of_complaints_is_withheld() {
        let mut complaints = Complaints::default();
        for _ in 0..1000 {
            complaints.warn("test", &"again");
        }
        assert_eq!(complaints.withheld, 999);
    }
}
