//! A vhost-user back end for the tests of the front end: it answers each request with the request's
//! bytes in reverse. RAM, rings, kicks and calls are those it was sent over the socket.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::*;
use vhost::vhost_user::{
    BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::features;

#[derive(Default)]
struct Vring {
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    base: u16,
    kick: Option<File>,
    call: Option<File>,
    running: Option<(UnixStream, JoinHandle<u16>)>,
}

struct Reverser {
    queues: usize,
    regions: Vec<VhostUserMemoryRegion>,
    memory: Option<Arc<GuestMemoryMmap>>,
    vrings: HashMap<u32, Vring>,
}

impl Reverser {
    fn guest_address(&self, user: u64) -> u64 {
        let inside =
            |r: &&VhostUserMemoryRegion| (r.user_addr..r.user_addr + r.memory_size).contains(&user);
        let region = self
            .regions
            .iter()
            .find(inside)
            .expect("ring outside of the memory table");
        user - region.user_addr + region.guest_phys_addr
    }

    fn vring(&mut self, index: u32) -> &mut Vring {
        assert!((index as usize) < self.queues);
        self.vrings.entry(index).or_default()
    }

    fn run(&mut self, index: u32) {
        let memory = self.memory.clone().expect("no memory table");
        let vring = self.vring(index);
        let mut queue = Queue::new(1024).unwrap();
        queue.set_size(vring.size);
        queue
            .try_set_desc_table_address(GuestAddress(vring.desc))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(vring.avail))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(vring.used))
            .unwrap();
        queue.set_next_avail(vring.base);
        queue.set_ready(true);
        let kick = vring.kick.take().expect("enabled before it had a kick");
        let call = vring.call.take().expect("enabled before it had a call");
        let (stop, stopped) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || serve(&memory, queue, &kick, call, &stopped));
        vring.running = Some((stop, thread));
    }

    fn stop(&mut self, index: u32) -> u16 {
        let vring = self.vring(index);
        if let Some((stop, thread)) = vring.running.take() {
            drop(stop);
            vring.base = thread.join().unwrap();
        }
        vring.base
    }
}

fn serve(
    memory: &GuestMemoryMmap,
    mut queue: Queue,
    kick: &File,
    mut call: File,
    stop: &UnixStream,
) -> u16 {
    loop {
        while let Some(chain) = queue.pop_descriptor_chain(memory) {
            let mut bytes = Vec::new();
            for desc in chain.clone().readable() {
                let start = bytes.len();
                bytes.resize(start + desc.len() as usize, 0);
                memory.read_slice(&mut bytes[start..], desc.addr()).unwrap();
            }
            bytes.reverse();
            let target = chain.clone().writable().next().unwrap();
            memory.write_slice(&bytes, target.addr()).unwrap();
            queue
                .add_used(memory, chain.head_index(), bytes.len() as u32)
                .unwrap();
            call.write_all(&1_u64.to_ne_bytes()).unwrap();
        }
        let mut fds = [kick.as_fd(), stop.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        poll(&mut fds, PollTimeout::NONE).unwrap();
        if fds[1].any().unwrap() {
            return queue.next_avail();
        }
        nix::unistd::read(kick, &mut [0; 8]).unwrap();
    }
}

fn unasked<T>() -> Result<T> {
    Err(Error::ReqHandlerError(io::ErrorKind::Unsupported.into()))
}

impl VhostUserBackendReqHandlerMut for Reverser {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        let own = VhostUserVirtioFeatures::PROTOCOL_FEATURES | VhostUserVirtioFeatures::LOG_ALL;
        Ok(features::VERSION_1 | features::RING | own.bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        assert_ne!(
            features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(),
            0
        );
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let map = |(region, file): (&VhostUserMemoryRegion, File)| {
            let mapping = region.mmap_region(file).unwrap();
            GuestRegionMmap::new(mapping, GuestAddress(region.guest_phys_addr)).unwrap()
        };
        let mapped = regions.iter().zip(files).map(map).collect();
        self.memory = Some(Arc::new(GuestMemoryMmap::from_regions(mapped).unwrap()));
        self.regions = regions.to_vec();
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.vring(index).size = num.try_into().unwrap();
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _: u64,
    ) -> Result<()> {
        let [desc, used, avail] = [descriptor, used, available].map(|a| self.guest_address(a));
        let vring = self.vring(index);
        (vring.desc, vring.used, vring.avail) = (desc, used, avail);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.vring(index).base = base.try_into().unwrap();
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let base = self.stop(index);
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.vring(index.into()).kick = fd;
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.vring(index.into()).call = fd;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK)
    }

    fn set_protocol_features(&mut self, _: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.queues as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        if enable {
            self.run(index);
        } else {
            self.stop(index);
        }
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        unasked()
    }
    fn reset_device(&mut self) -> Result<()> {
        unasked()
    }
    fn set_vring_err(&mut self, _: u8, _: Option<File>) -> Result<()> {
        unasked()
    }
    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        unasked()
    }
    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        unasked()
    }
    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        unasked()
    }
    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        unasked()
    }
    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        unasked()
    }
    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        unasked()
    }
    fn get_max_mem_slots(&mut self) -> Result<u64> {
        unasked()
    }
    fn add_mem_region(
        &mut self,
        _: &VhostUserSingleMemoryRegion,
        _: File,
        _: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        unasked()
    }
    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        unasked()
    }
    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        unasked()
    }
    fn check_device_state(&mut self) -> Result<()> {
        unasked()
    }
    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unasked()
    }
    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        unasked()
    }
}

/// A back end in a thread of its own.
pub struct Server {
    connection: UnixStream,
}

impl Server {
    /// What the front end sees when the back end's process is killed.
    pub fn die(&self) {
        self.connection.shutdown(Shutdown::Both).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.connection.shutdown(Shutdown::Both);
    }
}

/// Starts a back end and returns the front end's socket.
pub fn server(queues: usize) -> (Server, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let connection = theirs.try_clone().unwrap();
    let reverser = Reverser {
        queues,
        regions: Vec::new(),
        memory: None,
        vrings: HashMap::new(),
    };
    let mut handler = BackendReqHandler::from_stream(theirs, Arc::new(Mutex::new(reverser)));
    std::thread::spawn(move || while handler.handle_request().is_ok() {});
    (Server { connection }, ours)
}
