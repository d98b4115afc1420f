//! The configuration space of one PCI function (PCI Local Bus 3.0, chapter 6).
//!
//! Type 0 header, 64-bit memory BARs only, a list of capabilities. What the guest may write is
//! told by a mask per byte; everything else ignores writes.

/// Bytes of the conventional configuration space; the extended one behind it is empty.
pub const SIZE: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BARS: usize = 0x10;
const CAPABILITIES: usize = 0x34;
/// First byte behind the header.
const FIRST_CAPABILITY: usize = 0x40;

/// Command: memory space, bus master, interrupt disable.
const COMMAND_WRITABLE: u16 = 1 << 1 | 1 << 2 | 1 << 10;
const COMMAND_MEMORY: u8 = 1 << 1;
/// Status: there is a capability list.
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// Memory BAR, 64 bits wide.
const BAR_64: u64 = 0b100;
const BAR_PREFETCHABLE: u64 = 0b1000;
/// Bits of a memory BAR that are no address.
const BAR_FLAGS: u64 = 0xf;

/// What a function is.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Class, subclass and programming interface, the class in the upper byte of three.
    pub class: u32,
    /// Revision id.
    pub revision: u8,
    /// Subsystem id; its vendor is `vendor`.
    pub subsystem: u16,
}

/// One function's configuration space.
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    sizes: [u64; 3],
    last_capability: Option<usize>,
    next: usize,
}

impl ConfigSpace {
    /// A function without BARs and capabilities.
    pub fn new(identity: &Identity) -> Self {
        let mut config = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            sizes: [0; 3],
            last_capability: None,
            next: FIRST_CAPABILITY,
        };
        config.set(0x00, &identity.vendor.to_le_bytes());
        config.set(0x02, &identity.device.to_le_bytes());
        config.set(0x08, &[identity.revision]);
        config.set(0x09, &identity.class.to_le_bytes()[..3]);
        config.set(0x2c, &identity.vendor.to_le_bytes());
        config.set(0x2e, &identity.subsystem.to_le_bytes());
        config.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE.to_le_bytes());
        // Interrupt line: a scratch byte for the operating system.
        config.writable[0x3c] = 0xff;
        config
    }

    /// Adds BAR `2 * pair`, which takes the next register as its upper half. `size` is a power of
    /// two of at least 16 bytes, `address` a multiple of it.
    pub fn add_bar(&mut self, pair: usize, address: u64, size: u64, prefetchable: bool) {
        debug_assert!(size.is_power_of_two() && size >= 16 && address.is_multiple_of(size));
        let at = BARS + 8 * pair;
        let flags = if prefetchable {
            BAR_64 | BAR_PREFETCHABLE
        } else {
            BAR_64
        };
        self.set(at, &(address | flags).to_le_bytes());
        // The bits below the size are fixed at zero: that is how the guest finds the size.
        self.writable[at..at + 8].copy_from_slice(&(!(size - 1)).to_le_bytes());
        self.sizes[pair] = size;
    }

    /// Appends a capability: `body` is what follows its id and link. Returns its offset.
    /// `writable` says which bits of the body the guest may write; what is missing is read-only.
    ///
    /// Returns `None` if the space is full.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<usize> {
        let at = self.next;
        let end = at + 2 + body.len();
        if end > SIZE {
            return None;
        }
        match self.last_capability {
            Some(last) => self.bytes[last + 1] = at as u8,
            None => {
                self.bytes[CAPABILITIES] = at as u8;
                self.bytes[STATUS] |= STATUS_CAPABILITIES;
            }
        }
        self.bytes[at] = id;
        self.set(at + 2, body);
        self.writable[at + 2..at + 2 + writable.len()].copy_from_slice(writable);
        self.last_capability = Some(at);
        self.next = end.next_multiple_of(4);
        Some(at)
    }

    /// Sets bytes whatever the mask says.
    pub fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Two bytes at `at`.
    pub fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    /// Four bytes at `at`.
    pub fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }

    /// The guest's read.
    pub fn read(&self, at: usize, data: &mut [u8]) {
        for (offset, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(at + offset).copied().unwrap_or(0);
        }
    }

    /// The guest's write.
    pub fn write(&mut self, at: usize, data: &[u8]) {
        for (offset, value) in data.iter().enumerate() {
            let Some(mask) = self.writable.get(at + offset) else {
                return;
            };
            let byte = &mut self.bytes[at + offset];
            *byte = *byte & !mask | value & mask;
        }
    }

    /// Where BAR `2 * pair` is, if the guest lets the function answer there.
    pub fn bar(&self, pair: usize) -> Option<u64> {
        let at = BARS + 8 * pair;
        let enabled = self.bytes[COMMAND] & COMMAND_MEMORY != 0 && self.sizes[pair] != 0;
        let low = u64::from(self.u32(at));
        let high = u64::from(self.u32(at + 4));
        enabled.then_some((high << 32 | low) & !BAR_FLAGS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1044,
            class: 0xff0000,
            revision: 1,
            subsystem: 0x44,
        };
        let mut config = ConfigSpace::new(&identity);
        config.add_bar(0, 0xc000_0000, 0x8000, false);
        config
    }

    #[test]
    fn a_guest_sizes_a_bar_and_puts_it_back() {
        let mut config = config();
        assert_eq!(config.bar(0), None, "off until the guest enables it");
        let before = config.u32(0x10);
        config.write(0x10, &u32::MAX.to_le_bytes());
        config.write(0x14, &u32::MAX.to_le_bytes());
        assert_eq!(config.u32(0x10), !0x7fff | 4);
        assert_eq!(config.u32(0x14), u32::MAX);
        config.write(0x10, &before.to_le_bytes());
        config.write(0x14, &0_u32.to_le_bytes());
        config.write(COMMAND, &[COMMAND_MEMORY]);
        assert_eq!(config.bar(0), Some(0xc000_0000));
    }

    #[test]
    fn a_bar_that_is_not_there_reads_zero_after_ones() {
        let mut config = config();
        config.write(0x18, &u32::MAX.to_le_bytes());
        assert_eq!(config.u32(0x18), 0);
    }

    #[test]
    fn identity_and_lengths_cannot_be_written() {
        let mut config = config();
        let mut before = [0; SIZE];
        config.read(0, &mut before);
        for at in (0..SIZE).filter(|at| !(0x10..0x18).contains(at)) {
            config.write(at, &[0xff]);
        }
        assert_eq!(config.u16(0), 0x1af4);
        assert_eq!(config.u16(COMMAND), COMMAND_WRITABLE);
        config.set(COMMAND, &[0, 0]);
        config.set(0x3c, &[0]);
        let mut after = [0; SIZE];
        config.read(0, &mut after);
        assert_eq!(before, after);
    }

    #[test]
    fn capabilities_are_linked() {
        let mut config = config();
        let first = config.add_capability(9, &[1, 2, 3], &[]).unwrap();
        let second = config.add_capability(0x11, &[0; 10], &[0, 0xc0]).unwrap();
        assert_eq!(config.bytes[CAPABILITIES] as usize, first);
        assert_eq!(config.bytes[first + 1] as usize, second);
        assert_eq!(config.bytes[second + 1], 0);
        assert_eq!(second % 4, 0);
        config.write(second + 2, &[0xff, 0xff]);
        assert_eq!(config.u16(second + 2), 0xc000);
        assert_eq!(config.add_capability(9, &[0; SIZE], &[]), None);
    }

    #[test]
    fn accesses_across_the_end_do_no_harm() {
        let mut config = config();
        config.write(SIZE - 1, &[0xff; 8]);
        let mut data = [0xff; 8];
        config.read(SIZE - 1, &mut data);
        assert_eq!(data, [0; 8]);
        config.read(4092, &mut data);
        assert_eq!(data, [0; 8]);
    }
}
