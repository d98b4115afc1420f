//! PCI bus 0: configuration space by ECAM, BARs, and functions that come and go.
//!
//! One function per slot, all of them virtio devices. Slots [`BOOT_SLOTS`] are filled before the
//! guest starts; in [`HOT_SLOTS`] devices come and go while it runs: [`PciBus::plug`] tells the
//! guest through [`crate::platform`], whose ACPI objects make its own PCI hot-plug scan the slot;
//! [`PciBus::request_eject`] asks it to let go, and when it has, the function is taken off and its
//! id appears in [`PciBus::take_ejected`]. No help from the agent is needed.

pub mod common;
pub mod config;
pub mod mirror;
pub mod msix;
pub mod signals;
#[cfg(test)]
pub mod testing;
pub mod virtio;
pub mod wires;

use std::io;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, RwLock};

use vmm_sys_util::eventfd::EventFd;

use self::mirror::Mirror;
use self::virtio::{BAR_SIZE, VirtioPci};
use self::wires::Wires;
use crate::memory::{HIGH_RAM_START, MMIO32_SIZE, MMIO32_START};
use crate::platform::Platform;

/// Slots of bus 0.
const SLOTS: usize = 32;
/// Slots for devices that are there from the start.
pub const BOOT_SLOTS: RangeInclusive<u8> = 1..=15;
/// Slots for devices that are plugged later.
pub const HOT_SLOTS: RangeInclusive<u8> = 16..=31;

/// Why a device was not plugged or unplugged.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// All slots are taken.
    #[error("no PCI slot is free: {0} devices of this kind are the most")]
    Full(usize),
    /// An id is unique.
    #[error("there is already a device with the id {0:?}")]
    Exists(String),
    /// No such id among the hot-plugged devices.
    #[error("there is no removable device with the id {0:?}")]
    Unknown(String),
}

struct Slot {
    /// Of a device that can be unplugged.
    id: Option<String>,
    function: Arc<Mutex<VirtioPci>>,
    /// Where its registers answer, so that an access finds its function without taking locks of
    /// others.
    bar: Option<u64>,
}

/// The bus.
pub struct PciBus {
    slots: RwLock<[Option<Slot>; SLOTS]>,
    /// Locked after a function, never before.
    mirror: Mutex<Mirror>,
    ejected: Mutex<Vec<String>>,
    on_ejected: OnceLock<EventFd>,
}

/// Where the registers of the function in `slot` lie at first.
pub fn first_bar(slot: u8) -> u64 {
    MMIO32_START + u64::from(slot) * BAR_SIZE
}

impl PciBus {
    /// An empty bus.
    ///
    /// # Errors
    /// No memory for its configuration space.
    pub fn new(wires: Arc<dyn Wires>) -> io::Result<Self> {
        Ok(Self {
            slots: RwLock::new([const { None }; SLOTS]),
            mirror: Mutex::new(Mirror::new(wires)?),
            ejected: Mutex::default(),
            on_ejected: OnceLock::new(),
        })
    }

    /// Sets what is written to when the guest has let go of a device.
    pub fn notify_ejected(&self, event: EventFd) {
        // Set once, by the boot story.
        let _ = self.on_ejected.set(event);
    }

    /// A slot for a device that is there from the start.
    ///
    /// # Errors
    /// [`Error::Full`].
    pub fn free_boot_slot(&self) -> Result<u8, Error> {
        self.free_slot(BOOT_SLOTS)
    }

    /// A slot for a device that is plugged now, under `id` if it can be unplugged.
    ///
    /// # Errors
    /// [`Error::Full`]; [`Error::Exists`] if the id is taken.
    pub fn free_hot_slot(&self, id: Option<&str>) -> Result<u8, Error> {
        if let Some(id) = id
            && self.ids().iter().any(|taken| taken == id)
        {
            return Err(Error::Exists(id.into()));
        }
        self.free_slot(HOT_SLOTS)
    }

    fn free_slot(&self, range: RangeInclusive<u8>) -> Result<u8, Error> {
        let slots = self.slots.read().unwrap_or_else(|e| e.into_inner());
        let count = range.clone().count();
        let mut range = range;
        range
            .find(|slot| slots[usize::from(*slot)].is_none())
            .ok_or(Error::Full(count))
    }

    /// Puts a function into a free slot. A device with an id can be asked for and unplugged by it.
    pub fn insert(&self, slot: u8, id: Option<String>, function: VirtioPci) {
        let bar = function.bar();
        let config = function.config_bytes();
        let function = Arc::new(Mutex::new(function));
        let mut slots = self.slots.write().unwrap_or_else(|e| e.into_inner());
        if let Some(place) = slots.get_mut(usize::from(slot)) {
            *place = Some(Slot { id, function, bar });
            lock(&self.mirror).renew(slot.into(), config.as_ref().map(<[u8; _]>::as_slice));
        }
    }

    /// Ids of the devices that have one.
    pub fn ids(&self) -> Vec<String> {
        let slots = self.slots.read().unwrap_or_else(|e| e.into_inner());
        slots
            .iter()
            .flatten()
            .filter_map(|slot| slot.id.clone())
            .collect()
    }

    /// Asks the guest to let go of a device in a hot-plug slot.
    ///
    /// # Errors
    /// [`Error::Unknown`].
    pub fn request_eject(&self, id: &str, platform: &Platform) -> Result<(), Error> {
        let slots = self.slots.read().unwrap_or_else(|e| e.into_inner());
        let slot = HOT_SLOTS
            .clone()
            .find(|slot| {
                let slot = slots[usize::from(*slot)].as_ref();
                slot.is_some_and(|slot| slot.id.as_deref() == Some(id))
            })
            .ok_or_else(|| Error::Unknown(id.into()))?;
        platform.request_eject(1 << slot);
        Ok(())
    }

    /// The guest has let go of these slots. Boot slots stay: it has no business there.
    pub fn eject(&self, mask: u32) {
        let mut gone = Vec::new();
        {
            let mut slots = self.slots.write().unwrap_or_else(|e| e.into_inner());
            for slot in HOT_SLOTS.filter(|slot| mask >> slot & 1 != 0) {
                gone.extend(slots[usize::from(slot)].take());
                lock(&self.mirror).renew(slot.into(), None);
            }
        }
        if gone.is_empty() {
            return;
        }
        let mut ejected = lock(&self.ejected);
        for slot in gone {
            ejected.extend(slot.id);
            // The device stops here, with the bus free for others.
            drop(slot.function);
        }
        if let Some(event) = self.on_ejected.get() {
            let _ = event.write(1);
        }
    }

    /// Ids of the devices that the guest has let go of since the last call.
    pub fn take_ejected(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.ejected))
    }

    /// The guest's read of configuration space, `offset` bytes into ECAM. Absent functions and
    /// accesses across their end read all ones.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let Some((slot, register)) = decode(offset, data.len()) else {
            return;
        };
        if let Some(function) = self.function(slot) {
            lock(&function).read_config(register, data);
        }
    }

    /// The guest's write to configuration space.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        let Some((slot, register)) = decode(offset, data.len()) else {
            return;
        };
        let Some(function) = self.function(slot) else {
            return;
        };
        let mut function = lock(&function);
        let before = function.bar();
        function.write_config(register, data);
        let after = function.bar();
        match function.config_bytes() {
            Some(bytes) => lock(&self.mirror).renew(slot, Some(&bytes)),
            None => lock(&self.mirror).withdraw(),
        }
        drop(function);
        if before != after {
            let mut slots = self.slots.write().unwrap_or_else(|e| e.into_inner());
            if let Some(slot) = &mut slots[slot] {
                slot.bar = after;
            }
        }
    }

    fn function(&self, slot: usize) -> Option<Arc<Mutex<VirtioPci>>> {
        let slots = self.slots.read().unwrap_or_else(|e| e.into_inner());
        slots.get(slot)?.as_ref().map(|slot| slot.function.clone())
    }

    /// The guest's read in the PCI windows; false if no function answers.
    pub fn read_bar(&self, gpa: u64, data: &mut [u8]) -> bool {
        let Some((function, offset)) = self.answering(gpa, data.len()) else {
            return false;
        };
        lock(&function).read_bar(offset, data);
        true
    }

    /// The guest's write in the PCI windows; false if no function answers.
    pub fn write_bar(&self, gpa: u64, data: &[u8]) -> bool {
        let Some((function, offset)) = self.answering(gpa, data.len()) else {
            return false;
        };
        lock(&function).write_bar(offset, data);
        true
    }

    fn answering(&self, gpa: u64, length: usize) -> Option<(Arc<Mutex<VirtioPci>>, u64)> {
        let slots = self.slots.read().unwrap_or_else(|e| e.into_inner());
        slots.iter().flatten().find_map(|slot| {
            let offset = gpa.checked_sub(slot.bar?)?;
            let fits = offset.checked_add(length as u64)? <= BAR_SIZE;
            fits.then(|| (slot.function.clone(), offset))
        })
    }

    /// Stops all devices, in the order of their slots.
    pub fn stop(&self) {
        let slots = self.slots.read().unwrap_or_else(|e| e.into_inner());
        slots
            .iter()
            .flatten()
            .for_each(|slot| lock(&slot.function).reset());
    }
}

/// Slot and register of an ECAM offset (PCI Express 5.0, 7.2.2). Only function 0 of each slot is
/// there.
fn decode(offset: u64, length: usize) -> Option<(usize, usize)> {
    let slot = usize::try_from(offset >> 15)
        .ok()
        .filter(|slot| *slot < SLOTS)?;
    let register = (offset & 0xfff) as usize;
    let function = offset >> 12 & 7;
    (function == 0 && register + length <= 0x1000).then_some((slot, register))
}

/// Whether a register BAR may lie at `gpa`: in the window below 4 GiB, or above 4 GiB. Where it
/// lies over RAM or a device's memory, those win: KVM does not ask us there.
pub fn in_window(gpa: u64) -> bool {
    let low = MMIO32_START..=MMIO32_START + MMIO32_SIZE - BAR_SIZE;
    low.contains(&gpa) || (HIGH_RAM_START..1 << 52).contains(&gpa)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

#[cfg(test)]
#[path = "bus_test.rs"]
mod tests;
