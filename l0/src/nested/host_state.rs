//! L1's registers after a VM exit: the host-state area and its fix-ups ("Loading Host State").

use turtles_cpu::Cpu;
use turtles_cpu::state::{Activity, CpuState, Seg, Segment, Shadow, TableRegister, reg};
use vmcs_shadow::{Field, Vmcs};
use x86defs::vmx::exit_ctl;
use x86defs::{cr0, cr4, dr, efer, segment};

use super::guest_state::{HOST_RFLAGS, loaded_cr0};
use super::leave::Abort;

/// Accessed, present, code or data, granularity 4 KiB.
const CODE: u32 = 0x9b | segment::G;
const DATA: u32 = 0x93 | segment::G | segment::DB;
const BUSY_TSS: u32 = 0x8b;

/// Loads the host-state area; fails if PAE paging's PDPTEs are bad.
pub fn load(cpu: &mut Cpu, vmcs: &Vmcs) -> Result<(), Abort> {
    let controls = vmcs.get32(Field::ExitControls);
    let long = controls & exit_ctl::HOST_ADDRESS_SPACE_SIZE != 0;
    load_registers(&mut cpu.state, vmcs, controls, long);
    load_segments(&mut cpu.state, vmcs, long);
    let state = &mut cpu.state;
    state.rip = vmcs.get(Field::HostRip);
    state.gpr.set(reg::RSP, vmcs.get(Field::HostRsp));
    state.set_rflags(HOST_RFLAGS);
    state.cpl = 0;
    state.activity = Activity::Active;
    state.shadow = Shadow::None;
    state.pending_debug = 0;
    state.injected = None;
    load_pdptes(cpu)
}

fn load_registers(state: &mut CpuState, vmcs: &Vmcs, controls: u32, long: bool) {
    state.cr0 = loaded_cr0(state.cr0, vmcs.get(Field::HostCr0));
    state.cr3 = vmcs.get(Field::HostCr3);
    let pae = if long { cr4::PAE } else { 0 };
    let lost = if long { 0 } else { cr4::PCIDE };
    state.cr4 = vmcs.get(Field::HostCr4) & !lost | pae;
    state.dr7 = dr::DR7_FIXED_1;
    state.msrs.debugctl = 0;
    state.msrs.sysenter_cs = vmcs.get(Field::HostSysenterCs);
    state.msrs.sysenter_esp = vmcs.get(Field::HostSysenterEsp);
    state.msrs.sysenter_eip = vmcs.get(Field::HostSysenterEip);
    if controls & exit_ctl::LOAD_EFER != 0 {
        state.efer = vmcs.get(Field::HostEfer);
    } else {
        let both = efer::LMA | efer::LME;
        state.efer = state.efer & !both | if long { both } else { 0 };
    }
    if controls & exit_ctl::LOAD_PAT != 0 {
        state.msrs.pat = vmcs.get(Field::HostPat);
    }
}

fn load_segments(state: &mut CpuState, vmcs: &Vmcs, long: bool) {
    let base = |field: Field| vmcs.get(field);
    for seg in [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs] {
        let selector = vmcs.get(Field::HostEsSelector.nth(seg as usize)) as u16;
        let mode = if long { segment::L } else { segment::DB };
        let access = if seg == Seg::Cs { CODE | mode } else { DATA };
        let base = match seg {
            Seg::Fs => base(Field::HostFsBase),
            Seg::Gs => base(Field::HostGsBase),
            _ => 0,
        };
        let unusable = if selector & !3 == 0 && seg != Seg::Cs { segment::UNUSABLE } else { 0 };
        *state.seg_mut(seg) = Segment { selector, base, limit: !0, access: access | unusable };
    }
    state.tr = Segment {
        selector: vmcs.get(Field::HostTrSelector) as u16,
        base: base(Field::HostTrBase),
        limit: 0x67,
        access: BUSY_TSS,
    };
    state.ldtr = Segment { access: segment::UNUSABLE, ..Segment::default() };
    state.gdtr = TableRegister { base: base(Field::HostGdtrBase), limit: 0xffff };
    state.idtr = TableRegister { base: base(Field::HostIdtrBase), limit: 0xffff };
}

/// A host that uses PAE paging gets its PDPTE registers from memory.
fn load_pdptes(cpu: &mut Cpu) -> Result<(), Abort> {
    let state = &cpu.state;
    if state.cr0 & cr0::PG == 0 || state.cr4 & cr4::PAE == 0 || state.long_mode() {
        return Ok(());
    }
    let pdptes = cpu.pdptes_at(state.cr3 & 0xffff_ffff).ok_or(Abort::HostPdptes)?;
    cpu.state.pdptes = pdptes;
    Ok(())
}
