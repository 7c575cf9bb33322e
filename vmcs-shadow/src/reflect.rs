//! What a VM exit of L2 writes into VMCS12 for L1 to read: "Recording VM-Exit Information and Updating VM-Entry Control
//! Fields" (SDM volume 3). Fields that the SDM leaves undefined for an exit keep what they held.
//!
//! Saving the guest's state and loading the host's are not here: they move processor state, not information.

use x86defs::vmx::{ept_qualification, event, reason};

use crate::field::{Field, Vmcs};

/// Why L2 exited: what the processor that ran it recorded.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ExitInformation {
    /// Basic exit reason.
    pub reason: u32,
    /// Exit qualification; 0 where the reason has none.
    pub qualification: u64,
    /// Length of the instruction at fault; 0 where none is.
    pub instruction_length: u32,
    pub instruction_information: u32,
    /// VM-exit interruption information and error code.
    pub interruption: u32,
    pub interruption_error: u32,
    /// IDT-vectoring information and error code.
    pub idt_vectoring: u32,
    pub idt_vectoring_error: u32,
    pub guest_linear: u64,
    pub guest_physical: u64,
}

/// Records a VM exit.
pub fn write_exit_information(vmcs: &mut Vmcs, exit: &ExitInformation) {
    // "Basic VM-Exit Information"
    vmcs.set(Field::ExitReason, u64::from(exit.reason & 0xffff));
    vmcs.set(Field::ExitQualification, exit.qualification);
    if has_guest_linear(exit) {
        vmcs.set(Field::GuestLinearAddress, exit.guest_linear);
    }
    if matches!(exit.reason, reason::EPT_VIOLATION | reason::EPT_MISCONFIGURATION) {
        vmcs.set(Field::GuestPhysicalAddress, exit.guest_physical);
    }
    // "Information for VM Exits Due to Vectored Events", "... During Event Delivery"
    write_event(
        vmcs,
        Field::ExitInterruption,
        Field::ExitErrorCode,
        exit.interruption,
        exit.interruption_error,
    );
    let (information, error) = (exit.idt_vectoring, exit.idt_vectoring_error);
    write_event(vmcs, Field::IdtVectoring, Field::IdtVectoringErrorCode, information, error);
    // "Information for VM Exits Due to Instruction Execution"
    if exit.instruction_length != 0 {
        vmcs.set(Field::ExitInstructionLength, exit.instruction_length.into());
    }
    if has_instruction_information(exit) {
        vmcs.set(Field::ExitInstructionInformation, exit.instruction_information.into());
    }
    clear_injection(vmcs);
}

/// Records a VM entry that failed after it began to load the guest's state: nothing else changes, and the event to inject
/// stays valid ("VM-Entry Failures During or After Loading Guest State").
pub fn write_entry_failure(vmcs: &mut Vmcs, reason: u32, qualification: u64) {
    vmcs.set(Field::ExitReason, (reason & 0xffff | reason::ENTRY_FAILURE).into());
    vmcs.set(Field::ExitQualification, qualification);
}

/// The valid bit of the event to inject is cleared by every VM exit.
fn clear_injection(vmcs: &mut Vmcs) {
    let injection = vmcs.get(Field::EntryInterruption);
    vmcs.set(Field::EntryInterruption, injection & !u64::from(event::VALID));
}

/// An event's information, and its error code if it has one.
fn write_event(vmcs: &mut Vmcs, information: Field, error: Field, value: u32, code: u32) {
    const WITH_ERROR_CODE: u32 = event::VALID | event::ERROR_CODE_VALID;
    vmcs.set(information, value.into());
    if value & WITH_ERROR_CODE == WITH_ERROR_CODE {
        vmcs.set(error, code.into());
    }
}

/// The exit has a guest-linear address: of LMSW's memory operand, of INS's or OUTS's, of an EPT violation with bit 7.
fn has_guest_linear(exit: &ExitInformation) -> bool {
    const LMSW: u64 = 3 << 4;
    const LMSW_MEMORY: u64 = 1 << 6;
    const STRING: u64 = 1 << 4;
    match exit.reason {
        reason::CR_ACCESS => exit.qualification & (LMSW | LMSW_MEMORY) == LMSW | LMSW_MEMORY,
        reason::IO_INSTRUCTION => exit.qualification & STRING != 0,
        reason::EPT_VIOLATION => exit.qualification & ept_qualification::LINEAR_VALID != 0,
        _ => false,
    }
}

/// The exit has instruction information.
fn has_instruction_information(exit: &ExitInformation) -> bool {
    const STRING: u64 = 1 << 4;
    match exit.reason {
        reason::IO_INSTRUCTION => exit.qualification & STRING != 0,
        reason::VMCLEAR
        | reason::VMPTRLD
        | reason::VMPTRST
        | reason::VMREAD
        | reason::VMWRITE
        | reason::VMXON
        | reason::GDTR_IDTR_ACCESS
        | reason::LDTR_TR_ACCESS
        | reason::INVEPT
        | reason::INVVPID
        | reason::INVPCID
        | reason::RDRAND
        | reason::RDSEED
        | reason::XSAVES
        | reason::XRSTORS => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::field::FIELDS;

    const MARK: u64 = 0x55;

    /// An exit with every member set.
    fn full(reason: u32, qualification: u64) -> ExitInformation {
        ExitInformation {
            reason,
            qualification,
            instruction_length: 3,
            instruction_information: 4,
            interruption: event::VALID | event::ERROR_CODE_VALID | 3 << 8 | 14,
            interruption_error: 5,
            idt_vectoring: event::VALID | event::ERROR_CODE_VALID | 3 << 8 | 13,
            idt_vectoring_error: 6,
            guest_linear: 7,
            guest_physical: 8,
        }
    }

    /// The fields that `exit` writes over marks.
    fn written(exit: &ExitInformation) -> Vec<(Field, u64)> {
        let mut vmcs = Vmcs::default();
        for info in FIELDS {
            vmcs.set(info.field, MARK);
        }
        write_exit_information(&mut vmcs, exit);
        FIELDS.iter().map(|i| (i.field, vmcs.get(i.field))).filter(|&(_, value)| value != MARK).collect()
    }

    fn value(exit: &ExitInformation, field: Field) -> Option<u64> {
        written(exit).iter().find(|&&(f, _)| f == field).map(|&(_, value)| value)
    }

    #[test]
    fn an_exit_without_details_writes_little() {
        let exit = ExitInformation { reason: reason::INTERRUPT_WINDOW, ..ExitInformation::default() };
        let expected = [
            (Field::ExitReason, 7),
            (Field::ExitInterruption, 0),
            (Field::IdtVectoring, 0),
            (Field::ExitQualification, 0),
        ];
        assert_eq!(written(&exit), expected);
    }

    #[test]
    fn error_codes_are_written_with_their_event() {
        let mut exit = full(reason::EXCEPTION_OR_NMI, 0x1234);
        assert_eq!(value(&exit, Field::ExitInterruption), Some(0x8000_0b0e));
        assert_eq!(value(&exit, Field::ExitErrorCode), Some(5));
        assert_eq!(value(&exit, Field::IdtVectoring), Some(0x8000_0b0d));
        assert_eq!(value(&exit, Field::IdtVectoringErrorCode), Some(6));
        exit.interruption &= !event::ERROR_CODE_VALID;
        exit.idt_vectoring &= !event::VALID;
        assert_eq!(value(&exit, Field::ExitErrorCode), None);
        assert_eq!(value(&exit, Field::IdtVectoringErrorCode), None);
    }

    #[test]
    fn addresses() {
        let linear = |reason, qualification| value(&full(reason, qualification), Field::GuestLinearAddress);
        let physical = |reason| value(&full(reason, 0), Field::GuestPhysicalAddress);
        assert_eq!(linear(reason::EPT_VIOLATION, 1 << 7), Some(7));
        assert_eq!(linear(reason::EPT_VIOLATION, 1), None);
        assert_eq!(linear(reason::IO_INSTRUCTION, 1 << 4), Some(7), "INS, OUTS");
        assert_eq!(linear(reason::IO_INSTRUCTION, 1 << 3), None, "IN, OUT");
        assert_eq!(linear(reason::CR_ACCESS, 3 << 4 | 1 << 6), Some(7), "LMSW from memory");
        assert_eq!(linear(reason::CR_ACCESS, 3 << 4), None, "LMSW from a register");
        assert_eq!(linear(reason::CR_ACCESS, 1 << 4 | 1 << 6), None);
        assert_eq!(linear(reason::EPT_MISCONFIGURATION, 1 << 7), None);
        assert_eq!(physical(reason::EPT_VIOLATION), Some(8));
        assert_eq!(physical(reason::EPT_MISCONFIGURATION), Some(8));
        assert_eq!(physical(reason::PML_FULL), None);
    }

    #[test]
    fn instruction_information_of_the_instructions_that_have_it() {
        let with: &[u32] = &[19, 21, 22, 23, 25, 27, 46, 47, 50, 53, 57, 58, 61, 63, 64];
        for reason in 0..=reason::LAST {
            let expected = with.contains(&reason).then_some(4);
            assert_eq!(value(&full(reason, 0), Field::ExitInstructionInformation), expected, "{reason}");
            assert_eq!(value(&full(reason, 0), Field::ExitInstructionLength), Some(3), "{reason}");
        }
        assert_eq!(value(&full(reason::IO_INSTRUCTION, 1 << 4), Field::ExitInstructionInformation), Some(4));
        // I/O RCX and its like are for SMM VM exits only.
        assert_eq!(value(&full(reason::IO_INSTRUCTION, 1 << 4), Field::IoRcx), None);
    }

    #[test]
    fn injection_is_over_after_an_exit_and_not_after_a_failed_entry() {
        let mut vmcs = Vmcs::default();
        vmcs.set(Field::EntryInterruption, 0x8000_0b0e);
        write_entry_failure(&mut vmcs, reason::ENTRY_FAILURE_GUEST_STATE, 2);
        assert_eq!(vmcs.get(Field::ExitReason), 0x8000_0021);
        assert_eq!(vmcs.get(Field::ExitQualification), 2);
        assert_eq!(vmcs.get(Field::EntryInterruption), 0x8000_0b0e);
        write_exit_information(&mut vmcs, &full(reason::CPUID, 0));
        assert_eq!(vmcs.get(Field::EntryInterruption), 0x0000_0b0e);
        assert_eq!(vmcs.get(Field::ExitReason), 10);
    }
}
