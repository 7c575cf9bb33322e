//! Entries of MSR areas: "Loading MSRs" (VM entry, and VM exit) and "Saving MSRs". What RDMSR and WRMSR themselves refuse
//! is their owner's to find out.

use x86defs::msr;

/// One entry of an MSR area, as it is in memory: index, reserved, data.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct MsrEntry {
    pub index: u32,
    pub reserved: u32,
    pub value: u64,
}

/// Why an entry fails.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MsrRule {
    Reserved,
    FsGsBase,
    X2Apic,
    SmmOnly,
    ModelSpecific,
    /// RDMSR or WRMSR would be #GP at CPL 0.
    Refused,
}

impl MsrRule {
    /// Every rule.
    pub const ALL: &[Self] =
        &[Self::Reserved, Self::FsGsBase, Self::X2Apic, Self::SmmOnly, Self::ModelSpecific, Self::Refused];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reserved => "MsrEntryReserved",
            Self::FsGsBase => "MsrEntryFsGsBase",
            Self::X2Apic => "MsrEntryX2Apic",
            Self::SmmOnly => "MsrEntrySmmOnly",
            Self::ModelSpecific => "MsrEntryModelSpecific",
            Self::Refused => "MsrEntryRefused",
        }
    }

    /// What must hold.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Reserved => "bits 63:32 of an MSR area's entry must be 0",
            Self::FsGsBase => {
                "IA32_FS_BASE and IA32_GS_BASE must not be in an MSR-load area; the VMCS has fields"
            }
            Self::X2Apic => "x2APIC registers (800H to 8FFH) must not be in an MSR area",
            Self::SmmOnly => "MSRs of system-management mode must not be in an MSR area outside it",
            Self::ModelSpecific => "the microcode update MSRs must not be in an MSR area",
            Self::Refused => "RDMSR or WRMSR of an MSR area's entry must not fault at CPL 0",
        }
    }
}

fn check_entry(entry: MsrEntry, is_smm_only: bool) -> Result<(), MsrRule> {
    if (msr::X2APIC_FIRST..=msr::X2APIC_LAST).contains(&entry.index) {
        return Err(MsrRule::X2Apic);
    }
    if is_smm_only {
        return Err(MsrRule::SmmOnly);
    }
    if matches!(entry.index, msr::IA32_BIOS_UPDT_TRIG | msr::IA32_BIOS_SIGN_ID) {
        return Err(MsrRule::ModelSpecific);
    }
    if entry.reserved != 0 {
        return Err(MsrRule::Reserved);
    }
    Ok(())
}

/// An entry of the VM-entry or the VM-exit MSR-load area.
pub fn check_msr_load(entry: MsrEntry) -> Result<(), MsrRule> {
    if matches!(entry.index, msr::IA32_FS_BASE | msr::IA32_GS_BASE) {
        return Err(MsrRule::FsGsBase);
    }
    check_entry(entry, entry.index == msr::IA32_SMM_MONITOR_CTL)
}

/// An entry of the VM-exit MSR-store area; its `value` is to be written.
pub fn check_msr_store(entry: MsrEntry) -> Result<(), MsrRule> {
    check_entry(entry, entry.index == msr::IA32_SMBASE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u32, reserved: u32) -> MsrEntry {
        MsrEntry { index, reserved, value: 0 }
    }

    #[test]
    fn loads() {
        for (index, reserved, expected) in [
            (0xc000_0100, 0, Err(MsrRule::FsGsBase)),
            (0xc000_0101, 0, Err(MsrRule::FsGsBase)),
            (0xc000_0102, 0, Ok(())),
            (0x7ff, 0, Ok(())),
            (0x800, 0, Err(MsrRule::X2Apic)),
            (0x8ff, 0, Err(MsrRule::X2Apic)),
            (0x900, 0, Ok(())),
            (0x9b, 0, Err(MsrRule::SmmOnly)),
            (0x79, 0, Err(MsrRule::ModelSpecific)),
            (0x8b, 0, Err(MsrRule::ModelSpecific)),
            (0x174, 1, Err(MsrRule::Reserved)),
            (0x174, 0, Ok(())),
        ] {
            assert_eq!(check_msr_load(entry(index, reserved)), expected, "{index:#x}");
        }
    }

    #[test]
    fn stores() {
        for (index, reserved, expected) in [
            (0xc000_0100, 0, Ok(())),
            (0x80b, 0, Err(MsrRule::X2Apic)),
            (0x9e, 0, Err(MsrRule::SmmOnly)),
            (0x9b, 0, Ok(())),
            (0x10, 0x8000_0000, Err(MsrRule::Reserved)),
            (0x10, 0, Ok(())),
        ] {
            assert_eq!(check_msr_store(entry(index, reserved)), expected, "{index:#x}");
        }
    }
}
