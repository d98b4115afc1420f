//! The kernel's vhost-net: frames pass between tap and rings without the VMM.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use vhost::{Error, VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueT;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::tap::Tap;
use crate::virtio::device::ActiveQueue;

/// An open /dev/vhost-net that has not been given guest memory yet.
pub struct VhostNet {
    file: Arc<File>,
    features: u64,
    owned: bool,
}

/// The same with guest memory, while the device is active. Dropping it stops both queues.
pub struct Running {
    file: Arc<File>,
    memory: Arc<GuestMemoryMmap>,
    started: Vec<u32>,
}

impl VhostNet {
    /// Asks the kernel what it can do.
    ///
    /// # Errors
    /// `file` is no /dev/vhost-net.
    pub fn new(file: File) -> Result<Self, Error> {
        let file = Arc::new(file);
        let idle = Running {
            file: Arc::clone(&file),
            memory: Arc::new(GuestMemoryMmap::new()),
            started: Vec::new(),
        };
        Ok(Self {
            features: idle.get_features()?,
            file,
            owned: false,
        })
    }

    /// Features that the kernel knows.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Prepares for guest memory and the features agreed on.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn start(&mut self, memory: Arc<GuestMemoryMmap>, features: u64) -> Result<Running, Error> {
        let running = Running {
            file: Arc::clone(&self.file),
            memory,
            started: Vec::new(),
        };
        if !self.owned {
            running.set_owner()?;
            self.owned = true;
        }
        running.set_features(features & self.features)?;
        let regions = running
            .memory
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: vm_memory::Address::raw_value(
                    &vm_memory::GuestMemoryRegion::start_addr(region),
                ),
                memory_size: vm_memory::GuestMemoryRegion::len(region),
                userspace_addr: region.as_ptr() as u64,
                mmap_offset: 0,
                mmap_handle: -1,
            });
        running.set_mem_table(&regions.collect::<Vec<_>>())?;
        Ok(running)
    }
}

impl Running {
    /// Hands over a queue: 0 to the guest, 1 from it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn add_queue(
        &mut self,
        active: &ActiveQueue,
        call: &EventFd,
        tap: &Tap,
    ) -> Result<(), Error> {
        let (queue, index) = (&active.queue, usize::from(active.index));
        self.set_vring_num(index, queue.size())?;
        self.set_vring_addr(
            index,
            &VringConfigData {
                queue_max_size: queue.max_size(),
                queue_size: queue.size(),
                flags: 0,
                desc_table_addr: queue.desc_table(),
                used_ring_addr: queue.used_ring(),
                avail_ring_addr: queue.avail_ring(),
                log_addr: None,
            },
        )?;
        self.set_vring_base(index, queue.next_avail())?;
        self.set_vring_call(index, call)?;
        self.set_vring_kick(index, &active.kick)?;
        self.set_backend(u32::from(active.index), Some(tap.file()))?;
        self.started.push(u32::from(active.index));
        Ok(())
    }

    fn set_backend(&self, index: u32, tap: Option<&File>) -> Result<(), Error> {
        let fd = tap.map_or(-1, AsRawFd::as_raw_fd);
        let backend = vhost_vring_file { index, fd };
        // SAFETY: the ioctl reads one vhost_vring_file, which outlives the call.
        let result = unsafe { ioctl_with_ref(self, VHOST_NET_SET_BACKEND(), &backend) };
        if result < 0 {
            Err(Error::IoctlError(std::io::Error::last_os_error()))
        } else {
            Ok(())
        }
    }
}

impl VhostKernBackend for Running {
    type AS = Arc<GuestMemoryMmap>;

    fn mem(&self) -> &Self::AS {
        &self.memory
    }
}

impl AsRawFd for Running {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for index in &self.started {
            // Returns when the kernel's worker has let go of the queue.
            if let Err(error) = self.set_backend(*index, None) {
                tracing::error!("vhost-net did not let go of queue {index}: {error}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_vhost_net_is_refused() {
        assert!(VhostNet::new(File::open("/dev/null").unwrap()).is_err());
    }
}
