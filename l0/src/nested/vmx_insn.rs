//! VMX instructions of L1 (SDM volume 3, "VMX Instruction Reference"). The CPU has made the checks that raise exceptions
//! and has read the operands; here are the checks that end in VMfail, and the effects.

use ept_merge::Root;
use ept_merge::invalidate::Invalidation;
use turtles_cpu::Cpu;
use turtles_cpu::mmu::walk::PHYSICAL_BITS;
use turtles_cpu::vmx::Operation;
use vmcs_shadow::{Vmcs, region};
use x86defs::vmx::{ept_vpid_cap, insn_error, secondary};

use super::controls::{NO_VPID, vpid_tag};
use super::second_level::CombinedTables;
use super::{NO_POINTER, Nested};

/// How a VMX instruction fails.
enum Failure {
    /// VMfailInvalid.
    Invalid,
    /// VMfail with this error: VMfailInvalid where there is no current VMCS.
    Error(u32),
}

impl Failure {
    fn number(&self) -> Option<u32> {
        match *self {
            Self::Invalid => None,
            Self::Error(number) => Some(number),
        }
    }
}

type Done = Result<(), Failure>;

/// A pointer to a VMCS region is aligned and within the physical-address width.
pub fn is_region_address(pointer: u64) -> bool {
    pointer % region::SIZE as u64 == 0 && pointer >> PHYSICAL_BITS == 0
}

impl Nested {
    /// Ends an instruction: flags, and RIP past it.
    fn finish(&mut self, cpu: &mut Cpu, done: Done) {
        if let (Some(explainer), Err(failure)) = (&mut self.explainer, &done) {
            // What a VM entry's checks found has been told, with the rule.
            if !matches!(
                failure.number(),
                Some(insn_error::ENTRY_BAD_CONTROLS | insn_error::ENTRY_BAD_HOST_STATE)
            ) {
                explainer.instruction(cpu, failure.number());
            }
        }
        cpu.complete_instruction();
        match done {
            Ok(()) => cpu.vm_succeed(),
            Err(Failure::Error(number)) if cpu.vmx.current.is_some() => cpu.vm_fail_valid(number),
            Err(_) => cpu.vm_fail_invalid(),
        }
    }

    pub(super) fn fail(&mut self, cpu: &mut Cpu, number: u32) {
        self.finish(cpu, Err(Failure::Error(number)));
    }

    pub(super) fn fail_invalid(&mut self, cpu: &mut Cpu) {
        self.finish(cpu, Err(Failure::Invalid));
    }

    /// The first word of the region at `pointer`.
    pub(super) fn region_revision(cpu: &Cpu, pointer: u64) -> u32 {
        let mut word = [0; 4];
        cpu.memory().read(pointer, &mut word);
        u32::from_le_bytes(word)
    }

    pub(super) fn vmxon(&mut self, cpu: &mut Cpu) {
        if cpu.vmx.operation != Operation::Off {
            return self.fail(cpu, insn_error::VMXON_IN_ROOT);
        }
        let pointer = cpu.vmx.exit.operand;
        if !is_region_address(pointer) || !region::is_revision(Self::region_revision(cpu, pointer), false) {
            return self.fail_invalid(cpu);
        }
        self.vmxon_pointer = pointer;
        cpu.vmx.operation = Operation::Root;
        cpu.vmx.current = None;
        cpu.vmx.current_pointer = NO_POINTER;
        self.finish(cpu, Ok(()));
    }

    pub(super) fn vmxoff(&mut self, cpu: &mut Cpu) {
        self.store_current(cpu);
        self.vmxon_pointer = NO_POINTER;
        cpu.vmx.operation = Operation::Off;
        self.finish(cpu, Ok(()));
    }

    /// Writes the current VMCS back to its region; there is none afterwards.
    fn store_current(&mut self, cpu: &mut Cpu) {
        if let Some(vmcs) = cpu.vmx.current.take() {
            store(cpu, cpu.vmx.current_pointer, &vmcs, self.launched);
        }
        cpu.vmx.current_pointer = NO_POINTER;
    }

    pub(super) fn vmclear(&mut self, cpu: &mut Cpu) {
        let pointer = cpu.vmx.exit.operand;
        if !is_region_address(pointer) {
            return self.fail(cpu, insn_error::VMCLEAR_BAD_ADDRESS);
        }
        if pointer == self.vmxon_pointer {
            return self.fail(cpu, insn_error::VMCLEAR_VMXON_POINTER);
        }
        if pointer == cpu.vmx.current_pointer {
            self.launched = false;
            self.store_current(cpu);
        } else {
            let (vmcs, _) = load(cpu, pointer);
            store(cpu, pointer, &vmcs, false);
        }
        self.finish(cpu, Ok(()));
    }

    pub(super) fn vmptrld(&mut self, cpu: &mut Cpu) {
        let pointer = cpu.vmx.exit.operand;
        if !is_region_address(pointer) {
            return self.fail(cpu, insn_error::VMPTRLD_BAD_ADDRESS);
        }
        if pointer == self.vmxon_pointer {
            return self.fail(cpu, insn_error::VMPTRLD_VMXON_POINTER);
        }
        let word = Self::region_revision(cpu, pointer);
        let shadowing = self.capabilities.has_secondary(secondary::VMCS_SHADOWING);
        if !region::is_revision(word, shadowing) {
            return self.fail(cpu, insn_error::VMPTRLD_BAD_REVISION);
        }
        if pointer != cpu.vmx.current_pointer {
            self.store_current(cpu);
            let (vmcs, launched) = load(cpu, pointer);
            cpu.vmx.current = Some(Box::new(vmcs));
            cpu.vmx.current_pointer = pointer;
            self.launched = launched;
            self.current_is_shadow = word & region::SHADOW_INDICATOR != 0;
        }
        self.finish(cpu, Ok(()));
    }

    /// VMCALL in VMX root operation, where there is no dual-monitor treatment.
    pub(super) fn vmcall(&mut self, cpu: &mut Cpu) {
        self.fail(cpu, insn_error::VMCALL_IN_ROOT);
    }

    /// IA32_VMX_EPT_VPID_CAP has this bit.
    fn offers(&self, bit: u64) -> bool {
        self.capabilities.ept_vpid() & bit != 0
    }

    pub(super) fn invept(&mut self, cpu: &mut Cpu) {
        const SINGLE_CONTEXT: u64 = 1;
        const ALL_CONTEXTS: u64 = 2;
        let exit = cpu.vmx.exit;
        let type_bit = match exit.operand {
            SINGLE_CONTEXT => ept_vpid_cap::INVEPT_SINGLE,
            ALL_CONTEXTS => ept_vpid_cap::INVEPT_ALL,
            _ => 0,
        };
        let what = Invalidation::decode(exit.operand, exit.descriptor, &self.ept_capabilities());
        let Some(what) = what.filter(|_| self.offers(type_bit)) else {
            return self.fail(cpu, insn_error::INVALIDATION_BAD_OPERAND);
        };
        if let Some(tables) = tables(cpu) {
            match what {
                Invalidation::SingleContext(_) => tables.invalidate_context(exit.descriptor[0]),
                Invalidation::AllContexts => tables.invalidate_all(),
            }
        }
        cpu.invalidate(|tag| match what {
            Invalidation::SingleContext(table) => Root::table_of(tag.eptp) == table,
            Invalidation::AllContexts => tag.eptp != 0,
        });
        self.finish(cpu, Ok(()));
    }

    /// What EPT may look like.
    pub(super) fn ept_capabilities(&self) -> ept_merge::Capabilities {
        ept_merge::Capabilities::from_msr(self.capabilities.ept_vpid(), PHYSICAL_BITS)
    }

    pub(super) fn invvpid(&mut self, cpu: &mut Cpu) {
        const ADDRESS: u64 = 0;
        const SINGLE_CONTEXT: u64 = 1;
        const ALL_CONTEXTS: u64 = 2;
        const RETAINING_GLOBALS: u64 = 3;
        let exit = cpu.vmx.exit;
        let [low, linear] = exit.descriptor;
        let vpid = low as u16;
        let kind = exit.operand;
        let type_bit = match kind {
            ADDRESS => ept_vpid_cap::INVVPID_ADDRESS,
            SINGLE_CONTEXT => ept_vpid_cap::INVVPID_SINGLE,
            ALL_CONTEXTS => ept_vpid_cap::INVVPID_ALL,
            RETAINING_GLOBALS => ept_vpid_cap::INVVPID_SINGLE_NO_GLOBALS,
            _ => 0,
        };
        let bad = !self.offers(type_bit)
            || low >> 16 != 0
            || kind != ALL_CONTEXTS && vpid == 0
            || kind == ADDRESS && !cpu.is_canonical(linear);
        if bad {
            return self.fail(cpu, insn_error::INVALIDATION_BAD_OPERAND);
        }
        let tag = vpid_tag(vpid);
        match kind {
            ADDRESS => cpu.invalidate_page(linear, |t| t.vpid == tag),
            SINGLE_CONTEXT => cpu.invalidate(|t| t.vpid == tag),
            ALL_CONTEXTS => cpu.invalidate(|t| t.vpid != 0 && t.vpid != NO_VPID),
            RETAINING_GLOBALS => cpu.invalidate_non_global(|t| t.vpid == tag),
            _ => {}
        }
        self.finish(cpu, Ok(()));
    }
}

/// The combined tables, if any guest has used EPT.
pub(super) fn tables(cpu: &mut Cpu) -> Option<&mut CombinedTables> {
    cpu.vmx.second_level.as_mut()?.as_any().downcast_mut()
}

/// Reads the VMCS in the region at `pointer`.
pub(super) fn load(cpu: &Cpu, pointer: u64) -> (Vmcs, bool) {
    let mut bytes = [0; region::DATA_SIZE];
    cpu.memory().read(pointer.wrapping_add(region::DATA_OFFSET as u64), &mut bytes);
    region::decode(&bytes)
}

/// Writes a VMCS to its region, all but the revision and the abort indicator.
pub(super) fn store(cpu: &Cpu, pointer: u64, vmcs: &Vmcs, launched: bool) {
    let mut bytes = [0; region::DATA_SIZE];
    region::encode(vmcs, launched, &mut bytes);
    cpu.memory().write(pointer.wrapping_add(region::DATA_OFFSET as u64), &bytes);
}
