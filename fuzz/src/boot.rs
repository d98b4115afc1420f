//! Files that a VM boots from: a kernel, an initrd, an image. Whoever installs them is trusted; a file that
//! is damaged or is another file must be an error.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use sepal_protocol::image::TRAILER;
use sepal_protocol::vm::{KvmFlavour, MemorySpec};
use sepal_vmm::acpi;
use sepal_vmm::boot::{Source, load_initrd, load_kernel, open_image, write_boot_data};
use sepal_vmm::memory::{Layout, MIN_RAM, Ram, RamFile};

use crate::guest::memory_file;
use crate::input::Input;

fn path_of(file: &impl AsRawFd) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// An ELF kernel, loaded into RAM, with an initrd and all that a CPU finds when it starts.
pub fn boot(data: &[u8]) {
    let mut input = Input::new(data);
    let options = input.byte();
    let (initrd_size, kernel) = (input.u32(), input.rest());
    let file = memory_file(0);
    file.write_all_at(&kernel, 0).expect("a file in memory");
    // Kernels are larger than inputs: holes stand for what is not looked at.
    if options & 1 != 0 {
        file.set_len(16 << 20).expect("a file in memory");
    }
    let path = path_of(&file);
    let spec = MemorySpec {
        size: MIN_RAM,
        max: 0,
        hugepages: false,
        max_huge: 0,
        mergeable: false,
    };
    let layout = Layout::new(spec.size).expect("the least RAM is possible");
    let target = RamFile::new(false).expect("memory is left");
    let share = options & 2 != 0;
    let Ok(kernel) = load_kernel(
        Source::kernel(&path).expect("it is there"),
        target.target(),
        &layout,
        share,
    ) else {
        return;
    };
    assert!(kernel.end <= layout.low, "a kernel beyond RAM");
    let kernel = kernel
        .check_flavour(&path, KvmFlavour::Hardware)
        .expect("hardware runs any kernel");
    let initrd_file = memory_file(initrd_size.into());
    let initrd = Source::initrd(&path_of(&initrd_file)).expect("it is there");
    let initrd = load_initrd(initrd, target.target(), &layout, &kernel).ok();
    if let Some((start, size)) = initrd {
        assert!(start >= kernel.end && start + size <= layout.low);
    }
    let ram = Ram::map(target, &spec, &[]).expect("memory is left");
    if let Some(pages) = &kernel.shared {
        ram.share(pages).expect("a kernel's pages lie in RAM");
    }
    let rsdp = acpi::write(&ram.memory, &layout, 1 + (options >> 2)).expect("64 CPUs have room");
    let entry = write_boot_data(&ram.memory, &layout, &kernel, initrd, "console=hvc0", rsdp);
    assert!(entry.is_ok_and(|entry| entry.rip == kernel.entry));
}

/// A guest image by its trailer.
pub fn image(data: &[u8]) {
    let mut input = Input::new(data);
    let length = u64::from(input.u32()) % (64 << 20);
    let file = memory_file(length);
    let trailer = input.rest();
    let at = length.saturating_sub(TRAILER as u64);
    file.write_all_at(&trailer, at).expect("a file in memory");
    let _ = open_image(&path_of(&file));
    let _ = open_image(Path::new("/dev/null"));
}
