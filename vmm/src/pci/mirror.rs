//! Configuration space as memory that the guest reads without leaving.
//!
//! A kernel reads some two hundred configuration registers of each function at boot, and every one
//! would be an exit to this process. Nearly all of them change only when the guest writes, so the
//! whole bus lies in one read-only memory slot: reads find it, writes still come to us, and each
//! write renews its function. Functions come and go by mappings below the slot; changing memory
//! slots is dear, as KVM waits for all vCPUs then.
//!
//! The one register that must be computed when it is read is the data of virtio's configuration
//! access capability; a guest that turns to that capability has the slot withdrawn for good.

use std::io;
use std::sync::Arc;

use super::wires::Wires;
use crate::kvm::{Backing, SlotId};
use crate::memory::{ConfigPages, ECAM_START};

/// The bus as the guest reads it.
pub struct Mirror {
    pages: Arc<ConfigPages>,
    slot: Option<SlotId>,
    wires: Arc<dyn Wires>,
}

impl Mirror {
    /// Shows the guest an empty bus. If KVM does not take the memory, reads come to us.
    ///
    /// # Errors
    /// No memory for the pages.
    pub fn new(wires: Arc<dyn Wires>) -> io::Result<Self> {
        let pages = Arc::new(ConfigPages::new()?);
        let shown = wires.show(ECAM_START, Backing::Config(pages.clone()));
        let failed = |error| tracing::warn!(%error, "configuration space cannot be memory");
        Ok(Self {
            pages,
            slot: shown.map_err(failed).ok(),
            wires,
        })
    }

    /// Shows what has changed of function 0 in `slot`: its configuration space, or that there is
    /// none any more.
    pub fn renew(&mut self, slot: usize, config: Option<&[u8]>) {
        let done = match config {
            Some(bytes) => self.pages.show(slot, bytes),
            None => self.pages.hide(slot),
        };
        if let Err(error) = done {
            // Without pages the guest must not read old ones.
            tracing::error!(%error, slot, "configuration space cannot be shown");
            self.withdraw();
        }
    }

    /// From now on all reads come to us.
    pub fn withdraw(&mut self) {
        let Some(slot) = self.slot.take() else { return };
        if let Err(error) = self.wires.hide(&slot) {
            tracing::error!(%error, "configuration space stays shown as memory");
        }
    }
}
