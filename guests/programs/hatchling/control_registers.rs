//! Control and debug registers in L2: masks, shadows, CR3 targets, CLTS, LMSW, CR8, MOV DR.

use crate::simple_exits::to_ring3;
use crate::want::{Want, exits, runs, to_end};
use rt::cpu::{self, CR0_EM, CR0_MP, CR0_NE, CR0_TS, CR4_PGE, CR4_TSD};
use rt::mem;
use rt::report::{equal, skip};
use rt::vmx::control::*;
use rt::vmx::exit::event;
use rt::vmx::{CR4_VMXE, Vm, capability, field as f, reason, vmread, vmwrite};
use rt::{l2, trap};

/// Exit qualification of control-register accesses: register, kind of access, general-purpose register.
const fn access(register: u64, kind: u64, general: u64) -> u64 {
    register | kind << 4 | general << 8
}

const TO: u64 = 0;
const FROM: u64 = 1;
const CLTS: u64 = 2;
const LMSW: u64 = 3;

fn gp() -> Want {
    Want::exit(reason::EXCEPTION_OR_NMI).event_with_error(event::HARDWARE_EXCEPTION | u32::from(trap::GP), 0)
}

pub fn all() {
    cr0_mask();
    clts();
    lmsw();
    cr4_mask();
    fixed_bits();
    cr3();
    cr3_targets();
    cr8();
    debug_registers();
}

/// A machine whose CR0 has these bits under L1's mask with this shadow.
fn with_cr0(code: u64, mask: u64, shadow: u64) -> Vm {
    let vm = Vm::fresh(code);
    vmwrite(f::CR0_MASK, mask);
    vmwrite(f::CR0_SHADOW, shadow);
    vm
}

fn cr0_mask() {
    let cr0 = cpu::cr0();
    let code = l2!(["mov cr0, rbx"]);
    let mut vm = with_cr0(code, CR0_TS, cr0);
    vm.regs.rbx = cr0 | CR0_TS;
    let want = Want::instruction(reason::CR_ACCESS, 3).qualification(access(0, TO, 3));
    want.run("MOV to CR0 exits where a masked bit differs from the shadow", &mut vm);
    let mut vm = with_cr0(code, CR0_TS, cr0 | CR0_TS);
    vm.regs.rbx = cr0 | CR0_TS;
    to_end("MOV to CR0 runs where masked bits match the shadow", &mut vm);
    equal("MOV to CR0 leaves masked bits", vmread(f::GUEST_CR0) & CR0_TS, 0);
    let mut vm = with_cr0(code, CR0_TS, cr0);
    vm.regs.rbx = cr0 & !CR0_MP;
    to_end("MOV to CR0 runs where other bits change", &mut vm);
    equal("MOV to CR0 writes bits outside the mask", vmread(f::GUEST_CR0) & CR0_MP, 0);
    let mut vm = with_cr0(l2!(["mov rax, cr0", "smsw rbx"]), CR0_TS | CR0_MP, CR0_TS);
    to_end("MOV from CR0 runs", &mut vm);
    let wanted = cr0 & !CR0_MP | CR0_TS;
    equal("MOV from CR0 shows the shadow under the mask", vm.regs.rax, wanted);
    equal("SMSW shows the shadow under the mask", vm.regs.rbx & 0xffff, wanted & 0xffff);
    let mut vm = with_cr0(l2!(["mov cr0, r10"]), !0, cr0);
    vm.regs.r10 = cr0 ^ cpu::CR0_AM;
    let want = Want::instruction(reason::CR_ACCESS, 4).qualification(access(0, TO, 10));
    want.run("MOV to CR0 from R10 exits", &mut vm);
}

fn clts() {
    let code = l2!(["clts"]);
    let cr0 = cpu::cr0();
    let mut vm = with_cr0(code, CR0_TS, cr0 | CR0_TS);
    let want = Want::instruction(reason::CR_ACCESS, 2).qualification(access(0, CLTS, 0));
    want.run("CLTS exits where TS is masked and set in the shadow", &mut vm);
    let mut vm = with_cr0(code, CR0_TS, cr0);
    vmwrite(f::GUEST_CR0, cr0 | CR0_TS);
    to_end("CLTS runs where TS is masked and clear in the shadow", &mut vm);
    equal("CLTS leaves a masked TS", vmread(f::GUEST_CR0) & CR0_TS, CR0_TS);
    let mut vm = with_cr0(code, 0, cr0 | CR0_TS);
    vmwrite(f::GUEST_CR0, cr0 | CR0_TS);
    to_end("CLTS runs where TS is not masked", &mut vm);
    equal("CLTS clears an unmasked TS", vmread(f::GUEST_CR0) & CR0_TS, 0);
}

fn lmsw() {
    let code = l2!(["lmsw ax"]);
    let cr0 = cpu::cr0();
    let lmsw = |source: u64, memory: u64| access(0, LMSW, 0) | memory << 6 | source << 16;
    let mut vm = with_cr0(code, CR0_TS, cr0);
    vm.regs.rax = 0xab0b;
    let want = Want::instruction(reason::CR_ACCESS, 3).qualification(lmsw(0xab0b, 0));
    want.run("LMSW exits where a masked bit differs", &mut vm);
    vm.regs.rax = 0xab03;
    to_end("LMSW runs where masked bits match", &mut vm);
    let mut vm = with_cr0(code, 1 | CR0_MP, cr0 & !1);
    vm.regs.rax = 3;
    let want = Want::instruction(reason::CR_ACCESS, 3).qualification(lmsw(3, 0));
    want.run("LMSW exits where it would set a masked PE", &mut vm);
    let mut vm = with_cr0(code, 1, cr0);
    vm.regs.rax = 2;
    to_end("LMSW runs where it cannot clear a masked PE", &mut vm);
    let mut vm = with_cr0(code, 1 << 16 | CR0_NE, cr0 & !CR0_NE);
    vm.regs.rax = 0xffff & !CR0_EM & !CR0_TS;
    to_end("LMSW looks at the low four bits only", &mut vm);
    let mut vm = with_cr0(l2!(["lmsw [rsi + 4]"]), CR0_EM, cr0);
    mem::write(mem::FREE + 4, 0x1237u16);
    vm.regs.rsi = mem::FREE;
    let want = Want::instruction(reason::CR_ACCESS, 4).qualification(lmsw(0x1237, 1));
    want.linear(mem::FREE + 4).run("LMSW from memory exits with its address", &mut vm);
}

fn cr4_mask() {
    let cr4 = cpu::cr4();
    let code = l2!(["mov cr4, rdi"]);
    let start = |mask, shadow| {
        let vm = Vm::fresh(code);
        vmwrite(f::CR4_MASK, mask);
        vmwrite(f::CR4_SHADOW, shadow);
        vm
    };
    let mut vm = start(CR4_TSD, cr4);
    vm.regs.rdi = cr4 | CR4_TSD;
    let want = Want::instruction(reason::CR_ACCESS, 3).qualification(access(4, TO, 7));
    want.run("MOV to CR4 exits where a masked bit differs from the shadow", &mut vm);
    vm.regs.rdi = cr4 | CR4_PGE;
    to_end("MOV to CR4 runs where masked bits match", &mut vm);
    equal("MOV to CR4 writes bits outside the mask", vmread(f::GUEST_CR4), cr4 | CR4_PGE);
    let mut vm = start(CR4_VMXE, cr4 & !CR4_VMXE);
    vm.regs.rdi = cr4 & !CR4_VMXE | CR4_TSD;
    to_end("MOV to CR4 with VMXE hidden by the mask runs", &mut vm);
    equal("MOV to CR4 leaves the masked VMXE", vmread(f::GUEST_CR4), cr4 | CR4_TSD);
    let mut vm = Vm::fresh(l2!(["mov rdx, cr4"]));
    vmwrite(f::CR4_MASK, CR4_VMXE);
    vmwrite(f::CR4_SHADOW, 0);
    to_end("MOV from CR4 runs", &mut vm);
    equal("MOV from CR4 shows the shadow under the mask", vm.regs.rdx, cr4 & !CR4_VMXE);
}

/// Bits that VMX operation fixes cannot be changed by L2 either, and raise #GP.
fn fixed_bits() {
    let mut vm = Vm::fresh(l2!(["mov cr4, rdi"]));
    vm.regs.rdi = cpu::cr4() & !CR4_VMXE;
    gp().run("L2 cannot clear an unmasked CR4.VMXE", &mut vm);
    let mut vm = Vm::fresh(l2!(["mov cr0, rdi"]));
    vm.regs.rdi = cpu::cr0() & !CR0_NE;
    gp().run("L2 cannot clear an unmasked CR0.NE", &mut vm);
    // The mask is looked at first.
    let mut vm = with_cr0(l2!(["mov cr0, rdi"]), CR0_NE, cpu::cr0());
    vm.regs.rdi = cpu::cr0() & !CR0_NE;
    let want = Want::instruction(reason::CR_ACCESS, 3).qualification(access(0, TO, 7));
    want.run("a masked CR0.NE exits before it faults", &mut vm);
    let mut vm = with_cr0(l2!(["mov cr0, rdi"]), 0, cpu::cr0());
    vm.regs.rdi = 1 << 32;
    gp().run("MOV to CR0 with a high bit faults", &mut vm);
}

fn cr3() {
    let to = l2!(["mov cr3, rdx"]);
    let want = Want::instruction(reason::CR_ACCESS, 3);
    exits("MOV to CR3 exits", &[CR3_LOAD_EXITING], to, want.qualification(access(3, TO, 2)));
    let from = l2!(["mov rbp, cr3"]);
    exits("MOV from CR3 exits", &[CR3_STORE_EXITING], from, want.qualification(access(3, FROM, 5)));
    let code = l2!(["mov rax, cr3", "mov cr3, rax", "mov rax, cr3"]);
    let controls = [CR3_LOAD_EXITING, CR3_STORE_EXITING];
    if let Some((vm, _)) = runs("CR3 runs in L2", &[], &controls, code) {
        equal("L2 reads its CR3", vm.regs.rax, vmread(f::GUEST_CR3));
    }
}

fn cr3_targets() {
    let targets = cpu::rdmsr(capability::MISC) >> 16 & 0x1ff;
    if targets < 2 {
        return skip("CR3 targets", "CR3 targets");
    }
    let cr3 = cpu::cr3();
    let mut vm = Vm::fresh(l2!(["mov cr3, rax"]));
    if !vm.set_or_skip("CR3 targets", &[CR3_LOAD_EXITING]) {
        return;
    }
    vm.regs.rax = cr3;
    vmwrite(f::CR3_TARGET0, 0x1000);
    vmwrite(f::CR3_TARGET1, cr3);
    let want = Want::instruction(reason::CR_ACCESS, 3).qualification(access(3, TO, 0));
    want.run("a CR3 target beyond the count does not count", &mut vm);
    vmwrite(f::CR3_TARGET_COUNT, 1);
    want.run("a CR3 target beyond a count of one does not count", &mut vm);
    vmwrite(f::CR3_TARGET_COUNT, 2);
    to_end("MOV to CR3 of a target value runs", &mut vm);
    vm.start_at(vm.start);
    vm.regs.rax = cr3 | 8;
    want.run("MOV to CR3 compares all bits with the targets", &mut vm);
}

fn cr8() {
    let want = |kind| Want::instruction(reason::CR_ACCESS, 4).qualification(access(8, kind, 1));
    exits("MOV to CR8 exits", &[CR8_LOAD_EXITING], l2!(["mov cr8, rcx"]), want(TO));
    exits("MOV from CR8 exits", &[CR8_STORE_EXITING], l2!(["mov rcx, cr8"]), want(FROM));
    let code = l2!(["mov cr8, rcx", "mov rdx, cr8"]);
    let mut vm = Vm::fresh(code);
    vm.unset(&[CR8_LOAD_EXITING, CR8_STORE_EXITING]);
    vm.regs.rcx = 5;
    to_end("CR8 without TPR shadow runs in L2", &mut vm);
    equal("L2 reads the CR8 that it wrote", vm.regs.rdx, 5);
    equal("CR8 of L2 is L1's too", cpu::cr8(), 5);
    cpu::set_cr8(0);
    let mut vm = Vm::fresh(l2!(["mov cr8, rcx"]));
    vm.set(&[CR8_LOAD_EXITING]);
    vm.regs.rcx = 0x100;
    // #GP for reserved bits is not among the faults that go before exits.
    let want = Want::instruction(reason::CR_ACCESS, 4).qualification(access(8, TO, 1));
    want.run("MOV to CR8 of a reserved bit exits before it faults", &mut vm);
}

fn debug_registers() {
    let want = |register: u64, from: u64, general: u64| {
        Want::instruction(reason::MOV_DR, 3).qualification(register | from << 4 | general << 8)
    };
    let controls = [MOV_DR_EXITING];
    exits("MOV to DR0 exits", &controls, l2!(["mov dr0, rdx"]), want(0, 0, 2));
    exits("MOV from DR7 exits", &controls, l2!(["mov rsi, dr7"]), want(7, 1, 6));
    exits("MOV from DR6 exits", &controls, l2!(["mov r9, dr6"]), want(6, 1, 9).length(4));
    runs("MOV DR runs in L2", &[], &controls, l2!(["mov rax, dr6", "mov dr6, rax"]));
    let name = "MOV DR exits before #UD of DR4 with CR4.DE";
    let mut vm = Vm::fresh(l2!([".byte 0x0f, 0x21, 0xe0"]));
    if vm.set_or_skip(name, &controls) {
        vmwrite(f::GUEST_CR4, cpu::cr4() | cpu::CR4_DE);
        want(4, 1, 0).run(name, &mut vm);
        let mut vm = Vm::fresh(0);
        vm.set(&controls);
        to_ring3(&mut vm, &[0x0f, 0x21, 0xc0]);
        want(0, 1, 0).run("MOV DR exits before #GP of ring 3", &mut vm);
    }
}
