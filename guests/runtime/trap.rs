//! The IDT, registered handlers, and catching faults of a code fragment.
//!
//! All 256 vectors lead to one entry that saves the registers and calls [`dispatch`]. A vector is answered by its
//! registered handler; else, while a fragment of [`probe!`] or a trip to ring 3 runs, by recording it and resuming
//! behind the fragment; else it ends the program with a report.
//!
//! Every vector has an IST stack, so that code which uses the red zone below its stack survives, and so that cases
//! may break their stack pointer. Handlers run with interrupts off and must not nest on the same IST.

use crate::tables::{self, Shared, TablePointer};
use core::arch::{asm, global_asm};
use core::fmt;

pub const DE: u8 = 0;
pub const DB: u8 = 1;
pub const NMI: u8 = 2;
pub const BP: u8 = 3;
pub const OF: u8 = 4;
pub const BR: u8 = 5;
pub const UD: u8 = 6;
pub const NM: u8 = 7;
pub const DF: u8 = 8;
pub const TS: u8 = 10;
pub const NP: u8 = 11;
pub const SS: u8 = 12;
pub const GP: u8 = 13;
pub const PF: u8 = 14;
pub const MF: u8 = 16;
pub const AC: u8 = 17;
pub const XM: u8 = 19;

/// Registers as the entry code pushes them, from the lowest address.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Frame {
    /// Address of the FXSAVE image that is restored behind the handler.
    pub fx_image: u64,
    /// CR0 at the trap; a TS or EM in it is set again behind the handler.
    pub cr0: u64,
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rbp: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rbx: u64,
    pub rax: u64,
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// An exception or interrupt that ended a fragment.
#[derive(Clone, Copy)]
pub struct Fault {
    pub vector: u8,
    pub error: u32,
    /// Saved RIP, as an offset into the fragment.
    pub at: u64,
    pub cr2: u64,
    pub dr6: u64,
    /// Where the frame was pushed.
    pub frame_at: u64,
    pub frame: Frame,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Fault { vector, error, at, cr2, .. } = self;
        let Frame { rip, cs, rflags, .. } = self.frame;
        write!(
            f,
            "vector {vector} error {error:#x} at +{at:#x} (RIP {cs:x}:{rip:#x} RFLAGS {rflags:#x} CR2 {cr2:#x})"
        )
    }
}

/// What a running fragment leaves for [`dispatch`]. The macros below know the layout.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Probe {
    /// Where to go on after a fault; 0 when no fragment runs.
    resume: u64,
    start: u64,
    rsp: u64,
}

pub static PROBE: Shared<Probe> = Shared::new(Probe { resume: 0, start: 0, rsp: 0 });
static FAULT: Shared<Option<Fault>> = Shared::new(None);
static HANDLERS: Shared<[Option<Handler>; 256]> = Shared::new([None; 256]);
static IDT: Shared<[[u64; 2]; 256]> = Shared::new([[0; 2]; 256]);

pub type Handler = fn(&mut Frame);

/// Takes the fault that ended the last fragment, if one did.
pub fn take_fault() -> Option<Fault> {
    let fault = crate::mem::read(FAULT.address());
    crate::mem::write::<Option<Fault>>(FAULT.address(), None);
    fault
}

/// Registers the handler of a vector; it goes before the recording of [`probe!`].
pub fn on(vector: u8, handler: Handler) {
    crate::mem::write(HANDLERS.address() + u64::from(vector) * 8, Some(handler));
}

/// Removes the handler of a vector.
pub fn off(vector: u8) {
    crate::mem::write::<Option<Handler>>(HANDLERS.address() + u64::from(vector) * 8, None);
}

/// Runs an assembly fragment on the boot CPU and evaluates to the [`Fault`] that ended it, if any:
/// `probe!(["ud2"])`, `probe!(["mov [{p}], al", "nop"], p = in(reg) address)`. After a fault the stack pointer is as
/// before, the other registers as at the fault, RFLAGS is cleared.
#[macro_export]
macro_rules! probe {
    ([$($text:expr),+ $(,)?] $(, $($ops:tt)*)?) => {{
        // SAFETY: the program owns the machine; a fault resumes at 99 with the stack as at the start.
        unsafe {
            core::arch::asm!(
                "lea {rt_scratch}, [rip + 98f]",
                "mov [rip + {rt_probe} + 8], {rt_scratch}",
                "mov [rip + {rt_probe} + 16], rsp",
                "lea {rt_scratch}, [rip + 99f]",
                "mov [rip + {rt_probe}], {rt_scratch}",
                "98:",
                $($text,)+
                "99:",
                "mov qword ptr [rip + {rt_probe}], 0",
                rt_scratch = out(reg) _,
                rt_probe = sym $crate::trap::PROBE,
                $($($ops)*)?
            );
        }
        $crate::trap::take_fault()
    }};
}

#[unsafe(no_mangle)]
extern "C" fn dispatch(frame: &mut Frame) {
    let handler: Option<Handler> = crate::mem::read(HANDLERS.address() + (frame.vector & 0xff) * 8);
    if let Some(handler) = handler {
        return handler(frame);
    }
    let probe: Probe = crate::mem::read(PROBE.address());
    let fault = Fault {
        vector: frame.vector as u8,
        error: frame.error as u32,
        at: frame.rip.wrapping_sub(probe.start),
        cr2: crate::cpu::cr2(),
        dr6: crate::cpu::dr6(),
        frame_at: frame as *const Frame as u64,
        frame: *frame,
    };
    if probe.resume == 0 {
        crate::report::abort(format_args!("{fault}"));
    }
    crate::mem::write(FAULT.address(), Some(fault));
    resume(frame, &probe);
}

/// Sends a frame to the end of the running fragment.
fn resume(frame: &mut Frame, probe: &Probe) {
    crate::mem::write(PROBE.address(), 0u64);
    frame.rip = probe.resume;
    frame.rsp = probe.rsp;
    frame.cs = u64::from(tables::CODE64);
    frame.ss = u64::from(tables::DATA);
    frame.rflags = 2;
}

/// Builds the IDT and loads it.
pub(crate) fn load() {
    for vector in 0..=255u8 {
        set_gate(vector, stub(vector), 0x8e, default_ist(vector));
    }
    load_idt();
}

/// Loads IDTR on this CPU.
pub fn load_idt() {
    let pointer = TablePointer { limit: 256 * 16 - 1, base: IDT.address() };
    // SAFETY: the IDT is static and complete.
    unsafe { asm!("lidt [{}]", in(reg) &pointer) };
}

/// The IST index a vector has unless a case changes it.
pub fn default_ist(vector: u8) -> u8 {
    match vector {
        NMI => tables::IST_NMI,
        DF => tables::IST_DOUBLE_FAULT,
        0..32 => tables::IST_FAULT,
        _ => tables::IST_INTERRUPT,
    }
}

/// The entry code of a vector.
pub fn stub(vector: u8) -> u64 {
    unsafe extern "C" {
        static trap_stubs: u8;
    }
    &raw const trap_stubs as u64 + u64::from(vector) * 16
}

/// Writes one gate: entry, type with DPL and present bit, IST index.
pub fn set_gate(vector: u8, entry: u64, access: u8, ist: u8) {
    let low = entry & 0xffff
        | u64::from(tables::CODE64) << 16
        | u64::from(ist) << 32
        | u64::from(access) << 40
        | (entry >> 16 & 0xffff) << 48;
    set_raw_gate(vector, [low, entry >> 32]);
}

/// Writes the two halves of a gate as they are.
pub fn set_raw_gate(vector: u8, gate: [u64; 2]) {
    crate::mem::write(IDT.address() + u64::from(vector) * 16, gate);
}

/// Gives a vector its default gate again.
pub fn reset_gate(vector: u8) {
    set_gate(vector, stub(vector), 0x8e, default_ist(vector));
}

global_asm!(
    r#"
    .section .text.trap
    .balign 16
    .globl trap_stubs
trap_stubs:
    .set vector, 0
    .rept 256
    .balign 16
    # Vectors 8, 10-14, 17, 21 push an error code.
    .if (vector > 31) || (((1 << vector) & 0x00227d00) == 0)
    push 0
    .endif
    push vector
    jmp trap_entry
    .set vector, vector + 1
    .endr

trap_entry:
    push rax
    push rbx
    push rcx
    push rdx
    push rsi
    push rdi
    push rbp
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    mov rax, cr0
    push rax
    push 0
    cld
    mov rbx, rsp
    # A case may have left CR0.TS or CR0.EM set; the dispatcher uses SSE.
    test eax, 0xc
    jz 2f
    and rax, -13
    mov cr0, rax
2:  sub rsp, 512
    and rsp, -16
    mov [rbx], rsp
    fxsave64 [rsp]
    mov rdi, rbx
    call dispatch
    mov rax, [rbx]
    fxrstor64 [rax]
    mov rax, [rbx + 8]
    test eax, 0xc
    jz 3f
    mov cr0, rax
3:  lea rsp, [rbx + 16]
    pop r15
    pop r14
    pop r13
    pop r12
    pop r11
    pop r10
    pop r9
    pop r8
    pop rbp
    pop rdi
    pop rsi
    pop rdx
    pop rcx
    pop rbx
    pop rax
    add rsp, 16
    iretq
    .text
    "#
);
