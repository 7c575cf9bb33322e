//! What a VM exit tells.

use super::capability;
use super::field as f;
use super::insn::vmread;
use core::fmt;

/// Basic exit reasons (appendix C of the SDM).
pub mod reason {
    pub const EXCEPTION_OR_NMI: u32 = 0;
    pub const EXTERNAL_INTERRUPT: u32 = 1;
    pub const TRIPLE_FAULT: u32 = 2;
    pub const INIT: u32 = 3;
    pub const SIPI: u32 = 4;
    pub const INTERRUPT_WINDOW: u32 = 7;
    pub const NMI_WINDOW: u32 = 8;
    pub const TASK_SWITCH: u32 = 9;
    pub const CPUID: u32 = 10;
    pub const GETSEC: u32 = 11;
    pub const HLT: u32 = 12;
    pub const INVD: u32 = 13;
    pub const INVLPG: u32 = 14;
    pub const RDPMC: u32 = 15;
    pub const RDTSC: u32 = 16;
    pub const VMCALL: u32 = 18;
    pub const VMCLEAR: u32 = 19;
    pub const VMLAUNCH: u32 = 20;
    pub const VMPTRLD: u32 = 21;
    pub const VMPTRST: u32 = 22;
    pub const VMREAD: u32 = 23;
    pub const VMRESUME: u32 = 24;
    pub const VMWRITE: u32 = 25;
    pub const VMXOFF: u32 = 26;
    pub const VMXON: u32 = 27;
    pub const CR_ACCESS: u32 = 28;
    pub const MOV_DR: u32 = 29;
    pub const IO_INSTRUCTION: u32 = 30;
    pub const RDMSR: u32 = 31;
    pub const WRMSR: u32 = 32;
    pub const ENTRY_FAILURE_GUEST_STATE: u32 = 33;
    pub const ENTRY_FAILURE_MSR_LOADING: u32 = 34;
    pub const MWAIT: u32 = 36;
    pub const MONITOR_TRAP_FLAG: u32 = 37;
    pub const MONITOR: u32 = 39;
    pub const PAUSE: u32 = 40;
    pub const TPR_BELOW_THRESHOLD: u32 = 43;
    pub const APIC_ACCESS: u32 = 44;
    pub const VIRTUALIZED_EOI: u32 = 45;
    pub const GDTR_IDTR_ACCESS: u32 = 46;
    pub const LDTR_TR_ACCESS: u32 = 47;
    pub const EPT_VIOLATION: u32 = 48;
    pub const EPT_MISCONFIGURATION: u32 = 49;
    pub const INVEPT: u32 = 50;
    pub const RDTSCP: u32 = 51;
    pub const PREEMPTION_TIMER: u32 = 52;
    pub const INVVPID: u32 = 53;
    pub const WBINVD: u32 = 54;
    pub const XSETBV: u32 = 55;
    pub const APIC_WRITE: u32 = 56;
    pub const RDRAND: u32 = 57;
    pub const INVPCID: u32 = 58;
    pub const VMFUNC: u32 = 59;
    pub const RDSEED: u32 = 61;
    pub const PML_FULL: u32 = 62;
    pub const XSAVES: u32 = 63;
    pub const XRSTORS: u32 = 64;
    /// Bit 31 of the exit-reason field.
    pub const ENTRY_FAILURE: u32 = 1 << 31;
}

/// Interruption-information fields: event types, already in place, and flags.
pub mod event {
    pub const EXTERNAL_INTERRUPT: u32 = 0 << 8;
    pub const NMI: u32 = 2 << 8;
    pub const HARDWARE_EXCEPTION: u32 = 3 << 8;
    pub const SOFTWARE_INTERRUPT: u32 = 4 << 8;
    pub const PRIVILEGED_SOFTWARE_EXCEPTION: u32 = 5 << 8;
    pub const SOFTWARE_EXCEPTION: u32 = 6 << 8;
    pub const OTHER: u32 = 7 << 8;
    pub const ERROR_CODE: u32 = 1 << 11;
    /// Exits only: the exit happened in an IRET that ended NMI blocking.
    pub const NMI_UNBLOCKING: u32 = 1 << 12;
    pub const VALID: u32 = 1 << 31;
}

/// Every field of exit information, and where L2 stands.
#[derive(Clone, Copy)]
pub struct Exit {
    /// The whole exit-reason field.
    pub reason: u32,
    pub qualification: u64,
    pub linear: u64,
    pub physical: u64,
    pub interruption: u32,
    pub error_code: u32,
    pub vectoring: u32,
    pub vectoring_error: u32,
    pub length: u32,
    pub information: u32,
    pub rip: u64,
    pub rsp: u64,
    pub rflags: u64,
    /// RIP as an offset into the L2 code that was started.
    pub at: u64,
}

impl Exit {
    /// Reads the exit information of the current VMCS.
    pub fn read(start: u64) -> Exit {
        let rip = vmread(f::GUEST_RIP);
        Exit {
            reason: vmread(f::EXIT_REASON) as u32,
            qualification: vmread(f::EXIT_QUALIFICATION),
            linear: vmread(f::GUEST_LINEAR_ADDRESS),
            physical: if capability::ept_vpid() != 0 { vmread(f::GUEST_PHYSICAL_ADDRESS) } else { 0 },
            interruption: vmread(f::EXIT_INTERRUPTION) as u32,
            error_code: vmread(f::EXIT_ERROR_CODE) as u32,
            vectoring: vmread(f::IDT_VECTORING) as u32,
            vectoring_error: vmread(f::IDT_VECTORING_ERROR_CODE) as u32,
            length: vmread(f::EXIT_INSTRUCTION_LENGTH) as u32,
            information: vmread(f::EXIT_INSTRUCTION_INFORMATION) as u32,
            rip,
            rsp: vmread(f::GUEST_RSP),
            rflags: vmread(f::GUEST_RFLAGS),
            at: rip.wrapping_sub(start),
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Exit { reason, qualification, length, information, at, rip, .. } = self;
        if reason & self::reason::ENTRY_FAILURE != 0 {
            write!(f, "entry failure {} qualification {qualification:#x}", reason & 0xffff)?;
            return Ok(());
        }
        write!(
            f,
            "exit {reason} qualification {qualification:#x} length {length} information {information:#x} "
        )?;
        write!(f, "at +{at:#x} (RIP {rip:#x} RFLAGS {:#x})", self.rflags)?;
        if self.interruption & event::VALID != 0 {
            write!(f, " interruption {:#x}, {:#x}", self.interruption, self.error_code)?;
        }
        if self.vectoring & event::VALID != 0 {
            write!(f, " vectoring {:#x}, {:#x}", self.vectoring, self.vectoring_error)?;
        }
        if matches!(*reason, self::reason::EPT_VIOLATION | self::reason::EPT_MISCONFIGURATION) {
            write!(f, " guest-physical {:#x} linear {:#x}", self.physical, self.linear)?;
        }
        Ok(())
    }
}
