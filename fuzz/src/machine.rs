//! The machine as the guest's CPUs see it: ports, PCI configuration space, BARs, MSI-X tables, doorbells,
//! and functions that come and go while it looks.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use sepal_vmm::bus::Bus;
use sepal_vmm::exit::Exit;
use sepal_vmm::kvm::{Backing, Error, Msi, SlotId};
use sepal_vmm::launcher::Launcher;
use sepal_vmm::memory::{ECAM_SIZE, ECAM_START};
use sepal_vmm::pci::virtio::VirtioPci;
use sepal_vmm::pci::wires::Wires;
use sepal_vmm::pci::{PciBus, first_bar};
use sepal_vmm::platform::Platform;
use sepal_vmm::serial::{self, Serial};
use sepal_vmm::virtio::console::Log;
use sepal_vmm::virtio::device::{
    ActivateError, Activation, DeviceType, SharedRegion, VirtioDevice,
};
use sepal_vmm::virtio::features;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::input::Input;

/// Most interrupt routes of a function: a vector has one.
const MOST_ROUTES: u32 = 64;

#[derive(Default)]
struct Ends {
    gsis: u32,
    free: Vec<u32>,
    routes: BTreeMap<u32, Msi>,
    lines: HashMap<i32, u32>,
    doorbells: HashSet<(u64, i32)>,
    shown: bool,
}

/// Stands for KVM, and holds the transport to what KVM would refuse.
#[derive(Default)]
struct Kvm(Mutex<Ends>);

impl Kvm {
    fn ends(&self) -> std::sync::MutexGuard<'_, Ends> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wires for Kvm {
    fn free_gsi(&self, gsi: u32) {
        let mut ends = self.ends();
        let wired = ends.lines.values().any(|line| *line == gsi);
        assert!(!wired && !ends.free.contains(&gsi), "freed while in use");
        ends.routes.remove(&gsi);
        ends.free.push(gsi);
    }

    fn allocate_gsi(&self) -> u32 {
        let mut ends = self.ends();
        if let Some(gsi) = ends.free.pop() {
            return gsi;
        }
        ends.gsis += 1;
        assert!(ends.gsis <= MOST_ROUTES, "the guest uses up KVM's routes");
        ends.gsis
    }

    fn route(&self, gsi: u32, msi: Msi) -> Result<(), Error> {
        let mut ends = self.ends();
        assert!(gsi <= ends.gsis, "a route that was not allocated");
        ends.routes.insert(gsi, msi);
        Ok(())
    }

    fn connect(&self, event: &EventFd, gsi: u32) -> Result<(), Error> {
        let mut ends = self.ends();
        assert!(ends.routes.contains_key(&gsi), "an interrupt without route");
        let before = ends.lines.insert(event.as_raw_fd(), gsi);
        assert!(before.is_none(), "connected twice");
        Ok(())
    }

    fn disconnect(&self, event: &EventFd, gsi: u32) -> Result<(), Error> {
        let before = self.ends().lines.remove(&event.as_raw_fd());
        assert_eq!(before, Some(gsi), "was not connected");
        Ok(())
    }

    fn add_doorbell(&self, gpa: u64, event: &EventFd) -> Result<(), Error> {
        let new = self.ends().doorbells.insert((gpa, event.as_raw_fd()));
        assert!(new, "a doorbell twice at {gpa:#x}");
        Ok(())
    }

    fn remove_doorbell(&self, gpa: u64, event: &EventFd) -> Result<(), Error> {
        let there = self.ends().doorbells.remove(&(gpa, event.as_raw_fd()));
        assert!(there, "no doorbell at {gpa:#x}");
        Ok(())
    }

    fn show(&self, gpa: u64, backing: Backing) -> Result<SlotId, Error> {
        assert!(gpa == ECAM_START && matches!(backing, Backing::Config(_)));
        self.ends().shown = true;
        Ok(SlotId(0))
    }

    fn hide(&self, _: &SlotId) -> Result<(), Error> {
        let was_shown = std::mem::take(&mut self.ends().shown);
        assert!(was_shown, "hidden twice");
        Ok(())
    }
}

/// A device that does nothing but count its lives.
struct Idle {
    config: [u8; 12],
    regions: Vec<SharedRegion>,
    active: Option<Activation>,
}

impl VirtioDevice for Idle {
    fn device_type(&self) -> DeviceType {
        DeviceType::Fs
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64, 16, 256]
    }

    fn features(&self) -> u64 {
        features::RING | 1 << 5
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        features::read_config(&self.config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (place, byte) in self.config.iter_mut().skip(offset as usize).zip(data) {
            *place = *byte;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        assert!(self.active.is_none(), "activated twice without a reset");
        if activation.queues.is_empty() {
            return Err(ActivateError::MissingQueues { got: 0, need: 1 });
        }
        for queue in &activation.queues {
            activation.interrupt.used(queue.index);
            let _ = activation.interrupt.used_fd(queue.index);
        }
        activation.interrupt.config_changed();
        if activation.features & 1 << 5 != 0 {
            activation.interrupt.needs_reset();
        }
        self.active = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn shared_regions(&self) -> &[SharedRegion] {
        &self.regions
    }
}

fn launcher() -> Arc<Launcher> {
    static LAUNCHER: OnceLock<Arc<Launcher>> = OnceLock::new();
    let start = || Arc::new(Launcher::start().expect("a thread is to be had"));
    LAUNCHER.get_or_init(start).clone()
}

struct Machine {
    input: Input,
    bus: Bus,
    kvm: Arc<Kvm>,
    memory: Arc<GuestMemoryMmap>,
    plugged: u8,
}

/// Accesses of any width anywhere.
pub fn machine(data: &[u8]) {
    let kvm = Arc::new(Kvm::default());
    let wires = kvm.clone();
    let pci = Arc::new(PciBus::new(wires).expect("memory is left"));
    let exit = Arc::new(Exit::new().expect("descriptors are left"));
    let platform = Arc::new(Platform::new(exit).expect("descriptors are left"));
    let eject = Arc::clone(&pci);
    platform.on_eject(Box::new(move |slots| eject.eject(slots)));
    let log = Log::new(None).expect("it has no file");
    let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(2 << 20), 1 << 20)];
    let memory = GuestMemoryMmap::from_ranges(&ranges).expect("memory is left");
    let mut machine = Machine {
        input: Input::new(data),
        bus: Bus {
            pci,
            platform,
            serial: Some(Serial::new(log)),
        },
        kvm,
        memory: Arc::new(memory),
        plugged: 0,
    };
    machine.insert(1, None);
    // A run of so many accesses is no other than two runs.
    for _ in 0..256 {
        if machine.input.is_empty() {
            break;
        }
        machine.step();
    }
    machine.bus.pci.stop();
    let Machine { bus, kvm, .. } = machine;
    drop(bus);
    let ends = kvm.ends();
    assert!(ends.doorbells.is_empty(), "doorbells stay behind");
}

impl Machine {
    fn insert(&mut self, slot: u8, id: Option<String>) {
        let region = SharedRegion {
            id: 0,
            gpa: 64 << 30,
            size: 2 << 20,
        };
        let device = Idle {
            config: [7; 12],
            regions: vec![region],
            active: None,
        };
        let function = VirtioPci::new(
            Box::new(device),
            self.memory.clone(),
            self.kvm.clone(),
            launcher(),
            first_bar(slot),
        );
        let function = function.expect("it fits into a function");
        self.bus.pci.insert(slot, id, function);
    }

    fn step(&mut self) {
        match self.input.below(16) {
            0..=3 => self.access(ECAM_START, 0x1000),
            4..=8 => self.access(first_bar(1), 0x8000),
            9 => self.access(first_bar(16), 0x8000),
            10 => self.ports(),
            11 => {
                let gpa = self.input.u64();
                self.touch(gpa);
            }
            12 => self.set_up(),
            13 => self.give_a_vector(),
            _ => self.host(),
        }
    }

    /// An access to a function's registers or its configuration space, slot 1 or 16.
    fn access(&mut self, base: u64, size: u64) {
        let offset = u64::from(self.input.u16()) % size;
        let slot = match (base == ECAM_START, offset & 1 << 11) {
            (false, _) => 0,
            // Configuration space of both functions is small: what lies behind selects.
            (true, 0) => 1 << 15,
            (true, _) => 16 << 15,
        };
        self.touch(
            base + slot
                + if base == ECAM_START {
                    offset & 0x7ff
                } else {
                    offset
                },
        );
    }

    fn touch(&mut self, gpa: u64) {
        let how = self.input.byte();
        let width = [1, 2, 4, 8, 3, 16][usize::from(how >> 1) % 6];
        if how & 1 == 0 {
            self.bus.read(gpa, &mut vec![0; width]);
            return;
        }
        let mut value = self.input.take(width);
        value.resize(width, 0);
        self.bus.write(gpa, &value);
    }

    fn ports(&mut self) {
        let port = match self.input.byte() {
            byte @ 0..=127 => 0x600 + u16::from(byte % 0x20),
            byte @ 128..=191 => serial::PORT + u16::from(byte % 8),
            192..=200 => 0x505,
            _ => self.input.u16(),
        };
        let data = self.input.some();
        if data.first().is_some_and(|first| first & 1 != 0) {
            self.bus.port_write(port, &data);
        } else {
            let mut data = data;
            self.bus.port_read(port, &mut data);
        }
    }

    fn register(&mut self, offset: u64, value: &[u8]) {
        self.bus.write(first_bar(1) + offset, value);
    }

    /// What a driver does from reset to DRIVER_OK (virtio 1.2, 3.1.1), with rings where the script says.
    fn set_up(&mut self) {
        let features = features::RING | 1 << 32 | u64::from(self.input.byte() & 0x20);
        self.register(0x14, &[3]);
        for (half, value) in [(0_u32, features as u32), (1, (features >> 32) as u32)] {
            self.register(0x08, &half.to_le_bytes());
            self.register(0x0c, &value.to_le_bytes());
        }
        self.register(0x14, &[0xb]);
        for index in 0..self.input.below(4) as u16 {
            let size = 1_u16 << self.input.below(16);
            let base = match self.input.byte() {
                byte @ 0..=199 => u64::from(byte) << 12,
                _ => self.input.u64(),
            };
            self.register(0x16, &index.to_le_bytes());
            self.register(0x18, &size.to_le_bytes());
            self.register(0x1a, &index.to_le_bytes());
            for (at, gpa) in [
                (0x20, base),
                (0x28, base.wrapping_add(0x1000)),
                (0x30, base.wrapping_add(0x2000)),
            ] {
                self.register(at, &gpa.to_le_bytes());
            }
            self.register(0x1c, &1_u16.to_le_bytes());
        }
        self.register(0x14, &[0xf]);
    }

    /// Fills an entry of the MSI-X table, masked or not.
    fn give_a_vector(&mut self) {
        let entry = 0x4000 + 16 * u64::from(self.input.byte() % 5);
        let (address, data, mask) = (self.input.u64(), self.input.u32(), self.input.byte());
        self.register(entry, &address.to_le_bytes());
        self.register(entry + 8, &data.to_le_bytes());
        self.register(entry + 12, &u32::from(mask & 1).to_le_bytes());
    }

    /// What the host does meanwhile.
    fn host(&mut self) {
        match self.input.below(4) {
            0 => self.bus.platform.press_power_button(),
            1 => {
                let _ = self.bus.pci.request_eject("hot", &self.bus.platform);
            }
            2 => {
                // Once in a while: each is a thread's work.
                if self.plugged < 4
                    && let Ok(slot) = self.bus.pci.free_hot_slot(Some("hot"))
                {
                    self.plugged += 1;
                    self.insert(slot, Some("hot".into()));
                    self.bus.platform.plugged(1 << slot);
                }
            }
            _ => drop(self.bus.pci.take_ejected()),
        }
        assert!(self.bus.pci.ids().len() <= 1);
        let mut last = [0; 4];
        self.bus.read(ECAM_START + ECAM_SIZE - 4, &mut last);
    }
}
