//! Instructions that cause VM exits unconditionally or by a control bit, and the priority of faults.

use iced_x86::code_asm::*;
use turtles_cpu::state::reg;
use turtles_cpu::vmx::{Controls, VmExit};
use x86defs::vmx::{primary as p, reason, secondary as s};
use x86defs::{cr4, rflags};

use crate::guest::{exit, exit_of, long, non_root, primary, secondary};
use crate::machine::*;

pub type Program = fn(&mut CodeAssembler);

#[test]
fn unconditional_and_conditional_exits() {
    let cases: &[(Program, Controls, u32, u32)] = &[
        (|a| a.cpuid().unwrap(), primary(0), reason::CPUID, 2),
        (|a| a.invd().unwrap(), primary(0), reason::INVD, 2),
        (|a| a.xsetbv().unwrap(), primary(0), reason::XSETBV, 3),
        (|a| a.vmcall().unwrap(), primary(0), reason::VMCALL, 3),
        (|a| a.vmlaunch().unwrap(), primary(0), reason::VMLAUNCH, 3),
        (|a| a.vmresume().unwrap(), primary(0), reason::VMRESUME, 3),
        (|a| a.vmxoff().unwrap(), primary(0), reason::VMXOFF, 3),
        (|a| a.hlt().unwrap(), primary(p::HLT_EXITING), reason::HLT, 1),
        (|a| a.pause().unwrap(), primary(p::PAUSE_EXITING), reason::PAUSE, 2),
        (|a| a.rdtsc().unwrap(), primary(p::RDTSC_EXITING), reason::RDTSC, 2),
        (|a| a.rdpmc().unwrap(), primary(p::RDPMC_EXITING), reason::RDPMC, 2),
        (|a| a.wbinvd().unwrap(), secondary(s::WBINVD_EXITING), reason::WBINVD, 2),
        (|a| a.wbnoinvd().unwrap(), secondary(s::WBINVD_EXITING), reason::WBINVD, 3),
        (|a| a.rdmsr().unwrap(), primary(0), reason::RDMSR, 2),
        (|a| a.wrmsr().unwrap(), primary(0), reason::WRMSR, 2),
        (
            |a| a.rdtscp().unwrap(),
            Controls { primary: p::RDTSC_EXITING, ..secondary(s::ENABLE_RDTSCP) },
            reason::RDTSCP,
            3,
        ),
    ];
    for (program, controls, reason, length) in cases {
        let mut m = long(controls.clone());
        m.cpu.state.cr4 |= cr4::OSXSAVE;
        m.cpu.state_changed();
        let exit = exit_of(&mut m, *program);
        let expected = VmExit { reason: *reason, instruction_length: *length, ..VmExit::default() };
        assert_eq!(exit, expected, "{}", reason::name(expected.reason));
        assert_eq!((m.cpu.state.rip, m.cpu.state.instructions), (CODE, 0));
    }
}

#[test]
fn without_their_control_they_execute() {
    let mut m = long(Controls { secondary: s::ENABLE_RDTSCP | s::ENABLE_INVPCID, ..primary(0) });
    m.set(reg::RSI, DATA);
    m.asm(|a| {
        a.pause().unwrap();
        a.rdtsc().unwrap();
        a.rdtscp().unwrap();
        a.wbinvd().unwrap();
        a.wbnoinvd().unwrap();
        a.invlpg(byte_ptr(rsi)).unwrap();
        a.xor(eax, eax).unwrap();
        a.invpcid(rax, xmmword_ptr(rsi)).unwrap();
        a.mov(rax, cr3).unwrap();
        a.mov(cr3, rax).unwrap();
        a.mov(rax, cr0).unwrap();
        a.mov(cr0, rax).unwrap();
        a.mov(rax, cr8).unwrap();
        a.mov(cr8, rax).unwrap();
        a.mov(rax, dr7).unwrap();
        a.mov(dr7, rax).unwrap();
        a.clts().unwrap();
        a.smsw(ax).unwrap();
        a.lmsw(ax).unwrap();
        a.rdrand(rax).unwrap();
        a.rdseed(rax).unwrap();
        a.sgdt(fword_ptr(rsi)).unwrap();
        a.lgdt(fword_ptr(rsi)).unwrap();
        a.sldt(eax).unwrap();
        a.str(eax).unwrap();
        a.in_(al, 0x70).unwrap();
        a.hlt().unwrap();
    });
    m.run();
    assert_eq!(m.cpu.state.instructions, 27);
}

/// "#UD, and faults based on privilege level, take priority over VM exits".
#[test]
fn privilege_faults_come_before_exits() {
    let controls = Controls {
        primary: !(p::PAUSE_EXITING | p::USE_TPR_SHADOW | p::MONITOR_TRAP_FLAG)
            & !p::INTERRUPT_WINDOW_EXITING,
        secondary: s::WBINVD_EXITING | s::ENABLE_INVPCID | s::DESCRIPTOR_TABLE_EXITING,
        ..primary(0)
    };
    let controls = Controls { primary: controls.primary & !p::NMI_WINDOW_EXITING, ..controls };
    let faulting: &[Program] = &[
        |a| a.hlt().unwrap(),
        |a| a.invd().unwrap(),
        |a| a.wbinvd().unwrap(),
        |a| a.rdmsr().unwrap(),
        |a| a.wrmsr().unwrap(),
        |a| a.mov(rax, cr3).unwrap(),
        |a| a.mov(cr3, rax).unwrap(),
        |a| a.mov(cr8, rax).unwrap(),
        |a| a.clts().unwrap(),
        |a| a.lmsw(ax).unwrap(),
        |a| a.invlpg(byte_ptr(rsi)).unwrap(),
        |a| a.invpcid(rax, xmmword_ptr(rsi)).unwrap(),
        |a| a.lgdt(fword_ptr(rsi)).unwrap(),
        |a| a.ltr(eax).unwrap(),
        |a| a.rdpmc().unwrap(),
        // The TSS's permission bitmap comes first.
        |a| a.in_(al, dx).unwrap(),
        |a| a.rep().insb().unwrap(),
    ];
    for program in faulting {
        let mut m = non_root(Machine::long().user(), controls.clone());
        m.put(TSS + 0x1000, &[0xff; 32]);
        m.asm(*program);
        let exit = m.cpu.run(1);
        assert_eq!(exit, turtles_cpu::Exit::Budget);
        assert_eq!(m.cpu.state.rip, HANDLERS + 16 * 13);
    }
    // RDTSC with CR4.TSD; CR4.DE and the privilege level do not come before MOV DR's VM exit.
    let mut m = non_root(Machine::long().user().with(|s| s.cr4 |= cr4::TSD), controls.clone());
    m.asm(|a| a.rdtsc().unwrap());
    m.cpu.run(1);
    assert_eq!(m.cpu.state.rip, HANDLERS + 16 * 13);
    let mut m = non_root(Machine::long().user().with(|s| s.cr4 |= cr4::DE), controls.clone());
    assert_eq!(exit_of(&mut m, |a| a.mov(rcx, dr4).unwrap()).qualification, 4 | 1 << 4 | 1 << 8);
    // CPUID and VMX instructions do not look at the privilege level.
    let everywhere: &[Program] =
        &[|a| a.cpuid().unwrap(), |a| a.vmcall().unwrap(), |a| a.vmlaunch().unwrap()];
    for program in everywhere {
        let mut m = non_root(Machine::long().user(), controls.clone());
        exit_of(&mut m, *program);
    }
}

#[test]
fn disabled_instructions_are_undefined() {
    let programs: &[(Program, u32)] = &[
        (|a| a.rdtscp().unwrap(), s::ENABLE_RDTSCP),
        (|a| a.rdpid(rax).unwrap(), s::ENABLE_RDTSCP),
        (|a| a.invpcid(rax, xmmword_ptr(rsi)).unwrap(), s::ENABLE_INVPCID),
        (|a| a.xsaves(ptr(rsi)).unwrap(), s::ENABLE_XSAVES),
        (|a| a.xrstors(ptr(rsi)).unwrap(), s::ENABLE_XSAVES),
    ];
    for (program, enabling) in programs {
        for controls in [secondary(0), secondary(*enabling)] {
            let enabled = controls.secondary != 0;
            let mut m = long(controls);
            m.cpu.state.cr4 |= cr4::OSXSAVE | cr4::OSFXSR;
            m.cpu.state_changed();
            m.set(reg::RSI, DATA & !63);
            m.asm(|a| {
                program(a);
                a.hlt().unwrap();
            });
            m.run();
            assert_eq!(m.cpu.state.rip == HANDLERS + 16 * 6 + 1, !enabled);
        }
    }
}

#[test]
fn exits_clear_the_resume_flag() {
    let mut m = long(primary(0)).with(|s| s.set_rflags(rflags::RF));
    exit_of(&mut m, |a| a.cpuid().unwrap());
    assert_eq!(m.cpu.state.rflags(), 2);
}

#[test]
fn invlpg_gives_its_linear_address() {
    let mut m = long(primary(p::INVLPG_EXITING)).with(|s| s.segments[4].base = 0x1000);
    m.set(reg::RSI, 0x20);
    m.set(reg::RCX, 3);
    let exit = exit_of(&mut m, |a| a.invlpg(byte_ptr(rsi + rcx * 4 - 8).fs()).unwrap());
    assert_eq!((exit.reason, exit.qualification), (reason::INVLPG, 0x1024));
    let mut m =
        non_root(Machine::protected(), primary(p::INVLPG_EXITING)).with(|s| s.segments[3].base = 0xffff_f000);
    m.set(reg::RSI, 0x2000);
    assert_eq!(exit_of(&mut m, |a| a.invlpg(byte_ptr(esi)).unwrap()).qualification, 0x1000);
}

/// Base RSI, index RCX * 4, displacement -8, segment FS, 64-bit addresses: the fields of every memory format.
const MEMORY: u32 = 2 | 2 << 7 | 4 << 15 | 1 << 18 | 6 << 23;

/// A program that captures operands.
type Assemble<'a> = &'a dyn Fn(&mut CodeAssembler);

#[test]
fn instruction_information_of_vmx_instructions() {
    let at = || qword_ptr(rsi + rcx * 4 - 8).fs();
    let invpcid = Controls { primary: p::INVLPG_EXITING, ..secondary(s::ENABLE_INVPCID) };
    let cases: &[(Assemble, u32, u32)] = &[
        (&|a| a.vmclear(at()).unwrap(), reason::VMCLEAR, MEMORY),
        (&|a| a.vmptrld(at()).unwrap(), reason::VMPTRLD, MEMORY),
        (&|a| a.vmptrst(at()).unwrap(), reason::VMPTRST, MEMORY),
        (&|a| a.vmxon(at()).unwrap(), reason::VMXON, MEMORY),
        (&|a| a.vmread(at(), r9).unwrap(), reason::VMREAD, MEMORY | 9 << 28),
        (&|a| a.vmwrite(r9, at()).unwrap(), reason::VMWRITE, MEMORY | 9 << 28),
        (&|a| a.invept(rdx, xmmword_ptr(rsi + rcx * 4 - 8).fs()).unwrap(), reason::INVEPT, MEMORY | 2 << 28),
        (
            &|a| a.invvpid(rdx, xmmword_ptr(rsi + rcx * 4 - 8).fs()).unwrap(),
            reason::INVVPID,
            MEMORY | 2 << 28,
        ),
        (
            &|a| a.invpcid(rdx, xmmword_ptr(rsi + rcx * 4 - 8).fs()).unwrap(),
            reason::INVPCID,
            MEMORY | 2 << 28,
        ),
    ];
    for (program, reason, information) in cases {
        // The operand is not accessed: it is nowhere.
        let mut m = long(invpcid.clone());
        m.set(reg::RSI, 1 << 60);
        let exit = exit_of(&mut m, program);
        assert_eq!((exit.reason, exit.instruction_information), (*reason, *information));
        assert_eq!(exit.qualification, -8i64 as u64);
    }
    let mut m = long(primary(0));
    let exit = exit_of(&mut m, |a| a.vmread(r10, rbx).unwrap());
    assert_eq!(exit.instruction_information & 0xf000_07f8 & !0x380, 10 << 3 | 1 << 10 | 3 << 28);
    let exit = exit_of(&mut m, |a| a.vmwrite(rbx, r10).unwrap());
    assert_eq!(exit.instruction_information & 0xf000_07f8 & !0x380, 10 << 3 | 1 << 10 | 3 << 28);
}

#[test]
fn displacements_and_missing_registers() {
    let mut m = long(primary(0));
    let len = m.asm(|a| {
        let mut far = a.create_label();
        a.vmclear(qword_ptr(far)).unwrap();
        a.nop().unwrap();
        a.set_label(&mut far).unwrap();
        a.nop().unwrap();
    }) as u64;
    // Relative to RIP: no base, no index, the sum as displacement.
    let e = exit(&mut m);
    assert_eq!(
        (e.qualification, e.instruction_information),
        (CODE + len - 1, 2 << 7 | 3 << 15 | 1 << 22 | 1 << 27)
    );
    let mut m = non_root(Machine::protected(), primary(0));
    let exit = exit_of(&mut m, |a| a.vmclear(qword_ptr(bx + si + 0x10)).unwrap());
    assert_eq!(exit.qualification, 0x10);
    assert_eq!(exit.instruction_information, 3 << 15 | 6 << 18 | 3 << 23);
    let mut m = non_root(Machine::protected(), primary(0));
    let exit = exit_of(&mut m, |a| a.vmclear(qword_ptr(ebp + 0x1234)).unwrap());
    assert_eq!(exit.instruction_information, 1 << 7 | 2 << 15 | 1 << 22 | 5 << 23);
}

#[test]
fn descriptor_table_instructions() {
    let wide = 1 << 11;
    let at = MEMORY;
    let cases: &[(Program, u32, u32)] = &[
        (|a| a.sgdt(fword_ptr(rsi + rcx * 4 - 8).fs()).unwrap(), reason::GDTR_IDTR_ACCESS, at | wide),
        (
            |a| a.sidt(fword_ptr(rsi + rcx * 4 - 8).fs()).unwrap(),
            reason::GDTR_IDTR_ACCESS,
            at | wide | 1 << 28,
        ),
        (
            |a| a.lgdt(fword_ptr(rsi + rcx * 4 - 8).fs()).unwrap(),
            reason::GDTR_IDTR_ACCESS,
            at | wide | 2 << 28,
        ),
        (
            |a| a.lidt(fword_ptr(rsi + rcx * 4 - 8).fs()).unwrap(),
            reason::GDTR_IDTR_ACCESS,
            at | wide | 3 << 28,
        ),
        (|a| a.sldt(word_ptr(rsi + rcx * 4 - 8).fs()).unwrap(), reason::LDTR_TR_ACCESS, at),
        (|a| a.str(word_ptr(rsi + rcx * 4 - 8).fs()).unwrap(), reason::LDTR_TR_ACCESS, at | 1 << 28),
        (|a| a.lldt(word_ptr(rsi + rcx * 4 - 8).fs()).unwrap(), reason::LDTR_TR_ACCESS, at | 2 << 28),
        (|a| a.ltr(word_ptr(rsi + rcx * 4 - 8).fs()).unwrap(), reason::LDTR_TR_ACCESS, at | 3 << 28),
        (|a| a.sldt(r9d).unwrap(), reason::LDTR_TR_ACCESS, 9 << 3 | 1 << 10),
        (|a| a.ltr(edx).unwrap(), reason::LDTR_TR_ACCESS, 2 << 3 | 1 << 10 | 3 << 28),
    ];
    for (program, reason, information) in cases {
        let mut m = long(secondary(s::DESCRIPTOR_TABLE_EXITING));
        let exit = exit_of(&mut m, *program);
        assert_eq!((exit.reason, exit.instruction_information), (*reason, *information));
        assert_eq!(exit.qualification, if information & 1 << 10 == 0 { -8i64 as u64 } else { 0 });
    }
}

#[test]
fn random_numbers() {
    let both = s::RDRAND_EXITING | s::RDSEED_EXITING;
    let cases: &[(Program, u32, u32)] = &[
        (|a| a.rdrand(cx).unwrap(), reason::RDRAND, 1 << 3),
        (|a| a.rdrand(r9d).unwrap(), reason::RDRAND, 9 << 3 | 1 << 11),
        (|a| a.rdseed(rdx).unwrap(), reason::RDSEED, 2 << 3 | 2 << 11),
    ];
    for (program, reason, information) in cases {
        let exit = exit_of(&mut long(secondary(both)), *program);
        assert_eq!((exit.reason, exit.instruction_information), (*reason, *information));
    }
}

#[test]
fn the_time_stamp_counter_is_scaled_and_offset() {
    let controls = Controls {
        primary: p::USE_TSC_OFFSETTING | p::USE_MSR_BITMAPS,
        secondary: s::USE_TSC_SCALING,
        tsc_multiplier: 3 << 47,
        tsc_offset: 5u64.wrapping_neg(),
        msr_bitmap: DATA,
        ..primary(0)
    };
    // The bus's clock shows 1000 and the instructions executed.
    let shown = |tsc: u64| tsc * 3 / 2 - 5;
    let mut m = long(controls.clone());
    m.asm(|a| {
        a.rdtsc().unwrap();
        a.mov(ebx, eax).unwrap();
        a.mov(ecx, 0x10).unwrap();
        a.rdmsr().unwrap();
        a.hlt().unwrap();
    });
    m.run();
    assert_eq!((m.reg(reg::RBX), m.reg(reg::RAX)), (shown(1000), shown(1003)));
    let mut m = long(Controls { secondary: 0, ..controls.clone() });
    m.asm(|a| {
        a.rdtsc().unwrap();
        a.hlt().unwrap();
    });
    m.run();
    assert_eq!(m.reg(reg::RAX), 995);
    // Scaling goes with offsetting only.
    let mut m = long(Controls { primary: 0, ..controls });
    m.asm(|a| {
        a.rdtsc().unwrap();
        a.hlt().unwrap();
    });
    m.run();
    assert_eq!(m.reg(reg::RAX), 1000);
}

#[test]
fn pause_loops_exit_when_they_have_lasted() {
    let controls = Controls { ple_gap: 4, ple_window: 20, ..secondary(s::PAUSE_LOOP_EXITING) };
    let mut m = long(controls.clone());
    m.asm(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.pause().unwrap();
        a.jmp(again).unwrap();
    });
    let e = exit(&mut m);
    assert_eq!((e.reason, e.instruction_length), (reason::PAUSE, 2));
    let spun = m.cpu.state.instructions;
    assert!((21..=24).contains(&spun), "{spun}");
    // Further apart than the gap, each PAUSE is the first of a loop.
    let mut m = long(controls.clone());
    m.asm(|a| {
        a.mov(ecx, 100).unwrap();
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.pause().unwrap();
        for _ in 0..6 {
            a.nop().unwrap();
        }
        a.dec(ecx).unwrap();
        a.jne(again).unwrap();
        a.hlt().unwrap();
    });
    m.run();
    // Only at CPL 0.
    let mut m = non_root(Machine::long().user(), controls);
    m.asm(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.pause().unwrap();
        a.jmp(again).unwrap();
    });
    assert_eq!(m.cpu.run(1000), turtles_cpu::Exit::Budget);
}

#[test]
fn monitor_and_getsec_are_not_there() {
    for bytes in [&[0x0f, 0x01, 0xc8][..], &[0x0f, 0x01, 0xc9], &[0x0f, 0x37], &[0x0f, 0xaa]] {
        let mut m = long(primary(p::MONITOR_EXITING | p::MWAIT_EXITING));
        m.bytes(bytes);
        assert_eq!(m.vector(), 6);
    }
}
