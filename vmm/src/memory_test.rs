use super::*;
use vm_memory::GuestMemoryBackend;

pub fn spec(size: u64) -> MemorySpec {
    MemorySpec {
        size,
        max: 0,
        hugepages: false,
        max_huge: 0,
        mergeable: false,
    }
}

#[test]
fn small_ram_lies_in_one_piece() {
    let layout = Layout::new(256 * MIB).unwrap();
    assert_eq!(layout.ram().collect::<Vec<_>>(), [(0, 256 * MIB)]);
    assert_eq!(layout.mmio64_start(), 4 * GIB);
}

#[test]
fn big_ram_leaves_the_hole_free() {
    let layout = Layout::new(5 * GIB + 2 * MIB).unwrap();
    let ram: Vec<_> = layout.ram().collect();
    assert_eq!(ram, [(0, 3 * GIB), (4 * GIB, 2 * GIB + 2 * MIB)]);
    assert_eq!(layout.mmio64_start(), 7 * GIB);
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    for size in [
        0,
        MIB,
        MIN_RAM - RAM_UNIT,
        MIN_RAM + 4096,
        MAX_RAM + RAM_UNIT,
        u64::MAX,
    ] {
        assert!(
            matches!(Layout::new(size), Err(Error::Size { .. })),
            "{size}"
        );
    }
}

#[test]
fn ram_is_readable_where_the_layout_says_and_nowhere_else() {
    let ram = Ram::new(&spec(4 * GIB)).unwrap();
    for gpa in [0, 3 * GIB - 8, 4 * GIB, 5 * GIB - 8] {
        ram.memory.write_obj(gpa, GuestAddress(gpa)).unwrap();
        assert_eq!(ram.memory.read_obj::<u64>(GuestAddress(gpa)).unwrap(), gpa);
    }
    for gpa in [3 * GIB, 4 * GIB - 8, 5 * GIB] {
        assert!(!ram.memory.address_in_range(GuestAddress(gpa)), "{gpa:#x}");
    }
}

#[test]
fn holes_of_a_file_leave_ram_untouched() {
    use std::os::unix::fs::{FileExt, MetadataExt};
    let mut source = tempfile::tempfile().unwrap();
    source.set_len(8 * MIB).unwrap();
    source.write_all_at(b"first", 0).unwrap();
    source.write_all_at(b"second", 4 * MIB + 5).unwrap();
    let file = RamFile::new(false).unwrap();
    file.target()
        .fill(&mut source, 0, 8 * MIB, 16 * MIB)
        .unwrap();
    assert!(file.file.metadata().unwrap().blocks() * 512 <= MIB);
    let ram = Ram::map(file, &spec(64 * MIB), &[]).unwrap();
    let mut text = [0; 6];
    ram.memory
        .read_slice(&mut text, GuestAddress(20 * MIB + 5))
        .unwrap();
    assert_eq!(&text, b"second");
    let past_the_end = ram.target().fill(&mut source, 8 * MIB - 1, 2, 32 * MIB);
    assert_eq!(
        past_the_end.unwrap_err().kind(),
        io::ErrorKind::UnexpectedEof
    );
}

#[test]
fn both_pieces_are_parts_of_one_file() {
    let ram = Ram::new(&spec(4 * GIB)).unwrap();
    let offsets: Vec<_> = ram
        .regions
        .iter()
        .map(|(_, r)| r.file_offset().unwrap().start())
        .collect();
    assert_eq!(offsets, [0, 3 * GIB]);
}
