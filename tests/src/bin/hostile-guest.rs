//! What a guest that is out for harm does to one of its devices, from the guest's own user space:
//!
//! ```text
//! hostile-guest DEVICE SECONDS SEED
//! ```
//!
//! DEVICE is a virtio device by its number (virtio 1.2, section 5). The program takes the device from its
//! driver and goes on as a driver that is broken or malicious: queues anywhere, rings and descriptors full
//! of garbage, requests that are nearly right, registers and PCI configuration written at random. What a
//! device writes by its order goes to pages of its own or to where there is no memory, so that the guest
//! lives to go on. It needs the guest's root, which a privileged container has, and prints what it did.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use rustix::mm::{MapFlags, MlockAllFlags, ProtFlags, mlockall, mmap, mmap_anonymous};

const PAGE: usize = 4096;
/// Pages of our own: what queues are in, tables of indirect descriptors, and the rest for buffers.
const PAGES: usize = 512;
const TABLES: usize = 64;
const BUFFERS: usize = 96;
/// How long the driver may take to let go of the device.
const UNBIND: Duration = Duration::from_secs(5);
const PCI_VENDOR: u16 = 0x1af4;
/// PCI device ids of virtio devices begin here (virtio 1.2, section 4.1.2).
const PCI_DEVICE: u16 = 0x1040;

/// xorshift64*: chance that can be repeated.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, count: u64) -> u64 {
        self.next() % count.max(1)
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    fn of<T: Copy>(&mut self, some: &[T]) -> T {
        some[self.below(some.len() as u64) as usize]
    }

    /// A number as checks forget them: small, round, at an edge, or any.
    fn number(&mut self) -> u64 {
        let near = self.below(9).wrapping_sub(4);
        let bit = 1_u64 << self.below(64);
        match self.below(6) {
            0 => self.below(16),
            1 => bit.wrapping_add(near),
            2 => near,
            3 => u64::from(u32::MAX).wrapping_add(near),
            4 => self.below(1 << 16),
            _ => self.next(),
        }
    }
}

/// Memory that is written as a device's other side: byte by byte by whoever likes.
#[derive(Clone, Copy)]
struct Window {
    base: NonNull<u8>,
    length: usize,
}

impl Window {
    fn write<T: Copy>(&self, offset: usize, value: T) {
        if offset
            .checked_add(size_of::<T>())
            .is_none_or(|end| end > self.length)
            || !offset.is_multiple_of(align_of::<T>())
        {
            return;
        }
        // SAFETY: within the mapping, which lives as long as the program, and aligned; nobody holds a
        // reference to it.
        unsafe { self.base.add(offset).cast::<T>().write_volatile(value) }
    }

    fn read<T: Copy + Default>(&self, offset: usize) -> T {
        if offset
            .checked_add(size_of::<T>())
            .is_none_or(|end| end > self.length)
            || !offset.is_multiple_of(align_of::<T>())
        {
            return T::default();
        }
        // SAFETY: as in `write`; every value of the integers that this is used with is a value.
        unsafe { self.base.add(offset).cast::<T>().read_volatile() }
    }
}

/// Our own pages, whose places in the guest's memory are known.
struct Arena {
    window: Window,
    /// Guest-physical address of each page.
    pages: Vec<u64>,
    /// Guest-physical addresses, first and last, of the guest's memory.
    memory: Vec<(u64, u64)>,
}

/// What /proc/iomem calls "System RAM".
fn memory() -> std::io::Result<Vec<(u64, u64)>> {
    let hex = |text: &str| u64::from_str_radix(text.trim(), 16).ok();
    let all = fs::read_to_string("/proc/iomem")?;
    let ranges = all.lines().filter_map(|line| {
        let (range, _) = line.split_once(" : System RAM")?;
        let (first, last) = range.split_once('-')?;
        Some((hex(first)?, hex(last)?))
    });
    Ok(ranges.collect())
}

impl Arena {
    fn new() -> std::io::Result<Self> {
        let length = PAGES * PAGE;
        let flags = MapFlags::PRIVATE | MapFlags::POPULATE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
            )?
        };
        let base = NonNull::new(base.cast::<u8>()).ok_or(std::io::ErrorKind::OutOfMemory)?;
        let window = Window { base, length };
        let mut map = File::open("/proc/self/pagemap")?;
        let mut pages = Vec::new();
        for index in 0..PAGES {
            window.write(index * PAGE, 1_u8);
            let page = (base.as_ptr() as usize + index * PAGE) / PAGE;
            map.seek(SeekFrom::Start(page as u64 * 8))?;
            let mut entry = [0; 8];
            map.read_exact(&mut entry)?;
            // Documentation/admin-guide/mm/pagemap.rst: bits 0 to 54 are the frame's number.
            let frame = u64::from_le_bytes(entry) & ((1 << 55) - 1);
            if frame == 0 {
                return Err(std::io::Error::other(
                    "no CAP_SYS_ADMIN: the pages' places are hidden",
                ));
            }
            pages.push(frame * PAGE as u64);
        }
        let memory = memory()?;
        Ok(Self {
            window,
            pages,
            memory,
        })
    }

    /// A guest-physical address where there is no memory.
    fn nowhere(&self, chance: &mut Chance) -> u64 {
        loop {
            // PCI's window, the local APIC, the I/O APIC, the end of all, and any.
            let places = [
                0xc000_0000,
                0xfee0_0000,
                0xfec0_0000,
                u64::MAX - 4095,
                1 << 40,
            ];
            let address = if chance.one_in(2) {
                chance.of(&places)
            } else {
                chance.number()
            };
            // None of it, also a page further on.
            let end = address.saturating_add(PAGE as u64);
            if !self
                .memory
                .iter()
                .any(|(first, last)| address <= *last && end >= *first)
            {
                return address;
            }
        }
    }

    /// One of the pages for buffers.
    fn buffer(chance: &mut Chance) -> usize {
        BUFFERS + chance.below((PAGES - BUFFERS) as u64) as usize
    }

    /// A descriptor: of a buffer, of nothing, or of a table of such.
    fn describe(&self, at: usize, size: u16, number: u16, direct: bool, chance: &mut Chance) {
        let flags = match chance.below(8) {
            // All bits but WRITE and INDIRECT, which follow.
            0 => chance.next() as u16 & !6,
            _ => chance.of(&[0, 1, 1]),
        };
        let flags = flags | chance.of(&[0, 2]);
        let mut entry = (self.nowhere(chance), chance.number() as u32, flags);
        if direct && chance.one_in(8) {
            let table = TABLES + chance.below((BUFFERS - TABLES) as u64) as usize;
            entry = (self.pages[table], chance.of(&[16, 64, 4096, 17, 0]), 4);
        } else if !chance.one_in(10) {
            let within = if chance.one_in(4) {
                chance.below(64)
            } else {
                0
            };
            let length = match chance.below(8) {
                // More than all memory, which has to be refused as a whole.
                0 => chance.of(&[u32::MAX, 1 << 30]),
                1 => 0,
                _ => chance.of(&[1, 10, 12, 16, 40, 44, 64, 512, 4032]),
            };
            entry = (self.pages[Self::buffer(chance)] + within, length, flags);
        }
        let next = if chance.one_in(10) {
            chance.next() as u16
        } else {
            (number + 1) % size
        };
        self.window.write(at, entry.0);
        self.window.write(at + 8, entry.1);
        self.window.write(at + 12, entry.2);
        self.window.write(at + 14, next);
    }
}

/// A part of a device's registers, by its virtio capability (virtio 1.2, section 4.1.4).
#[derive(Clone, Copy)]
struct Region {
    window: Window,
    offset: usize,
    length: usize,
}

impl Region {
    fn write<T: Copy>(&self, offset: usize, value: T) {
        self.window.write(self.offset + offset, value);
    }

    fn read<T: Copy + Default>(&self, offset: usize) -> T {
        self.window.read(self.offset + offset)
    }
}

struct Device {
    config: File,
    bars: Vec<Window>,
    common: Region,
    notify: Region,
    notify_multiplier: usize,
    isr: Region,
    specific: Option<Region>,
}

fn number_in(path: &Path) -> Option<u16> {
    let text = fs::read_to_string(path).ok()?;
    u16::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
}

/// The folders of all devices of a kind.
fn find(kind: u16) -> Vec<PathBuf> {
    let all = fs::read_dir("/sys/bus/pci/devices")
        .into_iter()
        .flatten()
        .flatten();
    let mut found: Vec<_> = all
        .map(|entry| entry.path())
        .filter(|folder| {
            number_in(&folder.join("vendor")) == Some(PCI_VENDOR)
                && number_in(&folder.join("device")) == Some(PCI_DEVICE + kind)
        })
        .collect();
    found.sort();
    found
}

/// Takes the device from its driver, unless that clings to it: then both have it.
fn unbind(folder: &Path) -> bool {
    let (driver, name) = (
        folder.join("driver/unbind"),
        folder.file_name().map(|n| n.to_owned()),
    );
    let Some(name) = name else { return false };
    let (done, wait) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let written = fs::write(driver, name.as_encoded_bytes());
        let _ = done.send(written.is_ok());
    });
    wait.recv_timeout(UNBIND).unwrap_or(false)
}

impl Device {
    fn open(folder: &Path) -> std::io::Result<Self> {
        let config = File::options()
            .read(true)
            .write(true)
            .open(folder.join("config"))?;
        // Memory space and bus master.
        config.write_all_at(&6_u16.to_le_bytes(), 4)?;
        let mut space = [0; 256];
        config.read_exact_at(&mut space, 0)?;
        let mut bars = Vec::new();
        let mut bar_of = [None; 6];
        for (number, bar) in bar_of.iter_mut().enumerate() {
            let Ok(file) = File::options()
                .read(true)
                .write(true)
                .open(folder.join(format!("resource{number}")))
            else {
                continue;
            };
            let length = file.metadata()?.len() as usize;
            if length == 0 {
                continue;
            }
            // SAFETY: a new mapping of a device's registers at an address of the kernel's choice.
            let mapped = unsafe {
                mmap(
                    std::ptr::null_mut(),
                    length,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::SHARED,
                    &file,
                    0,
                )
            };
            // Of a shared memory region (virtio-fs DAX, pmem) not all can be mapped.
            let Ok(base) = mapped else { continue };
            let base =
                NonNull::new(base.cast::<u8>()).ok_or(std::io::ErrorKind::AddrNotAvailable)?;
            let window = Window { base, length };
            bars.push(window);
            *bar = Some(window);
        }
        let byte = |at: usize| usize::from(space.get(at).copied().unwrap_or(0));
        let word = |at: usize| (0..4).map(|i| byte(at + i) << (8 * i)).sum::<usize>();
        let mut regions = [None; 6];
        let mut notify_multiplier = 0;
        let (mut at, mut steps) = (byte(0x34), 0);
        while at != 0 && steps < 48 {
            if byte(at) == 9 {
                let (kind, bar) = (byte(at + 3), byte(at + 4));
                if let (Some(region), Some(Some(window))) = (regions.get_mut(kind), bar_of.get(bar))
                {
                    *region = Some(Region {
                        window: *window,
                        offset: word(at + 8),
                        length: word(at + 12),
                    });
                }
                if kind == 2 {
                    notify_multiplier = word(at + 16);
                }
            }
            (at, steps) = (byte(at + 1), steps + 1);
        }
        let need = |kind: usize| {
            regions[kind].ok_or_else(|| std::io::Error::other(format!("no capability {kind}")))
        };
        Ok(Self {
            config,
            bars,
            common: need(1)?,
            notify: need(2)?,
            notify_multiplier,
            isr: need(3)?,
            specific: regions[4],
        })
    }
}

/// Where a queue was put that a device has been told of.
#[derive(Clone, Copy, Default)]
struct Queue {
    descriptors: usize,
    available: usize,
    used: usize,
    size: u16,
}

#[derive(Default)]
struct Counts {
    actions: u64,
    starts: u64,
    notified: u64,
    completed: u64,
}

/// One device under attack.
struct Attack {
    device: Device,
    arena: Arena,
    chance: Chance,
    kind: u16,
    queues: Vec<Queue>,
    counts: Counts,
}

/// Registers of the common configuration (virtio 1.2, section 4.1.4.3).
mod register {
    pub const DEVICE_FEATURE_SELECT: usize = 0;
    pub const DEVICE_FEATURE: usize = 4;
    pub const DRIVER_FEATURE_SELECT: usize = 8;
    pub const DRIVER_FEATURE: usize = 12;
    pub const CONFIG_VECTOR: usize = 16;
    pub const NUM_QUEUES: usize = 18;
    pub const STATUS: usize = 20;
    pub const QUEUE_SELECT: usize = 22;
    pub const QUEUE_SIZE: usize = 24;
    pub const QUEUE_VECTOR: usize = 26;
    pub const QUEUE_ENABLE: usize = 28;
    pub const QUEUE_NOTIFY_OFFSET: usize = 30;
    pub const QUEUE_DESCRIPTORS: usize = 32;
    pub const QUEUE_DRIVER: usize = 40;
    pub const QUEUE_DEVICE: usize = 48;
    pub const END: u64 = 64;
}

impl Attack {
    /// Resets the device and sets it up, as the specification has it or nearly so.
    fn start(&mut self) {
        let common = self.device.common;
        let chance = &mut self.chance;
        common.write(register::STATUS, 0_u8);
        for status in [1_u8, 3] {
            common.write(register::STATUS, status);
        }
        for select in 0..2_u32 {
            common.write(register::DEVICE_FEATURE_SELECT, select);
            let offered: u32 = common.read(register::DEVICE_FEATURE);
            let taken = match chance.below(8) {
                0 => chance.next() as u32,
                1 => offered & chance.next() as u32 | select,
                _ => offered,
            };
            common.write(register::DRIVER_FEATURE_SELECT, select);
            common.write(register::DRIVER_FEATURE, taken);
        }
        common.write(register::STATUS, 11_u8);
        common.write(register::CONFIG_VECTOR, chance.next() as u16);
        let count: u16 = common.read(register::NUM_QUEUES);
        self.queues.clear();
        for index in 0..count.min(16) {
            common.write(register::QUEUE_SELECT, index);
            let most: u16 = common.read(register::QUEUE_SIZE);
            let size = match chance.below(10) {
                0 => chance.number() as u16,
                1 => most.wrapping_mul(2),
                2 => 1,
                _ => chance.of(&[most, 8, 64]).min(most.max(1)),
            };
            let page = |chance: &mut Chance| chance.below(TABLES as u64 - 8) as usize;
            let queue = Queue {
                descriptors: page(chance) * PAGE,
                available: page(chance) * PAGE,
                used: page(chance) * PAGE,
                size: size.clamp(1, 256),
            };
            let mut place = |offset: usize| match chance.below(16) {
                0 => self.arena.nowhere(chance),
                1 => self.arena.pages[offset / PAGE] + chance.below(16),
                _ => self.arena.pages[offset / PAGE],
            };
            let places = [
                (register::QUEUE_DESCRIPTORS, place(queue.descriptors)),
                (register::QUEUE_DRIVER, place(queue.available)),
                (register::QUEUE_DEVICE, place(queue.used)),
            ];
            common.write(register::QUEUE_SIZE, size);
            for (at, address) in places {
                common.write(at, address as u32);
                common.write(at + 4, (address >> 32) as u32);
            }
            common.write(register::QUEUE_VECTOR, chance.of(&[0xffff, index, 0x800]));
            if !chance.one_in(12) {
                common.write(register::QUEUE_ENABLE, 1_u16);
            }
            self.arena.window.write(queue.available, 0_u32);
            self.queues.push(queue);
        }
        common.write(
            register::STATUS,
            if self.chance.one_in(16) { 0xff_u8 } else { 15 },
        );
        self.counts.starts += 1;
    }

    /// Bytes that are nearly a request of this device's.
    fn request(&mut self, at: usize) {
        let chance = &mut self.chance;
        let window = self.arena.window;
        for offset in (0..128).step_by(8) {
            window.write(
                at + offset,
                if chance.one_in(3) { chance.number() } else { 0 },
            );
        }
        match self.kind {
            // virtio-net: flags, type of segmentation, header's length, size, checksum's place.
            1 => {
                window.write(at, chance.of(&[0_u8, 1, 2, 0xff]));
                window.write(at + 1, chance.of(&[0_u8, 1, 3, 4, 5, 0x81, 0xff]));
                window.write(at + 2, chance.number() as u16);
                window.write(at + 4, chance.number() as u16);
                window.write(at + 6, chance.number() as u16);
                window.write(at + 8, chance.number() as u16);
            }
            // virtio-blk: type, sector.
            2 => {
                window.write(at, chance.of(&[0_u32, 1, 4, 8, 11, 13, 14, u32::MAX]));
                window.write(at + 8, chance.number());
            }
            // virtio-vsock: both ids and ports, length, type, operation, flags, credit.
            19 => {
                window.write(at, chance.of(&[3_u64, 2, 1, 0, u64::MAX]));
                window.write(at + 8, chance.of(&[2_u64, 2, 2, 3, 0, u64::MAX]));
                window.write(at + 16, chance.of(&[1024_u32, 1025, 1026, 5000]));
                window.write(at + 20, chance.of(&[1024_u32, 1025, 1026, 5000]));
                window.write(at + 24, chance.of(&[0_u32, 1, 4096, 65536, u32::MAX]));
                window.write(at + 28, chance.of(&[1_u16, 1, 2, 0xffff]));
                window.write(at + 30, chance.below(9) as u16);
                window.write(at + 32, chance.below(8) as u32);
                window.write(at + 36, chance.number() as u32);
                window.write(at + 40, chance.number() as u32);
            }
            // virtio-mem: type, address, blocks.
            24 => {
                window.write(at, chance.below(6) as u16);
                window.write(at + 8, chance.of(&[0x1_0000_0000_u64, 0, !0x1f_ffff]));
                window.write(at + 16, chance.number() as u16);
            }
            // virtio-fs: the header of FUSE, and what its calls begin with.
            26 => {
                window.write(at, chance.of(&[40_u32, 48, 56, 64, 4096, 0, u32::MAX]));
                window.write(at + 4, chance.below(55) as u32);
                window.write(at + 16, chance.of(&[1_u64, 1, 2, 3, u64::MAX]));
            }
            _ => {}
        }
    }

    /// Fills a table of descriptors, puts some of them on offer, and tells the device.
    fn offer(&mut self) {
        if self.queues.is_empty() {
            return;
        }
        let index = self.chance.below(self.queues.len() as u64) as usize;
        let queue = self.queues[index];
        let window = self.arena.window;
        for number in 0..queue.size {
            let at = queue.descriptors + usize::from(number) * 16;
            self.arena
                .describe(at, queue.size, number, true, &mut self.chance);
        }
        for table in TABLES..BUFFERS {
            let number = self.chance.below(256) as u16;
            let at = table * PAGE + usize::from(number) * 16;
            self.arena
                .describe(at, 256, number, false, &mut self.chance);
        }
        for _ in 0..8 {
            let page = Arena::buffer(&mut self.chance);
            self.request(page * PAGE);
        }
        let chance = &mut self.chance;
        for slot in 0..queue.size {
            let head = if chance.one_in(12) {
                chance.next() as u16
            } else {
                chance.below(queue.size.into()) as u16
            };
            window.write(queue.available + 4 + usize::from(slot) * 2, head);
        }
        let index_at = queue.available + 2;
        let more = if chance.one_in(10) {
            chance.next() as u16
        } else {
            chance.below(u64::from(queue.size) + 1) as u16
        };
        let before: u16 = window.read(queue.used + 2);
        window.write(index_at, window.read::<u16>(index_at).wrapping_add(more));
        self.notify(index as u16);
        let after: u16 = window.read(queue.used + 2);
        self.counts.completed += u64::from(after.wrapping_sub(before).min(queue.size));
    }

    fn notify(&mut self, queue: u16) {
        let common = self.device.common;
        common.write(register::QUEUE_SELECT, queue);
        let place: u16 = common.read(register::QUEUE_NOTIFY_OFFSET);
        let offset = usize::from(place) * self.device.notify_multiplier;
        self.device.notify.write(offset, queue);
        self.counts.notified += 1;
    }

    /// One thing, by chance.
    fn act(&mut self) {
        self.counts.actions += 1;
        let (common, notify) = (self.device.common, self.device.notify);
        match self.chance.below(100) {
            0..4 => self.start(),
            4..80 => self.offer(),
            80..84 => {
                let at = self.chance.below(register::END) as usize;
                common.write(at, self.chance.number() as u16);
            }
            84..88 => {
                // Also queues that there are not.
                let at = self.chance.below(notify.length as u64) as usize & !1;
                notify.write(at, self.chance.number() as u16);
            }
            88..91 => {
                if let Some(specific) = self.device.specific {
                    let at = self.chance.below(specific.length as u64) as usize;
                    specific.write(at, self.chance.number() as u8);
                    let _: u32 = specific.read(at & !3);
                }
            }
            91..93 => {
                let isr = self.device.isr;
                isr.write(0, self.chance.next() as u8);
                let _: u8 = isr.read(0);
            }
            93..96 => {
                // Anything in the registers, MSI-X's table and pending bits among it.
                let bar = self.chance.of(&self.device.bars);
                let most = bar.length.min(64 << 10) as u64;
                bar.write(
                    self.chance.below(most) as usize & !3,
                    self.chance.number() as u32,
                );
            }
            96..98 => {
                // Past the header, so that the registers stay where they are mapped.
                let at = 0x40 + self.chance.below(0xc0);
                let _ = self
                    .device
                    .config
                    .write_all_at(&[self.chance.next() as u8], at);
            }
            98 => {
                // The header, put right at once.
                let mut header = [0; 64];
                if self.device.config.read_exact_at(&mut header, 0).is_ok() {
                    let at = self.chance.below(64);
                    let _ = self
                        .device
                        .config
                        .write_all_at(&[self.chance.next() as u8], at);
                    let _ = self.device.config.write_all_at(&header, 0);
                }
            }
            _ => {
                // The index far ahead, and a device that is told of all queues at once.
                for queue in self.queues.clone() {
                    self.arena
                        .window
                        .write(queue.available + 2, self.chance.next() as u16);
                }
                for index in 0..self.queues.len() {
                    self.notify(index as u16);
                }
            }
        }
    }
}

/// Says something, if there is still a way to.
fn tell(what: &str) {
    let mut out = std::io::stdout();
    let _ = writeln!(out, "{what}").and_then(|()| out.flush());
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let [kind, seconds, seed] = &words[..] else {
        return Err("usage: hostile-guest DEVICE SECONDS SEED".into());
    };
    let (kind, seconds, seed): (u16, u64, u64) = (kind.parse()?, seconds.parse()?, seed.parse()?);
    // The file that this program is in may be behind the device.
    mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE)?;
    let folders = find(kind);
    let folder = folders.first().ok_or("the guest has no such device")?;
    // Before the device is gone by which this is told.
    tell(&format!("{}: attacked", folder.display()));
    let taken = unbind(folder);
    let device = Device::open(folder)?;
    if !taken {
        tell("its driver has it, too");
    }
    let mut attack = Attack {
        device,
        arena: Arena::new()?,
        chance: Chance(seed | 1),
        kind,
        queues: Vec::new(),
        counts: Counts::default(),
    };
    let end = Instant::now() + Duration::from_secs(seconds);
    attack.start();
    while Instant::now() < end {
        for _ in 0..64 {
            attack.act();
        }
        // A device that has given up is begun anew.
        attack.start();
    }
    let Counts {
        actions,
        starts,
        notified,
        completed,
    } = attack.counts;
    tell(&format!(
        "{actions} actions, {starts} starts, {notified} notifications, {completed} completions"
    ));
    Ok(())
}
