//! The guest's memory: pages that the attack has to itself, and addresses where there is none.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

use crate::chance::Chance;

pub const PAGE: usize = 4096;
/// Pages of our own: what queues are in, tables of indirect descriptors, and the rest for buffers.
pub const PAGES: usize = 512;
pub const TABLES: usize = 64;
pub const BUFFERS: usize = 96;

/// Memory that is written as a device's other side: byte by byte by whoever likes.
#[derive(Clone, Copy)]
pub struct Window {
    pub base: NonNull<u8>,
    pub length: usize,
}

impl Window {
    pub fn write<T: Copy>(&self, offset: usize, value: T) {
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

    pub fn read<T: Copy + Default>(&self, offset: usize) -> T {
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
pub struct Arena {
    pub window: Window,
    /// Guest-physical address of each page.
    pub pages: Vec<u64>,
    /// Guest-physical addresses, first and last, of the guest's memory.
    pub memory: Vec<(u64, u64)>,
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
    pub fn new() -> std::io::Result<Self> {
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
    pub fn nowhere(&self, chance: &mut Chance) -> u64 {
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
    pub fn buffer(chance: &mut Chance) -> usize {
        BUFFERS + chance.below((PAGES - BUFFERS) as u64) as usize
    }

    /// A descriptor: of a buffer, of nothing, or of a table of such.
    pub fn describe(&self, at: usize, size: u16, number: u16, direct: bool, chance: &mut Chance) {
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
