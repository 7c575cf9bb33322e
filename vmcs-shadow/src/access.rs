//! VMREAD and VMWRITE: which fields there are, which may be written, and how an operand of 64 bits meets a field's width
//! ("VMREAD" and "VMWRITE", SDM volume 3; the fields' conditions are appendix B's).

use x86defs::vmx::{
    entry_ctl, ept_vpid_cap, exit_ctl, insn_error, misc_cap, pin, primary, secondary, vm_function,
};

use crate::caps::{Capabilities, Word};
use crate::encoding::{Area, Encoding};
use crate::field::{COUNT, FIELDS, Field, Vmcs};

/// Fields in words of the bitmap.
const BITMAP: usize = COUNT.div_ceil(64);

/// What VMREAD and VMWRITE allow, and which of the invalidations exist, made once from [`Capabilities`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Access {
    /// One bit for each field there is.
    supported: [u64; BITMAP],
    /// VMWRITE may write VM-exit information fields.
    write_any: bool,
    /// INVEPT exists.
    pub invept: bool,
    /// INVVPID exists.
    pub invvpid: bool,
}

impl Default for Access {
    fn default() -> Self {
        Self::new(&Capabilities::default())
    }
}

impl Access {
    /// The access rules of a processor with these capabilities.
    pub fn new(caps: &Capabilities) -> Self {
        let mut supported = [0; BITMAP];
        for field in FIELDS.iter().map(|info| info.field).filter(|&field| is_implied(caps, field)) {
            supported[field as usize / 64] |= 1 << (field as usize % 64);
        }
        Self {
            supported,
            write_any: caps.has_misc(misc_cap::VMWRITE_ANY_FIELD),
            invept: caps.ept_vpid() & ept_vpid_cap::INVEPT != 0,
            invvpid: caps.ept_vpid() & ept_vpid_cap::INVVPID != 0,
        }
    }

    /// The processor has this field.
    #[inline]
    pub fn supports(&self, field: Field) -> bool {
        self.supported[field as usize / 64] >> (field as usize % 64) & 1 != 0
    }

    /// Highest index (bits 9:1 of the encoding) of all fields there are.
    pub fn highest_index(&self) -> u32 {
        let fields = FIELDS.iter().map(|info| info.field).filter(|&field| self.supports(field));
        fields.map(|field| field.encoding().index()).max().unwrap_or(0)
    }

    /// The field an operand names, and whether it is its high half.
    #[inline]
    pub fn find(&self, encoding: u64) -> Result<(Field, bool), u32> {
        let encoding = Encoding::new(encoding).map_err(|_| insn_error::BAD_FIELD)?;
        match Field::from_encoding(encoding) {
            Some(field) if self.supports(field) => Ok((field, encoding.is_high())),
            _ => Err(insn_error::BAD_FIELD),
        }
    }

    /// VMREAD: the field's value, or a VM-instruction error. Outside 64-bit mode the destination takes the low half.
    #[inline]
    pub fn read(&self, vmcs: &Vmcs, encoding: u64) -> Result<u64, u32> {
        let (field, high) = self.find(encoding)?;
        let value = vmcs.get(field);
        Ok(if high { value >> 32 } else { value })
    }

    /// VMWRITE: sets the field, or says which VM-instruction error. Outside 64-bit mode `value` is the operand with its
    /// high half clear.
    #[inline]
    pub fn write(&self, vmcs: &mut Vmcs, encoding: u64, value: u64) -> Result<(), u32> {
        let (field, high) = self.find(encoding)?;
        if field.area() == Area::ExitInformation && !self.write_any {
            return Err(insn_error::READ_ONLY_FIELD);
        }
        let value =
            if high { value << 32 | vmcs.get(field) & 0xffff_ffff } else { field.width().truncate(value) };
        vmcs.set(field, value);
        Ok(())
    }
}

/// Appendix B: fields "that exist only on processors that support the 1-setting of ...".
fn is_implied(caps: &Capabilities, field: Field) -> bool {
    use Field as F;
    let secondary = |bits| caps.has_secondary(bits);
    match field {
        F::Vpid => secondary(secondary::ENABLE_VPID),
        F::PostedInterruptVector | F::PostedInterruptDescriptor => caps.has_pin(pin::POSTED_INTERRUPTS),
        F::EptpIndex | F::VirtualizationExceptionAddress => secondary(secondary::EPT_VIOLATION_VE),
        F::GuestInterruptStatus
        | F::EoiExitBitmap0
        | F::EoiExitBitmap1
        | F::EoiExitBitmap2
        | F::EoiExitBitmap3 => secondary(secondary::VIRTUAL_INTERRUPT_DELIVERY),
        F::PmlIndex | F::PmlAddress => secondary(secondary::ENABLE_PML),
        F::MsrBitmap => caps.has_primary(primary::USE_MSR_BITMAPS),
        F::VirtualApicAddress | F::TprThreshold => caps.has_primary(primary::USE_TPR_SHADOW),
        F::ApicAccessAddress => secondary(secondary::VIRTUALIZE_APIC_ACCESSES),
        F::VmFunctionControls => secondary(secondary::ENABLE_VMFUNC),
        F::EptpListAddress => caps.has(Word::VmFunctions, vm_function::EPTP_SWITCHING),
        F::VmreadBitmap | F::VmwriteBitmap => secondary(secondary::VMCS_SHADOWING),
        F::XssExitingBitmap => secondary(secondary::ENABLE_XSAVES),
        F::TscMultiplier => secondary(secondary::USE_TSC_SCALING),
        F::EptPointer
        | F::GuestPhysicalAddress
        | F::GuestPdpte0
        | F::GuestPdpte1
        | F::GuestPdpte2
        | F::GuestPdpte3 => secondary(secondary::ENABLE_EPT),
        F::GuestPat => caps.has_entry(entry_ctl::LOAD_PAT) || caps.has_exit(exit_ctl::SAVE_PAT),
        F::GuestEfer => caps.has_entry(entry_ctl::LOAD_EFER) || caps.has_exit(exit_ctl::SAVE_EFER),
        F::GuestPerfGlobalCtrl => caps.has_entry(entry_ctl::LOAD_PERF_GLOBAL_CTRL),
        F::HostPat => caps.has_exit(exit_ctl::LOAD_PAT),
        F::HostEfer => caps.has_exit(exit_ctl::LOAD_EFER),
        F::HostPerfGlobalCtrl => caps.has_exit(exit_ctl::LOAD_PERF_GLOBAL_CTRL),
        F::SecondaryControls => caps.has_primary(primary::ACTIVATE_SECONDARY),
        F::PleGap | F::PleWindow => secondary(secondary::PAUSE_LOOP_EXITING),
        F::PreemptionTimerValue => caps.has_pin(pin::PREEMPTION_TIMER),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn without(names: &[&str]) -> Access {
        let mut caps = Capabilities::default();
        for name in names {
            caps.set_flag(name, false).expect(name);
        }
        Access::new(&caps)
    }

    #[test]
    fn halves_and_widths() {
        let (access, mut vmcs) = (Access::default(), Vmcs::default());
        access.write(&mut vmcs, 0x2800, 0x1111_2222_3333_4444).expect("VMCS link pointer");
        access.write(&mut vmcs, 0x2801, 0xdead_beef_5555_6666).expect("its high half");
        assert_eq!(access.read(&vmcs, 0x2800), Ok(0x5555_6666_3333_4444));
        assert_eq!(access.read(&vmcs, 0x2801), Ok(0x5555_6666));
        access.write(&mut vmcs, 0x0802, u64::MAX).expect("guest CS selector");
        assert_eq!(access.read(&vmcs, 0x0802), Ok(0xffff));
        access.write(&mut vmcs, 0x4004, u64::MAX).expect("exception bitmap");
        assert_eq!(access.read(&vmcs, 0x4004), Ok(0xffff_ffff));
        access.write(&mut vmcs, 0x681e, u64::MAX).expect("guest RIP");
        assert_eq!(access.read(&vmcs, 0x681e), Ok(u64::MAX));
    }

    #[test]
    fn what_names_no_field_is_error_12() {
        let (access, vmcs) = (Access::default(), Vmcs::default());
        // Reserved bits, high half of a narrow field, ENCLS-exiting bitmap, guest BNDCFGS, guest PKRS, index beyond.
        for encoding in [0x8000, 1 << 32 | 0x4000, 0x4001, 0x202e, 0x2812, 0x2818, 0x6818 + 0x100, u64::MAX] {
            assert_eq!(access.read(&vmcs, encoding), Err(12), "{encoding:#x}");
            assert_eq!(access.write(&mut vmcs.clone(), encoding, 0), Err(12), "{encoding:#x}");
        }
    }

    #[test]
    fn exit_information_is_read_only_where_misc_says_so() {
        let mut vmcs = Vmcs::default();
        assert_eq!(Access::default().write(&mut vmcs, 0x4402, 7), Ok(()));
        assert_eq!(vmcs.get(Field::ExitReason), 7);
        let access = without(&["vmx-vmwrite-vmexit-fields"]);
        assert_eq!(access.write(&mut vmcs, 0x4402, 8), Err(13));
        assert_eq!(access.write(&mut vmcs, 0x2401, 8), Err(13), "high half");
        assert_eq!(access.read(&vmcs, 0x4402), Ok(7));
        // An unsupported field is no read-only field.
        assert_eq!(without(&["vmx-vmwrite-vmexit-fields", "vmx-ept"]).write(&mut vmcs, 0x2400, 8), Err(12));
    }

    #[test]
    fn fields_follow_capabilities() {
        for (flag, encodings) in [
            ("vmx-vpid", &[0x0000_u64][..]),
            ("vmx-posted-intr", &[0x0002, 0x2016]),
            ("vmx-ept-violation-ve", &[0x0004, 0x202a]),
            ("vmx-apicv-vid", &[0x0810, 0x201c, 0x201e, 0x2020, 0x2022]),
            ("vmx-pml", &[0x0812, 0x200e]),
            ("vmx-msr-bitmap", &[0x2004]),
            ("vmx-flexpriority", &[0x2012, 0x401c]),
            ("vmx-apicv-xapic", &[0x2014]),
            ("vmx-vmfunc", &[0x2018, 0x2024]),
            ("vmx-eptp-switching", &[0x2024]),
            ("vmx-shadow-vmcs", &[0x2026, 0x2028]),
            ("vmx-xsaves", &[0x202c]),
            ("vmx-tsc-scaling", &[0x2032]),
            ("vmx-ept", &[0x201a, 0x2400, 0x280a, 0x280c, 0x280e, 0x2810]),
            ("vmx-exit-load-pat", &[0x2c00]),
            ("vmx-exit-load-efer", &[0x2c02]),
            ("vmx-secondary-ctls", &[0x401e]),
            ("vmx-ple", &[0x4020, 0x4022]),
            ("vmx-preemption-timer", &[0x482e]),
        ] {
            for &encoding in encodings {
                assert_eq!(Access::default().read(&Vmcs::default(), encoding), Ok(0), "{encoding:#x}");
                assert_eq!(
                    without(&[flag]).read(&Vmcs::default(), encoding),
                    Err(12),
                    "{flag} {encoding:#x}"
                );
            }
        }
        // Saving alone implies the guest's field, as does loading alone; there is no PMU.
        assert_eq!(without(&["vmx-exit-save-pat"]).read(&Vmcs::default(), 0x2804), Ok(0));
        assert_eq!(without(&["vmx-entry-load-pat"]).read(&Vmcs::default(), 0x2804), Ok(0));
        assert_eq!(
            without(&["vmx-entry-load-pat", "vmx-exit-save-pat"]).read(&Vmcs::default(), 0x2804),
            Err(12)
        );
        assert_eq!(
            without(&["vmx-entry-load-efer", "vmx-exit-save-efer"]).read(&Vmcs::default(), 0x2806),
            Err(12)
        );
        assert_eq!(Access::default().read(&Vmcs::default(), 0x2808), Err(12));
        assert_eq!(Access::default().read(&Vmcs::default(), 0x2c04), Err(12));
    }
}
