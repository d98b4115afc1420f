//! The transport seen by a guest's driver: configuration space, registers, interrupts.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::super::msix::{ENABLE, ENTRY};
use super::super::testing::TestWires;
use super::*;
use crate::kvm::Msi;
use crate::virtio::device::{ActivateError, Activation};

const BAR: u64 = 0xc000_8000;
const ACKNOWLEDGED: u8 = 3;
const FEATURES_OK: u8 = 8;
const DRIVER_OK: u8 = 4;
const NEEDS_RESET: u8 = 64;

/// What the transport has done to the device.
#[derive(Default)]
struct Seen {
    active: Mutex<Option<Activation>>,
    resets: AtomicU32,
}

struct Probe {
    seen: Arc<Seen>,
    config: [u8; 8],
    regions: Vec<SharedRegion>,
    refuses: bool,
}

impl VirtioDevice for Probe {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64, 16]
    }

    fn features(&self) -> u64 {
        1 << 5 | 1 << 40
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::virtio::features::read_config(&self.config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (at, byte) in data.iter().enumerate() {
            if let Some(place) = self.config.get_mut(offset as usize + at) {
                *place = *byte;
            }
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.refuses {
            return Err(ActivateError::MissingQueues { got: 0, need: 2 });
        }
        *self.seen.active.lock().unwrap() = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.seen.active.lock().unwrap().take();
        self.seen.resets.fetch_add(1, Ordering::SeqCst);
    }

    fn shared_regions(&self) -> &[SharedRegion] {
        &self.regions
    }
}

/// A guest's driver.
struct Driver {
    function: VirtioPci,
    wires: Arc<TestWires>,
    seen: Arc<Seen>,
}

fn driver_of(probe: Probe) -> Driver {
    driver_with(probe, &[(GuestAddress(0), 1 << 20)])
}

fn driver_with(probe: Probe, ranges: &[(GuestAddress, usize)]) -> Driver {
    let wires = Arc::new(TestWires::default());
    let seen = probe.seen.clone();
    let memory = Arc::new(GuestMemoryMmap::from_ranges(ranges).unwrap());
    let launcher = Arc::new(Launcher::start().unwrap());
    let function = VirtioPci::new(Box::new(probe), memory, wires.clone(), launcher, BAR).unwrap();
    let mut driver = Driver {
        function,
        wires,
        seen,
    };
    driver.set_config(4, &2_u16.to_le_bytes());
    driver
}

fn probe() -> Probe {
    Probe {
        seen: Arc::default(),
        config: *b"abcdefgh",
        regions: Vec::new(),
        refuses: false,
    }
}

impl Driver {
    fn new() -> Self {
        driver_of(probe())
    }

    fn config<const N: usize>(&mut self, at: usize) -> [u8; N] {
        let mut data = [0; N];
        self.function.read_config(at, &mut data);
        data
    }

    fn set_config(&mut self, at: usize, data: &[u8]) {
        self.function.write_config(at, data);
    }

    fn get<const N: usize>(&mut self, at: u64) -> [u8; N] {
        let mut data = [0xaa; N];
        self.function.read_bar(at, &mut data);
        data
    }

    fn set(&mut self, at: u64, data: &[u8]) {
        self.function.write_bar(at, data);
    }

    fn status(&mut self) -> u8 {
        self.get::<1>(0x14)[0]
    }

    /// (offset, id, body) of each capability.
    fn capabilities(&mut self) -> Vec<(usize, u8, [u8; 24])> {
        let mut found = Vec::new();
        let mut at = usize::from(self.config::<1>(0x34)[0]);
        while at != 0 {
            let [id, next] = self.config(at);
            found.push((at, id, self.config(at)));
            at = usize::from(next);
            assert!(found.len() < 32, "capabilities in a loop");
        }
        found
    }

    fn negotiate(&mut self, features: u64) {
        self.set(0x14, &[ACKNOWLEDGED]);
        for (half, value) in [(0_u32, features as u32), (1, (features >> 32) as u32)] {
            self.set(0x08, &half.to_le_bytes());
            self.set(0x0c, &value.to_le_bytes());
        }
        self.set(0x14, &[ACKNOWLEDGED | FEATURES_OK]);
    }

    fn set_up_queue(&mut self, index: u16, size: u16, base: u64) {
        self.set(0x16, &index.to_le_bytes());
        self.set(0x18, &size.to_le_bytes());
        self.set(0x1a, &(index + 1).to_le_bytes());
        for (register, address) in [
            (0x20, base),
            (0x28, base.wrapping_add(0x1000)),
            (0x30, base.wrapping_add(0x2000)),
        ] {
            self.set(register, &(address as u32).to_le_bytes());
            self.set(register + 4, &((address >> 32) as u32).to_le_bytes());
        }
        self.set(0x1c, &1_u16.to_le_bytes());
    }

    fn enable_msix(&mut self) {
        let (at, _, _) = self
            .capabilities()
            .into_iter()
            .find(|c| c.1 == 0x11)
            .unwrap();
        self.set_config(at + 2, &ENABLE.to_le_bytes());
        for vector in 0..3_u64 {
            let entry = TABLE + vector * ENTRY as u64;
            self.set(entry, &0xfee0_0000_u32.to_le_bytes());
            self.set(entry + 8, &(0x40 + vector as u32).to_le_bytes());
            self.set(entry + 12, &0_u32.to_le_bytes());
        }
    }

    fn start(&mut self) {
        self.negotiate(VERSION_1 | 1 << 5);
        self.enable_msix();
        self.set(0x10, &0_u16.to_le_bytes());
        self.set_up_queue(0, 64, 0x10000);
        self.set_up_queue(1, 8, 0x20000);
        self.set(0x14, &[ACKNOWLEDGED | FEATURES_OK | DRIVER_OK]);
    }
}

const VERSION_1: u64 = 1 << 32;

fn message(vector: u32) -> Msi {
    Msi {
        address: 0xfee0_0000,
        data: 0x40 + vector,
    }
}

#[test]
fn a_driver_finds_what_the_specification_promises() {
    let mut driver = Driver::new();
    assert_eq!(driver.config(0), [0xf4, 0x1a, 0x44, 0x10]);
    let bar = u64::from_le_bytes(driver.config(0x10));
    assert_eq!(bar & !0xf, BAR);
    let mut structures = BTreeMap::new();
    for (_, id, body) in driver.capabilities() {
        if id == 9 {
            let field = |at: usize| u32::from_le_bytes(body[at..at + 4].try_into().unwrap());
            assert_eq!(u64::from(field(8)) % 4, 0);
            assert!(u64::from(field(8) + field(12)) <= BAR_SIZE);
            structures.insert(body[3], (body[4], field(8), field(12)));
        }
    }
    assert_eq!(
        structures.keys().copied().collect::<Vec<_>>(),
        [1, 2, 3, 4, 5]
    );
    assert_eq!(structures[&1], (0, 0, 0x38));
    assert_eq!(structures[&2], (0, NOTIFY as u32, 8));
}

#[test]
fn features_beyond_those_offered_are_not_agreed_on() {
    for (features, agreed) in [
        (VERSION_1, true),
        (VERSION_1 | 1 << 5 | 1 << 40, true),
        (1 << 5, false),
        (VERSION_1 | 1 << 6, false),
        (u64::MAX, false),
    ] {
        let mut driver = Driver::new();
        driver.negotiate(features);
        assert_eq!(driver.status() & FEATURES_OK != 0, agreed, "{features:#x}");
    }
    let mut driver = Driver::new();
    let mut offered = 0;
    for half in 0..3_u32 {
        driver.set(0, &half.to_le_bytes());
        let bits = u64::from(u32::from_le_bytes(driver.get(4)));
        offered |= bits.checked_shl(32 * half).unwrap_or(0);
    }
    assert_eq!(offered, VERSION_1 | 1 << 5 | 1 << 40);
}

#[test]
fn the_device_gets_the_queues_as_the_driver_set_them_up() {
    let mut driver = Driver::new();
    driver.start();
    assert_eq!(driver.status(), ACKNOWLEDGED | FEATURES_OK | DRIVER_OK);
    let seen = driver.seen.active.lock().unwrap();
    let active = seen.as_ref().unwrap();
    use virtio_queue::QueueT;
    let queues: Vec<_> = active
        .queues
        .iter()
        .map(|q| (q.index, q.queue.size(), q.queue.desc_table()))
        .collect();
    assert_eq!(queues, [(0, 64, 0x10000), (1, 8, 0x20000)]);
    assert_eq!(active.features, VERSION_1 | 1 << 5);
}

#[test]
fn used_buffers_and_configuration_changes_interrupt_by_their_vectors() {
    let mut driver = Driver::new();
    driver.start();
    let interrupt = driver
        .seen
        .active
        .lock()
        .unwrap()
        .as_ref()
        .unwrap()
        .interrupt
        .clone();
    interrupt.used(1);
    assert_eq!(driver.wires.interrupts(), [message(2)]);
    interrupt.config_changed();
    assert_eq!(driver.wires.interrupts(), [message(0)]);
    assert_eq!(driver.get(ISR), [3]);
    assert_eq!(driver.get(ISR), [0]);
    assert_eq!(driver.get::<1>(0x15), [1]);
    assert!(interrupt.used_fd(0).is_some() && interrupt.used_fd(7).is_none());

    interrupt.needs_reset();
    assert_eq!(driver.wires.interrupts(), [message(0)]);
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    driver.set(0x14, &[0]);
    assert_eq!(driver.status(), 0);
}

#[test]
fn a_doorbell_rings_its_queue_and_moves_with_the_bar() {
    let mut driver = Driver::new();
    driver.start();
    assert_eq!(driver.wires.doorbells(), [BAR + NOTIFY, BAR + NOTIFY + 4]);
    // Where KVM does not take the write it comes to us.
    driver.set(NOTIFY + 4, &1_u16.to_le_bytes());
    driver.set(NOTIFY + 400, &1_u16.to_le_bytes());
    {
        let seen = driver.seen.active.lock().unwrap();
        let queues = &seen.as_ref().unwrap().queues;
        assert_eq!(queues[1].kick.read().unwrap(), 1);
        assert!(queues[0].kick.read().is_err());
    }
    driver.set_config(0x10, &0xd000_0000_u32.to_le_bytes());
    assert_eq!(driver.wires.doorbells()[0], 0xd000_0000 + NOTIFY);
    // Outside of the windows nothing answers; the doorbells stay where they were.
    driver.set_config(0x10, &0xe000_0000_u32.to_le_bytes());
    assert!(driver.function.bar().is_some());
    driver.set_config(0x10, &0x1000_0000_u32.to_le_bytes());
    assert_eq!(driver.function.bar(), None);
    let wires = driver.wires.clone();
    drop(driver);
    assert_eq!((wires.doorbells().len(), wires.connected()), (0, 0));
}

#[test]
fn a_reset_stops_the_device_and_clears_the_registers() {
    let mut driver = Driver::new();
    driver.start();
    driver.set(0x14, &[0]);
    assert_eq!(driver.seen.resets.load(Ordering::SeqCst), 1);
    assert_eq!(driver.get(0x10), 0xffff_u16.to_le_bytes());
    driver.set(0x16, &1_u16.to_le_bytes());
    assert_eq!(driver.get(0x18), 16_u16.to_le_bytes());
    assert_eq!(driver.get(0x1c), [0, 0]);
    assert_eq!(driver.get(0x20), [0; 8]);
    driver.start();
    assert!(
        driver.seen.active.lock().unwrap().is_some(),
        "and it starts again"
    );
}

#[test]
fn queues_in_impossible_places_make_the_device_need_a_reset() {
    let cases = [0x10001, 0xff_f000, 0xffff_ffff_ffff_f000, 1 << 20];
    for base in cases {
        let mut driver = Driver::new();
        driver.negotiate(VERSION_1);
        driver.set_up_queue(0, 64, base);
        driver.set(0x14, &[ACKNOWLEDGED | FEATURES_OK | DRIVER_OK]);
        assert_ne!(driver.status() & NEEDS_RESET, 0, "{base:#x}");
        assert!(driver.seen.active.lock().unwrap().is_none());
    }
}

#[test]
fn a_queue_that_runs_from_one_region_into_the_next_makes_the_device_need_a_reset() {
    let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(1 << 20), 1 << 20)];
    // 64 descriptors are 0x400 bytes, the device's ring is 0x206.
    for (base, good) in [
        (0xf_fc00, true),
        (0xf_fc10, false),
        (0xf_dfc0, false),
        (0xf_ddc0, true),
        (0xf_e000, true),
    ] {
        let mut driver = driver_with(probe(), &ranges);
        driver.negotiate(VERSION_1);
        driver.set_up_queue(0, 64, base);
        driver.set(0x14, &[ACKNOWLEDGED | FEATURES_OK | DRIVER_OK]);
        assert_eq!(driver.status() & NEEDS_RESET == 0, good, "{base:#x}");
    }
}

#[test]
fn a_device_that_does_not_start_needs_a_reset() {
    let mut driver = driver_of(Probe {
        refuses: true,
        ..probe()
    });
    driver.start();
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    assert_eq!(driver.wires.interrupts(), [message(0)]);
}

#[test]
fn steps_out_of_order_change_nothing() {
    let mut driver = Driver::new();
    driver.set(0x14, &[ACKNOWLEDGED | DRIVER_OK]);
    assert_eq!(driver.status() & DRIVER_OK, 0, "features first");
    driver.set(0x14, &[0]);
    driver.start();
    // Everything is fixed now.
    driver.set(0x08, &0_u32.to_le_bytes());
    driver.set(0x0c, &0_u32.to_le_bytes());
    assert_eq!(driver.get(0x0c), (1_u32 << 5).to_le_bytes());
    driver.set_up_queue(0, 2, 0x40000);
    driver.set(0x16, &0_u16.to_le_bytes());
    assert_eq!(driver.get(0x18), 64_u16.to_le_bytes());
    driver.set(0x14, &[ACKNOWLEDGED]);
    assert_ne!(driver.status() & DRIVER_OK, 0, "only a reset takes it back");
}

#[test]
fn queue_sizes_that_are_not_possible_are_not_taken() {
    let mut driver = Driver::new();
    for size in [0_u16, 3, 128, 0x8000, 0xffff] {
        driver.set(0x18, &size.to_le_bytes());
        assert_eq!(driver.get(0x18), 64_u16.to_le_bytes());
    }
    driver.set(0x16, &9_u16.to_le_bytes());
    assert_eq!(
        driver.get(0x18),
        [0, 0],
        "a queue that is not there has no size"
    );
    driver.set(0x1a, &0_u16.to_le_bytes());
    assert_eq!(driver.get(0x1a), [0xff, 0xff]);
    driver.set(0x10, &3_u16.to_le_bytes());
    assert_eq!(
        driver.get(0x10),
        [0xff, 0xff],
        "nor has a vector that is not there"
    );
}

#[test]
fn registers_are_reachable_through_configuration_space() {
    let mut driver = Driver::new();
    let found = driver.capabilities();
    let (at, ..) = *found
        .iter()
        .find(|c| c.1 == 9 && c.2[3] == CFG_PCI)
        .unwrap();
    driver.set_config(at + 8, &(DEVICE as u32 + 4).to_le_bytes());
    driver.set_config(at + 12, &4_u32.to_le_bytes());
    assert_eq!(&driver.config::<4>(at + 16), b"efgh");
    driver.set_config(at + 16, b"wxyz");
    assert_eq!(&driver.get::<4>(DEVICE + 4), b"wxyz");
    // Out of the BAR, misaligned, of another length, of another BAR: nothing.
    for (bar, offset, length) in [
        (0, BAR_SIZE as u32, 4_u32),
        (0, u32::MAX, 4),
        (0, 2, 4),
        (0, 0, 8),
        (2, 0, 4),
        (0, 0, 0),
    ] {
        driver.set_config(at + 4, &[bar]);
        driver.set_config(at + 8, &offset.to_le_bytes());
        driver.set_config(at + 12, &length.to_le_bytes());
        driver.set_config(at + 16, &[0xff; 4]);
        driver.config::<4>(at + 16);
    }
    assert_eq!(driver.status(), 0);
}

#[test]
fn shared_memory_is_announced_and_stays_where_it_is() {
    let regions = vec![
        SharedRegion {
            id: 0,
            gpa: 0x1_0000_0000,
            size: 0x4000_0000,
        },
        SharedRegion {
            id: 1,
            gpa: 0x1_4000_0000,
            size: 0x1_0000,
        },
    ];
    let mut driver = driver_of(Probe { regions, ..probe() });
    let bar = u64::from_le_bytes(driver.config(0x18));
    assert_eq!(bar, 0x1_0000_0000 | 0b1100);
    driver.set_config(0x18, &[0xff; 4]);
    driver.set_config(0x1c, &[0xff; 4]);
    assert_eq!(u64::from_le_bytes(driver.config(0x18)) & !0xf, !0x7fff_ffff);
    let shared: Vec<_> = driver
        .capabilities()
        .into_iter()
        .filter(|c| c.1 == 9 && c.2[3] == CFG_SHARED_MEMORY)
        .map(|c| (c.2[4], c.2[5], c.2[8..24].to_vec()))
        .collect();
    assert_eq!(shared.len(), 2);
    assert_eq!((shared[1].0, shared[1].1), (2, 1));
    assert_eq!(shared[1].2[..4], 0x4000_0000_u32.to_le_bytes());
}

#[test]
fn wild_accesses_do_no_harm() {
    let mut driver = Driver::new();
    driver.start();
    for at in (0..BAR_SIZE).step_by(4).chain([1, 3, 0x15, BAR_SIZE - 1]) {
        for width in [1, 2, 4, 8, 16] {
            // Not the status: that resets.
            if !(0x10..0x18).contains(&at) {
                driver.function.write_bar(at, &vec![0xff; width]);
            }
            driver.function.read_bar(at, &mut vec![0; width]);
        }
    }
    for at in 0..4096 {
        driver.function.write_config(at, &[0xff; 4]);
        driver.function.read_config(at, &mut [0; 8]);
    }
    driver.set(0x14, &[0]);
    assert_eq!(driver.status(), 0);
}
