//! Instructions that cause VM exits.

use iced_x86::code_asm::*;
use turtles_cpu::vmx::{Controls, VmExit};
use x86defs::vmx::{primary as p, reason, secondary as s};

use crate::guest::{exit_of, long, primary, secondary};
use crate::machine::*;

type Program = fn(&mut CodeAssembler);

#[test]
fn unconditional_and_conditional_exits() {
    let cases: &[(Program, Controls, u32, u32)] = &[
        (|a| a.cpuid().unwrap(), primary(0), reason::CPUID, 2),
        (|a| a.invd().unwrap(), primary(0), reason::INVD, 2),
        (|a| a.vmcall().unwrap(), primary(0), reason::VMCALL, 3),
        (|a| a.vmlaunch().unwrap(), primary(0), reason::VMLAUNCH, 3),
        (|a| a.hlt().unwrap(), primary(p::HLT_EXITING), reason::HLT, 1),
        (|a| a.pause().unwrap(), primary(p::PAUSE_EXITING), reason::PAUSE, 2),
        (|a| a.rdtsc().unwrap(), primary(p::RDTSC_EXITING), reason::RDTSC, 2),
        (|a| a.rdpmc().unwrap(), primary(p::RDPMC_EXITING), reason::RDPMC, 2),
        (|a| a.wbinvd().unwrap(), secondary(s::WBINVD_EXITING), reason::WBINVD, 2),
        (|a| a.wbnoinvd().unwrap(), secondary(s::WBINVD_EXITING), reason::WBINVD, 3),
        (|a| a.rdmsr().unwrap(), primary(0), reason::RDMSR, 2),
        (|a| a.wrmsr().unwrap(), primary(0), reason::WRMSR, 2),
    ];
    for (program, controls, reason, length) in cases {
        let mut m = long(controls.clone());
        let exit = exit_of(&mut m, *program);
        let expected = VmExit { reason: *reason, instruction_length: *length, ..VmExit::default() };
        assert_eq!(exit, expected, "{}", reason::name(expected.reason));
        assert_eq!(m.cpu.state.rip, CODE);
    }
}
