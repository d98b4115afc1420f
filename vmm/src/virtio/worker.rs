//! The thread that serves a device.
//!
//! One per active device, named after it. It waits on one epoll for the kicks of its queues, for
//! the device's own descriptors and for the order to stop; between two waits it takes one
//! [`Handler::turn`]. A worker that fails or panics tells the driver (NEEDS_RESET) and ends; the VM
//! lives on. Stopping joins the thread, so that afterwards nothing of it touches guest memory.

use std::io;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Instant;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{ActivateError, DeviceType, Interrupt};
use super::error::DeviceError;
use crate::sys::event_fd;

/// Confines the calling thread to what a device of this type needs.
pub type ThreadFilter = dyn Fn(DeviceType) -> io::Result<()> + Send + Sync;

static FILTER: OnceLock<Box<ThreadFilter>> = OnceLock::new();

/// Sets what each worker calls before it touches its device. A worker whose filter fails does not
/// start serving. Returns false if a filter was set before: the first one stays.
pub fn set_thread_filter(filter: Box<ThreadFilter>) -> bool {
    FILTER.set(filter).is_ok()
}

const STOP: u64 = u64::MAX;
const EVENTS_PER_WAIT: usize = 64;

/// When a handler wants its next turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// When something happens.
    Wait,
    /// At this time, or earlier when something happens.
    At(Instant),
    /// At once: there is more to do, but others come first.
    Again,
}

/// A device's half of the worker.
pub trait Handler {
    /// Something happened on the descriptor watched as `token`. Only takes note of it.
    ///
    /// # Errors
    /// The device cannot go on.
    fn event(&mut self, waits: &Waits, token: u64, flags: EpollFlags) -> Result<(), DeviceError>;

    /// Does the work, a bounded amount. Called once at the start and after each batch of events.
    ///
    /// # Errors
    /// The device cannot go on.
    fn turn(&mut self, waits: &Waits) -> Result<Next, DeviceError>;
}

/// What a worker waits for.
pub struct Waits {
    epoll: Epoll,
}

impl Waits {
    /// Watches an eventfd. It is never read: each write to it is one event (EPOLLET, epoll(7)).
    ///
    /// # Errors
    /// epoll_ctl(2).
    pub fn add_kick(&self, kick: &EventFd, token: u64) -> io::Result<()> {
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        self.add(event_fd(kick), flags, token)
    }

    /// Watches a descriptor.
    ///
    /// # Errors
    /// epoll_ctl(2).
    pub fn add(&self, fd: impl AsFd, flags: EpollFlags, token: u64) -> io::Result<()> {
        debug_assert_ne!(token, STOP);
        Ok(self.epoll.add(fd, EpollEvent::new(flags, token))?)
    }

    /// Watches a descriptor no more. One that was not watched is let be.
    pub fn remove(&self, fd: impl AsFd) {
        let _ = self.epoll.delete(fd);
    }

    /// Lets `handler` serve until the worker is told to stop.
    ///
    /// # Errors
    /// What the handler says, and epoll_wait(2).
    pub fn serve(&self, handler: &mut impl Handler) -> Result<(), DeviceError> {
        let mut events = [EpollEvent::empty(); EVENTS_PER_WAIT];
        loop {
            let timeout = match handler.turn(self)? {
                Next::Wait => EpollTimeout::NONE,
                Next::Again => EpollTimeout::ZERO,
                Next::At(time) => until(time),
            };
            #[cfg(feature = "testing")]
            let timeout = match super::inline::step() {
                None => timeout,
                Some(true) => EpollTimeout::ZERO,
                Some(false) => return Ok(()),
            };
            let count = match self.epoll.wait(&mut events, timeout) {
                Err(nix::Error::EINTR) => 0,
                other => other.map_err(|e| DeviceError::host("epoll_wait")(e.into()))?,
            };
            for event in &events[..count] {
                if event.data() == STOP {
                    return Ok(());
                }
                handler.event(self, event.data(), event.events())?;
            }
        }
    }
}

/// Whole milliseconds until `time`, rounded up so that it has come when the wait ends.
fn until(time: Instant) -> EpollTimeout {
    let left = time.saturating_duration_since(Instant::now());
    let milliseconds = left.as_micros().div_ceil(1000).min(60_000);
    EpollTimeout::try_from(milliseconds as i32).unwrap_or(EpollTimeout::ZERO)
}

/// A running worker. Dropping it stops and joins it.
pub struct Worker {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the worker of a device. `body` builds the device's handler and lets it
    /// [`Waits::serve`]. `name` is the thread's, at most 15 bytes.
    ///
    /// # Errors
    /// No thread or descriptor to be had.
    pub fn spawn(
        name: &str,
        device: DeviceType,
        interrupt: Arc<dyn Interrupt>,
        body: impl FnOnce(&Waits) -> Result<(), DeviceError> + Send + 'static,
    ) -> Result<Self, ActivateError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(|e| ActivateError::Worker(e.into()))?;
        let waits = Waits { epoll };
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(ActivateError::Worker)?;
        waits
            .epoll
            .add(event_fd(&stop), EpollEvent::new(EpollFlags::EPOLLIN, STOP))
            .map_err(|e| ActivateError::Worker(e.into()))?;
        #[cfg(feature = "testing")]
        if super::inline::is_wanted() {
            run(device, &interrupt, &waits, body);
            return Ok(Self { stop, thread: None });
        }
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn(move || run(device, &interrupt, &waits, body))
            .map_err(ActivateError::Worker)?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

fn run(
    device: DeviceType,
    interrupt: &Arc<dyn Interrupt>,
    waits: &Waits,
    body: impl FnOnce(&Waits) -> Result<(), DeviceError>,
) {
    let served = catch_unwind(AssertUnwindSafe(|| {
        if let Some(filter) = FILTER.get() {
            filter(device).map_err(DeviceError::host("confining the worker"))?;
        }
        body(waits)
    }));
    match served {
        Ok(Ok(())) => return,
        Ok(Err(error)) => {
            let cause = std::error::Error::source(&error);
            let cause = cause.map(|c| format!(": {c}")).unwrap_or_default();
            tracing::error!(?device, "device stopped: {error}{cause}");
        }
        // The panic hook has reported it already.
        Err(_) => tracing::error!(?device, "device stopped: its worker panicked"),
    }
    interrupt.needs_reset();
}

impl Drop for Worker {
    fn drop(&mut self) {
        // An eventfd takes a write unless it has been written 2^64 times.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use super::super::testing::TestInterrupt;
    use super::*;

    struct Counter {
        kicks: Arc<AtomicU32>,
    }

    impl Handler for Counter {
        fn event(&mut self, _: &Waits, token: u64, _: EpollFlags) -> Result<(), DeviceError> {
            assert_eq!(token, 7);
            if self.kicks.fetch_add(1, Ordering::SeqCst) == 2 {
                return Err(DeviceError::BackEndGone);
            }
            Ok(())
        }

        fn turn(&mut self, _: &Waits) -> Result<Next, DeviceError> {
            Ok(Next::Wait)
        }
    }

    fn eventually(condition: impl Fn() -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !condition() {
            assert!(Instant::now() < end, "it never came");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn each_write_to_a_kick_is_seen_and_an_error_asks_for_a_reset() {
        let interrupt = TestInterrupt::new(0);
        let kicks = Arc::new(AtomicU32::new(0));
        let kick = EventFd::new(EFD_CLOEXEC).unwrap();
        let theirs = kick.try_clone().unwrap();
        let mut counter = Counter {
            kicks: Arc::clone(&kicks),
        };
        let worker = Worker::spawn("test", DeviceType::Rng, interrupt.clone(), move |waits| {
            waits.add_kick(&theirs, 7).unwrap();
            waits.serve(&mut counter)
        })
        .unwrap();
        for n in 1..=2 {
            kick.write(1).unwrap();
            eventually(|| kicks.load(Ordering::SeqCst) == n);
            assert!(!interrupt.wants_reset());
        }
        kick.write(1).unwrap();
        eventually(|| interrupt.wants_reset());
        drop(worker);
    }

    #[test]
    fn a_panic_asks_for_a_reset_and_stopping_joins() {
        let interrupt = TestInterrupt::new(0);
        let worker = Worker::spawn("test", DeviceType::Rng, interrupt.clone(), |_| {
            panic!("on purpose, by a test")
        })
        .unwrap();
        eventually(|| interrupt.wants_reset());
        drop(worker);

        let interrupt = TestInterrupt::new(0);
        let alive = Arc::new(());
        let theirs = Arc::clone(&alive);
        let mut counter = Counter {
            kicks: Arc::default(),
        };
        let worker = Worker::spawn("test", DeviceType::Rng, interrupt.clone(), move |waits| {
            let _theirs = theirs;
            waits.serve(&mut counter)
        })
        .unwrap();
        drop(worker);
        assert_eq!(Arc::strong_count(&alive), 1);
        assert!(!interrupt.wants_reset());
    }
}
