//! A machine in non-root operation.

use iced_x86::code_asm::CodeAssembler;
use turtles_cpu::Exit;
use turtles_cpu::vmx::{Controls, Operation, VmExit};
use x86defs::{cr0, cr4};

use crate::machine::Machine;

/// In non-root operation under `controls`.
pub fn non_root(machine: Machine, controls: Controls) -> Machine {
    let mut m = machine.with(|s| {
        s.cr0 |= cr0::NE;
        s.cr4 |= cr4::VMXE;
    });
    m.cpu.vmx.operation = Operation::Root;
    m.cpu.enter_non_root(controls);
    m
}

/// 64-bit code at CPL 0.
pub fn long(controls: Controls) -> Machine {
    non_root(Machine::long(), controls)
}

/// No controls but these primary ones.
pub fn primary(bits: u32) -> Controls {
    Controls { primary: bits, vpid_tag: 1, ..Controls::default() }
}

/// No controls but these secondary ones.
pub fn secondary(bits: u32) -> Controls {
    Controls { secondary: bits, ..primary(x86defs::vmx::primary::ACTIVATE_SECONDARY) }
}

/// Runs to a VM exit.
pub fn exit(m: &mut Machine) -> VmExit {
    assert_eq!(m.cpu.run(1000), Exit::Vm, "at {:#x}", m.cpu.state.rip);
    m.cpu.vmx.exit
}

/// The VM exit of a program.
pub fn exit_of(m: &mut Machine, program: impl FnOnce(&mut CodeAssembler)) -> VmExit {
    m.asm(program);
    exit(m)
}
