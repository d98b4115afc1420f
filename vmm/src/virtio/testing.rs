//! The other side of a device, for its tests: a guest driver over real RAM and real rings.
//!
//! RAM is a memfd as in a real VM. Only the interrupt line is a stand-in: it counts.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use proptest::test_runner::Config;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{Activation, ActiveQueue, Interrupt, VirtioDevice};

/// How long a test waits for what must come.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// For properties: so many cases, or as many as PROPTEST_CASES says. A failure is printed and leaves no
/// file, and one that takes [`PATIENCE`] to be seen is not made smaller for hours.
pub fn cases(count: u32) -> Config {
    Config {
        cases: count,
        failure_persistence: None,
        max_shrink_iters: 20_000,
        max_shrink_time: 60_000,
        ..Config::default()
    }
}

/// Bytes that do not repeat (xorshift), so that lost, doubled or swapped ones are seen.
pub struct Noise(pub u64);

impl Noise {
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.fill(&mut bytes);
        bytes
    }
}

/// Descriptor flags (virtio 1.2, 2.7.5).
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// An interrupt line that remembers.
pub struct TestInterrupt {
    used: Mutex<Vec<u64>>,
    came: Condvar,
    calls: Vec<EventFd>,
    config: AtomicU64,
    reset: AtomicBool,
}

impl TestInterrupt {
    pub fn new(queues: usize) -> Arc<Self> {
        let call = |_| EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).unwrap();
        Arc::new(Self {
            used: Mutex::new(vec![0; queues]),
            came: Condvar::new(),
            calls: (0..queues).map(call).collect(),
            config: AtomicU64::new(0),
            reset: AtomicBool::new(false),
        })
    }

    pub fn wants_reset(&self) -> bool {
        self.reset.load(Ordering::SeqCst)
    }

    pub fn await_reset(&self) {
        let end = Instant::now() + PATIENCE;
        while !self.wants_reset() {
            assert!(Instant::now() < end, "the device never asked for a reset");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn config_changes(&self) -> u64 {
        self.config.load(Ordering::SeqCst)
    }

    /// Interrupts of queue `index` so far.
    pub fn count(&self, index: u16) -> u64 {
        self.used.lock().unwrap()[usize::from(index)]
    }

    fn wait(&self) {
        let guard = self.used.lock().unwrap();
        let _ = self
            .came
            .wait_timeout(guard, Duration::from_micros(500))
            .unwrap();
    }
}

impl Interrupt for TestInterrupt {
    fn used(&self, index: u16) {
        self.used.lock().unwrap()[usize::from(index)] += 1;
        self.came.notify_all();
    }

    fn config_changed(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }

    fn needs_reset(&self) {
        self.reset.store(true, Ordering::SeqCst);
        self.came.notify_all();
    }

    fn used_fd(&self, index: u16) -> Option<BorrowedFd<'_>> {
        let call = self.calls.get(usize::from(index))?;
        Some(crate::sys::event_fd(call))
    }
}

/// A guest: RAM from address 0, in two regions with a hole between them as on a PC.
pub struct Guest {
    pub memory: Arc<GuestMemoryMmap>,
    pub interrupt: Arc<TestInterrupt>,
    next: u64,
    end: u64,
}

/// First address behind the lower region and first address of the upper one.
pub const HOLE: (u64, u64) = (64 << 20, 80 << 20);
const UPPER: u64 = 16 << 20;

fn memfd(size: u64) -> File {
    // SAFETY: a constant name; the result is checked before it is owned.
    let fd = unsafe { libc::memfd_create(c"guest-ram".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: just made, nobody else has it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(size).unwrap();
    file
}

impl Guest {
    pub fn new(queues: usize) -> Self {
        let file = Arc::new(memfd(HOLE.0 + UPPER));
        let region = |at, size: u64, offset| {
            (
                GuestAddress(at),
                size as usize,
                Some(FileOffset::from_arc(Arc::clone(&file), offset)),
            )
        };
        let memory = GuestMemoryMmap::from_ranges_with_files([
            region(0, HOLE.0, 0),
            region(HOLE.1, UPPER, HOLE.0),
        ]);
        Self {
            memory: Arc::new(memory.unwrap()),
            interrupt: TestInterrupt::new(queues),
            next: 0x1000,
            end: HOLE.0,
        }
    }

    /// Takes RAM that nothing else uses.
    pub fn alloc(&mut self, size: usize, align: u64) -> u64 {
        let gpa = self.next.next_multiple_of(align);
        self.next = gpa + size as u64;
        assert!(self.next <= self.end, "the test's guest has no RAM left");
        gpa
    }

    /// Puts bytes into RAM of their own.
    pub fn place(&mut self, bytes: &[u8]) -> u64 {
        let gpa = self.alloc(bytes.len(), 8);
        self.memory.write_slice(bytes, GuestAddress(gpa)).unwrap();
        gpa
    }

    pub fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(gpa))
            .unwrap();
        bytes
    }

    pub fn queue(&mut self, index: u16, size: u16) -> DriverQueue {
        let desc = self.alloc(16 * usize::from(size), 16);
        let avail = self.alloc(6 + 2 * usize::from(size), 2);
        let used = self.alloc(6 + 8 * usize::from(size), 4);
        DriverQueue {
            memory: Arc::clone(&self.memory),
            interrupt: Arc::clone(&self.interrupt),
            index,
            size,
            desc,
            avail,
            used,
            offered: 0,
            seen: 0,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
            kick: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).unwrap(),
        }
    }

    pub fn activation(&self, queues: &[&DriverQueue], features: u64) -> Activation {
        Activation {
            memory: Arc::clone(&self.memory),
            queues: queues.iter().map(|queue| queue.active()).collect(),
            interrupt: self.interrupt.clone(),
            features,
        }
    }

    pub fn activate(&self, device: &mut dyn VirtioDevice, queues: &[&DriverQueue], features: u64) {
        assert_eq!(
            features & !device.features(),
            0,
            "the driver accepts what was not offered"
        );
        device.activate(self.activation(queues, features)).unwrap();
    }
}

/// One buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Segment {
    pub gpa: u64,
    pub len: u32,
    pub write: bool,
}

pub fn readable(gpa: u64, len: usize) -> Segment {
    Segment {
        gpa,
        len: len as u32,
        write: false,
    }
}

pub fn writable(gpa: u64, len: usize) -> Segment {
    Segment {
        gpa,
        len: len as u32,
        write: true,
    }
}

/// The driver's half of a split virtqueue.
pub struct DriverQueue {
    memory: Arc<GuestMemoryMmap>,
    interrupt: Arc<TestInterrupt>,
    index: u16,
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    offered: u16,
    seen: u16,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
    pub kick: EventFd,
}

impl DriverQueue {
    /// As the transport would hand it to the device.
    pub fn active(&self) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(self.desc))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(self.avail))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(self.used))
            .unwrap();
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        ActiveQueue {
            index: self.index,
            queue,
            kick: self.kick.try_clone().unwrap(),
        }
    }

    /// Writes one descriptor as it is, right or wrong.
    pub fn write_desc(&self, slot: u16, gpa: u64, len: u32, flags: u16, next: u16) {
        self.write_desc_at(self.desc + 16 * u64::from(slot), gpa, len, flags, next);
    }

    /// Writes one descriptor anywhere, for indirect tables.
    pub fn write_desc_at(&self, at: u64, gpa: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&gpa.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Makes a chain available by its head, whatever it is.
    pub fn offer_head(&mut self, head: u16) {
        let slot = u64::from(self.offered % self.size);
        let at = GuestAddress(self.avail + 4 + 2 * slot);
        self.memory.write_obj(head.to_le(), at).unwrap();
        self.offered = self.offered.wrapping_add(1);
        self.set_available_index(self.offered);
    }

    /// Sets the available ring's index to anything.
    pub fn set_available_index(&self, index: u16) {
        let at = GuestAddress(self.avail + 2);
        self.memory
            .store(index.to_le(), at, Ordering::Release)
            .unwrap();
    }

    /// Says from which used index on to interrupt (EVENT_IDX).
    pub fn set_used_event(&self, index: u16) {
        let at = GuestAddress(self.avail + 4 + 2 * u64::from(self.size));
        self.memory
            .store(index.to_le(), at, Ordering::Release)
            .unwrap();
    }

    /// The index from which on the device wants kicks (EVENT_IDX).
    pub fn available_event(&self) -> u16 {
        let at = GuestAddress(self.used + 4 + 8 * u64::from(self.size));
        u16::from_le(self.memory.load(at, Ordering::Acquire).unwrap())
    }

    /// Makes a good chain available and returns its head. The device is not kicked.
    pub fn offer(&mut self, segments: &[Segment]) -> u16 {
        assert!(
            !segments.is_empty() && segments.len() <= self.free.len(),
            "no free descriptors"
        );
        let slots: Vec<u16> = segments.iter().map(|_| self.free.pop().unwrap()).collect();
        for (n, segment) in segments.iter().enumerate() {
            let next = slots.get(n + 1).copied();
            let flags =
                if segment.write { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
            self.write_desc(slots[n], segment.gpa, segment.len, flags, next.unwrap_or(0));
        }
        let head = slots[0];
        self.chains.insert(head, slots);
        self.offer_head(head);
        head
    }

    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// The next used chain, if there is one: its head and the bytes written.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self
            .memory
            .load(GuestAddress(self.used + 2), Ordering::Acquire)
            .unwrap();
        if u16::from_le(index) == self.seen {
            return None;
        }
        let at = GuestAddress(self.used + 4 + 8 * u64::from(self.seen % self.size));
        let id: u32 = self.memory.read_obj(at).unwrap();
        let len: u32 = self.memory.read_obj(at.unchecked_add(4)).unwrap();
        self.seen = self.seen.wrapping_add(1);
        let head = u16::try_from(u32::from_le(id)).unwrap();
        if let Some(slots) = self.chains.remove(&head) {
            self.free.extend(slots);
        }
        Some((head, u32::from_le(len)))
    }

    /// Waits for the next used chain.
    pub fn wait(&mut self) -> (u16, u32) {
        self.wait_for(PATIENCE)
            .expect("the device never used the chain")
    }

    /// Waits some time for the next used chain.
    pub fn wait_for(&mut self, patience: Duration) -> Option<(u16, u32)> {
        let end = Instant::now() + patience;
        loop {
            if let Some(used) = self.used() {
                return Some(used);
            }
            assert!(!self.interrupt.wants_reset(), "the device wants a reset");
            if Instant::now() >= end {
                return None;
            }
            self.interrupt.wait();
        }
    }

    /// Offers one chain, kicks and waits until it is used: the bytes written.
    pub fn request(&mut self, segments: &[Segment]) -> u32 {
        let head = self.offer(segments);
        self.kick();
        let (used, written) = self.wait();
        assert_eq!(used, head);
        written
    }
}
