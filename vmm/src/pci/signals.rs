//! How a device's worker reaches its driver: the transport's side of [`Interrupt`].
//!
//! Shared between the transport (vCPU threads) and the worker; no locks, so that an interrupt never
//! waits for the guest's configuration accesses.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::sys::event_fd;
use crate::virtio::device::Interrupt;

/// VIRTIO_MSI_NO_VECTOR.
pub const NO_VECTOR: u16 = 0xffff;

/// ISR status bits (virtio 1.2, 4.1.4.5).
const ISR_QUEUE: u8 = 1 << 0;
const ISR_CONFIG: u8 = 1 << 1;

/// Vectors, ISR status and the device's failure.
pub struct Signals {
    events: Arc<[EventFd]>,
    queues: Box<[AtomicU16]>,
    config: AtomicU16,
    isr: AtomicU8,
    failed: AtomicBool,
    generation: AtomicU8,
}

impl Signals {
    /// No vector is set.
    pub fn new(events: Arc<[EventFd]>, queues: u16) -> Self {
        Self {
            events,
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            config: AtomicU16::new(NO_VECTOR),
            isr: AtomicU8::new(0),
            failed: AtomicBool::new(false),
            generation: AtomicU8::new(0),
        }
    }

    /// The configuration's vector.
    pub fn config_vector(&self) -> u16 {
        self.config.load(Ordering::SeqCst)
    }

    /// Sets it; a vector that does not exist sets none (4.1.5.1.2).
    pub fn set_config_vector(&self, vector: u16) {
        self.config.store(self.checked(vector), Ordering::SeqCst);
    }

    /// A queue's vector.
    pub fn queue_vector(&self, queue: u16) -> u16 {
        let vector = self.queues.get(usize::from(queue));
        vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::SeqCst))
    }

    /// Sets it; a vector that does not exist sets none.
    pub fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(slot) = self.queues.get(usize::from(queue)) {
            slot.store(self.checked(vector), Ordering::SeqCst);
        }
    }

    fn checked(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.events.len() {
            vector
        } else {
            NO_VECTOR
        }
    }

    /// Reads and clears ISR status.
    pub fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    /// Counts changes of the device's configuration.
    pub fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Whether the device needs a reset.
    pub fn failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    /// The device has stopped: DEVICE_NEEDS_RESET.
    pub fn fail(&self) {
        self.failed.store(true, Ordering::SeqCst);
        self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        self.raise(self.config_vector());
    }

    /// Forgets vectors, status and failure.
    pub fn reset(&self) {
        self.config.store(NO_VECTOR, Ordering::SeqCst);
        self.queues
            .iter()
            .for_each(|queue| queue.store(NO_VECTOR, Ordering::SeqCst));
        self.isr.store(0, Ordering::SeqCst);
        self.failed.store(false, Ordering::SeqCst);
    }

    fn raise(&self, vector: u16) {
        // A full counter means that an interrupt is pending already.
        if let Some(event) = self.events.get(usize::from(vector)) {
            let _ = event.write(1);
        }
    }
}

impl Interrupt for Signals {
    fn used(&self, index: u16) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::SeqCst);
        self.raise(self.queue_vector(index));
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        self.raise(self.config_vector());
    }

    fn needs_reset(&self) {
        self.fail();
    }

    fn used_fd(&self, index: u16) -> Option<BorrowedFd<'_>> {
        let event = self.events.get(usize::from(self.queue_vector(index)))?;
        Some(event_fd(event))
    }
}
