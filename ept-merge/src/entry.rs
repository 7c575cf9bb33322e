//! EPT entries ("Extended Page-Table Mechanism", SDM volume 3).

use std::ops::{BitAnd, BitAndAssign, BitOr, BitOrAssign};

/// What the "mode-based execute control for EPT" makes of instruction fetches.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum ExecuteControl {
    /// Bit 2 of an entry for all code.
    Single,
    /// Bit 2 for code at supervisor-mode, bit 10 for code at user-mode linear addresses.
    ModeBased,
}

/// Leave to read, write and execute. Under [`ExecuteControl::Single`] both kinds of execution go together.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Permissions(u64);

impl Permissions {
    pub const NONE: Self = Self(0);
    pub const READ: Self = Self(1);
    pub const WRITE: Self = Self(2);
    /// Fetches from supervisor-mode linear addresses.
    pub const EXECUTE: Self = Self(4);
    /// Fetches from user-mode linear addresses.
    pub const USER_EXECUTE: Self = Self(8);
    pub const ALL: Self = Self(15);

    /// Everything in `other` is in `self`.
    #[inline]
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Some of `other` is in `self`.
    #[inline]
    pub fn has_any(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// All but `other`.
    #[inline]
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Read, write, execute and user-execute in bits 3:0.
    #[inline]
    pub fn bits(self) -> u64 {
        self.0
    }

    /// The opposite of [`Self::bits`]; higher bits are dropped.
    #[inline]
    pub fn from_bits(bits: u64) -> Self {
        Self(bits & Self::ALL.0)
    }
}

/// What two levels both allow.
impl BitAnd for Permissions {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl BitAndAssign for Permissions {
    fn bitand_assign(&mut self, other: Self) {
        *self = *self & other;
    }
}

impl BitOr for Permissions {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for Permissions {
    fn bitor_assign(&mut self, other: Self) {
        *self = *self | other;
    }
}

/// Why an entry is an EPT misconfiguration ("EPT Misconfigurations").
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Misconfiguration {
    /// Writable but not readable.
    WriteWithoutRead,
    /// Executable only, where the processor does not offer that.
    ExecuteOnly,
    /// A reserved bit is set.
    ReservedBit,
    /// A leaf with memory type 2, 3 or 7.
    MemoryType,
}

/// What the processor offers, as IA32_VMX_EPT_VPID_CAP says.
#[derive(Clone, Copy, Debug)]
pub struct Capabilities {
    pub execute_only: bool,
    pub pages_2m: bool,
    pub pages_1g: bool,
    pub accessed_dirty: bool,
    /// Memory types of the tables.
    pub uncacheable: bool,
    pub write_back: bool,
    /// MAXPHYADDR.
    pub physical_bits: u32,
}

impl Capabilities {
    /// From the value of IA32_VMX_EPT_VPID_CAP and MAXPHYADDR.
    pub fn from_msr(ept_vpid_cap: u64, physical_bits: u32) -> Self {
        let has = |bit: u32| ept_vpid_cap >> bit & 1 != 0;
        Self {
            execute_only: has(0),
            uncacheable: has(8),
            write_back: has(14),
            pages_2m: has(16),
            pages_1g: has(17),
            accessed_dirty: has(21),
            physical_bits: physical_bits.min(52),
        }
    }
}

/// An entry of the table at `level` (4 = PML4E ... 1 = PTE).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Entry {
    pub raw: u64,
    pub level: u32,
}

impl Entry {
    const LARGE: u64 = 1 << 7;
    /// Bit 8, where the EPT pointer enables accessed and dirty flags.
    pub const ACCESSED: u64 = 1 << 8;
    /// Bit 9, of leaves.
    pub const DIRTY: u64 = 1 << 9;
    const USER_EXECUTE: u32 = 10;
    const SUPPRESS_VE: u64 = 1 << 63;
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

    /// Bits 2:0, and bit 10 where it counts.
    #[inline]
    pub fn permissions(self, execute: ExecuteControl) -> Permissions {
        let user = match execute {
            ExecuteControl::Single => self.raw >> 2 & 1,
            ExecuteControl::ModeBased => self.raw >> Self::USER_EXECUTE & 1,
        };
        Permissions(self.raw & 7 | user << 3)
    }

    /// Some access is allowed; otherwise every other bit but "suppress #VE" is ignored.
    #[inline]
    pub fn is_present(self, execute: ExecuteControl) -> bool {
        self.permissions(execute) != Permissions::NONE
    }

    /// It maps a page rather than a table.
    #[inline]
    pub fn is_leaf(self) -> bool {
        self.level == 1 || self.level < 4 && self.raw & Self::LARGE != 0
    }

    /// Bytes that one entry of this level spans.
    #[inline]
    pub fn span(self) -> u64 {
        span_of(self.level)
    }

    /// The table or page it names.
    #[inline]
    pub fn address(self) -> u64 {
        let span = if self.is_leaf() { self.span() } else { 4096 };
        self.raw & Self::ADDRESS & !(span - 1)
    }

    /// Memory type of a leaf (bits 5:3).
    #[inline]
    pub fn memory_type(self) -> u64 {
        self.raw >> 3 & 7
    }

    /// A leaf's "ignore PAT" (bit 6).
    #[inline]
    pub fn ignores_pat(self) -> bool {
        self.raw >> 6 & 1 != 0
    }

    /// An EPT violation that this entry ends is a VM exit even where #VE is enabled.
    #[inline]
    pub fn suppresses_ve(self) -> bool {
        self.raw & Self::SUPPRESS_VE != 0
    }

    /// The rules of "EPT Misconfigurations", for a present entry.
    pub fn check(self, caps: &Capabilities, execute: ExecuteControl) -> Result<(), Misconfiguration> {
        let allowed = self.permissions(execute);
        if !allowed.contains(Permissions::READ) {
            if allowed.contains(Permissions::WRITE) {
                return Err(Misconfiguration::WriteWithoutRead);
            }
            if !caps.execute_only && allowed.has_any(Permissions::EXECUTE | Permissions::USER_EXECUTE) {
                return Err(Misconfiguration::ExecuteOnly);
            }
        }
        if self.raw & self.reserved(caps) != 0 {
            return Err(Misconfiguration::ReservedBit);
        }
        if self.is_leaf() && matches!(self.memory_type(), 2 | 3 | 7) {
            return Err(Misconfiguration::MemoryType);
        }
        Ok(())
    }

    fn reserved(self, caps: &Capabilities) -> u64 {
        let above = Self::ADDRESS & !((1u64 << caps.physical_bits) - 1);
        let structural = match self.level {
            4 => 0xf8,
            3 if !caps.pages_1g => 0xf8,
            2 if !caps.pages_2m => 0xf8,
            1 => 0,
            _ if self.is_leaf() => (self.span() - 1) & !0xfff,
            _ => 0x78,
        };
        above | structural
    }
}

/// Bytes that one entry at `level` spans.
#[inline]
pub fn span_of(level: u32) -> u64 {
    1 << (12 + 9 * (level - 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_memory::CAPS;
    use ExecuteControl::{ModeBased, Single};

    fn check(raw: u64, level: u32) -> Result<(), Misconfiguration> {
        Entry { raw, level }.check(&CAPS, Single)
    }

    #[test]
    fn misconfigurations_are_told_apart() {
        assert_eq!(check(0x1037, 1), Ok(()));
        assert_eq!(check(0x1032, 1), Err(Misconfiguration::WriteWithoutRead));
        assert_eq!(check(0x1036, 1), Err(Misconfiguration::WriteWithoutRead));
        assert_eq!(check(0x1034, 1), Ok(()));
        let without = Capabilities { execute_only: false, ..CAPS };
        assert_eq!(
            Entry { raw: 0x1034, level: 1 }.check(&without, Single),
            Err(Misconfiguration::ExecuteOnly)
        );
        for memory_type in 0..8 {
            let expected =
                if [2, 3, 7].contains(&memory_type) { Err(Misconfiguration::MemoryType) } else { Ok(()) };
            assert_eq!(check(0x1000 | memory_type << 3 | 7, 1), expected);
            assert_eq!(check(0x20_0087 | memory_type << 3, 2), expected);
        }
        assert_eq!(check(1 << 46 | 0x37, 1), Err(Misconfiguration::ReservedBit));
        assert_eq!(check(0x1087, 4), Err(Misconfiguration::ReservedBit));
        assert_eq!(check(0x1000 | 0xb7, 2), Err(Misconfiguration::ReservedBit));
        assert_eq!(check(0x20_0000 | 0xb7, 2), Ok(()));
    }

    #[test]
    fn reserved_bits_of_every_level() {
        let reserved = |level: u32, raw: u64| {
            (0..64)
                .filter(|bit| check(raw | 1 << bit, level) == Err(Misconfiguration::ReservedBit))
                .collect::<Vec<u32>>()
        };
        let beyond: Vec<u32> = (46..52).collect();
        let and_beyond = |low: std::ops::Range<u32>| low.chain(46..52).collect::<Vec<_>>();
        assert_eq!(reserved(4, 7), and_beyond(3..8));
        assert_eq!(reserved(1, 0x37), beyond);
        // Setting bit 7 makes a page of it, whose address is aligned here.
        assert_eq!(reserved(3, 7), and_beyond(3..7));
        assert_eq!(reserved(2, 7), and_beyond(3..7));
        assert_eq!(reserved(3, 0xb7), and_beyond(12..30));
        assert_eq!(reserved(2, 0xb7), and_beyond(12..21));
        let small = Capabilities { pages_2m: false, pages_1g: false, ..CAPS };
        for level in [2, 3] {
            let large = Entry { raw: 0xb7, level };
            assert_eq!(large.check(&small, Single), Err(Misconfiguration::ReservedBit));
        }
    }

    #[test]
    fn user_execution_is_a_bit_of_its_own_only_under_mode_based_control() {
        let user_only = Entry { raw: 1 << 10 | 0x30, level: 1 };
        assert!(!user_only.is_present(Single));
        assert!(user_only.is_present(ModeBased));
        assert_eq!(user_only.permissions(ModeBased), Permissions::USER_EXECUTE);
        assert_eq!(user_only.check(&CAPS, ModeBased), Ok(()));
        let without = Capabilities { execute_only: false, ..CAPS };
        assert_eq!(user_only.check(&without, ModeBased), Err(Misconfiguration::ExecuteOnly));
        let supervisor = Entry { raw: 0x37, level: 1 };
        assert_eq!(supervisor.permissions(Single), Permissions::ALL);
        assert_eq!(supervisor.permissions(ModeBased), Permissions::ALL.without(Permissions::USER_EXECUTE));
    }

    #[test]
    fn large_pages_name_their_whole_span() {
        let entry = Entry { raw: 0x1234_5678_90b7 & !0x1000 | 0x80, level: 2 };
        assert!(entry.is_leaf());
        assert_eq!(entry.address(), 0x1234_5660_0000);
        assert_eq!(entry.span(), 2 << 20);
        assert!(Permissions::ALL.contains(Permissions::READ & Permissions::ALL));
    }

    #[test]
    fn capabilities_as_the_msr_has_them() {
        let caps = Capabilities::from_msr(1 | 1 << 6 | 1 << 14 | 1 << 16 | 1 << 21, 46);
        assert!(caps.execute_only && caps.write_back && caps.pages_2m && caps.accessed_dirty);
        assert!(!caps.uncacheable && !caps.pages_1g);
    }
}
