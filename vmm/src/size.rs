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
    reserve: Option<Reserve>,
    /// What says how much memory the guest shall have beyond that, once there is a device for it.
    pub added: Option<Arc<mem::Control>>,
    balloon: Option<Arc<balloon::Control>>,
}

impl Size {
    /// That of a VM as it boots.
    pub fn new(
        spec: &VmSpec,
        cpuid: CpuId,
        reserve: Option<Reserve>,
        balloon: Option<Arc<balloon::Control>>,
    ) -> Self {
        Self {
            cpus: spec.cpus.clone(),
            cpuid,
            memory: spec.memory.size,
            reserve,
            added: None,
            balloon,
        }
    }

    /// Lets the guest have `bytes` beyond its RAM. The first time this gives the device to be plugged.
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
        if let Some(added) = &self.added {
            if !added.request(bytes, usable) {
                bail!("the guest has no driver for memory that is added");
            }
            return Ok(None);
        }
        if bytes == 0 {
            return Ok(None);
        }
        let device = Mem::new(reserve.gpa(), reserve.size());
        // Its driver reads it when it comes.
        device.control().request(bytes, usable);
        Ok(Some(device))
    }

    /// Bytes that the guest has plugged.
    pub fn plugged(&self) -> u64 {
        self.added.as_ref().map_or(0, |added| added.plugged())
    }

    /// Most bytes that it may have plugged.
    pub fn pluggable(&self) -> u64 {
        self.reserve.as_ref().map_or(0, Reserve::size)
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
        let memory = self.memory + self.plugged();
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
