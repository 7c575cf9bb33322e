//! Entries to the operating system: SYSCALL, SYSENTER and their returns, software interrupts, BOUND and UD.

use iced_x86::{Code, Instruction, Mnemonic};
use x86defs::segment::{self, SELECTOR_RPL};
use x86defs::{efer, rflags, vector};

use crate::Cpu;
use crate::cpuid::Feature;
use crate::op::{Cold, ColdHandler};
use crate::state::{Event, EventKind, Seg, Segment, reg};
use crate::trap::{Exec, Fault};

/// How this family executes `insn`, if it is its own.
pub(crate) fn lower(insn: &Instruction) -> Option<ColdHandler> {
    Some(match insn.mnemonic() {
        Mnemonic::Syscall => syscall,
        Mnemonic::Sysret | Mnemonic::Sysretq => sysret,
        Mnemonic::Sysenter => sysenter,
        Mnemonic::Sysexit | Mnemonic::Sysexitq => sysexit,
        Mnemonic::Int => int_n,
        Mnemonic::Int3 => int3,
        Mnemonic::Int1 => int1,
        Mnemonic::Into => into,
        Mnemonic::Bound => bound,
        Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => undefined,
        _ => return None,
    })
}

/// All but BOUND leave the block.
pub(crate) fn ends_block(insn: &Instruction) -> bool {
    insn.mnemonic() != Mnemonic::Bound
}

/// Flat code: type execute/read, accessed, present; with G and a limit of 4 GiB.
const FLAT_CODE: u32 = 0x9b | segment::G;
/// Flat data: read/write, accessed, present, 32-bit.
const FLAT_DATA: u32 = 0x93 | segment::G | segment::DB;
/// Flags that SYSRET takes from R11.
const SYSRET_FLAGS: u64 = 0x003c_7fd7;

impl Cpu {
    /// Loads CS and SS with the fixed flat segments of fast system calls.
    fn load_flat(&mut self, cs: u16, ss: u16, cpl: u8, code64: bool) {
        let dpl = u32::from(cpl) << segment::DPL_SHIFT;
        let size = if code64 { segment::L } else { segment::DB };
        let ring = u16::from(cpl);
        *self.state.seg_mut(Seg::Cs) = Segment {
            base: 0,
            limit: u32::MAX,
            access: FLAT_CODE | size | dpl,
            selector: cs & !SELECTOR_RPL | ring,
        };
        *self.state.seg_mut(Seg::Ss) = Segment {
            base: 0,
            limit: u32::MAX,
            access: FLAT_DATA | dpl,
            selector: ss & !SELECTOR_RPL | ring,
        };
        self.state.cpl = cpl;
    }
}

fn syscall(cpu: &mut Cpu, _: &Cold) -> Exec {
    if cpu.code_bits != 64 || cpu.state.efer & efer::SCE == 0 {
        return Err(cpu.raise(Fault::ud()));
    }
    let flags = cpu.state.rflags() & !rflags::RF;
    cpu.state.gpr.set(reg::RCX, cpu.state.rip);
    cpu.state.gpr.set(11, flags);
    let selector = (cpu.state.msrs.star >> 32) as u16;
    cpu.load_flat(selector, selector.wrapping_add(8), 0, true);
    // CS is STAR[47:32] with RPL 0; SS is STAR[47:32] + 8 as it is.
    cpu.state.seg_mut(Seg::Ss).selector = selector.wrapping_add(8);
    cpu.state.rip = cpu.state.msrs.lstar;
    cpu.state.set_rflags(flags & !cpu.state.msrs.fmask);
    // With TF masked there is no trap in the handler.
    cpu.step_trap &= cpu.state.system_flag(rflags::TF);
    cpu.refresh_mode();
    Ok(())
}

fn sysret(cpu: &mut Cpu, cold: &Cold) -> Exec {
    if cpu.code_bits != 64 || cpu.state.efer & efer::SCE == 0 {
        return Err(cpu.raise(Fault::ud()));
    }
    cpu.require_cpl0()?;
    let wide = cold.insn.code() == Code::Sysretq;
    let rcx = cpu.state.gpr.get(reg::RCX);
    if wide && !cpu.is_canonical(rcx) {
        return Err(cpu.raise(Fault::gp(0)));
    }
    let selector = (cpu.state.msrs.star >> 48) as u16;
    let cs = if wide { selector.wrapping_add(16) } else { selector };
    cpu.load_flat(cs, selector.wrapping_add(8), 3, wide);
    cpu.state.rip = if wide { rcx } else { rcx & 0xffff_ffff };
    let flags = cpu.state.gpr.get(11) & SYSRET_FLAGS;
    cpu.state.set_rflags(flags);
    cpu.refresh_mode();
    cpu.attend();
    Ok(())
}

fn sysenter(cpu: &mut Cpu, _: &Cold) -> Exec {
    cpu.require(Feature::Sep)?;
    let selector = cpu.state.msrs.sysenter_cs as u16;
    if !cpu.state.protected() || selector & !SELECTOR_RPL == 0 {
        return Err(cpu.raise(Fault::gp(0)));
    }
    let long = cpu.state.long_mode();
    let flags = cpu.state.rflags() & !(rflags::VM | rflags::IF | rflags::RF);
    cpu.state.set_rflags(flags);
    cpu.load_flat(selector, (selector & !SELECTOR_RPL).wrapping_add(8), 0, long);
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.state.gpr.set(reg::RSP, cpu.state.msrs.sysenter_esp & mask);
    cpu.state.rip = cpu.state.msrs.sysenter_eip & mask;
    cpu.refresh_mode();
    Ok(())
}

fn sysexit(cpu: &mut Cpu, cold: &Cold) -> Exec {
    cpu.require(Feature::Sep)?;
    let selector = cpu.state.msrs.sysenter_cs as u16 & !SELECTOR_RPL;
    if !cpu.state.protected() || selector == 0 || cpu.state.cpl != 0 {
        return Err(cpu.raise(Fault::gp(0)));
    }
    let wide = cold.insn.code() == Code::Sysexitq;
    let (rsp, rip) = (cpu.state.gpr.get(reg::RCX), cpu.state.gpr.get(reg::RDX));
    if wide && !(cpu.is_canonical(rsp) && cpu.is_canonical(rip)) {
        return Err(cpu.raise(Fault::gp(0)));
    }
    let step = if wide { 32 } else { 16 };
    cpu.load_flat(selector.wrapping_add(step), selector.wrapping_add(step + 8), 3, wide);
    let mask = if wide { u64::MAX } else { 0xffff_ffff };
    cpu.state.gpr.set(reg::RSP, rsp & mask);
    cpu.state.rip = rip & mask;
    cpu.refresh_mode();
    Ok(())
}

fn software_event(cpu: &mut Cpu, cold: &Cold, vector: u8, kind: EventKind) -> Exec {
    cpu.exit_on_software_exception(vector, kind)?;
    let instruction_length = cold.insn.len() as u8;
    cpu.deliver(Event { vector, kind, error_code: None, instruction_length })?;
    // The gate has cleared TF: the handler's first instruction is not preceded by a single-step trap.
    cpu.step_trap = false;
    Ok(())
}

fn int_n(cpu: &mut Cpu, cold: &Cold) -> Exec {
    software_event(cpu, cold, cold.insn.immediate8(), EventKind::SoftwareInterrupt)
}

fn int3(cpu: &mut Cpu, cold: &Cold) -> Exec {
    software_event(cpu, cold, vector::BP, EventKind::SoftwareException)
}

fn into(cpu: &mut Cpu, cold: &Cold) -> Exec {
    if cpu.state.rflags() & rflags::OF == 0 {
        return Ok(());
    }
    software_event(cpu, cold, vector::OF, EventKind::SoftwareException)
}

fn int1(cpu: &mut Cpu, cold: &Cold) -> Exec {
    software_event(cpu, cold, vector::DB, EventKind::PrivilegedSoftwareException)
}

fn bound(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let size = cold.insn.op0_register().size();
    let linear = cpu.operand_linear(&cold.insn, 2 * size, false)?;
    let low = cpu.load_sized(linear, size)?;
    let high = cpu.load_sized(cpu.wrap(linear.wrapping_add(size as u64)), size)?;
    let index = cpu.read_register(cold.insn.op0_register());
    let signed = |v: u64| if size == 2 { i64::from(v as i16) } else { i64::from(v as i32) };
    if signed(index) < signed(low) || signed(index) > signed(high) {
        return Err(cpu.raise(Fault::plain(vector::BR)));
    }
    Ok(())
}

/// UD0 and UD1 have operands that are never read.
fn undefined(cpu: &mut Cpu, _: &Cold) -> Exec {
    Err(cpu.raise(Fault::ud()))
}
