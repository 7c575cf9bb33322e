//! Events that VM entry injects: every type, how their delivery fails, and pending debug exceptions.

use crate::ept_faults::{PAGE_AT, WRITE, with_ept};
use crate::interrupts::{BLOCKED_BY_NMI, IF, handled};
use crate::simple_exits::to_ring3;
use crate::want::{Want, to_end};
use rt::cpu;
use rt::mem::PAGE;
use rt::report::equal;
use rt::vmx::control::*;
use rt::vmx::exit::event::{
    ERROR_CODE, EXTERNAL_INTERRUPT, HARDWARE_EXCEPTION, NMI, PRIVILEGED_SOFTWARE_EXCEPTION,
    SOFTWARE_EXCEPTION, SOFTWARE_INTERRUPT, VALID,
};
use rt::vmx::{Vm, field as f, handler, reason, vmread, vmwrite};
use rt::{check, l2, mem, paging, trap, user};

const RF: u64 = 1 << 16;
const TF: u64 = 1 << 8;

pub fn all() {
    types();
    frames();
    privilege();
    failed_delivery();
    failed_by_ept();
    reinjection();
    pending_debug();
    blocking();
}

fn inject(information: u32) {
    vmwrite(f::ENTRY_INTERRUPTION, (information | VALID).into());
}

/// A machine with its reporting handlers and an event to inject.
fn with_event(code: u64, information: u32) -> Vm {
    let vm = Vm::fresh(code);
    handler::install();
    inject(information);
    vm
}

/// Every type: the handler runs before the first instruction. Software events push RIP behind their instruction.
fn types() {
    let code = l2!(["nop", "nop"]);
    let cases = [
        ("injection: external interrupt", EXTERNAL_INTERRUPT | 0x60, 0x60, 0),
        ("injection: external interrupt with an exception's vector", EXTERNAL_INTERRUPT | 6, 6, 0),
        ("injection: NMI", NMI | 2, 2, 0),
        ("injection: #UD", HARDWARE_EXCEPTION | 6, 6, 0),
        ("injection: #DB", HARDWARE_EXCEPTION | 1, 1, 0),
        ("injection: #GP", HARDWARE_EXCEPTION | ERROR_CODE | 13, 13, 0),
        ("injection: #DF", HARDWARE_EXCEPTION | ERROR_CODE | 8, 8, 0),
        ("injection: #PF", HARDWARE_EXCEPTION | ERROR_CODE | 14, 14, 0),
        ("injection: INT n", SOFTWARE_INTERRUPT | 0x61, 0x61, 2),
        ("injection: INT1", PRIVILEGED_SOFTWARE_EXCEPTION | 1, 1, 1),
        ("injection: INT3", SOFTWARE_EXCEPTION | 3, 3, 1),
        ("injection: INTO", SOFTWARE_EXCEPTION | 4, 4, 7),
    ];
    for (name, information, vector, length) in cases {
        let mut vm = with_event(code, information);
        vmwrite(f::GUEST_RFLAGS, 2 | IF);
        vmwrite(f::ENTRY_INSTRUCTION_LENGTH, if length == 0 { 15 } else { length });
        let error = if matches!(vector, 8 | 14) { 0 } else { 0x1230 };
        vmwrite(f::ENTRY_ERROR_CODE, error);
        cpu::set_cr2(0x4444);
        cpu::set_dr6(0);
        let exit = vm.run();
        let frame = handled(name, &vm, &exit, vector, length);
        if information & ERROR_CODE != 0 {
            check!(name, frame.error == error, "error code {:#x}, wanted {error:#x}", frame.error);
        }
        check!(name, vmread(f::ENTRY_INTERRUPTION) as u32 & VALID == 0, "the exit leaves the valid bit");
        check!(name, cpu::cr2() == 0x4444, "CR2 is changed");
        check!(name, cpu::dr6() == 0xffff_0ff0, "DR6 is changed: {:#x}", cpu::dr6());
        check!(name, exit.vectoring & VALID == 0, "IDT-vectoring information {:#x}", exit.vectoring);
    }
}

/// What the handler's frame holds.
fn frames() {
    let mut vm = with_event(l2!(["nop"]), HARDWARE_EXCEPTION | 6);
    vmwrite(f::GUEST_RFLAGS, 2 | IF | RF | TF | 1);
    let exit = vm.run();
    let frame = handled("injection: the frame", &vm, &exit, 6, 0);
    equal("injection: RFLAGS is pushed as it is in the VMCS", frame.rflags, 2 | IF | RF | TF | 1);
    equal("injection: the handler starts without IF, TF and RF", frame.handler_rflags, 2 | 1);
    equal("injection: RSP", frame.rsp, rt::vmx::vm::stack_top());
    // The exception bitmap is not for injected exceptions.
    let mut vm = with_event(l2!(["nop"]), HARDWARE_EXCEPTION | ERROR_CODE | 13);
    vmwrite(f::EXCEPTION_BITMAP, 0xffff_ffff);
    let exit = vm.run();
    handled("injection: the exception bitmap does not see it", &vm, &exit, 13, 0);
    let mut vm = with_event(l2!(["nop"]), HARDWARE_EXCEPTION | 6);
    vmwrite(f::ENTRY_INTERRUPTION, u64::from(HARDWARE_EXCEPTION | 6));
    to_end("injection: nothing without the valid bit", &mut vm);
}

/// Injection into ring 3: the stack switches, and gates are checked for software events only.
fn privilege() {
    let name = "injection: interrupt of ring 3";
    let mut vm = Vm::fresh(0);
    to_ring3(&mut vm, &[0x90]);
    handler::install();
    vmwrite(f::GUEST_RFLAGS, 2 | IF);
    inject(EXTERNAL_INTERRUPT | 0x60);
    let exit = vm.run();
    let frame = handled(name, &vm, &exit, 0x60, 0);
    equal("injection: the frame has ring 3's CS", frame.cs, rt::tables::USER_CODE64.into());
    equal("injection: the frame has ring 3's RSP", frame.rsp, user::STACK_TOP - 64);
    check!(
        "injection: the stack is the TSS's",
        exit.rsp < rt::tables::rsp0() && exit.rsp + 64 > rt::tables::rsp0(),
        "{exit}"
    );
    let software = |kind: u32, vector: u32, length: u64, access: u8| {
        let mut vm = Vm::fresh(0);
        to_ring3(&mut vm, &[0x90]);
        handler::install();
        handler::set_gate(vector as u8, access);
        vmwrite(f::EXCEPTION_BITMAP, 1 << trap::GP);
        vmwrite(f::ENTRY_INSTRUCTION_LENGTH, length);
        inject(kind | vector);
        (vm.run(), vm)
    };
    let gp = |vector: u32, kind: u32, length: u32| {
        Want::exit(reason::EXCEPTION_OR_NMI)
            .event_with_error(HARDWARE_EXCEPTION | u32::from(trap::GP), vector << 3 | 2)
            .vectoring(kind | vector)
            .length(length)
    };
    let (exit, _) = software(SOFTWARE_INTERRUPT, 0x62, 2, 0x8e);
    gp(0x62, SOFTWARE_INTERRUPT, 2).check("injection: INT n of ring 3 through a DPL 0 gate", &exit);
    let (exit, _) = software(SOFTWARE_EXCEPTION, 3, 1, 0x8e);
    gp(3, SOFTWARE_EXCEPTION, 1).check("injection: INT3 of ring 3 through a DPL 0 gate", &exit);
    let (exit, vm) = software(SOFTWARE_INTERRUPT, 0x62, 2, 0xee);
    handled("injection: INT n of ring 3 through a DPL 3 gate", &vm, &exit, 0x62, 2);
    let (exit, vm) = software(PRIVILEGED_SOFTWARE_EXCEPTION, 1, 1, 0x8e);
    handled("injection: INT1 of ring 3 ignores the gate's DPL", &vm, &exit, 1, 1);
}

/// An injected event that meets an exception: the exit has it as IDT-vectoring information.
fn failed_delivery() {
    let start = |information: u32, vectors: u32| {
        let vm = with_event(l2!(["nop"]), information);
        vmwrite(f::GUEST_RFLAGS, 2 | IF);
        vmwrite(f::GUEST_IDTR_LIMIT, 0);
        vmwrite(f::EXCEPTION_BITMAP, vectors.into());
        vmwrite(f::ENTRY_INSTRUCTION_LENGTH, 3);
        vm
    };
    let gp = 1 << trap::GP;
    let meets = |error: u32| {
        Want::exit(reason::EXCEPTION_OR_NMI).event_with_error(HARDWARE_EXCEPTION | u32::from(trap::GP), error)
    };
    let event = EXTERNAL_INTERRUPT | 0x60;
    let want = meets(0x60 << 3 | 3).vectoring(event);
    want.run("injection: external interrupt meets #GP", &mut start(event, gp));
    let event = NMI | 2;
    let want = meets(2 << 3 | 3).vectoring(event);
    want.run("injection: NMI meets #GP", &mut start(event, gp));
    let event = SOFTWARE_INTERRUPT | 0x60;
    let want = meets(0x60 << 3 | 2).vectoring(event).length(3);
    want.run("injection: INT n meets #GP", &mut start(event, gp));
    let event = HARDWARE_EXCEPTION | ERROR_CODE | u32::from(trap::NP);
    let mut vm = start(event, gp);
    vmwrite(f::ENTRY_ERROR_CODE, 0x5678);
    let want = meets(11 << 3 | 3).vectoring_with_error(HARDWARE_EXCEPTION | u32::from(trap::NP), 0x5678);
    want.run("injection: #NP meets #GP", &mut vm);
    let mut vm = start(event, 1 << trap::DF);
    let want =
        Want::exit(reason::EXCEPTION_OR_NMI).event_with_error(HARDWARE_EXCEPTION | u32::from(trap::DF), 0);
    want.run("injection: #NP becomes #DF", &mut vm);
    let event = HARDWARE_EXCEPTION | ERROR_CODE | u32::from(trap::DF);
    Want::exit(reason::TRIPLE_FAULT).run("injection: #DF becomes a triple fault", &mut start(event, 0));
    let absent = user::SCRATCH + 88 * PAGE;
    paging::set_pte(absent, 0);
    let mut vm = with_event(l2!(["nop"]), NMI | 2);
    vmwrite(f::EXCEPTION_BITMAP, 1 << trap::PF);
    vmwrite(f::GUEST_RSP, absent + 0x800);
    let want = Want::exit(reason::EXCEPTION_OR_NMI)
        .event_with_error(HARDWARE_EXCEPTION | u32::from(trap::PF), 2)
        .vectoring(NMI | 2)
        .any_qualification();
    want.run("injection: NMI meets #PF of the stack", &mut vm);
}

/// EPT violations on the way: L1 maps the page and injects the event again.
fn failed_by_ept() {
    let name = "injection: #GP meets an EPT violation of the stack";
    let Some((mut vm, ept)) = with_ept(name, l2!(["nop"])) else { return };
    handler::install();
    ept.permit(PAGE_AT, rt::vmx::ept::R);
    vmwrite(f::GUEST_RSP, PAGE_AT + 0x800);
    vmwrite(f::ENTRY_ERROR_CODE, 0x9a8);
    inject(HARDWARE_EXCEPTION | ERROR_CODE | u32::from(trap::GP));
    let exit = vm.run();
    let want = Want::exit(reason::EPT_VIOLATION)
        .any_qualification()
        .vectoring_with_error(HARDWARE_EXCEPTION | u32::from(trap::GP), 0x9a8);
    want.check(name, &exit);
    equal("injection: the violation is a write", exit.qualification & 7, WRITE);
    equal("injection: RSP has not moved", exit.rsp, PAGE_AT + 0x800);
    ept.permit(PAGE_AT, rt::vmx::ept::RWX);
    inject(exit.vectoring);
    vmwrite(f::ENTRY_ERROR_CODE, exit.vectoring_error.into());
    let exit = vm.run();
    let frame = handled("injection: the event is injected again", &vm, &exit, trap::GP, 0);
    equal("injection: with its error code", frame.error, 0x9a8);
    // The IDT itself in a hole.
    let name = "injection: NMI meets an EPT violation of the IDT";
    let Some((mut vm, ept)) = with_ept(name, l2!(["nop"])) else { return };
    handler::install();
    ept.permit(handler::idt() & !0xfff, 0);
    inject(NMI | 2);
    let exit = vm.run();
    let want = Want::exit(reason::EPT_VIOLATION).any_qualification().vectoring(NMI | 2);
    want.physical(handler::idt() + 32).check(name, &exit);
    // The first instruction of the handler is no part of delivery.
    let name = "injection: a violation of the handler's code comes after delivery";
    let Some((mut vm, ept)) = with_ept(name, l2!(["nop"])) else { return };
    handler::install();
    let va = user::SCRATCH + 96 * PAGE;
    paging::set_pte(va, PAGE_AT | paging::P | paging::W);
    set_gate_at(0x63, va);
    ept.permit(PAGE_AT, 0);
    vmwrite(f::GUEST_RFLAGS, 2 | IF);
    inject(EXTERNAL_INTERRUPT | 0x63);
    let exit = vm.run();
    let want = Want::exit(reason::EPT_VIOLATION).any_qualification().anywhere().physical(PAGE_AT);
    want.check(name, &exit);
    equal("injection: RIP is the handler's", exit.rip, va);
    paging::set_pte(va, 0);
}

/// Points a gate of L2's IDT at an address.
fn set_gate_at(vector: u8, entry: u64) {
    let low =
        entry & 0xffff | u64::from(rt::tables::CODE64) << 16 | 0x8e << 40 | (entry >> 16 & 0xffff) << 48;
    mem::write(handler::idt() + u64::from(vector) * 16, [low, entry >> 32]);
}

/// What a hypervisor does all day: an event's delivery in L2 is interrupted by an exit, and injected again.
fn reinjection() {
    let name = "an exception of L2 meets an EPT violation";
    let Some((mut vm, ept)) = with_ept(name, l2!(["nop", "ud2"])) else { return };
    handler::install();
    ept.permit(PAGE_AT, 0);
    vmwrite(f::GUEST_RSP, PAGE_AT + 0x800);
    let exit = vm.run();
    let event = HARDWARE_EXCEPTION | u32::from(trap::UD);
    Want::exit(reason::EPT_VIOLATION).any_qualification().at(1).vectoring(event).check(name, &exit);
    ept.permit(PAGE_AT, rt::vmx::ept::RWX);
    inject(exit.vectoring);
    let exit = vm.run();
    let frame = handled("an exception injected again", &vm, &exit, trap::UD, 1);
    equal("its frame has RF", frame.rflags & RF, RF);
    let name = "INT n of L2 meets an EPT violation";
    let Some((mut vm, ept)) = with_ept(name, l2!(["int 0x64"])) else { return };
    handler::install();
    ept.permit(PAGE_AT, 0);
    vmwrite(f::GUEST_RSP, PAGE_AT + 0x800);
    let exit = vm.run();
    let want = Want::exit(reason::EPT_VIOLATION).any_qualification().vectoring(SOFTWARE_INTERRUPT | 0x64);
    want.length(2).check(name, &exit);
    ept.permit(PAGE_AT, rt::vmx::ept::RWX);
    inject(exit.vectoring);
    vmwrite(f::ENTRY_INSTRUCTION_LENGTH, exit.length.into());
    let exit = vm.run();
    handled("INT n injected again", &vm, &exit, 0x64, 2);
}

/// Pending debug exceptions are delivered before the first instruction.
fn pending_debug() {
    let want = Want::exit(reason::EXCEPTION_OR_NMI).event(HARDWARE_EXCEPTION | u32::from(trap::DB));
    let mut vm = Vm::fresh(l2!(["nop"]));
    vmwrite(f::GUEST_PENDING_DEBUG, 1 << 12 | 1);
    want.qualification(1).run("pending debug: a breakpoint of before", &mut vm);
    let mut vm = Vm::fresh(l2!(["nop"]));
    vmwrite(f::GUEST_RFLAGS, 2 | TF);
    vmwrite(f::GUEST_PENDING_DEBUG, 1 << 14);
    want.qualification(1 << 14).run("pending debug: a single step of before", &mut vm);
    let mut vm = Vm::fresh(l2!(["nop", "nop"]));
    vmwrite(f::GUEST_INTERRUPTIBILITY, 2);
    vmwrite(f::GUEST_PENDING_DEBUG, 1 << 12 | 2);
    want.qualification(2).at(1).run("pending debug: MOV SS blocks it for an instruction", &mut vm);
    let mut vm = with_event(l2!(["nop"]), NMI | 2);
    vmwrite(f::GUEST_PENDING_DEBUG, 1 << 12 | 1);
    let exit = vm.run();
    handled("pending debug: an injected event goes first", &vm, &exit, 2, 0);
    // A data breakpoint of MOV SS is pending when the next instruction exits.
    let mut vm = Vm::fresh(l2!(["mov ss, [rbx]", "cpuid"]));
    vm.set(&[LOAD_DEBUG_CONTROLS, SAVE_DEBUG_CONTROLS]);
    mem::write(mem::FREE + 0x80, rt::tables::DATA);
    cpu::set_dr0(mem::FREE + 0x80);
    vmwrite(f::GUEST_DR7, 0x400 | 1 | 3 << 16 | 1 << 18);
    vm.regs.rbx = mem::FREE + 0x80;
    Want::instruction(reason::CPUID, 2).at(2).run("pending debug: an exit behind MOV SS", &mut vm);
    equal("pending debug: the exit saves it", vmread(f::GUEST_PENDING_DEBUG), 1 << 12 | 1);
    vm.skip();
    vmwrite(f::GUEST_INTERRUPTIBILITY, 0);
    want.qualification(1).at(4).run("pending debug: and it is delivered then", &mut vm);
    cpu::set_dr0(0);
}

/// Blocking by NMI behind an injected NMI.
fn blocking() {
    let mut vm = with_event(l2!(["nop"]), NMI | 2);
    let exit = vm.run();
    handled("an injected NMI", &vm, &exit, 2, 0);
    equal("an injected NMI blocks NMIs", vmread(f::GUEST_INTERRUPTIBILITY), BLOCKED_BY_NMI);
    vm.skip();
    to_end("the NMI handler's IRET", &mut vm);
    equal("the NMI handler's IRET unblocks", vmread(f::GUEST_INTERRUPTIBILITY), 0);
    let mut vm = with_event(l2!(["nop"]), NMI | 2);
    if vm.set_or_skip("an injected virtual NMI", &[NMI_EXITING, VIRTUAL_NMIS]) {
        let exit = vm.run();
        handled("an injected virtual NMI", &vm, &exit, 2, 0);
        equal(
            "an injected virtual NMI blocks virtual NMIs",
            vmread(f::GUEST_INTERRUPTIBILITY),
            BLOCKED_BY_NMI,
        );
        vm.set(&[NMI_WINDOW_EXITING]);
        vm.skip();
        Want::exit(reason::NMI_WINDOW).run("the NMI window opens behind its IRET", &mut vm);
    }
    let mut vm = with_event(l2!(["nop", "nop"]), EXTERNAL_INTERRUPT | 0x60);
    if vm.set(&[INTERRUPT_WINDOW_EXITING]) {
        vmwrite(f::GUEST_RFLAGS, 2 | IF);
        let exit = vm.run();
        handled("an injected interrupt goes before the interrupt window", &vm, &exit, 0x60, 0);
        vm.skip();
        Want::exit(reason::INTERRUPT_WINDOW).run("the window opens behind its IRET", &mut vm);
    }
}
