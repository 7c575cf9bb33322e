//! Ports: IN, OUT, INS and OUTS, with IOPL, the TSS's I/O permission bitmap and I/O breakpoints.

use iced_x86::{Instruction, Mnemonic, OpKind};
use x86defs::{cr4, rflags};

use super::operands::memory_segment;
use crate::Cpu;
use crate::events::is_tss32;
use crate::op::{Cold, ColdHandler};
use crate::state::{Seg, reg};
use crate::trap::{Exec, Fault, Trap};
use crate::vmx::information::address_size;
use crate::vmx::instructions::PortAccess;

/// How this family executes `insn`, if it is its own.
pub(crate) fn lower(insn: &Instruction) -> Option<ColdHandler> {
    Some(match insn.mnemonic() {
        Mnemonic::In => input,
        Mnemonic::Out => output,
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => input_string,
        // OUTSD shares its name with nothing; iced has one code for each width.
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => output_string,
        _ => return None,
    })
}

/// What a port does may change anything: all of them leave the block.
pub(crate) fn ends_block(_: &Instruction) -> bool {
    true
}

/// Elements that one execution of REP INS or OUTS moves before it lets others look at the CPU.
const MAX_BURST: u64 = 4096;

impl Cpu {
    /// #GP(0) unless the program may use `size` ports from `port`.
    fn check_port(&mut self, port: u16, size: usize) -> Exec {
        let by_iopl = !self.state.v86() && self.state.cpl <= self.state.iopl();
        if !self.state.protected() || by_iopl || self.bitmap_allows(port, size)? {
            return Ok(());
        }
        Err(self.raise(Fault::gp(0)))
    }

    fn bitmap_allows(&mut self, port: u16, size: usize) -> Exec<bool> {
        let tr = self.state.tr;
        if !is_tss32(&tr) || tr.limit < 103 {
            return Ok(false);
        }
        let map = self.read_system::<u16>(self.table_address(tr.base, 102))?;
        let at = u64::from(map) + u64::from(port / 8);
        // Two bytes are read whatever the width, so the bitmap needs a byte past its end.
        if at + 1 > u64::from(tr.limit) {
            return Ok(false);
        }
        let bits = self.read_system::<u16>(self.table_address(tr.base, at))?;
        Ok(bits >> (port & 7) & ((1 << size) - 1) == 0)
    }

    /// I/O breakpoints: they trap after the instruction.
    fn note_port_breakpoint(&mut self, port: u16, size: usize) {
        if self.state.cr4 & cr4::DE == 0 || self.state.dr7 & 0xff == 0 {
            return;
        }
        for i in 0..4 {
            let (kind, len) = self.breakpoint(i);
            if kind != 2 || self.state.dr7 & 3 << (2 * i) == 0 {
                continue;
            }
            let start = self.state.dr[i] & !(len - 1);
            let (first, last) = (u64::from(port), u64::from(port) + size as u64 - 1);
            if first < start.wrapping_add(len) && start <= last {
                self.state.pending_debug |= 1 << i;
                self.attend();
            }
        }
    }

    fn read_port(&mut self, port: u16, size: usize) -> u64 {
        let mut data = [0xff; 4];
        self.bus().port_read(port, &mut data[..size]);
        self.note_port_breakpoint(port, size);
        data[..size].iter().rev().fold(0, |v, &b| v << 8 | u64::from(b))
    }

    fn write_port(&mut self, port: u16, size: usize, value: u64) {
        self.bus().port_write(port, &value.to_le_bytes()[..size]);
        self.note_port_breakpoint(port, size);
    }
}

fn port_operand(cpu: &Cpu, insn: &Instruction, index: u32) -> u16 {
    match insn.op_kind(index) {
        OpKind::Register => cpu.state.gpr.get(reg::RDX) as u16,
        _ => u16::from(insn.immediate8()),
    }
}

fn input(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let size = cold.insn.op0_register().size();
    let port = port_operand(cpu, &cold.insn, 1);
    cpu.check_port(port, size)?;
    let immediate = cold.insn.op1_kind() != OpKind::Register;
    cpu.exit_on_port(PortAccess { port, size, input: true, immediate })?;
    let value = cpu.read_port(port, size);
    cpu.write_register(cold.insn.op0_register(), value);
    Ok(())
}

fn output(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let size = cold.insn.op1_register().size();
    let port = port_operand(cpu, &cold.insn, 0);
    cpu.check_port(port, size)?;
    let immediate = cold.insn.op0_kind() != OpKind::Register;
    cpu.exit_on_port(PortAccess { port, size, input: false, immediate })?;
    let value = cpu.read_register(cold.insn.op1_register());
    cpu.write_port(port, size, value);
    Ok(())
}

/// One string I/O instruction, taken apart.
#[derive(Clone, Copy)]
struct StringIo {
    port: u16,
    size: usize,
    repeat: bool,
    seg: Seg,
    /// Address size: mask of RSI or RDI and RCX.
    mask: u64,
    /// RSI or RDI.
    index: usize,
}

impl StringIo {
    fn of(cpu: &Cpu, insn: &Instruction) -> Self {
        let size = match insn.mnemonic() {
            Mnemonic::Insb | Mnemonic::Outsb => 1,
            Mnemonic::Insw | Mnemonic::Outsw => 2,
            _ => 4,
        };
        let memory = if insn.op0_kind() == OpKind::Register { insn.op1_kind() } else { insn.op0_kind() };
        let (index, mask) = match memory {
            OpKind::MemoryESDI => (reg::RDI, 0xffff),
            OpKind::MemoryESEDI => (reg::RDI, 0xffff_ffff),
            OpKind::MemoryESRDI => (reg::RDI, u64::MAX),
            OpKind::MemorySegSI => (reg::RSI, 0xffff),
            OpKind::MemorySegESI => (reg::RSI, 0xffff_ffff),
            _ => (reg::RSI, u64::MAX),
        };
        let seg = match index {
            reg::RDI => Seg::Es,
            _ => memory_segment(insn),
        };
        let repeat = insn.has_rep_prefix() || insn.has_repne_prefix();
        Self { port: cpu.state.gpr.get(reg::RDX) as u16, size, repeat, seg, mask, index }
    }

    fn offset(&self, cpu: &Cpu) -> u64 {
        cpu.state.gpr.get(self.index) & self.mask
    }

    /// Moves the index on and counts down; true if that was the last element.
    fn advance(&self, cpu: &mut Cpu) -> bool {
        let size = self.size as u64;
        let step = if cpu.state.system_flag(rflags::DF) { size.wrapping_neg() } else { size };
        let next = self.offset(cpu).wrapping_add(step);
        set_masked(cpu, self.index, next, self.mask);
        if !self.repeat {
            return true;
        }
        let left = (cpu.state.gpr.get(reg::RCX) & self.mask).wrapping_sub(1);
        set_masked(cpu, reg::RCX, left, self.mask);
        left & self.mask == 0
    }

    /// The VM exit, before the segment's checks.
    fn exit_if_asked(&self, cpu: &mut Cpu) -> Exec {
        let input = self.index == reg::RDI;
        let access = PortAccess { port: self.port, size: self.size, input, immediate: false };
        let linear = cpu.wrap(cpu.linear_base[self.seg as usize].wrapping_add(self.offset(cpu)));
        let bits = 64 - self.mask.leading_zeros();
        let information = address_size(bits) << 7 | (self.seg as u32) << 15;
        cpu.exit_on_string_port(access, self.repeat, linear, information)
    }

    fn run(&self, cpu: &mut Cpu, element: fn(&mut Cpu, &Self) -> Exec) -> Exec {
        // The privilege is checked even if nothing is to be moved.
        cpu.check_port(self.port, self.size)?;
        if self.repeat && cpu.state.gpr.get(reg::RCX) & self.mask == 0 {
            return Ok(());
        }
        if cpu.non_root() {
            self.exit_if_asked(cpu)?;
        }
        for _ in 0..MAX_BURST {
            element(cpu, self)?;
            if self.advance(cpu) {
                return Ok(());
            }
            if cpu.attention.get() != 0 || cpu.state.pending_debug != 0 || cpu.single_stepping() {
                break;
            }
        }
        cpu.attend();
        Err(Trap::Again)
    }
}

/// Writes the part of a register that an address size covers; 32 bits clear the rest.
fn set_masked(cpu: &mut Cpu, index: usize, value: u64, mask: u64) {
    let kept = if mask == 0xffff { cpu.state.gpr.get(index) & !mask } else { 0 };
    cpu.state.gpr.set(index, kept | value & mask);
}

fn input_string(cpu: &mut Cpu, cold: &Cold) -> Exec {
    StringIo::of(cpu, &cold.insn).run(cpu, |cpu, io| {
        let linear = cpu.linear(io.seg, io.offset(cpu), io.size, true)?;
        // The port must not be read if its value cannot be stored.
        cpu.probe_write(linear, io.size)?;
        let value = cpu.read_port(io.port, io.size);
        cpu.store_sized(linear, io.size, value)
    })
}

fn output_string(cpu: &mut Cpu, cold: &Cold) -> Exec {
    StringIo::of(cpu, &cold.insn).run(cpu, |cpu, io| {
        let linear = cpu.linear(io.seg, io.offset(cpu), io.size, false)?;
        let value = cpu.load_sized(linear, io.size)?;
        cpu.write_port(io.port, io.size, value);
        Ok(())
    })
}
