//! A function's configuration space as memory that the guest reads without leaving.
//!
//! A kernel reads some two hundred configuration registers of each function at boot, and every one
//! would be an exit to this process. Nearly all of them change only when the guest writes, so the
//! page lies in a read-only memory slot: reads find it, writes still come to us, and each write
//! renews it. The one register that must be computed when it is read is the data of virtio's
//! configuration access capability; a guest that turns to that capability has the page withdrawn.

use std::io;
use std::sync::Arc;

use vm_memory::{MmapRegion, VolatileMemory};

use super::config::{ConfigSpace, SIZE};
use super::wires::Wires;
use crate::kvm::SlotId;

/// Bytes of a function in ECAM.
const PAGE: usize = 4096;

/// The page. Dropping it withdraws it.
pub struct Mirror {
    page: Arc<MmapRegion>,
    slot: Option<SlotId>,
    wires: Arc<dyn Wires>,
}

impl Mirror {
    /// Shows the guest `config` at `gpa`. If KVM does not take the page, reads come to us.
    ///
    /// # Errors
    /// No memory for the page.
    pub fn new(gpa: u64, config: &ConfigSpace, wires: Arc<dyn Wires>) -> io::Result<Self> {
        let page = Arc::new(MmapRegion::new(PAGE).map_err(io::Error::other)?);
        let mut mirror = Self {
            page,
            slot: None,
            wires,
        };
        mirror.renew(config);
        match mirror.wires.show_registers(gpa, &mirror.page) {
            Ok(slot) => mirror.slot = Some(slot),
            Err(error) => tracing::warn!(%error, "configuration space cannot be shown as memory"),
        }
        Ok(mirror)
    }

    /// Copies what has changed.
    pub fn renew(&self, config: &ConfigSpace) {
        let mut bytes = [0; SIZE];
        config.read(0, &mut bytes);
        match self.page.get_slice(0, SIZE) {
            Ok(slice) => slice.copy_from(&bytes),
            Err(error) => tracing::error!(%error, "a page has no 256 bytes"),
        }
    }

    /// From now on reads come to us.
    pub fn withdraw(&mut self) {
        let Some(slot) = self.slot.take() else { return };
        if let Err(error) = self.wires.hide_registers(&slot) {
            tracing::error!(%error, "configuration space stays shown as memory");
        }
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.withdraw();
    }
}
