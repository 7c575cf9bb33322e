//! The first launch: CPUID in 64-bit L2 with as few controls as there are, and what goes in and out with it.

use crate::want::Want;
use rt::mem;
use rt::report::equal;
use rt::tables;
use rt::vmx::{Regs, Vm, control, field as f, reason, vmread, vmwrite};
use rt::{check, cpu, l2, vmx};

pub fn all() {
    let region = vmx::region();
    cpuid(region);
    registers(region);
    host_state(region);
    guest_state(region);
}

fn cpuid(region: u64) {
    let mut vm = Vm::new(region, l2!(["mov eax, 7", "cpuid", "cpuid", "nop"]));
    Want::instruction(reason::CPUID, 2).at(5).run("CPUID exits", &mut vm);
    equal("L2's RAX at the exit", vm.regs.rax, 7);
    vm.regs.rax = 0x1234;
    vm.skip();
    Want::instruction(reason::CPUID, 2).at(7).run("CPUID exits after VMRESUME", &mut vm);
    equal("L1's answer is in L2's RAX", vm.regs.rax, 0x1234);
    Want::instruction(reason::CPUID, 2).at(7).run("CPUID exits again if RIP stays", &mut vm);
    vm.skip();
    Want::instruction(reason::VMCALL, 3).at(10).run("VMCALL exits", &mut vm);
    equal("exits leave RFLAGS", vmread(f::GUEST_RFLAGS), 2);
}

/// All general-purpose registers come and go.
fn registers(region: u64) {
    let mut vm = Vm::new(
        region,
        l2!([
            "inc rax", "inc rcx", "inc rdx", "inc rbx", "inc rbp", "inc rsi", "inc rdi", "inc r8", "inc r9",
            "inc r10", "inc r11", "inc r12", "inc r13", "inc r14", "inc r15", "push rax", "stc"
        ]),
    );
    let values = |n: u64| Regs {
        rax: n,
        rcx: n + 0x100,
        rdx: n + 0x200,
        rbx: n + 0x300,
        unused: 0,
        rbp: n + 0x500,
        rsi: n + 0x600,
        rdi: n + 0x700,
        r8: n + 0x800,
        r9: n + 0x900,
        r10: n + 0xa00,
        r11: n + 0xb00,
        r12: n + 0xc00,
        r13: n + 0xd00,
        r14: n + 0xe00,
        r15: n + 0xf00,
    };
    vm.regs = values(0x1_0000_0000_0000);
    let exit =
        Want::instruction(reason::VMCALL, 3).anywhere().run("registers: L2 runs to its VMCALL", &mut vm);
    let wanted = values(0x1_0000_0000_0001);
    check!("registers pass through entry and exit", vm.regs == wanted, "RAX {:#x}", vm.regs.rax);
    equal("RSP is L2's", exit.rsp, vmx::vm::stack_top() - 8);
    equal("L2's stack holds what it pushed", mem::read(exit.rsp), vm.regs.rax);
    equal("RFLAGS are L2's", exit.rflags, 3);
}

/// L1 finds itself as the host-state area says ("Loading Host State").
fn host_state(region: u64) {
    let mut vm = Vm::new(region, l2!(["mov rax, 0xdead", "mov cr2, rax"]));
    vmwrite(f::HOST_FS_BASE, 0x1234_5678_9abc);
    vmwrite(f::HOST_GS_BASE, 0xffff_8000_0000_0000);
    let (sysenter_esp, sysenter_eip) = (0x7fff_0000_1000, 0xffff_f000_0000_0000);
    vmwrite(f::HOST_SYSENTER_CS, 0x55);
    vmwrite(f::HOST_SYSENTER_ESP, sysenter_esp);
    vmwrite(f::HOST_SYSENTER_EIP, sysenter_eip);
    // Where L2 is different from L1.
    vmwrite(f::GUEST_DR7, 0x401);
    vmwrite(f::GUEST_FS_BASE, 0x777);
    vmwrite(f::GUEST_SYSENTER_CS, 0x66);
    let (gdtr, idtr) = (vmread(f::HOST_GDTR_BASE), vmread(f::HOST_IDTR_BASE));
    Want::instruction(reason::VMCALL, 3).anywhere().run("host state: L2 runs to its VMCALL", &mut vm);
    let found = (cpu::rdmsr(cpu::MSR_FS_BASE), cpu::rdmsr(cpu::MSR_GS_BASE));
    let (descriptors, flags, dr7) = (descriptor_tables(), cpu::rflags(), cpu::dr7());
    equal("exit loads FS base", found.0, 0x1234_5678_9abc);
    equal("exit loads GS base", found.1, 0xffff_8000_0000_0000);
    equal("exit loads GDTR base", descriptors.0.base, gdtr);
    equal("exit sets GDTR limit to 0xffff", descriptors.0.limit, 0xffff);
    equal("exit loads IDTR base", descriptors.1.base, idtr);
    equal("exit sets IDTR limit to 0xffff", descriptors.1.limit, 0xffff);
    equal("exit clears RFLAGS", flags & !0x8d5, 2);
    equal("exit sets DR7 to 0x400", dr7, 0x400);
    equal("exit leaves CR2", cpu::cr2(), 0xdead);
    equal("exit loads IA32_SYSENTER_CS", cpu::rdmsr(cpu::MSR_SYSENTER_CS), 0x55);
    equal("exit loads IA32_SYSENTER_ESP", cpu::rdmsr(cpu::MSR_SYSENTER_ESP), sysenter_esp);
    equal("exit loads IA32_SYSENTER_EIP", cpu::rdmsr(cpu::MSR_SYSENTER_EIP), sysenter_eip);
    equal("exit saves IA32_SYSENTER_CS", vmread(f::GUEST_SYSENTER_CS), 0x66);
    equal("exit saves FS base", vmread(f::GUEST_FS_BASE), 0x777);
    for msr in [
        cpu::MSR_FS_BASE,
        cpu::MSR_GS_BASE,
        cpu::MSR_SYSENTER_CS,
        cpu::MSR_SYSENTER_ESP,
        cpu::MSR_SYSENTER_EIP,
    ] {
        cpu::wrmsr(msr, 0);
    }
    segments_after_exit();
}

fn segments_after_exit() {
    let (cs, ss, tr, ldtr): (u16, u16, u16, u16);
    // SAFETY: reads selectors.
    unsafe {
        core::arch::asm!("mov {0:x}, cs", "mov {1:x}, ss", "str {2:x}", "sldt {3:x}", out(reg) cs, out(reg) ss, out(reg) tr, out(reg) ldtr);
    }
    check!(
        "exit loads the selectors",
        (cs, ss, tr, ldtr) == (tables::CODE64, tables::DATA, tables::TSS, 0),
        "CS {cs:x} SS {ss:x} TR {tr:x} LDTR {ldtr:x}"
    );
}

fn descriptor_tables() -> (tables::TablePointer, tables::TablePointer) {
    let mut gdtr = tables::TablePointer { limit: 0, base: 0 };
    let mut idtr = tables::TablePointer { limit: 0, base: 0 };
    // SAFETY: stores ten bytes each on the stack.
    unsafe { core::arch::asm!("sgdt [{}]", "sidt [{}]", in(reg) &mut gdtr, in(reg) &mut idtr) };
    (gdtr, idtr)
}

/// L2 finds itself as the guest-state area says, and exits save what it changed.
fn guest_state(region: u64) {
    let mut vm = Vm::new(
        region,
        l2!([
            "pushfq",
            "pop rax",
            "mov rbx, dr7",
            "mov rcx, cr0",
            "mov rsi, cr4",
            "mov edi, ds",
            "sub rsp, 16",
            "sgdt [rsp]",
            "mov r8, [rsp + 2]",
            "sidt [rsp]",
            "mov r9, [rsp + 2]",
            "str r10",
            "sldt r11",
            "mov r12, fs:[0]",
            "mov r13, rsp",
            "mov eax, 0x755",
            "mov dr7, rax"
        ]),
    );
    let word = mem::FREE + 0x100;
    mem::write(word, 0x1122_3344u64);
    vmx::vm::Segment::Fs.write(tables::DATA, word, 0xffff_ffff, vmx::vm::DATA_RIGHTS);
    vm.set(&[control::LOAD_DEBUG_CONTROLS, control::SAVE_DEBUG_CONTROLS]);
    vmwrite(f::GUEST_DR7, 0x455);
    vmwrite(f::GUEST_RFLAGS, 0x8d7);
    Want::instruction(reason::VMCALL, 3).anywhere().run("guest state: L2 runs to its VMCALL", &mut vm);
    equal("entry loads DR7", vm.regs.rbx, 0x455);
    equal("L2's CR0", vm.regs.rcx, vmread(f::CR0_SHADOW));
    equal("L2's CR4", vm.regs.rsi, vmread(f::GUEST_CR4));
    equal("L2's DS", vm.regs.rdi, tables::DATA.into());
    equal("L2's GDTR base", vm.regs.r8, vmread(f::GUEST_GDTR_BASE));
    equal("L2's IDTR base", vm.regs.r9, vmread(f::GUEST_IDTR_BASE));
    equal("L2's TR", vm.regs.r10, tables::TSS.into());
    equal("L2's LDTR", vm.regs.r11, 0);
    equal("L2's FS base", vm.regs.r12, 0x1122_3344);
    equal("exit saves RSP", vmread(f::GUEST_RSP), vm.regs.r13);
    equal("exit saves DR7", vmread(f::GUEST_DR7), 0x755);
    check!(
        "exit saves access rights",
        vmread(f::GUEST_CS_ACCESS) == vmx::vm::CODE64_RIGHTS,
        "{:#x}",
        vmread(f::GUEST_CS_ACCESS)
    );
    equal("exit marks an unusable LDTR", vmread(f::GUEST_LDTR_ACCESS) & vmx::vm::UNUSABLE, vmx::vm::UNUSABLE);
}
