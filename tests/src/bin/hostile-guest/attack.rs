//! What is done to a device.

use std::fmt;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use crate::arena::{Arena, BUFFERS, PAGE, TABLES};
use crate::chance::Chance;
use crate::device::{Device, register};

/// Where a queue was put that a device has been told of.
#[derive(Clone, Copy, Default)]
pub struct Queue {
    pub descriptors: usize,
    pub available: usize,
    pub used: usize,
    pub size: u16,
}

#[derive(Default)]
pub struct Counts {
    pub actions: u64,
    pub starts: u64,
    pub notified: u64,
    pub completed: u64,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            actions,
            starts,
            notified,
            completed,
        } = self;
        write!(
            f,
            "{actions} actions, {starts} starts, {notified} notifications, {completed} completions"
        )
    }
}

/// One device under attack.
pub struct Attack {
    pub device: Device,
    pub arena: Arena,
    pub chance: Chance,
    pub kind: u16,
    pub queues: Vec<Queue>,
    pub counts: Counts,
}

impl Attack {
    /// Resets the device and sets it up, as the specification has it or nearly so.
    pub fn start(&mut self) {
        let common = self.device.common;
        let chance = &mut self.chance;
        common.write(register::STATUS, 0_u8);
        for status in [1_u8, 3] {
            common.write(register::STATUS, status);
        }
        for select in 0..2_u32 {
            common.write(register::DEVICE_FEATURE_SELECT, select);
            let offered: u32 = common.read(register::DEVICE_FEATURE);
            let taken = match chance.below(8) {
                0 => chance.next() as u32,
                1 => offered & chance.next() as u32 | select,
                _ => offered,
            };
            common.write(register::DRIVER_FEATURE_SELECT, select);
            common.write(register::DRIVER_FEATURE, taken);
        }
        common.write(register::STATUS, 11_u8);
        common.write(register::CONFIG_VECTOR, chance.next() as u16);
        let count: u16 = common.read(register::NUM_QUEUES);
        self.queues.clear();
        for index in 0..count.min(16) {
            common.write(register::QUEUE_SELECT, index);
            let most: u16 = common.read(register::QUEUE_SIZE);
            let size = match chance.below(10) {
                0 => chance.number() as u16,
                1 => most.wrapping_mul(2),
                2 => 1,
                _ => chance.of(&[most, 8, 64]).min(most.max(1)),
            };
            let page = |chance: &mut Chance| chance.below(TABLES as u64 - 8) as usize;
            let queue = Queue {
                descriptors: page(chance) * PAGE,
                available: page(chance) * PAGE,
                used: page(chance) * PAGE,
                size: size.clamp(1, 256),
            };
            let mut place = |offset: usize| match chance.below(16) {
                0 => self.arena.nowhere(chance),
                1 => self.arena.pages[offset / PAGE] + chance.below(16),
                _ => self.arena.pages[offset / PAGE],
            };
            let places = [
                (register::QUEUE_DESCRIPTORS, place(queue.descriptors)),
                (register::QUEUE_DRIVER, place(queue.available)),
                (register::QUEUE_DEVICE, place(queue.used)),
            ];
            common.write(register::QUEUE_SIZE, size);
            for (at, address) in places {
                common.write(at, address as u32);
                common.write(at + 4, (address >> 32) as u32);
            }
            common.write(register::QUEUE_VECTOR, chance.of(&[0xffff, index, 0x800]));
            if !chance.one_in(12) {
                common.write(register::QUEUE_ENABLE, 1_u16);
            }
            self.arena.window.write(queue.available, 0_u32);
            self.queues.push(queue);
        }
        common.write(
            register::STATUS,
            if self.chance.one_in(16) { 0xff_u8 } else { 15 },
        );
        self.counts.starts += 1;
    }

    /// Bytes that are nearly a request of this device's.
    pub fn request(&mut self, at: usize) {
        let chance = &mut self.chance;
        let window = self.arena.window;
        for offset in (0..128).step_by(8) {
            window.write(
                at + offset,
                if chance.one_in(3) { chance.number() } else { 0 },
            );
        }
        match self.kind {
            // virtio-net: flags, type of segmentation, header's length, size, checksum's place.
            1 => {
                window.write(at, chance.of(&[0_u8, 1, 2, 0xff]));
                window.write(at + 1, chance.of(&[0_u8, 1, 3, 4, 5, 0x81, 0xff]));
                window.write(at + 2, chance.number() as u16);
                window.write(at + 4, chance.number() as u16);
                window.write(at + 6, chance.number() as u16);
                window.write(at + 8, chance.number() as u16);
            }
            // virtio-blk: type, sector.
            2 => {
                window.write(at, chance.of(&[0_u32, 1, 4, 8, 11, 13, 14, u32::MAX]));
                window.write(at + 8, chance.number());
            }
            // virtio-vsock: both ids and ports, length, type, operation, flags, credit.
            19 => {
                window.write(at, chance.of(&[3_u64, 2, 1, 0, u64::MAX]));
                window.write(at + 8, chance.of(&[2_u64, 2, 2, 3, 0, u64::MAX]));
                window.write(at + 16, chance.of(&[1024_u32, 1025, 1026, 5000]));
                window.write(at + 20, chance.of(&[1024_u32, 1025, 1026, 5000]));
                window.write(at + 24, chance.of(&[0_u32, 1, 4096, 65536, u32::MAX]));
                window.write(at + 28, chance.of(&[1_u16, 1, 2, 0xffff]));
                window.write(at + 30, chance.below(9) as u16);
                window.write(at + 32, chance.below(8) as u32);
                window.write(at + 36, chance.number() as u32);
                window.write(at + 40, chance.number() as u32);
            }
            // virtio-mem: type, address, blocks.
            24 => {
                window.write(at, chance.below(6) as u16);
                window.write(at + 8, chance.of(&[0x1_0000_0000_u64, 0, !0x1f_ffff]));
                window.write(at + 16, chance.number() as u16);
            }
            // virtio-fs: the header of FUSE, and what its calls begin with.
            26 => {
                window.write(at, chance.of(&[40_u32, 48, 56, 64, 4096, 0, u32::MAX]));
                window.write(at + 4, chance.below(55) as u32);
                window.write(at + 16, chance.of(&[1_u64, 1, 2, 3, u64::MAX]));
            }
            _ => {}
        }
    }

    /// Fills a table of descriptors, puts some of them on offer, and tells the device.
    pub fn offer(&mut self) {
        if self.queues.is_empty() {
            return;
        }
        let index = self.chance.below(self.queues.len() as u64) as usize;
        let queue = self.queues[index];
        let window = self.arena.window;
        for number in 0..queue.size {
            let at = queue.descriptors + usize::from(number) * 16;
            self.arena
                .describe(at, queue.size, number, true, &mut self.chance);
        }
        for table in TABLES..BUFFERS {
            let number = self.chance.below(256) as u16;
            let at = table * PAGE + usize::from(number) * 16;
            self.arena
                .describe(at, 256, number, false, &mut self.chance);
        }
        for _ in 0..8 {
            let page = Arena::buffer(&mut self.chance);
            self.request(page * PAGE);
        }
        let chance = &mut self.chance;
        for slot in 0..queue.size {
            let head = if chance.one_in(12) {
                chance.next() as u16
            } else {
                chance.below(queue.size.into()) as u16
            };
            window.write(queue.available + 4 + usize::from(slot) * 2, head);
        }
        let index_at = queue.available + 2;
        let more = if chance.one_in(10) {
            chance.next() as u16
        } else {
            chance.below(u64::from(queue.size) + 1) as u16
        };
        let before: u16 = window.read(queue.used + 2);
        window.write(index_at, window.read::<u16>(index_at).wrapping_add(more));
        self.notify(index as u16);
        let mut after: u16 = window.read(queue.used + 2);
        // Now and then it gets the time to answer.
        let waits = if self.chance.one_in(16) { 10 } else { 0 };
        for _ in 0..waits {
            if after != before {
                break;
            }
            std::thread::sleep(Duration::from_micros(100));
            after = window.read(queue.used + 2);
        }
        self.counts.completed += u64::from(after.wrapping_sub(before).min(queue.size));
    }

    pub fn notify(&mut self, queue: u16) {
        let common = self.device.common;
        common.write(register::QUEUE_SELECT, queue);
        let place: u16 = common.read(register::QUEUE_NOTIFY_OFFSET);
        let offset = usize::from(place) * self.device.notify_multiplier;
        self.device.notify.write(offset, queue);
        self.counts.notified += 1;
    }

    /// One thing, by chance.
    pub fn act(&mut self) {
        self.counts.actions += 1;
        let (common, notify) = (self.device.common, self.device.notify);
        match self.chance.below(100) {
            0..4 => self.start(),
            4..80 => self.offer(),
            80..84 => {
                let at = self.chance.below(register::END) as usize;
                common.write(at, self.chance.number() as u16);
            }
            84..88 => {
                // Also queues that there are not.
                let at = self.chance.below(notify.length as u64) as usize & !1;
                notify.write(at, self.chance.number() as u16);
            }
            88..91 => {
                if let Some(specific) = self.device.specific {
                    let at = self.chance.below(specific.length as u64) as usize;
                    specific.write(at, self.chance.number() as u8);
                    let _: u32 = specific.read(at & !3);
                }
            }
            91..93 => {
                let isr = self.device.isr;
                isr.write(0, self.chance.next() as u8);
                let _: u8 = isr.read(0);
            }
            93..96 => {
                // Anything in the registers, MSI-X's table and pending bits among it.
                let bar = self.chance.of(&self.device.bars);
                let most = bar.length.min(64 << 10) as u64;
                bar.write(
                    self.chance.below(most) as usize & !3,
                    self.chance.number() as u32,
                );
            }
            96..98 => {
                // Past the header, so that the registers stay where they are mapped.
                let at = 0x40 + self.chance.below(0xc0);
                let _ = self
                    .device
                    .config
                    .write_all_at(&[self.chance.next() as u8], at);
            }
            98 => {
                // The header, put right at once.
                let mut header = [0; 64];
                if self.device.config.read_exact_at(&mut header, 0).is_ok() {
                    let at = self.chance.below(64);
                    let _ = self
                        .device
                        .config
                        .write_all_at(&[self.chance.next() as u8], at);
                    let _ = self.device.config.write_all_at(&header, 0);
                }
            }
            _ => {
                // The index far ahead, and a device that is told of all queues at once.
                for queue in self.queues.clone() {
                    self.arena
                        .window
                        .write(queue.available + 2, self.chance.next() as u16);
                }
                for index in 0..self.queues.len() {
                    self.notify(index as u16);
                }
            }
        }
    }
}
