//! How large the VM is while it runs, and how large it may become.
//!
//! Beyond the RAM that it has booted with there is memory that the guest plugs and unplugs
//! ([`crate::virtio::mem`]); below it the balloon takes pages away ([`crate::virtio::balloon`]). Nothing
//! here waits for the guest: whoever asks looks at what it has done.

use std::sync::Arc;

use anyhow::{Result, anyhow, bail};
use kvm_bindings::CpuId;
use sepal_protocol::vm::{CpuSpec, VmSpec};

use crate::kvm::Machine;
use crate::memory::MIB;
use crate::reserve::Reserve;
use crate::virtio::balloon;
use crate::virtio::mem::{self, Mem};

/// Sizes, and what changes them.
pub struct Size {
    /// vCPUs at boot, and the most that the guest knows of.
    pub cpus: CpuSpec,
    /// What KVM lets a vCPU's CPUID say.
    pub cpuid: CpuId,
    /// Bytes of RAM at boot.
    pub memory: u64,
    /// Memory beyond that.
    pub added: Pool,
    /// The same of the host's huge pages.
    pub huge: Pool,
    balloon: Option<Arc<balloon::Control>>,
}

/// Memory that the guest plugs and unplugs.
pub struct Pool {
    /// What it comes from.
    reserve: Option<Reserve>,
    /// What says how much of it the guest shall have, once there is a device for it.
    device: Option<Arc<mem::Control>>,
}

impl Pool {
    fn of(reserve: Option<Reserve>) -> Self {
        Self {
            reserve,
            device: None,
        }
    }

    /// Lets the guest have `bytes` of it. The first time this gives the device to be plugged, and then
    /// [`has_device`](Self::has_device) to be told of it.
    ///
    /// # Errors
    /// More than the VM has addresses for; the host has no memory; the guest has no driver.
    pub fn plug(&mut self, bytes: u64, machine: &Machine) -> Result<Option<Mem>> {
        let room = self.pluggable();
        if bytes > room || !bytes.is_multiple_of(mem::BLOCK) {
            bail!(
                "{bytes} bytes of memory cannot be added: a multiple of 2 MiB up to {} MiB can",
                room / MIB
            );
        }
        let Some(reserve) = &mut self.reserve else {
            return Ok(None);
        };
        let usable = reserve.grant(bytes, machine)?;
        if let Some(device) = &self.device {
            if !device.request(bytes, usable) {
                bail!("the guest has no driver for memory that is added");
            }
            return Ok(None);
        }
        if bytes == 0 {
            return Ok(None);
        }
        let device = Mem::new(reserve.gpa(), reserve.size(), reserve.is_huge());
        // Its driver reads it when it comes.
        device.control().request(bytes, usable);
        Ok(Some(device))
    }

    /// The device for it has been plugged.
    pub fn has_device(&mut self, device: Arc<mem::Control>) {
        self.device = Some(device);
    }

    /// Bytes that the guest has plugged.
    pub fn plugged(&self) -> u64 {
        self.device.as_ref().map_or(0, |device| device.plugged())
    }

    /// Most bytes that it may have plugged.
    pub fn pluggable(&self) -> u64 {
        self.reserve.as_ref().map_or(0, Reserve::size)
    }
}

impl Size {
    /// That of a VM as it boots, with the reserves for [`added`](Self::added) and [`huge`](Self::huge).
    pub fn new(
        spec: &VmSpec,
        cpuid: CpuId,
        (reserve, huge): (Option<Reserve>, Option<Reserve>),
        balloon: Option<Arc<balloon::Control>>,
    ) -> Self {
        Self {
            cpus: spec.cpus.clone(),
            cpuid,
            memory: spec.memory.size,
            added: Pool::of(reserve),
            huge: Pool::of(huge),
            balloon,
        }
    }

    /// What the guest plugs, of the host's huge pages if `huge`.
    pub fn pool(&mut self, huge: bool) -> &mut Pool {
        if huge {
            &mut self.huge
        } else {
            &mut self.added
        }
    }

    /// Lets the balloon take `bytes` from the guest.
    ///
    /// # Errors
    /// There is no balloon, or more is asked for than there is.
    pub fn set_balloon(&self, bytes: u64) -> Result<()> {
        let balloon = self
            .balloon
            .as_ref()
            .ok_or_else(|| anyhow!("this VM has no balloon"))?;
        let memory = self.memory + self.added.plugged();
        if bytes >= memory || !bytes.is_multiple_of(balloon::PAGE) {
            bail!("a balloon of {bytes} bytes is not possible in {memory} bytes of memory");
        }
        if !balloon.set_target(bytes) {
            bail!("the guest has no driver for the balloon");
        }
        Ok(())
    }

    /// Bytes that the balloon holds.
    pub fn balloon(&self) -> u64 {
        self.balloon.as_ref().map_or(0, |balloon| balloon.held())
    }
}
