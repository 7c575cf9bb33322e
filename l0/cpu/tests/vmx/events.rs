//! Exceptions, interrupts and what else ends non-root operation between instructions.

use iced_x86::code_asm::*;
use turtles_cpu::Exit;
use turtles_cpu::attention::Attention;
use turtles_cpu::state::{Activity, Event, EventKind, Seg, Shadow, reg};
use turtles_cpu::vmx::{Controls, VmExit};
use x86defs::vmx::{exit_ctl, pin, primary as p, reason};
use x86defs::{cr0, dr, rflags};

use crate::guest::{exit, exit_of, long, non_root, primary};
use crate::machine::*;

const VALID: u32 = 1 << 31;
const CODE_VALID: u32 = 1 << 11;
const HARDWARE: u32 = 3 << 8;
const UNBLOCKING: u32 = 1 << 12;

fn exceptions(bitmap: u32) -> Controls {
    Controls { exception_bitmap: bitmap, ..primary(0) }
}

fn pins(bits: u32) -> Controls {
    Controls { pin: bits, ..primary(0) }
}

#[test]
fn exceptions_by_the_bitmap() {
    let mut m = long(exceptions(1 << 6)).with(|s| s.shadow = Shadow::Sti);
    let exit = exit_of(&mut m, |a| a.ud2().unwrap());
    let expected =
        VmExit { reason: reason::EXCEPTION_OR_NMI, interruption: VALID | HARDWARE | 6, ..VmExit::default() };
    assert_eq!(exit, expected);
    let s = &m.cpu.state;
    // Nothing of the delivery has happened; RF is as the frame would have had it.
    assert_eq!((s.rip, s.gpr.get(reg::RSP), s.rflags()), (CODE, KERNEL_STACK, 2 | rflags::RF));
    assert_eq!(s.shadow, Shadow::Sti);
    let mut m = long(exceptions(!(1 << 6 | 1 << 14)));
    m.asm(|a| a.ud2().unwrap());
    assert_eq!(m.vector(), 6);
    let mut m = long(exceptions(1 << 13));
    m.set(reg::RAX, 0x58);
    let exit = exit_of(&mut m, |a| a.mov(ds, eax).unwrap());
    assert_eq!((exit.interruption, exit.interruption_error), (VALID | CODE_VALID | HARDWARE | 13, 0x58));
}

#[test]
fn real_mode_exceptions_have_no_error_code() {
    let mut m = non_root(Machine::real(), exceptions(1 << 13));
    let exit = exit_of(&mut m, |a| a.mov(bx, word_ptr(0xffff)).unwrap());
    assert_eq!((exit.interruption, exit.interruption_error), (VALID | HARDWARE | 13, 0));
}

#[test]
fn page_faults_by_mask_and_match() {
    // (bit 14, mask, match, exits) for an error code of 2 (write, not present)
    for (bit, mask, matching, exits) in [
        (1, 0, 0, true),
        (0, 0, 0, false),
        (1, 2, 0, false),
        (0, 2, 0, true),
        (1, 2, 2, true),
        (1, 0, 1, false),
    ] {
        let controls =
            Controls { page_fault_mask: mask, page_fault_match: matching, ..exceptions(bit << 14) };
        let mut m = long(controls).with(|s| s.cr2 = 0x77);
        m.set(reg::RSI, 0x1_0000_0123);
        m.asm(|a| a.mov(qword_ptr(rsi), rax).unwrap());
        if exits {
            let e = exit(&mut m);
            assert_eq!((e.qualification, m.cpu.state.cr2), (0x1_0000_0123, 0x77));
            assert_eq!((e.interruption, e.interruption_error), (VALID | CODE_VALID | HARDWARE | 14, 2));
        } else {
            assert_eq!(m.fault(), (14, 2));
            assert_eq!(m.cpu.state.cr2, 0x1_0000_0123);
        }
    }
}

#[test]
fn debug_exceptions_leave_the_debug_registers() {
    // Single-step: a trap, after the instruction.
    let mut m = long(exceptions(2)).with(|s| s.set_rflags(rflags::TF));
    let e = exit_of(&mut m, |a| a.nop().unwrap());
    assert_eq!((e.interruption, e.qualification), (VALID | HARDWARE | 1, dr::DR6_BS));
    let s = &m.cpu.state;
    assert_eq!((s.rip, s.dr6, s.pending_debug), (CODE + 1, dr::DR6_FIXED_1, 0));
    // General detection: a fault. DR7.GD stays.
    let mut m = long(exceptions(2)).with(|s| s.dr7 |= dr::DR7_GD);
    let e = exit_of(&mut m, |a| a.mov(rax, dr0).unwrap());
    assert_eq!((e.qualification, m.cpu.state.rip), (dr::DR6_BD, CODE));
    assert_ne!(m.cpu.state.dr7 & dr::DR7_GD, 0);
    // An instruction breakpoint: a fault, without RF.
    let mut m = long(exceptions(2)).with(|s| {
        s.dr[2] = CODE;
        s.dr7 |= 1 << 4;
    });
    let e = exit_of(&mut m, |a| a.nop().unwrap());
    assert_eq!((e.qualification, m.cpu.state.rip, m.cpu.state.rflags()), (4, CODE, 2));
    // A data breakpoint.
    let mut m = long(exceptions(2)).with(|s| {
        s.dr[1] = DATA;
        s.dr7 |= 1 << 2 | 3 << 20;
        s.gpr.set(reg::RSI, DATA);
    });
    let e = exit_of(&mut m, |a| a.mov(al, byte_ptr(rsi)).unwrap());
    assert_eq!((e.qualification, m.cpu.state.dr6), (2, dr::DR6_FIXED_1));
}

#[test]
fn software_exceptions() {
    // RF is as the trap would save it: clear, whatever it was.
    let mut m = long(exceptions(1 << 3)).with(|s| s.set_rflags(rflags::RF));
    let e = exit_of(&mut m, |a| a.int3().unwrap());
    assert_eq!(m.cpu.state.rflags(), 2);
    assert_eq!((e.interruption, e.instruction_length), (VALID | 6 << 8 | 3, 1));
    assert_eq!((m.cpu.state.rip, e.idt_vectoring), (CODE, 0));
    let mut m = non_root(Machine::protected(), exceptions(1 << 4)).with(|s| s.set_rflags(rflags::OF));
    let e = exit_of(&mut m, |a| a.into().unwrap());
    assert_eq!((e.interruption, e.instruction_length), (VALID | 6 << 8 | 4, 1));
    let mut m = long(exceptions(1 << 1));
    let e = exit_of(&mut m, |a| a.int1().unwrap());
    assert_eq!((e.interruption, e.instruction_length, e.qualification), (VALID | 5 << 8 | 1, 1, 0));
    // INT n is no exception, whatever its vector.
    let mut m = long(exceptions(!(1 << 14)));
    m.asm(|a| a.int(3).unwrap());
    assert_eq!(m.vector(), 3);
}

#[test]
fn a_fault_in_a_delivery_records_what_was_delivered() {
    // INT 0x80 without a gate that allows it.
    let mut m = non_root(Machine::long().user(), exceptions(1 << 13));
    let e = exit_of(&mut m, |a| a.int(0x80).unwrap());
    assert_eq!((e.interruption, e.interruption_error), (VALID | CODE_VALID | HARDWARE | 13, 0x80 * 8 + 2));
    assert_eq!((e.idt_vectoring, e.instruction_length), (VALID | 4 << 8 | 0x80, 2));
    assert_eq!((m.cpu.state.rip, m.cpu.state.rflags()), (CODE, 2 | rflags::RF));
    // #UD whose handler is not present.
    let mut m = long(exceptions(1 << 11));
    m.idt(6, gate(KCODE, HANDLERS, 0x0e, 0));
    let e = exit_of(&mut m, |a| a.ud2().unwrap());
    assert_eq!((e.interruption, e.interruption_error), (VALID | CODE_VALID | HARDWARE | 11, 6 * 8 + 3));
    assert_eq!(e.idt_vectoring, VALID | HARDWARE | 6);
    // An exception with an error code.
    let mut m = long(exceptions(1 << 8));
    m.idt(14, gate(KCODE, HANDLERS, 0x0e, 0));
    m.set(reg::RSI, 1 << 40);
    let e = exit_of(&mut m, |a| a.mov(al, byte_ptr(rsi)).unwrap());
    // The double fault that comes of it is an event of its own; the page fault has left its address.
    assert_eq!((e.interruption, e.idt_vectoring), (VALID | CODE_VALID | HARDWARE | 8, 0));
    assert_eq!(m.cpu.state.cr2, 1 << 40);
    // The second fault exits by its own bit, before it makes a double fault; the page fault has left its address.
    let mut m = long(exceptions(1 << 11)).with(|s| s.cr2 = 7);
    m.cpu.vmx.controls.page_fault_match = 1 << 31;
    m.cpu.vmx.controls.exception_bitmap |= 1 << 14;
    m.idt(14, gate(KCODE, HANDLERS, 0x0e, 0));
    m.set(reg::RSI, 1 << 40);
    let e = exit_of(&mut m, |a| a.mov(al, byte_ptr(rsi)).unwrap());
    assert_eq!((e.interruption, e.interruption_error), (VALID | CODE_VALID | HARDWARE | 11, 14 * 8 + 3));
    assert_eq!((e.idt_vectoring, m.cpu.state.cr2), (VALID | CODE_VALID | HARDWARE | 14, 1 << 40));
    // In the delivery of a double fault: no triple fault.
    let mut m = long(exceptions(1 << 11));
    for vector in [6, 8] {
        m.idt(vector, gate(KCODE, HANDLERS, 0x0e, 0));
    }
    m.cpu.state.injected = Some(Event {
        vector: 8,
        kind: EventKind::HardwareException,
        error_code: Some(0),
        instruction_length: 0,
    });
    let e = exit_of(&mut m, |a| a.nop().unwrap());
    assert_eq!((e.interruption & 0xff, e.idt_vectoring), (11, VALID | CODE_VALID | HARDWARE | 8));
    // An external interrupt.
    let mut m = long(exceptions(1 << 11)).with(|s| s.set_rflags(rflags::IF));
    m.idt(0x30, gate(KCODE, HANDLERS, 0x0e, 0));
    m.log.lock().unwrap().interrupts.push_back(0x30);
    m.attention.raise(Attention::INTERRUPT);
    let e = exit_of(&mut m, |a| a.nop().unwrap());
    assert_eq!((e.idt_vectoring, e.interruption_error), (VALID | 0x30, 0x30 * 8 + 3));
    assert!(m.log.lock().unwrap().interrupts.is_empty(), "it is acknowledged");
}

#[test]
fn triple_faults() {
    let mut m = long(primary(0)).with(|s| s.idtr.limit = 0);
    let e = exit_of(&mut m, |a| a.ud2().unwrap());
    assert_eq!(e, VmExit { reason: reason::TRIPLE_FAULT, ..VmExit::default() });
    assert_eq!((m.cpu.state.rip, m.cpu.state.activity), (CODE, Activity::Active));
}

#[test]
fn nmis() {
    // Delivered.
    let mut m = long(primary(0));
    m.attention.raise(Attention::NMI);
    m.asm(|a| a.nop().unwrap());
    assert_eq!(m.vector(), 2);
    assert!(m.cpu.state.nmi_blocked);
    // NMI exiting; real blocking counts.
    for (bits, blocked, exits) in [
        (pin::NMI_EXITING, false, true),
        (pin::NMI_EXITING, true, false),
        (pin::NMI_EXITING | pin::VIRTUAL_NMIS, true, true),
    ] {
        let mut m = long(pins(bits)).with(|s| s.nmi_blocked = blocked);
        m.attention.raise(Attention::NMI);
        m.asm(|a| a.hlt().unwrap());
        if exits {
            let e = exit(&mut m);
            assert_eq!((e.reason, e.interruption), (reason::EXCEPTION_OR_NMI, VALID | 2 << 8 | 2));
            assert_eq!((m.attention.get() & Attention::NMI, m.cpu.state.nmi_blocked), (0, blocked));
        } else {
            m.run();
        }
    }
}

#[test]
fn nmi_windows() {
    let controls = Controls { primary: p::NMI_WINDOW_EXITING, ..pins(pin::NMI_EXITING | pin::VIRTUAL_NMIS) };
    let mut m = long(controls.clone());
    m.attention.raise(Attention::NMI);
    assert_eq!(exit_of(&mut m, |a| a.nop().unwrap()).reason, reason::NMI_WINDOW);
    assert_ne!(m.attention.get() & Attention::NMI, 0);
    // Virtual-NMI blocking ends with IRET.
    let mut m = long(controls).with(|s| s.nmi_blocked = true);
    m.set(reg::RSP, DATA);
    for (i, value) in [HANDLERS, u64::from(KCODE), 2, KERNEL_STACK, u64::from(KDATA)].into_iter().enumerate()
    {
        m.put64(DATA + 8 * i as u64, value);
    }
    let e = exit_of(&mut m, |a| a.iretq().unwrap());
    assert_eq!((e.reason, m.cpu.state.rip, m.cpu.state.nmi_blocked), (reason::NMI_WINDOW, HANDLERS, false));
}

#[test]
fn iret_and_blocking_by_nmi() {
    // (pin controls, blocking after IRET)
    for (bits, blocked) in
        [(0, false), (pin::NMI_EXITING, true), (pin::NMI_EXITING | pin::VIRTUAL_NMIS, false)]
    {
        let controls = Controls { exception_bitmap: 1 << 13, ..pins(bits) };
        let frame = |m: &mut Machine, code: u64| {
            m.set(reg::RSP, DATA);
            let values = [HANDLERS, code, 2, KERNEL_STACK, u64::from(KDATA)];
            for (i, value) in values.into_iter().enumerate() {
                m.put64(DATA + 8 * i as u64, value);
            }
        };
        let mut m = long(controls.clone()).with(|s| s.nmi_blocked = true);
        frame(&mut m, u64::from(KCODE));
        m.asm(|a| a.iretq().unwrap());
        m.steps(1);
        assert_eq!(m.cpu.state.nmi_blocked, blocked);
        // An IRET that faults unblocks as well, and the exit says so.
        let mut m = long(controls).with(|s| s.nmi_blocked = true);
        frame(&mut m, 0);
        let e = exit_of(&mut m, |a| a.iretq().unwrap());
        assert_eq!(m.cpu.state.nmi_blocked, blocked);
        let said = if blocked { 0 } else { UNBLOCKING };
        assert_eq!(e.interruption, VALID | CODE_VALID | HARDWARE | 13 | said);
        // Only for that IRET.
        let e = exit_of(&mut m, |a| a.iretq().unwrap());
        assert_eq!(e.interruption & UNBLOCKING, 0);
    }
}

#[test]
fn external_interrupts() {
    let interrupt = |m: &Machine| {
        m.log.lock().unwrap().interrupts.push_back(0x31);
        m.attention.raise(Attention::INTERRUPT);
    };
    // RFLAGS.IF does not matter.
    let mut m = long(pins(pin::EXTERNAL_INTERRUPT_EXITING));
    interrupt(&m);
    let e = exit_of(&mut m, |a| a.nop().unwrap());
    assert_eq!(e, VmExit { reason: reason::EXTERNAL_INTERRUPT, ..VmExit::default() });
    assert_eq!(m.log.lock().unwrap().interrupts.len(), 1);
    let acknowledging =
        Controls { exit: exit_ctl::ACKNOWLEDGE_INTERRUPT, ..pins(pin::EXTERNAL_INTERRUPT_EXITING) };
    let mut m = long(acknowledging.clone());
    interrupt(&m);
    let e = exit_of(&mut m, |a| a.nop().unwrap());
    assert_eq!(e.interruption, VALID | 0x31);
    assert!(m.log.lock().unwrap().interrupts.is_empty());
    // It has gone meanwhile.
    let mut m = long(acknowledging);
    m.attention.raise(Attention::INTERRUPT);
    m.asm(|a| a.nop().unwrap());
    assert_eq!(m.cpu.run(1), Exit::Budget);
    // Without the control it is delivered, by IF.
    let mut m = long(primary(0));
    interrupt(&m);
    m.asm(|a| {
        a.nop().unwrap();
        a.sti().unwrap();
        a.nop().unwrap();
    });
    assert_eq!(m.vector(), 0x31);
    assert_eq!(m.stack(0), CODE + 3);
}

#[test]
fn interrupt_windows() {
    let mut m = long(primary(p::INTERRUPT_WINDOW_EXITING));
    m.asm(|a| {
        a.nop().unwrap();
        a.sti().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
    });
    let e = exit(&mut m);
    assert_eq!((e.reason, e.instruction_length, m.cpu.state.rip), (reason::INTERRUPT_WINDOW, 0, CODE + 3));
}

#[test]
fn halted_guests() {
    let halted = |controls: Controls| {
        long(controls).with(|s| {
            s.activity = Activity::Halted;
            s.rip = CODE + 1;
        })
    };
    // Interrupts wake it by IF, or by exiting.
    let mut m = halted(primary(0));
    m.attention.raise(Attention::INTERRUPT);
    m.log.lock().unwrap().interrupts.push_back(0x31);
    assert_eq!(m.cpu.run(10), Exit::Halted);
    let mut m = halted(pins(pin::EXTERNAL_INTERRUPT_EXITING));
    m.attention.raise(Attention::INTERRUPT);
    assert_eq!(exit(&mut m).reason, reason::EXTERNAL_INTERRUPT);
    // An event that exits leaves the guest halted.
    assert_eq!((m.cpu.state.activity, m.cpu.state.rip), (Activity::Halted, CODE + 1));
    let mut m = halted(pins(pin::NMI_EXITING));
    m.attention.raise(Attention::NMI);
    exit(&mut m);
    assert_eq!(m.cpu.state.activity, Activity::Halted);
    let mut m = halted(primary(p::INTERRUPT_WINDOW_EXITING)).with(|s| s.set_rflags(rflags::IF));
    assert_eq!(exit(&mut m).reason, reason::INTERRUPT_WINDOW);
    let mut m = halted(Controls { pending_mtf: true, ..primary(0) });
    assert_eq!(exit(&mut m).reason, reason::MONITOR_TRAP_FLAG);
    // One that is delivered wakes it.
    let mut m = halted(primary(0)).with(|s| s.set_rflags(rflags::IF));
    m.attention.raise(Attention::INTERRUPT);
    m.log.lock().unwrap().interrupts.push_back(0x31);
    assert_eq!(m.vector(), 0x31);
    assert_eq!(m.stack(0), CODE + 1);
}

#[test]
fn other_inactive_states() {
    let everything = Controls {
        primary: p::INTERRUPT_WINDOW_EXITING,
        pending_mtf: true,
        ..pins(pin::EXTERNAL_INTERRUPT_EXITING | pin::NMI_EXITING | pin::PREEMPTION_TIMER)
    };
    // Shutdown: NMIs and the timer, but no interrupt, window or MTF.
    let mut m = long(Controls { preemption_deadline: u64::MAX, ..everything.clone() }).with(|s| {
        s.activity = Activity::Shutdown;
        s.set_rflags(rflags::IF);
    });
    m.attention.raise(Attention::INTERRUPT);
    assert_eq!(m.cpu.run(10), Exit::Halted);
    m.attention.raise(Attention::NMI);
    assert_eq!(exit(&mut m).reason, reason::EXCEPTION_OR_NMI);
    assert_eq!(m.cpu.state.activity, Activity::Shutdown);
    let mut m = long(everything.clone()).with(|s| s.activity = Activity::Shutdown);
    assert_eq!(exit(&mut m).reason, reason::PREEMPTION_TIMER);
    // Waiting for a start-up IPI: nothing of it.
    let mut m = long(everything).with(|s| s.activity = Activity::WaitForSipi);
    m.attention.raise(Attention::NMI | Attention::INTERRUPT | Attention::PREEMPTION);
    assert_eq!(m.cpu.run(10), Exit::Halted);
}

#[test]
fn preemption_timer() {
    // The bus's clock shows 1000 and the ticks.
    let controls = |deadline| Controls { preemption_deadline: deadline, ..pins(pin::PREEMPTION_TIMER) };
    let mut m = long(controls(1000));
    let e = exit_of(&mut m, |a| a.nop().unwrap());
    assert_eq!((e.reason, m.cpu.state.rip), (reason::PREEMPTION_TIMER, CODE));
    let mut m = long(controls(1010));
    m.asm(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.jmp(again).unwrap();
    });
    assert_eq!(m.cpu.run(5), Exit::Budget);
    // The owner asks too early, then in time.
    m.attention.raise(Attention::PREEMPTION);
    assert_eq!(m.cpu.run(5), Exit::Budget);
    assert_eq!(m.attention.get() & Attention::PREEMPTION, 0);
    m.attention.raise(Attention::PREEMPTION);
    assert_eq!(exit(&mut m).reason, reason::PREEMPTION_TIMER);
    assert_eq!(m.cpu.state.instructions, 10);
    // It counts in the hypervisor's time, whatever TSC the guest sees.
    let mut m = long(Controls { primary: p::USE_TSC_OFFSETTING, tsc_offset: 1 << 40, ..controls(2000) });
    m.asm(|a| a.hlt().unwrap());
    m.run();
}

#[test]
fn monitor_trap_flag() {
    let mut m = long(primary(p::MONITOR_TRAP_FLAG));
    m.asm(|a| {
        a.nop().unwrap();
        a.cld().unwrap();
        a.ud2().unwrap();
    });
    for rip in [CODE + 1, CODE + 2] {
        let e = exit(&mut m);
        assert_eq!(
            (e, m.cpu.state.rip),
            (VmExit { reason: reason::MONITOR_TRAP_FLAG, ..VmExit::default() }, rip)
        );
    }
    // After a fault: before its handler's first instruction.
    exit(&mut m);
    assert_eq!(m.cpu.state.rip, HANDLERS + 16 * 6);
    // After each iteration of a repeated string instruction.
    let mut m = long(primary(p::MONITOR_TRAP_FLAG));
    m.set(reg::RDI, DATA);
    m.set(reg::RCX, 3);
    m.asm(|a| a.rep().stosb().unwrap());
    for left in [2, 1, 0] {
        exit(&mut m);
        assert_eq!(m.reg(reg::RCX), left);
    }
    // After HLT, which the guest is left in.
    let mut m = long(primary(p::MONITOR_TRAP_FLAG));
    assert_eq!(exit_of(&mut m, |a| a.hlt().unwrap()).reason, reason::MONITOR_TRAP_FLAG);
    assert_eq!(m.cpu.state.activity, Activity::Halted);
    // Before the debug trap, which is kept.
    let mut m = long(Controls { exception_bitmap: 2, ..primary(p::MONITOR_TRAP_FLAG) })
        .with(|s| s.set_rflags(rflags::TF));
    assert_eq!(exit_of(&mut m, |a| a.nop().unwrap()).reason, reason::MONITOR_TRAP_FLAG);
    assert_eq!(m.cpu.state.pending_debug, dr::DR6_BS);
}

/// Each of these is due; the first one wins, and so on without it.
#[test]
fn priorities_between_instructions() {
    let all = Controls {
        primary: p::INTERRUPT_WINDOW_EXITING | p::NMI_WINDOW_EXITING,
        exception_bitmap: 2,
        pending_mtf: true,
        ..pins(pin::EXTERNAL_INTERRUPT_EXITING | pin::NMI_EXITING | pin::VIRTUAL_NMIS | pin::PREEMPTION_TIMER)
    };
    let mut m = long(all.clone()).with(|s| {
        s.set_rflags(rflags::IF);
        s.pending_debug = dr::DR6_BS;
    });
    m.attention.raise(Attention::NMI | Attention::INTERRUPT);
    let mut controls = Controls { pending_mtf: false, ..all };
    assert_eq!(exit(&mut m).reason, reason::MONITOR_TRAP_FLAG);
    let e = exit(&mut m);
    assert_eq!((e.reason, e.interruption & 0xff), (reason::EXCEPTION_OR_NMI, 1));
    assert_eq!(exit(&mut m).reason, reason::PREEMPTION_TIMER);
    controls.pin &= !pin::PREEMPTION_TIMER;
    m.cpu.enter_non_root(controls.clone());
    assert_eq!(exit(&mut m).reason, reason::NMI_WINDOW);
    controls.primary &= !p::NMI_WINDOW_EXITING;
    m.cpu.enter_non_root(controls.clone());
    let e = exit(&mut m);
    assert_eq!((e.reason, e.interruption & 0xff), (reason::EXCEPTION_OR_NMI, 2));
    assert_eq!(exit(&mut m).reason, reason::INTERRUPT_WINDOW);
    controls.primary &= !p::INTERRUPT_WINDOW_EXITING;
    m.cpu.enter_non_root(controls);
    assert_eq!(exit(&mut m).reason, reason::EXTERNAL_INTERRUPT);
}

#[test]
fn pending_debug_exceptions_blocked_by_mov_ss_are_saved() {
    // MOV SS hits a data breakpoint; the next instruction exits.
    let prepare = |controls: Controls| {
        let mut m = long(controls).with(|s| {
            s.dr[0] = DATA;
            s.dr7 |= 1 | 3 << 16;
            s.gpr.set(reg::RSI, DATA);
            s.set_rflags(rflags::TF);
        });
        m.put16(DATA, KDATA);
        m
    };
    let mut m = prepare(primary(0));
    m.asm(|a| {
        a.mov(ss, word_ptr(rsi)).unwrap();
        a.cpuid().unwrap();
    });
    assert_eq!(exit(&mut m).reason, reason::CPUID);
    assert_eq!((m.cpu.state.shadow, m.cpu.state.pending_debug), (Shadow::MovSs, 1 | dr::DR6_BS));
    // A debug exception's own exit does not save them.
    let mut m = prepare(exceptions(2)).with(|s| s.dr7 |= dr::DR7_GD);
    m.asm(|a| {
        a.mov(ss, word_ptr(rsi)).unwrap();
        a.mov(rax, dr0).unwrap();
    });
    assert_eq!(exit(&mut m).qualification & !15, dr::DR6_BD);
    assert_eq!(m.cpu.state.pending_debug, 0);
}

#[test]
fn task_switches() {
    let machine = |controls: Controls| {
        let mut m = non_root(Machine::protected(), controls);
        m.gdt(FREE, descriptor(TSS2, 0x67, 0x89));
        m.gdt(FREE + 16, gate(FREE, 0, 0x85, 0));
        m
    };
    let unchanged = |m: &Machine| {
        assert_eq!((m.cpu.state.tr.selector, m.cpu.state.cr0 & cr0::TS), (TR, 0));
        assert_eq!(m.get(GDT + u64::from(FREE) + 5, 1), 0x89);
    };
    // CALL and JMP, to the TSS and through a task gate.
    for (opcode, selector, source) in
        [(0x9a, FREE, 0), (0xea, FREE, 2), (0x9a, FREE + 16, 0), (0xea, FREE + 16, 2)]
    {
        let mut m = machine(primary(0));
        let [low, high] = selector.to_le_bytes();
        m.bytes(&[opcode, 0, 0, 0, 0, low, high]);
        let e = exit(&mut m);
        let qualification = source << 30 | u64::from(FREE);
        assert_eq!(
            (e.reason, e.qualification, e.instruction_length),
            (reason::TASK_SWITCH, qualification, 7)
        );
        assert_eq!((m.cpu.state.rip, e.idt_vectoring), (CODE, 0));
        unchanged(&m);
    }
    // IRET, back to the linked task, which is busy.
    let mut m = machine(primary(0)).with(|s| {
        s.set_rflags(rflags::NT);
        s.nmi_blocked = true;
    });
    m.gdt(FREE, descriptor(TSS2, 0x67, 0x8b));
    m.put16(TSS, FREE);
    let e = exit_of(&mut m, |a| a.iretd().unwrap());
    assert_eq!((e.qualification, e.instruction_length), (1 << 30 | u64::from(FREE), 1));
    assert!(m.cpu.state.nmi_blocked, "the IRET has not happened");
    // A task gate in the IDT: by an exception, a software interrupt, an NMI.
    let mut m = machine(primary(0));
    m.idt(13, gate(FREE, 0, 0x85, 0));
    m.set(reg::RAX, 0x98);
    let e = exit_of(&mut m, |a| a.mov(ds, eax).unwrap());
    assert_eq!(e.qualification, 3 << 30 | u64::from(FREE));
    assert_eq!((e.idt_vectoring, e.idt_vectoring_error), (VALID | CODE_VALID | HARDWARE | 13, 0x98));
    assert_eq!(m.cpu.state.rflags(), 2 | rflags::RF);
    unchanged(&m);
    let mut m = machine(primary(0));
    m.idt(0x20, gate(FREE, 0, 0x85, 0));
    let e = exit_of(&mut m, |a| a.int(0x20).unwrap());
    assert_eq!((e.idt_vectoring, e.instruction_length), (VALID | 4 << 8 | 0x20, 2));
    let mut m = machine(primary(0));
    m.idt(2, gate(FREE, 0, 0x85, 0));
    m.attention.raise(Attention::NMI);
    let e = exit_of(&mut m, |a| a.nop().unwrap());
    assert_eq!((e.idt_vectoring, m.cpu.state.nmi_blocked), (VALID | 2 << 8 | 2, true));
    // The checks come first.
    let mut m = machine(exceptions(1 << 10));
    m.gdt(FREE, descriptor(TSS2, 0x66, 0x89));
    m.bytes(&[0xea, 0, 0, 0, 0, FREE as u8, 0]);
    let e = exit(&mut m);
    assert_eq!((e.interruption & 0xff, e.interruption_error), (10, u32::from(FREE)));
}

#[test]
fn faults_from_the_owner() {
    let page_fault = turtles_cpu::trap::Fault::page(0x5000, 6);
    let mut m = long(exceptions(1 << 14));
    exit_of(&mut m, |a| a.cpuid().unwrap());
    m.cpu.inject_fault(page_fault);
    let e = exit(&mut m);
    assert_eq!((e.interruption & 0xff, e.interruption_error, e.qualification), (14, 6, 0x5000));
    let mut m = long(primary(0));
    m.cpu.vmx.controls.page_fault_match = 1;
    m.cpu.vmx.controls.exception_bitmap = 1 << 14;
    exit_of(&mut m, |a| a.cpuid().unwrap());
    m.cpu.inject_fault(page_fault);
    assert_eq!(m.fault(), (14, 6));
    assert_eq!((m.cpu.state.cr2, m.stack(1), m.stack(3)), (0x5000, CODE, 2 | rflags::RF));
}

#[test]
fn a_failed_delivery_wakes_and_unshadows() {
    let mut m = long(exceptions(1 << 11)).with(|s| {
        s.activity = Activity::Halted;
        s.set_rflags(rflags::IF);
    });
    m.idt(0x30, gate(KCODE, HANDLERS, 0x0e, 0));
    m.log.lock().unwrap().interrupts.push_back(0x30);
    m.attention.raise(Attention::INTERRUPT);
    let e = exit(&mut m);
    assert_eq!((e.idt_vectoring, m.cpu.state.activity), (VALID | 0x30, Activity::Active));
    let mut m = long(exceptions(1 << 11)).with(|s| {
        s.shadow = Shadow::MovSs;
        s.injected = Some(Event {
            vector: 6,
            kind: EventKind::HardwareException,
            error_code: None,
            instruction_length: 0,
        });
    });
    m.idt(6, gate(KCODE, HANDLERS, 0x0e, 0));
    let e = exit(&mut m);
    assert_eq!((e.idt_vectoring, m.cpu.state.shadow), (VALID | HARDWARE | 6, Shadow::None));
    assert_eq!(m.cpu.state.seg(Seg::Cs).selector, KCODE);
}
