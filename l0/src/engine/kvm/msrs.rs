//! MSRs that KVM keeps while the guest runs. All others never reach KVM: the vCPU's state or its owner has them.

use std::ops::RangeInclusive;

use kvm_bindings::{Msrs as MsrList, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use turtles_cpu::state::Msrs;
use x86defs::msr;

use super::failed;
use crate::engine::EngineError;

/// MSRs the guest may reach without us: those below, EFER and the segment bases (moved with the system registers),
/// and the two command MSRs, which hold nothing. At most eight to a range.
pub(super) const KVM_ANSWERS: &[RangeInclusive<u32>] = &[
    msr::IA32_SPEC_CTRL..=msr::IA32_PRED_CMD,
    msr::IA32_FLUSH_CMD..=msr::IA32_FLUSH_CMD,
    msr::IA32_SYSENTER_CS..=msr::IA32_SYSENTER_EIP,
    msr::IA32_XSS..=msr::IA32_XSS,
    msr::IA32_EFER..=msr::IA32_FMASK,
    msr::IA32_FS_BASE..=msr::IA32_TSC_AUX,
];

type Field = fn(&mut Msrs) -> &mut u64;

/// MSRs that move in and out.
const MOVED: &[(u32, Field)] = &[
    (msr::IA32_STAR, |m| &mut m.star),
    (msr::IA32_LSTAR, |m| &mut m.lstar),
    (msr::IA32_CSTAR, |m| &mut m.cstar),
    (msr::IA32_FMASK, |m| &mut m.fmask),
    (msr::IA32_KERNEL_GS_BASE, |m| &mut m.kernel_gs_base),
    (msr::IA32_SYSENTER_CS, |m| &mut m.sysenter_cs),
    (msr::IA32_SYSENTER_ESP, |m| &mut m.sysenter_esp),
    (msr::IA32_SYSENTER_EIP, |m| &mut m.sysenter_eip),
    (msr::IA32_TSC_AUX, |m| &mut m.tsc_aux),
    (msr::IA32_XSS, |m| &mut m.xss),
    (msr::IA32_SPEC_CTRL, |m| &mut m.spec_ctrl),
];

/// What KVM holds at present.
pub(super) struct KvmMsrs {
    /// The MSRs this vCPU has, with their fields; the values below are in the same order.
    known: Vec<(u32, Field)>,
    values: Vec<u64>,
    list: MsrList,
}

fn list_of(entries: &[kvm_msr_entry]) -> Result<MsrList, EngineError> {
    MsrList::from_entries(entries).map_err(|error| EngineError::Kvm {
        what: "making a list of MSRs".into(),
        source: std::io::Error::other(format!("{error:?}")),
    })
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

/// Reads one MSR; none if this vCPU has no such MSR.
pub(super) fn read_one(vcpu: &VcpuFd, index: u32) -> Result<Option<u64>, EngineError> {
    let mut list = list_of(&[entry(index, 0)])?;
    let read = vcpu.get_msrs(&mut list).map_err(failed(format!("reading MSR {index:#x}")))?;
    Ok(if read == 1 { list.as_slice().first().map(|e| e.data) } else { None })
}

/// Writes one MSR; false if this vCPU refuses.
pub(super) fn write_one(vcpu: &VcpuFd, index: u32, value: u64) -> Result<bool, EngineError> {
    let list = list_of(&[entry(index, value)])?;
    let written = vcpu.set_msrs(&list).map_err(failed(format!("writing MSR {index:#x}")))?;
    Ok(written == 1)
}

impl KvmMsrs {
    /// Finds out which MSRs this vCPU has; its CPUID must have been set.
    pub(super) fn new(vcpu: &VcpuFd) -> Result<Self, EngineError> {
        let mut known = Vec::new();
        let mut values = Vec::new();
        for &(index, field) in MOVED {
            // A value that reads may still be refused when written back.
            if let Some(value) = read_one(vcpu, index)? {
                if write_one(vcpu, index, value)? {
                    known.push((index, field));
                    values.push(value);
                }
            }
        }
        let entries: Vec<_> = known.iter().map(|&(index, _)| entry(index, 0)).collect();
        Ok(Self { list: list_of(&entries)?, known, values })
    }

    /// Moves what differs into KVM.
    pub(super) fn set(&mut self, vcpu: &VcpuFd, msrs: &mut Msrs) -> Result<(), EngineError> {
        let mut entries = Vec::new();
        for (&(index, field), value) in self.known.iter().zip(&mut self.values) {
            let wanted = *field(msrs);
            if *value != wanted {
                *value = wanted;
                entries.push(entry(index, wanted));
            }
        }
        if entries.is_empty() {
            return Ok(());
        }
        let written = vcpu.set_msrs(&list_of(&entries)?).map_err(failed("writing MSRs"))?;
        if let Some(refused) = entries.get(written) {
            let what = format!("KVM refuses the value {:#x} for MSR {:#x}", refused.data, refused.index);
            return Err(EngineError::Kvm { what, source: std::io::ErrorKind::InvalidInput.into() });
        }
        Ok(())
    }

    /// Moves all out of KVM.
    pub(super) fn get(&mut self, vcpu: &VcpuFd, msrs: &mut Msrs) -> Result<(), EngineError> {
        vcpu.get_msrs(&mut self.list).map_err(failed("reading MSRs"))?;
        for ((entry, &(_, field)), value) in
            self.list.as_slice().iter().zip(&self.known).zip(&mut self.values)
        {
            *value = entry.data;
            *field(msrs) = entry.data;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_moved_msr_is_answered_by_kvm_and_ranges_fit_their_bitmap() {
        for &(index, _) in MOVED {
            assert!(KVM_ANSWERS.iter().any(|r| r.contains(&index)), "MSR {index:#x} would come to us");
        }
        assert!(KVM_ANSWERS.iter().all(|r| r.end() - r.start() < 8));
    }

    #[test]
    fn fields_are_all_different() {
        let mut msrs = Msrs::default();
        for (number, &(_, field)) in (1..).zip(MOVED) {
            *field(&mut msrs) = number;
        }
        for (number, &(index, field)) in (1..).zip(MOVED) {
            assert_eq!(*field(&mut msrs), number, "MSR {index:#x} shares its field");
        }
    }
}
