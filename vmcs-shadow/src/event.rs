//! Interruption information: one format for events injected by VM entry, events that cause a VM exit, and events whose
//! delivery a VM exit interrupts.

use x86defs::vmx::event;

use crate::field::{Field, Vmcs};

/// A valid interruption-information field.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Event(u32);

impl Event {
    /// The event in an interruption-information field, if it is valid.
    #[inline]
    pub fn new(information: u32) -> Option<Self> {
        (information & event::VALID != 0).then_some(Self(information))
    }

    /// The event VM entry injects.
    #[inline]
    pub fn injected(vmcs: &Vmcs) -> Option<Self> {
        Self::new(vmcs.get32(Field::EntryInterruption))
    }

    /// Interruption type ([`x86defs::vmx::event`]).
    pub fn kind(self) -> u32 {
        (self.0 & event::TYPE) >> event::TYPE_SHIFT
    }

    /// The vector.
    pub fn vector(self) -> u8 {
        (self.0 & event::VECTOR) as u8
    }

    /// An error code comes with it.
    pub fn has_error_code(self) -> bool {
        self.0 & event::ERROR_CODE_VALID != 0
    }

    /// An instruction made it: INT, INT3, INTO, INT1.
    pub fn is_software(self) -> bool {
        matches!(
            self.kind(),
            event::SOFTWARE_INTERRUPT | event::PRIVILEGED_SOFTWARE_EXCEPTION | event::SOFTWARE_EXCEPTION
        )
    }

    /// A bit is set that VM entry reserves (30:12).
    pub fn has_reserved(self) -> bool {
        self.0 & 0x7fff_f000 != 0
    }
}
