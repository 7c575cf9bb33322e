//! Bit tests and scans, counts, CRC32, ADX, BMI1 and BMI2.

use iced_x86::{Instruction, Mnemonic, OpKind};
use x86defs::vmx::{reason, secondary};

use super::address::{Addressing, Checked};
use super::arith::width;
use super::host::{CF, Int, OF, SF, Status, WideInt, ZF};
use super::operands::offset_of;
use crate::Cpu;
use crate::op::{Cold, ColdHandler, Handler, Op};
use crate::trap::Exec;

/// BT, BTS, BTR, BTC.
trait BitOp: 'static {
    const WRITES: bool = true;
    fn run<T: WideInt>(s: &mut Status, a: T, bit: T) -> T;
}

macro_rules! bit_ops {
    ($($name:ident $f:ident $writes:literal),+) => {$(
        struct $name;
        impl BitOp for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn run<T: WideInt>(s: &mut Status, a: T, bit: T) -> T {
                T::$f(s, a, bit)
            }
        }
    )+};
}
bit_ops!(Bt bt false, Bts bts true, Btr btr true, Btc btc true);

#[inline(always)]
fn bit_number<T: Int>(cpu: &Cpu, op: &Op) -> T {
    if op.extra != 0 { cpu.reg::<T>(op.src) } else { T::from_u64(op.imm) }
}

fn test_reg<O: BitOp, T: WideInt>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (a, bit) = (cpu.reg::<T>(op.dst), bit_number::<T>(cpu, op));
    let r = O::run(&mut cpu.state.status, a, bit);
    if O::WRITES {
        cpu.set_reg(op.dst, r);
    }
    Ok(())
}

fn test_mem<O: BitOp, T: WideInt, const LOCK: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let bit = bit_number::<T>(cpu, op);
    let mut offset = Checked::offset(cpu, op);
    if op.extra != 0 {
        // A register bit number reaches beyond the operand: the word that holds the bit is accessed.
        let unused = 64 - T::BITS;
        let signed = (bit.to_u64() << unused) as i64 >> unused;
        let words = signed >> T::BITS.trailing_zeros();
        offset = offset.wrapping_add((words as u64).wrapping_mul(T::SIZE as u64));
        offset = match op.address_bits {
            16 => offset & 0xffff,
            32 => offset & 0xffff_ffff,
            _ => offset,
        };
    }
    let linear = cpu.linear(super::address::seg_of(op), offset, T::SIZE, O::WRITES)?;
    if !O::WRITES {
        let a = cpu.load::<T>(linear)?;
        O::run(&mut cpu.state.status, a, bit);
        return Ok(());
    }
    if LOCK {
        cpu.locked::<T>(linear, |s, a| O::run(s, a, bit))
    } else {
        cpu.modify::<T>(linear, |s, a| O::run(s, a, bit))
    }
}

fn bit_op<O: BitOp>(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    if insn.op1_kind() == OpKind::Register {
        op.src = offset_of(insn.op1_register())?.0;
        op.extra = 1;
    } else {
        op.imm = insn.immediate(1);
    }
    let bits = width(insn, 0);
    if insn.op0_kind() == OpKind::Register {
        op.dst = offset_of(insn.op0_register())?.0;
        return Some(match bits {
            16 => test_reg::<O, u16>,
            32 => test_reg::<O, u32>,
            _ => test_reg::<O, u64>,
        });
    }
    Some(match (bits, insn.has_lock_prefix()) {
        (16, false) => test_mem::<O, u16, false>,
        (32, false) => test_mem::<O, u32, false>,
        (_, false) => test_mem::<O, u64, false>,
        (16, true) => test_mem::<O, u16, true>,
        (32, true) => test_mem::<O, u32, true>,
        (_, true) => test_mem::<O, u64, true>,
    })
}

/// BSF, BSR, TZCNT, LZCNT, POPCNT, and IMUL with two operands.
trait Scan: 'static {
    /// A source of zero leaves the destination untouched, the upper half of a 32-bit one included.
    const KEEPS_ON_ZERO: bool;
    fn run<T: WideInt>(s: &mut Status, old: T, a: T) -> T;
}

macro_rules! scans {
    ($($name:ident $f:ident $keeps:literal),+) => {$(
        struct $name;
        impl Scan for $name {
            const KEEPS_ON_ZERO: bool = $keeps;
            #[inline(always)]
            fn run<T: WideInt>(s: &mut Status, old: T, a: T) -> T {
                T::$f(s, old, a)
            }
        }
    )+};
}
scans!(Bsf bsf true, Bsr bsr true, Tzcnt tzcnt false, Lzcnt lzcnt false, Popcnt popcnt false, Imul2 imul2 false);

fn scan_reg<O: Scan, T: WideInt>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (old, a) = (cpu.reg::<T>(op.dst), cpu.reg::<T>(op.src));
    let r = O::run(&mut cpu.state.status, old, a);
    if !O::KEEPS_ON_ZERO || a != T::default() {
        cpu.set_reg(op.dst, r);
    }
    Ok(())
}

fn scan_mem<O: Scan, T: WideInt>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = Checked::linear(cpu, op, T::SIZE, false)?;
    let a = cpu.load::<T>(linear)?;
    let old = cpu.reg::<T>(op.dst);
    let r = O::run(&mut cpu.state.status, old, a);
    if !O::KEEPS_ON_ZERO || a != T::default() {
        cpu.set_reg(op.dst, r);
    }
    Ok(())
}

fn scan<O: Scan>(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    op.dst = offset_of(insn.op0_register())?.0;
    let bits = width(insn, 0);
    if insn.op1_kind() == OpKind::Register {
        op.src = offset_of(insn.op1_register())?.0;
        return Some(match bits {
            16 => scan_reg::<O, u16>,
            32 => scan_reg::<O, u32>,
            _ => scan_reg::<O, u64>,
        });
    }
    Some(match bits {
        16 => scan_mem::<O, u16>,
        32 => scan_mem::<O, u32>,
        _ => scan_mem::<O, u64>,
    })
}

/// Handler for an instruction of this family.
pub(crate) fn lower(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    match insn.mnemonic() {
        Mnemonic::Bt => bit_op::<Bt>(insn, op),
        Mnemonic::Bts => bit_op::<Bts>(insn, op),
        Mnemonic::Btr => bit_op::<Btr>(insn, op),
        Mnemonic::Btc => bit_op::<Btc>(insn, op),
        Mnemonic::Bsf => scan::<Bsf>(insn, op),
        Mnemonic::Bsr => scan::<Bsr>(insn, op),
        Mnemonic::Tzcnt => scan::<Tzcnt>(insn, op),
        Mnemonic::Lzcnt => scan::<Lzcnt>(insn, op),
        Mnemonic::Popcnt => scan::<Popcnt>(insn, op),
        Mnemonic::Imul if insn.op_count() == 2 => scan::<Imul2>(insn, op),
        _ => None,
    }
}

/// Width of the VEX-encoded general-register instructions, in bytes.
fn size(insn: &Instruction) -> usize {
    insn.op0_register().size()
}

fn truncate(value: u64, size: usize) -> u64 {
    if size == 4 { value & 0xffff_ffff } else { value }
}

/// Flags of the BMI1 instructions: SF and ZF from the result, CF given, OF cleared; AF and PF are undefined (kept).
fn bmi_flags(cpu: &mut Cpu, result: u64, size: usize, carry: bool) {
    let sign = result >> (size * 8 - 1) & 1 != 0;
    let status = &mut cpu.state.status;
    *status &= !(CF | OF | ZF | SF);
    *status |= if carry { CF } else { 0 } | if result == 0 { ZF } else { 0 } | if sign { SF } else { 0 };
}

fn andn(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let size = size(&cold.insn);
    let a = cpu.read_operand(cold, 1, size)?;
    let b = cpu.read_operand(cold, 2, size)?;
    let r = truncate(!a & b, size);
    cpu.write_operand(cold, 0, size, r)?;
    bmi_flags(cpu, r, size, false);
    Ok(())
}

fn bextr(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let size = size(&cold.insn);
    let a = cpu.read_operand(cold, 1, size)?;
    let control = cpu.read_operand(cold, 2, size)?;
    let (start, len) = ((control & 0xff) as u32, (control >> 8 & 0xff) as u32);
    let shifted = a.checked_shr(start).unwrap_or(0);
    let r = if len < 64 { shifted & ((1 << len) - 1) } else { shifted };
    cpu.write_operand(cold, 0, size, r)?;
    bmi_flags(cpu, r, size, false);
    // BEXTR leaves SF undefined; processors clear it along with OF.
    cpu.state.status &= !SF;
    Ok(())
}

fn bls(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let size = size(&cold.insn);
    let a = cpu.read_operand(cold, 1, size)?;
    let (r, carry) = match cold.insn.mnemonic() {
        Mnemonic::Blsi => (a & a.wrapping_neg(), a != 0),
        Mnemonic::Blsmsk => (a ^ a.wrapping_sub(1), a == 0),
        _ => (a & a.wrapping_sub(1), a == 0),
    };
    let r = truncate(r, size);
    cpu.write_operand(cold, 0, size, r)?;
    bmi_flags(cpu, r, size, carry);
    Ok(())
}

fn bzhi(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let size = size(&cold.insn);
    let a = cpu.read_operand(cold, 1, size)?;
    let n = cpu.read_operand(cold, 2, size)? & 0xff;
    let bits = size as u64 * 8;
    let r = if n < bits { a & ((1 << n) - 1) } else { a };
    cpu.write_operand(cold, 0, size, r)?;
    bmi_flags(cpu, r, size, n > bits - 1);
    Ok(())
}

fn pdep_pext(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let size = size(&cold.insn);
    let a = cpu.read_operand(cold, 1, size)?;
    let mut mask = cpu.read_operand(cold, 2, size)?;
    let deposit = cold.insn.mnemonic() == Mnemonic::Pdep;
    let (mut r, mut k) = (0, 0);
    while mask != 0 {
        let bit = mask.trailing_zeros();
        r |= if deposit { (a >> k & 1) << bit } else { (a >> bit & 1) << k };
        mask &= mask - 1;
        k += 1;
    }
    cpu.write_operand(cold, 0, size, r)
}

fn shift_x(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let size = size(&cold.insn);
    let bits = size as u32 * 8;
    let a = cpu.read_operand(cold, 1, size)?;
    let n = cpu.read_operand(cold, 2, size)? as u32 & (bits - 1);
    let r = match cold.insn.mnemonic() {
        Mnemonic::Sarx => ((a << (64 - bits)) as i64 >> (64 - bits) >> n) as u64,
        Mnemonic::Shlx => a << n,
        Mnemonic::Shrx => a >> n,
        _ if size == 4 => u64::from((a as u32).rotate_right(n)),
        _ => a.rotate_right(n),
    };
    cpu.write_operand(cold, 0, size, truncate(r, size))
}

fn mulx(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let size = size(&cold.insn);
    let a = truncate(cpu.state.gpr.get(crate::state::reg::RDX), size);
    let b = cpu.read_operand(cold, 2, size)?;
    let product = u128::from(a) * u128::from(b);
    // If both destinations are the same register, it gets the high half.
    cpu.write_register(cold.insn.op1_register(), truncate(product as u64, size));
    cpu.write_register(cold.insn.op0_register(), (product >> (size * 8)) as u64);
    Ok(())
}

/// ADCX and ADOX: add with CF (OF) as carry in and out, other flags unchanged.
fn adx(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let size = size(&cold.insn);
    let flag = if cold.insn.mnemonic() == Mnemonic::Adcx { CF } else { OF };
    let b = cpu.read_operand(cold, 1, size)?;
    let a = cpu.read_register(cold.insn.op0_register());
    let carry = cpu.state.status & flag != 0;
    let sum = u128::from(a) + u128::from(b) + u128::from(carry);
    cpu.write_register(cold.insn.op0_register(), sum as u64);
    let out = sum >> (size * 8) != 0;
    cpu.state.status = cpu.state.status & !flag | if out { flag } else { 0 };
    Ok(())
}

/// CRC32 (the Castagnoli polynomial, reflected).
fn crc32(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let size = match cold.insn.op1_kind() {
        OpKind::Register => cold.insn.op1_register().size(),
        _ => cold.insn.memory_size().size(),
    };
    let mut data = cpu.read_operand(cold, 1, size)?;
    let mut crc = cpu.read_register(cold.insn.op0_register()) as u32;
    for _ in 0..size {
        crc ^= u32::from(data as u8);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
        }
        data >>= 8;
    }
    cpu.write_register(cold.insn.op0_register(), u64::from(crc));
    Ok(())
}

/// RDRAND and RDSEED: the owner's random bits.
fn random(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let (bit, reason) = match cold.insn.mnemonic() {
        Mnemonic::Rdrand => (secondary::RDRAND_EXITING, reason::RDRAND),
        _ => (secondary::RDSEED_EXITING, reason::RDSEED),
    };
    cpu.exit_on_random(&cold.insn, bit, reason)?;
    let bits = cpu.bus().random();
    let register = cold.insn.op0_register();
    let size = register.size();
    let value = bits.unwrap_or(0);
    cpu.write_register(register, if size == 8 { value } else { value & ((1 << (size * 8)) - 1) });
    cpu.state.status = if bits.is_some() { CF } else { 0 };
    Ok(())
}

/// Handler for the less frequent instructions of this family.
pub(crate) fn lower_cold(insn: &Instruction) -> Option<ColdHandler> {
    Some(match insn.mnemonic() {
        Mnemonic::Andn => andn,
        Mnemonic::Bextr => bextr,
        Mnemonic::Blsi | Mnemonic::Blsmsk | Mnemonic::Blsr => bls,
        Mnemonic::Bzhi => bzhi,
        Mnemonic::Pdep | Mnemonic::Pext => pdep_pext,
        Mnemonic::Sarx | Mnemonic::Shlx | Mnemonic::Shrx | Mnemonic::Rorx => shift_x,
        Mnemonic::Mulx => mulx,
        Mnemonic::Adcx | Mnemonic::Adox => adx,
        Mnemonic::Crc32 => crc32,
        Mnemonic::Rdrand | Mnemonic::Rdseed => random,
        _ => return None,
    })
}
