//! Effective addresses of decoded ops, in the two shapes that handlers are made for.

use crate::Cpu;
use crate::op::Op;
use crate::state::Seg;
use crate::trap::Exec;

/// How a handler computes its memory operand's linear address.
pub(crate) trait Addressing: 'static {
    /// The linear address, after the segment's checks for `size` bytes.
    fn linear(cpu: &mut Cpu, op: &Op, size: usize, write: bool) -> Exec<u64>;
    /// The offset in the segment.
    fn offset(cpu: &Cpu, op: &Op) -> u64;
}

/// 64-bit code with 64-bit addresses: no limits, no masks; non-canonical addresses miss the TLB.
pub(crate) struct Flat;

impl Addressing for Flat {
    #[inline(always)]
    fn linear(cpu: &mut Cpu, op: &Op, _size: usize, _write: bool) -> Exec<u64> {
        Ok(Self::offset(cpu, op).wrapping_add(cpu.linear_base[(op.seg & 7) as usize]))
    }

    #[inline(always)]
    fn offset(cpu: &Cpu, op: &Op) -> u64 {
        let base = cpu.reg::<u64>(op.base);
        let index = cpu.reg::<u64>(op.index) << (op.scale & 3);
        base.wrapping_add(index).wrapping_add(op.disp as u64)
    }
}

/// Every other mode.
pub(crate) struct Checked;

impl Addressing for Checked {
    #[inline(always)]
    fn linear(cpu: &mut Cpu, op: &Op, size: usize, write: bool) -> Exec<u64> {
        let offset = Self::offset(cpu, op);
        cpu.linear(seg_of(op), offset, size, write)
    }

    #[inline(always)]
    fn offset(cpu: &Cpu, op: &Op) -> u64 {
        let offset = Flat::offset(cpu, op);
        match op.address_bits {
            16 => offset & 0xffff,
            32 => offset & 0xffff_ffff,
            _ => offset,
        }
    }
}

/// The op's segment register.
#[inline(always)]
pub(crate) fn seg_of(op: &Op) -> Seg {
    [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs, Seg::Ds, Seg::Ds][(op.seg & 7) as usize]
}
