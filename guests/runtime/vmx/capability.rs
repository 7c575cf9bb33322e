//! The VMX capability MSRs (appendix A of the SDM).

use super::control::{ACTIVATE_SECONDARY, ENABLE_EPT, ENABLE_VPID, Group};
use crate::cpu::rdmsr;

pub const BASIC: u32 = 0x480;
pub const PINBASED_CTLS: u32 = 0x481;
pub const PROCBASED_CTLS: u32 = 0x482;
pub const EXIT_CTLS: u32 = 0x483;
pub const ENTRY_CTLS: u32 = 0x484;
pub const MISC: u32 = 0x485;
pub const CR0_FIXED0: u32 = 0x486;
pub const CR0_FIXED1: u32 = 0x487;
pub const CR4_FIXED0: u32 = 0x488;
pub const CR4_FIXED1: u32 = 0x489;
pub const VMCS_ENUM: u32 = 0x48a;
pub const PROCBASED_CTLS2: u32 = 0x48b;
pub const EPT_VPID_CAP: u32 = 0x48c;
pub const TRUE_PINBASED_CTLS: u32 = 0x48d;
pub const TRUE_PROCBASED_CTLS: u32 = 0x48e;
pub const TRUE_EXIT_CTLS: u32 = 0x48f;
pub const TRUE_ENTRY_CTLS: u32 = 0x490;
pub const VMFUNC: u32 = 0x491;

/// IA32_VMX_BASIC: physical addresses of the structures have 32 bits.
pub const BASIC_32BIT_ADDRESSES: u64 = 1 << 48;
/// INS and OUTS exits fill the instruction-information field.
pub const BASIC_IO_INFORMATION: u64 = 1 << 54;
/// The TRUE MSRs exist.
pub const BASIC_TRUE: u64 = 1 << 55;
/// An exception may be injected with or without error code.
pub const BASIC_ANY_ERROR_CODE: u64 = 1 << 56;

/// IA32_VMX_MISC bits.
pub const MISC_STORES_LMA: u64 = 1 << 5;
pub const MISC_ACTIVITY_HLT: u64 = 1 << 6;
pub const MISC_ACTIVITY_SHUTDOWN: u64 = 1 << 7;
pub const MISC_ACTIVITY_SIPI: u64 = 1 << 8;
pub const MISC_WRITE_ANY_FIELD: u64 = 1 << 29;
pub const MISC_ZERO_LENGTH_INJECTION: u64 = 1 << 30;

/// IA32_VMX_EPT_VPID_CAP bits.
pub const EPT_EXECUTE_ONLY: u64 = 1 << 0;
pub const EPT_WALK_4: u64 = 1 << 6;
pub const EPT_UC: u64 = 1 << 8;
pub const EPT_WB: u64 = 1 << 14;
pub const EPT_2M: u64 = 1 << 16;
pub const EPT_1G: u64 = 1 << 17;
pub const INVEPT: u64 = 1 << 20;
pub const EPT_ACCESSED_DIRTY: u64 = 1 << 21;
pub const EPT_ADVANCED_INFORMATION: u64 = 1 << 22;
pub const INVEPT_SINGLE: u64 = 1 << 25;
pub const INVEPT_ALL: u64 = 1 << 26;
pub const INVVPID: u64 = 1 << 32;
pub const INVVPID_ADDRESS: u64 = 1 << 40;
pub const INVVPID_SINGLE: u64 = 1 << 41;
pub const INVVPID_ALL: u64 = 1 << 42;
pub const INVVPID_KEEP_GLOBALS: u64 = 1 << 43;

/// What may be 0 and what may be 1.
#[derive(Clone, Copy)]
pub struct Allowed {
    /// Bits that must be 1.
    pub zero: u32,
    /// Bits that may be 1.
    pub one: u32,
}

impl Allowed {
    /// Reads an MSR of this form.
    pub fn read(msr: u32) -> Allowed {
        let value = rdmsr(msr);
        Allowed { zero: value as u32, one: (value >> 32) as u32 }
    }

    /// A value that is as wanted where that is allowed.
    pub fn adjust(self, wanted: u32) -> u32 {
        (wanted | self.zero) & self.one
    }
}

/// VMCS revision identifier.
pub fn revision() -> u32 {
    rdmsr(BASIC) as u32 & 0x7fff_ffff
}

/// Whether IA32_VMX_BASIC shows all of the bits.
pub fn basic(bits: u64) -> bool {
    rdmsr(BASIC) & bits == bits
}

/// Whether IA32_VMX_MISC shows all of the bits.
pub fn misc(bits: u64) -> bool {
    rdmsr(MISC) & bits == bits
}

/// IA32_VMX_EPT_VPID_CAP, 0 where it does not exist.
pub fn ept_vpid() -> u64 {
    if ENABLE_EPT.available() || ENABLE_VPID.available() { rdmsr(EPT_VPID_CAP) } else { 0 }
}

/// IA32_VMX_VMFUNC, 0 where it does not exist.
pub fn vm_functions() -> u64 {
    if super::control::ENABLE_VMFUNC.available() { rdmsr(VMFUNC) } else { 0 }
}

/// What is allowed of a group of controls, by the TRUE MSRs where they exist.
pub fn allowed(group: Group) -> Allowed {
    let (plain, exact) = match group {
        Group::Pin => (PINBASED_CTLS, TRUE_PINBASED_CTLS),
        Group::Primary => (PROCBASED_CTLS, TRUE_PROCBASED_CTLS),
        Group::Exit => (EXIT_CTLS, TRUE_EXIT_CTLS),
        Group::Entry => (ENTRY_CTLS, TRUE_ENTRY_CTLS),
        Group::Secondary if !ACTIVATE_SECONDARY.available() => return Allowed { zero: 0, one: 0 },
        Group::Secondary => return Allowed::read(PROCBASED_CTLS2),
    };
    Allowed::read(if basic(BASIC_TRUE) { exact } else { plain })
}
