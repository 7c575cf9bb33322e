//! Instructions that exit, always or if a control says so, and that run in L2 where none does.

use crate::want::{Want, exits, runs};
use rt::cpu::{self, INVPCID, MONITOR, RDTSCP, XSAVE, XSAVES};
use rt::report::equal;
use rt::vmx::control::*;
use rt::vmx::exit::event;
use rt::vmx::{Regs, Vm, field as f, reason, vmwrite};
use rt::{check, l2, mem, trap, user};

/// #UD as an exception exit at the start of the code.
pub const UD: Want = Want::exit(reason::EXCEPTION_OR_NMI).event(event::HARDWARE_EXCEPTION | trap::UD as u32);

pub fn all() {
    always();
    halting();
    time_stamp();
    invalidations();
    caches();
    monitoring();
    random();
    extended_state();
    vm_functions();
    privilege();
}

fn always() {
    exits("INVD exits", &[], l2!(["invd"]), Want::instruction(reason::INVD, 2));
    let name = "XSETBV exits";
    if XSAVE.or_skip(name) {
        let mut vm = Vm::fresh(l2!(["xsetbv"]));
        UD.run("XSETBV without CR4.OSXSAVE raises #UD", &mut vm);
        vmwrite(f::GUEST_CR4, cpu::cr4() | cpu::CR4_OSXSAVE);
        Want::instruction(reason::XSETBV, 3).run(name, &mut vm);
        // Even with an XCR that does not exist.
        vm.regs = Regs { rcx: 77, ..vm.regs };
        Want::instruction(reason::XSETBV, 3).run("XSETBV of no XCR exits", &mut vm);
    }
    // A prefix counts for the length.
    let code = l2!([".byte 0x66, 0x2e, 0x0f, 0xa2"]);
    exits("prefixes count for the instruction length", &[], code, Want::instruction(reason::CPUID, 4));
}

fn halting() {
    exits("HLT exits", &[HLT_EXITING], l2!(["hlt"]), Want::instruction(reason::HLT, 1));
    exits("PAUSE exits", &[PAUSE_EXITING], l2!(["pause"]), Want::instruction(reason::PAUSE, 2));
    runs("PAUSE runs in L2", &[], &[PAUSE_EXITING], l2!(["pause"]));
    runs("NOP is not PAUSE", &[PAUSE_EXITING], &[], l2!(["nop", ".byte 0x66, 0x90"]));
    exits("RDPMC exits", &[RDPMC_EXITING], l2!(["rdpmc"]), Want::instruction(reason::RDPMC, 2));
}

fn time_stamp() {
    exits("RDTSC exits", &[RDTSC_EXITING], l2!(["rdtsc"]), Want::instruction(reason::RDTSC, 2));
    let tsc = |vm: &Vm| vm.regs.rdx << 32 | vm.regs.rax;
    let before = cpu::tsc();
    if let Some((vm, _)) = runs("RDTSC runs in L2", &[], &[RDTSC_EXITING, USE_TSC_OFFSETTING], l2!(["rdtsc"]))
    {
        let value = tsc(&vm);
        check!(
            "L2 reads the same TSC as L1",
            (before..cpu::tsc()).contains(&value),
            "{value:#x}, before {before:#x}"
        );
    }
    let mut vm = Vm::fresh(l2!(["rdtsc"]));
    let name = "RDTSC exits go before the #GP of CR4.TSD only in ring 0";
    if vm.set_or_skip(name, &[RDTSC_EXITING]) {
        vmwrite(f::GUEST_CR4, cpu::cr4() | cpu::CR4_TSD);
        Want::instruction(reason::RDTSC, 2).run(name, &mut vm);
    }
    if RDTSCP.or_skip("RDTSCP") {
        exits("RDTSCP raises #UD without its enable", &[], l2!(["rdtscp"]), UD);
        runs("RDTSCP runs in L2", &[ENABLE_RDTSCP], &[RDTSC_EXITING], l2!(["rdtscp"]));
        let controls = [ENABLE_RDTSCP, RDTSC_EXITING];
        exits("RDTSCP exits", &controls, l2!(["rdtscp"]), Want::instruction(reason::RDTSCP, 3));
        exits("RDTSCP without its enable raises #UD first", &[RDTSC_EXITING], l2!(["rdtscp"]), UD);
    }
}

fn invalidations() {
    let code = l2!(["invlpg [rax + 0x1234]"]);
    let name = "INVLPG exits with its address";
    let mut vm = Vm::fresh(code);
    if vm.set_or_skip(name, &[INVLPG_EXITING]) {
        vm.regs.rax = 0x5_0000_0000;
        Want::instruction(reason::INVLPG, 7).qualification(0x5_0000_1234).run(name, &mut vm);
        let mut vm = Vm::fresh(l2!(["invlpg fs:[rax]"]));
        vm.set(&[INVLPG_EXITING]);
        vm.regs.rax = 0x77;
        rt::vmx::vm::Segment::Fs.write(0x10, 0x1000, 0xffff_ffff, rt::vmx::vm::DATA_RIGHTS);
        let want = Want::instruction(reason::INVLPG, 4).qualification(0x1077);
        want.run("INVLPG exits with its linear address, base added", &mut vm);
    }
    runs("INVLPG runs in L2", &[], &[INVLPG_EXITING], code);
    if INVPCID.or_skip("INVPCID") {
        invpcid();
    }
}

fn invpcid() {
    let code = l2!(["invpcid rbx, [rsi + rdi * 8 - 0x40]"]);
    exits("INVPCID raises #UD without its enable", &[INVLPG_EXITING], code, UD);
    let mut vm = Vm::fresh(code);
    if vm.set_or_skip("INVPCID exits", &[ENABLE_INVPCID, INVLPG_EXITING]) {
        // Type register RBX, base RSI, index RDI * 8, DS, 64-bit address.
        let information = 3 << 28 | 6 << 23 | 7 << 18 | 3 << 15 | 2 << 7 | 3;
        let want = Want::instruction(reason::INVPCID, 7).qualification(-0x40i64 as u64);
        want.information(information, MEMORY_FORM | REG2).run("INVPCID exits", &mut vm);
    }
    let mut vm = Vm::fresh(l2!(["invpcid rbx, [rsi]"]));
    if vm.set(&[ENABLE_INVPCID]) && INVLPG_EXITING.clearable() {
        vm.unset(&[INVLPG_EXITING]);
        mem::write(mem::FREE, [0u64; 2]);
        vm.regs = Regs { rbx: 2, rsi: mem::FREE, ..vm.regs };
        crate::want::to_end("INVPCID runs in L2", &mut vm);
    }
}

/// Instruction-information bits that are defined for a memory operand with base and index.
pub const MEMORY_FORM: u32 = 3 | 7 << 7 | 1 << 10 | 7 << 15 | 15 << 18 | 1 << 22 | 15 << 23 | 1 << 27;
/// The same for an operand without index: scale and index mean nothing.
pub const BASE_FORM: u32 = 7 << 7 | 1 << 10 | 7 << 15 | 1 << 22 | 15 << 23 | 1 << 27;
/// The register operand of an instruction that has both.
pub const REG2: u32 = 15 << 28;

fn caches() {
    exits("WBINVD exits", &[WBINVD_EXITING], l2!(["wbinvd"]), Want::instruction(reason::WBINVD, 2));
    runs("WBINVD runs in L2", &[], &[], l2!(["wbinvd"]));
}

fn monitoring() {
    if !MONITOR.or_skip("MONITOR and MWAIT exit") {
        return;
    }
    exits("MONITOR exits", &[MONITOR_EXITING], l2!(["monitor"]), Want::instruction(reason::MONITOR, 3));
    exits("MWAIT exits", &[MWAIT_EXITING], l2!(["mwait"]), Want::instruction(reason::MWAIT, 3));
    let mut vm = Vm::fresh(l2!(["monitor", "xor eax, eax", "mwait"]));
    if vm.set(&[MWAIT_EXITING]) {
        vm.regs = Regs { rax: mem::FREE, ..vm.regs };
        let want = Want::instruction(reason::MWAIT, 3).qualification(1).at(5);
        want.run("MWAIT exits and says that MONITOR armed", &mut vm);
    }
}

fn random() {
    // RDRAND r9d: register 9, 32 bits.
    let want = Want::instruction(reason::RDRAND, 4).information(9 << 3 | 1 << 11, 0x1878);
    exits("RDRAND exits", &[RDRAND_EXITING], l2!(["rdrand r9d"]), want);
    let want = Want::instruction(reason::RDSEED, 4).information(3 << 3 | 2 << 11, 0x1878);
    exits("RDSEED exits", &[RDSEED_EXITING], l2!(["rdseed rbx"]), want);
    let want = Want::instruction(reason::RDRAND, 4).information(6 << 3, 0x1878);
    exits("RDRAND exits with 16 bits", &[RDRAND_EXITING], l2!(["rdrand si"]), want);
}

fn extended_state() {
    if !XSAVES.or_skip("XSAVES") {
        return;
    }
    let state = mem::frame();
    let code = l2!(["xsaves [rdi]", "xrstors [rdi]"]);
    let start = |controls: &[Control]| {
        let mut vm = Vm::fresh(code);
        let set = vm.set_or_skip("XSAVES with its enable", controls);
        vmwrite(f::GUEST_CR4, cpu::cr4() | cpu::CR4_OSXSAVE);
        vm.regs = Regs { rdi: state, rax: 3, ..vm.regs };
        set.then_some(vm)
    };
    if let Some(mut vm) = start(&[]) {
        UD.run("XSAVES raises #UD without its enable", &mut vm);
    }
    if let Some(mut vm) = start(&[ENABLE_XSAVES]) {
        vmwrite(f::XSS_EXITING_BITMAP, !0);
        crate::want::to_end("XSAVES and XRSTORS run in L2 where IA32_XSS is 0", &mut vm);
    }
    let supervisor = u64::from(cpu::cpuid(0xd, 1).ecx) & !(1 << 63);
    let bit = supervisor & supervisor.wrapping_neg();
    let name = "XSAVES exits by the XSS-exiting bitmap";
    if bit == 0 {
        return rt::report::skip(name, "supervisor state component");
    }
    cpu::wrmsr(cpu::MSR_XSS, bit);
    if let Some(mut vm) = start(&[ENABLE_XSAVES]) {
        vmwrite(f::XSS_EXITING_BITMAP, bit);
        vm.regs.rax = bit;
        let information = 7 << 23 | 3 << 15 | 2 << 7 | 1 << 22;
        Want::instruction(reason::XSAVES, 4).information(information, BASE_FORM).run(name, &mut vm);
        vm.skip();
        let want = Want::instruction(reason::XRSTORS, 4).information(information, BASE_FORM);
        want.at(4).run("XRSTORS exits by the XSS-exiting bitmap", &mut vm);
    }
    cpu::wrmsr(cpu::MSR_XSS, 0);
}

fn vm_functions() {
    if !ENABLE_VMFUNC.available() {
        return rt::report::skip("VMFUNC", ENABLE_VMFUNC.name);
    }
    exits("VMFUNC raises #UD without its enable", &[], l2!([".byte 0x0f, 0x01, 0xd4"]), UD);
    let mut vm = Vm::fresh(l2!([".byte 0x0f, 0x01, 0xd4"]));
    vm.set(&[ENABLE_VMFUNC]);
    for function in [0, 1, 63] {
        vm.regs.rax = function;
        Want::instruction(reason::VMFUNC, 3).run("VMFUNC of a function that is off exits", &mut vm);
    }
    for function in [64, 0xffff_ffff] {
        vm.regs.rax = function;
        UD.run("VMFUNC of a function above 63 raises #UD", &mut vm);
    }
}

/// Puts a machine into ring 3, at code copied to the user window.
pub fn to_ring3(vm: &mut Vm, code: &[u8]) {
    use rt::vmx::vm::Segment;
    mem::copy(user::CODE, code);
    mem::copy(user::CODE + code.len() as u64, &[0x0f, 0x01, 0xc1]);
    vm.start_at(user::CODE);
    vmwrite(f::GUEST_RSP, user::STACK_TOP - 64);
    Segment::Cs.write(rt::tables::USER_CODE64, 0, 0xffff_ffff, 0xa0fb);
    for segment in [Segment::Ss, Segment::Ds, Segment::Es] {
        segment.write(rt::tables::USER_DATA, 0, 0xffff_ffff, 0xc0f3);
    }
}

/// In ring 3 the faults of privilege go before exits; CPUID and VMX instructions exit.
fn privilege() {
    let gp = Want::exit(reason::EXCEPTION_OR_NMI)
        .event_with_error(event::HARDWARE_EXCEPTION | u32::from(trap::GP), 0);
    let faulting: [(&str, &[Control], &[u8]); 6] = [
        ("ring 3: HLT raises #GP", &[HLT_EXITING], &[0xf4]),
        ("ring 3: INVLPG raises #GP", &[INVLPG_EXITING], &[0x0f, 0x01, 0x38]),
        ("ring 3: INVD raises #GP", &[], &[0x0f, 0x08]),
        ("ring 3: WBINVD raises #GP", &[WBINVD_EXITING], &[0x0f, 0x09]),
        ("ring 3: MOV from CR3 raises #GP", &[CR3_STORE_EXITING], &[0x0f, 0x20, 0xd8]),
        ("ring 3: RDMSR raises #GP", &[], &[0x0f, 0x32]),
    ];
    for (name, controls, code) in faulting {
        let mut vm = Vm::fresh(0);
        if vm.set_or_skip(name, controls) {
            to_ring3(&mut vm, code);
            gp.run(name, &mut vm);
        }
    }
    let mut vm = Vm::fresh(0);
    to_ring3(&mut vm, &[0x0f, 0xa2]);
    Want::instruction(reason::CPUID, 2).run("ring 3: CPUID exits", &mut vm);
    vm.skip();
    Want::instruction(reason::VMCALL, 3).at(2).run("ring 3: VMCALL exits", &mut vm);
    if vm.set(&[RDTSC_EXITING]) {
        to_ring3(&mut vm, &[0x0f, 0x31]);
        Want::instruction(reason::RDTSC, 2).run("ring 3: RDTSC exits", &mut vm);
        vmwrite(f::GUEST_CR4, cpu::cr4() | cpu::CR4_TSD);
        gp.run("ring 3: RDTSC with CR4.TSD raises #GP before it exits", &mut vm);
    }
    equal("ring 3: exits save CPL 3 in SS", rt::vmx::vmread(f::GUEST_SS_ACCESS) >> 5 & 3, 3);
}
