//! Which instructions cause VM exits, and what others do differently in non-root operation ("Instructions That Cause VM
//! Exits", "Changes to Instruction Behavior in VMX Non-Root Operation"). Handlers ask here once their checks that come
//! before a VM exit have passed: #UD, privilege level, and (for ports) the TSS's permission bitmap ("Relative Priority
//! of Faults and VM Exits").

use iced_x86::{Instruction, OpKind};
use x86defs::cr0;
use x86defs::vmx::{primary, reason, secondary};

use super::{Operation, information};
use crate::Cpu;
use crate::trap::{Exec, Fault};

/// Exit qualification of control-register accesses: bits 5:4, the kind of access.
mod cr_access {
    pub const MOV_TO: u64 = 0;
    pub const MOV_FROM: u64 = 1 << 4;
    pub const CLTS: u64 = 2 << 4;
    pub const LMSW: u64 = 3 << 4;
    /// LMSW has a memory operand.
    pub const MEMORY: u64 = 1 << 6;
    pub const REGISTER_SHIFT: u32 = 8;
    pub const SOURCE_SHIFT: u32 = 16;
}

/// Exit qualification of MOV DR: from the debug register.
const FROM_DR: u64 = 1 << 4;

/// Exit qualification of I/O instructions.
mod io_access {
    pub const IN: u64 = 1 << 3;
    pub const STRING: u64 = 1 << 4;
    pub const REPEATED: u64 = 1 << 5;
    pub const IMMEDIATE: u64 = 1 << 6;
    pub const PORT_SHIFT: u32 = 16;
}

/// Number of MSRs in each range of the MSR bitmaps, and where the bitmaps are in their page.
const MSR_RANGE: u32 = 0x2000;
const MSR_HIGH: u32 = 0xc000_0000;
const MSR_HIGH_AT: u64 = 1024;
const MSR_WRITE_AT: u64 = 2048;

/// An access to a port, as the exit qualification describes it.
#[derive(Clone, Copy)]
pub(crate) struct PortAccess {
    pub(crate) port: u16,
    pub(crate) size: usize,
    pub(crate) input: bool,
    pub(crate) immediate: bool,
}

/// Execution of PAUSE in a loop ("PAUSE-loop exiting"), in TSC units.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PauseLoop {
    first: u64,
    last: u64,
}

impl Cpu {
    #[inline(always)]
    pub(crate) fn non_root(&self) -> bool {
        self.vmx.operation == Operation::NonRoot
    }

    /// In non-root operation with one of these primary controls.
    #[inline(always)]
    pub(crate) fn under_primary(&self, bits: u32) -> bool {
        self.non_root() && self.vmx.controls.has_primary(bits)
    }

    /// In non-root operation with one of these secondary controls.
    #[inline(always)]
    pub(crate) fn under_secondary(&self, bits: u32) -> bool {
        self.non_root() && self.vmx.controls.has_secondary(bits)
    }

    /// The instruction causes VM exits unconditionally.
    pub(crate) fn exit_always(&mut self, reason: u32) -> Exec {
        if self.non_root() { Err(self.vm_exit(reason, 0)) } else { Ok(()) }
    }

    /// It causes a VM exit with any of these primary controls.
    pub(crate) fn exit_on_primary(&mut self, bits: u32, reason: u32) -> Exec {
        if self.under_primary(bits) { Err(self.vm_exit(reason, 0)) } else { Ok(()) }
    }

    /// It causes a VM exit with any of these secondary controls.
    pub(crate) fn exit_on_secondary(&mut self, bits: u32, reason: u32) -> Exec {
        if self.under_secondary(bits) { Err(self.vm_exit(reason, 0)) } else { Ok(()) }
    }

    /// #UD in non-root operation unless this secondary control enables the instruction.
    pub(crate) fn require_enabled(&mut self, bit: u32) -> Exec {
        if self.non_root() && !self.vmx.controls.has_secondary(bit) {
            return Err(self.raise(Fault::ud()));
        }
        Ok(())
    }

    /// Descriptor-table exiting. `identity` is the instruction's number in bits 29:28 of the information.
    pub(crate) fn exit_on_descriptor_table(
        &mut self,
        insn: &Instruction,
        reason: u32,
        identity: u32,
        wide: bool,
    ) -> Exec {
        if !self.under_secondary(secondary::DESCRIPTOR_TABLE_EXITING) {
            return Ok(());
        }
        let qualification = self.displacement(insn);
        let trap = self.vm_exit(reason, qualification);
        let size = u32::from(reason == reason::GDTR_IDTR_ACCESS && wide) << 11;
        self.vmx.exit.instruction_information = information::operand(insn, 0) | identity << 28 | size;
        Err(trap)
    }

    /// RDRAND and RDSEED exiting: the destination and its size.
    pub(crate) fn exit_on_random(&mut self, insn: &Instruction, bit: u32, reason: u32) -> Exec {
        if !self.under_secondary(bit) {
            return Ok(());
        }
        let trap = self.vm_exit(reason, 0);
        let register = insn.op0_register();
        let size = information::address_size(8 * register.size() as u32);
        self.vmx.exit.instruction_information = information::number(register) << 3 | size << 11;
        Err(trap)
    }

    /// INVPCID exits with INVLPG exiting (it is enabled).
    pub(crate) fn exit_on_invpcid(&mut self, insn: &Instruction) -> Exec {
        if !self.under_primary(primary::INVLPG_EXITING) {
            return Ok(());
        }
        let qualification = self.displacement(insn);
        let trap = self.vm_exit(reason::INVPCID, qualification);
        self.vmx.exit.instruction_information =
            information::memory(insn) | information::second(insn.op0_register());
        Err(trap)
    }

    /// INVLPG of `linear`.
    pub(crate) fn exit_on_invlpg(&mut self, linear: u64) -> Exec {
        if self.under_primary(primary::INVLPG_EXITING) {
            return Err(self.vm_exit(reason::INVLPG, linear));
        }
        Ok(())
    }

    /// XSAVES and XRSTORS of `components`.
    pub(crate) fn exit_on_supervisor_state(&mut self, components: u64, reason: u32) -> Exec {
        if self.non_root() && components & self.state.msrs.xss & self.vmx.controls.xss_exiting_bitmap != 0 {
            return Err(self.vm_exit(reason, 0));
        }
        Ok(())
    }
}

/// The time-stamp counter and PAUSE.
impl Cpu {
    /// The TSC as RDTSC, RDTSCP and RDMSR show it ("TSC offsetting", "TSC scaling").
    pub(crate) fn shown_tsc(&mut self) -> u64 {
        let tsc = self.read_tsc();
        if !self.under_primary(primary::USE_TSC_OFFSETTING) {
            return tsc;
        }
        let controls = &self.vmx.controls;
        let scaled = if controls.has_secondary(secondary::USE_TSC_SCALING) {
            ((u128::from(tsc) * u128::from(controls.tsc_multiplier)) >> 48) as u64
        } else {
            tsc
        };
        scaled.wrapping_add(controls.tsc_offset)
    }

    /// PAUSE exiting, and PAUSE-loop exiting at CPL 0.
    #[cold]
    pub(crate) fn exit_on_pause(&mut self) -> Exec {
        self.exit_on_primary(primary::PAUSE_EXITING, reason::PAUSE)?;
        if !self.under_secondary(secondary::PAUSE_LOOP_EXITING) || self.state.cpl != 0 {
            return Ok(());
        }
        let now = self.read_tsc();
        let controls = &self.vmx.controls;
        let (gap, window) = (u64::from(controls.ple_gap), u64::from(controls.ple_window));
        let first = match self.vmx.pause_loop {
            Some(pause) if now.wrapping_sub(pause.last) <= gap => pause.first,
            _ => now,
        };
        self.vmx.pause_loop = Some(PauseLoop { first, last: now });
        if now.wrapping_sub(first) > window {
            return Err(self.vm_exit(reason::PAUSE, 0));
        }
        Ok(())
    }
}

/// Control and debug registers.
impl Cpu {
    /// MOV of `value` to control register `cr`: a VM exit, or what the register is to be loaded with.
    pub(crate) fn guest_cr_write(&mut self, cr: u64, value: u64, insn: &Instruction) -> Exec<u64> {
        let c = &self.vmx.controls;
        let (exits, value) = match cr {
            0 => ((value ^ c.cr0_shadow) & c.cr0_mask != 0, mix(value, self.state.cr0, c.cr0_mask)),
            3 => (c.has_primary(primary::CR3_LOAD_EXITING) && !c.is_cr3_target(value), value),
            4 => ((value ^ c.cr4_shadow) & c.cr4_mask != 0, mix(value, self.state.cr4, c.cr4_mask)),
            8 => (c.has_primary(primary::CR8_LOAD_EXITING), value),
            _ => (false, value),
        };
        if exits {
            return Err(self.cr_exit(cr, cr_access::MOV_TO, insn.op1_register()));
        }
        Ok(value)
    }

    /// MOV from control register `cr`, which may cause a VM exit.
    pub(crate) fn exit_on_cr_read(&mut self, cr: u64, insn: &Instruction) -> Exec {
        let exits = match cr {
            3 => self.under_primary(primary::CR3_STORE_EXITING),
            8 => self.under_primary(primary::CR8_STORE_EXITING),
            _ => false,
        };
        if exits {
            return Err(self.cr_exit(cr, cr_access::MOV_FROM, insn.op0_register()));
        }
        Ok(())
    }

    #[cold]
    fn cr_exit(&mut self, cr: u64, access: u64, register: iced_x86::Register) -> crate::trap::Trap {
        let register = u64::from(information::number(register)) << cr_access::REGISTER_SHIFT;
        self.vm_exit(reason::CR_ACCESS, cr | access | register)
    }

    /// CR0 as MOV from CR0 and SMSW show it.
    pub(crate) fn shown_cr0(&self) -> u64 {
        let c = &self.vmx.controls;
        if self.non_root() { mix(self.state.cr0, c.cr0_shadow, c.cr0_mask) } else { self.state.cr0 }
    }

    /// CR4 as MOV from CR4 shows it.
    pub(crate) fn shown_cr4(&self) -> u64 {
        let c = &self.vmx.controls;
        if self.non_root() { mix(self.state.cr4, c.cr4_shadow, c.cr4_mask) } else { self.state.cr4 }
    }

    /// CLTS: a VM exit, or whether TS is cleared.
    pub(crate) fn guest_clts(&mut self) -> Exec<bool> {
        if !self.non_root() || self.vmx.controls.cr0_mask & cr0::TS == 0 {
            return Ok(true);
        }
        if self.vmx.controls.cr0_shadow & cr0::TS != 0 {
            return Err(self.vm_exit(reason::CR_ACCESS, cr_access::CLTS));
        }
        Ok(false)
    }

    /// LMSW of `value`: a VM exit, or the bits of CR0 that it may change.
    pub(crate) fn guest_lmsw(&mut self, value: u64, insn: &Instruction) -> Exec<u64> {
        if !self.non_root() {
            return Ok(u64::MAX);
        }
        let (mask, shadow) = (self.vmx.controls.cr0_mask, self.vmx.controls.cr0_shadow);
        let flags = (value ^ shadow) & mask & (cr0::MP | cr0::EM | cr0::TS);
        // PE can only be set.
        let protection = value & !shadow & mask & cr0::PE;
        if flags | protection == 0 {
            return Ok(!mask);
        }
        let source = (value & 0xffff) << cr_access::SOURCE_SHIFT;
        let memory = insn.op0_kind() == OpKind::Memory;
        let kind = if memory { cr_access::MEMORY } else { 0 };
        let linear = if memory { self.unchecked_linear(insn) } else { 0 };
        let trap = self.vm_exit(reason::CR_ACCESS, cr_access::LMSW | kind | source);
        self.vmx.exit.guest_linear = linear;
        Err(trap)
    }

    /// MOV of debug register `dr` from or to `register`.
    pub(crate) fn exit_on_mov_dr(&mut self, dr: u64, register: iced_x86::Register, from: bool) -> Exec {
        if !self.under_primary(primary::MOV_DR_EXITING) {
            return Ok(());
        }
        let register = u64::from(information::number(register)) << cr_access::REGISTER_SHIFT;
        Err(self.vm_exit(reason::MOV_DR, dr | if from { FROM_DR } else { 0 } | register))
    }

    /// The linear address of the memory operand, without any check.
    pub(crate) fn unchecked_linear(&self, insn: &Instruction) -> u64 {
        let segment = crate::interp::operands::memory_segment(insn);
        self.wrap(self.linear_base[segment as usize].wrapping_add(self.effective_address(insn)))
    }
}

/// `ours` where `mask` is clear, `theirs` where it is set.
fn mix(ours: u64, theirs: u64, mask: u64) -> u64 {
    ours & !mask | theirs & mask
}

impl super::Controls {
    fn is_cr3_target(&self, value: u64) -> bool {
        self.cr3_targets.iter().take(self.cr3_target_count as usize).any(|&target| target == value)
    }
}

/// Ports and MSRs, with their bitmaps.
impl Cpu {
    fn port_exits(&self, port: u16, size: usize) -> bool {
        let controls = &self.vmx.controls;
        if !controls.has_primary(primary::USE_IO_BITMAPS) {
            return controls.has_primary(primary::UNCONDITIONAL_IO_EXITING);
        }
        // An access that wraps around the I/O-port space always exits.
        let ports = u64::from(port)..u64::from(port) + size as u64;
        ports.end > 0x1_0000
            || ports.into_iter().any(|p| {
                let [a, b] = controls.io_bitmaps;
                self.bitmap_bit(if p < 0x8000 { a } else { b }, p & 0x7fff)
            })
    }

    fn port_qualification(access: PortAccess) -> u64 {
        (access.size as u64).wrapping_sub(1) & 7
            | if access.input { io_access::IN } else { 0 }
            | if access.immediate { io_access::IMMEDIATE } else { 0 }
            | u64::from(access.port) << io_access::PORT_SHIFT
    }

    /// IN and OUT.
    pub(crate) fn exit_on_port(&mut self, access: PortAccess) -> Exec {
        if self.non_root() && self.port_exits(access.port, access.size) {
            return Err(self.vm_exit(reason::IO_INSTRUCTION, Self::port_qualification(access)));
        }
        Ok(())
    }

    /// INS and OUTS, whose element is at `linear`. `information` has address size and segment.
    pub(crate) fn exit_on_string_port(
        &mut self,
        access: PortAccess,
        repeated: bool,
        linear: u64,
        information: u32,
    ) -> Exec {
        if !self.non_root() || !self.port_exits(access.port, access.size) {
            return Ok(());
        }
        let string = io_access::STRING | if repeated { io_access::REPEATED } else { 0 };
        let trap = self.vm_exit(reason::IO_INSTRUCTION, Self::port_qualification(access) | string);
        self.vmx.exit.guest_linear = linear;
        self.vmx.exit.instruction_information = information;
        Err(trap)
    }

    /// RDMSR and WRMSR.
    pub(crate) fn exit_on_msr(&mut self, msr: u32, write: bool) -> Exec {
        if !self.non_root() || !self.msr_exits(msr, write) {
            return Ok(());
        }
        Err(self.vm_exit(if write { reason::WRMSR } else { reason::RDMSR }, 0))
    }

    fn msr_exits(&self, msr: u32, write: bool) -> bool {
        let controls = &self.vmx.controls;
        if !controls.has_primary(primary::USE_MSR_BITMAPS) {
            return true;
        }
        let range = if msr < MSR_RANGE {
            0
        } else if msr.wrapping_sub(MSR_HIGH) < MSR_RANGE {
            MSR_HIGH_AT
        } else {
            return true;
        };
        let bitmap = controls.msr_bitmap.wrapping_add(range + if write { MSR_WRITE_AT } else { 0 });
        self.bitmap_bit(bitmap, u64::from(msr & (MSR_RANGE - 1)))
    }
}
