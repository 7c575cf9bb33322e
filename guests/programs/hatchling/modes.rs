//! L2 in other modes than 64-bit: 32-bit with and without PAE, virtual-8086, and, unrestricted, real mode and every step
//! from there to long mode.

use crate::ept_faults::shared_ept;
use crate::interrupts::handled;
use crate::want::{Want, to_end};
use rt::cpu::{self, CR0_NE, CR4_PAE, CR4_PSE};
use rt::mem::{self, PAGE};
use rt::report::{equal, skip};
use rt::tables::{CODE32, Shared};
use rt::vmx::capability as cap;
use rt::vmx::control::*;
use rt::vmx::exit::event;
use rt::vmx::vm::{CODE32_RIGHTS, CODE64_RIGHTS, Segment};
use rt::vmx::{CR4_VMXE, Vm, field as f, handler, reason, vmread, vmwrite};
use rt::{check, l2, trap};

/// Where 16-bit code goes, as segment 0x1000.
const LOW: u64 = 0x1_0000;
const LOW_STACK: u64 = 0x2_0000;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const MSR_BITMAP: u64 = mem::FREE + 0x78_0000;

pub fn all() {
    protected();
    page_faults32();
    pae();
    pae_with_ept();
    compatibility();
    virtual_mode();
    if !UNRESTRICTED_GUEST.available() {
        return skip("real-mode L2", UNRESTRICTED_GUEST.name);
    }
    real();
    real_interrupts();
    flat_without_paging();
    to_long_mode();
}

#[repr(C, align(4096))]
struct Directory([u32; 1024]);
static DIRECTORY: Shared<Directory> = Shared::new(Directory([0; 1024]));

/// A page directory that maps all 4 GiB to themselves by 4 MiB pages.
pub fn tables32() -> u64 {
    for i in 0..1024u32 {
        mem::write(DIRECTORY.address() + u64::from(i) * 4, i << 22 | 0xe7);
    }
    DIRECTORY.address()
}

/// Makes the current VMCS one of 32-bit L2 in ring 0, with paging and without PAE.
pub fn protected_mode() {
    let entry = vmread(f::ENTRY_CONTROLS) & !u64::from(IA32E_MODE_GUEST.mask);
    vmwrite(f::ENTRY_CONTROLS, entry);
    vmwrite(f::GUEST_CR4, vmread(f::GUEST_CR4) & !CR4_PAE | CR4_PSE);
    vmwrite(f::GUEST_EFER, vmread(f::GUEST_EFER) & !(EFER_LME | EFER_LMA));
    vmwrite(f::GUEST_CR3, tables32());
    Segment::Cs.write(CODE32, 0, 0xffff_ffff, CODE32_RIGHTS);
}

/// The same in virtual-8086 mode, at the 16-bit code.
pub fn virtual_8086() {
    protected_mode();
    for segment in [Segment::Es, Segment::Cs, Segment::Ss, Segment::Ds, Segment::Fs, Segment::Gs] {
        let selector = if segment == Segment::Cs { LOW >> 4 } else { LOW_STACK >> 4 };
        segment.write(selector as u16, selector << 4, 0xffff, 0xf3);
    }
    vmwrite(f::GUEST_RIP, 0);
    vmwrite(f::GUEST_RSP, 0x1000);
    vmwrite(f::GUEST_RFLAGS, 2 | 1 << 17 | 3 << 12);
    mem::copy(LOW, &[0x0f, 0x01, 0xc1]);
}

/// Real mode at the 16-bit code. Needs "unrestricted guest".
pub fn real_mode() {
    virtual_8086();
    vmwrite(f::EPT_POINTER, shared_ept().pointer());
    for segment in [Segment::Es, Segment::Cs, Segment::Ss, Segment::Ds, Segment::Fs, Segment::Gs] {
        vmwrite(segment.rights_field(), if segment == Segment::Cs { 0x9b } else { 0x93 });
    }
    vmwrite(f::GUEST_RFLAGS, 2);
    vmwrite(f::GUEST_CR0, CR0_NE | 0x10);
    vmwrite(f::GUEST_CR4, CR4_VMXE);
    vmwrite(f::GUEST_IDTR_BASE, 0);
    vmwrite(f::GUEST_IDTR_LIMIT, 0x3ff);
}

fn protected() {
    let mut vm = Vm::fresh(l2!([
        ".code32",
        "push eax",
        "inc ebx",
        "mov ecx, [esp]",
        "cpuid",
        "pushfd",
        "popad",
        ".code64"
    ]));
    protected_mode();
    vm.regs.rax = 0x1_2345_6789;
    vm.regs.rbx = 0xffff_ffff;
    let exit = Want::instruction(reason::CPUID, 2).at(5).run("32-bit L2: CPUID exits", &mut vm);
    equal("32-bit L2: INC EBX wraps", vm.regs.rbx as u32, 0);
    equal("32-bit L2: its stack", vm.regs.rcx as u32, 0x2345_6789);
    equal("32-bit L2: ESP", exit.rsp, rt::vmx::vm::stack_top() - 4);
    equal(
        "L1 is in 64-bit mode again",
        cpu::rdmsr(cpu::MSR_EFER) & (EFER_LME | EFER_LMA),
        EFER_LME | EFER_LMA,
    );
    let mut vm = Vm::fresh(l2!([".code32", "mov ecx, 0xc0000080", "rdmsr", ".code64"]));
    let name = "32-bit L2: EFER has neither LME nor LMA";
    if vm.set_or_skip(name, &[USE_MSR_BITMAPS]) {
        mem::fill(MSR_BITMAP, 0, PAGE);
        vmwrite(f::MSR_BITMAP, MSR_BITMAP);
        protected_mode();
        to_end(name, &mut vm);
        equal(name, vm.regs.rax & (EFER_LME | EFER_LMA), 0);
    }
    let mut vm = Vm::fresh(l2!([".code32", ".byte 0x48", ".byte 0x0f, 0xa2", ".code64"]));
    protected_mode();
    vm.regs.rax = 5;
    Want::instruction(reason::CPUID, 2).at(1).run("32-bit L2: 0x48 is DEC EAX", &mut vm);
    equal("32-bit L2: EAX", vm.regs.rax as u32, 4);
}

fn page_faults32() {
    let mut vm = Vm::fresh(l2!([".code32", "mov [ebx], eax", ".code64"]));
    protected_mode();
    mem::write(DIRECTORY.address() + 0x300 * 4, 0u32);
    vm.regs.rbx = 0xc000_0123;
    let event = event::HARDWARE_EXCEPTION | u32::from(trap::PF);
    let want = Want::exit(reason::EXCEPTION_OR_NMI).event_with_error(event, 2).qualification(0xc000_0123);
    want.run("32-bit L2: page fault", &mut vm);
}

/// Four page directories of 2 MiB pages, and the pointers to them.
fn pae_tables() -> u64 {
    use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
    static ROOT: AtomicU64 = AtomicU64::new(0);
    if ROOT.load(Relaxed) == 0 {
        let root = mem::frames(5);
        for i in 0..4 {
            mem::write(root + i * 8, (root + (i + 1) * PAGE) | 1);
        }
        for i in 0..2048 {
            mem::write(root + PAGE + i * 8, i << 21 | 0xe7);
        }
        ROOT.store(root, Relaxed);
    }
    ROOT.load(Relaxed)
}

fn pae_mode() {
    protected_mode();
    vmwrite(f::GUEST_CR4, vmread(f::GUEST_CR4) | CR4_PAE);
    vmwrite(f::GUEST_CR3, pae_tables());
}

fn pae() {
    let code = l2!([".code32", "mov eax, [ebx]", "mov ecx, cr3", "mov cr3, ecx", ".code64"]);
    let mut vm = Vm::fresh(code);
    if !vm.unset(&[CR3_LOAD_EXITING, CR3_STORE_EXITING]) {
        return skip("PAE L2", "CR3 without exits");
    }
    pae_mode();
    mem::write(mem::FREE + 0x10, 0x1357_9bdfu32);
    vm.regs.rbx = mem::FREE + 0x10;
    to_end("PAE L2 runs", &mut vm);
    equal("PAE L2 reads memory", vm.regs.rax as u32, 0x1357_9bdf);
    // Reserved bits of the entries at CR3: bits 2:1, 8:5 and those beyond the physical-address width.
    for bits in [1u64 << 1, 1 << 2, 1 << 5, 1 << 8, 1 << cpu::physical_bits()] {
        let root = pae_tables();
        for index in [0u64, 3] {
            let good: u64 = mem::read(root + index * 8);
            let mut vm = Vm::fresh(code);
            pae_mode();
            mem::write(root + index * 8, good | bits);
            let exit = vm.run();
            mem::write(root + index * 8, good);
            let wanted = reason::ENTRY_FAILURE | reason::ENTRY_FAILURE_GUEST_STATE;
            check!(
                "GuestPdpte",
                exit.reason == wanted && exit.qualification == 2,
                "entry {index}, {bits:#x}: {exit}"
            );
        }
    }
    let root = pae_tables();
    let good: u64 = mem::read(root + 24);
    mem::write(root + 24, !1u64);
    let mut vm = Vm::fresh(code);
    if !vm.unset(&[CR3_LOAD_EXITING, CR3_STORE_EXITING]) {
        return skip("PAE L2", "CR3 without exits");
    }
    pae_mode();
    vm.regs.rbx = mem::FREE;
    to_end("PAE L2: an entry that is not present may have any bits", &mut vm);
    mem::write(root + 24, good);
}

/// With EPT the pointers come from the VMCS, and MOV to CR3 loads them from memory.
fn pae_with_ept() {
    let name = "PAE L2 with EPT: page-directory pointers come from the VMCS";
    let code = l2!([
        ".code32",
        "mov eax, [ebx]",
        "cpuid",
        "mov ecx, cr3",
        "mov cr3, ecx",
        "mov eax, [ebx]",
        ".code64"
    ]);
    let start = || {
        let mut vm = Vm::fresh(code);
        if !vm.set_or_skip(name, &[ENABLE_EPT]) {
            return None;
        }
        if !vm.unset(&[CR3_LOAD_EXITING, CR3_STORE_EXITING]) {
            return None;
        }
        pae_mode();
        vmwrite(f::EPT_POINTER, shared_ept().pointer());
        for i in 0..4u32 {
            vmwrite(f::GUEST_PDPTE0 + 2 * i, mem::read(pae_tables() + u64::from(i) * 8));
        }
        vm.regs.rbx = 0x4000_0010 + mem::FREE;
        Some(vm)
    };
    let Some(mut vm) = start() else { return };
    // The second GiB shows the first, until CR3 is loaded.
    vmwrite(f::GUEST_PDPTE1, vmread(f::GUEST_PDPTE0));
    mem::write(mem::FREE + 0x10, 0x1111_2222u32);
    let root = pae_tables();
    let second: u64 = mem::read(root + 8);
    Want::instruction(reason::CPUID, 2).at(2).run(name, &mut vm);
    equal(name, vm.regs.rax as u32, 0x1111_2222);
    let third = mem::frame();
    mem::write(third + (mem::FREE >> 21) * 8, mem::FREE + 0x20_0000 | 0xe7);
    mem::write(mem::FREE + 0x20_0010, 0x3333_4444u32);
    mem::write(root + 8, third | 1);
    vm.skip();
    to_end("PAE L2 with EPT: MOV to CR3", &mut vm);
    equal("PAE L2 with EPT: MOV to CR3 loads the pointers", vm.regs.rax as u32, 0x3333_4444);
    equal("PAE L2 with EPT: exit saves the pointers", vmread(f::GUEST_PDPTE1), third | 1);
    mem::write(root + 8, second);
    for bits in [1u64 << 1, 1 << 8, 1 << cpu::physical_bits()] {
        let Some(mut vm) = start() else { return };
        vmwrite(f::GUEST_PDPTE2, vmread(f::GUEST_PDPTE2) | bits);
        let exit = vm.run();
        let wanted = reason::ENTRY_FAILURE | reason::ENTRY_FAILURE_GUEST_STATE;
        check!("GuestPdpte", exit.reason == wanted && exit.qualification == 2, "with EPT, {bits:#x}: {exit}");
    }
}

fn compatibility() {
    let mut vm = Vm::fresh(l2!([".code32", "inc eax", "push eax", "cpuid", ".code64"]));
    Segment::Cs.write(CODE32, 0, 0xffff_ffff, CODE32_RIGHTS);
    vm.regs.rax = 0xffff_ffff;
    let exit = Want::instruction(reason::CPUID, 2).at(2).run("compatibility-mode L2: CPUID exits", &mut vm);
    equal("compatibility-mode L2: INC EAX", vm.regs.rax, 0);
    equal("compatibility-mode L2: PUSH takes four bytes", exit.rsp, rt::vmx::vm::stack_top() - 4);
}

fn virtual_mode() {
    let start = |code: &[u8]| {
        let mut vm = Vm::fresh(0);
        virtual_8086();
        mem::copy(LOW, code);
        vm.start = 0;
        vm
    };
    // mov ax, 0x1234; mov ds, ax; mov [2], ax; cpuid
    let mut vm = start(&[0xb8, 0x34, 0x12, 0x8e, 0xd8, 0xa3, 2, 0, 0x0f, 0xa2]);
    Want::instruction(reason::CPUID, 2).at(8).run("virtual-8086 L2: CPUID exits", &mut vm);
    equal("virtual-8086 L2: DS base is its selector shifted", vmread(f::GUEST_DS_BASE), 0x1_2340);
    equal("virtual-8086 L2: its store", mem::read::<u16>(0x1_2342), 0x1234);
    let event = event::HARDWARE_EXCEPTION | u32::from(trap::GP);
    let gp = Want::exit(reason::EXCEPTION_OR_NMI).event_with_error(event, 0);
    gp.run("virtual-8086 L2: HLT raises #GP", &mut start(&[0xf4]));
    let mut vm = start(&[0xfa]);
    vmwrite(f::GUEST_RFLAGS, 2 | 1 << 17);
    gp.run("virtual-8086 L2: CLI with IOPL 0 raises #GP", &mut vm);
    Want::instruction(reason::VMCALL, 3)
        .run("virtual-8086 L2: VMCALL exits", &mut start(&[0x0f, 0x01, 0xc1]));
}

/// A real-mode machine with this code.
fn real_machine(name: &str, code: &[u8]) -> Option<Vm> {
    let mut vm = Vm::fresh(0);
    if !vm.set_or_skip(name, &[ENABLE_EPT, UNRESTRICTED_GUEST]) {
        return None;
    }
    real_mode();
    mem::copy(LOW, code);
    vm.start = 0;
    Some(vm)
}

fn real() {
    let name = "real-mode L2: CPUID exits";
    // mov ax, 0x3456; mov ds, ax; mov [2], ax; jmp 0x1000:0x0010
    let code =
        [0xb8, 0x56, 0x34, 0x8e, 0xd8, 0xa3, 2, 0, 0xea, 0x10, 0, 0, 0x10, 0x90, 0x90, 0x90, 0x0f, 0xa2];
    let Some(mut vm) = real_machine(name, &code) else { return };
    Want::instruction(reason::CPUID, 2).at(16).run(name, &mut vm);
    equal("real-mode L2: DS base", vmread(f::GUEST_DS_BASE), 0x3_4560);
    equal("real-mode L2: its store", mem::read::<u16>(0x3_4562), 0x3456);
    equal("real-mode L2: CS", vmread(f::GUEST_CS), 0x1000);
    equal("real-mode L2: CR0.PE is clear", vmread(f::GUEST_CR0) & 1, 0);
    // A segment beyond 64 KiB: unrestricted real mode keeps the limit.
    let Some(mut vm) = real_machine(name, &[0x0f, 0xa2]) else { return };
    Segment::Cs.write(0xf000, LOW, 0xffff, 0x93);
    Want::instruction(reason::CPUID, 2).run("real-mode L2: CS may be a data segment", &mut vm);
    let Some(mut vm) = real_machine(name, &[0x67, 0x66, 0xa1, 0, 0, 2, 0]) else { return };
    let event = event::HARDWARE_EXCEPTION | u32::from(trap::GP);
    // In real mode no error code is pushed, and none is in the exit.
    let want = Want::exit(reason::EXCEPTION_OR_NMI).event(event);
    want.run("real-mode L2: #GP of the limit exits without error code", &mut vm);
    let Some(mut vm) = real_machine(name, &[0x67, 0x66, 0xa1, 0, 0, 2, 0, 0x0f, 0xa2]) else { return };
    Segment::Ds.write(0, 0, 0xffff_ffff, 0x8093);
    mem::write(0x2_0000, 0x1234_5678u32);
    Want::instruction(reason::CPUID, 2).at(7).run("real-mode L2: a large limit of DS holds", &mut vm);
    equal("real-mode L2: it reads behind 64 KiB", vm.regs.rax as u32, 0x1234_5678);
}

/// The interrupt vector table at 0.
fn real_interrupts() {
    let name = "real-mode L2: INT goes through the vector table";
    let Some(mut vm) = real_machine(name, &[0xcd, 0x21]) else { return };
    mem::write(0x21 * 4, [0x40u16, 0x1000]);
    mem::copy(LOW + 0x40, &[0x0f, 0x01, 0xc1]);
    let exit = Want::instruction(reason::VMCALL, 3).at(0x40).run(name, &mut vm);
    equal("real-mode L2: IP on the stack", mem::read::<u16>(LOW_STACK + exit.rsp), 2);
    equal("real-mode L2: CS on the stack", mem::read::<u16>(LOW_STACK + exit.rsp + 2), 0x1000);
    let name = "real-mode L2: an injected interrupt goes through the vector table";
    let Some(mut vm) = real_machine(name, &[0x90]) else { return };
    vmwrite(f::GUEST_RFLAGS, 2 | 1 << 9);
    vmwrite(f::ENTRY_INTERRUPTION, u64::from(event::VALID | event::EXTERNAL_INTERRUPT | 0x21));
    let exit = Want::instruction(reason::VMCALL, 3).at(0x40).run(name, &mut vm);
    equal("real-mode L2: IF is clear in the handler", exit.rflags & 1 << 9, 0);
    equal("real-mode L2: FLAGS on the stack", mem::read::<u16>(LOW_STACK + exit.rsp + 4), 0x202);
    let Some(mut vm) = real_machine(name, &[0x90]) else { return };
    let gp = event::VALID | event::HARDWARE_EXCEPTION | event::ERROR_CODE | u32::from(trap::GP);
    vmwrite(f::ENTRY_INTERRUPTION, gp.into());
    let refused = vm.enter().map(drop) == Err(rt::vmx::Failure::Valid(7));
    check!("InjectionErrorCodeUnexpected", refused, "an error code with CR0.PE clear is taken");
}

/// Protected mode without paging, which only an unrestricted guest has.
fn flat_without_paging() {
    let name = "L2 without paging";
    let mut vm = Vm::fresh(l2!([".code32", "mov eax, [ebx]", "cpuid", ".code64"]));
    if !vm.set_or_skip(name, &[ENABLE_EPT, UNRESTRICTED_GUEST]) {
        return;
    }
    protected_mode();
    vmwrite(f::EPT_POINTER, shared_ept().pointer());
    vmwrite(f::GUEST_CR0, cpu::cr0() & !(1 << 31));
    mem::write(mem::FREE + 0x18, 0x1122_3344u32);
    vm.regs.rbx = mem::FREE + 0x18;
    Want::instruction(reason::CPUID, 2).at(2).run(name, &mut vm);
    equal("L2 without paging reads memory", vm.regs.rax as u32, 0x1122_3344);
}

/// L2 switches long mode on by itself.
fn to_long_mode() {
    let name = "L2 switches long mode on";
    let code = l2!([
        ".code32",
        "mov eax, cr4",
        "or eax, 0x20",
        "mov cr4, eax",
        "mov cr3, ebx",
        "mov ecx, 0xc0000080",
        "rdmsr",
        "or eax, 0x100",
        "wrmsr",
        "mov eax, cr0",
        "or eax, 0x80000000",
        "mov cr0, eax",
        "vmcall",
        "push 8",
        "push esi",
        "retf",
        ".code64"
    ]);
    let target = l2!(["mov rax, 0x123456789abc", "mov r9, rax", "ud2"]);
    let mut vm = Vm::fresh(code);
    if !vm.set_or_skip(name, &[ENABLE_EPT, UNRESTRICTED_GUEST, USE_MSR_BITMAPS]) {
        return;
    }
    if !vm.unset(&[CR3_LOAD_EXITING, CR3_STORE_EXITING]) {
        return skip(name, "CR3 without exits");
    }
    protected_mode();
    mem::fill(MSR_BITMAP, 0, PAGE);
    vmwrite(f::MSR_BITMAP, MSR_BITMAP);
    vmwrite(f::EPT_POINTER, shared_ept().pointer());
    vmwrite(f::GUEST_CR0, cpu::cr0() & !(1 << 31));
    vmwrite(f::GUEST_CR3, 0);
    vm.set(&[SAVE_EFER]);
    vm.regs.rbx = cpu::cr3();
    vm.regs.rsi = target;
    to_end("L2 switches paging on", &mut vm);
    let ia32e = u64::from(IA32E_MODE_GUEST.mask);
    if cap::misc(cap::MISC_STORES_LMA) {
        equal("exit stores EFER.LMA as \"IA-32e mode guest\"", vmread(f::ENTRY_CONTROLS) & ia32e, ia32e);
    } else {
        vmwrite(f::ENTRY_CONTROLS, vmread(f::ENTRY_CONTROLS) | ia32e);
    }
    if SAVE_EFER.available() {
        equal("exit saves EFER.LMA", vmread(f::GUEST_EFER) & (EFER_LME | EFER_LMA), EFER_LME | EFER_LMA);
    }
    vm.skip();
    let event = event::HARDWARE_EXCEPTION | u32::from(trap::UD);
    Want::exit(reason::EXCEPTION_OR_NMI).event(event).anywhere().run(name, &mut vm);
    equal("L2 is in 64-bit mode", vm.regs.r9, 0x1234_5678_9abc);
    equal("L2 has a 64-bit code segment", vmread(f::GUEST_CS_ACCESS), CODE64_RIGHTS);
    // And an event reaches it there.
    handler::install();
    vm.start = vmread(f::GUEST_RIP);
    let exit = vm.run();
    handled("an exception in L2's own long mode", &vm, &exit, trap::UD, 0);
}
