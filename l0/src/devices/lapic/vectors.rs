//! A set of interrupt vectors, as ISR, TMR and IRR hold them.

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct VectorSet([u32; 8]);

impl VectorSet {
    pub(super) fn insert(&mut self, vector: u8) {
        self.0[usize::from(vector >> 5)] |= 1 << (vector & 31);
    }

    pub(super) fn remove(&mut self, vector: u8) {
        self.0[usize::from(vector >> 5)] &= !(1 << (vector & 31));
    }

    pub(super) fn assign(&mut self, vector: u8, member: bool) {
        if member { self.insert(vector) } else { self.remove(vector) }
    }

    pub(super) fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 5)] & (1 << (vector & 31)) != 0
    }

    /// The highest vector in the set.
    pub(super) fn highest(&self) -> Option<u8> {
        let word = (0..8).rev().find(|&i| self.0[i] != 0)?;
        Some((word as u32 * 32 + 31 - self.0[word].leading_zeros()) as u8)
    }

    /// Register `index & 7` of the eight that show the set.
    pub(super) fn word(&self, index: u16) -> u32 {
        self.0[usize::from(index & 7)]
    }
}
