//! What VM-instruction error numbers mean ("VM Instruction Error Numbers", SDM volume 3).

use x86defs::vmx::insn_error as e;

/// The SDM's description of a VM-instruction error.
pub fn meaning(number: u32) -> &'static str {
    match number {
        e::VMCALL_IN_ROOT => "VMCALL executed in VMX root operation",
        e::VMCLEAR_BAD_ADDRESS => "VMCLEAR with invalid physical address",
        e::VMCLEAR_VMXON_POINTER => "VMCLEAR with VMXON pointer",
        e::VMLAUNCH_NOT_CLEAR => "VMLAUNCH with non-clear VMCS",
        e::VMRESUME_NOT_LAUNCHED => "VMRESUME with non-launched VMCS",
        e::VMRESUME_AFTER_VMXOFF => "VMRESUME after VMXOFF",
        e::ENTRY_BAD_CONTROLS => "VM entry with invalid control field(s)",
        e::ENTRY_BAD_HOST_STATE => "VM entry with invalid host-state field(s)",
        e::VMPTRLD_BAD_ADDRESS => "VMPTRLD with invalid physical address",
        e::VMPTRLD_VMXON_POINTER => "VMPTRLD with VMXON pointer",
        e::VMPTRLD_BAD_REVISION => "VMPTRLD with incorrect VMCS revision identifier",
        e::BAD_FIELD => "VMREAD or VMWRITE from/to unsupported VMCS component",
        e::READ_ONLY_FIELD => "VMWRITE to read-only VMCS component",
        e::VMXON_IN_ROOT => "VMXON executed in VMX root operation",
        e::ENTRY_BAD_EXECUTIVE_POINTER => "VM entry with invalid executive-VMCS pointer",
        e::ENTRY_EXECUTIVE_NOT_LAUNCHED => "VM entry with non-launched executive VMCS",
        e::ENTRY_NOT_VMXON_POINTER => "VM entry with executive-VMCS pointer not VMXON pointer",
        e::VMCALL_NOT_CLEAR => "VMCALL with non-clear VMCS",
        e::VMCALL_BAD_EXIT_CONTROLS => "VMCALL with invalid VM-exit control fields",
        e::VMCALL_BAD_MSEG_REVISION => "VMCALL with incorrect MSEG revision identifier",
        e::VMXOFF_IN_DUAL_MONITOR => "VMXOFF under dual-monitor treatment of SMIs and SMM",
        e::VMCALL_BAD_SMM_FEATURES => "VMCALL with invalid SMM-monitor features",
        e::ENTRY_BAD_EXECUTIVE_CONTROLS => {
            "VM entry with invalid VM-execution control fields in executive VMCS"
        }
        e::ENTRY_BLOCKED_BY_MOV_SS => "VM entry with events blocked by MOV SS",
        e::INVALIDATION_BAD_OPERAND => "Invalid operand to INVEPT/INVVPID",
        _ => "unknown VM-instruction error",
    }
}

/// What would have satisfied the instruction.
pub fn remedy(number: u32) -> &'static str {
    match number {
        e::VMCALL_IN_ROOT => "there is no SMM monitor to call: VMCALL is for guests",
        e::VMCLEAR_BAD_ADDRESS | e::VMPTRLD_BAD_ADDRESS => {
            "the pointer must be 4-KiB aligned and within the physical-address width"
        }
        e::VMCLEAR_VMXON_POINTER | e::VMPTRLD_VMXON_POINTER => {
            "use a region of its own for the VMCS; this one was given to VMXON"
        }
        e::VMLAUNCH_NOT_CLEAR => "VMCLEAR the VMCS first, or use VMRESUME",
        e::VMRESUME_NOT_LAUNCHED | e::VMRESUME_AFTER_VMXOFF => {
            "the first entry with a VMCS after VMCLEAR is VMLAUNCH"
        }
        e::VMPTRLD_BAD_REVISION => {
            "the region's first word must be bits 30:0 of IA32_VMX_BASIC; bit 31 only for a shadow VMCS, if \
             VMCS shadowing is offered"
        }
        e::BAD_FIELD => {
            "the encoding names no field that this processor has: a field belongs to a control, which its \
             capability MSR must offer"
        }
        e::READ_ONLY_FIELD => "VM-exit information can be written only with IA32_VMX_MISC bit 29",
        e::VMXON_IN_ROOT => "the processor is in VMX operation already",
        e::ENTRY_BLOCKED_BY_MOV_SS => "let one instruction pass after MOV SS or POP SS",
        e::INVALIDATION_BAD_OPERAND => {
            "the type must be one that IA32_VMX_EPT_VPID_CAP offers; the descriptor's reserved bits must be 0, \
             its VPID not 0, its address canonical, its EPT pointer valid"
        }
        _ => "see the rule",
    }
}
