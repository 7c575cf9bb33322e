//! IRET in every mode.

use iced_x86::{Code, Instruction, Mnemonic};
use x86defs::vmx::pin;
use x86defs::{cr4, rflags};

use super::descriptor::rpl;
use super::stack_switch::NewStack;
use crate::Cpu;
use crate::op::{Cold, ColdHandler};
use crate::phys::Inside;
use crate::state::{Seg, Segment, Shadow, reg};
use crate::trap::{Exec, Fault};

/// How this family executes `insn`, if it is its own.
pub(crate) fn lower(insn: &Instruction) -> Option<ColdHandler> {
    matches!(insn.mnemonic(), Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq)
        .then_some(iret as ColdHandler)
}

/// It leaves the block.
pub(crate) fn ends_block(_: &Instruction) -> bool {
    true
}

/// What IRET finds on the stack first.
#[derive(Clone, Copy)]
struct Return {
    ip: u64,
    cs: u16,
    flags: u64,
    size: usize,
}

/// Flags that IRET and POPF change at any privilege level.
const ANY: u64 = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;

impl Cpu {
    /// Replaces the flags in `mask`.
    pub(crate) fn replace_flags(&mut self, value: u64, mask: u64) {
        let flags = self.state.rflags() & !mask | value & mask;
        self.state.set_rflags(flags);
        self.refresh_mode();
        self.attend();
    }

    /// Which flags IRET restores, by operand size and the privilege level it starts from.
    fn iret_mask(&self, size: usize) -> u64 {
        let mut mask = ANY;
        if size > 2 {
            mask |= rflags::RF | rflags::AC | rflags::ID;
        }
        if self.state.cpl <= self.state.iopl() {
            mask |= rflags::IF;
        }
        if self.state.cpl == 0 {
            mask |= rflags::IOPL;
            if size > 2 {
                mask |= rflags::VIF | rflags::VIP;
            }
        }
        mask
    }

    fn iret_frame(&mut self, size: usize) -> Exec<Return> {
        let ip = self.peek_stack(0, size)?;
        let cs = self.peek_stack(size as u64, size)? as u16;
        let flags = self.peek_stack(2 * size as u64, size)?;
        Ok(Return { ip, cs, flags, size })
    }

    fn iret_real(&mut self, to: Return) -> Exec {
        self.enter_real_code(to.cs, to.ip)?;
        self.pop_stack(3 * to.size as u64);
        let wide = rflags::RF | rflags::AC | rflags::ID;
        let mask = ANY | rflags::IF | rflags::IOPL | if to.size > 2 { wide } else { 0 };
        self.replace_flags(to.flags, mask);
        Ok(())
    }

    fn iret_v86(&mut self, size: usize) -> Exec {
        let extended = self.state.cr4 & cr4::VME != 0 && size == 2;
        if self.state.iopl() < 3 && !extended {
            return Err(self.raise(Fault::gp(0)));
        }
        let to = self.iret_frame(size)?;
        if self.state.iopl() == 3 {
            self.enter_real_code(to.cs, to.ip)?;
            self.pop_stack(3 * size as u64);
            let wide = rflags::RF | rflags::AC | rflags::ID;
            let mask = ANY | rflags::IF | if size > 2 { wide } else { 0 };
            self.replace_flags(to.flags, mask);
            return Ok(());
        }
        let pending = to.flags & rflags::IF != 0 && self.state.system_flag(rflags::VIP);
        if pending || to.flags & rflags::TF != 0 {
            return Err(self.raise(Fault::gp(0)));
        }
        self.enter_real_code(to.cs, to.ip)?;
        self.pop_stack(6);
        let vif = if to.flags & rflags::IF != 0 { rflags::VIF } else { 0 };
        self.replace_flags(to.flags & !rflags::VIF | vif, ANY | rflags::VIF);
        Ok(())
    }

    /// To virtual-8086 mode, from CPL 0.
    fn iret_to_v86(&mut self, to: Return) -> Exec {
        let mut words = [0; 6];
        for (i, word) in words.iter_mut().enumerate() {
            *word = self.peek_stack(12 + 4 * i as u64, 4)?;
        }
        if to.ip > 0xffff {
            return Err(self.raise(Fault::gp(0)));
        }
        let [esp, ss, es, ds, fs, gs] = words;
        let mask = self.iret_mask(4) | rflags::VM;
        let segments = [
            (Seg::Es, es),
            (Seg::Ds, ds),
            (Seg::Fs, fs),
            (Seg::Gs, gs),
            (Seg::Ss, ss),
            (Seg::Cs, u64::from(to.cs)),
        ];
        for (seg, selector) in segments {
            *self.state.seg_mut(seg) = Segment { access: 0xf3, ..Segment::real(selector as u16) };
        }
        self.state.cpl = 3;
        self.state.gpr.set(reg::RSP, esp);
        self.state.rip = to.ip;
        self.replace_flags(to.flags, mask);
        Ok(())
    }

    fn iret_protected(&mut self, size: usize) -> Exec {
        if self.state.system_flag(rflags::NT) {
            if self.state.long_mode() {
                return Err(self.raise(Fault::gp(0)));
            }
            return self.return_to_linked_task();
        }
        let to = self.iret_frame(size)?;
        let legacy = !self.state.long_mode();
        if legacy && size == 4 && self.state.cpl == 0 && to.flags & rflags::VM != 0 {
            return self.iret_to_v86(to);
        }
        let code = self.fetch_return_code(to.cs)?;
        let cpl = rpl(to.cs);
        let mask = self.iret_mask(size);
        let outer = cpl > self.state.cpl;
        self.mark_accessed(&code)?;
        if outer || self.code_bits == 64 {
            let rsp = self.peek_stack(3 * size as u64, size)?;
            let ss = self.peek_stack(4 * size as u64, size)? as u16;
            let stack = self.fetch_return_stack(ss, rsp, cpl, &code)?;
            self.check_entry(code.descriptor, to.ip, 0)?;
            if outer {
                self.return_outer(&code, &stack, cpl, to.ip)?;
            } else {
                self.return_same_with_stack(&stack);
                self.enter_code(&code, cpl, to.ip)?;
            }
        } else {
            self.check_entry(code.descriptor, to.ip, 0)?;
            self.pop_stack(3 * size as u64);
            self.enter_code(&code, cpl, to.ip)?;
        }
        self.replace_flags(to.flags, mask);
        Ok(())
    }

    /// IRET unblocks NMIs even if it faults ("Handling Multiple NMIs"). With NMI exiting it does nothing to real NMIs: what
    /// it unblocks is virtual ones, if there are any ("Changes to Instruction Behavior in VMX Non-Root Operation").
    fn unblock_nmis(&mut self) {
        let pin = if self.non_root() { self.vmx.controls.pin } else { 0 };
        if pin & pin::NMI_EXITING == 0 || pin & pin::VIRTUAL_NMIS != 0 {
            self.iret_unblocked = std::mem::take(&mut self.state.nmi_blocked);
        }
    }

    /// Takes back the delivery of an exception, whose handler is about to begin: its frame is popped, with an error code
    /// if one was pushed, in units of `size` bytes (2, 4 or 8, as the gate has it). False if what is on the stack is no
    /// such frame; the vCPU's state is then undefined. Whether NMIs are blocked stays as it is.
    ///
    /// Interrupts wait for the instruction that the exception was about, as they did when it began.
    pub fn undo_delivery(&mut self, size: usize, error_code: bool) -> bool {
        let _inside = Inside::enter(&self.peer);
        if error_code {
            self.pop_stack(size as u64);
        }
        let undone = if !self.state.protected() {
            self.iret_frame(size).and_then(|to| self.iret_real(to))
        } else if self.state.v86() || self.state.system_flag(rflags::NT) {
            return false;
        } else {
            self.iret_protected(size)
        };
        self.state.shadow = Shadow::Sti;
        self.attend();
        undone.is_ok()
    }

    fn return_same_with_stack(&mut self, stack: &NewStack) {
        *self.state.seg_mut(Seg::Ss) = stack.ss;
        self.adopt_stack_pointer(stack);
    }
}

fn iret(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let size = match cold.insn.code() {
        Code::Iretw => 2,
        Code::Iretd => 4,
        _ => 8,
    };
    cpu.unblock_nmis();
    if !cpu.state.protected() {
        let to = cpu.iret_frame(size)?;
        cpu.iret_real(to)?;
    } else if cpu.state.v86() {
        cpu.iret_v86(size)?;
    } else {
        cpu.iret_protected(size)?;
    }
    cpu.iret_unblocked = false;
    cpu.attend();
    Ok(())
}
