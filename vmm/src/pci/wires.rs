//! What leads from a PCI function to the guest's CPUs and back: interrupts and doorbells.
//!
//! KVM implements it; the transport's tests look at the wires themselves.

use vmm_sys_util::eventfd::EventFd;

use crate::kvm::{Backing, Error, Machine, Msi, SlotId};

/// Interrupts by irqfd, doorbells by ioeventfd, memory.
#[allow(
    missing_docs,
    reason = "each is the function of the same name of Machine"
)]
pub trait Wires: Send + Sync {
    fn allocate_gsi(&self) -> u32;
    fn free_gsi(&self, gsi: u32);
    fn route(&self, gsi: u32, msi: Msi) -> Result<(), Error>;
    fn connect(&self, event: &EventFd, gsi: u32) -> Result<(), Error>;
    fn disconnect(&self, event: &EventFd, gsi: u32) -> Result<(), Error>;
    fn add_doorbell(&self, gpa: u64, event: &EventFd) -> Result<(), Error>;
    fn remove_doorbell(&self, gpa: u64, event: &EventFd) -> Result<(), Error>;
    fn show(&self, gpa: u64, backing: Backing) -> Result<SlotId, Error>;
    fn hide(&self, slot: &SlotId) -> Result<(), Error>;
}

impl Wires for Machine {
    fn allocate_gsi(&self) -> u32 {
        self.allocate_gsi()
    }

    fn free_gsi(&self, gsi: u32) {
        self.free_gsi(gsi);
    }

    fn route(&self, gsi: u32, msi: Msi) -> Result<(), Error> {
        self.route(gsi, msi)
    }

    fn connect(&self, event: &EventFd, gsi: u32) -> Result<(), Error> {
        self.connect(event, gsi)
    }

    fn disconnect(&self, event: &EventFd, gsi: u32) -> Result<(), Error> {
        self.disconnect(event, gsi)
    }

    fn add_doorbell(&self, gpa: u64, event: &EventFd) -> Result<(), Error> {
        self.add_doorbell(gpa, event)
    }

    fn remove_doorbell(&self, gpa: u64, event: &EventFd) -> Result<(), Error> {
        self.remove_doorbell(gpa, event)
    }

    fn show(&self, gpa: u64, backing: Backing) -> Result<SlotId, Error> {
        self.add_memory(gpa, backing)
    }

    fn hide(&self, slot: &SlotId) -> Result<(), Error> {
        self.remove_memory(slot)
    }
}
