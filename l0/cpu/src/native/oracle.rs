//! For tests: executes an instruction natively with *all* registers loaded and stored around it, so that it shares
//! nothing with what a thunk assumes about the instruction.

use crate::state::{VectorState, X87State};
use std::arch::global_asm;

/// Everything a tested instruction may read or write; its memory operand is [R8].
#[derive(Clone)]
#[repr(C, align(64))]
pub(crate) struct Machine {
    pub vector: VectorState,
    pub x87: X87State,
    /// RAX, RCX, RDX, RBX.
    pub gpr: [u64; 4],
    pub rflags: u64,
    pub operand: u64,
    pub code: u64,
    pub mxcsr_default: u32,
}

const _: () = assert!(std::mem::offset_of!(VectorState, mxcsr) == 512);
const _: () = assert!(std::mem::offset_of!(Machine, x87) == 576);
const _: () = assert!(std::mem::offset_of!(Machine, gpr) == 1088);

global_asm!(
    ".pushsection .text",
    ".balign 16",
    ".globl turtles_cpu_test_oracle",
    "turtles_cpu_test_oracle:",
    "push rbx",
    "push r12",
    "push r13",
    "mov r12, rdi",
    "mov dword ptr [r12 + 576 + 24], 0x1f80",
    "fxrstor64 [r12 + 576]",
    "ldmxcsr [r12 + 512]",
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
    "vmovups ymm\\n, [r12 + 32 * \\n]",
    ".endr",
    "push qword ptr [r12 + 1120]",
    "popfq",
    "mov rax, [r12 + 1088]",
    "mov rcx, [r12 + 1096]",
    "mov rdx, [r12 + 1104]",
    "mov rbx, [r12 + 1112]",
    "mov r8, [r12 + 1128]",
    "call [r12 + 1136]",
    "mov [r12 + 1088], rax",
    "mov [r12 + 1096], rcx",
    "mov [r12 + 1104], rdx",
    "mov [r12 + 1112], rbx",
    "pushfq",
    "pop qword ptr [r12 + 1120]",
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
    "vmovups [r12 + 32 * \\n], ymm\\n",
    ".endr",
    "stmxcsr [r12 + 512]",
    "ldmxcsr [r12 + 1144]",
    "fxsave64 [r12 + 576]",
    "fninit",
    "vzeroupper",
    "pop r13",
    "pop r12",
    "pop rbx",
    "ret",
    ".popsection",
);

unsafe extern "sysv64" {
    fn turtles_cpu_test_oracle(machine: *mut Machine);
}

/// Whether the host has what the oracle itself needs.
pub(crate) fn available() -> bool {
    is_x86_feature_detected!("avx2")
}

impl Machine {
    pub(crate) fn new() -> Self {
        Self {
            vector: VectorState::default(),
            x87: X87State::default(),
            gpr: [0; 4],
            rflags: 2,
            operand: 0,
            code: 0,
            mxcsr_default: 0x1f80,
        }
    }

    /// Executes the one-instruction function `code` (an instruction and RET) with `operand` at [R8].
    ///
    /// # Safety
    /// The instruction must exist on the host, and access nothing but the machine's registers and [R8].
    pub(crate) unsafe fn execute(&mut self, code: *const u8, operand: &mut [u8; 256]) {
        assert!(available());
        self.operand = operand.as_mut_ptr() as u64 + 64 - (operand.as_ptr() as u64 & 31);
        self.code = code as u64;
        // SAFETY: registers are saved and restored as the convention asks; the caller vouches for the instruction.
        unsafe { turtles_cpu_test_oracle(self) }
    }
}

/// Declares a table of instructions: their texts and, 32 bytes apart, their code.
macro_rules! instructions {
    ($symbol:ident, $($text:literal),* $(,)?) => {{
        unsafe extern "C" {
            static $symbol: u8;
        }
        mod code {
            std::arch::global_asm!(
            concat!(".pushsection .text\n.balign 32\n.globl ", stringify!($symbol), "\n", stringify!($symbol), ":\n"),
            concat!($(".balign 32\n", $text, "\nret\n",)* ".balign 32\n.popsection"),
            );
        }
        #[allow(clippy::undocumented_unsafe_blocks, reason = "comments get lost in expansions")]
        // SAFETY: the table above has 32 bytes of code for each text.
        let code: &'static [u8] =
            unsafe { std::slice::from_raw_parts(&raw const $symbol, 32 * [$($text),*].len()) };
        [$($text),*].into_iter().zip(code.chunks_exact(32)).collect::<Vec<(&'static str, &'static [u8])>>()
    }};
}
pub(crate) use instructions;

/// Executable memory for instructions made up by a test.
pub(crate) struct Code(super::CodeMemory);

impl Code {
    pub(crate) fn new() -> Self {
        Self(super::CodeMemory::new(16 << 20).unwrap())
    }

    /// The instruction and RET, as a function to execute.
    pub(crate) fn put(&mut self, insn: &iced_x86::Instruction) -> &'static [u8] {
        let mut encoder = iced_x86::Encoder::new(64);
        encoder.encode(insn, 0).unwrap();
        let mut code = encoder.take_buffer();
        code.push(0xc3);
        code.resize(32, 0x90);
        let at = self.0.append(&code).unwrap();
        // SAFETY: the bytes just appended stay where they are for good.
        unsafe { std::slice::from_raw_parts(at, code.len()) }
    }
}
