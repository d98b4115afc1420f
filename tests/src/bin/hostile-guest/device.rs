//! One of the guest's virtio devices, taken from its driver.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::time::Duration;

use rustix::mm::{MapFlags, ProtFlags, mmap};

use crate::arena::Window;

/// How long the driver may take to let go of the device.
const UNBIND: Duration = Duration::from_secs(5);
const PCI_VENDOR: u16 = 0x1af4;
/// PCI device ids of virtio devices begin here (virtio 1.2, section 4.1.2).
const PCI_DEVICE: u16 = 0x1040;

/// A part of a device's registers, by its virtio capability (virtio 1.2, section 4.1.4).
#[derive(Clone, Copy)]
pub struct Region {
    pub window: Window,
    pub offset: usize,
    pub length: usize,
}

impl Region {
    pub fn write<T: Copy>(&self, offset: usize, value: T) {
        self.window.write(self.offset + offset, value);
    }

    pub fn read<T: Copy + Default>(&self, offset: usize) -> T {
        self.window.read(self.offset + offset)
    }
}

pub struct Device {
    pub config: File,
    pub bars: Vec<Window>,
    pub common: Region,
    pub notify: Region,
    pub notify_multiplier: usize,
    pub isr: Region,
    pub specific: Option<Region>,
}

fn number_in(path: &Path) -> Option<u16> {
    let text = fs::read_to_string(path).ok()?;
    u16::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
}

/// The folders of all devices of a kind.
pub fn find(kind: u16) -> Vec<PathBuf> {
    let all = fs::read_dir("/sys/bus/pci/devices")
        .into_iter()
        .flatten()
        .flatten();
    let mut found: Vec<_> = all
        .map(|entry| entry.path())
        .filter(|folder| {
            number_in(&folder.join("vendor")) == Some(PCI_VENDOR)
                && number_in(&folder.join("device")) == Some(PCI_DEVICE + kind)
        })
        .collect();
    found.sort();
    found
}

/// Takes the device from its driver, unless that clings to it: then both have it.
pub fn unbind(folder: &Path) -> bool {
    let (driver, name) = (
        folder.join("driver/unbind"),
        folder.file_name().map(|n| n.to_owned()),
    );
    let Some(name) = name else { return false };
    let (done, wait) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let written = fs::write(driver, name.as_encoded_bytes());
        let _ = done.send(written.is_ok());
    });
    wait.recv_timeout(UNBIND).unwrap_or(false)
}

impl Device {
    pub fn open(folder: &Path) -> std::io::Result<Self> {
        let config = File::options()
            .read(true)
            .write(true)
            .open(folder.join("config"))?;
        // Memory space and bus master.
        config.write_all_at(&6_u16.to_le_bytes(), 4)?;
        let mut space = [0; 256];
        config.read_exact_at(&mut space, 0)?;
        let mut bars = Vec::new();
        let mut bar_of = [None; 6];
        for (number, bar) in bar_of.iter_mut().enumerate() {
            let Ok(file) = File::options()
                .read(true)
                .write(true)
                .open(folder.join(format!("resource{number}")))
            else {
                continue;
            };
            let length = file.metadata()?.len() as usize;
            if length == 0 {
                continue;
            }
            // SAFETY: a new mapping of a device's registers at an address of the kernel's choice.
            let mapped = unsafe {
                mmap(
                    std::ptr::null_mut(),
                    length,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::SHARED,
                    &file,
                    0,
                )
            };
            // Of a shared memory region (virtio-fs DAX, pmem) not all can be mapped.
            let Ok(base) = mapped else { continue };
            let base =
                NonNull::new(base.cast::<u8>()).ok_or(std::io::ErrorKind::AddrNotAvailable)?;
            let window = Window { base, length };
            bars.push(window);
            *bar = Some(window);
        }
        let byte = |at: usize| usize::from(space.get(at).copied().unwrap_or(0));
        let word = |at: usize| (0..4).map(|i| byte(at + i) << (8 * i)).sum::<usize>();
        let mut regions = [None; 6];
        let mut notify_multiplier = 0;
        let (mut at, mut steps) = (byte(0x34), 0);
        while at != 0 && steps < 48 {
            if byte(at) == 9 {
                let (kind, bar) = (byte(at + 3), byte(at + 4));
                if let (Some(region), Some(Some(window))) = (regions.get_mut(kind), bar_of.get(bar))
                {
                    *region = Some(Region {
                        window: *window,
                        offset: word(at + 8),
                        length: word(at + 12),
                    });
                }
                if kind == 2 {
                    notify_multiplier = word(at + 16);
                }
            }
            (at, steps) = (byte(at + 1), steps + 1);
        }
        let need = |kind: usize| {
            regions[kind].ok_or_else(|| std::io::Error::other(format!("no capability {kind}")))
        };
        Ok(Self {
            config,
            bars,
            common: need(1)?,
            notify: need(2)?,
            notify_multiplier,
            isr: need(3)?,
            specific: regions[4],
        })
    }
}

/// Registers of the common configuration (virtio 1.2, section 4.1.4.3).
pub mod register {
    pub const DEVICE_FEATURE_SELECT: usize = 0;
    pub const DEVICE_FEATURE: usize = 4;
    pub const DRIVER_FEATURE_SELECT: usize = 8;
    pub const DRIVER_FEATURE: usize = 12;
    pub const CONFIG_VECTOR: usize = 16;
    pub const NUM_QUEUES: usize = 18;
    pub const STATUS: usize = 20;
    pub const QUEUE_SELECT: usize = 22;
    pub const QUEUE_SIZE: usize = 24;
    pub const QUEUE_VECTOR: usize = 26;
    pub const QUEUE_ENABLE: usize = 28;
    pub const QUEUE_NOTIFY_OFFSET: usize = 30;
    pub const QUEUE_DESCRIPTORS: usize = 32;
    pub const QUEUE_DRIVER: usize = 40;
    pub const QUEUE_DEVICE: usize = 48;
    pub const END: u64 = 64;
}
