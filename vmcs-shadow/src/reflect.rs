//! The VM-exit information fields ("Recording VM-Exit Information and Updating VM-Entry Control Fields").

use x86defs::vmx::event;

use crate::field::{Field, Vmcs};

/// What a VM exit is about. Zero is the value of what an exit reason does not define.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ExitInformation {
    /// Basic exit reason.
    pub reason: u32,
    pub qualification: u64,
    pub guest_linear: u64,
    pub guest_physical: u64,
    pub interruption: u32,
    pub interruption_error: u32,
    pub idt_vectoring: u32,
    pub idt_vectoring_error: u32,
    pub instruction_length: u32,
    pub instruction_information: u32,
}

/// Records an exit. The event that VM entry injected is not injected again by the next entry: its valid bit is cleared.
pub fn write_exit_information(vmcs: &mut Vmcs, exit: &ExitInformation) {
    for (field, value) in [
        (Field::ExitReason, u64::from(exit.reason)),
        (Field::ExitQualification, exit.qualification),
        (Field::GuestLinearAddress, exit.guest_linear),
        (Field::GuestPhysicalAddress, exit.guest_physical),
        (Field::ExitInterruption, u64::from(exit.interruption)),
        (Field::ExitErrorCode, u64::from(exit.interruption_error)),
        (Field::IdtVectoring, u64::from(exit.idt_vectoring)),
        (Field::IdtVectoringErrorCode, u64::from(exit.idt_vectoring_error)),
        (Field::ExitInstructionLength, u64::from(exit.instruction_length)),
        (Field::ExitInstructionInformation, u64::from(exit.instruction_information)),
    ] {
        vmcs.set(field, value);
    }
    let injected = vmcs.get32(Field::EntryInterruption) & !event::VALID;
    vmcs.set(Field::EntryInterruption, u64::from(injected));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_is_recorded_and_ends_injection() {
        let mut vmcs = Vmcs::default();
        vmcs.set(Field::EntryInterruption, 0x8000_0b0d);
        vmcs.set(Field::GuestRip, 0x1234);
        let exit = ExitInformation {
            reason: 48,
            qualification: 0x182,
            guest_physical: 0x5000,
            ..Default::default()
        };
        write_exit_information(&mut vmcs, &exit);
        assert_eq!(vmcs.get(Field::ExitReason), 48);
        assert_eq!(vmcs.get(Field::ExitQualification), 0x182);
        assert_eq!(vmcs.get(Field::GuestPhysicalAddress), 0x5000);
        assert_eq!(vmcs.get(Field::EntryInterruption), 0x0b0d);
        assert_eq!(vmcs.get(Field::GuestRip), 0x1234);
    }
}
