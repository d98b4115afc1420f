//! Guest memory that is given back to the host.
//!
//! It is cut out of the memfd behind guest RAM: the pages are the host's at once, in every process that
//! has RAM mapped, and read as zero when the guest touches them again.

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
