//! The EPT pointer.

use crate::entry::{Capabilities, ExecuteControl};
use crate::memory::L1Gpa;

const MEMORY_TYPE: u64 = 7;
const UNCACHEABLE: u64 = 0;
const WRITE_BACK: u64 = 6;
/// Bits 5:3: one less than the length of a walk.
const WALK_LENGTH: u64 = 7 << 3;
const FOUR_LEVELS: u64 = 3 << 3;
/// Bit 6: accessed and dirty flags are enabled.
pub const ACCESSED_DIRTY: u64 = 1 << 6;
const RESERVED: u64 = 0xf80;
const TABLE: u64 = 0x000f_ffff_ffff_f000;

/// The EPT pointer's rules in "VM-Execution Control Fields" (checks on VM entry), which VMFUNC's EPTP switching and
/// single-context INVEPT apply as well.
pub fn check_eptp(eptp: u64, caps: &Capabilities) -> bool {
    let memory_type = match eptp & MEMORY_TYPE {
        UNCACHEABLE => caps.uncacheable,
        WRITE_BACK => caps.write_back,
        _ => false,
    };
    let beyond = !((1u64 << caps.physical_bits.min(52)) - 1);
    memory_type
        && eptp & WALK_LENGTH == FOUR_LEVELS
        && (eptp & ACCESSED_DIRTY == 0 || caps.accessed_dirty)
        && eptp & (RESERVED | beyond) == 0
}

/// Everything outside the tables that a translation depends on. Mappings are kept apart by all of it, and dropped by
/// the table's address alone, as "Invalidating Cached Information" names them (EP4TA).
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Root {
    pub table: L1Gpa,
    /// Accessed and dirty flags are enabled.
    pub accessed_dirty: bool,
    pub execute: ExecuteControl,
}

impl Root {
    pub fn new(eptp: u64, execute: ExecuteControl) -> Self {
        Self { table: Self::table_of(eptp), accessed_dirty: eptp & ACCESSED_DIRTY != 0, execute }
    }

    /// The root table of an EPT pointer (EP4TA).
    pub fn table_of(eptp: u64) -> L1Gpa {
        L1Gpa(eptp & TABLE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_memory::CAPS;

    #[test]
    fn each_rule_of_the_pointer() {
        assert!(check_eptp(0x1000 | 0x1e, &CAPS));
        assert!(check_eptp(0x1000 | 0x18, &CAPS), "uncacheable");
        assert!(check_eptp(0x1000 | 0x5e, &CAPS), "accessed and dirty flags");
        for memory_type in [1, 2, 3, 4, 5, 7] {
            assert!(!check_eptp(0x1018 | memory_type, &CAPS));
        }
        for length in [0, 1, 2, 4, 5, 6, 7] {
            assert!(!check_eptp(0x1006 | length << 3, &CAPS));
        }
        for bit in 7..12 {
            assert!(!check_eptp(0x101e | 1 << bit, &CAPS), "bit {bit}");
        }
        assert!(check_eptp(0x101e | 1 << 45, &CAPS));
        for bit in 46..64 {
            assert!(!check_eptp(0x101e | 1 << bit, &CAPS), "bit {bit}");
        }
        assert!(!check_eptp(0x105e, &Capabilities { accessed_dirty: false, ..CAPS }));
        assert!(!check_eptp(0x1018, &Capabilities { uncacheable: false, ..CAPS }));
        assert!(!check_eptp(0x101e, &Capabilities { write_back: false, ..CAPS }));
    }

    #[test]
    fn roots_differ_in_what_changes_translations() {
        let root = Root::new(0x7_505e, ExecuteControl::Single);
        assert_eq!(root.table, L1Gpa(0x7_5000));
        assert!(root.accessed_dirty);
        assert_ne!(root, Root::new(0x7_501e, ExecuteControl::Single));
        assert_ne!(root, Root::new(0x7_505e, ExecuteControl::ModeBased));
        assert_eq!(
            root,
            Root::new(0x7_5058, ExecuteControl::Single),
            "the memory type of the tables changes nothing"
        );
    }
}
