//! MSI-X of one function (PCI Local Bus 3.0, 6.8.2): table, pending bits, and the wires behind them.
//!
//! Each vector is an eventfd. While the guest lets it through, the eventfd is KVM's irqfd and a
//! write to it interrupts without the VMM. While it is masked the irqfd is taken away, so that the
//! eventfd remembers what was written: that is the pending bit, and KVM finds it when the irqfd
//! comes back.

use std::io;
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::wires::Wires;
use crate::kvm::Msi;
use crate::sys::event_fd;

/// Bytes of a table entry.
pub const ENTRY: usize = 16;
/// Message control: MSI-X enable.
pub const ENABLE: u16 = 1 << 15;
/// Message control: function mask.
pub const FUNCTION_MASK: u16 = 1 << 14;

#[derive(Default)]
struct Vector {
    message: Msi,
    masked: bool,
    /// Taken when first unmasked, kept as long as the function is there.
    gsi: Option<u32>,
    /// The message that the irqfd stands for, while there is one.
    connected: Option<Msi>,
}

/// The function's vectors.
pub struct Msix {
    vectors: Vec<Vector>,
    events: Arc<[EventFd]>,
    open: bool,
    wires: Arc<dyn Wires>,
}

impl Msix {
    /// `count` vectors, all masked, MSI-X off.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn new(count: u16, wires: Arc<dyn Wires>) -> io::Result<Self> {
        let event = |_| EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK);
        let events: Vec<_> = (0..count).map(event).collect::<io::Result<_>>()?;
        let vector = |_| Vector {
            masked: true,
            ..Vector::default()
        };
        Ok(Self {
            vectors: (0..count).map(vector).collect(),
            events: events.into(),
            open: false,
            wires,
        })
    }

    /// The eventfd of each vector: a write interrupts, now or when it is unmasked.
    pub fn events(&self) -> Arc<[EventFd]> {
        self.events.clone()
    }

    /// The guest has written message control.
    pub fn set_control(&mut self, control: u16) {
        let open = control & ENABLE != 0 && control & FUNCTION_MASK == 0;
        if open != self.open {
            self.open = open;
            (0..self.vectors.len()).for_each(|vector| self.rewire(vector));
        }
    }

    /// The guest's read from the table.
    pub fn read_table(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        let mut entry = [0_u8; ENTRY];
        for (at, byte) in data.iter_mut().enumerate() {
            let at = offset + at;
            let Some(vector) = self.vectors.get(at / ENTRY) else {
                return;
            };
            entry[..8].copy_from_slice(&vector.message.address.to_le_bytes());
            entry[8..12].copy_from_slice(&vector.message.data.to_le_bytes());
            entry[12..].copy_from_slice(&u32::from(vector.masked).to_le_bytes());
            *byte = entry[at % ENTRY];
        }
    }

    /// The guest's write to the table: 4 or 8 bytes, aligned. Others are ignored, as PCI leaves
    /// them undefined.
    pub fn write_table(&mut self, offset: usize, data: &[u8]) {
        let aligned = matches!(data.len(), 4 | 8) && offset.is_multiple_of(data.len());
        let index = offset / ENTRY;
        let Some(vector) = self.vectors.get_mut(index).filter(|_| aligned) else {
            return;
        };
        for (field, value) in (offset % ENTRY / 4..).zip(data.chunks_exact(4)) {
            let value = u32::from_le_bytes([value[0], value[1], value[2], value[3]]);
            let message = &mut vector.message;
            match field {
                0 => message.address = message.address & !0xffff_ffff | u64::from(value & !3),
                1 => message.address = message.address & 0xffff_ffff | u64::from(value) << 32,
                2 => message.data = value,
                _ => vector.masked = value & 1 != 0,
            }
        }
        self.rewire(index);
    }

    /// The guest's read of pending bits. Writes to them are ignored.
    pub fn read_pending(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in data.iter_mut().enumerate() {
            let first = 8 * (offset + at);
            *byte = (0..8)
                .filter(|bit| self.pending(first + bit))
                .fold(0, |b, bit| b | 1 << bit);
        }
    }

    fn pending(&self, index: usize) -> bool {
        let Some(vector) = self.vectors.get(index) else {
            return false;
        };
        vector.connected.is_none() && readable(&self.events[index])
    }

    /// Makes the irqfd of a vector what masks and message say.
    fn rewire(&mut self, index: usize) {
        let vector = &mut self.vectors[index];
        let event = &self.events[index];
        let wanted = (self.open && !vector.masked).then_some(vector.message);
        if wanted == vector.connected {
            return;
        }
        let done = match (wanted, vector.gsi) {
            (None, Some(gsi)) => self.wires.disconnect(event, gsi),
            (None, None) => Ok(()),
            (Some(message), gsi) => {
                let gsi = gsi.unwrap_or_else(|| self.wires.allocate_gsi());
                vector.gsi = Some(gsi);
                self.wires
                    .route(gsi, message)
                    .and_then(|()| match vector.connected {
                        Some(_) => Ok(()),
                        None => self.wires.connect(event, gsi),
                    })
            }
        };
        match done {
            Ok(()) => vector.connected = wanted,
            Err(error) => tracing::error!(%error, vector = index, "interrupt cannot be wired"),
        }
    }
}

impl Drop for Msix {
    fn drop(&mut self) {
        self.open = false;
        (0..self.vectors.len()).for_each(|vector| self.rewire(vector));
        // KVM has some thousands of them, and devices come and go.
        let unwired = self.vectors.iter().filter(|v| v.connected.is_none());
        unwired
            .filter_map(|vector| vector.gsi)
            .for_each(|gsi| self.wires.free_gsi(gsi));
    }
}

fn readable(event: &EventFd) -> bool {
    let mut fds = [PollFd::new(event_fd(event), PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1))
}

#[cfg(test)]
mod tests {
    use super::super::testing::TestWires;
    use super::*;

    const MESSAGE: Msi = Msi {
        address: 0xfee0_1000,
        data: 0x4021,
    };

    fn program(msix: &mut Msix, vector: usize, mask: u32) {
        let at = ENTRY * vector;
        msix.write_table(at, &(MESSAGE.address as u32).to_le_bytes());
        msix.write_table(at + 4, &0_u32.to_le_bytes());
        msix.write_table(at + 8, &MESSAGE.data.to_le_bytes());
        msix.write_table(at + 12, &mask.to_le_bytes());
    }

    #[test]
    fn an_unmasked_vector_is_wired_and_a_masked_one_remembers() {
        let wires = Arc::new(TestWires::default());
        let mut msix = Msix::new(3, wires.clone()).unwrap();
        msix.set_control(ENABLE);
        program(&mut msix, 1, 0);
        msix.events()[1].write(1).unwrap();
        assert_eq!(wires.interrupts(), [MESSAGE]);

        msix.write_table(ENTRY + 12, &1_u32.to_le_bytes());
        msix.events()[1].write(1).unwrap();
        assert_eq!(wires.interrupts(), []);
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending[0], 0b10);

        msix.write_table(ENTRY + 12, &0_u32.to_le_bytes());
        assert_eq!(wires.interrupts(), [MESSAGE]);
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [0; 8]);
    }

    #[test]
    fn the_function_mask_holds_all_vectors_back() {
        let wires = Arc::new(TestWires::default());
        let mut msix = Msix::new(2, wires.clone()).unwrap();
        msix.set_control(ENABLE | FUNCTION_MASK);
        program(&mut msix, 0, 0);
        program(&mut msix, 1, 0);
        msix.events()[0].write(1).unwrap();
        assert_eq!(wires.interrupts(), []);
        msix.set_control(ENABLE);
        assert_eq!(wires.interrupts(), [MESSAGE]);
        msix.set_control(0);
        assert_eq!(wires.connected(), 0);
    }

    #[test]
    fn a_message_may_change_while_it_is_wired() {
        let wires = Arc::new(TestWires::default());
        let mut msix = Msix::new(1, wires.clone()).unwrap();
        msix.set_control(ENABLE);
        program(&mut msix, 0, 0);
        msix.write_table(8, &7_u32.to_le_bytes());
        msix.events()[0].write(1).unwrap();
        assert_eq!(wires.interrupts(), [Msi { data: 7, ..MESSAGE }]);
        drop(msix);
        assert_eq!(wires.connected(), 0);
        assert_eq!(wires.allocated(), 0, "numbers are given back");
    }

    #[test]
    fn the_table_reads_back_and_its_surroundings_read_zero() {
        let mut msix = Msix::new(2, Arc::new(TestWires::default())).unwrap();
        program(&mut msix, 1, 1);
        let mut entry = [0xff; 16];
        msix.read_table(ENTRY, &mut entry);
        assert_eq!(entry[..4], 0xfee0_1000_u32.to_le_bytes());
        assert_eq!(entry[8..], [0x21, 0x40, 0, 0, 1, 0, 0, 0]);
        msix.read_table(2 * ENTRY - 4, &mut entry);
        assert_eq!(entry[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn accesses_of_odd_width_or_place_are_ignored() {
        let mut msix = Msix::new(1, Arc::new(TestWires::default())).unwrap();
        msix.set_control(ENABLE);
        for (offset, length) in [
            (0, 1),
            (2, 4),
            (4, 8),
            (12, 2),
            (16, 4),
            (1 << 20, 8),
            (0, 0),
        ] {
            msix.write_table(offset, &vec![0xff; length]);
        }
        let mut entry = [0; 16];
        msix.read_table(0, &mut entry);
        assert_eq!(entry[..12], [0; 12]);
        let mut bits = [0xff; 4];
        msix.read_pending(1 << 20, &mut bits);
        assert_eq!(bits, [0; 4]);
    }
}
