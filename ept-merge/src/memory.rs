//! Addresses, and L1's memory as this crate needs it.

/// An address that L2 takes for physical.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct L2Gpa(pub u64);

/// An address that L1 takes for physical.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct L1Gpa(pub u64);

/// L1's physical memory. Other processors change it at any time.
pub trait Memory {
    /// The aligned 8 bytes at `address`; none outside RAM.
    fn read_entry(&self, address: L1Gpa) -> Option<u64>;

    /// Makes `new` of `old` atomically; false if something else is there by now.
    fn exchange_entry(&self, address: L1Gpa, old: u64, new: u64) -> bool;

    /// Writes an entry of the page-modification log; lost outside RAM.
    fn write_log(&self, address: L1Gpa, value: u64);
}

/// What EPT02 must know of EPT01.
pub trait Ept01 {
    /// Bytes of a naturally aligned piece around `page` that EPT01 maps as one: a page of EPT02 is no larger.
    fn span(&self, page: L1Gpa) -> u64;
}

/// L1-physical addresses are what the engine takes for physical.
#[derive(Clone, Copy, Debug, Default)]
pub struct Identity;

impl Ept01 for Identity {
    #[inline]
    fn span(&self, _page: L1Gpa) -> u64 {
        u64::MAX
    }
}
