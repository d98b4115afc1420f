//! virtio-rng (virtio 1.2, section 5.4): the host's random numbers for the guest.
//!
//! The guest cannot keep the host's generator busy: a request gets at most [`MOST_PER_REQUEST`]
//! bytes, and all requests together [`BYTES_PER_SECOND`], after a first [`BURST`].

use std::time::{Duration, Instant};

use nix::sys::epoll::EpollFlags;

use super::device::{ActivateError, Activation, DeviceType, VirtioDevice};
use super::error::DeviceError;
use super::features;
use super::ring::Ring;
use super::sys;
use super::worker::{Handler, Next, Waits, Worker};

/// Bytes written into one request, the rest is left: more than a kernel asks for at once.
pub const MOST_PER_REQUEST: usize = 4096;
/// Bytes that may be had at once: a guest's first seed and much more.
pub const BURST: u32 = 64 * 1024;
/// Bytes per second after that.
pub const BYTES_PER_SECOND: u32 = 256 * 1024;

/// Pause when the budget is spent.
const REFILL: Duration = Duration::from_millis(25);
const QUEUE_SIZES: [u16; 1] = [16];

/// The device.
#[derive(Default)]
pub struct Rng {
    worker: Option<Worker>,
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        features::RING
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            memory,
            mut queues,
            interrupt,
            features,
        } = activation;
        let Some(requests) = queues.pop() else {
            return Err(ActivateError::MissingQueues { got: 0, need: 1 });
        };
        let theirs = interrupt.clone();
        let body = move |waits: &Waits| {
            waits
                .add_kick(&requests.kick, 0)
                .map_err(DeviceError::host("epoll_ctl"))?;
            let requests = Ring::new(requests, &memory, theirs, features);
            waits.serve(&mut Source {
                requests,
                budget: Budget::new(Instant::now()),
            })
        };
        self.worker = Some(Worker::spawn(
            "virtio-rng",
            DeviceType::Rng,
            interrupt,
            body,
        )?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// Bytes that may be given away now.
struct Budget {
    bytes: u32,
    counted: Instant,
}

impl Budget {
    fn new(now: Instant) -> Self {
        Self {
            bytes: BURST,
            counted: now,
        }
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.counted).as_micros();
        let more = passed * u128::from(BYTES_PER_SECOND) / 1_000_000;
        if more > 0 {
            let sum = u128::from(self.bytes) + more;
            self.bytes = u32::try_from(sum).unwrap_or(BURST).min(BURST);
            self.counted = now;
        }
    }
}

struct Source<'m> {
    requests: Ring<'m>,
    budget: Budget,
}

impl Handler for Source<'_> {
    fn event(&mut self, _: &Waits, _: u64, _: EpollFlags) -> Result<(), DeviceError> {
        Ok(())
    }

    fn turn(&mut self, _: &Waits) -> Result<Next, DeviceError> {
        let now = Instant::now();
        self.budget.refill(now);
        let limit = self.budget.bytes / MOST_PER_REQUEST as u32;
        let budget = &mut self.budget;
        let mut random = [0; MOST_PER_REQUEST];
        let more = self.requests.serve_at_most(limit as u16, |mut chain| {
            let count = chain.writable.len().min(MOST_PER_REQUEST);
            sys::random(&mut random[..count]).map_err(DeviceError::host("getrandom"))?;
            chain.writable.write(&random[..count]);
            // A request costs something even if it asks for nothing.
            budget.bytes = budget.bytes.saturating_sub(count.max(16) as u32);
            Ok(count as u32)
        })?;
        // Out of budget rather than out of requests: in a while there is more of it.
        Ok(if more {
            Next::At(now + REFILL)
        } else {
            Next::Wait
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Guest, readable, writable};
    use super::*;

    fn device() -> (Guest, super::super::testing::DriverQueue, Rng) {
        let mut guest = Guest::new(1);
        let queue = guest.queue(0, 16);
        let mut rng = Rng::default();
        guest.activate(&mut rng, &[&queue], 0);
        (guest, queue, rng)
    }

    #[test]
    fn requests_are_filled_with_random_bytes() {
        let (mut guest, mut queue, mut rng) = device();
        let at = guest.alloc(64, 8);
        assert_eq!(
            queue.request(&[writable(at, 32), writable(at + 32, 32)]),
            64
        );
        let first = guest.read(at, 64);
        assert_ne!(first, [0; 64]);
        assert_eq!(queue.request(&[writable(at, 64)]), 64);
        assert_ne!(guest.read(at, 64), first);
        rng.reset();
    }

    #[test]
    fn a_request_gets_no_more_than_its_share() {
        let (mut guest, mut queue, _rng) = device();
        let at = guest.alloc(1 << 20, 8);
        let written = queue.request(&[writable(at, 1 << 20)]);
        assert_eq!(written as usize, MOST_PER_REQUEST);
        assert_eq!(guest.read(at + written as u64, 16), [0; 16]);
    }

    #[test]
    fn a_request_that_only_offers_bytes_to_read_is_given_back_empty() {
        let (mut guest, mut queue, _rng) = device();
        let at = guest.place(b"not for you");
        assert_eq!(queue.request(&[readable(at, 11)]), 0);
        assert_eq!(guest.read(at, 11), b"not for you");
    }

    #[test]
    fn a_greedy_guest_is_slowed_down() {
        let (mut guest, mut queue, _rng) = device();
        let at = guest.alloc(MOST_PER_REQUEST, 8);
        let start = Instant::now();
        let mut bytes = 0;
        while bytes < BURST + BYTES_PER_SECOND / 4 {
            bytes += queue.request(&[writable(at, MOST_PER_REQUEST)]);
        }
        assert!(
            start.elapsed() > Duration::from_millis(150),
            "{:?}",
            start.elapsed()
        );
    }

    #[test]
    fn a_broken_ring_stops_the_device_and_a_reset_revives_it() {
        let (mut guest, queue, mut rng) = device();
        queue.set_available_index(1000);
        queue.kick();
        guest.interrupt.await_reset();
        rng.reset();

        let mut queue = guest.queue(0, 16);
        guest.interrupt = super::super::testing::TestInterrupt::new(1);
        rng.activate(guest.activation(&[&queue], 0)).unwrap();
        let at = guest.alloc(16, 8);
        queue.offer(&[writable(at, 16)]);
        queue.kick();
        let end = Instant::now() + Duration::from_secs(10);
        while queue.used().is_none() {
            assert!(Instant::now() < end);
        }
    }
}
