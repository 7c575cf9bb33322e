//! ADD OR ADC SBB AND SUB XOR CMP TEST, INC DEC NEG NOT, XADD, CMPXCHG, XCHG: everything that combines two
//! operands of one width, in every shape, with and without LOCK.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::address::{Addressing, Checked, Flat};
use super::host::{Int, Status};
use super::operands::offset_of;
use crate::Cpu;
use crate::mmu::Place;
use crate::mmu::walk::{Access, Privilege};
use crate::op::{Handler, Op};
use crate::trap::Exec;

/// A two-operand operation.
pub(crate) trait Binary: 'static {
    /// CMP and TEST only set flags.
    const WRITES: bool = true;
    fn run<T: Int>(s: &mut Status, a: T, b: T) -> T;
}

macro_rules! binary {
    ($($name:ident $f:ident $writes:literal),+) => {$(
        pub(crate) struct $name;
        impl Binary for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn run<T: Int>(s: &mut Status, a: T, b: T) -> T {
                T::$f(s, a, b)
            }
        }
    )+};
}
binary!(Add add true, Or or true, Adc adc true, Sbb sbb true, And and true, Sub sub true, Xor xor true,
    Cmp sub false, Test and false);

fn reg_reg<O: Binary, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (a, b) = (cpu.reg::<T>(op.dst), cpu.reg::<T>(op.src));
    let r = O::run(&mut cpu.state.status, a, b);
    if O::WRITES {
        cpu.set_reg(op.dst, r);
    }
    Ok(())
}

fn reg_imm<O: Binary, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let a = cpu.reg::<T>(op.dst);
    let r = O::run(&mut cpu.state.status, a, T::from_u64(op.imm));
    if O::WRITES {
        cpu.set_reg(op.dst, r);
    }
    Ok(())
}

fn reg_mem<O: Binary, T: Int, A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = A::linear(cpu, op, T::SIZE, false)?;
    let b = cpu.load::<T>(linear)?;
    let a = cpu.reg::<T>(op.dst);
    let r = O::run(&mut cpu.state.status, a, b);
    if O::WRITES {
        cpu.set_reg(op.dst, r);
    }
    Ok(())
}

fn mem_reg<O: Binary, T: Int, A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = cpu.reg::<T>(op.src);
    mem_value::<O, T, A>(cpu, op, b)
}

fn mem_imm<O: Binary, T: Int, A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    mem_value::<O, T, A>(cpu, op, T::from_u64(op.imm))
}

#[inline(always)]
fn mem_value<O: Binary, T: Int, A: Addressing>(cpu: &mut Cpu, op: &Op, b: T) -> Exec {
    let linear = A::linear(cpu, op, T::SIZE, O::WRITES)?;
    if O::WRITES {
        return cpu.modify::<T>(linear, |s, a| O::run(s, a, b));
    }
    let a = cpu.load::<T>(linear)?;
    O::run(&mut cpu.state.status, a, b);
    Ok(())
}

fn locked_reg<O: Binary, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = cpu.reg::<T>(op.src);
    let linear = Checked::linear(cpu, op, T::SIZE, true)?;
    cpu.locked::<T>(linear, |s, a| O::run(s, a, b))
}

fn locked_imm<O: Binary, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = Checked::linear(cpu, op, T::SIZE, true)?;
    cpu.locked::<T>(linear, |s, a| O::run(s, a, T::from_u64(op.imm)))
}

/// A one-operand operation.
trait Unary: 'static {
    fn run<T: Int>(s: &mut Status, a: T) -> T;
}

macro_rules! unary {
    ($($name:ident |$s:ident, $a:ident| $e:expr),+) => {$(
        struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn run<T: Int>($s: &mut Status, $a: T) -> T {
                $e
            }
        }
    )+};
}
unary!(
    Inc | s,
    a | T::inc(s, a),
    Dec | s,
    a | T::dec(s, a),
    Neg | s,
    a | T::neg(s, a),
    Not | _s,
    a | T::not(a)
);

fn unary_reg<O: Unary, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let a = cpu.reg::<T>(op.dst);
    let r = O::run(&mut cpu.state.status, a);
    cpu.set_reg(op.dst, r);
    Ok(())
}

fn unary_mem<O: Unary, T: Int, A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = A::linear(cpu, op, T::SIZE, true)?;
    cpu.modify::<T>(linear, |s, a| O::run(s, a))
}

fn unary_locked<O: Unary, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = Checked::linear(cpu, op, T::SIZE, true)?;
    cpu.locked::<T>(linear, |s, a| O::run(s, a))
}

fn xchg_reg<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (a, b) = (cpu.reg::<T>(op.dst), cpu.reg::<T>(op.src));
    cpu.set_reg(op.dst, b);
    cpu.set_reg(op.src, a);
    Ok(())
}

/// XCHG with memory is locked with or without the prefix.
fn xchg_mem<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = Checked::linear(cpu, op, T::SIZE, true)?;
    let b = cpu.reg::<T>(op.src);
    let mut old = b;
    cpu.locked::<T>(linear, |_, a| {
        old = a;
        b
    })?;
    cpu.set_reg(op.src, old);
    Ok(())
}

fn xadd_reg<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (a, b) = (cpu.reg::<T>(op.dst), cpu.reg::<T>(op.src));
    let sum = T::add(&mut cpu.state.status, a, b);
    cpu.set_reg(op.src, a);
    cpu.set_reg(op.dst, sum);
    Ok(())
}

fn xadd_mem<T: Int, const LOCK: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = Checked::linear(cpu, op, T::SIZE, true)?;
    let b = cpu.reg::<T>(op.src);
    let mut old = b;
    let add = |s: &mut Status, a: T| {
        old = a;
        T::add(s, a, b)
    };
    if LOCK {
        cpu.locked::<T>(linear, add)?
    } else {
        cpu.modify::<T>(linear, add)?
    }
    cpu.set_reg(op.src, old);
    Ok(())
}

fn cmpxchg_reg<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (old, accumulator) = (cpu.reg::<T>(op.dst), cpu.reg::<T>(0));
    T::sub(&mut cpu.state.status, accumulator, old);
    if old == accumulator {
        let new = cpu.reg::<T>(op.src);
        cpu.set_reg(op.dst, new);
    } else {
        // The destination is left alone: the upper half of a 32-bit one stays.
        cpu.set_reg(0, old);
    }
    Ok(())
}

fn cmpxchg_mem<T: Int, const LOCK: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = Checked::linear(cpu, op, T::SIZE, true)?;
    let (accumulator, new) = (cpu.reg::<T>(0), cpu.reg::<T>(op.src));
    let mut seen = accumulator;
    // The destination is written in either case, as the processor does.
    let exchange = |s: &mut Status, old: T| {
        T::sub(s, accumulator, old);
        seen = old;
        if old == accumulator { new } else { old }
    };
    if LOCK {
        cpu.locked::<T>(linear, exchange)?
    } else {
        cpu.modify::<T>(linear, exchange)?
    }
    if seen != accumulator {
        cpu.set_reg(0, seen);
    }
    Ok(())
}

impl Cpu {
    /// An atomic read-modify-write: `f` may run several times.
    ///
    /// DEVIATION: across a page boundary, the access is atomic only among its like (they take one lock); outside RAM
    /// it is not atomic.
    pub(crate) fn locked<T: Int>(&mut self, linear: u64, mut f: impl FnMut(&mut Status, T) -> T) -> Exec {
        let (at, physical) = match self.locked_place(linear, T::SIZE)? {
            Some(place) => place,
            None => {
                let memory = std::sync::Arc::clone(&self.memory);
                let _alone = memory.split_lock();
                return self.modify::<T>(linear, f);
            }
        };
        loop {
            let mut status = self.state.status;
            // SAFETY: `at` names `SIZE` bytes of guest RAM in one page, writable by the present privilege.
            let done = unsafe {
                let old = T::load(at);
                let new = f(&mut status, old);
                T::lock_exchange(at, old, new)
            };
            if done {
                self.state.status = status;
                break;
            }
        }
        self.wrote_locked(linear, T::SIZE, physical);
        Ok(())
    }

    /// Host pointer for an atomic access to `size` bytes, with the guest-physical address where the write must be
    /// told of ([`Cpu::wrote_locked`]); none where no single host access does it. Raises the write's faults.
    fn locked_place(&mut self, linear: u64, size: usize) -> Exec<Option<(*mut u8, Option<u64>)>> {
        if let Some(at) = self.fast_write_pointer(linear, size) {
            return Ok(Some((at, None)));
        }
        self.check_address(linear, size)?;
        if self.privilege() == Privilege::User {
            self.check_alignment(linear, size)?;
        }
        self.probe_write(linear, size)?;
        if (linear & 4095) as usize + size > 4096 {
            return Ok(None);
        }
        Ok(match self.place(linear, size, Access::Write, self.privilege())? {
            Place::Ram(physical, at) => Some((at, Some(physical))),
            Place::Mmio(_) | Place::Apic(_) => None,
        })
    }

    /// What follows a write that did not take the fast path.
    fn wrote_locked(&mut self, linear: u64, size: usize, physical: Option<u64>) {
        if let Some(physical) = physical {
            self.wrote_ram(physical, size as u64);
            self.note_data_breakpoint(linear, size, true);
        }
    }

    /// CMPXCHG16B's memory side: if the 16 bytes at `linear` (aligned) are `expected`, they become `new`; returns
    /// what was there. Outside RAM the access is two of eight bytes.
    pub(crate) fn exchange16(&mut self, linear: u64, expected: u128, new: u128) -> Exec<u128> {
        if let Some((at, physical)) = self.locked_place(linear, 16)? {
            // SAFETY: `at` names 16 aligned bytes of guest RAM in one page, writable by the present privilege.
            let seen = unsafe { super::host::lock_exchange16(at, expected, new) };
            self.wrote_locked(linear, 16, physical);
            return Ok(seen);
        }
        let low = u128::from(self.load::<u64>(linear)?);
        let seen = low | u128::from(self.load::<u64>(linear.wrapping_add(8))?) << 64;
        let result = if seen == expected { new } else { seen };
        self.store(linear, result as u64)?;
        self.store(linear.wrapping_add(8), (result >> 64) as u64)?;
        Ok(seen)
    }
}

/// Picks a handler by width.
macro_rules! by_width {
    ($bits:expr, $f:ident $(, $extra:ty)*) => {
        match $bits {
            8 => $f::<$($extra,)* u8>,
            16 => $f::<$($extra,)* u16>,
            32 => $f::<$($extra,)* u32>,
            _ => $f::<$($extra,)* u64>,
        }
    };
    ($bits:expr, $f:ident $(, $extra:ty)*; addressing $flat:expr) => {
        match ($bits, $flat) {
            (8, true) => $f::<$($extra,)* u8, Flat>,
            (16, true) => $f::<$($extra,)* u16, Flat>,
            (32, true) => $f::<$($extra,)* u32, Flat>,
            (_, true) => $f::<$($extra,)* u64, Flat>,
            (8, false) => $f::<$($extra,)* u8, Checked>,
            (16, false) => $f::<$($extra,)* u16, Checked>,
            (32, false) => $f::<$($extra,)* u32, Checked>,
            (_, false) => $f::<$($extra,)* u64, Checked>,
        }
    };
}
pub(crate) use by_width;

/// Width in bits of operand `index`, a register or memory.
pub(crate) fn width(insn: &Instruction, index: u32) -> usize {
    match insn.op_kind(index) {
        OpKind::Register => insn.op_register(index).size() * 8,
        _ => insn.memory_size().size() * 8,
    }
}

fn binary<O: Binary>(insn: &Instruction, op: &mut Op, flat: bool) -> Option<Handler> {
    let (dst, src) = (insn.op0_kind(), insn.op1_kind());
    let bits = width(insn, 0);
    if insn.has_lock_prefix() {
        return Some(if src == OpKind::Register {
            op.src = offset_of(insn.op1_register())?.0;
            by_width!(bits, locked_reg, O)
        } else {
            op.imm = insn.immediate(1);
            by_width!(bits, locked_imm, O)
        });
    }
    Some(match (dst, src) {
        (OpKind::Register, OpKind::Register) => {
            op.dst = offset_of(insn.op0_register())?.0;
            op.src = offset_of(insn.op1_register())?.0;
            by_width!(bits, reg_reg, O)
        }
        (OpKind::Register, OpKind::Memory) => {
            op.dst = offset_of(insn.op0_register())?.0;
            by_width!(bits, reg_mem, O; addressing flat)
        }
        (OpKind::Memory, OpKind::Register) => {
            op.src = offset_of(insn.op1_register())?.0;
            by_width!(bits, mem_reg, O; addressing flat)
        }
        (OpKind::Register, _) => {
            op.dst = offset_of(insn.op0_register())?.0;
            op.imm = insn.immediate(1);
            by_width!(bits, reg_imm, O)
        }
        _ => {
            op.imm = insn.immediate(1);
            by_width!(bits, mem_imm, O; addressing flat)
        }
    })
}

fn unary<O: Unary>(insn: &Instruction, op: &mut Op, flat: bool) -> Option<Handler> {
    let bits = width(insn, 0);
    Some(if insn.op0_kind() == OpKind::Register {
        op.dst = offset_of(insn.op0_register())?.0;
        by_width!(bits, unary_reg, O)
    } else if insn.has_lock_prefix() {
        by_width!(bits, unary_locked, O)
    } else {
        by_width!(bits, unary_mem, O; addressing flat)
    })
}

fn nop(_: &mut Cpu, _: &Op) -> Exec {
    Ok(())
}

/// XCHG, XADD and CMPXCHG.
fn exchange(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    let bits = width(insn, 0);
    let locked = insn.has_lock_prefix();
    let register = insn.op0_kind() == OpKind::Register;
    let mnemonic = insn.mnemonic();
    op.src = match (insn.op1_kind(), mnemonic) {
        (OpKind::Register, _) => offset_of(insn.op1_register())?.0,
        _ => offset_of(insn.op0_register())?.0,
    };
    if register && insn.op1_kind() == OpKind::Register {
        op.dst = offset_of(insn.op0_register())?.0;
        return Some(match mnemonic {
            Mnemonic::Xchg => by_width!(bits, xchg_reg),
            Mnemonic::Xadd => by_width!(bits, xadd_reg),
            _ => by_width!(bits, cmpxchg_reg),
        });
    }
    macro_rules! lockable {
        ($f:ident) => {
            match (bits, locked) {
                (8, true) => $f::<u8, true>,
                (16, true) => $f::<u16, true>,
                (32, true) => $f::<u32, true>,
                (_, true) => $f::<u64, true>,
                (8, false) => $f::<u8, false>,
                (16, false) => $f::<u16, false>,
                (32, false) => $f::<u32, false>,
                (_, false) => $f::<u64, false>,
            }
        };
    }
    Some(match mnemonic {
        Mnemonic::Xchg => by_width!(bits, xchg_mem),
        Mnemonic::Xadd => lockable!(xadd_mem),
        _ => lockable!(cmpxchg_mem),
    })
}

/// Handler for an instruction of this family.
pub(crate) fn lower(insn: &Instruction, op: &mut Op, flat: bool) -> Option<Handler> {
    match insn.mnemonic() {
        Mnemonic::Add => binary::<Add>(insn, op, flat),
        Mnemonic::Or => binary::<Or>(insn, op, flat),
        Mnemonic::Adc => binary::<Adc>(insn, op, flat),
        Mnemonic::Sbb => binary::<Sbb>(insn, op, flat),
        Mnemonic::And => binary::<And>(insn, op, flat),
        Mnemonic::Sub => binary::<Sub>(insn, op, flat),
        Mnemonic::Xor => binary::<Xor>(insn, op, flat),
        Mnemonic::Cmp => binary::<Cmp>(insn, op, flat),
        Mnemonic::Test => binary::<Test>(insn, op, flat),
        Mnemonic::Inc => unary::<Inc>(insn, op, flat),
        Mnemonic::Dec => unary::<Dec>(insn, op, flat),
        Mnemonic::Neg => unary::<Neg>(insn, op, flat),
        Mnemonic::Not => unary::<Not>(insn, op, flat),
        Mnemonic::Xchg | Mnemonic::Xadd | Mnemonic::Cmpxchg => exchange(insn, op),
        Mnemonic::Nop
        | Mnemonic::Endbr64
        | Mnemonic::Endbr32
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetch
        | Mnemonic::Lfence
        | Mnemonic::Reservednop => Some(nop),
        Mnemonic::Mfence | Mnemonic::Sfence => Some(fence),
        _ => None,
    }
}

fn fence(_: &mut Cpu, _: &Op) -> Exec {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(())
}
