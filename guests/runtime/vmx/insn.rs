//! The VMX instructions, with their outcome as the flags tell it.

use super::field;
use core::arch::asm;

/// Why a VMX instruction failed.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Failure {
    /// VMfailInvalid: there is no current VMCS to hold an error number.
    Invalid,
    /// VMfailValid with the VM-instruction error number.
    Valid(u32),
    /// Flags that no outcome has.
    Flags(u64),
}

impl core::fmt::Display for Failure {
    fn fmt(&self, f: &mut core::fmt::Formatter) -> core::fmt::Result {
        match self {
            Failure::Invalid => f.write_str("VMfailInvalid"),
            Failure::Valid(number) => write!(f, "VMfailValid, error {number}"),
            Failure::Flags(flags) => write!(f, "RFLAGS {flags:#x}"),
        }
    }
}

pub type Outcome = Result<(), Failure>;

/// CF, PF, AF, ZF, SF, OF: each outcome defines all of them.
pub const STATUS_FLAGS: u64 = 0x8d5;

/// The outcome that flags stand for ("Conventions" of the VMX instruction reference).
pub fn outcome(flags: u64) -> Outcome {
    match flags & STATUS_FLAGS {
        0 => Ok(()),
        0x01 => Err(Failure::Invalid),
        0x40 => Err(Failure::Valid(read_error())),
        other => Err(Failure::Flags(other)),
    }
}

fn read_error() -> u32 {
    let value: u64;
    // SAFETY: reads a field of the current VMCS, which VMfailValid implies.
    unsafe { asm!("vmread {}, {}", out(reg) value, in(reg) u64::from(field::INSTRUCTION_ERROR)) };
    value as u32
}

/// An instruction with one 64-bit memory operand that holds a physical address.
macro_rules! with_pointer {
    ($($(#[$doc:meta])* $name:ident $text:literal;)*) => {$(
        $(#[$doc])*
        pub fn $name(pointer: u64) -> Outcome {
            let flags: u64;
            // SAFETY: the program owns the machine; the operand is on the stack.
            unsafe { asm!($text, "pushfq", "pop {f}", p = in(reg) &pointer, f = lateout(reg) flags) };
            outcome(flags)
        }
    )*};
}

with_pointer! {
    vmxon "vmxon [{p}]";
    vmclear "vmclear [{p}]";
    vmptrld "vmptrld [{p}]";
}

pub fn vmxoff() -> Outcome {
    let flags: u64;
    // SAFETY: the program owns the machine.
    unsafe { asm!("vmxoff", "pushfq", "pop {}", out(reg) flags) };
    outcome(flags)
}

/// The current-VMCS pointer.
pub fn vmptrst() -> u64 {
    let mut pointer = 0u64;
    // SAFETY: stores eight bytes on the stack.
    unsafe { asm!("vmptrst [{}]", in(reg) &mut pointer) };
    pointer
}

/// VMCALL in VMX root operation.
pub fn vmcall() -> Outcome {
    let flags: u64;
    // SAFETY: the program owns the machine.
    unsafe { asm!("vmcall", "pushfq", "pop {}", out(reg) flags) };
    outcome(flags)
}

/// VMLAUNCH or VMRESUME where they are expected to fail.
pub fn vmlaunch() -> Outcome {
    let flags: u64;
    // SAFETY: callers expect a failure; if the entry takes place, HOST_RIP is where it ends.
    unsafe { asm!("vmlaunch", "pushfq", "pop {}", out(reg) flags) };
    outcome(flags)
}

/// See [`vmlaunch`].
pub fn vmresume() -> Outcome {
    let flags: u64;
    // SAFETY: as for VMLAUNCH.
    unsafe { asm!("vmresume", "pushfq", "pop {}", out(reg) flags) };
    outcome(flags)
}

/// VMREAD of any encoding.
pub fn try_vmread(encoding: u64) -> Result<u64, Failure> {
    let (flags, value): (u64, u64);
    // SAFETY: reads a field.
    unsafe {
        asm!("vmread {v}, {e}", "pushfq", "pop {f}", e = in(reg) encoding, v = out(reg) value, f = out(reg) flags)
    };
    outcome(flags).map(|()| value)
}

/// VMWRITE of any encoding.
pub fn try_vmwrite(encoding: u64, value: u64) -> Outcome {
    let flags: u64;
    // SAFETY: writes a field of a VMCS that is the program's.
    unsafe {
        asm!("vmwrite {e}, {v}", "pushfq", "pop {f}", e = in(reg) encoding, v = in(reg) value, f = lateout(reg) flags)
    };
    outcome(flags)
}

/// Reads a field; 0 if the processor does not have it.
pub fn vmread(field: u32) -> u64 {
    try_vmread(field.into()).unwrap_or(0)
}

/// Writes a field; a field that the processor does not have stays unwritten.
pub fn vmwrite(field: u32, value: u64) {
    let _ = try_vmwrite(field.into(), value);
}

/// INVEPT.
pub fn invept(kind: u64, descriptor: [u64; 2]) -> Outcome {
    let flags: u64;
    // SAFETY: invalidates translations only.
    unsafe {
        asm!("invept {k}, [{d}]", "pushfq", "pop {f}", k = in(reg) kind, d = in(reg) &descriptor, f = lateout(reg) flags)
    };
    outcome(flags)
}

/// INVVPID.
pub fn invvpid(kind: u64, descriptor: [u64; 2]) -> Outcome {
    let flags: u64;
    // SAFETY: invalidates translations only.
    unsafe {
        asm!("invvpid {k}, [{d}]", "pushfq", "pop {f}", k = in(reg) kind, d = in(reg) &descriptor, f = lateout(reg) flags)
    };
    outcome(flags)
}
