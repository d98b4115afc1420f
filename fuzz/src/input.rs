//! The bytes of one run, read from front to back.
//!
//! Deliberately simple: a seed can be written by hand, a crash read with hexdump, and a mutation of one
//! byte changes one decision. What is missing at the end is zero, so that every input means something.

/// See the module.
#[derive(Debug, Clone)]
pub struct Input {
    bytes: Vec<u8>,
    at: usize,
}

impl Input {
    /// From its first byte on.
    pub fn new(bytes: &[u8]) -> Self {
        Self {
            bytes: bytes.to_vec(),
            at: 0,
        }
    }

    /// Whether all of it has been read.
    pub fn is_empty(&self) -> bool {
        self.at == self.bytes.len()
    }

    /// The next `count` bytes, or those that are left.
    pub fn take(&mut self, count: usize) -> Vec<u8> {
        let end = self.at.saturating_add(count).min(self.bytes.len());
        let taken = self.bytes[self.at..end].to_vec();
        self.at = end;
        taken
    }

    /// All that is left.
    pub fn rest(&mut self) -> Vec<u8> {
        self.take(usize::MAX)
    }

    /// Bytes whose number comes first, in one byte.
    pub fn some(&mut self) -> Vec<u8> {
        let count = self.byte();
        self.take(count.into())
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let taken = self.take(N);
        array[..taken.len()].copy_from_slice(&taken);
        array
    }

    /// One byte.
    pub fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// Two bytes, little-endian.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// Four bytes, little-endian.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// Eight bytes, little-endian.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A number below `end`, from one byte.
    pub fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end.max(1)
    }
}
