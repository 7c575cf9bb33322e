//! Virtual interrupts: "Evaluation of Pending Virtual Interrupts", "Virtual-Interrupt Delivery", "Posted-Interrupt
//! Processing".

use iced_x86::code_asm::*;
use turtles_cpu::Exit;
use turtles_cpu::attention::Attention;
use turtles_cpu::state::{Activity, reg};
use x86defs::vmx::{exit_ctl, pin, primary, secondary};
use x86defs::{rflags, vector};

use crate::guest::{APIC_ACCESS, Guest};
use crate::machine::{CODE, HANDLERS, Machine};

const DELIVERY: u32 = secondary::VIRTUALIZE_APIC_ACCESSES | secondary::VIRTUAL_INTERRUPT_DELIVERY;
const DESCRIPTOR: u64 = 0x33_0000;
const NOTIFICATION: u8 = 0xf2;

/// Requests of these vectors, with IF set or clear.
fn requested(vectors: &[u8], interrupts: bool, program: impl FnOnce(&mut CodeAssembler)) -> Guest {
    let mut g = Guest::new(Machine::long()).with_apic(DELIVERY).code(program);
    for &v in vectors {
        let at = 0x200 + u64::from(v / 32) * 16;
        let old = g.apic(at) as u32;
        g.set_apic(at, old | 1 << (v % 32));
    }
    if interrupts {
        let flags = g.m.cpu.state.rflags();
        g.m.cpu.state.set_rflags(flags | rflags::IF);
    }
    let rvi = vectors.iter().copied().max().unwrap_or(0);
    g.with(|c| c.interrupt_status = u16::from(rvi))
}

fn handler(v: u64) -> u64 {
    HANDLERS + 16 * v
}

#[test]
fn a_recognized_interrupt_is_delivered() {
    let mut g = requested(&[0x41, 0x45, 0x90], true, |a| a.nop().unwrap());
    assert_eq!(g.m.vector(), 0x90);
    assert_eq!(g.m.cpu.vmx.controls.interrupt_status, 0x9045);
    assert_eq!((g.apic(0x240), g.apic(0x140), g.apic(0xa0)), (0, 1 << 0x10, 0x90));
    assert_eq!(g.m.stack(0), CODE);
}

#[test]
fn priorities() {
    // VTPR, SVI, RVI: delivered only above both classes.
    for (tpr, svi, rvi, delivered) in [
        (0, 0, 0x41, true),
        (0x40, 0, 0x4f, false),
        (0x30, 0, 0x41, true),
        (0x3f, 0, 0x41, true),
        (0, 0x41, 0x4f, false),
        (0, 0x3f, 0x41, true),
        (0x50, 0x3f, 0x41, false),
    ] {
        let mut g = requested(&[rvi], true, |a| a.hlt().unwrap());
        g.set_apic(0x80, tpr);
        g = g.with(|c| c.interrupt_status |= svi << 8);
        assert_eq!(g.m.cpu.run(100), Exit::Halted);
        let expected = if delivered { handler(rvi.into()) + 1 } else { CODE + 1 };
        assert_eq!(g.m.cpu.state.rip, expected, "{tpr:#x} {svi:#x} {rvi:#x}");
        let ppr = u64::from(tpr.max(u32::from(svi) & 0xf0));
        assert_eq!(g.apic(0xa0), if delivered { u64::from(rvi) & 0xf0 } else { ppr });
    }
}

#[test]
fn blocking() {
    let mut g = requested(&[0x41], false, |a| {
        a.nop().unwrap();
        a.sti().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
    });
    assert_eq!(g.m.vector(), 0x41);
    assert_eq!(g.m.stack(0), CODE + 3, "one instruction after STI");
    let mut g = requested(&[0x41], false, |a| {
        a.push(rax).unwrap();
        a.popfq().unwrap();
        a.nop().unwrap();
    });
    g.m.set(reg::RAX, rflags::IF);
    assert_eq!(g.m.vector(), 0x41);
    assert_eq!(g.m.stack(0), CODE + 2);
    let mut g = requested(&[0x41], true, |a| {
        a.mov(ss, eax).unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
    });
    // The interrupt is there before MOV SS.
    assert_eq!(g.m.vector(), 0x41);
    assert_eq!(g.m.stack(0), CODE);
}

#[test]
fn interrupt_window_exiting_stops_recognition() {
    let mut g = requested(&[0x41], false, |a| {
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    g = g.with(|c| c.primary |= primary::INTERRUPT_WINDOW_EXITING);
    assert_eq!(g.m.cpu.run(100), Exit::Halted);
    assert_eq!(g.m.cpu.vmx.controls.interrupt_status, 0x41);
}

#[test]
fn lowering_the_priority_lets_it_through() {
    let mut g = requested(&[0x41], true, |a| {
        a.nop().unwrap();
        a.xor(eax, eax).unwrap();
        a.mov(cr8, rax).unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    g.set_apic(0x80, 0x40);
    g.enter();
    assert_eq!(g.m.vector(), 0x41);
    assert_eq!(g.m.get(g.m.stack(0), 1), 0x90);
    assert_eq!(g.m.cpu.state.instructions, 4);
    // By memory and by MSR it is no different.
    let mut g = requested(&[0x41], true, |a| {
        a.mov(dword_ptr(APIC_ACCESS + 0x80), eax).unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    g.set_apic(0x80, 0x40);
    g.enter();
    assert_eq!(g.m.vector(), 0x41);
    assert_eq!(g.m.get(g.m.stack(0), 1), 0x90);
}

#[test]
fn end_of_interrupt_brings_the_next() {
    let mut g = requested(&[0x41, 0x61], true, |a| a.hlt().unwrap());
    let at = handler(0x61);
    g.m.asm_at(at, at, 64, |a| {
        a.sti().unwrap();
        a.mov(dword_ptr(APIC_ACCESS + 0xb0), eax).unwrap();
        a.nop().unwrap();
    });
    assert_eq!(g.m.vector(), 0x41);
    assert_eq!(g.m.get(g.m.stack(0), 1), 0x90);
    assert_eq!(g.m.cpu.vmx.controls.interrupt_status, 0x4100);
}

#[test]
fn it_wakes_a_halted_guest_and_only_if_it_may() {
    let mut g = requested(&[0x41], true, |a| a.hlt().unwrap());
    g.m.cpu.state.activity = Activity::Halted;
    assert_eq!(g.m.vector(), 0x41);
    let mut g = requested(&[0x41], false, |a| a.nop().unwrap());
    g.m.cpu.state.activity = Activity::Halted;
    assert_eq!(g.m.cpu.run(100), Exit::Halted);
    assert_eq!(g.m.cpu.state.rip, CODE);
}

#[test]
fn a_self_ipi_arrives_after_its_instruction() {
    let mut g = requested(&[], true, |a| {
        a.mov(dword_ptr(APIC_ACCESS + 0x300), 0x4_0041).unwrap();
        a.nop().unwrap();
    });
    assert_eq!(g.m.vector(), 0x41);
    assert_eq!(g.m.get(g.m.stack(0), 1), 0x90);
}

#[test]
fn non_maskable_interrupts_come_first() {
    let mut g = requested(&[0x41], true, |a| a.nop().unwrap());
    g.m.attention.raise(Attention::NMI);
    let at = handler(vector::NMI.into());
    g.m.cpu.step();
    assert_eq!(g.m.cpu.state.rip, at);
}

/// A guest with posted interrupts whose notification is waiting.
fn posted(interrupts: bool, program: impl FnOnce(&mut CodeAssembler)) -> Guest {
    let g = requested(&[], interrupts, program).with(|c| {
        c.pin |= pin::EXTERNAL_INTERRUPT_EXITING | pin::POSTED_INTERRUPTS;
        c.exit |= exit_ctl::ACKNOWLEDGE_INTERRUPT;
        c.posted_interrupt_vector = NOTIFICATION;
        c.posted_interrupt_descriptor = DESCRIPTOR;
    });
    g.m.log.lock().unwrap().interrupts.push_back(NOTIFICATION);
    g.m.attention.raise(Attention::INTERRUPT);
    g
}

fn post(g: &mut Guest, vectors: &[u8]) {
    for &v in vectors {
        let at = DESCRIPTOR + u64::from(v / 8);
        let old = g.m.get(at, 1) as u8;
        g.m.put(at, &[old | 1 << (v % 8)]);
    }
    g.m.put64(DESCRIPTOR + 32, 0x1234_5679);
}

#[test]
fn posted_interrupts_are_delivered_without_an_exit() {
    let mut g = posted(true, |a| a.nop().unwrap());
    post(&mut g, &[0x31, 0x7f, 0xe0]);
    assert_eq!(g.m.vector(), 0xe0);
    assert_eq!(g.m.cpu.vmx.controls.interrupt_status, 0xe07f);
    assert_eq!((g.apic(0x210), g.apic(0x230), g.apic(0x270)), (1 << 0x11, 1 << 31, 0));
    for i in 0..4 {
        assert_eq!(g.m.get(DESCRIPTOR + 8 * i, 8), 0);
    }
    // Outstanding notification is cleared, and nothing else of its word.
    assert_eq!(g.m.get(DESCRIPTOR + 32, 8), 0x1234_5678);
    // The processor's own APIC was told the end of the notification.
    assert_eq!(g.m.log.lock().unwrap().mmio, [(0xfee0_00b0, 0)]);
}

#[test]
fn posted_interrupts_wake_a_halted_guest() {
    let mut g = posted(true, |a| a.nop().unwrap());
    g.m.cpu.state.activity = Activity::Halted;
    post(&mut g, &[0x31]);
    assert_eq!(g.m.vector(), 0x31);
    // With nothing posted it goes on halting.
    let mut g = posted(true, |a| a.nop().unwrap());
    g.m.cpu.state.activity = Activity::Halted;
    assert_eq!(g.m.cpu.run(100), Exit::Halted);
    assert_eq!((g.m.cpu.state.activity, g.m.cpu.state.rip), (Activity::Halted, CODE));
}

#[test]
fn posted_interrupts_are_taken_while_the_guest_blocks_interrupts() {
    let mut g = posted(false, |a| a.nop().unwrap());
    post(&mut g, &[0x31]);
    g.m.steps(1);
    assert_eq!((g.m.cpu.vmx.controls.interrupt_status, g.apic(0x210)), (0x31, 1 << 0x11));
    assert_eq!(g.m.cpu.state.rip, CODE + 1);
}
