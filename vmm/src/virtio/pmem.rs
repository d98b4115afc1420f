//! virtio-pmem (virtio 1.2, section 5.19): a read-only file as the guest's memory.
//!
//! The file's pages in the host's page cache are the guest's memory: all VMs that use one image
//! share one copy of it, and the guest reads it without an exit. [`Image`] is what the VM builder
//! puts into a read-only memory slot at [`Pmem`]'s address; the device itself only answers flushes.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use nix::sys::epoll::EpollFlags;

use super::device::{ActivateError, Activation, DeviceType, VirtioDevice};
use super::error::{Complaints, DeviceError};
use super::features;
use super::ring::Ring;
use super::sys::SharedMapping;
use super::worker::{Handler, Next, Waits, Worker};

/// The guest's address and size must be multiples of this: Linux adds such memory to its page map
/// in subsections of 2 MiB.
pub const ALIGN: u64 = 2 << 20;

const FLUSH: u32 = 0;
const OK: u32 = 0;
const FAILED: u32 = 1;
const QUEUE_SIZES: [u16; 1] = [16];

/// An image mapped for the guest, padded with zeroes to a multiple of [`ALIGN`].
#[derive(Debug)]
pub struct Image {
    mapping: SharedMapping,
}

impl Image {
    /// Maps a file, MAP_SHARED and PROT_READ, at a host address that is a multiple of [`ALIGN`].
    ///
    /// # Errors
    /// An empty file (`InvalidData`), and what mmap(2) says.
    pub fn map(file: &File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        if length == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the image is empty",
            ));
        }
        let size = length.checked_next_multiple_of(ALIGN);
        let size = size.and_then(|s| usize::try_from(s).ok());
        let size = size.ok_or_else(|| io::Error::from(io::ErrorKind::FileTooLarge))?;
        let mapping = SharedMapping::new(file.as_fd(), length as usize, size, ALIGN as usize)?;
        Ok(Self { mapping })
    }

    /// `userspace_addr` for the memory slot, which must be KVM_MEM_READONLY: the mapping is.
    pub fn host_address(&self) -> u64 {
        self.mapping.address() as u64
    }

    /// Bytes, a multiple of [`ALIGN`].
    pub fn size(&self) -> u64 {
        self.mapping.size() as u64
    }

    /// Copies out what the guest sees at `offset`, for tests.
    #[cfg(test)]
    pub fn read(&self, offset: usize, into: &mut [u8]) -> usize {
        self.mapping.read(offset, into)
    }
}

/// The device.
pub struct Pmem {
    config: [u8; 16],
    worker: Option<Worker>,
}

impl Pmem {
    /// A device for `size` bytes that the guest finds at `gpa`, both multiples of [`ALIGN`].
    pub fn new(gpa: u64, size: u64) -> Self {
        debug_assert!(gpa.is_multiple_of(ALIGN) && size.is_multiple_of(ALIGN));
        let mut config = [0; 16];
        config[..8].copy_from_slice(&gpa.to_le_bytes());
        config[8..].copy_from_slice(&size.to_le_bytes());
        Self {
            config,
            worker: None,
        }
    }
}

impl VirtioDevice for Pmem {
    fn device_type(&self) -> DeviceType {
        DeviceType::Pmem
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        features::RING
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        features::read_config(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            memory,
            mut queues,
            interrupt,
            features,
        } = activation;
        let Some(requests) = queues.pop() else {
            return Err(ActivateError::MissingQueues { got: 0, need: 1 });
        };
        let theirs = interrupt.clone();
        let body = move |waits: &Waits| {
            waits
                .add_kick(&requests.kick, 0)
                .map_err(DeviceError::host("epoll_ctl"))?;
            let requests = Ring::new(requests, &memory, theirs, features);
            waits.serve(&mut Flushes {
                requests,
                complaints: Complaints::default(),
            })
        };
        self.worker = Some(Worker::spawn(
            "virtio-pmem",
            DeviceType::Pmem,
            interrupt,
            body,
        )?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

struct Flushes<'m> {
    requests: Ring<'m>,
    complaints: Complaints,
}

impl Handler for Flushes<'_> {
    fn event(&mut self, _: &Waits, _: u64, _: EpollFlags) -> Result<(), DeviceError> {
        Ok(())
    }

    fn turn(&mut self, _: &Waits) -> Result<Next, DeviceError> {
        let complaints = &mut self.complaints;
        let more = self.requests.serve(|mut chain| {
            // Nothing is ever written, so that a flush has nothing to do.
            let answer = match chain.readable.read_array().map(u32::from_le_bytes) {
                Some(FLUSH) => OK,
                other => {
                    complaints.warn("pmem", &format_args!("request {other:?} is no flush"));
                    FAILED
                }
            };
            Ok(chain.writable.write(&answer.to_le_bytes()) as u32)
        })?;
        Ok(if more { Next::Again } else { Next::Wait })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::testing::{Guest, readable, writable};
    use super::*;

    #[test]
    fn an_image_is_mapped_shared_and_padded_with_zeroes() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 5000]).unwrap();
        let image = Image::map(&file).unwrap();
        assert_eq!(image.size(), ALIGN);
        assert_eq!(image.host_address() % ALIGN, 0);
        let mut bytes = vec![1; 2 * ALIGN as usize];
        assert_eq!(image.read(0, &mut bytes), ALIGN as usize);
        assert!(bytes[..5000].iter().all(|b| *b == 7));
        assert!(bytes[5000..ALIGN as usize].iter().all(|b| *b == 0));
        // Shared: what changes in the page cache is seen.
        std::os::unix::fs::FileExt::write_at(&file, b"new", 100).unwrap();
        let mut bytes = [0; 3];
        image.read(100, &mut bytes);
        assert_eq!(&bytes, b"new");
    }

    #[test]
    fn an_empty_image_is_refused() {
        let error = Image::map(&tempfile::tempfile().unwrap()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn the_driver_finds_the_range_and_its_flushes_are_answered() {
        let mut guest = Guest::new(1);
        let mut queue = guest.queue(0, 16);
        let mut pmem = Pmem::new(1 << 32, 6 << 20);
        let mut config = [0; 16];
        pmem.read_config(0, &mut config);
        assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), 1 << 32);
        assert_eq!(u64::from_le_bytes(config[8..].try_into().unwrap()), 6 << 20);

        guest.activate(&mut pmem, &[&queue], 0);
        let answer = guest.place(&[9; 4]);
        for (request, expected) in [(0_u32, OK), (1, FAILED), (u32::MAX, FAILED)] {
            let request = guest.place(&request.to_le_bytes());
            assert_eq!(
                queue.request(&[readable(request, 4), writable(answer, 4)]),
                4
            );
            assert_eq!(guest.read(answer, 4), expected.to_le_bytes());
        }
        // Without a request, and without a place for the answer.
        assert_eq!(queue.request(&[writable(answer, 4)]), 4);
        assert_eq!(guest.read(answer, 4), FAILED.to_le_bytes());
        assert_eq!(queue.request(&[readable(answer, 4)]), 0);
        pmem.reset();
    }
}
