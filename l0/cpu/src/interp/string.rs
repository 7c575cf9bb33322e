//! MOVS, STOS, LODS, CMPS, SCAS with their repeat prefixes.
//!
//! A repeated instruction works in pieces: after each piece all registers are up to date, so a fault, an interrupt
//! or the end of a time slice leaves it restartable exactly where it is. Forward MOVS and STOS within pages of
//! plain RAM run as host copies.
//!
//! Unsafe island (`copy_run`, `fill_run`): host pointers from the TLB's fast path.

use iced_x86::{Instruction, Mnemonic};
use x86defs::rflags;

use super::host::{Int, ZF};
use super::operands::memory_segment;
use crate::Cpu;
use crate::op::{Handler, Op};
use crate::phys::Word;
use crate::state::{Seg, reg};
use crate::trap::{Exec, Trap};

/// Elements a repeated instruction handles before it looks at the attention word.
const ELEMENTS_PER_PIECE: u64 = 4096;

/// `op.extra`: no prefix, REP/REPE, REPNE.
const REPE: u8 = 1;
const REPNE: u8 = 2;

impl Cpu {
    fn address_mask(op: &Op) -> u64 {
        match op.address_bits {
            16 => 0xffff,
            32 => 0xffff_ffff,
            _ => u64::MAX,
        }
    }

    /// Writes an index or count register with the address size's rules.
    fn set_indexed(&mut self, register: usize, value: u64, op: &Op) {
        match op.address_bits {
            16 => self.set_reg(register as u8 * 8, value as u16),
            32 => self.set_reg(register as u8 * 8, value as u32),
            _ => self.set_reg(register as u8 * 8, value),
        }
    }

    fn advance(&mut self, register: usize, by: u64, op: &Op) {
        let value = self.state.gpr.get(register).wrapping_add(by);
        self.set_indexed(register, value & Self::address_mask(op), op);
    }

    fn string_step<T: Word>(&self) -> u64 {
        let size = T::SIZE as u64;
        if self.state.system_flag(rflags::DF) { size.wrapping_neg() } else { size }
    }
}

/// Runs `body` as often as the prefix says. `body` handles up to the given number of elements at once and says
/// how many it did, and whether a comparison ended the repetition.
#[inline(always)]
fn repeat(cpu: &mut Cpu, op: &Op, mut body: impl FnMut(&mut Cpu, u64) -> Exec<(u64, bool)>) -> Exec {
    if op.extra == 0 {
        return body(cpu, 1).map(drop);
    }
    let mask = Cpu::address_mask(op);
    let mut left = cpu.state.gpr.get(reg::RCX) & mask;
    if left == 0 {
        // ECX is written back (its upper half cleared) even when nothing is done.
        if op.address_bits == 32 && cpu.code_bits == 64 {
            cpu.set_indexed(reg::RCX, 0, op);
        }
        return Ok(());
    }
    let mut piece = if cpu.single_stepping() { 1 } else { ELEMENTS_PER_PIECE };
    loop {
        let (done, ended) = body(cpu, left.min(piece))?;
        left = left.wrapping_sub(done);
        cpu.set_indexed(reg::RCX, left, op);
        if ended || left == 0 {
            return Ok(());
        }
        piece = piece.saturating_sub(done);
        if piece == 0 || cpu.block_end == 0 {
            return Err(Trap::Again);
        }
    }
}

fn movs<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let source = super::address::seg_of(op);
    let step = cpu.string_step::<T>();
    repeat(cpu, op, |cpu, most| {
        let mask = Cpu::address_mask(op);
        let (si, di) = (cpu.state.gpr.get(reg::RSI) & mask, cpu.state.gpr.get(reg::RDI) & mask);
        let run = if most > 1 && step == T::SIZE as u64 {
            copy_run::<T>(cpu, source, si, di, most, mask)
        } else {
            0
        };
        let done = if run > 0 {
            run
        } else {
            let value = cpu.load_at::<T>(source, si)?;
            cpu.store_at::<T>(Seg::Es, di, value)?;
            1
        };
        cpu.advance(reg::RSI, step.wrapping_mul(done), op);
        cpu.advance(reg::RDI, step.wrapping_mul(done), op);
        Ok((done, false))
    })
}

/// Copies as many elements as lie in one source and one destination page of plain RAM; 0 if the careful way is
/// needed.
fn copy_run<T: Int>(cpu: &mut Cpu, source: Seg, si: u64, di: u64, most: u64, mask: u64) -> u64 {
    // The source's pointer stays good when the destination takes its place in the TLB.
    let Some((from, from_room)) = run_pointer(cpu, source, si, mask, false) else { return 0 };
    let Some((to, to_room)) = run_pointer(cpu, Seg::Es, di, mask, true) else { return 0 };
    let size = T::SIZE as u64;
    let count = most.min(from_room / size).min(to_room / size);
    let bytes = (count * size) as usize;
    // A destination that starts inside the source makes a repeating pattern: that needs element order.
    let distance = (to as usize).wrapping_sub(from as usize);
    if count == 0 || distance < bytes {
        return 0;
    }
    // SAFETY: both pointers name `bytes` bytes inside one page of guest RAM each, the source readable and the
    // destination writable by the present privilege.
    unsafe { host_copy(from, to, bytes) };
    count
}

/// REP MOVSB on the host: forward, as the guest asked for.
///
/// # Safety
/// `from` must be readable and `to` writable for `bytes` bytes of guest RAM.
unsafe fn host_copy(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: the caller's promise; the direction flag is clear in Rust code.
    unsafe {
        std::arch::asm!("rep movsb", inout("rcx") bytes => _, inout("rsi") from => _, inout("rdi") to => _,
            options(nostack, preserves_flags));
    }
}

/// Host pointer to `seg:offset` and the bytes left in its page (and, outside 64-bit mode, in the segment), if the
/// TLB's fast path would take the access.
fn run_pointer(cpu: &mut Cpu, seg: Seg, offset: u64, mask: u64, write: bool) -> Option<(*mut u8, u64)> {
    let mut room = 4096 - (offset & 4095);
    if cpu.code_bits != 64 {
        let register = cpu.state.seg(seg);
        let usable = register.access & (x86defs::segment::UNUSABLE | x86defs::segment::CODE) == 0
            && register.access & x86defs::segment::EXPAND_DOWN == 0
            && (!write || register.access & x86defs::segment::WRITABLE != 0);
        let last = u64::from(register.limit).min(mask);
        if !usable || offset > last {
            return None;
        }
        room = room.min(last - offset + 1);
    }
    let linear = cpu.wrap(cpu.linear_base[seg as usize].wrapping_add(offset));
    room = room.min(4096 - (linear & 4095)).min((mask - offset).saturating_add(1));
    let found = |cpu: &Cpu| {
        if write { cpu.fast_write_pointer(linear, 1) } else { cpu.fast_read_pointer(linear) }
    };
    if found(cpu).is_none() {
        // A fault is raised by the careful way, which comes next.
        let probed = if write { cpu.probe_write(linear, 1) } else { cpu.probe_read(linear, 1) };
        probed.ok()?;
    }
    Some((found(cpu)?, room))
}

fn stos<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let step = cpu.string_step::<T>();
    let value = cpu.reg::<T>(0);
    repeat(cpu, op, |cpu, most| {
        let mask = Cpu::address_mask(op);
        let di = cpu.state.gpr.get(reg::RDI) & mask;
        let run =
            if most > 1 && step == T::SIZE as u64 { fill_run::<T>(cpu, di, most, mask, value) } else { 0 };
        let done = if run > 0 {
            run
        } else {
            cpu.store_at::<T>(Seg::Es, di, value)?;
            1
        };
        cpu.advance(reg::RDI, step.wrapping_mul(done), op);
        Ok((done, false))
    })
}

fn fill_run<T: Int>(cpu: &mut Cpu, di: u64, most: u64, mask: u64, value: T) -> u64 {
    let Some((to, room)) = run_pointer(cpu, Seg::Es, di, mask, true) else { return 0 };
    let count = most.min(room / T::SIZE as u64);
    for i in 0..count as usize {
        // SAFETY: `count` elements fit in the rest of the page of guest RAM, writable by the present privilege.
        unsafe { T::store(to.add(i * T::SIZE), value) };
    }
    count
}

fn lods<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let source = super::address::seg_of(op);
    let step = cpu.string_step::<T>();
    repeat(cpu, op, |cpu, _| {
        let si = cpu.state.gpr.get(reg::RSI) & Cpu::address_mask(op);
        let value = cpu.load_at::<T>(source, si)?;
        cpu.set_reg(0, value);
        cpu.advance(reg::RSI, step, op);
        Ok((1, false))
    })
}

/// Whether a comparison ends the repetition.
fn ends(cpu: &Cpu, op: &Op) -> bool {
    let equal = cpu.state.status & ZF != 0;
    match op.extra {
        REPE => !equal,
        REPNE => equal,
        _ => true,
    }
}

fn cmps<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let source = super::address::seg_of(op);
    let step = cpu.string_step::<T>();
    repeat(cpu, op, |cpu, _| {
        let mask = Cpu::address_mask(op);
        let (si, di) = (cpu.state.gpr.get(reg::RSI) & mask, cpu.state.gpr.get(reg::RDI) & mask);
        let a = cpu.load_at::<T>(source, si)?;
        let b = cpu.load_at::<T>(Seg::Es, di)?;
        T::sub(&mut cpu.state.status, a, b);
        cpu.advance(reg::RSI, step, op);
        cpu.advance(reg::RDI, step, op);
        Ok((1, ends(cpu, op)))
    })
}

fn scas<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let step = cpu.string_step::<T>();
    repeat(cpu, op, |cpu, _| {
        let di = cpu.state.gpr.get(reg::RDI) & Cpu::address_mask(op);
        let b = cpu.load_at::<T>(Seg::Es, di)?;
        let a = cpu.reg::<T>(0);
        T::sub(&mut cpu.state.status, a, b);
        cpu.advance(reg::RDI, step, op);
        Ok((1, ends(cpu, op)))
    })
}

macro_rules! four {
    ($f:ident, $bits:expr) => {
        match $bits {
            1 => $f::<u8>,
            2 => $f::<u16>,
            4 => $f::<u32>,
            _ => $f::<u64>,
        }
    };
}

/// Handler for an instruction of this family.
pub(crate) fn lower(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    if !insn.is_string_instruction() {
        return None;
    }
    let size = insn.memory_size().size();
    op.extra = if insn.has_repne_prefix() {
        REPNE
    } else if insn.has_rep_prefix() {
        REPE
    } else {
        0
    };
    op.seg = memory_segment(insn) as u8;
    op.address_bits = index_bits(insn);
    Some(match insn.mnemonic() {
        Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => four!(movs, size),
        Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => four!(stos, size),
        Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => four!(lods, size),
        Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq => four!(cmps, size),
        Mnemonic::Scasb | Mnemonic::Scasw | Mnemonic::Scasd | Mnemonic::Scasq => four!(scas, size),
        _ => return None,
    })
}

/// Address size in bits of a string instruction.
pub(crate) fn index_bits(insn: &Instruction) -> u8 {
    use iced_x86::OpKind::*;
    for i in 0..insn.op_count() {
        match insn.op_kind(i) {
            MemorySegSI | MemorySegDI | MemoryESDI => return 16,
            MemorySegESI | MemorySegEDI | MemoryESEDI => return 32,
            MemorySegRSI | MemorySegRDI | MemoryESRDI => return 64,
            _ => {}
        }
    }
    64
}
