//! EPT entries ("Extended Page-Table Mechanism", SDM volume 3).

use std::ops::BitAnd;

/// Leave to read, write and execute (bits 2:0 of an entry).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Permissions(u64);

impl Permissions {
    pub const NONE: Self = Self(0);
    pub const READ: Self = Self(1);
    pub const WRITE: Self = Self(2);
    pub const EXECUTE: Self = Self(4);
    pub const ALL: Self = Self(7);

    /// Everything in `other` is in `self`.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// What two levels both allow.
impl BitAnd for Permissions {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
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
    /// MAXPHYADDR.
    pub physical_bits: u32,
}

/// An entry of the table at `level` (4 = PML4E ... 1 = PTE).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Entry {
    pub raw: u64,
    pub level: u32,
}

impl Entry {
    const LARGE: u64 = 1 << 7;
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

    /// Bits 2:0.
    pub fn permissions(self) -> Permissions {
        Permissions(self.raw & 7)
    }

    /// Some access is allowed; otherwise every other bit is ignored.
    pub fn is_present(self) -> bool {
        self.permissions() != Permissions::NONE
    }

    /// It maps a page rather than a table.
    pub fn is_leaf(self) -> bool {
        self.level == 1 || self.level < 4 && self.raw & Self::LARGE != 0
    }

    /// Bytes that one entry of this level spans.
    pub fn span(self) -> u64 {
        1 << (12 + 9 * (self.level - 1))
    }

    /// The table or page it names.
    pub fn address(self) -> u64 {
        let span = if self.is_leaf() { self.span() } else { 4096 };
        self.raw & Self::ADDRESS & !(span - 1)
    }

    /// Memory type of a leaf (bits 5:3).
    pub fn memory_type(self) -> u64 {
        self.raw >> 3 & 7
    }

    /// The rules of "EPT Misconfigurations", for a present entry.
    pub fn check(self, caps: &Capabilities) -> Result<(), Misconfiguration> {
        let allowed = self.permissions();
        if allowed.contains(Permissions::WRITE) && !allowed.contains(Permissions::READ) {
            return Err(Misconfiguration::WriteWithoutRead);
        }
        if allowed == Permissions::EXECUTE && !caps.execute_only {
            return Err(Misconfiguration::ExecuteOnly);
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

#[cfg(test)]
mod tests {
    use super::*;

    const CAPS: Capabilities =
        Capabilities { execute_only: true, pages_2m: true, pages_1g: true, physical_bits: 46 };

    fn check(raw: u64, level: u32) -> Result<(), Misconfiguration> {
        Entry { raw, level }.check(&CAPS)
    }

    #[test]
    fn misconfigurations_are_told_apart() {
        assert_eq!(check(0x1037, 1), Ok(()));
        assert_eq!(check(0x1032, 1), Err(Misconfiguration::WriteWithoutRead));
        assert_eq!(check(0x1034, 1), Ok(()));
        let without = Capabilities { execute_only: false, ..CAPS };
        assert_eq!(Entry { raw: 0x1034, level: 1 }.check(&without), Err(Misconfiguration::ExecuteOnly));
        assert_eq!(check(0x1000 | 2 << 3 | 7, 1), Err(Misconfiguration::MemoryType));
        assert_eq!(check(1 << 46 | 0x37, 1), Err(Misconfiguration::ReservedBit));
        assert_eq!(check(0x1087, 4), Err(Misconfiguration::ReservedBit));
        assert_eq!(check(0x1000 | 0xb7, 2), Err(Misconfiguration::ReservedBit));
        assert_eq!(check(0x20_0000 | 0xb7, 2), Ok(()));
    }

    #[test]
    fn large_pages_name_their_whole_span() {
        let entry = Entry { raw: 0x1234_5678_90b7 & !0x1000 | 0x80, level: 2 };
        assert!(entry.is_leaf());
        assert_eq!(entry.address(), 0x1234_5660_0000);
        assert_eq!(entry.span(), 2 << 20);
        assert!(Permissions::ALL.contains(Permissions::READ & Permissions::ALL));
    }
}
