//! I/O and MSR accesses of L2: unconditional exits, bitmaps, string instructions.

use crate::simple_exits::to_ring3;
use crate::want::{Want, exits, runs, to_end};
use rt::cpu::{self, MSR_EFER, MSR_KERNEL_GS_BASE, MSR_STAR, MSR_SYSENTER_EIP};
use rt::mem::{self, PAGE};
use rt::report::equal;
use rt::vmx::control::*;
use rt::vmx::exit::event;
use rt::vmx::{Regs, Vm, capability, field as f, reason, vmread, vmwrite};
use rt::{check, l2, trap};

const IN: u64 = 1 << 3;
const STRING: u64 = 1 << 4;
const REP: u64 = 1 << 5;
const IMMEDIATE: u64 = 1 << 6;

/// A harmless port: the POST code.
const PORT: u64 = 0x80;

fn io(size: u64, flags: u64, port: u64) -> Want {
    Want::exit(reason::IO_INSTRUCTION).qualification(size - 1 | flags | port << 16)
}

pub fn all() {
    unconditional();
    bitmaps();
    strings();
    string_faults();
    msr_without_bitmaps();
    msr_bitmaps();
}

fn unconditional() {
    let all = [UNCONDITIONAL_IO_EXITING];
    exits("OUT imm8, AL exits", &all, l2!(["out 0x80, al"]), io(1, IMMEDIATE, PORT).length(2));
    exits("IN AX, imm8 exits", &all, l2!(["in ax, 0x80"]), io(2, IN | IMMEDIATE, PORT).length(3));
    let mut vm = Vm::fresh(l2!(["out dx, eax"]));
    if vm.set(&all) {
        vm.regs.rdx = 0xffff_1234;
        io(4, 0, 0x1234).length(1).run("OUT DX, EAX exits", &mut vm);
    }
    runs("OUT runs in L2", &[], &[UNCONDITIONAL_IO_EXITING, USE_IO_BITMAPS], l2!(["out 0x80, al"]));
    let mut vm = Vm::fresh(0);
    let name = "ring 3: #GP of IOPL and TSS goes before the exit";
    if vm.set_or_skip(name, &all) {
        to_ring3(&mut vm, &[0xe6, 0x80]);
        let event = event::HARDWARE_EXCEPTION | u32::from(trap::GP);
        Want::exit(reason::EXCEPTION_OR_NMI).event_with_error(event, 0).run(name, &mut vm);
        vmwrite(f::GUEST_RFLAGS, 2 | 3 << 12);
        io(1, IMMEDIATE, PORT).length(2).run("ring 3: with IOPL 3 OUT exits", &mut vm);
    }
}

/// A machine with I/O bitmaps in which only these ports exit.
fn with_bitmaps(code: u64, ports: &[u64]) -> Option<Vm> {
    let mut vm = Vm::fresh(code);
    if !vm.set_or_skip("I/O bitmaps", &[USE_IO_BITMAPS]) {
        return None;
    }
    // Unconditional exiting is ignored where there are bitmaps.
    vm.set(&[UNCONDITIONAL_IO_EXITING]);
    let bitmaps = mem::FREE + 16 * PAGE;
    mem::fill(bitmaps, 0, 2 * PAGE);
    for port in ports {
        let at = bitmaps + port / 8;
        mem::write(at, mem::read::<u8>(at) | 1 << (port % 8));
    }
    vmwrite(f::IO_BITMAP_A, bitmaps);
    vmwrite(f::IO_BITMAP_B, bitmaps + PAGE);
    Some(vm)
}

fn bitmaps() {
    let out8 = l2!(["out 0x80, al"]);
    let Some(mut vm) = with_bitmaps(out8, &[PORT]) else { return };
    io(1, IMMEDIATE, PORT).length(2).run("I/O bitmap: a set bit exits", &mut vm);
    if let Some(mut vm) = with_bitmaps(out8, &[PORT - 1, PORT + 1]) {
        to_end("I/O bitmap: a clear bit does not", &mut vm);
    }
    if let Some(mut vm) = with_bitmaps(l2!(["in eax, 0x80"]), &[PORT + 3]) {
        io(4, IN | IMMEDIATE, PORT).length(2).run("I/O bitmap: any byte of the access counts", &mut vm);
    }
    if let Some(mut vm) = with_bitmaps(l2!(["in ax, 0x80"]), &[PORT + 2]) {
        to_end("I/O bitmap: bytes beyond the access do not", &mut vm);
    }
    if let Some(mut vm) = with_bitmaps(l2!(["out dx, al"]), &[0x8123]) {
        vm.regs.rdx = 0x8123;
        io(1, 0, 0x8123).length(1).run("I/O bitmap B", &mut vm);
    }
    if let Some(mut vm) = with_bitmaps(l2!(["in eax, dx"]), &[]) {
        vm.regs.rdx = 0xfffe;
        io(4, IN, 0xfffe).length(1).run("I/O bitmap: an access that wraps around port 0xffff exits", &mut vm);
    }
    if let Some(mut vm) = with_bitmaps(l2!(["in ax, dx"]), &[0x8000]) {
        vm.regs.rdx = 0x7fff;
        io(2, IN, 0x7fff).length(2).run("I/O bitmap: an access across both bitmaps", &mut vm);
    }
}

fn strings() {
    let name = "OUTS exits with segment, address size and address";
    let outs = |code: u64| {
        let mut vm = Vm::fresh(code);
        vm.regs = Regs { rdx: PORT, rsi: mem::FREE + 0x30, rdi: mem::FREE + 0x50, rcx: 3, ..vm.regs };
        (vm.set(&[UNCONDITIONAL_IO_EXITING]), vm)
    };
    let (available, mut vm) = outs(l2!(["outsb"]));
    if !available {
        return rt::report::skip(name, UNCONDITIONAL_IO_EXITING.name);
    }
    // Where IA32_VMX_BASIC[54] says so, the information field holds address size and segment.
    let defined = if capability::basic(capability::BASIC_IO_INFORMATION) { 7 << 7 | 7 << 15 } else { 0 };
    let information = 2 << 7 | 3 << 15;
    let want = io(1, STRING, PORT).length(1).linear(mem::FREE + 0x30).information(information, defined);
    want.run(name, &mut vm);
    let (_, mut vm) = outs(l2!(["rep outsd"]));
    let want = io(4, STRING | REP, PORT).length(2).linear(mem::FREE + 0x30);
    want.information(information, defined).run("REP OUTS exits before its first element", &mut vm);
    equal("REP OUTS that exits leaves RCX", vm.regs.rcx, 3);
    equal("REP OUTS that exits leaves RSI", vm.regs.rsi, mem::FREE + 0x30);
    let (_, mut vm) = outs(l2!(["insb"]));
    let want = io(1, IN | STRING, PORT).length(1).linear(mem::FREE + 0x50);
    want.information(2 << 7, defined & 7 << 7).run("INS exits with its address", &mut vm);
    let (_, mut vm) = outs(l2!(["rep insw"]));
    let want = io(2, IN | STRING | REP, PORT).length(3).linear(mem::FREE + 0x50);
    want.information(2 << 7, defined & 7 << 7).run("REP INS exits before its first element", &mut vm);
    let (_, mut vm) = outs(l2!([".byte 0x64, 0x67, 0x6e"]));
    rt::vmx::vm::Segment::Fs.write(0x10, 0x1000, 0xffff_ffff, rt::vmx::vm::DATA_RIGHTS);
    vm.regs.rsi |= 5 << 32;
    let want = io(1, STRING, PORT).length(3).linear(mem::FREE + 0x1030);
    let information = 1 << 7 | 4 << 15;
    want.information(information, defined).run("OUTS with FS and a 32-bit address", &mut vm);
}

/// Only the ports of a string instruction are looked at before the exit; without exit it runs.
fn string_faults() {
    if let Some(mut vm) = with_bitmaps(l2!(["rep outsb"]), &[PORT + 1]) {
        vm.regs = Regs { rdx: PORT, rsi: mem::FREE, rcx: 5, ..vm.regs };
        to_end("REP OUTS runs in L2 where no bit is set", &mut vm);
        equal("REP OUTS runs to its end", vm.regs.rcx, 0);
    }
}

fn msr_without_bitmaps() {
    let mut vm = Vm::fresh(l2!(["rdmsr"]));
    vm.unset(&[USE_MSR_BITMAPS]);
    vm.regs.rcx = MSR_STAR.into();
    Want::instruction(reason::RDMSR, 2).run("RDMSR exits without bitmaps", &mut vm);
    vm.regs.rcx = 0x4000_0000;
    Want::instruction(reason::RDMSR, 2).run("RDMSR of no MSR exits without bitmaps", &mut vm);
    let mut vm = Vm::fresh(l2!(["wrmsr"]));
    vm.unset(&[USE_MSR_BITMAPS]);
    vm.regs.rcx = MSR_STAR.into();
    Want::instruction(reason::WRMSR, 2).run("WRMSR exits without bitmaps", &mut vm);
}

/// A machine with MSR bitmaps in which one bit differs from the rest.
fn with_msr_bitmap(code: u64, fill: u8, odd: Option<(u64, u32)>) -> Option<Vm> {
    let mut vm = Vm::fresh(code);
    if !vm.set_or_skip("MSR bitmaps", &[USE_MSR_BITMAPS]) {
        return None;
    }
    let bitmap = mem::FREE + 20 * PAGE;
    mem::fill(bitmap, fill, PAGE);
    if let Some((quarter, msr)) = odd {
        let at = bitmap + quarter * 0x400 + u64::from(msr & 0x1fff) / 8;
        mem::write(at, mem::read::<u8>(at) ^ 1 << (msr % 8));
    }
    vmwrite(f::MSR_BITMAP, bitmap);
    Some(vm)
}

const READ_LOW: u64 = 0;
const READ_HIGH: u64 = 1;
const WRITE_LOW: u64 = 2;
const WRITE_HIGH: u64 = 3;

fn msr_bitmaps() {
    let (read, write) = (l2!(["rdmsr"]), l2!(["wrmsr"]));
    let cases = [
        ("MSR bitmap: read of a low MSR", read, READ_LOW, MSR_SYSENTER_EIP, reason::RDMSR),
        ("MSR bitmap: read of a high MSR", read, READ_HIGH, MSR_STAR, reason::RDMSR),
        ("MSR bitmap: write of a low MSR", write, WRITE_LOW, MSR_SYSENTER_EIP, reason::WRMSR),
        ("MSR bitmap: write of a high MSR", write, WRITE_HIGH, MSR_KERNEL_GS_BASE, reason::WRMSR),
    ];
    for (name, code, quarter, msr, why) in cases {
        let Some(mut vm) = with_msr_bitmap(code, 0, Some((quarter, msr))) else { return };
        vm.regs.rcx = msr.into();
        Want::instruction(why, 2).run(name, &mut vm);
        let Some(mut vm) = with_msr_bitmap(code, 0xff, Some((quarter, msr))) else { return };
        vm.regs.rcx = msr.into();
        to_end(name, &mut vm);
    }
    for msr in [0x2000, 0x8000_0000u32, 0xbfff_ffff, 0xc000_2000, 0xffff_ffff] {
        let Some(mut vm) = with_msr_bitmap(read, 0, None) else { return };
        vm.regs.rcx = msr.into();
        Want::instruction(reason::RDMSR, 2).run("MSR bitmap: an MSR outside both ranges exits", &mut vm);
    }
    cpu::wrmsr(MSR_KERNEL_GS_BASE, 0);
    let Some(mut vm) = with_msr_bitmap(l2!(["wrmsr", "swapgs", "mov ecx, 0xc0000101", "rdmsr"]), 0, None)
    else {
        return;
    };
    vm.regs = Regs { rcx: MSR_KERNEL_GS_BASE.into(), rax: 0x5678, rdx: 0x1234, ..vm.regs };
    to_end("WRMSR, SWAPGS and RDMSR run in L2", &mut vm);
    equal("L2's GS base is what it wrote", vm.regs.rdx << 32 | vm.regs.rax & 0xffff_ffff, 0x1234_0000_5678);
    equal("exit saves GS base", vmread(f::GUEST_GS_BASE), 0x1234_0000_5678);
    equal("exit loads GS base again", cpu::rdmsr(cpu::MSR_GS_BASE), 0);
    guest_msrs();
}

/// MSRs that the guest-state area holds.
fn guest_msrs() {
    let code = l2!([
        "mov ecx, 0x176",
        "rdmsr",
        "mov esi, eax",
        "mov eax, 0x4321",
        "wrmsr",
        "mov ecx, 0xc0000080",
        "rdmsr"
    ]);
    let Some(mut vm) = with_msr_bitmap(code, 0, None) else { return };
    vmwrite(f::GUEST_SYSENTER_EIP, 0x77_1000);
    to_end("SYSENTER MSRs and EFER in L2", &mut vm);
    equal("entry loads IA32_SYSENTER_EIP", vm.regs.rsi, 0x77_1000);
    equal("exit saves IA32_SYSENTER_EIP", vmread(f::GUEST_SYSENTER_EIP) & 0xffff_ffff, 0x4321);
    equal("exit loads IA32_SYSENTER_EIP", cpu::rdmsr(MSR_SYSENTER_EIP), 0);
    let efer = cpu::rdmsr(MSR_EFER);
    check!("L2 has EFER.LMA", vm.regs.rax as u32 == efer as u32, "{:#x}, L1's {efer:#x}", vm.regs.rax);
    efer_on_entry();
    ring3_goes_first();
}

fn efer_on_entry() {
    let name = "entry loads IA32_EFER";
    let code = l2!(["mov ecx, 0xc0000080", "rdmsr", "mov esi, eax", "and eax, 0xfffffffe", "wrmsr"]);
    let Some(mut vm) = with_msr_bitmap(code, 0, None) else { return };
    if !vm.set_or_skip(name, &[ENTRY_LOAD_EFER, SAVE_EFER, EXIT_LOAD_EFER]) {
        return;
    }
    let efer = cpu::rdmsr(MSR_EFER);
    vmwrite(f::GUEST_EFER, efer | 1);
    to_end(name, &mut vm);
    equal("L2 reads the EFER of its VMCS", vm.regs.rsi, efer | 1);
    equal("exit saves IA32_EFER", vmread(f::GUEST_EFER), efer);
    equal("exit loads IA32_EFER", cpu::rdmsr(MSR_EFER), efer);
}

fn ring3_goes_first() {
    let Some(mut vm) = with_msr_bitmap(0, 0xff, None) else { return };
    to_ring3(&mut vm, &[0x0f, 0x32]);
    let event = event::HARDWARE_EXCEPTION | u32::from(trap::GP);
    let want = Want::exit(reason::EXCEPTION_OR_NMI).event_with_error(event, 0);
    want.run("ring 3: #GP of RDMSR goes before the exit", &mut vm);
}
