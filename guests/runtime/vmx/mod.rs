//! VMX for guest programs that are hypervisors: instructions, fields, controls, a good VMCS, EPT, the way in and out.
//!
//! Written from the SDM (volume 3, the VMX chapters), apart from what L0 uses: a shared table would share its errors.
//! One VMCS is current at a time; [`Vm`] stands for it.

pub mod capability;
pub mod control;
pub mod ept;
pub mod exit;
pub mod field;
pub mod handler;
pub mod insn;
pub mod vm;

pub use control::Control;
pub use exit::{Exit, reason};
pub use insn::{Failure, vmread, vmwrite};
pub use vm::{Regs, Vm};

use crate::cpu::{self, Feature, rdmsr, wrmsr};
use crate::mem;

/// CR4.VMXE.
pub const CR4_VMXE: u64 = 1 << 13;
pub const MSR_FEATURE_CONTROL: u32 = 0x3a;
/// IA32_FEATURE_CONTROL bits.
pub const LOCKED: u64 = 1 << 0;
pub const VMX_OUTSIDE_SMX: u64 = 1 << 2;

pub const VMX: Feature = cpu::VMX;

/// Opens VMX in IA32_FEATURE_CONTROL as firmware does, unless that has been done; false if it is locked without VMX.
pub fn open_feature_control() -> bool {
    let value = rdmsr(MSR_FEATURE_CONTROL);
    if value & LOCKED == 0 {
        wrmsr(MSR_FEATURE_CONTROL, value | LOCKED | VMX_OUTSIDE_SMX);
    }
    rdmsr(MSR_FEATURE_CONTROL) & (LOCKED | VMX_OUTSIDE_SMX) == LOCKED | VMX_OUTSIDE_SMX
}

/// A fresh region (VMXON region or VMCS) with the revision identifier in place.
pub fn region() -> u64 {
    let region = mem::frame();
    mem::write(region, capability::revision());
    region
}

/// Goes to VMX operation on this CPU with a region of its own, which is returned.
pub fn on() -> Result<u64, Failure> {
    open_feature_control();
    cpu::set_cr4(cpu::cr4() | CR4_VMXE);
    let region = region();
    insn::vmxon(region).map(|()| region)
}
