//! Fragments in real mode.
//!
//! Like `protected`: a fragment starts by IRET and ends at its first interrupt or exception. All vectors of the
//! interrupt table lead to one recorder at 0x7000; the vector shows in the CS it was entered with.

use crate::mem;
use crate::tables::{self, build_descriptor};
use core::arch::global_asm;

const BLOB: u64 = 0x6000;
const RECORDER: u64 = 0x7000;
const REGISTERS: u64 = 0x5000;
const RECORD: u64 = 0x5080;
const GDT_POINTER: u64 = 0x5090;
/// 16-bit code at the blob, 16-bit data at zero, data with a 4 GiB limit.
const CODE16: u16 = tables::SPARE_END;
const DATA16: u16 = tables::SPARE_END + 8;

/// Fragments are copied here.
pub const CODE_SEGMENT: u16 = 0x1000;
/// The stack.
pub const STACK_SEGMENT: u16 = 0x2000;
/// Scratch data.
pub const DATA_SEGMENT: u16 = 0x3000;

/// Registers at the start. The blob knows the layout.
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
    pub ip: u16,
    pub cs: u16,
    pub flags: u16,
    pub sp: u16,
    pub ss: u16,
    pub ds: u16,
    pub es: u16,
    pub pad: u16,
}

pub const START: Entry = Entry {
    edi: 0,
    esi: 0,
    ebp: 0,
    unused: 0,
    ebx: 0,
    edx: 0,
    ecx: 0,
    eax: 0,
    ip: 0,
    cs: CODE_SEGMENT,
    flags: 2,
    sp: 0x1000,
    ss: STACK_SEGMENT,
    ds: DATA_SEGMENT,
    es: DATA_SEGMENT,
    pad: 0,
};

/// What the recorder found.
#[derive(Clone, Copy)]
pub struct Stop {
    pub vector: u16,
    pub ip: u16,
    pub cs: u16,
    pub flags: u16,
    pub ds: u16,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
    pub esi: u32,
    pub edi: u32,
    /// SP behind the frame of IP, CS, FLAGS.
    pub sp: u16,
}

impl core::fmt::Display for Stop {
    fn fmt(&self, f: &mut core::fmt::Formatter) -> core::fmt::Result {
        let Stop { vector, ip, cs, flags, eax, .. } = self;
        write!(f, "vector {vector} at {cs:x}:{ip:x} FLAGS {flags:#x} EAX {eax:#x}")
    }
}

/// Points every vector of the table at the recorder.
pub fn reset_vectors() {
    for vector in 0..256u16 {
        set_vector(vector as u8, 0x700 - vector, vector * 16);
    }
}

/// Sets an entry of the interrupt table at address 0.
pub fn set_vector(vector: u8, cs: u16, ip: u16) {
    mem::write(u64::from(vector) * 4, [ip, cs]);
}

/// Runs a fragment with FS limited to 64 KiB, as after reset.
pub fn run(code: &[u8], entry: &Entry) -> Stop {
    run_with_fs(code, entry, DATA16)
}

/// Runs a fragment with a limit of 4 GiB left in FS by protected mode.
pub fn run_with_large_fs(code: &[u8], entry: &Entry) -> Stop {
    run_with_fs(code, entry, tables::DATA)
}

fn run_with_fs(code: &[u8], entry: &Entry, fs: u16) -> Stop {
    unsafe extern "C" {
        fn real_run(unused: u64, data: u64, fs: u64);
    }
    tables::set_descriptor(CODE16, build_descriptor(BLOB as u32, 0xffff, 0x9b, 0));
    tables::set_descriptor(DATA16, build_descriptor(0, 0xffff, 0x93, 0));
    mem::copy(BLOB, crate::code!(real_enter, real_enter_end));
    mem::copy(RECORDER, crate::code!(real_recorder, real_recorder_end));
    crate::protected::place(u64::from(CODE_SEGMENT) << 4, code);
    mem::write(REGISTERS, *entry);
    // The GDT pointer for the way back.
    // SAFETY: stores ten bytes in free low memory.
    unsafe { core::arch::asm!("sgdt [{}]", in(reg) GDT_POINTER) };
    // SAFETY: the recorder comes back with the stack as it was.
    unsafe { real_run(0, DATA16.into(), fs.into()) };
    tables::load(0);
    let [cs, sp, ss]: [u16; 3] = mem::read(RECORD);
    let frame = (u64::from(ss) << 4) + u64::from(sp);
    let register = |index: u64| mem::read::<u32>(frame + 2 + index * 4);
    let [ip, code_segment, flags]: [u16; 3] = mem::read(frame + 34);
    Stop {
        vector: 0x700 - cs,
        ip,
        cs: code_segment,
        flags,
        ds: mem::read(frame),
        edi: register(0),
        esi: register(1),
        ebx: register(4),
        edx: register(5),
        ecx: register(6),
        eax: register(7),
        sp: sp + 40,
    }
}

global_asm!(
    r#"
    .section .text.real, "ax"
    .code16
    .globl real_enter, real_enter_end, real_recorder, real_recorder_end
real_enter:
    movl %cr0, %eax
    andl $0x7ffffffe, %eax
    movl %eax, %cr0
    ljmpw $0x600, $1f - real_enter
1:  xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %gs
    # The IRET frame on the fragment's stack.
    movw 0x5028, %ss
    movzwl 0x5026, %esp
    pushw 0x5024
    pushw 0x5022
    pushw 0x5020
    # Registers by way of the same stack.
    pushw 0x502c
    pushw 0x502a
    movw $0x5020, %si
    movw $8, %cx
2:  subw $4, %si
    pushl (%si)
    decw %cx
    jnz 2b
    popal
    popw %ds
    popw %es
    iretw
real_enter_end:

real_recorder:
    cld
    pushal
    pushw %ds
    xorw %ax, %ax
    movw %ax, %ds
    movw %cs, %ax
    movw %ax, 0x5080
    movw %sp, 0x5082
    movw %ss, %ax
    movw %ax, 0x5084
    lgdtl 0x5090
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $0x18, $legacy_return
real_recorder_end:
    .code64
    .text
    "#,
    options(att_syntax)
);
