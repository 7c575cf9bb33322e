//! Virtual-machine extensions: control bits, exit reasons, event formats, instruction errors (SDM volume 3, the VMX
//! chapters and appendices A to C).

/// Pin-based VM-execution controls.
pub mod pin {
    pub const EXTERNAL_INTERRUPT_EXITING: u32 = 1 << 0;
    pub const NMI_EXITING: u32 = 1 << 3;
    pub const VIRTUAL_NMIS: u32 = 1 << 5;
    pub const PREEMPTION_TIMER: u32 = 1 << 6;
    pub const POSTED_INTERRUPTS: u32 = 1 << 7;
}

/// Primary processor-based VM-execution controls.
pub mod primary {
    pub const INTERRUPT_WINDOW_EXITING: u32 = 1 << 2;
    pub const USE_TSC_OFFSETTING: u32 = 1 << 3;
    pub const HLT_EXITING: u32 = 1 << 7;
    pub const INVLPG_EXITING: u32 = 1 << 9;
    pub const MWAIT_EXITING: u32 = 1 << 10;
    pub const RDPMC_EXITING: u32 = 1 << 11;
    pub const RDTSC_EXITING: u32 = 1 << 12;
    pub const CR3_LOAD_EXITING: u32 = 1 << 15;
    pub const CR3_STORE_EXITING: u32 = 1 << 16;
    pub const CR8_LOAD_EXITING: u32 = 1 << 19;
    pub const CR8_STORE_EXITING: u32 = 1 << 20;
    pub const USE_TPR_SHADOW: u32 = 1 << 21;
    pub const NMI_WINDOW_EXITING: u32 = 1 << 22;
    pub const MOV_DR_EXITING: u32 = 1 << 23;
    pub const UNCONDITIONAL_IO_EXITING: u32 = 1 << 24;
    pub const USE_IO_BITMAPS: u32 = 1 << 25;
    pub const MONITOR_TRAP_FLAG: u32 = 1 << 27;
    pub const USE_MSR_BITMAPS: u32 = 1 << 28;
    pub const MONITOR_EXITING: u32 = 1 << 29;
    pub const PAUSE_EXITING: u32 = 1 << 30;
    pub const ACTIVATE_SECONDARY: u32 = 1 << 31;
}

/// Secondary processor-based VM-execution controls.
pub mod secondary {
    pub const VIRTUALIZE_APIC_ACCESSES: u32 = 1 << 0;
    pub const ENABLE_EPT: u32 = 1 << 1;
    pub const DESCRIPTOR_TABLE_EXITING: u32 = 1 << 2;
    pub const ENABLE_RDTSCP: u32 = 1 << 3;
    pub const VIRTUALIZE_X2APIC: u32 = 1 << 4;
    pub const ENABLE_VPID: u32 = 1 << 5;
    pub const WBINVD_EXITING: u32 = 1 << 6;
    pub const UNRESTRICTED_GUEST: u32 = 1 << 7;
    pub const APIC_REGISTER_VIRTUALIZATION: u32 = 1 << 8;
    pub const VIRTUAL_INTERRUPT_DELIVERY: u32 = 1 << 9;
    pub const PAUSE_LOOP_EXITING: u32 = 1 << 10;
    pub const RDRAND_EXITING: u32 = 1 << 11;
    pub const ENABLE_INVPCID: u32 = 1 << 12;
    pub const ENABLE_VMFUNC: u32 = 1 << 13;
    pub const VMCS_SHADOWING: u32 = 1 << 14;
    pub const RDSEED_EXITING: u32 = 1 << 16;
    pub const ENABLE_PML: u32 = 1 << 17;
    pub const EPT_VIOLATION_VE: u32 = 1 << 18;
    pub const CONCEAL_FROM_PT: u32 = 1 << 19;
    pub const ENABLE_XSAVES: u32 = 1 << 20;
    pub const MODE_BASED_EXECUTE: u32 = 1 << 22;
    pub const USE_TSC_SCALING: u32 = 1 << 25;
}

/// VM-exit controls.
pub mod exit_ctl {
    pub const SAVE_DEBUG_CONTROLS: u32 = 1 << 2;
    pub const HOST_ADDRESS_SPACE_SIZE: u32 = 1 << 9;
    pub const LOAD_PERF_GLOBAL_CTRL: u32 = 1 << 12;
    pub const ACKNOWLEDGE_INTERRUPT: u32 = 1 << 15;
    pub const SAVE_PAT: u32 = 1 << 18;
    pub const LOAD_PAT: u32 = 1 << 19;
    pub const SAVE_EFER: u32 = 1 << 20;
    pub const LOAD_EFER: u32 = 1 << 21;
    pub const SAVE_PREEMPTION_TIMER: u32 = 1 << 22;
}

/// VM-entry controls.
pub mod entry_ctl {
    pub const LOAD_DEBUG_CONTROLS: u32 = 1 << 2;
    pub const IA32E_MODE_GUEST: u32 = 1 << 9;
    pub const ENTRY_TO_SMM: u32 = 1 << 10;
    pub const DEACTIVATE_DUAL_MONITOR: u32 = 1 << 11;
    pub const LOAD_PERF_GLOBAL_CTRL: u32 = 1 << 13;
    pub const LOAD_PAT: u32 = 1 << 14;
    pub const LOAD_EFER: u32 = 1 << 15;
}

/// Basic exit reasons (appendix C).
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
    pub const RSM: u32 = 17;
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
    pub const ENTRY_FAILURE_MACHINE_CHECK: u32 = 41;
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
    pub const ENCLS: u32 = 60;
    pub const RDSEED: u32 = 61;
    pub const PML_FULL: u32 = 62;
    pub const XSAVES: u32 = 63;
    pub const XRSTORS: u32 = 64;
    /// Highest basic exit reason that may occur here.
    pub const LAST: u32 = XRSTORS;
    /// Bit 31 of the exit-reason field: the VM entry failed.
    pub const ENTRY_FAILURE: u32 = 1 << 31;

    /// The name appendix C gives a basic exit reason.
    pub fn name(reason: u32) -> &'static str {
        match reason & 0xffff {
            EXCEPTION_OR_NMI => "exception or NMI",
            EXTERNAL_INTERRUPT => "external interrupt",
            TRIPLE_FAULT => "triple fault",
            INIT => "INIT signal",
            SIPI => "start-up IPI",
            INTERRUPT_WINDOW => "interrupt window",
            NMI_WINDOW => "NMI window",
            TASK_SWITCH => "task switch",
            CPUID => "CPUID",
            GETSEC => "GETSEC",
            HLT => "HLT",
            INVD => "INVD",
            INVLPG => "INVLPG",
            RDPMC => "RDPMC",
            RDTSC => "RDTSC",
            RSM => "RSM",
            VMCALL => "VMCALL",
            VMCLEAR => "VMCLEAR",
            VMLAUNCH => "VMLAUNCH",
            VMPTRLD => "VMPTRLD",
            VMPTRST => "VMPTRST",
            VMREAD => "VMREAD",
            VMRESUME => "VMRESUME",
            VMWRITE => "VMWRITE",
            VMXOFF => "VMXOFF",
            VMXON => "VMXON",
            CR_ACCESS => "control-register access",
            MOV_DR => "MOV DR",
            IO_INSTRUCTION => "I/O instruction",
            RDMSR => "RDMSR",
            WRMSR => "WRMSR",
            ENTRY_FAILURE_GUEST_STATE => "VM-entry failure: invalid guest state",
            ENTRY_FAILURE_MSR_LOADING => "VM-entry failure: MSR loading",
            MWAIT => "MWAIT",
            MONITOR_TRAP_FLAG => "monitor trap flag",
            MONITOR => "MONITOR",
            PAUSE => "PAUSE",
            ENTRY_FAILURE_MACHINE_CHECK => "VM-entry failure: machine check",
            TPR_BELOW_THRESHOLD => "TPR below threshold",
            APIC_ACCESS => "APIC access",
            VIRTUALIZED_EOI => "virtualized EOI",
            GDTR_IDTR_ACCESS => "access to GDTR or IDTR",
            LDTR_TR_ACCESS => "access to LDTR or TR",
            EPT_VIOLATION => "EPT violation",
            EPT_MISCONFIGURATION => "EPT misconfiguration",
            INVEPT => "INVEPT",
            RDTSCP => "RDTSCP",
            PREEMPTION_TIMER => "preemption timer",
            INVVPID => "INVVPID",
            WBINVD => "WBINVD",
            XSETBV => "XSETBV",
            APIC_WRITE => "APIC write",
            RDRAND => "RDRAND",
            INVPCID => "INVPCID",
            VMFUNC => "VMFUNC",
            ENCLS => "ENCLS",
            RDSEED => "RDSEED",
            PML_FULL => "page-modification log full",
            XSAVES => "XSAVES",
            XRSTORS => "XRSTORS",
            _ => "unknown",
        }
    }
}

/// Interruption information: VM-entry and VM-exit interruption information, IDT-vectoring information.
pub mod event {
    pub const VECTOR: u32 = 0xff;
    pub const TYPE_SHIFT: u32 = 8;
    pub const TYPE: u32 = 7 << TYPE_SHIFT;
    pub const EXTERNAL_INTERRUPT: u32 = 0;
    pub const NMI: u32 = 2;
    pub const HARDWARE_EXCEPTION: u32 = 3;
    pub const SOFTWARE_INTERRUPT: u32 = 4;
    pub const PRIVILEGED_SOFTWARE_EXCEPTION: u32 = 5;
    pub const SOFTWARE_EXCEPTION: u32 = 6;
    /// VM entry only: no event but a pending MTF exit (vector 0).
    pub const OTHER: u32 = 7;
    pub const ERROR_CODE_VALID: u32 = 1 << 11;
    /// VM-exit interruption information: NMI unblocking due to IRET.
    pub const NMI_UNBLOCKING: u32 = 1 << 12;
    pub const VALID: u32 = 1 << 31;
}

/// Interruptibility state.
pub mod interruptibility {
    pub const STI: u32 = 1 << 0;
    pub const MOV_SS: u32 = 1 << 1;
    pub const SMI: u32 = 1 << 2;
    pub const NMI: u32 = 1 << 3;
    pub const ENCLAVE: u32 = 1 << 4;
}

/// Activity state.
pub mod activity {
    pub const ACTIVE: u32 = 0;
    pub const HLT: u32 = 1;
    pub const SHUTDOWN: u32 = 2;
    pub const WAIT_FOR_SIPI: u32 = 3;
}

/// Pending debug exceptions.
pub mod pending_debug {
    pub const B0_B3: u64 = 0xf;
    pub const ENABLED_BREAKPOINT: u64 = 1 << 12;
    pub const BS: u64 = 1 << 14;
    pub const RTM: u64 = 1 << 16;
}

/// Exit qualification of EPT violations.
pub mod ept_qualification {
    pub const READ: u64 = 1 << 0;
    pub const WRITE: u64 = 1 << 1;
    pub const FETCH: u64 = 1 << 2;
    /// The entries' permissions: readable, writable, executable (for supervisor code with mode-based execute).
    pub const READABLE: u64 = 1 << 3;
    pub const WRITABLE: u64 = 1 << 4;
    pub const EXECUTABLE: u64 = 1 << 5;
    pub const USER_EXECUTABLE: u64 = 1 << 6;
    pub const ALLOWED: u64 = READABLE | WRITABLE | EXECUTABLE | USER_EXECUTABLE;
    /// The guest linear address is valid.
    pub const LINEAR_VALID: u64 = 1 << 7;
    /// The access was to the translation of the linear address, not to a paging-structure entry.
    pub const FINAL_TRANSLATION: u64 = 1 << 8;
    /// Advanced information: user-mode linear address, writable page, execute-disabled page.
    pub const USER_PAGE: u64 = 1 << 9;
    pub const WRITABLE_PAGE: u64 = 1 << 10;
    pub const NX_PAGE: u64 = 1 << 11;
    pub const NMI_UNBLOCKING: u64 = 1 << 12;
}

/// VM-instruction error numbers.
pub mod insn_error {
    pub const VMCALL_IN_ROOT: u32 = 1;
    pub const VMCLEAR_BAD_ADDRESS: u32 = 2;
    pub const VMCLEAR_VMXON_POINTER: u32 = 3;
    pub const VMLAUNCH_NOT_CLEAR: u32 = 4;
    pub const VMRESUME_NOT_LAUNCHED: u32 = 5;
    pub const VMRESUME_AFTER_VMXOFF: u32 = 6;
    pub const ENTRY_BAD_CONTROLS: u32 = 7;
    pub const ENTRY_BAD_HOST_STATE: u32 = 8;
    pub const VMPTRLD_BAD_ADDRESS: u32 = 9;
    pub const VMPTRLD_VMXON_POINTER: u32 = 10;
    pub const VMPTRLD_BAD_REVISION: u32 = 11;
    pub const BAD_FIELD: u32 = 12;
    pub const READ_ONLY_FIELD: u32 = 13;
    pub const VMXON_IN_ROOT: u32 = 15;
    pub const ENTRY_BAD_EXECUTIVE_POINTER: u32 = 16;
    pub const ENTRY_EXECUTIVE_NOT_LAUNCHED: u32 = 17;
    pub const ENTRY_NOT_VMXON_POINTER: u32 = 18;
    pub const VMCALL_NOT_CLEAR: u32 = 19;
    pub const VMCALL_BAD_EXIT_CONTROLS: u32 = 20;
    pub const VMCALL_BAD_MSEG_REVISION: u32 = 22;
    pub const VMXOFF_IN_DUAL_MONITOR: u32 = 23;
    pub const VMCALL_BAD_SMM_FEATURES: u32 = 24;
    pub const ENTRY_BAD_EXECUTIVE_CONTROLS: u32 = 25;
    pub const ENTRY_BLOCKED_BY_MOV_SS: u32 = 26;
    pub const INVALIDATION_BAD_OPERAND: u32 = 28;
}

/// IA32_FEATURE_CONTROL.
pub mod feature_control {
    pub const LOCK: u64 = 1 << 0;
    pub const VMX_INSIDE_SMX: u64 = 1 << 1;
    pub const VMX_OUTSIDE_SMX: u64 = 1 << 2;
}

/// Capability MSRs.
pub mod msr {
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
}

/// Bits of IA32_VMX_BASIC that say what the processor does.
pub mod basic_cap {
    /// VM exits of INS and OUTS have instruction information.
    pub const INS_OUTS_INFORMATION: u64 = 1 << 54;
    /// There are TRUE capability MSRs.
    pub const TRUE_CONTROLS: u64 = 1 << 55;
    /// A hardware exception may be injected with or without an error code, whatever its vector.
    pub const ANY_ERROR_CODE: u64 = 1 << 56;
}

/// Bits of IA32_VMX_MISC that say what the processor does.
pub mod misc_cap {
    /// VM exits store EFER.LMA in the "IA-32e mode guest" control.
    pub const STORE_LMA: u64 = 1 << 5;
    pub const ACTIVITY_HLT: u64 = 1 << 6;
    pub const ACTIVITY_SHUTDOWN: u64 = 1 << 7;
    pub const ACTIVITY_WAIT_FOR_SIPI: u64 = 1 << 8;
    /// VMWRITE may write VM-exit information fields.
    pub const VMWRITE_ANY_FIELD: u64 = 1 << 29;
    /// Software events may be injected with instruction length 0.
    pub const INJECT_ZERO_LENGTH: u64 = 1 << 30;
}

/// IA32_VMX_EPT_VPID_CAP.
pub mod ept_vpid_cap {
    pub const EXECUTE_ONLY: u64 = 1 << 0;
    pub const WALK_4: u64 = 1 << 6;
    pub const UNCACHEABLE: u64 = 1 << 8;
    pub const WRITE_BACK: u64 = 1 << 14;
    pub const PAGE_2M: u64 = 1 << 16;
    pub const PAGE_1G: u64 = 1 << 17;
    pub const INVEPT: u64 = 1 << 20;
    pub const ACCESSED_DIRTY: u64 = 1 << 21;
    pub const ADVANCED_EXIT_INFORMATION: u64 = 1 << 22;
    pub const INVEPT_SINGLE: u64 = 1 << 25;
    pub const INVEPT_ALL: u64 = 1 << 26;
    pub const INVVPID: u64 = 1 << 32;
    pub const INVVPID_ADDRESS: u64 = 1 << 40;
    pub const INVVPID_SINGLE: u64 = 1 << 41;
    pub const INVVPID_ALL: u64 = 1 << 42;
    pub const INVVPID_SINGLE_NO_GLOBALS: u64 = 1 << 43;
    /// The bits about EPT; those about VPID are the others.
    pub const EPT_HALF: u64 = 0xffff_ffff;
}

/// VM functions: leaves in IA32_VMX_VMFUNC and the VM-function controls.
pub mod vm_function {
    pub const EPTP_SWITCHING: u64 = 1 << 0;
}
