//! The VMX instructions ("VMX Instruction Reference"): their checks and operands. VMREAD, VMWRITE and VMPTRST are done
//! here, on [`crate::vmx::Vmx::current`]; all others are the owner's, who gets them as [`crate::Exit::Vm`].

use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use vmcs_shadow::Field;
use x86defs::vmx::{feature_control, reason, secondary};
use x86defs::{cr0, cr4, rflags};

use super::operands::offset_of;
use crate::Cpu;
use crate::decode::cold;
use crate::op::{Cold, ColdHandler, Handler, Op};
use crate::state::reg;
use crate::trap::{Exec, Fault, Trap};
use crate::vmx::{FailedAccess, Operation, information};

/// How this family executes `insn`, if it is its own.
pub(crate) fn lower(insn: &Instruction) -> Option<ColdHandler> {
    Some(match insn.mnemonic() {
        Mnemonic::Vmread => vmread,
        Mnemonic::Vmwrite => vmwrite,
        Mnemonic::Vmptrst => vmptrst,
        Mnemonic::Vmptrld => |cpu, cold| with_pointer(cpu, cold, reason::VMPTRLD),
        Mnemonic::Vmclear => |cpu, cold| with_pointer(cpu, cold, reason::VMCLEAR),
        Mnemonic::Vmlaunch => |cpu, cold| without_operand(cpu, cold, reason::VMLAUNCH),
        Mnemonic::Vmresume => |cpu, cold| without_operand(cpu, cold, reason::VMRESUME),
        Mnemonic::Vmxoff => |cpu, cold| without_operand(cpu, cold, reason::VMXOFF),
        Mnemonic::Vmxon => vmxon,
        Mnemonic::Vmcall => vmcall,
        Mnemonic::Vmfunc => vmfunc,
        Mnemonic::Invept => |cpu, cold| invalidate(cpu, cold, reason::INVEPT),
        Mnemonic::Invvpid => |cpu, cold| invalidate(cpu, cold, reason::INVVPID),
        _ => return None,
    })
}

/// VMREAD, VMWRITE and VMPTRST change nothing that the next instruction's execution depends on.
pub(crate) fn ends_block(insn: &Instruction) -> bool {
    !matches!(insn.mnemonic(), Mnemonic::Vmread | Mnemonic::Vmwrite | Mnemonic::Vmptrst)
}

/// VMREAD and VMWRITE of a register, which hypervisors execute a dozen times for each VM exit, by their own hypervisor in
/// 64-bit mode; everything else goes the long way.
pub(crate) fn shortcut(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    let handler: Handler = match insn.code() {
        Code::Vmread_rm64_r64 => vmread_register,
        Code::Vmwrite_r64_rm64 => vmwrite_register,
        _ => return None,
    };
    (op.dst, _) = offset_of(insn.op0_register())?;
    (op.src, _) = offset_of(insn.op1_register())?;
    Some(handler)
}

/// In root operation at CPL 0. (The handlers above are 64-bit mode's.)
#[inline(always)]
fn in_root(cpu: &Cpu) -> bool {
    cpu.vmx.operation == Operation::Root && cpu.state.cpl == 0
}

fn vmread_register(cpu: &mut Cpu, op: &Op) -> Exec {
    if let (true, Some(vmcs)) = (in_root(cpu), &cpu.vmx.current) {
        if let Ok(value) = cpu.vmx.access.read(vmcs, cpu.reg(op.src)) {
            cpu.set_reg(op.dst, value);
            cpu.vm_succeed();
            return Ok(());
        }
    }
    cold(cpu, op)
}

fn vmwrite_register(cpu: &mut Cpu, op: &Op) -> Exec {
    let (encoding, value) = (cpu.reg(op.dst), cpu.reg(op.src));
    if let (true, Some(vmcs)) = (in_root(cpu), &mut cpu.vmx.current) {
        if cpu.vmx.access.write(vmcs, encoding, value).is_ok() {
            cpu.vm_succeed();
            return Ok(());
        }
    }
    cold(cpu, op)
}

/// CR0 bits that must be set in VMX operation (IA32_VMX_CR0_FIXED0).
const CR0_FIXED: u64 = cr0::PE | cr0::NE | cr0::PG;
/// Entries of the EPTP list.
const EPTP_LIST_ENTRIES: u32 = 512;

/// The conventions of VMX instructions ("Conventions").
impl Cpu {
    fn set_vmx_status(&mut self, flags: u64) {
        self.state.set_status(flags);
    }

    /// VMsucceed.
    pub fn vm_succeed(&mut self) {
        self.set_vmx_status(0);
    }

    /// VMfailInvalid.
    pub fn vm_fail_invalid(&mut self) {
        self.set_vmx_status(rflags::CF);
    }

    /// VMfailValid(`error`); VMfailInvalid without a current VMCS.
    pub fn vm_fail_valid(&mut self, error: u32) {
        match &mut self.vmx.current {
            Some(vmcs) => {
                vmcs.set(Field::InstructionError, u64::from(error));
                self.set_vmx_status(rflags::ZF);
            }
            None => self.vm_fail_invalid(),
        }
    }

    /// #UD in the modes that have no VMX instructions, and outside VMX operation.
    fn check_vmx_mode(&mut self) -> Exec {
        let mode = self.state.protected() && !self.state.v86();
        let compatibility = self.state.long_mode() && self.code_bits != 64;
        if self.vmx.operation == Operation::Off || !mode || compatibility {
            return Err(self.raise(Fault::ud()));
        }
        Ok(())
    }

    /// Operand size of VMX instructions: 64 bits in 64-bit mode, else 32.
    fn vmx_width(&self) -> usize {
        if self.code_bits == 64 { 8 } else { 4 }
    }

    /// The checks common to VMX instructions: #UD, VM exit in non-root operation, #GP(0).
    fn vmx_checks(&mut self, insn: &Instruction, reason: u32) -> Exec {
        self.check_vmx_mode()?;
        if self.vmx.operation == Operation::NonRoot {
            return Err(self.vmx_instruction_exit(insn, reason));
        }
        self.require_cpl0()
    }

    /// The VM exit of a VMX instruction, with what it says of the operands.
    #[cold]
    fn vmx_instruction_exit(&mut self, insn: &Instruction, reason: u32) -> Trap {
        let qualification = self.displacement(insn);
        let trap = self.vm_exit(reason, qualification);
        self.vmx.exit.instruction_information = match insn.mnemonic() {
            Mnemonic::Vmread => information::operand(insn, 0) | information::second(insn.op1_register()),
            Mnemonic::Vmwrite => information::operand(insn, 1) | information::second(insn.op0_register()),
            Mnemonic::Invept | Mnemonic::Invvpid => {
                information::memory(insn) | information::second(insn.op0_register())
            }
            Mnemonic::Vmclear | Mnemonic::Vmptrld | Mnemonic::Vmptrst | Mnemonic::Vmxon => {
                information::memory(insn)
            }
            _ => 0,
        };
        trap
    }

    /// Hands a VMX instruction of root operation to the owner.
    fn hand_over(&mut self, reason: u32, operand: u64, descriptor: [u64; 2]) -> Exec {
        let trap = self.vm_exit(reason, 0);
        self.vmx.exit.operand = operand;
        self.vmx.exit.descriptor = descriptor;
        Err(trap)
    }

    /// The 64-bit memory operand of VMXON, VMPTRLD and VMCLEAR.
    fn vmx_pointer(&mut self, insn: &Instruction) -> Exec<u64> {
        let linear = self.operand_linear(insn, 8, false)?;
        self.load::<u64>(linear)
    }

    /// The checks of VMREAD and VMWRITE of field `encoding`, up to the privilege level's. In non-root operation the VMCS
    /// of the link pointer is reached if VMCS shadowing says so ("VMREAD", "VMWRITE": the bitmaps).
    fn check_field_access(&mut self, insn: &Instruction, encoding: u64, reason: u32) -> Exec {
        self.check_vmx_mode()?;
        if self.vmx.operation == Operation::NonRoot {
            let controls = &self.vmx.controls;
            let bitmap =
                if reason == reason::VMREAD { controls.vmread_bitmap } else { controls.vmwrite_bitmap };
            let shadowed = controls.has_secondary(secondary::VMCS_SHADOWING)
                && encoding >> 15 == 0
                && !self.bitmap_bit(bitmap, encoding);
            if !shadowed {
                return Err(self.vmx_instruction_exit(insn, reason));
            }
        }
        self.require_cpl0()
    }

    /// VMREAD or VMWRITE fails, and is remembered for who asks why.
    #[cold]
    fn field_access_failed(&mut self, reason: u32, encoding: u64, error: u32) {
        self.vmx.failed_access = Some(FailedAccess { reason, encoding, error, rip: self.block_ip() });
        self.vm_fail_valid(error);
    }

    /// Bit `index` of the bitmap at physical address `bitmap`.
    pub(crate) fn bitmap_bit(&self, bitmap: u64, index: u64) -> bool {
        let mut byte = [0];
        self.memory.read(bitmap.wrapping_add(index / 8), &mut byte);
        byte[0] >> (index % 8) & 1 != 0
    }
}

/// The register operand with a field's encoding.
fn field_register(cpu: &Cpu, cold: &Cold, index: u32) -> u64 {
    cpu.read_register(cold.insn.op_register(index))
}

fn vmread(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let encoding = field_register(cpu, cold, 1);
    cpu.check_field_access(&cold.insn, encoding, reason::VMREAD)?;
    let Some(vmcs) = &cpu.vmx.current else {
        cpu.vm_fail_invalid();
        return Ok(());
    };
    match cpu.vmx.access.read(vmcs, encoding) {
        Ok(value) => {
            let width = cpu.vmx_width();
            cpu.write_operand(cold, 0, width, value)?;
            cpu.vm_succeed();
        }
        Err(error) => cpu.field_access_failed(reason::VMREAD, encoding, error),
    }
    Ok(())
}

fn vmwrite(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let encoding = field_register(cpu, cold, 0);
    cpu.check_field_access(&cold.insn, encoding, reason::VMWRITE)?;
    if cpu.vmx.current.is_none() {
        cpu.vm_fail_invalid();
        return Ok(());
    }
    let value = cpu.read_operand(cold, 1, cpu.vmx_width())?;
    let vmx = &mut cpu.vmx;
    let done = vmx.current.as_mut().map_or(Ok(()), |vmcs| vmx.access.write(vmcs, encoding, value));
    match done {
        Ok(()) => cpu.vm_succeed(),
        Err(error) => cpu.field_access_failed(reason::VMWRITE, encoding, error),
    }
    Ok(())
}

fn vmptrst(cpu: &mut Cpu, cold: &Cold) -> Exec {
    cpu.vmx_checks(&cold.insn, reason::VMPTRST)?;
    let linear = cpu.operand_linear(&cold.insn, 8, true)?;
    cpu.store::<u64>(linear, cpu.vmx.current_pointer)?;
    cpu.vm_succeed();
    Ok(())
}

/// VMPTRLD and VMCLEAR.
fn with_pointer(cpu: &mut Cpu, cold: &Cold, reason: u32) -> Exec {
    cpu.vmx_checks(&cold.insn, reason)?;
    let pointer = cpu.vmx_pointer(&cold.insn)?;
    cpu.hand_over(reason, pointer, [0; 2])
}

/// VMLAUNCH, VMRESUME and VMXOFF.
fn without_operand(cpu: &mut Cpu, cold: &Cold, reason: u32) -> Exec {
    cpu.vmx_checks(&cold.insn, reason)?;
    cpu.hand_over(reason, 0, [0; 2])
}

fn vmxon(cpu: &mut Cpu, cold: &Cold) -> Exec {
    if cpu.vmx.operation != Operation::Off {
        cpu.vmx_checks(&cold.insn, reason::VMXON)?;
        // It fails whatever the operand is, which is not read.
        return cpu.hand_over(reason::VMXON, 0, [0; 2]);
    }
    let s = &cpu.state;
    let compatibility = s.long_mode() && cpu.code_bits != 64;
    if !s.protected() || s.v86() || compatibility || s.cr4 & cr4::VMXE == 0 {
        return Err(cpu.raise(Fault::ud()));
    }
    let enabled = feature_control::LOCK | feature_control::VMX_OUTSIDE_SMX;
    let allowed = s.cpl == 0 && s.cr0 & CR0_FIXED == CR0_FIXED && s.msrs.feature_control & enabled == enabled;
    if !allowed {
        return Err(cpu.raise(Fault::gp(0)));
    }
    let pointer = cpu.vmx_pointer(&cold.insn)?;
    cpu.hand_over(reason::VMXON, pointer, [0; 2])
}

fn vmcall(cpu: &mut Cpu, cold: &Cold) -> Exec {
    match cpu.vmx.operation {
        Operation::Off => Err(cpu.raise(Fault::ud())),
        // In every mode and at every privilege level.
        Operation::NonRoot => Err(cpu.vmx_instruction_exit(&cold.insn, reason::VMCALL)),
        Operation::Root => without_operand(cpu, cold, reason::VMCALL),
    }
}

/// INVEPT and INVVPID.
fn invalidate(cpu: &mut Cpu, cold: &Cold, reason: u32) -> Exec {
    let access = &cpu.vmx.access;
    let offered = if reason == reason::INVEPT { access.invept } else { access.invvpid };
    if !offered {
        return Err(cpu.raise(Fault::ud()));
    }
    cpu.vmx_checks(&cold.insn, reason)?;
    let kind = cpu.read_register(cold.insn.op0_register());
    let exists = if reason == reason::INVEPT { matches!(kind, 1 | 2) } else { kind <= 3 };
    let mut descriptor = [0; 2];
    // A type that does not exist fails before the descriptor is read.
    if exists {
        debug_assert_eq!(cold.insn.op1_kind(), OpKind::Memory);
        let linear = cpu.operand_linear(&cold.insn, 16, false)?;
        descriptor[0] = cpu.load::<u64>(linear)?;
        descriptor[1] = cpu.load::<u64>(cpu.wrap(linear.wrapping_add(8)))?;
    }
    cpu.hand_over(reason, kind, descriptor)
}

/// "VM Functions": leaf 0, EPTP switching. Allowed at every privilege level.
fn vmfunc(cpu: &mut Cpu, _: &Cold) -> Exec {
    let leaf = cpu.state.gpr.get(reg::RAX) as u32;
    let enabled = cpu.vmx.operation == Operation::NonRoot
        && cpu.vmx.controls.has_secondary(secondary::ENABLE_VMFUNC)
        && leaf < 64;
    if !enabled {
        return Err(cpu.raise(Fault::ud()));
    }
    let offered = cpu.vmx.controls.vm_function_controls >> leaf & 1 != 0;
    let entry = cpu.state.gpr.get(reg::RCX) as u32;
    if !offered || leaf != 0 || entry >= EPTP_LIST_ENTRIES || !cpu.switch_eptp(entry) {
        return Err(cpu.vm_exit(reason::VMFUNC, 0));
    }
    Ok(())
}

impl Cpu {
    /// EPTP switching; false if the list's entry is none that a VM entry would take.
    fn switch_eptp(&mut self, entry: u32) -> bool {
        let mut bytes = [0; 8];
        self.memory.read(self.vmx.controls.eptp_list.wrapping_add(u64::from(entry) * 8), &mut bytes);
        let pointer = u64::from_le_bytes(bytes);
        if !self.vmx.second_level.as_mut().is_some_and(|second| second.set_root(pointer)) {
            return false;
        }
        self.vmx.controls.ept_pointer = pointer;
        if self.vmx.controls.has_secondary(secondary::EPT_VIOLATION_VE) {
            self.vmx.controls.eptp_index = entry as u16;
        }
        self.refresh_space();
        true
    }
}
