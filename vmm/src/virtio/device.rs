//! The contract between a virtio transport and a virtio device.
//!
//! Calls come from a vCPU thread (through the transport) and never two at a time. The order is
//! that of virtio 1.2, section 3.1.1: configuration space may be read and written at any time,
//! [`VirtioDevice::activate`] comes once at DRIVER_OK, [`VirtioDevice::reset`] any number of times.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// Device ids of virtio 1.2, section 5.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
#[allow(missing_docs)]
pub enum DeviceType {
    Net = 1,
    Block = 2,
    Console = 3,
    Rng = 4,
    Balloon = 5,
    Vsock = 19,
    Mem = 24,
    Fs = 26,
    Pmem = 27,
}

/// How a device reaches its driver. The transport implements it; tests have one of their own.
///
/// Called from the device's worker thread at any time, also while a vCPU thread waits for that
/// worker in [`VirtioDevice::reset`]: no method may wait for a lock that is held around calls of
/// the device.
pub trait Interrupt: Send + Sync {
    /// Tells the driver that used buffers wait in queue `index`.
    fn used(&self, index: u16);
    /// Tells the driver that the configuration space has changed.
    fn config_changed(&self);
    /// Sets DEVICE_NEEDS_RESET (virtio 1.2, 2.1.2) and tells the driver. The device has stopped
    /// serving its queues; the VM lives on.
    fn needs_reset(&self);
    /// The descriptor that raises queue `index`'s interrupt when written to, for a vhost back end.
    /// `None` while the driver has given that queue no vector.
    fn used_fd(&self, index: u16) -> Option<BorrowedFd<'_>>;
}

/// One queue as the driver set it up, enabled and checked by [`Queue::is_valid`].
pub struct ActiveQueue {
    /// Its number in the device.
    pub index: u16,
    /// The rings.
    pub queue: Queue,
    /// Readable when the driver has kicked this queue (an ioeventfd).
    pub kick: EventFd,
}

/// What a device gets at DRIVER_OK.
pub struct Activation {
    /// Guest RAM.
    pub memory: Arc<GuestMemoryMmap>,
    /// The queues that the driver enabled, in order of their index.
    pub queues: Vec<ActiveQueue>,
    /// The way back to the driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// Features that both sides agreed on.
    pub features: u64,
}

/// A region of the guest's physical address space that a device brings with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedRegion {
    /// `shmid` of virtio 1.2, section 2.10.
    pub id: u8,
    /// Guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
}

/// Why a device could not start.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver enabled fewer queues than the device cannot do without.
    #[error("driver enabled {got} queues, device needs {need}")]
    MissingQueues {
        /// Enabled.
        got: usize,
        /// Needed.
        need: usize,
    },
    /// A worker or a back end could not be started.
    #[error("starting the device's worker")]
    Worker(#[source] std::io::Error),
    /// A vhost or vhost-user back end refused.
    #[error("vhost back end")]
    Vhost(#[from] vhost::Error),
}

/// One vector for the configuration and one for all queues.
pub const SHARED_VECTORS: u16 = 2;

/// A virtio device.
pub trait VirtioDevice: Send {
    /// What it is.
    fn device_type(&self) -> DeviceType;

    /// Largest size of each queue, a power of two.
    fn queue_sizes(&self) -> &[u16];

    /// How many interrupt vectors the function has: one for each queue and one for the configuration.
    /// A device of little traffic does with [`SHARED_VECTORS`]; each vector costs a booting guest 15
    /// exits.
    fn vectors(&self) -> u16 {
        self.queue_sizes().len() as u16 + 1
    }

    /// Features offered. The transport adds VIRTIO_F_VERSION_1 and accepts no others from the
    /// driver than those offered.
    fn features(&self) -> u64;

    /// Reads the device's configuration space. Bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device's configuration space. What is not writable is left alone.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver said DRIVER_OK.
    ///
    /// # Errors
    /// The transport sets DEVICE_NEEDS_RESET; the VM lives on.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops the worker and returns to the state before activation. Returns when nothing touches
    /// guest memory any more.
    fn reset(&mut self);

    /// Regions that the transport announces by VIRTIO_PCI_CAP_SHARED_MEMORY_CFG.
    fn shared_regions(&self) -> &[SharedRegion] {
        &[]
    }
}
