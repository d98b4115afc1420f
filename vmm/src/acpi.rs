//! ACPI tables: the guest's description of its machine (ACPI 6.5, hardware-reduced).
//!
//! No fixed hardware: power-off is the sleep control register, reboot the reset register, events
//! come through one generic event device that reads [`crate::platform`]'s registers. Devices in the
//! hot-plug slots of PCI bus 0 have objects of their own, so that the guest's own PCI hot-plug
//! notices their coming and going without help from the agent.

use acpi_tables::aml::{self, Path};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::memory::{
    ECAM_SIZE, ECAM_START, IOAPIC, LAPIC, Layout, MMIO32_SIZE, MMIO32_START, MMIO64_SIZE,
};
use crate::pci::HOT_SLOTS;
use crate::platform;

/// Where the kernel finds the tables: the root pointer is the first of them.
pub const START: u64 = 0xe0000;
/// Room for them, up to 1 MiB.
pub const SIZE: u64 = 0x20000;

const OEM: [u8; 6] = *b"SEPAL ";
const TABLE: [u8; 8] = *b"SEPALVM ";
const REVISION: u32 = 1;

/// The tables do not fit between [`START`] and 1 MiB.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Too large.
    #[error("ACPI tables of {0} bytes do not fit")]
    TooLarge(usize),
    /// RAM does not reach that far.
    #[error("ACPI tables do not fit into guest memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Writes the tables for `cpus` CPUs; returns the address of the root pointer.
///
/// # Errors
/// They do not fit.
pub fn write(memory: &GuestMemoryMmap, layout: &Layout, cpus: u8) -> Result<u64, Error> {
    let tables = build(layout, cpus);
    if tables.len() as u64 > SIZE {
        return Err(Error::TooLarge(tables.len()));
    }
    memory.write_slice(&tables, GuestAddress(START))?;
    Ok(START)
}

/// All tables, as they lie from [`START`] on.
fn build(layout: &Layout, cpus: u8) -> Vec<u8> {
    // The root pointer comes first but is known last.
    let mut bytes = vec![0; Rsdp::len().next_multiple_of(16)];
    let place = |bytes: &mut Vec<u8>, table: &dyn Aml| {
        bytes.resize(bytes.len().next_multiple_of(16), 0);
        let address = START + bytes.len() as u64;
        table.to_aml_bytes(bytes);
        address
    };
    let dsdt = place(&mut bytes, &dsdt(layout, cpus));
    let fadt = place(&mut bytes, &fadt(dsdt));
    let madt = place(&mut bytes, &madt(cpus));
    let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
    mcfg.add_ecam(ECAM_START, 0, 0, 0);
    let mcfg = place(&mut bytes, &mcfg);
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    [fadt, madt, mcfg]
        .into_iter()
        .for_each(|table| xsdt.add_entry(table));
    let xsdt = place(&mut bytes, &xsdt);

    let mut root = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
    bytes[..root.len()].copy_from_slice(&root);
    bytes
}

fn port_register(port: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        port.into(),
    )
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    // IA-PC boot architecture flags: no VGA, no CMOS clock; and neither legacy devices nor an 8042.
    const NO_VGA: u16 = 1 << 2;
    const NO_CMOS_CLOCK: u16 = 1 << 5;
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // The power button is a device of the DSDT, there is no sleep button.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_CLOCK).into();
    fadt.reset_reg = port_register(platform::RESET);
    fadt.reset_value = platform::RESET_VALUE;
    fadt.sleep_control_reg = port_register(platform::SLEEP_CONTROL);
    fadt.sleep_status_reg = port_register(platform::SLEEP_STATUS);
    fadt.finalize()
}

fn madt(cpus: u8) -> MADT {
    let controller = LocalInterruptController::Address(LAPIC as u32);
    let mut madt = MADT::new(OEM, TABLE, REVISION, controller);
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC as u32, 0));
    madt
}

fn dsdt(layout: &Layout, cpus: u8) -> Sdt {
    let mut body = Vec::new();
    power_off(&mut body);
    processors(&mut body, cpus);
    registers(&mut body);
    pci_root(&mut body, layout);
    board_devices(&mut body);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, REVISION);
    dsdt.append_slice(&body);
    dsdt
}

fn path(name: &str) -> Path {
    Path::new(name)
}

fn power_off(body: &mut dyn AmlSink) {
    let off = platform::SLEEP_TYPE_OFF;
    aml::Name::new(path("_S5_"), &aml::Package::new(vec![&off])).to_aml_bytes(body);
}

/// \_SB.Cnnn: one device for each CPU, its `_UID` that of the MADT.
fn processors(body: &mut dyn AmlSink, cpus: u8) {
    for cpu in 0..cpus {
        let hid = aml::Name::new(path("_HID"), &"ACPI0007");
        let uid = aml::Name::new(path("_UID"), &cpu);
        let name = format!("_SB_.C{cpu:03}");
        aml::Device::new(path(&name), vec![&hid, &uid]).to_aml_bytes(body);
    }
}

/// \_SB: the hot-plug registers by name.
fn registers(body: &mut dyn AmlSink) {
    use aml::FieldEntry::Named;
    let start = platform::EVENTS;
    let length = platform::EVENTS_LENGTH;
    let region = aml::OpRegion::new(path("EREG"), aml::OpRegionSpace::SystemIO, &start, &length);
    let fields = ["EVTS", "SLUP", "SLDN", "SLEJ"].map(|name| {
        let mut field = [0; 4];
        field.copy_from_slice(name.as_bytes());
        Named(field, 32)
    });
    let field = aml::Field::new(
        path("EREG"),
        aml::FieldAccessType::DWord,
        aml::FieldLockRule::NoLock,
        aml::FieldUpdateRule::WriteAsZeroes,
        fields.to_vec(),
    );
    aml::Scope::new(path("_SB_"), vec![&region, &field]).to_aml_bytes(body);
}

/// \_SB.PCI0: bus 0 with its windows and its hot-plug slots.
fn pci_root(body: &mut dyn AmlSink, layout: &Layout) {
    use aml::AddressSpaceCacheable::{NotCacheable, PreFetchable};
    let start64 = layout.mmio64_start();
    let end32 = (MMIO32_START + MMIO32_SIZE - 1) as u32;
    let bus = aml::AddressSpace::new_bus_number(0_u16, 0);
    let low = aml::AddressSpace::new_memory(NotCacheable, true, MMIO32_START as u32, end32, None);
    let end64 = start64 + MMIO64_SIZE - 1;
    let high = aml::AddressSpace::new_memory(PreFetchable, true, start64, end64, None);
    let windows = aml::ResourceTemplate::new(vec![&bus, &low, &high]);

    let hid = aml::Name::new(path("_HID"), &aml::EISAName::new("PNP0A08"));
    let cid = aml::Name::new(path("_CID"), &aml::EISAName::new("PNP0A03"));
    let uid = aml::Name::new(path("_UID"), &aml::ZERO);
    let segment = aml::Name::new(path("_SEG"), &aml::ZERO);
    // Devices are coherent with the caches; without this some kernels fall back to bouncing.
    let coherent = aml::Name::new(path("_CCA"), &aml::ONE);
    let resources = aml::Name::new(path("_CRS"), &windows);

    let slots: Vec<Raw> = HOT_SLOTS.map(hot_slot).collect();
    let scan = Raw::of(&scan_slots());
    let mut children: Vec<&dyn Aml> = vec![&hid, &cid, &uid, &segment, &coherent, &resources];
    children.extend(slots.iter().map(|slot| slot as &dyn Aml));
    children.push(&scan);
    aml::Device::new(path("_SB_.PCI0"), children).to_aml_bytes(body);
}

/// Finished bytecode, for objects that would borrow their parts.
struct Raw(Vec<u8>);

impl Raw {
    fn of(object: &dyn Aml) -> Self {
        let mut bytes = Vec::new();
        object.to_aml_bytes(&mut bytes);
        Self(bytes)
    }
}

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn slot_name(slot: u8) -> String {
    format!("S{slot:03}")
}

/// A slot whose device can be ejected by telling the eject register.
fn hot_slot(slot: u8) -> Raw {
    let address = u32::from(slot) << 16;
    let address = aml::Name::new(path("_ADR"), &address);
    let number = aml::Name::new(path("_SUN"), &slot);
    let bit = 1_u32 << slot;
    let register = path("\\_SB_.SLEJ");
    let store = aml::Store::new(&register, &bit);
    let eject = aml::Method::new(path("_EJ0"), 1, true, vec![&store]);
    Raw::of(&aml::Device::new(
        path(&slot_name(slot)),
        vec![&address, &number, &eject],
    ))
}

/// SCAN: notifies each slot in the up register of a device check (1) and each in the down register
/// of an eject request (3).
fn scan_slots() -> Raw {
    let (up, down) = (path("\\_SB_.SLUP"), path("\\_SB_.SLDN"));
    let load_up = aml::Store::new(&aml::Local(0), &up);
    let load_down = aml::Store::new(&aml::Local(1), &down);
    let mut notify = Vec::new();
    for slot in HOT_SLOTS {
        for (local, event) in [(0, 1_u8), (1, 3)] {
            let bit = 1_u32 << slot;
            let local = aml::Local(local);
            let present = aml::And::new(&aml::ZERO, &local, &bit);
            let device = path(&slot_name(slot));
            let tell = aml::Notify::new(&device, &event);
            notify.push(Raw::of(&aml::If::new(&present, vec![&tell])));
        }
    }
    let mut children: Vec<&dyn Aml> = vec![&load_up, &load_down];
    children.extend(notify.iter().map(|n| n as &dyn Aml));
    Raw::of(&aml::Method::new(path("SCAN"), 0, true, children))
}

/// \_SB: configuration space, pvpanic, the power button and the generic event device.
fn board_devices(body: &mut dyn AmlSink) {
    // The kernel uses configuration space only where a board resource reserves it
    // (PCI firmware specification 3.3, 4.1.2).
    let hid = aml::Name::new(path("_HID"), &aml::EISAName::new("PNP0C02"));
    let ecam = aml::Memory32Fixed::new(true, ECAM_START as u32, ECAM_SIZE as u32);
    let registers = platform::SLEEP_CONTROL;
    let length = (platform::EVENTS + platform::EVENTS_LENGTH - registers) as u8;
    let ports = aml::IO::new(registers, registers, 1, length);
    let resources = aml::ResourceTemplate::new(vec![&ecam, &ports]);
    let resources = aml::Name::new(path("_CRS"), &resources);
    aml::Device::new(path("_SB_.MBRD"), vec![&hid, &resources]).to_aml_bytes(body);

    let hid = aml::Name::new(path("_HID"), &"QEMU0001");
    let port = aml::IO::new(platform::PANIC, platform::PANIC, 1, 1);
    let resources = aml::ResourceTemplate::new(vec![&port]);
    let resources = aml::Name::new(path("_CRS"), &resources);
    aml::Device::new(path("_SB_.PVPN"), vec![&hid, &resources]).to_aml_bytes(body);

    let hid = aml::Name::new(path("_HID"), &aml::EISAName::new("PNP0C0C"));
    aml::Device::new(path("_SB_.PWRB"), vec![&hid]).to_aml_bytes(body);

    let hid = aml::Name::new(path("_HID"), &"ACPI0013");
    let uid = aml::Name::new(path("_UID"), &aml::ZERO);
    let interrupt = aml::Interrupt::new(true, true, false, false, platform::EVENT_PIN);
    let resources = aml::ResourceTemplate::new(vec![&interrupt]);
    let resources = aml::Name::new(path("_CRS"), &resources);
    let events = path("\\_SB_.EVTS");
    let load = aml::Store::new(&aml::Local(0), &events);
    let button = platform::Event::PowerButton as u32;
    let pressed = aml::And::new(&aml::ZERO, &aml::Local(0), &button);
    let power_button = path("\\_SB_.PWRB");
    let press = aml::Notify::new(&power_button, &0x80_u8);
    let if_pressed = aml::If::new(&pressed, vec![&press]);
    let slots = platform::Event::PciSlots as u32;
    let changed = aml::And::new(&aml::ZERO, &aml::Local(0), &slots);
    let scan = aml::MethodCall::new(path("\\_SB_.PCI0.SCAN"), vec![]);
    let if_changed = aml::If::new(&changed, vec![&scan]);
    let event = aml::Method::new(path("_EVT"), 1, true, vec![&load, &if_pressed, &if_changed]);
    aml::Device::new(path("_SB_.GED0"), vec![&hid, &uid, &resources, &event]).to_aml_bytes(body);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MIB;

    fn tables(cpus: u8) -> Vec<u8> {
        build(&Layout::new(256 * MIB).unwrap(), cpus)
    }

    fn table(bytes: &[u8], address: u64) -> &[u8] {
        let at = (address - START) as usize;
        let length = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize;
        &bytes[at..at + length]
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_hangs_on_the_root_pointer_and_sums_to_zero() {
        for cpus in [1, 2, 64] {
            let bytes = tables(cpus);
            assert!(bytes.len() as u64 <= SIZE);
            assert_eq!(&bytes[..8], b"RSD PTR ");
            assert_eq!(sum(&bytes[..36]), 0);
            let xsdt = u64::from_le_bytes(bytes[24..32].try_into().unwrap());
            let xsdt = table(&bytes, xsdt);
            assert_eq!((&xsdt[..4], sum(xsdt)), (b"XSDT".as_slice(), 0));
            let mut names = Vec::new();
            for entry in xsdt[36..].chunks_exact(8) {
                let entry = table(&bytes, u64::from_le_bytes(entry.try_into().unwrap()));
                assert_eq!(sum(entry), 0);
                names.push(String::from_utf8_lossy(&entry[..4]).into_owned());
            }
            assert_eq!(names, ["FACP", "APIC", "MCFG"]);
        }
    }

    #[test]
    fn the_dsdt_sums_to_zero_and_knows_every_cpu() {
        let bytes = tables(3);
        let dsdt = table(&bytes, START + 48);
        assert_eq!((&dsdt[..4], sum(dsdt)), (b"DSDT".as_slice(), 0));
        for name in ["C000", "C002", "PCI0", "GED0", "PVPN", "S031"] {
            assert!(dsdt.windows(4).any(|w| w == name.as_bytes()), "{name}");
        }
        assert!(!dsdt.windows(4).any(|w| w == b"C003"));
    }
}
