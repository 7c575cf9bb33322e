//! EPT12's leaf and EPT01 become a page of EPT02.

use crate::entry::{Permissions, span_of};
use crate::memory::{Ept01, L1Gpa, L2Gpa};
use crate::walk::Walk;

/// A page of EPT02: where it is in L1's physical memory, and what may be done without looking at EPT12 again.
///
/// One word, since the cache is full of them: [`Permissions`] in bits 3:0, memory type in bits 6:4, ignore PAT in bit
/// 7, level in bits 9:8, address in bits 51:12.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Page(u64);

impl Page {
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

    /// What needs no further look at EPT12. Writing only if the dirty flag is set where there is one.
    #[inline(always)]
    pub fn ready(self) -> Permissions {
        Permissions::from_bits(self.0)
    }

    /// 4 KiB at level 1, 2 MiB at level 2, 1 GiB at level 3.
    #[inline(always)]
    pub fn level(self) -> u32 {
        (self.0 >> 8 & 3) as u32
    }

    /// First byte of the page.
    #[inline(always)]
    pub fn base(self) -> L1Gpa {
        L1Gpa(self.0 & Self::ADDRESS)
    }

    /// The 4-KiB piece that `gpa` is in.
    #[inline(always)]
    pub fn piece(self, gpa: L2Gpa) -> L1Gpa {
        let span = span_of(self.level());
        L1Gpa(self.0 & Self::ADDRESS | gpa.0 & (span - 1) & !0xfff)
    }

    /// EPT memory type.
    pub fn memory_type(self) -> u64 {
        self.0 >> 4 & 7
    }

    pub fn ignores_pat(self) -> bool {
        self.0 >> 7 & 1 != 0
    }

    #[inline(always)]
    pub(crate) fn word(self) -> u64 {
        self.0
    }

    #[inline(always)]
    pub(crate) fn from_word(word: u64) -> Self {
        Self(word)
    }
}

/// Makes the largest page around `gpa` that both levels map as one.
pub fn merge(walk: &Walk, ept01: &impl Ept01, gpa: L2Gpa, ready: Permissions) -> Page {
    let leaf = walk.leaf.entry;
    let piece = L1Gpa(leaf.address() | gpa.0 & (leaf.span() - 1) & !0xfff);
    let mut level = leaf.level;
    if level > 1 {
        let span = ept01.span(piece);
        while level > 1 && span_of(level) > span {
            level -= 1;
        }
    }
    let base = piece.0 & !(span_of(level) - 1);
    let attributes = leaf.memory_type() << 4 | u64::from(leaf.ignores_pat()) << 7;
    Page(base | u64::from(level) << 8 | attributes | ready.bits())
}
