//! The TPR shadow: CR8, the threshold; EOI, ICR and x2APIC MSRs.

use iced_x86::code_asm::*;
use turtles_cpu::Exit;
use turtles_cpu::state::{Activity, Event, EventKind, reg};
use x86defs::vector;
use x86defs::vmx::{primary, reason, secondary};

use crate::guest::{APIC_ACCESS, Guest};
use crate::machine::{CODE, HANDLERS, KERNEL_STACK, Machine};

const ACCESSES: u32 = secondary::VIRTUALIZE_APIC_ACCESSES;
const DELIVERY: u32 = secondary::VIRTUAL_INTERRUPT_DELIVERY;
const X2APIC: u32 = secondary::VIRTUALIZE_X2APIC;
const REGISTERS: u32 = secondary::APIC_REGISTER_VIRTUALIZATION;

fn long(controls: u32) -> Guest {
    Guest::new(Machine::long()).with_apic(controls)
}

#[test]
fn cr8_is_the_virtual_tpr() {
    let mut g = long(0).code(|a| {
        a.mov(rcx, cr8).unwrap();
        a.mov(cr8, rax).unwrap();
    });
    g.m.log.lock().unwrap().cr8 = 3;
    g.set_apic(0x80, 0xaaaa_aa57);
    g.m.set(reg::RAX, 9);
    g.m.steps(2);
    assert_eq!((g.m.reg(reg::RCX), g.apic(0x80)), (5, 0x90));
    assert_eq!(g.m.log.lock().unwrap().cr8, 3);
    // Without the shadow it is the processor's own.
    let mut g = g.with(|c| c.primary &= !primary::USE_TPR_SHADOW);
    g.m.cpu.state.rip = CODE;
    g.m.steps(2);
    assert_eq!((g.m.reg(reg::RCX), g.m.log.lock().unwrap().cr8), (3, 9));
}

#[test]
fn a_priority_below_the_threshold_exits_after_the_instruction() {
    for (value, exits) in [(5, true), (6, false), (0, true), (15, false)] {
        let mut g = long(0).with(|c| c.tpr_threshold = 6).code(|a| {
            a.mov(cr8, rax).unwrap();
            a.hlt().unwrap();
        });
        g.m.set(reg::RAX, value);
        if !exits {
            assert_eq!(g.m.cpu.run(100), Exit::Halted);
            continue;
        }
        assert_eq!(g.exit().reason, reason::TPR_BELOW_THRESHOLD);
        assert_eq!((g.m.cpu.state.instructions, g.apic(0x80)), (1, value << 4));
    }
}

#[test]
fn the_threshold_is_looked_at_on_entry() {
    let mut g = long(ACCESSES).code(|a| a.nop().unwrap());
    g.set_apic(0x80, 0x50);
    g = g.with(|c| c.tpr_threshold = 6);
    assert_eq!(g.exit().reason, reason::TPR_BELOW_THRESHOLD);
    assert_eq!(g.m.cpu.state.instructions, 0);
    // An event that the entry injects is delivered first.
    let event =
        Event { vector: 0x77, kind: EventKind::ExternalInterrupt, error_code: None, instruction_length: 0 };
    g.m.cpu.state.injected = Some(event);
    g.enter();
    assert_eq!(g.exit().reason, reason::TPR_BELOW_THRESHOLD);
    assert_eq!((g.m.cpu.state.rip, g.m.cpu.state.instructions), (HANDLERS + 0x770, 0));
    // Only where APIC accesses are virtualized, and interrupt delivery is not.
    for controls in [0, ACCESSES | DELIVERY] {
        let mut g = long(controls).code(|a| a.hlt().unwrap());
        g = g.with(|c| c.tpr_threshold = 6);
        assert_eq!(g.m.cpu.run(100), Exit::Halted);
    }
}

/// A guest with these vectors in service.
fn in_service(vectors: &[u8], program: impl FnOnce(&mut CodeAssembler)) -> Guest {
    let mut g = long(ACCESSES | DELIVERY | X2APIC).code(program);
    for &v in vectors {
        let at = 0x100 + u64::from(v / 32) * 16;
        let old = g.apic(at) as u32;
        g.set_apic(at, old | 1 << (v % 32));
    }
    let svi = vectors.iter().copied().max().unwrap_or(0);
    g.with(|c| c.interrupt_status = u16::from(svi) << 8)
}

fn memory_eoi(a: &mut CodeAssembler) {
    a.mov(dword_ptr(APIC_ACCESS + 0xb0), eax).unwrap();
    a.hlt().unwrap();
}

fn msr_eoi(a: &mut CodeAssembler) {
    a.mov(ecx, 0x80b).unwrap();
    a.xor(eax, eax).unwrap();
    a.xor(edx, edx).unwrap();
    a.wrmsr().unwrap();
    a.hlt().unwrap();
}

#[test]
fn end_of_interrupt_takes_the_next_in_service() {
    for program in [memory_eoi, msr_eoi] {
        let mut g = in_service(&[0x31, 0x52, 0xc3], program);
        assert_eq!(g.apic(0xa0), 0xc0);
        g.m.set(reg::RAX, 0x1234);
        assert_eq!(g.m.cpu.run(100), Exit::Halted);
        assert_eq!(g.m.cpu.vmx.controls.interrupt_status, 0x5200);
        assert_eq!((g.apic(0x160), g.apic(0x120), g.apic(0xa0), g.apic(0xb0)), (0, 1 << 0x12, 0x50, 0));
    }
}

#[test]
fn end_of_interrupt_exits_where_the_bitmap_says_so() {
    for program in [memory_eoi, msr_eoi] {
        let mut g = in_service(&[0x52, 0xc3], program).with(|c| c.eoi_exit_bitmap[3] = 1 << 3);
        let exit = g.exit();
        assert_eq!((exit.reason, exit.qualification), (reason::VIRTUALIZED_EOI, 0xc3));
        assert_eq!(g.m.cpu.vmx.controls.interrupt_status, 0x5200);
        let rip = g.m.cpu.state.rip;
        assert_eq!(g.m.get(rip, 1), 0xf4, "past the write");
    }
}

#[test]
fn command_registers() {
    let cases: &[(u32, Option<u8>)] = &[
        (0x4_0041, Some(0x41)),
        // Level and destination mode do not count.
        (0x4_4841, Some(0x41)),
        (0x4_000f, None),
        (0x4_0010, Some(0x10)),
        (0x0_0041, None),
        (0x8_0041, None),
        (0xc_0041, None),
        (0x4_8041, None),
        (0x4_0141, None),
        (0x4_0441, None),
        (0x4_1041, None),
        (0x4_2041, None),
        (0x5_0041, None),
        (0x14_0041, None),
        (0x8004_0041, None),
    ];
    for &(command, vector) in cases {
        let mut g = long(ACCESSES | DELIVERY).code(|a| {
            a.mov(dword_ptr(APIC_ACCESS + 0x300), eax).unwrap();
            a.hlt().unwrap();
        });
        g.m.set(reg::RAX, u64::from(command));
        if let Some(v) = vector {
            assert_eq!(g.m.cpu.run(100), Exit::Halted);
            assert_eq!(g.m.cpu.vmx.controls.interrupt_status, u16::from(v), "{command:#x}");
            assert_eq!(g.apic(0x200 + u64::from(v / 32) * 16), 1 << (v % 32));
        } else {
            let exit = g.exit();
            assert_eq!((exit.reason, exit.qualification), (reason::APIC_WRITE, 0x300), "{command:#x}");
            assert_eq!(g.m.cpu.vmx.controls.interrupt_status, 0);
        }
    }
    let mut g = long(ACCESSES | REGISTERS).code(|a| {
        a.mov(dword_ptr(APIC_ACCESS + 0x310), eax).unwrap();
        a.nop().unwrap();
    });
    g.m.set(reg::RAX, 0x1234_5678);
    g.m.steps(2);
    assert_eq!(g.apic(0x310), 0x1200_0000);
}

/// RDMSR (or WRMSR of `value`), then HLT.
fn msr(controls: u32, index: u32, value: Option<u64>) -> Guest {
    let mut g = long(controls).code(|a| {
        if value.is_some() {
            a.wrmsr().unwrap();
        } else {
            a.rdmsr().unwrap();
        }
        a.hlt().unwrap();
    });
    g.m.set(reg::RCX, u64::from(index));
    g.m.set(reg::RAX, value.unwrap_or(0) & 0xffff_ffff);
    g.m.set(reg::RDX, value.unwrap_or(0) >> 32);
    g
}

/// Executes the program of [`msr`] again, for another MSR.
fn again(g: &mut Guest, index: u32, value: u64) {
    g.m.cpu.state.activity = Activity::Active;
    g.m.cpu.state.rip = CODE;
    g.m.cpu.state.gpr.set(reg::RSP, KERNEL_STACK);
    g.m.set(reg::RCX, u64::from(index));
    g.m.set(reg::RAX, value & 0xffff_ffff);
    g.m.set(reg::RDX, value >> 32);
}

#[test]
fn reads_of_x2apic_msrs() {
    for controls in [0, REGISTERS, X2APIC, X2APIC | REGISTERS] {
        let mut g = msr(controls, 0, None);
        for index in 0x7ff..=0x900u32 {
            let offset = u64::from(index & 0xff) * 16;
            g.set_apic(offset, 0x1111_0000 | index);
            g.set_apic(offset + 4, 0x2222_0000 | index);
            let ours = (0x800..=0x8ff).contains(&index)
                && controls & X2APIC != 0
                && (controls & REGISTERS != 0 || index == 0x808);
            again(&mut g, index, 0);
            if ours {
                assert_eq!(g.m.cpu.run(100), Exit::Halted);
                let expected = (u64::from(0x1111_0000 | index), u64::from(0x2222_0000 | index));
                assert_eq!((g.m.reg(reg::RAX), g.m.reg(reg::RDX)), expected);
            } else {
                // The test's owner knows none of them.
                assert_eq!(g.m.vector(), u64::from(vector::GP), "{index:#x} {controls:#x}");
            }
        }
    }
}

#[test]
fn writes_of_x2apic_msrs() {
    for controls in [X2APIC, X2APIC | REGISTERS, X2APIC | DELIVERY] {
        let mut g = msr(controls, 0, Some(0));
        for index in 0x800..=0x8ffu32 {
            let ours = index == 0x808 || controls & DELIVERY != 0 && matches!(index, 0x80b | 0x83f);
            let value = if index == 0x80b { 0 } else { 0x41 };
            again(&mut g, index, value);
            if ours {
                assert_eq!(g.m.cpu.run(100), Exit::Halted);
                assert_eq!(g.apic(u64::from(index & 0xff) * 16), value);
            } else {
                assert_eq!(g.m.vector(), u64::from(vector::GP), "{index:#x} {controls:#x}");
            }
        }
    }
    for (index, value) in
        [(0x808, 0x100), (0x808, 1 << 32), (0x80b, 1), (0x80b, 1 << 40), (0x83f, 0x141), (0x83f, 1 << 32)]
    {
        let mut g = msr(X2APIC | DELIVERY, index, Some(value));
        assert_eq!(g.m.fault(), (u64::from(vector::GP), 0));
    }
}

#[test]
fn self_ipis_by_msr() {
    let mut g = msr(X2APIC | DELIVERY, 0x83f, Some(0x5a));
    assert_eq!(g.m.cpu.run(100), Exit::Halted);
    assert_eq!(g.m.cpu.vmx.controls.interrupt_status, 0x5a);
    let mut g = msr(X2APIC | DELIVERY, 0x83f, Some(0x0f));
    let exit = g.exit();
    assert_eq!((exit.reason, exit.qualification), (reason::APIC_WRITE, 0x3f0));
    assert_eq!((g.m.cpu.state.rip, g.apic(0x3f0)), (CODE + 2, 0x0f));
}

#[test]
fn the_tpr_by_msr_has_the_threshold_too() {
    let mut g = msr(X2APIC, 0x808, Some(0x5f)).with(|c| c.tpr_threshold = 6);
    assert_eq!(g.exit().reason, reason::TPR_BELOW_THRESHOLD);
    assert_eq!((g.m.cpu.state.rip, g.apic(0x80)), (CODE + 2, 0x5f));
}
