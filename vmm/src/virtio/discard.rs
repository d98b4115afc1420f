//! Guest memory that is given back to the host, or taken from it.
//!
//! What is given back is cut out of the memfd behind guest RAM: the pages are the host's at once, in every
//! process that has RAM mapped, and read as zero when the guest touches them again.

use std::os::fd::AsFd;

use nix::fcntl::{FallocateFlags, fallocate};
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use super::error::Complaints;

/// Unit in which memory is given back, whatever the guest's page size.
pub const PAGE: u64 = 4096;

/// Cuts a range of pages out; what of it is not RAM is complained of and left out. Returns the bytes
/// given back.
pub fn cut(
    memory: &GuestMemoryMmap,
    (start, end): (u64, u64),
    device: &'static str,
    complaints: &mut Complaints,
) -> u64 {
    let mut returned = 0;
    let mut at = start;
    while at < end {
        let Some((region, offset)) = memory.to_region_addr(GuestAddress(at)) else {
            complaints.warn(device, &format_args!("page at {at:#x} is not RAM"));
            at += PAGE;
            continue;
        };
        let length = (end - at).min(region.len() - offset.raw_value());
        returned += punch(region, offset, length, device, complaints);
        at += length;
    }
    returned
}

/// Cuts `length` bytes at `offset` out of the file behind a region. Returns the bytes given back.
pub fn punch(
    region: &GuestRegionMmap,
    offset: MemoryRegionAddress,
    length: u64,
    device: &'static str,
    complaints: &mut Complaints,
) -> u64 {
    // RAM that is no file cannot be shared with a back end either: the VM builder makes none.
    let Some(file) = region.file_offset() else {
        return 0;
    };
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    // Both lie within a file.
    let at = (file.start() + offset.raw_value()) as i64;
    match fallocate(file.file().as_fd(), mode, at, length as i64) {
        Ok(()) => length,
        Err(error) => {
            complaints.warn(device, &format_args!("giving memory back: {error}"));
            0
        }
    }
}

/// Has the host give the pages of a range of RAM now that it has not given yet. False: it has not as many.
pub fn take(
    memory: &GuestMemoryMmap,
    range: std::ops::Range<u64>,
    device: &'static str,
    complaints: &mut Complaints,
) -> bool {
    let place = memory.to_region_addr(GuestAddress(range.start));
    let Some((file, offset)) = place.and_then(|(r, offset)| Some((r.file_offset()?, offset)))
    else {
        return false;
    };
    let length = range.end - range.start;
    // Both lie within a file.
    let at = (file.start() + offset.raw_value()) as i64;
    let taken = fallocate(
        file.file().as_fd(),
        FallocateFlags::empty(),
        at,
        length as i64,
    );
    if let Err(error) = &taken {
        complaints.warn(
            device,
            &format_args!("taking memory from the host: {error}"),
        );
    }
    taken.is_ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::sync::Arc;

    use vm_memory::{FileOffset, MmapRegion};

    use super::*;
    use crate::memory::{GIB, map_shared, memfd};

    /// A region of a file at address 0.
    fn memory(size: u64, huge: bool) -> (GuestMemoryMmap, Arc<std::fs::File>) {
        let file = memfd(c"test", huge).unwrap();
        file.set_len(size).unwrap();
        let file = Arc::new(file);
        let spec = sepal_protocol::vm::MemorySpec {
            size,
            max: 0,
            hugepages: huge,
            max_huge: 0,
            mergeable: false,
        };
        let region: Arc<MmapRegion> =
            map_shared(FileOffset::from_arc(file.clone(), 0), size, &spec).unwrap();
        let region = GuestRegionMmap::with_arc(region, GuestAddress(0)).unwrap();
        (GuestMemoryMmap::from_regions(vec![region]).unwrap(), file)
    }

    #[test]
    fn what_is_taken_is_there_until_it_is_given_back() {
        let (memory, file) = memory(4 << 20, false);
        let mut complaints = Complaints::default();
        assert!(take(&memory, 0..2 << 20, "test", &mut complaints));
        assert_eq!(file.metadata().unwrap().blocks() * 512, 2 << 20);
        cut(&memory, (0, 2 << 20), "test", &mut complaints);
        assert_eq!(file.metadata().unwrap().blocks(), 0);
        assert!(!take(&memory, 8 << 20..10 << 20, "test", &mut complaints));
    }

    #[test]
    fn more_huge_pages_than_the_host_has_are_refused() {
        let (memory, _) = memory(64 * GIB, true);
        assert!(!take(
            &memory,
            0..64 * GIB,
            "test",
            &mut Complaints::default()
        ));
    }
}
