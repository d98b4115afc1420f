//! Wires whose ends a test holds.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use super::wires::Wires;
use crate::kvm::{Backing, Error, Msi, SlotId};
use crate::memory::{ConfigPages, ECAM_START};

#[derive(Default)]
struct Ends {
    next: u32,
    freed: u32,
    routes: BTreeMap<u32, Msi>,
    lines: HashMap<i32, (EventFd, u32)>,
    doorbells: BTreeMap<u64, i32>,
    config: Option<Arc<ConfigPages>>,
}

/// Stands for KVM: keeps what is wired to what.
#[derive(Default)]
pub struct TestWires(Mutex<Ends>);

impl TestWires {
    /// The messages that have been delivered since the last call.
    pub fn interrupts(&self) -> Vec<Msi> {
        let ends = self.0.lock().unwrap();
        let mut messages = Vec::new();
        for (event, gsi) in ends.lines.values() {
            if event.read().is_ok() {
                messages.push(ends.routes[gsi]);
            }
        }
        messages.sort_by_key(|m| (m.address, m.data));
        messages
    }

    /// How many interrupt numbers are in use.
    pub fn allocated(&self) -> u32 {
        let ends = self.0.lock().unwrap();
        ends.next - ends.freed
    }

    /// How many irqfds there are.
    pub fn connected(&self) -> usize {
        self.0.lock().unwrap().lines.len()
    }

    /// What the guest reads of configuration space without leaving.
    pub fn shown(&self) -> Option<Arc<ConfigPages>> {
        self.0.lock().unwrap().config.clone()
    }

    /// Where the guest's writes would ring.
    pub fn doorbells(&self) -> Vec<u64> {
        self.0.lock().unwrap().doorbells.keys().copied().collect()
    }
}

impl Wires for TestWires {
    fn allocate_gsi(&self) -> u32 {
        let mut ends = self.0.lock().unwrap();
        ends.next += 1;
        ends.next
    }

    fn free_gsi(&self, gsi: u32) {
        let mut ends = self.0.lock().unwrap();
        assert!(ends.routes.remove(&gsi).is_some(), "freed twice");
        ends.freed += 1;
    }

    fn route(&self, gsi: u32, msi: Msi) -> Result<(), Error> {
        self.0.lock().unwrap().routes.insert(gsi, msi);
        Ok(())
    }

    fn connect(&self, event: &EventFd, gsi: u32) -> Result<(), Error> {
        let ours = event.try_clone().unwrap();
        let before = self
            .0
            .lock()
            .unwrap()
            .lines
            .insert(event.as_raw_fd(), (ours, gsi));
        assert!(before.is_none(), "connected twice");
        Ok(())
    }

    fn disconnect(&self, event: &EventFd, _: u32) -> Result<(), Error> {
        assert!(
            self.0
                .lock()
                .unwrap()
                .lines
                .remove(&event.as_raw_fd())
                .is_some()
        );
        Ok(())
    }

    fn add_doorbell(&self, gpa: u64, event: &EventFd) -> Result<(), Error> {
        let before = self
            .0
            .lock()
            .unwrap()
            .doorbells
            .insert(gpa, event.as_raw_fd());
        assert!(before.is_none(), "two doorbells at {gpa:#x}");
        Ok(())
    }

    fn remove_doorbell(&self, gpa: u64, event: &EventFd) -> Result<(), Error> {
        assert_eq!(
            self.0.lock().unwrap().doorbells.remove(&gpa),
            Some(event.as_raw_fd())
        );
        Ok(())
    }

    fn show(&self, gpa: u64, backing: Backing) -> Result<SlotId, Error> {
        let Backing::Config(pages) = backing else {
            panic!("what is at {gpa:#x}?")
        };
        assert_eq!(gpa, ECAM_START);
        assert!(
            self.0.lock().unwrap().config.replace(pages).is_none(),
            "shown twice"
        );
        Ok(SlotId(0))
    }

    fn hide(&self, slot: &SlotId) -> Result<(), Error> {
        assert_eq!(*slot, SlotId(0));
        assert!(
            self.0.lock().unwrap().config.take().is_some(),
            "hidden twice"
        );
        Ok(())
    }
}
