//! Virtio 1.2 devices and what they share.
//!
//! A device is a plain value that a transport (`crate::pci`) configures. When the driver says
//! DRIVER_OK the transport hands the device its [`device::Activation`]; the device moves what it
//! needs into one worker thread ([`worker`]) and serves its queues from there until it is reset.
//!
//! Guest memory is reached through [`ring`] (descriptor chains, checked as a whole before a device
//! sees them) and [`buffer`] (their bytes); no device handles a guest address of a ring itself.

pub mod balloon;
pub mod blk;
pub mod buffer;
pub mod call;
pub mod console;
pub mod device;
pub mod discard;
pub mod error;
pub mod features;
pub mod fs;
#[cfg(feature = "testing")]
pub mod inline;
pub mod mem;
pub mod net;
pub mod pmem;
pub mod ring;
pub mod rng;
pub mod sys;
pub mod vsock;
pub mod worker;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks what is whole after each statement, also of a thread that has panicked.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod balloon_test;
#[cfg(test)]
mod blk_test;
#[cfg(test)]
mod buffer_model_test;
#[cfg(test)]
mod fs_test;
#[cfg(test)]
mod fs_test_backend;
#[cfg(test)]
mod mem_model_test;
#[cfg(test)]
mod mem_test;
#[cfg(test)]
mod mem_test_driver;
#[cfg(test)]
mod ring_test;
#[cfg(test)]
pub(crate) mod testing;
