//! The common configuration structure (virtio 1.2, section 4.1.4.3): features, status, queues.
//!
//! Registers are accessed at their natural width; 64-bit addresses also by halves. Other accesses
//! read zero and write nothing. Each step of the driver is checked against the order of section
//! 3.1.1: what comes too late changes nothing.

use std::io;
use std::sync::Arc;

use bitflags::bitflags;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::signals::Signals;
use crate::virtio::device::{Activation, ActiveQueue, VirtioDevice};

/// Bytes of the structure without what only unoffered features have.
pub const LENGTH: u64 = 0x38;

/// VIRTIO_F_VERSION_1.
const VERSION_1: u64 = 1 << 32;

bitflags! {
    /// Device status (virtio 1.2, 2.1).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct DeviceStatus: u8 {
        /// The guest has noticed the device.
        const ACKNOWLEDGE = 1;
        /// It has a driver for it.
        const DRIVER = 2;
        /// The driver is ready.
        const DRIVER_OK = 4;
        /// Features are agreed on.
        const FEATURES_OK = 8;
        /// The device has failed.
        const NEEDS_RESET = 64;
        /// The driver has given up.
        const FAILED = 128;
    }
}

/// Registers by (offset, width).
mod register {
    pub const DEVICE_FEATURE_SELECT: (u64, usize) = (0x00, 4);
    pub const DEVICE_FEATURE: (u64, usize) = (0x04, 4);
    pub const DRIVER_FEATURE_SELECT: (u64, usize) = (0x08, 4);
    pub const DRIVER_FEATURE: (u64, usize) = (0x0c, 4);
    pub const CONFIG_VECTOR: (u64, usize) = (0x10, 2);
    pub const NUM_QUEUES: (u64, usize) = (0x12, 2);
    pub const STATUS: (u64, usize) = (0x14, 1);
    pub const GENERATION: (u64, usize) = (0x15, 1);
    pub const QUEUE_SELECT: (u64, usize) = (0x16, 2);
    pub const QUEUE_SIZE: (u64, usize) = (0x18, 2);
    pub const QUEUE_VECTOR: (u64, usize) = (0x1a, 2);
    pub const QUEUE_ENABLE: (u64, usize) = (0x1c, 2);
    pub const QUEUE_NOTIFY_OFF: (u64, usize) = (0x1e, 2);
    /// Descriptor area, driver area, device area: three addresses of 8 bytes.
    pub const QUEUE_ADDRESSES: u64 = 0x20;
    pub const QUEUE_ADDRESSES_END: u64 = 0x38;
}

struct QueueSetup {
    max: u16,
    size: u16,
    enabled: bool,
    /// Descriptor area, driver area, device area.
    addresses: [u64; 3],
    kick: EventFd,
}

/// The registers of one device.
pub struct CommonConfig {
    offered: u64,
    accepted: u64,
    device_select: u32,
    driver_select: u32,
    queue_select: u16,
    status: DeviceStatus,
    queues: Vec<QueueSetup>,
    memory: Arc<GuestMemoryMmap>,
    signals: Arc<Signals>,
}

impl CommonConfig {
    /// After reset.
    ///
    /// # Errors
    /// No descriptor left for the queues' kicks.
    pub fn new(
        device: &dyn VirtioDevice,
        memory: Arc<GuestMemoryMmap>,
        signals: Arc<Signals>,
    ) -> io::Result<Self> {
        let queue = |max: &u16| {
            let kick = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
            Ok(QueueSetup {
                max: *max,
                size: *max,
                enabled: false,
                addresses: [0; 3],
                kick,
            })
        };
        Ok(Self {
            offered: device.features() | VERSION_1,
            accepted: 0,
            device_select: 0,
            driver_select: 0,
            queue_select: 0,
            status: DeviceStatus::empty(),
            queues: device
                .queue_sizes()
                .iter()
                .map(queue)
                .collect::<io::Result<_>>()?,
            memory,
            signals,
        })
    }

    /// What driver and device have said of themselves.
    pub fn status(&self) -> DeviceStatus {
        self.status
    }

    /// The queues' doorbells, in order.
    pub fn kicks(&self) -> impl Iterator<Item = &EventFd> {
        self.queues.iter().map(|queue| &queue.kick)
    }

    /// Rings the doorbell of queue `index`.
    pub fn kick(&self, index: u64) {
        let queue = usize::try_from(index)
            .ok()
            .and_then(|index| self.queues.get(index));
        if let Some(queue) = queue {
            // A full counter means that the device will look anyway.
            let _ = queue.kick.write(1);
        }
    }

    /// Back to the state after power-on.
    pub fn reset(&mut self) {
        self.accepted = 0;
        (self.device_select, self.driver_select, self.queue_select) = (0, 0, 0);
        self.status = DeviceStatus::empty();
        for queue in &mut self.queues {
            (queue.size, queue.enabled, queue.addresses) = (queue.max, false, [0; 3]);
        }
    }

    /// The guest's read.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let queue = self.queues.get(usize::from(self.queue_select));
        let value = match (offset, data.len()) {
            register::DEVICE_FEATURE_SELECT => self.device_select.into(),
            register::DEVICE_FEATURE => half(self.offered, self.device_select),
            register::DRIVER_FEATURE_SELECT => self.driver_select.into(),
            register::DRIVER_FEATURE => half(self.accepted, self.driver_select),
            register::CONFIG_VECTOR => self.signals.config_vector().into(),
            register::NUM_QUEUES => self.queues.len() as u64,
            register::STATUS => {
                let failed = if self.signals.failed() {
                    DeviceStatus::NEEDS_RESET.bits()
                } else {
                    0
                };
                u64::from(self.status.bits() | failed)
            }
            register::GENERATION => self.signals.generation().into(),
            register::QUEUE_SELECT => self.queue_select.into(),
            // 4.1.4.3: a queue that is not there has size 0.
            register::QUEUE_SIZE => queue.map_or(0, |queue| queue.size).into(),
            register::QUEUE_VECTOR => self.signals.queue_vector(self.queue_select).into(),
            register::QUEUE_ENABLE => queue.is_some_and(|queue| queue.enabled).into(),
            register::QUEUE_NOTIFY_OFF => self.queue_select.into(),
            (register::QUEUE_ADDRESSES..register::QUEUE_ADDRESSES_END, 4 | 8) => {
                let (index, shift) = address_register(offset);
                queue.map_or(0, |queue| queue.addresses[index] >> shift)
            }
            _ => 0,
        };
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    /// The guest's write.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if data.len() > 8 {
            return;
        }
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        match (offset, data.len()) {
            register::DEVICE_FEATURE_SELECT => self.device_select = value as u32,
            register::DRIVER_FEATURE_SELECT => self.driver_select = value as u32,
            register::DRIVER_FEATURE => self.set_driver_feature(value as u32),
            register::CONFIG_VECTOR => self.signals.set_config_vector(value as u16),
            register::STATUS => self.set_status(value as u8),
            register::QUEUE_SELECT => self.queue_select = value as u16,
            register::QUEUE_VECTOR => {
                self.signals
                    .set_queue_vector(self.queue_select, value as u16);
            }
            _ => self.set_up_queue(offset, data.len(), value),
        }
    }

    fn set_driver_feature(&mut self, value: u32) {
        if self.status.contains(DeviceStatus::FEATURES_OK) {
            return;
        }
        let shift = match self.driver_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        self.accepted = self.accepted & !(0xffff_ffff << shift) | u64::from(value) << shift;
    }

    fn set_status(&mut self, value: u8) {
        let mut wanted = DeviceStatus::from_bits_truncate(value) - DeviceStatus::NEEDS_RESET;
        if wanted.is_empty() {
            // The transport resets the device and then these registers.
            self.status = wanted;
            return;
        }
        // 2.1.1: the driver must not clear bits; only a reset does.
        wanted |= self.status;
        let agreed = self.accepted & !self.offered == 0 && self.accepted & VERSION_1 != 0;
        if !self.status.contains(DeviceStatus::FEATURES_OK) && !agreed {
            // 2.2.2: by this the driver sees that its choice is not possible.
            wanted -= DeviceStatus::FEATURES_OK;
        }
        if !wanted.contains(DeviceStatus::FEATURES_OK) {
            wanted -= DeviceStatus::DRIVER_OK;
        }
        self.status = wanted;
    }

    fn set_up_queue(&mut self, offset: u64, width: usize, value: u64) {
        let open = !self.status.contains(DeviceStatus::DRIVER_OK);
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return;
        };
        // An enabled queue stays as it is until the device is reset.
        if !open || queue.enabled {
            return;
        }
        match (offset, width) {
            register::QUEUE_SIZE => {
                let size = value as u16;
                if size.is_power_of_two() && size <= queue.max {
                    queue.size = size;
                }
            }
            register::QUEUE_ENABLE => queue.enabled = value as u16 == 1,
            (register::QUEUE_ADDRESSES..register::QUEUE_ADDRESSES_END, 4) => {
                let (index, shift) = address_register(offset);
                let address = &mut queue.addresses[index];
                *address = *address & !(0xffff_ffff << shift) | value << shift;
            }
            (register::QUEUE_ADDRESSES..register::QUEUE_ADDRESSES_END, 8) => {
                let (index, shift) = address_register(offset);
                if shift == 0 {
                    queue.addresses[index] = value;
                }
            }
            _ => {}
        }
    }

    /// What the device gets at DRIVER_OK; `None` if a queue is not usable.
    pub fn activation(&self) -> Option<Activation> {
        let mut queues = Vec::new();
        for (index, setup) in self.queues.iter().enumerate().filter(|(_, q)| q.enabled) {
            let Some(queue) = self.build_queue(setup) else {
                tracing::warn!(index, size = setup.size, "the driver's queue is not usable");
                return None;
            };
            let kick = setup.kick.try_clone().ok()?;
            queues.push(ActiveQueue {
                index: index as u16,
                queue,
                kick,
            });
        }
        Some(Activation {
            memory: self.memory.clone(),
            queues,
            interrupt: self.signals.clone(),
            features: self.accepted,
        })
    }

    fn build_queue(&self, setup: &QueueSetup) -> Option<Queue> {
        let mut queue = Queue::new(setup.max).ok()?;
        let [descriptors, driver, device] = setup.addresses.map(vm_memory::GuestAddress);
        queue.try_set_size(setup.size).ok()?;
        queue.try_set_desc_table_address(descriptors).ok()?;
        queue.try_set_avail_ring_address(driver).ok()?;
        queue.try_set_used_ring_address(device).ok()?;
        queue.set_ready(true);
        let valid = queue.is_valid(&*self.memory) && self.each_is_in_one_region(setup);
        valid.then_some(queue)
    }

    /// Whether none of the queue's parts runs from one region of memory into the next: vhost-net is told
    /// where the first byte of each is in this process, and takes what lies behind it for the rest.
    fn each_is_in_one_region(&self, setup: &QueueSetup) -> bool {
        let size = usize::from(setup.size);
        // virtio 1.2, 2.7: descriptors, and both rings with their event fields.
        let lengths = [16 * size, 6 + 2 * size, 6 + 8 * size];
        setup.addresses.iter().zip(lengths).all(|(gpa, length)| {
            let at = vm_memory::GuestAddress(*gpa);
            self.memory.get_slice(at, length).is_ok()
        })
    }
}

/// Which address of a queue, and by how many bits the accessed half is shifted.
fn address_register(offset: u64) -> (usize, u32) {
    let at = offset - register::QUEUE_ADDRESSES;
    let shift = if at % 8 >= 4 { 32 } else { 0 };
    ((at / 8) as usize, shift)
}

/// Feature bits by halves; beyond 64 there are none.
fn half(features: u64, select: u32) -> u64 {
    match select {
        0 => features & 0xffff_ffff,
        1 => features >> 32,
        _ => 0,
    }
}
