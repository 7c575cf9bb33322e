//! Whose is a VM exit of L2: L1's, if its VMCS12 asks for it ("VMX Non-Root Operation", SDM volume 3), else L0's. One pure
//! function of the exit and the VMCS12; bitmaps in L1's memory are looked up where the answer depends on them.
//!
//! VMCS02 may make L2 exit where L1 did not ask for it, so every answer comes from VMCS12 and none from the exit having
//! happened; where only one hypervisor can have asked (pause-loop exiting, the page-modification log) the two coincide.

use x86defs::cr0;
use x86defs::vmx::{event, pin, primary, reason, secondary};

use crate::event::Event;
use crate::field::{Field, Vmcs};

/// Who handles an exit of L2.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Handler {
    L0,
    /// L0 reflects it.
    L1,
}

/// What routing needs to know of an exit.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ExitFacts {
    /// Basic exit reason.
    pub reason: u32,
    pub qualification: u64,
    /// VM-exit interruption information and error code: exceptions and NMIs.
    pub interruption: u32,
    pub interruption_error: u32,
    /// What the instruction was given: MOV to CR, the register's value; RDMSR and WRMSR, ECX; VMREAD and VMWRITE, the
    /// field's encoding; XSAVES and XRSTORS, EDX:EAX AND IA32_XSS.
    pub operand: u64,
}

/// L1's bitmaps: true where the bit is set.
pub trait Bitmaps {
    /// I/O bitmap A or B.
    fn io(&self, port: u16) -> bool;
    /// MSR bitmap for reads; `index` is in one of its two ranges.
    fn msr_read(&self, index: u32) -> bool;
    /// MSR bitmap for writes.
    fn msr_write(&self, index: u32) -> bool;
    /// VMREAD bitmap; `encoding` has 15 bits.
    fn vmread(&self, encoding: u16) -> bool;
    /// VMWRITE bitmap.
    fn vmwrite(&self, encoding: u16) -> bool;
}

/// Who handles the exit.
pub fn route(exit: &ExitFacts, vmcs12: &Vmcs, bits: &dyn Bitmaps) -> Handler {
    if wants(exit, &Wishes { vmcs: vmcs12 }, bits) { Handler::L1 } else { Handler::L0 }
}

/// The MSR is in a range that the MSR bitmaps cover.
pub fn is_in_msr_bitmaps(index: u32) -> bool {
    matches!(index, 0..=0x1fff | 0xc000_0000..=0xc000_1fff)
}

/// VMCS12's controls.
struct Wishes<'a> {
    vmcs: &'a Vmcs,
}

impl Wishes<'_> {
    fn pin(&self, bits: u32) -> bool {
        self.vmcs.get32(Field::PinControls) & bits != 0
    }

    fn primary(&self, bits: u32) -> bool {
        self.vmcs.get32(Field::PrimaryControls) & bits != 0
    }

    fn secondary(&self, bits: u32) -> bool {
        self.vmcs.secondary() & bits != 0
    }
}

/// L1 asked for the exit.
fn wants(exit: &ExitFacts, l1: &Wishes, bits: &dyn Bitmaps) -> bool {
    match exit.reason {
        reason::EXCEPTION_OR_NMI => wants_exception(exit, l1),
        reason::EXTERNAL_INTERRUPT => l1.pin(pin::EXTERNAL_INTERRUPT_EXITING),
        reason::INTERRUPT_WINDOW => l1.primary(primary::INTERRUPT_WINDOW_EXITING),
        reason::NMI_WINDOW => l1.primary(primary::NMI_WINDOW_EXITING),
        // "Instructions That Cause VM Exits Unconditionally", and events that always do.
        reason::TRIPLE_FAULT
        | reason::INIT
        | reason::SIPI
        | reason::TASK_SWITCH
        | reason::CPUID
        | reason::GETSEC
        | reason::INVD
        | reason::RSM
        | reason::VMCALL
        | reason::VMCLEAR
        | reason::VMLAUNCH
        | reason::VMPTRLD
        | reason::VMPTRST
        | reason::VMRESUME
        | reason::VMXOFF
        | reason::VMXON
        | reason::INVEPT
        | reason::INVVPID
        | reason::XSETBV => true,
        // L1 made the VM entry that failed.
        reason::ENTRY_FAILURE_GUEST_STATE
        | reason::ENTRY_FAILURE_MSR_LOADING
        | reason::ENTRY_FAILURE_MACHINE_CHECK => true,
        // The walk of EPT12 decides, which is L0's: it reflects what EPT12 does not allow.
        reason::EPT_VIOLATION | reason::EPT_MISCONFIGURATION => false,
        reason::APIC_ACCESS
        | reason::APIC_WRITE
        | reason::VIRTUALIZED_EOI
        | reason::TPR_BELOW_THRESHOLD
        | reason::PREEMPTION_TIMER
        | reason::MONITOR_TRAP_FLAG
        | reason::PML_FULL => wants_event(exit, l1),
        _ => wants_instruction(exit, l1, bits),
    }
}

/// "Exceptions" and "Non-maskable interrupts" of "Other Causes of VM Exits".
fn wants_exception(exit: &ExitFacts, l1: &Wishes) -> bool {
    const PAGE_FAULT: u8 = x86defs::vector::PF;
    let Some(event) = Event::new(exit.interruption) else { return false };
    if event.kind() == event::NMI {
        return l1.pin(pin::NMI_EXITING);
    }
    let vector = event.vector();
    let bit = l1.vmcs.get32(Field::ExceptionBitmap).checked_shr(vector.into()).unwrap_or(0) & 1 != 0;
    if vector == PAGE_FAULT {
        let mask = l1.vmcs.get32(Field::PageFaultMask);
        let matches = exit.interruption_error & mask == l1.vmcs.get32(Field::PageFaultMatch);
        return bit == matches;
    }
    bit
}

/// Exits that no instruction's own control decides.
fn wants_event(exit: &ExitFacts, l1: &Wishes) -> bool {
    const REGISTERS_OR_DELIVERY: u32 =
        secondary::APIC_REGISTER_VIRTUALIZATION | secondary::VIRTUAL_INTERRUPT_DELIVERY;
    match exit.reason {
        reason::APIC_ACCESS => l1.secondary(secondary::VIRTUALIZE_APIC_ACCESSES),
        reason::APIC_WRITE => l1.secondary(REGISTERS_OR_DELIVERY),
        reason::VIRTUALIZED_EOI => l1.secondary(secondary::VIRTUAL_INTERRUPT_DELIVERY),
        reason::TPR_BELOW_THRESHOLD => l1.primary(primary::USE_TPR_SHADOW),
        reason::PREEMPTION_TIMER => l1.pin(pin::PREEMPTION_TIMER),
        // Asked for by the control, or made pending by an injected event of type 7.
        reason::MONITOR_TRAP_FLAG => {
            let injected = Event::injected(l1.vmcs).is_some_and(|event| event.kind() == event::OTHER);
            injected || l1.primary(primary::MONITOR_TRAP_FLAG)
        }
        reason::PML_FULL => l1.secondary(secondary::ENABLE_PML),
        _ => false,
    }
}

/// "Instructions That Cause VM Exits Conditionally".
fn wants_instruction(exit: &ExitFacts, l1: &Wishes, bits: &dyn Bitmaps) -> bool {
    match exit.reason {
        reason::HLT => l1.primary(primary::HLT_EXITING),
        reason::INVLPG => l1.primary(primary::INVLPG_EXITING),
        reason::INVPCID => l1.primary(primary::INVLPG_EXITING) && l1.secondary(secondary::ENABLE_INVPCID),
        reason::RDPMC => l1.primary(primary::RDPMC_EXITING),
        reason::RDTSC => l1.primary(primary::RDTSC_EXITING),
        reason::RDTSCP => l1.primary(primary::RDTSC_EXITING) && l1.secondary(secondary::ENABLE_RDTSCP),
        reason::MWAIT => l1.primary(primary::MWAIT_EXITING),
        reason::MONITOR => l1.primary(primary::MONITOR_EXITING),
        reason::PAUSE => l1.primary(primary::PAUSE_EXITING) || l1.secondary(secondary::PAUSE_LOOP_EXITING),
        reason::MOV_DR => l1.primary(primary::MOV_DR_EXITING),
        reason::CR_ACCESS => wants_cr_access(exit, l1),
        reason::IO_INSTRUCTION => wants_io(exit, l1, bits),
        reason::RDMSR => wants_msr(exit, l1, |index| bits.msr_read(index)),
        reason::WRMSR => wants_msr(exit, l1, |index| bits.msr_write(index)),
        reason::VMREAD => wants_vmcs_access(exit, l1, |encoding| bits.vmread(encoding)),
        reason::VMWRITE => wants_vmcs_access(exit, l1, |encoding| bits.vmwrite(encoding)),
        reason::GDTR_IDTR_ACCESS | reason::LDTR_TR_ACCESS => {
            l1.secondary(secondary::DESCRIPTOR_TABLE_EXITING)
        }
        reason::WBINVD => l1.secondary(secondary::WBINVD_EXITING),
        reason::RDRAND => l1.secondary(secondary::RDRAND_EXITING),
        reason::RDSEED => l1.secondary(secondary::RDSEED_EXITING),
        // Without the control VMFUNC is #UD; with it, what the VM function itself refuses exits.
        reason::VMFUNC => l1.secondary(secondary::ENABLE_VMFUNC),
        reason::XSAVES | reason::XRSTORS => {
            let exiting = exit.operand & l1.vmcs.get(Field::XssExitingBitmap) != 0;
            l1.secondary(secondary::ENABLE_XSAVES) && exiting
        }
        // ENCLS, which is not offered, and numbers that are no exit reason.
        _ => false,
    }
}

/// MOV CR, CLTS and LMSW.
fn wants_cr_access(exit: &ExitFacts, l1: &Wishes) -> bool {
    const MOV_TO: u64 = 0;
    const MOV_FROM: u64 = 1;
    const CLTS: u64 = 2;
    let (mask, shadow) = (l1.vmcs.get(Field::Cr0Mask), l1.vmcs.get(Field::Cr0Shadow));
    let register = exit.qualification & 0xf;
    match (exit.qualification >> 4 & 3, register) {
        (MOV_TO, 0) => (exit.operand ^ shadow) & mask != 0,
        (MOV_TO, 3) => l1.primary(primary::CR3_LOAD_EXITING) && !is_cr3_target(exit.operand, l1),
        (MOV_TO, 4) => {
            let shadow = l1.vmcs.get(Field::Cr4Shadow);
            (exit.operand ^ shadow) & l1.vmcs.get(Field::Cr4Mask) != 0
        }
        (MOV_TO, 8) => l1.primary(primary::CR8_LOAD_EXITING),
        (MOV_FROM, 3) => l1.primary(primary::CR3_STORE_EXITING),
        (MOV_FROM, 8) => l1.primary(primary::CR8_STORE_EXITING),
        (MOV_TO | MOV_FROM, _) => false,
        (CLTS, _) => mask & shadow & cr0::TS != 0,
        _ => wants_lmsw(exit.qualification >> 16 & 0xf, mask, shadow),
    }
}

fn is_cr3_target(value: u64, l1: &Wishes) -> bool {
    let count = l1.vmcs.get(Field::Cr3TargetCount).min(4) as usize;
    (0..count).any(|i| l1.vmcs.get(Field::Cr3Target0.nth(i)) == value)
}

/// LMSW cannot clear PE: only setting it counts.
fn wants_lmsw(source: u64, mask: u64, shadow: u64) -> bool {
    const MP_EM_TS: u64 = cr0::MP | cr0::EM | cr0::TS;
    let sets_pe = source & mask & !shadow & cr0::PE != 0;
    sets_pe || (source ^ shadow) & mask & MP_EM_TS != 0
}

/// IN, INS, OUT, OUTS: any port of the access, or an access that wraps around the I/O-port space.
fn wants_io(exit: &ExitFacts, l1: &Wishes, bits: &dyn Bitmaps) -> bool {
    if !l1.primary(primary::USE_IO_BITMAPS) {
        return l1.primary(primary::UNCONDITIONAL_IO_EXITING);
    }
    let port = (exit.qualification >> 16) as u16;
    let others = (exit.qualification & 7) as u16;
    match port.checked_add(others) {
        Some(last) => (port..=last).any(|port| bits.io(port)),
        None => true,
    }
}

fn wants_msr(exit: &ExitFacts, l1: &Wishes, bit: impl Fn(u32) -> bool) -> bool {
    let index = exit.operand as u32;
    !l1.primary(primary::USE_MSR_BITMAPS) || !is_in_msr_bitmaps(index) || bit(index)
}

/// VMREAD and VMWRITE.
fn wants_vmcs_access(exit: &ExitFacts, l1: &Wishes, bit: impl Fn(u16) -> bool) -> bool {
    const ENCODING: u64 = 0x7fff;
    let shadowed = l1.secondary(secondary::VMCS_SHADOWING) && exit.operand & !ENCODING == 0;
    !shadowed || bit(exit.operand as u16)
}

#[cfg(test)]
mod tests;
