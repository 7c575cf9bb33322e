//! Activity states: HLT, shutdown, wait-for-SIPI; INIT and start-up IPIs, which need a second CPU.

use crate::interrupts::{IF, handled};
use crate::want::Want;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use rt::report::{equal, skip};
use rt::vmx::capability as cap;
use rt::vmx::control::*;
use rt::vmx::exit::event;
use rt::vmx::{Vm, field as f, handler, reason, vmread, vmwrite};
use rt::{apic, check, l2, smp, trap, vmx};

const ACTIVE: u64 = 0;
const HLT: u64 = 1;
const SHUTDOWN: u64 = 2;
const WAIT_FOR_SIPI: u64 = 3;
const VECTOR: u8 = 0x51;

pub fn all() {
    halted_by_itself();
    entered_halted();
    shut_down();
    second_cpu();
}

/// L2 executes HLT, and L1 does not intercept that.
fn halted_by_itself() {
    let name = "HLT of L2: an external interrupt exits";
    let mut vm = Vm::fresh(l2!(["sti", "hlt", "nop"]));
    if !HLT_EXITING.clearable() || !vm.set_or_skip(name, &[EXTERNAL_INTERRUPT_EXITING, ACKNOWLEDGE_INTERRUPT])
    {
        return;
    }
    vm.unset(&[HLT_EXITING]);
    start_timer();
    let event = event::EXTERNAL_INTERRUPT | u32::from(VECTOR);
    Want::exit(reason::EXTERNAL_INTERRUPT).event(event).at(2).run(name, &mut vm);
    equal("HLT of L2: the exit saves the activity state", vmread(f::GUEST_ACTIVITY), HLT);
    equal("HLT of L2: STI blocks no more", vmread(f::GUEST_INTERRUPTIBILITY), 0);
    apic::end_of_interrupt();
    if EXTERNAL_INTERRUPT_EXITING.clearable() {
        let mut vm = Vm::fresh(l2!(["sti", "hlt", "nop"]));
        vm.unset(&[HLT_EXITING]);
        handler::install();
        start_timer();
        let exit = vm.run();
        handled("HLT of L2: its own interrupt wakes it", &vm, &exit, VECTOR, 2);
        equal("HLT of L2: it is active then", vmread(f::GUEST_ACTIVITY), ACTIVE);
        apic::end_of_interrupt();
    }
}

/// One interrupt from the APIC's timer, after L2 has executed HLT even where the host is busy.
fn start_timer() {
    apic::write(apic::TIMER_DIVIDE, 0xb);
    apic::write(apic::LVT_TIMER, VECTOR.into());
    apic::write(apic::TIMER_INITIAL, 20_000_000);
}

/// What should wake L2 may fail to: the timer ends the case then.
fn set_watchdog(vm: &mut Vm) {
    if vm.set(&[PREEMPTION_TIMER]) {
        vmwrite(f::PREEMPTION_TIMER_VALUE, 0x0400_0000);
    }
}

fn entered_halted() {
    let name = "entry to HLT";
    if !cap::misc(cap::MISC_ACTIVITY_HLT) {
        return skip(name, "activity state HLT");
    }
    let start = |code: u64, controls: &[Control]| {
        let mut vm = Vm::fresh(code);
        vmwrite(f::GUEST_ACTIVITY, HLT);
        set_watchdog(&mut vm);
        vm.set_or_skip(name, controls).then_some(vm)
    };
    let code = l2!(["nop"]);
    if let Some(mut vm) = start(code, &[PREEMPTION_TIMER]) {
        vmwrite(f::PREEMPTION_TIMER_VALUE, 100);
        Want::exit(reason::PREEMPTION_TIMER).run("entry to HLT: L2 does not run", &mut vm);
        equal("entry to HLT: the state is saved", vmread(f::GUEST_ACTIVITY), HLT);
    }
    if let Some(mut vm) = start(code, &[]) {
        handler::install();
        vmwrite(f::GUEST_RFLAGS, 2 | IF);
        vmwrite(f::ENTRY_INTERRUPTION, u64::from(event::VALID | event::EXTERNAL_INTERRUPT | 0x60));
        let exit = vm.run();
        handled("entry to HLT: an injected interrupt wakes L2", &vm, &exit, 0x60, 0);
        equal("entry to HLT: L2 is active then", vmread(f::GUEST_ACTIVITY), ACTIVE);
    }
    if let Some(mut vm) = start(code, &[INTERRUPT_WINDOW_EXITING]) {
        vmwrite(f::GUEST_RFLAGS, 2 | IF);
        Want::exit(reason::INTERRUPT_WINDOW).run("entry to HLT: an open interrupt window exits", &mut vm);
        equal("entry to HLT: the window's exit saves HLT", vmread(f::GUEST_ACTIVITY), HLT);
    }
    if let Some(mut vm) = start(code, &[NMI_EXITING, VIRTUAL_NMIS, NMI_WINDOW_EXITING]) {
        Want::exit(reason::NMI_WINDOW).run("entry to HLT: an open NMI window exits", &mut vm);
    }
    if let Some(mut vm) = start(code, &[]) {
        vmwrite(f::GUEST_PENDING_DEBUG, 1 << 12 | 1);
        let want =
            Want::exit(reason::EXCEPTION_OR_NMI).event(event::HARDWARE_EXCEPTION | u32::from(trap::DB));
        want.qualification(1).run("entry to HLT: a pending debug exception wakes L2", &mut vm);
    }
    if let Some(mut vm) = start(code, &[EXTERNAL_INTERRUPT_EXITING, ACKNOWLEDGE_INTERRUPT]) {
        vmwrite(f::GUEST_RFLAGS, 2 | IF);
        apic::send_self(VECTOR);
        let event = event::EXTERNAL_INTERRUPT | u32::from(VECTOR);
        Want::exit(reason::EXTERNAL_INTERRUPT)
            .event(event)
            .run("entry to HLT: a pending interrupt exits", &mut vm);
        apic::end_of_interrupt();
    }
}

fn shut_down() {
    let name = "entry to shutdown";
    if !cap::misc(cap::MISC_ACTIVITY_SHUTDOWN) {
        return skip(name, "activity state shutdown");
    }
    let start = |controls: &[Control]| {
        let mut vm = Vm::fresh(l2!(["nop"]));
        vmwrite(f::GUEST_ACTIVITY, SHUTDOWN);
        set_watchdog(&mut vm);
        vm.set_or_skip(name, controls).then_some(vm)
    };
    if let Some(mut vm) = start(&[PREEMPTION_TIMER]) {
        vmwrite(f::PREEMPTION_TIMER_VALUE, 100);
        Want::exit(reason::PREEMPTION_TIMER).run("entry to shutdown: L2 does not run", &mut vm);
        equal("entry to shutdown: the state is saved", vmread(f::GUEST_ACTIVITY), SHUTDOWN);
    }
    if let Some(mut vm) = start(&[NMI_EXITING, VIRTUAL_NMIS, NMI_WINDOW_EXITING]) {
        Want::exit(reason::NMI_WINDOW).run("entry to shutdown: an open NMI window exits", &mut vm);
    }
    if let Some(mut vm) = start(&[]) {
        handler::install();
        vmwrite(f::ENTRY_INTERRUPTION, u64::from(event::VALID | event::NMI | 2));
        let exit = vm.run();
        handled("entry to shutdown: an injected NMI wakes L2", &vm, &exit, 2, 0);
    }
}

/// What the second CPU found: a step, and the exit.
static STEP: AtomicU32 = AtomicU32::new(0);
static REASON: AtomicU32 = AtomicU32::new(!0);
static QUALIFICATION: AtomicU64 = AtomicU64::new(0);

fn second_cpu() {
    let name = "INIT and SIPI exit";
    if smp::start() < 2 {
        return skip(name, "second CPU");
    }
    if cap::misc(cap::MISC_ACTIVITY_SIPI) {
        smp::begin(1, |_| enter(WAIT_FOR_SIPI, l2!(["nop"])));
        // A SIPI counts once the CPU waits for one: send until it has come.
        signal(apic::STARTUP | 0x9a);
        equal("wait-for-SIPI: a SIPI exits", REASON.load(Ordering::Acquire), reason::SIPI);
        equal("wait-for-SIPI: the exit has its vector", QUALIFICATION.load(Ordering::Acquire), 0x9a);
        smp::wait(1);
    } else {
        skip("wait-for-SIPI", "activity state wait-for-SIPI");
    }
    smp::begin(1, |_| enter(ACTIVE, l2!(["2:", "pause", "jmp 2b"])));
    while STEP.load(Ordering::Acquire) != 1 {
        core::hint::spin_loop();
    }
    apic::send(smp::apic_id(1), apic::ASSERT | apic::INIT);
    while STEP.load(Ordering::Acquire) != 2 {
        core::hint::spin_loop();
    }
    equal("INIT exits from L2", REASON.load(Ordering::Acquire), reason::INIT);
    smp::wait(1);
    // L1 itself was not reset: the CPU still takes work.
    smp::run_on(1, |_| STEP.store(7, Ordering::Release));
    check!("INIT of L2 leaves L1 alone", STEP.load(Ordering::Acquire) == 7, "the CPU takes no work");
}

/// Sends an IPI to the second CPU until its L2 has exited.
fn signal(command: u32) {
    while STEP.load(Ordering::Acquire) != 1 {
        core::hint::spin_loop();
    }
    while STEP.load(Ordering::Acquire) != 2 {
        apic::send(smp::apic_id(1), apic::ASSERT | command);
        for _ in 0..1000 {
            core::hint::spin_loop();
        }
    }
}

/// On the second CPU: VMXON, one entry, VMXOFF.
fn enter(activity: u64, code: u64) {
    STEP.store(0, Ordering::Release);
    REASON.store(!0, Ordering::Release);
    if vmx::on().is_ok() {
        let mut vm = Vm::new(vmx::region(), code);
        vmwrite(f::GUEST_ACTIVITY, activity);
        vmwrite(f::GUEST_RSP, 0);
        STEP.store(1, Ordering::Release);
        if let Ok(exit) = vm.enter() {
            REASON.store(exit.reason, Ordering::Release);
            QUALIFICATION.store(exit.qualification, Ordering::Release);
        }
        let _ = vmx::insn::vmclear(vm.region);
        let _ = vmx::insn::vmxoff();
        rt::cpu::set_cr4(rt::cpu::cr4() & !vmx::CR4_VMXE);
    }
    STEP.store(2, Ordering::Release);
}
