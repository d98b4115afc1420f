//! The reserve: guest-physical addresses above everything else, by which memory can grow.
//!
//! Its addresses are mapped when the VM is made, so that every device and back end knows them from the
//! start and need not be told later; that costs one file without a byte in it. Memory is where
//! [`Reserve::grant`] has put some: the file is made longer and KVM gets a slot for it. What lies
//! beyond is no memory to the guest, and a device that is made to use it ends the VM
//! ([`crate::memory::install_bus_handler`]). Which parts of what is granted the guest uses is between
//! it and [`crate::virtio::mem`].

use std::fs::File;
use std::io;
use std::sync::Arc;

use sepal_protocol::vm::MemorySpec;
use vm_memory::{FileOffset, MmapRegion};

use crate::kvm::{self, Backing, Machine};
use crate::memory::{Error, GIB, Layout, MAX_RAM, MIB, RAM_UNIT, map_shared, memfd, seal};

/// Linux on x86-64 adds memory in blocks of this size; with much of it in larger ones, up to
/// [`LARGE_BLOCK`] (arch/x86/mm/init_64.c, probe_memory_block_size).
const BLOCK: u64 = 128 * MIB;
const LARGE_BLOCK: u64 = 2 * GIB;
/// Where the larger ones begin.
const MUCH: u64 = 64 * GIB;

/// Why there is not more memory.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    /// The file cannot become longer.
    #[error("cannot allocate memory to be added: {0}")]
    Allocate(#[from] io::Error),
    /// KVM has no slot left.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
}

/// Addresses for memory that is added later.
pub struct Reserve {
    gpa: u64,
    size: u64,
    /// What is granted at a time.
    unit: u64,
    granted: u64,
    region: Arc<MmapRegion>,
    file: Arc<File>,
    hugepages: bool,
}

impl Reserve {
    /// Room for what `spec` may grow by, if it may, as far as `address_bits` of the guest's CPU reach.
    ///
    /// # Errors
    /// A size that is not possible; the host has no addresses left for it.
    pub fn new(spec: &MemorySpec, address_bits: u32) -> Result<Option<Self>, Error> {
        let gpa = Layout::new(spec.size)?.reserve_start();
        check(spec.max)?;
        let size = spec.max.saturating_sub(spec.size);
        Self::at(gpa, size, spec, address_bits)
    }

    /// Likewise for huge pages, above the other `reserve`.
    ///
    /// # Errors
    /// The same.
    pub fn huge(
        spec: &MemorySpec,
        reserve: Option<&Self>,
        address_bits: u32,
    ) -> Result<Option<Self>, Error> {
        check(spec.max_huge)?;
        let gpa = match reserve {
            // Not next to it: nothing may run from one into the other.
            Some(below) => (below.gpa + below.size + 1).next_multiple_of(LARGE_BLOCK),
            None => Layout::new(spec.size)?.reserve_start(),
        };
        let huge = MemorySpec {
            hugepages: true,
            ..spec.clone()
        };
        Self::at(gpa, spec.max_huge, &huge, address_bits)
    }

    fn at(
        gpa: u64,
        size: u64,
        spec: &MemorySpec,
        address_bits: u32,
    ) -> Result<Option<Self>, Error> {
        let unit = if Layout::new(spec.size)?.mmio64_start() > MUCH {
            LARGE_BLOCK
        } else {
            BLOCK
        };
        let addressable = 1_u64.checked_shl(address_bits).unwrap_or(u64::MAX);
        let size = size.next_multiple_of(unit);
        let size = size.min(addressable.saturating_sub(gpa) / unit * unit);
        if size == 0 {
            return Ok(None);
        }
        let hugepages = spec.hugepages;
        let failed = |reason| Error::Allocate { hugepages, reason };
        let file = memfd(c"sepal-reserve", hugepages).map_err(failed)?;
        if hugepages {
            // To map such a file makes it as long as the mapping; pages are taken as they are touched.
            file.set_len(size).map_err(failed)?;
        }
        seal(&file, 0).map_err(failed)?;
        let file = Arc::new(file);
        let from = FileOffset::from_arc(file.clone(), 0);
        Ok(Some(Self {
            gpa,
            size,
            unit,
            granted: 0,
            region: map_shared(from, size, spec)?,
            file,
            hugepages,
        }))
    }

    /// Whether it is of the host's huge pages.
    pub fn is_huge(&self) -> bool {
        self.hugepages
    }

    /// Its first address.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Its bytes, with and without memory.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// All of it as this process has it mapped.
    pub fn region(&self) -> Arc<MmapRegion> {
        self.region.clone()
    }

    /// Sees to it that the first `bytes` are memory, at least, and says how many are. It is never
    /// taken back; what the guest does not use of it costs nothing.
    ///
    /// # Errors
    /// More than there is room for, or the host refuses.
    pub fn grant(&mut self, bytes: u64, machine: &Machine) -> Result<u64, GrantError> {
        if bytes > self.size {
            return Err(io::Error::from(io::ErrorKind::InvalidInput).into());
        }
        // This cannot overflow: the size is a multiple of the unit.
        let wanted = bytes.next_multiple_of(self.unit);
        if wanted > self.granted {
            if !self.hugepages {
                self.file.set_len(wanted)?;
            }
            let more = wanted - self.granted;
            let more = Backing::Part(self.region.clone(), self.granted, more);
            machine.add_memory(self.gpa + self.granted, more)?;
            self.granted = wanted;
        }
        Ok(self.granted)
    }
}

fn check(size: u64) -> Result<(), Error> {
    if size > MAX_RAM || !size.is_multiple_of(RAM_UNIT) {
        return Err(Error::Size { size });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn spec(size: u64, max: u64) -> MemorySpec {
        MemorySpec {
            size,
            max,
            hugepages: false,
            max_huge: 0,
            mergeable: false,
        }
    }

    #[test]
    fn it_lies_above_the_windows_in_whole_blocks() {
        let reserve = Reserve::new(&spec(256 * MIB, GIB), 46).unwrap().unwrap();
        assert_eq!((reserve.gpa(), reserve.size()), (68 * GIB, 768 * MIB));
        let odd = spec(256 * MIB + RAM_UNIT, GIB);
        assert_eq!(Reserve::new(&odd, 46).unwrap().unwrap().size(), 768 * MIB);
        let much = Reserve::new(&spec(65 * GIB, 66 * GIB), 46)
            .unwrap()
            .unwrap();
        assert_eq!((much.gpa() % LARGE_BLOCK, much.size()), (0, LARGE_BLOCK));
    }

    #[test]
    fn that_of_huge_pages_lies_above_the_other() {
        let mut spec = spec(256 * MIB, GIB);
        assert!(Reserve::huge(&spec, None, 46).unwrap().is_none());
        spec.max_huge = 6 * MIB;
        let below = Reserve::new(&spec, 46).unwrap().unwrap();
        let huge = Reserve::huge(&spec, Some(&below), 46).unwrap().unwrap();
        assert_eq!((huge.gpa(), huge.size()), (70 * GIB, BLOCK));
        assert!(huge.is_huge() && !below.is_huge());
        let alone = Reserve::huge(&spec, None, 46).unwrap().unwrap();
        assert_eq!(alone.gpa(), 68 * GIB);
        spec.max = spec.size + 2 * GIB;
        let below = Reserve::new(&spec, 46).unwrap().unwrap();
        let huge = Reserve::huge(&spec, Some(&below), 46).unwrap().unwrap();
        assert_eq!((below.size(), huge.gpa()), (2 * GIB, 72 * GIB));
        spec.max_huge = 3 * MIB;
        assert!(Reserve::huge(&spec, None, 46).is_err());
    }

    #[test]
    fn there_is_none_without_room_to_grow() {
        for (spec, bits) in [
            (spec(256 * MIB, 0), 46),
            (spec(256 * MIB, 256 * MIB), 46),
            (spec(256 * MIB, GIB), 36),
        ] {
            assert!(Reserve::new(&spec, bits).unwrap().is_none(), "{spec:?}");
        }
        for (max, left) in [(8 * GIB, 8 * GIB - 256 * MIB), (100 * GIB, 60 * GIB)] {
            let reserve = Reserve::new(&spec(256 * MIB, max), 37).unwrap().unwrap();
            assert_eq!(reserve.size(), left);
        }
        for max in [MAX_RAM + RAM_UNIT, 300 * MIB + 4096] {
            assert!(Reserve::new(&spec(256 * MIB, max), 46).is_err(), "{max}");
        }
    }

    #[test]
    fn nothing_is_behind_it_at_first_and_nobody_can_shrink_it() {
        let reserve = Reserve::new(&spec(256 * MIB, 8 * GIB), 46)
            .unwrap()
            .unwrap();
        let metadata = reserve.file.metadata().unwrap();
        assert_eq!((metadata.len(), metadata.blocks()), (0, 0));
        reserve.file.set_len(4096).unwrap();
        assert!(reserve.file.set_len(0).is_err());
    }

    #[test]
    fn memory_is_granted_in_blocks_and_stays() {
        let Ok(host) = kvm::Host::open() else {
            eprintln!("skipped: no usable /dev/kvm on this machine");
            return;
        };
        let machine = host.create_machine().unwrap();
        let mut reserve = Reserve::new(&spec(256 * MIB, GIB), 46).unwrap().unwrap();
        assert_eq!(reserve.grant(0, &machine).unwrap(), 0);
        assert_eq!(reserve.grant(RAM_UNIT, &machine).unwrap(), BLOCK);
        assert_eq!(reserve.grant(BLOCK, &machine).unwrap(), BLOCK);
        assert_eq!(reserve.grant(3 * BLOCK, &machine).unwrap(), 3 * BLOCK);
        assert_eq!(reserve.grant(0, &machine).unwrap(), 3 * BLOCK);
        assert_eq!(reserve.file.metadata().unwrap().len(), 3 * BLOCK);
        assert!(reserve.grant(GIB, &machine).is_err());
    }

    #[test]
    fn a_grant_that_cannot_be_rounded_up_to_blocks_is_refused() {
        let Ok(host) = kvm::Host::open() else {
            eprintln!("skipped: no usable /dev/kvm on this machine");
            return;
        };
        let machine = host.create_machine().unwrap();
        let mut reserve = Reserve::new(&spec(256 * MIB, GIB), 46).unwrap().unwrap();
        for bytes in [u64::MAX, u64::MAX - BLOCK + 2] {
            assert!(reserve.grant(bytes, &machine).is_err(), "{bytes}");
        }
        assert_eq!(reserve.grant(0, &machine).unwrap(), 0);
    }
}
