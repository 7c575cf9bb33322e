//! Field encodings ("Encoding of VMCS Fields", SDM volume 3):
//!
//! ```text
//! 31 ... 15 | 14 13 | 12 | 11 10 | 9 ... 1 |  0
//!  reserved | width |  0 |  type |  index  | access: 1 = high half of a 64-bit field
//! ```

/// Size of a field.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Width {
    W16,
    W64,
    W32,
    Natural,
}

impl Width {
    /// A value as a field of this width holds it.
    #[inline]
    pub fn truncate(self, value: u64) -> u64 {
        match self {
            Self::W16 => value & 0xffff,
            Self::W32 => value & 0xffff_ffff,
            Self::W64 | Self::Natural => value,
        }
    }
}

/// Area of the VMCS a field belongs to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Area {
    Control,
    /// VM-exit information: read-only unless IA32_VMX_MISC bit 29 is set.
    ExitInformation,
    GuestState,
    HostState,
}

/// Why an encoding names no field whatever the processor implements.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BadEncoding {
    /// A reserved bit is set.
    Reserved,
    /// The high half of a field that is not 64 bits wide.
    HighOfNarrow,
}

/// A well-formed field encoding.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Encoding(u32);

impl Encoding {
    /// Takes apart what VMREAD or VMWRITE was given (all 64 bits of the register in 64-bit mode).
    pub fn new(value: u64) -> Result<Self, BadEncoding> {
        const RESERVED: u64 = !0x6fff;
        if value & RESERVED != 0 {
            return Err(BadEncoding::Reserved);
        }
        let encoding = Self(value as u32);
        if encoding.is_high() && encoding.width() != Width::W64 {
            return Err(BadEncoding::HighOfNarrow);
        }
        Ok(encoding)
    }

    /// An encoding that is known to be well-formed.
    #[inline]
    pub(crate) fn of_table(raw: u32) -> Self {
        Self(raw)
    }

    /// The number itself.
    pub fn raw(self) -> u32 {
        self.0
    }

    /// Bits 14:13.
    pub fn width(self) -> Width {
        match self.0 >> 13 & 3 {
            0 => Width::W16,
            1 => Width::W64,
            2 => Width::W32,
            _ => Width::Natural,
        }
    }

    /// Bits 11:10.
    pub fn area(self) -> Area {
        match self.0 >> 10 & 3 {
            0 => Area::Control,
            1 => Area::ExitInformation,
            2 => Area::GuestState,
            _ => Area::HostState,
        }
    }

    /// Bits 9:1.
    pub fn index(self) -> u32 {
        self.0 >> 1 & 0x1ff
    }

    /// Bit 0: the access is to bits 63:32.
    pub fn is_high(self) -> bool {
        self.0 & 1 != 0
    }

    /// The same field's full access.
    pub fn full(self) -> Self {
        Self(self.0 & !1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_appendix_b_come_apart() {
        let parts = |value| Encoding::new(value).map(|e| (e.width(), e.area(), e.index(), e.is_high()));
        // Guest ES selector, address of I/O bitmap A (high), pin-based controls, exit qualification, host RIP.
        assert_eq!(parts(0x0800), Ok((Width::W16, Area::GuestState, 0, false)));
        assert_eq!(parts(0x2001), Ok((Width::W64, Area::Control, 0, true)));
        assert_eq!(parts(0x4000), Ok((Width::W32, Area::Control, 0, false)));
        assert_eq!(parts(0x6400), Ok((Width::Natural, Area::ExitInformation, 0, false)));
        assert_eq!(parts(0x6c16), Ok((Width::Natural, Area::HostState, 11, false)));
    }

    #[test]
    fn malformed_encodings_are_refused() {
        assert_eq!(Encoding::new(0x1000), Err(BadEncoding::Reserved));
        assert_eq!(Encoding::new(0x8000), Err(BadEncoding::Reserved));
        assert_eq!(Encoding::new(1 << 40 | 0x4000), Err(BadEncoding::Reserved));
        assert_eq!(Encoding::new(0x4001), Err(BadEncoding::HighOfNarrow));
    }
}
