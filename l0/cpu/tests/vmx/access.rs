//! Control registers, debug registers, ports and MSRs.

use iced_x86::code_asm::*;
use turtles_cpu::state::{Seg, reg};
use turtles_cpu::vmx::{Controls, VmExit};
use x86defs::vmx::{primary as p, reason, secondary as s};
use x86defs::{cr0, cr4};

use crate::guest::{exit, exit_of, long, non_root, primary, secondary};
use crate::instructions::Program;
use crate::machine::*;

/// Qualification of a control-register access: register, kind, general register.
fn cr_access(cr: u64, kind: u64, general: u64) -> u64 {
    cr | kind << 4 | general << 8
}

#[test]
fn cr3_and_cr8() {
    let cases: &[(Program, u32, u64)] = &[
        (|a| a.mov(cr3, rdx).unwrap(), p::CR3_LOAD_EXITING, cr_access(3, 0, 2)),
        (|a| a.mov(r11, cr3).unwrap(), p::CR3_STORE_EXITING, cr_access(3, 1, 11)),
        (|a| a.mov(cr8, rsp).unwrap(), p::CR8_LOAD_EXITING, cr_access(8, 0, 4)),
        (|a| a.mov(rax, cr8).unwrap(), p::CR8_STORE_EXITING, cr_access(8, 1, 0)),
    ];
    for (program, control, qualification) in cases {
        let exit = exit_of(&mut long(primary(*control)), *program);
        assert_eq!((exit.reason, exit.qualification), (reason::CR_ACCESS, *qualification));
        // The other three controls do nothing here.
        let all = p::CR3_LOAD_EXITING | p::CR3_STORE_EXITING | p::CR8_LOAD_EXITING | p::CR8_STORE_EXITING;
        let mut m = long(primary(all & !control));
        m.set(reg::RDX, PML4);
        m.set(reg::RSP, 3);
        m.asm(*program);
        m.steps(1);
    }
}

#[test]
fn cr3_targets() {
    let controls =
        Controls { cr3_targets: [1, PML4, 3, PML4 | 8], cr3_target_count: 3, ..primary(p::CR3_LOAD_EXITING) };
    for (value, exits) in [(PML4, false), (PML4 | 8, true), (0, true)] {
        let mut m = long(controls.clone());
        m.set(reg::RAX, value);
        m.asm(|a| a.mov(cr3, rax).unwrap());
        if exits {
            assert_eq!(exit(&mut m).qualification, cr_access(3, 0, 0));
        } else {
            m.steps(1);
        }
    }
}

#[test]
fn cr0_and_cr4_writes_are_compared_with_the_shadow() {
    let controls = Controls {
        cr0_mask: cr0::TS | cr0::NE,
        cr0_shadow: cr0::TS,
        cr4_mask: cr4::VMXE | cr4::PGE,
        cr4_shadow: cr4::PGE,
        ..primary(0)
    };
    let base = cr0::PE | cr0::PG | cr0::ET;
    // NE is ours (set, shown clear), TS is ours (clear, shown set).
    let mut m = long(controls.clone());
    m.set(reg::RAX, base | cr0::TS | cr0::MP);
    m.asm(|a| {
        a.mov(cr0, rax).unwrap();
        a.mov(rbx, cr0).unwrap();
        a.smsw(r9).unwrap();
    });
    m.steps(3);
    assert_eq!(m.cpu.state.cr0, base | cr0::NE | cr0::MP);
    assert_eq!(m.reg(reg::RBX), base | cr0::TS | cr0::MP);
    assert_eq!(m.reg(9), base | cr0::TS | cr0::MP);
    for value in [base, base | cr0::TS | cr0::NE] {
        let mut m = long(controls.clone());
        m.set(reg::RBX, value);
        let exit = exit_of(&mut m, |a| a.mov(cr0, rbx).unwrap());
        assert_eq!(exit.qualification, cr_access(0, 0, 3));
    }
    let mut m = long(controls.clone());
    m.set(reg::RAX, cr4::PAE | cr4::PGE | cr4::TSD);
    m.asm(|a| {
        a.mov(cr4, rax).unwrap();
        a.mov(rbx, cr4).unwrap();
    });
    m.steps(2);
    assert_eq!(m.cpu.state.cr4, cr4::PAE | cr4::VMXE | cr4::TSD);
    assert_eq!(m.reg(reg::RBX), cr4::PAE | cr4::PGE | cr4::TSD);
    let mut m = long(controls);
    m.set(reg::RAX, cr4::PAE | cr4::PGE | cr4::VMXE);
    assert_eq!(exit_of(&mut m, |a| a.mov(cr4, rax).unwrap()).qualification, cr_access(4, 0, 0));
}

#[test]
fn bits_fixed_in_vmx_operation_are_faults() {
    let run = |controls: Controls, value: u64, program: Program| {
        let mut m = long(controls);
        m.set(reg::RAX, value);
        m.asm(|a| {
            program(a);
            a.hlt().unwrap();
        });
        m.run();
        m.cpu.state.rip == HANDLERS + 16 * 13 + 1
    };
    let to_cr0: Program = |a| a.mov(cr0, rax).unwrap();
    let to_cr4: Program = |a| a.mov(cr4, rax).unwrap();
    assert!(run(primary(0), cr0::PE | cr0::PG, to_cr0), "NE");
    assert!(!run(primary(0), cr0::PE | cr0::PG | cr0::NE, to_cr0));
    assert!(run(primary(0), cr4::PAE, to_cr4), "VMXE");
    assert!(!run(primary(0), cr4::PAE | cr4::VMXE, to_cr4));
    // PE and PG are free with "unrestricted guest" only.
    for (secondary, faults) in [(0, true), (s::UNRESTRICTED_GUEST, false)] {
        let mut m = non_root(Machine::protected(), Controls { secondary, ..primary(0) });
        m.set(reg::RAX, cr0::PE | cr0::NE);
        m.asm(|a| {
            a.mov(cr0, eax).unwrap();
            a.hlt().unwrap();
        });
        m.run();
        assert_eq!(m.cpu.state.rip == HANDLERS + 16 * 13 + 1, faults);
    }
}

#[test]
fn clts() {
    // (mask, shadow, exits, clears)
    for (mask, shadow, exits, clears) in [
        (0, 0, false, true),
        (cr0::TS, 0, false, false),
        (cr0::TS, cr0::TS, true, false),
        (0, cr0::TS, false, true),
    ] {
        let mut m = long(Controls { cr0_mask: mask, cr0_shadow: shadow, ..primary(0) });
        m.cpu.state.cr0 |= cr0::TS;
        m.asm(|a| a.clts().unwrap());
        if exits {
            assert_eq!(exit(&mut m).qualification, cr_access(0, 2, 0));
        } else {
            m.steps(1);
            assert_eq!(m.cpu.state.cr0 & cr0::TS == 0, clears);
        }
    }
}

#[test]
fn lmsw() {
    let all = cr0::PE | cr0::MP | cr0::EM | cr0::TS;
    let lmsw_of = |source: u64| 3 << 4 | source << 16;
    // (mask, shadow, source, exits)
    for (mask, shadow, source, exits) in [
        (cr0::TS, 0, 1, false),
        (cr0::TS, 0, 9, true),
        (cr0::TS, cr0::TS, 1, true),
        (cr0::PE, 0, 1, true),
        (cr0::PE, cr0::PE, 0, false),
        (cr0::PE, cr0::PE, 1, false),
        (all, all, 0xf, false),
        // Bits above the low four do not count.
        (all | cr0::NE, all, 0xff2f, false),
    ] {
        let mut m = long(Controls { cr0_mask: mask, cr0_shadow: shadow, ..primary(0) });
        m.set(reg::RDX, source);
        m.asm(|a| a.lmsw(dx).unwrap());
        if exits {
            let e = exit(&mut m);
            assert_eq!((e.reason, e.qualification), (reason::CR_ACCESS, lmsw_of(source)));
        } else {
            let before = m.cpu.state.cr0;
            m.steps(1);
            assert_eq!((m.cpu.state.cr0 ^ before) & mask, 0);
        }
    }
    let mut m = long(Controls { cr0_mask: cr0::TS, ..primary(0) });
    m.put16(DATA, 0x1239);
    m.set(reg::RSI, DATA - 8);
    let e = exit_of(&mut m, |a| a.lmsw(word_ptr(rsi + 8)).unwrap());
    assert_eq!((e.qualification, e.guest_linear), (lmsw_of(0x1239) | 1 << 6, DATA));
    // The operand is fetched first.
    let mut m = long(Controls { cr0_mask: cr0::TS, ..primary(0) });
    m.set(reg::RSI, 1 << 40);
    m.asm(|a| a.lmsw(word_ptr(rsi)).unwrap());
    assert_eq!(m.vector(), 14);
}

#[test]
fn debug_registers() {
    let cases: &[(Program, u64)] = &[
        (|a| a.mov(dr7, r9).unwrap(), 7 | 9 << 8),
        (|a| a.mov(rax, dr0).unwrap(), 1 << 4),
        (|a| a.mov(dr6, rcx).unwrap(), 6 | 1 << 8),
    ];
    for (program, qualification) in cases {
        // General detection comes after the VM exit.
        let mut m = long(primary(p::MOV_DR_EXITING)).with(|s| s.dr7 |= 1 << 13);
        let exit = exit_of(&mut m, *program);
        assert_eq!((exit.reason, exit.qualification), (reason::MOV_DR, *qualification));
    }
}

/// Qualification of an I/O instruction: size - 1, flags, port.
fn io(size: u64, flags: u64, port: u64) -> u64 {
    (size - 1) | flags | port << 16
}

const IN: u64 = 1 << 3;
const STRING: u64 = 1 << 4;
const REPEATED: u64 = 1 << 5;
const IMMEDIATE: u64 = 1 << 6;

#[test]
fn ports() {
    let cases: &[(Program, u64)] = &[
        (|a| a.in_(al, 0x71).unwrap(), io(1, IN | IMMEDIATE, 0x71)),
        (|a| a.out(0x80, eax).unwrap(), io(4, IMMEDIATE, 0x80)),
        (|a| a.in_(ax, dx).unwrap(), io(2, IN, 0x1234)),
        (|a| a.out(dx, al).unwrap(), io(1, 0, 0x1234)),
    ];
    for (program, qualification) in cases {
        let mut m = long(primary(p::UNCONDITIONAL_IO_EXITING));
        m.set(reg::RDX, 0x1234);
        let exit = exit_of(&mut m, *program);
        assert_eq!((exit.reason, exit.qualification), (reason::IO_INSTRUCTION, *qualification));
        assert!(m.log.lock().unwrap().written.is_empty());
    }
}

#[test]
fn string_ports() {
    // (program, qualification, linear address, address size and segment)
    let cases: &[(Program, u64, u64, u32)] = &[
        (|a| a.rep().insb().unwrap(), io(1, IN | STRING | REPEATED, 0x1234), DATA, 2 << 7),
        (|a| a.insd().unwrap(), io(4, IN | STRING, 0x1234), DATA, 2 << 7),
        (|a| a.rep().outsw().unwrap(), io(2, STRING | REPEATED, 0x1234), DATA + 0x10, 2 << 7 | 3 << 15),
    ];
    for (program, qualification, linear, information) in cases {
        let mut m = long(primary(p::UNCONDITIONAL_IO_EXITING));
        for (register, value) in
            [(reg::RDX, 0x1234), (reg::RCX, 2), (reg::RDI, DATA), (reg::RSI, DATA + 0x10)]
        {
            m.set(register, value);
        }
        let e = exit_of(&mut m, *program);
        let expected = VmExit {
            reason: reason::IO_INSTRUCTION,
            qualification: *qualification,
            guest_linear: *linear,
            instruction_length: e.instruction_length,
            instruction_information: e.instruction_information,
            ..VmExit::default()
        };
        assert_eq!(e, expected);
        // INS leaves the segment undefined.
        let mask = if qualification & IN != 0 { 7 << 7 } else { 0x3_8380 };
        assert_eq!(e.instruction_information & mask, *information);
    }
    // The segment's checks come after the VM exit.
    let mut m = non_root(Machine::protected(), primary(p::UNCONDITIONAL_IO_EXITING)).with(|s| {
        s.seg_mut(Seg::Fs).base = 0x1000;
        s.seg_mut(Seg::Fs).limit = 0;
    });
    m.set(reg::RSI, 0x50);
    m.bytes(&[0x64, 0x6e]);
    let e = exit(&mut m);
    assert_eq!((e.guest_linear, e.instruction_information), (0x1050, 1 << 7 | 4 << 15));
    assert_eq!(e.instruction_length, 2);
}

#[test]
fn port_bitmaps() {
    let (a_page, b_page) = (DATA & !4095, (DATA & !4095) + 0x1000);
    let controls = Controls {
        io_bitmaps: [a_page, b_page],
        // The bitmaps rule out the other control.
        ..primary(p::USE_IO_BITMAPS | p::UNCONDITIONAL_IO_EXITING)
    };
    // (port with its bit set, program's port, size, exits)
    for (bit, port, size, exits) in [
        (0x70u64, 0x70u64, 1, true),
        (0x70, 0x71, 1, false),
        (0x73, 0x70, 4, true),
        (0x74, 0x70, 4, false),
        (0x8000, 0x7fff, 2, true),
        (0x8000, 0x7fff, 1, false),
        (0xffff, 0xffff, 1, true),
        (0, 0xffff, 1, false),
        // Around the end of the port space.
        (0x1234, 0xffff, 2, true),
        (0x1234, 0xfffd, 4, true),
        (0x1234, 0xfffc, 4, false),
    ] {
        let mut m = long(controls.clone());
        m.put(a_page, &[0; 0x2000]);
        m.put(a_page + bit / 8, &[1 << (bit % 8)]);
        m.set(reg::RDX, port);
        m.asm(|a| match size {
            1 => a.in_(al, dx).unwrap(),
            2 => a.in_(ax, dx).unwrap(),
            _ => a.in_(eax, dx).unwrap(),
        });
        if exits {
            assert_eq!(exit(&mut m).qualification, io(size, IN, port), "{bit:#x} {port:#x}");
        } else {
            m.steps(1);
        }
    }
}

#[test]
fn msr_bitmaps() {
    let page = DATA & !4095;
    let controls = Controls { msr_bitmap: page, ..primary(p::USE_MSR_BITMAPS) };
    // (MSR, write, byte and bit of its own)
    for (msr, write, at, bit) in [
        (0x10u64, false, 2u64, 0),
        (0x174, false, 0x2e, 4),
        (0x174, true, 0x82e, 4),
        (0x1fff, false, 0x3ff, 7),
        (0xc000_0080, false, 0x410, 0),
        (0xc000_0080, true, 0xc10, 0),
        (0xc000_0102, true, 0xc20, 2),
    ] {
        for exits in [false, true] {
            let mut m = long(controls.clone());
            m.put(page, &[if exits { 0 } else { 0xff }; 4096]);
            m.put(page + at, &[if exits { 1 << bit } else { !(1 << bit) }]);
            m.set(reg::RCX, msr);
            m.set(reg::RAX, 0x500);
            m.asm(|a| if write { a.wrmsr().unwrap() } else { a.rdmsr().unwrap() });
            if exits {
                let reason = if write { reason::WRMSR } else { reason::RDMSR };
                assert_eq!(exit(&mut m).reason, reason, "{msr:#x}");
            } else {
                // It is executed; 0x1fff does not exist, and is #GP then.
                assert_eq!(m.cpu.run(1), turtles_cpu::Exit::Budget);
            }
        }
    }
    // Outside both ranges.
    for msr in [0x2000u64, 0x4000_0000, 0xbfff_ffff, 0xc000_2000] {
        let mut m = long(controls.clone());
        m.put(page, &[0; 4096]);
        m.set(reg::RCX, msr);
        assert_eq!(exit_of(&mut m, |a| a.rdmsr().unwrap()).reason, reason::RDMSR);
    }
}

#[test]
fn supervisor_state_exits_need_supervisor_components() {
    let controls = Controls { xss_exiting_bitmap: u64::MAX, ..secondary(s::ENABLE_XSAVES) };
    let mut m = long(controls);
    m.cpu.state.cr4 |= cr4::OSXSAVE | cr4::OSFXSR;
    m.cpu.state_changed();
    m.set(reg::RSI, DATA & !63);
    m.set(reg::RAX, 0xffff_ffff);
    m.asm(|a| a.xsaves(ptr(rsi)).unwrap());
    m.steps(1);
}
