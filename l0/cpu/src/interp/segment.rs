//! Segment registers and descriptor-table registers: loads with all their checks, stores, and the instructions that
//! only look at descriptors (LAR, LSL, VERR, VERW, ARPL).

use iced_x86::{Instruction, Mnemonic, OpKind};
use x86defs::vmx::reason;
use x86defs::{cr4, rflags, segment, vector};

use super::descriptor::{Descriptor, Found, is_null, rpl};
use super::operands::segment_of;
use crate::Cpu;
use crate::cpuid::Feature;
use crate::op::{Cold, ColdHandler};
use crate::state::{Seg, Segment, Shadow, TableRegister, reg};
use crate::trap::{Exec, Fault};

/// How this family executes `insn`, if it is its own.
pub(crate) fn lower(insn: &Instruction) -> Option<ColdHandler> {
    let seg0 = insn.op0_kind() == OpKind::Register && insn.op0_register().is_segment_register();
    let seg1 = insn.op_count() > 1
        && insn.op1_kind() == OpKind::Register
        && insn.op1_register().is_segment_register();
    Some(match insn.mnemonic() {
        Mnemonic::Mov if seg0 => mov_to_sreg,
        Mnemonic::Mov if seg1 => mov_from_sreg,
        Mnemonic::Push if seg0 => push_sreg,
        Mnemonic::Pop if seg0 => pop_sreg,
        Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Lss => load_far_pointer,
        Mnemonic::Lldt => lldt,
        Mnemonic::Ltr => ltr,
        Mnemonic::Sldt | Mnemonic::Str => store_system_selector,
        Mnemonic::Lgdt | Mnemonic::Lidt => load_table,
        Mnemonic::Sgdt | Mnemonic::Sidt => store_table,
        Mnemonic::Lar | Mnemonic::Lsl => lar_lsl,
        Mnemonic::Verr | Mnemonic::Verw => verify,
        Mnemonic::Arpl => arpl,
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase => read_base,
        Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => write_base,
        Mnemonic::Swapgs => swapgs,
        _ => return None,
    })
}

/// False for those that a block may go on after.
pub(crate) fn ends_block(insn: &Instruction) -> bool {
    let loads_segment = insn.op0_kind() == OpKind::Register && insn.op0_register().is_segment_register();
    match insn.mnemonic() {
        Mnemonic::Mov => loads_segment,
        Mnemonic::Pop
        | Mnemonic::Lds
        | Mnemonic::Les
        | Mnemonic::Lfs
        | Mnemonic::Lgs
        | Mnemonic::Lss
        | Mnemonic::Lldt
        | Mnemonic::Ltr
        | Mnemonic::Lgdt
        | Mnemonic::Lidt => true,
        _ => false,
    }
}

impl Cpu {
    /// #UD unless in protected mode proper (not real-address, not virtual-8086 mode).
    pub(crate) fn require_protected(&mut self) -> Exec {
        if self.state.protected() && !self.state.v86() { Ok(()) } else { Err(self.raise(Fault::ud())) }
    }

    /// #GP(0) unless CPL is 0.
    pub(crate) fn require_cpl0(&mut self) -> Exec {
        if self.state.cpl == 0 { Ok(()) } else { Err(self.raise(Fault::gp(0))) }
    }

    /// #UD unless the model has `feature`.
    pub(crate) fn require(&mut self, feature: Feature) -> Exec {
        if self.model.has(feature) { Ok(()) } else { Err(self.raise(Fault::ud())) }
    }

    /// #GP(0) at CPL above 0 with CR4.UMIP.
    pub(crate) fn check_umip(&mut self) -> Exec {
        if self.state.cr4 & cr4::UMIP != 0 && self.state.cpl > 0 {
            return Err(self.raise(Fault::gp(0)));
        }
        Ok(())
    }

    /// Loads a segment register other than CS as MOV, POP and the far-pointer loads do.
    pub(crate) fn load_segment(&mut self, seg: Seg, selector: u16) -> Exec {
        let register = self.prepare_segment(seg, selector)?;
        *self.state.seg_mut(seg) = register;
        self.refresh_mode();
        Ok(())
    }

    fn prepare_segment(&mut self, seg: Seg, selector: u16) -> Exec<Segment> {
        if self.state.v86() {
            return Ok(Segment { access: 0xf3, ..Segment::real(selector) });
        }
        if !self.state.protected() {
            // Limit and rights stay as they are ("unreal mode").
            return Ok(Segment { base: u64::from(selector) << 4, selector, ..*self.state.seg(seg) });
        }
        if seg == Seg::Ss { self.prepare_stack(selector) } else { self.prepare_data(selector) }
    }

    /// DS, ES, FS, GS.
    fn prepare_data(&mut self, selector: u16) -> Exec<Segment> {
        if is_null(selector) {
            return Ok(null_segment(selector, 0));
        }
        let found = self.fetch_descriptor(selector, vector::GP, 0)?;
        if !data_loadable(found.descriptor, self.state.cpl, rpl(selector)) {
            return Err(self.selector_fault(vector::GP, selector, 0));
        }
        if !found.descriptor.present() {
            return Err(self.selector_fault(vector::NP, selector, 0));
        }
        self.mark_accessed(&found)?;
        Ok(found.descriptor.to_segment(selector))
    }

    fn prepare_stack(&mut self, selector: u16) -> Exec<Segment> {
        let cpl = self.state.cpl;
        if is_null(selector) {
            if self.code_bits == 64 && cpl < 3 && rpl(selector) == cpl {
                return Ok(null_segment(selector, cpl));
            }
            return Err(self.raise(Fault::gp(0)));
        }
        let found = self.fetch_stack_descriptor(selector, cpl, vector::GP, 0)?;
        self.mark_accessed(&found)?;
        Ok(found.descriptor.to_segment(selector))
    }

    /// Fetches and checks a descriptor for SS at privilege `cpl`: problems are `vector`, absence is #SS.
    pub(crate) fn fetch_stack_descriptor(
        &mut self,
        selector: u16,
        cpl: u8,
        vector: u8,
        ext: u32,
    ) -> Exec<Found> {
        let found = self.fetch_descriptor(selector, vector, ext)?;
        let d = found.descriptor;
        if rpl(selector) != cpl || !d.is_writable_data() || d.dpl() != cpl {
            return Err(self.selector_fault(vector, selector, ext));
        }
        if !d.present() {
            return Err(self.selector_fault(vector::SS, selector, ext));
        }
        Ok(found)
    }

    /// Descriptor for LAR, LSL, VERR and VERW: none if the selector names nothing visible.
    fn visible_descriptor(&mut self, selector: u16, system: &[u32]) -> Exec<Option<Found>> {
        if is_null(selector) || self.descriptor_address(selector, 8).is_none() {
            return Ok(None);
        }
        let found = self.fetch_descriptor(selector, vector::GP, 0)?;
        let d = found.descriptor;
        if d.system_type().is_some_and(|t| !system.contains(&t)) {
            return Ok(None);
        }
        let visible = d.is_conforming() || d.dpl() >= self.state.cpl.max(rpl(selector));
        Ok(visible.then_some(found))
    }

    fn set_zf(&mut self, on: bool) {
        let flags = self.state.rflags() & !rflags::ZF;
        self.state.set_status(if on { flags | rflags::ZF } else { flags });
    }
}

/// An empty segment register; SS keeps its DPL.
pub(crate) fn null_segment(selector: u16, dpl: u8) -> Segment {
    let access = segment::UNUSABLE | u32::from(dpl) << segment::DPL_SHIFT;
    Segment { base: 0, limit: 0, access, selector }
}

/// Type and privilege rules for DS, ES, FS and GS.
pub(crate) fn data_loadable(d: Descriptor, cpl: u8, rpl: u8) -> bool {
    d.is_readable() && (d.is_conforming() || d.dpl() >= cpl.max(rpl))
}

fn mov_to_sreg(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let seg = segment_of(cold.insn.op0_register());
    if seg == Seg::Cs {
        return Err(cpu.raise(Fault::ud()));
    }
    let selector = cpu.read_operand(cold, 1, 2)? as u16;
    cpu.load_segment(seg, selector)?;
    if seg == Seg::Ss {
        cpu.state.shadow = Shadow::MovSs;
        cpu.attend();
    }
    Ok(())
}

fn mov_from_sreg(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let value = cpu.read_register(cold.insn.op1_register());
    cpu.write_operand(cold, 0, 2, value)
}

/// Operand size of PUSH and POP of a segment register.
fn stack_operand(insn: &Instruction) -> usize {
    insn.stack_pointer_increment().unsigned_abs() as usize
}

fn push_sreg(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let value = cpu.read_register(cold.insn.op0_register());
    match stack_operand(&cold.insn) {
        4 => {
            // The upper half of the stack slot keeps its contents, as on recent Intel processors.
            let mask = cpu.stack_mask();
            let new = cpu.state.gpr.get(reg::RSP).wrapping_sub(4) & mask;
            let linear = cpu.stack_address(new, 2, true)?;
            cpu.store_sized(linear, 2, value)?;
            cpu.set_stack_pointer(new, mask);
            Ok(())
        }
        size => cpu.push_sized(size, value),
    }
}

fn pop_sreg(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let seg = segment_of(cold.insn.op0_register());
    let rsp = cpu.state.gpr.get(reg::RSP);
    let selector = cpu.pop_sized(stack_operand(&cold.insn))? as u16;
    let popped = cpu.state.gpr.get(reg::RSP);
    if let Err(trap) = cpu.load_segment(seg, selector) {
        cpu.state.gpr.set(reg::RSP, rsp);
        return Err(trap);
    }
    cpu.state.gpr.set(reg::RSP, popped);
    if seg == Seg::Ss {
        cpu.state.shadow = Shadow::MovSs;
        cpu.attend();
    }
    Ok(())
}

fn load_far_pointer(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let insn = &cold.insn;
    let seg = match insn.mnemonic() {
        Mnemonic::Lds => Seg::Ds,
        Mnemonic::Les => Seg::Es,
        Mnemonic::Lfs => Seg::Fs,
        Mnemonic::Lgs => Seg::Gs,
        _ => Seg::Ss,
    };
    let (offset, selector) = cpu.read_far_pointer(insn, insn.op0_register().size())?;
    cpu.load_segment(seg, selector)?;
    cpu.write_register(insn.op0_register(), offset);
    Ok(())
}

impl Cpu {
    /// Reads `m16:16`, `m16:32` or `m16:64`: offset, then selector.
    pub(crate) fn read_far_pointer(&mut self, insn: &Instruction, size: usize) -> Exec<(u64, u16)> {
        let linear = self.operand_linear(insn, size + 2, false)?;
        let offset = self.load_sized(linear, size)?;
        let selector = self.load_sized(self.wrap(linear.wrapping_add(size as u64)), 2)?;
        Ok((offset, selector as u16))
    }
}

fn lldt(cpu: &mut Cpu, cold: &Cold) -> Exec {
    cpu.require_protected()?;
    cpu.require_cpl0()?;
    cpu.exit_on_descriptor_table(&cold.insn, reason::LDTR_TR_ACCESS, 2, false)?;
    let selector = cpu.read_operand(cold, 0, 2)? as u16;
    cpu.load_ldtr(selector)
}

fn ltr(cpu: &mut Cpu, cold: &Cold) -> Exec {
    cpu.require_protected()?;
    cpu.require_cpl0()?;
    cpu.exit_on_descriptor_table(&cold.insn, reason::LDTR_TR_ACCESS, 3, false)?;
    let selector = cpu.read_operand(cold, 0, 2)? as u16;
    cpu.load_tr(selector)
}

fn store_system_selector(cpu: &mut Cpu, cold: &Cold) -> Exec {
    cpu.require_protected()?;
    cpu.check_umip()?;
    let identity = u32::from(cold.insn.mnemonic() == Mnemonic::Str);
    cpu.exit_on_descriptor_table(&cold.insn, reason::LDTR_TR_ACCESS, identity, false)?;
    let register = if cold.insn.mnemonic() == Mnemonic::Str { &cpu.state.tr } else { &cpu.state.ldtr };
    let selector = u64::from(register.selector);
    cpu.write_operand(cold, 0, 2, selector)
}

fn load_table(cpu: &mut Cpu, cold: &Cold) -> Exec {
    cpu.require_cpl0()?;
    let (wide, narrow) = (cpu.code_bits == 64, operand16(&cold.insn));
    let identity = if cold.insn.mnemonic() == Mnemonic::Lgdt { 2 } else { 3 };
    cpu.exit_on_descriptor_table(&cold.insn, reason::GDTR_IDTR_ACCESS, identity, !narrow)?;
    let size = if wide { 10 } else { 6 };
    let linear = cpu.operand_linear(&cold.insn, size, false)?;
    let limit = cpu.load::<u16>(linear)?;
    let at = cpu.wrap(linear.wrapping_add(2));
    let base = match (wide, narrow) {
        (true, _) => cpu.load::<u64>(at)?,
        (false, false) => u64::from(cpu.load::<u32>(at)?),
        (false, true) => u64::from(cpu.load::<u32>(at)? & 0xff_ffff),
    };
    let table = TableRegister { base, limit };
    cpu.check_table_register(table)?;
    if cold.insn.mnemonic() == Mnemonic::Lgdt {
        cpu.state.gdtr = table;
    } else {
        cpu.state.idtr = table;
    }
    Ok(())
}

fn operand16(insn: &Instruction) -> bool {
    use iced_x86::Code;
    matches!(
        insn.code(),
        Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 | Code::Sgdt_m1632_16 | Code::Sidt_m1632_16
    )
}

fn store_table(cpu: &mut Cpu, cold: &Cold) -> Exec {
    cpu.check_umip()?;
    let identity = u32::from(cold.insn.mnemonic() == Mnemonic::Sidt);
    let wide = !operand16(&cold.insn);
    cpu.exit_on_descriptor_table(&cold.insn, reason::GDTR_IDTR_ACCESS, identity, wide)?;
    let table = if cold.insn.mnemonic() == Mnemonic::Sgdt { cpu.state.gdtr } else { cpu.state.idtr };
    let base_size = if cpu.code_bits == 64 { 8 } else { 4 };
    let linear = cpu.operand_linear(&cold.insn, base_size + 2, true)?;
    cpu.probe_write(linear, base_size + 2)?;
    cpu.store::<u16>(linear, table.limit)?;
    cpu.store_sized(cpu.wrap(linear.wrapping_add(2)), base_size, table.base)
}

fn lar_lsl(cpu: &mut Cpu, cold: &Cold) -> Exec {
    use segment::system::*;
    cpu.require_protected()?;
    let selector = cpu.read_operand(cold, 1, 2)? as u16;
    let lar = cold.insn.mnemonic() == Mnemonic::Lar;
    let long = cpu.state.long_mode();
    let visible: &[u32] = match (lar, long) {
        (true, true) => &[LDT, TSS_AVAILABLE, TSS_BUSY, CALL_GATE],
        (true, false) => {
            &[TSS16_AVAILABLE, LDT, TSS16_BUSY, CALL_GATE16, TASK_GATE, TSS_AVAILABLE, TSS_BUSY, CALL_GATE]
        }
        (false, true) => &[LDT, TSS_AVAILABLE, TSS_BUSY],
        (false, false) => &[TSS16_AVAILABLE, LDT, TSS16_BUSY, TSS_AVAILABLE, TSS_BUSY],
    };
    let found = cpu.visible_descriptor(selector, visible)?;
    cpu.set_zf(found.is_some());
    if let Some(found) = found {
        let value =
            if lar { found.descriptor.0 >> 32 & 0x00ff_ff00 } else { u64::from(found.descriptor.limit()) };
        cpu.write_register(cold.insn.op0_register(), value);
    }
    Ok(())
}

fn verify(cpu: &mut Cpu, cold: &Cold) -> Exec {
    cpu.require_protected()?;
    let selector = cpu.read_operand(cold, 0, 2)? as u16;
    let found = cpu.visible_descriptor(selector, &[])?;
    let ok = found.is_some_and(|found| match cold.insn.mnemonic() {
        Mnemonic::Verr => found.descriptor.is_readable(),
        _ => found.descriptor.is_writable_data(),
    });
    cpu.set_zf(ok);
    Ok(())
}

fn arpl(cpu: &mut Cpu, cold: &Cold) -> Exec {
    cpu.require_protected()?;
    let source = cpu.read_operand(cold, 1, 2)?;
    // Only a destination that changes is written: a read-only one that need not is no fault.
    let destination = cpu.read_operand(cold, 0, 2)?;
    let raise = destination & 3 < source & 3;
    if raise {
        cpu.write_operand(cold, 0, 2, destination & !3 | source & 3)?;
    }
    cpu.set_zf(raise);
    Ok(())
}

impl Cpu {
    fn check_fsgsbase(&mut self) -> Exec {
        if self.code_bits != 64 || self.state.cr4 & cr4::FSGSBASE == 0 {
            return Err(self.raise(Fault::ud()));
        }
        Ok(())
    }
}

fn base_seg(insn: &Instruction) -> Seg {
    match insn.mnemonic() {
        Mnemonic::Rdfsbase | Mnemonic::Wrfsbase => Seg::Fs,
        _ => Seg::Gs,
    }
}

fn read_base(cpu: &mut Cpu, cold: &Cold) -> Exec {
    cpu.check_fsgsbase()?;
    let base = cpu.state.seg(base_seg(&cold.insn)).base;
    cpu.write_register(cold.insn.op0_register(), base);
    Ok(())
}

fn write_base(cpu: &mut Cpu, cold: &Cold) -> Exec {
    cpu.check_fsgsbase()?;
    let base = cpu.read_register(cold.insn.op0_register());
    if !cpu.is_canonical(base) {
        return Err(cpu.raise(Fault::gp(0)));
    }
    cpu.set_segment_base(base_seg(&cold.insn), base);
    Ok(())
}

impl Cpu {
    /// Sets FS's or GS's base.
    pub(crate) fn set_segment_base(&mut self, seg: Seg, base: u64) {
        self.state.seg_mut(seg).base = base;
        self.linear_base[seg as usize] = base;
    }
}

fn swapgs(cpu: &mut Cpu, _: &Cold) -> Exec {
    if cpu.code_bits != 64 {
        return Err(cpu.raise(Fault::ud()));
    }
    cpu.require_cpl0()?;
    let base = cpu.state.seg(Seg::Gs).base;
    let other = std::mem::replace(&mut cpu.state.msrs.kernel_gs_base, base);
    cpu.set_segment_base(Seg::Gs, other);
    Ok(())
}
