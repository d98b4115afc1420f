//! The loader meets kernels whole, cut off and made up.

use std::io::Write;
use std::path::Path;

use sepal_protocol::vm::MemorySpec;
use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::Ram;

const ENTRY: u64 = 0x100_0000;

fn ram() -> Ram {
    let spec = MemorySpec {
        size: 64 * MIB,
        max: 0,
        hugepages: false,
        max_huge: 0,
        mergeable: false,
    };
    Ram::new(&spec).unwrap()
}

#[test]
fn a_kernel_says_that_it_can_do_without_hardware_virtualization() {
    let notes = [
        // Another's, of a length that is no multiple of 4, then ours.
        &[4, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0][..],
        b"Xen\0hello\0\0\0",
        &[6, 0, 0, 0, 4, 0, 0, 0, 1, 0, 0, 0],
        b"Sepal\0\0\0\x01\0\0\0",
    ]
    .concat();
    let mut file = elf(
        ENTRY,
        &[(4096, ENTRY, 64, 64), (8192, 0, notes.len() as u64, 0)],
    );
    file[64 + 56..][..4].copy_from_slice(&4_u32.to_le_bytes()); // PT_NOTE
    let kernel_of = |notes: &[u8]| {
        let mut file = file.clone();
        file.truncate(8192);
        file.extend_from_slice(notes);
        let named = NamedTempFile::new().unwrap();
        named.as_file().write_all(&file).unwrap();
        let ram = ram();
        load_kernel(
            Source::kernel(named.path()).unwrap(),
            ram.target(),
            &ram.layout,
            false,
        )
        .unwrap()
    };
    let ours = kernel_of(&notes);
    assert!(ours.deprivileged);
    let path = Path::new("vmlinux");
    for (kernel, flavour, fits) in [
        (ours.clone(), KvmFlavour::Deprivileged, true),
        (ours, KvmFlavour::Hardware, true),
        (kernel_of(&notes[..36]), KvmFlavour::Hardware, true),
        (kernel_of(&notes[..36]), KvmFlavour::Deprivileged, false),
    ] {
        assert_eq!(kernel.check_flavour(path, flavour).is_ok(), fits);
    }
    // Lengths that lead out of the segment.
    let mut wild = notes.clone();
    wild[..8].fill(0xff);
    assert!(!kernel_of(&wild).deprivileged);
}

/// The segment that the guest only reads comes from the file's own pages, all else is a copy.
#[test]
fn code_is_mapped_and_data_copied() {
    let (code, data) = (ENTRY, ENTRY + 0x4000);
    let mut file = elf(
        ENTRY,
        &[(0x1000, code, 0x2800, 0x2800), (0x4000, data, 64, 64)],
    );
    file[64 + 56 + 4] |= 2; // PF_W of the second
    let named = NamedTempFile::new().unwrap();
    named.as_file().write_all(&file).unwrap();
    let byte = |ram: &Ram, gpa| ram.memory.read_obj::<u8>(GuestAddress(gpa)).unwrap();

    let ram = ram();
    let kernel = load_kernel(
        Source::kernel(named.path()).unwrap(),
        ram.target(),
        &ram.layout,
        true,
    )
    .unwrap();
    assert_eq!((byte(&ram, code), byte(&ram, data)), (0, 2));
    // A part of a page cannot be mapped.
    assert_eq!(byte(&ram, code + 0x2000), 1);
    let pages = kernel.shared.unwrap();
    assert_eq!((pages.gpa, pages.size), (code, 0x2000));
    ram.share(&pages).unwrap();
    assert_eq!((byte(&ram, code), byte(&ram, code + 0x1fff)), (1, 1));
    // What the guest writes stays its own.
    ram.memory.write_obj(9_u8, GuestAddress(code)).unwrap();
    assert_eq!(byte(&ram, code), 9);
    assert_eq!(std::fs::read(named.path()).unwrap(), file);
    let outside = FilePages {
        gpa: 63 * MIB,
        size: 2 * MIB,
        ..pages.clone()
    };
    assert!(ram.share(&outside).is_err());
    let odd = FilePages { offset: 1, ..pages };
    assert!(ram.share(&odd).is_err());
}

#[test]
fn an_image_is_whole_or_refused() {
    let trailer = format!(
        "{}\nversion=1\nvariant=release\nsize={}\n",
        image::MAGIC,
        2 * MIB
    );
    let mut file = vec![0_u8; 2 * MIB as usize];
    let at = file.len() - image::TRAILER;
    file[at..][..trailer.len()].copy_from_slice(trailer.as_bytes());
    let open = |bytes: &[u8]| {
        let file = NamedTempFile::new().unwrap();
        file.as_file().write_all(bytes).unwrap();
        open_image(file.path())
    };
    assert!(open(&file).is_ok());
    for length in [0, 512, MIB as usize, file.len() - 1] {
        let error = open(&file[..length]).unwrap_err();
        assert!(matches!(error, Error::Image { .. }), "{error}");
    }
}

/// (file offset, gpa, file size, memory size) of each PT_LOAD.
type Load = (u64, u64, u64, u64);

/// An ELF file for x86-64 whose segments are filled with their number plus one.
fn elf(entry: u64, loads: &[Load]) -> Vec<u8> {
    let mut file = vec![0_u8; 64];
    file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    file[16..18].copy_from_slice(&2_u16.to_le_bytes());
    file[18..20].copy_from_slice(&62_u16.to_le_bytes());
    file[24..32].copy_from_slice(&entry.to_le_bytes());
    file[32..40].copy_from_slice(&64_u64.to_le_bytes());
    file[54..56].copy_from_slice(&56_u16.to_le_bytes());
    file[56..58].copy_from_slice(&(loads.len() as u16).to_le_bytes());
    for (offset, gpa, file_size, memory_size) in loads {
        file.extend_from_slice(&1_u32.to_le_bytes());
        file.extend_from_slice(&5_u32.to_le_bytes());
        for value in [
            offset,
            &0xffff_8000_0000_0000,
            gpa,
            file_size,
            memory_size,
            &0x20_0000,
        ] {
            file.extend_from_slice(&value.to_le_bytes());
        }
    }
    for (number, (offset, _, size, _)) in loads.iter().enumerate() {
        if *size > 1 << 20 || *offset > 1 << 20 {
            continue; // told, but not there
        }
        let end = (offset + size) as usize;
        file.resize(file.len().max(end), 0);
        file[*offset as usize..end].fill(number as u8 + 1);
    }
    file
}

fn good() -> Vec<u8> {
    elf(
        ENTRY,
        &[
            (0x1000, ENTRY, 0x2000, 0x2000),
            (0x3000, 0x180_0000, 0x1000, 0x3000),
        ],
    )
}

fn load(bytes: &[u8]) -> (Ram, Result<Kernel, Error>) {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    let ram = ram();
    let loaded = load_kernel(
        Source::kernel(file.path()).unwrap(),
        ram.target(),
        &ram.layout,
        false,
    );
    (ram, loaded)
}

#[test]
fn segments_go_where_the_headers_say() {
    let (ram, loaded) = load(&good());
    let kernel = loaded.unwrap();
    assert_eq!((kernel.entry, kernel.end), (ENTRY, 0x180_3000));
    let byte = |gpa| ram.memory.read_obj::<u8>(GuestAddress(gpa)).unwrap();
    assert_eq!(
        [byte(ENTRY - 1), byte(ENTRY), byte(ENTRY + 0x1fff)],
        [0, 1, 1]
    );
    assert_eq!(
        [byte(0x180_0000), byte(0x180_0fff), byte(0x180_1000)],
        [2, 2, 0]
    );
}

#[test]
fn a_kernel_cut_off_anywhere_is_refused_without_harm() {
    let whole = good();
    for length in [
        0,
        3,
        4,
        63,
        64,
        100,
        175,
        176,
        0x1000,
        0x2fff,
        whole.len() - 1,
    ] {
        let (_, loaded) = load(&whole[..length]);
        match loaded.unwrap_err() {
            Error::NotAKernel { .. } => assert!(length < 4, "{length}"),
            Error::Truncated { needed, .. } => assert!(needed > length as u64),
            other => panic!("{length}: {other}"),
        }
    }
}

#[test]
fn what_is_no_kernel_is_called_so() {
    let patched = |at: usize, byte: u8| {
        let mut bytes = good();
        bytes[at] = byte;
        bytes
    };
    let mut bz_image = vec![0_u8; 4096];
    bz_image[0x202..0x206].copy_from_slice(b"HdrS");
    // Program headers at the end of the address space.
    let mut far_headers = good();
    far_headers[32..40].fill(0xff);
    let cases = [
        bz_image,
        patched(4, 1),     // 32-bit
        patched(5, 2),     // big-endian
        patched(16, 3),    // a shared object
        patched(18, 0xb7), // AArch64
        patched(54, 32),   // headers of another size
        patched(56, 0),    // no headers
        far_headers,
        elf(0x300_0000, &[(0x1000, ENTRY, 0x1000, 0x1000)]), // entry elsewhere
        elf(ENTRY, &[(0x1000, ENTRY, 0x2000, 0x1000)]),      // more in the file than in memory
        elf(0x1000, &[(0x1000, 0x1000, 0x1000, 0x1000)]),    // over the boot data
        elf(ENTRY, &[(u64::MAX, ENTRY, 16, 16)]),
        elf(
            ENTRY,
            &[(0x1000, u64::MAX - 7, 16, 16), (0x1000, ENTRY, 16, 16)],
        ),
    ];
    for (number, bytes) in cases.iter().enumerate() {
        let (_, loaded) = load(bytes);
        let error = loaded.unwrap_err();
        assert!(
            matches!(error, Error::NotAKernel { .. }),
            "{number}: {error}"
        );
        assert!(error.to_string().contains("vmlinux"), "{error}");
    }
}

#[test]
fn a_kernel_larger_than_ram_names_the_remedy() {
    let (_, loaded) = load(&elf(ENTRY, &[(0x1000, ENTRY, 0x1000, 1 << 30)]));
    let error = loaded.unwrap_err();
    assert!(
        matches!(error, Error::NoRoom { needed: 1040, .. }),
        "{error}"
    );
    assert!(error.to_string().contains("memory limit"));
}

#[test]
fn a_missing_kernel_and_a_directory_are_named() {
    for path in ["/nonexistent/vmlinux", "/tmp"] {
        let Err(error) = Source::kernel(Path::new(path)) else {
            panic!("{path} is no kernel");
        };
        assert!(matches!(error, Error::Open { .. }));
        assert!(error.to_string().contains(path));
    }
}

#[test]
fn the_initrd_lies_at_the_end_of_ram_and_not_over_the_kernel() {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&[7; 5000]).unwrap();
    let ram = ram();
    let kernel = Kernel {
        deprivileged: false,
        shared: None,
        entry: ENTRY,
        end: 0x200_0000,
    };
    let (start, size) = load_initrd(
        Source::initrd(file.path()).unwrap(),
        ram.target(),
        &ram.layout,
        &kernel,
    )
    .unwrap();
    assert_eq!((start, size), (64 * MIB - 8192, 5000));
    assert_eq!(
        ram.memory
            .read_obj::<u8>(GuestAddress(start + 4999))
            .unwrap(),
        7
    );

    let kernel = Kernel {
        deprivileged: false,
        shared: None,
        entry: ENTRY,
        end: 64 * MIB - 4096,
    };
    let error = load_initrd(
        Source::initrd(file.path()).unwrap(),
        ram.target(),
        &ram.layout,
        &kernel,
    )
    .unwrap_err();
    assert!(matches!(error, Error::NoRoom { what: "initrd", .. }));
}

#[test]
fn the_zero_page_tells_of_memory_and_command_line() {
    let ram = ram();
    let kernel = Kernel {
        deprivileged: false,
        shared: None,
        entry: ENTRY,
        end: 0x200_0000,
    };
    let line = "console=hvc0 quiet";
    let initrd = Some((0x300_0000, 1234));
    let entry = write_boot_data(&ram.memory, &ram.layout, &kernel, initrd, line, 0xe0000).unwrap();
    let mut page = [0_u8; 4096];
    ram.memory
        .read_slice(&mut page, GuestAddress(entry.zero_page))
        .unwrap();
    assert_eq!(&page[0x202..0x206], b"HdrS");
    assert_eq!(u64_at(&page, 0x70), 0xe0000);
    assert_eq!(u32_at(&page, 0x218), 0x300_0000);
    assert_eq!(u32_at(&page, 0x21c), 1234);
    let mut text = vec![0; line.len() + 1];
    let at = u32_at(&page, 0x228);
    ram.memory
        .read_slice(&mut text, GuestAddress(at.into()))
        .unwrap();
    assert_eq!(text, b"console=hvc0 quiet\0");
    let usable: u64 = (0..usize::from(page[0x1e8]))
        .map(|n| 0x2d0 + 20 * n)
        .filter(|at| u32_at(&page, at + 16) == E820_RAM)
        .map(|at| u64_at(&page, at + 8))
        .sum();
    assert_eq!(usable, 64 * MIB - (MIB - LOW_END));
}

#[test]
fn the_boot_cpu_starts_in_long_mode() {
    let mut sregs = kvm_sregs::default();
    Entry {
        rip: ENTRY,
        zero_page: ZERO_PAGE,
    }
    .apply(&mut sregs);
    assert_eq!(
        (sregs.cs.selector, sregs.cs.l, sregs.cs.type_),
        (0x10, 1, 0xb)
    );
    assert_eq!(
        (sregs.ss.selector, sregs.ss.s, sregs.ss.type_),
        (0x18, 1, 0x3)
    );
    assert_eq!(sregs.efer & 0x500, 0x500);
}

#[test]
fn a_command_line_that_is_too_long_is_refused() {
    let ram = ram();
    let kernel = Kernel {
        deprivileged: false,
        shared: None,
        entry: ENTRY,
        end: 0x200_0000,
    };
    for line in ["x".repeat(COMMAND_LINE_MAX), "a\0b".into()] {
        let done = write_boot_data(&ram.memory, &ram.layout, &kernel, None, &line, 0);
        assert!(matches!(done, Err(Error::CommandLine { .. })));
    }
}
