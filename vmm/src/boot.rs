//! Puts a kernel into guest RAM and says where it starts (Linux, Documentation/arch/x86/boot.rst,
//! "64-bit boot protocol"; the `struct boot_params` of zero-page.rst).
//!
//! ```text
//! 0x00500  global descriptor table         0x20000  command line
//! 0x07000  zero page                       0xe0000  ACPI tables (see `acpi`)
//! 0x09000  page tables: 1 GiB, identity    1 MiB..  the kernel, where its ELF headers say
//! ```
//! The initrd lies at the end of RAM below 4 GiB. The vCPU starts in 64-bit mode at the kernel's
//! entry, because a deprivileged KVM interprets all other modes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvm_bindings::{kvm_segment, kvm_sregs};
use sepal_protocol::image::{self, Image};
use sepal_protocol::vm::KvmFlavour;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::memory::{ECAM_SIZE, ECAM_START, FilePages, Layout, MIB, Target};

const GDT: u64 = 0x500;
const ZERO_PAGE: u64 = 0x7000;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORY: u64 = 0xb000;
const COMMAND_LINE: u64 = 0x20000;
/// COMMAND_LINE_SIZE of x86: the kernel cuts off what is longer.
pub const COMMAND_LINE_MAX: usize = 2048;
/// Where low RAM ends for the kernel: the rest up to 1 MiB was the firmware's.
const LOW_END: u64 = 0xa0000;
/// Guest RAM from here on is the kernel's.
const KERNEL_MIN: u64 = MIB;
const PAGE: u64 = 4096;

/// What the kernel must find, why it cannot.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// open(2) failed.
    #[error(
        "cannot open the guest {what} {}: {reason}; install it or correct its path in the \
         configuration", path.display()
    )]
    Open {
        /// kernel, initrd or image.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// The system's answer.
        reason: io::Error,
    },
    /// Not an ELF for x86-64.
    #[error(
        "{} is not a guest kernel: {why}; Sepal boots the uncompressed ELF file vmlinux",
        path.display()
    )]
    NotAKernel {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        why: &'static str,
    },
    /// Shorter than its headers say.
    #[error(
        "the guest kernel {} is truncated: it has {length} bytes, its headers speak of {needed}; \
         install it again", path.display()
    )]
    Truncated {
        /// Which.
        path: PathBuf,
        /// Its length.
        length: u64,
        /// What it should be at least.
        needed: u64,
    },
    /// A kernel that runs on hardware virtualization only.
    #[error(
        "the guest kernel {} is not made for the KVM of this host, which runs guests \
         deprivileged; set `kernel_deprivileged` to one that is", path.display()
    )]
    OtherFlavour {
        /// Which.
        path: PathBuf,
    },
    /// No guest image, or not a whole one.
    #[error("the guest image {}: {why}; install it again", path.display())]
    Image {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        why: image::Error,
    },
    /// RAM is too small.
    #[error(
        "the guest's {ram} MiB of memory do not hold the {what} {} ({needed} MiB); raise the \
         pod's memory limit", path.display()
    )]
    NoRoom {
        /// kernel or initrd.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Guest RAM in MiB.
        ram: u64,
        /// MiB needed.
        needed: u64,
    },
    /// Reading it failed.
    #[error("cannot read the guest {what} {}: {reason}", path.display())]
    Read {
        /// kernel or initrd.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// The cause.
        reason: io::Error,
    },
    /// The command line.
    #[error("the kernel command line has {length} bytes; at most {COMMAND_LINE_MAX} are possible")]
    CommandLine {
        /// Its length.
        length: usize,
    },
    /// Guest RAM does not reach where it must.
    #[error("boot data do not fit into guest memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Opens a file the guest needs.
///
/// # Errors
/// [`Error::Open`].
pub fn open(what: &'static str, path: &Path) -> Result<File, Error> {
    let opened = File::open(path).and_then(|file| match file.metadata()?.is_dir() {
        true => Err(io::Error::from(io::ErrorKind::IsADirectory)),
        false => Ok(file),
    });
    opened.map_err(|reason| Error::Open {
        what,
        path: path.into(),
        reason,
    })
}

/// A file that is open, and its name for messages: it is read when the way to it may be gone.
pub struct Source {
    what: &'static str,
    path: PathBuf,
    file: File,
}

impl Source {
    /// A kernel.
    ///
    /// # Errors
    /// It is not there, or a directory.
    pub fn kernel(path: &Path) -> Result<Self, Error> {
        Self::open("kernel", path)
    }

    /// An initrd.
    ///
    /// # Errors
    /// It is not there, or a directory.
    pub fn initrd(path: &Path) -> Result<Self, Error> {
        Self::open("initrd", path)
    }

    fn open(what: &'static str, path: &Path) -> Result<Self, Error> {
        Ok(Self {
            what,
            path: path.into(),
            file: open(what, path)?,
        })
    }
}

/// A part of the kernel file that goes to RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    offset: u64,
    file_size: u64,
    gpa: u64,
    memory_size: u64,
    writable: bool,
}

impl Segment {
    /// How many of its bytes are whole pages that can be mapped from the file.
    fn shareable(&self) -> u64 {
        let aligned = self.offset.is_multiple_of(PAGE) && self.gpa.is_multiple_of(PAGE);
        if self.writable || !aligned {
            return 0;
        }
        self.file_size & !(PAGE - 1)
    }
}

/// A kernel in guest RAM, but for the pages that it shares.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// Its first instruction.
    pub entry: u64,
    /// The first byte behind it.
    pub end: u64,
    /// It can do without hardware virtualization.
    pub deprivileged: bool,
    /// Code and constants, most of the kernel: all pods have one copy of what the guest does not
    /// patch, in the host's page cache.
    pub shared: Option<FilePages>,
}

impl Kernel {
    /// Checks that this KVM can run it.
    ///
    /// # Errors
    /// [`Error::OtherFlavour`].
    pub fn check_flavour(self, path: &Path, flavour: KvmFlavour) -> Result<Self, Error> {
        // The other way round all is well: the patched kernel finds out where it runs.
        if flavour == KvmFlavour::Deprivileged && !self.deprivileged {
            return Err(Error::OtherFlavour { path: path.into() });
        }
        Ok(self)
    }

    /// Checks that RAM holds it.
    ///
    /// # Errors
    /// [`Error::NoRoom`].
    pub fn check(self, path: &Path, layout: &Layout) -> Result<Self, Error> {
        if self.end > layout.low {
            return Err(Error::NoRoom {
                what: "kernel",
                path: path.into(),
                ram: layout.low / MIB,
                needed: self.end.div_ceil(MIB),
            });
        }
        Ok(self)
    }
}

/// Copies the kernel `source` to where its ELF program headers say (System V ABI, "Program Header"),
/// at most up to the end of `layout`'s RAM below 4 GiB; that may be larger than the RAM will be. If
/// `share`, the largest segment that is not written to is left to be mapped.
///
/// # Errors
/// Not a kernel, truncated, or RAM too small.
pub fn load_kernel(
    source: Source,
    target: Target<'_>,
    layout: &Layout,
    share: bool,
) -> Result<Kernel, Error> {
    let Source {
        what,
        path,
        mut file,
    } = source;
    let (entry, segments, deprivileged) = read_elf(&mut file, &path)?;
    // read_elf has checked that these sums do not overflow.
    let ends = segments
        .iter()
        .map(|segment| segment.gpa + segment.memory_size);
    let kernel = Kernel {
        entry,
        end: ends.max().unwrap_or(0),
        deprivileged,
        shared: None,
    };
    let mut kernel = kernel.check(&path, layout)?;
    let largest = segments.iter().max_by_key(|segment| segment.shareable());
    let largest = largest
        .filter(|segment| share && segment.shareable() > 0)
        .copied();
    for segment in &segments {
        let skip = match largest {
            Some(largest) if largest == *segment => segment.shareable(),
            _ => 0,
        };
        let (offset, gpa) = (segment.offset + skip, segment.gpa + skip);
        target
            .fill(&mut file, offset, segment.file_size - skip, gpa)
            .map_err(|reason| Error::Read {
                what,
                path: path.clone(),
                reason,
            })?;
    }
    kernel.shared = largest.map(|segment| FilePages {
        offset: segment.offset,
        size: segment.shareable(),
        gpa: segment.gpa,
        file: Arc::new(file),
    });
    Ok(kernel)
}

/// Opens the guest image and checks that it is whole: a guest that finds it is not can only panic.
///
/// # Errors
/// There is none, it is another file, or truncated.
pub fn open_image(path: &Path) -> Result<File, Error> {
    let file = open("image", path)?;
    match Image::of(&file) {
        Ok(_) => Ok(file),
        Err(why) => Err(Error::Image {
            path: path.into(),
            why,
        }),
    }
}

/// Looks in a PT_NOTE segment for the mark that kernel-config's patches leave in a kernel which can
/// do without hardware virtualization: name "Sepal", type 1 (System V ABI, "Note Section").
fn has_mark(file: &File, offset: u64, size: u64) -> bool {
    const NAME: &[u8] = b"Sepal\0";
    const MOST: u64 = 64 << 10;
    let mut notes = vec![0; size.min(MOST) as usize];
    if file.read_exact_at(&mut notes, offset).is_err() {
        return false;
    }
    let mut rest = notes.as_slice();
    while let Some((header, after)) = rest.split_at_checked(12) {
        let [name_size, size] = [u32_at(header, 0), u32_at(header, 4)].map(|size| size as usize);
        let padded = name_size.next_multiple_of(4);
        let (Some(name), Some(next)) = (
            after.get(..name_size),
            padded.checked_add(size.next_multiple_of(4)),
        ) else {
            return false;
        };
        if name == NAME && u32_at(header, 8) == 1 {
            return true;
        }
        rest = after.get(next..).unwrap_or_default();
    }
    false
}

/// The entry and the PT_LOAD segments, all of them checked against the file and each other; and
/// whether the kernel can do without hardware virtualization.
fn read_elf(file: &mut File, path: &Path) -> Result<(u64, Vec<Segment>, bool), Error> {
    let not_a_kernel = |why| Error::NotAKernel {
        path: path.into(),
        why,
    };
    let length = file.metadata().map(|m| m.len()).unwrap_or(0);
    let truncated = |needed| {
        if needed > length {
            Err(Error::Truncated {
                path: path.into(),
                length,
                needed,
            })
        } else {
            Ok(())
        }
    };

    let mut header = [0_u8; 64];
    let got = file.read_at(&mut header, 0).unwrap_or(0);
    if got < 4 || header[..4] != *b"\x7fELF" {
        return Err(not_a_kernel("it is not an ELF file"));
    }
    truncated(64)?;
    // EI_CLASS 64-bit, EI_DATA little-endian, e_type executable, e_machine x86-64.
    if header[4] != 2 || header[5] != 1 || u16_at(&header, 16) != 2 || u16_at(&header, 18) != 62 {
        return Err(not_a_kernel("it is not an x86-64 executable"));
    }
    let entry = u64_at(&header, 24);
    let table = u64_at(&header, 32);
    let (entry_size, count) = (u16_at(&header, 54), u16_at(&header, 56));
    if entry_size != 56 || count == 0 {
        return Err(not_a_kernel("it has no program headers"));
    }
    let bytes = usize::from(count) * 56;
    let end = table
        .checked_add(bytes as u64)
        .ok_or(not_a_kernel("its headers make no sense"))?;
    truncated(end)?;
    let mut headers = vec![0_u8; bytes];
    file.read_exact_at(&mut headers, table)
        .map_err(|_| not_a_kernel("its program headers cannot be read"))?;

    let mut segments = Vec::new();
    let mut deprivileged = false;
    for header in headers.chunks_exact(56) {
        const PT_LOAD: u32 = 1;
        const PT_NOTE: u32 = 4;
        const PF_W: u32 = 2;
        if u32_at(header, 0) == PT_NOTE {
            deprivileged |= has_mark(file, u64_at(header, 8), u64_at(header, 32));
        }
        if u32_at(header, 0) != PT_LOAD {
            continue;
        }
        let segment = Segment {
            offset: u64_at(header, 8),
            gpa: u64_at(header, 24),
            file_size: u64_at(header, 32),
            memory_size: u64_at(header, 40),
            writable: u32_at(header, 4) & PF_W != 0,
        };
        let file_end = segment.offset.checked_add(segment.file_size);
        let memory_end = segment.gpa.checked_add(segment.memory_size);
        let (Some(file_end), Some(_)) = (file_end, memory_end) else {
            return Err(not_a_kernel("a segment of it makes no sense"));
        };
        if segment.file_size > segment.memory_size || segment.gpa < KERNEL_MIN {
            return Err(not_a_kernel(
                "a segment of it does not belong into guest memory",
            ));
        }
        truncated(file_end)?;
        segments.push(segment);
    }
    let inside = |s: &Segment| (s.gpa..s.gpa + s.file_size).contains(&entry);
    if !segments.iter().any(inside) {
        return Err(not_a_kernel("its entry lies outside of it"));
    }
    Ok((entry, segments, deprivileged))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// Puts an initrd at the end of low RAM; returns its address and size.
///
/// # Errors
/// RAM too small, or the file cannot be read.
pub fn load_initrd(
    source: Source,
    target: Target<'_>,
    layout: &Layout,
    kernel: &Kernel,
) -> Result<(u64, u64), Error> {
    let Source {
        what,
        path,
        mut file,
    } = source;
    let size = file.metadata().map(|m| m.len()).unwrap_or(0);
    let no_room = || Error::NoRoom {
        what,
        path: path.clone(),
        ram: layout.low / MIB,
        needed: size.div_ceil(MIB),
    };
    let start = layout.low.checked_sub(size).ok_or_else(no_room)? & !(PAGE - 1);
    if start < kernel.end {
        return Err(no_room());
    }
    target
        .fill(&mut file, 0, size, start)
        .map_err(|reason| Error::Read {
            what,
            path: path.clone(),
            reason,
        })?;
    Ok((start, size))
}

/// Where and how the boot CPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The kernel's first instruction.
    pub rip: u64,
    /// The zero page, for RSI.
    pub zero_page: u64,
}

/// Writes the zero page, the command line, page tables and the descriptor table.
///
/// # Errors
/// A command line that is too long; RAM that is too small.
pub fn write_boot_data(
    memory: &GuestMemoryMmap,
    layout: &Layout,
    kernel: &Kernel,
    initrd: Option<(u64, u64)>,
    command_line: &str,
    rsdp: u64,
) -> Result<Entry, Error> {
    if command_line.len() >= COMMAND_LINE_MAX || command_line.bytes().any(|b| b == 0) {
        return Err(Error::CommandLine {
            length: command_line.len(),
        });
    }
    memory.write_slice(command_line.as_bytes(), GuestAddress(COMMAND_LINE))?;
    memory.write_obj(0_u8, GuestAddress(COMMAND_LINE + command_line.len() as u64))?;
    memory.write_slice(
        &zero_page(layout, initrd, command_line, rsdp),
        GuestAddress(ZERO_PAGE),
    )?;
    for (index, descriptor) in GDT_ENTRIES.iter().enumerate() {
        memory.write_obj(*descriptor, GuestAddress(GDT + 8 * index as u64))?;
    }
    // Present and writable; in the page directory also "2 MiB page".
    memory.write_obj(PDPT | 0x3, GuestAddress(PML4))?;
    memory.write_obj(PAGE_DIRECTORY | 0x3, GuestAddress(PDPT))?;
    for page in 0..512_u64 {
        memory.write_obj(page << 21 | 0x83, GuestAddress(PAGE_DIRECTORY + 8 * page))?;
    }
    Ok(Entry {
        rip: kernel.entry,
        zero_page: ZERO_PAGE,
    })
}

/// `struct boot_params`. Offsets are those of zero-page.rst and of the setup header (boot.rst).
fn zero_page(
    layout: &Layout,
    initrd: Option<(u64, u64)>,
    command_line: &str,
    rsdp: u64,
) -> Vec<u8> {
    let mut page = vec![0_u8; PAGE as usize];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x070, &rsdp.to_le_bytes()); // acpi_rsdp_addr
    put(0x1fe, &0xaa55_u16.to_le_bytes()); // boot_flag
    put(0x202, b"HdrS"); // header
    put(0x206, &0x020f_u16.to_le_bytes()); // version 2.15
    put(0x210, &[0xff]); // type_of_loader: none of the registered ones
    put(0x211, &[0x01]); // loadflags: LOADED_HIGH
    put(0x228, &(COMMAND_LINE as u32).to_le_bytes()); // cmd_line_ptr
    put(0x230, &0x0100_0000_u32.to_le_bytes()); // kernel_alignment
    put(0x238, &(command_line.len() as u32).to_le_bytes()); // cmdline_size
    if let Some((start, size)) = initrd {
        put(0x218, &(start as u32).to_le_bytes()); // ramdisk_image
        put(0x21c, &(size as u32).to_le_bytes()); // ramdisk_size
        put(0x0c0, &((start >> 32) as u32).to_le_bytes()); // ext_ramdisk_image
        put(0x0c4, &((size >> 32) as u32).to_le_bytes()); // ext_ramdisk_size
    }
    let map = e820(layout);
    put(0x1e8, &[map.len() as u8]); // e820_entries
    for (index, (start, size, kind)) in map.iter().enumerate() {
        let at = 0x2d0 + 20 * index; // e820_table
        put(at, &start.to_le_bytes());
        put(at + 8, &size.to_le_bytes());
        put(at + 16, &kind.to_le_bytes());
    }
    page
}

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// What each range of the address map is to the kernel.
fn e820(layout: &Layout) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, LOW_END, E820_RAM),
        (crate::acpi::START, crate::acpi::SIZE, E820_RESERVED),
        (KERNEL_MIN, layout.low - KERNEL_MIN, E820_RAM),
        // The kernel trusts configuration space only where it is reserved.
        (ECAM_START, ECAM_SIZE, E820_RESERVED),
    ];
    let high = layout.ram().filter(|(gpa, _)| *gpa > 0);
    map.extend(high.map(|(gpa, size)| (gpa, size, E820_RAM)));
    map
}

/// Flat segments at the selectors that the boot protocol wants: code 0x10, data 0x18, task 0x20.
const GDT_ENTRIES: [u64; 5] = [
    0,
    0,
    0x00af_9b00_0000_ffff, // 64-bit code, read/execute
    0x00cf_9300_0000_ffff, // data, read/write
    0x008f_8b00_0000_ffff, // busy TSS
];

fn segment(index: usize) -> kvm_segment {
    let descriptor = GDT_ENTRIES[index];
    let bit = |n: u32| (descriptor >> n & 1) as u8;
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 8 * index as u16,
        type_: (descriptor >> 40 & 0xf) as u8,
        present: bit(47),
        dpl: 0,
        db: bit(54),
        s: bit(44),
        l: bit(53),
        g: bit(55),
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

impl Entry {
    /// Long mode with paging, as [`write_boot_data`] has prepared it.
    pub fn apply(&self, sregs: &mut kvm_sregs) {
        sregs.cs = segment(2);
        let data = segment(3);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = segment(4);
        sregs.gdt.base = GDT;
        sregs.gdt.limit = 8 * GDT_ENTRIES.len() as u16 - 1;
        sregs.idt.base = 0;
        sregs.idt.limit = 0;
        sregs.cr3 = PML4;
        sregs.cr4 |= 1 << 5; // PAE
        sregs.cr0 |= 1 << 31 | 1 << 4 | 1; // PG, ET, PE
        sregs.efer |= 1 << 10 | 1 << 8; // LMA, LME
    }
}

#[cfg(test)]
#[path = "boot_test.rs"]
mod tests;
