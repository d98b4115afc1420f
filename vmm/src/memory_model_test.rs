//! The map of guest memory for any size: its ranges never overlap, leave nothing out and lie where
//! pages and blocks of memory begin.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::tests::spec;
use super::*;
use crate::kvm::Host;
use crate::virtio::testing::{Noise, cases};

/// What Linux adds at a time to RAM that does not reach beyond 64 GiB; to more, [`LARGE_BLOCK`].
const BLOCK: u64 = 128 * MIB;
const LARGE_BLOCK: u64 = 2 * GIB;

/// Sizes that are possible, those beside the borders of the map more often than others.
fn possible_size() -> impl Strategy<Value = u64> {
    let units = |bytes: u64| bytes / RAM_UNIT;
    prop_oneof![
        units(MIN_RAM)..=units(MAX_RAM),
        units(MIN_RAM)..units(MIN_RAM) + 4,
        units(LOW_RAM_END) - 3..units(LOW_RAM_END) + 4,
        // The most that ends at 64 GiB.
        units(63 * GIB) - 3..units(63 * GIB) + 4,
        units(MAX_RAM) - 3..=units(MAX_RAM),
    ]
    .prop_map(|units| units * RAM_UNIT)
}

fn size() -> impl Strategy<Value = u64> {
    let beside = (possible_size(), 1..RAM_UNIT).prop_map(|(size, more)| size + more);
    let outside = prop_oneof![0..MIN_RAM, MAX_RAM..2 * MAX_RAM, any::<u64>()];
    prop_oneof![4 => possible_size(), 1 => beside, 1 => outside]
}

/// How large memory may become: a size, none, or seldom one that is not possible.
fn most() -> impl Strategy<Value = u64> {
    let small = (0..200_u64).prop_map(|units| units * RAM_UNIT);
    prop_oneof![4 => possible_size(), 2 => Just(0), 2 => small, 1 => size()]
}

fn is_most(size: u64) -> bool {
    size <= MAX_RAM && size.is_multiple_of(RAM_UNIT)
}

/// Start and end of each region, in ascending order.
fn ranges(memory: &GuestMemoryMmap) -> Vec<(u64, u64)> {
    let range = |region: &GuestRegionMmap| {
        let start = region.start_addr().raw_value();
        (start, start + region.len())
    };
    memory.iter().map(range).collect()
}

fn grant() -> impl Strategy<Value = u64> {
    prop_oneof![6 => 0..40 * BLOCK, 1 => any::<u64>(), 1 => u64::MAX - BLOCK..]
}

proptest! {
    #![proptest_config(cases(512))]

    #[test]
    fn ram_of_any_size_is_laid_out_whole_and_clear_of_the_windows(size in size()) {
        let possible = (MIN_RAM..=MAX_RAM).contains(&size) && size.is_multiple_of(RAM_UNIT);
        let layout = Layout::new(size);
        assert_eq!(layout.is_ok(), possible);
        let Ok(layout) = layout else { return Ok(()) };
        let (mut end, mut total) = (0, 0);
        for (gpa, length) in layout.ram() {
            assert!(length > 0 && gpa >= end, "{gpa:#x} is before {end:#x}");
            assert_eq!((gpa % RAM_UNIT, length % RAM_UNIT), (0, 0));
            end = gpa + length;
            total += length;
            assert!(end <= LOW_RAM_END || gpa >= HIGH_RAM_START);
        }
        assert_eq!(total, size);
        let window = layout.mmio64_start();
        assert!(window >= end.max(HIGH_RAM_START) && window - end < HIGH_RAM_START + GIB);
        let reserve = layout.reserve_start();
        let end = window + MMIO64_SIZE;
        assert!(reserve >= end && reserve - end < LARGE_BLOCK);
        assert_eq!((window % GIB, reserve % LARGE_BLOCK), (0, 0));
        assert!(reserve < 1 << 40, "not in the reach of a CPU of 40 bits");
    }
}

proptest! {
    #![proptest_config(cases(16))]

    #[test]
    fn whatever_is_granted_stays_and_is_as_much_as_was_asked_for_in_whole_blocks(
        blocks in 1..40_u64,
        steps in vec(grant(), 0..12),
    ) {
        let Ok(host) = Host::open() else {
            eprintln!("skipped: no usable /dev/kvm on this machine");
            return Ok(());
        };
        let spec = MemorySpec { max: MIN_RAM + blocks * BLOCK, ..spec(MIN_RAM) };
        let machine = host.create_machine().unwrap();
        let mut reserve = Reserve::new(&spec, 46).unwrap().unwrap();
        let mut granted = 0;
        for bytes in steps {
            let answer = reserve.grant(bytes, &machine);
            if bytes <= reserve.size() {
                granted = granted.max(bytes.div_ceil(BLOCK) * BLOCK);
                assert_eq!(answer.unwrap(), granted);
            } else {
                assert!(answer.is_err());
            }
            let region = reserve.region();
            let file = region.file_offset().unwrap().file();
            assert_eq!(file.metadata().unwrap().len(), granted);
        }
    }
}

proptest! {
    #![proptest_config(cases(96))]

    #[test]
    fn reserves_have_room_for_what_is_asked_in_blocks_of_their_own(
        size in possible_size(),
        max in most(),
        max_huge in most(),
        bits in prop_oneof![4 => 36..=48_u32, 1 => 0..=80_u32],
    ) {
        let spec = MemorySpec { max, max_huge, ..spec(size) };
        let layout = Layout::new(size).unwrap();
        let reserve = Reserve::new(&spec, bits);
        assert_eq!(reserve.is_ok(), is_most(max));
        let reserve = reserve.unwrap_or_default();
        let huge = Reserve::huge(&spec, reserve.as_ref(), bits);
        assert_eq!(huge.is_ok(), is_most(max_huge));
        let huge = huge.unwrap_or_default();

        // What one whole memory of all of them refuses is an overlap.
        let reserves: Vec<_> = [&reserve, &huge].into_iter().flatten().collect();
        let ram = Ram::map(RamFile::new(false).unwrap(), &spec, &reserves).unwrap();
        let regions = reserves.iter().map(|it| (it.gpa(), it.gpa() + it.size()));
        let laid_out = layout.ram().map(|(gpa, length)| (gpa, gpa + length));
        assert_eq!(ranges(&ram.memory), laid_out.chain(regions).collect::<Vec<_>>());

        let block = if layout.mmio64_start() > 64 * GIB { LARGE_BLOCK } else { BLOCK };
        let end = 1_u128 << bits;
        let mut start = layout.reserve_start();
        for (reserve, wanted, is_huge) in [
            (&reserve, if is_most(max) { max.saturating_sub(size) } else { 0 }, false),
            (&huge, if is_most(max_huge) { max_huge } else { 0 }, true),
        ] {
            let room = end.saturating_sub(start.into());
            let Some(reserve) = reserve else {
                assert!(wanted == 0 || room < block.into(), "none of {wanted}");
                continue;
            };
            assert_eq!((reserve.gpa(), reserve.is_huge()), (start, is_huge));
            assert_eq!((reserve.gpa() % LARGE_BLOCK, reserve.size() % block), (0, 0));
            assert!(u128::from(reserve.size()) <= room);
            // Not a block more than is wanted, nor less than there is room for.
            assert!(reserve.size() < wanted + block);
            let short = u128::from(reserve.size()) + u128::from(block) <= room;
            assert!(reserve.size() >= wanted || !short);
            // There is a gap: nothing runs from one into the next.
            start = (reserve.gpa() + reserve.size() + 1).next_multiple_of(LARGE_BLOCK);
        }
    }

    #[test]
    fn any_part_of_any_file_comes_to_its_address_and_its_holes_cost_nothing(
        pages in vec(any::<bool>(), 0..12),
        tail in 0..PAGE,
        (offset, size) in (0..8 * PAGE, 0..14 * PAGE),
        about_to_its_end in option::of(0..4_u64),
        gpa in 0..4 * PAGE,
        mapped: bool,
    ) {
        let length = pages.len() as u64 * PAGE + tail;
        let to_end = |more: u64| (length + more).saturating_sub(2 + offset);
        let size = about_to_its_end.map_or(size, to_end);
        let (mut bytes, mut noise) = (vec![0; length as usize], Noise(3));
        let mut source = memfd(c"source", false).unwrap();
        source.set_len(length).unwrap();
        for (page, is_data) in pages.iter().enumerate() {
            if *is_data {
                let at = page * PAGE as usize;
                let data = &mut bytes[at..at + PAGE as usize];
                noise.fill(data);
                source.write_all_at(data, at as u64).unwrap();
            }
        }
        // Pages on either side of it stay as they are.
        const BASE: u64 = 16 * MIB;
        let at = BASE + PAGE + gpa;
        let ram = Ram::new(&spec(MIN_RAM)).unwrap();
        let target = if mapped { Target::Mapped(&ram.memory) } else { ram.target() };
        let filled = target.fill(&mut source, offset, size, at);
        let inside = offset + size <= length;
        assert_eq!(filled.is_ok(), inside);

        use std::os::unix::fs::MetadataExt;
        let taken = ram.file.metadata().unwrap().blocks() * 512 / PAGE;
        let (first, end) = ((offset / PAGE) as usize, (offset + size).div_ceil(PAGE) as usize);
        let data = pages.iter().take(end).skip(first).filter(|is_data| **is_data).count();
        // A page of the file may lie across two of RAM.
        assert!(taken <= 2 * data as u64, "{taken} pages for {data}");

        let mut expected = vec![0; 32 * PAGE as usize];
        if inside {
            let place = &mut expected[(at - BASE) as usize..][..size as usize];
            place.copy_from_slice(&bytes[offset as usize..][..size as usize]);
        }
        let mut there = vec![1; expected.len()];
        ram.memory.read_slice(&mut there, GuestAddress(BASE)).unwrap();
        assert!(there == expected, "other bytes are there");
    }
}
