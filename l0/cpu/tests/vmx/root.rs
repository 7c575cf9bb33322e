//! VMX instructions outside non-root operation.

use iced_x86::code_asm::*;
use turtles_cpu::Exit;
use turtles_cpu::state::reg;
use turtles_cpu::vmx::{Operation, VmExit};
use vmcs_shadow::{Field, Vmcs};
use x86defs::vmx::{insn_error, reason};
use x86defs::{cr0, cr4, rflags};

use crate::guest::exit_of;
use crate::instructions::Program;
use crate::machine::*;

const UD: u64 = 6;
const GP: u64 = 13;

/// A hypervisor: in root operation, with a current VMCS.
fn root() -> Machine {
    let mut m = off();
    m.cpu.vmx.operation = Operation::Root;
    m.cpu.vmx.current = Some(Box::default());
    m.cpu.vmx.current_pointer = 0x1234_5000;
    m
}

/// Ready for VMXON.
fn off() -> Machine {
    Machine::long().with(|s| {
        s.cr0 |= cr0::NE;
        s.cr4 |= cr4::VMXE;
        s.msrs.feature_control = 5;
        s.gpr.set(reg::RSI, DATA);
    })
}

const ALL: &[Program] = &[
    |a| a.vmcall().unwrap(),
    |a| a.vmlaunch().unwrap(),
    |a| a.vmresume().unwrap(),
    |a| a.vmxoff().unwrap(),
    |a| a.vmclear(qword_ptr(rsi)).unwrap(),
    |a| a.vmptrld(qword_ptr(rsi)).unwrap(),
    |a| a.vmptrst(qword_ptr(rsi)).unwrap(),
    |a| a.vmread(rax, rbx).unwrap(),
    |a| a.vmwrite(rax, rbx).unwrap(),
    |a| a.invept(rax, xmmword_ptr(rsi)).unwrap(),
    |a| a.invvpid(rax, xmmword_ptr(rsi)).unwrap(),
];

fn vector_of(mut m: Machine, program: Program) -> u64 {
    m.asm(program);
    m.vector()
}

#[test]
fn outside_vmx_operation_they_are_undefined() {
    for program in ALL {
        assert_eq!(vector_of(off(), *program), UD);
    }
    for operation in [Operation::Off, Operation::Root] {
        let mut m = root();
        m.cpu.vmx.operation = operation;
        assert_eq!(vector_of(m, |a| a.vmfunc().unwrap()), UD);
    }
}

#[test]
fn they_need_privilege_and_a_proper_mode() {
    for program in ALL {
        let mut m = root();
        m.enter(UCODE64, CODE64, UDATA, 3);
        assert_eq!(vector_of(m, *program), GP);
        // Compatibility mode. (None of these encodings has a REX prefix that would mean something else.)
        let mut m = root();
        m.enter(FREE, CODE32, KDATA, 0);
        m.gdt(FREE, descriptor(0, 0xf_ffff, CODE32));
        m.asm_at(CODE, CODE, 64, program);
        assert_eq!(m.vector(), UD);
    }
}

#[test]
fn the_owner_gets_them_with_their_operands() {
    let pointer = 0xdead_beef_1234_5678;
    let cases: &[(Program, u32, u32, u64)] = &[
        (|a| a.vmcall().unwrap(), reason::VMCALL, 3, 0),
        (|a| a.vmlaunch().unwrap(), reason::VMLAUNCH, 3, 0),
        (|a| a.vmresume().unwrap(), reason::VMRESUME, 3, 0),
        (|a| a.vmxoff().unwrap(), reason::VMXOFF, 3, 0),
        (|a| a.vmclear(qword_ptr(rsi)).unwrap(), reason::VMCLEAR, 4, pointer),
        (|a| a.vmptrld(qword_ptr(rsi)).unwrap(), reason::VMPTRLD, 3, pointer),
        // In root operation VMXON's operand is not read.
        (|a| a.vmxon(qword_ptr(rsi)).unwrap(), reason::VMXON, 4, 0),
    ];
    for (program, reason, length, operand) in cases {
        let mut m = root();
        m.put64(DATA, pointer);
        let exit = exit_of(&mut m, *program);
        let expected =
            VmExit { reason: *reason, instruction_length: *length, operand: *operand, ..VmExit::default() };
        assert_eq!(exit, expected);
        assert_eq!(m.cpu.state.rip, CODE);
        m.cpu.complete_instruction();
        assert_eq!(m.cpu.state.rip, CODE + u64::from(*length));
    }
}

#[test]
fn invalidations_bring_type_and_descriptor() {
    for (kind, read) in [(1, true), (2, true), (0, false), (3, false), (1 << 32 | 1, false)] {
        let mut m = root();
        m.put64(DATA, 0x1111);
        m.put64(DATA + 8, 0x2222);
        m.set(reg::RAX, kind);
        let exit = exit_of(&mut m, |a| a.invept(rax, xmmword_ptr(rsi)).unwrap());
        assert_eq!((exit.reason, exit.operand), (reason::INVEPT, kind));
        assert_eq!(exit.descriptor, if read { [0x1111, 0x2222] } else { [0; 2] });
    }
    let mut m = root();
    m.put64(DATA + 8, 0x2222);
    m.set(reg::RAX, 0);
    let exit = exit_of(&mut m, |a| a.invvpid(rax, xmmword_ptr(rsi)).unwrap());
    assert_eq!((exit.reason, exit.operand, exit.descriptor), (reason::INVVPID, 0, [0, 0x2222]));
    // The descriptor of a type that does not exist is not read.
    let mut m = root();
    m.set(reg::RSI, 1 << 40);
    m.set(reg::RAX, 7);
    exit_of(&mut m, |a| a.invvpid(rax, xmmword_ptr(rsi)).unwrap());
}

#[test]
fn operand_faults() {
    let programs: &[Program] = &[
        |a| a.vmclear(qword_ptr(rsi)).unwrap(),
        |a| a.vmptrld(qword_ptr(rsi)).unwrap(),
        |a| a.vmptrst(qword_ptr(rsi)).unwrap(),
        |a| a.vmread(qword_ptr(rsi), rbx).unwrap(),
        |a| a.vmwrite(rbx, qword_ptr(rsi)).unwrap(),
        |a| a.invept(rax, xmmword_ptr(rsi)).unwrap(),
    ];
    for program in programs {
        let mut m = root();
        m.set(reg::RSI, 1 << 40);
        m.set(reg::RAX, 1);
        assert_eq!(vector_of(m, *program), 14);
        let mut m = root();
        m.set(reg::RSI, 1 << 60);
        m.set(reg::RAX, 1);
        assert_eq!(vector_of(m, *program), GP);
    }
}

#[test]
fn vmxon_checks() {
    let program: Program = |a| a.vmxon(qword_ptr(rsi)).unwrap();
    let mut m = off();
    m.put64(DATA, 0x7000);
    let exit = exit_of(&mut m, program);
    assert_eq!((exit.reason, exit.operand), (reason::VMXON, 0x7000));
    assert_eq!(vector_of(off().with(|s| s.cr4 &= !cr4::VMXE), program), UD);
    assert_eq!(vector_of(off().with(|s| s.cr0 &= !cr0::NE), program), GP);
    for feature_control in [0, 1, 4] {
        assert_eq!(vector_of(off().with(|s| s.msrs.feature_control = feature_control), program), GP);
    }
    let mut m = off();
    m.enter(UCODE64, CODE64, UDATA, 3);
    assert_eq!(vector_of(m, program), GP);
    // Protected mode without paging is not enough.
    let m = Machine::protected().with(|s| {
        s.cr0 |= cr0::NE;
        s.cr4 |= cr4::VMXE;
        s.msrs.feature_control = 5;
        s.gpr.set(reg::RSI, DATA);
    });
    assert_eq!(vector_of(m, |a| a.vmxon(qword_ptr(esi)).unwrap()), GP);
    // #GP comes before the operand's fault.
    let m = off().with(|s| {
        s.msrs.feature_control = 0;
        s.gpr.set(reg::RSI, 1 << 40);
    });
    assert_eq!(vector_of(m, program), GP);
    assert_eq!(vector_of(off().with(|s| s.gpr.set(reg::RSI, 1 << 40)), program), 14);
}

#[test]
fn in_root_operation_control_registers_keep_their_fixed_bits() {
    for (value, faults) in
        [(cr0::PE | cr0::PG | cr0::NE, false), (cr0::PE | cr0::PG, true), (cr0::PE | cr0::NE, true)]
    {
        let mut m = root();
        m.set(reg::RAX, value);
        m.asm(|a| {
            a.mov(cr0, rax).unwrap();
            a.hlt().unwrap();
        });
        m.run();
        assert_eq!(m.cpu.state.rip == HANDLERS + 16 * GP + 1, faults);
    }
    let mut m = root();
    m.set(reg::RAX, cr4::PAE);
    assert_eq!(vector_of(m, |a| a.mov(cr4, rax).unwrap()), GP);
}

fn status(m: &Machine) -> u64 {
    m.cpu.state.rflags() & rflags::STATUS
}

#[test]
fn vmread_and_vmwrite() {
    let mut m = root().with(|s| s.set_rflags(rflags::STATUS));
    m.set(reg::RAX, 0x681e);
    m.set(reg::RBX, 0x1122_3344_5566_7788);
    m.asm(|a| {
        a.vmwrite(rax, rbx).unwrap();
        a.vmread(rcx, rax).unwrap();
        a.vmread(qword_ptr(rsi), rax).unwrap();
        a.mov(edx, 0x4004).unwrap();
        a.vmwrite(rdx, qword_ptr(rsi)).unwrap();
        a.vmread(rdi, rdx).unwrap();
        a.vmptrst(qword_ptr(rsi + 8)).unwrap();
        a.hlt().unwrap();
    });
    m.run();
    assert_eq!((m.reg(reg::RCX), m.get(DATA, 8)), (0x1122_3344_5566_7788, 0x1122_3344_5566_7788));
    assert_eq!(m.reg(reg::RDI), 0x5566_7788);
    assert_eq!(m.get(DATA + 8, 8), 0x1234_5000);
    assert_eq!(status(&m), 0);
    let vmcs = m.cpu.vmx.current.as_ref().unwrap();
    assert_eq!(vmcs.get(Field::GuestRip), 0x1122_3344_5566_7788);
}

#[test]
fn vmread_and_vmwrite_outside_64_bit_mode_are_32_bits_wide() {
    let mut m = Machine::protected();
    m.cpu.vmx.operation = Operation::Root;
    m.cpu.vmx.current = Some(Box::default());
    m.set(reg::RAX, 0x681e);
    m.set(reg::RBX, 0xffff_ffff_5566_7788);
    m.asm(|a| {
        a.vmwrite(eax, ebx).unwrap();
        a.vmread(dword_ptr(DATA), eax).unwrap();
        a.hlt().unwrap();
    });
    m.put64(DATA, u64::MAX);
    m.run();
    assert_eq!(m.cpu.vmx.current.as_ref().unwrap().get(Field::GuestRip), 0x5566_7788);
    assert_eq!(m.get(DATA, 8), 0xffff_ffff_5566_7788);
}

#[test]
fn vmread_and_vmwrite_fail() {
    // (encoding, VMWRITE, error)
    for (encoding, write, error) in [
        (0x6880u64, false, insn_error::BAD_FIELD),
        (0x6880, true, insn_error::BAD_FIELD),
        (1 << 32 | 0x681e, false, insn_error::BAD_FIELD),
    ] {
        let mut m = root();
        m.set(reg::RAX, encoding);
        m.set(reg::RCX, 77);
        m.asm(|a| {
            if write {
                a.vmwrite(rax, rcx).unwrap()
            } else {
                a.vmread(rcx, rax).unwrap()
            }
            a.hlt().unwrap();
        });
        m.run();
        assert_eq!((status(&m), m.reg(reg::RCX)), (rflags::ZF, 77));
        let vmcs = m.cpu.vmx.current.as_ref().unwrap();
        assert_eq!(vmcs.get32(Field::InstructionError), error);
    }
    for write in [false, true] {
        let mut m = root();
        m.cpu.vmx.current = None;
        m.set(reg::RAX, 0x681e);
        // Without a current VMCS a memory operand is not even looked at.
        m.set(reg::RSI, 1 << 40);
        m.asm(|a| {
            if write {
                a.vmwrite(rax, qword_ptr(rsi)).unwrap()
            } else {
                a.vmread(qword_ptr(rsi), rax).unwrap()
            }
            a.hlt().unwrap();
        });
        m.run();
        assert_eq!(status(&m), rflags::CF);
    }
}

#[test]
fn results() {
    let mut m = root().with(|s| s.set_rflags(rflags::STATUS | rflags::IF));
    m.cpu.vm_succeed();
    assert_eq!(m.cpu.state.rflags(), rflags::IF | 2);
    m.cpu.vm_fail_invalid();
    assert_eq!(m.cpu.state.rflags(), rflags::IF | rflags::CF | 2);
    m.cpu.vm_fail_valid(insn_error::VMCALL_IN_ROOT);
    assert_eq!(m.cpu.state.rflags(), rflags::IF | rflags::ZF | 2);
    assert_eq!(m.cpu.vmx.current.as_ref().unwrap().get(Field::InstructionError), 1);
    m.cpu.vmx.current = None;
    m.cpu.vm_fail_valid(insn_error::VMCALL_IN_ROOT);
    assert_eq!(status(&m), rflags::CF);
}

#[test]
fn completion_and_injection() {
    // A completed instruction ends its shadow, and traps under TF.
    let mut m = root().with(|s| s.set_rflags(rflags::TF));
    m.asm(|a| {
        a.vmxoff().unwrap();
        a.nop().unwrap();
    });
    assert_eq!(m.cpu.run(100), Exit::Vm);
    m.cpu.complete_instruction();
    assert_eq!(m.vector(), 1);
    assert_eq!(m.stack(0), CODE + 3);
    assert_ne!(m.cpu.state.dr6 & 1 << 14, 0);
    // An injected fault is as if the instruction had raised it.
    let mut m = root();
    exit_of(&mut m, |a| a.vmxoff().unwrap());
    m.cpu.inject_fault(turtles_cpu::trap::Fault::page(0x1234, 2));
    assert_eq!(m.fault(), (14, 2));
    assert_eq!((m.stack(1), m.stack(3), m.cpu.state.cr2), (CODE, rflags::RF | 2, 0x1234));
}

#[test]
fn vmcs_shadowing() {
    use crate::guest::{exit, long, secondary};
    use turtles_cpu::vmx::Controls;
    use x86defs::vmx::secondary as s;
    let bitmaps = (DATA & !4095, (DATA & !4095) + 0x1000);
    let controls =
        Controls { vmread_bitmap: bitmaps.0, vmwrite_bitmap: bitmaps.1, ..secondary(s::VMCS_SHADOWING) };
    let machine = |read: u8, write: u8| {
        let mut m = long(controls.clone());
        m.put(bitmaps.0, &[0; 0x2000]);
        m.put(bitmaps.0 + 0x681e / 8, &[read]);
        m.put(bitmaps.1 + 0x681e / 8, &[write]);
        m.set(reg::RAX, 0x681e);
        m.set(reg::RBX, 9);
        m.cpu.vmx.current = Some(Box::new(Vmcs::default()));
        m
    };
    let both: Program = |a| {
        a.vmwrite(rax, rbx).unwrap();
        a.vmread(rcx, rax).unwrap();
        a.hlt().unwrap();
    };
    let mut m = machine(!0x40, !0x40);
    m.asm(both);
    m.run();
    assert_eq!((m.reg(reg::RCX), status(&m)), (9, 0));
    let mut m = machine(0, 0x40);
    assert_eq!(exit_of(&mut m, both).reason, reason::VMWRITE);
    let mut m = machine(0x40, 0);
    assert_eq!(exit_of(&mut m, both).reason, reason::VMREAD);
    assert_eq!(m.cpu.state.rip, CODE + 3);
    // Bits above 14 of the encoding always exit.
    let mut m = machine(0, 0);
    m.set(reg::RAX, 0x8000_681e);
    m.asm(both);
    assert_eq!(exit(&mut m).reason, reason::VMWRITE);
    // Privilege comes after the VM exit, before the access.
    let mut m = crate::guest::non_root(Machine::long().user(), controls.clone());
    m.put(bitmaps.0, &[0; 0x2000]);
    m.set(reg::RAX, 0x681e);
    m.asm(both);
    assert_eq!(m.vector(), GP);
    // No VMCS behind the link pointer.
    let mut m = machine(0, 0);
    m.cpu.vmx.current = None;
    m.asm(both);
    m.run();
    assert_eq!(status(&m), rflags::CF);
}

#[test]
fn an_invalidation_that_is_not_offered_is_undefined() {
    let programs: [(u32, Program); 2] = [
        (reason::INVEPT, |a| a.invept(rax, xmmword_ptr(rsi)).unwrap()),
        (reason::INVVPID, |a| a.invvpid(rax, xmmword_ptr(rsi)).unwrap()),
    ];
    for (why, program) in programs {
        let without = |mut m: Machine| {
            m.cpu.vmx.access.invept &= why != reason::INVEPT;
            m.cpu.vmx.access.invvpid &= why != reason::INVVPID;
            m
        };
        assert_eq!(vector_of(without(root()), program), UD);
        // Before the privilege level and before the VM exit.
        assert_eq!(vector_of(without(root().user()), program), UD);
        assert_eq!(vector_of(without(crate::guest::long(crate::guest::primary(0))), program), UD);
        assert_eq!(exit_of(&mut crate::guest::long(crate::guest::primary(0)), program).reason, why);
    }
}
