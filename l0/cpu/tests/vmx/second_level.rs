//! Where the second level of translation meets exits: VM functions, and EPT violations in the middle of things.

use std::any::Any;

use iced_x86::code_asm::*;
use turtles_cpu::Exit;
use turtles_cpu::attention::Attention;
use turtles_cpu::phys::PhysMemory;
use turtles_cpu::state::{Event, EventKind, reg};
use turtles_cpu::vmx::{Controls, EptAccess, EptFault, EptPage, SecondLevel, VmExit};
use x86defs::rflags;
use x86defs::vmx::{event, pin, reason, secondary as s};

use crate::guest::{exit, exit_of, non_root, secondary};
use crate::machine::*;

const EPTP: u64 = 0x5000_001e;

/// Guest-physical addresses are physical ones, but one page is not there. Its number is in the root pointer.
struct Identity {
    hole: u64,
}

fn pointer_without(page: u64) -> u64 {
    page | 0x1e
}

impl SecondLevel for Identity {
    fn translate(&mut self, _: &PhysMemory, gpa: u64, _: EptAccess) -> Result<EptPage, EptFault> {
        if gpa & !4095 == self.hole {
            return Err(EptFault::Violation { allowed: 0, suppress_ve: true });
        }
        let physical = gpa & !4095;
        Ok(EptPage { physical, large: false, write: true, execute_supervisor: true, execute_user: true })
    }
    fn peek(&self, _: &PhysMemory, gpa: u64) -> Option<u64> {
        Some(gpa)
    }
    fn set_root(&mut self, pointer: u64) -> bool {
        self.hole = pointer & !4095;
        pointer & 0xfff == 0x1e
    }
    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
}

fn under_ept(mut machine: Machine, controls: Controls) -> Machine {
    machine.cpu.vmx.second_level = Some(Box::new(Identity { hole: 1 << 40 }));
    let secondary = controls.secondary | s::ENABLE_EPT;
    non_root(machine, Controls { secondary, ept_pointer: EPTP, ..controls })
}

fn set_hole(m: &mut Machine, page: u64) {
    let mut controls = m.cpu.vmx.controls.clone();
    controls.ept_pointer = pointer_without(page);
    m.cpu.vmx.second_level = Some(Box::new(Identity { hole: page }));
    m.cpu.enter_non_root(controls);
}

/// Where the EPTP list is.
const LIST: u64 = 0x5_0000;

fn functions(bits: u64) -> Controls {
    Controls { vm_function_controls: bits, eptp_list: LIST, ..secondary(s::ENABLE_VMFUNC) }
}

#[test]
fn eptp_switching() {
    // Allowed for users as well; the next access is through the new tables.
    let mut m = under_ept(Machine::long().user(), functions(1));
    m.put64(LIST + 8 * 5, pointer_without(DATA));
    m.set(reg::RCX, 0x1_0000_0005);
    m.set(reg::RSI, DATA);
    m.asm(|a| {
        a.mov(bl, byte_ptr(rsi)).unwrap();
        a.vmfunc().unwrap();
        a.mov(bl, byte_ptr(rsi)).unwrap();
    });
    let e = exit(&mut m);
    assert_eq!((e.reason, e.guest_physical, m.cpu.state.instructions), (reason::EPT_VIOLATION, DATA, 2));
    assert_eq!((m.cpu.vmx.controls.ept_pointer, m.cpu.vmx.controls.eptp_index), (pointer_without(DATA), 0));
    // The index is kept for #VE.
    let controls = functions(1);
    let controls = Controls { secondary: controls.secondary | s::EPT_VIOLATION_VE, ..controls };
    let mut m = under_ept(Machine::long(), controls);
    m.put64(LIST + 8 * 511, EPTP);
    m.set(reg::RCX, 511);
    m.asm(|a| a.vmfunc().unwrap());
    m.steps(1);
    assert_eq!(m.cpu.vmx.controls.eptp_index, 511);
}

#[test]
fn vm_functions_that_exit_or_do_not_exist() {
    let run = |controls: Controls, leaf: u64, entry: u64| {
        let mut m = under_ept(Machine::long(), controls);
        m.put64(LIST, EPTP);
        m.set(reg::RAX, leaf);
        m.set(reg::RCX, entry);
        m.asm(|a| a.vmfunc().unwrap());
        match m.cpu.run(1) {
            Exit::Vm => Some(m.cpu.vmx.exit),
            _ => {
                assert_eq!(m.cpu.state.rip, HANDLERS + 16 * 6);
                None
            }
        }
    };
    let exit = Some(VmExit { reason: reason::VMFUNC, instruction_length: 3, ..VmExit::default() });
    // Not enabled in the function controls; no entry of the list; an entry that VM entry would refuse.
    assert_eq!(run(functions(0), 0, 0), exit);
    assert_eq!(run(functions(1), 1, 0), exit);
    assert_eq!(run(functions(1), 0, 512), exit);
    assert_eq!(run(functions(1), 0, 1), exit);
    assert_eq!(run(functions(1), 64, 0), None);
    assert_eq!(run(Controls { secondary: 0, ..functions(1) }, 0, 0), None);
}

#[test]
fn an_ept_violation_in_a_delivery() {
    let vectored = |m: &mut Machine| {
        let e = exit(m);
        assert_eq!((e.reason, e.guest_linear & !4095), (reason::EPT_VIOLATION, IDT));
        e
    };
    // An exception: the image of RF would have been set; CR2 is the page fault's.
    let mut m = under_ept(Machine::long(), secondary(0));
    m.cpu.vmx.controls.page_fault_match = 1 << 31;
    m.cpu.vmx.controls.exception_bitmap = 1 << 14;
    set_hole(&mut m, IDT);
    m.set(reg::RSI, 1 << 40);
    m.asm(|a| a.mov(al, byte_ptr(rsi)).unwrap());
    let e = vectored(&mut m);
    assert_eq!((e.idt_vectoring, e.idt_vectoring_error), (1 << 31 | 1 << 11 | 3 << 8 | 14, 0));
    assert_eq!((m.cpu.state.cr2, m.cpu.state.rflags()), (1 << 40, 2 | rflags::RF));
    // A software interrupt, which would have saved RF clear.
    let mut m = under_ept(Machine::long(), secondary(0)).with(|s| s.set_rflags(rflags::RF));
    set_hole(&mut m, IDT);
    m.asm(|a| a.int(0x80).unwrap());
    let e = vectored(&mut m);
    assert_eq!((e.idt_vectoring, e.instruction_length), (1 << 31 | 4 << 8 | 0x80, 2));
    assert_eq!((m.cpu.state.rip, m.cpu.state.rflags()), (CODE, 2));
    // An injected one, and an NMI, which blocks.
    let mut m = under_ept(Machine::long(), secondary(0));
    set_hole(&mut m, IDT);
    m.cpu.state.injected = Some(Event {
        vector: 3,
        kind: EventKind::SoftwareException,
        error_code: None,
        instruction_length: 1,
    });
    let e = vectored(&mut m);
    assert_eq!((e.idt_vectoring, e.instruction_length), (1 << 31 | 6 << 8 | 3, 1));
    assert_eq!((m.cpu.state.rip, m.cpu.state.injected), (CODE, None));
    let mut m = under_ept(Machine::long(), secondary(0));
    set_hole(&mut m, IDT);
    m.attention.raise(Attention::NMI);
    assert_eq!(vectored(&mut m).idt_vectoring, 1 << 31 | 2 << 8 | 2);
    assert!(m.cpu.state.nmi_blocked);
    // Given back to the guest once the page is there, all is well.
    set_hole(&mut m, 1 << 40);
    m.cpu.state.injected =
        Some(Event { vector: 2, kind: EventKind::Nmi, error_code: None, instruction_length: 0 });
    assert_eq!(m.vector(), 2);
}

#[test]
fn an_ept_violation_of_an_instruction() {
    let mut m = under_ept(Machine::long(), secondary(0));
    set_hole(&mut m, DATA);
    m.set(reg::RSI, DATA);
    let e = exit_of(&mut m, |a| a.mov(al, byte_ptr(rsi)).unwrap());
    assert_eq!((e.idt_vectoring, e.instruction_length), (0, 2));
    // RF lets the instruction be done again without meeting its breakpoint twice.
    assert_eq!(m.cpu.state.rflags(), 2 | rflags::RF);
    // IRET has unblocked NMIs already.
    for (pins, unblocks) in
        [(0, true), (pin::NMI_EXITING, false), (pin::NMI_EXITING | pin::VIRTUAL_NMIS, true)]
    {
        let mut m =
            under_ept(Machine::long(), Controls { pin: pins, ..secondary(0) }).with(|s| s.nmi_blocked = true);
        set_hole(&mut m, DATA);
        m.set(reg::RSP, DATA);
        let e = exit_of(&mut m, |a| a.iretq().unwrap());
        let bit = u64::from(event::NMI_UNBLOCKING);
        assert_eq!(e.qualification & bit, if unblocks { bit } else { 0 });
        assert_eq!(m.cpu.state.nmi_blocked, !unblocks);
    }
}
