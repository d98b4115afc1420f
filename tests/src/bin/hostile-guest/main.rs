//! What a guest that is out for harm does to one of its devices, from the guest's own user space:
//!
//! ```text
//! hostile-guest DEVICE SECONDS SEED
//! ```
//!
//! DEVICE is a virtio device by its number (virtio 1.2, section 5). The program takes the device from its
//! driver and goes on as a driver that is broken or malicious: queues anywhere, rings and descriptors full
//! of garbage, requests that are nearly right, registers and PCI configuration written at random. What a
//! device writes by its order goes to pages of its own or to where there is no memory, so that the guest
//! lives to go on. It needs the guest's root, which a privileged container has, and prints what it did.

mod arena;
mod attack;
mod chance;
mod device;

use std::io::Write;
use std::time::{Duration, Instant};

use arena::Arena;
use attack::{Attack, Counts};
use chance::Chance;
use device::{Device, find, unbind};
use rustix::mm::{MlockAllFlags, mlockall};

/// Says something, if there is still a way to.
fn tell(what: &str) {
    let mut out = std::io::stdout();
    let _ = writeln!(out, "{what}").and_then(|()| out.flush());
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let [kind, seconds, seed] = &words[..] else {
        return Err("usage: hostile-guest DEVICE SECONDS SEED".into());
    };
    let (kind, seconds, seed): (u16, u64, u64) = (kind.parse()?, seconds.parse()?, seed.parse()?);
    // The file that this program is in may be behind the device.
    mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE)?;
    let folders = find(kind);
    let folder = folders.first().ok_or("the guest has no such device")?;
    // Before the device is gone by which this is told.
    tell(&format!("{}: attacked", folder.display()));
    let taken = unbind(folder);
    let device = Device::open(folder)?;
    if !taken {
        tell("its driver has it, too");
    }
    let mut attack = Attack {
        device,
        arena: Arena::new()?,
        chance: Chance(seed | 1),
        kind,
        queues: Vec::new(),
        counts: Counts::default(),
    };
    let end = Instant::now() + Duration::from_secs(seconds);
    attack.start();
    while Instant::now() < end {
        for _ in 0..64 {
            attack.act();
        }
        // A device that has given up is begun anew.
        attack.start();
    }
    let Counts {
        actions,
        starts,
        notified,
        completed,
    } = attack.counts;
    tell(&format!(
        "{actions} actions, {starts} starts, {notified} notifications, {completed} completions"
    ));
    Ok(())
}
