//! The early console: as much of a 16550A at ttyS0 as printk needs.
//!
//! Only there when the specification asks for it: every byte costs an exit. It transmits and never
//! receives; it raises no interrupt.

use std::sync::{Arc, Mutex};

use crate::virtio::console::Log;

/// COM1.
pub const PORT: u16 = 0x3f8;
/// The last of its ports.
pub const LAST_PORT: u16 = PORT + 7;

const DATA: u16 = 0;
const INTERRUPT_ENABLE: u16 = 1;
const INTERRUPT_ID: u16 = 2;
const LINE_CONTROL: u16 = 3;
const MODEM_CONTROL: u16 = 4;
const LINE_STATUS: u16 = 5;
const MODEM_STATUS: u16 = 6;
const SCRATCH: u16 = 7;

/// Line control: the first two registers are the baud rate's divisor.
const DIVISOR_LATCH: u8 = 0x80;
/// Line status: transmitter empty, holding register empty.
const TRANSMITTER_IDLE: u8 = 0x60;
/// Modem status: carrier, data set ready, clear to send.
const LINE_UP: u8 = 0xb0;
/// No interrupt pending; FIFOs on, as a 16550A says.
const NO_INTERRUPT: u8 = 0xc1;

#[derive(Default)]
struct Registers {
    interrupt_enable: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    divisor: [u8; 2],
}

/// The device.
pub struct Serial {
    registers: Mutex<Registers>,
    log: Arc<Log>,
}

impl Serial {
    /// What the guest sends goes to `log`.
    pub fn new(log: Arc<Log>) -> Self {
        Self {
            registers: Mutex::default(),
            log,
        }
    }

    /// Reads register `offset`.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let registers = self.registers.lock().unwrap_or_else(|e| e.into_inner());
        let latched = registers.line_control & DIVISOR_LATCH != 0;
        let value = match offset {
            DATA | INTERRUPT_ENABLE if latched => registers.divisor[usize::from(offset)],
            INTERRUPT_ENABLE => registers.interrupt_enable,
            INTERRUPT_ID => NO_INTERRUPT,
            LINE_CONTROL => registers.line_control,
            MODEM_CONTROL => registers.modem_control,
            LINE_STATUS => TRANSMITTER_IDLE,
            MODEM_STATUS => LINE_UP,
            SCRATCH => registers.scratch,
            _ => 0,
        };
        data.fill(value);
    }

    /// Writes register `offset`, once for each byte.
    pub fn write(&self, offset: u16, data: &[u8]) {
        let mut registers = self.registers.lock().unwrap_or_else(|e| e.into_inner());
        let latched = registers.line_control & DIVISOR_LATCH != 0;
        match offset {
            DATA | INTERRUPT_ENABLE if latched => {
                if let Some(value) = data.last() {
                    registers.divisor[usize::from(offset)] = *value;
                }
            }
            DATA => self.log.write(data),
            _ => {
                let Some(&value) = data.last() else { return };
                match offset {
                    // Only the four that a 16550A has; drivers probe for the others.
                    INTERRUPT_ENABLE => registers.interrupt_enable = value & 0x0f,
                    LINE_CONTROL => registers.line_control = value,
                    MODEM_CONTROL => registers.modem_control = value & 0x1f,
                    SCRATCH => registers.scratch = value,
                    _ => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_reach_the_log_but_the_divisor_does_not() {
        let log = Log::new(None).unwrap();
        let serial = Serial::new(log.clone());
        serial.write(LINE_CONTROL, &[DIVISOR_LATCH]);
        serial.write(DATA, b"?");
        let mut divisor = [0];
        serial.read(DATA, &mut divisor);
        assert_eq!(divisor, [b'?']);
        serial.write(LINE_CONTROL, &[3]);
        for byte in b"hello\n" {
            let mut status = [0];
            serial.read(LINE_STATUS, &mut status);
            assert_eq!(status[0] & 0x20, 0x20, "ready for the next byte");
            serial.write(DATA, &[*byte]);
        }
        assert_eq!(log.tail(), ["hello"]);
    }

    #[test]
    fn every_register_takes_accesses_of_any_width() {
        let serial = Serial::new(Log::new(None).unwrap());
        for offset in 0..16 {
            for width in [0, 1, 2, 4, 64] {
                serial.write(offset, &vec![0xff; width]);
                serial.read(offset, &mut vec![0; width]);
            }
        }
    }
}
