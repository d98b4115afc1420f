//! What a guest that is out for harm does to one of its devices, from the guest's own user space:
//!
//! ```text
//! hostile-guest DEVICE SECONDS SEED FILE
//! ```
//!
//! DEVICE is a virtio device by its number (virtio 1.2, section 5). The program takes the device from its
//! driver and goes on as a driver that is broken or malicious: queues anywhere, rings and descriptors full
//! of garbage, requests that are nearly right, registers and PCI configuration written at random. What a
//! device writes by its order goes to pages of its own or to where there is no memory, so that the guest
//! lives to go on. It needs the guest's root, which a privileged container has. It tells in FILE what it has done
//! so far, also to who finds the guest dead; and on standard output what it attacks.

mod arena;
mod attack;
mod chance;
mod device;

use std::fs::File;
use std::io::Write;
use std::time::{Duration, Instant};

use arena::Arena;
use attack::{Attack, Counts};
use chance::Chance;
use device::{Device, find, unbind};
use rustix::mm::{MlockAllFlags, mlockall};

/// Device number of virtio-fs, behind which FILE is.
const FS: u16 = 26;
/// How often it is told what was done.
const TOLD: Duration = Duration::from_millis(100);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let [kind, seconds, seed, file] = &words[..] else {
        return Err("usage: hostile-guest DEVICE SECONDS SEED FILE".into());
    };
    let (kind, seconds, seed): (u16, u64, u64) = (kind.parse()?, seconds.parse()?, seed.parse()?);
    // The file that this program is in may be behind the device.
    mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE)?;
    // Not by the device that is attacked: standard output goes by vsock.
    let mut out: Box<dyn Write> = if kind == FS {
        Box::new(std::io::stdout())
    } else {
        Box::new(File::options().append(true).create(true).open(file)?)
    };
    // If there is still a way to.
    let mut tell = |what: &str| drop(writeln!(out, "{what}").and_then(|()| out.flush()));
    let folders = find(kind);
    let folder = folders.first().ok_or("the guest has no such device")?;
    let arena = Arena::new()?;
    let taken = unbind(folder);
    let device = Device::open(folder)?;
    let mut attack = Attack {
        device,
        arena,
        chance: Chance(seed | 1),
        kind,
        queues: Vec::new(),
        counts: Counts::default(),
    };
    let end = Instant::now() + Duration::from_secs(seconds);
    attack.start();
    tell(&format!("{}: attacked", folder.display()));
    if !taken {
        tell("its driver has it, too");
    }
    let mut told = None::<Instant>;
    while Instant::now() < end {
        for _ in 0..64 {
            attack.act();
        }
        // A device that has given up is begun anew.
        attack.start();
        if told.is_none_or(|told| told.elapsed() >= TOLD) {
            told = Some(Instant::now());
            tell(&format!("so far {}", attack.counts));
        }
    }
    tell(&format!("in all {}", attack.counts));
    Ok(())
}
