//! The controls by their names, and what this processor allows of them.

use super::capability::{self, Allowed};
use super::field;

/// The field a control lies in.
#[derive(Clone, Copy, PartialEq)]
pub enum Group {
    Pin,
    Primary,
    Secondary,
    Exit,
    Entry,
}

impl Group {
    /// The VMCS field.
    pub fn field(self) -> u32 {
        match self {
            Group::Pin => field::PIN_CONTROLS,
            Group::Primary => field::PRIMARY_CONTROLS,
            Group::Secondary => field::SECONDARY_CONTROLS,
            Group::Exit => field::EXIT_CONTROLS,
            Group::Entry => field::ENTRY_CONTROLS,
        }
    }

    /// What the processor allows of it.
    pub fn allowed(self) -> Allowed {
        capability::allowed(self)
    }
}

/// One control.
#[derive(Clone, Copy)]
pub struct Control {
    pub name: &'static str,
    pub group: Group,
    pub mask: u32,
}

impl Control {
    /// Whether it may be 1.
    pub fn available(&self) -> bool {
        self.group.allowed().one & self.mask != 0
    }

    /// Whether it may be 0.
    pub fn clearable(&self) -> bool {
        self.group.allowed().zero & self.mask == 0
    }
}

macro_rules! controls {
    ($($group:ident { $($name:ident $bit:literal $text:literal;)* })*) => {
        $($(pub const $name: Control = Control { name: $text, group: Group::$group, mask: 1 << $bit };)*)*
        /// Every control known here.
        pub const ALL: &[Control] = &[$($($name,)*)*];
    };
}

controls! {
    Pin {
        EXTERNAL_INTERRUPT_EXITING 0 "external-interrupt exiting";
        NMI_EXITING 3 "NMI exiting";
        VIRTUAL_NMIS 5 "virtual NMIs";
        PREEMPTION_TIMER 6 "VMX-preemption timer";
        POSTED_INTERRUPTS 7 "posted interrupts";
    }
    Primary {
        INTERRUPT_WINDOW_EXITING 2 "interrupt-window exiting";
        USE_TSC_OFFSETTING 3 "TSC offsetting";
        HLT_EXITING 7 "HLT exiting";
        INVLPG_EXITING 9 "INVLPG exiting";
        MWAIT_EXITING 10 "MWAIT exiting";
        RDPMC_EXITING 11 "RDPMC exiting";
        RDTSC_EXITING 12 "RDTSC exiting";
        CR3_LOAD_EXITING 15 "CR3-load exiting";
        CR3_STORE_EXITING 16 "CR3-store exiting";
        CR8_LOAD_EXITING 19 "CR8-load exiting";
        CR8_STORE_EXITING 20 "CR8-store exiting";
        USE_TPR_SHADOW 21 "TPR shadow";
        NMI_WINDOW_EXITING 22 "NMI-window exiting";
        MOV_DR_EXITING 23 "MOV-DR exiting";
        UNCONDITIONAL_IO_EXITING 24 "unconditional I/O exiting";
        USE_IO_BITMAPS 25 "I/O bitmaps";
        MONITOR_TRAP_FLAG 27 "monitor trap flag";
        USE_MSR_BITMAPS 28 "MSR bitmaps";
        MONITOR_EXITING 29 "MONITOR exiting";
        PAUSE_EXITING 30 "PAUSE exiting";
        ACTIVATE_SECONDARY 31 "secondary controls";
    }
    Secondary {
        VIRTUALIZE_APIC_ACCESSES 0 "virtualize APIC accesses";
        ENABLE_EPT 1 "EPT";
        DESCRIPTOR_TABLE_EXITING 2 "descriptor-table exiting";
        ENABLE_RDTSCP 3 "enable RDTSCP";
        VIRTUALIZE_X2APIC 4 "virtualize x2APIC mode";
        ENABLE_VPID 5 "VPID";
        WBINVD_EXITING 6 "WBINVD exiting";
        UNRESTRICTED_GUEST 7 "unrestricted guest";
        APIC_REGISTER_VIRTUALIZATION 8 "APIC-register virtualization";
        VIRTUAL_INTERRUPT_DELIVERY 9 "virtual-interrupt delivery";
        PAUSE_LOOP_EXITING 10 "PAUSE-loop exiting";
        RDRAND_EXITING 11 "RDRAND exiting";
        ENABLE_INVPCID 12 "enable INVPCID";
        ENABLE_VMFUNC 13 "VM functions";
        VMCS_SHADOWING 14 "VMCS shadowing";
        RDSEED_EXITING 16 "RDSEED exiting";
        ENABLE_PML 17 "page-modification log";
        EPT_VIOLATION_VE 18 "EPT-violation #VE";
        ENABLE_XSAVES 20 "enable XSAVES";
        MODE_BASED_EXECUTE 22 "mode-based execute control";
        USE_TSC_SCALING 25 "TSC scaling";
    }
    Exit {
        SAVE_DEBUG_CONTROLS 2 "save debug controls";
        HOST_ADDRESS_SPACE_SIZE 9 "host address-space size";
        EXIT_LOAD_PERF_GLOBAL_CTRL 12 "load IA32_PERF_GLOBAL_CTRL on exit";
        ACKNOWLEDGE_INTERRUPT 15 "acknowledge interrupt on exit";
        SAVE_PAT 18 "save IA32_PAT";
        EXIT_LOAD_PAT 19 "load IA32_PAT on exit";
        SAVE_EFER 20 "save IA32_EFER";
        EXIT_LOAD_EFER 21 "load IA32_EFER on exit";
        SAVE_PREEMPTION_TIMER 22 "save VMX-preemption timer value";
    }
    Entry {
        LOAD_DEBUG_CONTROLS 2 "load debug controls";
        IA32E_MODE_GUEST 9 "IA-32e mode guest";
        ENTRY_TO_SMM 10 "entry to SMM";
        DEACTIVATE_DUAL_MONITOR 11 "deactivate dual-monitor treatment";
        ENTRY_LOAD_PERF_GLOBAL_CTRL 13 "load IA32_PERF_GLOBAL_CTRL on entry";
        ENTRY_LOAD_PAT 14 "load IA32_PAT on entry";
        ENTRY_LOAD_EFER 15 "load IA32_EFER on entry";
    }
}
