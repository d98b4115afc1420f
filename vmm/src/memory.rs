//! Guest RAM and the guest's physical address map.
//!
//! ```text
//!          0 ┬ RAM (the first MiB holds boot data and the ACPI tables, see `boot` and `acpi`)
//!      3 GiB ┼ PCI window below 4 GiB: BARs that hold registers
//! 0xe8000000 ┼ ECAM: PCI configuration space, 1 MiB for bus 0
//! 0xfec00000 ┼ I/O APIC, local APICs, KVM's own pages
//!      4 GiB ┼ RAM beyond the first 3 GiB
//! 1 GiB mark ┼ PCI window above RAM: persistent memory and DAX windows
//!   + 64 GiB ┼ what memory may be added while the VM runs (`reserve`)
//! ```
//!
//! RAM is one memfd mapped shared, so that vhost-user back ends see it and nothing depends on the
//! size of /dev/shm. The mappings live as long as the VM; [`crate::kvm::Machine`] keeps its own
//! reference to each that KVM knows.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::unistd::{Whence, lseek};
use sepal_protocol::vm::{ExitCause, MemorySpec};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::reserve::Reserve;

/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One gibibyte.
pub const GIB: u64 = 1 << 30;

/// Where RAM below 4 GiB ends at the latest.
pub const LOW_RAM_END: u64 = 3 * GIB;
/// Where RAM goes on.
pub const HIGH_RAM_START: u64 = 4 * GIB;
/// PCI window for register BARs.
pub const MMIO32_START: u64 = LOW_RAM_END;
/// Bytes of that window.
pub const MMIO32_SIZE: u64 = ECAM_START - MMIO32_START;
/// PCI configuration space (ECAM, PCI Express 5.0, 7.2.2) of bus 0.
pub const ECAM_START: u64 = 0xe800_0000;
/// 32 devices of 8 functions of 4 KiB.
pub const ECAM_SIZE: u64 = MIB;
/// The I/O APIC's usual place; KVM's in-kernel one answers there.
pub const IOAPIC: u64 = 0xfec0_0000;
/// The local APICs' place after reset.
pub const LAPIC: u64 = 0xfee0_0000;
/// Three pages that KVM on VT-x wants for real mode, clear of everything else.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// One more for its identity page table.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// RAM is handed out in units of this size: that of a huge page.
pub const RAM_UNIT: u64 = 2 * MIB;
/// Less than this no kernel of ours boots in.
pub const MIN_RAM: u64 = 64 * MIB;
/// With the hole and the PCI window beside it this fits into a physical address space of 40 bits.
pub const MAX_RAM: u64 = 512 * GIB;
/// Bytes of the PCI window above RAM.
pub const MMIO64_SIZE: u64 = 64 * GIB;

/// Why there is no guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a size we give.
    #[error(
        "guest memory of {size} bytes is not possible: it must be a multiple of 2 MiB from {} MiB \
         to {} GiB; set the pod's memory limit or `memory` in the configuration accordingly",
        MIN_RAM / MIB, MAX_RAM / GIB
    )]
    Size {
        /// Bytes asked for.
        size: u64,
    },
    /// memfd_create(2) or ftruncate(2) failed.
    #[error("cannot allocate guest memory{}: {reason}", huge_hint(*.hugepages))]
    Allocate {
        /// Whether of huge pages.
        hugepages: bool,
        /// The kernel's answer.
        reason: io::Error,
    },
    /// mmap(2) failed.
    #[error("cannot map {size} bytes of guest memory{}: {reason}", huge_hint(*.hugepages))]
    Map {
        /// Bytes asked for.
        size: u64,
        /// Whether of huge pages.
        hugepages: bool,
        /// The kernel's answer.
        reason: MmapRegionError,
    },
}

fn huge_hint(hugepages: bool) -> &'static str {
    if hugepages {
        " of huge pages (raise vm.nr_hugepages on the host)"
    } else {
        ""
    }
}

const PAGE: u64 = 4096;

/// Where RAM and windows lie for a given size of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of RAM from address 0.
    pub low: u64,
    /// Bytes of RAM from 4 GiB.
    pub high: u64,
}

impl Layout {
    /// # Errors
    /// [`Error::Size`] outside of what the map has room for.
    pub fn new(size: u64) -> Result<Self, Error> {
        if !(MIN_RAM..=MAX_RAM).contains(&size) || !size.is_multiple_of(RAM_UNIT) {
            return Err(Error::Size { size });
        }
        let low = size.min(LOW_RAM_END);
        Ok(Self {
            low,
            high: size - low,
        })
    }

    /// RAM as (guest-physical address, bytes), in ascending order.
    pub fn ram(&self) -> impl Iterator<Item = (u64, u64)> {
        [(0, self.low), (HIGH_RAM_START, self.high)]
            .into_iter()
            .filter(|(_, size)| *size > 0)
    }

    /// The start of the PCI window above RAM, on a 1 GiB mark so that big mappings can be huge.
    pub fn mmio64_start(&self) -> u64 {
        (HIGH_RAM_START + self.high).next_multiple_of(GIB)
    }

    /// Where memory goes on that is added while the VM runs.
    pub fn reserve_start(&self) -> u64 {
        (self.mmio64_start() + MMIO64_SIZE).next_multiple_of(2 * GIB)
    }
}

/// Pages of a file that are to be guest RAM as they are.
#[derive(Debug, Clone)]
pub struct FilePages {
    /// The file. It must stay as it is: a page that it loses kills the VMM with SIGBUS.
    pub file: Arc<File>,
    /// Where they begin in it, a multiple of 4096.
    pub offset: u64,
    /// Bytes, a multiple of 4096.
    pub size: u64,
    /// Where the guest finds them, a multiple of 4096.
    pub gpa: u64,
}

/// Guest RAM.
pub struct Ram {
    /// As devices see it.
    pub memory: Arc<GuestMemoryMmap>,
    /// Where it lies.
    pub layout: Layout,
    /// For KVM: the same mappings, with their addresses.
    pub regions: Vec<(u64, Arc<MmapRegion>)>,
    file: Arc<File>,
    hugepages: bool,
}

impl Ram {
    /// Allocates and maps RAM; the host gives pages as they are touched.
    ///
    /// # Errors
    /// A size that is not possible, or the host has no memory for it.
    #[cfg(test)]
    pub fn new(spec: &MemorySpec) -> Result<Self, Error> {
        Self::map(RamFile::new(spec.hugepages)?, spec, &[])
    }

    /// Gives `file` its size for good and maps it; the host gives pages as they are touched.
    /// Devices see the reserves as memory from the start, whether or not there is any in them.
    ///
    /// # Errors
    /// A size that is not possible, or the host has no memory for it.
    pub fn map(file: RamFile, spec: &MemorySpec, reserves: &[&Reserve]) -> Result<Self, Error> {
        let layout = Layout::new(spec.size)?;
        let (size, hugepages) = (spec.size, file.hugepages);
        let fixed = fix_size(&file.file, size);
        fixed.map_err(|reason| Error::Allocate { hugepages, reason })?;
        let memfd = Arc::new(file.file);

        let mut regions = Vec::new();
        let mut mapped = Vec::new();
        let mut offset = 0;
        for (gpa, size) in layout.ram() {
            let from = FileOffset::from_arc(memfd.clone(), offset);
            let region = map_shared(from, size, spec)?;
            let Some(guest) = GuestRegionMmap::with_arc(region.clone(), GuestAddress(gpa)) else {
                return Err(Error::Size { size: spec.size });
            };
            mapped.push(guest);
            regions.push((gpa, region));
            offset += size;
        }
        for reserve in reserves {
            let region = GuestRegionMmap::with_arc(reserve.region(), GuestAddress(reserve.gpa()));
            mapped.push(region.ok_or(Error::Size { size: spec.size })?);
        }
        let memory =
            GuestMemoryMmap::from_regions(mapped).map_err(|_| Error::Size { size: spec.size })?;
        Ok(Self {
            memory: Arc::new(memory),
            layout,
            regions,
            file: memfd,
            hugepages,
        })
    }

    /// Puts pages of a file into RAM: the guest gets a copy of those that it writes to, and shares the
    /// others with every mapping of the file. Devices outside of this process find zeroes there, so
    /// they must be pages that no guest uses as a buffer, as a kernel's code and constants.
    ///
    /// # Errors
    /// They do not lie in RAM below 3 GiB, or mmap(2).
    pub fn share(&self, pages: &FilePages) -> io::Result<()> {
        let (_, low) = self.regions.first().ok_or(io::ErrorKind::InvalidInput)?;
        let end = pages.gpa.checked_add(pages.size);
        let inside = end.is_some_and(|end| end <= low.size() as u64);
        let aligned = [pages.gpa, pages.size, pages.offset]
            .iter()
            .all(|n| n.is_multiple_of(PAGE));
        if !inside || !aligned || self.hugepages {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the range lies within a mapping that `self` owns, which is replaced page by page
        // and still unmapped as a whole when that is dropped. What is read through it may be of any
        // value before and after.
        let mapped = unsafe {
            libc::mmap(
                low.as_ptr().add(pages.gpa as usize).cast(),
                pages.size as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                pages.file.as_raw_fd(),
                pages.offset as libc::off_t,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Whether pages of files can be mapped into it.
    pub fn can_share(&self) -> bool {
        !self.hugepages
    }

    /// Where to put what is loaded from files.
    pub fn target(&self) -> Target<'_> {
        if self.hugepages {
            Target::Mapped(&self.memory)
        } else {
            Target::File(&self.file)
        }
    }
}

/// The file that is RAM, before its size is known: what is put into it at an offset below 3 GiB
/// will lie at that address.
pub struct RamFile {
    file: File,
    hugepages: bool,
}

/// How to fill RAM from a file.
#[derive(Clone, Copy)]
pub enum Target<'a> {
    /// By its own file: the kernel copies from file to file, without touching our mapping.
    File(&'a File),
    /// Through the mapping: files of huge pages cannot be written.
    Mapped(&'a GuestMemoryMmap),
}

impl RamFile {
    /// An empty one.
    ///
    /// # Errors
    /// The host gives none.
    pub fn new(hugepages: bool) -> Result<Self, Error> {
        let file = memfd(c"sepal-ram", hugepages);
        let file = file.map_err(|reason| Error::Allocate { hugepages, reason })?;
        Ok(Self { file, hugepages })
    }

    /// Where to put what is known before the size is; not for huge pages.
    pub fn target(&self) -> Target<'_> {
        Target::File(&self.file)
    }
}

impl Target<'_> {
    /// Copies `size` bytes at `offset` of `source` to `gpa`, below 3 GiB, where RAM is still
    /// zero. Holes of the source are left out: RAM that nobody touches costs nothing.
    ///
    /// # Errors
    /// Reading, writing, or the source ends too early.
    pub fn fill(&self, source: &mut File, offset: u64, size: u64, gpa: u64) -> io::Result<()> {
        let end = offset.saturating_add(size);
        if source.metadata()?.len() < end {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut at = offset;
        while let Some((start, stop)) = next_data(source, at, end) {
            self.copy(source, start, stop - start, gpa + (start - offset))?;
            at = stop;
        }
        Ok(())
    }

    fn copy(&self, source: &mut File, offset: u64, size: u64, gpa: u64) -> io::Result<()> {
        source.seek(SeekFrom::Start(offset))?;
        match *self {
            Self::File(mut file) => {
                file.seek(SeekFrom::Start(gpa))?;
                // Between files the standard library lets the kernel copy.
                let copied = io::copy(&mut (&*source).take(size), &mut file)?;
                if copied < size {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Ok(())
            }
            Self::Mapped(memory) => memory
                .read_exact_volatile_from(GuestAddress(gpa), source, size as usize)
                .map_err(io::Error::other),
        }
    }
}

/// The next range of data in `at..end`; all of it where the file system does not know its holes.
fn next_data(file: &File, at: u64, end: u64) -> Option<(u64, u64)> {
    if at >= end {
        return None;
    }
    let seek = |from: u64, whence| {
        let from = i64::try_from(from).map_err(|_| nix::Error::EOVERFLOW)?;
        lseek(file, from, whence).map(i64::unsigned_abs)
    };
    match seek(at, Whence::SeekData) {
        Ok(start) if start < end => {
            let stop = seek(start, Whence::SeekHole).unwrap_or(end).min(end);
            Some((start, stop))
        }
        // ENXIO: nothing but a hole follows.
        Ok(_) | Err(nix::Error::ENXIO) => None,
        Err(_) => Some((at, end)),
    }
}

/// Maps `size` bytes of a file as guest memory.
pub(crate) fn map_shared(
    from: FileOffset,
    size: u64,
    spec: &MemorySpec,
) -> Result<Arc<MmapRegion>, Error> {
    let hugepages = spec.hugepages;
    let region = MmapRegionBuilder::new(size as usize)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .with_hugetlbfs(hugepages)
        .with_file_offset(from)
        .build()
        .map_err(|reason| Error::Map {
            size,
            hugepages,
            reason,
        })?;
    advise(&region, libc::MADV_DONTDUMP);
    if !hugepages {
        // Takes effect where the host allows huge pages for shared memory on request
        // (transparent_hugepage/shmem_enabled = advise); elsewhere it costs nothing.
        advise(&region, libc::MADV_HUGEPAGE);
    }
    if spec.mergeable {
        advise(&region, libc::MADV_MERGEABLE);
    }
    Ok(Arc::new(region))
}

pub(crate) fn memfd(name: &CStr, hugepages: bool) -> io::Result<File> {
    let mut flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    if hugepages {
        flags |= libc::MFD_HUGETLB;
    }
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: memfd_create has just given us this descriptor and nobody else knows of it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn fix_size(file: &File, size: u64) -> io::Result<()> {
    file.set_len(size)?;
    seal(file, libc::F_SEAL_GROW)
}

/// Nobody shrinks this file from now on, nor changes its seals, nor does what `besides` forbids. A
/// back end that shares this memory must not be able to take it from below our feet.
pub(crate) fn seal(file: &File, besides: libc::c_int) -> io::Result<()> {
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL | besides;
    // SAFETY: fcntl with an integer argument on a descriptor that we own.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Bytes of a slot in ECAM: 8 functions of 4 KiB.
const ECAM_SLOT: usize = 0x8000;
/// Slots of the bus.
const ECAM_SLOTS: usize = ECAM_SIZE as usize / ECAM_SLOT;
/// Bytes of one function.
const ECAM_FUNCTION: usize = 0x1000;

/// The pages that a guest finds in configuration space. All slots without a device share the same
/// ones, of all ones.
pub struct ConfigPages {
    start: *mut libc::c_void,
    absent: File,
    present: File,
}

// SAFETY: the mapping lives as long as the value and is only replaced, page by page, by mmap(2);
// this process never reads through the pointer.
unsafe impl Send for ConfigPages {}
// SAFETY: as above.
unsafe impl Sync for ConfigPages {}

impl ConfigPages {
    /// An empty bus.
    ///
    /// # Errors
    /// memfd_create(2), mmap(2).
    pub fn new() -> io::Result<Self> {
        let absent = memfd(c"sepal-absent", false)?;
        absent.write_all_at(&[0xff; ECAM_SLOT], 0)?;
        let present = memfd(c"sepal-config", false)?;
        present.set_len((ECAM_SLOTS * ECAM_FUNCTION) as u64)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let size = ECAM_SIZE as usize;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), size, libc::PROT_READ, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let pages = Self {
            start,
            absent,
            present,
        };
        (0..ECAM_SLOTS).try_for_each(|slot| pages.place(slot, ECAM_SLOT, &pages.absent, 0))?;
        Ok(pages)
    }

    /// Where they are in this process: [`ECAM_SIZE`] bytes.
    pub fn host_address(&self) -> u64 {
        self.start as u64
    }

    /// Puts a function into `slot`, or renews it. The rest of its page reads as zero.
    ///
    /// # Errors
    /// mmap(2); there is no such slot.
    pub fn show(&self, slot: usize, config: &[u8]) -> io::Result<()> {
        let at = slot * ECAM_FUNCTION;
        if slot >= ECAM_SLOTS || config.len() > ECAM_FUNCTION {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.present.write_all_at(config, at as u64)?;
        self.place(slot, ECAM_FUNCTION, &self.present, at)
    }

    /// Takes the function out of `slot`.
    ///
    /// # Errors
    /// mmap(2).
    pub fn hide(&self, slot: usize) -> io::Result<()> {
        self.place(slot, ECAM_FUNCTION, &self.absent, 0)
    }

    /// Maps `size` bytes of `file` from `offset` at the start of a slot.
    fn place(&self, slot: usize, size: usize, file: &File, offset: usize) -> io::Result<()> {
        if slot >= ECAM_SLOTS || size > ECAM_SLOT {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let at = self.start.wrapping_byte_add(slot * ECAM_SLOT);
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        let fd = file.as_raw_fd();
        // SAFETY: the range lies in this value's own mapping, as was just checked, and nobody in
        // this process has a reference into it. KVM follows the change.
        let mapped =
            unsafe { libc::mmap(at, size, libc::PROT_READ, flags, fd, offset as libc::off_t) };
        if mapped == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// What the guest reads at `offset`.
    #[cfg(test)]
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        assert!(offset + into.len() <= ECAM_SIZE as usize);
        // SAFETY: the range was just checked, and is mapped readable.
        unsafe {
            let source = self.start.cast::<u8>().add(offset);
            std::ptr::copy_nonoverlapping(source, into.as_mut_ptr(), into.len());
        }
    }
}

impl Drop for ConfigPages {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own and goes with it; KVM holds a reference to the
        // value as long as it shows it.
        unsafe { libc::munmap(self.start, ECAM_SIZE as usize) };
    }
}

/// Makes an access to mapped memory that is not there end the VM with a sentence.
///
/// # Errors
/// sigaction(2).
pub fn install_bus_handler() -> io::Result<()> {
    // SAFETY: an all-zero sigaction is valid; the handler is async-signal-safe (see there).
    let done = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_bus_error as *const () as libc::sighandler_t;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut())
    };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

extern "C" fn on_bus_error(_signal: libc::c_int) {
    const TEXT: &[u8] =
        b"sepal-vmm: memory that is mapped is not there: the guest had a device use \
        memory that it was not given, the guest image was cut short, or the host has no huge page \
        left\n";
    // SAFETY: write(2) and _exit(2) are async-signal-safe; the buffer is a constant.
    unsafe {
        libc::write(libc::STDERR_FILENO, TEXT.as_ptr().cast(), TEXT.len());
        libc::_exit(ExitCause::GuestCrash.status().into());
    }
}

/// Advice is only advice: what the host does not know it ignores.
fn advise(region: &MmapRegion, advice: i32) {
    // SAFETY: the range is exactly this live mapping, and none of the values used above changes
    // its contents.
    let done = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), advice) };
    if done < 0 {
        tracing::debug!(advice, error = %io::Error::last_os_error(), "madvise not taken");
    }
}

#[cfg(test)]
#[path = "memory_test.rs"]
mod tests;

#[cfg(test)]
#[path = "memory_model_test.rs"]
mod model;
