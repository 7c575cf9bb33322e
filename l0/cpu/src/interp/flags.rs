//! Instructions on RFLAGS: PUSHF and POPF, CLI and STI with their virtual forms, CLAC and STAC, LAHF and SAHF, and
//! the single-flag ones.

use iced_x86::{Instruction, Mnemonic};
use x86defs::{cr4, rflags};

use crate::Cpu;
use crate::cpuid::Feature;
use crate::events::virtual_flags;
use crate::op::{Cold, ColdHandler};
use crate::state::{Shadow, reg};
use crate::trap::{Exec, Fault};

/// How this family executes `insn`, if it is its own.
pub(crate) fn lower(insn: &Instruction) -> Option<ColdHandler> {
    Some(match insn.mnemonic() {
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => pushf,
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => popf,
        Mnemonic::Cli => cli,
        Mnemonic::Sti => sti,
        Mnemonic::Clac => clac,
        Mnemonic::Stac => stac,
        Mnemonic::Lahf => lahf,
        Mnemonic::Sahf => sahf,
        Mnemonic::Clc => clc,
        Mnemonic::Stc => stc,
        Mnemonic::Cmc => cmc,
        Mnemonic::Cld => cld,
        Mnemonic::Std => std,
        _ => return None,
    })
}

/// Only STI must be last; POPF leaves the block by itself when it has to.
pub(crate) fn ends_block(insn: &Instruction) -> bool {
    insn.mnemonic() == Mnemonic::Sti
}

/// Flags that PUSHF stores as zero.
const NEVER_PUSHED: u64 = rflags::VM | rflags::RF;
/// Flags that POPF changes at any privilege level, with any operand size.
const POPPED: u64 = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
/// Further flags of POPFD and POPFQ.
const POPPED_WIDE: u64 = rflags::AC | rflags::ID;

fn operand_size(insn: &Instruction) -> usize {
    match insn.mnemonic() {
        Mnemonic::Pushf | Mnemonic::Popf => 2,
        Mnemonic::Pushfd | Mnemonic::Popfd => 4,
        _ => 8,
    }
}

fn pushf(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let size = operand_size(&cold.insn);
    let mut flags = cpu.state.rflags() & !NEVER_PUSHED;
    if cpu.state.v86() && cpu.state.iopl() < 3 {
        if cpu.state.cr4 & cr4::VME == 0 || size != 2 {
            return Err(cpu.raise(Fault::gp(0)));
        }
        flags = virtual_flags(flags);
    }
    cpu.push_sized(size, flags)
}

fn popf(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let size = operand_size(&cold.insn);
    let wide = if size > 2 { POPPED_WIDE } else { 0 };
    let mut mask = POPPED | wide;
    if cpu.state.v86() && cpu.state.iopl() < 3 {
        if cpu.state.cr4 & cr4::VME == 0 || size != 2 {
            return Err(cpu.raise(Fault::gp(0)));
        }
        return popf_virtual(cpu);
    }
    if cpu.state.cpl <= cpu.state.iopl() {
        mask |= rflags::IF;
    }
    if cpu.state.cpl == 0 {
        mask |= rflags::IOPL;
    }
    let value = cpu.pop_sized(size)?;
    change(cpu, value, mask | rflags::RF);
    Ok(())
}

/// Sets the flags in `mask` from `value` (RF: cleared) and has consequences looked at.
fn change(cpu: &mut Cpu, value: u64, mask: u64) {
    let old = cpu.state.rflags();
    let new = (old & !mask | value & mask) & !rflags::RF;
    cpu.state.set_rflags(new);
    let changed = old ^ new;
    if changed & rflags::AC != 0 {
        cpu.refresh_mode();
    }
    let watched = rflags::IF | rflags::TF | rflags::VIF | rflags::AC | rflags::RF;
    if changed & watched != 0 || new & rflags::TF != 0 {
        cpu.attend();
        cpu.leave_block();
    }
}

fn popf_virtual(cpu: &mut Cpu) -> Exec {
    let rsp = cpu.state.gpr.get(reg::RSP);
    let value = cpu.pop_sized(2)?;
    let pending = value & rflags::IF != 0 && cpu.state.system_flag(rflags::VIP);
    if pending || value & rflags::TF != 0 {
        cpu.state.gpr.set(reg::RSP, rsp);
        return Err(cpu.raise(Fault::gp(0)));
    }
    let vif = if value & rflags::IF != 0 { rflags::VIF } else { 0 };
    change(cpu, value & !rflags::VIF | vif, POPPED & !rflags::TF | rflags::VIF);
    Ok(())
}

/// Which flag CLI and STI act on: IF, or VIF where virtual interrupts are on.
fn interrupt_flag(cpu: &mut Cpu) -> Exec<u64> {
    if cpu.state.cpl <= cpu.state.iopl() {
        return Ok(rflags::IF);
    }
    let virtual_on = if cpu.state.v86() { cr4::VME } else { cr4::PVI };
    if cpu.state.cr4 & virtual_on != 0 && cpu.state.cpl == 3 {
        return Ok(rflags::VIF);
    }
    Err(cpu.raise(Fault::gp(0)))
}

fn cli(cpu: &mut Cpu, _: &Cold) -> Exec {
    let flag = interrupt_flag(cpu)?;
    let flags = cpu.state.rflags();
    cpu.state.set_rflags(flags & !flag);
    Ok(())
}

fn sti(cpu: &mut Cpu, _: &Cold) -> Exec {
    let flag = interrupt_flag(cpu)?;
    if flag == rflags::VIF && cpu.state.system_flag(rflags::VIP) {
        return Err(cpu.raise(Fault::gp(0)));
    }
    let flags = cpu.state.rflags();
    if flag == rflags::IF && flags & rflags::IF == 0 {
        cpu.state.shadow = Shadow::Sti;
        cpu.attend();
    }
    cpu.state.set_rflags(flags | flag);
    Ok(())
}

fn set_ac(cpu: &mut Cpu, on: bool) -> Exec {
    if !cpu.model.has(Feature::Smap) || cpu.state.cpl != 0 {
        return Err(cpu.raise(Fault::ud()));
    }
    let flags = cpu.state.rflags() & !rflags::AC;
    cpu.state.set_rflags(if on { flags | rflags::AC } else { flags });
    cpu.refresh_mode();
    Ok(())
}

fn clac(cpu: &mut Cpu, _: &Cold) -> Exec {
    set_ac(cpu, false)
}

fn stac(cpu: &mut Cpu, _: &Cold) -> Exec {
    set_ac(cpu, true)
}

fn check_lahf(cpu: &mut Cpu) -> Exec {
    if cpu.code_bits == 64 { cpu.require(Feature::LahfLm) } else { Ok(()) }
}

fn lahf(cpu: &mut Cpu, _: &Cold) -> Exec {
    check_lahf(cpu)?;
    let rax = cpu.state.gpr.get(reg::RAX) & !0xff00;
    cpu.state.gpr.set(reg::RAX, rax | (cpu.state.rflags() & 0xff) << 8);
    Ok(())
}

fn sahf(cpu: &mut Cpu, _: &Cold) -> Exec {
    check_lahf(cpu)?;
    let ah = cpu.state.gpr.get(reg::RAX) >> 8 & 0xff;
    let keep = cpu.state.rflags() & rflags::OF;
    cpu.state.set_status(ah | keep);
    Ok(())
}

fn clc(cpu: &mut Cpu, _: &Cold) -> Exec {
    let flags = cpu.state.rflags();
    cpu.state.set_status(flags & !rflags::CF);
    Ok(())
}

fn stc(cpu: &mut Cpu, _: &Cold) -> Exec {
    let flags = cpu.state.rflags();
    cpu.state.set_status(flags | rflags::CF);
    Ok(())
}

fn cmc(cpu: &mut Cpu, _: &Cold) -> Exec {
    let flags = cpu.state.rflags();
    cpu.state.set_status(flags ^ rflags::CF);
    Ok(())
}

fn cld(cpu: &mut Cpu, _: &Cold) -> Exec {
    let flags = cpu.state.rflags();
    cpu.state.set_rflags(flags & !rflags::DF);
    Ok(())
}

fn std(cpu: &mut Cpu, _: &Cold) -> Exec {
    let flags = cpu.state.rflags();
    cpu.state.set_rflags(flags | rflags::DF);
    Ok(())
}
