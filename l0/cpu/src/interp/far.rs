//! Far transfers by JMP, CALL and RET: between code segments, through call gates, to tasks.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use x86defs::segment::{self, SELECTOR_RPL, SELECTOR_TI, system};
use x86defs::vector;

use super::descriptor::{Descriptor, Found, is_null, rpl, selector_code};
use super::segment::null_segment;
use super::stack_switch::NewStack;
use super::task::Switch;
use crate::Cpu;
use crate::op::{Cold, ColdHandler};
use crate::state::{Seg, Segment, reg};
use crate::trap::{Exec, Fault};

/// How this family executes `insn`, if it is its own.
pub(crate) fn lower(insn: &Instruction) -> Option<ColdHandler> {
    Some(match insn.code() {
        Code::Jmp_ptr1616 | Code::Jmp_ptr1632 | Code::Jmp_m1616 | Code::Jmp_m1632 | Code::Jmp_m1664 => {
            jmp_far
        }
        Code::Call_ptr1616 | Code::Call_ptr1632 | Code::Call_m1616 | Code::Call_m1632 | Code::Call_m1664 => {
            call_far
        }
        _ if insn.mnemonic() == Mnemonic::Retf => ret_far,
        _ => return None,
    })
}

/// All of them leave the block.
pub(crate) fn ends_block(_: &Instruction) -> bool {
    true
}

/// A far target as the instruction names it.
#[derive(Clone, Copy)]
struct Pointer {
    selector: u16,
    offset: u64,
    /// Operand size in bytes.
    size: usize,
}

/// JMP or CALL.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Transfer {
    Jump,
    Call,
}

impl Cpu {
    fn far_pointer(&mut self, insn: &Instruction) -> Exec<Pointer> {
        let size = match insn.code() {
            Code::Jmp_ptr1616 | Code::Call_ptr1616 | Code::Jmp_m1616 | Code::Call_m1616 => 2,
            Code::Jmp_m1664 | Code::Call_m1664 => 8,
            _ => 4,
        };
        let (offset, selector) = match insn.op0_kind() {
            OpKind::FarBranch16 => (u64::from(insn.far_branch16()), insn.far_branch_selector()),
            OpKind::FarBranch32 => (u64::from(insn.far_branch32()), insn.far_branch_selector()),
            _ => self.read_far_pointer(insn, size)?,
        };
        Ok(Pointer { selector, offset, size })
    }

    /// #GP(`code`) if `offset` is not in the code segment that is about to be loaded.
    pub(crate) fn check_entry(&mut self, code: Descriptor, offset: u64, error: u32) -> Exec {
        let inside = if self.state.long_mode() && code.is_code64() {
            self.is_canonical(offset)
        } else {
            offset <= u64::from(code.limit())
        };
        if inside { Ok(()) } else { Err(self.raise(Fault::gp(error))) }
    }

    /// Loads CS at privilege `cpl` and jumps.
    pub(crate) fn enter_code(&mut self, code: &Found, cpl: u8, offset: u64) -> Exec {
        self.mark_accessed(code)?;
        let selector = code.selector & !SELECTOR_RPL | u16::from(cpl);
        *self.state.seg_mut(Seg::Cs) = code.descriptor.to_segment(selector);
        self.state.cpl = cpl;
        self.state.rip = offset;
        self.refresh_mode();
        Ok(())
    }

    /// Real-address and virtual-8086 mode: CS is loaded like any segment.
    pub(crate) fn enter_real_code(&mut self, selector: u16, offset: u64) -> Exec {
        if offset > u64::from(self.state.seg(Seg::Cs).limit) {
            return Err(self.raise(Fault::gp(0)));
        }
        let cs = *self.state.seg(Seg::Cs);
        *self.state.seg_mut(Seg::Cs) = Segment { base: u64::from(selector) << 4, selector, ..cs };
        self.state.rip = offset;
        self.refresh_mode();
        Ok(())
    }

    /// Type, privilege and presence of a code segment that JMP or CALL names directly.
    fn check_direct_code(&mut self, found: &Found) -> Exec {
        let (d, cpl) = (found.descriptor, self.state.cpl);
        let allowed = if d.is_conforming() {
            d.dpl() <= cpl
        } else {
            d.is_code() && d.dpl() == cpl && rpl(found.selector) <= cpl
        };
        let both = segment::L | segment::DB;
        if !allowed || self.state.long_mode() && d.access() & both == both {
            return Err(self.selector_fault(vector::GP, found.selector, 0));
        }
        if !d.present() {
            return Err(self.selector_fault(vector::NP, found.selector, 0));
        }
        Ok(())
    }

    fn far_transfer(&mut self, to: Pointer, how: Transfer) -> Exec {
        if !self.state.protected() || self.state.v86() {
            return self.far_transfer_real(to, how);
        }
        if is_null(to.selector) {
            return Err(self.raise(Fault::gp(0)));
        }
        let found = self.fetch_descriptor(to.selector, vector::GP, 0)?;
        let Some(kind) = found.descriptor.system_type() else {
            return self.far_direct(&found, to, how);
        };
        let d = found.descriptor;
        if d.dpl() < self.state.cpl.max(rpl(to.selector)) {
            return Err(self.selector_fault(vector::GP, to.selector, 0));
        }
        let task = if how == Transfer::Jump { Switch::Jump } else { Switch::Call };
        match (kind, self.state.long_mode()) {
            (system::CALL_GATE, _) | (system::CALL_GATE16, false) => self.through_call_gate(&found, how),
            (system::TASK_GATE, false) => {
                if !d.present() {
                    return Err(self.selector_fault(vector::NP, to.selector, 0));
                }
                let selector = d.gate_selector();
                if is_null(selector) || selector & SELECTOR_TI != 0 {
                    return Err(self.selector_fault(vector::GP, selector, 0));
                }
                let tss = self.fetch_descriptor(selector, vector::GP, 0)?;
                self.enter_task(&tss, task)
            }
            (system::TSS_AVAILABLE | system::TSS16_AVAILABLE, false) => self.enter_task(&found, task),
            _ => Err(self.selector_fault(vector::GP, to.selector, 0)),
        }
    }

    fn far_transfer_real(&mut self, to: Pointer, how: Transfer) -> Exec {
        if how == Transfer::Jump {
            return self.enter_real_code(to.selector, to.offset);
        }
        if to.offset > u64::from(self.state.seg(Seg::Cs).limit) {
            return Err(self.raise(Fault::gp(0)));
        }
        let mut stack = self.current_stack();
        let cs = u64::from(self.state.seg(Seg::Cs).selector);
        self.push_frame(&mut stack, to.size, &[cs, self.state.rip], 0)?;
        self.enter_real_code(to.selector, to.offset)?;
        self.adopt_stack_pointer(&stack);
        Ok(())
    }

    fn far_direct(&mut self, found: &Found, to: Pointer, how: Transfer) -> Exec {
        self.check_direct_code(found)?;
        self.check_entry(found.descriptor, to.offset, 0)?;
        let mut stack = self.current_stack();
        if how == Transfer::Call {
            let cs = u64::from(self.state.seg(Seg::Cs).selector);
            self.push_frame(&mut stack, to.size, &[cs, self.state.rip], 0)?;
        }
        self.enter_code(found, self.state.cpl, to.offset)?;
        if how == Transfer::Call {
            self.adopt_stack_pointer(&stack);
        }
        Ok(())
    }

    fn through_call_gate(&mut self, gate: &Found, how: Transfer) -> Exec {
        let long = self.state.long_mode();
        let d = gate.descriptor;
        if !d.present() {
            return Err(self.selector_fault(vector::NP, gate.selector, 0));
        }
        let wide = d.system_type() == Some(system::CALL_GATE);
        let mut offset = u64::from(if wide { d.gate_offset() } else { d.gate_offset() & 0xffff });
        if long {
            offset |= self.fetch_upper_half(gate, vector::GP, 0)?;
        }
        let selector = d.gate_selector();
        if is_null(selector) {
            return Err(self.raise(Fault::gp(0)));
        }
        let code = self.fetch_descriptor(selector, vector::GP, 0)?;
        let cd = code.descriptor;
        let cpl = self.state.cpl;
        let jump_allowed = how == Transfer::Call || cd.is_conforming() || cd.dpl() == cpl;
        if !cd.is_code() || cd.dpl() > cpl || !jump_allowed || long && !cd.is_code64() {
            return Err(self.selector_fault(vector::GP, selector, 0));
        }
        if !cd.present() {
            return Err(self.selector_fault(vector::NP, selector, 0));
        }
        if how == Transfer::Call && !cd.is_conforming() && cd.dpl() < cpl {
            return self.call_inner(&code, offset, gate);
        }
        self.check_entry(cd, offset, 0)?;
        let mut stack = self.current_stack();
        if how == Transfer::Call {
            let size = if long {
                8
            } else if wide {
                4
            } else {
                2
            };
            let cs = u64::from(self.state.seg(Seg::Cs).selector);
            self.push_frame(&mut stack, size, &[cs, self.state.rip], 0)?;
        }
        self.enter_code(&code, cpl, offset)?;
        if how == Transfer::Call {
            self.adopt_stack_pointer(&stack);
        }
        Ok(())
    }

    /// CALL through a gate to more privilege: a new stack, with the caller's parameters copied.
    fn call_inner(&mut self, code: &Found, offset: u64, gate: &Found) -> Exec {
        let cpl = code.descriptor.dpl();
        let ss = u64::from(self.state.seg(Seg::Ss).selector);
        let rsp = self.state.gpr.get(reg::RSP);
        let cs = u64::from(self.state.seg(Seg::Cs).selector);
        if self.state.long_mode() {
            let new = self.tss_stack_pointer(4 + 8 * u64::from(cpl), 0)?;
            let mut stack = NewStack::long(null_segment(u16::from(cpl), cpl), new, cpl);
            self.check_entry(code.descriptor, offset, 0)?;
            self.push_frame(&mut stack, 8, &[ss, rsp, cs, self.state.rip], 0)?;
            self.enter_code(code, cpl, offset)?;
            *self.state.seg_mut(Seg::Ss) = stack.ss;
            self.state.gpr.set(reg::RSP, stack.rsp);
            self.refresh_mode();
            return Ok(());
        }
        let size = if gate.descriptor.system_type() == Some(system::CALL_GATE) { 4 } else { 2 };
        let mut stack = self.inner_stack(cpl, 0)?;
        self.check_entry(code.descriptor, offset, 0)?;
        let count = gate.descriptor.gate_count() as usize;
        let mut frame = [0; 35];
        frame[0] = ss;
        frame[1] = rsp;
        for i in 0..count {
            // The parameter pushed first is the farthest from the stack's top.
            frame[2 + i] = self.peek_stack(((count - 1 - i) * size) as u64, size)?;
        }
        frame[2 + count] = cs;
        frame[3 + count] = self.state.rip;
        let error = selector_code(stack.ss.selector);
        self.push_frame(&mut stack, size, &frame[..count + 4], error)?;
        self.mark_accessed(code)?;
        self.adopt_stack(&stack)?;
        self.enter_code(code, cpl, offset)
    }

    /// The code segment a return goes to, checked (RET and IRET).
    pub(crate) fn fetch_return_code(&mut self, selector: u16) -> Exec<Found> {
        if is_null(selector) {
            return Err(self.raise(Fault::gp(0)));
        }
        let found = self.fetch_descriptor(selector, vector::GP, 0)?;
        let (d, to) = (found.descriptor, rpl(selector));
        let allowed = if d.is_conforming() { d.dpl() <= to } else { d.dpl() == to };
        let both = segment::L | segment::DB;
        let bad_mode = self.state.long_mode() && d.access() & both == both;
        if !d.is_code() || !allowed || to < self.state.cpl || bad_mode {
            return Err(self.selector_fault(vector::GP, selector, 0));
        }
        if !d.present() {
            return Err(self.selector_fault(vector::NP, selector, 0));
        }
        Ok(found)
    }

    /// The stack a return to privilege `cpl` goes to, checked (RET and IRET). A null SS is allowed only for 64-bit
    /// code below CPL 3.
    pub(crate) fn fetch_return_stack(
        &mut self,
        selector: u16,
        rsp: u64,
        cpl: u8,
        to: &Found,
    ) -> Exec<NewStack> {
        let long = self.state.long_mode() && to.descriptor.is_code64();
        if is_null(selector) {
            if long && cpl != 3 && rpl(selector) == cpl {
                return Ok(NewStack::long(null_segment(selector, cpl), rsp, cpl));
            }
            return Err(self.raise(Fault::gp(0)));
        }
        let found = self.fetch_stack_descriptor(selector, cpl, vector::GP, 0)?;
        self.mark_accessed(&found)?;
        let ss = found.descriptor.to_segment(selector);
        Ok(if long { NewStack::long(ss, rsp, cpl) } else { NewStack::segmented(ss, rsp, cpl) })
    }
}

fn jmp_far(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let to = cpu.far_pointer(&cold.insn)?;
    cpu.far_transfer(to, Transfer::Jump)
}

fn call_far(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let to = cpu.far_pointer(&cold.insn)?;
    cpu.far_transfer(to, Transfer::Call)
}

fn ret_far(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let size = match cold.insn.code() {
        Code::Retfw | Code::Retfw_imm16 => 2,
        Code::Retfd | Code::Retfd_imm16 => 4,
        _ => 8,
    };
    let extra = if cold.insn.op_count() > 0 { u64::from(cold.insn.immediate16()) } else { 0 };
    let offset = cpu.peek_stack(0, size)?;
    let selector = cpu.peek_stack(size as u64, size)? as u16;
    let popped = 2 * size as u64 + extra;
    if !cpu.state.protected() || cpu.state.v86() {
        cpu.enter_real_code(selector, offset)?;
        cpu.pop_stack(popped);
        return Ok(());
    }
    let code = cpu.fetch_return_code(selector)?;
    let to = rpl(selector);
    if to == cpu.state.cpl {
        cpu.check_entry(code.descriptor, offset, 0)?;
        cpu.mark_accessed(&code)?;
        cpu.pop_stack(popped);
        return cpu.enter_code(&code, to, offset);
    }
    let rsp = cpu.peek_stack(popped, size)?;
    let ss = cpu.peek_stack(popped + size as u64, size)? as u16;
    let mut stack = cpu.fetch_return_stack(ss, rsp, to, &code)?;
    cpu.check_entry(code.descriptor, offset, 0)?;
    stack.rsp = rsp.wrapping_add(extra);
    cpu.return_outer(&code, &stack, to, offset)
}

impl Cpu {
    /// Drops `bytes` from the current stack.
    pub(crate) fn pop_stack(&mut self, bytes: u64) {
        let mask = self.stack_mask();
        let rsp = self.state.gpr.get(reg::RSP).wrapping_add(bytes);
        self.set_stack_pointer(rsp & mask, mask);
    }

    /// The last part of a return to less privilege.
    pub(crate) fn return_outer(&mut self, code: &Found, stack: &NewStack, cpl: u8, offset: u64) -> Exec {
        self.mark_accessed(code)?;
        *self.state.seg_mut(Seg::Ss) = stack.ss;
        self.adopt_stack_pointer(stack);
        self.enter_code(code, cpl, offset)?;
        self.drop_inner_segments(cpl);
        self.refresh_mode();
        Ok(())
    }
}
