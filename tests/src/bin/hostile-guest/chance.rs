//! Chance that can be repeated.

/// xorshift64*: chance that can be repeated.
pub struct Chance(pub u64);

impl Chance {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, count: u64) -> u64 {
        self.next() % count.max(1)
    }

    pub fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    pub fn of<T: Copy>(&mut self, some: &[T]) -> T {
        some[self.below(some.len() as u64) as usize]
    }

    /// A number as checks forget them: small, round, at an edge, or any.
    pub fn number(&mut self) -> u64 {
        let near = self.below(9).wrapping_sub(4);
        let bit = 1_u64 << self.below(64);
        match self.below(6) {
            0 => self.below(16),
            1 => bit.wrapping_add(near),
            2 => near,
            3 => u64::from(u32::MAX).wrapping_add(near),
            4 => self.below(1 << 16),
            _ => self.next(),
        }
    }
}
