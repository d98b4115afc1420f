//! virtio-mem (virtio 1.3, section 5.15): memory that the guest plugs and unplugs block by block.
//!
//! The device owns a region of guest-physical addresses ([`crate::reserve`]). The host says through
//! [`Control`] how much of it the guest shall have; the driver asks for each block, and what it unplugs
//! is the host's at once ([`super::discard`]). The device is plugged when memory is first added: a VM
//! that never grows has none.
//!
//! Of the host's huge pages there are so many and no more, and a touch of one too many would end the VM:
//! they are taken when a block is plugged, which the guest can be refused.

use std::sync::{Arc, Mutex};

use nix::sys::epoll::EpollFlags;
use vm_memory::GuestMemoryMmap;

use super::buffer::Reader;
use super::device::{ActivateError, Activation, DeviceType, Interrupt, VirtioDevice};
use super::discard::{cut, take};
use super::error::{Complaints, DeviceError};
use super::features;
use super::locked;
use super::ring::Ring;
use super::worker::{Handler, Next, Waits, Worker};

/// What is plugged at a time: a huge page, and what Linux takes as the least.
pub const BLOCK: u64 = 2 << 20;

/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE (5.15.3): the driver does not touch what is not plugged.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

// Requests and responses (5.15.6).
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

const PLUGGED: u16 = 0;
const UNPLUGGED: u16 = 1;
const MIXED: u16 = 2;

/// In the log.
const NAME: &str = "mem";
const QUEUE_SIZES: [u16; 1] = [16];

/// Which blocks of a region are plugged.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Blocks {
    words: Vec<u64>,
    plugged: u64,
}

impl Blocks {
    fn new(count: u64) -> Self {
        Self {
            words: vec![0; count.div_ceil(64) as usize],
            plugged: 0,
        }
    }

    fn get(&self, block: u64) -> bool {
        let word = self.words.get((block / 64) as usize);
        word.is_some_and(|word| word >> (block % 64) & 1 != 0)
    }

    fn set(&mut self, block: u64, plugged: bool) {
        if self.get(block) == plugged {
            return;
        }
        if let Some(word) = self.words.get_mut((block / 64) as usize) {
            *word ^= 1 << (block % 64);
            self.plugged = if plugged {
                self.plugged + 1
            } else {
                self.plugged - 1
            };
        }
    }

    /// What a range of them is; a range of none is neither.
    fn state(&self, mut range: std::ops::Range<u64>) -> u16 {
        let Some(first) = range.next() else {
            return MIXED;
        };
        let first = self.get(first);
        if range.any(|block| self.get(block) != first) {
            MIXED
        } else if first {
            PLUGGED
        } else {
            UNPLUGGED
        }
    }
}

struct Sizes {
    requested: u64,
    /// Bytes from the region's start in which blocks may be plugged.
    usable: u64,
    blocks: Blocks,
}

/// How much the guest shall have and has; for whoever answers the control socket.
pub struct Control {
    gpa: u64,
    region: u64,
    /// Memory is taken from the host as it is plugged.
    taken: bool,
    sizes: Mutex<Sizes>,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

impl Control {
    /// Lets the guest plug or unplug until it has `bytes`, of the first `usable` of the region. What is
    /// usable never becomes less. False: no driver is there to do it.
    pub fn request(&self, bytes: u64, usable: u64) -> bool {
        {
            let mut sizes = locked(&self.sizes);
            sizes.requested = bytes;
            sizes.usable = sizes.usable.max(usable.min(self.region));
        }
        let interrupt = locked(&self.interrupt).clone();
        if let Some(interrupt) = &interrupt {
            interrupt.config_changed();
        }
        interrupt.is_some()
    }

    /// Bytes that are plugged.
    pub fn plugged(&self) -> u64 {
        locked(&self.sizes).blocks.plugged * BLOCK
    }

    /// `struct virtio_mem_config` (5.15.4).
    fn config(&self) -> [u8; 56] {
        let sizes = locked(&self.sizes);
        let mut config = [0; 56];
        // No node id at 8: VIRTIO_MEM_F_ACPI_PXM is not offered.
        for (at, value) in [
            (0, BLOCK),
            (16, self.gpa),
            (24, self.region),
            (32, sizes.usable),
            (40, sizes.blocks.plugged * BLOCK),
            (48, sizes.requested),
        ] {
            config[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        config
    }
}

/// The device.
pub struct Mem {
    control: Arc<Control>,
    worker: Option<Worker>,
}

impl Mem {
    /// A device for the `region` bytes at `gpa`, both multiples of [`BLOCK`], none of which is plugged.
    /// `taken`: the host must have them when they are plugged, and not only when they are touched.
    pub fn new(gpa: u64, region: u64, taken: bool) -> Self {
        debug_assert!(gpa.is_multiple_of(BLOCK) && region.is_multiple_of(BLOCK));
        let sizes = Sizes {
            requested: 0,
            usable: 0,
            blocks: Blocks::new(region / BLOCK),
        };
        Self {
            control: Arc::new(Control {
                gpa,
                region,
                taken,
                sizes: Mutex::new(sizes),
                interrupt: Mutex::new(None),
            }),
            worker: None,
        }
    }

    /// To be kept by whoever changes the size.
    pub fn control(&self) -> Arc<Control> {
        Arc::clone(&self.control)
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> DeviceType {
        DeviceType::Mem
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        features::RING | UNPLUGGED_INACCESSIBLE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        features::read_config(&self.control.config(), offset, data);
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
        *locked(&self.control.interrupt) = Some(Arc::clone(&interrupt));
        let (theirs, control) = (Arc::clone(&interrupt), Arc::clone(&self.control));
        let body = move |waits: &Waits| {
            waits
                .add_kick(&requests.kick, 0)
                .map_err(DeviceError::host("epoll_ctl"))?;
            let requests = Ring::new(requests, &memory, theirs, features);
            waits.serve(&mut Requests {
                requests,
                memory: &memory,
                control: &control,
                complaints: Complaints::default(),
            })
        };
        self.worker = Some(Worker::spawn(
            "virtio-mem",
            DeviceType::Mem,
            interrupt,
            body,
        )?);
        Ok(())
    }

    /// Blocks stay plugged (5.15.6.2): a driver that starts anew finds them.
    fn reset(&mut self) {
        self.worker = None;
        *locked(&self.control.interrupt) = None;
    }
}

struct Requests<'m> {
    requests: Ring<'m>,
    memory: &'m GuestMemoryMmap,
    control: &'m Control,
    complaints: Complaints,
}

impl Handler for Requests<'_> {
    fn event(&mut self, _: &Waits, _: u64, _: EpollFlags) -> Result<(), DeviceError> {
        Ok(())
    }

    fn turn(&mut self, _: &Waits) -> Result<Next, DeviceError> {
        let Self {
            requests,
            memory,
            control,
            complaints,
        } = self;
        let more = requests.serve(|mut chain| {
            let (answer, state) = control.answer(&mut chain.readable, memory, complaints);
            // `struct virtio_mem_resp`: the type, padding, and for STATE the state.
            let mut response = [0; 10];
            response[..2].copy_from_slice(&answer.to_le_bytes());
            response[8..].copy_from_slice(&state.to_le_bytes());
            Ok(chain.writable.write(&response) as u32)
        })?;
        Ok(if more { Next::Again } else { Next::Wait })
    }
}

impl Control {
    /// Does what a `struct virtio_mem_req` asks. Returns the response's type and its state.
    fn answer(
        &self,
        request: &mut Reader<'_>,
        memory: &GuestMemoryMmap,
        complaints: &mut Complaints,
    ) -> (u16, u16) {
        let Some([a, b, _, _, _, _, _, _]) = request.read_array::<8>() else {
            complaints.warn(NAME, &"a request without a type");
            return (ERROR, 0);
        };
        let kind = u16::from_le_bytes([a, b]);
        let mut sizes = locked(&self.sizes);
        if kind == UNPLUG_ALL {
            let end = self.gpa + sizes.usable;
            return (
                self.unplug(&mut sizes, self.gpa..end, memory, complaints),
                0,
            );
        }
        // An address, a number of blocks, and padding.
        let range = request
            .read_array::<8>()
            .zip(request.read_array::<2>())
            .map(|(gpa, count)| (u64::from_le_bytes(gpa), u16::from_le_bytes(count)))
            .and_then(|(gpa, count)| self.blocks(gpa, count, sizes.usable));
        let Some(range) = range else {
            complaints.warn(NAME, &format_args!("request {kind} for no usable blocks"));
            return (ERROR, 0);
        };
        let bytes = (range.end - range.start) * BLOCK;
        let state = sizes.blocks.state(range.clone());
        let answer = match (kind, state) {
            (STATE, state) => return (ACK, state),
            (PLUG, UNPLUGGED) if sizes.blocks.plugged * BLOCK + bytes > sizes.requested => NACK,
            (PLUG, UNPLUGGED) => {
                let addresses = self.addresses(&range);
                if self.taken && !take(memory, addresses.clone(), NAME, complaints) {
                    cut(memory, (addresses.start, addresses.end), NAME, complaints);
                    return (NACK, 0);
                }
                range.for_each(|block| sizes.blocks.set(block, true));
                ACK
            }
            (UNPLUG, PLUGGED) => {
                let range = self.addresses(&range);
                self.unplug(&mut sizes, range, memory, complaints)
            }
            _ => {
                complaints.warn(
                    NAME,
                    &format_args!("request {kind} for blocks of state {state}"),
                );
                ERROR
            }
        };
        (answer, 0)
    }

    /// The blocks of a range of addresses; none that are not aligned, not there or not usable.
    fn blocks(&self, gpa: u64, count: u16, usable: u64) -> Option<std::ops::Range<u64>> {
        let offset = gpa.checked_sub(self.gpa)?;
        let first = offset / BLOCK;
        let end = first.checked_add(u64::from(count))?;
        let fits = count > 0 && offset.is_multiple_of(BLOCK) && end <= usable / BLOCK;
        fits.then_some(first..end)
    }

    /// Where the blocks of a range lie.
    fn addresses(&self, blocks: &std::ops::Range<u64>) -> std::ops::Range<u64> {
        let gpa = |block| self.gpa + block * BLOCK;
        gpa(blocks.start)..gpa(blocks.end)
    }

    /// Gives the memory of a range of addresses back, and with it its blocks.
    fn unplug(
        &self,
        sizes: &mut Sizes,
        range: std::ops::Range<u64>,
        memory: &GuestMemoryMmap,
        complaints: &mut Complaints,
    ) -> u16 {
        let bytes = range.end - range.start;
        if cut(memory, (range.start, range.end), NAME, complaints) < bytes {
            return BUSY;
        }
        let block = |gpa: u64| (gpa - self.gpa) / BLOCK;
        (block(range.start)..block(range.end)).for_each(|block| sizes.blocks.set(block, false));
        ACK
    }
}
