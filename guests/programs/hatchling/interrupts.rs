//! External interrupts, NMIs, and windows for them.

use crate::want::{Want, exits, to_end};
use core::sync::atomic::{AtomicU64, Ordering};
use rt::mem;
use rt::report::{equal, fail};
use rt::vmx::control::*;
use rt::vmx::exit::event;
use rt::vmx::{Exit, Vm, field as f, handler, reason, vmread, vmwrite};
use rt::{apic, check, cpu, l2, trap};

pub const IF: u64 = 1 << 9;
/// The vector that cases send.
const VECTOR: u8 = 0x51;
/// Interruptibility state.
pub const BLOCKED_BY_STI: u64 = 1 << 0;
pub const BLOCKED_BY_NMI: u64 = 1 << 3;

static TAKEN: AtomicU64 = AtomicU64::new(0);

pub fn all() {
    apic::enable();
    trap::on(VECTOR, |_| {
        TAKEN.fetch_add(1, Ordering::Relaxed);
        apic::end_of_interrupt();
    });
    external();
    acknowledged();
    delivered_to_l2();
    from_inside();
    interrupt_window();
    non_maskable();
    non_maskable_to_l2();
    virtual_nmis();
    unblocking();
}

/// How many interrupts L1 gets when it opens itself.
fn open() -> u64 {
    TAKEN.store(0, Ordering::Relaxed);
    cpu::sti_window();
    TAKEN.load(Ordering::Relaxed)
}

fn external() {
    let name = "an external interrupt exits";
    for (what, rflags) in [("with IF set", 2 | IF), ("with IF clear", 2)] {
        let mut vm = Vm::fresh(l2!(["nop"]));
        if !vm.set_or_skip(name, &[EXTERNAL_INTERRUPT_EXITING]) {
            return;
        }
        vmwrite(f::GUEST_RFLAGS, rflags);
        apic::send_self(VECTOR);
        let exit = Want::exit(reason::EXTERNAL_INTERRUPT).run(name, &mut vm);
        check!(name, exit.rflags == rflags, "{what}: {exit}");
        check!("without acknowledgement it stays pending", apic::bit(apic::IRR, VECTOR), "IRR is clear");
        equal("L1 takes it", open(), 1);
    }
    let mut vm = Vm::fresh(l2!(["nop"]));
    vm.set(&[EXTERNAL_INTERRUPT_EXITING]);
    to_end("without an interrupt L2 runs", &mut vm);
}

fn acknowledged() {
    let name = "an acknowledged interrupt exits with its vector";
    let mut vm = Vm::fresh(l2!(["nop"]));
    if !vm.set_or_skip(name, &[EXTERNAL_INTERRUPT_EXITING, ACKNOWLEDGE_INTERRUPT]) {
        return;
    }
    vmwrite(f::GUEST_RFLAGS, 2 | IF);
    apic::send_self(VECTOR);
    let event = event::EXTERNAL_INTERRUPT | u32::from(VECTOR);
    Want::exit(reason::EXTERNAL_INTERRUPT).event(event).run(name, &mut vm);
    check!("acknowledgement moves it to the ISR", apic::bit(apic::ISR, VECTOR), "ISR is clear");
    check!("acknowledgement takes it from the IRR", !apic::bit(apic::IRR, VECTOR), "IRR is set");
    apic::end_of_interrupt();
    equal("L1 does not get it again", open(), 0);
    apic::send_self(VECTOR);
    apic::send_self(VECTOR + 0x10);
    let event = event::EXTERNAL_INTERRUPT | u32::from(VECTOR + 0x10);
    Want::exit(reason::EXTERNAL_INTERRUPT).event(event).run("the highest interrupt exits first", &mut vm);
    apic::end_of_interrupt();
    let event = event::EXTERNAL_INTERRUPT | u32::from(VECTOR);
    Want::exit(reason::EXTERNAL_INTERRUPT).event(event).run("the lower one exits next", &mut vm);
    apic::end_of_interrupt();
    to_end("then L2 runs", &mut vm);
}

/// Reports that L2's handler of `vector` runs with RIP `at` saved.
pub fn handled(name: &str, vm: &Vm, exit: &Exit, vector: u8, at: u64) -> handler::Delivered {
    match handler::delivered(exit) {
        Some(frame) => {
            let saved = frame.rip.wrapping_sub(vm.start);
            let right = frame.vector == u64::from(vector) && saved == at;
            check!(name, right, "vector {} at +{saved:#x}, wanted {vector} at +{at:#x}", frame.vector);
            frame
        }
        None => {
            fail(name, format_args!("{exit}, wanted the handler of vector {vector}"));
            handler::Delivered::default()
        }
    }
}

fn delivered_to_l2() {
    if !EXTERNAL_INTERRUPT_EXITING.clearable() {
        return;
    }
    let mut vm = Vm::fresh(l2!(["nop", "nop"]));
    handler::install();
    vmwrite(f::GUEST_RFLAGS, 2 | IF);
    apic::send_self(VECTOR);
    let exit = vm.run();
    let frame = handled("without exiting, L2 takes an interrupt", &vm, &exit, VECTOR, 0);
    equal("L2's frame has IF", frame.rflags, 2 | IF);
    equal("IF is clear in L2's handler", frame.handler_rflags & IF, 0);
    check!("the interrupt is in service", apic::bit(apic::ISR, VECTOR), "ISR is clear");
    apic::end_of_interrupt();
    let mut vm = Vm::fresh(l2!(["nop", "sti", "nop", "nop"]));
    handler::install();
    apic::send_self(VECTOR);
    let exit = vm.run();
    handled("L2 takes it behind STI and one instruction", &vm, &exit, VECTOR, 3);
    apic::end_of_interrupt();
    let mut vm = Vm::fresh(l2!(["nop"]));
    handler::install();
    apic::send_self(VECTOR);
    to_end("with IF clear L2 does not take it", &mut vm);
    equal("it is left for L1", open(), 1);
}

/// L2 reaches the local APIC where nothing keeps it away.
fn from_inside() {
    let name = "L2 sends itself an interrupt, which exits";
    let mut vm = Vm::fresh(l2!(["mov [rbx], eax", "2:", "jmp 2b"]));
    if !vm.set_or_skip(name, &[EXTERNAL_INTERRUPT_EXITING]) || apic::is_x2apic() {
        return;
    }
    vmwrite(f::GUEST_RFLAGS, 2 | IF);
    vm.regs.rbx = apic::BASE + u64::from(apic::ICR);
    vm.regs.rax = u64::from(apic::TO_SELF | apic::ASSERT | apic::FIXED) | u64::from(VECTOR);
    Want::exit(reason::EXTERNAL_INTERRUPT).at(2).run(name, &mut vm);
    equal("L1 takes the interrupt of L2", open(), 1);
}

fn interrupt_window() {
    let want = Want::exit(reason::INTERRUPT_WINDOW);
    let name = "interrupt window: open at entry";
    let start = |code: u64, rflags: u64, interruptibility: u64| {
        let mut vm = Vm::fresh(code);
        vmwrite(f::GUEST_RFLAGS, rflags);
        vmwrite(f::GUEST_INTERRUPTIBILITY, interruptibility);
        vm.set_or_skip(name, &[INTERRUPT_WINDOW_EXITING]).then_some(vm)
    };
    let nops = l2!(["nop", "nop"]);
    let Some(mut vm) = start(nops, 2 | IF, 0) else { return };
    want.run(name, &mut vm);
    if let Some(mut vm) = start(l2!(["nop", "sti", "nop", "nop"]), 2, 0) {
        want.at(3).run("interrupt window: opens behind STI and one instruction", &mut vm);
        equal("interrupt window: STI blocks no more", vmread(f::GUEST_INTERRUPTIBILITY), 0);
    }
    if let Some(mut vm) = start(nops, 2 | IF, BLOCKED_BY_STI) {
        want.at(1).run("interrupt window: STI blocking at entry lasts one instruction", &mut vm);
    }
    if let Some(mut vm) = start(nops, 2 | IF, 2) {
        want.at(1).run("interrupt window: MOV SS blocking at entry lasts one instruction", &mut vm);
    }
    if let Some(mut vm) = start(nops, 2, 0) {
        to_end("interrupt window: stays closed with IF clear", &mut vm);
    }
    exits(
        "STI blocking shows at an exit",
        &[],
        l2!(["sti", "cpuid"]),
        Want::instruction(reason::CPUID, 2).at(1),
    );
    equal("exit saves blocking by STI", vmread(f::GUEST_INTERRUPTIBILITY), BLOCKED_BY_STI);
    let code = l2!(["mov eax, 16", "mov ss, eax", "cpuid"]);
    exits("MOV SS blocking shows at an exit", &[], code, Want::instruction(reason::CPUID, 2).at(7));
    equal("exit saves blocking by MOV SS", vmread(f::GUEST_INTERRUPTIBILITY), 2);
}

static NMIS: AtomicU64 = AtomicU64::new(0);

/// Code that sends an NMI to this CPU by the address in RBX, from L2.
fn nmi_sender(vm: &mut Vm) {
    vm.regs.rbx = apic::BASE + u64::from(apic::ICR_HIGH);
    vm.regs.rcx = apic::BASE + u64::from(apic::ICR);
    vm.regs.rax = u64::from(apic::id() << 24);
    vm.regs.rdx = u64::from(apic::NMI | apic::ASSERT);
}

/// Ends blocking of NMIs in L1: what an IRET does.
fn unblock_nmis() {
    // SAFETY: an interrupt return to the next instruction.
    unsafe {
        core::arch::asm!(
            "mov {t}, rsp", "push 0x10", "push {t}", "pushfq", "push 8", "lea {t}, [rip + 2f]", "push {t}", "iretq", "2:",
            t = out(reg) _
        );
    }
}

fn send_nmi_to_self() {
    apic::send(apic::id(), apic::NMI | apic::ASSERT);
}

fn non_maskable() {
    let name = "an NMI exits";
    trap::on(trap::NMI, |_| {
        NMIS.fetch_add(1, Ordering::Relaxed);
    });
    let mut vm = Vm::fresh(l2!(["mov [rbx], eax", "mov [rcx], edx", "2:", "jmp 2b"]));
    if !vm.set_or_skip(name, &[NMI_EXITING]) {
        return;
    }
    nmi_sender(&mut vm);
    let exit = vm.run();
    Want::exit(reason::EXCEPTION_OR_NMI).event(event::NMI | 2).at(4).check(name, &exit);
    equal("L1 does not take the NMI that exited", NMIS.load(Ordering::Relaxed), 0);
    send_nmi_to_self();
    equal("NMIs are blocked behind the exit", NMIS.load(Ordering::Relaxed), 0);
    unblock_nmis();
    equal("IRET lets the next one in", NMIS.load(Ordering::Relaxed), 1);
}

fn non_maskable_to_l2() {
    let name = "without exiting, L2 takes an NMI";
    let mut vm =
        Vm::fresh(l2!(["mov [rbx], eax", "mov [rcx], edx", "2:", "inc rsi", "cmp rsi, 1000", "jb 2b"]));
    vm.unset(&[NMI_EXITING]);
    handler::install();
    nmi_sender(&mut vm);
    let exit = vm.run();
    handled(name, &vm, &exit, trap::NMI, 4);
    equal("L2's NMI handler blocks NMIs", vmread(f::GUEST_INTERRUPTIBILITY), BLOCKED_BY_NMI);
    vm.skip();
    to_end("L2's NMI handler returns", &mut vm);
    equal("IRET of L2 ends the blocking", vmread(f::GUEST_INTERRUPTIBILITY), 0);
    equal("L1 has not taken L2's NMI", NMIS.load(Ordering::Relaxed), 1);
}

/// L2 code with an IRET to its next instruction.
fn iret() -> u64 {
    l2!([
        "mov rax, rsp",
        "push 16",
        "push rax",
        "pushfq",
        "push 8",
        "lea rax, [rip + 2f]",
        "push rax",
        "nop",
        "iretq",
        "2:",
        "nop",
        "nop"
    ])
}

fn virtual_nmis() {
    let name = "NMI window: open at entry";
    let controls = [NMI_EXITING, VIRTUAL_NMIS, NMI_WINDOW_EXITING];
    let Some(_) = exits(name, &controls, l2!(["nop"]), Want::exit(reason::NMI_WINDOW)) else { return };
    let mut vm = Vm::fresh(iret());
    vm.set(&controls);
    vmwrite(f::GUEST_INTERRUPTIBILITY, BLOCKED_BY_NMI);
    let exit = vm.run();
    let right = exit.reason == reason::NMI_WINDOW && mem::bytes(exit.rip - 2, 2) == [0x48, 0xcf];
    check!("NMI window: opens behind IRET", right, "{exit}");
    equal("NMI window: virtual-NMI blocking has ended", vmread(f::GUEST_INTERRUPTIBILITY), 0);
    let mut vm = Vm::fresh(l2!(["nop"]));
    vm.set(&controls);
    vmwrite(f::GUEST_INTERRUPTIBILITY, BLOCKED_BY_NMI);
    to_end("NMI window: closed while virtual NMIs are blocked", &mut vm);
    equal("virtual-NMI blocking stays over an exit", vmread(f::GUEST_INTERRUPTIBILITY), BLOCKED_BY_NMI);
    // Virtual-NMI blocking does not keep a real NMI from exiting.
    let mut vm = Vm::fresh(l2!(["mov [rbx], eax", "mov [rcx], edx", "2:", "jmp 2b"]));
    vm.set(&[NMI_EXITING, VIRTUAL_NMIS]);
    vmwrite(f::GUEST_INTERRUPTIBILITY, BLOCKED_BY_NMI);
    nmi_sender(&mut vm);
    let exit = vm.run();
    let want = Want::exit(reason::EXCEPTION_OR_NMI).event(event::NMI | 2).at(4);
    want.check("an NMI exits while virtual NMIs are blocked", &exit);
    unblock_nmis();
}

/// An IRET that faults has ended the blocking already, and the exit says so (bit 12).
fn unblocking() {
    let name = "IRET that faults says that it unblocked NMIs";
    let mut vm = Vm::fresh(l2!(["iretq"]));
    if !vm.set_or_skip(name, &[NMI_EXITING, VIRTUAL_NMIS]) {
        return;
    }
    let absent = rt::user::SCRATCH + 72 * mem::PAGE;
    rt::paging::set_pte(absent, 0);
    vmwrite(f::GUEST_INTERRUPTIBILITY, BLOCKED_BY_NMI);
    vmwrite(f::GUEST_RSP, absent);
    let event = event::HARDWARE_EXCEPTION | u32::from(trap::PF) | event::NMI_UNBLOCKING;
    // Which word of the frame is read first is left to the processor.
    let want = Want::exit(reason::EXCEPTION_OR_NMI).event_with_error(event, 0).any_qualification();
    want.run(name, &mut vm);
    equal("the blocking has ended", vmread(f::GUEST_INTERRUPTIBILITY), 0);
    let Some((mut vm, ept)) = crate::ept_faults::with_ept(name, l2!(["iretq"])) else { return };
    vm.set(&[NMI_EXITING, VIRTUAL_NMIS]);
    ept.permit(crate::ept_faults::PAGE_AT, 0);
    vmwrite(f::GUEST_INTERRUPTIBILITY, BLOCKED_BY_NMI);
    vmwrite(f::GUEST_RSP, crate::ept_faults::PAGE_AT);
    let exit = vm.run();
    let right = exit.reason == reason::EPT_VIOLATION && exit.qualification & 1 << 12 != 0;
    check!("IRET that meets an EPT violation says that it unblocked NMIs", right, "{exit}");
    equal("the blocking has ended there too", vmread(f::GUEST_INTERRUPTIBILITY), 0);
}
