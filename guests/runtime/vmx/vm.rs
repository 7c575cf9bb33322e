//! The current VMCS as an object: a good state for 64-bit L2 code, running it, its registers.

use super::capability::{self, Allowed};
use super::control::{self, Control, Group};
use super::exit::Exit;
use super::field as f;
use super::insn::{self, Failure, vmread, vmwrite};
use crate::cpu::{self, rdmsr};
use crate::mem;
use crate::tables::{self, Shared, TablePointer};
use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, Ordering};

/// Access rights of segments as the VMCS holds them.
pub const CODE64_RIGHTS: u64 = 0xa09b;
pub const CODE32_RIGHTS: u64 = 0xc09b;
pub const DATA_RIGHTS: u64 = 0xc093;
pub const BUSY_TSS_RIGHTS: u64 = 0x8b;
pub const UNUSABLE: u64 = 1 << 16;

/// Size of the stack that L2 has unless told otherwise.
const STACK: usize = 16 * 1024;
static L2_STACK: Shared<[u8; STACK]> = Shared::new([0; STACK]);

/// General-purpose registers of L2 but RSP, which the VMCS holds. `vmx_run` knows the layout.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq)]
pub struct Regs {
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    pub unused: u64,
    pub rbp: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
}

/// The virtual machine of the current VMCS.
pub struct Vm {
    pub region: u64,
    pub regs: Regs,
    /// Where its code begins: [`Exit::at`] counts from here.
    pub start: u64,
    launched: bool,
}

/// Top of L2's stack.
pub fn stack_top() -> u64 {
    L2_STACK.address() + STACK as u64 - 64
}

/// The region of [`Vm::fresh`], once it exists.
static REGION: AtomicU64 = AtomicU64::new(0);

impl Vm {
    /// A virtual machine in one region that every case uses anew.
    pub fn fresh(code: u64) -> Vm {
        if REGION.load(Ordering::Relaxed) == 0 {
            REGION.store(super::region(), Ordering::Relaxed);
        }
        Vm::new(REGION.load(Ordering::Relaxed), code)
    }

    /// Makes a region the current VMCS, with a good state that starts at `code` in this program's address space.
    pub fn new(region: u64, code: u64) -> Vm {
        mem::write(region, capability::revision());
        expect(insn::vmclear(region), "VMCLEAR");
        expect(insn::vmptrld(region), "VMPTRLD");
        for &(field, _) in f::ALL {
            vmwrite(field, 0);
        }
        write_controls();
        write_host_state();
        write_guest_state();
        let mut vm = Vm { region, regs: Regs::default(), start: 0, launched: false };
        vm.start_at(code);
        vm
    }

    /// Sends L2 to other code, with an empty stack.
    pub fn start_at(&mut self, code: u64) {
        self.start = code;
        vmwrite(f::GUEST_RIP, code);
        vmwrite(f::GUEST_RSP, stack_top());
    }

    /// Enters L2 until it exits. VMLAUNCH the first time, VMRESUME after.
    pub fn enter(&mut self) -> Result<Exit, Failure> {
        let status = enter_raw(&mut self.regs, self.launched);
        insn::outcome(status)?;
        let exit = Exit::read(self.start);
        if exit.reason & super::reason::ENTRY_FAILURE == 0 {
            self.launched = true;
        }
        Ok(exit)
    }

    /// Enters L2; a VM entry that fails with an error number ends the program.
    pub fn run(&mut self) -> Exit {
        match self.enter() {
            Ok(exit) => exit,
            Err(failure) => crate::report::abort(format_args!("VM entry: {failure}")),
        }
    }

    /// Moves RIP behind the instruction that exited.
    pub fn skip(&mut self) {
        vmwrite(f::GUEST_RIP, vmread(f::GUEST_RIP) + vmread(f::EXIT_INSTRUCTION_LENGTH));
    }

    /// The launch state is clear again (VMCLEAR), the VMCS current again.
    pub fn clear(&mut self) {
        expect(insn::vmclear(self.region), "VMCLEAR");
        expect(insn::vmptrld(self.region), "VMPTRLD");
        self.launched = false;
    }

    /// Sets controls, with what they imply; false if one of them is not available.
    pub fn set(&mut self, controls: &[Control]) -> bool {
        controls.iter().all(|control| self.set_one(control))
    }

    fn set_one(&mut self, control: &Control) -> bool {
        if !control.available() {
            return false;
        }
        if control.group == Group::Secondary {
            self.set_one(&control::ACTIVATE_SECONDARY);
        }
        let field = control.group.field();
        vmwrite(field, vmread(field) | u64::from(control.mask));
        true
    }

    /// Clears controls; false if one of them must be 1, and is left so.
    pub fn unset(&mut self, controls: &[Control]) -> bool {
        let clearable = |control: &&Control| control.clearable();
        for control in controls.iter().filter(clearable) {
            let field = control.group.field();
            vmwrite(field, vmread(field) & !u64::from(control.mask));
        }
        controls.iter().all(|control| control.clearable())
    }

    /// Sets controls; if one is missing, reports the case as skipped and returns false.
    pub fn set_or_skip(&mut self, case: &str, controls: &[Control]) -> bool {
        for control in controls {
            if !self.set(core::slice::from_ref(control)) {
                crate::report::skip(case, control.name);
                return false;
            }
        }
        true
    }
}

/// For steps that a program cannot go on without.
pub fn expect(outcome: insn::Outcome, what: &str) {
    if let Err(failure) = outcome {
        crate::report::abort(format_args!("{what}: {failure}"));
    }
}

/// As few controls as 64-bit L1 and L2 need.
fn write_controls() {
    for (group, wanted) in [
        (Group::Pin, 0),
        (Group::Primary, 0),
        (Group::Exit, control::HOST_ADDRESS_SPACE_SIZE.mask),
        (Group::Entry, control::IA32E_MODE_GUEST.mask),
    ] {
        vmwrite(group.field(), group.allowed().adjust(wanted).into());
    }
    vmwrite(f::SECONDARY_CONTROLS, 0);
}

/// Host state: the CPU as it is now. HOST_RSP and HOST_RIP are set at each entry.
fn write_host_state() {
    vmwrite(f::HOST_CR0, cpu::cr0());
    vmwrite(f::HOST_CR3, cpu::cr3());
    vmwrite(f::HOST_CR4, cpu::cr4());
    vmwrite(f::HOST_CS, tables::CODE64.into());
    for field in [f::HOST_SS, f::HOST_DS, f::HOST_ES] {
        vmwrite(field, tables::DATA.into());
    }
    let task = task_register();
    vmwrite(f::HOST_TR, task.into());
    vmwrite(f::HOST_TR_BASE, segment_base(task));
    vmwrite(f::HOST_GDTR_BASE, table_pointer(Table::Gdt).base);
    vmwrite(f::HOST_IDTR_BASE, table_pointer(Table::Idt).base);
    vmwrite(f::HOST_SYSENTER_CS, rdmsr(cpu::MSR_SYSENTER_CS));
    vmwrite(f::HOST_SYSENTER_ESP, rdmsr(cpu::MSR_SYSENTER_ESP));
    vmwrite(f::HOST_SYSENTER_EIP, rdmsr(cpu::MSR_SYSENTER_EIP));
    vmwrite(f::HOST_EFER, rdmsr(cpu::MSR_EFER));
    vmwrite(f::HOST_PAT, rdmsr(MSR_PAT));
}

pub const MSR_PAT: u32 = 0x277;

/// Guest state: 64-bit ring 0 in this program's own address space, GDT and IDT. Every exception exits: L2 that went
/// astray does not reach this program's handlers.
fn write_guest_state() {
    vmwrite(f::EXCEPTION_BITMAP, 0xffff_ffff);
    vmwrite(f::GUEST_CR0, cpu::cr0());
    vmwrite(f::GUEST_CR3, cpu::cr3());
    vmwrite(f::GUEST_CR4, cpu::cr4());
    vmwrite(f::CR0_SHADOW, cpu::cr0());
    vmwrite(f::CR4_SHADOW, cpu::cr4());
    vmwrite(f::GUEST_DR7, 0x400);
    vmwrite(f::GUEST_RFLAGS, 2);
    vmwrite(f::VMCS_LINK_POINTER, !0);
    vmwrite(f::GUEST_EFER, rdmsr(cpu::MSR_EFER));
    vmwrite(f::GUEST_PAT, rdmsr(MSR_PAT));
    for segment in Segment::ALL {
        segment.write(0, 0, 0xffff_ffff, UNUSABLE);
    }
    Segment::Cs.write(tables::CODE64, 0, 0xffff_ffff, CODE64_RIGHTS);
    for segment in [Segment::Ss, Segment::Ds, Segment::Es] {
        segment.write(tables::DATA, 0, 0xffff_ffff, DATA_RIGHTS);
    }
    let task = task_register();
    Segment::Tr.write(task, segment_base(task), 0x67, BUSY_TSS_RIGHTS);
    let (gdt, idt) = (table_pointer(Table::Gdt), table_pointer(Table::Idt));
    vmwrite(f::GUEST_GDTR_BASE, gdt.base);
    vmwrite(f::GUEST_GDTR_LIMIT, gdt.limit.into());
    vmwrite(f::GUEST_IDTR_BASE, idt.base);
    vmwrite(f::GUEST_IDTR_LIMIT, idt.limit.into());
}

/// A segment register of L2. The discriminant is its place in the runs of fields.
#[derive(Clone, Copy, PartialEq)]
pub enum Segment {
    Es,
    Cs,
    Ss,
    Ds,
    Fs,
    Gs,
    Ldtr,
    Tr,
}

impl Segment {
    pub const ALL: [Segment; 8] = [
        Segment::Es,
        Segment::Cs,
        Segment::Ss,
        Segment::Ds,
        Segment::Fs,
        Segment::Gs,
        Segment::Ldtr,
        Segment::Tr,
    ];

    pub fn selector_field(self) -> u32 {
        f::GUEST_ES + 2 * self as u32
    }

    pub fn base_field(self) -> u32 {
        f::GUEST_ES_BASE + 2 * self as u32
    }

    pub fn limit_field(self) -> u32 {
        f::GUEST_ES_LIMIT + 2 * self as u32
    }

    pub fn rights_field(self) -> u32 {
        f::GUEST_ES_ACCESS + 2 * self as u32
    }

    /// Writes all four fields.
    pub fn write(self, selector: u16, base: u64, limit: u32, rights: u64) {
        vmwrite(self.selector_field(), selector.into());
        vmwrite(self.base_field(), base);
        vmwrite(self.limit_field(), limit.into());
        vmwrite(self.rights_field(), rights);
    }
}

fn task_register() -> u16 {
    let selector: u16;
    // SAFETY: reads TR.
    unsafe { asm!("str {:x}", out(reg) selector) };
    selector
}

/// Base of the 16-byte descriptor of a selector.
fn segment_base(selector: u16) -> u64 {
    let (low, high) = (tables::descriptor(selector), tables::descriptor(selector + 8));
    low >> 16 & 0xff_ffff | (low >> 56) << 24 | high << 32
}

enum Table {
    Gdt,
    Idt,
}

fn table_pointer(which: Table) -> TablePointer {
    let mut pointer = TablePointer { limit: 0, base: 0 };
    // SAFETY: stores ten bytes on the stack.
    unsafe {
        match which {
            Table::Gdt => asm!("sgdt [{}]", in(reg) &mut pointer),
            Table::Idt => asm!("sidt [{}]", in(reg) &mut pointer),
        }
    }
    pointer
}

/// What the processor allows of a group: for cases that break it.
pub fn allowed(group: Group) -> Allowed {
    group.allowed()
}

/// One VM entry, and the flags of VMLAUNCH or VMRESUME if it failed, 0 otherwise.
pub fn enter_raw(regs: &mut Regs, launched: bool) -> u64 {
    unsafe extern "C" {
        fn vmx_run(regs: *mut Regs, launched: u64) -> u64;
    }
    // SAFETY: the exit restores the stack and the registers that a call preserves; what L2 does to memory is up to
    // the program.
    unsafe { vmx_run(regs, launched.into()) }
}

global_asm!(
    r#"
    .section .text.vmx
    .globl vmx_run
    # In: RDI registers, RSI whether launched. Stack while L2 runs: registers, flags of a failed entry.
vmx_run:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    push 0
    push rdi
    mov eax, {host_rsp}
    vmwrite rax, rsp
    lea rdx, [rip + vmx_exit]
    mov eax, {host_rip}
    vmwrite rax, rdx
    test rsi, rsi
    mov rax, [rdi]
    mov rcx, [rdi + 8]
    mov rdx, [rdi + 16]
    mov rbx, [rdi + 24]
    mov rbp, [rdi + 40]
    mov rsi, [rdi + 48]
    mov r8, [rdi + 64]
    mov r9, [rdi + 72]
    mov r10, [rdi + 80]
    mov r11, [rdi + 88]
    mov r12, [rdi + 96]
    mov r13, [rdi + 104]
    mov r14, [rdi + 112]
    mov r15, [rdi + 120]
    mov rdi, [rdi + 56]
    jnz 2f
    vmlaunch
    jmp 3f
2:  vmresume
3:  pushfq
    pop qword ptr [rsp + 8]     # RSP counts after the pop: the slot of the flags
vmx_exit:
    xchg rdi, [rsp]
    mov [rdi], rax
    mov [rdi + 8], rcx
    mov [rdi + 16], rdx
    mov [rdi + 24], rbx
    mov [rdi + 40], rbp
    mov [rdi + 48], rsi
    mov [rdi + 64], r8
    mov [rdi + 72], r9
    mov [rdi + 80], r10
    mov [rdi + 88], r11
    mov [rdi + 96], r12
    mov [rdi + 104], r13
    mov [rdi + 112], r14
    mov [rdi + 120], r15
    pop rax
    mov [rdi + 56], rax
    pop rax
    cld
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
    .text
    "#,
    host_rsp = const f::HOST_RSP,
    host_rip = const f::HOST_RIP,
);

/// Defines L2 code in place and evaluates to its address: `l2!(["mov eax, 1", "cpuid"])`. A VMCALL follows it. Labels
/// 96 and 97 are the macro's. 32-bit and 16-bit code begins with `.code32` or `.code16` and ends with `.code64`.
#[macro_export]
macro_rules! l2 {
    ([$($text:expr),* $(,)?]) => {{
        let address: u64;
        // SAFETY: jumps over code that only a virtual machine enters.
        unsafe {
            core::arch::asm!(
                "lea {}, [rip + 96f]",
                "jmp 97f",
                "96:",
                $($text,)*
                "vmcall",
                "97:",
                out(reg) address
            );
        }
        address
    }};
}
