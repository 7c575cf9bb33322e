//! Delivery of interrupts and exceptions.

use iced_x86::code_asm::*;
use turtles_cpu::attention::Attention;
use turtles_cpu::state::{Activity, Seg, reg};
use turtles_cpu::{Cpu, Exit};
use x86defs::{dr, rflags, vector};

use crate::machine::*;

fn run_to_shutdown(cpu: &mut Cpu) {
    assert_eq!(cpu.run(1000), Exit::Shutdown);
    assert_eq!(cpu.state.activity, Activity::Shutdown);
}

#[test]
fn real_mode_int_pushes_flags_cs_ip_and_iret_returns() {
    let mut m = Machine::real().with(|s| s.set_rflags(rflags::IF | rflags::CF));
    m.asm(|a| {
        a.int(0x21).unwrap();
        a.hlt().unwrap();
    });
    m.asm_at(HANDLERS + 16 * 0x21, 0, 16, |a| {
        a.mov(bp, sp).unwrap();
        a.mov(bx, word_ptr(bp)).unwrap();
        a.mov(cx, word_ptr(bp + 2)).unwrap();
        a.mov(dx, word_ptr(bp + 4)).unwrap();
        a.iret().unwrap();
    });
    m.run();
    assert_eq!(m.reg(reg::RBX), 2);
    assert_eq!(m.reg(reg::RCX), CODE >> 4);
    assert_eq!(m.reg(reg::RDX) & 0xffff, rflags::IF | rflags::CF | 2);
    assert_eq!(m.cpu.state.seg(Seg::Cs).base + m.cpu.state.rip, CODE + 3);
    assert_eq!(m.reg(reg::RSP), 0x7000);
    assert_ne!(m.cpu.state.rflags() & rflags::IF, 0);
}

#[test]
fn real_mode_without_room_in_the_vector_table_shuts_down() {
    let mut m = Machine::real().with(|s| s.idtr.limit = 3);
    m.asm(|a| a.int(0x21).unwrap());
    run_to_shutdown(&mut m.cpu);
    assert_eq!(m.cpu.state.rip, 0);
}

#[test]
fn long_mode_exception_from_user_switches_to_rsp0() {
    let mut m = Machine::long().user();
    m.asm(|a| a.ud2().unwrap());
    assert_eq!(m.vector(), 6);
    let s = &m.cpu.state;
    assert_eq!((s.cpl, s.seg(Seg::Cs).selector, s.seg(Seg::Ss).selector), (0, KCODE, 0));
    assert_eq!(m.reg(reg::RSP), KERNEL_STACK - 40);
    assert_eq!(m.stack(0), CODE);
    assert_eq!(m.stack(1), u64::from(UCODE64));
    // A fault is saved with RF.
    assert_eq!(m.stack(2), 2 | rflags::RF);
    assert_eq!((m.stack(3), m.stack(4)), (USER_STACK, u64::from(UDATA)));
    assert!(m.cpu.state.seg(Seg::Ss).unusable());
}

#[test]
fn long_mode_stack_is_aligned_and_error_code_pushed() {
    let mut m = Machine::long();
    m.set(reg::RSP, KERNEL_STACK - 3);
    m.asm(|a| {
        a.mov(ax, 0x58).unwrap();
        a.mov(ds, eax).unwrap();
    });
    m.gdt(0x58, descriptor(0, 0xf_ffff, DATA32 & !0x80));
    assert_eq!(m.fault(), (u64::from(vector::NP), 0x58));
    assert_eq!(m.reg(reg::RSP), KERNEL_STACK - 16 - 48);
    assert_eq!(m.stack(4), KERNEL_STACK - 3);
    assert_eq!(m.stack(5), u64::from(KDATA));
}

#[test]
fn interrupt_stack_table_is_used_at_the_same_privilege_too() {
    let mut m = Machine::long();
    m.idt(6, gate(KCODE, HANDLERS + 16 * 6, 0x8e, 1));
    m.asm(|a| a.ud2().unwrap());
    assert_eq!(m.vector(), 6);
    assert_eq!(m.reg(reg::RSP), IST1 - 40);
    assert_eq!(m.cpu.state.seg(Seg::Ss).selector, KDATA);
    assert_eq!((m.stack(3), m.stack(4)), (KERNEL_STACK, u64::from(KDATA)));
}

#[test]
fn software_interrupts_need_the_gates_privilege() {
    let mut m = Machine::long().user();
    m.asm(|a| a.int(0x80).unwrap());
    // #GP with the IDT bit, EXT clear, and RIP at the INT.
    assert_eq!(m.fault(), (13, 0x80 * 8 + 2));
    assert_eq!(m.stack(1), CODE);

    let mut m = Machine::long().user();
    m.idt(0x80, gate(KCODE, HANDLERS + 16 * 0x80, 0xee, 0));
    m.asm(|a| a.int(0x80).unwrap());
    assert_eq!(m.vector(), 0x80);
    assert_eq!((m.stack(0), m.stack(2)), (CODE + 2, 2));
}

#[test]
fn int3_into_and_int1_differ_in_their_checks() {
    let mut m = Machine::protected().user();
    m.asm(|a| a.int3().unwrap());
    assert_eq!(m.fault(), (13, 3 * 8 + 2));
    let mut m = Machine::protected().user();
    m.asm(|a| a.int1().unwrap());
    // INT1 is not subject to the DPL check, and is a trap: RIP past it.
    assert_eq!(m.vector(), 1);
    assert_eq!(m.stack(0), CODE + 1);
    let mut m = Machine::protected();
    m.set(reg::RAX, 0x7fff_ffff);
    m.asm(|a| {
        a.inc(eax).unwrap();
        a.into().unwrap();
    });
    assert_eq!(m.vector(), 4);
}

#[test]
fn absent_and_malformed_gates() {
    for (entry, expected) in [
        (gate(KCODE, HANDLERS, 0x0e, 0), (11, 0x40 * 8 + 2)),
        (gate(KCODE, HANDLERS, 0x8c, 0), (13, 0x40 * 8 + 2)),
        (gate(0, HANDLERS, 0x8e, 0), (13, 0)),
        (gate(KDATA, HANDLERS, 0x8e, 0), (13, u64::from(KDATA))),
        (gate(0xff8, HANDLERS, 0x8e, 0), (13, 0xff8)),
        (gate(0x1008, HANDLERS, 0x8e, 0), (13, 0x1008)),
    ] {
        let mut m = Machine::long();
        m.idt(0x40, entry);
        m.asm(|a| a.int(0x40).unwrap());
        assert_eq!(m.fault(), expected, "{entry:#x}");
    }
}

#[test]
fn faults_on_the_way_set_ext_for_external_events() {
    let mut m = Machine::long().with(|s| s.set_rflags(rflags::IF));
    m.idt(0x50, gate(KDATA, HANDLERS, 0x8e, 0));
    m.log.lock().unwrap().interrupts.push_back(0x50);
    m.attention.raise(Attention::INTERRUPT);
    m.asm(|a| a.nop().unwrap());
    m.step_into_handler();
    m.attention.clear(Attention::INTERRUPT);
    assert_eq!(m.fault(), (13, u64::from(KDATA) | 1));
}

#[test]
fn contributory_exceptions_make_a_double_fault_then_shutdown() {
    // #NP on the way to #GP's handler.
    let mut m = Machine::long();
    m.idt(13, gate(KCODE, HANDLERS, 0x0e, 0));
    m.asm(|a| {
        a.mov(ax, 0x1000).unwrap();
        a.mov(ds, eax).unwrap();
    });
    assert_eq!(m.fault(), (8, 0));
    assert_eq!(m.stack(1), CODE + 4);

    let mut m = Machine::long();
    m.idt(13, gate(KCODE, HANDLERS, 0x0e, 0));
    m.idt(8, gate(KCODE, HANDLERS, 0x0e, 0));
    m.asm(|a| {
        a.mov(ax, 0x1000).unwrap();
        a.mov(ds, eax).unwrap();
    });
    run_to_shutdown(&mut m.cpu);
    assert_eq!(m.cpu.state.rip, CODE + 4);
}

#[test]
fn benign_then_contributory_is_delivered_one_after_the_other() {
    let mut m = Machine::long();
    m.idt(6, gate(KCODE, HANDLERS, 0x0e, 0));
    m.asm(|a| a.ud2().unwrap());
    assert_eq!(m.fault(), (11, 6 * 8 + 3));
}

#[test]
fn page_fault_reports_address_and_code() {
    let mut m = Machine::long().user();
    m.asm(|a| a.mov(byte_ptr(0x4000_0000u64), 1).unwrap());
    assert_eq!(m.fault(), (14, 6));
    assert_eq!(m.cpu.state.cr2, 0x4000_0000);
}

#[test]
fn page_fault_on_the_way_to_a_page_fault_is_double() {
    let mut m = Machine::long().user();
    m.put64(TSS + 4, 0x5000_0000);
    m.idt(8, gate(KCODE, HANDLERS + 16 * 8, 0x8e, 1));
    m.asm(|a| a.mov(byte_ptr(0x4000_0000u64), 1).unwrap());
    assert_eq!(m.fault(), (8, 0));
    assert_eq!(m.reg(reg::RSP), IST1 - 48);
}

#[test]
fn non_canonical_kernel_stack_is_a_stack_fault() {
    let mut m = Machine::long().user();
    m.put64(TSS + 4, 1 << 62);
    m.idt(12, gate(KCODE, HANDLERS + 16 * 12, 0x8e, 1));
    m.asm(|a| a.ud2().unwrap());
    assert_eq!(m.fault(), (12, 1));
}

#[test]
fn protected_mode_inner_gate_uses_the_tss() {
    let mut m = Machine::protected().user().with(|s| s.set_rflags(rflags::IF | rflags::NT));
    m.idt(0x30, gate(KCODE, HANDLERS + 16 * 0x30, 0xef, 0));
    m.asm(|a| a.int(0x30).unwrap());
    assert_eq!(m.vector(), 0x30);
    assert_eq!(m.reg(reg::RSP), KERNEL_STACK - 20);
    assert_eq!((m.stack(0), m.stack(1)), (CODE + 2, u64::from(UCODE32)));
    assert_eq!(m.stack(2), rflags::IF | rflags::NT | 2);
    assert_eq!((m.stack(3), m.stack(4)), (USER_STACK, u64::from(UDATA)));
    // A trap gate leaves IF; NT is cleared.
    assert_eq!(m.cpu.state.rflags() & (rflags::IF | rflags::NT), rflags::IF);
}

#[test]
fn sixteen_bit_gate_pushes_words() {
    let mut m = Machine::protected();
    m.idt(0x30, gate(KCODE, HANDLERS + 16 * 0x30, 0x86, 0));
    m.asm(|a| a.int(0x30).unwrap());
    m.run();
    assert_eq!(m.reg(reg::RSP), KERNEL_STACK - 6);
    assert_eq!(m.get(KERNEL_STACK - 6, 2), (CODE + 2) & 0xffff);
    assert_eq!(m.get(KERNEL_STACK - 4, 2), u64::from(KCODE));
}

#[test]
fn bad_inner_stacks_are_tss_faults() {
    for (stack, expected) in [(0u16, (10, 0)), (UDATA, (10, 0x20)), (KCODE, (10, 8)), (0x1000, (10, 0x1000))]
    {
        let mut m = Machine::protected().user();
        m.put32(TSS + 8, u32::from(stack));
        m.idt(0x30, gate(KCODE, HANDLERS, 0xee, 0));
        // A conforming handler runs at CPL 3, on the stack there is.
        m.gdt(FREE, descriptor(0, 0xf_ffff, 0xc09f));
        m.idt(10, gate(FREE, HANDLERS + 16 * 10, 0x8e, 0));
        m.put(HANDLERS + 16 * 10, &[0x90]);
        m.asm(|a| a.int(0x30).unwrap());
        m.step_into_handler();
        let s = &m.cpu.state;
        assert_eq!((s.cpl, s.seg(Seg::Cs).selector), (3, FREE | 3), "{expected:?}");
        assert_eq!((10, m.get(USER_STACK - 16, 4)), expected);
    }
}

#[test]
fn single_step_traps_after_each_instruction() {
    let mut m = Machine::long();
    m.idt(1, gate(KCODE, HANDLERS + 16, 0x8e, 0));
    m.asm(|a| {
        a.pushfq().unwrap();
        a.or(dword_ptr(rsp), 0x100).unwrap();
        a.popfq().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
    });
    assert_eq!(m.vector(), 1);
    // POPFQ itself does not trap; the NOP after it does, with RF clear and TF saved.
    let popf_end = CODE + 1 + 7 + 1;
    assert_eq!(m.stack(0), popf_end + 1);
    assert_eq!(m.stack(2) & (rflags::TF | rflags::RF), rflags::TF);
    assert_eq!(m.cpu.state.dr6, dr::DR6_FIXED_1 | dr::DR6_BS);
    assert_eq!(m.cpu.state.rflags() & rflags::TF, 0);
}

#[test]
fn branch_trap_flag_steps_over_straight_code() {
    let mut m = Machine::long().with(|s| {
        s.set_rflags(rflags::TF);
        s.msrs.debugctl = 2;
    });
    m.asm(|a| {
        let mut target = a.create_label();
        a.nop().unwrap();
        a.nop().unwrap();
        a.jmp(target).unwrap();
        a.nop().unwrap();
        a.set_label(&mut target).unwrap();
        a.nop().unwrap();
    });
    assert_eq!(m.vector(), 1);
    assert_eq!(m.stack(0), CODE + 5);
    // The exception has cleared BTF.
    assert_eq!(m.cpu.state.msrs.debugctl, 0);
}

#[test]
fn int_with_trap_flag_does_not_trap_in_the_handler() {
    let mut m = Machine::long().with(|s| s.set_rflags(rflags::TF));
    m.asm(|a| a.int(0x40).unwrap());
    assert_eq!(m.vector(), 0x40);
}

#[test]
fn mov_ss_holds_off_interrupts_for_one_instruction() {
    let mut m = Machine::long().with(|s| s.set_rflags(rflags::IF));
    m.set(reg::RAX, u64::from(KDATA));
    m.asm(|a| {
        a.mov(ss, eax).unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
    });
    m.steps(1);
    m.log.lock().unwrap().interrupts.push_back(0x50);
    m.attention.raise(Attention::INTERRUPT);
    assert_eq!(m.cpu.run(1), Exit::Budget);
    assert_eq!(m.cpu.state.rip, CODE + 3);
    m.step_into_handler();
    m.attention.clear(Attention::INTERRUPT);
    assert_eq!(m.vector(), 0x50);
    assert_eq!(m.stack(0), CODE + 3);
}

#[test]
fn sti_holds_off_interrupts_until_after_hlt() {
    let mut m = Machine::long();
    m.asm(|a| {
        a.sti().unwrap();
        a.hlt().unwrap();
        a.nop().unwrap();
    });
    m.log.lock().unwrap().interrupts.push_back(0x50);
    m.attention.raise(Attention::INTERRUPT);
    let _ = m.cpu.run(3);
    m.attention.clear(Attention::INTERRUPT);
    assert_eq!(m.vector(), 0x50);
    // The HLT was executed: the handler returns past it.
    assert_eq!(m.stack(0), CODE + 2);
}

#[test]
fn nmi_is_blocked_until_iret() {
    let mut m = Machine::long();
    m.asm(|a| a.nop().unwrap());
    m.attention.raise(Attention::NMI);
    m.asm_at(HANDLERS + 32, HANDLERS + 32, 64, |a| {
        a.nop().unwrap();
        a.iretq().unwrap();
    });
    m.steps(1);
    assert_eq!(m.cpu.state.rip, HANDLERS + 33);
    assert!(m.cpu.state.nmi_blocked);
    m.attention.raise(Attention::NMI);
    m.steps(1);
    assert_eq!(m.cpu.state.rip, CODE);
    assert!(!m.cpu.state.nmi_blocked);
    m.steps(1);
    assert_eq!(m.cpu.state.rip, HANDLERS + 33);
}

#[test]
fn general_detect_guards_debug_registers() {
    let mut m = Machine::long().with(|s| s.dr7 |= dr::DR7_GD);
    m.asm(|a| a.mov(rax, dr0).unwrap());
    assert_eq!(m.vector(), 1);
    assert_eq!(m.stack(0), CODE);
    assert_eq!(m.cpu.state.dr6 & dr::DR6_BD, dr::DR6_BD);
    assert_eq!(m.cpu.state.dr7 & dr::DR7_GD, 0);
}

#[test]
fn instruction_breakpoint_is_a_fault_that_rf_passes() {
    let mut m = Machine::long().with(|s| {
        s.dr[0] = CODE + 1;
        s.dr7 |= 1;
    });
    m.asm(|a| {
        a.nop().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    m.asm_at(HANDLERS + 16, HANDLERS + 16, 64, |a| {
        a.or(dword_ptr(rsp + 16), 0x10000).unwrap();
        a.inc(ebx).unwrap();
        a.iretq().unwrap();
    });
    m.run();
    assert_eq!(m.cpu.state.rip, CODE + 3);
    assert_eq!(m.reg(reg::RBX), 1);
    assert_eq!(m.cpu.state.dr6 & 0xf, 1);
    assert_eq!(m.cpu.state.rflags() & rflags::RF, 0);
}
