//! The guest's segment registers as fields: the eight stand in the same order in every run of fields.

use crate::field::{Field, Vmcs};

/// A segment register, in the order of the fields' encodings.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum Segment {
    Es,
    Cs,
    Ss,
    Ds,
    Fs,
    Gs,
    Ldtr,
    Tr,
}

impl Segment {
    /// All eight.
    pub const ALL: &[Self] =
        &[Self::Es, Self::Cs, Self::Ss, Self::Ds, Self::Fs, Self::Gs, Self::Ldtr, Self::Tr];

    /// What the SDM calls it.
    pub fn name(self) -> &'static str {
        ["ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR"][self as usize]
    }

    /// Field of its selector.
    pub fn selector(self) -> Field {
        Field::GuestEsSelector.nth(self as usize)
    }

    /// Field of its base address.
    pub fn base(self) -> Field {
        Field::GuestEsBase.nth(self as usize)
    }

    /// Field of its limit.
    pub fn limit(self) -> Field {
        Field::GuestEsLimit.nth(self as usize)
    }

    /// Field of its access rights.
    pub fn access(self) -> Field {
        Field::GuestEsAccess.nth(self as usize)
    }
}

/// A segment register's four fields.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SegmentFields {
    pub selector: u16,
    pub base: u64,
    pub limit: u32,
    pub access: u32,
}

impl SegmentFields {
    /// The register's fields in `vmcs`.
    #[inline]
    pub fn of(vmcs: &Vmcs, segment: Segment) -> Self {
        Self {
            selector: vmcs.get(segment.selector()) as u16,
            base: vmcs.get(segment.base()),
            limit: vmcs.get32(segment.limit()),
            access: vmcs.get32(segment.access()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_fields() {
        assert_eq!(Segment::Tr.selector(), Field::GuestTrSelector);
        assert_eq!(Segment::Cs.base(), Field::GuestCsBase);
        assert_eq!(Segment::Ldtr.limit(), Field::GuestLdtrLimit);
        assert_eq!(Segment::Gs.access(), Field::GuestGsAccess);
    }
}
