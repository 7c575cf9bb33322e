//! Fragments in 32-bit, 16-bit and virtual-8086 mode outside long mode, without paging.
//!
//! A fragment starts by IRET with the registers given and ends at its first interrupt or exception. Every vector of
//! the legacy IDT leads to a recorder, which leaves the frame on its stack and goes back to long mode, where the
//! caller reads it. The GDT is the runtime's, so cases build their descriptors with `tables`.

use crate::mem;
use crate::tables::{self, CODE32, DATA, Shared};
use core::arch::global_asm;

pub const VM: u32 = 1 << 17;
/// CR0 of a fragment: protected mode, no paging.
pub const CR0: u32 = 0x33;

/// Registers at the start. `protected_run` knows the layout.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Entry {
    pub edi: u32,
    pub esi: u32,
    pub ebp: u32,
    pub unused: u32,
    pub ebx: u32,
    pub edx: u32,
    pub ecx: u32,
    pub eax: u32,
    pub ds: u32,
    pub es: u32,
    pub fs: u32,
    pub gs: u32,
    pub eip: u32,
    pub cs: u32,
    pub eflags: u32,
    /// Stack of ring 3 and virtual-8086 mode; ring 0 keeps the runtime's.
    pub esp: u32,
    pub ss: u32,
    /// Loaded by a virtual-8086 entry alone.
    pub vm_es: u32,
    pub vm_ds: u32,
    pub vm_fs: u32,
    pub vm_gs: u32,
    pub ldt: u32,
    pub tr: u32,
    pub cr0: u32,
    pub cr4: u32,
}

/// Flat ring 0 at `eip`.
pub const RING0: Entry = Entry {
    edi: 0,
    esi: 0,
    ebp: 0,
    unused: 0,
    ebx: 0,
    edx: 0,
    ecx: 0,
    eax: 0,
    ds: DATA as u32,
    es: DATA as u32,
    fs: 0,
    gs: 0,
    eip: 0,
    cs: CODE32 as u32,
    eflags: 2,
    esp: 0,
    ss: 0,
    vm_es: 0,
    vm_ds: 0,
    vm_fs: 0,
    vm_gs: 0,
    ldt: 0,
    tr: 0,
    cr0: CR0,
    cr4: 0,
};

/// Flat ring 3 at `eip`.
pub const RING3: Entry = Entry {
    cs: tables::USER_CODE32 as u32,
    ds: tables::USER_DATA as u32,
    es: tables::USER_DATA as u32,
    ss: tables::USER_DATA as u32,
    esp: 0x6_0000,
    ..RING0
};

/// What the recorder found.
#[derive(Clone, Copy, Default)]
pub struct Stop {
    pub vector: u32,
    /// Zero when the vector has none.
    pub error: u32,
    pub eip: u32,
    pub cs: u32,
    pub eflags: u32,
    /// ESP, SS, ES, DS, FS, GS: as far as this entry pushed them.
    pub outer: [u32; 6],
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
    pub esi: u32,
    pub edi: u32,
    pub ds: u32,
    pub fs: u32,
    pub tr: u32,
    pub cr0: u32,
    /// Address behind error code, EIP, CS and EFLAGS on the recorder's stack.
    pub frame_end: u32,
}

impl core::fmt::Display for Stop {
    fn fmt(&self, f: &mut core::fmt::Formatter) -> core::fmt::Result {
        let Stop { vector, error, eip, cs, eflags, eax, tr, .. } = self;
        write!(
            f,
            "vector {vector} error {error:#x} at {cs:x}:{eip:#x} EFLAGS {eflags:#x} EAX {eax:#x} TR {tr:#x}"
        )
    }
}

static IDT: Shared<[u64; 256]> = Shared::new([0; 256]);
/// What the assembly leaves: ESP and SS of the recorder, TR, CR0.
#[unsafe(no_mangle)]
static PROTECTED_RECORD: Shared<[u32; 4]> = Shared::new([0; 4]);

/// Points every vector at the recorder, by 32-bit interrupt gates that ring 3 may use.
pub fn reset_idt() {
    for vector in 0..256u32 {
        set_gate(vector as u8, gate(CODE32, recorder(vector as u8), 0xee));
    }
}

/// The recorder's entry for a vector.
pub fn recorder(vector: u8) -> u32 {
    unsafe extern "C" {
        static protected_stubs: u8;
    }
    &raw const protected_stubs as u32 + u32::from(vector) * 16
}

/// A gate from its parts.
pub fn gate(selector: u16, offset: u32, access: u8) -> u64 {
    u64::from(offset & 0xffff)
        | u64::from(selector) << 16
        | u64::from(access) << 40
        | u64::from(offset >> 16) << 48
}

pub fn set_gate(vector: u8, gate: u64) {
    mem::write(IDT.address() + u64::from(vector) * 8, gate);
}

/// Copies a fragment, with INT 0x2f behind it to stop one that runs past its end.
pub fn place(at: u64, code: &[u8]) {
    mem::copy(at, code);
    mem::copy(at + code.len() as u64, &[0xcd, 0x2f]);
}

/// Runs a fragment until its first interrupt or exception. Software interrupts of a case use vectors from 0x20.
pub fn run(entry: &Entry) -> Stop {
    unsafe extern "C" {
        fn protected_run(entry: *const Entry, idt: u64);
    }
    if entry.tr != 0 {
        // LTR refuses the busy TSS that a run before has left.
        let selector = entry.tr as u16;
        tables::set_descriptor(selector, tables::descriptor(selector) & !(2 << 40));
    }
    // SAFETY: the recorder comes back with the stack as it was; TR and LDTR are loaded again below.
    unsafe {
        protected_run(entry, IDT.address());
        core::arch::asm!("lldt {:x}", in(reg) 0);
    }
    tables::load_task_register(0);
    read_record()
}

fn read_record() -> Stop {
    let [esp, _ss, tr, cr0]: [u32; 4] = mem::read(PROTECTED_RECORD.address());
    let at = |index: u64| mem::read::<u32>(u64::from(esp) + index * 4);
    let vector = at(12);
    let has_error = matches!(vector, 8 | 10..=14 | 17);
    let next = if has_error { 14 } else { 13 };
    Stop {
        vector,
        error: if has_error { at(13) } else { 0 },
        eip: at(next),
        cs: at(next + 1),
        eflags: at(next + 2),
        outer: [3, 4, 5, 6, 7, 8].map(|i| at(next + i)),
        eax: at(11),
        ebx: at(8),
        ecx: at(10),
        edx: at(9),
        esi: at(5),
        edi: at(4),
        ds: at(3),
        fs: at(1),
        tr: tr & 0xffff,
        cr0,
        frame_end: esp + (next as u32 + 3) * 4,
    }
}

global_asm!(
    r#"
    .section .text.protected
    .globl legacy_return, protected_run, protected_stubs
protected_run:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    sidt protected_saved_idt
    movq %cr0, %rax
    movl %eax, protected_saved_cr0
    movq %cr3, %rax
    movl %eax, protected_saved_cr3
    movq %cr4, %rax
    movl %eax, protected_saved_cr4
    movl %esi, protected_idt + 2
    movl %esp, protected_saved_esp
    ljmpl *protected_to_32
    .code32
protected_32:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl protected_saved_cr0, %eax
    andl $0x7fffffff, %eax
    movl %eax, %cr0
    movl $0xC0000080, %ecx
    rdmsr
    andl $0xfffffeff, %eax
    wrmsr
    movl 96(%edi), %eax
    movl %eax, %cr4
    movl 92(%edi), %eax
    movl %eax, %cr0
    lidt protected_idt
    lldt 84(%edi)
    cmpl $0, 88(%edi)
    je 1f
    ltr 88(%edi)
1:  # The IRET frame, from its end.
    testl $0x20000, 56(%edi)
    jz 2f
    pushl 80(%edi)
    pushl 76(%edi)
    pushl 72(%edi)
    pushl 68(%edi)
2:  testl $0x20000, 56(%edi)
    jnz 3f
    testl $3, 52(%edi)
    jz 4f
3:  pushl 64(%edi)
    pushl 60(%edi)
4:  pushl 56(%edi)
    pushl 52(%edi)
    pushl 48(%edi)
    # Segments and registers, as POP takes them.
    movl $12, %ecx
5:  pushl -4(%edi, %ecx, 4)
    decl %ecx
    jnz 5b
    popal
    popl %ds
    popl %es
    popl %fs
    popl %gs
    iretl

    .balign 16
protected_stubs:
    .set vector, 0
    .rept 256
    .balign 16
    pushl $vector
    jmp protected_recorder
    .set vector, vector + 1
    .endr

protected_recorder:
    cld
    pushal
    pushl %ds
    pushl %es
    pushl %fs
    pushl %gs
    movl $0x10, %eax
    movl %eax, %ds
    movl %esp, PROTECTED_RECORD
    movl %ss, %eax
    movl %eax, PROTECTED_RECORD + 4
    strl %eax
    movl %eax, PROTECTED_RECORD + 8
    movl %cr0, %eax
    movl %eax, PROTECTED_RECORD + 12
    # Long mode cannot be entered while TR holds a 16-bit TSS: back to the runtime's.
    andb $0xfd, GDT + 0x38 + 5
    movl $0x38, %eax
    ltr %ax

    # Back to long mode, from flat 32-bit code with any other segments.
legacy_return:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl protected_saved_esp, %esp
    movl protected_saved_cr4, %eax
    movl %eax, %cr4
    movl protected_saved_cr3, %eax
    movl %eax, %cr3
    movl $0xC0000080, %ecx
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl protected_saved_cr0, %eax
    movl %eax, %cr0
    ljmpl $0x08, $protected_64
    .code64
protected_64:
    movl %esp, %esp
    lidt protected_saved_idt
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    ret

    # Real mode: as above down to 32 bits, then through a 16-bit segment. The blob lies at 0x6000.
    .globl real_run
real_run:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movl %edx, %ebp             # RDMSR changes EDX
    sidt protected_saved_idt
    movq %cr0, %rax
    movl %eax, protected_saved_cr0
    movq %cr3, %rax
    movl %eax, protected_saved_cr3
    movq %cr4, %rax
    movl %eax, protected_saved_cr4
    movl %esp, protected_saved_esp
    ljmpl *real_to_32
    .code32
real_32:
    movl protected_saved_cr0, %eax
    andl $0x7fffffff, %eax
    movl %eax, %cr0
    movl $0xC0000080, %ecx
    rdmsr
    andl $0xfffffeff, %eax
    wrmsr
    xorl %eax, %eax
    movl %eax, %cr4
    lidt real_idt
    movl %esi, %eax             # 16-bit data selector
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %fs
    movl %eax, %gs
    movl %eax, %ss
    movl %ebp, %eax             # a selector with a 4 GiB limit, or the same
    movl %eax, %fs
    ljmpl *%cs:real_to_16

    .section .data.protected, "aw"
    .balign 8
protected_to_32:
    .long protected_32
    .word 0x18
    .balign 8
real_to_32:
    .long real_32
    .word 0x18
    .balign 8
    .globl real_to_16
real_to_16:
    .long 0
    .word 0x170
    .balign 8
protected_idt:
    .word 256 * 8 - 1
    .long 0
    .balign 8
real_idt:
    .word 0x3ff
    .long 0
    .balign 8
protected_saved_idt:
    .skip 16
protected_saved_cr0:
    .long 0
protected_saved_cr3:
    .long 0
protected_saved_cr4:
    .long 0
protected_saved_esp:
    .long 0
    .text
    "#,
    options(att_syntax)
);
