//! virtio over PCI (virtio 1.2, section 4.1): modern only, MSI-X only.
//!
//! One BAR holds all registers, a page for each structure, so that a guest may map them apart:
//!
//! | offset | structure |
//! |--------|-----------|
//! | 0x0000 | common configuration ([`super::common`]) |
//! | 0x1000 | ISR status |
//! | 0x2000 | device configuration |
//! | 0x3000 | doorbells, 4 bytes per queue; normally KVM's ioeventfd takes the write |
//! | 0x4000 | MSI-X table |
//! | 0x6000 | MSI-X pending bits |
//!
//! A second BAR, where a device brings shared memory, only tells the guest where KVM's memory slot
//! lies; moving it moves nothing.

use std::io;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::common::{CommonConfig, DeviceStatus};
use super::config::{ConfigSpace, Identity, SIZE};
use super::msix::{ENTRY, Msix};
use super::signals::Signals;
use super::wires::Wires;
use crate::launcher::Launcher;
use crate::virtio::device::{DeviceType, SharedRegion, VirtioDevice};

/// Bytes of the BAR with the registers.
pub const BAR_SIZE: u64 = 0x8000;
const STRUCTURE: u64 = 0x1000;
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
pub(super) const NOTIFY: u64 = 0x3000;
/// Bytes between two queues' doorbells.
pub(super) const NOTIFY_STEP: u64 = 4;
pub(super) const TABLE: u64 = 0x4000;
pub(super) const PENDING: u64 = 0x6000;

const VENDOR: u16 = 0x1af4;
/// Modern devices have this PCI id plus their virtio id.
const DEVICE_BASE: u16 = 0x1040;

const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;

/// `cfg_type` of a virtio capability.
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;
const CFG_SHARED_MEMORY: u8 = 8;

/// Bytes of the configuration access capability, its data included.
const WINDOW_LENGTH: usize = 20;

/// Register BAR and shared memory BAR, each a pair of registers.
const REGISTERS: usize = 0;
const SHARED: usize = 1;

/// Why a device could not be put on the bus.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No descriptors.
    #[error("no descriptors for a virtio device")]
    Descriptors(#[from] io::Error),
    /// More queues, regions or capabilities than the transport has room for.
    #[error("virtio device {0:?} does not fit into a PCI function")]
    TooLarge(DeviceType),
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    config: ConfigSpace,
    window_used: bool,
    msix: Msix,
    msix_capability: usize,
    window_capability: usize,
    common: CommonConfig,
    signals: Arc<Signals>,
    wires: Arc<dyn Wires>,
    /// Where the doorbells ring at present.
    doorbells_at: Option<u64>,
    launcher: Arc<Launcher>,
    /// Away only while it is on the launcher's thread; for good if it panicked there.
    device: Option<Box<dyn VirtioDevice>>,
}

impl VirtioPci {
    /// Makes a function of `device`, its registers at `bar` (a multiple of [`BAR_SIZE`]).
    ///
    /// # Errors
    /// No descriptors left, or a device that is too large for one function.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemoryMmap>,
        wires: Arc<dyn Wires>,
        launcher: Arc<Launcher>,
        bar: u64,
    ) -> Result<Self, Error> {
        let kind = device.device_type();
        let too_large = || Error::TooLarge(kind);
        let queues = device.queue_sizes().len() as u64;
        let vectors = device.vectors();
        let table = u64::from(vectors) * ENTRY as u64;
        if queues * NOTIFY_STEP > STRUCTURE || vectors == 0 || table > PENDING - TABLE {
            return Err(too_large());
        }
        let msix = Msix::new(vectors, wires.clone())?;
        let signals = Arc::new(Signals::new(msix.events(), queues as u16));
        let common = CommonConfig::new(&*device, memory, signals.clone())?;

        let mut config = ConfigSpace::new(&identity(kind));
        config.add_bar(REGISTERS, bar, BAR_SIZE, false);
        let structures = [
            (CFG_COMMON, COMMON, super::common::LENGTH),
            (CFG_ISR, ISR, 1),
            (CFG_DEVICE, DEVICE, STRUCTURE),
        ];
        for (kind, offset, length) in structures {
            let body = capability(kind, REGISTERS, 0, offset, length, &[]);
            config
                .add_capability(CAPABILITY_VENDOR, &body, &[])
                .ok_or_else(too_large)?;
        }
        let step = (NOTIFY_STEP as u32).to_le_bytes();
        let length = queues * NOTIFY_STEP;
        let body = capability(CFG_NOTIFY, REGISTERS, 0, NOTIFY, length, &step);
        config
            .add_capability(CAPABILITY_VENDOR, &body, &[])
            .ok_or_else(too_large)?;

        // 4.1.4.9: the guest writes bar, offset and length, then accesses the four bytes of data.
        let body = capability(CFG_PCI, 0, 0, 0, 0, &[0; 4]);
        let mut writable = [0; 18];
        writable[2] = 0xff;
        writable[6..].fill(0xff);
        let window_capability = config
            .add_capability(CAPABILITY_VENDOR, &body, &writable)
            .ok_or_else(too_large)?;

        if let Some((start, size)) = span(device.shared_regions()) {
            if !start.is_multiple_of(size) {
                return Err(too_large());
            }
            config.add_bar(SHARED, start, size, true);
            for region in device.shared_regions() {
                let body = shared_memory(region, start);
                config
                    .add_capability(CAPABILITY_VENDOR, &body, &[])
                    .ok_or_else(too_large)?;
            }
        }

        let mut body = [0; 10];
        body[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(TABLE as u32).to_le_bytes());
        body[6..].copy_from_slice(&(PENDING as u32).to_le_bytes());
        let msix_capability = config
            .add_capability(CAPABILITY_MSIX, &body, &[0, 0xc0])
            .ok_or_else(too_large)?;

        let mut function = Self {
            config,
            window_used: false,
            msix,
            msix_capability,
            window_capability,
            common,
            signals,
            wires,
            doorbells_at: None,
            launcher,
            device: Some(device),
        };
        // Before the first vCPU runs this is cheap; when the guest enables the BAR where it is,
        // nothing is left to do.
        function.hang_doorbells(bar);
        Ok(function)
    }

    /// The guest's read of configuration space.
    pub fn read_config(&mut self, at: usize, data: &mut [u8]) {
        if let Some(offset) = self.window(at, data.len()) {
            self.read_bar(offset, data);
        } else {
            self.config.read(at, data);
        }
    }

    /// The guest's write to configuration space.
    pub fn write_config(&mut self, at: usize, data: &[u8]) {
        if let Some(offset) = self.window(at, data.len()) {
            self.write_bar(offset, data);
            return;
        }
        self.config.write(at, data);
        let window = self.window_capability;
        if at < window + WINDOW_LENGTH && at + data.len() > window {
            self.window_used = true;
        }
        let control = self.config.u16(self.msix_capability + 2);
        self.msix.set_control(control);
        if let Some(bar) = self.bar() {
            self.hang_doorbells(bar);
        }
    }

    /// All of configuration space that is not zero, if it may be read without us: not after the
    /// guest has used the configuration access capability.
    pub fn config_bytes(&self) -> Option<[u8; SIZE]> {
        let mut bytes = [0; SIZE];
        self.config.read(0, &mut bytes);
        (!self.window_used).then_some(bytes)
    }

    /// Where the registers answer, if they do.
    pub fn bar(&self) -> Option<u64> {
        self.config
            .bar(REGISTERS)
            .filter(|bar| super::in_window(*bar))
    }

    /// Where in the register BAR an access to the data of the PCI configuration access capability
    /// goes; `None` if it is none, or if its bar, offset or length is not what it must be.
    fn window(&self, at: usize, length: usize) -> Option<u64> {
        let capability = self.window_capability;
        if at != capability + 16 || !matches!(length, 1 | 2 | 4) {
            return None;
        }
        let bar = self.config.u16(capability + 4) & 0xff;
        let offset = self.config.u32(capability + 8);
        let wanted = self.config.u32(capability + 12);
        let fits = u64::from(offset) + length as u64 <= BAR_SIZE;
        let valid = bar == 0 && wanted as usize == length && fits;
        (valid && offset.is_multiple_of(wanted)).then_some(offset.into())
    }

    /// The guest's read of a register.
    pub fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let within = offset % STRUCTURE;
        match offset {
            COMMON..ISR => self.common.read(within, data),
            ISR => data
                .iter_mut()
                .take(1)
                .for_each(|byte| *byte = self.signals.take_isr()),
            DEVICE..NOTIFY => {
                if let Some(device) = &self.device {
                    device.read_config(within, data);
                }
            }
            TABLE..PENDING => self.msix.read_table((offset - TABLE) as usize, data),
            PENDING..BAR_SIZE => self.msix.read_pending((offset - PENDING) as usize, data),
            _ => {}
        }
    }

    /// The guest's write to a register.
    pub fn write_bar(&mut self, offset: u64, data: &[u8]) {
        let within = offset % STRUCTURE;
        match offset {
            COMMON..ISR => {
                let before = self.common.status();
                self.common.write(within, data);
                self.status_changed(before);
            }
            DEVICE..NOTIFY => {
                if let Some(device) = &mut self.device {
                    device.write_config(within, data);
                }
            }
            NOTIFY..TABLE => self.common.kick(within / NOTIFY_STEP),
            TABLE..PENDING => self.msix.write_table((offset - TABLE) as usize, data),
            _ => {}
        }
    }

    fn status_changed(&mut self, before: DeviceStatus) {
        let now = self.common.status();
        if now.is_empty() && !before.is_empty() {
            self.reset();
        } else if now.contains(DeviceStatus::DRIVER_OK) && !before.contains(DeviceStatus::DRIVER_OK)
        {
            let started = self.common.activation().is_some_and(|activation| {
                self.on_launcher(move |device| {
                    device.activate(activation).inspect_err(|error| {
                        let kind = device.device_type();
                        tracing::error!(device = ?kind, "device does not start: {}", chain(error));
                    })
                })
                .is_some_and(|done| done.is_ok())
            });
            if !started {
                self.signals.fail();
            }
        }
    }

    /// Lends the device to the launcher's thread; `None` if it does not come back.
    fn on_launcher<T: Send + 'static>(
        &mut self,
        job: impl FnOnce(&mut dyn VirtioDevice) -> T + Send + 'static,
    ) -> Option<T> {
        let mut device = self.device.take()?;
        let called = self.launcher.call(move || {
            let result = job(&mut *device);
            (device, result)
        });
        let (device, result) = called
            .inspect_err(|error| tracing::error!("{error}"))
            .ok()?;
        self.device = Some(device);
        Some(result)
    }

    /// Stops the device and forgets what the driver set up (2.4.1).
    pub fn reset(&mut self) {
        self.on_launcher(|device| device.reset());
        self.common.reset();
        self.signals.reset();
    }

    /// Lets the guest's writes to the doorbells at `bar` reach the queues without the VMM.
    fn hang_doorbells(&mut self, bar: u64) {
        if self.doorbells_at == Some(bar) {
            return;
        }
        self.take_doorbells();
        for (queue, kick) in self.common.kicks().enumerate() {
            let gpa = bar + NOTIFY + NOTIFY_STEP * queue as u64;
            if let Err(error) = self.wires.add_doorbell(gpa, kick) {
                // Slower, but the write then comes to write_bar. take_doorbells tolerates it.
                // Not a warning: a guest that lays BARs over each other could write any number.
                tracing::debug!(%error, queue, "doorbell not wired");
            }
        }
        self.doorbells_at = Some(bar);
    }

    fn take_doorbells(&mut self) {
        let Some(bar) = self.doorbells_at.take() else {
            return;
        };
        for (queue, kick) in self.common.kicks().enumerate() {
            let gpa = bar + NOTIFY + NOTIFY_STEP * queue as u64;
            if let Err(error) = self.wires.remove_doorbell(gpa, kick) {
                tracing::debug!(%error, queue, "doorbell was not wired");
            }
        }
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.take_doorbells();
        self.on_launcher(|device| device.reset());
    }
}

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

fn identity(kind: DeviceType) -> Identity {
    // Class codes only help a reader of lspci; drivers go by the device id.
    let class = match kind {
        DeviceType::Net => 0x020000,
        DeviceType::Block | DeviceType::Fs => 0x018000,
        DeviceType::Console => 0x078000,
        DeviceType::Rng => 0x108000,
        DeviceType::Balloon | DeviceType::Mem | DeviceType::Pmem => 0x058000,
        DeviceType::Vsock => 0x028000,
    };
    let id = kind as u16;
    Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + id,
        class,
        revision: 1,
        subsystem: 0x40 + id,
    }
}

/// `struct virtio_pci_cap` behind its first two bytes (4.1.4).
fn capability(kind: u8, pair: usize, id: u8, offset: u64, length: u64, behind: &[u8]) -> Vec<u8> {
    let mut body = vec![(16 + behind.len()) as u8, kind, 2 * pair as u8, id, 0, 0];
    body.extend_from_slice(&(offset as u32).to_le_bytes());
    body.extend_from_slice(&(length as u32).to_le_bytes());
    body.extend_from_slice(behind);
    body
}

/// `struct virtio_pci_cap64` (4.1.4.7).
fn shared_memory(region: &SharedRegion, bar: u64) -> Vec<u8> {
    let offset = region.gpa - bar;
    let mut high = Vec::new();
    high.extend_from_slice(&((offset >> 32) as u32).to_le_bytes());
    high.extend_from_slice(&((region.size >> 32) as u32).to_le_bytes());
    capability(
        CFG_SHARED_MEMORY,
        SHARED,
        region.id,
        offset,
        region.size,
        &high,
    )
}

/// Start and size of the BAR that holds all regions.
fn span(regions: &[SharedRegion]) -> Option<(u64, u64)> {
    let start = regions.iter().map(|region| region.gpa).min()?;
    let end = regions
        .iter()
        .map(|region| region.gpa + region.size)
        .max()?;
    Some((start, (end - start).next_power_of_two()))
}

#[cfg(test)]
#[path = "virtio_test.rs"]
mod tests;
