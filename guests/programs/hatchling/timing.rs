//! The VMX-preemption timer, the monitor trap flag, PAUSE loops, TSC offset and scaling.

use crate::interrupts::handled;
use crate::want::{Want, exits, to_end};
use rt::cpu;
use rt::mem::{self, PAGE};
use rt::report::{equal, skip};
use rt::vmx::control::*;
use rt::vmx::exit::event;
use rt::vmx::{Vm, field as f, handler, reason, vmread, vmwrite};
use rt::{check, l2, trap};

pub fn all() {
    preemption_timer();
    saved_timer();
    monitor_trap();
    monitor_trap_and_events();
    pause_loops();
    tsc_offset();
    tsc_scaling();
}

fn preemption_timer() {
    let name = "preemption timer: 0 exits before the first instruction";
    let want = Want::exit(reason::PREEMPTION_TIMER);
    let Some((mut vm, _)) = exits(name, &[PREEMPTION_TIMER], l2!(["nop"]), want) else { return };
    vmwrite(f::PREEMPTION_TIMER_VALUE, 0xffff_ffff);
    to_end("preemption timer: a long one does not exit", &mut vm);
    equal("preemption timer: without saving the field stays", vmread(f::PREEMPTION_TIMER_VALUE), 0xffff_ffff);
    let mut vm = Vm::fresh(l2!(["2:", "inc rax", "jmp 2b"]));
    vm.set(&[PREEMPTION_TIMER]);
    // Some 8 ms, so that L2 gets a turn on a busy host.
    vmwrite(f::PREEMPTION_TIMER_VALUE, 500_000);
    want.anywhere().run("preemption timer: ends a loop", &mut vm);
    check!("preemption timer: L2 has run until then", vm.regs.rax > 0, "RAX 0");
    let mut vm = Vm::fresh(l2!(["hlt"]));
    if HLT_EXITING.clearable() {
        vm.set(&[PREEMPTION_TIMER]);
        vm.unset(&[HLT_EXITING]);
        vmwrite(f::PREEMPTION_TIMER_VALUE, 1_000_000);
        want.at(1).run("preemption timer: wakes L2 from HLT", &mut vm);
        equal("preemption timer: the activity state is HLT", vmread(f::GUEST_ACTIVITY), 1);
    }
}

fn saved_timer() {
    let name = "preemption timer: saved at an exit";
    let mut vm = Vm::fresh(l2!(["mov ecx, 5000", "2:", "dec ecx", "jnz 2b"]));
    if !vm.set_or_skip(name, &[PREEMPTION_TIMER, SAVE_PREEMPTION_TIMER]) {
        return;
    }
    vmwrite(f::PREEMPTION_TIMER_VALUE, 0x8000_0000);
    let before = cpu::tsc();
    to_end(name, &mut vm);
    let rate = cpu::rdmsr(rt::vmx::capability::MISC) & 31;
    let ticks = (cpu::tsc() - before >> rate) + 1;
    let left = vmread(f::PREEMPTION_TIMER_VALUE);
    let right = left <= 0x8000_0000 && 0x8000_0000 - left <= ticks;
    check!(
        "preemption timer: counts at the rate of IA32_VMX_MISC",
        right,
        "{left:#x} left, {ticks:#x} passed"
    );
    let mut vm = Vm::fresh(l2!(["2:", "jmp 2b"]));
    vm.set(&[PREEMPTION_TIMER, SAVE_PREEMPTION_TIMER]);
    vmwrite(f::PREEMPTION_TIMER_VALUE, 100);
    Want::exit(reason::PREEMPTION_TIMER).anywhere().run("preemption timer: expires", &mut vm);
    equal("preemption timer: 0 is saved when it has expired", vmread(f::PREEMPTION_TIMER_VALUE), 0);
}

fn monitor_trap() {
    let name = "monitor trap flag: exits behind each instruction";
    let code = l2!(["nop", "mov eax, 5", "jmp 2f", "nop", "2:", "cpuid", "rep stosb", "ud2"]);
    let mut vm = Vm::fresh(code);
    if !vm.set_or_skip(name, &[MONITOR_TRAP_FLAG]) {
        return;
    }
    let want = Want::exit(reason::MONITOR_TRAP_FLAG);
    want.at(1).run(name, &mut vm);
    want.at(6).run(name, &mut vm);
    want.at(9).run("monitor trap flag: behind a jump at its target", &mut vm);
    let name = "monitor trap flag: an instruction that exits does so alone";
    Want::instruction(reason::CPUID, 2).at(9).run(name, &mut vm);
    vm.skip();
    (vm.regs.rcx, vm.regs.rdi) = (2, mem::FREE);
    want.at(11).run("monitor trap flag: behind each iteration of REP", &mut vm);
    equal("monitor trap flag: one iteration", vm.regs.rcx, 1);
    want.at(13).run("monitor trap flag: behind the last iteration", &mut vm);
    let event = event::HARDWARE_EXCEPTION | u32::from(trap::UD);
    let want = Want::exit(reason::EXCEPTION_OR_NMI).event(event).at(13);
    want.run("monitor trap flag: an exception that exits does so alone", &mut vm);
}

fn monitor_trap_and_events() {
    if !MONITOR_TRAP_FLAG.available() {
        return;
    }
    let want = Want::exit(reason::MONITOR_TRAP_FLAG);
    let mut vm = Vm::fresh(l2!(["ud2"]));
    handler::install();
    vm.set(&[MONITOR_TRAP_FLAG]);
    let exit = want.anywhere().run("monitor trap flag: behind the delivery of a fault", &mut vm);
    vm.unset(&[MONITOR_TRAP_FLAG]);
    check!("monitor trap flag: L2 stands at its handler", exit.at > 0x100, "{exit}");
    let exit = vm.run();
    handled("monitor trap flag: the handler runs on", &vm, &exit, trap::UD, 0);
    let mut vm = Vm::fresh(l2!(["nop"]));
    handler::install();
    vm.set(&[MONITOR_TRAP_FLAG]);
    vmwrite(f::GUEST_RFLAGS, 2 | crate::interrupts::IF);
    vmwrite(f::ENTRY_INTERRUPTION, u64::from(event::VALID | event::EXTERNAL_INTERRUPT | 0x60));
    want.anywhere().run("monitor trap flag: behind an injected interrupt", &mut vm);
    vm.unset(&[MONITOR_TRAP_FLAG]);
    let exit = vm.run();
    handled("monitor trap flag: the injected interrupt's handler runs on", &vm, &exit, 0x60, 0);
    let mut vm = Vm::fresh(l2!(["nop"]));
    vmwrite(f::ENTRY_INTERRUPTION, u64::from(event::VALID | event::OTHER));
    want.run("monitor trap flag: a pending MTF exit can be injected", &mut vm);
    to_end("monitor trap flag: and is gone then", &mut vm);
}

fn pause_loops() {
    let name = "PAUSE-loop exiting";
    let mut vm = Vm::fresh(l2!(["2:", "pause", "jmp 2b"]));
    if vm.set_or_skip(name, &[PAUSE_LOOP_EXITING]) {
        vm.unset(&[PAUSE_EXITING]);
        vmwrite(f::PLE_GAP, 0xffff_ffff);
        vmwrite(f::PLE_WINDOW, 1000);
        Want::instruction(reason::PAUSE, 2).run(name, &mut vm);
        let mut vm = Vm::fresh(l2!(["mov ecx, 50", "2:", "pause", "dec ecx", "jnz 2b"]));
        vm.set(&[PAUSE_LOOP_EXITING]);
        vm.unset(&[PAUSE_EXITING]);
        vmwrite(f::PLE_GAP, 0xffff_ffff);
        vmwrite(f::PLE_WINDOW, 0xffff_ffff);
        to_end("PAUSE-loop exiting: a window that is not over", &mut vm);
    }
}

fn rdtsc_of(vm: &Vm) -> u64 {
    vm.regs.rdx << 32 | vm.regs.rax & 0xffff_ffff
}

/// The three ways to read the TSC.
fn readers() -> [(&'static str, u64); 3] {
    [
        ("RDTSC", l2!(["rdtsc"])),
        ("RDTSCP", l2!(["rdtscp"])),
        ("RDMSR of IA32_TIME_STAMP_COUNTER", l2!(["mov ecx, 0x10", "rdmsr"])),
    ]
}

fn reader(name: &str, code: u64, controls: &[Control]) -> Option<Vm> {
    let mut vm = Vm::fresh(code);
    if !vm.set_or_skip(name, controls) || !vm.set_or_skip(name, &[USE_MSR_BITMAPS]) {
        return None;
    }
    vm.set(&[ENABLE_RDTSCP]);
    vm.unset(&[RDTSC_EXITING]);
    let bitmap = mem::FREE + 20 * PAGE;
    mem::fill(bitmap, 0, PAGE);
    vmwrite(f::MSR_BITMAP, bitmap);
    Some(vm)
}

fn tsc_offset() {
    for (name, code) in readers() {
        if name == "RDTSCP" && !(cpu::RDTSCP.present() && ENABLE_RDTSCP.available()) {
            continue;
        }
        for offset in [1u64 << 60, -(1i64 << 50) as u64] {
            let Some(mut vm) = reader(name, code, &[USE_TSC_OFFSETTING]) else { return };
            vmwrite(f::TSC_OFFSET, offset);
            let before = cpu::tsc();
            to_end(name, &mut vm);
            let passed = rdtsc_of(&vm).wrapping_sub(offset).wrapping_sub(before);
            check!(name, passed <= cpu::tsc() - before, "offset {offset:#x}: read {:#x}", rdtsc_of(&vm));
        }
    }
}

fn tsc_scaling() {
    let name = "TSC scaling";
    if !USE_TSC_SCALING.available() {
        return skip(name, USE_TSC_SCALING.name);
    }
    for (reads, code) in readers() {
        // One half, one and a half, and sixteen; the offset is added behind.
        for multiplier in [1u64 << 47, 3 << 47, 16 << 48] {
            let Some(mut vm) = reader(reads, code, &[USE_TSC_OFFSETTING, USE_TSC_SCALING]) else { return };
            vmwrite(f::TSC_MULTIPLIER, multiplier);
            vmwrite(f::TSC_OFFSET, 1 << 62);
            let scaled = |tsc: u64| (u128::from(tsc) * u128::from(multiplier) >> 48) as u64 + (1 << 62);
            let before = cpu::tsc();
            to_end(name, &mut vm);
            let range = scaled(before)..=scaled(cpu::tsc());
            check!(name, range.contains(&rdtsc_of(&vm)), "{reads} {multiplier:#x}: {:#x}", rdtsc_of(&vm));
        }
    }
    let Some(mut vm) = reader(name, l2!(["rdtsc"]), &[USE_TSC_SCALING]) else { return };
    vm.unset(&[USE_TSC_OFFSETTING]);
    vmwrite(f::TSC_MULTIPLIER, 1 << 47);
    let before = cpu::tsc();
    to_end(name, &mut vm);
    let passed = rdtsc_of(&vm).wrapping_sub(before);
    check!("TSC scaling needs TSC offsetting", passed <= cpu::tsc() - before, "{:#x}", rdtsc_of(&vm));
}
