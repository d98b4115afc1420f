//! A hostile guest: RAM, rings in it, and a script of what its driver does to a device.
//!
//! The device is the real one; the calling thread is its worker (`sepal_vmm::virtio::inline`), so that
//! the driver's steps and the device's turns alternate in the order of the script.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sepal_vmm::virtio::device::{Activation, ActiveQueue, Interrupt, VirtioDevice};
use sepal_vmm::virtio::inline;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::input::Input;

/// Bytes of RAM from address 0.
pub const LOW: u64 = 1 << 20;
/// Where RAM goes on, behind a hole.
pub const HIGH: u64 = 16 << 20;
/// Bytes there.
pub const HIGH_SIZE: u64 = 16 << 20;
/// Where buffers lie; below are the rings.
const BUFFERS: u64 = 0x4_0000;
/// What each queue's rings take.
const RINGS: u64 = 0x6000;
/// Most turns of a device in one run, and those after the script's end in which it may finish.
const TURNS: u32 = 64;
const LAST_TURNS: u32 = 4;
/// Most lives of a device in one run.
const RESETS: u32 = 4;

// Descriptor flags (virtio 1.2, 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// An empty file in memory.
pub fn memory_file(size: u64) -> File {
    // SAFETY: a constant name; the result is checked before it is owned.
    let fd = unsafe { libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: just made, nobody else has it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(size).expect("a file in memory has any size");
    file
}

fn event() -> EventFd {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).expect("descriptors are left")
}

/// The interrupt line: it counts.
pub struct Line {
    /// Interrupts of queues.
    pub used: AtomicU64,
    /// How often the device asked for a reset.
    pub resets: AtomicU64,
    call: EventFd,
}

impl Interrupt for Line {
    fn used(&self, _: u16) {
        self.used.fetch_add(1, Ordering::Relaxed);
    }

    fn config_changed(&self) {}

    fn needs_reset(&self) {
        self.resets.fetch_add(1, Ordering::Relaxed);
    }

    fn used_fd(&self, _: u16) -> Option<BorrowedFd<'_>> {
        // SAFETY: the eventfd lives as long as `self`.
        Some(unsafe { BorrowedFd::borrow_raw(self.call.as_raw_fd()) })
    }
}

/// What the other side of a device does, by the same script: the host's programs, its network, the
/// shim.
pub trait Host {
    /// One step, as the script says.
    fn act(&mut self, input: &mut Input);
}

/// A host that does nothing.
impl Host for () {
    fn act(&mut self, _: &mut Input) {}
}

struct Rings {
    index: u16,
    size: u16,
    offered: u16,
    slot: u16,
    kick: EventFd,
}

impl Rings {
    fn base(&self) -> u64 {
        0x1000 + RINGS * u64::from(self.index)
    }

    fn descriptors(&self) -> u64 {
        self.base()
    }

    fn available(&self) -> u64 {
        self.base() + 0x2000
    }

    fn used(&self) -> u64 {
        self.base() + 0x3000
    }
}

/// See the module.
pub struct Guest<H> {
    input: Input,
    memory: Arc<GuestMemoryMmap>,
    line: Arc<Line>,
    queues: Vec<Rings>,
    host: H,
    next: u64,
    last: u64,
    turns: u32,
    left: u32,
}

impl<H: Host + 'static> Guest<H> {
    /// Gives `device` to the guest whose script is `input`, until the script ends.
    ///
    /// The script begins with the features that the driver accepts (8 bytes; what is not offered is
    /// dropped), the queues that it leaves out (a bit each) and a byte for the size of each queue.
    pub fn drive(mut input: Input, device: &mut dyn VirtioDevice, host: H) -> Arc<Line> {
        let (features, left_out) = (input.u64(), input.byte());
        let mut queues = Vec::new();
        for (index, most) in device.queue_sizes().iter().enumerate() {
            let size = most >> (input.byte() % 10);
            if left_out >> index & 1 == 0 {
                queues.push(Rings {
                    index: index as u16,
                    size: size.max(1),
                    offered: 0,
                    slot: 0,
                    kick: event(),
                });
            }
        }
        let line = Arc::new(Line {
            used: AtomicU64::new(0),
            resets: AtomicU64::new(0),
            call: event(),
        });
        let guest = Rc::new(RefCell::new(Self {
            input,
            memory: memory(),
            line: Arc::clone(&line),
            queues,
            host,
            next: BUFFERS,
            last: BUFFERS,
            turns: TURNS,
            left: LAST_TURNS,
        }));
        for _ in 0..RESETS {
            guest.borrow_mut().prepare(device);
            let activation = guest.borrow().activation(features & device.features());
            let driver = Rc::clone(&guest);
            let step = move || driver.borrow_mut().until_the_next_turn();
            // A device that does not start is the driver's to reset, as any other.
            let _ = inline::run(step, || device.activate(activation));
            device.reset();
            if guest.borrow().input.is_empty() {
                break;
            }
        }
        let mut config = [0; 64];
        device.read_config(0, &mut config);
        line
    }

    /// Configuration space, and what is in the rings when the device starts.
    fn prepare(&mut self, device: &mut dyn VirtioDevice) {
        let mut data = [0; 8];
        for _ in 0..self.input.below(4) {
            let (offset, width) = (self.input.u16(), 1 << self.input.below(4));
            device.read_config(offset.into(), &mut data[..width]);
            let value = self.input.u64().to_le_bytes();
            device.write_config(offset.into(), &value[..width]);
        }
        self.until_the_next_turn();
    }

    fn activation(&self, features: u64) -> Activation {
        let queue = |rings: &Rings| {
            let mut queue = Queue::new(rings.size).expect("a power of two");
            let placed = queue
                .try_set_desc_table_address(GuestAddress(rings.descriptors()))
                .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(rings.available())))
                .and_then(|()| queue.try_set_used_ring_address(GuestAddress(rings.used())));
            placed.expect("rings are aligned");
            queue.set_ready(true);
            assert!(queue.is_valid(&*self.memory), "rings lie in RAM");
            ActiveQueue {
                index: rings.index,
                queue,
                kick: rings.kick.try_clone().expect("descriptors are left"),
            }
        };
        Activation {
            memory: Arc::clone(&self.memory),
            queues: self.queues.iter().map(queue).collect(),
            interrupt: self.line.clone(),
            features,
        }
    }

    /// What the driver does until the device has its turn; false: it is reset now.
    fn until_the_next_turn(&mut self) -> bool {
        if self.turns == 0 {
            self.input.rest();
            return false;
        }
        self.turns -= 1;
        loop {
            if self.input.is_empty() {
                self.left = self.left.saturating_sub(1);
                return self.left > 0;
            }
            match self.input.byte() % 16 {
                0 => return true,
                1 => return false,
                2..=10 | 12 | 13 if self.queues.is_empty() => {}
                2..=6 => self.chain(),
                7 => self.indirect_chain(),
                8 => self.descriptor(),
                9 => self.offer_anything(),
                10 => self.set_available_index(),
                11 => self.overwrite(),
                12 | 13 => self.kick(),
                _ => self.host.act(&mut self.input),
            }
        }
    }

    fn queue(&mut self) -> usize {
        self.input.below(self.queues.len())
    }

    /// Bytes into RAM; where there is none, nowhere.
    fn put(&self, gpa: u64, bytes: &[u8]) {
        // What the guest writes beyond its RAM is not there.
        let _ = self.memory.write(bytes, GuestAddress(gpa));
    }

    /// Length and address of a buffer: mostly good ones.
    fn place(&mut self) -> (u64, u32) {
        let how = self.input.byte();
        let len = match how & 15 {
            0..=5 => u32::from(self.input.byte()),
            6 => 0,
            7 => 1,
            8 => 16,
            9 => 12,
            10 => 44,
            11 => 4096,
            12 => 65_536,
            13 => u32::from(self.input.u16()),
            14 => self.input.u32(),
            _ => u32::MAX,
        };
        let gpa = match how >> 4 {
            0..=7 => {
                let gpa = self.next;
                // Around again before the end: then buffers overlap, which is the guest's affair.
                self.next = gpa + u64::from(len.min(4096)).next_multiple_of(8);
                if self.next > LOW - 8192 {
                    self.next = BUFFERS;
                }
                gpa
            }
            8 => self.last,
            9 => LOW.wrapping_sub(u64::from(len)),
            10 => LOW.wrapping_sub(u64::from(len)).wrapping_add(1),
            11 => 0x1000 + u64::from(self.input.u16()),
            12 => HIGH + u64::from(self.input.u32()),
            13 => HIGH.wrapping_sub(1),
            14 => u64::MAX - u64::from(len),
            _ => self.input.u64(),
        };
        self.last = gpa;
        (gpa, len)
    }

    fn write_descriptor(&self, at: u64, gpa: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&gpa.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.put(at, &bytes);
    }

    /// A buffer: what it holds comes from the script if the device is to read it.
    fn buffer(&mut self) -> (u64, u32, u16) {
        let write = self.input.byte() & 1 != 0;
        let (gpa, len) = self.place();
        if write {
            return (gpa, len, WRITE);
        }
        let bytes = self.input.take((len as usize).min(256));
        self.put(gpa, &bytes);
        (gpa, len, 0)
    }

    /// A chain of buffers, offered to the device. A byte says of how many.
    fn chain(&mut self) {
        let queue = self.queue();
        let count = 1 + self.input.below(8);
        let (size, table) = {
            let rings = &self.queues[queue];
            (rings.size, rings.descriptors())
        };
        let head = self.queues[queue].slot % size;
        for n in 1..=count {
            let (gpa, len, flags) = self.buffer();
            let slot = self.queues[queue].slot % size;
            self.queues[queue].slot = (slot + 1) % size;
            let (more, next) = if n < count {
                (NEXT, (slot + 1) % size)
            } else {
                (0, 0)
            };
            self.write_descriptor(table + 16 * u64::from(slot), gpa, len, flags | more, next);
        }
        self.offer(queue, head);
    }

    /// The same in a table of its own.
    fn indirect_chain(&mut self) {
        let queue = self.queue();
        let count = 1 + self.input.below(32) as u16;
        let table = self.next;
        self.next = (table + 16 * 64).min(LOW - 8192);
        for n in 0..count {
            let (gpa, len, flags) = self.buffer();
            let more = if n + 1 < count { NEXT } else { 0 };
            self.write_descriptor(table + 16 * u64::from(n), gpa, len, flags | more, n + 1);
        }
        let (size, descriptors, slot) = {
            let rings = &self.queues[queue];
            (rings.size, rings.descriptors(), rings.slot % rings.size)
        };
        self.queues[queue].slot = (slot + 1) % size;
        let at = descriptors + 16 * u64::from(slot);
        self.write_descriptor(at, table, 16 * u32::from(count), INDIRECT, 0);
        self.offer(queue, slot);
    }

    /// A descriptor as the script has it, right or wrong.
    fn descriptor(&mut self) {
        let queue = self.queue();
        let slot = self.input.u16() % self.queues[queue].size;
        let (gpa, len) = self.place();
        let (flags, next) = (u16::from(self.input.byte()), self.input.u16());
        let at = self.queues[queue].descriptors() + 16 * u64::from(slot);
        self.write_descriptor(at, gpa, len, flags, next);
    }

    fn offer_anything(&mut self) {
        let queue = self.queue();
        let head = self.input.u16();
        self.offer(queue, head);
    }

    fn offer(&mut self, queue: usize, head: u16) {
        let rings = &mut self.queues[queue];
        let at = rings.available() + 4 + 2 * u64::from(rings.offered % rings.size);
        rings.offered = rings.offered.wrapping_add(1);
        let (index, offered) = (rings.available() + 2, rings.offered);
        self.put(at, &head.to_le_bytes());
        self.put(index, &offered.to_le_bytes());
    }

    fn set_available_index(&mut self) {
        let queue = self.queue();
        let index = self.input.u16();
        let at = self.queues[queue].available() + 2;
        self.put(at, &index.to_le_bytes());
    }

    /// Anything over anything: buffers, rings, tables.
    fn overwrite(&mut self) {
        let (gpa, _) = self.place();
        let bytes = self.input.some();
        self.put(gpa, &bytes);
    }

    fn kick(&mut self) {
        let queue = self.queue();
        // It takes a write unless it has been written 2^64 times.
        let _ = self.queues[queue].kick.write(1);
    }
}

fn memory() -> Arc<GuestMemoryMmap> {
    let file = Arc::new(memory_file(LOW + HIGH_SIZE));
    let region = |at, size: u64, offset| {
        let file = FileOffset::from_arc(Arc::clone(&file), offset);
        (GuestAddress(at), size as usize, Some(file))
    };
    let regions = [region(0, LOW, 0), region(HIGH, HIGH_SIZE, LOW)];
    let memory = GuestMemoryMmap::from_ranges_with_files(regions);
    Arc::new(memory.expect("memory is left"))
}
