//! The TPR shadow, the APIC-access page, APIC-register virtualization, x2APIC mode ("APIC Virtualization").

use crate::want::{Want, to_end};
use rt::mem::{self, PAGE};
use rt::report::equal;
use rt::vmx::control::*;
use rt::vmx::exit::event;
use rt::vmx::{Vm, field as f, handler, reason, vmread, vmwrite};
use rt::{apic, cpu};
use rt::{check, l2, trap};

/// The page that stands for L2's APIC, and the one L2's accesses go to.
pub const VIRTUAL_APIC: u64 = mem::FREE + 0x60_0000;
pub const ACCESS_PAGE: u64 = VIRTUAL_APIC + PAGE;
const BITMAP: u64 = VIRTUAL_APIC + 2 * PAGE;

pub fn all() {
    tpr_shadow();
    tpr_threshold();
    access_page();
    access_kinds();
    virtualized_tpr();
    register_virtualization();
    register_writes();
    x2apic();
}

/// A register of the virtual-APIC page.
pub fn register(offset: u32) -> u32 {
    mem::read(VIRTUAL_APIC + u64::from(offset))
}

pub fn set_register(offset: u32, value: u32) {
    mem::write(VIRTUAL_APIC + u64::from(offset), value);
}

/// A machine with a cleared virtual-APIC page and these controls besides the TPR shadow.
pub fn with_shadow(name: &str, code: u64, controls: &[Control]) -> Option<Vm> {
    let mut vm = Vm::fresh(code);
    mem::fill(VIRTUAL_APIC, 0, 2 * PAGE);
    if !vm.set_or_skip(name, &[USE_TPR_SHADOW]) || !vm.set_or_skip(name, controls) {
        return None;
    }
    vm.unset(&[CR8_LOAD_EXITING, CR8_STORE_EXITING]);
    vmwrite(f::VIRTUAL_APIC_ADDRESS, VIRTUAL_APIC);
    vmwrite(f::APIC_ACCESS_ADDRESS, ACCESS_PAGE);
    vm.regs.rbx = ACCESS_PAGE;
    Some(vm)
}

fn tpr_shadow() {
    let name = "TPR shadow: MOV to CR8";
    let Some(mut vm) = with_shadow(name, l2!(["mov cr8, rcx", "mov rdx, cr8"]), &[]) else { return };
    vm.regs.rcx = 0xb;
    set_register(apic::TPR, 0x1234_5678);
    to_end(name, &mut vm);
    equal("TPR shadow: VTPR is CR8 shifted", register(apic::TPR), 0xb0);
    equal("TPR shadow: MOV from CR8 reads it", vm.regs.rdx, 0xb);
    equal("TPR shadow: L1's TPR stays", cpu::cr8(), 0);
    let Some(mut vm) = with_shadow(name, l2!(["mov cr8, rcx"]), &[]) else { return };
    vm.regs.rcx = 0x10;
    let event = event::HARDWARE_EXCEPTION | u32::from(trap::GP);
    let want = Want::exit(reason::EXCEPTION_OR_NMI).event_with_error(event, 0);
    want.run("TPR shadow: a reserved bit of CR8 raises #GP", &mut vm);
}

fn tpr_threshold() {
    let name = "TPR threshold: MOV to CR8 below it exits behind the instruction";
    let start = |code: u64, threshold: u64| {
        let vm = with_shadow(name, code, &[])?;
        vmwrite(f::TPR_THRESHOLD, threshold);
        set_register(apic::TPR, 0x90);
        Some(vm)
    };
    let code = l2!(["mov cr8, rcx", "nop"]);
    let Some(mut vm) = start(code, 5) else { return };
    vm.regs.rcx = 4;
    Want::exit(reason::TPR_BELOW_THRESHOLD).at(4).run(name, &mut vm);
    equal("TPR threshold: VTPR is written", register(apic::TPR), 0x40);
    let Some(mut vm) = start(code, 5) else { return };
    vm.regs.rcx = 5;
    to_end("TPR threshold: MOV to CR8 of the threshold does not", &mut vm);
    // With virtualized APIC accesses, the threshold is looked at when L2 is entered.
    let Some(mut vm) = start(code, 5) else { return };
    if vm.set(&[VIRTUALIZE_APIC_ACCESSES]) {
        set_register(apic::TPR, 0x40);
        Want::exit(reason::TPR_BELOW_THRESHOLD).run("TPR threshold: VTPR below it at entry exits", &mut vm);
    }
}

fn access_page() {
    let read = l2!(["mov eax, [rbx + 0x20]"]);
    let name = "APIC access: read";
    let Some(mut vm) = with_shadow(name, read, &[VIRTUALIZE_APIC_ACCESSES]) else { return };
    let want = Want::exit(reason::APIC_ACCESS);
    want.qualification(0x20).run(name, &mut vm);
    let Some(mut vm) = with_shadow(name, l2!(["mov [rbx + 0x300], eax"]), &[VIRTUALIZE_APIC_ACCESSES]) else {
        return;
    };
    want.qualification(1 << 12 | 0x300).run("APIC access: write", &mut vm);
    equal("APIC access: RF is saved", vmread(f::GUEST_RFLAGS) >> 16 & 1, 1);
    if !cpu::is_bochs() {
        let Some(mut vm) = with_shadow(name, ACCESS_PAGE + 0x40, &[VIRTUALIZE_APIC_ACCESSES]) else { return };
        want.qualification(2 << 12 | 0x40).run("APIC access: fetch", &mut vm);
    }
    let Some(mut vm) = with_shadow(name, l2!(["mov eax, [rbx + 0x20]"]), &[]) else { return };
    to_end("APIC access: a page like others without the control", &mut vm);
    // The access page is found by its physical address, whatever the linear one.
    let va = rt::user::SCRATCH + 80 * PAGE;
    rt::paging::set_pte(va, ACCESS_PAGE | rt::paging::P | rt::paging::W);
    let Some(mut vm) = with_shadow(name, read, &[VIRTUALIZE_APIC_ACCESSES]) else { return };
    vm.regs.rbx = va;
    want.qualification(0x20).run("APIC access: by another linear address", &mut vm);
    rt::paging::set_pte(va, 0);
    let Some(mut vm) = with_shadow(name, read, &[VIRTUALIZE_APIC_ACCESSES, ENABLE_EPT]) else { return };
    let ept = rt::vmx::ept::Ept::identity();
    vmwrite(f::EPT_POINTER, ept.pointer());
    want.qualification(0x20).run("APIC access: through EPT", &mut vm);
}

/// Event delivery, page tables, instructions with two accesses.
fn access_kinds() {
    let name = "APIC access: during event delivery";
    let Some(mut vm) = with_shadow(name, l2!(["ud2"]), &[VIRTUALIZE_APIC_ACCESSES]) else { return };
    handler::install();
    vmwrite(f::GUEST_RSP, ACCESS_PAGE + 0x800);
    let exit = vm.run();
    let vectoring = event::HARDWARE_EXCEPTION | u32::from(trap::UD);
    Want::exit(reason::APIC_ACCESS).any_qualification().vectoring(vectoring).check(name, &exit);
    equal("APIC access: its type is 3", exit.qualification >> 12 & 15, 3);
    let Some(mut vm) =
        with_shadow(name, l2!(["lock or dword ptr [rbx + 0x20], 1"]), &[VIRTUALIZE_APIC_ACCESSES])
    else {
        return;
    };
    let exit = vm.run();
    let kind = exit.qualification >> 12;
    check!("APIC access: read-modify-write exits", exit.reason == reason::APIC_ACCESS && kind <= 1, "{exit}");
    let Some(mut vm) = with_shadow(name, l2!(["mov eax, [rbx - 2]"]), &[VIRTUALIZE_APIC_ACCESSES]) else {
        return;
    };
    let exit = vm.run();
    check!("APIC access: across the page's start exits", exit.reason == reason::APIC_ACCESS, "{exit}");
}

fn virtualized_tpr() {
    let name = "APIC access: VTPR is read from the virtual-APIC page";
    let controls = [VIRTUALIZE_APIC_ACCESSES];
    let Some(mut vm) = with_shadow(name, l2!(["mov eax, [rbx + 0x80]"]), &controls) else { return };
    set_register(apic::TPR, 0x73);
    to_end(name, &mut vm);
    equal("APIC access: VTPR", vm.regs.rax, 0x73);
    let Some(mut vm) = with_shadow(name, l2!(["mov [rbx + 0x80], eax"]), &controls) else { return };
    vm.regs.rax = 0x45;
    to_end("APIC access: VTPR is written to the virtual-APIC page", &mut vm);
    equal("APIC access: VTPR holds what L2 wrote", register(apic::TPR), 0x45);
    let Some(mut vm) = with_shadow(name, l2!(["mov [rbx + 0x80], eax"]), &controls) else { return };
    set_register(apic::TPR, 0x80);
    vmwrite(f::TPR_THRESHOLD, 4);
    vm.regs.rax = 0x3f;
    let length = 6;
    Want::exit(reason::TPR_BELOW_THRESHOLD)
        .at(length)
        .run("APIC access: VTPR below the threshold exits", &mut vm);
    let Some(mut vm) = with_shadow(name, l2!(["movzx eax, byte ptr [rbx + 0x83]"]), &controls) else {
        return;
    };
    Want::exit(reason::APIC_ACCESS).qualification(0x83).run("APIC access: a part of VTPR exits", &mut vm);
    let Some(mut vm) = with_shadow(name, l2!(["mov rax, [rbx + 0x80]"]), &controls) else { return };
    Want::exit(reason::APIC_ACCESS).qualification(0x80).run("APIC access: eight bytes exit", &mut vm);
    let Some(mut vm) = with_shadow(name, l2!(["mov eax, [rbx + 0x20]"]), &controls) else { return };
    let want = Want::exit(reason::APIC_ACCESS).qualification(0x20);
    want.run("APIC access: other registers exit without register virtualization", &mut vm);
}

fn register_virtualization() {
    let name = "APIC-register virtualization: read";
    let controls = [VIRTUALIZE_APIC_ACCESSES, APIC_REGISTER_VIRTUALIZATION];
    let readable = [
        apic::ID,
        apic::VERSION,
        apic::TPR,
        apic::EOI,
        apic::LDR,
        apic::DFR,
        apic::SPURIOUS,
        apic::ERROR_STATUS,
        apic::ICR,
        apic::ICR_HIGH,
        apic::LVT_TIMER,
        0x330,
        0x340,
        apic::LVT_LINT0,
        apic::LVT_LINT1,
        apic::LVT_ERROR,
        apic::TIMER_INITIAL,
        apic::TIMER_DIVIDE,
    ];
    let code = l2!(["mov eax, [rbx]"]);
    for offset in (0..0x400).step_by(16) {
        let Some(mut vm) = with_shadow(name, code, &controls) else { return };
        set_register(offset, 0xabc0_0000 | offset);
        vm.regs.rbx += u64::from(offset);
        let exit = vm.run();
        // ISR, TMR and IRR lie together.
        if readable.contains(&offset) || (apic::ISR..apic::ERROR_STATUS).contains(&offset) {
            let right = exit.reason == reason::VMCALL && vm.regs.rax == u64::from(0xabc0_0000 | offset);
            check!(name, right, "offset {offset:#x}: {exit}, RAX {:#x}", vm.regs.rax);
        } else {
            let right = exit.reason == reason::APIC_ACCESS && exit.qualification == u64::from(offset);
            check!(name, right, "offset {offset:#x}: {exit}, wanted an APIC-access exit");
        }
    }
}

fn register_writes() {
    let name = "APIC-register virtualization: write";
    let controls = [VIRTUALIZE_APIC_ACCESSES, APIC_REGISTER_VIRTUALIZATION];
    let code = l2!(["mov [rbx], eax", "nop"]);
    let writable = [
        apic::ID,
        apic::LDR,
        apic::DFR,
        apic::SPURIOUS,
        apic::ERROR_STATUS,
        apic::ICR,
        apic::LVT_TIMER,
        0x330,
        0x340,
        apic::LVT_LINT0,
        apic::LVT_LINT1,
        apic::LVT_ERROR,
        apic::TIMER_INITIAL,
        apic::TIMER_DIVIDE,
    ];
    for offset in writable {
        let Some(mut vm) = with_shadow(name, code, &controls) else { return };
        vm.regs.rbx += u64::from(offset);
        vm.regs.rax = 0x0001_8051;
        let exit = vm.run();
        let right =
            exit.reason == reason::APIC_WRITE && exit.qualification == u64::from(offset) && exit.at == 2;
        check!(name, right, "offset {offset:#x}: {exit}, wanted an APIC-write exit behind the instruction");
        check!(
            name,
            register(offset) == 0x0001_8051,
            "offset {offset:#x}: {:#x} in the page",
            register(offset)
        );
    }
    let Some(mut vm) = with_shadow(name, code, &controls) else { return };
    vm.regs.rbx += u64::from(apic::ICR_HIGH);
    vm.regs.rax = 0x1234_5678;
    to_end("APIC-register virtualization: the high half of ICR does not exit", &mut vm);
    equal("APIC-register virtualization: ICR's high byte is kept", register(apic::ICR_HIGH), 0x1200_0000);
    for offset in [apic::VERSION, apic::PPR, apic::ISR, apic::IRR, apic::TIMER_CURRENT] {
        let Some(mut vm) = with_shadow(name, code, &controls) else { return };
        vm.regs.rbx += u64::from(offset);
        let exit = vm.run();
        let right = exit.reason == reason::APIC_ACCESS && exit.qualification == u64::from(1 << 12 | offset);
        check!("APIC-register virtualization: a read-only register", right, "offset {offset:#x}: {exit}");
    }
}

/// MSRs 0x800 to 0x8ff with "virtualize x2APIC mode". L1 does not intercept them.
fn x2apic() {
    let name = "x2APIC mode: RDMSR of the TPR";
    let start = |code: u64, controls: &[Control]| {
        let mut vm = with_shadow(name, code, controls)?;
        if !vm.set_or_skip(name, &[VIRTUALIZE_X2APIC, USE_MSR_BITMAPS]) {
            return None;
        }
        mem::fill(BITMAP, 0, PAGE);
        vmwrite(f::MSR_BITMAP, BITMAP);
        Some(vm)
    };
    let (read, write) = (l2!(["rdmsr"]), l2!(["wrmsr", "nop"]));
    let Some(mut vm) = start(read, &[]) else { return };
    mem::write(VIRTUAL_APIC + 0x80, 0x6au64);
    vm.regs.rcx = 0x808;
    to_end(name, &mut vm);
    check!("x2APIC mode: the TPR is VTPR", (vm.regs.rax, vm.regs.rdx) == (0x6a, 0), "{:#x}", vm.regs.rax);
    let Some(mut vm) = start(write, &[]) else { return };
    (vm.regs.rcx, vm.regs.rax, vm.regs.rdx) = (0x808, 0x37, 0);
    to_end("x2APIC mode: WRMSR of the TPR", &mut vm);
    equal("x2APIC mode: VTPR is written", register(apic::TPR), 0x37);
    let Some(mut vm) = start(write, &[]) else { return };
    (vm.regs.rcx, vm.regs.rax, vm.regs.rdx) = (0x808, 0x100, 0);
    let event = event::HARDWARE_EXCEPTION | u32::from(trap::GP);
    let gp = Want::exit(reason::EXCEPTION_OR_NMI).event_with_error(event, 0);
    gp.run("x2APIC mode: a reserved bit of the TPR raises #GP", &mut vm);
    let Some(mut vm) = start(read, &[APIC_REGISTER_VIRTUALIZATION]) else { return };
    mem::write(VIRTUAL_APIC + 0x300, 0x1122_3344_5566_7788u64);
    vm.regs.rcx = 0x830;
    to_end("x2APIC mode: any register is read with register virtualization", &mut vm);
    let value = vm.regs.rdx << 32 | vm.regs.rax;
    equal("x2APIC mode: eight bytes of the virtual-APIC page", value, 0x1122_3344_5566_7788);
    let Some(mut vm) = start(write, &[]) else { return };
    mem::write(VIRTUAL_APIC + 0x80, 0x90u64);
    vmwrite(f::TPR_THRESHOLD, 5);
    (vm.regs.rcx, vm.regs.rax, vm.regs.rdx) = (0x808, 0x40, 0);
    Want::exit(reason::TPR_BELOW_THRESHOLD)
        .at(2)
        .run("x2APIC mode: a TPR below the threshold exits", &mut vm);
    let Some(mut vm) = start(read, &[]) else { return };
    mem::fill(BITMAP, 0xff, PAGE);
    vm.regs.rcx = 0x808;
    Want::instruction(reason::RDMSR, 2).run("x2APIC mode: the MSR bitmap goes first", &mut vm);
}
