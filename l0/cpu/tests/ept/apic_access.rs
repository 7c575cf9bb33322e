//! "Virtualizing Memory-Mapped APIC Accesses": which accesses go to the virtual-APIC page, which are VM exits, and what
//! follows a write. The ranges are written down here as the SDM lists them.

use iced_x86::code_asm::*;
use turtles_cpu::Exit;
use turtles_cpu::state::reg;
use x86defs::vmx::{primary, reason, secondary};
use x86defs::{cr0, vector};

use crate::guest::{APIC_ACCESS, Guest, VIRTUAL_APIC};
use crate::level::{ALL, Page, R, W};
use crate::machine::{CODE, DATA, IDT, KERNEL_STACK, Machine, PDPT};

const ACCESSES: u32 = secondary::VIRTUALIZE_APIC_ACCESSES;
const REGISTERS: u32 = ACCESSES | secondary::APIC_REGISTER_VIRTUALIZATION;
const DELIVERY: u32 = ACCESSES | secondary::VIRTUAL_INTERRUPT_DELIVERY;

/// First bytes of the four-byte ranges that reads are virtualized in.
const READ_RANGES: &[u64] = &[
    0x020, 0x030, 0x080, 0x0b0, 0x0d0, 0x0e0, 0x0f0, 0x100, 0x110, 0x120, 0x130, 0x140, 0x150, 0x160, 0x170,
    0x180, 0x190, 0x1a0, 0x1b0, 0x1c0, 0x1d0, 0x1e0, 0x1f0, 0x200, 0x210, 0x220, 0x230, 0x240, 0x250, 0x260,
    0x270, 0x280, 0x300, 0x310, 0x320, 0x330, 0x340, 0x350, 0x360, 0x370, 0x380, 0x3e0,
];
const WRITE_RANGES: &[u64] = &[
    0x020, 0x080, 0x0b0, 0x0d0, 0x0e0, 0x0f0, 0x280, 0x300, 0x310, 0x320, 0x330, 0x340, 0x350, 0x360, 0x370,
    0x380, 0x3e0,
];

/// Bits 15:12 of the qualification.
const WRITE: u64 = 1 << 12;
const FETCH: u64 = 2 << 12;
const DELIVERING: u64 = 3 << 12;
const PHYSICAL_DELIVERING: u64 = 10 << 12;
const PHYSICAL: u64 = 15 << 12;

fn in_range(ranges: &[u64], offset: u64, size: u64) -> bool {
    ranges.iter().any(|&first| first <= offset && offset + size <= first + 4)
}

fn reads(controls: u32, offset: u64, size: u64) -> bool {
    let contained = offset % 16 + size <= 4;
    contained && if controls == REGISTERS { in_range(READ_RANGES, offset, size) } else { offset == 0x80 }
}

fn writes(controls: u32, offset: u64, size: u64) -> bool {
    let contained = offset % 16 + size <= 4;
    contained
        && match controls {
            REGISTERS => in_range(WRITE_RANGES, offset, size),
            DELIVERY => matches!(offset, 0x80 | 0xb0 | 0x300),
            _ => offset == 0x80,
        }
}

/// One-instruction programs that read [RBX] into RAX, or write RAX to [RBX]; 16 bytes apart.
fn accesses(m: &mut Machine) -> [(u64, u64); 4] {
    let sizes = [1, 2, 4, 8];
    std::array::from_fn(|i| {
        let at = |n: u64| CODE + 0x100 * (i as u64) + 0x80 * n;
        m.asm_at(at(0), at(0), 64, |a| match sizes[i] {
            1 => a.mov(al, byte_ptr(rbx)).unwrap(),
            2 => a.mov(ax, word_ptr(rbx)).unwrap(),
            4 => a.mov(eax, dword_ptr(rbx)).unwrap(),
            _ => a.mov(rax, qword_ptr(rbx)).unwrap(),
        });
        m.asm_at(at(1), at(1), 64, |a| match sizes[i] {
            1 => a.mov(byte_ptr(rbx), al).unwrap(),
            2 => a.mov(word_ptr(rbx), ax).unwrap(),
            4 => a.mov(dword_ptr(rbx), eax).unwrap(),
            _ => a.mov(qword_ptr(rbx), rax).unwrap(),
        });
        (at(0), sizes[i])
    })
}

#[test]
fn every_read() {
    for controls in [ACCESSES, REGISTERS, DELIVERY] {
        let mut g = Guest::new(Machine::long()).with_apic(controls);
        let programs = accesses(&mut g.m);
        for offset in 0..0x1000 {
            g.m.put(VIRTUAL_APIC + offset, &[(offset * 7) as u8]);
        }
        for (at, size) in programs {
            for offset in 0..0x1000 - 8 {
                g.m.cpu.state.rip = at;
                g.m.set(reg::RBX, APIC_ACCESS + offset);
                g.m.set(reg::RAX, 0);
                let context = format!("{controls:#x}, {size} bytes at {offset:#x}");
                if reads(controls, offset, size) {
                    assert_eq!(g.m.cpu.step(), Exit::Budget, "{context}");
                    assert_eq!(g.m.reg(reg::RAX), g.m.get(VIRTUAL_APIC + offset, size as usize), "{context}");
                } else {
                    let exit = g.exit();
                    assert_eq!((exit.reason, exit.qualification), (reason::APIC_ACCESS, offset), "{context}");
                    assert_eq!((g.m.cpu.state.rip, g.m.reg(reg::RAX)), (at, 0), "{context}");
                    assert_ne!(exit.instruction_length, 0);
                }
            }
        }
    }
}

#[test]
fn every_write() {
    for controls in [ACCESSES, REGISTERS, DELIVERY] {
        let mut g = Guest::new(Machine::long()).with_apic(controls);
        let programs = accesses(&mut g.m);
        for (at, size) in programs {
            for offset in 0..0x1000 - 8 {
                g.m.cpu.state.rip = at + 0x80;
                g.m.set(reg::RBX, APIC_ACCESS + offset);
                g.m.set(reg::RAX, 0x1111_1111_1111_1111);
                let there = VIRTUAL_APIC + offset;
                g.m.put64(there & !3, 0);
                g.m.put64(there, 0);
                let context = format!("{controls:#x}, {size} bytes at {offset:#x}");
                let done = g.m.cpu.step();
                if !writes(controls, offset, size) {
                    assert_eq!(done, Exit::Vm, "{context}");
                    let exit = g.m.cpu.vmx.exit;
                    let qualification = WRITE | offset;
                    assert_eq!((exit.reason, exit.qualification), (reason::APIC_ACCESS, qualification));
                    assert_eq!((g.m.cpu.state.rip, g.m.get(there, 8)), (at + 0x80, 0), "{context}");
                    continue;
                }
                // What was written, but for what the processor clears in it.
                let mut written =
                    0x1111_1111 & (u64::from(u32::MAX >> (32 - 8 * size)) << (8 * (offset & 3)));
                match offset {
                    0x80 => written &= 0xff,
                    0xb0 if controls == DELIVERY => written = 0,
                    0x310..=0x313 => written &= 0xff00_0000,
                    _ => {}
                }
                assert_eq!(g.m.get(there & !3, 4), written, "{context}");
                assert_ne!(g.m.cpu.state.rip, at + 0x80);
                let quiet = offset == 0x80
                    || (0x310..0x314).contains(&offset)
                    || offset == 0xb0 && controls == DELIVERY;
                if quiet {
                    assert_eq!(done, Exit::Budget, "{context}");
                } else {
                    assert_eq!(done, Exit::Vm, "{context}");
                    let exit = g.m.cpu.vmx.exit;
                    assert_eq!((exit.reason, exit.qualification), (reason::APIC_WRITE, offset), "{context}");
                }
            }
        }
    }
}

fn long(controls: u32) -> Guest {
    Guest::new(Machine::long()).with_apic(controls)
}

#[test]
fn without_a_tpr_shadow_every_access_exits() {
    for (program, kind) in [
        ((|a| a.mov(eax, dword_ptr(APIC_ACCESS + 0x80)).unwrap()) as fn(&mut CodeAssembler), 0),
        (|a| a.mov(dword_ptr(APIC_ACCESS + 0x80), eax).unwrap(), WRITE),
    ] {
        let mut g = long(REGISTERS).with(|c| c.primary &= !primary::USE_TPR_SHADOW).code(program);
        assert_eq!(g.exit().qualification, kind | 0x80);
    }
}

#[test]
fn without_the_control_the_page_is_memory() {
    let mut g = long(0).code(|a| {
        a.mov(dword_ptr(APIC_ACCESS + 0x80), eax).unwrap();
        a.mov(ecx, dword_ptr(APIC_ACCESS + 0x80)).unwrap();
    });
    g.m.set(reg::RAX, 0x33);
    g.m.steps(2);
    assert_eq!((g.m.reg(reg::RCX), g.apic(0x80)), (0x33, 0));
    // Once it is special, what the TLB knew of it does not count.
    let mut g =
        g.with(|c| c.secondary |= REGISTERS).code(|a| a.mov(ecx, dword_ptr(APIC_ACCESS + 0x90)).unwrap());
    assert_eq!(g.exit().qualification, 0x90);
}

#[test]
fn the_page_is_known_by_its_physical_address() {
    let mut g = long(REGISTERS).code(|a| {
        a.mov(eax, dword_ptr(DATA + 0x20)).unwrap();
        a.mov(eax, dword_ptr(DATA + 0x24)).unwrap();
    });
    g.map(DATA, Page::new(APIC_ACCESS, ALL));
    g.set_apic(0x20, 0x0500_0000);
    g.m.steps(1);
    assert_eq!(g.m.reg(reg::RAX), 0x0500_0000);
    assert_eq!(g.exit().qualification, 0x24);
}

#[test]
fn refusals_come_before() {
    let mut g = long(REGISTERS).code(|a| a.mov(dword_ptr(APIC_ACCESS), eax).unwrap());
    g.allow(APIC_ACCESS, R);
    assert_eq!(g.violation().1, APIC_ACCESS);
    g.allow(APIC_ACCESS, R | W);
    assert_eq!(g.exit().qualification, WRITE);
    g.m = g.m.with(|s| s.cr0 |= cr0::WP);
    g.m.put64(PDPT, 0x85);
    g.m.put64(PDPT + 8, 0x87);
    g.m.cpu.state.gpr.set(reg::RSP, 0x4000_0000 + KERNEL_STACK);
    g.m.cpu.invalidate(|_| true);
    assert_eq!(g.m.vector(), u64::from(vector::PF));
}

#[test]
fn fetches_exit() {
    let mut g = long(REGISTERS);
    g.m.cpu.state.rip = APIC_ACCESS + 0x80;
    let exit = g.exit();
    assert_eq!((exit.reason, exit.qualification), (reason::APIC_ACCESS, FETCH | 0x80));
}

#[test]
fn a_read_modify_write_is_a_read_and_a_write() {
    let mut g = long(ACCESSES).code(|a| {
        a.add(dword_ptr(APIC_ACCESS + 0x80), 0x20).unwrap();
        a.lock().or(dword_ptr(APIC_ACCESS + 0x80), 0x0707).unwrap();
        a.xchg(dword_ptr(APIC_ACCESS + 0x80), eax).unwrap();
        a.nop().unwrap();
    });
    g.set_apic(0x80, 0x10);
    g.m.steps(1);
    assert_eq!(g.apic(0x80), 0x30);
    g.m.steps(1);
    assert_eq!(g.apic(0x80), 0x37);
    g.m.steps(2);
    assert_eq!((g.apic(0x80), g.m.reg(reg::RAX)), (0, 0x37));
    // EOI can be written under virtual-interrupt delivery, but not read.
    let mut g = long(DELIVERY).code(|a| a.add(dword_ptr(APIC_ACCESS + 0xb0), 1).unwrap());
    assert_eq!(g.exit().qualification, 0xb0);
    let mut g = long(ACCESSES).code(|a| a.lock().inc(dword_ptr(APIC_ACCESS + 0x84)).unwrap());
    assert_eq!(g.exit().qualification, WRITE | 0x84);
}

#[test]
fn repeated_writes_are_operations_each() {
    let mut g = long(ACCESSES).code(|a| {
        a.std().unwrap();
        a.rep().stosd().unwrap();
    });
    g.set_apic(0x80, 0x50);
    g = g.with(|c| c.tpr_threshold = 4);
    g.m.set(reg::RDI, APIC_ACCESS + 0x80);
    g.m.set(reg::RCX, 2);
    g.m.set(reg::RAX, 0x30);
    // The first element's write takes effect before the second is written.
    let exit = g.exit();
    assert_eq!(exit.reason, reason::TPR_BELOW_THRESHOLD);
    assert_eq!((g.m.reg(reg::RCX), g.m.reg(reg::RDI)), (1, APIC_ACCESS + 0x7c));
    assert_eq!(g.m.cpu.state.instructions, 1);
}

#[test]
fn an_operation_writes_one_register() {
    // A push of two words to the page would be one operation: event delivery in real mode.
    let mut m = Machine::real();
    m.asm(|a| a.int(0x21).unwrap());
    let mut g = Guest::new(m).with_apic(ACCESSES);
    g.map(0x6000, Page::new(APIC_ACCESS, ALL));
    g.m.cpu.state.gpr.set(reg::RSP, 0x6086);
    let exit = g.exit();
    assert_eq!(exit.reason, reason::APIC_ACCESS);
    assert_eq!(exit.qualification & 0xf000, DELIVERING);
    // Nothing comes of the write that was done.
    g.m.cpu.state.gpr.set(reg::RSP, 0x5000);
    g = g.with(|c| c.tpr_threshold = 0);
    assert_eq!(g.m.vector(), 0x21);
}

#[test]
fn event_delivery_has_its_own_type() {
    let mut g = long(REGISTERS).code(|a| a.ud2().unwrap());
    g.m.set(reg::RSP, APIC_ACCESS + 0x100);
    let exit = g.exit();
    assert_eq!(exit.reason, reason::APIC_ACCESS);
    assert_eq!(exit.qualification & 0xf000, DELIVERING);
    let mut g = long(REGISTERS).code(|a| a.ud2().unwrap());
    g.map(IDT, Page::new(APIC_ACCESS, ALL));
    assert_eq!(g.exit().qualification, DELIVERING | (16 * u64::from(vector::UD)));
}

#[test]
fn paging_structures_in_the_page_exit() {
    let mut g = long(REGISTERS).code(|a| {
        a.nop().unwrap();
        a.mov(eax, dword_ptr(DATA)).unwrap();
    });
    g.m.steps(1);
    g.map(PDPT, Page::new(APIC_ACCESS, ALL));
    let exit = g.exit();
    assert_eq!((exit.reason, exit.qualification & 0xf000), (reason::APIC_ACCESS, PHYSICAL));
    let mut g = long(REGISTERS).code(|a| a.ud2().unwrap());
    g.m.put64(PDPT + 8, 0x87);
    g.m.cpu.state.idtr.base = 0x4000_0000 + IDT;
    g.m = g.m.with(|_| {});
    g.m.put64(PDPT + 8, 0x10_0000 | 7);
    g.map(0x10_0000, Page::new(APIC_ACCESS, ALL));
    assert_eq!(g.exit().qualification & 0xf000, PHYSICAL_DELIVERING);
}
