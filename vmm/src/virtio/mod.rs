//! Virtio 1.2 devices and what they share.
//!
//! A device is a plain value that a transport (`crate::pci`) configures. When the driver says
//! DRIVER_OK the transport hands the device its [`device::Activation`]; the device moves what it
//! needs into one worker thread ([`worker`]) and serves its queues from there until it is reset.

pub mod device;
