//! L2's registers: from VMCS12 into the vCPU on VM entry, and back on VM exit.

use turtles_cpu::Cpu;
use turtles_cpu::state::{Activity, CpuState, Seg, Segment, Shadow, TableRegister, reg};
use vmcs_shadow::{Field, Vmcs};
use x86defs::vmx::{activity, entry_ctl, exit_ctl, interruptibility, pending_debug, pin, secondary};
use x86defs::{cr0, dr, efer, rflags};

/// CR0 bits that neither VM entry nor VM exit changes: ET, CD, NW and all reserved bits.
const CR0_KEPT: u64 = !(cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::NE | cr0::WP | cr0::AM | cr0::PG);

/// CR0 as VM entry or VM exit loads it over `old`.
pub fn loaded_cr0(old: u64, value: u64) -> u64 {
    old & CR0_KEPT | value & !CR0_KEPT
}

/// ES, CS, SS, DS, FS, GS in encoding order; LDTR and TR follow at 6 and 7.
pub fn segment(vmcs: &Vmcs, n: usize) -> Segment {
    Segment {
        selector: vmcs.get(Field::GuestEsSelector.nth(n)) as u16,
        base: vmcs.get(Field::GuestEsBase.nth(n)),
        limit: vmcs.get32(Field::GuestEsLimit.nth(n)),
        access: vmcs.get32(Field::GuestEsAccess.nth(n)),
    }
}

fn set_segment(vmcs: &mut Vmcs, n: usize, segment: &Segment) {
    vmcs.set(Field::GuestEsSelector.nth(n), u64::from(segment.selector));
    vmcs.set(Field::GuestEsBase.nth(n), segment.base);
    vmcs.set(Field::GuestEsLimit.nth(n), u64::from(segment.limit));
    vmcs.set(Field::GuestEsAccess.nth(n), u64::from(segment.access));
}

fn table(vmcs: &Vmcs, base: Field, limit: Field) -> TableRegister {
    TableRegister { base: vmcs.get(base), limit: vmcs.get(limit) as u16 }
}

/// EFER as VM entry loads it ("Loading Guest Control Registers, Debug Registers, and MSRs").
fn loaded_efer(state: &CpuState, vmcs: &Vmcs, guest_cr0: u64) -> u64 {
    let controls = vmcs.get32(Field::EntryControls);
    if controls & entry_ctl::LOAD_EFER != 0 {
        return vmcs.get(Field::GuestEfer);
    }
    let long = controls & entry_ctl::IA32E_MODE_GUEST != 0;
    let mut value = state.efer & !efer::LMA | if long { efer::LMA } else { 0 };
    if guest_cr0 & cr0::PG != 0 {
        value = value & !efer::LME | if long { efer::LME } else { 0 };
    }
    value
}

/// Loads the guest-state area. `pdptes` are what PAE paging uses, if the guest does.
pub fn load(cpu: &mut Cpu, vmcs: &Vmcs, pdptes: Option<[u64; 4]>) {
    let state = &mut cpu.state;
    let controls = vmcs.get32(Field::EntryControls);
    let new_cr0 = loaded_cr0(state.cr0, vmcs.get(Field::GuestCr0));
    state.efer = loaded_efer(state, vmcs, new_cr0);
    state.cr0 = new_cr0;
    state.cr3 = vmcs.get(Field::GuestCr3);
    state.cr4 = vmcs.get(Field::GuestCr4);
    if controls & entry_ctl::LOAD_DEBUG_CONTROLS != 0 {
        state.dr7 = vmcs.get(Field::GuestDr7) & 0xffff_2fff | dr::DR7_FIXED_1;
        state.msrs.debugctl = vmcs.get(Field::GuestDebugctl);
    }
    if controls & entry_ctl::LOAD_PAT != 0 {
        state.msrs.pat = vmcs.get(Field::GuestPat);
    }
    state.msrs.sysenter_cs = vmcs.get(Field::GuestSysenterCs);
    state.msrs.sysenter_esp = vmcs.get(Field::GuestSysenterEsp);
    state.msrs.sysenter_eip = vmcs.get(Field::GuestSysenterEip);
    for n in 0..6 {
        state.segments[n] = segment(vmcs, n);
    }
    state.ldtr = segment(vmcs, 6);
    state.tr = segment(vmcs, 7);
    state.gdtr = table(vmcs, Field::GuestGdtrBase, Field::GuestGdtrLimit);
    state.idtr = table(vmcs, Field::GuestIdtrBase, Field::GuestIdtrLimit);
    state.rip = vmcs.get(Field::GuestRip);
    state.gpr.set(reg::RSP, vmcs.get(Field::GuestRsp));
    state.set_rflags(vmcs.get(Field::GuestRflags));
    // In real mode the processor runs at CPL 0 whatever SS.DPL says.
    state.cpl = if new_cr0 & cr0::PE == 0 { 0 } else { state.seg(Seg::Ss).dpl() };
    if let Some(pdptes) = pdptes {
        state.pdptes = pdptes;
    }
    load_non_register_state(state, vmcs);
}

fn load_non_register_state(state: &mut CpuState, vmcs: &Vmcs) {
    state.activity = match vmcs.get32(Field::GuestActivity) {
        activity::HLT => Activity::Halted,
        activity::SHUTDOWN => Activity::Shutdown,
        activity::WAIT_FOR_SIPI => Activity::WaitForSipi,
        _ => Activity::Active,
    };
    let blocking = vmcs.get32(Field::GuestInterruptibility);
    state.shadow = if blocking & interruptibility::STI != 0 {
        Shadow::Sti
    } else if blocking & interruptibility::MOV_SS != 0 {
        Shadow::MovSs
    } else {
        Shadow::None
    };
    // With virtual NMIs this is virtual-NMI blocking, otherwise the processor's own.
    state.nmi_blocked = blocking & interruptibility::NMI != 0;
    let pending = vmcs.get(Field::GuestPendingDebug);
    state.pending_debug = 0;
    if pending & (pending_debug::ENABLED_BREAKPOINT | pending_debug::BS) != 0 {
        state.pending_debug = pending & (pending_debug::B0_B3 | pending_debug::BS);
    }
}

/// Saves the guest-state area ("Saving Guest State").
pub fn save(cpu: &Cpu, vmcs: &mut Vmcs) {
    let state = &cpu.state;
    let controls = vmcs.get32(Field::ExitControls);
    vmcs.set(Field::GuestCr0, state.cr0);
    vmcs.set(Field::GuestCr3, state.cr3);
    vmcs.set(Field::GuestCr4, state.cr4);
    if controls & exit_ctl::SAVE_DEBUG_CONTROLS != 0 {
        vmcs.set(Field::GuestDr7, state.dr7);
        vmcs.set(Field::GuestDebugctl, state.msrs.debugctl);
    }
    if controls & exit_ctl::SAVE_PAT != 0 {
        vmcs.set(Field::GuestPat, state.msrs.pat);
    }
    if controls & exit_ctl::SAVE_EFER != 0 {
        vmcs.set(Field::GuestEfer, state.efer);
    }
    vmcs.set(Field::GuestSysenterCs, state.msrs.sysenter_cs);
    vmcs.set(Field::GuestSysenterEsp, state.msrs.sysenter_esp);
    vmcs.set(Field::GuestSysenterEip, state.msrs.sysenter_eip);
    for n in 0..6 {
        set_segment(vmcs, n, &saved_segment(state, n));
    }
    set_segment(vmcs, 6, &state.ldtr);
    set_segment(vmcs, 7, &state.tr);
    vmcs.set(Field::GuestGdtrBase, state.gdtr.base);
    vmcs.set(Field::GuestGdtrLimit, u64::from(state.gdtr.limit));
    vmcs.set(Field::GuestIdtrBase, state.idtr.base);
    vmcs.set(Field::GuestIdtrLimit, u64::from(state.idtr.limit));
    vmcs.set(Field::GuestRip, state.rip);
    vmcs.set(Field::GuestRsp, state.gpr.get(reg::RSP));
    vmcs.set(Field::GuestRflags, state.rflags());
    save_non_register_state(cpu, vmcs);
}

/// SS.DPL always reads as CPL.
fn saved_segment(state: &CpuState, n: usize) -> Segment {
    let mut segment = state.segments[n];
    if n == Seg::Ss as usize {
        segment.access = segment.access & !0x60 | u32::from(state.cpl) << x86defs::segment::DPL_SHIFT;
    }
    segment
}

fn save_non_register_state(cpu: &Cpu, vmcs: &mut Vmcs) {
    let state = &cpu.state;
    let active = match state.activity {
        Activity::Active => activity::ACTIVE,
        Activity::Halted => activity::HLT,
        Activity::Shutdown => activity::SHUTDOWN,
        Activity::WaitForSipi => activity::WAIT_FOR_SIPI,
    };
    vmcs.set(Field::GuestActivity, u64::from(active));
    let shadow = match state.shadow {
        Shadow::None => 0,
        Shadow::Sti => interruptibility::STI,
        Shadow::MovSs => interruptibility::MOV_SS,
    };
    let nmi = if state.nmi_blocked { interruptibility::NMI } else { 0 };
    vmcs.set(Field::GuestInterruptibility, u64::from(shadow | nmi));
    let hits = state.pending_debug & (pending_debug::B0_B3 | pending_debug::BS);
    let enabled = if hits & pending_debug::B0_B3 != 0 { pending_debug::ENABLED_BREAKPOINT } else { 0 };
    vmcs.set(Field::GuestPendingDebug, hits | enabled);
    let entry = vmcs.get32(Field::EntryControls) & !entry_ctl::IA32E_MODE_GUEST;
    let long = if state.long_mode() { entry_ctl::IA32E_MODE_GUEST } else { 0 };
    vmcs.set(Field::EntryControls, u64::from(entry | long));
    let controls = &cpu.vmx.controls;
    if controls.has_secondary(secondary::ENABLE_EPT) {
        for (n, &pdpte) in state.pdptes.iter().enumerate() {
            vmcs.set(Field::GuestPdpte0.nth(n), pdpte);
        }
        vmcs.set(Field::EptPointer, controls.ept_pointer);
    }
    if controls.has_secondary(secondary::EPT_VIOLATION_VE) {
        vmcs.set(Field::EptpIndex, u64::from(controls.eptp_index));
    }
    if controls.has_secondary(secondary::VIRTUAL_INTERRUPT_DELIVERY) {
        vmcs.set(Field::GuestInterruptStatus, u64::from(controls.interrupt_status));
    }
}

/// True if the guest that `vmcs` describes uses PAE paging, and so PDPTE registers.
pub fn uses_pae(vmcs: &Vmcs) -> bool {
    vmcs.get(Field::GuestCr0) & cr0::PG != 0
        && vmcs.get(Field::GuestCr4) & x86defs::cr4::PAE != 0
        && vmcs.get32(Field::EntryControls) & entry_ctl::IA32E_MODE_GUEST == 0
}

/// Virtual NMIs are in use.
pub fn virtual_nmis(vmcs: &Vmcs) -> bool {
    vmcs.get32(Field::PinControls) & pin::VIRTUAL_NMIS != 0
}

/// RFLAGS in force outside the guest: only bit 1.
pub const HOST_RFLAGS: u64 = rflags::FIXED_1;
