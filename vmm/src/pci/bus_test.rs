//! The bus seen through ECAM, and functions that come and go.

use vm_memory::GuestAddress;

use super::testing::TestWires;
use super::*;
use crate::exit::Exit;
use crate::launcher::Launcher;
use crate::virtio::console::{Console, Log};
use crate::virtio::rng::Rng;

fn bus() -> PciBus {
    bus_on(Arc::new(TestWires::default()))
}

fn bus_on(wires: Arc<TestWires>) -> PciBus {
    let bus = PciBus::new(wires).unwrap();
    let log = Log::new(None).unwrap();
    bus.insert(1, None, function(1, Box::new(Console::new(log))));
    bus.insert(
        16,
        Some("net1".into()),
        function(16, Box::new(Rng::default())),
    );
    bus
}

fn function(slot: u8, device: Box<dyn crate::virtio::device::VirtioDevice>) -> VirtioPci {
    let ranges = [(GuestAddress(0), 1 << 20)];
    let memory = Arc::new(vm_memory::GuestMemoryMmap::from_ranges(&ranges).unwrap());
    let launcher = Arc::new(Launcher::start().unwrap());
    let wires = Arc::new(TestWires::default());
    VirtioPci::new(device, memory, wires, launcher, first_bar(slot)).unwrap()
}

fn config(bus: &PciBus, slot: u64, function: u64, register: u64) -> u32 {
    let mut data = [0; 4];
    bus.read_config(slot << 15 | function << 12 | register, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn ecam_shows_functions_where_they_are() {
    let bus = bus();
    assert_eq!(config(&bus, 1, 0, 0), 0x1043_1af4);
    assert_eq!(config(&bus, 16, 0, 0), 0x1044_1af4);
    for (slot, function) in [
        (0, 0),
        (2, 0),
        (1, 1),
        (16, 7),
        (31, 0),
        (32, 0),
        (1 << 40, 0),
    ] {
        assert_eq!(
            config(&bus, slot, function, 0),
            u32::MAX,
            "{slot}.{function}"
        );
        bus.write_config(slot << 15 | function << 12, &[0; 4]);
    }
    assert_eq!(config(&bus, 1, 0, 0x100), 0, "no extended capabilities");
    let mut across = [0; 8];
    bus.read_config(1 << 15 | 0xffc, &mut across);
    assert_eq!(across, [0xff; 8]);
}

#[test]
fn registers_answer_only_where_the_guest_has_enabled_them() {
    let bus = bus();
    let queues = first_bar(1) + 0x12;
    let mut data = [0; 2];
    assert!(!bus.read_bar(queues, &mut data));
    bus.write_config(1 << 15 | 4, &2_u16.to_le_bytes());
    assert!(bus.read_bar(queues, &mut data));
    assert_eq!(data, 2_u16.to_le_bytes());
    assert!(
        !bus.read_bar(first_bar(1) + BAR_SIZE - 1, &mut data),
        "across the end"
    );
    assert!(!bus.read_bar(first_bar(16) + 0x12, &mut data));
    // Moved above RAM, as a guest's kernel does with a device that was plugged.
    bus.write_config(1 << 15 | 0x14, &1_u32.to_le_bytes());
    assert!(!bus.read_bar(queues, &mut data));
    assert!(bus.read_bar(1 << 32 | queues, &mut data));
}

#[test]
fn a_device_goes_when_the_guest_lets_go_of_it() {
    let bus = bus();
    let platform = Platform::new(Arc::new(Exit::new().unwrap())).unwrap();
    assert_eq!(bus.ids(), ["net1"]);
    assert!(matches!(
        bus.request_eject("net2", &platform),
        Err(Error::Unknown(_))
    ));
    bus.request_eject("net1", &platform).unwrap();
    let mut down = [0; 4];
    platform.read(crate::platform::EVENTS + 8, &mut down);
    assert_eq!(u32::from_le_bytes(down), 1 << 16);

    // A boot slot is none of its business, an empty one nobody's.
    bus.eject(1 << 1 | 1 << 20);
    assert_eq!(config(&bus, 1, 0, 0), 0x1043_1af4);
    assert!(bus.take_ejected().is_empty());
    bus.eject(u32::MAX);
    assert_eq!(bus.take_ejected(), ["net1"]);
    assert_eq!(config(&bus, 16, 0, 0), u32::MAX);
    assert!(bus.ids().is_empty());
}

#[test]
fn slots_and_ids_are_given_once() {
    let bus = bus();
    assert_eq!(bus.free_boot_slot().unwrap(), 2);
    assert_eq!(bus.free_hot_slot(Some("net2")).unwrap(), 17);
    assert!(matches!(
        bus.free_hot_slot(Some("net1")),
        Err(Error::Exists(_))
    ));
    for slot in HOT_SLOTS {
        let id = Some(format!("dev{slot}"));
        bus.insert(slot, id, function(slot, Box::new(Rng::default())));
    }
    assert!(matches!(
        bus.free_hot_slot(Some("one more")),
        Err(Error::Full(16))
    ));
}

#[test]
fn the_guest_reads_configuration_space_as_memory() {
    let wires = Arc::new(TestWires::default());
    let bus = bus_on(wires.clone());
    let shown = |offset: usize| {
        let mut data = [0; 4];
        wires.shown().unwrap().read(offset, &mut data);
        u32::from_le_bytes(data)
    };
    let console = 1 << 15;
    let network = 16 << 15;
    assert_eq!(
        [shown(0), shown(console), shown(network)],
        [u32::MAX, 0x1043_1af4, 0x1044_1af4]
    );
    assert_eq!([shown(console + 0x1000), shown(31 << 15)], [u32::MAX; 2]);
    assert_eq!(shown(console + 0x100), 0, "no extended capabilities");
    bus.write_config(console as u64 + 0x10, &[0xff; 4]);
    assert_eq!(shown(console + 0x10), config(&bus, 1, 0, 0x10));
    bus.eject(1 << 16);
    assert_eq!(shown(network), u32::MAX);

    // Along the list to the configuration access capability.
    let mut at = 0x34;
    let mut kind = 0;
    while kind != 5 {
        let mut byte = [0];
        bus.read_config(console as u64 + at, &mut byte);
        at = byte[0].into();
        bus.read_config(console as u64 + at + 3, &mut byte);
        kind = byte[0];
        if kind != 5 {
            at += 1;
        }
    }
    bus.write_config(console as u64 + at + 8, &4_u32.to_le_bytes());
    assert!(
        wires.shown().is_none(),
        "from here on reads come to the function"
    );
}
