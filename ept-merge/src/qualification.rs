//! The exit qualification of EPT violations ("Exit Qualification for EPT Violations").

use crate::entry::{ExecuteControl, Permissions};
use crate::shadow::Access;

/// Bits 2:0: the access, as the processor made it. With accessed and dirty flags, use of a guest's paging-structure entry
/// is both a read and a write.
pub fn access_bits(access: Access, accessed_dirty: bool) -> u64 {
    let wants = access.wants(accessed_dirty);
    let fetch = wants.has_any(Permissions::EXECUTE | Permissions::USER_EXECUTE);
    wants.bits() & 3 | u64::from(fetch) << 2
}

/// Bits 6:3: what the entries allow. Bit 6 is undefined without mode-based execute control; we leave it clear.
pub fn allowed_bits(allowed: Permissions, execute: ExecuteControl) -> u64 {
    let defined = match execute {
        ExecuteControl::Single => 7,
        ExecuteControl::ModeBased => 15,
    };
    (allowed.bits() & defined) << 3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qualification_of_accesses() {
        assert_eq!(access_bits(Access::READ, true), 1);
        assert_eq!(access_bits(Access::WRITE, true), 2);
        assert_eq!(access_bits(Access::FETCH, true), 4);
        assert_eq!(access_bits(Access::USER_FETCH, false), 4);
        assert_eq!(access_bits(Access::PAGING, false), 1);
        assert_eq!(access_bits(Access::PAGING, true), 3);
    }

    #[test]
    fn qualification_of_permissions() {
        let allowed = Permissions::READ | Permissions::EXECUTE | Permissions::USER_EXECUTE;
        assert_eq!(allowed_bits(allowed, ExecuteControl::Single), 0x28);
        assert_eq!(allowed_bits(allowed, ExecuteControl::ModeBased), 0x68);
    }
}
