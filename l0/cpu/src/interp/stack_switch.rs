//! Stacks that are not yet, or no longer, the current one: frames for interrupts, call gates and returns.

use x86defs::segment;
use x86defs::vector;

use super::descriptor::is_null;
use crate::Cpu;
use crate::events::{is_tss32, stack_privilege};
use crate::mmu::walk::Privilege;
use crate::state::{Seg, Segment, reg};
use crate::trap::{Exec, Fault};

/// A stack being pushed to before it is made the current one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewStack {
    pub(crate) ss: Segment,
    pub(crate) rsp: u64,
    /// Which bits of RSP the stack uses.
    pub(crate) mask: u64,
    pub(crate) cpl: u8,
    /// Address of SS's descriptor, whose accessed bit is set when the stack is adopted; 0 if it has none.
    descriptor_at: u64,
}

impl NewStack {
    /// A stack of 64-bit mode.
    pub(crate) fn long(ss: Segment, rsp: u64, cpl: u8) -> Self {
        Self { ss, rsp, mask: u64::MAX, cpl, descriptor_at: 0 }
    }

    /// A stack in a loaded segment.
    pub(crate) fn segmented(ss: Segment, rsp: u64, cpl: u8) -> Self {
        let mask = if ss.access & segment::DB != 0 { 0xffff_ffff } else { 0xffff };
        Self { ss, rsp, mask, cpl, descriptor_at: 0 }
    }
}

impl Cpu {
    /// The current stack.
    pub(crate) fn current_stack(&self) -> NewStack {
        let (ss, rsp) = (*self.state.seg(Seg::Ss), self.state.gpr.get(reg::RSP));
        NewStack { mask: self.stack_mask(), ..NewStack::segmented(ss, rsp, self.state.cpl) }
    }

    /// Offset `at` in the TSS, which must hold `size` bytes there, or #TS(TR).
    fn tss_field(&mut self, at: u64, size: u64, ext: u32) -> Exec<u64> {
        let tr = self.state.tr;
        if at + size - 1 > u64::from(tr.limit) {
            return Err(self.selector_fault(vector::TS, tr.selector, ext));
        }
        Ok(self.table_address(tr.base, at))
    }

    /// RSPn or ISTn of the 64-bit TSS, canonical.
    pub(crate) fn tss_stack_pointer(&mut self, at: u64, ext: u32) -> Exec<u64> {
        let at = self.tss_field(at, 8, ext)?;
        let rsp = self.read_system::<u64>(at)?;
        if !self.is_canonical(rsp) {
            return Err(self.raise(Fault::with_code(vector::SS, ext)));
        }
        Ok(rsp)
    }

    /// The stack for privilege level `cpl` from a 16-bit or 32-bit TSS, checked.
    pub(crate) fn inner_stack(&mut self, cpl: u8, ext: u32) -> Exec<NewStack> {
        let n = u64::from(cpl);
        let (esp, selector) = if is_tss32(&self.state.tr) {
            let at = self.tss_field(4 + 8 * n, 6, ext)?;
            let esp = u64::from(self.read_system::<u32>(at)?);
            (esp, self.read_system::<u16>(self.table_address(at, 4))?)
        } else {
            let at = self.tss_field(2 + 4 * n, 4, ext)?;
            let sp = u64::from(self.read_system::<u16>(at)?);
            (sp, self.read_system::<u16>(self.table_address(at, 2))?)
        };
        if is_null(selector) {
            return Err(self.raise(Fault::with_code(vector::TS, ext)));
        }
        let found = self.fetch_stack_descriptor(selector, cpl, vector::TS, ext)?;
        let ss = found.descriptor.to_segment(selector);
        let unaccessed = !found.descriptor.has(segment::ACCESSED);
        Ok(NewStack {
            descriptor_at: if unaccessed { found.at } else { 0 },
            ..NewStack::segmented(ss, esp, cpl)
        })
    }

    /// Pushes `values` of `size` bytes each; no room is #SS(`code`).
    pub(crate) fn push_frame(
        &mut self,
        stack: &mut NewStack,
        size: usize,
        values: &[u64],
        code: u32,
    ) -> Exec {
        let privilege = stack_privilege(stack.cpl);
        let total = values.len() * size;
        let top = stack.rsp & stack.mask;
        let bottom = top.wrapping_sub(total as u64) & stack.mask;
        let first = stack.ss.base.wrapping_add(bottom);
        let one_page = first & 4095 <= 4096 - total as u64;
        if bottom < top && one_page && total <= 160 {
            let mut bytes = [0; 160];
            for (i, value) in values.iter().rev().enumerate() {
                bytes[i * size..(i + 1) * size].copy_from_slice(&value.to_le_bytes()[..size]);
            }
            let linear = self.stack_linear(stack, bottom, total, code)?;
            self.write_with(linear, &bytes[..total], privilege)?;
            stack.rsp = stack.rsp & !stack.mask | bottom;
            return Ok(());
        }
        for value in values {
            let new = (stack.rsp & stack.mask).wrapping_sub(size as u64) & stack.mask;
            let linear = self.stack_linear(stack, new, size, code)?;
            self.write_with(linear, &value.to_le_bytes()[..size], privilege)?;
            stack.rsp = stack.rsp & !stack.mask | new;
        }
        Ok(())
    }

    /// Reads `size` bytes at `above` bytes over the current stack's top, without popping.
    pub(crate) fn peek_stack(&mut self, above: u64, size: usize) -> Exec<u64> {
        let mask = self.stack_mask();
        let offset = self.state.gpr.get(reg::RSP).wrapping_add(above) & mask;
        let linear = self.stack_address(offset, size, false)?;
        self.load_sized(linear, size)
    }

    /// Linear address of `size` bytes at `offset` of a stack, with its limit or canonical check.
    fn stack_linear(&mut self, stack: &NewStack, offset: u64, size: usize, code: u32) -> Exec<u64> {
        let last = offset.wrapping_add(size as u64 - 1);
        if stack.mask == u64::MAX {
            if self.is_canonical(offset) && self.is_canonical(last) {
                return Ok(offset);
            }
            return Err(self.raise(Fault::with_code(vector::SS, code)));
        }
        let access = stack.ss.access;
        let limit = u64::from(stack.ss.limit);
        let inside = if access & (segment::CODE | segment::EXPAND_DOWN) == segment::EXPAND_DOWN {
            let top = if access & segment::DB != 0 { 0xffff_ffff } else { 0xffff };
            offset > limit && last <= top
        } else {
            last <= limit
        };
        let usable = access & segment::UNUSABLE == 0 && access & segment::WRITABLE != 0;
        if !inside || self.state.protected() && !usable {
            return Err(self.raise(Fault::with_code(vector::SS, code)));
        }
        Ok(stack.ss.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Makes `stack` the current one: SS and the stack pointer.
    pub(crate) fn adopt_stack(&mut self, stack: &NewStack) -> Exec {
        if stack.descriptor_at != 0 {
            self.set_accessed_at(stack.descriptor_at)?;
        }
        *self.state.seg_mut(Seg::Ss) = stack.ss;
        self.adopt_stack_pointer(stack);
        Ok(())
    }

    /// Takes over the stack pointer alone.
    pub(crate) fn adopt_stack_pointer(&mut self, stack: &NewStack) {
        self.set_stack_pointer(stack.rsp & stack.mask, stack.mask);
    }

    /// Nulls DS, ES, FS and GS where the outer level `cpl` may not use what they hold. Bases stay: a hypervisor that gives
    /// FS a usable descriptor of DPL 0 with its guest's thread pointer as base (KVM does, for the guests of its guests)
    /// relies on it.
    pub(crate) fn drop_inner_segments(&mut self, cpl: u8) {
        for seg in [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs] {
            let register = self.state.seg(seg);
            let access = register.access;
            let conforming = access & (segment::S | segment::CODE | segment::CONFORMING)
                == segment::S | segment::CODE | segment::CONFORMING;
            let keeps = conforming || register.dpl() >= cpl;
            if !keeps && !register.unusable() {
                let base = register.base;
                *self.state.seg_mut(seg) = Segment { base, ..super::segment::null_segment(0, 0) };
            }
        }
    }

    /// Writes to the current task's stack after a task switch: #SS on overflow.
    pub(crate) fn push_after_switch(&mut self, size: usize, value: u64, ext: u32) -> Exec {
        let mut stack = self.current_stack();
        self.push_frame(&mut stack, size, &[value], ext)?;
        self.adopt_stack_pointer(&stack);
        Ok(())
    }

    /// Reads memory as the processor itself does; helper for tables wider than eight bytes.
    pub(crate) fn read_table(&mut self, linear: u64, data: &mut [u8]) -> Exec {
        self.read_with(linear, data, Privilege::Implicit)
    }
}
