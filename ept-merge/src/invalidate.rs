//! INVEPT. INVVPID does not reach this crate: its types name linear and combined mappings, never guest-physical ones.

use crate::entry::Capabilities;
use crate::memory::L1Gpa;
use crate::pointer::{Root, check_eptp};

/// What INVEPT is asked to forget.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Invalidation {
    /// Mappings of one EP4TA (bits 51:12 of an EPT pointer), whatever the pointer's other bits.
    SingleContext(L1Gpa),
    AllContexts,
}

impl Invalidation {
    /// From INVEPT's operands; none if the instruction fails for them. Only a single context's pointer is looked at.
    pub fn decode(kind: u64, descriptor: [u64; 2], caps: &Capabilities) -> Option<Self> {
        match kind {
            1 if check_eptp(descriptor[0], caps) => Some(Self::of(descriptor[0])),
            2 => Some(Self::AllContexts),
            _ => None,
        }
    }

    /// The single context of an EPT pointer.
    pub fn of(eptp: u64) -> Self {
        Self::SingleContext(Root::table_of(eptp))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_memory::CAPS;

    #[test]
    fn operands_of_invept() {
        let decode = |kind, eptp| Invalidation::decode(kind, [eptp, 0], &CAPS);
        assert_eq!(decode(1, 0x305e), Some(Invalidation::SingleContext(L1Gpa(0x3000))));
        assert_eq!(decode(1, 0x3001), None, "a pointer that VM entry would refuse");
        assert_eq!(decode(2, 0x3001), Some(Invalidation::AllContexts));
        for kind in [0, 3, 4, 1 << 32 | 1, u64::MAX] {
            assert_eq!(decode(kind, 0x305e), None);
        }
    }
}
