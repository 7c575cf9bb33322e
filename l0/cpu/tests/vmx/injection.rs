//! Events that a VM entry injects.

use iced_x86::code_asm::*;
use turtles_cpu::attention::Attention;
use turtles_cpu::state::{Activity, CpuState, Event, EventKind, Shadow, reg};
use turtles_cpu::vmx::Controls;
use x86defs::vmx::{pin, primary as p, reason};
use x86defs::{dr, rflags};

use crate::guest::{exit, long, non_root, primary};
use crate::machine::*;

const VALID: u32 = 1 << 31;

fn event(vector: u8, kind: EventKind) -> Event {
    Event { vector, kind, error_code: None, instruction_length: 0 }
}

fn inject(event: Event) -> impl FnOnce(&mut CpuState) {
    move |s| s.injected = Some(event)
}

#[test]
fn events_of_each_type_are_delivered() {
    use EventKind::*;
    for (kind, vector, code, length) in [
        (ExternalInterrupt, 0x40, None, 0),
        (Nmi, 2, None, 0),
        (HardwareException, 13, Some(0x18), 0),
        (HardwareException, 6, None, 0),
        (SoftwareInterrupt, 0x80, None, 2),
        (PrivilegedSoftwareException, 1, None, 1),
        (SoftwareException, 3, None, 1),
    ] {
        let event = Event { vector, kind, error_code: code, instruction_length: length };
        // Neither IF nor the exception bitmap have a say.
        let controls = Controls { exception_bitmap: !(1 << 14), ..primary(0) };
        let mut m = long(controls).with(inject(event));
        assert_eq!(m.vector(), u64::from(vector), "{kind:?}");
        let first = u64::from(code.is_some());
        if let Some(code) = code {
            assert_eq!(m.stack(0), u64::from(code));
        }
        // Software events save RIP past the instruction they stand for.
        assert_eq!(m.stack(first), CODE + u64::from(length), "{kind:?}");
        assert_eq!(m.cpu.state.nmi_blocked, kind == Nmi);
    }
}

#[test]
fn software_events_need_the_gates_privilege() {
    use EventKind::*;
    for (kind, vector, faults) in [
        (SoftwareInterrupt, 0x80, true),
        (SoftwareException, 3, true),
        (PrivilegedSoftwareException, 1, false),
    ] {
        let event = Event { vector, kind, error_code: None, instruction_length: 2 };
        let mut m = non_root(Machine::long().user(), primary(0)).with(inject(event));
        assert_eq!(m.vector(), if faults { 13 } else { u64::from(vector) });
        if faults {
            // Not past the instruction then.
            assert_eq!((m.stack(0), m.stack(1)), (u64::from(vector) * 8 + 2, CODE));
        }
    }
}

#[test]
fn a_fault_in_the_delivery_exits_with_the_injected_event() {
    let controls = Controls { exception_bitmap: 1 << 11, ..primary(0) };
    let event =
        Event { vector: 0x80, kind: EventKind::SoftwareInterrupt, error_code: None, instruction_length: 2 };
    let mut m = long(controls).with(inject(event));
    m.idt(0x80, gate(KCODE, HANDLERS, 0x0e, 0));
    let e = exit(&mut m);
    assert_eq!((e.idt_vectoring, e.instruction_length), (VALID | 4 << 8 | 0x80, 2));
    assert_eq!((e.interruption & 0xff, m.cpu.state.rip, m.cpu.state.injected), (11, CODE, None));
}

#[test]
fn a_fault_in_the_delivery_of_an_injected_exception_is_a_double_fault() {
    let page_fault = Event { error_code: Some(2), ..event(14, EventKind::HardwareException) };
    let mut m = long(primary(0)).with(inject(page_fault));
    m.cpu.vmx.controls.page_fault_match = 1 << 31;
    m.cpu.vmx.controls.exception_bitmap = 1 << 14;
    m.idt(14, gate(KCODE, HANDLERS, 0x0e, 0));
    assert_eq!(m.vector(), 8);
    // An external interrupt of that vector is benign.
    let mut m = long(primary(0)).with(inject(event(14, EventKind::ExternalInterrupt)));
    m.idt(14, gate(KCODE, HANDLERS, 0x0e, 0));
    assert_eq!(m.vector(), 11);
}

#[test]
fn injection_comes_first() {
    let controls = Controls {
        primary: p::INTERRUPT_WINDOW_EXITING,
        pin: pin::NMI_EXITING | pin::PREEMPTION_TIMER,
        ..primary(0)
    };
    let mut m = long(controls).with(|s| {
        s.set_rflags(rflags::IF);
        s.injected = Some(event(0x40, EventKind::ExternalInterrupt));
    });
    m.attention.raise(Attention::NMI);
    assert_eq!(exit(&mut m).reason, reason::PREEMPTION_TIMER);
    assert_eq!((m.cpu.state.rip, m.cpu.state.instructions), (HANDLERS + 16 * 0x40, 0));
}

#[test]
fn with_the_monitor_trap_flag_the_handler_does_not_start() {
    let mut m = long(primary(p::MONITOR_TRAP_FLAG)).with(inject(event(0x40, EventKind::ExternalInterrupt)));
    assert_eq!(exit(&mut m).reason, reason::MONITOR_TRAP_FLAG);
    assert_eq!(m.cpu.state.rip, HANDLERS + 16 * 0x40);
    // An injected MTF exit: at once, even without the control.
    let mut m = long(Controls { pending_mtf: true, ..primary(0) });
    assert_eq!(exit(&mut m).reason, reason::MONITOR_TRAP_FLAG);
    assert_eq!((m.cpu.state.rip, m.cpu.state.instructions), (CODE, 0));
}

#[test]
fn inactive_guests_become_active() {
    let mut m = long(primary(0)).with(|s| {
        s.activity = Activity::Halted;
        s.injected = Some(event(0x40, EventKind::ExternalInterrupt));
    });
    m.asm_at(HANDLERS + 16 * 0x40, HANDLERS + 16 * 0x40, 64, |a| {
        a.mov(ebx, 5).unwrap();
        a.hlt().unwrap();
    });
    m.run();
    assert_eq!(m.reg(reg::RBX), 5);
}

#[test]
fn pending_debug_exceptions_after_entry() {
    // Not vectoring: delivered first.
    let mut m = long(primary(0)).with(|s| s.pending_debug = dr::DR6_BS | 2);
    m.asm(|a| a.nop().unwrap());
    assert_eq!(m.vector(), 1);
    assert_eq!((m.stack(0), m.cpu.state.dr6), (CODE, dr::DR6_FIXED_1 | dr::DR6_BS | 2));
    // Blocked by MOV SS: after the next instruction.
    let mut m = long(primary(0)).with(|s| {
        s.pending_debug = 2;
        s.shadow = Shadow::MovSs;
    });
    m.asm(|a| a.nop().unwrap());
    assert_eq!(m.vector(), 1);
    assert_eq!(m.stack(0), CODE + 1);
    // Vectoring: gone, unless a software event is injected under MOV SS blocking.
    for (kind, vector, shadow, kept) in [
        (EventKind::ExternalInterrupt, 0x40, Shadow::None, false),
        (EventKind::HardwareException, 6, Shadow::MovSs, false),
        (EventKind::SoftwareException, 3, Shadow::None, false),
        (EventKind::SoftwareException, 3, Shadow::MovSs, true),
        (EventKind::SoftwareInterrupt, 0x80, Shadow::MovSs, true),
    ] {
        let mut m = long(primary(0)).with(|s| {
            s.pending_debug = dr::DR6_BS;
            s.shadow = shadow;
            s.injected = Some(event(vector, kind));
        });
        assert_eq!(m.vector(), if kept { 1 } else { u64::from(vector) }, "{kind:?} {shadow:?}");
        if kept {
            assert_eq!(m.stack(0), HANDLERS + 16 * u64::from(vector));
        }
    }
}
