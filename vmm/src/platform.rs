//! The few registers of this machine that are no PCI device: power, panic, hot-plug events.
//!
//! [`crate::acpi`] describes them to the guest; the numbers are ours. Called by vCPU threads.
//!
//! | port  | bytes | read | write |
//! |-------|-------|------|-------|
//! | 0x505 | 1 | panic events supported | panic events (pvpanic) |
//! | 0x600 | 1 | 0 | sleep control (ACPI 6.5, 4.8.3.7) |
//! | 0x601 | 1 | 0: never woken | ignored |
//! | 0x602 | 1 | 0 | [`RESET_VALUE`] resets |
//! | 0x610 | 4 | pending [`Event`]s, cleared | ignored |
//! | 0x614 | 4 | slots plugged, cleared | ignored |
//! | 0x618 | 4 | slots to be ejected, cleared | ignored |
//! | 0x61c | 4 | 0 | slots that the guest has let go of |

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use sepal_protocol::vm::ExitCause;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::exit::Exit;

/// pvpanic's port.
pub const PANIC: u16 = 0x505;
/// Sleep control register.
pub const SLEEP_CONTROL: u16 = 0x600;
/// Sleep status register.
pub const SLEEP_STATUS: u16 = 0x601;
/// Reset register.
pub const RESET: u16 = 0x602;
/// What resets when written to [`RESET`].
pub const RESET_VALUE: u8 = 0x5a;
/// First of the hot-plug registers.
pub const EVENTS: u16 = 0x610;
/// Bytes of the hot-plug registers.
pub const EVENTS_LENGTH: u16 = 16;
const SLOTS_UP: u16 = EVENTS + 4;
const SLOTS_DOWN: u16 = EVENTS + 8;
const EJECT: u16 = EVENTS + 12;

/// The I/O APIC's input that tells of events, edge-triggered.
pub const EVENT_PIN: u32 = 5;
/// SLP_TYP of S5 in our `_S5` object.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// SLP_EN, bit 5 of the sleep control register.
const SLEEP_ENABLE: u8 = 1 << 5;

/// pvpanic: the kernel has panicked.
const PANICKED: u8 = 1 << 0;
/// pvpanic: it has panicked and starts its crash kernel.
const CRASH_LOADED: u8 = 1 << 1;

/// What the event interrupt may be about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Event {
    /// The power button was pressed.
    PowerButton = 1 << 0,
    /// Something was plugged or is to be ejected.
    PciSlots = 1 << 1,
}

/// Told which slots the guest has let go of.
type OnEject = Box<dyn Fn(u32) + Send + Sync>;

/// The registers.
pub struct Platform {
    exit: Arc<Exit>,
    interrupt: EventFd,
    events: AtomicU32,
    up: AtomicU32,
    down: AtomicU32,
    on_eject: Mutex<Option<OnEject>>,
}

impl Platform {
    /// # Errors
    /// No descriptor left.
    pub fn new(exit: Arc<Exit>) -> io::Result<Self> {
        Ok(Self {
            exit,
            interrupt: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            events: AtomicU32::new(0),
            up: AtomicU32::new(0),
            down: AtomicU32::new(0),
            on_eject: Mutex::new(None),
        })
    }

    /// To be connected to [`EVENT_PIN`].
    pub fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }

    /// Sets what is called, on a vCPU thread, when the guest lets go of slots.
    pub fn on_eject(&self, call: OnEject) {
        *self.on_eject.lock().unwrap_or_else(|e| e.into_inner()) = Some(call);
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        self.raise(Event::PowerButton);
    }

    /// Tells the guest of new devices in these slots.
    pub fn plugged(&self, slots: u32) {
        self.up.fetch_or(slots, Ordering::SeqCst);
        self.raise(Event::PciSlots);
    }

    /// Asks the guest to let go of the devices in these slots.
    pub fn request_eject(&self, slots: u32) {
        self.down.fetch_or(slots, Ordering::SeqCst);
        self.raise(Event::PciSlots);
    }

    fn raise(&self, event: Event) {
        self.events.fetch_or(event as u32, Ordering::SeqCst);
        if let Err(error) = self.interrupt.write(1) {
            tracing::error!(%error, "cannot raise the event interrupt");
        }
    }

    /// IN from a port that no other device has.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        let value = match port {
            PANIC => u32::from(PANICKED | CRASH_LOADED),
            SLEEP_CONTROL | SLEEP_STATUS | RESET => 0,
            EVENTS => self.events.swap(0, Ordering::SeqCst),
            SLOTS_UP => self.up.swap(0, Ordering::SeqCst),
            SLOTS_DOWN => self.down.swap(0, Ordering::SeqCst),
            EJECT => 0,
            _ => {
                tracing::debug!(port = format_args!("{port:#x}"), "read of nothing");
                return;
            }
        };
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    /// OUT to a port that no other device has.
    pub fn write(&self, port: u16, data: &[u8]) {
        let Some(&first) = data.first() else { return };
        match port {
            PANIC if first & (PANICKED | CRASH_LOADED) != 0 => self.exit.panicked(),
            SLEEP_CONTROL if first & SLEEP_ENABLE != 0 => {
                let kind = first >> 2 & 7;
                if kind == SLEEP_TYPE_OFF {
                    self.exit.end(ExitCause::PowerOff, "the guest powered off");
                } else {
                    tracing::debug!(kind, "the guest asks for a sleep state that is not offered");
                }
            }
            RESET if first == RESET_VALUE => {
                self.exit
                    .end(ExitCause::Reboot, "the guest asked for a reboot");
            }
            EJECT => {
                let mut bytes = [0; 4];
                let length = data.len().min(4);
                bytes[..length].copy_from_slice(&data[..length]);
                let on_eject = self.on_eject.lock().unwrap_or_else(|e| e.into_inner());
                if let Some(call) = on_eject.as_ref() {
                    call(u32::from_le_bytes(bytes));
                }
            }
            _ => tracing::debug!(port = format_args!("{port:#x}"), "write to nothing"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform() -> (Platform, Arc<Exit>) {
        let exit = Arc::new(Exit::new().unwrap());
        (Platform::new(exit.clone()).unwrap(), exit)
    }

    fn read(platform: &Platform, port: u16) -> u32 {
        let mut data = [0xff; 4];
        platform.read(port, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn sleep_off_powers_off_and_other_sleep_states_do_nothing() {
        let (platform, exit) = platform();
        for kind in [0, 1, 3, 4, 7] {
            platform.write(SLEEP_CONTROL, &[SLEEP_ENABLE | kind << 2]);
        }
        platform.write(SLEEP_CONTROL, &[SLEEP_TYPE_OFF << 2]);
        platform.write(SLEEP_CONTROL, &[]);
        assert_eq!(exit.get(), None);
        platform.write(SLEEP_CONTROL, &[SLEEP_ENABLE | SLEEP_TYPE_OFF << 2]);
        assert_eq!(exit.get().unwrap().cause, ExitCause::PowerOff);
    }

    #[test]
    fn only_the_right_value_resets() {
        let (platform, exit) = platform();
        platform.write(RESET, &[0]);
        assert_eq!(exit.get(), None);
        platform.write(RESET, &[RESET_VALUE]);
        assert_eq!(exit.get().unwrap().cause, ExitCause::Reboot);
    }

    #[test]
    fn a_panic_is_remembered_until_the_reboot() {
        let (platform, exit) = platform();
        platform.write(PANIC, &[PANICKED]);
        assert!(exit.has_panicked() && exit.get().is_none());
        platform.write(RESET, &[RESET_VALUE]);
        assert_eq!(exit.get().unwrap().cause, ExitCause::GuestPanic);
    }

    #[test]
    fn events_are_told_once() {
        let (platform, _) = platform();
        platform.press_power_button();
        platform.plugged(1 << 16);
        platform.plugged(1 << 17);
        platform.request_eject(1 << 18);
        assert_eq!(platform.interrupt().read().unwrap(), 4);
        assert_eq!(read(&platform, EVENTS), 3);
        assert_eq!(read(&platform, EVENTS), 0);
        assert_eq!(read(&platform, SLOTS_UP), 3 << 16);
        assert_eq!(read(&platform, SLOTS_DOWN), 1 << 18);
        assert_eq!(read(&platform, SLOTS_DOWN), 0);
    }

    #[test]
    fn the_guests_word_on_ejected_slots_arrives_in_any_width() {
        let (platform, _) = platform();
        let seen = Arc::new(AtomicU32::new(0));
        let theirs = seen.clone();
        platform.on_eject(Box::new(move |slots| {
            theirs.fetch_or(slots, Ordering::SeqCst);
        }));
        platform.write(EJECT, &[1]);
        platform.write(EJECT, &(1_u32 << 20).to_le_bytes());
        assert_eq!(seen.load(Ordering::SeqCst), 1 | 1 << 20);
    }

    #[test]
    fn unknown_ports_read_as_nothing() {
        let (platform, _) = platform();
        for port in [0, 0x60, 0x70, 0xcf8, 0x603, 0x620, u16::MAX] {
            assert_eq!(read(&platform, port), u32::MAX);
            platform.write(port, &[0xff; 8]);
        }
    }
}
