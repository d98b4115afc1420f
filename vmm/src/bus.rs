//! Dispatch of what the guest touches and KVM does not serve itself.
//!
//! Called by vCPU threads. Where nothing lives, reads give all ones and writes go nowhere, as on a
//! PC; both are logged at debug level, because a guest may do that as often as it likes.

use std::sync::Arc;

use crate::memory::{ECAM_SIZE, ECAM_START};
use crate::pci::PciBus;
use crate::platform::Platform;
use crate::serial::{self, Serial};

/// The guest's view of its machine.
pub struct Bus {
    /// PCI: configuration space and BARs.
    pub pci: Arc<PciBus>,
    /// Power, panic and hot-plug registers.
    pub platform: Arc<Platform>,
    /// The early console, if there is one.
    pub serial: Option<Serial>,
}

impl Bus {
    /// Memory read.
    pub fn read(&self, gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
        match gpa.checked_sub(ECAM_START) {
            Some(offset) if offset < ECAM_SIZE => self.pci.read_config(offset, data),
            _ => {
                if !self.pci.read_bar(gpa, data) {
                    tracing::debug!(gpa = format_args!("{gpa:#x}"), "read of nothing");
                }
            }
        }
    }

    /// Memory write.
    pub fn write(&self, gpa: u64, data: &[u8]) {
        match gpa.checked_sub(ECAM_START) {
            Some(offset) if offset < ECAM_SIZE => self.pci.write_config(offset, data),
            _ => {
                if !self.pci.write_bar(gpa, data) {
                    tracing::debug!(gpa = format_args!("{gpa:#x}"), "write to nothing");
                }
            }
        }
    }

    /// IN and INS. `data` holds one or more values of the instruction's width.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match (port, &self.serial) {
            (serial::PORT..=serial::LAST_PORT, Some(serial)) => {
                serial.read(port - serial::PORT, data);
            }
            _ => self.platform.read(port, data),
        }
    }

    /// OUT and OUTS.
    pub fn port_write(&self, port: u16, data: &[u8]) {
        match (port, &self.serial) {
            (serial::PORT..=serial::LAST_PORT, Some(serial)) => {
                serial.write(port - serial::PORT, data);
            }
            _ => self.platform.write(port, data),
        }
    }
}
