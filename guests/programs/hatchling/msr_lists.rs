//! MSR-load and MSR-store lists, debug controls, PAT, perf controls over entry and exit.

use crate::want::to_end;
use rt::cpu::{self, MSR_CSTAR, MSR_EFER, MSR_KERNEL_GS_BASE, MSR_LSTAR, MSR_SYSENTER_CS, rdmsr, wrmsr};
use rt::mem::{self, PAGE};
use rt::report::{equal, skip};
use rt::vmx::control::*;
use rt::vmx::vm::MSR_PAT;
use rt::vmx::{Exit, Vm, field as f, reason, vmread, vmwrite};
use rt::{check, l2, probe};

const LIST: u64 = mem::FREE + 0x68_0000;
const BITMAP: u64 = LIST + PAGE;

pub fn all() {
    loaded_on_entry();
    stored_and_loaded_on_exit();
    failing_loads();
    debug_controls();
    page_attributes();
}

/// Writes an entry: MSR number, value. Bits 63:32 of the first word are reserved.
fn entry(list: u64, index: u64, msr: u64, value: u64) {
    mem::write(list + index * 16, [msr, value]);
}

fn loaded_on_entry() {
    let name = "entry loads the MSR list";
    let mut vm = Vm::fresh(l2!(["nop"]));
    entry(LIST, 0, MSR_CSTAR.into(), 0x1234_5678_9abc);
    entry(LIST, 1, MSR_KERNEL_GS_BASE.into(), 0x7654);
    entry(LIST, 2, MSR_CSTAR.into(), 0x1111);
    vmwrite(f::ENTRY_MSR_LOAD_ADDRESS, LIST);
    vmwrite(f::ENTRY_MSR_LOAD_COUNT, 3);
    wrmsr(MSR_CSTAR, 0);
    wrmsr(MSR_KERNEL_GS_BASE, 0);
    to_end(name, &mut vm);
    equal("in order", rdmsr(MSR_CSTAR), 0x1111);
    equal("every entry", rdmsr(MSR_KERNEL_GS_BASE), 0x7654);
    wrmsr(MSR_CSTAR, 0);
    wrmsr(MSR_KERNEL_GS_BASE, 0);
}

fn stored_and_loaded_on_exit() {
    let name = "exit stores and loads the MSR lists";
    let mut vm = Vm::fresh(l2!(["wrmsr"]));
    if !vm.set_or_skip(name, &[USE_MSR_BITMAPS]) {
        return;
    }
    mem::fill(BITMAP, 0, PAGE);
    vmwrite(f::MSR_BITMAP, BITMAP);
    let (store, load) = (LIST, LIST + 0x800);
    entry(store, 0, MSR_LSTAR.into(), 0x5555);
    entry(store, 1, 0x10, 0);
    entry(load, 0, MSR_LSTAR.into(), 0x9999);
    vmwrite(f::EXIT_MSR_STORE_ADDRESS, store);
    vmwrite(f::EXIT_MSR_STORE_COUNT, 2);
    vmwrite(f::EXIT_MSR_LOAD_ADDRESS, load);
    vmwrite(f::EXIT_MSR_LOAD_COUNT, 1);
    vm.regs.rcx = MSR_LSTAR.into();
    vm.regs.rax = 0x7777;
    let before = cpu::tsc();
    to_end(name, &mut vm);
    equal("exit stores what L2 has left", mem::read(store + 8), 0x7777u64);
    let stored: u64 = mem::read(store + 24);
    check!("exit stores the TSC", (before..cpu::tsc()).contains(&stored), "{stored:#x}");
    equal("exit loads what L1 wants", rdmsr(MSR_LSTAR), 0x9999);
    wrmsr(MSR_LSTAR, 0);
}

/// An entry that cannot be loaded fails the VM entry with its index (from 1).
fn failing_loads() {
    let cases = [
        ("an MSR that does not exist", 0x4000_0000u64, 0u64),
        ("reserved bits of the entry", 1 << 32 | u64::from(MSR_CSTAR), 0),
        ("IA32_FS_BASE", 0xc000_0100, 0),
        ("IA32_GS_BASE", 0xc000_0101, 0),
        ("an x2APIC MSR", 0x808, 0),
        ("a value that WRMSR refuses", MSR_LSTAR.into(), 1 << 62),
        ("IA32_EFER that changes LME", MSR_EFER.into(), 0),
    ];
    for (what, msr, value) in cases {
        let name = "entry: an MSR that cannot be loaded";
        let mut vm = Vm::fresh(l2!(["nop"]));
        entry(LIST, 0, MSR_CSTAR.into(), 0x3333);
        entry(LIST, 1, msr, value);
        vmwrite(f::ENTRY_MSR_LOAD_ADDRESS, LIST);
        vmwrite(f::ENTRY_MSR_LOAD_COUNT, 2);
        let exit: Exit = vm.run();
        let wanted = reason::ENTRY_FAILURE | reason::ENTRY_FAILURE_MSR_LOADING;
        let right = exit.reason == wanted && exit.qualification == 2;
        check!(name, right, "{what}: {exit}, wanted entry failure 34 qualification 2");
        // The host's state is loaded, the launch state stays clear: the same VMCS can be launched.
        vmwrite(f::ENTRY_MSR_LOAD_COUNT, 1);
        to_end("entry: the same VMCS can be launched behind a failure", &mut vm);
        wrmsr(MSR_CSTAR, 0);
    }
    let mut vm = Vm::fresh(l2!(["nop"]));
    vmwrite(f::GUEST_SYSENTER_CS, 0x77);
    wrmsr(MSR_SYSENTER_CS, 0);
    entry(LIST, 0, 0x4000_0000, 0);
    vmwrite(f::ENTRY_MSR_LOAD_ADDRESS, LIST);
    vmwrite(f::ENTRY_MSR_LOAD_COUNT, 1);
    let exit = vm.run();
    check!("entry: a failure at the first MSR", exit.qualification == 1, "{exit}");
    equal("entry: a failure loads host state", rdmsr(MSR_SYSENTER_CS), 0);
    equal("entry: a failure leaves the guest state", vmread(f::GUEST_SYSENTER_CS), 0x77);
}

fn debug_controls() {
    let name = "entry without debug controls leaves DR7";
    let mut vm = Vm::fresh(l2!(["mov rax, dr7"]));
    if LOAD_DEBUG_CONTROLS.clearable() && SAVE_DEBUG_CONTROLS.clearable() {
        vm.unset(&[LOAD_DEBUG_CONTROLS, SAVE_DEBUG_CONTROLS]);
        vmwrite(f::GUEST_DR7, 0x455);
        cpu::set_dr7(0x400 | 1 << 8);
        to_end(name, &mut vm);
        equal("L2 has L1's DR7", vm.regs.rax, 0x500);
        equal("exit without debug controls leaves the field", vmread(f::GUEST_DR7), 0x455);
        equal("exit sets DR7 all the same", cpu::dr7(), 0x400);
    }
    let absent = probe!(["rdmsr"], in("ecx") cpu::MSR_DEBUGCTL, out("eax") _, out("edx") _);
    if absent.is_some() {
        return skip("IA32_DEBUGCTL over entry and exit", "IA32_DEBUGCTL");
    }
    let mut vm = Vm::fresh(l2!(["mov ecx, 0x1d9", "rdmsr"]));
    if vm.set(&[LOAD_DEBUG_CONTROLS, SAVE_DEBUG_CONTROLS, USE_MSR_BITMAPS]) {
        mem::fill(BITMAP, 0, PAGE);
        vmwrite(f::MSR_BITMAP, BITMAP);
        vmwrite(f::GUEST_DEBUGCTL, 2);
        to_end("IA32_DEBUGCTL in L2", &mut vm);
        equal("entry loads IA32_DEBUGCTL", vm.regs.rax & 0xffff, 2);
        equal("exit saves IA32_DEBUGCTL", vmread(f::GUEST_DEBUGCTL), 2);
        equal("exit clears IA32_DEBUGCTL", rdmsr(cpu::MSR_DEBUGCTL), 0);
    }
}

fn page_attributes() {
    let name = "IA32_PAT over entry and exit";
    let mut vm = Vm::fresh(l2!([
        "mov ecx, 0x277",
        "rdmsr",
        "mov edi, edx",
        "mov esi, eax",
        "mov eax, 0x04040404",
        "wrmsr"
    ]));
    if !vm.set_or_skip(name, &[ENTRY_LOAD_PAT, SAVE_PAT, EXIT_LOAD_PAT, USE_MSR_BITMAPS]) {
        return;
    }
    mem::fill(BITMAP, 0, PAGE);
    vmwrite(f::MSR_BITMAP, BITMAP);
    let before = rdmsr(MSR_PAT);
    vmwrite(f::GUEST_PAT, 0x0006_0504_0100_0607);
    to_end(name, &mut vm);
    equal("entry loads IA32_PAT", vm.regs.rdi << 32 | vm.regs.rsi, 0x0006_0504_0100_0607);
    equal("exit saves IA32_PAT", vmread(f::GUEST_PAT), 0x0006_0504_0404_0404);
    equal("exit loads IA32_PAT", rdmsr(MSR_PAT), before);
    let mut vm = Vm::fresh(l2!(["nop"]));
    vmwrite(f::HOST_PAT, 0);
    to_end("without the controls", &mut vm);
    equal("without the controls IA32_PAT stays", rdmsr(MSR_PAT), before);
}
