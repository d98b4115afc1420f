//! The device against a model: the numbers of the blocks that are plugged, and what is in them.

use std::collections::BTreeSet;

use proptest::collection::vec;
use proptest::prelude::*;

use super::mem::{BLOCK, Mem};
use super::mem_test_driver::{
    ACK, BUSY, COUNT, Driver, ERROR, NACK, PLUG, REGION, STATE, UNPLUG, UNPLUG_ALL, request,
};
use super::testing::cases;

/// Blocks of the region behind its RAM: nothing is there that could be given back.
const BEYOND: u64 = 2;

#[derive(Debug, Clone)]
struct Request {
    kind: u16,
    gpa: u64,
    blocks: u16,
    /// Bytes of it that the guest sends.
    length: usize,
}

#[derive(Debug, Clone)]
enum Step {
    Ask(Request),
    /// The host wants the guest to have so many bytes, of the first so many.
    Resize(u64, u64),
    /// The guest writes to a block, if it has it.
    Touch(u64),
    Restart,
}

fn gpa() -> impl Strategy<Value = u64> {
    let block = (0..COUNT + BEYOND + 2).prop_map(|block| REGION + block * BLOCK);
    let unaligned = (0..COUNT, 1..BLOCK).prop_map(|(block, at)| REGION + block * BLOCK + at);
    let outside = prop_oneof![
        (0..=REGION / BLOCK).prop_map(|block| block * BLOCK),
        (1..64_u64).prop_map(|block| 0_u64.wrapping_sub(block * BLOCK)),
        any::<u64>(),
    ];
    prop_oneof![12 => block, 1 => unaligned, 1 => outside]
}

fn ask() -> impl Strategy<Value = Step> {
    let kind = prop_oneof![
        8 => Just(PLUG),
        6 => Just(UNPLUG),
        1 => Just(UNPLUG_ALL),
        4 => Just(STATE),
        1 => any::<u16>(),
    ];
    let blocks = prop_oneof![12 => 0..5_u16, 1 => any::<u16>()];
    let length = prop_oneof![12 => Just(24_usize), 1 => 1..24_usize];
    (kind, gpa(), blocks, length).prop_map(|(kind, gpa, blocks, length)| {
        Step::Ask(Request {
            kind,
            gpa,
            blocks,
            length,
        })
    })
}

fn size() -> impl Strategy<Value = u64> {
    let blocks = (0..COUNT + BEYOND + 2).prop_map(|blocks| blocks * BLOCK);
    prop_oneof![6 => blocks, 1 => 0..COUNT * BLOCK, 1 => any::<u64>()]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        16 => ask(),
        4 => (size(), size()).prop_map(|(requested, usable)| Step::Resize(requested, usable)),
        8 => (0..COUNT).prop_map(Step::Touch),
        1 => Just(Step::Restart),
    ]
}

#[derive(Default)]
struct Model {
    /// Memory is there as soon as it is plugged.
    taken: bool,
    region: u64,
    requested: u64,
    usable: u64,
    plugged: BTreeSet<u64>,
    /// Blocks that the guest has written to since they were plugged.
    touched: BTreeSet<u64>,
}

impl Model {
    fn answer(&mut self, request: &Request) -> [u16; 2] {
        let Request {
            kind,
            blocks,
            length,
            ..
        } = *request;
        if length >= 8 && kind == UNPLUG_ALL {
            return [self.unplug(&(0..self.usable / BLOCK).collect()), 0];
        }
        let Some(range) = self.range(request).filter(|_| length >= 18) else {
            return [ERROR, 0];
        };
        let plugged = range.intersection(&self.plugged).count();
        let (all, none) = (plugged == range.len(), plugged == 0);
        match kind {
            STATE if all => [ACK, 0],
            STATE if none => [ACK, 1],
            STATE => [ACK, 2],
            PLUG if none => {
                let after = self.plugged.len() as u64 + u64::from(blocks);
                if after * BLOCK > self.requested {
                    return [NACK, 0];
                }
                self.plugged.extend(range);
                [ACK, 0]
            }
            UNPLUG if all => [self.unplug(&range), 0],
            _ => [ERROR, 0],
        }
    }

    /// The blocks that a request is about, if it may be.
    fn range(&self, request: &Request) -> Option<BTreeSet<u64>> {
        let start = i128::from(request.gpa) - i128::from(REGION);
        let end = start + i128::from(request.blocks) * i128::from(BLOCK);
        let good = start >= 0
            && end > start
            && end <= i128::from(self.usable)
            && start % i128::from(BLOCK) == 0;
        let first = start as u64 / BLOCK;
        good.then(|| (first..first + u64::from(request.blocks)).collect())
    }

    fn unplug(&mut self, range: &BTreeSet<u64>) -> u16 {
        // What is asked to go is gone, also where it could not go as a whole.
        self.touched.retain(|block| !range.contains(block));
        if range.iter().any(|block| *block >= COUNT) {
            return BUSY;
        }
        self.plugged.retain(|block| !range.contains(block));
        ACK
    }

    fn agrees_with(&self, driver: &Driver) {
        let plugged = self.plugged.len() as u64 * BLOCK;
        assert_eq!(driver.control.plugged(), plugged);
        let (usable, requested) = (self.usable, self.requested);
        assert_eq!(
            driver.config(),
            [BLOCK, 0, REGION, self.region, usable, plugged, requested]
        );
        for block in 0..COUNT {
            let touched = self.touched.contains(&block);
            assert_eq!(driver.holds(block), touched, "memory of block {block}");
            // Only now: to read is to touch.
            if touched {
                assert!(driver.touched(block), "block {block} has lost its bytes");
            }
        }
        if self.taken {
            // Requests and rings are small.
            assert_eq!(driver.resident() / BLOCK * BLOCK, plugged);
        }
    }
}

proptest! {
    #![proptest_config(cases(64))]

    #[test]
    fn any_requests_are_answered_as_by_a_set_of_blocks_and_its_memory_is_there(
        taken: bool,
        requested in 0..=COUNT,
        steps in vec(step(), 0..60),
    ) {
        let blocks = if taken { COUNT } else { COUNT + BEYOND };
        let region = blocks * BLOCK;
        let mut driver = Driver::new(Mem::new(REGION, region, taken));
        let mut model = Model { taken, region, ..Model::default() };
        let mut changes = 0;
        let start = Step::Resize(requested * BLOCK, COUNT * BLOCK);
        for step in std::iter::once(start).chain(steps) {
            match step {
                Step::Ask(ask) => {
                    let bytes = request(ask.kind, ask.gpa, ask.blocks);
                    let answer = driver.send(&bytes[..ask.length]);
                    assert_eq!(answer, model.answer(&ask), "{ask:?}");
                }
                Step::Resize(requested, usable) => {
                    assert!(driver.control.request(requested, usable));
                    changes += 1;
                    model.requested = requested;
                    model.usable = model.usable.max(usable.min(region));
                }
                Step::Touch(block) if model.plugged.contains(&block) => {
                    driver.touch(block, 1);
                    model.touched.insert(block);
                }
                Step::Touch(_) => {}
                Step::Restart => driver.restart(),
            }
            model.agrees_with(&driver);
            assert_eq!(driver.guest.interrupt.config_changes(), changes);
        }
    }
}
