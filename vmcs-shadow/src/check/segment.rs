//! "Checks on Guest Segment Registers". Each rule is checked for each register it is about before the next rule, in the
//! SDM's order.

use x86defs::segment::{
    ACCESSED, CODE, CONFORMING, DB, DPL_SHIFT, G, L, PRESENT, READABLE, S, SELECTOR_RPL, SELECTOR_TI, TYPE,
    UNUSABLE, system,
};
use x86defs::vmx::{entry_ctl, secondary};
use x86defs::{cr0, rflags};

use super::rule::Rule;
use super::{Checked, Inputs};
use crate::field::{Field, Vmcs};
use crate::segment::{Segment, SegmentFields};
use Segment::{Cs, Ds, Es, Fs, Gs, Ldtr, Ss, Tr};

/// Read/write, expand-up, accessed: the data type CS may have in real mode.
const DATA_WRITABLE: u32 = 3;
const RESERVED_11_8: u32 = 0xf00;
const RESERVED_31_17: u32 = !0x1_ffff;
/// Present, DPL 3, S, read/write accessed.
const V86_ACCESS: u32 = 0xf3;

const CODE_OR_DATA: &[Segment] = &[Cs, Ss, Ds, Es, Fs, Gs];
const DATA: &[Segment] = &[Ds, Es, Fs, Gs];

macro_rules! segment_rules {
    ($($rule:ident $segments:expr, $text:literal;)*) => {
        /// A rule of guest segment registers.
        #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
        pub enum SegmentRule { $(#[doc = $text] $rule,)* }

        impl SegmentRule {
            /// All, in the SDM's order.
            pub const ALL: &[Self] = &[$(Self::$rule,)*];

            /// Its name.
            pub fn name(self) -> &'static str {
                match self { $(Self::$rule => concat!("Guest", stringify!($rule)),)* }
            }

            /// The registers it is about.
            #[inline]
            pub fn segments(self) -> &'static [Segment] {
                match self { $(Self::$rule => $segments,)* }
            }

            /// What must hold.
            pub fn describe(self) -> &'static str {
                match self { $(Self::$rule => $text,)* }
            }
        }
    };
}

segment_rules! {
    SelectorTi &[Tr, Ldtr],
        "the selector's TI flag must be 0 (of LDTR, if usable)";
    SsSelectorRpl &[Ss],
        "without \"unrestricted guest\", and not in virtual-8086 mode, SS's RPL must equal CS's";
    V86Base CODE_OR_DATA,
        "in virtual-8086 mode, the base must be the selector times 16";
    BaseCanonical &[Tr, Fs, Gs],
        "the base must be canonical, be the register usable or not";
    LdtrBaseCanonical &[Ldtr],
        "LDTR's base, if it is usable, must be canonical";
    BaseHigh &[Cs, Ss, Ds, Es],
        "bits 63:32 of the base must be 0 (of SS, DS and ES, if usable)";
    V86Limit CODE_OR_DATA,
        "in virtual-8086 mode, the limit must be FFFFH";
    V86Access CODE_OR_DATA,
        "in virtual-8086 mode, the access rights must be F3H";
    CsType &[Cs],
        "CS's type must be 9, 11, 13 or 15 (accessed code), or 3 with \"unrestricted guest\"";
    SsType &[Ss],
        "SS's type, if it is usable, must be 3 or 7 (read/write accessed data)";
    DataAccessed DATA,
        "if the register is usable, its type must be an accessed one";
    DataReadable DATA,
        "if the register is usable and holds a code segment, it must be readable";
    SystemBit CODE_OR_DATA,
        "if the register is usable, S must be 1";
    CsDplData &[Cs],
        "if CS has type 3, its DPL must be 0";
    CsDplNonconforming &[Cs],
        "if CS is non-conforming code, its DPL must equal SS's";
    CsDplConforming &[Cs],
        "if CS is conforming code, its DPL must not be greater than SS's";
    SsDplRpl &[Ss],
        "without \"unrestricted guest\", SS's DPL must equal its RPL";
    SsDplReal &[Ss],
        "SS's DPL must be 0 if CS has type 3 or CR0.PE is 0";
    DataDpl DATA,
        "without \"unrestricted guest\", DPL must not be less than RPL, if the register is usable and holds data or \
         non-conforming code";
    Present CODE_OR_DATA,
        "if the register is usable, P must be 1";
    Reserved CODE_OR_DATA,
        "if the register is usable, bits 11:8 of its access rights must be 0";
    CsDefaultSize &[Cs],
        "with \"IA-32e mode guest\" and CS.L, CS.D must be 0";
    GranularityBytes CODE_OR_DATA,
        "if the register is usable and any of bits 11:0 of its limit is 0, G must be 0";
    GranularityPages CODE_OR_DATA,
        "if the register is usable and any of bits 31:20 of its limit is 1, G must be 1";
    ReservedHigh CODE_OR_DATA,
        "if the register is usable, bits 31:17 of its access rights must be 0";
    TrType &[Tr],
        "TR's type must be 11 (busy TSS), or 3 (16-bit busy TSS) without \"IA-32e mode guest\"";
    LdtrType &[Ldtr],
        "LDTR's type, if it is usable, must be 2 (LDT)";
    TableSystemBit &[Tr, Ldtr],
        "S must be 0 (of LDTR, if usable)";
    TablePresent &[Tr, Ldtr],
        "P must be 1 (of LDTR, if usable)";
    TableReserved &[Tr, Ldtr],
        "bits 11:8 of the access rights must be 0 (of LDTR, if usable)";
    TableGranularityBytes &[Tr, Ldtr],
        "if any of bits 11:0 of the limit is 0, G must be 0 (of LDTR, if usable)";
    TableGranularityPages &[Tr, Ldtr],
        "if any of bits 31:20 of the limit is 1, G must be 1 (of LDTR, if usable)";
    TrUsable &[Tr],
        "TR must be usable";
    TableReservedHigh &[Tr, Ldtr],
        "bits 31:17 of the access rights must be 0 (of LDTR, if usable)";
}

impl SegmentRule {
    /// The fields it is about in `segment`'s case.
    pub(super) fn fields(self, segment: Segment) -> Vec<Field> {
        let access = segment.access();
        match self {
            Self::SelectorTi => vec![segment.selector(), access],
            Self::SsSelectorRpl => {
                vec![Ss.selector(), Cs.selector(), Field::SecondaryControls, Field::GuestRflags]
            }
            Self::V86Base => vec![segment.base(), segment.selector(), Field::GuestRflags],
            Self::BaseCanonical | Self::LdtrBaseCanonical | Self::BaseHigh => vec![segment.base(), access],
            Self::V86Limit => vec![segment.limit(), Field::GuestRflags],
            Self::V86Access => vec![access, Field::GuestRflags],
            Self::CsType => vec![access, Field::SecondaryControls],
            Self::CsDplNonconforming | Self::CsDplConforming => vec![access, Ss.access()],
            Self::SsDplRpl => vec![access, Ss.selector(), Field::SecondaryControls],
            Self::SsDplReal => vec![access, Cs.access(), Field::GuestCr0],
            Self::DataDpl => vec![access, segment.selector(), Field::SecondaryControls],
            Self::CsDefaultSize | Self::TrType => vec![access, Field::EntryControls],
            Self::GranularityBytes
            | Self::GranularityPages
            | Self::TableGranularityBytes
            | Self::TableGranularityPages => vec![access, segment.limit()],
            Self::SsType
            | Self::DataAccessed
            | Self::DataReadable
            | Self::SystemBit
            | Self::CsDplData
            | Self::Present
            | Self::Reserved
            | Self::ReservedHigh
            | Self::LdtrType
            | Self::TableSystemBit
            | Self::TablePresent
            | Self::TableReserved
            | Self::TrUsable
            | Self::TableReservedHigh => vec![access],
        }
    }
}

impl SegmentFields {
    fn kind(&self) -> u32 {
        self.access & TYPE
    }

    fn dpl(&self) -> u32 {
        self.access >> DPL_SHIFT & 3
    }

    fn rpl(&self) -> u32 {
        u32::from(self.selector & SELECTOR_RPL)
    }

    fn usable(&self) -> bool {
        self.access & UNUSABLE == 0
    }

    fn has(&self, bits: u32) -> bool {
        self.access & bits != 0
    }

    fn is_local(&self) -> bool {
        self.selector & SELECTOR_TI != 0
    }

    /// "If any bit in the limit field in the range 11:0 is 0, G must be 0."
    fn bytes_fit(&self) -> bool {
        self.limit & 0xfff == 0xfff || !self.has(G)
    }

    /// "If any bit in the limit field in the range 31:20 is 1, G must be 1."
    fn pages_fit(&self) -> bool {
        self.limit & 0xfff0_0000 == 0 || self.has(G)
    }
}

/// The guest's segment registers, and what their rules depend on.
struct Guest<'a> {
    registers: [SegmentFields; 8],
    inputs: &'a Inputs,
    unrestricted: bool,
    long_mode: bool,
    protected: bool,
}

/// Checks a rule for each register it is about.
#[inline(always)]
fn each(guest: &Guest, rule: SegmentRule, holds: impl Fn(&SegmentFields) -> bool) -> Checked {
    for &segment in rule.segments() {
        if !holds(&guest.registers[segment as usize]) {
            return Err(Rule::Segment(rule, segment));
        }
    }
    Ok(())
}

/// Checks a rule for each register it is about that is in use. "If the register is CS or if the register is usable":
/// CS and TR count as usable whatever their unusable bit, which CS's rules don't mention and TR has a rule about.
#[inline(always)]
fn each_usable(guest: &Guest, rule: SegmentRule, holds: impl Fn(&SegmentFields) -> bool) -> Checked {
    for &segment in rule.segments() {
        let register = &guest.registers[segment as usize];
        let in_use = register.usable() || matches!(segment, Cs | Tr);
        if in_use && !holds(register) {
            return Err(Rule::Segment(rule, segment));
        }
    }
    Ok(())
}

/// Every rule.
pub(super) fn check(vmcs: &Vmcs, inputs: &Inputs) -> Checked {
    let guest = Guest {
        registers: std::array::from_fn(|i| SegmentFields::of(vmcs, Segment::ALL[i])),
        inputs,
        unrestricted: vmcs.secondary() & secondary::UNRESTRICTED_GUEST != 0,
        long_mode: vmcs.get32(Field::EntryControls) & entry_ctl::IA32E_MODE_GUEST != 0,
        protected: vmcs.get(Field::GuestCr0) & cr0::PE != 0,
    };
    let v86 = vmcs.get(Field::GuestRflags) & rflags::VM != 0;
    check_selectors(&guest, v86)?;
    check_bases(&guest, v86)?;
    if v86 {
        each(&guest, SegmentRule::V86Limit, |r| r.limit == 0xffff)?;
        each(&guest, SegmentRule::V86Access, |r| r.access == V86_ACCESS)?;
    } else {
        check_types(&guest)?;
        check_privilege(&guest)?;
        check_rest(&guest)?;
    }
    check_tables(&guest)
}

fn check_selectors(guest: &Guest, v86: bool) -> Checked {
    each_usable(guest, SegmentRule::SelectorTi, |r| !r.is_local())?;
    let cs = &guest.registers[Cs as usize];
    each(guest, SegmentRule::SsSelectorRpl, |ss| v86 || guest.unrestricted || ss.rpl() == cs.rpl())
}

fn check_bases(guest: &Guest, v86: bool) -> Checked {
    if v86 {
        each(guest, SegmentRule::V86Base, |r| r.base == u64::from(r.selector) << 4)?;
    }
    each(guest, SegmentRule::BaseCanonical, |r| guest.inputs.is_canonical(r.base))?;
    each_usable(guest, SegmentRule::LdtrBaseCanonical, |r| guest.inputs.is_canonical(r.base))?;
    each_usable(guest, SegmentRule::BaseHigh, |r| r.base >> 32 == 0)
}

/// Bits 3:0 and bit 4.
fn check_types(guest: &Guest) -> Checked {
    const ACCESSED_CODE: u32 = CODE | ACCESSED;
    each(guest, SegmentRule::CsType, |cs| {
        cs.kind() & ACCESSED_CODE == ACCESSED_CODE || guest.unrestricted && cs.kind() == DATA_WRITABLE
    })?;
    each_usable(guest, SegmentRule::SsType, |ss| matches!(ss.kind(), 3 | 7))?;
    each_usable(guest, SegmentRule::DataAccessed, |r| r.has(ACCESSED))?;
    each_usable(guest, SegmentRule::DataReadable, |r| !r.has(CODE) || r.has(READABLE))?;
    each_usable(guest, SegmentRule::SystemBit, |r| r.has(S))
}

/// Bits 6:5.
fn check_privilege(guest: &Guest) -> Checked {
    let (cs, ss) = (&guest.registers[Cs as usize], &guest.registers[Ss as usize]);
    let is_conforming = |r: &SegmentFields| r.has(CODE) && r.has(CONFORMING);
    let is_real_code = cs.kind() == DATA_WRITABLE;
    each(guest, SegmentRule::CsDplData, |cs| !is_real_code || cs.dpl() == 0)?;
    each(guest, SegmentRule::CsDplNonconforming, |cs| {
        !cs.has(CODE) || is_conforming(cs) || cs.dpl() == ss.dpl()
    })?;
    each(guest, SegmentRule::CsDplConforming, |cs| !is_conforming(cs) || cs.dpl() <= ss.dpl())?;
    each(guest, SegmentRule::SsDplRpl, |ss| guest.unrestricted || ss.dpl() == ss.rpl())?;
    each(guest, SegmentRule::SsDplReal, |ss| ss.dpl() == 0 || !is_real_code && guest.protected)?;
    each_usable(guest, SegmentRule::DataDpl, |r| guest.unrestricted || is_conforming(r) || r.dpl() >= r.rpl())
}

/// Bit 7 and up.
fn check_rest(guest: &Guest) -> Checked {
    each_usable(guest, SegmentRule::Present, |r| r.has(PRESENT))?;
    each_usable(guest, SegmentRule::Reserved, |r| !r.has(RESERVED_11_8))?;
    each(guest, SegmentRule::CsDefaultSize, |cs| !(guest.long_mode && cs.has(L) && cs.has(DB)))?;
    each_usable(guest, SegmentRule::GranularityBytes, SegmentFields::bytes_fit)?;
    each_usable(guest, SegmentRule::GranularityPages, SegmentFields::pages_fit)?;
    each_usable(guest, SegmentRule::ReservedHigh, |r| !r.has(RESERVED_31_17))
}

/// TR and LDTR.
fn check_tables(guest: &Guest) -> Checked {
    each(guest, SegmentRule::TrType, |tr| match tr.kind() {
        system::TSS_BUSY => true,
        system::TSS16_BUSY => !guest.long_mode,
        _ => false,
    })?;
    each_usable(guest, SegmentRule::LdtrType, |ldtr| ldtr.kind() == system::LDT)?;
    each_usable(guest, SegmentRule::TableSystemBit, |r| !r.has(S))?;
    each_usable(guest, SegmentRule::TablePresent, |r| r.has(PRESENT))?;
    each_usable(guest, SegmentRule::TableReserved, |r| !r.has(RESERVED_11_8))?;
    each_usable(guest, SegmentRule::TableGranularityBytes, SegmentFields::bytes_fit)?;
    each_usable(guest, SegmentRule::TableGranularityPages, SegmentFields::pages_fit)?;
    each(guest, SegmentRule::TrUsable, SegmentFields::usable)?;
    each_usable(guest, SegmentRule::TableReservedHigh, |r| !r.has(RESERVED_31_17))
}
